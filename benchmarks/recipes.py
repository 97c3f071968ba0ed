"""What makes a CCT-7/3x2 learn CIFAR-100 faster: one change after the other, scored on held-out training images.

PAPERLIB_DATA=... python benchmarks/recipes.py [--epochs 5] [--only NAME ...] [--table FILE]

Training takes 45,000 training images; the other 5,000 score it (the test images are not read). A line is printed, and
appended to the table, as soon as a candidate is done.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from paperlib import data, models, training
from paperlib.experiment.settings import load_settings
from paperlib.paths import folder_of

# name -> what it changes in the first recipe
CANDIDATES = {
    "lr-1e-3": {},
    "lr-2e-3": {"lr": 2e-3},
    "weight-decay-0.1": {"weight_decay": 0.1},
    "lr-2e-3-weight-decay-0.1": {"lr": 2e-3, "weight_decay": 0.1},
    "all-tokens": {"token_share": 1.0},
}
BASE = {"optimizer": "adamw", "augmentation": "mixed", "token_share": 0.5, "lr": 1e-3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    settings = load_settings("cifar100-cpu")
    images = data.load("cifar100", folder_of("data"))
    kept, held = data.held_out(images.y_train, 0.1)
    x, y = images.x_train, images.y_train
    images = replace(images, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held])
    fields = {name: getattr(settings, name) for name in training.Recipe.__dataclass_fields__}
    accuracy = f"held-out accuracy after {options.epochs} epochs"
    show(f"| candidate | {accuracy} | training loss | CPU minutes |", options.table)
    show("|---|---|---|---|", options.table)
    for name in options.only:
        recipe = training.Recipe(**fields | {"epochs": options.epochs} | BASE | CANDIDATES[name])
        with training.seeded(0, "weights"):
            network = models.build(settings.model, 100, 32, attention_dropout=0.0, stochastic_depth=0.0)
            network = network.to(memory_format=torch.channels_last)
        start = time.process_time()
        last = training.train(network, images, recipe, seed=0)[-1]
        minutes = (time.process_time() - start) / 60  # of all threads: a process that is paused does not count
        show(f"| {name} | {last['test_accuracy']:.1%} | {last['loss']:.3f} | {minutes:.1f} |", options.table)


def show(line: str, table: Path | None) -> None:
    print(line, flush=True)
    if table:
        with open(table, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
