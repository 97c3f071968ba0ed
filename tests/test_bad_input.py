"""Wrong input ends in one sentence before any long work: one row a case, most of them through the command line.

The rows of test_cli.py (parameters) and test_data.py (images) are not repeated here.
"""

import csv
import errno
import io
import json
import os
import pickle
import re
import struct
import time
import zipfile
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import papermill
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from paperlib import data, figures, files, models, paths, training
from paperlib.cli import main
from paperlib.data import folder, sources
from paperlib.experiment import settings, store
from paperlib.experiment.settings import load_settings
from paperlib.models import reference

SECONDS = 20  # far more than any case takes alone; a walk takes minutes


class Trap:
    """Leaves a trace if somebody unpickles it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


class Place:
    """A folder of a row's own, and what is replaced for it."""

    def __init__(self, path, patch):
        self.path, self.patch = path, patch

    def __truediv__(self, name):
        return self.path / name


@pytest.fixture
def place(folders, monkeypatch):
    """No notebook runs, nothing comes from a network, and a trace of a trap is an error."""
    monkeypatch.setattr(papermill, "execute_notebook", lambda *a, **k: pytest.fail("a notebook ran"))
    monkeypatch.setattr("torchvision.datasets.utils._get_redirect_url", lambda url, **keywords: url)
    monkeypatch.setattr("torchvision.datasets.utils._urlretrieve", no_network)
    yield Place(folders, monkeypatch)
    assert not (folders / "trace").exists(), "a pickle was opened"


def no_network(*arguments, **keywords):
    raise OSError("no network")


def no_room(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


def one_sentence(text, pattern):
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    assert re.search(pattern, lines[0]), text
    assert "Traceback" not in text and len(lines[0]) < 600


# --- what rows make


def draw(path, **changed):
    """Two labels, two training images and one test image each; `changed` replaces or adds {"train_a": [content]}."""
    square, other = (
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)) for seed in (0, 1)
    )
    parts = {"train_a": [square] * 2, "train_b": [square] * 2, "test_a": [other], "test_b": [other]} | changed
    for part, images in parts.items():
        if images is None:
            continue
        folder = path / part.replace("_", "/", 1)
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            kind = "png" if isinstance(image, (Image.Image, bytes)) else image[0]
            content = image if isinstance(image, (Image.Image, bytes)) else image[1]
            if isinstance(content, bytes):
                (folder / f"{number}.{kind}").write_bytes(content)
            else:
                content.save(folder / f"{number}.{kind}")
    return [f"data=folder:{path}"]


