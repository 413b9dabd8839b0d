"""Evaluation of runs: zero-shot, probe, few-shot, retrieval, captions, and tables of several runs.

    python eval.py zeroshot|probe|fewshot|retrieval|caption RUN [--data SPEC] [--val-data SPEC]
    python eval.py table RUN [RUN ...]

Each task but `table` prints a table, with one row for each attribute that the source has classes
for, and appends the rows to RUN/eval.jsonl. The encoder is frozen throughout. `table` collects
these rows over runs that differ only in their seed.

Letters in shapes:  N images,  M captions,  D width,  C classes,  V vocabulary.
"""

import argparse
import json
import math
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import run as runs
from baselines import CLIP
from caption import generate
from data import CenterCrop, OnePass, Prepare, batches, describe, normalize, pad, refuse_if_bad
from run import Run, UserError, number
from superclass import IDF
from tokenizer import caption_labels, caption_tokens

# ------------------------------------------------------------------------------------------------
# Features, and what is measured on them.

BATCH = 256  # images at a time


def good_batches(run: Run, source, size, limit=None, workers=2, captioned=False) -> Iterator:
    """Batches of `size` of a source's images, resized and centre-cropped, `limit` images at most.

    Bad samples are skipped; more than a tenth of them, or no image at all, raise UserError.
    """
    prepare = Prepare(CenterCrop(run.config.image_size), run.tokenizer if captioned else None)
    good, skipped = 0, Counter()
    run.model.eval()
    for batch in batches(OnePass(source, prepare, size, limit), workers, run.idf.df.device):
        good += len(batch.images)
        skipped.update(bad.kind for bad in batch.bad)
        if len(batch.images):
            yield batch
    refuse_if_bad(good, skipped)
    if not good:
        raise UserError("there is no image to evaluate")
    if skipped:
        tqdm.write(f"skipped {describe(skipped)}, of {source}", file=sys.stderr)


@torch.inference_mode()
def extract(run: Run, source, limit: int | None = None, workers: int = 2, captioned: bool = False):
    """Features [N, D] (float32, on the CPU), targets [N, A] and N lists of token ids of a source.

    They are in the source's order. Unless `captioned`, the lists are empty. Raises UserError as
    `good_batches` does.
    """
    features, targets, tokens, places = [], [], [], []
    for batch in good_batches(run, source, BATCH, limit, workers, captioned):
        features.append(run.model.features(normalize(batch.images)).float().cpu())
        targets.append(batch.targets)
        tokens += [row[row >= 0].tolist() for row in batch.tokens]
        places += batch.places
    order = sorted(range(len(places)), key=places.__getitem__)  # loaders take turns in shards
    features, targets = torch.cat(features)[order], torch.cat(targets)[order]
    if not features.isfinite().all():
        raise UserError("the features are not finite: the run's weights are damaged")
    return features, targets, [tokens[i] for i in order]


