"""Published notebooks open in Colab: badges that point at themselves, and a cell that fetches what is missing there."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image

from paperlib import colab, paths
from paperlib import notebooks as notebook_files
from paperlib.cli import main, publish

ROOT = paths.root()
ADDRESS = "https://github.com/someone/companion"


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The notebooks, the page on usage and the citation in a folder of this test's own."""
    (tmp_path / "notebooks").mkdir()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, tmp_path / "notebooks")
    (tmp_path / "docs").mkdir()
    for name in ("docs/usage.md", "CITATION.cff"):
        shutil.copy(ROOT / name, tmp_path / name)
    for module in (publish, notebook_files):
        monkeypatch.setattr(module, "root", lambda: tmp_path)
    return tmp_path


def notebooks(folder):
    return {path.name: nbformat.read(path, as_version=4) for path in sorted((folder / "notebooks").glob("*.ipynb"))}


def publish_at(address):
    return main(["publish", "--address", address])


def test_badges_point_at_the_notebook_that_they_stand_in(copy):
    before = notebooks(copy)
    assert publish_at(ADDRESS + "/") == 0
    page, fetching = (copy / "docs" / "usage.md").read_text(), set()
    for name, notebook in notebooks(copy).items():
        nbformat.validate(notebook)
        place = f"someone/companion/blob/main/notebooks/{name}"
        for link in (f"(https://colab.research.google.com/github/{place})", f"(https://github.com/{place})"):
            assert link in notebook.cells[0].source and link in page
        own = [cell for cell in notebook.cells if "published" in cell.metadata.get("tags", [])]
        rest = [cell for cell in notebook.cells if cell not in own]
        assert [cell.source for cell in rest] == [cell.source for cell in before[name].cells] and len(own) == 2
        place = notebook.cells.index(own[1])
        assert "parameters" in notebook.cells[place - 1].metadata.tags
        fetching.add(own[1].source)
        counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
        assert counts == list(range(1, len(counts) + 1))
    assert len(fetching) == 1
    assert f"repository-code: {ADDRESS}\n" in (copy / "CITATION.cff").read_text()


def test_another_address_replaces_the_first(copy):
    assert publish_at(ADDRESS) == 0
    once = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert publish_at("https://github.com/other/place.git") == 0
    assert not any("someone" in path.read_text() for path in once)
    assert publish_at(ADDRESS) == 0
    assert {path: path.read_bytes() for path in once} == once


@pytest.mark.parametrize("address", ["github.com/a/b", "https://github.com/a", 'https://github.com/a/b"; import os'])
def test_an_address_of_another_form_is_refused(address, copy, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert publish_at(address) == 2
    assert "https://github.com/OWNER/NAME" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


def test_without_its_place_on_the_page_nothing_is_written(copy, capsys):
    (copy / "docs" / "usage.md").write_text("# a page of one's own")
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert publish_at(ADDRESS) == 2
    assert "docs/usage.md: the lines" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in before} == before


IMITATION = """
import importlib.metadata, json, os, sys, types
sys.modules["google.colab"] = types.ModuleType("google.colab")
known = importlib.metadata.version
def version(name):  # Colab has not installed the project
    if name == "paperlib":
        raise importlib.metadata.PackageNotFoundError(name)
    return known(name)
importlib.metadata.version = version
for cell in json.loads(sys.argv[1]):
    exec(cell)
exec(sys.argv[2])  # whoever runs that cell twice loses nothing
run.record("01_train_cct", {}, [])
import paperlib
print(os.path.abspath(paperlib.__file__))
print(len(run.images.classes), os.getcwd(), run.output)
"""


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout, so it cannot be cloned")
def test_in_colab_a_notebook_fetches_the_project(tmp_path):
    """Colab's folder is empty but for its samples; the notebook alone was opened."""
    notebook = nbformat.read(ROOT / "notebooks" / "01_train_cct.ipynb", as_version=4)
    cells = colab.published(notebook, "notebooks/01_train_cct.ipynb", ADDRESS).cells
    code = [cell.source.replace(ADDRESS, ROOT.as_uri()) for cell in cells if cell.cell_type == "code"][:3]
    inside = {name: value for name, value in os.environ.items() if not name.startswith("PAPERLIB_")}
    for _ in range(2):  # the second kernel finds the clone
        command = [sys.executable, "-c", IMITATION, json.dumps(code), code[1]]
        done = subprocess.run(command, cwd=tmp_path, env=inside, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        here, opened = done.stdout.splitlines()[-2:]
        place = tmp_path / "companion"
        assert here == str(place / "paperlib" / "__init__.py")
        assert opened == f"100 {tmp_path} {place / 'runs' / 'quick' / 'walk'}"
        assert ("No GPU" in done.stdout) != torch.cuda.is_available()


def test_colab_keeps_its_torch(monkeypatch):
    have = {"torch": "2.9.0+cu126", "torchvision": "0.24.0+cu126", "numpy": "2.0.2", "pandas": "1.5.0"}
    have |= {"ipykernel": "6.17.1", "ipywidgets": "7.7.1"}
    monkeypatch.setattr(colab, "_version", have.get)
    commands = []

    def run(command, check):
        commands.append([*command[:-1], Path(command[-1]).read_text()])

    monkeypatch.setattr(colab.subprocess, "run", run)
    colab.prepare()
    (command,) = commands
    assert {"pydantic>=2", "safetensors>=0.4", "pandas>=2.1"} <= set(command)  # missing, or too old
    assert not any(word.startswith(("torch>", "torchvision", "numpy", "ipy", "jupyter")) for word in command[1:-1])
    assert command[-2:] == ["-c", "torch==2.9.0+cu126\ntorchvision==0.24.0+cu126\nnumpy==2.0.2"]


def test_where_nothing_is_missing_nothing_is_installed(monkeypatch):
    assert colab.missing() == []
    monkeypatch.setattr(colab.subprocess, "run", lambda *a, **k: pytest.fail("something was installed"))
    colab.prepare()


def test_stored_pictures_look_as_they_did():
    """They take fewer bytes; what has one colour too many, or shines through, is near, or as it was."""

    def encoded(image):
        file = io.BytesIO()
        image.save(file, "PNG")
        return base64.b64encode(file.getvalue()).decode()

    def pixels(picture):
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(picture))).convert("RGB")).astype(int)

    ramp = np.add.outer(np.arange(200), np.arange(200)) * 255 // 398
    drawn = encoded(Image.fromarray(np.stack([ramp, 255 - ramp, ramp.T // 2], axis=2).astype(np.uint8)).convert("RGBA"))
    stored = notebook_files.in_few_colours(drawn)
    assert len(stored) <= len(drawn) and abs(pixels(stored) - pixels(drawn)).max() <= 4
    clear = encoded(Image.new("RGBA", (20, 20), (10, 20, 30, 100)))
    assert notebook_files.in_few_colours(clear) == clear
