"""The loop. Its promises are tested by doing them: runs are killed, split and given bad data."""

import errno
import functools
import json
import math
import os
import re
import shutil
import signal
from pathlib import Path

import pytest
import timm
import torch

import data
import eval as evaluation
import superclass
import train
from data import Start, load_source
from eval import load_run, read_jsonl
from plugins import TABLE, absolute, convnets
from plugins.caption import load_gpt2
from plugins.contrastive import contrastive_loss
from plugins.sigmoid_losses import asl
from plugins.start import init_encoder
from superclass import SuperClass, build_encoder, superclass_loss
from tests.conftest import COLOURS, TINY, caption, encoded, load, make_pairs, picture, train_flags
from tests.die import at_call, launch, start

LOSSES = [name for name in TABLE["loss"] if name != "softmax"]

TIMES = {"images_per_s", "step_s", "data_s", "peak_mb"}


def metrics(run):
    """The lines of training, without what depends on the machine."""
    lines = [line for line in read_jsonl(run / "metrics.jsonl") if "loss" in line]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def state(run):
    return load(run / "checkpoint.pt")


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


def refused(capsys, *flags, main=train.main):
    """The one sentence with which train.py refuses these flags."""
    with pytest.raises(SystemExit) as stop:
        main([str(flag) for flag in flags])
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert len(lines) == 1
    return lines[0]


# ------------------------------------------------------------------------------------------------
# A run, and what it leaves.


@pytest.fixture(scope="module")
def finished(tmp_path_factory, device):
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
        ".lock",
    }
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert abs(lines[0]["loss"] - (math.log(300) + 0.5)) < 0.6
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.5
    rates = [train.learning_rate(step, 12, 2, 1e-3) for step in range(12)]
    assert [line["lr"] for line in lines] == rates
    assert [group["lr"] for group in state(run)["optimizer"]["param_groups"]] == [rates[-1]] * 2
    encoder = build_encoder("XS/16", 32)
    encoder.load_state_dict(load(run / "encoder.pt"), strict=True)
    assert state(run)["idf"]["n"] == 96


