"""Taps record what the equations of the block say; readouts are the optimum they claim to be."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paperlib import readouts, snp, taps
from paperlib.data import normalise
from paperlib.models import vgg

KINDS = ["stem", *taps.CCT_TAPS]
MEAN, STD = torch.tensor([0.4, 0.5, 0.6]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.25]).view(3, 1, 1)
RECIPE = readouts.ReadoutRecipe(epochs=2, batch_size=16, lr=0.1, l2=0.01, shift=1, flip=True)
PIXELS = taps.Tap(1, "pixels", "0")  # of the toy networks below: the first module's output


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(n, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def record(network, kinds, images):
    with taps.recording(network, taps.cct_taps(network, kinds)) as recorded, torch.no_grad():
        network(images)
    return dict(recorded)


def hooks_of(network):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def state_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def train(network, which, images, labels, num_labels, recipe=RECIPE, seed=0):
    lines = []
    return readouts.train_readouts(
        network, which, images, labels, num_labels, MEAN, STD, recipe, seed, log=lines.append
    )


# --- divergence


@pytest.mark.parametrize("lr", [1e4, 1e20, float("inf")])
def test_a_readout_that_diverges_is_none(network, lr, tmp_path):
    """Neither a loss of 1e20 nor fields that are not finite are kept."""
    places, images, labels = taps.cct_taps(network, ["block"]), pictures(40), torch.arange(40) % 5
    with pytest.raises(FloatingPointError, match=r"the readout of 1\.block diverged .*: lower readout_lr"):
        train(network, places, images, labels, 5, replace(RECIPE, lr=lr))


# --- taps


def test_taps_have_their_names_heads_and_shapes(build):
    network = build("cct_7_3x2")  # 256 stream nodes, 512 FF nodes, 16 tokens
    found = taps.cct_taps(network, KINDS)
    assert [tap.name for tap in found] == ["0.stem"] + [f"{i}.{kind}" for i in range(1, 8) for kind in KINDS[1:]]
    assert {tap.kind: tap.heads for tap in found if tap.heads} == {"attn": 4}
    recorded = record(network, KINDS, torch.randn(2, 3, 16, 16, generator=seeded()))
    nodes = dict.fromkeys(KINDS, 256) | {"qkv": 768, "ff1": 512}
    assert {name: value.shape for name, value in recorded.items()} == {
        tap.name: (2, 16, nodes[tap.kind]) for tap in found
    }


def test_taps_equal_the_equations_of_the_block(network):
    """From one tap to the next by hand, with nothing but the sub-modules' parameters."""
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    recorded = record(network, KINDS, images)
    close = torch.testing.assert_close

    def layer_norm(x, norm):
        centred = x - x.mean(dim=-1, keepdim=True)
        return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    def linear(x, layer):
        return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)

    with torch.no_grad():
        x = network.tokenizer(images) + network.classifier.positional_emb
        close(recorded["0.stem"], x)
        for encoder, block in enumerate(network.classifier.blocks, start=1):
            tap = {kind: recorded[f"{encoder}.{kind}"] for kind in KINDS[1:]}
            qkv = linear(layer_norm(x, block.pre_norm), block.self_attn.qkv)
            close(tap["qkv"], qkv, atol=1e-4, rtol=1e-4)
            heads = []
            for head in range(2):  # output o belongs to part o // 128 (Q, K, V) and head (o % 128) // 64
                q, k, v = (qkv[..., 128 * part + 64 * head :][..., :64] for part in range(3))
                scores = torch.stack([query @ key.T for query, key in zip(q, k, strict=True)]) / math.sqrt(64)
                heads.append(torch.stack([s.exp() / s.exp().sum(1, keepdim=True) for s in scores]) @ v)
            attn = torch.cat(heads, dim=2)
            close(tap["attn"], attn, atol=1e-4, rtol=1e-4)
            mha = linear(attn, block.self_attn.proj)
            close(tap["mha"], mha, atol=1e-4, rtol=1e-4)
            x = layer_norm(x + mha, block.norm1)
            close(tap["ff_in"], x, atol=1e-4, rtol=1e-4)
            hidden = linear(x, block.linear1)
            ff1 = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            close(tap["ff1"], ff1, atol=1e-4, rtol=1e-4)
            ff2 = linear(ff1, block.linear2)
            close(tap["ff2"], ff2, atol=1e-4, rtol=1e-4)
            x = x + ff2
            close(tap["block"], x, atol=1e-4, rtol=1e-4)


