"""Evaluation: a run is read back, and its frozen encoder measured.

    python eval.py zeroshot|probe|fewshot|retrieval|loss RUN [--data SPEC] [--val-data SPEC]
    python eval.py predict|words|search|curves|table|caption|plan ...

Zero-shot from the head stands here, all else on the shelf. Each of the first five prints a table,
with one row for each attribute that the source has classes for, and appends the rows to
RUN/eval.jsonl, unless the run is a copy without an optimizer. In Python:

    model, preprocess, tokenizer = load("pretrained/icons")

Letters in shapes:  N images,  M texts,  D width,  C classes,  V vocabulary.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

if "OMP_WAIT_POLICY" not in os.environ:  # as in train.py
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import torch
from torch import Tensor, nn
from tqdm import tqdm

import data
import plugins
import superclass
from data import UserError, caption_labels, load_source, normalize, number
from plugins import find
from superclass import IDF, Objective

# ------------------------------------------------------------------------------------------------
# A run, read back. Its folder holds
#   config.json         the flags, and what follows from them: vocabulary size, classes, precision
#   tokenizer.tiktoken  the tokenizer's vocabulary
#   checkpoint.pt       everything that training needs to continue exactly
#   encoder.pt          the encoder alone, with timm's names
#   metrics.jsonl       one line every --log-every steps, and one for each loss on held-out data
#   eval.jsonl          one line for each score

# What may change when a run is resumed; all other flags belong to the run.
MAY_CHANGE = {"micro_batch", "compile", "grad_checkpointing", "workers", "device"}
MAY_CHANGE |= {"save_every", "log_every", "eval_every", "out", "resume", "no_first_eval"}


class Run(NamedTuple):
    """What a run's folder holds, ready for use."""

    folder: Path
    config: argparse.Namespace
    objective: Objective
    tokenizer: object
    model: nn.Module
    idf: IDF
    step: int
    is_copy: bool = False  # without the optimizer's state, as in pretrained/: nothing is added


def load_run(folder: str | Path, device: str | torch.device = "cpu") -> Run:
    """Load a run for evaluation; raises UserError if the folder holds no run or a damaged one."""
    folder = Path(folder)
    config = read_config(folder)
    tokenizer = data.read_tokenizer(folder / "tokenizer.tiktoken", vars(config))
    state = read_checkpoint(config)
    try:
        objective = open_objective(config)
        model, idf = build_model(objective, config), IDF(config.vocab_size)
        model.load_state_dict(state["model"])
        idf.load_state_dict(state["idf"])
        model, step = model.to(device).eval(), state["progress"]["step"]
        parts = objective, tokenizer, model, idf.to(device), step
        return Run(folder, config, *parts, is_copy="optimizer" not in state)
    except UserError:  # a package is missing
        raise
    except Exception as error:  # files that were changed can contradict each other anywhere
        reason = f"its files do not fit together ({error!r:.300})"
        raise UserError(f"{folder} is damaged: {reason}") from None


def load(folder: str | Path, device: str = "cpu") -> tuple[nn.Module, Callable, object]:
    """A run's model, in evaluation mode; what turns a PIL image into its input; its tokenizer.

    `preprocess(image)` is a normalised [3, S, S]; `model(images)` are logits [B, V] over the
    tokens, `model.features(images)` is [B, D]. Raises UserError as `load_run` does.
    """
    run = load_run(folder, device)
    view = data.CenterCrop(run.config.image_size)
    preprocess = lambda image: normalize(data.to_tensor(view(image))[None])[0]  # noqa: E731
    return run.model, preprocess, run.tokenizer


def open_objective(config: argparse.Namespace) -> Objective:
    """The objective of a run, with the loss of --loss where it uses one."""
    objective = find("objective", config.objective)()
    objective.config, objective.token_loss = config, find("loss", config.loss)
    for name in ("log_probabilities", "whole_batch", "weighted"):
        if (own := find("loss", config.loss, name)) is not None:
            setattr(objective, name, own)
    return objective


def build_model(objective: Objective, config: argparse.Namespace) -> nn.Module:
    """The untrained model; ValueError if the encoder does not fit the images."""
    name, colon, arg = config.model.partition(":")
    if "/" in name:
        encoder = superclass.build_encoder(config.model, config.image_size)
    else:
        encoder = find("model", name)(config.image_size, *[arg] * bool(colon))
    if config.grad_checkpointing and not hasattr(encoder, "grad_checkpointing"):
        raise UserError(f"--grad-checkpointing is for the ViT, not for {config.model}")
    encoder.grad_checkpointing = config.grad_checkpointing
    return objective.build(encoder, config)


