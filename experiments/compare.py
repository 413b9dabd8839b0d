"""SuperClass, its variants, CLIP and others on icons with their designers' captions.

    python experiments/compare.py --samples 307200 --seeds 1 2 3

Needs data/icons, which icons.py builds. All rows share encoder, data, order, schedule and seeds;
only the objective differs, or the labels. The learning rate of a row is the one of RATES with the
lowest training loss at the end of a run a sixth as long, with seed 0 and no image seen twice. The
prompts of zero-shot are the PROMPTS that score best on labelled icons of the training sets that
were kept out of training. The command can be stopped and repeated; it goes on where it was.
"""

import argparse
from pathlib import Path
from statistics import mean, median

from common import cell, print_table, read_jsonl, score, train_all

ICONS = "data/icons"
FLAGS = ["--data", f"{ICONS}/train-*.tar", "--class-names", f"{ICONS}/classes.txt"]
FLAGS += ["--tokenizer", "bpe:2048", "--batch-size", "256", "--warmup", "100", "--workers", "1"]
FLAGS += ["--lanes", "4", "--precision", "fp32"]
ROWS = {
    "superclass": [],
    "no-idf": ["--no-idf"],
    "clip": ["--objective", "clip"],
    "superclip": ["--objective", "superclip"],
    "no-stopwords": ["--drop-stopwords"],
    "words": ["--tokenizer", "words:2048"],
    "bce": ["--loss", "bce"],
    "asl": ["--loss", "asl"],
    "soft-margin": ["--loss", "soft_margin"],
    "two-way": ["--loss", "two_way"],
    "supervised": ["--objective", "supervised", "--data", f"{ICONS}/labelled-*.tar"],
    "lit": ["--objective", "lit", "--init", "runs/icons/superclass-SAMPLES-SEED"],
}
RATES = ("1e-3", "2e-3", "4e-3")
PROMPTS = [["{}"], ["a {}"], ["{} outline"], ["{} icon"], ["{}", "{} outline", "{} filled"]]
PROMPTS += [["a {}", "a photo of a {}", "a picture of the {}"]]


def flags(row: str, samples: int, seed: int, rate: str) -> list[str]:
    own = [flag.replace("SAMPLES", str(samples)).replace("SEED", str(seed)) for flag in ROWS[row]]
    return [*FLAGS, *own, "--samples", str(samples), "--seed", str(seed), "--lr", rate]


def main():
    parser = argparse.ArgumentParser(description="Compare objectives on icons.")
    parser.add_argument("--samples", type=int, default=307_200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    place, short = Path("runs/icons"), args.samples // 6

    sweep = {
        (row, rate): place / f"sweep-{row}-{short}-{rate}" for row in args.rows for rate in RATES
    }
    swept = {
        folder: flags(row, short, 0, rate) for (row, rate), folder in sweep.items() if row != "lit"
    }
    train_all(swept, args.jobs)
    best = {
        row: min(RATES, key=lambda rate: last_loss(sweep[row, rate]))
        for row in args.rows
        if row != "lit"
    }
    best["lit"] = best.get("clip", "2e-3")  # its text tower is CLIP's
    runs = {}
    for seed in args.seeds:
        for row in sorted(args.rows, key=lambda row: row == "lit"):  # it starts from another row
            runs[place / f"{row}-{args.samples}-{seed}"] = flags(row, args.samples, seed, best[row])
    locked = {folder: own for folder, own in runs.items() if "lit" in folder.name}
    train_all({folder: own for folder, own in runs.items() if folder not in locked}, args.jobs)
    train_all(locked, args.jobs)

    head = ["run", "lr", "seeds", "zero-shot", "prompts", "rare zero-shot", "probe", "10-shot"]
    head += ["caption R@1", "images/s", "minutes"]
    lines = []
    for row in args.rows:
        found = [measure(row, place / f"{row}-{args.samples}-{seed}") for seed in args.seeds]
        columns = [[scores[key] for scores in found if key in scores] for key in KEYS]
        cells = [cell(values) if values else "" for values in columns]
        prompts = " / ".join(found[0].get("prompts", []))
        lines.append([row, best[row], str(len(found)), cells[0], prompts, *cells[1:]])
        lines[-1] += [f"{median(f['images/s'] for f in found):.0f}"]
        lines[-1] += [f"{median(f['minutes'] for f in found):.1f}"]
    print_table(head, lines)


KEYS = ("zero-shot", "rare", "probe", "10-shot", "i2t@1")


def last_loss(folder: Path) -> float:
    return mean(line["loss"] for line in read_jsonl(folder / "metrics.jsonl")[-3:])


def measure(row: str, folder: Path) -> dict:
    """All scores of a run, of its head where it has one and no text tower."""
    names = ["--class-names", f"{ICONS}/classes.txt"]
    val, labelled = f"{ICONS}/val-*.tar", f"{ICONS}/labelled-*.tar"
    metrics = read_jsonl(folder / "metrics.jsonl")
    before = [0, *(line["step"] for line in metrics)]
    steps = [line["step"] - b for line, b in zip(metrics, before, strict=False)]
    seconds = sum(line["step_s"] * n for line, n in zip(metrics, steps, strict=True))
    found = {"images/s": median(line["images_per_s"] for line in metrics), "minutes": seconds / 60}
    for name, task in (("probe", "probe"), ("10-shot", "fewshot")):
        flags = ["--data", labelled, "--val-data", val, *names]
        found[name] = score(folder, task, *flags)["top1"]
    if row == "supervised":
        return found | {"zero-shot": score(folder, "zeroshot", "--data", val, *names)["top1"]}
    asked = {tuple(prompts): [f for p in prompts for f in ("--prompt", p)] for prompts in PROMPTS}
    held = {
        prompts: score(folder, "zeroshot", "--data", f"{ICONS}/prompts-*.tar", *names, *flags)
        for prompts, flags in asked.items()
    }
    best = max(held, key=lambda prompts: held[prompts]["top1"])
    rare = ["--data", f"{ICONS}/rare-*.tar", "--class-names", f"{ICONS}/rare.txt"]
    found["zero-shot"] = score(folder, "zeroshot", "--data", val, *names, *asked[best])["top1"]
    found["rare"] = score(folder, "zeroshot", *rare, *asked[best])["top1"]
    found["i2t@1"] = score(folder, "retrieval", "--data", val)["i2t@1"]
    return found | {"prompts": list(best)}


if __name__ == "__main__":
    main()
