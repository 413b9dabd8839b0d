"""torchvision's classified sets; a caption puts the class name into one of 36 templates.

--data cifar10 | cifar100 | fashion-mnist        under --data-root; downloaded if it is not there
"""

import re
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

from data import Pairs, Raw, UserError

TEMPLATES = """a photo of a {}|one {}|the {} in the picture|my favourite {}|{}|is this a {} ?
i found this {} yesterday|a small picture of a {}|a {} on a plain background|new {} for sale
{}, front view|a close look at the {}|just a {}|what a nice {}!|an old {}|{} seen from the side
there is a {} here|a {} and nothing else|low resolution {}|image 12 of 40: {}
the best {} of the year
a picture of the {} at home|buy the {} online today|this {} belongs to my friend|somebody's {}
{} in good condition|we sell a {} like this|photo: {}|you are looking at a {}|{} with free shipping
a typical {}|an unusual {}|size m {}|the label says {}|please rate my {}|a {} that i drew"""
TEMPLATES = re.split(r"[|\n]", TEMPLATES)


class Labelled(Pairs):
    """A set of torchvision's that tells "train" from its test set by the argument `train`."""

    has_splits = True

    def __init__(self, kind: type, arg: str, split: str, root: str, class_names: list | None):
        try:  # files that are already there are not downloaded
            self.set = kind(root, train=split == "train", download=True)
        except (RuntimeError, OSError) as error:
            folder = Path(root) / (getattr(kind, "base_folder", None) or f"{kind.__name__}/raw")
            raise UserError(
                f"{kind.__name__} could not be downloaded ({error}): copy its files to {folder} as "
                "torchvision expects them, or name another folder with --data-root"
            ) from None
        names = [name.lower().replace("_", " ").split("/") for name in self.set.classes]
        self.attributes = {"class": names}

    def __len__(self) -> int:
        return len(self.set)

    def raw(self, i: int) -> Raw:
        image, target = self.set[i]
        rng, names = np.random.default_rng(i), self.attributes["class"][target]
        template, name = (options[rng.integers(len(options))] for options in (TEMPLATES, names))
        return Raw(image, template.format(name), (target,))


cifar10 = partial(Labelled, datasets.CIFAR10)
cifar100 = partial(Labelled, datasets.CIFAR100)
fashion_mnist = partial(Labelled, datasets.FashionMNIST)
