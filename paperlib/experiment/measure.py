"""Stages of a walk that measure single nodes, version 2: readouts at their optimum, and what they say of nodes.

Its tables are read by the rules of claims C1, C2 and C3 (`verdicts`). A statistic is raw or centred (without the
offset), of native or of rotated nodes; each comes with what it would be without one of ten folds of the test images,
and with the error that nodes drawn anew would give it.
"""

import itertools
import math
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import limit, optimum, snp, taps, training
from paperlib.data import BATCH, TEXTS, Images, balanced, held_out, ranked
from paperlib.experiment.networks import (
    ARCHITECTURE,
    NETWORKS,
    SPLIT,
    calibration_images,
    load_network,
    refresh_statistics,
)
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table, save_tensors, whole
from paperlib.readouts import head_fields
from paperlib.taps import Tap

MAIN = ("ff1", "attn", "block", "conv")  # measured for every seed: FF nodes, MHA nodes, what is passed on; filters
ONCE = ("stem", "qkv", "mha", "ff_in", "ff2")  # measured for the first seed
IMAGES = 20_000  # training images of a readout, balanced over labels, at most
READ = 7_500  # and texts
FOLDS = 10  # of the test images
GROUP_BYTES = 7e9  # of features that are held at a time
NODE_COLUMNS = ("labels", "clusters", "internal", "external", "own_noise", "mutual", "expected")
VARIANTS = ("best", "third", "triple", "settled")  # penalty: chosen, a third, three times; chosen, solved further


def readouts(run: Run, seed: int, kind: str) -> Stage:
    """Stage: the readouts of one network at their optimum. kind: trained, random (of a CNN with batch norm's statistics
    of training images), or shuffled: trained, with readouts of randomly reassigned labels.

    readouts.csv: seed, network, encoder, tap, name, variant, l2, steps, gradient, objective, held_out_accuracy (0..1).
    weights: tap/variant -> (L, T, D), for `VARIANTS`.
    """
    network, places, inputs = _measured(run, seed, kind)

    def make(folder: Path) -> None:
        _check_labels(run.images)
        if not run.settings.blind:
            run.log("the networks have seen the held-out images, which choose penalties: blind=true keeps them apart")
        images, weights, rows = prepared(run, seed, kind, network), {}, []
        for number, group in enumerate(_groups(network, places, images, examples(run))):
            found, said = _solved(run, seed, kind, network, group, images, folder / f"solved-{number}.pt")
            weights |= found
            rows += said
        save_table(folder / "readouts.csv", rows)
        save_tensors(folder / "weights.safetensors", weights)

    config = run.config(*ARCHITECTURE, *SPLIT[run.settings.blind], "held_out")
    config |= {"seed": seed, "kind": kind, "taps": [place.name for place in places], "images": examples(run)}
    config |= {"grid": optimum.GRID, "tolerance": optimum.TOLERANCE}
    return run.stage(f"readouts-at-optimum-{kind}-seed{seed}", config, inputs, make)


def tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of `nodes` (taps, folds, variants) and of `readouts`, of trained and random networks of all seeds, and
    of shuffled labels for the first one."""
    first = run.settings.seeds[0]
    parts = [(seed, kind) for seed in run.settings.seeds for kind in NETWORKS] + [(first, "shuffled")]
    found = {
        name: pd.concat([nodes(run, *part).table(name) for part in parts]) for name in ("taps", "folds", "variants")
    }
    found["readouts"] = pd.concat([readouts(run, *part).table("readouts") for part in parts])
    return {name: table.reset_index(drop=True) for name, table in found.items()}


def at_threshold(found: dict[str, pd.DataFrame], threshold: float) -> dict[str, pd.DataFrame]:
    """The tables taps and folds of `tables` at one threshold."""
    return {name: found[name][found[name].threshold == threshold] for name in ("taps", "folds")}


def nodes(run: Run, seed: int, kind: str) -> Stage:
    """Stage: what the readouts of one network say of its nodes, at every threshold of the sweep and the main one.

    taps.csv: seed, network, encoder, tap, basis (native, rotated-0, ..), centred, threshold, accuracy, `statistics`.
    folds.csv: the same without each fold, for native nodes and one rotation. variants.csv: snr and snr_centred with
    other penalties. nodes.npz: tap/raw (or centred)/threshold -> (D, 7), `NODE_COLUMNS`.
    correct.npz: tap -> (n_test,) and heads/tap -> (n_test, H) bool. means: tap -> class means (L, T, D) of test, and
    held/tap of held-out images.
    """
    source, s = readouts(run, seed, kind), run.settings
    network, places, inputs = _measured(run, seed, kind)
    thresholds = sorted({s.threshold, *s.threshold_sweep})

    def make(folder: Path) -> None:
        images, weights = prepared(run, seed, kind, network), source.tensors("weights")
        weights = {name: weight.to(images.x_test.device) for name, weight in weights.items()}
        best = {place.name: weights[f"{place.name}/best"] for place in places}
        _, held = held_out(run.images.y_train, s.held_out)
        unseen, seen, _ = class_sums(network, places, best, images.x_train[held], images.y_train[held], images, folds=1)
        sums, counts, correct = class_sums(network, places, best, images.x_test, images.y_test, images)
        taps_, folds, variants, means, arrays = [], [], [], {}, {}
        fold, images_of = fold_of(images.y_test), counts.sum(dim=0)
        for place in places:
            name, by_fold = place.name, sums.pop(place.name)
            row = {"seed": seed, "network": kind, "encoder": place.encoder, "tap": place.kind}
            whole_sum, drawn = by_fold.sum(dim=0), rotations(seed, place, by_fold.shape[-1])
            means[name] = snp.means_of(whole_sum, images_of)
            means[f"held/{name}"] = snp.means_of(unseen.pop(name)[0], seen[0])
            found, of_nodes = _of_tap(best[name], means[name], drawn, thresholds)
            accuracy = correct[name].float().mean().item()
            taps_.append(found.assign(**row, accuracy=accuracy))
            arrays |= {f"{name}/{key}": values for key, values in of_nodes.items()}
            for left_out in range(FOLDS):
                without = snp.means_of(whole_sum - by_fold[left_out], images_of - counts[left_out])
                found, _ = _of_tap(best[name], without, drawn[:1], thresholds)
                accuracy = correct[name][fold != left_out].float().mean().item()
                folds.append(found.assign(**row, accuracy=accuracy, fold=left_out))
            for variant in (variant for variant in VARIANTS if f"{name}/{variant}" in weights):
                fields = snp.field_matrices(weights[f"{name}/{variant}"], means[name])
                for at in thresholds:
                    both = (snp.boolean_matrices(part, at) for part in (fields, snp.split_offset(fields)[0]))
                    raw, centred = (snp.tap_statistics(booleans).snr for booleans in both)
                    variants.append(row | {"variant": variant, "threshold": at, "snr": raw, "snr_centred": centred})
        for table, parts in (("taps", taps_), ("folds", folds)):
            save_table(folder / f"{table}.csv", pd.concat(parts))
        save_table(folder / "variants.csv", variants)
        save_arrays(folder / "nodes.npz", arrays)
        save_arrays(folder / "correct.npz", correct)
        save_tensors(folder / "means.safetensors", means)

    config = {"held_out": s.held_out, "seed": seed, "kind": kind, "thresholds": thresholds}
    config |= {"rotations": snp.ROTATIONS, "folds": FOLDS}
    return run.stage(f"nodes-{kind}-seed{seed}", config, inputs | {"readouts": source.sha256}, make)


def _measured(run: Run, seed: int, kind: str) -> tuple[nn.Module, list[Tap], dict[str, str]]:
    """The network of a kind, where its nodes are measured, and what the stage depends on."""
    network, inputs = load_network(run, seed, "trained" if kind == "shuffled" else kind)
    once = ONCE if _first(run, seed) and kind != "shuffled" and run.settings.data not in TEXTS else ()
    return network, taps.places(network, [tap for tap in (*MAIN, *once) if tap != "conv"]), inputs


def _check_labels(images: Images) -> None:
    """ValueError for a label with one test image: without it, the label would have none."""
    counts = images.y_test.bincount(minlength=len(images.classes))
    if counts.min() < 2:
        label = images.classes[int(counts.argmin())]
        raise ValueError(f"label {label!r} has {counts.min()} test image: intervals need two of each label")


def _first(run: Run, seed: int) -> bool:
    return seed == run.settings.seeds[0]


def examples(run: Run) -> int:
    """How many training images, or texts, a readout learns from, at most."""
    return READ if run.settings.data in TEXTS else IMAGES


def prepared(run: Run, seed: int, kind: str, network: nn.Module) -> Images:
    """The images on the device; a random CNN takes its batch norm's statistics from them."""
    images = run.images.to(training.best_device())
    if kind == "random" and any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        refresh_statistics(network, calibration_images(run, seed, images), images)
    return images


def rotations(seed: int, place: Tap, nodes: int) -> Tensor:
    """The rotations of a tap's nodes that everything of a seed is measured with: (draws, D, D)."""
    return snp.rotations(nodes, snp.ROTATIONS, training.generator(seed, "rotations", place.name), place.groups)


