"""Three figures on icons: scores over the global batch, the images seen, and the icons there are.

    python experiments/figures.py batch --rows superclass clip superclip    is a large one needed?
    python experiments/figures.py scale                        what do size and length buy?
    python experiments/figures.py data --samples 307200        what do more icons buy?

Data, rows and choices of the first two are those of compare.py, whose runs are used where they fit:
the learning rate of a row is the best of its sweep at a batch of 256, and follows the square root
of the batch, which is the usual rule for Adam; for another width it follows 1 / width. The third
draws rungs of ladder.py at the best rates of rivals.py: as many images seen of a tenth, a third and
all of the training icons. The command can be stopped and repeated; it goes on where it was.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

from common import cell, print_table, train_all
from compare import BATCH, PLACE, ROWS, choose_rates, measure_all
from compare import run_of as compared
from ladder import lines_of
from matplotlib.figure import Figure
from rivals import best_rate, rung

from superclass import SIZES

SCORES = ("zero-shot", "probe", "retrieval")
BATCHES = (32, 64, 128, 256, 512, 1024)
MODELS, LENGTHS = ("XXS/8", "XS/8", "Ti/8"), (51_200, 102_400, 307_200)
PARTS = {25_000: "-tenth", 80_000: "-third", 237_817: ""}  # icons in 5, 16 and 48 shards


def run_of(row: str, rates: dict, samples: int, seed: int, batch=BATCH, model="XS/8"):
    """The folder and the command line of a run; compare.py's own where nothing differs."""
    folder, own = compared(row, rates, samples, seed)
    if (batch, model) != (BATCH, "XS/8"):
        width = SIZES[model.split("/")[0]][0] / SIZES["XS"][0]
        folder = PLACE / f"{folder.name}-{batch}-{model.replace('/', '-')}"
        own += ["--batch-size", str(batch), "--warmup", str(samples // batch // 10)]
        rate = float(rates[row]) * (batch / BATCH) ** 0.5 / width
        own += ["--model", model, "--lr", f"{rate:.2g}"]
    return folder, own


def draw(lines: dict[tuple[str, str], list[tuple]], label: str, path: Path):
    """A panel for each score, a line for each row; points are (x, values over seeds)."""
    page = Figure((9, 3), dpi=100, layout="constrained")
    for n, score in enumerate(SCORES, 1):
        axes = page.add_subplot(1, len(SCORES), n, title=score, xlabel=label, xscale="log")
        for (line, of), points in lines.items():
            if of == score:
                x, values = zip(*points, strict=True)
                deviations = [stdev(v) if len(v) > 1 else 0 for v in values]
                axes.errorbar(x, list(map(mean, values)), deviations, marker="o", ms=4, label=line)
                ticks = [f"{n:,}" if n < 10_000 else f"{n / 1000:.3g}k" for n in x]
                axes.set_xticks(x, ticks)
        axes.set_ylim(bottom=0)
        axes.minorticks_off()
    page.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    page.savefig(path)


def over_icons(rows: list[str], samples: int, seeds: list[int]):
    """The third figure and its table."""
    lines, table = {}, []
    for row in rows:
        own = rung(row, best_rate(row))
        for icons, part in PARTS.items():
            found = lines_of(own + part, samples, seeds, test=True)
            columns = {key: [line[key.replace("-", "_")] for line in found] for key in SCORES}
            for score, values in columns.items():
                lines.setdefault((row, score), []).append((icons, values))
            table.append([row, f"{icons:,}", *map(cell, columns.values())])
    print_table(["run", "icons", *SCORES], table)
    draw(lines, "icons to train on", Path("assets/data.png"))


def main():
    parser = argparse.ArgumentParser(description="Draw scores over batch sizes, lengths or data.")
    parser.add_argument("figure", choices=("batch", "scale", "data"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--samples", type=int, default=102_400, help="batch, data: of each run")
    rows = [row for row in ROWS if row not in ("words", "supervised", "lit")]  # they lack a score
    parser.add_argument("--rows", nargs="+", choices=rows, default=["superclass", "clip"])
    parser.add_argument("--models", nargs="+", default=MODELS, help="scale: the encoders")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    args = parser.parse_args()
    for model in args.models:
        if model.split("/")[0] not in SIZES:
            parser.error(f"--models {model}: use SIZE/PATCH, SIZE one of {', '.join(SIZES)}")
    if args.figure == "data":
        return over_icons(args.rows, args.samples, args.seeds)
    if args.figure == "batch":
        kinds = [
            (row, row, b, {"samples": args.samples, "batch": b})
            for row in args.rows
            for b in BATCHES
        ]
    else:
        kinds = [
            (f"{row} {model}", row, length, {"samples": length, "model": model})
            for row in args.rows
            for model in args.models
            for length in LENGTHS
        ]
    lines, table = {}, []
    rates = choose_rates(args.rows, args.jobs)
    runs = [
        [run_of(row, rates, seed=seed, **own) for seed in args.seeds] for _, row, _, own in kinds
    ]
    train_all(dict(run for group in zip(*runs, strict=True) for run in group), args.jobs)
    found = iter(measure_all([folder for group in runs for folder, _ in group], args.jobs))
    for line, _, x, _ in kinds:
        of_seeds = [next(found) for _ in args.seeds]
        columns = {score: [scores[score] for scores in of_seeds] for score in SCORES}
        for score, values in columns.items():
            lines.setdefault((line, score), []).append((x, values))
        table.append([line, f"{x:,}", *map(cell, columns.values())])
    what = "global batch" if args.figure == "batch" else "images seen"
    print_table(["run", what, *SCORES], table)
    draw(lines, what, Path(f"assets/{args.figure}.png"))


if __name__ == "__main__":
    main()
