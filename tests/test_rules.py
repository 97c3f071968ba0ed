"""The rules of version 2, on tables whose truth is known."""

import itertools

import numpy as np
import pandas as pd
import pytest

from paperlib import verdicts
from paperlib.experiment.measure import FOLDS

ENCODERS = 6


def tables(value, noise=0.01, seeds=3, taps=("ff1", "attn", "block"), error=0.02):
    """Tables of a measurement whose statistics are value(seed, network, tap, basis, centred, column) -> (ENCODERS,)."""
    rng, points, folds = np.random.default_rng(0), [], []
    columns = ("accuracy", "snr", "snr_external", "mutual")
    for seed, network, tap in itertools.product(range(seeds), ("trained", "random"), taps):
        for basis, centred in itertools.product(("native", "rotated-0", "rotated-1"), (False, True)):
            curves = {name: np.array(value(seed, network, tap, basis, centred, name), float) for name in columns}
            for encoder in range(ENCODERS):
                row = {"seed": seed, "network": network, "tap": tap, "basis": basis, "centred": centred}
                row |= {"encoder": encoder + 1} | {f"{name}_error": error for name in columns[1:]}
                points.append(row | {name: curve[encoder] for name, curve in curves.items()})
                for fold in range(FOLDS if basis != "rotated-1" else 0):
                    off = noise / FOLDS * rng.normal(size=len(columns))
                    found = {
                        name: curve[encoder] + part for (name, curve), part in zip(curves.items(), off, strict=True)
                    }
                    folds.append(row | {"fold": fold} | found)
    return {"taps": pd.DataFrame(points), "folds": pd.DataFrame(folds)}


def growing(seed, network, tap, basis, centred, column):
    """Everything grows where the network is trained, and native nodes more than rotated ones."""
    depth = np.linspace(0, 1, ENCODERS) ** 2  # its steps are not all alike
    trained, native = network == "trained", basis == "native"
    return 1.2 + trained * depth * (2 + native) + 0.3 * trained + 0.05 * seed


def test_what_grows_in_all_networks_is_supported():
    found = verdicts.of_rows(verdicts.sharpening(tables(growing)), "cifar100")
    assert (found.status, found.n, found.failed) == ("supported", 3, ()) and len(found.met) == 12


def test_one_seed_that_falls_is_enough_to_fail():
    def value(seed, network, tap, basis, centred, column):
        curve = growing(seed, network, tap, basis, centred, column)
        return curve[::-1] if seed == 2 and network == "trained" and tap == "attn" and column == "accuracy" else curve

    found = verdicts.of_rows(verdicts.sharpening(tables(value)), "cifar100")
    assert found.status == "in part"
    assert set(found.failed) == {"accuracy of attn grows", "accuracy of attn grows more than with random weights"}


def test_a_random_network_that_grows_as_well_is_not_beaten():
    def value(seed, network, tap, basis, centred, column):
        return growing(seed, "trained", tap, basis, centred, column)

    rows = verdicts.sharpening(tables(value))
    assert all(row.met != row.name.endswith("random weights") for row in rows)
    assert verdicts.of_rows(rows, "cifar100").status == "in part"


def test_images_that_say_different_things_leave_nothing_certain():
    rows = verdicts.sharpening(tables(growing, noise=300))
    assert not any(row.met for row in rows)


@pytest.mark.parametrize(
    ("seeds", "data", "status"), [(2, "cifar100", "not tested"), (3, "glyphs100", "demonstration")]
)
def test_few_seeds_and_embedded_data_test_nothing(seeds, data, status):
    assert verdicts.of_rows(verdicts.sharpening(tables(growing, seeds=seeds)), data).status == status


def test_rows_beside_decide_nothing(refuses):
    rows = verdicts.clusters(tables(growing), "block", beside=True)
    assert rows and all(row.beside for row in rows)
    with refuses("at least one row that decides"):
        verdicts.of_rows(rows, "cifar100")


def test_clusters_need_single_nodes_external_noise_and_mutual_confusions():
    rows = verdicts.clusters(tables(growing), "ff1")
    assert verdicts.of_rows(rows, "cifar100").status == "supported"

    def rotation_changes_nothing(seed, network, tap, basis, centred, column):
        return growing(seed, network, tap, "native", centred, column)

    failed = verdicts.of_rows(verdicts.clusters(tables(rotation_changes_nothing), "ff1"), "cifar100").failed
    assert len(failed) == 4 and all(name.startswith("(c)") for name in failed)


