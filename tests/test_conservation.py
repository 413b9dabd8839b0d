"""Whatever a source holds is used, or counted under a reason: both sides, on hostile inputs.

What is there is counted here from the bytes on disk, without the program's readers. What became of
it is what the source yields, good and bad, and its `left_out`. In every input each image has other
bytes, so that an image with another's caption is noticed.

SUPERCLASS_FUZZ=2000 makes the random mutations ten times as many as the suite has.
"""

import gzip
import json
import os
import random
import re
import shutil
import signal
import struct
import tarfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (
    Augment,
    BadSample,
    CenterCrop,
    Prepare,
    Raw,
    Sample,
    UserError,
    load_source,
    load_tokenizer,
    open_image,
    to_rgb,
)
from plugins.shards import Shards, expand_shards
from plugins.start import init_encoder
from plugins.tokenizers import open_words
from superclass import ViT
from tests.conftest import encoded, picture, write_tar

TOKENIZER = load_tokenizer("bpe:256", [])
IMAGES = [encoded(picture(i, 8)) for i in range(8)]
CAPTIONS = [f"caption of {i}" for i in range(8)]
J, T = IMAGES, [text.encode() for text in CAPTIONS]
NFC, NFD = "caf\u00e9", "cafe\u0301"


def outcome(source) -> Counter:
    """How many samples are used, bad by kind, and what is left out; no pair may be wrong."""
    found = Counter()
    prepare = Prepare(CenterCrop(4), TOKENIZER)
    for _, raw in (pair for block in source.once(0, 1, 4, None) for pair in block):
        item = prepare(raw)
        found["used" if isinstance(item, Sample) else item.kind] += 1
        if isinstance(item, BadSample):
            assert len(str(item)) < 400
            str(item).encode()  # whatever is printed is printable
        elif (content := data.read_part(raw.image, "image")) in IMAGES:
            text = data.read_caption(raw.caption)
            assert CAPTIONS[IMAGES.index(content)] in text or "of" not in text
    # Only now, because shards count what they leave out as they are read.
    return found + Counter({f"left out: {rule}": n for rule, n in source.left_out.items()})


def expect(text: str) -> dict[str, int]:
    """ "2 used, 1 missing image" as a dictionary."""
    return {name: int(n) for n, name in (part.split(" ", 1) for part in text.split(", ") if part)}


# ------------------------------------------------------------------------------------------------
# Folders.


