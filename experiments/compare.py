"""SuperClass, its variants, CLIP and others on icons with their designers' captions.

    python experiments/compare.py --samples 102400 --seeds 1 2 3

Needs data/icons, which icons.py builds. All rows share encoder, data, order, schedule and seeds;
only the objective differs, or the labels. What is chosen is chosen on labelled icons of training
sets that were kept out of training, never on the test: the learning rate of a row, the best of
RATES in a run of half the length with seed 0, and the prompts of its zero-shot. The row
"equal time" is SuperClass with as many images as it sees in the time that CLIP needs. The command
can be stopped and repeated; it goes on where it was.
"""

import argparse
import functools
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

import torch
from common import cell, finished, print_table, train_all

import eval as evaluation
from baselines import CLIP
from run import load_run, publish
from sources import load_source

ICONS, PLACE = "data/icons", Path("runs/icons")
BATCH = 256
FLAGS = ["--data", f"{ICONS}/train-*.tar", "--class-names", f"{ICONS}/classes.txt"]
FLAGS += ["--tokenizer", "bpe:2048", "--batch-size", str(BATCH), "--workers", "1"]
FLAGS += ["--precision", "fp32", "--no-first-eval"]
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
    "lit": ["--objective", "lit", "--init", str(PLACE / "superclass-SAMPLES-SEED")],
}
RATES = ("1e-3", "2e-3", "4e-3")
PROMPTS = [["{}"], ["a {}"], ["{} outline"], ["{} icon"], ["{}", "{} outline", "{} filled"]]
PROMPTS += [["a {}", "a photo of a {}", "a picture of the {}"]]
PROBE = 10_000  # training images of the probe
SCORES = ("zero-shot", "head", "rare", "probe", "10-shot", "retrieval")


