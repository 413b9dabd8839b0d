"""Tokenizers: learned ones against slow ones, CLIP's against OpenCLIP's, and all of them stored."""

import gzip
import hashlib
import html.entities
import itertools
import json
import pickle
import random
import shutil
import string
import sys
import types
import unicodedata
from collections import Counter
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import open_clip.tokenizer
import pytest
import requests
import tiktoken
import tokenizers
from ftfy.badness import BADNESS_RE, is_bad

import shapes
import tokenizer as tok
from tokenizer import (
    CLIP_VOCAB,
    STOPWORDS,
    UserError,
    caption_labels,
    caption_tokens,
    drop_stopwords,
    learn_bpe,
    load_tokenizer,
    read_tokenizer,
    repair,
    save_tokenizer,
    tokenizer_config,
)

TEXTS = ["the red star", "the blue star", "a red, red ball", "stars and balls", "thé étoile"] * 3
VOCAB = Path(open_clip.tokenizer.default_bpe())
CAPTIONS = [shapes.caption(shapes.scene_of(i, "train")) for i in range(2000)]

# ------------------------------------------------------------------------------------------------
# Learned byte pairs.


def slow_bpe(captions, size):
    """Byte-pair encoding without any bookkeeping: it counts all pairs again for each merge."""
    words = [
        [bytes([b]) for b in w.encode()]
        for c in captions
        for w in tok.regex.findall(tok.WORDS, tok.plain(c))
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
    (tmp_path / "t.tiktoken").write_bytes(save_tokenizer(tokenizer))
    again = load_tokenizer(str(tmp_path / "t.tiktoken"))
    for text in [" a red star", " é ñ 漢字 🙂", " IMG_2041.jpg!"]:
        assert again.encode_ordinary(text) == tokenizer.encode_ordinary(text)
        assert again.decode(again.encode_ordinary(text)) == text


def test_bpe_stays_smaller_when_no_pair_is_left():
    assert load_tokenizer("bpe:1000", ["ab ab", "ab"]).n_vocab == 258


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


def test_stopwords_go_and_nothing_else():
    text = "The dog’s  ball is (in the) garden, and it's red; I don't rock-and-roll &c."
    assert drop_stopwords(text) == "dog’s ball garden, red; don't rock-and-roll &c."
    assert drop_stopwords("THE the “the” and…") == drop_stopwords("") == ""
    assert 60 < len(STOPWORDS) < 150 and all(word == word.lower() for word in STOPWORDS)
    tokenizer = load_tokenizer("bpe:400", TEXTS)
    without = caption_labels("The red star", tokenizer, without_stopwords=True)
    assert without == caption_labels("red star", tokenizer)
    assert caption_labels("of the", tokenizer, without_stopwords=True) == []


# ------------------------------------------------------------------------------------------------
# CLIP's, against OpenCLIP's.

SCRIPTS = {  # the first and the last code point
    "Latin": (0x21, 0x24F), "phonetic": (0x250, 0x2FF), "marks": (0x300, 0x36F),
    "Greek": (0x370, 0x3FF), "Cyrillic": (0x400, 0x52F), "Armenian": (0x531, 0x58F),
    "Hebrew": (0x591, 0x5F4), "Arabic": (0x600, 0x6FF), "Devanagari": (0x900, 0x97F),
    "Bengali": (0x980, 0x9FE), "Tamil": (0xB82, 0xBFA), "Thai": (0xE01, 0xE5B),
    "Tibetan": (0xF00, 0xFDA), "Burmese": (0x1000, 0x109F), "Georgian": (0x10A0, 0x10FF),
    "Ethiopic": (0x1200, 0x137C), "Cherokee": (0x13A0, 0x13FD), "Khmer": (0x1780, 0x17F9),
    "old Greek": (0x1F00, 0x1FFE), "marks in text": (0x2000, 0x206F), "numbers": (0x2070, 0x218B),
    "arrows": (0x2190, 0x22FF), "circled": (0x2460, 0x24FF), "boxes": (0x2500, 0x27BF),
    "kana": (0x3000, 0x30FF), "Han": (0x4E00, 0x9FFF), "Hangul": (0xAC00, 0xD7A3),
    "ligatures": (0xFB00, 0xFDFF), "full width": (0xFF01, 0xFFEE), "Gothic": (0x10330, 0x1034A),
    "letters of mathematics": (0x1D400, 0x1D7FF), "flags": (0x1F1E6, 0x1F1FF),
    "emoji": (0x1F300, 0x1F6FF), "new emoji": (0x1F900, 0x1FAFF), "rare Han": (0x20000, 0x20FFF),
    "control": (0, 0x20), "high control": (0x7F, 0xA0), "private": (0xE000, 0xE0FF),
    "all below the surrogates": (0, 0xD7FF), "all above them": (0xE000, 0x10FFFF),
}  # fmt: skip
PIECES = [
    "", " ", "\u00a0", "\u2003", "\u200b", "\ufeff", "\x1c", "\x85", "\u2028", "a", "I", "\ufb01",
    "ß", "İstanbul", "ΟΔΟΣ", "ΟΔΟΣ&#8203;Α", "\u017f", "\u212a", "\u0345", "!\u0345α", "'\u017f",
    "'S", "'t", "''re", "they'LL", "don't", "dog's", "dog’s", "'d've", "rock'n'roll", "I'm", "'",
    "''", "12", "3.14159", "٣٤", "½²Ⅷ", "1st", "a1b2", "&", "&amp;", "&amp;amp;", "&amp;amp;amp;",
    "&lt;br&gt;", "&Dagger;", "&dagger;", "&AMP;", "&NotEqual;", "&Eacute;", "&amp;eacute;",
    "&notit;", "&#39;s", "&#x27;S", "&amp;#39;t", "&#0;", "&#128;", "&#xD800;", "&#1114112;",
    "&#x1F600;", "&nbsp;", "&hellip", "&;", "</w>", "dog</w>", "Ġ", "Ċ", "\0", "\x01\x02", "\x7fb",
    "\x80\xff", "\ufffd", "👩\u200d👩\u200d👧", "👍🏽", "🇨🇭🇺🇳", "❤\ufe0f", "1\ufe0f\u20e3", "@you",
    "http://a.com/?q=1&lt=2", "IMG_2041.JPG", "50%", "C++", "snake_case", "...", "—", "#tbt",
    "naïve café", "nai\u0308ve", "Grüße aus Köln", "Das Schiff fährt über die Elbe.", "서울의 밤",
    "the dogâ€™s ball", "“curly”", "\ufb01sh", "ＡＢＣ", "cafe\u0301", "red\x07star", "&EACUTE;",
    "\x1b[36;44mblue\x1b[0m", "a\r\nb", "Ã la mode", "\nÃ la mode", "voilÃ\nle travail", "<br>&lt;",
    "こんにちは世界", "红色的星星在墙上", "Привет, мир!", "Καλημέρα κόσμε", "مرحبا بالعالم",
    "שלום עולם", "नमस्ते दुनिया", "สวัสดีชาวโลก", "Xin chào thế giới", "வணக்கம்", "გამარჯობა",
    "Բարեւ", "ሰላም ልዑል",
]  # fmt: skip


def varied_texts() -> list[str]:
    """Thousands of awkward texts, the same ones every time."""
    rng = random.Random(0)
    spans = [range(first, last + 1) for first, last in SCRIPTS.values()]

    def run(span):
        return "".join(chr(rng.choice(span)) for _ in range(rng.randint(1, 12)))

    def piece():
        kind = rng.random()
        if kind < 0.4:
            return run(rng.choice(spans))
        if kind < 0.5:  # any named or numbered entity, escaped up to three times
            name = rng.choice([*html.entities.html5, f"#{rng.randrange(70_000)};"])
            return "&" + "amp;" * rng.randrange(3) + name
        return rng.choice(PIECES)

    def text():
        gaps = [" ", " ", "", "  ", "\n", "'"]
        return "".join(rng.choice(gaps) + piece() for _ in range(rng.randint(1, 8)))

    letters = "".join(chr(rng.choice(range(ord("a"), ord("z") + 1))) for _ in range(500))
    long = ["a" * 1000, letters, "漢" * 200, "!" * 1000, "7" * 100, "🙂" * 100, "ab" * 300 + "'s"]
    return ["", *PIECES, *long, *CAPTIONS[:300], *(text() for _ in range(4000))]


VARIED = varied_texts()


@pytest.fixture(scope="module")
def clip():
    return load_tokenizer("clip")


@pytest.fixture(scope="module")
def peer():
    return open_clip.tokenizer.SimpleTokenizer()


def test_clip_ids_are_openclips_on_every_text(clip, peer):
    assert len(VARIED) > 4000
    for text in VARIED:
        ids = peer.encode(text)
        assert clip.encode_ordinary(text) == ids, repr(text)
        assert caption_tokens(text, clip) == ids[:77], repr(text)
        assert caption_labels(text, clip, max_tokens=2000) == sorted(set(ids)), repr(text)


def test_clip_ids_are_openclips_for_every_character(clip, peer):
    """All of Unicode but Han and Hangul: alone, beside a letter, a mark and an apostrophe."""
    spans = [(0, 0x3400), (0xA000, 0xAC00), (0xD7B0, 0x20000)]
    characters = [chr(c) for span in spans for c in range(*span)]
    characters = [c for c in characters if unicodedata.category(c) not in ("Cn", "Co")]  # no use
    for i in range(0, len(characters), 1000):
        text = " ".join(f"{c} a{c}a !{c}! '{c}" for c in characters[i : i + 1000])
        assert clip.encode_ordinary(text) == peer.encode(text)


# ftfy's steps: HTML entities, which need "&" and ";"; wrong encodings, only in non-ASCII lines that
# `is_bad` reports; single characters; NFC. (A terminal escape begins with a control character.)


def test_repair_of_ascii_is_ftfys():
    """All single characters, all pairs, all triples of punctuation, and long random texts."""
    ascii = [chr(c) for c in range(128)]
    rng = random.Random(0)
    for text in [
        *ascii,
        *map("".join, itertools.product(ascii, repeat=2)),
        *map("".join, itertools.product(string.punctuation, repeat=3)),
        *("".join(rng.choices(ascii[9:], k=rng.randrange(60))) for _ in range(3000)),
    ]:
        assert repair(text) == ftfy.fix_text(text), repr(text)


def test_repair_is_skipped_for_plain_ascii(monkeypatch):
    monkeypatch.setattr(ftfy, "fix_text", None)
    text = "".join(chr(c) for c in range(32, 127) if chr(c) != ";") + "\t\n\f"
    assert repair(text) == text and all(repair(a + b) for a in text for b in text)
    assert repair("Grüße, ночь, 夜, ça va?") == "Grüße, ночь, 夜, ça va?"
    with pytest.raises(TypeError):
        repair("“curly”")


def test_ftfy_replaces_no_other_character():
    characters = map(chr, range(sys.maxunicode + 1))
    others = [c for c in characters if not tok.REPLACED.search(c) and is_normalized("NFC", c)]
    assert len(others) > 1_100_000
    for i in range(0, len(others), 20_000):
        text = " ".join(others[i : i + 20_000])
        assert ftfy.fix_text(text, fix_encoding=False) == text


def test_repair_of_wrongly_decoded_text_is_ftfys():
    """Random texts of the characters that ftfy's `is_bad` looks for, real ones among them."""
    rng = random.Random(0)
    suspects = [*{c for c in BADNESS_RE.pattern if not c.isascii()}, *map(chr, range(160, 256))]
    suspects += ["a", "B", " ", "\n", "?", "1"] * 12
    texts = ["".join(rng.choices(suspects, k=rng.randint(1, 6))) for _ in range(15_000)]
    for text in VARIED[:300]:
        for encoding in ("latin-1", "windows-1252", "windows-1251", "macroman"):
            texts.append(text.encode("utf-8", "replace").decode(encoding, "replace"))
    assert sum(map(is_bad, texts)) > 1000
    for text in texts:
        assert repair(text) == ftfy.fix_text(text), repr(text)


def test_clip_vocabulary_and_decoding_are_openclips(clip, peer):
    assert clip.n_vocab == peer.vocab_size == 49408
    for i in range(49406):
        token = bytearray(peer.byte_decoder[c] for c in peer.decoder[i].removesuffix("</w>"))
        assert clip.decode_single_token_bytes(i) == token + b" " * peer.decoder[i].endswith("</w>")
    text = "a photo of two dogs, über alles 🙂!"
    assert clip.encode_ordinary("a photo of a dog") == [320, 1125, 539, 320, 1929]  # published ids
    assert clip.decode(clip.encode_ordinary(text)) == "a photo of two dogs , über alles 🙂! "
    assert clip.decode(clip.encode_ordinary(text)) == peer.decode(peer.encode(text))


def test_no_start_or_end_id_is_ever_a_label(clip, peer):
    marks = ["<|startoftext|>", "<|endoftext|>", "<start_of_text>", "<end_of_text>"]
    for mark, case in itertools.product(marks, (str.lower, str.upper)):
        for text in (case(mark), f"a {case(mark)} b", case(mark).replace("<", "&amp;lt;")):
            assert max(clip.encode_ordinary(text)) < 49406
    # They are what they look like. (OpenCLIP spells its own marks <start_of_text>.)
    ids = clip.encode_ordinary("<|endoftext|>")
    assert ids == clip.encode_ordinary("<| endoftext |>") == peer.encode("<|endoftext|>")
    assert max(max(clip.encode_ordinary(text), default=0) for text in VARIED) < 49406
    assert caption_labels("", clip) == caption_labels("&nbsp;", clip) == []


def test_clip_ids_fit_half_a_character(clip):
    """Half of a surrogate pair, as broken JSON gives it, is read as U+FFFD."""
    assert clip.encode_ordinary("a \ud83d b") == clip.encode_ordinary("a � b")


@pytest.fixture
def nowhere(tmp_path, monkeypatch):
    """No package, an empty cache, no network; returns the path of the cached file."""

    def refuse(url):
        raise requests.ConnectionError("no network")

    monkeypatch.setattr(tok.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / hashlib.sha1(tok.CLIP_URL.encode()).hexdigest()


def serve(content: bytes, asked: list):
    """A `requests.get` that answers every request with the content."""

    def get(url):
        asked.append(url)
        return types.SimpleNamespace(content=content, raise_for_status=lambda: None)

    return get


def test_clip_vocabulary_is_fetched_once(nowhere, monkeypatch):
    asked = []
    monkeypatch.setattr(requests, "get", serve(VOCAB.read_bytes(), asked))
    for _ in range(2):
        assert load_tokenizer("clip").n_vocab == 49408
    assert asked == [tok.CLIP_URL] and nowhere.read_bytes() == VOCAB.read_bytes()
    assert list(nowhere.parent.iterdir()) == [nowhere]


def test_clip_vocabulary_is_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("clip", "open_clip"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    monkeypatch.setattr(
        tok, "read_file_cached", lambda *_: read.append("cache") or read_bytes(VOCAB)
    )
    tok.load_clip()
    for package in ("clip", "open_clip"):  # the second precedes the first
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        tok.load_clip()  # a package without the file
        shutil.copy(VOCAB, tmp_path / package)
        tok.load_clip()
    clip, open_clip = (tmp_path / package / CLIP_VOCAB for package in ("clip", "open_clip"))
    assert read == ["cache", "cache", clip, clip, open_clip]


def test_missing_vocabulary_names_the_ways_out(nowhere):
    with pytest.raises(UserError, match="no network") as error:
        load_tokenizer("clip")
    for way in ("TIKTOKEN_CACHE_DIR", "open_clip_torch", "bpe:512"):
        assert way in str(error.value)


def test_wrong_vocabularies_are_never_used(tmp_path, monkeypatch, nowhere):
    wrong = gzip.compress(gzip.decompress(VOCAB.read_bytes()).replace(b"d og</w>", b"d oq</w>"))
    nowhere.parent.mkdir(parents=True)
    nowhere.write_bytes(wrong)
    (tmp_path / CLIP_VOCAB).write_bytes(wrong)
    package = types.SimpleNamespace(origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(tok.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(requests, "get", serve(wrong, []))
    with pytest.raises(UserError, match=f"Hash mismatch .*{tok.CLIP_URL}"):
        load_tokenizer("clip")
    assert not nowhere.exists()  # nothing of it is kept
    monkeypatch.setattr(requests, "get", serve(VOCAB.read_bytes(), []))
    assert load_tokenizer("clip").encode_ordinary("dog") == [1929]


def test_unwritable_cache_is_reported(nowhere, monkeypatch):
    monkeypatch.setattr(requests, "get", serve(VOCAB.read_bytes(), []))
    nowhere.parent.write_text("a file in place of the folder")
    with pytest.raises(UserError, match="bpe:512"):
        load_tokenizer("clip")


# ------------------------------------------------------------------------------------------------
# Whole words.


def test_words_against_a_count_by_hand():
    captions = ["The red star, the RED ball!", "a star's ball", "Ein großer Stern 2024", "red_star"]
    # red 3, star 3, ball 2, the 2; the other five (a, ein, großer, s, stern) once.
    tokenizer = load_tokenizer("words:6", captions)
    assert tokenizer.words == ["red", "star", "ball", "the", "a", "ein"] and tokenizer.n_vocab == 6
    assert tokenizer.unknown == pytest.approx(3 / 15)
    assert caption_tokens("A green BALL, a star; stars 2024.", tokenizer) == [4, 2, 4, 1]
    assert caption_labels("red ball red", tokenizer) == [0, 2]
    assert tokenizer.decode([1, 0]) == "star red"
    assert caption_labels("nothing known 12", tokenizer) == []
    assert load_tokenizer("words:9", reversed(captions)).unknown == 0


@pytest.mark.parametrize("n", [1, 40, 70])
def test_words_of_shapes_are_the_most_frequent(n):
    counts = Counter("".join(c if c.isalpha() else " " for c in " ".join(CAPTIONS).lower()).split())
    tokenizer = load_tokenizer(f"words:{n}", iter(CAPTIONS))
    ranked = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    assert tokenizer.words == [word for word, _ in ranked[:n]]
    assert tokenizer.unknown == pytest.approx(
        sum(count for _, count in ranked[n:]) / counts.total()
    )


def test_too_few_words_are_counted():
    with pytest.raises(UserError, match=r"words:100: .* only 11 different words"):
        load_tokenizer("words:100", TEXTS)


# ------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json.


def train_json(kind: str, path: Path) -> str:
    """Train a tokenizer of Hugging Face's on TEXTS, with special tokens, truncation and padding."""
    models, trainers = tokenizers.models, tokenizers.trainers
    normalizers, pre, decoders = (
        tokenizers.normalizers,
        tokenizers.pre_tokenizers,
        tokenizers.decoders,
    )
    if kind == "wordpiece":  # as BERT's
        tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = pre.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=80, special_tokens=special)
    elif kind == "unigram":  # as T5's, whose unknown token need not be a special one
        tokenizer = tokenizers.Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = ["<pad>", "</s>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=60, special_tokens=[*special, "<unk>"], unk_token="<unk>"
        )
    else:  # as GPT-2's
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        special = ["<|endoftext|>"]
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=alphabet
        )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{special[-1]} $A {special[0]}",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in special],
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=20)
    tokenizer.save(str(path))
    return str(path)


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "bytes"])
def test_json_labels_are_words_and_never_special(kind, tmp_path):
    path = train_json(kind, tmp_path / "tokenizer.json")
    tokenizer, raw = load_tokenizer(path), tokenizers.Tokenizer.from_file(path)
    raw.no_truncation()
    raw.no_padding()
    assert tokenizer.n_vocab == raw.get_vocab_size()
    tokens = caption_tokens("  Red STAR\n red", tokenizer)
    text = " red star red" if kind == "bytes" else "red star red"
    assert tokens == raw.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(tokens).split() == ["red", "star", "red"]
    word = caption_tokens("red", tokenizer)
    assert tokens[: len(word)] == tokens[-len(word) :] == word  # wherever it stands
    assert caption_labels("red star red", tokenizer) == sorted(set(tokens))
    assert len(caption_tokens(" ".join(TEXTS), tokenizer, max_tokens=9)) == 9
    special = [token for token in raw.get_vocab() if token[0] in "<[" and len(token) > 3]
    assert len(special) == {"wordpiece": 4, "unigram": 3, "bytes": 1}[kind]
    for text in [*special, "漢字 🙂", f"red {special[0]} 漢 star", *VARIED[::20]]:
        ids = caption_tokens(text, tokenizer, max_tokens=2000)
        assert not {raw.token_to_id(token) for token in special} & set(ids), text
        assert max(ids, default=0) < tokenizer.n_vocab


