"""The walk's own promises: which images decide what."""

import copy
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from paperlib import andc, data, experiment, figures, heads, macroscopic, readouts, snp
from paperlib.data.superclasses import DOMAINS, SUPERCLASSES, superclasses
from paperlib.experiment import settings
from paperlib.taps import AFTER_CCT, CCT_TAPS, Tap, activations, cct_taps

CUT = {"epochs": 1, "max_steps": 2, "readout_epochs": 1, "prune_draws": 1, "precision": "fp32"}


@pytest.fixture
def run(folders):
    return settings.open_run("quick", CUT)


def masks_of(run, layers="ff"):
    """All masks of the first threshold, the controls among them."""
    network, _ = experiment.networks.load_network(run, 0, "trained")
    sets = experiment.pruning.classifier_sets if layers == "classifier" else experiment.pruning.label_sets
    found = sets(run, 0).arrays("sets"), experiment.pruning.input_norms(run, 0, layers).arrays("norms")
    return {
        (method, draw, name): mask
        for method, draw, masks in experiment.pruning._masks(run, network, *found, 0, layers, 0.4)
        for name, mask in masks.items()
    }


@pytest.mark.slow
def test_no_test_image_decides_a_mask(run, tmp_path):
    """With noise for test images every mask stays what it was, although the readouts' test results change."""
    noise = torch.randint(0, 256, run.images.x_test.shape, dtype=torch.uint8)
    other = replace(run, images=replace(run.images, x_test=noise), stages=tmp_path / "other", finished={})
    before, after = (masks_of(which) | masks_of(which, "classifier") for which in (run, other))
    assert len(before) == 5 * (8 + 1) and all(torch.equal(before[key], after[key]) for key in before)
    first, second = (experiment.nodes.readout(r, 0, "trained").tensors("fields_test") for r in (run, other))
    assert not torch.equal(first["4.block"], second["4.block"])


@pytest.mark.slow
def test_a_pruned_classifier_is_scored_as_the_whole_network(run):
    """What comes before the classifier is computed once for all masks."""
    network, _ = experiment.networks.load_network(run, 0, "trained")
    sets = experiment.pruning.classifier_sets(run, 0).arrays("sets")
    found = sets, experiment.pruning.input_norms(run, 0, "classifier").arrays("norms")
    table = experiment.pruning._pruning(run, 0, "classifier", 0.4).table("pruning").set_index(["method", "draw"])
    draws = run.settings.prune_draws
    assert table.accuracy.nunique() > 1
    for method, draw, masks in experiment.pruning._masks(run, network, *found, 0, "classifier", 0.4):
        pruned = andc.apply_masks(copy.deepcopy(network).requires_grad_(True), masks)
        part = slice(draw % draws, None, draws) if method in experiment.pruning.DRAWN else slice(None)
        right = experiment.networks.right_answers(pruned, run.images, part)
        assert table.accuracy[method, draw] == pytest.approx(right.float().mean().item(), abs=1.1 / len(right))
    assert (table.retrained_accuracy.notna() == (table.index.get_level_values("draw") == 0)).all()


@pytest.mark.slow
def test_label_sets_for_the_classifier_are_those_of_all_readouts_together(run):
    """Where the attention is not pruned, the last block's readout is trained once more, alone: with the same result."""
    alone = experiment.pruning.classifier_sets(run, 0).arrays("sets")
    settings = run.settings.model_copy(update={"prune_attention": True})
    together = experiment.pruning.label_sets(replace(run, settings=settings), 0)
    assert experiment.pruning.classifier_sets(replace(run, settings=settings), 0) is together
    expected = together.arrays("sets")
    assert alone and all(name.endswith("/4.block") for name in alone)
    for name, sets in alone.items():
        assert sets.any() and (sets != expected[name]).float().mean() < 1e-3


def test_a_classifier_that_is_trained_alone_keeps_its_mask(run):
    """Input k says label k and nothing else, so that only labels whose connections stay can be learned."""
    labels = torch.arange(4).repeat(500)
    images = replace(run.images, y_train=labels, y_test=labels[:100], x_test=run.images.x_test[:100])
    inputs = torch.nn.functional.one_hot(labels).float()
    network = torch.nn.Sequential(torch.nn.Linear(4, 4))
    mask = torch.ones(4, 4, dtype=torch.bool)
    mask[:, 3] = mask[3, :3] = False  # nothing tells label 3
    andc.apply_masks(network, {"0": mask})
    into = {"train": inputs, "test": inputs[:100]}
    with torch.no_grad():
        network[0].weight_orig.zero_()
        network[0].bias.zero_()
    right = experiment.pruning._retrained_classifier(run, network[0], into, images, 0)
    assert right[labels[:100] < 3].all()
    assert not network[0].weight[~mask].any() and network[0].weight[mask].all()


