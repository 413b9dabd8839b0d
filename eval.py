"""Evaluation of a run: linear probe, few-shot, and zero-shot straight from the head.

    python eval.py probe|fewshot|zeroshot RUN [--data SPEC] [--val-data SPEC]

Each command prints a table, a row for each attribute that the source has classes for, and appends
the rows to RUN/eval.jsonl. The encoder is frozen throughout; features are extracted once.

Letters in the shapes:  N images,  D width,  C classes,  V vocabulary.
"""

import argparse
import json
import statistics
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter as HelpFormatter
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

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
)
from superclass import IDF, SuperClass, build_encoder
from tokenizer import caption_labels, read_ranks

# ------------------------------------------------------------------------------------------------
# Runs.


class Run(NamedTuple):
    """What a run's folder holds, ready for use."""

    folder: Path
    config: dict
    tokenizer: object
    model: SuperClass
    idf: IDF
    step: int


def read_config(folder: Path) -> dict:
    """The run's config.json; UserError when there is none."""
    try:
        return json.loads((folder / "config.json").read_text())
    except OSError:
        raise UserError(f"{folder} holds no run: there is no config.json in it") from None
    except ValueError:
        raise UserError(f"{folder / 'config.json'} is damaged: it is not JSON") from None


def read_tokenizer(folder: Path, config: dict):
    """The tokenizer that was saved with the run."""
    ranks = read_ranks(folder / "tokenizer.tiktoken")
    return tiktoken.Encoding(
        "run", pat_str=config["words"], mergeable_ranks=ranks, special_tokens={}
    )


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
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"device '{name}' is unknown or not available here: use auto, cuda, mps or cpu"
        ) from None
    return device


def load_run(folder: Path, device: torch.device) -> Run:
    """Load a run for evaluation.

    Raises UserError when the folder holds no run or a damaged one.
    """
    config = read_config(folder)
    state = read_checkpoint(folder / "checkpoint.pt")
    model = SuperClass(build_encoder(config["model"], config["image_size"]), config["vocab_size"])
    idf = IDF(config["vocab_size"])
    model.load_state_dict(state["model"])
    idf.load_state_dict(state["idf"])
    return Run(
        folder,
        config,
        read_tokenizer(folder, config),
        model.to(device).eval(),
        idf.to(device),
        state["step"],
    )


# ------------------------------------------------------------------------------------------------
# Features.


@torch.inference_mode()
def extract(
    model: SuperClass, source, image_size: int, batch_size=256, workers=2, limit: int | None = None
):
    """Features [N, D] (float32, on the CPU) and targets [N, A] of a source, `limit` images at most.

    Images are resized and centre-cropped. Bad ones are skipped; past a tenth this raises UserError.
    """
    device = next(model.parameters()).device
    training, features, targets = model.training, [], []
    skipped = torch.zeros(len(KINDS), dtype=torch.int64)
    model.eval()
    dataset = OnePass(source, Prepare(CenterCrop(image_size)), batch_size, limit)
    for batch in batches(dataset, workers, device):
        skipped = skipped + batch["skipped"]
        if "images" in batch:
            features.append(
                model.features(normalize(batch["images"].to(device, non_blocking=True)))
                .float()
                .cpu()
            )
            targets.append(batch["targets"])
    model.train(training)
    refuse_if_bad(sum(map(len, targets)), skipped)
    if not targets:
        raise UserError("there is no image to evaluate")
    return torch.cat(features), torch.cat(targets)


