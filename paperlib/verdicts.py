"""Tables of version 2 -> rows -> verdicts on C1 to C4: the rules, as values (choice).

They were written when version 1 was known and before any network of version 2 was measured.

A row is met iff every seed has the sign and the hierarchical 95 % interval (over seeds, nodes, and images, which seeds
share) excludes 0. Two kinds of rows say otherwise themselves: the same outcome in CCT and CNN, a loss below a bound.

A claim is supported if all of its rows are met, supported in part if some are, and not tested with fewer than 3 seeds;
on embedded data it is a demonstration, whatever the numbers say. A row that stands beside the others decides nothing.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from paperlib.data import EMBEDDED
from paperlib.heads import FEW
from paperlib.statistics import fold_draws, fold_weights, interval, over_seeds, slope

MIN_SEEDS = 3
DRAWS = 2000
FF, MHA, STREAM, FILTERS = "ff1", "attn", "block", "conv"


@dataclass(frozen=True)
class Row:
    """One statement of a claim, measured: positive is what is claimed."""

    claim: str
    name: str  # what is compared, in words
    by_seed: tuple[float, ...]
    low: float  # hierarchical 95 % interval of the mean over seeds
    high: float
    met: bool
    beside: bool = False

    @property
    def effect(self) -> float:
        return float(np.mean(self.by_seed))


@dataclass(frozen=True)
class Verdict:
    """What the rows of a claim come to."""

    status: str  # supported, in part, not supported, not tested, demonstration
    n: int  # seeds
    met: tuple[str, ...]  # names of the rows that are met
    failed: tuple[str, ...]


def of_rows(rows: Iterable[Row], data: str) -> Verdict:
    """The verdict of one claim on one data set; ValueError without a row that decides."""
    deciding = [row for row in rows if not row.beside]
    if not deciding:
        raise ValueError("a verdict needs at least one row that decides")
    met, failed = (tuple(row.name for row in deciding if row.met == wanted) for wanted in (True, False))
    n = min(len(row.by_seed) for row in deciding)
    status = "supported" if not failed else "in part" if met else "not supported"
    status = "not tested" if n < MIN_SEEDS else status
    return Verdict("demonstration" if data in EMBEDDED else status, n, met, failed)


def word(met: bool, data: str, n: int) -> str:
    """The verdict of one row, for a table."""
    if data in EMBEDDED:
        return f"demonstration (rule {'met' if met else 'not met'}, n = {n})"
    if n < MIN_SEEDS:
        return f"not tested (n = {n}; rule {'met' if met else 'not met'} so far)"
    return "supported" if met else "not supported"


def records(rows: Iterable[Row], data: str) -> list[dict]:
    """Rows as summary.json keeps them and pages show them: uncertainty is half the 95 % interval, by_seed each seed's
    effect."""
    return [
        {
            "claim": row.claim,
            "data": data,
            "statistic": row.name,
            "numbers": "",
            "effect": round(row.effect, 6),
            "uncertainty": round((row.high - row.low) / 2, 6),
            "null": f"95 % interval {row.low:.3g} to {row.high:.3g}",
            "n": len(row.by_seed),
            "verdict": word(row.met, data, len(row.by_seed)),
            "by_seed": [[round(value, 6)] for value in row.by_seed],
            "beside": row.beside,
            "notes": "",
        }
        for row in rows
    ]


@dataclass(frozen=True)
class Curves:
    """A statistic along depth for every seed, and what it would be on redrawn images and nodes: (S, E), (S, R, E)."""

    seeds: tuple[int, ...]
    values: np.ndarray
    draws: np.ndarray


def curves(tables: dict[str, pd.DataFrame], network: str, tap: str, column: str, where: dict) -> Curves:
    """From the tables `taps` and `folds` of `experiment.measure.nodes`, at one threshold.

    where: basis and centred; basis `rotated` is the mean over draws of rotations. A seed's images are redrawn alike for
    whatever is asked."""
    chosen = _chosen(tables["taps"], network, tap, where)
    if not len(chosen) or chosen.get("threshold", pd.Series([0])).nunique() > 1:
        raise ValueError(f"{tap} of the {network} network is not there, or at several thresholds: select one")
    points = chosen.pivot_table(index=["seed", "encoder"], columns="basis", values=column)
    known = chosen.get(f"{column}_error", pd.Series(0.0, chosen.index))  # accuracy is not a sum over nodes
    errors = known.groupby([chosen.seed, chosen.encoder]).first().unstack()
    folds = _chosen(tables["folds"], network, tap, where).pivot_table(
        index=["seed", "encoder"], columns="fold", values=column
    )
    values = points.mean(axis=1).unstack()
    # Only one rotation is measured without each fold: what images do to it is taken for what they do to the mean.
    spread = points.sem(axis=1).unstack() if points.shape[1] > 1 else values * errors
    return _drawn(values, folds, spread, f"{network} {tap} {column} {where}")


def _drawn(values: pd.DataFrame, folds: pd.DataFrame, spread: pd.DataFrame, name: str) -> Curves:
    """Curves from values and their standard errors for other reasons than images, seed x encoder, and values without
    each fold, (seed, encoder) x fold. What has another name errs independently."""
    weights, draws = fold_weights(folds.shape[1], DRAWS, np.random.default_rng(0)), []  # seeds share their images
    for seed, curve in zip(values.index, values.to_numpy(), strict=True):
        rng = np.random.default_rng([int(seed), *name.encode()])
        noise = spread.loc[seed].to_numpy() * rng.normal(size=(DRAWS, len(curve)))
        draws.append(fold_draws(curve, folds.loc[seed].to_numpy(), weights) + noise)
    return Curves(tuple(values.index), values.to_numpy(), np.stack(draws))


def _chosen(table: pd.DataFrame, network: str, tap: str, where: dict) -> pd.DataFrame:
    rows = table[(table.network == network) & (table.tap == tap) & (table.centred == where["centred"])]
    return rows[rows.basis.str.startswith(where["basis"])]


def row(claim: str, name: str, of: Callable[..., np.ndarray], *inputs: Curves, beside: bool = False) -> Row:
    """A row from a function of curves (..., E) -> (...), applied to the values and to every draw; ValueError for curves
    of different seeds."""
    if len({one.seeds for one in inputs}) > 1:
        raise ValueError(f"{name}: measured for seeds {sorted({one.seeds for one in inputs})}: measure the same ones")
    by_seed, draws = of(*(one.values for one in inputs)), of(*(one.draws for one in inputs))
    return _row(claim, name, by_seed, draws, beside)


def _row(claim: str, name: str, by_seed: np.ndarray, draws: np.ndarray, beside: bool = False) -> Row:
    low, high = interval(over_seeds(draws, np.random.default_rng(0)))
    met = bool((by_seed > 0).all() and low > 0)
    return Row(claim, name, tuple(float(value) for value in by_seed), low, high, met, beside)


RAW, CENTRED = {"basis": "native", "centred": False}, {"basis": "native", "centred": True}
ROTATED, ROTATED_CENTRED = {"basis": "rotated", "centred": False}, {"basis": "rotated", "centred": True}
STATISTICS = {"accuracy": ("accuracy", RAW), "raw SNR": ("snr", RAW), "centred SNR": ("snr", CENTRED)}


def sharpening(tables: dict[str, pd.DataFrame], taps: tuple[str, ...] = (FF, MHA), claim: str = "C3") -> list[Row]:
    """C3: along the encoders accuracy, raw and centred SNR grow, and more than the random network's; two rows each. The
    claim's nodes decide (FF, MHA); what is passed on (`block`) stands beside them."""
    rows = []
    for tap in (*taps, *([STREAM] if claim == "C3" else [])):
        for name, (column, where) in STATISTICS.items():
            trained, random = (curves(tables, kind, tap, column, where) for kind in ("trained", "random"))
            beside = tap == STREAM
            rows.append(row(claim, f"{name} of {tap} grows", slope, trained, beside=beside))
            text = f"{name} of {tap} grows more than with random weights"
            rows.append(row(claim, text, lambda a, b: slope(a) - slope(b), trained, random, beside=beside))
    return rows


