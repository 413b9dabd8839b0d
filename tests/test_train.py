"""The loop. Its promises are tested by doing them: runs are killed, split and given bad data."""

import functools
import json
import math
import shutil
import signal

import pytest
import timm
import torch

import train
from eval import read_jsonl
from superclass import SuperClass, build_encoder
from tests.conftest import (
    COLOURS,
    TINY,
    caption,
    encoded,
    make_pairs,
    picture,
    run_python,
    train_flags,
)

TIMES = {"images_per_s", "step_s", "data_s", "peak_mb"}


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def state(run):
    return torch.load(run / "checkpoint.pt", weights_only=True)


def assert_same(a, b, path=""):
    """Bit for bit the same, all the way down."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def refused(capsys, *flags):
    """The one sentence with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------
# A run, and what it leaves.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of 12 steps on 24 pairs, and the pairs."""
    folder = tmp_path_factory.mktemp("finished")
    pairs = make_pairs(folder / "pairs")
    train.main(train_flags(pairs, folder / "run", "--samples", "96", "--workers", "0"))
    return folder / "run", pairs


def test_a_run_leaves_its_files_and_learns(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir()}
    assert names == {
        "config.json",
        "tokenizer.tiktoken",
        "checkpoint.pt",
        "encoder.pt",
        "metrics.jsonl",
    }
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert abs(lines[0]["loss"] - (math.log(300) + 0.5)) < 0.6
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    encoder = build_encoder("XS/16", 32)
    encoder.load_state_dict(torch.load(run / "encoder.pt", weights_only=True), strict=True)
    assert state(run)["idf"]["n"] == 96


def test_learning_rate_is_linear_then_cosine():
    rates = [train.learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 1e-3
    assert train.learning_rate(100, 100, 10, 2.0) == 0


def test_matrices_decay_and_others_do_not():
    args = train.make_parser().parse_args(["--weight-decay", "0.3"])
    model = SuperClass(build_encoder("XS/16", 32), 50)
    groups = train.make_optimizer(model, args, lambda *_: None).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    others = {id(p) for p in groups[1]["params"]}
    assert id(model.encoder.pos_embed) in others and id(model.head.bias) in others
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "flags",
    [
        ["--micro-batch", "2"],
        ["--micro-batch", "8", "--grad-checkpointing"],
        ["--workers", "3"],
    ],
)
def test_the_split_of_a_batch_changes_nothing(finished, tmp_path, flags):
    run, pairs = finished
    workers = [] if "--workers" in flags else ["--workers", "0"]
    train.main(train_flags(pairs, tmp_path / "run", "--samples", "96", *workers, *flags))
    ours, theirs = metrics(tmp_path / "run"), metrics(run)
    assert [a["loss"] for a in ours] == pytest.approx([b["loss"] for b in theirs], rel=1e-4)
    assert_same(state(tmp_path / "run")["idf"], state(run)["idf"])
    if workers == []:  # only the workers differ: nothing at all does
        assert_same(state(tmp_path / "run")["model"], state(run)["model"])


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--precision", "fp16"], ["--no-idf"]])
def test_other_precisions_and_plain_averaging_run(finished, tmp_path, flags):
    _, pairs = finished
    train.main(train_flags(pairs, tmp_path / "run", "--samples", "24", "--workers", "0", *flags))
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    assert all(p.dtype == torch.float32 for p in state(tmp_path / "run")["model"].values())


def test_a_compiled_model_saves_plain_keys(finished, tmp_path, monkeypatch):
    compiler = functools.partial(torch.compile, backend="eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", compiler)
    run, pairs = finished
    train.main(
        train_flags(pairs, tmp_path / "run", "--samples", "96", "--workers", "0", "--compile")
    )
    assert_same(state(tmp_path / "run")["model"], state(run)["model"])


# ------------------------------------------------------------------------------------------------
# Other objectives, and encoders from elsewhere.


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """A folder of 24 pictures with captions, in three folders of classes."""
    folder = tmp_path_factory.mktemp("classes")
    for i in range(24):
        place = folder / list(COLOURS)[i % 3]
        place.mkdir(exist_ok=True)
        picture(i).save(place / f"{i:03d}.png")
        (place / f"{i:03d}.txt").write_text(caption(i))
    return folder


OBJECTIVES = [["--loss", name] for name in train.LOSSES]
OBJECTIVES += [["--objective", "clip"], ["--objective", "supervised"]]
OBJECTIVES += [["--tokenizer", "words:6", "--drop-stopwords"], ["--caption-noise", "0.5"]]


