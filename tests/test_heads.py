"""Heads: which recognises which label, against chance, and what the network loses without it."""

import copy
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paperlib import heads, snp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def divergence(counts):
    """Specialisation of one (H, L) table of counts, number by number."""
    values = []
    for label in zip(*counts, strict=True):
        total = sum(label)
        if total:
            shares = [count / total for count in label]
            values.append(sum(p * math.log(p * len(label)) for p in shares if p))
    return sum(values) / len(values) if values else 0.0


shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
tables = hnp.arrays(int, shapes, elements=st.integers(0, 9) | st.just(0)).map(torch.from_numpy)


# --- matrices and counts


def test_head_matrices_add_the_nodes_side_by_side():
    fields = torch.randn(6, 4, 4, generator=seeded())
    matrices = heads.head_matrices(fields, 3)
    assert matrices.shape == (3, 4, 4)
    for head, members in enumerate([(0, 1), (2, 3), (4, 5)]):
        torch.testing.assert_close(matrices[head], fields[members[0]] + fields[members[1]])


def test_head_matrix_is_the_readout_with_the_others_silenced():
    labels = torch.tensor([0, 2, 2, 1, 0, 2, 2])
    activations = torch.randn(7, 5, 8, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(3, 5, 8, generator=seeded(1), dtype=torch.float64)
    matrices = heads.head_matrices(snp.field_matrices(weight, snp.class_means(activations, labels, 3)), 2)
    for head in range(2):
        silenced = weight.clone()
        for node in range(8):
            if node // 4 != head:
                silenced[:, :, node] = 0
        outputs = activations.flatten(1) @ silenced.flatten(1).T
        expected = torch.stack([outputs[labels == label].mean(dim=0) for label in range(3)])
        torch.testing.assert_close(matrices[head], expected)


def test_cooperation_counts_the_recognising_nodes():
    booleans = torch.rand(6, 4, 4, generator=seeded()) < 0.5
    counts = heads.cooperation_counts(booleans, 2)
    for head, label in itertools.product(range(2), range(4)):
        assert counts[head, label] == sum(int(booleans[3 * head + k, label, label]) for k in range(3))


@pytest.mark.parametrize("number", [0, -2, 4])
def test_heads_must_divide_the_nodes(number, refuses):
    with refuses("heads"):
        heads.head_matrices(torch.ones(6, 2, 2), number)
    with refuses("heads"):
        heads.cooperation_counts(torch.ones(6, 2, 2, dtype=torch.bool), number)


def test_labels_go_to_the_head_with_most_nodes():
    counts = torch.tensor([[5, 2, 0, 3, 0], [1, 2, 0, 3, 4], [3, 1, 0, 3, 0]])
    assigned = heads.assign_labels(counts)
    assert assigned.owner.tolist() == [0, 0, -1, 0, 1]
    assert assigned.margin.tolist() == [2, 0, 0, 0, 4]
    assert assigned.tied.tolist() == [False, True, False, True, False]


def test_one_head_owns_what_it_recognises():
    assigned = heads.assign_labels(torch.tensor([[3, 0, 1]]))
    assert assigned.owner.tolist() == [0, -1, 0]
    assert assigned.margin.tolist() == [3, 0, 1]
    assert assigned.tied.tolist() == [False] * 3


# --- specialisation


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([[4, 1], [4, 1], [4, 1]], 0),
        ([[7, 0, 0], [0, 2, 0], [0, 0, 1]], math.log(3)),
        ([[3], [1]], 0.75 * math.log(1.5) + 0.25 * math.log(0.5)),
        ([[5, 0, 1], [0, 0, 1]], math.log(2) / 2),  # nobody recognises the second label: it does not count
        ([[0, 0], [0, 0]], 0),
        ([[3, 1]], 0),  # one head
    ],
)
def test_specialisation_by_hand(counts, expected):
    assert heads.specialisation(torch.tensor(counts)).item() == pytest.approx(expected, abs=1e-6)


@given(tables, st.randoms(use_true_random=False))
def test_specialisation_is_a_bounded_divergence(counts, shuffler):
    value = heads.specialisation(counts).item()
    assert value == pytest.approx(divergence(counts.tolist()), abs=1e-6)
    assert -1e-6 <= value <= math.log(len(counts)) + 1e-6
    order = list(range(len(counts)))
    shuffler.shuffle(order)
    assert heads.specialisation(counts[order]).item() == pytest.approx(value, abs=1e-9)
    assert heads.specialisation(3 * counts).item() == pytest.approx(value, abs=1e-9)


