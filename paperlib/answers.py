"""Tables -> plain answers: for each claim, and for each picture, one sentence with the number that a reader remembers.

The words come from the verdict (`claims`), the numbers from the tables behind the figures, so that an answer never says
more than what was measured. Accuracies are in points, SNR in units of 1 (no information).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from torch import Tensor

from paperlib import claims, files, verdicts

# claim -> (the abstract's claim in short, the notebook that shows it)
CLAIMS = {
    "C1": ("CNNs and transformers share the mechanism", "05_cnn_counterpart"),
    "C2": ("each node identifies small clusters of labels", "02_snr_per_encoder"),
    "C3": ("features sharpen along the encoders", "02_snr_per_encoder"),
    "C4": ("ANDC pruning does not affect the accuracy", "03_andc_pruning"),
    "C5": ("each head becomes expert in its own labels", "04_head_modus_vivendi"),
    "C6": ("accuracy follows from single nodes", "02_snr_per_encoder"),
}
NOT_YET = "not measured yet"  # a claim whose notebook is not among those of the run


@dataclass(frozen=True)
class Answer:
    """A claim's answer: the verdict in words, what that means, and a number beside its null."""

    verdict: str
    words: str = ""
    number: str = ""


def answers(folder: Path) -> dict[str, Answer]:
    """Claim -> answer, from the summary.json and the tables of a walk, or of a profile's published results."""
    path = folder / "summary.json"
    summary = files.read_json(path) if path.exists() else {"verdicts": []}
    words, found = claims.of_claims(summary["verdicts"]), {}
    for claim in CLAIMS:
        if claim not in words:
            found[claim] = Answer(NOT_YET)
            continue
        there = [pair for pair in ANSWERS[claim] if (folder / f"{pair[0]}.csv").exists()]
        table, answer = there[0] if there else ANSWERS[claim][-1]
        found[claim] = Answer(words[claim], *answer(pd.read_csv(folder / f"{table}.csv"), summary))
    return found


def _depth(curves: pd.DataFrame, threshold: float, column: str = "snr") -> pd.DataFrame:
    """Mean over seeds at one threshold, raw: index (half or tap, network), columns in the order of depth."""
    at = curves[(curves.threshold == threshold) & ~curves.centred]
    group = "half" if "half" in curves else "tap"
    return at.groupby([group, "network", "encoder"])[column].mean().unstack()


def _ends(curve: pd.Series) -> str:
    curve = curve.dropna()
    return f"{curve.iloc[0]:.1f} → {curve.iloc[-1]:.1f}"


