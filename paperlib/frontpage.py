"""The pictures of the first page: what is measured where, and the main results with their verdicts."""

import itertools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from paperlib import figures, files
from paperlib.answers import answers
from paperlib.figures import COLOURS, PLAIN, in_style

VERDICT_COLOURS = {"supported": ("#1a7f37", "#3fb950"), "not supported": ("#cf222e", "#f85149")}  # light, dark
DARK = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), "#e6edf3"),
    **dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), "#0d1117"),
}


def hero(folder: Path, dark: bool = False) -> Figure:
    """The main results of a walk, or of a profile's published results, in four panels with the verdicts in their
    titles; a panel whose notebook has not run is empty."""
    found = answers(folder)
    threshold = files.read_json(folder / "summary.json")["config"]["threshold"]
    panels = [
        (_depth, "two_halves", "Nodes get cleaner with depth", ("C1", "C3")),
        (_owners, "head_experts", "Heads own labels", ("C5",)),
        (_pruning, "accuracy_against_dilution", "Pruning by shared labels", ("C4",)),
        (_sets, "predicted_accuracies", "Nodes predict sets of nodes", ("C6",)),
    ]
    with in_style({**PLAIN, "font.size": 10, **(DARK if dark else {})}):
        figure, axes = plt.subplots(2, 2, figsize=(9.2, 6.6))
        for axis, (draw, table, title, claims) in zip(axes.flat, panels, strict=True):
            path = folder / f"{table}.csv"
            if path.exists():
                curves = pd.read_csv(path)
                draw(axis, curves[curves.threshold == threshold] if draw is _depth else curves)
            verdicts = {found[claim].verdict.split(" (")[0] for claim in claims}
            more = f" ({found[claims[0]].words})" if len(claims) == 1 and found[claims[0]].words else ""
            colour = VERDICT_COLOURS.get("/".join(verdicts), ("#9a6700", "#d29922"))[dark]
            style = {"color": colour, "fontweight": "bold", "fontsize": 9, "va": "bottom"}
            axis.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=20).set_in_layout(False)
            said = f"{', '.join(claims)}: {' / '.join(sorted(verdicts))}{more}"
            axis.text(0, 1.02, said, transform=axis.transAxes, **style).set_in_layout(False)
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.95), hspace=0.12)
        plt.close(figure)
        return figure


def _depth(axis, table: pd.DataFrame) -> None:
    shown = table[~table.centred & table.network.isin(("trained", "random"))]
    means = shown.groupby(["half", "network", "depth"]).snr.mean()
    for half, colour, name in (("cct", COLOURS[0], "transformer"), ("cnn", COLOURS[3], "CNN")):
        for kind, line, rest in (("trained", "o-", ""), ("random", "--", ", random weights")):
            curve = means.loc[half, kind]
            axis.plot(curve.index, curve, line, ms=5, color=colour, label=name + rest)
    axis.legend(loc="upper left", fontsize=8)
    axis.set(xlabel="depth (first to last layer)", ylabel="signal / noise of single nodes", ylim=(0, 1.5 * means.max()))


def _owners(axis, table: pd.DataFrame) -> None:
    lost = figures.lost_by_owner(table)
    top = np.abs(lost.to_numpy()).max()
    image = axis.imshow(lost, cmap="RdBu_r", vmin=-top, vmax=top, aspect="auto")
    heads = range(len(lost))
    for row, column in itertools.product(heads, heads) if len(lost) <= 8 else ():
        value = lost.iloc[row, column]
        axis.text(
            column, row, f"{value:+.1f}", ha="center", va="center", color="white" if value > 0.6 * top else "black"
        )
    axis.set(xticks=heads, yticks=heads, xlabel="labels owned by head", ylabel="silenced head")
    axis.figure.colorbar(image, ax=axis, label="accuracy lost (points)", shrink=0.9)


def _pruning(axis, table: pd.DataFrame) -> None:
    shown = table[table.layers == "ff"]
    whole = 100 * (shown.accuracy + shown.loss).mean()
    for method, name in (("magnitude", "keep largest weights"), ("random", "keep random ones"), ("andc", "ANDC")):
        curve = shown[shown.method == method].groupby("threshold")[["dilution", "accuracy"]].mean()
        colour, marker = figures.METHOD_STYLES[method]
        axis.plot([0, *curve.dilution], [whole, *100 * curve.accuracy], marker=marker, ms=5, label=name,
                  color="grey" if method == "random" else colour)  # fmt: skip
    axis.set(xlabel="share of FF weights removed", ylabel="test accuracy (%)", ylim=(0, 1.4 * whole))
    axis.legend(loc="upper right", fontsize=9)


def _sets(axis, table: pd.DataFrame) -> None:
    shown = table[table.encoder > 1].sample(frac=1, random_state=0)
    style = {"cmap": "viridis", "rasterized": True}
    image = axis.scatter(100 * shown.predicted, 100 * shown.measured, 12, shown.encoder, **style)
    axis.axline((0, 0), slope=1, color="grey", ls=":")
    axis.set(xlabel="predicted from single nodes (%)", ylabel="measured accuracy of sets (%)")
    axis.figure.colorbar(image, ax=axis, label="encoder", shrink=0.9)


def anatomy(dark: bool = False) -> Figure:
    """What is measured where: an encoder of a CCT and a layer of a CNN as chains of operations, with every tap."""
    # (operation, tap after it); first and last operation that are repeated, and what they make up
    cct = [
        ("tokenizer,\npositions", "stem"), ("LN", ""), ("$W_{qkv}$", "qkv"), ("heads", "attn"), ("proj", "mha"),
        ("+, LN$_1$", "ff_in"), ("$W_1$, GELU", "ff1"), ("$W_2$", "ff2"), ("+", "block"),
        ("LN, SeqPool,\nclassifier", ""),
    ]  # fmt: skip
    cnn = [
        ("image", ""), ("convolution", ""), ("batch norm", ""), ("ReLU,\n(pooling)", "conv"), ("mean,\nclassifier", ""),
    ]  # fmt: skip
    rows = {"CCT": (1.6, cct, (1, 8), "encoder, repeated"), "CNN": (0.0, cnn, (1, 3), "layer, repeated")}
    with in_style({**PLAIN, "font.size": 9, **(DARK if dark else {})}):
        figure, axis = plt.subplots(figsize=(9.2, 2.9))
        ink, box = (
            plt.rcParams["text.color"],
            {"boxstyle": "round,pad=0.3", "fc": ("#e9ecef", "#30363d")[dark], "ec": "none"},
        )
        for name, (height, chain, (first, last), text) in rows.items():
            axis.text(-0.75, height, name, ha="right", va="center", fontweight="bold")
            axis.plot([0, len(chain) - 1], [height, height], color="grey", lw=1, zorder=0)
            corner, size = (first - 0.47, height - 0.55), (last - first + 0.94, 1.07)
            axis.add_patch(plt.Rectangle(corner, *size, fc="none", ec="grey", ls="--"))
            axis.text(first - 0.4, height + 0.38, text, fontsize=8, va="center", color="grey")
            for place, (operation, tap) in enumerate(chain):
                axis.text(place, height, operation, ha="center", va="center", fontsize=8, bbox=box)
                if not tap:
                    continue
                colour = ink if tap == "stem" else figures.TAP_COLOURS[tap]
                axis.text(place, height - 0.38, f"\u25cf {tap}", ha="center", va="center", color=colour, weight="bold")
        axis.set(xlim=(-1.3, 9.7), ylim=(-0.7, 2.3))
        axis.axis("off")
        plt.close(figure)
        return figure
