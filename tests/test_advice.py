"""What `python data.py` says about small data."""

import pytest

import data
from data import caption_labels, load_tokenizer
from plugins.advice import advise, flags
from tests.conftest import make_pairs

CAPTIONS = ["a frog", "a green frog", "the zebra"] + ["a ball"] * 5


def advice(spec, pairs, captions=CAPTIONS):
    tokenizer = load_tokenizer(spec, captions)
    return advise(tokenizer, captions, [caption_labels(c, tokenizer) for c in captions], pairs)


def test_pieces_of_words_are_counted():
    pieces, *_ = advice("bpe:256", 8)  # bytes: of all words but "a", whose blank is a piece, too
    assert pieces.startswith("100% of the labels are pieces") and "--tokenizer words:3 " in pieces
    assert pieces.endswith("and 1 captions have none of them")  # the zebra
    assert not any("pieces" in line for line in advice("words:3", 8))


def test_rare_labels_are_counted_as_all_pairs_would_have_them():
    assert advice("words:3", 8)[0].startswith("1 of 3 labels are in fewer than 5 captions")  # frog
    assert not any("fewer" in line for line in advice("words:3", 20))  # 2 of 8 are 5 of 20


@pytest.mark.parametrize(
    ("pairs", "batch", "samples", "rate"),
    [
        (685, 64, 13_760, 1.1e-3),
        (237_817, 256, 3_000_064, 2.3e-3),  # pretrained/icons had 2e-3
        (900_000, 1024, 9_000_960, 4.5e-3),
    ],
)
def test_flags_follow_the_number_of_pairs(pairs, batch, samples, rate):
    assert flags(pairs) == (batch, samples, pytest.approx(rate, rel=0.03), samples // batch // 20)
    assert f"--samples {samples} " in advice("words:3", pairs)[-1]


def test_large_and_unknown_numbers_get_no_advice():
    assert advice("bpe:256", 0) == advice("bpe:256", 10**6) == []


def test_the_command_prints_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.main([str(make_pairs(tmp_path / "pairs")), "--tokenizer", "bpe:256"])
    *_, pieces, rare, length = capsys.readouterr().out.splitlines()
    assert "are pieces of words" in pieces and "labels are in fewer" in rare
    assert length.startswith("24 pairs: begin with --samples 512 (21 passes) --batch-size 64")
