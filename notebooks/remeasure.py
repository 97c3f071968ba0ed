"""One network measured again, from its committed weights and the images: does it agree with the committed results?

python notebooks/remeasure.py PROFILE [--seed N] [--stages FOLDER]

Trains the readouts of `attn` and `block` at the first, middle and last encoder anew, prints their accuracies and SNRs
beside the committed ones, and ends with exit code 1 if one differs by more than the committed seeds differ among
themselves (largest less smallest); of one seed alone, by more than two standard errors of its accuracy over the test
images, or 5 % of its SNR (choice).
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import parameters
import stages

from paperlib import training
from paperlib.runs import Run

KINDS = ("attn", "block")


def measured(run: Run, seed: int) -> pd.DataFrame:
    """encoder, tap -> accuracy (0..1), snr."""
    network, _ = stages.load_network(run, seed, "trained")
    images, places = run.images.to(training.best_device()), stages.places_first_middle_last(network, KINDS)
    weights = stages.trained_readouts(run, network, places, images, seed)
    found = stages.accuracy_and_snr(run, network, places, weights, images)
    return found.set_index(["tap", "encoder"])[["accuracy", "snr"]].sort_index()


def compared(again: pd.DataFrame, table: pd.DataFrame, seed: int, images: int) -> pd.DataFrame:
    """What was measured, on so many test images, beside what is committed (first table of `stages.snr`, one threshold):
    per statistic here, committed (the same seed), allowed (a difference, as above) and agrees."""
    table = table[(table.network == "trained") & ~table.centred].set_index(["tap", "encoder"])
    parts = {}
    for name in ("accuracy", "snr"):
        by_seed = table.pivot(columns="seed", values=name).reindex(again.index)
        part = pd.DataFrame({"here": again[name], "committed": by_seed[seed]})
        if by_seed.shape[1] > 1:
            part["allowed"] = by_seed.max(axis=1) - by_seed.min(axis=1)
        elif name == "snr":
            part["allowed"] = 0.05 * part.committed
        else:
            part["allowed"] = 2 * np.sqrt(part.committed * (1 - part.committed) / images)
        same = (part.here - part.committed).abs() <= part.allowed
        parts[name] = part.assign(agrees=same | (part.here.isna() & part.committed.isna()))
    return pd.concat(parts, axis=1)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("profile", choices=parameters.profiles())
    result.add_argument("--seed", type=int, default=0, help="which network (default: 0)")
    result.add_argument("--stages", type=Path, help="finished stages (default: the committed ones)")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        committed = parameters.open_committed(options.profile, options.stages)
        taps_table, _ = stages.snr(committed)
        if options.seed not in committed.settings.seeds:
            raise ValueError(f"there are no committed results of seed {options.seed}: use {committed.settings.seeds}")
        run = parameters.open_run(options.profile, committed.settings.model_dump())
        if options.stages:
            run = replace(run, folder=options.stages.resolve().parent)
        trained = (run.folder / "stages" / f"train-seed{options.seed}").glob("*/stage.json")
        if run.settings.weights != "reference" and not any(trained):
            raise ValueError(f"the network of seed {options.seed} is not in {run.folder}, and training one takes long")
        again = measured(run, options.seed)
    except (OSError, ValueError) as error:
        print(f"remeasure: {error}", file=sys.stderr)
        return 2
    at = taps_table[taps_table.threshold == run.settings.threshold]
    table = compared(again, at, options.seed, len(run.images.y_test))
    print(table.round(4).to_string())
    agrees = bool(table.xs("agrees", axis=1, level=1).all(axis=None))
    n = at.seed.nunique()
    bounds = f"the spread of {n} seeds" if n > 1 else "two standard errors (accuracy) and 5 % (SNR)"
    print(f"\n{'every' if agrees else 'NOT every'} number agrees within {bounds}")
    return 0 if agrees else 1


if __name__ == "__main__":
    sys.exit(main())
