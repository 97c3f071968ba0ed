"""What docs/findings.md concludes holds in the committed tables, and its tables have their numbers."""

import functools

import numpy as np
import pandas as pd
import pytest
import torch

from paperlib import andc, claims, experiment, files, heads, paths, snp
from paperlib.experiment import settings

TRAINED, RANDOM = "trained", "random"
CONTROLS = ["random", "permuted"]


@pytest.fixture(scope="module")
def run():
    return settings.open_committed("cifar100-cpu")


@pytest.fixture(scope="module")
def summary():
    return files.read_json(paths.root() / "figures" / "cifar100-cpu" / "summary.json")["results"]


@pytest.fixture(scope="module")
def flowers():
    return files.read_json(paths.root() / "figures" / "flowers102-cpu" / "summary.json")


@pytest.fixture(scope="module")
def curves(run):
    """(tap, network) -> encoder -> statistics, means over seeds at the main threshold; `conv` is the CNN's tap."""
    both, _, _ = experiment.nodes.both_halves(run)
    table = pd.concat([experiment.nodes.snr(run)[0], both[both.half == "cnn"]])
    table, keys = table[table.threshold == run.settings.threshold], ["tap", "network", "encoder"]
    means = table[~table.centred].groupby(keys)[experiment.nodes.TAP_COLUMNS].mean()  # not rounded yet
    means["snr_centred"] = table[table.centred].groupby(keys).snr.mean()
    return {key: part.droplevel(["tap", "network"]) for key, part in means.groupby(["tap", "network"])}


def assert_row(page: str, *cells: str) -> None:
    """Some table of the page has these cells side by side."""
    text = f"| {' | '.join(cells)} |"
    assert text in (paths.root() / "docs" / page).read_text(encoding="utf-8"), text


def growth(curve: pd.Series) -> float:
    """Last - first along the encoders."""
    return curve.iloc[-1] - curve.iloc[0]


def last(table: pd.DataFrame) -> pd.DataFrame:
    return table[table.encoder == table.encoder.max()]


# --- C1 to C3: nodes


def test_one_mechanism(run, curves):
    cct, cnn = curves["block", TRAINED], curves["conv", TRAINED]
    assert growth(cct.snr) > 1 and growth(cnn.snr) > 1
    assert all(1 < value < 1.4 for tap in ("block", "conv") for value in curves[tap, RANDOM].snr)
    shuffled = curves["conv", "shuffled"].offset_share, curves["block", "shuffled"].offset_share
    assert growth(shuffled[0]) < growth(cnn.offset_share) < 0  # without true labels the CNN's offset falls as much
    assert 0.4 < growth(shuffled[1]) / growth(cct.offset_share) < 0.5  # nearly half in the CCT
    tried = experiment.nodes.penalties(experiment.networks.cnn_half(run)).query("epochs == 8 and network == 'trained'")
    falls = tried.groupby("l2").snr_centred.agg(growth) < 0
    assert falls.index[~falls].tolist() == ["0.01"] and len(falls) == 4  # without offset, one penalty alone rises
    assert growth(cnn.snr_centred) < 0 < growth(cct.snr_centred) and growth(curves["ff2", TRAINED].snr_centred) < 0
    assert curves["attn", TRAINED].snr_centred.is_monotonic_increasing
    assert growth(cnn.internal_noise + cnn.external_noise) < 0
    twin = curves["conv", "calibrated"]
    assert growth(twin.accuracy) < 0 and twin.snr.max() < 1.6
    assert cnn.accuracy.idxmax() == 5 and len(cnn) == 8


