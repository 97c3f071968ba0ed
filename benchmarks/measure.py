"""What the measure costs: class sums and matrices against a plain forward pass and against silencing node by node.

PAPERLIB_DATA=... python benchmarks/measure.py [--model cct_7_3x2] [--images 2000] [--nodes 2] [--large]

Everything runs on the same random network and the same test images of CIFAR-100, in fp32. The loop of the definition
keeps one node's readout weights, sets all others to zero, lets all images through and averages the fields over each
label's images. It is timed on a few nodes and multiplied, once as defined and once with the activations kept in memory
(one tap of 10,000 images is 0.6 GB). --large adds 1,000 labels and 4,096 nodes, in a process of its own, with its peak
memory.
"""

import argparse
import resource
import subprocess
import sys
import time

import torch

from paperlib import data, models, readouts, snp, taps, training
from paperlib.paths import folder_of


def timed(work):
    start = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cct_7_3x2")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--nodes", type=int, default=2, help="nodes that the loop is timed on")
    parser.add_argument("--large", action="store_true")
    options = parser.parse_args()
    images = data.limit(data.load("cifar100", folder_of("data")), options.images)
    x, y, labels = images.x_test, images.y_test, len(images.classes)
    mean, std = images.statistics
    with training.seeded(0, "weights"):
        network = models.build(options.model, labels, 32).to(memory_format=torch.channels_last).eval()
    places = taps.cct_taps(network, ["attn", "ff2", "block"])
    print(f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}; "
          f"{options.model}, {len(x)} images, {len(places)} taps\n")  # fmt: skip

    training.predict(network, x[: data.BATCH], mean, std)  # warm
    _, forward = timed(lambda: training.predict(network, x, mean, std))

    def sums():
        totals = {}
        start = 0
        for batch in taps.activations(network, places, x, mean, std):
            size = len(next(iter(batch.values())))
            for name, values in batch.items():
                if name not in totals:
                    totals[name] = values.new_zeros(labels, *values.shape[1:])
                snp.class_sums(totals[name], values, y[start : start + size])
            start += size
        counts = y.bincount(minlength=labels)
        return {name: snp.means_of(total, counts) for name, total in totals.items()}

    means, with_sums = timed(sums)
    weights = {name: torch.randn_like(mean_) for name, mean_ in means.items()}
    _, with_answers = timed(lambda: readouts.measure(network, places, weights, x, y, mean, std))
    fields, matrices = timed(lambda: {name: snp.field_matrices(weights[name], means[name]) for name in means})
    _, clusters = timed(lambda: [snp.node_statistics(snp.boolean_matrices(field)) for field in fields.values()])

    place = places[-1]

    def kept():
        return torch.cat([batch[place.name] for batch in taps.activations(network, [place], x, mean, std)]).flatten(1)

    def silenced(activations: torch.Tensor, node: int):
        alone = torch.zeros_like(weights[place.name])
        alone[:, :, node] = weights[place.name][:, :, node]
        output = activations @ alone.flatten(1).T
        return torch.stack([output[y == label].mean(dim=0) for label in range(labels)])

    _, defined = timed(lambda: [silenced(kept(), node) for node in range(options.nodes)])
    activations = kept()
    looped, at_hand = timed(lambda: [silenced(activations, node) for node in range(options.nodes)])
    worst = max((field - fields[place.name][node]).abs().max().item() / field.abs().max().item()
                for node, field in enumerate(looped))  # fmt: skip
    nodes = sum(field.shape[0] for field in fields.values())
    ours = with_sums + matrices
    rows = [
        ("forward pass", forward),
        ("forward pass and class sums", with_sums),
        ("the same with readout answers", with_answers),
        (f"field matrices of {nodes} nodes", matrices),
        ("their Boolean matrices and clusters", clusters),
        ("all field matrices: forward pass, class sums, matrices", ours),
        (f"all field matrices by silencing ({options.nodes} nodes timed)", defined / options.nodes * nodes),
        ("the same, activations in memory", at_hand / options.nodes * nodes + forward),
    ]
    print("| what | seconds | × forward pass | × ours |\n|---|---|---|---|")
    for what, seconds in rows:
        print(f"| {what} | {seconds:.2f} | {seconds / forward:.2f} | {seconds / ours:.2f} |")
    print(f"\nlargest difference between silencing and ours: {worst:.1e} of the largest field")
    if options.large:
        subprocess.run([sys.executable, __file__, "--as-large"], check=True)


def large() -> None:
    weight, means = torch.randn(1000, 1, 4096), torch.randn(1000, 1, 4096)
    (nodes, _), seconds = timed(lambda: snp.measured_nodes(weight, means))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"1,000 labels, {len(nodes.labels)} nodes: {seconds:.0f} s, peak memory {peak:.1f} GiB")


if __name__ == "__main__":
    large() if "--as-large" in sys.argv else main()
