"""Evaluation of runs: linear probe, few-shot, zero-shot, retrieval, and tables of several runs.

    python eval.py probe|fewshot|zeroshot|retrieval RUN [--data SPEC] [--val-data SPEC]
    python eval.py table RUN [RUN ...]

Each of the first prints a table, a row for each attribute that the source has classes for, and
appends the rows to RUN/eval.jsonl. The encoder is frozen throughout; features are extracted once.
`table` collects these rows over runs that differ in nothing but their seed.

Letters in the shapes:  N images,  M captions,  D width,  C classes,  V vocabulary.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter as HelpFormatter
from collections import defaultdict
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from baselines import CLIP, build_text_tower
from data import (
    BUILT_IN,
    KINDS,
    CenterCrop,
    OnePass,
    Prepare,
    UserError,
    batches,
    load_source,
    normalize,
    refuse_if_bad,
    tell_skipped,
)
from superclass import IDF, SuperClass, build_encoder
from tokenizer import caption_labels, caption_tokens, read_tokenizer

# ------------------------------------------------------------------------------------------------
# Runs.


class Run(NamedTuple):
    """What a run's folder holds, ready for use."""

    folder: Path
    config: dict
    tokenizer: object
    model: SuperClass | CLIP
    idf: IDF
    step: int


def read_config(folder: Path) -> dict:
    """The run's config.json; UserError when there is none."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except OSError:
        raise UserError(f"{folder} holds no run: there is no config.json in it") from None
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise UserError(f"{folder / 'config.json'} is damaged: it is no JSON object")
    return config


def read_checkpoint(path: Path) -> dict:
    """A checkpoint's tensors; no code in it is ever run."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"checkpoint {path} is damaged and cannot be read: {reason}") from None


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = (
            "cuda"
            if torch.cuda.is_available()
            else "mps"
            if torch.backends.mps.is_available()
            else "cpu"
        )
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"device '{name}' is unknown or not available here: use auto, cuda, mps or cpu"
        ) from None
    return device


def build_model(config: dict) -> SuperClass | CLIP:
    """The untrained model of a run's objective."""
    encoder = build_encoder(config["model"], config["image_size"])
    if config["objective"] in ("clip", "lit"):
        text = build_text_tower(config["model"], config["vocab_size"])
        return CLIP(encoder, text, locked=config["objective"] == "lit")
    outputs = config["vocab_size"]
    if config["objective"] == "supervised":
        outputs = sum(map(len, config["classes"].values()))
    return SuperClass(encoder, outputs)


def load_run(folder: Path, device: torch.device) -> Run:
    """Load a run for evaluation.

    Raises UserError when the folder holds no run or a damaged one.
    """
    config = read_config(folder)
    state = read_checkpoint(folder / "checkpoint.pt")
    try:
        model, idf = build_model(config), IDF(config["vocab_size"])
        model.load_state_dict(state["model"])
        idf.load_state_dict(state["idf"])
        tokenizer, step = read_tokenizer(folder / "tokenizer.tiktoken", config), state["step"]
    except UserError:
        raise
    except Exception as error:  # files that were changed can contradict each other anywhere
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{folder} is damaged: its files do not fit together ({type(error).__name__}: {reason})"
        ) from None
    return Run(folder, config, tokenizer, model.to(device).eval(), idf.to(device), step)


# ------------------------------------------------------------------------------------------------
# Features.


