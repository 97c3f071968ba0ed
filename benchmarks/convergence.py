"""How far readouts still move when they train twice as long: `block` of the first, middle and last encoder.

PAPERLIB_DATA=... python benchmarks/convergence.py [--profile cifar100-cpu] [--epochs 4 8 16 32] [--l2 X] [--limit N]

The readouts of every length, each with its own decay of the learning rate, train in the same passes over the frozen
network of the first seed, trained and with random weights. Accuracy and SNR are those of the test images; no setting
is chosen by them. Beside them: what they moved by since the length before, and `spread`, the largest less the smallest
of the committed seeds. Stopped and started again, it goes on. The table goes to
figures/<profile>/benchmarks/convergence-<l2>.csv.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import pandas as pd

from paperlib import experiment, taps, training
from paperlib.experiment import settings
from paperlib.experiment.networks import ARCHITECTURE
from paperlib.experiment.nodes import READOUT
from paperlib.experiment.store import Run
from paperlib.files import save_table


def convergence(run: Run, kind: str, lengths: list[int]) -> pd.DataFrame:
    """Stage for the first seed: encoder, epochs -> accuracy (0..1), snr."""
    seed = run.settings.seeds[0]
    network, inputs = experiment.networks.load_network(run, seed, kind)

    def make(folder: Path) -> None:
        images, places = run.images.to(training.best_device()), taps.places_first_middle_last(network, ["block"])
        weights = experiment.nodes.trained_readouts(run, network, places, images, seed, folder, lengths=lengths)
        twins = [replace(tap, kind=f"{tap.kind}@{length}") for tap in places for length in lengths]
        found = experiment.nodes.accuracy_and_snr(run, network, twins, weights, images)
        found["epochs"] = found.tap.str.partition("@")[2].astype(int)
        save_table(folder / "convergence.csv", found[["encoder", "epochs", "accuracy", "snr"]])

    config = run.config(*ARCHITECTURE, *READOUT, "threshold") | {"seed": seed, "kind": kind, "lengths": lengths}
    table = run.stage(f"convergence-{kind}-seed{seed}", 1, config, inputs, make).table("convergence")
    return table.set_index(["encoder", "epochs"]).sort_index()


def spread_of_seeds(profile: str) -> pd.DataFrame:
    """(network, encoder) -> accuracy, snr: largest less smallest of the committed seeds."""
    run = settings.open_committed(profile)
    table, _ = experiment.nodes.snr(run)
    table = table[(table.threshold == run.settings.threshold) & ~table.centred & (table.tap == "block")]
    by_place = table.groupby(["network", "encoder"])[["accuracy", "snr"]]
    return by_place.max() - by_place.min()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar100-cpu", choices=settings.profiles())
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--l2", type=float, help="penalty of the readouts (default: the profile's)")
    parser.add_argument("--limit", type=int, help="images, for a trial that is printed only (default: all)")
    options = parser.parse_args()
    changes = {"limit": options.limit, "readout_l2": options.l2}
    run = settings.open_run(options.profile, {name: value for name, value in changes.items() if value is not None})
    spread = spread_of_seeds(options.profile).add_prefix("spread of ")
    found = {kind: convergence(run, kind, sorted(set(options.epochs))) for kind in experiment.networks.NETWORKS}
    if not options.limit:
        path = run.output / "benchmarks" / f"convergence-{run.settings.readout_l2:g}.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        save_table(path, pd.concat(found, names=["network"]).reset_index())
    for kind, table in found.items():
        table = table.join(table.groupby("encoder").diff().add_suffix(" moved")).join(spread.loc[kind])
        print(f"\n{kind} network\n{table.round(4).to_string()}\n", flush=True)


if __name__ == "__main__":
    main()