def test_small_clusters(run, summary, curves):
    node = curves["block", TRAINED].iloc[-1]
    noise = (node.internal_noise + node.external_noise) / 9900  # share of the pairs of labels
    assert abs(node.labels_per_node / 100 / noise - node.snr) < 0.02  # SNR is S / N
    assert node.pooled_cluster_size < curves["block", RANDOM].pooled_cluster_size.iloc[-1]
    found = [experiment.nodes.matrices(run, seed, TRAINED).arrays("matrices")["7.block"] for seed in run.settings.seeds]
    for nodes in found:  # half of the clusters are single labels
        sizes = [len(cluster) for node in nodes for cluster in snp.label_clusters(node)]
        assert 0.46 < np.mean(np.array(sizes) == 1) < 0.52
    shuffled = pd.concat([curve.snr for (_, network), curve in curves.items() if network == "shuffled"])
    assert (shuffled - 1).abs().max() < 0.06
    pairs = summary["02_snr_per_encoder"]["clustered pairs"]
    assert pairs["share of pairs in one superclass"] > pairs["permuted names, largest"]
    named = experiment.nodes.cluster_pairs(run)[0].set_index(["label", "other"]).nodes
    assert named.idxmax() == ("oak_tree", "palm_tree")


def test_noise_outside_of_clusters(run):
    taps = experiment.nodes.snr(run)[0]
    outside = taps[~taps.centred & taps.tap.isin(["attn", "block", "ff2"])]
    keys = ["threshold", "tap", "encoder", "seed"]
    outside = outside.pivot_table(index=keys, columns="network", values="snr_external")
    margin = outside[TRAINED] - outside[RANDOM]
    assert (margin.loc[0.3, "attn", 1] > 0).tolist() == [True, False, False]  # the first encoder's heads: one of three
    assert (margin.loc[[0.1, 0.2], "attn", 1] < 0).all()
    assert (margin.loc[0.3].drop(("attn", 1)) > 0.1).all()  # everywhere else
    for _, part in taps[~taps.centred & (taps.tap == "block")].groupby("threshold"):
        curve = part.pivot_table(index="network", columns="encoder", values="snr_external")
        assert claims.sharper(curve.loc[TRAINED].to_numpy(), curve.loc[RANDOM].to_numpy())


def test_sharpening(run):
    taps = experiment.nodes.snr(run)[0]
    main = taps[(taps.threshold == run.settings.threshold) & ~taps.centred & (taps.network == TRAINED)]
    block, ff2 = (
        main[main.tap == tap].pivot(index="encoder", columns="seed", values="snr").diff().iloc[1:]
        for tap in ("block", "ff2")
    )
    assert (block.drop(4) > 0).all(axis=None) and (block.loc[4].abs() < 0.01).sum() == 2 and block.loc[4].max() > 0
    assert (ff2.iloc[-1] < 0).sum() == 2  # at the last encoder ff2 falls in two networks, block in none
    at = claims.at_thresholds(taps).sharpens.astype(bool)
    assert at[["attn", "block"]].all() and at[["ff2"]].index[~at[["ff2"]]].tolist() == [("ff2", 0.6)]
    after = experiment.nodes.after_the_last_encoder(taps, run.settings.threshold).loc[TRAINED].reset_index()
    after = after.groupby("tap").snr.last()
    assert after.norm < after.block < after.weighed and after.pooled < after.seqpool


def converging(run, l2, lengths):
    """(network, encoder, epochs) -> accuracy, snr, as `benchmarks/convergence.py` left them; the page has them too."""
    path = run.output.parent / "benchmarks" / f"convergence-{l2}.csv"
    found = pd.read_csv(path).set_index(["network", "encoder", "epochs"])
    assert sorted(found.index.unique("epochs")) == lengths
    for epochs in lengths:
        cells = []
        for network in (TRAINED, RANDOM):
            part = found.loc[network].xs(epochs, level="epochs")
            cells += [", ".join(f"{100 * value:.1f}" for value in part.accuracy)]
            cells += [", ".join(f"{value:.2f}" for value in part.snr)]
        assert_row("findings.md", str(epochs), *cells)
    return found


