"""Stages of a walk that measure nodes: readouts, matrices, SNR along the encoders, accuracy of sets of nodes."""

from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paperlib import andc, figures, macroscopic, readouts, snp, taps, training
from paperlib.data import Images, held_out
from paperlib.data.superclasses import superclasses
from paperlib.experiment.networks import (
    ARCHITECTURE,
    CALIBRATED,
    NETWORKS,
    calibration_images,
    cnn_half,
    kinds,
    load_network,
    refresh_statistics,
)
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table, save_tensors
from paperlib.statistics import interval

ORDERS = 20  # orders of the labels in which clusters are searched, to see that it matters little
SUBSETS = 20  # random subsets of nodes of each size
READOUT = (
    "held_out", "shift", "flip", "precision", "max_steps", "readout_epochs", "readout_batch_size", "readout_lr",
    "readout_l2",
)  # fmt: skip


GROUP_L2 = 1e-3  # the penalty in the group's code, on activations that are not scaled


def readout(run: Run, seed: int, kind: str) -> Stage:
    """Stage: the readouts of one network, trained on the kept training images, and what one pass over the test images
    and one over the held-out images give. kind is one of `networks.kinds`, or `shuffled`: the trained network with its
    readouts trained on randomly reassigned labels.

    weights: tap -> readout (L, T, D); fields_test, fields_held_out (of `_unseen_taps`): tap -> field matrices
    (D, L, L); correct: tap -> (n_test,) bool and heads/tap -> (n_test, H) bool.
    """
    s = run.settings
    network, inputs = load_network(run, seed, kind)
    once = s.taps_once if seed == s.seeds[0] and kind in NETWORKS else ()
    unseen = _unseen_taps(run, seed, network) if kind == "trained" else []
    all_taps = list(dict.fromkeys((*s.taps, *once, *unseen)))

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        places = taps.places(network, all_taps)
        if kind == CALIBRATED:
            refresh_statistics(network, calibration_images(run, seed, images), images)
        weights = trained_readouts(run, network, places, images, seed, folder, kind == "shuffled")
        test = readouts.measure(network, places, weights, images.x_test, images.y_test, *images.statistics)
        correct = test.correct | {f"heads/{name}": value for name, value in test.head_correct.items()}
        save_tensors(folder / "weights.safetensors", weights)
        save_tensors(folder / "fields_test.safetensors", fields_of(weights, test))
        save_arrays(folder / "correct.npz", correct)
        if kind == "trained":
            places = [place for place in places if place.kind in unseen]
            weights = {place.name: weights[place.name] for place in places}
            fields = held_out_fields(run, network, places, weights, images)
            save_tensors(folder / "fields_held_out.safetensors", fields)

    # "deciding" is what stored stages call the taps that are looked at on held-out images
    config = run.config(*ARCHITECTURE, *READOUT) | {"seed": seed, "kind": kind}
    config |= {"all_taps": all_taps, "deciding": unseen}
    return run.stage(f"readouts-{kind}-seed{seed}", config, inputs, make)


def matrices(run: Run, seed: int, kind: str) -> Stage:
    """Stage: Boolean matrices of one network's nodes at the main threshold, for the taps that are measured for every
    seed. matrices: tap -> (D, L, L) bool."""
    source = readout(run, seed, kind)

    def make(folder: Path) -> None:
        found = {
            tap: snp.boolean_matrices(fields, run.settings.threshold)
            for tap, fields in source.tensors("fields_test").items()
            if tap.split(".")[1] in run.settings.taps
        }
        save_arrays(folder / "matrices.npz", found)

    config = run.config("threshold", "taps")
    return run.stage(f"matrices-{kind}-seed{seed}", config, {"readouts": source.sha256}, make)


