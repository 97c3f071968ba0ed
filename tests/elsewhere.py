"""Training, measuring, heads and pruning on a device that is not the CPU: no tensor is left on the other side, what is
found is what the CPU finds, and nothing in a training step waits for the device."""

import importlib

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils import backend_registration

from paperlib import optimum, training
from paperlib.data import Images
from paperlib.experiment import division, late, measure, readings, sets, settings
from paperlib.models import cct
from paperlib.probe import probe
from paperlib.taps import Tap

CPU = torch.device("cpu")
CUT = {"data": "cifar100", "image_size": 32, "model": "cct_2_3x3", "heads": 2, "seeds": [0, 1], "held_out": 0.2}
CUT |= {"epochs": 2, "batch_size": 16, "lr": 0.003, "optimizer": "adamw", "augmentation": "published"}
CUT |= {"precision": "fp32", "threshold_sweep": [0.3], "prune_thresholds": [0.5], "permutations": 10}
LABELS = 4


@pytest.fixture(scope="module")
def elsewhere():
    """The pretended device. It is imported here, as it becomes the accelerator of the process."""
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch has no devices in Python: a newer one has")
    return importlib.import_module("pretend")


@pytest.fixture
def opened(folders, monkeypatch):
    """opened(device): the same run on any device: 64 training images of 4 labels, 2 encoders of 32 nodes."""
    monkeypatch.setitem(importlib.import_module("paperlib.models.cct").SIZES, 2, (32, 2, 1))
    for name, value in {"EXTENSIONS": 0, "PAIRS": 4, "GRID": (1.0, 0.1)}.items():  # enough to go through all of it
        monkeypatch.setattr(optimum, name, value)
    monkeypatch.setattr(optimum.choose, "__defaults__", ((1.0, 0.1), *optimum.choose.__defaults__[1:]))
    monkeypatch.setattr(readings, "DRAWS", 1)
    monkeypatch.setattr(sets, "DRAWS", 3)
    monkeypatch.setattr(late, "EPOCHS", (1,))
    monkeypatch.setattr(late, "DILUTION", 0.0)
    random, arrays = np.random.default_rng(0), {"classes": np.array([f"label {label}" for label in range(LABELS)])}
    for part, images in (("train", 64), ("test", 48)):
        y = np.arange(images) % LABELS
        x = random.integers(0, 225, (images, 32, 32, 3))
        x[:, 8:24, 8:24] += 30 * np.eye(LABELS, 3, dtype=int)[y][:, None, None]
        arrays |= {f"x_{part}": x.astype(np.uint8), f"y_{part}": y}
    np.savez(folders / "data" / "cifar100.npz", **arrays)

    def open_on(device):
        monkeypatch.setenv("PAPERLIB_RUNS", str(folders / device.type))
        monkeypatch.setattr(training, "best_device", lambda: device)
        return settings.open_run("quick", CUT)

    return open_on


def steps(run):
    """What is measured of the second seed, where nothing stands beside the best readouts."""
    yield "nodes", measure.nodes(run, 1, "trained")
    yield "division", division.specialisation(run, 1, "trained")
    yield "ablation", division.ablation(run, 1)
    yield "cooperation", division.cooperation(run, 1)
    yield "sets", sets.sets_of_nodes(run, 1, "trained")
    yield "pruned", readings.readouts(run, 1)
    yield "late", late.pruned(run, 1, "W1")


def tables(stage):
    return {path.stem: pd.read_csv(path) for path in stage.folder.glob("*.csv")}


@pytest.mark.parametrize("augmentation", ["light", "mixed", "published"])
def test_no_step_waits_for_the_device(augmentation, elsewhere):
    """An epoch waits a few times, however many steps it has: for its losses, its weights and its accuracy."""
    network = cct("cct_2_3x1", num_classes=3, image_size=8).to(elsewhere.DEVICE)
    pixels, labels = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8), torch.arange(30) % 3
    data = Images("toy", pixels, labels, pixels[:6], labels[:6], tuple("abc")).to(elsewhere.DEVICE)
    assert data.statistics[0].device == elsewhere.DEVICE  # once, before the first epoch
    given = {"epochs": 2, "lr": 0.01, "weight_decay": 0.01, "warmup": 0.2, "label_smoothing": 0.1, "shift": 1}
    given |= {"flip": True, "optimizer": "muon", "token_share": 0.5, "augmentation": augmentation, "precision": "fp32"}
    waited = []
    for batch_size in (10, 6):
        with elsewhere.waits() as found:
            training.train(network, data, training.Recipe(**given, batch_size=batch_size), 0, log=lambda line: None)
        waited.append(found)
    assert len(waited[0]) == len(waited[1]) <= 2 * 4, waited[0]


def test_what_waits_is_found(elsewhere):
    """The tool itself: what is read, or copied in a way that waits, is noted; what mixes devices, raises."""
    values = torch.rand(3, 4).to(elsewhere.DEVICE)
    for wait in (
        values.sum().item,
        values.cpu,
        values.nonzero,
        lambda: values[values > 0.5],
        lambda: values[torch.tensor([1, 0])],
        lambda: values.new_tensor([1]),
    ):
        with elsewhere.waits() as found:
            wait()
        assert len(found) == 1, wait
    with elsewhere.waits() as found:
        (
            torch.rand(4).to(elsewhere.DEVICE, non_blocking=True)
            + values.sum(dim=0).sort().values[values.argmax(dim=1)[0:1]]
        )
    assert not found
    for mistake in (lambda: values + torch.rand(4), lambda: nn.Linear(4, 2)(values), values.numpy):
        with pytest.raises((RuntimeError, TypeError)):
            mistake()


@pytest.mark.slow
def test_everything_runs_there_and_finds_the_same(opened, elsewhere):
    expected = {name: tables(stage) for name, stage in steps(opened(CPU))}
    for name, stage in steps(opened(elsewhere.DEVICE)):
        found = tables(stage)
        assert found and found.keys() == expected[name].keys()
        for table, values in expected[name].items():
            assert len(found[table]) == len(values)
            # sums in another order move a field across a threshold now and then
            means = (part.mean(numeric_only=True) for part in (found[table], values))
            pd.testing.assert_series_equal(*means, rtol=0.02, atol=0.02, obj=f"{name}: {table}")


@pytest.mark.slow
def test_probing_gives_there_what_it_gives_here(elsewhere):
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(120, 6)
    y = (x[:, :2] > 0).long() @ torch.tensor([1, 2])
    batches = [(x[:80], y[:80])], [(x[80:], y[80:])]  # of the CPU: a batch goes where the network is
    here, there = (probe(network.to(device), [Tap(1, "hidden", "1")], *batches) for device in (CPU, elsewhere.DEVICE))
    pd.testing.assert_frame_equal(there, here, rtol=0.05)
