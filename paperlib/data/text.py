"""A data set of short texts, as numbers of words: CLINC150 (Larson et al. 2019), 150 intents of what users say."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from paperlib.data.images import PADDING, Inputs

UNKNOWN = 1  # a word that the training texts have less than twice; 0 is `PADDING`
FILE = "clinc150/data_full.json"
ADDRESS = "https://raw.githubusercontent.com/clinc/oos-eval/master/data/data_full.json"
SHA256 = "36923c3705a59e08fe9c3883d8bc2dd966ef93e22cb78ac41171782a698d56e0"
WORD = re.compile(r"[a-z0-9']+")


@dataclass(frozen=True)
class Texts(Inputs):
    """Texts in the place of images: x is (n, T) int64, numbers of words, `PADDING` behind the last one."""

    words: tuple[str, ...] = ()  # word of each number from 2

    @cached_property
    def pixels_sha256(self) -> str:
        """Hash of all words and labels."""
        digest = hashlib.sha256(json.dumps(self.words).encode())
        for part in (self.x_train, self.x_test, self.y_train, self.y_test):
            digest.update(part.contiguous().numpy())
        return digest.hexdigest()

    @property
    def vocabulary(self) -> int:
        """How many numbers there are, padding and the unknown word among them."""
        return len(self.words) + 2


def load_clinc150(root: Path, length: int) -> Texts:
    """The in-scope texts: training (100 a label) and validation texts (20, the last ones of each label, which
    `hold_out` with 1/6 keeps from networks) together, and test texts (30). Longer ones are cut to `length` words.
    Words are numbered on the training texts alone. OSError or ValueError, with the way out, for a file that is missing
    or another one."""
    path = root / FILE
    if not path.exists():
        _download(path)
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise ValueError(f"{path} is not the published file: delete it, and it is downloaded again")
    parts = json.loads(content)
    classes = tuple(sorted({label for _, label in parts["train"]}))
    counts = Counter(word for text, _ in parts["train"] for word in set(WORD.findall(text.lower())))
    words = tuple(sorted(word for word, count in counts.items() if count > 1))
    arrays = []
    for names in (("train", "val"), ("test",)):
        pairs = [pair for name in names for pair in parts[name]]
        arrays.append(numbered((text for text, _ in pairs), words, length))
        arrays.append(torch.tensor([classes.index(label) for _, label in pairs]))
    return Texts("clinc150", *arrays, classes, words=words)


def phrases(length: int) -> Texts:
    """Texts that the package makes up, for a demonstration: a label is what is done (4) with what (5). A text names
    both, each by one of three words, among common ones; every tenth names something else instead. 60 training and 20
    test texts a label."""
    random = np.random.default_rng(0)
    common = [f"word{number}" for number in range(40)]
    names = [*(f"do{number}" for number in range(4)), *(f"thing{number}" for number in range(5))]
    named = [[name + part for part in "xyz"] for name in names]
    texts, labels = [], []
    for _, label in itertools.product(range(80), range(20)):
        both = [label // 5, 4 + label % 5]
        if random.random() < 0.1:
            both[random.integers(2)] = random.integers(9)
        said = [*random.choice(common, random.integers(3, 8)), *(random.choice(named[one]) for one in both)]
        texts.append(" ".join(random.permutation(said)))
        labels.append(label)
    words = (*common, *itertools.chain(*named))
    x, y = numbered(texts, words, length), torch.tensor(labels)
    classes = tuple(f"do {label // 5} with thing {label % 5}" for label in range(20))
    return Texts("phrases20", x[:1200], y[:1200], x[1200:], y[1200:], classes, words=words)


def numbered(texts: Iterable[str], words: tuple[str, ...], length: int) -> Tensor:
    """Texts as numbers of their first words: (n, length) int64. A text without a word is one unknown word."""
    number = {word: index for index, word in enumerate(words, start=2)}
    found = [[number.get(word, UNKNOWN) for word in WORD.findall(text.lower())] or [UNKNOWN] for text in texts]
    return torch.tensor([(row + [PADDING] * length)[:length] for row in found])


def _download(path: Path) -> None:
    from torch.hub import download_url_to_file

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        download_url_to_file(ADDRESS, str(path), hash_prefix=SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        raise OSError(
            f"CLINC150 could not be downloaded ({error}); put data_full.json into {path.parent} by hand, or name the "
            "folder above it in PAPERLIB_DATA"
        ) from error
