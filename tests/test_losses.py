"""The losses of Table 6 against dense float64 versions, torch's own, and extreme logits."""

import pytest
import torch
import torch.nn.functional as F

from plugins import find
from tests.conftest import as_labels

B, K, V = 7, 6, 23
LOSSES = {name: find("loss", name) for name in ("bce", "soft_margin", "asl", "two_way")}


@pytest.fixture
def labels(on_device):
    """Sets with padding; one caption of a single token, one token in every caption."""
    torch.manual_seed(1)
    labels = torch.randint(-1, V, (B, K))
    labels[3] = 5
    labels[:, 0] = 5
    return as_labels(labels)


def dense(labels):
    """Labels as K-hot rows [B, V], float64, on the CPU like all that devices are compared with."""
    y = torch.zeros(len(labels), V, dtype=torch.float64, device="cpu")
    for row, tokens in zip(y, labels.tolist(), strict=True):
        for token in tokens:
            if token >= 0:
                row[token] = 1
    return y


def dense_bce(x, y):
    p = torch.sigmoid(x)
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum() / len(x)


def dense_soft_margin(x, y):
    return (1 + torch.exp(-(2 * y - 1) * x)).log().mean()


def dense_asl(x, y):
    p = torch.sigmoid(x)
    q = torch.clamp(p - 0.05, min=0)
    return -(y * p.log() + (1 - y) * q**4 * (1 - q).log()).sum() / len(x)


def dense_two_way(x, y):
    """Each image, then each token, on its own."""
    total = 0.0
    for scores, truth in ((x, y), (x.T, y.T)):
        values = []
        for row, here in zip(scores, truth, strict=True):
            if here.sum() == 0:
                continue
            others = row[here == 0].exp().sum()
            values.append((1 + others * (-row[here == 1] / 4).exp().sum() ** 4).log())
        total = total + torch.stack(values).mean()
    return total


DENSE = {
    "bce": dense_bce,
    "soft_margin": dense_soft_margin,
    "asl": dense_asl,
    "two_way": dense_two_way,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_losses_equal_dense_float64(labels, name, scale):
    torch.manual_seed(2)
    x = torch.randn(B, V) * scale
    ours, theirs = x.clone().requires_grad_(), x.cpu().double().requires_grad_()
    loss, expected = LOSSES[name](ours, labels, torch.ones(V)), DENSE[name](theirs, dense(labels))
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_losses_agree_with_torchs_own(labels):
    x = torch.randn(B, V)
    y = dense(labels).float().to(x.device)
    peer = torch.nn.MultiLabelSoftMarginLoss()(x, y)
    torch.testing.assert_close(LOSSES["soft_margin"](x, labels, torch.ones(V)), peer)
    peer = F.binary_cross_entropy_with_logits(x, y, reduction="sum") / B
    torch.testing.assert_close(LOSSES["bce"](x, labels, torch.ones(V)), peer)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_extreme_logits_are_finite(labels, name):
    for x in (torch.full((B, V), 80.0), torch.full((B, V), -80.0)):
        x = x.requires_grad_()
        LOSSES[name](x, labels, torch.ones(V)).backward()
        assert torch.isfinite(x.grad).all()
