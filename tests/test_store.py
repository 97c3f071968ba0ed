"""Committed results: what a summary names, without large files, and nothing else."""

import itertools
import json
import re
import shutil

import nbformat
import pandas as pd
import pytest

from paperlib import answers, experiment, files, notebooks, pages, paths
from paperlib.cli import check, main, publish
from paperlib.experiment import settings, store

CUT = {"epochs": 1, "max_steps": 2, "readout_epochs": 1, "limit": 300, "taps": ["attn", "block"]}


@pytest.mark.slow
def test_stages_are_stored_as_the_summary_names_them(folders):
    run = settings.open_run("quick", CUT)
    experiment.nodes.matrices(run, 0, "trained")
    run.record("02", {}, [])
    used = {
        name: stage["key"]
        for name, stage in files.read_json(run.output / "summary.json")["stages"].items()
        if "train-" not in name
    }
    assert set(used) == {"readouts-trained-seed0", "matrices-trained-seed0"}
    cut = settings.open_run("quick", CUT | {"threshold": 0.5})  # a later walk with other settings
    experiment.nodes.matrices(cut, 0, "trained")
    target = folders / "committed"
    (target / "matrices-trained-seed0" / "old").mkdir(parents=True)
    (target / "forgotten-seed0" / "old").mkdir(parents=True)
    publish.store_stages(used, run.stages, target)
    assert {path.parent.name: path.name for path in target.glob("*/*")} == used
    names = {path.name for path in target.rglob("*") if path.is_file()}
    assert names == {"stage.json", "correct.npz", "matrices.npz"}
    shutil.rmtree(run.stages)
    publish.store_stages(used, run.stages, target)  # what is committed already stays
    with pytest.raises(ValueError, match="run the notebooks again"):
        publish.store_stages({"matrices-trained-seed0": "0" * 16, "snr-trained-seed0": "0" * 16}, run.stages, target)
    assert {path.parent.name: path.name for path in target.glob("*/*")} == used


def test_a_copy_that_was_interrupted_is_not_taken_for_a_stage(folders, monkeypatch):
    made, kept = folders / "made", folders / "kept"
    (made / "s" / "key").mkdir(parents=True)
    for name in ("a.csv", "b.csv", ".b.csv.0123.part", "stage.json"):
        (made / "s" / "key" / name).write_text(name)

    def stops(source, target):
        if source.endswith("b.csv"):
            raise KeyboardInterrupt
        return shutil.copy2(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil.copytree, "__defaults__", (False, None, stops, False, False))
        publish.store_stages({"s": "key"}, made, kept)
    assert publish.finished_stages(kept) == {} and not (kept / "s" / "key").exists()
    publish.store_stages({"s": "key"}, made, kept)
    assert {path.name for path in (kept / "s" / "key").iterdir()} == {"a.csv", "b.csv", "stage.json"}
    assert len(list((kept / "s").iterdir())) == 1


@pytest.fixture
def project(folders, monkeypatch):
    """A project of this test's own to publish into, with places for the tables; profiles are the real ones."""
    for module in (publish, notebooks):
        monkeypatch.setattr(module, "root", lambda: folders)
    (folders / "docs").mkdir()
    (folders / "notebooks").mkdir()
    for page in ("README.md", "docs/page.md"):
        (folders / page).write_text("\n".join((*pages.REFERENCES, *pages.MARKS)).format("cifar100-cpu"))
    return folders


