"""Tables -> pictures: one function a figure, one style for all."""

import itertools
import math
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FixedLocator
from torch import Tensor

from paperlib import files, snp, verdicts
from paperlib.data import EMBEDDED, Images
from paperlib.taps import encoder_of

if TYPE_CHECKING:
    from paperlib.experiment.store import Run

# Okabe-Ito colours, distinguishable for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999999", "#000000")
TAP_COLOURS = dict(zip(("block", "attn", "ff2", "ff1", "ff_in", "mha", "qkv", "stem"), COLOURS, strict=True))
TAP_COLOURS |= {"pooled": "#F0E442", "norm": "#882255", "weighed": "#44AA99", "seqpool": "#332288"}
TAP_COLOURS["conv"] = TAP_COLOURS["ff1"]  # a CNN's nodes, which never stand beside FF nodes in one panel
METHODS = ("andc", "magnitude", "activation", "permuted", "random")
METHOD_STYLES = dict(zip(METHODS, zip((COLOURS[i] for i in (0, 2, 3, 5, 7)), "o^vsD", strict=True), strict=True))
STYLE = {
    "font.size": 9, "axes.prop_cycle": plt.cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.alpha": 0.25, "legend.frameon": False, "figure.constrained_layout.use": True,
    "figure.dpi": 110, "savefig.dpi": 200, "savefig.bbox": "tight",
    "axes.titlesize": 9, "svg.hashsalt": "paperlib", "svg.fonttype": "none", "pdf.fonttype": 42,
}  # fmt: skip
PLAIN = {**STYLE, "axes.grid": False}
FIELDS = {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}


def in_style(parameters: dict) -> AbstractContextManager:
    """Draw with these parameters on matplotlib's defaults, whatever the reader's own matplotlibrc says."""
    return plt.style.context(["default", parameters])


def save(figure: Figure, run: "Run", name: str, table: pd.DataFrame) -> Figure:
    """Write <name>.png, .pdf, .svg and the .csv behind them into a run's folder, byte for byte the same each time.

    The .png says with which settings and data it was made (its text `Comment`): no page shows it beside others'.
    """
    folder = run.output
    folder.mkdir(parents=True, exist_ok=True)
    dates = {"png": {"Software": None, "Comment": run.stamp}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}
    with in_style(STYLE):
        for kind, metadata in dates.items():
            with files.whole(folder / f"{name}.{kind}") as file:
                figure.savefig(file, format=kind, metadata=metadata)
    with files.whole(folder / f"{name}.csv") as file:
        file.write(table.to_csv(index=False, lineterminator="\n").encode())
    plt.close(figure)
    return figure


@in_style(PLAIN)
def examples(images: Images, labels: int = 20) -> Figure:
    """A training image and, below it, a test image of evenly chosen labels."""
    chosen = np.linspace(0, len(images.classes) - 1, min(labels, len(images.classes))).round().astype(int)
    figure, axes = plt.subplots(2, len(chosen), figsize=(0.5 * len(chosen), 1.5), squeeze=False)
    for column, label in enumerate(chosen):
        for row, (x, y) in enumerate(((images.x_train, images.y_train), (images.x_test, images.y_test))):
            axes[row, column].imshow(x[(y == int(label)).nonzero()[0, 0]].permute(1, 2, 0).numpy())
            axes[row, column].axis("off")
        axes[0, column].set_title(plain(images.classes[label])[:12], fontsize=7)
    figure.suptitle("training images above, test images below", fontsize=8)
    plt.close(figure)
    return figure


