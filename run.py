"""Runs: what a run's folder holds, and how it is read and written.

config.json         the flags, and what follows from them: vocabulary size, classes, precision
tokenizer.tiktoken  the tokenizer's vocabulary
checkpoint.pt       everything that training needs to continue exactly
encoder.pt          the encoder alone, with timm's names
metrics.jsonl       one line every --log-every steps
eval.jsonl          one line for each score

This module also holds what all commands share: devices, files that are written whole or not at all,
weights that are loaded into an encoder, and the flags that describe data.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from baselines import CLIP, TEXT_SIZES, SuperCLIP, build_encoder, build_text_tower
from caption import Captioner, LanguageModel
from sources import BUILT_IN, load_source
from superclass import IDF, SuperClass, ViT
from tokenizer import UserError, read_tokenizer

HEADS = ("superclass", "superclip")  # the objectives with a head over the vocabulary
# What may change when a run is resumed; all other flags belong to the run.
MAY_CHANGE = {"micro_batch", "compile", "grad_checkpointing", "workers", "device"}
MAY_CHANGE |= {"save_every", "log_every", "out", "resume", "no_first_eval"}


class Run(NamedTuple):
    """What a run's folder holds, ready for use."""

    folder: Path
    config: argparse.Namespace
    tokenizer: object
    model: SuperClass | CLIP | Captioner
    idf: IDF
    step: int


def load_run(folder: Path, device: torch.device) -> Run:
    """Load a run for evaluation; raises UserError if the folder holds no run or a damaged one."""
    config = read_config(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.tiktoken", vars(config))
    state = read_checkpoint(config)
    try:
        model, idf = build_model(config), IDF(config.vocab_size)
        model.load_state_dict(state["model"])
        idf.load_state_dict(state["idf"])
        model, step = model.to(device).eval(), state["progress"]["step"]
        return Run(folder, config, tokenizer, model, idf.to(device), step)
    except Exception as error:  # files that were changed can contradict each other anywhere
        reason = f"its files do not fit together ({error!r:.300})"
        raise UserError(f"{folder} is damaged: {reason}") from None


def build_model(config: argparse.Namespace) -> SuperClass | CLIP | Captioner:
    """The untrained model of a run's objective."""
    encoder = build_encoder(config.model, config.image_size)
    if config.grad_checkpointing and not isinstance(encoder, ViT):
        raise UserError(f"--grad-checkpointing is for the ViT, not for {config.model}")
    encoder.grad_checkpointing = config.grad_checkpointing
    if config.objective == "caption":
        width, depth, heads = TEXT_SIZES.get(config.model.split("/")[0], TEXT_SIZES["B"])
        small = config.vocab_size + 1, width, depth // 2, heads, 2048  # the last id is the end mark
        language_model = LanguageModel(*(config.lm_shape or small))
        return Captioner(encoder, language_model, config.prefix, frozen_lm=bool(config.lm))
    if config.objective in ("clip", "lit", "superclip"):
        text = build_text_tower(config.model, config.vocab_size)
        if config.objective == "superclip":
            return SuperCLIP(encoder, text)
        return CLIP(encoder, text, locked=config.objective == "lit")
    supervised = config.objective == "supervised"
    outputs = sum(map(len, config.classes.values())) if supervised else config.vocab_size
    return SuperClass(encoder, outputs)


def open_sources(config: argparse.Namespace, trains: bool = True, **given) -> tuple:
    """The training and the validation source of a run; `given` flags replace the run's own.

    The first is None if nothing trains on it. The second is None if none is named and the training
    source has no split of its own. When nothing trains, `data` alone names what is evaluated. Other
    `data` has classes of its own.
    """
    given = {key: value for key, value in given.items() if value is not None}
    data = given.get("data", config.data)
    val = given.get("val_data", None if "data" in given else config.val_data)
    if val is None and (data in BUILT_IN or ("data" in given and not trains)):
        val = data
    names = None if "data" in given else config.class_names
    where = config.data_root, given.get("class_names", names)
    train = load_source(data, "train", *where) if trains else None
    return train, val and load_source(val, "val", *where)


# ------------------------------------------------------------------------------------------------
# Files.


def read_config(folder: Path) -> argparse.Namespace:
    """The run's config.json; raises UserError if there is none or it is damaged."""
    try:
        return argparse.Namespace(**json.loads((folder / "config.json").read_text()), out=folder)
    except OSError:
        raise UserError(f"{folder} holds no run: there is no config.json in it") from None
    except (ValueError, TypeError) as error:  # not JSON, or not an object
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None


def fingerprint(config: argparse.Namespace) -> str:
    """What ties a checkpoint to its run: a hash of its own flags and of its vocabulary."""
    flags = {key: value for key, value in vars(config).items() if key not in MAY_CHANGE}
    vocabulary = (config.out / "tokenizer.tiktoken").read_bytes()
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode() + vocabulary).hexdigest()


def read_checkpoint(config: argparse.Namespace) -> dict:
    """The checkpoint of a run; raises UserError if it is missing, damaged, or another run's."""
    state = read_weights(config.out / "checkpoint.pt")
    if state.get("fingerprint") != fingerprint(config):
        path = config.out / "checkpoint.pt"
        raise UserError(f"{path} does not belong to the config.json and the tokenizer beside it")
    return state


