"""Measure the nodes of a profile's networks into its run folder: readouts at their optimum, native and rotated nodes.

Networks are measured one after the other and tap by tap; whatever stops it, the same command goes on from there. What
is there is not measured again. With --cnn, the profile's CNN instead of its transformer. A network of half an hour's
training takes about as long: --seed and --kind measure it in pieces.
"""

import argparse

from paperlib.cli import add_changes
from paperlib.experiment import measure, networks, readings, settings

KINDS = ("trained", "random", "shuffled", "pruned")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE")
    parser.add_argument("--cnn", action="store_true", help="the profile's CNN instead of its transformer")
    parser.add_argument("--seed", type=int, help="this seed only")
    parser.add_argument(
        "--kind", choices=KINDS, help="trained or random networks, shuffled labels, or pruned readouts only"
    )
    add_changes(parser)


def execute(options: argparse.Namespace) -> int:
    run = settings.open_run(options.profile, settings.changes_of(options.set))
    run = networks.cnn_half(run) if options.cnn else run
    if options.seed is not None and options.seed not in run.settings.seeds:
        raise ValueError(f"seed {options.seed} is not one of the profile's: {run.settings.seeds}")
    for seed in run.settings.seeds:
        for kind in KINDS:
            wanted = options.seed in (None, seed) and options.kind in (None, kind)
            if wanted and kind == "pruned":
                print(readings.readouts(run, seed).folder)
            elif wanted and (kind != "shuffled" or seed == run.settings.seeds[0]):
                print(measure.nodes(run, seed, kind).folder)
    return 0