def trained_readouts(
    run: Run, network, places, images: Images, seed: int, folder: Path | None = None, shuffled=False, penalty=None,
    lengths=(),
):  # fmt: skip
    """Readouts of some taps, trained on the kept training images as the settings say; checkpoints go to the folder."""
    s = run.settings
    kept, _ = held_out(run.images.y_train, s.held_out)
    x, y = images.x_train[kept], images.y_train[kept]
    if shuffled:
        y = y[torch.randperm(len(y), generator=training.generator(seed, "shuffled labels")).to(y.device)]
    own = {name: getattr(s, f"readout_{name}") for name in ("batch_size", "lr", "l2")}
    how = {"epochs": s.readout_epochs, **own, **run.config("shift", "flip", "precision", "max_steps")}
    how = readouts.ReadoutRecipe(**how)
    labels = len(images.classes)
    checkpoint = folder / "readouts.pt" if folder else None
    return readouts.train_readouts(
        network, places, x, y, labels, *images.statistics, how, seed, run.log, penalty, checkpoint, lengths
    )


def accuracy_and_snr(run: Run, network, places, weights: dict[str, Tensor], images: Images) -> pd.DataFrame:
    """encoder, tap, accuracy (0..1), snr and snr_centred (main threshold), offset_share, over the test images."""
    found = readouts.measure(network, places, weights, images.x_test, images.y_test, *images.statistics)
    rows = []
    for place in places:
        fields = snp.field_matrices(weights[place.name], found.class_means[place.name])
        centred, share = snp.split_offset(fields)
        raw, without = (
            snp.tap_statistics(snp.boolean_matrices(part, run.settings.threshold)).snr for part in (fields, centred)
        )
        row = {"encoder": place.encoder, "tap": place.kind}
        row |= {"accuracy": found.correct[place.name].float().mean().item(), "snr": raw}
        rows.append(row | {"snr_centred": without, "offset_share": share.mean().item()})
    return pd.DataFrame(rows)


def penalties(run: Run) -> pd.DataFrame:
    """Stage for the first seed: what the readouts' L2 penalty and their convergence do to accuracy and SNR.

    network, encoder (or a CNN's layer; first, middle, last), tap, l2 (a number, or `code` for the group's on unscaled
    activations), epochs (penalty_epochs and half of it), accuracy (0..1), snr, snr_centred, offset_share.
    """
    seed = run.settings.seeds[0]
    return pd.concat([_penalties(run, seed, kind).table("penalties") for kind in NETWORKS], ignore_index=True)


