"""The project's own promises: packaging in step, clean notebooks, a README whose links and commands work."""

import argparse
import ast
import functools
import json
import operator
import re
import shlex
import subprocess
import sys
import tomllib

import nbformat
import pandas
import pytest
import yaml

from paperlib import answers, cli, display, notebooks, pages, paths
from paperlib.cli import publish
from paperlib.experiment import settings

ROOT = paths.root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
START, *MEASURING = NOTEBOOKS  # 00 reads what the others measure
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_environment_and_pyproject_name_the_same_packages():
    """conda calls PyTorch `pytorch`; everything else has one name and one lower bound in both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *functools.reduce(operator.iadd, extras.values(), [])}
    wanted.add(f"python{project['requires-python']}")
    found, pip = set(), []
    for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]:
        if isinstance(entry, dict):
            pip += entry["pip"]
        else:
            found.add(re.sub(r"^pytorch(?=\W|$)", "torch", entry.replace(" ", "")))
    found |= {entry for entry in pip if not entry.startswith("-e")}
    assert found - {"pip"} == wanted


def test_every_requirement_has_a_tested_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), flags=re.M)
    named = [*project["dependencies"], *functools.reduce(operator.iadd, project["optional-dependencies"].values(), [])]
    assert {re.match(r"[\w.-]+", entry)[0].lower() for entry in named} <= {name.lower() for name in pinned}


def test_ruff_is_content():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "format", "--check", "paperlib", "tests"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


def test_line_ends_survive_a_checkout():
    """Scripts and hashed files keep their bytes whatever core.autocrlf says."""
    files = ["run_all.sh", "figures/cifar100-cpu/snr_per_encoder.csv", "paperlib/snp.py"]
    told = ["git", "check-attr", "eol", "--", *files]
    done = subprocess.run(told, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("no git checkout")
    assert all(line.endswith("eol: lf") for line in done.stdout.splitlines())


def test_notebooks_hold_no_code_beside_them():
    assert not list((ROOT / "notebooks").rglob("*.py"))


def test_nothing_is_unpickled():
    for path in (ROOT / "paperlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert name not in ("pickle.load", "pickle.loads", "joblib.load", "eval", "exec"), path
            assert name != "yaml.load" or ast.unparse(node.args[1]) == "PlainYaml", path  # which is safe, see below
            assert name != "torch.load" or keywords.get("weights_only") == "True", path
            assert name != "np.load" or keywords.get("allow_pickle") == "False", path


def test_plain_yaml_makes_no_objects():
    assert issubclass(settings.PlainYaml, yaml.SafeLoader)
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getcwd []", settings.PlainYaml)


# --- notebooks


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_notebooks_are_numbered():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(len(NOTEBOOKS))]
    assert notebooks.notebook_files() == [*MEASURING, START]


@by_name
def test_notebooks_are_valid_and_thin(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 50
    for cell in code_cells(path):
        if "published" in cell.metadata.get("tags", []):
            continue  # fetches the project in Colab, see test_publish.py
        kinds = {type(node) for node in ast.walk(ast.parse(cell.source))}
        assert not kinds & {ast.FunctionDef, ast.ClassDef, ast.For, ast.While, ast.If, ast.Try, ast.With}, cell.source


@by_name
def test_parameters_are_typed_and_the_same_everywhere(path):
    tagged = [cell for cell in code_cells(path) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    names = {node.target.id: ast.unparse(node.annotation) for node in ast.parse(tagged[0].source).body}
    assert names == {"profile": "str", "settings": "dict"}
    assert (
        path.stem in (notebooks.START, notebooks.TEXT, notebooks.OWN)
        or tagged[0].source == code_cells(MEASURING[0])[0].source
    )


@by_name
def test_stored_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for cell in cells:
        assert (
            set(cell.metadata.get("tags", [])) <= {"parameters", "published", "hide-input"}
            and "papermill" not in cell.metadata
        )
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
    assert not re.search(r"/(home|root|Users|tmp|work)/", path.read_text())
    assert path.stat().st_size < 1_500_000


# --- README and pages


def test_notebooks_show_a_run_of_the_profile_that_readers_see():
    """Its settings with the meanings that they have now."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_train_cct.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if "display.parameters(run)" in cell.source)
    with pandas.option_context("display.max_colwidth", None):
        run = argparse.Namespace(settings=settings.load_settings(publish.SHOWN), profile=publish.SHOWN)
        assert cell.outputs[0].data["text/html"] == display.parameters(run)._repr_html_()


@by_name
def test_tables_that_are_seen_are_short(path):
    """Longer ones fold."""
    for cell in code_cells(path):
        for output in cell.outputs:
            shown = re.sub(r"<details>.*?</details>", "", output.get("data", {}).get("text/html", ""), flags=re.S)
            assert shown.count("<tr") <= 17 and "<tbody>\n  </tbody>" not in shown, cell.source


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_to_files_resolve(page):
    links = re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text())
    assert links or page.name != "README.md"
    for link, anchor in links:
        target = page.parent / link if link else page
        assert link.startswith("https://") or target.exists(), link
        if anchor:
            text = target.read_text()
            headings = [*re.findall(r"^#+ (.+)$", text, flags=re.M), *re.findall(r'id=\\?"(\w+)\\?"', text)]
            assert anchor[1:] in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


