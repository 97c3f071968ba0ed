"""The rules of the verdicts, on tables whose answer is known."""

import re

import numpy as np
import pandas as pd
import pytest
import torch

from paperlib import claims

L = 100


def nodes_table(seeds, trained, random, spread=0.0):
    """Nodes with 10 labels each; the SNR along the encoders is given by the noise that it implies."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(seeds):
        for kind, snrs in (("trained", trained), ("random", random)):
            for tap in ("attn", "block", "ff2"):
                for encoder, snr in enumerate(snrs, start=1):
                    ones = (L - 1) * 10 / snr * (1 + spread * rng.standard_normal(200))
                    part = {"seed": seed, "network": kind, "encoder": encoder, "tap": tap, "node": range(200)}
                    rows.append(pd.DataFrame({**part, "labels": 10, "clusters": 5, "internal": 0.0, "external": ones}))
    return pd.concat(rows, ignore_index=True)


def answers(seeds, trained, random):
    """Right answers of 2,000 images for accuracies along the encoders."""
    return {
        (seed, kind, f"{encoder}.block"): torch.arange(2000) < 2000 * accuracy
        for seed in range(seeds)
        for kind, accuracies in (("trained", trained), ("random", random))
        for encoder, accuracy in enumerate(accuracies, start=1)
    }


def penalty_table(trained=(0.1, 0.2, 0.3), random=(0.1, 0.1, 0.1), **others):
    """Accuracy and SNR at three encoders for two penalties; others: penalty -> curve of the trained network."""
    rows = []
    for value in ("0.001", "0.01", *others):
        for kind, curve in (("trained", others.get(value, trained)), ("random", random)):
            for encoder, number in zip((1, 4, 7), curve, strict=True):
                for tap in ("attn", "block", "ff2"):
                    row = {"network": kind, "encoder": encoder, "tap": tap, "l2": value, "epochs": 4}
                    rows.append({**row, "accuracy": number, "snr": 10 * number})
    return pd.DataFrame(rows)


RISING, FLAT = [2.0, 2.5, 3.0, 4.0], [1.3, 1.3, 1.3, 1.3]


@pytest.mark.parametrize(
    ("seeds", "data", "word"),
    [
        (3, "cifar100", "supported"),
        (2, "cifar100", "not tested (n = 2; rule met so far)"),
        (3, "glyphs100", "demonstration (rule met, n = 3)"),
    ],
)
def test_who_may_say_supported(seeds, data, word):
    nodes = nodes_table(seeds, RISING, FLAT, spread=0.1)
    row, size = claims.clusters(nodes, data, L)
    assert row["verdict"] == size["verdict"] == word
    assert row["n"] == seeds
    assert row["effect"] == pytest.approx(0.7, abs=0.1)


def test_clusters_must_be_small():
    nodes = nodes_table(3, RISING, FLAT).assign(labels=20, clusters=1.8)
    noise, size = claims.clusters(nodes, "cifar100", L)
    assert noise["verdict"] == "supported" and size["verdict"] == "not supported"
    assert size["effect"] == pytest.approx(10 - 20 / 1.8)


def test_one_uncertain_encoder_is_enough_to_doubt():
    """The smallest excess is certain, but that of another encoder is not."""
    nodes = nodes_table(3, [2.0, 2.1, 3.0, 4.0], FLAT)
    second = (nodes.encoder == 2) & (nodes.network == "trained")  # 2 of its 200 nodes make all its noise
    nodes.loc[second, "external"] *= np.where(nodes[second].node < 2, 100, 0)
    row, _ = claims.clusters(nodes, "cifar100", L)
    assert row["effect"] > 0 and row["verdict"] == "not supported"


def test_clusters_need_every_encoder_above_the_null():
    nodes = nodes_table(3, [2.0, 1.2, 3.0, 4.0], FLAT)
    row, _ = claims.clusters(nodes, "cifar100", L)
    assert row["verdict"] == "not supported"
    assert row["effect"] < 0


@pytest.mark.parametrize(
    ("curve", "word"),
    [
        (RISING, "supported"),
        (RISING[::-1], "not supported"),
        ([2.0, 3.0, 4.0, 1.9], "not supported"),  # rises, but ends below its start
        (FLAT, "not supported"),
    ],
)
def test_sharpening_needs_trend_and_growth(curve, word):
    nodes = nodes_table(3, curve, FLAT, spread=0.1)
    correct = answers(3, [c / 10 for c in curve], [0.1] * 4)
    rows = claims.sharpening(nodes, correct, "cifar100", L, penalty_table())
    trend = f"rank trend {claims.rank_trend(np.array(curve)):.2f} ["
    assert all(row["notes"].count("[") == 3 for row in rows)  # one a seed
    assert curve == FLAT or all(row["notes"].startswith(trend) for row in rows)
    assert [row["statistic"].split(",")[0] for row in rows] == [
        "accuracy of block",
        "SNR of attn",
        "SNR of block",
        "SNR of ff2",
    ]
    assert {row["verdict"] for row in rows} == {word}


def test_sharpening_must_exceed_the_random_networks():
    nodes = nodes_table(3, RISING, [1.0, 2.0, 3.0, 5.0], spread=0.1)
    rows = claims.sharpening(nodes, answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4), "cifar100", L, penalty_table())
    assert {row["verdict"] for row in rows[1:]} == {"not supported"}
    assert rows[0]["verdict"] == "supported"


@pytest.mark.parametrize(
    ("curve", "random"),
    [((0.3, 0.4, 0.2), (0.1, 0.1, 0.1)), ((0.1, 0.2, 0.3), (0.1, 0.3, 0.5)), ((0.2,) * 3, (0.1,) * 3)],
)
def test_one_penalty_without_sharpening_decides(curve, random):
    nodes, correct = nodes_table(3, RISING, FLAT, spread=0.1), answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    rows = claims.sharpening(nodes, correct, "cifar100", L, penalty_table(random=random, code=curve))
    assert {row["verdict"] for row in rows} == {"not supported"}
    assert all("fails for the penalties" in row["notes"] and "code" in row["notes"] for row in rows)


def test_nothing_rises_more_than_a_perfect_trend():
    """Where the random network rises steadily too, how far decides."""
    assert claims.sharper(np.array([1.0, 2.0, 3.0]), np.array([1.3, 1.305, 1.31]))
    assert not claims.sharper(np.array([1.0, 1.1, 1.2]), np.array([1.0, 2.0, 3.0]))
    assert not claims.sharper(np.array([1.0, 3.0, 2.0]), np.array([1.3, 1.305, 1.31]))
    assert not claims.sharper(np.array([3.0, 2.0, 1.0]), np.array([4.0, 2.0, 1.0]))


def test_a_claim_is_supported_in_part_where_some_rows_are():
    def rows(*words):
        return [{"verdict": word, "statistic": f"row {i}, and more", "beside": False} for i, word in enumerate(words)]

    assert claims.of_claim(rows("supported", "supported")) == "supported"
    assert claims.of_claim(rows("not supported", "not supported")) == "not supported"
    assert claims.of_claim(rows("supported", "not supported")) == "supported in part (not: row 1)"
    assert claims.of_claim(rows("supported", "not tested (no dilution)")) == "supported in part (not tested: row 1)"
    three = claims.of_claim(rows("supported", "not supported", "not tested (why)"))
    assert three == "supported in part (not: row 1, not tested: row 2)"
    many = claims.of_claim(rows("supported", *["not supported"] * 2, "not tested (why)", "supported"))
    assert many == "supported in part (2 of 5 rows)"
    assert claims.of_claim(rows("not supported", "not tested (why)")) == "not supported"
    assert claims.of_claim(rows("not tested (n = 1; rule met so far)", "not tested (why)")) == "not tested"
    demonstrated = rows("demonstration (rule met, n = 1)", "demonstration (rule not met, n = 1)", "not tested (why)")
    assert claims.of_claim(demonstrated) == "demonstration (1 of 2 rules met)"
    beside = [{"verdict": "not supported", "statistic": "", "beside": True}]
    assert claims.of_claim(rows("supported", "supported") + beside) == "supported"


def test_block_decides_whether_features_sharpen():
    nodes, correct = nodes_table(3, RISING, FLAT, spread=0.1), answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    rows = claims.sharpening(nodes, correct, "cifar100", L, penalty_table())
    assert [row["beside"] for row in rows] == [False, True, False, True]  # accuracy and SNR of block


def test_a_failed_part_of_c4_is_named():
    table = retrained_table(0.02)
    assert claims.of_claim(claims.pruning(table, "cifar100")) == (
        "supported in part (not: accuracy lost right after pruning by ANDC of the FF layers)"
    )


def test_conclusions_at_other_thresholds():
    rows = [
        {"threshold": at, "tap": "block", "centred": False, "seed": seed, "network": kind, "encoder": encoder}
        | {"snr": base + step * encoder + seed}
        for at, kind, base, step in (
            (0.3, "trained", 2.0, 0.5), (0.3, "random", 1.0, 0.1),
            (0.5, "trained", 2.0, -0.5), (0.5, "random", 3.0, 0.1),
        )
        for seed in (0, 1)
        for encoder in (1, 2, 3)
    ]  # fmt: skip
    found = claims.at_thresholds(pd.DataFrame(rows))
    assert found.loc["block", 0.3].to_dict() == {
        "above random": 1.4, "last - first": 1.0, "random network's": 0.2, "sharpens": True,
    }  # fmt: skip
    assert found.loc["block", 0.5]["above random"] == pytest.approx(-2.8) and not found.loc["block", 0.5].sharpens


def test_a_tap_without_clusters_has_no_small_ones():
    nodes = nodes_table(3, RISING, FLAT)
    nodes.loc[(nodes.tap == "ff2") & (nodes.network == "trained"), ["labels", "clusters"]] = 0
    _, size = claims.clusters(nodes, "cifar100", L)
    assert size["effect"] == L / 10 - L and size["verdict"] == "not supported"


def test_rows_tell_every_seed():
    row, _ = claims.clusters(nodes_table(3, RISING, FLAT, spread=0.1), "cifar100", L)
    assert len(row["by_seed"]) == 3 and all(low <= effect <= high for effect, low, high in row["by_seed"])
    assert np.mean([effect for effect, _, _ in row["by_seed"]]) == pytest.approx(row["effect"], abs=1e-5)
    assert "by_seed" not in claims.table([row]).columns


def test_penalties_count_after_all_epochs():
    early = penalty_table((0.3, 0.2, 0.1)).assign(epochs=2)  # readouts that have not converged
    table = pd.concat([early, penalty_table()])
    nodes, correct = nodes_table(3, RISING, FLAT, spread=0.1), answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    rows = claims.sharpening(nodes, correct, "cifar100", L, table)
    assert {row["verdict"] for row in rows} == {"supported"}
    assert "holds for the penalties 0.001, 0.01" in rows[0]["notes"]
    assert "moves by 0.200 at most from 2 to 4 epochs" in rows[0]["notes"]
    assert "last - first" in rows[0]["notes"]
    rows = claims.sharpening(nodes, correct, "cifar100", L, table[table.tap == "block"])
    assert ["penalties" in row["notes"] for row in rows] == [True, False, True, False]  # accuracy, attn, block, ff2


def test_a_tap_without_depth_has_no_row():
    nodes = nodes_table(3, RISING, FLAT)
    stem = nodes[(nodes.tap == "attn") & (nodes.encoder == 1)].assign(tap="stem", encoder=0)
    correct = answers(3, [0.1] * 4, [0.1] * 4)
    rows = claims.sharpening(pd.concat([nodes, stem]), correct, "cifar100", L, penalty_table())
    assert len(rows) == 4


def pruning_table(seeds, loss, control_loss, dilution=0.6, error=0.001):
    rows = [
        {"seed": seed, "layers": "ff", "method": method, "threshold": 0.3, "draw": draw}
        | {"dilution": dilution, "loss_se": error}
        | {"loss": loss if method == "andc" else control_loss, "retrained_loss": np.nan, "retrained_loss_se": np.nan}
        for seed in range(seeds)
        for method, draws in (("andc", 1), ("random", 2), ("permuted", 2), ("magnitude", 1))
        for draw in range(draws)
    ]
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"loss": 0.004, "control_loss": 0.05}, "supported"),
        ({"loss": 0.006, "control_loss": 0.05}, "not supported"),  # more than half a point
        ({"loss": 0.004, "control_loss": 0.003}, "not supported"),  # controls lose less
        ({"loss": 0.004, "control_loss": 0.05, "error": 0.01}, "not supported"),  # too uncertain
        ({"loss": 0.004, "control_loss": 0.05, "error": 0.005}, "not supported"),  # seeds share their test images
        ({"loss": -0.01, "control_loss": 0.05}, "supported"),  # a gain needs no sign agreement
        ({"loss": 0.0, "control_loss": 0.05, "dilution": 0.4}, "not tested (no dilution of 50 % or more)"),
    ],
)
def test_pruning_rule(arguments, word):
    straight, retrained = claims.pruning(pruning_table(3, **arguments), "cifar100")
    assert straight["verdict"] == word
    assert retrained["verdict"].startswith("not tested")


def test_some_dilution_is_enough_for_c4():
    """The cheapest of those that keep the rule; if none does, the cheapest of all."""
    good = pruning_table(3, 0.004, 0.05)
    deep = pruning_table(3, 0.3, 0.9, dilution=0.9).assign(threshold=0.5)
    cheap = pruning_table(3, 0.001, 0.001, dilution=0.5).assign(threshold=0.2)  # costs less, beats nothing
    row = claims.pruning(pd.concat([cheap, good, deep]), "cifar100")[0]
    assert row["verdict"] == "supported" and "(dilution 0.60)" in row["statistic"] and row["effect"] == 0.004
    none = pd.concat([deep, pruning_table(3, 0.02, 0.05), deep.assign(threshold=0.6)])
    row = claims.pruning(none, "cifar100")[0]
    assert row["verdict"] == "not supported" and row["effect"] == 0.02


def test_the_classifier_does_not_decide_c4():
    table = pd.concat([pruning_table(3, 0.2, 0.3), pruning_table(3, 0.0, 0.3).assign(layers="classifier")])
    rows = claims.pruning(table, "cifar100")
    assert [row["beside"] for row in rows] == [False, False, True, True]
    assert rows[0]["verdict"] == "not supported" and rows[2]["verdict"] == "supported"
    assert "of the classifier (dilution 0.60)" in rows[2]["statistic"]
    assert rows[3]["statistic"].startswith("accuracy lost after a training of it alone by ANDC of the classifier")
    assert claims.of_claim(rows) == "not supported"


def test_largest_dilutions():
    """ANDC holds up to 0.6 and random masks up to 0.3; an uncertain mean does not hold."""
    parts = [
        pruning_table(3, ours, control, dilution, error).assign(threshold=dilution)
        for dilution, ours, control, error in ((0.3, 0.0, 0.004, 1e-3), (0.6, 0.004, 0.02, 1e-3), (0.8, 0.0, 0.0, 0.01))
    ]
    found = claims.largest_dilutions(pd.concat(parts))
    assert found.straight.to_dict() == {
        ("ff", "andc"): 0.6, ("ff", "magnitude"): 0.3, ("ff", "permuted"): 0.3, ("ff", "random"): 0.3,
    }  # fmt: skip
    assert found.retrained.isna().all()


def heads_table(excess, random_excess, gap_low):
    rows = []
    for seed in range(3):
        for kind, value in (("trained", excess), ("random", random_excess)):
            row = {
                "seed": seed,
                "network": kind,
                "excess": value,
                "excess_low": value - 0.05,
                "excess_high": value + 0.05,
            }
            row |= {"gap": gap_low + 0.01, "gap_low": gap_low, "gap_high": gap_low + 0.02}
            rows.append(row | {"gap_null_high": 0.005})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0.3, 0.0, 0.01), ["supported", "supported"]),
        ((0.3, 0.4, 0.01), ["not supported", "supported"]),
        ((0.04, 0.0, -0.001), ["not supported", "not supported"]),
        ((0.3, 0.0, -0.006), ["supported", "not supported"]),  # not above owners dealt at random
    ],
)
def test_modus_vivendi_rule(arguments, words):
    assert [row["verdict"] for row in claims.modus_vivendi(heads_table(*arguments), "cifar100")] == words


def subsets_table(predict, seeds=3):
    """Encoders 1..3, subsets whose accuracy grows with size and encoder; the prediction is a function of the truth."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(seeds):
        for encoder in (1, 2, 3):
            for size in (4, 16, 64):
                for _ in range(20):
                    truth = 0.05 * np.log2(size) + 0.05 * encoder + rng.uniform(0, 0.02)
                    row = {"seed": seed, "encoder": encoder, "size": size, "measured": truth}
                    rows.append({**row, "predicted": predict(truth, rng), "only_size": 0.05 * np.log2(size) + 0.06})
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("predict", "words"),
    [
        (lambda truth, rng: truth + 0.01, ["supported", "supported"]),
        (lambda truth, rng: truth + 0.2, ["supported", "not supported"]),  # right order, wrong height
        (lambda truth, rng: 0.3 + 0.02 * rng.standard_normal(), ["not supported", "not supported"]),
    ],
)
def test_macroscopic_rule(predict, words):
    rows = claims.macroscopic(subsets_table(predict), "cifar100")
    assert [row["verdict"] for row in rows] == words and all(row["claim"] == "C6" for row in rows)