def _of_tap(
    weight: Tensor, means: Tensor, drawn: Tensor, thresholds: list[float]
) -> tuple[pd.DataFrame, dict[str, Tensor]]:
    """Statistics of a tap, a row for each basis (native, and drawn rotations (draws, D, D)), raw or centred, threshold;
    and of its native nodes, raw (or centred)/threshold -> (D, 7)."""
    rows, of_nodes = [], {}
    for basis, centred, fields in snp.native_and_rotated(weight, means, drawn):
        for threshold in thresholds:
            booleans = snp.boolean_matrices(fields, threshold)
            every = node_columns(booleans)
            rows.append({"basis": basis, "centred": centred, "threshold": threshold} | statistics(booleans, every))
            if basis == "native":
                of_nodes[f"{'centred' if centred else 'raw'}/{threshold:g}"] = every.float()
    return pd.DataFrame(rows), of_nodes


def _groups(network: nn.Module, places: list[Tap], images: Images, examples: int) -> list[list[Tap]]:
    """Taps whose features of so many images are held together: those of one encoder, as far as memory goes."""
    one = taps.features(network, places, images.x_train[:1], *images.statistics)
    number, groups = min(examples, len(images.x_train)), []
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
) -> tuple[dict[str, Tensor], list[dict]]:
    """Readouts of some taps, tap/variant -> (L, T, D), and how they were solved; from a checkpoint, if there is one."""
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=images.x_train.device, weights_only=True)
        return saved["weights"], saved["rows"]
    limit.before(f"the readouts of {', '.join(place.name for place in places)}")
    chosen, held = readout_images(run)
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
        choice = optimum.choose(
            data, unseen, y_held, log=lambda said, tap=place.name: run.log(f"{tap}: {said}"), beside=_first(run, seed)
        )
        found = {variant: one for variant in VARIANTS if (one := getattr(choice, variant)) is not None}
        for variant, one in found.items():
            weights[f"{place.name}/{variant}"] = one.weight.unflatten(1, own.shape[1:])
            answers = (unseen @ one.weight.T).argmax(dim=1)
            row = {"seed": seed, "network": kind, "encoder": place.encoder, "tap": place.kind, "name": place.name}
            row |= {"variant": variant, "l2": one.l2, "steps": one.steps, "gradient": one.gradient}
            row |= {"objective": one.objective}
            rows.append(row | {"held_out_accuracy": answers.eq(y_held).float().mean().item()})
        tried = ", ".join(f"{line['l2']:g}: {line['accuracy']:.1%}" for line in choice.tried)
        run.log(f"{place.name}: l2 {choice.best.l2:g} (held-out accuracy {tried})")
    with whole(checkpoint) as file:
        torch.save({"weights": weights, "rows": rows}, file)
    return weights, rows


def readout_images(run: Run) -> tuple[Tensor, Tensor]:
    """Training images, by index: those that a readout learns from, and the held-out ones that choose its penalty."""
    kept, held = held_out(run.images.y_train, run.settings.held_out)
    return kept[balanced(run.images.y_train[kept])[: examples(run)]], held


def _order(labels: Tensor, seed: int) -> Tensor:
    """A random order, to reassign labels to images."""
    return torch.randperm(len(labels), generator=training.generator(seed, "shuffled labels", len(labels)))


def fold_of(labels: Tensor) -> Tensor:
    """The fold of each image, so that every fold has as many of each label, or one more: (n,)."""
    order, rank, _ = ranked(labels)
    return torch.empty_like(labels).scatter_(0, order, rank % FOLDS)


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
    cell = (fold_of(y) % folds) * labels + y
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


def node_columns(booleans: Tensor) -> Tensor:
    """Every node of a tap: (D, L, L) bool -> (D, 7), the columns of `NODE_COLUMNS`."""
    found = snp.node_statistics(booleans)
    columns = [found.labels, found.clusters, found.internal, found.external, snp.own_noise(booleans)]
    return torch.cat([torch.stack(columns, dim=1), snp.mutual_confusions(booleans)], dim=1).double()


def statistics(booleans: Tensor, every: Tensor) -> dict[str, float]:
    """Statistics of a tap from those of its nodes (`node_columns`): those of `snp.TapStatistics`; mutual: mutual
    confusions of recognised labels over what row and column sums give; own_noise: share of noise in columns of own
    labels, 0..1; and of some the relative standard error if its nodes were drawn anew (snr_error, ...)."""
    labels, clusters, internal, external, own, mutual, expected = every.T
    summed = snp.NodeStatistics(labels, clusters, internal, external)
    found = asdict(snp.summarise(summed, booleans.shape[1]))
    found |= {"mutual": _quotient(mutual, expected), "own_noise": _quotient(own, internal + external)}
    for name, above, below in (
        ("snr", labels, internal + external),
        ("snr_external", labels, external),
        ("mutual", mutual, expected),
    ):
        shares = (part / part.sum() for part in (above, below))
        first, second = shares
        found[f"{name}_error"] = (first - second).square().sum().sqrt().item()
    return found


def _quotient(above: Tensor, below: Tensor) -> float:
    total = below.sum().item()
    return above.sum().item() / total if total else math.nan
