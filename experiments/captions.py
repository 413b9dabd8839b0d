"""Captions and answers from encoders of different objectives, by a small language model.

    python experiments/captions.py --seeds 1 2

Encoders (SuperClass, CLIP, supervised, and one without training) see 76,800 drawn shapes; then a
language model learns on each of them, locked, from 38,400 more. Captions are scored against five
captions of each scene. The command can be stopped and repeated; it goes on where it was.
"""

import argparse
import json
from pathlib import Path

from common import cell, print_table, score, train_all

import shapes

ENCODERS = {
    "superclass": ["--objective", "superclass"],
    "clip": ["--objective", "clip"],
    "supervised": ["--objective", "supervised"],
    "untrained": ["--samples", "128", "--lr", "0"],
}
TASKS = {"captions": "shapes", "answers": "shapes-questions"}
SCENES, CAPTIONS = 1_000, 5


def write_references(folder: Path) -> Path:
    """A table of unseen scenes, each with five captions."""
    table = folder / "references.jsonl"
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i in range(SCENES):
        scene = shapes.scene_of(i, "val")
        texts = [shapes.caption(scene) for _ in range(CAPTIONS)]
        shapes.draw(scene)[0].save(folder / f"{i}.png")
        rows += [{"filepath": f"{i}.png", "caption": text} for text in texts]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def main():
    parser = argparse.ArgumentParser(description="Compare encoders through a language model.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=38_400)
    seeds, samples = (args := parser.parse_args()).seeds, str(args.samples)
    place = Path("runs/captions")
    references = write_references(place / "references")
    shared = ["--workers", "1", "--precision", "fp32", "--no-first-eval"]

    encoders, readers = {}, {}
    for seed in map(str, seeds):
        for name, flags in ENCODERS.items():
            encoder = place / f"{name}-{seed}"
            encoders[encoder] = [*shared, "--seed", seed, *flags]
            for prefix in ("patches", "pooled"):
                for task, data in TASKS.items():
                    readers[place / f"{name}-{prefix}-{task}-{seed}"] = [
                        *shared, "--seed", seed, "--objective", "caption", "--init", str(encoder),
                        "--prefix", prefix, "--data", data, "--samples", samples,
                    ]  # fmt: skip
    train_all(encoders)
    train_all(readers)

    rows = []
    for name in ENCODERS:
        for prefix in ("patches", "pooled"):
            runs = {task: [place / f"{name}-{prefix}-{task}-{s}" for s in seeds] for task in TASKS}
            described = [
                score(run, "caption", "--data", str(references)) for run in runs["captions"]
            ]
            answered = [score(run, "caption") for run in runs["answers"]]
            ciders, exact = [row["cider"] for row in described], [row["exact"] for row in answered]
            rows.append([name, prefix, str(len(seeds)), cell(ciders), cell(exact)])
    print_table(["encoder", "prefix", "seeds", "CIDEr", "exact answers"], rows)


if __name__ == "__main__":
    main()
