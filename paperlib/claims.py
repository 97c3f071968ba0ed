"""Tables -> claims, effects, verdicts: the rules, and nothing else.

The rules were fixed before the reference results (choice). A claim is supported if the effect has the claimed sign for
every seed, each seed's bootstrap interval (95 %) excludes 0, and the claim's null is beaten. On fewer than 3 seeds it
is not tested; on the embedded data it is a demonstration, whatever the numbers say. A claim of several rows is
supported if all of them are, and in part if some are (`of_claim`).
"""

import re

import numpy as np
import pandas as pd

from paperlib.andc import MASKS
from paperlib.statistics import interval, rank_trend
from paperlib.verdicts import word

RANDOM_NETWORK = "same network, random weights"
DRAWS = 1000
MIN_SEEDS = 3
BESIDE = "; stated beside, does not decide"  # follows a verdict that is not one of its claim's


def verdict(
    claim: str,
    data: str,
    statistic: str,
    effects: list[float],
    intervals: list[tuple[float, float]],
    null: str,
    null_beaten: bool,
    beside: bool = False,
    notes: str = "",
    numbers: str = "",
) -> dict:
    """One row of the verdict table: effects and their 95 % intervals, one per seed; positive is what is claimed. A row
    that is stated beside the others does not decide the claim. numbers: what the effect is made of, means over seeds;
    notes: what else a reader should know.

    effect is the mean over seeds; uncertainty the standard deviation over seeds, or for one seed half its interval;
    by_seed has each seed's effect and the ends of its interval.
    """
    n = len(effects)
    met = all(effect > 0 and low > 0 for effect, (low, _) in zip(effects, intervals, strict=True)) and null_beaten
    uncertainty = np.std(effects, ddof=1) if n > 1 else (intervals[0][1] - intervals[0][0]) / 2
    row = {"claim": claim, "data": data, "statistic": statistic, "numbers": numbers}
    row |= {"effect": round(float(np.mean(effects)), 6), "uncertainty": round(float(uncertainty), 6)}
    by_seed = [[round(float(value), 6) for value in (e, *ends)] for e, ends in zip(effects, intervals, strict=True)]
    row |= {"null": null, "n": n, "verdict": word(met, data, n), "by_seed": by_seed}
    return row | {"beside": beside, "notes": notes}


def of_claim(rows: list[dict]) -> str:
    """The verdict of a claim from those of its rows, but for rows that are stated beside them. One or two rows that are
    not supported are named, more are counted."""
    rows = [row for row in rows if not row["beside"]]
    words = [row["verdict"] for row in rows]
    met = [word == "supported" or "(rule met" in word for word in words]
    if any(word.startswith("demonstration") for word in words):
        tested = sum(not word.startswith("not tested") for word in words)
        return f"demonstration ({sum(met)} of {tested} rules met)"
    if not {"supported", "not supported"} & set(words):
        return "not tested"
    if len(set(words)) == 1:
        return words[0]
    if not any(met):
        return "not supported"
    if len(met) - sum(met) > 2:
        return f"supported in part ({sum(met)} of {len(met)} rows)"
    parts = []
    for said, start in (("not", "not supported"), ("not tested", "not tested")):
        names = [re.split(r",| \(", row["statistic"])[0] for row in rows if row["verdict"].startswith(start)]
        parts += [f"{said}: {'; '.join(names)}"] if names else []
    return f"supported in part ({', '.join(parts)})"


def of_claims(rows: list[dict]) -> dict[str, str]:
    """Claim -> its verdict, from all rows of a walk."""
    claims = sorted({row["claim"] for row in rows})
    return {claim: of_claim([row for row in rows if row["claim"] == claim]) for claim in claims}


