"""The run that comes with the repository, and the script that slims a run for it."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

import eval as evaluation
import train
from eval import load_run, read_config
from plugins.start import init_encoder
from plugins.tables import finished
from superclass import build_encoder
from tests.conftest import ROOT, make_shards, train_flags

KEPT = ROOT / "pretrained" / "icons"


def test_the_kept_run_names_drawings(tmp_path, capsys):
    things = ["umbrella", "lock", "house", "envelope"]
    drawings = [str(ROOT / "assets" / f"{thing}.png") for thing in things]
    evaluation.main(["words", str(KEPT), *drawings, "--lift", "--out", str(tmp_path / "words.png")])
    lines = capsys.readouterr().out.splitlines()
    for thing, line in zip(things, lines, strict=True):
        words = [part.split()[0] for part in line.split(": ")[1].split(", ")]
        assert thing in words[:2]  # "home" and "unlock" are close


def test_the_kept_run_is_small_and_starts_others():
    assert sum(file.stat().st_size for file in KEPT.iterdir()) <= 6_000_000
    config = read_config(KEPT)
    init_encoder(build_encoder(config.model, config.image_size), KEPT)


def test_the_kept_runs_own_data_is_named_where_it_is_missing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["zeroshot", str(KEPT)])
    assert "(the run's own data; --data names other data)" in capsys.readouterr().err


def test_a_slimmed_run_evaluates_but_does_not_resume(tmp_path, capsys, monkeypatch):
    run, out = tmp_path / "run", tmp_path / "slim"
    train.main(train_flags(make_shards(tmp_path / "data"), run, "--samples", "16"))
    monkeypatch.syspath_prepend(ROOT / "experiments")
    monkeypatch.setattr(sys, "argv", ["slim.py", str(run), str(out)])
    script = importlib.import_module("slim")
    script.main()
    given = {"data": f"{Path.cwd()}/a.tar::{Path.cwd()}/b.tar", "val_data": None, "loss": "softmax"}
    assert script.portable(given) == given | {"data": "a.tar::b.tar"}
    whole, slim = (load_run(folder, torch.device("cpu")) for folder in (run, out))
    for a, b in zip(whole.model.parameters(), slim.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert torch.equal(whole.idf.df, slim.idf.df) and slim.step == whole.step
    assert finished(out)[1] == finished(run)[1]
    rows, flags = (out / "eval.jsonl").exists(), ["--data", str(tmp_path / "data")]
    evaluation.main(["retrieval", str(out), *flags, "--workers", "0"])
    said = capsys.readouterr()
    assert "i2t@1" in said.out and "is a copy without an optimizer: it keeps no new row" in said.err
    assert (out / "eval.jsonl").exists() == rows  # it may be under version control
    with pytest.raises(SystemExit, match="2"):
        train.main(["--out", str(out), "--resume"])
    assert "holds no optimizer's state" in capsys.readouterr().err