def test_specialisation_of_many_tables_at_once():
    counts = torch.randint(0, 4, (3, 2, 4, 5), generator=seeded())
    values = heads.specialisation(counts)
    assert values.shape == (3, 2)
    for i, j in itertools.product(range(3), range(2)):
        assert values[i, j].item() == pytest.approx(divergence(counts[i, j].tolist()), abs=1e-6)


# --- null


def null_of(diagonal, num_heads, draws, seed=0):
    return heads.permutation_null(diagonal, num_heads, draws, seeded(seed))


def test_null_is_the_mean_over_all_deals():
    diagonal = torch.tensor([[1, 1, 0], [1, 1, 0], [1, 0, 0], [0, 1, 1], [0, 1, 0], [0, 0, 0]]).bool()
    deals = []
    for members in itertools.combinations(range(6), 3):
        others = [node for node in range(6) if node not in members]
        deals.append(divergence([diagonal[list(group)].sum(dim=0).tolist() for group in (members, others)]))
    deals = torch.tensor(deals)
    drawn = null_of(diagonal, 2, 4000)
    assert drawn.mean().item() == pytest.approx(deals.mean().item(), abs=5 * deals.std().item() / 4000**0.5)
    assert drawn.std().item() == pytest.approx(deals.std().item(), rel=0.1)
    assert drawn.min().item() == pytest.approx(deals.min().item(), abs=1e-6)
    assert drawn.max().item() == pytest.approx(deals.max().item(), abs=1e-6)


@pytest.mark.parametrize("draws", [1, 64, 100])
def test_null_has_as_many_draws_and_follows_its_generator(draws):
    diagonal = torch.rand(16, 7, generator=seeded()) < 0.3
    first = null_of(diagonal, 4, draws)
    assert first.shape == (draws,)
    assert torch.equal(null_of(diagonal, 4, draws), first)
    assert not torch.equal(null_of(diagonal, 4, draws, seed=1), first)


def test_planted_experts_stand_out():
    """Every head's nodes recognise 9 of 10 times a label of the head's own quarter, else hardly any."""
    own = torch.arange(32)[:, None] // 8 == torch.arange(20) // 5
    diagonal = torch.rand(32, 20, generator=seeded()) < torch.where(own, 0.9, 0.05)
    observed = heads.specialisation(heads.cooperation_counts(torch.diag_embed(diagonal), 4)).item()
    null = null_of(diagonal, 4, 1000)
    assert (observed - null.mean().item()) / null.std().item() > 10
    mixed = diagonal[torch.randperm(32, generator=seeded(1))]  # the same nodes without their order
    observed = heads.specialisation(heads.cooperation_counts(torch.diag_embed(mixed), 4)).item()
    assert abs(observed - null.mean().item()) / null.std().item() < 4


def test_nodes_without_structure_rarely_stand_out():
    """500 toys: a rate of 2.5 % has a standard deviation of 0.7 %, the mean rank of 1.3 %."""
    above, rank = 0, 0.0
    for seed in range(500):
        diagonal = torch.rand(16, 12, generator=seeded(seed)) < 0.3
        observed = heads.specialisation(heads.cooperation_counts(torch.diag_embed(diagonal), 4))
        null = null_of(diagonal, 4, 192, seed=1000 + seed)
        above += (observed > null.quantile(0.975)).item()
        rank += ((null < observed).double() + (null == observed).double() / 2).mean().item()
    assert 0.005 < above / 500 < 0.05
    assert rank / 500 == pytest.approx(0.5, abs=0.05)


# --- ablation


