"""What is looked at rather than measured: words on pixels, search, curves, a source's data.

    python show.py words RUN [IMAGE ...] [--data SPEC] [--word "red circle"] [--lift]
    python show.py search RUN "a red star" [TEXT ...] --data SPEC
    python show.py curves RUN [RUN ...]
    python show.py scaling RUN [RUN ...]
    python show.py data SPEC

Each command draws one PNG (--out); `words`, `search` and `data` print their figures with --json.
Runs and sources are read and never changed; the features that `search` needs are kept in the user's
cache.

Letters in the shapes:  B images, N patches, S image size, D width, V vocabulary, Q texts.
"""

import argparse
import contextlib
import functools
import hashlib
import itertools
import json
import math
import os
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter as HelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from data import (
    BUILT_IN,
    KINDS,
    Augment,
    BadSample,
    CenterCrop,
    Files,
    OnePass,
    Prepare,
    Raw,
    Shards,
    batches,
    count_bad,
    load_source,
    normalize,
    open_folder,
    open_image,
    read_caption,
    refuse_if_bad,
    tell_skipped,
)
from eval import (
    COSTS,
    Run,
    finished,
    load_run,
    mean_and_deviation,
    natural,
    own_rows,
    pick_device,
    positive,
    read_checkpoint,
    read_config,
    read_jsonl,
    refuse_if_different,
    task_name,
    token_bags,
)
from shares import SHARES
from superclass import IDF
from tokenizer import (
    ClipTokenizer,
    UserError,
    WordTokenizer,
    caption_labels,
    caption_tokens,
    load_tokenizer,
)

# ------------------------------------------------------------------------------------------------
# Words.


class Word(NamedTuple):
    """One word of an image: its tokens, its probability, and that over its frequency."""

    text: str
    ids: list[int]
    probability: float
    lift: float


def load(folder: Path, device: str) -> Run:
    """The run; UserError when it has no head over a vocabulary."""
    objective = read_config(folder).get("objective")
    if objective != "superclass":
        raise UserError(
            f"{folder} has no head over a vocabulary, for its objective is {objective}: words and "
            "search need a run of --objective superclass"
        )
    return load_run(folder, pick_device(device))


def word_weights(run: Run, text: str, ids: list[int] | None = None) -> Tensor:
    """Weights [V], summing to one, of the tokens `ids`, by default a text's, by their IDF.

    Raises UserError when no token of the text is known.
    """
    weights = token_bags(run.idf, [ids or caption_labels(text, run.tokenizer)]).to_dense()[0]
    if ids and not weights.any():  # they are in every caption
        weights[ids] = 1 / len(ids)
    if not weights.any():
        raise UserError(
            f"'{text}' has no token that says anything: each was in no caption of the training, or "
            "in all of them"
        )
    return weights.to(run.idf.df.device)


def probabilities(run: Run, logits: Tensor) -> Tensor:
    """Softmax; for the losses that ask about each token by itself, the sigmoid."""
    softmax = run.config.get("loss", "softmax") == "softmax"
    return logits.float().softmax(dim=-1) if softmax else logits.float().sigmoid()


def top_words(run: Run, logits: Tensor, number: int, lift: bool = False) -> list[Word]:
    """The `number` best words for an image's logits [V]: by probability, or by lift.

    Two or three tokens become one word when, put together, they are a word that the tokenizer cuts
    into these very tokens, and their probabilities and frequencies lie within a factor of two: a
    guess, for a bag has no order. The word gets the geometric mean.

    Lift is probability over frequency, the share of captions with the token. By lift, tokens less
    than a tenth as probable as the best are left out, for theirs would be noise.
    """
    p, idf = probabilities(run, logits).cpu(), run.idf
    frequency = (idf.df / idf.n.clamp(min=1)).cpu()
    seen = frequency > 0 if idf.n else torch.ones_like(p, dtype=torch.bool)
    value = (p / frequency) * (p > p.max() / 10) if lift else p
    value = value.masked_fill(~seen, 0)
    pool = value.argsort(descending=True)[: 4 * number].tolist()
    words, used = [], set()
    for token in pool:
        if token in used or len(words) == number or not value[token]:
            continue
        far = torch.maximum((p / p[token]).log().abs(), (frequency / frequency[token]).log().abs())
        near = [t for t in pool if t not in used and far[t] <= math.log(2)][:8]
        several = (list(ids) for n in (3, 2) for ids in itertools.permutations(near, n))
        joined = (ids for ids in several if token in ids and is_word(ids, run.tokenizer))
        ids = next(joined, [token])
        used |= set(ids)
        mean, usual = (x[ids].log().mean().exp().item() for x in (p, frequency))
        text = spell(ids, run.tokenizer)
        words.append(Word(text, ids, mean, mean / usual if usual else 0.0))
    return words


