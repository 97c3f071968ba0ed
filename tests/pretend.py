"""A device that this machine does not have, and that computes all the same: tensors say that they lie there, while the
CPU works out their values. Whatever mixes the two raises, as CUDA does."""

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

backend_registration._setup_privateuseone_for_python_backend("elsewhere")
DEVICE = torch.device("elsewhere:0")
MIXED = ("index.Tensor", "index_put", "copy_", "_to_copy")  # operations that take tensors of both


class Elsewhere(torch.Tensor):
    """A tensor on the pretended device, and the CPU tensor that holds its values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.inner.tolist()

    def numpy(self, *, force=False):
        if not force:
            raise TypeError(f"can't convert a tensor of {DEVICE} to numpy: use Tensor.cpu() first")
        return self.inner.numpy(force=True)

    def __repr__(self):
        return f"Elsewhere({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """Within it, tensors can be made on, and moved to, the pretended device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return computed(func, args, kwargs or {})


def computed(func, args, kwargs):
    given, _ = tree_flatten((args, kwargs))
    tensors = [value for value in given if isinstance(value, torch.Tensor)]
    there = [value for value in tensors if isinstance(value, Elsewhere)]
    name, device = func._schema.name.split("::")[1] + "." + func._schema.overload_name, kwargs.get("device")
    if (
        there
        and not name.startswith(MIXED)
        and any(value.ndim and not isinstance(value, Elsewhere) for value in tensors)
    ):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found {DEVICE} and cpu")
    wanted = torch.device(device) if device is not None else (DEVICE if there else torch.device("cpu"))
    generator = kwargs.get("generator")
    if wanted.type != "cpu" and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{name}: expected a generator of {DEVICE} but found one of the cpu")
    if "device" in kwargs:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}
    plain = tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, (args, kwargs))
    result = func(*plain[0], **plain[1])
    if not func._schema.returns:
        return None
    if func._schema.name[-1] == "_" and not func._schema.name.endswith("__"):  # in place: the tensor itself
        return args[0]
    for before in (value for value in given if isinstance(value, Elsewhere)):
        if result is before.inner:
            return before
    if wanted.type == "cpu" and (device is not None or not there):
        return result
    return tree_map(lambda value: Elsewhere(value) if isinstance(value, torch.Tensor) else value, result)
