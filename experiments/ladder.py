"""Time to target: how soon does zero-shot reach 0.300 on icons of unseen families?

    python experiments/ladder.py adamw-256-4e-3 muon-128-4e-3 --images 102400 --seeds 1
    python experiments/ladder.py                                   the table of what is there

Needs data/plain, which `icons.py --plain` builds. A rung is a set of flags; all have encoder, data
and vocabulary of compare.py, and warm up for a tenth of their steps. Its score on labelled icons of
training sets that were kept out of training ("held out") decides between rungs; with --test the
scores on the test are measured, too. Each run adds a line to ladder.jsonl, which comes with the
repository; what has a line is not trained again. Minutes depend on what else the machine does:
compare them within a day only. The command can be stopped and repeated.
"""

import argparse
import json
import re
import sys
from os import times
from pathlib import Path
from statistics import median

from common import append_jsonl, cell, finished, print_table, read_jsonl, train_all
from compare import FLAGS, ICONS, PLACE, measure
from compare import SCORES as ON_TEST

from data import load_source, load_tokenizer, save_tokenizer
from eval import publish

KEPT = Path("experiments/ladder.jsonl")
SCORES = ("held_out", "zero_shot", "probe", "cpu_minutes", "minutes")
VOCABULARY = PLACE / "bpe-2048.tiktoken"  # learned once, not by each run
RUNG = r"(?:(\w+)-)?(adamw|muon)-(\d+)-([\d.]+e-\d)((?:-\w+)*)"
MORE = {"crop1": "--min-scale 1", "V4096": "--tokenizer bpe:4096"}
MORE |= {"XXS": "--model XXS/8", "XXS16": "--model XXS/16", "XS16": "--model XS/16"}
MORE |= {"ResNet50": "--model resnet50", "ConvNeXtT": "--model convnext_tiny"}
MORE |= {name: f"--tokenizer {PLACE}/{name}.json" for name in ("wordpiece", "unigram")}
MORE |= {"third": f"--data {ICONS}/train-{{00000..00015}}.tar"}  # of 48 shards
MORE |= {"tenth": f"--data {ICONS}/train-{{00000..00004}}.tar"}
MORE |= {"labelled": f"--data {ICONS}/labelled-*.tar"}
for first in ("muon-128-1.6e-2-crop1-XXS16", "clip-muon-128-4e-3-crop1-XXS16"):  # of rivals.py
    start = f"{MORE['labelled']} --init {PLACE}/ladder-{first}-307200-SEED"
    MORE["after_clip" if "clip" in first else "after_superclass"] = start


def flags_of(rung: str) -> str:
    """The flags of a rung such as muon-64-4e-3-crop1: optimizer, batch, rate, and some of MORE."""
    match = re.fullmatch(RUNG, rung)
    more = match[5].split("-")[1:] if match else [""]
    if not MORE.keys() >= set(more):
        known = f"[OBJECTIVE-]OPTIMIZER-BATCH-RATE and any of -{', -'.join(MORE)}"
        sys.exit(f"error: {rung} is no rung: {known}")
    flags = f"--objective {match[1] or 'superclass'} --optimizer {match[2]}"
    return " ".join([flags, f"--batch-size {match[3]} --lr {match[4]}", *map(MORE.get, more)])


def run_of(rung: str, images: int, seed: int) -> tuple[Path, list[str]]:
    """The folder and the command line of a run."""
    flags = flags_of(rung).replace("SEED", str(seed)).split()
    warmup = images // int(flags[flags.index("--batch-size") + 1]) // 10
    flags += ["--samples", str(images), "--warmup", str(warmup), "--seed", str(seed)]
    flags = [*FLAGS, "--tokenizer", str(VOCABULARY), *flags]
    return PLACE / f"ladder-{rung}-{images}-{seed}", flags


def train(rung: str, images: int, seed: int):
    """Train a run; if all of it is trained at once, keep the processor time that it took."""
    folder, flags = run_of(rung, images, seed)
    if not VOCABULARY.exists():
        PLACE.mkdir(parents=True, exist_ok=True)
        captions = load_source(f"{ICONS}/train-*.tar").captions(50_000)
        publish(save_tokenizer(load_tokenizer("bpe:2048", captions))[0], VOCABULARY)
    new, before = not folder.exists(), times()
    train_all({folder: flags})
    if new:  # of the process and of its loader
        spent = times().children_user + times().children_system
        spent -= before.children_user + before.children_system
        publish(json.dumps(spent / 60), folder / "cpu-minutes.json")


def score(rung: str, images: int, seed: int, test: bool) -> dict:
    """The line of a finished run."""
    folder, _ = run_of(rung, images, seed)
    costs, held_out = finished(folder)[1], measure(folder, held_out_only=True)["held out"]
    line = {"name": rung, "flags": flags_of(rung), "images": images, "seed": seed}
    line |= {"minutes": round(costs["minutes"], 2), "images_per_s": round(costs["images/s"])}
    if (kept := folder / "cpu-minutes.json").exists():
        line |= {"cpu_minutes": round(json.loads(kept.read_text()), 2)}
    line |= {"held_out": round(held_out, 4)}
    if test:
        found = measure(folder)
        line |= {key.replace("-", "_"): round(found[key], 4) for key in ON_TEST if key in found}
    return line


def lines_of(rung: str, images: int, seeds: list[int], test: bool) -> list[dict]:
    """The lines of these runs, which are trained and scored if there are none."""
    lines = []
    for seed in seeds:
        key = {"name": rung, "images": images, "seed": seed}
        known = [line for line in read_jsonl(KEPT) if key.items() <= line.items()]
        known = [line for line in known if not test or "zero_shot" in line]
        if not known:
            train(rung, images, seed)
            known = [score(rung, images, seed, test)]
            append_jsonl(KEPT, known)
        lines += known[-1:]
    return lines


def cells(lines: list[dict], keys: tuple[str, ...]) -> list[str]:
    """The mean and the deviation of each of these scores; of minutes, the median."""
    row = []
    for key in keys:
        values = [line[key] for line in lines if key in line]
        if key.endswith("minutes"):  # of which a busy machine disturbs the mean
            row.append(f"{median(values):.1f}" if values else "")
        else:
            row.append(cell(values) if values else "")
    return row


def show(lines: list[dict]):
    """A row for each rung and length, with the mean and the deviation over its seeds."""
    groups = {}
    for line in lines:
        groups.setdefault((line["name"], line["images"]), {})[line["seed"]] = line
    rows = []
    for (name, images), seeds in sorted(groups.items(), key=lambda item: item[0][::-1]):
        rows.append([name, f"{images:,}", str(len(seeds)), *cells(list(seeds.values()), SCORES)])
    print_table(["rung", "images", "seeds", *SCORES], rows)


def main():
    parser = argparse.ArgumentParser(description="Time to target on icons.")
    parser.add_argument("rungs", nargs="*", metavar="RUNG", help="such as muon-64-4e-3-crop1")
    parser.add_argument("--images", type=int, default=102_400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1])
    parser.add_argument("--test", action="store_true", help="measure the scores on the test, too")
    args = parser.parse_args()
    for seed in args.seeds:
        for rung in args.rungs:
            lines_of(rung, args.images, [seed], args.test)
    show(read_jsonl(KEPT))


if __name__ == "__main__":
    main()
