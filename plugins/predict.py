"""An answer for each picture: what it is among your classes, and how often that is right.

    python eval.py predict RUN IMAGE|FOLDER|SOURCE ... [--classes "cat, dog, hot dog"]

Letters in shapes:  N images,  D width,  S image size,  C classes.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import data
import eval as evaluation
from data import BadSample, CenterCrop, Prepare, Source, UserError, normalize, number
from eval import Run
from plugins.labels import number_classes, plain_label
from plugins.pictures import open_named, place_of, top_words


def predict(run: Run, images: list, classes: list) -> Tensor:
    """Probabilities [N, C] of your classes for images, without training for them.

    They are a softmax over the scores of the run's own way to tell classes apart: rows sum to one
    because one of the classes is taken to be right, also where none is.

    Args:
        run: of `load_run`.
        images: N PIL images or paths; BadSample if one cannot be read.
        classes: C names, or lists of names of which each stands for its class.
    """
    view = CenterCrop(run.config.image_size)
    opened = [data.open_image(Path(i) if isinstance(i, str) else i) for i in images]
    features = extract(run, torch.stack([data.to_tensor(view(image)) for image in opened]))
    return probabilities(run, features, [[c] if isinstance(c, str) else c for c in classes])


@torch.no_grad()
def extract(run: Run, images: Tensor) -> Tensor:
    """Images [N, 3, S, S] -> features [N, D] on the CPU."""
    return run.model.features(normalize(images.to(run.idf.df.device))).float().cpu()


@torch.no_grad()
def probabilities(run: Run, features: Tensor, classes: list[list[str]]) -> Tensor:
    """Features [N, D] -> probabilities [N, C]."""
    return evaluation.classify(run, "zeroshot", classes, features, None).softmax(dim=1)


def read(run: Run, sources: list[Source]) -> tuple[Tensor, list, list[tuple[str, BadSample]]]:
    """Features [N, D] of all images; (name, source, targets) of each; names of bad ones, and why.

    Without loaders: so each image, good or bad, keeps its place and its name.
    """
    prepare, features, good, bad = Prepare(CenterCrop(run.config.image_size)), [], [], []
    with tqdm(unit="img", leave=False, disable=None) as bar:  # on a terminal
        for source in sources:
            for pairs in source.once(0, 1, evaluation.BATCH, None):
                images = []
                for place, raw in pairs:
                    item, name = prepare(raw), place_of(source, place, raw)
                    if isinstance(item, BadSample):
                        bad.append((name, item))
                    else:
                        images.append(item.image)
                        good.append((name, source, item.targets))
                if images:
                    features.append(extract(run, torch.stack(images)))
                bar.update(len(pairs))
    return torch.cat(features) if features else torch.empty(0), good, bad


def answer(run: Run, features: Tensor, classes: list | None, top: int) -> list[list[tuple]]:
    """The best classes of each image, or its words if there are no classes, as (name, p)."""
    if classes is None:
        with torch.no_grad():
            norm, head, device = run.model.norm, run.model.head, run.idf.df.device
            found = [top_words(run, head(norm(x.to(device))).float(), top) for x in features]
        return [[(word.text, word.probability) for word in words] for words in found]
    best = probabilities(run, features, classes).topk(min(top, len(classes)), dim=1)
    numbers = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [[(classes[c][0], p) for c, p in zip(*row, strict=True)] for row in numbers]


def labels_of(good: list[tuple], classes: list[list[str]]) -> list[str | None]:
    """The class of each image by its label, by its source's name for it if it is none of these.

    Two classes are the same if they share a name. Of a source's attributes, the one counts that has
    the most of these classes; None if no attribute has one, and for an image without a label.
    """
    ours = {plain_label(name).casefold(): names[0] for names in classes for name in names}

    def names_of(source: Source) -> tuple[int, list[str]]:
        found = []
        for a, theirs in enumerate(source.attributes.values()):
            own = [[ours[n] for n in map(str.casefold, names) if n in ours] for names in theirs]
            names = [(same or names)[0] for same, names in zip(own, theirs, strict=True)]
            found.append((sum(map(bool, own)), -a, names))
        known, a, names = max(found, default=(0, 0, []))
        return (-a, names) if known else (0, [])

    names = {source: names_of(source) for source in {source for _, source, _ in good}}
    labels = []
    for _, source, targets in good:
        a, of_source = names[source]
        labels.append(of_source[targets[a]] if of_source and targets[a] >= 0 else None)
    return labels


def account(title: str, names: list[str], pairs: Counter, file):
    """Print a table of right and wrong by class, and the pairs most often confused.

    pairs: (class, answer) -> number of images.
    """
    width = max(len("most often confused"), *map(len, names))
    print(f"\n{title:<{width}}  images   right", file=file)
    for name in [name for name in names if any(label == name for label, _ in pairs)]:
        own = Counter({said: n for (label, said), n in pairs.items() if label == name})
        line = f"{name:<{width}} {own.total():>7} {own[name] / own.total():>7.3f}"
        wrong = ", ".join(f"{said} {n}" for said, n in own.most_common() if said != name)
        print(line + (f"  else {wrong}" if wrong else ""), file=file)
    right = sum(n for (label, said), n in pairs.items() if label == said)
    print(f"{'all':<{width}} {pairs.total():>7} {right / pairs.total():>7.3f}", file=file)
    either = Counter()
    for pair, n in pairs.items():
        either[tuple(sorted(pair))] += n * (pair[0] != pair[1])
    some = (f"{a} and {b} {n}" for (a, b), n in either.most_common(5) if n)
    print(f"{'most often confused':<{width}}  {', '.join(some) or 'none'}", file=file)


def write(rows: list[dict], args: argparse.Namespace):
    """Print rows as text, as JSON, one object a line, or as CSV."""
    if args.csv:
        table, longest = csv.writer(sys.stdout), max(len(row.get("answers", ())) for row in rows)
        answers = [f"{what}_{i}" for i in range(1, longest + 1) for what in ("name", "probability")]
        table.writerow(["image", "attribute", "label", "error", *answers])
        for row in rows:
            first = [row.get(key, "") for key in ("image", "attribute", "label", "error")]
            table.writerow([*first, *chain.from_iterable(row.get("answers", ()))])
        return
    for row in rows:
        if args.json:
            print(json.dumps(row))
        elif "error" in row:
            print(f"{row['image']}: no answer, {row['error']}")
        else:
            said = ", ".join(f"{name} {p:.1%}" for name, p in row["answers"])
            wrong = "" if row.get("right", True) else f"  WRONG: {row['label']}"
            print(f"{row['image']}: {said}{wrong}")


def main(argv: list[str]) -> list[dict]:
    """What pictures show: classes with their probabilities, or a run's most probable words."""
    parser = argparse.ArgumentParser("eval.py predict", description=main.__doc__)
    add = parser.add_argument
    add("run", type=Path, help="the run's folder")
    add("source", nargs="+", help="image files, folders, or anything that --data takes")
    add("--classes", help='"cat, dog", or a .txt file as --class-names takes; default: the run\'s')
    add("--top", type=number(int, 1), default=3, help="answers for each image (default: 3)")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object a line")
    form.add_argument("--csv", action="store_true", help="print a table with a header")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args(argv)
    run = evaluation.load_run(args.run, evaluation.pick_device(args.device))
    file = args.classes if (args.classes or "").endswith(".txt") else None
    if file:
        asked = {"class": data.read_class_names(file)}
        number_classes(asked["class"])  # raises if two have one name
    elif args.classes is not None:
        asked = {"class": [[name.strip()] for name in args.classes.split(",")]}
        if len({name for (name,) in asked["class"]} - {""}) < len(asked["class"]):
            raise UserError(f'--classes "{args.classes}": give different names, with commas')
    else:
        asked = run.config.classes or {"words": None}
    if "words" in asked and not run.objective.has_words:
        raise UserError(f"{args.run} has no classes and no head over words: give it --classes")
    sources = open_named(args.source, run.config.data_root, file)
    features, good, bad = read(run, sources)
    if not good and not bad:
        raise UserError(f"there is no image in {', '.join(args.source)}")
    rows, tables = [], []
    for title, classes in asked.items() if good else ():
        labels = labels_of(good, classes or [])
        names, pairs = [name for name, *_ in classes or ()], []
        found = zip(good, labels, answer(run, features, classes, args.top), strict=True)
        for (name, *_), label, answers in found:
            rows.append({"image": name, "attribute": title, "answers": answers})
            if label:
                rows[-1]["label"] = label
                pairs.append((label, answers[0][0]))
            if label in names:  # a label that is none of the classes is neither right nor wrong
                rows[-1]["right"] = label == answers[0][0]
        tables.append((title, names, pairs))
    write(rows + [{"image": name, "error": str(why)} for name, why in bad], args)
    for title, names, pairs in tables:
        known = [pair for pair in pairs if pair[0] in names]
        if len(known) < len(pairs):
            others = data.describe(Counter(label for label, _ in pairs if label not in names))
            print(f"images with labels that are none of the classes: {others}", file=sys.stderr)
        if known:
            account(title, names, Counter(known), sys.stderr if args.json or args.csv else None)
    if bad:
        kinds = data.describe(Counter(why.kind for _, why in bad))
        said = f"{len(bad)} of {len(good) + len(bad)} images have no answer: {kinds}"
        if not good:
            raise UserError(said)
        print(said, file=sys.stderr)
    return rows
