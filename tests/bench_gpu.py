"""A card's speed on B/16: training steps, other models in turn, the loss, copies, the loader.

python -m tests.bench_gpu                                      one GPU, bf16, about ten minutes
python -m tests.bench_gpu --quick --model XS/8 --image-size 32 --micro-batches 8 --device cpu

A step is forward, backward, clipping and AdamW on random images and captions of 16 ids out of
49,408, as train.py makes it. The share of the peak is that of the model's FLOPs, counted by torch
without what checkpointing recomputes, in the FLOPs of a large matrix product in the same run.
"""

import argparse
import os
import statistics
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Augment, Prepare, Raw, normalize
from eval import pick_device, pick_precision
from plugins.contrastive import contrastive_loss
from superclass import superclass_loss
from tests.bench_data import photograph
from tests.bench_step import K, Step

V = 49_408
KINDS = [f"{kind}, V {V:,}" for kind in ("SuperClass", "CLIP", "OpenCLIP", "timm")]


class DeviceStep(Step):
    """A model with its optimizer on the device; calling it makes one training step."""

    def __init__(self, args, micro_batch: int, kind=KINDS[0], compiled=False, recompute=False):
        super().__init__(kind, argparse.Namespace(**vars(args), batch_size=micro_batch))
        self.model.to(args.device).encoder.grad_checkpointing = recompute
        self.forward = torch.compile(self.model) if compiled else self.model
        self.images = self.images.byte().to(args.device)
        self.labels, self.weights = self.labels.to(args.device), torch.ones(V).to(args.device)
        self.autocast = {"dtype": args.dtype, "enabled": args.dtype != torch.float32}

    def loss(self) -> torch.Tensor:
        texts = {"CLIP": [self.labels], "OpenCLIP": [F.pad(self.labels, (0, 77 - K))]}
        with torch.autocast(self.images.device.type, **self.autocast):
            outputs = self.forward(normalize(self.images), *texts.get(self.kind, []))
        if self.kind in texts:
            images, texts, scale = outputs
            return contrastive_loss(images.float(), texts.float(), scale)
        return superclass_loss(outputs, self.labels, self.weights)

    def __call__(self):
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def seconds(function, device: torch.device, repeats: int) -> float:
    """The mean seconds of a call."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        function()
    synchronize()
    return (time.perf_counter() - start) / repeats


def warm(args, micro_batch: int, **options) -> tuple[DeviceStep, str]:
    """A step made twice, and the GB that a card needed for it; other devices do not count that."""
    cuda = args.device.type == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    step = DeviceStep(args, micro_batch, **options)
    step(), step()  # the second has the optimizer's moments
    return step, f"{(torch.cuda.max_memory_allocated() - before) / 1e9:.1f}" if cuda else ""


def flops_per_image(args) -> float:
    """Of forward and backward; attention as matrix products, which the counter knows anywhere."""
    step = DeviceStep(args, 2)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step.loss().backward()
    return counter.get_total_flops() / 2


def peak_flops(args) -> float:
    n = 512 if args.quick else 8192
    a, b = (torch.randn(n, n, device=args.device, dtype=args.dtype) for _ in range(2))
    best = min(seconds(lambda: a @ b, args.device, 10) for _ in range(4))
    return 2 * n**3 / best


def row(*cells):
    print(f"| {' | '.join(map(str, cells))} |", flush=True)


def table(title: str, *columns: str):
    print(f"\n{title}\n")
    row(*columns), row(*["---"] * len(columns))


def bench_sizes(args, flops: float, peak: float) -> dict[int, float]:
    """SuperClass with its flags; returns the best images a second of each micro-batch that fits."""
    best = {}
    table("SuperClass", "flags", "micro-batch", "images/s", "share of peak", "GB")
    for compiled in (False, True):
        for recompute in (False, True):
            flags = "--compile " * compiled + "--grad-checkpointing" * recompute
            for micro_batch in args.micro_batches:
                torch.compiler.reset()
                try:
                    step, memory = warm(args, micro_batch, compiled=compiled, recompute=recompute)
                except torch.OutOfMemoryError:
                    row(flags, micro_batch, "does not fit", "", "")
                    break
                speed = micro_batch / seconds(step, args.device, args.repeats)
                del step  # before the next is built
                best[micro_batch] = max(speed, best.get(micro_batch, 0))
                row(flags, micro_batch, f"{speed:.1f}", f"{speed * flops / peak:.0%}", memory)
    return best


def bench_kinds(args, micro_batch: int):
    """All kinds in turn, in one process; ratios are medians over rounds."""
    steps = {kind: warm(args, micro_batch, kind=kind) for kind in KINDS}
    rounds = [
        {kind: seconds(steps[kind][0], args.device, args.repeats) for kind in KINDS[:: (-1) ** n]}
        for n in range(2 if args.quick else 6)  # every other round in reverse
    ]
    table(f"In turn, micro-batch {micro_batch}", "model", "images/s", "time ÷ SuperClass's", "GB")
    for kind in KINDS:
        speed = micro_batch / statistics.median(r[kind] for r in rounds)
        ratio = statistics.median(r[kind] / r[KINDS[0]] for r in rounds)
        row(kind, f"{speed:.1f}", f"{ratio:.2f}", steps[kind][1])


def bench_loss(args, B: int):
    """The loss and its gradient, without the rest of the step."""
    labels, weights = torch.arange(K).repeat(B, 1).to(args.device), torch.ones(V).to(args.device)
    logits = torch.randn(B, V, device=args.device, dtype=args.dtype, requires_grad=True)
    call = lambda: torch.autograd.grad(superclass_loss(logits, labels, weights), logits)  # noqa: E731
    took = min(seconds(call, args.device, args.repeats) for _ in range(2))
    print(f"\nLoss and gradient of {B} x {V:,} logits, {args.dtype}: {1000 * took:.2f} ms")


def bench_waits(args, steps: int = 10):
    """Count copies and waits in steps of train.py between two lines of its log."""
    profiler, wait_for, calls = profile(), train.Progress.wait_for, []

    def counted(*given):
        calls.append(1)
        if len(calls) == 6:
            profiler.start()
        if len(calls) == 6 + steps:
            profiler.stop()
        return wait_for(*given)

    train.Progress.wait_for, train.evaluate = counted, lambda *_: None
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--samples",
            str(128 * (steps + 8)),
            "--log-every",
            "1000",
            "--out",
            f"{folder}/run",
        ]
        train.main([*flags, "--device", str(args.device), "--workers", "1"])
    table("In a step of `python train.py`, without the log's", "copy or wait", "times")
    waits = ("Synchronize", "Memcpy", "aten::item", "aten::nonzero", "aten::_to_copy")
    for event in sorted(profiler.key_averages(), key=lambda event: event.key):
        if any(word in event.key for word in waits):
            row(event.key, event.count / steps)


def bench_loader(args, best: float):
    prepare, files = Prepare(Augment(args.image_size)), [photograph(i) for i in range(16)]
    call = lambda: [prepare(Raw(file, None), (i,)) for i, file in enumerate(files)]  # noqa: E731
    torch.set_num_threads(1)
    call()
    speed = len(files) / seconds(call, torch.device("cpu"), args.repeats)
    print(f"\nLoader: {speed:.0f} images/s a core from JPEGs of 512 px to {args.image_size} px; ")
    print(f"{best / speed:.1f} cores feed {best:.0f} images/s; this machine has {os.cpu_count()}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", type=pick_device)
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"))
    add("--model", default="B/16")
    add("--image-size", type=int, default=224)
    add("--micro-batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    add("--repeats", type=int, default=10, help="steps in one measurement")
    add("--quick", action="store_true", help="few repeats and a small matrix product")
    add("--in-turn", type=int, help="only compare the models, at this micro-batch")
    args = parser.parse_args()
    args.dtype = getattr(torch, pick_precision(args.precision, args.device))
    args.repeats = 2 if args.quick else args.repeats
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads;", end=" ")
    print(f"{args.model} at {args.image_size} px, V {V:,}, {args.dtype}")
    if args.in_turn:
        return bench_kinds(args, args.in_turn)
    flops, peak = flops_per_image(args), peak_flops(args)
    print(f"{flops / 1e9:.1f} GFLOP an image; peak {peak / 1e12:.2f} TFLOP/s, measured")
    best = bench_sizes(args, flops, peak)
    if best:
        bench_kinds(args, max(size for size in best if size <= 256 or size == min(best)))
        bench_loss(args, max(best))
    bench_waits(args)
    bench_loader(args, max(best.values(), default=0))


if __name__ == "__main__":
    main()
