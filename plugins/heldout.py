"""The objective's own loss on held-out data, and the scores that a run takes of itself.

    python eval.py loss RUN [--data SPEC] [--limit N]
    python train.py --eval-every STEPS ...

A loss that compares the images of a batch is measured in batches of the run's size, 1,024 at most.
"""

import sys

import torch

import eval as evaluation
from data import UserError, normalize
from eval import OWN_WAYS, Run, measure_command
from plugins import find

PROBE_IMAGES = 10_000  # training images for the probe while training; eval.py takes all
PAIRS = 2_000  # of the validation data for the loss and retrieval, and for all between the ends


def suits(run: Run, val) -> bool:
    """Whether the data has what the objective learns from."""
    if run.objective.captions:
        return any(True for _ in val.captions(100))
    return list(val.attributes.values()) == list(run.config.classes.values())


@torch.no_grad()  # without gradients, no loss waits for other processes
def measure(run: Run, val, options: dict) -> list[dict]:
    """The row of `loss`: the mean over the images, in float32, with training's weights of tokens.

    Before any caption was counted all tokens weigh the same.
    """
    if not suits(run, val):
        raise UserError(f"{val} lack what --objective {run.config.objective} learns from")
    whole, B = run.objective.whole_batch, min(run.config.batch_size, 1024)
    weights = run.idf.weights()
    if run.config.no_idf or run.idf.n == 0:
        weights = torch.ones_like(weights)
    size = B if whole else evaluation.BATCH
    limit = options["limit"] or options.get("pairs")
    reads = run.objective.reads if run.objective.captions else None
    total = images = 0
    for batch in evaluation.good_batches(run, val, size, limit, options["workers"], reads):
        outputs = run.model(normalize(batch.images), **batch.reads)
        total += run.objective.loss(outputs, batch, weights).item() * len(batch.images)
        images += len(batch.images)
    row = {"task": "loss", "images": images, "val_loss": total / images}
    return [row | ({"batch": B} if whole else {})]


def own_scores(run: Run, train, val, is_end: bool) -> list[dict]:
    """Rows of what a run that trains measures: its loss, and its objective's tasks that suit.

    Classifiers are fitted only where `is_end`, before and after training. What fails is reported.
    """

    def is_due(task: str) -> bool:
        if evaluation.fitted(task):
            return is_end and train.attributes == val.attributes
        ask = None if task in OWN_WAYS else find("task", task, "suits")
        return not ask or ask(run, val)

    tasks = [task for task in ("loss", *run.objective.tasks) if is_due(task)]
    of_classes = [task for task in tasks if task in OWN_WAYS or evaluation.fitted(task)]
    groups = [[task] for task in tasks if task not in of_classes]
    if of_classes and (val.attributes or not groups):
        groups.append(of_classes)
    options, found = {"workers": run.config.workers, "pairs": PAIRS}, []
    for tasks in groups:
        limit = PROBE_IMAGES if any(map(evaluation.fitted, tasks)) else None if is_end else PAIRS
        try:
            found += evaluation.measure(tasks, run, train, val, limit=limit, **options)
        except UserError as error:  # not a reason to lose the run
            print(f"no {tasks[0]} after {run.step:,} steps: {error}", file=sys.stderr)
    return found


def main(argv: list[str]):
    measure_command(["loss", *argv])
