"""The pictures of the first page: what is measured where, and the main results with their verdicts."""

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


def hero(folder: Path, dark: bool = False, narrow: bool = False) -> Figure:
    """The main results of a walk, or of a profile's published results, in four panels with the verdicts in their
    titles; a panel whose notebook has not run is empty. narrow: one below the other, for a phone."""
    found = answers(folder)
    threshold = files.read_json(folder / "summary.json")["config"]["threshold"]
    panels = [
        (_depth, "two_halves", "Nodes get cleaner with depth", ("C1", "C3")),
        (_owners, "head_experts", "Heads own labels", ("C5",)),
        (_pruning, "accuracy_against_dilution", "Pruning by shared labels", ("C4",)),
        (_sets, "predicted_accuracies", "Nodes predict sets of nodes", ("C6",)),
    ]
    rows, columns, size = (4, 1, (4.6, 12.4)) if narrow else (2, 2, (9.2, 6.6))
    with in_style({**PLAIN, "font.size": 10, **(DARK if dark else {})}):
        figure, axes = plt.subplots(rows, columns, figsize=size)
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
        figure.get_layout_engine().set(rect=(0, 0, 1, 0.97 if narrow else 0.95), hspace=0.12)
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
    image = figures.points_matrix(axis, lost, np.abs(lost.to_numpy()).max(), "{:+.1f}", aspect="auto")
    heads = range(len(lost))
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
    axis.set(xlabel="share of FF weights removed", ylabel="test accuracy (%)", ylim=(0, 1.6 * whole))
    axis.legend(loc="upper right", fontsize=9)


def _sets(axis, table: pd.DataFrame) -> None:
    shown = table[table.encoder > 1].sample(frac=1, random_state=0)
    style = {"cmap": "viridis", "rasterized": True}
    image = axis.scatter(100 * shown.predicted, 100 * shown.measured, 12, shown.encoder, **style)
    axis.axline((0, 0), slope=1, color="grey", ls=":")
    axis.set(xlabel="predicted from single nodes (%)", ylabel="measured accuracy of sets (%)")
    axis.figure.colorbar(image, ax=axis, label="encoder", shrink=0.9)


# (operation, tap after it) of an encoder of a CCT, and of a layer of a CNN
CCT_CHAIN = [
    ("tokenizer,\npositions", "stem"), ("LN", ""), ("$W_{qkv}$", "qkv"), ("heads", "attn"), ("proj", "mha"),
    ("+, LN$_1$", "ff_in"), ("$W_1$, GELU", "ff1"), ("$W_2$", "ff2"), ("+", "block"), ("LN, SeqPool,\nclassifier", ""),
]  # fmt: skip
CNN_CHAIN = [
    ("image", ""), ("convolution", ""), ("batch norm", ""), ("ReLU,\n(pooling)", "conv"), ("mean,\nclassifier", ""),
]  # fmt: skip
REPEATED = {"CCT": (CCT_CHAIN, (1, 8), "encoder, repeated"), "CNN": (CNN_CHAIN, (1, 3), "layer, repeated")}


def anatomy(dark: bool = False, narrow: bool = False) -> Figure:
    """What is measured where: an encoder of a CCT and a layer of a CNN as chains of operations, with every tap. narrow:
    the chains run down, for a phone."""
    with in_style({**PLAIN, "font.size": 9, **(DARK if dark else {})}):
        figure, axis = plt.subplots(figsize=(4.6, 6.6) if narrow else (9.2, 2.9))
        for number, (name, (chain, repeated, text)) in enumerate(REPEATED.items()):
            _chain(
                axis, name, chain, repeated, text, across=2.5 * number if narrow else 1.6 * (1 - number), down=narrow
            )
        axis.set(xlim=(-0.8, 4.2), ylim=(9.5, -1.1)) if narrow else axis.set(xlim=(-1.3, 9.7), ylim=(-0.7, 2.3))
        axis.axis("off")
        plt.close(figure)
        return figure


def _chain(axis, name: str, chain: list, repeated: tuple[int, int], text: str, across: float, down: bool) -> None:
    """One chain of operations and its taps, with a frame around what is repeated: along a row, or down a column, at
    this place across."""
    colour = plt.rcParams["text.color"]
    box = {"boxstyle": "round,pad=0.3", "fc": "#30363d" if colour == DARK["text.color"] else "#e9ecef", "ec": "none"}

    def at(along: float, beside: float = 0.0) -> tuple[float, float]:
        return (across + beside, along) if down else (along, across - beside)

    (first, last), end = repeated, len(chain) - 1
    axis.plot(*zip(at(0), at(end), strict=True), color="grey", lw=1, zorder=0)
    axis.text(*at(-0.75), name, ha="center" if down else "right", va="center", fontweight="bold")
    corner, size = at(first - 0.47, -0.6 if down else 0.55), (last - first + 0.94, 2.1 if down else 1.07)
    axis.add_patch(plt.Rectangle(corner, *(size[::-1] if down else size), fc="none", ec="grey", ls="--"))
    style = {"fontsize": 8, "va": "center", "color": "grey"}
    if down:
        axis.text(*at((first + last) / 2, 1.38), text, rotation=270, ha="center", **style)
    else:
        axis.text(*at(first - 0.4, -0.38), text, **style)
    for place, (operation, tap) in enumerate(chain):
        axis.text(*at(place), operation, ha="center", va="center", fontsize=8, bbox=box)
        if tap:
            tint = colour if tap == "stem" else figures.TAP_COLOURS[tap]
            where = {"ha": "left" if down else "center", "va": "center", "color": tint, "weight": "bold"}
            axis.text(*at(place, 0.62 if down else 0.38), f"\u25cf {tap}", **where)
