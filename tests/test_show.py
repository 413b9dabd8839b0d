"""The splits of a logit against formulas and each other; the commands on a small run."""

import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import show
from data import BadSample, load_source
from eval import extract, score_bags, token_bags
from show import input_shares, search, top_words, word_shares
from superclass import IDF, SuperClass, ViT, build_encoder
from tests.conftest import caption, make_pairs, make_shards, picture
from tokenizer import (
    ClipTokenizer,
    caption_labels,
    load_tokenizer,
    save_tokenizer,
    tokenizer_config,
)

CAPTIONS = [caption(i) for i in range(24)]


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
# Shares.


@pytest.mark.parametrize("bf16", [False, True])
def test_shares_of_the_output_sum_to_the_logit(bf16):
    model, images = small_model(), torch.randn(3, 3, 16, 16)
    weights = torch.zeros(50)
    weights[[3, 8]] = torch.tensor([0.3, 0.7])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        shares, constant = word_shares(model, images, weights)
        tokens, rounded = model.encoder(images), model(images).float()
    assert shares.shape == (3, 16) and constant.shape == (3,) and shares.dtype == torch.float32
    with torch.no_grad():
        logits = model.head(model.norm(tokens.float().mean(dim=1)))  # from the same tokens
    total = shares.sum(dim=1) + constant
    torch.testing.assert_close(total, logits @ weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(total, rounded @ weights, rtol=0, atol=0.05 if bf16 else 1e-4)


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
    shares, _ = word_shares(model.float(), images.float(), weights)
    np.testing.assert_allclose(shares.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["XXS/8", "resnet50", "convnext_tiny"])
@pytest.mark.parametrize("split", [word_shares, input_shares])
def test_shares_of_all_encoders_sum_to_the_logit(name, split):
    model = shaken(SuperClass(build_encoder(name, 64), 20))
    images, weights = torch.randn(2, 3, 64, 64), torch.rand(2, 20)
    shares, constant = split(model, images, weights)
    assert shares.shape == (2, 64 if name == "XXS/8" else 4)
    with torch.no_grad():
        logits = model(images)
    expected = (logits * weights).sum(dim=1)
    torch.testing.assert_close(shares.sum(dim=1) + constant, expected, rtol=1e-4, atol=1e-4)


def test_shares_of_the_input_leave_nothing_out():
    """Without biases and positions, no constant is left: all of a logit comes from the pixels."""
    model = small_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "pos_embed")):
                p.zero_()
    images = torch.randn(3, 3, 16, 16)
    shares, constant = input_shares(model, images, torch.eye(50)[7])
    torch.testing.assert_close(constant, torch.zeros(3), rtol=0, atol=1e-4)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(shares.sum(dim=1), logits[:, 7], rtol=0, atol=1e-4)
    assert logits[:, 7].abs().min() > 0.01


def test_holding_changes_no_value_and_mends_every_gradient():
    """The map that is held is linear: its gradient is that of a difference, however large."""
    model, images = small_model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        with show.Held():
            torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)
    x = torch.linspace(-4, 4, 9, requires_grad=True)
    with show.Held():
        y = torch.nn.functional.gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((gradient * x).detach(), y.detach())
    q, k, v = (torch.randn(1, 2, 5, 3, requires_grad=True) for _ in range(3))
    with show.Held():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not out.grad_fn.next_functions[0][0] or torch.autograd.grad(
        out.sum(), [q, k], allow_unused=True
    ) == (None, None)


def test_a_patch_that_does_not_reach_others_has_the_same_share_at_both_ends():
    """Without attention and positions, output and input differ in the constants only."""
    model = small_model()
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
        for name, p in model.named_parameters():
            if ".attn.proj" in name or name.endswith("bias"):
                p.zero_()
    images, weights = torch.randn(2, 3, 16, 16), torch.rand(50)
    at_input, _ = input_shares(model, images, weights)
    at_output, _ = word_shares(model, images, weights)
    torch.testing.assert_close(at_input, at_output, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize(
    "flags", [["--at", "output"], ["--contrast"], ["--at", "output", "--contrast"]]
)
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


def test_contrast_is_the_log_probability_less_the_entropy(run, capsys):
    found = ask(capsys, "words", run, "--contrast", "--word", "red", "--number", "1")
    loaded, (found,) = show.load(run, "cpu"), found["images"][0]["maps"]
    (sample,) = show.gather(load_source(str(run / "pairs")), 1, lambda raw: show.look(raw, 32))
    with torch.no_grad():
        log_p = loaded.model(show.normalize(sample.view[None]))[0].log_softmax(dim=0)
    entropy = -(log_p.exp() * log_p).sum().item()
    expected = (show.word_weights(loaded, "red") @ log_p).item()
    assert sum(found["shares"]) + found["constant"] - entropy == pytest.approx(expected, abs=1e-4)


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
    monkeypatch.setattr(show, "make_index", None)  # a second query needs none
    assert ask(capsys, *flags, "--number", "5")["texts"] == first["texts"]
    file = sorted(path for path in data.iterdir() if path.suffix != ".txt")[0]
    file.write_bytes(file.read_bytes() + b"\0")  # the source has changed
    with pytest.raises(TypeError):
        ask(capsys, *flags)


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


def test_curves_need_matplotlib(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install matplotlib" in refused(capsys, "curves", run)


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