def test_macroscopic_rule_looks_beyond_encoder_1():
    table = subsets_table(lambda truth, rng: truth)
    table.loc[table.encoder == 1, "predicted"] = 0.0
    assert [row["verdict"] for row in claims.macroscopic(table, "cifar100")] == ["supported", "supported"]


def test_rank_agreement_is_spearmans():
    points = np.random.default_rng(1).normal(size=(3, 30, 3)).round(1)  # with ties
    expected = [pd.DataFrame(sample).corr(method="spearman").iloc[0, 1] - 0.8 for sample in points]
    np.testing.assert_allclose(claims._rank_agreement(points), expected)


def test_rank_trend():
    assert claims.rank_trend(np.array([1.0, 2.0, 5.0])) == pytest.approx(1)
    assert claims.rank_trend(np.array([5.0, 2.0, 1.0])) == pytest.approx(-1)
    assert claims.rank_trend(np.ones(3)) == 0


@pytest.mark.parametrize(
    ("curve", "word"), [(RISING, "supported"), (RISING[::-1], "not supported"), (FLAT, "not supported")]
)
def test_cnn_and_transformer_must_agree(curve, word):
    """The CCT sharpens; C1 needs the CNN to do so too, and takes the smaller growth of the two."""
    cct, cnn = (nodes_table(3, shape, FLAT, spread=0.1) for shape in (RISING, curve))
    cct, cnn = cct[cct.tap == "block"].assign(half="cct"), cnn[cnn.tap == "block"].assign(half="cnn", tap="conv")
    correct = {"cct": answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)}
    cnn_answers = answers(3, [c / 10 for c in curve], [0.1] * 4)
    correct["cnn"] = {(s, k, name.replace("block", "conv")): v for (s, k, name), v in cnn_answers.items()}
    tried = {"cct": penalty_table(), "cnn": penalty_table().replace("block", "conv")}
    rows = claims.unified(pd.concat([cct, cnn]), correct, "cifar100", L, tried)
    assert [row["verdict"] for row in rows] == [word, word] and all(row["claim"] == "C1" for row in rows)
    assert rows[0]["effect"] == pytest.approx(min(0.3, (curve[-1] - curve[0]) / 10), abs=1e-3)
    tried["cnn"] = penalty_table(code=(0.3, 0.2, 0.1)).replace("block", "conv")  # one penalty fails in one half
    rows = claims.unified(pd.concat([cct, cnn]), correct, "cifar100", L, tried)
    assert {row["verdict"] for row in rows} == {"not supported"}
    assert all(
        re.search(r"CNN: -?[\d.]+ \(rank trend .*\), fails for the penalties code", row["notes"]) for row in rows
    )