@torch.inference_mode()
def extract(model, source, image_size: int, batch_size=256, workers=2, limit=None, tokenizer=None):
    """Features [N, D] (float32, on the CPU) and targets [N, A] of a source, `limit` images at most.

    With a tokenizer also N lists of the captions' token ids, in their order. Images are resized and
    centre-cropped. Bad samples are skipped; past a tenth this raises UserError.
    """
    device = next(model.parameters()).device
    training, features, targets, tokens = model.training, [], [], []
    skipped = torch.zeros(len(KINDS), dtype=torch.int64)
    model.eval()
    prepare = Prepare(CenterCrop(image_size), tokenizer, encode=caption_tokens)
    for batch in batches(OnePass(source, prepare, batch_size, limit), workers, device):
        skipped = skipped + batch["skipped"]
        if "images" in batch:
            images = normalize(batch["images"].to(device, non_blocking=True))
            features.append(model.features(images).float().cpu())
            targets.append(batch["targets"])
            tokens += [row[row >= 0].tolist() for row in batch["labels"]]
    model.train(training)
    refuse_if_bad(sum(map(len, targets)), skipped)
    if not targets:
        raise UserError("there is no image to evaluate")
    if skipped.any():
        print(f"skipped {tell_skipped(skipped)}, of {source}", file=sys.stderr)
    found = torch.cat(features), torch.cat(targets)
    if not found[0].isfinite().all():
        raise UserError("the features are not finite numbers: the run's weights are damaged")
    return (*found, tokens) if tokenizer else found


