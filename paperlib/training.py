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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from paperlib import distributed, files
from paperlib.augmentation import augment
from paperlib.data import BATCH, Images, augmented_batches, normalise
from paperlib.muon import Muon

CURVE_POINTS = 15  # a learning curve has at most so many test accuracies
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32, whoever asked before


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a network is trained; every field has its unit in `parameters.Settings`."""

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


def train(
    network: nn.Module, data: Images, recipe: Recipe, seed: int, checkpoint: Path | None = None, log: Callable = print
) -> list[dict]:
    """Train `network` in place on the device that holds it and `data`; return the learning curve.

    One row an epoch: epoch, lr (at its end), loss (mean over its steps), test_accuracy (0..1; in the training's
    precision, the last one in fp32; None without test images, and at most epochs of more than `CURVE_POINTS`), seconds.
    With `checkpoint`, the state is saved after each epoch (written whole or not at all), and a later call with the same
    recipe and seed goes on from there: every random number derives from (seed, purpose, epoch) and the precision is the
    checkpoint's, so an interrupted training ends like an uninterrupted one. Raises ValueError for a checkpoint that
    does not fit, FloatingPointError with the step at which the loss stopped being finite (the last checkpoint stays).
    Under `paperlib.distributed` every rank takes its share of each batch; rank 0's checkpoint and precision count.
    """
    rank, ranks = distributed.rank_and_ranks()
    device = data.x_train.device
    mean, std = data.statistics
    if recipe.token_share < 1 and not hasattr(getattr(network, "classifier", None), "token_share"):
        raise ValueError("token_share: this network has no tokens, so it must be 1")
    batches = -(-len(data.x_train) // recipe.batch_size)
    steps_per_epoch = min(batches, recipe.max_steps or batches)
    steps = recipe.epochs * steps_per_epoch
    curve, saved = [], None
    if checkpoint is not None and checkpoint.exists():
        with files.reading(checkpoint, "delete it to train anew"):
            saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
            if recipe.precision == "auto":  # as it began, whatever this machine is fast in
                recipe = replace(recipe, precision=saved["recipe"]["precision"])
    recipe = replace(recipe, precision="bf16" if in_bf16(recipe.precision, device) else "fp32")
    recipe, saved = distributed.broadcast((recipe, saved))
    parts, known = optimizers(network, recipe), {"recipe": asdict(recipe), "seed": seed}
    if checkpoint is not None:  # else nothing has to wait for the device
        known["pixels"] = [len(data.x_train), *(round(x, 4) for x in torch.cat((mean, std)).flatten().tolist())]
    if saved is not None:
        with files.reading(checkpoint, "delete it to train anew"):
            if any(saved[key] != value for key, value in known.items()):
                raise ValueError("it was written by another recipe or seed, or with other images")
            network.load_state_dict(saved["network"])
            for part, state in zip(parts, saved["optimizers"], strict=True):
                part.load_state_dict(state)
            curve = saved["curve"]
        log(f"resuming after epoch {len(curve)}/{recipe.epochs}")
    parallel = distributed.parallel(network)
    for epoch in range(len(curve), recipe.epochs):
        start = time.monotonic()
        network.train()
        losses = torch.zeros(steps_per_epoch, device=device)
        random = generator(seed, "batches", epoch)
        shift, flip = (0, False) if recipe.augmentation == "published" else (recipe.shift, recipe.flip)
        stream = augmented_batches(data.x_train, data.y_train, recipe.batch_size, shift, flip, random, (rank, ranks))
        with seeded(seed, "dropout", epoch, *range(rank)):  # rank 0 draws what a process of its own would
            steps_in_epoch = zip(range(steps_per_epoch), stream, strict=False)
            for step, (images, labels) in progress(steps_in_epoch, steps_per_epoch, f"epoch {epoch + 1}"):
                lr = recipe.lr * schedule(epoch * steps_per_epoch + step, steps, recipe.warmup, recipe.decay)
                if recipe.token_share < 1:  # all tokens in the last fifth, as in evaluation
                    early = epoch * steps_per_epoch + step < 0.8 * steps
                    network.classifier.token_share = recipe.token_share if early else 1.0
                for group in itertools.chain.from_iterable(part.param_groups for part in parts):
                    group["lr"] = lr
                share = min(recipe.batch_size, len(data.x_train) - step * recipe.batch_size) / ranks
                images, labels = augment(recipe.augmentation, images, labels, mean, std, len(data.classes))
                losses[step] = training_step(parallel, parts, images, labels, recipe, share)
        distributed.all_reduce(losses).div_(ranks)
        # A step's loss judges the weights before it; those after the last step are looked at themselves.
        bad = (~losses.isfinite()).nonzero()
        if len(bad) or not all(weight.isfinite().all() for weight in network.parameters()):
            raise FloatingPointError(
                f"training diverged at step {bad[0].item() + 1 if len(bad) else steps_per_epoch} of epoch {epoch + 1}: "
                "lower lr, or look for odd images"
            )
        test, last = None, epoch + 1 == recipe.epochs
        if len(data.x_test) and (last or (epoch + 1) % -(-recipe.epochs // CURVE_POINTS) == 0):
            with autocast("fp32" if last else recipe.precision, device):
                test = accuracy(network, data)
        row = {"epoch": epoch + 1, "lr": lr, "loss": losses.mean().item(), "test_accuracy": test}
        curve.append({**row, "seconds": round(time.monotonic() - start, 1)})
        scored = "" if test is None else f"  test accuracy {100 * test:.1f} %"
        log(f"epoch {epoch + 1}/{recipe.epochs}  loss {row['loss']:.3f}{scored}")
        if checkpoint is not None:
            parts_state = [part.state_dict() for part in parts]
            state = {**known, "curve": curve, "network": network.state_dict(), "optimizers": parts_state}
            with files.whole(checkpoint) as file:
                torch.save(state, file)
    network.eval()
    return curve


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
