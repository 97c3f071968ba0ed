"""VGG with batch norm for small images: torchvision's layers, the mean over pixels, and one linear classifier.

torchvision's own VGG ends in three wide linear layers meant for 224 pixels; small images leave one pixel or few.
"""

import re
from collections import OrderedDict

from torch import nn

WIDEST = 1024  # filters of the first layer: 2 billion weights
CONFIGURATIONS = {"11": "A", "13": "B", "16": "D", "19": "E"}  # weight layers -> name in torchvision


def parse(name: str, image_size: int = 16) -> tuple[str, int]:
    """`vgg_<layers>x<filters>` -> (layers, filters); ValueError for a name that gives no such network, or images that
    are too small for it."""
    match = re.fullmatch(r"vgg_(\d+)x(\d+)", name)
    if not match or match[1] not in CONFIGURATIONS or int(match[2]) < 1:
        raise ValueError(f"unknown model {name!r}: use vgg_<layers>x<filters> with layers in 11, 13, 16, 19")
    if int(match[2]) > WIDEST:
        raise ValueError(
            f"{name}: {int(match[2]):,} filters are more than {WIDEST}, for which no machine is large enough"
        )
    if image_size < 16:
        raise ValueError(f"{name} halves images four times: image_size must be at least 16, not {image_size}")
    return match[1], int(match[2])


def vgg(name: str, num_classes: int, image_size: int = 16) -> nn.Sequential:
    """Build `vgg_<layers>x<filters>` with freshly drawn weights: images (B, 3, S, S) -> logits (B, num_classes).
    image_size is only checked: any from 16 will do.

    layers is 11, 13, 16 or 19; filters is the number of filters in the first layer (64 in the published networks;
    later layers have up to 8 times as many). Convolutions are drawn as torchvision's, Kaiming over the outputs.
    """
    layers, filters = parse(name, image_size)
    from torchvision.models.vgg import cfgs, make_layers  # here, because the import takes seconds

    # Without the last pooling: the mean over pixels takes its place, and 16 to 31 pixels are not too few.
    plan = [part if part == "M" else part * filters // 64 for part in cfgs[CONFIGURATIONS[layers]][:-1]]
    features = make_layers(plan, batch_norm=True)
    for module in features:
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    fc = nn.Linear(plan[-1], num_classes)
    nn.init.normal_(fc.weight, std=0.01)
    nn.init.zeros_(fc.bias)
    return nn.Sequential(OrderedDict(features=features, pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=fc))
