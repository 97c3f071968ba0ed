"""Images: splits, statistics, augmentation, and files as strangers have them."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from paperlib import data
from paperlib.data import glyphs


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pictures(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def images_of(y_train, y_test, labels=3, size=4):
    """A data set of random pictures with these labels."""
    parts = []
    for seed, y in enumerate((y_train, y_test)):
        parts += [torch.from_numpy(pictures(len(y), size, size, 3, seed=seed)).permute(0, 3, 1, 2), torch.tensor(y)]
    return data.Images("toy", *parts, classes=tuple("abcdefgh"[:labels]))


# --- splits


@given(
    st.lists(st.integers(2, 9), min_size=1, max_size=4).flatmap(
        lambda counts: st.permutations([label for label, count in enumerate(counts) for _ in range(count)])
    ),
    st.floats(0.01, 0.99),
)
def test_held_out_are_the_last_of_every_label(labels, fraction):
    kept, held = (part.tolist() for part in data.held_out(torch.tensor(labels), fraction))
    assert sorted(kept + held) == list(range(len(labels)))  # disjoint and complete
    assert kept == sorted(kept) and held == sorted(held)
    for label in set(labels):
        mine = [i for i, other in enumerate(labels) if other == label]
        count = sum(i in held for i in mine)
        assert [i for i in mine if i in held] == mine[-count:]
        assert 1 <= count <= len(mine) - 1
        assert abs(count - len(mine) * fraction) <= 0.5 + 1e-6 or count in (1, len(mine) - 1)


def test_a_label_with_one_image_cannot_be_held_out(refuses):
    with refuses("label 2 has one training image"):
        data.held_out(torch.tensor([0, 0, 1, 1, 2]), 0.5)


def test_held_out_is_balanced_and_exact():
    labels = torch.arange(100).repeat(10)
    kept, held = data.held_out(labels, 0.1)
    assert labels[held].bincount().tolist() == [1] * 100 and labels[kept].bincount().tolist() == [9] * 100
    assert held.tolist() == list(range(900, 1000))


def test_limit_takes_the_first_of_every_label():
    toy = images_of([2, 0, 0, 1, 0, 2, 1, 1, 2, 0], [0, 0, 1, 2, 1, 2])
    limited = data.limit(toy, 6)
    for x, y, part in ((toy.x_train, toy.y_train, "train"), (toy.x_test, toy.y_test, "test")):
        mine = [i for label in range(3) for i in (y == label).nonzero().flatten().tolist()[:2]]
        assert torch.equal(getattr(limited, f"x_{part}"), x[sorted(mine)])
        assert torch.equal(getattr(limited, f"y_{part}"), y[sorted(mine)])
    assert limited.classes == toy.classes
    for images in (0, 100):  # 0 keeps all; so does more than there are
        assert data.limit(toy, images).sha256 == toy.sha256


@pytest.mark.parametrize("images", [1, 5, -6])
def test_limit_leaves_no_label_out(images, refuses):
    with refuses("limit"):
        data.limit(images_of([0, 1, 2] * 3, [0, 1, 2]), images)


def test_resplit_deals_every_image_once(tmp_path, write_cache):
    write_cache(tmp_path / "flowers102-8.npz", 3, 8, train=17, test=14)  # 93 images
    official, dealt = (data.load(name, tmp_path, 8) for name in ("flowers102", "flowers102-resplit"))
    assert (len(dealt.x_train), len(dealt.x_test)) == (74, 10)  # and 9 that nobody reads
    label = {
        bytes(image.numpy()): int(y)
        for images, labels in ((official.x_train, official.y_train), (official.x_test, official.y_test))
        for image, y in zip(images, labels, strict=True)
    }
    images, labels = torch.cat([dealt.x_train, dealt.x_test]), torch.cat([dealt.y_train, dealt.y_test])
    assert len({bytes(image.numpy()) for image in images}) == 84
    assert all(label[bytes(image.numpy())] == y for image, y in zip(images, labels, strict=True))
    assert data.load("flowers102-resplit", tmp_path, 8).sha256 == dealt.sha256


def test_hash_sees_pixels_and_labels():
    toy = images_of([0, 1, 2, 0], [0, 1, 2])
    brighter = toy.x_train.clone()
    brighter[3, 2, 1, 0] ^= 1
    others = [replace(toy, x_train=brighter), replace(toy, y_test=toy.y_test.flip(0))]
    others.append(replace(toy, classes=("x", *toy.classes[1:])))
    x, y = torch.cat([toy.x_train, toy.x_test]), torch.cat([toy.y_train, toy.y_test])
    others.append(replace(toy, x_train=x[:5], y_train=y[:5], x_test=x[5:], y_test=y[5:]))  # one image more to train on
    assert len({toy.sha256, *(other.sha256 for other in others)}) == 5
    assert replace(toy, x_train=toy.x_train.contiguous()).sha256 == toy.sha256  # not how memory is laid out


# --- statistics


def test_statistics_equal_numpys():
    images = pictures(2100, 2, 3, 3)  # more than a chunk
    mean, std = data.channel_statistics(torch.from_numpy(images).permute(0, 3, 1, 2))
    assert mean.shape == std.shape == (3, 1, 1)
    np.testing.assert_allclose(mean.flatten(), (images / 255).mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(std.flatten(), (images / 255).std(axis=(0, 1, 2)), rtol=1e-5)


def test_normalised_images_have_mean_0_and_deviation_1():
    images = torch.from_numpy(pictures(50, 3, 4, 4))
    images[:, 1] //= 3
    normalised = data.normalise(images, *data.channel_statistics(images))
    assert normalised.dtype == torch.float32
    assert torch.allclose(normalised.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    assert torch.allclose(normalised.std(dim=(0, 2, 3), unbiased=False), torch.ones(3), atol=1e-5)


def test_a_constant_channel_can_be_normalised():
    images = torch.full((5, 3, 4, 4), 77, dtype=torch.uint8)
    normalised = data.normalise(images, *data.channel_statistics(images))
    assert normalised.abs().max() < 1e-2


# --- augmentation


def transforms_of(image, shift, flip):
    """Every picture that one image may become, by padding and cropping: bytes -> what was done."""
    padded = np.pad(image, ((0, 0), (shift, shift), (shift, shift)))
    size = image.shape[-1]
    results = {}
    for mirrored in (False, True) if flip else (False,):
        source = padded[:, :, ::-1] if mirrored else padded
        for down in range(2 * shift + 1):
            for right in range(2 * shift + 1):
                crop = source[:, down : down + size, right : right + size]
                results[np.ascontiguousarray(crop).tobytes()] = (mirrored, down, right)
    return results


def epoch(images, batch_size=4, shift=0, flip=False, seed=0):
    """One epoch of augmented batches; an image's label is its number."""
    images = torch.as_tensor(images)
    return list(data.augmented_batches(images, torch.arange(len(images)), batch_size, shift, flip, seeded(seed)))


