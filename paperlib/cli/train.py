"""Train the networks of a profile into its run folder, where the notebooks find them.

On several devices or machines: torchrun --nproc-per-node 8 -m paperlib train cifar100

With --commit, one network of one seed is stored in half precision, scored and described on a card, to be committed:
python -m paperlib train cifar100-cpu --commit --seed 0. It trains as a run of the profile would, and goes on where it
was interrupted. A network that is there already stays, unless --replace is given: what was measured on it would no
longer fit.
"""

import argparse
import json
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from safetensors.torch import save

from paperlib import data, files, models, training
from paperlib.cli import add_changes, add_limit
from paperlib.distributed import broadcast, check_same, rank_and_ranks
from paperlib.experiment import networks, settings
from paperlib.experiment.store import Run
from paperlib.models import cards, reference


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE")
    parser.add_argument("--seed", type=int, help="this seed instead of the profile's")
    parser.add_argument("--cnn", action="store_true", help="the profile's CNN instead of its transformer")
    parser.add_argument("--commit", action="store_true", help="store the network of --seed to be committed")
    parser.add_argument("--replace", action="store_true", help="write over a committed network of this name")
    parser.add_argument("--compile", action="store_true", help="compile training steps (torch.compile): for GPUs")
    add_limit(parser)
    add_changes(parser)


def execute(options: argparse.Namespace) -> int:
    changes = settings.changes_of(options.set) | {"weights": "trained"}
    if options.seed is not None:
        changes["seeds"] = [options.seed]
    if options.commit:
        if options.seed is None:
            raise ValueError("--commit stores one network: say which with --seed")
        commit(options.profile, changes, options.cnn, options.replace, options.compile)
        return 0
    settings.load_settings(options.profile, changes)
    if "LOCAL_RANK" in os.environ:
        if options.minutes is not None or options.compile:
            raise ValueError("--minutes and --compile are for one process: leave them out under torchrun")
        return train_along(options.profile, changes, options.cnn)
    run = _opened(options.profile, changes, options.cnn)
    for seed in run.settings.seeds:
        networks.train(run, seed, options.compile)
    return 0


def _opened(profile: str, changes: dict, cnn: bool) -> Run:
    run = settings.open_run(profile, changes)
    return networks.cnn_half(run) if cnn else run


def train_along(profile: str, changes: dict, cnn: bool) -> int:
    """Train on all ranks of torchrun; rank 0 keeps the run folder (see `paperlib.distributed` for what they share)."""
    local = int(os.environ["LOCAL_RANK"])
    if 0 < torch.cuda.device_count() <= local:
        raise ValueError(f"there are {torch.cuda.device_count()} GPUs: give --nproc-per-node at most that many")
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    # The other ranks wait while the first one downloads the data.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    rank, _ = rank_and_ranks()
    run = None  # the first rank, the first of each machine, all: what has to be downloaded is downloaded once,
    for turn in (rank == 0, local == 0, True):  # whether machines share a folder or not
        run = run or (_opened(profile, changes, cnn) if turn else None)
        dist.barrier()
    check_same(run.data_sha256, "images")
    for seed in run.settings.seeds:
        if rank == 0:
            if not networks.train(run, seed).fresh:
                broadcast(False)
        elif broadcast(None):  # rank 0 is about to train
            network, images = networks.build_network(run, seed), run.images.seen.to(training.best_device())
            training.train(network, images, networks.recipe(run), seed, log=lambda line: None)
    dist.barrier()  # nobody leaves while another still talks to it
    dist.destroy_process_group()
    return 0


def commit(profile: str, changes: dict, cnn: bool, replace: bool, compiling: bool) -> None:
    """Train the one network of these settings, or take the trained one, and write its file and its card."""
    if changes.get("limit"):
        raise ValueError("a committed network is trained on all images: leave limit out")
    run = _opened(profile, changes, cnn)
    (seed,) = run.settings.seeds
    name = settings.reference_name(run.settings, seed)
    if run.settings.data not in data.SPLITS:
        raise ValueError(f"{run.settings.data} has no licence that a card could name: train on it with ./run_all.sh")
    if name in models.references() and not replace:
        raise ValueError(f"{name} is there already, and measured on: take another --seed, or --replace it")
    stage = networks.train(run, seed, compiling)
    weights = {
        key: value.half() if value.is_floating_point() else value for key, value in stage.tensors("weights").items()
    }
    if not all(value.isfinite().all() for value in weights.values()):
        raise ValueError(f"{name}: a weight is too large for half precision")
    facts = networks.facts(run, seed, stage, weights)
    reference.FOLDER.mkdir(exist_ok=True)
    with files.whole(reference.FOLDER / f"{name}.safetensors") as file:
        file.write(save(weights, {"card": json.dumps(facts)}))
    files.write_text(reference.FOLDER / f"{name}.md", cards.page(name))
    print(f"{name}: test accuracy {facts['test_accuracy']:.2%}")