def read_weights(path: Path) -> dict:
    """A file of tensors by name; no code in it is ever run."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        reason = type(error).__name__
        raise UserError(f"checkpoint {path} is damaged and cannot be read: {reason}") from None


def publish(content: dict | bytes | str, path: Path):
    """Write a file whole or not at all: beside the old one, flushed to disk, then renamed.

    Raises UserError if that fails, for instance on a full disk; the old file is then intact.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when a write fails
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); the old one is intact") from None


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a .jsonl file without those that were cut off; none if there is no file."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def own_rows(folder: Path) -> list[dict]:
    """The scores of a run on its own data and classes, which tables and curves show."""
    return [row for row in read_jsonl(folder / "eval.jsonl") if not row.get("flags")]


def append_jsonl(path: Path, rows: list[dict]):
    """Append lines to a .jsonl file, whose last line may have been cut off."""
    try:
        with open(path, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read() not in (b"", b"\n")
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.write(("\n" * cut + lines).encode())
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not outlive the lines before it
    except OSError as error:  # a full disk
        raise UserError(f"{path} cannot be written ({error})") from None


def init_encoder(encoder: nn.Module, path: Path, say: Callable = print):
    """Load the encoder of a run's folder, or a state dict with timm's names, into `encoder`.

    Positions for another image size are interpolated. Raises UserError if anything else differs.
    """
    state = read_weights(path / "encoder.pt" if path.is_dir() else path)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--init {path} is not an encoder: it must hold nothing but named tensors")
    if isinstance(encoder, ViT) and "pos_embed" in state:
        new = encoder.image_size // encoder.patch_size
        old = math.isqrt(state["pos_embed"].numel() // encoder.width)
        if old != new and state["pos_embed"].shape == (1, old * old, encoder.width):
            # [1, N, D] -> [1, D, n, n], an image with D channels, to the new size and back.
            grid = state["pos_embed"].float().transpose(1, 2).unflatten(2, (old, old))
            options = {"mode": "bicubic", "antialias": True, "align_corners": False}
            grid = nn.functional.interpolate(grid, (new, new), **options)
            state["pos_embed"] = grid.flatten(2).transpose(1, 2)
            say(f"init    positions of {path} interpolated from {old} x {old} to {new} x {new}")
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:  # it lists the keys
        reason = " ".join(str(error).split())
        raise UserError(f"--init {path} does not fit: {reason:.1000}") from None


def init_head(model: nn.Module, path: Path, config: argparse.Namespace, say: Callable = print):
    """Go on with the head of the run in `path`, too, if both runs classify into the same tokens."""
    theirs, ours = path / "tokenizer.tiktoken", config.out / "tokenizer.tiktoken"
    if not (theirs.exists() and ours.exists()) or theirs.read_bytes() != ours.read_bytes():
        return
    if {config.objective, read_config(path).objective} <= set(HEADS):
        first = load_run(path, torch.device("cpu")).model
        model.norm.load_state_dict(first.norm.state_dict())
        model.head.load_state_dict(first.head.state_dict())
        say(f"init    the head of {path} too: the tokens are the same")


# ------------------------------------------------------------------------------------------------
# Devices and flags.


def pick_device(name: str) -> torch.device:
    """The device of that name, set to exact arithmetic; "auto" is CUDA, else MPS, else the CPU."""
    # The same bits each time on a GPU, too, for whoever sets what cuBLAS needs for that.
    torch.use_deterministic_algorithms("CUBLAS_WORKSPACE_CONFIG" in os.environ)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in matrix products
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        problem = f"device '{name}' is unknown or not available here"
        raise UserError(f"{problem}: use auto, cuda, mps or cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The autocast type; "auto": bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        # Without AMX, AVX-512's bf16 does not pay for its conversions: 0.83 of fp32's speed.
        name = "bf16" if features.get("amx_bf16") else "fp32"
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[name]


def peak_memory(device: torch.device) -> float | None:
    """The peak of the GPU's allocated memory so far, elsewhere the process's own peak; in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def number(kind: type, low: float, high: float = math.inf) -> Callable:
    """The type of a flag that takes an int or a float from low to high."""

    def numeric(text: str) -> float:  # argparse's message has this name: "invalid numeric value"
        value = kind(text)
        if not low <= value <= high:
            allowed = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {allowed}, not {text}")
        return value

    return numeric


def add_data_flags(add: Callable):
    """Flags that describe a source and how training sees it; for train.py and show.py."""
    add("--data-root", default="data", help="where torchvision keeps its data sets")
    add("--class-names", help="file with one class a line, several names separated by commas")
    kinds = "bpe:N or words:N (learned from the captions), clip, a name that tiktoken knows, or a "
    kinds += ".tiktoken or Hugging Face tokenizer.json file"
    add("--tokenizer", default="bpe:512", help=kinds)
    add("--drop-stopwords", action="store_true", help="leave words such as 'the' out of captions")
    add("--image-size", type=number(int, 1), default=32, help="pixels")
    add("--min-scale", type=number(float, 0, 1), default=0.9, help="smallest area of a random crop")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--color-jitter", type=number(float, 0, 1), default=0.0, help="strength; the paper: 0.32")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)
