"""The supervised objective: its loss, and the scores that each attribute has from its outputs."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import eval as evaluation
from data import Source, UserError
from plugins.supervised import Objective, supervised_loss
from superclass import IDF, SuperClass, ViT

CLASSES = {"shape": [["a"], ["b"]], "colour": [["c", "see"], ["d"], ["e"]]}


def test_supervised_loss_is_the_mean_over_attributes(on_device):
    logits, targets = torch.randn(4, 5), torch.tensor([[0, 1], [1, 2], [1, -1], [0, 0]])
    known = F.cross_entropy(logits[[0, 1, 3], 2:], targets[[0, 1, 3], 1]) * 3 / 4
    expected = (F.cross_entropy(logits[:, :2], targets[:, 0]) + known) / 2
    torch.testing.assert_close(supervised_loss(logits, targets, [2, 3]), expected)


@pytest.fixture
def run(device):
    torch.manual_seed(0)
    config = Namespace(objective="supervised", loss="softmax", classes=CLASSES)
    model = SuperClass(ViT(16, 8, 32, 1, 2), 5).to(device)
    idf = IDF(300).to(device)
    return evaluation.Run(None, config, evaluation.open_objective(config), None, model, idf, 0)


def test_each_attribute_is_scored_by_its_own_outputs(run, device):
    features = torch.randn(5, 32)
    with torch.no_grad():
        logits = run.model.head(run.model.norm(features.to(device))).cpu()
    for names, columns in zip(CLASSES.values(), (slice(0, 2), slice(2, 5)), strict=True):
        scores = evaluation.classify(run, "head", names, features, None)
        torch.testing.assert_close(scores, logits[:, columns])


def test_other_classes_and_prompts_are_refused(run):
    for names, prompts in (([["a"], ["x"]], None), (CLASSES["shape"], ["a photo of {}"])):
        with pytest.raises(UserError, match="only its own classes"):
            evaluation.classify(run, "head", names, torch.randn(5, 32), prompts)


def test_attributes_that_cannot_be_told_apart_are_refused():
    source, config = Source(), Namespace(data="faces")
    with pytest.raises(ValueError, match="faces has no classes"):
        Objective().check(config, source)
    source.attributes = {"smiles": [["no"], ["yes"]], "age": [["old"], ["young"]]}
    Objective().check(config, source)
    source.attributes |= {"glasses": [["no"], ["yes"]]}
    with pytest.raises(ValueError, match="the same class names"):
        Objective().check(config, source)
