"""Tokenizers: captions become sets of token ids, the labels of SuperClass.

`load_tokenizer` makes what --tokenizer names: a byte-pair encoding, learned here (`learn_bpe`),
CLIP's (`ClipTokenizer`) or one of tiktoken's, or a vocabulary of whole words (`WordTokenizer`).
`caption_labels` turns a caption into its label set (section 3 of the paper). `save_tokenizer`,
`tokenizer_config` and `read_tokenizer` keep a tokenizer with its run.
"""

import base64
import gzip
import hashlib
import html
import importlib.util
import itertools
import json
import os
import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path

import regex
import requests
import tiktoken
import torch


class UserError(Exception):
    """A mistake of the user's, told in one sentence: what is wrong, where, and what to do."""


# ------------------------------------------------------------------------------------------------
# From a caption to its labels.

# How text falls into words before byte pairs are merged: letters, digits or other marks, each with
# the blank before it, as in GPT-2's tokenizer. What follows a blank is thus the same token
# anywhere.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"

# The function words of English, our own list, by word class: articles and determiners, pronouns,
# prepositions, conjunctions, auxiliary verbs, a few adverbs. Table 7 of the paper asks what happens
# without such words.
FUNCTION_WORDS = """
    a an the this that these those some any each every both all no such other same own
    i me my mine we us our ours you your yours he him his she her hers it its they them their theirs
    myself yourself himself herself itself ourselves themselves who whom whose which what
    of in on at by for with from to into onto over under above below between through during before
    after about against out off up down near within without upon
    and or but nor if than because while as so though although
    am is are was were be been being have has had having do does did doing
    will would shall should can could may might must
    not there here then when where why how very too just only also again
"""
STOPWORDS = frozenset(FUNCTION_WORDS.split())


def plain(text: str) -> str:
    """Lower-case the text, fold its white space and put one blank before it.

    So "Dog", "a dog" and "a  dog" share a label whatever the tokenizer; the paper's lower-cases
    too.
    """
    return " " + " ".join(text.lower().split())


def drop_stopwords(text: str) -> str:
    """The text without its STOPWORDS (Table 7), whatever their case, with white space folded.

    A word is what stands between blanks; marks around it and an ending such as 's do not count, so
    that "The", "(the" and "it's" go, while "don't", "dog's" and "rock-and-roll" stay.
    """

    def core(word: str) -> str:
        return word.lower().replace("’", "'").strip(string.punctuation + "“”‘…").partition("'")[0]

    return " ".join(word for word in text.split() if core(word) not in STOPWORDS)


def caption_tokens(
    caption: str, tokenizer, max_tokens: int = 77, without_stopwords: bool = False
) -> list[int]:
    """The ids of a caption's first `max_tokens` tokens, in order and with repeats.

    There is no start, end or padding id among them. An empty caption has no tokens.
    """
    text = drop_stopwords(caption) if without_stopwords else caption
    if not text.strip():
        return []
    # CLIP's cleaning must see the text as it came: it lower-cases after it has read entities, and
    # &Dagger; is another character than &dagger;.
    text = text if isinstance(tokenizer, ClipTokenizer) else plain(text)
    return tokenizer.encode_ordinary(text)[:max_tokens]


def caption_labels(
    caption: str, tokenizer, max_tokens: int = 77, without_stopwords: bool = False
) -> list[int]:
    """The label set of a caption (section 3): the sorted, distinct ids of its `caption_tokens`."""
    return sorted(set(caption_tokens(caption, tokenizer, max_tokens, without_stopwords)))


# ------------------------------------------------------------------------------------------------
# The paper's tokenizer.

CLIP_VOCAB = "bpe_simple_vocab_16e6.txt.gz"
CLIP_URL = f"https://github.com/openai/CLIP/raw/main/clip/{CLIP_VOCAB}"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
CLIP_MARKS = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}

# CLIP cuts clean text into English endings, runs of letters, single digits, and runs of anything
# else. This finds all but the letters, which stand between. (CLIP ignores the case as it cuts, and
# an s may then be a long one, "ſ".)
CLIP_CUT = regex.compile(r"('(?:[sſtmd]|re|ve|ll)|\p{N}|[^ \p{L}\p{N}]+)")


