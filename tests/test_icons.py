"""The icons set, from a small tarball of invented sets: what is in which split, and the bytes."""

import importlib.util
import io
import json
import re
import sys
import tarfile

import pytest
from PIL import Image

import train
from tests.conftest import ROOT, run_python, train_flags, write_tar

pytest.importorskip("resvg_py", reason="experiments/icons.py draws with it: pip install resvg-py")
SCRIPT = ROOT / "experiments" / "icons.py"
spec = importlib.util.spec_from_file_location("icons", SCRIPT)
sys.modules["icons"] = icons = importlib.util.module_from_spec(spec)  # processes look for it there
spec.loader.exec_module(icons)

LICENCE = {"bi": "MIT", "plain": "Apache-2.0", "emoji": "CC-BY-4.0"}
LICENCE |= {"shared": "CC-BY-SA-4.0", "paid": "CC-BY-NC-4.0", "free": "GPL-3.0", "logos": "MIT"}


def square(x: int, colour: str = "currentColor") -> dict:
    return {"body": f'<path fill="{colour}" d="M{x} 2h4v9h-4z"/>'}


SETS = {
    "bi": {"heart-fill": square(1), "unknown": square(2), "acorn": square(3), "heart": square(1)},
    "plain": {
        "star-outline": square(4),
        "bell2": square(5),
        "key-heart": square(6),
        "keyboards": square(7),
        "monkey": square(8),
        "copy-of-heart": square(1),  # the drawing code of a held-out icon
        "same-heart": {"body": '<rect fill="currentColor" x="1" y="2" width="4" height="9"/>'},
        "blank": {"body": "<g/>"},
        "broken": {"body": "<path"},
        "old-star": square(9) | {"hidden": True},
    },
    "emoji": {
        "red-apple": square(10, "#d02020"),
        "hand-dark-skin-tone": square(11, "#603020"),
        "chequered": square(0, "#202020"),
    },
    **{prefix: {"star": square(1)} for prefix in ("shared", "paid", "free", "logos")},
}


@pytest.fixture(scope="module")
def tarball(tmp_path_factory):
    collections, members = {}, []
    for prefix, drawings in SETS.items():
        info = {"name": f"The {prefix}", "license": {"spdx": LICENCE[prefix]}, "total": 1}
        info |= {"category": "Logos" if prefix == "logos" else "UI 24px"}
        collections[prefix] = info | {"palette": prefix == "emoji"}
        content = {"prefix": prefix, "info": info, "icons": drawings, "width": 13, "height": 13}
        if prefix == "plain":
            content["aliases"] = {"favourite-outline": {"parent": "star-outline"}}
        if prefix == "emoji":
            content["categories"] = {"Flags": ["chequered"], "Food": ["red-apple"]}
        members.append((f"package/json/{prefix}.json", json.dumps(content).encode()))
    members.append(("package/collections.json", json.dumps(collections).encode()))
    path = tmp_path_factory.mktemp("icons") / "icons.tgz"
    write_tar(path, members)
    return path


@pytest.fixture(scope="module")
def out(tarball, tmp_path_factory):
    out = tmp_path_factory.mktemp("icons") / "out"
    icons.main([str(tarball), "--out", str(out)])
    return out


