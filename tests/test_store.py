"""Committed results: what a summary names, without large files, and nothing else."""

import json
import shutil

import parameters
import pytest
import regenerate
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
        store_outputs.store_stages(used | {"snr-trained-seed0": "0" * 16}, run.folder / "stages", target)


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


def test_regenerating_needs_committed_results(folders, capsys):
    assert regenerate.main(["cifar100"]) == 2
    assert "summary.json" in capsys.readouterr().err
