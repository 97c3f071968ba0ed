"""Training on several devices or machines: PyTorch's DistributedDataParallel (torchrun -m paperlib train).

Every rank walks the same random batches and takes its share of each, so the result is that of one process with the
same batch size, up to the order of sums; up to chance with dropout, stochastic depth, token_share, mixed or published
augmentation, whose random numbers differ by rank; and not for a CNN, whose batch norm sees a rank's share only.
"""

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn


def rank_and_ranks() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) for a process of its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def all_reduce(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def check_same(value: str, what: str) -> None:
    """Raise ValueError, on every rank, unless this is the same on all of them."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    if other := [rank for rank, theirs in enumerate(values) if theirs != values[0]]:
        raise ValueError(f"rank {other[0]} has other {what} than rank 0: give all machines the same")


def parallel(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over ranks, starting from rank 0's weights."""
    if not dist.is_initialized():
        return network
    device = next(network.parameters()).device
    return nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)
