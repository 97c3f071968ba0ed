"""Every number that docs/findings.md states is the one that the committed tables give."""

import re

import pandas as pd
import parameters
import pytest
import stages

from paperlib import runs

TRAINED, RANDOM = "trained", "random"


@pytest.fixture(scope="module")
def run():
    return parameters.open_committed("cifar100-cpu")


@pytest.fixture(scope="module")
def summary(run):
    return runs.read_json(run.figures / "summary.json")["results"]


@pytest.fixture(scope="module")
def curves(run):
    """(tap, network) -> encoder -> statistics, means over seeds at the main threshold; `conv` is the CNN's tap."""
    both, _, _ = stages.both_halves(run)
    table = pd.concat([stages.snr(run)[0], both[both.half == "cnn"]])
    table, keys = table[table.threshold == run.settings.threshold], ["tap", "network", "encoder"]
    means = table[~table.centred].groupby(keys)[stages.TAP_COLUMNS].mean()  # not rounded yet
    means["snr_centred"] = table[table.centred].groupby(keys).snr.mean()
    return {key: part.droplevel(["tap", "network"]) for key, part in means.groupby(["tap", "network"])}


def states(claim: str, text: str, *values: float) -> None:
    """Ask that a section of the page says `text` with these values in its fields; lines may break anywhere."""
    page = (runs.root() / "docs" / "findings.md").read_text(encoding="utf-8")
    sections = [" ".join(part.split()) for part in re.split(r"^##? ", page, flags=re.MULTILINE)]
    section = next(part for part in sections if part.startswith(claim))
    assert text.format(*values) in section, text.format(*values)


def ends(values: pd.Series) -> tuple[float, float]:
    """First and last along the encoders."""
    return values.iloc[0], values.iloc[-1]


def last(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.encoder == table.encoder.max()]


def test_networks(run):
    for half, text in ((run, "CCTs answer {:.1f} to {:.1f} % of"), (stages.cnn_half(run), "VGGs {:.0f} to {:.0f} %:")):
        accuracy = 100 * stages.learning_curves(half).groupby("seed").test_accuracy.last()
        states("What we found", text, accuracy.min(), accuracy.max())


def test_one_mechanism(curves):
    cct, cnn = curves["block", TRAINED], curves["conv", TRAINED]
    states("C1", "CCT's SNR grows from {:.2f} to {:.2f}", *ends(cct.snr))
    states("C1", "the CNN's from {:.2f} to {:.2f}", *ends(cnn.snr))
    flat = [*curves["block", RANDOM].snr, *curves["conv", RANDOM].snr]
    states("C1", "stay between {:.1f} and {:.1f} with random weights", min(flat), max(flat))
    states("C1", "{:.0f} % of the first encoder's fields and {:.0f} % of the last", *ends(100 * cct.offset_share))
    states("C1", "in the CNN {:.0f} % and {:.0f} %", *ends(100 * cnn.offset_share))
    states("C1", "still grows ({:.2f} to {:.2f})", *ends(cct.snr_centred))
    states("C1", "the CNN's falls ({:.2f} to {:.2f})", *ends(cnn.snr_centred))
    states("C1", "below its random network ({:.2f})", curves["conv", RANDOM].snr_centred.iloc[-1])
    states("C1", "fifth layer of eight ({:.1f} %)", 100 * cnn.accuracy[5])
    assert cnn.accuracy.idxmax() == 5 and len(cnn) == 8


def test_small_clusters(summary, curves):
    node = curves["block", TRAINED].iloc[-1]
    sizes = node.labels_per_node, node.clusters_per_node, node.pooled_cluster_size
    states("C2", "recognises {:.1f} of the 100 labels, in {:.1f} clusters of {:.1f} labels", *sizes)
    states("C2", "random network's have {:.1f} labels", curves["block", RANDOM].pooled_cluster_size.iloc[-1])
    shuffled = pd.concat([curve.snr for (_, network), curve in curves.items() if network == "shuffled"])
    states("C2", "is 1 within {:.0f} %", 100 * (shuffled - 1).abs().max())
    pairs = summary["02_snr_per_encoder"]["clustered pairs"]
    names = "share of pairs in one superclass", "permuted names, 2.5 %", "permuted names, 97.5 %"
    states("C2", "in {:.1f} % of cases, against {:.1f} to {:.1f} %", *(100 * pairs[name] for name in names))
    states("C2", "({:.2f} against {:.2f})", *(curves["attn", network].snr[1] for network in (TRAINED, RANDOM)))