@pytest.mark.slow
def test_pruned_readouts_are_readouts_with_zeros(run):
    """The accuracy of a masked readout is what measuring with zeroed weights gives, and fewer weights are kept at a
    higher threshold."""
    table = experiment.pruning.pruned_readouts(run)
    assert set(table.tap) == {"attn", "ff2"} and set(table.method) == {"andc", "permuted", "random"}
    along = table[table.method == "andc"].pivot(index=["tap", "encoder"], columns="threshold", values="dilution")
    assert (along.diff(axis=1).iloc[:, 1:] >= 0).all(axis=None) and along.iloc[:, -1].min() > 0.5
    network, _ = experiment.networks.load_network(run, 0, "trained")
    place = cct_taps(network, ["ff2"])[3]
    weight = experiment.nodes.readout(run, 0, "trained").tensors("weights")[place.name].clone()
    recognised = experiment.pruning.label_sets(run, 0).arrays("sets")[f"0.4/{place.name}"]  # (D, L)
    weight *= recognised.T[:, None]
    images = run.images
    shown = images.x_test, images.y_test, *images.statistics
    measured = readouts.measure(network, [place], {place.name: weight}, *shown)
    row = table.query("tap == 'ff2' and encoder == 4 and threshold == 0.4 and method == 'andc'")
    assert row.accuracy.item() == pytest.approx(measured.correct[place.name].float().mean().item(), abs=2e-3)


@pytest.mark.slow
def test_signs_of_filters_are_those_of_the_kernels_that_a_mask_keeps_and_removes(run):
    half = experiment.networks.cnn_half(run)
    row = experiment.pruning.signs_of_filters(half).query("threshold == 0.4 and layer == 3").iloc[0]
    network, _ = experiment.networks.load_network(half, 0, "trained")
    sets = experiment.pruning.label_sets(half, 0).arrays("sets")
    name, (into, out) = list(andc.connections(network, "filters").items())[1]  # the convolution before layer 3
    counts = {True: [0, 0], False: [0, 0]}
    for j, kernels in enumerate(network.get_submodule(name).weight):
        for k, kernel in enumerate(kernels):
            kept = bool((sets[f"0.4/{out}"][j] & sets[f"0.4/{into}"][k]).any())
            counts[kept][int(kernel.sum() < 0)] += 1
    assert row["dilution"] == pytest.approx(sum(counts[False]) / (sum(counts[True]) + sum(counts[False])))
    assert row["negative kept"] == pytest.approx(counts[True][1] / sum(counts[True]))
    assert row["negative removed"] == pytest.approx(counts[False][1] / sum(counts[False]))


@pytest.mark.slow
def test_controls_of_filters(run):
    """Random masks of the same signs remove as much of each sign; batch norm's statistics are those of the images."""
    half = experiment.networks.cnn_half(run)
    table = experiment.pruning.why_filters(half)
    assert table.groupby("threshold").dilution.nunique().eq(1).all()
    network, _ = experiment.networks.load_network(half, 0, "trained")
    masks = andc.random_masks({"features.4": torch.arange(network.features[4].weight[:, :, 0, 0].numel()).view(
        network.features[4].weight.shape[:2]) % 3 > 0}, torch.Generator().manual_seed(1))  # fmt: skip
    drawn = andc.same_sign_masks(masks, network, torch.Generator().manual_seed(0))
    negative = network.features[4].weight.sum(dim=(2, 3)) < 0
    for sign in (negative, ~negative):
        assert drawn["features.4"][sign].sum() == masks["features.4"][sign].sum() > 0
    assert not torch.equal(drawn["features.4"], masks["features.4"])
    experiment.networks.refresh_statistics(network, run.images.x_train[:500], run.images)
    first = network.features[0](data.normalise(run.images.x_train[:500], *run.images.statistics))
    torch.testing.assert_close(network.features[1].running_mean, first.mean(dim=(0, 2, 3)), rtol=1e-3, atol=1e-4)
    assert not network.training


def test_statistics_of_batch_norm_take_images_alike_and_in_random_order(run):
    half = experiment.networks.cnn_half(run)
    chosen = experiment.networks.calibration_images(half, 0, run.images)
    kept, _ = data.held_out(run.images.y_train, run.settings.held_out)
    pixels = [sorted(image.flatten().tolist() for image in images) for images in (chosen, run.images.x_train[kept])]
    assert pixels[0] == pixels[1] and not torch.equal(chosen, run.images.x_train[kept])  # fewer than 5,000: all, mixed
    network, _ = experiment.networks.load_network(half, 0, "trained")
    experiment.networks.refresh_statistics(network, chosen[:251], run.images)  # the last one is not a batch of its own
    first = network.features[0](data.normalise(chosen[:251], *run.images.statistics))
    torch.testing.assert_close(network.features[1].running_mean, first.mean(dim=(0, 2, 3)), rtol=0.02, atol=2e-3)


