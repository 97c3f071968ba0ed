"""ANDC pruning: diagonal labels -> connection masks -> pruned network, and the masks it has to beat.

A connection from node k to node j stays iff the two nodes share a label that both recognise (choice, by analogy with
the group's code for filters; the abstract names the technique and says that it does not hurt accuracy).
"""

import torch
from torch import Tensor, nn
from torch.nn.utils import prune


def connection_mask(labels_out: Tensor, labels_in: Tensor) -> Tensor:
    """Diagonal labels (J, L) of the nodes a layer leads to, (K, L) of those it comes from -> (J, K) bool, kept."""
    return labels_out.float() @ labels_in.float().T > 0


def ff_masks(diagonal: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """ANDC masks of the two FF layers of every encoder of a CCT.

    diagonal: tap name -> (D, L) bool for the taps <encoder>.ff_in, .ff1 and .ff2. Returns module path -> mask of the
    weight's shape. LayerNorm keeps coordinates, so linear1 leads from ff_in to ff1 and linear2 from ff1 to ff2.
    """
    masks = {}
    for index in range(len(network.classifier.blocks)):
        ff_in, ff1, ff2 = (diagonal[f"{index + 1}.{kind}"] for kind in ("ff_in", "ff1", "ff2"))
        masks[f"classifier.blocks.{index}.linear1"] = connection_mask(ff1, ff_in)
        masks[f"classifier.blocks.{index}.linear2"] = connection_mask(ff2, ff1)
    return masks


def permuted_labels(diagonal: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """The label sets of each tap dealt to other nodes: keeps their structure, destroys their meaning."""
    return {
        name: sets[torch.randperm(len(sets), generator=generator).to(sets.device)] for name, sets in diagonal.items()
    }


def random_masks(masks: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Masks that keep as many connections of each layer, drawn at random."""
    return {
        name: _top(torch.rand(mask.shape, generator=generator).to(mask.device), mask) for name, mask in masks.items()
    }


def magnitude_masks(masks: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Masks that keep as many connections of each layer, those with the largest |weight|."""
    return {
        name: _top(network.get_submodule(name).weight.detach().abs().to(mask.device), mask)
        for name, mask in masks.items()
    }


def _top(score: Tensor, mask: Tensor) -> Tensor:
    """The mask.sum() largest scores."""
    kept = torch.zeros_like(mask).flatten()
    kept[score.flatten().topk(int(mask.sum())).indices] = True
    return kept.view_as(mask)


def dilution(masks: dict[str, Tensor]) -> float:
    """Share of the masked layers' connections that are removed, 0..1."""
    total = sum(mask.numel() for mask in masks.values())
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / total


def apply_masks(network: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """Mask the named layers in place (torch.nn.utils.prune: masked weights stay zero through training); biases stay."""
    for name, mask in masks.items():
        module = network.get_submodule(name)
        if prune.is_pruned(module):
            prune.remove(module, "weight")
        prune.custom_from_mask(module, "weight", mask.to(module.weight.device))
    return network
