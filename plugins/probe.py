"""The linear probe: a classifier on frozen features.

    python eval.py probe RUN [--limit N]

Letters in shapes:  N images,  D width,  C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from eval import Run, TooFew, measure_command, top1


def standardize(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Zero mean, unit variance on the training features: a batch norm without affine."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]


def probe(
    train: Tensor, labels: Tensor, val: Tensor, classes: int, seed: int = 0
) -> tuple[Tensor, float]:
    """Linear probe (section 4, after MAE): batch norm without affine, then one linear layer.

    The penalty is the best of five on a held-out tenth of the training set; then all of the set is
    fitted. The problem is convex, so L-BFGS replaces the paper's LARS: no learning rate to tune.

    Returns: scores [N, C] of the validation features, and the penalty. TooFew below ten images.
    """
    if len(train) < 10:
        raise TooFew(f"{len(train)} labelled training images: give ten")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, rest = order.tensor_split([len(order) // 10])
    fit, check = standardize(train[rest], train[held])
    best, weight = (-1.0, 0.0), None
    for penalty in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        weight = regress(fit, labels[rest], classes, penalty, weight)  # from the last solution on
        best = max(best, (top1(linear(check, weight), labels[held]), penalty))
    train, val = standardize(train, val)
    return linear(val, regress(train, labels, classes, best[1])), best[1]


def regress(x: Tensor, y: Tensor, classes: int, penalty: float, start=None) -> Tensor:
    """Minimise cross-entropy + penalty / 2 |W|^2 with L-BFGS; returns [D + 1, C], the bias last."""
    start = torch.zeros(x.shape[1] + 1, classes, device=x.device) if start is None else start
    weight = start.clone().requires_grad_()
    options = {"max_iter": 200, "tolerance_change": 1e-7, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight], **options)

    @torch.enable_grad()
    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x, weight), y) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:-1] + weight[-1]


def fitted(run: Run, train: Tensor, labels: Tensor, x: Tensor, y: Tensor, names, options) -> dict:
    """The part of a row that features x with the classes y give."""
    moved = (t.to(run.idf.df.device) for t in (train, labels, x))
    scores, penalty = probe(*moved, len(names))
    return {"top1": top1(scores.cpu(), y), "penalty": penalty, "train": len(labels)}


def main(argv: list[str]):
    measure_command(["probe", *argv])
