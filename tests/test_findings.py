"""Every number that docs/findings.md states is the one that the committed tables give."""

import functools
import math
import re

import numpy as np
import pandas as pd
import parameters
import pytest
import stages
import torch
import verdicts

from paperlib import andc, heads, runs, snp

TRAINED, RANDOM = "trained", "random"


@pytest.fixture(scope="module", autouse=True)
def committed_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PAPERLIB_FIGURES", raising=False)
        yield


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


def states(claim: str, text: str, *values: float, page: str = "docs/findings.md") -> None:
    """Ask that a section of the page says `text` with these values in its fields; lines may break anywhere."""
    page = (runs.root() / page).read_text(encoding="utf-8")
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


def test_one_mechanism(run, curves):
    cct, cnn = curves["block", TRAINED], curves["conv", TRAINED]
    states("C1", "CCT's SNR grows from {:.2f} to {:.2f}", *ends(cct.snr))
    states("C1", "the CNN's from {:.2f} to {:.2f}", *ends(cnn.snr))
    flat = [*curves["block", RANDOM].snr, *curves["conv", RANDOM].snr]
    states("C1", "stay between {:.1f} and {:.1f} with random weights", min(flat), max(flat))
    states("C1", "from {:.0f} % to {:.0f} % of the squared fields in the CCT", *ends(100 * cct.offset_share))
    states("C1", "from {:.0f} % to {:.0f} % in the CNN", *ends(100 * cnn.offset_share))
    shuffled = curves["conv", "shuffled"].offset_share, curves["block", "shuffled"].offset_share
    states("C1", "same fall in the CNN ({:.0f} % to {:.0f} %)", *ends(100 * shuffled[0]))
    states("C1", "half of it in the CCT ({:.0f} % to {:.0f} %; first seed)", *ends(100 * shuffled[1]))
    falls = [offset.iloc[0] - offset.iloc[-1] for offset in (shuffled[1], cct.offset_share)]
    assert 0.4 < falls[0] / falls[1] < 0.5  # "nearly half"
    states("C1", "without the offset falls ({:.2f} to {:.2f}", *ends(cnn.snr_centred))
    states("C1", "random weights {:.2f})", curves["conv", RANDOM].snr_centred.iloc[-1])
    tried = stages.penalties(stages.cnn_half(run)).query("epochs == 8")
    at = tried[tried.l2 == "0.01"].groupby("network").snr_centred.agg(["first", "last"])
    states("C1", "it rises ({:.2f} to {:.2f}; random {:.2f}; first", *at.loc[TRAINED], at["last"][RANDOM])
    trained = tried[tried.network == TRAINED].set_index(["l2", "encoder"])
    falls = trained.snr_centred.groupby("l2").agg(lambda curve: curve.iloc[-1] < curve.iloc[0])
    assert falls.index[~falls].tolist() == ["0.01"] and len(falls) == 4  # "with two others", "with 0.01 alone"
    worse = trained.accuracy["0.001", 1] - trained.accuracy["0.01", 1]
    states("C1", "answer {:.1f} points worse than at the main penalty", 100 * worse)
    states("C1", "rises for `block` ({:.2f} to {:.2f})", *ends(cct.snr_centred))
    states("C1", "falls for `ff2` ({:.2f} to {:.2f})", *ends(curves["ff2", TRAINED].snr_centred))
    assert curves["attn", TRAINED].snr_centred.is_monotonic_increasing
    both = stages.penalties(run).query("epochs == 8 and tap == 'block'"), tried
    grown = [table[table.network == TRAINED].groupby("l2").snr.agg(lambda c: c.iloc[-1] - c.iloc[0]) for table in both]
    states("C1", "is {:.1f} to {:.1f} in the CCT", grown[0].min(), grown[0].max())
    states("C1", "and {:.1f} to {:.1f} in the CNN", grown[1].min(), grown[1].max())
    longer = stages.penalties(stages.cnn_half(run)).query("network == 'trained' and l2 == '0.0001'")
    longer = longer.pivot(index="encoder", columns="epochs", values="snr")
    states("C1", "halves from 4 to 8 epochs ({:.2f} to {:.2f})", *(longer.iloc[-1] - longer.iloc[0]))
    states("C1", "falls, from {:,.0f} to {:.0f} pairs of labels", *ends(cnn.internal_noise + cnn.external_noise))
    twin = curves["conv", "calibrated"]
    text = "accuracy falls from {:.0f} to {:.0f} % and SNR stays between {:.1f} and {:.1f}."
    states("C1", text, *ends(100 * twin.accuracy), twin.snr.min(), twin.snr.max())
    states("C1", "fifth layer of eight ({:.1f} %)", 100 * cnn.accuracy[5])
    assert cnn.accuracy.idxmax() == 5 and len(cnn) == 8


def test_small_clusters(run, summary, curves):
    node = curves["block", TRAINED].iloc[-1]
    labels = last(stages.snr(run)[1].query("network == 'trained' and tap == 'block'")).labels
    states("C2", "recognises {:.1f} of the 100 labels on average", node.labels_per_node)
    states("C2", "(four in five nodes: {:.0f} to {:.0f})", *labels.quantile([0.1, 0.9]))
    states("C2", "in {:.1f} clusters of {:.1f} labels", node.clusters_per_node, node.pooled_cluster_size)
    inside = node.internal_noise
    text = "in {:.0f} of 9,900 pairs of labels, {:.0f} of them inside its clusters"
    states("C2", text, inside + node.external_noise, inside)
    assert abs(node.labels_per_node / 100 / ((inside + node.external_noise) / 9900) - node.snr) < 0.02  # S / N
    noise = stages.snr(run)[1].query("tap == 'block'").eval("noise = internal + external")
    noise = noise.groupby(["network", "encoder"]).noise.median()
    text = "(the median node in {:.0f}; in the first encoder in {:.0f}, with random weights in {:,.0f})"
    states("C2", text, noise[TRAINED, 7], noise[TRAINED, 1], noise[RANDOM, 7])
    single, more = {}, {}
    for network in (TRAINED, RANDOM):
        found = [stages.matrices(run, seed, network).arrays("matrices")["7.block"] for seed in run.settings.seeds]
        sizes = [[len(cluster) for node in nodes for cluster in snp.label_clusters(node)] for nodes in found]
        single[network] = [np.mean(np.array(of_seed) == 1) for of_seed in sizes]
        more[network] = np.mean([np.mean([size for size in of_seed if size > 1]) for of_seed in sizes])
    assert all(0.46 < share < 0.52 for share in single[TRAINED])  # "half of them are single labels"
    text = "the others have {:.1f} on average (with random weights {:.1f})"
    states("C2", text, more[TRAINED], more[RANDOM])
    states("C2", "random network's have {:.1f} labels", curves["block", RANDOM].pooled_cluster_size.iloc[-1])
    shuffled = pd.concat([curve.snr for (_, network), curve in curves.items() if network == "shuffled"])
    states("C2", "is 1 within {:.0f} %", 100 * (shuffled - 1).abs().max())
    pairs = summary["02_snr_per_encoder"]["clustered pairs"]
    states("C2", "in {:.1f} % of cases", 100 * pairs["share of pairs in one superclass"])
    states("C2", "({:.1f} % at most)", 100 * pairs["permuted names, largest"])
    named = stages.cluster_pairs(run)[0].set_index(["label", "other"]).nodes
    assert named.idxmax() == ("oak_tree", "palm_tree")
    states("C2", "share most ({} of 256 nodes)", named.max())
    states("C2", "chair and fox share {},", named["chair", "fox"])
    states("C2", "offset falls from {:.0f} to {:.0f} %", *percent(ends(curves["block", TRAINED].offset_share)))
    states("C2", "({:.2f} against {:.2f})", *(curves["attn", network].snr[1] for network in (TRAINED, RANDOM)))
    table = stages.penalties(run).query("epochs == 8 and tap == 'attn' and encoder == 1 and l2 == 'code'")
    snr = table.set_index("network").snr
    states("C2", "({:.2f} against {:.2f} after 8 epochs, first seed)", snr[TRAINED], snr[RANDOM])
    taps = stages.snr(run)[0]
    outside = taps[~taps.centred & taps.tap.isin(["attn", "block", "ff2"])]
    outside = outside.pivot_table(
        index=["threshold", "tap", "encoder", "seed"], columns="network", values="snr_external"
    )
    margin = outside[TRAINED] - outside[RANDOM]
    first = outside.loc[0.3, "attn", 1]
    values = (*first[TRAINED][1:], *first[RANDOM][1:], first[TRAINED][0], first[RANDOM][0])
    states("C2", "({:.2f}, {:.2f} against {:.2f}, {:.2f}; {:.2f} against {:.2f} in the first)", *values)
    assert (margin.loc[0.3, "attn", 1] > 0).tolist() == [True, False, False]  # "in two of three networks"
    assert (margin.loc[[0.1, 0.2], "attn", 1] < 0).all()  # "and at thresholds of 0.1 and 0.2 in none"
    assert (margin.loc[0.3].drop(("attn", 1)) > 0.1).all()  # "Everywhere else"
    states("C2", "readouts of shuffled labels have {:.2f} there", first["shuffled"][0])


