"""The numbered notebooks as files: which there are, and how outputs of an executed copy get into them."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import nbformat
from PIL import Image

from paperlib.data import EMBEDDED, TEXTS
from paperlib.paths import root

TEXT = "07_text"  # the notebook of texts; all others are of images
OWN = "08_your_network"  # trains a network of another library on the embedded images
START = "00_start_here"  # reads what the others have measured, so it is run last and records nothing


def notebook_files() -> list[Path]:
    """The numbered notebooks, in the order in which a walk runs them."""
    return sorted((root() / "notebooks").glob("[0-9][0-9]_*.ipynb"), key=lambda path: (path.stem == START, path.name))


def notebooks_of(data_name: str) -> list[Path]:
    """The notebooks of a walk on this data set, in their order."""
    if data_name in TEXTS:
        return [path for path in notebook_files() if path.stem == TEXT]
    return [path for path in notebook_files() if path.stem != TEXT and (path.stem != OWN or data_name in EMBEDDED)]


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode, profile: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of an executed copy, pictures in 256 colours; ValueError if the copy is of
    something else."""
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = [cell for cell in executed.cells if cell not in injected]
    if [cell.source for cell in cells] != [cell.source for cell in source.cells]:
        raise ValueError("the executed copy has other cells: run the notebooks again")
    if not all(f'profile = "{profile}"' in cell.source and "settings = {}" in cell.source for cell in injected):
        raise ValueError("the executed copy had other parameters: run the notebooks without --set")
    for cell, copy in zip(source.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = copy.outputs
            for output in cell.outputs:
                if picture := output.get("data", {}).get("image/png"):
                    output["data"]["image/png"] = in_few_colours(picture)
    number(source.cells)
    return source


def in_few_colours(picture: str) -> str:
    """A PNG in base64 with a palette of 256 colours, a third of its size; as it is where that is no gain, or where
    something shines through."""
    image, file = Image.open(io.BytesIO(base64.b64decode(picture))), io.BytesIO()
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
        return picture
    image.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), picture, key=len)


def number(cells: Iterable[nbformat.NotebookNode]) -> None:
    """Count code cells and their results from 1, as one run from top to bottom does."""
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
