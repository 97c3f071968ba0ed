"""How far readouts still move when they train twice as long: `block` of the first, middle and last encoder.

PAPERLIB_DATA=... python benchmarks/convergence.py [--profile cifar100-cpu] [--epochs 4 8 16 32] [--limit N]

The readouts of every length, each with its own decay of the learning rate, train in the same passes over the frozen
network, of the first seed, trained and with random weights. Accuracy and SNR are those of the test images; no setting
is chosen by them. A length is printed as soon as it is done, with what its readouts moved by since the length before
it; `spread` is the largest less the smallest of the committed seeds. Every epoch is kept in the run's folder: stopped
and started again, it goes on.
"""

import argparse
import sys
import time

import pandas as pd
import torch

from paperlib import files, readouts, runs, snp, taps, training
from paperlib.data import augmented_batches, held_out, normalise

sys.path.insert(0, str(runs.root() / "notebooks"))
import parameters
import stages
from stages.nodes import READOUT


class Readouts:
    """Readouts of some taps of one network, for every length; the steps are those of `readouts.train_readouts`."""

    def __init__(self, run: runs.Run, kind: str, lengths: list[int]):
        self.run, self.kind, seed = run, kind, run.settings.seeds[0]
        self.network, inputs = stages.load_network(run, seed, kind)
        everywhere = taps.places(self.network, ["block"])
        some = stages.first_middle_last(max(tap.encoder for tap in everywhere))
        self.taps = [tap for tap in everywhere if tap.encoder in some]
        self.images = run.images.to(training.best_device())
        kept, _ = held_out(run.images.y_train, run.settings.held_out)
        self.x, self.y = self.images.x_train[kept], self.images.y_train[kept]
        self.scales = readouts._rms(self.network, self.taps, self.x[:1024], *self.images.statistics)
        self.weights, groups, labels = {}, [], len(self.images.classes)
        self.network.eval()
        self.positions = {name: value.shape[1:] for name, value in self.recorded(self.x[:1]).items()}
        for name, shape in self.positions.items():
            features, generator = shape.numel(), training.generator(seed, "readout", name)  # the start that walks take
            start = (torch.rand(labels, features, generator=generator) * 2 - 1) / features**0.5
            for length in lengths:
                weight = self.weights[name, length] = start.to(self.x.device, copy=True)
                groups.append({"params": [weight], "rate": run.settings.readout_lr / features**0.5, "length": length})
        self.adam = torch.optim.Adam(groups, weight_decay=run.settings.readout_l2, fused=True)
        self.made_from = inputs | run.config(*READOUT, "limit", "seeds") | {"lengths": lengths}
        self.done, self.rows, self.file = 0, [], run.folder / f"convergence-{kind}.pt"
        if self.file.exists():
            self.resume()

    @torch.no_grad()
    def resume(self) -> None:
        with files.reading(self.file, "delete it to start anew"):
            saved = torch.load(self.file, map_location=self.x.device, weights_only=True)
            if saved["made from"] != self.made_from:
                raise ValueError("it was written with other settings, images or lengths")
            self.adam.load_state_dict(saved["adam"])
            for mine, weight in zip(self.weights.values(), saved["weights"], strict=True):
                mine.copy_(weight)
            self.done, self.rows = saved["epochs"], saved["rows"]

    def save(self) -> None:
        saved = {"made from": self.made_from, "epochs": self.done, "rows": self.rows, "adam": self.adam.state_dict()}
        with files.whole(self.file) as file:
            torch.save(saved | {"weights": list(self.weights.values())}, file)

    @torch.no_grad()
    def recorded(self, batch: torch.Tensor) -> dict[str, torch.Tensor]:
        with taps.recording(self.network, self.taps) as found:
            self.network(normalise(batch, *self.images.statistics))
        return dict(found)

    @torch.no_grad()
    def epoch(self, epoch: int) -> None:
        s, device = self.run.settings, self.x.device
        for weight in self.weights.values():
            weight.grad = torch.zeros_like(weight)
        for group in self.adam.param_groups:
            if epoch >= group["length"]:
                group["params"][0].grad = None  # done: Adam leaves it alone
        steps = -(-len(self.x) // s.readout_batch_size)
        random = training.generator(s.seeds[0], "readout batches", epoch)
        stream = augmented_batches(self.x, self.y, s.readout_batch_size, s.shift, s.flip, random)
        for step, (batch, labels) in enumerate(stream):
            with training.autocast(s.precision, device):
                features = {name: value.flatten(1).float() for name, value in self.recorded(batch).items()}
            for (name, length), weight in self.weights.items():
                if epoch < length:
                    readouts._gradient(weight, features[name], self.scales[name], labels)
            for group in self.adam.param_groups:
                at = epoch * steps + step, group["length"] * steps
                group["lr"] = group["rate"] * training.schedule(*at, 0.0) if epoch < group["length"] else 0.0
            self.adam.step()
        self.done = epoch + 1

    def measured(self, length: int) -> list[dict]:
        weights = {
            name: (self.weights[name, length] / self.scales[name]).unflatten(1, shape)
            for name, shape in self.positions.items()
        }
        found = readouts.measure(
            self.network, self.taps, weights, self.images.x_test, self.images.y_test, *self.images.statistics
        )
        rows = []
        for tap in self.taps:
            fields = snp.field_matrices(weights[tap.name], found.class_means[tap.name])
            snr = snp.tap_statistics(snp.boolean_matrices(fields, self.run.settings.threshold)).snr
            accuracy = found.correct[tap.name].float().mean().item()
            rows.append({"epochs": length, "encoder": tap.encoder, "accuracy": accuracy, "snr": snr})
        return rows


def spread_of_seeds(profile: str) -> pd.DataFrame:
    """(encoder, network) -> accuracy, snr: largest less smallest of the committed seeds."""
    run = parameters.open_committed(profile)
    table, _ = stages.snr(run)
    table = table[(table.threshold == run.settings.threshold) & ~table.centred & (table.tap == "block")]
    return table.groupby(["network", "encoder"])[["accuracy", "snr"]].agg(lambda values: values.max() - values.min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="cifar100-cpu", choices=parameters.profiles())
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--limit", type=int, default=0, help="images, for a trial; 0: all")
    options = parser.parse_args()
    lengths = sorted(options.epochs)
    run = parameters.open_run(options.profile, {"limit": options.limit} if options.limit else {})
    spread = spread_of_seeds(options.profile).add_prefix("spread of ")
    run.folder.mkdir(parents=True, exist_ok=True)
    for kind in stages.NETWORKS:
        half, start = Readouts(run, kind, lengths), time.monotonic()
        if half.rows:
            show(half, spread.loc[kind])
        for epoch in range(half.done, lengths[-1]):
            half.epoch(epoch)
            if half.done in lengths:
                half.rows += half.measured(half.done)
                show(half, spread.loc[kind])
            half.save()
            print(f"{kind}, epoch {half.done}, {time.monotonic() - start:.0f} s", flush=True)


def show(half: Readouts, spread: pd.DataFrame) -> None:
    table = pd.DataFrame(half.rows).set_index(["encoder", "epochs"]).sort_index()
    table = table.join(table.groupby("encoder").diff().add_suffix(" moved")).join(spread)
    print(f"\n{half.kind} network\n{table.round(4).to_string()}\n", flush=True)


if __name__ == "__main__":
    main()
