"""Few-shot: a classifier on the frozen features of a few images of each class (Table 2).

    python eval.py fewshot RUN [--shots N]

Letters in shapes:  N images,  D width,  C classes.
"""

import statistics

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import Run, TooFew, measure_command, top1
from plugins.probe import standardize

DRAWS = 3  # of the shots


def fewshot(
    train: Tensor, labels: Tensor, val: Tensor, names: list[list[str]], shots: int, seed: int
) -> Tensor:
    """Few-shot by regularised least squares (CapPa's protocol, with big_vision's constants).

    `shots` images of each class are drawn; W minimises |X W - Y|^2 + l2 |W|^2 in closed form, with
    X standardised and a constant column of 100 as the nearly free bias, Y one-hot in {-1, 1} and
    l2 = 1024. Setting the gradient to zero gives (X^T X + l2 I) W = X^T Y.

    Returns: scores [N, C] of the validation features. Raises TooFew for too small a class.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c, (name, *_) in enumerate(names):
        members = (labels == c).nonzero().flatten()
        if len(members) < shots:
            raise TooFew(f"class '{name}' has {len(members)} training images, fewer than {shots}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    chosen = torch.cat(chosen)
    x, val = standardize(train[chosen].double(), val.double())
    x, val = F.pad(x, (0, 1), value=100.0), F.pad(val, (0, 1), value=100.0)  # [n, D + 1]
    y = 2 * F.one_hot(labels[chosen], len(names)).double() - 1  # [n, C]
    penalty = 1024 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)  # [D + 1, C]
    return val @ weight


def fitted(run: Run, train: Tensor, labels: Tensor, x: Tensor, y: Tensor, names, options) -> dict:
    """The part of a row that features x with the classes y give: mean and deviation over draws."""
    shots = options["shots"]
    found = [top1(fewshot(train, labels, x, names, shots, n), y) for n in range(DRAWS)]
    row = {"top1": statistics.mean(found), "deviation": statistics.stdev(found)}
    return row | {"shots": shots, "draws": DRAWS}


def main(argv: list[str]):
    measure_command(["fewshot", *argv])
