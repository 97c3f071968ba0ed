"""A folder of images, train/<label>/<files> and test/<label>/<files>, in a closed list of formats -> arrays.

Whatever is left out is said with its number, and so are images that are in both parts; what cannot be right, such as a
label in two spellings, is refused.
"""

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from paperlib import files

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")  # whatever a file is called, nothing else is decoded
SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
)  # fmt: skip
MEGAPIXELS = 500  # larger images are refused
BITS = 258  # the TIFF tag that says how many bits a grey value has


def load_folder(path: Path, side: int) -> tuple:
    """(x_train, y_train, x_test, y_test, classes) of a folder, images as (n, side, side, 3) uint8, labels by name.

    Hidden files and folders are left out, and so are other formats than `FORMATS`, links to what was met already and
    whatever is no file; how many is printed. Raises ValueError for a layout or an image that cannot be used.
    """
    found, left_out = {}, Counter()
    for part in ("train", "test"):
        with files.reading(path / part, "each label needs a folder with at least one image"):
            found[part] = _labels(path / part, left_out)
    if found["train"].keys() != found["test"].keys():
        odd = sorted(found["train"].keys() ^ found["test"].keys())
        raise ValueError(f"folder:{path}: train/ and test/ must have the same labels; only one of them has {odd[:5]}")
    classes = sorted(found["train"])
    if len(classes) < 2:
        raise ValueError(f"folder:{path} has one label only: at least 2 are needed")
    if left_out:
        print(f"folder:{path}: left out {', '.join(f'{number} {what}' for what, number in sorted(left_out.items()))}")
    check_memory(sum(len(names) for labels in found.values() for names in labels.values()), side)
    arrays, hashes = [], []
    for part in ("train", "test"):
        pairs = [(file, label) for label, name in enumerate(classes) for file in found[part][name]]
        images = [read(file, side) for file, _ in pairs]
        digests = (hashlib.sha256(image.tobytes()).digest() for image in images)
        hashes.append({digest: file for digest, (file, _) in zip(digests, pairs, strict=True)})
        arrays += [np.stack(images), np.array([label for _, label in pairs])]
    if both := hashes[0].keys() & hashes[1].keys():
        first = min(str(hashes[1][key].relative_to(path)) for key in both)
        print(
            f"folder:{path}: {len(both)} of {len(hashes[1])} test images are in train/, too, such as {first}: remove "
            "them from one of the two, for what is measured on them says nothing about new images"
        )
    # Files of a folder are sorted by name; a fixed shuffle keeps "the last images of a label" a fair sample.
    order = np.random.default_rng(0).permutation(len(arrays[1]))
    return arrays[0][order], arrays[1][order], arrays[2], arrays[3], classes


def _labels(part: Path, left_out: Counter) -> dict[str, list[Path]]:
    """Label -> its image files, sorted. ValueError for a label without images, or with two spellings."""
    labels: dict[str, list[Path]] = {}
    for folder in sorted(part.iterdir()):
        if folder.name.startswith("."):
            left_out["hidden"] += 1
        elif folder.is_dir():
            name = unicodedata.normalize("NFC", folder.name)  # archives from macOS take accents apart
            if name in labels:
                raise ValueError(f"two folders are called {name!r}, in two spellings that look alike: rename one")
            labels[name] = sorted(_images(folder, left_out, {folder.resolve()}))
            if not labels[name]:
                raise ValueError(f"{folder.name} has no image: put in files of the formats {', '.join(FORMATS)}")
        else:
            left_out["beside the labels' folders"] += 1
    if not labels:
        raise ValueError("there is no folder in it")
    return labels


def _images(folder: Path, left_out: Counter, met: set[Path]) -> Iterator[Path]:
    """Image files in a folder and those below it; met: real places that links may lead to but once."""
    for entry in sorted(folder.iterdir()):
        real = entry.resolve()
        if entry.name.startswith("."):
            left_out["hidden"] += 1
        elif entry.is_symlink() and (real in met or real in entry.parents or folder.resolve().is_relative_to(real)):
            left_out["links to what is there already"] += 1
        elif entry.is_dir():
            met.add(real)
            yield from _images(entry, left_out, met)
        elif not entry.is_file():
            left_out["neither files nor folders"] += 1
        elif entry.suffix.lower() not in SUFFIXES:
            left_out[f"of other formats ({entry.suffix.lower() or 'no suffix'})"] += 1
        elif real in met:
            left_out["links to what is there already"] += 1
        else:
            met.add(real)
            yield entry


def read(file: Path, side: int) -> np.ndarray:
    """An image file -> (side, side, 3) uint8, as a viewer shows it: turned by its EXIF orientation."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # a scan is no attack: the size is looked at here
    try:
        with files.reading(file, "remove or replace this image"), Image.open(file, formats=FORMATS) as image:
            if image.width * image.height > MEGAPIXELS * 1e6:
                size = image.width * image.height / 1e6
                raise ValueError(f"it has {size:,.0f} megapixels, more than the {MEGAPIXELS} that are read")
            return square(ImageOps.exif_transpose(image), side, bits=_bits(image))
    finally:
        Image.MAX_IMAGE_PIXELS = limit


def _bits(image: Image.Image) -> int:
    """How many bits a grey value has: 16, but for TIFF files that say less."""
    tags = getattr(image, "tag_v2", {})
    return tags[BITS][0] if image.mode.startswith("I") and BITS in tags else 16


def machine_memory() -> int:
    """What this machine has, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def check_memory(images: int, side: int) -> None:
    """Raise ValueError if decoded images would not fit: they are held twice while they are put together."""
    needed, there = 6 * images * side**2, machine_memory()
    if needed > there:
        raise ValueError(
            f"{images:,} images of {side} x {side} pixels need {needed / 1e9:.1f} GB of memory, and this machine has "
            f"{there / 1e9:.1f} GB: take a smaller image_size or fewer images"
        )


def square(image: Image.Image, side: int, bits: int = 16) -> np.ndarray:
    """PIL image -> (side, side, 3) uint8: the shorter side resized, the centre kept; alpha is laid on black. bits: of a
    grey value in modes of more than 8."""
    from torchvision.transforms.functional import center_crop, pil_to_tensor, resize

    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which nobody knows black and white")
    if image.mode.startswith("I"):  # 12-, 16- and 32-bit grey, which PIL would clip instead of scale
        grey = np.asarray(image).astype(np.float64) / ((2**bits - 1) / 255)
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "LA", "PA", "RGBA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "black"), image.convert("RGBA"))
    tensor = pil_to_tensor(image.convert("RGB"))
    return center_crop(resize(tensor, side, antialias=True), [side, side]).permute(1, 2, 0).numpy()
