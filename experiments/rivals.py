"""SuperClass and its rivals with Muon, on whole icons, as many for each.

    python experiments/rivals.py                    51,200 images, three seeds
    python experiments/rivals.py --images 307200

Needs data/plain, which `icons.py --plain` builds. The runs are rungs of ladder.py, and their scores
are kept in its ladder.jsonl. First all rates are tried with the first seed, on labelled icons of
training sets that were kept out of training; then each rival trains with all seeds at its best rate
and is scored on the test; last SuperClass trains for the processor time of CLIP. Cap scores classes
by likelihood, with bare names. The command can be stopped and repeated.
"""

import argparse

from common import print_table
from ladder import cells, lines_of

RIVALS = ("superclass", "clip", "siglip", "cap", "superclip")
BATCH = 128
SCORES = ("held_out", "zero_shot", "head", "rare", "probe", "10_shot", "retrieval", "cpu_minutes")


def rung(rival: str, rate: str) -> str:
    return f"{rival}-muon-{BATCH}-{rate}-crop1".removeprefix("superclass-")


def main():
    parser = argparse.ArgumentParser(description="Compare objectives on icons, with Muon.")
    parser.add_argument("--images", type=int, default=51_200)
    parser.add_argument("--rivals", nargs="+", choices=RIVALS, default=RIVALS)
    parser.add_argument("--rates", nargs="+", default=["4e-3", "2e-3"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    args = parser.parse_args()
    images, seeds = args.images, args.seeds

    best, found = {}, {}
    for rate in args.rates:  # so that a command that is stopped has tried whole rates
        for rival in args.rivals:
            (line,) = lines_of(rung(rival, rate), images, seeds[:1], test=False)
            best[rival] = max(best.get(rival, (-1, "")), (line["held_out"], rate))
    for few in (seeds[:n] for n in range(1, len(seeds) + 1)):
        for rival, (_, rate) in best.items():
            found[rival] = rate, images, lines_of(rung(rival, rate), images, few, test=True)
    if {"superclass", "clip"} <= set(found):
        own, theirs = (found[row][2][0]["cpu_minutes"] for row in ("superclass", "clip"))
        rate, longer = best["superclass"][1], round(images * theirs / own / BATCH) * BATCH
        lines = lines_of(rung("superclass", rate), longer, seeds, test=True)
        found["superclass in clip's time"] = rate, longer, lines
    rows = []
    for name, (rate, its, lines) in found.items():
        rows.append([name, rate, f"{its:,}", str(len(lines)), *cells(lines, SCORES)])
    print_table(["run", "lr", "images", "seeds", *SCORES], rows)


if __name__ == "__main__":
    main()
