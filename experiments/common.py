"""What the experiments share: runs that are trained two at a time, and scores that are kept."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from eval import finished  # noqa: E402
from run import UserError, read_jsonl  # noqa: E402


def python(*command: str) -> str:
    """The output of one of the programs, run on one core; stops if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], env=environment, text=True, capture_output=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed: {done.stderr.splitlines()[-1:]}")
    return done.stdout


def train_all(runs: dict[Path, list[str]], jobs: int = 2):
    """Train each folder's run with its flags, `jobs` at a time; goes on where it was stopped."""

    def train(folder: Path):
        try:
            finished(folder)
        except UserError:
            python("train.py", "--out", str(folder), "--resume", *runs[folder])
            print(f"trained {folder}", flush=True)

    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(train, runs))


def score(folder: Path, task: str, *flags: str) -> dict:
    """The row of an evaluation with these flags of eval.py; measured once, then read again."""
    path = folder / "scores.jsonl"
    asked = [task, *flags]
    found = [row for row in read_jsonl(path) if row["asked"] == asked]
    if not found:
        python("eval.py", task, str(folder), "--workers", "0", *flags)
        found = [{"asked": asked, **read_jsonl(folder / "eval.jsonl")[-1]}]
        with open(path, "a") as file:
            file.write(json.dumps(found[0]) + "\n")
    return found[0]


def cell(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    spread = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def print_table(head: list[str], rows: list[list[str]]):
    """A Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |", flush=True)
