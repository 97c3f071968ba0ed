"""Colab: badges, the cell that fetches the project there, and what that cell installs.

This module is imported before anything else is there: it needs the standard library and `packaging` only.
"""

import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

if TYPE_CHECKING:
    from nbformat import NotebookNode

MARKS = ("<!-- where to open the notebooks: made by python -m paperlib publish -->", "<!-- end of notebooks -->")
FETCH = """\
# In Colab: fetches the project, and what Colab lacks. Elsewhere: nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.isdir("{name}"):
        subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "{name}"], check=True)
    sys.path.insert(0, os.path.abspath("{name}"))
    from paperlib import colab

    colab.prepare()"""
KEPT = ("torch", "torchvision", "numpy")  # Colab's own builds fit its GPUs and each other


def missing() -> list[str]:
    """The package's requirements that this Python does not meet, as pip takes them. Those of the notebooks are left
    out: Colab has a front end, a kernel and widgets of its own, and crashes with others."""
    file = Path(__file__).parent.parent / "pyproject.toml"
    project = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    named = map(Requirement, project["dependencies"])
    return [str(one) for one in named if not one.specifier.contains(_version(one.name) or "0", prereleases=True)]


def prepare() -> None:
    """Install what is missing, replacing nothing of `KEPT`, and say so if there is no GPU."""
    if wanted := missing():
        kept = [f"{name}=={found}" for name in KEPT if (found := _version(name))]
        with tempfile.TemporaryDirectory() as folder:
            pins = Path(folder) / "kept.txt"
            pins.write_text("\n".join(kept), encoding="utf-8")
            subprocess.run([sys.executable, "-m", "pip", "install", "-q", *wanted, "-c", str(pins)], check=True)
    import torch

    if not torch.cuda.is_available():
        print("No GPU: Runtime > Change runtime type gives one. The profile quick takes minutes without it.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def badges(address: str, path: str) -> str:
    """Links to a notebook in Colab and on GitHub, as badges."""
    shown = "https://img.shields.io/badge"
    place = f"{address.removeprefix('https://github.com/')}/blob/main/{path}"
    links = [
        f"[![open in Colab]({shown}/Colab-open-F9AB00)](https://colab.research.google.com/github/{place})",
        f"[![view on GitHub]({shown}/GitHub-view-181717)](https://github.com/{place})",
    ]
    return " ".join(links)


def published(notebook: "NotebookNode", path: str, address: str) -> "NotebookNode":
    """The notebook with badges and the cell that fetches the project, in place of those that it has."""
    import nbformat

    from paperlib import notebooks

    cells = [cell for cell in notebook.cells if "published" not in cell.metadata.get("tags", [])]
    tagged = {"metadata": {"tags": ["published"]}}
    behind = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    text = FETCH.format(name=address.rpartition("/")[2], address=address)
    head = nbformat.v4.new_markdown_cell(badges(address, path), id="published-badges", **tagged)
    fetch = nbformat.v4.new_code_cell(text, id="published-fetch", **tagged)
    notebook.cells = [head, *cells[:behind], fetch, *cells[behind:]]
    notebooks.number(notebook.cells)
    return notebook