def test_taps_after_the_last_encoder_lead_to_the_logits(network):
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    recorded = record(network, ["block", "pooled", "norm", "weighed", "seqpool"], images)
    classifier = network.classifier
    assert [tap.name for tap in taps.cct_taps(network, ["weighed", "pooled"])] == ["1.pooled", "2.pooled", "2.weighed"]
    with torch.no_grad():
        torch.testing.assert_close(recorded["2.norm"], classifier.norm(recorded["2.block"]))
        torch.testing.assert_close(classifier.fc(recorded["2.weighed"].sum(dim=1)), network(images))
        torch.testing.assert_close(classifier.fc(recorded["2.seqpool"][:, 0]), network(images))
    for encoder in (1, 2):
        mean = recorded[f"{encoder}.block"].mean(dim=1, keepdim=True)
        torch.testing.assert_close(recorded[f"{encoder}.pooled"], mean)


def test_the_order_of_the_images_does_not_matter(network):
    places, images, labels = taps.cct_taps(network, ["attn", "block"]), pictures(150), torch.arange(150) % 5
    weights = train(network, places, images, labels, 5, RECIPE)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    one = readouts.measure(network, places, weights, images, labels, MEAN, STD)
    other = readouts.measure(network, places, weights, images[order], labels[order], MEAN, STD)
    for place in places:
        torch.testing.assert_close(other.class_means[place.name], one.class_means[place.name])
        assert torch.equal(other.correct[place.name], one.correct[place.name][order])


def test_a_pooled_nodes_field_matrix_has_rank_one(network):
    """Why pooled and flattened readouts are not comparable: with one position, M_k is an outer product."""
    images, labels = pictures(30), torch.arange(30) % 5
    found = taps.cct_taps(network, ["block", "pooled"])
    weights = train(network, found, images, labels, 5)
    means = readouts.measure(network, found, weights, images, labels, MEAN, STD).class_means
    ranks = {
        kind: torch.linalg.matrix_rank(snp.field_matrices(weights[f"2.{kind}"], means[f"2.{kind}"]), rtol=1e-4)
        for kind in ("block", "pooled")
    }
    assert ranks["pooled"].max() == 1 and ranks["block"].min() >= 4


def test_unknown_taps_are_refused(network, refuses):
    with refuses("unknown tap 'ff3'"):
        taps.cct_taps(network, ["block", "ff3"])


def test_nothing_is_recorded_after_the_block(network):
    images = torch.randn(1, 3, 16, 16, generator=seeded())
    with taps.recording(network, taps.cct_taps(network, KINDS)) as recorded:
        assert hooks_of(network) == 15 + 2  # and of the whole network
        network(images)
        assert len(recorded) == 15
        recorded.clear()
    network(images)
    assert not recorded and hooks_of(network) == 0


def test_no_hook_survives_an_exception(network):
    found = taps.cct_taps(network, KINDS)
    with pytest.raises(RuntimeError), taps.recording(network, found):
        network(torch.zeros(1, 3, 99, 16))  # other tokens than positions
    assert hooks_of(network) == 0
    with pytest.raises(AttributeError), taps.recording(network, [*found, taps.Tap(3, "none", "classifier.nothing")]):
        pass
    assert hooks_of(network) == 0


def test_maps_and_vectors_become_nodes():
    maps = torch.arange(2 * 3 * 4 * 5).view(2, 3, 4, 5)
    nodes = taps.as_nodes(maps, axis=1)
    assert nodes.shape == (2, 20, 3)
    for filter_, row, column in [(0, 0, 0), (2, 1, 3), (1, 3, 4)]:
        assert torch.equal(nodes[:, 5 * row + column, filter_], maps[:, filter_, row, column])
    assert torch.equal(taps.as_nodes(maps[:, :, 0, 0]), maps[:, :, 0, 0].view(2, 1, 3))
    assert torch.equal(taps.as_nodes(maps[:, 0]), maps[:, 0])


def test_of_a_module_that_answers_with_a_tuple_the_first_is_recorded():
    network = nn.TransformerEncoderLayer(8, 2, batch_first=True).eval()
    x = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    with taps.recording(network, [taps.Tap(1, "attention", "self_attn")]) as recorded:
        network.train()(x)  # in evaluation mode torch takes a fast path without calling sub-modules
    assert recorded["1.attention"].shape == (3, 5, 8)