@pytest.mark.parametrize("shift, flip", [(0, False), (0, True), (2, False), (1, True), (4, True), (7, True)])
def test_augmented_images_are_shifts_and_mirror_images(shift, flip):
    images = pictures(30, 3, 6, 6)
    done = Counter()
    for batch, labels in epoch(images, 4, shift, flip):
        assert batch.dtype == torch.uint8 and batch.shape[1:] == (3, 6, 6)
        for image, label in zip(batch.numpy(), labels.tolist(), strict=True):
            allowed = transforms_of(images[label], shift, flip)
            done[allowed[np.ascontiguousarray(image).tobytes()]] += 1  # KeyError: not an allowed picture
    assert sum(done.values()) == 30
    assert (len(done) > 1) == (shift > 0 or flip)


def test_all_shifts_and_mirror_images_are_as_frequent():
    """Chi-square with 17 degrees of freedom: above 40.8 once in 1,000 seeds."""
    image = pictures(1, 3, 5, 5)
    allowed = transforms_of(image[0], 1, True)
    batches = epoch(np.repeat(image, 1800, axis=0), 600, 1, True)
    done = Counter(allowed[np.ascontiguousarray(x).tobytes()] for batch, _ in batches for x in batch.numpy())
    assert len(allowed) == 18
    assert sum((done[what] - 100) ** 2 / 100 for what in allowed.values()) < 40.8


def test_an_epoch_visits_every_image_once():
    images = pictures(10, 3, 4, 4)
    batches = epoch(images)
    assert [len(batch) for batch, _ in batches] == [len(labels) for _, labels in batches] == [4, 4, 2]
    order = torch.cat([labels for _, labels in batches])
    assert order.sort().values.tolist() == list(range(10)) and order.tolist() != list(range(10))
    assert torch.equal(torch.cat([batch for batch, _ in batches]), torch.from_numpy(images)[order])  # else untouched


