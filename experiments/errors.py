"""What limits a run on icons: zero-shot by set, pairs confused, and wrong answers to look at.

    python experiments/errors.py pretrained/icons data/icons64
    python experiments/errors.py pretrained/icons data/icons64 --split prompts      held-out icons

Draws 100 wrong answers by chance, with what the icon's name says and what the run said.
"""

import argparse
import random
import tarfile
from collections import Counter
from itertools import chain
from pathlib import Path

import torch
from common import print_table
from icons import Sample, contact_sheet

from data import UserError, load_source
from eval import extract, load_run, top1, zeroshot


def read_icons(folder: Path, split: str) -> list[tuple[str, bytes]]:
    """(key, PNG) of a split's icons, in the order in which their shards are read."""
    icons = []
    for path in sorted(folder.glob(f"{split}-*.tar")):
        with tarfile.open(path) as tar:
            members = [member for member in tar if member.name.endswith(".png")]
            icons += [(m.name.removesuffix(".png"), tar.extractfile(m).read()) for m in members]
    return icons


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("icons", type=Path, help="the folder that icons.py made")
    parser.add_argument("--split", default="val", help="of the labelled ones")
    parser.add_argument("--out", type=Path, default=Path("errors.png"))
    args = parser.parse_args()
    try:
        run, classes = load_run(args.run), str(args.icons / "classes.txt")
        source = load_source(f"{args.icons}/{args.split}-*.tar", "val", class_names=classes)
        features, targets, *_ = extract(run, source)
    except UserError as error:
        parser.error(str(error))
    names, truth = source.attributes["class"], targets[:, 0]
    icons = read_icons(args.icons, args.split)
    scores = zeroshot(run, features, names)
    near = scores.topk(5).indices
    said, hits = near[:, 0], (near == truth[:, None]).any(dim=1)
    single = zeroshot(run, features, [[name] for name in chain(*names)])  # [N, all names]
    best = [each.amax(dim=1) for each in single.split([len(some) for some in names], dim=1)]
    print(f"top-1 {top1(scores, truth):.3f}, top-5 {hits.float().mean():.3f}, ", end="")
    print(f"top-1 by the best of a class's names {top1(torch.stack(best, dim=1), truth):.3f}\n")
    right, all_of = Counter(), Counter()
    for (key, _), hit in zip(icons, said == truth, strict=True):
        name = key.split("_")[0]
        all_of[name] += 1
        right[name] += int(hit)
    share = {name: right[name] / all_of[name] for name in all_of}
    ranked = sorted(share, key=share.get, reverse=True)
    print_table(["set", "icons", "top-1"], [[n, str(all_of[n]), f"{share[n]:.3f}"] for n in ranked])
    wrong = torch.nonzero(said != truth).flatten().tolist()
    pairs = Counter((names[truth[i]][0], names[said[i]][0]) for i in wrong)
    print("\n" + ", ".join(f"{a} as {b} {n}" for (a, b), n in pairs.most_common(20)))
    samples = []
    for i in random.Random(0).sample(wrong, min(100, len(wrong))):
        key, png = icons[i]
        text = f"{key.split('_')[1]}: {names[truth[i]][0]}; said {names[said[i]][0]}"
        samples.append(Sample(key, text, png, None))
    if samples:
        contact_sheet([samples[i : i + 10] for i in range(0, len(samples), 10)]).save(args.out)


if __name__ == "__main__":
    main()
