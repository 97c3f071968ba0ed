"""Fields and Boolean matrices of a head's nodes -> which head recognises which label, against chance (claim C5).

H heads, D nodes of an encoder's concatenated heads (tap `attn`; node k belongs to head k // (D/H)), L labels. What the
abstract calls symmetry breaking is given numbers here by our choice of definitions.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from paperlib.models.cct import attention_map
from paperlib.snp import class_means
from paperlib.taps import Tap, recording

FEW = 4  # nodes of a head in sets that are compared with rotated ones
OWN_ORDERS = 5  # orders in which the nodes of a head join its sets
DEALINGS = 100  # ways to deal an encoder's nodes to heads at random


def head_matrices(fields: Tensor, num_heads: int) -> Tensor:
    """Field matrix of each head with all others silenced, M_h = sum of its nodes' matrices: (D, L, L) -> (H, L, L)."""
    return _by_head(fields, num_heads).sum(dim=1)


def cooperation_counts(booleans: Tensor, num_heads: int) -> Tensor:
    """n_h(l): how many nodes of head h recognise label l: (D, L, L) bool -> (H, L) int64."""
    return counts_of(booleans.diagonal(dim1=1, dim2=2), num_heads)


def counts_of(diagonal: Tensor, num_heads: int) -> Tensor:
    """The same from the labels that nodes recognise: (D, L) bool -> (H, L) int64."""
    return _by_head(diagonal, num_heads).sum(dim=1)


@dataclass(frozen=True)
class Assignment:
    """Which head owns which label, all (L,)."""

    owner: Tensor  # head with the largest count; -1 where no node recognises the label
    margin: Tensor  # largest count minus the second largest
    tied: Tensor  # bool: the largest count is shared (the owner is then the first of them)


def assign_labels(counts: Tensor, ties: torch.Generator | None = None) -> Assignment:
    """Give each label to the head with the most nodes that recognise it: (H, L) -> assignment. One head owns all. Ties
    go to the first of them, or are drawn: then no head owns more for its number."""
    drawn = counts if ties is None else counts + torch.rand(counts.shape, generator=ties) / 2
    top = counts.topk(min(2, len(counts)), dim=0).values
    second = top[1] if len(top) > 1 else torch.zeros_like(top[0])
    seen = top[0] > 0
    return Assignment(drawn.argmax(dim=0).where(seen, -1), top[0] - second, seen & (top[0] == second))


def labels_by_owner(counts: Tensor) -> list[int]:
    """All labels, those of head 0 first, each head's by falling count, those without an owner last: (H, L) -> L."""
    owner, most = assign_labels(counts).owner.tolist(), counts.amax(dim=0).tolist()
    return sorted(range(len(owner)), key=lambda label: (owner[label] % (len(counts) + 1), -most[label]))


def specialisation(counts: Tensor) -> Tensor:
    """Kullback-Leibler divergence (nats) of n_h(l) / sum_h n_h(l) from uniform, averaged over the labels that any node
    recognises: (..., H, L) -> (...). 0 if all heads share every label alike, ln H if each label has one head.

    Small counts alone lift it by about (H - 1) / (2 n): read only its excess over `permutation_null`.
    """
    counts = counts.double()
    total = counts.sum(dim=-2, keepdim=True)
    share = counts / total.clamp(min=1)
    entropy = -torch.special.xlogy(share, share).sum(dim=-2)
    recognised = total.squeeze(-2) > 0
    divergence = (math.log(counts.shape[-2]) - entropy) * recognised
    return divergence.sum(dim=-1) / recognised.sum(dim=-1).clamp(min=1)