def clusters(nodes: pd.DataFrame, data: str, labels: int) -> list[dict]:
    """C2: nodes identify small clusters of labels: raw SNR above the tap's own random network, and pooled cluster size
    at most L/10, in every encoder and every tap that has a random twin. Effects are the smallest over encoders and
    taps, their lower bounds the lowest."""
    rng = np.random.default_rng(0)
    found, pairs = {"SNR": ([], []), "size": ([], [])}, []
    for seed in sorted(nodes.seed.unique()):
        points, draws = {"SNR": [], "size": []}, {"SNR": [], "size": []}
        for _, group in nodes[nodes.seed == seed].groupby(["encoder", "tap"]):
            trained, random = (group[group.network == kind] for kind in ("trained", "random"))
            if len(random):
                both = [_sums(part) for part in (trained, random)]
                pairs.append([*(_snr(sums, labels) for sums in both), *(_cluster_size(sums, labels) for sums in both)])
                for values, use in ((points, None), (draws, rng)):
                    sums = _sums(trained, use)
                    values["SNR"].append(_snr(sums, labels) - _snr(_sums(random, use), labels))
                    values["size"].append(labels / 10 - _cluster_size(sums, labels))
        for part, (effects, intervals) in found.items():
            smallest, bounds = int(np.argmin(points[part])), [interval(values) for values in draws[part]]
            effects.append(points[part][smallest])
            intervals.append((min(low for low, _ in bounds), bounds[smallest][1]))
    where, means = "smallest over encoders and taps", np.mean(np.split(np.array(pairs), nodes.seed.nunique()), axis=0)
    trained, random, *_ = means[np.argmin(means[:, 0] - means[:, 1])]
    size, other = np.max(pairs, axis=0)[2:]
    bound = f"none, a bound, which random weights keep too: at most {other:.2f}"
    texts = f"raw SNR above the random network's, {where}", f"L/10 - labels per cluster, {where}"
    numbers = f"{trained:.2f} against {random:.2f}", f"at most {size:.2f} labels, L/10 is {labels / 10:g}"
    return [
        verdict("C2", data, texts[0], *found["SNR"], RANDOM_NETWORK, True, numbers=numbers[0]),
        verdict("C2", data, texts[1], *found["size"], bound, True, numbers=numbers[1]),
    ]


def _cluster_size(sums: np.ndarray, labels: int) -> np.ndarray:
    """Labels per cluster from sums of labels and clusters; without any cluster, all labels count as one."""
    return np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1), labels)


def sharpening(nodes: pd.DataFrame, correct: dict, data: str, labels: int, penalties: pd.DataFrame) -> list[dict]:
    """C3: accuracy and raw SNR grow along the encoders: rank trend > 0 and last - first > 0, both larger than the
    random network's, and so for every L2 penalty of the readouts that was tried. One row for the accuracy of `block`,
    one for the SNR of each tap, of which `block` decides; the effect is last - first."""
    rows = []
    for statistic, tap in [("accuracy", "block"), *(("SNR", tap) for tap in sorted(nodes.tap.unique()))]:
        if nodes[(nodes.tap == tap) & (nodes.network == "random")].encoder.nunique() < 2:
            continue  # taps that only pruning needs have no random twin, and the stem no depth
        effects, intervals, beaten, numbers, trends = _growth(nodes, correct, labels, statistic, tap)
        always, notes = _penalties(penalties[penalties.tap == tap], statistic)
        notes = "; ".join(filter(None, (trends, notes)))
        text, met = f"{statistic} of {tap}, last - first encoder; rank trend > 0", all(beaten) and always
        rows.append(verdict("C3", data, text, effects, intervals, RANDOM_NETWORK, met, tap != "block", notes, numbers))
    return rows


def unified(nodes: pd.DataFrame, correct: dict[str, dict], data: str, labels: int, penalties: dict) -> list[dict]:
    """C1: what C3 says of the CCT's `block` holds for the filters of a CNN too: accuracy and SNR grow with depth in
    both (see `experiment.nodes.both_halves`), for every penalty that was tried. An effect is the smaller one of the
    two networks, seed by seed."""
    rows, halves = [], (("cct", "block"), ("cnn", "conv"))
    for statistic in ("accuracy", "SNR"):
        found = [_growth(nodes[nodes.half == half], correct[half], labels, statistic, tap) for half, tap in halves]
        tried = [_penalties(table[table.tap == tap], statistic) for table, tap in
                 ((penalties[half], tap) for half, tap in halves)]  # fmt: skip
        effects = [min(pair) for pair in zip(*(effects for effects, *_ in found), strict=True)]
        intervals = [tuple(map(min, *pair)) for pair in zip(*(bounds for _, bounds, *_ in found), strict=True)]
        text = f"{statistic}, last - first depth, smaller of CCT and CNN; rank trend > 0 in both"
        beaten = all(all(part) for _, _, part, *_ in found) and all(always for always, _ in tried)
        notes = "; ".join(
            f"{half.upper()}: {np.mean(grown):.3f} ({trends})" + f", {said}" * bool(said)
            for (half, _), (grown, *_, trends), (_, said) in zip(halves, found, tried, strict=True)
        )
        numbers = "; ".join(f"{half.upper()} {curve}" for (half, _), (*_, curve, _) in zip(halves, found, strict=True))
        row = verdict("C1", data, text, effects, intervals, RANDOM_NETWORK, beaten, notes=notes, numbers=numbers)
        rows.append(row)
    return rows