def flags(row: str, samples: int, seed: int, rate: str) -> list[str]:
    """The command line of a run; a tenth of its steps is warm-up."""
    own = [flag.replace("SAMPLES", str(samples)).replace("SEED", str(seed)) for flag in ROWS[row]]
    own += ["--samples", str(samples), "--warmup", str(samples // BATCH // 10)]
    return [*FLAGS, *own, "--seed", str(seed), "--lr", rate]


def measure(folder: Path, held_out_only: bool = False) -> dict:
    """All scores of a run, kept in its folder; or just those on held-out icons of training."""
    kept = folder / ("held-out.json" if held_out_only else "scores.json")
    if kept.exists():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    run = load_run(folder, torch.device("cpu"))
    open_source = functools.partial(load_source, split="val", class_names=f"{ICONS}/classes.txt")
    extract = functools.partial(evaluation.extract, run, workers=0)
    classify = functools.partial(evaluation.classify, run)

    held = open_source(f"{ICONS}/prompts-*.tar")
    (names,) = held.attributes.values()
    x, y, _ = extract(held)
    asked = [None] if run.config.objective == "supervised" else PROMPTS
    tried = [top1(classify("zeroshot", 0, names, x, {"prompts": p}), y) for p in asked]
    found = {"held out": max(tried), "prompts": asked[tried.index(max(tried))]}
    if not held_out_only:
        val, labelled = (open_source(f"{ICONS}/{name}-*.tar") for name in ("val", "labelled"))
        x, y, _ = extract(val)
        options = {"prompts": found["prompts"]}
        found["zero-shot"] = top1(classify("zeroshot", 0, names, x, options), y)
        if isinstance(run.model, CLIP) and hasattr(run.model, "head"):  # SuperCLIP has both
            found["head"] = top1(classify("head", 0, names, x, {}), y)
        if run.config.objective != "supervised":
            rare = load_source(f"{ICONS}/rare-*.tar", "val", class_names=f"{ICONS}/rare.txt")
            x_rare, y_rare, _ = extract(rare)
            (rare_names,) = rare.attributes.values()
            found["rare"] = top1(classify("zeroshot", 0, rare_names, x_rare, options), y_rare)
            asked = {"limit": None, "workers": 0}
            found["retrieval"] = evaluation.measure_retrieval(run, val, asked)["i2t@1"]
        train, labels, _ = extract(labelled, limit=20_000)
        train, labels = train.clone(), labels[:, 0].clone()  # out of inference mode, for the probe
        rest = train[:PROBE], labels[:PROBE], x.clone(), len(names)
        found["probe"] = top1(evaluation.probe(*rest)[0], y)
        shots = [evaluation.fewshot(train, labels, x, len(names), 10, n) for n in range(3)]
        found["10-shot"] = sum(top1(scores, y) for scores in shots) / len(shots)
        found |= {key: finished(folder)[1][key] for key in ("images/s", "minutes")}
    publish(json.dumps(found), kept)
    return found


def top1(scores: torch.Tensor, targets: torch.Tensor) -> float:
    return evaluation.top1(scores, targets.flatten())


def main():
    parser = argparse.ArgumentParser(description="Compare objectives on icons.")
    parser.add_argument("--samples", type=int, default=102_400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    samples, seeds, rows = args.samples, args.seeds, args.rows
    with ProcessPoolExecutor(args.jobs) as pool:
        best = choose_rates(samples // 2, [row for row in rows if row != "lit"], args.jobs, pool)
        best["lit"] = best.get("clip", "2e-3")  # its text tower is CLIP's

        def run_all(names: list[str], samples: int) -> dict[str, list[dict]]:
            folders = {row: [PLACE / f"{row}-{samples}-{seed}" for seed in seeds] for row in names}
            pairs = [(row, s, f) for row in names for s, f in zip(seeds, folders[row], strict=True)]
            # Seed by seed, so that a command that is stopped has whole seeds.
            pairs.sort(key=lambda pair: seeds.index(pair[1]))
            train_all({f: flags(row, samples, s, best[row]) for row, s, f in pairs}, args.jobs)
            return {row: list(pool.map(measure, folders[row])) for row in names}

        found = run_all([row for row in rows if row != "lit"], samples)
        if "lit" in rows:  # starts from the runs of another row
            found |= run_all(["lit"], samples)
        show(found, best, samples)
        if {"superclass", "clip"} <= set(rows):
            minutes = {row: median(f["minutes"] for f in found[row]) for row in found}
            longer = round(samples * minutes["clip"] / minutes["superclass"] / BATCH) * BATCH
            found = run_all(["superclass"], longer)
            show({"superclass, equal time": found["superclass"]}, best, longer)


def choose_rates(samples: int, rows: list[str], jobs: int, pool) -> dict[str, str]:
    """The learning rate of each row that is best on the held-out icons of training."""
    sweep = {(row, r): PLACE / f"sweep-{row}-{samples}-{r}" for row in rows for r in RATES}
    train_all({f: flags(row, samples, 0, r) for (row, r), f in sweep.items()}, jobs)
    found = pool.map(functools.partial(measure, held_out_only=True), sweep.values())
    scores = dict(zip(sweep, (scores["held out"] for scores in found), strict=True))
    for row in rows:
        print(row, *(f"{rate}: {scores[row, rate]:.3f}" for rate in RATES), flush=True)
    return {row: max(RATES, key=lambda rate: scores[row, rate]) for row in rows}


def show(found: dict[str, list[dict]], best: dict[str, str], samples: int):
    print(f"\n{samples:,} images\n")
    lines = []
    for row, runs in found.items():
        columns = [[scores[key] for scores in runs if key in scores] for key in SCORES]
        line = [row, best[row.split(",")[0]], str(len(runs))]
        line += [cell(values) if values else "" for values in columns]
        line += [f"{median(scores['images/s'] for scores in runs):.0f}"]
        lines.append([*line, f"{median(scores['minutes'] for scores in runs):.1f}"])
    print_table(["run", "lr", "seeds", *SCORES, "images/s", "minutes"], lines)
    for row, runs in found.items():
        print(
            f"{row}: prompts", *(" / ".join(scores["prompts"] or []) for scores in runs), sep=" | "
        )


if __name__ == "__main__":
    main()