def test_learning_rate_is_linear_then_cosine():
    rates = [train.learning_rate(step, 100, 10, 2.0) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0 and rates[55] == pytest.approx(1.0) and 0 < rates[99] < 1e-3
    assert train.learning_rate(100, 100, 10, 2.0) == 0


def test_matrices_decay_and_others_do_not():
    config = train.make_parser().parse_args(["--weight-decay", "0.3"])
    model = SuperClass(build_encoder("XS/16", 32), 50)
    groups = train.make_optimizer(model, config, lambda *_: None).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    others = {id(p) for p in groups[1]["params"]}
    assert id(model.encoder.pos_embed) in others and id(model.head.bias) in others
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    model = SuperClass(convnets.convnext_tiny(32), 50)
    decayed = {id(p) for p in train.make_optimizer(model, config, print).param_groups[0]["params"]}
    scales = [p for name, p in model.named_parameters() if name.endswith("layer_scale")]
    assert len(scales) == 18 and not decayed & set(map(id, scales))


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
    for key in ("loss", "grad_norm"):
        assert [a[key] for a in ours] == pytest.approx([b[key] for b in theirs], rel=1e-4)
    assert_same(state(tmp_path / "run")["idf"], state(run)["idf"])
    if workers == []:  # only the workers differ: nothing at all does
        assert_same(state(tmp_path / "run")["model"], state(run)["model"])


@pytest.mark.parametrize("flags", [["--precision", "bf16"], ["--precision", "fp16"], ["--no-idf"]])
def test_other_precisions_and_plain_averaging_run(finished, tmp_path, flags):
    _, pairs = finished
    train.main(train_flags(pairs, tmp_path / "run", "--samples", "24", "--workers", "0", *flags))
    assert all(math.isfinite(line["loss"]) for line in metrics(tmp_path / "run"))
    assert all(p.dtype == torch.float32 for p in state(tmp_path / "run")["model"].values())


def test_a_compiled_model_saves_plain_keys(finished, tmp_path, monkeypatch, device):
    compiled, compiler = [], torch.compile
    options = {"backend": "eager"} if device.type == "cpu" else {}  # others need a C++ compiler
    count = lambda model: compiled.append(model) or compiler(model, **options)  # noqa: E731
    monkeypatch.setattr(torch, "compile", count)
    run, pairs = finished
    train.main(
        train_flags(pairs, tmp_path / "run", "--samples", "96", "--workers", "0", "--compile")
    )
    ours, theirs = metrics(tmp_path / "run"), metrics(run)
    assert [a["loss"] for a in ours] == pytest.approx([b["loss"] for b in theirs], rel=1e-4)
    assert compiled and state(tmp_path / "run")["model"].keys() == state(run)["model"].keys()
    if device.type == "cpu":
        assert_same(state(tmp_path / "run")["model"], state(run)["model"])


FIRST_LOSS = [[], ["--no-idf"], ["--objective", "superclip"], ["--loss", "asl"]]


@pytest.mark.parametrize("flags", FIRST_LOSS, ids=" ".join)
def test_the_first_loss_is_that_of_its_formula(pairs, tmp_path, flags, device):
    """At a learning rate of zero the weights at the end are those of the first loss."""
    flags = ["--samples", "8", "--lr", "0", "--workers", "0", *flags]
    train.main(train_flags(pairs, tmp_path / "run", *flags))
    run = load_run(tmp_path / "run", device)
    reads = run.objective.reads
    prepare = data.Prepare(data.Augment(32), run.tokenizer, run.config.seed, reads)
    stream = data.TrainStream(load_source(str(pairs)), prepare, 0, 8, 0, 1, Start())
    batch = next(data.batches(stream, 0, device))
    df = batch.labels[batch.labels >= 0].cpu().bincount(minlength=run.config.vocab_size).to(device)
    weights = torch.ones_like(df) if "--no-idf" in flags else torch.log(9 / (df + 1))
    with torch.no_grad():
        outputs = run.model(data.normalize(batch.images), **batch.reads)
    if "asl" in flags:
        expected = asl(outputs, batch.labels, weights)
    else:
        contrast, logits = outputs if reads else (None, outputs)
        expected = superclass_loss(logits, batch.labels, weights)
        expected = expected + contrastive_loss(*contrast) if reads else expected
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(expected.item(), rel=1e-5)


def test_no_flag_of_the_recipe_is_forgotten(pairs, tmp_path, device):
    """A flag that is parsed and not used gives the losses of a run without it."""
    changes = "", "--flip", "--min-scale 0.3", "--color-jitter 0.3", "--beta2 0.5", "--seed 1"
    changes += "--weight-decay 5", "--warmup 3", "--precision bf16", "--no-idf"
    changes += (
        "--no-idf --tokenizer no-stopwords:bpe:300",
    )  # "a" is in every caption: with IDF it has no weight
    found = {}
    for i, flags in enumerate(changes):
        own = ["--samples", "24", "--workers", "0", *flags.split()]
        train.main(train_flags(pairs, tmp_path / str(i), *own))
        losses = tuple(line["loss"] for line in metrics(tmp_path / str(i)))
        found.setdefault(losses, []).append(flags)
    assert len(found) == len(changes), found


def test_gradients_are_clipped_at_a_norm_of_one(pairs, tmp_path, monkeypatch, device):
    norms, step = [], torch.optim.AdamW.step

    def measured(self, *args, **kwargs):
        grads = [p.grad.norm() for group in self.param_groups for p in group["params"]]
        norms.append(torch.stack(grads).norm().item())
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", measured)
    flags = ["--samples", "16", "--workers", "0", "--loss", "bce"]
    train.main(train_flags(pairs, tmp_path / "run", *flags))
    assert norms == pytest.approx([1, 1], rel=1e-3)
    assert all(line["grad_norm"] > 2 for line in metrics(tmp_path / "run"))


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


@pytest.fixture(scope="module")
def first(classes, tmp_path_factory, device):
    """A run of one step whose encoder others start from."""
    run = tmp_path_factory.mktemp("first") / "run"
    train.main(train_flags(classes, run, "--samples", "8", "--workers", "0"))
    return run


OBJECTIVES = [["--loss", name] for name in LOSSES]
OBJECTIVES += [["--objective", name] for name in ("clip", "siglip", "superclip", "cap")]
OBJECTIVES += [["--objective", "supervised"]]
OBJECTIVES += [["--tokenizer", "no-stopwords:words:6"]]


@pytest.mark.parametrize("flags", OBJECTIVES, ids="-".join)
def test_objectives_learn_and_are_evaluated(classes, tmp_path, flags, device, monkeypatch):
    run = tmp_path / "run"
    more = ["--val-data", str(classes), "--samples", "160", "--workers", "0", "--no-first-eval"]
    train.main(train_flags(classes, run, *more, "--lr", "3e-3", *flags))
    lines = metrics(run)
    assert lines[-1]["loss"] < lines[0]["loss"]
    rows = read_jsonl(run / "eval.jsonl")
    tasks = {"supervised": ["head"], "superclip": ["head", "zeroshot"], "cap": []}
    tasks = tasks.get(flags[1], ["zeroshot"])
    tasks = ["loss", *["retrieval"] * (flags[1] not in ("supervised", "cap")), *tasks, "probe"]
    assert [(row["step"], row["task"]) for row in rows] == [(20, t) for t in tasks]
    assert rows[0]["val_loss"] < lines[0]["loss"]
    rows = [row for row in rows if "top1" in row]
    assert rows[-1]["top1"] > 0.9 and all(row["top1"] > 0.6 for row in rows)
    if flags[1] == "superclip":  # prompts are for its towers, not for its head
        found, val, asked = load_run(run, device), load_source(str(classes), "val"), []

        def score(run, features, texts):
            asked.append(texts)
            return torch.zeros(len(features), len(texts))

        monkeypatch.setattr(evaluation, "zeroshot", score)
        evaluation.measure(["zeroshot"], found, None, val, workers=0, prompts=["{} green"])
        assert asked == list(val.attributes.values())


def test_scores_of_other_data_do_not_stand_for_a_missing_evaluation(classes, tmp_path, device):
    """Killed after its last save, then looked at with eval.py: a resumed run still evaluates."""
    run, flags = tmp_path / "run", ["--samples", "16", "--workers", "0", "--no-first-eval"]
    train.main(train_flags(classes, run, *flags, "--val-data", str(classes)))
    (row, *_) = read_jsonl(run / "eval.jsonl")
    other = row | {"flags": {"val_data": "elsewhere"}}
    (run / "eval.jsonl").write_text(json.dumps(other) + "\n")
    for _ in range(2):  # and only once
        train.main(["--out", str(run), "--resume"])
        tasks = [row["task"] for row in read_jsonl(run / "eval.jsonl")]
        assert tasks == ["loss", "loss", "retrieval", "zeroshot", "probe"]


def test_lit_leaves_its_encoder_as_it_was(classes, tmp_path, device):
    """Model and image size come from the run; the encoder that is saved is the one that came."""
    flags = ["--samples", "16", "--workers", "0"]
    train.main(train_flags(classes, tmp_path / "first", *flags, "--image-size", "48"))
    flags = [*TINY[2:], "--data", str(classes), "--objective", "lit", "--workers", "0"]
    flags += ["--init", str(tmp_path / "first"), "--samples", "40", "--weight-decay", "0.5"]
    train.main([*flags, "--out", str(tmp_path / "lit")])
    assert metrics(tmp_path / "lit")[-1]["loss"] < metrics(tmp_path / "lit")[0]["loss"]
    encoders = [load(tmp_path / run / "encoder.pt") for run in ("first", "lit")]
    assert_same(*encoders)
    shutil.rmtree(tmp_path / "first")  # a resumed run needs only its own folder
    train.main(["--out", str(tmp_path / "lit"), "--resume"])


def test_a_run_goes_on_at_another_resolution(classes, tmp_path, device, capsys):
    """The head comes along if the tokens are the same, and only then."""
    flags = ["--samples", "16", "--workers", "0"]
    train.main(train_flags(classes, tmp_path / "first", *flags))
    models = [state(tmp_path / "first")["model"]]
    flags += ["--init", str(tmp_path / "first"), "--lr", "0", "--image-size", "64"]
    for name, tokenizer in (("same", "bpe:300"), ("other", "words:4")):
        own = [*flags, "--tokenizer", tokenizer]
        train.main(train_flags(classes, tmp_path / name, *own))
        models.append(state(tmp_path / name)["model"])
        assert ("the head of" in capsys.readouterr().out) == (name == "same")
    for name in ("norm.weight", "head.weight", "head.bias"):
        assert torch.equal(models[0][name], models[1][name])
    assert models[0]["head.weight"].shape != models[2]["head.weight"].shape


def test_an_encoder_of_timms_is_taken_over_and_its_positions_interpolated(
    classes, tmp_path, device
):
    """A random ViT-Ti/16 of timm's for 224 px: the same features at 224, and a start at 160."""
    torch.manual_seed(0)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    theirs = timm.create_model("vit_tiny_patch16_224", **options).eval()
    torch.save(theirs.state_dict(), tmp_path / "timm.pt")
    ours = build_encoder("Ti/16", 224).eval()
    init_encoder(ours, tmp_path / "timm.pt")
    images = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(images).mean(dim=1), theirs(images), atol=1e-5, rtol=1e-5)

    flags = ["--model", "Ti/16", "--image-size", "160", "--samples", "2", "--batch-size", "2"]
    flags += ["--workers", "0", "--init", str(tmp_path / "timm.pt"), "--lr", "0"]
    train.main(train_flags(classes, tmp_path / "run", *flags))
    encoder = load(tmp_path / "run" / "encoder.pt")
    peer = timm.layers.resample_abs_pos_embed(
        theirs.pos_embed, new_size=[10, 10], num_prefix_tokens=0, antialias=True
    )
    torch.testing.assert_close(encoder["pos_embed"], peer)
    assert torch.equal(encoder["blocks.3.mlp.fc1.weight"], theirs.blocks[3].mlp.fc1.weight)


