"""How much of SuperClass's target falls on the tokens that name an image's class.

    python experiments/share.py RUN SOURCE CLASSES

Prints the mean share over 5,000 captions of a source with classes, with the IDF weights that the
run has counted and with equal ones. Captions that do not name their class are left out.
"""

import argparse
from itertools import chain
from pathlib import Path

import common as common  # makes the programs importable
import torch

from eval import token_bags
from run import load_run
from sources import load_source, read_caption
from superclass import IDF
from tokenizer import caption_labels


def main():
    parser = argparse.ArgumentParser(description="Measure the target's share of the class name.")
    parser.add_argument("run", type=Path)
    parser.add_argument("source")
    parser.add_argument("classes", help="as for --class-names")
    args = parser.parse_args()
    run = load_run(args.run, torch.device("cpu"))
    source = load_source(args.source, class_names=args.classes)
    names = [
        {token for name in aliases for token in caption_labels(name, run.tokenizer)}
        for aliases in source.attributes["class"]
    ]
    labels, own = [], []
    for _, raw in chain(*source.once(0, 1, 256, 5000)):
        tokens = caption_labels(read_caption(raw.caption), run.tokenizer)
        if named := names[raw.targets[0]].intersection(tokens):
            labels.append(tokens)
            own.append(torch.tensor([token in named for token in tokens]))
    is_own, equal = torch.cat(own), IDF(len(run.idf.df))  # one that has counted nothing yet
    for weights, idf in (("with IDF", run.idf), ("without", equal)):
        targets = token_bags(idf, labels).coalesce()
        print(f"{weights:<9} {targets.values()[is_own].sum() / len(labels):.3f}")


if __name__ == "__main__":
    main()
