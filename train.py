"""Pretrain a vision encoder: one loop for the toy and the cluster, for SuperClass and its rivals.

    python train.py                                     drawn shapes, two CPU cores, a few minutes
    torchrun --standalone --nproc_per_node=8 train.py --data ... --model B/16 --image-size 224

A run lives in its folder, --out; `eval.py` lists what it holds. `python train.py --out RUN
--resume` continues a run exactly where it stopped.
"""

import argparse
import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

# Threads that wait for one another spin only for a moment: endless, that costs a busy machine most
# of its time; without it, a quiet one a quarter.
if "OMP_WAIT_POLICY" not in os.environ:  # else the user has chosen; read when torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data
import eval as evaluation
from data import Batch, UserError, load_tokenizer, normalize, number, read_tokenizer, save_tokenizer
from plugins import Parser, UnknownName, absolute, find, names
from superclass import IDF, Objective

CLIP_GRAD = 1.0  # the largest norm of the gradient
SAVE_SECONDS = 600  # between checkpoints, at most


def make_parser() -> argparse.ArgumentParser:
    parser = Parser()
    add, count = parser.add_argument, number(int, 1)
    add("--data", default="shapes", help=f"{names('data')}, a folder, a table or .tar shards")
    add("--val-data", help="source to evaluate on; some sources have a split of their own")
    data.add_data_flags(add)
    add("--objective", default="superclass", help=f"what is learned: {names('objective')}")
    add("--loss", default="softmax", help=f"SuperClass's loss: {names('loss')}")
    add("--no-idf", action="store_true", help="weight all tokens of a caption equally")
    add("--model", default="XS/8", help=f"{names('model')}; B/16 is the paper's")
    add("--init", help="a run to start from, a file with timm's names, or a name of yours")
    add("--samples", type=count, default=76_800, help="images seen in the whole run")
    add("--batch-size", type=count, default=128, help="global: over processes and micro-batches")
    add("--micro-batch", type=count, help="images in one forward pass; default: a process's share")
    add("--lr", type=number(float, 0), default=1.5e-3, help="peak learning rate")
    add("--optimizer", default="adamw", help=names("optimizer"))
    add("--beta2", type=number(float, 0, 0.9999), default=0.98, help="AdamW's second decay")
    add("--weight-decay", type=number(float, 0), default=0.2, help="of matrices only")
    add("--warmup", type=number(int, 0), default=40, help="steps")
    add("--precision", default="auto", choices=("auto", "bf16", "fp16", "fp32"), help="autocast")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--grad-checkpointing", action="store_true", help="recompute activations to save memory")
    add("--workers", type=number(int, 0), default=2, help="loaders of each training process")
    add("--lanes", type=count, help="shards: a multiple of processes x workers, its default")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", type=Path, help="the run's folder; default: runs/DATA")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--no-first-eval", action="store_true", help="evaluate at the end only")
    add("--save-every", type=count, default=500, help="steps between checkpoints, or 10 minutes")
    add("--eval-every", type=count, help="steps between scores, beside those at both ends")
    add("--log-every", type=count, default=20, help="steps between lines of metrics.jsonl")
    return parser


