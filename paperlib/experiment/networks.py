"""Stages of a walk that make its networks: trained, or committed; and the same with random weights."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import distributed, models, training
from paperlib.data import TEXTS, Images, held_out, hold_out, normalise
from paperlib.experiment.settings import check_references, reference_name
from paperlib.experiment.store import Run, Stage
from paperlib.files import json_rows, save_table, save_tensors, write_text
from paperlib.models import reference

NETWORKS = ("trained", "random")  # the network, and its null: the same one with freshly drawn weights
CALIBRATED = "calibrated"  # a CNN's second null: the random network, its batch norm with statistics of training images
# Settings that decide an artefact, and so are part of its key
ARCHITECTURE = (
    "data", "image_size", "limit", "model", "heads", "positional_embedding", "attention_dropout", "stochastic_depth",
)  # fmt: skip
TRAINING = tuple(training.Recipe.__dataclass_fields__)
SPLIT = {False: (), True: ("blind", "held_out")}  # of a network that sees all training images, or not


def recipe(run: Run) -> training.Recipe:
    return training.Recipe(**run.config(*TRAINING))


def build_network(run: Run, seed: int, weights: dict[str, Tensor] | None = None) -> nn.Module:
    """The run's network with weights freshly drawn from the seed, or with these, on the best device."""
    s = run.settings
    options = run.config("image_size", "positional_embedding", "attention_dropout", "stochastic_depth")
    options["vocabulary"] = run.images.vocabulary
    # Drawing weights takes longer than reading them: what is replaced is not drawn.
    with training.seeded(seed, "weights"), torch.device("cpu" if weights is None else "meta"):
        network = models.build(s.model, len(run.images.classes), heads=s.heads or None, **options)
    if weights is not None:
        network.load_state_dict(weights, assign=True)
    return network.to(training.best_device(), memory_format=torch.channels_last)


def cnn_half(run: Run) -> Run:
    """The same walk with the CNN in the CCT's place; ValueError if committed networks do not fit it."""
    s = run.settings
    if s.data in TEXTS:
        raise ValueError(f"a CNN reads images, and {s.data} has texts: leave --cnn out")
    changes = {"model": s.cnn, "epochs": s.cnn_epochs, "lr": s.cnn_lr, "optimizer": "adamw", "token_share": 1.0}
    changes |= {"taps": ["conv"], "taps_once": [], "penalty_taps": ["conv"], "prune_attention": False}
    half = replace(run, settings=s.model_copy(update=changes), prefix="cnn-")
    if s.weights == "reference":
        check_references(half.settings)
        first, *others = (  # the first one's is that of the images, which a run checks when it is opened
            reference.card(reference_name(part.settings, seed))["data_sha256"]
            for part in (run, half)
            for seed in s.seeds
        )
        if set(others) != {first}:
            raise ValueError(f"{s.cnn} was trained on another {s.data} than {s.model}: add weights=trained")
    return half


def train(run: Run, seed: int, compiling: bool = False) -> Stage:
    """Stage: the network of a seed trained here (weights.safetensors), its learning curve (curve.csv) and how long its
    epochs took (seconds.json). compiling: see `training.train`."""

    def make(folder: Path) -> None:
        distributed.broadcast(True)  # tells other ranks, where there are any, to train along
        network = build_network(run, seed)
        images = run.images.seen.to(training.best_device())
        curve = training.train(network, images, recipe(run), seed, folder / "checkpoint.pt", run.log, compiling)
        save_tensors(folder / "weights.safetensors", network.state_dict())
        write_text(folder / "seconds.json", json.dumps([row.pop("seconds") for row in curve]))
        save_table(folder / "curve.csv", [{"seed": seed, **row} for row in curve])

    config = run.config(*ARCHITECTURE, *TRAINING, *SPLIT[run.settings.blind]) | {"seed": seed}
    return run.stage(f"train-seed{seed}", config, {"data": run.data_sha256}, make)


def learning_curves(run: Run) -> pd.DataFrame:
    """seed, epoch, lr, loss, test_accuracy (0..1): one row per epoch of every trained network."""
    if run.settings.weights == "reference":
        cards = [reference.card(reference_name(run.settings, seed)) for seed in run.settings.seeds]
        return pd.concat([pd.DataFrame(card["curve"]) for card in cards], ignore_index=True)
    return pd.concat([train(run, seed).table("curve") for seed in run.settings.seeds], ignore_index=True)


