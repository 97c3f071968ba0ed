"""Reference networks: what is stored is what is loaded, scored and measured; what was trained otherwise is refused."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from paperlib import data, experiment, files, models, training
from paperlib.cli import main
from paperlib.experiment import settings
from paperlib.models import cards, reference

CUT = {"max_steps": 2, "epochs": 1, "cnn_epochs": 1, "precision": "fp32"}
ASSIGNED = [f"{name}={value}" for name, value in CUT.items()]
COMMIT = ["train", "quick", "--commit", "--seed", "0", "--set"]


@pytest.fixture
def made(folders, monkeypatch):
    """The name of a CCT that was trained for two steps and stored in a folder of this test's own."""
    monkeypatch.setattr(reference, "FOLDER", folders / "references")
    assert main([*COMMIT, *ASSIGNED]) == 0
    return "glyphs100-24-cct_4_7x1-seed0"


def edited_card(name, **changes):
    facts = reference.card(name) | changes
    save_file(load_file(reference.path_of(name)), reference.path_of(name), {"card": json.dumps(facts)})


def test_a_stored_network_is_the_trained_one_in_half_precision(made):
    trained = experiment.networks.train(settings.open_run("quick", CUT), 0).tensors("weights")
    network = models.load_reference(made)
    assert models.references() == [made] and not network.training
    for key, value in network.state_dict().items():
        assert value.dtype == torch.float32 and torch.equal(value, trained[key].half().float()), key


def test_loading_leaves_random_numbers_alone(made):
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    models.load_reference(made)
    assert torch.equal(torch.rand(1), expected)


def test_a_card_without_dropout_is_of_a_network_without(made):
    edited_card(made, cct_options={"heads": None, "positional_embedding": "learnable"})
    block = models.load_reference(made).classifier.blocks[-1]
    assert block.self_attn.attention_dropout == 0
    with pytest.raises(ValueError, match=r"attention_dropout=0\.0, not 0\.2"):
        settings.load_settings("quick", CUT | {"weights": "reference", "attention_dropout": 0.2})


def test_a_card_tells_of_the_machine_that_trained(folders, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", folders / "references")
    folder = experiment.networks.train(settings.open_run("quick", CUT), 0).folder
    told = json.loads((folder / "stage.json").read_text())
    told["environment"] |= {"gpu": "a card far away"}
    (folder / "stage.json").write_text(json.dumps(told))
    assert main([*COMMIT, *ASSIGNED]) == 0
    assert reference.card("glyphs100-24-cct_4_7x1-seed0")["environment"]["gpu"] == "a card far away"


def test_check_compares_accuracies_with_cards(made, capsys):
    assert main(["check", "networks"]) == 0
    assert made in capsys.readouterr().out
    edited_card(made, test_accuracy=reference.card(made)["test_accuracy"] + 0.01)
    assert main(["check", "networks", made]) == 1


def test_a_network_that_never_saw_the_held_out_images_says_so_and_is_scored_as_it_was_trained(folders, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", folders / "references")
    seen, train = [], training.train
    monkeypatch.setattr(
        training, "train", lambda network, data, *rest: seen.append(data) or train(network, data, *rest)
    )
    assert main([*COMMIT, *ASSIGNED, "blind=true"]) == 0
    (name,) = models.references()
    card, images = reference.card(name), data.load("glyphs100", image_size=24)
    assert name == "glyphs100-24-cct_4_7x1-blind-seed0" and (card["n_train"], card["n_held_out"]) == (3600, 400)
    kept, held = data.held_out(images.y_train, 0.1)
    assert torch.equal(seen[0].x_train, images.x_train[kept]) and seen[0].held is None
    scored = experiment.networks.as_trained(card, images)
    assert torch.equal(scored.held, held)
    for mine, stored in zip(scored.statistics, (card["mean"], card["std"]), strict=True):
        assert torch.equal(mine.flatten(), torch.tensor(stored))
    assert "the last 4 training examples of each label (400) kept from it" in cards.page(name)
    assert main(["check", "networks"]) == 0


def test_check_wants_the_data_of_the_card(made, capsys):
    """A network of other images is not scored, and those after it still are."""
    assert main([*COMMIT, *ASSIGNED, "--cnn"]) == 0
    edited_card(made, data_sha256="0" * 64)
    capsys.readouterr()
    assert main(["check", "networks"]) == 1
    first, second = capsys.readouterr().out.splitlines()[-2:]
    assert made in first and "not the data" in first and "vgg" in second and second.count("%") == 2


def test_a_walk_starts_from_a_reference(made):
    run = settings.open_run("quick", CUT | {"weights": "reference"})
    network, inputs = experiment.networks.load_network(run, 0, "trained")
    expected = models.load_reference(made).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in network.state_dict().items())
    assert inputs["network"] == reference.sha256(made)
    assert files.json_rows(experiment.networks.learning_curves(run)) == reference.card(made)["curve"]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"epochs": 2}, "epochs=1, not 2"),
        ({"seeds": [0, 1]}, "no committed network .*seed1"),
        ({"stochastic_depth": 0.1}, "stochastic_depth=0.0, not 0.1"),
    ],
)
def test_other_settings_than_the_references_are_refused(made, changes, sentence, refuses):
    with refuses(sentence):
        settings.load_settings("quick", CUT | {"weights": "reference"} | changes)


