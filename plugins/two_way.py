"""The two-way loss of Table 6, which compares tokens within an image, and images within a batch.

    --loss two_way

Letters in shapes:  B images, K tokens of a caption, V vocabulary, W processes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.contrastive import gather

whole_batch, weighted = True, False


def loss(
    logits: Tensor, labels: Tensor, weights: Tensor, t_pos: float = 4.0, t_neg: float = 1.0
) -> Tensor:
    """Two-way multi-label loss (Kobayashi, CVPR 2023) with its published temperatures.

        softplus(t_neg logsumexp_neg(x / t_neg) + t_pos logsumexp_pos(-x / t_pos))

    over negatives and positives: once over the tokens of each image, and once over the images for
    each token that occurs. The means of both are added. The second term sees the whole global
    batch: each process sends two rows of V numbers.
    """
    V = logits.shape[1]
    padded = torch.zeros(len(labels), V + 1, dtype=torch.bool, device=labels.device)
    is_positive = padded.scatter(1, labels.masked_fill(labels < 0, V), True)[:, :V]
    negatives = (logits.float() / t_neg).masked_fill(is_positive, -torch.inf)  # [B, V]
    positives = (-logits.float() / t_pos).masked_fill(~is_positive, -torch.inf)  # [B, V]

    by_image = torch.stack([negatives.logsumexp(dim=1), positives.logsumexp(dim=1)])  # [2, B]
    by_token = torch.stack([negatives.logsumexp(dim=0), positives.logsumexp(dim=0)])  # [2, V]
    by_token = gather(by_token).logsumexp(dim=0)  # [W, 2, V] -> [2, V]
    total = 0.0
    for lse_neg, lse_pos in (by_image, by_token):
        occurs = lse_pos > -torch.inf
        margin = t_neg * lse_neg[occurs] + t_pos * lse_pos[occurs]
        total = total + F.softplus(margin).sum() / occurs.sum().clamp(min=1)
    return total
