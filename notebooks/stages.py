"""The stages of a walk: one profile's settings -> trained networks -> readouts -> tables.

Each function takes a run, computes what is missing (see `runs.Run.stage`) and returns tidy tables, one row per
seed x network x encoder x tap x variant. Raise a stage's version when the meaning of its artefact changes.
"""

import copy
import itertools
import json
import math
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from parameters import check_data, check_references, reference_name
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from verdicts import MASKS, interval

from paperlib import andc, distributed, figures, heads, macroscopic, models, readouts, snp, taps, training
from paperlib.data import Images, held_out, limit, normalise
from paperlib.models import reference
from paperlib.runs import Artefact, Run, save_arrays, save_table, save_tensors, write_text

NETWORKS = ("trained", "random")  # the network, and its null: the same one with freshly drawn weights
# CIFAR-100's own superclasses, five labels each
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip
bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television
bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf
bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman
crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""
ORDERS = 20  # orders of the labels in which clusters are searched, to see that it matters little
SUBSETS = 20  # random subsets of nodes of each size
# Settings that decide an artefact, and so are part of its key
ARCHITECTURE = (
    "data", "image_size", "limit", "model", "heads", "positional_embedding", "attention_dropout", "stochastic_depth",
)  # fmt: skip
TRAINING = tuple(training.Recipe.__dataclass_fields__)
READOUT = (
    "held_out", "shift", "flip", "precision", "max_steps", "readout_epochs", "readout_batch_size", "readout_lr",
    "readout_l2",
)  # fmt: skip
GROUP_L2 = 1e-3  # the penalty in the group's code, on activations that are not scaled
DRAWN = ("random", "permuted")  # controls of which there are several draws
PRUNING = ("held_out", "prune_draws", "retrain_epochs", "retrain_lr")


def recipe(run: Run) -> training.Recipe:
    return training.Recipe(**run.config(*TRAINING))


def build_network(run: Run, seed: int) -> nn.Module:
    """The run's network with weights freshly drawn from the seed, on the best device."""
    s = run.settings
    with training.seeded(seed, "weights"):
        options = run.config("image_size", "positional_embedding", "attention_dropout", "stochastic_depth")
        network = models.build(s.model, len(run.images.classes), heads=s.heads or None, **options)
    return network.to(training.best_device(), memory_format=torch.channels_last)


def cnn_half(run: Run) -> Run:
    """The same walk with the CNN in the CCT's place; ValueError if committed networks do not fit it."""
    s = run.settings
    changes = {"model": s.cnn, "epochs": s.cnn_epochs, "lr": s.cnn_lr, "optimizer": "adamw", "token_share": 1.0}
    changes |= {"taps": ["conv"], "taps_once": [], "penalty_taps": ["conv"], "prune_once": []}
    half = replace(run, settings=s.model_copy(update=changes), prefix="cnn-")
    if s.weights == "reference":
        check_references(half.settings)
        check_data(half.settings, reference.card(reference_name(s, s.seeds[0]))["data_sha256"])  # the CCTs' is checked
    return half


def train(run: Run, seed: int) -> Artefact:
    """Stage: the network of a seed trained here (weights.safetensors), its learning curve (curve.csv) and how long its
    epochs took (seconds.json)."""

    def make(folder: Path) -> None:
        distributed.broadcast(True)  # tells other ranks, where there are any, to train along
        network = build_network(run, seed)
        images = run.images.to(training.best_device())
        curve = training.train(network, images, recipe(run), seed, folder / "checkpoint.pt", run.log)
        save_tensors(folder / "weights.safetensors", network.state_dict())
        write_text(folder / "seconds.json", json.dumps([row.pop("seconds") for row in curve]))
        save_table(folder / "curve.csv", [{"seed": seed, **row} for row in curve])

    config = run.config(*ARCHITECTURE, *TRAINING) | {"seed": seed}
    return run.stage(f"train-seed{seed}", 1, config, {"data": run.data_sha256}, make)


def learning_curves(run: Run) -> pd.DataFrame:
    """seed, epoch, lr, loss, test_accuracy (0..1): one row per epoch of every trained network."""
    if run.settings.weights == "reference":
        cards = [reference.card(reference_name(run.settings, seed)) for seed in run.settings.seeds]
        return pd.concat([pd.DataFrame(card["curve"]) for card in cards], ignore_index=True)
    return pd.concat([train(run, seed).table("curve") for seed in run.settings.seeds], ignore_index=True)


def load_network(run: Run, seed: int, kind: str) -> tuple[nn.Module, dict[str, str]]:
    """The trained or the random network of a seed, frozen, and what a stage that reads it depends on."""
    network = build_network(run, seed)
    inputs = {"data": run.data_sha256}
    if kind != "random" and run.settings.weights == "reference":
        name = reference_name(run.settings, seed)
        network.load_state_dict(models.load_reference(name).state_dict())
        inputs["network"] = reference.sha256(name)
    elif kind != "random":
        artefact = train(run, seed)
        network.load_state_dict(artefact.tensors("weights"))
        inputs["network"] = artefact.sha256
    return network.eval().requires_grad_(False), inputs


def readout(run: Run, seed: int, kind: str) -> Artefact:
    """Stage: the readouts of one network, trained on the kept training images, and what one pass over the test images
    and one over the held-out images give. kind is one of NETWORKS, or `shuffled`: the trained network with its
    readouts trained on labels dealt to other images.

    weights: tap -> readout (L, T, D); fields_test, fields_held_out (of `_unseen_taps`): tap -> field matrices
    (D, L, L); correct: tap -> (n_test,) bool and heads/tap -> (n_test, H) bool.
    """
    s = run.settings
    network, inputs = load_network(run, seed, kind)
    once = s.taps_once if seed == s.seeds[0] and kind in NETWORKS else ()
    unseen = _unseen_taps(run, seed, network) if kind == "trained" else []
    kinds = list(dict.fromkeys((*s.taps, *once, *unseen)))

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        places = taps.places(network, kinds)
        weights = trained_readouts(run, network, places, images, seed, kind == "shuffled")
        test = readouts.measure(network, places, weights, images.x_test, images.y_test, *images.statistics)
        correct = test.correct | {f"heads/{name}": value for name, value in test.head_correct.items()}
        save_tensors(folder / "weights.safetensors", weights)
        save_tensors(folder / "fields_test.safetensors", _fields(weights, test))
        save_arrays(folder / "correct.npz", correct)
        if kind == "trained":
            _, held = held_out(run.images.y_train, s.held_out)
            places = [place for place in places if place.kind in unseen]
            weights = {place.name: weights[place.name] for place in places}
            x, y = images.x_train[held], images.y_train[held]
            others = readouts.measure(network, places, weights, x, y, *images.statistics)
            save_tensors(folder / "fields_held_out.safetensors", _fields(weights, others))

    # "deciding" is what stored stages call the taps that are looked at on held-out images
    config = run.config(*ARCHITECTURE, *READOUT) | {"seed": seed, "kind": kind, "all_taps": kinds, "deciding": unseen}
    return run.stage(f"readouts-{kind}-seed{seed}", 5, config, inputs, make)


