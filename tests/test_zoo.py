"""Which part of the measure works for networks of other libraries: each cell is right, or refuses with a sentence.

`python tests/test_zoo.py` prints the table that docs/usage.md shows.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from paperlib import andc, data, foreign, paths, taps
from paperlib.probe import probe, prune
from paperlib.taps import Tap

COLUMNS = ("output of a block", "FF nodes", "heads", "silencing a head", "ANDC")


@dataclass(frozen=True)
class Case:
    """A network, what it takes, and where its parts are; None: it has none, or none that shows."""

    network: nn.Module
    inputs: dict | Tensor
    block: Tap
    ff1: Tap
    attn: Tap | None
    pruned: str  # a layer of connections, its path
    width: int  # nodes of the block
    ff_width: int
    batch_axis: int = 0

    def __call__(self) -> Tensor:
        with torch.no_grad():
            answer = self.network(**self.inputs) if isinstance(self.inputs, dict) else self.network(self.inputs)
        return getattr(answer, "last_hidden_state", answer)


def known(network: nn.Module, inputs, width: int, ff_width: int, pruned: str, batch_axis: int = 0) -> Case:
    """A network of a known family, its second encoder."""
    block, ff1, attn = foreign.known_taps(network, batch_axis)[3:6]
    return Case(network.eval(), inputs, block, ff1, attn, pruned, width, ff_width, batch_axis)


def pictures(size=32):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))


def timm_vit() -> Case:
    timm = pytest.importorskip("timm")
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    return known(network, pictures(), 192, 768, "blocks.1.mlp.fc2")


def torchvision_vit(opened=True) -> Case:
    from torchvision.models import VisionTransformer

    network = VisionTransformer(32, 8, 2, 4, 32, 64, num_classes=5).eval()
    nn.init.normal_(network.heads.head.weight)  # drawn as 0
    network = foreign.open_attention(network) if opened else network
    return known(network, pictures(), 32, 64, "encoder.layers.encoder_layer_1.mlp.3")


def swin() -> Case:
    from torchvision.models import swin_t

    block, attn = "features.1.1", Tap(1, "attn", "features.1.1.attn.proj", "input", 3)
    taps_ = (Tap(1, "block", block), Tap(1, "ff1", f"{block}.mlp.1"), attn)
    return Case(swin_t(num_classes=5).eval(), pictures(64), *taps_, f"{block}.mlp.3", 96, 384)


def convnext() -> Case:
    from torchvision.models import convnext_tiny

    block = "features.1.1"
    taps_ = (Tap(1, "block", block), Tap(1, "ff1", f"{block}.block.4"), None)
    return Case(convnext_tiny(num_classes=5).eval(), pictures(64), *taps_, f"{block}.block.5", 96, 384)


def efficientnet() -> Case:
    from torchvision.models import efficientnet_b0

    block = "features.2.1"
    taps_ = (Tap(1, "block", block), Tap(1, "ff1", f"{block}.block.0"), None)
    return Case(efficientnet_b0(num_classes=5).eval(), pictures(64), *taps_, f"{block}.block.0.0", 24, 144)


def vgg16() -> Case:
    from torchvision.models import vgg16

    taps_ = (Tap(5, "block", "features.16"), Tap(5, "ff1", "features.13"), None)
    return Case(vgg16(num_classes=5).eval(), pictures(), *taps_, "features.12", 256, 256)


def torch_encoder(batch_first: bool) -> Case:
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    network = foreign.open_attention(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval())
    shape = (2, 5, 16) if batch_first else (5, 2, 16)
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return known(network, inputs, 16, 32, "layers.1.linear2", 0 if batch_first else 1)


def words():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {"input_ids": torch.tensor([[3, 4, 5, 6, 7], [8, 9, 2, 0, 0]]), "attention_mask": mask}


def bert() -> Case:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_attention_heads": 4, "intermediate_size": 32, "num_hidden_layers": 2}
    network = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))
    return known(network, words(), 16, 32, "encoder.layer.1.output.dense")


def gpt2() -> Case:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=20, n_embd=16, n_head=4, n_layer=2, n_positions=8)
    return known(transformers.GPT2Model(config), words(), 16, 64, "h.1.mlp.c_proj")


def text_cnn() -> Case:
    class Turned(nn.Module):
        def forward(self, x):
            return x.transpose(1, 2)

    filters = (nn.Embedding(20, 16), Turned(), nn.Conv1d(16, 24, 3, padding=1), nn.ReLU())
    network = nn.Sequential(*filters, nn.AdaptiveMaxPool1d(1), nn.Flatten(), nn.Linear(24, 5)).eval()
    taps_ = (Tap(1, "block", "2"), Tap(1, "ff1", "3", axis=1), None)
    return Case(network, words()["input_ids"], *taps_, "2", 24, 24)


ZOO: dict[str, Callable[[], Case]] = {
    "timm ViT": timm_vit,
    "torchvision ViT": torchvision_vit,
    "torchvision Swin-T": swin,
    "torchvision ConvNeXt-T": convnext,
    "torchvision EfficientNet-B0": efficientnet,
    "torchvision VGG-16": vgg16,
    "nn.TransformerEncoder, batch first": lambda: torch_encoder(True),
    "nn.TransformerEncoder, positions first": lambda: torch_encoder(False),
    "Hugging Face BERT": bert,
    "Hugging Face GPT-2": gpt2,
    "text CNN": text_cnn,
}


def recorded(case: Case, *wanted: Tap) -> dict[str, Tensor]:
    with taps.recording(case.network, wanted) as found:
        case()
    return dict(found)


def block_is_right(case: Case) -> None:
    """Every node at every position is where the module says, and there are as many as the block is wide."""
    nodes, given = recorded(case, case.block)[case.block.name], []
    hook = case.network.get_submodule(case.block.module).register_forward_hook(lambda *all: given.append(all[2]))
    case()
    hook.remove()
    value = given[0][0] if isinstance(given[0], tuple) else given[0]
    assert nodes.shape == (2, nodes.shape[1], case.width) and value.numel() == nodes.numel()
    (axis,) = [number for number, size in enumerate(value.shape) if size == case.width]
    order = [case.batch_axis, *(n for n in range(value.ndim) if n not in (axis, case.batch_axis)), axis]
    assert torch.equal(value.permute(order).reshape(nodes.shape), nodes)


def ff_nodes_are_right(case: Case) -> None:
    assert recorded(case, case.ff1)[case.ff1.name].shape[2] == case.ff_width


def heads_are_right(case: Case) -> None:
    """What heads add to the layer that they lead into adds up to its output; one example's heads know no other's."""
    module = case.network.get_submodule(case.attn.module)
    found = recorded(case, case.attn, replace(case.attn, kind="after", side="output", heads=0))
    before, after = (found[f"{case.attn.encoder}.{kind}"] for kind in ("attn", "after"))
    weight = andc.connection_weight(module)
    split = (part.unflatten(-1, (case.attn.heads, -1)) for part in (before, weight))
    summed = torch.einsum("nthk,jhk->ntj", *split)
    assert torch.allclose(summed + module.bias, after, atol=1e-4)
    other = replace(case, inputs=with_another_second(case))
    changed = recorded(other, case.attn)[case.attn.name] != before
    assert not changed[0].any() and changed[1].any() and len(before) == 2


def with_another_second(case: Case):
    """The same inputs with another second example."""

    def changed(x: Tensor) -> Tensor:
        x = x.clone()
        x.select(case.batch_axis, 1).copy_(x.select(case.batch_axis, 1).flip(0))
        return x

    if isinstance(case.inputs, dict):
        return case.inputs | {"input_ids": changed(case.inputs["input_ids"])}
    return changed(case.inputs)


def silencing_is_right(case: Case) -> None:
    """As if the columns of that head were 0 in the layer that it leads into, and not as it was."""
    whole, weight = case(), andc.connection_weight(case.network.get_submodule(case.attn.module))
    with foreign.silenced(case.network, case.attn, 1):
        silent = case()
    width = weight.shape[1] // case.attn.heads
    kept = weight.data.clone()
    weight.data[:, width : 2 * width] = 0
    assert torch.allclose(case(), silent, atol=1e-5) and not torch.allclose(whole, silent, atol=1e-5)
    weight.data.copy_(kept)
    assert torch.equal(case(), whole)


def pruning_is_right(case: Case) -> None:
    """As if the masked connections were 0, however the layer stores them."""
    weight = andc.connection_weight(case.network.get_submodule(case.pruned)).data.clone()
    mask = torch.rand(weight.shape[:2], generator=torch.Generator().manual_seed(1)) > 0.5
    andc.apply_masks(case.network, {case.pruned: mask})
    masked = andc.connection_weight(case.network.get_submodule(case.pruned))
    assert torch.equal(masked, weight * mask.view(*mask.shape, *[1] * (weight.ndim - 2)))


TESTS = (block_is_right, ff_nodes_are_right, heads_are_right, silencing_is_right, pruning_is_right)
CHECKS = dict(zip(COLUMNS, TESTS, strict=True))


def cell(case: Case, column: str) -> str:
    """yes, where the check passes; else why not."""
    if case.attn is None and "head" in column:
        return "no heads"
    try:
        CHECKS[column](case)
    except ValueError as error:
        return "no: " + str(error).partition(": ")[2].partition(":")[0]
    return "yes" if column != "FF nodes" or case.ff1.axis is None else f"yes, with axis={case.ff1.axis}"


def row(name: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        case = ZOO[name]()
        return "| " + " | ".join([name, *(cell(case, column) for column in COLUMNS)]) + " |"


@pytest.mark.parametrize("name", ZOO)
def test_the_table_of_architectures_is_what_works(name):
    assert row(name) in (paths.root() / "docs" / "usage.md").read_text(encoding="utf-8").splitlines()


def test_attention_that_was_opened_answers_as_before():
    """With masks of padding and of the future, both layouts."""
    generator = torch.Generator().manual_seed(0)
    for batch_first in (True, False):
        attention = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
        x = torch.randn((2, 5, 16) if batch_first else (5, 2, 16), generator=generator)
        padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        each = torch.randn(8, 5, 5, generator=generator)
        opened = foreign.OpenAttention(attention)
        for masks in (
            {},
            {"key_padding_mask": padding},
            {"attn_mask": future, "key_padding_mask": padding},
            {"attn_mask": each},
        ):
            expected, _ = attention(x, x, x, need_weights=False, **masks)
            assert torch.allclose(opened(x, x, x, **masks)[0], expected, atol=1e-5), masks.keys()


def test_an_opened_encoder_takes_a_mask_of_padding():
    """PyTorch's own fast path for it would ask for what is no longer there."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    network = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    expected = network(x, src_key_padding_mask=padding)
    with torch.no_grad():
        found = foreign.open_attention(network)(x, src_key_padding_mask=padding)
    assert torch.allclose(found[0], expected[0], atol=1e-5) and torch.allclose(found[1, :3], expected[1, :3], atol=1e-5)