class ClipTokenizer(tiktoken.Encoding):
    """CLIP's byte-pair encoding (Radford et al., 2021), with its ids, at tiktoken's speed.

    Both merge, again and again, the neighbours whose union has the lowest rank; they differ in how
    they see where a word ends. CLIP starts from 512 letters: the 256 bytes, and the 256 bytes as
    the last one of a word, which it writes with the suffix </w>. So "cat" in "cat" and in
    "catalogue" are two tokens. tiktoken starts from the bare bytes and has no last letter.

    A blank after each word says the same. No word contains one (cleaning folds all white space, and
    words are cut there), so it can be the mark. The text "A cat!" becomes "a cat ! ", which is
    "a ", "cat " and "! "; of the bytes of "cat ", "t" and the blank must be joined before all else,
    and they are when the 256 pairs (byte, blank) take the ranks 256 to 511, right where CLIP keeps
    its last letters. From there on every step is the same, and the merges keep their ids.

    Left out of the original is ftfy's repair of the text, which would be another package at run
    time: text decoded wrongly stays so, and a curly apostrophe or a full-width letter stays one.
    Literal <|startoftext|> and <|endoftext|> in a caption are marks and letters like any others:
    their ids, 49406 and 49407, are never given.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        # Some captions on the web were escaped twice: &amp;lt; for <.
        text = html.unescape(html.unescape(text))
        # A mark whose capital is a letter (Iota) falls through CLIP's pattern, as white space does.
        text = " ".join(text.split()).lower().replace("\u0345", " ")
        # Blanks around all that is cut out; what is between two blanks too many is no word.
        return super().encode_ordinary(" ".join(CLIP_CUT.split(text)) + " ")


def clip_ranks(vocab: bytes) -> dict[bytes, int]:
    """CLIP's 49,406 tokens from its vocabulary file: bytes, with a blank for </w> -> rank."""
    # The file spells each byte as one visible character: itself where it is one in Latin-1, else
    # the next free one from 256 on. In that order the bytes have the first ids.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in visible]
    letters = {chr(b): bytes([b]) for b in visible}
    letters |= {chr(256 + i): bytes([b]) for i, b in enumerate(others)}

    tokens = [*letters.values(), *(letter + b" " for letter in letters.values())]
    merges = gzip.decompress(vocab).decode("utf-8").split("\n")
    # The first line is a title, and the file goes on after the merges that CLIP uses.
    for merge in merges[1 : 1 + 49408 - len(CLIP_MARKS) - len(tokens)]:
        token = merge.replace(" ", "")
        body = b"".join(letters[c] for c in token.removesuffix("</w>"))
        tokens.append(body + b" " if token.endswith("</w>") else body)
    return {token: rank for rank, token in enumerate(tokens)}


def clip_vocab_file(path: str | Path | None = None) -> Path:
    """Where CLIP's vocabulary file is: at `path`, in a package, in the cache, else fetched there.

    Raises:
        UserError: when it is nowhere and cannot be fetched.
    """
    if path is not None:
        return Path(path)
    for package in ("open_clip", "clip"):
        found = importlib.util.find_spec(package)  # finds the folder and imports nothing
        for folder in (found and found.submodule_search_locations) or ():
            if (Path(folder) / CLIP_VOCAB).is_file():
                return Path(folder) / CLIP_VOCAB
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / "superclass" / CLIP_VOCAB
    if not file.is_file():
        print(f"fetching CLIP's vocabulary (1.3 MB) from {CLIP_URL} to {file}", flush=True)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(CLIP_URL, str(file), CLIP_SHA256, progress=False)
        except (OSError, HTTPException, RuntimeError) as error:  # the last for a wrong SHA-256
            raise UserError(
                f"CLIP's vocabulary could not be fetched from {CLIP_URL} ({error}): put that file "
                f"at {file}, or name it by --clip-vocab, or pip install open_clip_torch, which "
                "brings it, or use --tokenizer bpe:512, which needs no file"
            ) from None
    return file


