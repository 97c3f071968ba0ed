"""Training steps a second: this project's CCT against vit-pytorch's and against the matrix-product rate, in one run.

python benchmarks/training_step.py [--models cct_7_3x2 cct_7_3x1] [--batch-size 128] [--rounds 5] [--compile]

Both networks get the same images (uint8, on the device), labels, loss, AdamW, precision and threads. Every round times
one step of each variant in turn, so that a slow moment of the machine hits all of them; the table has medians. Share of
the limit: multiply-adds of the network (forward once, backward twice), over the matrix-product rate in that precision
that is measured between the rounds, on a product of the network's own size.
"""

import argparse
import copy
import statistics
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from vit_pytorch import cct as peer

from paperlib import training
from paperlib.data import augmentation, augmented_batches, normalise
from paperlib.models import cct

HALF = "ours, half the tokens"
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}  # bf16 is left out where it is emulated


def seconds(work, device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    work()
    synchronise()
    return time.perf_counter() - start


def peer_cct(name: str) -> nn.Module:
    """vit-pytorch's CCT of the same size, without dropout and stochastic depth, as this project's here."""
    _, blocks, stem = name.split("_")
    kernel, convs = (int(number) for number in stem.split("x"))
    options = {"img_size": 32, "n_conv_layers": convs, "kernel_size": kernel, "num_classes": 100}
    options |= {"stride": max(1, kernel // 2 - 1), "padding": max(1, kernel // 2), "pooling_kernel_size": 3}
    options |= {"pooling_stride": 2, "pooling_padding": 1, "attention_dropout": 0.0, "stochastic_depth_rate": 0.0}
    return getattr(peer, f"cct_{blocks}")(**options)


def flops_per_step(network: nn.Module, images: Tensor) -> float:
    """Floating-point operations of a forward and a backward pass (counted by PyTorch; attention products included)."""
    # Fused attention is not counted on CPUs, so it is written out here.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        network(images[:1]).sum().backward()
    network.zero_grad()
    return counter.get_total_flops() * len(images)


def product_rate(batch: int, tokens: int, dtype: torch.dtype, device: torch.device) -> float:
    """GFLOP/s of an FF layer's product, the best of five."""
    a, b = (torch.randn(*shape, device=device).to(dtype) for shape in ((batch * tokens, 256), (512, 256)))
    best = min(seconds(lambda: F.linear(a, b), device) for _ in range(5))
    return 2 * batch * tokens * 256 * 512 / best / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["cct_7_3x2", "cct_7_3x1"])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="compile this project's network (train --compile)")
    options = parser.parse_args()
    device = training.best_device()
    print(f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {options.batch_size}\n")
    columns = ["network", "implementation", "precision", "step (s)", "images/s", "share of product rate"]
    columns += ["× peer, same precision", "× peer, fp32"]
    print(f"| {' | '.join(columns)} |\n{len(columns) * '|---'}|")
    for name in options.models:
        compare(name, options, device)


def compare(name: str, options: argparse.Namespace, device: torch.device) -> None:
    n = options.batch_size
    pixels = torch.randint(0, 256, (4 * n, 3, 32, 32), dtype=torch.uint8, device=device)
    pixels = pixels.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 100, (4 * n,), device=device)
    mean = std = torch.full((3, 1, 1), 0.5, device=device)
    batch = normalise(pixels[:n], mean, std)
    step = {"epochs": 1, "batch_size": n, "lr": 1e-3, "weight_decay": 0.05, "warmup": 0.1, "label_smoothing": 0.1}
    precisions = list(PRECISIONS)[: 1 + training.fast_bf16(device.type)]
    recipe = {key: training.Recipe(**step, shift=4, flip=True, precision=key) for key in precisions}
    ours = cct(name, num_classes=100, attention_dropout=0.0, stochastic_depth=0.0)
    ours = ours.to(device, memory_format=torch.channels_last).train()
    tokens, flops = ours.tokenizer.tokens(32), flops_per_step(ours, batch)
    theirs = peer_cct(name).to(device).train()
    fewer = copy.deepcopy(ours)
    fewer.classifier.token_share = 0.5
    networks = {
        "ours": training.compiled(ours, device) if options.compile else ours,
        "vit-pytorch": theirs,
        HALF: fewer,
    }
    optimizers = {side: training.optimizers(network, recipe["fp32"]) for side, network in networks.items()}
    _, muon = training.optimizers(ours, replace(recipe["fp32"], optimizer="muon", precision="auto"))
    augment, published, times, rates = [], [], {}, {key: [] for key in precisions}
    update, orthogonal = [], []
    for round_ in range(options.rounds + 2):  # the first two are not counted
        stream = augmented_batches(pixels, labels, n, 4, True, torch.Generator().manual_seed(round_))
        augment.append(seconds(lambda stream=stream: [normalise(x, mean, std) for x, _ in stream], device) / 4)
        published.append(
            seconds(lambda: augmentation.augment("published", pixels[:n], labels[:n], mean, std, 100), device)
        )
        for precision in precisions:
            for side, network in networks.items():

                def one_step(network=network, side=side, precision=precision):
                    training.training_step(network, optimizers[side], batch, labels[:n], recipe[precision], n)

                times.setdefault((side, precision), []).append(seconds(one_step, device))
            rates[precision].append(product_rate(n, tokens, PRECISIONS[precision], device))
        for parameter in ours.parameters():
            parameter.grad = torch.zeros_like(parameter)
        update.append(seconds(optimizers["ours"][0].step, device))
        orthogonal.append(seconds(muon.step, device))
        optimizers["ours"][0].zero_grad()
    median = {key: statistics.median(values[2:]) for key, values in times.items()}
    for (side, precision), step_time in median.items():
        rate = statistics.median(rates[precision][2:])
        peers = (median["vit-pytorch", key] / step_time for key in (precision, "fp32"))
        share = "" if side == HALF else f"{100 * flops / step_time / 1e9 / rate:.0f} % of {rate:.0f} GFLOP/s"
        cells = [name, side, precision, f"{step_time:.3f}", f"{n / step_time:.0f}", share, *(f"{r:.2f}" for r in peers)]
        print(f"| {' | '.join(cells)} |")
    fast = median["ours", precisions[-1]]
    small = [statistics.median(values[2:]) for values in (update, augment, orthogonal, published)]
    print(f"\n{name}: AdamW {1e3 * small[0]:.1f} ms and augmentation {1e3 * small[1]:.1f} ms a step, "
          f"{100 * sum(small[:2]) / (fast + small[1]):.1f} % of it; "
          f"Muon on the encoders' matrices {1e3 * small[2]:.0f} ms; "
          f"the published augmentation {1e3 * small[3]:.1f} ms\n")  # fmt: skip


if __name__ == "__main__":
    main()
