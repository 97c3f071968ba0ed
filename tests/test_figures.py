"""Curves show what their tables say."""

import re
from itertools import product
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from paperlib import answers, figures


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


# --- version 2 of the measure


def measured_taps():
    """A table `taps` whose accuracy and SNR are known: trained grows by 1 an encoder, rotated by half, random stays."""
    rows = []
    for seed, network, encoder, basis, centred in product(
        (0, 1), ("trained", "random"), (1, 2, 3), ("native", "rotated-0", "rotated-1"), (False, True)
    ):
        slope = {"native": 1.0, "rotated-0": 0.4, "rotated-1": 0.6}[basis] * (network == "trained")
        row = {"seed": seed, "network": network, "encoder": encoder, "tap": "ff1", "basis": basis, "centred": centred}
        row |= {"accuracy": 0.1 * encoder + 0.02 * seed, "snr": 1 + slope * encoder + seed + 10 * centred}
        rows.append(row | {"labels_per_node": 7.0})
    return pd.DataFrame(rows)


def test_depth_curves_are_means_over_seeds_and_rotations():
    figure = figures.along_depth(measured_taps(), "toy")
    accuracy, raw, centred = figure.axes
    assert accuracy.lines[0].get_ydata() == pytest.approx([11, 21, 31])
    trained, random, rotated = (line.get_ydata() for line in raw.lines)
    assert trained == pytest.approx([2.5, 3.5, 4.5]) and random == pytest.approx([1.5] * 3)
    assert rotated == pytest.approx([2, 2.5, 3])
    assert centred.lines[0].get_ydata() == pytest.approx([12.5, 13.5, 14.5])


def numbers(sentence):
    return [float(number) for number in re.findall(r"(?<![\w.])-?\d+(?:\.\d+)?", sentence)]


def test_sentences_say_the_numbers_of_the_tables():
    taps = measured_taps()
    assert numbers(answers.measured(taps)) == [2.5, 4.5, 1.5, 11, 31, 3]
    assert numbers(answers.which(taps)) == [1.5, 1]


def division_tables():
    encoders = [
        {"seed": 0, "network": network, "encoder": encoder, "basis": basis, "fold": -1, "excess": value * encoder}
        for (network, basis, value), encoder in product(
            (("trained", "native", 0.2), ("trained", "rotated-0", 0.05), ("random", "native", 0.01)), (1, 2)
        )
    ]
    ablation = [
        {"seed": 0, "encoder": encoder, "owners": owners, "fold": -1, "gap": gap * encoder, "chance": 0.001}
        for (owners, gap), encoder in product((("native", 0.02), ("rotated-0", 0.01), ("best", 0.03)), (1, 2))
    ]
    cooperation = [
        {"seed": 0, "encoder": encoder, "nodes": nodes, "fold": -1, "whole": True, "choice": 0.5 + gain * encoder}
        for (nodes, gain), encoder in product((("head", 0.1), ("dealt", 0.05)), (1, 2))
    ]
    parts = {"encoders": encoders, "ablation": ablation, "cooperation": cooperation}
    return {name: pd.DataFrame(rows) for name, rows in parts.items()}


def test_heads_are_drawn_in_nats_points_and_shares():
    left, middle, right = figures.heads_along_depth(division_tables(), "toy").axes
    assert [line.get_ydata()[-1] for line in left.lines if len(line.get_ydata())] == pytest.approx([0.4, 0.1, 0.02])
    assert [line.get_ydata()[-1] for line in middle.lines if len(line.get_ydata())] == pytest.approx([4, 2, 6, 0.1])
    assert [line.get_ydata()[-1] for line in right.lines if len(line.get_ydata())] == pytest.approx([70, 60])
    assert numbers(answers.divided(division_tables())) == [0.4, 0.1, 0.02, 4, 6]


def test_heads_and_owners_are_counted_and_drawn():
    rows = []
    for (network, encoder, own, other), head in product(
        (("trained", 1, 5, 4), ("trained", 2, 9, 1), ("random", 2, 3, 3)), (0, 1)
    ):
        matrix = np.full((3, 3), 0.5)
        np.fill_diagonal(matrix, [own, other, 7] if head == 0 else [other, own, 7])  # the third label has no owner
        row = {"network": network, "encoder": encoder, "head": head, "owned": [head == 0, head == 1, False]}
        rows.append(pd.concat([pd.DataFrame(row), pd.DataFrame(matrix)], axis=1))
    table = pd.concat(rows, ignore_index=True)
    assert numbers(answers.answering(table)) == [9, 1, 5, 4, 3, 3]
    axes = figures.head_matrices(table, "toy", "here").axes
    assert len(axes) == 6 and axes[3].images[0].get_array().diagonal().tolist() == [1, 9, 7]
    assert "random weights" in axes[4].get_ylabel() and len(axes[3].patches) == 1

    columns = ["seed", "encoder", "head", "owner", "labels", "drop"]
    cells = [(0, 2, 0, 0, 3, 0.04), (0, 2, 0, 1, 1, 0.0), (0, 2, 1, 0, 3, 0.01), (0, 2, 1, 1, 1, 0.08)]
    lost = pd.DataFrame(cells, columns=columns)
    assert numbers(answers.silenced(lost)) == [5, 0.8]
    image = figures.silenced_heads(lost, "toy").axes[0].images[0]
    assert image.get_array().tolist() == [[4, 0], [1, 8]]


