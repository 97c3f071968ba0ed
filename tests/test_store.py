"""Committed results: what a summary names, without large files, and nothing else."""

import html
import itertools
import json
import re
import shutil

import nbformat
import pandas as pd
import parameters
import pytest
import regenerate
import remeasure
import stages
import store_outputs

from paperlib import runs

CUT = {"epochs": 1, "max_steps": 2, "readout_epochs": 1, "limit": 300, "taps": ["attn", "block"]}


@pytest.mark.slow
def test_stages_are_stored_as_the_summary_names_them(folders):
    run = parameters.open_run("quick", CUT)
    stages.matrices(run, 0, "trained")
    run.record("02", {}, [])
    used = {
        name: key
        for name, key in runs.read_json(run.figures / "summary.json")["stages"].items()
        if "train-" not in name
    }
    assert set(used) == {"readouts-trained-seed0", "matrices-trained-seed0"}
    cut = parameters.open_run("quick", CUT | {"threshold": 0.5})  # a later walk with other settings
    stages.matrices(cut, 0, "trained")
    target = folders / "committed"
    (target / "matrices-trained-seed0" / "old").mkdir(parents=True)
    (target / "forgotten-seed0" / "old").mkdir(parents=True)
    store_outputs.store_stages(used, run.folder / "stages", target)
    assert {path.parent.name: path.name for path in target.glob("*/*")} == used
    names = {path.name for path in target.rglob("*") if path.is_file()}
    assert names == {"stage.json", "correct.npz", "matrices.npz"}
    shutil.rmtree(run.folder / "stages")
    store_outputs.store_stages(used, run.folder / "stages", target)  # what is committed already stays
    with pytest.raises(ValueError, match="run the walk again"):
        store_outputs.store_stages(
            {"matrices-trained-seed0": "0" * 16, "snr-trained-seed0": "0" * 16}, run.folder / "stages", target
        )
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
        store_outputs.store_stages({"s": "key"}, made, kept)
    assert store_outputs.finished_stages(kept) == {} and not (kept / "s" / "key").exists()
    store_outputs.store_stages({"s": "key"}, made, kept)
    assert {path.name for path in (kept / "s" / "key").iterdir()} == {"a.csv", "b.csv", "stage.json"}
    assert len(list((kept / "s").iterdir())) == 1


def test_stages_of_an_unfinished_walk_are_stored(folders, monkeypatch):
    """What was stored before stays; two versions of a stage are refused."""
    monkeypatch.setattr(runs, "root", lambda: folders)
    monkeypatch.setattr(parameters, "profiles", lambda: ["cifar100-cpu"])
    settings = parameters.Settings.model_construct(weights="trained")
    monkeypatch.setattr(parameters, "load_settings", lambda profile: settings)
    made, kept = (folders / place / "cifar100-cpu" / "stages" for place in ("runs", "figures"))

    def put(folder, *names):
        folder.mkdir(parents=True)
        for name in names:
            (folder / name).write_text("{}")

    put(kept / "examples-seed0" / "same", "stage.json")
    put(made / "snr-seed0" / "new", "stage.json", "taps.csv")
    put(made / "train-seed0" / "key", "stage.json", "curve.csv")  # a network of one's own
    put(made / "snr-seed0" / "unfinished", "taps.csv")
    put(made / "readouts-seed0" / "key", "stage.json", "correct.npz", "weights.safetensors")
    with pytest.raises(SystemExit, match="networks of its own"):
        store_outputs.main(["cifar100-cpu", "--unfinished"])
    settings = settings.model_copy(update={"weights": "reference"})
    assert store_outputs.main(["cifar100-cpu", "--unfinished"]) == 0
    assert {str(path.relative_to(kept)) for path in kept.rglob("*") if path.is_file()} == {
        "snr-seed0/new/stage.json", "snr-seed0/new/taps.csv", "examples-seed0/same/stage.json",
        "readouts-seed0/key/stage.json", "readouts-seed0/key/correct.npz",
    }  # fmt: skip
    put(kept / "matrices-seed0" / "old", "stage.json")
    put(made / "matrices-seed0" / "new", "stage.json")
    with pytest.raises(SystemExit, match="matrices-seed0 is stored with other settings"):
        store_outputs.main(["cifar100-cpu", "--unfinished"])
    put(made / "snr-seed0" / "cut", "stage.json")  # with other settings: nobody knows which one is meant
    with pytest.raises(SystemExit, match="several finished stages"):
        store_outputs.main(["cifar100-cpu", "--unfinished"])


