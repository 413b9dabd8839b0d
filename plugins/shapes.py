"""Drawn pictures of coloured shapes with free-text captions: the default data, and nothing stored.

    --data shapes               captions; they use synonyms, leave attributes out and add irrelevant
                                words, and one in twenty is about another image
    --data shapes:questions     questions, and answers for captions

They stand in for image-text pairs from the web. Sample i of a split never changes.
"""

import math
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageDraw

from data import Pairs, Raw, UserError

LENGTHS = {"train": 100_000, "val": 4_000}
SHAPES = {
    "circle": ["circle", "disc", "ball"],
    "square": ["square", "block"],
    "triangle": ["triangle", "pyramid"],
    "star": ["star", "asterisk"],
    "cross": ["cross", "plus sign"],
    "ring": ["ring", "hoop", "donut"],
    "heart": ["heart", "valentine"],
    "moon": ["moon", "crescent"],
}
COLOURS = {
    (214, 30, 36): ["red", "crimson"],
    (250, 140, 10): ["orange", "tangerine"],
    (248, 226, 40): ["yellow", "golden"],
    (30, 158, 54): ["green", "emerald"],
    (30, 76, 220): ["blue", "azure"],
    (138, 40, 178): ["purple", "violet"],
    (248, 248, 248): ["white", "snowy"],
    (14, 14, 14): ["black", "dark"],
}
OPENINGS = ["a photo of", "picture of", "this is", "look at", "here is", "i saw", "image of"]
OPENINGS += ["we made", "my new", ""]
ENDINGS = ["free download", "for sale", "on a plain wall", "click here", "stock image"]
ENDINGS += ["best price"]
SIZES = ["small", "little", "tiny"], ["big", "large", "huge"]
SIDES = {"left": "on the left", "right": "on the right", "middle": "in the middle"}

ATTRIBUTES = {"shape": list(SHAPES.values()), "colour": list(COLOURS.values())}


class Shapes(Pairs):
    """Pictures of a coloured shape, drawn when needed, with captions or questions and answers."""

    attributes, has_splits = ATTRIBUTES, True

    def __init__(self, split: str, asks: bool = False):
        self.split, self.asks = split, asks

    def __len__(self) -> int:
        return LENGTHS[self.split]

    def raw(self, i: int) -> Raw:
        scene, asked = scene_of(i, self.split), None
        text = caption(scene)  # always made: the picture's random numbers come after it
        if self.asks:
            asked, text = question(scene)
        return Raw(draw(scene)[0], text, (scene["shape"], scene["colour"]), asked)

    def captions(self, limit: int) -> Iterator[str]:
        scenes = (scene_of(i, self.split) for i in range(min(limit, len(self))))
        return (" ".join(question(s)) if self.asks else caption(s) for s in scenes)


def open_source(arg: str, split: str, root: str, class_names: list | None) -> Shapes:
    if arg not in ("", "questions"):
        raise UserError(f"--data shapes:{arg}: use shapes or shapes:questions")
    return Shapes(split, asks=bool(arg))


def pick(rng: np.random.Generator, options: list):
    """One of the options; all are equally likely."""
    return options[int(rng.integers(len(options)))]


def scene_of(i: int, split: str) -> dict:
    """What sample i shows: what its picture and its caption have in common.

    Size, place and turn vary little enough for a small ViT to learn the shapes in minutes.
    """
    rng = np.random.default_rng((i, split != "train"))
    shape, colour = rng.integers(8, size=2).tolist()
    radius = rng.uniform(0.32, 0.42)  # like x and y, as a part of the image's side
    x, y = rng.uniform(0.42, 0.58, size=2)
    side = "left" if x < 0.46 else "right" if x > 0.54 else "middle"
    scene = {"rng": rng, "i": i, "split": split, "shape": shape, "colour": colour, "side": side}
    return scene | {"radius": radius, "x": x, "y": y}


