"""Stages of a walk that measure single nodes, version 2: readouts at their optimum, and what they say of nodes.

Its tables are read by the rules of claims C1, C2, C3 and C6. A statistic is raw or centred (without the offset), of
native or of rotated nodes; each comes with what it would be without one of ten folds of the test images.
"""

import itertools
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import optimum, snp, taps, training
from paperlib.data import BATCH, Images, held_out
from paperlib.experiment.networks import ARCHITECTURE, SPLIT, calibration_images, load_network, refresh_statistics
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table, save_tensors, whole
from paperlib.readouts import head_fields
from paperlib.taps import Tap

MAIN = ("ff1", "attn", "block", "conv")  # measured for every seed: FF nodes, MHA nodes, what is passed on; filters
ONCE = ("stem", "qkv", "mha", "ff_in", "ff2")  # measured for the first seed
IMAGES = 20_000  # training images of a readout, balanced over labels, at most
ROTATIONS = 5  # draws of rotated nodes
FOLDS = 10  # of the test images
GROUP_BYTES = 7e9  # of features that are held at a time
VARIANTS = ("best", "third", "triple", "settled")  # penalty: chosen, a third, three times; solved to half the tolerance


def measure(run: Run, seed: int, kind: str) -> Stage:
    """Stage: readouts of one network at their optimum, and what they say of its nodes. kind: trained, random (of a CNN
    with batch norm's statistics of training images), or shuffled: trained, with readouts of randomly reassigned labels.

    readouts.csv: how each was solved. taps.csv: statistics of each tap, native and rotated, raw and centred. folds.csv:
    the same without each fold. nodes.csv: every native node. correct.npz: tap -> (n_test,) and heads/tap -> (n_test, H)
    bool. weights, means: tap -> (L, T, D), the chosen readout, and class means of test and (held/tap) held-out images.
    """
    s = run.settings
    network, inputs = load_network(run, seed, "trained" if kind == "shuffled" else kind)
    once = ONCE if seed == s.seeds[0] and kind != "shuffled" else ()
    places = taps.places(network, [tap for tap in (*MAIN, *once) if tap != "conv"])

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        if kind == "random" and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
            refresh_statistics(network, calibration_images(run, seed, images), images)
        solved, rows = {}, []
        for number, group in enumerate(_groups(network, places, images)):
            found, said = _solved(run, seed, kind, network, group, images, folder / f"solved-{number}.pt")
            solved |= found
            rows += said
        best = {name: weights["best"] for name, weights in solved.items()}
        _, held = held_out(run.images.y_train, s.held_out)
        unseen, *_ = class_sums(network, places, best, images.x_train[held], images.y_train[held], images, folds=1)
        sums, counts, correct = class_sums(network, places, best, images.x_test, images.y_test, images)
        tap_rows, fold_rows, node_tables, means = [], [], [], {}
        for place in places:
            name, by_fold = place.name, sums.pop(place.name)
            row = {"seed": seed, "network": kind, "encoder": place.encoder, "tap": place.kind}
            means[name] = snp.means_of(by_fold.sum(dim=0), counts.sum(dim=0))
            means[f"held/{name}"] = snp.means_of(unseen.pop(name)[0], images.y_train[held].bincount())
            accuracy = {"accuracy": correct[name].float().mean().item()}
            for basis, centred, fields in _readings(best[name], means[name], place, seed):
                label = row | {"basis": basis, "centred": centred} | accuracy
                thresholds = {s.threshold, *(s.threshold_sweep if basis == "native" else ())}
                for at in thresholds:
                    found = statistics(snp.boolean_matrices(fields, at), basis == "native")
                    tap_rows.append(label | {"threshold": at} | found)
                if basis == "native":
                    table = of_nodes(snp.boolean_matrices(fields, s.threshold))
                    node_tables.append(table.assign(**row, centred=centred))
            fold = _folds(images.y_test)
            for left_out in range(FOLDS):
                kept, number = by_fold.sum(dim=0) - by_fold[left_out], counts.sum(dim=0) - counts[left_out]
                accuracy = {"accuracy": correct[name][fold != left_out].float().mean().item(), "fold": left_out}
                for basis, centred, fields in _readings(best[name], snp.means_of(kept, number), place, seed, draws=1):
                    label = row | {"basis": basis, "centred": centred} | accuracy
                    found = statistics(snp.boolean_matrices(fields, s.threshold), basis == "native")
                    fold_rows.append(label | found)
            for line in (line for line in rows if line["name"] == name):
                fields = snp.field_matrices(solved[name][line["variant"]], means[name])
                for column, values in (("snr", fields), ("snr_centred", snp.split_offset(fields)[0])):
                    line[column] = snp.tap_statistics(snp.boolean_matrices(values, s.threshold)).snr
        save_table(folder / "readouts.csv", rows)
        save_table(folder / "taps.csv", tap_rows)
        save_table(folder / "folds.csv", fold_rows)
        save_table(folder / "nodes.csv", pd.concat(node_tables))
        save_arrays(folder / "correct.npz", correct)
        save_tensors(folder / "weights.safetensors", best)
        save_tensors(folder / "means.safetensors", means)

    config = run.config(*ARCHITECTURE, *SPLIT[s.blind], "held_out", "threshold", "threshold_sweep")
    config |= {"seed": seed, "kind": kind, "taps": [place.name for place in places], "images": IMAGES}
    return run.stage(f"measure-{kind}-seed{seed}", config, inputs, make)


