"""The measure for a stranger's network: any module, any batches; what it says is what the library says."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paperlib import foreign, optimum, snp
from paperlib.data import folder, held_out
from paperlib.probe import cost, features, node_fields, probe, prune, silence
from paperlib.taps import Tap

HIDDEN = Tap(1, "hidden", "1")


def examples(n=600, seed=0):
    """Eight labels: the signs of the first three of twelve numbers."""
    x = torch.randn(n, 12, generator=torch.Generator().manual_seed(seed))
    return x, (x[:, :3] > 0).long() @ torch.tensor([1, 2, 4])


def network(seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 8))


def trained():
    net, (x, y) = network(), examples()
    optimizer = torch.optim.Adam(net.parameters(), 0.02)
    for _ in range(200):
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    return net


def test_a_trained_network_stands_above_its_null():
    table = probe(trained(), [HIDDEN], [examples()], [examples(seed=1)], null=network(3)).set_index("network")
    for column in ("accuracy", "snr"):
        assert table[column]["network"] > 1.1 * table[column]["null"], column


def test_the_table_says_what_the_library_says():
    net, (x, y), (x_test, y_test) = trained(), examples(), examples(seed=1)
    (row,) = probe(net, [HIDDEN], [(x, y)], [(x_test, y_test)]).to_dict("records")
    known, unseen = (net[:2](part).detach() for part in (x, x_test))
    kept, held = held_out(y, 0.1)
    data = optimum.problem(known[kept], y[kept], 8)
    weight = optimum.choose(data, known[held], y[held], log=lambda said: None).best.weight
    fields = snp.field_matrices(weight[:, None], snp.class_means(unseen[:, None], y_test, 8))
    assert row["snr"] == pytest.approx(snp.tap_statistics(snp.boolean_matrices(fields)).snr)
    assert row["accuracy"] == pytest.approx(((unseen @ weight.T).argmax(dim=1) == y_test).float().mean().item())


def test_fields_of_nodes_are_those_of_their_readout():
    net, (x, y), (x_test, y_test) = trained(), examples(), examples(seed=1)
    fields = node_fields(net, HIDDEN, [(x, y)], [(x_test, y_test)])
    assert fields.shape == (16, 8, 8)
    (row,) = probe(net, [HIDDEN], [(x, y)], [(x_test, y_test)]).to_dict("records")
    assert snp.tap_statistics(snp.boolean_matrices(fields)).snr == pytest.approx(row["snr"])


def test_costs_are_known_before_they_are_spent(monkeypatch):
    (row,) = cost(trained(), [HIDDEN], [examples()], [examples(seed=1)]).to_dict("records")
    assert (row["tap"], row["positions"], row["nodes"]) == ("1.hidden", 1, 16) and row["seconds"] > 0
    assert row["gigabytes"] * 1e9 == pytest.approx(4 * 16 * 3.5 * 600)
    monkeypatch.setattr(folder, "machine_memory", lambda: 100_000)
    with pytest.raises(ValueError, match=r"1 taps need 0\.0 GB of memory"):
        probe(trained(), [HIDDEN], [examples()], [examples(seed=1)])


class Halves(nn.Module):
    """Two heads of eight nodes; each label has two nodes of one head."""

    def __init__(self):
        super().__init__()
        self.heads, self.last = nn.Identity(), nn.Linear(16, 8, bias=False)
        self.last.weight.data = torch.eye(8).repeat_interleave(2, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.heads(x))


def test_silenced_heads_cost_the_labels_that_they_own():
    """Nodes 0 to 7, head 0, answer labels 0 to 3, two nodes each; head 1 the others."""
    y = torch.arange(400) % 8
    x = torch.eye(8)[y].repeat_interleave(2, dim=1) + 0.1 * torch.randn(400, 16, generator=torch.manual_seed(0)).abs()
    tap = Tap(1, "heads", "heads", heads=2, axis=-1)
    table = silence(Halves(), tap, [(x, y)], [(x, y)])
    assert table.labels.tolist() == [4, 4]
    assert (table.lost_own > 0.9).all() and (table.lost_other == 0).all()
    with pytest.raises(ValueError, match="has no heads"):
        silence(trained(), HIDDEN, [examples()], [examples()])


class Named(nn.Module):
    """Takes its input by name, as Hugging Face's do, and with a second input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, shift: Tensor) -> Tensor:
        return self.inner(x + shift)


