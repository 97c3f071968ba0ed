"""Fields of single nodes -> the accuracy of many together (claim C6; the model is our choice).

The field of output label l for an image of label c is taken as normal, independent between output labels, with the
mean sum_k M_k[c, l] and the variance f * sum_k V_k[c, l], where V_k is the within-label variance of node k's field and
f one factor for the correlation between nodes. The predicted accuracy is the probability that l = c is the largest.
Shapes as in `snp`: L labels, T positions, D nodes.
"""

import math
from collections.abc import Iterable, Iterator

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from paperlib.data import BATCH, Images
from paperlib.snp import means_of
from paperlib.taps import Tap, activations


def node_fields(activations: Tensor, weight: Tensor) -> Tensor:
    """Every node's own output fields, image by image: (n, T, D), readout (L, T, D) -> (D, n, L)."""
    by_node = [x.flatten(0, 1).T.contiguous().unflatten(1, x.shape[:2]) for x in (activations, weight)]  # copied fast
    return torch.bmm(by_node[0], by_node[1].mT)


def moments(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], weights: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Batches of activations, tap name -> (n, T, D), and labels (n,); readouts (L, T, D) -> mean M_k and within-label
    variance V_k (unbiased; 0 for a label with one image) of each node's field, both (D, L, L): node, input label,
    output label."""
    labels = len(next(iter(weights.values())))
    counts = next(iter(weights.values())).new_zeros(labels, dtype=torch.float64)
    sums = {name: counts.new_zeros(2, weight.shape[2], labels, labels) for name, weight in weights.items()}
    for batch, y in batches:
        counts += y.bincount(minlength=labels)
        for name, weight in weights.items():
            fields = node_fields(batch[name], weight).double()
            sums[name][0].index_add_(1, y, fields)
            sums[name][1].index_add_(1, y, fields.square())
    found = {}
    for name, total in sums.items():
        mean, square = (means_of(part.transpose(0, 1), counts).transpose(0, 1) for part in total)
        unbiased = (counts / (counts - 1).clamp(min=1))[:, None]
        found[name] = mean.float(), (unbiased * (square - mean.square())).clamp(min=0).float()
    return found


def moments_and_ratio(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], name: str, weight: Tensor
) -> tuple[Tensor, Tensor, float]:
    """Moments of one tap's nodes (see `moments`), and the within-label variance of the field of all of them together
    over the sum of theirs, mean over input and output labels: 1 for nodes that vary independently."""
    together = weight.flatten(1).unsqueeze(2)  # all nodes as one: (L, T * D, 1)

    def both() -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        for batch, labels in batches:
            yield batch | {"together": batch[name].flatten(1).unsqueeze(2)}, labels

    found = moments(both(), {name: weight, "together": together})
    mean, variance = found[name]
    apart = variance.sum(dim=0).mean().item()
    if not apart:
        raise ValueError(f"the nodes of {name} say the same of all images of a label: there is nothing to predict")
    return mean, variance, found["together"][1].mean().item() / apart


def variance_factor(ratio: float, sizes: Tensor, nodes: int) -> Tensor:
    """By how much the variance of the summed field of so many nodes exceeds the sum of theirs, if every pair of nodes
    is correlated alike and all nodes together have this ratio: 1 + (n - 1) (ratio - 1) / (D - 1)."""
    return 1 + (sizes - 1) * (ratio - 1) / max(1, nodes - 1)


def size_only(table: pd.DataFrame) -> pd.Series:
    """What the size alone says of a set's accuracy, in one encoder: the mean of the other sets of that size, and for
    all nodes the straight line in log(size) through the two largest sizes before them, at most 1: table with size and
    measured -> one number a row, nan where there is nothing to go by."""
    by_size = table.groupby("size").measured
    others = (by_size.transform("sum") - table.measured) / (by_size.transform("count") - 1).replace(0, math.nan)
    means, whole = by_size.mean(), table["size"].max()
    if len(means) > 2:
        (first, second), (low, high) = means.index[-3:-1], means.iloc[-3:-1]
        slope = (high - low) / math.log(second / first)
        others[table["size"] == whole] = min(1.0, high + slope * math.log(whole / second))
    return others


def random_subsets(nodes: int, sizes: Iterable[int], draws: int, generator: torch.Generator) -> Tensor:
    """For each size, `draws` random sets of so many nodes: (sizes * draws, D) bool."""
    return torch.cat([torch.rand(draws, nodes, generator=generator).argsort().argsort() < size for size in sizes])


def subset_answers(activations: Tensor, weight: Tensor, labels: Tensor, subsets: Tensor) -> Tensor:
    """Whether the nodes of a subset alone name the right label: (n, T, D), (L, T, D), (n,), (S, D) bool -> (S, n)."""
    fields = node_fields(activations, weight)
    summed = subsets.to(fields) @ fields.flatten(1)
    return summed.unflatten(1, fields.shape[1:]).argmax(dim=2) == labels


def predicted_accuracy(mean: Tensor, variance: Tensor, shares: Tensor, points: int = 48) -> Tensor:
    """Means and variances of summed fields (S, L, L) and each label's share of the images (L,) -> (S,), 0..1.

    The integral over the own label's field is a Gauss-Hermite sum.
    """
    abscissae, weights = (torch.from_numpy(part).to(mean) for part in np.polynomial.hermite.hermgauss(points))
    results = []
    for means, deviations in zip(mean, variance.clamp(min=1e-30).sqrt(), strict=True):
        own = means.diagonal()[:, None] + deviations.diagonal()[:, None] * abscissae * 2**0.5  # (L, points)
        log_below = torch.special.log_ndtr((own[:, :, None] - means[:, None, :]) / deviations[:, None, :])
        others = log_below.sum(dim=2) - log_below.diagonal(dim1=0, dim2=2).T
        results.append(shares @ (others.exp() @ weights) / torch.pi**0.5)
    return torch.stack(results)


def correlation_factor(mean: Tensor, variance: Tensor, shares: Tensor, accuracy: float) -> float:
    """The factor f with which all nodes (L, L) together get the measured accuracy, by bisection in 1e-4..1e4, or the
    end of that range."""
    low, high = -4.0, 4.0
    for _ in range(40):
        middle = (low + high) / 2
        if predicted_accuracy(mean[None], 10**middle * variance[None], shares).item() > accuracy:
            low = middle  # too good: more noise
        else:
            high = middle
    return 10**low


def subset_accuracies(network, places, x: Tensor, y: Tensor, images: Images, weights: dict, subsets: dict) -> dict:
    """Accuracy of some subsets of each tap's nodes (S, D) -> tap name -> (S,), in one pass."""
    right: dict[str, list[Tensor]] = {place.name: [] for place in places}
    for batch, labels in labelled_batches(network, places, x, y, images):
        for name, parts in right.items():
            parts.append(subset_answers(batch[name], weights[name], labels, subsets[name]))
    return {name: torch.cat(parts, dim=1).float().mean(dim=1).cpu() for name, parts in right.items()}


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


def labelled_batches(network: nn.Module, places: list[Tap], x: Tensor, y: Tensor, images: Images):
    """Activations of some taps and labels, batch by batch."""
    return zip(activations(network, places, x, *images.statistics), y.split(BATCH), strict=True)