def test_sharpening(run, curves):
    block, random = curves["block", TRAINED], curves["block", RANDOM]
    states("C3", "grows from {:.0f} to {:.0f} %", *ends(100 * block.accuracy))
    states("C3", "SNR from {:.2f} to {:.2f}", *ends(block.snr))
    states("C3", "both are flat ({:.0f} %, {:.2f})", 100 * random.accuracy.mean(), random.snr.mean())
    states("C3", "in the last encoder ({:.2f} to {:.2f})", *block.snr.iloc[-2:])
    taps = stages.snr(run)[0]
    steps = taps[(taps.threshold == run.settings.threshold) & ~taps.centred & (taps.network == TRAINED)]
    steps = steps[steps.tap == "block"].pivot(index="encoder", columns="seed", values="snr").diff().iloc[1:]
    assert (steps.drop(4) > 0).all(axis=None) and (steps.loc[4].abs() < 0.01).sum() == 2 and steps.loc[4].max() > 0
    after = (
        stages.after_the_last_encoder(taps, run.settings.threshold).loc[TRAINED].reset_index().groupby("tap").snr.last()
    )
    states("C3", "LayerNorm lowers the SNR ({:.2f} to {:.2f}, first seed)", after.block, after.norm)
    states("C3", "SeqPool's weights raise it ({:.2f})", after.weighed)
    states("C3", "SeqPool's sum has {:.2f} and the plain mean over tokens {:.2f}", after.seqpool, after.pooled)
    ff2 = taps[
        (taps.threshold == run.settings.threshold) & ~taps.centred & (taps.network == TRAINED) & (taps.tap == "ff2")
    ]
    ff2 = ff2.pivot(index="encoder", columns="seed", values="snr").iloc[-2:]
    falls = sorted(-ff2.diff().iloc[-1])[:0:-1]
    states("C3", "and `ff2` falls in two, by {1:.2f} and {0:.2f}", *falls)
    assert (steps.iloc[-1] > 0).all() and falls[-1] > 0  # "`block` rises there in all three"
    for _, part in taps[~taps.centred & (taps.tap == "block")].groupby("threshold"):  # the noise outside of clusters
        outside = part.pivot_table(index="network", columns="encoder", values="snr_external")
        assert verdicts.sharper(outside.loc[TRAINED].to_numpy(), outside.loc[RANDOM].to_numpy())
    at = verdicts.at_thresholds(taps).loc["ff2"]
    assert at.index[~at.sharpens.astype(bool)].tolist() == [0.6]
    states("C3", "(at 0.6 by {:.2f} and without a trend)", at["last - first"][0.6])
    table = stages.penalties(run).query("tap == 'block' and l2 == '0.001'")
    grown = table[table.network == TRAINED].pivot(index="encoder", columns="epochs", values="snr")
    grown = grown.iloc[-1] - grown.iloc[0]
    main = steps[0].sum()  # of the first seed: last - first
    states("C3", "give a growth of {:.2f} instead of {:.2f} (first seed)", grown[4], main)


def converging(run, l2, lengths):
    """(network, encoder, epochs) -> accuracy, snr, as `benchmarks/convergence.py` left them; the page has them too."""
    path = run.figures / "benchmarks" / f"convergence-{l2}.csv"
    found = pd.read_csv(path).set_index(["network", "encoder", "epochs"])
    assert sorted(found.index.unique("epochs")) == lengths
    for epochs in lengths:
        cells = []
        for network in (TRAINED, RANDOM):
            part = found.loc[network].xs(epochs, level="epochs")
            cells += [", ".join(f"{100 * value:.1f}" for value in part.accuracy)]
            cells += [", ".join(f"{value:.2f}" for value in part.snr)]
        states("C3", f"| {epochs} | " + " | ".join(cells) + " |")
    return found


def spread_of_snr(run):
    """(network, encoder) -> largest SNR of `block` less the smallest, over seeds."""
    table = stages.snr(run)[0].query("tap == 'block' and not centred")
    by_place = table[table.threshold == run.settings.threshold].groupby(["network", "encoder"]).snr
    return by_place.max() - by_place.min()


def test_convergence_of_readouts_with_a_larger_penalty(run):
    found = converging(run, "0.01", [8, 16])
    moved = found.groupby(["network", "encoder"]).diff().dropna().droplevel("epochs").abs()
    assert (moved.snr < spread_of_snr(run)[moved.index]).all()  # "less than seeds differ"
    grown = (found.snr.unstack("encoder")[7] - found.snr.unstack("encoder")[1]).loc[TRAINED]
    states("C3", "the growth is {:.2f} and {:.2f}", *grown)
    assert grown.min() > 1.26  # "less than what longer training gives"
    states("C3", "accuracies move by {:.1f}, {:.1f} and {:.1f} points", *(100 * moved.accuracy[TRAINED]))
    states("C3", "those of the random network by up to {:.1f}", 100 * moved.accuracy[RANDOM].max())


