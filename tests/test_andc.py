"""ANDC masks: who stays connected, and that pruned means pruned."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from paperlib import andc
from paperlib.models import cct, vgg


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def label_sets(nodes, labels, seed=0, density=0.3):
    return torch.rand(nodes, labels, generator=seeded(seed)) < density


def sets_of(diagonal):
    return sorted(tuple(row) for row in diagonal.tolist())


@pytest.fixture
def diagonal():
    """Label sets of the FF taps of the tiny network: 128 nodes each, some without labels."""
    kinds = [(encoder, kind) for encoder in (1, 2) for kind in ("ff_in", "ff1", "ff2")]
    return {f"{encoder}.{kind}": label_sets(128, 5, seed) for seed, (encoder, kind) in enumerate(kinds)}


@pytest.fixture
def masks(diagonal, network):
    return andc.andc_masks(diagonal, andc.connections(network, "ff"))


def weight_of(network, name):
    """What the layer multiplies with, seen from outside: its response to unit vectors."""
    layer = network.get_submodule(name)
    with torch.no_grad():
        return (layer(torch.eye(layer.in_features)) - layer.bias).T


# --- masks


def test_nodes_stay_connected_iff_they_share_a_label():
    out = torch.tensor([[1, 1, 0], [0, 0, 1], [0, 0, 0]]).bool()
    into = torch.tensor([[1, 0, 0], [0, 1, 1], [0, 0, 0], [1, 1, 1]]).bool()
    expected = [[True, True, False, True], [False, True, False, True], [False] * 4]
    assert andc.connection_mask(out, into).tolist() == expected


@given(st.data(), st.integers(1, 5))
def test_connections_match_the_double_loop(data, labels):
    out, into = (data.draw(hnp.arrays(bool, (data.draw(st.integers(1, 6)), labels))) for _ in range(2))
    mask = andc.connection_mask(torch.from_numpy(out), torch.from_numpy(into))
    assert mask.dtype == torch.bool and mask.shape == (len(out), len(into))
    for j, labels_j in enumerate(out):
        for k, labels_k in enumerate(into):
            shared = {i for i, has in enumerate(labels_j) if has} & {i for i, has in enumerate(labels_k) if has}
            assert mask[j, k].item() == bool(shared)


def test_ff_masks_have_the_weights_shapes():
    wide = cct("cct_7_3x2", num_classes=5, image_size=16)  # 512 FF nodes on 256 stream nodes
    sizes = {"ff_in": 256, "ff1": 512, "ff2": 256}
    diagonal = {f"{i + 1}.{kind}": label_sets(size, 5) for i in range(7) for kind, size in sizes.items()}
    masks = andc.andc_masks(diagonal, andc.connections(wide, "ff"))
    assert len(masks) == 14
    for name, mask in masks.items():
        assert mask.shape == wide.get_submodule(name).weight.shape == ((512, 256) if "linear1" in name else (256, 512))


def test_ff_masks_connect_the_right_nodes(network):
    """In encoder 2, ff_in 3, ff1 10 and ff2 7 know label 4; ff1 20 and ff2 9 know label 1; nobody else knows any."""
    diagonal = {
        f"{i}.{kind}": torch.zeros(128, 5, dtype=torch.bool) for i in (1, 2) for kind in ("ff_in", "ff1", "ff2")
    }
    diagonal["2.ff_in"][3, 4] = diagonal["2.ff1"][10, 4] = diagonal["2.ff2"][7, 4] = True
    diagonal["2.ff1"][20, 1] = diagonal["2.ff2"][9, 1] = True
    kept = {
        name: mask.nonzero().tolist()
        for name, mask in andc.andc_masks(diagonal, andc.connections(network, "ff")).items()
    }
    assert kept == {
        "classifier.blocks.0.linear1": [],
        "classifier.blocks.0.linear2": [],
        "classifier.blocks.1.linear1": [[10, 3]],
        "classifier.blocks.1.linear2": [[7, 10], [9, 20]],
    }


def test_attention_and_classifier_connect_the_right_nodes(network):
    sizes = {"block": 128, "qkv": 384, "attn": 128, "mha": 128}
    diagonal = {f"{i}.{kind}": label_sets(size, 5, 7 * i + size) for i in (1, 2) for kind, size in sizes.items()}
    diagonal["0.stem"] = label_sets(128, 5, 99)
    masks = andc.andc_masks(diagonal, andc.connections(network, "attention"))
    for name, (into, out) in {
        "0.self_attn.qkv": ("0.stem", "1.qkv"), "1.self_attn.qkv": ("1.block", "2.qkv"),
        "0.self_attn.proj": ("1.attn", "1.mha"), "1.self_attn.proj": ("2.attn", "2.mha"),
    }.items():  # fmt: skip
        expected = andc.connection_mask(diagonal[out], diagonal[into])
        assert torch.equal(masks.pop(f"classifier.blocks.{name}"), expected)
        assert expected.shape == network.get_submodule(f"classifier.blocks.{name}").weight.shape
    assert not masks
    (name, mask), *rest = andc.andc_masks(diagonal, andc.connections(network, "classifier")).items()
    assert name == "classifier.fc" and not rest and torch.equal(mask, diagonal["2.block"].T)


def test_dilution_counts_connections():
    masks = {"a": torch.tensor([[True, False, False, False]]), "b": torch.tensor([[True], [True], [False], [True]])}
    assert andc.dilution(masks) == pytest.approx(4 / 8)
    unequal = {"a": torch.ones(3, 1, dtype=torch.bool), "b": torch.zeros(1, 1, dtype=torch.bool)}
    assert andc.dilution(unequal) == pytest.approx(1 / 4)  # of all connections, not the mean over layers
    assert andc.dilution({"a": torch.ones(2, 2, dtype=torch.bool)}) == 0


# --- the masks that ANDC has to beat


def test_random_masks_keep_as_many_and_others(masks):
    drawn = andc.random_masks(masks, seeded())
    assert drawn.keys() == masks.keys()
    for name, mask in masks.items():
        assert drawn[name].dtype == torch.bool and drawn[name].shape == mask.shape
        assert drawn[name].sum() == mask.sum()
        share = mask.double().mean().item()
        assert (drawn[name] & mask).double().mean().item() == pytest.approx(share**2, abs=0.03)  # independent of it
    again, other = andc.random_masks(masks, seeded()), andc.random_masks(masks, seeded(1))
    assert all(torch.equal(again[name], drawn[name]) for name in masks)
    assert not any(torch.equal(other[name], drawn[name]) for name in masks)


def test_random_masks_favour_no_connection():
    mask = torch.tensor([[True, False], [False, False]])
    generator = seeded()
    counts = sum(andc.random_masks({"a": mask}, generator)["a"].double() for _ in range(2000))
    assert counts.sum() == 2000
    assert (counts - 500).abs().max() < 5 * (2000 * 0.25 * 0.75) ** 0.5


def test_magnitude_masks_keep_the_largest(masks, network):
    for name, mask in andc.magnitude_masks(masks, network).items():
        size = network.get_submodule(name).weight.detach().abs()
        assert mask.sum() == masks[name].sum()
        assert size[mask].min() >= size[~mask].max()


def test_activation_masks_keep_the_largest_products(masks, network):
    images = torch.randint(0, 256, (20, 3, 16, 16), generator=seeded(), dtype=torch.uint8)
    mean, std = torch.full((3, 1, 1), 0.5), torch.full((3, 1, 1), 0.25)
    norms = andc.input_norms(network, masks, images, mean, std)
    seen = {}
    for name in masks:
        network.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    with torch.no_grad():
        network((images.float() / 255 - mean) / std)
    for name, mask in andc.activation_masks(masks, network, norms).items():
        torch.testing.assert_close(norms[name], seen[name].square().mean(dim=(0, 1)).sqrt(), rtol=1e-4, atol=1e-5)
        score = network.get_submodule(name).weight.detach().abs() * norms[name]
        assert mask.sum() == masks[name].sum()
        assert score[mask].min() >= score[~mask].max()


@pytest.mark.parametrize("kept", [torch.zeros, torch.ones], ids=["none", "all"])
def test_controls_of_extreme_masks(kept, network):
    extreme = {"classifier.blocks.0.linear1": kept(128, 128, dtype=torch.bool)}
    for control in (andc.random_masks(extreme, seeded()), andc.magnitude_masks(extreme, network)):
        assert torch.equal(control["classifier.blocks.0.linear1"], extreme["classifier.blocks.0.linear1"])


def test_permuted_labels_keep_sets_and_dilution(diagonal, masks, network):
    permuted = andc.permuted_labels(diagonal, seeded())
    assert permuted.keys() == diagonal.keys()
    for name, sets in diagonal.items():
        assert sets_of(permuted[name]) == sets_of(sets)
        assert not torch.equal(permuted[name], sets)
    for name, mask in andc.andc_masks(permuted, andc.connections(network, "ff")).items():
        assert mask.sum() == masks[name].sum()
        assert not torch.equal(mask, masks[name])
    again = andc.permuted_labels(diagonal, seeded())
    assert all(torch.equal(again[name], permuted[name]) for name in diagonal)


# --- pruning


def test_pruned_layers_lose_exactly_the_masked_weights(network, masks):
    before = {name: weight_of(network, name) for name in masks}
    state = copy.deepcopy(network.state_dict())
    assert andc.apply_masks(network, masks) is network
    for name, mask in masks.items():
        expected = torch.where(mask, before[name], torch.zeros(()))
        torch.testing.assert_close(weight_of(network, name), expected, atol=1e-5, rtol=0)
        assert (weight_of(network, name)[~mask] == 0).all() and 0 < mask.sum() < mask.numel()
    after = network.state_dict()
    for key, value in state.items():
        if key.removesuffix(".weight") not in masks:  # biases and all other layers
            assert torch.equal(after[key], value)


def test_pruned_network_computes_with_zeros(network, masks):
    by_hand = copy.deepcopy(network)
    with torch.no_grad():
        for name, mask in masks.items():
            by_hand.get_submodule(name).weight *= mask
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    intact = network(images)
    torch.testing.assert_close(andc.apply_masks(network, masks)(images), by_hand(images))
    assert not torch.allclose(intact, by_hand(images), atol=1e-3)


def test_masked_weights_stay_zero_through_training_and_saving(network, masks, tmp_path):
    fresh = copy.deepcopy(network)
    andc.apply_masks(network, masks)
    adamw = torch.optim.AdamW(network.parameters(), lr=0.01, weight_decay=0.1)
    images, labels = torch.randn(8, 3, 16, 16, generator=seeded()), torch.arange(8) % 5
    before = {name: weight_of(network, name) for name in masks}
    for _ in range(3):
        F.cross_entropy(network.train()(images), labels).backward()
        adamw.step()
        adamw.zero_grad()
    network.eval()
    torch.save(network.state_dict(), tmp_path / "pruned.pt")
    nothing = {name: torch.ones_like(mask) for name, mask in masks.items()}
    loaded = andc.apply_masks(fresh, nothing)  # the saved masks count, not these
    loaded.load_state_dict(torch.load(tmp_path / "pruned.pt", weights_only=True))
    for name, mask in masks.items():
        for trained in (network, loaded):
            assert (weight_of(trained, name)[~mask] == 0).all()
        assert (weight_of(network, name) - before[name])[mask].abs().median() > 0.001  # the others did learn
    assert torch.equal(loaded(images), network(images))


def test_masking_again_masks_more(network):
    name = "classifier.blocks.0.linear1"
    first, second = label_sets(128, 128, 0, 0.5), label_sets(128, 128, 1, 0.5)
    for mask in (first, second):
        andc.apply_masks(network, {name: mask})
    assert torch.equal(weight_of(network, name) != 0, first & second)


# --- removing nodes


def test_nodes_without_connections_are_removed_and_their_constant_kept(build):
    """ff1 nodes 0-9 lose their inputs, 10-19 their outputs, in encoder 1 only; the logits stay those of the masked
    network, whose layers keep their size."""
    network = build()
    masks = {
        f"classifier.blocks.{i}.{layer}": torch.rand(128, 128, generator=seeded(i)) < 0.5
        for i in (0, 1)
        for layer in ("linear1", "linear2")
    }
    masks["classifier.blocks.0.linear1"][:10] = False
    masks["classifier.blocks.0.linear2"][:, 10:20] = False
    nodes = andc.removable(masks)
    assert nodes["classifier.blocks.0"].nonzero().flatten().tolist() == list(range(20))
    assert not nodes["classifier.blocks.1"].any()
    images, size = torch.randn(4, 3, 16, 16, generator=seeded(5)), sum(p.numel() for p in network.parameters())
    with torch.no_grad():
        masked = andc.apply_masks(network, masks)(images)
        smaller = andc.compact(network, nodes)
        torch.testing.assert_close(smaller(images), masked)
        assert not torch.allclose(masked, build()(images))
    first, second = (block.linear1 for block in smaller.classifier.blocks)
    assert first.weight.shape == (108, 128) and second.weight.shape == (128, 128)
    assert sum(p.numel() for p in smaller.parameters()) == size - 20 * (128 + 1 + 128)


def test_no_node_may_be_removable(masks, network):
    full = {name: torch.ones_like(mask) for name, mask in masks.items()}
    nodes = andc.removable(full)
    assert not any(gone.any() for gone in nodes.values())
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    with torch.no_grad():
        intact = network(images)
        torch.testing.assert_close(andc.compact(andc.apply_masks(network, full), nodes)(images), intact)
    assert andc.removable({"classifier.fc": torch.zeros(5, 128, dtype=torch.bool)}) == {}


# --- filters


def test_filters_lose_whole_kernels():
    network = vgg("vgg_11x2", 5)
    pairs = andc.connections(network, "filters")
    names = [f"features.{i}" for i, module in enumerate(network.features) if isinstance(module, torch.nn.Conv2d)]
    assert list(pairs) == names[1:] and pairs[names[1]] == ("1.conv", "2.conv") and pairs[names[7]] == (
        "7.conv", "8.conv",
    )  # fmt: skip
    sizes = {f"{i}.conv": network.get_submodule(name).out_channels for i, name in enumerate(names, start=1)}
    diagonal = {name: label_sets(size, 5, size) for name, size in sizes.items()}
    masks = andc.andc_masks(diagonal, pairs)
    images = torch.randint(0, 256, (4, 3, 32, 32), generator=seeded(), dtype=torch.uint8)
    half = torch.full((3, 1, 1), 0.5)
    norms = andc.input_norms(network, masks, images, half, half)
    for control in (andc.magnitude_masks(masks, network), andc.activation_masks(masks, network, norms)):
        assert all(control[name].sum() == mask.sum() for name, mask in masks.items())
    weights, macs = andc.savings(masks, network, torch.zeros(1, 3, 32, 32))
    side = dict(zip(names, (32, 16, 8, 8, 4, 4, 2, 2), strict=True))  # pixels of a layer's own output, before pooling
    removed = {name: 9 * int((~mask).sum()) for name, mask in masks.items()}
    assert weights == sum(removed.values()) and macs == sum(removed[name] * side[name] ** 2 for name in masks)
    andc.apply_masks(network, masks)
    for name, mask in masks.items():
        kernels = network.get_submodule(name).weight.detach().flatten(2).abs().sum(dim=2)
        assert torch.equal(kernels > 0, mask)


def test_savings_of_linear_layers(masks, network):
    weights, macs = andc.savings(masks, network, torch.zeros(1, 3, 16, 16))
    lost = sum(int((~mask).sum()) for mask in masks.values())
    assert weights == lost and macs == 16 * lost
    fc = {"classifier.fc": torch.zeros(5, 128, dtype=torch.bool)}
    assert andc.savings(fc, network, torch.zeros(1, 3, 16, 16)) == (640, 640)