def open_sources(config: argparse.Namespace, trains: bool = True, **given) -> tuple:
    """The training and the validation source of a run; `given` flags replace the run's own.

    The first is None if nothing trains on it. The second is None if none is named and the training
    source has no split of its own. When nothing trains, `data` alone names what is evaluated. Other
    `data` has classes of its own.
    """
    given = {key: value for key, value in given.items() if value is not None}
    spec, other = given.get("data", config.data), "data" in given
    val = given.get("val_data", None if other else config.val_data)
    names = given.get("class_names", None if other else config.class_names)
    where = given.get("data_root", config.data_root), names
    train = load_source(spec, "train", *where) if trains or not val else None
    if val is None and (train.has_splits or (other and not trains)):
        val = spec
    return train if trains else None, val and load_source(val, "val", *where)


def read_config(folder: str | Path) -> argparse.Namespace:
    """The run's config.json; raises UserError if there is none or it is damaged."""
    folder = Path(folder)
    try:
        return argparse.Namespace(**json.loads((folder / "config.json").read_text()), out=folder)
    except OSError:
        raise UserError(f"{folder} holds no run: there is no config.json in it") from None
    except (ValueError, TypeError) as error:  # not JSON, or not an object
        raise UserError(f"{folder / 'config.json'} is damaged: {error}") from None


def fingerprint(config: argparse.Namespace) -> str:
    """What ties a checkpoint to its run: a hash of its own flags and of its vocabulary."""
    flags = {key: value for key, value in vars(config).items() if key not in MAY_CHANGE}
    vocabulary = (config.out / "tokenizer.tiktoken").read_bytes()
    return hashlib.sha256(json.dumps(flags, sort_keys=True).encode() + vocabulary).hexdigest()


def identity(source) -> str:
    """What a run trains on: the size of a source, and a hash of its names in their order."""
    digest = hashlib.sha256("\n".join(map(ascii, source.rows)).encode()).hexdigest()
    return f"{source}, names {digest[:12]}" if source.rows else str(source)


def read_checkpoint(config: argparse.Namespace) -> dict:
    """The checkpoint of a run; raises UserError if it is missing, damaged, or another run's."""
    state = read_weights(config.out / "checkpoint.pt")
    if state.get("fingerprint") != fingerprint(config):
        path = config.out / "checkpoint.pt"
        raise UserError(f"{path} does not belong to the config.json and the tokenizer beside it")
    return state


def read_weights(path: Path) -> dict:
    """A file of tensors by name; no code in it is ever run."""
    try:
        return dict(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError:
        raise UserError(f"there is no checkpoint {path}") from None
    except Exception as error:  # a damaged file can fail anywhere in the unpickler
        reason = f"is damaged and cannot be read: {type(error).__name__}"
        if "Unsupported global" in str(error):  # a class or a function
            reason = "cannot be read: it holds more than tensors; save a state_dict() alone"
        raise UserError(f"checkpoint {path} {reason}") from None


def publish(content: dict | bytes | str, path: Path):
    """Write a file whole or not at all: beside the old one, flushed to disk, then renamed.

    Raises UserError if that fails, for instance on a full disk; the old file is then intact.
    """
    beside = path.with_name(path.name + ".part")
    try:
        with open(beside, "wb") as file:
            if isinstance(content, dict):
                torch.save(content, file)
            else:
                file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, RuntimeError) as error:  # torch.save raises the latter when a write fails
        beside.unlink(missing_ok=True)
        raise UserError(f"{path} cannot be written ({error}); the old one is intact") from None


