"""Put the results of a finished `./run_all.sh` (profile quick) where readers find them: into notebooks and README.

python notebooks/store_outputs.py

Notebooks keep their cells and take the outputs of the executed copies in the run folder; copies with other cells or
parameters are refused. The README's table of verdicts is made anew from figures/quick/summary.json.
"""

import json
import sys

import nbformat

from paperlib import runs

CLAIMS = {
    "C1": "[CNNs and transformers share the mechanism](notebooks/05_cnn_counterpart.ipynb)",
    "C2": "[each node identifies small clusters of labels](notebooks/02_snr_per_encoder.ipynb)",
    "C3": "[features sharpen along the encoders](notebooks/02_snr_per_encoder.ipynb)",
    "C4": "[ANDC pruning does not affect the accuracy](notebooks/03_andc_pruning.ipynb)",
    "C5": "[each head becomes expert in its own labels](notebooks/04_head_modus_vivendi.ipynb)",
    "C6": "[accuracy follows from single nodes](notebooks/02_snr_per_encoder.ipynb)",
}
MARKS = ("<!-- verdicts: made by notebooks/store_outputs.py -->", "<!-- end of verdicts -->")


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


def with_table(page: str, table: str) -> str:
    """The page with the lines between the two marks replaced."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def with_outputs(source: nbformat.NotebookNode, executed: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook with the outputs of an executed copy; ValueError if the copy is of something else."""
    injected = [cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    cells = [cell for cell in executed.cells if cell not in injected]
    if [cell.source for cell in cells] != [cell.source for cell in source.cells]:
        raise ValueError("the executed copy has other cells: run ./run_all.sh again")
    if not all('profile = "quick"' in cell.source and "settings = {}" in cell.source for cell in injected):
        raise ValueError("the executed copy had other parameters: run ./run_all.sh without --set")
    pairs = [pair for pair in zip(source.cells, cells, strict=True) if pair[0].cell_type == "code"]
    for count, (cell, run) in enumerate(pairs, start=1):
        cell.execution_count, cell.outputs = count, run.outputs
        for output in cell.outputs:
            if "execution_count" in output:
                output["execution_count"] = count
    return source


def main() -> int:
    root = runs.root()
    notebooks = {}
    for path in sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        executed = runs.folder_of("runs") / "quick" / path.name
        try:
            notebooks[path] = with_outputs(*(nbformat.read(file, as_version=4) for file in (path, executed)))
        except (ValueError, OSError) as error:
            sys.exit(f"{path.name}: {error}")
    for path, notebook in notebooks.items():
        nbformat.write(notebook, path)
    summary = json.loads((root / "figures" / "quick" / "summary.json").read_text(encoding="utf-8"))
    page = root / "README.md"
    runs.write_text(page, with_table(page.read_text(encoding="utf-8"), verdict_table(summary)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
