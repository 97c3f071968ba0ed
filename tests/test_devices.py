"""Right for CUDA without a GPU: under fake tensors every operation checks devices and shapes, and computes nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

from paperlib import andc, heads, macroscopic, readouts, snp
from paperlib.data import Images, augmented_batches, normalise
from paperlib.models import cct
from paperlib.taps import cct_taps, recording
from paperlib.training import Recipe, train


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors on a device that this machine need not have."""
    # trunc_normal_ looks at its own values, which fake tensors do not have.
    monkeypatch.setattr(torch.nn.init, "trunc_normal_", torch.nn.init.normal_)
    with FakeTensorMode(allow_non_fake_inputs=False):
        yield torch.device("cuda:0")


def fake_network(device, **kwargs):
    with device:
        return cct("cct_2_3x2", num_classes=10, image_size=32, **kwargs)


@pytest.mark.parametrize("positional_embedding", ["learnable", "sine", "none"])
def test_forward_pass(cuda, positional_embedding):
    network = fake_network(cuda, positional_embedding=positional_embedding)
    logits = network(torch.empty(8, 3, 32, 32, device=cuda))
    assert logits.device == cuda and logits.shape == (8, 10)


def test_augmentation(cuda):
    images = torch.empty(20, 3, 32, 32, dtype=torch.uint8, device=cuda)
    labels = torch.empty(20, dtype=torch.long, device=cuda)
    mean, std = torch.empty(3, 1, 1, device=cuda), torch.empty(3, 1, 1, device=cuda)
    for batch, batch_labels in augmented_batches(images, labels, 8, 4, True, torch.Generator()):
        assert batch.device == batch_labels.device == normalise(batch, mean, std).device == cuda


def test_class_sums_and_fields(cuda):
    network = fake_network(cuda)
    taps = cct_taps(network, ["stem", "qkv", "attn", "mha", "ff_in", "ff1", "ff2", "block"])
    labels = torch.empty(8, dtype=torch.long, device=cuda)
    with recording(network, taps) as recorded, torch.no_grad():
        network(torch.empty(8, 3, 32, 32, device=cuda))
    for activation in recorded.values():
        sums = torch.zeros(10, *activation.shape[1:], device=cuda)
        sums.index_add_(0, labels, activation)
        fields = snp.field_matrices(sums, sums)
        centred, share = snp.split_offset(fields)
        assert fields.device == centred.device == share.device == cuda
        assert fields.shape == (activation.shape[2], 10, 10)
    attention = recorded["1.attn"]
    assert readouts.head_fields(attention, attention[:, :, :].new_empty(10, *attention.shape[1:]), 2).device == cuda


def test_a_mixed_device_is_found(cuda):
    """The tool itself: without this, the tests above could pass on anything."""
    network = fake_network(cuda)
    with pytest.raises(RuntimeError, match="device"):
        network(torch.empty(8, 3, 32, 32, device="cpu"))


def test_training_loop(cuda, monkeypatch):
    """The loop's own tensors (mean, losses, random offsets) follow the data's device."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)  # autograd itself needs the real device
    network = fake_network(cuda)
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=cuda)
    labels = torch.empty(8, dtype=torch.long, device=cuda)
    data = Images("fake", images, labels, images, labels, tuple("abcdefghij"))
    data.__dict__["statistics"] = (torch.empty(3, 1, 1, device=cuda), torch.empty(3, 1, 1, device=cuda))  # needs values
    fields = {"epochs": 1, "batch_size": 8, "lr": 1e-3, "weight_decay": 0.0, "warmup": 0.1, "label_smoothing": 0.1}
    recipe = Recipe(**fields, shift=2, flip=True, precision="fp32")
    with pytest.raises(DynamicOutputShapeException):
        train(network, data, recipe, seed=0)  # runs a whole epoch; only then does it look at the losses' values


def test_what_pruning_measures(cuda):
    """A network that was not retrained gives nan on the device of the one it is compared with."""
    intact = torch.empty(8, dtype=torch.bool, device=cuda)
    for pruned in (intact, None):
        with pytest.raises(DataDependentOutputException):
            andc.accuracy_loss("", intact, pruned)  # gets as far as reading the first number


def test_measuring(cuda):
    network = fake_network(cuda)
    places = cct_taps(network, ["attn", "block"])
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=cuda)
    with recording(network, places) as recorded, torch.no_grad():
        network(images.float())
    weights = {name: recorded[name].new_empty(10, *recorded[name].shape[1:]) for name in recorded}
    mean = std = torch.empty(3, 1, 1, device=cuda)
    with pytest.raises(DataDependentOutputException):  # whether each label has an image: after the whole pass
        readouts.measure(network, places, weights, images, torch.empty(8, dtype=torch.long, device=cuda), mean, std)


def test_readouts_train(cuda, monkeypatch):
    monkeypatch.setattr(
        readouts, "_rms", lambda network, taps, *images: {tap.name: 1.0 for tap in taps}
    )  # needs values
    monkeypatch.setattr(readouts, "_check_losses", lambda losses, labels: None)  # once an epoch, it does, too
    images = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=cuda)
    mean = std = torch.empty(3, 1, 1, device=cuda)
    network, labels = fake_network(cuda), torch.empty(8, dtype=torch.long, device=cuda)
    recipe, said = readouts.ReadoutRecipe(2, 4, 0.1, 1e-3, 2, True), []
    places = cct_taps(network, ["attn", "block"])
    monkeypatch.setattr(torch.Tensor, "__format__", lambda loss, how: str(loss.device), raising=False)  # of the log
    found = readouts.train_readouts(network, places, images, labels, 10, mean, std, recipe, 0, said.append)
    assert len(said) == 2 and all("cuda:0" in line for line in said)
    assert {weight.device for weight in found.values()} == {cuda}


def test_heads_and_sets_of_nodes(cuda):
    network, images = fake_network(cuda), torch.empty(4, 3, 32, 32, device=cuda)
    means = [torch.empty(64, 128, device=cuda) for _ in range(2)]
    for given in (None, means):
        assert heads.ablation_logits(network, images, given).device == cuda
    assert heads.attention_received(network, images, 1).device == cuda
    activations, weight = torch.empty(4, 64, 128, device=cuda), torch.empty(10, 64, 128, device=cuda)
    labels, subsets = torch.empty(4, dtype=torch.long, device=cuda), torch.empty(3, 128, dtype=torch.bool, device=cuda)
    assert macroscopic.subset_answers(activations, weight, labels, subsets).device == cuda
    summed = torch.empty(2, 10, 10, device=cuda)
    assert macroscopic.predicted_accuracy(summed, summed, torch.empty(10, device=cuda)).device == cuda


def test_masks_and_owners_may_come_from_the_cpu(cuda):
    """What files hold is read to the CPU; the network is where it is."""
    network = fake_network(cuda)
    paths = [f"classifier.blocks.0.{layer}" for layer in ("linear1", "linear2")]
    masks = {path: torch.ones(*network.get_submodule(path).weight.shape, dtype=torch.bool) for path in paths}
    andc.apply_masks(network, masks)
    with pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):  # which nodes stay, needs values
        andc.compact(network, andc.removable(masks))
