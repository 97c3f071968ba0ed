"""Training on several devices or machines: PyTorch's DistributedDataParallel, started by torchrun.

    torchrun --nproc-per-node 8 -m paperlib.distributed cifar100 [--set name=value ...]

Every rank walks the same random batches and takes its share of each, so the result is that of one process with the
same batch size, up to the order of sums (with dropout or stochastic depth, whose random numbers differ by rank, up to
chance). Rank 0 keeps the run folder; the notebooks then find the networks there. Outside torchrun nothing here acts.
"""

import argparse
import os
import sys
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def place() -> tuple[int, int]:
    """(rank, number of ranks); (0, 1) for a process of its own."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def total(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def share(value: Any) -> Any:
    """Rank 0's value, on every rank."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values)
    return values[0]


def parallel(network: nn.Module) -> nn.Module:
    """The network with gradients averaged over ranks, starting from rank 0's weights."""
    if not dist.is_initialized():
        return network
    device = next(network.parameters()).device
    return nn.parallel.DistributedDataParallel(network, device_ids=[device] if device.type == "cuda" else None)


def main(arguments: list[str] | None = None) -> int:
    """Train the networks of a profile on all ranks; exit code 2 for wrong arguments."""
    from paperlib import runs, stages, training

    parser = argparse.ArgumentParser(
        prog="paperlib.distributed", description="Train a profile's networks on all ranks."
    )
    parser.add_argument("profile", nargs="?", default="quick")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    options = parser.parse_args(arguments)
    try:
        if "LOCAL_RANK" not in os.environ:
            raise ValueError(
                "start this with torchrun, e.g. torchrun --nproc-per-node 8 -m paperlib.distributed cifar100"
            )
        changes = runs.changes_of(options.set)
        runs.load_settings(options.profile, changes)
    except (ValueError, OSError) as error:
        print(f"paperlib.distributed: {error}", file=sys.stderr)
        return 2
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The other ranks wait while the first one downloads the data.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    try:
        rank, _ = place()
        # Rank 0 first, so that what has to be downloaded is downloaded once.
        run = runs.open_run(options.profile, changes) if rank == 0 else None
        share(None)
        run = run or runs.open_run(options.profile, changes)
        for seed in run.settings.seeds:
            if rank == 0:
                if not stages.train(run, seed).fresh:
                    share(False)
            elif share(None):  # rank 0 is about to train
                network, images = stages.build_network(run, seed), run.images.to(training.best_device())
                training.train(network, images, stages.recipe(run), seed, log=lambda line: None)
        dist.barrier()  # nobody leaves while another still talks to it
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
