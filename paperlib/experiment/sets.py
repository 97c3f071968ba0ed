"""Stage of a walk that predicts how well many nodes recognise labels together from what each says alone (claim C6).

Means and variances of single nodes' fields come from held-out images, and so does the correlation between nodes, one
number an encoder; what is predicted are answers to the test images.
"""

from pathlib import Path

import pandas as pd

from paperlib import macroscopic, taps, training
from paperlib.data import held_out
from paperlib.experiment import measure
from paperlib.experiment.networks import load_network
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_table

DRAWS = 20  # sets of each size
TAPS = ("ff1", "attn", "block")  # a CNN's are `conv`


def sets_of_nodes(run: Run, seed: int) -> Stage:
    """Stage: accuracy of random sets of a tap's nodes, predicted and measured, in every encoder.

    sets.csv: seed, encoder, tap, size (nodes; the last one: all), draw, measured (on the test images), predicted (with
    the correlation between nodes of this encoder), uncorrelated (without), and size_only: what a curve of accuracy
    against size in the same encoder says, the mean of its other sets of that size, and for all nodes the straight line
    in log(size) through the two largest sizes before; all in 0..1. variance_ratio: of all nodes' summed field on
    held-out images, its variance over the sum of theirs.
    """
    read = measure.readouts(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        _, held = held_out(run.images.y_train, run.settings.held_out)
        unseen, y_unseen = images.x_train[held], images.y_train[held]
        if y_unseen.bincount(minlength=len(images.classes)).min() < 2:
            raise ValueError("a variance needs two held-out images of each label: raise held_out")
        shares = (images.y_test.bincount() / len(images.y_test)).to(images.x_test.device)
        weights, tables = read.tensors("weights"), []
        for place in taps.places(network, list(TAPS)):
            weight = {place.name: weights[f"{place.name}/best"].to(shares.device)}
            nodes = weight[place.name].shape[2]
            sizes = sorted({*(4**power for power in range(6) if 4**power < nodes), nodes})
            generator = training.generator(seed, "subsets", place.name)
            chosen = macroscopic.random_subsets(nodes, sizes, DRAWS, generator).to(shares.device)
            batches = macroscopic.labelled_batches(network, [place], unseen, y_unseen, images)
            mean, variance, ratio = macroscopic.moments_and_ratio(batches, place.name, weight[place.name])
            summed = [(chosen.float() @ part.flatten(1)).unflatten(1, part.shape[1:]) for part in (mean, variance)]
            factor = macroscopic.variance_factor(ratio, chosen.sum(dim=1), nodes)[:, None, None]
            subsets = {place.name: chosen}
            measured = macroscopic.subset_accuracies(
                network, [place], images.x_test, images.y_test, images, weight, subsets
            )[place.name]
            columns = {"size": chosen.sum(dim=1), "measured": measured}
            columns["predicted"] = macroscopic.predicted_accuracy(summed[0], factor * summed[1], shares)
            columns["uncorrelated"] = macroscopic.predicted_accuracy(*summed, shares)
            table = pd.DataFrame({name: part.numpy(force=True) for name, part in columns.items()})
            table["draw"] = table.groupby("size").cumcount()
            table = table[(table["size"] < nodes) | (table.draw == 0)]  # there is one set of all nodes
            table["size_only"] = macroscopic.size_only(table)
            row = {"seed": seed, "encoder": place.encoder, "tap": place.kind, "variance_ratio": ratio}
            tables.append(table.assign(**row))
        save_table(folder / "sets.csv", pd.concat(tables))

    config = run.config("held_out") | {"seed": seed, "draws": DRAWS, "taps": TAPS}
    return run.stage(f"sets-of-nodes-seed{seed}", config, inputs | {"readouts": read.sha256}, make)