def build(folder: Path, files: dict) -> Path:
    """Write files; a Path is what a link points to, None a pipe."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Path):
            path.symlink_to(content)
        elif content is None:
            os.mkfifo(path)
        else:
            path.write_bytes(content)
    return folder


def files_below(folder: Path, around=()) -> int:
    """The files of a folder, also behind links, but a link to a folder around itself is one."""
    number, around = 0, (*around, os.path.realpath(folder))
    for entry in os.scandir(folder):
        inner = entry.is_dir() and os.path.realpath(entry.path) not in around
        number += files_below(Path(entry.path), around) if inner else 1
    return number


def check_folder(root: Path, class_names=None) -> Counter:
    """The account of a folder in files: those of samples, and those left out."""
    source = load_source(str(root), class_names=class_names)
    of_samples = len({part for row in source.rows for part in row[:2]} - {None})
    rules = {r: n for r, n in source.left_out.items() if not r.startswith("class of")}
    assert of_samples + sum(rules.values()) == files_below(root)
    found = outcome(source)
    samples = sum(n for reason, n in found.items() if not reason.startswith("left out"))
    assert samples == len(source)
    return found


PAIR = {"a/0.jpg": J[0], "a/0.txt": T[0], "b/1.jpg": J[1], "b/1.txt": T[1]}
BMP = encoded(picture(2, 8), "BMP")
FOLDERS = {
    "plain": ({}, "2 used"),
    "upper case": ({"c/2.JPG": J[2], "c/2.TXT": T[2]}, "3 used"),
    "bmp": ({"c/2.bmp": BMP, "c/2.txt": T[2]}, "3 used"),
    "no caption": ({"c/2.jpg": J[2]}, "2 used, 1 missing caption"),
    "no image": ({"c/2.txt": T[2]}, "2 used, 1 missing image"),
    "empty image": ({"c/2.jpg": b"", "c/2.txt": T[2]}, "2 used, 1 unreadable image"),
    "cut image": ({"c/2.jpg": J[2][:200], "c/2.txt": T[2]}, "2 used, 1 unreadable image"),
    "text as image": ({"c/2.png": b"<html>", "c/2.txt": T[2]}, "2 used, 1 unreadable image"),
    "not UTF-8": ({"c/2.jpg": J[2], "c/2.txt": b"\xff"}, "2 used, 1 unusable caption"),
    "empty caption": ({"c/2.jpg": J[2], "c/2.txt": b" \n"}, "2 used, 1 unusable caption"),
    "heic": (
        {"c/2.heic": b"ftypheic", "c/2.txt": T[2]},
        "2 used, 1 left out: file of another type (.heic), "
        "1 left out: text of an image of another type",
    ),
    "heic beside jpg": (
        {"a/0.HEIC": b"ftypheic"},
        "2 used, 1 left out: file of another type (.heic)",
    ),
    "checkpoints": ({".ipynb_checkpoints/2.jpg": J[2]}, "2 used, 1 left out: hidden file"),
    "a Mac": (
        {"a/._0.jpg": b"\0\5\x16\7", "a/._0.txt": b"\0", "a/.DS_Store": b""},
        "2 used, 3 left out: hidden file",
    ),
    "metadata": (
        {"a/0.json": b"{}", "LICENSE": b"", "Thumbs.db": b""},
        "2 used, 1 left out: file of another type (.json), 1 left out: file of another type "
        "(none), 1 left out: file of another type (.db)",
    ),
    "two texts": (
        {"a/0.TXT": T[0]},
        "2 used, 1 left out: file of another type (.txt)",
    ),
    "two images": ({"a/0.bmp": BMP}, "3 used"),
    "linked image": ({"c/2.jpg": Path("../x/3.jpg"), "x/3.jpg": J[3]}, "2 used, 2 missing caption"),
    "broken link": ({"c/2.jpg": Path("gone"), "c/2.txt": T[2]}, "2 used, 1 missing image"),
    "linked folder": ({"c": Path("a")}, "3 used"),
    "link to itself": ({"a/up": Path("..")}, "2 used, 1 left out: file of another type (none)"),
    "a pipe": ({"c/2.jpg": None, "c/2.txt": T[2]}, "2 used, 1 missing image"),
    "a folder called jpg": ({"c.jpg/2.jpg": J[2], "c.jpg/2.txt": T[2]}, "3 used"),
    "two forms": ({f"c/{NFC}.jpg": J[2], f"c/{NFD}.txt": T[2]}, "3 used"),
    "name not UTF-8": ({"c/\udcff.jpg": J[2], "c/\udcff.txt": b""}, "2 used, 1 unusable caption"),
    "a dot in the name": ({"c/v1.0.jpg": J[2], "c/v1.0.txt": T[2]}, "3 used"),
    "numbered": (
        {"00000/2.jpg": J[2], "00000/2.txt": T[2]},
        "3 used, 1 left out: class of a numbered folder",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_folders(tmp_path, name):
    files, expected = FOLDERS[name]
    assert check_folder(build(tmp_path, PAIR | files)) == expect(expected)


def test_linked_class_folders_are_classes(tmp_path):
    elsewhere = build(tmp_path / "else", {"2.jpg": J[2], "2.txt": T[2]})
    root = build(tmp_path / "set", PAIR | {"c": elsewhere, "d": elsewhere})
    assert load_source(str(root)).attributes == {"class": [["a"], ["b"], ["c"], ["d"]]}
    assert check_folder(root) == {"used": 4}


def test_hidden_and_numbered_folders_are_no_classes(tmp_path):
    files = {".ipynb_checkpoints/a.jpg": J[2], "00001/2.jpg": J[3], "7/3.jpg": J[4]}
    source = load_source(str(build(tmp_path, PAIR | files)))
    assert source.attributes == {"class": [["7"], ["a"], ["b"]]}


# ------------------------------------------------------------------------------------------------
# Tables. An input is a list of rows as they stand in the file, the header apart.

CSV, TSV = "filepath,caption\n", "filepath\tcaption\n"
LONG = "x " * 100_000
TABLES = {
    "plain": ("csv", CSV, ["0.jpg,caption of 0\n", "1.jpg,caption of 1"], "2 used"),
    "quoted": ("csv", CSV, ['0.jpg,"caption of 0, ""x"""\n', "1.jpg,caption of 1\n"], "2 used"),
    "two lines": ("csv", CSV, ['0.jpg,"caption\nof caption of 0"\n'], "1 used"),
    "commas": ("csv", CSV, ["0.jpg,a big, round, red ball\n", "1.jpg,x\n"],
               "1 unreadable row, 1 used"),
    "commas and label": ("csv", "filepath,caption,label\n", ["0.jpg,a, red ball,x\n"],
                         "1 unreadable row"),
    "too few": ("csv", CSV, ["0.jpg\n", "1.jpg,x\n"], "1 unreadable row, 1 used"),
    "open quote": ("csv", CSV, ['0.jpg,"never\n', "1.jpg,x\n", '2.jpg,"y, z"\n', "3.jpg,x\n"],
                   "1 unreadable row, 3 used"),
    "open quote at the end": ("csv", CSV, ["1.jpg,x\n", '0.jpg,"never'],
                              "1 used, 1 unreadable row"),
    "open quotes": ("csv", CSV, ['0.jpg,"x\n', '1.jpg,"y\n', "2.jpg,z\n"],
                    "2 unreadable row, 1 used"),
    "quote inside": ("csv", CSV, ['0.jpg,"a" b\n', "1.jpg,x\n"], "1 unreadable row, 1 used"),
    "inches": ("csv", CSV, ['0.jpg,a 5" pipe\n', "1.jpg,x\n"], "2 used"),
    "blank lines": ("csv", CSV, ["0.jpg,x\n", "\n", " \n", ",\n", "\n"],
                    "1 used, 4 left out: blank line"),
    "a blank after commas": ("csv", "filepath, caption\n", ['0.jpg, "x, y"\n', "1.jpg, x\n"],
                             "2 used"),
    "Windows": ("csv", "\ufefffilepath,caption\r\n", ["0.jpg,x\r\n", "1.jpg,y\r\n"], "2 used"),
    "long": ("csv", CSV, [f"0.jpg,{LONG}\n", "1.jpg,x\n"], "2 used"),
    "not UTF-8": ("csv", CSV, ["0.jpg,\udcff\n", "\udcff.jpg,x\n"],
                  "1 unusable caption, 1 missing image"),
    "question not UTF-8": ("csv", "filepath,caption,question\n", ["0.jpg,x,\udcff\n", "1.jpg,x,\n"],
                           "1 unusable caption, 1 used"),
    "NaN": ("csv", CSV, ["0.jpg,nan\n", "nan,x\n", "1.jpg,x\n"],
            "1 missing caption, 1 missing image, 1 used"),
    "a folder": ("csv", CSV, [".,x\n", "/dev/zero,x\n", "0.jpg,x\n"], "2 missing image, 1 used"),
    "upper case": ("CSV", CSV, ["0.jpg,x\n"], "1 used"),
    "gzip": ("csv.gz", CSV, ["0.jpg,x\n", "1.jpg,x\n"], "2 used"),
    "tab opens with a quote": ("tsv", TSV, ['0.jpg\t"never\n', "1.jpg\tx\n"], "2 used"),
    "tab with quotes": ("tsv", TSV, ['0.jpg\t"a" b\n', '1.jpg\t"a"\n'], "2 used"),
    "tab too many": ("tsv", TSV, ["0.jpg\ta\tb\n", "1.jpg\tx\n", "\n"],
                     "1 unreadable row, 1 used, 1 left out: blank line"),
    "a separator that is none": ("tsv", TSV, ["0.jpg\ta\u2028b\x0cc\x85d\n"], "1 used"),
    "JSON lines": ("jsonl", "", ['{"filepath": "0.jpg", "caption": "x"}\n', "\n", "[]\n", "{\n",
                                 '{"filepath": 3, "caption": "x"}\n', '{"caption": "x"}\n', "{}\n",
                                 '{"filepath": "1.jpg", "caption": "x", "caption": "y"}\n', "\n"],
                   "1 used, 6 unreadable row, 2 left out: blank line"),
    "JSON's NaN": ("jsonl", "", ['{"filepath": "0.jpg", "caption": NaN}\n',
                                 '{"filepath": "0.jpg", "caption": "x", "label": NaN}\n',
                                 '{"filepath": "0.jpg", "caption": null}\n'],
                   "1 unreadable row, 1 used, 1 missing caption"),
    "JSON gzip": ("jsonl.gz", "", ['{"filepath": "0.jpg", "caption": "x"}\n'], "1 used"),
    "half a pair": ("jsonl", "", ['{"filepath": "0.jpg", "caption": "\\ud83d"}\n',
                                  '{"filepath": "\\ud83d", "caption": "x"}\n'],
                    "1 unusable caption, 1 missing image"),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path, name):
    kind, header, rows, expected = TABLES[name]
    build(tmp_path, {f"{i}.jpg": J[i] for i in range(4)})
    content = (header + "".join(rows)).encode("utf-8", "surrogateescape")
    path = tmp_path / f"t.{kind}"
    path.write_bytes(gzip.compress(content) if kind.endswith("gz") else content)
    found = outcome(load_source(str(path)))
    assert found == expect(expected) and found.total() == len(rows)


