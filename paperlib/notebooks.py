"""The numbered notebooks as files: which there are, and how outputs of an executed copy get into them."""

from collections.abc import Iterable
from pathlib import Path

import nbformat

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
    """The notebook with the outputs of an executed copy; ValueError if the copy is of something else."""
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = [cell for cell in executed.cells if cell not in injected]
    if [cell.source for cell in cells] != [cell.source for cell in source.cells]:
        raise ValueError("the executed copy has other cells: run the notebooks again")
    if not all(f'profile = "{profile}"' in cell.source and "settings = {}" in cell.source for cell in injected):
        raise ValueError("the executed copy had other parameters: run the notebooks without --set")
    for cell, copy in zip(source.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = copy.outputs
    number(source.cells)
    return source


def number(cells: Iterable[nbformat.NotebookNode]) -> None:
    """Count code cells and their results from 1, as one run from top to bottom does."""
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
