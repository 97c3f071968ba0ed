"""The committed networks: weights in half precision, each with a card that says how it was trained.

A reference is `references/<name>.safetensors` beside this file; the card is JSON in the file's header. It holds the
network (model, num_classes, image_size, cct_options), the data (data, data_sha256, mean, std), the training (seed,
recipe, hours, revision, environment) and what came out (curve, test_accuracy of the weights as committed, n_test).
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from paperlib import files
from paperlib.data import Images

FOLDER = Path(__file__).parent / "references"
RESTORE = "restore the committed file, or remove it"


def references() -> list[str]:
    """Names of the committed networks."""
    return sorted(path.stem for path in FOLDER.glob("*.safetensors"))


def path_of(name: str) -> Path:
    """The file of a reference; raises ValueError for a name that there is none of."""
    if name not in references():
        raise ValueError(f"no reference network {name!r}: use one of {', '.join(references()) or '(none yet)'}")
    return FOLDER / f"{name}.safetensors"


def card(name: str) -> dict[str, Any]:
    """A reference's card; see the head of this module."""
    path = path_of(name)
    with files.reading(path, RESTORE), safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["card"])
        if missing := {"model", "num_classes", "image_size", "cct_options", "recipe", "data_sha256"} - facts.keys():
            raise ValueError(f"its card does not tell {', '.join(sorted(missing))}")
        if facts["cct_options"]:  # of a CCT; cards that do not tell are of networks trained without
            facts["cct_options"] = {"attention_dropout": 0.0, "stochastic_depth": 0.0} | facts["cct_options"]
        return facts


def is_trained_on(facts: dict[str, Any], images: Images) -> bool:
    """Whether the network of a card was trained and scored on exactly these images. (Cards of version 1 have the hash
    of pixels and labels.)"""
    train = facts.get("n_held_out", 0) + facts.get("n_train", len(images.y_train))
    known = facts["data_sha256"] in (images.sha256, images.pixels_sha256)
    return known and train == len(images.y_train)


def sha256(name: str) -> str:
    """Hash of a reference's file."""
    return hashlib.sha256(path_of(name).read_bytes()).hexdigest()


def load_reference(name: str) -> nn.Module:
    """A committed network in evaluation mode, fp32, on the CPU: images normalised by its card's mean and std (channels
    in 0..1) -> logits (B, num_classes). Raises ValueError for an unknown name or an unusable file.

    The weights are the half-precision numbers of the file, so everybody measures the same network.
    """
    from paperlib.models import build

    facts, path = card(name), path_of(name)
    with files.reading(path, RESTORE), safe_open(path, "pt") as file:
        with torch.device("meta"):  # no weights are drawn, only to be replaced
            network = build(facts["model"], facts["num_classes"], facts["image_size"], **facts["cct_options"])
        network.load_state_dict({key: file.get_tensor(key) for key in file.keys()}, assign=True)  # noqa: SIM118 (not a dict)
    return network.float().to(memory_format=torch.channels_last).eval()
