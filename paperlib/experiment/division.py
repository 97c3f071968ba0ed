"""Stages of a walk that ask, encoder by encoder, whether heads divide the labels among themselves, whether silencing
one costs its own labels, whether a head is expert among them, and whether single nodes do it (claim C5).

Which head owns a label is counted on held-out images; everything is scored on the test images, whole and without each
of ten folds. Rotated nodes, within heads, are the null of single ones: what they do as well, the head does.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import heads, macroscopic, snp, taps, training
from paperlib.data import BATCH, Images, held_out, normalise
from paperlib.experiment import measure
from paperlib.experiment.networks import load_network
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table
from paperlib.statistics import interval
from paperlib.taps import Tap

WHOLE = -1  # the fold of what is scored on all test images


def tables(run: Run) -> dict[str, pd.DataFrame]:
    """The tables of `specialisation` (trained, random and, for the first seed, shuffled labels: encoders, owners,
    heads), of `ablation` (ablation, drops) and of `cooperation` of the trained networks, all seeds."""
    seeds, found = run.settings.seeds, {}
    kinds = [(seed, kind) for kind in ("trained", "random") for seed in seeds] + [(seeds[0], "shuffled")]
    for name in ("encoders", "owners", "heads"):
        found[name] = pd.concat([specialisation(run, *part).table(name) for part in kinds], ignore_index=True)
    for name in ("ablation", "drops"):
        found[name] = pd.concat([ablation(run, seed).table(name) for seed in seeds], ignore_index=True)
    found["cooperation"] = pd.concat([cooperation(run, seed).table("cooperation") for seed in seeds], ignore_index=True)
    return found


def specialisation(run: Run, seed: int, kind: str) -> Stage:
    """Stage: how far the nodes of each head recognise labels that others' do not. kind as in `measure.readouts`.

    encoders.csv: seed, network, encoder, basis (native, rotated-0, ..), fold (-1: all test images), specialisation,
    chance and chance_error (mean and deviation over permutations of nodes), excess (nats), share (of the largest
    possible, ln H). owners.csv: seed, network, encoder, basis, label, owner (by held-out images,
    -1: none), count (its nodes that recognise the label), tied. heads.csv: whole heads as if each were one node: seed,
    network, encoder, head, centred, `snp.NodeStatistics`, owned (labels).
    """
    source, read = measure.nodes(run, seed, kind), measure.readouts(run, seed, kind)
    network, inputs = load_network(run, seed, "trained" if kind == "shuffled" else kind)
    s = run.settings

    def make(folder: Path) -> None:
        images = measure.prepared(run, seed, kind, network)
        places, means = _places(network), source.tensors("means")
        every = read.tensors("weights")
        weights = {place.name: every[f"{place.name}/best"] for place in places}
        on_device = {name: weight.to(images.x_test.device) for name, weight in weights.items()}
        sums, counts, _ = measure.class_sums(network, places, on_device, images.x_test, images.y_test, images)
        encoders, owners, whole = [], [], []
        for place in places:
            name, row = place.name, {"seed": seed, "network": kind, "encoder": place.encoder}
            by_fold, images_of = sums.pop(name).cpu(), counts.cpu()
            for basis, rotation in _bases(seed, place, weights[name].shape[2]):
                weight, held = (_rotated(part, rotation) for part in (weights[name], means[f"held/{name}"]))
                ties = training.generator(seed, "ties", name, basis)
                found = _owners(snp.field_matrices(weight, held), place.heads, s.threshold, ties)
                owners.append(found.assign(**row, basis=basis))
                for fold in range(WHOLE, measure.FOLDS):
                    kept = [number for number in range(measure.FOLDS) if number != fold]
                    mean = snp.means_of(by_fold[kept].sum(dim=0), images_of[kept].sum(dim=0))
                    fields = snp.field_matrices(weight, _rotated(mean, rotation))
                    generator = training.generator(seed, "head permutations", name, basis)
                    said = _specialised(fields, place.heads, s.threshold, s.permutations, generator)
                    encoders.append(row | {"basis": basis, "fold": fold} | said)
            fields = heads.head_matrices(snp.field_matrices(weights[name], means[name]), place.heads)
            owner = torch.tensor(owners[-1 - snp.ROTATIONS].owner.to_numpy())
            for centred, part in ((False, fields), (True, snp.split_offset(fields)[0])):
                columns = asdict(snp.node_statistics(snp.boolean_matrices(part, s.threshold)))
                owned = [(owner == head).sum().item() for head in range(place.heads)]
                columns = {column: values.tolist() for column, values in columns.items()} | {"owned": owned}
                whole.append(pd.DataFrame({**row, "head": range(place.heads), "centred": centred, **columns}))
        save_table(folder / "encoders.csv", encoders)
        save_table(folder / "owners.csv", pd.concat(owners))
        save_table(folder / "heads.csv", pd.concat(whole))

    config = run.config("threshold", "permutations") | {"seed": seed, "kind": kind}
    inputs |= {"nodes": source.sha256, "readouts": read.sha256}
    return run.stage(f"specialisation-{kind}-seed{seed}", config, inputs, make)


def answered(run: Run, seed: int, kind: str) -> Stage:
    """Stage: for how many nodes of each head an input of one label (row) makes another one (column) answer, in the
    first and last encoder. matrices: encoder -> (H, L, L) int16, of test images."""
    source, read = measure.nodes(run, seed, kind), measure.readouts(run, seed, kind)
    network, inputs = load_network(run, seed, kind)

    def make(folder: Path) -> None:
        weights, means, found = read.tensors("weights"), source.tensors("means"), {}
        for place in _ends(network):
            fields = snp.field_matrices(weights[f"{place.name}/best"], means[place.name])
            by_head = snp.boolean_matrices(fields, run.settings.threshold).unflatten(0, (place.heads, -1))
            found[str(place.encoder)] = by_head.sum(dim=1).short()
        save_arrays(folder / "matrices.npz", found)

    config = run.config("threshold") | {"seed": seed, "kind": kind}
    inputs |= {"nodes": source.sha256, "readouts": read.sha256}
    return run.stage(f"head-matrices-{kind}-seed{seed}", config, inputs, make)


def head_matrices(run: Run) -> pd.DataFrame:
    """The matrices of `answered` of the first seed, in the first and last encoder, and in the last one with random
    weights. Labels, as rows and as columns, are in the order of their owners (by held-out images), each head's by
    falling count: a row for each network, encoder, head and input label (owned: by this head), a column 0, 1, ... for
    each output label."""
    seed, parts = run.settings.seeds[0], []
    for kind, shown in (("trained", slice(None)), ("random", slice(-1, None))):
        owners = specialisation(run, seed, kind).table("owners").query("basis == 'native'")
        found = answered(run, seed, kind).arrays("matrices")
        for encoder in sorted(map(int, found))[shown]:
            own = owners[owners.encoder == encoder].sort_values("label")
            own = own.assign(last=own.owner < 0).sort_values(["last", "owner", "count"], ascending=[True, True, False])
            order = own.label.tolist()
            for head, matrix in enumerate(found[str(encoder)][:, order][:, :, order]):
                row = {"network": kind, "encoder": encoder, "head": head, "owned": (own.owner == head).to_numpy()}
                parts.append(pd.concat([pd.DataFrame(row), pd.DataFrame(matrix.numpy())], axis=1))
    return pd.concat(parts, ignore_index=True)


def ablation(run: Run, seed: int) -> Stage:
    """Stage: what silencing each head of the trained network costs the labels that it owns, and the others.

    ablation.csv: seed, encoder, owners (native, rotated-0, ..; best: by what silencing costs on held-out images;
    shuffled: of readouts of randomly reassigned labels, first seed), fold (-1: all test images), own_drop, other_drop
    (accuracy lost on own and other labels), gap (`heads.ablation_gap`: own labels beyond what heads and labels do by
    themselves; all in -1..1), chance and chance_error (mean and deviation of the gap with owners randomly reassigned
    among the labels that have one).
    drops.csv: seed, encoder, head, label, drop (accuracy lost on that label's test images). answers.npz: intact and
    held/intact (n,), ablated and held/ablated (E, H, n), bool.
    """
    network, inputs = load_network(run, seed, "trained")
    first = seed == run.settings.seeds[0]
    sources = {kind: specialisation(run, seed, kind) for kind in ("trained", *(["shuffled"] if first else []))}

    def make(folder: Path) -> None:
        images, answers = run.images.to(training.best_device()), {}
        _, held = held_out(run.images.y_train, run.settings.held_out)
        y, y_held = run.images.y_test, run.images.y_train[held]
        for prefix, x, labels in (("", images.x_test, y), ("held/", images.x_train[held], y_held)):
            answers[f"{prefix}intact"], answers[f"{prefix}ablated"] = _answers(network, x, labels, images)
        rows, drops = [], []
        for encoder, ablated in enumerate(answers["ablated"], start=1):
            row = {"seed": seed, "encoder": encoder}
            lost = answers["intact"].int() - ablated.int()
            by_label = heads.mean_by_label(lost.T.float(), y, len(run.images.classes))
            part = pd.DataFrame(by_label.numpy()).rename_axis("label").reset_index()
            drops.append(part.melt("label", var_name="head", value_name="drop").assign(**row))
            unseen = answers["held/intact"].int() - answers["held/ablated"][encoder - 1].int()
            cost = heads.mean_by_label(unseen.T.float(), y_held, len(run.images.classes)).T
            best = heads.interactions(cost, torch.zeros(cost.shape[1], dtype=torch.long)).argmax(dim=0)
            for name, owner in (*_owners_of(sources, encoder), ("best", best)):
                generator = training.generator(seed, "reassigned owners", encoder, name)
                own = owner[owner >= 0]
                order = torch.rand(run.settings.permutations, len(own), generator=generator).argsort(dim=1)
                dealt = heads.ablation_gap(heads.interactions(by_label.T, owner), own[order])
                chance = {"chance": dealt.mean().item(), "chance_error": dealt.std(correction=0).item()}
                for fold in range(WHOLE, measure.FOLDS):
                    kept = measure.fold_of(y) != fold
                    mine, other = heads.own_and_other_drops(lost[:, kept], y[kept], owner)
                    part = heads.mean_by_label(lost[:, kept].T.float(), y[kept], len(run.images.classes))
                    gap = heads.ablation_gap(heads.interactions(part.T, owner), own).item()
                    said = {"own_drop": mine, "other_drop": other, "gap": gap}
                    rows.append(row | {"owners": name, "fold": fold} | said | chance)
        save_table(folder / "ablation.csv", rows)
        save_table(folder / "drops.csv", pd.concat(drops))
        save_arrays(folder / "answers.npz", answers)

    config = run.config("permutations", "held_out") | {"seed": seed, "first": first}
    inputs |= {kind: source.sha256 for kind, source in sources.items()}
    return run.stage(f"ablation-seed{seed}", config, inputs, make)


def silenced(found: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """What silencing each head costs the labels of each owner, from `tables`: seed, encoder, head, owner (of native
    nodes), labels, drop (accuracy lost, mean over these labels)."""
    owners = found["owners"].query("network == 'trained' and basis == 'native' and owner >= 0")
    both = found["drops"].merge(owners[["seed", "encoder", "label", "owner"]], on=["seed", "encoder", "label"])
    means = both.groupby(["seed", "encoder", "head", "owner"])["drop"].agg(["size", "mean"])
    return means.reset_index().rename(columns={"size": "labels", "mean": "drop"})


def stability(run: Run, owners: pd.DataFrame) -> pd.DataFrame:
    """Do other seeds divide the labels alike? From the table of owners, one row for each encoder and pair of seeds: the
    share of labels that the best matching of heads gives to the same head, and its mean and 97.5 % quantile over
    randomly reassigned labels; none for one seed."""
    rows, native = [], owners.query("network == 'trained' and basis == 'native'")
    for encoder, part in native.groupby("encoder"):
        by_seed = part.pivot(index="seed", columns="label", values="owner")
        for first, second in itertools.combinations(by_seed.index, 2):
            pair = (torch.tensor(by_seed.loc[seed].to_numpy()) for seed in (first, second))
            generator = training.generator(int(first), "matched heads", int(second), encoder)
            overlap, dealt = heads.matched_overlap(*pair, run.settings.permutations, generator)
            row = {"encoder": encoder, "seeds": f"{first}-{second}", "overlap": overlap}
            rows.append(row | {"chance": dealt.mean().item(), "chance_high": interval(dealt)[1]})
    return pd.DataFrame(rows, columns=["encoder", "seeds", "overlap", "chance", "chance_high"])


def cooperation(run: Run, seed: int) -> Stage:
    """Stage: how well sets of a head's nodes recognise the head's own labels, against as many nodes of heads that are
    put together at random and own labels by the same count, and against as many rotated nodes of the head.

    cooperation.csv: seed, encoder, nodes (head, dealt, rotated), draw, fold (-1: all test images; others for
    whole heads and sets of `heads.FEW` only), size, whole (all nodes of a head; with more, all of the encoder), and the
    columns of `heads.cooperation_table`: `choice`, the share of the owner's other labels that get a smaller field than
    the image's own, is what says that a head is expert: 0.5 by chance, and blind to a shift of all answers towards its
    labels.
    """
    source, read = measure.nodes(run, seed, "trained"), measure.readouts(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")
    s = run.settings

    def make(folder: Path) -> None:
        images, places, parts = run.images.to(training.best_device()), _places(network), []
        held, weights = source.tensors("means"), read.tensors("weights")
        fold = measure.fold_of(images.y_test)
        for place in places:  # one at a time: 2,100 sets answer every image
            weight = weights[f"{place.name}/best"]
            fields = snp.field_matrices(weight, held[f"held/{place.name}"])
            recognised = snp.diagonal_labels(snp.boolean_matrices(fields, s.threshold))
            sets, own = heads.sets_and_labels(recognised, place.heads, training.generator(seed, "sets", place.name))
            rotation = dict(_bases(seed, place, weight.shape[2]))["rotated-0"]
            activations = taps.features(network, [place], images.x_test, *images.statistics)[place.name]
            measured = [
                _scored(activations[fold == number], images.y_test[fold == number], weight, rotation, sets, own)
                for number in range(measure.FOLDS)
            ]
            row = {"seed": seed, "encoder": place.encoder}
            for left_out in range(WHOLE, measure.FOLDS):
                kept = [part for number, part in enumerate(measured) if number != left_out]
                for table in _cooperating(sets, own, kept, place.heads):
                    judged = table.whole | ((table["size"] == heads.FEW) & (table.nodes != "dealt"))
                    table = table if left_out == WHOLE else table[judged]
                    parts.append(table.assign(**row, fold=left_out))
        save_table(folder / "cooperation.csv", pd.concat(parts))

    config = run.config("threshold") | {"seed": seed, "sets": [heads.OWN_ORDERS, heads.DEALINGS]}
    inputs |= {"nodes": source.sha256, "readouts": read.sha256}
    return run.stage(f"cooperation-trained-seed{seed}", config, inputs, make)


def _places(network: nn.Module) -> list[Tap]:
    """Where the heads of each encoder lie side by side."""
    return taps.places(network, ["attn"])


def _ends(network: nn.Module) -> list[Tap]:
    """The same, of the first and last encoder."""
    places = _places(network)
    return [place for place in places if place.encoder in (1, len(places))]


def _bases(seed: int, place: Tap, nodes: int) -> Iterator[tuple[str, Tensor | None]]:
    """native, and the rotations within heads that `measure.nodes` takes."""
    yield "native", None
    for number, rotation in enumerate(measure.rotations(seed, place, nodes)):
        yield f"rotated-{number}", rotation


def _rotated(values: Tensor, rotation: Tensor | None) -> Tensor:
    return values if rotation is None else snp.rotated(values, rotation)


def _owners(fields: Tensor, num_heads: int, threshold: float, ties: torch.Generator) -> pd.DataFrame:
    """label, owner, count, tied: which head has most nodes that recognise a label."""
    counts = heads.cooperation_counts(snp.boolean_matrices(fields, threshold), num_heads)
    owned = heads.assign_labels(counts, ties)
    columns = {"owner": owned.owner, "count": counts.amax(dim=0), "tied": owned.tied}
    return pd.DataFrame({"label": range(counts.shape[1])} | {name: part.numpy() for name, part in columns.items()})


def _specialised(
    fields: Tensor, num_heads: int, threshold: float, permutations: int, generator: torch.Generator
) -> dict[str, float]:
    diagonal = snp.diagonal_labels(snp.boolean_matrices(fields, threshold))
    value = heads.specialisation(heads.counts_of(diagonal, num_heads)).item()
    null = heads.permutation_null(diagonal, num_heads, permutations, generator)
    excess = value - null.mean().item()
    return {
        "specialisation": value,
        "chance": null.mean().item(),
        "chance_error": null.std().item(),
        "excess": excess,
        "share": excess / math.log(num_heads) if num_heads > 1 else math.nan,
    }


def _answers(network: nn.Module, x: Tensor, labels: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """Which images the network answers correctly, (n,), and with each head silent, (E, H, n)."""
    intact, ablated = [], []
    for batch in x.split(BATCH):
        batch = normalise(batch, *images.statistics)
        with torch.no_grad():
            intact.append(network(batch).argmax(dim=1).cpu())
        ablated.append(heads.ablation_logits(network, batch).argmax(dim=3).cpu())
    return torch.cat(intact) == labels, torch.cat(ablated, dim=2) == labels


def _owners_of(sources: dict[str, Stage], encoder: int) -> Iterator[tuple[str, Tensor]]:
    """Owners (L,) of one encoder by every basis of the trained network, and by readouts of reassigned labels."""
    for kind, source in sources.items():
        table = source.table("owners")
        for basis, part in table[table.encoder == encoder].groupby("basis"):
            if kind == "trained" or basis == "native":
                owner = part.sort_values("label").owner.to_numpy()
                yield basis if kind == "trained" else kind, torch.tensor(owner)


def _scored(
    activations: Tensor, y: Tensor, weight: Tensor, rotation: Tensor, sets: Tensor, own: Tensor
) -> dict[str, Tensor]:
    """Over some images (n, T, D), (n,), sums per label of right answers and choices of native sets (G, H, sizes, D),
    and of rotated ones (the first `heads.OWN_ORDERS`), of right answers of single nodes, and images per label."""
    weight, sets, own, rotation = (part.to(activations.device) for part in (weight, sets, own, rotation))
    bases = {"": (weight, None, sets, own)}
    first = slice(heads.OWN_ORDERS)
    bases["rotated "] = (snp.rotated(weight, rotation), rotation, sets[first], own[first])
    found = {"images": y.bincount(minlength=len(weight))}
    for batch, labels in zip(activations.split(BATCH), y.split(BATCH), strict=True):
        for name, (readout, turn, some, mine) in bases.items():
            fields = macroscopic.node_fields(_rotated(batch, turn), readout)
            answers = (some.flatten(0, 2).to(fields) @ fields.flatten(1)).unflatten(1, fields.shape[1:])
            whose = mine[:, :, None].expand(*some.shape[:3], -1).flatten(0, 2)
            for what, part in (
                ("right", heads.right_answers_per_label(answers, labels)),
                ("choice", heads.choices_per_label(answers, labels, whose)),
                ("alone", heads.right_answers_per_label(fields, labels)),
            ):
                found[name + what] = found.get(name + what, 0) + part
    return {name: part.cpu() for name, part in found.items()}


def _cooperating(
    sets: Tensor, own: Tensor, measured: list[dict[str, Tensor]], num_heads: int
) -> Iterator[pd.DataFrame]:
    """Tables of native and of rotated sets, from the sums over some folds."""
    total = {name: sum(part[name] for part in measured) for name in measured[0]}
    for basis, kept in (("", slice(None)), ("rotated ", slice(heads.OWN_ORDERS))):
        shares = (total[basis + what] / total["images"] for what in ("right", "choice", "alone"))
        table = heads.cooperation_table(sets[kept], own[kept], *shares)
        table["whole"] = table["size"] == sets.shape[3] // num_heads
        yield table if not basis else table.assign(nodes="rotated")
