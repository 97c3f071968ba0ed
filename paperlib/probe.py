"""The measure for a network of one's own: any module, any batches -> how clean its nodes are, whether heads share the
labels out, and what can be pruned by shared labels, each with its nulls, and beforehand what that costs."""

import copy
import time
from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from paperlib import andc, foreign, heads, optimum, snp
from paperlib.data import folder, held_out
from paperlib.taps import Tap, counted, recording

PERMUTATIONS = 200  # of nodes among heads
HELD = 3.5  # times that activations are held at most: batch by batch, together, and as a readout's copies
GRADIENTS = 400  # as long as these take the readouts of one tap, all penalties together: typical, not a bound


def probe(
    network: nn.Module,
    taps: list[Tap],
    train: Iterable,
    test: Iterable,
    null: nn.Module | None = None,
    threshold: float = 0.3,
    share: float = 0.1,
) -> pd.DataFrame:
    """Measure the nodes of some taps: one row for each network and tap.

    train, test: batches of (inputs, labels), such as DataLoaders; inputs are what the network takes (a tensor, a tuple,
    a dictionary), labels whole numbers from 0. null: the same network with other weights, such as random ones.
    threshold: of Boolean matrices, 0..1. share: of each label's training examples; the last ones choose penalties.

    Columns: network, tap, accuracy (0..1, of the readout on test examples), snr and snr_rotated (of nodes, and of
    random directions that carry the same information), centred and centred_rotated (without the offset), labels
    (recognised per node), l2 (chosen penalty), and of taps with heads excess and excess_rotated: by how many nats they
    specialise more than permuted nodes (`heads.specialisation`). Raises ValueError, in one sentence, for what cannot be
    measured, or not in this machine's memory.
    """
    train, test, rows = _listed(train), _listed(test), []
    for name, one in (("network", network), *([("null", null)] if null is not None else [])):
        known, y = features(one, taps, train)
        unseen, y_test = features(one, taps, test)
        if missing := sorted(set(y_test.tolist()) - set(y.tolist())):
            raise ValueError(f"label {missing[0]} has test examples only: a readout needs some to learn from")
        for tap in taps:  # before any work
            snp.check_rotation(known[tap.name].shape[2], tap.groups)
        for tap in taps:
            best, weight = _readout(known[tap.name], y, share)
            right = (unseen[tap.name].flatten(1) @ best.weight.T).argmax(dim=1) == y_test
            row = {"network": name, "tap": tap.name, "accuracy": right.float().mean().item()}
            means = snp.class_means(unseen[tap.name], y_test, len(weight))
            row |= _nodes(weight, means, tap, threshold)
            rows.append(row | {"l2": best.l2})
    return pd.DataFrame(rows)


def _readout(own: Tensor, y: Tensor, share: float) -> tuple[optimum.Optimum, Tensor]:
    """The readout of activations (n, T, D) at its optimum, and its weights as (L, T, D)."""
    kept, held = held_out(y.cpu(), share)
    data = optimum.problem(own[kept], y[kept], int(y.max()) + 1)
    best = optimum.choose(data, own[held], y[held], log=lambda said: None).best
    return best, best.weight.unflatten(1, own.shape[1:])


def cost(network: nn.Module, taps: list[Tap], train: Iterable, test: Iterable) -> pd.DataFrame:
    """What measuring one network will take, from a pass of the first batch: one row a tap. Columns: tap, positions,
    nodes, gigabytes (of its activations, and of the readout's copies while it is solved), seconds (of its readouts,
    estimated from one gradient, and its share of the passes). Arguments and errors as of `probe`."""
    train, test = _listed(train), _listed(test)
    start = time.perf_counter()
    first, labels = features(network, taps, train[:1])
    passes = (time.perf_counter() - start) / len(labels)  # an example
    learnt, scored = (sum(len(batch[1]) for batch in batches) for batches in (train, test))
    number, rows = 1 + max(int(torch.as_tensor(batch[1]).max()) for batch in train), []
    for name, own in first.items():
        weight = own.new_zeros(own[0].numel(), number)
        start = time.perf_counter()
        own.flatten(1).T @ (own.flatten(1) @ weight)
        gradient = (time.perf_counter() - start) * learnt / len(labels)
        row = {"tap": name, "positions": own.shape[1], "nodes": own.shape[2]}
        row["gigabytes"] = (own[0].numel() * 4 * (2.5 * learnt + scored)) / 1e9
        rows.append(row | {"seconds": GRADIENTS * gradient + passes * (learnt + scored) / len(first)})
    return pd.DataFrame(rows)


