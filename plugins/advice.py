"""What `python data.py SPEC` says about a small data set: its labels, and flags to begin with."""

import math
from collections import Counter

import regex

RARE = 5  # captions: a label in fewer of them is hardly learned
SMALL = 1_000_000  # pairs: for more, the recipes of docs/reproduce.md


def advise(tokenizer, captions: list[str], labels: list[list[int]], pairs: int) -> list[str]:
    """Lines of advice for a source of so many pairs; none if it is large, or 0 for an unknown one.

    Args:
        captions, labels: of the samples that were looked at, which may be fewer.
    """
    if not 0 < pairs < SMALL:
        return []
    lines, counts = [], Counter(label for row in labels for label in row)
    words = [set(regex.findall(r"[\p{L}\p{M}]+", caption.lower())) for caption in captions]
    pieces = 0
    for found, row in zip(words, labels, strict=True):
        cut = [set(tokenizer.encode_ordinary(word)) for word in found]
        whole = set().union(*(ids for ids in cut if len(ids) == 1))
        pieces += len(set().union(*cut).intersection(row) - whole)
    captions_with = Counter(word for found in words for word in found)
    known = {word for word, n in captions_with.items() if n > 1}
    if pieces > counts.total() / 2 and known:
        lines.append(
            f"{pieces / counts.total():.0%} of the labels are pieces of words, which say little: "
            f"--tokenizer words:{len(known)} takes those in two captions or more, and "
            f"{sum(not found & known for found in words):,} captions have none of them"
        )
    rare = sum(n * pairs / len(labels) < RARE for n in counts.values())
    if rare:
        lines.append(
            f"{rare:,} of {len(counts):,} labels are in fewer than {RARE} captions, too few to be "
            "learned well: more pairs, or fewer labels"
        )
    batch, samples, rate, warmup = flags(pairs)
    lines.append(
        f"{pairs:,} pairs: begin with --samples {samples} ({samples / pairs:.0f} passes) "
        f"--batch-size {batch} --lr {rate:.1e} --warmup {warmup} (--lr: XS/8; of width D: 128 / D "
        "times that)"
    )
    return lines


def flags(pairs: int) -> tuple[int, int, float, int]:
    """Batch, images, peak rate for a width of 128, and warm-up steps for so many pairs.

    Twenty passes at most, and ten at least; ten thousand steps, unless the batch would be below 64.
    The rate is three times that of the dial in docs/reproduce.md, as short runs want it.
    """
    samples = min(20 * pairs, max(3_000_000, 10 * pairs))
    batch = max(64, 2 ** round(math.log2(samples / 10_000)))
    samples = math.ceil(samples / batch) * batch
    rate = 3 * 1e-3 * math.sqrt(batch / 16_384) * 768 / 128
    return batch, samples, rate, max(1, samples // batch // 20)
