"""Losses of Table 6 that ask about each token on its own, with a sigmoid.

    --loss bce | soft_margin | asl

Each takes logits [B, V] and labels [B, K], sets of token ids padded with -1, and returns a float32
scalar. They take no notice of the IDF weights; neither does Table 6, whose 75.6 for softmax is
Table 7's figure without IDF.
"""

import torch.nn.functional as F
from torch import Tensor

weighted = False
log_probabilities = F.logsigmoid


def bce(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Binary cross-entropy of each token's presence: sum over V, mean over B.

    -log sigmoid(x) = softplus(x) - x for the caption's tokens and -log(1 - sigmoid(x)) =
    softplus(x) for all others: a sum over V minus the caption's logits.
    """
    x, is_token = caption_logits(logits, labels)
    return (F.softplus(logits.float()).sum(dim=1) - (x * is_token).sum(dim=1)).mean()


def soft_margin(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """log(1 + exp(-y x)), y = 1 for the caption's tokens and -1 for others: mean over V and B.

    This is torch's MultiLabelSoftMarginLoss, and `bce` divided by V. Training differs nevertheless:
    gradient clipping affects only `bce`, AdamW's eps only this one.
    """
    return bce(logits, labels, weights) / logits.shape[1]


def asl(
    logits: Tensor, labels: Tensor, weights: Tensor, gamma: float = 4.0, margin: float = 0.05
) -> Tensor:
    """Asymmetric loss (Ridnik et al., 2021) with gamma+ = 0: sum over V, mean over B.

    Tokens of the caption cost -log p, others -q^gamma log(1 - q) with q = max(p - margin, 0), so
    tokens that are clearly absent stop contributing.
    """

    def absent(x: Tensor) -> Tensor:
        q = (x.sigmoid() - margin).clamp(min=0)
        return -(q**gamma) * (1 - q).log()

    x, is_token = caption_logits(logits, labels)
    present = (-F.logsigmoid(x) - absent(x)) * is_token
    return (absent(logits.float()).sum(dim=1) + present.sum(dim=1)).mean()


def caption_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [B, K] of each caption's tokens, in float32, and a mask [B, K] without padding."""
    is_token = labels >= 0
    return logits.gather(1, labels.masked_fill(~is_token, 0)).float(), is_token
