"""Put the results of a finished `./run_all.sh [PROFILE]` where readers find them.

python notebooks/store_outputs.py [PROFILE] [--unfinished | --figures-only]

quick (the default): notebooks keep their cells and take the outputs of the executed copies in the run folder; copies
with other cells or parameters are refused. Other profiles: the executed notebooks become pages for readers without a
kernel, figures/<profile>/pages/*.html, and the small files of the stages that summary.json names are copied to
figures/<profile>/stages, which later walks and notebooks/regenerate.py take them from. The tables of README and docs
are made anew: of verdicts from the profile's summary.json, of reference networks from their cards.

A walk of hours can be computed in several sittings: with --unfinished, the stages that are done are stored, no more;
and a walk of some notebooks (--only) is stored with the claims of the others as not measured yet. With --figures-only,
figures, tables and summary.json stay alone, without pages and stages, where those would make the repository too large:
such results can be looked at, and made anew by a walk, but not regenerated without images.
"""

import argparse
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat
import parameters
import references
from verdicts import BESIDE, of_claims

from paperlib import runs

OF_QUICK = re.compile(r"^As committed, this notebook shows `quick`.*\n*", re.MULTILINE)  # not true of a page
CLAIMS = {
    "C1": "[CNNs and transformers share the mechanism](notebooks/05_cnn_counterpart.ipynb)",
    "C2": "[each node identifies small clusters of labels](notebooks/02_snr_per_encoder.ipynb)",
    "C3": "[features sharpen along the encoders](notebooks/02_snr_per_encoder.ipynb)",
    "C4": "[ANDC pruning does not affect the accuracy](notebooks/03_andc_pruning.ipynb)",
    "C5": "[each head becomes expert in its own labels](notebooks/04_head_modus_vivendi.ipynb)",
    "C6": "[accuracy follows from single nodes](notebooks/02_snr_per_encoder.ipynb)",
}
NOT_YET = "not measured yet"  # a claim whose notebook is not among those of the walk
REFERENCES = ("<!-- reference networks: made by notebooks/store_outputs.py -->", "<!-- end of networks -->")
MARKS = ("<!-- verdicts of {}: made by notebooks/store_outputs.py -->", "<!-- end of verdicts -->")


def verdict_table(summary: dict) -> str:
    """The rows of a summary.json that decide a claim as a Markdown table; a claim is named in its first row."""
    lines = ["| claim (abstract) | measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|---|"]
    words = of_claims(summary["verdicts"])
    for claim, text in CLAIMS.items():
        name = f"{claim}: {text}: **{words.get(claim, NOT_YET)}**"
        rows = [row for row in summary["verdicts"] if row["claim"] == claim and not row["beside"]]
        for number, row in enumerate(rows):
            lines.append(f"| {'' if number else name} | {_cells(row)} |")
        if not rows:
            lines.append(f"| {name} | | | | |")
    return "\n".join(lines)


def claim_table(rows: list[dict]) -> str:
    """The verdict on one claim in bold, all its rows as a Markdown table, and below it each seed's effect and interval
    and the notes, row by row."""
    if not rows:
        return f"**{NOT_YET[0].upper()}{NOT_YET[1:]}.**"
    lines = [f"**{word[0].upper()}{word[1:]}.**\n" for word in of_claims(rows).values()]
    lines += ["| measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|"]
    lines += [f"| {_cells(row)}{BESIDE * row['beside']} |" for row in rows]
    lines += ["", "<details><summary>by seed, and notes</summary>", ""]
    for row in rows:
        seeds = ", ".join(f"{effect:.3f} [{low:.3f}, {high:.3f}]" for effect, low, high in row["by_seed"])
        lines.append(f"* {row['statistic']}: " + "; ".join(part for part in (seeds, row["notes"]) if part))
    return "\n".join([*lines, "", "</details>"])


