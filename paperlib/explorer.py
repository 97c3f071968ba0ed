"""Nodes and heads by hand: widgets on what the walk has measured, and the same picture where no kernel runs.

Field matrices are large and not committed with a profile's results: where they are not at hand, typical and extreme
nodes of three encoders are (`experiment.nodes.examples`). Everything is read once; a new choice only draws.
"""

import io
import os
from collections.abc import Callable

import ipywidgets as widgets
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Image
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter
from torch import Tensor

from paperlib import experiment, snp
from paperlib.data import Images
from paperlib.experiment.store import Run
from paperlib.figures import COLOURS, STYLE, by_cluster, in_style, plain
from paperlib.heads import labels_by_owner

SHOWN = 24  # labels of a node or head that are shown by name


def live() -> bool:
    """Whether somebody can move a slider: not in a headless walk or a test."""
    return "PAPERLIB_HEADLESS" not in os.environ


def known_fields(run: Run, seed: int) -> dict[str, dict[int, Tensor]]:
    """Tap name -> node -> field matrix (L, L): all nodes measured for every seed, or the examples."""
    source = experiment.nodes.readout(run, seed, "trained")
    # a committed stage has no large files, but they may have been made again
    folders = (source.folder, run.stages / source.folder.parent.name / source.folder.name)
    if any((folder / "fields_test.safetensors").exists() for folder in folders):
        fields = source.tensors("fields_test")
        return {tap: dict(enumerate(part)) for tap, part in fields.items() if tap.split(".")[1] in run.settings.taps}
    found: dict[str, dict[int, Tensor]] = {}
    for kind in ("attn", "block"):
        examples = experiment.nodes.examples(run, seed, kind)
        fields = examples.arrays("fields")
        for row in examples.table("examples").itertuples():
            found.setdefault(f"{row.encoder}.{kind}", {})[row.node] = fields[f"{row.encoder}/{row.which}"]
    return found