def permutation_null(diagonal: Tensor, num_heads: int, draws: int, generator: torch.Generator) -> Tensor:
    """Specialisation with the encoder's nodes dealt to its heads at random: (D, L) bool -> (draws,)."""
    nodes = len(diagonal)
    head = torch.arange(nodes) // (nodes // num_heads)
    results = []
    for _ in range(0, draws, 64):  # in chunks: a draw needs (D, H) + (H, L) floats
        dealt = head[torch.rand(64, nodes, generator=generator).argsort(dim=1)]
        members = torch.nn.functional.one_hot(dealt, num_heads).to(diagonal.device, torch.float32)
        results.append(specialisation(members.transpose(1, 2) @ diagonal.float()))
    return torch.cat(results)[:draws]


@torch.no_grad()
def ablation_logits(network: nn.Module, images: Tensor, means: list[Tensor] | None = None) -> Tensor:
    """The network's own logits when one head of a CCT says nothing: its nodes are 0 before `proj` mixes the heads, or
    with `means` (T, D), one for each encoder's concatenated heads, always their mean.

    images (n, 3, S, S), normalised -> (encoders, H, n, L). What lies before the ablated head is computed once.
    """
    network.eval()
    classifier, mask = network.classifier, network.mask(images)
    stream = classifier.embed(network.tokenizer(images))
    logits = []
    for index, block in enumerate(classifier.blocks):
        for head in range(block.self_attn.heads):
            with _replaced(block.self_attn, head, means[index] if means else torch.zeros(())):
                ablated = block(stream, mask)
            for later in classifier.blocks[index + 1 :]:
                ablated = later(ablated, mask)
            logits.append(classifier.classify(ablated, mask))
        stream = block(stream, mask)
    return torch.stack(logits).unflatten(0, (len(classifier.blocks), -1))


def ablation_drops(intact: Tensor, ablated: Tensor, labels: Tensor, owner: Tensor) -> tuple[Tensor, Tensor]:
    """How many images a head's ablation costs among its own labels and among the others.

    intact (n,) and ablated (H, n) bool: right answers; labels (n,); owner (L,): head that owns each label, -1 none.
    Returns drop (H, n) in -1, 0, 1 and own (H, n) bool; labels that nobody owns count as others of every head.
    """
    heads = torch.arange(len(ablated), device=labels.device)
    return intact.int() - ablated.int(), owner[labels] == heads[:, None]


def own_label_drops(drop: Tensor, own: Tensor, generator: torch.Generator, draws: int = 1000) -> tuple:
    """Accuracy lost by heads' ablation on their own labels, on other labels, and bootstrap draws of the difference.

    drop, own (H, n) from `ablation_drops` -> floats in -1..1 and (draws,) over images. Every head is compared with
    itself, and heads are weighted by the images of their own labels: a head that matters for all labels alike, however
    many it owns, adds nothing to the difference.
    """
    drop, own = drop.T.double(), own.T.double()
    per_image = torch.stack([drop * own, own, drop * (1 - own), 1 - own], dim=1)  # (n, 4, H)
    n = len(per_image)
    samples = [per_image[torch.randint(n, (n,), generator=generator)].sum(dim=0) for _ in range(draws)]
    drawn = _compared(*torch.stack(samples).unbind(dim=-2))
    return *_compared(*per_image.sum(dim=0)).tolist(), drawn.diff(dim=0)[0].neg()


def own_and_other_drops(drop: Tensor, labels: Tensor, owner: Tensor) -> tuple[float, float]:
    """Accuracy lost by heads' ablation on their own labels and on the others (see `own_label_drops`): drop (H, n) in
    -1, 0, 1, labels (n,), owner (L,) -> floats in -1..1."""
    own = (owner[labels] == torch.arange(len(drop))[:, None]).double()
    drop = drop.double()
    sums = ((drop * own).sum(1), own.sum(1), (drop * (1 - own)).sum(1), (1 - own).sum(1))
    return tuple(_compared(*sums).tolist())


