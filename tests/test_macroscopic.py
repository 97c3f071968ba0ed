"""Accuracy of many nodes from the fields of single ones: the definitions, and networks that fulfil the model."""

import pytest
import torch

from paperlib import macroscopic, snp


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def case():
    """Activations (60, 4, 6), labels of 5 kinds and a readout (5, 4, 6)."""
    generator = seeded()
    x = torch.randn(60, 4, 6, generator=generator)
    return x, torch.arange(60) % 5, torch.randn(5, 4, 6, generator=generator)


def test_node_fields_add_up_to_the_readout(case):
    x, _, weight = case
    fields = macroscopic.node_fields(x, weight)
    assert fields.shape == (6, 60, 5)
    torch.testing.assert_close(fields.sum(dim=0), x.flatten(1) @ weight.flatten(1).T)


def test_moments_are_means_and_variances_whatever_the_batches(case):
    x, y, weight = case
    mean, variance = macroscopic.moments(
        (({"tap": part}, labels) for part, labels in zip(x.split(17), y.split(17), strict=True)), {"tap": weight}
    )["tap"]
    torch.testing.assert_close(mean, snp.field_matrices(weight, snp.class_means(x, y, 5)))
    fields = macroscopic.node_fields(x, weight)
    for label in range(5):
        torch.testing.assert_close(variance[:, label], fields[:, y == label].var(dim=1))


def test_every_label_needs_an_image(case):
    x, y, weight = case
    with pytest.raises(ValueError, match="label 4 has no image"):
        macroscopic.moments([({"tap": x[y != 4]}, y[y != 4])], {"tap": weight})


def test_subsets_have_their_sizes_and_answers(case):
    x, y, weight = case
    subsets = macroscopic.random_subsets(6, [1, 3, 6], 4, seeded())
    assert subsets.sum(dim=1).tolist() == [1] * 4 + [3] * 4 + [6] * 4
    assert len({tuple(row.tolist()) for row in subsets[4:8]}) > 1
    answers = macroscopic.subset_answers(x, weight, y, subsets)
    for subset, right in zip(subsets, answers, strict=True):
        silenced = weight * subset
        assert torch.equal(right, (x.flatten(1) @ silenced.flatten(1).T).argmax(dim=1) == y)


def test_prediction_is_the_share_of_draws_that_the_own_label_wins():
    generator = seeded(1)
    mean, variance = torch.randn(1, 4, 4, generator=generator), torch.rand(1, 4, 4, generator=generator) + 0.1
    shares = torch.tensor([0.4, 0.3, 0.2, 0.1])
    draws = mean[0] + variance[0].sqrt() * torch.randn(200_000, 4, 4, generator=generator)
    simulated = shares @ (draws.argmax(dim=2) == torch.arange(4)).float().mean(dim=0)
    assert macroscopic.predicted_accuracy(mean, variance, shares).item() == pytest.approx(simulated.item(), abs=0.004)


def test_without_noise_the_largest_mean_decides():
    mean = torch.eye(3)[None] + torch.tensor([0.0, 0.0, 2.0])  # all answer 2
    shares = torch.full((3,), 1 / 3)
    assert macroscopic.predicted_accuracy(mean, torch.full((1, 3, 3), 1e-8), shares).item() == pytest.approx(1 / 3)


def test_factor_is_found_again():
    mean, variance = torch.eye(10) * 2, torch.ones(10, 10)
    shares = torch.full((10,), 0.1)
    accuracy = macroscopic.predicted_accuracy(mean[None], 3.7 * variance[None], shares).item()
    assert macroscopic.correlation_factor(mean, variance, shares, accuracy) == pytest.approx(3.7, rel=0.01)


def test_independent_normal_nodes_are_predicted_without_a_factor():
    """Nodes that are what the model says: 30 independent normal nodes, subsets of several sizes."""
    generator = seeded(2)
    y, nodes = torch.arange(3000) % 5, 30
    x = torch.randn(3000, 1, nodes, generator=generator)
    weight = torch.randn(5, 1, nodes, generator=generator)
    x += 0.4 * weight[y]
    shares = torch.full((5,), 0.2)
    mean, variance = macroscopic.moments([({"tap": x}, y)], {"tap": weight})["tap"]
    subsets = macroscopic.random_subsets(nodes, [3, 10, 30], 3, generator)
    measured = macroscopic.subset_answers(x, weight, y, subsets).float().mean(dim=1)
    summed = [(subsets.float() @ part.flatten(1)).unflatten(1, (5, 5)) for part in (mean, variance)]
    predicted = macroscopic.predicted_accuracy(*summed, shares)
    assert (predicted - measured).abs().max() < 0.12  # outputs share the nodes' noise, which the model leaves out
    assert torch.corrcoef(torch.stack([predicted, measured]))[0, 1] > 0.98