def standardize(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Zero mean, unit variance on the training features: a batch norm without affine."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]


# ------------------------------------------------------------------------------------------------
# The measurements.

log_softmax = functools.partial(F.log_softmax, dim=1)
LOG_PROBABILITY = defaultdict(lambda: log_softmax)  # by --loss
LOG_PROBABILITY |= dict.fromkeys(["bce", "asl", "soft_margin"], F.logsigmoid)


def zeroshot(
    model: SuperClass,
    idf: IDF,
    tokenizer,
    features: Tensor,
    names: list[list[str]],
    prior: bool = False,
    log_probability: Callable = log_softmax,
) -> Tensor:
    """Scores [N, C] of classes for pooled features [N, D], from the pretraining head alone.

    The score of a name is the IDF-weighted mean of log softmax(x) over its tokens (a caption with
    that text would have the loss -score); a class scores the mean over its names. This is ours:
    the paper trains a text tower for it.

    Args:
        names: the names of each class.
        prior: subtract each token's log-frequency, so that common names lose their head start.
        log_probability: of logits [n, V]; F.logsigmoid for a head trained with such a loss.
    Raises:
        UserError: when no token of a class's names occurred in training.
    """
    owners = [c for c, aliases in enumerate(names) for _ in aliases]
    bags = token_bags(idf, [caption_labels(name, tokenizer) for ns in names for name in ns])
    known = bags.sum(dim=1).to_dense().cpu() > 0
    for c, aliases in enumerate(names):
        if not any(known[i] for i, owner in enumerate(owners) if owner == c):
            raise UserError(
                f"no token of the class name '{aliases[0]}' occurred in training: give other names"
            )
    scores = score_bags(model, idf, features, bags, prior, log_probability)
    return mean_over_names(scores, [c if known[i] else -1 for i, c in enumerate(owners)])


def token_bags(idf: IDF, labels: list[list[int]]) -> Tensor:
    """For each of M token sets its IDF weights, normalised: sparse [M, V], rows summing to one.

    Tokens that never occurred in training have no weight. A row without any token stays empty.
    """
    weights = torch.ones(len(idf.df)) if idf.n == 0 else idf.weights().cpu() * (idf.df.cpu() > 0)
    rows = torch.tensor([i for i, row in enumerate(labels) for _ in row], dtype=torch.int64)
    ids = torch.tensor([token for row in labels for token in row], dtype=torch.int64)
    sums = torch.zeros(len(labels)).index_add(0, rows, weights[ids])
    values = weights[ids] / sums[rows].clamp(min=1e-30)
    size = (len(labels), len(weights))
    return torch.sparse_coo_tensor(torch.stack([rows, ids]), values, size, check_invariants=True)


@torch.inference_mode()
def score_bags(
    model: SuperClass, idf: IDF, features: Tensor, bags: Tensor, prior=False, log_p=log_softmax
) -> Tensor:
    """Scores [N, M]: the mean log-probability of each of M `token_bags` for features [N, D]."""
    frequency = (idf.df / idf.n.clamp(min=1)).clamp(min=1e-9).log() if prior else 0.0
    scores = []
    for x in features.to(idf.df.device).split(256):
        x = log_p(model.head(model.norm(x)).float()) - frequency  # [n, V]
        scores.append(torch.sparse.mm(bags, x.T.cpu()).T)
    return torch.cat(scores)


def mean_over_names(scores: Tensor, owners: list[int]) -> Tensor:
    """Scores of names [N, M] -> of classes [N, C]; owners are the classes, -1 for no use."""
    owners = torch.tensor(owners)
    mean = F.one_hot(owners[owners >= 0]).to(scores.dtype)
    return scores[:, owners >= 0] @ (mean / mean.sum(dim=0))


def zeroshot_by_text(
    model: CLIP, tokenizer, features: Tensor, names: list[list[str]], prompts: list[str]
) -> Tensor:
    """Scores [N, C]: the cosine between an image and each class's mean prompt (section 4, LiT).

    Args:
        prompts: texts with {} for a name, such as "a photo of a {}".
    """
    texts = [
        prompt.replace("{}", name) for aliases in names for name in aliases for prompt in prompts
    ]
    owners = [c for c, aliases in enumerate(names) for _ in range(len(aliases) * len(prompts))]
    embedded = embed_texts(model, [caption_tokens(text, tokenizer) for text in texts])
    mean = F.normalize(mean_over_names(embedded.T, owners).T, dim=1)  # [C, E]
    return embed_images(model, features) @ mean.T


@torch.inference_mode()
def embed_texts(model: CLIP, tokens: list[list[int]]) -> Tensor:
    """Token ids of M texts -> unit vectors [M, E], on the CPU."""
    device, embedded = model.log_scale.device, []
    for i in range(0, len(tokens), 256):
        rows = [torch.tensor(row, dtype=torch.int64) for row in tokens[i : i + 256]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        embedded.append(model.embed_texts(padded.to(device)).cpu())
    return torch.cat(embedded)


@torch.inference_mode()
def embed_images(model: CLIP, features: Tensor) -> Tensor:
    """Pooled features [N, D] -> unit vectors [N, E], on the CPU."""
    return model.embed_images(features.to(model.log_scale.device)).cpu()


def retrieval(scores: Tensor, captions: Tensor, at=(1, 5, 10)) -> dict[str, float]:
    """Recall at k of image -> caption and caption -> image, shares in [0, 1].

    A caption is found when fewer than k others score as well or better with its image; an image
    when fewer than k of other captions do with its caption. Images that share their text are one
    answer: none of them can be asked for alone.

    Args:
        scores: [N, M], of N images and M different captions.
        captions: [N], the number of each image's caption.
    """
    others = captions[:, None] != torch.arange(scores.shape[1])  # [N, M]
    own = scores.gather(1, captions[:, None])  # [N, 1]
    rank = ((scores >= own) & others).sum(dim=1)  # [N]
    best = torch.full((scores.shape[1],), -torch.inf)
    best = best.scatter_reduce(0, captions, own[:, 0], "amax")  # [M], of the caption's own images
    text_rank = ((scores >= best) & others).sum(dim=0)  # [M]
    found = {f"i2t@{k}": (rank < k).double().mean().item() for k in at}
    return found | {f"t2i@{k}": (text_rank < k).double().mean().item() for k in at}


def probe(
    train: Tensor, labels: Tensor, val: Tensor, classes: int, seed: int = 0
) -> tuple[Tensor, float]:
    """Linear probe (section 4, after MAE): batch norm without affine, then one linear layer.

    The penalty is the best of five on a tenth of the training set held out; then all of it is
    fitted. The problem is convex, so L-BFGS replaces the paper's SGD and has no learning rate to
    tune.

    Returns: scores [N, C] of the validation features, and the penalty.
    """
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, rest = order[: max(1, len(order) // 10)], order[max(1, len(order) // 10) :]
    fit, check = standardize(train[rest], train[held])
    best, weight = (-1.0, 0.0), None
    for penalty in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        weight = regress(fit, labels[rest], classes, penalty, weight)  # from the last solution on
        accuracy = top1(linear(check, weight), labels[held])
        best = max(best, (accuracy, penalty))
    train, val = standardize(train, val)
    return linear(val, regress(train, labels, classes, best[1])), best[1]


def regress(x: Tensor, y: Tensor, classes: int, penalty: float, start=None) -> Tensor:
    """Minimise cross-entropy + penalty / 2 |W|^2 with L-BFGS; returns [D + 1, C], the bias last."""
    start = torch.zeros(x.shape[1] + 1, classes, device=x.device) if start is None else start
    weight = start.clone().requires_grad_()
    options = {"max_iter": 200, "tolerance_change": 1e-7, "line_search_fn": "strong_wolfe"}
    optimizer = torch.optim.LBFGS([weight], **options)

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(linear(x, weight), y) + penalty / 2 * weight[:-1].square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight[:-1] + weight[-1]


def fewshot(train: Tensor, labels: Tensor, val: Tensor, classes: int, shots: int, seed: int):
    """Few-shot by regularised least squares (CapPa's protocol, with big_vision's constants).

    `shots` images of each class are drawn; W minimises |X W - Y|^2 + l2 |W|^2 in closed form, with
    X standardised and a constant column of 100 as the nearly free bias, Y one-hot in {-1, 1} and
    l2 = 1024. Setting the gradient to zero gives (X^T X + l2 I) W = X^T Y.

    Returns: scores [N, C] of the validation features. Raises UserError for a class with too few.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = []
    for c in range(classes):
        members = (labels == c).nonzero().flatten()
        if len(members) < shots:
            raise UserError(f"class {c} has {len(members)} training images, fewer than {shots}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:shots]])
    chosen = torch.cat(chosen)
    x, val = standardize(train[chosen].double(), val.double())
    x, val = F.pad(x, (0, 1), value=100.0), F.pad(val, (0, 1), value=100.0)  # [n, D + 1]
    y = 2 * F.one_hot(labels[chosen], classes).double() - 1  # [n, C]
    penalty = 1024 * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + penalty, x.T @ y)  # [D + 1, C]
    return val @ weight


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of images [0, 1] whose best class is the right one."""
    return (scores.argmax(dim=1) == labels).double().mean().item()


# ------------------------------------------------------------------------------------------------
# From a run to rows.


PROMPTS = ["a {}", "a photo of a {}", "a picture of the {}"]  # for a text tower; the head: names


def classify(run: Run, attribute: int, names: list[list[str]], features: Tensor, **options):
    """The scores [N, C] of a run's own way to tell classes apart without training for it.

    By its text tower, where it has one; by the head over the vocabulary; for a supervised run,
    which has trained for it, by the outputs of this attribute.
    """
    prior, prompts = options.get("prior", False), options.get("prompts")
    if prior and run.config["objective"] != "superclass":
        raise UserError("--prior is for the head of a SuperClass run: this one has none")
    if run.config["objective"] == "supervised":
        if prompts:
            raise UserError("--prompt is for runs that know words: a supervised one does not")
        classes = list(run.config["classes"].values())
        if names != classes[attribute]:
            raise UserError("a supervised run knows its own classes only: give data that has them")
        with torch.inference_mode():
            x = features.to(run.model.head.weight.device)
            scores = run.model.head(run.model.norm(x)).float().cpu()
        return scores.split(list(map(len, classes)), dim=1)[attribute]
    if isinstance(run.model, CLIP):
        return zeroshot_by_text(run.model, run.tokenizer, features, names, prompts or PROMPTS)
    if prompts:
        names = [[prompt.replace("{}", name) for name in ns for prompt in prompts] for ns in names]
    log_p = LOG_PROBABILITY[run.config["loss"]]
    return zeroshot(run.model, run.idf, run.tokenizer, features, names, prior, log_p)


def measure(tasks: list[str], run: Run, train, val, **options) -> list[dict]:
    """Rows {task, attribute, top1, ...} of the given tasks for every attribute of the source `val`.

    Args:
        train: the source whose images the probe and the shots come from.
        options: shots, draws, prior, prompts, workers, batch_size, limit (training images at most).
    """
    if not val.attributes:
        raise UserError("the validation data has no classes: give class folders or a label column")
    loading = {key: options[key] for key in ("workers", "batch_size") if key in options}
    size = run.config["image_size"]
    features, targets = extract(run.model, val, size, **loading)
    if set(tasks) != {"zeroshot"}:
        if list(train.attributes.values()) != list(val.attributes.values()):
            raise UserError("training and validation data have other classes: give --class-names")
        limit = options.get("limit")
        train_features, train_targets = extract(run.model, train, size, limit=limit, **loading)
    rows = []
    for (a, (attribute, names)), task in product(enumerate(val.attributes.items()), tasks):
        known = targets[:, a] >= 0  # the images that have a label
        x, y, classes = features[known], targets[known, a], len(names)
        if classes < 2 or not len(y):
            raise UserError(f"{len(y)} images of {classes} classes: nothing to tell apart")
        if task == tasks[0] and len(y) < len(known):
            print(f"{len(known) - len(y)} images have no {attribute}", file=sys.stderr)
        row = {"task": task, "attribute": attribute, "classes": classes, "images": len(y)}
        if task == "zeroshot":
            if run.config["objective"] == "supervised":
                row["task"] = "head"
            elif not isinstance(run.model, CLIP):
                row["prior"] = options.get("prior", False)
            rows.append(row | {"top1": top1(classify(run, a, names, x, **options), y)})
            continue
        known = train_targets[:, a] >= 0
        train_x, train_y = train_features[known], train_targets[known, a]
        if task == "probe":
            if len(train_y) < 10:
                raise UserError(f"a probe on {len(train_y)} labelled training images: give ten")
            device = run.idf.df.device
            scores, penalty = probe(*(t.to(device) for t in (train_x, train_y, x)), classes)
            row |= {"top1": top1(scores.cpu(), y), "penalty": penalty, "train": len(train_y)}
        if task == "fewshot":
            shots, draws = options.get("shots", 10), options.get("draws", 3)
            few = train_y.bincount(minlength=classes).min()
            if few < shots and len(tasks) > 1:
                print(f"no {shots}-shot: a class has {few} training images", file=sys.stderr)
                continue
            draw = [fewshot(train_x, train_y, x, classes, shots, seed) for seed in range(draws)]
            mean, deviation = mean_and_deviation([top1(scores, y) for scores in draw])
            row |= {"top1": mean, "deviation": deviation, "shots": shots, "draws": draws}
        rows.append(row)
    return rows


def measure_retrieval(run: Run, val, **options) -> list[dict]:
    """The row of `retrieval` among the images of a source and their captions.

    By the text tower, where there is one; else a caption is a bag of tokens, scored as a class's
    name is.
    """
    if run.config["objective"] == "supervised":
        raise UserError("a supervised run knows no captions: retrieval needs another objective")
    loading = {key: options[key] for key in ("workers", "batch_size", "limit")}
    size = run.config["image_size"]
    features, _, tokens = extract(run.model, val, size, tokenizer=run.tokenizer, **loading)
    if not isinstance(run.model, CLIP):
        tokens = [sorted(set(row)) for row in tokens]
    texts = sorted(set(map(tuple, tokens)))
    number = {text: m for m, text in enumerate(texts)}
    captions = torch.tensor([number[tuple(row)] for row in tokens])
    if isinstance(run.model, CLIP):
        scores = embed_images(run.model, features) @ embed_texts(run.model, texts).T
    else:
        bags, log_p = token_bags(run.idf, texts), LOG_PROBABILITY[run.config["loss"]]
        scores = score_bags(run.model, run.idf, features, bags, options["prior"], log_p)
    row = {"task": "retrieval", "images": len(captions), "captions": len(texts)}
    return [row | retrieval(scores, captions)]


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value has not."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def report(rows: list[dict], run: Run) -> str:
    """Append the rows to eval.jsonl and return them as a table."""
    lines = [json.dumps({"step": run.step, **row, "time": round(time.time())}) for row in rows]
    with open(run.folder / "eval.jsonl", "a+b") as file:
        file.seek(max(0, file.tell() - 1))
        cut = file.read() not in (b"", b"\n")  # somebody was killed in the middle of a line
        file.write(("\n" * cut + "\n".join(lines) + "\n").encode())
    if rows[0]["task"] == "retrieval":
        (row,) = rows
        line = f"{'retrieval':<9} {row['images']:>7} images {row['captions']:>7} captions"
        recalls = (f"{key} {value:.3f}" for key, value in row.items() if "@" in key)
        return "  ".join([line, *recalls])
    lines = [f"{'task':<15} {'attribute':<10} {'classes':>7} {'images':>7} {'top-1':>7}"]
    for row in rows:
        line = f"{task_name(row):<15} {row['attribute']:<10} {row['classes']:>7} {row['images']:>7}"
        deviation = row.get("deviation")
        lines.append(f"{line} {row['top1']:>7.3f}" + (f" ± {deviation:.3f}" if deviation else ""))
    return "\n".join(lines)


def own_rows(folder: Path) -> list[dict]:
    """The rows of a run on its own data and classes: what tables and curves show."""
    return [row for row in read_jsonl(folder / "eval.jsonl") if not row.get("flags")]


def task_name(row: dict) -> str:
    """A row's task with what its score depends on: "10-shot", "zeroshot +prior", "probe on 500"."""
    name = f"{row['shots']}-shot" if row["task"] == "fewshot" else row["task"]
    name += f" on {row['train']:,}" if row["task"] == "probe" else ""
    return name + (" +prior" if row.get("prior") else "")


# ------------------------------------------------------------------------------------------------
# Several runs.


def table(folders: list[Path]) -> str:
    """A Markdown table of finished runs, mean ± deviation over those that differ in their seed.

    A row has the name of its folders, less a last "-SEED", which --init may have too. Time is that
    of training alone, without evaluation, peak memory that of the process.
    """
    groups = {}
    for folder in folders:
        config, scores = finished(folder)
        name = folder.resolve().name.removesuffix(f"-{config['seed']}")
        groups.setdefault(name, []).append((config, scores))
    columns = []  # in the order in which they are first met
    for runs in groups.values():
        for _, scores in runs:
            columns += [column for column in scores if column not in (*columns, *COSTS)]
    columns += COSTS
    lines = [f"| run | lr | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for name, runs in groups.items():
        configs = [config for config, _ in runs]
        refuse_if_different(name, configs)
        cells = [name, f"{configs[0]['lr']:g}", str(len(runs))]
        for column in columns:
            values = [scores[column] for _, scores in runs if column in scores]
            if values and len(values) < len(runs):
                print(f"{name}: only {len(values)} runs have a score for {column}", file=sys.stderr)
            cells.append(cell(column, values) if len(values) == len(runs) else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


COSTS = ("minutes", "images/s", "peak MB")
# Flags that may differ between the runs of a row.
MACHINE = dict.fromkeys(["workers", "device", "save_every", "log_every", "clip_vocab", "dtype"])


def refuse_if_different(name: str, configs: list[dict]):
    """UserError unless the runs of a mean differ in their seed, and in nothing else that counts."""
    seeds = {config["seed"] for config in configs}
    plain = []
    for config in configs:
        init = (config["init"] or "").rstrip("/").removesuffix(f"-{config['seed']}")
        plain.append({**config, "seed": None, "init": init, **MACHINE})
    keys = sorted({key for config in plain for key in config})
    differ = [key for key in keys if any(c.get(key) != plain[0].get(key) for c in plain)]
    if differ:
        raise UserError(f"the runs '{name}' are not one: they differ in {', '.join(differ)}")
    if len(seeds) < len(configs):
        raise UserError(f"the runs '{name}' are not several: a seed occurs twice")


def cell(column: str, values: list[float]) -> str:
    """Mean ± deviation; of times and the like, which no two machines share, the median."""
    if column in COSTS:
        return f"{statistics.median(values):.{1 if column == 'minutes' else 0}f}"
    mean, deviation = mean_and_deviation(values)
    return f"{mean:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}")


def finished(folder: Path) -> tuple[dict, dict[str, float]]:
    """A finished run's config, and what it measured: its last row of each task, and its cost."""
    config = read_config(folder)
    metrics, rows = read_jsonl(folder / "metrics.jsonl"), own_rows(folder)
    steps = math.ceil(config["samples"] / config["batch_size"])
    if not metrics or metrics[-1]["step"] < steps:
        raise UserError(f"{folder} is not finished: continue it with --out {folder} --resume")
    scores, several = {}, len({row["attribute"] for row in rows if "attribute" in row}) > 1
    for row in (row for row in rows if row["step"] == steps):
        task = task_name(row) + (f" {row['attribute']}" if several and "attribute" in row else "")
        found = {key: value for key, value in row.items() if "@" in key}
        scores |= found or {task: row["top1"]}
    before = [0, *(line["step"] for line in metrics)]
    seconds = sum(
        line["step_s"] * (line["step"] - b) for line, b in zip(metrics, before, strict=False)
    )
    scores["minutes"] = seconds / 60
    scores["images/s"] = statistics.median(line["images_per_s"] for line in metrics)
    if metrics[-1]["peak_mb"]:  # unknown on Windows
        scores["peak MB"] = max(line["peak_mb"] for line in metrics)
    return config, scores


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a .jsonl file, less those that were cut off; none where there is no file."""
    try:
        lines = path.read_text().splitlines() if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def positive(text: str) -> int:
    """The type of flags that count something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def natural(text: str) -> int:
    """The type of flags that may be 0."""
    if int(text) < 0:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Evaluate runs.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("task", choices=("probe", "fewshot", "zeroshot", "retrieval", "table"))
    add("run", type=Path, nargs="+", help="the run's folder; for a table, several")
    add("--data", help="training images for probe and few-shot; default: the run's own")
    add("--val-data", help="images to evaluate on; default: the same source's own split")
    add("--data-root", help="where torchvision keeps its sets; default: as in the run")
    add("--class-names", help="file with a class a line, several names between commas")
    add("--prior", action="store_true", help="from the head: subtract each token's log-frequency")
    add("--prompt", action="append", dest="prompts", help="zeroshot: text with {} for a class name")
    add("--shots", type=positive, default=10, help="fewshot: training images a class")
    add("--draws", type=positive, default=3, help="fewshot: how often to draw them")
    add("--limit", type=positive, help="training images, or pairs of retrieval, at most")
    add("--batch-size", type=positive, default=256)
    add("--workers", type=natural, default=2)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    try:
        if args.task == "table":
            print(table(args.run))
            return
        if len(args.run) > 1:
            raise UserError(f"{args.task} takes one run, and {len(args.run)} were named")
        if any("{}" not in prompt for prompt in args.prompts or ()):
            raise UserError("--prompt needs {} where the name of the class goes")
        run = load_run(args.run[0], pick_device(args.device))
        trains = args.task in ("probe", "fewshot")
        train, val = open_sources(run.config, vars(args), trains)
        if val is None:
            raise UserError("there is no validation data: name some with --val-data")
        names = ("prior", "prompts", "shots", "draws", "limit", "batch_size", "workers")
        options = {name: getattr(args, name) for name in names}
        if args.task == "retrieval":
            rows = measure_retrieval(run, val, **options)
        else:
            rows = measure([args.task], run, train, val, **options)
        given = {name: getattr(args, name) for name in OTHER_DATA if getattr(args, name)}
        print(report([row | ({"flags": given} if given else {}) for row in rows], run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


# Flags with which a score is not the run's own: it is of other data, or other names.
OTHER_DATA = ("data", "val_data", "class_names", "prompts", "limit")


def open_sources(config: dict, flags: dict | None = None, trains: bool = True) -> tuple:
    """The training and the validation source of a run; `flags` that are not None replace its own.

    The first is None when nothing trains on it, the second when none is named and the first has no
    split of its own.
    """
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    given = {**config, **({"val_data": None} if "data" in flags else {}), **flags}
    where = given["data_root"], given["class_names"]
    val = given["val_data"] or (given["data"] if given["data"] in BUILT_IN else None)
    train = load_source(given["data"], "train", *where, given["caption_noise"]) if trains else None
    return train, val and load_source(val, "val", *where)


if __name__ == "__main__":
    main()
