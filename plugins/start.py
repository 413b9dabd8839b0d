"""What a new run starts from.

    --init RUN          the encoder of a run, and its head if both classify into the same tokens
    --init FILE         an encoder with timm's names, such as a run's encoder.pt

Letters in shapes:  N patches, n = sqrt(N) of them in a row, D width.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import eval as evaluation
from data import UserError
from superclass import ViT


def load_init(model: nn.Module, objective, config, arg: str, say: Callable):
    """Load the encoder of a run's folder or of a file, and the run's head if it fits.

    Raises UserError for weights that cannot be read, are damaged or do not fit.
    """
    init_encoder(model.encoder, Path(arg), say)
    init_head(model, objective, config, Path(arg), say)


def init_encoder(encoder: nn.Module, path: Path, say: Callable = print):
    """Load the encoder of a run's folder, or a state dict with timm's names, into `encoder`.

    Positions for another image size are interpolated. Raises UserError if anything else differs.
    """
    file = path / "encoder.pt" if path.is_dir() else path
    if path.is_dir() and not file.exists():  # a copy by slim.py
        model = evaluation.read_weights(path / "checkpoint.pt").get("model", {})
        state = {key[8:]: model[key] for key in model if key.startswith("encoder.")}
    else:
        state = evaluation.read_weights(file)
    if not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"--init {path} is not an encoder: it must hold nothing but named tensors")
    # What DistributedDataParallel and torch.compile put before the names of what they wrap.
    state = {re.sub(r"^((module|_orig_mod)\.)+", "", key): value for key, value in state.items()}
    if broken := [key for key, value in state.items() if not value.isfinite().all()]:
        raise UserError(f"--init {path} is damaged: {broken[0]} holds NaN or infinite numbers")
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
    say(f"init    the encoder of {path}: {len(state)} tensors")


def init_head(model: nn.Module, objective, config, path: Path, say: Callable = print):
    """Go on with the head of the run in `path`, too, if both runs classify into the same tokens."""
    theirs, ours = path / "tokenizer.tiktoken", config.out / "tokenizer.tiktoken"
    if not (theirs.exists() and ours.exists()) or theirs.read_bytes() != ours.read_bytes():
        return
    first = evaluation.load_run(path)
    if first.objective.has_words and objective.has_words:
        model.norm.load_state_dict(first.model.norm.state_dict())
        model.head.load_state_dict(first.model.head.state_dict())
        say(f"init    the head of {path} too: the tokens are the same")