def test_batches_come_from_loaders_and_as_tuples_or_dictionaries():
    net, (x, y) = trained(), examples()
    whole = probe(net, [HIDDEN], [(x, y)], [(x, y)])
    loader = DataLoader(TensorDataset(x, y), batch_size=50)
    assert probe(net, [HIDDEN], loader, loader).equals(whole)
    named, place = Named(net), [Tap(1, "hidden", "inner.1")]
    zero = torch.zeros(())
    for inputs in ((x, zero), {"x": x, "shift": zero}):
        assert probe(named, place, [(inputs, y)], [(inputs, y)]).equals(whole)


def test_features_keep_the_order_of_examples():
    net, (x, y) = trained(), examples()
    found, labels = features(net, [HIDDEN], DataLoader(TensorDataset(x, y), batch_size=7))
    assert torch.equal(labels, y) and torch.allclose(found["1.hidden"][:, 0], net[:2](x), atol=1e-6)


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ([], "no batches"), ([examples()[0]], r"must be a pair \\(inputs, labels\\), not Tensor"),
        ([(examples()[0][:8], torch.zeros(8))], "label 1 has test examples only"),
    ],
    ids=["none", "no labels", "labels of tests only"],
)  # fmt: skip
def test_batches_that_cannot_be_measured_are_named(train, words, refuses):
    with refuses(words.replace("\\\\", "\\")):
        probe(trained(), [HIDDEN], train, [examples()])


def test_batches_of_other_lengths_are_named(refuses):
    net = nn.Sequential(nn.Identity(), nn.Linear(3, 5))
    batches = [(torch.randn(4, length, 3), torch.arange(4) % 2) for length in (5, 6)]
    with refuses("pad all to one length"):
        features(net, [HIDDEN], batches)


def test_a_tap_of_one_node_is_refused(refuses):
    with refuses("nothing to rotate"):
        probe(nn.Sequential(nn.Linear(12, 1), nn.ReLU()), [HIDDEN], [examples()], [examples()])


class Attending(nn.Module):
    """Twelve numbers as four tokens of three, one encoder of two heads, and a label of their mean."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)])
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers[0](self.embed(x.unflatten(1, (4, 3)))).mean(dim=1))


def test_heads_of_a_known_family_are_measured_with_their_nulls():
    net = foreign.open_attention(Attending())
    table = probe(net, foreign.known_taps(net), [examples()], [examples(seed=1)]).set_index("tap")
    assert table.excess.notna().to_dict() == {"1.block": False, "1.ff1": False, "1.attn": True}
    assert table.excess_rotated.notna()["1.attn"] and table.accuracy.between(0, 1).all()


def test_pruning_by_shared_labels_and_its_controls():
    """As many connections for each; the masked network is the one that is scored; the given one stays as it was."""
    net, train, test = trained(), [examples()], [examples(seed=1)]
    before = net[2].weight.clone()
    taps_ = Tap(1, "hidden", "1"), Tap(2, "logits", "2")
    table = prune(net, {"2": taps_}, train, test, threshold=0.5).set_index("method")
    assert set(table.index) == {"andc", "random", "permuted", "magnitude", "activation"}
    assert table.dilution.nunique() == 1 and 0.1 < table.dilution["andc"] < 0.9
    assert torch.equal(net[2].weight, before)
    x, y = examples(seed=1)
    intact = (net(x).argmax(dim=1) == y).float().mean().item()
    assert (table.accuracy + table.loss).to_numpy() == pytest.approx([intact] * 5)
    removed = int(table.dilution["magnitude"] * before.numel() + 0.5)
    smallest = before.abs().flatten().argsort()[:removed]
    net[2].weight.data.view(-1)[smallest] = 0
    assert table.accuracy["magnitude"] == pytest.approx((net(x).argmax(dim=1) == y).float().mean().item())


def test_a_network_without_logits_is_not_pruned(refuses):
    net = nn.Sequential(nn.Linear(12, 8), nn.Unflatten(1, (4, 2)))
    with refuses("must answer with one number a label"):
        prune(net, {"0": (Tap(1, "in", "0", "input"), Tap(1, "out", "0"))}, [examples()], [examples(seed=1)])


class Words(nn.Module):
    """Takes word numbers and their mask by name; each word says its embedding."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.embed(input_ids)


def test_padding_of_masked_inputs_says_nothing():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    batch = ({"input_ids": torch.tensor([[3, 4, 0], [5, 0, 0]]), "attention_mask": mask}, torch.tensor([0, 1]))
    net = Words()
    found, _ = features(net, [Tap(1, "words", "embed")], [batch])
    nodes = found["1.words"]
    assert torch.equal(nodes[mask == 1], net.embed(torch.tensor([3, 4, 5])).detach()) and not nodes[mask == 0].any()
