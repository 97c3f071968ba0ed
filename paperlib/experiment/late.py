"""Stages of a walk that prune late layers by the labels that their nodes share (ANDC, readings R2 and, of a CNN, R4)
and train on from there: the pruned layers and what follows, while everything before stays as it is (claim C4).

What the frozen part says is computed once, so that an epoch costs the encoders that train. Masks are made once, from
held-out images, and hold through training (code: so does the group's protocol for late layers).
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import andc, taps, training
from paperlib.data import Inputs
from paperlib.experiment import measure
from paperlib.experiment.networks import ARCHITECTURE, SPLIT, load_network, recipe
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_arrays, save_table

EPOCHS = (1, 3, 10)  # lengths of the training, each with a rate of its own that falls to 0
RATE = 1e-4  # largest learning rate (choice)
DILUTION = 0.5  # the smallest one that is looked at
METHODS = ("unpruned", "andc", "random", "permuted", "magnitude", "activation", "removed")
FILTERS = "filters"  # the reading of a CNN, whose layers stand for encoders
DEPTHS = {True: (1, 2, 4), False: (1, 2)}  # of a CNN, or not: how many last layers, or encoders, are looked at
# what is pruned of a transformer -> (kind of `andc.connections`, ends of its layers' paths)
READINGS = {
    "W1": ("ff", ("linear1",)),
    "W2": ("ff", ("linear2",)),
    "FF": ("ff", ("linear1", "linear2")),
    "proj": ("attention", ("self_attn.proj",)),
}


def parts(run: Run) -> list[tuple[str, int]]:
    """What is pruned, and of how many last encoders or layers: the arguments of `pruned`."""
    if run.settings.model.startswith("vgg"):
        return [(FILTERS, layers) for layers in DEPTHS[True]]
    return [*((reading, 1) for reading in READINGS), ("FF", 2)]


def table(run: Run) -> pd.DataFrame:
    """The table of `pruned`, everything that is pruned of the networks of all seeds."""
    stages = [pruned(run, seed, *part) for seed in run.settings.seeds for part in parts(run)]
    return pd.concat([stage.table("late") for stage in stages], ignore_index=True)


def label_sets(run: Run, seed: int) -> Stage:
    """Stage: labels that nodes of the last two encoders recognise on held-out images, by readouts at their optimum, at
    every threshold of the pruning sweep. sets: threshold/tap -> (D, L) bool; norms: tap -> (D,), RMS of activations."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images, fields, norms = run.images.to(training.best_device()), {}, {}
        chosen, held = measure.readout_images(run)
        y, y_held = images.y_train[chosen], images.y_train[held]
        pictures = torch.cat([images.x_train[chosen], images.x_train[held]])
        for place in _ends(network):
            activations = taps.features(network, [place], pictures, *images.statistics)[place.name]
            own, unseen = activations[: len(y)], activations[len(y) :]
            log = partial(_said, run, place.name)
            fields[place.name] = andc.unseen_fields(own, y, unseen, y_held, len(images.classes), log)
            norms[place.name] = unseen.square().mean(dim=(0, 1)).sqrt()
        save_arrays(folder / "sets.npz", andc.recognised_labels(fields, run.settings.prune_thresholds))
        save_arrays(folder / "norms.npz", norms)

    config = run.config(*ARCHITECTURE, *SPLIT[run.settings.blind], "held_out", "prune_thresholds")
    config |= {"seed": seed, "images": measure.examples(run)}
    return run.stage(f"late-label-sets-seed{seed}", config, inputs, make)


def unpruned(run: Run, seed: int, encoders: int) -> Stage:
    """Stage: the last so many encoders trained on as they are, what every mask of theirs is compared with. answers:
    unpruned/epochs -> (n_test,) bool."""
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        fresh = partial(_pruned, network, {}, encoders, removed=False)
        save_arrays(folder / "answers.npz", _curve(run, fresh, _streams(run, network, encoders), seed, folder))

    config = _config(run, seed) | {"encoders": encoders}
    return run.stage(f"late-unpruned-{encoders}-seed{seed}", config, inputs, make)