def test_only_the_last_two_thirds_count_for_clusters():
    def late(seed, network, tap, basis, centred, column):
        curve = np.array(growing(seed, network, tap, basis, centred, column))
        curve[:2] = 1.0
        return curve

    assert verdicts.of_rows(verdicts.clusters(tables(late), "ff1"), "cifar100").status == "supported"


def test_one_mechanism_needs_both_halves():
    cct = tables(growing)
    cnn = tables(growing, taps=("conv",))
    assert verdicts.of_rows(verdicts.unified(cct, cnn), "cifar100").status == "supported"

    def falling(seed, network, tap, basis, centred, column):
        return growing(seed, network, tap, basis, centred, column)[:: -1 if network == "trained" else 1]

    found = verdicts.of_rows(verdicts.unified(cct, tables(falling, taps=("conv",))), "cifar100")
    assert found.status == "in part" and sum("same outcome" in name for name in found.failed) == 6
    both = verdicts.of_rows(verdicts.unified(tables(falling), tables(falling, taps=("conv",))), "cifar100")
    assert sum("same outcome" in name for name in both.met) == 6 and len(both.failed) > 2


def test_networks_of_other_seeds_are_not_compared(refuses):
    measured = tables(growing)
    taps = measured["taps"]
    measured["taps"] = taps[(taps.network == "trained") | (taps.seed < 2)]
    with refuses("measured for seeds .*: measure the same ones"):
        verdicts.sharpening(measured)
    with refuses("not there, or at several thresholds"):
        verdicts.sharpening({**measured, "taps": pd.concat([taps.assign(threshold=at) for at in (0.3, 0.4)])})


def test_three_seeds_on_the_same_images_are_no_surer_than_one():
    """A loss of 0.4 points that one network knows to half a point: its upper bound is above one point."""
    rows = verdicts.pruning(pruned(lambda method, dilution: 0.004 if method == "andc" else 0.05, se=0.005))
    assert not rows[0].met


def test_steps_that_go_together_correlate():
    curve = np.array([0.0, 1.0, 1.5, 4.0])
    assert verdicts.steps_correlate(curve, 2 * curve + 1) == pytest.approx(1)
    assert verdicts.steps_correlate(curve, -curve) == pytest.approx(-1)
    assert verdicts.steps_correlate(curve, np.arange(4.0)) == 0


def test_the_interval_of_one_seed_is_that_of_images_and_nodes():
    images = verdicts.curves(tables(growing, noise=0.3, error=0.0), "trained", "ff1", "snr", verdicts.RAW)
    nodes = verdicts.curves(tables(growing, noise=0.0, error=0.05), "trained", "ff1", "snr", verdicts.RAW)
    both = verdicts.curves(tables(growing, noise=0.3, error=0.05), "trained", "ff1", "snr", verdicts.RAW)
    spreads = [one.draws.std(axis=1) for one in (images, nodes, both)]
    assert np.allclose(spreads[1], 0.05 * nodes.values, rtol=0.1)
    assert np.allclose(spreads[2], np.hypot(*spreads[:2]), rtol=0.1)
    assert np.allclose(both.draws.mean(axis=1), both.values, atol=0.02)


# --- pruning


def pruned(loss, seeds=3, se=0.001):
    """A table of `experiment.readings`: loss(method, dilution) after retraining."""
    rows = []
    for seed, method, (threshold, dilution) in itertools.product(
        range(seeds), ("andc", "random", "permuted", "magnitude", "activation"), ((0.2, 0.3), (0.3, 0.6), (0.4, 0.8))
    ):
        row = {"seed": seed, "tap": "block", "threshold": threshold, "method": method, "dilution": dilution}
        lost = loss(method, dilution)
        row |= {"retrained_loss": lost, "retrained_loss_se": se}
        rows.append(row | {"andc_ahead": lost - loss("andc", dilution), "andc_ahead_se": se})
    return pd.DataFrame(rows)


def test_pruning_that_keeps_the_accuracy_is_supported_at_the_smallest_dilution():
    table = pruned(lambda method, dilution: (0.002 if method == "andc" else 0.05) if dilution < 0.7 else 0.3)
    rows = verdicts.pruning(table)
    assert verdicts.of_rows(rows, "cifar100").status == "supported" and all("0.60" in row.name for row in rows)
    assert sum(row.beside for row in rows) == 2