def test_convergence_of_readouts(run):
    found = converging(run, "0.001", [4, 8, 16, 32])
    moved = found.groupby(["network", "encoder"]).diff().query("epochs > 8").abs().groupby("network").max()
    text = "by {:.1f} points at most with every doubling, those of the random network by {:.1f}"
    states("C3", text, *(100 * moved.accuracy[network] for network in (TRAINED, RANDOM)))
    states(
        "C3", "SNR by up to {:.2f}, more than seeds differ ({:.2f})", moved.snr[TRAINED], spread_of_snr(run)[TRAINED, 7]
    )
    snr = found.snr.unstack("encoder")
    grown = (snr[7] - snr[1]).loc[TRAINED]
    states("C3", "the growth is {:.2f}, {:.2f}, {:.2f} and {:.2f}", *grown)
    assert (snr[7] - snr[1]).loc[RANDOM].max() < 0.05  # "flat"


def test_training_with_mixed_images(run):
    """A training curve that is committed without its network."""
    curve = pd.read_csv(run.figures / "benchmarks" / "mixed-42-epochs.csv").set_index("epoch")
    shown = curve.loc[[6, 12, 18, 24, 30, 36, 42]]
    states("Recipes", "| training loss | " + " | ".join(f"{x:.2f}" for x in shown.loss), page="docs/speed.md")
    cells = " | ".join(f"{100 * x:.1f}" for x in shown.test_accuracy)
    states("Recipes", f"| test accuracy (%) | {cells} |", page="docs/speed.md")
    assert curve.test_accuracy.dropna().gt(0.7).idxmax() == 36 and curve.lr[36] < curve.lr.max() / 6
    for page in ("README.md", "docs/speed.md"):
        assert f"{100 * curve.test_accuracy[42]:.1f} %" in (runs.root() / page).read_text(encoding="utf-8")


def test_pruned_readouts(run):
    table = stages.pruned_readouts(run).query("tap == 'block' and threshold == 0.3")
    means = table.groupby("method")[["dilution", "whole", "accuracy"]].mean() * 100
    states("C4", "{:.0f} % of the weights of `block` readouts are left", 100 - means.dilution.andc)
    states("C4", "falls from {:.0f} to {:.0f} %", means.whole.andc, means.accuracy.andc)
    states(
        "C4", "leave {:.0f} %, label sets dealt to other nodes {:.0f} %", means.accuracy.random, means.accuracy.permuted
    )


def test_pruned_networks(run):
    seeds, wide = run.settings.seeds, ["andc", "random", "permuted", "magnitude"]

    @functools.cache  # a stage that is asked for asks for all that it was made from
    def pruned(seed, layers, at):
        return stages.pruned._pruning(run, seed, layers, at).table("pruning")

    def means(layers, at, column, seeds=seeds, wide=wide):
        table = pd.concat([pruned(seed, layers, at) for seed in seeds])
        by_seed = table.groupby(["method", "seed"])[["dilution", column]].mean().groupby("method").mean()
        return by_seed.dilution.andc, *(100 * by_seed[column][wide])

    dilution, *left = means("ff", 0.2, "accuracy")
    text = (
        "of {3:.0f} % at a dilution of {4:.2f}, random masks {0:.0f} %, permuted label sets {1:.0f} % and the largest"
    )
    states("C4", text + " weights {2:.0f} %", *left[1:], left[0], dilution)
    states("C4", "dilution of {:.2f} they leave {:.0f}, {:.0f}, {:.0f} and {:.0f} %", *means("ff", 0.35, "accuracy"))
    dilution, *lost = means("ff", 0.25, "retrained_loss")
    text = "loses {3:.1f} points at a dilution of {4:.2f}, random masks {0:.1f}, permuted label sets {1:.1f} and"
    states("C4", text + " the largest weights (first seed) {2:.1f}", *lost[1:], lost[0], dilution)
    lost = [*means("ff", 0.3, "retrained_loss"), *means("ff", 0.4, "retrained_loss")]
    four = "{:.1f}, {:.1f}, {:.1f} and {:.1f}"
    states("C4", f"at {{:.2f}} it is {four}, at {{:.2f}} {four}. So the accuracy", *lost)
    sweep = [(seed, at) for seed in seeds for at in run.settings.prune_thresholds]
    ff = pd.concat([pruned(seed, "ff", at) for seed, at in sweep])
    columns = ["dilution", "loss", "retrained_loss"]
    by_seed = ff.groupby(["threshold", "seed", "method"])[columns].mean().unstack("method")
    early, again = by_seed.loss.loc[:0.3], by_seed.retrained_loss.dropna(subset="andc")
    assert (early.andc > early[["random", "permuted"]].max(axis=1)).all()  # "worse than chance"
    gained = 100 * again.loc[0.4, ["random", "permuted"]].sub(again.loc[0.4, "andc"], axis=0)
    text = "(at {:.2f} it loses less than both controls in every seed, by {:.1f} to {:.1f} points)"
    states("C4", text, lost[5], gained.min().min(), gained.max().max())
    level = again.loc[:0.3, "andc"] - again.loc[:0.3, ["random", "permuted"]].min(axis=1)
    assert level.min() > -1e-6 and level.max() < 0.01  # "about level"
    holds = verdicts.largest_dilutions(ff).loc["ff"]
    assert holds.straight.isna().all() and set(holds.index[holds.retrained.notna()]) == {"activation", "magnitude"}
    states("C4", "within the rule's bounds, up to a dilution of {:.2f}, once retrained", holds.retrained.max())
    answers = [stages.unpruned(run, seed).arrays("answers") for seed in seeds]
    costs = [100 * (part["intact"].float().mean() - part["retrained"].float().mean()).item() for part in answers]
    text = "costs these {:.1f} points ({:.1f}, {:.1f} and {:.1f})"
    states("C4", text, sum(costs) / len(costs), *costs)
    from_intact = (100 * again).add(pd.Series(costs, index=pd.Index(seeds, name="seed")), axis=0, level="seed")
    at = [from_intact.andc.groupby("threshold").mean()[threshold] for threshold in (0.25, 0.3)]
    states("C4", "ANDC loses {:.1f} points at 0.44 and {:.1f} at 0.60", *at)
    usual = from_intact.loc[(0.25, seeds[0]), ["magnitude", "activation"]]
    states("C4", "usual criteria {:.1f} and {:.1f} at 0.44 (first seed)", *usual)
    assert (usual > 0.5).all()  # "more than the rule allows"
    at = ff.groupby(["threshold", "method"])[["dilution", "accuracy", "loss"]].mean().unstack("method")
    deep = at[at.dilution.andc >= 0.5]
    assert deep.accuracy.loc[deep.loss.andc.idxmin()].max() < 0.1  # "hardly anything is left of any network"
    gone = ff[(ff.seed == seeds[0]) & (ff.method == "andc")].set_index("threshold")
    text = "(first seed: {:.0f} of 3,584 at a dilution of {:.2f}, {:.0f} at {:.2f})"
    found = gone.loc[[0.2, 0.4]]
    states("C4", text, *[value for pair in zip(found.removable, found.dilution, strict=True) for value in pair])
    columns = ["dilution", "accuracy", "kept_means_accuracy"]
    why = 100 * stages.why_ff(run).groupby(["method", "threshold"])[columns].mean()
    plain, kept, three = why.accuracy, why.kept_means_accuracy, "{:.0f}, {:.0f} and {:.0f}"
    text = f"ANDC leaves {three} % at dilutions of {{:.2f}}, {{:.2f}} and {{:.2f}} ({three} without)"
    states("C4", text, *kept.andc, *why.dilution.andc / 100, *plain.andc)
    states("C4", f"masks leave {three} % without them and {three} % with them", *plain.random, *kept.random)
    states("C4", f"permuted label sets {three} % and {three} % (three seeds", *plain.permuted, *kept.permuted)
    above, level = kept.andc - kept[["random", "permuted"]].unstack("method").max(axis=1), kept.andc - plain.permuted
    assert (above > 0).all() and level.abs().max() < 3  # "with means kept for all, ANDC is above both", "level with"
    text = "at a dilution of {:.2f} ANDC costs {:.1f} points straight away, random masks {:.1f} and permuted"
    states("C4", text + " label sets {:.1f}.", *means("classifier", 0.2, "loss")[:4])
    thresholds, every = run.settings.prune_thresholds[::2], [*wide, "activation"]
    lost = {at: means("classifier", at, "retrained_loss", wide=every) for at in thresholds}
    text = "it costs {:.2f} points, random masks {:.2f}, permuted label sets {:.2f}, the largest weights {:.2f}"
    states("C4", text + " and activation masks {:.2f};", *lost[0.2][1:])
    states("C4", "at a dilution of {:.2f} it is {:.1f}, {:.1f}, {:.1f}, {:.1f} and {:.1f}.", *lost[0.5])
    states("C4", "Up to a dilution of {:.2f} the usual criteria do it better, beyond it worse", lost[0.4][0])
    for at, (_, ours, *_, magnitude, activation) in lost.items():
        assert max(magnitude, activation) < ours if at <= 0.4 else min(magnitude, activation) > ours
    parts = [pruned(seed, "classifier", at) for seed in seeds for at in thresholds]
    dilution, *left = means("attention", 0.3, "accuracy", seeds[:1])
    text = (
        "at a dilution of {:.2f} ANDC leaves {:.1f} %, random masks {:.1f}, permuted label sets {:.1f} and the largest"
    )
    states("C4", text + " weights {:.1f} %", dilution, *left)
    left = means("attention", 0.4, "accuracy", seeds[:1])
    states("C4", "at {:.2f} it is {:.1f}, {:.1f}, {:.1f} and {:.1f} %.", *left)
    *_, straight, alone = verdicts.pruning(pd.concat(parts), "cifar100")
    assert (straight["verdict"], alone["verdict"]) == ("not supported", "supported")  # "supported in part"


