"""Tell the notebooks where the project is published, so that they open in Colab.

python notebooks/publish.py https://github.com/OWNER/NAME

Every notebook gets badges on top and, behind its parameters, one cell, the same everywhere: in Colab it fetches the
project and what Colab lacks, elsewhere it does nothing. The README gets a badge for each notebook, CITATION.cff the
address. May be run again, with another address too. The branch is main.
"""

import argparse
import re
import sys

import nbformat
from store_outputs import notebook_files, number, with_lines

from paperlib import runs

MARKS = ("<!-- where to open the notebooks: made by notebooks/publish.py -->", "<!-- end of notebooks -->")
FETCH = """\
# In Colab: fetches the project, and what Colab lacks. Elsewhere: nothing.
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    if not os.path.exists("colab.py"):
        if not os.path.isdir("{name}"):
            subprocess.run(["git", "clone", "--quiet", "--depth", "1", "{address}", "{name}"], check=True)
        os.chdir("{name}/notebooks")
        sys.path[:0] = [os.path.abspath("."), os.path.abspath("..")]
    import colab

    colab.prepare()"""


def badges(address: str, path: str) -> str:
    """Links to a notebook in Colab and on GitHub, as badges."""
    shown = "https://img.shields.io/badge"
    place = f"{address.removeprefix('https://github.com/')}/blob/main/{path}"
    links = [
        f"[![open in Colab]({shown}/Colab-open-F9AB00)](https://colab.research.google.com/github/{place})",
        f"[![view on GitHub]({shown}/GitHub-view-181717)](https://github.com/{place})",
    ]
    return " ".join(links)


def published(notebook: nbformat.NotebookNode, path: str, address: str) -> nbformat.NotebookNode:
    """The notebook with badges and the cell that fetches the project, in place of those that it has."""
    cells = [cell for cell in notebook.cells if "published" not in cell.metadata.get("tags", [])]
    tagged = {"metadata": {"tags": ["published"]}}
    behind = next(i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])) + 1
    text = FETCH.format(name=address.rpartition("/")[2], address=address)
    head = nbformat.v4.new_markdown_cell(badges(address, path), id="published-badges", **tagged)
    fetch = nbformat.v4.new_code_cell(text, id="published-fetch", **tagged)
    notebook.cells = [head, *cells[:behind], fetch, *cells[behind:]]
    number(notebook.cells)
    return notebook


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("address")
    return result


def main(arguments: list[str] | None = None) -> int:
    address, root = parser().parse_args(arguments).address.removesuffix("/").removesuffix(".git"), runs.root()
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        print(f"publish: {address!r} is not of the form https://github.com/OWNER/NAME", file=sys.stderr)
        return 2
    notebooks, lines = {}, []
    for path in notebook_files():
        place = f"notebooks/{path.name}"
        notebooks[path] = published(nbformat.read(path, as_version=4), place, address)
        lines.append(f"* {path.stem.replace('_', ' ')}: {badges(address, place)}")
    try:
        page = with_lines((root / "README.md").read_text(encoding="utf-8"), MARKS, "\n".join(lines))
    except ValueError as error:
        print(f"publish: README.md: {error}", file=sys.stderr)
        return 2
    citation = re.sub(r"^repository-code: .*\n", "", (root / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M)
    runs.write_text(root / "README.md", page)
    runs.write_text(root / "CITATION.cff", f"{citation}repository-code: {address}\n")
    for path, notebook in notebooks.items():
        runs.write_text(path, nbformat.writes(notebook) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
