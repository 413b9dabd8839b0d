"""SuperClass, its variants, CLIP and others on icons with their designers' captions.

    python experiments/compare.py --samples 102400 --seeds 1 2 3

Needs data/plain, which `icons.py --plain` builds. All rows share encoder, data, order, schedule and
seeds; only the objective differs, or the labels. But supervised learns from the fifth of the icons
that has a class, and words leaves out the few captions without a known word. All heads are scored
with IDF weights, also those trained without.

What is chosen is chosen on labelled icons of training sets that were kept out of training, never on
the test: the learning rate of a row, the best of a sweep at 102,400 images with seed 1, also for
other lengths and seeds, and the prompts of each run's zero-shot. The sweep's scores are kept in
sweep.json, which comes with the repository; without it all is swept again. The row "equal time" is
SuperClass with as many images as it sees in the time that CLIP needs. The command can be stopped
and repeated; it goes on where it was.
"""

import argparse
import functools
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import torch
from common import RATES, cell, finished, print_table, train_all, untried

import eval as evaluation
from data import load_source
from eval import load_run, pick_device, publish

ICONS = "data/plain"
PLACE = Path("runs") / Path(ICONS).name
SWEEP = Path("experiments/sweep.json")  # scores by data, row, length and seed; then by rate
SWEPT = 102_400, 1  # images and seed of the sweep's runs
BATCH = 256
FLAGS = ["--data", f"{ICONS}/train-*.tar", "--class-names", f"{ICONS}/classes.txt"]
FLAGS += ["--tokenizer", "bpe:2048", "--batch-size", str(BATCH), "--workers", "1"]
FLAGS += ["--precision", "fp32", "--no-first-eval"]
ROWS = {
    "superclass": [],
    "no-idf": ["--no-idf"],
    "clip": ["--objective", "clip"],
    "siglip": ["--objective", "siglip"],
    "superclip": ["--objective", "superclip"],
    "cap": ["--objective", "cap"],
    "no-stopwords": ["--tokenizer", "no-stopwords:bpe:2048"],
    "words": ["--tokenizer", "words:2048"],
    "bce": ["--loss", "bce"],
    "asl": ["--loss", "asl"],
    "soft-margin": ["--loss", "soft_margin"],
    "two-way": ["--loss", "two_way"],
    "supervised": ["--objective", "supervised", "--data", f"{ICONS}/labelled-*.tar"],
    "lit": ["--objective", "lit"],  # on the encoder of SuperClass's run
}
PROMPTS = [["{}"], ["a {}"], ["{} outline"], ["{} icon"], ["{}", "{} outline", "{} filled"]]
PROMPTS += [["a {}", "a photo of a {}", "a picture of the {}"]]
PROBE = 10_000  # training images of the probe
SCORES = ("zero-shot", "head", "rare", "probe", "10-shot", "retrieval")