def _cells(row: dict) -> str:
    effect = "" if row["effect"] is None else f"{row['effect']:.3f} ± {row['uncertainty']:.3f}"
    numbers = f"<br>{row['numbers']}" if row["numbers"] else ""
    return f"{row['statistic']}{numbers} | {effect} | {row['null']} | {row['verdict']}"


def with_tables(page: str, summary: dict) -> str:
    """The page with the verdicts of a walk wherever it has the marks for them: of all claims, or of one."""
    tables = {summary["profile"]: verdict_table(summary)}
    for claim in CLAIMS:
        rows = [row for row in summary["verdicts"] if row["claim"] == claim]
        tables[f"{summary['profile']}, {claim}"] = claim_table(rows)
    for name, table in tables.items():
        if (mark := MARKS[0].format(name)) in page:
            page = with_lines(page, (mark, MARKS[1]), table)
    return page


def with_lines(page: str, marks: tuple[str, str], lines: str) -> str:
    """The page with what stands between two marks replaced; ValueError if they are not there once."""
    if page.count(marks[0]) != 1 or marks[1] not in page.partition(marks[0])[2]:
        raise ValueError(f"the lines {marks[0]} and, below it, {marks[1]} must be there once")
    before, rest = page.split(marks[0])
    return f"{before}{marks[0]}\n{lines}\n{marks[1]}{rest.split(marks[1], 1)[1]}"


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode, profile: str) -> nbformat.NotebookNode:
    """The notebook with the outputs of an executed copy; ValueError if the copy is of something else."""
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = [cell for cell in executed.cells if cell not in injected]
    if [cell.source for cell in cells] != [cell.source for cell in source.cells]:
        raise ValueError("the executed copy has other cells: run ./run_all.sh again")
    if not all(f'profile = "{profile}"' in cell.source and "settings = {}" in cell.source for cell in injected):
        raise ValueError("the executed copy had other parameters: run ./run_all.sh without --set")
    for cell, run in zip(source.cells, cells, strict=True):
        if cell.cell_type == "code":
            cell.outputs = run.outputs
    number(source.cells)
    return source


