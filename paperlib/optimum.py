"""Features + labels -> the optimum of a linear readout: a convex problem, solved until its gradient says so.

A readout is linear, without bias, from all T * D activations of a tap to the L labels (family). It is the minimum of
mean cross-entropy + l2/2 |W|^2 on activations divided by their RMS (choice): one number, no schedule, no augmentation.
The solver is L-BFGS with the Hessian of the most uncertain images as preconditioner and an exact line search, which
costs nothing, as logits are linear in W. Where bf16 is fast, it computes what the gradient has changed by since fp32
looked last, and fp32 looks again until its own gradient is small: the optimum is that of fp32.

Shapes: n images, F = T * D features, L labels.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from paperlib.training import fast_bf16

GRID = (1.0, 0.1, 0.01, 0.001)  # penalties that held-out images choose from
EXTENSIONS = 8  # decades by which the grid may grow at either end
ROUGHLY = 1e-2  # tolerance while penalties are compared
TOLERANCE = 1e-3  # largest norm of the gradient, over that at W = 0
SETTLED = 8  # by how much the gradient of `settled` is smaller: a solver that aims at half of what it needs is there
CERTAIN = 50  # times TOLERANCE: largest norm of the gradient over that of the penalty's, which bounds the error of W
PAIRS = 40  # steps that L-BFGS remembers
FEW = 5000  # images that may be taken as a basis of their features
SKETCH = 700  # images, the most uncertain ones, whose Hessian preconditions
REST = 0.1  # share of the others' Hessian that is put in, as if it were the same in all directions
CHEAPLY = 0.03  # share of the gradient down to which bf16 is trusted, before fp32 looks again
EXACTLY = 1e-5  # a gradient as small as that is looked at in fp64: in fp32 it is noise
ROWS = 2048  # images in one of its products
ROUNDS = 12  # times that fp32 (or fp64) looks
STEPS = 200  # steps between two looks


@dataclass(frozen=True)
class Problem:
    """A readout's training data, and what depends on nothing else."""

    features: Tensor  # (n, F), fp32
    labels: Tensor  # (n,)
    num_labels: int
    scale: float  # RMS of the features
    cheap: Tensor  # the features in bf16 where that is faster, else themselves
    first: float  # norm of the gradient at W = 0
    basis: Tensor | None = None  # (n, F), orthonormal: the features are coordinates in it, where images are few
    mask: Tensor | None = None  # (L, F) bool: weights that may differ from 0, see `masked`


@dataclass(frozen=True)
class Optimum:
    """A solved readout."""

    weight: Tensor  # (L, F), of features as they are
    l2: float
    objective: float
    gradient: float  # norm over that at W = 0
    steps: int
    coordinates: Tensor = field(repr=False)  # the weight as it was solved, to start from
    pairs: list[tuple[Tensor, Tensor]] = field(repr=False)  # steps and gradients, to start from


