"""Rotated nodes: the null that keeps the information and takes single nodes away; and what else version 2 counts."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperlib import optimum, snp, statistics


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("groups", [1, 3])
def test_rotations_are_orthogonal_and_keep_heads_apart(groups):
    drawn = snp.rotations(12, 4, generator(), groups)
    assert drawn.shape == (4, 12, 12) and len(drawn.unique(dim=0)) == 4
    for rotation in drawn:
        assert torch.allclose(rotation @ rotation.T, torch.eye(12), atol=1e-5)
        head = torch.arange(12) // (12 // groups)
        assert (rotation[head[:, None] != head] == 0).all()


def test_all_rotations_are_equally_likely():
    """Entries of a uniformly random orthogonal matrix have mean 0 and variance 1/D, the diagonal too."""
    drawn = snp.rotations(4, 4000, generator())
    assert drawn.mean(dim=0).abs().max() < 0.04
    assert torch.allclose(drawn.var(dim=0), torch.full((4, 4), 0.25), atol=0.03)


def test_a_tap_of_one_node_has_nothing_to_rotate(refuses):
    with refuses("nothing to rotate"):
        snp.rotations(4, 1, generator(), groups=4)


def test_rotation_keeps_what_all_nodes_say_together():
    weight, means = (torch.randn(6, 5, 8, generator=generator(seed)) for seed in (1, 2))
    (rotation,) = snp.rotations(8, 1, generator())
    native = snp.field_matrices(weight, means)
    turned = snp.field_matrices(snp.rotated(weight, rotation), snp.rotated(means, rotation))
    assert torch.allclose(native.sum(dim=0), turned.sum(dim=0), atol=1e-4)
    assert not torch.allclose(native, turned, atol=0.1)


def toy_snr(mixed: bool) -> tuple[float, float]:
    """SNR of native and of rotated nodes, readout solved; each node knows three labels, or, mixed, all share them."""
    random, labels, nodes = generator(5), 12, 24
    y = torch.arange(960) % labels
    knows = torch.zeros(labels, nodes)
    for node in range(nodes):
        knows[torch.randperm(labels, generator=random)[:3], node] = 1
    if mixed:
        knows = knows @ snp.rotations(nodes, 1, random)[0]
    activations = (knows[y] + 0.3 * torch.randn(len(y), nodes, generator=random))[:, None]
    weight = optimum.solve(optimum.problem(activations, y, labels), 0.01).weight[:, None]
    means, found = snp.class_means(activations, y, labels), []
    for rotation in (torch.eye(nodes), *snp.rotations(nodes, 3, random)):
        fields = snp.field_matrices(snp.rotated(weight, rotation), snp.rotated(means, rotation))
        found.append(snp.tap_statistics(snp.boolean_matrices(fields)).snr)
    return found[0], float(np.mean(found[1:]))


def test_only_a_toy_with_labels_of_its_own_nodes_loses_snr_when_rotated():
    native, rotated = toy_snr(mixed=False)
    assert native > 1.5 * rotated
    native, rotated = toy_snr(mixed=True)
    assert native == pytest.approx(rotated, rel=0.25)


# --- clusters that mean something


@given(seed=st.integers(0, 10_000), labels=st.integers(2, 6))
@settings(max_examples=40, deadline=None)
def test_mutual_confusions_are_those_of_loops(seed, labels):
    booleans = torch.rand(3, labels, labels, generator=generator(seed)) < 0.5
    rows, columns = snp.chance_factors(booleans)
    for number, (node, (found, chance)) in enumerate(
        zip(booleans.tolist(), snp.mutual_confusions(booleans).tolist(), strict=True)
    ):
        pairs, expected = 0, 0.0
        for a, b in itertools.permutations(range(labels), 2):
            if node[a][a] and node[b][b]:
                pairs += node[a][b] and node[b][a]
                first, second = (float(rows[number, x] * columns[number, y]) for x, y in ((a, b), (b, a)))
                expected += min(1, first) * min(1, second)
        assert (found, chance) == (pairs, pytest.approx(expected, rel=1e-4, abs=1e-5))
    own = [
        sum(node[a][b] for a, b in itertools.permutations(range(labels), 2) if node[b][b]) for node in booleans.tolist()
    ]
    assert snp.own_noise(booleans).tolist() == own


def test_chance_keeps_the_sums_off_the_diagonal():
    booleans = torch.rand(20, 12, 12, generator=generator(4)) < 0.4
    rows, columns = snp.chance_factors(booleans, rounds=200)
    off = 1 - torch.eye(12)
    chance, ones = rows[:, :, None] * columns[:, None] * off, booleans.float() * off
    for dim in (1, 2):
        assert torch.allclose(chance.sum(dim=dim), ones.sum(dim=dim), atol=1e-3)


@pytest.mark.parametrize("recognised", [2, 3, 12])
def test_a_node_that_answers_the_same_to_every_image_confuses_by_chance_alone(recognised):
    """Its labels are confused mutually, all of them, but its rows and columns leave no other way."""
    booleans = torch.zeros(1, 20, 20, dtype=torch.bool)
    booleans[:, :, :recognised] = True
    found, chance = snp.mutual_confusions(booleans)[0].tolist()
    assert found == recognised * (recognised - 1) and found / chance == pytest.approx(1, abs=1e-3)


def test_confusions_without_structure_are_as_many_as_sums_say():
    """Ones whose rate depends on row and column alone give 1, blocks give more."""
    rate = torch.rand(80, 1, generator=generator(1)) * torch.rand(1, 80, generator=generator(2))
    booleans = torch.rand(300, 80, 80, generator=generator(3)) < rate
    found, expected = snp.mutual_confusions(booleans).sum(dim=0)
    assert found / expected == pytest.approx(1, abs=0.1)
    block = torch.arange(30) // 3
    blocks = (block[:, None] == block).expand(5, -1, -1)
    found, expected = snp.mutual_confusions(blocks).sum(dim=0)
    assert found / expected == pytest.approx(60 / (30 * 29 * (2 / 29) ** 2), rel=1e-3)  # 2 of 29 others, both ways


# --- intervals


def test_a_slope_is_what_a_line_grows_by():
    assert statistics.slope(np.array([1.0, 2.0, 3.0, 4.0])) == pytest.approx(3)
    assert statistics.slope(np.array([[5.0, 5.0, 5.0], [0.0, 2.0, 1.0]])) == pytest.approx([0, 1])


def test_intervals_from_folds_cover_what_they_promise():
    """95 % of them the true mean, though ten folds know their spread badly."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(400):
        images = rng.normal(size=500)
        folds = images.reshape(10, -1)
        without = np.array([np.delete(folds, fold, axis=0).mean() for fold in range(10)])
        drawn = statistics.fold_draws(np.array(images.mean()), without, statistics.fold_weights(10, 1000, rng))
        low, high = statistics.interval(drawn)
        assert drawn.mean() == pytest.approx(images.mean(), abs=0.02)
        covered.append(low < 0 < high)
    assert 0.93 < np.mean(covered) < 0.98


def test_statistics_of_the_same_images_are_drawn_together():
    rng = np.random.default_rng(1)
    folds = rng.normal(size=10)
    weights = statistics.fold_weights(10, 300, rng)
    pair = statistics.fold_draws(np.array([1.0, 2.0]), np.stack([folds, folds]), weights)
    assert pair.shape == (300, 2) and np.allclose(pair[:, 1] - pair[:, 0], 1)


def test_seeds_share_their_images_and_widen_an_interval_where_they_differ():
    """Three seeds on the same images are no surer of these than one."""
    rng = np.random.default_rng(2)
    same = np.tile(rng.normal(size=20_000), (3, 1))
    assert statistics.over_seeds(same, rng).std() == pytest.approx(1, rel=0.02)
    apart = same + np.array([[-10.0], [0.0], [10.0]])
    assert statistics.over_seeds(apart, rng).std() == pytest.approx((200 / 3 / 3 + 1) ** 0.5, rel=0.02)
