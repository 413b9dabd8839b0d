"""Captions and answers from encoders of different objectives, by a small language model.

    python experiments/captions.py shapes --seeds 1 2
    python experiments/captions.py icons --seeds 1 2 --samples 76800

A language model learns on each encoder, locked, from the same images: SuperClass, CLIP, supervised,
and one without training. They come in another order than the encoder's of the same seed. Captions
of shapes are scored against five of the same scene, those of icons of unseen sets against the
designer's. On shapes CLIP has the best of four learning rates and the others train.py's own; on
icons each has the best of its sweep. The rows below the encoders say what the scores are worth:
what another caption of the scene reaches, the right words in one template, the most frequent answer
to each question or caption of an icon, and the designer's caption itself. The command can be
stopped and repeated; it goes on where it was.
"""

import argparse
import json
from collections import Counter
from pathlib import Path

from common import cell, finished, print_table, read_jsonl, train_all
from compare import FLAGS, ICONS, PLACE, choose_rates, run_of

from plugins import shapes
from plugins.caption import cider

OBJECTIVES = ("superclass", "clip", "supervised", "untrained")
PREFIXES = {"patches": "caption", "pooled": "clipcap"}  # the objective of each
TASKS = {"captions": "shapes", "answers": "shapes:questions"}
QUESTIONS = {"what shape is this?": "shape", "what colour is it?": "colour"}
QUESTIONS |= {"on which side is it?": "side"}
# CLIP's on shapes; 4e-4, this, 1.5e-3, 3e-3 give 0.954, 0.968, 0.943, 0.735 by probe (seed 1).
RATE = "7.5e-4"
SHARED = ["--workers", "1", "--precision", "fp32", "--no-first-eval"]
SAMPLES = 307_200  # images that an encoder of icons sees
SCENES, CAPTIONS = 500, 5


def write_references(folder: Path) -> Path:
    """A table of unseen scenes, each with five captions; beside it, others to compare with them."""
    table = folder / "references.jsonl"
    if table.exists():
        return table
    folder.mkdir(parents=True, exist_ok=True)
    rows, others = [], []
    for i in range(SCENES):
        scene = shapes.scene_of(i, "val")
        *texts, other = (shapes.caption(scene) for _ in range(CAPTIONS + 1))
        shapes.draw(scene)[0].save(folder / f"{i}.png")
        rows += [{"filepath": f"{i}.png", "caption": text} for text in texts]
        colour, shape = (shapes.ATTRIBUTES[key][scene[key]][0] for key in ("colour", "shape"))
        right = f"a photo of the {colour} {shape}"
        others.append({"other": other, "right": right, "references": texts})
    (folder / "others.jsonl").write_text("".join(json.dumps(row) + "\n" for row in others))
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def encoders_of(data: str, seed: str, rates: dict) -> tuple[dict[str, Path], dict[Path, list[str]]]:
    """The folder of each objective's encoder, and the command lines of those to train."""
    untrained = ["--samples", "256", "--lr", "0", "--seed", seed]
    if data == "icons":
        own = dict(run_of(name, rates, SAMPLES, int(seed)) for name in rates)
        folders = dict(zip(rates, own, strict=True)) | {"untrained": PLACE / f"untrained-{seed}"}
        return folders, own | {folders["untrained"]: [*FLAGS, *untrained]}
    folders = {name: Path(f"runs/captions/{name}-{seed}") for name in OBJECTIVES}
    own = {n: ["--objective", n, "--seed", seed] for n in OBJECTIVES} | {"untrained": untrained}
    own["clip"] += ["--lr", RATE]
    return folders, {folders[name]: [*SHARED, *own[name]] for name in OBJECTIVES}


def main():
    parser = argparse.ArgumentParser(description="Compare encoders through a language model.")
    parser.add_argument("data", choices=("shapes", "icons"))
    parser.add_argument("--seeds", nargs="+", default=["1", "2"])
    parser.add_argument("--samples", default="38400")
    args = parser.parse_args()
    place, references = Path("runs/captions"), f"{ICONS}/val-*.tar"
    tasks = TASKS if args.data == "shapes" else {"icons": f"{ICONS}/train-*.tar"}
    if args.data == "shapes":
        references = str(write_references(place / "references"))

    encoders, readers, rates = {}, {}, {}
    if args.data == "icons":
        rates = choose_rates(list(OBJECTIVES[:3]), jobs=2)
    for seed in args.seeds:
        folders, own = encoders_of(args.data, seed, rates)
        encoders |= own
        for name, encoder in folders.items():
            for prefix, objective in PREFIXES.items():
                for task, data in tasks.items():
                    val = ["--val-data", references] if task != "answers" else []
                    readers[place / f"{name}-{prefix}-{task}-{seed}"] = [
                        *(FLAGS if args.data == "icons" else SHARED), "--data", data, *val,
                        "--objective", objective, "--init", str(encoder),
                        "--samples", args.samples, "--batch-size", "128",
                        "--seed", str(int(seed) + 100),
                    ]  # fmt: skip
    train_all(encoders)
    train_all(readers)
    print_scores(args.data, args.seeds, place, tasks)


def print_scores(data: str, seeds: list[str], place: Path, tasks: dict):
    """The table: a row for each encoder and prefix, then what the scores are worth."""
    columns, rows = ["CIDEr", *(["exact"] if data == "icons" else QUESTIONS.values())], []
    for name in OBJECTIVES:
        for prefix in PREFIXES:
            runs = [[place / f"{name}-{prefix}-{t}-{seed}" for seed in seeds] for t in tasks]
            scores = [finished(run)[1] for run in runs[0]]
            line = [cell([score["cider"] for score in scores])]
            if data == "shapes":
                found = [right_answers(run) for run in runs[1]]
                line += [cell([shares[question] for shares, _ in found]) for question in QUESTIONS]
            else:
                line += [cell([score["exact"] for score in scores])]
            rows.append([name, prefix, str(len(seeds)), *line])
    if data == "shapes":
        others = read_jsonl(place / "references" / "others.jsonl")
        references = [row["references"] for row in others]
        for name, key in (("another caption", "other"), ("the right words, one template", "right")):
            value = cider([row[key] for row in others], references)
            rows.append([name, "", "", f"{value:.3f}", "", "", ""])
        _, constant = right_answers(place / f"superclass-patches-answers-{seeds[0]}")
        line = [f"{constant[question]:.3f}" for question in QUESTIONS]
        rows.append(["the most frequent answer", "", "", "", *line])
    else:
        texts = read_jsonl(place / f"superclass-patches-icons-{seeds[0]}" / "captions.jsonl")
        references = [text["references"] for text in texts]
        own = [first for first, *_ in references]
        constant = Counter(own).most_common(1)[0][0]
        for name, said in (
            ("the designer's caption", own),
            (f'"{constant}"', [constant] * len(own)),
        ):
            exact = sum(text in right for text, right in zip(said, references, strict=True))
            line = f"{cider(said, references):.3f}", f"{exact / len(own):.3f}"
            rows.append([name, "", "", *line])
    print_table(["encoder", "prefix", "seeds", *columns], rows)


def right_answers(run: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The share of right answers to each question; and that of its most frequent answer."""
    found = {question: [] for question in QUESTIONS}
    for row in read_jsonl(run / "captions.jsonl"):
        found[row["question"]].append((row["generated"], row["references"][0]))
    shares, constant = {}, {}
    for question, pairs in found.items():
        shares[question] = sum(answer == right for answer, right in pairs) / len(pairs)
        constant[question] = max(Counter(right for _, right in pairs).values()) / len(pairs)
    return shares, constant


if __name__ == "__main__":
    main()
