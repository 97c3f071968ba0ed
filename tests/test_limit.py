"""A time limit stops work between two pieces, and what goes on after it ends with the same bits."""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch

from paperlib import limit, training
from paperlib.cli import main
from paperlib.cli import measure as command
from paperlib.data import Images
from paperlib.experiment import measure
from paperlib.models import cct


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a minute whenever somebody looks at it, from 0."""
    minutes = itertools.count()
    monkeypatch.setattr(limit, "time", SimpleNamespace(monotonic=lambda: 60 * next(minutes)))


def trained(checkpoint, minutes=None):
    """A CCT with all sources of randomness: epochs that a call trains, and the weights in the end."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=generator)
    data = Images("toy", pixels[:24], torch.arange(24) % 3, pixels[24:], torch.arange(6) % 3, tuple("abc"))
    given = {"epochs": 5, "batch_size": 10, "lr": 0.01, "weight_decay": 0.01, "warmup": 0.2, "label_smoothing": 0.1}
    given |= {"shift": 1, "flip": True, "optimizer": "muon", "token_share": 0.5, "augmentation": "mixed"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        network = cct("cct_2_3x1", num_classes=3, image_size=8, attention_dropout=0.2, stochastic_depth=0.3)
    said = []
    try:
        with limit.limited(minutes):
            training.train(network, data, training.Recipe(**given, precision="fp32"), 5, checkpoint, said.append)
    except limit.TimeIsUp as stop:
        said.append(stop)
    epochs = [line for line in said if str(line).startswith("epoch") and not isinstance(line, limit.TimeIsUp)]
    return epochs, said[-1], network.state_dict()


def test_a_training_in_calls_ends_like_one_of_one_call(tmp_path, clock):
    epochs, stop, _ = trained(tmp_path / "c.pt", minutes=0.5)
    assert len(epochs) == 1 and isinstance(stop, limit.TimeIsUp) and str(stop) == "epoch 2 of 5"
    again, stop, _ = trained(tmp_path / "c.pt", minutes=2.5)
    assert len(again) == 3 and str(stop) == "epoch 5 of 5"
    rest, _, weights = trained(tmp_path / "c.pt")
    _, _, whole = trained(None)
    assert len(rest) == 1 and all(torch.equal(weights[name], whole[name]) for name in whole)


def test_what_is_not_saved_is_not_stopped(clock):
    epochs, stop, _ = trained(None, minutes=0.5)
    assert len(epochs) == 5 and not isinstance(stop, limit.TimeIsUp)


def stages(runs):
    found = sorted((runs / "quick" / "stages").glob("*/*/stage.json"))
    return {path.parent.parent.name: json.loads(path.read_text())["sha256"] for path in found}


@pytest.mark.slow
def test_a_command_in_calls_leaves_what_one_call_leaves(folders, write_cache, clock, monkeypatch, capsys):
    write_cache(folders / "data" / "cifar100.npz", labels=3, size=32, train=20, test=10)
    monkeypatch.setattr(measure, "ONCE", ())
    monkeypatch.setattr(measure, "MAIN", ("block",))
    monkeypatch.setattr(command, "_stages", lambda run, seed, kind, heads: [measure.nodes(run, seed, kind)])
    cut = ["data=cifar100", "image_size=32", "model=cct_2_3x2", "heads=2", "epochs=2", "batch_size=20", "lr=0.001"]
    words = ["measure", "quick", "--kind", "trained", "--set", *cut, "precision=fp32"]
    assert main(words) == 0
    whole = stages(folders / "runs")
    monkeypatch.setenv("PAPERLIB_RUNS", str(folders / "again"))
    capsys.readouterr()
    calls = 1
    while (code := main([*words, "--minutes", "1.5"])) and calls < 20:  # time to begin a stage, and for a piece of it
        said = capsys.readouterr().err
        assert code == 124 and said.count("\n") == 1 and "part 1 of 1 (trained, seed 0)" in said
        calls += 1
    assert code == 0 and calls > 3 and stages(folders / "again") == whole and len(whole) == 3


def test_a_limit_without_time_is_refused(capsys):
    for minutes in ("0", "-1", "nan"):
        assert main(["train", "quick", "--minutes", minutes]) == 2
        assert "--minutes must be above 0" in capsys.readouterr().err