@in_style(STYLE)
def learning_curve(curves: pd.DataFrame, data: str, labels: int) -> Figure:
    """Loss and test accuracy against epochs, one line a seed (`experiment.networks.learning_curves`)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.6))
    for seed, curve in curves.groupby("seed"):
        left.plot(curve.epoch, curve.loss, "o-", ms=3, label=f"seed {seed}")
        scored = curve.dropna(subset="test_accuracy")
        right.plot(scored.epoch, 100 * scored.test_accuracy, "o-", ms=3)
    right.axhline(100 / labels, color="grey", ls=":", label="chance")
    left.set(xlabel="epoch", ylabel="training loss")
    right.set(xlabel="epoch", ylabel="test accuracy (%)", ylim=(0, None))
    figure.legend(loc="outside right center", fontsize=8)
    return _stamped(figure, data, data, curves)


@in_style(STYLE)
def snr_per_encoder(taps: pd.DataFrame, data: str, threshold: float, shown: list[str]) -> Figure:
    """Readout accuracy and raw SNR of some taps along the encoders, mean and spread over seeds; dashed: random network,
    dash-dotted: readouts of shuffled labels (first table of `experiment.nodes.snr`)."""
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    raw = taps[(taps.threshold == threshold) & ~taps.centred]
    shown = sorted(shown, key=list(TAP_COLOURS).index)
    for axis, column, scale in ((axes[0], "accuracy", 100), (axes[1], "snr", 1)):
        for tap in shown:
            for kind, line in (("trained", "o-"), ("random", "x--"), ("shuffled", "-.")):
                _curve(axis, raw[(raw.tap == tap) & (raw.network == kind)], column, scale, line, TAP_COLOURS[tap])
    axes[0].set(xlabel="encoder", ylabel="readout accuracy (%)", ylim=(0, None))
    axes[1].set(xlabel="encoder", ylabel="SNR", ylim=(0, None))
    axes[1].axhline(1, color="grey", ls=":")
    for tap in shown:
        axes[0].plot([], [], "o-", ms=4, color=TAP_COLOURS[tap], label=tap)
    axes[0].plot([], [], "x--", ms=4, color="grey", label="random network")
    axes[0].plot([], [], "-.", color="grey", label="shuffled labels")
    figure.legend(loc="outside lower center", ncols=len(shown) + 2, fontsize=8)
    return _stamped(figure, f"{data}, threshold {threshold}", data, raw)


@in_style(STYLE)
def two_halves(taps: pd.DataFrame, data: str, threshold: float) -> Figure:
    """CCT and CNN on one depth axis: accuracy, SNR, clusters, cluster size, noise, centred SNR, offset share; random
    networks dashed (first table of `experiment.nodes.both_halves`)."""
    part = taps[(taps.threshold == threshold) & taps.network.isin(("trained", "random"))]
    keys = ["half", "network", "depth", "seed"]
    table = part[~part.centred].set_index(keys).assign(snr_centred=part[part.centred].set_index(keys).snr).sort_index()
    shown = {
        "accuracy": "accuracy", "snr": "SNR", "clusters_per_node": "clusters per node", "snr_centred": "centred SNR",
        "pooled_cluster_size": "labels per cluster", "noise": "noise N", "offset_share": "offset share",
    }  # fmt: skip
    figure, axes = plt.subplots(2, 4, figsize=(9.5, 4.6))
    for axis, (column, label) in zip(axes.flat, shown.items(), strict=False):
        for half, colour in (("cct", COLOURS[7]), ("cnn", COLOURS[3])):
            for kind, line in (("trained", "o-"), ("random", "x--")):
                _curve(axis, table.loc[half, kind].reset_index(), column, 1, line, colour, "depth")
        axis.set(xlabel="relative depth", ylabel=label, ylim=(0, None))
    axes[1, 3].axis("off")
    names = [f"{half}, {kind}" for half in ("cct", "cnn") for kind in ("trained", "random")]
    axes[1, 3].legend(axes[0, 0].lines, names, loc="center")
    return _stamped(figure, f"{data}, threshold {threshold}", data, part)


@in_style(STYLE)
def which_node(halves: dict[str, pd.DataFrame], data: str) -> Figure:
    """Does it matter which node? SNR of native over that of rotated nodes along depth, raw and centred, one line a tap;
    dashed: random weights; 1: single nodes mean no more than any other directions. halves: name (CCT, CNN, CCT by Muon)
    -> table `taps` of `experiment.measure` at the main threshold, all seeds."""
    figure, axes = plt.subplots(2, len(halves), figsize=(1.8 + 2.6 * len(halves), 5), squeeze=False, sharey="row")
    keys = ["tap", "network", "encoder", "seed"]
    for column, (name, table) in enumerate(halves.items()):
        for axis, centred in zip(axes[:, column], (False, True), strict=True):
            part = table[table.centred == centred]
            native = part[part.basis == "native"].set_index(keys).snr
            rotated = part[part.basis != "native"].groupby(keys).snr.mean()
            ratio = (native / rotated).rename("ratio").reset_index()
            for (tap, network), rows in ratio[ratio.network != "shuffled"].groupby(["tap", "network"], sort=False):
                colour, line = TAP_COLOURS[tap], "o-" if network == "trained" else "x--"
                _curve(axis, rows, "ratio", 1, line, colour)
            axis.axhline(1, color="grey", ls=":")
        axes[0, column].set_title(name)
        for axis in axes[:, column]:
            axis.set(xlabel="encoder" if "CNN" not in name else "layer")
        for tap in dict.fromkeys(table.tap):
            axes[0, column].plot([], [], "o-", ms=4, color=TAP_COLOURS[tap], label=tap)
        axes[0, column].legend(fontsize=8)
    axes[0, 0].set(ylabel="SNR, native / rotated nodes")
    axes[1, 0].set(ylabel="centred SNR,\nnative / rotated nodes")
    tables = pd.concat(halves.values())
    return _stamped(figure, f"{data}: does it matter which node? dashed: random weights", data, tables)


@in_style(STYLE)
def threshold_sweep(taps: pd.DataFrame, data: str, tap: str = "block") -> Figure:
    """SNR of one tap along the encoders for every threshold, trained (solid) and random (dashed)."""
    figure, axis = plt.subplots(figsize=(4.4, 3))
    thresholds = sorted((part := taps[(taps.tap == tap) & ~taps.centred]).threshold.unique())
    colours = plt.get_cmap("viridis")(np.linspace(0, 0.9, len(thresholds)))
    for threshold, colour in zip(thresholds, colours, strict=True):
        for kind, line in (("trained", "o-"), ("random", "x--")):
            _curve(axis, part[(part.threshold == threshold) & (part.network == kind)], "snr", 1, line, colour)
        axis.plot([], [], "o-", ms=4, color=colour, label=f"{threshold:g}")
    axis.set(xlabel="encoder", ylabel=f"SNR of {tap}")
    figure.legend(loc="outside right center", title="threshold", fontsize=8)
    return _stamped(figure, f"{data}, dashed: random network", data, part)


@in_style(STYLE)
def predicted_accuracies(table: pd.DataFrame, data: str) -> Figure:
    """Measured accuracy of sets of nodes beyond encoder 1 against the prediction from single nodes, and against that of
    as many nodes of encoder 1 (`experiment.nodes.macroscopic_accuracies`)."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.6), sharex=True, sharey=True)
    part = table[table.encoder > 1]
    for axis, column in zip(axes, ("predicted", "only_size"), strict=True):
        style = {"cmap": "viridis", "alpha": 0.6, "rasterized": True, "vmin": 2, "vmax": part.encoder.max()}
        for (size, sets), marker in zip(part.groupby("size"), itertools.cycle("o^sDvP*X"), strict=False):
            order = sets.sample(frac=1, random_state=0)  # thousands of points: no encoder on top of the others
            image = axis.scatter(100 * order[column], 100 * order.measured, 12, order.encoder, marker, **style)
            axis.scatter([], [], 12, "grey", marker, label=str(size))
        axis.axline((0, 0), slope=1, color="grey", ls=":")
    axes[0].set(xlabel="predicted from single nodes (%)", ylabel="measured accuracy (%)")
    axes[1].set(xlabel="as many nodes of encoder 1 (%)")
    figure.colorbar(image, ax=axes[1], label="encoder", ticks=sorted(part.encoder.unique()), shrink=0.7)
    figure.legend(*axes[0].get_legend_handles_labels(), title="nodes", loc="outside lower center", ncols=8, fontsize=8)
    return _stamped(figure, f"{data}, sets of block nodes", data, table)


@in_style(STYLE)
def node_distributions(nodes: pd.DataFrame, data: str, tap: str = "block") -> Figure:
    """How recognised labels, clusters and noise are spread over the nodes of one tap, encoder by encoder: the middle
    50 and 95 % and the median, trained and random network (second table of `experiment.nodes.snr`)."""
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.8))
    part = nodes[nodes.tap == tap].assign(noise=nodes.internal + nodes.external)
    for axis, column in zip(axes, ("labels", "clusters", "noise"), strict=True):
        for kind, colour, shift in (("trained", COLOURS[0], -0.15), ("random", COLOURS[6], 0.15)):
            spread = part[part.network == kind].groupby("encoder")[column]
            q = spread.quantile([0.025, 0.25, 0.5, 0.75, 0.975]).unstack()
            axis.vlines(q.index + shift, q[0.025], q[0.975], color=colour, lw=1)
            axis.vlines(q.index + shift, q[0.25], q[0.75], color=colour, lw=4)
            axis.plot(q.index + shift, q[0.5], "o", ms=4, mfc="white", color=colour, label=kind)
        scale = {"yscale": "log"} if column == "noise" else {"ylim": (0, None)}
        axis.set(xlabel="encoder", ylabel=f"{column} per node" + " (label pairs)" * (column == "noise"), **scale)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    return _stamped(figure, f"{data}, nodes of {tap}", data, part)