def executed_copies(folder, parameters):
    """The committed notebooks as papermill would leave them after a walk with these parameters."""
    folder.mkdir(parents=True)
    for path in sorted((runs.root() / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
        injected = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["injected-parameters"]})
        notebook.cells.insert(place + 1, injected)
        nbformat.write(notebook, folder / path.name)


def test_executed_notebooks_become_pages(folders):
    executed_copies(folders / "runs" / "cifar100-cpu", 'profile = "cifar100-cpu"\nsettings = {}')
    names = ("03_andc_pruning", "05_cnn_counterpart")
    notebooks = store_outputs.executed_notebooks("cifar100-cpu", names)
    store_outputs.store_pages(notebooks, folders / "pages")
    pages = {path.stem: path.read_text() for path in (folders / "pages").iterdir()}
    assert pages.keys() == set(names)
    for name, page in pages.items():
        assert f"<title>{name}</title>" in page and "data:image/png" in page
        text = html.unescape(re.sub("<[^>]+>", "", page))
        assert 'profile = "cifar100-cpu"' in text  # the walk's own parameters
        assert "As committed" not in text and 'href="../' not in page  # what is true of a notebook in its folder only
    assert "Applied nodal diagonal connections" in pages["03_andc_pruning"]


@pytest.mark.parametrize(
    "parameters", ['profile = "quick"\nsettings = {}', 'profile = "cifar100"\nsettings = {"epochs": 1}']
)
def test_copies_of_another_walk_are_refused(parameters, folders):
    executed_copies(folders / "runs" / "cifar100", parameters)
    with pytest.raises(SystemExit, match="other parameters"):
        store_outputs.executed_notebooks("cifar100", ["03_andc_pruning"])


