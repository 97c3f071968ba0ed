"""Stages of a walk that prune a readout by the labels of its own nodes (ANDC, reading R1) and solve what is left.

This is the literal reading: a node stays connected to the labels on the diagonal of its Boolean matrix (code: so does
the group's readout of the flattened last layer). What is pruned is the last encoder's readout of all tokens, and that
of the vector which the network's own classifier reads; both are solved to their optimum before and after (`optimum`).
"""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import andc, optimum, snp, taps, training
from paperlib.experiment import measure
from paperlib.experiment.networks import ARCHITECTURE, SPLIT, load_network
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table
from paperlib.taps import Tap

DRAWS = 2  # random and permuted masks at each threshold


def table(run: Run) -> pd.DataFrame:
    """The table of `readouts`, all seeds."""
    return pd.concat([readouts(run, seed).table("readouts") for seed in run.settings.seeds], ignore_index=True)


def readouts(run: Run, seed: int) -> Stage:
    """Stage: the readouts of one trained network pruned at every threshold of the dilution sweep.

    readouts.csv: seed, tap, threshold, method, draw, dilution, l2, whole (accuracy unpruned), accuracy (right after
    pruning), returned_accuracy (the same, with biases that say what the removed connections said on average of training
    images), retrained_accuracy, and of all losses their standard errors over test images (loss, loss_se, ...);
    constant: of what the removed connections say to one label more than to others, the share (of squares) that is
    alike for all test images, 0..1;
    andc_ahead, andc_ahead_se: retrained accuracy of ANDC's mask less this one's, on the same images. answers.npz: tap
    -> (n_test,) and tap/method/draw/threshold -> (2, n_test) bool, right after pruning and retrained.
    """
    network, inputs = load_network(run, seed, "trained")
    s = run.settings

    def make(folder: Path) -> None:
        tables, answers = [], {}
        for place in last_places(network):
            table, found = _pruned(run, seed, network, place)
            tables.append(table)
            answers |= found
        save_table(folder / "readouts.csv", pd.concat(tables))
        save_arrays(folder / "answers.npz", answers)

    config = run.config(*ARCHITECTURE, *SPLIT[s.blind], "held_out", "prune_thresholds")
    config |= {"seed": seed, "images": measure.examples(run), "draws": DRAWS}
    config["columns"] = ["returned", "constant"]
    return run.stage(f"pruned-readouts-at-optimum-seed{seed}", config, inputs, make)


def last_places(network: nn.Module) -> list[Tap]:
    """A CCT's last `block` and what its classifier reads; a CNN's last layer."""
    places = taps.places(network, ["block", "seqpool"])
    last = max(place.encoder for place in places)
    return [place for place in places if place.encoder == last]


def _pruned(run: Run, seed: int, network: nn.Module, place: Tap) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    images, s = run.images.to(training.best_device()), run.settings
    chosen, held = measure.readout_images(run)
    y, y_held = images.y_train[chosen], images.y_train[held]
    pictures = torch.cat([images.x_train[chosen], images.x_train[held], images.x_test])
    features = taps.features(network, [place], pictures, *images.statistics)[place.name]
    own, unseen, test = features.split([len(chosen), len(held), len(images.x_test)])
    data = optimum.problem(own, y, len(images.classes), few=0)
    whole = optimum.choose(data, unseen, y_held, log=lambda line: run.log(f"{place.name}: {line}")).best
    weight = whole.weight.unflatten(1, own.shape[1:])
    fields = snp.field_matrices(weight, snp.class_means(unseen, y_held, len(images.classes)))
    size, mean = own.square().mean(dim=0).sqrt(), own.mean(dim=0)

    def said(weight: Tensor) -> Tensor:
        return test.flatten(1) @ weight.flatten(1).T

    def right(outputs: Tensor) -> Tensor:
        return outputs.argmax(dim=1) == images.y_test

    everything = said(weight)
    intact, rows, answers = right(everything), [], {place.name: right(everything).cpu()}
    for threshold in s.prune_thresholds:
        sets, andc_right = snp.diagonal_labels(snp.boolean_matrices(fields, threshold)), None
        for method, draw, mask in masks(sets, weight, size, seed):
            pruned = optimum.solve(optimum.masked(data, mask[:, None].expand_as(weight)), whole.l2, whole)
            kept, constant = split(weight, mask, mean)
            left = said(kept)
            straight, returned, again = right(left), right(left + constant), right(said(pruned.weight))
            andc_right = again if method == "andc" else andc_right
            row = {"seed": seed, "tap": place.kind, "threshold": threshold, "method": method, "draw": draw}
            row |= {"dilution": 1 - mask.float().mean().item(), "l2": whole.l2, "whole": intact.float().mean().item()}
            row |= andc.accuracy_loss("", intact, straight) | andc.accuracy_loss("returned_", intact, returned)
            row |= andc.accuracy_loss("retrained_", intact, again)
            row["constant"] = constant_share(everything - left)
            ahead = andc_right.float() - again.float()
            error = (ahead.std() / len(ahead) ** 0.5).item()
            rows.append(row | {"andc_ahead": ahead.mean().item(), "andc_ahead_se": error})
            answers[f"{place.name}/{method}/{draw}/{threshold:g}"] = torch.stack([straight, again]).cpu()
    return pd.DataFrame(rows), answers


def split(weight: Tensor, mask: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """What a mask (L, D) leaves of a readout (L, T, D), and what the rest says of mean activations (T, D): (L,)."""
    kept = weight * mask[:, None]
    return kept, ((weight - kept) * mean).sum(dim=(1, 2))


def constant_share(outputs: Tensor) -> float:
    """How much of outputs (n, L) is alike for all images, 0..1; what moves all labels alike changes no answer and is
    left out. 0 where there is nothing."""
    apart = outputs - outputs.mean(dim=1, keepdim=True)
    whole = apart.square().sum(dim=1).mean().item()
    return apart.mean(dim=0).square().sum().item() / whole if whole else 0.0


def masks(sets: Tensor, weight: Tensor, size: Tensor, seed: int) -> Iterator[tuple[str, int, Tensor]]:
    """ANDC's mask and those of its controls, with as many connections of nodes to labels: (method, draw, (L, D) bool).

    sets (D, L): the labels that nodes recognise; weight (L, T, D); size (T, D): RMS of the activations.
    """
    mask = sets.T
    yield "andc", 0, mask
    yield "magnitude", 0, andc.largest(weight.norm(dim=1), mask)
    yield "activation", 0, andc.largest((weight * size).norm(dim=1), mask)
    for draw in range(DRAWS):
        random = training.generator(seed, "random readouts", draw)
        yield "random", draw, andc.random_masks({"": mask}, random)[""]
        permuted = training.generator(seed, "permuted readouts", draw)
        yield "permuted", draw, andc.permuted_labels({"": sets}, permuted)[""].T
