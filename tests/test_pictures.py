"""Words, search, curves and data on a small run, and the two splits of a logit."""

import argparse
import json
import re
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data as module
import eval as evaluation
from data import caption_labels, load_source, load_tokenizer, save_tokenizer
from eval import (
    Run,
    build_model,
    extract,
    fingerprint,
    load_run,
    open_objective,
    read_config,
    score_bags,
    token_bags,
)
from plugins import UserError, find, pictures
from plugins.clip_bpe import ClipTokenizer
from plugins.pictures import Held, input_shares, output_shares, search, top_words
from superclass import IDF, SuperClass, ViT, build_encoder
from tests.conftest import caption, make_pairs, make_shards, picture

CAPTIONS = [caption(i) for i in range(24)]


def save_run(folder, **changes):
    """A run of three pictures' colours; its head is solved for rather than trained.

    Its tokenizer cuts "blue" in two. `changes` are entries of config.json.
    """
    folder.mkdir()
    tokenizer = load_tokenizer("bpe:300", [text.replace("blue", "blu") for text in CAPTIONS])
    config = {"objective": "superclass", "loss": "softmax", "model": "XXS/8", "image_size": 32}
    config |= {"vocab_size": tokenizer.n_vocab, "data": str(folder / "pairs"), "val_data": None}
    config |= {"data_root": "data", "class_names": None, "batch_size": 8, "samples": 16, "seed": 0}
    config |= {"init": None, "lr": 1e-3, "lm_shape": None, "grad_checkpointing": False}
    content, settings = save_tokenizer(tokenizer)
    config |= settings | changes
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.tiktoken").write_bytes(content)
    config = read_config(folder)
    torch.manual_seed(0)
    objective = open_objective(config)
    model, idf = build_model(objective, config).eval(), IDF(tokenizer.n_vocab)
    labels = [caption_labels(text, tokenizer) for text in CAPTIONS]
    targets = torch.zeros(24, tokenizer.n_vocab)
    for row, ids in zip(targets, labels, strict=True):
        idf.update(torch.tensor([ids]))
        row[ids] = 1.0
    source = load_source(str(make_pairs(folder / "pairs")))
    if objective.has_words:
        with torch.no_grad():
            run = Run(folder, config, objective, tokenizer, model, idf, 0)
            x = model.norm(extract(run, source, workers=0)[0])
            wanted = torch.where(targets > 0, 5.0, -5.0)
            penalty = 0.1 * torch.eye(x.shape[1])
            solved = torch.linalg.solve(x.T @ x + penalty, x.T @ (wanted - wanted.mean(dim=0)))
            model.head.weight.copy_(solved.T)
            model.head.bias.copy_(wanted.mean(dim=0) - x.mean(dim=0) @ solved)
    state = {"model": model.state_dict(), "idf": idf.state_dict(), "optimizer": {}}
    state |= {"progress": {"step": 7}, "fingerprint": fingerprint(config)}
    torch.save(state, folder / "checkpoint.pt")
    lines = [
        {"step": s, "samples": 8 * s, "loss": 3 / s, "lr": 1e-3, "images_per_s": 9.0}
        for s in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"step": 2, "task": "zeroshot", "attribute": "class", "top1": 0.5}
    (folder / "eval.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, device):
    """A run that the commands find on the CPU, and take to --device."""
    return save_run(tmp_path_factory.mktemp("pictures") / "run")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Pictures land in a folder of the test's own."""
    monkeypatch.chdir(tmp_path)


SHOW = {"words": pictures.show_words, "search": pictures.show_search}
SHOW |= {"curves": pictures.show_curves, "data": pictures.show_data}


def ask(name, *flags):
    """What the function of a command returns."""
    return SHOW[name](list(map(str, flags)))


def command(name, *flags):
    """python eval.py words|search|curves, or python data.py."""
    flags = list(map(str, flags))
    module.main(flags) if name == "data" else evaluation.main([name, *flags])


def refused(capsys, *flags) -> str:
    with pytest.raises(SystemExit) as stop:
        command(*flags)
    assert stop.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()  # a progress bar may come before
    return line


# ------------------------------------------------------------------------------------------------
# Words.


def test_pieces_stand_as_pieces(run):
    loaded = load_run(run)
    encode, V = loaded.tokenizer.encode_ordinary, loaded.tokenizer.n_vocab
    blue = encode(" blue")
    assert len(blue) == 2
    logits = torch.full((V,), -9.0)
    logits[blue], logits[encode(" red")] = torch.tensor([2.0, 2.3]), 1.5
    words = top_words(loaded, logits, 3)
    assert [word.text for word in words] == ["-e", "blu", "red"]
    p = logits.softmax(dim=0)[words[0].id].item()
    assert words[0].probability == pytest.approx(p, rel=1e-5)
    frequency = (loaded.idf.df / loaded.idf.n)[words[0].id].item()
    assert words[0].lift == pytest.approx(p / frequency, rel=1e-5)


def test_every_token_has_a_name(run):
    tokenizer = load_run(run).tokenizer
    blank, inner = tokenizer.encode_ordinary(" \x07")[0], tokenizer.encode_ordinary("q")[-1]
    assert [pictures.spell(token, tokenizer) for token in (blank, inner)] == ["(blank)", "-q"]
    ranks = {bytes([b]): b for b in range(256)} | {bytes([b, 32]): 256 + b for b in range(256)}
    clip = ClipTokenizer(
        "clip", pat_str="[^ ]+ ", mergeable_ranks=ranks | {b"ca": 512}, special_tokens={}
    )
    assert [pictures.spell(token, clip) for token in clip.encode_ordinary("cat")] == ["ca-", "t"]
    words = load_tokenizer("words:3", CAPTIONS)
    assert pictures.spell(words.encode_ordinary("picture")[0], words) == "picture"


def test_pieces_of_hugging_face_tokenizers_are_marked(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, "a": 1, "red": 2, "##dish": 3}
    model = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    model.decoder = tokenizers.decoders.WordPiece()
    model.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert [pictures.spell(i, tokenizer) for i in (2, 3)] == ["red", "-dish"]


def test_a_run_at_its_start_has_words_too(run):
    loaded = load_run(run)
    untrained = loaded._replace(idf=IDF(loaded.tokenizer.n_vocab))
    logits = torch.arange(loaded.tokenizer.n_vocab) / 100
    assert len(top_words(untrained, logits, 5)) == 5


def test_lift_ranks_by_frequency_too(run):
    loaded = load_run(run)
    often, seldom = (loaded.tokenizer.encode_ordinary(f" {word}")[0] for word in ("a", "red"))
    logits = torch.full((loaded.tokenizer.n_vocab,), -9.0)
    logits[often], logits[seldom] = 1.0, 0.8
    assert top_words(loaded, logits, 1)[0].text == "a"
    lifted = top_words(loaded, logits, 5, lift=True)  # the others are too improbable
    assert [word.text for word in lifted] == ["red", "a"]


@pytest.mark.parametrize("lift", [[], ["--lift"]])
def test_words_of_a_source(run, capsys, tmp_path, lift):
    found = ask("words", run, "--number", "3", *lift)
    assert [name for name, _ in found] == [caption(i) for i in (0, 8, 16)]
    printed = capsys.readouterr().out.splitlines()
    for (name, cells), line, word in zip(found, printed, ("red", "blu", "green"), strict=True):
        assert line.startswith(f"{name}: ") and f" {word} " in line
        assert ("x," in line) == bool(lift) and ("%" in line) != bool(lift)
        words = [entry.split()[0] for entry in line.removeprefix(f"{name}: ").split(", ")]
        assert [text.split()[1] for _, texts in cells for text, _ in texts] == words[:3]
    with Image.open(tmp_path / "words.png") as image:
        assert image.format == "PNG" and image.width == 900


@pytest.mark.parametrize("flags", [[], ["--at", "output"]])
def test_words_of_files(run, capsys, tmp_path, flags):
    (tmp_path / "torn.jpg").write_bytes(b"\xff\xd8\xff\xe0torn")
    files = [tmp_path / f"$a_{i}$.png" for i in range(3)]
    for i, file in enumerate(files):
        picture(i).save(file)
    asked = ["red picture", "blue", "green", "number 5 " * 400]
    flags = [*flags, "--out", "a.png", *(flag for text in asked for flag in ("--word", text))]
    rows = ask("words", run, *files, tmp_path / "torn.jpg", *flags)
    assert [name for name, _ in rows] == [file.name for file in files]
    err = capsys.readouterr().err
    assert "skipped 1 x unreadable image" in err and "torn.jpg" in err
    for _, cells in rows:
        assert [text.split("  ")[1] for _, texts in cells for text, _ in texts] == asked
    heights = []
    for more in ([], ["--word", "red"] * 4):
        command("words", run, files[0], *more)
        with Image.open(tmp_path / "words.png") as image:
            heights.append(image.height)
    assert heights[1] > heights[0] + 100  # a fourth map starts another row


def test_figures_stay_beside_their_bars(run):
    loaded = load_run(run)
    V = loaded.tokenizer.n_vocab
    words = top_words(loaded._replace(idf=IDF(V)), torch.arange(V) / 10, 6)
    page = pictures.Figure((9, 3), dpi=100)
    axes = page.add_axes((0.2, 0.1, 167 / 900, 167 / 300), xlim=(0, 1), ylim=(1, 0))
    axes.set_axis_off()
    pictures.draw_bars([word._replace(lift=12176.5) for word in words], True, axes)
    page.canvas.draw()
    box = axes.get_window_extent()
    assert all(text.get_window_extent().x1 <= box.x1 for text in axes.texts)


def test_maps_are_coloured_where_the_shares_are():
    picture = np.full((8, 8, 3), 128, dtype=np.uint8)
    colours = pictures.draw_map(picture, np.array([1.0, 0, -0.5, 0]))
    assert colours[0, 0, 0] > colours[0, 0, 2] and colours[7, 0, 0] < colours[7, 0, 2]
    assert (colours[4] == 1).all() and (colours[:, 4] == 1).all()  # lines between patches
    assert np.ptp(np.delete(colours, 4, axis=0)[:, 5:]) == 0


def test_texts_of_a_cell_do_not_reach_the_next(monkeypatch, tmp_path):
    pages = []
    monkeypatch.setattr(pictures.Figure, "savefig", lambda page, out: pages.append(page))
    square = np.zeros((8, 8, 3))
    pictures.sheet("t", "a", [("", [(square, [("W" * 99, "k")]), (square, [])])], 6, tmp_path / "a")
    axes = pages[0].axes[0]
    (text,) = axes.texts
    assert text.get_clip_on() and text.get_window_extent().x1 > axes.bbox.x1
    assert text.clipbox.x1 == pytest.approx(axes.bbox.x1)


def test_a_sigmoid_head_has_probabilities_of_its_own(run):
    loaded = load_run(run)
    loaded.config.loss = "bce"
    logits = torch.linspace(-2, 2, loaded.tokenizer.n_vocab)
    untrained = loaded._replace(objective=open_objective(loaded.config), idf=IDF(len(logits)))
    (word,) = top_words(untrained, logits, 1)
    assert word.probability == pytest.approx(logits.sigmoid().max().item())


# ------------------------------------------------------------------------------------------------
# Search.


@pytest.mark.parametrize("make", [make_pairs, make_shards])
def test_search_finds(run, capsys, tmp_path, make):
    data = make(tmp_path / "data")
    found = ask("search", run, "red picture", "blue", "--data", data, "--number", "5")
    printed = capsys.readouterr().out
    for (text, cells), colour in zip(found, ("red", "blue"), strict=True):
        hits = [hit for _, [(hit, _)] in cells]
        lines = printed.split(f"{text[1:-1]}:\n")[1].splitlines()
        for hit, line in zip(hits, lines, strict=False):
            score, name = hit.split("  ")
            place = r"\S+/\d{3}\.png" if make is make_pairs else r"\S+/\d{5}\.tar #\d"
            assert re.fullmatch(rf"  {score}  \d\.\d\d  {place}  {name}", line)
        assert all(colour in hit for hit in hits)
        scores = [float(hit.split("%")[0]) for hit in hits]
        assert len(scores) == 5 and scores == sorted(scores, reverse=True)
    assert (tmp_path / "search.png").exists()


def test_search_says_when_nothing_matches(run, capsys, tmp_path):
    (tmp_path / "reds").mkdir()
    for i in range(0, 12, 3):
        picture(i).save(tmp_path / "reds" / f"{i}.png")
    ask("search", run, "green", "red", "--data", tmp_path / "reds")
    green, red = capsys.readouterr().out.split("red:")
    assert "nothing matches: the best of 4 has 0.0" in green and "matches" not in red.replace(
        str(tmp_path), ""
    )


def test_a_match_is_measured_against_the_words_share_of_a_caption(run):
    loaded = load_run(run)
    w, text = loaded.idf.weights(), " red"
    (token,) = caption_labels(text, loaded.tokenizer)
    sums = [w[caption_labels(text, loaded.tokenizer)].sum() for text in CAPTIONS]
    expected = (w[token] / torch.stack(sums).mean()).log()
    torch.testing.assert_close(pictures.if_shown(loaded, [text])[0], expected)
    bce = open_objective(argparse.Namespace(objective="superclass", loss="bce"))
    assert pictures.if_shown(loaded._replace(objective=bce), [text]).item() == 0


def test_search_scores_as_zeroshot_does(run):
    loaded, source = load_run(run), load_source(str(run / "pairs"))
    texts = ["red picture", "blue"]
    bags = token_bags(loaded.idf, [caption_labels(text, loaded.tokenizer) for text in texts])
    expected = score_bags(loaded, extract(loaded, source, workers=0)[0], bags)
    found, places = search(loaded, source, texts)
    torch.testing.assert_close(found, expected)
    assert places == list(range(24))


def test_search_with_bad_samples(run, capsys, tmp_path):
    data = make_pairs(tmp_path / "data")
    (data / "000.png").write_bytes(b"")
    flags = ["search", run, "red", "--data", data]
    ((_, cells),) = ask(*flags, "--number", "99")
    assert len(cells) == 23
    assert "skipped 1 x unreadable image" in capsys.readouterr().err
    for i in range(2, 24):
        (data / f"{i:03d}.png").write_bytes(b"no image")
    assert "more than a tenth" in refused(capsys, *flags)


def test_an_image_that_vanishes_during_a_search_is_skipped(run, capsys, tmp_path, monkeypatch):
    data, found = make_pairs(tmp_path / "data"), search

    def search_and_delete(*args):
        result = found(*args)
        (data / "000.png").unlink()
        return result

    monkeypatch.setattr(pictures, "search", search_and_delete)
    ((_, cells),) = ask("search", run, "red", "--data", data, "--number", "24")
    assert len(cells) == 23
    assert "skipped 1 x missing image" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------------
# Other objectives.


def test_superclip_has_words_and_is_searched(capsys, tmp_path, device):
    folder = save_run(tmp_path / "run", objective="superclip")
    ask("words", folder, "--number", "1")
    assert ": red " in (line := capsys.readouterr().out) or ", red " in line
    ((_, cells),) = ask("search", folder, "red picture")
    assert all("red" in hit for _, [(hit, _)] in cells)


def test_words_of_a_language_model_are_captions(capsys, tmp_path, device):
    folder = save_run(tmp_path / "run", objective="caption")
    ((_, cells),) = ask("words", folder, "--number", "3")
    printed = capsys.readouterr().out
    for (_, [(text, _), (name, _)]), i in zip(cells, (0, 8, 16), strict=True):
        assert name == caption(i) and f"{name}: {text}" in printed
    assert (tmp_path / "words.png").exists()
    line = json.dumps({"filepath": "000.png", "caption": "red", "question": "what colour?"})
    (folder / "pairs" / "t.jsonl").write_text(line)
    ((_, [(_, texts)]),) = ask("words", folder, "--data", folder / "pairs" / "t.jsonl")
    assert texts[1][0] == "what colour? red"
    assert "a head over the vocabulary" in refused(capsys, "words", folder, "--lift")


@pytest.mark.parametrize("objective", ["clip", "lit", "supervised"])
@pytest.mark.parametrize("command", [["words"], ["search", "red"]])
def test_runs_without_a_head_over_words_are_refused(capsys, tmp_path, objective, command):
    folder = save_run(tmp_path / "run", objective=objective, classes={"class": [["a"], ["b"]]})
    name, *text = command
    assert f"objective is {objective}" in refused(capsys, name, folder, *text)


# ------------------------------------------------------------------------------------------------
# Curves and data.


def test_curves_of_runs(run, tmp_path, capsys):
    (tmp_path / "b").mkdir()
    for name in ("config.json", "metrics.jsonl"):
        (tmp_path / "b" / name).write_text((run / name).read_text())
    held_out = {"step": 2, "samples": 16, "val_loss": 2.5}
    with open(tmp_path / "b" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(held_out) + "\n")
    rows = [{"step": 2, "task": "caption", "images": 3, "cider": 4.5, "exact": 0.25}]
    rows.append({"step": 2, "task": "zeroshot", "top1": 0.9, "flags": {"data": "other"}})
    (tmp_path / "b" / "eval.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    panels = ask("curves", run, tmp_path / "b")
    assert [*panels["loss"]] == [str(run), str(tmp_path / "b"), f"{tmp_path / 'b'}, held out"]
    assert panels["loss"][f"{tmp_path / 'b'}, held out"] == [(16, 2.5)]
    assert panels["loss"][str(run)] == [(8, 3), (16, 1.5)]
    assert panels["zeroshot class"] == {str(run): [(16, 0.5)]}
    assert panels["caption cider"] == {str(tmp_path / "b"): [(16, 4.5)]}
    assert "zeroshot class 0.5 after 16 images" in capsys.readouterr().out
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width == 900


def test_data_of_a_folder(capsys, tmp_path):
    data = make_pairs(tmp_path / "data")
    (data / "000.txt").write_text(" ")
    (data / "001.txt").write_text("long " * 100)
    found = ask("data", data, "--tokenizer", "bpe:300", "--flip")
    assert found["account"] == [
        ["account", "samples"],
        ("looked at, of 24 pairs", 24),
        ("used", 23),
        ("bad: unusable caption", 1),
        ("used, caption cut to 77 tokens", 1),
    ]
    quantiles = {name: row for name, *row in found["quantiles"]}
    assert quantiles["words of a caption"][-1] == 100
    assert quantiles["shorter side, pixels"][2] == 40
    assert ["picture", f"{22 / 23:.1%}", f"{np.log(24 / 23):.2f}"] in found["tokens"]
    assert "unusable caption" in capsys.readouterr().out
    assert (tmp_path / "data.png").exists()


def test_data_of_shards(capsys, tmp_path):
    data = make_shards(tmp_path / "d")
    found = ask("data", data, "--number", "1", "--tokenizer", "words:5", "--image-size", "8")
    assert found["account"][1:3] == [("looked at, of 6 shards", 60), ("used", 60)]
    assert len(found["account"]) == 4
    assert len(found["tokens"]) == 1 + 5


# ------------------------------------------------------------------------------------------------
# Mistakes.


def test_mistakes_get_a_sentence(run, capsys, tmp_path):
    (tmp_path / "torn.png").write_bytes(b"\x89PNG torn")
    picture(0).save(tmp_path / "good.png")
    assert "holds no run" in refused(capsys, "words", tmp_path)
    assert "nowhere.png No such file" in refused(capsys, "words", run, tmp_path / "nowhere.png")
    torn = refused(capsys, "words", run, tmp_path / "torn.png")
    assert "not one of 1 samples can be used: 1 x unreadable image" in torn and "torn.png" in torn
    unknown = refused(capsys, "words", run, tmp_path / "good.png", "--word", "ZX")
    assert "'ZX' has no token" in unknown
    assert "'a' has no token" in refused(capsys, "words", run, "--word", "a")  # it is in all
    assert "'ZX' has no token" in refused(capsys, "search", run, "red", "ZX")
    assert "no source 'nothing'" in refused(capsys, "search", run, "red", "--data", "nothing")
    assert "no source 'nothing'" in refused(capsys, "data", "nothing")
    for out in ("run.csv", tmp_path / "good.png"):
        assert "--out" in refused(capsys, "words", run, tmp_path / "good.png", "--out", out)
    both = refused(capsys, "words", run, tmp_path / "good.png", "--data", "shapes")
    assert "not both" in both
    with pytest.raises(SystemExit):
        command("data", "shapes", "--min-scale", "2")
    assert "must be from 0 to 1, not 2" in capsys.readouterr().err
    (tmp_path / "mute").mkdir()
    for i in range(12):
        picture(i).save(tmp_path / "mute" / f"{i}.png")
    mute = refused(capsys, "data", tmp_path / "mute")
    assert "not one of 12 samples can be used: 12 x missing caption (missing caption: " in mute
    assert mute.endswith(".png has no .txt beside it)")
    tarfile.open(tmp_path / "none.tar", "w").close()
    assert refused(capsys, "data", tmp_path / "none.tar").endswith("there is no sample")
    out = tmp_path / "no" / "folder.png"
    assert "no/folder.png" in refused(capsys, "words", run, "--number", "1", "--out", out)
    assert "no/folder.png" in refused(capsys, "curves", run, "--out", out)
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "config.json").write_text((run / "config.json").read_text())
    assert "nothing to draw" in refused(capsys, "curves", tmp_path / "blank")


def test_the_flags_stay_few(monkeypatch):
    parsers = []

    def stop(parser, argv):
        parsers.append(parser)
        raise UserError("no further")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    for name in SHOW:
        with pytest.raises(UserError, match="no further"):
            ask(name)
    options = [name for p in parsers for action in p._actions for name in action.option_strings]
    flags = [name for name in options if name[:2] == "--" and name != "--help"]
    assert len(parsers) == len(SHOW) and 20 < len(flags) <= 24


# ------------------------------------------------------------------------------------------------
# The two splits of a logit: against the formula in float64, against each other, and their sums.


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose norms, biases and statistics are as far from their start as training's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def small_model() -> SuperClass:
    torch.manual_seed(0)
    return shaken(SuperClass(ViT(16, 4, 32, 2, 4), 50))


def test_shares_of_the_output_sum_to_the_logit(on_device):
    model, images = small_model(), torch.randn(3, 3, 16, 16)
    weights = torch.zeros(50)
    weights[[3, 8]] = torch.tensor([0.3, 0.7])
    with torch.no_grad():
        shares, constant = output_shares(model, images, weights)
        logits = model(images)
    assert shares.shape == (3, 16) and constant.shape == (3,)
    torch.testing.assert_close(shares.sum(dim=1) + constant, logits @ weights, rtol=0, atol=1e-4)


def test_shares_of_the_output_are_those_of_each_patch():
    """By hand, in float64, from before the encoder's last norm: through both norms."""
    model, images, c = small_model().double(), torch.randn(2, 3, 16, 16).double(), 5
    before = []
    model.encoder.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        p = model.features(images).numpy()
    x, encoder_norm, norm = before[0].numpy(), model.encoder.norm, model.norm
    g1, b1, g2 = (t.detach().numpy() for t in (encoder_norm.weight, encoder_norm.bias, norm.weight))
    w = model.head.weight[c].detach().numpy()
    expected = np.zeros((2, 16))
    for i in range(2):
        deviation = np.sqrt(p[i].var() + norm.eps)
        for n in range(16):
            own = (x[i, n] - x[i, n].mean()) / np.sqrt(x[i, n].var() + encoder_norm.eps)
            z = g1 * own + b1
            expected[i, n] = sum(w * g2 * (z - z.mean())) / deviation / 16
    weights = torch.nn.functional.one_hot(torch.tensor(c), 50).float()
    shares, _ = output_shares(model.float(), images.float(), weights)
    np.testing.assert_allclose(shares.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["XXS/8", "resnet50", "convnext_tiny"])
@pytest.mark.parametrize("split", [output_shares, input_shares])
def test_shares_of_all_encoders_sum_to_the_logit(on_device, name, split):
    encoder = build_encoder(name, 64) if "/" in name else find("model", name)(64)
    model = shaken(SuperClass(encoder, 20))
    images, weights = torch.randn(2, 3, 64, 64), torch.rand(2, 20)
    shares, constant = split(model, images, weights)
    assert shares.shape == (2, 64 if name == "XXS/8" else 4)
    with torch.no_grad():
        logits = model(images)
    expected = (logits * weights).sum(dim=1)
    torch.testing.assert_close(shares.sum(dim=1) + constant, expected, rtol=1e-4, atol=1e-4)


class Timm(torch.nn.Module):
    """A ViT of timm's with all that ours lacks, without its class token."""

    def __init__(self, fused: bool):
        super().__init__()
        options = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4}
        vit = pytest.importorskip("timm").models.VisionTransformer
        self.net = vit(**options, init_values=0.5, qk_norm=True, num_classes=0)
        for block in self.net.blocks:
            block.attn.fused_attn = fused
        self.width = 32

    def forward(self, images):
        return self.net.forward_features(images)[:, self.net.num_prefix_tokens :]