def matrices(run: Run, seed: int, kind: str) -> Artefact:
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
    return run.stage(f"matrices-{kind}-seed{seed}", 1, config, {"readouts": source.sha256}, make)


def trained_readouts(run: Run, network, places, images: Images, seed: int, shuffled=False, epochs=None, penalty=None):
    """Readouts of some taps, trained on the kept training images as the settings say."""
    s = run.settings
    kept, _ = held_out(run.images.y_train, s.held_out)
    x, y = images.x_train[kept], images.y_train[kept]
    if shuffled:
        y = y[torch.randperm(len(y), generator=training.generator(seed, "shuffled labels")).to(y.device)]
    own = {name: getattr(s, f"readout_{name}") for name in ("batch_size", "lr", "l2")}
    how = {"epochs": epochs or s.readout_epochs, **own, **run.config("shift", "flip", "precision", "max_steps")}
    how = readouts.ReadoutRecipe(**how)
    labels = len(images.classes)
    return readouts.train_readouts(network, places, x, y, labels, *images.statistics, how, seed, run.log, penalty)


def penalties(run: Run) -> pd.DataFrame:
    """Stage for the first seed: what the readouts' L2 penalty and their convergence do to accuracy and SNR.

    network, encoder (or a CNN's layer; first, middle, last), tap, l2 (a number, or `code` for the group's on unscaled
    activations), epochs (penalty_epochs and half of it), accuracy (0..1), snr, snr_centred, offset_share.
    """
    seed = run.settings.seeds[0]
    return pd.concat([_penalties(run, seed, kind).table("penalties") for kind in NETWORKS], ignore_index=True)