@pytest.mark.slow
def test_a_random_cnn_is_measured_with_both_kinds_of_statistics(run):
    half = experiment.networks.cnn_half(run)
    taps = experiment.nodes.snr(half)[0].query("not centred and threshold == 0.3").set_index(["network", "encoder"]).snr
    assert (taps["calibrated"] != taps["random"]).all()
    assert {kind for _, kind, _ in experiment.nodes.correct_answers(half)} == {"trained", "random", "calibrated"}
    assert set(experiment.nodes.snr(run)[0].network) == {"trained", "random", "shuffled"}  # a CCT has no batch norm


def test_what_is_scored_after_mending_is_the_mended_network(run):
    network = experiment.networks.build_network(run, 0).eval().requires_grad_(False)
    masks = {"classifier.fc": torch.zeros(network.classifier.fc.weight.shape, dtype=torch.bool)}

    def always_three(pruned):
        pruned.classifier.fc.bias[3] = 1e6

    row = experiment.pruning._before_and_after(network, masks, run.images, "mended", always_three, slice(0, None, 2))
    share = (run.images.y_test[::2] == 3).float().mean().item()
    assert row["dilution"] == 1 and row["mended_accuracy"] == pytest.approx(share) != row["accuracy"]
    assert network.classifier.fc.bias[3] < 1e6


@pytest.mark.slow
def test_mended_biases_keep_the_means_of_pruned_layers(run):
    """Of every layer, though what goes into the later ones has changed by then."""
    table = experiment.pruning.why_ff(run)
    assert len(table) == 3 * len(run.settings.prune_thresholds[:3])
    assert table.groupby("threshold").dilution.apply(lambda part: part.max() - part.min() < 0.05).all()
    network, _ = experiment.networks.load_network(run, 0, "trained")
    images = run.images.x_train[:500]
    names = list(andc.connections(network, "ff"))
    weights = {name: network.get_submodule(name).weight for name in names}
    masks = {name: (torch.arange(w.numel()) % 3 == 0).view(w.shape) for name, w in weights.items()}
    pruned = andc.apply_masks(copy.deepcopy(network), masks)

    def means(of):
        places = [Tap(0, name, name) for name in names]
        batches = list(activations(of, places, images, *run.images.statistics))
        return [torch.cat([batch[place.name] for batch in batches]).mean(dim=(0, 1)) for place in places]

    assert all((a - b).abs().max() > 0.01 for a, b in zip(means(pruned), means(network), strict=True))
    andc.keep_means(pruned, network, names, data.normalise(images, *run.images.statistics))
    torch.testing.assert_close(means(pruned), means(network), rtol=1e-3, atol=1e-4)
    assert not any(pruned.get_submodule(name).weight[~mask].any() for name, mask in masks.items())


def test_owners_of_superclasses_find_planted_ones(run):
    groups = superclasses(tuple(SUPERCLASSES.replace("|", " ").split()))
    owners = {"by superclass": groups % 4, "dealt": torch.randperm(100, generator=torch.Generator().manual_seed(0)) % 4}
    found = {}
    images = replace(run.images, classes=tuple(SUPERCLASSES.replace("|", " ").split()))
    for name, owner in owners.items():
        rows = {
            "label": range(100),
            "head": owner.tolist(),
            "owner": True,
            "seed": 0,
            "encoder": 1,
            "network": "trained",
        }
        found[name] = experiment.heads.owners_of_superclasses(replace(run, images=images), pd.DataFrame(rows)).iloc[0]
    assert found["by superclass"].same_owner == 1 and 0.2 < found["dealt"].dealt < 0.3
    assert found["dealt"].same_owner <= found["dealt"].dealt_high < 0.5
    assert not len(experiment.heads.owners_of_superclasses(run, pd.DataFrame(rows)))  # labels without superclasses


def test_predictions_are_judged_size_by_size():
    rows = [
        {"seed": 0, "encoder": encoder, "size": size, "measured": value, "predicted": value + 0.1, "only_size": 0.5}
        for encoder in (1, 2, 3)
        for size, values in ((4, (0.1, 0.2, 0.3)), (16, (0.5,)))
        for value in values
    ]
    found = macroscopic.predictions_by_size(pd.DataFrame(rows))
    assert found.error_predicted.tolist() == pytest.approx([0.1, 0.1]) and found.error_only_size.tolist() == [0.3, 0]
    assert found.rank_correlation[4] == 1 and pd.isna(found.rank_correlation[16])