def retrained_table(permuted_loss):
    """Three seeds as `experiment.pruning.pruning` retrains them: one draw of each control."""
    table = pruning_table(3, 0.1, 0.3)
    losses = {"andc": 0.002, "random": 0.02, "permuted": permuted_loss}
    measured = (table.draw == 0) & table.method.isin(losses)
    table.loc[measured, "retrained_loss"] = table.method.map(losses)
    table.loc[measured, "retrained_loss_se"] = 0.001
    return table


@pytest.mark.parametrize(
    ("permuted_loss", "word"),
    [(0.02, "supported"), (0.001, "not supported"), (0.004, "not supported")],  # the last: not by more than the errors
)
def test_every_control_must_be_beaten_by_more_than_the_errors(permuted_loss, word):
    assert claims.pruning(retrained_table(permuted_loss), "cifar100")[1]["verdict"] == word


@pytest.mark.parametrize(
    ("seeds", "n", "word"), [([0, 1, 2], 0, "not tested (no network was"), ([1, 2], 1, "not tested (n = 1")]
)
def test_seeds_without_every_control_do_not_count(seeds, n, word):
    table = retrained_table(0.02)
    table.loc[(table.method == "permuted") & table.seed.isin(seeds), "retrained_loss"] = np.nan
    straight, retrained = claims.pruning(table, "cifar100")
    assert retrained["n"] == n and retrained["verdict"].startswith(word)
    assert straight["n"] == 3


