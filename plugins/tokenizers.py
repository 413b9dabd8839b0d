"""Other labels: words, the tokens of a Hugging Face file, captions without stop words.

--tokenizer words:N                    the N most frequent words (Table 4)
--tokenizer FILE.json                  a Hugging Face tokenizer, such as WordPiece (Table 5)
--tokenizer no-stopwords:SPEC          any other tokenizer, without stop words (Table 7)
"""

import json
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import regex

from data import UserError, load_tokenizer, read_tokenizer, save_tokenizer
from plugins.bpe import format_ranks, parse_ranks, plain

LETTERS = regex.compile(r"[\p{L}\p{M}]+")  # the words of `WordTokenizer`

# The function words of English, our own list. Table 7 of the paper removes such words.
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


def drop_stopwords(text: str) -> str:
    """Remove the STOPWORDS from a text and fold its white space (Table 7).

    Case, punctuation around a word, and endings such as 's do not matter: "The", "(the" and "it's"
    are removed, while "don't", "dog's" and "rock-and-roll" stay.
    """

    def core(word: str) -> str:
        return word.lower().replace("’", "'").strip(string.punctuation + "“”‘…").partition("'")[0]

    return " ".join(word for word in text.split() if core(word) not in STOPWORDS)


class WordTokenizer:
    """Whole words as labels (Table 4): letters only, lower case, unknown words dropped.

    `unknown` is the share, 0 to 1, of such words in the captions that the `words` come from.
    """

    def __init__(self, words: list[str], unknown: float):
        self.words, self.unknown, self.n_vocab = words, unknown, len(words)
        self.ids = {word: i for i, word in enumerate(words)}

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids[word] for word in LETTERS.findall(plain(text)) if word in self.ids]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids)

    def save(self) -> tuple[bytes, dict]:
        ranks = {word.encode(): i for word, i in self.ids.items()}
        return format_ranks(ranks), {"unknown_words": self.unknown}

    @classmethod
    def read(cls, content: bytes, config: dict) -> "WordTokenizer":
        ranks = parse_ranks(content)
        words = [word.decode() for word in sorted(ranks, key=ranks.get)]
        return cls(words, config["unknown_words"])


def open_words(number: str, captions: Iterable[str]) -> WordTokenizer:
    """A tokenizer of the n most frequent words; ties go to the word that sorts first."""
    n = int(number) if number.isdecimal() else 0
    if n < 1:
        raise UserError(f"--tokenizer words:{number}: words:N needs a number N of at least 1")
    counts = Counter(word for caption in captions for word in LETTERS.findall(plain(caption)))
    if len(counts) < n:
        raise UserError(f"--tokenizer words:{n}: there are only {len(counts)} different words")
    words = sorted(counts, key=lambda word: (-counts[word], word))[:n]
    return WordTokenizer(words, 1 - sum(counts[word] for word in words) / counts.total())


class JsonTokenizer:
    """A Hugging Face tokenizer.json, such as a WordPiece or SentencePiece one (Table 5).

    Special and unknown tokens say nothing about an image, so their ids are never given.
    """

    def __init__(self, text: str):
        from tokenizers import Tokenizer  # a package that nothing else needs

        self.text, self.model = text, Tokenizer.from_str(text)
        self.model.no_truncation()
        self.model.no_padding()
        self.n_vocab = 1 + max(self.model.get_vocab().values())
        model = json.loads(text)["model"]  # Unigram names its unknown token by id, others by text
        self.dropped = {model.get("unk_id"), self.model.token_to_id(model.get("unk_token") or "")}
        added = self.model.get_added_tokens_decoder()
        self.dropped |= {i for i, token in added.items() if token.special}
        # Most tokenizers add the blank before a text themselves, and two blanks may be a token.
        ids = self.model.encode("a a", add_special_tokens=False).ids
        self.adds_blank = ids[: len(ids) // 2] * 2 == ids

    def encode_ordinary(self, text: str) -> list[int]:
        text = plain(text).removeprefix(" ") if self.adds_blank else plain(text)
        ids = self.model.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self.dropped]

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids))

    def save(self) -> tuple[bytes, dict]:
        return self.text.encode(), {}

    @classmethod
    def read(cls, content: bytes, config: dict) -> "JsonTokenizer":
        return cls(content.decode())


def open_json(path: str, captions: object) -> JsonTokenizer:
    return read_tokenizer(Path(path), {"tokenizer_kind": "tokenizers.JsonTokenizer"})


class WithoutStopwords:
    """Another tokenizer that does not see function words (Table 7)."""

    def __init__(self, other):
        self.other, self.n_vocab, self.decode = other, other.n_vocab, other.decode

    def encode_ordinary(self, text: str) -> list[int]:
        return self.other.encode_ordinary(drop_stopwords(text))

    def save(self) -> tuple[bytes, dict]:
        content, settings = save_tokenizer(self.other)
        return content, {"without_stopwords": settings}

    @classmethod
    def read(cls, content: bytes, config: dict) -> "WithoutStopwords":
        settings = config["without_stopwords"]
        return cls(read_tokenizer(content, settings))


def open_without_stopwords(spec: str, captions: Iterable[str]) -> WithoutStopwords:
    return WithoutStopwords(load_tokenizer(spec, captions))