@pytest.mark.slow
def test_no_image_that_trained_a_readout_decides_a_mask(run, monkeypatch):
    """The matrices behind the masks are those of the held-out images alone, with the readouts of the others."""
    seen = []
    train = readouts.train_readouts
    monkeypatch.setattr(
        readouts, "train_readouts", lambda network, places, x, *rest, **options: seen.append(x) or train(
            network, places, x, *rest, **options)
    )  # fmt: skip
    source = experiment.nodes.readout(run, 0, "trained")
    network, _ = experiment.networks.load_network(run, 0, "trained")
    kept, held = data.held_out(run.images.y_train, run.settings.held_out)
    assert not set(kept.tolist()) & set(held.tolist())
    assert torch.equal(seen[0], run.images.x_train[kept])
    place = cct_taps(network, ["ff1"])[1:2]
    x, y = run.images.x_train[held], run.images.y_train[held]
    weights = source.tensors("weights")
    measured = readouts.measure(network, place, {"2.ff1": weights["2.ff1"]}, x, y, *run.images.statistics)
    fields = snp.field_matrices(weights["2.ff1"], measured.class_means["2.ff1"])
    torch.testing.assert_close(source.tensors("fields_held_out")["2.ff1"], fields)
    sets = {name: snp.diagonal_labels(snp.boolean_matrices(field, 0.4)) for name, field in
            source.tensors("fields_held_out").items()}  # fmt: skip
    for name, mask in andc.andc_masks(sets, andc.connections(network, "ff")).items():
        assert torch.equal(masks_of(run)["andc", 0, name], mask)


def test_difference_of_maps_finds_a_head_that_looks_elsewhere_for_its_own_labels():
    y, owner = torch.arange(40) % 4, torch.tensor([0, 0, 1, 1])
    received = torch.full((40, 3, 5), 0.2)
    received[y < 2, 0] = torch.tensor([1.0, 0, 0, 0, 0])
    found = heads.map_difference(received, y, owner)
    torch.testing.assert_close(found, torch.tensor([0.8, 0.0, torch.nan]), equal_nan=True)
    assert heads.map_difference(received, y, torch.tensor([0, 1, 0, 1]))[0] < 1e-6


@pytest.mark.slow
def test_owners_whose_labels_are_scored_are_not_chosen_on_the_test_images(folders, tmp_path):
    """With other test images, owners by held-out images stay; the figure's margins are those of the table."""
    few = CUT | {"limit": 600, "taps": ["attn", "block"], "taps_once": [], "prune_attention": False, "permutations": 20}
    run = settings.open_run("quick", few)
    labels, encoders, _ = experiment.heads.head_division(run)
    trained = labels[labels.network == "trained"]
    assert trained.groupby(["encoder", "label"]).owner_unseen.sum().max() == 1
    assert labels[labels.network == "random"].owner_unseen.isna().all()
    noise = torch.randint(0, 256, run.images.x_test.shape, dtype=torch.uint8)
    other = replace(run, images=replace(run.images, x_test=noise), stages=tmp_path / "other", finished={})
    again, _, _ = experiment.heads.head_division(other)
    again = again[again.network == "trained"]
    assert (again.owner_unseen == trained.owner_unseen).all() and not (again.owner == trained.owner).all()
    figure = figures.head_experts(labels, run.images.name, encoder=2)
    bars = [round(bar.get_height()) for bar in figure.axes[0].patches]
    row = encoders.query("network == 'trained' and encoder == 2").iloc[0]
    recognised = trained[trained.encoder == 2].groupby("label")["count"].max().gt(0).sum()
    counted = experiment.heads.head_counts(run, 2).pivot(index=["nodes", "label"], columns="head", values="count")
    table = trained[trained.encoder == 2].pivot(index="label", columns="head", values="count")
    assert (counted.loc["of heads"].to_numpy() == table.to_numpy()).all()
    assert not counted.loc["reassigned"].equals(counted.loc["of heads"])
    assert (counted.loc["reassigned"].sum(axis=1) == counted.loc["of heads"].sum(axis=1)).all()
    assert bars[0] == row.tied and sum(bars) == recognised == len(run.images.classes) - row.unrecognised


def test_answers_of_sets_are_those_of_a_loop_over_sets_and_images():
    """Ties (an empty set) count half; a set with one label of its own has nothing to choose from."""
    generator, y = torch.Generator().manual_seed(3), torch.arange(30) % 5
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((30, 4, 6), (5, 4, 6)))
    own = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 0, 1, 1], [0, 0, 1, 0, 0], [1, 1, 1, 1, 1]]) > 0
    sets = torch.tensor([[1, 0, 0, 1, 1, 0], [1, 1, 1, 1, 1, 1], [0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 0, 0]]) > 0
    answers = torch.einsum("sd,dnl->snl", sets.float(), macroscopic.node_fields(x, weight))
    right = heads.right_answers_per_label(answers, y)
    choice = heads.choices_per_label(answers, y, own)
    assert right.shape == choice.shape == (4, 5)
    for index, (members, mine) in enumerate(zip(sets, own, strict=True)):
        fields = (x * members).flatten(1) @ weight.flatten(1).T
        for label in range(5):
            rows = fields[y == label]
            assert right[index, label] == (rows.argmax(dim=1) == label).sum()
            others = [other for other in range(5) if mine[other] and other != label]
            if mine[label] and others:
                wins = [(row[label] > row[o]) + 0.5 * (row[label] == row[o]) for row in rows for o in others]
                assert choice[index, label].item() == pytest.approx(sum(map(float, wins)) / len(others), rel=1e-5)
    assert choice[2].isnan().all() and choice[3].unique().item() == pytest.approx(3.0)