def load_network(run: Run, seed: int, kind: str) -> tuple[nn.Module, dict[str, str]]:
    """The trained or the random network of a seed, frozen, and what a stage that reads it depends on."""
    inputs, weights = {"data": run.data_sha256}, None
    kind = "random" if kind == CALIBRATED else kind  # its statistics are taken where it is measured, from images
    if kind != "random" and run.settings.weights == "reference":
        name = reference_name(run.settings, seed)
        weights, inputs["network"] = models.load_reference(name).state_dict(), reference.sha256(name)
    elif kind != "random":
        artefact = train(run, seed)
        weights, inputs["network"] = artefact.tensors("weights"), artefact.sha256
    network = build_network(run, seed, weights)
    return network.eval().requires_grad_(False), inputs


def kinds(run: Run) -> tuple[str, ...]:
    """The networks that are measured for every seed."""
    return (*NETWORKS, CALIBRATED) if run.settings.model.startswith("vgg") else NETWORKS


def calibration_images(run: Run, seed: int, images: Images) -> Tensor:
    """Up to 5,000 of the kept training images, in random order: data sets may be sorted by label."""
    kept, _ = held_out(run.images.y_train, run.settings.held_out)
    return images.x_train[kept[torch.randperm(len(kept), generator=training.generator(seed, "calibration"))[:5000]]]


@torch.no_grad()
def refresh_statistics(network: nn.Module, x: Tensor, images: Images) -> None:
    """Take the statistics of batch norm anew, as means over batches of at most 250 of these images, of equal size."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all batches
    network.train()
    for batch in x.tensor_split(-(-len(x) // 250)):
        network(normalise(batch, *images.statistics))
    network.eval()


def right_answers(network: nn.Module, images: Images, part: slice = slice(None)) -> Tensor:
    logits = training.predict(network, images.x_test[part], *images.statistics)
    return logits.argmax(dim=1) == images.y_test[part]


def scores(network: nn.Module, images: Images) -> tuple[float, float]:
    """Test accuracy over images, and its mean over labels, both 0..1."""
    images = images.to(training.best_device())
    right = right_answers(network.to(training.best_device()), images)
    by_label = torch.stack([right[images.y_test == label].float().mean() for label in images.y_test.unique()])
    return right.float().mean().item(), by_label.mean().item()


def as_trained(card: dict[str, Any], images: Images) -> Images:
    """The data set of a card with those training images held out that the network did not see, and so normalised as for
    its training."""
    held = card.get("n_held_out", 0)
    return hold_out(images, held / len(images.y_train)) if held else images


def facts(run: Run, seed: int, stage: Stage, weights: dict[str, Tensor]) -> dict[str, Any]:
    """What the card of a trained network says (see `models.reference`); the accuracies are those of `weights`."""
    s, images = run.settings, run.images
    accuracy, by_label = scores(build_network(run, seed, weights).float(), images)
    seconds = json.loads((stage.folder / "seconds.json").read_text(encoding="utf-8"))
    options = run.config("positional_embedding", "attention_dropout", "stochastic_depth") | {"heads": s.heads or None}
    options |= {"vocabulary": images.vocabulary} if images.vocabulary else {}
    mean, std = (part.flatten().tolist() for part in images.statistics)
    return {
        "model": s.model,
        "num_classes": len(images.classes),
        "image_size": s.image_size,
        "cct_options": {} if s.model.startswith("vgg") else options,
        "data": s.data,
        "data_sha256": run.data_sha256,
        "n_train": len(images.seen.x_train),
        "n_held_out": len(images.y_train) - len(images.seen.y_train),  # kept from the network and its normalisation
        "n_test": len(images.x_test),
        "mean": mean,
        "std": std,
        "seed": seed,
        "recipe": asdict(recipe(run)),
        "hours": round(sum(seconds) / 3600, 3),
        "revision": stage.manifest["revision"],
        "environment": stage.manifest["environment"],  # of the machine that trained
        "curve": json_rows(stage.table("curve")),
        "test_accuracy": accuracy,
        "mean_class_accuracy": by_label,
    }
