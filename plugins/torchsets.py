"""torchvision's labelled sets, under --data-root, and COCO's captions.

--data cifar10 | cifar100 | fashion-mnist | imagenet | pets | cars | food101 | flowers102 | dtd |
       stl10 | eurosat | sun397 | caltech101       a caption is one of 36 templates around the class
--data coco                                        one row for each of an image's captions

All but imagenet, cars and coco are downloaded if they are not there. torchvision unpacks archives
after checking their sums.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from torchvision import datasets

from data import BadSample, Pairs, Raw, UserError
from plugins.files import Files

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
    """A labelled set of torchvision's.

    Args:
        kind: torchvision's class for it.
        files: what it looks for below the root, for messages.
        flag: the argument that chooses the split, and its values for "train" and "val"; None for a
            set that was published without a split, which is then all of it.
        fetch: torchvision can download it.
        name: the names of a class, from torchvision's.
    """

    def __init__(self, kind: type, files: str, flag: tuple | None, fetch: bool, name: Callable,
                 arg: str, split: str, root: str, class_names: list | None):  # fmt: skip
        options = {flag[0]: flag[1 if split == "train" else 2]} if flag else {}
        options |= {"download": True} if fetch else {}  # files that are there are not downloaded
        try:
            self.set = kind(root, **options)
        except Exception as error:  # of a damaged file, too
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"{kind.__name__} cannot be opened ({reason}): torchvision wants "
                f"{' '.join(files.split())} under {root}; copy that there, or name another folder "
                "with --data-root"
            ) from None
        self.set.loader = Path  # data.py opens files, and reads large JPEGs at a lower resolution
        self.has_splits = flag is not None
        if split == "val" and not flag:
            said = f"{kind.__name__} has no official split: these are all of its images"
            print(f"{said}, do not fit a probe to them as well", file=sys.stderr)
        found = getattr(self.set, "classes", None) or self.set.categories
        names = [[part.lower().replace("_", " ") for part in name(n)] for n in found]
        if class_names and len(class_names) != len(names):
            given = f"{len(class_names)} classes, {kind.__name__} has {len(names)}"
            raise UserError(f"--class-names has {given}: give a line for each, in its order")
        self.attributes = {"class": class_names or names}
        # SUN397 lists its files in the order of the disk.
        files = getattr(self.set, "_image_files", range(len(self.set)))
        self.order = sorted(range(len(files)), key=lambda i: files[i])

    def __len__(self) -> int:
        return len(self.order)

    def raw(self, i: int) -> Raw | BadSample:
        try:
            image, target = self.set[self.order[i]]
        except Exception as error:  # where torchvision opens the file by itself
            return BadSample("unreadable image", error)
        rng, names = np.random.default_rng(i), self.attributes["class"][target]
        template, name = (options[rng.integers(len(options))] for options in (TEMPLATES, names))
        return Raw(image, template.format(name), (int(target),))


def one(name: str) -> list[str]:
    return [name.replace("/", " ")]


def first(synonyms: tuple[str, ...]) -> list[str]:
    return [synonyms[0]]


def apart(name: str) -> list[str]:
    return [re.sub(r"([a-z])([A-Z])", r"\1 \2", name)]  # AnnualCrop


def of(kind: type, files: str, *flag, fetch: bool = True, name: Callable = one) -> Callable:
    """A row of the table below: an `open_source`."""
    return partial(Labelled, kind, files, flag or None, fetch, name)


AS_BOOL, TEST = ("train", True, False), ("split", "train", "test")
IMAGENET = """train/WNID/, val/WNID/ and meta.bin (or, with the package scipy, its archives
ILSVRC2012_devkit_t12.tar.gz, ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar)"""
CARS = """stanford_cars/ with devkit/cars_meta.mat, devkit/cars_train_annos.mat,
cars_test_annos_withlabels.mat, cars_train/ and cars_test/ (and the package scipy)"""
PETS = "oxford-iiit-pet/ with images/ and annotations/"
FLOWERS = "flowers-102/ with jpg/, imagelabels.mat and setid.mat (and the package scipy)"
CALTECH = "caltech101/101_ObjectCategories/ (and the package scipy)"

cifar10 = of(datasets.CIFAR10, "cifar-10-batches-py", *AS_BOOL)
cifar100 = of(datasets.CIFAR100, "cifar-100-python", *AS_BOOL)
fashion_mnist = of(datasets.FashionMNIST, "FashionMNIST/raw", *AS_BOOL, name=lambda n: n.split("/"))
imagenet = of(datasets.ImageNet, IMAGENET, "split", "train", "val", fetch=False, name=first)
pets = of(datasets.OxfordIIITPet, PETS, "split", "trainval", "test")
cars = of(datasets.StanfordCars, CARS, *TEST, fetch=False)
food101 = of(datasets.Food101, "food-101/ with images/ and meta/", *TEST)
flowers102 = of(datasets.Flowers102, FLOWERS, *TEST)
dtd = of(datasets.DTD, "dtd/dtd/ with images/ and labels/", *TEST)
stl10 = of(datasets.STL10, "stl10_binary/", *TEST)
eurosat = of(datasets.EuroSAT, "eurosat/2750/", name=apart)
sun397 = of(datasets.SUN397, "SUN397/")
caltech101 = of(datasets.Caltech101, CALTECH)


def coco(arg: str, split: str, root: str, class_names: list | None) -> Files:
    """COCO's images, each once for each of its captions, as published: 2017, or 2014 as coco:2014.

    No class; for retrieval and captioning. A caption of an image that the file does not list is an
    unreadable row, and an image without one is a sample without a caption.
    """
    name = f"{split}{arg or 2017}"
    path = Path(root) / "coco" / "annotations" / f"captions_{name}.json"
    try:
        found = json.loads(path.read_bytes())
        files = {i["id"]: path.parents[1] / name / i["file_name"] for i in found["images"]}
        rows = [(files.get(c["image_id"]), str(c["caption"])) for c in found["annotations"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(
            f"COCO cannot be opened ({error!r:.200}): put the images into {path.parents[1] / name} "
            f"and {path.name} into {path.parent}, or name another folder with --data-root"
        ) from None
    captioned = {file for file, _ in rows}
    without = BadSample("missing caption", f"not in {path.name}")
    rows += [(file, without) for file in files.values() if file not in captioned]
    lost = BadSample("unreadable row", "an annotation without an image")
    rows = [(*row, None, None) if row[0] else lost for row in rows]
    source = Files(rows, None, Counter())
    source.has_splits = True
    return source
