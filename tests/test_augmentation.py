"""Augmentation, published, mixed and light: timm's operations, shapes, soft labels, repeatability."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment

from paperlib.data import randaugment
from paperlib.data.augmentation import augment
from paperlib.training import seeded

MEAN, STD = torch.full((3, 1, 1), 0.4), torch.full((3, 1, 1), 0.2)


def batch(n=32, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator), torch.arange(n) % 5


def augmented(seed, n=32):
    with seeded(seed):
        return augment("published", *batch(n), MEAN, STD, 5)


@pytest.mark.parametrize("n", [1, 27])
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


TIMM = {  # operation -> timm's, and its argument for a level in -1..1
    "auto_contrast": ("AutoContrast", None),
    "equalize": ("Equalize", None),
    "invert": ("Invert", None),
    "rotate": ("Rotate", lambda level: 30 * level),
    "posterize": ("PosterizeIncreasing", lambda level: 4 - int(4 * abs(level))),
    "solarize": ("SolarizeIncreasing", lambda level: 256 - int(256 * abs(level))),
    "solarize_add": ("SolarizeAdd", lambda level: int(110 * abs(level))),
    "color": ("ColorIncreasing", lambda level: max(0.1, 1 + 0.9 * level)),
    "contrast": ("ContrastIncreasing", lambda level: max(0.1, 1 + 0.9 * level)),
    "brightness": ("BrightnessIncreasing", lambda level: max(0.1, 1 + 0.9 * level)),
    "sharpness": ("SharpnessIncreasing", lambda level: max(0.1, 1 + 0.9 * level)),
    "shear_x": ("ShearX", lambda level: 0.3 * level),
    "shear_y": ("ShearY", lambda level: 0.3 * level),
    "translate_x": ("TranslateXRel", lambda level: 0.45 * level),
    "translate_y": ("TranslateYRel", lambda level: 0.45 * level),
}


FILL = torch.tensor([100.0, 110.0, 120.0]).view(3, 1, 1)


def scenes(n=6, size=24, edge=0):
    """Images with structure and some noise, of medium greys, with an edge of `FILL`."""
    generator = torch.Generator().manual_seed(1)
    small = torch.rand(n, 3, 5, 5, generator=generator) * 180 + 30
    images = torch.nn.functional.interpolate(small, size=size, mode="bicubic")
    images = (images + 12 * torch.randn(images.shape, generator=generator)).round().clamp(5, 245)
    inside = torch.zeros(size, size, dtype=torch.bool)
    inside[edge : size - edge, edge : size - edge] = True
    return torch.where(inside, images, FILL)


def test_operations_are_those_of_the_recipe():
    recipe = auto_augment.rand_augment_transform("rand-m9-mstd0.5-inc1", {"img_mean": (100, 110, 120)})
    named = {name for name, _ in TIMM.values()}
    assert TIMM.keys() == randaugment.OPERATIONS.keys() and named == set(auto_augment._RAND_INCREASING_TRANSFORMS)
    assert {op.prob for op in recipe.ops} == {randaugment.DONE}
    assert {(op.magnitude, op.magnitude_std) for op in recipe.ops} == {(randaugment.MAGNITUDE, randaugment.SPREAD)}


@pytest.mark.parametrize("name", TIMM)
def test_an_operation_is_timms(name):
    """On every image of a batch with its own level, to two grey values (PIL cuts off where we round). The edge is as
    grey as what fills empty pixels, with which PIL does not blend."""
    moved = name.startswith(("rotate", "shear", "translate"))
    images, levels = scenes(edge=2 * moved), torch.tensor([0.9, -0.9, 0.3, -0.5, 0.97, 0.77])
    number = list(randaugment.OPERATIONS).index(name)
    result = randaugment.operate(images, torch.full((6,), number), levels, FILL)
    timms, argument = TIMM[name]
    options = (
        {"fillcolor": tuple(FILL.flatten().int().tolist()), "resample": Image.Resampling.BILINEAR} if moved else {}
    )
    for image, own, level in zip(images, result, levels.tolist(), strict=True):
        pil = Image.fromarray(image.permute(1, 2, 0).byte().numpy())
        given = () if argument is None else (argument(level),)
        expected = np.asarray(auto_augment.NAME_TO_OP[timms](pil, *given, **options)).astype(float)
        assert np.abs(own.permute(1, 2, 0).numpy() - expected).max() <= 2
        assert abs(own - image).max() > 2  # something was done


def test_images_that_draw_nothing_stay():
    images = scenes()
    result = randaugment.operate(images, torch.tensor([-1, 2, -1, 2, -1, -1]), torch.ones(6), torch.zeros(3, 1, 1))
    changed = (result != images).flatten(1).any(dim=1)
    assert changed.tolist() == [False, True, False, True, False, False]


def test_operations_are_left_out_as_often_as_the_recipe_says():
    """Of two operations, each done with probability 0.5, a quarter of the images get none (and some change nothing)."""
    images = scenes(1).expand(2000, -1, -1, -1)
    with seeded(0):
        result = randaugment.rand_augment(images, torch.zeros(3, 1, 1))
    unchanged = (result == images).flatten(1).all(dim=1).float().mean()
    assert 0.22 < unchanged < 0.30
    assert len(result.flatten(1).unique(dim=0)) > 900  # every image draws its own


def test_crops_hold_most_of_an_image_and_half_are_mirrored():
    """A ramp from left to right: its ends, and its direction."""
    ramp = torch.linspace(0, 255, 32).expand(1000, 3, 32, 32).round()
    with seeded(0):
        rows = randaugment.crop_and_mirror(ramp)[:, 0, 16]
    rising = rows[:, -1] > rows[:, 0]
    assert 0.45 < rising.float().mean() < 0.55
    span = (rows.amax(dim=1) - rows.amin(dim=1)) / 255
    assert span.min() > 0.75 and span.max() > 0.98
    assert (rows[rising].diff(dim=1) >= 0).all()


def test_erased_parts_are_noise():
    with seeded(0):
        erased = randaugment.erase(torch.zeros(2000, 3, 16, 16))
    parts = erased[erased != 0]
    assert 0.22 < (erased != 0).flatten(1).any(dim=1).float().mean() < 0.28
    assert abs(parts.mean()) < 0.02 and abs(parts.std() - 1) < 0.02
    share = (erased[:, 0] != 0).flatten(1).float().mean(dim=1)
    assert share.max() < 0.40 and share[share > 0].min() < 0.05


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
