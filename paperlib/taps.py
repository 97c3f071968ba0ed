"""Frozen network + images -> named activations: what a node is, and where heads are.

A tap is one activation of one sub-block, recorded as (n, T, D): n images, T positions (tokens, or pixels of a filter's
map), D nodes. Nothing after this module knows what kind of network the nodes belong to.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from paperlib.data import BATCH, normalise


@dataclass(frozen=True)
class Tap:
    """A place in a network: what goes into or comes out of one sub-module."""

    encoder: int  # depth, from 1; 0 is the stem
    kind: str  # what it is called in every encoder, e.g. "attn"
    module: str  # the sub-module's path
    side: str = "output"  # or "input"
    heads: int = 0  # heads whose nodes lie side by side here; 0 where they are mixed
    pooled: bool = False  # whether the mean over positions is taken (T = 1)
    groups: int = 1  # groups of nodes, side by side, that a rotation of nodes keeps apart

    @property
    def name(self) -> str:
        return f"{self.encoder}.{self.kind}"


# kind -> (module within the encoder block, side)
CCT_TAPS = {
    "qkv": ("self_attn.qkv", "output"),
    "attn": ("self_attn.proj", "input"),
    "mha": ("self_attn.proj", "output"),
    "ff_in": ("norm1", "output"),
    "ff1": ("activation", "output"),
    "ff2": ("linear2", "output"),
    "block": ("", "output"),
}
# What follows the last encoder: its LayerNorm, the normalised tokens as SeqPool weighs them, and their sum
AFTER_CCT = {
    "norm": ("classifier.norm", "output"), "weighed": ("classifier.weighed", "output"),
    "seqpool": ("classifier.fc", "input"),
}  # fmt: skip


def cct_taps(network: nn.Module, kinds: Iterable[str]) -> list[Tap]:
    """The taps of a CCT, encoder by encoder; kinds among `stem` (tokens plus position), the keys of `CCT_TAPS`,
    `pooled` (the mean of `block` over tokens) and, counted as the last encoder's, the keys of `AFTER_CCT`."""
    kinds = list(kinds)
    known = ["stem", *CCT_TAPS, "pooled", *AFTER_CCT]
    if unknown := set(kinds) - set(known):
        raise ValueError(f"unknown tap {sorted(unknown)[0]!r}: use {', '.join(known)}")
    blocks = network.classifier.blocks
    taps = [Tap(0, "stem", "classifier.blocks.0", "input")] if "stem" in kinds else []
    for index in range(len(blocks)):
        for kind in kinds:
            if kind in CCT_TAPS or kind == "pooled":
                module, side = CCT_TAPS["block" if kind == "pooled" else kind]
                path = f"classifier.blocks.{index}.{module}".rstrip(".")
                heads = blocks[0].self_attn.heads if kind == "attn" else 0
                groups = {"attn": 1, "qkv": 3}.get(kind, 0) * blocks[0].self_attn.heads or 1
                taps.append(Tap(index + 1, kind, path, side, heads, kind == "pooled", groups))
    return taps + [Tap(len(blocks), kind, *AFTER_CCT[kind]) for kind in kinds if kind in AFTER_CCT]


def cnn_taps(network: nn.Module) -> list[Tap]:
    """The taps of a VGG, `conv` of every layer: its filters after the ReLU and, where one follows, the pooling."""
    taps: list[Tap] = []
    for index, module in enumerate(network.features):
        if isinstance(module, nn.Conv2d):
            taps.append(Tap(len(taps) + 1, "conv", ""))
        elif isinstance(module, nn.ReLU | nn.MaxPool2d):
            taps[-1] = replace(taps[-1], module=f"features.{index}")
    return taps


def places(network: nn.Module, kinds: Iterable[str]) -> list[Tap]:
    """The taps of any network of `paperlib.models`, of the given kinds."""
    return cnn_taps(network) if hasattr(network, "features") else cct_taps(network, kinds)


class AllRecorded(Exception):
    """Ends a forward pass of which nothing more is wanted (`recording`)."""


@contextmanager
def recording(network: nn.Module, taps: Iterable[Tap], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass of `network` fills the yielded dict: tap name -> (n, T, D). Of a module that
    answers with a tuple, the first; of one that is called several times, the last call. With `stop`, a pass ends in
    `AllRecorded` once every tap was met."""
    recorded: dict[str, Tensor] = {}
    taps = list(taps)

    def keep(tap: Tap):
        def hook(module, args, *output):
            value = output[0] if output else args[0]
            nodes = as_nodes(value[0] if isinstance(value, tuple) else value)
            recorded[tap.name] = nodes.mean(dim=1, keepdim=True) if tap.pooled else nodes
            if stop and len(recorded) == len(taps):
                raise AllRecorded

        return hook

    hooks = []
    try:
        for tap in taps:
            module = network.get_submodule(tap.module)
            hook = module.register_forward_pre_hook if tap.side == "input" else module.register_forward_hook
            hooks.append(hook(keep(tap)))
        yield recorded
    finally:
        for hook in hooks:
            hook.remove()


def as_nodes(activation: Tensor) -> Tensor:
    """(n, T, D) as it is; feature maps (n, D, height, width) -> (n, T, D); vectors (n, D) -> (n, 1, D)."""
    if activation.ndim == 4:
        return activation.flatten(2).transpose(1, 2)
    return activation[:, None] if activation.ndim == 2 else activation


@torch.no_grad()
def activations(
    network: nn.Module, taps: Iterable[Tap], images: Tensor, mean: Tensor, std: Tensor, batch_size: int = BATCH
) -> Iterator[dict[str, Tensor]]:
    """Batches of activations of uint8 images in their order, fp32, in evaluation mode: tap name -> (b, T, D)."""
    network.eval()
    with recording(network, taps) as recorded:
        for batch in images.split(batch_size):
            network(normalise(batch, mean, std))
            yield dict(recorded)
            recorded.clear()  # so that whoever asks for the next batch decides whether this one stays in memory


@torch.no_grad()
def features(
    network: nn.Module, taps: list[Tap], images: Tensor, mean: Tensor, std: Tensor, batch_size: int = BATCH
) -> dict[str, Tensor]:
    """Activations of all uint8 images at once, fp32, in evaluation mode: tap name -> (n, T, D). What comes after the
    last of these taps is not computed."""
    network.eval()
    found: dict[str, Tensor] = {}
    with recording(network, taps, stop=True) as recorded:
        for start in range(0, len(images), batch_size):
            with suppress(AllRecorded):
                network(normalise(images[start : start + batch_size], mean, std))
            for tap in taps:
                part = recorded.pop(tap.name)
                if tap.name not in found:
                    found[tap.name] = part.new_empty(len(images), *part.shape[1:])
                found[tap.name][start : start + batch_size] = part
    return found


def places_first_middle_last(network: nn.Module, kinds: list[str] | tuple[str, ...]) -> list[Tap]:
    """Those taps of these kinds that lie in the first, middle and last encoder (a CNN's layer)."""
    everywhere = places(network, kinds)
    some = first_middle_last(max(tap.encoder for tap in everywhere))
    return [tap for tap in everywhere if tap.encoder in some]


def first_middle_last(encoders: int) -> list[int]:
    """The encoders (from 1) that are looked at where all of them would be too many."""
    return sorted({1, (encoders + 1) // 2, encoders})


def encoder_of(tap: str) -> int:
    return int(tap.split(".")[0])