def _penalties(run: Run, seed: int, kind: str) -> Stage:
    network, inputs = load_network(run, seed, kind)
    s = run.settings
    values = [f"{value:g}" for value in sorted({*s.penalties, s.readout_l2})] + ["code"]

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        chosen = taps.places_first_middle_last(network, s.penalty_taps)
        # One more tap for each penalty: it records what its twin records, and its readout trains in the same passes.
        places = [replace(tap, kind=f"{tap.kind}@{value}", heads=0) for tap in chosen for value in values]

        def penalty(name: str, scale: float) -> float:
            value = name.partition("@")[2]
            return GROUP_L2 / scale**2 if value == "code" else float(value)

        lengths = (s.penalty_epochs // 2, s.penalty_epochs)
        weights = trained_readouts(run, network, places, images, seed, folder, penalty=penalty, lengths=lengths)
        parts = []
        for epochs in lengths:  # one after the other: class means take as much memory as weights
            twins = [replace(place, kind=f"{place.kind}@{epochs}") for place in places]
            part = {place.name: weights.pop(place.name) for place in twins}
            parts.append(accuracy_and_snr(run, network, twins, part, images))
        table = pd.concat(parts)
        table[["tap", "l2", "epochs"]] = table.pop("tap").str.split("@").tolist()
        columns = ["network", "encoder", "tap", "l2", "epochs", "accuracy", "snr", "snr_centred", "offset_share"]
        save_table(folder / "penalties.csv", table.assign(network=kind)[columns])

    config = run.config(*ARCHITECTURE, *READOUT, "penalty_taps", "penalty_epochs", "threshold")
    config |= {"seed": seed, "kind": kind, "penalties": values}
    return run.stage(f"penalties-{kind}-seed{seed}", config, inputs, make)


def fields_of(weights: dict[str, Tensor], measured: readouts.Measured) -> dict[str, Tensor]:
    return {tap: snp.field_matrices(weights[tap], means) for tap, means in measured.class_means.items()}


def held_out_fields(run: Run, network, places, weights: dict[str, Tensor], images: Images) -> dict[str, Tensor]:
    """Field matrices over the held-out training images."""
    _, held = held_out(run.images.y_train, run.settings.held_out)
    x, y = images.x_train[held], images.y_train[held]
    return fields_of(weights, readouts.measure(network, places, weights, x, y, *images.statistics))


def moved_by_more_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """Largest change over encoders of accuracy and SNR when the readouts train twice as long (`penalties`)."""
    keys = ["network", "tap", "l2"]
    wide = table.astype({"l2": str}).pivot_table(index=[*keys, "encoder"], columns="epochs", values=["accuracy", "snr"])
    first, last = (wide.xs(epochs, axis=1, level=1) for epochs in sorted(table.epochs.unique()))
    return (last - first).abs().groupby(keys).max().round(3)


def snr(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Stage for every network: (statistics of each tap at each threshold, statistics of each node at the main one).
    For the first seed there is another network, `shuffled` (see `readout`).

    First table: seed, network, encoder, tap, threshold, centred, accuracy (0..1) and the fields of `snp.TapStatistics`;
    with offset_share where centred is False. Second: seed, network, encoder, tap, node, labels, clusters, internal,
    external, offset_share.
    """
    seeds = run.settings.seeds
    networks = [(seed, kind) for seed in seeds for kind in kinds(run)] + [(seeds[0], "shuffled")]
    found = [_snr(run, seed, kind, readout(run, seed, kind)) for seed, kind in networks]
    return tuple(pd.concat([one.table(name) for one in found], ignore_index=True) for name in ("taps", "nodes"))


def _snr(run: Run, seed: int, kind: str, source: Stage) -> Stage:
    def make(folder: Path) -> None:
        measured, correct = source.tensors("fields_test"), source.arrays("correct")
        tap_rows, node_rows = [], []
        for tap, fields in sorted(measured.items()):
            encoder, name = tap.split(".")
            row = {"seed": seed, "network": kind, "encoder": int(encoder), "tap": name}
            centred, share = snp.split_offset(fields)
            row_values = {"accuracy": correct[tap].float().mean().item(), "offset_share": share.mean().item()}
            for threshold in sorted({run.settings.threshold, *run.settings.threshold_sweep}):
                for is_centred, matrices in ((False, fields), (True, centred)):
                    nodes = snp.node_statistics(snp.boolean_matrices(matrices, threshold))
                    statistics = asdict(snp.summarise(nodes, matrices.shape[1]))
                    tap_rows.append({**row, "threshold": threshold, "centred": is_centred, **row_values, **statistics})
                    if threshold == run.settings.threshold and not is_centred:
                        columns = {key: getattr(nodes, key).tolist() for key in nodes.__dataclass_fields__}
                        node_rows.append(
                            pd.DataFrame({**row, "node": range(len(share)), **columns, "offset_share": share.tolist()})
                        )
        save_table(folder / "taps.csv", tap_rows)
        save_table(folder / "nodes.csv", pd.concat(node_rows))

    config = run.config("threshold", "threshold_sweep")
    return run.stage(f"snr-{kind}-seed{seed}", config, {"readouts": source.sha256}, make)


TAP_COLUMNS = [
    "accuracy", "snr", "snr_external", "signal", "noise", "clusters_per_node", "pooled_cluster_size", "labels_per_node",
    "offset_share", "internal_noise", "external_noise",
]  # fmt: skip


def after_the_last_encoder(taps: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Why might the last encoder differ from the one before? `block` of both, and what follows it: its LayerNorm
    (`norm`), the normalised tokens as SeqPool weighs them (`weighed`), and readouts that see one vector an image, the
    network's own weighed sum (`seqpool`) and the mean (`pooled`), whose matrices have rank 1. First seed, both
    networks; without `taps_once` there is `block` only."""
    last = taps.encoder.max()
    after = taps.tap.isin(("norm", "weighed", "seqpool", "pooled")) & (taps.encoder == last)
    shown = taps[after | ((taps.tap == "block") & (taps.encoder >= last - 1))]
    shown = shown[(shown.seed == taps.seed.iloc[0]) & shown.network.isin(NETWORKS)]
    return summary_of_taps(shown, threshold)[["accuracy", "snr", "snr_centred", "offset_share", "labels_per_node"]]


def summary_of_taps(taps: pd.DataFrame, threshold: float) -> pd.DataFrame:
    """Mean over seeds at one threshold: one row per network, tap and encoder, raw statistics and the centred SNR."""
    keys = ["network", "tap", "encoder"]
    at = taps[taps.threshold == threshold]
    raw = at[~at.centred].groupby(keys)[TAP_COLUMNS].mean()
    return raw.assign(snr_centred=at[at.centred].groupby(keys).snr.mean()).round(3)


def example_node(run: Run, seed: int, kind: str) -> tuple[Figure, pd.DataFrame]:
    """A figure of one node of the last encoder, the one whose number of labels is nearest to the tap's median among
    those with a cluster of two or more, and its field matrix as a table."""
    found = examples(run, seed, kind)
    chosen = found.table("examples").query("which == 'typical'").iloc[-1]
    field = found.arrays("fields")[f"{chosen.encoder}/typical"]
    boolean = snp.boolean_matrices(field[None], run.settings.threshold)[0]
    place = f"encoder {chosen.encoder}, {kind}, node {chosen.node}, seed {seed}"
    clusters = snp.label_clusters(boolean)
    return figures.node_matrix(field, boolean, clusters, run.images, place), pd.DataFrame(field.numpy())


def node_gallery(run: Run, seed: int, kind: str) -> tuple[Figure, pd.DataFrame]:
    """A figure of typical and extreme nodes of the first, middle and last encoder, and which nodes they are."""
    found = examples(run, seed, kind)
    table, fields, panels = found.table("examples"), found.arrays("fields"), {}
    for row in table.itertuples():
        field = fields[f"{row.encoder}/{row.which}"]
        boolean = snp.boolean_matrices(field[None], run.settings.threshold)[0]
        panels[f"encoder {row.encoder}", row.which] = (field, snp.label_clusters(boolean))
    return figures.node_gallery(panels, run.images.classes, run.images.name, f"{kind}, seed {seed}"), table


def examples(run: Run, seed: int, kind: str) -> Stage:
    """Stage: typical and extreme nodes of one kind of tap at the first, middle and last encoder, trained network.
    examples.csv: which nodes; fields: encoder/which -> (L, L)."""
    source = readout(run, seed, "trained")

    def make(folder: Path) -> None:
        fields, rows, kept = source.tensors("fields_test"), [], {}
        found = {taps.encoder_of(tap): tap for tap in fields if tap.endswith(f".{kind}")}
        for encoder in taps.first_middle_last(len(found)):
            along = fields[found[encoder]]
            nodes = snp.node_statistics(snp.boolean_matrices(along, run.settings.threshold))
            for what, node in snp.chosen_nodes(nodes).items():
                kept[f"{encoder}/{what}"] = along[node].clone()
                numbers = {name: int(getattr(nodes, name)[node]) for name in nodes.__dataclass_fields__}
                rows.append({"encoder": encoder, "tap": kind, "which": what, "node": node, **numbers})
        save_arrays(folder / "fields.npz", kept)
        save_table(folder / "examples.csv", rows)

    return run.stage(f"examples-{kind}-seed{seed}", run.config("threshold"), {"readouts": source.sha256}, make)


def driving_images(run: Run, seed: int) -> Stage:
    """Stage: which test images drive a node, those with the largest field of the node alone for any label. images: tap
    -> (D, 4) int64, the strongest first."""
    source = readout(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        places, weights = taps.places(network, run.settings.taps), source.tensors("weights")
        weights = {place.name: weights[place.name].to(images.x_test.device) for place in places}
        strength: dict[str, list[Tensor]] = {place.name: [] for place in places}
        for batch, _ in macroscopic.labelled_batches(network, places, images.x_test, images.y_test, images):
            for name, parts in strength.items():
                parts.append(macroscopic.node_fields(batch[name], weights[name]).amax(dim=2))
        most = min(4, len(images.y_test))
        found = {name: torch.cat(parts, dim=1).topk(most).indices for name, parts in strength.items()}
        save_arrays(folder / "images.npz", found)

    config = run.config("taps") | {"seed": seed}
    return run.stage(f"driving-images-seed{seed}", config, inputs | {"readouts": source.sha256}, make)


def cluster_pairs(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which labels share clusters in the last encoder's `block`, first seed: (the ten pairs with most nodes, summary).

    First table: label, other, nodes, same_superclass (CIFAR-100 only). Second: share of clustered pairs in one
    superclass with the 95 % range and largest value over permuted label names, and what the order of labels does.
    """
    found = matrices(run, run.settings.seeds[0], "trained").arrays("matrices")
    *_, booleans = (found[tap] for tap in sorted(found, key=taps.encoder_of) if tap.endswith(".block"))
    classes = run.images.classes
    pairs, groups = snp.clustered_pairs(booleans), superclasses(classes)
    top = pairs.triu().flatten().topk(min(10, pairs.numel())).indices
    top = top[pairs.flatten()[top] > 0]
    rows = [{"label": classes[i // len(classes)], "other": classes[i % len(classes)]} for i in top.tolist()]
    table = pd.DataFrame(rows).assign(nodes=pairs.flatten()[top].tolist())
    generator = training.generator(0, "label permutations")
    summary = {}
    if groups is not None:
        table["same_superclass"] = (groups[top // len(classes)] == groups[top % len(classes)]).tolist()
        orders = (torch.randperm(len(groups), generator=generator) for _ in range(run.settings.permutations))
        dealt = [snp.share_within(pairs, groups[order]) for order in orders]
        low, high = interval(dealt)
        summary |= {"share of pairs in one superclass": snp.share_within(pairs, groups)}
        summary |= {"permuted names, 2.5 %": low, "permuted names, 97.5 %": high, "permuted names, largest": max(dealt)}
    clusters, sizes = snp.order_spread(booleans, ORDERS, generator)
    for name, values in (("clusters per node", clusters), ("pooled cluster size", sizes)):
        summary |= {
            f"{name}, mean over {ORDERS} label orders": values.mean().item(),
            f"{name}, deviation": values.std().item(),
        }
    return table, pd.DataFrame(summary.items(), columns=["", "value"]).set_index("").round(4)


def correct_answers(run: Run) -> dict[tuple[int, str, str], Tensor]:
    """(seed, network, tap name) -> (n_test,) bool: which test images the tap's readout gets right."""
    return {
        (seed, kind, tap): values
        for seed in run.settings.seeds
        for kind in kinds(run)
        for tap, values in readout(run, seed, kind).arrays("correct").items()
        if not tap.startswith("heads/")
    }


def macroscopic_accuracies(run: Run) -> pd.DataFrame:
    """Stage for every seed: accuracy of random subsets of an encoder's `block` nodes, predicted and measured.

    seed, encoder, size (nodes), draw, predicted, measured (on the test images), only_size (mean measured accuracy of
    as many nodes of encoder 1), all in 0..1. The prediction sees held-out training images, and of the test images how
    many each label has.
    """
    return pd.concat([_macroscopic(run, seed).table("macroscopic") for seed in run.settings.seeds], ignore_index=True)


def _macroscopic(run: Run, seed: int) -> Stage:
    source = readout(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        _, held = held_out(run.images.y_train, run.settings.held_out)
        unseen, y_unseen = images.x_train[held], images.y_train[held]
        shares = images.y_test.bincount() / len(images.y_test)
        places = taps.cct_taps(network, ["block"])
        read = source.tensors("weights")
        weights = {place.name: read[place.name].to(shares.device) for place in places}
        nodes = next(iter(weights.values())).shape[2]
        sizes = sorted({*(4**power for power in range(6) if 4**power < nodes), nodes})
        subsets = {
            place.name: macroscopic.random_subsets(
                nodes, sizes, SUBSETS, training.generator(seed, "subsets", place.name)
            ).to(shares.device)
            for place in places
        }
        batches = macroscopic.labelled_batches(network, places, unseen, y_unseen, images)
        moments = macroscopic.moments(batches, weights)
        measured = macroscopic.subset_accuracies(
            network, places, images.x_test, images.y_test, images, weights, subsets
        )
        everything = {places[0].name: subsets[places[0].name][-1:]}
        right = macroscopic.subset_accuracies(network, places[:1], unseen, y_unseen, images, weights, everything)
        rows, factor, only_size = [], None, None
        for place in places:
            chosen = subsets[place.name].float()
            summed = [(chosen @ part.flatten(1)).unflatten(1, part.shape[1:]) for part in moments[place.name]]
            if factor is None:  # fitted once, at encoder 1, on the images that gave the moments
                own = y_unseen.bincount() / len(y_unseen)
                factor = macroscopic.correlation_factor(summed[0][-1], summed[1][-1], own, right[place.name].item())
            predicted = macroscopic.predicted_accuracy(summed[0], factor * summed[1], shares)
            row = {"seed": seed, "encoder": place.encoder, "factor": factor}
            part = pd.DataFrame({**row, "size": torch.tensor(sizes).repeat_interleave(SUBSETS)})
            part["draw"] = list(range(SUBSETS)) * len(sizes)
            part["predicted"], part["measured"] = predicted.numpy(force=True), measured[place.name].numpy(force=True)
            part = part[(part["size"] < nodes) | (part.draw == 0)]  # there is one set of all nodes
            only_size = part.groupby("size").measured.mean() if only_size is None else only_size
            rows.append(part.assign(only_size=part["size"].map(only_size)))
        save_table(folder / "macroscopic.csv", pd.concat(rows))

    config = run.config("held_out") | {"seed": seed, "subsets": SUBSETS}
    return run.stage(f"macroscopic-seed{seed}", config, inputs | {"readouts": source.sha256}, make)


def both_halves(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """The CCT's `block` and the CNN's `conv` side by side: (tap statistics, node statistics, right answers) of `snr`
    and `correct_answers`, with the columns half (cct, cnn) and depth (0 first to 1 last encoder or layer); right
    answers are keyed by half."""
    tap_parts, node_parts, correct = [], [], {}
    for name, half, kind in (("cct", run, "block"), ("cnn", cnn_half(run), "conv")):
        for table, parts in zip(snr(half), (tap_parts, node_parts), strict=True):
            part = table[table.tap == kind]
            depth = (part.encoder - 1) / max(1, part.encoder.max() - 1)
            parts.append(part.assign(half=name, depth=depth))
        correct[name] = correct_answers(half)
    return pd.concat(tap_parts, ignore_index=True), pd.concat(node_parts, ignore_index=True), correct


def pruned_layers(run: Run, seed: int) -> list[str]:
    """What is pruned: a CNN's filters; a CCT's FF layers and classifier, and for the first seed its attention."""
    if run.settings.model.startswith("vgg"):
        return ["filters"]
    attention = run.settings.prune_attention and seed == run.settings.seeds[0]
    return ["ff", "classifier", *(["attention"] if attention else [])]


def _unseen_taps(run: Run, seed: int, network: nn.Module) -> list[str]:
    """Kinds of the taps whose nodes decide something that the test images score, so that they are looked at on held-out
    images: ANDC masks (but for the classifier's, see `pruned.classifier_sets`), and which labels a head owns."""
    inner = [layers for layers in pruned_layers(run, seed) if layers != "classifier"]
    pairs = [pair for layers in inner for pair in andc.connections(network, layers).values()]
    deciding = {end.split(".")[1] for pair in pairs for end in pair}
    return sorted(deciding | ({"attn"} & {*run.settings.taps}))