def test_augmentation_follows_its_generator():
    images = pictures(12, 3, 4, 4)
    first, again, other = (epoch(images, 5, 2, True, seed) for seed in (0, 0, 1))
    for (x, y), (x_again, y_again) in zip(first, again, strict=True):
        assert torch.equal(x, x_again) and torch.equal(y, y_again)
    assert not torch.equal(first[0][1], other[0][1])


def test_augmentation_leaves_the_stored_images_alone():
    images = torch.from_numpy(pictures(6, 3, 4, 4))
    before = images.clone()
    for batch, _ in epoch(images, 6, 1, True):
        batch.zero_()
    assert torch.equal(images, before)


# --- embedded data


def test_glyphs_are_balanced_and_the_same_every_time():
    loaded = data.load("glyphs100", image_size=16)
    assert loaded.x_train.shape == (4000, 3, 16, 16) and loaded.x_test.shape == (1000, 3, 16, 16)
    assert loaded.x_train.dtype == torch.uint8 and loaded.y_train.dtype == torch.int64
    assert len(set(loaded.classes)) == 100
    assert loaded.y_train.bincount().tolist() == [40] * 100
    assert loaded.y_test.bincount().tolist() == [10] * 100
    x_train, y_train, x_test, y_test, classes = glyphs.draw(16)
    assert tuple(classes) == loaded.classes
    for drawn, again in ((x_train, loaded.x_train), (x_test, loaded.x_test)):
        assert np.array_equal(drawn, again.permute(0, 2, 3, 1))
    assert np.array_equal(y_train, loaded.y_train) and np.array_equal(y_test, loaded.y_test)


def test_unknown_names_are_refused(refuses):
    with refuses("cifar10'"):
        data.load("cifar10")


# --- folders of images


def folder(path, parts):
    """Write {"train/a": [images]} as PNG files 0.png, 1.png, ..."""
    for name, images in parts.items():
        (path / name).mkdir(parents=True)
        for number, image in enumerate(images):
            (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path / name / f"{number}.png")
    return f"folder:{path}"


def two_labels(**changed):
    """Two labels, two training images and one test image each, 8 x 8."""
    parts = {"train/a": (2, 0), "train/b": (2, 1), "test/a": (1, 2), "test/b": (1, 3)}
    drawn = {name: list(pictures(count, 8, 8, 3, seed=seed)) for name, (count, seed) in parts.items()}
    return drawn | changed


def loaded_as(path, image, size=8):
    """How a file of `test/a` comes out, (size, size, 3)."""
    name = folder(path, two_labels(**{"test/a": [image]}))
    return data.load(name, image_size=size).x_test[0].permute(1, 2, 0).numpy()


def test_folder_of_images(tmp_path):
    parts = two_labels()
    loaded = data.load(folder(tmp_path, parts), image_size=8)
    assert loaded.classes == ("a", "b")
    for part, x, y in (("train", loaded.x_train, loaded.y_train), ("test", loaded.x_test, loaded.y_test)):
        expected = {image.tobytes(): label for label in (0, 1) for image in parts[f"{part}/{'ab'[label]}"]}
        pixels = x.permute(0, 2, 3, 1).contiguous().numpy()
        assert {image.tobytes(): label for image, label in zip(pixels, y.tolist(), strict=True)} == expected
    assert data.load(f"folder:{tmp_path}", image_size=8).sha256 == loaded.sha256


def test_grey_images(tmp_path):
    grey = pictures(8, 8)
    assert np.array_equal(loaded_as(tmp_path, grey), grey[..., None].repeat(3, axis=2))


def test_16_bit_grey_images_are_scaled(tmp_path):
    grey = pictures(8, 8)
    grey[0, :2] = 0, 255
    deep = grey.astype(np.uint16) * 257
    assert np.array_equal(loaded_as(tmp_path, deep), grey[..., None].repeat(3, axis=2))


def test_palette_images(tmp_path):
    colours = pictures(4, 3)
    index = pictures(8, 8) % 4
    image = Image.new("P", (8, 8))
    image.putdata(index.flatten().tolist())
    image.putpalette(colours.flatten().tolist())
    assert np.array_equal(loaded_as(tmp_path, image), colours[index])