def read(out, split: str) -> dict[str, dict[str, bytes]]:
    """{key: {ending: content}} of a split's shards."""
    samples = {}
    for path in sorted(out.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, kind = member.name.split(".")
                samples.setdefault(key, {})[kind] = tar.extractfile(member).read()
    return samples


def test_the_same_tarball_gives_the_same_bytes(tarball, out, tmp_path):
    icons.main([str(tarball), "--out", str(tmp_path / "again")])
    files = sorted(path.name for path in out.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert "train-00000.tar" in files and "sheet.png" in files
    for name in files:
        assert (out / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


def test_splits_hold_what_they_should(out):
    train = {"plain_star-outline", "plain_bell2", "plain_key-heart", "plain_keyboards"}
    train |= {"plain_monkey", "emoji_red-apple"}
    labelled = read(out, "labelled") | read(out, "prompts")
    assert set(read(out, "train") | read(out, "prompts")) == train
    assert not set(read(out, "train")) & set(read(out, "prompts"))
    # Two concepts are no label, "monkey" holds no key, and "keyboards" is one keyboard.
    assert set(labelled) == train - {"plain_key-heart", "plain_monkey"}
    assert set(read(out, "unseen")) == {"bi_heart", "bi_unknown", "bi_acorn"}  # one heart of two
    assert set(read(out, "val")) == {"bi_heart"} and set(read(out, "rare")) == {"bi_acorn"}

    classes = (out / "classes.txt").read_text().splitlines()
    named = {key: classes[int(sample["cls"])].split(", ")[0] for key, sample in labelled.items()}
    assert named["plain_bell2"] == "bell" and named["plain_keyboards"] == "keyboard"
    rare = (out / "rare.txt").read_text().splitlines()
    assert rare[int(read(out, "rare")["bi_acorn"]["cls"])] == "acorn"


def test_what_is_left_out_is_counted(out):
    left_out = json.loads((out / "statistics.json").read_text())["left out"]
    assert left_out == {"same code": 2, "same pixels": 1, "blank": 1, "could not be drawn": 1}


def test_captions_hold_the_name_and_only_what_designers_wrote(out):
    for key, sample in (read(out, "train") | read(out, "unseen")).items():
        prefix, name = key.split("_")
        first, *others = sample["txt"].decode().split(", ")
        assert first == name.replace("-", " ")
        assert set(others) <= {"favourite outline", "Food", f"The {prefix}"}


def test_pictures_show_the_icon_in_two_colours_or_its_own(out):
    train = read(out, "train") | read(out, "prompts")
    star = Image.open(io.BytesIO(train["plain_star-outline"]["png"]))
    assert star.size == (32, 32) and star.mode == "RGB"
    grey = star.convert("L")
    assert abs(grey.getpixel((14, 14)) - grey.getpixel((1, 1))) > 80
    apple = Image.open(io.BytesIO(train["emoji_red-apple"]["png"]))
    assert (208, 32, 32) in {colour for _, colour in apple.getcolors(1024)}


def test_plain_pictures_are_black_on_white_and_the_rest_is_the_same(tarball, out, tmp_path):
    icons.main([str(tarball), "--out", str(tmp_path / "plain"), "--plain"])
    coloured, plain = read(out, "train"), read(tmp_path / "plain", "train")
    assert {k: v["txt"] for k, v in plain.items()} == {k: v["txt"] for k, v in coloured.items()}
    monkey = Image.open(io.BytesIO(plain["plain_monkey"]["png"]))
    assert all(red == green == blue for _, (red, green, blue) in monkey.getcolors(1024))
    assert monkey.getpixel((0, 0)) == (255, 255, 255)


def test_copies_are_drawn_anew_for_training_alone(tarball, out, tmp_path):
    icons.main([str(tarball), "--out", str(tmp_path / "three"), "--copies", "3"])
    once, three = read(out, "train"), read(tmp_path / "three", "train")
    assert set(three) == {key + copy for key in once for copy in ("", "+1", "+2")}
    assert all(three[key] == sample for key, sample in once.items())
    assert len({sample["png"] for sample in three.values()}) == len(three)
    names = {key.split("_")[1]: three[key]["txt"].decode().split(", ")[0] for key in three}
    assert all(name.split("+")[0].replace("-", " ") == first for name, first in names.items())
    for split in ("labelled", "prompts", "val", "rare", "unseen"):
        assert read(tmp_path / "three", split) == read(out, split)


def test_list_names_the_sets_with_their_licences(tarball, capsys):
    icons.main([str(tarball), "--list"])
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[1], row[4].split()[0]) for row in rows] == [
        ("test", "MIT", "bi"),
        ("train", "CC-BY-4.0", "emoji"),
        ("train", "Apache-2.0", "plain"),
    ]


def test_errors_of_a_run_are_counted_and_drawn(out, tmp_path):
    run, sheet = tmp_path / "run", tmp_path / "errors.png"
    train.main(train_flags(f"{out}/train-*.tar", run, "--samples", "8", "--workers", "1"))
    said = run_python("experiments/errors.py", str(run), str(out), "--out", str(sheet)).stdout
    assert re.search(r"top-1 [01]\.000, top-5 [01]\.000, top-1 by the best .* [01]\.000", said)
    assert re.search(r"\| bi \| 1 \| [01]\.000 \|", said)
    assert sheet.exists() == ("heart as " in said)


def test_mistakes_are_told_in_a_sentence(tarball, out, tmp_path):
    (tmp_path / "text").write_text("no archive")
    write_tar(tmp_path / "other.tar", [("package/a.txt", b"a")])
    for arguments, message in (
        ([tmp_path / "none.tgz", "--out", tmp_path / "new"], "cannot be read as a tarball"),
        ([tmp_path / "text", "--out", tmp_path / "new"], "cannot be read as a tarball"),
        ([tmp_path / "other.tar", "--out", tmp_path / "new"], "holds no package/collections.json"),
        ([tarball, "--out", out], "is not an empty folder"),
    ):
        result = run_python(str(SCRIPT), *map(str, arguments), check=False)
        assert result.returncode == 2 and message in result.stderr, result.stderr
        assert "Traceback" not in result.stderr


def test_concepts_are_whole_words_and_no_word_has_two():
    names = [
        n for text in (icons.CLASSES, icons.RARE) for c in icons.parse_concepts(text) for n in c
    ]
    assert len(names) == len(set(names)) and all(names)
    assert icons.find_concepts("toilet-paper") == {icons.CONCEPTS["toilet paper"]}
    assert icons.find_concepts("two-stars") == {icons.CONCEPTS["star"]}
    assert not icons.find_concepts("starboard")
