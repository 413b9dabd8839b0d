"""The questions that shapes draws."""

from collections import Counter

import shapes


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