@pytest.mark.parametrize("encoder", ["ours", "timm", "timm, not fused"])
def test_shares_of_the_input_leave_nothing_out(on_device, encoder):
    """Without biases and positions, no constant is left: all of a logit comes from the pixels."""
    model = small_model()
    if encoder != "ours":
        model = shaken(SuperClass(Timm(encoder == "timm"), 50))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "pos_embed", "cls_token")):
                p.zero_()
    images = torch.randn(3, 3, 16, 16)
    shares, constant = input_shares(model, images, torch.eye(50)[7])
    torch.testing.assert_close(constant, torch.zeros(3), rtol=0, atol=1e-4)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(shares.sum(dim=1), logits[:, 7], rtol=0, atol=1e-4)
    assert logits[:, 7].abs().min() > 0.01


def test_words_without_places_have_no_maps(run, capsys, monkeypatch):
    forward = ViT.forward
    monkeypatch.setattr(ViT, "forward", lambda self, images: forward(self, images)[:, :5])
    pictures.data.say_once.cache_clear()
    rows = ask("words", run, "--number", "2")
    out, err = capsys.readouterr()
    assert len(rows) == len(out.splitlines()) == 2
    assert err.count("no maps: the encoder has 5 tokens, which are no square of patches") == 1


def test_holding_changes_no_value_and_mends_every_gradient(on_device):
    """The map that is held is linear: its gradient is that of a difference, however large."""
    model, images = small_model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        with Held():
            torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)
    x = torch.linspace(-4, 4, 9, requires_grad=True)
    with Held():
        y = torch.nn.functional.gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((gradient * x).detach(), y.detach())
    q, k, v = (torch.randn(1, 2, 5, 3, requires_grad=True) for _ in range(3))
    with Held():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not out.grad_fn.next_functions[0][0] or torch.autograd.grad(
        out.sum(), [q, k], allow_unused=True
    ) == (None, None)


def test_a_patch_that_does_not_reach_others_has_the_same_share_at_both_ends(on_device):
    """Without attention and positions, output and input differ in the constants only."""
    model = small_model()
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
        for name, p in model.named_parameters():
            if ".attn.proj" in name or name.endswith("bias"):
                p.zero_()
    images, weights = torch.randn(2, 3, 16, 16), torch.rand(50)
    at_input, _ = input_shares(model, images, weights)
    at_output, _ = output_shares(model, images, weights)
    torch.testing.assert_close(at_input, at_output, rtol=1e-4, atol=1e-5)
