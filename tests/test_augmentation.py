"""Augmentation, published, mixed and light: shapes, soft labels, chunks, repeatability."""

import pytest
import torch

from paperlib.data import augmentation
from paperlib.data.augmentation import CHUNK, augment
from paperlib.training import seeded

MEAN, STD = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)


def batch(n=4 * CHUNK, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(n) % 5


def augmented(seed, n=4 * CHUNK):
    with seeded(seed):
        return augment("published", *batch(n), MEAN, STD, 5)


@pytest.mark.parametrize("n", [1, CHUNK, 3 * CHUNK + 3])
def test_shapes_and_probabilities(n):
    images, labels = augmented(0, n)
    assert images.shape == (n, 3, 16, 16) and images.dtype == torch.float32
    assert labels.shape == (n, 5)
    torch.testing.assert_close(labels.sum(dim=1), torch.ones(n))
    assert (labels >= 0).all()


def test_same_seed_same_batch():
    for one, again, other in zip(augmented(1), augmented(1), augmented(2), strict=True):
        assert torch.equal(one, again) and not torch.equal(one, other)


def test_labels_are_those_of_the_two_images_that_are_mixed():
    """mixup and cutmix blend image i with image i - 1, and nothing else."""
    shares = []
    for seed in range(20):
        with seeded(seed):
            _, mixed = augment("published", *batch(5), MEAN, STD, 5)  # image i has label i
        pairs = mixed[range(5), range(5)] + mixed[range(5), [4, 0, 1, 2, 3]]
        torch.testing.assert_close(pairs, torch.ones(5))
        shares.append(mixed[0, 0].item())
    assert len({round(share, 4) for share in shares}) > 10


def test_operations_are_left_out_as_often_as_the_recipe_says():
    """Of two operations, each done with probability 0.5, a quarter of the images get none (and some change nothing)."""
    from torchvision.transforms import v2

    operations = v2.Compose(augmentation._transforms(16, 5)[0].transforms[-2:])
    images, unchanged = batch(1)[0], 0
    with seeded(0):
        for _ in range(400):
            unchanged += torch.equal(operations(images), images)
    assert 0.22 < unchanged / 400 < 0.42


def test_erased_parts_are_noise():
    erase = augmentation._transforms(16, 5)[1]
    with seeded(0):
        erased = [erase(torch.zeros(3, 16, 16)) for _ in range(200)]
    parts = torch.cat([image[image != 0] for image in erased])
    assert 0.15 < sum(bool(image.any()) for image in erased) / 200 < 0.35
    assert abs(parts.mean()) < 0.05 and abs(parts.std() - 1) < 0.05


def test_chunks_are_drawn_apart():
    """Equal images in two chunks come out differently, within a chunk alike (mixup of equal images changes nothing)."""
    one, _ = batch(1)
    images = one.expand(2 * CHUNK, -1, -1, -1)
    different = 0
    for seed in range(10):
        with seeded(seed):
            result, _ = augment("published", images, torch.zeros(2 * CHUNK, dtype=torch.long), MEAN, STD, 2)
        different += not torch.allclose(result[1], result[CHUNK + 1], atol=1e-3)
    assert different >= 8


def test_mixed_leaves_half_of_the_batches_as_they_are():
    """The others are mixed as in the published recipe; no pixel is changed besides."""
    images, labels = batch(5)
    plain, _ = augment("light", images, labels, MEAN, STD, 5)
    torch.testing.assert_close(plain, (images / 255 - MEAN) / STD)
    unmixed = 0
    for seed in range(200):
        with seeded(seed):
            result, result_labels = augment("mixed", images, labels, MEAN, STD, 5)
        if result_labels.ndim == 1:
            assert torch.equal(result, plain) and torch.equal(result_labels, labels)
            unmixed += 1
            continue
        share = result_labels[0, 0]
        torch.testing.assert_close(result_labels, share * torch.eye(5) + (1 - share) * torch.eye(5).roll(-1, dims=1))
        both = torch.stack([plain, plain.roll(1, dims=0)])  # each pixel is one of the two images', or between them
        assert (result >= both.amin(dim=0) - 1e-5).all() and (result <= both.amax(dim=0) + 1e-5).all()
    assert 80 < unmixed < 120


def test_light_draws_nothing():
    with seeded(0):
        before = torch.get_rng_state()
        _, labels = augment("light", *batch(5), MEAN, STD, 5)
        assert torch.equal(torch.get_rng_state(), before) and torch.equal(labels, torch.arange(5))