def test_an_encoder_that_does_not_fit_is_refused_with_its_keys(capsys, classes, tmp_path):
    encoder = build_encoder("XS/16", 32).state_dict()
    flags = train_flags(classes, tmp_path / "run", "--init", str(tmp_path / "encoder.pt"))
    for change, message in (
        ({"cls_token": torch.zeros(1, 1, 128)}, 'Unexpected key(s) in state_dict: "cls_token"'),
        ({"norm.bias": None}, 'Missing key(s) in state_dict: "norm.bias"'),
        (
            {"norm.weight": torch.zeros(7)},
            "norm.weight: copying a param with shape torch.Size([7])",
        ),
        (
            {"pos_embed": torch.zeros(1, 5, 128)},
            "the shape in current model is torch.Size([1, 4, 128])",
        ),
    ):
        state = {key: value for key, value in (encoder | change).items() if value is not None}
        torch.save(state, tmp_path / "encoder.pt")
        assert message in refused(capsys, *flags)
    torch.save({"step": 3}, tmp_path / "encoder.pt")
    assert "is not an encoder" in refused(capsys, *flags)
    torch.save(list(encoder.values()), tmp_path / "encoder.pt")
    assert "cannot be read" in refused(capsys, *flags)
    assert "there is no checkpoint" in refused(capsys, *flags, "--init", tmp_path / "nothing.pt")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# A language model on a locked encoder.


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """The state dict of a tiny random GPT-2 of transformers' with 280 tokens."""
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 280, "n_embd": 64, "n_layer": 2, "n_head": 1, "n_positions": 256}
    shape |= {"bos_token_id": 279, "eos_token_id": 279}
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape))
    path = tmp_path_factory.mktemp("gpt2") / "pytorch_model.bin"
    torch.save(model.state_dict(), path)
    return path


CAPTION = ["--objective", "caption", "--workers", "0", "--lr", "3e-3"]


def learns_with_a_locked_encoder(run, first):
    lines = metrics(run)
    encoders = [load(each / "encoder.pt") for each in (first, run)]
    assert_same(*encoders)
    return lines[-1]["loss"] < lines[0]["loss"] - 1


