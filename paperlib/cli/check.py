"""Compare what is committed with what it says of itself; exit code 1 if anything differs.

networks [NAME ...]    score committed networks on the test images and compare with their cards
verdicts PROFILE       statistics of nodes and verdicts anew, from committed measurements alone: half a minute
measurement PROFILE    one network measured again from its weights and the images: the readouts of `attn` and `block` at
                       the first, middle and last encoder, compared within the spread of the committed seeds
"""

import argparse
import json
from collections.abc import Iterable

import numpy as np
import pandas as pd

from paperlib import claims, data, experiment, models, snp, taps, training, verdicts
from paperlib.experiment import networks, settings
from paperlib.experiment.store import Run
from paperlib.files import read_json
from paperlib.models import reference
from paperlib.paths import folder_of, root

KINDS = ("attn", "block")  # taps that `measurement` measures again


def add_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_subparsers(dest="what", required=True)
    part = what.add_parser("networks", help="compare accuracies with cards")
    part.add_argument("names", nargs="*", metavar="NAME", help="committed networks (default: all)")
    for name, text in (("verdicts", "compute verdicts anew"), ("measurement", "measure one network anew")):
        part = what.add_parser(name, help=text)
        part.add_argument("profile", metavar="PROFILE", choices=settings.profiles())
    part.add_argument("--seed", type=int, default=0, help="which network (default: 0)")


def execute(options: argparse.Namespace) -> int:
    if options.what == "networks":
        same = check_networks(options.names or models.references())
    elif options.what == "verdicts":
        same = check_verdicts(options.profile)
    else:
        same = check_measurement(options.profile, options.seed)
    return 0 if same else 1


def check_networks(names: list[str]) -> bool:
    same = True
    print("| network | test images | accuracy in the card | accuracy here |\n|---|---|---|---|")
    for name in names:
        card = reference.card(name)
        images = data.load(card["data"], folder_of("data"), card["image_size"])
        accuracy, here = None, f"not scored: this {card['data']} is not the data that it was trained on"
        if reference.is_trained_on(card, images):
            accuracy, _ = networks.scores(models.load_reference(name), networks.as_trained(card, images))
            here = f"{accuracy:.4%}"
        same = same and accuracy == card["test_accuracy"]
        print(f"| {name} | {card['n_test']} | {card['test_accuracy']:.4%} | {here} |", flush=True)
    return same


def check_verdicts(profile: str) -> bool:
    run = settings.open_committed(profile)
    summary = read_json(root() / "figures" / profile / "summary.json")
    rows, images = all_verdicts(run, summary["results"]), any(name.startswith("02") for name in summary["results"])
    different = differing_nodes(run) if images else 0
    print(claims.table(rows).to_string())
    same = json.loads(json.dumps(rows)) == summary["verdicts"]
    print(f"\n{'the same' if same else 'NOT the same'} as summary.json; {different} nodes differ from their matrices")
    return same and not different


def all_verdicts(run: Run, walked: Iterable[str]) -> list[dict]:
    """What the last cells of these notebooks (of 02 to 05, and 07) compute."""
    name, labels, rows = run.images.name, len(run.images.classes), []
    numbers = {notebook[:2] for notebook in walked}
    if "02" in numbers:
        _, nodes = experiment.nodes.snr(run)
        main, penalties = nodes[nodes.tap.isin(run.settings.taps)], experiment.nodes.penalties(run)
        rows += claims.clusters(main, name, labels)
        rows += claims.sharpening(main, experiment.nodes.correct_answers(run), name, labels, penalties)
        rows += claims.macroscopic(experiment.nodes.macroscopic_accuracies(run), name)
    if "03" in numbers:
        rows += claims.pruning(experiment.pruning.pruning(run), name)
    if "04" in numbers:
        rows += claims.modus_vivendi(experiment.heads.head_division(run)[2], name)
    if "05" in numbers:
        _, nodes, correct = experiment.nodes.both_halves(run)
        halves = {"cct": run, "cnn": networks.cnn_half(run)}
        penalties = {half: experiment.nodes.penalties(part) for half, part in halves.items()}
        rows += claims.unified(nodes, correct, name, labels, penalties)
    if "07" in numbers:
        parts = (experiment.division.tables(run), *(part.table(run) for part in (experiment.readings, experiment.late)))
        nodes = experiment.measure.at_threshold(experiment.measure.tables(run), run.settings.threshold)
        rows += verdicts.records(verdicts.of_transformer(nodes, *parts, experiment.sets.table(run)), name)
    return sorted(rows, key=lambda row: row["claim"])


