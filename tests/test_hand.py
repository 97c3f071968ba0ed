"""One node by hand: nodes turn on the way that they should, twins answer alike, pictures and sentences say so."""

import io
import re
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from paperlib import answers, experiment, explorer, figures, optimum, snp
from paperlib.experiment import settings

NODES, LABELS, POSITIONS = 24, 12, 3


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def some_rotation(mirrors: bool):
    drawn = snp.rotations(NODES, 20, generator())
    return next(rotation for rotation in drawn if (torch.linalg.det(rotation) < 0) == mirrors)


@pytest.fixture(scope="module")
def tap():
    """A toy whose nodes know three labels each: readout (L, T, D), activations (n, T, D), labels (n,)."""
    random, labels = generator(5), torch.arange(960) % LABELS
    knows = torch.zeros(LABELS, NODES)
    for node in range(NODES):
        knows[torch.randperm(LABELS, generator=random)[:3], node] = 1
    nodes = knows[labels][:, None] + 0.3 * torch.randn(len(labels), POSITIONS, NODES, generator=random)
    weight = optimum.solve(optimum.problem(nodes, labels, LABELS), 0.01).weight.unflatten(1, (POSITIONS, NODES))
    return weight, nodes, labels


@pytest.mark.parametrize("mirrors", [False, True])
def test_nodes_turn_in_equal_steps_from_themselves_to_their_twin(mirrors):
    rotation = some_rotation(mirrors)
    way = snp.turns(rotation, 6)
    assert torch.allclose(way[0], torch.eye(NODES), atol=1e-5)
    assert torch.allclose(way @ way.mT, torch.eye(NODES).expand(6, -1, -1), atol=1e-4)
    assert torch.allclose(way[1:], way[:-1] @ way[1], atol=1e-4)
    assert torch.allclose(way[-1].abs(), rotation.abs(), atol=1e-4)
    assert torch.allclose(way[-1][:, 1:], rotation[:, 1:], atol=1e-4)


def test_the_end_of_the_way_has_the_fields_of_the_twin(tap):
    weight, nodes, labels = tap
    means = snp.class_means(nodes, labels, LABELS)
    for mirrors in (False, True):
        rotation = some_rotation(mirrors)
        *_, last = snp.turns(rotation, 3)
        found, twin = (
            snp.field_matrices(snp.rotated(weight, one), snp.rotated(means, one)) for one in (last, rotation)
        )
        assert torch.allclose(found, twin, atol=1e-3)


def test_one_node_on_its_way_is_that_node_of_all(tap):
    weight, nodes, labels = tap
    means, way = snp.class_means(nodes, labels, LABELS), snp.turns(some_rotation(False), 4)
    found = snp.turned_node(weight, means, way, 5)
    assert found.shape == (4, LABELS, LABELS)
    for turn, field in zip(way, found, strict=True):
        every = snp.field_matrices(snp.rotated(weight, turn), snp.rotated(means, turn))
        assert torch.allclose(field, every[5], atol=1e-4)


def test_snr_is_that_of_the_statistics_of_a_tap():
    booleans = torch.rand(20, 9, 9, generator=generator()) > 0.6
    assert snp.snr(booleans) == pytest.approx(snp.tap_statistics(booleans).snr)
    assert np.isnan(snp.snr(torch.eye(4, dtype=torch.bool)[None]))


def compared(tap):
    weight, nodes, labels = tap
    rotation = some_rotation(True)
    twin = snp.rotated(weight, rotation), snp.rotated(nodes, rotation)
    other = torch.randn(weight.shape, generator=generator(1)), torch.randn(nodes.shape, generator=generator(2))
    versions = {"trained": (weight, nodes), "rotated twin": twin, "random weights": other}
    return experiment.hand.compare(versions, labels, 0.3)


def test_the_twin_answers_alike_and_is_less_clean(tap):
    table, fields = compared(tap)
    own, twin, random = table.itertuples()
    assert own.alike == twin.alike == 1 and twin.accuracy == own.accuracy > 0.9 > 0.5 > random.accuracy
    assert own.snr > 1.5 * twin.snr
    for row in table.itertuples():
        boolean = fields[row.version] > 0.3 * fields[row.version].max()
        assert row.labels == int(boolean.diagonal().sum()) and row.noise == int(boolean.sum()) - row.labels
        assert row.clusters == len(snp.label_clusters(boolean))
    said = answers.versions(table)
    assert "100.0%" in said and f"{own.snr:.2f}" in said and f"{twin.snr:.2f}" in said and "less clean" in said


def along(tap):
    """Nodes with labels of their own, and, as mixed, random directions of the same."""
    weight, nodes, labels = tap
    mixing = snp.rotations(NODES, 1, generator(9))[0]
    both = {"own": (weight, nodes), "mixed": (snp.rotated(weight, mixing), snp.rotated(nodes, mixing))}
    way = snp.turns(some_rotation(False), 5)
    return experiment.hand.along(both, labels, way, [0.3, 0.5, 0.3]), way


