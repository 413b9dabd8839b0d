"""docs/reproduce.md: its recipe on made-up data, its rehearsal, and its calculated tables."""

import json
import re
import signal
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import eval as evaluation
import train
from superclass import SuperClass, build_encoder, superclass_loss
from tests import roofline
from tests.conftest import ROOT, caption, encoded, picture, write_tar
from tests.die import launch
from tests.test_readme import commands
from tests.test_torchsets import imagenet, score
from tests.test_train import assert_same, metrics, refused, state

sys.path.insert(0, str(ROOT / "experiments"))
import hours

PAGE = ROOT / "docs/reproduce.md"


def recipe() -> list[str]:
    """The page's command for CC3M, without what only a GPU is for."""
    words = next(w for w in commands(PAGE) if w[:2] == ["python", "train.py"] and "data/cc3m" in w)
    return [word for word in words[2:] if word != "--compile"]


def small(data, out) -> list[str]:
    """Later flags replace earlier ones."""
    sizes = "--model XS/8 --image-size 32 --tokenizer bpe:300 --batch-size 16 --micro-batch 8"
    sizes += (
        " --samples 400 --warmup 4 --lr 2e-3 --workers 1 --lanes 4 --save-every 6 --log-every 1"
    )
    more = ["--data", str(data), "--out", str(out), "--precision", "fp32", "--device", "cpu"]
    return [*recipe(), *sizes.split(), *more]


@pytest.fixture(scope="module")
def cc3m(tmp_path_factory):
    """240 samples as img2dataset writes them; three of them are broken."""
    folder = tmp_path_factory.mktemp("made-up") / "cc3m"
    folder.mkdir()
    for s in range(4):
        members = []
        for i in range(60 * s, 60 * s + 60):
            key = f"{s:05d}{i - 60 * s:04d}"
            about = {"caption": caption(i), "key": key, "status": "success", "width": 40}
            image = encoded(picture(i))
            text = b"" if i == 100 else caption(i).encode()
            members += [(f"{key}.jpg", image[: 300 if i == 7 else None])] * (i != 200)
            members += [(f"{key}.txt", text), (f"{key}.json", json.dumps(about).encode())]
        write_tar(folder / f"{s:05d}.tar", members)
        (folder / f"{s:05d}_stats.json").write_text('{"count": 60}')
        (folder / f"{s:05d}.parquet").write_bytes(b"PAR1")
    return folder