def pruned(run: Run, seed: int, reading: str, encoders: int = 1) -> Stage:
    """Stage: the last so many encoders pruned at the smallest dilution of at least one half, and trained on.

    late.csv: seed, reading (a key of `READINGS`, or `FILTERS`), encoders, threshold, method (`METHODS`; removed: the
    branch says nothing, not of a CNN), dilution, epochs (0: right after pruning), accuracy, loss and loss_se (against
    the better of the unpruned network as it was and trained on alike), andc_ahead and andc_ahead_se (accuracy of ANDC's
    network less this one's, on the same images); accuracies in 0..1. answers: method/epochs -> (n_test,) bool.
    """
    source, intact = label_sets(run, seed), unpruned(run, seed, encoders)
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        data = _streams(run, network, encoders)
        pairs = connections(network, reading, encoders)
        threshold, found = _diluted(run, source, pairs)
        norms, answers, rows = source.arrays("norms"), {}, []
        generator = training.generator(seed, "late masks", reading, encoders)
        entering = {name: norms[into] for name, (into, _) in pairs.items()}
        masks = andc.masks_of_every_method(network, found, pairs, entering, generator)
        if reading != FILTERS:  # a CNN without a layer says nothing
            masks["removed"] = {name: torch.zeros_like(mask) for name, mask in masks["andc"].items()}
        for method, mask in masks.items():
            fresh = partial(_pruned, network, mask, encoders, removed=method == "removed")
            answers |= _curve(run, fresh, data, seed, folder, method)
            run.log(f"{reading} of {encoders}, {method}: {answers[f'{method}/{EPOCHS[-1]}'].float().mean():.1%}")
        save_arrays(folder / "answers.npz", answers)
        answers |= intact.arrays("answers")
        for method in ("unpruned", *masks):
            for epochs in (0, *EPOCHS):
                right = answers[f"{method}/{epochs}"]
                whole = max((answers[f"unpruned/{n}"] for n in (0, epochs)), key=lambda part: part.sum())
                ahead = answers[f"andc/{epochs}"].float() - right.float()
                row = {"seed": seed, "reading": reading, "encoders": encoders, "threshold": threshold}
                row |= {"method": method, "dilution": andc.dilution(masks[method]) if method in masks else 0.0}
                row |= {"epochs": epochs} | andc.accuracy_loss("", whole, right)
                error = (ahead.std() / len(ahead) ** 0.5).item()
                rows.append(row | {"andc_ahead": ahead.mean().item(), "andc_ahead_se": error})
        save_table(folder / "late.csv", rows)

    config = _config(run, seed) | {"reading": reading, "encoders": encoders}
    inputs |= {"sets": source.sha256, "unpruned": intact.sha256}
    return run.stage(f"late-{reading}-{encoders}-seed{seed}", config, inputs, make)


def _config(run: Run, seed: int) -> dict:
    """What decides how the end of a network is trained on."""
    config = run.config(*ARCHITECTURE, *SPLIT[run.settings.blind], "batch_size", "weight_decay", "label_smoothing")
    config |= run.config("precision", "max_steps") | {"images": measure.examples(run)}
    return config | {"seed": seed, "epochs": EPOCHS, "rate": RATE}


def _said(run: Run, tap: str, text: str) -> None:
    run.log(f"{tap}: {text}")


def connections(network: nn.Module, reading: str, encoders: int) -> dict[str, tuple[str, str]]:
    """`andc.connections` of one reading in the last so many encoders, or layers of a CNN."""
    if reading == FILTERS:
        return dict(list(andc.connections(network, FILTERS).items())[-encoders:])
    layers, ends = READINGS[reading]
    first = len(network.classifier.blocks) - encoders
    return {
        name: pair
        for name, pair in andc.connections(network, layers).items()
        if int(name.split(".")[2]) >= first and name.split(".", 3)[3] in ends
    }


class Tail(nn.Module):
    """The last encoders of a transformer and its classifier: the stream before them (B, N, d) -> logits (B, labels). Of
    texts, positions without a word, where the stream is 0, are masked."""

    def __init__(self, network: nn.Module, encoders: int):
        super().__init__()
        self.first = len(network.classifier.blocks) - encoders
        self.of_texts = isinstance(network.tokenizer, nn.Embedding)
        self.classifier = copy.deepcopy(network.classifier).requires_grad_(True)
        self.classifier.blocks = self.classifier.blocks[-encoders:]

    def own(self, path: str) -> str:
        """What a module of the network is called here."""
        _, _, number, rest = path.split(".", 3)
        return f"classifier.blocks.{int(number) - self.first}.{rest}"

    def forward(self, stream: Tensor) -> Tensor:
        there = stream.ne(0).any(dim=2) if self.of_texts else None
        for block in self.classifier.blocks:
            stream = block(stream, there)
        return self.classifier.classify(stream, there)