def test_dilution_of_single_layers(run):
    rows = []
    for seed in run.settings.seeds:
        (network, _), found = stages.load_network(run, seed, TRAINED), stages.label_sets(run, seed).arrays("sets")
        pairs = andc.connections(network, "ff")
        for at in (0.2, 0.3):
            masks = andc.andc_masks(stages.sets_at(at, found, pairs), pairs)
            rows += [{"at": at, "layer": name, "dilution": andc.dilution({name: masks[name]})} for name in masks]
            rows.append({"at": at, "layer": "all", "dilution": andc.dilution(masks)})
    layers, ends = pd.DataFrame(rows).groupby(["at", "layer"]).dilution.mean(), []
    for at in (0.2, 0.3):
        for encoder in (0, 6):
            both = [layers[at, f"classifier.blocks.{encoder}.linear{number}"] for number in (1, 2)]
            ends += [min(both), max(both)]
        ends.insert(-4, layers[at, "all"])
    text = "where {:.2f} of all connections are gone, it is {:.2f} to {:.2f} of each layer of the first encoder and"
    text += " {:.2f} to {:.2f} in the last; where {:.2f} are gone, {:.2f} to {:.2f} and {:.2f} to {:.2f}."
    states("C4", text, *ends)


def test_pruned_filters(run, summary):
    table = pd.read_csv(run.figures / "cnn_accuracy_against_dilution.csv")
    means = table.groupby(["threshold", "method"])[["dilution", "accuracy", "retrained_loss"]].mean().unstack("method")
    lost, dilution = 100 * means.retrained_loss.dropna(), means.dilution.andc
    states("C4", "dilutions of {:.2f}, {:.2f} and {:.2f} ANDC costs", *dilution[lost.index])
    states("C4", "ANDC costs {:.1f}, {:.1f} and {:.1f} points after one epoch", *lost.andc)
    states("C4", "random masks cost {:.1f}, {:.1f} and {:.1f} points", *lost.random)
    states("C4", "permuted label sets {:.1f}, {:.1f} and {:.1f}.", *lost.permuted)
    states("C4", "(first seed: {:.1f}, {:.1f} and {:.1f})", *lost.magnitude)
    straight = 100 * means.accuracy.iloc[0]
    states("C4", "ANDC leaves an accuracy of {:.0f} % at a dilution of {:.2f}", straight.andc, dilution.iloc[0])
    states("C4", "random masks one of {:.0f} %", straight.random)
    results, at = summary["05_cnn_counterpart"], lost.index[0]
    signs = pd.DataFrame(results["pruned kernels"]).set_index("threshold").loc[at]
    states("C4", "at a dilution of {:.2f}, {:.0f} % have a negative sum", dilution[at], 100 * signs["negative removed"])
    states("C4", "kept, {:.0f} %)", 100 * signs["negative kept"])
    why = pd.DataFrame(results["why"]).query(f"threshold == {at}").set_index("method")
    assert why.accuracy["same signs"] > why.accuracy.andc
    fresh = 100 * why.refreshed_accuracy
    states(
        "C4", "bring ANDC back to {:.0f} %, random masks of the same signs to {:.0f} %", fresh.andc, fresh["same signs"]
    )
    states("C4", "other random masks to {:.0f} %", fresh.random)
    shares = pd.DataFrame(results["taps"]).query("network == 'trained'").offset_share
    states("C4", "{:.0f} to {:.0f} % offset", 100 * shares.min(), 100 * shares.max())


def dealt_bound(labels: pd.DataFrame) -> float:
    """97.5 % quantile over dealings of the mean over seeds of one encoder's ablation gap. Labels are equally frequent,
    so that one value a label does for its images."""
    drawn = []
    for seed, part in labels.groupby("seed"):
        drop = torch.tensor(part.pivot(index="head", columns="label", values="ablation_drop").to_numpy())
        owned = part[part.owner_unseen == True].set_index("label")["head"]  # noqa: E712
        owner = torch.tensor(owned.reindex(range(drop.shape[1]), fill_value=-1).to_numpy())
        generator = torch.Generator().manual_seed(seed)
        drawn.append(heads.dealt_gaps(drop, torch.arange(drop.shape[1]), owner, 1000, generator))
    return torch.stack(drawn).mean(dim=0).quantile(0.975).item()