@pytest.mark.parametrize("objective", ["caption", "clipcap"])
def test_captions_are_learned_and_evaluated(capsys, classes, first, tmp_path, objective):
    run, flags = (
        tmp_path / "run",
        ["--samples", "480", "--objective", objective, "--init", str(first)],
    )
    train.main(train_flags(classes, run, *CAPTION, *flags))
    assert learns_with_a_locked_encoder(run, first)
    evaluation.main(["caption", str(run), "--data", str(classes), "--workers", "0"])
    (row,) = read_jsonl(run / "eval.jsonl")
    assert (row["task"], row["step"], row["images"]) == ("caption", 60, 24)
    assert row["cider"] > 1 and 0 <= row["exact"] <= 1
    assert "cider" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        evaluation.main(["zeroshot", str(run), "--data", str(classes), "--workers", "0"])
    assert "needs a head over words or a text tower" in capsys.readouterr().err
    texts = read_jsonl(run / "captions.jsonl")
    exact = [text["generated"] in text["references"] for text in texts]
    assert len(texts) == 24 and row["exact"] == sum(exact) / 24
    assert {text["references"][0] for text in texts} == {caption(i) for i in range(24)}
    found = [text["generated"].split()[1] == text["references"][0].split()[1] for text in texts]
    assert sum(found) > 16  # a third of the colours would be right by chance
    rows = [f"{classes / 'red' / '000.png'},{text}" for text in ("a red picture", "red")]
    (tmp_path / "twice.csv").write_text("\n".join(["filepath,caption", *rows]))
    evaluation.main(["caption", str(run), "--data", str(tmp_path / "twice.csv"), "--workers", "0"])
    (text,) = read_jsonl(run / "captions.jsonl")  # one image with two references
    assert text["references"] == ["a red picture", "red"]


def test_questions_are_answered(classes, first, tmp_path):
    """Each image comes with two questions, so a model that ignores them cannot answer both."""
    table, run = tmp_path / "table.csv", tmp_path / "run"
    rows = ["filepath,caption,question"]
    for path in sorted(classes.rglob("*.png")):
        rows += [f"{path},{path.parent.name},which colour?", f"{path},yes,is this a picture?"]
    table.write_text("\n".join(rows) + "\n")
    flags = ["--samples", "480", "--init", str(first), "--val-data", str(table)]
    train.main(train_flags(table, run, *CAPTION, *flags))
    assert learns_with_a_locked_encoder(run, first)
    row = read_jsonl(run / "eval.jsonl")[-1]
    texts = read_jsonl(run / "captions.jsonl")
    assert (row["step"], row["images"], len(texts)) == (60, 48, 48) and row["exact"] > 0.75
    for text in texts:
        wanted = {"is this a picture?": {"yes"}, "which colour?": set(COLOURS)}[text["question"]]
        assert text["generated"] in wanted and set(text["references"]) <= wanted


def test_a_frozen_gpt2_reads_what_a_projector_learns(classes, first, gpt2, tmp_path):
    """And this resumes exactly, without the files that the run started from."""
    flags = ["--samples", "64", "--save-every", "3", "--init", str(first)]
    flags += ["--objective", f"caption:{gpt2}", "--tokenizer", "bpe:280"]
    run, killed = run_and_killed_copy(train_flags(classes, tmp_path / "run", *CAPTION, *flags), 5)
    assert metrics(run)[-1]["loss"] < metrics(run)[0]["loss"]
    prefix, model = "language_model.", state(run)["model"]
    ours = {key.removeprefix(prefix): p for key, p in model.items() if key.startswith(prefix)}
    assert_same(ours, dict(load_gpt2(gpt2).state_dict()))
    before = state(killed)
    assert not torch.equal(model["projector.0.weight"], before["model"]["projector.0.weight"])
    gpt2.rename(tmp_path / "away")
    train.main(["--out", str(killed), "--resume"])
    (tmp_path / "away").rename(gpt2)
    assert_same(state(killed), state(run))


def test_language_models_that_do_not_fit_are_refused(capsys, classes, first, gpt2, tmp_path):
    flags = train_flags(classes, tmp_path / "run", *CAPTION, "--init", str(first))
    error = refused(capsys, *flags, "--objective", f"caption:{gpt2}", "--tokenizer", "bpe:270")
    assert "knows 280 tokens" in error and "bpe:270" in error and "--tokenizer gpt2" in error
    weights = load(gpt2)
    weights["transformer.h.1.elsewhere"] = weights.pop("transformer.h.1.ln_2.weight")
    torch.save(weights, tmp_path / "other.bin")
    error = refused(capsys, *flags, "--objective", f"caption:{tmp_path / 'other.bin'}")
    assert "h.1.ln_2.weight" in error and "h.1.elsewhere" in error
    assert "nothing.bin cannot be read" in refused(
        capsys, *flags, "--objective", "caption:nothing.bin"
    )
    assert not (tmp_path / "run").exists()


def test_captions_need_a_source_with_captions(capsys, first, tmp_path):
    (tmp_path / "pictures").mkdir()
    for i in range(3):
        picture(i).save(tmp_path / "pictures" / f"{i}.png")
    flags = train_flags(tmp_path / "pictures", tmp_path / "run", *CAPTION, "--init", str(first))
    assert "missing caption" in refused(capsys, *flags)


def test_flags_that_contradict_the_objective_are_refused(capsys, classes, pairs, tmp_path):
    for flags, message in (
        (["--objective", "lit"], "--objective lit needs a trained encoder"),
        (["--objective", "clipcap"], "--objective clipcap needs a trained encoder"),
        (["--objective", "clip", "--loss", "bce"], "--loss bce is for"),
        (["--objective", "clip", "--no-idf"], "has no IDF weights"),
        (["--loss", "bce", "--no-idf"], "has no IDF weights"),
        (["--objective", "clip", "--micro-batch", "4"], "cannot be split into micro-batches"),
        (["--objective", "superclip", "--micro-batch", "4"], "cannot be split into micro-batches"),
        (["--loss", "two_way", "--micro-batch", "4"], "cannot be split into micro-batches"),
        (["--model", "resnet50", "--grad-checkpointing"], "--grad-checkpointing is for the ViT"),
        (["--model", "resnet50", "--image-size", "24"], "32 px or more"),
        (["--tokenizer", "words:5000"], "there are only 6 different words"),
    ):
        assert message in refused(capsys, *train_flags(classes, tmp_path / "run", *flags))
    flags = train_flags(pairs, tmp_path / "run", "--objective", "supervised")
    assert "has no classes to train on" in refused(capsys, *flags)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------
