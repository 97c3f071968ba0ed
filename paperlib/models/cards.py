"""What the card of a committed network says to a reader: a Markdown page, and a row of the table of networks."""

# ruff: noqa: E501 (rows of a Markdown table)
import re
from typing import Any

from paperlib import data, provenance
from paperlib.models.reference import card, load_reference

LICENCES = {
    "glyphs100": "the glyphs are drawn by the package",
    "cifar100": "CIFAR-100 (Krizhevsky 2009) comes without a licence, for research",
    "clinc150": "CLINC150 (Larson et al. 2019) is CC BY 3.0",
    "flowers102": "Oxford Flowers-102 (Nilsback and Zisserman 2008) comes without a licence, for research",
}
# (data, model) -> what the architecture's own authors report for it, in the README of Compact-Transformers
PUBLISHED = {
    ("cifar100", "cct_7_3x2"): "74.92 % after 200 epochs",
    ("cifar100", "cct_7_3x1"): "77.05 % after 200 epochs, 80.92 % after 300 of a heavier recipe",
    ("flowers102", "cct_7_7x2"): "97.19 % after 300 epochs at 224 px, very probably on the common re-split",
}
# data_sha256 of a committed network -> what its images are, where a download would give others
IMAGES = {
    "4ffdf4809dc820d30149f02db33cdb009e723cefcd9bd68d516f5b4c0081bbbf": "64 x 64 JPEGs of low quality (mean error about 7/255 against resized originals, not measured here), not the full-size originals"
}
CARD = """# {name}

{model}, {parameters:,} parameters, stored in half precision. `paperlib.models.load_reference("{name}")`

| | |
|---|---|
| data | {data}, {n_train} training and {n_test} test {shape}, {num_classes} labels{images} |
| split | {split} |
| test accuracy | {test_accuracy:.2%} (mean over labels {mean_class_accuracy:.2%}), of the weights as stored, in fp32 |
| training | {epochs} epochs, {hours:.2f} hours on {machine}, seed {seed} |
| recipe | {recipe_text} |
| code | revision {revision}, torch {torch} |
| weights | MIT licence, like the code; {licence} |
| limits | a network to take apart, not one to use: trained for the mechanism's sake, on one data set, with a short recipe; the last epoch's weights, chosen by nobody |

| epoch | training loss | test accuracy |
|---|---|---|
{curve_rows}
"""


def page(name: str) -> str:
    """The card of a committed network as Markdown."""
    facts = card(name)
    environment, recipe = facts["environment"], facts["recipe"]
    is_text, side = facts["data"] in data.TEXTS, facts["image_size"]
    unused = ("epochs", *(("shift", "flip") if recipe["augmentation"] == "published" else ()))  # epochs: said above
    scored = [row for row in facts["curve"] if row["test_accuracy"] is not None]
    texts = {
        "parameters": sum(p.numel() for p in load_reference(name).parameters()),
        "shape": f"texts of at most {side} words" if is_text else f"images of {side} x {side} pixels",
        "images": f"; {IMAGES[facts['data_sha256']]}" if facts["data_sha256"] in IMAGES else "",
        "split": data.SPLITS[facts["data"]] + _unseen(facts),
        "licence": LICENCES[facts["data"].removesuffix("-resplit")],
        "machine": provenance.machine(environment),
        "recipe_text": ", ".join(f"{key} {value}" for key, value in recipe.items() if key not in unused),
        "curve_rows": "\n".join(
            f"| {row['epoch']} | {row['loss']:.3f} | {row['test_accuracy']:.2%} |" for row in scored
        ),
    }
    return CARD.format(**facts, **texts, name=name, epochs=recipe["epochs"], torch=environment["torch"])


def _unseen(facts: dict[str, Any]) -> str:
    held = facts.get("n_held_out", 0)
    return f"; the last {held // facts['num_classes']} training examples of each label ({held:,}) kept from it" * (
        held > 0
    )


def row(name: str, facts: dict[str, Any]) -> list[str]:
    """Cells of a committed network in the table of networks: name, data, split, epochs, hours, accuracy, published."""
    unit = "words" if facts["data"] in data.TEXTS else "px"
    images = f"{facts['data']}, {facts['image_size']} {unit}" + ", low-quality JPEGs" * (facts["data_sha256"] in IMAGES)
    split = re.split("[:;]", data.SPLITS[facts["data"]])[0]
    training = [str(facts["recipe"]["epochs"]), f"{facts['hours']:.2f}", f"{facts['test_accuracy']:.2%}"]
    link = f"[{name}](paperlib/models/references/{name}.md)"
    return [link, images, split, *training, PUBLISHED.get((facts["data"], facts["model"]), "")]