def test_only_nodes_with_labels_of_their_own_lose_snr_when_they_turn(tap):
    table, _ = along(tap)
    assert len(table) == 2 * 5 * 2 and table.angle.min() == pytest.approx(0, abs=0.1)
    assert (table.groupby("version").angle.max() > 60).all()
    ends = table[table.threshold == 0.3].groupby("version").snr.agg(["first", "last"])
    assert ends["first"]["own"] > 1.5 * ends["last"]["own"]
    assert ends["first"]["mixed"] < 1.3 * ends["last"]["mixed"]
    first, last = ends.loc["own"]
    assert f"falls from {first:.2f} to {last:.2f}" in answers.turned(table, 0.3)


def test_a_clear_node_has_several_clusters_and_least_noise_outside():
    booleans = torch.zeros(4, 6, 6, dtype=torch.bool)
    booleans[:, range(6), range(6)] = True  # six labels each, on their own
    booleans[1:, 0, 1] = booleans[1:, 1, 0] = True  # a cluster of two
    booleans[1, 2, 3] = booleans[1, 3, 4] = booleans[2, 2, 3] = True
    booleans[3] = False
    booleans[3, :2, :2] = True  # cleaner, of two labels only
    assert experiment.hand.clear(booleans) == 2
    assert experiment.hand.clear(booleans[3:]) == 0


def test_sentences_count():
    boolean = torch.eye(3, dtype=torch.bool)
    boolean[2, 2], boolean[0, 2] = False, True
    said = answers.recognised(boolean, 7, ("ape", "bee", "cat"), 1.0)
    assert "9 fields 3 count" in said and "node 7 recognises 2 labels: ape, bee" in said
    assert "SNR 4.0" in answers.counted(2, 1, 0, 1, 3) and "SNR infinite" in answers.counted(2, 1, 0, 0, 3)
    assert answers.together(torch.tensor([True, False]), 5) == "All 5 nodes together get 50 % of 2 test images right."


def test_curves_and_matrices_show_their_tables(tap):
    table, way = along(tap)
    weight, nodes, labels = tap
    fields = snp.turned_node(weight, snp.class_means(nodes, labels, LABELS), way, 0)
    *strip, left, right = figures.turned(table, fields, 0.3, "toy", "node 0").axes
    booleans = snp.boolean_matrices(fields, 0.3)
    assert len(strip) == 5
    for axis, boolean in zip(strip, booleans, strict=True):
        assert axis.images[0].get_array().sum() == boolean.sum()
    for axis, column in ((left, "snr"), (right, "labels")):
        for line, version in zip(axis.lines, ("own", "mixed"), strict=True):
            part = table[(table.version == version) & (table.threshold == 0.3)]
            assert line.get_ydata() == pytest.approx(part[column].to_numpy())
    versions, given = compared(tap)
    axes = figures.node_versions(given, versions, 0.3, "toy").axes
    assert [axis.images[0].get_array().sum() for axis in axes[3:]] == list(versions.labels + versions.noise)
    _, axis = figures.matrices({"x": fields[0], "y": booleans[0]}, "toy", "z").axes
    assert axis.images[0].get_array().sum() == booleans[0].sum()


def pixels(png: bytes):
    return np.asarray(Picture.open(io.BytesIO(png)).convert("RGB")).astype(int)


def turning(tap):
    table, way = along(tap)
    weight, nodes, labels = tap
    run = SimpleNamespace(settings=SimpleNamespace(threshold=0.3))
    return explorer.turning(run, table, (weight, snp.class_means(nodes, labels, LABELS)), way, 0)


def test_without_a_kernel_the_exercise_is_a_picture(tap, monkeypatch):
    monkeypatch.setenv("PAPERLIB_HEADLESS", "1")
    assert pixels(turning(tap).data).std() > 10


def test_the_exercise_reacts_at_once(tap, monkeypatch):
    monkeypatch.delenv("PAPERLIB_HEADLESS")
    controls, picture = turning(tap).children
    took = []
    for control, value in zip(controls.children, (3, 4, 0.5), strict=True):
        before, start = picture.value, time.process_time()
        control.value = value
        took.append(time.process_time() - start)
        assert (pixels(picture.value) != pixels(before)).any()
    assert min(took) < 0.1
    controls.children[0].value = 0
    assert re.fullmatch(r"\d+°", controls.children[0].label)


@pytest.mark.slow
def test_a_tap_of_a_run_is_read_in_seconds(folders):
    run = settings.open_run("quick", {"epochs": 1, "max_steps": 2, "limit": 400})
    weight, nodes, labels = experiment.hand.read(run, "trained")
    assert weight.shape[0] == 100 and weight.shape[1:] == nodes.shape[1:] == (36, 128) and len(nodes) == len(labels)
    assert (labels.bincount(minlength=100) > 0).all()
    assert (experiment.hand.answers(weight, nodes) == labels).float().mean() > 0.02  # chance is 0.01
    other, *_ = experiment.hand.read(run, "random")
    assert other.shape == weight.shape and not torch.allclose(other, weight)
