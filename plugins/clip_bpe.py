"""CLIP's tokenizer, the paper's: OpenCLIP's ids at several times its speed.

--tokenizer clip
"""

import gzip
import html
import importlib.util
import re
from pathlib import Path
from unicodedata import is_normalized

import ftfy
import regex
import tiktoken
from ftfy.badness import MOJIBAKE_CATEGORIES, is_bad
from tiktoken.load import check_hash, read_file_cached

from plugins.bpe import BytePairs, fetching

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

# ftfy's `is_bad` tries dozens of patterns at every character. Each contains one of ŒœÃÂЂ, or two
# characters of its categories, the second not among the plain letters of Greek and Cyrillic.
ANY = "".join(MOJIBAKE_CATEGORIES.values())
MARKED = "".join(chars for name, chars in MOJIBAKE_CATEGORIES.items() if "_common" not in name)
SUSPECT = re.compile(f"[{ANY}](?:[{MARKED}]|(?<=[ŒœÃÂЂ]))")


def repair(text: str) -> str:
    """`ftfy.fix_text(text)`, without calling it where it provably changes nothing.

    Apart from single characters, it changes HTML entities, text that is not in normal form C, and
    wrongly decoded lines. ASCII text has neither of the last two.
    """
    changed = REPLACED.search(text) or ("&" in text and ";" in text)
    if not changed and not text.isascii():
        changed = "\n" in text or not is_normalized("NFC", text)
        changed = changed or (SUSPECT.search(text) and is_bad(text))
    return ftfy.fix_text(text) if changed else text


class ClipTokenizer(BytePairs):
    """CLIP's byte-pair encoding (Radford et al., 2021): OpenCLIP's ids at tiktoken's speed.

    Both merge the neighbours whose union has the lowest rank, again and again. CLIP starts from 512
    letters: the 256 bytes, and the 256 bytes at the end of a word, written with </w>. tiktoken
    starts from the 256 bytes. Here a blank after each word, which contains none itself, stands for
    </w>: "A cat!" becomes "a ", "cat " and "! ". The pairs (byte, blank) have the ranks 256 to 511
    of CLIP's last letters. So they merge before all others, and each later merge keeps its id.

    The start and end ids 49406 and 49407 are never given: <|endoftext|> in a caption is only text.
    """

    def encode_ordinary(self, text: str) -> list[int]:
        text = repair(text)
        if "&" in text:  # some captions on the web were escaped twice: &amp;lt; for <
            text = html.unescape(html.unescape(text))
        text = " ".join(text.split()).lower()
        if not text.replace(" ", "").isalpha():
            # CLIP's pattern skips U+0345, a mark with a capital letter, as it skips white space.
            # A match may now have two blanks beside it; the second is no word and gives no id.
            text = " ".join(CLIP_CUT.split(text.replace("\u0345", " ")))
        return tiktoken.Encoding.encode_ordinary(self, text + " ")

    def spell(self, token: int) -> str:
        """A token as text; only the last piece of a word ends in a blank."""
        text = self.decode([token])
        return text.strip() + ("" if text.endswith(" ") else "-")


def open_tokenizer(arg: str, captions: object) -> ClipTokenizer:
    """CLIP's tokenizer, with 49,406 tokens and 2 special ones.

    Its vocabulary file comes from an installed package, else tiktoken fetches it once. Raises
    UserError when it cannot be fetched or is not the published file.
    """
    packages = map(importlib.util.find_spec, ("open_clip", "clip"))  # without importing them
    files = [Path(p.origin).with_name(CLIP_VOCAB) for p in packages if p and p.origin]
    vocab = next((file.read_bytes() for file in files if file.is_file()), b"")
    if not check_hash(vocab, CLIP_SHA256):
        with fetching("clip", "or pip install open_clip_torch, "):
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
