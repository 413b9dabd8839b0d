"""What the experiments share: runs that are trained two at a time, and scores that are kept."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RATES = ("2.5e-4", "5e-4", "1e-3", "2e-3", "4e-3", "8e-3", "1.6e-2", "3.2e-2")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)

from data import UserError  # noqa: E402
from eval import append_jsonl, open_sources, own_rows, read_jsonl  # noqa: E402
from plugins.tables import cell as cell  # noqa: E402
from plugins.tables import finished  # noqa: E402
from train import parse  # noqa: E402


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
    """Train each folder's run with its flags, `jobs` at a time; goes on where it was stopped.

    Exits if a folder holds a run with other flags.
    """

    def train(folder: Path):
        resume = ["--resume"] if (folder / "config.json").exists() else []
        command = ["--out", str(folder), *resume, *runs[folder]]
        parse(command)  # raises UserError for other flags
        if not is_done(folder):
            python("train.py", *command)
            print(f"trained {folder}", flush=True)

    try:
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(train, runs))
    except UserError as error:
        sys.exit(f"error: {error}")


def untried(scores: dict[str, float]) -> list[str]:
    """The learning rates that a sweep tries next, given the scores so far; none at its end.

    First the middle three of RATES; the end is when both neighbours of the best are tried, or RATES
    has no more.
    """
    near = RATES.index(max(scores, key=scores.get)) if scores else len(RATES) // 2
    return [rate for rate in RATES[max(near - 1, 0) :][:3] if rate not in scores]


def is_done(folder: Path) -> bool:
    """Whether a run is at its end, and scored if it has data to be scored on."""
    try:
        config, _ = finished(folder)
        return bool(own_rows(folder)) or open_sources(config)[1] is None
    except UserError:
        return False


def score(folder: Path, task: str, *flags: str) -> dict:
    """The row of an evaluation with these flags of eval.py; measured once, then read again."""
    path = folder / "scores.jsonl"
    asked = [task, *flags]
    found = [row for row in read_jsonl(path) if row["asked"] == asked]
    if not found:
        python("eval.py", task, str(folder), "--workers", "0", *flags)
        found = [{"asked": asked, **read_jsonl(folder / "eval.jsonl")[-1]}]
        append_jsonl(path, found)
    return found[0]


def print_table(head: list[str], rows: list[list[str]]):
    """A Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print(f"| {' | '.join(row)} |", flush=True)
