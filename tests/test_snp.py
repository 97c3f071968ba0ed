"""The measure, from its definition: fields, Boolean matrices, clusters, signal and noise."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paperlib import snp


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def matrices(ones, labels):
    """One node's Boolean matrix with ones at the (input, output) pairs."""
    boolean = torch.zeros(labels, labels, dtype=torch.bool)
    for pair in ones:
        boolean[pair] = True
    return boolean


def block(*groups):
    """The pairs of groups of labels that are confused with each other, both ways, and recognised."""
    return {(a, b) for group in groups for a in group for b in group}


def greedy(boolean):
    """The group's description, word by word, on a list of lists."""
    unused = [label for label in range(len(boolean)) if boolean[label][label]]
    clusters = []
    while unused:
        cluster = [unused[0]]
        for label in unused[1:]:
            if all(boolean[a][b] for a in [*cluster, label] for b in [*cluster, label]):
                cluster.append(label)
        clusters.append(cluster)
        unused = [label for label in unused if label not in cluster]
    return clusters


@st.composite
def boolean_stacks(draw):
    """(D, L, L) bool, among them symmetric ones, where large clusters are common."""
    labels = draw(st.integers(2, 7))
    stack = draw(hnp.arrays(bool, (draw(st.integers(1, 4)), labels, labels)))
    if draw(st.booleans()):
        stack = stack | stack.transpose(0, 2, 1)
    return torch.from_numpy(stack)


field_stacks = hnp.array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=5).flatmap(
    lambda shape: hnp.arrays(np.float64, (shape[0], shape[1], shape[1]), elements=st.integers(-8, 8).map(float))
)


# --- class means and fields


@pytest.mark.parametrize(
    "labels", [[0, 1, 2] * 4, [2, 0, 0, 1, 2, 2, 2, 2, 2, 0, 2, 2]], ids=["balanced", "unbalanced"]
)
def test_fields_are_the_silencing_loop(labels):
    labels = torch.tensor(labels)
    activations, weight = random(12, 3, 4), random(3, 3, 4, seed=1)
    fields = snp.field_matrices(weight, snp.class_means(activations, labels, 3))
    for node in range(4):
        silenced = torch.zeros_like(weight)
        silenced[:, :, node] = weight[:, :, node]
        outputs = torch.stack([(silenced * image).sum(dim=(1, 2)) for image in activations])
        for label in range(3):
            torch.testing.assert_close(fields[node, label], outputs[labels == label].mean(dim=0))


def test_fields_of_all_nodes_add_up_to_the_readout():
    labels = torch.tensor([1, 0, 1, 2, 1])
    activations, weight = random(5, 2, 6), random(3, 2, 6, seed=1)
    whole = activations.flatten(1) @ weight.flatten(1).T
    expected = torch.stack([whole[labels == label].mean(dim=0) for label in range(3)])
    fields = snp.field_matrices(weight, snp.class_means(activations, labels, 3))
    torch.testing.assert_close(fields.sum(dim=0), expected)


def test_class_sums_add_up_over_batches():
    activations, labels = random(7, 2, 3), torch.tensor([0, 2, 2, 1, 0, 2, 2])
    sums = torch.zeros(3, 2, 3, dtype=torch.float64)
    for i in (0, 3, 6):
        snp.class_sums(sums, activations[i : i + 3], labels[i : i + 3])
    torch.testing.assert_close(snp.means_of(sums, torch.tensor([2, 1, 4])), snp.class_means(activations, labels, 3))


def test_a_label_without_images_has_no_mean(refuses):
    with refuses("label 1 "):
        snp.class_means(random(4, 1, 2), torch.tensor([0, 2, 2, 0]), 3)
    with refuses("label 2 "):  # the last one, which no count reveals
        snp.class_means(random(4, 1, 2), torch.tensor([0, 1, 1, 0]), 3)


def test_readout_and_means_must_belong_together(refuses):
    with refuses("differ"):
        snp.field_matrices(random(3, 2, 4), random(3, 4, 2))