def test_an_error_that_is_not_known_is_no_certainty():
    table = pruning_table(3, 0.0, 0.05)
    table.loc[(table.method == "random") & (table.draw == 1), "loss_se"] = np.nan
    assert claims.pruning(table, "cifar100")[0]["verdict"].startswith("not tested")


def test_draws_that_share_the_images_are_as_certain_as_one_that_has_them_all():
    """Five draws of a fifth of the images each have errors that are sqrt(5) larger; their mean has not."""
    one = pruning_table(3, 0.003, 0.003, error=0.003)
    one = one[one.method.isin(["andc", "random"]) & (one.draw == 0)]
    draws = pd.concat([one[one.method == "random"].assign(draw=draw, loss_se=0.003 * 5**0.5) for draw in range(5)])
    found = claims.largest_dilutions(pd.concat([one[one.method == "andc"], draws]))
    assert found.straight.tolist() == [0.6, 0.6]


# --- in every seed: one that fails is enough


def one_seed_of(good, bad):
    """The good table with the rows of seed 1 taken from the bad one."""
    return pd.concat([good[good.seed != 1], bad[bad.seed == 1]]).sort_values("seed", kind="stable")


def words(rows):
    return [row["verdict"] for row in rows if not row["beside"]]


def c2(odd):
    good, bad = nodes_table(3, RISING, FLAT, spread=0.1), nodes_table(3, FLAT, RISING, spread=0.1)
    return claims.clusters(one_seed_of(good, bad) if odd else good, "cifar100", L)[:1]