def load_clip(path: str | Path | None = None) -> ClipTokenizer:
    """CLIP's tokenizer from its vocabulary file, whose SHA-256 must be the published one's."""
    file = clip_vocab_file(path)
    try:
        vocab = file.read_bytes()
    except OSError as error:
        raise UserError(f"CLIP's vocabulary {file} cannot be read: {error.strerror}") from None
    if hashlib.sha256(vocab).hexdigest() != CLIP_SHA256:
        raise UserError(
            f"{file} is not CLIP's vocabulary, for its SHA-256 does not begin with "
            f"{CLIP_SHA256[:12]}: replace it by {CLIP_URL}, or name another file by --clip-vocab"
        )
    return ClipTokenizer(
        "clip", pat_str="[^ ]+ ", mergeable_ranks=clip_ranks(vocab), special_tokens=CLIP_MARKS
    )


# ------------------------------------------------------------------------------------------------
# Tokenizers learned from the captions.


def learn_bpe(captions: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al., 2016) of at most `vocab_size` tokens: bytes -> rank.

    The first 256 are the bytes. Each further token joins the pair that is most frequent then, the
    smaller pair of bytes among equals; when no pair occurs twice, the vocabulary stays smaller.
    """
    counts = Counter(word for caption in captions for word in regex.findall(WORDS, plain(caption)))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    pairs, where = Counter(), defaultdict(set)  # pair -> its frequency, and the words that hold it
    for i, (parts, n) in enumerate(words):
        for pair in itertools.pairwise(parts):
            pairs[pair] += n
            where[pair].add(i)

    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        # Two different pairs may spell the same token; it keeps its first rank.
        ranks.setdefault(b"".join(best), len(ranks))
        for i in where.pop(best):
            parts, n = words[i]
            for pair in itertools.pairwise(parts):
                pairs[pair] -= n
            merged, j = [], 0
            while j < len(parts):
                size = 2 if tuple(parts[j : j + 2]) == best else 1
                merged.append(b"".join(parts[j : j + size]))
                j += size
            parts[:] = merged
            for pair in itertools.pairwise(parts):
                pairs[pair] += n
                where[pair].add(i)
        pairs = +pairs  # drop the pairs that are gone
    return ranks


class WordTokenizer:
    """Whole words as labels, the baseline of Table 4: letters only, lower case, unknown ones lost.

    Args:
        words: the vocabulary, in the order of its ids.
        unknown: the share, 0 to 1, of the words that it was learned from which it leaves out.
    """

    def __init__(self, words: list[str], unknown: float = 0.0):
        self.words, self.unknown = words, unknown
        self.ids = {word: i for i, word in enumerate(words)}
        self.n_vocab = len(words)

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids[word] for word in letter_words(text) if word in self.ids]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def letter_words(text: str) -> list[str]:
    return regex.findall(r"\p{L}+", text.lower())


def learn_words(captions: Iterable[str], n: int) -> WordTokenizer:
    """The n most frequent words of the captions; among equals, the first in the alphabet.

    Raises:
        UserError: when there are fewer than n different words.
    """
    counts = Counter(word for caption in captions for word in letter_words(caption))
    if len(counts) < n:
        raise UserError(
            f"--tokenizer words:{n}: the captions that it learns from hold only {len(counts)} "
            "different words; use a smaller number or more captions"
        )
    words = sorted(counts, key=lambda word: (-counts[word], word))[:n]
    return WordTokenizer(words, 1 - sum(counts[word] for word in words) / counts.total())


# ------------------------------------------------------------------------------------------------
# What --tokenizer names.


def load_tokenizer(
    spec: str, captions: Iterable[str] | None = None, clip_vocab: str | Path | None = None
):
    """A tokenizer with `.encode_ordinary(text)`, `.decode(ids)` and `.n_vocab`.

    Args:
        spec: "bpe:N", learned here from `captions`, with at most N ids; "words:N", their N most
            frequent words; "clip", the paper's; the path of a `.tiktoken` file, alone or in its
            run's folder; or a name that tiktoken knows, such as "gpt2".
        captions: text to learn from; only "bpe:N" and "words:N" need it.
        clip_vocab: CLIP's vocabulary file; by default `clip_vocab_file` looks for it.
    Raises:
        UserError: for an unknown spec, an unusable file, a file that cannot be fetched, or too few
            words.
    """
    kind, colon, number = spec.partition(":")
    if colon and kind in ("bpe", "words"):
        least, why = (256, "256, its single bytes") if kind == "bpe" else (1, "1")
        if not number.isdecimal() or int(number) < least:
            raise UserError(f"--tokenizer {spec}: {kind}:N needs a number N of at least {why}")
        if kind == "words":
            return learn_words(captions, int(number))
        ranks = learn_bpe(captions, int(number))
        return tiktoken.Encoding(spec, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    if spec == "clip":
        return load_clip(clip_vocab)
    if spec.endswith(".tiktoken"):
        # Another run's file needs the rest of that tokenizer, which stands beside it.
        config = {"tokenizer_kind": "bpe", "words": WORDS, "special_tokens": {}}
        beside = Path(spec).with_name("config.json")
        return read_tokenizer(
            spec, config | (json.loads(beside.read_text()) if beside.is_file() else {})
        )
    if spec not in tiktoken.list_encoding_names():
        names = ", ".join(tiktoken.list_encoding_names())
        raise UserError(
            f"unknown tokenizer '{spec}': use bpe:N, words:N, clip, a .tiktoken file, or one of "
            f"{names}"
        )
    try:
        return tiktoken.get_encoding(spec)
    except requests.RequestException as error:
        url = error.request.url if error.request is not None else "its address"
        raise UserError(
            f"tokenizer '{spec}' could not be fetched from {url}: put that file, under the name "
            f"{hashlib.sha1(url.encode()).hexdigest()}, into the folder that the environment "
            "variable TIKTOKEN_CACHE_DIR names, or use --tokenizer bpe:512, which needs no network"
        ) from None


# ------------------------------------------------------------------------------------------------
# A run's tokenizer: its vocabulary in `tokenizer.tiktoken`, the rest in `config.json`.


def save_tokenizer(tokenizer, path: str | Path):
    """Write a tokenizer's vocabulary as a `.tiktoken` file."""
    if isinstance(tokenizer, WordTokenizer):
        ranks = {word.encode(): i for word, i in tokenizer.ids.items()}
    else:
        ranks = tokenizer._mergeable_ranks
    lines = sorted(ranks.items(), key=lambda item: item[1])
    Path(path).write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in lines))