@pytest.mark.parametrize("channels", [2, 4], ids=["grey", "colour"])
def test_alpha_is_laid_on_black(channels, tmp_path):
    image = pictures(8, 8, channels)
    image[0, 0, -1], image[0, 1, -1] = 0, 255
    colour = image[..., :-1].astype(float).repeat(4 - channels + 1 if channels == 2 else 1, axis=2)
    found = loaded_as(tmp_path, image)
    np.testing.assert_allclose(found, colour * image[..., -1:] / 255, atol=1)
    assert (found[0, 0] == 0).all() and np.array_equal(found[0, 1], colour[0, 1])


@pytest.mark.parametrize("turn", [False, True])
def test_oblong_images_keep_their_centre(turn, tmp_path):
    image = pictures(8, 14, 3)
    expected = image[:, 3:11]
    if turn:
        image, expected = image.transpose(1, 0, 2), expected.transpose(1, 0, 2)
    assert np.array_equal(loaded_as(tmp_path, np.ascontiguousarray(image)), expected)


def test_images_are_resized(tmp_path):
    image = np.zeros((16, 16, 3), np.uint8)
    image[:8, :8], image[8:, 8:] = 200, (10, 20, 30)
    found = loaded_as(tmp_path, image, size=4)
    assert found.shape == (4, 4, 3)
    corners = [found[y, x].tolist() for y in (0, 3) for x in (0, 3)]  # too far from the edges to be blurred
    assert corners == [[200] * 3, [0] * 3, [0] * 3, [10, 20, 30]]


def test_labels_of_train_and_test_must_match(tmp_path, refuses):
    name = folder(tmp_path, two_labels() | {"test/c": [pictures(8, 8, 3)]})
    with refuses("same labels.*'c'"):
        data.load(name, image_size=8)


def test_one_label_is_not_enough(tmp_path, refuses):
    name = folder(tmp_path, {"train/a": [pictures(8, 8, 3)], "test/a": [pictures(8, 8, 3)]})
    with refuses("one label"):
        data.load(name, image_size=8)


@pytest.mark.parametrize("part", ["train", "test"])
def test_a_missing_part_is_named(part, tmp_path, refuses):
    parts = {name: images for name, images in two_labels().items() if not name.startswith(part)}
    with refuses(f"no {part}/"):
        data.load(folder(tmp_path, parts), image_size=8)


def test_an_empty_label_is_named(tmp_path, refuses):
    with refuses("b"):
        data.load(folder(tmp_path, two_labels(**{"train/b": []})), image_size=8)


@pytest.mark.parametrize("content", [b"", b"not an image", "half"], ids=["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(content, tmp_path, refuses):
    name = folder(tmp_path, two_labels())
    file = tmp_path / "train" / "b" / "1.png"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2] if content == "half" else content)
    with refuses("b/1.png"):
        data.load(name, image_size=8)


# --- caches


def cache(root, **changed):
    """Write a CIFAR-100 cache of three labels; return its arrays."""
    arrays = {
        "x_train": pictures(6, 8, 8, 3),
        "y_train": np.array([0, 1, 2, 2, 1, 0]),
        "x_test": pictures(3, 8, 8, 3, seed=1),
        "y_test": np.array([2, 1, 0]),
        "classes": np.array(["apple", "bear", "cup"]),
    }
    arrays = {key: value for key, value in (arrays | changed).items() if value is not None}
    np.savez_compressed(root / "cifar100.npz", **arrays)
    return arrays


def test_cache_is_read_as_it_is(tmp_path):
    arrays = cache(tmp_path)
    loaded = data.load("cifar100", tmp_path)
    assert loaded.classes == ("apple", "bear", "cup")
    for key in ("x_train", "x_test"):
        assert np.array_equal(getattr(loaded, key).permute(0, 2, 3, 1), arrays[key])
    for key in ("y_train", "y_test"):
        assert np.array_equal(getattr(loaded, key), arrays[key]) and getattr(loaded, key).dtype == torch.int64


def test_another_size_is_made_once_from_the_cache(tmp_path):
    cache(tmp_path)
    first = data.load("cifar100", tmp_path, image_size=4)
    assert first.x_train.shape == (6, 3, 4, 4) and first.y_train.tolist() == [0, 1, 2, 2, 1, 0]
    original = data.load("cifar100", tmp_path)
    assert (first.x_train.float().mean(dim=(2, 3)) - original.x_train.float().mean(dim=(2, 3))).abs().max() < 12
    (tmp_path / "cifar100.npz").unlink()
    (tmp_path / "cifar100-4.npz").rename(tmp_path / "cifar100.npz")
    assert data.load("cifar100", tmp_path).sha256 == first.sha256