# Killed and resumed.


def run_and_killed_copy(flags: list[str], n: int) -> tuple[Path, Path]:
    """Train, and also keep what a kill before the n-th step would have left.

    That is the run's folder at this moment, so its copy can be resumed like a run that was killed.
    """
    run = Path(flags[flags.index("--out") + 1])
    killed = run.with_name("killed")
    copy = at_call(train.Progress.wait_for, n, lambda: shutil.copytree(run, killed))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Progress, "wait_for", copy)
        train.main(flags)
    return run, killed


def assert_resumes_exactly(flags: list[str], n: int):
    run, killed = run_and_killed_copy(flags, n)
    assert 0 < state(killed)["progress"]["step"] < state(run)["progress"]["step"]
    torch.rand(n)  # another past of this process's generator
    train.main(["--out", str(killed), "--resume"])
    assert_same(state(killed), state(run))
    assert metrics(killed) == metrics(run)
    encoders = [load(folder / "encoder.pt") for folder in (killed, run)]
    assert_same(*encoders)


RESUMED = [["--loss", name] for name in ("softmax", *LOSSES)]
RESUMED += [["--objective", name] for name in ("clip", "siglip", "superclip", "lit", "supervised")]
RESUMED += [["--objective", name] for name in ("cap", "caption", "clipcap")]
RESUMED += [["--precision", "fp16"], ["--micro-batch", "2", "--grad-checkpointing"]]


@pytest.mark.parametrize("flags", RESUMED, ids="-".join)
def test_every_objective_resumes_exactly(classes, first, tmp_path, flags):
    """Killed in the fourth step of five, with a checkpoint of the second."""
    init = ["--init", str(first)] if flags[1] in ("lit", "caption", "clipcap") else []
    flags = ["--samples", "20", "--batch-size", "4", "--workers", "0", *flags, *init]
    assert_resumes_exactly(train_flags(classes, tmp_path / "run", "--save-every", "2", *flags), 4)


def test_an_encoder_with_batch_norm_resumes_exactly(classes, tmp_path, monkeypatch, device):
    """It counts images; and the order of samples stays. A small network stands for ResNet-50.

    A worker reads the data: in this process, the seed of each sample would hide another's absence.
    """
    small = functools.partial(convnets.ConvNet, "mobilenet_v3_small", 576)
    monkeypatch.setattr(convnets, "resnet50", small)
    flags = ["--model", "resnet50", "--samples", "8", "--batch-size", "4"]
    flags += ["--workers", "1", "--save-every", "1", "--log-every", "2"]
    assert_resumes_exactly(train_flags(classes, tmp_path / "run", *flags), 2)


def test_an_encoder_with_dropout_resumes_exactly(classes, tmp_path, monkeypatch, device):
    def build(*args):
        encoder = build_encoder(*args)
        drop = lambda _, args, out: torch.nn.functional.dropout(out, 0.5, encoder.training)  # noqa: E731
        encoder.norm.register_forward_hook(drop)
        return encoder

    monkeypatch.setattr(superclass, "build_encoder", build)
    flags = ["--samples", "40", "--save-every", "2", "--workers", "1"]
    assert_resumes_exactly(train_flags(classes, tmp_path / "run", *flags), 4)


def test_what_is_random_in_a_step_depends_on_seed_step_and_rank_alone(device):
    def draw(*args):
        torch.manual_seed(data.seed_of(*args))
        return torch.rand(4, device=device).tolist()

    drawn = [draw(*args) for args in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0))]
    assert drawn[0] == drawn[4] and len(set(map(tuple, drawn))) == 4


KILLED = ["--samples", "96", "--save-every", "4", "--log-every", "3", "--workers", "2"]


@pytest.fixture(scope="module")
def whole(finished):
    """The run that was not killed."""
    run = finished[0].parent / "whole"
    train.main(train_flags(finished[1], run, *KILLED))
    return run


@pytest.mark.parametrize(
    ("place", "n"),
    [
        ("optimizer", 3),  # before the first save
        ("optimizer", 9),  # between two saves
        ("checkpoint.pt", 3),  # with a new one written, and not yet in the place of the old one
        ("encoder.pt", 4),  # of the last step
    ],
)
def test_a_killed_run_ends_like_one_that_was_not(finished, whole, tmp_path, place, n):
    run = tmp_path / "run"
    died = launch(train_flags(finished[1], run, *KILLED), 1, (0, "SIGKILL", place, n))
    assert died.codes == [-signal.SIGKILL]
    assert state(run)["progress"]["step"] < 12
    train.main(["--out", str(run), "--resume"])
    assert_same(state(run), state(whole))
    assert_same(load(run / "encoder.pt"), load(whole / "encoder.pt"))
    assert metrics(run) == metrics(whole)
    assert {path.name for path in run.iterdir()} == {path.name for path in whole.iterdir()}


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP"])
def test_a_signal_finishes_the_step_and_saves(finished, whole, tmp_path, name):
    run = tmp_path / "run"
    stopped = launch(train_flags(finished[1], run, *KILLED), 1, (0, name, "batch", 5))
    assert stopped.codes == [128 + getattr(signal, name)]
    assert "stopped after step 5 of 12; continue with: " in stopped.said
    assert f"python train.py --out {run} --resume" in stopped.said
    assert state(run)["progress"]["step"] == 5
    train.main(["--out", str(run), "--resume"])
    assert_same(state(run), state(whole))
    assert metrics(run) == metrics(whole)