@pytest.mark.parametrize("flags", OBJECTIVES, ids="-".join)
def test_objectives_learn_and_are_evaluated(classes, tmp_path, flags):
    run = tmp_path / "run"
    more = ["--val-data", str(classes), "--samples", "160", "--workers", "0", "--no-first-eval"]
    train.main(train_flags(classes, run, *more, "--lr", "3e-3", *flags))
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    rows = read_jsonl(run / "eval.jsonl")
    task = "head" if "supervised" in flags else "zeroshot"
    assert [(row["step"], row["task"]) for row in rows] == [(20, task), (20, "probe")]
    noisy = "--caption-noise" in flags
    assert rows[1]["top1"] > 0.9 and (rows[0]["top1"] > 0.6 or noisy)


def test_scores_of_other_data_do_not_stand_for_a_missing_evaluation(classes, tmp_path):
    """Killed after its last save, then looked at with eval.py: a resumed run still evaluates."""
    run, flags = tmp_path / "run", ["--samples", "16", "--workers", "0", "--no-first-eval"]
    train.main(train_flags(classes, run, *flags, "--val-data", str(classes)))
    (row, *_) = read_jsonl(run / "eval.jsonl")
    other = row | {"flags": {"val_data": "elsewhere"}}
    (run / "eval.jsonl").write_text(json.dumps(other) + "\n")
    for _ in range(2):  # and only once
        train.main(["--out", str(run), "--resume"])
        tasks = [row["task"] for row in read_jsonl(run / "eval.jsonl")]
        assert tasks == ["zeroshot", "zeroshot", "probe"]


def test_lit_leaves_its_encoder_as_it_was(classes, tmp_path):
    """Model and image size come from the run; the encoder that is saved is the one that came."""
    flags = ["--samples", "16", "--workers", "0"]
    train.main(train_flags(classes, tmp_path / "first", *flags, "--image-size", "48"))
    flags = [*TINY[2:], "--data", str(classes), "--objective", "lit", "--workers", "0"]
    flags += ["--init", str(tmp_path / "first"), "--samples", "40", "--weight-decay", "0.5"]
    train.main([*flags, "--out", str(tmp_path / "lit")])
    assert metrics(tmp_path / "lit")[-1]["loss"] < metrics(tmp_path / "lit")[0]["loss"]
    encoders = [
        torch.load(tmp_path / run / "encoder.pt", weights_only=True) for run in ("first", "lit")
    ]
    assert_same(*encoders)
    shutil.rmtree(tmp_path / "first")  # a resumed run needs only its own folder
    train.main(["--out", str(tmp_path / "lit"), "--resume"])


def test_an_encoder_of_timms_is_taken_over_and_its_positions_interpolated(classes, tmp_path):
    """A random ViT-S/16 of timm's for 224 px: the same features at 224, and a start at 160."""
    torch.manual_seed(0)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    theirs = timm.create_model("vit_small_patch16_224", **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = build_encoder("S/16", 224).eval()
    train.init_encoder(ours, tmp_path / "timm.pt")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).mean(dim=1), theirs(images), atol=1e-5, rtol=1e-5)

    flags = ["--model", "S/16", "--image-size", "160", "--samples", "2", "--batch-size", "2"]
    flags += ["--workers", "0", "--init", str(tmp_path / "timm.pt"), "--lr", "0"]
    train.main(train_flags(classes, tmp_path / "run", *flags))
    encoder = torch.load(tmp_path / "run" / "encoder.pt", weights_only=True)
    peer = timm.layers.resample_abs_pos_embed(
        theirs.pos_embed, new_size=[10, 10], num_prefix_tokens=0, antialias=True
    )
    torch.testing.assert_close(encoder["pos_embed"], peer)
    assert torch.equal(encoder["blocks.3.mlp.fc1.weight"], theirs.blocks[3].mlp.fc1.weight)


def test_an_encoder_that_does_not_fit_is_refused_with_its_keys(capsys, classes, tmp_path):
    encoder = build_encoder("XS/16", 32).state_dict()
    flags = train_flags(classes, tmp_path / "run", "--init", str(tmp_path / "encoder.pt"))
    for change, message in (
        ({"cls_token": torch.zeros(1, 1, 128)}, "cls_token is not ours"),
        ({"norm.bias": None}, "norm.bias is missing"),
        ({"norm.weight": torch.zeros(7)}, "norm.weight is (7,) and not (128,)"),
        ({"pos_embed": torch.zeros(1, 5, 128)}, "pos_embed is (1, 5, 128) and not (1, 4, 128)"),
    ):
        state = {key: value for key, value in (encoder | change).items() if value is not None}
        torch.save(state, tmp_path / "encoder.pt")
        assert message in refused(capsys, *flags)
    torch.save({"step": 3}, tmp_path / "encoder.pt")
    assert "is no encoder" in refused(capsys, *flags)
    assert "no checkpoint" in refused(capsys, *flags, "--init", tmp_path / "nothing.pt")
    assert not (tmp_path / "run").exists()


