"""How much of SuperClass's target falls on the tokens that name an image's class.

    python experiments/share.py RUN SOURCE CLASSES

Prints the mean share over 5,000 samples of a source with classes, with the IDF weights that the
run has counted and with equal ones. Captions that do not name their class are left out.
"""

import argparse
from pathlib import Path

import torch
from common import UserError

from data import caption_labels, load_source
from eval import good_batches, load_run, token_bags
from superclass import IDF


def main():
    parser = argparse.ArgumentParser(description="Measure the target's share of the class name.")
    parser.add_argument("run", type=Path)
    parser.add_argument("source")
    parser.add_argument("classes", help="as for --class-names")
    args = parser.parse_args()
    labels, own = [], []
    try:
        run = load_run(args.run, torch.device("cpu"))
        source = load_source(args.source, class_names=args.classes)
        if list(source.attributes) != ["class"]:
            raise UserError(f"{args.source} has no classes")
        names = [
            set().union(*(caption_labels(name, run.tokenizer) for name in aliases))
            for aliases in source.attributes["class"]
        ]
        for batch in good_batches(run, source, 256, limit=5000, reads=()):
            for row, (c,) in zip(batch.labels.tolist(), batch.targets.tolist(), strict=True):
                tokens = [token for token in row if token >= 0]
                named = names[c].intersection(tokens) if c >= 0 else None
                if named:
                    labels.append(tokens)
                    own.append(torch.tensor([token in named for token in tokens]))
    except UserError as error:
        parser.error(str(error))
    if not labels:
        parser.error(f"no caption of {args.source} names its class")
    is_own, equal = torch.cat(own), IDF(len(run.idf.df))  # one that has counted nothing yet
    for weights, idf in (("with IDF", run.idf), ("without", equal)):
        targets = token_bags(idf, labels).coalesce()
        print(f"{weights:<9} {targets.values()[is_own].sum() / len(labels):.3f}")


if __name__ == "__main__":
    main()
