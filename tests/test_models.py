"""The architecture, against the published parameter counts, another implementation and its own equations."""

import math

import pytest
import torch
import torchvision
import vit_pytorch.cct as peer
from torch import nn

from paperlib.models import build as build_network
from paperlib.models import cct, vgg
from paperlib.models.cct import (
    POSITIONAL_EMBEDDINGS,
    EncoderBlock,
    Tokenizer,
    attention,
    attention_map,
    drop_path,
    random_tokens,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def positions_of(network):
    return network.classifier.positional_emb


@pytest.mark.parametrize(
    "name, image_size, labels, parameters",
    [
        ("cct_2_3x2", 32, 10, 283_723),
        ("cct_7_3x2", 32, 10, 3_853_259),
        ("cct_7_3x1", 32, 10, 3_760_139),
        ("cct_7_3x1", 32, 100, 3_783_269),
        ("cct_7_7x2", 224, 102, 4_573_735),
    ],
)
def test_parameter_counts(name, image_size, labels, parameters):
    network = cct(name, num_classes=labels, image_size=image_size)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


@pytest.mark.parametrize(
    "name, blocks, width, heads, ff",
    [
        ("cct_4_3x1", 4, 128, 2, 128),
        ("cct_6_3x1", 6, 256, 4, 512),
        ("cct_7_3x1", 7, 256, 4, 512),
        ("cct_14_3x1", 14, 384, 6, 1152),
    ],
)
def test_sizes(name, blocks, width, heads, ff):
    classifier = cct(name, num_classes=2, image_size=8).classifier
    assert len(classifier.blocks) == blocks
    for block in classifier.blocks:
        assert block.self_attn.heads == heads
        assert block.linear1.weight.shape == (ff, width)


# --- against the other implementation


@pytest.mark.parametrize("positional_embedding", POSITIONAL_EMBEDDINGS)
@pytest.mark.parametrize("name, image_size", [("cct_2_3x2", 16), ("cct_2_7x1", 20), ("cct_7_3x1", 8)])
def test_logits_equal_the_peers(name, image_size, positional_embedding, build):
    ours = build(name, image_size=image_size, positional_embedding=positional_embedding)
    blocks, kernel, convs = (int(number) for number in name.removeprefix("cct_").replace("x", "_").split("_"))
    theirs = getattr(peer, f"cct_{blocks}")(
        img_size=image_size,
        kernel_size=kernel,
        n_conv_layers=convs,
        num_classes=5,
        positional_embedding=positional_embedding,
    ).eval()
    theirs.load_state_dict(ours.state_dict())  # strict: the same names and shapes
    images = torch.randn(3, 3, image_size, image_size, generator=seeded())
    with torch.no_grad():
        logits = ours(images)
        torch.testing.assert_close(logits, theirs(images), atol=1e-4, rtol=1e-4)
    assert logits.std(dim=0).min() > 0.01  # the images do make a difference


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pooling_before_the_relu_changes_no_bit(dtype):
    """The reference pools after its ReLU; with many ties, as bf16 has them, tokens and gradients are still the same."""
    pool, relu, results = nn.MaxPool2d(3, stride=2, padding=1), nn.ReLU(), []
    images = torch.randn(2, 8, 16, 16, generator=seeded()).to(dtype).round(decimals=1)
    for order in ((relu, pool), (pool, relu)):
        x = images.clone().requires_grad_()
        y = nn.Sequential(*order)(x)
        y.backward(torch.randn(y.shape, generator=seeded()).to(dtype))
        results.append((y.detach(), x.grad))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True)) and (images == 0).sum() > 50
    assert [type(layer) for layer in Tokenizer(3, 1, 8).conv_layers[0]] == [nn.Conv2d, nn.MaxPool2d, nn.ReLU]


def test_heads_change_the_computation_not_the_size(build):
    two, eight = build(), build(heads=8)
    eight.load_state_dict(two.state_dict())
    images = torch.randn(2, 3, 16, 16, generator=seeded())
    assert not torch.allclose(two(images), eight(images), atol=1e-3)


# --- attention


def test_attention_by_hand():
    """Two tokens, two dimensions, one head: softmax of q k / sqrt(2), then a mean of v."""
    q, k = torch.tensor([[[[2.0, 0.0], [0.0, 0.0]]]]), torch.tensor([[[[1.0, 5.0], [0.0, -3.0]]]])
    v = torch.tensor([[[[1.0, 10.0], [3.0, 20.0]]]])
    p = 1 / (1 + math.exp(-2 / math.sqrt(2)))
    expected = torch.tensor([[[[p + 3 * (1 - p), 10 * p + 20 * (1 - p)], [2.0, 15.0]]]])
    for fused in (True, False):
        torch.testing.assert_close(attention(q, k, v, fused=fused), expected)
    torch.testing.assert_close(attention_map(q, k), torch.tensor([[[[p, 1 - p], [0.5, 0.5]]]]))


