"""A card's speed on B/16: training steps, other models in turn, the loss, copies, the loader.

python -m tests.bench_gpu                                      one GPU, bf16, about ten minutes
python -m tests.bench_gpu --ladder --json ladder.jsonl         what each lever brings, five minutes
python -m tests.bench_gpu --quick --model XS/8 --image-size 32 --micro-batches 8 --device cpu

A step is forward, backward, clipping and AdamW on random images and captions of 16 ids out of
49,408, as train.py makes it. The share of the peak is that of the model's FLOPs, counted by torch
without what checkpointing recomputes, in the FLOPs of a large matrix product in the same run.
The ladder makes the same step with one lever after the other, from what is not used any more
("float32 stream") to what could be; its rows are in the file as soon as they are measured.
"""

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

import train
from data import Augment, Prepare, Raw, normalize
from eval import pick_device, pick_precision
from plugins.contrastive import contrastive_loss
from superclass import LayerNorm, PatchEmbed, superclass_loss
from tests.bench_data import photograph
from tests.bench_step import K, Step

V = 49_408
KINDS = [f"{kind}, V {V:,}" for kind in ("SuperClass", "CLIP", "OpenCLIP", "timm")]


class DeviceStep(Step):
    """A model with its optimizer on the device; calling it makes one training step."""

    def __init__(self, args, micro_batch: int, kind=KINDS[0], levers=()):
        with args.device:
            super().__init__(kind, argparse.Namespace(**vars(args), batch_size=micro_batch))
        self.forward, self.attention = self.model, None  # torch's own choice
        self.images = self.images.byte()
        self.weights = torch.ones(V, device=args.device)
        self.autocast = {"dtype": args.dtype, "enabled": args.dtype != torch.float32}
        # On the CPU only whether it works is of interest.
        self.backend = "inductor" if args.device.type == "cuda" else "eager"
        for lever in levers:
            LEVERS[lever](self)

    def loss(self) -> torch.Tensor:
        texts = {"CLIP": [self.labels], "OpenCLIP": [F.pad(self.labels, (0, 77 - K))]}
        with torch.autocast(self.images.device.type, **self.autocast):
            outputs = self.forward(normalize(self.images), *texts.get(self.kind, []))
        if self.kind in texts:
            images, texts, scale = outputs
            return contrastive_loss(images.float(), texts.float(), scale)
        return superclass_loss(outputs, self.labels, self.weights)

    def update(self):
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self):
        with sdpa_kernel(self.attention) if self.attention else contextlib.nullcontext():
            self.loss().backward()
        self.update()


# ------------------------------------------------------------------------------------------------
# Levers: each changes a DeviceStep.


def modules(step: DeviceStep, kind: type) -> list[torch.nn.Module]:
    return [module for module in step.model.modules() if isinstance(module, kind)]


def checkpointing(step: DeviceStep):
    step.model.encoder.grad_checkpointing = True


def float32_stream(step: DeviceStep):
    """As if positions were added in float32."""
    step.model.encoder.patch_embed.register_forward_hook(lambda _module, _in, out: out.float())


def float32_norms(step: DeviceStep):
    for norm in modules(step, LayerNorm):
        norm.__class__ = torch.nn.LayerNorm


def compiled_model(step: DeviceStep):
    step.forward = torch.compile(step.model, backend=step.backend)


def compiled_blocks(step: DeviceStep, **options):
    for block in step.model.encoder.blocks:  # compiled once for all, as only their weights differ
        block.compile(backend=step.backend, **options)


def compiled_loss(step: DeviceStep):
    """Normalisation, model and loss as one."""
    step.loss = torch.compile(step.loss, backend=step.backend)


def compiled_update(step: DeviceStep):
    """Clipping and AdamW; a run would need its learning rate as a tensor."""
    step.update = torch.compile(step.update, backend=step.backend)


def autotuned_blocks(step: DeviceStep):
    """Each product by the fastest of many kernels, also such that include what follows it."""
    tune = step.backend == "inductor"
    compiled_blocks(step, **({"mode": "max-autotune-no-cudagraphs"} if tune else {}))


def convolution(step: DeviceStep):
    """Patches by a convolution also on a GPU, as on the CPU."""

    class Convolution(PatchEmbed):
        def forward(self, images):
            return self.proj(images).flatten(2).transpose(1, 2).contiguous()

    step.model.encoder.patch_embed.__class__ = Convolution


