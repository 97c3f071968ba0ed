"""Curves show what their tables say."""

from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from paperlib import figures


def test_a_readers_own_style_changes_nothing(tmp_path):
    """usetex would even ask for a LaTeX that may not be there."""
    curves = pd.DataFrame({"seed": [0, 0], "epoch": [1, 2], "loss": [2.0, 1.0], "test_accuracy": [0.5, 0.6]})
    own = {"text.usetex": True, "font.size": 30, "axes.facecolor": "red", "savefig.dpi": 20, "lines.linewidth": 9}
    for folder, parameters in (("plain", {}), ("own", own)):
        with plt.rc_context(parameters):
            figure = figures.learning_curve(curves, "toy", 2)
            figures.save(figure, SimpleNamespace(output=tmp_path / folder, stamp="s"), "x", curves)
    for kind in ("png", "pdf", "svg", "csv"):
        assert (tmp_path / "plain" / f"x.{kind}").read_bytes() == (tmp_path / "own" / f"x.{kind}").read_bytes(), kind


def test_snr_and_accuracy_are_means_over_seeds():
    """Raw SNR at the main threshold; centred SNR and other thresholds lie elsewhere."""
    rows = [
        {"seed": seed, "network": kind, "encoder": encoder, "tap": "block", "threshold": threshold, "centred": centred}
        | {"accuracy": 0.1 * encoder + 0.02 * seed + 0.3 * (kind == "trained")}
        | {"snr": encoder + seed + 10 * (kind == "trained") + 100 * (threshold > 0.3) + 1000 * centred}
        for seed, kind, encoder, threshold, centred in product(
            (0, 1, 5), ("trained", "random"), (1, 2, 3), (0.3, 0.5), (False, True)
        )
    ]
    accuracy, snr = figures.snr_per_encoder(pd.DataFrame(rows), "toy", 0.3, ["block"]).axes
    for axis, trained, random in ((accuracy, [44, 54, 64], [14, 24, 34]), (snr, [13, 14, 15], [3, 4, 5])):
        assert [line.get_linestyle() for line in axis.lines[:2]] == ["-", "--"]
        assert axis.lines[0].get_ydata() == pytest.approx(np.array(trained))
        assert axis.lines[1].get_ydata() == pytest.approx(np.array(random))


def test_retrained_networks_are_drawn_at_their_own_height():
    """Seeds 0 and 1; retrained, everything is better, the unpruned network as well."""
    rows = [
        {"seed": seed, "layers": "ff", "method": method, "threshold": at, "dilution": at}
        | {"accuracy": 0.6 - at - 0.01 * seed, "loss": at + 0.01 * seed}
        | {"retrained_accuracy": 0.65 - 0.1 * at, "retrained_loss": 0.1 * at}
        for seed, method, at in product((0, 1), figures.METHODS, (0.2, 0.4))
    ]
    upper, lower = figures.pruning_curve(pd.DataFrame(rows), "toy").axes[:2]
    for axis, straight, retrained in ((upper, [39.5, 19.5], [63, 61]), (lower, [20.5, 40.5], [2, 4])):
        assert axis.containers[0].lines[0].get_ydata() == pytest.approx(np.array(straight))
        assert axis.containers[1].lines[0].get_ydata() == pytest.approx(np.array(retrained))
    levels = [line.get_ydata()[0] for line in upper.lines if list(line.get_xdata()) == [0, 1]]
    assert levels == pytest.approx([60, 65])
