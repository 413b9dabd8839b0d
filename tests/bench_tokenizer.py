"""Speed and ids of `--tokenizer clip` against OpenCLIP's tokenizer, whose cache is warm.

python -m tests.bench_tokenizer              a few seconds, on 6,000 captions made here
python -m tests.bench_tokenizer FILE...      on the lines of these text files, without repeats

Both run in turn, in one process, on one thread.
"""

import statistics
import sys
import time
from pathlib import Path

import open_clip.tokenizer

from data import load_tokenizer
from plugins import shapes
from plugins.torchsets import TEMPLATES

ELSEWHERE = [
    "Ein schöner Tag am Meer, Kiefern & Sand, {}",
    "La plage de l'océan &amp; le château n° {}",
    "Закат над Москвой-рекой, фото {}",
    "红色的星星在墙上 {}",
    "東京タワーの夜景 {} 🗼✨",
    "صورة جميلة من القاهرة {}",
    "The dog's ball isn't there: LOT {} – FREE Shipping!!!",
]


def made_captions(n: int = 3000) -> list[str]:
    texts = [shapes.caption(shapes.scene_of(i, "train")) for i in range(n)]
    for i in range(n // 2):
        texts.append(TEMPLATES[i % len(TEMPLATES)].format(f"{texts[i].split()[-1]} {i}"))
        texts.append(ELSEWHERE[i % len(ELSEWHERE)].format(i))
    return texts


def main(files: list[str], rounds: int = 5):
    lines = [line for file in files for line in Path(file).read_text("utf-8").split("\n") if line]
    texts = list(dict.fromkeys(lines)) or made_captions()
    encoders = [
        load_tokenizer("clip").encode_ordinary,
        open_clip.tokenizer.SimpleTokenizer().encode,
    ]

    def speed(encode) -> float:
        start = time.perf_counter()
        for text in texts:
            encode(text)
        return len(texts) / (time.perf_counter() - start)

    ours, theirs = encoders  # this pass also warms OpenCLIP's cache of words
    different = sum(ours(text) != theirs(text) for text in texts)
    ascii = sum(text.isascii() for text in texts) / len(texts)
    print(f"{len(texts):,} texts, {ascii:.0%} of them ASCII; {different:,} have other ids")
    measured = [[speed(encode) for encode in encoders] for _ in range(rounds)]
    for name, figures in zip(("ours", "OpenCLIP"), zip(*measured, strict=True), strict=True):
        print(f"{name:<9} {statistics.median(figures):9,.0f} texts a second")
    ratios = sorted(first / second for first, second in measured)
    print(f"ratio     {statistics.median(ratios):9.1f}   ({ratios[0]:.1f} to {ratios[-1]:.1f})")


if __name__ == "__main__":
    main(sys.argv[1:])
