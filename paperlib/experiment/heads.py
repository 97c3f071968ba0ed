"""Stages of a walk that look at how attention heads divide the labels among themselves."""

import itertools
import math
from dataclasses import asdict, replace
from pathlib import Path

import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from paperlib import figures, heads, macroscopic, snp, taps, training
from paperlib.data import BATCH, Images, limit, normalise
from paperlib.data.superclasses import superclasses
from paperlib.experiment.networks import NETWORKS, learning_curves, load_network, right_answers
from paperlib.experiment.nodes import matrices, readout
from paperlib.experiment.store import Run, Stage
from paperlib.files import save_table
from paperlib.statistics import interval

HEAD_COLUMNS = [
    "specialisation", "excess", "z", "unrecognised", "tied", "median_margin", "own_drop", "other_drop", "gap",
    "gap_null_high", "gap_same_images", "first_mean_gap",
]  # fmt: skip


def head_division(run: Run) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Stage for every network: (label x head counts, specialisation and ablation per encoder, their means over them).

    First table: seed, network, encoder, label, head, count, owner (bool), alone_accuracy (of the head alone on that
    label, 0..1); trained network only: ablation_drop (of the network's own accuracy on that label), owner_unseen (owner
    by held-out training images, so that what the test images score is not chosen on them). Second: seed, network,
    encoder, specialisation, null_mean, null_low, null_high (95 % of the null), excess (nats), z, unrecognised, tied
    (labels), median_margin (nodes), own_drop, other_drop, gap (own - other, owners by held-out images; see
    `heads.own_label_drops`), gap_same_images (owners by the test images), first_mean_gap (first seed only: with the
    head's nodes at their training mean instead of 0), gap_null_high (97.5 % of gaps with randomly reassigned owners).
    Third: seed, network, excess, gap with their 95 % intervals (excess_low, ...): over the null, and over test images;
    gap_null_high of the mean over encoders.
    """
    both = [_heads(run, seed, kind) for seed in run.settings.seeds for kind in NETWORKS]
    tables = ("labels", "encoders", "overall")
    return tuple(pd.concat([one.table(name) for one in both], ignore_index=True) for name in tables)


def head_counts(run: Run, encoder: int) -> pd.DataFrame:
    """Nodes of each head that recognise each label, first seed, and the same nodes randomly reassigned to heads once:
    nodes (of heads, reassigned), head, label, count."""
    seed = run.settings.seeds[0]
    network, _ = load_network(run, seed, "trained")
    booleans = matrices(run, seed, "trained").arrays("matrices")[f"{encoder}.attn"]
    order = torch.randperm(len(booleans), generator=training.generator(seed, "dealt nodes", encoder))
    parts = []
    for nodes, dealt in (("of heads", booleans), ("reassigned", booleans[order])):
        counts = heads.cooperation_counts(dealt, network.classifier.blocks[0].self_attn.heads)
        part = pd.DataFrame(counts.numpy()).rename_axis("head").reset_index()
        parts.append(part.melt("head", var_name="label", value_name="count").assign(nodes=nodes))
    return pd.concat(parts, ignore_index=True)[["nodes", "head", "label", "count"]]


def head_matrices(run: Run, encoders: tuple[int, ...]) -> pd.DataFrame:
    """For how many of a head's nodes an image of one label makes another one answer, first seed, labels in the order of
    `heads.labels_by_owner`: a row for each encoder, head and input label (owned: by this head), a column 0, 1, ... for
    each output label."""
    seed = run.settings.seeds[0]
    network, _ = load_network(run, seed, "trained")
    num_heads = network.classifier.blocks[0].self_attn.heads
    found, parts = matrices(run, seed, "trained").arrays("matrices"), []
    for encoder in encoders:
        booleans = found[f"{encoder}.attn"]
        counts = heads.cooperation_counts(booleans, num_heads)
        owner, order = heads.assign_labels(counts).owner, heads.labels_by_owner(counts)
        summed = booleans.unflatten(0, (num_heads, -1)).sum(dim=1)[:, order][:, :, order]
        for head, matrix in enumerate(summed):
            label = {"network": "trained", "encoder": encoder, "head": head}
            label["owned"] = (owner[order] == head).numpy()
            parts.append(pd.concat([pd.DataFrame(label), pd.DataFrame(matrix.numpy())], axis=1))
    return pd.concat(parts, ignore_index=True)


def head_clusters(run: Run) -> pd.DataFrame:
    """Heads as if each were one node: labels, clusters and noise of the matrix of a head with all others silenced, one
    row per network, encoder and head; first seed, as heads have no order to average over."""
    both = [_heads(run, run.settings.seeds[0], kind).table("heads") for kind in NETWORKS]
    return pd.concat(both).drop(columns="seed").set_index(["network", "encoder", "head"])


def summary_of_heads(encoders: pd.DataFrame) -> pd.DataFrame:
    """Mean over seeds, one row per network and encoder."""
    return encoders.groupby(["network", "encoder"])[HEAD_COLUMNS].mean().round(4)


def _heads(run: Run, seed: int, kind: str) -> Stage:
    right, source, first = readout(run, seed, kind), matrices(run, seed, kind), seed == run.settings.seeds[0]
    network, inputs = load_network(run, seed, kind)
    inputs |= {"answers": right.sha256, "matrices": source.sha256}

    def make(folder: Path) -> None:
        s, labels = run.settings, run.images.y_test
        num_heads = network.classifier.blocks[0].self_attn.heads
        found, correct, fields = source.arrays("matrices"), right.arrays("correct"), right.tensors("fields_test")
        intact = ablated = averaged = held = None
        if kind == "trained":
            held = right.tensors("fields_held_out")
            images = run.images.to(training.best_device())
            intact, ablated = right_answers(network, images).cpu(), _ablations(network, images).cpu()
            if first:
                averaged = _ablations(network, images, _means(network, images)).cpu()
        label_rows, head_rows, encoder_rows, nulls, gaps, dealt = [], [], [], [], [], []
        for encoder in range(1, len(network.classifier.blocks) + 1):
            tap = f"{encoder}.attn"
            booleans = found[tap]
            counts = heads.cooperation_counts(booleans, num_heads)
            owned = heads.assign_labels(counts)
            generator = training.generator(seed, "head permutations", encoder)
            null = heads.permutation_null(snp.diagonal_labels(booleans), num_heads, s.permutations, generator)
            nulls.append(null)
            low, high = interval(null)
            value = heads.specialisation(counts).item()
            row = {"seed": seed, "network": kind, "encoder": encoder}
            mean, spread = null.mean().item(), max(null.std().item(), 1e-12)
            summary = {"specialisation": value, "null_mean": mean, "null_low": low, "null_high": high}
            summary |= {"excess": value - mean, "z": (value - mean) / spread}
            summary |= {"unrecognised": int((owned.owner < 0).sum()), "tied": int(owned.tied.sum())}
            summary["median_margin"] = owned.margin.float().median().item()
            alone = heads.mean_by_label(correct[f"heads/{tap}"].float(), labels, len(counts[0]))
            drop = owner = None
            if ablated is not None:
                unseen = snp.boolean_matrices(held[tap], s.threshold)
                owner = heads.assign_labels(heads.cooperation_counts(unseen, num_heads)).owner
                summary["gap_same_images"] = _gap(intact, ablated[encoder - 1], labels, owned.owner)
                drop, own = heads.ablation_drops(intact, ablated[encoder - 1], labels, owner)
                # The same test images are drawn for every encoder, so that draws can be averaged over encoders.
                mine, other, draws = heads.own_label_drops(drop, own, training.generator(seed, "ablation bootstrap"))
                summary |= {"own_drop": mine, "other_drop": other, "gap": mine - other}
                gaps.append(draws)
                generator = training.generator(seed, "dealt owners", encoder)
                dealt.append(heads.dealt_gaps(drop, labels, owner, s.permutations, generator))
                summary["gap_null_high"] = interval(dealt[-1])[1]
                summary["first_mean_gap"] = math.nan
                if averaged is not None:
                    summary["first_mean_gap"] = _gap(intact, averaged[encoder - 1], labels, owner)
                drop = heads.mean_by_label(drop.float().T, labels, len(counts[0]))
            for head in range(num_heads):
                columns = {"label": range(len(counts[0])), "head": head, "count": counts[head].tolist()}
                columns |= {"owner": (owned.owner == head).tolist(), "alone_accuracy": alone[:, head].tolist()}
                columns["ablation_drop"] = None if drop is None else drop[:, head].tolist()
                columns["owner_unseen"] = None if owner is None else (owner == head).tolist()
                label_rows.append(pd.DataFrame({**row, **columns}))
            encoder_rows.append(row | summary)
            whole = snp.boolean_matrices(heads.head_matrices(fields[tap], num_heads), s.threshold)
            columns = {name: values.tolist() for name, values in asdict(snp.node_statistics(whole)).items()}
            head_rows.append(pd.DataFrame({**row, "head": range(num_heads), **columns}))
        save_table(folder / "labels.csv", pd.concat(label_rows))
        save_table(folder / "heads.csv", pd.concat(head_rows))
        save_table(folder / "encoders.csv", encoder_rows)
        mean = pd.DataFrame(encoder_rows).mean(numeric_only=True)
        low, high = interval(torch.stack(nulls).mean(dim=0))
        overall = {"seed": seed, "network": kind, "excess": mean.excess}
        overall |= {"excess_low": mean.specialisation - high, "excess_high": mean.specialisation - low}
        if gaps:
            low, high = interval(torch.stack(gaps).mean(dim=0))
            overall |= {"gap": mean.gap, "gap_low": low, "gap_high": high}
            overall["gap_null_high"] = interval(torch.stack(dealt).mean(dim=0))[1]
        save_table(folder / "overall.csv", [overall])

    config = run.config("threshold", "permutations") | {"seed": seed, "first": first}
    return run.stage(f"heads-{kind}-seed{seed}", config, inputs, make)


def _gap(intact: Tensor, ablated: Tensor, labels: Tensor, owner: Tensor) -> float:
    """Accuracy lost on own labels less that on others, without its interval (see `heads.own_label_drops`)."""
    drop, own = heads.ablation_drops(intact, ablated, labels, owner)
    mine, other, _ = heads.own_label_drops(drop, own, training.generator(0), draws=1)
    return mine - other


def _ablations(network: nn.Module, images: Images, means: list[Tensor] | None = None) -> Tensor:
    """Right answers on the test images with each head silent, or at its mean: (encoders, H, n)."""
    batches = (normalise(batch, *images.statistics) for batch in images.x_test.split(BATCH))
    answers = [heads.ablation_logits(network, batch, means).argmax(dim=3) for batch in batches]
    return torch.cat(answers, dim=2) == images.y_test


def _means(network: nn.Module, images: Images) -> list[Tensor]:
    """Mean of every encoder's concatenated heads (T, D) over the first 2,048 training images, if there are so many."""
    places, sample = taps.cct_taps(network, ["attn"]), images.x_train[:2048]
    batches = taps.activations(network, places, sample, *images.statistics)
    sums = [[batch[place.name].sum(dim=0) for place in places] for batch in batches]
    return [sum(parts) / len(sample) for parts in zip(*sums, strict=True)]


def cooperation(run: Run) -> pd.DataFrame:
    """Stage for every seed: how well sets of a head's nodes recognise the labels that the head owns, and the same when
    the encoder's nodes are dealt to as many heads at random, which then own labels by the same count. Owners are
    counted on held-out training images, answers on the test images.

    seed, encoder, nodes (`head` or `dealt`), draw, size (nodes of a set), whole (bool: all nodes of a head; with more,
    all of the encoder, asked about the same labels: some heads' labels are harder than others'), and as means over the
    labels that have an owner: own (share of a label's images that nodes of its owner answer correctly), others
    (that nodes of another head do), singles (what `own` would be if single nodes added up: 1/L + the sum of what each
    has above 1/L), choice (share of the owner's other labels that get a smaller field than the image's own: 0.5 by
    chance, and blind to a shift of all answers towards a head's labels).
    """
    return pd.concat([_cooperation(run, seed).table("cooperation") for seed in run.settings.seeds], ignore_index=True)


def _cooperation(run: Run, seed: int) -> Stage:
    source = readout(run, seed, "trained")
    network, inputs = load_network(run, seed, "trained")

    def make(folder: Path) -> None:
        images = run.images.to(training.best_device())
        x, y, L = images.x_test, images.y_test, len(images.classes)
        read, held = (source.tensors(name) for name in ("weights", "fields_held_out"))
        places = taps.cct_taps(network, ["attn"])
        weights, sets, own = {place.name: read[place.name].to(x.device) for place in places}, {}, {}
        for place in places:
            recognised = snp.diagonal_labels(snp.boolean_matrices(held[place.name], run.settings.threshold))
            order = heads.groupings(len(recognised), place.heads, training.generator(seed, "cooperation", place.name))
            owner = torch.stack([heads.assign_labels(group.sum(dim=1)).owner for group in recognised[order]])
            own[place.name] = (owner[:, None] == torch.arange(place.heads)[:, None]).to(x.device)  # (G, H, L)
            sets[place.name] = heads.growing_sets(order).to(x.device)  # (G, H, sizes, D)
        right, choice, alone = (dict.fromkeys(weights, 0) for _ in range(3))
        for batch, labels in macroscopic.labelled_batches(network, places, x, y, images):
            for name, weight in weights.items():
                fields, mine = macroscopic.node_fields(batch[name], weight), own[name][:, :, None]
                answers = (sets[name].flatten(0, 2).to(fields) @ fields.flatten(1)).unflatten(1, fields.shape[1:])
                right[name] += heads.right_answers_per_label(answers, labels)
                choice[name] += heads.choices_per_label(
                    answers, labels, mine.expand(*sets[name].shape[:3], L).flatten(0, 2)
                )
                alone[name] += heads.right_answers_per_label(fields, labels)
        counts, parts = y.bincount(minlength=L), []
        for place in places:
            measured = ((part[place.name] / counts).cpu() for part in (right, choice, alone))
            part = heads.cooperation_table(sets[place.name].cpu(), own[place.name].cpu(), *measured)
            whole = part["size"] == sets[place.name].shape[3] // place.heads
            parts.append(part.assign(seed=seed, encoder=place.encoder, whole=whole))
        save_table(folder / "cooperation.csv", pd.concat(parts))

    config = run.config("threshold") | {"seed": seed, "groupings": [heads.OWN_ORDERS, heads.DEALINGS]}
    return run.stage(f"cooperation-seed{seed}", config, inputs | {"readouts": source.sha256}, make)


def stability(run: Run, labels: pd.DataFrame) -> pd.DataFrame:
    """Is the division of labels the same for every seed? One row per encoder and pair of seeds: share of labels that
    the best matching of heads gives to the same head, and mean and 97.5 % quantile by chance; none for one seed."""
    rows, seeds = [], run.settings.seeds
    owned = labels[labels.owner & (labels.network == "trained")]
    for encoder, part in owned.groupby("encoder"):
        owners = part.pivot(index="seed", columns="label", values="head").reindex(
            columns=range(len(run.images.classes))
        )
        for first, second in itertools.combinations(seeds, 2):
            a, b = (torch.tensor(owners.loc[seed].fillna(-1).to_numpy()).long() for seed in (first, second))
            generator = training.generator(first, "matched heads", second, encoder)
            overlap, dealt = heads.matched_overlap(a, b, run.settings.permutations, generator)
            row = {"encoder": encoder, "seeds": f"{first}-{second}", "overlap": overlap}
            rows.append(row | {"chance": dealt.mean().item(), "chance_high": interval(dealt)[1]})
    return pd.DataFrame(rows, columns=["encoder", "seeds", "overlap", "chance", "chance_high"])


def owners_of_superclasses(run: Run, labels: pd.DataFrame) -> pd.DataFrame:
    """Which labels go to one head? Share of the pairs of labels of one superclass that have the same owner, with its
    mean and 97.5 % quantile over reassigned labels; one row per seed and encoder, none without superclasses."""
    groups, rows = superclasses(run.images.classes), []
    owned = labels[labels.owner & (labels.network == "trained")]
    for (seed, encoder), part in owned.groupby(["seed", "encoder"]) if groups is not None else ():
        owner = heads.owners_of(part, len(groups))
        same = (groups[:, None] == groups).triu(1)
        generator = training.generator(seed, "dealt superclasses", encoder)
        order = [torch.randperm(len(groups), generator=generator) for _ in range(run.settings.permutations)]
        found, *dealt = (
            ((dealing[:, None] == dealing) & (dealing >= 0))[same].float().mean().item()
            for dealing in (owner, *(owner[permutation] for permutation in order))
        )
        row = {"seed": seed, "encoder": encoder, "same_owner": found, "dealt": sum(dealt) / len(dealt)}
        rows.append(row | {"dealt_high": interval(dealt)[1]})
    return pd.DataFrame(rows, columns=["seed", "encoder", "same_owner", "dealt", "dealt_high"])


def attention_maps(run: Run, labels: pd.DataFrame) -> tuple[Figure, pd.DataFrame, pd.DataFrame]:
    """What each head of the first and last encoder attends to: attention received by each token, averaged over 1,000
    test images (2 a label, if more) of the head's own labels and over the others; first seed. A figure, the numbers
    behind it, and how far the two maps of a head differ (see `heads.map_difference`), beside what the other heads' maps
    differ on the same images (own labels may look alike to every head), and mean and 97.5 % quantile over owners
    dealt at random."""
    seed = run.settings.seeds[0]
    network, _ = load_network(run, seed, "trained")
    images = limit(run.images, max(1000, 2 * len(run.images.classes))).to(training.best_device())
    trained = labels[(labels.network == "trained") & (labels.seed == seed)]
    own = trained[trained.owner_unseen.astype(bool)]
    rows, differences = [], []
    for encoder in sorted({1, len(network.classifier.blocks)}):
        owner = heads.owners_of(own[own.encoder == encoder], len(images.classes))
        batches = (normalise(batch, *images.statistics) for batch in images.x_test.split(BATCH))
        received = torch.cat([heads.attention_received(network, batch, encoder) for batch in batches]).cpu()
        for head in range(received.shape[1]):
            mine = owner[images.y_test.cpu()] == head
            for which, chosen in (("own", mine), ("other", ~mine)):
                for token, value in enumerate(received[chosen, head].mean(dim=0).tolist() if chosen.any() else []):
                    rows.append({"encoder": encoder, "head": head, "labels": which, "token": token, "attention": value})
        y, generator = images.y_test.cpu(), training.generator(seed, "dealt attention", encoder)
        found, count = heads.map_difference(received, y, owner), received.shape[1]
        others = [heads.map_difference(received.roll(step, dims=1), y, owner) for step in range(1, count)]
        others = torch.stack(others).mean(dim=0) if others else torch.full((count,), torch.nan)
        order = [torch.randperm(len(owner), generator=generator) for _ in range(run.settings.permutations)]
        dealt = torch.stack([heads.map_difference(received, y, owner[part]) for part in order])
        for head, value in enumerate(found.tolist()):
            row = {"encoder": encoder, "head": head, "labels": int((owner == head).sum()), "difference": value}
            row["other_heads"] = others[head].item()
            differences.append(row | {"dealt": dealt[:, head].mean().item(), "dealt_high": interval(dealt[:, head])[1]})
    table, differences = pd.DataFrame(rows), pd.DataFrame(differences).set_index(["encoder", "head"])
    return figures.attention_maps(table, run.images.name, f"seed {seed}"), table, differences.round(4)


def more_heads(run: Run) -> pd.DataFrame:
    """The same small walk with other numbers of heads (`many_heads`), mean over encoders: heads, seed, network, excess,
    gap, test_accuracy."""
    rows = []
    few = {"weights": "trained", "taps": ["attn", "block"], "taps_once": [], "prune_attention": False}
    for count in run.settings.many_heads:
        other = replace(run, settings=run.settings.model_copy(update={"heads": count} | few), prefix=f"{count}-heads-")
        _, _, overall = head_division(other)
        accuracies = learning_curves(other).groupby("seed").test_accuracy.last()
        rows.append(overall.assign(heads=count, test_accuracy=overall.seed.map(accuracies)))
    return pd.concat(rows) if rows else pd.DataFrame()
