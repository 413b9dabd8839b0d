"""Other labels: words against a count by hand, Hugging Face's files, texts without stop words."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest
import tokenizers

from data import UserError, caption_labels, caption_tokens, load_tokenizer, read_tokenizer
from plugins import shapes
from plugins.tokenizers import STOPWORDS, drop_stopwords
from tests.test_clip_bpe import VARIED

TEXTS = ["the red star", "the blue star", "a red, red ball", "stars and balls", "thé étoile"] * 3
CAPTIONS = [shapes.caption(shapes.scene_of(i, "train")) for i in range(2000)]


def test_stopwords_go_and_nothing_else():
    text = "The dog’s  ball is (in the) garden, and it's red; I don't rock-and-roll &c."
    assert drop_stopwords(text) == "dog’s ball garden, red; don't rock-and-roll &c."
    assert drop_stopwords("THE the “the” and…") == drop_stopwords("") == ""
    assert 60 < len(STOPWORDS) < 150 and all(word == word.lower() for word in STOPWORDS)
    tokenizer = load_tokenizer("bpe:400", TEXTS)
    without = load_tokenizer("no-stopwords:bpe:400", TEXTS)
    assert without.n_vocab == tokenizer.n_vocab
    labels = caption_labels("The red star", without)
    assert labels == caption_labels("red star", without) == caption_labels("red star", tokenizer)
    assert caption_labels("of the", without) == []
    assert without.decode(labels) == tokenizer.decode(labels)


def test_other_tokenizers_without_stopwords_are_refused_by_their_own_name():
    with pytest.raises(UserError, match="unknown tokenizer 'gpt9'"):
        load_tokenizer("no-stopwords:gpt9", TEXTS)
    with pytest.raises(UserError, match=r"bpe:12: .* at least 256"):
        load_tokenizer("no-stopwords:bpe:12", TEXTS)


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


def test_damaged_words_are_refused(tmp_path):
    (tmp_path / "t.tiktoken").write_bytes(b"YQ== 0\nYg== 0\n")
    with pytest.raises(UserError, match="a token or a rank occurs twice"):
        config = {"tokenizer_kind": "tokenizers.WordTokenizer", "unknown_words": 0.0}
        read_tokenizer(tmp_path / "t.tiktoken", config)
