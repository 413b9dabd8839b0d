"""CLIP's tokenizer against OpenCLIP's, ftfy's repairs against ftfy, and where its file is found."""

import gzip
import hashlib
import html.entities
import itertools
import random
import re
import shutil
import string
import sys
import types
import unicodedata
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import open_clip.tokenizer
import pytest
import requests
from ftfy.badness import BADNESS_RE, is_bad

from data import UserError, caption_labels, caption_tokens, load_tokenizer
from plugins import clip_bpe, shapes
from plugins.clip_bpe import ANY, CLIP_CUT, CLIP_URL, CLIP_VOCAB, REPLACED, SUSPECT, repair

VOCAB = Path(open_clip.tokenizer.default_bpe())
CAPTIONS = [shapes.caption(shapes.scene_of(i, "train")) for i in range(300)]

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

# What ftfy's `is_bad` looks for, in the order of Unicode.
SUSPECTS = re.findall(f"[{ANY}]|[\xa0-\xff]", "".join(map(chr, range(0x10000))))
SUSPECTS += sorted({c for c in BADNESS_RE.pattern if not c.isascii()} - set(SUSPECTS))


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
    return ["", *PIECES, *long, *CAPTIONS, *(text() for _ in range(4000))]


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
    """All of Unicode but Han and Hangul: alone, beside a letter, a mark and an apostrophe.

    Texts that are all letters are not cut, so CLIP must cut at none of Python's letters.
    """
    assert not CLIP_CUT.search("".join(filter(str.isalpha, map(chr, range(sys.maxunicode + 1)))))
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
    others = [c for c in characters if not REPLACED.search(c) and is_normalized("NFC", c)]
    assert len(others) > 1_100_000
    for i in range(0, len(others), 20_000):
        text = " ".join(others[i : i + 20_000])
        assert ftfy.fix_text(text, fix_encoding=False) == text


def test_only_suspect_text_is_bad():
    """Those characters and all pairs of them, beside letters, blanks and a digit."""
    assert SUSPECT.search("à la") is None and is_bad("Ã la") and is_bad("œ!")
    passed = 0
    for few in map("".join, itertools.product(SUSPECTS, ["", *SUSPECTS])):
        if not SUSPECT.search(few) and not REPLACED.search(few):
            passed += 1
            assert not any(map(is_bad, (f"a{few} {few}a", f"a {few}1"))), repr(few)
    assert passed > 20_000


def test_repair_of_wrongly_decoded_text_is_ftfys():
    """Random texts of the characters that ftfy's `is_bad` looks for, real ones among them."""
    rng = random.Random(0)
    pool = SUSPECTS + ["a", "B", " ", "\n", "?", "1"] * 12
    texts = ["".join(rng.choices(pool, k=rng.randint(1, 6))) for _ in range(15_000)]
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

    monkeypatch.setattr(clip_bpe.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(requests, "get", refuse)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / hashlib.sha1(CLIP_URL.encode()).hexdigest()


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
    assert asked == [CLIP_URL] and nowhere.read_bytes() == VOCAB.read_bytes()
    assert list(nowhere.parent.iterdir()) == [nowhere]


def test_clip_vocabulary_is_looked_for_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for package in ("clip", "open_clip"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    monkeypatch.setattr(
        clip_bpe, "read_file_cached", lambda *_: read.append("cache") or read_bytes(VOCAB)
    )
    load_tokenizer("clip")
    for package in ("clip", "open_clip"):  # the second precedes the first
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise RuntimeError('imported')")
        load_tokenizer("clip")  # a package without the file
        shutil.copy(VOCAB, tmp_path / package)
        load_tokenizer("clip")
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
    monkeypatch.setattr(clip_bpe.importlib.util, "find_spec", lambda name: package)
    monkeypatch.setattr(requests, "get", serve(wrong, []))
    with pytest.raises(UserError, match=f"Hash mismatch .*{CLIP_URL}"):
        load_tokenizer("clip")
    assert not nowhere.exists()  # nothing of it is kept
    monkeypatch.setattr(requests, "get", serve(VOCAB.read_bytes(), []))
    assert load_tokenizer("clip").encode_ordinary("dog") == [1929]


def test_unwritable_cache_is_reported(nowhere, monkeypatch):
    monkeypatch.setattr(requests, "get", serve(VOCAB.read_bytes(), []))
    nowhere.parent.write_text("a file in place of the folder")
    with pytest.raises(UserError, match="bpe:512"):
        load_tokenizer("clip")
