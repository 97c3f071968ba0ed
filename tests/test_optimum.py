"""Readouts at their optimum: as other solvers find it, whatever the precision, the start and the basis of the nodes."""

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from paperlib import optimum


def case(n=120, features=30, labels=5, seed=0, offset=2.0):
    """Features that tell labels apart in part, with a large common mean, as activations have it."""
    random = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % labels
    centres = torch.randn(labels, features, generator=random)
    return 3 * (centres[y] + 1.5 * torch.randn(n, features, generator=random) + offset), y


def objective(weight, x, y, l2):
    """Written out with loops over images, in float64, for features over their RMS."""
    scale = float((x.double() ** 2).mean().sqrt())
    total = 0.0
    for row, label in zip(x.double().numpy() / scale, y.tolist(), strict=True):
        logits = weight @ row
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[label]
    return total / len(x) + l2 / 2 * (weight**2).sum()


@pytest.fixture(params=["fp32", "bf16"])
def precision(request, monkeypatch):
    monkeypatch.setattr(optimum, "fast_bf16", lambda device: request.param == "bf16")


@pytest.mark.parametrize("l2", [1.0, 0.03, 1e-3])
def test_scipy_finds_no_lower_objective(l2, precision):
    x, y = case(n=60, features=12)
    found = optimum.solve(optimum.problem(x, y, 5), l2)
    shape = (5, x.shape[1])
    start = np.zeros(shape).ravel()
    best = scipy.optimize.minimize(lambda w: objective(w.reshape(shape), x, y, l2), start, method="BFGS", tol=1e-6)
    scale = x.square().mean().sqrt().item()
    own = objective(found.weight.double().numpy() * scale, x, y, l2)
    assert own == pytest.approx(best.fun, abs=1e-5) and found.objective == pytest.approx(own, abs=1e-5)
    assert found.gradient <= optimum.TOLERANCE


def test_scikit_learn_finds_the_same(precision):
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = case(n=300, features=40)
    scaled = x / x.square().mean().sqrt()
    l2 = 0.01
    theirs = linear_model.LogisticRegression(C=1 / (l2 * len(x)), fit_intercept=False, tol=1e-8, max_iter=5000)
    theirs.fit(scaled.numpy(), y.numpy())
    ours = optimum.solve(optimum.problem(x, y, 5), l2)
    assert ours.objective == pytest.approx(objective(theirs.coef_.astype(float), x, y, l2), abs=1e-5)


@given(seed=st.integers(0, 1000), l2=st.sampled_from([0.3, 0.01]))
@settings(max_examples=15, deadline=None)
def test_the_optimum_has_no_memory(seed, l2):
    """It depends neither on where the path came from nor on the order of images."""
    x, y = case(seed=seed)
    data = optimum.problem(x, y, 5)
    direct = optimum.solve(data, l2, tolerance=1e-5)
    along = optimum.solve(data, l2, optimum.solve(data, 100 * l2), tolerance=1e-5)
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))
    shuffled = optimum.solve(optimum.problem(x[order], y[order], 5), l2, tolerance=1e-5)
    for other in (along, shuffled):
        assert torch.allclose(direct.weight, other.weight, atol=2e-3 * direct.weight.abs().max().item())


def test_rotated_features_have_the_rotated_optimum():
    """The penalty does not see the basis, so a rotated readout need not be solved again."""
    x, y = case()
    rotation = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(1)))[0]
    native = optimum.solve(optimum.problem(x, y, 5), 0.01, tolerance=1e-5)
    rotated = optimum.solve(optimum.problem(x @ rotation, y, 5), 0.01, tolerance=1e-5)
    assert torch.allclose(native.weight @ rotation, rotated.weight, atol=2e-3 * native.weight.abs().max().item())


def test_features_in_another_unit_have_the_same_answers():
    x, y = case()
    weights = [optimum.solve(optimum.problem(unit * x, y, 5), 0.1, tolerance=1e-5).weight for unit in (1.0, 1e-4)]
    assert torch.allclose(weights[0], 1e-4 * weights[1], atol=2e-3 * weights[0].abs().max().item())


def test_activations_are_flattened():
    x, y = case()
    whole, flat = (optimum.solve(optimum.problem(part, y, 5), 0.1).weight for part in (x.unflatten(1, (3, 10)), x))
    assert torch.equal(whole, flat)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x, y: (x.index_fill(1, torch.tensor([3]), torch.nan), y), "features are not finite"),
        (lambda x, y: (x[:1].expand(len(x), -1), y), "same for all images"),
        (lambda x, y: (x, y.where(y != 2, 1)), "label 2 has no image"),
    ],
    ids=["nan", "constant", "no image"],
)
def test_bad_features_are_named(change, words, refuses):
    with refuses(words):
        optimum.problem(*change(*case()), 5)


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan"), float("inf")])
def test_a_penalty_is_a_positive_number(l2, refuses):
    with refuses("must be larger than 0"):
        optimum.solve(optimum.problem(*case(), 5), l2)


def test_a_label_may_be_the_only_one_to_be_rare():
    x, y = case(n=61)
    y = y.where(y != 4, 0)
    y[-1] = 4
    assert optimum.solve(optimum.problem(x, y, 5), 0.1).gradient <= optimum.TOLERANCE


# --- masks


