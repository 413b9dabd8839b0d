"""Byte pairs, by tiktoken: learned from the captions, published ones, or those of another run.

--tokenizer bpe:N                               at most N of them, learned from the captions
--tokenizer gpt2 | cl100k_base | o200k_base     published with tiktoken
--tokenizer RUN/tokenizer.tiktoken
"""

import base64
import contextlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import regex
import tiktoken

from data import UserError, normal, read_tokenizer

# How a caption is cut into words, each with the blank before it, as in GPT-2's tokenizer.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"


def plain(text: str) -> str:
    """Lower case in normal form, with one blank before each word, so that "Dog" and "a  dog" share
    a label, and so do the two ways to write é.
    """
    return normal(" ".join(["", *text.lower().split()]))


class BytePairs(tiktoken.Encoding):
    """Byte-pair encoding of plain text, by tiktoken.

    Every tokenizer has `encode_ordinary(text)` -> ids, `decode(ids)` -> text, `n_vocab`, and
    `save()`: the content of its file in a run's folder, and what config.json adds to that. Its
    class method `read(content, config)` makes it again.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        return super().encode_ordinary(plain(text))

    def save(self) -> tuple[bytes, dict]:
        settings = {"words": self._pat_str, "special_tokens": self._special_tokens}
        return format_ranks(self._mergeable_ranks), settings

    @classmethod
    def read(cls, content: bytes, config: dict) -> "BytePairs":
        ranks = parse_ranks(content)
        if not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("single bytes are missing")
        words, special = config.get("words", WORDS), config.get("special_tokens", {})
        return cls("bpe", pat_str=words, mergeable_ranks=ranks, special_tokens=special)


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """tiktoken's file format: a line of base64 and rank for each token."""
    lines = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in lines)


def parse_ranks(content: bytes) -> dict[bytes, int]:
    lines = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
    if len(set(ranks.values())) < len(lines):
        raise ValueError("a token or a rank occurs twice")
    return ranks


def open_tokenizer(size: str, captions: Iterable[str]) -> BytePairs:
    """`bpe:SIZE`, at most that many byte pairs, learned from captions."""
    if not size.isdecimal() or int(size) < 256:  # the first 256 tokens are the bytes
        raise UserError(f"--tokenizer bpe:{size}: bpe:N needs a number N of at least 256")
    ranks = learn_bpe(captions, int(size))
    return BytePairs("bpe", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})


def learn_bpe(captions: Iterable[str], vocab_size: int) -> dict[bytes, int]:
    """Byte-pair encoding (Sennrich et al., 2016) of at most `vocab_size` tokens: bytes -> rank.

    The first 256 tokens are the bytes. Each further token joins the most frequent pair; ties go to
    the pair that sorts first. The vocabulary stays smaller when no pair occurs twice.
    """
    counts = Counter(word for caption in captions for word in regex.findall(WORDS, plain(caption)))
    words = [([bytes([b]) for b in word.encode()], n) for word, n in sorted(counts.items())]
    pairs, where = Counter(), defaultdict(set)  # pair -> its frequency, and the words it occurs in

    def count(i: int, sign: int):
        parts, n = words[i]
        for pair in itertools.pairwise(parts):
            pairs[pair] += sign * n
            where[pair].add(i)

    for i in range(len(words)):
        count(i, 1)
    ranks = {bytes([b]): b for b in range(256)}
    while len(ranks) < vocab_size and pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        if pairs[best] < 2:
            break
        # Two different pairs may form the same token, which keeps its first rank.
        ranks.setdefault(b"".join(best), len(ranks))
        for i in where.pop(best):
            count(i, -1)
            parts, j = words[i][0], 0
            while j < len(parts) - 1:
                if (parts[j], parts[j + 1]) == best:
                    parts[j : j + 2] = [b"".join(best)]
                j += 1
            count(i, 1)
        pairs = +pairs  # without the pairs that are gone
    return ranks


@contextlib.contextmanager
def fetching(name: str, advice: str = ""):
    """What tiktoken raises when it cannot fetch a file, or fetches another, as a UserError."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer '{name}' cannot be fetched ({error}): fetch it where there is a network, "
            "with the environment variable TIKTOKEN_CACHE_DIR naming a folder, and copy that here, "
            f"{advice}or use --tokenizer bpe:512"
        ) from None


def open_known(name: str, arg: str, captions: object) -> BytePairs:
    """A published encoding; UserError when it cannot be fetched."""
    with fetching(name):
        known = tiktoken.get_encoding(name)
    ranks, special = known._mergeable_ranks, known._special_tokens
    return BytePairs(name, pat_str=known._pat_str, mergeable_ranks=ranks, special_tokens=special)


gpt2 = partial(open_known, "gpt2")
cl100k_base = partial(open_known, "cl100k_base")
o200k_base = partial(open_known, "o200k_base")


def open_saved(path: str, captions: object):
    """The tokenizer of another run; of byte pairs if the file stands alone."""
    beside = Path(path).with_name("config.json")
    try:
        config = json.loads(beside.read_text()) if beside.is_file() else {}
        return read_tokenizer(Path(path), {"tokenizer_kind": "bpe.BytePairs", **config})
    except (ValueError, TypeError) as error:  # not JSON, or not an object
        raise UserError(f"{beside} is damaged: {error}") from None