def test_json_unknown_token_need_not_be_special(tmp_path):
    model = tokenizers.models.WordLevel({"?": 0, "a": 1, "star": 5}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(str(tmp_path / "t.json"))
    assert caption_tokens("A blue star ?", tokenizer) == [1, 5] and tokenizer.n_vocab == 6


def test_unusable_json_tokenizers_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    for content in ("{", "{}", "[1]", json.dumps({"model": {"type": "BPE"}})):
        path.write_text(content)
        with pytest.raises(UserError, match=r"t\.json cannot be read or is damaged"):
            load_tokenizer(str(path))
    path.write_bytes(b"\xff")
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(str(path))
    train_json("wordpiece", path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"damaged: .*tokenizers"):
        load_tokenizer(str(path))


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


@pytest.mark.parametrize(
    "spec", ["bpe:300", "words:8", "clip", "gpt2", "FILE", "wordpiece", "unigram", "bytes"]
)
def test_tokenizers_come_back_the_same(spec, tmp_path, gpt, monkeypatch):
    if spec == "FILE":
        spec = str(tmp_path / "given.tiktoken")
        Path(spec).write_bytes(save_tokenizer(load_tokenizer("bpe:280", TEXTS)))
    if spec in ("wordpiece", "unigram", "bytes"):
        spec = train_json(spec, tmp_path / "given.json")
    tokenizer = load_tokenizer(spec, TEXTS)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run" / "tokenizer.tiktoken"
    path.write_bytes(save_tokenizer(tokenizer))
    config = json.loads(json.dumps({"seed": 0, **tokenizer_config(tokenizer)}))
    monkeypatch.setattr(tok, "load_clip", None)  # neither file nor network is needed
    monkeypatch.setattr(tiktoken, "get_encoding", None)
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    for again in (
        read_tokenizer(path, config),
        load_tokenizer(str(path)),  # as --tokenizer of another run
        pickle.loads(pickle.dumps(tokenizer)),  # as to a DataLoader's spawned workers
        pickle.loads(pickle.dumps(read_tokenizer(path, config))),
    ):
        assert type(again) is type(tokenizer) and again.n_vocab == tokenizer.n_vocab
        assert tokenizer_config(again) == tokenizer_config(tokenizer)
        for text in [*TEXTS, *VARIED[::20]]:
            ids = caption_tokens(text, tokenizer, max_tokens=2000)
            assert caption_tokens(text, again, max_tokens=2000) == ids, repr(text)
            assert again.decode(ids) == tokenizer.decode(ids)
        assert save_tokenizer(again) == path.read_bytes()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("bpe:12", "at least 256"),
        ("bpe:x", "at least 256"),
        ("bpe:", "at least 256"),
        ("words:0", "at least 1"),
        ("words:many", "at least 1"),
        ("gpt9", "unknown tokenizer 'gpt9': .*words:N, clip"),
        ("no.tiktoken", "cannot be read .*No such file"),
        ("no.json", "cannot be read .*No such file"),
    ],
)
def test_unusable_tokenizers_are_refused(spec, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(spec, ["text"])


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
    (tmp_path / "t.tiktoken").write_bytes(save_tokenizer(tokenizer))
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(UserError, match="damaged"):
        load_tokenizer(str(tmp_path / "t.tiktoken"))


def test_damaged_words_are_refused(tmp_path):
    (tmp_path / "t.tiktoken").write_bytes(b"YQ== 0\nYg== 0\n")
    with pytest.raises(UserError, match="a token or a rank occurs twice"):
        config = {"tokenizer_kind": "words", "unknown_words": 0.0}
        read_tokenizer(tmp_path / "t.tiktoken", config)


def test_tokenizer_without_network_names_the_way_out(monkeypatch, tmp_path):
    def refuse(url, **_):
        raise requests.ConnectionError("no network", request=requests.Request("GET", url))

    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.delitem(tiktoken.registry.ENCODINGS, "gpt2", raising=False)
    with pytest.raises(UserError, match=r"no network.*TIKTOKEN_CACHE_DIR.*bpe:512"):
        load_tokenizer("gpt2")