def is_word(ids: list[int], tokenizer) -> bool:
    """Whether these tokens, in this order, are how the tokenizer cuts one word of letters."""
    text = tokenizer.decode(ids).strip()
    letters = text.replace("-", "").replace("'", "")
    return letters.isalpha() and caption_tokens(text, tokenizer) == ids


def spell(ids: list[int], tokenizer) -> str:
    """Tokens as text, with a hyphen where a piece of a word is cut off."""
    text = tokenizer.decode(ids)
    if not text.strip():
        return "(blank)"
    if isinstance(tokenizer, WordTokenizer) or caption_tokens(text, tokenizer) == ids:
        return text.strip()
    if isinstance(tokenizer, ClipTokenizer):
        return text.strip() + ("" if text.endswith(" ") else "-")
    return text.strip() if text[0] == " " or not text[0].isalpha() else f"-{text}"


# ------------------------------------------------------------------------------------------------
# Drawing.

PAGE, MARGIN, TILE, TOP = 900, 16, 160, 62  # pixels; below TOP comes what is not title
INK, GREY = (33, 37, 41), (105, 112, 120)
AGAINST, FOR = (0, 114, 178), (213, 94, 0)  # Okabe and Ito's blue and orange, for all eyes


# The font that comes with Pillow has no letter beyond ASCII; these are Linux's, macOS's, Windows's.
FONTS = ("DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


@functools.cache
def font_of(size: int, ascii: bool) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or for other scripts the first of FONTS that is installed, if any is."""
    for name in () if ascii else FONTS:
        with contextlib.suppress(OSError):
            return ImageFont.truetype(name, size)
    return ImageFont.load_default(size)


def write(draw, x: float, y: float, text: str, size=13, colour=INK, width=PAGE, lines=1):
    """Write text, wrapped to `lines` lines of `width` pixels; what is too long ends in dots."""
    font, words = font_of(size, text.isascii()), text[: 500 * lines].split()  # more never fits
    for n in range(lines):
        line = words.pop(0) if words else ""
        while words and (n == lines - 1 or font.getlength(f"{line} {words[0]}") <= width):
            line += " " + words.pop(0)
        if font.getlength(line) > width:
            while line and font.getlength(line + "...") > width:
                line = line[:-1]
            line += "..."
        draw.text((x, y + n * 16), line, fill=colour, font=font)


def page(height: int, title: str, subtitle: str) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (PAGE, height), "white")
    draw = ImageDraw.Draw(image)
    write(draw, MARGIN, 9, title, 18, width=PAGE - 2 * MARGIN - 280)  # there is the legend
    write(draw, MARGIN, 34, subtitle, 13, GREY, width=PAGE - 2 * MARGIN)
    return image, draw


def tint(grey: np.ndarray | int, value: np.ndarray) -> Image.Image:
    """Colour a grey picture [h, w, 3] by values [h, w] from -1 to 1: blue against, orange for."""
    colour = np.where(value[..., None] < 0, AGAINST, FOR)
    opacity = 0.85 * np.abs(value)[..., None] ** 0.8
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).round().astype(np.uint8))


def heat_map(picture: Image.Image, shares: Tensor) -> Image.Image:
    """Shares [N] over a pale grey picture; the strongest has full colour."""
    side = math.isqrt(len(shares))
    value = (shares / shares.abs().max().clamp(min=1e-12)).reshape(side, side).numpy()
    value = Image.fromarray(value).resize(picture.size, Image.Resampling.NEAREST)
    return tint(150 + 0.4 * np.asarray(picture.convert("L").convert("RGB")), np.asarray(value))


def contact_sheet(
    title: str, subtitle: str, rows: list[tuple[str, list]], below: int = 0, columns: int = 6
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """Rows of pictures, each with text below it: two lines of each of its texts.

    Args:
        rows: a heading ("" for none) and its pictures, as (picture, [(text, colour), ...]).
        below: pixels to leave free at the end.
    """
    step = (PAGE - 2 * MARGIN + 10) // columns
    pieces = [(head if not i else "", tiles[i : i + columns])
              for head, tiles in rows for i in range(0, len(tiles), columns)]  # fmt: skip
    deep = step + 8 + 32 * max((len(texts) for _, tiles in pieces for _, texts in tiles), default=0)
    heights = [deep + 26 * bool(head) for head, _ in pieces]
    image, draw = page(TOP + sum(heights) + below, title, subtitle)
    for i, (head, tiles) in enumerate(pieces):
        y = TOP + sum(heights[: i + 1]) - deep
        write(draw, MARGIN, y - 26, head, 16, width=PAGE - 2 * MARGIN)
        for column, (picture, texts) in enumerate(tiles):
            x = MARGIN + column * step
            image.paste(picture.resize((step - 10, step - 10), Image.Resampling.BICUBIC), (x, y))
            for j, (text, colour) in enumerate(texts):
                write(draw, x, y + step - 6 + 32 * j, text, 13, colour, step - 12, lines=2)
    return image, draw


def save(image: Image.Image, path: Path):
    try:
        image.save(path, "PNG", optimize=True)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from None


# ------------------------------------------------------------------------------------------------
# Samples to look at.


class Sample(NamedTuple):
    """A picture for the page, the model's view of it (uint8 [3, S, S]), its caption or file."""

    picture: Image.Image
    view: Tensor
    name: str


def look(raw: Raw | BadSample, size: int) -> Sample | BadSample:
    """A sample, with the centre crop that evaluation takes."""
    try:
        if isinstance(raw, BadSample) or raw.image is None:
            return raw if isinstance(raw, BadSample) else BadSample("missing image").of(raw)
        picture = CenterCrop(TILE)(open_image(raw.image))
        view = torch.from_numpy(np.array(CenterCrop(size)(open_image(raw.image)))).permute(2, 0, 1)
        name = raw.image.name if isinstance(raw.image, Path) else ""
        return Sample(picture, view, name if raw.caption is None else read_caption(raw.caption))
    except BadSample as error:
        return error.of(raw)


def gather(source, number: int | None, make: Callable) -> list:
    """What `make` makes of `number` samples, evenly spaced where it can be; bad ones are told."""
    items = [item for block in source.once(make, 0, 1, 256, number) for item in block]
    bad = [item for item in items if isinstance(item, BadSample)]
    counted = count_bad(bad)
    found = f"{tell_skipped(counted['skipped'])} ({'; '.join(counted['examples'].values())})"
    if len(bad) == len(items):
        raise UserError(
            f"no image found, of {len(items)} files or samples none can be used: {found}"
        )
    if bad:
        print(f"skipped {found}", file=sys.stderr)
    return items


def open_files(paths: list[Path]) -> Files:
    """The source of some image files, and of all images in some folders."""
    rows = []
    for path in paths:
        if path.is_dir():
            rows += [(row[0], None, None) for row in open_folder(path, None).rows if row[0]]
        elif path.is_file():
            rows.append((path, None, None))
        else:
            raise UserError(f"no image found: there is no file or folder {path}")
    return Files(rows, None)


def open_source(args: argparse.Namespace, config: dict):
    """The source that --data names, or else the one that a run is evaluated on."""
    data = args.data or config["val_data"] or config["data"]
    names = args.class_names or (None if args.data else config["class_names"])
    return load_source(data, args.split, args.data_root or config["data_root"], names)


# ------------------------------------------------------------------------------------------------
# show.py words


def show_words(args: argparse.Namespace) -> dict:
    """For each image its top words, and for some words where they come from."""
    run = load(args.run, args.device)
    asked = [(text, word_weights(run, text)) for text in args.word or ()]
    if args.image and args.data:
        raise UserError("give images or --data, not both")
    source = open_files(args.image) if args.image else open_source(args, run.config)
    number = None if args.image and all(p.is_file() for p in args.image) else args.number
    samples = gather(source, number, functools.partial(look, size=run.config["image_size"]))
    samples, rows = [s for s in samples if isinstance(s, Sample)], []
    for sample in samples:
        images = normalize(sample.view[None].to(run.idf.df.device))
        with torch.inference_mode():
            logits = run.model(images)[0].float()  # [V]
        words = top_words(run, logits, args.top, args.lift)
        rows.append({"image": sample.name, "words": [word._asdict() for word in words], "maps": []})
        for text, weights in asked or [
            (word.text, word_weights(run, word.text, word.ids)) for word in words[: args.maps]
        ]:
            shares, constant = SHARES[args.at](run.model, images, weights)
            p = (weights @ probabilities(run, logits).clamp(min=1e-30).log()).exp().item()
            found = {"word": text, "probability": p, "logit": (weights @ logits).item()}
            found |= {"constant": constant.item(), "shares": shares[0].tolist()}
            rows[-1]["maps"].append(found)
    save(draw_words(args, samples, rows), args.out)
    return {"run": str(args.run), "step": run.step, "at": args.at, "images": rows}


def draw_words(args: argparse.Namespace, samples: list[Sample], rows: list[dict]) -> Image.Image:
    """A row for each image: the picture, bars for its words, maps."""
    count, most = (max(len(row[key]) for row in rows) for key in ("maps", "words"))
    pitch = min(27, max(18, TILE // max(1, most)))  # of the words
    deep = 28 + max(math.ceil(count / 3) * (TILE + 26), pitch * most)
    kind = "probability over frequency" if args.lift else "probability"
    about = f"grey: caption or file, unseen by the model; bars: {kind}"
    about += "" if args.lift else ", which all words of a caption share"
    about += "; each image and each map has its own scale"
    where = {"input": "pixels", "output": "encoder's output"}[args.at]
    title = f"Run {args.run.resolve().name}: its words, and maps at the {where}"
    image, draw = page(TOP + 8 + deep * len(rows), title, about)
    draw_legend(image, draw)
    for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
        y = TOP + 6 + i * deep
        write(draw, MARGIN, y, sample.name, 13, GREY, width=PAGE - 2 * MARGIN)
        image.paste(sample.picture, (MARGIN, y + 20))
        values = [word["lift" if args.lift else "probability"] for word in row["words"]]
        longest = max([*values, 1e-9])
        for j, (word, value) in enumerate(zip(row["words"], values, strict=True)):
            x, top, length = MARGIN + TILE + 12, y + 20 + j * pitch, 54 * value / longest
            write(draw, x, top, word["text"], min(15, pitch - 4), width=84)
            draw.rectangle((x + 88, top + 2, x + 88 + length, top + pitch - 9), fill=INK)
            number = f"{value:.1f}x" if args.lift else f"{value:.0%}"
            write(draw, x + 93 + length, top + 1, number, min(13, pitch - 4), GREY)
        for j, found in enumerate(row["maps"]):
            x, top = 368 + j % 3 * (TILE + 10), y + 20 + j // 3 * (TILE + 26)
            image.paste(heat_map(sample.picture, torch.tensor(found["shares"])), (x, top))
            text = f"{found['probability']:.1%}  {found['word']}"
            write(draw, x, top + TILE + 3, text, 14, width=TILE)
    return image


def draw_legend(image: Image.Image, draw):
    """The scale of heat maps, above them."""
    x, y = PAGE - MARGIN - 264, 14
    image.paste(tint(200, np.tile(np.linspace(-1, 1, 120), (12, 1))), (x + 56, y))
    write(draw, x, y - 2, "against", 13, AGAINST)
    write(draw, x + 184, y - 2, "for the word", 13, FOR)


# ------------------------------------------------------------------------------------------------
# show.py search


class Placed:
    """A source whose samples carry, in place of their classes, where to find them again."""

    def __init__(self, source):
        self.source = source

    def raws(self, part: int, parts: int, block: int) -> Iterator[Raw | BadSample]:
        if isinstance(self.source, Shards):
            for s in range(part, len(self.source.urls), parts):
                for j, raw in enumerate(self.source.read(self.source.urls[s])):
                    yield raw if isinstance(raw, BadSample) else raw._replace(targets=(s, j))
            return
        for first in range(part * block, len(self.source), parts * block):
            for i in range(first, min(first + block, len(self.source))):
                raw = self.source.raw(i)
                yield raw if isinstance(raw, BadSample) else raw._replace(targets=(i, 0))

    def once(self, prepare: Callable, part: int, parts: int, block: int, limit: None):
        raws = self.raws(part, parts, block)
        while items := [prepare(raw) for raw in itertools.islice(raws, block)]:
            yield items

    def fetch(self, places: list[tuple[int, int]]) -> dict[tuple[int, int], Raw]:
        """The samples at these places; of shards, those that hold one are read again."""
        if not isinstance(self.source, Shards):
            return {place: self.source.raw(place[0]) for place in places}
        found = {}
        for s, group in itertools.groupby(sorted(places), key=lambda place: place[0]):
            samples = self.source.read(self.source.urls[s])
            found |= {place: samples[place[1]] for place in group}
        return found


@torch.inference_mode()
def make_index(run: Run, source, batch_size: int, workers: int) -> dict[str, Tensor]:
    """What `search` needs of N images: 2 D + 20 bytes each.

    Returns:
        inputs [N, D] (float16), what the head's linear layer reads; lse [N], the logsumexp of the
        logits, so that a text needs its own rows of the head only; places [N, 2], for `Placed`.
    """
    parts, skipped = [], torch.zeros(len(KINDS), dtype=torch.int64)
    device, prepare = run.idf.df.device, Prepare(CenterCrop(run.config["image_size"]))
    total = None if isinstance(source, Shards) else len(source)
    with tqdm(total=total, unit="img", unit_scale=True, leave=False) as bar:
        for batch in batches(OnePass(Placed(source), prepare, batch_size), workers, device):
            skipped += batch["skipped"]
            if "images" in batch:
                x = run.model.norm(run.model.features(normalize(batch["images"].to(device))))
                lse = run.model.head(x).float().logsumexp(dim=1)
                parts.append((x.half().cpu(), lse.cpu(), batch["targets"]))
                bar.update(len(lse))
    refuse_if_bad(sum(len(lse) for _, lse, _ in parts), skipped)
    if not parts:
        raise UserError("no image found: the source is empty")
    if skipped.any():
        print(f"skipped {tell_skipped(skipped)}", file=sys.stderr)
    inputs, lse, places = map(torch.cat, zip(*parts, strict=True))
    return {"inputs": inputs, "lse": lse, "places": places}


def cached_index(run: Run, source, args: argparse.Namespace) -> dict[str, Tensor]:
    """The index of a run's checkpoint and a source, each as it is now; made once, kept in a file.

    Its name is a hash of what it depends on; of files, that is path, size and time of change.
    """
    files = source.urls if isinstance(source, Shards) else []
    if isinstance(source, Files):
        files = [(row and row[0]) or "" for row in source.rows]
    asked = (args.data, args.split, args.data_root, run.config["data"], run.config["val_data"])
    digest = hashlib.sha256(f"{asked} {source} {run.step}".encode())
    for file in map(str, [run.folder / "checkpoint.pt", *files]):
        local = os.stat(file) if os.path.exists(file) else None
        change = (os.path.abspath(file), local.st_size, local.st_mtime_ns) if local else file
        digest.update(f"{change}\n".encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "superclass"
    path = cache / f"features-{digest.hexdigest()[:16]}.pt"
    if path.exists():
        with contextlib.suppress(UserError):  # if it is damaged, it is made anew
            return read_checkpoint(path)
    found = make_index(run, source, args.batch_size, args.workers)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")  # published whole, or not at all
        torch.save(found, beside)
        os.replace(beside, path)
        print(f"features of {len(found['lse']):,} images are kept in {path}", file=sys.stderr)
    except OSError as error:
        print(f"features are not kept: {error}", file=sys.stderr)
    return found


@torch.inference_mode()
def search(run: Run, index: dict[str, Tensor], texts: list[str]) -> Tensor:
    """Scores [Q, N] of an index's images for texts: their zero-shot score, as in eval.py."""
    bags = torch.stack([word_weights(run, text) for text in texts])  # [Q, V]
    w, b = (bags @ run.model.head.weight).cpu(), (bags @ run.model.head.bias).cpu()  # [Q, D], [Q]
    pieces = zip(index["inputs"].split(8192), index["lse"].split(8192), strict=True)
    return torch.cat([w @ x.float().T + b[:, None] - lse for x, lse in pieces], dim=1)


def show_search(args: argparse.Namespace) -> dict:
    """The best images of a source for each text."""
    run = load(args.run, args.device)
    for text in args.text:
        word_weights(run, text)  # a mistake is told before the long part
    start = time.perf_counter()
    source = open_source(args, run.config)
    index = cached_index(run, source, args)
    scores = search(run, index, args.text)  # [Q, N]
    best = scores.topk(min(args.number, scores.shape[1]), dim=1)
    seconds = time.perf_counter() - start

    places = [[tuple(index["places"][n].tolist()) for n in row] for row in best.indices]
    raws = Placed(source).fetch(sorted({place for row in places for place in row}))
    samples = {place: look(raw, run.config["image_size"]) for place, raw in raws.items()}
    rows, answers = [], []
    for text, found, values in zip(args.text, places, best.values.tolist(), strict=True):
        hits = [(samples[place], v) for place, v in zip(found, values, strict=True)]
        for sample in (sample for sample, _ in hits if isinstance(sample, BadSample)):
            print(f"a hit is gone: {sample}", file=sys.stderr)
        hits = [(sample, v) for sample, v in hits if isinstance(sample, Sample)]
        answers.append({"text": text, "images": [{"image": s.name, "score": v} for s, v in hits]})
        tiles = [(s.picture, [(f"{math.exp(v):.1%}  {s.name}", INK)]) for s, v in hits]
        rows.append((f'"{text}"', tiles))
    title = f"The best of {scores.shape[1]:,} images for a text, by run {args.run.resolve().name}"
    subtitle = "percentage: the text's mean probability; after it the image's caption or file"
    save(contact_sheet(title, subtitle, rows)[0], args.out)
    print(f"{scores.shape[1]:,} images searched in {seconds:.2f} s", file=sys.stderr)
    return {"run": str(args.run), "images": scores.shape[1], "seconds": seconds, "texts": answers}


# ------------------------------------------------------------------------------------------------
# show.py curves, show.py scaling

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]
CURVES = {"loss": "loss", "lr": "learning rate", "images_per_s": "images a second"}


def line_style(r: int) -> dict:
    """Seven colours of solid lines, then the same of dashed and dotted ones."""
    return {"color": COLOURS[r % 7], "linestyle": ["-", "--", ":"][r // 7 % 3]}


def plotter():
    """matplotlib, drawing into files; it is no requirement of the rest."""
    try:
        import matplotlib.pyplot
    except ImportError:
        raise UserError("curves are drawn by matplotlib: pip install matplotlib") from None
    matplotlib.use("Agg")
    return matplotlib


def save_figure(figure, path: Path):
    try:
        figure.savefig(path, format="png", dpi=100)
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror}") from None


def show_curves(args: argparse.Namespace):
    """Loss, learning rate, speed and evaluation of runs over the samples seen."""
    matplotlib = plotter()
    panels = {title: {} for title in CURVES.values()}  # panel -> number of the run -> points
    for r, folder in enumerate(args.run):
        batch_size, lines = read_config(folder)["batch_size"], read_jsonl(folder / "metrics.jsonl")
        if not lines:
            raise UserError(f"{folder} has no line in its metrics.jsonl yet")
        for key, title in CURVES.items():
            panels[title][r] = [(line["samples"], line[key]) for line in lines]
        for row in own_rows(folder):
            name = f"{task_name(row)} {row.get('attribute', '')}".strip()
            scores = {f"{name} {key}": value for key, value in row.items() if "@" in key}
            for title, value in (scores or {f"{name}, top-1": row["top1"]}).items():
                points = panels.setdefault(title, {}).setdefault(r, [])
                points.append((row["step"] * batch_size, value))
    below = 0.35 + 0.2 * math.ceil(len(args.run) / 3)  # inches, for the legend
    height = 2.2 * math.ceil(len(panels) / 3) + below
    figure, axes = matplotlib.pyplot.subplots(math.ceil(len(panels) / 3), 3, figsize=(9, height))
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, runs) in zip(axes.flat, panels.items(), strict=False):
        for r, points in runs.items():
            marker = "" if title in CURVES.values() and len(points) > 1 else "o"
            axis.plot(*zip(*sorted(points), strict=True), marker=marker, ms=4, **line_style(r))
        axis.set_xlim(left=0)
        if title not in CURVES.values():
            axis.set_ylim(0, 1.05)
        axis.set_title(title, fontsize=10)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    lines = [matplotlib.lines.Line2D([], [], **line_style(r)) for r in range(len(args.run))]
    figure.legend(lines, map(str, args.run), loc="lower center", ncols=3, fontsize=9)
    figure.text(0.5, (below - 0.17) / height, "images seen", ha="center", fontsize=9)
    figure.tight_layout(rect=(0, below / height, 1, 1))
    save_figure(figure, args.out)


def show_scaling(args: argparse.Namespace):
    """Final scores of whole runs over their length, a line for each objective and encoder size.

    The paper's Figure 2, of the runs that are given. Points are means over runs that differ in
    nothing but their seed, bars their standard deviation.
    """
    matplotlib = plotter()
    points = {}  # (objective, model, samples) -> configs, one a seed
    lines = {}  # task -> (objective, model) -> samples -> scores, one a seed
    for folder in args.run:
        config, scores = finished(folder)
        key = config["objective"], config["model"]
        points.setdefault((*key, config["samples"]), []).append(config)
        scores = {task: score for task, score in scores.items() if task not in COSTS}
        if not scores:
            raise UserError(f"{folder} has no score of its end in its eval.jsonl")
        for task, score in scores.items():
            runs = lines.setdefault(task, {}).setdefault(key, {})
            runs.setdefault(config["samples"], []).append(score)
    for (*key, samples), configs in points.items():
        refuse_if_different(f"{' '.join(key)}, {samples:,} images", configs)
    keys = list(dict.fromkeys(key for of_task in lines.values() for key in of_task))
    objectives, models = (list(dict.fromkeys(column)) for column in zip(*keys, strict=True))
    wide = min(4, len(objectives))  # the legend, which is filled by columns
    below = 0.2 + 0.2 * math.ceil(len(keys) / wide)  # inches
    rows, columns = math.ceil(len(lines) / 3), min(3, len(lines))
    figure, axes = matplotlib.pyplot.subplots(
        rows, columns, figsize=(9, 3 * rows + below), sharey=True, squeeze=False
    )
    for axis in axes.flat[len(lines) :]:
        axis.set_visible(False)
    handles = {}  # of all panels: a task may be measured on some runs only
    for axis, (task, of_task) in zip(axes.flat, lines.items(), strict=False):
        for (objective, model), runs in of_task.items():
            samples, scores = zip(*sorted(runs.items()), strict=True)
            means, deviations = zip(*map(mean_and_deviation, scores), strict=True)
            o, m = objectives.index(objective), models.index(model)
            style = {"color": COLOURS[o % 7], "linestyle": ["-", "--", ":"][m % 3]}
            style |= {"marker": "os^Dv"[m % 5], "label": f"{objective} {model}"}
            bars = [deviation or 0 for deviation in deviations]
            drawn = axis.errorbar(samples, means, bars, capsize=2, ms=5, **style)
            handles[objective, model] = drawn
        axis.set_xscale("log")
        axis.set_xticks(sorted({n for runs in of_task.values() for n in runs}), minor=False)
        axis.set_xticks([], minor=True)
        axis.xaxis.set_major_formatter(matplotlib.ticker.EngFormatter(sep=""))
        axis.set_title(f"{task}, top-1", fontsize=10)
        axis.set_xlabel("images seen", fontsize=9)
        axis.tick_params(labelsize=8, labelleft=True)
        axis.grid(alpha=0.3)
    figure.legend(handles=list(handles.values()), loc="lower center", ncols=wide, fontsize=9)
    figure.tight_layout(rect=(0, below / figure.get_figheight(), 1, 1))
    save_figure(figure, args.out)


# ------------------------------------------------------------------------------------------------
# show.py data


def show_data(args: argparse.Namespace) -> dict:
    """A source as training would meet it: augmented samples, captions, labels, what is skipped."""
    where = args.data_root, args.class_names, args.caption_noise
    source = load_source(args.data, args.split, *where)
    tokenizer = load_tokenizer(args.tokenizer, source.captions(50_000), args.clip_vocab)
    view = Augment(args.image_size, args.min_scale, args.flip, args.color_jitter, args.grayscale)
    encode = functools.partial(
        caption_tokens, max_tokens=10**6, without_stopwords=args.drop_stopwords
    )
    prepare, position = Prepare(view, tokenizer, args.seed, encode), itertools.count()

    def make(raw: Raw | BadSample):
        item = prepare(raw, (next(position),))
        if isinstance(item, BadSample):
            return item
        return item[0], read_caption(raw.caption), item[1], min(open_image(raw.image).size)

    items = gather(source, args.limit, make)
    samples = [item for item in items if not isinstance(item, BadSample)]
    idf = IDF(tokenizer.n_vocab)
    for _, _, ids, _ in samples:
        idf.update(torch.tensor([ids[:MAX_TOKENS]]))
    frequent = idf.df.argsort(descending=True, stable=True)[: args.top].tolist()
    frequent = [token for token in frequent if idf.df[token]]
    _, captions, tokens, sides = zip(*samples, strict=True)
    numbers = {
        "words of a caption": [len(caption.split()) for caption in captions],
        "tokens of a caption": [len(ids) for ids in tokens],
        "labels of an image": [len(set(ids[:MAX_TOKENS])) for ids in tokens],
        "shorter side, pixels": sides,
    }
    skipped = Counter(item.kind for item in items if isinstance(item, BadSample))
    figures = {"source": f"{args.data}: {source}", "examined": len(items), "skipped": skipped}
    figures["cut to 77 tokens"] = sum(len(ids) > MAX_TOKENS for ids in tokens)
    figures["quantiles"] = {
        name: {at: int(np.quantile(values, q, method="nearest")) for at, q in QUANTILES.items()}
        for name, values in numbers.items()
    }
    names, weights = [spell([t], tokenizer) for t in frequent], idf.weights()[frequent].tolist()
    shares = (idf.df[frequent] / len(samples)).tolist()
    rows = zip(names, shares, weights, strict=True)
    figures["tokens"] = [dict(zip(("token", "share", "idf"), row, strict=True)) for row in rows]

    tiles = []
    number = min(args.number, len(samples))
    for picture, caption, ids, _ in (samples[n * len(samples) // number] for n in range(number)):
        labels = ", ".join(spell([t], tokenizer) for t in dict.fromkeys(ids[:MAX_TOKENS]))
        tiles.append((Image.fromarray(picture.permute(1, 2, 0).numpy()),
                      [(caption, INK), (labels, AGAINST)]))  # fmt: skip
    save(draw_data(args, tiles, figures), args.out)
    return figures


MAX_TOKENS = 77  # of a caption count as labels
QUANTILES = {"least": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "most": 1.0}


def draw_data(args: argparse.Namespace, tiles: list, figures: dict) -> Image.Image:
    """Augmented samples, and below them the figures."""
    examined, tokens = figures["examined"], figures["tokens"]
    skipped = figures["skipped"] or {"nothing": 0}
    below = 56 + 18 * max(len(tokens), 8 + len(skipped))
    subtitle = f"views of {args.image_size} px as training sees them; the caption; in blue its "
    subtitle += f"labels, the tokens of {args.tokenizer}; -x goes on in a word"
    image, draw = contact_sheet(figures["source"], subtitle, [("", tiles)], below)
    top = image.height - below + 16

    def table(x: int, y: int, widths: list[int], rows: list[list[str]]):
        for i, row in enumerate(rows):
            for j, cell in enumerate(row):
                colour = GREY if not i or not j else INK
                write(draw, x + sum(widths[:j]), y + 18 * i, cell, 13, colour, widths[j] - 6)

    rows = [[name, *map(str, row.values())] for name, row in figures["quantiles"].items()]
    table(MARGIN, top, [140, *[56] * 5], [["", *QUANTILES], *rows])
    rows = [[kind, str(count)] for kind, count in skipped.items()]
    rows.append(["cut to 77 tokens", str(figures["cut to 77 tokens"])])
    table(MARGIN, top + 108, [252, 150], [["what would be skipped", f"of {examined}"], *rows])
    rows = [[row["token"], f"{row['share']:.1%}", f"{row['idf']:.2f}"] for row in tokens]
    head = ["most frequent tokens", "of captions", "IDF"]
    table(PAGE // 2 + 50, top, [190, 100, 80], [head, *rows])
    return image


# ------------------------------------------------------------------------------------------------
# Flags.


def share(text: str) -> float:
    """The type of flags from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise ValueError
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at runs and sources.")
    commands = parser.add_subparsers(dest="command", required=True)

    def command(name: str, text: str, function: Callable):
        sub = commands.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        sub.set_defaults(function=function)
        sub.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the picture, a PNG")
        return sub, sub.add_argument

    def source_flags(add, default_root: str | None = None):
        add("--split", default="val", choices=("train", "val"), help="of a built-in source")
        add("--data-root", default=default_root, help="where torchvision keeps its sets")
        add("--class-names", help="file with a class a line, several names between commas")
        add("--json", action="store_true", help="print the figures as JSON")

    sub, add = command("words", "the words of images, and where they come from", show_words)
    add("run", type=Path, help="the run's folder")
    add("image", type=Path, nargs="*", help="image files and folders")
    add("--data", help="without images: the source; default: what the run is evaluated on")
    add("--number", type=positive, default=4, help="samples of a source or folder")
    add("--word", action="append", help="map this word or text; may be repeated")
    add("--maps", type=positive, default=3, help="without --word: maps of so many top words")
    add("--top", type=positive, default=6, help="words with bars")
    add("--lift", action="store_true", help="rank words by probability over frequency")
    add(
        "--at",
        default="input",
        choices=tuple(SHARES),
        help="split a logit at that end of the encoder",
    )
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    source_flags(add)

    sub, add = command("search", "the best images of a source for a text", show_search)
    add("run", type=Path, help="the run's folder")
    add("text", nargs="+", help="what to look for; several texts, several answers")
    add("--data", help="the source; default: what the run is evaluated on")
    add("--number", type=positive, default=6, help="images a text")
    add("--batch-size", type=positive, default=256)
    add("--workers", type=natural, default=2)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    source_flags(add)

    sub, add = command("curves", "how runs went, over the samples seen", show_curves)
    add("run", type=Path, nargs="+", help="folders of runs")

    sub, add = command("scaling", "final scores over the length of runs", show_scaling)
    add("run", type=Path, nargs="+", help="folders of finished runs")

    sub, add = command("data", "what training would make of a source", show_data)
    add("data", help=f"{', '.join(BUILT_IN)}, a folder, a table, .tar shards")
    add("--limit", type=positive, default=1000, help="samples to examine")
    add("--number", type=positive, default=12, help="samples to draw")
    add("--top", type=positive, default=16, help="tokens to list")
    add("--tokenizer", default="bpe:512", help="as in train.py")
    add("--clip-vocab", help="CLIP's vocabulary file; default: an installed package's, or fetched")
    add("--drop-stopwords", action="store_true", help="without words such as 'the' in the captions")
    add("--caption-noise", type=share, default=0.0, help="share of images with another's caption")
    add("--image-size", type=positive, default=32, help="pixels")
    add("--min-scale", type=share, default=0.9, help="smallest share of the image in a random crop")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--color-jitter", type=share, default=0.0, help="strength, for 8 images of 10")
    add("--grayscale", type=share, default=0.0, help="share of images without colour")
    add("--seed", type=natural, default=0)
    source_flags(add, "data")
    sub.set_defaults(split="train")
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    try:
        if args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out}: pictures are written as PNG, name a .png")
        out, given = args.out.resolve(), {path.resolve() for path in getattr(args, "image", ())}
        if out.exists() and given & {out, *out.parents}:
            raise UserError(f"--out {args.out} is one of the images: name another file")
        figures = args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if getattr(args, "json", False):
        print(json.dumps(figures, indent=1))
    print(f"the picture is {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