@pytest.mark.parametrize("figures", ["elsewhere", "figures"])
def test_results_that_others_could_not_use_are_refused(figures, folders, monkeypatch):
    """Of another figures folder, or of networks that are not committed."""
    monkeypatch.setattr(runs, "root", lambda: folders)
    monkeypatch.setenv("PAPERLIB_FIGURES", str(folders / figures))
    (folders / figures / "flowers102").mkdir(parents=True)
    summary = {"config": {"weights": "trained"}, "stages": {}, "verdicts": []}
    (folders / figures / "flowers102" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(SystemExit, match="PAPERLIB_FIGURES" if figures == "elsewhere" else "weights=reference"):
        store_outputs.main(["flowers102"])


@pytest.mark.slow
@pytest.mark.parametrize("profile", sorted(path.parent.name for path in (runs.root() / "figures").glob("*/stages")))
def test_committed_verdicts_follow_from_committed_stages(profile, capsys, monkeypatch):
    monkeypatch.delenv("PAPERLIB_FIGURES", raising=False)
    assert regenerate.main([profile]) == 0
    assert "the same as summary.json; 0 nodes differ" in capsys.readouterr().out


def test_regenerating_needs_committed_results(folders, capsys):
    assert regenerate.main(["cifar100"]) == 2
    assert "summary.json" in capsys.readouterr().err


def test_a_measurement_agrees_within_the_spread_of_the_seeds():
    index = pd.MultiIndex.from_product([["attn", "block"], [1, 4]], names=["tap", "encoder"])
    again = pd.DataFrame({"accuracy": [0.5, 0.6, 0.7, 0.8], "snr": [2.0, 2.5, 3.0, 3.5]}, index=index)
    rows = []
    for seed, shift in ((0, 0.01), (1, 0.03), (2, -0.02)):
        part = (again + shift).reset_index().assign(seed=seed, network="trained", centred=False)
        rows += [part, part.assign(network="random", snr=9.0), part.assign(centred=True, snr=9.0)]
    table = pd.concat(rows)
    found = remeasure.compared(again, table, 0, 400)
    assert found.xs("agrees", axis=1, level=1).all(axis=None)
    assert found["snr"].allowed.to_numpy() == pytest.approx([0.05] * 4)
    again.loc[("block", 4), "snr"] -= 0.05
    agrees = remeasure.compared(again, table, 0, 400)["snr"].agrees
    assert agrees.tolist() == [True, True, True, False]


@pytest.mark.parametrize("statistic, value, allowed", [("accuracy", 0.5, 0.05), ("snr", 3.0, 0.15)])
def test_a_measurement_of_one_seed_agrees_within_its_own_uncertainty(statistic, value, allowed):
    index = pd.MultiIndex.from_tuples([("block", 1)], names=["tap", "encoder"])
    again = pd.DataFrame({"accuracy": [0.5], "snr": [3.0]}, index=index)
    table = again.reset_index().assign(seed=4, network="trained", centred=False)
    for off, agrees in ((0, True), (0.98 * allowed, True), (-0.98 * allowed, True), (1.02 * allowed, False)):
        again[statistic] = value + off  # 400 images: one standard error at 0.5 is 0.025
        assert remeasure.compared(again, table, 4, 400)[statistic].agrees.tolist() == [agrees]


def test_claims_of_notebooks_that_were_not_walked_are_said_to_be_missing():
    row = {"claim": "C2", "statistic": "SNR", "effect": 1.0, "uncertainty": 0.1, "null": "none", "notes": ""}
    row |= {"verdict": "supported", "beside": False, "by_seed": [], "numbers": "3 against 2"}
    summary = {"profile": "cut", "verdicts": [row]}
    table = store_outputs.verdict_table(summary).splitlines()
    assert any("| SNR<br>3 against 2 |" in line for line in table)
    words = {line[2:4]: re.search(r"\*\*(.*?)\*\*", line)[1] for line in table[2:]}
    assert words == {claim: "supported" if claim == "C2" else "not measured yet" for claim in store_outputs.CLAIMS}
    marks = [(store_outputs.MARKS[0].format(f"cut, {claim}"), store_outputs.MARKS[1]) for claim in ("C2", "C4")]
    page = store_outputs.with_tables("\n".join(itertools.chain(*marks)), summary)
    assert "**Supported.**" in page and "**Not measured yet.**" in page


def test_storing_some_notebooks_keeps_the_stages_of_the_others(folders, monkeypatch):
    figures = folders / "figures" / "cifar100-cpu"
    monkeypatch.setattr(runs, "root", lambda: folders)
    for page in ("README.md", "docs/page.md"):
        (folders / page).parent.mkdir(exist_ok=True)
        (folders / page).write_text("\n".join(store_outputs.REFERENCES))
    (folders / "notebooks").mkdir()
    (folders / "notebooks" / "03_andc_pruning.ipynb").write_text("")
    for stage in ("snr-seed0", "andc-seed0"):
        (figures / "stages" / stage / "key").mkdir(parents=True)
        (figures / "stages" / stage / "key" / "stage.json").write_text("{}")
    summary = {"profile": "cifar100-cpu", "config": {"weights": "reference"}, "results": {}, "verdicts": []}
    for results, kept in (({}, {"snr-seed0", "andc-seed0"}), ({"03_andc_pruning": {}}, {"snr-seed0"})):
        summary |= {"stages": {"snr-seed0": "key"}, "results": results}
        (figures / "summary.json").write_text(json.dumps(summary))
        monkeypatch.setattr(store_outputs, "executed_notebooks", lambda profile, names: {})
        store_outputs.main(["cifar100-cpu"])
        assert {path.name for path in (figures / "stages").iterdir() if any(path.iterdir())} == kept


def test_figures_are_stored_alone_where_the_repository_is_full(folders, monkeypatch):
    """Tables are made, pages and stages are not; figures of a walk with other settings are refused."""
    figures, readme = folders / "figures" / "flowers102-cpu", folders / "README.md"
    settings = parameters.load_settings("flowers102-cpu")
    monkeypatch.setattr(runs, "root", lambda: folders)
    monkeypatch.setattr(parameters, "profiles", lambda: ["flowers102-cpu"])
    monkeypatch.setattr(parameters, "load_settings", lambda name: settings)
    figures.mkdir(parents=True)
    readme.write_text("\n".join((*store_outputs.REFERENCES, *store_outputs.MARKS)).format("flowers102-cpu"))
    summary = {"profile": "flowers102-cpu", "stages": {"snr-trained-seed0": "key"}, "results": {}, "verdicts": []}
    for config, code in (({"held_out": 0.4}, "store_outputs: the walk had other settings"), ({}, 0)):
        (figures / "summary.json").write_text(json.dumps(summary | {"config": settings.model_dump() | config}))
        try:
            found = store_outputs.main(["flowers102-cpu", "--figures-only"])
        except SystemExit as error:
            found = error.code.partition(" than")[0]
        assert found == code
        assert ("not measured yet" in readme.read_text()) == (code == 0)
    assert [path.name for path in figures.iterdir()] == ["summary.json"]