def read_jsonl(path: str | Path) -> list[dict]:
    """The lines of a .jsonl file without those that were cut off; none if there is no file."""
    try:
        lines = Path(path).read_text().splitlines() if os.path.exists(path) else []
        return [json.loads(line) for line in lines if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def own_rows(folder: str | Path) -> list[dict]:
    """The scores of a run on its own data and classes, which tables and curves show."""
    return [row for row in read_jsonl(Path(folder) / "eval.jsonl") if not row.get("flags")]


def append_jsonl(path: Path, rows: list[dict]):
    """Append lines to a .jsonl file, whose last line may have been cut off."""
    try:
        with open(path, "a+b") as file:
            file.seek(max(0, file.tell() - 1))
            cut = file.read() not in (b"", b"\n")
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            file.write(("\n" * cut + lines).encode())
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not outlive the lines before it
    except OSError as error:  # a full disk
        raise UserError(f"{path} cannot be written ({error})") from None


def pick_device(name: str) -> torch.device:
    """The device of that name, set to exact arithmetic; "auto" is CUDA, else MPS, else the CPU."""
    # The same bits each time on a GPU, too, for whoever sets what cuBLAS needs for that.
    torch.use_deterministic_algorithms("CUBLAS_WORKSPACE_CONFIG" in os.environ)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32, as in matrix products
    quota = Path("/sys/fs/cgroup/cpu.max")  # of a container, where torch counts all cores
    if quota.exists() and "max" not in (share := quota.read_text()):
        used, period = map(int, share.split())
        torch.set_num_threads(max(1, min(torch.get_num_threads(), used // period)))
    if name == "auto":
        mps = "mps" if torch.backends.mps.is_available() else "cpu"
        name = "cuda" if torch.cuda.is_available() else mps
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError):
        problem = f"device '{name}' is unknown or not available here"
        raise UserError(f"{problem}: use auto, cuda, mps or cpu") from None
    return device


def pick_precision(name: str, device: torch.device) -> str:
    """The autocast type; "auto": bf16 where the hardware has it, fp16 on older GPUs, else fp32."""
    if name == "auto" and device.type == "cuda":
        name = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    elif name == "auto":
        features = getattr(torch.cpu, "get_capabilities", dict)() if device.type == "cpu" else {}
        # Without AMX, AVX-512's bf16 does not pay for its conversions: 0.83 of fp32's speed.
        name = "bf16" if features.get("amx_bf16") else "fp32"
    return {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}[name]


# ------------------------------------------------------------------------------------------------
# Features, and what is measured on them.

BATCH = 256  # images at a time


def good_batches(run: Run, source, size, limit=None, workers=2, reads=None) -> Iterator:
    """Batches of `size` of a source's images, resized and centre-cropped, `limit` images at most.

    With `reads`, as of an objective, samples need captions. Bad samples are skipped; more than a
    tenth of them, or no image at all, raise UserError.
    """
    tokenizer = None if reads is None else run.tokenizer
    prepare = data.Prepare(data.CenterCrop(run.config.image_size), tokenizer, reads=reads or ())
    good, skipped = 0, Counter()
    run.model.eval()
    one_pass = data.OnePass(source, prepare, size, limit)
    with tqdm(unit="img", leave=False, disable=None) as bar:  # on a terminal
        for batch in data.batches(one_pass, workers, run.idf.df.device):
            good += len(batch.images)
            skipped.update(bad.kind for bad in batch.bad)
            if len(batch.images):
                yield batch
            bar.update(len(batch.images) + len(batch.bad))
    data.refuse_if_bad(good, skipped)
    if not good:
        raise UserError("there is no image to evaluate")
    if skipped:
        tqdm.write(f"skipped {data.describe(skipped)}, of {source}", file=sys.stderr)


@torch.no_grad()
def extract(run: Run, source, limit: int | None = None, workers: int = 2, captioned: bool = False):
    """Features [N, D] (float32, on the CPU), targets [N, A] and N lists of token ids of a source.

    They are in the source's order. Unless `captioned`, there are no lists. Raises UserError as
    `good_batches` does.
    """
    features, targets, tokens, places = [], [], [], []
    reads = ("tokens",) if captioned else None
    for batch in good_batches(run, source, BATCH, limit, workers, reads):
        features.append(run.model.features(normalize(batch.images)).float().cpu())
        targets.append(batch.targets.cpu())
        tokens += [row[row >= 0].tolist() for row in batch.reads.get("tokens", ())]
        places += batch.places
    order = sorted(range(len(places)), key=places.__getitem__)  # loaders take turns in shards
    features, targets = torch.cat(features)[order], torch.cat(targets)[order]
    if not features.isfinite().all():
        raise UserError("the features are not finite: the run's weights are damaged")
    return features, targets, [tokens[i] for i in order] if captioned else []


def zeroshot(run: Run, features: Tensor, texts: list[list[str]]) -> Tensor:
    """Scores [N, C] of classes for pooled features [N, D], from the pretraining head alone.

    A text scores the IDF-weighted mean of log softmax(x) over its tokens, also after --no-idf (with
    IDF, a caption with that text would have the loss -score); a class, the mean over its texts.
    This is ours: the paper trains a text tower. A text without a token that was in training does
    not count, and a class without any other is never the best. UserError if that leaves no class.
    """
    bags = token_bags(run.idf, [caption_labels(text, run.tokenizer) for text in chain(*texts)])
    scores = score_bags(run, features, bags)
    scores = scores.masked_fill(scores.isinf(), torch.nan).split(list(map(len, texts)), dim=1)
    means = torch.stack([score.nanmean(dim=1) for score in scores], dim=1)
    unknown = [names[0] for names, mean in zip(texts, means.T, strict=True) if mean.isnan().all()]
    if unknown:
        said = f"no token of {', '.join(map(repr, unknown))} occurred in training"
        if len(unknown) == len(texts):
            raise UserError(f"{said}: give other names")
        print(f"{said}: images are never taken for these", file=sys.stderr)
    return means.nan_to_num(-torch.inf)


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


@torch.no_grad()
def score_bags(run: Run, features: Tensor, bags: Tensor) -> Tensor:
    """Scores [N, M]: the mean log-probability of each of M `token_bags` for features [N, D].

    A bag without tokens has -inf, so that it is never the best.
    """
    scores = []
    for x in features.to(run.idf.df.device).split(BATCH):
        logits = run.model.head(run.model.norm(x)).float()  # [n, V]
        log_p = run.objective.log_probabilities(logits)
        scores.append(torch.sparse.mm(bags, log_p.T.cpu()).T)
    empty = bags.sum(dim=1).to_dense() == 0
    return torch.cat(scores).masked_fill(empty, -torch.inf)


def top1(scores: Tensor, labels: Tensor) -> float:
    """Share of images [0, 1] whose best class is the right one."""
    return (scores.argmax(dim=1) == labels).sum().item() / len(labels)


# ------------------------------------------------------------------------------------------------
# From a run to rows.


def classify(run: Run, task: str, names: list[list[str]], features: Tensor, prompts) -> Tensor:
    """The scores [N, C] of a run's own way to tell classes apart without training for them.

    "zeroshot" is by the objective's `classify`, if it has one, else by the head over the words;
    "head" is by the head also where there is another way.
    """
    own, default = getattr(run.objective, "classify", None), run.objective.prompts
    if run.objective.has_words and (own is None or task == "head"):
        own, default = zeroshot, ["{}"]
    if own is None:
        what = "to tell classes apart without training needs a head over words or a text tower"
        raise UserError(f"{what}: {run.folder} has neither")
    texts = [[p.replace("{}", name) for name in ns for p in prompts or default] for ns in names]
    return own(run, features, texts)


OWN_WAYS = ("zeroshot", "head")


def fitted(task: str):
    """What fits a classifier to features for a task of the shelf; None for other tasks."""
    return None if task in OWN_WAYS else find("task", task, "fitted")


class TooFew(UserError):
    """Too few labelled training images for a task: no reason to give up the others."""


@torch.no_grad()
def measure(tasks: list[str], run: Run, train, val, **options) -> list[dict]:
    """Rows {task, attribute, top1, ...} of the given tasks for every attribute of the source `val`.

    "zeroshot" stands for all of the objective's own ways to tell classes apart without training.

    Args:
        train: the source whose images the probe and the shots come from.
        options: limit (of training images), workers, shots, prompts.
    """
    options = {"limit": None, "workers": 2, "shots": 10, "prompts": None} | options
    fits = {task: fit for task in tasks if (fit := fitted(task))}
    if not {*tasks} <= {*OWN_WAYS, *fits}:
        return find("task", tasks[0], "measure")(run, val, options)
    own = [task for task in run.objective.tasks if task in OWN_WAYS]
    if "zeroshot" in tasks and own:
        tasks = [*own, *(task for task in tasks if task not in OWN_WAYS)]
    if not val.attributes:
        raise UserError("the validation data has no classes: give class folders or a label column")
    workers = options["workers"]
    if fits and list(train.attributes.values()) != list(val.attributes.values()):
        raise UserError("training and validation data have other classes: give --class-names")
    features, targets, _ = extract(run, val, workers=workers)
    if len(tasks) == 1 and (some := find("task", tasks[0], "some") if fits else None):
        train = some(train, options)  # no more images than that task uses
    if fits:
        train_features, train_targets, _ = extract(run, train, options["limit"], workers)
    rows = []
    for a, (attribute, names) in enumerate(val.attributes.items()):
        known = targets[:, a] >= 0  # the images that have a label
        x, y = features[known], targets[known, a]
        if len(names) < 2 or not len(y):
            raise UserError(f"{len(y)} images of {len(names)} classes: nothing to tell apart")
        if len(y) < len(known):
            print(f"{len(known) - len(y)} images have no {attribute}", file=sys.stderr)
        if fits:
            known = train_targets[:, a] >= 0
            train_x, train_y = train_features[known], train_targets[known, a]
        for task in tasks:
            row = {"task": task, "attribute": attribute, "classes": len(names), "images": len(y)}
            try:
                if task in fits:
                    row |= fits[task](run, train_x, train_y, x, y, names, options)
                else:  # prompts are for the way of the objective, not for a head beside it
                    beside = task != "zeroshot" and "zeroshot" in tasks
                    prompts = None if beside else options["prompts"]
                    row["top1"] = top1(classify(run, task, names, x, prompts), y)
                rows.append(row)
            except TooFew as error:
                if len(tasks) == 1:
                    raise
                print(f"no {task}: {error}", file=sys.stderr)
    return rows


def report(rows: list[dict], run: Run) -> str:
    """Append rows to eval.jsonl, all or none, unless the run is a copy; returns them as tables."""
    stamped = [{"step": run.step, **row, "time": round(time.time())} for row in rows]
    if run.is_copy:
        print(f"{run.folder} is a copy without an optimizer: it keeps no new row", file=sys.stderr)
    else:
        append_jsonl(run.folder / "eval.jsonl", stamped)
    head = f"{'task':<15} {'attribute':<10} {'classes':>7} {'images':>7} {'top-1':>7}"
    lines = []
    for row in rows:
        if "attribute" not in row:  # loss, retrieval, captions
            scores = (f"{key} {value:.3f}" for key, value in row.items() if type(value) is float)
            lines.append("  ".join([f"{row['task']:<9} {row['images']:>7} images", *scores]))
            continue
        lines += [head] if head not in lines else []
        line = f"{task_name(row):<15} {row['attribute']:<10} {row['classes']:>7} {row['images']:>7}"
        spread = f" ± {row['deviation']:.3f}" if "deviation" in row else ""
        lines.append(f"{line} {row['top1']:>7.3f}{spread}")
    return "\n".join(lines)


def task_name(row: dict) -> str:
    """A row's task with what its score depends on: "10-shot", "probe on 500"."""
    name = f"{row['shots']}-shot" if row["task"] == "fewshot" else row["task"]
    return name + (f" on {row['train']:,}" if row["task"] == "probe" else "")


# ------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> plugins.Parser:
    parser = plugins.Parser()
    add = parser.add_argument
    add("task", help=f"zeroshot, or from the shelf: {plugins.names('task')}")
    add("run", type=Path, help="the run's folder")
    add("--data", help="training images for probe and few-shot, else the images to evaluate on")
    add("--val-data", help="images to evaluate on; default: the run's own")
    add("--data-root", help="where torchvision keeps its data sets; default: the run's")
    add("--class-names", help="file of classes; default, unless --data is given: the run's")
    add("--prompt", action="append", dest="prompts", help="zeroshot: text with {} for a class name")
    add("--shots", type=number(int, 1), default=10, help="fewshot: training images of each class")
    add("--limit", type=number(int, 1), help="training images at most; retrieval, caption: pairs")
    add("--workers", type=number(int, 0), default=2, help="loader processes")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


GIVEN = "data", "val_data", "data_root", "class_names"  # instead of what the run has


def measure_command(argv: list[str] | None):
    """Measure one task of one run, print its rows, and append them to RUN/eval.jsonl."""
    args = make_parser().parse_args(argv)
    if any("{}" not in prompt for prompt in args.prompts or ()):
        raise UserError("--prompt needs {} where the class name goes")
    run = load_run(args.run, pick_device(args.device))
    given = {name: getattr(args, name) for name in GIVEN}
    try:
        train, val = open_sources(run.config, bool(fitted(args.task)), **given)
    except UserError as error:
        own = "" if any(given.values()) else " (the run's own data; --data names other data)"
        raise UserError(f"{error}{own}") from None
    if val is None:
        raise UserError("there is no validation data: name some with --val-data")
    own = {"prompts": args.prompts, "limit": args.limit}
    rows = measure([args.task], run, train, val, workers=args.workers, shots=args.shots, **own)
    given = {name: value for name, value in (given | own).items() if value}
    marks = {"flags": given} if given else {}  # such scores are not the run's own
    print(report([row | marks for row in rows], run))


def main(argv: list[str] | None = None):
    argv = sys.argv[1:] if argv is None else argv
    with data.one_sentence():
        if argv and argv[0] not in OWN_WAYS and not argv[0].startswith("-"):
            find("task", argv[0])(argv[1:])
        else:
            measure_command(argv)


if __name__ == "__main__":
    import eval  # plug-ins import this module by its name

    eval.main()
