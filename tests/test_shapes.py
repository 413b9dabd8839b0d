"""Drawn shapes: the same ones every time, and the questions about them."""

from collections import Counter

import numpy as np
import pytest

from data import UserError, load_source
from plugins import shapes
from plugins.shapes import Shapes


def test_shapes_are_the_same_every_time_and_differ_between_splits():
    train, val = Shapes("train"), Shapes("val")
    assert list(train.captions(5)) == [train.raw(i).caption for i in range(5)]
    assert np.array_equal(np.array(train.raw(3).image), np.array(train.raw(3).image))
    assert not np.array_equal(np.array(train.raw(3).image), np.array(val.raw(3).image))
    targets = np.array([train.raw(i).targets for i in range(400)])
    assert all(len(set(targets[:, a])) == 8 for a in range(2))
    image, mask = shapes.draw(shapes.scene_of(3, "train"))
    assert image.size == mask.size and set(np.unique(mask)) == {0, 255}


def test_questions_are_answered_truly_and_change_nothing_else():
    counts = Counter()
    for i in range(400):
        scene = shapes.scene_of(i, "val")
        asked, answer = shapes.question(scene)
        assert shapes.question(shapes.scene_of(i, "val")) == (asked, answer)
        counts[asked] += 1
        if "colour" in asked:
            assert answer in shapes.ATTRIBUTES["colour"][scene["colour"]]
        elif "shape" in asked:
            assert answer in shapes.ATTRIBUTES["shape"][scene["shape"]]
        else:
            where = {"left": scene["x"] < 0.46, "right": scene["x"] > 0.54}
            assert where.get(answer, not any(where.values()))
        other = shapes.scene_of(i, "val")  # without a question
        assert shapes.caption(scene) == shapes.caption(other)
        assert shapes.draw(scene)[0].tobytes() == shapes.draw(other)[0].tobytes()
    assert len(counts) == 3 and min(counts.values()) > 100


def test_questions_have_a_name_of_their_own_and_others_are_refused():
    plain, asking = load_source("shapes", "val"), load_source("shapes:questions", "val")
    assert len(plain) == len(asking) == 4000 and plain.attributes == asking.attributes
    without, asked = plain.raw(7), asking.raw(7)
    scene = shapes.scene_of(7, "val")
    assert (asked.question, asked.caption) == shapes.question(scene)
    assert (without.question, without.caption) == (None, shapes.caption(scene))
    assert asked.image.tobytes() == without.image.tobytes()
    assert next(iter(asking.captions(1))) == " ".join(shapes.question(shapes.scene_of(0, "val")))
    with pytest.raises(UserError, match="shapes:answers: use shapes or shapes:questions"):
        load_source("shapes:answers")
