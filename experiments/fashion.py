"""When CLIP leads: Fashion-MNIST with captions from templates, and with bare class names.

    python experiments/fashion.py --seeds 1 2

Needs the files of Fashion-MNIST (docs/data.md). XS/7 at 28 px learns from 28,800 of 55,000 training
images, with the learning rate of a sweep with seed 1 that is best by zero-shot on the other 5,000.
The command can be stopped and repeated; it goes on where it was.
"""

import argparse
import json
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

from common import UserError, cell, print_table, score, train_all, untried

from data import load_source
from eval import publish

DATA, PLACE = Path("data/fashion"), Path("runs/fashion")
FLAGS = ["--model", "XS/7", "--image-size", "28", "--flip", "--samples", "28800", "--workers", "1"]
FLAGS += ["--precision", "fp32", "--no-first-eval", "--class-names", f"{DATA}/classes.txt"]
ROWS = {"superclass": [], "no-idf": ["--no-idf"], "clip": ["--objective", "clip"]}
KINDS = ("templates", "names")
TRAINED, LIMIT = ("probe", "fewshot"), ("--limit", "10000")
HELD_OUT = 5_000  # training images on which rates are chosen


def write_tables():
    """Training images as files, in tables with both kinds of captions; and those held out."""
    source = load_source("fashion-mnist")
    names, rows = source.attributes["class"], {kind: [] for kind in (*KINDS, "held-out")}
    (DATA / "images").mkdir(parents=True, exist_ok=True)
    for i in range(len(source)):
        image, caption, (c,), _ = source.raw(i)
        image.save(DATA / "images" / f"{i}.png")
        row = {"filepath": f"images/{i}.png", "label": c}
        if i >= len(source) - HELD_OUT:
            rows["held-out"].append(row)
        else:
            rows["templates"].append(row | {"caption": caption})
            rows["names"].append(row | {"caption": names[c][i % len(names[c])]})
    for kind, own in rows.items():
        publish("".join(json.dumps(row) + "\n" for row in own), DATA / f"{kind}.jsonl")
    publish("\n".join(map(", ".join, names)), DATA / "classes.txt")


def run_of(row: str, kind: str, rate: str, seed: int) -> tuple[Path, list[str]]:
    """The folder and the command line of a run."""
    own = ["--data", f"{DATA}/{kind}.jsonl", "--lr", rate, "--seed", str(seed)]
    return PLACE / f"{row}-{kind}-{seed}-{rate}", [*FLAGS, *ROWS[row], *own]


def measure(row: str, kind: str, rate: str, seed: int, held_out: bool = False) -> list[float]:
    """Zero-shot, probe and 10-shot on the test images; or just zero-shot on the held-out ones."""
    folder = run_of(row, kind, rate, seed)[0]
    names = ["--prompt", "{}"] if (row, kind) == ("clip", "names") else []
    if held_out:
        return [score(folder, "zeroshot", "--val-data", f"{DATA}/held-out.jsonl", *names)["top1"]]
    test = ["--val-data", "fashion-mnist"]
    zeroshot = score(folder, "zeroshot", *test, *names)["top1"]
    return [zeroshot, *(score(folder, task, *test, *LIMIT)["top1"] for task in TRAINED)]


def main():
    parser = argparse.ArgumentParser(description="Compare on captions that nobody wrote.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    seeds = parser.parse_args().seeds
    try:
        if not (DATA / "classes.txt").exists():
            write_tables()
    except UserError as error:  # the files of Fashion-MNIST are missing
        parser.error(str(error))
    pool, sweep = ThreadPoolExecutor(2), {(row, kind): {} for kind, row in product(KINDS, ROWS)}
    while new := [(*key, rate, 1) for key, found in sweep.items() for rate in untried(found)]:
        train_all(dict(run_of(*one) for one in new))
        scores = pool.map(lambda one: measure(*one, held_out=True), new)
        for (row, kind, rate, _), (held_out,) in zip(new, scores, strict=True):
            sweep[row, kind][rate] = held_out
            print(f"{row}, {kind}, {rate}: {held_out:.3f}", flush=True)
    best = {key: max(found, key=found.get) for key, found in sweep.items()}
    chosen = [(*key, rate, seed) for seed in seeds for key, rate in best.items()]
    train_all(dict(run_of(*one) for one in chosen))
    scores = dict(zip(chosen, pool.map(lambda one: measure(*one), chosen), strict=True))
    lines = []
    for (row, kind), rate in best.items():
        columns = zip(*(scores[row, kind, rate, seed] for seed in seeds), strict=True)
        lines.append([f"{row}, {kind}", rate, str(len(seeds)), *map(cell, columns)])
    print_table(["run, captions", "lr", "seeds", "zero-shot", "probe", "10-shot"], lines)


if __name__ == "__main__":
    main()
