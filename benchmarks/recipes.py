"""What makes a CCT-7/3x2 learn CIFAR-100 faster: one change at a time, equal epochs, scored on held-out images.

PAPERLIB_DATA=... python benchmarks/recipes.py [--epochs 5] [--only base muon ...] [--table FILE]

Each candidate changes one thing of the profile cifar100-cpu. Training takes 45,000 training images; the other 5,000
score it (the test images are not read). A line is printed, and appended to the table, as soon as a candidate is done.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

from paperlib import data, models, runs, training

ADAMW = training.optimizer


class MuonAndAdamW:
    """torch.optim.Muon for the weight matrices of the encoders, AdamW for the rest, with AdamW's learning rate."""

    def __init__(self, network, lr, weight_decay):
        hidden = [p for name, p in network.named_parameters() if ".blocks." in name and p.ndim == 2]
        rest = ADAMW(network, lr, weight_decay)  # as in the base, without the matrices that Muon takes
        taken = {id(p) for p in hidden}
        for group in rest.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in taken]
        self.parts = [torch.optim.Muon(hidden, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"), rest]
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()


def half_the_tokens(network, steps):
    """A random half of the tokens in the first four fifths of the steps."""
    count = iter(range(steps))

    def choose(module, args):
        if network.training and next(count) < 0.8 * steps:
            kept = torch.randperm(args[0].shape[1])[: args[0].shape[1] // 2]
            return (args[0][:, kept],)
        return args

    network.classifier.blocks[0].register_forward_pre_hook(choose)


def small_images_first(network, steps):
    """24 instead of 32 pixels, 36 instead of 64 tokens, in the first three fifths of the steps."""
    count, classifier = iter(range(steps)), network.classifier

    def shrink(module, args):
        if network.training and next(count) < 0.6 * steps:
            return (F.interpolate(args[0], size=24, mode="bilinear", antialias=True),)
        return args

    def embed(tokens):
        side, old = round(tokens.shape[1] ** 0.5), round(classifier.positional_emb.shape[1] ** 0.5)
        grid = classifier.positional_emb.transpose(1, 2).unflatten(2, (old, old))
        if side != old:
            grid = F.interpolate(grid, size=side, mode="bilinear", align_corners=False)
        return tokens + grid.flatten(2).transpose(1, 2).to(tokens.dtype)

    network.register_forward_pre_hook(shrink)
    classifier.embed = embed


def small_positions(network, steps):
    torch.nn.init.trunc_normal_(network.classifier.positional_emb, std=0.02)


# name -> (what is changed in the recipe, what is done to the network, optimizer)
CANDIDATES = {
    "base": ({}, None, ADAMW),
    "muon": ({}, None, MuonAndAdamW),
    "half-tokens": ({}, half_the_tokens, ADAMW),
    "small-images": ({}, small_images_first, ADAMW),
    "lr-2e-3": ({"lr": 2e-3}, None, ADAMW),
    "positions-0.02": ({}, small_positions, ADAMW),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(CANDIDATES), choices=CANDIDATES)
    parser.add_argument("--table", type=Path)
    options = parser.parse_args()
    settings = runs.load_settings("cifar100-cpu")
    images = data.load("cifar100", runs.folder_of("data"))
    kept, held = data.held_out(images.y_train, 0.1)
    x, y = images.x_train, images.y_train
    images = replace(images, x_train=x[kept], y_train=y[kept], x_test=x[held], y_test=y[held])
    fields = {name: getattr(settings, name) for name in training.Recipe.__dataclass_fields__}
    accuracy = f"held-out accuracy after {options.epochs} epochs"
    show(f"| candidate | {accuracy} | training loss | CPU minutes |", options.table)
    show("|---|---|---|---|", options.table)
    for name in options.only:
        change, prepare, optimizer = CANDIDATES[name]
        recipe = training.Recipe(**{**fields, "epochs": options.epochs, **change})
        with training.seeded(0, "weights"):
            network = models.cct(settings.model, 100, attention_dropout=0.0, stochastic_depth=0.0)
            network = network.to(memory_format=torch.channels_last)
            if prepare:
                prepare(network, recipe.epochs * -(-len(images.x_train) // recipe.batch_size))
        training.optimizer = optimizer
        start = time.process_time()
        last = training.train(network, images, recipe, seed=0)[-1]
        minutes = (time.process_time() - start) / 60  # of all threads: a process that is paused does not count
        show(f"| {name} | {100 * last['test_accuracy']:.1f} % | {last['loss']:.3f} | {minutes:.1f} |", options.table)


def show(line: str, table: Path | None) -> None:
    print(line, flush=True)
    if table:
        with open(table, "a", encoding="utf-8") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
