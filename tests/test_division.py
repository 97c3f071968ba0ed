"""The stages of heads and of sets of nodes say what loops over images and nodes say."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from paperlib import heads, macroscopic, snp, taps, training
from paperlib.experiment import division, measure, networks, sets, settings

CUT = {"epochs": 1, "max_steps": 30, "precision": "fp32", "seeds": [0], "limit": 2000, "held_out": 0.2}
CUT |= {"model": "cct_2_3x2", "threshold_sweep": [0.3], "permutations": 40, "blind": True}
TAP, ENCODER, THRESHOLD = "2.attn", 2, 0.3


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAPERLIB_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setattr(measure, "ONCE", ())
        patch.setattr(measure, "MAIN", ("attn",))
        patch.setattr(sets, "TAPS", ("attn",))
        patch.setattr(measure, "IMAGES", 800)
        yield settings.open_run("quick", CUT)


@pytest.fixture(scope="module")
def case(run):
    """Activations of the last encoder's heads on test and held-out images, and their readout."""
    network, _ = networks.load_network(run, 0, "trained")
    place = taps.places(network, ["attn"])[-1]
    weight = measure.readouts(run, 0, "trained").tensors("weights")[f"{TAP}/best"]
    _, held = measure.readout_images(run)
    images = run.images
    parts = {}
    for name, x, y in (("test", images.x_test, images.y_test), ("held", images.x_train[held], images.y_train[held])):
        parts[name] = taps.features(network, [place], x, *images.statistics)[TAP], y
    return network, place.heads, weight, parts


def booleans(weight, activations, y):
    fields = snp.field_matrices(weight, snp.class_means(activations, y, len(weight)))
    return snp.boolean_matrices(fields, THRESHOLD)


@pytest.mark.slow
def test_specialisation_and_owners_are_those_of_counts(run, case):
    stage = division.specialisation(run, 0, "trained")
    _, number, weight, parts = case
    table = stage.table("encoders").query(f"encoder == {ENCODER}")
    fold = measure.fold_of(run.images.y_test)
    for left_out in (-1, 4):
        activations, y = (part[fold != left_out] for part in parts["test"])
        counts = heads.cooperation_counts(booleans(weight, activations, y), number)
        row = table.query(f"basis == 'native' and fold == {left_out}")
        assert row.specialisation.item() == pytest.approx(heads.specialisation(counts).item(), abs=2e-3)
        assert row.excess.item() == pytest.approx(row.specialisation.item() - row.chance.item())
    owners = stage.table("owners").query(f"encoder == {ENCODER} and basis == 'native'").sort_values("label")
    unseen = heads.assign_labels(heads.cooperation_counts(booleans(weight, *parts["held"]), number))
    clear = ~unseen.tied.numpy()  # ties are drawn
    assert (owners.owner.to_numpy() == unseen.owner.numpy())[clear].mean() > 0.98  # sums in another order
    assert set(table.basis) == {"native", *(f"rotated-{draw}" for draw in range(snp.ROTATIONS))}
    whole = stage.table("heads").query(f"encoder == {ENCODER} and not centred")
    assert whole.owned.tolist() == [(owners.owner == head).sum() for head in range(number)]


@pytest.mark.slow
def test_matrices_of_heads_count_nodes_and_follow_owners(run, case):
    table = division.head_matrices(run)
    _, number, weight, parts = case
    found = booleans(weight, *parts["test"])
    counts = heads.cooperation_counts(found, number)
    owners = division.specialisation(run, 0, "trained").table("owners")
    owner = owners.query(f"encoder == {ENCODER} and basis == 'native'").sort_values("label").owner.to_numpy()
    assert [*table.groupby(["network", "encoder"], sort=False).groups] == [
        ("trained", 1), ("trained", ENCODER), ("random", ENCODER),
    ]  # fmt: skip
    for head, part in table.query(f"network == 'trained' and encoder == {ENCODER}").groupby("head"):
        matrix = part.drop(columns=["network", "encoder", "head", "owned"]).to_numpy()
        assert matrix.sum() == pytest.approx(found.unflatten(0, (number, -1))[head].sum().item(), rel=0.01)
        own = part.owned.to_numpy()
        assert own.sum() == (owner == head).sum() and abs(own.astype(int)[1:] - own[:-1]).sum() <= 2  # side by side
        expected = sorted(counts[head].numpy()[owner == head])
        assert sorted(matrix.diagonal()[own]) == pytest.approx(expected, abs=1)