def c3_null(odd):
    """Seed 1's network grows, its random twin more."""
    good, bad = nodes_table(3, RISING, FLAT, spread=0.1), nodes_table(3, RISING, [1, 2, 4, 9], spread=0.1)
    correct = answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    nodes = one_seed_of(good, bad) if odd else good
    return claims.sharpening(nodes, correct, "cifar100", L, penalty_table())[2:3]


def c4(odd):
    good, bad = pruning_table(3, 0.004, 0.05), pruning_table(3, 0.004, 0.004)
    return claims.pruning(one_seed_of(good, bad) if odd else good, "cifar100")[:1]


def c5_random(odd):
    good, bad = heads_table(0.3, 0.0, 0.01), heads_table(0.3, 0.4, 0.01)
    return claims.modus_vivendi(one_seed_of(good, bad) if odd else good, "cifar100")[:1]


def c5_dealt(odd):
    good = heads_table(0.3, 0.0, 0.01)
    return claims.modus_vivendi(good.assign(gap_null_high=0.005 + 0.1 * odd * (good.seed == 1)), "cifar100")[1:]


def c6(odd):
    good, bad = (subsets_table(lambda truth, rng, off=off: truth + off) for off in (0.01, 0.2))
    return claims.macroscopic(one_seed_of(good, bad) if odd else good, "cifar100")[1:]