def standardize(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Zero mean, unit variance on the training features: a batch norm without affine."""
    mean, std = train.mean(dim=0), train.std(dim=0) + 1e-5
    return [(x - mean) / std for x in (train, *others)]


def zeroshot(run: Run, features: Tensor, names: list[list[str]]) -> Tensor:
    """Scores [N, C] of classes for pooled features [N, D], from the pretraining head alone.

    A name scores the IDF-weighted mean of log softmax(x) over its tokens, also after --no-idf (with
    IDF, a caption with that text would have the loss -score); a class, the mean over its names.
    This is ours: the paper trains a text tower. UserError if no token of a class was in training.
    """
    sizes = list(map(len, names))
    bags = token_bags(run.idf, [caption_labels(name, run.tokenizer) for name in chain(*names)])
    known = (bags.sum(dim=1).to_dense() > 0).split(sizes)
    for aliases, some in zip(names, known, strict=True):
        if not some.any():
            what = f"the class name '{aliases[0]}'"
            raise UserError(f"no token of {what} occurred in training: give other names")
    scores = zip(score_bags(run, features, bags).split(sizes, dim=1), known, strict=True)
    return torch.stack([score[:, some].mean(dim=1) for score, some in scores], dim=1)


@torch.sparse.check_sparse_tensor_invariants()  # torch asks for a choice
def token_bags(idf: IDF, labels: list[list[int]]) -> Tensor:
    """The IDF weights of each of M token sets, normalised: sparse [M, V], rows that sum to one.

    Tokens that never occurred in training get no weight. A row without any other token is empty.
    """
    weights = torch.ones(len(idf.df)) if idf.n == 0 else idf.weights().cpu() * (idf.df.cpu() > 0)
    ids = torch.tensor(list(chain(*labels)), dtype=torch.int64)
    rows = torch.arange(len(labels)).repeat_interleave(torch.tensor(list(map(len, labels))))
    sums = torch.zeros(len(labels)).index_add(0, rows, weights[ids])
    values = weights[ids] / sums[rows].clamp(min=1e-30)
    size = (len(labels), len(weights))
    return torch.sparse_coo_tensor(torch.stack([rows, ids]), values, size)


def log_probabilities(run: Run, logits: Tensor) -> Tensor:
    """The log-probabilities of all tokens from logits [..., V], as the run's loss defines them."""
    by_sigmoid = run.config.loss in ("bce", "asl", "soft_margin")
    return F.logsigmoid(logits) if by_sigmoid else F.log_softmax(logits, dim=-1)


@torch.inference_mode()
def score_bags(run: Run, features: Tensor, bags: Tensor) -> Tensor:
    """Scores [N, M]: the mean log-probability of each of M `token_bags` for features [N, D].

    A bag without tokens has -inf, so that it is never the best.
    """
    scores = []
    for x in features.to(run.idf.df.device).split(BATCH):
        logits = run.model.head(run.model.norm(x)).float()  # [n, V]
        log_p = log_probabilities(run, logits)
        scores.append(torch.sparse.mm(bags, log_p.T.cpu()).T)
    empty = bags.sum(dim=1).to_dense() == 0
    return torch.cat(scores).masked_fill(empty, -torch.inf)


def zeroshot_by_text(run: Run, features: Tensor, texts: list[list[str]]) -> Tensor:
    """Scores [N, C]: the cosine of an image and the mean of a class's texts (section 4, LiT)."""
    tokens = [[caption_tokens(text, run.tokenizer) for text in of_class] for of_class in texts]
    classes = torch.stack([embed_texts(run.model, of_class).mean(dim=0) for of_class in tokens])
    images = run.model.embed_images(features.to(run.idf.df.device)).cpu()  # [N, E]
    return images @ F.normalize(classes, dim=1).T


@torch.inference_mode()
def embed_texts(model: CLIP, tokens: list[list[int]]) -> Tensor:
    """Token ids of M texts -> unit vectors [M, E], on the CPU."""
    pieces = (pad(tokens[i : i + BATCH]) for i in range(0, len(tokens), BATCH))
    return torch.cat([model.embed_texts(ids.to(model.log_scale.device)).cpu() for ids in pieces])


def retrieval(scores: Tensor, captions: Tensor, at=(1, 5, 10)) -> dict[str, float]:
    """Recall at k of image -> caption and caption -> image, shares in [0, 1].

    A caption is found if fewer than k others score as well or better with its image; an image if
    fewer than k images of other captions do with its caption. Images with the same text count as
    one answer, because none of them can be asked for alone.

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

    The penalty is the best of five on a held-out tenth of the training set; then all of the set is
    fitted. The problem is convex, so L-BFGS replaces the paper's LARS: no learning rate to tune.

    Returns: scores [N, C] of the validation features, and the penalty. UserError below ten images.
    """
    if len(train) < 10:
        raise UserError(f"a probe on {len(train)} labelled training images: give ten")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    held, rest = order.tensor_split([len(order) // 10])
    fit, check = standardize(train[rest], train[held])
    best, weight = (-1.0, 0.0), None
    for penalty in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5):
        weight = regress(fit, labels[rest], classes, penalty, weight)  # from the last solution on
        best = max(best, (top1(linear(check, weight), labels[held]), penalty))
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

    Returns: scores [N, C] of the validation features. Raises UserError for too small a class.
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
    return (scores.argmax(dim=1) == labels).sum().item() / len(labels)


# ------------------------------------------------------------------------------------------------
# From a run to rows.

DRAWS = 3  # of the shots of `fewshot`
PROMPTS = ["a {}", "a photo of a {}", "a picture of the {}"]  # for a text tower; the head: names


@torch.inference_mode()
def classify(
    run: Run, task: str, attribute: int, names: list[list[str]], features: Tensor, options: dict
) -> Tensor:
    """The scores [N, C] of a run's own way to tell classes apart without training for it.

    "zeroshot" is by the text tower if there is one, else by the head over the vocabulary; "head" is
    by SuperCLIP's head, or by a supervised run's outputs for this attribute.
    """
    model, prompts = run.model, options.get("prompts")
    if run.config.objective == "supervised":
        classes = list(run.config.classes.values())
        if prompts or names != classes[attribute]:
            raise UserError("a supervised run knows only its own classes, and takes no --prompt")
        scores = model.head(model.norm(features.to(run.idf.df.device))).float().cpu()
        return scores.split(list(map(len, classes)), dim=1)[attribute]
    by_text = task == "zeroshot" and isinstance(model, CLIP)
    prompts = prompts or (PROMPTS if by_text else ["{}"])
    texts = [[prompt.replace("{}", name) for name in ns for prompt in prompts] for ns in names]
    return (zeroshot_by_text if by_text else zeroshot)(run, features, texts)


def measure(tasks: list[str], run: Run, train, val, **options) -> list[dict]:
    """Rows {task, attribute, top1, ...} of the given tasks for every attribute of the source `val`.

    Args:
        train: the source whose images the probe and the shots come from.
        options: limit (of training images), workers, shots, prompts.
    """
    if tasks == ["caption"]:
        return [measure_captions(run, val, options)]
    if tasks == ["retrieval"]:
        return [measure_retrieval(run, val, options)]
    if not val.attributes:
        raise UserError("the validation data has no classes: give class folders or a label column")
    if run.config.objective == "supervised":
        tasks = ["head" if task == "zeroshot" else task for task in tasks]
    elif run.config.objective == "superclip" and "zeroshot" in tasks:
        tasks = ["head", *tasks]
    elif run.config.objective == "caption" and "zeroshot" in tasks:
        raise UserError(f"zeroshot needs a head or a text tower: {run.folder} has neither")
    workers, trains = options.get("workers", 2), {"probe", "fewshot"} & set(tasks)
    if trains and list(train.attributes.values()) != list(val.attributes.values()):
        raise UserError("training and validation data have other classes: give --class-names")
    features, targets, _ = extract(run, val, workers=workers)
    if trains:
        train_features, train_targets, _ = extract(run, train, options.get("limit"), workers)
    rows = []
    for a, (attribute, names) in enumerate(val.attributes.items()):
        known = targets[:, a] >= 0  # the images that have a label
        x, y, classes = features[known], targets[known, a], len(names)
        if classes < 2 or not len(y):
            raise UserError(f"{len(y)} images of {classes} classes: nothing to tell apart")
        if len(y) < len(known):
            print(f"{len(known) - len(y)} images have no {attribute}", file=sys.stderr)
        if trains:
            known = train_targets[:, a] >= 0
            train_x, train_y = train_features[known], train_targets[known, a]
        for task in tasks:
            row = {"task": task, "attribute": attribute, "classes": classes, "images": len(y)}
            if task == "probe" and len(tasks) > 1 and len(train_y) < 10:
                print(f"no probe: {len(train_y)} labelled training images", file=sys.stderr)
                continue
            if task == "probe":
                moved = (t.to(run.idf.df.device) for t in (train_x, train_y, x))
                scores, penalty = probe(*moved, classes)
                row |= {"top1": top1(scores.cpu(), y), "penalty": penalty, "train": len(train_y)}
            elif task == "fewshot":
                shots = options.get("shots", 10)
                if len(tasks) > 1 and train_y.bincount(minlength=classes).min() < shots:
                    print(f"no {shots}-shot: a class has fewer training images", file=sys.stderr)
                    continue
                draws = [fewshot(train_x, train_y, x, classes, shots, n) for n in range(DRAWS)]
                found = [top1(scores, y) for scores in draws]
                row |= {"top1": statistics.mean(found), "deviation": statistics.stdev(found)}
                row |= {"shots": shots, "draws": DRAWS}
            else:  # what is asked of SuperCLIP is for its towers, not for its head
                own = {} if task == "head" and "zeroshot" in tasks else options
                row |= {"top1": top1(classify(run, task, a, names, x, own), y)}
            rows.append(row)
    return rows


@torch.inference_mode()
def measure_retrieval(run: Run, val, options: dict) -> dict:
    """The row of `retrieval` among the images of a source and their captions.

    By the text tower if there is one; otherwise a caption is a bag of tokens and scored like a
    class name.
    """
    if run.config.objective in ("supervised", "caption"):
        raise UserError(f"retrieval needs a head over words or a text tower: {run.folder} has none")
    by_text = isinstance(run.model, CLIP)
    features, _, tokens = extract(run, val, options["limit"], options["workers"], captioned=True)
    texts = [tuple(row if by_text else sorted(set(row))) for row in tokens]
    index = {text: m for m, text in enumerate(sorted(set(texts)))}
    if by_text:
        images = run.model.embed_images(features.to(run.idf.df.device)).cpu()  # [N, E]
        scores = images @ embed_texts(run.model, list(index)).T
    else:
        scores = score_bags(run, features, token_bags(run.idf, list(index)))
    row = {"task": "retrieval", "images": len(texts), "captions": len(index)}
    return row | retrieval(scores, torch.tensor([index[text] for text in texts]))


def measure_captions(run: Run, val, options: dict) -> dict:
    """The row of `caption`: CIDEr of the generated texts, and the share that equals a reference.

    Rows with the same pixels and question are one image with several references. The texts are
    written to captions.jsonl in the run's folder.
    """
    if run.config.objective != "caption":
        raise UserError(f"{run.folder} has no language model: train one with --objective caption")
    decode, found, size = run.tokenizer.decode, {}, BATCH // 4  # logits are [B, K, V]
    for batch in good_batches(run, val, size, options["limit"], options["workers"], captioned=True):
        questions = batch.questions.to(batch.images.device)
        answers = generate(run.model, normalize(batch.images), questions)
        rows = zip(batch.images.cpu(), batch.questions, batch.tokens, answers, strict=True)
        for image, *ids, answer in rows:
            question, reference = (decode(row[row >= 0].tolist()).strip() for row in ids)
            text = {"question": question, "generated": decode(answer).strip(), "references": []}
            key = hash((image.numpy().tobytes(), question))
            found.setdefault(key, text)["references"].append(reference)
    texts = list(found.values())
    if not any(text["generated"] for text in texts):
        raise UserError(f"all {len(texts)} generated texts are empty: train longer")
    runs.publish("".join(json.dumps(text) + "\n" for text in texts), run.folder / "captions.jsonl")
    score = cider([text["generated"] for text in texts], [text["references"] for text in texts])
    exact = sum(text["generated"] in text["references"] for text in texts) / len(texts)
    return {"task": "caption", "images": len(texts), "cider": score, "exact": exact}


def cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """Agreement of captions with their references, 0 to 10: CIDEr-D, coco-caption's "CIDEr".

    Two texts are compared by the cosine of their n-grams' tf-idf vectors, where a repeated n-gram
    counts at most as often as in the reference, and less the more their lengths differ (Vedantam et
    al., 2015). The score is the mean over n from 1 to 4, the references and the images, times 10;
    papers print 100 times this number. An n-gram that all images have in their references has
    weight 0, so a single image scores 0. Each image has one hypothesis and one or more references.
    """

    def grams(text: str) -> list[Counter]:
        words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
        return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, 5)]

    def weigh(counts: Counter) -> dict:
        return {gram: tf * math.log(N / max(1, df[gram])) for gram, tf in counts.items()}

    def similarity(hypothesis: list[Counter], reference: list[Counter]) -> float:
        total = 0.0
        for h, r in zip(map(weigh, hypothesis), map(weigh, reference), strict=True):
            dot = sum(min(weight, r.get(gram, 0)) * r.get(gram, 0) for gram, weight in h.items())
            total += dot / (math.hypot(*h.values()) * math.hypot(*r.values()) or 1)
        longer = hypothesis[1].total() - reference[1].total()
        return total / 4 * math.exp(-(longer**2) / 72)

    N, targets = len(references), [list(map(grams, texts)) for texts in references]
    df = Counter(g for texts in targets for g in {g for text in texts for n in text for g in n})
    scores = [
        sum(similarity(grams(text), target) for target in targets_of) / len(targets_of)
        for text, targets_of in zip(hypotheses, targets, strict=True)
    ]
    return 10 * sum(scores) / N


