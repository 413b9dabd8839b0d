"""Few-shot against ridge regression by least squares, and what it reads."""

from collections import Counter

import numpy as np
import pytest
import torch

from data import BadSample, Pairs, Raw, UserError, load_source
from plugins.fewshot import Some, fewshot, some
from tests.conftest import COLOURS, make_pairs, sample_members, write_tar
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


class Counted(Pairs):
    """A hundred pictures of each of three classes, sorted; counts how often one is asked for."""

    attributes = {"colour": [[name] for name in COLOURS]}

    def __init__(self):
        self.asked = Counter()

    def __len__(self):
        return 300

    def raw(self, i):
        self.asked[i] += 1
        return BadSample("missing image") if i == 5 else Raw(None, "", (i // 100,))


def labelled_shards(folder):
    for s in range(4):
        members = [m for i in range(15 * s, 15 * s + 15) for m in sample_members(i)]
        classes = [(f"{i:06d}.cls", str(i % 3).encode()) for i in range(15 * s, 15 * s + 15)]
        write_tar(folder / f"{s:05d}.tar", sorted(members + classes))
    return load_source(str(folder), class_names=str(folder / "names.txt"))


@pytest.mark.parametrize("kind", ["pairs", "shards"])
def test_no_more_images_are_read_than_draws_need(kind, tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    source = Counted() if kind == "pairs" else labelled_shards(tmp_path)
    few = Some(source, 4, None)
    whole = [pair for block in few.once(0, 1, 5, None) for pair in block]
    assert Counter(raw.targets[0] for _, raw in whole) == {0: 4, 1: 4, 2: 4}
    assert [place for place, _ in whole] == sorted(few.places)
    assert few.places == Some(source, 4, None).places
    parts = [pair for r in range(3) for block in few.once(r, 3, 2, None) for pair in block]
    assert sorted(place for place, _ in parts) == sorted(few.places)
    if kind == "pairs":
        assert len(source.asked) < 100
        assert {place % 100 for place, _ in whole} - {*range(8)}  # not the first ones
    else:
        assert {shard for shard, _ in few.places} == {0}


def test_the_command_reads_a_few_times_its_shots(tmp_path):
    few = some(load_source("shapes"), {"shots": 2, "limit": 1000})
    assert 8 * 6 * 2 <= len(few.places) < 2 * 8 * 6 * 2  # of eight shapes and eight colours
    with pytest.raises(UserError, match="no training image has a label"):
        some(load_source(str(make_pairs(tmp_path / "pairs"))), {"shots": 2, "limit": None})