def test_experts(run, summary):
    labels, encoders, _ = stages.head_division(run)
    along = encoders[encoders.network == TRAINED].drop(columns="network").groupby("encoder").mean()
    final = last(labels[labels.network == TRAINED])
    owner, count = final.owner_unseen.astype(bool), final["head"].nunique()
    most = along.excess.iloc[-1], math.log(count), along.z.iloc[-1]
    states("C5", "({:.2f} of at most {:.2f} nats, {:.0f} standard deviations of the permutations", *most)
    own, others = (final[rows].groupby(["seed", "label"]).alone_accuracy.max() for rows in (owner, ~owner))
    states("C5", "in {:.0f} % of cases:", 100 * (own > others).mean())
    alone = [100 * final[rows].alone_accuracy.mean() for rows in (owner, ~owner)]
    states("C5", "on its own labels a head answers {:.0f} % rightly, on the others {:.0f} %", *alone)
    states("C5", "Without a head its own labels lose {:.1f} points", 100 * along.own_drop.iloc[-1])
    states("C5", "and the others gain {:.1f}", -100 * along.other_drop.iloc[-1])
    above = encoders[encoders.network == TRAINED].eval("gap > gap_null_high").groupby(encoders.encoder).sum()
    assert above.tolist() == [1, 1, 1, 3, 3, 3, 3]  # "in only one network of three, in each of these encoders"
    bounds = [100 * dealt_bound(labels[(labels.network == TRAINED) & (labels.encoder == at)]) for at in (1, 2, 3)]
    gaps = 100 * along.gap.iloc[:3]
    states("C5", "costs its own labels {:.1f} to {:.1f} points more than others", gaps.min(), gaps.max())
    seed = encoders[(encoders.network == TRAINED) & (encoders.seed == 0)].set_index("encoder")
    little = 100 * seed.first_mean_gap[1], 100 * seed.gap[1], 100 * seed.first_mean_gap.mean(), 100 * seed.gap.mean()
    states("C5", "little is left of it ({:.1f} of {:.1f}), over all encoders {:.1f} of {:.1f}", *little)
    owners = final[owner].pivot(index="label", columns="seed", values="head")
    pairs = [(owners[a], owners[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    same = np.mean([(one == other).mean() for one, other in pairs])
    shares = [[one.value_counts(normalize=True) for one in pair] for pair in pairs]
    assert abs(same - np.mean([(one * other).sum() for one, other in shares])) < 0.005  # "as many as by chance"
    states("C5", "same number in {:.0f} % of cases", 100 * same)
    states("C5", "({:.1f} to {:.1f} at most in 97.5 % of dealings)", min(bounds), max(bounds))
    assert (gaps > bounds).all()  # "on average over seeds more than dealt ones"
    first = last(encoders.query("network == 'trained' and seed == 0")).iloc[0]
    states("C5", "({:.1f} points, silent {:.1f}; first seed)", 100 * first.first_mean_gap, 100 * first.gap)
    results = summary["04_head_modus_vivendi"]
    maps, alike, grouped = (last(pd.DataFrame(results[name])) for name in ("attention", "stability", "superclasses"))
    states("C5", "differ by {:.2f} to {:.2f} (0 equal", maps.difference.min(), maps.difference.max())
    states("C5", "by {:.2f} to {:.2f}; in the first", maps.other_heads.min(), maps.other_heads.max())
    assert (alike.overlap > alike.chance_high).sum() == 2 and len(alike) == 3  # "two of three pairs"
    agreement = alike.overlap.min(), alike.overlap.max(), alike.chance.mean(), alike.chance_high.max()
    states("C5", "({:.2f} to {:.2f}; chance {:.2f}, at most {:.2f} in 97.5 %)", *agreement)
    shares = grouped.same_owner.min(), grouped.same_owner.max(), grouped.dealt.min(), grouped.dealt.max()
    states("C5", "in {:.0f} to {:.0f} % of pairs (dealt: {:.0f} to {:.0f} %)", *(100 * share for share in shares))
    table = stages.cooperation(run)
    means = last(table).groupby(["nodes", "size"]).mean(numeric_only=True)
    whole, all_nodes, few = (means.xs(size, level="size") for size in (64, 256, 16))
    high = stages.summary_of_cooperation(table).iloc[-1]
    states("C5", "the 64 nodes of a head answer {:.0f} % of the images of its own labels", 100 * whole.own["head"])
    states("C5", "by the same count, {:.0f} % (at most {:.0f} %", 100 * whole.own["dealt"], 100 * high.own_high)
    along = stages.summary_of_cooperation(table)
    above, more = along.own - along.own_high, 100 * (along.own - along.own_dealt)
    assert above[6] > 0.02 > above[2] > 0.01 and above[[3, 4, 5]].abs().max() < 0.003  # "and, less, in the second"
    assert more[1] < 0  # "in the first below them"
    states("C5", "within {:.1f} points of dealt nodes", more[[3, 4, 5]].max())
    dealt = 100 * whole.own["dealt"], 100 * whole.others["dealt"]
    states("C5", "which own labels by the same count, {:.0f} and {:.0f} %)", *dealt)
    others = 100 * whole.others["head"], 100 * whole.others["dealt"]
    states("C5", "the nodes of a head answer {:.0f} % rightly, dealt ones {:.0f} %", *others)
    choice = [100 * share for share in (whole.choice["head"], whole.choice["dealt"], high.choice_high)]
    states("C5", "in {:.1f} % of cases, dealt nodes in {:.1f} % (at most {:.1f})", *choice)
    states("C5", "(all nodes together {:.1f} and {:.1f} %)", *(100 * all_nodes.choice[["head", "dealt"]]))
    states("C5", "(16 nodes: {:.1f} against {:.1f} %)", *(100 * few.choice[["head", "dealt"]]))
    assert (means.own <= means.singles + 1e-6).all()  # "Less than their single nodes, added up, every set answers"
    sums = [100 * few[name][nodes] for nodes in ("head", "dealt") for name in ("own", "singles")]
    states("C5", "16 nodes of a head {:.0f} % instead of {:.0f} %; dealt, {:.0f} instead of {:.0f} %", *sums)
    states("C5", "(that of a whole head is {:.0f} %)", 100 * whole.singles["head"])


def test_accuracy_from_nodes(run, summary):
    sizes = pd.DataFrame(summary["02_snr_per_encoder"]["predictions"]).set_index("size")
    ranks = sizes.rank_correlation.dropna()
    states("C6", "{:.2f} for single nodes, {:.2f} to {:.2f} for more", ranks[1], *sorted(ranks[1:])[:: len(ranks) - 2])
    whole = sizes.iloc[-1]
    missed = sizes.error_predicted[64], whole.error_predicted, whole.error_only_size
    table = stages.macroscopic_accuracies(run)
    table = table[table.encoder > 1].assign(
        missed=(table.predicted - table.measured).abs(), baseline=(table.only_size - table.measured).abs()
    )
    by_encoder = 100 * table[table["size"] == 64].groupby("encoder").missed.mean()
    assert by_encoder.idxmin() == 5 and by_encoder.idxmax() == 7
    text = "64 nodes are missed by {:.1f} points on average ({:.1f} in the fifth encoder, {:.1f} in the last)"
    states("C6", text, 100 * missed[0], by_encoder[5], by_encoder[7])
    states("C6", "whole encoders by {:.1f}, more than by the baseline ({:.1f})", *(100 * error for error in missed[1:]))
    states("C6", "of {:,} only {} are whole encoders", len(table), (table["size"] == table["size"].max()).sum())
    alike = table.groupby("size")[["missed", "baseline"]].mean().mean()
    states("C6", "more than the baseline ({:.3f} against {:.3f})", *alike)
    table = last(table)
    whole = table[table["size"] == table["size"].max()]
    states("C6", "All {} nodes of the last encoder are predicted", whole["size"].iloc[0])
    states("C6", "({:.0f} %) and answer {:.0f} %", 100 * whole.predicted.mean(), 100 * whole.measured.mean())


def test_in_short(run, summary, curves):
    """The first screen of the README."""

    def says(text, *values):
        states("What the heads agree on", text, *values, page="README.md")

    block, random, cnn = curves["block", TRAINED], curves["block", RANDOM], curves["conv", TRAINED]
    says("(SNR {:.1f} to {:.1f}; random weights {:.1f})", *ends(block.snr), random.snr.mean())
    says("in the CNN ({:.1f} to {:.1f})", *ends(cnn.snr))
    _, encoders, _ = stages.head_division(run)
    lost = last(encoders[encoders.network == TRAINED])
    alone = last(pd.DataFrame(summary["04_head_modus_vivendi"]["cooperation"])).iloc[0]
    says("answers {:.0f} % of its own labels' images", 100 * alone.own)
    says("dealt at random {:.0f} % of theirs", 100 * alone.own_dealt)
    says("its own labels lose {:.1f} points", 100 * lost.own_drop.mean())
    assert lost.other_drop.mean() <= 0  # "the others none"
    sizes = pd.DataFrame(summary["02_snr_per_encoder"]["predictions"])
    says("missed by {:.0f} points", 100 * sizes.error_predicted.iloc[-1])
    parts = [stages.pruned._pruning(run, seed, "classifier", 0.2).table("pruning") for seed in run.settings.seeds]
    by_seed = pd.concat(parts).groupby(["method", "seed"])[["dilution", "retrained_loss"]].mean()
    dilution, lost = (100 * by_seed.groupby("method")[column].mean() for column in ("dilution", "retrained_loss"))
    says("{:.0f} % of the weights for {:.2f} points", dilution.andc, lost.andc)
    says("random masks {:.2f}, the largest weights {:.2f}", lost.random, lost.magnitude)
    parts = [stages.pruned._pruning(run, seed, "ff", 0.3).table("pruning") for seed in run.settings.seeds]
    by_seed = pd.concat(parts).groupby(["method", "seed"])[["dilution", "loss", "retrained_loss"]].mean()
    assert (by_seed.loss.andc > by_seed.loss.random).all()  # "straight away it costs more than random pruning"
    mean = by_seed.groupby("method").mean()
    lost = 100 * mean.retrained_loss[["andc", "random", "permuted", "magnitude"]]
    text = "at a dilution of {:.2f} still {:.1f} points after one epoch of retraining"
    text += " (random masks {:.1f}, permuted label sets {:.1f}; the largest weights {:.1f}, one network)"
    says(text, mean.dilution.andc, *lost)


def test_flowers():
    """From what is committed of it: summary.json and the table of one figure."""
    folder = runs.root() / "figures" / "flowers102-cpu"
    rows, taps = runs.read_json(folder / "summary.json")["verdicts"], pd.read_csv(folder / "snr_per_encoder.csv")
    assert {row["verdict"].split(" (")[0] for row in rows} == {"not tested"} and taps.seed.nunique() == 1

    def says(text, *values):
        states("Flowers-102", text, *values)

    at = taps[(taps.threshold == 0.3) & ~taps.centred].sort_values("encoder").groupby(["tap", "network"])
    accuracy, snr = ({key: list(values) for key, values in at[column]} for column in ("accuracy", "snr"))
    block, answers, ff2 = snr["block", TRAINED], accuracy["block", TRAINED], snr["ff2", TRAINED]
    says("answer {:.0f} % of the 6,149 test images in the first encoder and {:.0f} % in the last", *percent(answers))
    assert answers == sorted(answers)  # "a little more in each"
    says("(random weights: {:.0f} %)", 100 * sum(accuracy["block", RANDOM]) / len(answers))
    assert all(more > less for more, less in zip(block, snr["block", RANDOM], strict=True))  # "everywhere"
    says("grows early: {:.2f}, {:.2f} and {:.2f} in the first three encoders", *block[:3])
    assert all(2.8 < value < 2.9 for value in block[3:])
    says("`attn` grows from {:.2f} to {:.2f}", snr["attn", TRAINED][0], snr["attn", TRAINED][-1])
    assert max(ff2) == ff2[1]
    says("in the second encoder, {:.2f}, and falls to {:.2f} in the last", ff2[1], ff2[-1])
    says("(`block` {:.2f}, after LayerNorm {:.2f}, weighed {:.2f})", block[-1],
         snr["norm", TRAINED][0], snr["weighed", TRAINED][0])  # fmt: skip
    says("hardly here (120 epochs; {:.2f} to {:.2f})", *block[-2:])
    says("in both (3.62 and {:.2f})", snr["weighed", TRAINED][0])
    here = pd.read_csv(runs.root() / "figures" / "cifar100-cpu" / "snr_per_encoder.csv").query("seed == 0")
    read = [table.query("network == 'trained' and encoder == 7 and threshold == 0.3") for table in (here, taps)]
    offset = [100 * table[~table.centred].set_index("tap").offset_share for table in read]
    shares = (*(share.weighed for share in offset), *(share.block for share in offset))
    says("less offset ({:.0f} and {:.0f} % of the squared fields, `block` {:.0f} and {:.0f})", *shares)
    without = [table[table.centred].set_index("tap").snr for table in read]
    values = (*(centred.weighed for centred in without), *(centred.block for centred in without))
    says("SNR is lower ({:.2f} and {:.2f}, `block` {:.2f} and {:.2f})", *values)
    outside = taps[~taps.centred & (taps.tap == "block")].pivot(
        index=["threshold", "network"], columns="encoder", values="snr_external"
    )
    rising = outside.loc[0.3, TRAINED]
    assert rising.is_monotonic_increasing
    for threshold in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        assert verdicts.sharper(*(outside.loc[threshold, network].to_numpy() for network in (TRAINED, RANDOM)))
    both = *ends(rising), *ends(outside.loc[0.3, RANDOM])
    says("at every step ({:.2f} to {:.2f}; random weights {:.2f} to {:.2f})", *both)
    says("sum has {:.2f} (the plain mean {:.2f})", snr["seqpool", TRAINED][0], snr["pooled", TRAINED][-1])
    assert ff2[1:] == sorted(ff2[1:], reverse=True)  # "from the second encoder on"
    says("answer better ({:.0f} to {:.0f} %)", *percent(accuracy["ff2", TRAINED][1:]))
    shuffled = [abs(value - 1) for (_, network), values in snr.items() if network == "shuffled" for value in values]
    says("Readouts of shuffled labels: 1 within {:.0f} %", 100 * max(shuffled))
    notes = {row["statistic"].split(",")[0]: row["notes"] for row in rows if row["claim"] == "C3"}
    found = {name: [float(word) for word in re.findall(r"\d\.\d{3}", note)][-3:] for name, note in notes.items()}
    says("by {:.2f} to {:.2f}; from 40 to 80 epochs of training it moves by {:.2f} at most", *found["SNR of block"])
    says("accuracy by {:.1f} points", 100 * found["accuracy of block"][-1])
    assert (
        "fails for the penalties 0.0001, 0.001, code (first seed)" in notes["SNR of block"]
    )  # "with three of the four"
    says("the nodes before its second matrix, `ff1`, do not: {:.2f} to {:.2f})", *ends(pd.Series(snr["ff1", TRAINED])))
    grown = {}  # (tap, threshold) -> whether the rule is met, last - first
    for (tap, threshold), part in taps[~taps.centred & taps.tap.isin(["block", "ff2"])].groupby(["tap", "threshold"]):
        trained, random = (part[part.network == kind].sort_values("encoder").snr for kind in (TRAINED, RANDOM))
        met = verdicts.sharper(trained.to_numpy(), random.to_numpy())
        grown[tap, threshold] = met, trained.iloc[-1] - trained.iloc[0]
    assert all(met == (threshold > 0.45) for (tap, threshold), (met, _) in grown.items() if tap == "block")
    assert all(growth < 0 for (tap, _), (_, growth) in grown.items() if tap == "ff2")  # "falls at every one"
    says("`block` grows by {:.2f} and {:.2f}, and by growth", grown["block", 0.5][1], grown["block", 0.6][1])
    by_threshold = taps[~taps.centred & (taps.tap == "block") & (taps.network == TRAINED)]
    later = by_threshold.pivot(index="threshold", columns="encoder", values="snr")
    assert (later[7] - later[3]).max() < 0.06  # "at any threshold"
    trends = [float(verdicts.rank_trend(np.array(snr["block", network]))) for network in (TRAINED, RANDOM)]
    says("(rank trend {:.2f}; the random network's small rise has {:.2f})", *trends)
    order, error = (row for row in rows if row["claim"] == "C6")
    says("on average over all sets ({1} against {0})", *error["numbers"].split(" - "))
    predictions = runs.read_json(folder / "summary.json")["results"]["02_snr_per_encoder"]["predictions"][-1]
    says("whole encoders ({error_predicted:.3f} against {error_only_size:.3f})".format(**predictions))
    says("as on CIFAR-100 ({})", order["numbers"])


def test_heads_of_flowers(summary):
    found = runs.read_json(runs.root() / "figures" / "flowers102-cpu" / "summary.json")
    results = found["results"]["04_head_modus_vivendi"]
    encoders, maps = pd.DataFrame(results["encoders"]), pd.DataFrame(results["attention"])
    along, random = (encoders[encoders.network == network].set_index("encoder") for network in (TRAINED, RANDOM))

    def says(text, *values):
        states("Flowers-102", text, *values)

    rows = [row for row in found["verdicts"] if row["claim"] == "C5"]
    assert {row["verdict"] for row in rows} == {"not tested (n = 1; rule met so far)"}  # "Both rules are met so far"
    assert (along.z > 8).all() and along.excess.idxmax() == 7  # "in every encoder, most in the last"
    says("(by {:.2f} nats, {:.0f} standard deviations", along.excess[7], along.z[7])
    says("nowhere by more than {:.1f})", random.z.max())
    both = pd.DataFrame(summary["04_head_modus_vivendi"]["encoders"]).query("network == 'trained'")
    means = along.excess.mean(), both.excess.mean(), both.excess.iloc[-1]
    says("({:.2f} against {:.2f} nats), in the last by less (there {:.2f})", *means)
    gap = 100 * along.loc[7, ["gap", "gap_null_high", "first_mean_gap"]]
    says("by {:.1f} points (dealt owners at most {:.1f} in 97.5 % of dealings; with the head at its mean {:.1f})", *gap)
    assert abs(along.first_mean_gap[1]) < 0.0005  # "nothing is left of it"
    assert list(along.index[along.gap <= along.gap_null_high]) == [1, 3]  # "not in the first and the third"
    dealt = maps[maps.encoder == 7].dealt_high
    says("(owners dealt at random: at most {:.2f} to {:.2f})", dealt.min(), dealt.max())
    for text, encoder in (("by {:.2f} to {:.2f}, the other heads' on the same images by {:.2f} to {:.2f} (owners", 7),
                          ("in the first by {:.2f} to {:.2f}, the others' by {:.2f} to {:.2f}", 1)):  # fmt: skip
        columns = [maps[maps.encoder == encoder][name] for name in ("difference", "other_heads")]
        says(text, *(end for column in columns for end in (column.min(), column.max())))
    whole = 100 * pd.DataFrame(results["cooperation"]).set_index("encoder")
    text = "answers {own:.1f} % of their images (mean over labels) and {others:.1f} % of the others', dealt nodes "
    text += "{own_dealt:.1f} % (at most {own_high:.1f} in 97.5 % of dealings) and {others_dealt:.1f} %"
    says(text.format(**whole.loc[7]))
    assert (whole.own < whole.own_dealt)[:6].all()  # "in every encoder before the last less often"
    says("({own:.0f} against {own_dealt:.0f} % in the first)".format(**whole.loc[1]))
    says("the right one in {choice:.1f} % of cases, dealt nodes in {choice_dealt:.1f} %".format(**whole.loc[7]))
    says("(all nodes together {choice_all:.1f} and {choice_all_dealt:.1f} %)".format(**whole.loc[7]))
    here = pd.DataFrame(summary["04_head_modus_vivendi"]["cooperation"]).iloc[-1]
    says("as on CIFAR-100 by {:.1f} points", 100 * (here.own - here.own_dealt))


def test_pruning_of_flowers():
    found = runs.read_json(runs.root() / "figures" / "flowers102-cpu" / "summary.json")
    results, wide = found["results"]["03_andc_pruning"], ["andc", "random", "permuted", "magnitude"]
    table = pd.DataFrame(results["pruning"]).pivot(index=["layers", "threshold"], columns="method")

    def says(text, *values):
        states("Flowers-102", text, *values)

    def at(layers, threshold, column, methods=wide):
        return table[column].loc[(layers, threshold), methods]

    rows = [row for row in found["verdicts"] if row["claim"] == "C4"]
    decide = [row["verdict"] for row in rows if "FF layers" in row["statistic"]]
    assert decide == 2 * ["not tested (n = 1; rule not met so far)"]  # "Neither rule is met so far"
    unpruned = table.accuracy.andc + table.loss.andc  # straight after pruning, all test images
    left = [value for threshold in (0.3, 0.4) for value in 100 * at("ff", threshold, "accuracy")]
    dilutions = [table.dilution.andc["ff", threshold] for threshold in (0.3, 0.4)]
    four = "{:.1f}, {:.1f}, {:.1f} and {:.1f}"
    says("of the {:.1f} % right answers", 100 * unpruned["ff", 0.3])
    text = "at a dilution of {4:.2f} ANDC leaves {0:.1f} %, random masks {1:.1f}, permuted label sets {2:.1f} and the"
    says(text + " largest weights {3:.1f}", *left[:4], dilutions[0])
    says(f"at {{:.2f}} it is {four}", dilutions[1], *left[4:])
    text = "ANDC loses {:.1f} points, random masks {:.1f}, permuted label sets {:.1f} and the largest weights {:.1f}"
    says(text, *(100 * at("ff", 0.3, "retrained_loss")))
    says(f"at {{:.2f}} {four}", dilutions[1], *(100 * at("ff", 0.4, "retrained_loss")))
    text = "costs {:.1f} points at a dilution of {:.2f} after five epochs of retraining (random masks {:.1f}, "
    ours, random, permuted, largest = 100 * at("ff", 0.4, "retrained_loss")
    text += "permuted label sets {:.1f}; the largest weights {:.1f})"
    states("What the heads agree on", text, ours, dilutions[1], random, permuted, largest, page="README.md")
    three = table.loc["ff"]
    straight = three.loss.andc - three.loss[["random", "permuted"]].max(axis=1)
    assert (straight.loc[:0.4] > 0).all() and (straight.loc[0.5:] < 0).all()  # "worse than chance, though"
    deep, controls = 100 * three.accuracy.andc.loc[0.5:], 100 * three.accuracy.loc[0.5:, ["random", "permuted"]].stack()
    text = "where it leaves {:.0f} to {:.0f} % and the controls {:.0f} to {:.0f}"
    says(text, deep.min(), deep.max(), controls.min(), controls.max())
    largest = pd.DataFrame(results["largest"]).set_index(["layers", "method"])
    assert list(largest.loc["ff"].retrained.dropna().index) == ["activation", "magnitude"]
    says("within the rule's bounds up to {:.2f}", largest.retrained.max())
    best = three.retrained_loss[["random", "permuted"]].min(axis=1) - three.retrained_loss.andc
    error = rows[1]["uncertainty"]
    says("(ANDC ± {:.1f}): not less than both controls beyond that error", 100 * error)
    assert (best.dropna() > 0).all() and best.max() < error
    why = 100 * pd.DataFrame(results["why"]).query("threshold == 0.3").set_index("method")
    order = why.loc[["andc", "random", "permuted"]]
    text = "leaves {:.1f} % at {:.2f}, random masks {:.1f}, permuted label sets {:.1f}"
    says(text, order.kept_means_accuracy.iloc[0], dilutions[0], *order.kept_means_accuracy.iloc[1:])
    says("without {:.1f}, {:.1f} and {:.1f})", *order.accuracy)
    text = "**classifier** at a dilution of {4:.2f} ANDC costs {0:.1f} points straight away, random masks {1:.1f} and "
    cost = 100 * at("classifier", 0.2, "loss")
    says(text + "permuted label sets {2:.1f}", *cost, table.dilution.andc["classifier", 0.2])
    cost = 100 * at("classifier", 0.2, "retrained_loss")
    says("after a training of the classifier alone {:.1f}, {:.1f} and {:.1f} (the largest weights {:.1f})", *cost)


def test_cnn_of_flowers():
    found = runs.read_json(runs.root() / "figures" / "flowers102-cpu" / "summary.json")
    rows, results = found["verdicts"], found["results"]["05_cnn_counterpart"]
    table = pd.DataFrame(results["taps"]).query("tap == 'conv'").pivot(index="encoder", columns="network", values="snr")
    first, nulls = table[TRAINED][:2], table.loc[:2, [RANDOM, "calibrated"]].to_numpy()
    assert first.max() < nulls.min()
    values = *first, nulls.min(), nulls.max()
    states("Flowers-102", "random networks ({:.2f} and {:.2f} against {:.2f} to {:.2f})", *values)
    why = pd.DataFrame(results["why"]).query("threshold == 0.2").set_index("method")
    order = ["andc", "random", "same signs"]
    text = (
        "(dilution {:.3f}), ANDC leaves {:.1f} % of the answers right, random masks {:.1f} %, those of the same signs"
    )
    states("Flowers-102", text + " {:.1f} %", why.dilution["andc"], *(100 * why.accuracy[order]))
    states("Flowers-102", "taken anew {:.1f}, {:.1f} and {:.1f} %", *(100 * why.refreshed_accuracy[order]))
    accuracy, snr = (row for row in rows if row["claim"] == "C1")
    assert "rule met so far" in accuracy["verdict"] and "rule not met so far" in snr["verdict"]
    for row in (accuracy, snr):
        assert "holds" in row["notes"].partition("CNN")[2] and "fails" not in row["notes"].partition("CNN")[2]
    shares = re.search(r"CNN 0\.(\d\d) to 0\.(\d\d)", accuracy["numbers"]).groups()
    states("Flowers-102", "filters answer {} % of the images in the first layer and {} % in the last", *shares)
    states("Flowers-102", "from {} ({})", *re.search(r"CNN (\d\.\d\d to \d\.\d\d) \((.*)\)$", snr["numbers"]).groups())


def percent(values: list[float]) -> tuple[float, float]:
    return 100 * values[0], 100 * values[-1]


def test_seconds_of_readouts_on_the_page_of_speed():
    page = (runs.root() / "docs" / "speed.md").read_text(encoding="utf-8")
    for profile, stage in (
        ("cifar100-cpu", "readouts-trained-seed0"),
        ("cifar100-cpu", "penalties-trained-seed0"),
        ("flowers102-cpu", "readouts-trained-seed0"),
        ("flowers102-cpu", "heads-trained-seed0"),
    ):
        summary = runs.read_json(runs.root() / "figures" / profile / "summary.json")
        assert f"| {summary['seconds'][stage]:,.0f} | {summary['peak_gb'][stage]:.1f} |" in page, stage
    summary = runs.read_json(runs.root() / "figures" / "cifar100-cpu" / "summary.json")
    seconds, gb = ([f"{summary[key][f'readouts-trained-seed{seed}']:{form}}" for seed in (1, 2)]
                   for key, form in (("seconds", ",.0f"), ("peak_gb", ".1f")))  # fmt: skip
    assert f"| {', '.join(seconds)} | {', '.join(gb)} |" in page
