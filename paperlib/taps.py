"""Frozen network + images -> named activations: what a node is, and where heads are.

A tap is one activation of one sub-block, recorded as (n, T, D): n images, T positions (tokens, or pixels of a filter's
map), D nodes. Nothing after this module knows what kind of network the nodes belong to.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib.data import BATCH, normalise, positions


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
    axis: int | None = None  # where nodes lie in what the module gives; None: as its kind and shape say (`node_axis`)
    batch_axis: int = 0  # where images lie
    call: int | None = None  # which call, from 0, of a module that one pass calls several times

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
            taps.append(Tap(len(taps) + 1, "conv", "", axis=1))
        elif isinstance(module, nn.ReLU | nn.MaxPool2d):
            taps[-1] = replace(taps[-1], module=f"features.{index}")
    return taps


def places(network: nn.Module, kinds: Iterable[str]) -> list[Tap]:
    """The taps of any network of `paperlib.models`, of the given kinds."""
    return cnn_taps(network) if is_cnn(network) else cct_taps(network, kinds)


def is_cnn(network: nn.Module) -> bool:
    """Whether a network of this project has layers of filters, and not encoders."""
    return hasattr(network, "features")


class AllRecorded(Exception):
    """Ends a forward pass of which nothing more is wanted (`recording`)."""


@contextmanager
def recording(network: nn.Module, taps: Iterable[Tap], stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """Within the block, each forward pass of `network` fills the yielded dict: tap name -> (n, T, D). Of what a module
    answers with, the tensor, or the first of several, or its `last_hidden_state`. With `stop`, a pass ends in
    `AllRecorded` once every tap was met.

    A pass raises ValueError, naming the tap, for a module that it does not call, or calls several times if the tap does
    not say which call; for a layout that can be read in two ways; for another number of entries than images; and for an
    activation that a later layer overwrites in place.
    """
    record = _Record(list(taps), stop)
    hooks = [network.register_forward_pre_hook(record.start)]
    try:
        for tap in record.taps:
            module = network.get_submodule(tap.module)
            hook = module.register_forward_pre_hook if tap.side == "input" else module.register_forward_hook
            hooks.append(hook(partial(record.keep, tap)))
        hooks.append(network.register_forward_hook(record.finish))
        yield record.nodes
    finally:
        for hook in hooks:
            hook.remove()


class _Record:
    """What a forward pass has met so far."""

    def __init__(self, taps: list[Tap], stop: bool):
        names = [tap.name for tap in taps]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"two taps are called {twice[0]}: give one another kind or encoder")
        self.taps, self.stop = taps, stop
        self.nodes: dict[str, Tensor] = {}
        self.given: dict[str, tuple[Tensor, int]] = {}  # what was recorded as the module gave it, and its version then
        self.calls: Counter = Counter()

    def start(self, *_) -> None:
        self.given.clear()
        self.calls.clear()

    def keep(self, tap: Tap, module: nn.Module, args: tuple, *output) -> None:
        self.calls[tap.name] += 1
        if tap.call is not None and self.calls[tap.name] - 1 != tap.call:
            return
        if tap.call is None and self.calls[tap.name] > 1:
            raise ValueError(f"tap {tap.name}: {tap.module} is called several times in one pass: say which with call=0")
        if not output and not args:
            raise ValueError(f"tap {tap.name}: {tap.module} takes its input by name: tap what gives that input")
        value = _tensor(output[0] if output else args[0], tap)
        nodes = as_nodes(value, node_axis(tap, module, value), tap.batch_axis)
        self.nodes[tap.name] = nodes.mean(dim=1, keepdim=True) if tap.pooled else nodes
        self.given[tap.name] = value, value._version
        if self.stop and len(self.given) == len(self.taps):
            self.check()
            raise AllRecorded

    def finish(self, _, args: tuple, __) -> None:
        shape = args[0].shape if args and isinstance(args[0], Tensor) else ()
        for tap in self.taps:
            if tap.name not in self.given:
                raise ValueError(f"tap {tap.name}: {tap.module} is not called in a pass: take a module that is")
            entries = len(self.nodes[tap.name])
            if shape and entries not in (shape[0], shape[min(tap.batch_axis, len(shape) - 1)]):
                raise ValueError(
                    f"tap {tap.name}: {entries} entries for {shape[0]} images: say where images lie with batch_axis, "
                    "or take a module that does not split them into windows"
                )
        self.check()

    def check(self) -> None:
        for tap in self.taps:
            value, version = self.given[tap.name]
            if value._version != version:
                raise ValueError(
                    f"tap {tap.name}: a later layer overwrites the output of {tap.module} in place: "
                    "tap what that layer gives, or build it with inplace=False"
                )


def _tensor(value, tap: Tap) -> Tensor:
    """The tensor that a module gives, or takes."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    if isinstance(value, Mapping):
        value = value.get("last_hidden_state", next(iter(value.values())) if len(value) == 1 else None)
    if not isinstance(value, Tensor):
        raise ValueError(
            f"tap {tap.name}: {tap.module} gives no tensor, but {type(value).__name__}: take one within it"
        )
    return value