def _groups(network: nn.Module, places: list[Tap], images: Images) -> list[list[Tap]]:
    """Taps whose features are held together: those of one encoder, as far as memory goes."""
    one = taps.features(network, places, images.x_train[:1], *images.statistics)
    number, groups = min(IMAGES, len(images.x_train)), []
    for place in places:  # before hours of work
        snp.check_rotation(one[place.name].shape[2], place.groups)
    for _, along in itertools.groupby(sorted(places, key=lambda place: place.encoder), key=lambda place: place.encoder):
        held = float("inf")
        for place in along:
            size = 4 * number * one[place.name].numel()
            if held + size > GROUP_BYTES:
                groups.append([])
                held = 0.0
            groups[-1].append(place)
            held += size
    return groups


def _solved(
    run: Run, seed: int, kind: str, network: nn.Module, places: list[Tap], images: Images, checkpoint: Path
) -> tuple[dict[str, dict[str, Tensor]], list[dict]]:
    """The readouts of some taps, in every variant, and how they were solved; from the checkpoint, if it is there."""
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=images.x_train.device, weights_only=True)
        return saved["weights"], saved["rows"]
    kept, held = held_out(run.images.y_train, run.settings.held_out)
    chosen = kept[balanced(run.images.y_train[kept])[:IMAGES]]
    y, y_held = images.y_train[chosen], images.y_train[held]
    if kind == "shuffled":
        y, y_held = (part[_order(part, seed)] for part in (y, y_held))
    pictures = torch.cat([images.x_train[chosen], images.x_train[held]])
    features = taps.features(network, places, pictures, *images.statistics)
    weights, rows = {}, []
    for place in places:
        own = features.pop(place.name)
        data = optimum.problem(own[: len(y)], y, len(images.classes))
        unseen = own[len(y) :].flatten(1)
        choice = optimum.choose(data, unseen, y_held, log=lambda said, tap=place.name: run.log(f"{tap}: {said}"))
        settled = optimum.solve(data, choice.best.l2, choice.best, optimum.TOLERANCE / 2)
        found = dict(zip(VARIANTS, (choice.best, choice.third, choice.triple, settled), strict=True))
        weights[place.name] = {variant: one.weight.unflatten(1, own.shape[1:]) for variant, one in found.items()}
        for variant, one in found.items():
            answers = (unseen @ one.weight.T).argmax(dim=1)
            row = {"seed": seed, "network": kind, "encoder": place.encoder, "tap": place.kind, "name": place.name}
            row |= {"variant": variant, "l2": one.l2, "gradient": one.gradient, "objective": one.objective}
            rows.append(row | {"held_out_accuracy": answers.eq(y_held).float().mean().item()})
        tried = ", ".join(f"{line['l2']:g}: {line['accuracy']:.1%}" for line in choice.tried)
        run.log(f"{place.name}: l2 {choice.best.l2:g} (held-out accuracy {tried})")
    with whole(checkpoint) as file:
        torch.save({"weights": weights, "rows": rows}, file)
    return weights, rows


def balanced(labels: Tensor) -> Tensor:
    """Indices of all images, every label's first, then every label's second, ...: a beginning is balanced."""
    order = labels.argsort(stable=True)
    counts = labels.bincount()
    rank = torch.cat([torch.arange(int(count)) for count in counts])
    return order[rank.argsort(stable=True).to(order.device)]