class FilterTail(nn.Module):
    """The last layers of a CNN and its classifier: the filters' maps before them (B, T, D) -> logits (B, labels)."""

    def __init__(self, network: nn.Module, layers: int):
        super().__init__()
        first = int(list(andc.connections(network, FILTERS))[-layers].split(".")[1])
        self.features = copy.deepcopy(network.features[first:]).requires_grad_(True)
        self.rest = copy.deepcopy(network[1:]).requires_grad_(True)

    def own(self, path: str) -> str:
        """What a module of the network is called here: the same."""
        return path

    def forward(self, maps: Tensor) -> Tensor:
        side = math.isqrt(maps.shape[1])
        return self.rest(self.features(maps.mT.unflatten(2, (side, side))))


def tail_of(network: nn.Module, depth: int) -> Tail | FilterTail:
    return FilterTail(network, depth) if taps.is_cnn(network) else Tail(network, depth)


def _ends(network: nn.Module) -> list[taps.Tap]:
    """Taps that the layers of all readings lead from or to."""
    cnn, ends = taps.is_cnn(network), set()
    for reading, depth in itertools.product([FILTERS] if cnn else READINGS, DEPTHS[cnn]):
        for pair in connections(network, reading, depth).values():
            ends |= {*pair}
    kinds = sorted({end.split(".")[1] for end in ends})
    return [place for place in taps.places(network, kinds) if place.name in ends]


def _streams(run: Run, network: nn.Module, depth: int) -> Inputs:
    """What the encoder, or layer, before the pruned ones passes on, for the images of readouts and the test images."""
    images = run.images.to(training.best_device())
    chosen, _ = measure.readout_images(run)
    everywhere = taps.places(network, ["stem", "block"])
    before = max(place.encoder for place in everywhere) - depth
    places = [place for place in everywhere if place.encoder == before]
    parts = [
        taps.features(network, places, x, *images.statistics)[places[0].name]
        for x in (images.x_train[chosen], images.x_test)
    ]
    return Inputs("streams", parts[0], images.y_train[chosen], parts[1], images.y_test, images.classes)


def _diluted(run: Run, source: Stage, pairs: dict[str, tuple[str, str]]) -> tuple[float, dict[str, Tensor]]:
    """The smallest threshold whose masks remove at least `DILUTION`, and the label sets there. ValueError if none."""
    found = source.arrays("sets")
    for threshold in run.settings.prune_thresholds:
        sets = andc.sets_at(threshold, found, pairs)
        if andc.dilution(andc.andc_masks(sets, pairs)) >= DILUTION:
            return threshold, sets
    raise ValueError(f"no threshold removes {DILUTION:.0%} of {', '.join(pairs)}: add larger prune_thresholds")


def _pruned(network: nn.Module, masks: dict[str, Tensor], depth: int, removed: bool) -> Tail | FilterTail:
    """The masked end of a network; a removed branch has no bias either."""
    tail = tail_of(network, depth)
    own = {tail.own(name): mask for name, mask in masks.items()}
    andc.apply_masks(tail, own)
    if removed:
        for name in own:
            nn.init.zeros_(tail.get_submodule(name).bias)
    return tail


def _curve(
    run: Run, fresh: Callable[[], nn.Module], data: Inputs, seed: int, folder: Path, method: str = "unpruned"
) -> dict[str, Tensor]:
    """Answers right after pruning and after each length of training, which starts from a fresh end: method/epochs ->
    (n_test,) bool."""
    return {
        f"{method}/{epochs}": _trained(run, fresh(), data, epochs, seed, folder / f"{method}-{epochs}.pt").cpu()
        for epochs in (0, *EPOCHS)
    }


def _trained(run: Run, tail: nn.Module, data: Inputs, epochs: int, seed: int, checkpoint: Path) -> Tensor:
    """Which test images a tail answers correctly after so many epochs of training, in place: (n_test,) bool."""
    tail = tail.to(data.x_train.device)
    if epochs:
        short = replace(recipe(run), epochs=epochs, lr=RATE, warmup=0.0, optimizer="adamw", augmentation="light")
        short = replace(short, token_share=1.0, decay="linear")
        unscored = replace(data, x_test=data.x_test[:0], y_test=data.y_test[:0])  # scored once, below
        training.train(tail, unscored, short, seed, checkpoint, log=lambda line: None)
    logits = training.predict(tail, data.x_test, *data.statistics)
    return logits.argmax(dim=1) == data.y_test