def spread_of_snr(run):
    """(network, encoder) -> largest SNR of `block` less the smallest, over seeds."""
    table = experiment.nodes.snr(run)[0].query("tap == 'block' and not centred")
    by_place = table[table.threshold == run.settings.threshold].groupby(["network", "encoder"]).snr
    return by_place.max() - by_place.min()


def test_convergence_of_readouts_with_a_larger_penalty(run):
    found = converging(run, "0.01", [8, 16])
    moved = found.groupby(["network", "encoder"]).diff().dropna().droplevel("epochs").abs()
    assert (moved.snr < spread_of_snr(run)[moved.index]).all()  # less than seeds differ
    snr = found.snr.unstack("encoder").loc[TRAINED]
    assert (snr[7] - snr[1]).min() > 1.26  # what the readouts of the page give


def test_convergence_of_readouts(run):
    found = converging(run, "0.001", [4, 8, 16, 32])
    moved = found.groupby(["network", "encoder"]).diff().query("epochs > 8").abs().groupby("network").max()
    assert moved.accuracy[TRAINED] < 0.006 and moved.snr[TRAINED] > spread_of_snr(run)[TRAINED, 7]
    snr = found.snr.unstack("encoder")
    grown = snr[7] - snr[1]
    assert grown[TRAINED].min() > 1.26 and grown[RANDOM].max() < 0.05


# --- C4: pruning


def test_pruned_readouts(run):
    table = experiment.pruning.pruned_readouts(run).query("tap == 'block' and threshold == 0.3")
    means = table.groupby("method")[["whole", "accuracy"]].mean()
    assert means.whole.andc > means.accuracy.andc > means.accuracy[CONTROLS].max()


@pytest.fixture(scope="module")
def pruned(run):
    """pruned(seed, layers, threshold): a stage that is asked for asks for all that it was made from."""
    return functools.cache(lambda *part: experiment.pruning._pruning(run, *part).table("pruning"))


def test_pruned_ff_layers(run, pruned):
    seeds = run.settings.seeds
    ff = pd.concat([pruned(seed, "ff", at) for seed in seeds for at in run.settings.prune_thresholds])
    by_seed = ff.groupby(["threshold", "seed", "method"])[["loss", "retrained_loss"]].mean().unstack("method")
    early, again = by_seed.loss.loc[:0.3], by_seed.retrained_loss.dropna(subset="andc")
    assert (early.andc > early[CONTROLS].max(axis=1)).all()  # straight after pruning worse than chance
    assert (again.loc[0.4, CONTROLS].min(axis=1) > again.loc[0.4, "andc"]).all()  # retrained better, in every seed
    level = again.loc[:0.3, "andc"] - again.loc[:0.3, CONTROLS].min(axis=1)
    assert level.min() > -1e-6 and level.max() < 0.01  # with fewer removed about level
    holds = claims.largest_dilutions(ff).loc["ff"]
    assert holds.straight.isna().all() and set(holds.index[holds.retrained.notna()]) == {"activation", "magnitude"}
    answers = [experiment.pruning.unpruned(run, seed).arrays("answers") for seed in seeds]
    costs = [(part["intact"].float().mean() - part["retrained"].float().mean()).item() for part in answers]
    usual = again.loc[(0.25, seeds[0]), ["magnitude", "activation"]] + costs[0]
    assert (usual > 0.005).all()  # against the network that was not retrained, more than the rule allows
    at = ff.groupby(["threshold", "method"])[["dilution", "accuracy", "loss"]].mean().unstack("method")
    deep = at[at.dilution.andc >= 0.5]
    assert deep.accuracy.loc[deep.loss.andc.idxmin()].max() < 0.1  # hardly anything is left of any network
    columns = ["accuracy", "kept_means_accuracy"]
    why = experiment.pruning.why_ff(run).groupby(["method", "threshold"])[columns].mean()
    plain, kept = why.accuracy, why.kept_means_accuracy
    assert (kept.andc > kept[CONTROLS].unstack("method").max(axis=1)).all()  # it is the means that ANDC misses
    assert (kept.andc - plain.permuted).abs().max() < 0.03


