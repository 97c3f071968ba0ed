"""Where the project is, and where its runs and data are."""

import os
from pathlib import Path


def root() -> Path:
    """The project: the folder with pyproject.toml and notebooks/ at or above the working directory, else around the
    package."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "pyproject.toml").is_file():
            return folder
    raise FileNotFoundError("no project folder (with pyproject.toml and notebooks/) at or above the working directory")


def folder_of(kind: str) -> Path:
    """Where `runs` or `data` live: $PAPERLIB_RUNS, $PAPERLIB_DATA (relative to the project, ~ is the home folder), else
    inside it. ValueError for the home folder of nobody."""
    name = f"PAPERLIB_{kind.upper()}"
    value = os.environ.get(name, "").strip() or kind
    try:
        return (root() / Path(value).expanduser()).resolve()
    except RuntimeError:
        raise ValueError(f"{name}={value!r} begins with the home folder of a user who does not exist") from None