def _order(labels: Tensor, seed: int) -> Tensor:
    """A random order, to reassign labels to images."""
    return torch.randperm(len(labels), generator=training.generator(seed, "shuffled labels", len(labels)))


def _folds(labels: Tensor) -> Tensor:
    """The fold of each image, so that every fold has as many of each label, or one more: (n,)."""
    fold = torch.empty_like(labels)
    for label in labels.unique():
        own = labels == label
        fold[own] = torch.arange(int(own.sum()), device=labels.device) % FOLDS
    return fold


def class_sums(
    network: nn.Module,
    places: list[Tap],
    weights: dict[str, Tensor],
    x: Tensor,
    y: Tensor,
    images: Images,
    folds: int = FOLDS,
) -> tuple[dict[str, Tensor], Tensor, dict[str, Tensor]]:
    """One pass over images: class sums of each fold, tap -> (folds, L, T, D); images of each fold and label (folds, L);
    which images each readout, and each head alone, answers correctly, tap -> (n,), heads/tap -> (n, H)."""
    labels = len(images.classes)
    cell = (_folds(y) % folds) * labels + y
    sums = {name: weight.new_zeros(folds * labels, *weight.shape[1:]) for name, weight in weights.items()}
    correct: dict[str, list[Tensor]] = {}
    batches = taps.activations(network, places, x, *images.statistics)
    for batch, cells, own in zip(batches, cell.split(BATCH), y.split(BATCH), strict=True):
        for place in places:
            activations, weight = batch[place.name], weights[place.name]
            sums[place.name].index_add_(0, cells, activations)
            answers = (activations.flatten(1) @ weight.flatten(1).T).argmax(dim=1)
            correct.setdefault(place.name, []).append(answers == own)
            if place.heads:
                alone = head_fields(activations, weight, place.heads).argmax(dim=2)
                correct.setdefault(f"heads/{place.name}", []).append(alone == own[:, None])
        batch.clear()
    counts = cell.bincount(minlength=folds * labels).unflatten(0, (folds, labels))
    sums = {name: part.unflatten(0, (folds, labels)) for name, part in sums.items()}
    return sums, counts, {name: torch.cat(parts) for name, parts in correct.items()}


def _readings(weight: Tensor, means: Tensor, place: Tap, seed: int, draws: int = ROTATIONS):
    """(basis, centred, fields (D, L, L)) of native and rotated nodes: bases native, rotated-0, rotated-1, ..."""
    fields = snp.field_matrices(weight, means)
    yield "native", False, fields
    yield "native", True, snp.split_offset(fields)[0]
    generator = training.generator(seed, "rotations", place.name)
    for number, rotation in enumerate(snp.rotations(weight.shape[2], ROTATIONS, generator, place.groups)[:draws]):
        fields = snp.field_matrices(snp.rotated(weight, rotation), snp.rotated(means, rotation))
        yield f"rotated-{number}", False, fields
        yield f"rotated-{number}", True, snp.split_offset(fields)[0]


def statistics(booleans: Tensor, clusters: bool) -> dict[str, float]:
    """Statistics of a tap: those of `snp.TapStatistics` and, if asked what its clusters mean, mutual: mutual confusions
    of recognised labels over what row and column sums give; own_noise: share of noise in columns of own labels, 0..1.
    """
    found = asdict(snp.tap_statistics(booleans))
    if not clusters:
        return found
    mutual, expected = snp.mutual_confusions(booleans).sum(dim=0).tolist()
    noise = float(booleans.sum() - snp.diagonal_labels(booleans).sum())
    own = float(snp.own_noise(booleans).sum())
    quotients = (("mutual", mutual, expected), ("own_noise", own, noise))
    return found | {name: part / rest if rest else float("nan") for name, part, rest in quotients}


def of_nodes(booleans: Tensor) -> pd.DataFrame:
    """Every node of a tap: node, labels, clusters, internal, external, own_noise, mutual, expected."""
    found = snp.node_statistics(booleans)
    mutual, expected = snp.mutual_confusions(booleans).T
    table = pd.DataFrame({name: getattr(found, name).cpu() for name in found.__dataclass_fields__})
    table = table.assign(own_noise=snp.own_noise(booleans).cpu(), mutual=mutual.cpu(), expected=expected.cpu())
    return table.rename_axis("node").reset_index()