def _growth(nodes: pd.DataFrame, correct: dict, labels: int, statistic: str, tap: str) -> tuple:
    """Last - first of a tap's accuracy or SNR, its interval, and whether it exceeds the random network's, by seed; in
    words first and last of all networks, means over seeds, and the rank trend of each seed with its interval. Where
    there is a second random network, `calibrated`, both have to be exceeded."""
    effects, intervals, beaten, ends, trends = [], [], [], [], []
    nulls = {"random": "random weights", "calibrated": "with statistics of training images"}
    nulls = {kind: words for kind, words in nulls.items() if kind in set(nodes[nodes.tap == tap].network)}
    for seed in sorted(nodes.seed.unique()):
        rng = np.random.default_rng(0)
        curves = {}
        for kind, use in (("trained", rng), *((kind, None) for kind in nulls)):
            if statistic == "accuracy":
                curves[kind] = _accuracy_curves(correct, seed, kind, tap, use)
            else:
                part = nodes[(nodes.seed == seed) & (nodes.network == kind) & (nodes.tap == tap)]
                curves[kind] = _snr_curves(part, labels, use)
        point, draws = curves["trained"]
        effects.append(point[-1] - point[0])
        ends.append([curve[[0, -1]] for curve, _ in curves.values()])
        # Both conditions must hold in the interval: the trend's sign counts as the smaller of the two bounds.
        low, high = interval(draws[:, -1] - draws[:, 0])
        trend_low, trend_high = interval(rank_trend(draws))
        trends.append(f"{rank_trend(point):.2f} [{trend_low:.2f}, {trend_high:.2f}]")
        intervals.append((low if trend_low > 0 else min(low, 0.0), high))
        beaten.append(all(sharper(point, curves[kind][0]) for kind in nulls))
    (first, last), *others = np.mean(ends, axis=0)
    both = zip(nulls.values(), others, strict=True)
    numbers = ", ".join(f"{words} {low:.2f} to {high:.2f}" for words, (low, high) in both)
    return effects, intervals, beaten, f"{first:.2f} to {last:.2f} ({numbers})", f"rank trend {', '.join(trends)}"


def sharper(trained: np.ndarray, random: np.ndarray) -> bool:
    """Whether a curve along the encoders rises, last - first and rank trend, and both more than the random network's.
    Nothing rises more than a perfect trend: where both are perfect, last - first alone decides (choice)."""
    growth, floor = (curve[-1] - curve[0] for curve in (trained, random))
    trend, other = (float(rank_trend(np.asarray(curve))) for curve in (trained, random))
    return bool(growth > max(0, floor) and trend > 0 and (trend > other or min(trend, other) > 1 - 1e-9))


def _penalties(table: pd.DataFrame, statistic: str) -> tuple[bool, str]:
    """Whether a tap sharpens with every L2 penalty that was tried, and a note of it: the first seed's table
    (`experiment.nodes.penalties`), without intervals."""
    if not len(table):
        return True, ""
    column, failing = statistic.lower(), []
    longest = table.epochs.max()
    for penalty, part in table[table.epochs == longest].groupby("l2"):
        curves = part.pivot(index="network", columns="encoder", values=column)
        if not sharper(curves.loc["trained"].to_numpy(), curves.loc["random"].to_numpy()):
            failing.append(str(penalty))
    word = "fails for" if failing else "holds for"
    text = f"{word} the penalties {', '.join(failing or sorted(table.l2.astype(str).unique()))} (first seed)"
    trained = table[table.network == "trained"].astype({"l2": str})
    moved = trained.pivot_table(index=["l2", "encoder"], columns="epochs", values=column)
    grown = moved.iloc[:, -1].groupby("l2").agg(lambda curve: curve.iloc[-1] - curve.iloc[0])
    text += f", last - first {grown.min():.3f} to {grown.max():.3f} over them"
    if moved.shape[1] > 1:
        most = (moved.iloc[:, -1] - moved.iloc[:, 0]).abs().max()
        text += f", moves by {most:.3f} at most from {moved.columns[0]} to {moved.columns[-1]} epochs"
    return not failing, text