def test_nohup_holds_and_handlers_are_given_back():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with train.caught_signals() as caught:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # a second one kills
        assert caught == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


def test_scores_and_early_checkpoints_do_not_touch_the_training(
    finished, whole, tmp_path, monkeypatch
):
    """With scores every five steps and a checkpoint after each step: the same bits, also resumed.

    Captions without classes have their loss and retrieval measured.
    """
    saved, save = [], train.save
    monkeypatch.setattr(train, "SAVE_SECONDS", -1)
    monkeypatch.setattr(train, "save", lambda state, *a: saved.append(0) or save(state, *a))
    flags = [*KILLED[:-1], "0", "--eval-every", "5", "--val-data", str(finished[1])]
    flags = train_flags(finished[1], tmp_path / "run", *flags)
    run, killed = run_and_killed_copy(flags, 8)
    assert len(saved) == 13
    train.main(["--out", str(killed), "--resume"])
    for folder in (run, killed):
        assert metrics(folder) == metrics(whole)
        assert_same(state(folder), state(whole) | {"fingerprint": state(folder)["fingerprint"]})
        rows = [(row["step"], row["task"]) for row in read_jsonl(folder / "eval.jsonl")]
        assert rows == [(s, t) for s in (0, 5, 10, 12) for t in ("loss", "retrieval")]
        losses = [line for line in read_jsonl(folder / "metrics.jsonl") if "val_loss" in line]
        assert [line["step"] for line in losses] == [0, 5, 10, 12]
        assert losses[-1]["val_loss"] < losses[0]["val_loss"]
    (run / "eval.jsonl").unlink()  # as if it had been killed between the two files
    train.main(["--out", str(run), "--resume"])
    assert [line for line in read_jsonl(run / "metrics.jsonl") if "val_loss" in line] == losses
    assert [row["task"] for row in read_jsonl(run / "eval.jsonl")] == ["loss", "retrieval"]


def test_a_folder_can_be_read_while_a_run_writes_it(finished, tmp_path):
    """Fifty times, each with a checkpoint that belongs to its step."""
    run, device = tmp_path / "run", torch.device("cpu")
    flags = ["--samples", "80000", "--save-every", "1", "--workers", "0", "--no-first-eval"]
    (process,) = start(train_flags(finished[1], run, *flags), tmp_path / "log")
    try:
        while process.is_alive() and not (run / "checkpoint.pt").exists():
            process.join(0.05)
        loaded, lines = [], []
        for _ in range(50):
            loaded.append(load_run(run, device))
            lines.append(len(read_jsonl(run / "metrics.jsonl")))
            evaluation.read_weights(run / "encoder.pt")
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    steps = [each.step for each in loaded]
    assert steps == sorted(steps) and steps[0] < steps[-1] and lines[0] < lines[-1]
    assert all(each.idf.n == 8 * each.step for each in loaded)


def test_a_resumed_run_goes_on_counting_bad_samples(pairs, tmp_path, device):
    (pairs / "007.png").write_bytes(b"")
    flags = ["--samples", "96", "--save-every", "4", "--workers", "0"]
    run, killed = run_and_killed_copy(train_flags(pairs, tmp_path / "run", *flags), 10)
    assert state(killed)["progress"]["skipped"]["unreadable image"] >= 2
    train.main(["--out", str(killed), "--resume"])
    assert_same(state(killed), state(run))
    assert metrics(killed) == metrics(run)


def test_speed_is_that_of_all_steps_since_the_last_line(whole):
    for line in read_jsonl(whole / "metrics.jsonl"):  # one in three steps
        assert line["images_per_s"] * line["step_s"] == pytest.approx(8)
        assert 0 <= line["data_s"] <= line["step_s"]


def test_a_file_is_flushed_before_it_is_renamed(tmp_path, monkeypatch):
    done = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, n=name, real=real: done.append(n) or real(*a))
    evaluation.publish(b"x", tmp_path / "file")
    assert done == ["fsync", "replace"]


# ------------------------------------------------------------------------------------------------
# Disks that are full or cannot be written.


