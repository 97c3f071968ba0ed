"""Forward passes that only measure: how many images at once, and which attention?

python benchmarks/forward.py [--images 256] [--rounds 4]

Milliseconds per image of CCT-7/3x2 without gradients, at 64 and at 256 tokens, with PyTorch's fused kernel and with the
products of attention written out. Every round times each variant in turn, so that a slow moment of the machine hits all
of them; the table has medians.
"""

import argparse
import itertools
import statistics
import sys
import time
from functools import partial

import torch

from paperlib import data, models, training

BATCHES = (16, data.BATCH, 256)
ATTENTION = {"fused": True, "written out": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    device = training.best_device()
    module = sys.modules[models.cct.__module__]
    attention = module.attention
    precisions = ["fp32", "bf16"][: 1 + training.fast_bf16(device.type)]
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, ms per image\n")
    columns = ["tokens", "precision", "attention", *(f"{size} images at once" for size in BATCHES)]
    print(f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|")
    for image_size, precision in itertools.product((32, 64), precisions):
        network = models.build("cct_7_3x2", 100, image_size).to(device, memory_format=torch.channels_last).eval()
        images = torch.rand(options.images, 3, image_size, image_size, device=device)
        images = images.contiguous(memory_format=torch.channels_last)
        times: dict[tuple, list[float]] = {}
        for _ in range(options.rounds + 1):  # the first is not counted
            for (name, fused), size in itertools.product(ATTENTION.items(), BATCHES):
                module.attention = partial(choosing, attention, fused)
                with torch.no_grad(), training.autocast(precision, device):
                    start = time.perf_counter()
                    for batch in images.split(size):
                        logits = network(batch)
                    logits.sum().item()  # waits for the device
                    times.setdefault((name, size), []).append(time.perf_counter() - start)
        for name in ATTENTION:
            medians = (1e3 * statistics.median(times[name, size][1:]) / len(images) for size in BATCHES)
            cells = [str(network.tokenizer.tokens(image_size)), precision, name, *(f"{value:.2f}" for value in medians)]
            print(f"| {' | '.join(cells)} |", flush=True)


def choosing(attention, choice: bool, q, k, v, dropout: float = 0.0, fused: bool = True):
    """Attention as it is chosen here, whatever the network would take."""
    return attention(q, k, v, dropout, choice)


if __name__ == "__main__":
    main()
