"""Networks of other libraries: where their encoders, FF nodes and heads lie, and how to silence and prune them.

`known_taps` knows the transformers of timm, torchvision, PyTorch and Hugging Face; of any other network
`taps.list_taps` shows what can be tapped. What a head's nodes say can be replaced by 0 (`silenced`), and PyTorch's own
attention, whose heads nobody sees, by one that shows them (`open_attention`).
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib.taps import Tap, node_axis


@dataclass(frozen=True)
class Family:
    """Networks whose encoders have the same parts."""

    block: str  # pattern of an encoder's path, with its number
    ff1: str  # the layer that FF nodes lead into
    attn: str  # the layer that concatenated heads lead into
    heads: str  # where their number stands


FAMILIES = (
    Family(r"blocks\.(\d+)", "mlp.fc2", "attn.proj", "attn.num_heads"),  # timm's ViT
    Family(r"encoder\.layers\.encoder_layer_(\d+)", "mlp.3", "self_attention.out_proj", "self_attention.num_heads"),
    Family(r"(?:.+\.)?layers\.(\d+)", "linear2", "self_attn.out_proj", "self_attn.num_heads"),  # nn.TransformerEncoder
    Family(
        r"(?:.+\.)?encoder\.layer\.(\d+)",  # BERT
        "output.dense",
        "attention.output.dense",
        "attention.self.num_attention_heads",
    ),
    Family(r"(?:.+\.)?h\.(\d+)", "mlp.c_proj", "attn.c_proj", "attn.num_heads"),  # GPT-2
)


def known_taps(network: nn.Module, batch_axis: int = 0) -> list[Tap]:
    """`block` (what an encoder passes on), `ff1` (its FF nodes) and `attn` (its concatenated heads) of every encoder.

    Heads of PyTorch's own attention show after `open_attention`. ValueError for a network of no known family.
    """
    paths, found = dict(network.named_modules()), []
    for family in FAMILIES:
        for path in paths:
            match = re.fullmatch(family.block, path)
            if match and f"{path}.{family.ff1}" in paths and f"{path}.{family.attn}" in paths:
                number = int(match[1]) + 1
                owner, _, name = family.heads.rpartition(".")
                heads = getattr(paths[f"{path}.{owner}"], name)
                found += [
                    Tap(number, "block", path, batch_axis=batch_axis),
                    Tap(number, "ff1", f"{path}.{family.ff1}", "input", batch_axis=batch_axis),
                    Tap(number, "attn", f"{path}.{family.attn}", "input", heads, groups=heads, batch_axis=batch_axis),
                ]
        if found:
            return found
    raise ValueError(f"{type(network).__name__} is of no known family: choose taps from taps.list_taps(network, batch)")


@contextmanager
def silenced(network: nn.Module, tap: Tap, head: int) -> Iterator[None]:
    """Within the block, the nodes of one head of a tap say 0. ValueError for a head that the tap does not have; after a
    pass that did not call the module, too."""
    if not 0 <= head < tap.heads:
        raise ValueError(f"tap {tap.name} has {tap.heads or 'no'} heads, so none has the number {head}")
    called = []

    def without(module: nn.Module, value: Tensor) -> Tensor:
        called.append(True)
        axis = node_axis(tap, module, value)
        width, rest = divmod(value.shape[axis], tap.heads)
        if rest:
            raise ValueError(f"tap {tap.name}: {tap.heads} heads do not divide {value.shape[axis]} nodes")
        value = value.clone()
        value.narrow(axis, head * width, width).zero_()
        return value

    def before(module: nn.Module, args: tuple) -> tuple:
        return (without(module, args[0]), *args[1:])

    def after(module: nn.Module, _, output: Tensor | tuple) -> Tensor | tuple:
        first = without(module, output[0] if isinstance(output, tuple) else output)
        return (first, *output[1:]) if isinstance(output, tuple) else first

    module = network.get_submodule(tap.module)
    is_input = tap.side == "input"
    hook = module.register_forward_pre_hook(before) if is_input else module.register_forward_hook(after)
    try:
        yield
        if not called:
            raise ValueError(f"tap {tap.name}: {tap.module} is not called in a pass, so nothing was silenced")
    finally:
        hook.remove()


class OpenAttention(nn.Module):
    """PyTorch's multi-head attention with its parameters, but `out_proj` called as a module, so that its input, the
    concatenated heads, can be tapped and silenced. In evaluation mode; attention weights are not returned."""

    def __init__(self, attention: nn.MultiheadAttention):
        super().__init__()
        if not attention._qkv_same_embed_dim or attention.bias_k is not None or attention.add_zero_attn:
            raise ValueError("only attention whose queries, keys and values have one width can be opened")
        self.num_heads, self.batch_first = attention.num_heads, attention.batch_first
        self.embed_dim, self._qkv_same_embed_dim = attention.embed_dim, False  # PyTorch's layers take no fast path
        self.in_proj_weight, self.in_proj_bias = attention.in_proj_weight, attention.in_proj_bias
        self.out_proj = attention.out_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """As `nn.MultiheadAttention`."""
        given = [part if self.batch_first else part.transpose(0, 1) for part in (query, key, value)]
        weights = self.in_proj_weight.chunk(3)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(part, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part, weight, bias in zip(given, weights, biases, strict=True)
        )
        mask = None
        for one in (_additive(attn_mask, q), _additive(key_padding_mask, q, padding=True)):
            mask = one if mask is None else mask if one is None else mask + one
        heads = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal and mask is None)
        heads = heads.transpose(1, 2).flatten(2)  # laid out as the input is, so that a tap of it is, too
        return self.out_proj(heads if self.batch_first else heads.transpose(0, 1)), None


def _additive(mask: Tensor | None, q: Tensor, padding: bool = False) -> Tensor | None:
    """A mask of PyTorch's attention (bool: true where nobody may attend; or numbers to add) as numbers to add."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill(mask, -torch.inf)
    if padding:
        return mask[:, None, None]
    return mask.unflatten(0, (len(q), -1)) if mask.ndim == 3 else mask


def open_attention(network: nn.Module) -> nn.Module:
    """Put an `OpenAttention` in the place of every nn.MultiheadAttention, in place; answers stay what they are."""
    for module in list(network.modules()):
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # a fast path of PyTorch's own attention
        for name, child in module.named_children():
            if isinstance(child, nn.MultiheadAttention):
                setattr(module, name, OpenAttention(child))
    return network.eval()
