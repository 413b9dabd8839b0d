"""Few-shot: a classifier on the frozen features of a few images of each class (Table 2).

    python eval.py fewshot RUN [--shots N]

As a command of its own, this reads only `POOL` times as many training images of each class as a
draw uses. At the end of training, draws come from the images that were read for the probe.

Letters in shapes:  N images,  D width,  C classes.
"""

import itertools
import statistics

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data import BadSample, Pairs, Source
from eval import Run, TooFew, measure_command, top1
from plugins.probe import standardize

DRAWS = 3  # of the shots
POOL = 6  # so many times the shots are read: two draws share a sixth of their images


def fewshot(
    train: Tensor, labels: Tensor, val: Tensor, names: list[list[str]], shots: int, seed: int
) -> Tensor:
    """Few-shot by regularised least squares (CapPa's protocol, with big_vision's constants).

    `shots` images of each class are drawn; W minimises |X W - Y|^2 + l2 |W|^2 in closed form, with
    X standardised and a constant column of 100 as the nearly free bias, Y one-hot in {-1, 1} and
    l2 = 1024. Setting the gradient to zero gives (X^T X + l2 I) W = X^T Y.

    Returns: scores [N, C] of the validation features. Raises TooFew for too small a class.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c, (name, *_) in enumerate(names):
        members = (labels == c).nonzero().flatten()
        if len(members) < shots:
            raise TooFew(f"class '{name}' has {len(members)} training images, fewer than {shots}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    chosen = torch.cat(chosen)
    x, val = standardize(train[chosen].double(), val.double())
    x, val = F.pad(x, (0, 1), value=100.0), F.pad(val, (0, 1), value=100.0)  # [n, D + 1]
    y = 2 * F.one_hot(labels[chosen], len(names)).double() - 1  # [n, C]
    penalty = 1024 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)  # [D + 1, C]
    return val @ weight


class Some(Source):
    """Enough labelled images of each class of a source, and no others, found by their labels alone.

    Of a source of known length they are random, always the same ones; of shards, the first. The
    search ends when each class has enough, or with the source, or after `limit` samples.
    """

    def __init__(self, source: Source, enough: int, limit: int | None):
        if isinstance(source, Pairs):
            n = min(limit or len(source), len(source))
            mixed = np.random.default_rng(0).permutation(n) * len(source) // n
            samples = ((i, source.raw(i)) for i in mixed.tolist())
        else:
            samples = itertools.chain.from_iterable(source.once(0, 1, 256, limit))
        self.source, self.attributes, self.places = source, source.attributes, set()
        attributes = enumerate(source.attributes.values())
        wanted = {(a, c): enough for a, names in attributes for c in range(len(names))}
        for place, raw in samples:
            labels = () if isinstance(raw, BadSample) else enumerate(raw.targets)
            for label in [label for label in labels if label in wanted]:
                self.places.add(place)
                wanted[label] -= 1
            wanted = {label: number for label, number in wanted.items() if number}
            if not wanted:
                break
        if not self.places:
            raise TooFew("no training image has a label")

    def __str__(self) -> str:
        return f"{len(self.places):,} training images"

    def once(self, reader: int, readers: int, block: int, limit: int | None):
        places = sorted(self.places)
        if isinstance(self.source, Pairs):
            for first in range(reader * block, len(places), readers * block):
                yield [(i, self.source.raw(i)) for i in places[first : first + block]]
            return
        for pairs in self.source.once(reader, readers, block, None):
            if pairs[0][0] > places[-1]:
                return
            yield [(place, raw) for place, raw in pairs if place in self.places]


def some(train: Source, options: dict) -> Source:
    """What of the training images this task, alone, reads."""
    return Some(train, POOL * options["shots"], options["limit"])


def fitted(run: Run, train: Tensor, labels: Tensor, x: Tensor, y: Tensor, names, options) -> dict:
    """The part of a row that features x with the classes y give: mean and deviation over draws."""
    shots = options["shots"]
    found = [top1(fewshot(train, labels, x, names, shots, n), y) for n in range(DRAWS)]
    row = {"top1": statistics.mean(found), "deviation": statistics.stdev(found)}
    return row | {"shots": shots, "draws": DRAWS}


def main(argv: list[str]):
    measure_command(["fewshot", *argv])
