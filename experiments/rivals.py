"""SuperClass and its rivals with Muon, on whole icons: as many for each, then as long for each.

    python experiments/rivals.py --seeds 1 2 3

Needs data/plain, which `icons.py --plain` builds. The runs are rungs of ladder.py, and their scores
are kept in its ladder.jsonl. First the rate of each rival is swept with one seed and 102,400
images, by labelled icons of training sets that were kept out of training; then all train at their
best rates with all seeds and are scored on the test; last each rival trains for the processor time
of SuperClass. Cap scores classes by likelihood, with bare names. The command can be stopped and
repeated.
"""

import argparse
from statistics import median

from common import print_table, untried
from compare import SWEPT
from ladder import cells, lines_of

RIVALS = ("superclass", "clip", "siglip", "cap", "superclip")
BATCH = 128
SCORES = ("held_out", "zero_shot", "head", "rare", "probe", "10_shot", "retrieval", "cpu_minutes")


def rung(rival: str, rate: str) -> str:
    return f"{rival}-muon-{BATCH}-{rate}-crop1-XXS16".removeprefix("superclass-")


def best_rate(rival: str) -> str:
    """The rate that is best on the held-out icons, neither of whose neighbours is better."""
    (images, seed), scores = SWEPT, {}
    while rates := untried(scores):
        for rate in rates:
            (line,) = lines_of(rung(rival, rate), images, [seed], test=False)
            scores[rate] = line["held_out"]
    return max(scores, key=scores.get)


def main():
    parser = argparse.ArgumentParser(description="Compare objectives on icons, with Muon.")
    parser.add_argument("--images", type=int, default=307_200)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()

    rates = {rival: best_rate(rival) for rival in args.rivals}
    found, rows = {rival: [] for rival in rates}, []
    for seed in args.seeds:  # so that a command that is stopped has whole seeds
        for rival, rate in rates.items():
            found[rival] += lines_of(rung(rival, rate), args.images, [seed], test=True)
    minutes = {}
    for rival, lines in found.items():  # a run that was stopped and went on has no processor time
        minutes[rival] = median(line["cpu_minutes"] for line in lines if "cpu_minutes" in line)
    for rival, rate in rates.items():
        runs = {args.images: found[rival]}
        if rival != "superclass" and "superclass" in rates:
            fewer = args.images * minutes["superclass"] / minutes[rival]
            fewer = round(fewer / BATCH) * BATCH
            runs[fewer] = lines_of(rung(rival, rate), fewer, args.seeds, test=True)
        for images, lines in runs.items():
            rows.append([rival, rate, f"{images:,}", str(len(lines)), *cells(lines, SCORES)])
    print_table(["run", "lr", "images", "seeds", *SCORES], rows)


if __name__ == "__main__":
    main()
