"""ANDC pruning: diagonal labels -> connection masks -> pruned network, and the masks it has to beat.

A connection from node k to node j stays iff the two nodes share a label that both recognise (choice, by analogy with
the group's code for filters; the abstract names the technique and says that it does not hurt accuracy).
"""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from paperlib import optimum
from paperlib.snp import boolean_matrices, class_means, diagonal_labels, field_matrices
from paperlib.taps import Tap, activations, recording

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)  # whose weights are connections
MASKS = ["andc", "random", "permuted"]  # ANDC and the controls that C4 demands


def unseen_fields(
    own: Tensor, y: Tensor, unseen: Tensor, y_unseen: Tensor, labels: int, log: Callable[[str], None]
) -> Tensor:
    """Field matrices, on examples that nothing was trained on, of the readout of other ones at its optimum: activations
    (n, T, D), labels (n,) of both -> (D, L, L). What they recognise decides masks."""
    best = optimum.choose(optimum.problem(own, y, labels), unseen, y_unseen, log=log).best
    return field_matrices(best.weight.unflatten(1, own.shape[1:]), class_means(unseen, y_unseen, labels))


def connection_mask(labels_out: Tensor, labels_in: Tensor) -> Tensor:
    """Diagonal labels (J, L) of the nodes a layer leads to, (K, L) of those it comes from -> (J, K) bool, kept."""
    return labels_out.float() @ labels_in.float().T > 0


def connections(network: nn.Module, layers: str) -> dict[str, tuple[str, str]]:
    """Layers of a CCT that can be pruned: module path -> (tap of the nodes it leads from, of those it leads to).

    layers: `ff` (linear1 from ff_in to ff1, linear2 from ff1 to ff2, since LayerNorm keeps coordinates), `attention`
    (qkv from the block before to qkv, proj from attn to mha) or `classifier` (from the last block to `labels`).
    `filters` are the convolutions of a VGG, each from the filters before it to its own (code), but the first.
    """
    if layers == "filters":
        convs = [f"features.{i}" for i, module in enumerate(network.features) if isinstance(module, nn.Conv2d)]
        return {name: (f"{layer}.conv", f"{layer + 1}.conv") for layer, name in enumerate(convs[1:], start=1)}
    count, pairs = len(network.classifier.blocks), {}
    if layers == "classifier":
        return {"classifier.fc": (f"{count}.block", "labels")}
    for index in range(count):
        path, encoder = f"classifier.blocks.{index}", index + 1
        before = f"{index}.block" if index else "0.stem"
        ff = {f"{path}.linear1": ("ff_in", "ff1"), f"{path}.linear2": ("ff1", "ff2")}
        attention = {f"{path}.self_attn.qkv": (before, "qkv"), f"{path}.self_attn.proj": ("attn", "mha")}
        for name, ends in {"ff": ff, "attention": attention}[layers].items():
            pairs[name] = tuple(end if "." in end else f"{encoder}.{end}" for end in ends)
    return pairs