def _unified(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    return _halves(table, summary["config"]["threshold"])


def _halves(table: pd.DataFrame, threshold: float) -> tuple[str, str]:
    curves = _depth(table, threshold)
    grow = [curves.loc[half, "trained"].dropna().iloc[[0, -1]].diff().iloc[-1] > 0 for half in ("cct", "cnn")]
    words = {2: "SNR grows with depth in both", 1: "SNR grows with depth in one only", 0: "SNR grows in neither"}
    trained = ", ".join(
        f"{name} {_ends(curves.loc[half, 'trained'])}" for half, name in (("cct", "CCT"), ("cnn", "CNN"))
    )
    return words[sum(grow)], f"SNR {trained}; random ≤ {curves.xs('random', level='network').stack().max():.1f}"


def _clusters(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    taps = table[table.tap.isin(summary["config"]["taps"])]
    snr = _depth(taps, summary["config"]["threshold"])
    sizes = _depth(taps, summary["config"]["threshold"], "pooled_cluster_size")
    largest = [sizes.xs(kind, level="network").stack().max() for kind in ("trained", "random")]
    trained, random = (snr.xs(kind, level="network").stack() for kind in ("trained", "random"))
    lowest = (trained - random).idxmin()
    return (
        "clusters of {:.1f} labels or fewer (random weights {:.1f})".format(*largest),
        f"SNR nearest to random weights: {trained[lowest]:.2f} against {random[lowest]:.2f}",
    )


def _sharpening(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    curves = _depth(table, summary["config"]["threshold"]).loc["block"]
    trained = curves.loc["trained"].dropna()
    growth, last = trained.iloc[-1] - trained.iloc[0], trained.iloc[-1] - trained.iloc[-2]
    words = (
        f"{100 * last / growth:.0f} % of the growth in the last encoder"
        if growth > 0
        else "SNR falls along the encoders"
    )
    return words, f"SNR {_ends(trained)}; random weights {_ends(curves.loc['random'])}"


def _pruning(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    part = table[table.layers == "ff"]
    part = part[part.threshold == part.threshold.min()]
    accuracy = 100 * part.groupby("method").accuracy.mean()
    than = "better" if accuracy["andc"] > accuracy["random"] else "worse"
    methods = (("andc", "ANDC"), ("random", "random"), ("magnitude", "largest weights"))
    rest = ", ".join(f"{name} {accuracy[method]:.0f} %" for method, name in methods)
    return f"{than} than random at first", f"{100 * part.dilution.mean():.0f} % removed: {rest}"


def _heads(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    rows = pd.DataFrame(summary["results"]["04_head_modus_vivendi"]["encoders"])
    rows = rows[rows.network == "trained"].set_index("encoder")
    beaten = rows.index[rows.gap > rows.gap_null_high]
    words = f"in {len(beaten)} of {len(rows)} encoders" if len(beaten) else "in no encoder"
    gap, chance = 100 * rows.gap, 100 * rows.gap_null_high
    number = f"own labels lose {gap.mean():.1f} points (last encoder {gap.iloc[-1]:.1f})"
    return words, f"{number}; reassigned {chance.mean():.1f}"


def _macroscopic(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    rows = table[table.encoder > 1]
    whole = rows[rows["size"] == rows["size"].max()]
    errors = [100 * (whole[column] - whole.measured).abs().mean() for column in ("predicted", "only_size")]
    ranks = rows[rows["size"] < rows["size"].max()].groupby("seed")[["predicted", "measured"]].corr("spearman")
    rank = ranks.xs("measured", level=1).predicted.mean()
    size = "yes" if errors[0] < errors[1] else "no"
    number = f"rank correlation {rank:.2f}; whole encoders off {errors[0]:.0f} points, baseline {errors[1]:.0f}"
    return f"ranking {'yes' if rank > 0.8 else 'no'}, size {size}", number


def _nodes(taps: pd.DataFrame) -> pd.DataFrame:
    """Raw SNR, accuracy and labels of a node, mean over seeds, of native nodes, and SNR of rotated ones: index
    (network, tap, encoder)."""
    part = taps[~taps.centred]
    groups = ["network", "tap", "encoder"]
    native = part[part.basis == "native"].groupby(groups)[["snr", "accuracy", "labels_per_node"]].mean()
    return native.assign(rotated=part[part.basis != "native"].groupby(groups).snr.mean())


def _ff(taps: pd.DataFrame) -> str:
    return "ff1" if "ff1" in set(taps.tap) else "conv"


def _single_nodes(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    found, tap = _nodes(table), _ff(table)
    last, random = (found.loc[kind, tap].iloc[-1] for kind in ("trained", "random"))
    number = f"SNR {last.snr:.1f}; rotated {last.rotated:.1f}, random weights {random.snr:.1f}"
    return f"{last.labels_per_node:.0f} labels a node in the last {tap}", number


def _growth(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    found, tap = _nodes(table), _ff(table)
    curve, random = (found.loc[kind, tap].snr for kind in ("trained", "random"))
    growth, last = curve.iloc[-1] - curve.iloc[0], curve.iloc[-1] - curve.iloc[-2]
    words = f"{last / growth:.0%} of the growth in the last step" if last > 0 else "no growth in the last step"
    words = words if growth > 0 else "SNR does not grow"
    return words, f"SNR of {tap} {_ends(curve)}; random weights {_ends(random)}"


def _passed_on(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of what an encoder passes on (`block`), or of a CNN's filters."""
    return table[table.tap == ("block" if "block" in set(table.tap) else table.tap.iloc[0])]


def _readouts(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    own = _passed_on(table)
    at = own[own.threshold == verdicts.deciding_threshold(own)]
    loss = 100 * at.groupby("method").retrained_loss.mean()
    words = f"{100 * at.dilution.mean():.0f} % of a readout's connections removed"
    others = f"random {_points(loss['random'])}, largest weights {_points(loss['magnitude'])}"
    return words, f"loses {_points(loss['andc'])} points; {others}"


def _points(value: float, decimals: int = 1) -> str:
    """Points; nothing is below zero that is rounded to it."""
    return f"{round(value, decimals) + 0.0:.{decimals}f}"


def _division(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    whole = table[table.fold == -1]
    last = whole[whole.encoder == whole.encoder.max()]
    excess = last.groupby([last.network, last.basis.str.startswith("rotated")]).excess.mean()
    heads = f"rotated {excess['trained', True]:.2f}, random weights {_points(excess['random', False], 2)}"
    alike = excess["trained", True] > 0.8 * excess["trained", False]
    words = "as much by rotated nodes" if alike else "by single nodes more than by rotated ones"
    return words, f"specialisation {excess['trained', False]:.2f} nats; {heads}"


def _foretold(table: pd.DataFrame, summary: dict) -> tuple[str, str]:
    own = _passed_on(table)
    own = own[(own.network == "trained") & (own.basis == "native")]
    whole = own[own["size"] == own.groupby("encoder")["size"].transform("max")]
    errors = [100 * (whole[column] - whole.measured).abs().mean() for column in ("predicted", "size_only")]
    words = "whole encoders, too" if errors[0] < errors[1] else "but not whole encoders"
    return words, f"whole encoders missed by {errors[0]:.0f} points; by their size {errors[1]:.0f}"


Reader = Callable[[pd.DataFrame, dict], tuple[str, str]]
# claim -> tables that answer it, by version 2 of the measure where there is one, and how they are read
ANSWERS: dict[str, list[tuple[str, Reader]]] = {
    "C1": [("two_halves", _unified)],
    "C2": [("along_depth", _single_nodes), ("snr_per_encoder", _clusters)],
    "C3": [("along_depth", _growth), ("snr_per_encoder", _sharpening)],
    "C4": [("pruned_readouts", _readouts), ("accuracy_against_dilution", _pruning)],
    "C5": [("heads_along_depth", _division), ("head_experts", _heads)],
    "C6": [("predicted_sets", _foretold), ("predicted_accuracies", _macroscopic)],
}


def unified(taps: pd.DataFrame, threshold: float) -> str:
    """Of the CCT's encoders and the CNN's layers."""
    words, number = _halves(taps, threshold)
    return f"{words}: {number}."


def learned(curves: pd.DataFrame) -> str:
    """Of the learning curves of several seeds."""
    last = curves.groupby("seed").last()
    low, high = 100 * last.test_accuracy.min(), 100 * last.test_accuracy.max()
    accuracy = f"{low:.1f} to {high:.1f}" if len(last) > 1 else f"{high:.1f}"
    return f"Test accuracy {accuracy} % after {last.epoch.max()} epochs (seeds: {len(last)})."


def sharpened(taps: pd.DataFrame, threshold: float) -> str:
    """Of accuracy and SNR of `block` along the encoders."""
    snr, accuracy = (_depth(taps, threshold, column).loc["block"] for column in ("snr", "accuracy"))
    trained, random = snr.loc["trained"].dropna(), snr.loc["random"].dropna()
    moves = "rises" if trained.iloc[-1] > trained.iloc[0] else "falls"
    ends = (100 * accuracy.loc["trained"].dropna()).iloc[[0, -1]].to_numpy()
    return (
        f"SNR of block {moves} from {trained.iloc[0]:.2f} to {trained.iloc[-1]:.2f} while accuracy goes from "
        f"{ends[0]:.0f} to {ends[1]:.0f} %; with random weights SNR is {random.min():.2f} to {random.max():.2f}."
    )


def measured(taps: pd.DataFrame) -> str:
    """Of accuracy and SNR along depth, native and rotated (`figures.along_depth`)."""
    found, tap = _nodes(taps), _ff(taps)
    trained, random = found.loc["trained", tap], found.loc["random", tap]
    first, last = trained.iloc[0], trained.iloc[-1]
    moves = "rises" if last.snr > first.snr else "falls"
    return (
        f"SNR of {tap} {moves} from {first.snr:.1f} to {last.snr:.1f} (random weights {random.snr.iloc[-1]:.1f}) while "
        f"accuracy goes from {100 * first.accuracy:.0f} to {100 * last.accuracy:.0f} %; rotated nodes end at "
        f"{last.rotated:.1f}."
    )


def chosen(table: pd.DataFrame) -> str:
    """Of typical and extreme nodes of the last encoder, `experiment.single.examples`."""
    last = table[table.encoder == table.encoder.max()].set_index("which")
    typical, most = last.loc["typical"], last.loc["most labels"]
    return (
        f"The typical node of the last {typical.tap} recognises {_several(typical.labels, 'label')} in "
        f"{_several(typical.clusters, 'cluster')}, its broadest one {_several(most.labels, 'label')}."
    )


def clustered(top: pd.DataFrame, shares: pd.DataFrame) -> str:
    """Of labels that share clusters, `experiment.single.closest` and `of_one_group`."""
    if not len(top):
        return "No two labels share a cluster."
    first = top.iloc[0]
    said = f"Most often together: {first.label} and {first.other}, in clusters of {_several(first.nodes, 'node')}."
    if len(shares):
        means = shares.groupby("network")[["share", "permuted_high"]].mean()
        own, random = means.loc["trained"], means.loc["random"]
        said += (
            f" {own.share:.1%} of pairs are of one group of labels, with random weights {random.share:.1%}; with "
            f"permuted names at most {own.permuted_high:.1%} (97.5 %)."
        )
    return said


def robust(taps: pd.DataFrame, variants: pd.DataFrame, threshold: float) -> str:
    """Of all thresholds, and of penalties beside the chosen one: `experiment.measure.tables`, its main threshold."""
    tap = _ff(taps)
    own = taps[(taps.tap == tap) & (taps.network == "trained") & (taps.basis == "native") & ~taps.centred]
    curves = own.groupby(["threshold", "encoder"]).snr.mean().unstack()
    rises = int((curves.iloc[:, -1] > curves.iloc[:, 0]).sum())
    at = variants[(variants.network == "trained") & (variants.tap == tap) & (variants.threshold == threshold)]
    snr = at.pivot_table(index=["seed", "encoder"], columns="variant", values="snr").dropna()
    last, moved = snr.iloc[-1], (snr.settled / snr.best - 1).abs().max()
    return (
        f"SNR of {tap} grows along the encoders at {rises} of {len(curves)} thresholds. That of the first seed ends at "
        f"{last.best:.1f}; at {last.third:.1f} with a third of the penalty, {last.triple:.1f} with three times of it; "
        f"and moves by at most {moved:.1%} if readouts are solved further."
    )


def probed(table: pd.DataFrame) -> str:
    """Of the first and last tap of a table of `probe.probe`."""
    own, null = (table[table.network == name] for name in ("network", "null"))
    curves = [", ".join(f"{value:.1f}" for value in part) for part in (own.snr, own.snr_rotated, null.snr)]
    last, other = own.iloc[-1], null.iloc[-1]
    return (
        f"SNR from {own.tap.iloc[0]} to {last.tap}: {curves[0]}; of rotated nodes {curves[1]}; with random weights "
        f"{curves[2]}. The last readout answers {100 * last.accuracy:.0f} %, with random weights "
        f"{100 * other.accuracy:.0f} %."
    )


def masked(table: pd.DataFrame) -> str:
    """Of the table of `probe.prune`."""
    lost = [f"{row.method} {_points(100 * row.loss)}" for row in table.itertuples()]
    error = 100 * table.loss_se.max()
    return f"{table.dilution.mean():.0%} of the connections removed; points lost (± {error:.1f}): {', '.join(lost)}."


def together(right: Tensor, nodes: int) -> str:
    """Of a readout's right answers (n,) bool."""
    return f"All {nodes} nodes together get {100 * right.float().mean():.0f} % of {len(right)} test images right."


def recognised(boolean: Tensor, node: int, classes: tuple[str, ...], typical: float) -> str:
    """Of one node's Boolean matrix (L, L): what lies on its diagonal; typical: the median of labels over all nodes."""
    own = [classes[label] for label in boolean.diagonal().nonzero().flatten().tolist()]
    more = f" and {len(own) - 8} more" if len(own) > 8 else ""
    names = f": {', '.join(own[:8])}{more}" if own else ""
    return (
        f"Of {boolean.numel():,} fields {int(boolean.sum())} count, {len(own)} of them on the diagonal: node {node} "
        f"recognises {len(own)} label{'s' * (len(own) != 1)}{names}. The median over nodes is {typical:.0f}."
    )


def counted(labels: int, clusters: int, internal: int, external: int, of: int) -> str:
    """Of one node's labels, clusters and noise, of so many labels in all."""
    noise = internal + external
    snr = f"{labels * (of - 1) / noise:.1f}" if noise else "infinite"
    return (
        f"{_several(labels, 'label')} in {_several(clusters, 'cluster')}, noise {internal} inside and {external} "
        f"outside of them: signal {labels}/{of}, noise {noise}/{of * (of - 1)}, SNR {snr}."
    )


def _several(number: int, name: str) -> str:
    return f"{number} {name}" if number == 1 else f"{number} {name}s"


def versions(table: pd.DataFrame) -> str:
    """Of a node's versions (`experiment.hand.compare`): trained, rotated, random weights."""
    own, twin, random = table.itertuples()
    moves = "less clean" if twin.snr < own.snr else "as clean, or cleaner"
    return (
        f"The rotated twin answers {twin.alike:.1%} of the images as the network does ({100 * twin.accuracy:.1f} % "
        f"right), but its nodes are {moves}: SNR {twin.snr:.2f} instead of {own.snr:.2f}. Random weights have "
        f"{random.snr:.2f}, and {100 * random.accuracy:.1f} % right."
    )


def turned(table: pd.DataFrame, threshold: float) -> str:
    """Of nodes on their way to other directions (`experiment.hand.along`)."""
    own, random = (part for _, part in table[table.threshold == threshold].groupby("version", sort=False))
    first, last, best = own.iloc[0], own.iloc[-1], own.loc[own.snr.idxmax()]
    moves = "falls" if last.snr < first.snr else "rises"
    return (
        f"While the nodes turn, SNR {moves} from {first.snr:.2f} to {last.snr:.2f} (highest at {best.angle:.0f}°, "
        f"{best.snr:.2f}), and a node recognises {last.labels:.1f} labels instead of {first.labels:.1f}; with random "
        f"weights SNR goes from {random.snr.iloc[0]:.2f} to {random.snr.iloc[-1]:.2f}."
    )


def which(taps: pd.DataFrame) -> str:
    """Of native over rotated SNR in the last encoder: does it matter which node?"""
    found = _nodes(taps)
    ratio = (found.snr / found.rotated).groupby(level=["network", "tap"]).last()
    said = [f"{tap} {ratio['trained', tap]:.2f} ({ratio['random', tap]:.2f})" for tap in ratio["trained"].index]
    return f"SNR of native over rotated nodes in the last encoder (random weights): {', '.join(said)}."


def divided(tables: dict[str, pd.DataFrame]) -> str:
    """Of the heads of the last encoder: `experiment.division.tables`."""
    words, number = _division(tables["encoders"], {})
    ablation = tables["ablation"]
    last = ablation[(ablation.fold == -1) & (ablation.encoder == ablation.encoder.max())].groupby("owners").gap.mean()
    return (
        f"In the last encoder {number} ({words}). Silencing a head costs its own labels "
        f"{_points(100 * last['native'])} points more than the others; owners by silencing itself, "
        f"{_points(100 * last['best'])}."
    )


def answering(table: pd.DataFrame) -> str:
    """Of how many nodes recognise a label in its owner and in other heads, `experiment.division.head_matrices`."""
    said, of = {}, "{:.1f} nodes of its owner and {:.1f} of another head".format
    for place, rows in table.groupby(["network", "encoder"]):
        heads = [part for _, part in rows.groupby("head")]
        own = np.stack([part.owned for part in heads])
        counts = np.stack([np.diag(part.drop(columns=["network", "encoder", "head", "owned"])) for part in heads])
        said[place] = of(counts[own].mean(), counts[~own & own.any(axis=0)].mean())
    first, last = table.encoder.min(), table.encoder.max()
    return (
        f"In the last encoder a label is recognised by {said['trained', last]}, in the first one by "
        f"{said['trained', first]}, with random weights by {said['random', last]}."
    )


def silenced(table: pd.DataFrame) -> str:
    """Of `experiment.division.silenced` in the last encoder; every label counts alike."""
    last = table[table.encoder == table.encoder.max()]
    own = last["head"] == last.owner
    mine, other = (100 * np.average(part["drop"], weights=part.labels) for part in (last[own], last[~own]))
    lost = f"{_points(mine)} points without its owner, {_points(other)} without another head"
    return f"In the last encoder a label loses {lost}."


def removed(table: pd.DataFrame) -> str:
    """Of readouts pruned by their own nodes' labels."""
    words, number = _readouts(table, {})
    return f"{words[0].upper()}{words[1:]}, by shared labels: {number}."


def returned(table: pd.DataFrame) -> str:
    """Of what ANDC removes of a readout, at the dilution that decides, and of giving back its mean."""
    own = _passed_on(table)
    at = own[(own.method == "andc") & (own.threshold == verdicts.deciding_threshold(own))].mean(numeric_only=True)
    return (
        f"Of what ANDC removes {100 * at.constant:.0f} % is alike for all inputs. Right after pruning "
        f"{100 * at.loss:.1f} points are lost; {100 * at.returned_loss:.1f} with that mean given back, "
        f"{100 * at.retrained_loss:.1f} solved anew."
    )


def retrained(table: pd.DataFrame) -> str:
    """Of late layers pruned and trained on: where half a point, or less, is lost after the longest training."""
    lost = 100 * table[table.epochs == table.epochs.max()].groupby(["reading", "encoders", "method"]).loss.mean()
    andc, others = lost.xs("andc", level="method"), lost.unstack().drop(columns=["andc", "unpruned"])
    spared, ahead = int((andc <= 0.5).sum()), int((andc < others.min(axis=1)).sum())
    return (
        f"After {table.epochs.max()} epochs ANDC loses at most half a point in {spared} of {len(andc)} cases, and less "
        f"than every other criterion in {ahead}."
    )


def foretold(table: pd.DataFrame) -> str:
    """Of sets of nodes that single nodes predict."""
    _, number = _foretold(table, {})
    return f"{number[0].upper()}{number[1:]} points."


def thresholds(table: pd.DataFrame) -> str:
    """Of `claims.at_thresholds`: does the threshold decide?"""
    block = table.loc["block"].sharpens
    return f"SNR of block sharpens at {int(block.sum())} of {len(block)} thresholds."


def spread(nodes: pd.DataFrame, tap: str = "block") -> str:
    """Of the nodes of one tap in the last encoder."""
    part = nodes[(nodes.tap == tap) & (nodes.network == "trained")]
    low, middle, high = part[part.encoder == part.encoder.max()].labels.quantile([0.025, 0.5, 0.975])
    half = f"In the last encoder half of the nodes recognise at most {middle:.0f} labels"
    return f"{half}; 95 % recognise {low:.0f} to {high:.0f}."


def penalised(table: pd.DataFrame, tap: str = "block") -> str:
    """Of the readouts' penalties: does SNR grow with each of them?"""
    part = table[(table.tap == tap) & (table.network == "trained") & (table.epochs == table.epochs.max())]
    ends = part.sort_values("encoder").groupby("l2").snr.agg(["first", "last"])
    growth = ends["last"] - ends["first"]
    grown = f"{int((growth > 0).sum())} of {len(growth)} penalties"
    return f"SNR of {tap} grows with {grown}, by {growth.min():.1f} to {growth.max():.1f}."


def paired(pairs: pd.DataFrame, summary: pd.DataFrame) -> str:
    """Of the labels that share a cluster most often."""
    if not len(pairs):
        return "No two labels share a cluster."
    first = pairs.iloc[0]
    text = f"Most often together: {first.label} and {first.other}, in clusters of {first.nodes} nodes."
    if "share of pairs in one superclass" in summary.index:
        share, most = summary.value["share of pairs in one superclass"], summary.value["permuted names, 97.5 %"]
        text += f" {share:.1%} of pairs are of one superclass; with permuted names at most {most:.1%} (97.5 %)."
    return text


def prunable(largest: pd.DataFrame, part: str) -> str:
    """Of `claims.largest_dilutions`: how far each method prunes one part for half a point."""
    shares = {
        method: "none" if pd.isna(value) else f"{value:.0%}" for method, value in largest.loc[part].straight.items()
    }
    said = ", ".join(f"{method} {share}" for method, share in shares.items())
    return f"Removable for half a point, without retraining: {said}."


def owned(labels: pd.DataFrame) -> str:
    """Of the labels that each head owns in the last encoder, first seed."""
    first = labels[(labels.network == "trained") & (labels.seed == labels.seed.min())]
    own = first[(first.encoder == first.encoder.max()) & first.owner.astype(bool)]
    return f"The heads of the last encoder own {', '.join(map(str, own.groupby('head').label.nunique()))} labels."


def expert(labels: pd.DataFrame) -> str:
    """Of the accuracy of owners alone and of silenced heads, one encoder."""
    part = labels[labels.network == "trained"]
    unseen = part.owner_unseen.astype(bool)
    own, others = 100 * part[unseen].ablation_drop.mean(), 100 * part[~unseen].ablation_drop.mean()
    return f"Without its owner a label loses {own:.1f} points, without another head {others:.1f}."


def specialised(encoders: pd.DataFrame) -> str:
    """Of the encoders in which heads specialise beyond chance, and in which ablation says so."""
    rows = encoders[encoders.network == "trained"].groupby("encoder")[["excess", "gap", "gap_null_high"]].mean()
    random = encoders[encoders.network == "random"].excess.max()
    beyond, causal = int((rows.excess > random).sum()), int((rows.gap > rows.gap_null_high).sum())
    return (
        f"Heads specialise more than random weights in {beyond} of {len(rows)} encoders; silencing them hits their own "
        f"labels, beyond randomly reassigned ones, in {causal}."
    )


def cooperating(summary: pd.DataFrame) -> str:
    """Of whole heads in the last encoder (`heads.summary_of_cooperation`)."""
    last = 100 * summary.iloc[-1]
    return (
        f"In the last encoder a whole head gets {last.own:.0f} % of its own labels' images right; as many nodes, "
        f"randomly reassigned, get {last.own_dealt:.0f} %."
    )


def attentive(differences: pd.DataFrame) -> str:
    """Of where heads look for own and other labels."""
    beyond = (differences.difference > differences.dealt_high).sum()
    return f"Attention on own labels differs more than by chance for {int(beyond)} of {len(differences)} heads."


def stable(stability: pd.DataFrame) -> str:
    """Of the owners of two seeds, last encoder."""
    if not len(stability):
        return "One seed: nothing to compare."
    last = stability[stability.encoder == stability.encoder.max()]
    return (
        f"Two seeds give {last.overlap.mean():.0%} of the labels to matching heads; by chance {last.chance.mean():.0%}."
    )
