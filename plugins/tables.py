"""Tables of several runs, with mean and deviation over seeds.

python eval.py table RUN [RUN ...]
"""

import argparse
import math
import statistics
import sys
from itertools import pairwise
from pathlib import Path

from data import UserError
from eval import MAY_CHANGE, own_rows, read_config, read_jsonl, task_name
from plugins import Parser

COSTS = ("minutes", "images/s", "peak MB")


def table(folders: list[Path]) -> str:
    """A Markdown table of finished runs: a row for each group of `grouped`, mean ± deviation.

    A score that some runs of a group lack is left out, with a message. Costs depend on the machine
    and are medians: minutes are those of training alone, peak MB is the process's.
    """
    groups = grouped(folders)
    columns = [column for group in groups.values() for _, scores in group for column in scores]
    columns = [column for column in dict.fromkeys(columns) if column not in COSTS] + [*COSTS]
    lines = [f"| run | lr | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for name, group in groups.items():
        cells = [name, f"{group[0][0].lr:g}", str(len(group))]
        for column in columns:
            values = [scores[column] for _, scores in group if column in scores]
            if len(values) < len(group):
                cells.append("")
                if values:
                    found = f"{len(values)} of {len(group)} runs have {column}"
                    print(f"{name}: {found}", file=sys.stderr)
            elif column in COSTS:
                cells.append(f"{statistics.median(values):.{1 if column == 'minutes' else 0}f}")
            else:
                cells.append(cell(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grouped(folders: list[Path]) -> dict[str, list[tuple[argparse.Namespace, dict[str, float]]]]:
    """The configs and scores of finished runs, those that differ only in their seed together.

    A group is named after its folders, without the trailing -SEED (--init may end in one, too).
    Raises UserError for a group whose runs differ otherwise or share a seed.
    """
    groups = {}
    for folder in folders:
        config, scores = finished(folder)
        name = folder.resolve().name.removesuffix(f"-{config.seed}")
        groups.setdefault(name, []).append((config, scores))
    for name, group in groups.items():
        flags = []
        for config, _ in group:
            init = (config.init or "").rstrip("/").removesuffix(f"-{config.seed}")
            flags.append({**vars(config), "seed": None, "init": init})
        keys = sorted(set().union(*flags) - {*MAY_CHANGE, "dtype", "lanes"})
        differ = [key for key in keys if any(own.get(key) != flags[0].get(key) for own in flags)]
        if differ:
            raise UserError(f"the runs '{name}' are not one group: {', '.join(differ)} differ")
        if len({config.seed for config, _ in group}) < len(group):
            raise UserError(f"the runs '{name}' are not several: a seed occurs twice")
    return groups


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation, the latter of several values only."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def finished(folder: Path) -> tuple[argparse.Namespace, dict[str, float]]:
    """A finished run's config and what it measured: its last score for each task, and its costs."""
    config, metrics = read_config(folder), read_jsonl(folder / "metrics.jsonl")
    steps = math.ceil(config.samples / config.batch_size)
    if not metrics or metrics[-1]["step"] < steps:
        raise UserError(f"{folder} is not finished: continue it with --out {folder} --resume")
    metrics = [line for line in metrics if "val_loss" not in line]
    rows, scores = [row for row in own_rows(folder) if row["step"] == steps], {}
    several = len({row["attribute"] for row in rows if "attribute" in row}) > 1
    for row in rows:
        if "top1" in row:
            scores[task_name(row) + (f" {row['attribute']}" if several else "")] = row["top1"]
        else:  # retrieval, captions
            scores |= {key: value for key, value in row.items() if isinstance(value, float)}
    lines = pairwise([{"step": 0}, *metrics])
    seconds = sum(line["step_s"] * (line["step"] - before["step"]) for before, line in lines)
    scores["minutes"] = seconds / 60
    scores["images/s"] = statistics.median(line["images_per_s"] for line in metrics)
    if metrics[-1]["peak_mb"]:  # unknown on Windows
        scores["peak MB"] = max(line["peak_mb"] for line in metrics)
    return config, scores


def main(argv: list[str]):
    parser = Parser(prog="eval.py table")
    parser.add_argument("run", type=Path, nargs="+", help="folders of finished runs")
    print(table(parser.parse_args(argv).run))