def bf16_weights(step: DeviceStep):
    """No casts at all: a bound, since nothing trains well like this."""
    step.model.bfloat16()
    step.autocast["enabled"] = False
    step.model.encoder.patch_embed.register_forward_pre_hook(lambda _, images: images[0].bfloat16())


def attention(backend: SDPBackend):
    return lambda step: setattr(step, "attention", backend)


LEVERS = {
    "--compile": compiled_model,
    "--grad-checkpointing": checkpointing,
    "float32 stream": float32_stream,
    "float32 norms": float32_norms,
    "compiled blocks": compiled_blocks,
    "compiled loss": compiled_loss,
    "compiled update": compiled_update,
    "autotuned blocks": autotuned_blocks,
    "convolution": convolution,
    "bf16 weights": bf16_weights,
    "cuDNN attention": attention(SDPBackend.CUDNN_ATTENTION),
    "flash attention": attention(SDPBackend.FLASH_ATTENTION),
}
# In order: what was, what is, what to compile, single levers on the cheapest to compile, and, if
# time is left, what takes long. What helped is then measured together.
SINGLE = [
    ["compiled blocks", lever] for lever in ("cuDNN attention", "flash attention", "convolution")
]
LADDER = [
    ["float32 stream", "float32 norms", "convolution"],
    ["float32 norms", "convolution"],
    ["convolution"],
    [],
    ["--compile", "float32 stream", "float32 norms", "convolution"],
    ["--compile", "convolution"],
    ["--compile"],
    ["compiled blocks"],
    ["compiled loss"],
    *SINGLE,
    ["compiled blocks", "bf16 weights"],
]


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
    start = time.perf_counter()
    step(), step()  # the second has the optimizer's moments
    getattr(torch, args.device.type).synchronize()
    step.warm_s = time.perf_counter() - start
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
    names = "--compile", "--grad-checkpointing"
    table("SuperClass", "flags", "micro-batch", "images/s", "share of peak", "GB")
    for levers in ([], names[1:], names[:1], names):
        flags = " ".join(levers)
        for micro_batch in args.micro_batches:
            torch.compiler.reset()
            try:
                step, memory = warm(args, micro_batch, levers=levers)
            except torch.OutOfMemoryError:
                row(flags, micro_batch, "does not fit", "", "")
                break
            speed = micro_batch / seconds(step, args.device, args.repeats)
            del step  # before the next is built
            best[micro_batch] = max(speed, best.get(micro_batch, 0))
            row(flags, micro_batch, f"{speed:.1f}", f"{speed * flops / peak:.0%}", memory)
    return best


