"""The shelf: everything that one flag switches on and the rest works without.

`TABLE` says where each name of a flag lives; `find` looks a name up. A name that is not in the
table is a file of yours: `--loss focal` is `loss` in plugins/focal.py, and no other file changes
(docs/fork.md has an example of each kind).
"""

import argparse
import difflib
import importlib
import importlib.util
import math
import os
import re
from collections.abc import Callable
from pathlib import Path

# flag -> what a file in this folder defines for it
DEFINES = {
    "data": "open_source",
    "tokenizer": "open_tokenizer",
    "model": "build_encoder",
    "init": "load_init",
    "loss": "loss",
    "optimizer": "make_optimizer",
    "objective": "Objective",
    "task": "main",
}

TORCHSETS = "cifar10 cifar100 imagenet pets cars food101 flowers102 dtd stl10 eurosat sun397"
TORCHSETS += " caltech101 coco"  # torchvision's sets, for training and evaluation

# flag -> name -> where it is; .tar is a file with this ending, *.tar a folder that holds some, and
# * any other folder, or file
TABLE = {
    "data": {
        "shapes": "plugins.shapes.open_source",
        "fashion-mnist": "plugins.torchsets.fashion_mnist",
        **{name: f"plugins.torchsets.{name}" for name in TORCHSETS.split()},
        **dict.fromkeys((".tar", ".tar.gz", ".tgz"), "plugins.shards.open_source"),
        **dict.fromkeys(("*.tar", "*.tar.gz", "*.tgz"), "plugins.shards.open_source"),
        **dict.fromkeys((".csv", ".tsv", ".jsonl", ".json"), "plugins.tablefiles.open_source"),
        **dict.fromkeys((".csv.gz", ".tsv.gz", ".jsonl.gz"), "plugins.tablefiles.open_source"),
        "*": "plugins.files.open_source",
    },
    "tokenizer": {
        "bpe": "plugins.bpe.open_tokenizer",
        "gpt2": "plugins.bpe.gpt2",
        "cl100k_base": "plugins.bpe.cl100k_base",
        "o200k_base": "plugins.bpe.o200k_base",
        ".tiktoken": "plugins.bpe.open_saved",
        "clip": "plugins.clip_bpe.open_tokenizer",
        "words": "plugins.tokenizers.open_words",
        "no-stopwords": "plugins.tokenizers.open_without_stopwords",
        ".json": "plugins.tokenizers.open_json",
    },
    "model": {
        "SIZE/PATCH": "superclass.build_encoder",
        "resnet50": "plugins.convnets.resnet50",
        "convnext_tiny": "plugins.convnets.convnext_tiny",
        "timm": "plugins.timm_models.build_encoder",
    },
    "init": {
        "*": "plugins.start.load_init",
        "published": "plugins.timm_models.load_published",
    },
    "loss": {
        "softmax": "superclass.superclass_loss",
        "bce": "plugins.sigmoid_losses.bce",
        "asl": "plugins.sigmoid_losses.asl",
        "soft_margin": "plugins.sigmoid_losses.soft_margin",
        "two_way": "plugins.two_way.loss",
    },
    "optimizer": {
        "adamw": "plugins.adamw.make_optimizer",
        "muon": "plugins.muon.make_optimizer",
    },
    "objective": {
        "superclass": "superclass.Objective",
        "clip": "plugins.contrastive.ContrastiveObjective",
        "siglip": "plugins.contrastive.SigLIPObjective",
        "lit": "plugins.contrastive.LiTObjective",
        "superclip": "plugins.contrastive.SuperCLIPObjective",
        "cap": "plugins.caption.CapObjective",
        "caption": "plugins.caption.PatchesObjective",
        "clipcap": "plugins.caption.PooledObjective",
        "supervised": "plugins.supervised.Objective",
    },
    "task": {
        "loss": "plugins.heldout.main",
        "probe": "plugins.probe.main",
        "fewshot": "plugins.fewshot.main",
        "retrieval": "plugins.retrieval.main",
        "predict": "plugins.predict.main",
        "words": "plugins.pictures.show_words",
        "search": "plugins.pictures.show_search",
        "curves": "plugins.pictures.show_curves",
        "look": "plugins.pictures.show_data",
        "caption": "plugins.caption.main",
        "likelihood": "plugins.likelihood.main",
        "table": "plugins.tables.main",
        "plan": "plugins.plan.main",
    },
}


class UserError(Exception):
    """A mistake of the user, reported in one sentence: what is wrong, where, and what to do."""


class UnknownName(UserError):
    """There is no such name and no such file."""


class Parser(argparse.ArgumentParser):
    """A program's flags. A mistake in them is a UserError that names the flag probably meant."""

    def __init__(self, prog: str | None = None, **options):
        style = argparse.ArgumentDefaultsHelpFormatter
        super().__init__(prog, formatter_class=style, allow_abbrev=False, **options)

    def parse_known_args(self, args=None, namespace=None):
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = next((word.partition("=")[0] for word in unknown if word[0] == "-"), None)
            close = difflib.get_close_matches(flag or "", self._option_string_actions, 1)
            many = f"'{unknown[0]}' is one word too many"
            meant = f"did you mean {close[0]}?" if close else "--help lists all"
            raise UserError(f"unknown flag {flag}: {meant}" if flag else many)
        return parsed, unknown

    def error(self, message: str):
        raise UserError(message)


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """The type of a flag that takes an int or a float from low to high."""

    def numeric(text: str) -> float:  # argparse's message has this name: "invalid numeric value"
        value = kind(text)
        if not low <= value <= high:
            allowed = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    return numeric


def names(flag: str) -> str:
    """The names in the table, for help texts and messages."""
    return ", ".join(name for name in TABLE[flag] if name[0] not in ".*")


def find(flag: str, name: str, other: str | None = None):
    """What `name`, up to its first colon, means to a flag.

    With `other`, the value of that name in the same file instead, None if it is not there.
    Raises UnknownName, or UserError if the file has nothing for this flag.
    """
    name = name.partition(":")[0]
    module, _, attribute = TABLE[flag].get(name, f"plugins.{name}.{DEFINES[flag]}").rpartition(".")
    # A name may come from a stranger's config.json: no file but one of this folder is imported.
    is_file = re.fullmatch(r"\w+", name) and importlib.util.find_spec(module)
    if name not in TABLE[flag] and not is_file:
        raise UnknownName(f"unknown {flag} '{name}': use {names(flag)}, or a file of yours")
    found = getattr(importlib.import_module(module), other or attribute, None)
    if found is None and other is None:
        raise UserError(f"{flag} '{name}': plugins/{name}.py does not define {attribute}")
    return found


# flag -> its names, which are no paths; a flag without any takes nothing but paths
PATHS = {"data": TABLE["data"], "val_data": TABLE["data"], "init": TABLE["init"]}
PATHS |= {"tokenizer": TABLE["tokenizer"], "data_root": (), "class_names": ()}


def absolute(flag: str, value):
    """A flag's value; the paths in it no longer depend on where the command was given."""
    if flag not in PATHS or not value:
        return value
    known, parts = PATHS[flag], []
    endings = tuple(name for name in known if name[0] == ".")
    for part in value.split("::"):
        is_path = not known or os.path.exists(part) or part.lower().endswith(endings)
        is_name = "://" in part or part.partition(":")[0] in known
        parts.append(str(Path.cwd() / part) if is_path and not is_name else part)
    return "::".join(parts)
