"""Speed and ids of `--tokenizer clip` against OpenCLIP's tokenizer.

OpenCLIP's keeps the ids of all words that it has seen: "cold" is its first pass over the texts,
"warm" a second one. Ours keeps nothing.

python -m tests.bench_tokenizer              a few seconds, on 6,000 captions made here
python -m tests.bench_tokenizer FILE...      on the lines of these text files, without repeats

They run in turn, in one process, on one thread; processor time counts.
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
    ours = load_tokenizer("clip").encode_ordinary

    def speed(encode) -> float:
        start = time.process_time()
        for text in texts:
            encode(text)
        return len(texts) / (time.process_time() - start)

    measured = []
    for _ in range(rounds):
        theirs = open_clip.tokenizer.SimpleTokenizer().encode
        measured.append([speed(ours), speed(theirs), speed(theirs)])
    different = sum(ours(text) != theirs(text) for text in texts)
    ascii = sum(text.isascii() for text in texts) / len(texts)
    print(f"{len(texts):,} texts, {ascii:.0%} of them ASCII; {different:,} have other ids")
    for i, name in enumerate(("ours", "OpenCLIP, cold", "OpenCLIP, warm")):
        ratios = sorted(figures[0] / figures[i] for figures in measured)
        median = statistics.median(figures[i] for figures in measured)
        print(f"{name:<14} {median:9,.0f} texts a second", end="")
        print(f", ours {ratios[rounds // 2]:.1f} x ({ratios[0]:.1f} to {ratios[-1]:.1f})" * (i > 0))


if __name__ == "__main__":
    main(sys.argv[1:])