def node_canvas(images: Images) -> Callable[[Tensor, float, Tensor, str], bytes]:
    """A function that draws one node as PNG: (field matrix (L, L), threshold, numbers of test images, a line to stand
    below) -> bytes. It keeps its axes, so that a picture takes well under a tenth of a second."""
    labels = len(images.classes)
    shown = min(SHOWN, labels)
    with in_style({**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(9.6, 4.4), dpi=80)
        canvas = FigureCanvasAgg(figure)
        left, middle = (figure.add_axes([x, 0.24, 0.31, 0.68]) for x in (0.03, 0.47))
        small = [figure.add_axes([0.82 + 0.09 * (i % 2), 0.6 - 0.36 * (i // 2), 0.085, 0.28]) for i in range(4)]
    field_image = left.imshow(np.zeros((labels, labels)), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    boolean_image = middle.imshow(np.zeros((shown, shown)), cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    left.set(xticks=[], yticks=[], xlabel="output label", ylabel="input label")
    left.set_title("field / maximum", fontsize=9)
    middle.set_title("Boolean matrix, clusters framed", fontsize=9)
    middle.set(xticks=range(shown), yticks=range(shown))
    middle.tick_params(labelsize=6, length=0)
    middle.tick_params(axis="x", labelrotation=90)
    size = images.x_test.shape[-1]
    pictures = [axis.imshow(np.zeros((size, size, 3), dtype=np.uint8)) for axis in small]
    for axis in small:
        axis.set(xticks=[], yticks=[])
    frames: list[PatchCollection] = []
    below = figure.text(0.03, 0.02, "", fontsize=9)

    def draw(field: Tensor, threshold: float, drivers: Tensor, line: str = "") -> bytes:
        below.set_text(line)
        boolean = snp.boolean_matrices(field[None], threshold)[0]
        clusters = snp.label_clusters(boolean)
        order = by_cluster(clusters, labels)
        field_image.set_data((field / field.max().clamp(min=1e-30))[order][:, order].numpy())
        boolean_image.set_data(boolean[order][:, order][:shown, :shown].float().numpy())
        names = [plain(images.classes[label]) for label in order[:shown]]
        for axis in (middle.xaxis, middle.yaxis):
            axis.set_major_formatter(FixedFormatter(names))
        _frame(frames, (left, middle), clusters)
        middle.set(xlim=(-0.5, shown - 0.5), ylim=(shown - 0.5, -0.5))
        left.set(xlim=(-0.5, labels - 0.5), ylim=(labels - 0.5, -0.5))
        for axis, picture, number in zip(small, pictures, drivers.tolist(), strict=False):
            picture.set_data(images.x_test[number].permute(1, 2, 0).numpy())
            axis.set_title(plain(images.classes[images.y_test[number]][:14]), fontsize=7)
        return _png(canvas)

    return draw


def nodes(run: Run) -> widgets.Widget | Image:
    """Choose an encoder, a tap, a node and a threshold -> its matrices by cluster, statistics, and the test images that
    drive it; first seed. Without a kernel: the picture of the first choice."""
    seed = run.settings.seeds[0]
    fields, drivers = known_fields(run, seed), experiment.nodes.driving_images(run, seed).arrays("images")
    draw = node_canvas(run.images)
    taps = sorted(fields, key=lambda tap: (-int(tap.split(".")[0]), tap.split(".")[1]))
    threshold = run.settings.threshold
    if not live():
        node = _typical(fields[taps[0]], threshold)
        line = _described(taps[0], fields[taps[0]], node, threshold)
        return Image(draw(fields[taps[0]][node], threshold, drivers[taps[0]][node], line))
    tap = widgets.Dropdown(options=taps, description="tap")
    node = widgets.SelectionSlider(options=list(fields[taps[0]]), description="node")
    level = widgets.FloatSlider(threshold, min=0.05, max=0.95, step=0.05, description="threshold")
    picture, text = widgets.Image(format="png"), widgets.HTML()

    def show(_=None) -> None:
        part, number = fields[tap.value], node.value
        picture.value = draw(part[number], level.value, drivers[tap.value][number])
        text.value = _described(tap.value, part, number, level.value)

    def other_tap(_) -> None:
        node.options = list(fields[tap.value])
        node.value = _typical(fields[tap.value], level.value)
        show()

    tap.observe(other_tap, "value")
    for control in (node, level):
        control.observe(show, "value")
    other_tap(None)
    return widgets.VBox([widgets.HBox([tap, node, level]), picture, text])


def _typical(fields: dict[int, Tensor], threshold: float) -> int:
    found = snp.node_statistics(snp.boolean_matrices(torch.stack(list(fields.values())), threshold))
    return list(fields)[snp.chosen_nodes(found)["typical"]]


def _described(tap: str, fields: dict[int, Tensor], node: int, threshold: float) -> str:
    """One line: what the threshold makes of a node, and of all nodes of its tap, or of the examples of a stored run."""
    own = snp.node_statistics(snp.boolean_matrices(fields[node][None], threshold))
    found = snp.tap_statistics(snp.boolean_matrices(torch.stack(list(fields.values())), threshold))
    whose = f"All {len(fields)} nodes" if list(fields) == list(range(len(fields))) else f"These {len(fields)} examples"
    return (
        f"{tap}, threshold {threshold:.2f}. Node {node}: {own.labels.item()} labels in {own.clusters.item()} clusters, "
        f"noise {own.internal.item()} inside and {own.external.item()} outside. {whose}: SNR "
        f"{found.snr:.2f}, {found.clusters_per_node:.2f} clusters of {found.pooled_cluster_size:.2f} labels"
    )


def head_canvas(run: Run, seed: int, labels: pd.DataFrame) -> Callable[[int, int], bytes]:
    """A function that draws one head as PNG: (encoder, head) -> bytes. Left: how many of its nodes answer the output
    label to the input label, labels ordered by owner; right: its own labels, and the best other head's count.

    labels: the first table of `experiment.heads.head_division`, of this trained network alone.
    """
    booleans = experiment.nodes.matrices(run, seed, "trained").arrays("matrices")
    heads = int(labels["head"].max()) + 1
    matrices = {
        encoder: booleans[f"{encoder}.attn"].unflatten(0, (heads, -1)).sum(dim=1) for encoder in labels.encoder.unique()
    }
    classes = run.images.classes
    with in_style({**STYLE, "axes.grid": False, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(9.6, 4.4), dpi=80)
        canvas = FigureCanvasAgg(figure)
        left, right = figure.add_axes([0.05, 0.1, 0.4, 0.8]), figure.add_axes([0.55, 0.3, 0.43, 0.6])
    shown = left.imshow(np.zeros((len(classes), len(classes))), cmap="viridis", interpolation="nearest")
    left.set(xticks=[], yticks=[], xlabel="output label, by owner", ylabel="input label, by owner")
    frame = left.add_patch(plt.Rectangle((0, 0), 1, 1, fill=False, ec="white"))

    def draw(encoder: int, head: int) -> bytes:
        part = labels[labels.encoder == encoder]
        counts = part.pivot(index="head", columns="label", values="count").to_numpy()
        owner = part[part.owner].set_index("label")["head"]
        owners = [int(owner.get(label, heads)) for label in range(len(classes))]
        order = labels_by_owner(torch.tensor(counts))
        own = [label for label in order if owners[label] == head]
        shown.set_data(matrices[encoder][head][order][:, order].numpy())
        shown.autoscale()
        start = sum(owned < head for owned in owners) - 0.5
        frame.set_bounds(start, start, len(own), len(own))
        most = int(matrices[encoder][head].max())
        left.set_title(f"encoder {encoder}, head {head}: nodes (0 to {most}); own labels framed", fontsize=9)
        right.clear()
        others = np.delete(counts, head, axis=0).max(axis=0) if heads > 1 else np.zeros(len(classes))
        best = own[:SHOWN]
        right.bar(range(len(best)), counts[head, best], color=COLOURS[head % len(COLOURS)], label=f"head {head}")
        right.plot(range(len(best)), others[best], "k_", label="best other head")
        right.set_xticks(range(len(best)), [plain(classes[label]) for label in best], rotation=90, fontsize=6)
        right.set_title(f"owns {len(own)} labels, {len(best)} shown", fontsize=9)
        right.set_ylabel("nodes that recognise the label", fontsize=8)
        right.legend(fontsize=7)
        return _png(canvas)

    return draw


def heads(run: Run) -> widgets.Widget | Image:
    """Choose an encoder and a head -> its matrix, labels and margins; first seed. Without a kernel: the last encoder's
    first head."""
    seed = run.settings.seeds[0]
    labels, _, _ = experiment.heads.head_division(run)
    labels = labels[(labels.network == "trained") & (labels.seed == seed)]
    draw = head_canvas(run, seed, labels)
    last, count = int(labels.encoder.max()), int(labels["head"].max()) + 1
    if not live():
        return Image(draw(last, 0))
    encoder = widgets.IntSlider(last, min=1, max=last, description="encoder")
    head = widgets.IntSlider(0, min=0, max=count - 1, description="head")
    picture = widgets.Image(value=draw(last, 0), format="png")

    def show(_) -> None:
        picture.value = draw(encoder.value, head.value)

    for control in (encoder, head):
        control.observe(show, "value")
    return widgets.VBox([widgets.HBox([encoder, head]), picture])


def turning(
    run: Run, table: pd.DataFrame, readout: tuple[Tensor, Tensor], way: Tensor, node: int
) -> widgets.Widget | Image:
    """Turn all nodes of a tap, and see one of them smear: choose a node, a threshold and how far -> its matrices, and
    the SNR of the tap. Without a kernel: the picture of the middle step.

    table: `experiment.hand.along`, readout: weight and class means (L, T, D) of its first version, way: (steps, D, D),
    node: the first one to be shown."""
    angles = table.groupby("step").angle.first()
    draw, fields = turning_canvas(table, readout[0].shape[0]), snp.turned_node(*readout, way, node)
    if not live():
        return Image(draw(fields, len(way) // 2, run.settings.threshold))
    steps = [(f"{angle:.0f}°", step) for step, angle in angles.items()]
    angle = widgets.SelectionSlider(options=steps, value=0, description="angle")
    which = widgets.IntSlider(node, min=0, max=way.shape[1] - 1, description="node")
    level = widgets.SelectionSlider(
        options=sorted(set(table.threshold)), value=run.settings.threshold, description="threshold"
    )
    picture, known = widgets.Image(format="png"), {node: fields}

    def show(_=None) -> None:
        if which.value not in known:
            known[which.value] = snp.turned_node(*readout, way, which.value)
        picture.value = draw(known[which.value], angle.value, level.value)

    for control in (angle, which, level):
        control.observe(show, "value")
    show()
    return widgets.VBox([widgets.HBox([angle, which, level]), picture])


def turning_canvas(table: pd.DataFrame, labels: int) -> Callable[[Tensor, int, float], bytes]:
    """A function that draws one node on its way as PNG: (field matrices (steps, L, L), step, threshold) -> bytes.
    Labels keep the order of the clusters at the start, which are framed. table: `experiment.hand.along`."""
    with in_style({**STYLE, "figure.constrained_layout.use": False}):
        figure = Figure(figsize=(10, 3.9), dpi=80)
        canvas = FigureCanvasAgg(figure)
        left, middle, right = (figure.add_axes([x, 0.14, 0.27, 0.7]) for x in (0.03, 0.34, 0.71))
    empty = np.zeros((labels, labels))
    field_image = left.imshow(empty, cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    boolean_image = middle.imshow(empty, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    for axis in (left, middle):
        axis.grid(False)
        axis.set(xticks=[], yticks=[], xlabel="output label")
    left.set(ylabel="input label")
    left.set_title("field / maximum", fontsize=9)
    versions = list(dict.fromkeys(table.version))
    lines = [
        right.plot([], [], "x--" if number else "o-", ms=4, color=COLOURS[number], label=version)[0]
        for number, version in enumerate(versions)
    ]
    (here,) = right.plot([], [], "o", ms=11, mfc="none", mew=2, color=COLOURS[1])
    right.set(xlabel="angle (°)", xlim=(-4, 94))
    right.legend(fontsize=8, loc="lower left")
    frames: list[PatchCollection] = []

    def draw(fields: Tensor, step: int, threshold: float) -> bytes:
        booleans = snp.boolean_matrices(fields[[0, step]], threshold)
        clusters = snp.label_clusters(booleans[0])
        order = by_cluster(clusters, labels)
        field, boolean = fields[step], booleans[1]
        field_image.set_data((field / field.max().clamp(min=1e-30))[order][:, order].numpy())
        boolean_image.set_data(boolean[order][:, order].float().numpy())
        _frame(frames, (left, middle), clusters)
        for axis in (left, middle):
            axis.set(xlim=(-0.5, labels - 0.5), ylim=(labels - 0.5, -0.5))
        own = int(boolean.diagonal().sum())
        middle.set_title(f"above {threshold:g}: {own} labels, noise {int(boolean.sum()) - own}", fontsize=9)
        at = table[table.threshold == threshold]
        for line, version in zip(lines, versions, strict=True):
            rows = at[at.version == version]
            line.set_data(rows.angle, rows.snr)
        right.set(ylim=(0, 1.15 * at.snr.max()))
        now = at[(at.version == versions[0]) & (at.step == step)].iloc[0]
        here.set_data([now.angle], [now.snr])
        right.set_title(f"turned by {now.angle:.0f}°: SNR of all nodes {now.snr:.2f}", fontsize=9)
        return _png(canvas)

    return draw


def _frame(frames: list[PatchCollection], axes: tuple[Axes, ...], clusters: list[list[int]]) -> None:
    """Frame clusters, which lie side by side, on these axes, in the place of the `frames` that were there."""
    while frames:
        frames.pop().remove()
    corners = np.cumsum([0, *map(len, clusters)])[:-1] - 0.5
    boxes = [plt.Rectangle((at, at), len(part), len(part)) for at, part in zip(corners, clusters, strict=True)]
    for axis in axes:
        frames.append(axis.add_collection(PatchCollection(boxes, fc="none", ec=COLOURS[1], lw=1)))


def _png(canvas: FigureCanvasAgg) -> bytes:
    buffer = io.BytesIO()
    canvas.print_png(buffer, metadata={"Software": None}, pil_kwargs={"compress_level": 1})
    return buffer.getvalue()
