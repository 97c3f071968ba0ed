"""The explorer: right pictures for the chosen node and head, with all fields or with the committed ones."""

import numpy as np
import pytest
import torch
from PIL import Image as Picture

from paperlib import experiment, explorer, snp, taps
from paperlib.experiment import settings

CUT = {"epochs": 1, "max_steps": 2, "readout_epochs": 1, "limit": 300, "permutations": 20, "taps": ["attn", "block"]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        yield settings.open_run("quick", CUT)


def pixels(png: bytes, tmp_path):
    (tmp_path / "x.png").write_bytes(png)
    return np.asarray(Picture.open(tmp_path / "x.png").convert("RGB"))


@pytest.mark.slow
def test_driving_images_are_those_with_the_largest_field(run):
    drivers = experiment.nodes.driving_images(run, 0).arrays("images")
    network, _ = experiment.networks.load_network(run, 0, "trained")
    tap = next(place for place in taps.cct_taps(network, ["block"]) if place.encoder == 2)
    weight = experiment.nodes.readout(run, 0, "trained").tensors("weights")[tap.name]
    batches = taps.activations(network, [tap], run.images.x_test, *run.images.statistics)
    x = torch.cat([batch[tap.name] for batch in batches])
    field = torch.einsum("nt,lt->nl", x[:, :, 5], weight[:, :, 5]).amax(dim=1)
    assert drivers[tap.name].shape == (weight.shape[2], 4)
    torch.testing.assert_close(field[drivers[tap.name][5]], field.topk(4).values)


@pytest.mark.slow
def test_headless_cells_show_a_picture(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PAPERLIB_HEADLESS", "1")
    for picture in (explorer.nodes(run), explorer.heads(run)):
        assert pixels(picture.data, tmp_path).std() > 10


@pytest.mark.slow
def test_widgets_follow_the_choice(run, tmp_path, monkeypatch):
    monkeypatch.delenv("PAPERLIB_HEADLESS")
    controls, picture, text = explorer.nodes(run).children
    tap, node, level = controls.children
    assert tap.value.startswith("4.") and len(tap.options) == 8
    seen = [picture.value]
    for control, value in ((node, node.options[-1]), (level, 0.6), (tap, "1.attn")):
        before = text.value
        control.value = value
        assert picture.value != seen[-1] and text.value != before
        seen.append(picture.value)
    fields = experiment.nodes.readout(run, 0, "trained").tensors("fields_test")["1.attn"]
    own = snp.node_statistics(snp.boolean_matrices(fields[[node.value]], 0.6))
    assert f"Node {node.value}: {own.labels.item()} labels in {own.clusters.item()} clusters" in text.value
    controls, picture = explorer.heads(run).children
    encoder, head = controls.children
    before = picture.value
    head.value = 1
    assert picture.value != before
    encoder.value = 1
    assert picture.value != before


@pytest.mark.slow
def test_without_large_files_the_examples_are_shown(run, monkeypatch):
    """As with committed results: fields of chosen nodes only."""
    everything = explorer.known_fields(run, 0)
    experiment.nodes.examples(run, 0, "attn"), experiment.nodes.examples(run, 0, "block")
    source = experiment.nodes.readout(run, 0, "trained")
    (source.folder / "fields_test.safetensors").rename(source.folder / "away")
    some = explorer.known_fields(run, 0)
    (source.folder / "away").rename(source.folder / "fields_test.safetensors")
    assert set(some) == {f"{encoder}.{kind}" for encoder in (1, 2, 4) for kind in ("attn", "block")}
    for tap, nodes in some.items():
        assert 1 <= len(nodes) <= 4
        for node, field in nodes.items():
            assert torch.equal(field, everything[tap][node])
