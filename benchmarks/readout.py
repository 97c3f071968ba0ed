"""How fast a readout is solved: this project's solver and scikit-learn's lbfgs, on the same features and objective.

    python benchmarks/readout.py --images 4000 --l2 0.1
    python benchmarks/readout.py --images 20000 --alone       # a path of penalties at the size of the measurements

Features are those of one tap of a committed network on CIFAR-100. Both start from 0 and stop at the same gradient norm,
1e-3 of that at 0 (scikit-learn is given the largest tolerance with which it gets there).
"""

import argparse
import time

import torch
from torch import Tensor

from paperlib import data, models, optimum, taps
from paperlib.paths import folder_of


def features(name: str, tap: str, number: int) -> tuple[Tensor, Tensor]:
    images = data.load("cifar100", folder_of("data"), 32)
    chosen = data.balanced(images.y_train)[:number]
    network = models.load_reference(name)
    (place,) = (place for place in taps.cct_taps(network, [tap.split(".")[1]]) if place.name == tap)
    return taps.features(network, [place], images.x_train[chosen], *images.statistics)[tap], images.y_train[chosen]


def relative_gradient(weight: Tensor, x: Tensor, y: Tensor, l2: float) -> float:
    """Norm of the objective's gradient over that at 0, features over their RMS, float64."""
    x = x.double() / x.double().square().mean().sqrt()

    def gradient(weight: Tensor) -> Tensor:
        error = (x @ weight.T).softmax(dim=1) - torch.nn.functional.one_hot(y, len(weight))
        return error.T @ x / len(x) + l2 * weight

    return (gradient(weight).norm() / gradient(torch.zeros_like(weight)).norm()).item()


def theirs(x: Tensor, y: Tensor, l2: float) -> tuple[float, float, int]:
    """(seconds, relative gradient, iterations) of scikit-learn."""
    from sklearn.linear_model import LogisticRegression

    scaled = (x / x.square().mean().sqrt()).numpy()
    for tolerance in (1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 1e-6):
        model = LogisticRegression(C=1 / (l2 * len(x)), fit_intercept=False, tol=tolerance, max_iter=10_000)
        start = time.monotonic()
        model.fit(scaled, y.numpy())
        seconds = time.monotonic() - start
        found = relative_gradient(torch.from_numpy(model.coef_).double(), x, y, l2)
        if found <= optimum.TOLERANCE:
            break
    return seconds, found, int(model.n_iter_.max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="cifar100-32-cct_7_3x2-seed0")
    parser.add_argument("--tap", default="4.block")
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--l2", type=float, default=0.1)
    parser.add_argument("--alone", action="store_true", help="no scikit-learn, but a path of penalties from 10 to --l2")
    options = parser.parse_args()
    x, y = features(options.network, options.tap, options.images)
    x = x.flatten(1)
    print(f"{options.tap}: {len(x)} images, {x.shape[1]} features, {torch.get_num_threads()} threads\n")
    print("| solver | l2 | seconds | steps | gradient |\n|---|---|---|---|---|")
    start, solved = time.monotonic(), None
    problem = optimum.problem(x, y, 100)
    for l2 in [l2 for l2 in optimum.GRID if options.alone and l2 > options.l2] + [options.l2]:
        solved = optimum.solve(problem, l2, solved)
        kind = str(problem.cheap.dtype).removeprefix("torch.")
        print(f"| ours, {kind} | {l2:g} | {time.monotonic() - start:.1f} | {solved.steps} | {solved.gradient:.1e} |")
        start = time.monotonic()
    if not options.alone:
        seconds, gradient, steps = theirs(x, y, options.l2)
        print(f"| scikit-learn, lbfgs | {options.l2:g} | {seconds:.1f} | {steps} | {gradient:.1e} |")


if __name__ == "__main__":
    main()