def test_a_masked_optimum_is_that_of_the_weights_it_leaves(precision):
    """scipy's, over those weights alone; from wherever it starts."""
    x, y = case(n=60, features=8)
    mask = torch.rand(5, 8, generator=torch.Generator().manual_seed(2)) < 0.5
    data = optimum.problem(x, y, 5, few=0)
    whole = optimum.solve(data, 0.03)
    pruned = optimum.masked(data, mask)
    found = [optimum.solve(pruned, 0.03, start, tolerance=1e-4) for start in (None, whole)]
    kept = mask.numpy()

    def restricted(values):
        weight = np.zeros((5, 8))
        weight[kept] = values
        return objective(weight, x, y, 0.03)

    best = scipy.optimize.minimize(restricted, np.zeros(int(mask.sum())), method="BFGS", tol=1e-6)
    for solved in found:
        assert (solved.weight[~mask] == 0).all() and solved.objective == pytest.approx(best.fun, abs=1e-5)
    assert best.fun > whole.objective


def test_a_mask_of_everything_changes_nothing():
    x, y = case()
    data = optimum.problem(x, y, 5, few=0)
    whole = optimum.solve(data, 0.1, tolerance=1e-5)
    same = optimum.solve(optimum.masked(data, torch.ones(5, 30, dtype=torch.bool)), 0.1, tolerance=1e-5)
    assert torch.allclose(whole.weight, same.weight, atol=1e-3 * whole.weight.abs().max().item())


def test_a_mask_needs_the_features_themselves(refuses):
    x, y = case(n=10, features=30)
    with refuses("few=0"):
        optimum.masked(optimum.problem(x, y, 5), torch.ones(5, 30, dtype=torch.bool))


def test_few_images_have_the_optimum_of_their_features():
    """Solved among combinations of images, or among all weights."""
    x, y = case(n=40, features=100)
    among_images = optimum.problem(x, y, 5)
    assert among_images.basis is not None and among_images.features.shape == (40, 40)
    found = [
        optimum.solve(data, 0.03, tolerance=1e-5).weight for data in (among_images, optimum.problem(x, y, 5, few=0))
    ]
    assert torch.allclose(*found, atol=2e-3 * found[0].abs().max().item())


# --- the penalty


def held_out_case():
    x, y = case(n=400, seed=3)
    return optimum.problem(x[:200], y[:200], 5), x[200:], y[200:]


def test_held_out_images_choose_the_penalty():
    data, x, y = held_out_case()
    chosen = optimum.choose(data, x, y, log=lambda text: None, beside=True)
    scores = {row["l2"]: row["accuracy"] for row in chosen.tried}
    highest = max(scores.values())
    error = (highest * (1 - highest) / len(y)) ** 0.5
    assert chosen.best.l2 == max(l2 for l2 in scores if scores[l2] >= highest - error)
    assert min(scores) < chosen.best.l2 < max(scores)
    assert (chosen.third.l2, chosen.triple.l2) == (chosen.best.l2 / 3, 3 * chosen.best.l2)
    for solved in (chosen.best, chosen.third, chosen.triple):
        assert solved.gradient <= optimum.TOLERANCE


def test_large_penalties_that_answer_alike_are_passed():
    """Scores on a plateau neither end the search nor extend the grid."""
    data, x, y = held_out_case()
    said = []
    chosen = optimum.choose(data, x, y, [1e6, 1e5, 1e4, 1.0, 0.1, 0.01, 0.001], said.append)
    assert chosen.best.l2 <= 1 and min(row["l2"] for row in chosen.tried) <= 0.01 and not said


@pytest.mark.parametrize("grid", [[1e-4, 1e-5], [1e4, 1e3]], ids=["too small", "too large"])
def test_the_edge_of_a_grid_is_not_believed(grid):
    data, x, y = held_out_case()
    said = []
    chosen = optimum.choose(data, x, y, grid, said.append)
    assert said and all("enough: trying" in line for line in said)
    tried = [row["l2"] for row in chosen.tried]
    assert sum(l2 < chosen.best.l2 for l2 in tried) >= 2 and max(tried) > chosen.best.l2


def test_where_no_penalty_matters_few_are_tried():
    """Labels that the features do not know."""
    x, y = torch.randn(300, 30, generator=torch.Generator().manual_seed(0)), torch.arange(300) % 5
    chosen = optimum.choose(optimum.problem(x[:200], y[:200], 5), x[200:], y[200:], log=lambda text: None)
    assert len(chosen.tried) <= 7


def test_a_penalty_that_cannot_be_settled_is_left_out(monkeypatch):
    data, x, y = held_out_case()
    solve, said = optimum.solve, []

    def stubborn(data, l2, *rest):
        if l2 in failing:
            raise RuntimeError("noise")
        return solve(data, l2, *rest)

    monkeypatch.setattr(optimum, "solve", stubborn)
    grid, failing = [10.0, 1.0, 0.1, 0.01], set()
    best = optimum.choose(data, x, y, grid, said.append).best.l2
    failing = {best}
    assert optimum.choose(data, x, y, grid, said.append).best.l2 != best
    assert any(f"{best:g} is left out" in line for line in said)
    failing = {best / 3}  # only beside it
    choice = optimum.choose(data, x, y, grid, said.append, beside=True)
    assert choice.best.l2 == best and choice.third is None and choice.triple.l2 == 3 * best


def test_images_that_every_penalty_answers_end_the_search():
    """No penalty is small enough to be worse, and the smallest ones fp32 cannot solve."""
    y = torch.arange(80) % 4
    x = torch.eye(4)[y] + 0.01 * torch.randn(80, 4, generator=torch.Generator().manual_seed(0))
    said = []
    chosen = optimum.choose(optimum.problem(x[:40], y[:40], 4), x[40:], y[40:], log=said.append)
    assert {row["accuracy"] for row in chosen.tried} == {1.0} and chosen.best.l2 == 1
    assert any("is left out" in line for line in said)
