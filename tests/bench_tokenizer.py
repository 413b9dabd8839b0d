"""Captions a second of `--tokenizer clip` against OpenCLIP's tokenizer, whose cache is warm.

python -m tests.bench_tokenizer       a few seconds; all in turn, in one process, on one thread
"""

import html
import statistics
import time

import open_clip.tokenizer

import shapes
from data import TEMPLATES
from tokenizer import load_tokenizer

ELSEWHERE = [
    "Ein schöner Tag am Meer, Kiefern & Sand, {}",
    "La plage de l'océan &amp; le château n° {}",
    "Закат над Москвой-рекой, фото {}",
    "红色的星星在墙上 {}",
    "東京タワーの夜景 {} 🗼✨",
    "صورة جميلة من القاهرة {}",
    "The dog's ball isn't there: LOT {} – FREE Shipping!!!",
]


def main(captions: int = 3000, rounds: int = 7):
    texts = [shapes.caption(shapes.scene_of(i, "train")) for i in range(captions)]
    for i in range(captions // 2):
        texts.append(TEMPLATES[i % len(TEMPLATES)].format(f"{texts[i].split()[-1]} {i}"))
        texts.append(ELSEWHERE[i % len(ELSEWHERE)].format(i))
    ours, theirs = load_tokenizer("clip"), open_clip.tokenizer.SimpleTokenizer()
    bare = open_clip.tokenizer.SimpleTokenizer()  # without the time that ftfy takes
    fold = open_clip.tokenizer.whitespace_clean
    bare.clean_fn = lambda text: fold(html.unescape(html.unescape(text)).strip()).lower()
    encoders = {
        "ours": ours.encode_ordinary,
        "OpenCLIP": theirs.encode,
        "OpenCLIP without ftfy": bare.encode,
    }

    def speed(encode) -> float:
        start = time.perf_counter()
        for text in texts:
            encode(text)
        return len(texts) / (time.perf_counter() - start)

    different = sum(ours.encode_ordinary(text) != theirs.encode(text) for text in texts)
    print(f"{len(texts):,} captions, of which {different} have other ids")
    for encode in encoders.values():
        speed(encode)  # warms the peer's cache of words
    measured = [[speed(encode) for encode in encoders.values()] for _ in range(rounds)]
    for i, name in enumerate(encoders):
        median = statistics.median(row[i] for row in measured)
        ratio = statistics.median(row[0] / row[i] for row in measured)
        than = f"   ours is {ratio:.1f} x as fast" if i else ""
        print(f"{name:<22} {median:9,.0f} captions a second{than}")


if __name__ == "__main__":
    main()
