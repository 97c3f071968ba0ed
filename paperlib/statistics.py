"""What several claims count with: intervals of draws, and trends of ranks."""

import numpy as np
import pandas as pd


def rank_trend(values: np.ndarray) -> np.ndarray:
    """Spearman correlation of values with their order along the last axis, in -1..1; 0 for constant values."""
    values = np.asarray(values)
    ranks = pd.DataFrame(np.atleast_2d(values)).rank(axis=1).to_numpy().reshape(values.shape)
    ranks = ranks - ranks.mean(axis=-1, keepdims=True)
    order = np.arange(ranks.shape[-1]) - (ranks.shape[-1] - 1) / 2
    norm = np.sqrt((ranks**2).sum(axis=-1) * (order**2).sum())
    return (ranks * order).sum(axis=-1) / np.where(norm > 0, norm, 1)


def interval(draws: np.ndarray) -> tuple[float, float]:
    """The middle 95 % of some draws."""
    low, high = np.quantile(draws, [0.025, 0.975])
    return float(low), float(high)
