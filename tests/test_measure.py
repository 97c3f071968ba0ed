"""The stage that measures nodes: its tables say what loops over images say; an interruption changes nothing."""

import itertools
from dataclasses import replace

import pytest
import torch

from paperlib import optimum, snp, taps
from paperlib.data import balanced
from paperlib.experiment import measure, networks, readings, settings, single

CUT = {"epochs": 1, "max_steps": 20, "precision": "fp32", "seeds": [0, 1], "limit": 1200}
CUT |= {"model": "cct_2_3x2", "threshold_sweep": [0.3, 0.4]}
THRESHOLD = 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One run for all: what a test has measured, the next one finds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(measure, "ONCE", ("mha",))
        patch.setattr(measure, "IMAGES", 600)
        yield settings.open_run("quick", CUT)


@pytest.mark.slow
def test_tables_say_what_loops_say(run):
    stage = measure.nodes(run, 1, "trained")
    table, folds = stage.table("taps"), stage.table("folds")
    assert set(table.tap) == {"ff1", "attn", "block"} and (table.groupby(["encoder", "tap"]).basis.nunique() == 6).all()
    network, _ = networks.load_network(run, 1, "trained")
    place = next(place for place in taps.places(network, ["ff1"]) if place.encoder == 2)
    weight = measure.readouts(run, 1, "trained").tensors("weights")["2.ff1/best"]
    activations = taps.features(network, [place], run.images.x_test, *run.images.statistics)["2.ff1"]
    right = (torch.einsum("ntd,ltd->nl", activations, weight).argmax(dim=1) == run.images.y_test).float()
    fold = measure.fold_of(run.images.y_test)
    where = f"encoder == 2 and tap == 'ff1' and basis == 'native' and not centred and threshold == {THRESHOLD}"
    for left_out, rows in ((-1, table.query(where)), (3, folds.query(f"{where} and fold == 3"))):
        kept = fold != left_out
        means = snp.class_means(activations[kept], run.images.y_test[kept], len(run.images.classes))
        found = snp.tap_statistics(snp.boolean_matrices(snp.field_matrices(weight, means), THRESHOLD))
        assert len(rows) == 1
        assert rows.snr.item() == pytest.approx(found.snr, rel=1e-3)
        assert rows.accuracy.item() == pytest.approx(right[kept].mean().item(), abs=1e-6)
    own = stage.arrays("nodes")[f"2.ff1/raw/{THRESHOLD}"]
    whole = table.query(where)
    assert own[:, 0].mean().item() == pytest.approx(whole.labels_per_node.item())
    assert (own[:, 5].sum() / own[:, 6].sum()).item() == pytest.approx(whole.mutual.item(), rel=1e-4)


@pytest.mark.slow
def test_single_nodes_are_those_of_their_matrices(run, monkeypatch):
    stage, source = single.examples(run, 1), measure.nodes(run, 1, "trained")
    weight, means = measure.readouts(run, 1, "trained").tensors("weights")["2.ff1/best"], source.tensors("means")
    fields = snp.field_matrices(weight, means["2.ff1"])
    booleans, kept = snp.boolean_matrices(fields, THRESHOLD), stage.arrays("matrices")
    monkeypatch.setattr(single, "NETWORKS", ("trained",))
    every = single.spread(replace(run, settings=run.settings.model_copy(update={"seeds": [1]})), "ff1")
    assert len(every) == 2 * len(fields) and (every.labels <= len(run.images.classes)).all()
    last = every[every.encoder == 2].set_index("node")
    assert last.labels.tolist() == booleans.diagonal(dim1=1, dim2=2).sum(dim=1).tolist()
    for row in stage.table("examples").query("encoder == 2").itertuples():
        assert torch.equal(kept[f"2/{row.which}/boolean"], booleans[row.node])
        assert torch.equal(kept[f"2/{row.which}"], fields[row.node].half())
        assert last.loc[row.node, [*single.COUNTS]].tolist() == [getattr(row, column) for column in single.COUNTS]