def test_seeds_that_divide_alike_agree_whatever_heads_are_called():
    rows = [
        {"seed": seed, "network": "trained", "basis": "native", "encoder": 1, "label": label, "owner": owner}
        for label in range(20)
        for seed, owner in ((0, label % 4), (1, (label + 1) % 4), (2, label // 5))
    ]
    run = SimpleNamespace(settings=SimpleNamespace(permutations=200))
    table = division.stability(run, pd.DataFrame(rows)).set_index("seeds")
    assert table.overlap["0-1"] == 1 and table.overlap["0-2"] == pytest.approx(0.4)  # 2 of 5 labels of each head
    assert (table.chance < table.chance_high).all() and (table.chance < 0.6).all()
    assert not len(division.stability(run, pd.DataFrame(rows).query("seed == 0")))


@pytest.mark.slow
def test_what_a_label_loses_is_counted_by_owner(run):
    owners, drops = division.specialisation(run, 0, "trained").table("owners"), division.ablation(run, 0).table("drops")
    table = division.silenced({"owners": owners, "drops": drops})
    native = owners[(owners.basis == "native") & (owners.encoder == ENCODER)].set_index("label").owner
    for row in table[table.encoder == ENCODER].itertuples():
        lost = drops[(drops.encoder == ENCODER) & (drops["head"] == row.head)].set_index("label")["drop"]
        mine = [lost[label] for label in native.index if native[label] == row.owner]
        assert row.labels == len(mine) and row.drop == pytest.approx(sum(mine) / len(mine))


@pytest.mark.slow
def test_what_silencing_costs_is_counted_image_by_image(run, case):
    stage = division.ablation(run, 0)
    number = case[1]
    answers, y = stage.arrays("answers"), run.images.y_test
    lost = answers["intact"].float() - answers["ablated"][ENCODER - 1].float()
    owners = division.specialisation(run, 0, "trained").table("owners")
    owner = owners.query(f"encoder == {ENCODER} and basis == 'native'").sort_values("label").owner.to_numpy()
    own = torch.tensor([[owner[label] == head for label in y.tolist()] for head in range(number)])
    labels = range(len(owner))
    cost = torch.stack([torch.stack([lost[head][y == label].mean() for label in labels]) for head in range(number)])
    owned = [label for label in range(len(owner)) if owner[label] >= 0]
    cost = cost[:, owned].double()
    inter = cost - cost.mean(dim=0, keepdim=True) - cost.mean(dim=1, keepdim=True) + cost.mean()
    gap = sum(inter[owner[label], place] for place, label in enumerate(owned)) / len(owned) * number / (number - 1)
    table = stage.table("ablation").query(f"encoder == {ENCODER} and fold == -1").set_index("owners")
    assert table.gap["native"] == pytest.approx(gap.item(), abs=1e-5)
    assert table.own_drop["native"] == pytest.approx(
        sum(lost[h][own[h]].sum() for h in range(number)).item() / own.sum().item(), abs=1e-5
    )
    assert set(table.index) == {"native", "best", "shuffled", *(f"rotated-{draw}" for draw in range(snp.ROTATIONS))}
    drops = stage.table("drops").query(f"encoder == {ENCODER} and head == 1 and label == 7")["drop"].item()
    assert drops == pytest.approx(lost[1][y == 7].mean().item(), abs=1e-6)


def weight_width(case):
    return case[2].shape[2] // case[1]


@pytest.mark.slow
def test_whole_heads_do_not_know_a_rotation_and_choose_as_a_loop_says(run, case):
    table = division.cooperation(run, 0).table("cooperation").query(f"encoder == {ENCODER}")
    _, number, weight, parts = case
    assert set(table[table.fold == 3]["size"]) == {heads.FEW, weight_width(case)}
    whole = table[table.whole & (table.fold == -1) & (table.draw == 0)].set_index("nodes")[["own", "choice"]]
    assert whole.loc["head"].to_numpy() == pytest.approx(whole.loc["rotated"].to_numpy(), abs=2e-3)
    (activations, y), recognised = parts["test"], snp.diagonal_labels(booleans(weight, *parts["held"]))
    _, owned = heads.sets_and_labels(recognised, number, training.generator(0, "sets", TAP))
    width, chosen = weight.shape[2] // number, []
    for head in range(number):
        own = slice(head * width, (head + 1) * width)
        fields = torch.einsum("ntd,ltd->nl", activations[..., own], weight[..., own])
        mine = owned[0, head].nonzero().flatten().tolist()
        for label in mine:
            images = fields[y == label]
            others = [other for other in mine if other != label]
            if others:
                chosen.append((images[:, [label]] > images[:, others]).float().mean().item())
    assert whole.choice["head"] == pytest.approx(sum(chosen) / len(chosen), abs=2e-3)
    folds = table[table.whole & (table.nodes == "head") & (table.draw == 0)].groupby("fold").choice.mean()
    assert len(folds) == measure.FOLDS + 1 and folds.drop(-1).mean() == pytest.approx(folds[-1], abs=2e-3)


@pytest.mark.slow
def test_sets_of_nodes_are_measured_and_predicted_from_what_single_nodes_say(run, case):
    both = sets.sets_of_nodes(run, 0).table("sets").query(f"tap == 'attn' and encoder == {ENCODER}")
    table = both[both.basis == "native"]
    all_nodes = both[both["size"] == both["size"].max()].set_index("basis").measured
    assert all_nodes["rotated"] == pytest.approx(all_nodes["native"], abs=2e-3)  # together, they say the same
    _, _, weight, parts = case
    (activations, y), whole = parts["test"], table[table["size"] == weight.shape[2]]
    right = torch.einsum("ntd,ltd->nl", activations, weight).argmax(dim=1) == y
    assert whole.measured.item() == pytest.approx(right.float().mean().item(), abs=2e-3)
    fields = macroscopic.node_fields(parts["held"][0], weight)  # (D, n, L)
    labels = parts["held"][1]

    def variance(values):  # within labels, mean over input and output labels
        return torch.stack([values[..., labels == label, :].var(dim=-2) for label in labels.unique()]).mean(dim=0)

    ratio = variance(fields.sum(dim=0)).mean() / variance(fields).sum(dim=0).mean()
    assert whole.variance_ratio.item() == pytest.approx(ratio.item(), rel=1e-2)
    single = table[table["size"] == 1]  # a correlation between nodes needs two
    assert table.predicted.between(0, 1).all() and single.predicted.tolist() == pytest.approx(
        single.uncorrelated.tolist()
    )


def test_size_alone_is_the_mean_of_the_others_and_a_line_for_all():
    import pandas as pd

    table = pd.DataFrame({"size": [1, 1, 4, 4, 16, 16, 64], "measured": [0.1, 0.2, 0.2, 0.3, 0.4, 0.5, 0.9]})
    expected = [0.2, 0.1, 0.3, 0.2, 0.5, 0.4, 0.65]
    assert macroscopic.size_only(table).tolist() == pytest.approx(expected)


def test_independent_nodes_keep_their_variance():
    assert macroscopic.variance_factor(1.0, torch.tensor([1, 5, 9]), 9).tolist() == [1, 1, 1]
    assert macroscopic.variance_factor(3.0, torch.tensor([1, 5, 9]), 9).tolist() == [1, 2, 3]
