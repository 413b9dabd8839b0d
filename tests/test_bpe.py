"""Byte pairs: learned ones against slow ones, and those of files, damaged or out of reach."""

import itertools
from collections import Counter

import pytest
import regex
import requests
import tiktoken

from data import UserError, load_tokenizer, save_tokenizer
from plugins import shapes
from plugins.bpe import WORDS, learn_bpe, plain

TEXTS = ["the red star", "the blue star", "a red, red ball", "stars and balls", "thé étoile"] * 3
CAPTIONS = [shapes.caption(shapes.scene_of(i, "train")) for i in range(2000)]


def slow_bpe(captions, size):
    """Byte-pair encoding without any bookkeeping: it counts all pairs again for each merge."""
    words = [
        [bytes([b]) for b in w.encode()] for c in captions for w in regex.findall(WORDS, plain(c))
    ]
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < size:
        pairs = Counter(pair for word in words for pair in itertools.pairwise(word))
        if not pairs or max(pairs.values()) < 2:
            break
        most = max(pairs.values())
        left, right = min(pair for pair, n in pairs.items() if n == most)
        ranks.setdefault(left + right, len(ranks))
        for word in words:
            j = 0
            while j < len(word) - 1:
                if (word[j], word[j + 1]) == (left, right):
                    word[j : j + 2] = [left + right]
                j += 1
    return ranks


@pytest.mark.parametrize("size", [256, 270, 400])
def test_learned_bpe_equals_the_slow_one(size):
    assert learn_bpe(TEXTS, size) == slow_bpe(TEXTS, size)
    assert learn_bpe(reversed(TEXTS), size) == learn_bpe(TEXTS, size)  # whatever the order


def test_bpe_of_shapes_is_learned_from_captions_and_reloads(tmp_path):
    tokenizer = load_tokenizer("bpe:400", CAPTIONS)
    assert tokenizer.n_vocab == 400
    (tmp_path / "t.tiktoken").write_bytes(save_tokenizer(tokenizer)[0])
    again = load_tokenizer(str(tmp_path / "t.tiktoken"))
    for text in [" a red star", " é ñ 漢字 🙂", " IMG_2041.jpg!"]:
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.decode(again.encode_ordinary(text)) == plain(text)


def test_bpe_stays_smaller_when_no_pair_is_left():
    assert load_tokenizer("bpe:1000", ["ab ab", "ab"]).n_vocab == 258


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not a vocabulary", "damaged: too many values"),
        (b"a 0\n", "damaged: .*base64"),
        (b"YQ== 0\n", "single bytes are missing"),
        (b"YQ== 0\nYg== 0\n", "a token or a rank occurs twice"),
        (b"YQ== 0\nYQ== 1\n", "a token or a rank occurs twice"),
    ],
)
def test_damaged_tokenizer_files_are_refused(tmp_path, content, message):
    (tmp_path / "t.tiktoken").write_bytes(content)
    with pytest.raises(UserError, match=rf"t\.tiktoken cannot .*{message}"):
        load_tokenizer(str(tmp_path / "t.tiktoken"))


@pytest.mark.parametrize("config", ["{", "[1]", '{"words": "("}'])
def test_damage_beside_a_tokenizer_file_is_named(tmp_path, config):
    tokenizer = load_tokenizer("bpe:256", [])
    (tmp_path / "t.tiktoken").write_bytes(save_tokenizer(tokenizer)[0])
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(str(tmp_path / "t.tiktoken"))


def test_tokenizer_without_network_names_the_way_out(monkeypatch, tmp_path):
    def refuse(url, **_):
        raise requests.ConnectionError("no network", request=requests.Request("GET", url))

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(UserError, match=r"no network.*TIKTOKEN_CACHE_DIR.*bpe:512"):
        load_tokenizer("gpt2")