def test_choice_does_not_see_a_shift_towards_own_labels():
    """One node says the same about all images, in favour of the first two labels: recall of these rises, choice not."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(*shape, generator=generator) for shape in ((400, 1, 5), (4, 1, 5)))
    fields = x[..., :4].flatten(1) @ weight[..., :4].flatten(1).T
    y = (fields + 3 * torch.randn(400, 4, generator=generator)).argmax(dim=1)
    x[..., 4], weight[..., 4] = 1.0, torch.tensor([2.0, 2.0, 0.0, 0.0])[:, None]
    fields = macroscopic.node_fields(x, weight)
    answers = torch.stack([fields[:4].sum(dim=0), fields.sum(dim=0)])
    right = heads.right_answers_per_label(answers, y)[:, :2]
    choice = heads.choices_per_label(answers, y, torch.tensor([[1, 1, 0, 0]] * 2) > 0)[:, :2]
    assert (right[1] > 1.1 * right[0]).all() and torch.equal(choice[0], choice[1])


@pytest.mark.slow
def test_stopped_readouts_of_a_stage_go_on(folders, monkeypatch):
    """A walk that is stopped between two epochs of its readouts does not train the first again, and ends alike."""
    few = CUT | {"limit": 300, "taps": ["attn", "block"], "taps_once": [], "prune_attention": False}
    run = settings.open_run("quick", few | {"readout_epochs": 3})
    other = replace(run, stages=folders / "other", finished={}, log=(said := []).append)
    monkeypatch.setattr(readouts, "SAVE_SECONDS", 0)
    saved = readouts.torch.save

    def then_stops(state, file):
        if state.get("epochs") == 2:
            raise KeyboardInterrupt
        saved(state, file)

    monkeypatch.setattr(readouts.torch, "save", then_stops)
    with pytest.raises(KeyboardInterrupt):
        experiment.nodes.readout(other, 0, "random")
    monkeypatch.setattr(readouts.torch, "save", saved)
    assert sorted(path.name for path in other.stages.glob("readouts-*/*/*")) == ["readouts.pt", "started.json"]
    resumed = experiment.nodes.readout(replace(other, finished={}), 0, "random")
    assert any("resuming after epoch 1/3" in line for line in said)
    assert resumed.sha256 == experiment.nodes.readout(run, 0, "random").sha256
    assert not list(resumed.folder.glob("*.pt"))


def test_nodes_are_dealt_to_heads_whole():
    groups = heads.groupings(12, 3, torch.Generator().manual_seed(0))
    assert groups.shape == (heads.OWN_ORDERS + heads.DEALINGS, 3, 4)
    assert (groups.flatten(1).sort().values == torch.arange(12)).all()
    kept = (groups // 4 == torch.arange(3)[:, None]).all(dim=(1, 2))
    assert kept[: heads.OWN_ORDERS].all() and not kept[heads.OWN_ORDERS :].any()
    assert len(groups.unique(dim=0)) == len(groups)


@pytest.mark.slow
def test_a_whole_head_recognises_its_own_labels_as_when_heard_alone(folders):
    """Two ways to one number: sets of nodes, and the readout with the other heads silenced."""
    few = CUT | {"limit": 600, "taps": ["attn", "block"], "taps_once": [], "prune_attention": False, "permutations": 20}
    run = settings.open_run("quick", few)
    table, labels = experiment.heads.cooperation(run), experiment.heads.head_division(run)[0]
    whole, everyone = table[table.whole], table[table["size"] == table["size"].max()]
    trained = labels[labels.network == "trained"]
    for owners, name in ((trained.owner_unseen == True, "own"), (trained.owner_unseen == False, "others")):  # noqa: E712
        part = trained[owners & trained.groupby(["encoder", "label"]).owner_unseen.transform("any")]
        expected = part.groupby("encoder").alone_accuracy.mean()
        found = whole[whole.nodes == "head"].groupby("encoder")[name]
        for value in (found.min(), found.max()):  # in whatever order nodes joined
            assert value.to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-5)
    assert table[table["size"] == 1].eval("own - singles").abs().max() < 1e-5
    summary, dealt = heads.summary_of_cooperation(table), whole[whole.nodes == "dealt"].groupby("encoder")
    assert summary.own.to_numpy() == pytest.approx(whole[whole.draw == 0].own.to_numpy())
    assert summary.own_dealt.to_numpy() == pytest.approx(dealt.own.mean().to_numpy())
    assert whole["size"].nunique() == 1 and (everyone["size"] > whole["size"].max()).all()
    assert everyone.groupby(["nodes", "encoder"]).own.std().loc["head"].max() < 1e-6  # all nodes, the same labels
    assert summary.choice_high.to_numpy() == pytest.approx(dealt.choice.quantile(0.975).to_numpy())


@pytest.mark.slow
def test_retrained_networks_are_compared_with_the_unpruned_one_retrained_alike(folders):
    few = CUT | {"limit": 300, "taps": ["attn", "block"], "prune_thresholds": [0.4], "prune_attention": False}
    run = settings.open_run("quick", few | {"retrain_thresholds": [0.4], "retrain_lr": 0.01})
    table, answers = experiment.pruning.pruning(run), experiment.pruning.unpruned(run, 0).arrays("answers")
    alone = table[table.layers == "classifier"]
    network, _ = experiment.networks.load_network(run, 0, "trained")
    into = experiment.pruning.classifier_inputs(run, 0).tensors("inputs")
    fc = copy.deepcopy(network.classifier.fc).requires_grad_(True)
    level = experiment.pruning._retrained_classifier(run, fc, into, run.images, 0).float().mean().item()
    assert (alone.retrained_accuracy + alone.retrained_loss).dropna().to_numpy() == pytest.approx(level)
    table = table[table.layers == "ff"]
    assert answers.keys() == {"intact", "retrained"} and not torch.equal(answers["intact"], answers["retrained"])
    whole = table[table.images == len(run.images.x_test)]
    for prefix, name in (("", "intact"), ("retrained_", "retrained")):
        assert set(table.dropna(subset=f"{prefix}loss").method) == {
            "andc",
            "magnitude",
            "activation",
            "random",
            "permuted",
        }
        level = (whole[f"{prefix}accuracy"] + whole[f"{prefix}loss"]).dropna()
        assert len(level) and level.to_numpy() == pytest.approx(answers[name].float().mean().item())
    untouched = experiment.pruning.unpruned(settings.open_run("quick", few | {"retrain_thresholds": []}), 0)
    assert untouched.arrays("answers").keys() == {"intact"}


@pytest.mark.slow
def test_other_numbers_of_heads_are_walked_too(folders):
    few = CUT | {"limit": 200, "many_heads": [1, 2], "permutations": 50, "taps": ["attn", "block"]}
    run = settings.open_run("quick", few)
    table = experiment.heads.more_heads(run)
    assert table.heads.tolist() == [1, 1, 2, 2]
    assert (table[table.heads == 1].excess.abs() < 1e-9).all()  # one head owns everything, as by chance
    assert experiment.heads.more_heads(settings.open_run("quick", few | {"many_heads": []})).empty


def test_superclasses_are_twenty_of_five_and_domains_ten_of_fifteen():
    names = tuple(sorted(DOMAINS.replace("|", " ").split()))
    assert len(names) == len(set(names)) == 150 and superclasses(names).bincount().tolist() == [15] * 10
    names = tuple(sorted(SUPERCLASSES.replace("|", " ").split()))
    found = superclasses(names)
    assert len(names) == len(set(names)) == 100 and found.bincount().tolist() == [5] * 20
    assert len({int(found[names.index(name)]) for name in ("maple_tree", "oak_tree", "willow_tree")}) == 1
    assert found[names.index("whale")] != found[names.index("shark")]
    assert superclasses(("a", "b")) is None


def test_every_tap_has_a_colour(run):
    network = experiment.networks.build_network(run, 0)
    kinds = ("stem", *CCT_TAPS, "pooled", *AFTER_CCT)
    rows = [{"tap": tap.kind, "encoder": tap.encoder} for tap in cct_taps(network, kinds)]
    table = pd.DataFrame(rows).assign(network="trained", seed=0, threshold=0.3, centred=False, accuracy=0.5, snr=2.0)
    figure = figures.snr_per_encoder(table, "toy", 0.3, list(kinds))
    colours = [line.get_color() for line in figure.axes[0].lines][-len(kinds) - 2 : -2]  # of the legend
    assert len(set(colours)) == len(kinds)


def test_every_panel_of_the_distributions_shows_its_nodes():
    """Medians lie well inside the axes, on the logarithmic scale of the noise too."""
    rng = np.random.default_rng(0)
    nodes = pd.DataFrame({"encoder": np.tile(np.arange(1, 8), 40), "tap": "block", "seed": 0})
    nodes = nodes.assign(labels=rng.poisson(30, 280), clusters=rng.poisson(5, 280), internal=0)
    nodes["external"] = 8.0 ** rng.uniform(0, 4, 280)
    both = pd.concat([nodes.assign(network=kind) for kind in ("trained", "random")])
    for axis in figures.node_distributions(both, "toy").axes:
        to_axes = axis.transData - axis.transAxes
        heights = np.concatenate([to_axes.transform(line.get_xydata())[:, 1] for line in axis.lines])
        assert heights.min() > 0.1 and heights.max() < 0.9


def stored(**values):
    """What a stage would hand on, without its computation: arrays, tensors -> name -> values."""
    return SimpleNamespace(sha256="", **{kind: parts.get for kind, parts in values.items()})


def test_the_gap_is_that_of_owners_by_held_out_images(folders, monkeypatch):
    """Held-out images give label l to head l % 4, which is true; the test images give it to the next head."""
    y, own = torch.arange(160) % 8, torch.arange(32)[:, None] // 8 == torch.arange(8) % 4
    held = {f"{encoder}.attn": torch.diag_embed(own.float()) for encoder in range(1, 5)}
    shown = {name: fields.roll(8, dims=0) for name, fields in held.items()}
    correct = {f"heads/{name}": torch.ones(160, 4) > 0 for name in held}
    ablated = ~((y % 4 == torch.arange(4)[:, None]) & (torch.arange(160) < 80))  # half of a head's own images
    run = settings.open_run("quick", CUT | {"permutations": 200})
    images = replace(run.images, x_test=run.images.x_test[:160], y_test=y, classes=tuple("abcdefgh"))
    run, network = replace(run, images=images, finished={}), experiment.networks.build_network(run, 0)
    source = stored(
        arrays={"correct": correct, "matrices": {name: fields > 0 for name, fields in shown.items()}},
        tensors={"fields_test": shown, "fields_held_out": held},
    )
    instead = {"readout": source, "matrices": source, "_means": None, "load_network": (network, {})}
    instead |= {"right_answers": torch.ones(160) > 0, "_ablations": ablated.expand(4, 4, 160)}
    for name, value in instead.items():
        monkeypatch.setattr(experiment.heads, name, lambda *_, value=value: value)
    _, encoders, overall = (table[table.network == "trained"] for table in experiment.heads.head_division(run))
    assert encoders.gap.to_numpy() == pytest.approx(0.5)
    assert encoders.gap_same_images.to_numpy() == pytest.approx(-1 / 6)
    assert encoders.specialisation.to_numpy() == pytest.approx(math.log(4))
    row, width = overall.iloc[0], (encoders.null_high - encoders.null_low).mean()
    assert row.gap_low < 0.5 < row.gap_high and row.gap_null_high < 0.4
    assert row.excess_low < row.excess < row.excess_high < row.excess_low + 0.7 * width  # a mean over four encoders


def test_single_nodes_predict_without_test_images(folders, monkeypatch):
    """C6 on ten labels, a random network and readouts by ridge regression: only what is measured follows the test
    images; the factor is the one that predicts the first encoder on held-out images."""
    run, generator = settings.open_run("quick", CUT), torch.Generator().manual_seed(0)
    y = torch.arange(200) % 10
    base = torch.randint(112, 144, (10, 3, 24, 24), generator=generator)
    noisy = [(base[y] + torch.randint(-110, 111, (200, 3, 24, 24), generator=generator)).byte() for _ in range(2)]
    run = replace(run, images=data.Images("toy", noisy[0], y, noisy[1], y, tuple("abcdefghij")))
    network, statistics = experiment.networks.build_network(run, 0).eval().requires_grad_(False), run.images.statistics
    kept, held = data.held_out(y, run.settings.held_out)
    places, weights = cct_taps(network, ["block"]), {}
    for place in places:
        batches = activations(network, [place], noisy[0][kept], *statistics)
        nodes = torch.cat([batch[place.name] for batch in batches])
        flat = nodes.flatten(1) - nodes.flatten(1).mean(dim=0)
        ridge = flat @ flat.T + 0.1 * flat.square().sum() / len(flat) * torch.eye(len(flat))
        targets = torch.nn.functional.one_hot(y[kept]) - 0.1
        weights[place.name] = (targets.T @ torch.linalg.solve(ridge, flat)).unflatten(1, nodes.shape[1:])
    monkeypatch.setattr(experiment.nodes, "load_network", lambda *_: (network, {}))
    monkeypatch.setattr(experiment.nodes, "readout", lambda *_: stored(tensors={"weights": weights}))

    def accuracies(x, y):
        found = readouts.measure(network, places, weights, x, y, *statistics).correct
        return [right.float().mean().item() for right in found.values()]

    tables = []
    for shown in (noisy[1], noisy[1].flip(3)):
        other = replace(run, images=replace(run.images, x_test=shown), stages=folders / str(len(tables)), finished={})
        tables.append(table := experiment.nodes.macroscopic_accuracies(other))
        whole = table[table["size"] == 128]
        assert whole.measured.to_numpy() == pytest.approx(accuracies(shown, y), abs=1.1 / 200)
        by_size = table[table.encoder == 1].groupby("size").measured.mean()
        assert table.only_size.to_numpy() == pytest.approx(table["size"].map(by_size).to_numpy())
    assert tables[0].predicted.equals(tables[1].predicted) and not tables[0].measured.equals(tables[1].measured)
    fitted = accuracies(noisy[0][held], y[held])[0]
    assert 0.15 < fitted < 0.9 and whole.predicted.iloc[0] == pytest.approx(fitted, abs=0.01)


def test_draws_of_a_control_share_the_test_images_out(folders, monkeypatch):
    """Each image is scored once by all draws together; the standard error is that of a mean over a draw's images."""
    run, seen, generator = settings.open_run("quick", CUT | {"prune_draws": 3}), [], torch.Generator().manual_seed(0)
    network, n = experiment.networks.build_network(run, 0).eval().requires_grad_(False), len(run.images.y_test)
    kinds = [f"{encoder}.{tap}" for encoder in range(1, 5) for tap in ("ff_in", "ff1", "ff2")]
    sets = {f"0.4/{kind}": torch.rand(128, 100, generator=generator) < 0.1 for kind in kinds}
    norms = {name: torch.ones(128) for name in andc.connections(network, "ff")}
    source = stored(arrays={"sets": sets, "norms": norms, "answers": {"intact": torch.ones(n) > 0}})

    def one_in_ten_wrong(network, images, part):
        seen.append(torch.arange(n)[part])
        return seen[-1] % 10 > 0

    for name in ("readout", "unpruned", "label_sets", "input_norms"):
        monkeypatch.setattr(experiment.pruning, name, lambda *_: source)
    monkeypatch.setattr(experiment.pruning, "load_network", lambda *_: (network, {}))
    monkeypatch.setattr(experiment.pruning, "right_answers", one_in_ten_wrong)
    table = experiment.pruning._pruning(run, 0, "ff", 0.4).table("pruning")
    for _, part in table.groupby("method"):
        assert torch.cat([seen[row] for row in part.index]).sort().values.tolist() == list(range(n))
        assert np.average(part.loss, weights=part.images) == pytest.approx(0.1)
        assert part.loss_se.to_numpy() == pytest.approx(0.3 / part.images.to_numpy() ** 0.5, rel=0.01)