def test_layers_that_change_their_weights_are_refused(refuses):
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return nn.functional.conv2d(x, self.weight - self.weight.mean(), self.bias)

    for layer in (Standardised(3, 4, 3), nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))):
        with refuses("changes its weights before it uses them"):
            andc.connection_weight(layer)


def test_heads_of_attention_that_is_not_opened_do_not_show():
    case = torchvision_vit(opened=False)
    assert "is not called in a pass" in cell(case, "heads") and "nothing was silenced" in cell(case, "silencing a head")


def test_what_has_no_known_parts_says_so(refuses):
    with refuses("Sequential is of no known family: choose taps from taps.list_taps"):
        foreign.known_taps(nn.Sequential(nn.Linear(3, 3)))
    with refuses("has no heads, so none has the number 0"), foreign.silenced(nn.Linear(3, 3), Tap(1, "x", ""), 0):
        pass
    with refuses("LayerNorm is no layer of connections"):
        andc.connection_weight(nn.LayerNorm(3))
    with refuses("has 4 groups"):
        andc.connection_weight(nn.Conv2d(4, 4, 3, groups=4))
    with refuses(r"has connections of shape \(2, 3\), and the mask is \(3, 2\)"):
        andc.apply_masks(nn.Sequential(nn.Linear(3, 2)), {"0": torch.ones(3, 2, dtype=torch.bool)})