def test_sharpening(run, curves):
    block, random = curves["block", TRAINED], curves["block", RANDOM]
    states("C3", "grows from {:.0f} to {:.0f} %", *ends(100 * block.accuracy))
    states("C3", "SNR from {:.2f} to {:.2f}", *ends(block.snr))
    states("C3", "both are flat ({:.0f} %, {:.2f})", 100 * random.accuracy.mean(), random.snr.mean())
    states("C3", "in the last encoder ({:.2f} to {:.2f})", *block.snr.iloc[-2:])
    after = stages.after_the_last_encoder(stages.snr(run)[0], run.settings.threshold).loc[TRAINED].droplevel("encoder")
    read = after.snr[["weighed", "seqpool", "pooled"]]
    states("C3", "{:.2f} for the tokens as SeqPool weighs them and {:.2f} for their sum", *read[:2])
    states("C3", "where the plain mean over tokens has {:.2f}", read["pooled"])
    table = stages.penalties(run).query("network == 'trained' and tap == 'block' and encoder == 1")
    longer, shorter = table[table.l2 == "0.001"].sort_values("epochs", ascending=False).itertuples()
    states("C3", "raise its accuracy by {:.1f} points", 100 * (longer.accuracy - shorter.accuracy))
    states("C3", "lower its SNR by {:.2f}", shorter.snr - longer.snr)


def test_pruned_filters(run, summary):
    table = pd.read_csv(run.figures / "cnn_accuracy_against_dilution.csv")
    means = table.groupby(["threshold", "method"])[["dilution", "accuracy", "retrained_loss"]].mean().unstack("method")
    (_, first), (_, second) = list(means.iterrows())[:2]
    states("C4", "At a dilution of {:.2f} and after one epoch of retraining", second.dilution.andc)
    lost = 100 * second.retrained_loss
    states("C4", "ANDC costs {:.1f} points, random masks cost {:.1f}", lost.andc, lost.random)
    states("C4", "permuted label sets {:.1f}, and the smallest weights {:.1f}", lost.permuted, lost.magnitude)
    states(
        "C4", "ANDC leaves {:.0f} % of accuracy at a dilution of {:.2f}", 100 * first.accuracy.andc, first.dilution.andc
    )
    states("C4", "random masks {:.0f} %", 100 * first.accuracy.random)
    signs = pd.DataFrame(summary["05_cnn_counterpart"]["pruned kernels"]).set_index("threshold").loc[second.name]
    states("C4", "at that dilution {:.0f} % have weights that sum to less", 100 * signs["negative removed"])
    states("C4", "of those that are kept {:.0f} %", 100 * signs["negative kept"])
    assert signs["size removed"] == pytest.approx(signs["size kept"], rel=0.05)  # "at equal size"


def test_experts(run, summary):
    labels, encoders, _ = stages.head_division(run)
    along = encoders[encoders.network == TRAINED].drop(columns="network").groupby("encoder").mean()
    states("C5", "({:.2f} nats, {:.0f} deviations above chance)", along.excess.iloc[-1], along.z.iloc[-1])
    states("C5", "costs its own labels {:.1f} points more", 100 * along.gap.iloc[-1])
    states("C5", "lose more, by {:.1f} points", 100 * along.first_mean_gap.iloc[-1])
    assert (along.gap < along.gap_null_high).tolist() == [True] * 3 + [False] * 4  # "in the first three"
    heads = last(labels[labels.network == TRAINED])
    owner = heads.owner_unseen.astype(bool)
    own, others = (heads[rows].groupby(["seed", "label"]).alone_accuracy.max() for rows in (owner, ~owner))
    states("C5", "in {:.0f} % of cases (chance: {:.0f} %)", 100 * (own > others).mean(), 100 / heads["head"].nunique())
    results = summary["04_head_modus_vivendi"]
    maps, alike = (last(pd.DataFrame(results[name])) for name in ("attention", "stability"))
    states("C5", "differ by {:.2f} to {:.2f}", maps.difference.min(), maps.difference.max())
    states("C5", "dealt labels give up to {:.2f}", maps.dealt_high.max())
    states("C5", "give the same head {:.2f} to {:.2f} of the labels", alike.overlap.min(), alike.overlap.max())
    states("C5", "dealt labels give {:.2f} and rarely more than {:.2f}", alike.chance.mean(), alike.chance_high.max())
    together = last(stages.cooperation(run)).query("size == 64").groupby("nodes").accuracy.mean()
    states("C5", "answer {:.0f} % of the images rightly", 100 * together["head"])
    states("C5", "across the heads {:.0f} %", 100 * together["across"])


def test_accuracy_from_nodes(run):
    table = last(stages.macroscopic_accuracies(run))
    whole = table[table["size"] == table["size"].max()]
    states("C6", "All {} nodes of the last encoder are predicted", whole["size"].iloc[0])
    states("C6", "({:.0f} %) and answer {:.0f} %", 100 * whole.predicted.mean(), 100 * whole.measured.mean())