def at_thresholds(taps: pd.DataFrame) -> pd.DataFrame:
    """Do the conclusions depend on the threshold? For each threshold and tap, means over seeds: the smallest raw SNR
    above the random network's (C2), last - first encoder of both networks, and whether the tap sharpens (C3)."""
    rows = []
    for (threshold, tap), part in taps[~taps.centred].groupby(["threshold", "tap"]):
        curves = part.pivot_table(index="network", columns="encoder", values="snr")
        if curves.shape[1] < 2 or not {"trained", "random"} <= set(curves.index):
            continue
        trained, random = (curves.loc[kind].to_numpy() for kind in ("trained", "random"))
        row = {"tap": tap, "threshold": threshold, "above random": (trained - random).min()}
        row |= {"last - first": trained[-1] - trained[0], "random network's": random[-1] - random[0]}
        rows.append(row | {"sharpens": sharper(trained, random)})
    return pd.DataFrame(rows).set_index(["tap", "threshold"]).sort_index().round(3)


def pruning(table: pd.DataFrame, data: str) -> list[dict]:
    """C4: some dilution of at least 50 % costs at most 0.5 points of accuracy (mean over seeds; 95 % bound at most
    1.0) and less than random and permuted masks of equal dilution, in every seed and by more than their errors. One row
    right after pruning, one retrained (against the unpruned network retrained alike); both on the FF layers. Only
    seeds in which all three kinds of masks were measured count. The classifier is stated beside them."""
    rows, straight = [], ("", "right after pruning")
    cases = [("ff", *straight, "FF layers"), ("ff", "retrained_", "after a short retraining", "FF layers")]
    if "classifier" in table.layers.unique():
        alone = ("retrained_", "after a training of it alone")
        cases += [("classifier", *when, "classifier") for when in (straight, alone)]
    for layers, prefix, when, name in cases:
        part_of_network, beside = table[table.layers == layers], layers != "ff"
        every = pd.MultiIndex.from_product([("dilution", "loss", "error"), MASKS])
        found = _by_seed(part_of_network, prefix).unstack("method").reindex(columns=every).dropna()
        candidates = []
        for threshold, part in found.groupby(level="threshold"):
            loss, error, dilution = part.loss, part.error, part.dilution.andc.mean()
            if dilution < 0.5:
                continue
            mean, bound = loss.andc.mean(), 1.96 * error.andc.mean()  # not less with more seeds: they share the images
            wins = all(
                (loss[control] - loss.andc > 1.96 * np.hypot(error[control], error.andc)).all() for control in MASKS[1:]
            )
            met = bool(mean <= 0.005 and mean + bound <= 0.01 and wins)
            candidates.append((met, -mean, dilution, bound, loss, error.andc, threshold))
        row = {"claim": "C4", "data": data, "statistic": f"accuracy lost {when} by ANDC of the {name}"}
        row |= {"numbers": ""}
        if not candidates:
            row |= {"effect": None, "uncertainty": None, "null": "equal dilution"}
            row |= {"n": found.index.get_level_values("seed").nunique(), "by_seed": [], "beside": beside, "notes": ""}
            why = "no dilution of 50 % or more" if len(found) else "no network was retrained with every kind of mask"
            rows.append({**row, "verdict": f"not tested ({why})"})
            continue
        met, mean, dilution, bound, loss, error, threshold = max(candidates, key=lambda row: row[:2])
        row |= {"statistic": f"{row['statistic']} (dilution {dilution:.2f})"}
        row |= {"effect": round(-mean, 6), "uncertainty": round(bound, 6)}
        null = ", ".join(f"{name} masks lose {loss[name].mean():.4f}" for name in sorted(MASKS[1:]))
        row |= {"null": f"equal dilution: {null}", "n": len(loss), "verdict": word(met, data, len(loss))}
        ends = [loss.andc, loss.andc - 1.96 * error, loss.andc + 1.96 * error]
        usual = part_of_network[part_of_network.threshold == threshold].dropna(subset=f"{prefix}loss")
        usual = usual[~usual.method.isin(MASKS)]
        lost = usual.groupby("method")[f"{prefix}loss"].mean().items()
        notes = ", ".join(f"{name} masks lose {value:.4f}" for name, value in lost)
        notes = f"usual criteria, which decide nothing here: {notes}" if notes else ""
        rows.append(row | {"by_seed": np.stack(ends, axis=1).round(6).tolist(), "beside": beside, "notes": notes})
    return rows


