"""When CLIP leads: Fashion-MNIST with captions from templates, and with bare class names.

    python experiments/fashion.py --seeds 1 2 3

Needs the files of Fashion-MNIST (docs/data.md). XS/7 at 28 px, 57,600 images, less than one pass.
All rows have one learning rate, which was not chosen for any of them.
The command can be stopped and repeated; it goes on where it was.
"""

import argparse
import json
from pathlib import Path

from common import cell, print_table, score, train_all

from data import load_source

VAL = ["--val-data", "fashion-mnist"]
FLAGS = ["--model", "XS/7", "--image-size", "28", "--flip", "--samples", "57600", "--lr", "2e-3"]
FLAGS += ["--workers", "1", "--precision", "fp32", "--no-first-eval"]
ROWS = {"superclass": [], "no-idf": ["--no-idf"], "clip": ["--objective", "clip"]}


def write_names(folder: Path) -> list[str]:
    """The training images in a table whose captions are the class names alone."""
    source = load_source("fashion-mnist")
    names = source.attributes["class"]
    if not (folder / "classes.txt").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "train.jsonl", "w") as table:
            for i in range(len(source)):
                image, _, (c,), _ = source.raw(i)
                image.save(folder / f"{i}.png")
                row = {"filepath": f"{i}.png", "caption": names[c][i % len(names[c])], "label": c}
                print(json.dumps(row), file=table)
        (folder / "classes.txt").write_text("\n".join(map(", ".join, names)))
    return ["--data", f"{folder}/train.jsonl", "--class-names", f"{folder}/classes.txt", *VAL]


def main():
    parser = argparse.ArgumentParser(description="Compare on captions that nobody wrote.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    seeds = parser.parse_args().seeds
    place, captions = Path("runs/fashion"), {"templates": ["--data", "fashion-mnist"]}
    captions["names"] = write_names(Path("data/names"))
    runs = {
        place / f"{row}-{kind}-{seed}": [*FLAGS, *data, *own, "--seed", str(seed)]
        for seed in seeds
        for kind, data in captions.items()
        for row, own in ROWS.items()
    }
    train_all(runs)
    rows = []
    for kind in captions:
        for row in ROWS:
            folders = [place / f"{row}-{kind}-{seed}" for seed in seeds]
            prompts = ["--prompt", "{}"] if row == "clip" and kind == "names" else []
            scores = [
                [score(folder, "zeroshot", *prompts)["top1"] for folder in folders],
                [score(folder, "probe")["top1"] for folder in folders],
                [score(folder, "fewshot")["top1"] for folder in folders],
            ]
            rows.append([f"{row}, {kind}", str(len(seeds)), *map(cell, scores)])
    print_table(["run, captions", "seeds", "zero-shot", "probe", "10-shot"], rows)


if __name__ == "__main__":
    main()