def run_of(row: str, rates: dict, samples: int, seed: int) -> tuple[Path, list[str]]:
    """The folder and the command line of a run; a tenth of its steps is warm-up."""
    own = ["--samples", str(samples), "--warmup", str(samples // BATCH // 10)]
    own += ["--seed", str(seed), "--lr", rates[row]]
    if row == "lit":
        own += ["--init", str(run_of("superclass", rates, samples, seed)[0])]
    return PLACE / f"{row}-{samples}-{seed}-{rates[row]}", [*FLAGS, *ROWS[row], *own]


def measure(folder: Path, held_out_only: bool = False) -> dict:
    """All scores of a run, kept in its folder; or just those on held-out icons of training."""
    kept = folder / ("held-out.json" if held_out_only else "scores.json")
    if kept.exists():
        return json.loads(kept.read_text())
    torch.set_num_threads(1)
    run = load_run(folder, pick_device("auto"))
    objective = run.config.objective

    def score(task: str, split: str = "val", **options) -> float:
        """As eval.py scores it; SuperCLIP's last row is its towers'."""
        names = f"{ICONS}/{'rare' if split == 'rare' else 'classes'}.txt"
        train, val = (
            load_source(f"{ICONS}/{name}-*.tar", class_names=names) for name in ("labelled", split)
        )
        return evaluation.measure([task], run, train, val, workers=0, **options)[-1]["top1"]

    def choose_prompts(task: str) -> tuple[float, list[str] | None]:
        choices = {"supervised": [None], "cap": PROMPTS[:1]}.get(objective, PROMPTS)
        scores = [score(task, "prompts", prompts=prompts) for prompts in choices]
        return max(scores), choices[scores.index(max(scores))]

    own_way = "likelihood" if objective == "cap" else "zeroshot"  # the former takes long
    if held_out_only:
        found = dict(zip(("held out", "prompts"), choose_prompts(own_way), strict=True))
    else:
        found = measure(folder, held_out_only=True)
        found["zero-shot"] = score(own_way, prompts=found["prompts"])
        if objective == "superclip":  # it has both towers and a head
            found["head"] = score("head", prompts=choose_prompts("head")[1])
        # Words outside the vocabulary have no score: many rare classes, some captions.
        if objective not in ("supervised", "cap") and not run.config.tokenizer.startswith("words"):
            found["rare"] = score("zeroshot", "rare", prompts=found["prompts"])
            val = load_source(f"{ICONS}/val-*.tar")
            (row,) = evaluation.measure(["retrieval"], run, None, val, workers=0)
            found["retrieval"] = row["i2t@1"]
        if objective != "lit":  # whose encoder is SuperClass's
            found["probe"] = score("probe", limit=PROBE)
            if objective != "supervised":  # it has seen the labels of more than ten
                found["10-shot"] = score("fewshot", limit=2 * PROBE)
        found |= {key: finished(folder)[1][key] for key in ("images/s", "minutes")}
    publish(json.dumps(found), kept)
    return found


def measure_all(folders, jobs: int, **options) -> list[dict]:
    # CUDA cannot be used in a forked process.
    with ProcessPoolExecutor(jobs, get_context("spawn")) as pool:
        return list(pool.map(functools.partial(measure, **options), folders))


def main():
    parser = argparse.ArgumentParser(description="Compare objectives on icons.")
    parser.add_argument("--samples", type=int, default=102_400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    if "lit" in args.rows and "superclass" not in args.rows:
        parser.error("lit needs the encoders of superclass")
    samples, seeds, rows, jobs = args.samples, args.seeds, args.rows, args.jobs
    rates = choose_rates(rows, jobs)

    def run_all(rows: list[str], samples: int) -> dict[str, list[dict]]:
        runs = {row: [run_of(row, rates, samples, seed) for seed in seeds] for row in rows}
        for group in in_order(rows):
            # Seed by seed, so that a command that is stopped has whole seeds.
            by_seed = zip(*(runs[row] for row in group), strict=True)
            train_all(dict(run for one in by_seed for run in one), jobs)
        return {row: measure_all(dict(runs[row]), jobs) for row in rows}

    found = run_all(rows, samples)
    show(found, rates, samples)
    if {"superclass", "clip"} <= set(rows):
        speed = {row: median(f["images/s"] for f in found[row]) for row in found}
        longer = round(samples * speed["superclass"] / speed["clip"] / BATCH) * BATCH
        found = run_all(["superclass"], longer)
        show({"superclass, equal time": found["superclass"]}, rates, longer)


def in_order(rows: list[str]) -> list[list[str]]:
    """The rows that start from nothing, then LiT, which starts from a run of another row."""
    return [[row for row in rows if row != "lit"], [row for row in rows if row == "lit"]]


def choose_rates(rows: list[str], jobs: int) -> dict[str, str]:
    """The learning rate of each row that is best on the held-out icons of training."""
    best, kept = {}, json.loads(SWEEP.read_text()) if SWEEP.exists() else {}
    for group in in_order(rows):
        keys = {row: "-".join(map(str, (PLACE.name, row, *SWEPT))) for row in group}
        scores = {row: kept.setdefault(key, {}) for row, key in keys.items()}
        while pairs := [(row, rate) for row in group for rate in untried(scores[row])]:
            if group == ["lit"]:  # sweep.json may have its encoder's rate, but not its run
                train_all(dict([run_of("superclass", best, *SWEPT)]), jobs)
            sweep = dict(run_of(row, best | {row: rate}, *SWEPT) for row, rate in pairs)
            train_all(sweep, jobs)
            found = measure_all(sweep, jobs, held_out_only=True)
            for (row, rate), score in zip(pairs, found, strict=True):
                scores[row][rate] = round(score["held out"], 4)
            publish(json.dumps(kept, indent=1) + "\n", SWEEP)
        for row in group:
            best[row] = max(scores[row], key=scores[row].get)
            tried = (rate for rate in RATES if rate in scores[row])
            print(row, *(f"{rate}: {scores[row][rate]:.3f}" for rate in tried), flush=True)
    return best


def show(found: dict[str, list[dict]], rates: dict[str, str], samples: int):
    print(f"\n{samples:,} images\n")
    lines = []
    for row, runs in found.items():
        columns = [[scores[key] for scores in runs if key in scores] for key in SCORES]
        line = [row, rates[row.split(",")[0]], str(len(runs))]
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
