"""Captions become label sets; tokenizers of all kinds are stored with a run, or refused."""

import json
import pickle
from pathlib import Path

import pytest
import tiktoken

from data import (
    UserError,
    caption_labels,
    caption_tokens,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
)
from plugins import TABLE, clip_bpe
from plugins.bpe import learn_bpe
from tests.test_clip_bpe import VARIED
from tests.test_tokenizers import train_json

TEXTS = ["the red star", "the blue star", "a red, red ball", "stars and balls", "thé étoile"] * 3

# ------------------------------------------------------------------------------------------------
# Labels.


def test_labels_are_a_sorted_set_whatever_case_and_blanks():
    tokenizer = load_tokenizer("bpe:400", TEXTS)
    labels = caption_labels("red star red", tokenizer)
    assert labels == sorted(set(labels)) == caption_labels("  Star\n RED ", tokenizer)
    assert caption_labels("", tokenizer) == caption_labels(" \t", tokenizer) == []
    long = " ".join(f"{i}" for i in range(500))
    assert len(caption_labels(long, tokenizer, max_tokens=5)) <= 5


def test_tokens_keep_order_and_repeats():
    tokenizer = load_tokenizer("words:5", TEXTS)
    tokens = caption_tokens("Red star, RED ball", tokenizer)
    assert tokenizer.decode(tokens).split() == ["red", "star", "red"]
    assert caption_tokens("red star red", tokenizer, max_tokens=2) == tokens[:2]
    assert caption_labels("red star red", tokenizer) == sorted(set(tokens))


# ------------------------------------------------------------------------------------------------
# Stored with a run, or refused.


@pytest.fixture
def gpt(monkeypatch):
    """A small encoding in place of GPT-2's, with a pattern and a special token of its own."""
    ranks = learn_bpe(TEXTS, 300)
    special = {"<|endoftext|>": len(ranks)}
    encoding = tiktoken.Encoding(
        "gpt2", pat_str=r"\S+|\s", mergeable_ranks=ranks, special_tokens=special
    )
    monkeypatch.setitem(tiktoken.registry.ENCODINGS, "gpt2", encoding)


def test_only_what_cannot_be_fetched_is_the_users_mistake(monkeypatch):
    """A fork's own fault keeps its traceback."""

    def broken(*_):
        raise ValueError("a fault")

    monkeypatch.setattr(f"{__name__}.opened", broken, raising=False)
    monkeypatch.setitem(TABLE["tokenizer"], "own", f"{__name__}.opened")
    with pytest.raises(ValueError, match="a fault"):
        load_tokenizer("own")
    monkeypatch.setattr(tiktoken, "get_encoding", broken)
    with pytest.raises(UserError, match=r"'gpt2' cannot be fetched \(a fault\): .*or use --tok"):
        load_tokenizer("gpt2")


JSON = ("wordpiece", "unigram", "bytes")
SPECS = ["bpe:300", "words:8", "clip", "gpt2", "FILE", *JSON]
SPECS += ["no-stopwords:bpe:300", "no-stopwords:words:8", "no-stopwords:wordpiece"]


@pytest.mark.parametrize("spec", SPECS)
def test_tokenizers_come_back_the_same(spec, tmp_path, gpt, monkeypatch):
    before, colon, kind = spec.rpartition(":")
    if kind == "FILE":
        kind = str(tmp_path / "given.tiktoken")
        Path(kind).write_bytes(save_tokenizer(load_tokenizer("bpe:280", TEXTS))[0])
    if kind in JSON:
        kind = train_json(kind, tmp_path / "given.json")
    tokenizer = load_tokenizer(before + colon + kind, TEXTS)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "tokenizer.tiktoken"
    content, settings = save_tokenizer(tokenizer)
    path.write_bytes(content)
    config = json.loads(json.dumps({"seed": 0, **settings}))
    monkeypatch.setattr(clip_bpe, "open_tokenizer", None)  # neither file nor network is needed
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for again in (
        read_tokenizer(path, config),
        load_tokenizer(str(path)),  # as --tokenizer of another run
        pickle.loads(pickle.dumps(tokenizer)),  # as to a DataLoader's spawned workers
        pickle.loads(pickle.dumps(read_tokenizer(path, config))),
    ):
        assert type(again) is type(tokenizer) and again.n_vocab == tokenizer.n_vocab
        assert save_tokenizer(again) == (content, settings)
        for text in [*TEXTS, *VARIED[::20]]:
            ids = caption_tokens(text, tokenizer, max_tokens=2000)
            assert caption_tokens(text, again, max_tokens=2000) == ids, repr(text)
            assert again.decode(ids) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:12", "at least 256"),
        ("bpe:x", "at least 256"),
        ("bpe:", "at least 256"),
        ("words:0", "at least 1"),
        ("words:many", "at least 1"),
        ("gpt9", "unknown tokenizer 'gpt9': use bpe, .*clip, words"),
        ("no.tiktoken", "cannot be read .*No such file"),
        ("no.json", "cannot be read .*No such file"),
    ],
)
def test_unusable_tokenizers_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(spec, ["text"])


@pytest.mark.parametrize("kind", ["os.system", "nothing.Here", "..os.system", "bpe", "bpe.Nothing"])
def test_a_kind_from_a_strangers_config_imports_no_other_file(tmp_path, kind):
    path = tmp_path / "t.tiktoken"
    path.write_bytes(save_tokenizer(load_tokenizer("bpe:256", []))[0])
    with pytest.raises(UserError, match=r"t\.tiktoken cannot be read or is damaged"):
        read_tokenizer(path, {"tokenizer_kind": kind})