def test_a_json_list_is_a_table(tmp_path):
    build(tmp_path, {"0.jpg": J[0]})
    (tmp_path / "t.json").write_text('[{"filepath": "0.jpg", "caption": "x"}, 3, {}]')
    assert outcome(load_source(str(tmp_path / "t.json"))) == {"used": 1, "unreadable row": 2}


def test_labels_that_are_not_given_are_no_class(tmp_path):
    rows = [{"filepath": f"{i}.jpg", "caption": "x", "label": label}
            for i, label in enumerate([float("nan"), None, "", 3.0, 3, "3", NFC, NFD])]  # fmt: skip
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = load_source(str(tmp_path / "t.jsonl"))
    assert source.attributes == {"class": [["3"], [NFC]]}
    assert [source.raw(i).targets[0] for i in range(8)] == [-1, -1, -1, 0, 0, 0, 1, 1]
    (tmp_path / "t.csv").write_text("filepath,caption,label\na,b,nan\na,b,NaN\na,b,3.0\na,b,x\n")
    assert load_source(str(tmp_path / "t.csv")).attributes == {"class": [["3"], ["x"]]}


@pytest.mark.parametrize("name, content, message", [
    ("t.csv", b"file,text\na,b\n", "found: file, text"),
    ("t.csv", b"filepath,caption,caption\na,b,c\n", "one column 'caption', not 2"),
    ("t.csv", CSV.encode(), "holds no row"),
    ("t.csv", "filepath,caption\na,b\n".encode("utf-16"), "needs the columns"),
    ("t.json", b'{"images": []}', "no list of objects"),
    ("t.json", b"[", "not JSON"),
    ("t.csv.gz", b"what?", "needs the columns"),
    ("t.parquet", b"PAR1", "the type of .* is not read"),
    ("t.zip", b"PK", "the type of .* is not read"),
])  # fmt: skip
def test_tables_that_are_none_say_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_source(str(tmp_path / name))
    str(error.value).encode()


