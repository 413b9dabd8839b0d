"""The measurements against formulas written out, and the command on a small trained run."""

import json
import math
import shutil
from argparse import Namespace

import pytest
import torch

import eval as evaluation
import train
from data import UserError, caption_labels, caption_tokens, load_source, load_tokenizer
from eval import (
    Run,
    extract,
    load_run,
    open_objective,
    open_sources,
    own_rows,
    read_jsonl,
    score_bags,
    token_bags,
    zeroshot,
)
from superclass import IDF, SuperClass, ViT
from tests.conftest import COLOURS, caption, load, make_shards, picture, train_flags

TEXTS = ["a red star", "a blue star", "a red ball", "a green ball"]


@pytest.fixture
def small(device):
    """A run with a random model and counts of TEXTS, and features of five images."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bpe:280", TEXTS * 3)
    model, idf = SuperClass(ViT(16, 8, 32, 1, 2), tokenizer.n_vocab), IDF(tokenizer.n_vocab)
    for text in TEXTS:
        idf.update(torch.tensor([caption_labels(text, tokenizer)]))
    config = Namespace(objective="superclass", loss="softmax")
    given = open_objective(config), tokenizer, model.to(device), idf.to(device), 0
    return Run(None, config, *given), torch.randn(5, 32)


def test_zeroshot_is_the_weighted_mean_log_probability(small):
    run, features = small
    tokenizer, model, idf = run.tokenizer, run.model, run.idf
    names = [["red", "blue"], ["star"], ["green ball"]]
    with torch.no_grad():
        logits = model.head(model.norm(features.to(idf.df.device)))
        log_p = logits.cpu().double().log_softmax(dim=1)
    expected = torch.zeros(5, 3, dtype=torch.float64)
    for image in range(5):
        for c, aliases in enumerate(names):
            for name in aliases:
                ids = caption_labels(name, tokenizer)
                w = [math.log(5 / (idf.df[t].item() + 1)) for t in ids]
                parts = [w[k] * log_p[image, t].item() for k, t in enumerate(ids)]
                expected[image, c] += sum(parts) / sum(w) / len(aliases)
    scores = zeroshot(run, features, names)
    torch.testing.assert_close(scores.double(), expected, rtol=1e-4, atol=1e-4)
    some = zeroshot(run, features, [["red", "ZX"], ["blue"]])  # the second name was never seen
    torch.testing.assert_close(some, zeroshot(run, features, [["red"], ["blue"]]))


def test_classes_whose_names_were_never_seen_are_named_and_never_the_best(small, capsys):
    run, features = small
    scores = zeroshot(run, features, [["ZX"], ["red"], ["QQ"]])
    assert torch.equal(scores[:, 1:2], zeroshot(run, features, [["red"]]))
    assert (scores[:, ::2] == -math.inf).all()
    assert "no token of 'ZX', 'QQ' occurred in training" in capsys.readouterr().err
    with pytest.raises(UserError, match="no token of 'ZX' occurred in training: give other names"):
        zeroshot(run, features, [["ZX"]])


def test_a_text_without_a_known_token_is_never_the_best(small):
    run, features = small
    bags = token_bags(run.idf, [caption_labels(text, run.tokenizer) for text in ("red", "ZX")])
    scores = score_bags(run, features, bags)
    assert scores[:, 0].isfinite().all() and scores[:, 1].tolist() == [-math.inf] * 5


def test_zeroshot_before_any_caption_is_defined(small):
    run, features = small
    untrained = run._replace(idf=IDF(len(run.idf.df)).to(run.idf.df.device))
    scores = zeroshot(untrained, features, [["red"], ["blue"]])
    assert torch.isfinite(scores).all()


def test_zeroshot_of_a_head_with_sigmoids(small):
    run, features = small
    with torch.no_grad():
        logits = run.model.head(run.model.norm(features.to(run.idf.df.device)))
        log_p = torch.nn.functional.logsigmoid(logits).cpu()
    ids = caption_labels("red", run.tokenizer)
    w = run.idf.weights().cpu()[ids]
    objective = open_objective(Namespace(objective="superclass", loss="bce"))
    scores = zeroshot(run._replace(objective=objective), features, [["red"]])
    torch.testing.assert_close(scores[:, 0], log_p[:, ids] @ w / w.sum())


@pytest.fixture(scope="module")
def run(tmp_path_factory, device):
    """A run trained for 40 steps on pictures in three class folders."""
    folder = tmp_path_factory.mktemp("eval")
    for i in range(60):
        place = folder / "pictures" / list(COLOURS)[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i:02d}.png")
        (place / f"{i:02d}.txt").write_text(caption(i))
    flags = ["--val-data", str(folder / "pictures"), "--samples", "320", "--workers", "0"]
    train.main(train_flags(folder / "pictures", folder / "run", *flags, "--lr", "3e-3"))
    return folder / "run"


def rows(run):
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_training_evaluates_at_its_start_and_its_end(run):
    tasks = ["loss", "zeroshot", "probe", "fewshot"]  # too many captions are the same
    expected = [(0, task) for task in tasks] + [(40, task) for task in tasks]
    assert [(row["step"], row["task"]) for row in rows(run)[:8]] == expected
    assert all(row["top1"] > 0.9 for row in rows(run)[5:8])


@pytest.mark.parametrize("task", ["zeroshot", "probe", "fewshot"])
def test_commands_print_a_table_and_append_rows(run, capsys, task):
    before = rows(run)
    evaluation.main([task, str(run), "--workers", "0", "--shots", "5"])
    assert "class" in capsys.readouterr().out
    (row,) = rows(run)[len(before) :]
    assert (row["task"], row["attribute"], row["classes"], row["images"]) == (task, "class", 3, 60)
    assert row["top1"] > 0.9
    if task == "fewshot":
        assert row["shots"] == 5 and row["draws"] == 3 and row["deviation"] >= 0


def test_training_data_without_labels_still_allow_zeroshot(run, tmp_path, capsys):
    """The classes are known by name, but no training image has one: as in shards without .cls."""
    loaded = load_run(run, torch.device("cpu"))
    (tmp_path / "names.txt").write_text("\n".join(COLOURS))
    folder = make_shards(tmp_path / "shards")
    train_source = load_source(str(folder), class_names=str(tmp_path / "names.txt"))
    val = load_source(loaded.config.data, class_names=str(tmp_path / "names.txt"))
    tasks = ["zeroshot", "probe", "fewshot"]
    found = evaluation.measure(tasks, loaded, train_source, val, workers=0)
    assert [row["task"] for row in found] == ["zeroshot"]
    message = capsys.readouterr().err
    assert "no probe: 0 labelled training images" in message
    assert "no fewshot: class 'red' has 0 training images, fewer than 10" in message


def test_features_do_not_depend_on_batches(run, monkeypatch, device):
    loaded = load_run(run, device)
    assert loaded.step == 40 and loaded.idf.n == 320 and not loaded.model.training
    source = load_source(loaded.config.data)
    monkeypatch.setattr(evaluation, "BATCH", 7)
    a, y, tokens = extract(loaded, source, workers=0, captioned=True)
    monkeypatch.setattr(evaluation, "BATCH", 60)
    b, _, none = extract(loaded, source, workers=2)
    torch.testing.assert_close(a, b)
    assert a.shape == (60, 128) and y.shape == (60, 1)
    assert not a.is_inference() and torch.nn.Linear(128, 2)(a).sum().backward() is None
    first = next(source.captions(1))
    assert tokens[0] == caption_tokens(first, loaded.tokenizer) and not any(none)


def test_reading_shows_progress(run, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluation.tqdm, "update", lambda bar, n: seen.append(n))
    loaded = load_run(str(run))
    extract(loaded, load_source(loaded.config.data), workers=0)
    assert sum(seen) == 60


def test_a_string_is_a_path(run):
    assert evaluation.read_config(str(run)) == evaluation.read_config(run)
    assert own_rows(str(run)) == own_rows(run) != []
    assert read_jsonl(str(run / "eval.jsonl")) == read_jsonl(run / "eval.jsonl")
    model, _, _ = evaluation.load(str(run))
    assert not model.training


def test_a_stop_by_the_keyboard_is_one_line(run, capsys, monkeypatch):
    def stop(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "extract", stop)
    with pytest.raises(SystemExit, match="130"):
        evaluation.main(["zeroshot", str(run), "--workers", "0"])
    assert capsys.readouterr().err == "interrupted\n"


def test_a_reader_that_has_enough_is_no_fault(monkeypatch, capsys):
    def stop(*_):
        raise BrokenPipeError

    closed = []
    monkeypatch.setattr(evaluation, "measure_command", stop)
    monkeypatch.setattr("os.dup2", lambda null, out: closed.append(out))
    monkeypatch.setattr("sys.stdout.fileno", lambda: 99)
    with pytest.raises(SystemExit, match="141"):
        evaluation.main(["zeroshot"])
    assert closed == [99] and capsys.readouterr().err == ""


@pytest.mark.parametrize("trains", [True, False])
def test_built_in_data_is_evaluated_on_its_other_split(trains):
    config = Namespace(data="shapes", val_data=None, data_root="", class_names=None)
    training, val = open_sources(config, trains)
    assert val.split == "val" and (training.split == "train" if trains else training is None)


def test_data_alone_names_what_is_evaluated(run, capsys, tmp_path):
    """Where nothing trains, --val-data is not needed beside it; rows say that it was given."""
    for i in range(9):
        place = tmp_path / "few" / list(COLOURS)[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(99 + i).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(caption(i))
    few, before = str(tmp_path / "few"), rows(run)
    for task in ("zeroshot", "retrieval"):
        evaluation.main([task, str(run), "--data", few, "--workers", "0"])
    new = rows(run)[len(before) :]
    assert [(row["task"], row["images"]) for row in new] == [("zeroshot", 9), ("retrieval", 9)]
    assert all(row["flags"] == {"data": few} for row in new) and new[0]["top1"] > 0.8
    assert own_rows(run) == [row for row in rows(run) if "flags" not in row]
    config = Namespace(data="shapes", val_data=None, data_root="", class_names="gone.txt")
    _, val = open_sources(config, False, data=few)  # has its own classes, not the run's
    assert list(val.attributes.values()) == [[["blue"], ["green"], ["red"]]]
    with pytest.raises(UserError, match=r"gone\.txt cannot be read"):
        open_sources(config, False, val_data=few)


def test_a_line_that_was_cut_off_costs_no_other(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    with open(copy / "eval.jsonl", "a") as file:
        file.write('{"step": 40, "ta')
    before, own = len(read_jsonl(copy / "eval.jsonl")), own_rows(copy)
    evaluation.main(["zeroshot", str(copy), "--workers", "0", "--prompt", "{} {x"])
    after = read_jsonl(copy / "eval.jsonl")
    assert len(after) == before + 1 and after[-1]["flags"] == {"prompts": ["{} {x"]}
    assert own_rows(copy) == own
    (copy / "eval.jsonl").write_text("{no json}\n")
    with pytest.raises(UserError, match=r"eval\.jsonl is damaged"):
        own_rows(copy)


def test_what_is_left_out_is_told(run, capsys, tmp_path):
    table = tmp_path / "some.csv"
    table.write_text("filepath,caption,label\n")
    with open(table, "a") as file:
        for i in range(20):
            picture(i).save(tmp_path / f"{i}.png")
            file.write(f"{i}.png,a picture,{list(COLOURS)[i % 3] if i else ''}\n")
        file.write("gone.png,a picture,red\n")
    evaluation.main(["zeroshot", str(run), "--workers", "0", "--val-data", str(table)])
    out, err = capsys.readouterr()
    assert "skipped 1 x missing image, of 21 pairs" in err and "1 images have no class" in err
    assert " 19 " in out


def changed(run, copy, change):
    """A copy of the run after `change` of its config and its checkpoint, which still belong."""
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    state = load(copy / "checkpoint.pt")
    change(config, state)
    (copy / "config.json").write_text(json.dumps(config))
    state["fingerprint"] = evaluation.fingerprint(evaluation.read_config(copy))
    torch.save(state, copy / "checkpoint.pt")
    return copy


def test_zeroshot_needs_no_training_data(run, tmp_path, capsys):
    def move(config, _):
        config.update(data=str(tmp_path / "gone"), val_data=config["data"])

    copy = changed(run, tmp_path / "copy", move)
    evaluation.main(["zeroshot", str(copy), "--workers", "0"])
    assert "zeroshot" in capsys.readouterr().out
    assert "no source" in refused(capsys, "probe", copy)


@pytest.mark.parametrize(
    "damage",
    [
        lambda config, state: config.pop("model"),
        lambda config, state: config.update(model="XS/5"),
        lambda config, state: config.update(vocab_size=7),
        lambda config, state: state["progress"].pop("step"),
        lambda config, state: state.pop("idf"),
        lambda config, state: state["model"].popitem(),
        lambda config, state: state["model"].update(dict.fromkeys(state["model"], torch.zeros(1))),
    ],
)
def test_a_run_whose_files_do_not_fit_is_refused(run, tmp_path, capsys, damage):
    copy = changed(run, tmp_path / "copy", damage)
    assert "do not fit together" in refused(capsys, "zeroshot", copy)


def test_a_config_that_was_edited_is_not_the_checkpoints(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"workers": 7}))  # that may change
    evaluation.main(["zeroshot", str(copy), "--workers", "0"])
    capsys.readouterr()
    (copy / "config.json").write_text(json.dumps(config | {"flip": True}))
    assert "does not belong to the config.json" in refused(capsys, "zeroshot", copy)


def refused(capsys, *flags):
    with pytest.raises(SystemExit) as stop:
        evaluation.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    return line


def test_mistakes_get_a_sentence(run, capsys, tmp_path, pairs):
    assert "holds no run" in refused(capsys, "probe", tmp_path)
    assert f"'{run}' is one word too many" in refused(capsys, "probe", run, run)
    assert "no validation data" in refused(capsys, "probe", run, "--data", pairs)
    assert "has no classes" in refused(capsys, "zeroshot", run, "--val-data", pairs)
    assert "other classes" in refused(capsys, "probe", run, "--val-data", "shapes")
    assert "needs {}" in refused(capsys, "zeroshot", run, "--prompt", "a photo")
    names = tmp_path / "names.txt"
    names.write_text("red\ngreen\nquixotic\nblue")
    assert "--shots: must be 1 or more, not 0" in refused(capsys, "fewshot", run, "--shots", "0")
    flags = "--workers", "0", "--class-names", names
    assert "fewer than 10" in refused(capsys, "fewshot", run, *flags)
    assert "give ten" in refused(capsys, "probe", run, "--limit", "9", "--workers", "0")
    assert "not available here" in refused(capsys, "probe", run, "--device", "meta")
    error = refused(capsys, "probe", run, "--workers", "-1")
    assert "--workers: must be 0 or more, not -1" in error
    assert "has no language model" in refused(capsys, "caption", run, "--workers", "0")
    copy = tmp_path / "copy"
    shutil.copytree(run, copy)
    state = load(copy / "checkpoint.pt")
    state["model"] = {key: value * torch.nan for key, value in state["model"].items()}
    torch.save(state, copy / "checkpoint.pt")
    assert "not finite" in refused(capsys, "zeroshot", copy, "--workers", "0")
    for damaged in ("{", "[]"):
        (copy / "config.json").write_text(damaged)
        assert "config.json is damaged" in refused(capsys, "probe", copy)
    alone = tmp_path / "alone" / "red"
    alone.mkdir(parents=True)
    picture(0).save(alone / "a.png")
    flags = "--val-data", alone.parent, "--workers", "0"
    assert "nothing to tell apart" in refused(capsys, "zeroshot", run, *flags)