def test_a_missing_cnn_is_noticed_before_any_notebook_runs(made, capsys):
    assert main(["run", "quick", "--only", "04,05", "--set", "weights=reference", *ASSIGNED]) == 2
    assert "vgg" in capsys.readouterr().err


def test_a_folder_of_images_makes_no_reference(folders, monkeypatch, tmp_path, capsys):
    for part in ("train", "test"):
        for label in ("a", "b"):
            (tmp_path / part / label).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (24, 24), (60 * number, 0, 0)).save(tmp_path / part / label / f"{number}.png")
    assert main([*COMMIT, f"data=folder:{tmp_path}", "batch_size=2"]) == 2
    assert "licence" in capsys.readouterr().err


def test_the_cnn_is_stored_too(folders, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", folders / "references")
    assert main(["train", "quick", "--commit", "--seed", "3", "--cnn", "--set", *ASSIGNED]) == 0
    (name,) = models.references()
    assert name == "glyphs100-24-vgg_11x16-seed3" and main(["check", "networks"]) == 0
    assert "batch_size" in (reference.FOLDER / f"{name}.md").read_text()


def test_a_network_that_is_there_is_not_written_over(made, capsys, monkeypatch):
    before = reference.path_of(made).read_bytes()
    changes = [f"{key}={value}" for key, value in (CUT | {"lr": 1e-2}).items()]
    arguments = [*COMMIT, *changes]
    with monkeypatch.context() as patch:
        patch.delattr(experiment.networks, "train")  # refused before any work
        assert main(arguments) == 2
    assert "--replace" in capsys.readouterr().err and reference.path_of(made).read_bytes() == before
    assert main([*arguments, "--replace"]) == 0
    assert reference.path_of(made).read_bytes() != before


def test_a_reference_takes_all_images(folders, capsys):
    assert main([*COMMIT, "limit=200"]) == 2
    assert "limit" in capsys.readouterr().err


def test_unknown_names_are_refused(refuses, capsys):
    with refuses("no reference network 'cct'"):
        models.load_reference("cct")
    assert main(["check", "networks", "cct"]) == 2 and "cct" in capsys.readouterr().err


def test_committed_references_are_small_and_fit_their_cards():
    assert sum(reference.path_of(name).stat().st_size for name in models.references()) <= 70e6
    for name in models.references():
        facts = reference.card(name)
        blind = "-blind" if facts.get("n_held_out") else ""
        assert name == f"{facts['data']}-{facts['image_size']}-{facts['model']}{blind}-seed{facts['seed']}"
        assert not facts["revision"].endswith("changes")
        assert facts["curve"][-1]["epoch"] == facts["recipe"]["epochs"] == len(facts["curve"])
        # half precision moves an accuracy by a few images at most
        assert abs(facts["test_accuracy"] - facts["curve"][-1]["test_accuracy"]) < 0.005
        side = facts["image_size"]
        images = torch.ones(2, side).long() if facts["data"] in data.TEXTS else torch.randn(2, 3, side, side)
        assert models.load_reference(name)(images).shape == (2, facts["num_classes"])
        assert (reference.FOLDER / f"{name}.md").read_text() == cards.page(name)