def test_activations_come_in_order_and_without_dropout(build):
    network = build(attention_dropout=0.5)
    images, found = pictures(7), taps.cct_taps(network, ["attn", "block"])
    batches = list(taps.activations(network.train(), found, images, MEAN, STD, batch_size=3))
    assert [len(batch["1.attn"]) for batch in batches] == [3, 3, 1]
    expected = record(network.eval(), ["attn", "block"], (images.float() / 255 - MEAN) / STD)
    for name, value in expected.items():
        joined = torch.cat([batch[name] for batch in batches])
        torch.testing.assert_close(joined, value, atol=1e-4, rtol=1e-4)
        assert joined.dtype == torch.float32 and not joined.requires_grad


def test_one_batch_of_activations_is_in_memory_at_a_time(build, monkeypatch):
    network, seen, passes = build(), [], []
    found = taps.cct_taps(network, ["attn", "block"])
    weights = {tap.name: torch.randn(3, 16, 128, generator=seeded()) for tap in found}

    def watched(*arguments):
        for batch in taps.activations(*arguments):
            seen.extend(weakref.ref(value) for value in batch.values())
            yield batch

    def before(module, inputs):
        passes.append([ref() for ref in seen])

    network.register_forward_pre_hook(before)
    monkeypatch.setattr(readouts, "activations", watched)
    monkeypatch.setattr(readouts, "BATCH", 3)
    readouts.measure(network, found, weights, pictures(7), torch.arange(7) % 3, MEAN, STD)
    assert len(passes) == 3 and len(passes[2]) == 2 * 2 * 2  # two batches, two taps of two encoders
    assert all(value is None for each in passes for value in each)


# --- fields of heads


def test_head_fields_are_the_readout_split_among_heads():
    activations = torch.randn(6, 5, 8, generator=seeded(), dtype=torch.float64)
    weight = torch.randn(3, 5, 8, generator=seeded(1), dtype=torch.float64)
    fields = readouts.head_fields(activations, weight, 4)
    assert fields.shape == (6, 4, 3)
    torch.testing.assert_close(fields.sum(dim=1), activations.flatten(1) @ weight.flatten(1).T)
    for head in range(4):
        silenced = torch.zeros_like(weight)
        silenced[:, :, [2 * head, 2 * head + 1]] = weight[:, :, [2 * head, 2 * head + 1]]
        torch.testing.assert_close(fields[:, head], activations.flatten(1) @ silenced.flatten(1).T)


# --- measuring


def test_measuring_equals_all_images_at_once(network):
    """300 images of 5 unbalanced labels, in two batches."""
    images = pictures(300)
    labels = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4])[torch.randint(0, 8, (300,), generator=seeded())]
    found = taps.cct_taps(network, ["attn", "block"])
    recorded = record(network, ["attn", "block"], normalise(images, MEAN, STD))
    weights = {name: torch.randn(5, *value.shape[1:], generator=seeded()) for name, value in recorded.items()}
    measured = readouts.measure(network.train(), found, weights, images, labels, MEAN, STD)
    assert measured.class_means.keys() == measured.correct.keys() == weights.keys()
    assert measured.head_correct.keys() == {"1.attn", "2.attn"}
    for name, value in recorded.items():
        expected = snp.class_means(value, labels, 5)
        torch.testing.assert_close(measured.class_means[name], expected, atol=1e-4, rtol=1e-4)
        fields = torch.einsum("ntd,ltd->nl", value, weights[name])
        assert (measured.correct[name] == (fields.argmax(dim=1) == labels)).double().mean() > 0.99  # rounding
        assert 0 < measured.correct[name].sum() < 300
    for name, correct in measured.head_correct.items():
        assert correct.shape == (300, 2)
        for head, nodes in enumerate((slice(0, 64), slice(64, 128))):
            fields = torch.einsum("ntd,ltd->nl", recorded[name][..., nodes], weights[name][..., nodes])
            assert (correct[:, head] == (fields.argmax(dim=1) == labels)).double().mean() > 0.99


def test_measuring_needs_every_label(network, refuses):
    found = taps.cct_taps(network, ["block"])
    weights = {tap.name: torch.zeros(3, 16, 128) for tap in found}
    with refuses("label 1 "):
        readouts.measure(network, found, weights, pictures(4), torch.tensor([0, 2, 2, 0]), MEAN, STD)


# --- training


def colours(n, size=4):
    """Three labels that a linear readout tells apart: the brightest channel."""
    labels = torch.arange(n) % 3
    images = torch.randint(0, 120, (n, 3, size, size), generator=seeded(), dtype=torch.uint8)
    images[torch.arange(n), labels] += 120
    return images, labels