def test_pruned_classifier(run, pruned):
    thresholds = run.settings.prune_thresholds[::2]
    table = pd.concat([pruned(seed, "classifier", at) for seed in run.settings.seeds for at in thresholds])
    by_seed = table.groupby(["threshold", "method", "seed"]).retrained_loss.mean()
    lost = by_seed.groupby(["threshold", "method"]).mean().unstack("method")
    usual = lost[["magnitude", "activation"]]
    assert (usual.max(axis=1) < lost.andc).loc[:0.4].all() and (usual.min(axis=1) > lost.andc).loc[0.5:].all()
    *_, straight, alone = claims.pruning(table, "cifar100")
    assert (straight["verdict"], alone["verdict"]) == ("not supported", "supported")


def test_dilution_of_single_layers(run):
    """Masks grow with depth: ANDC removes more of each layer of the last encoder than of any of the first."""
    for seed in run.settings.seeds:
        network, _ = experiment.networks.load_network(run, seed, TRAINED)
        found, pairs = experiment.pruning.label_sets(run, seed).arrays("sets"), andc.connections(network, "ff")
        for at in (0.2, 0.3):
            masks = andc.andc_masks(andc.sets_at(at, found, pairs), pairs)
            first, final = (
                [andc.dilution({name: mask}) for name, mask in masks.items() if f"blocks.{encoder}." in name]
                for encoder in (0, 6)
            )
            assert max(first) < min(final)


def test_pruned_filters(summary):
    results = summary["05_cnn_counterpart"]
    table = pd.read_csv(paths.root() / "figures" / "cifar100-cpu" / "cnn_accuracy_against_dilution.csv")
    lost = table.groupby(["threshold", "method"]).retrained_loss.mean().unstack("method").dropna()
    assert (lost.andc > lost[CONTROLS].max(axis=1)).all() and (lost.magnitude < lost.andc).all()
    signs = pd.DataFrame(results["pruned kernels"]).set_index("threshold").loc[lost.index[0]]
    assert signs["negative removed"] > signs["negative kept"]
    why = pd.DataFrame(results["why"]).query(f"threshold == {lost.index[0]}").set_index("method")
    assert why.accuracy["same signs"] > why.accuracy.andc
    assert (why.refreshed_accuracy > why.accuracy).all()


