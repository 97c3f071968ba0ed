"""Network + images + recipe -> trained network and learning curve, resumable after any epoch."""

import hashlib
import itertools
import math
import os
import sys
import time
import timeit
from collections.abc import Callable, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from paperlib import distributed, files, limit
from paperlib.data import BATCH, Images, augmented_batches, normalise
from paperlib.data.augmentation import augment
from paperlib.muon import Muon

CURVE_POINTS = 15  # a learning curve has at most so many test accuracies
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32, whoever asked before


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained. lr is the largest learning rate; warmup, label_smoothing and token_share are shares in
    0..1; shift is in pixels; augmentation is light, mixed or published (`data.augmentation`); max_steps cuts an epoch.
    """

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    warmup: float
    label_smoothing: float
    shift: int
    flip: bool
    optimizer: str = "adamw"
    token_share: float = 1.0
    augmentation: str = "light"
    decay: str = "linear"
    precision: str = "auto"
    max_steps: int = 0


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A CPU random generator of its own for each purpose, e.g. generator(seed, "augmentation", epoch)."""
    digest = hashlib.sha256(repr((seed, *purpose)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


@contextmanager
def seeded(seed: int, *purpose: object):
    """Seed torch's global generators (initialisation, dropout) for a block of code, and restore the CPU's after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator(seed, *purpose).initial_seed())
        yield


def best_device() -> torch.device:
    """cuda, else cpu (mps has no float64, in which sums over images are taken)."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


@cache
def fast_bf16(device_type: str) -> bool:
    """Whether bf16 matrix products are at least 1.2 times as fast as fp32: measured, as many CPUs emulate them."""
    if device_type != "cpu":
        return device_type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)

    def seconds(dtype: torch.dtype) -> float:
        a = torch.ones(512, 512, dtype=dtype)  # of smaller ones, what a call costs says more than the products
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=4))

    return seconds(torch.float32) > 1.2 * seconds(torch.bfloat16)


def in_bf16(precision: str, device: torch.device) -> bool:
    """Whether training steps take bf16: if `precision` is bf16, or auto where bf16 is fast."""
    return precision == "bf16" or (precision == "auto" and fast_bf16(device.type))


