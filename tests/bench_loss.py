"""Time and memory of the loss, forward and backward, against the dense form of the released code.

python -m tests.bench_loss       about half a minute on two CPU cores
"""

import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from superclass import superclass_loss

B, V, K = 1024, 49_408, 32


def dense_loss(logits, labels, weights):
    """K-hot, weighted, normalised targets and log-probabilities, each a dense [B, V] tensor."""
    one_hot = torch.zeros_like(logits).scatter_(1, labels, 1.0)
    weighted = one_hot * weights
    targets = weighted / weighted.sum(dim=1, keepdim=True)
    log_p = F.log_softmax(logits, dim=1)
    products = log_p * targets
    return -products.sum(dim=1).mean()


def run(name: str, repeats: int):
    """Print the median seconds, and the bytes by which the peak of the process rose."""
    torch.manual_seed(0)
    loss = {"dense": dense_loss, "sparse": superclass_loss}[name]
    logits = torch.randn(B, V, requires_grad=True)
    labels = torch.randint(V // K, (B, K)) * K + torch.arange(K)  # each id once
    weights = torch.rand(V) + 0.1
    loss(logits[:8], labels[:8], weights).backward()  # warm up
    logits.grad = None
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = peak_memory()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        loss(logits, labels, weights).backward()
        seconds.append(time.perf_counter() - start)
        logits.grad = None
    print(statistics.median(seconds), peak_memory() - before)


def peak_memory() -> int:
    """Bytes at the process's highest, which Linux counts."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def main():
    if len(sys.argv) > 1:
        return run(sys.argv[1], int(sys.argv[2]))
    figures = {}
    for name in ("dense", "sparse"):  # memory: a process each, as a peak never falls
        figures[name] = [measure(name, 1)[1]]
    times = [(measure("dense", 3)[0], measure("sparse", 3)[0]) for _ in range(3)]
    for i, name in enumerate(("dense", "sparse")):
        figures[name].append(statistics.median(pair[i] for pair in times))
        memory, seconds = figures[name]
        print(f"{name:<7} {seconds:6.2f} s {memory / 1e6:7.0f} MB beyond the logits")
    ratio = statistics.median(sparse / dense for dense, sparse in times)
    memory = figures["sparse"][0] / figures["dense"][0]
    print(f"ratio   {ratio:6.2f}   {memory:7.2f}    at B {B}, V {V:,}, K {K}; median over rounds")


def measure(name: str, repeats: int) -> list[float]:
    command = [sys.executable, "-m", "tests.bench_loss", name, str(repeats)]
    return [float(x) for x in subprocess.check_output(command, text=True).split()]


if __name__ == "__main__":
    main()