def differing_nodes(run: Run) -> int:
    """How many nodes have other statistics in nodes.csv than their Boolean matrices give."""
    _, table = experiment.nodes.snr(run)
    columns, different = ["labels", "clusters", "internal", "external"], 0
    for seed in run.settings.seeds:
        for kind in networks.NETWORKS:
            for tap, booleans in experiment.nodes.matrices(run, seed, kind).arrays("matrices").items():
                encoder, name = tap.split(".")
                stored = table[(table.seed == seed) & (table.network == kind) & (table.tap == name)]
                stored = stored[stored.encoder == int(encoder)].sort_values("node")
                found = snp.node_statistics(booleans)
                again = pd.DataFrame({column: getattr(found, column).numpy() for column in columns})
                different += int((stored[columns].to_numpy() != again.to_numpy()).any(axis=1).sum())
    return different


def check_measurement(profile: str, seed: int) -> bool:
    committed = settings.open_committed(profile)
    table, _ = experiment.nodes.snr(committed)
    if seed not in committed.settings.seeds:
        raise ValueError(f"there are no committed results of seed {seed}: use {committed.settings.seeds}")
    run = settings.open_run(profile, committed.settings.model_dump())
    again, at = measured(run, seed), table[table.threshold == run.settings.threshold]
    comparison = compared(again, at, seed, len(run.images.y_test))
    print(comparison.round(4).to_string())
    agrees = bool(comparison.xs("agrees", axis=1, level=1).all(axis=None))
    n = at.seed.nunique()
    bounds = f"the spread of {n} seeds" if n > 1 else "two standard errors (accuracy) and 5 % (SNR)"
    print(f"\n{'every' if agrees else 'NOT every'} number agrees within {bounds}")
    return agrees


def measured(run: Run, seed: int) -> pd.DataFrame:
    """encoder, tap -> accuracy (0..1), snr."""
    network, _ = networks.load_network(run, seed, "trained")
    images, places = run.images.to(training.best_device()), taps.places_first_middle_last(network, KINDS)
    weights = experiment.nodes.trained_readouts(run, network, places, images, seed)
    found = experiment.nodes.accuracy_and_snr(run, network, places, weights, images)
    return found.set_index(["tap", "encoder"])[["accuracy", "snr"]].sort_index()


def compared(again: pd.DataFrame, table: pd.DataFrame, seed: int, images: int) -> pd.DataFrame:
    """What was measured, on so many test images, beside what is committed (first table of `experiment.nodes.snr`, one
    threshold): per statistic here, committed (the same seed), allowed and agrees.

    A difference is allowed up to the spread of the committed seeds (largest less smallest); of one seed alone, up to
    two standard errors of its accuracy over the test images, or 5 % of its SNR (choice).
    """
    table = table[(table.network == "trained") & ~table.centred].set_index(["tap", "encoder"])
    columns = {}
    for name in ("accuracy", "snr"):
        by_seed = table.pivot(columns="seed", values=name).reindex(again.index)
        both = pd.DataFrame({"here": again[name], "committed": by_seed[seed]})
        if by_seed.shape[1] > 1:
            both["allowed"] = by_seed.max(axis=1) - by_seed.min(axis=1)
        elif name == "snr":
            both["allowed"] = 0.05 * both.committed
        else:
            both["allowed"] = 2 * np.sqrt(both.committed * (1 - both.committed) / images)
        same = (both.here - both.committed).abs() <= both.allowed
        columns[name] = both.assign(agrees=same | (both.here.isna() & both.committed.isna()))
    return pd.concat(columns, axis=1)
