"""timm's networks as encoders, with their own normalisation and their published weights.

    --model timm:vit_small_patch16_224              any ViT, and whatever else gives a square map
    --model timm:NAME --init published              start from the weights that timm has for NAME

`timm.list_models("vit*", pretrained=True)` lists the names; NAME.TAG picks one of several weights.
A ViT takes any --image-size that its patches divide. A network with batch norm, as many CNNs have,
sees one micro-batch at a time, so its results depend on how a batch is split.

Letters in shapes:  B images, S image size, N patches in n x n places, D width.
"""

import difflib
import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

import data
from plugins import UserError


class Tokens:
    """What is put before a timm network's own class: it keeps its names and maps to tokens."""

    def normalise_as(self, mean: tuple, std: tuple):
        """Take images with data.py's mean and deviation, and give the network those that it knows.

        Both are affine, so the second after undoing the first is one factor and one sum a channel.
        """
        ours, theirs = torch.tensor([data.MEAN, data.STD]), torch.tensor([mean, std])
        factor, shift = ours[1] / theirs[1], (ours[0] - theirs[0]) / theirs[1]
        for name, values in (("factor", factor), ("shift", shift)):  # not among the weights
            self.register_buffer(f"image_{name}", values.view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S], normalised by data.py -> tokens [B, N, D] of the places alone."""
        x = self.forward_features(images * self.image_factor + self.image_shift)
        if x.ndim == 4:
            places_last = getattr(self, "output_fmt", "NCHW") == "NCHW"
            return x.flatten(2).transpose(1, 2) if places_last else x.flatten(1, 2)
        return x[:, getattr(self, "num_prefix_tokens", 0) :]  # without class and register tokens


def options(name: str, image_size: int) -> dict:
    """What `timm.create_model` is given: no pooling, no classifier, the size if it matters."""
    import timm  # a package that nothing else needs

    size = {"img_size": image_size} if timm.get_pretrained_cfg(name).fixed_input_size else {}
    return {"num_classes": 0, "global_pool": "", **size}


def create(name: str, image_size: int, pretrained: bool = False) -> nn.Module:
    """timm's network of that name, as `Tokens`."""
    import timm

    net = timm.create_model(name, pretrained, **options(name, image_size))
    net.__class__ = type("Encoder", (Tokens, type(net)), {})
    net.normalise_as(net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
    net.width = net.num_features
    return net


def build_encoder(image_size: int, name: str = "") -> nn.Module:
    """The untrained network; ValueError if it gives no square map of tokens at this size.

    UserError without timm or for a name that timm does not have.
    """
    try:
        import timm
    except ImportError:
        raise UserError("--model timm:NAME needs the package timm: pip install timm") from None
    if not timm.is_model(name):  # no address of a hub either: a config.json may be a stranger's
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), 3, 0.5)
        hint = f"close to it: {', '.join(close)}" if close else "timm.list_models() has the names"
        raise UserError(f"--model timm:NAME: timm has no network '{name}'; {hint}")
    try:
        with torch.device("meta"):  # shapes without numbers
            trial = create(name, image_size).eval()
            tokens = trial(torch.empty(1, 3, image_size, image_size))
        tokens.sum().backward()
        patch = getattr(getattr(trial, "patch_embed", None), "patch_size", 1)
        N, P = tokens.shape[1], patch if isinstance(patch, int) else patch[0]
        if math.isqrt(N) ** 2 != N or image_size % P:
            raise ValueError("its tokens are not a square map of the whole image")
        net = create(name, image_size)
    except Exception as error:  # each of timm's networks has its own
        raise ValueError(f"timm's network cannot be used so: {error}") from None
    used = {key for key, p in trial.named_parameters() if p.grad is not None}
    for key, p in net.named_parameters():
        p.requires_grad_(key in used)  # a few weights belong to the pooling
    return net


def load_published(model: nn.Module, objective, config, arg: str, say: Callable):
    """Load timm's published weights for the network of --model; UserError if it cannot."""
    name = config.model.partition(":")[2]
    if not isinstance(model.encoder, Tokens):
        raise UserError(f"--init published is for --model timm:NAME, not for {config.model}")
    try:
        state = create(name, config.image_size, pretrained=True).state_dict()
    except Exception as error:  # from a missing network to a file that does not fit
        given = ", ".join(f"{k}={v!r}" for k, v in options(name, config.image_size).items())
        made = f"timm.create_model('{name}', pretrained=True, {given})"
        raise UserError(
            f"the published weights of timm's {name} cannot be had ({str(error).split('. ')[0]}): "
            f"save the state_dict() of {made} where there is a network, and give the file to --init"
        ) from None
    model.encoder.load_state_dict(state)
    say(f"init    the published weights of timm's {name}: {len(state)} tensors")
