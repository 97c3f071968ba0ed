"""One tap of a run's networks, read from so few images that it takes seconds: what notebook 09 takes apart by hand.

Nothing is stored. Of few images readouts are worse, and class means noisier, than what `experiment.measure` finds.

Shapes: L labels, T positions, D nodes, n test images.
"""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from torch import Tensor

from paperlib import optimum, snp, taps
from paperlib.data import balanced
from paperlib.experiment import measure
from paperlib.experiment.networks import load_network
from paperlib.experiment.store import Run

LEARNT, CHOOSING, ASKED = 15, 5, 15  # images of each label: to solve a readout, to choose its penalty, to ask it


def read(run: Run, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """The readout of a network's last `ff1` (of a CNN, its last layer), first seed, and what it is asked.

    kind: trained or random. Returns, on the CPU, its weight (L, T, D), test images' activations (n, T, D) and labels
    (n,), balanced over labels."""
    network, _ = load_network(run, run.settings.seeds[0], kind)
    images, labels = measure.prepared(run, run.settings.seeds[0], kind, network), len(run.images.classes)
    kept, held = measure.readout_images(run)
    learnt = kept[: LEARNT * labels]
    choosing = held[balanced(run.images.y_train[held])][: CHOOSING * labels]
    asked = balanced(run.images.y_test)[: ASKED * labels]
    y, y_choosing = images.y_train[learnt], images.y_train[choosing]
    pictures = torch.cat([images.x_train[learnt], images.x_train[choosing], images.x_test[asked]])
    place = taps.places(network, ["ff1"])[-1]
    nodes = taps.features(network, [place], pictures, *images.statistics)[place.name]
    for_learning, for_choosing, tested = nodes.split([len(learnt), len(choosing), len(asked)])
    data = optimum.problem(for_learning, y, labels)
    best = optimum.choose(data, for_choosing, y_choosing, log=lambda said: None).best
    return best.weight.unflatten(1, nodes.shape[1:]).cpu(), tested.clone().cpu(), run.images.y_test[asked]


def clear(booleans: Tensor) -> int:
    """A node that is easy to look at: of those with at least four labels in several clusters the one with the least
    noise outside of them; where there is none, a typical one. (D, L, L) bool -> its number."""
    found = snp.node_statistics(booleans)
    easy = (found.labels >= 4) & (found.clusters > 1) & (found.internal > 0)
    if not easy.any():
        return snp.chosen_nodes(found)["typical"]
    return int(found.external.where(easy, found.external.max() + 1).argmin())


def answers(weight: Tensor, nodes: Tensor) -> Tensor:
    """What a readout (L, T, D) answers to activations (n, T, D): labels (n,)."""
    return (nodes.flatten(1) @ weight.flatten(1).T).argmax(dim=1)


def compare(
    versions: Mapping[str, tuple[Tensor, Tensor]], labels: Tensor, threshold: float
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Versions of a tap, each a readout (L, T, D) with activations (n, T, D), and the `clear` node of each.

    Returns a table and the nodes' field matrices, version -> (L, L). Columns: version, accuracy (0..1), alike (share of
    images answered as the first version answers them), snr (of the tap), node, and its labels, clusters, noise."""
    first, rows, fields = answers(*next(iter(versions.values()))), [], {}
    for name, (weight, nodes) in versions.items():
        given, every = answers(weight, nodes), snp.field_matrices(weight, snp.class_means(nodes, labels, len(weight)))
        booleans = snp.boolean_matrices(every, threshold)
        node = clear(booleans)
        fields[name] = every[node]
        own = snp.node_statistics(booleans[node : node + 1])
        row = {"version": name, "accuracy": (given == labels).float().mean().item()}
        row |= {"alike": (given == first).float().mean().item(), "snr": snp.snr(booleans)}
        row |= {
            "node": node,
            "labels": int(own.labels),
            "clusters": int(own.clusters),
            "noise": int(own.internal + own.external),
        }
        rows.append(row)
    return pd.DataFrame(rows), fields


def along(
    versions: Mapping[str, tuple[Tensor, Tensor]], labels: Tensor, way: Tensor, thresholds: Iterable[float]
) -> pd.DataFrame:
    """What becomes of taps whose nodes turn along a way (steps, D, D). Columns: version, step, angle (between a node
    and its native direction, mean over nodes, degrees), threshold, snr, labels (that a node recognises, mean)."""
    rows, thresholds = [], sorted(set(thresholds))
    angles = way.diagonal(dim1=1, dim2=2).clamp(-1, 1).acos().rad2deg().mean(dim=1).tolist()
    for name, (weight, nodes) in versions.items():
        means = snp.class_means(nodes, labels, len(weight))
        for step, (turn, angle) in enumerate(zip(way, angles, strict=True)):
            fields = snp.field_matrices(snp.rotated(weight, turn), snp.rotated(means, turn))
            for threshold in thresholds:
                booleans = snp.boolean_matrices(fields, threshold)
                row = {"version": name, "step": step, "angle": angle, "threshold": threshold, "snr": snp.snr(booleans)}
                rows.append(row | {"labels": snp.diagonal_labels(booleans).sum(dim=1).float().mean().item()})
    return pd.DataFrame(rows)
