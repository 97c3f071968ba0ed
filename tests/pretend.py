"""A device that this machine does not have, and that computes all the same: its tensors have no memory that the CPU
reads, and what mixes them with the CPU's raises, as on a GPU; their values are worked out by the CPU behind the scenes.

`waits` lists what a GPU would have made the program wait for: reading a value, and copies that are not asked for as
non_blocking, with the operation and the line of the package that called it.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

import paperlib

backend_registration._setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")
COPIES = ("copy_", "_to_copy", "_copy_from")
BOTH = (*COPIES, "index", "index_put_", "index_put", "_index_put_impl_")  # may take tensors of the CPU, too
READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "is_nonzero",
    "equal",
    "bincount",
    "_unique2",
    "unique_consecutive",
)
PACKAGE = str(Path(paperlib.__file__).parent)
_waits: list[list[str]] = []


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device, and the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "dtype": inner.dtype}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, device=DEVICE, **layout)

    def __init__(self, inner: torch.Tensor):
        self.inner = inner

    def tolist(self):
        _note("tolist")
        return self.inner.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert a tensor of {DEVICE} to numpy: use Tensor.cpu() first")
        return self.detach().inner.numpy()

    def __array__(self, *_, **__):
        return self.numpy()

    def __reduce_ex__(self, protocol):
        return self.detach().inner.__reduce_ex__(protocol)  # files hold values

    def __repr__(self, **_):
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


@contextmanager
def waits() -> Iterator[list[str]]:
    """What the program waits for in the block."""
    _waits.append([])
    try:
        yield _waits[-1]
    finally:
        _waits.pop()


def _note(name: str) -> None:
    if _waits:
        lines = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
        where = f"{Path(lines[-1].filename).name}:{lines[-1].lineno} {lines[-1].line}" if lines else ""
        _waits[-1].append(f"{name} in {where}")


def computed(func, args: tuple, kwargs: dict):
    """What an operation does to the values behind tensors, and its results as tensors of the device."""
    name, tensors = func._schema.name.split("::")[1], [v for v in tree_leaves((args, kwargs)) if _is_tensor(v)]
    elsewhere = [value for value in tensors if isinstance(value, Elsewhere)]
    if name not in BOTH and any(value.ndim and not isinstance(value, Elsewhere) for value in tensors):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    if getattr(kwargs.get("generator"), "device", DEVICE).type != DEVICE.type:
        raise RuntimeError(f"{name}: expected a generator of {DEVICE}, but found one of the cpu")
    _look_for_waits(name, args, kwargs, mixed=len(elsewhere) < len(tensors))
    there = torch.device(kwargs.get("device") or DEVICE).type == DEVICE.type
    plain, options = tree_map(lambda v: v.inner if isinstance(v, Elsewhere) else v, (args, kwargs))
    if "device" in options:
        options["device"] = torch.device("cpu")
    result = func(*plain, **options)
    written = [
        given
        for argument, given in zip(func._schema.arguments, args, strict=False)
        if argument.alias_info and argument.alias_info.is_write
    ] + [given for key, given in kwargs.items() if key == "out" or key.startswith("out")]
    if not func._schema.returns:
        return None
    if written and func._schema.returns[0].alias_info:  # in place, or into what was given
        return written[0] if len(func._schema.returns) == 1 else tuple(written)
    return tree_map(lambda v: Elsewhere(v) if _is_tensor(v) else v, result) if there else result


def _look_for_waits(name: str, args: tuple, kwargs: dict, mixed: bool) -> None:
    to_cpu = torch.device(kwargs.get("device") or DEVICE).type != DEVICE.type
    blocking = not (kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2]))
    waiting = name.startswith("index") and any(
        _is_tensor(v) and v.ndim and (v.dtype == torch.bool or not isinstance(v, Elsewhere))
        for v in tree_leaves(args[1])
    )
    if name in READS or waiting or (name in COPIES and (mixed or to_cpu) and blocking):
        _note(name)


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


def _empty(size, *, dtype=None, memory_format=None, **_):
    return Elsewhere(torch.empty(size, dtype=dtype, memory_format=memory_format or torch.contiguous_format))


def _empty_strided(size, stride, *, dtype=None, **_):
    return Elsewhere(torch.empty_strided(size, stride, dtype=dtype))


library = torch.library.Library("aten", "IMPL")
library.impl("empty.memory_format", _empty, "PrivateUse1")
library.impl("empty_strided", _empty_strided, "PrivateUse1")


def _copy_from(source, target, non_blocking=False):
    return computed(torch.ops.aten.copy_.default, (target, source, non_blocking), {})


library.impl("_copy_from", _copy_from, "PrivateUse1")
