"""The networks that are measured; nothing here knows about measuring them."""

from typing import Any

from torch import nn

from paperlib.models.cct import cct as cct
from paperlib.models.reference import load_reference as load_reference
from paperlib.models.reference import references as references
from paperlib.models.text import text_transformer as text_transformer
from paperlib.models.vgg import vgg as vgg


def build(name: str, num_classes: int, image_size: int, vocabulary: int = 0, **options: Any) -> nn.Module:
    """A `cct_...`, `vgg_...` or `text_...` by its name, with freshly drawn weights; the options are those of
    transformers. Of texts, image_size is their number of words, and vocabulary how many words there are."""
    if name.startswith("vgg"):
        return vgg(name, num_classes, image_size)
    if name.startswith("text"):
        return text_transformer(name, num_classes, image_size, vocabulary, **options)
    return cct(name, num_classes, image_size, **options)