def test_layer_decay_lowers_the_rate_from_block_to_block():
    args = train.make_parser().parse_args(["--layer-decay", "0.5"])
    model = SuperClass(build_encoder("XS/16", 32), 50)
    groups = train.make_optimizer(model, args, lambda *_: None).param_groups
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    rates = {name: scales[id(p)] for name, p in model.named_parameters()}
    assert rates["head.weight"] == rates["norm.bias"] == rates["encoder.norm.weight"] == 1
    assert rates["encoder.blocks.3.norm1.bias"] == rates["encoder.blocks.3.mlp.fc1.weight"] == 0.5
    assert rates["encoder.blocks.0.attn.qkv.weight"] == 0.5**4
    assert rates["encoder.pos_embed"] == rates["encoder.patch_embed.proj.bias"] == 0.5**5


def test_flags_that_contradict_the_objective_are_refused(capsys, classes, pairs, tmp_path):
    for flags, message in (
        (["--objective", "lit"], "name a run with --init"),
        (["--objective", "clip", "--loss", "bce"], "--loss bce is one of SuperClass"),
        (["--loss", "bce", "--no-idf"], "nothing else has IDF weights"),
        (["--objective", "clip", "--micro-batch", "4"], "cannot be split into micro-batches"),
        (["--loss", "two_way", "--micro-batch", "4"], "cannot be split into micro-batches"),
        (["--model", "resnet50", "--layer-decay", "0.5"], "--layer-decay is for the ViT"),
        (["--model", "resnet50", "--grad-checkpointing"], "--grad-checkpointing is for the ViT"),
        (["--model", "resnet50", "--image-size", "24"], "32 px or more"),
        (["--tokenizer", "words:5000"], "hold only"),
    ):
        assert message in refused(capsys, *train_flags(classes, tmp_path / "run", *flags))
    flags = train_flags(pairs, tmp_path / "run", "--objective", "supervised")
    assert "has no classes to train on" in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# Killed and resumed.


KILLED = ["--samples", "96", "--save-every", "4", "--log-every", "3", "--workers", "2"]


