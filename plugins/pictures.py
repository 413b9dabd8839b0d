"""Look at runs and sources: words on pixels, search, curves, and a source's samples.

    python eval.py words RUN [IMAGE ...] [--data SPEC] [--word "red circle"] [--lift]
    python eval.py search RUN "a red star" [TEXT ...] [--data SPEC]
    python eval.py curves RUN [RUN ...]
    python data.py SPEC

Each command draws one PNG (--out) and prints its main figures. Runs and sources are never changed.

Letters in shapes:  B images, N patches, S image size, D width, V vocabulary, Q texts.
"""

import functools
import itertools
import math
import os
import sys
import textwrap
import warnings
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import Tensor
from torch.overrides import TorchFunctionMode

import data
import eval as evaluation
from data import (
    IMAGE_TYPES,
    BadSample,
    CenterCrop,
    Prepare,
    Raw,
    Source,
    UserError,
    caption_tokens,
    normalize,
    number,
)
from eval import Run
from plugins import TABLE, Parser, names
from plugins.advice import advise
from plugins.files import Files
from superclass import IDF, SuperClass

# ------------------------------------------------------------------------------------------------
# From a word's logit to the patches. The pooled features are a mean over patches, and the head is
# linear once the deviation in its norm is taken from the image: a logit is a sum over patches.


