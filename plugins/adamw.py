"""AdamW, with which the paper trains (section 4).

--optimizer adamw
"""

import torch
from torch import Tensor


def make_optimizer(
    named: dict[str, Tensor], lr: float, betas: tuple, decay: float
) -> torch.optim.AdamW:
    """AdamW that decays matrices, but not biases, norms, positions and ConvNeXt's layer scales."""
    plain = ("pos_embed", "layer_scale")  # no matrices, although they have more than one axis
    matrices = [p for name, p in named.items() if p.ndim >= 2 and not name.endswith(plain)]
    others = [p for name, p in named.items() if p.ndim < 2 or name.endswith(plain)]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    fused = others[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr, betas=betas, eps=1e-6, fused=fused)