def test_planted_node_gives_its_matrix_and_cluster():
    """Node 0 fires for labels 1 and 3 only and speaks for both; node 1 fires always and speaks for label 2."""
    labels = torch.arange(5).repeat_interleave(3)
    activations = torch.zeros(15, 2, 2)
    activations[(labels == 1) | (labels == 3), :, 0] = 1
    activations[:, :, 1] = 1
    weight = torch.full((5, 2, 2), -1.0)
    weight[1, :, 0] = weight[3, :, 0] = weight[2, :, 1] = 1
    booleans = snp.boolean_matrices(snp.field_matrices(weight, snp.class_means(activations, labels, 5)))
    assert torch.equal(booleans[0], matrices(block([1, 3]), 5))
    assert torch.equal(booleans[1], matrices({(label, 2) for label in range(5)}, 5))
    assert snp.label_clusters(booleans[0]) == [[1, 3]]
    assert snp.label_clusters(booleans[1]) == [[2]]
    nodes = snp.node_statistics(booleans)
    assert nodes.labels.tolist() == [2, 1] and nodes.clusters.tolist() == [1, 1]
    assert nodes.internal.tolist() == [2, 0] and nodes.external.tolist() == [0, 4]
    tap = snp.tap_statistics(booleans)
    assert tap.signal == pytest.approx(3 / 5) and tap.noise == pytest.approx(6 / 20)
    assert tap.snr == pytest.approx(2) and tap.snr_external == pytest.approx(3)


# --- offset


@given(field_stacks)
def test_offset_and_centred_part_add_up(fields):
    fields = torch.from_numpy(fields)
    centred, share = snp.split_offset(fields)
    offset = fields - centred
    assert torch.allclose(offset, offset[:, :1].expand_as(offset))  # the same for every input label
    assert torch.allclose(centred.mean(dim=1), torch.zeros(()).double())
    assert ((share >= 0) & (share <= 1 + 1e-12)).all()
    squares = offset.square().sum(dim=(1, 2)) + centred.square().sum(dim=(1, 2))
    torch.testing.assert_close(squares, fields.square().sum(dim=(1, 2)))  # orthogonal parts
    torch.testing.assert_close(share * squares, offset.square().sum(dim=(1, 2)))


def test_offset_share_of_pure_nodes():
    """Row = input label: what all inputs cause alike is offset, what all outputs say alike is not."""
    outputs = random(1, 4)
    same_for_all_inputs = outputs[:, None].expand(1, 4, 4)
    no_input_mean = torch.tensor([3.0, -1, -1, -1]).double()[None, :, None].expand(1, 4, 4)
    dead = torch.zeros(1, 4, 4).double()
    centred, share = snp.split_offset(torch.cat([same_for_all_inputs, no_input_mean, dead]))
    assert share[0].item() == pytest.approx(1) and centred[0].abs().max() < 1e-12
    assert share[1].item() == pytest.approx(0) and torch.allclose(centred[1], no_input_mean[0])
    assert share[2].item() == 0


# --- Boolean matrices


def test_threshold_is_strict():
    fields = torch.tensor([[[4.0, 1.0], [np.nextafter(np.float32(1), np.float32(2)), 0.75]]])
    assert snp.boolean_matrices(fields, 0.25).tolist() == [[[True, False], [True, False]]]


def test_threshold_is_relative_to_the_nodes_own_maximum():
    fields = torch.tensor([[[10.0, 3.5], [2.5, -9.0]], [[1.0, 0.35], [0.25, 0.5]]])
    assert snp.boolean_matrices(fields).tolist() == [[[True, True], [False, False]], [[True, True], [False, True]]]


@given(field_stacks, st.floats(0.05, 0.95), st.data())
def test_scale_of_a_node_does_not_matter(fields, threshold, data):
    fields = torch.from_numpy(fields)
    powers = data.draw(st.lists(st.integers(-30, 30), min_size=len(fields), max_size=len(fields)))
    scaled = fields * torch.tensor(powers).double().exp2()[:, None, None]
    assert torch.equal(snp.boolean_matrices(fields, threshold), snp.boolean_matrices(scaled, threshold))


@given(field_stacks, st.randoms(use_true_random=False))
def test_label_order_permutes_the_matrix_and_keeps_snr(fields, shuffler):
    fields = torch.from_numpy(fields)
    order = list(range(fields.shape[1]))
    shuffler.shuffle(order)
    booleans = snp.boolean_matrices(fields)
    permuted = snp.boolean_matrices(fields[:, order][:, :, order])
    assert torch.equal(permuted, booleans[:, order][:, :, order])
    before, after = snp.tap_statistics(booleans), snp.tap_statistics(permuted)
    for name in ("signal", "noise", "snr", "labels_per_node"):
        assert getattr(after, name) == pytest.approx(getattr(before, name), nan_ok=True)


def test_silent_and_negative_nodes_are_empty():
    fields = torch.stack([torch.zeros(3, 3), -torch.ones(3, 3), -torch.eye(3)])
    booleans = snp.boolean_matrices(fields)
    assert not booleans.any()
    nodes = snp.node_statistics(booleans)
    for values in (nodes.labels, nodes.clusters, nodes.internal, nodes.external):
        assert values.tolist() == [0, 0, 0]
    tap = snp.tap_statistics(booleans)
    assert (tap.signal, tap.noise, tap.clusters_per_node, tap.nodes_with_cluster) == (0, 0, 0, 0)
    assert math.isnan(tap.snr) and math.isnan(tap.snr_external) and math.isnan(tap.pooled_cluster_size)
    assert snp.label_clusters(booleans[0]) == []