CHANNELS_FIRST = (
    nn.Conv1d, nn.Conv2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.MaxPool1d, nn.MaxPool2d, nn.AvgPool1d, nn.AvgPool2d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.GroupNorm,
)  # fmt: skip


def node_axis(tap: Tap, module: nn.Module, activation: Tensor) -> int:
    """Where nodes lie in an activation: as the tap says; else behind images where a layer of channels gives it, or in
    square maps that follow them; else last. ValueError for maps that can be read in two ways."""
    if tap.axis is not None:
        return tap.axis
    shape = tuple(activation.shape)
    if len(shape) < 2:
        raise ValueError(f"tap {tap.name}: {tap.module} gives {shape or 'one number'}, which has no axis of nodes")
    while isinstance(module, nn.Sequential) and len(module):
        module = module[-1 if tap.side == "output" else 0]
    if isinstance(module, CHANNELS_FIRST) and len(shape) > 2:
        return 1
    if len(shape) in (2, 3):
        return -1
    if len(shape) == 4 and tap.batch_axis == 0 and (shape[1] == shape[2]) != (shape[2] == shape[3]):
        return 1 if shape[2] == shape[3] else 3
    raise ValueError(
        f"tap {tap.name}: an activation of {shape} may have {shape[1]} nodes or {shape[-1]}: "
        f"say which with axis=1 or axis={len(shape) - 1}"
    )


def as_nodes(activation: Tensor, axis: int = -1, batch_axis: int = 0) -> Tensor:
    """An activation with nodes and images on these axes -> (n, T, D): all other axes are positions."""
    moved = activation.movedim((batch_axis, axis), (0, -1))
    return moved.flatten(1, -2) if moved.ndim > 2 else moved[:, None]


@torch.no_grad()
def list_taps(network: nn.Module, batch: Tensor) -> pd.DataFrame:
    """What can be tapped in a network, in the order in which a pass of one batch (what the network takes) calls it:
    module (path), kind, shape (as the module gives it), positions and nodes (as `recording` reads it), note (or why it
    does not)."""
    rows, hooks = [], []

    def look(path: str):
        def hook(module, _, output) -> None:
            row = {"module": path, "kind": type(module).__name__, "shape": None, "positions": None, "nodes": None}
            try:
                value = _tensor(output, Tap(0, path, path))
                row["shape"] = tuple(value.shape)
                _, row["positions"], row["nodes"] = as_nodes(value, node_axis(Tap(0, path, path), module, value)).shape
                rows.append(row | {"note": ""})
            except ValueError as error:
                rows.append(row | {"note": str(error).partition(": ")[2]})

        return hook

    try:
        hooks = [module.register_forward_hook(look(path)) for path, module in network.named_modules() if path]
        network.eval()(batch)
    finally:
        for hook in hooks:
            hook.remove()
    columns = ["module", "kind", "shape", "positions", "nodes", "note"]
    table = pd.DataFrame(rows, columns=columns).astype({"positions": "Int64", "nodes": "Int64"})
    called = table.module.map(table.module.value_counts())
    return table.assign(note=table.note.where(called == 1, "called several times: say which with call=0"))


@torch.no_grad()
def activations(
    network: nn.Module, taps: Iterable[Tap], images: Tensor, mean: Tensor, std: Tensor, batch_size: int = BATCH
) -> Iterator[dict[str, Tensor]]:
    """Batches of activations of uint8 images in their order, fp32, in evaluation mode: tap name -> (b, T, D)."""
    network.eval()
    with recording(network, taps) as recorded:
        for batch in images.split(batch_size):
            network(normalise(batch, mean, std))
            yield {name: counted(value.float(), positions(batch), name) for name, value in recorded.items()}
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
            batch = images[start : start + batch_size]
            with suppress(AllRecorded):
                network(normalise(batch, mean, std))
            for tap in taps:
                part = counted(recorded.pop(tap.name).float(), positions(batch), tap.name)
                if tap.name not in found:
                    found[tap.name] = part.new_empty(len(images), *part.shape[1:])
                found[tap.name][start : start + batch_size] = part
    return found


def counted(nodes: Tensor, there: Tensor | None, name: str = "") -> Tensor:
    """Activations (n, T, D) that are 0 where there is no word, (n, T), so that padding says nothing. ValueError for a
    mean over positions, in which padding has a share."""
    if there is not None and name.endswith(".pooled"):
        raise ValueError(f"tap {name}: of texts, the mean over positions is one over padding, too: take another tap")
    return nodes if there is None or nodes.shape[:2] != there.shape else nodes * there.to(nodes)[:, :, None]


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