def interactions(lost: Tensor, owner: Tensor) -> Tensor:
    """How much more silencing a head costs a label than heads and labels do by themselves: accuracy lost (H, L), owners
    (L,), -1 for none -> (H, K) for the labels that have an owner.

    Labels that are lost easily, and heads that matter for all labels, add nothing; 0 for one head. Scaled by
    H / (H - 1): if silencing a head costs its own labels d and the others nothing, their owners have d.
    """
    lost = lost[:, owner >= 0].double()
    centred = lost - lost.mean(dim=0) - lost.mean(dim=1, keepdim=True) + lost.mean()
    return centred * len(lost) / max(1, len(lost) - 1)


def ablation_gap(interaction: Tensor, owner: Tensor) -> Tensor:
    """Mean over labels of what their owners' silencing costs them beyond heads and labels: (H, K), owners (..., K) ->
    (...); 0 without labels."""
    own = interaction[owner, torch.arange(owner.shape[-1])]
    return own.sum(dim=-1) / max(1, owner.shape[-1])


def dealt_gaps(drop: Tensor, labels: Tensor, owner: Tensor, draws: int, generator: torch.Generator) -> Tensor:
    """The null of the ablation gap: own minus other labels (see `own_label_drops`) with the owners dealt to other
    labels at random: drop (H, n), labels (n,), owner (L,) -> (draws,)."""
    lost = torch.stack([drop.double()[:, labels == label].sum(dim=1) for label in range(len(owner))])  # (L, H)
    counts = labels.bincount(minlength=len(owner)).double()
    heads, results = torch.arange(len(drop), device=drop.device), []
    for _ in range(draws):
        dealt = owner[torch.randperm(len(owner), generator=generator).to(owner.device)].to(drop.device)
        own = (dealt[:, None] == heads).double()
        results.append(_compared((lost * own).sum(0), counts @ own, (lost * (1 - own)).sum(0), counts @ (1 - own)))
    own, other = torch.stack(results).unbind(dim=1)
    return own - other


def _compared(lost_own: Tensor, images: Tensor, lost_other: Tensor, others: Tensor) -> Tensor:
    """Sums over images, each (..., H) -> accuracy lost on own and on other labels, (2, ...), heads weighted by the
    images of their own labels."""
    weight = images / images.sum(dim=-1, keepdim=True).clamp(min=1)
    pair = (lost_own / images.clamp(min=1), lost_other / others.clamp(min=1))
    return torch.stack([(weight * mean).sum(dim=-1) for mean in pair])


@torch.no_grad()
def attention_received(network: nn.Module, images: Tensor, encoder: int) -> Tensor:
    """How much attention each token of an encoder gets from a head, mean over the tokens that attend: normalised images
    (n, 3, S, S) -> (n, H, N), rows sum to 1."""
    attention = network.classifier.blocks[encoder - 1].self_attn
    with recording(network.eval(), [Tap(encoder, "qkv", f"classifier.blocks.{encoder - 1}.self_attn.qkv")]) as recorded:
        network(images)
    q, k, _ = attention.split_heads(recorded[f"{encoder}.qkv"])
    received, there = attention_map(q, k, network.mask(images)), network.mask(images)
    if there is None:
        return received.mean(dim=2)
    share = there / there.sum(dim=1, keepdim=True)  # padding attends, too, but says nothing
    return torch.einsum("bq,bhqk->bhk", share, received)


@contextmanager
def _replaced(attention: nn.Module, head: int, values: Tensor) -> Iterator[None]:
    """Within the block, one head's nodes are `values`: (T, D) of all heads side by side, or one number."""
    width = attention.proj.in_features // attention.heads
    own = slice(head * width, (head + 1) * width)

    def replace(module, args):
        heads = args[0].clone()
        heads[..., own] = values[..., own] if values.ndim else values
        return (heads,)

    hook = attention.proj.register_forward_pre_hook(replace)
    try:
        yield
    finally:
        hook.remove()


def _by_head(values: Tensor, num_heads: int) -> Tensor:
    """(D, ...) -> (H, D/H, ...)."""
    if num_heads < 1 or len(values) % num_heads:
        raise ValueError(f"{num_heads} heads do not divide {len(values)} nodes")
    return values.unflatten(0, (num_heads, -1))


