"""Put the results of a finished run where readers find them: figures, tables, summary.json and small files of stages
into figures/<profile>, outputs into the notebooks, tables into README and docs.

Only results that others can make again are published: of committed networks, with a profile's own settings. A run of
hours can be computed in several sittings: with --unfinished, the stages that are done are stored, no more; and a run of
some notebooks (--only) is stored with the claims of the others as not measured yet. With --figures-only, stages stay
out, where those would make the repository too large: such results can be looked at, and made anew by a run, but not
checked without images.

With --address https://github.com/OWNER/NAME, notebooks and docs/usage.md get badges that open them in Colab, and a cell
that fetches the project there. May be given again, with another address too. The branch is main.
"""

import argparse
import itertools
import re
import shutil
from pathlib import Path

import nbformat

from paperlib import colab, frontpage, notebooks, pages
from paperlib.experiment import settings
from paperlib.experiment.store import LARGE
from paperlib.files import pack, read_json, whole, write_text
from paperlib.paths import folder_of, root

SHOWN = "cifar100-cpu"  # the profile whose outputs README and the notebooks of images show
SHOWN_TEXT = "clinc150-cpu"  # and that of the notebook of texts
SHOWN_OWN = "quick"  # and that of the notebook on networks of others, of which nothing else is published
PACKED_FROM = 50_000  # bytes of a stage's table
FIGURES = (".png", ".pdf", ".svg", ".csv", ".json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", metavar="PROFILE", choices=settings.profiles())
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--unfinished", action="store_true", help="store the stages that are done, nothing else")
    how.add_argument("--figures-only", action="store_true", help="store no stages")
    how.add_argument("--address", metavar="URL", help="where the project is published, for Colab")


def execute(options: argparse.Namespace) -> int:
    if options.address:
        publish_address(options.address.removesuffix("/").removesuffix(".git"))
    elif not options.profile:
        raise ValueError(f"say which profile: {', '.join(settings.profiles())}")
    elif options.unfinished:
        publish_stages(options.profile)
    else:
        publish_results(options.profile, options.figures_only)
    return 0


def publish_results(profile: str, figures_only: bool) -> None:
    """A finished run's figures, stages, notebooks and tables."""
    run, figures = folder_of("runs") / profile, root() / "figures" / profile
    summary = read_json(run / "walk" / "summary.json")
    if summary["config"] != settings.load_settings(profile).model_dump():
        raise ValueError("the run had other settings than the profile has now: run it again")
    executed = _executed(profile, run / "walk", summary) if profile in (SHOWN, SHOWN_TEXT, SHOWN_OWN) else {}
    if profile == SHOWN_OWN:
        return _write({path: notebook for path, notebook in executed.items() if path.stem == notebooks.OWN})
    if summary["config"]["weights"] != "reference":
        raise ValueError(f"{profile} trains networks of its own: only results of committed networks are published")
    for path in sorted((run / "walk").iterdir()):
        if path.suffix in FIGURES:
            figures.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, figures)
    if not figures_only:
        kept = figures / "stages"
        measuring = {path.stem for path in notebooks.notebooks_of(summary["data"]["name"])} - {notebooks.START}
        complete = summary["results"].keys() >= measuring
        others = {} if complete else finished_stages(kept)  # a run of some notebooks does not know theirs
        store_stages(others | {name: stage["key"] for name, stage in summary["stages"].items()}, run / "stages", kept)
    if profile == SHOWN:
        publish_frontpage(figures)
    _write(executed)
    for page in (root() / "README.md", *sorted((root() / "docs").glob("*.md"))):
        to_root = "../" if page.parent.name == "docs" else ""
        write_text(page, pages.with_results(page.read_text(encoding="utf-8"), figures, to_root))


