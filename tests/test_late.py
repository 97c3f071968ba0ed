"""Late layers pruned and trained on: the end answers as the whole network, and what is masked stays 0."""

from dataclasses import replace

import pytest
import torch

from paperlib import andc, training
from paperlib.experiment import late, measure, networks, settings

CUT = {"epochs": 1, "max_steps": 20, "precision": "fp32", "seeds": [0], "limit": 1000, "held_out": 0.2}
CUT |= {"model": "cct_2_3x2", "prune_thresholds": [0.3, 0.5, 0.7], "blind": True, "batch_size": 50}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(measure, "IMAGES", 300)
        patch.setattr(late, "EPOCHS", (1, 2))
        patch.setattr(late, "READINGS", {"W2": late.READINGS["W2"]})
        yield settings.open_run("quick", CUT)


def test_connections_are_those_of_the_last_encoders(build):
    network = build("cct_4_3x2")
    path = "classifier.blocks.{}.{}".format
    assert late.connections(network, "FF", 1) == {
        path(3, "linear1"): ("4.ff_in", "4.ff1"),
        path(3, "linear2"): ("4.ff1", "4.ff2"),
    }
    assert set(late.connections(network, "W1", 2)) == {path(2, "linear1"), path(3, "linear1")}
    assert late.connections(network, "proj", 1) == {path(3, "self_attn.proj"): ("4.attn", "4.mha")}


@pytest.mark.slow
def test_the_end_of_a_network_answers_as_the_network(run):
    network, _ = networks.load_network(run, 0, "trained")
    whole = training.predict(network, run.images.x_test, *run.images.statistics)
    for encoders in (1, 2):
        data = late._streams(run, network, encoders)
        logits = training.predict(late.Tail(network, encoders), data.x_test, *data.statistics)
        assert torch.allclose(logits, whole, atol=1e-4)
        assert len(data.x_train) == 300 and data.y_train.bincount().unique().tolist() == [3]


@pytest.mark.slow
def test_masks_hold_through_training_and_losses_are_paired(run):
    stage = late.pruned(run, 0, "W2")
    table, answers = stage.table("late"), stage.arrays("answers") | late.unpruned(run, 0, 1).arrays("answers")
    assert set(table.method) == set(late.METHODS) and set(table.epochs) == {0, 1, 2}
    masked = table[~table.method.isin(["unpruned", "removed"])]
    assert masked.dilution.nunique() == 1 and masked.dilution.iloc[0] >= late.DILUTION
    best = max(answers["unpruned/0"].float().mean(), answers["unpruned/2"].float().mean()).item()
    row = table.query("method == 'random' and epochs == 2").iloc[0]
    assert row.loss == pytest.approx(best - row.accuracy, abs=1e-6)
    ahead = answers["andc/2"].float() - answers["random/2"].float()
    assert row.andc_ahead == pytest.approx(ahead.mean().item(), abs=1e-6)
    network, _ = networks.load_network(run, 0, "trained")
    data, pairs = late._streams(run, network, 1), late.connections(network, "W2", 1)
    _, sets = late._diluted(run, late.label_sets(run, 0), pairs)
    mask = andc.andc_masks(sets, pairs)
    tail = late._pruned(network, mask, 1, removed=False)
    late._trained(run, tail, data, 1, 0, run.stages / "x.pt")
    (kept,) = mask.values()
    weight = tail.classifier.blocks[0].linear2.weight
    assert not weight[~kept].any() and not torch.equal(weight[kept], network.classifier.blocks[1].linear2.weight[kept])


@pytest.mark.slow
def test_a_sweep_without_a_large_dilution_is_named(run, refuses):
    network, _ = networks.load_network(run, 0, "trained")
    low = replace(run, settings=run.settings.model_copy(update={"prune_thresholds": [0.3]}))
    sets = {f"0.3/{tap}": torch.ones(width, 100, dtype=torch.bool) for tap, width in (("2.ff1", 128), ("2.ff2", 128))}

    class Source:
        def arrays(self, name):
            return sets

    with refuses("no threshold removes 50%"):
        late._diluted(low, Source(), late.connections(network, "W2", 1))


@pytest.mark.slow
def test_the_end_of_a_cnn_answers_as_the_network_and_is_pruned_like_it(run):
    half = networks.cnn_half(replace(run, settings=run.settings.model_copy(update={"cnn": "vgg_11x8"})))
    network, _ = networks.load_network(half, 0, "trained")
    whole = training.predict(network, half.images.x_test, *half.images.statistics)
    for layers in (1, 2, 4):
        data = late._streams(half, network, layers)
        tail = late.tail_of(network, layers).eval()
        assert torch.allclose(training.predict(tail, data.x_test, *data.statistics), whole, atol=1e-4)
    pairs = late.connections(network, late.FILTERS, 2)
    assert list(pairs.values()) == [("6.conv", "7.conv"), ("7.conv", "8.conv")]
    generator = torch.Generator().manual_seed(0)
    masks = {
        name: torch.rand(network.get_submodule(name).weight.shape[:2], generator=generator) > 0.5 for name in pairs
    }
    data, tail = late._streams(half, network, 2), late._pruned(network, masks, 2, removed=False)
    pruned = andc.apply_masks(network, masks)
    expected = training.predict(pruned, half.images.x_test, *half.images.statistics)
    assert torch.allclose(training.predict(tail.eval(), data.x_test, *data.statistics), expected, atol=1e-4)