if __name__ == "__main__":
    print("| network | " + " | ".join(COLUMNS) + " |\n|" + "---|" * (len(COLUMNS) + 1))
    for each in ZOO:
        print(row(each))


def sentences(parts: str, size: int = 100) -> list[tuple[dict, Tensor]]:
    """Batches of the embedded texts, as Hugging Face's networks take them."""
    texts = data.load("phrases20")
    x, y = (texts.x_train, texts.y_train) if parts == "train" else (texts.x_test, texts.y_test)
    return [
        ({"input_ids": ids, "attention_mask": (ids != data.PADDING).long()}, labels)
        for ids, labels in zip(x.split(size), y.split(size), strict=True)
    ]


@pytest.mark.slow
def test_an_encoder_of_hugging_face_is_trained_measured_and_pruned_like_any_other():
    """From its configuration, on the embedded texts: above its null, heads and all, by functions that know no BERT."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.BertConfig(
        vocab_size=data.load("phrases20").vocabulary, num_labels=20, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    network, null = (transformers.BertForSequenceClassification(config) for _ in range(2))
    optimizer = torch.optim.AdamW(network.parameters(), 3e-3)
    network.train()
    for _ in range(15):
        for inputs, labels in sentences("train"):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(**inputs).logits, labels).backward()
            optimizer.step()
    places = foreign.known_taps(network)
    table = probe(network, places, sentences("train"), sentences("test"), null).set_index(["network", "tap"])
    trained, random = table.loc["network"], table.loc["null"]
    assert trained.accuracy["2.block"] > 0.6 and (trained.accuracy > random.accuracy).sum() >= 4
    assert trained.snr["2.ff1"] > 1.5 * random.snr["2.ff1"] and trained.excess.notna().sum() == 2
    inputs, labels = sentences("test")[0]
    with torch.no_grad(), foreign.silenced(network.eval(), places[5], 0):
        silent = network(**inputs).logits
    assert not torch.allclose(silent, network(**inputs).logits)
    layer = "bert.encoder.layer.1.output.dense"
    pruned = prune(network, {layer: (places[4], Tap(2, "ff2", layer))}, sentences("train"), sentences("test"))
    assert pruned.dilution.nunique() == 1 and len(pruned) == 5