def autocast(precision: str, device: torch.device):
    """The context for a training step: bf16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if in_bf16(precision, device) else nullcontext()


def schedule(step: int, steps: int, warmup: float, decay: str = "linear") -> float:
    """Learning-rate factor in 0..1: linear rise in the first `warmup` of the steps, then linear or cosine decay."""
    rise = max(1, round(warmup * steps))
    left = (steps - step) / max(1, steps - rise + 1)
    return min((step + 1) / rise, left if decay == "linear" else math.sin(math.pi / 2 * min(1.0, left)) ** 2)


def optimizers(network: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """What updates a network's weights: AdamW, and for recipe.optimizer muon Muon on the encoders' weight matrices.

    Weight matrices and kernels decay; biases, norms and positions do not.
    """
    parts, decayed, free = [], [], []
    weights = {name: weight for name, weight in network.named_parameters() if weight.requires_grad}
    if recipe.optimizer == "muon":
        hidden = [name for name, weight in weights.items() if ".blocks." in name and weight.ndim == 2]
        if not hidden:
            raise ValueError("optimizer muon takes the weight matrices of encoders, and there are none: use adamw")
        matrices = [weights.pop(name) for name in hidden]
        parts.append(Muon(matrices, recipe.lr, recipe.weight_decay, bf16=in_bf16(recipe.precision, matrices[0].device)))
    for name, weight in weights.items():
        (decayed if weight.ndim > 1 and "positional" not in name else free).append(weight)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": free, "weight_decay": 0.0}]
    # The learning rate changes every step, but an unfused, looped AdamW would cost more than a small network's step.
    return [torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True), *parts]


def compiled(network: nn.Module, device: torch.device) -> nn.Module:
    """The network for training steps, compiled: on a GPU launched as one graph. Every shape (all tokens, a share of
    them, an epoch's last batch) is compiled by itself, and dropout draws what it draws without."""
    options = {"fallback_random": True} | ({"triton.cudagraphs": True} if device.type == "cuda" else {})
    return torch.compile(network, dynamic=False, options=options)


def train(
    network: nn.Module,
    data: Images,
    recipe: Recipe,
    seed: int,
    checkpoint: Path | None = None,
    log: Callable = print,
    compiling: bool = False,
) -> list[dict]:
    """Train `network` in place on the device that holds it and `data`; return the learning curve.

    One row an epoch: epoch, lr (at its end), loss (mean over its steps), test_accuracy (0..1; in the training's
    precision, the last one in fp32; None without test images, and at most epochs of more than `CURVE_POINTS`), seconds.
    With `checkpoint`, the state is saved after each epoch (written whole or not at all), and a later call with the same
    recipe and seed goes on from there: every random number derives from (seed, purpose, epoch) and the precision is the
    checkpoint's, so an interrupted training ends like an uninterrupted one. Raises ValueError for a checkpoint that
    does not fit, FloatingPointError with the step at which the loss stopped being finite (the last checkpoint stays),
    and `limit.TimeIsUp` before an epoch.
    `compiling` has steps `compiled`: faster on some machines, and equal up to rounding and a GPU's random numbers.
    Under `paperlib.distributed` every rank takes its share of each batch; rank 0's checkpoint and precision count.
    """
    device = data.x_train.device
    if recipe.token_share < 1 and not hasattr(getattr(network, "classifier", None), "token_share"):
        raise ValueError("token_share: this network has no tokens, so it must be 1")
    recipe, saved = distributed.broadcast(_with_checkpoint(recipe, checkpoint, device))
    parts = optimizers(network, recipe)
    known: dict[str, Any] = {"recipe": asdict(recipe), "seed": seed}
    if checkpoint is not None:  # else nothing has to wait for the device
        pixels = torch.cat(data.statistics).flatten().tolist()
        known["pixels"] = [len(data.x_train), *(round(value, 4) for value in pixels)]
    curve = []
    if saved is not None:
        with files.reading(checkpoint, "delete it to train anew"):
            curve = _resume(network, parts, saved, known)
        log(f"resuming after epoch {len(curve)}/{recipe.epochs}")
    parallel = compiled(network, device) if compiling else distributed.parallel(network)
    for epoch in range(len(curve), recipe.epochs):
        if checkpoint is not None:  # else all would be lost
            limit.before(f"epoch {epoch + 1} of {recipe.epochs}")
        start = time.monotonic()
        lr, losses = _train_epoch(network, parallel, parts, data, recipe, seed, epoch)
        _check_finite(losses, network, epoch)
        test = _curve_accuracy(network, data, recipe, epoch)
        row = {"epoch": epoch + 1, "lr": lr, "loss": losses.mean().item(), "test_accuracy": test}
        curve.append({**row, "seconds": round(time.monotonic() - start, 1)})
        scored = "" if test is None else f"  test accuracy {100 * test:.1f} %"
        log(f"epoch {epoch + 1}/{recipe.epochs}  loss {row['loss']:.3f}{scored}")
        if checkpoint is not None:
            states = [part.state_dict() for part in parts]
            with files.whole(checkpoint) as file:
                torch.save({**known, "curve": curve, "network": network.state_dict(), "optimizers": states}, file)
    network.eval()
    return curve


def _with_checkpoint(recipe: Recipe, checkpoint: Path | None, device: torch.device) -> tuple[Recipe, dict | None]:
    """The recipe with its precision settled (a checkpoint's own, as the training began), and what was saved."""
    saved = None
    if checkpoint is not None and checkpoint.exists():
        with files.reading(checkpoint, "delete it to train anew"):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if recipe.precision == "auto":  # as it began, whatever this machine is fast in
                recipe = replace(recipe, precision=saved["recipe"]["precision"])
    return replace(recipe, precision="bf16" if in_bf16(recipe.precision, device) else "fp32"), saved


def _resume(network: nn.Module, parts: list[torch.optim.Optimizer], saved: dict, known: dict) -> list[dict]:
    """Put a checkpoint's state into network and optimizers; returns its curve. ValueError if it is another's."""
    if any(saved[key] != value for key, value in known.items()):
        raise ValueError("it was written by another recipe or seed, or with other images")
    network.load_state_dict(saved["network"])
    for part, state in zip(parts, saved["optimizers"], strict=True):
        part.load_state_dict(state)
    return saved["curve"]


def _steps_per_epoch(images: int, recipe: Recipe) -> int:
    batches = -(-images // recipe.batch_size)
    return min(batches, recipe.max_steps or batches)


def _train_epoch(
    network: nn.Module, parallel: nn.Module, parts: list, data: Images, recipe: Recipe, seed: int, epoch: int
) -> tuple[float, Tensor]:
    """One epoch's steps; returns the last learning rate and each step's loss, mean over ranks. `parallel` is the
    network as ranks share it, or compiled. No step waits for the device."""
    network.train()
    rank, ranks = distributed.rank_and_ranks()
    per_epoch = _steps_per_epoch(len(data.x_train), recipe)
    steps, lr, losses = recipe.epochs * per_epoch, 0.0, torch.zeros(per_epoch, device=data.x_train.device)
    random = generator(seed, "batches", epoch)
    shift, flip = (0, False) if recipe.augmentation == "published" else (recipe.shift, recipe.flip)
    stream = augmented_batches(data.x_train, data.y_train, recipe.batch_size, shift, flip, random, (rank, ranks))
    with seeded(seed, "dropout", epoch, *range(rank)):  # rank 0 draws what a process of its own would
        batches = zip(range(per_epoch), stream, strict=False)
        for step, (images, labels) in progress(batches, per_epoch, f"epoch {epoch + 1}"):
            now = epoch * per_epoch + step
            lr = recipe.lr * schedule(now, steps, recipe.warmup, recipe.decay)
            for group in itertools.chain.from_iterable(part.param_groups for part in parts):
                group["lr"] = lr
            if recipe.token_share < 1:  # all tokens in the last fifth, as in evaluation
                network.classifier.token_share = recipe.token_share if now < 0.8 * steps else 1.0
            share = min(recipe.batch_size, len(data.x_train) - step * recipe.batch_size) / ranks
            images, labels = augment(recipe.augmentation, images, labels, *data.statistics, len(data.classes))
            losses[step] = training_step(parallel, parts, images, labels, recipe, share)
    return lr, distributed.all_reduce(losses).div_(ranks)


def _check_finite(losses: Tensor, network: nn.Module, epoch: int) -> None:
    """Raise FloatingPointError if an epoch diverged. A step's loss judges the weights before it; those after the last
    step are looked at themselves."""
    bad = (~losses.isfinite()).nonzero()
    if len(bad) or not torch.stack([weight.isfinite().all() for weight in network.parameters()]).all():
        step = bad[0].item() + 1 if len(bad) else len(losses)
        raise FloatingPointError(
            f"training diverged at step {step} of epoch {epoch + 1}: lower lr, or look for odd images"
        )


def _curve_accuracy(network: nn.Module, data: Images, recipe: Recipe, epoch: int) -> float | None:
    """Test accuracy after an epoch that the curve shows, else None."""
    last = epoch + 1 == recipe.epochs
    if not len(data.x_test) or not (last or (epoch + 1) % -(-recipe.epochs // CURVE_POINTS) == 0):
        return None
    with autocast("fp32" if last else recipe.precision, data.x_train.device):
        return accuracy(network, data)


def training_step(
    network: nn.Module, parts: list[torch.optim.Optimizer], images: Tensor, labels: Tensor, recipe: Recipe, share: float
) -> Tensor:
    """Forward, backward and update on normalised images; returns the loss, on the device, so that nothing waits.

    share is the number of images in a rank's mean share of the batch, by which the sum of their losses is divided.
    """
    with autocast(recipe.precision, images.device):
        logits = network(images)
    loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing, reduction="sum") / share
    loss.backward()
    for part in parts:
        part.step()
        part.zero_grad()
    return loss.detach()


@torch.no_grad()
def predict(network: nn.Module, images: Tensor, mean: Tensor, std: Tensor, batch_size: int = BATCH) -> Tensor:
    """Logits (n, L) of uint8 images, fp32, in evaluation mode."""
    network.eval()
    return torch.cat([network(normalise(batch, mean, std)) for batch in images.split(batch_size)])


def accuracy(network: nn.Module, data: Images) -> float:
    """Share of test images (0..1) whose largest logit is their label's."""
    rank, ranks = distributed.rank_and_ranks()
    logits = predict(network, data.x_test[rank::ranks], *data.statistics)
    right = distributed.all_reduce((logits.argmax(dim=1) == data.y_test[rank::ranks]).sum())
    return right.item() / len(data.y_test)


def progress(items: Iterable, total: int, label: str) -> Iterable:
    """A progress bar where somebody watches (a terminal or a live notebook), nothing in a headless run."""
    watched = "PAPERLIB_HEADLESS" not in os.environ and (sys.stderr.isatty() or "ipykernel" in sys.modules)
    return tqdm(items, total=total, desc=label, leave=False) if watched else items