@pytest.mark.parametrize(
    ("loss", "se", "failed"),
    [
        (lambda method, dilution: 0.02 if method == "andc" else 0.05, 0.001, "half a point"),
        (lambda method, dilution: 0.002 if method == "andc" else 0.05, 0.02, "half a point"),
        (lambda method, dilution: 0.001 if method == "permuted" else 0.002, 0.0001, "permuted"),
    ],
    ids=["too much", "uncertain", "permuted sets do as well"],
)
def test_pruning_that_costs_or_that_chance_matches_is_not(loss, se, failed):
    found = verdicts.of_rows(verdicts.pruning(pruned(loss, se=se)), "cifar100")
    assert found.status != "supported" and any(failed in name for name in found.failed)


def test_a_sweep_without_a_large_dilution_says_so(refuses):
    table = pruned(lambda method, dilution: 0.0)
    with refuses("larger prune_thresholds"):
        verdicts.pruning(table[table.dilution < 0.5])


def test_late_layers_are_judged_after_their_longest_training_and_decide_nothing():
    late = pruned(lambda method, dilution: 0.002 if method == "andc" else 0.05).query("threshold == 0.3")
    late = late.rename(columns={"retrained_loss": "loss", "retrained_loss_se": "loss_se"})
    parts = [
        late.assign(reading=reading, encoders=encoders, epochs=epochs, loss=late.loss + cost / epochs)
        for reading, encoders, cost in (("W2", 1, 0.02), ("FF", 2, 0.2))
        for epochs in (1, 10)
    ]
    rows = verdicts.late_layers(pd.concat(parts))
    spared = {row.name: row.met for row in rows if "half a point" in row.name}
    assert len(rows) == 10 and all(row.beside for row in rows)
    assert [met for name, met in spared.items() if "W2" in name] == [True]
    assert [met for name, met in spared.items() if "FF" in name] == [False]


# --- heads and sets of nodes


def by_fold(value, seeds=3, noise=0.01, **columns):
    """A table of one statistic along the encoders, on all test images and without each fold."""
    rng, rows = np.random.default_rng(1), []
    for seed, encoder, fold in itertools.product(range(seeds), range(ENCODERS), range(-1, FOLDS)):
        found = {name: of(seed, encoder / (ENCODERS - 1)) for name, of in value.items()}
        off = (fold >= 0) * noise / FOLDS * rng.normal()
        rows.append(
            {"seed": seed, "encoder": encoder + 1, "fold": fold} | columns | {k: v + off for k, v in found.items()}
        )
    return pd.DataFrame(rows)


def four_nodes(native, rotated):
    """Sets of four nodes of a head, native and rotated."""
    parts = []
    for nodes, last in (("head", native), ("rotated", rotated)):
        value = {"choice": lambda seed, depth, last=last: 0.5 + (last - 0.5) * depth}
        parts.append(by_fold(value, nodes=nodes, whole=False, size=4, draw=0))
    return pd.concat(parts)


def heads_of(late=0.3, random=0.01, gap=0.05, dealt=0.0, expert=0.7, rotated=0.01):
    """Tables of `experiment.division`: nothing in the first encoder, these values in the last."""

    def excess(last, **columns):
        return by_fold(
            {"excess": lambda seed, depth: depth * last - 0.02 * (depth == 0)}, chance_error=0.002, **columns
        )

    def silenced(last, **columns):
        return by_fold({"gap": lambda seed, depth: last * depth}, chance=dealt, chance_error=0.002, **columns)

    def choice(last, nodes, **columns):
        value = {"choice": lambda seed, depth: 0.5 + (last - 0.5) * depth}
        return by_fold(value, nodes=nodes, whole=True, size=64, **columns)

    turned = [excess(rotated + 0.001 * draw, basis=f"rotated-{draw}") for draw in range(3)]
    trained = pd.concat([excess(late, basis="native"), *turned])
    ablation = pd.concat([silenced(gap, owners="native"), silenced(gap / 5, owners="rotated-0")])
    dealings = [choice(0.55 + 0.001 * draw, "dealt", draw=draw) for draw in range(4)]
    together = [choice(expert, "head", draw=0), *dealings, four_nodes(0.6, 0.52 if rotated < 0.1 else 0.6)]
    return trained, excess(random, basis="native"), ablation, pd.concat(together)