def encoded(kind, damage=lambda raw: raw, image=None):
    """The bytes of an image file."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    (image or Image.fromarray(noise)).save(buffer, kind)
    return damage(buffer.getvalue())


def bomb():
    """A BMP file of a few bytes that says it has 60,000 x 60,000 pixels."""
    return struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 54, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 0, 0, 0, 0)


def npz(place, content=None, damage=lambda raw: raw, **changed):
    """A CIFAR-100 cache of three labels, or any bytes in its place."""
    if content is None:
        pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
        arrays = {"x_train": pixels, "y_train": np.array([0, 1, 2] * 2), "x_test": pixels, "y_test": np.arange(6) % 3}
        buffer = io.BytesIO()
        np.savez(buffer, **(arrays | {"classes": np.array(["a", "b", "c"])} | changed))
        content = buffer.getvalue()
    (place / "data" / "cifar100.npz").write_bytes(damage(content))
    return ["data=cifar100", "image_size=32"]


def zip_with(raw, offset, value):
    """The same zip with another byte in all its headers: 6 are the flags, 8 the kind of compression."""
    for signature, shift in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):
        raw = re.sub(
            re.escape(signature) + b"." * (offset + shift - 4) + b".",
            lambda found: found[0][:-1] + bytes([value]),
            raw,
            flags=re.DOTALL,
        )
    return raw


def floats(value):
    return np.full((6, 32, 32, 3), value, dtype=np.float32)


def malicious(place):
    return pickle.dumps(Trap(place / "trace"), protocol=2)


def cifar_pickle(place):
    (place / "data" / "cifar-100-python").mkdir()
    for name in ("train", "test", "meta"):
        (place / "data" / "cifar-100-python" / name).write_bytes(malicious(place))
    return ["data=cifar100", "image_size=32"]


def downloaded(place, content):
    place.patch.setattr(
        "torchvision.datasets.utils._urlretrieve", lambda url, filename, *rest: Path(filename).write_bytes(content)
    )
    return ["data=cifar100", "image_size=32"]


def flowers(place):
    """Flowers-102 whose files are there, one of them cut short."""

    class Half(list):
        def __iter__(self):
            with Image.open(io.BytesIO(encoded("JPEG", lambda raw: raw[: len(raw) // 2]))) as image:
                yield image, 0

    place.patch.setattr("torchvision.datasets.Flowers102", lambda root, split, download: Half())
    return ["data=flowers102"]


def below_a_file(place, kind):
    (place / "file").write_text("")
    place.patch.setenv(f"PAPERLIB_{kind}", str(place / "file" / "below"))
    return ["data=cifar100", "image_size=32"] if kind == "DATA" else draw(place / "pictures")


def read_only(place):
    (place / "locked").mkdir(mode=0o500)
    place.patch.setenv("PAPERLIB_RUNS", str(place / "locked" / "runs"))
    return draw(place / "pictures")


def profile(place, content):
    """The words for a profile of our own."""
    place.patch.setattr("paperlib.experiment.settings.root", lambda: place / "project")
    (place / "project" / "notebooks" / "profiles").mkdir(parents=True)
    (place / "project" / "notebooks" / "profiles" / "own.yaml").write_bytes(content)
    (place / "project" / "notebooks" / "profiles" / "base.yaml").write_text("epochs: 1\n")
    return ["own"]


def committed(place, content=None, weights=None, **changed):
    """A reference network for the profile quick in a folder of its own, untrained."""
    settings = load_settings("quick")
    facts = {"model": settings.model, "num_classes": 100, "image_size": 24, "data_sha256": "0" * 64}
    facts |= {"cct_options": {"heads": 4, "positional_embedding": "learnable"}, "curve": []}
    facts |= {"recipe": {"epochs": settings.epochs}} | changed
    card = {"card": json.dumps({key: value for key, value in facts.items() if value is not None})}
    place.patch.setattr(reference, "FOLDER", place / "references")
    reference.FOLDER.mkdir()
    path = reference.FOLDER / "glyphs100-24-cct_4_7x1-seed0.safetensors"
    if content is None:
        weights = weights or models.build("cct_4_7x1", 100, 24).state_dict()
        save_file({key: value.half() for key, value in weights.items()}, path, None if "nocard" in changed else card)
    else:
        path.write_bytes(content)
    return ["weights=reference"]


# --- through the command line: what, settings (or a function of the place that gives them), the sentence

ONE_EACH = {"train_a": [Image.new("RGB", (24, 24))], "train_b": [Image.new("RGB", (24, 24))]}
ROWS = [
    # parameters
    ("a string for a number", ["threshold=high"], r"'threshold'.*valid number, not 'high'"),
    ("a number for a string", ["model=3"], r"'model'.*valid string, not 3"),
    ("a list for a number", ["epochs=[1, 2]"], r"'epochs'.*valid integer, not \[1, 2\]"),
    ("nothing for a list", ["seeds="], r"'seeds'.*valid list, not None"),
    ("negative epochs", ["epochs=-1"], r"'epochs'.*greater than or equal to 1, not -1"),
    ("a negative seed", ["seeds=[-1]"], r"'seeds.0'.*greater than or equal to 0"),
    ("threshold 0", ["threshold=0"], r"'threshold'.*greater than 0"),
    ("threshold 1", ["threshold=1"], r"'threshold'.*less than 1"),
    ("threshold nan", ["threshold=.nan"], r"'threshold'.*number"),
    ("threshold nan, as a word", ["threshold=nan"], r"'threshold'.*number"),
    ("infinite learning rate", ["lr=.inf"], r"'lr'.*finite number"),
    ("nan in a list", ["penalties=[.nan]"], r"'penalties.0'.*finite number"),
    ("negative penalty", ["penalties=[-1]"], r"'penalties.0'.*greater than or equal to 0"),
    ("unknown optimizer", ["optimizer=sgd"], r"'optimizer'.*'adamw' or 'muon', not 'sgd'"),
    ("unknown CNN", ["cnn=resnet18"], r"unknown model 'resnet18': use vgg_"),
    ("other heads that do not divide", ["many_heads=[4, 3]"], r"3 heads do not divide the width 128.*use a divisor"),
    ("a tap twice", ["taps=[attn, block, block]"], r"'taps'.*names a tap twice"),
    ("penalties of other taps alone", ["penalty_taps=[attn]"], r"'penalty_taps': block must be among them"),
    ("images too small for the CNN", ["image_size=15"], r"vgg_11x16.*image_size must be at least 16, not 15"),
    ("held_out 0", ["held_out=0"], r"'held_out'.*greater than 0"),
    ("held_out 1", ["held_out=1"], r"'held_out'.*less than 1"),
    ("limit without some labels", ["limit=150"], r"limit=150 leaves a label without images: use at least 200"),
    ("an image alone in its step", ["limit=201"], r"'batch_size'.*one of 201 training images.*another batch_size or"),
    (
        "every image alone in its step",
        ["batch_size=1", "max_steps=5"],
        r"'batch_size'.*1 leaves one of.*another batch_size",
    ),
    ("a line break in a name", ["data=folder:a\nb"], r"folder:.*a b has no train/ folder"),
    ("notebooks that exclude each other", ["lr=1", "--only", "01", "--from", "03"], r"--from 03 leaves none of"),
    (
        "a pickle in YAML",
        lambda p: [f"lr=!!python/object/apply:os.system ['touch {p.path}/trace']"],
        "lr: .*not a value",
    ),
    ("an odd tag", ["lr=!!timestamp soon"], "lr: .*is not a value: write a number"),
    ("a date that is none", ["lr=2024-13-45"], "'lr'.*valid number, not '2024-13-45'"),
    ("endless brackets", ["lr=" + 400 * "["], "lr: .*is not a value: write a number"),
    # profiles
    ("a pickle in a profile", lambda p: profile(p, b"lr: !!python/object/apply:os.getcwd []"), "own.yaml.*plain YAML"),
    ("a profile that is a list", lambda p: profile(p, b"- lr"), "own.yaml.*plain YAML"),
    ("a profile that is no text", lambda p: profile(p, b"lr: \xff\xfe"), "own.yaml.*plain YAML"),
    ("a profile cut short", lambda p: profile(p, b"lr: 0.1"), "nor own.yaml gives a value for 'data'"),
    # folders of images
    ("no such folder", ["data=folder:nowhere"], r"nowhere has no train/ folder: lay it out as train/<label>/"),
    ("a file for a folder", ["data=folder:README.md"], r"README.md has no train/ folder"),
    (
        "no labels",
        lambda p: draw(p / "i", train_a=None, train_b=None, train=[]),
        r"i/train.*no folder in it.*each label",
    ),
    ("one label", lambda p: draw(p / "i", train_b=None, test_b=None), "one label only: at least 2"),
    ("an empty label", lambda p: draw(p / "i", train_b=[]), r"i/train.*b has no image.*at least one image"),
    ("a label in training only", lambda p: draw(p / "i", test_b=None), r"same labels.*\['b'\]"),
    ("a label in tests only", lambda p: draw(p / "i", test_c=[encoded("PNG")]), r"same labels.*\['c'\]"),
    ("one training image a label", lambda p: draw(p / "i", **ONE_EACH), "label 0 has one training image, but two"),
    ("a text named .png", lambda p: draw(p / "i", train_b=[b"hello"] * 2), r"train/b/0.png.*remove or replace"),
    (
        "half a JPEG",
        lambda p: draw(p / "i", test_b=[("jpg", encoded("JPEG", lambda raw: raw[: len(raw) // 2]))]),
        r"test/b/0.jpg.*truncated.*remove or replace",
    ),
    (
        "a damaged PNG",
        lambda p: draw(p / "i", test_b=[encoded("PNG", lambda raw: raw.replace(b"IDAT", b"\0\0\0\0", 1))]),
        r"test/b/0.png.*remove or replace",
    ),
    ("a picture of gigabytes", lambda p: draw(p / "i", test_b=[("bmp", bomb())]), r"test/b/0.bmp.*3,600 megapixels"),
    (
        "NaN in a TIFF of floats",
        lambda p: draw(p / "i", test_b=[("tif", Image.fromarray(np.full((24, 24), np.nan, np.float32)))]),
        r"test/b/0.tif.*floating-point.*remove or replace",
    ),
    # caches and downloads
    ("half a cache", lambda p: npz(p, damage=lambda raw: raw[: len(raw) // 2]), "cifar100.npz.*delete it"),
    (
        "an encrypted cache",
        lambda p: npz(p, damage=lambda raw: zip_with(raw, 6, 1)),
        "cifar100.npz.*encrypted.*delete it",
    ),
    ("a cache of the future", lambda p: npz(p, damage=lambda raw: zip_with(raw, 8, 99)), "cifar100.npz.*delete it"),
    ("NaN in a cache", lambda p: npz(p, x_train=floats(np.nan)), "cifar100.*uint8.*not .*float32"),
    ("Inf in a cache", lambda p: npz(p, x_test=floats(np.inf)), "cifar100.*uint8.*not .*float32"),
    (
        "a pickle in a cache",
        lambda p: npz(p, classes=np.array([Trap(p / "trace"), "b", "c"], dtype=object)),
        "cifar100.npz.*allow_pickle=False.*delete it",
    ),
    ("a pickle for a cache", lambda p: npz(p, malicious(p)), "cifar100.npz.*delete it"),
    ("no network", ["data=cifar100", "image_size=32"], "CIFAR-100 could not be downloaded.*no network.*by hand"),
    ("a download with another checksum", lambda p: downloaded(p, b"other"), "could not be downloaded.*corrupted"),
    ("an empty download", lambda p: downloaded(p, b""), "could not be downloaded.*corrupted.*by hand"),
    ("a pickle for CIFAR-100", cifar_pickle, "could not be downloaded.*by hand"),
    ("half a flower", flowers, "flowers-102.*truncated.*delete this folder"),
    # places
    ("runs below a file", lambda p: below_a_file(p, "RUNS"), "file/below.*cannot be written to.*PAPERLIB_RUNS"),
    ("data below a file", lambda p: below_a_file(p, "DATA"), "CIFAR-100.*file/below.*PAPERLIB_DATA"),
    ("no permission to write", read_only, "locked/runs.*cannot be written to.*PAPERLIB_RUNS"),
    # reference networks
    ("no reference", ["weights=reference", "seeds=[99]"], "no committed network .*seed99: add weights=trained"),
    ("a pickle for a reference", lambda p: committed(p, malicious(p)), "seed0.safetensors.*restore"),
    ("a reference without a card", lambda p: committed(p, nocard=True), "seed0.safetensors.*restore"),
    ("an older card", lambda p: committed(p, cct_options=None), "card does not tell cct_options.*restore"),
    ("a reference with other heads", lambda p: [*committed(p), "heads=8"], "heads=4, not 8: add weights=trained"),
    ("a reference for other epochs", lambda p: [*committed(p), "epochs=9"], "epochs=3, not 9: add weights=trained"),
    ("a reference of other images", committed, "trained on another glyphs100: add weights=trained"),
]


@pytest.mark.parametrize(("what", "make", "sentence"), ROWS, ids=[row[0] for row in ROWS])
def test_command_line(what, make, sentence, place, capsys):
    if what == "no permission to write" and os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    words = make(place) if callable(make) else make
    arguments = words if words == ["own"] else ["quick", "--set", *words]
    capsys.readouterr()
    start = time.monotonic()
    assert main(["run", *arguments]) == 2
    assert time.monotonic() - start < SECONDS
    shown = capsys.readouterr()
    one_sentence(shown.err, sentence)
    assert shown.out == ""


def test_a_walk_that_cannot_write_its_notebooks(folders, monkeypatch, capsys):
    monkeypatch.setattr(papermill, "execute_notebook", no_room)
    assert main(["run", "quick", "--set", *draw(folders / "pictures")]) == 1
    assert "01_train_cct.ipynb was not written ([Errno 28] No space left" in capsys.readouterr().out


# --- library: files of a run

RECIPE = training.Recipe(
    epochs=2, batch_size=4, lr=0.01, weight_decay=0.0, warmup=0.0, label_smoothing=0.0, shift=0, flip=False
)


def toy(seed=0):
    pixels = torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(8) % 2
    return data.Images("toy", pixels, labels, pixels, labels, ("a", "b"))


def train(path, images=None, width=2, recipe=RECIPE):
    with training.seeded(0):
        network = nn.Sequential(nn.Flatten(), nn.Linear(192, width), nn.Linear(width, 2))
    return training.train(network, images or toy(), recipe, 0, path, log=lambda line: None)


def resume(place, change=lambda state: state, **keywords):
    """Train with a checkpoint that somebody changed."""
    path = place / "checkpoint.pt"
    train(path)
    torch.save(change(torch.load(path, weights_only=True)), path)
    train(path, **keywords)


def foreign(place, content):
    (place / "checkpoint.pt").write_bytes(content)
    train(place / "checkpoint.pt")


def stage(place, name, content):
    """Read a finished stage in which a file was replaced, and its hash with it."""
    (place / "s").mkdir()
    (place / "s" / name).write_bytes(content)
    artefact = store.Stage(place / "s", {})
    return artefact.arrays("x") if name.endswith("npz") else artefact.tensors("x")


def damaged_record(place, name):
    """Compute a stage and write the summary, damage a file of theirs, and do both again."""
    for _ in range(2):
        run = store.Run("quick", load_settings("quick"), toy(), place / "r", place / "f", log=lambda line: 0)
        run.output.mkdir(exist_ok=True)
        run.stage("s", {}, {}, lambda folder: files.save_table(folder / "t.csv", [{"a": 1}]))
        run.record("01", {}, [])
        next(place.path.rglob(name)).write_text('{"half":')


def newer(state):
    return state | {"recipe": state["recipe"] | {"momentum": 0.9}}


def load_reference(place, **changed):
    committed(place, **changed)
    models.load_reference("glyphs100-24-cct_4_7x1-seed0")


ANEW = "delete it to train anew"
LIBRARY = [
    ("a pickle for a checkpoint", lambda p: foreign(p, malicious(p)), f"checkpoint.pt.*{ANEW}"),
    (
        "a pickle in a checkpoint",
        lambda p: (torch.save({"recipe": Trap(p / "trace")}, p / "checkpoint.pt"), train(p / "checkpoint.pt")),
        rf"checkpoint.pt.*\(Weights only load failed\): {ANEW}",
    ),
    ("a text for a checkpoint", lambda p: foreign(p, b"hello"), f"checkpoint.pt.*{ANEW}"),
    ("an empty checkpoint", lambda p: foreign(p, b""), f"checkpoint.pt.*{ANEW}"),
    ("a checkpoint of another architecture", lambda p: resume(p, width=3), f"checkpoint.pt.*state_dict.*{ANEW}"),
    ("a checkpoint of another recipe", lambda p: resume(p, recipe=replace(RECIPE, lr=1.0)), f"another recipe.*{ANEW}"),
    ("a checkpoint of other images", lambda p: resume(p, images=toy(1)), f"other images.*{ANEW}"),
    ("a checkpoint of a newer version", lambda p: resume(p, newer), f"another recipe.*{ANEW}"),
    ("a checkpoint without its parts", lambda p: resume(p, lambda state: {"seed": 0}), f"'recipe'.*{ANEW}"),
    ("a checkpoint that is a list", lambda p: resume(p, lambda state: [1]), f"checkpoint.pt.*{ANEW}"),
    ("a pickle for arrays", lambda p: stage(p, "x.npz", malicious(p)), "x.npz.*remove it, and"),
    ("a pickle for tensors", lambda p: stage(p, "x.safetensors", malicious(p)), "x.safetensors.*remove it, and"),
    ("half a stage.json", lambda p: damaged_record(p, "stage.json"), "stage.json.*remove it, and"),
    ("half a summary.json", lambda p: damaged_record(p, "summary.json"), "summary.json.*remove it, and"),
    ("a reference of another network", lambda p: load_reference(p, model="cct_6_7x1"), "seed0.safetensors.*restore"),
    ("a reference of an unknown network", lambda p: load_reference(p, model="vit"), "unknown model 'vit'.*restore"),
    ("nothing held out", lambda p: data.held_out(torch.arange(4) % 2, 0), "above 0 and below 1.*not 0"),
    ("nan held out", lambda p: data.held_out(torch.arange(4) % 2, float("nan")), "above 0 and below 1.*not nan"),
    ("images too small for a network", lambda p: models.build("vgg_11x2", 5, 8), "must be at least 16, not 8"),
]


@pytest.mark.parametrize(("what", "act", "sentence"), LIBRARY, ids=[row[0] for row in LIBRARY])
def test_library(what, act, sentence, place):
    start = time.monotonic()
    with pytest.raises(ValueError) as caught:
        act(place)
    assert time.monotonic() - start < SECONDS
    one_sentence(str(caught.value), sentence)


def test_the_cnn_cannot_take_one_image_of_one_pixel():
    """Why `settings.check_batches` is there, and why it asks for it below 32 pixels only."""
    with pytest.raises(ValueError, match="more than 1 value"):
        models.build("vgg_11x2", 5, 31).train()(torch.rand(1, 3, 31, 31))
    models.build("vgg_11x2", 5, 32).train()(torch.rand(1, 3, 32, 32))


# --- a full disk


@contextmanager
def full_disk(monkeypatch):
    class Full(io.FileIO):
        write = no_room

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", lambda path, mode: Full(path, mode), raising=False)
        yield


def at(folder):
    """What a figure needs of a run."""
    return SimpleNamespace(output=folder, stamp="")


def save_figure(folder):
    table = pd.DataFrame({"seed": [0], "epoch": [1], "loss": [1.0], "test_accuracy": [0.5]})
    figures.save(figures.learning_curve(table, "toy", 2), at(folder), "x", table)


WRITERS = [
    ("a text", "x.txt", lambda path: files.write_text(path, "x")),
    ("a table", "x.csv", lambda path: files.save_table(path, [{"a": 1}])),
    ("arrays", "x.npz", lambda path: files.save_arrays(path, {"a": torch.rand(9)})),
    ("tensors", "x.safetensors", lambda path: files.save_tensors(path, {"a": torch.rand(9)})),
    ("a figure", "x.png", lambda path: save_figure(path.parent)),
    ("a checkpoint", "x.pt", train),
]


@pytest.mark.parametrize(("what", "name", "write"), WRITERS, ids=[row[0] for row in WRITERS])
def test_full_disk(what, name, write, tmp_path, monkeypatch):
    path = tmp_path / name
    write(path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}
    if name == "x.pt":  # as if stopped after the first of its two epochs
        state = torch.load(path, weights_only=True)
        torch.save(state | {"curve": state["curve"][:1]}, path)
        before[path] = path.read_bytes()
    with full_disk(monkeypatch), pytest.raises(OSError) as caught:
        write(path)
    one_sentence(str(caught.value), rf"{name} was not written \(.*No space left.*make room")
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before
    write(path)  # and with room again, it goes on


def test_room_is_asked_for_only_where_room_is_missing(tmp_path, monkeypatch):
    class Forbidden(io.FileIO):
        def write(self, content):
            raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(files, "open", lambda path, mode: Forbidden(path, mode), raising=False)
    with pytest.raises(OSError, match="Read-only file system") as caught:
        files.write_text(tmp_path / "x", "x")
    assert "make room" not in str(caught.value)


def test_what_a_killed_process_left_is_swept_away_after_an_hour(tmp_path):
    """Not before: another host may still be writing it."""
    old, young, others = (tmp_path / f".{name}.{n}.part" for n, name in enumerate(("x", "x", "y")))
    for path in (old, young, others):
        path.write_text("half")
    for path in (old, others):
        os.utime(path, (0, time.time() - 4000))
    files.write_text(tmp_path / "x", "x")
    assert {path.name for path in tmp_path.iterdir()} == {"x", young.name, others.name}


def test_two_writers_do_not_share_a_partial_file(tmp_path, monkeypatch):
    """Hosts that share a folder may give two processes the same number."""
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with files.whole(tmp_path / "x") as one, files.whole(tmp_path / "x") as other:
        one.write(b"one, whole")
        other.write(b"other")
    assert (tmp_path / "x").read_bytes() == b"one, whole" and len(list(tmp_path.iterdir())) == 1


def test_tensors_are_as_readable_as_other_files(tmp_path):
    """A library that renames a file of its own over the partial one would leave it private, and not on the disk."""
    files.save_tensors(tmp_path / "x.safetensors", {"a": torch.rand(9)})
    files.write_text(tmp_path / "x.txt", "x")
    assert (tmp_path / "x.safetensors").stat().st_mode == (tmp_path / "x.txt").stat().st_mode


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), PermissionError(errno.EACCES, "no")]
)
def test_what_the_machine_refuses_does_not_condemn_a_file(error, tmp_path):
    with pytest.raises(type(error)), files.reading(tmp_path / "x", "delete it"):
        raise error


def toy_images(classes):
    """One test image a label, and nothing else."""
    pictures = torch.zeros(len(classes), 3, 8, 8, dtype=torch.uint8)
    return data.Images("toy", pictures, torch.arange(len(classes)), pictures, torch.arange(len(classes)), classes)


@pytest.mark.parametrize("count", [2, 11, 13])
def test_few_labels_are_drawn_too(count, tmp_path):
    classes = tuple(f"label {index}" for index in range(count))
    field = -torch.eye(count)  # recognises nothing
    for clusters in ([], [list(range(count))]):
        figure = figures.node_matrix(field, field > 0, clusters, toy_images(classes), "node 1")
        figures.save(figure, at(tmp_path), "node", pd.DataFrame({"a": [1]}))
        picture = figure.axes[0].images[0].get_array()
        assert picture.max() <= 0 and picture.min() < 0  # what is negative stays so
    figures.node_gallery({("encoder 1", "none"): (torch.zeros(count, count), [])}, classes, "toy", "ff2")


def test_a_cache_that_has_no_room_is_not_needed(folders, monkeypatch, capsys):
    parts = [np.zeros((2, 8, 8, 3), np.uint8), np.arange(2)] * 2
    with full_disk(monkeypatch):
        images = sources._cached("toy", folders / "data" / "toy.npz", lambda: (*parts, ["a", "b"]))
    assert images.classes == ("a", "b") and list((folders / "data").iterdir()) == []
    assert "decoded again next time" in capsys.readouterr().out


# --- images and names that are unusual, not wrong


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGBA", "CMYK", "YCbCr", "I", "I;16"])
def test_every_kind_of_pixel_is_read(mode):
    """A white image stays white. (Grey, 16-bit, palette and alpha, pixel by pixel: test_data.py)"""
    white = Image.new("RGB", (9, 9), "white")
    image = white.convert(mode) if not mode.startswith("I") else Image.new(mode, (9, 9), 65535)
    assert (folder.square(image, 8) >= 254).all()


NAMES = [
    "<script>alert(1)<script>", "$x_{$", r"\$a$", "it's \"quoted\"", "two\nlines", "comma, semicolon;", "a" * 250,
    "שלום\u202e", "🦜🏳️", "\x1b[31m", "=1+1", " ",
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:(Glyph|constrained_layout|Tight layout)")
def test_hostile_names_pass_through_figures_and_tables(tmp_path):
    image = Image.new("RGB", (8, 8), "red")
    bad = os.fsdecode(b"no utf-8 \xff")
    labels = [*NAMES, bad]
    parts = {f"train_{name}": [image] for name in labels}
    parts |= {f"test_{name}": [Image.new("RGB", (8, 8), "blue")] for name in labels}
    draw(tmp_path / "$i_{$", **(parts | dict.fromkeys(("train_a", "train_b", "test_a", "test_b"))))
    images = data.load(f"folder:{tmp_path / '$i_{$'}", image_size=8)
    assert set(images.classes) == {*NAMES, "no utf-8 ?"}
    images = replace(images, classes=(*images.classes[:-1], "b" * 300))
    count = len(images.classes)
    eye = torch.eye(count)
    rows = [
        {"nodes": nodes, "head": head, "label": label, "count": 1}
        for nodes in ("of heads", "reassigned")
        for head in range(2)
        for label in range(count)
    ]
    drawn = {
        "examples": figures.examples(images),
        "node": figures.node_matrix(eye, eye > 0, [[0, 1], [2]], images, "node 1"),
        "heads": figures.head_map(pd.DataFrame(rows), images.classes, images.name, "encoder 1"),
    }
    table = pd.DataFrame({"label": images.classes})
    for name, figure in drawn.items():
        figures.save(figure, at(tmp_path / "f"), name, table)
        ElementTree.parse(tmp_path / "f" / f"{name}.svg")
        with Image.open(tmp_path / "f" / f"{name}.png") as picture:
            assert max(picture.size) < 6000
        with open(tmp_path / "f" / f"{name}.csv", newline="", encoding="utf-8") as file:
            assert [label for (label,) in csv.reader(file)] == ["label", *images.classes]
    files.write_text(tmp_path / "summary.json", json.dumps({"classes": images.classes}, ensure_ascii=False))
    assert tuple(files.read_json(tmp_path / "summary.json")["classes"]) == images.classes


# --- settings that YAML, or a shell, would read otherwise than they are written


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("data=folder:/photos #2", "folder:/photos #2"), ("epochs=010", "010"), ("epochs=1:30", "1:30"),
        ("optimizer=no", "no"), ("model=on", "on"), ("lr=6e-4", 6e-4), ("lr=1", 1), ("lr=.5", 0.5),
        ("blind=true", True),
        ("seeds=[0, 1]", [0, 1]), ("epochs=0x10", "0x10"), ("epochs=1_000", "1_000"), ("data=", None),
        
        ("data=2026-01-01", "2026-01-01"), ("lr=e5", "e5"),
    ],
)  # fmt: skip
def test_values_are_what_is_written(text, value):
    assert settings.changes_of([text]) == {text.partition("=")[0]: value}


@pytest.mark.parametrize("text", ["epochs=010", "epochs=1:30", "lr=010", "lr=1_000", "epochs=0x10", "blind=yes"])
def test_numbers_are_plain_decimals(text, refuses):
    with refuses(f"parameter '{text.partition('=')[0]}'"):
        load_settings("quick", settings.changes_of([text]))


def test_a_name_that_stands_twice_is_refused(tmp_path, monkeypatch, refuses):
    with refuses("names epochs twice"):
        settings.changes_of(["epochs=1", "epochs=2"])
    for name in ("base", "quick"):
        (tmp_path / f"{name}.yaml").write_text((settings._folder() / f"{name}.yaml").read_text())
    with open(tmp_path / "quick.yaml", "a") as file:
        file.write("\nlr: 1.0e-3\nlr: 2.0e-3\n")
    monkeypatch.setattr(settings, "_folder", lambda: tmp_path)
    with refuses("quick.yaml.*twice"):
        load_settings("quick")


def test_a_notebook_takes_its_settings_as_text_too(refuses):
    assert load_settings("quick", '{"epochs": 1}').epochs == 1
    for text in ("epochs", "[1]", "{"):
        with refuses("settings must be a dictionary"):
            load_settings("quick", text)
    with refuses("unknown profile '1'"):
        load_settings(1)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("cnn", "vgg_11x100000", "100,000 filters"), ("seeds", list(range(20_000)), "100 items")],
)
def test_what_no_machine_can_do_is_refused(name, value, words, refuses):
    with refuses(words):
        load_settings("quick", {name: value})


# --- records and paths


@pytest.mark.parametrize("name", ["stage", "config", "inputs", "outputs", "sha256", "seconds", "peak_gb"])
def test_a_record_without_one_of_its_parts_names_its_file(name, tmp_path, refuses):
    run = store.Run("quick", load_settings("quick"), toy(), tmp_path / "r", tmp_path / "f", log=lambda line: 0)
    run.stage("s", {}, {}, lambda folder: files.save_table(folder / "t.csv", [{"a": 1}]))
    (path,) = tmp_path.rglob("stage.json")
    record = json.loads(path.read_text())
    del record[name]
    path.write_text(json.dumps(record))
    with refuses(f"stage.json cannot be used .*{name}"):
        replace(run, finished={}).stage("s", {}, {}, lambda folder: None)


def test_an_array_that_claims_more_than_its_file_holds_is_not_allocated(tmp_path, refuses):
    path = tmp_path / "x.npz"
    files.save_arrays(path, {"a": torch.zeros(4)})
    with zipfile.ZipFile(path, "w") as archive, archive.open("a.npy", "w") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "<f8", "fortran_order": False, "shape": (350_000_000_000,)}
        )
    with refuses("x.npz cannot be used .*not as large as its header says"):
        files.load_arrays(path)


@pytest.mark.parametrize(("value", "end"), [("", "runs"), ("  ", "runs"), ("~/r", "home/r"), (" a b ", "a b")])
def test_folders_of_the_environment(value, end, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PAPERLIB_RUNS", value)
    assert str(paths.folder_of("runs")).endswith(f"/{end}")


def test_the_home_of_nobody_is_named(monkeypatch, refuses):
    monkeypatch.setenv("PAPERLIB_RUNS", "~nosuchuser/r")
    with refuses("PAPERLIB_RUNS='~nosuchuser/r'.*does not exist"):
        paths.folder_of("runs")
