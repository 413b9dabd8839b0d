"""Pretrain a vision encoder with SuperClass, or with what it is compared to: one flat loop.

    python train.py                                     drawn shapes, two CPU cores, a few minutes
    torchrun --standalone --nproc_per_node=8 train.py --data ... --model B/16 --image-size 224

A run lives in its folder (--out): config.json, tokenizer.tiktoken, checkpoint.pt, encoder.pt,
metrics.jsonl, eval.jsonl. `python train.py --out RUN --resume` continues it exactly where it stood.
"""

import argparse
import atexit
import contextlib
import functools
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter as HelpFormatter
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

try:
    import resource
except ImportError:  # on Windows
    resource = None

from baselines import LOSSES, contrastive_loss, supervised_loss
from data import (
    KINDS,
    MEAN,
    STD,
    Augment,
    Prepare,
    Start,
    TrainStream,
    UserError,
    batches,
    normalize,
    refuse_if_bad,
    tell_skipped,
)
from eval import (
    Run,
    build_model,
    measure,
    open_sources,
    own_rows,
    pick_device,
    read_checkpoint,
    read_config,
    read_jsonl,
    report,
)
from superclass import IDF, ViT, build_encoder, superclass_loss
from tokenizer import (
    caption_labels,
    caption_tokens,
    load_tokenizer,
    read_tokenizer,
    save_tokenizer,
    tokenizer_config,
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Pretrain with SuperClass.", formatter_class=HelpFormatter
    )
    add = parser.add_argument
    add(
        "--data",
        default="shapes",
        help="shapes, cifar10, cifar100, fashion-mnist, a folder, a table, .tar shards",
    )
    add("--val-data", help="source to evaluate on; built-in sources have a split of their own")
    add("--data-root", default="data", help="where torchvision keeps its sets")
    add("--class-names", help="file with a class a line, several names between commas")
    add("--caption-noise", type=float, default=0.0, help="share of images with another's caption")
    add(
        "--tokenizer",
        default="bpe:512",
        help="bpe:N or words:N (learned from the captions), clip, a tiktoken name, a .tiktoken",
    )
    add("--clip-vocab", help="CLIP's vocabulary file; default: an installed package's, or fetched")
    add("--drop-stopwords", action="store_true", help="without words such as 'the' in the captions")
    add(
        "--objective",
        default="superclass",
        choices=("superclass", "clip", "lit", "supervised"),
        help="lit: a text tower for the locked encoder of --init; supervised: the source's classes",
    )
    add("--loss", default="softmax", choices=("softmax", *LOSSES), help="of superclass")
    add("--no-idf", action="store_true", help="softmax: weight all tokens of a caption alike")
    add("--model", default="XS/8", help="SIZE/PATCH, such as B/16; resnet50, convnext_tiny")
    add("--init", help="start from the encoder of a run, or of a file of timm's or ours")
    add("--image-size", type=int, default=32, help="pixels")
    add("--samples", type=int, default=76_800, help="images seen in the whole run")
    add("--batch-size", type=int, default=128, help="global: over all processes and micro-batches")
    add(
        "--micro-batch",
        type=int,
        help="images in one forward pass of one process; default: its share of the batch",
    )
    add("--lr", type=float, default=1.5e-3, help="peak learning rate")
    add("--layer-decay", type=float, default=1.0, help="learning rate from a block to that below")
    add("--beta2", type=float, default=0.98, help="AdamW's second decay")
    add("--weight-decay", type=float, default=0.2, help="for matrices; other parameters have none")
    add("--warmup", type=int, default=40, help="steps")
    add("--clip-grad", type=float, default=1.0, help="largest norm of the gradient")
    add("--min-scale", type=float, default=0.9, help="smallest share of the image in a random crop")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--color-jitter", type=float, default=0.0, help="strength, for 8 images of 10")
    add("--grayscale", type=float, default=0.0, help="share of images without colour")
    add(
        "--precision",
        default="auto",
        choices=("auto", "bf16", "fp16", "fp32"),
        help="auto: bf16 where it is fast",
    )
    add("--compile", action="store_true", help="torch.compile the model")
    add("--grad-checkpointing", action="store_true", help="recompute activations, to save memory")
    add("--workers", type=int, default=2, help="processes that load data, per process that trains")
    add("--seed", type=int, default=0)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", type=Path, help="the run's folder; default: runs/DATA")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--no-first-eval", action="store_true", help="evaluate at the end only")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--log-every", type=int, default=20, help="steps between lines of metrics.jsonl")
    return parser


