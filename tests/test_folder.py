"""Folders of images as people have them: what is read, what is left out and said, what is refused."""

import os
import struct
import unicodedata

import numpy as np
import pytest
from PIL import Image

from paperlib import data
from paperlib.data import folder

RNG = np.random.default_rng(0)


def picture():
    return Image.fromarray(RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8))


@pytest.fixture
def place(tmp_path):
    """Two labels, two images each, in both parts."""
    for part in ("train", "test"):
        for label in ("cat", "dog"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(2):
                picture().save(tmp_path / part / label / f"{number}.png")
    return tmp_path


def load(place, size=8):
    return data.load(f"folder:{place}", image_size=size)


def checkpoints(place):
    for part in ("train", "test"):
        (place / part / ".ipynb_checkpoints").mkdir()
        picture().save(place / part / ".ipynb_checkpoints" / "0-checkpoint.png")
    return "2 hidden"


def checkpoints_in_a_label(place):
    (place / "train" / "cat" / ".ipynb_checkpoints").mkdir()
    picture().save(place / "train" / "cat" / ".ipynb_checkpoints" / "0-checkpoint.png")
    return "1 hidden"


def archive_of_a_mac(place):
    (place / "train" / "cat" / "._0.png").write_bytes(b"Mac OS X        ")
    (place / "train" / ".DS_Store").write_bytes(b"x")
    return "2 hidden"


def link_to_a_parent(place):
    (place / "train" / "cat" / "again").symlink_to(place / "train" / "cat", target_is_directory=True)
    (place / "train" / "dog" / "up").symlink_to(place, target_is_directory=True)
    return "2 links"


def link_to_an_image(place):
    (place / "train" / "cat" / "same.png").symlink_to(place / "train" / "cat" / "0.png")
    return "1 links"


def a_pipe(place):
    os.mkfifo(place / "train" / "cat" / "pipe.png")
    return "1 neither files nor folders"


def other_formats(place):
    (place / "train" / "cat" / "notes.txt").write_text("x")
    (place / "train" / "cat" / "film.mp4").write_bytes(b"x")
    return r"1 of other formats \\(.mp4\\), 1 of other formats \\(.txt\\)".replace("\\\\", "\\")


def files_beside_labels(place):
    (place / "train" / "README").write_text("x")
    return "1 beside the labels' folders"


LEFT_OUT = [
    checkpoints, checkpoints_in_a_label, archive_of_a_mac, link_to_a_parent, link_to_an_image, a_pipe, other_formats,
    files_beside_labels,
]  # fmt: skip


@pytest.mark.parametrize("spoil", LEFT_OUT, ids=lambda spoil: spoil.__name__)
def test_what_is_no_image_of_its_own_is_left_out_and_said(spoil, place, capsys):
    clean = load(place)
    assert "left out" not in capsys.readouterr().out
    words = spoil(place)
    spoiled = load(place)
    said = capsys.readouterr().out
    assert spoiled.sha256 == clean.sha256 and spoiled.classes == clean.classes
    assert words.replace("\\", "") in said and said.count("\n") == 1


@pytest.mark.parametrize("name", ["a.gif", "a.jfif", "a.JPG", "a.webp", "a.bmp", "a.tif", "a.ppm"])
def test_formats_of_the_list_are_read(name, place, capsys):
    kind = "JPEG" if name.lower().endswith(("jfif", "jpg")) else None
    picture().save(place / "train" / "cat" / name, kind)
    assert len(load(place).x_train) == 5 and "left out" not in capsys.readouterr().out


def test_a_folder_of_gif_alone_is_not_empty(tmp_path):
    for part in ("train", "test"):
        for label in "ab":
            (tmp_path / part / label).mkdir(parents=True)
            picture().save(tmp_path / part / label / "0.gif")
    assert len(load(tmp_path).x_train) == 2


def test_images_are_turned_as_a_viewer_turns_them(place):
    stored = np.zeros((8, 8, 3), np.uint8)
    stored[:4], stored[4:] = (250, 0, 0), (0, 0, 250)  # red above blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise
    for path in (place / "test" / "cat").iterdir():
        path.unlink()
    Image.fromarray(stored).save(place / "test" / "cat" / "0.jpg", quality=95, subsampling=0, exif=exif)
    shown = load(place).x_test[0].permute(1, 2, 0).numpy()
    assert shown[:, 0, 2].min() > 200 > 50 > shown[:, 0, 0].max()  # blue left
    assert shown[:, -1, 0].min() > 200  # red right


def tiff_of_twelve_bits(values):
    """A TIFF file of one uncompressed strip, two values in three bytes: (height, width) in 0..4095, width even."""
    height, width = values.shape
    first, second = values[:, ::2], values[:, 1::2]
    packed = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=2).astype(np.uint8).tobytes()
    tags = [(256, width), (257, height), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, height)]
    tags.append((279, len(packed)))
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory + struct.pack("<I", 0)


def test_grey_of_twelve_bits_is_not_black(tmp_path):
    values = np.linspace(0, 4095, 64).reshape(8, 8).astype(int)
    (tmp_path / "12.tif").write_bytes(tiff_of_twelve_bits(values))
    found = folder.read(tmp_path / "12.tif", 8)[..., 0]
    assert np.abs(found - values / 4095 * 255).max() <= 1


def test_a_scan_is_no_attack(tmp_path, refuses):
    path = tmp_path / "scan.png"
    Image.new("1", (15_000, 13_000)).save(path)
    assert folder.read(path, 8).shape == (8, 8, 3)
    Image.new("1", (25_000, 21_000)).save(path)
    with refuses("525 megapixels, more than the 500"):
        folder.read(path, 8)
    assert Image.MAX_IMAGE_PIXELS is not None


def test_postscript_is_not_drawn_whatever_it_is_called(place, refuses):
    (place / "train" / "cat" / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n")
    with refuses("0.png.*remove or replace"):
        load(place)


def test_an_image_in_both_parts_is_said(place, capsys):
    (place / "test" / "dog" / "copy.png").write_bytes((place / "train" / "cat" / "1.png").read_bytes())
    load(place)
    assert "1 of 5 test images are in train/, too, such as test/dog/copy.png" in capsys.readouterr().out


def test_names_of_two_spellings_are_one_label_or_none(place, refuses):
    apart, together = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFD", "NFC"))
    for part, name in (("train", apart), ("test", together)):
        (place / part / name).mkdir()
        picture().save(place / part / name / "0.png")
    assert load(place).classes == (together, "cat", "dog")
    (place / "train" / together).mkdir()
    picture().save(place / "train" / together / "0.png")
    with refuses("two spellings"):
        load(place)


def test_a_label_without_images_is_named(place, refuses):
    (place / "train" / "bird").mkdir()
    (place / "train" / "bird" / "x.txt").write_text("x")
    with refuses("bird has no image.*JPEG"):
        load(place)