def test_no_noise_gives_nan():
    tap = snp.tap_statistics(torch.eye(3, dtype=torch.bool)[None])
    assert tap.signal == 1 and tap.noise == 0 and math.isnan(tap.snr)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_fields_that_are_not_finite_are_refused(value, refuses):
    fields = random(3, 4, 4)
    fields[1, 2, 3] = value
    with refuses("finite"):
        snp.boolean_matrices(fields)


@pytest.mark.parametrize("threshold", [0, 1, -0.1, 1.5, math.nan])
def test_threshold_outside_its_range_is_refused(threshold, refuses):
    with refuses("threshold"):
        snp.boolean_matrices(random(1, 2, 2), threshold)


# --- clusters


@pytest.mark.parametrize(
    "ones, labels, clusters",
    [
        (block([0, 1, 2]), 4, [[0, 1, 2]]),
        (block([1], [3]), 4, [[1], [3]]),
        (block([0, 2], [1, 3]), 4, [[0, 2], [1, 3]]),
        # greedy, ascending: 0 takes 2 first, and 3 fits neither 0 nor 2 without 2, so 3 stays alone
        (block([0, 2], [2, 3]), 4, [[0, 2], [3]]),
        # 1 is linked with 0 and with 2, but 0 and 2 are not linked: 1 goes with the first of them
        (block([0, 1], [1, 2]), 3, [[0, 1], [2]]),
        # a later label may pass over the first cluster and join the second
        (block([0, 1], [2, 3], [0, 3]), 4, [[0, 1], [2, 3]]),
        # one-way links never join
        (block([0], [1]) | {(0, 1)}, 2, [[0], [1]]),
        (block([0], [1]) | {(1, 0)}, 2, [[0], [1]]),
        # a label that the node does not recognise belongs to no cluster, however well it is linked
        (block([0, 1, 2]) - {(1, 1)}, 3, [[0, 2]]),
        (block([0, 1]) - {(0, 0), (1, 1)}, 2, []),
    ],
)
def test_clusters_by_hand(ones, labels, clusters):
    assert snp.label_clusters(matrices(ones, labels)) == clusters


@given(boolean_stacks())
@settings(max_examples=200)
def test_clusters_are_the_greedy_description(booleans):
    numbers = snp.cluster_labels(booleans)
    for node, boolean in enumerate(booleans):
        expected = greedy(boolean.tolist())
        assert snp.label_clusters(boolean) == expected
        found = [[label for label, number in enumerate(numbers[node].tolist()) if number == i] for i in range(10)]
        assert [cluster for cluster in found if cluster] == expected


@given(boolean_stacks())
def test_every_recognised_label_is_in_one_cluster_of_ones(booleans):
    for boolean in booleans:
        clusters = snp.label_clusters(boolean)
        members = [label for cluster in clusters for label in cluster]
        assert sorted(members) == boolean.diagonal().nonzero().flatten().tolist()
        for cluster in clusters:
            assert boolean[cluster][:, cluster].all()


@given(boolean_stacks())
def test_statistics_are_their_definitions(booleans):
    nodes = snp.node_statistics(booleans)
    count, size = booleans.shape[:2]
    for node, boolean in enumerate(booleans):
        inside = torch.zeros_like(boolean)
        clusters = greedy(boolean.tolist())
        for cluster in clusters:
            for a in cluster:
                inside[a, cluster] = True
        diagonal = torch.eye(size, dtype=torch.bool)
        assert nodes.labels[node] == sum(map(len, clusters)) == boolean.diagonal().sum()
        assert nodes.clusters[node] == len(clusters)
        assert nodes.internal[node] == (inside & ~diagonal).sum()
        assert nodes.external[node] == (boolean & ~inside).sum()
        assert nodes.labels[node] + nodes.internal[node] + nodes.external[node] == boolean.sum()
    tap = snp.tap_statistics(booleans)
    signal = sum(int(boolean[label, label]) for boolean in booleans for label in range(size)) / size
    pairs = [(c, label) for c in range(size) for label in range(size) if c != label]
    noise = sum(int(boolean[pair]) for boolean in booleans for pair in pairs) / len(pairs)
    approx = partial(pytest.approx, nan_ok=True)
    assert tap.signal == approx(signal) == approx(count * nodes.labels.double().mean().item() / size)
    assert tap.noise == approx(noise)
    assert tap.snr == approx(signal / noise if noise else math.nan)
    external = nodes.external.sum().item() / len(pairs)
    assert tap.snr_external == approx(signal / external if external else math.nan)
    assert tap.labels_per_node == approx(nodes.labels.double().mean().item())
    assert tap.clusters_per_node == approx(nodes.clusters.double().mean().item())
    assert tap.internal_noise == approx(nodes.internal.double().mean().item())
    assert tap.external_noise == approx(nodes.external.double().mean().item())
    assert tap.nodes_with_cluster == approx((nodes.clusters > 0).double().mean().item())
    if nodes.clusters.sum():
        assert tap.signal == approx(count * tap.clusters_per_node * tap.pooled_cluster_size / size)


