"""Stage of a walk that predicts how well many nodes recognise labels together from what each says alone (claim C6).

Means and variances of single nodes' fields come from held-out images, and so does the correlation between nodes, one
number an encoder; what is predicted are answers to the test images.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from paperlib import macroscopic, snp, taps, training
from paperlib.data import BATCH, held_out
from paperlib.experiment import measure
from paperlib.experiment.networks import load_network
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_table

DRAWS = 20  # sets of each size
TAPS = ("ff1", "attn", "block")  # a CNN's are `conv`


def table(run: Run) -> pd.DataFrame:
    """The table of `sets_of_nodes` of trained and random networks, all seeds."""
    parts = [(seed, kind) for kind in ("trained", "random") for seed in run.settings.seeds]
    return pd.concat([sets_of_nodes(run, *part).table("sets") for part in parts], ignore_index=True)


def sets_of_nodes(run: Run, seed: int, kind: str = "trained") -> Stage:
    """Stage: accuracy of random sets of a tap's nodes, predicted and measured, in every encoder.

    sets.csv: seed, network, encoder, tap, basis (native, and one rotation: rotated), size (nodes; the last one: all),
    draw, measured (on the test images), predicted (with the correlation between nodes of this encoder), uncorrelated
    (without), and size_only: what a curve of accuracy against size in the same encoder says, the mean of its other sets
    of that size, and for all nodes the straight line in log(size) through the two largest sizes before; all in 0..1.
    variance_ratio: of all nodes' summed field on held-out images, its variance over the sum of theirs.
    """
    read = measure.readouts(run, seed, kind)
    network, inputs = load_network(run, seed, kind)

    def make(folder: Path) -> None:
        images = measure.prepared(run, seed, kind, network)
        _, held = held_out(run.images.y_train, run.settings.held_out)
        if images.y_train[held].bincount(minlength=len(images.classes)).min() < 2:
            raise ValueError("a variance needs two held-out images of each label: raise held_out")
        weights, tables = read.tensors("weights"), []
        for place in taps.places(network, list(TAPS)):
            weight = weights[f"{place.name}/best"].to(images.x_test.device)
            pictures = torch.cat([images.x_train[held], images.x_test])
            activations = taps.features(network, [place], pictures, *images.statistics)[place.name]
            nodes = activations[: len(held)], activations[len(held) :]
            turn = measure.rotations(seed, place, weight.shape[2])[0]
            labels = images.y_train[held], images.y_test
            turned = [snp.rotated(part, turn) for part in nodes], snp.rotated(weight, turn)
            for basis, (own, readout) in (("native", (nodes, weight)), ("rotated", turned)):
                found = _predicted(place.name, own, readout, labels, training.generator(seed, "subsets", place.name))
                row = {"seed": seed, "network": kind, "encoder": place.encoder, "tap": place.kind, "basis": basis}
                tables.append(found.assign(**row))
        save_table(folder / "sets.csv", pd.concat(tables))

    config = run.config("held_out") | {"seed": seed, "kind": kind, "draws": DRAWS, "taps": TAPS}
    return run.stage(f"sets-of-nodes-{kind}-seed{seed}", config, inputs | {"readouts": read.sha256}, make)


def _predicted(
    name: str, nodes: Sequence[Tensor], weight: Tensor, labels: tuple[Tensor, Tensor], generator: torch.Generator
) -> pd.DataFrame:
    """The columns of `sets_of_nodes` from size on, of one tap: activations (n, T, D) of held-out and of test images, a
    readout (L, T, D), labels of both."""
    shares = (labels[1].bincount(minlength=len(weight)) / len(labels[1])).to(weight)
    sizes = sorted({*(4**power for power in range(6) if 4**power < weight.shape[2]), weight.shape[2]})
    chosen = macroscopic.random_subsets(weight.shape[2], sizes, DRAWS, generator).to(weight.device)
    unseen, test = (zip(part.split(BATCH), y.split(BATCH), strict=True) for part, y in zip(nodes, labels, strict=True))
    mean, variance, ratio = macroscopic.moments_and_ratio((({name: part}, y) for part, y in unseen), name, weight)
    summed = [(chosen.float() @ part.flatten(1)).unflatten(1, part.shape[1:]) for part in (mean, variance)]
    factor = macroscopic.variance_factor(ratio, chosen.sum(dim=1), weight.shape[2])[:, None, None]
    right = torch.cat([macroscopic.subset_answers(part, weight, y, chosen) for part, y in test], dim=1)
    columns = {"size": chosen.sum(dim=1), "measured": right.float().mean(dim=1)}
    columns["predicted"] = macroscopic.predicted_accuracy(summed[0], factor * summed[1], shares)
    columns["uncorrelated"] = macroscopic.predicted_accuracy(*summed, shares)
    own = pd.DataFrame({column: part.numpy(force=True) for column, part in columns.items()})
    own["draw"] = own.groupby("size").cumcount()
    own = own[(own["size"] < weight.shape[2]) | (own.draw == 0)]  # there is one set of all nodes
    return own.assign(size_only=macroscopic.size_only(own), variance_ratio=ratio)
