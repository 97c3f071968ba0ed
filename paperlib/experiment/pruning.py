"""Stages of a walk that prune by what nodes recognise, and by controls."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import andc, macroscopic, taps, training
from paperlib.data import Images, held_out, normalise
from paperlib.experiment.networks import (
    ARCHITECTURE,
    TRAINING,
    calibration_images,
    load_network,
    recipe,
    refresh_statistics,
    right_answers,
)
from paperlib.experiment.nodes import READOUT, held_out_fields, pruned_layers, readout, trained_readouts
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table, save_tensors

DRAWN = ("random", "permuted")  # controls of which there are several draws
PRUNING = ("held_out", "prune_draws", "retrain_epochs", "retrain_lr")


def pruning(run: Run) -> pd.DataFrame:
    """Stage for every seed, layers and threshold: accuracy against dilution, for ANDC and its controls.

    seed, layers (ff; attention, classifier; a CNN's filters), method (andc, permuted, random, magnitude, activation),
    threshold, draw, images (that scored it; draws of one control share the test images out among themselves), dilution,
    removable (ff1 nodes without connections), parameters and macs (of the whole network, without the zeros), accuracy,
    loss (of accuracy, against the unpruned network), loss_se (its standard error over test images), retrained_accuracy,
    retrained_loss, retrained_loss_se (against the unpruned network retrained alike; nan where not retrained; a pruned
    classifier is retrained alone); accuracies in 0..1.
    """
    seeds, thresholds = run.settings.seeds, run.settings.prune_thresholds
    parts = [
        (seed, layers, at)
        for seed in seeds
        for layers in pruned_layers(run, seed)
        for at in (thresholds[::2] if layers in ("attention", "classifier") else thresholds)
    ]
    return pd.concat([_pruning(run, *part).table("pruning") for part in parts], ignore_index=True)


def label_sets(run: Run, seed: int) -> Stage:
    """Stage: the labels that nodes recognise on held-out training images, at every threshold of the pruning sweep.
    sets: threshold/tap -> (D, L) bool."""
    source = readout(run, seed, "trained")

    def make(folder: Path) -> None:
        fields = source.tensors("fields_held_out")
        save_arrays(folder / "sets.npz", andc.recognised_labels(fields, run.settings.prune_thresholds))

    return run.stage(f"label-sets-seed{seed}", run.config("prune_thresholds"), {"readouts": source.sha256}, make)


def classifier_sets(run: Run, seed: int) -> Stage:
    """Stage: label sets of the last encoder's `block`, which decide the classifier's masks, as those of `label_sets`;
    from there where it has them, else its readout is trained once more, alone (the same training)."""
    s, known = run.settings, label_sets(run, seed)
    network, inputs = load_network(run, seed, "trained")
    *_, last = taps.cct_taps(network, ["block"])
    if f"{s.prune_thresholds[0]:g}/{last.name}" in known.arrays("sets"):
        return known

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        weights = trained_readouts(run, network, [last], images, seed)
        fields = held_out_fields(run, network, [last], weights, images)
        save_arrays(folder / "sets.npz", andc.recognised_labels(fields, s.prune_thresholds))

    config = run.config(*ARCHITECTURE, *READOUT, "prune_thresholds") | {"seed": seed}
    return run.stage(f"classifier-sets-seed{seed}", config, inputs, make)


def input_norms(run: Run, seed: int, layers: str) -> Stage:
    """Stage: root mean square of what goes into each node of the layers that are pruned, over the held-out training
    images. norms: module path -> (K,)."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        _, held = held_out(run.images.y_train, run.settings.held_out)
        names = andc.connections(network, layers)
        save_arrays(folder / "norms.npz", andc.input_norms(network, names, images.x_train[held], *images.statistics))

    config = run.config(*ARCHITECTURE, "held_out") | {"seed": seed, "layers": layers}
    return run.stage(f"input-norms-{layers}-seed{seed}", config, inputs, make)


def unpruned(run: Run, seed: int) -> Stage:
    """Stage: what pruned networks are compared with. answers: intact, and where the settings retrain pruned networks
    retrained (the same network after the same short training, without masks) -> (n_test,) bool."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        answers = {"intact": right_answers(network, images)}
        if run.settings.retrain_thresholds:
            again = copy.deepcopy(network).requires_grad_(True)
            answers["retrained"] = _retrained(run, again, images, seed, folder / "unpruned.pt")
        save_arrays(folder / "answers.npz", answers)

    config = run.config(*ARCHITECTURE, *TRAINING, "retrain_epochs", "retrain_lr")
    config |= {"seed": seed, "retrained": bool(run.settings.retrain_thresholds)}
    return run.stage(f"unpruned-seed{seed}", config, inputs, make)


def _retrained(run: Run, network: nn.Module, images: Images, seed: int, checkpoint: Path) -> Tensor:
    """Right answers of a network after the short training of the settings."""
    s = run.settings
    short = replace(recipe(run), epochs=s.retrain_epochs, lr=s.retrain_lr, warmup=0.0, token_share=1.0)
    unscored = replace(images.seen, x_test=images.x_test[:0], y_test=images.y_test[:0])  # scored once, below
    training.train(network, unscored, short, seed, checkpoint, log=lambda line: None)
    return right_answers(network, images)


def classifier_inputs(run: Run, seed: int) -> Stage:
    """Stage: what goes into the classifier. inputs: train (n_train, D), test (n_test, D)."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        (place,), found = taps.cct_taps(network, ["seqpool"]), {}
        for part, x in (("train", images.x_train), ("test", images.x_test)):
            batches = taps.activations(network, [place], x, *images.statistics)
            found[part] = torch.cat([batch[place.name][:, 0] for batch in batches])
        save_tensors(folder / "inputs.safetensors", found)

    return run.stage(f"classifier-inputs-seed{seed}", run.config(*ARCHITECTURE) | {"seed": seed}, inputs, make)


def _retrained_classifier(run: Run, fc: nn.Linear, into: dict[str, Tensor], images: Images, seed: int) -> Tensor:
    """Right answers of a classifier after a training of it alone: 10 epochs over its inputs (`classifier_inputs`) by
    AdamW with a rate that falls from 1e-3 to 0, weight decay and label smoothing as the settings say."""
    s, (x, y), generator = run.settings, (into["train"], images.y_train), training.generator(seed, "classifier")
    optimizer = torch.optim.AdamW(fc.parameters(), lr=1e-3, weight_decay=s.weight_decay)
    epochs, steps = 10, -(-len(x) // s.batch_size)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, epochs * steps)
    for _ in range(epochs):
        for batch in torch.randperm(len(x), generator=generator).to(x.device).split(s.batch_size):
            loss = nn.functional.cross_entropy(fc(x[batch]), y[batch], label_smoothing=s.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return fc(into["test"]).argmax(dim=1) == images.y_test


def _pruning(run: Run, seed: int, layers: str, threshold: float) -> Stage:
    s = run.settings
    source, first, reference = readout(run, seed, "trained"), seed == s.seeds[0], unpruned(run, seed)
    network, inputs = load_network(run, seed, "trained")
    again, alone = threshold in s.retrain_thresholds and layers in ("ff", "filters"), layers == "classifier"
    recognised = (classifier_sets if alone else label_sets)(run, seed)
    sets, norms = recognised.arrays("sets"), input_norms(run, seed, layers).arrays("norms")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        before = {name: answers.to(images.x_test.device) for name, answers in reference.arrays("answers").items()}
        intact = before["intact"]
        parameters, macs = sum(p.numel() for p in network.parameters()), andc.multiply_adds(network, images.x_test[:1])
        rows, into = [], {}
        if alone:  # what comes before the classifier is the same for all masks
            found = classifier_inputs(run, seed).tensors("inputs")
            into = {part: values.to(images.x_test.device) for part, values in found.items()}
            unmasked = copy.deepcopy(network.classifier.fc).requires_grad_(True)
            before["retrained"] = _retrained_classifier(run, unmasked, into, images, seed)
        for method, draw, masks in _masks(run, network, sets, norms, seed, layers, threshold):
            pruned = andc.apply_masks(copy.deepcopy(network).requires_grad_(True), masks)
            row = {"seed": seed, "layers": layers, "method": method, "threshold": threshold, "draw": draw}
            weights, products = andc.savings(masks, network, images.x_test[:1].float())
            row |= {"dilution": andc.dilution(masks), "parameters": parameters - weights, "macs": macs - products}
            row["removable"] = sum(int(nodes.sum()) for nodes in andc.removable(masks).values())
            draws = min(s.prune_draws, len(images.y_test))
            part = slice(draw % draws, None, draws) if method in DRAWN else slice(None)
            if alone:
                right = pruned.classifier.fc(into["test"][part]).argmax(dim=1) == images.y_test[part]
            else:
                right = right_answers(pruned, images, part)
            row |= {"images": len(right)} | andc.accuracy_loss("", intact[part], right)
            retrained = None
            if alone and draw == 0:
                retrained = _retrained_classifier(run, pruned.classifier.fc, into, images, seed)
            elif again and draw == 0 and (first or method in andc.MASKS):
                retrained = _retrained(run, pruned, images, seed, folder / f"{method}.pt")
            rows.append(row | andc.accuracy_loss("retrained_", before.get("retrained", intact), retrained))
        run.log(f"pruning {layers} at threshold {threshold}: dilution {rows[-1]['dilution']:.2f}")
        save_table(folder / "pruning.csv", rows)

    config = run.config(*ARCHITECTURE, *TRAINING, *PRUNING)
    config |= {"seed": seed, "first": first, "layers": layers, "threshold": threshold}
    config["retrain"] = "alone" if alone else again
    inputs |= {"sets": recognised.sha256} if alone else {"readouts": source.sha256}
    inputs["unpruned"] = reference.sha256
    return run.stage(f"andc-{layers}-{threshold:g}-seed{seed}", config, inputs, make)


def why_filters(half: Run) -> pd.DataFrame:
    """Stage for every seed: is it the signs of what ANDC removes from a CNN that costs accuracy, or statistics of batch
    norm that no longer fit? ANDC's masks, random ones, and random ones that remove as many kernels with a negative sum
    as ANDC does, right after pruning and with batch norm's statistics taken anew from up to 5,000 training images.

    seed, threshold, method (andc, random, same signs), dilution, accuracy, refreshed_accuracy (0..1). The smallest
    thresholds of the sweep: at larger ones nothing is left to compare.
    """
    return pd.concat([_why_filters(half, seed).table("filters") for seed in half.settings.seeds], ignore_index=True)


def _why_filters(half: Run, seed: int) -> Stage:
    source, thresholds = label_sets(half, seed), half.settings.prune_thresholds[:3]
    network, inputs = load_network(half, seed, "trained")

    def make(folder: Path) -> None:
        images, found = half.images.to(training.best_device()), source.arrays("sets")
        refresh = partial(refresh_statistics, x=calibration_images(half, seed, images), images=images)
        pairs, rows = andc.connections(network, "filters"), []
        for at in thresholds:
            generator = training.generator(seed, "filters", at)
            masks = andc.andc_masks(andc.sets_at(at, found, pairs), pairs)
            methods = {"andc": masks, "random": andc.random_masks(masks, generator)}
            methods["same signs"] = andc.same_sign_masks(masks, network, generator)
            for method, drawn in methods.items():
                row = {"seed": seed, "threshold": at, "method": method}
                rows.append(row | _before_and_after(network, drawn, images, "refreshed", refresh))
        save_table(folder / "filters.csv", rows)

    config = half.config(*ARCHITECTURE, "held_out") | {"seed": seed, "thresholds": thresholds}
    return half.stage(f"why-filters-seed{seed}", config, inputs | {"label sets": source.sha256}, make)


def why_ff(run: Run) -> pd.DataFrame:
    """Stage for every seed: is it the signal of what ANDC removes from the FF layers that is missed, or its mean?
    ANDC's masks and one draw of random and permuted ones, right after pruning, and with biases by which the pruned
    layers say on average what they said before (`andc.keep_means`, on up to 1,000 held-out training images).

    seed, threshold, method (andc, random, permuted), dilution, accuracy, kept_means_accuracy (0..1, on the share of the
    test images that scores one draw). The smallest thresholds of the sweep, as in `why_filters`.
    """
    return pd.concat([_why_ff(run, seed).table("ff") for seed in run.settings.seeds], ignore_index=True)


def _why_ff(run: Run, seed: int) -> Stage:
    source, thresholds = label_sets(run, seed), run.settings.prune_thresholds[:3]
    network, inputs = load_network(run, seed, "trained")
    norms = input_norms(run, seed, "ff").arrays("norms")

    def make(folder: Path) -> None:
        images, found = run.images.to(training.best_device()), source.arrays("sets")
        _, held = held_out(run.images.y_train, run.settings.held_out)
        most = max(100, min(1000, 1000 * 32**2 // run.settings.image_size**2))  # all in one pass: larger images, fewer
        x = normalise(images.x_train[held[:: -(-len(held) // most)]], *images.statistics)
        rows = []
        for at in thresholds:
            for method, draw, masks in _masks(run, network, found, norms, seed, "ff", at):
                if method in andc.MASKS and draw == 0:
                    keep = partial(andc.keep_means, network=network, names=masks, x=x)
                    part = slice(0, None, min(run.settings.prune_draws, len(images.y_test)))
                    row = {"seed": seed, "threshold": at, "method": method}
                    rows.append(row | _before_and_after(network, masks, images, "kept_means", keep, part))
        save_table(folder / "ff.csv", rows)

    config = run.config(*ARCHITECTURE, "held_out", "prune_draws") | {"seed": seed, "thresholds": thresholds}
    return run.stage(f"why-ff-seed{seed}", config, inputs | {"label sets": source.sha256}, make)


def signs_of_filters(half: Run) -> pd.DataFrame:
    """What ANDC removes from a CNN: one row per seed, threshold and layer, with the dilution and, of the kernels kept
    and of those removed, the share whose weights sum to less than 0 and the mean size (sum of |weights|). Filters
    answer with 0 or more, so that a kernel with a negative sum silences."""
    rows = []
    for seed in half.settings.seeds:
        (network, _), found = load_network(half, seed, "trained"), label_sets(half, seed).arrays("sets")
        pairs = andc.connections(network, "filters")
        for at in half.settings.prune_thresholds:
            for name, mask in andc.andc_masks(andc.sets_at(at, found, pairs), pairs).items():
                kernels = network.get_submodule(name).weight.flatten(2).cpu()
                row = {"seed": seed, "threshold": at, "layer": taps.encoder_of(pairs[name][1])}
                row["dilution"] = andc.dilution({name: mask})
                for which, part in (("kept", kernels[mask]), ("removed", kernels[~mask])):
                    row[f"negative {which}"] = (part.sum(dim=1) < 0).float().mean().item()
                    row[f"size {which}"] = part.abs().sum(dim=1).mean().item()
                rows.append(row)
    return pd.DataFrame(rows)


def pruned_readouts(run: Run) -> pd.DataFrame:
    """Stage for every seed: ANDC on readouts, where the weights from a node to a label stay iff the node recognises it;
    the taps of the settings whose nodes were looked at on held-out images.

    seed, encoder, tap, threshold, method (andc, permuted, random), dilution, whole (accuracy of the readout before) and
    accuracy, on the test images, 0..1.
    """
    return pd.concat([_pruned_readouts(run, seed).table("readouts") for seed in run.settings.seeds], ignore_index=True)


def _pruned_readouts(run: Run, seed: int) -> Stage:
    source, recognised = readout(run, seed, "trained"), label_sets(run, seed)
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images, sets = run.images.to(training.best_device()), recognised.arrays("sets")
        measured = {name.partition("/")[2] for name in sets}
        places = [tap for tap in taps.cct_taps(network, run.settings.taps) if tap.name in measured]
        correct, read = source.arrays("correct"), source.tensors("weights")
        weights = {tap.name: read[tap.name].to(images.x_test.device) for tap in places}
        rows, masks = [], {tap.name: [] for tap in places}
        for tap in places:
            pairs, whole = {tap.name: (tap.name, "labels")}, correct[tap.name].float().mean().item()
            for at in run.settings.prune_thresholds:
                generator = training.generator(seed, "readout masks", tap.name, at)
                own = {tap.name: sets[f"{at:g}/{tap.name}"]}
                andc_masks = andc.andc_masks(own, pairs)
                others = {"permuted": andc.andc_masks(andc.permuted_labels(own, generator), pairs)}
                others["random"] = andc.random_masks(andc_masks, generator)
                for method, found in ({"andc": andc_masks} | others).items():
                    masks[tap.name].append(found[tap.name])
                    row = {"seed": seed, "encoder": tap.encoder, "tap": tap.kind, "threshold": at, "method": method}
                    rows.append(row | {"dilution": andc.dilution(found), "whole": whole})
        kept = {name: torch.stack(found).float().to(images.x_test.device) for name, found in masks.items()}  # (M, L, D)
        right = {name: 0 for name in kept}
        for batch, labels in macroscopic.labelled_batches(network, places, images.x_test, images.y_test, images):
            for name in right:
                fields = macroscopic.node_fields(batch[name], weights[name])
                answers = torch.einsum("dnl,mld->mnl", fields, kept[name]).argmax(dim=2)
                right[name] += (answers == labels).sum(dim=1)
        accuracies = torch.cat([right[tap.name] for tap in places]).cpu() / len(images.y_test)
        save_table(folder / "readouts.csv", pd.DataFrame(rows).assign(accuracy=accuracies))

    config = run.config("taps", "prune_thresholds") | {"seed": seed}
    inputs |= {"readouts": source.sha256, "sets": recognised.sha256}
    return run.stage(f"pruned-readouts-seed{seed}", config, inputs, make)


def _masks(run: Run, network: nn.Module, found: dict, norms: dict, seed: int, layers: str, threshold: float):
    """ANDC's masks and those of its controls at equal dilution: (method, draw, masks). found and norms: arrays of
    `label_sets` and `input_norms`."""
    pairs = andc.connections(network, layers)
    sets = andc.sets_at(threshold, found, pairs)
    masks = andc.andc_masks(sets, pairs)
    yield "andc", 0, masks
    yield "magnitude", 0, andc.magnitude_masks(masks, network)
    yield "activation", 0, andc.activation_masks(masks, network, norms)
    for draw in range(run.settings.prune_draws):
        yield "random", draw, andc.random_masks(masks, training.generator(seed, "random masks", draw))
        permuted = andc.permuted_labels(sets, training.generator(seed, "permuted labels", draw))
        yield "permuted", draw, andc.andc_masks(permuted, pairs)


def _before_and_after(
    network: nn.Module, masks: dict[str, Tensor], images: Images, what: str, mend: Callable, part: slice = slice(None)
) -> dict[str, float]:
    """Dilution, and accuracy on a part of the test images right after pruning and after `mend(pruned network)`."""
    pruned = andc.apply_masks(copy.deepcopy(network), masks)
    row = {"dilution": andc.dilution(masks), "accuracy": right_answers(pruned, images, part).float().mean().item()}
    mend(pruned)
    return row | {f"{what}_accuracy": right_answers(pruned, images, part).float().mean().item()}


def summary_of_readouts(readouts: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and encoders, one row per tap and threshold: dilution, accuracy whole and for each mask."""
    means = readouts.groupby(["tap", "threshold", "method"])[["dilution", "whole", "accuracy"]].mean()
    return means.xs("andc", level="method")[["dilution", "whole"]].join(means.accuracy.unstack()).round(3)