def tokenizer_config(tokenizer) -> dict:
    """What `read_tokenizer` must know beside the vocabulary, for JSON."""
    if isinstance(tokenizer, WordTokenizer):
        return {"tokenizer_kind": "words", "unknown_words": tokenizer.unknown}
    return {
        "tokenizer_kind": "clip" if isinstance(tokenizer, ClipTokenizer) else "bpe",
        "words": tokenizer._pat_str,
        "special_tokens": tokenizer._special_tokens,
    }


def read_tokenizer(path: str | Path, config: dict):
    """The tokenizer that `save_tokenizer` wrote to `path`, with its `tokenizer_config`.

    The same ids come out, whatever it was made from, and nothing but that file is needed.
    """
    if config["tokenizer_kind"] == "words":
        ranks = read_lines(path)
        words = [word.decode() for word in sorted(ranks, key=ranks.get)]
        return WordTokenizer(words, config["unknown_words"])
    encoding = ClipTokenizer if config["tokenizer_kind"] == "clip" else tiktoken.Encoding
    return encoding(
        str(path),
        pat_str=config["words"],
        mergeable_ranks=read_ranks(path),
        special_tokens=config["special_tokens"],
    )


def read_lines(path: str | Path) -> dict[bytes, int]:
    """Read a `.tiktoken` file: a line for each token, its bytes in base64 and its rank."""
    try:
        lines = [line.split() for line in Path(path).read_bytes().splitlines() if line]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    except OSError as error:
        raise UserError(f"tokenizer file {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(
            f"{path} is not a .tiktoken file: each line holds a token in base64 and its rank"
        ) from None
    if len(set(ranks.values())) < len(lines):
        raise UserError(f"{path} is no complete vocabulary: ranks are doubled")
    return ranks


def read_ranks(path: str | Path) -> dict[bytes, int]:
    """Read the `.tiktoken` file of a byte-pair encoding, which holds every single byte."""
    ranks = read_lines(path)
    if not all(bytes([b]) in ranks for b in range(256)):
        raise UserError(f"{path} is no complete vocabulary of byte pairs: bytes are missing")
    return ranks
