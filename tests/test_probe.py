"""The measure for a stranger's network: any module, any batches; what it says is what the library says."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from paperlib import optimum, snp
from paperlib.data import held_out
from paperlib.probe import features, probe
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
