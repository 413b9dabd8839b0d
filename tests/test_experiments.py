"""The experiments' choices and tables, on scores that are made up."""

import json
import sys

import pytest

import train
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
import common
import compare
import figures
import ladder
import rivals

PEAK = {"superclass": 6, "clip": 0, "lit": 3}  # the place in RATES of each row's best


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """The folders that are trained, in order; a run scores less the further it is from PEAK."""
    runs = []

    def measure_all(folders, jobs, held_out_only=False):
        scores = []
        for folder in folders:
            row, _, seed, rate = folder.name.split("-", 3)
            away = abs(compare.RATES.index(rate) - PEAK[row])
            scores.append({"held out": 1 - away / 10, "minutes": 8})
            scores[-1] |= dict.fromkeys(compare.SCORES, int(seed) / 8)
            scores[-1] |= {"images/s": 150 if row == "clip" else 300, "prompts": ["a {}"]}
        return scores

    monkeypatch.setattr(compare, "SWEEP", tmp_path / "sweep.json")
    monkeypatch.setattr(compare, "train_all", lambda folders, jobs: runs.extend(folders))
    monkeypatch.setattr(compare, "measure_all", measure_all)
    return runs


def test_a_sweep_goes_on_until_the_best_has_two_worse_neighbours(trained, capsys):
    best = compare.choose_rates(["superclass", "clip", "lit"], jobs=1)
    assert best == {"superclass": "1.6e-2", "clip": "2.5e-4", "lit": "2e-3"}
    assert len(set(trained)) == 5 + 6 + 4  # up, to the first of all, down
    assert "clip 2.5e-4: 1.000 5e-4: 0.900" in capsys.readouterr().out
    # The scores are kept, also of a sweep that is to go on.
    kept = json.loads(compare.SWEEP.read_text())
    kept["plain-superclass-102400-1"] = {"1e-3": 0.5, "2e-3": 0.6, "4e-3": 0.7}
    compare.SWEEP.write_text(json.dumps(kept))
    trained.clear()
    assert compare.choose_rates(["superclass", "clip", "lit"], jobs=1) == best
    names = [folder.name for folder in trained]
    assert names == [f"superclass-102400-1-{rate}" for rate in ("8e-3", "1.6e-2", "3.2e-2")]


def test_lits_sweep_trains_an_encoder_of_which_only_the_scores_are_kept(trained):
    rates = {"4e-3": 0.5, "8e-3": 0.6, "1.6e-2": 0.4}
    compare.SWEEP.write_text(json.dumps({"plain-superclass-102400-1": rates}))
    compare.choose_rates(["superclass", "lit"], jobs=1)
    assert [folder.name for folder in trained][:2] == [
        "superclass-102400-1-8e-3",
        "lit-102400-1-2e-3",
    ]


def test_runs_are_trained_unless_they_are_at_their_end_and_scored(tmp_path, monkeypatch):
    run, flags, trained = tmp_path / "run", ["--samples", "8", "--batch-size", "4"], []

    def train_once(*command):
        trained.append(command)
        run.mkdir(exist_ok=True)
        config = vars(train.make_parser().parse_args(flags))
        kept = {key: value for key, value in config.items() if key not in ("out", "resume")}
        (run / "config.json").write_text(json.dumps(kept))
        costs = {"step_s": 1, "images_per_s": 4, "peak_mb": 9}
        (run / "metrics.jsonl").write_text(json.dumps({"step": 2, **costs}))
        rows = {"step": 2, "task": "zeroshot", "attribute": "colour", "top1": 0.5}
        (run / "eval.jsonl").write_text(json.dumps(rows))

    monkeypatch.setattr(common, "python", train_once)
    for _ in range(2):
        common.train_all({run: flags})
        assert trained == [("train.py", "--out", str(run), *flags)]
    (run / "eval.jsonl").unlink()  # it was stopped while it evaluated
    common.train_all({run: flags})
    assert trained[1:] == [("train.py", "--out", str(run), "--resume", *flags)]
    with pytest.raises(SystemExit, match="was started with --seed 0, it cannot go on with 3"):
        common.train_all({run: [*flags, "--seed", "3"]})


def test_the_table_has_all_seeds_and_superclass_in_the_time_of_clip(trained, capsys, monkeypatch):
    argv = "compare.py --samples 25600 --seeds 2 4 --rows superclass clip lit"
    monkeypatch.setattr(sys, "argv", argv.split())
    compare.main()
    table = capsys.readouterr().out
    assert table.count("0.375 ± 0.177") == 4 * len(compare.SCORES)
    assert "51,200 images" in table and "superclass, equal time" in table
    names = [folder.name for folder in trained]
    assert names[-2:] == ["superclass-51200-2-1.6e-2", "superclass-51200-4-1.6e-2"]
    for seed in (2, 4):  # LiT starts from the encoder of its own seed, which is trained before it
        rates = {"superclass": "1.6e-2", "lit": "2e-3"}
        lit, flags = compare.run_of("lit", rates, 25600, seed)
        encoder = flags[flags.index("--init") + 1].split("/")[-1]
        assert encoder == f"superclass-25600-{seed}-1.6e-2"
        assert names.index(encoder) < names.index(lit.name)