@in_style(STYLE)
def penalties(table: pd.DataFrame, data: str) -> Figure:
    """Accuracy and SNR of each tap at three encoders for several L2 penalties of the readouts; faint: half the epochs;
    dashed: random network (`experiment.nodes.penalties`)."""
    taps, values = list(table.tap.unique()), list(table.l2.astype(str).unique())
    colours = dict(zip(values, plt.get_cmap("plasma")(np.linspace(0, 0.85, len(values))), strict=True))
    size = (max(4.5, 1.6 + 2.2 * len(taps)), 4)
    figure, axes = plt.subplots(2, len(taps), figsize=size, squeeze=False, sharex=True, sharey="row")
    for (_, tap, value, epochs), part in table.astype({"l2": str}).groupby(["network", "tap", "l2", "epochs"]):
        faint = 1.0 if epochs == table.epochs.max() else 0.35
        line = "x--" if part.network.iloc[0] == "random" else "o-"
        for axis, column, scale in zip(axes[:, taps.index(tap)], ("accuracy", "snr"), (100, 1), strict=True):
            axis.plot(part.encoder, scale * part[column], line, ms=4, color=colours[value], alpha=faint)
    for upper, lower, tap in zip(*axes, taps, strict=True):
        upper.set(title=tap)
        lower.set(xlabel="encoder")
    for axis, name in zip(axes[:, 0], ("readout accuracy (%)", "SNR"), strict=True):
        axis.set(ylabel=name)
    for value, colour in colours.items():
        axes[0, 0].plot([], [], "o-", ms=4, color=colour, label=value)
    figure.legend(loc="outside right center", title="L2 penalty", fontsize=8)
    epochs = f"{table.epochs.max()} epochs (faint: {table.epochs.min()})"
    return _stamped(figure, f"{epochs}; dashed: random network; {data}, first seed", data)


@in_style(PLAIN)
def node_gallery(
    panels: dict[tuple[str, str], tuple[Tensor, list[list[int]]]], classes: tuple[str, ...], data: str, place: str
) -> Figure:
    """(encoder, kind of node) -> field matrix (L, L) and clusters: one small field matrix each, labels ordered by
    cluster, clusters framed, below it the labels of the largest one; encoders are rows."""
    rows, columns = (list(dict.fromkeys(key[part] for key in panels)) for part in (0, 1))
    size = (1 + 2.1 * len(columns), 0.4 + 2.3 * len(rows))
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False, dpi=72)
    for (row, column), (field, clusters) in panels.items():
        axis = axes[rows.index(row), columns.index(column)]
        image = axis.imshow(_scaled(field, by_cluster(clusters, len(field))), interpolation="nearest", **FIELDS)
        _frame(axis, clusters)
        largest = max(clusters, key=len, default=[])
        names = ",\n".join(plain(classes[label], 18) for label in largest[:2]) or "no cluster"
        more = f" + {len(largest) - 2}" if len(largest) > 2 else ""
        axis.set(xticks=[], yticks=[], title=column if row == rows[0] else "")
        axis.set_xlabel(names + more, fontsize=8)
        axis.set_ylabel(row if column == columns[0] else "")
    bar = figure.colorbar(image, ax=axes, shrink=0.5, extend="min")
    bar.ax.set_title("field /\nmaximum", fontsize=8)
    return _stamped(figure, f"{data}, {place}; rows: input labels, columns: output labels", data)


def by_cluster(clusters: list[list[int]], labels: int) -> list[int]:
    """All labels, those of clusters first, cluster by cluster."""
    first = [*itertools.chain(*clusters)]
    return first + [label for label in range(labels) if label not in set(first)]


def _scaled(field: Tensor, order: list[int]) -> np.ndarray:
    """A field matrix over its maximum, in the order of labels; what is negative stays so if nothing is positive."""
    return (field / field.max().clamp(min=1e-30)).clamp(min=-1e6)[order][:, order].numpy()


def _frame(axis, clusters: list[list[int]]) -> None:
    start = -0.5
    for cluster in clusters:
        axis.add_patch(plt.Rectangle((start, start), len(cluster), len(cluster), fill=False, ec=COLOURS[2], lw=1))
        start += len(cluster)


@in_style(PLAIN)
def node_matrix(field: Tensor, boolean: Tensor, clusters: list[list[int]], images: Images, node: str) -> Figure:
    """One node: its field matrix and Boolean matrix (L, L), labels ordered by cluster, clusters framed, and a test
    image of each label of its largest clusters."""
    classes, order = images.classes, by_cluster(clusters, len(images.classes))
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10, 3.7), width_ratios=[1, 1, 0.75])
    image = left.imshow(_scaled(field, order), interpolation="nearest", **FIELDS)
    figure.colorbar(image, ax=left, shrink=0.7, extend="min", location="left", label="field / maximum")
    shown = min(max(sum(map(len, clusters)) + 5, 12), len(order), 25)
    middle.imshow(boolean[order][:, order].numpy()[:shown, :shown], cmap="Greys", vmin=0, vmax=1)
    _frame(middle, clusters)
    middle.set(xlim=(-0.5, shown - 0.5), ylim=(shown - 0.5, -0.5))
    names = [plain(classes[label], 16) for label in order[:shown]]
    middle.set_xticks(range(shown), names, rotation=90, fontsize=7)
    middle.set_yticks(range(shown), names, fontsize=7)
    left.set(title="field matrix", xlabel="output label", ylabel="input label", xticks=[], yticks=[])
    middle.set(title="above the threshold, clusters framed")
    right.set(title="its largest clusters")
    right.axis("off")
    for row, cluster in enumerate(sorted(clusters, key=len, reverse=True)[:3]):
        for column, label in enumerate(cluster[:3]):
            small = right.inset_axes((column / 3, 0.7 - row / 3, 0.3, 0.24))
            small.imshow(images.x_test[(images.y_test == label).nonzero()[0, 0]].permute(1, 2, 0).numpy())
            small.axis("off")
            small.set_title(plain(classes[label], 14), fontsize=7, pad=2)
    return _stamped(figure, f"{images.name}, {node}", images.name)


def _matrix(axis, matrix: Tensor, clusters: list[list[int]] | None = None) -> None:
    """A field or Boolean matrix (L, L); labels in their order, or by cluster, clusters framed."""
    order = by_cluster(clusters or [], len(matrix))
    if matrix.is_floating_point():
        axis.imshow(_scaled(matrix, order), interpolation="nearest", **FIELDS)
    else:
        axis.imshow(matrix[order][:, order].numpy(), interpolation="nearest", cmap="Greys", vmin=0, vmax=1)
    _frame(axis, clusters or [])
    axis.set(xticks=[], yticks=[])