@torch.inference_mode()
def output_shares(model: SuperClass, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's exact share of a logit, split where the head reads: the encoder's output.

    Let z_n be the encoder's N tokens, p = 1/N sum of z_n the pooled features, m and s the mean and
    the deviation of the D numbers in p, and w, b a row of the head:

        logit = w . (gamma (p - m) / s + beta) + b
              = sum over n of  1/N w . gamma (z_n - mean of z_n) / s    +    w . beta + b

    because m is the mean over n of the means of z_n. The rest, w . beta + b, belongs to no patch.

    Args:
        model: in evaluation mode.
        images: [B, 3, S, S], normalised.
        weights: [V] or [B, V], of a weighted sum of logits, which splits in the same way.
    Returns:
        Shares [B, N] and constants [B] that together sum to the weighted logits.
    """
    z = model.encoder(images)  # [B, N, D]
    square_side(z)
    w = weights @ model.head.weight  # [D] or [B, D]
    deviation = (z.mean(dim=1).var(dim=1, correction=0) + model.norm.eps).sqrt()  # [B]
    centred = (z - z.mean(dim=2, keepdim=True)) / deviation[:, None, None]  # [B, N, D]
    shares = (centred * (w * model.norm.weight).unsqueeze(-2)).sum(dim=2) / z.shape[1]
    return shares, (w @ model.norm.bias + weights @ model.head.bias).expand(len(z))


def input_shares(model: SuperClass, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's share of a logit, split at the pixels, where a patch is still what it shows.

    With the attention, the deviations in the norms and the gates of the GELUs held at their values
    for this image (`Held`), the whole model is affine in its pixels: a logit is the sum of
    gradient x pixel, plus what the held model returns for an image of zeros. This sum is exact,
    too, but does not say how the attention would change without the patch. A pixel of the data's
    mean colour is zero and has no share.

    Args, returns: as for `output_shares`. In CNNs, a patch is the square of pixels at a token's
    place, and ReLU, max pooling and batch norm are affine in the same sense.
    """
    pixels = images.detach().requires_grad_()
    with torch.enable_grad(), Held():
        tokens = model.encoder(pixels)  # [B, N, D]
        logits = model.head(model.norm(tokens.mean(dim=1)))  # [B, V]
        chosen = (logits * weights).sum(dim=1)  # [B]
        (gradient,) = torch.autograd.grad(chosen.sum(), pixels)
    by_pixel = (gradient * pixels).sum(dim=1).detach()  # [B, S, S]
    side, size = square_side(tokens), images.shape[-1]
    rows = F.one_hot(torch.arange(size, device=images.device) * side // size).float()  # [S, side]
    shares = (rows.T @ by_pixel @ rows).flatten(1)  # [B, N]
    return shares, chosen.detach() - shares.sum(dim=1)


def square_side(tokens: Tensor) -> int:
    """The number of patches in a row, for tokens [B, N, D]; NoMap if N is no square."""
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise NoMap(f"the encoder has {tokens.shape[1]} tokens, which are no square of patches")
    return side


class NoMap(ValueError):
    """The encoder's tokens have no place in the image."""


class Held(TorchFunctionMode):
    """A context in which autograd takes the factors of norms, gates and attention as constants.

    So it is in timm's ViTs, too, with or without fused attention.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in self.GATED:  # x times a factor; 0 / 0 at zero
            x, *rest = args
            gate = function(x.detach().clone(), *rest, **kwargs) / x.detach()
            return x * gate.nan_to_num(0.5)
        if function in self.FACTORS:
            return function(*args, **kwargs).detach()
        return self.LINEAR.get(function, function)(*args, **kwargs)

    @staticmethod
    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        dims = tuple(range(-len(shape), 0))
        deviation = (x.detach().var(dims, correction=0, keepdim=True) + eps).sqrt()
        x = (x - x.mean(dims, keepdim=True)) / deviation
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    @staticmethod
    def attention(q, k, v, *args, **kwargs):
        return F.scaled_dot_product_attention(q.detach(), k.detach(), v, *args, **kwargs)

    LINEAR = {F.layer_norm: layer_norm, F.scaled_dot_product_attention: attention}
    GATED = {F.gelu, F.silu, F.hardswish, F.mish}
    FACTORS = {F.softmax, torch.softmax, Tensor.softmax, torch.sigmoid, Tensor.sigmoid}
    FACTORS |= {F.sigmoid, F.hardsigmoid}


SHARES = {"input": input_shares, "output": output_shares}


class Word(NamedTuple):
    """A token as text, its probability for an image, and this over the token's frequency."""

    text: str
    id: int
    probability: float
    lift: float

    def figure(self, lift: bool) -> str:
        digits = 0 if self.lift >= 100 else 1
        return f"{self.lift:.{digits}f}x" if lift else f"{self.probability:.0%}"


def top_words(run: Run, logits: Tensor, number: int, lift: bool = False) -> list[Word]:
    """The `number` best tokens for the logits [V] of an image: by probability, or by lift.

    Lift is probability over frequency, the share of captions that contain the token. By lift,
    tokens less than a tenth as probable as the best are left out: their lift would be noise.
    """
    p = run.objective.log_probabilities(logits).exp()
    frequency = run.idf.df / run.idf.n.clamp(min=1)
    lifts = torch.where(frequency > 0, p / frequency, 0.0)
    best = (lifts if lift else p).argsort(descending=True)
    best = (best[p[best] > p.max() / 10] if lift else best)[:number].tolist()
    return [Word(spell(i, run.tokenizer), i, p[i].item(), lifts[i].item()) for i in best]


def word_weights(run: Run, text: str) -> Tensor:
    """Weights [V] of a text's tokens: IDF, scaled to sum to one; UserError if none has any."""
    labels = data.caption_labels(text, run.tokenizer)
    weights = evaluation.token_bags(run.idf, [labels]).to_dense()[0]
    if not weights.any():
        raise UserError(f"'{text}' has no token that occurs in some captions, but not in all")
    return weights.to(run.idf.df.device)


def spell(token: int, tokenizer) -> str:
    """A token as text. A hyphen marks the cut where it is only a piece of a word: "-ing".

    Pieces are never joined: a bag of tokens has no order, so a joined word would be a guess.
    """
    if hasattr(tokenizer, "spell"):  # it knows better
        return tokenizer.spell(token)
    text = tokenizer.decode([token])
    first = tokenizer.encode_ordinary(" a")
    after = tokenizer.decode([*first, token])[len(tokenizer.decode(first)) :]
    whole = caption_tokens(text, tokenizer) == [token] or not after[:1].isalpha()
    return (text.strip() or "(blank)") if whole else f"-{after}"


def show_words(argv: list[str]) -> list:
    """The top words of images, and the patches that they come from."""
    parser = make_parser("eval.py words", show_words.__doc__, of_a_run=True)
    add = parser.add_argument
    add("image", nargs="*", help="image files, or folders and other sources")
    add("--number", type=number(int, 1), default=4, help="samples of a source")
    add("--word", action="append", help="map this text, not the top words; may be repeated")
    add("--lift", action="store_true", help="rank words by probability over frequency")
    add("--at", default="input", choices=tuple(SHARES), help="split there in the encoder")
    args = parser.parse_args(argv)
    if args.out.resolve() in [Path(name).resolve() for name in args.image]:
        raise UserError(f"--out {args.out} is one of the images: name another file")
    if args.image and args.data:
        raise UserError("give images or --data, not both")
    run = load(args, or_texts=True)
    if args.image:
        sources = open_named(args.image, run.config.data_root)
    else:
        sources = [run_source(run, args.data)]
    limits = [None if isinstance(source, Named) else args.number for source in sources]
    blocks = (s.once(0, 1, 256, limit) for s, limit in zip(sources, limits, strict=True))
    views = [Prepare(CenterCrop(size)) for size in (TILE, run.config.image_size)]
    samples, _ = gather(itertools.chain(*itertools.chain(*blocks)), *views)
    if not run.objective.has_words:
        return show_captions(args, run, samples)
    asked = [(text, word_weights(run, text)) for text in args.word or ()]
    rows = []
    for _, raw, picture, view in samples:
        images = normalize(view.image[None].to(run.idf.df.device))
        with torch.inference_mode():
            logits = run.model.head(run.model.norm(run.model.features(images)))[0].float()  # [V]
        words = top_words(run, logits, 6, args.lift)
        print(f"{name_of(raw)}: {', '.join(f'{w.text} {w.figure(args.lift)}' for w in words)}")
        ids = torch.arange(len(logits), device=logits.device)
        log_p = run.objective.log_probabilities(logits)
        cells = [(pixels(picture), []), (functools.partial(draw_bars, words, args.lift), [])]
        for text, weights in asked or [(w.text, (ids == w.id).float()) for w in words[:3]]:
            drawn = pixels(picture)
            try:
                shares, _ = SHARES[args.at](run.model, images, weights)
                drawn = draw_map(drawn, shares[0].numpy(force=True))
            except NoMap as error:
                data.say_once(f"no maps: {error}")
            cells.append((drawn, [(f"{(weights @ log_p).exp():.1%}  {text}", INK)]))
        rows.append((name_of(raw), cells))
    place = {"input": "pixels", "output": "encoder's output"}[args.at]
    about = f"bars: probability{' over frequency' if args.lift else ''}; maps: orange speaks for "
    about += "the word, blue against it; grey: caption or file, which the model is not given"
    sheet(f"{args.run.resolve().name}: words, and maps at the {place}", about, rows, 5, args.out)
    return rows


def draw_bars(words: list[Word], lift: bool, axes):
    """Words, bars and figures in the unit square; the longest bar leaves room for its figure."""
    values = [word.lift if lift else word.probability for word in words]
    for i, (word, value) in enumerate(zip(words, values, strict=True)):
        y, length = (i + 0.5) / 6, 0.2 * value / (max(values) or 1)
        axes.text(0, y, word.text if len(word.text) < 12 else word.text[:10] + "...", va="center")
        axes.barh(y, length, 0.09, left=0.46, color=INK)
        axes.text(0.48 + length, y, word.figure(lift), va="center", color=GREY, size=9)


def draw_map(picture: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Shares [N] as colours on a picture [S, S, 3] in grey; the strongest has full colour."""
    side, size = math.isqrt(len(shares)), len(picture)
    cells = np.arange(size) * side // size
    value = shares.reshape(side, side)[cells][:, cells, None]  # [S, S, 1]
    opacity = np.abs(value / max(np.abs(shares).max(), 1e-12)) ** 0.8
    grey = picture.mean(axis=2, keepdims=True)
    grey = 0.6 + 0.4 * (grey - grey.min()) / max(np.ptp(grey), 1)
    colour = np.where(value < 0, to_rgb(AGAINST), to_rgb(FOR))
    drawn = (1 - opacity + opacity * colour) * grey  # the lines of the picture stay visible
    edges = np.flatnonzero(np.diff(cells)) + 1
    drawn[edges] = drawn[:, edges] = 1
    return drawn


def show_captions(args: Namespace, run: Run, samples: list) -> list:
    """Images with the texts that a language model generates for them."""
    if args.word or args.lift:
        raise UserError(f"--word and --lift need a head over the vocabulary: {args.run} has none")
    cells = []
    for _, raw, picture, view in samples:
        images = normalize(view.image[None].to(run.idf.df.device))
        asked = data.pad([caption_tokens(raw.question or "", run.tokenizer)]).to(images.device)
        text = run.objective.answer(run, images, asked)[0] or "(empty)"
        name = f"{raw.question or ''} {name_of(raw)}".strip()
        cells.append((pixels(picture), [(text, INK), (name, GREY)]))
        print(f"{name}: {text}")
    about = "black: generated; grey: the question if there is one, and the image's caption or file"
    sheet(f"{args.run.resolve().name}: generated captions", about, [("", cells)], 6, args.out)
    return [("", cells)]


# ------------------------------------------------------------------------------------------------
# Pages and samples.

PAGE, MARGIN, TOP, GAP = 900, 16, 70, 9  # pixels: the width; the content starts below TOP
TILE = 320  # pixels of a picture, which is drawn at about half of that
INK, GREY = "#212529", "#697078"
AGAINST, FOR = "#0072b2", "#d55e00"  # Okabe and Ito's colours, which colour-blind readers can tell
COLOURS = [AGAINST, FOR, "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000"]

matplotlib.rc("text", color=INK, parse_math=False)
matplotlib.rc("axes", grid=True, titlesize=10)
matplotlib.rc("grid", alpha=0.3)
matplotlib.rc(("xtick", "ytick"), labelsize=8)
matplotlib.rc("legend", frameon=False, fontsize=9)
shorten = functools.partial(textwrap.shorten, placeholder="...")
warnings.filterwarnings("ignore", "Glyph .* missing")  # for scripts that the font does not have


def sheet(title: str, about: str, rows: list, columns: int, out: Path):
    """Save a page of cells: a square, and texts below it that are cut off at its right edge.

    Args:
        rows: (heading, cells); longer rows are continued in the next one. A cell is a picture
            [S, S, 3] or a function that draws in axes' unit square (y points down), and
            [(text, colour), ...].
    """
    tile = (PAGE - 2 * MARGIN - GAP * (columns - 1)) / columns
    under = 12 + 32 * max(len(texts) for _, cells in rows for _, texts in cells)
    head = 30 * any(heading for heading, _ in rows)
    number = sum(math.ceil(len(cells) / columns) for _, cells in rows)
    height = TOP + number * (head + tile + under)
    page = Figure((PAGE / 100, height / 100), dpi=100)
    title = shorten(data.printable(title), 75)
    page.text(MARGIN / PAGE, 1 - 10 / height, title, size=13, va="top")
    page.text(MARGIN / PAGE, 1 - 37 / height, shorten(about, 150), size=9, va="top", color=GREY)
    page.subplots_adjust(MARGIN / PAGE, 0, 1 - MARGIN / PAGE, 1 - (TOP + head) / height)
    spaces = {"wspace": GAP / tile, "hspace": head / (tile + under)}
    limits = {"xlim": (0, 1), "ylim": (1 + under / tile, 0)}
    grid = page.subplots(number, columns, squeeze=False, gridspec_kw=spaces, subplot_kw=limits)
    for axes in grid.flat:
        axes.set_axis_off()
    for heading, cells in rows:
        grid[0, 0].set_title(shorten(heading, 120), loc="left", color=GREY)
        for axes, (content, texts) in zip(grid.flat, cells, strict=False):
            content(axes) if callable(content) else axes.imshow(content, extent=(0, 1, 1, 0))
            for i, (text, colour) in enumerate(texts):
                lines = textwrap.wrap(text[:500], int(tile / 7.2), max_lines=2, placeholder="...")
                look = {"color": colour, "size": 9, "va": "top", "linespacing": 1.25}
                axes.text(0, 1 + (5 + 32 * i) / tile, "\n".join(lines), clip_on=True, **look)
        grid = grid[math.ceil(len(cells) / columns) :]
    save(page, out)


def load(args: Namespace, or_texts: bool = False) -> Run:
    """A run with a head over the vocabulary, or, if `or_texts`, one that answers in texts."""
    run = evaluation.load_run(args.run, evaluation.pick_device(args.device))
    answers = or_texts and hasattr(run.objective, "answer")
    if not (run.objective.has_words or answers):
        objective = f"its objective is {run.config.objective}"
        raise UserError(f"{args.run} has no head over a vocabulary: {objective}")
    return run


class Named(Files):
    """Image files that somebody named."""


def open_named(names: list[str], root: str, class_names: str | None = None) -> list[Source]:
    """What names on a command line stand for: image files are one source, all else is each its own.

    A file of another type than data.py reads is taken for an image, too, and found to be none.
    """
    endings = tuple(name for name in TABLE["data"] if name[0] == ".")
    images, sources = [], []
    for name in names:
        is_table = name.lower().endswith(endings)
        if name.lower().endswith(IMAGE_TYPES) or (os.path.isfile(name) and not is_table):
            images.append((Path(name), None, None, None))
        else:
            sources.append(data.load_source(name, "val", root, class_names))
    return ([Named(images, None, Counter())] if images else []) + sources


def place_of(source: Source, place, raw: Raw | BadSample) -> str:
    """Where a sample is: its image's file, else its shard and number, or its number alone."""
    if isinstance(raw, Raw) and isinstance(raw.image, Path):
        return data.printable(raw.image)
    if isinstance(raw, BadSample) and raw.detail:
        return raw.detail
    if isinstance(place, tuple):
        return data.printable(f"{source.urls[place[0]]} #{place[1]}")
    return f"{type(source).__name__} #{place}"


def run_source(run: Run, spec: str | None):
    """The source that --data names, or the run's validation data, or what it trained on."""
    config = run.config
    return data.load_source(spec or config.val_data or config.data, "val", config.data_root)


def gather(samples: Iterable[tuple], *prepares: Prepare) -> tuple[list[tuple], list[BadSample]]:
    """The good ones of (place, raw) samples, each with what `prepares` make of it; the bad ones."""
    good, bad = [], []
    for i, (place, raw) in enumerate(samples):
        made = [prepare(raw, (i,)) for prepare in prepares]
        if isinstance(made[-1], BadSample):
            bad.append(made[-1])
        else:
            good.append((place, raw, *made))
    examples = "; ".join({item.kind: str(item) for item in bad}.values())
    found = f"{data.describe(Counter(item.kind for item in bad))} ({examples})"
    if not good:
        none = f"not one of {len(bad)} samples can be used: {found}"
        raise UserError(none if bad else "there is no sample")
    if bad:
        print(f"skipped {found}", file=sys.stderr)
    return good, bad


def name_of(raw: Raw) -> str:
    """The caption of a sample; if it has none, the name of its image file."""
    try:
        return data.read_caption(raw.caption)
    except BadSample:
        return data.printable(raw.image.name) if isinstance(raw.image, Path) else ""


def pixels(sample: data.Sample) -> np.ndarray:
    return sample.image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------
# Search.


@torch.inference_mode()
def search(run: Run, source, texts: list[str]) -> tuple[Tensor, list]:
    """Scores [B, Q] of a source's images for texts, as in zero-shot, and the images' places."""
    bags = torch.stack([word_weights(run, text) for text in texts]).cpu().to_sparse()
    scores, places = [], []
    for batch in evaluation.good_batches(run, source, evaluation.BATCH):
        features = run.model.features(normalize(batch.images))
        scores.append(evaluation.score_bags(run, features, bags))
        places += batch.places
    return torch.cat(scores), places


NO_MATCH = 0.1  # in a trial, nine in ten right hits had more; of words not shown, a fifth had


def if_shown(run: Run, texts: list[str]) -> Tensor:
    """The scores [Q] that texts would have for an image whose caption certainly has their tokens.

    A softmax shares a probability of one among a caption's tokens, in training by their weights:
    token c of a typical caption gets w_c over the mean sum of weights. A sigmoid gives it one.
    """
    V, device = len(run.idf.df), run.idf.df.device
    at_rest = run.objective.log_probabilities(torch.zeros(1, V, device=device)).exp()
    w = torch.ones(V, device=device) if vars(run.config).get("no_idf") else run.idf.weights()
    share = w * run.idf.n / (w @ run.idf.df.float()) if at_rest.sum() < 1.5 else torch.ones_like(w)
    log_p = share.clamp(1e-30, 1).log()
    return torch.stack([word_weights(run, text) @ log_p for text in texts]).cpu()


def show_search(argv: list[str]) -> list:
    """The best images of a source for each text."""
    parser = make_parser("eval.py search", show_search.__doc__, of_a_run=True)
    add = parser.add_argument
    add("text", nargs="+", help="what to look for; several texts, several answers")
    add("--number", type=number(int, 1), default=6, help="images for each text")
    args = parser.parse_args(argv)
    run, rows = load(args), []
    source = run_source(run, args.data)
    scores, places = search(run, source, args.text)
    matches = (scores - if_shown(run, args.text)).exp()  # [B, Q]
    best = scores.topk(min(args.number, len(scores)), dim=0).indices  # [number, Q]
    if hasattr(source, "read"):  # read a shard with several hits only once
        source.read = functools.lru_cache(maxsize=1)(source.read)
    hits = ((place, source.raw(place)) for place in sorted({places[i] for i in best.flatten()}))
    samples, _ = gather(hits, Prepare(CenterCrop(TILE)))  # reports files that are gone by now
    shown = {place: (raw, pixels(picture)) for place, raw, picture in samples}
    for q, text in enumerate(args.text):
        cells, most = [], matches[:, q].max().item()
        print(f"{text}:")
        if most < NO_MATCH:
            said = f"the best of {len(scores):,} has {most:.3f}, less than {NO_MATCH}"
            print(f"  probably nothing matches: {said} (docs/pretrained.md)")
        for i in (i for i in best[:, q].tolist() if places[i] in shown):
            raw, picture = shown[places[i]]
            score, file = f"{scores[i, q].exp():.1%}", place_of(source, places[i], raw)
            caption = "" if (caption := name_of(raw)) == Path(file).name else caption
            cells.append((picture, [(f"{score}  {caption or file}", INK)]))
            print(f"  {score}  {matches[i, q]:.2f}  {file}  {caption}".rstrip())
        rows += [(f'"{text}"', cells)] if cells else []
    title = f"{args.run.resolve().name}: the best of {len(scores):,} images for a text"
    about = "percentage: mean probability of the text's tokens; then the image's caption or file"
    sheet(title, about, rows, 6, args.out)
    return rows


# ------------------------------------------------------------------------------------------------
# Curves. A point is (panel, line, images seen, value).


def show_curves(argv: list[str]) -> dict[str, dict]:
    """Loss, speed and scores of runs over the images seen."""
    parser = make_parser("eval.py curves", show_curves.__doc__)
    add = parser.add_argument
    add("run", type=Path, nargs="+", help="folders of runs")
    args = parser.parse_args(argv)
    panels, numbers, legend, axes = {}, {}, {}, None
    for title, line, *point in curve_points(args.run):
        panels.setdefault(title, {}).setdefault(line, []).append(tuple(point))
        numbers.setdefault(line, len(numbers))
    if not panels:
        raise UserError("there is nothing to draw: no line in metrics.jsonl, no score")
    rows, columns = math.ceil(len(panels) / 3), min(3, len(panels))
    size = PAGE / 100, 2.35 * rows + 0.18 * math.ceil(len(numbers) / 3)
    page = Figure(size, dpi=100, layout="constrained")
    for n, (title, lines) in enumerate(panels.items(), 1):
        axes = page.add_subplot(rows, columns, n, title=title, sharex=axes)
        for line, points in lines.items():
            x, y = zip(*sorted(points), strict=True)
            dash, colour = divmod(numbers[line], len(COLOURS))
            look = {"color": COLOURS[colour], "linestyle": ("-", "--", ":")[dash % 3], "ms": 4}
            marker = "o" if len(x) < 10 else ""
            (legend[line],) = axes.plot(x, y, marker=marker, **look)
            print(f"{line}: {title} {y[-1]:.4g} after {x[-1]:,} images")
        if 0.1 < axes.dataLim.y1 <= 1:  # scores, not learning rates
            axes.set_ylim(0, 1.05)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_xlabel("images seen", size=8)
    page.legend(legend.values(), legend, loc="outside lower center", ncols=3)
    save(page, args.out)
    return panels


def curve_points(folders: list[Path]) -> Iterator[tuple]:
    """Training and all evaluations of runs; a line is a run."""
    titles = {"loss": "loss", "lr": "learning rate", "images_per_s": "images a second"}
    for folder in folders:
        batch_size = evaluation.read_config(folder).batch_size
        for line in evaluation.read_jsonl(folder / "metrics.jsonl"):
            for key in titles.keys() & line:
                yield titles[key], str(folder), line["samples"], line[key]
            if "val_loss" in line:  # beside the loss, each run with a line of its own
                yield "loss", f"{folder}, held out", line["samples"], line["val_loss"]
        for row in evaluation.own_rows(folder):
            name = f"{evaluation.task_name(row)} {row.get('attribute', '')}".strip()
            scores = {f"{name} {key}": row[key] for key in row if isinstance(row[key], float)}
            scores.pop("loss val_loss", None)  # it stands in metrics.jsonl
            for title, value in ({name: row["top1"]} if "top1" in row else scores).items():
                yield title, str(folder), row["step"] * batch_size, value


def show_data(argv: list[str] | None = None) -> dict[str, list]:
    """A source as training would see it: augmented samples, captions, labels, bad samples."""
    parser = make_parser("data.py", show_data.__doc__, "data.png")
    add = parser.add_argument
    add("data", help=f"{names('data')}, a folder, a table, .tar shards")
    add("--number", type=number(int, 1), default=12, help="samples to draw")
    add("--limit", type=number(int, 0), default=1000, help="samples to look at; 0: all")
    data.add_data_flags(add)
    args = parser.parse_args(argv)
    source = data.load_source(args.data, "train", args.data_root, args.class_names)
    tokenizer = data.load_tokenizer(args.tokenizer, source.captions(50_000))
    view = data.Augment(args.image_size, args.min_scale, args.flip, args.color_jitter)
    prepare = Prepare(view, tokenizer, args.seed, ("tokens",))
    samples, bad = gather(
        itertools.chain.from_iterable(source.once(0, 1, 256, args.limit or None)), prepare
    )
    captions = [name_of(raw) for _, raw, _ in samples]
    tokens = [caption_tokens(c, tokenizer, 10**6) for c in captions]
    labels = [list(dict.fromkeys(view.reads["tokens"])) for *_, view in samples]
    quantiles = [["quantiles", "least", "5%", "median", "95%", "most"]]
    for key, numbers in {
        "words of a caption": [len(caption.split()) for caption in captions],
        "tokens of a caption": list(map(len, tokens)),
        "labels of an image": list(map(len, labels)),
        "shorter side, pixels": [min(data.open_image(raw.image).size) for _, raw, _ in samples],
    }.items():
        quantiles.append([key, *np.quantile(numbers, (0, 0.05, 0.5, 0.95, 1), method="nearest")])
    looked, all_of = len(samples) + len(bad), f", of {source}" if args.limit else ""
    account = [["account", "samples"], (f"looked at{all_of}", looked), ("used", len(samples))]
    account += [(f"bad: {kind}", n) for kind, n in Counter(b.kind for b in bad).most_common()]
    account += [(f"left out: {rule}", n) for rule, n in source.left_out.most_common()]
    if source.attributes:
        account += [("used, without a class", sum(min(view.targets) < 0 for *_, view in samples))]
    account += [("used, caption cut to 77 tokens", sum(len(ids) > 77 for ids in tokens))]
    idf, frequent = IDF(tokenizer.n_vocab), [["frequent tokens", "of captions", "IDF"]]
    idf.update(data.pad(labels))
    for i in idf.df.argsort(descending=True, stable=True)[: min(16, idf.df.count_nonzero())]:
        figures = f"{idf.df[i] / idf.n:.1%}", f"{idf.weights()[i]:.2f}"
        frequent.append([spell(i.item(), tokenizer), *figures])
    cells = []
    for i in np.linspace(0, len(samples), min(args.number, len(samples)), False, dtype=int):
        shown = ", ".join(spell(token, tokenizer) for token in labels[i])
        cells.append((pixels(samples[i][-1]), [(captions[i], INK), (shown, AGAINST)]))
    about = f"views of {args.image_size} px as in training; captions; in blue their labels, the "
    about += f"tokens of {args.tokenizer}, where -x is a piece inside a word"
    sheet(f"{args.data}: {source}", about, [("", cells)], 6, args.out)
    for table in (quantiles, account, frequent):
        width = max(26, *(len(first) for first, *_ in table))
        for first, *rest in table:
            print(f"{data.printable(first):<{width}}", *(f"{cell:>11}" for cell in rest))
        print()
    # The number of pairs is not known for shards of which only a part was read.
    pairs = looked if not args.limit or looked < args.limit else getattr(source, "__len__", int)()
    advice = advise(tokenizer, captions, labels, pairs)
    print(*advice, sep="\n")
    return {"quantiles": quantiles, "account": account, "tokens": frequent, "advice": advice}


def make_parser(program: str, about: str, out: str = "", of_a_run=False) -> Parser:
    """A parser with --out, and with the flags that say which run is shown what."""
    parser = Parser(program, description=about)
    add, out = parser.add_argument, out or f"{program.split()[-1]}.png"
    add("--out", type=picture_path, default=out, help="the picture, a PNG")
    if of_a_run:
        add("run", type=Path, help="the run's folder")
        add("--data", help="the source; default: the run's validation data, or what it trained on")
        add("--device", default="auto", help="auto, cuda, mps or cpu")
    return parser


def picture_path(text: str) -> Path:
    """Report a bad --out before the slow part."""
    path = Path(text)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"--out {path}: name a .png file in a folder that exists")
    return path


def save(page: Figure, out: Path):
    try:
        page.savefig(out)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error}") from None
    print(f"the picture is {out}", file=sys.stderr)
