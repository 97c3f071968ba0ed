"""Put the results of a finished `./run_all.sh [PROFILE]` where readers find them.

python notebooks/store_outputs.py [PROFILE] [--unfinished]

quick (the default): notebooks keep their cells and take the outputs of the executed copies in the run folder; copies
with other cells or parameters are refused. Other profiles: the executed notebooks become pages for readers without a
kernel, figures/<profile>/pages/*.html, and the small files of the stages that summary.json names are copied to
figures/<profile>/stages, which later walks and notebooks/regenerate.py take them from. The README's tables of verdicts
are made anew from the profiles' summary.json.

A walk of hours can be computed in several sittings: with --unfinished, the stages that are done are stored, no more.
"""

import argparse
import shutil
import sys
from pathlib import Path

import nbformat
import parameters

from paperlib import runs

CLAIMS = {
    "C1": "[CNNs and transformers share the mechanism](notebooks/05_cnn_counterpart.ipynb)",
    "C2": "[each node identifies small clusters of labels](notebooks/02_snr_per_encoder.ipynb)",
    "C3": "[features sharpen along the encoders](notebooks/02_snr_per_encoder.ipynb)",
    "C4": "[ANDC pruning does not affect the accuracy](notebooks/03_andc_pruning.ipynb)",
    "C5": "[each head becomes expert in its own labels](notebooks/04_head_modus_vivendi.ipynb)",
    "C6": "[accuracy follows from single nodes](notebooks/02_snr_per_encoder.ipynb)",
}
MARKS = ("<!-- verdicts of {}: made by notebooks/store_outputs.py -->", "<!-- end of verdicts -->")


def verdict_table(summary: dict) -> str:
    """The verdicts of a summary.json as a Markdown table; a claim is named in its first row."""
    lines = ["| claim (abstract) | measured | effect ± uncertainty | null | verdict |", "|---|---|---|---|---|"]
    named = set()
    for row in summary["verdicts"]:
        claim = f"{row['claim']}: {CLAIMS[row['claim']]}" if row["claim"] not in named else ""
        named.add(row["claim"])
        effect = "" if row["effect"] is None else f"{row['effect']:.3f} ± {row['uncertainty']:.3f}"
        lines.append(f"| {claim} | {row['statistic']} | {effect} | {row['null']} | {row['verdict']} |")
    return "\n".join(lines)


def with_table(page: str, profile: str, table: str) -> str:
    """The page with the lines between the profile's two marks replaced."""
    return with_lines(page, (MARKS[0].format(profile), MARKS[1]), table)


def with_lines(page: str, marks: tuple[str, str], lines: str) -> str:
    """The page with what stands between two marks replaced."""
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
    pairs = [pair for pair in zip(source.cells, cells, strict=True) if pair[0].cell_type == "code"]
    for count, (cell, run) in enumerate(pairs, start=1):
        cell.execution_count, cell.outputs = count, run.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    return source


def executed_notebooks(root: Path, profile: str) -> dict[Path, nbformat.NotebookNode]:
    """The notebooks with the outputs of a walk, by their path; all of them or none."""
    notebooks = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        executed = runs.folder_of("runs") / profile / path.name
        try:
            notebooks[path] = with_outputs(*(nbformat.read(file, as_version=4) for file in (path, executed)), profile)
        except (ValueError, OSError) as error:
            sys.exit(f"{path.name}: {error}")
    return notebooks


def store_pages(notebooks: dict[Path, nbformat.NotebookNode], target: Path) -> None:
    """The executed notebooks as pages for readers without a kernel."""
    from nbconvert import HTMLExporter  # here, because only this takes it

    target.mkdir(parents=True, exist_ok=True)
    for path, notebook in notebooks.items():
        page, _ = HTMLExporter().from_notebook_node(notebook, {"metadata": {"name": path.stem}})
        runs.write_text(target / f"{path.stem}.html", page)


def finished_stages(folder: Path) -> dict[str, str]:
    """The latest finished stage of each name: stage -> key."""
    done = sorted(folder.glob("*/*/stage.json"), key=lambda path: path.stat().st_mtime)
    return {path.parent.parent.name: path.parent.name for path in done}


def store_stages(used: dict[str, str], stages: Path, target: Path) -> None:
    """The small files of the stages that a summary names (stage -> key), from a run or from what is committed already;
    others are removed."""
    for place in target.glob("*/*"):
        if used.get(place.parent.name) != place.name:
            shutil.rmtree(place)
    for name, key in used.items():
        made, copy = stages / name / key, target / name / key
        if not copy.exists():
            if not (made / "stage.json").exists():
                raise ValueError(f"{made} is not there: run the walk again")
            large = [path.name for path in made.iterdir() if runs.is_large(path.name)]
            shutil.copytree(made, copy, ignore=shutil.ignore_patterns(*large))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default="quick", choices=parameters.profiles())
    parser.add_argument("--unfinished", action="store_true", help="store the stages that are done, nothing else")
    options, root = parser.parse_args(arguments), runs.root()
    profile, figures = options.profile, runs.folder_of("figures") / options.profile
    made, kept = runs.folder_of("runs") / profile / "stages", figures / "stages"
    if figures != root / "figures" / profile:
        sys.exit(f"store_outputs: the figures are in {figures}: unset PAPERLIB_FIGURES and run the walk again")
    try:
        if options.unfinished:
            settings = parameters.load_settings(profile)
            if settings.weights != "reference":
                raise ValueError(f"{profile} trains networks of its own, so its stages fit nobody else's")
            store_stages(finished_stages(kept) | finished_stages(made), made, kept)
            return 0
        summary = runs.read_json(figures / "summary.json")
        if profile == "quick":
            for path, notebook in executed_notebooks(root, profile).items():
                nbformat.write(notebook, path)
        elif summary["config"]["weights"] != "reference":
            raise ValueError("results of networks that are not committed cannot be regenerated: use weights=reference")
        else:
            store_pages(executed_notebooks(root, profile), figures / "pages")
            store_stages(summary["stages"], made, kept)
    except ValueError as error:
        sys.exit(f"store_outputs: {error}")
    page = root / "README.md"
    text = page.read_text(encoding="utf-8")
    if MARKS[0].format(profile) in text:
        runs.write_text(page, with_table(text, profile, verdict_table(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
