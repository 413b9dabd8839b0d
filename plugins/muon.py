"""Muon for the matrices of the transformer blocks, AdamW for all other weights.

    --optimizer muon

Muon (Jordan et al., 2024) replaces a matrix's averaged gradient by a matrix with the same singular
vectors, but singular values near one, so that rare directions are learned as fast as common ones.
Its step is scaled to the size of AdamW's, and both use one learning rate (Liu et al., 2025, arXiv
2502.16982). `torch.optim.Muon` does the same arithmetic in bfloat16 everywhere, which takes ten
times as long on a CPU that has no such instructions.
"""

import torch
from torch import Tensor

from data import UserError
from plugins import adamw

MATRICES = ("attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight")


def make_optimizer(named: dict[str, Tensor], lr: float, betas: tuple, decay: float) -> "Parts":
    """The optimizer of these parameters."""
    own = {name: p for name, p in named.items() if "blocks." in name and name.endswith(MATRICES)}
    if not own:
        raise UserError("--optimizer muon is for transformer blocks, which this model lacks")
    rest = {name: p for name, p in named.items() if name not in own}
    return Parts(Muon(own.values(), lr), adamw.make_optimizer(rest, lr, betas, decay))


class Muon(torch.optim.Optimizer):
    """Nesterov momentum of 0.95, orthogonalized, without weight decay."""

    def __init__(self, params, lr: float):
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                update = p.grad.lerp(mean.lerp_(p.grad, 1 - 0.95), 0.95)
                # Singular values of one make entries of mean square 1 / max(p.shape); AdamW's
                # steps have about 0.2.
                p.sub_(orthogonalize(update), alpha=group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """The matrix with its singular values brought to between 0.7 and 1.2 by Newton-Schulz steps."""
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    x = x.T if matrix.shape[0] > matrix.shape[1] else x  # then x @ x.T is the small one
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):  # x <- 3.4445 x - 4.775 (x xT) x + 2.0315 (x xT)^2 x
        square = x @ x.T
        factor = torch.addmm(square, square, square, beta=-4.775, alpha=2.0315)
        x = torch.addmm(x, factor, x, beta=3.4445)  # to add inside products takes a fifth less time
    return x.T.to(matrix.dtype) if matrix.shape[0] > matrix.shape[1] else x.to(matrix.dtype)


class Parts:
    """Several optimizers, each of its own parameters, used as one."""

    def __init__(self, *parts: torch.optim.Optimizer):
        self.parts = parts
        self.param_groups = [group for part in parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict):
        for part, its in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(its)
        self.__init__(*self.parts)  # loading replaces the groups
