"""Taps of networks that nobody here wrote: each layout is read as it is meant, or refused with a sentence."""

import pytest
import torch
from torch import Tensor, nn

from paperlib import taps
from paperlib.taps import Tap


def record(network, tap, x, **options):
    network.eval()
    with torch.no_grad(), taps.recording(network, [tap]) as recorded:
        network(x, **options)
    return recorded[tap.name]


class ChannelsLast(nn.Module):
    """Maps (n, h, w, D), as Swin and ConvNeXt have them inside."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(5)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize(
    ("network", "module", "shape", "expected"),
    [
        (nn.Sequential(nn.Conv2d(3, 5, 1)), "0", (2, 3, 4, 4), (2, 16, 5)),
        (nn.Sequential(nn.Conv2d(3, 4, 1)), "0", (2, 3, 4, 4), (2, 16, 4)),  # as many filters as pixels a side
        (nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()), "1", (2, 3, 4, 4), (2, 16, 5)),
        (nn.Sequential(nn.Sequential(nn.ReLU(), nn.Conv2d(3, 4, 1))), "0", (2, 3, 4, 4), (2, 16, 4)),
        (ChannelsLast(), "norm", (2, 5, 7, 7), (2, 49, 5)),
        (nn.Sequential(nn.Conv1d(3, 5, 1)), "0", (2, 3, 9), (2, 9, 5)),
        (nn.Sequential(nn.Linear(3, 5)), "0", (2, 9, 3), (2, 9, 5)),
        (nn.Sequential(nn.Linear(3, 5)), "0", (2, 3), (2, 1, 5)),
    ],
    ids=["maps", "square", "by shape", "by last layer", "channels last", "conv1d", "tokens", "vectors"],
)
def test_nodes_are_what_the_layer_calls_channels(network, module, shape, expected):
    found = record(network, Tap(1, "x", module), torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    assert found.shape == expected


def test_every_position_of_every_node_is_where_it_belongs():
    x = torch.randn(2, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    network = ChannelsLast()
    first, last = record(nn.Sequential(nn.ReLU()), Tap(1, "x", "0"), x), record(network, Tap(1, "x", "norm"), x)
    for node, row, column in ((0, 0, 0), (4, 6, 2), (2, 3, 5)):
        assert torch.equal(first[:, 7 * row + column, node], x[:, node, row, column].relu())
        assert torch.allclose(last[:, 7 * row + column, node], network(x)[:, row, column, node])


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 4, 4, 4)], ids=["oblong", "cube"])
def test_a_layout_of_two_readings_is_refused_until_it_is_told(shape, refuses):
    network, x = nn.Sequential(nn.ReLU()), torch.rand(shape)
    with refuses(f"{shape[1]} nodes or {shape[3]}: say which with axis=1 or axis=3"):
        record(network, Tap(1, "x", "0"), x)
    assert record(network, Tap(1, "x", "0", axis=3), x).shape == (2, shape[1] * shape[2], shape[3])


def test_a_layer_that_overwrites_what_was_tapped_is_noticed(refuses):
    """torchvision's networks are full of ReLU(inplace=True): their batch norms cannot be tapped."""
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.BatchNorm2d(5), nn.ReLU(inplace=True))
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    with refuses("1.norm: a later layer overwrites the output of 1 in place"):
        record(network, Tap(1, "norm", "1"), x)
    assert record(network, Tap(1, "relu", "2"), x).min() == 0
    network[2].inplace = False
    assert record(network, Tap(1, "norm", "1"), x).min() < 0


class Shared(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.never = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.layer(x))


def test_a_module_that_is_called_twice_says_so_until_it_is_told_which(refuses):
    network, x = Shared(), torch.randn(2, 3)
    with refuses("called several times in one pass: say which with call=0"):
        record(network, Tap(1, "x", "layer"), x)
    first, second = (record(network, Tap(1, "x", "layer", call=call), x)[:, 0] for call in (0, 1))
    assert torch.equal(first, network.layer(x)) and torch.equal(second, network.layer(first))


def test_a_module_that_is_never_called_is_named(refuses):
    with refuses("1.x: never is not called in a pass"):
        record(Shared(), Tap(1, "x", "never"), torch.randn(2, 3))


def test_a_pass_that_failed_does_not_spoil_the_next():
    network, x = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), torch.randn(2, 3)
    with torch.no_grad(), taps.recording(network, [Tap(1, "x", "0")]) as recorded:
        network[1].in_features, weight = 4, network[1].weight
        network[1].weight = nn.Parameter(torch.zeros(2, 4))
        with pytest.raises(RuntimeError):
            network(x)
        network[1].weight = weight
        network(x)
    assert recorded["1.x"].shape == (2, 1, 5)