def test_a_full_disk_leaves_the_last_checkpoint_intact(capsys, finished, whole, tmp_path):
    """What is written beside the checkpoint goes to a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("needs Linux's /dev/full")
    run, flags = tmp_path / "run", [*KILLED[:-1], "0"]
    fill = lambda: (run / "checkpoint.pt.part").symlink_to("/dev/full")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", at_call(torch.optim.AdamW.step, 7, fill))
        error = refused(capsys, *train_flags(finished[1], run, *flags))
    assert f"{run / 'checkpoint.pt'} cannot be written" in error and "No space left" in error
    assert state(run)["progress"]["step"] == 4
    train.main(["--out", str(run), "--resume"])
    assert_same(state(run), state(whole))
    assert metrics(run) == metrics(whole)


def test_a_full_disk_is_reported_where_a_line_of_metrics_is_due(capsys, finished, tmp_path):
    def full(path, mode):
        if mode == "a+b":
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, mode)

    run, flags = tmp_path / "run", ["--samples", "16", "--workers", "0"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "open", full, raising=False)
        error = refused(capsys, *train_flags(finished[1], run, *flags))
    assert f"{run / 'metrics.jsonl'} cannot be written" in error and "No space left" in error
    assert state(run)["progress"]["step"] == 0


def test_a_folder_that_cannot_be_written_is_refused(capsys, finished, tmp_path):
    _, pairs = finished
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        error = refused(capsys, *train_flags(pairs, out))
        assert f"--out {out} cannot be made" in error

    def read_only(path, mode):
        raise OSError(errno.EROFS, "Read-only file system")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "open", read_only, raising=False)
        error = refused(capsys, *train_flags(pairs, tmp_path / "run"))
    assert "cannot be written" in error and "Read-only file system" in error


# ------------------------------------------------------------------------------------------------
# Mistakes, each answered with one sentence.


def test_unknown_names_are_refused(capsys, pairs, tmp_path):
    flags = train_flags(pairs, tmp_path / "run")
    assert "no source 'nowhere'" in refused(capsys, "--data", "nowhere", "--out", tmp_path / "run")
    assert "unknown tokenizer 'gpt9'" in refused(capsys, *flags, "--tokenizer", "gpt9")
    assert "unknown model 'Q/16'" in refused(capsys, *flags, "--model", "Q/16")
    assert "patches of 5 px" in refused(capsys, *flags, "--model", "XS/5")
    assert "device 'abacus'" in refused(capsys, *flags, "--device", "abacus")
    for flag, value, message in (
        ("--samples", "0", "must be 1 or more, not 0"),
        ("--min-scale", "2", "must be from 0 to 1, not 2"),
        ("--workers", "-1", "must be 0 or more, not -1"),
        ("--lr", "much", "invalid numeric value: 'much'"),
        ("--lr", "nan", "must be 0 or more, not nan"),
        ("--beta2", "1", "must be from 0 to 0.9999, not 1"),
    ):
        assert f"argument {flag}: {message}" in refused(capsys, *flags, flag, value)
    error = refused(capsys, *flags, "--batchsize", "3")
    assert error == "error: unknown flag --batchsize: did you mean --batch-size?"
    assert "unknown flag --zz: --help lists all" in refused(capsys, *flags, "--zz=1")
    assert "unknown flag --batch: did you mean" in refused(capsys, *flags, "--batch", "3")
    for main, given, meant in ((evaluation.main, ("probe", "r", "--limt"), "--limit"),
                               (evaluation.main, ("words", "r", "--wrd"), "--word"),
                               (data.main, ("shapes", "--sed"), "--seed")):  # fmt: skip
        assert refused(capsys, *given, "3", main=main).endswith(f"did you mean {meant}?")
    assert not (tmp_path / "run").exists()


def test_a_batch_that_cannot_be_divided_is_refused(capsys, pairs, tmp_path):
    error = refused(capsys, *train_flags(pairs, tmp_path / "run", "--micro-batch", "3"))
    assert "--batch-size 8 is not a multiple of 1 processes x 3 images" in error
    assert not (tmp_path / "run").exists()  # the corrected command may use the same folder


def test_a_resumed_run_is_split_by_its_own_batch_size(capsys, pairs, tmp_path, device):
    """Its 9 images are three micro-batches of 3, although --batch-size's default is not."""
    run = tmp_path / "run"
    flags = ["--batch-size", "9", "--samples", "9", "--workers", "0"]
    train.main(train_flags(pairs, run, *flags))
    train.main(["--out", str(run), "--resume", "--micro-batch", "3"])
    error = refused(capsys, "--out", run, "--resume", "--micro-batch", "2")
    assert "--batch-size 9 is not a multiple of 1 processes x 2 images" in error


def test_a_run_is_not_overwritten(capsys, finished):
    run, pairs = finished
    before = state(run)
    assert "already holds a run" in refused(capsys, *train_flags(pairs, run))
    assert_same(state(run), before)


def test_a_run_does_not_go_on_as_another(capsys, finished):
    run, _ = finished
    changes = {"--model": "S/16", "--tokenizer": "bpe:400", "--data": "shapes", "--lr": "0.5"}
    for flag, value in changes.items():
        error = refused(capsys, "--out", run, "--resume", flag, value)
        assert f"was started with {flag} " in error
        assert f"go on with {value}: start another one from it with --init {run}" in error


def test_data_that_changed_is_not_resumed(capsys, finished, tmp_path):
    """Renamed files, too: the seed would draw others from their order."""
    run, pairs = tmp_path / "run", tmp_path / "pairs"
    again = "--out", run, "--resume"
    shutil.copytree(finished[1], pairs)
    train.main(train_flags(pairs, run, "--samples", "8", "--workers", "0"))
    (pairs / "003.png").rename(pairs / "03.png")
    (pairs / "003.txt").rename(pairs / "03.txt")
    assert re.search("was 24 pairs, names .*, now 24 pairs", refused(capsys, *again))
    picture(99).save(pairs / "003.png")
    assert re.search("was 24 pairs, names .*, now 25 pairs", refused(capsys, *again))
    (pairs / "003.png").unlink()
    (pairs / "03.png").rename(pairs / "003.png")
    (pairs / "03.txt").rename(pairs / "003.txt")
    train.main(["--out", str(run), "--resume"])


def test_captions_without_classes_train_with_a_labelled_validation_set(finished, tmp_path, capsys):
    """The probe needs labels in both; zero-shot needs them in the validation set alone."""
    for i in range(6):
        (tmp_path / "val" / ["red", "green", "blue"][i % 3]).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "val" / ["red", "green", "blue"][i % 3] / f"{i}.png")
    flags = ["--val-data", str(tmp_path / "val"), "--samples", "16", "--workers", "0"]
    train.main(train_flags(finished[1], tmp_path / "run", *flags))
    out = capsys.readouterr().out
    assert "zeroshot" in out and "probe" not in out


def test_resume_of_nothing_starts_what_has_its_data_named(capsys, pairs, tmp_path, device):
    run = tmp_path / "run"
    error = refused(capsys, "--out", run, "--resume", "--samples", "8")
    assert f"{run} holds no run to resume" in error and not run.exists()
    train.main(train_flags(pairs, run, "--samples", "8", "--workers", "0", "--resume"))
    assert state(run)["progress"]["step"] == 1