class Ladder:
    """Rows of levers within a time that starts with the program."""

    def __init__(self, args, start: float):
        self.args, self.start, self.speeds = args, start, {}
        self.reserve = 0 if args.quick else 40  # seconds for the models in turn
        self.flops, self.peak = flops_per_image(args), peak_flops(args)
        self.note(matrix_product_tflops=self.peak / 1e12, gflop_an_image=self.flops / 1e9)

    def left(self) -> float:
        return 60 * self.args.minutes - (time.perf_counter() - self.start)

    def note(self, **values):
        """A line of the JSON file, which is closed at once: nothing of it is lost."""
        values |= {"at_s": round(time.perf_counter() - self.start, 1)}
        if self.args.json:
            with self.args.json.open("a") as file:
                file.write(json.dumps(values) + "\n")

    def climb(self):
        args, micro_batch = self.args, self.args.micro_batches[0]
        print(f"{self.flops / 1e9:.1f} GFLOP an image; peak {self.peak / 1e12:.2f} TFLOP/s")
        table("Levers", "levers", "micro-batch", "images/s", "share of peak", "GB", "compile s")
        for levers in LADDER:
            self.measure(levers, micro_batch)
        best = self.best()
        for size in dict.fromkeys((micro_batch, args.micro_batches[-1])):
            self.measure(best, size)
        self.measure(["autotuned blocks", *best[1:]], micro_batch, needs=90)
        self.measure([*best, "compiled update"], micro_batch, needs=60)
        if self.left() < self.reserve / 2:
            return print(f"\nNo time is left for the models in turn: {self.left():.0f} s")
        for kind, speed, ratio, memory in bench_kinds(args, micro_batch):
            self.note(kind=kind, images_per_s=speed, time_ratio=ratio, gb=memory)

    def best(self) -> list[str]:
        """What to compile, with all that made compiled blocks 0.5 % faster."""
        name = lambda levers: ", ".join(levers)  # noqa: E731
        speed = lambda levers: self.speeds.get(name(levers), 0)  # noqa: E731
        first = max(["--compile"], ["compiled blocks"], ["compiled loss"], key=speed)
        helped = [s for s in SINGLE if speed(s) > 1.005 * speed(["compiled blocks"]) > 0]
        kinds = [s for s in helped if s[1].endswith("attention")]
        kinds = sorted(kinds, key=speed)[-1:] + [s for s in helped if s not in kinds]
        return [*first, *(s[1] for s in kinds)]

    def measure(self, levers: list[str], micro_batch: int, needs: int = 0):
        args, name = self.args, ", ".join(levers)
        needs = needs or (45 if {"--compile", "compiled loss"} & set(levers) else 15)
        if self.left() < self.reserve + (0 if args.quick else needs):
            self.note(levers=levers, skipped="no time")
            return row(name, micro_batch, f"skipped: {self.left():.0f} s are left", "", "", "")
        torch.compiler.reset(), gc.collect()

        def stop(*_):
            raise TimeoutError("it took all of the time")

        signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, max(1, self.left() - self.reserve))
        try:
            step, memory = warm(args, micro_batch, levers=levers)
            times = [seconds(step, args.device, args.repeats) for _ in range(2)]
        except Exception as error:  # a lever that does not work here must not end the ladder
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:60]}"
            self.note(levers=levers, micro_batch=micro_batch, failed=str(error))
            return row(name, micro_batch, reason, "", "", "")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        speed = micro_batch / min(times)
        if micro_batch == args.micro_batches[0]:
            self.speeds[name] = speed
        share, compiling = speed * self.flops / self.peak, max(0, step.warm_s - 2 * min(times))
        row(name, micro_batch, f"{speed:.1f}", f"{share:.1%}", memory, f"{compiling:.0f}")
        self.note(
            levers=levers, micro_batch=micro_batch, images_per_s=speed, share=share, gb=memory,
            compile_s=compiling, step_ms=[1000 * t for t in times],
        )  # fmt: skip


def bench_kinds(args, micro_batch: int) -> list[tuple]:
    """All kinds in turn, in one process; ratios are medians over rounds."""
    steps, rows = {}, []
    for kind in KINDS:
        torch.compiler.reset(), gc.collect()
        try:
            steps[kind] = warm(args, micro_batch, kind=kind)
        except ImportError as error:
            print(f"\n{kind} is left out: {error}")
    kinds = list(steps)
    rounds = [
        {kind: seconds(steps[kind][0], args.device, args.repeats) for kind in kinds[:: (-1) ** n]}
        for n in range(2 if args.quick else 6)  # every other round in reverse
    ]
    table(f"In turn, micro-batch {micro_batch}", "model", "images/s", "time ÷ SuperClass's", "GB")
    for kind in kinds:
        speed = micro_batch / statistics.median(r[kind] for r in rounds)
        ratio = statistics.median(r[kind] / r[KINDS[0]] for r in rounds)
        row(kind, f"{speed:.1f}", f"{ratio:.2f}", steps[kind][1])
        rows.append((kind, speed, ratio, steps[kind][1]))
    return rows


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


def main(argv: list[str] | None = None):
    start = time.perf_counter()
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
    add("--ladder", action="store_true", help="measure one lever after the other")
    add("--json", type=Path, help="ladder: file that each row is added to")
    add("--minutes", type=float, default=5, help="ladder: what does not fit is skipped")
    args = parser.parse_args(argv)
    if args.ladder and args.micro_batches == parser.get_default("micro_batches"):
        args.micro_batches = [256, 1024]
    args.dtype = getattr(torch, pick_precision(args.precision, args.device))
    args.repeats = 2 if args.quick else args.repeats
    name = torch.cuda.get_device_name() if args.device.type == "cuda" else str(args.device)
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads;", end=" ")
    print(f"{args.model} at {args.image_size} px, V {V:,}, {args.dtype}")
    if args.ladder:
        return Ladder(args, start).climb()
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
