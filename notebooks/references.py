"""The reference networks: train and store one, or check the committed ones against their cards.

python notebooks/references.py make PROFILE --seed N [--cnn] [--replace] [--set NAME=VALUE ...]
python notebooks/references.py check [NAME ...]

`make` trains as a walk of the profile would (and goes on where it was interrupted), halves the weights' precision,
scores them on the test images and writes paperlib/models/references/<name>.safetensors with its card, and the card as
<name>.md. A network that is there already stays, unless --replace is given: what was measured on it would no longer fit.
`check` scores committed networks and compares with their cards: exit code 1 if an accuracy differs,
or could not be compared because the images here are not those of the card.
"""

# ruff: noqa: E501 (rows of a Markdown table)
import argparse
import json
import re
import sys
from dataclasses import asdict

import parameters
import stages
import torch
from safetensors.torch import save
from stages.networks import right_answers

from paperlib import data, files, models, runs, training
from paperlib.models import reference

LICENCES = {
    "glyphs100": "the glyphs are drawn by the package",
    "cifar100": "CIFAR-100 (Krizhevsky 2009) comes without a licence, for research",
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
| data | {data}, {n_train} training and {n_test} test images of {image_size} x {image_size} pixels, {num_classes} labels{images} |
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


def scores(network: torch.nn.Module, images: data.Images) -> tuple[float, float]:
    """Test accuracy over images, and its mean over labels."""
    images = images.to(training.best_device())
    network = network.to(training.best_device())
    right = right_answers(network, images)
    by_label = torch.stack([right[images.y_test == label].float().mean() for label in images.y_test.unique()])
    return right.float().mean().item(), by_label.mean().item()


def make(profile: str, seed: int, cnn: bool, changes: dict, replace: bool = False) -> None:
    if changes.get("limit"):
        raise ValueError("a reference network is trained on all images: leave limit out")
    run = parameters.open_run(profile, {**changes, "weights": "trained", "seeds": [seed]})
    if run.settings.data not in data.SPLITS:
        raise ValueError(f"{run.settings.data} has no licence that a card could name: train on it with ./run_all.sh")
    run = stages.cnn_half(run) if cnn else run
    name = parameters.reference_name(run.settings, seed)
    if name in models.references() and not replace:
        raise ValueError(f"{name} is there already, and measured on: take another --seed, or --replace it")
    s, images, trained = run.settings, run.images, stages.train(run, seed)
    weights = {key: value.half() if value.is_floating_point() else value
               for key, value in trained.tensors("weights").items()}  # fmt: skip
    if not all(value.isfinite().all() for value in weights.values()):
        sys.exit(f"{name}: a weight is too large for half precision")
    network = stages.build_network(run, seed, weights).float()
    accuracy, by_label = scores(network, images)
    seconds = json.loads((trained.folder / "seconds.json").read_text(encoding="utf-8"))
    stage = runs.read_json(trained.folder / "stage.json")  # of the machine that trained
    facts = {
        "model": s.model, "num_classes": len(images.classes), "image_size": s.image_size,
        "cct_options": {} if cnn else {"heads": s.heads or None, "positional_embedding": s.positional_embedding,
                                       "attention_dropout": s.attention_dropout, "stochastic_depth": s.stochastic_depth},
        "data": s.data, "data_sha256": run.data_sha256, "n_train": len(images.x_train), "n_test": len(images.x_test),
        "mean": images.statistics[0].flatten().tolist(), "std": images.statistics[1].flatten().tolist(),
        "seed": seed, "recipe": asdict(stages.recipe(run)), "hours": round(sum(seconds) / 3600, 3),
        "revision": stage["revision"], "environment": stage["environment"], "curve": runs.json_rows(trained.table("curve")),
        "test_accuracy": accuracy, "mean_class_accuracy": by_label,
    }  # fmt: skip
    reference.FOLDER.mkdir(exist_ok=True)
    with files.whole(reference.FOLDER / f"{name}.safetensors") as file:
        file.write(save(weights, {"card": json.dumps(facts)}))
    runs.write_text(reference.FOLDER / f"{name}.md", page(name))
    print(f"{name}: test accuracy {accuracy:.2%}")


def page(name: str) -> str:
    """The card of a reference as Markdown."""
    facts = reference.card(name)
    environment, recipe = facts["environment"], facts["recipe"]
    unused = ("epochs", *(("shift", "flip") if recipe["augmentation"] == "published" else ()))  # epochs: said above
    return CARD.format(
        **facts, name=name, epochs=recipe["epochs"], torch=environment["torch"],
        parameters=sum(p.numel() for p in models.load_reference(name).parameters()),
        images=f"; {IMAGES[facts['data_sha256']]}" if facts["data_sha256"] in IMAGES else "",
        split=data.SPLITS[facts["data"]], licence=LICENCES[facts["data"].removesuffix("-resplit")],
        machine=environment["gpu"] or f"{environment['threads']} CPU threads ({environment['cpu_capability']})",
        recipe_text=", ".join(f"{key} {value}" for key, value in recipe.items() if key not in unused),
        curve_rows="\n".join(f"| {row['epoch']} | {row['loss']:.3f} | {row['test_accuracy']:.2%} |"
                             for row in facts["curve"] if row["test_accuracy"] is not None),
    )  # fmt: skip


def table() -> str:
    """The committed networks as a Markdown table."""
    lines = ["| network | data | split | epochs | hours | test accuracy | published |", "|---|---|---|---|---|---|---|"]
    for name in models.references():
        facts = reference.card(name)
        cells = [f"[{name}](paperlib/models/references/{name}.md)", f"{facts['data']}, {facts['image_size']} px"]
        cells[1] += ", low-quality JPEGs" * (facts["data_sha256"] in IMAGES)
        cells.append(re.split("[:;]", data.SPLITS[facts["data"]])[0])
        cells += [str(facts["recipe"]["epochs"]), f"{facts['hours']:.2f}", f"{facts['test_accuracy']:.2%}"]
        lines.append(f"| {' | '.join([*cells, PUBLISHED.get((facts['data'], facts['model']), '')])} |")
    return "\n".join(lines)


def check(names: list[str]) -> int:
    same = True
    print("| network | test images | accuracy in the card | accuracy here |\n|---|---|---|---|")
    for name in names:
        facts = reference.card(name)
        images = data.load(facts["data"], runs.folder_of("data"), facts["image_size"])
        accuracy, here = None, f"not scored: this {facts['data']} is not the data that it was trained on"
        if images.sha256 == facts["data_sha256"]:
            accuracy, _ = scores(models.load_reference(name), images)
            here = f"{accuracy:.4%}"
        same = same and accuracy == facts["test_accuracy"]
        print(f"| {name} | {facts['n_test']} | {facts['test_accuracy']:.4%} | {here} |", flush=True)
    return int(not same)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = result.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="train and store one network")
    making.add_argument("profile")
    making.add_argument("--seed", type=int, required=True)
    making.add_argument("--cnn", action="store_true", help="the profile's CNN instead of its CCT")
    making.add_argument("--replace", action="store_true", help="write over a network of this name")
    making.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    commands.add_parser("check", help="compare accuracies with cards").add_argument("names", nargs="*", metavar="NAME")
    return result


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    try:
        if options.command == "check":
            return check(options.names or models.references())
        make(options.profile, options.seed, options.cnn, parameters.changes_of(options.set), options.replace)
    except (ValueError, OSError, RuntimeError, FloatingPointError) as error:
        print(f"references: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
