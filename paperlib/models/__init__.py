"""The networks that are measured; nothing here knows about measuring them."""

from typing import Any

from torch import nn

from paperlib.models.cct import cct as cct
from paperlib.models.reference import load_reference as load_reference
from paperlib.models.reference import references as references
from paperlib.models.vgg import vgg as vgg


def build(name: str, num_classes: int, image_size: int, **cct_options: Any) -> nn.Module:
    """A `cct_...` or `vgg_...` by its name, with freshly drawn weights; the options are those of `cct` alone."""
    if name.startswith("vgg"):
        return vgg(name, num_classes, image_size)
    return cct(name, num_classes, image_size, **cct_options)