# --- C5 and C6: heads, and accuracy from nodes


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
    labels, encoders, _ = experiment.heads.head_division(run)
    labels, encoders = (table[table.network == TRAINED] for table in (labels, encoders))
    above = encoders.eval("gap > gap_null_high").groupby(encoders.encoder).sum()
    assert above.tolist() == [1, 1, 1, 3, 3, 3, 3]  # of three networks, encoder by encoder
    along = encoders.groupby("encoder")[["gap", "own_drop", "other_drop"]].mean()
    bounds = [dealt_bound(labels[labels.encoder == at]) for at in (1, 2, 3)]
    assert (along.gap.iloc[:3] > bounds).all()  # on average over seeds more than dealt owners
    assert along.own_drop.iloc[-1] > 0 > along.other_drop.iloc[-1]
    final = last(labels)
    owner = final.owner_unseen.astype(bool)
    assert final[owner].alone_accuracy.mean() > final[~owner].alone_accuracy.mean()
    owners = final[owner].pivot(index="label", columns="seed", values="head")
    pairs = [(owners[a], owners[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    same = np.mean([(one == other).mean() for one, other in pairs])
    shares = [[one.value_counts(normalize=True) for one in pair] for pair in pairs]
    assert abs(same - np.mean([(one * other).sum() for one, other in shares])) < 0.005  # as many as by chance
    alike = last(pd.DataFrame(summary["04_head_modus_vivendi"]["stability"]))
    assert (alike.overlap > alike.chance_high).sum() == 2 and len(alike) == 3  # two of three pairs of seeds


def test_cooperation(run):
    table = experiment.heads.cooperation(run)
    means = last(table).groupby(["nodes", "size"]).mean(numeric_only=True)
    assert (means.own <= means.singles + 1e-6).all()  # every set answers less than its single nodes, added up
    along = heads.summary_of_cooperation(table)
    above, more = along.own - along.own_high, along.own - along.own_dealt
    assert above[7] > 0 and above[6] > 0.02 > above[2] > 0.01 and above[[3, 4, 5]].abs().max() < 0.003
    assert more[1] < 0  # in the first encoder below dealt nodes
    assert abs(along.choice[7] - along.choice_high[7]) < 0.002  # among own labels no better than dealt nodes may be


def test_accuracy_from_nodes(run, summary):
    sizes = pd.DataFrame(summary["02_snr_per_encoder"]["predictions"]).set_index("size")
    assert sizes.error_predicted.iloc[-1] > sizes.error_only_size.iloc[-1]  # whole encoders: worse than the baseline
    table = experiment.nodes.macroscopic_accuracies(run)
    table = table[table.encoder > 1].assign(missed=(table.predicted - table.measured).abs())
    by_encoder = table[table["size"] == 64].groupby("encoder").missed.mean()
    assert by_encoder.idxmin() == 5 and by_encoder.idxmax() == 7
    whole = last(table[table["size"] == table["size"].max()])
    assert (whole.predicted > 0.99).all() and (whole.measured < 0.7).all()


# --- Flowers-102: from what is committed of it


def test_flowers(flowers):
    rows = flowers["verdicts"]
    taps = pd.read_csv(paths.root() / "figures" / "flowers102-cpu" / "snr_per_encoder.csv")
    assert {row["verdict"].split(" (")[0] for row in rows} == {"not tested"} and taps.seed.nunique() == 1
    at = taps[(taps.threshold == 0.3) & ~taps.centred].sort_values("encoder").groupby(["tap", "network"])
    accuracy, snr = ({key: list(values) for key, values in at[column]} for column in ("accuracy", "snr"))
    block, ff2 = snr["block", TRAINED], snr["ff2", TRAINED]
    assert accuracy["block", TRAINED] == sorted(accuracy["block", TRAINED])  # a little more in each encoder
    assert all(more > less for more, less in zip(block, snr["block", RANDOM], strict=True))
    assert all(2.8 < value < 2.9 for value in block[3:])  # grows early
    assert ff2[1:] == sorted(ff2[1:], reverse=True) and max(ff2) == ff2[1]
    shuffled = [abs(value - 1) for (_, network), values in snr.items() if network == "shuffled" for value in values]
    assert max(shuffled) < 0.085  # what the page rounds to 8 %
    outside = taps[~taps.centred & (taps.tap == "block")]
    outside = outside.pivot(index=["threshold", "network"], columns="encoder", values="snr_external")
    assert outside.loc[0.3, TRAINED].is_monotonic_increasing
    for threshold in outside.index.unique("threshold"):
        assert claims.sharper(*(outside.loc[threshold, network].to_numpy() for network in (TRAINED, RANDOM)))
    for (tap, threshold), part in taps[~taps.centred & taps.tap.isin(["block", "ff2"])].groupby(["tap", "threshold"]):
        trained, random = (part[part.network == kind].sort_values("encoder").snr for kind in (TRAINED, RANDOM))
        if tap == "block":
            assert claims.sharper(trained.to_numpy(), random.to_numpy()) == (threshold > 0.45)
        else:
            assert growth(trained) < 0


def test_heads_of_flowers(flowers):
    results = flowers["results"]["04_head_modus_vivendi"]
    encoders = pd.DataFrame(results["encoders"])
    along, random = (encoders[encoders.network == network].set_index("encoder") for network in (TRAINED, RANDOM))
    rows = [row for row in flowers["verdicts"] if row["claim"] == "C5"]
    assert {row["verdict"] for row in rows} == {"not tested (n = 1; rule met so far)"}
    assert (along.z > 8).all() and along.excess.idxmax() == 7 and random.z.max() < 3
    assert list(along.index[along.gap <= along.gap_null_high]) == [1, 3]
    assert abs(along.first_mean_gap[1]) < 0.0005  # with the head at its mean
    whole = pd.DataFrame(results["cooperation"]).set_index("encoder")
    assert (whole.own < whole.own_dealt)[:6].all() and whole.own[7] < whole.own_high[
        7
    ]  # no better than dealt ones may be
    assert abs(whole.choice[7] - whole.choice_dealt[7]) < 0.02  # among own labels hardly other than dealt nodes


def test_pruning_of_flowers(flowers):
    results = flowers["results"]["03_andc_pruning"]
    rows = [row for row in flowers["verdicts"] if row["claim"] == "C4" and "FF layers" in row["statistic"]]
    assert [row["verdict"] for row in rows] == 2 * ["not tested (n = 1; rule not met so far)"]
    table = pd.DataFrame(results["pruning"]).pivot(index=["layers", "threshold"], columns="method").loc["ff"]
    straight = table.loss.andc - table.loss[CONTROLS].max(axis=1)
    assert (straight.loc[:0.4] > 0).all() and (straight.loc[0.5:] < 0).all()  # worse than chance, deep better
    largest = pd.DataFrame(results["largest"]).set_index(["layers", "method"])
    assert list(largest.loc["ff"].retrained.dropna().index) == ["activation", "magnitude"]
    best = table.retrained_loss[CONTROLS].min(axis=1) - table.retrained_loss.andc
    assert (best.dropna() > 0).all() and best.max() < rows[1]["uncertainty"]  # better, but not beyond the error
    why = pd.DataFrame(results["why"]).query("threshold == 0.3").set_index("method").kept_means_accuracy
    assert why.andc > why[CONTROLS].max()


def test_cnn_of_flowers(flowers):
    results = flowers["results"]["05_cnn_counterpart"]
    table = pd.DataFrame(results["taps"]).query("tap == 'conv'").pivot(index="encoder", columns="network", values="snr")
    assert table[TRAINED][:2].max() < table.loc[:2, [RANDOM, "calibrated"]].to_numpy().min()
    accuracy, snr = (row for row in flowers["verdicts"] if row["claim"] == "C1")
    assert "rule met so far" in accuracy["verdict"] and "rule not met so far" in snr["verdict"]
    for row in (accuracy, snr):
        assert "holds" in row["notes"].partition("CNN")[2] and "fails" not in row["notes"].partition("CNN")[2]


# --- tables of docs/speed.md


def test_training_with_mixed_images():
    """A training curve that is committed without its network."""
    folder = paths.root() / "figures" / "cifar100-cpu" / "benchmarks"
    curve = pd.read_csv(folder / "mixed-42-epochs.csv").set_index("epoch")
    shown = curve.loc[[6, 12, 18, 24, 30, 36, 42]]
    assert_row("speed.md", "training loss", *(f"{x:.2f}" for x in shown.loss))
    assert_row("speed.md", "test accuracy (%)", *(f"{100 * x:.1f}" for x in shown.test_accuracy))
    assert curve.test_accuracy.dropna().gt(0.7).idxmax() == 36 and curve.lr[36] < curve.lr.max() / 6


def test_seconds_of_readouts():
    for profile, stage in (
        ("cifar100-cpu", "readouts-trained-seed0"),
        ("cifar100-cpu", "penalties-trained-seed0"),
        ("flowers102-cpu", "readouts-trained-seed0"),
        ("flowers102-cpu", "heads-trained-seed0"),
    ):
        cost = files.read_json(paths.root() / "figures" / profile / "summary.json")["stages"][stage]
        assert_row("speed.md", f"{cost['seconds']:,.0f}", f"{cost['peak_gb']:.1f}")
