"""What several claims count with: slopes, trends, and intervals over seeds, nodes and test images."""

import numpy as np
import pandas as pd
from scipy.stats import norm, t


def rank_trend(values: np.ndarray) -> np.ndarray:
    """Spearman correlation of values with their order along the last axis, in -1..1; 0 for constant values."""
    values = np.asarray(values)
    ranks = pd.DataFrame(np.atleast_2d(values)).rank(axis=1).to_numpy().reshape(values.shape)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    order = np.arange(ranks.shape[-1]) - (ranks.shape[-1] - 1) / 2
    norm = np.sqrt((ranks**2).sum(axis=-1) * (order**2).sum())
    return (ranks * order).sum(axis=-1) / np.where(norm > 0, norm, 1)


def slope(values: np.ndarray) -> np.ndarray:
    """Least-squares slope against relative depth (0 first, 1 last) along the last axis: what a straight line grows by
    from the first place to the last."""
    values = np.asarray(values, dtype=float)
    depth = np.linspace(0, 1, values.shape[-1]) - 0.5
    return (values * depth).sum(axis=-1) / (depth**2).sum()


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of some draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)


def fold_draws(values: np.ndarray, folds: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """What statistics would be on redrawn images, to first order: values (...), the same without each fold (..., F) and
    how often each fold is drawn (R, F), summing to F -> (R, ...).

    The infinitesimal jackknife: a fold's influence is F - 1 times what leaving it out changes. Few folds know their own
    spread badly, so draws are as wide as Student's t asks for (F - 1 degrees of freedom). Statistics that share
    `weights` are drawn on the same images."""
    number = folds.shape[-1]
    wider = (number / (number - 1)) ** 0.5 * t.ppf(0.975, number - 1) / norm.ppf(0.975)
    influence = wider * (number - 1) * (folds.mean(axis=-1, keepdims=True) - folds)
    return values + np.moveaxis(influence @ weights.T, -1, 0) / number


def fold_weights(folds: int, draws: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of so many folds is drawn, with replacement: (R, F)."""
    return rng.multinomial(folds, np.full(folds, 1 / folds), size=draws).astype(float)


def over_seeds(by_seed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Hierarchical draws: values redrawn within seeds (S, R) -> their mean over seeds that are redrawn, too (R,).

    The r-th draw of every seed is on the same redrawn images, as all seeds are scored on the same ones."""
    seeds, draws = by_seed.shape
    return by_seed[rng.integers(seeds, size=(draws, seeds)), np.arange(draws)[:, None]].mean(axis=1)
