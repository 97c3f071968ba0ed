"""A data set in memory: uint8 images and labels, its fixed splits, and what normalises it."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

BATCH = 64  # images in a forward pass that only measures: more gain nothing on CPUs (docs/speed.md)
PADDING = 0  # the number of no word, behind the last word of a text
EMBEDDED = ("glyphs100", "phrases20")  # made by the package: results on them are a demonstration, not evidence


@dataclass(frozen=True)
class Images:
    """A data set. Images are (n, 3, S, S) uint8 (channels last in memory), labels (n,) int64 in 0..L-1."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]
    held: Tensor | None = None  # indices of training images that no network may see (see `hold_out`)

    @property
    def vocabulary(self) -> int:
        """How many words there are: none."""
        return 0

    @cached_property
    def sha256(self) -> str:
        """Hash of all that is here: pixels and labels, which of them are for training, the labels' names."""
        whole = [self.pixels_sha256, len(self.y_train), self.classes]
        return hashlib.sha256(json.dumps(whole, ensure_ascii=False).encode()).hexdigest()

    @cached_property
    def pixels_sha256(self) -> str:
        """Hash of all pixels and labels, whatever file they came from."""
        digest = hashlib.sha256()
        for images in (self.x_train, self.x_test):
            digest.update(images.permute(0, 2, 3, 1).contiguous().numpy())
        for labels in (self.y_train, self.y_test):
            digest.update(labels.numpy())
        return digest.hexdigest()

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the channels (see `channel_statistics`) of the training images that networks see, on
        their device."""
        mean, std = channel_statistics(self.seen.x_train)
        return mean.to(self.x_train.device), std.to(self.x_train.device)

    @property
    def seen(self) -> "Images":
        """The same data set without the training images that no network may see."""
        if self.held is None:
            return self
        kept = torch.ones(len(self.y_train), dtype=torch.bool, device=self.y_train.device)
        kept[self.held] = False
        return replace(self, x_train=self.x_train[kept], y_train=self.y_train[kept], held=None)

    def to(self, device: torch.device | str) -> "Images":
        tensors = {key: getattr(self, key).to(device) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **tensors, held=None if self.held is None else self.held.to(device))


@dataclass(frozen=True)
class Inputs(Images):
    """A data set whose x is what a network takes, in the place of images: numbers of words, or activations."""

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Nothing is normalised: mean 0, deviation 1."""
        return torch.zeros(1), torch.ones(1)


def limit(data: Images, images: int) -> Images:
    """The first `images` training and test images, shared evenly by the labels; 0 keeps all."""
    if not images:
        return data
    if images < 2 * len(data.classes):
        raise ValueError(
            f"limit={images} leaves a label without images: use at least {2 * len(data.classes)} "
            f"(2 for each of {len(data.classes)} labels)"
        )
    train, test = (balanced(labels)[:images].sort().values for labels in (data.y_train, data.y_test))
    tensors = {"x_train": data.x_train[train], "y_train": data.y_train[train]}
    return replace(data, **tensors, x_test=data.x_test[test], y_test=data.y_test[test])


def held_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split training images into (kept, held out) indices: the last `fraction` of every label's images is held out.

    At least one image a label goes to each side. On Flowers-102 and 0.5 the held-out images are the official
    validation split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"held_out must be above 0 and below 1, so that each side has images, not {fraction}")
    order, rank, counts = ranked(labels)
    if counts.min() < 2:
        raise ValueError(f"label {counts.argmin()} has one training image, but two are needed: one of them is held out")
    cut = (counts - (counts * fraction).round().long()).clamp(min=1).minimum(counts - 1)
    last = rank >= cut[labels[order]]
    return order[~last].sort().values, order[last].sort().values


def hold_out(data: Images, fraction: float) -> Images:
    """The data set with the last `fraction` of every label's training images kept from all networks, whatever their
    seed: they choose penalties, masks and owners (choice). At 0.1: 5,000 images of CIFAR-100, 2 a label of Flowers-102.
    """
    return replace(data, held=held_out(data.y_train, fraction)[1])


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each colour channel over all pixels, both (3, 1, 1) float32 in 0..1."""
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).cpu().double()
    share, value = counts / counts.sum(dim=1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return mean.float().view(3, 1, 1), std.float().view(3, 1, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images -> float32 with the training images' mean 0 and deviation 1 per channel; what is not uint8
    (`Inputs`) is taken as it is."""
    return (images.float() / 255 - mean) / std if images.dtype == torch.uint8 else images


def positions(images: Tensor) -> Tensor | None:
    """Which positions of stored texts hold a word: (n, T) int64 -> (n, T) bool; None for images, where all count."""
    return images != PADDING if images.dtype == torch.int64 else None


def ranked(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images sorted by label: their indices, each one's number within its label (from 0), and images per label."""
    order = torch.argsort(labels, stable=True)
    counts = labels.bincount()
    return order, torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]], counts


def balanced(labels: Tensor) -> Tensor:
    """Indices of all images: every label's first, then every label's second, ...; so that a beginning is balanced."""
    order, rank, _ = ranked(labels)
    return order[torch.argsort(rank, stable=True)]