def publish_frontpage(figures: Path) -> None:
    """The pictures of README, for light and dark pages, wide and narrow ones, beside the profiles' folders."""
    for dark, narrow in itertools.product((False, True), repeat=2):
        for name, picture in (
            ("hero", frontpage.hero(figures, dark, narrow)),
            ("anatomy", frontpage.anatomy(dark, narrow)),
        ):
            with whole(figures.parent / f"{name}{'-narrow' * narrow}{'-dark' * dark}.png") as file:
                picture.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _executed(profile: str, folder: Path, summary: dict) -> dict[Path, nbformat.NotebookNode]:
    """The run's notebooks with its outputs; all of them or none."""
    found = {}
    for path in notebooks.notebook_files():
        if path.stem in summary["results"] or (path.stem == notebooks.START and (folder / path.name).exists()):
            copy = nbformat.read(folder / path.name, as_version=4)
            try:
                found[path] = notebooks.with_outputs(nbformat.read(path, as_version=4), copy, profile)
            except ValueError as error:
                raise ValueError(f"{path.name}: {error}") from None
    return found


def _write(found: dict[Path, nbformat.NotebookNode]) -> None:
    for path, notebook in found.items():
        write_text(path, nbformat.writes(notebook) + "\n")


def publish_stages(profile: str) -> None:
    """The finished stages of a run that is not done yet, beside those that are committed."""
    made, kept = folder_of("runs") / profile / "stages", root() / "figures" / profile / "stages"
    if settings.load_settings(profile).weights != "reference":
        raise ValueError(f"{profile} trains networks of its own, so its stages fit nobody else's")
    before, now = finished_stages(kept), finished_stages(made)
    now = {name: key for name, key in now.items() if "train-" not in name}
    if other := sorted(name for name in before.keys() & now if before[name] != now[name]):
        places = f"{kept / other[0]} or {made / other[0]}"
        raise ValueError(f"{other[0]} is stored with other settings: remove {places}")
    store_stages(before | now, made, kept)


def finished_stages(folder: Path) -> dict[str, str]:
    """The finished stages: stage -> key. ValueError if one was computed with several settings."""
    found: dict[str, str] = {}
    for name, key in sorted(path.parent.parts[-2:] for path in folder.glob("*/*/stage.json")):
        if found.setdefault(name, key) != key:
            raise ValueError(f"{folder / name} has several finished stages: remove those of other settings")
    return found


def store_stages(used: dict[str, str], stages: Path, target: Path) -> None:
    """The small files of the stages that a summary names (stage -> key), from a run or from what is committed already,
    large tables packed; others are removed."""
    for name, key in used.items():
        made, copy = stages / name / key, target / name / key
        if not copy.exists():
            if not (made / "stage.json").exists():
                raise ValueError(f"{made} is not there: run the notebooks again")
            large = [path.name for path in made.iterdir() if path.suffix == LARGE]
            partial = target.with_name(f".{target.name}.part")  # a torn copy would be taken for the stage
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(made, partial, ignore=shutil.ignore_patterns(*large, ".*.part"))
            for table in partial.glob("*.csv"):
                if table.stat().st_size > PACKED_FROM:
                    pack(table)
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(copy)
    for place in target.glob("*/*"):
        if used.get(place.parent.name) != place.name:
            shutil.rmtree(place)


def publish_address(address: str) -> None:
    """Badges and the cell for Colab in every notebook, badges in docs/usage.md, the address in CITATION.cff."""
    if not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(f"{address!r} is not of the form https://github.com/OWNER/NAME")
    found, lines = {}, []
    for path in notebooks.notebook_files():
        place = f"notebooks/{path.name}"
        found[path] = colab.published(nbformat.read(path, as_version=4), place, address)
        lines.append(f"* {path.stem.replace('_', ' ')}: {colab.badges(address, place)}")
    usage = root() / "docs" / "usage.md"
    try:
        page = pages.with_lines(usage.read_text(encoding="utf-8"), colab.MARKS, "\n".join(lines))
    except ValueError as error:
        raise ValueError(f"docs/usage.md: {error}") from None
    citation = re.sub(r"^repository-code: .*\n", "", (root() / "CITATION.cff").read_text(encoding="utf-8"), flags=re.M)
    write_text(usage, page)
    write_text(root() / "CITATION.cff", f"{citation}repository-code: {address}\n")
    _write(found)