@pytest.mark.parametrize("claim", [c2, c3_null, c4, c5_random, c5_dealt, c6], ids=lambda rule: rule.__name__)
def test_one_seed_that_fails_is_enough(claim):
    assert words(claim(False)) == ["supported"] and words(claim(True)) == ["not supported"]


def halves(cnn_random=FLAT, cnn_calibrated=FLAT, certain=True):
    """Nodes, right answers and penalties of a CCT that sharpens beyond doubt, and of a CNN that does so too unless one
    of its random twins or, where it is not certain, the two nodes that make all noise of its first and last layer are
    against it."""
    cct, cnn = nodes_table(3, RISING, FLAT), nodes_table(3, RISING, cnn_random)
    twin = nodes_table(3, RISING, cnn_calibrated)
    cnn = pd.concat([cnn, twin[twin.network == "random"].assign(network="calibrated")])
    ends = cnn.encoder.isin([1, 4]) & (cnn.network == "trained") & (not certain)
    cnn["external"] *= np.where(ends, 100 * (cnn.node < 2), 1)
    parts = (("cct", "block", cct), ("cnn", "conv", cnn))
    nodes = pd.concat([part[part.tap == "block"].assign(half=half, tap=tap) for half, tap, part in parts])
    right = answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    correct = {"cct": right, "cnn": {(s, k, name.replace("block", "conv")): r for (s, k, name), r in right.items()}}
    correct["cnn"] |= {(s, "calibrated", name): r for (s, k, name), r in correct["cnn"].items() if k == "random"}
    table = penalty_table()
    return nodes, correct, {"cct": table, "cnn": table[table.tap == "block"].assign(tap="conv")}


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ({}, "supported"),
        ({"cnn_random": [1, 2, 4, 9]}, "not supported"),
        ({"cnn_calibrated": [1, 2, 4, 9]}, "not supported"),
        ({"certain": False}, "not supported"),
    ],
    ids=["both", "the random twin grows more", "the calibrated twin grows more", "uncertain"],
)
def test_the_cnn_has_to_sharpen_as_surely_as_the_cct(case, word):
    nodes, correct, penalties = halves(**case)
    accuracy, snr = claims.unified(nodes, correct, "cifar100", L, penalties)
    assert accuracy["verdict"] == "supported" and snr["verdict"] == word
    assert snr["numbers"].startswith("CCT 2.00 to 4.00 ") and "; CNN 2.00 to 4.00 " in snr["numbers"]