def andc_masks(diagonal: dict[str, Tensor], pairs: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """ANDC masks: labels that each tap's nodes recognise, tap name -> (D, L) bool, and `connections` -> module path ->
    mask of the weight's shape. The node of an output label recognises that label."""
    any_sets = next(iter(diagonal.values()))
    diagonal = diagonal | {"labels": torch.eye(any_sets.shape[1], dtype=torch.bool, device=any_sets.device)}
    return {name: connection_mask(diagonal[out], diagonal[into]) for name, (into, out) in pairs.items()}


def masks_of_every_method(
    network: nn.Module,
    sets: dict[str, Tensor],
    pairs: dict[str, tuple[str, str]],
    norms: dict[str, Tensor],
    generator: torch.Generator,
) -> dict[str, dict[str, Tensor]]:
    """ANDC's masks and those of every control, with as many connections of each layer: method -> module path -> mask.

    sets: labels that each tap's nodes recognise, tap -> (D, L) bool; pairs: module path -> (tap it leads from, tap it
    leads to); norms: module path -> size of what goes in, (K,).
    """
    masks = andc_masks(sets, pairs)
    return {
        "andc": masks,
        "random": random_masks(masks, generator),
        "permuted": andc_masks(permuted_labels(sets, generator), pairs),
        "magnitude": magnitude_masks(masks, network),
        "activation": activation_masks(masks, network, norms),
    }


def permuted_labels(diagonal: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The label sets of each tap dealt to other nodes: keeps their structure, destroys their meaning."""
    return {
        name: sets[torch.randperm(len(sets), generator=generator).to(sets.device)] for name, sets in diagonal.items()
    }


def random_masks(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Masks that keep as many connections of each layer, drawn at random."""
    return {
        name: largest(torch.rand(mask.shape, generator=generator).to(mask.device), mask) for name, mask in masks.items()
    }


def magnitude_masks(masks: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Masks that keep as many connections of each layer, those with the largest |weight|."""
    return {name: largest(_sizes(network, name).to(mask.device), mask) for name, mask in masks.items()}


def activation_masks(masks: dict[str, Tensor], network: nn.Module, norms: dict[str, Tensor]) -> dict[str, Tensor]:
    """Masks that keep as many connections of each layer, those with the largest |weight| times the norm of the node
    that they lead from (Wanda's score, compared over the layer instead of output by output); norms: module path ->
    (K,), see `input_norms`."""
    scores = {name: _sizes(network, name).to(mask.device) * norms[name].to(mask.device) for name, mask in masks.items()}
    return {name: largest(scores[name], mask) for name, mask in masks.items()}


def input_norms(network: nn.Module, names: Iterable[str], images: Tensor, mean: Tensor, std: Tensor) -> dict:
    """Root mean square of what goes into each node of the named layers, over uint8 images: name -> (K,)."""
    inputs = [Tap(0, name, name, "input") for name in names]
    sums = {tap.kind: torch.zeros((), device=images.device) for tap in inputs}
    for batch in activations(network, inputs, images, mean, std):
        for tap in inputs:
            sums[tap.kind] = sums[tap.kind] + batch[tap.name].square().mean(dim=1).sum(dim=0)
    return {name: (total / len(images)).sqrt() for name, total in sums.items()}


def _sizes(network: nn.Module, name: str) -> Tensor:
    """|weight| of each connection (J, K), summed over a kernel's pixels."""
    weight = connection_weight(network.get_submodule(name)).detach().abs()
    return weight.flatten(2).sum(dim=2) if weight.ndim > 2 else weight


def largest(score: Tensor, mask: Tensor) -> Tensor:
    """As many connections as a mask keeps, those with the largest scores: (J, K), (J, K) bool -> (J, K) bool."""
    kept = torch.zeros_like(mask).flatten()
    kept[score.flatten().topk(int(mask.sum())).indices] = True
    return kept.view_as(mask)


def dilution(masks: dict[str, Tensor]) -> float:
    """Share of the masked layers' connections that are removed, 0..1."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


@torch.no_grad()
def savings(masks: dict[str, Tensor], network: nn.Module, image: Tensor) -> tuple[int, int]:
    """(weights, multiply-adds for one image (1, 3, S, S)) that an implementation which skips zeros would save."""
    outputs = [Tap(0, name, name) for name in masks]
    with recording(network.eval(), outputs) as recorded:
        network(image)
    weights = macs = 0
    for tap in outputs:
        mask = masks[tap.kind]
        removed = int((~mask).sum()) * network.get_submodule(tap.kind).weight[0, 0].numel()
        weights, macs = weights + removed, macs + removed * recorded[tap.name].shape[1]
    return weights, macs


def removable(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The ff1 nodes that have lost every connection on one side: encoder's path -> (FF width,) bool."""
    paths = [name.removesuffix(".linear1") for name in masks if name.endswith(".linear1")]
    sides = {path: (masks[f"{path}.linear1"].any(dim=1), masks[f"{path}.linear2"].any(dim=0)) for path in paths}
    return {path: ~(reached & heard) for path, (reached, heard) in sides.items()}


@torch.no_grad()
def compact(network: nn.Module, nodes: dict[str, Tensor]) -> nn.Module:
    """Remove the named ff1 nodes (see `removable`) and make masks permanent, in place: the masked network's logits from
    smaller layers. A node without inputs still says GELU(b1), which goes into the bias of linear2."""
    for module in network.modules():
        if prune.is_pruned(module) and hasattr(module, "weight_orig"):
            prune.remove(module, "weight")
    for path, gone in nodes.items():
        block, gone = network.get_submodule(path), gone.to(next(network.parameters()).device)
        stay = (~gone).nonzero().squeeze(1)
        constant = block.activation(block.linear1.bias) * gone
        block.linear2.bias += block.linear2.weight @ constant
        block.linear1.weight = nn.Parameter(block.linear1.weight[stay])
        block.linear1.bias = nn.Parameter(block.linear1.bias[stay])
        block.linear2.weight = nn.Parameter(block.linear2.weight[:, stay])
        block.linear1.out_features = block.linear2.in_features = len(stay)
    return network


def apply_masks(network: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Mask the named layers in place (torch.nn.utils.prune: masked weights stay zero through training); biases stay.
    A mask (J, K) of a convolution holds for whole kernels; an earlier mask still holds. ValueError for a mask of
    another shape than the layer's connections."""
    for name, mask in masks.items():
        module = network.get_submodule(name)
        if prune.is_pruned(module):
            prune.remove(module, "weight")
        weight = connection_weight(module)
        if mask.shape != weight.shape[:2]:
            shape = tuple(weight.shape[:2])
            raise ValueError(f"{name} has connections of shape {shape}, and the mask is {tuple(mask.shape)}")
        whole = mask.view(*mask.shape, *[1] * (weight.ndim - 2)).expand_as(weight)
        stored = whole if weight is module.weight else whole.T
        prune.custom_from_mask(module, "weight", stored.to(module.weight.device))
    return network


def connection_weight(layer: nn.Module) -> Tensor:
    """A layer's weights from its nodes K to others J, (J, K, ...), whichever way the layer stores them. ValueError for
    what is no such layer, or connects each node to some others only (groups)."""
    own = next((kind for kind in LAYERS if isinstance(layer, kind)), None)
    if parametrize.is_parametrized(layer) or (own and type(layer).forward is not own.forward):
        raise ValueError(f"{type(layer).__name__} changes its weights before it uses them: a mask would not hold")
    if type(layer).__name__ == "Conv1D":  # of transformers: a linear layer that is stored transposed
        return layer.weight.T
    if getattr(layer, "groups", 1) > 1:
        raise ValueError(f"{layer} has {layer.groups} groups: its nodes are not connected to all others")
    if own is None:
        raise ValueError(f"{type(layer).__name__} is no layer of connections: take a linear layer or a convolution")
    return layer.weight


def sets_at(threshold: float, found: dict[str, Tensor], pairs: dict[str, tuple[str, str]]) -> dict[str, Tensor]:
    """Of the arrays of `label_sets` those of one threshold and of the taps that connections lead from or to."""
    ends = {end for pair in pairs.values() for end in pair} - {"labels"}
    return {tap: found[f"{threshold:g}/{tap}"] for tap in sorted(ends)}


def recognised_labels(fields: dict[str, Tensor], thresholds: list[float]) -> dict[str, Tensor]:
    """Field matrices, tap -> (D, L, L), to the labels that nodes recognise: threshold/tap -> (D, L) bool."""
    return {
        f"{at:g}/{tap}": diagonal_labels(boolean_matrices(part, at)).clone()
        for tap, part in fields.items()
        for at in thresholds
    }


def accuracy_loss(prefix: str, intact: Tensor, pruned: Tensor | None) -> dict[str, float]:
    """Accuracy, its loss and the loss's standard error over images; nan for a network that was not made."""
    if pruned is None:
        pruned = torch.full_like(intact, math.nan, dtype=torch.float)
    drop = intact.float() - pruned.float()
    return {
        f"{prefix}accuracy": pruned.float().mean().item(),
        f"{prefix}loss": drop.mean().item(),
        f"{prefix}loss_se": (drop.std() / len(drop) ** 0.5).item(),
    }


def same_sign_masks(masks: dict[str, Tensor], network: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Random masks that keep as many kernels with a negative sum, and as many others, as the given ones."""
    drawn = {}
    for name, mask in masks.items():
        negative = (network.get_submodule(name).weight.flatten(2).sum(dim=2) < 0).to(mask.device)
        drawn[name] = torch.zeros_like(mask)
        for part in (negative, ~negative):
            drawn[name][part] = random_masks({name: mask[part]}, generator)[name]
    return drawn


@torch.no_grad()
def keep_means(pruned: nn.Module, network: nn.Module, names: Iterable[str], x: Tensor) -> None:
    """Change the biases of the named layers of a pruned network, in place and one layer after the other, so that their
    means over these normalised images and all positions are those of the unpruned network."""
    places = [Tap(0, name, name, pooled=True) for name in names]
    with recording(network, places) as before:
        network(x)

    def mend(name: str, module: nn.Module, _, output: Tensor) -> Tensor:
        shift = before[f"0.{name}"].mean(dim=(0, 1)) - output.mean(dim=(0, 1))
        module.bias += shift
        return output + shift

    hooks = [pruned.get_submodule(name).register_forward_hook(partial(mend, name)) for name in names]
    pruned(x)
    for hook in hooks:
        hook.remove()


def multiply_adds(network: nn.Module, image: Tensor) -> int:
    """Multiply-adds of the network for one image, attention products included."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # fused attention is not counted
        network(image.float())
    return counter.get_total_flops() // 2
