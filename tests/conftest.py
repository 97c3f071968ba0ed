"""What several test files share."""

import json
import os
import shutil
from contextlib import contextmanager

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests compare bits, which a GPU does not repeat; see test_devices.py

import hypothesis
import numpy as np
import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from paperlib import paths
from paperlib.experiment import settings, store
from paperlib.models import cct

# The same examples every time, and no time limit for one: machines differ, and the first call of an operation is slow.
hypothesis.settings.register_profile("paperlib", derandomize=True, database=None, deadline=None, max_examples=60)
hypothesis.settings.load_profile("paperlib")

os.environ["PAPERLIB_HEADLESS"] = "1"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


@pytest.fixture
def browser():
    """A real browser; skips the test where there is none."""
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip("no browser: install Chromium (Debian: apt install chromium)")
    from playwright.sync_api import sync_playwright  # here, because other tests do without

    with sync_playwright() as playwright:
        # offline as far as the browser itself goes: it asks its makers for updates otherwise
        quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
        started = playwright.chromium.launch(executable_path=path, args=quiet)
        yield started
        started.close()


@pytest.fixture
def quick_figures(tmp_path):
    """What a run of `quick` might leave: pictures and (short) tables of every name, and a summary that names it."""
    ignored = shutil.ignore_patterns("stages", "benchmarks")
    folder = shutil.copytree(paths.root() / "figures" / "cifar100-cpu", tmp_path / "quick", ignore=ignored)
    summary = json.loads((folder / "summary.json").read_text())
    summary |= {"profile": "quick", "config": settings.load_settings("quick").model_dump(), "seeds": [0]}
    (folder / "summary.json").write_text(json.dumps(summary))
    stamp = PngInfo()
    stamp.add_text("Comment", store.stamp_of(summary["config"], summary["data"]["sha256"]))
    for picture in folder.glob("*.png"):
        Image.open(picture).save(picture, pnginfo=stamp, compress_level=1)
    for table in folder.glob("*.csv"):
        table.write_text("".join(table.read_text().splitlines(keepends=True)[:50]))
    return folder


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Run and data folders that only this test uses."""
    for kind in ("RUNS", "DATA"):
        monkeypatch.setenv(f"PAPERLIB_{kind}", str(tmp_path / kind.lower()))
    (tmp_path / "data").mkdir()
    return tmp_path


@pytest.fixture
def write_cache():
    """write_cache(path, labels, size, train=4, test=2): a data cache of random images."""

    def write(path, labels, size, train=4, test=2):
        rng = np.random.default_rng(0)
        arrays = {"classes": np.array([f"label {i}" for i in range(labels)])}
        for part, images in (("train", train), ("test", test)):
            arrays[f"y_{part}"] = np.repeat(np.arange(labels, dtype=np.uint8), images)
            arrays[f"x_{part}"] = rng.integers(0, 256, (labels * images, size, size, 3), dtype=np.uint8)
        np.savez(path, **arrays)

    return write


@pytest.fixture
def build():
    """build(name, ...): a CCT in evaluation mode whose parameters all carry noise, so that heads attend to different
    tokens and no bias, norm or position is neutral."""

    def make(name="cct_2_3x2", num_classes=5, image_size=16, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = cct(name, num_classes=num_classes, image_size=image_size, **options)
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter += 0.1 * torch.randn(parameter.shape)
        return network.eval()

    return make


@pytest.fixture
def network(build):
    """The smallest CCT: 2 encoders, 2 heads, 128 nodes, 16 tokens, 5 labels."""
    return build()


@pytest.fixture
def refuses():
    """refuses(pattern): the block must end in a ValueError whose one sentence matches."""

    @contextmanager
    def check(pattern):
        with pytest.raises(ValueError, match=pattern) as caught:
            yield
        assert len(str(caught.value).splitlines()) == 1

    return check