def report(rows: list[dict], run: Run) -> str:
    """Append the rows to eval.jsonl and return them as a table."""
    stamped = [{"step": run.step, **row, "time": round(time.time())} for row in rows]
    runs.append_jsonl(run.folder / "eval.jsonl", stamped)
    if "attribute" not in rows[0]:  # retrieval, captions
        (row,) = rows
        scores = (f"{key} {value:.3f}" for key, value in row.items() if isinstance(value, float))
        return "  ".join([f"{row['task']:<9} {row['images']:>7} images", *scores])
    lines = [f"{'task':<15} {'attribute':<10} {'classes':>7} {'images':>7} {'top-1':>7}"]
    for row in rows:
        line = f"{task_name(row):<15} {row['attribute']:<10} {row['classes']:>7} {row['images']:>7}"
        spread = f" ± {row['deviation']:.3f}" if "deviation" in row else ""
        lines.append(f"{line} {row['top1']:>7.3f}{spread}")
    return "\n".join(lines)


def task_name(row: dict) -> str:
    """A row's task with what its score depends on: "10-shot", "probe on 500"."""
    name = f"{row['shots']}-shot" if row["task"] == "fewshot" else row["task"]
    return name + (f" on {row['train']:,}" if row["task"] == "probe" else "")


# ------------------------------------------------------------------------------------------------
# Several runs.

