"""CIFAR-100's own superclasses."""

import torch
from torch import Tensor

# CIFAR-100's own superclasses, five labels each
SUPERCLASSES = """
beaver dolphin otter seal whale | aquarium_fish flatfish ray shark trout | orchid poppy rose sunflower tulip
bottle bowl can cup plate | apple mushroom orange pear sweet_pepper | clock keyboard lamp telephone television
bed chair couch table wardrobe | bee beetle butterfly caterpillar cockroach | bear leopard lion tiger wolf
bridge castle house road skyscraper | cloud forest mountain plain sea | camel cattle chimpanzee elephant kangaroo
fox porcupine possum raccoon skunk | crab lobster snail spider worm | baby boy girl man woman
crocodile dinosaur lizard snake turtle | hamster mouse rabbit shrew squirrel
maple_tree oak_tree palm_tree pine_tree willow_tree | bicycle bus motorcycle pickup_truck train
lawn_mower rocket streetcar tank tractor
"""


def superclasses(classes: tuple[str, ...]) -> Tensor | None:
    """The number of each label's superclass (L,), where the labels are CIFAR-100's; None for other labels."""
    groups = [group.split() for group in SUPERCLASSES.replace("\n", "|").split("|") if group.strip()]
    number = {name: index for index, group in enumerate(groups) for name in group}
    return torch.tensor([number[name] for name in classes]) if set(classes) == set(number) else None