def test_a_truncated_cache_is_named(tmp_path, refuses):
    cache(tmp_path)
    file = tmp_path / "cifar100.npz"
    whole = file.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with refuses("cifar100.npz"):
            data.load("cifar100", tmp_path)


def test_a_damaged_cache_is_named(tmp_path, refuses):
    """A few bytes in the middle of the pixels: the file opens, and only decompressing finds out."""
    cache(tmp_path)
    file = tmp_path / "cifar100.npz"
    whole = bytearray(file.read_bytes())
    for start in (60, 80, 200, 400):
        damaged = whole.copy()
        damaged[start : start + 20] = b"\xff" * 20
        file.write_bytes(damaged)
        with refuses("cifar100.npz"):
            data.load("cifar100", tmp_path)


def test_a_single_array_is_no_cache(tmp_path, refuses):
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "cifar100.npz")
    with refuses("cifar100.npz"):
        data.load("cifar100", tmp_path)


class Trap:
    """Leaves a trace if somebody unpickles it."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return (open, (str(self.trace), "w"))


def test_pickles_are_not_opened(tmp_path, refuses):
    cache(tmp_path, classes=np.array([Trap(tmp_path / "trace"), "b", "c"], dtype=object))
    with refuses("cifar100.npz"):
        data.load("cifar100", tmp_path)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize("key", ["x_train", "y_test", "classes"])
def test_a_missing_array_is_named(key, tmp_path, refuses):
    cache(tmp_path, **{key: None})
    with refuses(f"cifar100.npz.*{key}"):
        data.load("cifar100", tmp_path)


@pytest.mark.parametrize(
    "changed",
    [
        {"y_train": np.array([0, 1, 2, 2, 1])},
        {"y_train": np.array([0, 1, 2, 2, 1, 3])},
        {"y_train": np.array([0, 1, 2, 2, 1, -1])},
        {"y_train": np.array([0, 1, 1, 0, 1, 0])},
        {"y_test": np.array([0, 1, 1])},
        {"y_train": np.arange(24).reshape(6, 4) % 3},
        {"y_train": np.array([0, 1, 2, 2, 1, 0.5])},
        {"x_train": pictures(6, 8, 8, 3) / 255},
        {"x_train": pictures(6, 8, 8)},
        {"x_train": pictures(6, 3, 8, 8)},
        {"x_train": pictures(6, 8, 10, 3)},
        {"x_test": pictures(3, 10, 10, 3)},
        {"x_test": pictures(0, 8, 8, 3), "y_test": np.array([], dtype=int)},
    ],
    ids=[
        "too few labels", "label too large", "negative label", "label never trained", "label never tested",
        "several labels", "fractional label", "float pixels", "grey", "channels first", "oblong", "sizes differ",
        "no test images",
    ],
)  # fmt: skip
def test_unusable_arrays_are_refused(changed, tmp_path, refuses):
    cache(tmp_path, **changed)
    with refuses("cifar100"):
        data.load("cifar100", tmp_path)


def test_images_that_would_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, monkeypatch, refuses):
    name = folder(tmp_path, two_labels())
    monkeypatch.setattr(data.folder.os, "sysconf", lambda key: {"SC_PAGE_SIZE": 1000, "SC_PHYS_PAGES": 2}[key])
    monkeypatch.setattr(data.folder, "square", lambda image, side, bits: 1 / 0)
    with refuses(r"6 images of 8 x 8 pixels need 0.0 GB .* this machine has 0.0 GB"):
        data.load(name, tmp_path, image_size=8)


def test_held_out_images_are_kept_from_networks_and_from_normalisation():
    x = torch.randint(0, 256, (30, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    y = torch.arange(30) % 3
    whole = data.Images("toy", x, y, x, y, ("a", "b", "c"))
    images = data.hold_out(whole, 0.2)
    held = {bytes(image.numpy()) for image in x[images.held]}
    assert images.y_train[images.held].bincount().tolist() == [2, 2, 2]
    assert not held & {bytes(image.numpy()) for image in images.seen.x_train} and len(images.seen.x_train) == 24
    assert torch.equal(images.statistics[0], data.channel_statistics(images.seen.x_train)[0])
    assert images.sha256 == whole.sha256 and torch.equal(data.hold_out(whole, 0.2).held, images.held)
    assert torch.equal(images.seen.seen.x_train, images.seen.x_train) and whole.seen is whole