COSTS = ("minutes", "images/s", "peak MB")


def table(folders: list[Path]) -> str:
    """A Markdown table of finished runs: a row for each group of `grouped`, mean ± deviation.

    A score that some runs of a group lack is left out, with a message. Costs depend on the machine
    and are medians: minutes are those of training alone, peak MB is the process's.
    """
    groups = grouped(folders)
    columns = [column for group in groups.values() for _, scores in group for column in scores]
    columns = [column for column in dict.fromkeys(columns) if column not in COSTS] + [*COSTS]
    lines = [f"| run | lr | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 3) + "|"]
    for name, group in groups.items():
        cells = [name, f"{group[0][0].lr:g}", str(len(group))]
        for column in columns:
            values = [scores[column] for _, scores in group if column in scores]
            if len(values) < len(group):
                cells.append("")
                if values:
                    found = f"{len(values)} of {len(group)} runs have {column}"
                    print(f"{name}: {found}", file=sys.stderr)
            elif column in COSTS:
                cells.append(f"{statistics.median(values):.{1 if column == 'minutes' else 0}f}")
            else:
                cells.append(cell(values))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def grouped(folders: list[Path]) -> dict[str, list[tuple[argparse.Namespace, dict[str, float]]]]:
    """The configs and scores of finished runs, those that differ only in their seed together.

    A group is named after its folders, without the trailing -SEED (--init may end in one, too).
    Raises UserError for a group whose runs differ otherwise or share a seed.
    """
    groups = {}
    for folder in folders:
        config, scores = finished(folder)
        name = folder.resolve().name.removesuffix(f"-{config.seed}")
        groups.setdefault(name, []).append((config, scores))
    for name, group in groups.items():
        flags = []
        for config, _ in group:
            init = (config.init or "").rstrip("/").removesuffix(f"-{config.seed}")
            flags.append({**vars(config), "seed": None, "init": init})
        keys = sorted(set().union(*flags) - {*runs.MAY_CHANGE, "dtype", "lanes"})
        differ = [key for key in keys if any(own.get(key) != flags[0].get(key) for own in flags)]
        if differ:
            raise UserError(f"the runs '{name}' are not one group: {', '.join(differ)} differ")
        if len({config.seed for config, _ in group}) < len(group):
            raise UserError(f"the runs '{name}' are not several: a seed occurs twice")
    return groups


def cell(values: list[float]) -> str:
    """Mean ± sample standard deviation, the latter of several values only."""
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{spread}"


def finished(folder: Path) -> tuple[argparse.Namespace, dict[str, float]]:
    """A finished run's config and what it measured: its last score for each task, and its costs."""
    config, metrics = runs.read_config(folder), runs.read_jsonl(folder / "metrics.jsonl")
    steps = math.ceil(config.samples / config.batch_size)
    if not metrics or metrics[-1]["step"] < steps:
        raise UserError(f"{folder} is not finished: continue it with --out {folder} --resume")
    rows, scores = [row for row in runs.own_rows(folder) if row["step"] == steps], {}
    several = len({row["attribute"] for row in rows if "attribute" in row}) > 1
    for row in rows:
        if "top1" in row:
            scores[task_name(row) + (f" {row['attribute']}" if several else "")] = row["top1"]
        else:  # retrieval, captions
            scores |= {key: value for key, value in row.items() if isinstance(value, float)}
    lines = pairwise([{"step": 0}, *metrics])
    seconds = sum(line["step_s"] * (line["step"] - before["step"]) for before, line in lines)
    scores["minutes"] = seconds / 60
    scores["images/s"] = statistics.median(line["images_per_s"] for line in metrics)
    if metrics[-1]["peak_mb"]:  # unknown on Windows
        scores["peak MB"] = max(line["peak_mb"] for line in metrics)
    return config, scores


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("task", choices=("zeroshot", "probe", "fewshot", "retrieval", "caption", "table"))
    add("run", type=Path, nargs="+", help="the run's folder; for a table, several")
    add("--data", help="training images for probe and few-shot, else the images to evaluate on")
    add("--val-data", help="images to evaluate on; default: the run's own")
    add("--class-names", help="file of classes; default, unless --data is given: the run's")
    add("--prompt", action="append", dest="prompts", help="zeroshot: text with {} for a class name")
    add("--shots", type=number(int, 1), default=10, help="fewshot: training images of each class")
    add("--limit", type=number(int, 1), help="training images at most; retrieval, caption: pairs")
    add("--workers", type=number(int, 0), default=2, help="loader processes")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    try:
        if args.task == "table":
            print(table(args.run))
            return
        if len(args.run) > 1:
            raise UserError(f"{args.task} takes one run, not {len(args.run)}")
        if any("{}" not in prompt for prompt in args.prompts or ()):
            raise UserError("--prompt needs {} where the class name goes")
        run = runs.load_run(args.run[0], runs.pick_device(args.device))
        given = {name: getattr(args, name) for name in ("data", "val_data", "class_names")}
        train, val = runs.open_sources(run.config, args.task in ("probe", "fewshot"), **given)
        if val is None:
            raise UserError("there is no validation data: name some with --val-data")
        own = {"prompts": args.prompts, "limit": args.limit}
        rows = measure([args.task], run, train, val, workers=args.workers, shots=args.shots, **own)
        given = {name: value for name, value in (given | own).items() if value}
        marks = {"flags": given} if given else {}  # such scores are not the run's own
        print(report([row | marks for row in rows], run))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
