"""Where the maps of `eval.py words` point: python -m tests.bench_maps RUN, of a run on shapes.

One object: over 500 unseen drawings, how often the patch with the largest share for the first name
of the object's shape ("circle") and colour ("red") is a hit: any pixel of the drawing's mask, 64 px
wide, lies within it. Beside it, what needs no model: the mean share of patches that would be hits,
the one patch that is a hit most often, and the patch whose colour is farthest from the corners'.

Two objects, of another shape and colour, side by side in one drawing, as in no training image: how
often the largest share for a word lies on its own object. Here a map that merely finds what is not
background is right half the time.
"""

import itertools
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import CenterCrop, normalize
from eval import Run, load_run
from plugins import shapes
from plugins.pictures import SHARES, word_weights

IMAGES = 500
ATTRIBUTES = ["shape", "colour"]


def patches(mask: Image.Image, side: int) -> Tensor:
    """Which of side x side patches, [N] bool, contain a pixel of the mask."""
    pixels = torch.from_numpy(np.asarray(mask) > 0)
    rows = torch.arange(len(pixels)) * side // len(pixels)
    hits = torch.zeros(side, side, dtype=torch.int64)
    hits.index_put_((rows[:, None], rows[None, :]), pixels.long(), accumulate=True)
    return (hits > 0).flatten()


def one_object(i: int) -> tuple[dict, Image.Image, Image.Image]:
    """Scene, drawing and mask of sample i, as shapes.Shapes draws it: after its caption."""
    scene = shapes.scene_of(i, "val")
    shapes.caption(scene)
    return scene, *shapes.draw(scene)


def two_objects(i: int) -> tuple[list[dict], Image.Image, list[Image.Image]]:
    """Scenes, drawing and masks of two objects that differ in shape and in colour."""
    first, others = shapes.scene_of(i, "val"), itertools.count(i + IMAGES, IMAGES)
    second = next(
        scene
        for scene in (shapes.scene_of(other, "val") for other in others)
        if all(scene[key] != first[key] for key in ATTRIBUTES)
    )
    rng = np.random.default_rng(i)
    for scene, x in ((first, 0.27), (second, 0.73)):
        scene.update(x=x, y=rng.uniform(0.3, 0.7), radius=0.22)
    (image, mask), (other, other_mask) = shapes.draw(first), shapes.draw(second)
    image.paste(other, mask=other_mask)
    return [first, second], image, [mask, other_mask]


def rate(run: Run, images: Tensor, names: list[str], masks: Tensor, at: str) -> float:
    """Share of images [B, 3, S, S] whose largest share for its name lies in its mask [B, N]."""
    weights = torch.stack([word_weights(run, name) for name in names])  # [B, V]
    shares, _ = SHARES[at](run.model, images, weights)
    return masks.gather(1, shares.argmax(dim=1, keepdim=True)).float().mean().item()


def main(folder: str):
    torch.manual_seed(0)
    run = load_run(Path(folder))
    size = run.config.image_size
    with torch.no_grad():
        side = round(run.model.encoder(torch.zeros(1, 3, size, size)).shape[1] ** 0.5)
    names = {key: [name for name, *_ in shapes.ATTRIBUTES[key]] for key in ATTRIBUTES}

    def tensors(drawings: list[Image.Image]) -> Tensor:
        pixels = np.stack([np.array(CenterCrop(size)(image)) for image in drawings])
        return normalize(torch.from_numpy(pixels).permute(0, 3, 1, 2))

    scenes, drawings, masks = zip(*map(one_object, range(IMAGES)), strict=True)
    images = tensors(drawings)
    masks = torch.stack([patches(mask, side) for mask in masks])
    corners = images[:, :, [0, 0, -1, -1], [0, -1, 0, -1]].median(dim=2).values[:, :, None, None]
    contrast = (images - corners).abs().sum(dim=1, keepdim=True)
    farthest = torch.nn.functional.adaptive_avg_pool2d(contrast, side).flatten(1).argmax(dim=1)
    print(f"one object, {IMAGES} images, {side} x {side} patches    shape  colour")
    for text, value in {
        "chance: patches that would be hits": masks.float().mean(),
        "the best patch for all images": masks.float().mean(dim=0).max(),
        "the patch least like the corners": masks.gather(1, farthest[:, None]).float().mean(),
    }.items():
        print(f"  {text:<42} {value:.3f}   {value:.3f}")
    of = {key: [names[key][scene[key]] for scene in scenes] for key in ATTRIBUTES}
    for at in SHARES:
        hits = [rate(run, images, of[key], masks, at) for key in ATTRIBUTES]
        print(f"  {f'words --at {at}':<42} {hits[0]:.3f}   {hits[1]:.3f}")

    scenes, drawings, masks = zip(*map(two_objects, range(IMAGES)), strict=True)
    images = tensors(drawings)
    masks = [torch.stack([patches(pair[k], side) for pair in masks]) for k in (0, 1)]
    chance = torch.stack(masks).float().mean()
    print(f"two objects, {IMAGES} images, 2 words each; chance {chance:.3f}")
    for at in SHARES:
        hits = []
        for key in ATTRIBUTES:
            own = [[names[key][pair[k][key]] for pair in scenes] for k in (0, 1)]
            both = [rate(run, images, own[k], masks[k], at) for k in (0, 1)]
            hits.append(sum(both) / 2)
        print(f"  {f'words --at {at}':<42} {hits[0]:.3f}   {hits[1]:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
