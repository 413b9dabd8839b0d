"""Other vocabularies of the same size from the same captions, for Table 5.

    python experiments/vocabularies.py

WordPiece, and the Unigram model of SentencePiece, learned by the tokenizers package from the 50,000
captions of data/plain that `--tokenizer bpe:2048` learns from; written to runs/plain/wordpiece.json
and unigram.json, which rungs of ladder.py read: muon-128-4e-3-crop1-wordpiece.
"""

import argparse

from compare import ICONS, PLACE
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from data import load_source

V = 2048


def main():
    argparse.ArgumentParser(description="Learn the vocabularies of Table 5.").parse_args()
    captions = list(load_source(f"{ICONS}/train-*.tar").captions(50_000))
    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=V, special_tokens=["[UNK]"])
    wordpiece.train_from_iterator(captions, trainer)
    unigram = Tokenizer(models.Unigram())
    unigram.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=V, unk_token="<unk>", special_tokens=["<unk>"])
    unigram.train_from_iterator(captions, trainer)
    PLACE.mkdir(parents=True, exist_ok=True)
    for name, tokenizer in (("wordpiece", wordpiece), ("unigram", unigram)):
        tokenizer.save(str(PLACE / f"{name}.json"))
        tokens = sum(len(tokenizer.encode(caption)) for caption in captions) / len(captions)
        print(f"{name}: {tokenizer.get_vocab_size():,} tokens, {tokens:.2f} in a caption")


if __name__ == "__main__":
    main()