# --- what chance alone gives


def test_pairs_are_counted_where_two_labels_share_a_cluster():
    stack = torch.stack([matrices(block([0, 1, 2], [4]), 5), matrices(block([0, 1], [3, 4]), 5)])
    pairs = snp.clustered_pairs(stack)
    expected = {(0, 1): 2, (0, 2): 1, (1, 2): 1, (3, 4): 1}
    assert {(a, b): int(pairs[a, b]) for a in range(5) for b in range(a + 1, 5) if pairs[a, b]} == expected
    assert torch.equal(pairs, pairs.T)
    assert snp.share_within(pairs, torch.tensor([0, 0, 0, 1, 2])) == pytest.approx(4 / 5)
    assert math.isnan(snp.share_within(torch.zeros(5, 5), torch.arange(5)))


def test_the_order_of_labels_moves_clusters_only():
    """A chain 0-1-2, where 0 and 2 are not connected: two clusters in any order. A longer one: it depends."""
    chain = matrices(block([0, 1], [1, 2]), 3)[None]
    clusters, sizes = snp.order_spread(chain, 10, torch.Generator().manual_seed(0))
    assert clusters.tolist() == [2.0] * 10 and sizes.tolist() == [1.5] * 10
    chain = matrices(block([0, 1], [1, 2], [2, 3]), 4)[None]
    clusters, sizes = snp.order_spread(chain, 30, torch.Generator().manual_seed(0))
    assert set(clusters.tolist()) == {2.0, 3.0}  # {01}{23}, or {12}{0}{3}
    torch.testing.assert_close(clusters * sizes, torch.full((30,), 4.0))


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_nodes_in_chunks_are_the_nodes(chunk):
    weight, means = random(9, 4, 7, seed=1), random(9, 4, 7, seed=2)
    booleans = snp.boolean_matrices(snp.field_matrices(weight, means), 0.2)
    nodes, diagonal = snp.measured_nodes(weight, means, 0.2, chunk)
    expected = snp.node_statistics(booleans)
    assert all(torch.equal(getattr(nodes, name), getattr(expected, name)) for name in nodes.__dataclass_fields__)
    assert torch.equal(diagonal, snp.diagonal_labels(booleans))


def test_many_nodes_with_many_labels_are_split(monkeypatch):
    booleans = random(5, 6, 6) > 0
    whole = snp.node_statistics(booleans)
    monkeypatch.setattr(snp, "CLUSTER_BYTES", 72)  # two nodes at a time
    parts = snp.node_statistics(booleans)
    assert all(torch.equal(getattr(whole, name), getattr(parts, name)) for name in whole.__dataclass_fields__)


def test_snr_of_gaussian_matrices_is_one():
    """About 3,700 recognised labels: 5 standard deviations are 8 %. Clusters and noise as in an independent count."""
    tap = snp.tap_statistics(snp.boolean_matrices(random(300, 100, 100, dtype=torch.float32)))
    assert tap.snr == pytest.approx(1, rel=0.08)
    assert tap.clusters_per_node == pytest.approx(11.2, rel=0.08)
    assert tap.pooled_cluster_size == pytest.approx(1.10, abs=0.02)
    assert tap.internal_noise + tap.external_noise == pytest.approx(1224, rel=0.05)


def test_snr_of_rank_one_gaussian_matrices_is_one():
    fields = random(3000, 100, 1, dtype=torch.float32) * random(3000, 1, 100, seed=1, dtype=torch.float32)
    tap = snp.tap_statistics(snp.boolean_matrices(fields))
    assert tap.snr == pytest.approx(1, rel=0.08)
    assert tap.clusters_per_node == pytest.approx(2.1, rel=0.08)
    assert tap.pooled_cluster_size == pytest.approx(1.40, rel=0.05)
    assert tap.internal_noise + tap.external_noise == pytest.approx(288, rel=0.05)