@pytest.mark.parametrize(
    "batch, model, lr, warmup", [(64, "XS/8", 1e-3, 40), (256, "Ti/8", 1.3e-3, 10)]
)
def test_rates_follow_the_batch_and_the_width(batch, model, lr, warmup):
    rates = {"clip": "2e-3"}
    folder, flags = figures.run_of("clip", rates, 25600, 3, batch, model)
    config = vars(train.make_parser().parse_args(flags))
    assert (config["lr"], config["warmup"]) == (lr, warmup)  # of a rate for 256 images, width 128
    assert (config["batch_size"], config["model"], config["seed"]) == (batch, model, 3)
    own = compare.run_of("clip", rates, 25600, 3)[0]  # nothing differs: one run, not two
    assert figures.run_of("clip", rates, 25600, 3)[0] == own != folder


def test_rivals_train_at_their_best_rate_and_for_the_time_of_superclass(
    tmp_path, capsys, monkeypatch
):
    """Half a killed command's lines are there already; CLIP is three times as slow."""
    trained = []

    def rung(rival, rate):
        return f"{rival}muon-128-{rate}-crop1-XXS16"

    own, clip = rung("", "4e-3"), rung("clip-", "1e-3")

    def score(name, images, seed, test):
        is_best = name in (own, clip)
        line = {"name": name, "images": images, "seed": seed, "held_out": 0.1 + 0.1 * is_best}
        line |= {"zero_shot": 0.5} if test else {}
        if name == own and seed == 2:  # it was stopped and went on
            return line
        return line | {"cpu_minutes": 3 if "clip" in name else 1}

    monkeypatch.setattr(ladder, "KEPT", tmp_path / "ladder.jsonl")
    monkeypatch.setattr(ladder, "score", score)
    monkeypatch.setattr(ladder, "train", lambda *run: trained.append(run))
    ladder.append_jsonl(ladder.KEPT, [score(own, 3840, 1, True)])
    monkeypatch.setattr(rivals, "SWEPT", (1280, 1))
    argv = "rivals.py --images 3840 --seeds 1 2 --rivals superclass clip"
    monkeypatch.setattr(sys, "argv", argv.split())
    rivals.main()
    swept = [("", rate) for rate in ("2e-3", "4e-3", "8e-3")]
    swept += [("clip-", rate) for rate in ("2e-3", "4e-3", "8e-3", "1e-3", "5e-4")]
    assert trained == [(rung(*pair), 1280, 1) for pair in swept] + [
        (clip, 3840, 1),
        (own, 3840, 2),
        (clip, 3840, 2),
        (clip, 1280, 1),  # a third of the images; this time for the test: `train` finds it done
        (clip, 1280, 2),
    ]
    row = "| clip | 1e-3 | 1,280 | 2 | 0.200 ± 0.000 | 0.500 ± 0.000 |"
    assert row in capsys.readouterr().out


def test_the_figure_over_the_icons_has_every_part_with_all_seeds(tmp_path, capsys, monkeypatch):
    asked = []

    def lines_of(name, images, seeds, test):
        asked.append((name, images, test))
        return [dict.fromkeys(("zero_shot", "probe", "retrieval"), seed / 8) for seed in seeds]

    monkeypatch.setattr(figures, "best_rate", lambda row: "2e-3" if row == "clip" else "4e-3")
    monkeypatch.setattr(figures, "lines_of", lines_of)
    draw, path = figures.draw, tmp_path / "data.png"
    monkeypatch.setattr(figures, "draw", lambda lines, label, _: draw(lines, label, path))
    argv = "figures.py data --samples 3840 --seeds 2 4"
    monkeypatch.setattr(sys, "argv", argv.split())
    figures.main()
    own, clip = "muon-128-4e-3-crop1-XXS16", "clip-muon-128-2e-3-crop1-XXS16"
    names = [rung + part for rung in (own, clip) for part in ("-tenth", "-third", "")]
    assert asked == [(name, 3840, True) for name in names]
    assert capsys.readouterr().out.count("0.375 ± 0.177") == 6 * 3
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("more", ladder.MORE)
def test_every_rung_is_understood(more):
    _, flags = ladder.run_of(f"supervised-adamw-64-1e-3-{more}", 12800, 7)
    config = train.make_parser().parse_args(flags)
    assert (config.objective, config.batch_size, config.warmup) == ("supervised", 64, 20)
    assert not more.startswith("after") or config.init.endswith("-307200-7")