def test_a_start_that_failed_does_not_block_its_folder(capsys, pairs, tmp_path, monkeypatch):
    """As when a batch does not fit memory, which shows before the folder holds a run."""
    said = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 EB"
    flags = train_flags(pairs, tmp_path / "run", "--samples", "8", "--workers", "0")
    for failure in (RuntimeError(said), MemoryError(), torch.OutOfMemoryError("8 EiB")):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SuperClass, "forward", lambda *_, failure=failure: raise_(failure))
            error = refused(capsys, *flags)
        assert "memory ran out" in error and "--micro-batch" in error
        assert not (tmp_path / "run" / "checkpoint.pt").exists()
    train.main(flags)
    with pytest.raises(RuntimeError, match="ours"), data.one_sentence():
        raise RuntimeError("ours")


def raise_(error):
    raise error


def test_a_second_process_in_a_runs_folder_is_refused(finished, tmp_path):
    """While the first one trains; what a killed one held is free."""
    run = tmp_path / "run"
    flags = ["--samples", "80000", "--workers", "2", "--no-first-eval"]
    (process,) = start(train_flags(finished[1], run, *flags), tmp_path / "log")
    try:
        while process.is_alive() and not (run / "checkpoint.pt").exists():
            process.join(0.05)
        second = launch(["--out", run, "--resume"])
        assert process.is_alive()
    finally:
        process.kill()
        process.join()
    assert second.codes == [2] and f"another process trains in {run}" in second.said
    train.lock(run)


def test_storage_without_locks_is_named(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("fcntl.lockf", lambda *_: raise_(OSError(errno.ENOLCK, "No locks")))
    train.lock(tmp_path)
    assert "is not locked" in capsys.readouterr().err


def test_a_run_can_be_read_from_another_folder(pairs, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    flags = ["--val-data", "./pairs/", "--class-names", "names.txt", "--samples", "8"]
    train.main(train_flags("pairs", "run", *flags, "--workers", "0", "--no-first-eval"))
    config = evaluation.read_config(tmp_path / "run")
    assert config.data == config.val_data == str(pairs)
    assert config.class_names == str(tmp_path / "names.txt")
    train.main(["--out", "run", "--resume", "--data", "pairs"])  # the same
    monkeypatch.chdir("/")
    train.main(["--out", str(tmp_path / "run"), "--resume"])
    assert absolute("data", "a.tar::s3://b/c.tar::d.TAR") == "/a.tar::s3://b/c.tar::/d.TAR"
    assert absolute("data", "{00..99}.tar") == "/{00..99}.tar"
    names = "shapes", "coco:2014", "stripes:arg", "simplecache::s3://b/c.tar"
    assert all(absolute("data", name) == name for name in names)
    assert absolute("tokenizer", "bpe:512") == "bpe:512"


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


def test_a_checkpoint_of_another_run_is_refused(capsys, finished, tmp_path):
    """Its shapes are the same; only the fingerprint tells that flags or tokens are others."""
    run, pairs = finished
    config, tokens, other = tmp_path / "config", tmp_path / "tokens", tmp_path / "other"
    train.main(train_flags(pairs, other, "--samples", "96", "--workers", "0", "--beta2", "0.9"))
    shutil.copytree(run, config)
    shutil.copy(other / "checkpoint.pt", config)
    shutil.copytree(run, tokens)
    lines = (tokens / "tokenizer.tiktoken").read_text().splitlines()
    *rest, (a, i), (b, j) = map(str.split, lines)
    lines = [*map(" ".join, rest), f"{b} {i}", f"{a} {j}"]
    (tokens / "tokenizer.tiktoken").write_text("\n".join(lines) + "\n")
    for folder in (config, tokens):
        error = f"{folder / 'checkpoint.pt'} does not belong to"
        assert error in refused(capsys, "--out", folder, "--resume")
        assert error in refused(capsys, "zeroshot", folder, main=evaluation.main)
    train.main(["--out", str(run), "--resume"])  # the run's own is not


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(capsys, pairs, tmp_path, device):
    run = tmp_path / "run"
    flags = ["--samples", "96", "--workers", "0", "--lr", "1e30", "--log-every", "5"]
    error = refused(capsys, *train_flags(pairs, run, "--save-every", "1", *flags))
    step = state(run)["progress"]["step"]
    assert f"the loss of step {step + 1} is " in error
    assert all(torch.isfinite(p).all() for p in state(run)["model"].values())


def test_a_few_bad_samples_are_counted_and_many_stop_the_run(capsys, tmp_path, device):
    folder = tmp_path / "pairs"
    folder.mkdir()
    for i in range(60):
        file = encoded(picture(i))
        (folder / f"{i:02d}.jpg").write_bytes(file[:300] if i in (7, 31) else file)
        (folder / f"{i:02d}.txt").write_text("" if i == 40 else caption(i))
    flags = ["--samples", "120", "--workers", "0"]
    train.main(train_flags(folder, tmp_path / "run", *flags))
    said = capsys.readouterr()
    assert "skipping: unreadable image" in said.err and "skipping: unusable caption" in said.err
    # Two passes: each bad sample is met twice, and again where it is drawn in the place of another.
    assert metrics(tmp_path / "run")[-1]["skipped"] >= 6
    assert "x unreadable image" in said.out and "x unusable caption" in said.out
    for i in range(0, 60, 5):
        (folder / f"{i:02d}.jpg").write_bytes(b"")
    for name, more in (("second", []), ("third", ["--samples", "5120", "--batch-size", "128"])):
        error = refused(capsys, *train_flags(folder, tmp_path / name, *flags, *more))
        assert "cannot be used" in error and "x unreadable image" in error
    assert len(metrics(tmp_path / "third")) < 8  # after a thousand samples, not at the end