def test_heads_that_divide_the_labels_in_the_last_encoders_are_supported():
    rows = verdicts.modus_vivendi(*heads_of())
    assert verdicts.of_rows(rows, "cifar100").status == "supported"
    assert [row.met for row in rows if row.beside] == [True, True, True]


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"random": 0.5}, ["(a) more than heads of random weights"]),
        ({"late": 0.0, "rotated": 0.0, "random": -0.1}, ["(a) heads specialise"]),
        ({"gap": -0.01}, ["(b) silencing", "(b) more than"]),
        ({"dealt": 0.2}, ["(b) more than"]),
        ({"expert": 0.55}, ["(c) a head is expert"]),
    ],
)
def test_heads_that_chance_matches_are_not(changes, failed):
    found = verdicts.of_rows(verdicts.modus_vivendi(*heads_of(**changes)), "cifar100")
    assert found.status == "in part" and len(found.failed) == len(failed)
    assert all(name.startswith(start) for name, start in zip(found.failed, failed, strict=True))


def test_heads_that_only_share_a_direction_are_no_single_nodes():
    """Where rotated nodes do as well, the claim may hold for heads; rows beside it say that nodes have no part."""
    rows = verdicts.modus_vivendi(*heads_of(rotated=0.3))
    assert verdicts.of_rows(rows, "cifar100").status == "supported"
    assert [row.met for row in rows if row.beside] == [False, True, False]


def test_equal_heads_of_two_networks_differ_by_nothing_certain():
    """Their errors are independent: what is as large in both is above nothing."""
    noisy = heads_of(late=0.1, random=0.0999)
    noisy[0]["chance_error"] = noisy[1]["chance_error"] = 0.05
    rows = {row.name: row for row in verdicts.modus_vivendi(*noisy)}
    above = rows["(a) more than heads of random weights"]
    assert not above.met and above.high - above.low > 0.05


@pytest.mark.parametrize("damage", ["nan", "twice", "nothing"])
def test_tables_that_cannot_be_judged_are_named(damage, refuses):
    tables = list(heads_of())
    if damage == "nan":
        tables[3].loc[(tables[3].encoder == ENCODERS) & tables[3].whole, "choice"] = np.nan
        with refuses(f"ahead of heads is no number in encoder {ENCODERS}"):
            verdicts.modus_vivendi(*tables)
    elif damage == "nothing":
        with refuses("excess of random native is not there: measure it"):
            verdicts.modus_vivendi(tables[0], tables[1][:0], *tables[2:])
    else:
        table = by_fold({"x": lambda seed, depth: depth})
        with pytest.raises(ValueError, match="duplicate"):
            verdicts.by_fold(pd.concat([table, table]), "x", "x")


def sets_of(predicted, whole=0.0, seeds=3):
    """Accuracies of sets: 0.1 for one node to 0.5 for 16, sets of a size differ by 0.02; all nodes 0.6."""
    rng, rows = np.random.default_rng(2), []
    for seed, encoder, size in itertools.product(range(seeds), range(ENCODERS), (1, 4, 16, 64)):
        for draw in range(20 if size < 64 else 1):
            measured = 0.1 + 0.1 * np.log2(size) + 0.02 * rng.normal() * (size < 64)
            row = {"seed": seed, "encoder": encoder + 1, "tap": "block", "size": size, "draw": draw}
            row |= {"network": "trained", "basis": "native"}
            said = predicted(measured, rng) if size < 64 else measured + whole
            rows.append(
                row
                | {
                    "measured": measured,
                    "predicted": said,
                    "size_only": 0.1 + 0.1 * np.log2(size) + 0.03 * (size == 64),
                }
            )
    return pd.DataFrame(rows)


def test_sets_that_single_nodes_predict_are_supported():
    rows = verdicts.macroscopic(sets_of(lambda measured, rng: measured + 0.005 * rng.normal()), "block")
    assert verdicts.of_rows(rows, "cifar100").status == "supported"


@pytest.mark.parametrize(
    ("predicted", "whole", "failed"),
    [
        (lambda measured, rng: measured + 0.2, 0.0, ["(b)"]),  # ranks right, sizes wrong
        (lambda measured, rng: measured, -0.2, ["(c)"]),  # what version 1 found for whole encoders
        (lambda measured, rng: rng.uniform(), 0.2, ["(a)", "(b)", "(c)"]),
    ],
)
def test_predictions_that_a_curve_of_sizes_beats_are_not(predicted, whole, failed):
    found = verdicts.of_rows(verdicts.macroscopic(sets_of(predicted, whole), "block"), "cifar100")
    assert [name[:3] for name in found.failed] == failed