def test_the_readme_is_one_page_with_its_pictures():
    page = (ROOT / "README.md").read_text()
    pictures = re.findall(r'src(?:set)?="([^"]+)"', page)
    assert len(page.encode()) <= 8 * 1024 and len(pictures) == len(set(pictures)) == 8
    assert all((ROOT / name).is_file() for name in pictures)


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.partition("#")[0].strip()]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_of_the_pages_are_accepted(line, monkeypatch):
    """./run_all.sh and python -m paperlib lines pass the checks that come before any work; others start a file."""
    monkeypatch.setattr("paperlib.data.check_name", lambda name: None)  # folder:my_images is the reader's own
    words = shlex.split(line, comments=True)
    if words[0] == "./run_all.sh" and words[1:] != ["--list"]:
        words = ["-m", "paperlib", "run", *words[1:]]
    if "paperlib" in words:
        assert words[words.index("paperlib") - 1] == "-m"
        options = cli.parsed(words[words.index("paperlib") + 1 :])
        if "set" in options:
            assert settings.load_settings(options.profile, settings.changes_of(options.set))
    else:
        file = words[1] if words[0] == "python" else words[0]
        assert (ROOT / file).is_file() or words[0] == "papermill"


def test_python_of_the_readme_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert blocks
    for block in blocks:
        subprocess.run([sys.executable, "-c", block], check=True, capture_output=True)


# --- committed figures


WALKS = sorted(path.parent for path in (ROOT / "figures").glob("*/summary.json"))


@pytest.mark.parametrize("folder", WALKS, ids=lambda path: path.name)
def test_every_committed_figure_has_its_four_files(folder):
    names = {path.stem for path in folder.iterdir() if path.is_file()} - {"summary"}
    assert names
    for name in names:
        assert {path.suffix for path in folder.glob(f"{name}.*")} == {".png", ".pdf", ".svg", ".csv"}, name


@pytest.mark.parametrize("folder", WALKS, ids=lambda path: path.name)
def test_committed_results_fit_the_committed_profile(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["profile"] == folder.name
    assert summary["config"] == json.loads(json.dumps(settings.load_settings(folder.name).model_dump()))
    walked = [path.stem for path in MEASURING if path.stem in summary["results"]]
    assert list(summary["results"]) == walked
    assert "+changes" not in summary["revision"]
    claims = [row["claim"] for row in summary["verdicts"]]
    assert claims == sorted(claims)
    decided = {"02": {"C2", "C3", "C6"}, "03": {"C4"}, "04": {"C5"}, "05": {"C1"}, "07": {"C2", "C3", "C4", "C5", "C6"}}
    assert set(claims) == set().union(*(decided.get(name[:2], set()) for name in walked))


@pytest.mark.parametrize("profile", [path.name for path in WALKS])
def test_the_pages_show_the_committed_verdicts(profile):
    for page in PAGES:
        to_root = "../" if page.parent.name == "docs" else ""
        assert pages.with_results(page.read_text(), ROOT / "figures" / profile, to_root) == page.read_text(), page


def test_the_answers_are_short():
    for claim, answer in answers.answers(ROOT / "figures" / publish.SHOWN).items():
        for text in (answers.CLAIMS[claim][0], f"{answer.verdict} {answer.words}", answer.number):
            assert len([word for word in text.split() if re.search(r"\w", word)]) <= 10, text


def test_every_table_that_is_made_stands_on_a_page():
    text = "".join(page.read_text() for page in PAGES)
    shown = json.loads((ROOT / "figures" / publish.SHOWN / "summary.json").read_text())["profile"]
    for mark in (pages.HEADLINE[0].format(shown), pages.ANSWERS[0].format(shown), pages.REFERENCES[0]):
        assert text.count(mark) == 1


@pytest.mark.slow
def test_cases_of_the_page_on_robustness_are_counted():
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-n", "0", "tests"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    collected = re.findall(r"^tests/((test_\w+\.py)::\w+)", listed, flags=re.M)
    rows = re.findall(r"\| (\d+) \| (`test_.*`) \|$", (ROOT / "docs" / "robustness.md").read_text(), flags=re.M)
    assert len(rows) > 10
    for number, tests in rows:
        named = re.findall(r"`([^`]+)`", tests)
        cases = {name: sum(name in case for case in collected) for name in named}
        drawn = "test_interruptions.py" in named  # one test, its number of kills is a choice
        assert all(cases.values()) and (drawn or sum(cases.values()) == int(number)), (number, cases)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_start(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
