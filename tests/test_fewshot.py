"""Few-shot against ridge regression by least squares."""

import numpy as np
import pytest
import torch

from data import UserError
from plugins.fewshot import fewshot
from tests.test_probe import blobs


def test_fewshot_is_ridge_regression():
    (x, y), (val_x, _) = blobs(300), blobs(20, seed=1)
    names = [["a"], ["b"], ["c"]]
    scores = fewshot(x, y, val_x, names, shots=300 // 4, seed=0)
    # All 75 shots of each class; an independent solution by least squares on an augmented system.
    generator = torch.Generator().manual_seed(0)
    chosen = torch.cat(
        [
            m[torch.randperm(len(m), generator=generator)[:75]]
            for m in ((y == c).nonzero()[:, 0] for c in range(3))
        ]
    )
    a = x[chosen].double().numpy()
    mean, std = a.mean(axis=0), a.std(axis=0, ddof=1) + 1e-5
    design = np.hstack([(a - mean) / std, np.full((len(a), 1), 100.0)])
    target = np.where(y[chosen].numpy()[:, None] == np.arange(3), 1.0, -1.0)
    rows = np.vstack([design, 32 * np.eye(11)])  # 32^2 = 1024
    weight = np.linalg.lstsq(rows, np.vstack([target, np.zeros((11, 3))]), rcond=None)[0]
    tests = np.hstack([(val_x.double().numpy() - mean) / std, np.full((20, 1), 100.0)])
    np.testing.assert_allclose(scores.numpy(), tests @ weight, rtol=1e-6, atol=1e-8)
    with pytest.raises(UserError, match=r"class 'a' has \d+ training images, fewer than 200"):
        fewshot(x, y, val_x, names, shots=200, seed=0)