@in_style(PLAIN)
def matrices(panels: dict[str, Tensor], data: str, place: str) -> Figure:
    """Field or Boolean matrices (L, L) side by side, their names above them."""
    figure, axes = plt.subplots(1, len(panels), figsize=(0.5 + 3.2 * len(panels), 3.6), squeeze=False)
    for axis, (name, matrix) in zip(axes[0], panels.items(), strict=True):
        _matrix(axis, matrix)
        axis.set(title=name, xlabel="output label", ylabel="input label" if axis is axes[0, 0] else "")
    return _stamped(figure, f"{data}, {place}", data)


@in_style(PLAIN)
def node_versions(fields: dict[str, Tensor], table: pd.DataFrame, threshold: float, data: str) -> Figure:
    """One node of each version of a tap, one column each: field matrix, Boolean matrix, counts; labels by the clusters
    of each (`experiment.hand.compare`)."""
    figure, axes = plt.subplots(2, len(fields), figsize=(0.5 + 2.6 * len(fields), 5.9), squeeze=False)
    for column, row in enumerate(table.itertuples()):
        field = fields[row.version]
        boolean = snp.boolean_matrices(field[None], threshold)[0]
        for axis, matrix in zip(axes[:, column], (field, boolean), strict=True):
            _matrix(axis, matrix, snp.label_clusters(boolean))
        axes[0, column].set_title(f"{row.version}\nreadout {100 * row.accuracy:.1f} %, SNR {row.snr:.2f}", fontsize=10)
        counts = f"node {row.node}: labels {row.labels}, clusters {row.clusters}, noise {row.noise}"
        axes[1, column].set_xlabel(counts, fontsize=9)
    axes[0, 0].set_ylabel("field / maximum")
    axes[1, 0].set_ylabel(f"above {threshold:g} of it")
    return _stamped(figure, f"{data}; rows: input labels, columns: output labels", data)


@in_style(PLAIN)
def turned(table: pd.DataFrame, fields: Tensor, threshold: float, data: str, place: str) -> Figure:
    """Above: the Boolean matrix of a node at five steps of its way (fields: (steps, L, L)), labels by its first
    clusters, which are framed. Below: SNR and recognised labels of all nodes of the tap along the way, one line a
    version (`experiment.hand.along`)."""
    part, booleans = table[table.threshold == threshold], snp.boolean_matrices(fields, threshold)
    angles, clusters = part.groupby("step").angle.first().to_numpy(), snp.label_clusters(booleans[0])
    figure = plt.figure(figsize=(8.4, 4.6))
    above, below = figure.subfigures(2, 1, height_ratios=[1, 1.25])
    steps = np.linspace(0, len(fields) - 1, 5).round().astype(int)
    for axis, step in zip(above.subplots(1, 5), steps, strict=True):
        _matrix(axis, booleans[step], clusters)
        own = int(booleans[step].diagonal().sum())
        axis.set_title(f"turned by {angles[step]:.0f}°")
        axis.set_xlabel(f"{own} labels, noise {int(booleans[step].sum()) - own}", fontsize=8)
    axes = below.subplots(1, 2)
    for axis, column, name in zip(axes, ("snr", "labels"), ("SNR", "labels of a node"), strict=True):
        for number, (version, rows) in enumerate(part.groupby("version", sort=False)):
            line = "x--" if number else "o-"
            axis.plot(rows.angle, rows[column], line, ms=4, color=COLOURS[number], label=version)
        axis.set(xlabel="angle between a node and its old direction (°)", ylabel=name, ylim=(0, None))
        axis.grid(True, alpha=0.25)
    axes[0].legend(loc="lower left")
    return _stamped(figure, f"{data}, {place}", data)


@in_style(STYLE)
def pruning_curve(table: pd.DataFrame, data: str) -> Figure:
    """Accuracy against dilution and what was lost, ANDC and its controls, one column for each pruned part; bars:
    deviation over seeds; open symbols: after the short retraining, if any (`experiment.pruning.pruning`)."""
    parts = sorted(table.layers.unique(), key=["ff", "attention", "classifier", "filters"].index)
    titles = {"filters": "convolutions", "ff": "FF layers", "attention": "qkv and proj", "classifier": "classifier"}
    whens = (("", {"ls": "-"}, "unpruned"), ("retrained_", {"ls": "--", "mfc": "white"}, "unpruned, retrained"))
    shape = {"figsize": (1.8 + 2.9 * len(parts), 5.4), "sharex": "col", "sharey": "row", "height_ratios": [3, 2]}
    figure, axes = plt.subplots(2, len(parts), squeeze=False, **shape)
    for layers, (upper, lower) in zip(parts, axes.T, strict=True):
        part = table[table.layers == layers]
        for (method, (colour, marker)), (prefix, style, name) in itertools.product(METHOD_STYLES.items(), whens):
            rows = part[part.method == method].dropna(subset=f"{prefix}loss")
            by_seed = rows.groupby(["threshold", "seed"]).mean(numeric_only=True).groupby("threshold")
            mean, spread = by_seed.mean().sort_values("dilution"), 100 * by_seed[f"{prefix}loss"].std()
            style = style | {"marker": marker, "ms": 4.5, "color": colour, "label": None if prefix else method}
            for axis, what in ((upper, "accuracy"), (lower, "loss")):
                heights, error = 100 * mean[f"{prefix}{what}"], spread.reindex(mean.index)
                axis.errorbar(mean.dilution, heights, None if error.isna().all() else error, capsize=2, **style)
            if method == "andc" and len(rows):  # scored on all test images
                level = 100 * (rows[f"{prefix}accuracy"] + rows[f"{prefix}loss"]).mean()
                upper.axhline(level, color="grey", lw=0.8, ls=style["ls"], label=name)
        lower.axhline(0.5, color="grey", lw=0.8)
        smallest = 0.1 * math.floor(10 * part.dilution.min())  # a classifier is hardly ever diluted a little
        lower.set(xlabel=f"dilution of the {titles[layers]}", xlim=(smallest, 1.02))
    again = table[table.layers.isin(("ff", "filters"))].retrained_loss  # a classifier's loss may leave the picture
    highest = again.max() if again.notna().any() else table.groupby("method").loss.min().max()
    if table.retrained_loss.notna().any():
        axes[0, 0].plot([], [], "o--", ms=4.5, mfc="white", color="grey", label="retrained")
    axes[0, 0].set(ylabel="test accuracy (%)", ylim=(0, None))
    axes[1, 0].set(ylabel="accuracy lost (points)\ngrey line: C4's half point", ylim=(-1, max(5, 110 * highest)))
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return _stamped(figure, data, data, table)


