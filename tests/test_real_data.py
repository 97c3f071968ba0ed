"""The real data sets, where PAPERLIB_DATA has them: splits, balance and the published channel statistics."""

import json
import os
from pathlib import Path

import pytest
import torch

from paperlib import data
from paperlib.data.superclasses import superclasses

ROOT = Path(os.environ.get("PAPERLIB_DATA", "data")).resolve()


@pytest.mark.skipif(not (ROOT / "cifar100.npz").exists(), reason="no CIFAR-100 at hand")
def test_cifar100_is_the_published_one():
    images = data.load("cifar100", ROOT)
    assert images.y_train.bincount().tolist() == [500] * 100 and images.y_test.bincount().tolist() == [100] * 100
    assert images.classes[0] == "apple" and images.classes[-1] == "worm"
    mean, std = images.statistics
    torch.testing.assert_close(mean.flatten(), torch.tensor([0.5071, 0.4867, 0.4408]), atol=2e-4, rtol=0)
    torch.testing.assert_close(std.flatten(), torch.tensor([0.2675, 0.2565, 0.2761]), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "flowers-102").exists(), reason="no Flowers-102 at hand")
def test_flowers102_has_the_official_splits(tmp_path):
    (tmp_path / "flowers-102").symlink_to(ROOT / "flowers-102")  # the cache is written beside it
    images = data.load("flowers102", tmp_path, 64)
    assert len(images.x_train) == 2040 and len(images.x_test) == 6149 and len(images.classes) == 102
    assert images.x_test.shape[1:] == (3, 64, 64)
    assert images.y_train[:1020].bincount().tolist() == images.y_train[1020:].bincount().tolist() == [10] * 102
    _, held = data.held_out(images.y_train, 0.5)
    assert sorted(held.tolist()) == list(range(1020, 2040))  # the official validation split
    assert (tmp_path / "flowers102-64.npz").exists()
    dealt = data.load("flowers102-resplit", tmp_path, 64)
    assert (len(dealt.x_train), len(dealt.x_test)) == (6552, 819)  # 818 validation images are left out
    assert dealt.y_train.unique().tolist() == dealt.y_test.unique().tolist() == list(range(102))


@pytest.mark.skipif(not (ROOT / "clinc150" / "domains.json").exists(), reason="no domains of CLINC150 at hand")
def test_domains_of_clinc150_are_the_published_ones():
    domains = json.loads((ROOT / "clinc150" / "domains.json").read_text())
    classes = tuple(sorted(name for names in domains.values() for name in names))
    group = dict(zip(classes, superclasses(classes).tolist(), strict=True))
    assert [len({group[name] for name in names}) for names in domains.values()] == [1] * 10
    assert len(set(group.values())) == 10