def test_the_recipe_on_two_processes_is_killed_resumed_and_scored(cc3m, capsys, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ended = launch(small(cc3m, whole), 2)
    assert ended.codes == [0, 0], ended.said
    died = launch(small(cc3m, killed), 2, (1, "SIGKILL", "optimizer", 14))
    assert died.codes[1] == -signal.SIGKILL and state(killed)["progress"]["step"] == 12
    ended = launch(["--out", killed, "--resume"], 2)
    assert ended.codes == [0, 0], ended.said
    assert_same(state(killed), state(whole))
    assert metrics(killed) == metrics(whole)
    skipped = state(killed)["progress"]["skipped"]
    assert skipped.keys() == {"unreadable image", "missing image", "unusable caption"}
    assert set(skipped.values()) <= {2, 3}  # each once a pass
    imagenet(tmp_path / "imagenet")
    place = ("--data", "imagenet", "--data-root", tmp_path / "imagenet")
    assert float(score(killed, capsys, "zeroshot", *place)[4]) > 0.9
    assert float(score(killed, capsys, "probe", *place)[6]) > 0.9


# ------------------------------------------------------------------------------------------------
# The rehearsal.


def plan(flags, capsys) -> str:
    evaluation.main(["plan", *flags])
    return capsys.readouterr().out


def test_a_plan_says_what_the_run_will_take_and_leaves_nothing(cc3m, capsys, tmp_path):
    out = tmp_path / "runs" / "cc3m"
    flags = [*small(cc3m, out), "--samples", "1000000"]
    said = plan(flags, capsys)
    assert list(tmp_path.iterdir()) == []
    assert "data    " in said and "4 shards; bpe:300" in said
    assert "plan    62,500 steps x 16 = 1,000,000 images: " in said
    assert re.search(r"checkpoint.pt of \d+\.\d MB and encoder.pt of \d+\.\d MB", said)
    rate = float(re.search(r"([\d,]+) images/s", said)[1].replace(",", ""))
    took = float(re.search(r"images: ([\d.]+) (?:min|h)", said)[1])
    unit = 60 if " min; " in said else 3600
    assert took * unit == pytest.approx(1e6 / rate, rel=0.1)
    start, counted, least = map(
        float, re.search(r"loss    (\S+) .*; (\S+) .*; (\S+)", said).groups()
    )
    assert start > counted > least > 0
    train.main([*small(cc3m, out), "--samples", "160", "--no-first-eval"])
    lines = evaluation.read_jsonl(out / "metrics.jsonl")
    assert lines[0]["loss"] == pytest.approx(start, abs=0.5)
    measured = sorted(line["images_per_s"] for line in lines)[5]
    assert rate / 4 < measured < rate * 4  # a test's machine is never quiet
    assert "already holds a run" in refused(capsys, "plan", *flags, main=evaluation.main)


def test_the_pages_example_of_a_plan_is_what_it_prints(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said, page = plan([], capsys).splitlines(), PAGE.read_text().splitlines()
    assert not list(tmp_path.iterdir())
    for line in said:
        first = line.split()[0]
        if first in ("data", "model", "steps", "disk", "loss"):
            assert line in page
        if first == "plan":
            assert line.partition(":")[0] in {shown.partition(":")[0] for shown in page}


def test_a_plan_finds_mistakes_and_too_little_memory(cc3m, capsys, tmp_path, monkeypatch):
    flags = ["plan", *small(cc3m, tmp_path / "run")]
    error = refused(capsys, *flags, "--micro-batch", "5", main=evaluation.main)
    assert "not a multiple" in error

    def full(*_):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setattr(train, "normalize", full)
    error = refused(capsys, *flags, main=evaluation.main)
    assert "memory ran out (tried to allocate 80 GiB): train with a smaller --micro-batch" in error
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------
# Calculated tables.


def table(columns: str) -> list[list[str]]:
    """The cells of the page's table with these first columns."""
    text = PAGE.read_text()
    rows = text[text.index(f"| {columns} |") :].partition("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_flops_are_those_that_torch_counts():
    for name, size in (("XS/8", 32), ("Ti/4", 32)):
        model = SuperClass(build_encoder(name, size), 512)
        labels = torch.arange(4).repeat(2, 1)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            superclass_loss(
                model(torch.randn(2, 3, size, size)), labels, torch.ones(512)
            ).backward()
        counted = counter.get_total_flops() / 2
        assert hours.flops(name, size, 512) == pytest.approx(counted, rel=0.01)


def test_the_calculation_reproduces_the_measured_rows():
    """docs/speed.md has images a second and shares of products of 789 and then of 763 TFLOP/s."""
    speed = (ROOT / "docs/speed.md").read_text()
    rows = re.findall(r"^\| (.*) \| [\d,]+ \| ([\d,]+).* \| ([\d.]+) %.* \|", speed, flags=re.M)
    assert len(rows) >= 12
    product = 789e12
    for what, rate, share in rows:
        product = 763e12 if "second run" in what else product
        found = float(rate.replace(",", "").rstrip(",")) * hours.flops("B/16") / product
        assert found == pytest.approx(float(share) / 100, abs=0.002), what
    for card, rate in (("H200, `--compile`", 3790), ("H200", 3087)):
        assert hours.stepped("B/16", card) == pytest.approx(rate, rel=1e-3)
    page = PAGE.read_text()
    assert hours.images_per_s("S/16", "H200, `--compile`") == pytest.approx(2748, rel=2e-3)
    assert "| S/16 | 2,455 | 2,748 |" in page
    assert round(hours.hours(512e6, 3790)) == 38  # as in docs/clusters.md


def test_other_sizes_keep_a_card_as_busy_as_the_roofline_says():
    """Compiled, at 224 px with micro-batches of 256."""
    busy = {}
    for size, depth in (("S", 12), ("B", 12), ("L", 24)):
        D = hours.WIDTH[size]
        blocks = depth * sum(row[2] for row in roofline.block(256, 196, D, 3).values())
        step = blocks + roofline.rest(256, 196, D, 49_408, 16, depth, 3)[1]
        busy[size] = 256 * hours.flops(f"{size}/16") / step
    for size, share in hours.BUSY.items():
        assert busy[size] / busy["B"] == pytest.approx(share, abs=0.01)


def test_the_pages_hours_are_the_functions():
    rows = table("model | card | images/s")
    assert len(rows) == 12
    for model, card, rate, *times in rows:
        found = hours.images_per_s(model, card)
        assert rate == f"{found:,.0f}"
        expected = [hours.hours(samples, found) for samples in hours.RUNS.values()]
        assert times == [f"{h:,.0f}" if h >= 10 else f"{h:.1f}" for h in expected]


def test_the_dials_rates_follow_its_rule():
    rows = table("model, image | batch | rate by the rule")
    assert len(rows) >= 7
    for model, batch, rule, *_ in rows:
        rate = hours.peak_rate(model.split()[0], int(batch.replace(",", "")))
        assert float(rule) == pytest.approx(rate, rel=0.06)