def _by_seed(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Mean over draws of each threshold, seed and method: dilution, loss and its standard error. The draws of one seed
    share the test images out, so their mean is as certain as one method on all images."""
    keys = ["threshold", "seed", "method"]
    losses = {"loss": table[f"{prefix}loss"], "error": table[f"{prefix}loss_se"]}
    draws = table[[*keys, "dilution"]].assign(**losses).dropna(subset="loss").groupby(keys)
    return draws[["dilution", "loss"]].mean().assign(error=draws.error.apply(_error_of_mean))


def modus_vivendi(overall: pd.DataFrame, data: str) -> list[dict]:
    """C5: heads specialise more than chance and more than a random network's heads, and a head's ablation costs its own
    labels (by images that score nothing) more than the others, and more than randomly assigned ones. Two rows; both
    effects are means over encoders."""
    trained, random = (overall[overall.network == kind].set_index("seed") for kind in ("trained", "random"))
    beaten = bool((trained.excess > random.excess).all())
    above_dealt = bool((trained.gap > trained.gap_null_high).all())
    null = f"nodes permuted among heads; {RANDOM_NETWORK}"
    bounds = {name: [*zip(trained[f"{name}_low"], trained[f"{name}_high"], strict=True)] for name in ("excess", "gap")}
    text = "accuracy drop on a silenced head's own labels - on other labels"
    dealt = "other labels, the same head; randomly reassigned owners"
    texts = "excess specialisation of heads (nats), mean over encoders", f"{text}, mean over encoders"
    numbers = (
        f"random weights {random.excess.mean():.3f}",
        f"reassigned owners at most {trained.gap_null_high.max():.3f}",
    )
    return [
        verdict("C5", data, texts[0], [*trained.excess], bounds["excess"], null, beaten, numbers=numbers[0]),
        verdict("C5", data, texts[1], [*trained.gap], bounds["gap"], dealt, above_dealt, numbers=numbers[1]),
    ]


def largest_dilutions(table: pd.DataFrame) -> pd.DataFrame:
    """For each pruned part and method the largest dilution of the sweep at which C4's bounds hold (mean loss at most
    0.5 points, 95 % bound at most 1.0), right after pruning and retrained; nan where no dilution holds."""
    rows = {}
    for layers, part in table.groupby("layers"):
        for prefix, when in (("", "straight"), ("retrained_", "retrained")):
            means = _by_seed(part, prefix).groupby(["method", "threshold"]).mean()
            holds = means[(means.loss <= 0.005) & (means.loss + 1.96 * means.error <= 0.01)]
            for method in part.method.unique():
                rows.setdefault((layers, method), {})[when] = holds.dilution.get(method, pd.Series(dtype=float)).max()
    return pd.DataFrame(rows).T.rename_axis(["layers", "method"]).sort_index().round(3)


def _error_of_mean(errors: pd.Series) -> float:
    return float(np.sqrt((errors**2).sum(skipna=False)) / len(errors))  # one that is not known makes it unknown


def macroscopic(table: pd.DataFrame, data: str) -> list[dict]:
    """C6: accuracies of encoders and subsets of nodes, beyond encoder 1, follow from single nodes: rank correlation of
    predicted and measured at least 0.8, and a smaller mean error than a curve that knows the subset's size only."""
    effects, intervals = ([], []), ([], [])
    for seed in sorted(table.seed.unique()):
        part = table[(table.seed == seed) & (table.encoder > 1)]
        points = part[["predicted", "measured", "only_size"]].to_numpy()
        rng = np.random.default_rng(0)
        samples = points[rng.integers(len(points), size=(DRAWS, len(points)))]
        for number, statistic in enumerate((_rank_agreement, _gain_over_size)):
            effects[number].append(statistic(points[None])[0])
            intervals[number].append(interval(statistic(samples)))
    texts = (
        "rank correlation of predicted and measured accuracy - 0.8",
        "error of the size-only curve - of the prediction",
    )
    by_size = [part[["only_size", "measured", "predicted"]].to_numpy() for _, part in
               table[table.encoder > 1].groupby("seed")]  # fmt: skip
    alone = np.mean([_rank_agreement(points[None])[0] for points in by_size]) + 0.8
    errors = [np.abs(points[:, [0, 2]] - points[:, [1]]).mean(axis=0) for points in by_size]
    numbers = (f"{np.mean(effects[0]) + 0.8:.3f}", "{:.3f} - {:.3f}".format(*np.mean(errors, axis=0)))
    nulls = (f"none, a bound: the subset's size alone reaches {alone:.3f}", "accuracy of as many nodes of encoder 1")
    rows = zip(texts, effects, intervals, nulls, numbers, strict=True)
    return [verdict("C6", data, *row, True, numbers=said) for *row, said in rows]


