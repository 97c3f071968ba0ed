"""Train the networks of a profile on several devices or machines; the notebooks then find them.

torchrun --nproc-per-node 8 notebooks/train_distributed.py cifar100 [--set NAME=VALUE ...]

Rank 0 keeps the run folder. See paperlib/distributed.py for what the ranks share.
"""

import argparse
import os
import sys
from datetime import timedelta

import parameters
import stages
import torch
import torch.distributed as dist

from paperlib import training
from paperlib.distributed import broadcast, rank_and_ranks


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("profile", nargs="?", default="quick")
    result.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    return result


def main(arguments: list[str] | None = None) -> int:
    """Train on all ranks; exit code 2 for wrong arguments."""
    options = parser().parse_args(arguments)
    try:
        if "LOCAL_RANK" not in os.environ:
            raise ValueError("start this with torchrun --nproc-per-node <devices>, see the README")
        changes = parameters.changes_of(options.set)
        if parameters.load_settings(options.profile, changes).weights == "reference":
            raise ValueError("the profile starts from committed networks: add weights=trained to train anew")
        if 0 < torch.cuda.device_count() <= int(os.environ["LOCAL_RANK"]):
            raise ValueError(f"there are {torch.cuda.device_count()} GPUs: give --nproc-per-node at most that many")
    except (ValueError, OSError) as error:
        print(f"train_distributed: {error}", file=sys.stderr)
        return 2
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # The other ranks wait while the first one downloads the data.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    try:
        rank, _ = rank_and_ranks()
        run = None  # the first rank, the first of each machine, all: what has to be downloaded is downloaded once,
        for turn in (rank == 0, os.environ["LOCAL_RANK"] == "0", True):  # whether machines share a folder or not
            run = run or (parameters.open_run(options.profile, changes) if turn else None)
            dist.barrier()
        for seed in run.settings.seeds:
            if rank == 0:
                if not stages.train(run, seed).fresh:
                    broadcast(False)
            elif broadcast(None):  # rank 0 is about to train
                network, images = stages.build_network(run, seed), run.images.to(training.best_device())
                training.train(network, images, stages.recipe(run), seed, log=lambda line: None)
        dist.barrier()  # nobody leaves while another still talks to it
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"train_distributed: {error}", file=sys.stderr)
        return 1  # without taking the group down: nccl would wait there for ranks that wait for this one
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
