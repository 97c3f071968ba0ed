"""The verdicts anew, from committed results alone: no images, no training.

python notebooks/regenerate.py PROFILE [--stages FOLDER]

Statistics of the CCTs' nodes are computed again from their Boolean matrices, verdicts from the tables of the stages;
both are compared with what is committed. Exit code 1 if anything differs.
"""

import argparse
import json
import sys
from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import parameters
import stages
import verdicts

from paperlib import snp
from paperlib.runs import Run, read_json


def all_verdicts(run: Run, notebooks: Iterable[str]) -> list[dict]:
    """What the last cells of these notebooks (of 02 to 05) compute."""
    name, labels, rows = run.images.name, len(run.images.classes), []
    walked = {notebook[:2] for notebook in notebooks}
    if "02" in walked:
        _, nodes = stages.snr(run)
        main = nodes[nodes.tap.isin(run.settings.taps)]
        rows += verdicts.clusters(main, name, labels)
        rows += verdicts.sharpening(main, stages.correct_answers(run), name, labels, stages.penalties(run))
        rows += verdicts.macroscopic(stages.macroscopic_accuracies(run), name)
    if "03" in walked:
        rows += verdicts.pruning(stages.pruning(run), name)
    if "04" in walked:
        rows += verdicts.modus_vivendi(stages.head_division(run)[2], name)
    if "05" in walked:
        _, nodes, correct = stages.both_halves(run)
        penalties = {"cct": stages.penalties(run), "cnn": stages.penalties(stages.cnn_half(run))}
        rows += verdicts.unified(nodes, correct, name, labels, penalties)
    return sorted(rows, key=lambda row: row["claim"])


def differing_nodes(run: Run) -> int:
    """How many nodes have other statistics in nodes.csv than their Boolean matrices give."""
    _, table = stages.snr(run)
    columns, different = ["labels", "clusters", "internal", "external"], 0
    for seed in run.settings.seeds:
        for kind in stages.NETWORKS:
            for tap, booleans in stages.matrices(run, seed, kind).arrays("matrices").items():
                encoder, name = tap.split(".")
                part = table[(table.seed == seed) & (table.network == kind) & (table.tap == name)]
                part = part[part.encoder == int(encoder)].sort_values("node")
                found = snp.node_statistics(booleans)
                again = pd.DataFrame({column: getattr(found, column).numpy() for column in columns})
                different += int((part[columns].to_numpy() != again.to_numpy()).any(axis=1).sum())
    return different


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("profile", choices=parameters.profiles())
    result.add_argument("--stages", type=Path, help="finished stages (default: the committed ones)")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        run = parameters.open_committed(options.profile, options.stages)
        committed = read_json(run.figures / "summary.json")
        rows, different = all_verdicts(run, committed["results"]), differing_nodes(run)
    except (OSError, ValueError) as error:
        print(f"regenerate: {error}", file=sys.stderr)
        return 2
    print(verdicts.table(rows).to_string())
    same = json.loads(json.dumps(rows)) == committed["verdicts"]
    print(f"\n{'the same' if same else 'NOT the same'} as summary.json; {different} nodes differ from their matrices")
    return 0 if same and not different else 1


if __name__ == "__main__":
    sys.exit(main())
