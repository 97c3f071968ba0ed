"""Single nodes of a walk: how labels, clusters and noise are spread over them, and what typical and extreme ones
recognise (claim C2). Nodes are measured by `measure`; their matrices are too large to keep, but for a few."""

import itertools
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure

from paperlib import figures, snp, taps, training
from paperlib.data.superclasses import superclasses
from paperlib.experiment import measure
from paperlib.experiment.networks import NETWORKS, load_network
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table
from paperlib.statistics import interval

COUNTS = ("labels", "clusters", "internal", "external")


def spread(run: Run, tap: str) -> pd.DataFrame:
    """Every node of one kind of tap at the main threshold, raw, of trained and random networks: seed, network, encoder,
    tap, node, and `COUNTS` as in `snp.NodeStatistics`."""
    parts = []
    for seed, kind in itertools.product(run.settings.seeds, NETWORKS):
        for key, columns in measure.nodes(run, seed, kind).arrays("nodes").items():
            (encoder, name), (centred, threshold) = key.split("/")[0].split("."), key.split("/")[1:]
            if name == tap and centred == "raw" and float(threshold) == run.settings.threshold:
                row = {"seed": seed, "network": kind, "encoder": int(encoder), "tap": tap, "node": range(len(columns))}
                counts = {column: columns[:, measure.NODE_COLUMNS.index(column)].int().numpy() for column in COUNTS}
                parts.append(pd.DataFrame(row | counts))
    return pd.concat(parts, ignore_index=True)


def examples(run: Run, seed: int) -> Stage:
    """Stage: typical and extreme FF nodes, or a CNN's filters, of the first, middle and last encoder, trained network.

    examples.csv: encoder, tap, which (`snp.chosen_nodes`), node, `snp.NodeStatistics`. matrices: encoder/which -> field
    matrix (L, L) of test images in half precision, and Boolean matrix, encoder/which/boolean.
    """
    source, read = measure.nodes(run, seed, "trained"), measure.readouts(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        weights, means, kept, rows = read.tensors("weights"), source.tensors("means"), {}, []
        for place in taps.places_first_middle_last(network, ["ff1"]):
            fields = snp.field_matrices(weights[f"{place.name}/best"], means[place.name])
            booleans = snp.boolean_matrices(fields, run.settings.threshold)
            every = snp.node_statistics(booleans)
            for which, node in snp.chosen_nodes(every).items():
                name, row = f"{place.encoder}/{which}", {"encoder": place.encoder, "tap": place.kind, "which": which}
                kept |= {name: fields[node].half(), f"{name}/boolean": booleans[node]}
                counts = {column: int(values[node]) for column, values in asdict(every).items()}
                rows.append(row | {"node": node} | counts)
        save_arrays(folder / "matrices.npz", kept)
        save_table(folder / "examples.csv", rows)

    config = run.config("threshold") | {"seed": seed}
    inputs |= {"nodes": source.sha256, "readouts": read.sha256}
    return run.stage(f"example-nodes-seed{seed}", config, inputs, make)


def pairs(run: Run, seed: int, kind: str) -> Stage:
    """Stage: which labels share clusters of FF nodes, or a CNN's filters, of the last encoder. pairs: nodes -> (L, L)
    int64, how many nodes hold both labels in one cluster."""
    source, read = measure.nodes(run, seed, kind), measure.readouts(run, seed, kind)
    network, inputs = load_network(run, seed, kind)

    def make(folder: Path) -> None:
        place = taps.places(network, ["ff1"])[-1]
        fields = snp.field_matrices(read.tensors("weights")[f"{place.name}/best"], source.tensors("means")[place.name])
        booleans = snp.boolean_matrices(fields, run.settings.threshold)
        save_arrays(folder / "pairs.npz", {"nodes": snp.clustered_pairs(booleans)})

    config = run.config("threshold") | {"seed": seed, "kind": kind}
    inputs |= {"nodes": source.sha256, "readouts": read.sha256}
    return run.stage(f"cluster-pairs-{kind}-seed{seed}", config, inputs, make)


def closest(run: Run) -> pd.DataFrame:
    """The ten pairs of labels that share most clusters in the last encoder, first seed: label, other, nodes, and where
    labels have groups (superclasses, or domains) same_group."""
    classes, groups = run.images.classes, superclasses(run.images.classes)
    found = pairs(run, run.settings.seeds[0], "trained").arrays("pairs")["nodes"].triu()
    most, place = found.flatten().sort(descending=True, stable=True)
    rows = []
    for nodes, (one, other) in zip(
        most[:10].tolist(), (divmod(at, len(classes)) for at in place.tolist()), strict=False
    ):
        same = {} if groups is None else {"same_group": bool(groups[one] == groups[other])}
        rows += [{"label": classes[one], "other": classes[other], "nodes": nodes} | same] if nodes else []
    return pd.DataFrame(rows)


def of_one_group(run: Run) -> pd.DataFrame:
    """Do the labels of one cluster belong together? For each seed, trained and random network, the share of clustered
    pairs in the last encoder whose labels are of one group (superclass, or domain), 0..1, and its mean and 97.5 %
    quantile over permuted names; no row where labels have no groups."""
    groups, rows = superclasses(run.images.classes), []
    for kind, seed in itertools.product(NETWORKS, run.settings.seeds) if groups is not None else ():
        found = pairs(run, seed, kind).arrays("pairs")["nodes"]
        generator = training.generator(seed, "permuted names", kind)
        orders = (torch.randperm(len(groups), generator=generator) for _ in range(run.settings.permutations))
        permuted = [snp.share_within(found, groups[order]) for order in orders]
        row = {"seed": seed, "network": kind, "share": snp.share_within(found, groups)}
        rows.append(row | {"permuted": sum(permuted) / len(permuted), "permuted_high": interval(permuted)[1]})
    return pd.DataFrame(rows)


def gallery(run: Run) -> tuple[Figure, pd.DataFrame]:
    """A figure of the nodes of `examples`, first seed, and which they are."""
    seed = run.settings.seeds[0]
    found = examples(run, seed)
    table, matrices, panels = found.table("examples"), found.arrays("matrices"), {}
    for row in table.itertuples():
        name = f"{row.encoder}/{row.which}"
        clusters = snp.label_clusters(matrices[f"{name}/boolean"])
        panels[f"encoder {row.encoder}", row.which] = matrices[name].float(), clusters
    place = f"nodes of {table.tap.iloc[0]}, seed {seed}"
    return figures.node_gallery(panels, run.images.classes, run.images.name, place), table


def connections(run: Run) -> tuple[Figure, pd.DataFrame]:
    """A figure of what ANDC would keep of the last encoder's nodes in `examples`, first seed, and the labels that each
    recognises: node, label."""
    found, classes = examples(run, run.settings.seeds[0]), run.images.classes
    table, matrices = found.table("examples"), found.arrays("matrices")
    last = table[table.encoder == table.encoder.max()]
    sets = {f"node {row.node}": matrices[f"{row.encoder}/{row.which}/boolean"].diagonal() for row in last.itertuples()}
    kept = [{"node": name, "label": classes[at]} for name, own in sets.items() for at in own.nonzero().flatten()]
    return figures.kept_connections(sets, classes, run.images.name), pd.DataFrame(kept)
