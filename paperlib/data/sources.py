"""Where images come from: a name -> a data set, downloaded, read from a folder, or drawn; cached as plain arrays.

torchvision is imported where it is needed: the import takes seconds, and a cached data set does without it.
"""

import os
from pathlib import Path

import numpy as np
import torch

from paperlib import files
from paperlib.data import glyphs
from paperlib.data.folder import check_memory, load_folder, square
from paperlib.data.images import Images
from paperlib.data.text import load_clinc150, phrases

NAMES = ("glyphs100", "cifar100", "flowers102", "flowers102-resplit", "clinc150", "phrases20", "folder:<path>")

TEXTS = ("clinc150", "phrases20")

SPLITS = {
    "glyphs100": "drawn by the package; test characters in other fonts",
    "cifar100": "official: 500 training and 100 test images a label",
    "flowers102": "official: 20 training images a label (training and validation split together), the rest tests",
    "clinc150": "official: 100 training, 20 validation and 30 test texts a label, out-of-scope texts left out",
    "phrases20": "made by the package",
    "flowers102-resplit": "not the official one: all images in a random order, 6,552 train, 819 test, 818 are left out",
}


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
    if name == "phrases20":
        return phrases(image_size or 12)
    if name == "clinc150":
        return load_clinc150(root, image_size or 28)
    if name == "flowers102-resplit":
        return _resplit(name, load("flowers102", root, image_size))
    return _images(name, *load_folder(Path(name.removeprefix("folder:")).expanduser(), image_size or 32))


def check_name(name: str) -> None:
    """Raise ValueError, with the way out, for a data set that does not exist."""
    if name.startswith("folder:"):
        for part in ("train", "test"):
            if not (Path(name.removeprefix("folder:")).expanduser() / part).is_dir():
                raise ValueError(f"{name} has no {part}/ folder: lay it out as {part}/<label>/<image files>")
    elif name not in NAMES:
        raise ValueError(f"unknown data set {name!r}: use one of {', '.join(NAMES)}")


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

        check_memory(len(data.x_train) + len(data.x_test), image_size)
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
    check_memory(len(train) + len(validation) + len(test), image_size)
    arrays, folder = [], root / "flowers-102"
    for parts in ((train, validation), (test,)):
        with files.reading(folder, "delete this folder, and it is downloaded again"):
            pairs = [(square(image, image_size), label) for part in parts for image, label in part]  # small at once
        arrays += [np.stack([image for image, _ in pairs]), np.array([label for _, label in pairs])]
    return *arrays, train.classes


def _resplit(name: str, data: Images) -> Images:
    """All images in a fixed random order: the first 80 % train, the last 10 % test, those between (validation) rest."""
    x, y = torch.cat([data.x_train, data.x_test]), torch.cat([data.y_train, data.y_test])
    order, tenth = torch.from_numpy(np.random.default_rng(0).permutation(len(y))), -(-len(y) // 10)
    train, test = order[: -tenth - len(y) // 10], order[-tenth:]
    return Images(name, x[train], y[train], x[test], y[test], data.classes)


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
    with files.reading(cache, "delete it, and it is made anew"):
        files.check_npz(cache)
        with np.load(cache, allow_pickle=False) as file:
            arrays = [file[key] for key in ("x_train", "y_train", "x_test", "y_test", "classes")]
    return _images(name, *arrays)