def test_the_short_retraining_is_that_of_the_settings(folders, monkeypatch):
    changes, seen = {"epochs": 3, "token_share": 0.5, "retrain_epochs": 2, "retrain_lr": 0.02}, []
    run = settings.open_run("quick", CUT | changes)

    def train(network, images, how, *arguments, **options):
        seen.append((how.epochs, how.lr, how.warmup, how.token_share, len(images.x_test)))

    monkeypatch.setattr(experiment.pruning.training, "train", train)
    monkeypatch.setattr(experiment.pruning, "right_answers", lambda *_: None)
    experiment.pruning._retrained(run, None, run.images, 0, None)
    assert seen == [(2, 0.02, 0, 1, 0)]


def test_shuffled_labels_are_the_same_labels_of_other_images(folders, monkeypatch):
    run, seen = settings.open_run("quick", CUT), []
    monkeypatch.setattr(readouts, "train_readouts", lambda network, places, x, y, *rest: seen.append((x, y)))
    for shuffled in (False, True):
        experiment.nodes.trained_readouts(run, None, [], run.images, 0, shuffled=shuffled)
    (x, y), (same, dealt) = seen
    assert torch.equal(x, same) and torch.equal(dealt.bincount(), y.bincount())
    assert (dealt == y).float().mean() < 0.03  # of 100 labels


def test_the_groups_penalty_is_that_of_weights_on_unscaled_activations(folders, monkeypatch):
    run, found = settings.open_run("quick", CUT | {"penalties": [0.01]}), []

    def stops(*arguments, penalty, **options):
        found.append(penalty)
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment.nodes, "trained_readouts", stops)
    with pytest.raises(KeyboardInterrupt):
        experiment.nodes._penalties(run, 0, "random")
    for scale in (0.5, 20.0):  # a weight w on raw activations is scale * w on scaled ones
        assert found[0]("1.block@code", scale) * (scale * 3) ** 2 == pytest.approx(1e-3 * 3**2)
        assert found[0]("1.block@0.01", scale) == 0.01
