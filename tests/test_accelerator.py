"""Training, measuring, heads and pruning on a device that is not the CPU: no tensor is left behind on the other side,
and what is found is what the CPU finds."""

import pandas as pd
import pytest
import torch
from pretend import DEVICE, Pretended

from paperlib import training
from paperlib.experiment import division, measure, networks, readings, sets, settings

CUT = {"epochs": 1, "max_steps": 10, "precision": "fp32", "seeds": [0], "limit": 1200, "held_out": 0.2}
CUT |= {
    "model": "cct_2_3x2",
    "threshold_sweep": [0.3],
    "prune_thresholds": [0.3, 0.5],
    "retrain_thresholds": [],
    "optimizer": "adamw",
}


@pytest.fixture
def runs(folders, monkeypatch):
    """The same run on the CPU and on the pretended device."""
    monkeypatch.setattr(measure, "ONCE", ())
    monkeypatch.setattr(measure, "IMAGES", 400)
    monkeypatch.setattr(readings, "DRAWS", 1)

    def opened(device):
        monkeypatch.setenv("PAPERLIB_RUNS", str(folders / device.type))
        monkeypatch.setattr(training, "best_device", lambda: device)
        return settings.open_run("quick", CUT)

    return opened


def steps(run):
    yield "train", networks.train(run, 0)
    for kind in ("trained", "random"):
        yield kind, measure.nodes(run, 0, kind)
    yield "heads", division.specialisation(run, 0, "trained")
    yield "silenced", division.ablation(run, 0)
    yield "cooperation", division.cooperation(run, 0)
    yield "sets", sets.sets_of_nodes(run, 0, "trained")
    yield "pruned", readings.readouts(run, 0)


@pytest.mark.slow
def test_everything_runs_there_and_finds_the_same(runs):
    expected = {name: tables(stage) for name, stage in steps(runs(torch.device("cpu")))}
    with Pretended():
        found = {name: tables(stage) for name, stage in steps(runs(DEVICE))}
    for name, parts in expected.items():
        assert parts and parts.keys() == found[name].keys()
        for table in parts:
            pd.testing.assert_frame_equal(found[name][table], parts[table], rtol=1e-3, obj=f"{name}: {table}")


def tables(stage):
    return {path.stem: pd.read_csv(path) for path in stage.folder.glob("*.csv")}