def put(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text("{}")


def test_stages_of_an_unfinished_walk_are_stored(project, capsys, monkeypatch):
    """What was stored before stays; two versions of a stage are refused."""
    made, kept = (project / place / "cifar100-cpu" / "stages" for place in ("runs", "figures"))
    command = ["publish", "cifar100-cpu", "--unfinished"]

    def refused(words):
        before = sorted(kept.rglob("*"))
        return main(command) == 2 and words in capsys.readouterr().err and sorted(kept.rglob("*")) == before

    put(kept / "examples-seed0" / "same", "stage.json")
    put(made / "snr-seed0" / "new", "stage.json", "taps.csv")
    put(made / "train-seed0" / "key", "stage.json", "curve.csv")  # a network of one's own
    put(made / "snr-seed0" / "unfinished", "taps.csv")
    put(made / "readouts-seed0" / "key", "stage.json", "correct.npz", "weights.safetensors")
    with monkeypatch.context() as patch:
        own = settings.load_settings("cifar100-cpu").model_copy(update={"weights": "trained"})
        patch.setattr(settings, "load_settings", lambda profile: own)
        assert refused("networks of its own")
    assert main(command) == 0
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {
        "snr-seed0/new/stage.json", "snr-seed0/new/taps.csv", "examples-seed0/same/stage.json",
        "readouts-seed0/key/stage.json", "readouts-seed0/key/correct.npz",
    }  # fmt: skip
    put(kept / "matrices-seed0" / "old", "stage.json")
    put(made / "matrices-seed0" / "new", "stage.json")
    assert refused("matrices-seed0 is stored with other settings")
    put(made / "snr-seed0" / "cut", "stage.json")  # with other settings: nobody knows which one is meant
    assert refused("several finished stages")


def finished_walk(project, profile, notebook_names=(), stages=(), **config):
    """A run's folder as papermill and the notebooks would leave it: a summary, a figure, stages, executed copies with
    an output of their own."""
    walk = project / "runs" / profile / "walk"
    walk.mkdir(parents=True, exist_ok=True)
    (walk / "snr_per_encoder.png").write_bytes(b"a picture")
    for name in notebook_names:
        notebook = nbformat.read(project / "notebooks" / f"{name}.ipynb", as_version=4)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs = [nbformat.v4.new_output("stream", text=f"of the walk: {name}")]
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        injected = nbformat.v4.new_code_cell(
            f'profile = "{profile}"\nsettings = {{}}', metadata={"tags": ["injected-parameters"]}
        )
        notebook.cells.insert(place + 1, injected)
        nbformat.write(notebook, walk / f"{name}.ipynb")
    for stage in stages:
        put(project / "runs" / profile / "stages" / stage / "key", "stage.json", "nodes.csv")
    used = settings.load_settings(profile)
    summary = {
        "profile": profile,
        "config": used.model_dump() | config,
        "seeds": used.seeds,
        "data": {"name": used.data},
        "stages": {name: {"key": "key"} for name in stages},
        "results": {name: {} for name in notebook_names},
        "verdicts": [],
    }
    (walk / "summary.json").write_text(json.dumps(summary))
    return walk


def everything(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def with_notebooks(project):
    for path in (paths.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        shutil.copy(path, project / "notebooks")
    return project


def test_outputs_of_executed_notebooks_are_published(with_notebooks):
    names, before = ("03_andc_pruning", "05_cnn_counterpart"), everything(with_notebooks / "notebooks")
    finished_walk(with_notebooks, "cifar100-cpu", names)
    assert main(["publish", "cifar100-cpu"]) == 0
    for path, content in everything(with_notebooks / "notebooks").items():
        if path.stem not in names:
            assert content == before[path]
            continue
        notebook, old = nbformat.read(path, as_version=4), nbformat.reads(before[path].decode(), as_version=4)
        nbformat.validate(notebook)
        assert [cell.source for cell in notebook.cells] == [cell.source for cell in old.cells]  # nothing injected
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert all(cell.outputs[0].text == f"of the walk: {path.stem}" for cell in code)
    assert (with_notebooks / "figures" / "cifar100-cpu" / "snr_per_encoder.png").read_bytes() == b"a picture"


def test_of_the_demonstration_only_your_network_is_published(with_notebooks):
    names, before = ("03_andc_pruning", notebooks.OWN), everything(with_notebooks)
    finished_walk(with_notebooks, "quick", names)
    walked = everything(with_notebooks / "runs")
    assert main(["publish", "quick"]) == 0
    after = everything(with_notebooks)
    changed = {path.stem for path in after.keys() - walked.keys() if after[path] != before.get(path)}
    assert changed == {notebooks.OWN}


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('profile = "cifar100-cpu"', 'profile = "quick"', "other parameters"),
        ("settings = {}", 'settings = {"epochs": 1}', "other parameters"),
        ("run.record(", "run.forget(", "other cells"),
    ],
)
def test_copies_of_another_walk_are_refused(old, new, sentence, with_notebooks, capsys):
    walk = finished_walk(with_notebooks, "cifar100-cpu", ("01_train_cct", "03_andc_pruning"), ("snr-trained-seed0",))
    copy = nbformat.read(walk / "03_andc_pruning.ipynb", as_version=4)
    assert any(old in cell.source for cell in copy.cells)
    for cell in copy.cells:
        cell.source = cell.source.replace(old, new)
    nbformat.write(copy, walk / "03_andc_pruning.ipynb")
    before = everything(with_notebooks)
    assert main(["publish", "cifar100-cpu"]) == 2
    said = capsys.readouterr().err
    assert "03_andc_pruning" in said and sentence in said
    assert everything(with_notebooks) == before


def test_results_that_others_could_not_use_are_refused(project, capsys):
    """Of networks that are not committed."""
    finished_walk(project, "flowers102")
    before = everything(project)
    assert main(["publish", "flowers102"]) == 2
    assert "committed networks" in capsys.readouterr().err and everything(project) == before


FIGURES = paths.root() / "figures"
COMMITTED = sorted(path.parent.name for path in FIGURES.glob("*/summary.json") if (path.parent / "stages").exists())


@pytest.mark.slow
@pytest.mark.parametrize("profile", COMMITTED)
def test_committed_verdicts_follow_from_committed_stages(profile, capsys):
    assert main(["check", "verdicts", profile]) == 0
    assert "the same as summary.json; 0 nodes differ" in capsys.readouterr().out


def test_regenerating_needs_committed_results(folders, capsys):
    assert main(["check", "verdicts", "cifar100"]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_a_measurement_agrees_within_the_spread_of_the_seeds():
    index = pd.MultiIndex.from_product([["attn", "block"], [1, 4]], names=["tap", "encoder"])
    again = pd.DataFrame({"accuracy": [0.5, 0.6, 0.7, 0.8], "snr": [2.0, 2.5, 3.0, 3.5]}, index=index)
    rows = []
    for seed, shift in ((0, 0.01), (1, 0.03), (2, -0.02)):
        part = (again + shift).reset_index().assign(seed=seed, network="trained", centred=False)
        rows += [part, part.assign(network="random", snr=9.0), part.assign(centred=True, snr=9.0)]
    table = pd.concat(rows)
    found = check.compared(again, table, 0, 400)
    assert found.xs("agrees", axis=1, level=1).all(axis=None)
    assert found["snr"].allowed.to_numpy() == pytest.approx([0.05] * 4)
    again.loc[("block", 4), "snr"] -= 0.05
    agrees = check.compared(again, table, 0, 400)["snr"].agrees
    assert agrees.tolist() == [True, True, True, False]


@pytest.mark.parametrize("statistic, value, allowed", [("accuracy", 0.5, 0.05), ("snr", 3.0, 0.15)])
def test_a_measurement_of_one_seed_agrees_within_its_own_uncertainty(statistic, value, allowed):
    index = pd.MultiIndex.from_tuples([("block", 1)], names=["tap", "encoder"])
    again = pd.DataFrame({"accuracy": [0.5], "snr": [3.0]}, index=index)
    table = again.reset_index().assign(seed=4, network="trained", centred=False)
    for off, agrees in ((0, True), (0.98 * allowed, True), (-0.98 * allowed, True), (1.02 * allowed, False)):
        again[statistic] = value + off  # 400 images: one standard error at 0.5 is 0.025
        assert check.compared(again, table, 4, 400)[statistic].agrees.tolist() == [agrees]


def test_claims_of_notebooks_that_were_not_walked_are_said_to_be_missing(tmp_path):
    row = {"claim": "C2", "statistic": "SNR", "effect": 1.0, "uncertainty": 0.1, "null": "none", "notes": ""}
    row |= {"verdict": "supported", "beside": False, "by_seed": [], "numbers": "3 against 2"}
    summary = {"profile": "cut", "seeds": [0], "data": {"name": "glyphs100"}, "results": {}, "verdicts": [row]}
    table = pages.verdict_table(summary).splitlines()
    assert any("| SNR<br>3 against 2 |" in line for line in table)
    words = {line[2:4]: re.search(r"\*\*(.*?)\*\*", line)[1] for line in table[2:]}
    assert words == {claim: "supported" if claim == "C2" else "not measured yet" for claim in pages.CLAIMS}
    marks = [(pages.MARKS[0].format(f"cut, {claim}"), pages.MARKS[1]) for claim in ("C2", "C4")]
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    page = pages.with_results("\n".join(itertools.chain(*marks)), tmp_path)
    assert "**Supported.**" in page and "**Not measured yet.**" in page


def test_claims_of_one_verdict_are_named_together():
    verdicts = ["supported in part (9 of 14 rows)", "supported", "supported in part (not: row)", answers.NOT_YET]
    found = {f"C{number}": answers.Answer(verdict) for number, verdict in enumerate(verdicts, start=2)}
    said = pages.brief(found, {"seeds": [0, 1, 2], "data": {"name": "clinc150"}})
    assert [part.split(" supported")[0] for part in said.partition(": ")[2].split("; ")] == ["C2, C4", "C3"]


def test_storing_some_notebooks_keeps_the_stages_of_the_others(project):
    kept = project / "figures" / "cifar100-cpu" / "stages"
    shutil.copy(paths.root() / "notebooks" / "03_andc_pruning.ipynb", project / "notebooks")  # the only one there is
    put(kept / "andc-seed0" / "key", "stage.json")
    for names, expected in (((), {"snr-seed0", "andc-seed0"}), (("03_andc_pruning",), {"snr-seed0"})):
        shutil.rmtree(project / "runs", ignore_errors=True)
        finished_walk(project, "cifar100-cpu", names, stages=("snr-seed0",))
        assert main(["publish", "cifar100-cpu"]) == 0
        assert {path.name for path in kept.iterdir() if any(path.iterdir())} == expected


def test_figures_are_stored_alone_where_the_repository_is_full(project, capsys):
    """Tables are made, stages are not stored; figures of a walk with other settings are refused."""
    figures, readme = project / "figures" / "flowers102-cpu", project / "README.md"
    readme.write_text("\n".join((*pages.REFERENCES, *pages.MARKS)).format("flowers102-cpu"))
    finished_walk(project, "flowers102-cpu", stages=("snr-trained-seed0",), held_out=0.4)
    before = everything(project)
    assert main(["publish", "flowers102-cpu", "--figures-only"]) == 2
    assert "other settings" in capsys.readouterr().err and everything(project) == before
    shutil.rmtree(project / "runs")
    finished_walk(project, "flowers102-cpu", stages=("snr-trained-seed0",))
    assert main(["publish", "flowers102-cpu", "--figures-only"]) == 0
    assert "not measured yet" in readme.read_text()
    assert {path.name for path in figures.iterdir()} == {"summary.json", "snr_per_encoder.png"}


def test_packed_tables_are_the_same_tables(tmp_path):
    """Large ones are published packed; what does not unpack to what was made is refused."""
    made, kept = tmp_path / "runs", tmp_path / "committed"
    folder = made / "s" / "key"
    folder.mkdir(parents=True)
    table = pd.DataFrame({"a": range(20_000), "b": [0.1] * 20_000})
    table.to_csv(folder / "large.csv", index=False)
    table[:3].to_csv(folder / "small.csv", index=False)
    hashes = {path.name: files.sha256(path) for path in folder.glob("*.csv")}
    manifest = {"outputs": hashes, "sha256": store._sum(hashes)}
    (folder / "stage.json").write_text(json.dumps(manifest))
    publish.store_stages({"s": "key"}, made, kept)
    copy = kept / "s" / "key"
    assert {path.name for path in copy.iterdir()} == {"large.csv.gz", "small.csv", "stage.json"}
    assert store.changed_files(copy, manifest) == []
    assert store.Stage(copy, manifest).table("large").equals(table)
    packed = (copy / "large.csv.gz").read_bytes()
    files.pack(folder / "large.csv")
    assert (folder / "large.csv.gz").read_bytes() == packed  # the same bytes each time
    for damaged in (packed[:-9], packed[:500] + b"x" + packed[501:], b"no gzip"):
        (copy / "large.csv.gz").write_bytes(damaged)
        assert store.changed_files(copy, manifest) == ["large.csv"]
