"""A transformer for texts: the encoders and the classifier of the CCT, behind word embeddings instead of convolutions.

The reference implementation of the CCT has the same for texts (CCT). Padding takes no part: nobody attends to it, and
SeqPool does not weigh it.
"""

import re

from torch import Tensor, nn

from paperlib.data import PADDING
from paperlib.models.cct import TransformerClassifier, initialise

HEAD_WIDTH = 32  # nodes of a head, unless `heads` says otherwise
MOST_BLOCKS, MOST_WIDTH = 48, 4096


class TextTransformer(nn.Module):
    """Numbers of words (B, T) int64 -> logits (B, labels). Use `text_transformer`."""

    def __init__(self, tokenizer: nn.Embedding, classifier: TransformerClassifier):
        super().__init__()
        self.tokenizer = tokenizer
        self.classifier = classifier

    def mask(self, x: Tensor) -> Tensor:
        """Which positions hold a word: (B, T) bool."""
        return x != PADDING

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.tokenizer(x), self.mask(x))


def text_transformer(
    name: str,
    num_classes: int,
    length: int,
    vocabulary: int,
    positional_embedding: str = "learnable",
    heads: int | None = None,
    attention_dropout: float = 0.1,
    stochastic_depth: float = 0.1,
) -> TextTransformer:
    """Build `text_<encoders>x<width>` for texts of `length` words with freshly drawn weights; FF blocks are twice as
    wide (choice), the rest as in `cct`. ValueError for a name or number that gives no such network."""
    match = re.fullmatch(r"text_(\d+)x(\d+)", name)
    blocks, width = (int(part) for part in match.groups()) if match else (0, 0)
    if not 1 <= blocks <= MOST_BLOCKS or not 1 <= width <= MOST_WIDTH:
        raise ValueError(
            f"unknown model {name!r}: use text_<encoders>x<width> with up to {MOST_BLOCKS} encoders, {MOST_WIDTH} wide"
        )
    heads = heads or max(1, width // HEAD_WIDTH)
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width} of {name}: use a divisor of {width}")
    shape = (blocks, width, heads, 2 * width, length, num_classes)
    classifier = TransformerClassifier(*shape, positional_embedding, attention_dropout, stochastic_depth)
    network = TextTransformer(nn.Embedding(vocabulary, width, padding_idx=PADDING), classifier)
    network.apply(initialise)
    nn.init.trunc_normal_(network.tokenizer.weight, std=0.2)
    if positional_embedding == "learnable":
        nn.init.trunc_normal_(classifier.positional_emb, std=0.2)
    return network
