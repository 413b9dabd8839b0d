"""The share of a training step that is neither model, loss, optimizer nor waiting for data.

python -m tests.bench_loop [flags of train.py]       default run, 60 steps, half a minute
"""

import sys
import tempfile
import time

import torch

import train
from superclass import Objective, SuperClass

SPENT = {}


def timed(owner, name: str):
    """Make a function add the seconds of its calls, without those within each other, to SPENT."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            SPENT.setdefault(name, []).append(time.perf_counter() - start)

    setattr(owner, name, wrapper)


def main():
    timed(SuperClass, "forward")
    timed(Objective, "loss")
    timed(torch.Tensor, "backward")
    timed(torch.nn.utils, "clip_grad_norm_")
    timed(torch.optim.AdamW, "step")
    timed(torch.optim.AdamW, "zero_grad")
    timed(train.Progress, "wait_for")
    timed(train.Progress, "add")  # the last call of a step: marks where it ends
    ends, add = [], train.Progress.add

    def mark(*args):
        add(*args)
        ends.append(time.perf_counter())

    train.Progress.add = mark
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--samples", str(60 * 128), "--no-first-eval", "--out", f"{folder}/run"]
        train.evaluate = lambda *_: None
        train.main([*flags, *sys.argv[1:]])
    steps = len(ends) - 1
    whole = ends[-1] - ends[0]
    SPENT.pop("add")
    inside = {name: sum(seconds[-steps:]) for name, seconds in SPENT.items()}
    for name, seconds in inside.items():
        print(f"{name:<16} {seconds / steps * 1e3:7.2f} ms")
    outside = whole - sum(inside.values())
    share = outside / (whole - inside["wait_for"])
    print(
        f"{'all else':<16} {outside / steps * 1e3:7.2f} ms   {share:.1%} of a step without waiting"
    )


if __name__ == "__main__":
    main()
