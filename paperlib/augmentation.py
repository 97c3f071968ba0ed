"""CCT's `published` augmentation from torchvision's transforms, in batches on the device; a part of it; or `light`.

Random crop of 80 to 100 %, mirror, RandAugment (2 operations, magnitude 9 of 10, each done with probability 0.5, as
timm does), a quarter erased by noise, then mixup (0.8) or cutmix (1.0) (CCT). torchvision draws once for a whole
tensor, so each chunk of `CHUNK` images shares its crop, operations and erased rectangle (choice: the recipe draws for
each image). Its magnitude 9 of 10 is bin 27 of 0..30 in torchvision; timm's noise on it is left out (choice).
`mixed` is mixup or cutmix alone, and for half of the batches (choice). Random numbers: torch's global CPU generator.
"""

from functools import cache

import torch
from torch import Tensor

from paperlib.data import normalise

CHUNK = 8


@cache
def _transforms(size: int, classes: int):
    from torchvision.transforms import v2

    crop = v2.RandomResizedCrop(size, scale=(0.8, 1.0), antialias=True)
    operations = [v2.RandomApply([v2.RandAugment(num_ops=1, magnitude=27)], p=0.5)] * 2
    pixels = v2.Compose([crop, v2.RandomHorizontalFlip(), *operations])
    mix = v2.RandomChoice([v2.MixUp(alpha=0.8, num_classes=classes), v2.CutMix(alpha=1.0, num_classes=classes)])
    return pixels, v2.RandomErasing(p=0.25, value="random"), mix


def augment(how: str, images: Tensor, labels: Tensor, mean: Tensor, std: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """uint8 images (b, 3, S, S), labels (b,) -> normalised images, labels (b,) or, if mixed, probabilities (b, L)."""
    if how == "published":
        pixels, erase, mix = _transforms(images.shape[-1], classes)
        chunks = [erase(normalise(pixels(chunk), mean, std)) for chunk in images.split(CHUNK)]
        return mix(torch.cat(chunks), labels)
    images = normalise(images, mean, std)
    if how == "mixed" and torch.rand(()) < 0.5:
        return _transforms(images.shape[-1], classes)[2](images, labels)
    return images, labels