# What may differ when a run is resumed; all else belongs to the run.
MAY_CHANGE = {"micro_batch", "compile", "grad_checkpointing", "workers", "device"}
MAY_CHANGE |= {"save_every", "log_every", "out", "resume", "no_first_eval", "clip_vocab"}
RANGES = dict.fromkeys(["image_size", "samples", "batch_size", "micro_batch"], (1, math.inf))
RANGES |= dict.fromkeys(["save_every", "log_every"], (1, math.inf))
RANGES |= dict.fromkeys(["workers", "warmup", "seed"], (0, math.inf))
RANGES |= dict.fromkeys(["lr", "weight_decay", "clip_grad"], (0.0, math.inf))
RANGES |= dict.fromkeys(["min_scale", "beta2", "grayscale", "color_jitter"], (0.0, 1.0))
RANGES |= dict.fromkeys(["caption_noise", "layer_decay"], (0.0, 1.0))
TWO_TOWERS = ("clip", "lit")  # objectives that read captions, in their order, with a text tower
PROBE_IMAGES = 10_000  # training images for the probe before and after training; eval.py takes all


def train(args: argparse.Namespace, config: dict, rank: int, world: int, device: torch.device):
    """Train the run in args.out to its end, or to the first signal; config is its config.json."""
    say = print if rank == 0 else lambda *_: None
    tokenizer = read_tokenizer(args.out / "tokenizer.tiktoken", config)
    train_source, val_source = open_sources(config)
    if str(train_source) != config["source"]:
        raise UserError(f"{args.data} is not what it was: {config['source']}, now {train_source}")

    # The global batch is the user's; its split over processes and micro-batches is derived.
    B = args.batch_size
    micro_batch, accumulation = split_batch(args, world)
    steps = math.ceil(args.samples / B)

    # The same seed gives every process the same weights.
    torch.manual_seed(args.seed)
    model = build_model(config)
    if args.init and not (args.out / "checkpoint.pt").exists():
        init_encoder(model.encoder, Path(args.init), say)
    model.to(device)
    model.encoder.grad_checkpointing = args.grad_checkpointing
    idf = IDF(config["vocab_size"]).to(device)
    optimizer = make_optimizer(model, args, say)
    dtype = getattr(torch, config["dtype"])
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    # Where the run stands: at its beginning, or where its checkpoint left it.
    start, losses, skipped = 0, [], torch.zeros(len(KINDS), dtype=torch.int64)
    readers = world * max(1, args.workers)  # each reads its own part of a stream of shards
    first_pass, places = 0, {}
    if (args.out / "checkpoint.pt").exists():
        state = read_checkpoint(args.out / "checkpoint.pt")
        model.load_state_dict(state["model"])
        idf.load_state_dict(state["idf"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler.is_enabled() and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
        start, losses, skipped = state["step"], state["losses"], state["skipped"]
        first_pass, places = state["first_pass"], state["places"]
        say(f"resuming {args.out} at step {start}")
        if places and state["readers"] != readers:
            first_pass, places = 1 + max(place[0] for place in places.values()), {}
            say(f"{state['readers']} readers are now {readers}: the stream starts a fresh pass")
        places = {part: place for part, place in places.items() if part % world == rank}
        del state  # it holds the weights a second time
    if total(torch.tensor(start), world) != start * world:
        raise UserError(
            f"the processes see different checkpoints: {args.out} must be shared storage"
        )

    forward = torch.compile(model) if args.compile else model
    if world > 1:
        forward = DistributedDataParallel(forward, gradient_as_bucket_view=True)
    view = Augment(args.image_size, args.min_scale, args.flip, args.color_jitter, args.grayscale)
    encode = caption_tokens if args.objective in TWO_TOWERS else caption_labels
    encode = functools.partial(encode, without_stopwords=args.drop_stopwords)
    read_captions = args.objective != "supervised"  # such data may have classes alone
    prepare = Prepare(view, tokenizer if read_captions else None, args.seed, encode)
    loss_of = make_loss(args, config)
    begin = Start(start * B, first_pass, places)
    dataset = TrainStream(train_source, prepare, args.seed, micro_batch, rank, world, begin)
    say(
        f"data    {args.data}: {train_source}, {config['vocab_size']:,} tokens ({args.tokenizer})\n"
        f"model   {args.model} at {args.image_size} px, {args.objective}, on {device} in "
        f"{config['dtype']}\n"
        f"run     {steps:,} steps x {B:,} = {steps * B:,} images; a batch is {world} processes x "
        f"{accumulation} micro-batches x {micro_batch:,}"
    )

    def save(step: int):
        state = {"step": step, "losses": losses, "skipped": skipped}
        state |= {"first_pass": first_pass, "places": union(places, world), "readers": readers}
        state |= {"model": model.state_dict(), "idf": idf.state_dict()}
        state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        if rank == 0:
            publish(state, args.out / "checkpoint.pt")
            publish(model.encoder.state_dict(), args.out / "encoder.pt")
        if world > 1:
            dist.barrier()  # who leaves now must not leave rank 0 writing

    def evaluate(step: int):
        """Zero-shot and probe, on rank 0; not again when eval.jsonl has this step already."""
        if rank or not val_source or not val_source.attributes or evaluated(args.out, step):
            return
        run = Run(args.out, config, tokenizer, model, idf, step)
        tasks = ["zeroshot"]
        if list(train_source.attributes.values()) == list(val_source.attributes.values()):
            tasks += ["probe", "fewshot"]
        options = {"limit": PROBE_IMAGES, "workers": args.workers}
        try:
            rows = measure(tasks, run, train_source, val_source, **options)
            print(f"after {step:,} steps\n{report(rows, run)}")
        except UserError as error:  # no reason to lose the run
            print(f"no evaluation after {step:,} steps: {error}", file=sys.stderr)

    if start == 0:
        save(0)
        if not args.no_first_eval:
            evaluate(0)
    stop = catch_signals()
    metrics = Metrics(args.out / "metrics.jsonl", start) if rank == 0 else None
    bar = tqdm(total=steps * B, initial=start * B, unit="img", unit_scale=True, disable=rank > 0)
    stream = batches(dataset, args.workers, device)
    new_losses, new_skipped, told = [], torch.zeros_like(skipped), set()
    logged, since, waited = start, time.perf_counter(), 0.0
    model.train()

    with bar:  # closed whatever happens, so that a message stands on a line of its own
        for step in range(start, steps):
            lr = learning_rate(step, steps, args.warmup, args.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            # This process's share of the global batch. All of it is counted, on every process,
            # before any of it is weighted, so that the split changes nothing.
            asked = time.perf_counter()
            batch = [next(stream) for _ in range(accumulation)]
            waited += time.perf_counter() - asked
            stopping = Agreement(stop, world)
            for part in batch:
                part["images"] = part["images"].to(device, non_blocking=True)
                part["labels"] = part["labels"].to(device, non_blocking=True)
                part["targets"] = part["targets"].to(device, non_blocking=True)
                # The last sum over processes runs beside the forward pass.
                idf.update(part["labels"])

            loss = 0.0
            for i, part in enumerate(batch):
                last = i == accumulation - 1  # gradients are exchanged once a step
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    captions = [part["labels"]] if args.objective in TWO_TOWERS else []
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        outputs = forward(normalize(part["images"]), *captions)
                    if i == 0:
                        weights = idf.weights()
                        weights = torch.ones_like(weights) if args.no_idf else weights
                    part_loss = loss_of(outputs, part, weights) / accumulation
                    scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()

            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            # Tensors are only looked at, which waits for the GPU, when a line or a save is due.
            done, signalled = step + 1, stopping.reached()
            log = done % args.log_every == 0 or done == steps
            due = done % args.save_every == 0 or done == steps or signalled
            new_losses.append(loss)
            for part in batch:
                new_skipped += part["skipped"]
                places |= part["places"]
                if rank == 0:
                    warn(part["examples"], told)
            if log or due:
                losses += (total(torch.stack(new_losses).cpu(), world) / world).tolist()
                skipped += total(new_skipped, world)
                new_losses, new_skipped = [], torch.zeros_like(skipped)
                check_finite(losses, norm, scaler, done, args.out)
                refuse_if_bad(done * B, skipped, enough=1 if done == steps else 1000)
            bar.update(B)
            if log:
                now = time.perf_counter()
                loss = sum(losses) / len(losses)
                line = {"step": done, "samples": done * B, "loss": loss, "lr": lr}
                line |= {"grad_norm": norm.item() if norm.isfinite() else None}
                line |= {"skipped": int(skipped.sum())}
                seconds = (now - since) / (done - logged)
                line |= {"images_per_s": B / seconds, "step_s": seconds}
                line |= {"data_s": waited / (done - logged), "peak_mb": peak_memory(device)}
                if metrics:
                    metrics.write(line)
                bar.set_postfix_str(
                    f"loss {line['loss']:.3f}, lr {lr:.1e}, data {waited / (now - since):.0%}"
                )
                losses, logged, since, waited = [], done, now, 0.0
            if due:
                save(done)
            if signalled and done < steps:
                bar.close()
                say(
                    f"stopped after step {done} of {steps}; continue with: "
                    f"python train.py --out {args.out} --resume"
                )
                sys.exit(128 + (stop[0] if stop else signal.SIGTERM))

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    evaluate(steps)
    if skipped.any():
        say(f"skipped beside {steps * B:,} good samples: {tell_skipped(skipped)}")
    say(f"the run is in {args.out}")


# ------------------------------------------------------------------------------------------------
# What the loop uses.


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `steps` (section 4)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_loss(args: argparse.Namespace, config: dict):
    """What turns the model's outputs, a part of the batch and the IDF weights into a loss."""
    if args.objective in TWO_TOWERS:
        return lambda outputs, part, weights: contrastive_loss(*outputs)
    if args.objective == "supervised":
        sizes = list(map(len, config["classes"].values()))
        return lambda logits, part, weights: supervised_loss(logits, part["targets"], sizes)
    if args.loss == "softmax":
        return lambda logits, part, weights: superclass_loss(logits, part["labels"], weights)
    return lambda logits, part, weights: LOSSES[args.loss](logits, part["labels"])


def init_encoder(encoder: torch.nn.Module, path: Path, say=print):
    """Load the encoder of a run's folder, or a state dict of timm's names, into `encoder`.

    Positions for another image size are interpolated. UserError when anything else does not fit.
    """
    state, own = read_checkpoint(path / "encoder.pt" if path.is_dir() else path), {}
    if isinstance(state, dict):
        own = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not own or len(own) < len(state):
        raise UserError(f"--init {path} is no encoder: it must hold tensors by their names alone")
    wanted = encoder.state_dict()
    if isinstance(encoder, ViT) and own.get("pos_embed", torch.empty(0)).ndim == 3:
        old, new = (math.isqrt(t["pos_embed"].shape[1]) for t in (own, wanted))
        if old != new and old * old == own["pos_embed"].shape[1]:
            # [1, N, D] -> [1, D, n, n], a picture of D channels, to another size and back.
            grid = own["pos_embed"].float().transpose(1, 2).unflatten(2, (old, old))
            options = {"mode": "bicubic", "antialias": True, "align_corners": False}
            grid = torch.nn.functional.interpolate(grid, (new, new), **options)
            own["pos_embed"] = grid.flatten(2).transpose(1, 2)
            say(f"init    positions of {path} interpolated from {old} x {old} to {new} x {new}")
    wrong = [f"{key} is missing" for key in wanted.keys() - own.keys()]
    wrong += [f"{key} is not ours" for key in own.keys() - wanted.keys()]
    wrong += [
        f"{key} is {tuple(own[key].shape)} and not {tuple(wanted[key].shape)}"
        for key in wanted.keys() & own.keys()
        if own[key].shape != wanted[key].shape
    ]
    if wrong:
        more = f", and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise UserError(f"--init {path} does not fit: {', '.join(sorted(wrong)[:20])}{more}")
    encoder.load_state_dict(own)


def make_optimizer(model: torch.nn.Module, args: argparse.Namespace, say) -> torch.optim.AdamW:
    """AdamW that decays matrices, and not the biases, norms and positions.

    With --layer-decay the learning rate of each block is that much lower than of the one above it
    (Clark et al., 2020); the patches and positions count as a block, all that follows as another.
    """
    groups, depth = {}, len(getattr(model.encoder, "blocks", ()))
    for name, p in model.named_parameters():
        if not p.requires_grad:  # a locked encoder
            continue
        level = 0  # what comes after the blocks
        if args.layer_decay != 1 and re.match(r"encoder\.(?!norm)", name):
            block = re.match(r"encoder\.blocks\.(\d+)", name)
            level = depth - int(block[1]) if block else depth + 1
        matrix = p.ndim >= 2 and not name.endswith("pos_embed")
        groups.setdefault((level, not matrix), []).append(p)
    for kind, is_other in (("matrices with", False), ("biases, norms, positions without", True)):
        some = [p for (_, other), group in groups.items() if other == is_other for p in group]
        say(f"params  {sum(p.numel() for p in some):,} in {len(some)} {kind} weight decay")
    groups = [
        {
            "params": group,
            "weight_decay": 0.0 if other else args.weight_decay,
            "lr_scale": args.layer_decay**level,
        }
        for (level, other), group in sorted(groups.items(), key=lambda item: item[0])
    ]
    fused = groups[0]["params"][0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, args.lr, betas=(0.9, args.beta2), eps=1e-6, fused=fused)


def peak_memory(device: torch.device) -> float | None:
    """The most that was allocated on the GPU so far; on others the process's peak; in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if resource is None:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def pick_precision(name: str, device: torch.device) -> str:
    """The autocast type; "auto": bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        # AVX-512's bf16 alone does not pay for the conversions: 0.83 of fp32's speed with XS/7.
        name = "bf16" if features.get("amx_bf16") else "fp32"
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[name]


def total(values: torch.Tensor, world: int) -> torch.Tensor:
    """The sum over processes of a CPU tensor."""
    if world > 1:
        dist.all_reduce(values)
    return values


def union(places: dict, world: int) -> dict:
    """The entries of all processes' dictionaries."""
    if world == 1:
        return places
    everyone = [None] * world
    dist.all_gather_object(everyone, places)
    return {part: place for each in everyone for part, place in each.items()}


def check_finite(losses: list[float], norm: torch.Tensor, scaler, done: int, out: Path):
    """Stop at the first loss or gradient that is not finite; the last checkpoint stays as it is."""
    found = [("loss", done - len(losses) + 1 + i, loss) for i, loss in enumerate(losses)]
    if not scaler.is_enabled():  # with fp16 such a gradient is normal, and its step is left out
        found.append(("gradient norm", done, norm.item()))
    for what, step, value in found:
        if not math.isfinite(value):
            raise UserError(
                f"the {what} of step {step} is {value}; the last checkpoint in {out} is as it was: "
                "try a lower --lr"
            )


def catch_signals() -> list[int]:
    """The list in which the first SIGINT or SIGTERM will leave its number; a second one kills."""
    caught = []

    def catch(number, _):
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, catch)
    return caught


class Agreement:
    """Whether any process was told to stop; asked as a step begins, so that all leave together."""

    def __init__(self, stop: list[int], world: int):
        self.stop, self.flag = stop, torch.tensor(len(stop))
        self.handle = dist.all_reduce(self.flag, async_op=True) if world > 1 else None

    def reached(self) -> bool:
        if self.handle is None:  # alone, it need not wait for the next step
            return bool(self.stop)
        self.handle.wait()
        return bool(self.flag)


class Metrics:
    """metrics.jsonl, less the lines that a killed run wrote after its last checkpoint."""

    def __init__(self, path: Path, step: int):
        kept = [line for line in read_jsonl(path) if line["step"] <= step]
        self.path = path
        publish("".join(json.dumps(line) + "\n" for line in kept), path)

    def write(self, line: dict):
        with open(self.path, "a") as file:
            file.write(json.dumps(line) + "\n")


def evaluated(folder: Path, step: int) -> bool:
    """Whether eval.jsonl has the rows of that step, on the run's own data."""
    return any(row["step"] == step for row in own_rows(folder))


def warn(examples: dict[str, str], told: set[str]):
    """Say what is skipped, once for each kind."""
    for kind, example in examples.items():
        if kind not in told:
            tqdm.write(f"skipping: {example}", file=sys.stderr)
            told.add(kind)


def publish(content: dict | str, path: Path):
    """Write a file whole or not at all: beside the old one, flushed to the disk, then renamed."""
    beside = path.with_name(path.name + ".part")
    with open(beside, "wb") as file:
        file.write(content.encode()) if isinstance(content, str) else torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


# ------------------------------------------------------------------------------------------------
# Flags, processes, folders.


def start_processes(device: str) -> tuple[int, int, torch.device]:
    """Rank, world size and device, from what torchrun sets; one process without it."""
    if "RANK" not in os.environ:
        return 0, 1, pick_device(device)
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    elif device.startswith("cuda:"):
        raise UserError(f"--device {device}: with several processes each has a GPU of its own")
    device = pick_device("cpu" if device == "auto" else device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Evaluation runs on rank 0 alone; the others wait for it, an hour at most.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """All flags, and those that were given."""
    parser, unset = make_parser(), object()
    args = parser.parse_args(argv)
    blank = argparse.Namespace(**dict.fromkeys(vars(args), unset))
    given = {
        key: value
        for key, value in vars(parser.parse_args(argv, blank)).items()
        if value is not unset
    }
    for key, (low, high) in RANGES.items():
        value = getattr(args, key)
        if value is not None and not low <= value <= high:
            allowed = f"{low} or more" if high == math.inf else f"from {low} to {high}"
            raise UserError(f"--{key.replace('_', '-')} must be {allowed}, not {value}")
    if args.out is None:
        args.out = Path("runs") / (re.sub(r"\W+", "-", Path(args.data).stem).strip("-") or "run")
    return args, given


def split_batch(args: argparse.Namespace, world: int) -> tuple[int, int]:
    """Images in a micro-batch, and micro-batches of one process; UserError when it does not fit."""
    micro_batch = args.micro_batch or max(1, args.batch_size // world)
    if args.batch_size % (micro_batch * world):
        raise UserError(
            f"--batch-size {args.batch_size} is not a multiple of {world} processes x "
            f"{micro_batch} images"
        )
    whole = args.objective in TWO_TOWERS or args.loss == "two_way"
    if whole and args.batch_size != micro_batch * world:
        what = f"--loss {args.loss}" if args.loss == "two_way" else f"--objective {args.objective}"
        raise UserError(
            f"{what} compares the images of a batch with each other, so it cannot be split into "
            "micro-batches: give more processes, or a smaller --batch-size"
        )
    return micro_batch, args.batch_size // (micro_batch * world)


def start_run(args: argparse.Namespace, device: torch.device):
    """Make the run's folder, with its tokenizer and config.json; UserError when it holds a run."""
    if any(
        (args.out / name).exists() for name in ("config.json", "checkpoint.pt", "metrics.jsonl")
    ):
        raise UserError(
            f"{args.out} holds a run already: continue it with --resume, or choose another --out"
        )
    source, _ = open_sources(vars(args))
    check_objective(args, source)
    try:
        encoder = build_encoder(args.model, args.image_size)
    except ValueError as error:
        raise UserError(f"--model {args.model} --image-size {args.image_size}: {error}") from None
    if not isinstance(encoder, ViT):
        for flag, given in {
            "--layer-decay": args.layer_decay != 1,
            "--grad-checkpointing": args.grad_checkpointing,
        }.items():
            if given:
                raise UserError(f"{flag} is for the ViT, not for {args.model}")
    if args.init:
        init_encoder(encoder, Path(args.init), say=lambda *_: None)
    tokenizer = load_tokenizer(args.tokenizer, source.captions(50_000), args.clip_vocab)
    if getattr(tokenizer, "unknown", 0):
        print(f"words   {tokenizer.unknown:.1%} of the captions' words are not among the labels")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {args.out} cannot be made: {error.strerror}") from None
    save_tokenizer(tokenizer, args.out / "tokenizer.tiktoken")
    config = {key: value for key, value in vars(args).items() if key not in ("out", "resume")}
    config |= {"classes": source.attributes}
    config |= {"vocab_size": tokenizer.n_vocab, "mean": MEAN, "std": STD, "source": str(source)}
    config |= {"dtype": pick_precision(args.precision, device), **tokenizer_config(tokenizer)}
    publish(json.dumps(config, indent=2) + "\n", args.out / "config.json")


def check_objective(args: argparse.Namespace, source):
    """UserError for flags that contradict the objective."""
    if args.objective != "superclass" and args.loss != "softmax":
        raise UserError(f"--loss {args.loss} is one of SuperClass: --objective {args.objective}")
    if args.no_idf and (args.objective != "superclass" or args.loss != "softmax"):
        raise UserError("--no-idf is for SuperClass's softmax: nothing else has IDF weights")
    if args.objective == "lit" and not args.init:
        raise UserError("--objective lit needs a trained encoder to lock: name a run with --init")
    if args.objective == "supervised" and not source.attributes:
        raise UserError(f"--objective supervised: {args.data} has no classes to train on")


def inherit(args: argparse.Namespace, given: dict):
    """Take model and image size from the run that --init names, where they were not given."""
    if args.init and Path(args.init).is_dir():
        config = read_config(Path(args.init))
        for key in {"model", "image_size"} - given.keys():
            setattr(args, key, config[key])


def resume_run(args: argparse.Namespace, given: dict) -> argparse.Namespace:
    """The run's own flags; UserError when one that was given contradicts them."""
    config = read_config(args.out)
    for key, value in given.items():
        if key not in MAY_CHANGE and value != config[key]:
            flag = "--" + key.replace("_", "-")
            raise UserError(
                f"{args.out} was started with {flag} {config[key]}, it cannot go on with {value}"
            )
    changed = {key: value for key, value in given.items() if key in MAY_CHANGE}
    return argparse.Namespace(
        **{**{key: config[key] for key in vars(args) if key in config}, "out": args.out, **changed}
    )


def end_workers():
    """Kill loading processes that are left: they ignore SIGTERM, and Python would wait for them."""
    for process in multiprocessing.active_children():
        process.kill()


def main(argv: list[str] | None = None):
    atexit.register(end_workers)
    try:
        args, given = parse(argv)
        resumed = args.resume and (args.out / "config.json").exists()
        if resumed:
            args = resume_run(args, given)
        else:
            inherit(args, given)
        rank, world, device = start_processes(args.device)
        split_batch(args, world)
        if rank == 0 and not resumed:
            start_run(args, device)
        if world > 1:
            dist.barrier()
        train(args, read_config(args.out), rank, world, device)
        if world > 1:
            dist.destroy_process_group()
    except UserError as error:
        tqdm.write(f"error: {error}", file=sys.stderr)  # on a line below the progress bar
        sys.exit(2)


if __name__ == "__main__":
    main()
