"""Retrieval of captions by images, and of images by captions.

    python eval.py retrieval RUN [--data SPEC]

Letters in shapes:  N images,  M captions.
"""

import torch
from torch import Tensor

from data import UserError
from eval import Run, extract, measure_command, score_bags, token_bags


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


def suits(run: Run, val) -> bool:
    """Whether a run can score captions, and most captions of the data differ from one another."""
    can = run.objective.has_words or hasattr(run.objective, "score_captions")
    texts = list(val.captions(500)) if can else []
    return 2 * len(set(texts)) > len(texts)


def measure(run: Run, val, options: dict) -> list[dict]:
    """The row of `retrieval` among the images of a source and their captions.

    By the objective's `score_captions`, if it has one; otherwise a caption is a bag of tokens and
    scored like a class name.
    """
    own = getattr(run.objective, "score_captions", None)
    if own is None and not run.objective.has_words:
        raise UserError(f"retrieval needs a head over words or a text tower: {run.folder} has none")
    limit = options["limit"] or options.get("pairs")
    features, _, tokens = extract(run, val, limit, options["workers"], captioned=True)
    texts = [tuple(row if own else sorted(set(row))) for row in tokens]
    index = {text: m for m, text in enumerate(sorted(set(texts)))}
    if own:
        scores = own(run, features, list(index))
    else:
        scores = score_bags(run, features, token_bags(run.idf, list(index)))
    row = {"task": "retrieval", "images": len(texts), "captions": len(index)}
    return [row | retrieval(scores, torch.tensor([index[text] for text in texts]))]


def main(argv: list[str]):
    measure_command(["retrieval", *argv])