def _rank_agreement(points: np.ndarray) -> np.ndarray:
    """Spearman correlation of the first two columns - 0.8: (samples, points, 3) -> (samples,)."""
    ranks = [pd.DataFrame(points[:, :, column]).rank(axis=1).to_numpy() for column in (0, 1)]
    a, b = (rank - rank.mean(axis=1, keepdims=True) for rank in ranks)
    return (a * b).sum(axis=1) / np.sqrt((a**2).sum(axis=1) * (b**2).sum(axis=1)) - 0.8


def _gain_over_size(points: np.ndarray) -> np.ndarray:
    predicted, measured, only_size = np.moveaxis(points, 2, 0)
    return np.abs(only_size - measured).mean(axis=1) - np.abs(predicted - measured).mean(axis=1)


def table(rows: list[dict]) -> pd.DataFrame:
    """Verdicts as a table to look at."""
    rows = [row | {"verdict": row["verdict"] + BESIDE * row["beside"]} for row in rows]
    return pd.DataFrame(rows).drop(columns=["by_seed", "beside"]).set_index("claim").round(4)


def _sums(nodes: pd.DataFrame, rng: np.random.Generator | None = None) -> np.ndarray:
    """Labels, clusters and noise of all nodes: (3,), or with rng of DRAWS bootstrap samples of them (3, DRAWS)."""
    values = nodes[["labels", "clusters"]].assign(noise=nodes.internal + nodes.external).to_numpy(dtype=float)
    if rng is None:
        return values.sum(axis=0)
    return values[rng.integers(len(values), size=(DRAWS, len(values)))].sum(axis=1).T


def _snr(sums: np.ndarray, labels: int) -> np.ndarray:
    return (labels - 1) * sums[0] / np.maximum(sums[2], 1)


def _snr_curves(nodes: pd.DataFrame, labels: int, rng: np.random.Generator | None):
    """SNR per encoder: (encoders,) and, with rng, bootstrap samples (DRAWS, encoders)."""
    groups = [group for _, group in nodes.groupby("encoder")]
    draws = np.stack([_snr(_sums(group, rng), labels) for group in groups], axis=1) if rng else None
    return np.array([_snr(_sums(group), labels) for group in groups]), draws


def _accuracy_curves(correct: dict, seed: int, kind: str, tap: str, rng: np.random.Generator | None):
    """Accuracy per encoder: (encoders,) and, with rng, bootstrap samples over images (DRAWS, encoders)."""
    names = [name for name in correct if name[:2] == (seed, kind) and name[2].endswith(f".{tap}")]
    names.sort(key=lambda name: int(name[2].split(".")[0]))
    right = np.stack([correct[name].numpy() for name in names], axis=1).astype(np.float32)
    chosen = (rng.integers(len(right), size=len(right)) for _ in range(DRAWS)) if rng else ()
    draws = [right[images].mean(axis=0) for images in chosen]
    return right.mean(axis=0), np.stack(draws) if draws else None