def test_positions_before_images_are_told_by_batch_axis(refuses):
    x = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(0))

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.transpose(0, 1)).transpose(0, 1)

    with refuses("2 entries for 9 images: say where images lie with batch_axis"):
        record(Turned(), Tap(1, "x", "layer"), x)
    turned = Turned()
    found = record(turned, Tap(1, "x", "layer", batch_axis=1), x)
    assert torch.equal(found, turned(x))


class Answers(nn.Module):
    """A block whose output is whatever it is told."""

    def __init__(self, how):
        super().__init__()
        self.block, self.how = Inner(how), how

    def forward(self, x: Tensor) -> Tensor:
        self.block(x)
        return x


class Inner(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor):
        return self.how(x)


@pytest.mark.parametrize(
    "how",
    [
        lambda x: (2 * x, None), lambda x: [2 * x], lambda x: {"last_hidden_state": 2 * x, "other": x},
        lambda x: {"x": 2 * x},
    ],
    ids=["tuple", "list", "model output", "dictionary"],
)  # fmt: skip
def test_the_tensor_of_an_answer_is_found(how):
    x = torch.randn(2, 4, 3)
    assert torch.equal(record(Answers(how), Tap(1, "x", "block"), x), 2 * x)


@pytest.mark.parametrize(
    "how", [lambda x: {"a": x, "b": x}, lambda x: "text", lambda x: None], ids=["two", "text", "none"]
)
def test_an_answer_without_a_tensor_is_named(how, refuses):
    with refuses("1.x: block gives no tensor"):
        record(Answers(how), Tap(1, "x", "block"), torch.randn(2, 4, 3))


def test_a_network_that_takes_positions_first():
    layer = nn.TransformerEncoderLayer(8, 2, 16)  # (T, n, D)
    network, x = nn.Sequential(layer), torch.randn(9, 2, 8, generator=torch.Generator().manual_seed(0))
    found = record(network, Tap(1, "block", "0", batch_axis=1), x)
    assert torch.allclose(found, network(x).transpose(0, 1), atol=1e-5)


def test_inputs_by_name_and_of_the_whole_network(refuses):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Answers(lambda x: x)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x=x)

    x = torch.randn(2, 3)
    with refuses("takes its input by name"):
        record(ByName(), Tap(1, "x", "layer", side="input"), x)
    assert torch.equal(record(nn.Linear(3, 3), Tap(1, "x", "", side="input"), x)[:, 0], x)


def test_two_taps_of_one_name_are_refused(refuses):
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    with refuses("two taps are called 1.x"), taps.recording(network, [Tap(1, "x", "0"), Tap(1, "x", "1")]):
        pass


def test_half_precision_is_measured_in_fp32():
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).bfloat16()
    images = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.full((1, 3, 1, 1), 128.0), torch.full((1, 3, 1, 1), 64.0)
    network.register_forward_pre_hook(lambda _, args: (args[0].bfloat16(),))
    place = Tap(1, "x", "1")
    (batch,) = taps.activations(network, [place], images, mean, std)
    assert batch["1.x"].dtype == torch.float32
    assert torch.equal(taps.features(network, [place], images, mean, std)["1.x"], batch["1.x"])


def test_a_list_of_taps_reads_as_recording_does():
    network = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Flatten(), nn.Linear(80, 7), nn.ReLU())
    network[4] = network[1]  # shared
    x = torch.randn(2, 3, 4, 4)
    table = taps.list_taps(network, x).set_index("module")
    assert list(table.index) == ["0", "1", "2", "3", "1"]
    assert (table.positions["0"], table.nodes["0"], table.nodes["3"]) == (16, 5, 7)
    for path in ("0", "2", "3"):
        assert record(network, Tap(1, "x", path), x).shape[1:] == (table.positions[path], table.nodes[path])
    assert table.note["1"].str.contains("called several times").all() and table.note["0"] == ""


def test_a_list_of_taps_of_small_networks():
    assert taps.list_taps(nn.Linear(3, 3), torch.rand(2, 3)).empty
    scalar = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0))
    assert "no axis of nodes" in taps.list_taps(scalar, torch.rand(2, 3)).note[1]


def test_a_list_of_taps_says_what_cannot_be_read():
    table = taps.list_taps(nn.Sequential(nn.ReLU(), Inner(lambda x: {"a": x, "b": x})), torch.rand(2, 4, 4, 4))
    assert table.note[0].startswith("an activation of (2, 4, 4, 4) may have") and table.nodes.isna().all()
    assert "gives no tensor" in table.note[1]