def last_two_thirds(curve: np.ndarray) -> np.ndarray:
    """The encoders of the last two thirds, along the last axis."""
    return curve[..., curve.shape[-1] // 3 :]


def _lowest(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smallest difference over the last two thirds of the encoders."""
    return last_two_thirds(a - b).min(axis=-1)


def _lowest_excess(curve: np.ndarray) -> np.ndarray:
    return last_two_thirds(curve).min(axis=-1) - 1


def clusters(tables: dict[str, pd.DataFrame], tap: str, beside: bool = False) -> list[Row]:
    """C2, for the nodes of one tap, in every encoder of the last two thirds: (a) noise outside of clusters is smaller,
    against signal, than with random weights; (b) recognised labels are confused mutually more often than row and column
    sums give, and more than with random weights; (c) native nodes have a higher SNR than rotated ones, raw and centred,
    by a larger factor than with random weights."""

    def of(network: str, column: str, where: dict) -> Curves:
        return curves(tables, network, tap, column, where)

    external = [of(kind, "snr_external", RAW) for kind in ("trained", "random")]
    mutual = [of(kind, "mutual", RAW) for kind in ("trained", "random")]
    rows = [
        row("C2", f"(a) S/N with external noise of {tap}, above random weights", _lowest, *external, beside=beside),
        row("C2", f"(b) mutual confusions of {tap}, above chance", _lowest_excess, mutual[0], beside=beside),
        row("C2", f"(b) mutual confusions of {tap}, above random weights", _lowest, *mutual, beside=beside),
    ]
    for name, native, rotated in (("raw", RAW, ROTATED), ("centred", CENTRED, ROTATED_CENTRED)):
        four = [of(kind, "snr", where) for kind in ("trained", "random") for where in (native, rotated)]
        text = f"(c) {name} SNR of {tap}, native above rotated"
        rows.append(row("C2", text, _lowest, *four[:2], beside=beside))
        rows.append(row("C2", f"{text}, more than with random weights", _lowest_ratio, *four, beside=beside))
    return rows


def _lowest_ratio(native: np.ndarray, rotated: np.ndarray, other: np.ndarray, other_rotated: np.ndarray) -> np.ndarray:
    return _lowest(native / rotated, other / other_rotated)


def unified(cct: dict[str, pd.DataFrame], cnn: dict[str, pd.DataFrame]) -> list[Row]:
    """C1, for FF nodes of a CCT and filters of a CNN: (a) C3's rows of accuracy and raw SNR have the same outcome in
    both, and (b) those of centred SNR; (c) steps of accuracy and SNR along depth correlate in both; (d) native over
    rotated SNR grows with depth, and ends above 1 and above that of random weights, in both."""
    rows = [
        _same_outcome("b" if first.name.startswith("centred") else "a", first, second)
        for first, second in zip(sharpening(cct, (FF,), "C1"), sharpening(cnn, (FILTERS,), "C1"), strict=True)
    ]
    for tables, tap in ((cct, FF), (cnn, FILTERS)):
        accuracy, snr = (curves(tables, "trained", tap, *STATISTICS[name]) for name in ("accuracy", "raw SNR"))
        rows.append(row("C1", f"(c) steps of accuracy and SNR of {tap} correlate", steps_correlate, accuracy, snr))
        four = [curves(tables, kind, tap, "snr", where) for kind in ("trained", "random") for where in (RAW, ROTATED)]
        for text, of in (
            ("ends above 1", lambda a, b, c, d: (a / b)[..., -1] - 1),
            ("ends above random weights", lambda a, b, c, d: (a / b - c / d)[..., -1]),
            ("grows with depth", lambda a, b, c, d: slope(a / b)),
        ):
            rows.append(row("C1", f"(d) native over rotated SNR of {tap} {text}", of, *four))
    return rows


def _same_outcome(part: str, first: Row, second: Row) -> Row:
    """Whether two rows are both met, or both not; its numbers are those of the smaller effect."""
    smaller = min(first, second, key=lambda one: one.effect)
    name = f"({part}) the same outcome in CCT and CNN: {first.name} / {second.name}"
    return replace(smaller, name=name, met=first.met == second.met)


def steps_correlate(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Correlation of the steps of two curves along the last axis, in -1..1; 0 where one of them does not move."""
    a, b = (np.diff(part, axis=-1) for part in (first, second))
    a, b = (part - part.mean(axis=-1, keepdims=True) for part in (a, b))
    norm = np.sqrt((a**2).sum(axis=-1) * (b**2).sum(axis=-1))
    return (a * b).sum(axis=-1) / np.where(norm > 0, norm, 1)


def last_third(curve: np.ndarray) -> np.ndarray:
    """The encoders of the last third, along the last axis."""
    return curve[..., 2 * curve.shape[-1] // 3 :]


def by_fold(table: pd.DataFrame, name: str, column: str, error: str = "") -> Curves:
    """A statistic from a table with seed, encoder and fold (-1: all test images, else without that fold), one row each;
    error: the column of its standard error for other reasons than images (nodes, permutations). name: what it is of;
    other things err independently. ValueError for what is not there or not a number."""
    whole = table[table.fold == -1]
    if not len(whole):
        raise ValueError(f"{column} of {name} is not there: measure it")
    points = table.pivot(index=["seed", "encoder"], columns="fold", values=column)
    spread = whole.pivot(index="seed", columns="encoder", values=error) if error else None
    if points.isna().any(axis=None) or (spread is not None and spread.isna().any(axis=None)):
        encoder = points[points.isna().any(axis=1)].index.get_level_values("encoder").min()
        raise ValueError(f"{column} of {name} is no number in encoder {encoder}: there is nothing to judge")
    values = points[-1].unstack()
    spread = values * 0 if spread is None else spread
    return _drawn(values, points.drop(columns=-1), spread, f"{name} {column} {error}")


def _lowest_late(*curves: np.ndarray) -> np.ndarray:
    """The smallest value, or difference of two, over the last third of the encoders."""
    first, *second = curves
    return last_third(first - second[0] if second else first).min(axis=-1)


def modus_vivendi(
    trained: pd.DataFrame, random: pd.DataFrame, ablation: pd.DataFrame, cooperation: pd.DataFrame
) -> list[Row]:
    """C5, in every encoder of the last third, from the tables of `experiment.division`: (a) heads specialise more than
    permuted nodes, and than the random network's heads; (b) silencing a head costs its own labels more than others, and
    more than with owners randomly reassigned; (c) a head chooses among its own labels better than a head that is put
    together of the encoder's nodes at random, and owns labels like it. Beside them: is it the nodes? Native above
    rotated ones, for (a), (b) and sets of `FEW` nodes: a whole head does not know a rotation, so that (c) holds for
    rotated nodes as it does for native ones."""

    def specialised(table: pd.DataFrame, network: str, basis: str) -> Curves:
        return by_fold(*_mean_of_draws(table, "basis", basis, "excess", "chance_error", network), "excess", "error")

    def silenced(owners: str, column: str = "gap", error: str = "chance_error") -> Curves:
        chosen = ablation.assign(above=ablation.gap - ablation.chance, nothing=0.0)
        return by_fold(*_mean_of_draws(chosen, "owners", owners, column, error, "ablation"), column, "error")

    native, turned = (specialised(trained, "trained", basis) for basis in ("native", "rotated"))
    sets = cooperation[cooperation["size"] == FEW]
    few = (
        by_fold(*_mean_of_draws(sets, "nodes", nodes, "choice", "", "sets"), "choice", "error")
        for nodes in ("head", "rotated")
    )
    alone, turned_alone = (silenced(owners, error="nothing") for owners in ("native", "rotated"))
    rows = {
        "(a) heads specialise more than permuted nodes": (native,),
        "(a) more than heads of random weights": (native, specialised(random, "random", "native")),
        "(b) silencing a head costs its own labels more than others": (alone,),
        "(b) more than with owners randomly reassigned": (silenced("native", "above"),),
        "(c) a head is expert among its own labels": (_expertise(cooperation),),
    }
    beside = {
        "(a) native nodes specialise more than rotated ones": (native, turned),
        "(b) owners by native nodes lose more than by rotated ones": (alone, turned_alone),
        f"(c) {FEW} native nodes of a head choose better than {FEW} rotated ones": (*few,),
    }
    decide = [row("C5", name, _lowest_late, *of) for name, of in rows.items()]
    return decide + [row("C5", name, _lowest_late, *of, beside=True) for name, of in beside.items()]


def _mean_of_draws(
    table: pd.DataFrame, by: str, start: str, column: str, error: str, name: str
) -> tuple[pd.DataFrame, str]:
    """Rows whose `by` begins so, as one row for each seed, encoder and fold: the mean of a column over draws
    (rotations, orders), and as error that of the draws' mean and the column `error` together."""
    cells = table[table[by].str.startswith(start)].groupby(["seed", "encoder", "fold"])
    spread = cells[column].sem().fillna(0.0) ** 2 + (cells[error].mean() ** 2 if error else 0.0)
    found = cells[column].mean().to_frame().assign(error=spread**0.5).reset_index()
    return found, f"{name} {start}"


def _expertise(cooperation: pd.DataFrame) -> Curves:
    """By how much a whole head's choice among its own labels is better than that of heads of dealt nodes."""
    whole = cooperation[cooperation.whole].groupby(["nodes", "seed", "encoder", "fold"]).choice
    head, dealt, spread = whole.mean().loc["head"], whole.mean().loc["dealt"], whole.std().loc["dealt"]
    table = (head - dealt).rename("ahead").to_frame().assign(spread=spread).reset_index()
    return by_fold(table, "heads", "ahead", "spread")


def macroscopic(table: pd.DataFrame, tap: str, beside: bool = False) -> list[Row]:
    """C6, for the nodes of one tap, from the table of `experiment.sets`: (a) among sets of one size in one encoder,
    predicted and measured accuracies have a positive rank correlation; (b) the prediction errs less than a curve that
    knows the size in the same encoder; (c) so it does for all nodes of an encoder together. Intervals are over encoders
    and seeds: sets of one encoder share nodes and images."""
    own = table[(table.tap == tap) & (table.network == "trained") & (table.basis == "native")]
    small, whole = (own[(own["size"] == own.groupby("encoder")["size"].transform("max")) == part] for part in (0, 1))
    if not len(small):
        raise ValueError(f"no sets of nodes of {tap} are there: measure them")
    cells = small[small["size"] > 1].groupby(["seed", "encoder", "size"])[["predicted", "measured"]]
    ranks = cells.apply(lambda cell: spearmanr(cell.predicted, cell.measured).statistic).fillna(0.0)
    by_encoder = {f"(a) predicted and measured accuracy of sets of {tap} rank alike": ranks}
    for text, part in ((f"(b) sets of {tap}", small), (f"(c) whole encoders of {tap}", whole)):
        better = (part.size_only - part.measured).abs() - (part.predicted - part.measured).abs()
        by_encoder[f"{text} are predicted better than by their size"] = better.groupby([part.seed, part.encoder]).mean()
    return [_over_encoders(name, part, beside) for name, part in by_encoder.items()]


def _over_encoders(name: str, values: pd.Series, beside: bool) -> Row:
    """A row from one number for each seed and encoder: draws redraw encoders within seeds."""
    points = values.groupby(["seed", "encoder"]).mean().unstack().to_numpy()
    rng = np.random.default_rng(0)
    draws = np.stack([seed[rng.integers(len(seed), size=(DRAWS, len(seed)))].mean(axis=1) for seed in points])
    return _row("C6", name, points.mean(axis=1), draws, beside)


HALF_A_POINT, ONE_POINT = 0.005, 0.01


def pruning(table: pd.DataFrame, tap: str = STREAM, beside: bool = False) -> list[Row]:
    """C4, reading R1, from the table of `experiment.readings`, at the smallest dilution of at least one half, after
    retraining: the loss, mean over seeds, is at most half a point, its upper bound at most one; and it is smaller than
    with random and permuted masks, on the same images. The usual criteria stand beside. Errors are those of test
    images, which seeds share."""
    own = table[table.tap == tap]
    return _spared(own[own.threshold == deciding_threshold(own)], tap, "retrained_loss", beside)


def deciding_threshold(readouts: pd.DataFrame) -> float:
    """The threshold at which C4 is decided, of pruned readouts of one tap: the smallest dilution of at least one half.
    ValueError if there is none."""
    dilution = readouts[readouts.method == "andc"].groupby("threshold").dilution.mean()
    if not (dilution >= 0.5).any():
        tap = readouts.tap.iloc[0]
        raise ValueError(f"no threshold dilutes the readout of {tap} by one half: add larger prune_thresholds")
    return dilution[dilution >= 0.5].idxmin()


def late_layers(table: pd.DataFrame) -> list[Row]:
    """C4, the other readings, from the table of `experiment.late`, after the longest retraining: the rows of `pruning`,
    which decide nothing here, for every part that was pruned."""
    last = table[table.epochs == table.epochs.max()]
    parts = last.groupby(["reading", "encoders"])
    return [row for names, part in parts for row in _spared(part, pruned_part(*names), "loss", beside=True)]


def of_transformer(
    nodes: dict[str, pd.DataFrame],
    heads: dict[str, pd.DataFrame],
    pruned: pd.DataFrame,
    late: pd.DataFrame,
    sets: pd.DataFrame,
) -> list[Row]:
    """C2 to C6 of transformers alone (C1 asks for a CNN beside them), from the tables of `experiment.measure` at one
    threshold, `division`, `readings`, `late` and `sets`."""
    rows = [row for tap in (FF, MHA, STREAM) for row in clusters(nodes, tap, beside=tap == STREAM)]
    rows += sharpening(nodes) + pruning(pruned) + late_layers(late)
    encoders = {network: table for network, table in heads["encoders"].groupby("network")}
    rows += modus_vivendi(encoders["trained"], encoders["random"], heads["ablation"], heads["cooperation"])
    return rows + [row for tap in (STREAM, FF, MHA) for row in macroscopic(sets, tap, beside=tap != STREAM)]


def pruned_part(reading: str, encoders: int) -> str:
    """What a reading prunes (`experiment.late`), in words."""
    unit = "layer" if reading == "filters" else "encoder"
    return f"{reading} of the last {unit}" if encoders == 1 else f"{reading} of the last {encoders} {unit}s"


def _spared(at: pd.DataFrame, where: str, loss: str, beside: bool) -> list[Row]:
    """The rows of `pruning` from a table of one dilution, with the name of its column of losses."""
    rng = np.random.default_rng(0)

    def drawn(method: str, column: str) -> tuple[np.ndarray, np.ndarray]:
        by_seed = at[at.method == method].groupby("seed")[[column, f"{column}_se"]].mean().to_numpy().T
        return by_seed[0], by_seed[0][:, None] + by_seed[1][:, None] * rng.normal(size=DRAWS)  # seeds share images

    lost, draws = drawn("andc", loss)
    low, high = interval(over_seeds(draws, rng))
    text = f"accuracy of {where} lost by ANDC at dilution {at[at.method == 'andc'].dilution.mean():.2f}"
    met = bool(lost.mean() <= HALF_A_POINT and high <= ONE_POINT)
    spared = tuple(float(HALF_A_POINT - value) for value in lost)
    rows = [Row("C4", f"{text}, below half a point", spared, HALF_A_POINT - high, HALF_A_POINT - low, met, beside)]
    for method in ("random", "permuted", "magnitude", "activation"):
        aside = beside or method in ("magnitude", "activation")
        rows.append(_row("C4", f"{text}, less than by {method} masks", *drawn(method, "andc_ahead"), aside))
    return rows