def test_fused_attention_equals_the_written_out_one():
    q, k, v = torch.randn(3, 2, 3, 5, 4, generator=seeded(), dtype=torch.float64).mul(2).unbind()
    weights = torch.randn(2, 3, 5, 4, generator=seeded(1), dtype=torch.float64)
    results = []
    for fused in (True, False):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attention(*inputs, fused=fused)
        results.append([output.detach(), *torch.autograd.grad((output * weights).sum(), inputs)])
    for fused, explicit in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit)
        assert fused.abs().max() > 0.01
    torch.testing.assert_close(attention_map(q, k) @ v, results[0][0])
    torch.testing.assert_close(attention_map(q, k).sum(dim=-1), torch.ones(2, 3, 5).double())


@pytest.mark.parametrize("fused", [True, False])
def test_attention_dropout_keeps_the_expectation(fused):
    q, v = torch.zeros(1, 1, 4000, 8), torch.ones(1, 1, 4000, 8)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dropped = attention(q[:, :, :50], q, v, dropout=0.5, fused=fused)
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    assert dropped.std().item() > 0.005  # and does drop


# --- positions


def test_sine_positions_are_fixed_sines():
    network = cct("cct_2_3x2", num_classes=5, image_size=16, positional_embedding="sine")
    positions = positions_of(network)
    assert positions.shape == (1, 16, 128) and not positions.requires_grad
    for token in (0, 1, 7, 15):
        for channel in (0, 1, 2, 63, 126, 127):
            angle = token / 10000 ** (2 * (channel // 2) / 128)
            expected = math.cos(angle) if channel % 2 else math.sin(angle)
            assert positions[0, token, channel].item() == pytest.approx(expected, abs=1e-5)
    network(torch.randn(2, 3, 16, 16, generator=seeded())).sum().backward()
    assert positions.grad is None


@pytest.mark.parametrize("positional_embedding", POSITIONAL_EMBEDDINGS)
def test_only_positions_tell_tokens_apart(positional_embedding, build):
    network = build(positional_embedding=positional_embedding)
    with torch.no_grad():
        tokens = network.tokenizer(torch.randn(2, 3, 16, 16, generator=seeded()))
        logits, shuffled = (network.classifier(t) for t in (tokens, tokens[:, torch.randperm(16, generator=seeded())]))
    assert torch.allclose(logits, shuffled, atol=1e-4) == (positional_embedding == "none")
    trained = [name for name, parameter in network.named_parameters() if parameter.requires_grad]
    assert ("classifier.positional_emb" in trained) == (positional_embedding == "learnable")


@pytest.mark.parametrize("name", ["cct_2_3x1", "cct_2_3x2", "cct_2_7x2", "cct_2_5x3", "cct_2_1x1", "cct_2_4x2"])
@pytest.mark.parametrize("image_size", [15, 16, 33])
def test_positions_fit_the_tokens(name, image_size):
    network = cct(name, num_classes=2, image_size=image_size)
    tokens = network.tokenizer(torch.zeros(1, 3, image_size, image_size)).shape[1]
    assert positions_of(network).shape[1] == tokens


# --- what cannot be built


@pytest.mark.parametrize(
    "name", ["cct", "cct_3_3x2", "cct_7_3", "cct_7_0x2", "cct_7_3x0", "vit_7_3x2", "cct_7_3x2_sine"]
)
def test_unknown_models_are_refused(name, refuses):
    with refuses("unknown model"):
        cct(name, num_classes=5)


@pytest.mark.parametrize("heads", [3, 256, -2])
def test_heads_that_do_not_fit_are_refused(heads, refuses):
    with refuses("heads"):
        cct("cct_2_3x2", num_classes=5, heads=heads)


@pytest.mark.parametrize("positional_embedding", ["sin", "", None])
def test_unknown_positions_are_refused(positional_embedding, refuses):
    with refuses("positional_embedding"):
        cct("cct_2_3x2", num_classes=5, positional_embedding=positional_embedding)


# --- initial weights


def test_initial_weights():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = cct("cct_7_3x2", num_classes=100, image_size=32)
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            spread = 4 * 0.02 / (2 * module.weight.numel()) ** 0.5  # 4 standard errors
            assert module.weight.std().item() == pytest.approx(0.02, abs=spread)
            assert abs(module.weight.mean().item()) < 2 * spread
            assert module.bias is None or not module.bias.any()
        elif isinstance(module, torch.nn.LayerNorm):
            assert (module.weight == 1).all() and not module.bias.any()
        elif isinstance(module, torch.nn.Conv2d):
            assert module.bias is None
            inputs = module.in_channels * 9
            assert module.weight.std().item() == pytest.approx((2 / inputs) ** 0.5, rel=0.05)
    assert positions_of(network).std().item() == pytest.approx(0.2, rel=0.03)
    assert not any(block.self_attn.qkv.bias is not None for block in network.classifier.blocks)


# --- stochastic depth


def test_drop_path_keeps_the_expectation():
    branch = torch.rand(4000, 2, 3, generator=seeded()) + 1
    with torch.random.fork_rng():
        torch.manual_seed(0)
        ratio = drop_path(branch, 0.25) / branch
    whole = ratio[:, :1, :1]
    torch.testing.assert_close(ratio, whole.expand_as(ratio))  # an image loses all of the branch or nothing
    kept = whole.flatten() > 0
    torch.testing.assert_close(whole.flatten()[kept], torch.full((int(kept.sum()),), 1 / 0.75))
    assert kept.double().mean().item() == pytest.approx(0.75, abs=5 * (0.25 * 0.75 / 4000) ** 0.5)
    assert torch.equal(drop_path(branch, 0.0), branch)


def test_both_branches_can_be_dropped():
    """With a rate of almost 1, training leaves the normalised residual stream alone; evaluation drops nothing."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rates = {rate: EncoderBlock(8, 2, 16, 0.0, rate) for rate in (0.0, 1 - 1e-6)}
    always, dropped = rates.values()
    dropped.load_state_dict(always.state_dict())
    x = torch.randn(3, 4, 8, generator=seeded())
    torch.testing.assert_close(dropped.train()(x), dropped.norm1(x))
    assert torch.equal(dropped.eval()(x), always(x))
    assert not torch.allclose(always(x), always.norm1(x), atol=1e-4)


def test_depth_raises_the_rate_from_zero():
    rates = [block.drop_path for block in cct("cct_7_3x1", num_classes=2, image_size=8).classifier.blocks]
    assert rates == pytest.approx([0.1 * i / 6 for i in range(7)])
    rates = [b.drop_path for b in cct("cct_2_3x1", num_classes=2, image_size=8, stochastic_depth=0.4).classifier.blocks]
    assert rates == pytest.approx([0, 0.4])


def test_dropout_is_off_in_evaluation(build):
    network = build(attention_dropout=0.5, stochastic_depth=0.5)
    images = torch.randn(4, 3, 16, 16, generator=seeded())
    assert torch.equal(network(images), network(images))
    assert torch.equal(network(images), build(attention_dropout=0, stochastic_depth=0)(images))
    network.train()
    assert not torch.allclose(network(images), network(images), atol=1e-3)


# --- fewer tokens in training


def test_random_tokens_are_some_of_each_images_own():
    tokens = torch.arange(6 * 10).view(6, 10, 1).expand(-1, -1, 4).float()
    kept = random_tokens(tokens, 0.3)
    assert kept.shape == (6, 3, 4) and (kept == kept[:, :, :1]).all()
    for image, some in zip(tokens, kept, strict=True):
        assert len(set(some[:, 0].tolist())) == 3 and set(some[:, 0].tolist()) <= set(image[:, 0].tolist())
    assert len({tuple((some[:, 0] % 10).sort().values.tolist()) for some in kept}) > 1  # each image its own


def test_all_tokens_are_seen_in_evaluation(network):
    images = torch.randn(3, 3, 16, 16)
    expected = network(images)
    network.classifier.token_share = 0.5
    torch.testing.assert_close(network(images), expected)
    assert not torch.allclose(network.train()(images), expected)


# --- the CNN


@pytest.mark.parametrize(("name", "peer_name"), [("vgg_11x64", "vgg11_bn"), ("vgg_16x64", "vgg16_bn")])
def test_vgg_has_torchvisions_layers(name, peer_name):
    ours, theirs = vgg(name, 10), torchvision.models.get_model(peer_name, num_classes=10)
    shapes = [[tuple(p.shape) for p in network.features.parameters()] for network in (ours, theirs)]
    assert shapes[0] == shapes[1]
    ours.features.load_state_dict(theirs.features.state_dict())
    images = torch.randn(2, 3, 64, 64)
    last_but_pooling = theirs.eval().features[:-1]
    expected = ours.fc(last_but_pooling(images).mean(dim=(2, 3)))
    torch.testing.assert_close(ours.eval()(images), expected)


def test_vgg_scales_its_filters():
    network = build_network("vgg_11x16", 7, 32, heads=3)
    assert [layer.out_channels for layer in network.features if isinstance(layer, torch.nn.Conv2d)] == [
        16, 32, 64, 64, 128, 128, 128, 128,
    ]  # fmt: skip
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 7)


@pytest.mark.parametrize("name", ["vgg_12x64", "vgg_11", "vgg_11x0", "vgg11_bn"])
def test_unknown_vggs_are_refused(name, refuses):
    with refuses(name):
        build_network(name, 10, 32)