def groupings(nodes: int, num_heads: int, generator: torch.Generator) -> Tensor:
    """Ways to split an encoder's nodes into heads, each head's nodes in a random order: (G, H, D/H), where the first
    OWN_ORDERS are the network's own heads and the other DEALINGS are dealt at random."""
    width = nodes // num_heads
    within = torch.rand(OWN_ORDERS, num_heads, width, generator=generator).argsort(dim=2)
    dealt = torch.rand(DEALINGS, nodes, generator=generator).argsort(dim=1).unflatten(1, (num_heads, width))
    return torch.cat([within + width * torch.arange(num_heads)[:, None], dealt])


def sets_and_labels(recognised: Tensor, num_heads: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sets of nodes of heads, and of nodes that are put together at random (`groupings`, `growing_sets`), and the
    labels that each such head owns: labels that nodes recognise (D, L) bool -> (G, H, sizes, D), (G, H, L), bool."""
    order = groupings(len(recognised), num_heads, generator)
    owner = torch.stack([assign_labels(group.sum(dim=1), generator).owner for group in recognised[order]])
    return growing_sets(order), owner[:, None] == torch.arange(num_heads)[:, None]


def growing_sets(order: Tensor) -> Tensor:
    """Sets of each head's first 1, 4, 16, ... nodes, of all its nodes, and last of all nodes of the encoder:
    (G, H, D/H) -> (G, H, sizes, D), bool."""
    width, nodes = order.shape[2], order.shape[1] * order.shape[2]
    nobody = torch.zeros(*order.shape[:2], nodes, dtype=torch.bool)
    sizes = sorted({*(4**power for power in range(6) if 4**power < width), width, nodes})
    members = [nobody.scatter(2, order[..., :size], True) if size <= width else ~nobody for size in sizes]
    return torch.stack(members, dim=2)


def right_answers_per_label(fields: Tensor, labels: Tensor) -> Tensor:
    """How many images of each label are answered correctly: fields (S, n, L), labels (n,) -> (S, L)."""
    right = (fields.argmax(dim=2) == labels).to(fields)
    return fields.new_zeros(len(fields), fields.shape[2]).index_add_(1, labels, right)


def choices_per_label(fields: Tensor, labels: Tensor, own: Tensor) -> Tensor:
    """Share of a set's other own labels (S, L) bool that get a smaller field than an image's own label, added up over
    the images of each label; ties count half, nan for sets with one label: fields (S, n, L), labels (n,) -> (S, L)."""
    target = fields.gather(2, labels.expand(len(fields), -1)[:, :, None])
    below = sum((part & own[:, None]).sum(dim=2) for part in (fields < target, fields <= target)) / 2 - 0.5
    others = own.sum(dim=1, keepdim=True) - 1.0
    share = below / others.where(others > 0, torch.nan)
    return fields.new_zeros(len(fields), fields.shape[2]).index_add_(1, labels, share)


def cooperation_table(sets: Tensor, own: Tensor, right: Tensor, choice: Tensor, alone: Tensor) -> pd.DataFrame:
    """The measured columns of `cooperation` for one encoder: sets (G, H, sizes, D) and own labels (G, H, L), bool;
    shares of each label's images that sets answer correctly and choose right (G x H x sizes, L), nodes alone (D, L).
    """
    right, choice = (part.unflatten(0, sets.shape[:3]) for part in (right, choice))
    singles = 1 / own.shape[2] + sets.float() @ (alone - 1 / own.shape[2])
    mine, owned = own[:, :, None], own.any(dim=1)[:, None]

    def mean(values: Tensor, whose: Tensor) -> Tensor:  # over labels with an owner; these count alike
        return values.where(whose, 0).sum(dim=1).where(owned, torch.nan).nanmean(dim=2).flatten()

    found = {"own": mean(right, mine), "others": mean(right, ~mine) / max(1, own.shape[1] - 1)}
    found |= {"singles": mean(singles, mine), "choice": mean(choice, mine)}
    sizes = sets[:, 0].sum(dim=2)
    draws = torch.arange(len(sets)).repeat_interleave(sizes.shape[1])
    table = pd.DataFrame({"draw": draws, "size": sizes.flatten(), **found}).round(6)
    table["nodes"] = ["head" if draw < OWN_ORDERS else "dealt" for draw in draws]
    return table


def summary_of_cooperation(table: pd.DataFrame) -> pd.DataFrame:
    """Whole heads, one row per encoder, means over seeds: own and choice of the heads and of reassigned nodes, with the
    97.5 % quantile over dealings of such means, and others of both; last what all nodes together choose among the same
    labels: how hard these are."""
    whole = table[table.whole]
    by_seed = whole.groupby(["nodes", "encoder", "seed"])[["own", "choice", "others"]]
    mean = by_seed.mean().groupby(level=["nodes", "encoder"]).mean()
    dealings = whole[whole.nodes == "dealt"].groupby(["encoder", "draw"])[["own", "choice"]].mean()
    high = dealings.groupby(level="encoder").quantile(0.975)
    columns = {"others": mean.loc["head"].others, "others_dealt": mean.loc["dealt"].others}
    for name in ("own", "choice"):
        columns |= {name: mean.loc["head"][name], f"{name}_dealt": mean.loc["dealt"][name], f"{name}_high": high[name]}
    everyone = table[table["size"] == table["size"].max()].groupby(["nodes", "encoder"]).choice.mean()
    return pd.DataFrame(columns | {"choice_all": everyone.loc["head"], "choice_all_dealt": everyone.loc["dealt"]})


def matched_overlap(first: Tensor, second: Tensor, draws: int, generator: torch.Generator) -> tuple[float, Tensor]:
    """How far two networks give the same labels to the same head, whatever the heads are called: owners (L,) of both ->
    (share of labels that agree under the best matching of heads, the same for randomly reassigned labels (draws,)).

    Labels that either network's nodes do not recognise (-1) are left out.
    """
    both = (first >= 0) & (second >= 0)
    first, second = first[both], second[both]
    count = int(torch.cat([first, second]).max()) + 1 if len(first) else 0

    def agreement(other: Tensor) -> float:
        table = torch.zeros(count, count).index_put_((first, other), torch.ones(len(first)), accumulate=True)
        rows, columns = linear_sum_assignment(-table.numpy())
        return float(table[rows, columns].sum() / max(1, len(first)))

    dealt = [agreement(second[torch.randperm(len(second), generator=generator)]) for _ in range(draws)]
    return agreement(second), torch.tensor(dealt)


def owners_of(owned: pd.DataFrame, num_labels: int) -> Tensor:
    """The head of each label's row (L,); -1 for labels without one."""
    owner = torch.full((num_labels,), -1)
    owner[torch.tensor(owned.label.to_numpy())] = torch.tensor(owned["head"].to_numpy())
    return owner


def map_difference(received: Tensor, y: Tensor, owner: Tensor) -> Tensor:
    """Half the summed difference between a head's mean map over images of its own labels and over the others, 0 for
    equal to 1 for disjoint maps: (n, H, T), labels (n,), owners (L,) -> (H,); nan for a head that owns none or all."""
    own = owner[y][:, None] == torch.arange(received.shape[1])  # (n, H)
    sums = torch.einsum("nh,nht->ht", own.to(received), received)
    count = own.sum(dim=0)[:, None]
    return (sums / count - (received.sum(dim=0) - sums) / (len(y) - count)).abs().sum(dim=1) / 2


def mean_by_label(values: Tensor, labels: Tensor, num_labels: int) -> Tensor:
    """Mean of each column over each label's images: (n, H), (n,) -> (L, H)."""
    return class_means(values[:, None, :], labels, num_labels)[:, 0]