def standardize(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Zero mean, unit variance on the training features: a batch norm without affine."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]


# ------------------------------------------------------------------------------------------------
# The measurements.


def zeroshot(
    model: SuperClass,
    idf: IDF,
    tokenizer,
    features: Tensor,
    names: list[list[str]],
    prior: bool = False,
) -> Tensor:
    """Scores [N, C] of classes for pooled features [N, D], from the pretraining head alone.

    The score of a name is the IDF-weighted mean of log softmax(x) over its tokens (a caption with
    that text would have the loss -score); a class scores the mean over its names. This is ours:
    the paper trains a text tower for it.

    Args:
        names: the names of each class.
        prior: subtract each token's log-frequency, so that common names lose their head start.
    Raises:
        UserError: when no token of a class's names occurred in training.
    """
    idf.wait()
    device, V = model.head.weight.device, len(idf.df)
    seen = idf.df > 0 if idf.n > 0 else torch.ones(V, dtype=torch.bool, device=device)
    weights = (idf.weights() if idf.n > 0 else torch.ones(V, device=device)) * seen
    name_weights, classes = [], []  # a row [V] of normalised weights for each name, and its class
    for c, aliases in enumerate(names):
        for name in aliases:
            w = torch.zeros(V, device=device)
            ids = caption_labels(name, tokenizer)
            w[ids] = weights[ids]
            if w.sum() > 0:
                name_weights.append(w / w.sum())
                classes.append(c)
        if c not in classes:
            raise UserError(
                f"no token of the class name '{names[c][0]}' occurred in training: give other names"
            )
    name_weights, classes = torch.stack(name_weights), torch.tensor(classes, device=device)
    to_class = F.one_hot(classes, len(names)).float()
    to_class = to_class / to_class.sum(dim=0)  # [names, C]: mean over the names of a class
    frequency = (
        (idf.df.float() / idf.n.clamp(min=1)).clamp(min=1e-9).log()
        if prior
        else torch.zeros(V, device=device)
    )
    scores = []
    with torch.inference_mode():
        for x in features.split(1024):
            log_p = F.log_softmax(model.head(model.norm(x.to(device))).float(), dim=1)  # [n, V]
            scores.append(((log_p - frequency) @ name_weights.T @ to_class).cpu())
    return torch.cat(scores)


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


def measure(tasks: Iterable[str], run: Run, train, val, **options) -> list[dict]:
    """Rows {task, attribute, top1, ...} of the given tasks for every attribute of the source `val`.

    Args:
        train: the source whose images the probe and the shots come from.
        options: shots, draws, prior, workers, batch_size, limit (training images at most).
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
        row = {"task": task, "attribute": attribute, "classes": classes, "images": len(y)}
        if task == "zeroshot":
            prior = options.get("prior", False)
            scores = zeroshot(run.model, run.idf, run.tokenizer, x, names, prior)
            rows.append(row | {"top1": top1(scores, y), "prior": prior})
            continue
        known = train_targets[:, a] >= 0
        if not known.any():
            raise UserError(f"no training image has a label for '{attribute}'")
        train_x, train_y = train_features[known], train_targets[known, a]
        if task == "probe":
            device = run.model.head.weight.device
            scores, penalty = probe(*(t.to(device) for t in (train_x, train_y, x)), classes)
            rows.append(
                row | {"top1": top1(scores.cpu(), y), "penalty": penalty, "train": len(train_y)}
            )
        if task == "fewshot":
            shots, draws = options.get("shots", 10), options.get("draws", 3)
            draw = [fewshot(train_x, train_y, x, classes, shots, seed) for seed in range(draws)]
            mean, deviation = mean_and_deviation([top1(scores, y) for scores in draw])
            rows.append(
                row | {"top1": mean, "deviation": deviation, "shots": shots, "draws": draws}
            )
    return rows


def mean_and_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation, which a single value has not."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def report(rows: list[dict], run: Run) -> str:
    """Append the rows to eval.jsonl and return them as a table."""
    with open(run.folder / "eval.jsonl", "a") as file:
        for row in rows:
            file.write(json.dumps({"step": run.step, **row, "time": round(time.time())}) + "\n")
    lines = [f"{'task':<15} {'attribute':<10} {'classes':>7} {'images':>7} {'top-1':>7}"]
    for row in rows:
        name = f"{row['shots']}-shot" if row["task"] == "fewshot" else row["task"]
        name += " +prior" if row.get("prior") else ""
        line = f"{name:<15} {row['attribute']:<10} {row['classes']:>7} {row['images']:>7}"
        deviation = row.get("deviation")
        lines.append(f"{line} {row['top1']:>7.3f}" + (f" ± {deviation:.3f}" if deviation else ""))
    return "\n".join(lines)


def positive(text: str) -> int:
    """The type of flags that count something."""
    if int(text) < 1:
        raise ValueError
    return int(text)


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description="Evaluate a run.", formatter_class=HelpFormatter)
    add = parser.add_argument
    add("task", choices=("probe", "fewshot", "zeroshot"))
    add("run", type=Path, help="the run's folder")
    add("--data", help="training images for probe and few-shot; default: the run's own")
    add("--val-data", help="images to evaluate on; default: the same source's own split")
    add("--data-root", help="where torchvision keeps its sets; default: as in the run")
    add("--class-names", help="file with a class a line, several names between commas")
    add("--prior", action="store_true", help="zeroshot: subtract each token's log-frequency")
    add("--shots", type=positive, default=10, help="fewshot: training images a class")
    add("--draws", type=positive, default=3, help="fewshot: how often to draw them")
    add("--limit", type=positive, help="training images at most")
    add("--batch-size", type=positive, default=256)
    add("--workers", type=int, default=2)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    try:
        run = load_run(args.run, pick_device(args.device))
        train, val = open_sources(run.config, vars(args))
        if val is None:
            raise UserError("there is no validation data: name some with --val-data")
        names = ("prior", "shots", "draws", "limit", "batch_size", "workers")
        options = {name: getattr(args, name) for name in names}
        print(report(measure([args.task], run, train, val, **options), run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def open_sources(config: dict, flags: dict | None = None) -> tuple:
    """The training and the validation source of a run; `flags` that are not None replace its own.

    The second is None when none is named and the first has no split of its own.
    """
    flags = {key: value for key, value in (flags or {}).items() if value is not None}
    given = {**config, **({"val_data": None} if "data" in flags else {}), **flags}
    where = given["data_root"], given["class_names"]
    val = given["val_data"] or (given["data"] if given["data"] in BUILT_IN else None)
    return load_source(given["data"], "train", *where), val and load_source(val, "val", *where)


if __name__ == "__main__":
    main()
