"""Images and labels as uint8 tensors, and batches of them, augmented on the device.

torchvision is imported where it is needed: the import takes seconds, and a cached data set does without it.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from paperlib import files, glyphs

NAMES = ("glyphs100", "cifar100", "flowers102", "flowers102-resplit", "folder:<path>")
SPLITS = {
    "glyphs100": "drawn by the package; test characters in other fonts",
    "cifar100": "official: 500 training and 100 test images a label",
    "flowers102": "official: 20 training images a label (training and validation split together), the rest tests",
    "flowers102-resplit": "not the official one: all images dealt anew, 6,552 train, 819 test, 818 are left out",
}
BATCH = 64  # images in a forward pass that only measures: more gain nothing on CPUs (docs/speed.md)
EMBEDDED = ("glyphs100",)  # drawn by the package: results on them are a demonstration, not evidence


@dataclass(frozen=True)
class Images:
    """A data set. Images are (n, 3, S, S) uint8 (channels last in memory), labels (n,) int64 in 0..L-1."""

    name: str
    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    classes: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hash of all pixels and labels, whatever file they came from."""
        digest = hashlib.sha256()
        for images in (self.x_train, self.x_test):
            digest.update(images.permute(0, 2, 3, 1).contiguous().numpy())
        for labels in (self.y_train, self.y_test):
            digest.update(labels.numpy())
        return digest.hexdigest()

    @cached_property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the training images' channels (see `channel_statistics`), on their device."""
        mean, std = channel_statistics(self.x_train)
        return mean.to(self.x_train.device), std.to(self.x_train.device)

    def to(self, device: torch.device | str) -> "Images":
        tensors = {key: getattr(self, key).to(device) for key in ("x_train", "y_train", "x_test", "y_test")}
        return replace(self, **tensors)


def load(name: str, root: str | Path | None = None, image_size: int | None = None) -> Images:
    """Load a data set by name: one of `NAMES`.

    root is where downloads and `.npz` caches live (default: $PAPERLIB_DATA, else ./data). image_size is the side S in
    pixels (default 32, flowers102 224); other sizes are resized once and cached. Flowers-102 has its official splits,
    train + validation (2,040, the validation images last) and test (6,149); flowers102-resplit has the 80 : 10 : 10 %
    at random that many accuracies are published for. A folder holds train/<label>/* and test/<label>/* image files.
    Raises ValueError for an unknown name or unusable data, and OSError with the way out where a download fails.
    """
    check_name(name)
    root = Path(root or os.environ.get("PAPERLIB_DATA") or "data")
    if name == "glyphs100":
        return _images(name, *glyphs.draw(image_size or 32))
    if name == "cifar100":
        return _cifar100(root, image_size or 32)
    if name == "flowers102":
        cache = root / f"flowers102-{image_size or 224}.npz"
        return _cached(name, cache, lambda: _flowers102(root, image_size or 224))
    if name == "flowers102-resplit":
        return _resplit(name, load("flowers102", root, image_size))
    return _images(name, *_folder(Path(name.removeprefix("folder:")).expanduser(), image_size or 32))


def check_name(name: str) -> None:
    """Raise ValueError, with the way out, for a data set that does not exist."""
    if name.startswith("folder:"):
        for part in ("train", "test"):
            if not (Path(name.removeprefix("folder:")).expanduser() / part).is_dir():
                raise ValueError(f"{name} has no {part}/ folder: lay it out as {part}/<label>/<image files>")
    elif name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(NAMES)}")


def limit(data: Images, images: int) -> Images:
    """The first `images` training and test images, dealt evenly over the labels; 0 keeps all."""
    if not images:
        return data
    if images < 2 * len(data.classes):
        raise ValueError(
            f"limit={images} leaves a label without images: use at least {2 * len(data.classes)} "
            f"(2 for each of {len(data.classes)} labels)"
        )
    train, test = (_dealt(labels)[:images].sort().values for labels in (data.y_train, data.y_test))
    tensors = {"x_train": data.x_train[train], "y_train": data.y_train[train]}
    return replace(data, **tensors, x_test=data.x_test[test], y_test=data.y_test[test])


