"""Taps + labels -> one linear readout per tap, all trained in the same passes over the frozen network."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paperlib import distributed, files
from paperlib.data import BATCH, augmented_batches, normalise
from paperlib.snp import class_sums, means_of
from paperlib.taps import Tap, activations, recording
from paperlib.training import autocast, generator, in_bf16, progress, schedule

SAVE_SECONDS = 300  # between two checkpoints, which for many taps are gigabytes


@dataclass(frozen=True)
class ReadoutRecipe:
    """How readouts are trained; shift is in pixels, l2 the penalty's factor, max_steps cuts an epoch. A tap's learning
    rate is lr over the square root of its number of features, as the weights are, so that taps of any size learn alike.
    """

    epochs: int
    batch_size: int
    lr: float
    l2: float
    shift: int
    flip: bool
    precision: str = "fp32"
    max_steps: int = 0


def train_readouts(
    network: nn.Module,
    taps: list[Tap],
    images: Tensor,
    labels: Tensor,
    num_labels: int,
    mean: Tensor,
    std: Tensor,
    recipe: ReadoutRecipe,
    seed: int,
    log: Callable[[str], None] = print,
    penalty: Callable[[str, float], float] | None = None,
    checkpoint: Path | None = None,
    lengths: Sequence[int] = (),
) -> dict[str, Tensor]:
    """Train a readout on each tap of a frozen network: uint8 images, labels -> tap name -> weight (L, T, D), fp32.

    A readout is linear, without bias, from all T*D activations to the L labels (family). It aims at the minimum of mean
    cross-entropy + l2/2 |W|^2 on activations divided by their RMS over training images (choice); the RMS is absorbed
    into the weights returned. Adam with coupled L2 and a learning rate that falls to 0 gets there (choice). `penalty`
    gives a tap's l2 from its name and RMS. `lengths`, several numbers of epochs in place of the recipe's, give one
    readout each from one start, `tap@length`. With `checkpoint`, what was stopped goes on from the last state saved
    (after an epoch, every `SAVE_SECONDS`), to the same end; ValueError for another's.
    """
    epochs = max(lengths, default=recipe.epochs)
    ends = [(tap.name, tap.name + f"@{end}" * bool(lengths), end) for tap in taps for end in lengths or [epochs]]
    precision = "bf16" if in_bf16(recipe.precision, images.device) else "fp32"
    scales = _rms(network, taps, images[:1024], mean, std)
    weights, groups = {}, []
    with recording(network, taps) as recorded, torch.no_grad():
        network.eval()
        network(normalise(images[:1], mean, std))
        for tap, name, _ in ends:
            features = recorded[tap][0].numel()
            start = torch.rand(num_labels, features, generator=generator(seed, "readout", tap)) * 2 - 1
            weights[name] = (start / features**0.5).to(images.device)
            l2 = penalty(tap, scales[tap]) if penalty else recipe.l2
            groups.append({"params": [weights[name]], "weight_decay": l2, "rate": recipe.lr / features**0.5})
        adam = torch.optim.Adam(groups, lr=recipe.lr, fused=True)
        done, known = 0, {"recipe": asdict(recipe), "seed": seed, "taps": list(weights)}
        if checkpoint is not None and checkpoint.exists():
            with files.reading(checkpoint, "delete it to train anew"):
                saved = torch.load(checkpoint, map_location=images.device, weights_only=True)
                alike = all(abs(saved["scales"][tap] / scale - 1) < 1e-3 for tap, scale in scales.items())
                if any(saved[key] != value for key, value in known.items()) or not alike:
                    raise ValueError("it was written with another recipe, seed, network or images, or for other taps")
                adam.load_state_dict(saved.pop("adam"))
                for name, weight in weights.items():
                    weight.copy_(saved["weights"].pop(name))  # with every copy one less to hold
                done, scales, precision = (saved[key] for key in ("epochs", "scales", "precision"))  # as it began
            log(f"readouts, resuming after epoch {done}/{epochs}")
        batches, last = -(-len(images) // recipe.batch_size), time.monotonic()
        steps_per_epoch = min(batches, recipe.max_steps or batches)
        for epoch in range(done, epochs):
            running = {name: tap for tap, name, end in ends if epoch < end}
            for name, weight in weights.items():
                weight.grad = torch.zeros_like(weight) if name in running else None  # without, Adam leaves it alone
            losses = torch.zeros(len(running), device=images.device)
            random = generator(seed, "readout batches", epoch)
            stream = augmented_batches(images, labels, recipe.batch_size, recipe.shift, recipe.flip, random)
            steps = zip(range(steps_per_epoch), stream, strict=False)
            for step, (batch, batch_labels) in progress(steps, steps_per_epoch, f"readouts, epoch {epoch + 1}"):
                with autocast(precision, images.device):  # the frozen network only; the readouts are fp32
                    network(normalise(batch, mean, std))
                for index, (name, tap) in enumerate(running.items()):
                    activation = recorded[tap].flatten(1).float()
                    losses[index] += _gradient(weights[name], activation, scales[tap], batch_labels)
                for group, (_, _, end) in zip(adam.param_groups, ends, strict=True):
                    group["lr"] = group["rate"] * schedule(epoch * steps_per_epoch + step, end * steps_per_epoch, 0.0)
                adam.step()
            _check_losses(dict(zip(running, losses / steps_per_epoch, strict=True)), num_labels)
            if checkpoint is not None and epoch + 1 < epochs and time.monotonic() - last >= SAVE_SECONDS:
                known |= {"scales": scales, "precision": precision, "epochs": epoch + 1}
                with files.whole(checkpoint) as file:
                    torch.save(known | {"weights": weights, "adam": adam.state_dict()}, file)
                last = time.monotonic()
            log(f"readouts, epoch {epoch + 1}/{epochs}  mean loss {losses.mean() / steps_per_epoch:.3f}")
        return {name: (weights[name] / scales[tap]).unflatten(1, recorded[tap].shape[1:]) for tap, name, _ in ends}


def _check_losses(losses: dict[str, Tensor], num_labels: int) -> None:
    """Raise FloatingPointError if a readout answers far worse than one that knows nothing (loss ln L)."""
    for name, loss in losses.items():
        if not loss < 1000 * math.log(num_labels):  # so also for nan
            raise FloatingPointError(f"the readout of {name} diverged (mean loss {loss:.3g}): lower readout_lr")


def _gradient(weight: Tensor, features: Tensor, scale: float, labels: Tensor) -> Tensor:
    """Fill weight.grad with the gradient of the mean cross-entropy of (features / scale) @ weight.T; return that loss.

    Written out, because autograd would copy the features and allocate a gradient of the weight's size at each step.
    """
    logits = F.linear(features, weight) / scale
    loss = F.cross_entropy(logits, labels)
    error = (logits.softmax(dim=1) - F.one_hot(labels, len(weight))) / (len(labels) * scale)
    error.masked_fill_(error.abs() < 1e-30, 0.0)  # next to nothing; denormal numbers make the product ten times slower
    torch.mm(error.T, features, out=weight.grad)
    return loss


@dataclass(frozen=True)
class Measured:
    """What one pass over a set of images gives, for every tap."""

    class_means: dict[str, Tensor]  # (L, T, D)
    correct: dict[str, Tensor]  # (n,) bool: the readout's largest field is the image's label
    head_correct: dict[str, Tensor]  # (n, H) bool: the same with all other heads silenced; taps with heads only


@torch.no_grad()
def measure(
    network: nn.Module,
    taps: list[Tap],
    weights: dict[str, Tensor],
    images: Tensor,
    labels: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Measured:
    """Class means and readout accuracies of every tap in one pass over uint8 images, shared out among ranks."""
    rank, ranks = distributed.rank_and_ranks()
    n, images, labels = len(images), images[rank::ranks], labels[rank::ranks]

    def everywhere(parts: list[Tensor]) -> Tensor:
        mine = torch.cat(parts)
        whole = mine.new_zeros(n, *mine.shape[1:], dtype=torch.uint8)
        whole[rank::ranks] = mine.byte()
        return distributed.all_reduce(whole).bool()

    sums: dict[str, Tensor] = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    counts = labels.new_zeros(len(next(iter(weights.values()))))
    correct: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
    head_correct: dict[str, list[Tensor]] = {tap.name: [] for tap in taps if tap.heads}
    batches = activations(network, taps, images, mean, std, BATCH)
    for batch, batch_labels in zip(batches, labels.split(BATCH), strict=True):
        counts.index_add_(0, batch_labels, torch.ones_like(batch_labels))
        for tap in taps:
            class_sums(sums[tap.name], batch[tap.name], batch_labels)
            if tap.heads:
                heads = head_fields(batch[tap.name], weights[tap.name], tap.heads)
                head_correct[tap.name].append(heads.argmax(dim=2) == batch_labels[:, None])
                fields = heads.sum(dim=1)
            else:
                fields = batch[tap.name].flatten(1) @ weights[tap.name].flatten(1).T
            correct[tap.name].append(fields.argmax(dim=1) == batch_labels)
        batch.clear()  # gigabytes, before the next one is made
    distributed.all_reduce(counts)
    return Measured(
        {name: means_of(distributed.all_reduce(part), counts) for name, part in sums.items()},
        {name: everywhere(parts) for name, parts in correct.items()},
        {name: everywhere(parts) for name, parts in head_correct.items()},
    )


def head_fields(activations: Tensor, weight: Tensor, heads: int) -> Tensor:
    """Output fields of each head alone (every other head's weights silenced): (n, T, D), (L, T, D) -> (n, H, L).

    Their sum over heads is the readout's field of the whole tap.
    """
    split = activations.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(2)  # (H, n, T * D/H)
    return torch.bmm(split, weight.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(2).mT).transpose(0, 1)


@torch.no_grad()
def _rms(network: nn.Module, taps: list[Tap], images: Tensor, mean: Tensor, std: Tensor) -> dict[str, float]:
    """Root mean square of each tap's activations, 1 for a tap that is silent."""
    totals = {tap.name: [0.0, 0] for tap in taps}
    for batch in activations(network, taps, images, mean, std):
        for name, activation in batch.items():
            totals[name][0] += activation.square().sum().item()
            totals[name][1] += activation.numel()
    return {name: (total / count) ** 0.5 or 1.0 for name, (total, count) in totals.items()}
