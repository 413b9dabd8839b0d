"""Retrieval: ranks counted by hand, and the command with a head, and without one."""

import json
import math

import pytest
import torch

import eval as evaluation
from plugins.retrieval import retrieval
from tests.test_pictures import save_run


def test_retrieval_counts_by_hand():
    scores = torch.tensor([[5.0, 1, 0], [4, 3, 0], [0, 9, 1], [0, 0, 0]])
    captions = torch.tensor([0, 1, 2, 2])
    # Image 0 finds its caption first, 1 and 2 second, 3 not before two others that score as well.
    # Caption 0 finds its image first; 1 finds another (9 > 3) first; 2 finds image 2 first.
    found = retrieval(scores, captions, at=(1, 2, 3))
    assert [found[f"i2t@{k}"] for k in (1, 2, 3)] == [0.25, 0.75, 1.0]
    assert [found[f"t2i@{k}"] for k in (1, 2, 3)] == pytest.approx([2 / 3, 1.0, 1.0])


def test_a_text_without_a_known_token_is_found_by_nobody():
    scores = torch.tensor([[-3.0, -math.inf]]).repeat(5, 1)
    assert retrieval(scores, torch.tensor([0, 0, 0, 0, 1]), at=(1,))["i2t@1"] == 0.8


def test_retrieval_from_the_head(tmp_path, capsys):
    folder = save_run(tmp_path / "run")
    flags = ["--data", str(folder / "pairs"), "--workers", "0", "--limit", "12"]
    evaluation.main(["retrieval", str(folder), *flags])
    *_, row = map(json.loads, (folder / "eval.jsonl").read_text().splitlines())
    assert row["images"] == row["captions"] == 12 and "i2t@1" in capsys.readouterr().out
    assert row["i2t@5"] > 0.9  # four of twelve captions have the right colour: by chance, 5 / 12


def test_a_run_without_words_and_texts_is_refused(tmp_path, capsys):
    classes = {"class": [["red"], ["blue"]]}
    folder = save_run(tmp_path / "run", objective="supervised", classes=classes)
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["retrieval", str(folder), "--data", str(folder / "pairs")])
    assert "needs a head over words or a text tower" in capsys.readouterr().err