@pytest.mark.slow
def test_pairs_of_the_last_encoder_are_counted_node_by_node(run, monkeypatch):
    weight = measure.readouts(run, 1, "trained").tensors("weights")["2.ff1/best"]
    means = measure.nodes(run, 1, "trained").tensors("means")["2.ff1"]
    found = torch.zeros(100, 100, dtype=torch.long)
    for boolean in snp.boolean_matrices(snp.field_matrices(weight, means), THRESHOLD):
        for cluster in snp.label_clusters(boolean):
            for one, other in itertools.permutations(cluster, 2):
                found[one, other] += 1
    assert torch.equal(single.pairs(run, 1, "trained").arrays("pairs")["nodes"], found)
    only = replace(run, settings=run.settings.model_copy(update={"seeds": [1]}))
    top, classes = single.closest(only), run.images.classes
    assert top.nodes.tolist() == found.triu().flatten().sort(descending=True).values[:10].tolist()
    for row in top.itertuples():
        assert found[classes.index(row.label), classes.index(row.other)] == row.nodes
    assert not len(single.of_one_group(only)) and "same_group" not in top  # glyphs have no groups

    groups = torch.arange(100) // 5
    monkeypatch.setattr(single, "superclasses", lambda classes: groups)
    monkeypatch.setattr(single, "NETWORKS", ("trained",))
    share = single.of_one_group(only).iloc[0]
    assert share.share == pytest.approx(found[groups[:, None] == groups].sum().item() / found.sum().item())
    assert 0 < share.permuted < share.permuted_high < 0.2  # 4 of 99 others


@pytest.mark.slow
def test_a_threshold_of_the_sweep_costs_nothing(run, monkeypatch):
    """What is measured holds every threshold, so another main one reads the same stages."""
    first = measure.nodes(run, 1, "trained")
    monkeypatch.setattr(measure, "class_sums", None)
    other = run.settings.model_copy(update={"threshold": 0.4})
    assert measure.nodes(replace(run, settings=other), 1, "trained").folder == first.folder


@pytest.mark.slow
def test_what_was_solved_survives_an_interruption(run, tmp_path, monkeypatch):
    """Stopped between two encoders, the stage goes on where it was and ends with the same bits."""
    whole = measure.readouts(run, 1, "trained")
    again = replace(run, stages=tmp_path / "again", finished={})
    solve, solved = optimum.choose, []

    def stop(*inputs, **options):
        solved.append(None)
        if len(solved) == 5:
            raise KeyboardInterrupt
        return solve(*inputs, **options)

    monkeypatch.setattr(optimum, "choose", stop)
    with pytest.raises(KeyboardInterrupt):
        measure.readouts(again, 1, "trained")
    assert len(list((tmp_path / "again").rglob("solved-*.pt"))) == 1
    solved.clear()
    monkeypatch.setattr(optimum, "choose", lambda *inputs, **options: (solved.append(0), solve(*inputs, **options))[1])
    assert measure.readouts(again, 1, "trained").sha256 == whole.sha256
    assert len(solved) == 3  # of six
    assert not list((tmp_path / "again").rglob("solved-*.pt"))


@pytest.mark.slow
def test_readouts_of_reassigned_labels_know_nothing(run):
    table = measure.nodes(run, 0, "shuffled").table("taps")
    native = table[(table.basis == "native") & (table.threshold == THRESHOLD) & ~table.centred]
    assert native.accuracy.max() < 0.1 and native.snr.median() == pytest.approx(1, abs=0.2)


@pytest.mark.slow
def test_a_random_cnn_takes_its_statistics_from_training_images(run):
    cnn = networks.cnn_half(run)
    table = measure.readouts(cnn, 0, "random").table("readouts")  # of the first seed: those beside the best one, too
    assert set(table.tap) == {"conv"} and set(table.variant) == set(measure.VARIANTS)
    assert (table.gradient <= optimum.TOLERANCE).all()
    settled = table[table.variant == "settled"].set_index("encoder")
    best = table[table.variant == "best"].set_index("encoder")
    assert (settled.gradient <= optimum.TOLERANCE / optimum.SETTLED).all() and (settled.l2 == best.l2).all()
    assert (settled.steps > 0).mean() > 0.5  # it was solved further, or there was nothing to gain


def test_a_beginning_of_balanced_images_is_balanced():
    labels = torch.tensor([2, 0, 0, 1, 0, 1, 2, 2])
    order = balanced(labels)
    assert sorted(order.tolist()) == list(range(8))
    assert sorted(labels[order[:3]].tolist()) == [0, 1, 2] and sorted(labels[order[3:6]].tolist()) == [0, 1, 2]


def test_folds_have_as_many_of_each_label():
    labels = torch.arange(230) % 10
    fold = measure.fold_of(labels)
    counts = torch.stack([labels[fold == number].bincount(minlength=10) for number in range(measure.FOLDS)])
    assert counts.sum() == 230 and (counts.amax(dim=0) - counts.amin(dim=0) <= 1).all()