def test_thresholds_and_penalties_are_summed_up():
    taps = [
        {
            "network": "trained",
            "tap": "ff1",
            "basis": "native",
            "centred": False,
            "threshold": at,
            "encoder": encoder,
            "snr": snr,
        }
        for at, (first, last) in {0.1: (3, 2), 0.3: (2, 4)}.items()
        for encoder, snr in ((1, first), (2, last))
    ]
    variants = [
        {
            "seed": 0,
            "network": "trained",
            "tap": "ff1",
            "threshold": 0.3,
            "encoder": encoder,
            "variant": name,
            "snr": snr,
        }
        for encoder in (1, 2)
        for name, snr in {"best": 4, "third": 3.5, "triple": 4.5, "settled": 4 + 0.02 * encoder}.items()
    ]
    said = answers.robust(pd.DataFrame(taps), pd.DataFrame(variants), 0.3)
    assert numbers(said) == [1, 2, 4, 3.5, 4.5, 1]


def test_clusters_are_told_against_names_and_random_weights():
    top = pd.DataFrame([{"label": "oak", "other": "palm", "nodes": 7}])
    rows = [(0, "trained", 0.2, 0.05), (1, "trained", 0.3, 0.07), (0, "random", 0.1, 0.05), (1, "random", 0.1, 0.05)]
    shares = pd.DataFrame(rows, columns=["seed", "network", "share", "permuted_high"])
    assert numbers(answers.clustered(top, shares)) == [7, 25, 10, 6, 97.5]
    assert numbers(answers.clustered(top, shares[:0])) == [7]
    assert not numbers(answers.clustered(top[:0], shares))


def test_connections_that_stay_are_those_of_recognised_labels():
    sets = {"node 3": torch.tensor([True, False, True]), "node 5": torch.tensor([False, False, True])}
    (axis,) = figures.kept_connections(sets, ("oak", "ray", "sea"), "toy").axes
    lines = [line for line in axis.lines if len(line.get_xdata()) == 2]
    kept = [line for line in lines if line.get_color() != "0.85"]
    texts = {text.get_position()[1]: text.get_text() for text in axis.texts if text.get_position()[0] > 1}
    assert len(lines) == 6 and [texts[line.get_ydata()[1]] for line in kept] == ["oak", "sea", "sea"]
    assert [text.get_text() for text in axis.texts if "stay" in text.get_text()] == [
        "node 3:\n2 of 3 connections stay", "node 5:\n1 of 3 connections stay",
    ]  # fmt: skip


def test_pruned_readouts_are_drawn_solved_anew_and_right_after_pruning():
    rows = [
        {"seed": 0, "tap": "block", "threshold": at, "method": method, "dilution": at + 0.2}
        | {"loss": 2 * at, "retrained_loss": at * (1 + (method == "random"))}
        | {"returned_loss": 1.5 * at, "constant": 0.7}
        for method, at in product(figures.METHODS, (0.2, 0.4))
    ]
    (axis,) = figures.pruned_readouts(pd.DataFrame(rows), "toy").axes
    assert axis.lines[0].get_xdata() == pytest.approx([0.4, 0.6])
    drawn = [line.get_ydata() for line in axis.lines[:2]]
    assert drawn[0] == pytest.approx([20, 40]) and drawn[1] == pytest.approx([40, 80])
    assert numbers(answers.removed(pd.DataFrame(rows))) == [60, 40, 80, 40]
    why, share = figures.removed_connections(pd.DataFrame(rows), "toy").axes
    assert [line.get_ydata() for line in why.lines[:3]] == [
        pytest.approx(lost) for lost in ([40, 80], [30, 60], [20, 40])
    ]
    assert all(line.get_ydata() == pytest.approx([70, 70]) for line in share.lines)
    assert numbers(answers.returned(pd.DataFrame(rows))) == [70, 80, 60, 40]


def test_late_layers_are_drawn_by_what_is_pruned_and_how_long_it_is_trained():
    lost = {"unpruned": 0, "andc": 0.004, "random": 0.08, "permuted": 0.08, "magnitude": 0.08, "activation": 0.08}
    rows = [
        {"seed": seed, "reading": reading, "encoders": encoders, "method": method, "dilution": 0.6, "epochs": epochs}
        | {"loss": loss * (1 + 2 * (reading == "W1")) / (1 + epochs)}
        for (method, loss), (reading, encoders), epochs, seed in product(
            (lost | {"removed": 0.16}).items(), (("W2", 1), ("W1", 1), ("W2", 2)), (0, 1), (0, 1)
        )
    ]
    panels = figures.late_layers(pd.DataFrame(rows), "toy").axes
    andc = [panel.lines[0].get_ydata().tolist() for panel in panels]
    assert andc == [pytest.approx(lost) for lost in ([0.4, 0.2], [1.2, 0.6], [0.4, 0.2])]
    assert panels[0].lines[len(figures.METHODS)].get_ydata() == pytest.approx([16, 8])
    assert numbers(answers.retrained(pd.DataFrame(rows))) == [1, 2, 3, 3]


def test_predicted_sets_are_drawn_for_native_nodes_of_trained_networks():
    rows = [
        {"seed": 0, "network": network, "basis": basis, "encoder": 1, "tap": "block", "size": size}
        | {"measured": 0.1 * size, "predicted": 0.1 * size + 0.02, "size_only": 0.1 * size - 0.05}
        for network, basis, size in product(("trained", "random"), ("native", "rotated"), (1, 4))
    ]
    scatter, errors = figures.predicted_sets(pd.DataFrame(rows), "toy").axes
    assert len(scatter.lines[0].get_xdata()) == 1
    assert errors.lines[0].get_ydata() == pytest.approx([2, 2]) and errors.lines[1].get_ydata() == pytest.approx([5, 5])
    assert numbers(answers.foretold(pd.DataFrame(rows))) == [2, 5]