def test_readouts_learn_colours():
    network = nn.Sequential(nn.Identity())
    images, labels = colours(60)
    weights = train(network, [PIXELS], images, labels, 3, replace(RECIPE, epochs=20))
    assert weights["1.pixels"].shape == (3, 16, 3) and not weights["1.pixels"].requires_grad
    fresh, fresh_labels = colours(90)
    measured = readouts.measure(network, [PIXELS], weights, fresh, fresh_labels, MEAN, STD)
    assert measured.correct["1.pixels"].all()


def test_readouts_leave_the_network_alone():
    """A network in training mode, with running statistics and dropout, and gradients from before."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    network(torch.randn(4, 3, 4, 4)).sum().backward()
    before, gradient = state_of(network), network[0].weight.grad.clone()
    images, labels = colours(40)
    train(network, [PIXELS, taps.Tap(2, "norm", "1")], images, labels, 3)
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(network[0].weight.grad, gradient)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert hooks_of(network) == 0


def optimum(features, labels, num_labels, l2):
    """Minimum of mean cross-entropy + l2/2 |W|^2 in double precision, and the objective itself."""

    def objective(weight):
        return F.cross_entropy(features @ weight.flatten(1).T, labels) + l2 / 2 * weight.square().sum()

    weight = torch.zeros(num_labels, features.shape[1], dtype=torch.float64, requires_grad=True)
    lbfgs = torch.optim.LBFGS(
        [weight], max_iter=2000, tolerance_grad=1e-9, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        lbfgs.zero_grad()
        loss = objective(weight)
        loss.backward()
        return loss

    lbfgs.step(closure)
    assert weight.grad.abs().max() < 1e-7
    return weight.detach(), objective


@pytest.mark.parametrize("l2", [0.3, 0.01])
@pytest.mark.parametrize(
    "batch_size, epochs, excess, distance", [(48, 600, 1e-5, 0.01), (16, 300, 1e-4, 0.02)], ids=["whole", "batches"]
)
def test_readouts_reach_the_optimum(l2, batch_size, epochs, excess, distance):
    """48 features of 48 images with noisy labels, at two scales 1000 apart.

    Tolerances: `excess` over the minimum of the objective (0.57 or 0.17, about 1.3 at the start) and relative
    `distance` of the weights; batches of 16 add noise, which the falling learning rate averages out.
    """
    images, labels = colours(48)
    labels = torch.where(torch.rand(48, generator=seeded(1)) < 0.3, labels.roll(1), labels)
    network = nn.Sequential(nn.Identity(), nn.Conv2d(3, 3, 1, bias=False))
    network[1].weight.data = 1000 * torch.eye(3).view(3, 3, 1, 1)
    which = [PIXELS, taps.Tap(2, "scaled", "1")]
    recipe = readouts.ReadoutRecipe(epochs, batch_size, lr=0.2, l2=l2, shift=0, flip=False)
    weights = train(network, which, images, labels, 3, recipe)

    pixels = (images.double() / 255 - MEAN) / STD
    nodes = pixels.flatten(2).transpose(1, 2).flatten(1)  # position by position, as the readout sees them
    scale = nodes.square().mean().sqrt()
    best, objective = optimum(nodes / scale, labels, 3, l2)
    minimum = objective(best).item()
    for name, factor in (("1.pixels", 1), ("2.scaled", 1000)):
        found = weights[name].double().flatten(1) * scale * factor  # of the activations divided by their RMS
        assert -1e-9 < objective(found).item() - minimum < excess
        assert (found - best).norm() / best.norm() < distance


def test_every_tap_may_have_its_own_penalty():
    """Twins of one tap: what one pass trains with two penalties is what two passes train; the RMS is handed over."""
    images, labels = colours(48)
    network, seen = nn.Sequential(nn.Identity()), {}
    twins = [replace(PIXELS, kind=f"pixels@{value}") for value in ("0.3", "0.01")]

    def penalty(name, scale):
        seen[name] = scale
        return float(name.partition("@")[2])

    both = readouts.train_readouts(
        network, twins, images, labels, 3, MEAN, STD, RECIPE, 0, lambda line: None, penalty=penalty
    )
    rms = normalise(images, MEAN, STD).square().mean().sqrt().item()
    assert list(seen.values()) == pytest.approx([rms, rms])
    for twin, l2 in zip(twins, (0.3, 0.01), strict=True):
        alone = train(network, [twin], images, labels, 3, replace(RECIPE, l2=l2))
        torch.testing.assert_close(both[twin.name], alone[twin.name])
    assert both[twins[0].name].norm() < both[twins[1].name].norm()


def test_lengths_of_one_pass_are_trainings_of_their_own(network, tmp_path, monkeypatch):
    """Each with its whole decay, bit for bit, none going on after its end; also when it was stopped in between."""
    found, images, labels = taps.cct_taps(network, ["attn", "block"])[-3:], pictures(20), torch.arange(20) % 5

    def trained(log=lambda line: None, lengths=(1, 2, 4), checkpoint=None):
        return readouts.train_readouts(
            network, found, images, labels, 5, MEAN, STD, RECIPE, 0, log, None, checkpoint, lengths
        )

    def stops(line):
        if "epoch 3/4" in line:
            raise KeyboardInterrupt

    together = trained()
    assert list(together) == [f"{tap.name}@{length}" for tap in found for length in (1, 2, 4)]
    for length in (1, 2, 4):
        alone = train(network, found, images, labels, 5, replace(RECIPE, epochs=length))
        assert all(torch.equal(together[f"{tap.name}@{length}"], alone[tap.name]) for tap in found)
    monkeypatch.setattr(readouts, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        trained(stops, checkpoint=tmp_path / "readouts.pt")
    resumed = trained(checkpoint=tmp_path / "readouts.pt")
    assert all(torch.equal(resumed[name], together[name]) for name in together)
    with pytest.raises(ValueError, match="for other taps"):
        trained(lengths=(1, 4), checkpoint=tmp_path / "readouts.pt")


def test_stopped_readouts_end_as_if_nothing_had_happened(network, tmp_path, monkeypatch):
    """Also where another machine goes on that would have begun in another precision; and nothing is left to hold."""
    found, images, labels = taps.cct_taps(network, ["attn", "block"]), pictures(20), torch.arange(20) % 5
    recipe, said = replace(RECIPE, epochs=5, precision="auto"), []

    def stops(line):
        said.append(line)
        if len(said) == 4:
            raise KeyboardInterrupt

    def trained(log, checkpoint=tmp_path / "readouts.pt", recipe=recipe, images=images):
        return readouts.train_readouts(
            network, found, images, labels, 5, MEAN, STD, recipe, 0, log, lambda name, scale: scale, checkpoint
        )

    monkeypatch.setattr(readouts, "in_bf16", lambda precision, device: precision == "auto")
    whole = trained(said.append, None)
    assert not (tmp_path / "readouts.pt").exists() and len(said) == 5
    said.clear()
    monkeypatch.setattr(readouts, "SAVE_SECONDS", 0)
    with pytest.raises(KeyboardInterrupt):
        trained(stops)
    monkeypatch.setattr(readouts, "in_bf16", lambda precision, device: False)
    resumed = trained(said.append)
    assert said[4:] == ["readouts, resuming after epoch 4/5", said[-1]] and "epoch 5/5" in said[-1]
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    for other in (replace(recipe, lr=0.2), replace(recipe, epochs=6)):
        with pytest.raises(ValueError, match=r"readouts\.pt.*another recipe.*delete it"):
            trained(said.append, recipe=other)
    with pytest.raises(ValueError, match=r"readouts\.pt.*other.* images.*delete it"):
        trained(said.append, images=255 - images)
    (tmp_path / "readouts.pt").write_bytes((tmp_path / "readouts.pt").read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"readouts\.pt.*delete it"):
        trained(said.append)


def test_a_silent_tap_gives_finite_weights():
    network = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False))
    nn.init.zeros_(network[0].weight)
    images, labels = colours(20)
    assert train(network, [PIXELS], images, labels, 3)["1.pixels"].isfinite().all()


def test_readouts_follow_their_seed_only(network):
    found, images, labels = taps.cct_taps(network, ["attn", "block"]), pictures(20), torch.arange(20) % 5
    before = torch.get_rng_state()
    first, again, other = (train(network, found, images, labels, 5, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.keys() == {"1.attn", "1.block", "2.attn", "2.block"}
    for name, weight in first.items():
        assert weight.shape == (5, 16, 128)
        assert torch.equal(again[name], weight) and not torch.equal(other[name], weight)


def test_a_readout_does_not_depend_on_the_others(network):
    images, labels = pictures(20), torch.arange(20) % 5
    together = train(network, taps.cct_taps(network, ["attn", "block"]), images, labels, 5)
    alone = train(network, taps.cct_taps(network, ["block"]), images, labels, 5)
    for name, weight in alone.items():
        torch.testing.assert_close(together[name], weight, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("max_steps, steps", [(0, 3), (1, 1), (2, 2), (50, 3)])
def test_max_steps_shortens_an_epoch(max_steps, steps):
    images, labels = colours(40)
    sizes = []
    network = nn.Sequential(nn.Identity())
    network.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    train(network, [PIXELS], images, labels, 3, replace(RECIPE, max_steps=max_steps))
    assert sizes[-2 * steps :] == [16, 16, 8][:steps] * 2
    assert sum(sizes[: -2 * steps]) <= 41  # before: one pass for the scale, one image for the shapes


# --- filters


def test_cnn_taps_are_the_layers_after_activation_and_pooling():
    network = vgg("vgg_11x4", 5).eval()
    places = taps.places(network, ["anything"])
    assert [place.name for place in places] == [f"{layer}.conv" for layer in range(1, 9)]
    images = torch.randn(2, 3, 32, 32, generator=seeded())
    with taps.recording(network, places) as recorded, torch.no_grad():
        logits = network(images)
    with torch.no_grad():
        x, outputs = images, []
        for module in network.features:
            if isinstance(module, nn.Conv2d) and x is not images:
                outputs.append(x)
            x = module(x)
        outputs.append(x)
    for place, expected in zip(places, outputs, strict=True):
        assert torch.equal(recorded[place.name], expected.flatten(2).transpose(1, 2))
    assert [recorded[place.name].shape[1] for place in places] == [256, 64, 64, 16, 16, 4, 4, 4]
    torch.testing.assert_close(network.fc(recorded["8.conv"].mean(dim=1)), logits)


def test_filters_of_a_hand_made_layer_give_the_known_matrix():
    """Two labels: bright and dark pictures. Filter 0 answers to brightness, filter 1 to darkness; a readout that hears
    filter 0 for label 0 and filter 1 for label 1 gives one cluster each, and no noise."""
    network = nn.Sequential(nn.Conv2d(3, 2, 1), nn.ReLU(), nn.MaxPool2d(2))
    with torch.no_grad():
        network[0].weight[0], network[0].weight[1] = 1 / 3, -1 / 3
        network[0].bias[:] = 0
    images = torch.tensor([250, 240, 10, 0], dtype=torch.uint8).view(4, 1, 1, 1).expand(4, 3, 4, 4).contiguous()
    labels, place = torch.tensor([0, 0, 1, 1]), taps.Tap(1, "conv", "2")
    weight = torch.zeros(2, 4, 2)
    weight[0, :, 0] = weight[1, :, 1] = 1.0
    zero, one = torch.full((3, 1, 1), 0.5), torch.ones(3, 1, 1)
    measured = readouts.measure(network, [place], {"1.conv": weight}, images, labels, zero, one)
    assert measured.correct["1.conv"].all()
    fields = snp.field_matrices(weight, measured.class_means["1.conv"])
    bright, dark = 4 * (245 / 255 - 0.5), 4 * (0.5 - 5 / 255)  # four pixels after the pooling
    expected = torch.tensor([[[bright, 0], [0, 0]], [[0, 0], [0, dark]]])
    torch.testing.assert_close(fields, expected)
    statistics = snp.tap_statistics(snp.boolean_matrices(fields))
    assert statistics.clusters_per_node == statistics.labels_per_node == 1 and statistics.noise == 0


@pytest.mark.parametrize("gap", [5.0, 60.0, 95.0])
def test_gradients_are_those_of_autograd_without_denormal_numbers(gap):
    """Probabilities of e^-95 are denormal: products with them are slow, and what they add is nothing."""
    weight = torch.tensor([[gap, 0.0], [0.0, gap], [0.0, 0.0]])
    weight.grad = torch.empty_like(weight)
    features, labels = torch.eye(2), torch.tensor([0, 2])
    loss = readouts._gradient(weight, features, 1.0, labels)
    exact = weight.double().requires_grad_()
    expected = F.cross_entropy(features.double() @ exact.T, labels)
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach())
    torch.testing.assert_close(weight.grad.double(), exact.grad, rtol=1e-5, atol=1e-8)
    small = weight.grad[(weight.grad != 0) & (weight.grad.abs() < torch.finfo(torch.float32).tiny)]
    assert len(small) == 0