def test_features_stop_after_the_last_tap(network):
    """What comes later is not computed, and what is recorded is what a whole pass records."""
    places = [place for place in taps.places(network, ["ff1", "attn"]) if place.encoder == 1]
    images = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    mean, std = torch.full((1, 3, 1, 1), 128.0), torch.full((1, 3, 1, 1), 64.0)
    called = []
    network.classifier.blocks[1].register_forward_hook(lambda *_: called.append(None))
    found = taps.features(network, places, images, mean, std, batch_size=2)
    assert not called
    (whole,) = taps.activations(network, places, images, mean, std)
    assert called and all(torch.allclose(found[name], whole[name], atol=1e-5) for name in whole)


@pytest.mark.slow
def test_a_pruned_readout_is_what_is_left_solved_anew(run, monkeypatch):
    """Right after pruning: the whole readout's weights within the mask; retrained: better, and within the mask."""
    monkeypatch.setattr(measure, "IMAGES", 300)
    monkeypatch.setattr(readings, "DRAWS", 1)
    few = run.settings.model_copy(update={"prune_thresholds": [0.3, 0.5]})
    stage = readings.readouts(replace(run, settings=few), 0)
    table, answers = stage.table("readouts"), stage.arrays("answers")
    assert set(table.method) == {"andc", "random", "permuted", "magnitude", "activation"}
    assert set(table.tap) == {"block", "seqpool"}
    by_method = table.groupby(["tap", "threshold", "method"]).dilution.mean().unstack()
    assert (by_method.std(axis=1) < 1e-6).all()  # as many connections
    for row in table.itertuples():
        straight, again = answers[f"2.{row.tap}/{row.method}/{row.draw}/{row.threshold:g}"].float().mean(dim=1)
        assert (row.accuracy, row.retrained_accuracy) == (pytest.approx(straight.item()), pytest.approx(again.item()))
    assert table.constant.between(0, 1).all()
    andc = table[table.method == "andc"]
    assert (andc.andc_ahead == 0).all()
    assert andc.groupby("tap").dilution.apply(lambda part: part.is_monotonic_increasing).all()


def test_nodes_that_say_the_same_of_every_image_are_given_back_as_a_bias():
    random = torch.Generator().manual_seed(0)
    weight, nodes = torch.randn(5, 3, 8, generator=random), torch.randn(40, 3, 8, generator=random)
    nodes[:, :, :6] = nodes[0, :, :6]
    mask = torch.rand(5, 8, generator=random) < 0.5
    mask[:, 6:] = True
    kept, constant = readings.split(weight, mask, nodes.mean(dim=0))
    outputs = torch.einsum("ntd,ltd->nl", nodes, kept) + constant
    assert torch.allclose(outputs, torch.einsum("ntd,ltd->nl", nodes, weight), atol=1e-4)


def test_what_moves_all_labels_alike_is_no_part_of_what_is_constant():
    random = torch.Generator().manual_seed(0)
    said, images = torch.randn(1, 6, generator=random), torch.randn(50, 6, generator=random)
    images -= images.mean(dim=0)
    assert readings.constant_share(said.expand(50, 6) + torch.randn(50, 1)) == pytest.approx(1, abs=1e-5)
    assert readings.constant_share(images + torch.full((50, 1), 1000.0)) == pytest.approx(0, abs=1e-5)
    assert readings.constant_share(torch.zeros(50, 6)) == 0
    centred = said - said.mean()
    mixed = images - images.mean(dim=1, keepdim=True)
    share = centred.square().sum() / (centred.square().sum() + mixed.square().sum() / 50)
    assert readings.constant_share(said + images) == pytest.approx(share.item(), rel=1e-4)


def test_masks_keep_as_many_connections_and_rank_by_their_score():
    random = torch.Generator().manual_seed(0)
    sets = torch.rand(8, 5, generator=random) < 0.4
    weight, size = torch.randn(5, 3, 8, generator=random), torch.rand(3, 8, generator=random)
    for method, _, mask in readings.masks(sets, weight, size, 0):
        assert mask.shape == (5, 8) and mask.sum() == sets.sum()
        if method == "andc":
            assert torch.equal(mask, sets.T)
        if method == "magnitude":
            kept = weight.square().sum(dim=1)
            assert kept[mask].min() >= kept[~mask].max()
        if method == "permuted":
            assert sorted(mask.sum(dim=0).tolist()) == sorted(sets.sum(dim=1).tolist())
