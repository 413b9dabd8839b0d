"""Images a second of docs/reproduce.md's recipe on this machine, and what `eval.py plan` expects.

python -m tests.bench_recipe --compile          one GPU: S/16 and B/16, two minutes each
python -m tests.bench_recipe --models XS/16 --minutes 0.2 --image-size 32 --batch-size 64 --files 64

Draws JPEGs of 256 px into shards (noise with a photograph's spectrum, so many bytes and the same
work for each) and a vocabulary as large as CLIP's. Then it plans a run of each model, and makes one
that the plan expects to take the given minutes. "Measured" is the median of the lines of
metrics.jsonl without the first quarter; "plan" and "run" are seconds by the clock, from start to
end of each program.
"""

import argparse
import io
import itertools
import multiprocessing
import os
import random
import re
import statistics
import string
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from eval import read_jsonl
from plugins.bpe import format_ranks
from tests.bench_data import photograph

ROOT = Path(__file__).parent.parent
V, SHARDS = 49_408, 32
MICRO_BATCH = {"S/16": 1024, "B/16": 512}  # as on the page


def write_vocabulary(path: Path) -> list[str]:
    """A vocabulary of bytes and the first strings of two to four letters; returns the strings."""
    strings = (itertools.product(string.ascii_lowercase, repeat=n) for n in (2, 3, 4))
    words = ["".join(letters) for letters in itertools.chain(*strings)][: V - 256]
    tokens = [*(bytes([i]) for i in range(256)), *map(str.encode, words)]
    path.write_bytes(format_ranks({token: rank for rank, token in enumerate(tokens)}))
    return words


def write_shards(folder: Path, files: int, words: list[str]):
    """SHARDS shards of as many JPEGs each, with captions of eight words."""
    draws, folder = random.Random(0), folder / "shards"
    folder.mkdir()
    with multiprocessing.Pool() as pool:
        jpegs = pool.starmap(photograph, [(i, 256) for i in range(files)], chunksize=8)
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for i in range(shard, files, SHARDS):
                caption = " ".join(draws.choices(words, k=8)).encode()
                for kind, content in (("jpg", jpegs[i]), ("txt", caption)):
                    info = tarfile.TarInfo(f"{i:06d}.{kind}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    size = sum(map(len, jpegs)) / len(jpegs) / 1000
    print(f"{files:,} JPEGs of {size:.0f} kB in {SHARDS} shards", flush=True)


def call(program: str, *flags: str) -> tuple[str, float]:
    """What a program printed, and its seconds by the clock."""
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *program.split(), *flags], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE)  # fmt: skip
    if done.returncode:
        sys.exit(f"{program} ended with status {done.returncode}:\n{done.stdout}")
    return done.stdout, time.perf_counter() - start


def measure(model: str, args, folder: Path):
    """Print a model's row."""
    out, batch = folder / model.replace("/", "-"), args.batch_size
    flags = ["--data", str(folder / "shards"), "--tokenizer", str(folder / "v.tiktoken")]
    flags += ["--model", model, "--image-size", str(args.image_size), "--batch-size", str(batch)]
    flags += ["--micro-batch", str(min(batch, MICRO_BATCH.get(model, batch)))]
    flags += ["--workers", str(args.workers), "--out", str(out), "--log-every", "5", *args.flags]
    said, plan_s = call("eval.py plan", *flags)
    print(said, flush=True)
    expected = float(re.search(r"([\d,]+) images/s", said)[1].replace(",", ""))
    samples = batch * max(20, round(expected * 60 * args.minutes / batch))
    _, run_s = call("train.py", *flags, "--samples", str(samples))
    lines = [line for line in read_jsonl(out / "metrics.jsonl") if "images_per_s" in line]
    lines = lines[len(lines) // 4 :]
    rate = statistics.median(line["images_per_s"] for line in lines)
    waits = sum(line["data_s"] for line in lines) / sum(line["step_s"] for line in lines)
    memory = (lines[-1]["peak_mb"] or 0) / 1000
    cells = [model, f"{expected:,.0f}", f"{rate:,.0f}", f"{rate / expected:.2f}", f"{waits:.0%}"]
    cells += [f"{memory:.1f}", f"{samples:,}", f"{plan_s:.0f}", f"{run_s:.0f}"]
    print("| model | planned images/s | measured | ratio | waits | GB | images | plan | run |")
    print(f"| {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["S/16", "B/16"])
    parser.add_argument("--minutes", type=float, default=1.5, help="of training, without the start")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=4096)
    parser.add_argument("--files", type=int, default=16_384, help="JPEGs, each read repeatedly")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args, args.flags = parser.parse_known_args()  # the rest is for train.py, such as --compile
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_shards(folder, args.files, write_vocabulary(folder / "v.tiktoken"))
        for model in args.models:
            measure(model, args, folder)


if __name__ == "__main__":
    main()