def caption(scene: dict) -> str:
    """A caption from a small grammar in which most parts may be missing."""
    rng = scene["rng"]
    if rng.random() < 0.05:  # it is about another image
        scene = scene_of(int(rng.integers(LENGTHS[scene["split"]])), scene["split"])
    words = [pick(rng, OPENINGS), pick(rng, ["a", "the", "one", "some"])]
    if rng.random() < 0.4:
        words.append(pick(rng, SIZES[scene["radius"] > 0.37]))
    if rng.random() < 0.85:
        words.append(word(rng, ATTRIBUTES["colour"][scene["colour"]]))
    shape = word(rng, ATTRIBUTES["shape"][scene["shape"]])
    words.append(shape if rng.random() < 0.85 else "thing")
    if rng.random() < 0.3:
        words.append(SIDES[scene["side"]])
    if rng.random() < 0.4:
        words.append(pick(rng, ENDINGS))
    if rng.random() < 0.2:
        words.append(f"img_{rng.integers(1000, 9999)}.jpg")
    return " ".join(word for word in words if word)


def question(scene: dict) -> tuple[str, str]:
    """A question about the picture and its answer, one word, which is always right."""
    shape, colour = (ATTRIBUTES[name][scene[name]][0] for name in ("shape", "colour"))
    questions = [("what shape is this?", shape), ("what colour is it?", colour)]
    questions.append(("on which side is it?", scene["side"]))
    rng = np.random.default_rng((scene["i"], scene["split"] != "train", 1))  # leaves scene's alone
    return pick(rng, questions)


def word(rng: np.random.Generator, names: list[str]) -> str:
    """The first name more often than its synonyms."""
    return names[0] if rng.random() < 0.6 else pick(rng, names[1:])


def draw(scene: dict, side: int = 64) -> tuple[Image.Image, Image.Image]:
    """The picture, side x side pixels, and the mask of its object (0 or 255)."""
    rng, (x, y, r) = scene["rng"], (scene[key] * side for key in ("x", "y", "radius"))
    turn = rng.uniform(-0.3, 0.3)  # radians
    c, s = r * math.cos(turn), r * math.sin(turn)
    mask = Image.new("L", (side, side))
    for outline, fill in OUTLINES[list(SHAPES)[scene["shape"]]]:
        points = [(x + c * u - s * v, y + s * u + c * v) for u, v in outline]
        ImageDraw.Draw(mask).polygon(points, fill=fill)
    background = rng.uniform(85, 175) + rng.uniform(-22, 22, size=3)
    colour = list(COLOURS)[scene["colour"]] + rng.uniform(-18, 18, size=3)
    image = Image.new("RGB", (side, side), tuple(background.astype(int).tolist()))
    image.paste(tuple(colour.clip(0, 255).astype(int).tolist()), mask=mask)
    return image, mask


def around(radii: list[float], x: float = 0.0, y: float = 0.0) -> list[tuple[float, float]]:
    """Corners at these distances from (x, y), at equal angles, clockwise from the top."""
    turns = [(r, 2 * math.pi * k / len(radii)) for k, r in enumerate(radii)]
    return [(x + r * math.sin(a), y - r * math.cos(a)) for r, a in turns]


def heart(points: int) -> list[tuple[float, float]]:
    """A well-known curve: x = 16 sin^3 t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t."""
    turns = [2 * math.pi * k / points for k in range(points)]
    height = [sum(w * math.cos(n * t) for n, w in enumerate((13, -5, -2, -1), 1)) for t in turns]
    return [(math.sin(t) ** 3, -y / 16) for t, y in zip(turns, height, strict=True)]


# Polygons around (0, 0) in radii, y downwards, each painted (255) or cut out (0) in this order.
DISC = around([1.0] * 40)
OUTLINES = {
    "circle": [(DISC, 255)],
    "square": [([(-0.78, -0.78), (0.78, -0.78), (0.78, 0.78), (-0.78, 0.78)], 255)],
    "triangle": [([(0, -1), (0.95, 0.75), (-0.95, 0.75)], 255)],
    "star": [(around([1.0, 0.4] * 5), 255)],
    "cross": [
        ([(-0.28, -1), (0.28, -1), (0.28, 1), (-0.28, 1)], 255),
        ([(-1, -0.28), (1, -0.28), (1, 0.28), (-1, 0.28)], 255),
    ],
    "ring": [(DISC, 255), (around([0.55] * 40), 0)],
    "heart": [(heart(40), 255)],
    "moon": [(DISC, 255), (around([0.8] * 40, x=0.55, y=-0.15), 0)],
}
