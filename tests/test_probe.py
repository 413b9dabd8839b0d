"""The linear probe against its optimum, and the choice of its penalty."""

import numpy as np
import torch

from eval import top1
from plugins import probe as probes
from plugins.probe import probe


def blobs(n, seed=0):
    """Three classes of points in 10 dimensions, told apart by the first two alone."""
    rng = np.random.default_rng(seed)
    y = rng.integers(3, size=n)
    x = rng.normal(0, 1, (n, 10))
    x[:, :2] += np.array([[0, 4], [4, 0], [-4, -4]])[y]
    return torch.tensor(x * 7 + 3).float(), torch.tensor(y)


def test_probe_takes_the_penalty_that_is_best_on_held_out_images(monkeypatch):
    """Fits with 1e-3 are good ones, all others are zero."""
    (x, y), (val_x, _) = blobs(300), blobs(20, seed=1)
    real, fitted, checked = probes.regress, [], []

    def regress(x, y, classes, penalty, start=None):
        fitted.append((len(x), penalty))
        weight = real(x, y, classes, 1e-2)
        return weight if penalty == 1e-3 else torch.zeros_like(weight)

    def score(scores, labels):
        checked.append(len(labels))
        return top1(scores, labels)

    monkeypatch.setattr(probes, "regress", regress)
    monkeypatch.setattr(probes, "top1", score)
    scores, penalty = probe(x, y, val_x, 3)
    assert penalty == 1e-3 and checked == [30] * 5
    assert fitted == [(270, 10.0**-n) for n in range(1, 6)] + [(300, 1e-3)]
    train_x, val_x = probes.standardize(x, val_x)
    torch.testing.assert_close(scores, probes.linear(val_x, real(train_x, y, 3, 1e-2)))


def test_probe_separates_what_is_separable():
    (x, y), (val_x, val_y) = blobs(300), blobs(500, seed=1)
    assert top1(probe(x, y, val_x, 3)[0], val_y) > 0.98
    shuffled = y[torch.randperm(len(y), generator=torch.Generator().manual_seed(0))]
    assert top1(probe(x, shuffled, val_x, 3)[0], val_y) < 0.6


def test_probe_reaches_the_optimum():
    """At a minimum the gradient of the penalised cross-entropy is zero; checked in float64."""
    x, y = blobs(200)
    x = probes.standardize(x)[0]
    weight = probes.regress(x, y, 3, 1e-2).double().requires_grad_()
    loss = torch.nn.functional.cross_entropy(probes.linear(x.double(), weight), y)
    (loss + 1e-2 / 2 * weight[:-1].square().sum()).backward()
    assert weight.grad.abs().max() < 1e-3