def test_a_table_that_is_cut_off_in_its_gzip_says_so(tmp_path):
    build(tmp_path, {"0.jpg": J[0]})
    rows = "".join(f"0.jpg,{random.Random(i).random()}\n" for i in range(5000))
    content = gzip.compress((CSV + rows).encode())
    (tmp_path / "t.csv.gz").write_bytes(content[: len(content) // 2])
    source = load_source(str(tmp_path / "t.csv.gz"))
    assert 1000 < len(source) < 5000 and "end-of-stream" in str(source.raw(len(source) - 1))


# ------------------------------------------------------------------------------------------------
# Shards.


def count_members(content: bytes) -> tuple[int, bool]:
    """The members of a tar file up to a broken header, by the format's definition; if it is whole.

    A header is 512 bytes with the name at 0, the size at 124 and, at 148, the sum of all bytes
    with blanks in place of the sum itself. Two blocks of zeros end the archive.
    """
    at, number, ended = 0, 0, False
    while at + 512 <= len(content):
        block = content[at : at + 512]
        at += 512
        ended = not any(block)
        if not ended:
            stated = block[148:156].strip(b"\0 ")
            summed = sum(block) - sum(block[148:156]) + 8 * 32
            if not re.fullmatch(rb"[0-7]+", stated) or int(stated, 8) != summed:
                return number, False
            size = int(block[124:136].strip(b"\0 ") or b"0", 8)
            at += -(-size // 512) * 512
            if at > len(content):
                return number, False
            number += block[156:157] not in b"xgLK"  # these hold a long name of the next one
    return number, ended and at == len(content)


class Counted(Shards):
    """Counts the members that samples are made of."""

    members = 0

    def sample(self, parts, where, url):
        before = self.left[url].total()
        made = super().sample(parts, where, url)
        self.members += len(parts) - (self.left[url].total() - before)
        return made


def check_shard(path: Path, names=None) -> Counter:
    content = path.read_bytes()
    there, whole = count_members(gzip.decompress(content) if path.suffix != ".tar" else content)
    source = Counted(str(path), names)
    found = outcome(source)
    no_file = found["damaged shard"] - (not whole)
    accounted = source.members + source.left_out.total() + no_file
    if whole:
        assert accounted == there
    else:  # the sample that was being read when the damage came is one with it
        assert found["damaged shard"] and there - 3 <= accounted <= there
    return +found


def members(*numbers: int) -> list[tuple[str, bytes]]:
    return [m for i in numbers for m in ((f"{i}.jpg", J[i]), (f"{i}.txt", T[i]))]


def doubled(some: list) -> list:
    """As a Mac's tar has them."""
    return [m for name, content in some for m in ((f"._{name}", b"\0\5\x16\7"), (name, content))]


SHARDS = {
    "plain": (members(0, 1), "2 used"),
    "upper case": ([("0.JPG", J[0]), ("0.TXT", T[0])], "1 used"),
    "image twice": ([*members(0), ("0.jpg", J[1])], "1 used, 1 missing caption"),
    "sample twice": ([*members(0), ("0.jpg", J[1]), ("0.txt", T[1])], "2 used"),
    "image twice at first": ([("0.jpg", J[1]), *members(0)], "1 missing caption, 1 used"),
    "text twice": ([*members(0), ("0.txt", T[1])], "1 used, 1 missing image"),
    "apart": ([*members(0)[:1], *members(1), *members(0)[1:]],
              "1 missing caption, 1 used, 1 missing image"),
    "two cases": ([("0.jpg", J[0]), ("0.txt", T[0]), ("0.JPG", J[1])], "1 used, 1 missing caption"),
    "jpg and png": ([("0.jpg", J[0]), ("0.png", J[1]), ("0.txt", T[0])],
                    "1 used, 1 left out: file of another type (.png)"),
    "json": ([*members(0), ("0.json", b"{}"), ("1.json", b"{}"), *members(1)],
             "2 used, 2 left out: file of another type (.json)"),
    "a Mac": (doubled(members(0, 1)), "2 used, 4 left out: hidden file"),
    "a hidden folder": ([(".git/0.jpg", J[0]), *members(1)], "1 used, 1 left out: hidden file"),
    "from a folder": ([("./0.jpg", J[0]), ("./0.txt", T[0])], "1 used"),
    "from within a folder": ([("a/./0.jpg", J[0]), ("a/./0.txt", T[0])], "1 used"),
    "keys with dots": ([(f"v1.0_{n}", c) for n, c in members(0, 1, 2)], "3 used"),
    "keys with a dot at the end": ([("3.14.jpg", J[0]), ("3.14.txt", T[0]), ("3.5.jpg", J[1]),
                                    ("3.5.txt", T[1])], "2 used"),
    "web addresses": ([(f"www.example.com_{n}", c) for n, c in members(0, 1)], "2 used"),
    "a longer key": ([*members(0), ("0.5.jpg", J[1]), ("0.5.txt", T[1])], "2 used"),
    "segmentation": ([("0.jpg", J[0]), ("0.seg.png", J[1]), ("0.txt", T[0])],
                     "1 used, 1 left out: file of another type (.png)"),
    "a dot in a folder": ([(f"v1.0/{n}", c) for n, c in members(0, 1)], "2 used"),
    "one key in two folders": ([("a/0.jpg", J[0]), ("b/0.txt", T[1])],
                               "1 missing caption, 1 missing image"),
    "no ending": ([("README", b"x"), *members(0)],
                  "1 used, 1 left out: file of another type (none)"),
    "outside": ([("../0.jpg", J[0]), ("/1.jpg", J[1]), *members(2)], "2 damaged shard, 1 used"),
    "heic": ([("0.heic", b"x"), ("0.txt", T[0]), *members(1)], "1 unreadable image, 1 used"),
    "not UTF-8": ([("0.jpg", J[0]), ("0.txt", b"\xff"), ("\udcff.jpg", J[1])],
                  "1 unusable caption, 1 missing caption"),
    "empty members": ([("0.jpg", b""), ("0.txt", T[0]), ("1.jpg", J[1]), ("1.txt", b"")],
                      "1 unreadable image, 1 unusable caption"),
    "nothing": ([], ""),
}  # fmt: skip


@pytest.mark.parametrize("name", SHARDS)
def test_shards(tmp_path, name):
    some, expected = SHARDS[name]
    write_tar(tmp_path / "0.tar", some)
    assert check_shard(tmp_path / "0.tar") == expect(expected)


def test_folders_in_a_shard_are_left_out_and_links_are_not_read(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, kind in (("d", tarfile.DIRTYPE), ("d/0.jpg", tarfile.SYMTYPE)):
            info = tarfile.TarInfo(name)
            info.type = kind
            tar.addfile(info)
    found = check_shard(tmp_path / "0.tar")
    assert found == {"damaged shard": 1, "left out: folder in a shard": 1}


def whole(path: Path, *numbers: int) -> bytes:
    write_tar(path, members(*numbers))
    return path.read_bytes()


def test_shards_that_are_cut_or_joined(tmp_path):
    path = tmp_path / "0.tar"
    content = whole(path, 0, 1)
    end = len(content.rstrip(b"\0"))
    end += -end % 512
    for cut, used in ((end, 1), (end - 100, 1), (end - 1024, 1), (end + 512, 2), (3000, 0)):
        path.write_bytes(content[:cut])  # at the end: no mark says that nothing follows
        assert check_shard(path)["used"] == used, cut
    path.write_bytes(content + whole(tmp_path / "1.tar", 2, 3))
    assert check_shard(path) == {"used": 4}
    path.write_bytes(content + b"what is this?" * 100)
    assert check_shard(path) == {"used": 2, "damaged shard": 1}


def test_gzipped_shards_and_upper_case(tmp_path):
    for name in ("a.tar.gz", "b.tgz", "c.TGZ"):
        (tmp_path / name).write_bytes(gzip.compress(whole(tmp_path / "0.tar", 0, 1)))
        assert check_shard(tmp_path / name) == {"used": 2}
        assert len(load_source(str(tmp_path / name)).urls) == 1
    assert len(load_source(str(tmp_path)).urls) == 4


def test_joined_shards(tmp_path):
    for i in range(5):
        whole(tmp_path / f"{i}.tar", i)
    at = str(tmp_path)
    for spec, number in {
        f"{at}/0.tar::{at}/1.tar": 2,
        f"{at}/{{0..2}}.tar::{at}/4.tar": 4,
        f"{at}/0.tar::{at}/{{1,2}}.tar::{at}/[34].tar": 5,
        "::".join([f"{at}/0.tar"] * 300): 300,
    }.items():
        assert len(load_source(spec).urls) == number
    for chain in ("simplecache::s3://b/0.tar", "zip://0.tar::s3://b/a.zip"):
        assert expand_shards(chain) == [chain]


def test_what_lies_beside_shards_is_counted(tmp_path):
    whole(tmp_path / "0.tar", 0)
    build(tmp_path, {"0.parquet": b"", "._0.tar": b"", "sub/1.tar": b""})
    source = load_source(str(tmp_path))
    assert outcome(source) == {"used": 1, "left out: file or folder beside the shards": 3}


# ------------------------------------------------------------------------------------------------
# Names of classes.


def classes(tmp_path, names: str, folders: list[str]):
    """A source of a picture in each folder, with these names of classes."""
    (tmp_path / "names.txt").write_bytes(names.encode("utf-8"))
    files = {f"{folder}/{i}.jpg": J[i] for i, folder in enumerate(folders)}
    files |= {f"{folder}/{i}.txt": T[i] for i, folder in enumerate(folders)}
    root = build(tmp_path / "set", files)
    return check_folder(root, str(tmp_path / "names.txt")), load_source(
        str(root), class_names=str(tmp_path / "names.txt")
    )


@pytest.mark.parametrize("names, folders, targets", [
    ("cat\ndog\n", ["cat", "dog"], [0, 1]),
    ("cat\r\ndog\r\n\r\n", ["cat", "dog"], [0, 1]),
    ("\ufeffcat, kitten\ndog", ["kitten", "dog"], [1, 0]),
    ("hot dog\n", ["hot_dog", "hot dog"], [0, 0]),
    ("hot_dog\n", ["hot_dog", "hot dog"], [0, 0]),
    (f"{NFC}\n", [NFC, NFD], [0, 0]),
    (f"{NFD}\n", [NFC, NFD], [0, 0]),
    ("a\nb\n", ["0", "1"], [0, 1]),
    ("7\n3\n", ["3", "7", "1"], [-1, 1, 0]),
    ("a\x85b\nc\n", ["c"], [1]),
    ("cat\n", ["sorted", "00000"], []),
])  # fmt: skip
def test_names_of_classes(tmp_path, names, folders, targets):
    found, source = classes(tmp_path, names, folders)
    seen = [t for i in range(len(source)) for t in source.raw(i).targets]
    assert seen == targets and found["used"] == len(folders)
    unknown = sum(n for rule, n in found.items() if rule.startswith("left out: class of"))
    assert unknown == (targets.count(-1) if targets else len(folders))


def test_folders_that_are_no_class_are_named_with_what_comes_close(tmp_path, capsys):
    found, source = classes(tmp_path, "cat\nhot dog\n", ["Cat", "hot-dog", "zebra"])
    assert source.attributes == {} and found["used"] == 3
    said = capsys.readouterr().err
    assert "'Cat' is not in --class-names; close to it: 'cat'" in said
    assert "'hot-dog' is not in --class-names; close to it: 'hot dog'" in said
    assert "'zebra' is not in --class-names" in said and "zebra'; close" not in said


@pytest.mark.parametrize(
    "names", ["cat\ncat\n", "cat, x\ndog, x\n", f"{NFC}\n{NFD}\n", "a b\na_b\n"]
)
def test_two_classes_of_one_name_are_refused(tmp_path, names):
    with pytest.raises(UserError, match="names 2 classes"):
        classes(tmp_path, names, ["cat"])


def test_unknown_labels_of_tables_and_shards_are_named_with_what_comes_close(tmp_path):
    (tmp_path / "names.txt").write_text("cat\nhot dog\n")
    (tmp_path / "t.csv").write_text("filepath,caption,label\na,b,Hot-Dog\n")
    with pytest.raises(
        UserError, match="'Hot-Dog' is not in --class-names; close to it: 'hot dog'"
    ):
        load_source(str(tmp_path / "t.csv"), class_names=str(tmp_path / "names.txt"))
    write_tar(tmp_path / "0.tar", [*members(0), ("0.cls", b"Cat"), *members(1), ("1.cls", b"cat")])
    assert check_shard(tmp_path / "0.tar", [["cat"]]) == {"unknown label": 1, "used": 1}


# ------------------------------------------------------------------------------------------------
# Images that lie on their side, and other pixels.


def turned(image: Image.Image, orientation: int) -> tuple[Image.Image, Image.Exif]:
    """The image as a camera held that way stores it, and its EXIF."""
    how, exif = Image.Transpose, Image.Exif()
    exif[0x0112] = orientation
    stored = {1: None, 2: how.FLIP_LEFT_RIGHT, 3: how.ROTATE_180, 4: how.FLIP_TOP_BOTTOM,
              5: how.TRANSPOSE, 6: how.ROTATE_90, 7: how.TRANSVERSE, 8: how.ROTATE_270}  # fmt: skip
    return image.transpose(stored[orientation]) if orientation > 1 else image, exif


@pytest.mark.parametrize("view", [CenterCrop(16), Augment(16, 0.3, flip=True, color_jitter=0.3)])
@pytest.mark.parametrize("kind, options", [
    ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {"quality": 100}),
])  # fmt: skip
def test_sideways_pictures_are_seen_as_upright_ones(view, kind, options):
    """Also where a JPEG is decoded at a fraction; the same pixels give the same scores."""
    colours = np.random.default_rng(0).integers(0, 255, (3, 5, 3), dtype=np.uint8)
    upright = Image.fromarray(colours).resize((160, 96), Image.Resampling.BICUBIC)
    prepare = Prepare(view)
    wanted = prepare(Raw(encoded(upright, kind, **options), None), (1,)).image
    model = ViT(16, 8, 32, 1, 1).eval()
    for orientation in range(1, 9):
        stored, exif = turned(upright, orientation)
        file = encoded(stored, kind, exif=exif, **options)
        seen = prepare(Raw(file, None), (1,)).image
        if kind == "JPEG":
            assert (seen.int() - wanted.int()).abs().float().mean() < 3, orientation
        else:
            assert torch.equal(seen, wanted), orientation
            scores = [model(data.normalize(image[None])) for image in (seen, wanted)]
            assert torch.equal(*scores)


def test_exif_that_is_damaged_or_last_is_no_reason_to_lose_an_image():
    upright = picture(1, 24)
    prepare = Prepare(CenterCrop(8))
    plain = prepare(Raw(encoded(upright, "PNG"), None)).image
    for value in (b"Exif\0\0what", b"", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"):
        assert torch.equal(prepare(Raw(encoded(upright, "PNG", exif=value), None)).image, plain)
    stored, exif = turned(upright, 6)
    content = encoded(stored, "PNG")
    block = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    late = content[:-12] + chunk + content[-12:]  # after the pixels
    assert torch.equal(prepare(Raw(late, None)).image, plain)
    assert prepare(Raw(content[:-100], None)).kind == "unreadable image"


def png(depth: int, colours: int, row: bytes, level: bytes, width: int) -> bytes:
    """A PNG of one row, with a transparent level."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colours, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"tRNS", level) + pixels + chunk(b"IEND", b"")


def test_a_transparent_level_becomes_white():
    grey = to_rgb(open_image(png(16, 0, struct.pack(">3H", 0, 1000, 65535), b"\3\xe8", 3)))
    assert np.array(grey)[0].tolist() == [[0] * 3, [255] * 3, [255] * 3]
    colour = struct.pack(">6H", 1000, 2000, 3000, 30000, 30000, 30000)
    rgb = to_rgb(open_image(png(16, 2, colour, colour[:6], 2)))
    assert np.array(rgb)[0].tolist() == [[255] * 3, [117] * 3]


def test_other_formats_give_their_first_picture_and_unclear_pixels_are_bad():
    prepare = Prepare(CenterCrop(8))
    several = {"save_all": True, "append_images": [picture(1)]}
    for kind, options in (("BMP", {}), ("TIFF", several), ("GIF", several)):
        seen = prepare(Raw(encoded(picture(0), kind, **options), None)).image.float()
        first = prepare(Raw(encoded(picture(0), "PNG"), None)).image.float()
        assert (seen - first).abs().mean() < 8
    for pixels in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 10**6, np.int32)):
        file = encoded(Image.fromarray(pixels), "TIFF")
        assert prepare(Raw(file, None)).kind == "unreadable image"


# ------------------------------------------------------------------------------------------------
# Text, messages.


def test_a_text_has_one_form_whoever_wrote_it():
    captions = [f"un {NFC} noir", "हिन्दी में"] * 3
    for spec in ("bpe:300", "words:5"):
        tokenizer = load_tokenizer(spec, captions)
        labels = [data.caption_labels(text, tokenizer) for text in (NFC, NFD, NFD.upper())]
        assert labels[0] and labels[0] == labels[1] == labels[2]
    assert "हिन्दी" in open_words("5", captions).words
    assert data.read_caption(NFD) == data.read_caption(NFD.encode()) == NFC


def test_the_account_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"c/2.heic": b"", ".DS_Store": b"", "c/3.jpg": b"", "c/3.txt": T[3], "\udcff.jpg": J[4]}
    data.main([str(build(tmp_path / "set\udcff", PAIR | files)), "--image-size", "8"])
    said = capsys.readouterr()
    lines = [re.sub(r"\s+", " ", line).strip() for line in said.out.splitlines()]
    assert "looked at, of 4 pairs 4" in lines and "used 2" in lines
    assert "bad: unreadable image 1" in lines and "bad: missing caption 1" in lines
    assert "left out: hidden file 1" in lines
    assert "left out: file of another type (.heic) 1" in lines
    assert "left out 1 x hidden file" in said.err


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_models_are_taken_off(tmp_path, prefix):
    encoder, other = ViT(16, 8, 32, 1, 1), ViT(16, 8, 32, 1, 1)
    torch.save({prefix + k: v for k, v in encoder.state_dict().items()}, tmp_path / "e.pt")
    init_encoder(other, tmp_path / "e.pt")
    assert all(
        torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True)
    )


def test_unusable_weights_are_told_apart(tmp_path):
    encoder, path = ViT(16, 8, 32, 1, 1), tmp_path / "e.pt"
    torch.save(encoder, path)
    with pytest.raises(UserError, match=r"more than tensors; save a state_dict\(\)"):
        init_encoder(encoder, path)
    state = encoder.state_dict()
    state["norm.weight"][3] = torch.nan
    torch.save(state, path)
    with pytest.raises(UserError, match=r"norm\.weight holds NaN"):
        init_encoder(ViT(16, 8, 32, 1, 1), path)


# ------------------------------------------------------------------------------------------------
# Random mutations.


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """A byte changed, a part cut out, doubled or put in, or the end cut off."""
    at, end = sorted((rng.randrange(len(content) + 1), rng.randrange(len(content) + 1)))
    end = min(end, at + rng.choice((1, 40, 512, 5000)))
    return rng.choice((
        content[:at] + rng.randbytes(1) + content[at + 1 :],
        content[:at] + content[end:],
        content[:end] + content[at:],
        content[:at] + rng.choice((b'"', b"\0", b"\n", b"\r", b"\t", b",", b"\xff")) + content[at:],
        content[:at],
    ))  # fmt: skip


NAMES = ["{}.jpg", "._{}", ".{}.jpg", "{}.PNG", "{}.txt", "{}.heic", "{}.a.jpg", "{}", "x/{}.gif"]


def fuzz_folder(rng: random.Random, folder: Path):
    build(folder, PAIR | {"c/2.jpg": J[2], "c/2.txt": T[2]})
    for _ in range(rng.randrange(1, 4)):
        path = rng.choice([path for path in sorted(folder.rglob("*")) if path.is_file()])
        new = folder / rng.choice("abc") / rng.choice(NAMES).format(rng.randrange(4))
        new.parent.mkdir(exist_ok=True)
        action = rng.randrange(4)
        if action == 0:
            path.write_bytes(mutate_bytes(rng, path.read_bytes() or b"x"))
        elif new.exists() or new.is_symlink():
            continue
        elif action == 1:
            path.rename(new)
        elif action == 2:
            shutil.copy(path, new)
        else:
            new.symlink_to(rng.choice([folder, path, folder / "gone", folder / "a"]))
    check_folder(folder)


def fuzz_table(rng: random.Random, folder: Path):
    build(folder, {f"{i}.jpg": J[i] for i in range(4)})
    kind = rng.choice(("csv", "tsv", "jsonl"))
    rows = [{"filepath": f"{i}.jpg", "caption": f"a {i}, caption of {i}"} for i in range(4)]
    if kind == "jsonl":
        lines = [json.dumps(row) for row in rows]
    else:
        mark, quote = (",", '"') if kind == "csv" else ("\t", "")
        lines = [f"{row['filepath']}{mark}{quote}{row['caption']}{quote}" for row in rows]
        lines = [f"filepath{mark}caption", *lines]
    for _ in range(rng.randrange(2)):
        lines.insert(rng.randrange(1, len(lines) + 1), rng.choice([*lines, "", " "]))
    content = mutate_bytes(rng, "\n".join(lines).encode())
    (folder / f"t.{kind}").write_bytes(content)
    found = outcome(load_source(str(folder / f"t.{kind}")))
    there = re.split(rb"\r\n|\r|\n", content)
    there = len(there) - (kind != "jsonl") - (there[-1] == b"")
    if kind == "csv" and b'"' in content:  # a quoted field may hold ends of lines
        assert found.total() <= there
    else:
        assert found.total() == there


def fuzz_shard(rng: random.Random, folder: Path):
    some = members(0, 1, 2)
    for _ in range(rng.randrange(3)):
        i = rng.randrange(len(some))
        name = rng.choice((some[i][0], rng.choice(NAMES).format(rng.randrange(4))))
        some.insert(rng.randrange(len(some) + 1), (name, some[i][1]))
    write_tar(folder / "0.tar", some)
    if rng.random() < 0.7:
        (folder / "0.tar").write_bytes(mutate_bytes(rng, (folder / "0.tar").read_bytes()))
    check_shard(folder / "0.tar")


@pytest.mark.parametrize("fuzz", [fuzz_folder, fuzz_table, fuzz_shard])
def test_random_mutations_leave_no_hole(tmp_path, monkeypatch, fuzz):
    monkeypatch.setattr(Shards, "DELAYS", (0,))
    monkeypatch.setattr(data, "say_once", lambda _: None)
    # A wrong pair is only a mistake here if no mutation made it one.
    monkeypatch.setattr(f"{__name__}.CAPTIONS", [""] * 8)

    def too_slow(*_):
        raise TimeoutError("one mutation took more than 20 seconds")

    signal.signal(signal.SIGALRM, too_slow)
    refused, number = 0, int(os.environ.get("SUPERCLASS_FUZZ", 200)) // 3 + 1
    for seed in range(number):
        folder = tmp_path / str(seed)
        folder.mkdir()
        signal.alarm(20)
        try:
            fuzz(random.Random(seed), folder)
        except UserError:  # nothing is lost in silence
            refused += 1
        except Exception as error:
            raise AssertionError(f"mutation {seed}") from error
        finally:
            signal.alarm(0)
        shutil.rmtree(folder)
    assert refused < number / 2
