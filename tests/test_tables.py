"""Tables of several runs: rows, deviations, costs, and what is refused."""

import json

import pytest

import eval as evaluation


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def fake_run(folder, seed, top1, **flags):
    """A finished run as `table` sees it."""
    folder.mkdir(parents=True)
    config = {"seed": seed, "lr": 1e-3, "samples": 20, "batch_size": 10, "loss": "bce", **flags}
    config["init"] = f"runs/first-{seed}"
    (folder / "config.json").write_text(json.dumps(config))
    line = {"step": 1, "step_s": 30.0, "images_per_s": 5.0, "peak_mb": 100.0}
    lines = [line, line | {"step": 2, "step_s": 60.0, "images_per_s": 7.0, "peak_mb": 120.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"step": 2, "task": "probe", "attribute": "class", "top1": top1, "train": 500}
    rows = [row | {"step": 0, "top1": 0.0}, row]
    (folder / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_table_has_mean_and_deviation_over_seeds(tmp_path, capsys):
    runs = [fake_run(tmp_path / f"bce-{seed}", seed, 0.5 + seed / 10) for seed in (1, 2, 3)]
    runs.append(fake_run(tmp_path / "alone", 7, 0.25))
    evaluation.main(["table", *map(str, runs)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| run | lr | seeds | probe on 500 | minutes | images/s | peak MB |"
    assert lines[2] == "| bce | 0.001 | 3 | 0.700 ± 0.100 | 1.5 | 6 | 120 |"
    assert lines[3] == "| alone | 0.001 | 1 | 0.250 | 1.5 | 6 | 120 |"


def test_table_refuses_what_is_not_one_row(tmp_path, capsys):
    one, other = fake_run(tmp_path / "a-1", 1, 0.5), fake_run(tmp_path / "b" / "a-2", 2, 0.5, lr=2)
    assert "'a' are not one group: lr differ" in refused(capsys, "table", one, other)
    newer = fake_run(tmp_path / "d" / "a-2", 2, 0.5, color_jitter=0.3)  # a flag that one lacks
    for pair in ((one, newer), (newer, one)):
        assert "not one group: color_jitter differ" in refused(capsys, "table", *pair)
    twin = fake_run(tmp_path / "c" / "a-1", 1, 0.5)
    assert "a seed occurs twice" in refused(capsys, "table", one, twin)
    (one / "metrics.jsonl").write_text("")
    assert f"{one} is not finished" in refused(capsys, "table", one)


def test_tables_show_a_runs_own_data_only(tmp_path, capsys):
    one, two = (fake_run(tmp_path / f"a-{seed}", seed, 0.5) for seed in (1, 2))
    row = {"step": 2, "task": "probe", "attribute": "class", "top1": 0.1, "train": 8}
    other = row | {"train": 500, "flags": {"val_data": "elsewhere"}}
    with open(one / "eval.jsonl", "a") as file:
        for line in (other, row | {"task": "zeroshot"}, row):
            file.write(json.dumps(line) + "\n")
    evaluation.main(["table", str(one), str(two)])
    out, err = capsys.readouterr()
    assert "a: 1 of 2 runs have zeroshot" in err
    assert out.startswith("| run | lr | seeds | probe on 500 | zeroshot | probe on 8 | minutes")
    assert "| a | 0.001 | 2 | 0.500 ± 0.000 |  |  |" in out
