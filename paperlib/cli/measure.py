"""Measure the nodes of a profile's networks into its run folder: readouts at their optimum, native and rotated nodes.

Networks are measured one after the other and tap by tap; whatever stops it, the same command goes on from there. What
is there is not measured again. With --cnn, the profile's CNN instead of its transformer. A network of half an hour's
training takes about as long: --seed and --kind measure it in pieces.
"""

import argparse
from collections.abc import Iterator

from paperlib import limit
from paperlib.cli import add_changes, add_limit
from paperlib.experiment import division, late, measure, networks, readings, sets, settings, single
from paperlib.experiment.store import Run, Stage

KINDS = ("trained", "random", "shuffled", "pruned", "sets", "late")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", metavar="PROFILE")
    parser.add_argument("--cnn", action="store_true", help="the profile's CNN instead of its transformer")
    parser.add_argument("--seed", type=int, help="this seed only")
    text = "one part only: of trained or random networks, shuffled labels, pruned readouts, sets of nodes, late layers"
    parser.add_argument("--kind", choices=KINDS, help=text)
    add_limit(parser)
    add_changes(parser)


def execute(options: argparse.Namespace) -> int:
    run = settings.open_run(options.profile, settings.changes_of(options.set))
    run = networks.cnn_half(run) if options.cnn else run
    if options.seed is not None and options.seed not in run.settings.seeds:
        raise ValueError(f"seed {options.seed} is not one of the profile's: {run.settings.seeds}")
    parts = [
        (seed, kind)
        for seed in run.settings.seeds
        for kind in KINDS
        if options.seed in (None, seed)
        and options.kind in (None, kind)
        and (kind != "shuffled" or seed == run.settings.seeds[0])
    ]
    for number, (seed, kind) in enumerate(parts, start=1):
        try:
            for stage in _stages(run, seed, kind, heads=not options.cnn):
                print(stage.folder)
        except limit.TimeIsUp as stop:
            raise limit.TimeIsUp(f"{stop}, in part {number} of {len(parts)} ({kind}, seed {seed})") from None
    return 0


def _stages(run: Run, seed: int, kind: str, heads: bool) -> Iterator[Stage]:
    if kind == "pruned":
        yield readings.readouts(run, seed)
    elif kind == "late":
        for part in late.parts(run):
            yield late.pruned(run, seed, *part)
    elif kind == "sets":
        for which in ("trained", "random"):
            yield sets.sets_of_nodes(run, seed, which)
    else:
        yield measure.nodes(run, seed, kind)
        if heads:
            yield division.specialisation(run, seed, kind)
        if kind in networks.NETWORKS:
            yield single.pairs(run, seed, kind)
        first = seed == run.settings.seeds[0]
        if first and kind == "trained":
            yield single.examples(run, seed)
        if first and heads and kind in networks.NETWORKS:
            yield division.answered(run, seed, kind)
        if heads and kind == "trained":
            yield division.cooperation(run, seed)
            yield division.ablation(run, seed)
