"""Tokenizers: they turn captions into token ids, the labels of SuperClass.

`load_tokenizer` makes the tokenizer that --tokenizer names. `caption_labels` turns a caption into
its set of labels (section 3 of the paper). `save_tokenizer`, `tokenizer_config` and
`read_tokenizer` keep a tokenizer with its run.
"""

import base64
import gzip
import html
import importlib.util
import itertools
import json
import re
import string
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import regex
import tiktoken
from ftfy.badness import is_bad
from tiktoken.load import check_hash, read_file_cached


class UserError(Exception):
    """A mistake of the user, reported in one sentence: what is wrong, where, and what to do."""


# How a caption is cut into words, each with the blank before it, as in GPT-2's tokenizer.
WORDS = r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+"
LETTERS = regex.compile(r"\p{L}+")  # the words of `WordTokenizer`

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


def plain(text: str) -> str:
    """Lower case, with one blank before each word: "Dog", "a dog" and "a  dog" share a label."""
    return " ".join(["", *text.lower().split()])


def caption_tokens(caption: str, tokenizer, max_tokens=77, without_stopwords=False) -> list[int]:
    """The ids of a caption's first `max_tokens` tokens: in order, repeats kept, no special ids."""
    text = drop_stopwords(caption) if without_stopwords else caption
    # CLIP's tokenizer repairs the text and replaces HTML entities before it lower-cases it.
    text = text if isinstance(tokenizer, ClipTokenizer) else plain(text)
    return tokenizer.encode_ordinary(text)[:max_tokens]


def caption_labels(caption: str, tokenizer, max_tokens=77, without_stopwords=False) -> list[int]:
    """The label set of a caption (section 3): the sorted, distinct ids of its `caption_tokens`."""
    return sorted(set(caption_tokens(caption, tokenizer, max_tokens, without_stopwords)))


CLIP_VOCAB = "bpe_simple_vocab_16e6.txt.gz"
CLIP_URL = f"https://github.com/openai/CLIP/raw/main/clip/{CLIP_VOCAB}"
CLIP_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"

# CLIP cuts text into English endings, runs of letters, single digits, and runs of anything else.
# This finds all but the letters. CLIP ignores case, so a long s (ſ) counts as an s.
CLIP_CUT = regex.compile(r"('(?:[sſtmd]|re|ve|ll)|\p{N}|[^ \p{L}\p{N}]+)")

# ftfy replaces these characters wherever they are: control characters, ligatures, curly quotes,
# line separators, full and half width forms, and surrogates.
REPLACED = re.compile(
    r"[\x00-\x08\x0B\x0D-\x1F\x7F-\x9F\u0132\u0133\u0149\u01C4-\u01CC\u01F1-\u01F3\u02BC"
    r"\u2018-\u201F\u2028\u2029\u206A-\u206F\u3000\uD800-\uDFFF\uFB00-\uFB06\uFEFF\uFF01-\uFFFC]"
)


def repair(text: str) -> str:
    """`ftfy.fix_text(text)`, without calling it where it provably changes nothing.

    Apart from single characters, it changes HTML entities, text that is not in normal form C, and
    wrongly decoded lines. ASCII text has neither of the last two.
    """
    changed = REPLACED.search(text) or ("&" in text and ";" in text)
    if not changed and not text.isascii():
        changed = "\n" in text or is_bad(text) or not is_normalized("NFC", text)
    return ftfy.fix_text(text) if changed else text


