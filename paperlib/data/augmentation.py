"""CCT's `published` augmentation, in batches on the device; a part of it; or `light`.

Random crop of 80 to 100 %, mirror, RandAugment (2 operations, magnitude 9 of 10, each done with probability 0.5), a
quarter of the images erased in part by noise (`randaugment`), then mixup (0.8) or cutmix (1.0) (CCT). `mixed` is mixup
or cutmix alone, and for half of the batches (choice). Random numbers: torch's global CPU generator.
"""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from paperlib.data import randaugment
from paperlib.data.images import normalise


@cache
def _mixing(classes: int):
    """mixup or cutmix, one or the other for a batch."""
    from torchvision.transforms import v2

    return v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])


def augment(how: str, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """uint8 images (b, 3, S, S), labels (b,) -> normalised images, labels (b,) or, if mixed, probabilities (b, L)."""
    if how == "published":
        pixels = randaugment.crop_and_mirror(images.float())
        pixels = randaugment.rand_augment(pixels, (255 * mean).round().view(3, 1, 1))
        return _mixing(classes)(randaugment.erase(normalise(pixels, mean, std)), labels)
    images = normalise(images, mean, std)
    if how == "mixed" and torch.rand(()) < 0.5:
        return _mixing(classes)(images, labels)
    return images, labels


def augmented_batches(
    images: Tensor, labels: Tensor, batch_size: int, shift: int, flip: bool, generator: torch.Generator, place=(0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: uint8 batches, each image shifted by up to `shift` pixels (black beyond the edge) and,
    with `flip`, mirrored with probability 1/2.

    `generator` is a CPU generator whatever the device: an epoch's random numbers are drawn at once and copied over,
    so every device sees the same batches and nothing waits inside the epoch. place = (rank, ranks) yields a rank's
    share of each batch: every ranks-th image.
    """
    n, device, size = len(images), images.device, images.shape[-1]
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(-shift, shift + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
    order, offsets, mirrored = (t.to(device, non_blocking=True) for t in (order, offsets, mirrored))
    pixel = torch.arange(size, device=device)
    if images.dtype != torch.uint8:  # not pixels: taken as they are
        yield from ((images[index], labels[index]) for index in (order[part] for part in _parts(n, batch_size, place)))
        return
    stored = images.permute(0, 2, 3, 1)
    for part in _parts(n, batch_size, place):
        index = order[part]
        rows = pixel + offsets[0, part, None]  # (b, S): the source row of each row
        columns = torch.where(mirrored[part, None], size - 1 - pixel, pixel) + offsets[1, part, None]
        inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
        batch = stored[
            index[:, None, None], rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]
        ]
        yield (batch * inside[..., None]).permute(0, 3, 1, 2), labels[index]


def _parts(n: int, batch_size: int, place: tuple[int, int]) -> Iterator[slice]:
    rank, ranks = place
    for start in range(0, n, batch_size):
        yield slice(start + rank, min(start + batch_size, n), ranks)