def test_ablation_is_the_network_without_the_heads_columns(network):
    images = torch.randn(3, 3, 16, 16, generator=seeded())
    intact = network(images).detach()
    logits = heads.ablation_logits(network, images)
    assert logits.shape == (2, 2, 3, 5)
    for encoder, head in itertools.product(range(2), range(2)):
        without = copy.deepcopy(network)
        with torch.no_grad():
            without.classifier.blocks[encoder].self_attn.proj.weight[:, 64 * head : 64 * (head + 1)] = 0
            expected = without(images)
        torch.testing.assert_close(logits[encoder, head], expected, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(expected, intact, atol=1e-2)
    assert torch.equal(network(images), intact)  # nothing stays behind


def test_ablation_scores_without_dropout(network):
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    assert torch.equal(heads.ablation_logits(network.train(), images), heads.ablation_logits(network.eval(), images))


def test_drops_by_hand():
    labels = torch.tensor([0, 1, 2, 1])
    intact = torch.tensor([True, True, False, False])
    ablated = torch.tensor([[False, True, True, False], [True, False, False, False]])
    drop, own = heads.ablation_drops(intact, ablated, labels, torch.tensor([0, 1, -1]))
    assert drop.tolist() == [[1, 0, -1, 0], [0, 1, 0, 0]]
    assert own.tolist() == [[True, False, False, False], [False, True, False, True]]


def test_a_head_that_matters_for_all_labels_alike_is_no_expert():
    """Head 0 owns 80 of 100 labels and its ablation costs 20 % of every label, head 1 owns 20 and costs nothing."""
    labels = torch.arange(100).repeat(10)
    owner = (torch.arange(100) >= 80).long()
    ablated = torch.ones(2, 1000, dtype=torch.bool)
    ablated[0, :200] = False  # the first two images of each label
    drop, own = heads.ablation_drops(torch.ones(1000, dtype=torch.bool), ablated, labels, owner)
    mine, other, draws = heads.own_label_drops(drop, own, torch.Generator().manual_seed(0))
    assert mine == pytest.approx(0.16) and other == pytest.approx(0.16)
    assert draws.shape == (1000,) and abs(draws.mean()) < 0.005 and 0.01 < draws.std() < 0.05


def test_an_expert_is_found():
    """Without head 1, half of its own label's images are lost; head 0 owns nothing and costs nothing."""
    labels, owner = torch.arange(4).repeat(50), torch.tensor([-1, -1, -1, 1])
    ablated = torch.ones(2, 200, dtype=torch.bool)
    ablated[1, (labels == 3) & (torch.arange(200) < 100)] = False
    drop, own = heads.ablation_drops(torch.ones(200, dtype=torch.bool), ablated, labels, owner)
    mine, other, draws = heads.own_label_drops(drop, own, torch.Generator().manual_seed(0))
    assert (mine, other) == (0.5, 0.0)
    assert draws.min() > 0.2 and abs(draws.mean() - 0.5) < 0.02


def test_mean_ablation_puts_the_mean_in_a_heads_place(network):
    images = torch.randn(3, 3, 16, 16, generator=seeded())
    means = [torch.randn(16, 128, generator=seeded(encoder)) for encoder in (1, 2)]
    logits = heads.ablation_logits(network, images, means)
    for encoder, head in itertools.product(range(2), range(2)):
        own = slice(64 * head, 64 * (head + 1))

        def constant(module, args, encoder=encoder, own=own):
            mixed = args[0].clone()
            mixed[:, :, own] = means[encoder][:, own]
            return (mixed,)

        hook = network.classifier.blocks[encoder].self_attn.proj.register_forward_pre_hook(constant)
        torch.testing.assert_close(logits[encoder, head], network(images).detach(), atol=1e-4, rtol=1e-4)
        hook.remove()


def test_dealt_gaps_are_those_of_permuted_owners():
    generator = seeded(3)
    labels, owner = torch.arange(6).repeat(20), torch.tensor([0, 1, 0, -1, 1, 0])
    drop = torch.randint(-1, 2, (2, 120), generator=generator)
    gaps = heads.dealt_gaps(drop, labels, owner, 5, seeded(4))
    again = seeded(4)
    for gap in gaps:
        dealt = owner[torch.randperm(6, generator=again)]
        own = dealt[labels] == torch.arange(2)[:, None]
        mine, other, _ = heads.own_label_drops(drop, own, seeded(), draws=1)
        assert gap.item() == pytest.approx(mine - other)


def test_experts_stand_out_of_dealt_owners_and_common_heads_do_not():
    labels, owner = torch.arange(20).repeat(50), torch.arange(20) % 2
    expert = ((owner[labels] == torch.arange(2)[:, None]) & (torch.arange(1000) < 500)).int()
    common = (torch.arange(1000) < 500).int().expand(2, -1)
    for drop, stands_out in ((expert, True), (common, False)):
        mine, other, _ = heads.own_label_drops(drop, owner[labels] == torch.arange(2)[:, None], seeded(), draws=1)
        dealt = heads.dealt_gaps(drop, labels, owner, 200, seeded(1))
        assert (mine - other > dealt.quantile(0.975)) == stands_out


# --- seeds against each other, and attention


def test_overlap_does_not_depend_on_what_heads_are_called():
    owners = torch.arange(60) % 4
    renamed = torch.tensor([2, 0, 3, 1])[owners]
    overlap, chance = heads.matched_overlap(owners, renamed, 50, seeded())
    assert overlap == 1.0 and 0.25 < chance.mean() < 0.5 and chance.max() < 0.6
    renamed[:30] = renamed[:30].roll(1)
    assert heads.matched_overlap(owners, renamed, 1, seeded())[0] == pytest.approx(0.5, abs=0.1)


def test_overlap_of_unrelated_owners_is_chance():
    inside = 0
    for draw in range(40):
        first, second = torch.randint(0, 4, (2, 100), generator=seeded(draw))
        overlap, chance = heads.matched_overlap(first, second, 100, seeded(draw))
        inside += chance.quantile(0.025) <= overlap <= chance.quantile(0.975)
    assert inside >= 34


def test_labels_that_nobody_recognises_do_not_overlap():
    first, second = torch.tensor([0, 1, -1, -1]), torch.tensor([1, 0, 0, -1])
    assert heads.matched_overlap(first, second, 3, seeded())[0] == 1.0
    assert heads.matched_overlap(torch.full((3,), -1), first[:3], 3, seeded())[0] == 0.0


def test_attention_received_is_the_mean_over_queries(network):
    images = torch.randn(3, 3, 16, 16, generator=seeded())
    received = heads.attention_received(network, images, 2)
    assert received.shape == (3, 2, 16)
    torch.testing.assert_close(received.sum(dim=2), torch.ones(3, 2))
    inputs = []
    network.classifier.blocks[1].self_attn.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with torch.no_grad():
        network(images)
        qkv = network.classifier.blocks[1].self_attn.qkv(inputs[0])
    for head in range(2):
        q, k = (qkv[..., 128 * part + 64 * head :][..., :64] for part in range(2))
        weights = torch.softmax(q @ k.transpose(1, 2) / 8, dim=2)
        torch.testing.assert_close(received[:, head], weights.mean(dim=1), atol=1e-5, rtol=1e-4)


def test_the_gap_is_blind_to_hard_labels_and_to_important_heads():
    """Heads that cost every label alike, labels that every head's silencing costs alike, whoever owns them."""
    generator = torch.Generator().manual_seed(0)
    heads_alone, labels_alone = torch.rand(4, 1, generator=generator), torch.rand(1, 12, generator=generator)
    owner = torch.randint(0, 4, (12,), generator=generator)
    for owners in (owner, torch.zeros(12, dtype=torch.long), owner.where(labels_alone[0] > 0.5, -1)):
        found = heads.interactions(heads_alone + labels_alone, owners)
        assert heads.ablation_gap(found, owners[owners >= 0]).abs() < 1e-7
    own = torch.arange(12) % 4
    lost = torch.nn.functional.one_hot(own, 4).T * 0.3 + heads_alone + labels_alone
    assert heads.ablation_gap(heads.interactions(lost, own), own).item() == pytest.approx(0.3)
    nobody = torch.full((12,), -1)
    assert heads.ablation_gap(heads.interactions(lost, nobody), nobody[:0]) == 0


def test_ties_are_drawn_and_nothing_else():
    counts = torch.tensor([[2, 5, 0, 3], [2, 4, 0, 3]]).repeat(1, 200)
    drawn = heads.assign_labels(counts, torch.Generator().manual_seed(0))
    first = heads.assign_labels(counts)
    clear = ~first.tied
    assert torch.equal(drawn.owner[clear], first.owner[clear]) and torch.equal(drawn.tied, first.tied)
    assert 0.4 < drawn.owner[first.tied].float().mean() < 0.6


def test_a_fold_without_images_adds_nothing():
    """Few test images leave some of ten folds empty."""
    fields, labels = torch.randn(3, 0, 4), torch.zeros(0, dtype=torch.long)
    own = torch.tensor([[True, True, False, True]]).expand(3, -1)
    for sums in (heads.right_answers_per_label(fields, labels), heads.choices_per_label(fields, labels, own)):
        assert torch.equal(sums, torch.zeros(3, 4))
