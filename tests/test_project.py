"""The project's own promises: packaging in step, clean notebooks, a README whose links and commands work."""

import ast
import functools
import importlib
import json
import operator
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas
import parameters
import pytest
import references
import yaml
from planted_faults import FAULTS, planted
from store_outputs import MARKS, REFERENCES, with_lines, with_tables
from walk import _chosen, parser

from paperlib import runs

ROOT = runs.root()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
by_name = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def test_environment_and_pyproject_name_the_same_packages():
    """conda calls PyTorch `pytorch`; everything else has one name and one lower bound in both files."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    wanted = {*project["dependencies"], *extras["notebooks"], *extras["tests"], f"python{project['requires-python']}"}
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


def test_the_package_stays_small():
    assert sum(len(path.read_text().splitlines()) for path in (ROOT / "paperlib").rglob("*.py")) < 3000


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


def test_nothing_is_unpickled():
    for path in (ROOT / "paperlib").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name, keywords = ast.unparse(node.func), {key.arg: ast.unparse(key.value) for key in node.keywords}
            assert name not in ("pickle.load", "pickle.loads", "yaml.load", "joblib.load", "eval", "exec"), path
            assert name != "torch.load" or keywords.get("weights_only") == "True", path
            assert name != "np.load" or keywords.get("allow_pickle") == "False", path


# --- notebooks


def code_cells(path):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_notebooks_are_numbered_from_01():
    assert [path.stem[:2] for path in NOTEBOOKS] == [f"{i:02}" for i in range(1, len(NOTEBOOKS) + 1)]


@by_name
def test_notebooks_are_valid_and_thin(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert len(notebook.cells) <= 30
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
    assert tagged[0].source == code_cells(NOTEBOOKS[0])[0].source


@by_name
def test_stored_outputs_are_those_of_one_clean_run(path):
    notebook = nbformat.read(path, as_version=4)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
    cells = code_cells(path)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell.outputs)
    for cell in cells:
        assert set(cell.metadata.get("tags", [])) <= {"parameters", "published"} and "papermill" not in cell.metadata
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr"
    assert not re.search(r"/(home|root|Users|tmp|work)/", path.read_text())
    assert path.stat().st_size < 1_000_000


# --- README and pages


@pytest.mark.parametrize("page", sorted((ROOT / "figures").glob("*/pages/*.html")), ids=lambda page: page.stem)
def test_downloaded_pages_need_no_other_file(page):
    text = page.read_text(encoding="utf-8")
    assert not re.search(r'(href|src)="(?!https?:|data:|#)', text) and "As committed, this notebook" not in text


def test_stored_parameters_are_those_of_quick():
    """With the meanings that parameters.py gives them now."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_train_cct.ipynb", as_version=4)
    (cell,) = (cell for cell in notebook.cells if cell.source == "parameters.card(run.settings)")
    with pandas.option_context("display.max_colwidth", None):
        shown = parameters.card(parameters.load_settings("quick")).to_html(notebook=True)
    assert cell.outputs[0].data["text/html"] == shown


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda path: path.name)
def test_links_to_files_resolve(page):
    links = re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", page.read_text())
    assert links or page.name != "README.md"
    for link, anchor in links:
        target = page.parent / link if link else page
        assert link.startswith("https://") or target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), flags=re.M)
            assert anchor[1:] in {re.sub(r"[^\w -]", "", text.lower()).replace(" ", "-") for text in headings}, anchor


def commands(page):
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.S)
    return [line for block in blocks for line in block.splitlines() if line.partition("#")[0].strip()]


@pytest.mark.parametrize("line", [line for page in PAGES for line in commands(page)])
def test_commands_of_the_pages_are_accepted(line, monkeypatch):
    """./run_all.sh lines pass the checks that come before any work; other lines start a file of the project."""
    monkeypatch.setattr("paperlib.data.check_name", lambda name: None)  # folder:my_images is the reader's own
    words = shlex.split(line, comments=True)
    file = words[1] if words[0] == "python" else words[0]
    file = next(word for word in words if word.endswith(".py")) if words[0] == "torchrun" else file
    assert (ROOT / file).is_file()
    if file.startswith("notebooks/"):
        script = importlib.import_module(Path(file).stem)
        script.parser().parse_args(words[words.index(file) + 1 :])
    if words[0] == "./run_all.sh":
        options = parser().parse_args(words[1:])
        assert options.list or parameters.load_settings(options.profile, parameters.changes_of(options.set))
        assert _chosen(options.start, options.only)


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
    assert names or folder.name == "quick"  # which is walked in minutes and shown in the notebooks
    for name in names:
        assert {path.suffix for path in folder.glob(f"{name}.*")} == {".png", ".pdf", ".svg", ".csv"}, name


@pytest.mark.parametrize("folder", WALKS, ids=lambda path: path.name)
def test_committed_results_fit_the_committed_profile(folder):
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["profile"] == folder.name
    assert summary["config"] == json.loads(json.dumps(parameters.load_settings(folder.name).model_dump()))
    walked = [path.stem for path in NOTEBOOKS if path.stem in summary["results"]]
    assert list(summary["results"]) == (walked if folder.name != "quick" else [path.stem for path in NOTEBOOKS])
    assert "+changes" not in summary["revision"]
    claims = [row["claim"] for row in summary["verdicts"]]
    assert claims == sorted(claims)
    decided = {"02": {"C2", "C3", "C6"}, "03": {"C4"}, "04": {"C5"}, "05": {"C1"}}
    assert set(claims) == set().union(*(decided.get(name[:2], set()) for name in walked))


@pytest.mark.parametrize("profile", [path.name for path in WALKS])
def test_the_pages_show_the_committed_verdicts(profile):
    summary = json.loads((ROOT / "figures" / profile / "summary.json").read_text())
    assert MARKS[0].format(profile) in (ROOT / "README.md").read_text()
    for page in PAGES:
        assert with_tables(page.read_text(), summary) == page.read_text(), page


def test_the_readme_shows_the_committed_networks():
    page = (ROOT / "README.md").read_text()
    assert with_lines(page, REFERENCES, references.table()) == page


@pytest.mark.parametrize("fault", FAULTS, ids=[fault[-1] for fault in FAULTS])
def test_faults_can_be_planted(fault):
    _, text = planted(ROOT, fault)
    ast.parse(text)


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_benchmarks_start(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "usage" in done.stdout