def problem(features: Tensor, labels: Tensor, num_labels: int, few: int = FEW) -> Problem:
    """Check features (n, F), or activations (n, T, D), and labels (n,), and prepare them for `solve`.

    Up to `few` images, if they are at most half as many as features, become its basis; `masked` wants few=0.

    Raises ValueError, in one sentence, for features that are not finite or the same for all images, and for a label
    without images.
    """
    features = features.flatten(1)
    counts = labels.bincount(minlength=num_labels)
    if not counts.all():
        raise ValueError(f"label {int(counts.argmin())} has no image to train a readout on: give every label some")
    if not features.isfinite().all():
        raise ValueError("features are not finite: the network has diverged, or its input has")
    if torch.equal(features.amin(dim=0), features.amax(dim=0)):
        raise ValueError("features are the same for all images, so no readout can learn from them: take another tap")
    scale, basis = features.square().mean().sqrt().item(), None
    if len(features) <= min(features.shape[1] // 2, few):  # the optimum is a combination of images
        basis, coordinates = torch.linalg.qr(features.T)
        features, basis = coordinates.T.contiguous(), basis.T
    cheap = features.bfloat16() if fast_bf16(features.device.type) else features
    found = Problem(features, labels, num_labels, scale, cheap, 1.0, basis)
    error = _error(features.new_zeros(len(features), num_labels), labels)
    return replace(found, first=_gradient(found, error, features).norm().item())


def masked(data: Problem, mask: Tensor) -> Problem:
    """The same problem for weights (L, F), or (L, T, D), that are 0 outside of a mask."""
    if data.basis is not None:
        raise ValueError("a mask needs the features themselves: prepare the problem with few=0")
    mask = mask.flatten(1)
    found = replace(data, mask=mask)
    error = _error(data.features.new_zeros(len(data.features), data.num_labels), data.labels)
    return replace(found, first=_gradient(found, error, data.features).norm().item())


def solve(data: Problem, l2: float, start: Optimum | None = None, tolerance: float = TOLERANCE) -> Optimum:
    """The readout with penalty l2 > 0, from another one of the same problem, or from 0.

    It is solved if its gradient is at most `tolerance` of that at W = 0, and so small beside the penalty's that, by
    strong convexity, W lies within 50 * tolerance (5 %) of the optimum.

    Raises ValueError for l2 <= 0, and RuntimeError if the gradient does not get below the tolerance.
    """
    if not 0 < l2 < float("inf"):
        raise ValueError(f"a readout's penalty l2 must be larger than 0, not {l2}: without it there is no optimum")
    weight = data.features.new_zeros(data.num_labels, data.features.shape[1])
    pairs, steps, features, before = [], 0, data.cheap, float("inf")
    if start is not None:
        weight, pairs = start.coordinates * data.scale, list(start.pairs)
    if data.mask is not None:  # another problem's steps lead out of it
        weight, pairs = weight * data.mask, []
    for _ in range(ROUNDS):
        bound = tolerance * min(1.0, CERTAIN * l2 * weight.norm().item() / data.first)
        point = _look(data, weight, torch.float32 if bound >= EXACTLY or not bound else torch.float64)
        size = (point.slope + l2 * weight).norm().item() / data.first
        if size <= bound:
            objective = F.cross_entropy(point.logits, data.labels).item() + l2 / 2 * weight.square().sum().item()
            coordinates = weight / data.scale
            whole = coordinates if data.basis is None else coordinates @ data.basis
            return Optimum(whole, l2, objective, size, steps, coordinates, pairs)
        if size > before / 2:
            features = data.features  # bf16 does not get any further
        target = bound / 2 or tolerance / 2  # at W = 0 there is no bound yet
        target = target if features is data.features else max(target, CHEAPLY * size)
        weight, taken = _descend(data, features, l2, point, pairs, target)
        steps, before = steps + taken, size
    raise RuntimeError(f"a readout's gradient is still {size:.1e} of its first value after {steps} steps: raise l2")


@dataclass(frozen=True)
class _Point:
    """A weight and what is known there."""

    weight: Tensor  # (L, F), of scaled features
    logits: Tensor  # (n, L)
    error: Tensor  # (n, L), the gradient of each image's cross-entropy
    slope: Tensor  # (L, F), the gradient of their mean; the penalty's is not in it


def _look(data: Problem, weight: Tensor, dtype: torch.dtype) -> _Point:
    """What is known at a weight, computed in this precision a few images at a time, and kept in fp32."""
    scaled, logits, errors = weight.to(dtype) / data.scale, [], []
    slope = torch.zeros_like(scaled)
    for features, labels in zip(data.features.split(ROWS), data.labels.split(ROWS), strict=True):
        features = features.to(dtype)
        logits.append(features @ scaled.T)
        errors.append(_error(logits[-1], labels))
        slope.addmm_(errors[-1].T, features)
    slope /= len(data.features) * data.scale
    slope = slope if data.mask is None else slope * data.mask
    return _Point(weight, torch.cat(logits).float(), torch.cat(errors).float(), slope.float())


def _descend(
    data: Problem, features: Tensor, l2: float, start: _Point, pairs: list[tuple[Tensor, Tensor]], target: float
) -> tuple[Tensor, int]:
    """L-BFGS steps in the precision of these features, until the gradient is small: (weight, steps). Only by how much
    the gradient differs from the start's is computed in that precision. The newest steps are left in `pairs`."""
    point, inverse = start, _preconditioner(data, l2, start.error)
    known = [_curved(pair, l2) for pair in pairs]
    most = STEPS if features is data.features else STEPS // 4
    for step in range(most):
        gradient = point.slope + l2 * point.weight
        if gradient.norm() <= target * data.first:
            return point.weight, step
        direction = -_two_loops(gradient, known, inverse)
        moved = (features @ direction.T.to(features.dtype)).float() / data.scale
        length = _line_search(data, point, direction, moved, l2)
        logits = point.logits + length * moved
        error = _error(logits, data.labels)
        slope = start.slope + _gradient(data, error - start.error, features)
        pair = length * direction, slope - point.slope
        if (pair[0] * pair[1]).sum() > 0:
            pairs.append(pair)
            known.append(_curved(pair, l2))
            del pairs[:-PAIRS], known[:-PAIRS]
        point = _Point(point.weight + pair[0], logits, error, slope)
    return point.weight, most


def _error(logits: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each image's cross-entropy: (n, L)."""
    error = logits.softmax(dim=1)
    error[torch.arange(len(labels), device=labels.device), labels] -= 1
    return error


def _gradient(data: Problem, error: Tensor, features: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy, in the precision of these features: (L, F), fp32."""
    gradient = (error.T.to(features.dtype) @ features).float() / (len(features) * data.scale)
    return gradient if data.mask is None else gradient * data.mask


def _preconditioner(data: Problem, l2: float, error: Tensor) -> Callable[[Tensor], Tensor]:
    """An approximate inverse of the Hessian at the point with these errors (n, L), the same for all labels: that of the
    most uncertain images, which have most of it where a readout is nearly sure of the others, and `REST`."""
    own = error.gather(1, data.labels[:, None])[:, 0]
    uncertain = -(error.square().sum(dim=1) + 2 * own) / data.num_labels / len(error)  # mean over labels of p (1 - p)
    share, rows = uncertain.clamp(min=0).topk(min(SKETCH, len(error)))
    sketch = data.features[rows] * share.sqrt()[:, None] / data.scale
    eigenvalues, vectors = torch.linalg.eigh(sketch @ sketch.T)
    kept = eigenvalues > 1e-6 * eigenvalues[-1]
    eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
    directions = (vectors / eigenvalues.sqrt()).T @ sketch
    rest = l2 + REST * (uncertain.sum() - share.sum()).clamp(min=0)
    leading = 1 / (eigenvalues + rest) - 1 / rest

    def inverse(gradient: Tensor) -> Tensor:
        found = gradient / rest + ((gradient @ directions.T) * leading) @ directions
        return found if data.mask is None else found * data.mask

    return inverse


def _curved(pair: tuple[Tensor, Tensor], l2: float) -> tuple[Tensor, Tensor, float]:
    """A step, by how much it changes the gradient, and their product. Pairs are kept without the penalty, so that they
    serve any."""
    step, slope = pair
    change = slope + l2 * step
    return step, change, (step * change).sum().item()


def _two_loops(gradient: Tensor, known: list, inverse: Callable[[Tensor], Tensor]) -> Tensor:
    """The inverse Hessian times the gradient, by L-BFGS."""
    found, shares = gradient.clone(), []
    for step, change, product in reversed(known):
        shares.append((step * found).sum().item() / product)
        found.sub_(change, alpha=shares[-1])
    found = inverse(found)
    if known:
        _, change, product = known[-1]
        found *= product / (change * inverse(change)).sum()
    for (step, change, product), share in zip(known, reversed(shares), strict=True):
        found.add_(step, alpha=share - (change * found).sum().item() / product)
    return found


def _line_search(data: Problem, point: _Point, direction: Tensor, moved: Tensor, l2: float) -> float:
    """The length of a step that minimises the objective along a direction, by Newton's method in one variable; moved:
    by how much a step of length 1 moves the logits."""
    along = l2 * (point.weight * direction).sum() - moved.gather(1, data.labels[:, None]).mean()
    bend = l2 * direction.square().sum()
    length = 1.0
    for _ in range(20):
        share = (point.logits + length * moved).softmax(dim=1)
        mean = (share * moved).sum(dim=1)
        slope = mean.mean() + along + length * bend
        curvature = (share * moved.square()).sum(dim=1).sub(mean.square()).mean() + bend
        change = (slope / curvature).item()
        length = length - change if change < length else length / 2
        if abs(change) < 0.01 * length:
            break
    return length


@dataclass(frozen=True)
class Choice:
    """The readout whose penalty held-out images prefer, and those that show how much hinges on it, if they were asked
    for and the machine's numbers can settle them."""

    best: Optimum
    tried: list[dict]  # l2, accuracy (0..1, held-out images), its error, steps, of every penalty along the way
    third: Optimum | None = None  # a third of its penalty
    triple: Optimum | None = None
    settled: Optimum | None = None  # the best one, with a gradient that is smaller by `SETTLED`


def choose(
    data: Problem,
    held_out: Tensor,
    labels: Tensor,
    grid: Iterable[float] = GRID,
    log: Callable[[str], None] = print,
    beside: bool = False,
) -> Choice:
    """The penalty of a grid that held-out features (m, F), labels (m,) prefer, and its readout; with `beside`, also
    those that show how much hinges on it.

    It is the largest one whose accuracy on them lies within a standard error of the highest (the one-standard-error
    rule of cross-validation). Penalties are tried from the largest down, each from the optimum before, until two are
    smaller than that one. Where the grid ends before, or at that one, it is extended by decades, and the log says so. A
    penalty whose readouts the machine's numbers cannot settle is left out, and the log says so; RuntimeError if that
    leaves none.
    """
    held_out, tried, found = held_out.flatten(1), {}, None

    def score(l2: float, start: Optimum | None) -> Optimum | None:
        try:
            solved = solve(data, l2, start, ROUGHLY)
        except RuntimeError as error:  # fp32 knows no better: images that any penalty answers, say
            log(f"{l2:g} is left out: {error}")
            return None
        accuracy = (held_out @ solved.weight.T).argmax(dim=1).eq(labels).float().mean().item()
        error = (accuracy * (1 - accuracy) / len(labels)) ** 0.5
        tried[l2] = {"l2": l2, "accuracy": accuracy, "error": error, "steps": solved.steps}
        return solved

    grid = sorted(grid, reverse=True)
    for l2 in (*grid, *(grid[-1] / 10**decade for decade in range(1, EXTENSIONS + 1))):
        if not _alike(tried) and sum(other < _leaders(tried)[0] for other in tried) >= 2:
            break
        if l2 < grid[-1]:
            log(f"the penalties are not small enough: trying {l2:g}, too")
        solved = score(l2, found)
        if solved is None and l2 < grid[-1]:
            break
        found = solved or found
    for _ in range(EXTENSIONS):
        last = max(tried, default=grid[0])
        best = max(tried, key=lambda l2: tried[l2]["accuracy"], default=0.0)
        if (
            _alike(tried) or last not in _leaders(tried) or last > 50 * best
        ):  # two decades above the best: nothing depends on it
            break
        log(f"the penalties are not large enough: trying {10 * last:g}, too")
        found = score(10 * last, found) or found
    leaders = _leaders(tried)
    for l2 in (*leaders, *sorted(tried.keys() - set(leaders), key=lambda l2: -tried[l2]["accuracy"])):
        try:
            best = solve(data, l2, found)
            others = _beside(data, best) if beside else {}
            return Choice(best, [tried[key] for key in sorted(tried)], **others)
        except RuntimeError as error:
            log(f"{l2:g} is left out: {error}")
    raise RuntimeError("no penalty has a readout that could be solved: take another tap, or more images")


def _leaders(tried: dict[float, dict]) -> list[float]:
    """Penalties within a standard error of the best one, the largest first."""
    best = max(tried.values(), key=lambda row: row["accuracy"], default={"accuracy": 0.0, "error": 0.0})
    enough = best["accuracy"] - best["error"]
    return sorted((l2 for l2, row in tried.items() if row["accuracy"] >= enough), reverse=True)


def _alike(tried: dict[float, dict]) -> bool:
    return len({row["accuracy"] for row in tried.values()}) <= 1


def _beside(data: Problem, best: Optimum) -> dict[str, Optimum | None]:
    third, triple = (_if_solvable(data, other, best) for other in (best.l2 / 3, 3 * best.l2))
    return {"third": third, "triple": triple, "settled": solve(data, best.l2, best, TOLERANCE / SETTLED)}


def _if_solvable(data: Problem, l2: float, start: Optimum) -> Optimum | None:
    try:
        return solve(data, l2, start)
    except RuntimeError:  # a comparison alone is no reason to take another penalty
        return None