@pytest.fixture(scope="module")
def whole(finished):
    """The run that was not killed."""
    run = finished[0].parent / "whole"
    run_python("train.py", *train_flags(finished[1], run, *KILLED))
    return run


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("optimizer", 3),  # before the first save
        ("optimizer", 9),  # between two saves
        ("rename", 8),  # with a new checkpoint written, and not yet in the place of the old one
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(finished, whole, tmp_path, place, n):
    run = tmp_path / "run"
    flags = train_flags(finished[1], run, *KILLED)
    died = run_python("-m", "tests.die", "SIGKILL", place, str(n), *flags, check=False)
    assert died.returncode == -signal.SIGKILL
    assert state(run)["step"] < 12
    run_python("train.py", "--out", str(run), "--resume")
    assert_same(state(run), state(whole))
    assert metrics(run) == metrics(whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_signal_finishes_the_step_and_saves(finished, whole, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(finished[1], run, *KILLED)
    stopped = run_python("-m", "tests.die", "SIGTERM", "batch", "5", *flags, check=False)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "stopped after step 5 of 12; continue with: " in stopped.stdout
    assert f"python train.py --out {run} --resume" in stopped.stdout
    assert state(run)["step"] == 5
    run_python("train.py", "--out", str(run), "--resume")
    assert_same(state(run), state(whole))
    assert metrics(run) == metrics(whole)


# ------------------------------------------------------------------------------------------------
# Mistakes, each answered with one sentence.


def test_unknown_names_are_refused(capsys, pairs, tmp_path):
    flags = train_flags(pairs, tmp_path / "run")
    assert "no source 'nowhere'" in refused(capsys, "--data", "nowhere", "--out", tmp_path / "run")
    assert "unknown tokenizer 'gpt9'" in refused(capsys, *flags, "--tokenizer", "gpt9")
    assert "unknown model 'Q/16'" in refused(capsys, *flags, "--model", "Q/16")
    assert "patches of 5 px" in refused(capsys, *flags, "--model", "XS/5")
    assert "device 'abacus'" in refused(capsys, *flags, "--device", "abacus")
    assert "--samples must be 1 or more" in refused(capsys, *flags, "--samples", "0")
    assert "--min-scale must be from 0.0 to 1.0" in refused(capsys, *flags, "--min-scale", "2")
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    assert "cannot be made" in refused(capsys, *train_flags(pairs, tmp_path / "file" / "run"))


def test_a_batch_that_cannot_be_divided_is_refused(capsys, pairs, tmp_path):
    error = refused(capsys, *train_flags(pairs, tmp_path / "run", "--micro-batch", "3"))
    assert "--batch-size 8 is not a multiple of 1 processes x 3 images" in error
    assert not (tmp_path / "run").exists()  # the corrected command may use the same folder


def test_a_run_is_not_overwritten(capsys, finished):
    run, pairs = finished
    before = state(run)
    assert "holds a run already" in refused(capsys, *train_flags(pairs, run))
    assert_same(state(run), before)


def test_a_run_does_not_go_on_as_another(capsys, finished):
    run, _ = finished
    changes = {"--model": "S/16", "--tokenizer": "bpe:400", "--data": "shapes", "--lr": "0.5"}
    for flag, value in changes.items():
        error = refused(capsys, "--out", run, "--resume", flag, value)
        assert f"was started with {flag} " in error and error.endswith(f"go on with {value}")


def test_data_that_changed_is_not_resumed(capsys, finished, tmp_path):
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    shutil.copytree(finished[1], pairs)
    train.main(train_flags(pairs, run, "--samples", "8", "--workers", "0"))
    picture(99).save(pairs / "new.png")
    assert "24 pairs, now 25 pairs" in refused(capsys, "--out", run, "--resume")


def test_captions_without_classes_train_with_a_labelled_validation_set(finished, tmp_path, capsys):
    """The probe needs labels in both; zero-shot needs them in the validation set alone."""
    for i in range(6):
        (tmp_path / "val" / ["red", "green", "blue"][i % 3]).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "val" / ["red", "green", "blue"][i % 3] / f"{i}.png")
    flags = ["--val-data", str(tmp_path / "val"), "--samples", "16", "--workers", "0"]
    train.main(train_flags(finished[1], tmp_path / "run", *flags))
    out = capsys.readouterr().out
    assert "zeroshot" in out and "probe" not in out


def test_resume_of_nothing_starts(pairs, tmp_path):
    flags = train_flags(pairs, tmp_path / "run", "--samples", "8", "--workers", "0", "--resume")
    train.main(flags)
    assert state(tmp_path / "run")["step"] == 1


@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_a_damaged_checkpoint_is_named(capsys, finished, tmp_path, damage):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    content = (run / "checkpoint.pt").read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "text": b"what?"}[damage]
    (run / "checkpoint.pt").write_bytes(damaged)
    error = refused(capsys, "--out", run, "--resume")
    assert f"checkpoint {run / 'checkpoint.pt'} is damaged" in error


def test_a_checkpoint_with_code_is_not_run(capsys, finished, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(finished[0], run)
    torch.save({"step": train.make_parser}, run / "checkpoint.pt")
    assert "cannot be read" in refused(capsys, "--out", run, "--resume")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(capsys, pairs, tmp_path):
    run = tmp_path / "run"
    flags = [
        "--samples",
        "96",
        "--workers",
        "0",
        "--lr",
        "1e30",
        "--clip-grad",
        "1e30",
        "--log-every",
        "5",
    ]
    error = refused(capsys, *train_flags(pairs, run, "--save-every", "1", *flags))
    step = state(run)["step"]
    assert f"the loss of step {step + 1} is " in error
    assert all(torch.isfinite(p).all() for p in state(run)["model"].values())


def test_a_few_bad_samples_are_counted_and_many_stop_the_run(capsys, tmp_path):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(60):
        file = encoded(picture(i))
        (folder / f"{i:02d}.jpg").write_bytes(file[:300] if i in (7, 31) else file)
        (folder / f"{i:02d}.txt").write_text("" if i == 40 else caption(i))
    flags = ["--samples", "120", "--workers", "0"]
    train.main(train_flags(folder, tmp_path / "run", *flags))
    said = capsys.readouterr()
    assert "skipping: damaged image" in said.err and "skipping: empty caption" in said.err
    # Two passes: each bad sample is met twice, and again where it is drawn in the place of another.
    assert metrics(tmp_path / "run")[-1]["skipped"] >= 6
    assert "x damaged image" in said.out and "x empty caption" in said.out
    for i in range(0, 60, 5):
        (folder / f"{i:02d}.jpg").write_bytes(b"")
    error = refused(capsys, *train_flags(folder, tmp_path / "second", *flags))
    assert "could not be used" in error and "x empty image file" in error