def _check_memory(first: Mapping[str, Tensor], examples: int) -> None:
    """Raise ValueError if the activations of so many examples, of which the first ones are known, would not fit."""
    needed = HELD * 4 * examples * sum(part[0].numel() for part in first.values()) / 1e9
    there = folder.machine_memory() / 1e9
    if needed > there:
        raise ValueError(
            f"{len(first)} taps need {needed:.1f} GB of memory, and this machine has {there:.1f} GB: "
            "measure fewer at a time, pooled ones (pooled=True), or fewer examples"
        )


def node_fields(network: nn.Module, tap: Tap, train: Iterable, test: Iterable, share: float = 0.1) -> Tensor:
    """Field matrices of a tap's nodes on the test examples, of the readout at its optimum: (D, L, L). Arguments and
    errors as of `probe`."""
    known, y = features(network, [tap], train)
    unseen, y_test = features(network, [tap], test)
    _, weight = _readout(known[tap.name], y, share)
    return snp.field_matrices(weight, snp.class_means(unseen[tap.name], y_test, len(weight)))


def silence(
    network: nn.Module, tap: Tap, train: Iterable, test: Iterable, threshold: float = 0.3, share: float = 0.1
) -> pd.DataFrame:
    """What silencing each head costs the labels that it owns, and the others: one row a head.

    tap: one with heads; a head owns the labels that most of its nodes recognise, on the last share of each label's
    training examples; ties are drawn. Columns: head, labels (owned), lost_own and lost_other (accuracy of the network's
    own answers on test examples, -1..1; none without such labels). ValueError as in `probe`.
    """
    if tap.heads < 2:
        raise ValueError(f"tap {tap.name} has {tap.heads or 'no'} heads: take one with heads, such as `attn`")
    test, rows = _listed(test), []
    sets, _ = _recognised(network, [tap], train, threshold, share)
    counts = heads.counts_of(sets[tap.name], tap.heads)
    owner = heads.assign_labels(counts.cpu(), torch.Generator().manual_seed(0)).owner
    y_test = torch.cat([torch.as_tensor(labels) for _, labels in test])
    intact = _answers(network, test).cpu()
    for head in range(tap.heads):
        with foreign.silenced(network, tap, head):
            lost = intact.double() - _answers(network, test).cpu().double()
        mine = owner[y_test] == head
        part = {name: lost[of].mean().item() if of.any() else None for name, of in (("own", mine), ("other", ~mine))}
        rows.append(
            {"head": head, "labels": int((owner == head).sum())} | {f"lost_{key}": of for key, of in part.items()}
        )
    return pd.DataFrame(rows)


def _nodes(weight: Tensor, means: Tensor, tap: Tap, threshold: float) -> dict[str, float]:
    """SNR of native and of rotated nodes (mean over draws), raw and centred, and labels per native node."""
    drawn = snp.rotations(weight.shape[2], snp.ROTATIONS, torch.Generator().manual_seed(0), tap.groups)
    found: dict[bool, list[snp.TapStatistics]] = {False: [], True: []}
    for _, centred, fields in snp.native_and_rotated(weight, means, drawn):
        found[centred].append(snp.tap_statistics(snp.boolean_matrices(fields, threshold)))
    row = {}
    for centred, name in ((False, "snr"), (True, "centred")):
        native, *others = (one.snr for one in found[centred])
        row |= {name: native, f"{name}_rotated": sum(others) / len(others)}
    row["labels"] = found[False][0].labels_per_node
    for name, turn in (("excess", None), ("excess_rotated", drawn[0])) if tap.heads > 1 else ():
        parts = (part if turn is None else snp.rotated(part, turn) for part in (weight, means))
        diagonal = snp.diagonal_labels(snp.boolean_matrices(snp.field_matrices(*parts), threshold))
        null = heads.permutation_null(diagonal, tap.heads, PERMUTATIONS, torch.Generator().manual_seed(0))
        row[name] = (heads.specialisation(heads.counts_of(diagonal, tap.heads)) - null.mean()).item()
    return row