def train(config: argparse.Namespace, rank: int, world: int, device: torch.device):
    """Train the run in config.out to its end, or until the first signal."""
    say = print if rank == 0 else lambda *_: None
    tokenizer = read_tokenizer(config.out / "tokenizer.tiktoken", vars(config))
    train_source, val_source = evaluation.open_sources(config)
    objective, B = evaluation.open_objective(config), config.batch_size
    micro_batch, accumulation = split_batch(config, objective, world)
    steps = math.ceil(config.samples / B)

    torch.manual_seed(config.seed)  # the same weights on every process
    model, idf = evaluation.build_model(objective, config), IDF(config.vocab_size).to(device)
    if world > 1 and device.type == "cuda":  # torch has this for GPUs only
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device)
    optimizer = make_optimizer(model, config, say)
    dtype = getattr(torch, config.dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    progress = Progress(config, rank, world, device)
    state = {"model": model, "idf": idf, "optimizer": optimizer, "scaler": scaler}
    state["progress"] = progress
    load(state, objective, config, train_source, say)
    start = progress.step
    if progress.total(start) != [start * world]:  # each process read the checkpoint by itself
        raise UserError(f"processes see different checkpoints: {config.out} must be shared storage")

    forward = torch.compile(model) if config.compile else model
    if world > 1:
        # Not with gradient_as_bucket_view=True: after a resumed process's first step such gradients
        # lie elsewhere in memory, and on a GPU the last bit of their norm depends on that.
        forward = DistributedDataParallel(forward)
    view = data.Augment(config.image_size, config.min_scale, config.flip, config.color_jitter)
    encode = tokenizer if objective.captions else None
    prepare = data.Prepare(view, encode, config.seed, objective.reads)
    begin = data.Start(start * B, config.lanes or 1, progress.lanes)
    stream = data.TrainStream(train_source, prepare, config.seed, micro_batch, rank, world, begin)
    stream = data.batches(stream, config.workers, device, accumulation)
    say(
        f"data    {config.data}: {train_source}; {config.tokenizer}, {config.vocab_size:,} tokens\n"
        f"model   {config.model}, {config.image_size} px, {config.objective} on {device}\n"
        f"run     {steps:,} steps x {B:,} = {steps * B:,} images; a batch is {world} processes x "
        f"{accumulation} micro-batches x {micro_batch:,}"
    )
    run = evaluation.Run(config.out, config, objective, tokenizer, model, idf, start)
    if start == 0:
        # A batch that does not fit memory is refused before the folder holds a run.
        find("task", "plan", "try_batch")(forward, model, objective, config, micro_batch, device)
        save(state, config, rank, world)
    if progress.scores_are_due():
        evaluate(run, train_source, val_source, progress)
    model.train()
    bar = tqdm(total=steps * B, initial=start * B, unit="img", unit_scale=True, disable=rank > 0)
    with bar, caught_signals() as caught:  # closed, so that messages have a line of their own
        for step in range(start, steps):
            lr = learning_rate(step, steps, config.warmup, config.lr)
            for group in optimizer.param_groups:
                group["lr"] = lr

            batch = progress.wait_for(stream)  # this process's share of the global batch
            idf.update(batch.labels)  # count all of the global batch before any of it is weighted
            weights = torch.ones_like(idf.weights()) if config.no_idf else idf.weights()
            # Dropout and the like must not depend on what this process drew before a kill.
            torch.manual_seed(data.seed_of(config.seed, step, rank))

            loss = 0.0
            for i, part in enumerate(batch.split(micro_batch)):
                last = i == accumulation - 1  # gradients are exchanged once a step
                with contextlib.nullcontext() if last or world == 1 else forward.no_sync():
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        outputs = forward(normalize(part.images), **part.reads)
                    part_loss = objective.loss(outputs, part, weights) / accumulation
                    scaler.scale(part_loss).backward()
                loss = loss + part_loss.detach()

            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            progress.add(loss, batch)
            bar.update(B)
            # Signals and clocks are a process's own, but all must save or stop after the same step.
            stop, late = progress.total(len(caught), time.monotonic() > progress.save_by)
            ending = stop > 0 or progress.step == steps
            score_due = progress.scores_are_due() and not ending
            log_due = progress.step % config.log_every == 0 or progress.step == steps
            save_due = progress.step % config.save_every == 0 or late or score_due or ending
            if log_due or save_due:
                progress.settle(norm)
            if log_due:
                bar.set_postfix_str(progress.log(lr, norm))
            if save_due:
                save(state, config, rank, world)
            if score_due:
                evaluate(run, train_source, val_source, progress)
            if ending:
                break

    if progress.step < steps:
        again = f"continue with: python train.py --out {config.out} --resume"
        say(f"stopped after step {progress.step} of {steps}; {again}")
        sys.exit(128 + (caught[0] if caught else signal.SIGTERM))
    evaluate(run, train_source, val_source, progress)
    if progress.skipped:
        say(f"skipped beside {steps * B:,} good samples: {data.describe(progress.skipped)}")
    say(f"the run is in {config.out}")


# ------------------------------------------------------------------------------------------------
# What the loop uses.


def learning_rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Linear warm-up over `warmup` steps, then a cosine to zero at `steps` (section 4)."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def make_optimizer(model: nn.Module, config: argparse.Namespace, say) -> torch.optim.Optimizer:
    """The optimizer of --optimizer for the weights that are trained."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    make = find("optimizer", config.optimizer)
    optimizer = make(named, config.lr, (0.9, config.beta2), config.weight_decay)
    for group in optimizer.param_groups:
        n, count = sum(p.numel() for p in group["params"]), len(group["params"])
        say(f"params  {n:,} in {count} tensors with weight decay {group['weight_decay']:g}")
    return optimizer


class Progress:
    """A run's book-keeping: what it must remember besides its weights, and metrics.jsonl.

    What is new stays on its process, and losses on the GPU, until a line or a checkpoint is due.
    """

    def __init__(self, config: argparse.Namespace, rank: int, world: int, device: torch.device):
        self.config, self.rank, self.world, self.device = config, rank, world, device
        self.step, self.losses, self.skipped, self.lanes = 0, [], Counter(), {}
        self.new_losses, self.new_bad, self.new_lanes = [], [], {}
        self.logged, self.since, self.waited = 0, None, 0.0  # since the last line of metrics.jsonl
        self.save_by = time.monotonic() + SAVE_SECONDS
        self.steps, self.val_loss = math.ceil(config.samples / config.batch_size), None

    def state_dict(self) -> dict:
        state = {"step": self.step, "losses": self.losses, "skipped": dict(self.skipped)}
        return state | {"lanes": self.lanes}

    def load_state_dict(self, state: dict):
        """Also drops the lines of metrics.jsonl that a killed run wrote after its checkpoint."""
        self.step, self.losses, self.lanes = state["step"], state["losses"], state["lanes"]
        self.skipped, self.logged = Counter(state["skipped"]), self.step
        path = self.config.out / "metrics.jsonl"
        kept = [line for line in evaluation.read_jsonl(path) if line["step"] <= self.step]
        if self.rank == 0:
            evaluation.publish("".join(json.dumps(line) + "\n" for line in kept), path)

    def wait_for(self, stream: Iterator[Batch]) -> Batch:
        """The next batch, and the seconds that it took."""
        asked = time.perf_counter()
        self.since = self.since or asked
        batch = next(stream)
        self.waited += time.perf_counter() - asked
        return batch

    def add(self, loss: Tensor, batch: Batch):
        """Count a step that was made."""
        self.step += 1
        self.new_losses.append(loss)
        self.new_bad += batch.bad
        self.new_lanes |= batch.lanes

    def settle(self, norm: Tensor):
        """Merge what is new on all processes; stop if a loss is not finite or too much data bad."""
        new = torch.stack(self.new_losses).cpu(), self.new_bad, self.new_lanes
        everyone = [new] * self.world
        if self.world > 1:
            dist.all_gather_object(everyone, new)
        self.losses += (sum(losses for losses, _, _ in everyone) / self.world).tolist()
        self.lanes |= {lane: place for *_, lanes in everyone for lane, place in lanes.items()}
        for bad in (bad for _, some, _ in everyone for bad in some):
            if self.rank == 0 and not self.skipped[bad.kind]:
                tqdm.write(f"skipping: {bad}", file=sys.stderr)
            self.skipped[bad.kind] += 1
        self.new_losses, self.new_bad, self.new_lanes = [], [], {}
        first = self.step - len(self.losses) + 1
        found = {f"loss of step {step}": loss for step, loss in enumerate(self.losses, first)}
        if self.config.dtype != "float16":  # with fp16 this is normal, and the step is skipped
            found[f"gradient norm of step {self.step}"] = norm.item()
        for what, value in found.items():
            if not math.isfinite(value):
                raise UserError(f"the {what} is {value}: lower --lr; the last checkpoint is intact")
        seen = self.step * self.config.batch_size
        data.refuse_if_bad(seen, self.skipped, enough=1 if self.step == self.steps else 1000)

    def log(self, lr: float, norm: Tensor) -> str:
        """Write a line of metrics.jsonl; returns its main figures for the progress bar."""
        B, now, steps = self.config.batch_size, time.perf_counter(), self.step - self.logged
        seconds, loss = now - self.since, sum(self.losses) / len(self.losses)
        line = {"step": self.step, "samples": self.step * B, "loss": loss, "lr": lr}
        line |= {"grad_norm": norm.item() if norm.isfinite() else None}
        line |= {"skipped": self.skipped.total(), "images_per_s": B * steps / seconds}
        line |= {"step_s": seconds / steps, "data_s": self.waited / steps}
        line |= {"peak_mb": peak_memory(self.device)}
        if self.rank == 0:
            evaluation.append_jsonl(self.config.out / "metrics.jsonl", [line])
        text = f"loss {loss:.3f}, lr {lr:.1e}, data {self.waited / seconds:.0%}"
        text += "" if self.val_loss is None else f", val {self.val_loss:.3f}"
        self.losses, self.logged, self.since, self.waited = [], self.step, now, 0.0
        return text

    def scores_are_due(self) -> bool:
        """Whether to evaluate at this step, if it is not the last one."""
        if self.step == 0:
            return not self.config.no_first_eval
        return bool(self.config.eval_every) and self.step % self.config.eval_every == 0

    def total(self, *numbers: int) -> list[int]:
        """The sum of each number over all processes."""
        if self.world > 1:
            dist.all_reduce(sums := torch.tensor(numbers, dtype=torch.int64))
            return sums.tolist()
        return list(map(int, numbers))


def load(state: dict, objective: Objective, config: argparse.Namespace, source, say):
    """Restore all parts of a run from its checkpoint, or start from pretrained weights."""
    found = evaluation.identity(source)
    if config.source not in (found, str(source)):  # an older run has no hash of names
        raise UserError(f"{config.data} has changed: it was {config.source}, now {found}")
    if not (config.out / "checkpoint.pt").exists():
        return load_pretrained(state["model"], objective, config, say)
    saved = evaluation.read_checkpoint(config)
    if not state.keys() <= saved.keys():
        raise UserError(f"{config.out} holds no optimizer's state to go on with: use it as --init")
    for name, part in state.items():
        part.load_state_dict(saved[name])
    say(f"resuming {config.out} at step {state['progress'].step}")


def load_pretrained(model: nn.Module, objective: Objective, config: argparse.Namespace, say):
    if config.init:
        try:
            load_init, arg = find("init", config.init), config.init.partition(":")[2]
        except UnknownName:
            load_init, arg = find("init", "*"), config.init
        load_init(model, objective, config, arg, say)
    objective.load_pretrained(model, config)


def save(state: dict, config: argparse.Namespace, rank: int, world: int):
    """Publish the encoder alone, then a checkpoint of all parts, which is never the newer one."""
    if rank == 0:
        saved = {name: part.state_dict() for name, part in state.items()}
        saved["fingerprint"] = evaluation.fingerprint(config)
        evaluation.publish(state["model"].encoder.state_dict(), config.out / "encoder.pt")
        evaluation.publish(saved, config.out / "checkpoint.pt")
    state["progress"].save_by = time.monotonic() + SAVE_SECONDS
    if world > 1:
        dist.barrier()  # no process may exit while rank 0 is still writing


def evaluate(run: evaluation.Run, train_source, val_source, progress: Progress):
    """Score a run on rank 0, unless eval.jsonl already has the scores of this step."""
    began, run = time.perf_counter(), run._replace(step=progress.step)
    scored = any(row["step"] == run.step for row in evaluation.own_rows(run.folder))
    if progress.rank or scored or not val_source:
        return
    own_scores = find("task", "loss", "own_scores")
    rows = own_scores(run, train_source, val_source, run.step in (0, progress.steps))
    if losses := [row["val_loss"] for row in rows if "val_loss" in row]:
        (progress.val_loss,) = losses
        line = {"step": run.step, "samples": run.step * run.config.batch_size}
        line["val_loss"], path = progress.val_loss, run.folder / "metrics.jsonl"
        if line not in evaluation.read_jsonl(path):  # a run that was killed here scores again
            evaluation.append_jsonl(path, [line])
    if rows:
        said = f"after {run.step:,} steps\n{evaluation.report(rows, run)}"
        tqdm.write(said, file=sys.stdout)
    run.model.train()
    if progress.since:  # the time is not training's
        progress.since += time.perf_counter() - began


@contextlib.contextmanager
def caught_signals() -> Iterator[list[int]]:
    """The list in which the first signal to stop will leave its number; a second one kills."""
    caught, stops = [], [signal.SIGINT, signal.SIGTERM]
    # A closed terminal sends this one, which Windows lacks and nohup switches off.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        stops.append(signal.SIGHUP)

    def catch(signal_, _):
        caught.append(signal_)
        signal.signal(signal_, signal.SIG_DFL)

    before = {signal_: signal.signal(signal_, catch) for signal_ in stops}
    try:
        yield caught
    finally:
        for signal_, handler in before.items():
            signal.signal(signal_, handler)


# ------------------------------------------------------------------------------------------------
# Flags, processes, folders.


def peak_memory(device: torch.device) -> float | None:
    """The peak of the GPU's allocated memory so far, elsewhere the process's own peak; in MB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if sys.platform == "win32":
        return None
    import resource  # which Windows lacks

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def start_processes(device: str) -> tuple[int, int, torch.device]:
    """Rank, world size and device, from what torchrun sets; one process without it."""
    if "RANK" not in os.environ:
        return 0, 1, evaluation.pick_device(device)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # NCCL wants a GPU for each process. If all share one, as with --device cuda:0, gloo is used.
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    device = evaluation.pick_device(
        f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" else device
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # Rank 0 evaluates alone; the others wait for it, an hour at most.
    dist.init_process_group(backend, timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def split_batch(config: argparse.Namespace, objective: Objective, world: int) -> tuple[int, int]:
    """The images of a micro-batch, and the number of micro-batches of one process.

    Raises UserError if the batch cannot be split like this, or if the readers do not fit the lanes.
    """
    B, micro_batch = config.batch_size, config.micro_batch or max(1, config.batch_size // world)
    if B % (micro_batch * world):
        split = f"{world} processes x {micro_batch} images"
        raise UserError(f"--batch-size {B} is not a multiple of {split}")
    if objective.whole_batch and micro_batch * world != B:
        raise UserError(
            f"--objective {config.objective} with --loss {config.loss} compares all images of a "
            "batch, so it cannot be split into micro-batches: use more processes"
        )
    readers, lanes = world * max(1, config.workers), config.lanes
    if lanes and lanes % readers:
        fitting = ", ".join(str(n) for n in range(1, lanes + 1) if lanes % n == 0)
        raise UserError(
            f"{world} processes x {max(1, config.workers)} workers do not divide the run's {lanes} "
            f"lanes: their product may be {fitting}"
        )
    return micro_batch, B // (micro_batch * world)


def lock(folder: Path):
    """Keep other processes from training in a folder until this one ends, however it ends.

    Shared storage knows such a lock, too. Where there is none, as on Windows, users must take care.
    """
    try:
        import fcntl

        file = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: loaders would inherit that
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process trains in {folder}, or nobody may write there") from None
    except (ImportError, OSError) as error:
        print(f"{folder} is not locked ({error}): let one process train there", file=sys.stderr)


def start_run(config: argparse.Namespace, world: int, device: torch.device):
    """Make the run's folder with its tokenizer and config.json, and lock it.

    Raises UserError if a flag is wrong or the folder already has a checkpoint.
    """
    if any((config.out / name).exists() for name in ("checkpoint.pt", "metrics.jsonl")):
        raise UserError(f"{config.out} already holds a run: add --resume or choose another --out")
    source, _ = evaluation.open_sources(config)
    objective = evaluation.open_objective(config)
    named = f"--objective {config.objective}"
    if config.loss != "softmax" and type(objective).loss is not Objective.loss:
        raise UserError(f"--loss {config.loss} is for SuperClass, not for {named}")
    if config.no_idf and not objective.weighted:
        raise UserError(f"--no-idf: {named} with --loss {config.loss} has no IDF weights")
    try:
        objective.check(config, source)
    except ValueError as error:
        raise UserError(str(error)) from None
    if source.most_lanes:
        config.lanes = config.lanes or world * max(1, config.workers)
        if source.most_lanes < config.lanes:
            print(f"lanes   {config.lanes} share {source}: each is read repeatedly")
    elif config.lanes:
        raise UserError(f"--lanes is for shards: {config.data} has one order for any split")
    split_batch(config, objective, world)

    tokenizer = load_tokenizer(config.tokenizer, source.captions(50_000))
    if getattr(tokenizer, "unknown", 0):
        print(f"words   {tokenizer.unknown:.1%} of the captions' words are not among the labels")
    config.classes, config.source = source.attributes, evaluation.identity(source)
    config.vocab_size, config.mean, config.std = tokenizer.n_vocab, data.MEAN, data.STD
    config.dtype = evaluation.pick_precision(config.precision, device)
    content, settings = save_tokenizer(tokenizer)
    vars(config).update(settings)
    try:
        model = evaluation.build_model(objective, config)
    except ValueError as error:
        raise UserError(f"--model {config.model}, {config.image_size} px: {error}") from None
    load_pretrained(model, objective, config, say=lambda *_: None)

    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {config.out} cannot be made: {error.strerror}") from None
    lock(config.out)
    evaluation.publish(content, config.out / "tokenizer.tiktoken")
    stored = {key: value for key, value in vars(config).items() if key not in ("out", "resume")}
    evaluation.publish(json.dumps(stored, indent=2) + "\n", config.out / "config.json")


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, bool]:
    """The flags, and whether a run is resumed: then they are its own, with the given changes."""
    parser = make_parser()
    flags = {key: absolute(key, value) for key, value in vars(parser.parse_args(argv)).items()}
    blank = argparse.Namespace(**dict.fromkeys(flags))
    given = {k for k, v in vars(parser.parse_args(argv, blank)).items() if v is not None}
    name = re.sub(r"\W+", "-", Path(flags["data"]).stem).strip("-") or "run"
    config = argparse.Namespace(**flags | {"out": flags["out"] or Path("runs") / name})
    if config.resume and (config.out / "config.json").exists():
        own = vars(evaluation.read_config(config.out))
        for key in sorted(given - evaluation.MAY_CHANGE):
            if flags[key] != absolute(key, own.get(key)):
                started = f"{config.out} was started with --{key.replace('_', '-')} {own.get(key)}"
                new = f"start another one from it with --init {config.out}"
                raise UserError(f"{started}, it cannot go on with {flags[key]}: {new}")
        missing = evaluation.MAY_CHANGE - own.keys()  # in a run of an older version
        changed = {key: vars(config)[key] for key in missing | given & evaluation.MAY_CHANGE}
        return argparse.Namespace(**own | changed), True
    if config.resume and "data" not in given:  # a typing error in --out?
        raise UserError(f"{config.out} holds no run to resume; to start it, give its --data, too")
    if config.init and Path(config.init).is_dir():  # its model and image size, if none were given
        first = vars(evaluation.read_config(Path(config.init)))
        vars(config).update({key: first[key] for key in {"model", "image_size"} - given})
    return config, False


def main(argv: list[str] | None = None):
    with data.one_sentence():
        config, resumed = parse(argv)
        rank, world, device = start_processes(config.device)
        try:
            if rank == 0 and resumed:
                lock(config.out)
            elif rank == 0:
                start_run(config, world, device)
                config = evaluation.read_config(config.out)
            if world > 1:  # another machine may not see the new file yet
                shared = [config]
                dist.broadcast_object_list(shared)
                (config,) = shared
            train(config, rank, world, device)
        except KeyboardInterrupt:  # before the first step; in the loop it waits for the step's end
            sys.exit(128 + signal.SIGINT)
        if dist.is_initialized():
            dist.barrier()  # torchrun gives a machine that is done five minutes
            dist.destroy_process_group()


if __name__ == "__main__":
    import train  # plug-ins import this module by its name

    train.main()
