"""Texts go through the same functions as images, and padding says nothing."""

import hashlib
import json

import pytest
import torch

from paperlib import data, heads, models, snp, taps, training
from paperlib.cli import main
from paperlib.data import text
from paperlib.experiment import late, measure, networks, settings
from paperlib.models.cct import attention

WORDS = ("alarm", "balance", "set", "what")


@pytest.fixture
def network():
    torch.manual_seed(0)
    made = models.text_transformer("text_2x32", 3, 6, 10, heads=2).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return made


@pytest.fixture
def corpus(folders, monkeypatch):
    """A file of the published form: three intents, whose texts have a word of their own among common ones."""

    def said(label, number):
        return [f"please {label} {'now ' * (number % 4)}only{label}{number}", label]

    labels = ("weather", "alarm", "balance")
    parts = {
        "train": [said(label, number) for number in range(20) for label in labels],
        "val": [said(label, number + 100) for number in range(4) for label in labels],
        "test": [said(label, number + 200) for number in range(6) for label in labels],
        "oos_train": [["what is this", "oos"]],
    }
    path = folders / "data" / text.FILE
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(parts))
    monkeypatch.setattr(text, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
    return path


def test_words_become_numbers_and_what_is_rare_is_unknown():
    found = text.numbered(["Set ALARM!", "what's what, balance?", "??", "set " * 9], WORDS, 4)
    assert found.tolist() == [[4, 2, 0, 0], [1, 5, 3, 0], [1, 0, 0, 0], [4, 4, 4, 4]]


def test_validation_texts_are_kept_from_networks_and_name_no_word(corpus, folders):
    loaded = data.load("clinc150", folders / "data", 5)
    assert loaded.classes == ("alarm", "balance", "weather")
    assert loaded.words == ("alarm", "balance", "now", "please", "weather")  # onlyalarm7 stands once
    held = data.hold_out(loaded, 1 / 6)
    assert len(held.held) == 12 and len(held.seen.x_train) == 60 and len(loaded.x_test) == 18
    texts = json.loads(corpus.read_text())["val"]
    expected = text.numbered([said for said, _ in texts], loaded.words, 5)
    assert torch.equal(loaded.x_train[held.held].sort(dim=0).values, expected.sort(dim=0).values)


def test_another_file_is_refused_and_a_missing_one_says_where_it_belongs(corpus, folders, monkeypatch, refuses):
    corpus.write_text("{}")
    with refuses("data_full.json is not the published file: delete it"):
        data.load("clinc150", folders / "data", 5)
    corpus.unlink()

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(OSError, match=r"CLINC150 could not be downloaded \(no network\); put data_full.json into"):
        data.load("clinc150", folders / "data", 5)


def test_padding_changes_no_answer_and_no_activation(network):
    short = torch.tensor([[3, 4, 5], [7, 2, 0]])
    padded = torch.cat([short, torch.zeros(2, 3, dtype=torch.long)], dim=1)
    network.classifier.positional_emb.data[:, :3] = 0.3  # one position is as good as another here
    with torch.no_grad():
        longer = network(padded)
        network.classifier.positional_emb = torch.nn.Parameter(network.classifier.positional_emb[:, :3])
        assert torch.allclose(network(short), longer, atol=1e-5)


def test_activations_behind_the_last_word_are_silent(network):
    x = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 2, 9, 9, 9, 0]])
    places = taps.places(network, ["ff1", "attn", "block", "seqpool"])
    found = taps.features(network, places, x, torch.zeros(1), torch.ones(1))
    batches = list(taps.activations(network, places, x, torch.zeros(1), torch.ones(1), batch_size=1))
    for place in places:
        nodes = found[place.name]
        assert torch.allclose(torch.cat([batch[place.name] for batch in batches]), nodes, atol=1e-5)
        if place.kind != "seqpool":  # one position, of the whole text
            assert (nodes[0, :3] != 0).any(dim=1).all() and not nodes[0, 3:].any() and not nodes[1, 5:].any()


def test_written_out_attention_is_the_fused_one(network):
    """bf16 takes the products, fp32 PyTorch's kernel."""
    q, k, v = torch.randn(3, 2, 2, 6, 16, generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[True] * 4 + [False] * 2, [True] * 6])
    both = [attention(q, k, v, fused=fused, mask=mask) for fused in (True, False)]
    assert torch.allclose(*both, atol=1e-6)
    v[0, :, 4:] = 100  # what may not be attended to
    assert torch.allclose(attention(q, k, v, mask=mask)[0], both[0][0], atol=1e-6)