def prune(
    network: nn.Module,
    connections: Mapping[str, tuple[Tap, Tap]],
    train: Iterable,
    test: Iterable,
    threshold: float = 0.3,
    share: float = 0.1,
    seed: int = 0,
) -> pd.DataFrame:
    """Prune layers by the labels that their nodes share (ANDC), and by as many connections of each control.

    connections: path of a linear layer or convolution -> the taps of the nodes that it leads from and to. train, test,
    threshold, share: as in `probe`; the last share of each label's training examples decides masks. Columns: method
    (andc, random, permuted, magnitude, activation), dilution (0..1), accuracy of the network's own answers, loss and
    loss_se (against the unpruned network, on the same examples), all right after pruning. ValueError as in `probe`.
    """
    test = _listed(test)
    places = {tap.name: tap for pair in connections.values() for tap in pair}
    sets, sizes = _recognised(network, list(places.values()), train, threshold, share)
    pairs = {layer: (into.name, out.name) for layer, (into, out) in connections.items()}
    generator, intact, rows = torch.Generator().manual_seed(seed), _answers(network, test), []
    norms = {layer: sizes[into] for layer, (into, _) in pairs.items()}
    for method, chosen in andc.masks_of_every_method(network, sets, pairs, norms, generator).items():
        right = _answers(andc.apply_masks(copy.deepcopy(network), chosen), test)
        rows.append({"method": method, "dilution": andc.dilution(chosen)} | andc.accuracy_loss("", intact, right))
    return pd.DataFrame(rows)


def _recognised(
    network: nn.Module, taps: list[Tap], train: Iterable, threshold: float, share: float
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The labels that nodes recognise (D, L) bool, and their size (D,), on the last share of each label's examples: tap
    name -> each."""
    known, y = features(network, taps, train)
    kept, held = held_out(y.cpu(), share)
    sets, sizes = {}, {}
    for name, own in known.items():
        fields = andc.unseen_fields(own[kept], y[kept], own[held], y[held], int(y.max()) + 1, lambda said: None)
        sets[name] = snp.diagonal_labels(snp.boolean_matrices(fields, threshold))
        sizes[name] = own[held].square().mean(dim=(0, 1)).sqrt()
    return sets, sizes


def _listed(batches: Iterable) -> list:
    batches = list(batches)
    for batch in batches:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise ValueError(f"a batch must be a pair (inputs, labels), not {type(batch).__name__}")
    if not batches:
        raise ValueError("there are no batches to measure")
    return batches


@torch.no_grad()
def _answers(network: nn.Module, batches: Iterable) -> Tensor:
    """Which examples the network answers correctly: (n,) bool."""
    device, right = next(network.parameters()).device, []
    network.eval()
    for inputs, labels in batches:
        answer = _call(network, inputs, device)
        answer = getattr(answer, "logits", answer)
        if not isinstance(answer, Tensor) or answer.ndim != 2:
            raise ValueError("a network that is pruned must answer with one number a label, (n, L), or have logits")
        right.append(answer.argmax(dim=1) == torch.as_tensor(labels).to(device))
    return torch.cat(right)


@torch.no_grad()
def features(network: nn.Module, taps: list[Tap], batches: Iterable) -> tuple[dict[str, Tensor], Tensor]:
    """Activations of all examples, fp32, in evaluation mode, tap name -> (n, T, D), and their labels (n,).

    Where inputs are a dictionary with an attention_mask (n, T), as Hugging Face's, activations behind it are 0, so that
    padding says nothing. ValueError, after the first batch, for activations that this machine cannot hold."""
    device = next((weight.device for weight in network.parameters()), torch.device("cpu"))
    found: dict[str, list[Tensor]] = {tap.name: [] for tap in taps}
    batches, labels = _listed(batches), []
    network.eval()
    with recording(network, taps) as recorded:
        for inputs, own in batches:
            _call(network, inputs, device)
            if not labels:
                _check_memory(recorded, sum(len(batch[1]) for batch in batches))
            mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
            for name, parts in found.items():
                parts.append(counted(recorded[name].float(), mask).clone())
            labels.append(torch.as_tensor(own).to(device))
    for name, parts in found.items():
        if len(shapes := {tuple(part.shape[1:]) for part in parts}) > 1:
            raise ValueError(f"tap {name}: batches have {sorted(shapes)} positions and nodes: pad all to one length")
    return {name: torch.cat(parts) for name, parts in found.items()}, torch.cat(labels).long()


def _call(network: nn.Module, inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Mapping):
        return network(**{name: value.to(device) for name, value in inputs.items()})
    if isinstance(inputs, tuple | list):
        return network(*(value.to(device) for value in inputs))
    return network(inputs.to(device))
