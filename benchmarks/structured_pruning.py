"""Nodes that ANDC really removes, against torch-pruning: FF width only, equal numbers, one table.

python benchmarks/structured_pruning.py [PROFILE] [--set NAME=VALUE ...]

Takes the first seed's network of a profile (trained if it is not there). At each pruning threshold ANDC masks the FF
layers; `ff1` nodes without connections are removed and their constants kept. torch-pruning removes as many
nodes of each encoder, those with the smallest norms of all their weights, and masks nothing else. Latency: one batch of
128 test images, forward, the best of five.
"""

import argparse
import copy
import time
import warnings

import torch
import torch_pruning

from paperlib import andc, experiment, training
from paperlib.data import normalise
from paperlib.experiment import settings


def fewest_norms(network, counts: dict[str, int], example: torch.Tensor):
    """torch-pruning: remove so many ff1 nodes of each encoder, in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that positions are no layer
        graph = torch_pruning.DependencyGraph().build_dependency(network, example)
    for path, count in counts.items():
        block = network.get_submodule(path)
        norms = block.linear1.weight.square().sum(dim=1) + block.linear2.weight.square().sum(dim=0)
        chosen = norms.argsort()[:count].tolist()
        if chosen:
            graph.get_pruning_group(block.linear1, torch_pruning.prune_linear_out_channels, idxs=chosen).prune()
    return network


def latency(network, batch) -> float:
    """Milliseconds of a forward pass, the best of five."""
    times = []
    with torch.no_grad():
        for _ in range(6):
            start = time.perf_counter()
            network(batch)
            times.append(1e3 * (time.perf_counter() - start))
    return min(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile", nargs="?", default="quick")
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE")
    options = parser.parse_args()
    run = settings.open_run(options.profile, settings.changes_of(options.set))
    seed, images = run.settings.seeds[0], run.images
    network, _ = experiment.networks.load_network(run, seed, "trained")
    network = network.cpu()
    found, pairs = experiment.pruning.label_sets(run, seed).arrays("sets"), andc.connections(network, "ff")
    batch = normalise(images.x_test[:128], *images.statistics)
    print("| threshold | method | ff1 nodes removed | parameters | multiply-adds | test accuracy | ms per batch |")
    print("|---|---|---|---|---|---|---|")

    def show(threshold, method, removed, pruned):
        accuracy = training.accuracy(pruned, images)
        size = sum(p.numel() for p in pruned.parameters())
        macs = andc.multiply_adds(pruned, images.x_test[:1])
        cells = [threshold, method, removed, f"{size:,}", f"{macs:,}", f"{accuracy:.2%}"]
        print(f"| {' | '.join(str(cell) for cell in cells)} | {latency(pruned, batch):.0f} |", flush=True)

    show("", "unpruned", 0, network)
    for threshold in run.settings.prune_thresholds:
        masks = andc.andc_masks(andc.sets_at(threshold, found, pairs), pairs)
        nodes = andc.removable(masks)
        counts = {path: int(gone.sum()) for path, gone in nodes.items()}
        show(threshold, "ANDC", sum(counts.values()),
             andc.compact(andc.apply_masks(copy.deepcopy(network), masks), nodes))  # fmt: skip
        peer = fewest_norms(copy.deepcopy(network).requires_grad_(True), counts, batch[:1])
        show(threshold, "torch-pruning", sum(counts.values()), peer)


if __name__ == "__main__":
    main()