def number(cells: list[nbformat.NotebookNode]) -> None:
    """Count code cells and their results from 1, as one run from top to bottom does."""
    for count, cell in enumerate((cell for cell in cells if cell.cell_type == "code"), start=1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count


def notebook_files() -> list[Path]:
    """The numbered notebooks, in order."""
    return sorted((runs.root() / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def executed_notebooks(profile: str, names: Iterable[str]) -> dict[Path, tuple[nbformat.NotebookNode, ...]]:
    """Notebooks with the outputs of a walk, and the walk's own copy of each, by its path; all of them or none."""
    notebooks = {}
    for path in (runs.root() / "notebooks" / f"{name}.ipynb" for name in names):
        try:
            executed = nbformat.read(runs.folder_of("runs") / profile / path.name, as_version=4)
            notebooks[path] = with_outputs(nbformat.read(path, as_version=4), executed, profile), executed
        except (ValueError, OSError) as error:
            sys.exit(f"{path.name}: {error}")
    return notebooks


def without_links(markdown: str) -> str:
    """Markdown without its links to other pages of the project, which whoever downloads a page does not have."""
    return re.sub(r"\[([^\]]+)\]\((?!https:)[^)]*\)", r"\1", markdown)


def store_pages(notebooks: dict[Path, tuple], target: Path) -> None:
    """A walk's copies of the notebooks, with its parameters, as pages for readers without a kernel."""
    from nbconvert import HTMLExporter  # here, because only this takes it

    target.mkdir(parents=True, exist_ok=True)
    for path, (_, executed) in notebooks.items():
        for cell in executed.cells:
            if cell.cell_type == "markdown":
                cell.source = without_links(OF_QUICK.sub("", cell.source))
        page, _ = HTMLExporter().from_notebook_node(executed, {"metadata": {"name": path.stem}})
        runs.write_text(target / f"{path.stem}.html", page)


def finished_stages(folder: Path) -> dict[str, str]:
    """The finished stages: stage -> key. ValueError if one was computed with several settings."""
    found: dict[str, str] = {}
    for name, key in sorted(path.parent.parts[-2:] for path in folder.glob("*/*/stage.json")):
        if found.setdefault(name, key) != key:
            raise ValueError(f"{folder / name} has several finished stages: remove those of other settings")
    return found


def store_stages(used: dict[str, str], stages: Path, target: Path) -> None:
    """The small files of the stages that a summary names (stage -> key), from a run or from what is committed already;
    others are removed."""
    for name, key in used.items():
        made, copy = stages / name / key, target / name / key
        if not copy.exists():
            if not (made / "stage.json").exists():
                raise ValueError(f"{made} is not there: run the walk again")
            large = [path.name for path in made.iterdir() if runs.is_large(path.name)]
            partial = target.with_name(f".{target.name}.part")  # a torn copy would be taken for the stage
            shutil.rmtree(partial, ignore_errors=True)
            shutil.copytree(made, partial, ignore=shutil.ignore_patterns(*large, ".*.part"))
            copy.parent.mkdir(parents=True, exist_ok=True)
            partial.rename(copy)
    for place in target.glob("*/*"):
        if used.get(place.parent.name) != place.name:
            shutil.rmtree(place)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("profile", nargs="?", default="quick", choices=parameters.profiles())
    how = result.add_mutually_exclusive_group()
    how.add_argument("--unfinished", action="store_true", help="store the stages that are done, nothing else")
    how.add_argument("--figures-only", action="store_true", help="store neither pages nor stages")
    return result


def main(arguments: list[str] | None = None) -> int:
    options, root = parser().parse_args(arguments), runs.root()
    profile, figures = options.profile, runs.folder_of("figures") / options.profile
    made, kept = runs.folder_of("runs") / profile / "stages", figures / "stages"
    if figures != root / "figures" / profile:
        sys.exit(f"store_outputs: the figures are in {figures}: unset PAPERLIB_FIGURES and run the walk again")
    try:
        if options.unfinished:
            settings = parameters.load_settings(profile)
            if settings.weights != "reference":
                raise ValueError(f"{profile} trains networks of its own, so its stages fit nobody else's")
            before, now = finished_stages(kept), finished_stages(made)
            now = {name: key for name, key in now.items() if "train-" not in name}
            if other := sorted(name for name in before.keys() & now if before[name] != now[name]):
                places = f"{kept / other[0]} or {made / other[0]}"
                raise ValueError(f"{other[0]} is stored with other settings: remove {places}")
            store_stages(before | now, made, kept)
            return 0
        summary = runs.read_json(figures / "summary.json")
        if profile == "quick":
            every = executed_notebooks(profile, (path.stem for path in notebook_files()))
            for path, (notebook, _) in every.items():
                runs.write_text(path, nbformat.writes(notebook) + "\n")
        elif summary["config"]["weights"] != "reference":
            raise ValueError("results of networks that are not committed cannot be regenerated: use weights=reference")
        elif options.figures_only:
            if summary["config"] != parameters.load_settings(profile).model_dump():
                raise ValueError("the walk had other settings than the profile: run it without --set")
        else:
            store_pages(executed_notebooks(profile, summary["results"]), figures / "pages")
            whole = summary["results"].keys() >= {path.stem for path in notebook_files()}
            others = {} if whole else finished_stages(kept)  # a walk of some notebooks does not know theirs
            store_stages(others | summary["stages"], made, kept)
        for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
            text = with_tables(page.read_text(encoding="utf-8"), summary)
            if page.name == "README.md":
                text = with_lines(text, REFERENCES, references.table())
            runs.write_text(page, text)
    except (ValueError, OSError) as error:
        sys.exit(f"store_outputs: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
