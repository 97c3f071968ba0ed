"""Muon: PyTorch's own as oracle, the orthogonal matrix by SVD as truth."""

import pytest
import torch
from torch import nn

from paperlib.muon import Muon, orthogonal

SHAPES = [(8, 24), (24, 8), (8, 24), (16, 16)]


def matrices(seed=0, shapes=SHAPES):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


@pytest.mark.parametrize("shape", [(3, 8, 24), (2, 24, 8), (1, 16, 16)])
def test_orthogonal_brings_singular_values_to_one_and_keeps_directions(shape):
    given = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    u, values, v = torch.linalg.svd(given, full_matrices=False)
    found = orthogonal(given)
    inside = u.mT @ found @ v.mT  # in the matrix's own basis
    seen = values > 0.02 * values.amax()
    assert (inside.diagonal(dim1=1, dim2=2)[seen] - 0.95).abs().max() < 0.27  # the five iterations end in 0.7..1.2
    assert (inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))).abs().max() < 1e-4


def test_a_zero_gradient_moves_nothing():
    assert not orthogonal(torch.zeros(2, 4, 6)).any()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this PyTorch has no Muon to compare with")
@pytest.mark.parametrize("bf16", [False, True])
def test_steps_are_those_of_pytorch(bf16):
    """PyTorch's Muon orthogonalises in bf16: equal there up to the order of sums, in fp32 up to bf16's rounding."""
    ours, theirs = matrices(), matrices()
    mine = Muon(ours, lr=0.01, weight_decay=0.1, bf16=bf16)
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(4):
        before = [weight.detach().clone() for weight in ours]
        for a, b, gradient in zip(ours, theirs, matrices(step + 1), strict=True):
            a.grad, b.grad = gradient.detach().clone(), gradient.detach().clone()
        mine.step()
        reference.step()
        for a, b, old in zip(ours, theirs, before, strict=True):
            moved = (a - old).norm()
            assert (a - b).norm() < 0.05 * moved and moved > 0
            b.data.copy_(a.data)


def test_a_step_is_as_long_as_one_of_adamw():
    """Root mean square of a step: 0.2 x the learning rate, as AdamW's usually is, for every shape."""
    for weight in matrices():
        old, weight.grad = weight.detach().clone(), torch.randn(weight.shape)
        Muon([weight], lr=0.1, weight_decay=0.0).step()
        assert 0.1 < (weight - old).square().mean().sqrt() / 0.1 < 0.3


def test_state_goes_through_a_save_and_a_load(tmp_path):
    ours, again = matrices(), matrices()
    first, second = Muon(ours, 0.1, 0.1), Muon(again, 0.1, 0.1)

    def step(optimizer, weights, seed):
        for weight, gradient in zip(weights, matrices(seed), strict=True):
            weight.grad = gradient.detach()
        optimizer.step()

    step(first, ours, 1)
    torch.save({"weights": ours, "state": first.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    for weight, value in zip(again, saved["weights"], strict=True):
        weight.data.copy_(value.data)
    second.load_state_dict(saved["state"])
    step(first, ours, 2)
    step(second, again, 2)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