class ClipTokenizer(tiktoken.Encoding):
    """CLIP's byte-pair encoding (Radford et al., 2021): OpenCLIP's ids at tiktoken's speed.

    Both merge the neighbours whose union has the lowest rank, again and again. CLIP starts from 512
    letters: the 256 bytes, and the 256 bytes at the end of a word, written with </w>. tiktoken
    starts from the 256 bytes. Here a blank after each word, which contains none itself, stands for
    </w>: "A cat!" becomes "a ", "cat " and "! ". The pairs (byte, blank) have the ranks 256 to 511
    of CLIP's last letters. So they merge before all others, and each later merge keeps its id.

    The start and end ids 49406 and 49407 are never given: <|endoftext|> in a caption is only text.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        # Some captions on the web were escaped twice: &amp;lt; for <.
        text = html.unescape(html.unescape(repair(text)))
        # CLIP's pattern skips U+0345, a mark whose capital is a letter, as it skips white space.
        text = " ".join(text.split()).lower().replace("\u0345", " ")
        # A match may now have two blanks beside it; the second is no word and gives no id.
        return super().encode_ordinary(" ".join(CLIP_CUT.split(text)) + " ")


def load_clip() -> ClipTokenizer:
    """CLIP's tokenizer, with 49,406 tokens and 2 special ones.

    Its vocabulary file comes from an installed package, else tiktoken fetches it once. Raises
    OSError when it cannot be fetched and ValueError when it is not the published file.
    """
    packages = map(importlib.util.find_spec, ("open_clip", "clip"))  # without importing them
    files = [Path(p.origin).with_name(CLIP_VOCAB) for p in packages if p and p.origin]
    vocab = next((file.read_bytes() for file in files if file.is_file()), b"")
    if not check_hash(vocab, CLIP_SHA256):
        vocab = read_file_cached(CLIP_URL, CLIP_SHA256)
    # The file writes a byte as its Latin-1 character if that is visible, else as one from 256 on.
    # The ids of the bytes follow this order. A blank is written as Ġ.
    visible = [b for b in range(256) if chr(b).isprintable() and chr(b) != " "]
    others = [b for b in range(256) if b not in visible]
    letters = {chr(b): bytes([b]) for b in visible}
    letters |= {chr(256 + i): bytes([b]) for i, b in enumerate(others)}
    tokens = [*letters.values(), *(letter + b" " for letter in letters.values())]
    # The first line is a title, and CLIP uses only as many merges as make 49,406 tokens.
    merges = gzip.decompress(vocab).decode("utf-8").split("\n")[1:]
    for merge in merges[: 49406 - len(tokens)]:
        token = merge.replace(" ", "").replace("</w>", "Ġ")
        tokens.append(b"".join(letters[c] for c in token))
    ranks = {token: rank for rank, token in enumerate(tokens)}
    special = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return ClipTokenizer("clip", pat_str="[^ ]+ ", mergeable_ranks=ranks, special_tokens=special)


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


class WordTokenizer:
    """Whole words as labels (Table 4): letters only, lower case, unknown words dropped.

    `unknown` is the share, 0 to 1, of such words in the captions that the `words` come from.
    """

    def __init__(self, words: list[str], unknown: float):
        self.words, self.unknown, self.n_vocab = words, unknown, len(words)
        self.ids = {word: i for i, word in enumerate(words)}

    def encode_ordinary(self, text: str) -> list[int]:
        return [self.ids[word] for word in LETTERS.findall(text.lower()) if word in self.ids]

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def learn_words(captions: Iterable[str], n: int) -> WordTokenizer:
    """A tokenizer of the n most frequent words; ties go to the word that sorts first."""
    counts = Counter(word for caption in captions for word in LETTERS.findall(caption.lower()))
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
        text = text.removeprefix(" ") if self.adds_blank else text
        ids = self.model.encode(text, add_special_tokens=False).ids
        return [i for i in ids if i not in self.dropped]

    def decode(self, ids: Iterable[int]) -> str:
        return self.model.decode(list(ids))


def load_tokenizer(spec: str, captions: Iterable[str] | None = None):
    """A tokenizer with `.encode_ordinary(text)`, `.decode(ids)` and `.n_vocab`.

    Args:
        spec: "bpe:N" or "words:N", at most N byte pairs or the N most frequent words of `captions`;
            "clip", the paper's; the path of a Hugging Face `.json` or another run's `.tiktoken`
            file; or a name that tiktoken knows, such as "gpt2".
    Raises:
        UserError: for an unknown spec, too few words, or an unusable or missing file.
    """
    kind, _, number = spec.partition(":")
    if kind in ("bpe", "words"):
        least = 256 if kind == "bpe" else 1  # byte pairs begin with the 256 bytes
        if not number.isdecimal() or int(number) < least:
            raise UserError(f"--tokenizer {spec}: {kind}:N needs a number N of at least {least}")
        if kind == "words":
            return learn_words(captions, int(number))
        ranks = learn_bpe(captions, int(number))
        return tiktoken.Encoding(spec, pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})
    if spec.endswith(".json"):
        return read_tokenizer(spec, {"tokenizer_kind": "json"})
    if spec.endswith(".tiktoken"):
        config = {"tokenizer_kind": "bpe", "words": WORDS, "special_tokens": {}}
        beside = Path(spec).with_name("config.json")  # the rest of a run's tokenizer
        if beside.is_file():
            try:
                config |= json.loads(beside.read_text())
            except (ValueError, TypeError) as error:  # not JSON, or not an object
                raise UserError(f"{beside} is damaged: {error}") from None
        return read_tokenizer(spec, config)
    names = tiktoken.list_encoding_names()
    if spec not in ("clip", *names):
        raise UserError(
            f"unknown tokenizer '{spec}': use bpe:N, words:N, clip, a .json or .tiktoken file, or "
            f"one of {', '.join(names)}"
        )
    try:
        return load_clip() if spec == "clip" else tiktoken.get_encoding(spec)
    except (OSError, ValueError) as error:
        raise UserError(
            f"tokenizer '{spec}' cannot be fetched ({error}): fetch it where there is a network, "
            "with the environment variable TIKTOKEN_CACHE_DIR naming a folder, and copy that here, "
            "or use --tokenizer bpe:512 (for clip, pip install open_clip_torch also helps)"
        ) from None


def tokenizer_config(tokenizer) -> dict:
    """The entries of config.json that `read_tokenizer` needs besides the file."""
    if isinstance(tokenizer, JsonTokenizer):
        return {"tokenizer_kind": "json"}
    if isinstance(tokenizer, WordTokenizer):
        return {"tokenizer_kind": "words", "unknown_words": tokenizer.unknown}
    kind = "clip" if isinstance(tokenizer, ClipTokenizer) else "bpe"
    words, special = tokenizer._pat_str, tokenizer._special_tokens
    return {"tokenizer_kind": kind, "words": words, "special_tokens": special}


def save_tokenizer(tokenizer) -> bytes:
    """The content of a tokenizer's file: a line of base64 and rank for each token, or JSON."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.text.encode()
    if isinstance(tokenizer, WordTokenizer):
        ranks = {word.encode(): i for word, i in tokenizer.ids.items()}
    else:
        ranks = tokenizer._mergeable_ranks
    lines = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % i for token, i in lines)


def read_tokenizer(path: str | Path, config: dict):
    """The tokenizer whose `save_tokenizer` is in the file and whose `tokenizer_config` is given.

    Raises UserError when the file cannot be read or is damaged.
    """
    try:
        kind, content = config["tokenizer_kind"], Path(path).read_bytes()
        if kind == "json":
            return JsonTokenizer(content.decode())
        lines = [line.split() for line in content.splitlines()]
        ranks = {base64.b64decode(token, validate=True): int(rank) for token, rank in lines}
        if len(set(ranks.values())) < len(lines):
            raise ValueError("a token or a rank occurs twice")
        if kind == "words":
            words = [word.decode() for word in sorted(ranks, key=ranks.get)]
            return WordTokenizer(words, config["unknown_words"])
        if not all(bytes([b]) in ranks for b in range(256)):
            raise ValueError("single bytes are missing")
        encoding = ClipTokenizer if kind == "clip" else tiktoken.Encoding
        words, special = config["words"], config["special_tokens"]
        return encoding(str(path), pat_str=words, mergeable_ranks=ranks, special_tokens=special)
    except Exception as error:  # the tokenizers package raises no narrower class
        raise UserError(f"tokenizer file {path} cannot be read or is damaged: {error}") from None