def test_an_uncertain_trend_does_not_support():
    """First and last encoder are certain; two nodes make all the noise of those between: who knows their order?"""
    nodes, correct = nodes_table(3, RISING, FLAT), answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    between = nodes.encoder.isin([2, 3]) & (nodes.network == "trained")
    noisy = nodes.assign(external=nodes.external * np.where(between, 100 * (nodes.node < 2), 1))
    rows = [claims.sharpening(table, correct, "cifar100", L, penalty_table())[2] for table in (nodes, noisy)]
    assert [row["numbers"] for row in rows] == [rows[0]["numbers"]] * 2
    assert [row["verdict"] for row in rows] == ["supported", "not supported"]


def test_numbers_say_what_effects_were_made_from():
    nodes, correct = nodes_table(3, RISING, FLAT), answers(3, [0.1, 0.2, 0.3, 0.4], [0.1] * 4)
    rows = claims.sharpening(nodes, correct, "cifar100", L, penalty_table())
    assert rows[0]["numbers"] == "0.10 to 0.40 (random weights 0.10 to 0.10)"
    assert rows[2]["numbers"] == "2.00 to 4.00 (random weights 1.30 to 1.30)"
    snr, size = claims.clusters(nodes, "cifar100", L)
    assert (snr["numbers"], size["numbers"]) == ("2.00 against 1.30", "at most 2.00 labels, L/10 is 10")
    rank, error = claims.macroscopic(subsets_table(lambda truth, rng: truth + 0.01), "cifar100")
    assert float(rank["numbers"]) == pytest.approx(rank["effect"] + 0.8, abs=1e-3)
    only_size, predicted = map(float, error["numbers"].split(" - "))
    assert predicted == 0.01 and only_size - predicted == pytest.approx(error["effect"], abs=1e-3)


def test_the_interval_of_accuracy_is_that_of_paired_images():
    """McNemar's: images that both encoders answer alike say nothing; of one seed half the interval is shown."""
    images, gained, lost = 2000, 60, 36
    first = torch.arange(images) < 800
    last = first.clone()
    last[:lost], last[-gained:] = False, True
    right = {("trained", 1): first, ("trained", 2): last, ("random", 1): first, ("random", 2): first}
    correct = {(0, kind, f"{encoder}.block"): answers for (kind, encoder), answers in right.items()}
    nodes = pd.DataFrame({"seed": 0, "network": ["trained", "random"], "tap": "block"})
    effects, (ends,), *_ = claims._growth(nodes, correct, L, "accuracy", "block")
    gain = (gained - lost) / images
    error = ((gained + lost) / images - gain**2) ** 0.5 / images**0.5
    assert effects == [pytest.approx(gain)] and ends[1] - gain == pytest.approx(1.96 * error, rel=0.1)
    row = claims.verdict("C3", "cifar100", "", effects, [ends], "", True)
    assert row["uncertainty"] == pytest.approx((ends[1] - ends[0]) / 2, abs=1e-6)