def test_the_end_of_a_network_of_texts_answers_as_the_network(network):
    """From the stream before its last encoder, in which what follows a text is 0."""
    x = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 2, 9, 9, 9, 0], [1, 2, 3, 4, 5, 6]])
    (place,) = (place for place in taps.places(network, ["block"]) if place.encoder == 1)
    stream = taps.features(network, [place], x, None, None)["1.block"]
    assert not stream[0, 3:].any() and stream[2].all(dim=1).all()
    with torch.no_grad():
        torch.testing.assert_close(late.Tail(network, 1)(stream), network(x))


def test_silencing_a_head_is_cutting_its_columns(network):
    x = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 2, 9, 9, 9, 0]])
    logits = heads.ablation_logits(network, x)
    weight = network.classifier.blocks[1].self_attn.proj.weight.data
    weight[:, 16:] = 0
    with torch.no_grad():
        assert torch.allclose(network(x), logits[1, 1], atol=1e-5)


def test_padding_has_no_share_in_attention_received(network):
    """Neither as what is attended to, nor as what attends."""
    x = torch.tensor([[3, 4, 5, 0, 0, 0], [7, 2, 9, 9, 9, 0]])
    before = heads.attention_received(network, x, 1)
    assert not before[0, :, 3:].any() and torch.allclose(before.sum(dim=2), torch.ones(2, 2))
    with torch.no_grad():
        network.tokenizer.weight[0] += 5
    assert torch.allclose(heads.attention_received(network, x, 1), before, atol=1e-6)


def test_a_mean_over_padding_is_refused(network, refuses):
    with refuses("pooled: of texts, the mean over positions is one over padding"):
        taps.features(network, taps.places(network, ["pooled"]), torch.ones(2, 6).long(), None, None)


@pytest.mark.slow
def test_a_text_network_learns_and_its_nodes_are_measured(corpus, monkeypatch):
    monkeypatch.setattr(measure, "ONCE", ())
    changes = {"image_size": 8, "model": "text_2x32", "heads": 2, "epochs": 12, "batch_size": 12, "seeds": [0]}
    run = settings.open_run(
        "clinc150-cpu", changes | {"lr": 5e-3, "precision": "fp32", "weights": "trained", "threshold_sweep": [0.3]}
    )
    network, _ = networks.load_network(run, 0, "trained")
    assert training.accuracy(network, run.images) == 1.0
    table = measure.nodes(run, 0, "trained").table("taps")
    block = table.query("tap == 'block' and encoder == 2 and basis == 'native' and not centred")
    assert block.accuracy.item() == 1.0 and block.snr.item() > 1.5
    network_of_words = networks.build_network(run, 0)
    assert network_of_words.tokenizer.num_embeddings == run.images.vocabulary == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "clinc150-cpu", "--only", "02"], "there is no notebook '02': use one of 07"),
        (["measure", "clinc150-cpu", "--set", "model=cct_2_3x2"], "cct_2_3x2 does not read clinc150"),
        (["measure", "quick", "--set", "model=text_2x32"], "text_2x32 does not read glyphs100"),
        (["measure", "clinc150-cpu", "--set", "augmentation=mixed"], "augmentation must be light"),
        (["measure", "clinc150-cpu", "--set", "model=text_2"], "use text_<encoders>x<width>"),
        (["measure", "clinc150-cpu", "--set", "held_out=0.1"], "0.16667 keeps the validation texts"),
        (["measure", "clinc150-cpu", "--cnn", "--set", "weights=trained"], "a CNN reads images"),
        (["measure", "clinc150-cpu", "--set", "heads=5"], "5 heads do not divide the width 128"),
    ],
)
def test_wrong_settings_of_texts_are_one_sentence(words, said, corpus, capsys):
    assert main(words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0]


def test_a_rotation_within_heads_leaves_padding_silent():
    values = torch.zeros(1, 3, 4)
    turned = snp.rotated(values, snp.rotations(4, 1, torch.Generator().manual_seed(0), 2)[0])
    assert not turned.any()
