"""Training on a source's own classes: a ceiling for the others, and fine-tuning (Table 12).

    --objective supervised [--init RUN]

Letters in shapes:  B images, A attributes, C classes of all attributes together.
"""

import torch.nn.functional as F
from torch import Tensor, nn

import superclass
from data import UserError
from superclass import SuperClass


def supervised_loss(logits: Tensor, targets: Tensor, sizes: list[int]) -> Tensor:
    """Cross-entropy on a source's own classes, the mean over its attributes.

    Args:
        logits: [B, C], the classes of all attributes side by side.
        targets: [B, A], a class for each attribute; -1 where there is no label: zero loss.
        sizes: the number of classes of each attribute; they sum to C.
    """
    losses = [
        F.cross_entropy(x, y, ignore_index=-1, reduction="sum") / len(x)
        for x, y in zip(logits.float().split(sizes, dim=1), targets.T, strict=True)
    ]
    return sum(losses) / len(losses)


class Objective(superclass.Objective):
    """A head with one output for each class of each attribute, side by side."""

    tasks = ("head", "probe", "fewshot")
    weighted, has_words, captions = False, False, False

    def check(self, config, source):
        if not source.attributes:
            raise ValueError(f"--objective supervised: {config.data} has no classes to train on")
        classes = list(source.attributes.values())
        if any(names in classes[:a] for a, names in enumerate(classes)):  # see `classify`
            raise ValueError("--objective supervised: two attributes have the same class names")

    def build(self, encoder: nn.Module, config) -> nn.Module:
        return SuperClass(encoder, sum(map(len, config.classes.values())))

    def loss(self, outputs: Tensor, batch, weights: Tensor) -> Tensor:
        sizes = list(map(len, self.config.classes.values()))
        return supervised_loss(outputs, batch.targets, sizes)

    def classify(self, run, features: Tensor, texts: list[list[str]]) -> Tensor:
        """The outputs [N, C] for the attribute whose classes have these names."""
        classes = list(self.config.classes.values())
        if texts not in classes:
            raise UserError("a supervised run knows only its own classes, and takes no --prompt")
        scores = run.model.head(run.model.norm(features.to(run.idf.df.device))).float().cpu()
        return scores.split(list(map(len, classes)), dim=1)[classes.index(texts)]
