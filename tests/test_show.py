"""The commands of show.py on a small run."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import show
from data import BadSample, load_source
from eval import extract, score_bags, token_bags
from show import search, top_words
from superclass import IDF, SuperClass, build_encoder
from tests.conftest import caption, make_pairs, make_shards, picture
from tokenizer import (
    ClipTokenizer,
    caption_labels,
    load_tokenizer,
    save_tokenizer,
    tokenizer_config,
)

CAPTIONS = [caption(i) for i in range(24)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of three pictures' colours, whose head was solved for rather than trained.

    Returns its folder. Its tokenizer cuts "blue" in two.
    """
    folder = tmp_path_factory.mktemp("show") / "run"
    folder.mkdir()
    tokenizer = load_tokenizer("bpe:300", [text.replace("blue", "blu") for text in CAPTIONS])
    torch.manual_seed(0)
    model = SuperClass(build_encoder("XXS/8", 32), tokenizer.n_vocab).eval()
    idf = IDF(tokenizer.n_vocab)
    labels = [caption_labels(text, tokenizer) for text in CAPTIONS]
    targets = torch.zeros(24, tokenizer.n_vocab)
    for row, ids in zip(targets, labels, strict=True):
        idf.update(torch.tensor([ids]))
        row[ids] = 1.0
    source = load_source(str(make_pairs(folder / "pairs")))
    with torch.no_grad():
        x = model.norm(extract(model, source, 32, workers=0)[0])
    wanted = torch.where(targets > 0, 5.0, -5.0)
    penalty = 0.1 * torch.eye(x.shape[1])
    with torch.no_grad():
        solved = torch.linalg.solve(x.T @ x + penalty, x.T @ (wanted - wanted.mean(dim=0)))
        model.head.weight.copy_(solved.T)
        model.head.bias.copy_(wanted.mean(dim=0) - x.mean(dim=0) @ solved)
    state = {"model": model.state_dict(), "idf": idf.state_dict(), "step": 7}
    torch.save(state, folder / "checkpoint.pt")
    save_tokenizer(tokenizer, folder / "tokenizer.tiktoken")
    config = {"objective": "superclass", "loss": "softmax", "model": "XXS/8", "image_size": 32}
    config |= {"vocab_size": tokenizer.n_vocab, "data": str(folder / "pairs"), "val_data": None}
    config |= {"data_root": "data", "class_names": None, "batch_size": 8, "samples": 16, "seed": 0}
    config |= {"init": None, "lr": 1e-3}
    (folder / "config.json").write_text(json.dumps(config | tokenizer_config(tokenizer)))
    lines = [{"step": s, "samples": 8 * s, "loss": 3 / s, "lr": 1e-3, "images_per_s": 9.0}
             for s in (1, 2)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"step": 2, "task": "zeroshot", "attribute": "class", "top1": 0.5}
    (folder / "eval.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Pictures and caches land in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def ask(capsys, *flags) -> dict:
    show.main([*map(str, flags), "--json"])
    return json.loads(capsys.readouterr().out)


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        show.main([str(flag) for flag in flags])
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()  # a progress bar may come before
    return line


# ------------------------------------------------------------------------------------------------
# Words.


def test_tokens_of_one_word_are_joined(run):
    loaded = show.load(run, "cpu")
    encode, V = loaded.tokenizer.encode_ordinary, loaded.tokenizer.n_vocab
    blue = encode(" blue")
    assert len(blue) == 2
    logits = torch.full((V,), -9.0)
    logits[blue], logits[encode(" red")] = torch.tensor([2.0, 2.3]), 1.5
    words = top_words(loaded, logits, 2)
    assert [word.text for word in words] == ["blue", "red"] and words[0].ids == blue
    p = logits.softmax(dim=0)[blue]
    assert words[0].probability == pytest.approx(p.log().mean().exp().item(), rel=1e-5)
    frequency = (loaded.idf.df / loaded.idf.n)[blue].log().mean().exp().item()
    assert words[0].lift == pytest.approx(words[0].probability / frequency, rel=1e-5)
    logits[blue[0]] = 3.5  # another word may begin like this one
    assert "blue" not in [word.text for word in top_words(loaded, logits, 2)]


def test_pieces_of_clip_words_are_joined_and_marked():
    ranks = {bytes([b]): b for b in range(256)} | {bytes([b, 32]): 256 + b for b in range(256)}
    tokenizer = ClipTokenizer(
        "clip", pat_str="[^ ]+ ", mergeable_ranks=ranks | {b"ca": 512}, special_tokens={}
    )
    pieces = tokenizer.encode_ordinary("cat")
    assert pieces == [512, 256 + ord("t")]
    assert [show.spell([t], tokenizer) for t in pieces] == ["ca-", "t"]
    assert show.is_word(pieces, tokenizer) and not show.is_word(pieces[::-1], tokenizer)
    assert show.spell(pieces, tokenizer) == "cat"


def test_every_token_has_a_name(run):
    tokenizer = show.load(run, "cpu").tokenizer
    blank, inner = tokenizer.encode_ordinary(" \x07")[0], tokenizer.encode_ordinary("q")[-1]
    assert show.spell([blank], tokenizer) == "(blank)" and show.spell([inner], tokenizer) == "-q"


def test_other_scripts_are_written_with_an_installed_font(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")  # it brings a font along
    font = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"

    def drawn(text: str) -> bytes:
        image, draw = show.page(60, "", "")
        show.write(draw, 0, 0, text)
        return image.tobytes()

    for fonts, boxes in (((), True), (("nowhere.ttf", font), False)):
        monkeypatch.setattr(show, "FONTS", fonts)
        show.font_of.cache_clear()
        assert (drawn("\N{LATIN SMALL LETTER U WITH DIAERESIS}") == drawn("\uffff")) == boxes
    show.font_of.cache_clear()


def test_a_run_at_its_start_has_words_too(run):
    loaded = show.load(run, "cpu")
    untrained = loaded._replace(idf=IDF(loaded.tokenizer.n_vocab))
    logits = torch.arange(loaded.tokenizer.n_vocab) / 100
    assert len(top_words(untrained, logits, 5)) == 5


def test_lift_ranks_by_frequency_too(run):
    loaded = show.load(run, "cpu")
    often, seldom = (loaded.tokenizer.encode_ordinary(f" {word}")[0] for word in ("a", "red"))
    logits = torch.full((loaded.tokenizer.n_vocab,), -9.0)
    logits[often], logits[seldom] = 1.0, 0.8
    assert top_words(loaded, logits, 1)[0].text == "a"
    assert top_words(loaded, logits, 1, lift=True)[0].text == "red"


def test_words_of_a_source(run, capsys, tmp_path):
    found = ask(capsys, "words", run, "--number", "3", "--lift", "--maps", "2")
    assert [row["image"] for row in found["images"]] == [caption(i) for i in (0, 8, 16)]
    for row, colour in zip(found["images"], ("red", "blue", "green"), strict=True):
        assert colour in [word["text"] for word in row["words"]]
        for found_map in row["maps"]:
            total = sum(found_map["shares"]) + found_map["constant"]
            assert total == pytest.approx(found_map["logit"], abs=1e-4)
    with Image.open(tmp_path / "words.png") as image:
        assert image.format == "PNG" and image.width == 900


@pytest.mark.parametrize("flags", [[], ["--at", "output"]])
def test_words_of_files_and_folders(run, capsys, tmp_path, flags):
    folder = make_pairs(tmp_path / "some")
    for i in range(6, 24):
        (folder / f"{i:03d}.png").unlink()
    (folder / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    flags = [*flags, "--word", "red picture", "--word", "blue", "--number", "25", "--out", "a.png"]
    show.main(["words", str(run), str(folder), *flags, "--json"])
    out, err = capsys.readouterr()
    assert "skipped 1 x " in err and "torn.jpg" in err
    rows = json.loads(out)["images"]
    assert len(rows) == 6 and rows[0]["image"] == "000.png"
    assert [found["word"] for found in rows[0]["maps"]] == ["red picture", "blue"]
    found = rows[0]["maps"][0]
    assert sum(found["shares"]) + found["constant"] == pytest.approx(found["logit"], abs=1e-4)
    assert (tmp_path / "a.png").exists()


def test_many_words_make_a_taller_row(run, capsys, tmp_path):
    heights = []
    for top in ("6", "40"):
        show.main(["words", str(run), "--number", "1", "--top", top, "--word", "red " * 3000])
        with Image.open(tmp_path / "words.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0] + 100


def test_words_in_every_caption_have_maps(run, capsys):
    loaded = show.load(run, "cpu")
    (a,) = loaded.tokenizer.encode_ordinary(" a")
    assert loaded.idf.weights()[a] == 0
    assert show.word_weights(loaded, "a", [a])[a] == 1
    assert "no token that says anything" in refused(capsys, "words", run, "--word", "a")


# ------------------------------------------------------------------------------------------------
# Search.


@pytest.mark.parametrize("make", [make_pairs, make_shards])
def test_search_finds_and_remembers(run, capsys, tmp_path, monkeypatch, make):
    data = make(tmp_path / "data")
    flags = ["search", run, "red picture", "blue", "--data", data, "--workers", "0"]
    first = ask(capsys, *flags, "--number", "5")
    for answer, colour in zip(first["texts"], ("red", "blue"), strict=True):
        assert all(colour in hit["image"] for hit in answer["images"])
        scores = [hit["score"] for hit in answer["images"]]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    with monkeypatch.context() as patch:
        patch.setattr(show, "make_index", None)  # a second query needs none
        assert ask(capsys, *flags, "--number", "5")["texts"] == first["texts"]
    (cache,) = (tmp_path / "cache" / "superclass").iterdir()
    cache.write_bytes(cache.read_bytes()[:99])  # made anew
    assert ask(capsys, *flags, "--number", "5")["texts"] == first["texts"]
    monkeypatch.setattr(show, "make_index", None)
    file = sorted(path for path in data.iterdir() if path.suffix != ".txt")[0]
    file.write_bytes(file.read_bytes() + b"\0")  # the source has changed
    with pytest.raises(TypeError):
        ask(capsys, *flags)


def test_search_notices_that_rows_have_moved(run, capsys, tmp_path):
    folder, rows = make_pairs(tmp_path / "data"), ["filepath,caption"]
    rows += [f"{i:03d}.png,{caption(i)}" for i in range(24)]
    flags = ["search", run, "red picture", "--data", folder / "t.csv", "--workers", "0"]
    answers = []
    for table in ([rows[0], ",x", *rows[1:]], [*rows, ",x"]):
        (folder / "t.csv").write_text("\n".join(table))
        answers.append(ask(capsys, *flags)["texts"])
    assert answers[0] == answers[1] and len(answers[0][0]["images"]) == 6


def test_search_scores_as_zeroshot_does(run):
    loaded, source = show.load(run, "cpu"), load_source(str(run / "pairs"))
    index = show.make_index(loaded, source, 7, 0)
    texts = ["red picture", "blue"]
    bags = token_bags(loaded.idf, [caption_labels(text, loaded.tokenizer) for text in texts])
    features, _ = extract(loaded.model, source, 32, workers=0)
    expected = score_bags(loaded.model, loaded.idf, features, bags, prior=False)
    found = search(loaded, index, texts).T
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)  # inputs in half precision
    assert index["places"][:, 0].tolist() == list(range(24))


def test_search_with_workers_and_bad_samples(run, capsys, tmp_path):
    data = make_pairs(tmp_path / "data")
    (data / "000.png").write_bytes(b"")
    flags = ["search", run, "red", "--data", data, "--workers", "2", "--batch-size", "4"]
    show.main([str(flag) for flag in [*flags, "--number", "99"]])
    assert "skipped 1 x empty image file" in capsys.readouterr().err
    for path in data.glob("*.png"):
        path.write_bytes(b"no image")
    assert "more than a tenth" in refused(capsys, *flags)


# ------------------------------------------------------------------------------------------------
# Curves and data.


def test_curves_of_two_runs(run, tmp_path):
    pytest.importorskip("matplotlib")
    show.main(["curves", str(run), str(run), "--out", "c.png"])
    with Image.open(tmp_path / "c.png") as image:
        assert image.size[0] == 900


@pytest.mark.parametrize("command", ["curves", "scaling"])
def test_curves_need_matplotlib(run, capsys, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    assert "pip install matplotlib" in refused(capsys, command, run)


def test_scaling_draws_means_over_seeds(run, capsys, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    folders, scores = [], {("superclass", 16): (0.5, 0.7), ("superclass", 32): (0.8, 0.8)}
    scores |= {("clip", 16): (0.3, 0.4), ("clip", 32): (0.6, 0.5)}
    for (objective, samples), values in scores.items():
        for seed, score in enumerate(values):
            folder = tmp_path / f"{objective}-{samples}-{seed}"
            folder.mkdir()
            config = json.loads((run / "config.json").read_text())
            config |= {"objective": objective, "samples": samples, "seed": seed}
            (folder / "config.json").write_text(json.dumps(config))
            step = samples // 8
            line = {"step": step, "samples": samples, "images_per_s": 9.0, "step_s": 1.0}
            (folder / "metrics.jsonl").write_text(json.dumps(line | {"peak_mb": None}) + "\n")
            row = {"step": step, "task": "zeroshot", "attribute": "class", "top1": score}
            (folder / "eval.jsonl").write_text(json.dumps(row) + "\n")
            folders.append(str(folder))
    show.main(["scaling", *folders, "--out", "s.png"])
    with Image.open(tmp_path / "s.png") as image:
        assert image.size[0] == 900
    (axis,) = pyplot.gcf().axes
    drawn = {c.get_label(): c.lines[0].get_xydata().tolist() for c in axis.containers}
    assert drawn == {
        "superclass XXS/8": [[16, pytest.approx(0.6)], [32, 0.8]],
        "clip XXS/8": [[16, pytest.approx(0.35)], [32, pytest.approx(0.55)]],
    }
    (tmp_path / "clip-16-1" / "eval.jsonl").write_text("")
    assert "has no score" in refused(capsys, "scaling", *folders)
    folders.remove(str(tmp_path / "clip-16-1"))
    (tmp_path / "clip-32-0" / "config.json").write_text(json.dumps(config))
    assert "a seed occurs twice" in refused(capsys, "scaling", *folders)
    config |= {"seed": 7, "lr": 9.0}
    (tmp_path / "clip-32-0" / "config.json").write_text(json.dumps(config))
    assert "they differ in lr" in refused(capsys, "scaling", *folders)


def test_data_of_a_folder(capsys, tmp_path):
    data = make_pairs(tmp_path / "data")
    (data / "000.txt").write_text(" ")
    (data / "001.txt").write_text("long " * 100)
    found = ask(capsys, "data", data, "--tokenizer", "bpe:300", "--flip", "--top", "8")
    assert found["examined"] == 24 and found["skipped"] == {"empty caption": 1}
    assert (
        found["cut to 77 tokens"] == 1 and found["quantiles"]["words of a caption"]["most"] == 100
    )
    assert found["quantiles"]["shorter side, pixels"]["median"] == 40
    picture_token = next(row for row in found["tokens"] if row["token"] == "picture")
    assert picture_token["share"] == pytest.approx(22 / 23)
    assert picture_token["idf"] == pytest.approx(np.log(24 / 23), rel=1e-4)
    assert (tmp_path / "data.png").exists()


def test_data_of_shards(capsys, tmp_path):
    data = make_shards(tmp_path / "d")
    found = ask(
        capsys, "data", data, "--limit", "20", "--tokenizer", "words:5", "--image-size", "8"
    )
    assert found["examined"] == 20 and not found["skipped"] and len(found["tokens"]) == 5


# ------------------------------------------------------------------------------------------------
# Mistakes.


def test_mistakes_get_a_sentence(run, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    picture(0).save(tmp_path / "good.png")
    assert "holds no run" in refused(capsys, "words", tmp_path)
    assert "no image found" in refused(capsys, "words", run, tmp_path / "nowhere.png")
    assert "holds no image" in refused(capsys, "words", run, tmp_path / "empty")
    assert "torn.png" in refused(capsys, "words", run, tmp_path / "torn.png")
    unknown = refused(capsys, "words", run, tmp_path / "good.png", "--word", "ZX")
    assert "'ZX' has no token" in unknown
    assert "'ZX' has no token" in refused(capsys, "search", run, "red", "ZX")
    assert "no source 'nothing'" in refused(capsys, "search", run, "red", "--data", "nothing")
    assert "no source 'nothing'" in refused(capsys, "data", "nothing")
    for out in ("run.csv", tmp_path / "good.png"):
        assert "--out" in refused(capsys, "words", run, tmp_path / "good.png", "--out", out)
    both = refused(capsys, "words", run, tmp_path / "good.png", "--data", "shapes")
    assert "not both" in both
    with pytest.raises(SystemExit):
        show.main(["data", "shapes", "--min-scale", "2"])
    assert "invalid share value: '2'" in capsys.readouterr().err
    out = tmp_path / "no" / "folder.png"
    assert "cannot be written" in refused(capsys, "words", run, "--out", out)
    assert "cannot be written" in refused(capsys, "curves", run, "--out", out)
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "config.json").write_text((run / "config.json").read_text())
    assert "no line" in refused(capsys, "curves", tmp_path / "blank")


@pytest.mark.parametrize("objective", ["clip", "lit", "supervised"])
@pytest.mark.parametrize("command", [["words"], ["search", "red"]])
def test_runs_without_a_head_over_words_are_refused(run, capsys, tmp_path, objective, command):
    config = json.loads((run / "config.json").read_text()) | {"objective": objective}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name, *text = command
    assert f"objective is {objective}" in refused(capsys, name, tmp_path, *text)


def test_bad_samples_of_a_source_are_told(capsys):
    source = load_source("shapes", "val")

    def make(raw):
        return BadSample("damaged image", "here")

    with pytest.raises(show.UserError, match="of 3 files or samples none can be used: 3 x damaged"):
        show.gather(source, 3, make)