@in_style(PLAIN)
def head_map(table: pd.DataFrame, classes: tuple[str, ...], data: str, place: str, longest: int = 25) -> Figure:
    """How many nodes of each head (columns) recognise the labels that a head owns (one panel a head, at most `longest`
    labels by name); below, small, the same for nodes randomly reassigned to heads: any table so ordered has steps
    (`experiment.heads.head_counts`)."""
    heads, most = table["head"].nunique(), table["count"].max()
    size = (max(8.5, 2.2 * heads), 6.4)
    figure, axes = plt.subplots(2, heads, figsize=size, squeeze=False, height_ratios=[4, 1])
    for row, (which, part) in enumerate(table.groupby("nodes", sort=False)):
        counts = part.pivot(index="head", columns="label", values="count")
        owner = counts.idxmax().where(counts.max() > 0, -1)
        for head, axis in enumerate(axes[row]):
            own = counts.loc[:, owner == head].T.sort_values(head, ascending=False)
            shown = own.iloc[:longest] if row == 0 else own
            style = {"cmap": "viridis", "vmin": 0, "vmax": most, "aspect": "auto"}
            values = shown.to_numpy() if len(shown) else np.full((1, heads), np.nan)
            image = axis.imshow(values, **style)
            names = [plain(classes[label], 16) for label in shown.index] if row == 0 else []
            axis.set_yticks(range(len(names)), names, fontsize=7.5)
            axis.set_xticks(range(heads), range(heads) if heads <= 8 else [""] * heads, fontsize=8)
            rest = f", first {len(shown)}" if len(shown) < len(own) else ""
            axis.set_title(f"head {head}: {len(own)} labels{rest}", fontsize=8)
        axes[row, 0].set_ylabel(f"nodes {which}" if row == 0 else which)
    figure.supxlabel("head whose nodes recognise the label", fontsize=9)
    figure.colorbar(image, ax=axes, label="nodes", shrink=0.5)
    return _stamped(figure, f"{data}, {place}: labels by owner", data)


@in_style(PLAIN)
def head_matrices(table: pd.DataFrame, data: str, place: str) -> Figure:
    """For how many of a head's nodes an image of one label (row) makes another label (column) answer; labels ordered by
    owner, a head's own framed; encoders, and those with random weights, are rows (`experiment.division.head_matrices`,
    `experiment.heads.head_matrices`)."""
    groups, heads = list(table.groupby(["network", "encoder"], sort=False)), sorted(table["head"].unique())
    size = (0.6 + 2.2 * len(heads), 0.4 + 2.4 * len(groups))
    figure, axes = plt.subplots(len(groups), len(heads), figsize=size, squeeze=False, dpi=72)
    for row, ((network, encoder), rows) in zip(axes, groups, strict=True):
        for axis, head in zip(row, heads, strict=True):
            part = rows[rows["head"] == head]
            matrix = part.drop(columns=["network", "encoder", "head", "owned"]).to_numpy()
            low, high = np.quantile(matrix, [0.01, 0.995])
            axis.imshow(matrix, cmap="viridis", vmin=low, vmax=high, interpolation="nearest")
            own = np.flatnonzero(part.owned)
            if len(own):
                corner = own[0] - 0.5
                axis.add_patch(plt.Rectangle((corner, corner), len(own), len(own), fill=False, ec="white", lw=1.5))
            axis.set(xticks=[], yticks=[], title=f"encoder {encoder}, head {head}: {len(own)} own labels")
        row[0].set_ylabel("shown label" + ", random weights" * (network == "random"))
    axes[-1, 0].set_xlabel("answered label")
    return _stamped(figure, f"{data}, {place}; labels by owner, own labels framed", data)


def lost_by_owner(labels: pd.DataFrame) -> pd.DataFrame:
    """Accuracy lost (points) on each owner's labels (columns) without each head (rows), mean over labels and seeds, in
    one encoder of `experiment.heads.head_division`; owners by held-out images."""
    part = labels[labels.network == "trained"]
    own = part[part.owner_unseen.astype(bool)].set_index(["seed", "label"])["head"].rename("owned_by")
    owned = part.merge(own, left_on=["seed", "label"], right_index=True)
    return 100 * owned.groupby(["head", "owned_by"]).ablation_drop.mean().unstack()


@in_style(STYLE)
def head_experts(labels: pd.DataFrame, data: str, encoder: int) -> Figure:
    """Are owners experts? Margins of the owners; accuracy of the own head alone against the best other head; accuracy
    lost on each owner's labels by each head's ablation. One encoder, all seeds (`experiment.heads.head_division`)."""
    part = labels[(labels.encoder == encoder) & (labels.network == "trained")]
    counts = np.sort(part.pivot(index=["seed", "label"], columns="head", values="count").to_numpy(), axis=1)
    margins = (counts[:, -1] - (counts[:, -2] if counts.shape[1] > 1 else 0))[counts[:, -1] > 0]
    own = part[part.owner_unseen.astype(bool)].set_index(["seed", "label"])
    others = part[~part.owner_unseen.astype(bool)].groupby(["seed", "label"]).alone_accuracy.max().reindex(own.index)
    lost = lost_by_owner(part)
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    axes[0].hist(margins, bins=np.arange(margins.max() + 2) - 0.5, color=COLOURS[0])
    every = f"labels ({part.seed.nunique()} x {part.label.nunique()})"
    axes[0].set(xlabel="margin of the owner (nodes; 0: tied)", ylabel=every)
    axes[1].scatter(100 * others, 100 * own.alone_accuracy, 12, COLOURS[0], alpha=0.5)
    axes[1].axline((0, 0), slope=1, color="grey", ls=":")
    axes[1].set(xlabel="best other head alone (%)", ylabel="own head alone (%)")
    share = f"{(own.alone_accuracy > others).mean():.0%} above the line, by chance {1 / part['head'].nunique():.0%}"
    axes[1].annotate(share, (0.5, 1.02), xycoords="axes fraction", ha="center", fontsize=8)
    axes[2].grid(False)
    image = points_matrix(axes[2], lost, np.abs(lost).max().max(), "{:.1f}", fontsize=7)
    axes[2].set(xlabel="owner of the labels", xticks=range(lost.shape[1]), xticklabels=lost.columns)
    axes[2].set(ylabel="silenced head", yticks=range(lost.shape[0]), yticklabels=lost.index)
    figure.colorbar(image, ax=axes[2], label="accuracy lost (points)")
    return _stamped(figure, f"{data}, encoder {encoder}", data, part)


