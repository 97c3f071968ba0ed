"""Fields of single nodes -> the accuracy of many together (claim C6; the model is our choice).

The field of output label l for an image of label c is taken as normal, independent between output labels, with the
mean sum_k M_k[c, l] and the variance f * sum_k V_k[c, l], where V_k is the within-label variance of node k's field and
f one factor for the correlation between nodes. The predicted accuracy is the probability that l = c is the largest.
Shapes as in `snp`: L labels, T positions, D nodes.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from paperlib.snp import means_of


def node_fields(activations: Tensor, weight: Tensor) -> Tensor:
    """Every node's own output fields, image by image: (n, T, D), readout (L, T, D) -> (D, n, L)."""
    by_node = [x.flatten(0, 1).T.contiguous().unflatten(1, x.shape[:2]) for x in (activations, weight)]  # copied fast
    return torch.bmm(by_node[0], by_node[1].mT)


def moments(
    batches: Iterable[tuple[dict[str, Tensor], Tensor]], weights: dict[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Batches of activations, tap name -> (n, T, D), and labels (n,); readouts (L, T, D) -> mean M_k and within-label
    variance V_k of each node's field, both (D, L, L): node, input label, output label."""
    labels = len(next(iter(weights.values())))
    counts = next(iter(weights.values())).new_zeros(labels, dtype=torch.float64)
    sums = {name: counts.new_zeros(2, weight.shape[2], labels, labels) for name, weight in weights.items()}
    for activations, y in batches:
        counts += y.bincount(minlength=labels)
        for name, weight in weights.items():
            fields = node_fields(activations[name], weight).double()
            sums[name][0].index_add_(1, y, fields)
            sums[name][1].index_add_(1, y, fields.square())
    found = {}
    for name, total in sums.items():
        mean, square = (means_of(part.transpose(0, 1), counts).transpose(0, 1) for part in total)
        found[name] = mean.float(), (square - mean.square()).clamp(min=0).float()
    return found


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