def held_out(labels: Tensor, fraction: float) -> tuple[Tensor, Tensor]:
    """Split training images into (kept, held out) indices: the last `fraction` of every label's images is held out.

    At least one image a label goes to each side. On Flowers-102 and 0.5 the held-out images are the official
    validation split.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"held_out must be above 0 and below 1, so that each side has images, not {fraction}")
    order, rank, counts = _ranked(labels)
    if counts.min() < 2:
        raise ValueError(f"label {counts.argmin()} has one training image, but two are needed: one of them is held out")
    cut = (counts - (counts * fraction).round().long()).clamp(min=1).minimum(counts - 1)
    last = rank >= cut[labels[order]]
    return order[~last].sort().values, order[last].sort().values


def channel_statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each colour channel over all pixels, both (3, 1, 1) float32 in 0..1."""
    counts = torch.stack([images[:, channel].flatten().bincount(minlength=256) for channel in range(3)]).cpu().double()
    share, value = counts / counts.sum(dim=1, keepdim=True), torch.arange(256, dtype=torch.float64) / 255
    mean = share @ value
    std = (share @ value.square() - mean.square()).clamp(min=0).sqrt().clamp(min=1e-3)
    return mean.float().view(3, 1, 1), std.float().view(3, 1, 1)


def normalise(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """uint8 images -> float32 with the training images' mean 0 and deviation 1 per channel."""
    return (images.float() / 255 - mean) / std


def augmented_batches(
    images: Tensor, labels: Tensor, batch_size: int, shift: int, flip: bool, generator: torch.Generator, place=(0, 1)
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order: uint8 batches, each image shifted by up to `shift` pixels (black beyond the edge) and,
    with `flip`, mirrored with probability 1/2.

    `generator` is a CPU generator whatever the device: an epoch's random numbers are drawn at once and copied over,
    so every device sees the same batches and nothing waits inside the epoch. place = (rank, ranks) yields a rank's
    share of each batch: every ranks-th image.
    """
    rank, ranks = place
    n, device, size = len(images), images.device, images.shape[-1]
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(-shift, shift + 1, (2, n), generator=generator)
    mirrored = torch.rand(n, generator=generator) < (0.5 if flip else 0.0)
    order, offsets, mirrored = (t.to(device, non_blocking=True) for t in (order, offsets, mirrored))
    pixel = torch.arange(size, device=device)
    stored = images.permute(0, 2, 3, 1)
    for start in range(0, n, batch_size):
        part = slice(start + rank, min(start + batch_size, n), ranks)
        index = order[part]
        rows = pixel + offsets[0, part, None]  # (b, S): the source row of each row
        columns = torch.where(mirrored[part, None], size - 1 - pixel, pixel) + offsets[1, part, None]
        inside = ((rows >= 0) & (rows < size))[:, :, None] & ((columns >= 0) & (columns < size))[:, None, :]
        batch = stored[
            index[:, None, None], rows.clamp(0, size - 1)[:, :, None], columns.clamp(0, size - 1)[:, None, :]
        ]
        yield (batch * inside[..., None]).permute(0, 3, 1, 2), labels[index]


def _images(name: str, x_train, y_train, x_test, y_test, classes) -> Images:
    """NHWC uint8 arrays and labels -> Images, after checking that they are a usable data set."""
    # A folder's name need not be valid UTF-8, but a file that names it must be.
    classes = tuple(str(label).encode(errors="replace").decode() for label in classes)
    side, tensors = np.shape(x_train)[1:2], []
    for part, x, y in (("train", x_train, y_train), ("test", x_test, y_test)):
        x, y = np.asarray(x), np.asarray(y)
        fits = x.dtype == np.uint8 and x.shape == (len(x), *side, *side, 3)
        if not fits or y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise ValueError(
                f"{name}: x_{part} must be (n, S, S, 3) uint8, S the same everywhere, and y_{part} one whole number an "
                f"image, not {x.shape} {x.dtype} and {y.shape} {y.dtype}"
            )
        present, wanted = set(np.unique(y).tolist()), set(range(len(classes)))
        if present != wanted:
            raise ValueError(
                f"{name}: the {part} images need every label from 0 to {len(classes) - 1} and no other; "
                f"missing: {sorted(wanted - present)[:5] or 'none'}, unknown: {sorted(present - wanted)[:5] or 'none'}"
            )
        tensors += [torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2), torch.from_numpy(y.astype(np.int64))]
    return Images(name, *tensors, classes)


def _cifar100(root: Path, image_size: int) -> Images:
    def download() -> tuple:
        from torchvision.datasets import CIFAR100

        try:
            parts = [CIFAR100(root, train=train, download=True) for train in (True, False)]
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"CIFAR-100 could not be downloaded ({error}); put cifar-100-python.tar.gz or cifar100.npz "
                f"into {root} by hand, or name the folder that has it in PAPERLIB_DATA"
            ) from error
        (train, test) = parts
        return train.data, train.targets, test.data, test.targets, train.classes

    data = _cached("cifar100", root / "cifar100.npz", download)
    if image_size == 32:
        return data

    def resized() -> tuple:
        from torchvision.transforms.functional import resize

        _check_memory(len(data.x_train) + len(data.x_test), image_size)
        arrays = []
        for x, y in ((data.x_train, data.y_train), (data.x_test, data.y_test)):
            chunks = [resize(chunk, [image_size, image_size], antialias=True) for chunk in x.split(2048)]
            arrays += [torch.cat(chunks).permute(0, 2, 3, 1).numpy(), y.numpy()]
        return *arrays, data.classes

    return _cached("cifar100", root / f"cifar100-{image_size}.npz", resized)


def _flowers102(root: Path, image_size: int) -> tuple:
    from torchvision.datasets import Flowers102

    try:
        train, validation, test = (Flowers102(root, split=split, download=True) for split in ("train", "val", "test"))
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"Flowers-102 could not be downloaded ({error}); put jpg/, imagelabels.mat and setid.mat into "
            f"{root / 'flowers-102'} by hand, or name the folder above it in PAPERLIB_DATA"
        ) from error
    _check_memory(len(train) + len(validation) + len(test), image_size)
    arrays, folder = [], root / "flowers-102"
    for parts in ((train, validation), (test,)):
        with files.reading(folder, "delete this folder, and it is downloaded again"):
            pairs = [(_square(image, image_size), label) for part in parts for image, label in part]  # small at once
        arrays += [np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])]
    return *arrays, train.classes


def _resplit(name: str, data: Images) -> Images:
    """All images in a fixed random order: the first 80 % train, the last 10 % test, those between (validation) rest."""
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    order, tenth = torch.from_numpy(np.random.default_rng(0).permutation(len(y))), -(-len(y) // 10)
    train, test = order[: -tenth - len(y) // 10], order[-tenth:]
    return Images(name, x[train], y[train], x[test], y[test], data.classes)


def _folder(path: Path, image_size: int) -> tuple:
    from torchvision.datasets import ImageFolder

    datasets = []
    for part in ("train", "test"):
        with files.reading(path / part, "each label needs a folder with at least one image"):
            datasets.append(ImageFolder(path / part))
    names = [dataset.classes for dataset in datasets]
    if names[0] != names[1]:
        odd = sorted(set(names[0]) ^ set(names[1]))
        raise ValueError(f"folder:{path}: train/ and test/ must have the same labels; only one of them has {odd[:5]}")
    if len(names[0]) < 2:
        raise ValueError(f"folder:{path} has one label only: at least 2 are needed")
    _check_memory(sum(map(len, datasets)), image_size)
    arrays = []
    for dataset in datasets:
        images = []
        for file, _ in dataset.samples:
            with files.reading(Path(file), "remove or replace this image"):
                images.append(_square(Image.open(file), image_size))
        arrays += [np.stack(images), np.array(dataset.targets)]
    # Files of a folder are sorted by name; a fixed shuffle keeps "the last images of a label" a fair sample.
    order = np.random.default_rng(0).permutation(len(arrays[1]))
    return arrays[0][order], arrays[1][order], arrays[2], arrays[3], names[0]


def _check_memory(images: int, side: int) -> None:
    """Raise ValueError if decoded images would not fit: they are held twice while they are put together."""
    needed, there = 6 * images * side**2, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise ValueError(
            f"{images:,} images of {side} x {side} pixels need {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{there / 1e9:.1f} GB: take a smaller image_size or fewer images"
        )


def _square(image: Image.Image, side: int) -> np.ndarray:
    """PIL image -> (side, side, 3) uint8: the shorter side resized, the centre kept; alpha is laid on black."""
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows black and white")
    if image.mode.startswith("I"):  # 16- and 32-bit grey, which PIL would clip instead of scale
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    tensor = pil_to_tensor(image.convert("RGB"))
    return center_crop(resize(tensor, side, antialias=True), [side, side]).permute(1, 2, 0).numpy()


def _cached(name: str, cache: Path, make) -> Images:
    """Read `cache`, or make the arrays and write it (whole or not at all)."""
    if not cache.exists():
        arrays = make()
        keys = ("x_train", "y_train", "x_test", "y_test", "classes")
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with files.whole(cache) as file:
                np.savez_compressed(file, **dict(zip(keys, arrays, strict=True)))
        except OSError as error:
            print(f"{error}; the images will be decoded again next time")
        return _images(name, *arrays)
    with files.reading(cache, "delete it, and it is made anew"), np.load(cache, allow_pickle=False) as file:
        arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test", "classes")]
    return _images(name, *arrays)


def _ranked(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Images sorted by label: their indices, each one's number within its label (from 0), and images per label."""
    order = torch.argsort(labels, stable=True)
    counts = labels.bincount()
    return order, torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]], counts


def _dealt(labels: Tensor) -> Tensor:
    """Indices ordered like dealing cards: every label's first image, then every label's second, ..."""
    order, rank, _ = _ranked(labels)
    return order[torch.argsort(rank, stable=True)]