@in_style(STYLE)
def cooperation(table: pd.DataFrame, data: str) -> Figure:
    """How well sets of nodes of a head recognise the head's own labels, and which of these it is, against their number;
    grey: random groups of nodes; dotted: single nodes added up. First, middle and last encoder."""
    every = sorted(table.encoder.unique())
    encoders = sorted({every[0], every[(len(every) - 1) // 2], every[-1]})
    figure, axes = plt.subplots(2, len(encoders), figsize=(8.4, 4.6), sharex=True, sharey="row", squeeze=False)
    for column, encoder in enumerate(encoders):
        for nodes, colour, whose in (("dealt", "grey", "random group"), ("head", COLOURS[1], "head")):
            sizes = table[(table.encoder == encoder) & (table.nodes == nodes)].groupby("size")
            mean, spread = (100 * part for part in (sizes.mean(numeric_only=True), sizes.std(numeric_only=True)))
            for axis, name in zip(axes[:, column], ("own", "choice"), strict=True):
                axis.errorbar(mean.index, mean[name], spread[name], fmt="o-", ms=3, color=colour, label=whose)
            axes[0, column].plot(mean.index, mean.singles, ":", color=colour)
        axes[1, column].set_xscale("log", base=4, subs=[])
        axes[1, column].set(xlabel=f"nodes of encoder {encoder}", xticks=mean.index, xticklabels=mean.index)
    axes[0, 0].plot([], [], ":", color="grey", label="single nodes\nadded up")
    axes[0, 0].set(ylabel="own labels recognised (%)", ylim=(0, 115 * table.own.max()))
    axes[1, 0].set(ylabel="own above other own (%)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", title="nodes of a")
    return _stamped(figure, f"{data}, attn nodes, bars: deviation over draws", data, table)


@in_style(PLAIN)
def attention_maps(table: pd.DataFrame, data: str, place: str) -> Figure:
    """Attention received by each token, image-shaped: own labels, other labels and their difference, for every head of
    the encoders in the table (`experiment.heads.attention_maps`)."""
    shown = table.pivot_table(index=["encoder", "head", "token"], columns="labels", values="attention", dropna=False)
    shown = shown.reindex(columns=["own", "other"]).assign(difference=lambda t: t.own - t.other)
    groups = list(shown.groupby(level=[0, 1]))
    side = round(len(groups[0][1]) ** 0.5)
    figure, axes = plt.subplots(3, len(groups), figsize=(1.2 + 1.1 * len(groups), 3.6), squeeze=False)
    for column, ((encoder, head), part) in enumerate(groups):
        for row, which in enumerate(shown.columns):
            values = part[which].to_numpy().reshape(side, side)
            top = shown[which].abs().max() if which == "difference" else shown[["own", "other"]].max().max()
            style = {"cmap": "RdBu_r", "vmin": -top} if which == "difference" else {"cmap": "viridis", "vmin": 0}
            image = axes[row, column].imshow(values, vmax=top, **style)
            axes[row, column].set(xticks=[], yticks=[])
            if column == len(groups) - 1:
                figure.colorbar(image, ax=axes[row, :], shrink=0.8)
        axes[0, column].set_title(f"encoder {encoder}\nhead {head}", fontsize=7)
    for axis, which in zip(axes[:, 0], ("own labels", "other labels", "difference"), strict=True):
        axis.set(ylabel=which)
    return _stamped(figure, f"{data}, {place}: attention received", data)


@in_style(STYLE)
def head_specialisation(encoders: pd.DataFrame, data: str) -> Figure:
    """Excess specialisation and the ablation gap with its null along the encoders (second table of
    `experiment.heads.head_division`)."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 2.8))
    trained = encoders[encoders.network == "trained"]
    for kind, line, colour in (("trained", "o-", "#D55E00"), ("random", "x--", "grey")):
        part = encoders[encoders.network == kind]
        _curve(left, part, "excess", 1, line, colour)
        left.plot([], [], line, ms=4, color=colour, label=kind)
    null = trained.groupby("encoder")[["null_low", "null_high", "null_mean"]].mean()
    band = {"fc": "none", "ec": "black", "hatch": "////", "lw": 0, "label": "95 % of permutations"}
    left.fill_between(null.index, null.null_low - null.null_mean, null.null_high - null.null_mean, **band)
    left.set(xlabel="encoder", ylabel="specialisation above\npermutation mean (nats)")
    _curve(right, trained, "gap", 100, "o-", "#D55E00")
    _curve(right, trained, "gap_null_high", 100, ":", "black")
    left.plot([], [], ":", color="black", label="97.5 % of reassigned owners")
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    right.set(xlabel="encoder", ylabel="lost without the head: own\nminus other labels (points)")
    return _stamped(figure, data, data, encoders)


@in_style(STYLE)
def along_depth(taps: pd.DataFrame, data: str) -> Figure:
    """Accuracy, raw and centred SNR of each tap along the encoders (table `taps` of `experiment.measure` at one
    threshold): trained; dotted: the same with rotated nodes; dashed: random weights."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3))
    panels = (("accuracy", 100, False), ("snr", 1, False), ("snr", 1, True))
    known = [tap for tap in ("ff1", "attn", "block", "conv") if tap in set(taps.tap)]
    shown = dict(zip(sorted(set(taps.tap) - set(known)), COLOURS[4:], strict=False))  # of networks of others
    shown = {tap: TAP_COLOURS[tap] for tap in known} | shown
    for axis, (column, scale, centred) in zip(axes, panels, strict=True):
        for tap, colour in shown.items():
            part = taps[(taps.tap == tap) & (taps.centred == centred)]
            native = part[part.basis == "native"]
            _curve(axis, native[native.network == "trained"], column, scale, "o-", colour)
            _curve(axis, native[native.network == "random"], column, scale, "x--", colour)
            if column == "snr":
                rotated = part[(part.basis != "native") & (part.network == "trained")]
                _curve(axis, rotated, column, scale, ":", colour)
        axis.set(xlabel="encoder" if {*known} - {"conv"} else "layer")
    axes[0].set(ylabel="readout accuracy (%)", ylim=(0, None))
    axes[1].set(ylabel="SNR")
    axes[2].set(ylabel="centred SNR")
    for tap, colour in shown.items():
        axes[0].plot([], [], "o-", ms=4, color=colour, label=tap)
    for line, name in (("-", "trained"), (":", "rotated nodes"), ("--", "random weights")):
        axes[0].plot([], [], line, color="grey", label=name)
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return _stamped(figure, data, data, taps)


def probed(table: pd.DataFrame, data: str) -> Figure:
    """The table of `probe.probe` as `along_depth` draws it: the network, its rotated nodes and its null."""
    rows = table.assign(
        encoder=table.tap.map(encoder_of), tap=table.tap.str.partition(".")[2], seed=0,
        network=table.network.map({"network": "trained", "null": "random"}),
    )  # fmt: skip
    parts = [
        rows.assign(snr=rows[f"{column}{suffix}"], centred=centred, basis=basis)
        for column, centred in (("snr", False), ("centred", True))
        for suffix, basis in (("", "native"), ("_rotated", "rotated"))
    ]
    return along_depth(pd.concat(parts), data)


@in_style(STYLE)
def heads_along_depth(tables: dict[str, pd.DataFrame], data: str) -> Figure:
    """Do heads divide the labels, does silencing one cost its own labels, is a head expert among them: the tables of
    `experiment.division` along the encoders, beside their nulls."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(9, 3))
    encoders = tables["encoders"][tables["encoders"].fold == -1]
    rotated = encoders[encoders.basis.str.startswith("rotated") & (encoders.network == "trained")]
    native = encoders[encoders.basis == "native"]
    for part, line, colour, name in (
        (native[native.network == "trained"], "o-", COLOURS[1], "heads"),
        (rotated, ":", COLOURS[1], "rotated nodes"),
        (native[native.network == "random"], "x--", "grey", "random weights"),
    ):
        _curve(left, part, "excess", 1, line, colour)
        left.plot([], [], line, ms=4, color=colour, label=name)
    left.set(xlabel="encoder", ylabel="specialisation above\npermuted nodes (nats)")
    ablation = tables["ablation"][tables["ablation"].fold == -1]
    turned = ablation[ablation.owners.str.startswith("rotated")]
    for part, column, line, colour in (
        (ablation[ablation.owners == "native"], "gap", "o-", COLOURS[1]),
        (turned, "gap", ":", COLOURS[1]),
        (ablation[ablation.owners == "best"], "gap", "^-", COLOURS[2]),
        (ablation[ablation.owners == "native"], "chance", "--", "black"),
    ):
        _curve(middle, part, column, 100, line, colour)
    middle.plot([], [], "^-", ms=4, color=COLOURS[2], label="owners by silencing itself")
    middle.plot([], [], "--", color="black", label="owners reassigned")
    middle.set(xlabel="encoder", ylabel="lost without the head: own\nminus other labels (points)")
    whole = tables["cooperation"].query("whole and fold == -1")
    for nodes, line, colour in (("head", "o-", COLOURS[1]), ("dealt", "s--", COLOURS[0])):
        _curve(right, whole[whole.nodes == nodes], "choice", 100, line, colour)
    right.plot([], [], "s--", ms=4, color=COLOURS[0], label="as many nodes of all heads")
    right.set(xlabel="encoder", ylabel="own label above other\nown labels (%)")
    figure.legend(loc="outside lower center", ncols=6, fontsize=8)
    return _stamped(figure, data, data, encoders)


@in_style(PLAIN)
def silenced_heads(table: pd.DataFrame, data: str) -> Figure:
    """Accuracy lost (points) on each owner's labels (columns) by silencing each head (rows), mean over labels and
    seeds, first and last encoder (`experiment.division.silenced`)."""
    ends = {encoder: table[table.encoder == encoder] for encoder in sorted({table.encoder.min(), table.encoder.max()})}
    lost = {
        encoder: 100 * part.pivot_table(index="head", columns="owner", values="drop") for encoder, part in ends.items()
    }
    top = max(np.nanmax(np.abs(part.to_numpy())) for part in lost.values()) or 1.0
    figure, axes = plt.subplots(1, len(lost), figsize=(3.9 * len(lost), 3.2), squeeze=False)
    for axis, (encoder, part) in zip(axes[0], lost.items(), strict=True):
        image = points_matrix(axis, part, top, "{:.2f}", fontsize=8)
        axis.set(title=f"encoder {encoder}", xlabel="owner of the labels", ylabel="silenced head")
        axis.set(xticks=range(part.shape[1]), xticklabels=part.columns, yticks=range(len(part)), yticklabels=part.index)
    figure.colorbar(image, ax=axes, label="accuracy lost (points)")
    return _stamped(figure, data, data, table)


@in_style(PLAIN)
def kept_connections(sets: dict[str, Tensor], classes: tuple[str, ...], data: str, shown: int = 14) -> Figure:
    """What ANDC keeps of a readout: nodes, name -> (L,) bool, the labels that each recognises, and some labels, those
    of most nodes first; a coloured line for a connection that stays, a grey one for one that is removed."""
    recognised = torch.stack([*sets.values()])
    labels = recognised.sum(dim=0).sort(descending=True, stable=True).indices[:shown].tolist()
    figure, axis = plt.subplots(figsize=(6.4, 4))
    heights = np.linspace(len(labels) - 1.5, 0.5, len(sets)) if len(sets) > 1 else [(len(labels) - 1) / 2]
    for (name, own), height, colour in zip(sets.items(), heights, itertools.cycle(COLOURS), strict=False):
        for place, label in enumerate(reversed(labels)):
            stays = bool(own[label])
            style = {"color": colour, "lw": 1.6, "zorder": 2} if stays else {"color": "0.85", "lw": 0.7, "zorder": 1}
            axis.plot([0, 1], [height, place], **style)
        axis.plot(0, height, "o", ms=9, color=colour, zorder=3)
        text = f"{name}:\n{int(own.sum())} of {len(own)} connections stay"
        axis.text(-0.05, height, text, ha="right", va="center", fontsize=8)
    for place, label in enumerate(reversed(labels)):
        axis.plot(1, place, "s", ms=5, color="black", zorder=3)
        axis.text(1.04, place, plain(classes[label], 24), va="center", fontsize=8)
    axis.set(xlim=(-0.75, 1.6))
    axis.axis("off")
    return _stamped(figure, f"{data}: nodes and {len(labels)} of {len(classes)} labels", data)


@in_style(STYLE)
def pruned_readouts(table: pd.DataFrame, data: str) -> Figure:
    """Accuracy lost against the share of pruned connections of a readout (`experiment.readings`), solved anew (filled)
    and right after pruning (open), for ANDC and every control; one panel a tap."""
    names = {"block": "all tokens of the last encoder", "seqpool": "what the classifier reads"}
    kinds = list(dict.fromkeys(table.tap))
    figure, axes = plt.subplots(1, len(kinds), figsize=(1 + 3.6 * len(kinds), 3), squeeze=False)
    for axis, tap in zip(axes[0], kinds, strict=True):
        for method in METHODS:
            rows = table[(table.tap == tap) & (table.method == method)].groupby("threshold")
            mean, (colour, marker) = rows.mean(numeric_only=True), METHOD_STYLES[method]
            axis.plot(mean.dilution, 100 * mean.retrained_loss, marker + "-", ms=5, color=colour, label=method)
            axis.plot(mean.dilution, 100 * mean.loss, marker + ":", ms=4, mfc="none", color=colour, alpha=0.6)
        _points_lost(axis)
        axis.set(xlabel="connections removed", title=names.get(tap, tap))
    axes[0, 0].set(ylabel="accuracy lost (points)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    return _stamped(figure, f"{data}, filled: solved anew; line: half a point", data, table)


@in_style(STYLE)
def removed_connections(table: pd.DataFrame, data: str, tap: str = "block") -> Figure:
    """Why pruning costs what it costs (`experiment.readings`): accuracy lost by ANDC right after pruning, with the
    means of what was removed given back as biases, and solved anew (left); how much of what removed connections say is
    alike for all images (right)."""
    own = table[table.tap == tap]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3))
    andc = own[own.method == "andc"].groupby("threshold").mean(numeric_only=True)
    stages = (
        ("loss", "o:", "right after"),
        ("returned_loss", "s--", "means given back"),
        ("retrained_loss", "o-", "solved anew"),
    )
    for column, line, name in stages:
        left.plot(andc.dilution, 100 * andc[column], line, ms=5, color=METHOD_STYLES["andc"][0], label=name)
    _points_lost(left)
    left.set(xlabel="connections removed", ylabel="accuracy lost by ANDC (points)")
    left.legend(fontsize=8)
    for method in METHODS:
        mean = own[own.method == method].groupby("threshold").mean(numeric_only=True)
        colour, marker = METHOD_STYLES[method]
        right.plot(mean.dilution, 100 * mean.constant, f"{marker}-", ms=5, color=colour, label=method)
    right.set(xlabel="connections removed", ylabel="removed: alike for all inputs (%)", ylim=(0, None))
    right.legend(fontsize=8)
    return _stamped(figure, f"{data}, readout of {tap}: what is removed", data, own)


@in_style(STYLE)
def late_layers(table: pd.DataFrame, data: str) -> Figure:
    """Accuracy lost by pruned late layers against the epochs that they and what follows are trained on
    (`experiment.late`), mean and spread over seeds; one panel for each part that is pruned."""
    parts = list(table.groupby(["encoders", "reading"], sort=False))
    figure, axes = plt.subplots(1, len(parts), figsize=(1.6 + 1.7 * len(parts), 2.8), squeeze=False, sharey=True)
    lengths = sorted(table.epochs.unique())
    styles = {**METHOD_STYLES, "removed": (COLOURS[1], "P")}
    for axis, ((encoders, reading), part) in zip(axes[0], parts, strict=True):
        part = part.assign(place=part.epochs.map(lengths.index))
        for method, (colour, marker) in styles.items():
            _curve(axis, part[part.method == method], "loss", 100, f"{marker}-", colour, "place")
        removed = part[part.method == "andc"].dilution.mean()
        title = f"{verdicts.pruned_part(reading, encoders)}\n{removed:.0%} removed"
        axis.set(xticks=range(len(lengths)), xticklabels=lengths, xlabel="epochs", title=title)
        _points_lost(axis)
    axes[0, 0].set(ylabel="accuracy lost (points)")
    for method, (colour, marker) in styles.items():
        name = {"removed": "layer removed"}.get(method, method)
        axes[0, 0].plot([], [], f"{marker}-", ms=5, color=colour, label=name)
    figure.legend(loc="outside right center", fontsize=8)
    return _stamped(figure, f"{data}, retrained; line: half a point", data, table)


@in_style(STYLE)
def predicted_sets(table: pd.DataFrame, data: str, tap: str = "block") -> Figure:
    """Accuracy of random sets of a tap's nodes: predicted from single nodes against measured (left), and the errors of
    prediction and of a curve that knows the size (right), sets of each size (`experiment.sets`)."""
    own = table[(table.tap == tap) & (table.network == "trained") & (table.basis == "native")]
    figure, (left, right) = plt.subplots(1, 2, figsize=(7, 3))
    sizes = sorted(own["size"].unique())
    for number, size in enumerate(sizes):
        part, colour = own[own["size"] == size], plt.get_cmap("viridis")(number / max(1, len(sizes) - 1))
        left.plot(100 * part.measured, 100 * part.predicted, "o", ms=3, alpha=0.6, color=colour, label=size)
    top = 100 * own[["measured", "predicted"]].max().max()
    left.plot([0, top], [0, top], color="grey", lw=0.8)
    left.set(xlabel="measured accuracy (%)", ylabel="predicted from single nodes (%)")
    left.legend(title="nodes", fontsize=7)
    for column, line, name in (("predicted", "o-", "single nodes"), ("size_only", "s--", "their number")):
        error = 100 * (own[column] - own.measured).abs().groupby(own["size"]).mean()
        right.plot(range(len(error)), error, line, ms=4, label=name)
    right.set(xlabel="nodes in a set", ylabel="mean error (points)", xticks=range(len(sizes)), xticklabels=sizes)
    right.legend(title="predicted by", fontsize=8)
    return _stamped(figure, f"{data}, sets of nodes of {tap}", data, own)


def points_matrix(
    axis, table: pd.DataFrame, top: float, number: str, fontsize: float | None = None, aspect: str = "equal"
) -> AxesImage:
    """Draw a table of points, from -top to top, and where there are few their numbers."""
    for row, column in itertools.product(*map(range, table.shape)) if table.size <= 64 else ():
        value = table.iloc[row, column]
        style = {"ha": "center", "va": "center", "color": "white" if abs(value) > 0.6 * top else "black"}
        axis.text(column, row, number.format(value), fontsize=fontsize, **style)
    return axis.imshow(table, cmap="RdBu_r", vmin=-top, vmax=top, aspect=aspect)


def _points_lost(axis) -> None:
    """An axis for lost accuracy, from tenths of a point to a hundred, with C4's half point as a line."""
    axis.set_yscale("symlog", linthresh=1)
    axis.yaxis.set_major_locator(FixedLocator([-10, -3, -1, -0.5, 0, 0.5, 1, 3, 10, 30, 100]))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.axhline(0.5, color="grey", lw=0.8)


def _curve(axis, rows: pd.DataFrame, column: str, scale: float, line: str, colour, x: str = "encoder") -> None:
    """Mean over seeds against the encoder, with a band of one standard deviation where there are several seeds."""
    grouped = rows.groupby(x)[column]
    mean, spread = scale * grouped.mean(), scale * grouped.std().fillna(0)
    axis.plot(mean.index, mean, line, ms=4, color=colour)
    if (spread > 0).any():
        axis.fill_between(mean.index, mean - spread, mean + spread, color=colour, alpha=0.2, lw=0)


def plain(name: str, longest: int = 40) -> str:
    """A name as matplotlib should draw it: one line, not endless, and dollar signs are text, not mathematics."""
    shown = "".join(character if character.isprintable() else " " for character in name)
    return (shown if len(shown) <= longest else shown[: longest - 1] + "…").replace("$", r"\$")


def _stamped(figure: Figure, title: str, data: str, table: pd.DataFrame | None = None) -> Figure:
    """The title, with the number of seeds in the table, and whole numbers for encoders and epochs."""
    for axis in figure.axes:
        if axis.get_xlabel() in ("encoder", "layer", "epoch"):
            axis.xaxis.get_major_locator().set_params(integer=True, nbins=8)
    title += f", n = {table.seed.nunique()} seed{'s' * (table.seed.nunique() > 1)}" if table is not None else ""
    suffix = " — demonstration, not evidence" if data in EMBEDDED else ""
    figure.suptitle(plain(title + suffix, 200), fontsize=9)
    return figure
