"""A rehearsal: the first steps of a training run in its real sizes, and what all of it will take.

    python eval.py plan FLAGS        the flags that train.py will get

So an error that would end a night's run shows within a minute. Under torchrun, too.
"""

import contextlib
import io
import math
import tempfile
from itertools import islice
from pathlib import Path

import torch

import data
import eval as evaluation
import train
from data import UserError
from superclass import IDF

STEPS, TIMED = 6, 3  # compiling slows the first steps, batches that were loaded meanwhile speed up


def main(argv: list[str]):
    """Train for six steps in a folder that is then removed; print time, memory, disk and losses."""
    config, _ = train.parse(argv)
    if (config.out / "checkpoint.pt").exists():
        raise UserError(f"{config.out} already holds a run: choose another --out")
    where = next(folder for folder in config.out.absolute().parents if folder.is_dir())
    said, few = io.StringIO(), ["--samples", str(STEPS * config.batch_size), "--log-every", "1"]
    few += ["--eval-every", str(STEPS)]
    try:
        with tempfile.TemporaryDirectory(prefix="plan-", dir=where) as folder:
            # A row for the last step, so that train.py takes it for evaluated.
            evaluation.append_jsonl(Path(folder) / "eval.jsonl", [{"step": STEPS}])
            with contextlib.redirect_stdout(said):
                train.main([*argv, *few, "--no-first-eval", "--out", folder])
            rows = evaluation.read_jsonl(Path(folder) / "metrics.jsonl")[-TIMED:]
            if not rows:  # the first process of several has them
                return
            sizes = [(path.name, path.stat().st_size) for path in sorted(Path(folder).glob("*.pt"))]
            losses = expected_losses(evaluation.read_config(Path(folder)))
    except PermissionError as error:
        raise UserError(f"--out {config.out} cannot be made: {error.strerror}") from None
    for line in said.getvalue().splitlines():
        if not line.startswith("the run is in"):
            print(line.replace("run     ", "steps   "))
    B, steps = config.batch_size, math.ceil(config.samples / config.batch_size)
    step, waited = (sum(row[key] for row in rows) / len(rows) for key in ("step_s", "data_s"))
    speed = f"{B / step:,.0f} images/s, {span(1e6 / B * step)} for a million"
    files = " and ".join(f"{name} of {size / 1e6:,.1f} MB" for name, size in sizes)
    print(f"plan    {steps:,} steps x {B:,} = {steps * B:,} images: {span(steps * step)}; {speed}")
    print(f"        without evaluation; {waited / step:.0%} of a step waits for data")
    print(f"memory  {rows[-1]['peak_mb'] or math.nan:,.0f} MB at the peak, without evaluation")
    print(f"disk    {files}, for a moment twice")
    if losses:
        start, counted, least = losses
        print(f"loss    {start:.2f} at first; {counted:.2f} by word counts; {least:.2f} or more")


def try_batch(forward, model, objective, config, micro_batch: int, device: torch.device):
    """Pass a blank micro-batch forward and back, and leave the model as it was."""
    ids = torch.arange(min(77, config.vocab_size), device=device).repeat(micro_batch, 1)
    images = torch.zeros(micro_batch, 3, config.image_size, config.image_size, device=device)
    targets = ids.new_zeros(micro_batch, len(config.classes))
    batch = data.Batch(images, ids, targets, dict.fromkeys(objective.reads, ids), [], [], {})
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    dtype = getattr(torch, config.dtype)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        outputs = forward(images, **batch.reads)
        loss = objective.loss(outputs, batch, torch.ones(config.vocab_size, device=device))
    loss.backward()
    model.zero_grad()
    for name, buffer in model.named_buffers():  # a batch norm's
        buffer.copy_(buffers[name])


def span(seconds: float) -> str:
    hours = seconds / 3600
    return f"{hours:,.1f} h" if hours >= 1 else f"{seconds / 60:.1f} min"


def expected_losses(config, captions: int = 10_000) -> tuple[float, float, float] | None:
    """SuperClass's loss before training, of a model that knows word counts, and of a perfect one.

    The first is log V + 1/2: logits start with variance one. The second knows how often a token is
    a target, p, but does not look at the image: the entropy of p. Training stays there for a while.
    The third is the mean entropy of a caption's own targets, which no model can go below.
    """
    objective = evaluation.open_objective(config)
    if not (objective.has_words and config.loss == "softmax" and objective.captions):
        return None
    source, _ = evaluation.open_sources(config)
    tokenizer = data.read_tokenizer(config.out / "tokenizer.tiktoken", vars(config))
    texts = islice(source.captions(captions), captions)
    labels = data.pad([data.caption_labels(text, tokenizer) for text in texts])  # [n, K]
    idf, tokens = IDF(config.vocab_size), labels.clamp(min=0)
    idf.update(labels)
    w = (torch.ones_like(idf.weights()) if config.no_idf else idf.weights())[tokens] * (labels >= 0)
    targets = w / w.sum(dim=1, keepdim=True).clamp(min=1e-30)
    p = torch.zeros(config.vocab_size).index_add(0, tokens.flatten(), targets.flatten())
    counted, own = torch.special.entr(p / p.sum()).sum(), torch.special.entr(targets).sum(1).mean()
    return math.log(config.vocab_size) + 0.5, counted.item(), own.item()