def _penalties(run: Run, seed: int, kind: str) -> Artefact:
    network, inputs = load_network(run, seed, kind)
    s = run.settings
    values = [f"{value:g}" for value in sorted({*s.penalties, s.readout_l2})] + ["code"]

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        everywhere = taps.places(network, s.penalty_taps)
        some = first_middle_last(max(tap.encoder for tap in everywhere))
        chosen = [tap for tap in everywhere if tap.encoder in some]
        # One more tap for each penalty: it records what its twin records, and its readout trains in the same passes.
        places = [replace(tap, kind=f"{tap.kind}@{value}", heads=0) for tap in chosen for value in values]

        def penalty(name: str, scale: float) -> float:
            value = name.partition("@")[2]
            return GROUP_L2 / scale**2 if value == "code" else float(value)

        rows = []
        for epochs in (s.penalty_epochs // 2, s.penalty_epochs):
            weights = trained_readouts(run, network, places, images, seed, epochs=epochs, penalty=penalty)
            test = readouts.measure(network, places, weights, images.x_test, images.y_test, *images.statistics)
            for place in places:
                tap, _, value = place.kind.partition("@")
                fields = snp.field_matrices(weights[place.name], test.class_means[place.name])
                centred, share = snp.split_offset(fields)
                raw, without = (
                    snp.tap_statistics(snp.boolean_matrices(part, s.threshold)) for part in (fields, centred)
                )
                row = {"network": kind, "encoder": place.encoder, "tap": tap, "l2": value, "epochs": epochs}
                row |= {"accuracy": test.correct[place.name].float().mean().item(), "snr": raw.snr}
                rows.append(row | {"snr_centred": without.snr, "offset_share": share.mean().item()})
        save_table(folder / "penalties.csv", rows)

    config = run.config(*ARCHITECTURE, *READOUT, "penalty_taps", "penalty_epochs", "threshold")
    config |= {"seed": seed, "kind": kind, "penalties": values}
    return run.stage(f"penalties-{kind}-seed{seed}", 2, config, inputs, make)


def _fields(weights: dict[str, Tensor], measured: readouts.Measured) -> dict[str, Tensor]:
    return {tap: snp.field_matrices(weights[tap], means) for tap, means in measured.class_means.items()}


def first_middle_last(encoders: int) -> list[int]:
    """The encoders (from 1) that are looked at where all of them would be too many."""
    return sorted({1, (encoders + 1) // 2, encoders})


def moved_by_more_epochs(table: pd.DataFrame) -> pd.DataFrame:
    """Largest change over encoders of accuracy and SNR when the readouts train twice as long (`penalties`)."""
    keys = ["network", "tap", "l2"]
    wide = table.astype({"l2": str}).pivot_table(index=[*keys, "encoder"], columns="epochs", values=["accuracy", "snr"])
    first, last = (wide.xs(epochs, axis=1, level=1) for epochs in sorted(table.epochs.unique()))
    return (last - first).abs().groupby(keys).max().round(3)


def snr(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Stage for every network: (statistics of each tap at each threshold, statistics of each node at the main one).
    For the first seed there is a third network, `shuffled` (see `readout`).

    First table: seed, network, encoder, tap, threshold, centred, accuracy (0..1) and the fields of `snp.TapStatistics`;
    with offset_share where centred is False. Second: seed, network, encoder, tap, node, labels, clusters, internal,
    external, offset_share.
    """
    seeds = run.settings.seeds
    networks = [(seed, kind) for seed in seeds for kind in NETWORKS] + [(seeds[0], "shuffled")]
    found = [_snr(run, seed, kind, readout(run, seed, kind)) for seed, kind in networks]
    return tuple(pd.concat([one.table(name) for one in found], ignore_index=True) for name in ("taps", "nodes"))


def _snr(run: Run, seed: int, kind: str, source: Artefact) -> Artefact:
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
    return run.stage(f"snr-{kind}-seed{seed}", 1, config, {"readouts": source.sha256}, make)


TAP_COLUMNS = [
    "accuracy", "snr", "snr_external", "signal", "noise", "clusters_per_node", "pooled_cluster_size", "labels_per_node",
    "offset_share",
]  # fmt: skip
HEAD_COLUMNS = [
    "specialisation", "excess", "z", "unrecognised", "tied", "median_margin", "own_drop", "other_drop", "gap",
    "gap_null_high", "gap_same_images", "first_mean_gap",
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
    clusters, name = snp.label_clusters(boolean), run.images.name
    return figures.node_matrix(field, boolean, clusters, run.images.classes, name, place), pd.DataFrame(field.numpy())


def node_gallery(run: Run, seed: int, kind: str) -> tuple[Figure, pd.DataFrame]:
    """A figure of typical and extreme nodes of the first, middle and last encoder, and which nodes they are."""
    found = examples(run, seed, kind)
    table, fields, panels = found.table("examples"), found.arrays("fields"), {}
    for row in table.itertuples():
        field = fields[f"{row.encoder}/{row.which}"]
        boolean = snp.boolean_matrices(field[None], run.settings.threshold)[0]
        panels[f"encoder {row.encoder}", row.which] = (field, snp.label_clusters(boolean))
    return figures.node_gallery(panels, run.images.name, f"{kind}, seed {seed}"), table


def examples(run: Run, seed: int, kind: str) -> Artefact:
    """Stage: typical and extreme nodes of one kind of tap at the first, middle and last encoder, trained network.
    examples.csv: which nodes; fields: encoder/which -> (L, L)."""
    source = readout(run, seed, "trained")

    def make(folder: Path) -> None:
        fields, rows, kept = source.tensors("fields_test"), [], {}
        found = {_encoder(tap): tap for tap in fields if tap.endswith(f".{kind}")}
        for encoder in first_middle_last(len(found)):
            along = fields[found[encoder]]
            nodes = snp.node_statistics(snp.boolean_matrices(along, run.settings.threshold))
            for what, node in chosen_nodes(nodes).items():
                kept[f"{encoder}/{what}"] = along[node].clone()
                numbers = {name: int(getattr(nodes, name)[node]) for name in nodes.__dataclass_fields__}
                rows.append({"encoder": encoder, "tap": kind, "which": what, "node": node, **numbers})
        save_arrays(folder / "fields.npz", kept)
        save_table(folder / "examples.csv", rows)

    return run.stage(f"examples-{kind}-seed{seed}", 1, run.config("threshold"), {"readouts": source.sha256}, make)


def chosen_nodes(nodes: snp.NodeStatistics) -> dict[str, int]:
    """A typical node (labels nearest to the median, among those with a cluster of two or more) and extreme ones."""
    distance = (nodes.labels - nodes.labels.float().median()).abs() + 1e6 * (nodes.internal == 0)
    largest = nodes.labels.float() / nodes.clusters.clamp(min=1)
    chosen = {"typical": distance.argmin(), "fewest labels": nodes.labels.where(nodes.labels > 0, 10**6).argmin()}
    chosen |= {"most labels": nodes.labels.argmax(), "largest clusters": largest.argmax()}
    return {what: int(node) for what, node in chosen.items()}


def driving_images(run: Run, seed: int) -> Artefact:
    """Stage: which test images drive a node, those with the largest field of the node alone for any label. images: tap
    -> (D, 4) int64, the strongest first."""
    source = readout(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        places, weights = taps.places(network, run.settings.taps), source.tensors("weights")
        weights = {place.name: weights[place.name].to(images.x_test.device) for place in places}
        strength: dict[str, list[Tensor]] = {place.name: [] for place in places}
        for batch, _ in _batches(network, places, images.x_test, images.y_test, images):
            for name, parts in strength.items():
                parts.append(macroscopic.node_fields(batch[name], weights[name]).amax(dim=2))
        most = min(4, len(images.y_test))
        found = {name: torch.cat(parts, dim=1).topk(most).indices for name, parts in strength.items()}
        save_arrays(folder / "images.npz", found)

    config = run.config("taps") | {"seed": seed}
    return run.stage(f"driving-images-seed{seed}", 1, config, inputs | {"readouts": source.sha256}, make)


def cluster_pairs(run: Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Which labels share clusters in the last encoder's `block`, first seed: (the ten pairs with most nodes, summary).

    First table: label, other, nodes, same_superclass (CIFAR-100 only). Second: share of clustered pairs in one
    superclass with the 95 % range and largest value over permuted label names, and what the order of labels does.
    """
    found = matrices(run, run.settings.seeds[0], "trained").arrays("matrices")
    *_, booleans = (found[tap] for tap in sorted(found, key=_encoder) if tap.endswith(".block"))
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


def _encoder(tap: str) -> int:
    return int(tap.split(".")[0])


def superclasses(classes: tuple[str, ...]) -> Tensor | None:
    """The number of each label's superclass (L,), where the labels are CIFAR-100's; None for other labels."""
    groups = [group.split() for group in SUPERCLASSES.replace("\n", "|").split("|") if group.strip()]
    number = {name: index for index, group in enumerate(groups) for name in group}
    return torch.tensor([number[name] for name in classes]) if set(classes) == set(number) else None


def correct_answers(run: Run) -> dict[tuple[int, str, str], Tensor]:
    """(seed, network, tap name) -> (n_test,) bool: which test images the tap's readout gets right."""
    return {
        (seed, kind, tap): values
        for seed in run.settings.seeds
        for kind in NETWORKS
        for tap, values in readout(run, seed, kind).arrays("correct").items()
        if not tap.startswith("heads/")
    }


def macroscopic_accuracies(run: Run) -> pd.DataFrame:
    """Stage for every seed: accuracy of random subsets of an encoder's `block` nodes, predicted and measured.

    seed, encoder, size (nodes), draw, predicted, measured (on the test images), only_size (mean measured accuracy of
    as many nodes of encoder 1), all in 0..1. The prediction sees held-out training images, and test images nowhere.
    """
    return pd.concat([_macroscopic(run, seed).table("macroscopic") for seed in run.settings.seeds], ignore_index=True)


def predictions_by_size(subsets: pd.DataFrame) -> pd.DataFrame:
    """How good the predictions of `macroscopic_accuracies` are beyond encoder 1, one row per number of nodes: mean
    error of the prediction and of the size-only curve, and the median, over encoders and seeds, of the rank
    correlation of predicted and measured among sets of one size, encoder and seed; nan for the set of all nodes."""
    part = subsets[subsets.encoder > 1]
    guesses = part[["predicted", "only_size"]]
    errors = guesses.sub(part.measured, axis=0).abs().groupby(part["size"]).mean()
    cells = part.groupby(["size", "encoder", "seed"])[["predicted", "measured"]]
    ranks = cells.apply(lambda cell: cell.predicted.rank().corr(cell.measured.rank()) if len(cell) > 1 else math.nan)
    return errors.add_prefix("error_").assign(rank_correlation=ranks.groupby("size").median()).round(3)


def _macroscopic(run: Run, seed: int) -> Artefact:
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
        batches = _batches(network, places, unseen, y_unseen, images)
        moments = macroscopic.moments(batches, weights)
        measured = _subset_accuracies(network, places, images.x_test, images.y_test, images, weights, subsets)
        everything = {places[0].name: subsets[places[0].name][-1:]}
        right = _subset_accuracies(network, places[:1], unseen, y_unseen, images, weights, everything)
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
            part["predicted"], part["measured"] = predicted.cpu(), measured[place.name]
            part = part[(part["size"] < nodes) | (part.draw == 0)]  # there is one set of all nodes
            only_size = part.groupby("size").measured.mean() if only_size is None else only_size
            rows.append(part.assign(only_size=part["size"].map(only_size)))
        save_table(folder / "macroscopic.csv", pd.concat(rows))

    config = run.config("held_out") | {"seed": seed, "subsets": SUBSETS}
    return run.stage(f"macroscopic-seed{seed}", 1, config, inputs | {"readouts": source.sha256}, make)


def _batches(network: nn.Module, places: list[taps.Tap], x: Tensor, y: Tensor, images: Images):
    """Activations of some taps and labels, batch by batch."""
    return zip(taps.activations(network, places, x, *images.statistics, batch_size=256), y.split(256), strict=True)


def _subset_accuracies(network, places, x: Tensor, y: Tensor, images: Images, weights: dict, subsets: dict) -> dict:
    """Accuracy of some subsets of each tap's nodes (S, D) -> tap name -> (S,), in one pass."""
    right: dict[str, list[Tensor]] = {place.name: [] for place in places}
    for batch, labels in _batches(network, places, x, y, images):
        for name, parts in right.items():
            parts.append(macroscopic.subset_answers(batch[name], weights[name], labels, subsets[name]))
    return {name: torch.cat(parts, dim=1).float().mean(dim=1).cpu() for name, parts in right.items()}


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
    """What is pruned: a CNN's filters; a CCT's FF layers, and for the first seed what the settings add."""
    if run.settings.model.startswith("vgg"):
        return ["filters"]
    return ["ff", *(run.settings.prune_once if seed == run.settings.seeds[0] else ())]


def _unseen_taps(run: Run, seed: int, network: nn.Module) -> list[str]:
    """Kinds of the taps whose nodes decide something that the test images score, so that they are looked at on held-out
    images: ANDC masks, and which labels a head owns."""
    pairs = [pair for layers in pruned_layers(run, seed) for pair in andc.connections(network, layers).values()]
    deciding = {end.split(".")[1] for pair in pairs for end in pair if end != "labels"}
    return sorted(deciding | ({"attn"} & {*run.settings.taps}))


def pruning(run: Run) -> pd.DataFrame:
    """Stage for every seed, layers and threshold: accuracy against dilution, for ANDC and its controls.

    seed, layers (ff; attention, classifier; a CNN's filters), method (andc, permuted, random, magnitude, activation),
    threshold, draw, images (that scored it; draws of one control share the test images out among themselves), dilution,
    removable (ff1 nodes without connections), parameters and macs (of the whole network, without the zeros), accuracy,
    loss (of accuracy, against the unpruned network), loss_se (its standard error over
    test images), retrained_accuracy, retrained_loss, retrained_loss_se (against the unpruned network retrained alike;
    nan where not retrained); accuracies in 0..1.
    """
    seeds, thresholds = run.settings.seeds, run.settings.prune_thresholds
    parts = [
        (seed, layers, at)
        for seed in seeds
        for layers in pruned_layers(run, seed)
        for at in (thresholds[::2] if layers in run.settings.prune_once else thresholds)
    ]
    return pd.concat([_pruning(run, *part).table("pruning") for part in parts], ignore_index=True)


def label_sets(run: Run, seed: int) -> Artefact:
    """Stage: the labels that nodes recognise on held-out training images, at every threshold of the pruning sweep.
    sets: threshold/tap -> (D, L) bool."""
    source = readout(run, seed, "trained")

    def make(folder: Path) -> None:
        fields = source.tensors("fields_held_out").items()
        sets = {
            f"{at:g}/{tap}": snp.diagonal_labels(snp.boolean_matrices(part, at)).clone()
            for tap, part in fields
            for at in run.settings.prune_thresholds
        }
        save_arrays(folder / "sets.npz", sets)

    return run.stage(f"label-sets-seed{seed}", 1, run.config("prune_thresholds"), {"readouts": source.sha256}, make)


def sets_at(threshold: float, found: dict[str, Tensor], pairs: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Of the arrays of `label_sets` those of one threshold and of the taps that connections lead from or to."""
    ends = {end for pair in pairs.values() for end in pair} - {"labels"}
    return {tap: found[f"{threshold:g}/{tap}"] for tap in sorted(ends)}


def input_norms(run: Run, seed: int, layers: str) -> Artefact:
    """Stage: root mean square of what goes into each node of the layers that are pruned, over the held-out training
    images. norms: module path -> (K,)."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        _, held = held_out(run.images.y_train, run.settings.held_out)
        names = andc.connections(network, layers)
        save_arrays(folder / "norms.npz", andc.input_norms(network, names, images.x_train[held], *images.statistics))

    config = run.config(*ARCHITECTURE, "held_out") | {"seed": seed, "layers": layers}
    return run.stage(f"input-norms-{layers}-seed{seed}", 1, config, inputs, make)


def unpruned(run: Run, seed: int) -> Artefact:
    """Stage: what pruned networks are compared with. answers: intact, and where the settings retrain pruned networks
    retrained (the same network after the same short training, without masks) -> (n_test,) bool."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        answers = {"intact": _right_answers(network, images)}
        if run.settings.retrain_thresholds:
            again = copy.deepcopy(network).requires_grad_(True)
            answers["retrained"] = _retrained(run, again, images, seed, folder / "unpruned.pt")
        save_arrays(folder / "answers.npz", answers)

    config = run.config(*ARCHITECTURE, *TRAINING, "retrain_epochs", "retrain_lr")
    config |= {"seed": seed, "retrained": bool(run.settings.retrain_thresholds)}
    return run.stage(f"unpruned-seed{seed}", 1, config, inputs, make)


def _retrained(run: Run, network: nn.Module, images: Images, seed: int, checkpoint: Path) -> Tensor:
    """Right answers of a network after the short training of the settings."""
    s = run.settings
    short = replace(recipe(run), epochs=s.retrain_epochs, lr=s.retrain_lr, warmup=0.0, token_share=1.0)
    unscored = replace(images, x_test=images.x_test[:0], y_test=images.y_test[:0])  # scored once, below
    training.train(network, unscored, short, seed, checkpoint, log=lambda line: None)
    return _right_answers(network, images)


def _pruning(run: Run, seed: int, layers: str, threshold: float) -> Artefact:
    s = run.settings
    source, first, reference = readout(run, seed, "trained"), seed == s.seeds[0], unpruned(run, seed)
    sets, norms = label_sets(run, seed).arrays("sets"), input_norms(run, seed, layers).arrays("norms")
    network, inputs = load_network(run, seed, "trained")
    again = threshold in s.retrain_thresholds and layers in ("ff", "filters")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        before = {name: answers.to(images.x_test.device) for name, answers in reference.arrays("answers").items()}
        intact = before["intact"]
        parameters, macs = sum(p.numel() for p in network.parameters()), _macs(network, images.x_test[:1])
        rows, into_classifier = [], None
        if layers == "classifier":  # what comes before it is the same for all masks
            places = taps.cct_taps(network, ["seqpool"])
            batches = taps.activations(network, places, images.x_test, *images.statistics)
            into_classifier = torch.cat([batch[places[0].name] for batch in batches])[:, 0]
        for method, draw, masks in _masks(run, network, sets, norms, seed, layers, threshold):
            pruned = andc.apply_masks(copy.deepcopy(network).requires_grad_(True), masks)
            row = {"seed": seed, "layers": layers, "method": method, "threshold": threshold, "draw": draw}
            weights, products = andc.savings(masks, network, images.x_test[:1].float())
            row |= {"dilution": andc.dilution(masks), "parameters": parameters - weights, "macs": macs - products}
            row["removable"] = sum(int(nodes.sum()) for nodes in andc.removable(masks).values())
            draws = min(s.prune_draws, len(images.y_test))
            part = slice(draw % draws, None, draws) if method in DRAWN else slice(None)
            if into_classifier is None:
                right = _right_answers(pruned, images, part)
            else:
                right = pruned.classifier.fc(into_classifier[part]).argmax(dim=1) == images.y_test[part]
            row |= {"images": len(right)} | _loss("", intact[part], right)
            retrained = None
            if again and draw == 0 and (first or method in MASKS):
                retrained = _retrained(run, pruned, images, seed, folder / f"{method}.pt")
            rows.append(row | _loss("retrained_", before.get("retrained", intact), retrained))
        run.log(f"pruning {layers} at threshold {threshold}: dilution {rows[-1]['dilution']:.2f}")
        save_table(folder / "pruning.csv", rows)

    config = run.config(*ARCHITECTURE, *TRAINING, *PRUNING)
    config |= {"seed": seed, "first": first, "layers": layers, "threshold": threshold, "retrain": again}
    # Label sets and norms follow from network and readouts: who raises the version of theirs raises this one too.
    inputs |= {"readouts": source.sha256, "unpruned": reference.sha256}
    return run.stage(f"andc-{layers}-{threshold:g}-seed{seed}", 4, config, inputs, make)


def why_filters(half: Run) -> pd.DataFrame:
    """Stage for every seed: is it the signs of what ANDC removes from a CNN that costs accuracy, or statistics of batch
    norm that no longer fit? ANDC's masks, random ones, and random ones that remove as many kernels with a negative sum
    as ANDC does, straight after pruning and with batch norm's statistics taken anew from 5,000 training images.

    seed, threshold, method (andc, random, same signs), dilution, accuracy, refreshed_accuracy (0..1). The smallest
    thresholds of the sweep: at larger ones nothing is left to compare.
    """
    return pd.concat([_why_filters(half, seed).table("filters") for seed in half.settings.seeds], ignore_index=True)


def _why_filters(half: Run, seed: int) -> Artefact:
    source, thresholds = label_sets(half, seed), half.settings.prune_thresholds[:3]
    network, inputs = load_network(half, seed, "trained")

    def make(folder: Path) -> None:
        images, found = half.images.to(training.best_device()), source.arrays("sets")
        kept, _ = held_out(half.images.y_train, half.settings.held_out)
        pairs, rows = andc.connections(network, "filters"), []
        for at in thresholds:
            generator = training.generator(seed, "filters", at)
            masks = andc.andc_masks(sets_at(at, found, pairs), pairs)
            methods = {"andc": masks, "random": andc.random_masks(masks, generator)}
            methods["same signs"] = _same_signs(masks, network, generator)
            for method, drawn in methods.items():
                pruned = andc.apply_masks(copy.deepcopy(network), drawn)
                row = {"seed": seed, "threshold": at, "method": method, "dilution": andc.dilution(drawn)}
                row["accuracy"] = _right_answers(pruned, images).float().mean().item()
                _refresh(pruned, images.x_train[kept[:5000]], images)
                rows.append(row | {"refreshed_accuracy": _right_answers(pruned, images).float().mean().item()})
        save_table(folder / "filters.csv", rows)

    config = half.config(*ARCHITECTURE, "held_out") | {"seed": seed, "thresholds": thresholds}
    return half.stage(f"why-filters-seed{seed}", 1, config, inputs | {"label sets": source.sha256}, make)


def _same_signs(masks: dict[str, Tensor], network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random masks that keep as many kernels with a negative sum, and as many others, as the given ones."""
    drawn = {}
    for name, mask in masks.items():
        negative = (network.get_submodule(name).weight.flatten(2).sum(dim=2) < 0).to(mask.device)
        drawn[name] = torch.zeros_like(mask)
        for part in (negative, ~negative):
            drawn[name][part] = andc.random_masks({name: mask[part]}, generator)[name]
    return drawn


@torch.no_grad()
def _refresh(network: nn.Module, x: Tensor, images: Images) -> None:
    """Take the statistics of batch norm anew, as means over batches of these images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches
    network.train()
    for batch in x.split(250):
        network(normalise(batch, *images.statistics))
    network.eval()


def signs_of_filters(half: Run) -> pd.DataFrame:
    """What ANDC removes from a CNN: one row per seed, threshold and layer, with the dilution and, of the kernels kept
    and of those removed, the share whose weights sum to less than 0 and the mean size (sum of |weights|). Filters
    answer with 0 or more, so that a kernel with a negative sum silences."""
    rows = []
    for seed in half.settings.seeds:
        (network, _), found = load_network(half, seed, "trained"), label_sets(half, seed).arrays("sets")
        pairs = andc.connections(network, "filters")
        for at in half.settings.prune_thresholds:
            for name, mask in andc.andc_masks(sets_at(at, found, pairs), pairs).items():
                kernels = network.get_submodule(name).weight.flatten(2).cpu()
                row = {"seed": seed, "threshold": at, "layer": _encoder(pairs[name][1])}
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


def summary_of_readouts(readouts: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds and encoders, one row per tap and threshold: dilution, accuracy whole and for each mask."""
    means = readouts.groupby(["tap", "threshold", "method"])[["dilution", "whole", "accuracy"]].mean()
    return means.xs("andc", level="method")[["dilution", "whole"]].join(means.accuracy.unstack()).round(3)


def _pruned_readouts(run: Run, seed: int) -> Artefact:
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
        for batch, labels in _batches(network, places, images.x_test, images.y_test, images):
            for name in right:
                fields = macroscopic.node_fields(batch[name], weights[name])
                answers = torch.einsum("dnl,mld->mnl", fields, kept[name]).argmax(dim=2)
                right[name] += (answers == labels).sum(dim=1)
        accuracies = torch.cat([right[tap.name] for tap in places]).cpu() / len(images.y_test)
        save_table(folder / "readouts.csv", pd.DataFrame(rows).assign(accuracy=accuracies))

    config = run.config("taps", "prune_thresholds") | {"seed": seed}
    inputs |= {"readouts": source.sha256, "sets": recognised.sha256}
    return run.stage(f"pruned-readouts-seed{seed}", 1, config, inputs, make)


def _masks(run: Run, network: nn.Module, found: dict, norms: dict, seed: int, layers: str, threshold: float):
    """ANDC's masks and those of its controls at equal dilution: (method, draw, masks). found and norms: arrays of
    `label_sets` and `input_norms`."""
    pairs = andc.connections(network, layers)
    sets = sets_at(threshold, found, pairs)
    masks = andc.andc_masks(sets, pairs)
    yield "andc", 0, masks
    yield "magnitude", 0, andc.magnitude_masks(masks, network)
    yield "activation", 0, andc.activation_masks(masks, network, norms)
    for draw in range(run.settings.prune_draws):
        yield "random", draw, andc.random_masks(masks, training.generator(seed, "random masks", draw))
        permuted = andc.permuted_labels(sets, training.generator(seed, "permuted labels", draw))
        yield "permuted", draw, andc.andc_masks(permuted, pairs)


def _macs(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the network for one image, attention products included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        network(image.float())
    return counter.get_total_flops() // 2


def _right_answers(network: nn.Module, images: Images, part: slice = slice(None)) -> Tensor:
    logits = training.predict(network, images.x_test[part], *images.statistics)
    return logits.argmax(dim=1) == images.y_test[part]


def _loss(prefix: str, intact: Tensor, pruned: Tensor | None) -> dict[str, float]:
    """Accuracy, its loss and the loss's standard error over images; nan for a network that was not made."""
    if pruned is None:
        pruned = torch.full_like(intact, math.nan, dtype=torch.float)
    drop = intact.float() - pruned.float()
    return {
        f"{prefix}accuracy": pruned.float().mean().item(),
        f"{prefix}loss": drop.mean().item(),
        f"{prefix}loss_se": (drop.std() / len(drop) ** 0.5).item(),
    }


def head_division(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Stage for every network: (label x head counts, specialisation and ablation per encoder, their means over them).

    First table: seed, network, encoder, label, head, count, owner (bool), alone_accuracy (of the head alone on that
    label, 0..1); trained network only: ablation_drop (of the network's own accuracy on that label), owner_unseen (owner
    by held-out training images, so that what the test images score is not chosen on them). Second: seed, network,
    encoder, specialisation, null_mean, null_low, null_high (95 % of the null), excess (nats), z, unrecognised, tied
    (labels), median_margin (nodes), own_drop, other_drop, gap (own - other, owners by held-out images; see
    `heads.own_label_drops`), gap_same_images (owners by the test images), first_mean_gap (first seed only: with the
    head's nodes at their training mean instead of 0), gap_null_high (97.5 % of gaps with owners dealt to other labels).
    Third: seed, network, excess, gap with their 95 % intervals (excess_low, ...): over the null, and over test images;
    gap_null_high of the mean over encoders.
    """
    both = [_heads(run, seed, kind) for seed in run.settings.seeds for kind in NETWORKS]
    tables = ("labels", "encoders", "overall")
    return tuple(pd.concat([one.table(name) for one in both], ignore_index=True) for name in tables)


def head_counts(run: Run, encoder: int) -> pd.DataFrame:
    """Nodes of each head that recognise each label, first seed, and the same nodes dealt to the heads at random once:
    nodes (of heads, dealt), head, label, count."""
    seed = run.settings.seeds[0]
    network, _ = load_network(run, seed, "trained")
    booleans = matrices(run, seed, "trained").arrays("matrices")[f"{encoder}.attn"]
    order = torch.randperm(len(booleans), generator=training.generator(seed, "dealt nodes", encoder))
    parts = []
    for nodes, dealt in (("of heads", booleans), ("dealt", booleans[order])):
        counts = heads.cooperation_counts(dealt, network.classifier.blocks[0].self_attn.heads)
        part = pd.DataFrame(counts.numpy()).rename_axis("head").reset_index()
        parts.append(part.melt("head", var_name="label", value_name="count").assign(nodes=nodes))
    return pd.concat(parts, ignore_index=True)[["nodes", "head", "label", "count"]]


def head_clusters(run: Run) -> pd.DataFrame:
    """Heads as if each were one node: labels, clusters and noise of the matrix of a head with all others silenced, one
    row per network, encoder and head; first seed, as heads have no order to average over."""
    both = [_heads(run, run.settings.seeds[0], kind).table("heads") for kind in NETWORKS]
    return pd.concat(both).drop(columns="seed").set_index(["network", "encoder", "head"])


def summary_of_heads(encoders: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, one row per network and encoder."""
    return encoders.groupby(["network", "encoder"])[HEAD_COLUMNS].mean().round(4)


def _heads(run: Run, seed: int, kind: str) -> Artefact:
    right, source, first = readout(run, seed, kind), matrices(run, seed, kind), seed == run.settings.seeds[0]
    network, inputs = load_network(run, seed, kind)
    inputs |= {"answers": right.sha256, "matrices": source.sha256}

    def make(folder: Path) -> None:
        s, labels = run.settings, run.images.y_test
        num_heads = network.classifier.blocks[0].self_attn.heads
        found, correct, fields = source.arrays("matrices"), right.arrays("correct"), right.tensors("fields_test")
        intact = ablated = averaged = held = None
        if kind == "trained":
            held = right.tensors("fields_held_out")
            images = run.images.to(training.best_device())
            intact, ablated = _right_answers(network, images).cpu(), _ablations(network, images).cpu()
            if first:
                averaged = _ablations(network, images, _means(network, images)).cpu()
        label_rows, head_rows, encoder_rows, nulls, gaps, dealt = [], [], [], [], [], []
        for encoder in range(1, len(network.classifier.blocks) + 1):
            tap = f"{encoder}.attn"
            booleans = found[tap]
            counts = heads.cooperation_counts(booleans, num_heads)
            owned = heads.assign_labels(counts)
            generator = training.generator(seed, "head permutations", encoder)
            null = heads.permutation_null(snp.diagonal_labels(booleans), num_heads, s.permutations, generator)
            nulls.append(null)
            low, high = interval(null)
            value = heads.specialisation(counts).item()
            row = {"seed": seed, "network": kind, "encoder": encoder}
            mean, spread = null.mean().item(), max(null.std().item(), 1e-12)
            summary = {"specialisation": value, "null_mean": mean, "null_low": low, "null_high": high}
            summary |= {"excess": value - mean, "z": (value - mean) / spread}
            summary |= {"unrecognised": int((owned.owner < 0).sum()), "tied": int(owned.tied.sum())}
            summary["median_margin"] = owned.margin.float().median().item()
            alone = _by_label(correct[f"heads/{tap}"].float(), labels, len(counts[0]))
            drop = owner = None
            if ablated is not None:
                unseen = snp.boolean_matrices(held[tap], s.threshold)
                owner = heads.assign_labels(heads.cooperation_counts(unseen, num_heads)).owner
                summary["gap_same_images"] = _gap(intact, ablated[encoder - 1], labels, owned.owner)
                drop, own = heads.ablation_drops(intact, ablated[encoder - 1], labels, owner)
                # The same test images are drawn for every encoder, so that draws can be averaged over encoders.
                mine, other, draws = heads.own_label_drops(drop, own, training.generator(seed, "ablation bootstrap"))
                summary |= {"own_drop": mine, "other_drop": other, "gap": mine - other}
                gaps.append(draws)
                generator = training.generator(seed, "dealt owners", encoder)
                dealt.append(heads.dealt_gaps(drop, labels, owner, s.permutations, generator))
                summary["gap_null_high"] = interval(dealt[-1])[1]
                summary["first_mean_gap"] = math.nan
                if averaged is not None:
                    summary["first_mean_gap"] = _gap(intact, averaged[encoder - 1], labels, owner)
                drop = _by_label(drop.float().T, labels, len(counts[0]))
            for head in range(num_heads):
                columns = {"label": range(len(counts[0])), "head": head, "count": counts[head].tolist()}
                columns |= {"owner": (owned.owner == head).tolist(), "alone_accuracy": alone[:, head].tolist()}
                columns["ablation_drop"] = None if drop is None else drop[:, head].tolist()
                columns["owner_unseen"] = None if owner is None else (owner == head).tolist()
                label_rows.append(pd.DataFrame({**row, **columns}))
            encoder_rows.append(row | summary)
            whole = snp.boolean_matrices(heads.head_matrices(fields[tap], num_heads), s.threshold)
            columns = {name: values.tolist() for name, values in asdict(snp.node_statistics(whole)).items()}
            head_rows.append(pd.DataFrame({**row, "head": range(num_heads), **columns}))
        save_table(folder / "labels.csv", pd.concat(label_rows))
        save_table(folder / "heads.csv", pd.concat(head_rows))
        save_table(folder / "encoders.csv", encoder_rows)
        mean = pd.DataFrame(encoder_rows).mean(numeric_only=True)
        low, high = interval(torch.stack(nulls).mean(dim=0))
        overall = {"seed": seed, "network": kind, "excess": mean.excess}
        overall |= {"excess_low": mean.specialisation - high, "excess_high": mean.specialisation - low}
        if gaps:
            low, high = interval(torch.stack(gaps).mean(dim=0))
            overall |= {"gap": mean.gap, "gap_low": low, "gap_high": high}
            overall["gap_null_high"] = interval(torch.stack(dealt).mean(dim=0))[1]
        save_table(folder / "overall.csv", [overall])

    config = run.config("threshold", "permutations") | {"seed": seed, "first": first}
    return run.stage(f"heads-{kind}-seed{seed}", 6, config, inputs, make)


def _gap(intact: Tensor, ablated: Tensor, labels: Tensor, owner: Tensor) -> float:
    """Accuracy lost on own labels less that on others, without its interval (see `heads.own_label_drops`)."""
    drop, own = heads.ablation_drops(intact, ablated, labels, owner)
    mine, other, _ = heads.own_label_drops(drop, own, training.generator(0), draws=1)
    return mine - other


def _ablations(network: nn.Module, images: Images, means: list[Tensor] | None = None) -> Tensor:
    """Right answers on the test images with each head silent, or at its mean: (encoders, H, n)."""
    batches = (normalise(batch, *images.statistics) for batch in images.x_test.split(256))
    answers = [heads.ablation_logits(network, batch, means).argmax(dim=3) for batch in batches]
    return torch.cat(answers, dim=2) == images.y_test


def _means(network: nn.Module, images: Images) -> list[Tensor]:
    """Mean of every encoder's concatenated heads (T, D) over the first 2,048 training images."""
    places, sample = taps.cct_taps(network, ["attn"]), images.x_train[:2048]
    batches = taps.activations(network, places, sample, *images.statistics)
    sums = [[batch[place.name].sum(dim=0) for place in places] for batch in batches]
    return [sum(parts) / len(sample) for parts in zip(*sums, strict=True)]


def cooperation(run: Run) -> pd.DataFrame:
    """Stage for every seed: accuracy of random subsets of `attn` nodes, taken within one head or across heads.

    seed, encoder, size (nodes), nodes (`head` or `across`), head (-1 across), draw, accuracy on the test images (0..1),
    singles (what the accuracies of the single nodes would give if they added up: 1/L + sum of (accuracy - 1/L)).
    """
    return pd.concat([_cooperation(run, seed).table("cooperation") for seed in run.settings.seeds], ignore_index=True)


def _cooperation(run: Run, seed: int) -> Artefact:
    source = readout(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        places, chance, rows = taps.cct_taps(network, ["attn"]), 1 / len(images.classes), []
        read = source.tensors("weights")
        weights = {place.name: read[place.name].to(images.x_test.device) for place in places}
        described, subsets = {}, {}
        for place in places:
            nodes, width = weights[place.name].shape[2], weights[place.name].shape[2] // place.heads
            sizes = sorted({*(2**power for power in range(12) if 2**power < width), width})
            generator = training.generator(seed, "cooperation", place.name)
            described[place.name], chosen = [], [torch.eye(nodes, dtype=torch.bool)]
            for head in range(-1, place.heads):
                draws = SUBSETS if head < 0 else -(-SUBSETS // place.heads)
                within = macroscopic.random_subsets(nodes if head < 0 else width, sizes, draws, generator)
                some = torch.zeros(len(within), nodes, dtype=torch.bool)
                some[:, slice(None) if head < 0 else slice(head * width, (head + 1) * width)] = within
                chosen.append(some)
                described[place.name] += [(head, size, draw) for size in sizes for draw in range(draws)]
            subsets[place.name] = torch.cat(chosen).to(images.x_test.device)
        found = _subset_accuracies(network, places, images.x_test, images.y_test, images, weights, subsets)
        for place in places:
            nodes, accuracies = weights[place.name].shape[2], found[place.name]
            alone = accuracies[:nodes] - chance
            for (head, size, draw), subset, accuracy in zip(
                described[place.name], subsets[place.name][nodes:].cpu(), accuracies[nodes:], strict=True
            ):
                row = {"seed": seed, "encoder": place.encoder, "size": size, "head": head, "draw": draw}
                row |= {"nodes": "across" if head < 0 else "head", "accuracy": accuracy.item()}
                rows.append(row | {"singles": chance + alone[subset].sum().item()})
        save_table(folder / "cooperation.csv", rows)

    config = {"seed": seed, "subsets": SUBSETS}
    return run.stage(f"cooperation-seed{seed}", 1, config, inputs | {"readouts": source.sha256}, make)


def stability(run: Run, labels: pd.DataFrame) -> pd.DataFrame:
    """Is the division of labels the same for every seed? One row per encoder and pair of seeds: share of labels that
    the best matching of heads gives to the same head, and its mean and 97.5 % over dealt labels; empty for one seed."""
    rows, seeds = [], run.settings.seeds
    owned = labels[labels.owner & (labels.network == "trained")]
    for encoder, part in owned.groupby("encoder"):
        owners = part.pivot(index="seed", columns="label", values="head").reindex(
            columns=range(len(run.images.classes))
        )
        for first, second in itertools.combinations(seeds, 2):
            a, b = (torch.tensor(owners.loc[seed].fillna(-1).to_numpy()).long() for seed in (first, second))
            generator = training.generator(first, "matched heads", second, encoder)
            overlap, dealt = heads.matched_overlap(a, b, run.settings.permutations, generator)
            row = {"encoder": encoder, "seeds": f"{first}-{second}", "overlap": overlap}
            rows.append(row | {"chance": dealt.mean().item(), "chance_high": interval(dealt)[1]})
    return pd.DataFrame(rows, columns=["encoder", "seeds", "overlap", "chance", "chance_high"])


def owners_of_superclasses(run: Run, labels: pd.DataFrame) -> pd.DataFrame:
    """Which labels go to one head? Share of the pairs of labels of one superclass that have the same owner, with its
    mean and 97.5 % quantile over dealt labels; one row per seed and encoder, none for labels without superclasses."""
    groups, rows = superclasses(run.images.classes), []
    owned = labels[labels.owner & (labels.network == "trained")]
    for (seed, encoder), part in owned.groupby(["seed", "encoder"]) if groups is not None else ():
        owner = _owners(part, len(groups))
        same = (groups[:, None] == groups).triu(1)
        generator = training.generator(seed, "dealt superclasses", encoder)
        order = [torch.randperm(len(groups), generator=generator) for _ in range(run.settings.permutations)]
        found, *dealt = (
            ((dealing[:, None] == dealing) & (dealing >= 0))[same].float().mean().item()
            for dealing in (owner, *(owner[permutation] for permutation in order))
        )
        row = {"seed": seed, "encoder": encoder, "same_owner": found, "dealt": sum(dealt) / len(dealt)}
        rows.append(row | {"dealt_high": interval(dealt)[1]})
    return pd.DataFrame(rows, columns=["seed", "encoder", "same_owner", "dealt", "dealt_high"])


def _owners(owned: pd.DataFrame, num_labels: int) -> Tensor:
    """The head of each label's row (L,); -1 for labels without one."""
    owner = torch.full((num_labels,), -1)
    owner[torch.tensor(owned.label.to_numpy())] = torch.tensor(owned["head"].to_numpy())
    return owner


def attention_maps(run: Run, labels: pd.DataFrame) -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """What each head of the first and last encoder attends to: attention received by each token, averaged over 1,000
    test images (2 a label, if more) of the head's own labels and over the others; first seed. A figure, the numbers
    behind it, and how far the two maps of a head differ (see `_difference`), beside what the other heads' maps differ
    on the same images (own labels may look alike to every head), and mean and 97.5 % quantile over owners dealt at
    random."""
    seed = run.settings.seeds[0]
    network, _ = load_network(run, seed, "trained")
    images = limit(run.images, max(1000, 2 * len(run.images.classes))).to(training.best_device())
    trained = labels[(labels.network == "trained") & (labels.seed == seed)]
    own = trained[trained.owner_unseen.astype(bool)]
    rows, differences = [], []
    for encoder in sorted({1, len(network.classifier.blocks)}):
        owner = _owners(own[own.encoder == encoder], len(images.classes))
        batches = (normalise(batch, *images.statistics) for batch in images.x_test.split(256))
        received = torch.cat([heads.attention_received(network, batch, encoder) for batch in batches]).cpu()
        for head in range(received.shape[1]):
            mine = owner[images.y_test.cpu()] == head
            for which, chosen in (("own", mine), ("other", ~mine)):
                for token, value in enumerate(received[chosen, head].mean(dim=0).tolist() if chosen.any() else []):
                    rows.append({"encoder": encoder, "head": head, "labels": which, "token": token, "attention": value})
        y, generator = images.y_test.cpu(), training.generator(seed, "dealt attention", encoder)
        found, count = _difference(received, y, owner), received.shape[1]
        others = [_difference(received.roll(step, dims=1), y, owner) for step in range(1, count)]
        others = torch.stack(others).mean(dim=0) if others else torch.full((count,), torch.nan)
        order = [torch.randperm(len(owner), generator=generator) for _ in range(run.settings.permutations)]
        dealt = torch.stack([_difference(received, y, owner[part]) for part in order])
        for head, value in enumerate(found.tolist()):
            row = {"encoder": encoder, "head": head, "labels": int((owner == head).sum()), "difference": value}
            row["other_heads"] = others[head].item()
            differences.append(row | {"dealt": dealt[:, head].mean().item(), "dealt_high": interval(dealt[:, head])[1]})
    table, differences = pd.DataFrame(rows), pd.DataFrame(differences).set_index(["encoder", "head"])
    return figures.attention_maps(table, run.images.name, f"seed {seed}"), table, differences.round(4)


def _difference(received: Tensor, y: Tensor, owner: Tensor) -> Tensor:
    """Half the summed difference between a head's mean map over images of its own labels and over the others, 0 for
    equal to 1 for disjoint maps: (n, H, T), labels (n,), owners (L,) -> (H,); nan for a head that owns none or all."""
    own = owner[y][:, None] == torch.arange(received.shape[1])  # (n, H)
    sums = torch.einsum("nh,nht->ht", own.to(received), received)
    count = own.sum(dim=0)[:, None]
    return (sums / count - (received.sum(dim=0) - sums) / (len(y) - count)).abs().sum(dim=1) / 2


def more_heads(run: Run) -> pd.DataFrame:
    """The same small walk with other numbers of heads (`many_heads`), mean over encoders: heads, seed, network, excess,
    gap, test_accuracy."""
    rows = []
    for count in run.settings.many_heads:
        other = replace(
            run,
            settings=run.settings.model_copy(update={"heads": count, "taps_once": [], "weights": "trained"}),
            prefix=f"{count}-heads-",
        )
        _, _, overall = head_division(other)
        accuracies = learning_curves(other).groupby("seed").test_accuracy.last()
        rows.append(overall.assign(heads=count, test_accuracy=overall.seed.map(accuracies)))
    return pd.concat(rows) if rows else pd.DataFrame()


def _by_label(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Mean of each column over each label's images: (n, H), (n,) -> (L, H)."""
    return snp.class_means(values[:, None, :], labels, num_labels)[:, 0]
