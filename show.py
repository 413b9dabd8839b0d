"""Look at runs and sources: words on pixels, search, curves, and a source's samples.

    python show.py words RUN [IMAGE ...] [--data SPEC] [--word "red circle"] [--lift]
    python show.py search RUN "a red star" [TEXT ...] [--data SPEC]
    python show.py curves RUN [RUN ...] [--final]
    python show.py data SPEC

Each command draws one PNG (--out) and prints its main figures. Runs and sources are never changed.

Letters in shapes:  B images, N patches, S image size, D width, V vocabulary, Q texts.
"""

import argparse
import functools
import itertools
import math
import sys
import textwrap
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
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
from tqdm import tqdm

import data
import eval as evaluation
import run as runs
import sources
from caption import generate
from data import CenterCrop, Prepare
from run import Run, UserError
from sources import BadSample
from superclass import IDF, SuperClass
from tokenizer import ClipTokenizer, caption_labels, caption_tokens, load_tokenizer

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

    because m is the mean over n of the means of z_n: with the image's own s, the norm is linear.
    The rest, w . beta + b, belongs to no patch. A weighted sum of logits splits in the same way.

    Args:
        model: in evaluation mode.
        images: [B, 3, S, S], normalised.
        weights: [V] or [B, V], those of a weighted sum of logits; for one token, a one at its id.
    Returns:
        Shares [B, N] and constants [B], float32, that together sum to the weighted logits.
    """
    z = model.encoder(images).float()  # [B, N, D]
    with torch.autocast(images.device.type, enabled=False):
        w = weights.float() @ model.head.weight.float()  # [D] or [B, D]
        deviation = (z.mean(dim=1).var(dim=1, correction=0) + model.norm.eps).sqrt()  # [B]
        centred = (z - z.mean(dim=2, keepdim=True)) / deviation[:, None, None]  # [B, N, D]
        shares = (centred * (w * model.norm.weight).unsqueeze(-2)).sum(dim=2) / z.shape[1]
        constant = w @ model.norm.bias.float() + weights.float() @ model.head.bias.float()
    return shares, constant.expand(len(z))


def input_shares(model: SuperClass, images: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Each patch's share of a logit, split at the pixels, where a patch is still what it shows.

    Hold the attention, the deviations in the norms and the gates of the GELUs at the values that
    they have for this image (`Held`). Then the whole model is affine in its pixels, and a logit is
    the sum of gradient x pixel, plus what the held model returns for an image of zeros. This sum
    is exact, too, but conditional: it does not say how the attention would change without the
    patch. A pixel of the data's mean colour is zero and has no share.

    Args, returns: as for `output_shares`. In CNNs, a patch is the square of pixels at a token's
    place, and ReLU, max pooling and batch norm are affine in the same sense.
    """
    pixels = images.detach().float().requires_grad_()
    with torch.enable_grad(), torch.autocast(images.device.type, enabled=False), Held():
        tokens = model.encoder(pixels)  # [B, N, D]
        logits = model.head(model.norm(tokens.mean(dim=1)))  # [B, V]
        chosen = (logits * weights).sum(dim=1)  # [B]
        (gradient,) = torch.autograd.grad(chosen.sum(), pixels)
    by_pixel = (gradient * pixels).sum(dim=1).detach()  # [B, S, S]
    side, size = math.isqrt(tokens.shape[1]), images.shape[-1]
    rows = F.one_hot(torch.arange(size, device=images.device) * side // size).float()  # [S, side]
    shares = (rows.T @ by_pixel @ rows).flatten(1)  # [B, N]
    return shares, chosen.detach() - shares.sum(dim=1)


class Held(TorchFunctionMode):
    """Within this context, layer norm, GELU and attention are linear: their factors are constants.

    Values stay the same; gradients are those of the linear map.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        function = self.LINEAR.get(function, function)
        return function(*args, **(kwargs or {}))

    @staticmethod
    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        dims = tuple(range(-len(shape), 0))
        centred = x - x.mean(dims, keepdim=True)
        x = centred * (centred.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
        x = x if weight is None else x * weight
        return x if bias is None else x + bias

    @staticmethod
    def gelu(x, **kwargs):
        gate = F.gelu(x.detach(), **kwargs) / x.detach()
        return x * gate.nan_to_num(0.5)  # 0 / 0 at zero

    @staticmethod
    def attention(q, k, v):
        scores = q.detach() @ k.detach().transpose(-1, -2) * q.shape[-1] ** -0.5
        return scores.softmax(dim=-1) @ v

    LINEAR = {F.layer_norm: layer_norm, F.gelu: gelu, F.scaled_dot_product_attention: attention}


SHARES = {"input": input_shares, "output": output_shares}


class Word(NamedTuple):
    """A token as text, its probability for an image, and this over the token's frequency."""

    text: str
    id: int
    probability: float
    lift: float


def top_words(run: Run, logits: Tensor, number: int, lift: bool = False) -> list[Word]:
    """The `number` best tokens for the logits [V] of an image: by probability, or by lift.

    Lift is probability over frequency, the share of captions that contain the token. By lift,
    tokens less than a tenth as probable as the best are left out: their lift would be noise.
    """
    p, idf = log_probabilities(run, logits).exp().cpu(), run.idf
    frequency = (idf.df / idf.n.clamp(min=1)).cpu()
    lifts = torch.where(frequency > 0, p / frequency, 0.0)
    value = lifts * (p > p.max() / 10) if lift else p * (frequency > 0) if idf.n else p
    best = [i for i in value.argsort(descending=True)[:number].tolist() if value[i]]
    return [Word(spell(i, run.tokenizer), i, p[i].item(), lifts[i].item()) for i in best]


def log_probabilities(run: Run, logits: Tensor) -> Tensor:
    """The log-probabilities [V] of all tokens for logits [V], as the run's loss defines them."""
    return evaluation.LOG_PROBABILITY[run.config.loss](logits[None].float())[0]


def word_weights(run: Run, text: str) -> Tensor:
    """Weights [V] of a text's tokens: IDF, scaled to sum to one; UserError if none has any."""
    weights = evaluation.token_bags(run.idf, [caption_labels(text, run.tokenizer)]).to_dense()[0]
    if not weights.any():
        raise UserError(f"'{text}' has no token that occurs in some captions, but not in all")
    return weights.to(run.idf.df.device)


def spell(token: int, tokenizer) -> str:
    """A token as text. A hyphen marks the cut where it is only a piece of a word: "-ing".

    Pieces are never joined: a bag of tokens has no order, so a joined word would be a guess.
    """
    text = tokenizer.decode([token])
    if isinstance(tokenizer, ClipTokenizer):  # only the last piece of a word ends in a blank
        return text.strip() + ("" if text.endswith(" ") else "-")
    first = tokenizer.encode_ordinary(" a")
    after = tokenizer.decode([*first, token])[len(tokenizer.decode(first)) :]
    whole = caption_tokens(text, tokenizer) == [token] or not after[:1].isalpha()
    return (text.strip() or "(blank)") if whole else f"-{after}"


def show_words(args: argparse.Namespace) -> list[dict]:
    """The top words of images, and the patches that they come from."""
    run = load(args.run, args.device, (*runs.HEADS, "caption"))
    if args.image and args.data:
        raise UserError("give images or --data, not both")
    asked = [(text, word_weights(run, text)) for text in args.word or ()]
    files = sources.Files([(path, None, None, None) for path in args.image], None)
    source, limit = (files, None) if args.image else (run_source(run, args.data), args.number)
    views = [Prepare(CenterCrop(size)) for size in (TILE, run.config.image_size)]
    samples, _ = gather(source, limit, *views)
    if run.config.objective == "caption":
        return show_captions(args, run, samples)
    rows, found = [], []
    for raw, picture, view in samples:
        images = data.normalize(view.image[None].to(run.idf.df.device))
        with torch.inference_mode():
            logits = run.model.head(run.model.norm(run.model.features(images)))[0].float()  # [V]
        words = top_words(run, logits, 6, args.lift)
        units = F.one_hot(torch.tensor([word.id for word in words]), len(logits)).to(logits)
        maps, cells = [], []
        for text, weights in asked or [(words[i].text, units[i]) for i in range(len(words))][:3]:
            shares, constant = SHARES[args.at](run.model, images, weights)
            p = (weights @ log_probabilities(run, logits)).exp().item()
            maps.append((text, shares[0].tolist(), constant.item(), (weights @ logits).item()))
            draw = functools.partial(draw_map, pixels(picture), shares[0].numpy(force=True))
            cells.append((draw, [(f"{p:.1%}  {text}", INK)]))
        figures = [f"{w.probability:.0%}" for w in words]
        if args.lift:
            figures = [f"{w.lift:.1f}x" if w.lift < 100 else f"{w.lift:.0f}x" for w in words]
        bars = functools.partial(draw_bars, words, figures, args.lift)
        rows.append((name_of(raw), [(pixels(picture), []), (bars, []), *cells]))
        found.append({"image": name_of(raw), "words": words, "maps": maps})
        texts = (f"{word.text} {text}" for word, text in zip(words, figures, strict=True))
        print(f"{name_of(raw)}: {', '.join(texts)}")
    title = f"{args.run.resolve().name}: words and where they come from, split at the {args.at}"
    about = f"bars: probability{' over frequency' if args.lift else ''}; maps: orange speaks for "
    about += "the word, blue against it; grey: caption or file, which the model is not given"
    sheet(title, about, rows, 5, args.out)
    return found


def draw_bars(words: list[Word], figures: list[str], lift: bool, axes):
    """Words, bars and figures; the longest bar has length 1, so that all have room."""
    values = [word.lift if lift else word.probability for word in words]
    axes.set(xlim=(-1.9, 2.2), ylim=(5.5, -0.5))
    for i, (word, value) in enumerate(zip(words, values, strict=True)):
        length = value / max(values)
        text = word.text if len(word.text) < 12 else word.text[:10] + "..."
        axes.text(-1.9, i, text, va="center")
        axes.barh(i, length, 0.55, color=INK)
        axes.text(length + 0.1, i, figures[i], va="center", color=GREY, size=9)


def draw_map(picture: np.ndarray, shares: np.ndarray, axes):
    """Shares [N] as colours on a picture [S, S, 3] in grey; the strongest has full colour."""
    side, size = math.isqrt(len(shares)), len(picture)
    cells = np.arange(size) * side // size
    value = shares.reshape(side, side)[cells][:, cells, None]  # [S, S, 1]
    opacity = np.abs(value / max(np.abs(shares).max(), 1e-12)) ** 0.8
    grey = picture.mean(axis=2, keepdims=True)
    grey = 0.6 + 0.4 * (grey - grey.min()) / max(np.ptp(grey), 1)
    colour = np.where(value < 0, to_rgb(AGAINST), to_rgb(FOR))
    axes.imshow((1 - opacity + opacity * colour) * grey)  # the lines of the picture stay visible
    edges = np.arange(1, side) * size / side - 0.5
    for lines in (axes.hlines, axes.vlines):
        lines(edges, -0.5, size - 0.5, color="white", lw=0.4)


def show_captions(args: argparse.Namespace, run: Run, samples: list) -> list[dict]:
    """Images with the texts that a language model generates for them."""
    if args.word or args.lift:
        raise UserError(f"--word and --lift need a head over the vocabulary: {args.run} has none")
    asked = data.pad([caption_tokens(raw.question or "", run.tokenizer) for raw, *_ in samples])
    images = torch.stack([view.image for *_, view in samples]).to(run.idf.df.device)
    answers = generate(run.model, data.normalize(images), asked.to(images.device))
    texts = [run.tokenizer.decode(ids).strip() or "(empty)" for ids in answers]
    given = [f"{raw.question or ''} {name_of(raw)}".strip() for raw, *_ in samples]
    cells = []
    for (_, picture, _), text, name in zip(samples, texts, given, strict=True):
        cells.append((pixels(picture), [(text, INK), (name, GREY)]))
        print(f"{name}: {text}")
    about = "black: generated; grey: the question if there is one, and the image's caption or file"
    sheet(f"{args.run.resolve().name}: generated captions", about, [("", cells)], 6, args.out)
    return [{"image": name, "generated": text} for name, text in zip(given, texts, strict=True)]


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
    """Save a page of square cells.

    Args:
        rows: (heading, cells); longer rows are continued in the next one. A cell is a
            picture [S, S, 3] or a function that draws on axes, and [(text below it, colour), ...].
    """
    rows = [
        (heading * (i == 0), cells[i : i + columns])
        for heading, cells in rows
        for i in range(0, len(cells), columns)
    ]
    tile = (PAGE - 2 * MARGIN - GAP * (columns - 1)) / columns
    wrap = functools.partial(textwrap.wrap, width=int(tile / 7.2), max_lines=2, placeholder="...")
    most = max(len(texts) for _, cells in rows for _, texts in cells)
    head, under = 30 * any(heading for heading, _ in rows), 12 + 32 * most
    height = TOP + len(rows) * (tile + under + head)
    page = Figure((PAGE / 100, height / 100), dpi=100)
    page.text(MARGIN / PAGE, 1 - 10 / height, shorten(title, 75), size=13, va="top")
    page.text(MARGIN / PAGE, 1 - 37 / height, shorten(about, 150), size=9, va="top", color=GREY)
    box = {"left": MARGIN / PAGE, "right": 1 - MARGIN / PAGE, "bottom": under / height}
    box |= {"top": 1 - (TOP + head) / height}
    box |= {"wspace": GAP / tile, "hspace": (under + head) / tile}
    grid = page.subplots(len(rows), columns, squeeze=False, gridspec_kw=box)
    for axes in grid.flat:
        axes.set_axis_off()
    for (heading, cells), of_row in zip(rows, grid, strict=True):
        of_row[0].set_title(shorten(heading, 120), loc="left", size=10, color=GREY)
        for (content, texts), axes in zip(cells, of_row, strict=False):
            content(axes) if callable(content) else axes.imshow(content)
            y = -5 / tile
            for text, colour in texts:
                lines = wrap(text[:500])
                look = {"color": colour, "size": 9, "va": "top", "linespacing": 1.25}
                axes.text(0, y, "\n".join(lines), transform=axes.transAxes, **look)
                y -= 16 * len(lines) / tile
    save(page, out)


def save(page: Figure, path: Path):
    try:
        page.savefig(path, format="png", pil_kwargs={"optimize": True})
    except OSError as error:
        raise UserError(f"--out {path} cannot be written: {error.strerror or error}") from None


def load(folder: Path, device: str, objectives: tuple[str, ...] = runs.HEADS) -> Run:
    """A run of one of the objectives, by default those with a head over the vocabulary."""
    objective = runs.read_config(folder).objective
    if objective not in objectives:
        raise UserError(f"{folder} has no head over a vocabulary: its objective is {objective}")
    return runs.load_run(folder, runs.pick_device(device))


def run_source(run: Run, spec: str | None):
    """The source that --data names, or else the one that the run is evaluated on."""
    config = run.config
    return sources.load_source(spec or config.val_data or config.data, "val", config.data_root)


def gather(source, limit: int | None, *prepares: Prepare) -> tuple[list[tuple], list[BadSample]]:
    """Up to `limit` good samples, each with what `prepares` make of it, and the bad ones."""
    good, bad = [], []
    for i, (_, raw) in enumerate(itertools.chain(*source.once(0, 1, 256, limit))):
        made = [prepare(raw, (i,)) for prepare in prepares]
        failed = isinstance(made[-1], BadSample)
        (bad if failed else good).append(made[-1] if failed else (raw, *made))
    examples = "; ".join({item.kind: str(item) for item in bad}.values())
    found = f"{data.describe(Counter(item.kind for item in bad))} ({examples})"
    if not good:
        raise UserError(f"no image found: of {len(bad)} samples none can be used: {found}")
    if bad:
        print(f"skipped {found}", file=sys.stderr)
    return good, bad


def name_of(raw: sources.Raw) -> str:
    """The caption of a sample; if it has none, the name of its image file."""
    try:
        return sources.read_caption(raw.caption)
    except BadSample:
        return raw.image.name if isinstance(raw.image, Path) else ""


def pixels(sample: sources.Sample) -> np.ndarray:
    return sample.image.permute(1, 2, 0).numpy()


# ------------------------------------------------------------------------------------------------
# Search.


@torch.inference_mode()
def search(run: Run, source, texts: list[str]) -> tuple[Tensor, list]:
    """Scores [B, Q] of a source's images for texts, as in zero-shot, and the images' places."""
    bags = evaluation.token_bags(run.idf, [caption_labels(text, run.tokenizer) for text in texts])
    skipped = Counter()
    view, scores, places = Prepare(CenterCrop(run.config.image_size)), [], []
    stream = data.batches(data.OnePass(source, view, evaluation.BATCH), 2, run.idf.df.device)
    for batch in tqdm(stream, unit=f" x {evaluation.BATCH} images", leave=False):
        skipped.update(bad.kind for bad in batch.bad)
        if len(batch.images):
            features = run.model.features(data.normalize(batch.images))
            scores.append(evaluation.score_bags(run, features, bags))
            places += batch.places
    data.refuse_if_bad(len(places), skipped)
    if not places:
        raise UserError("no image found: the source is empty")
    if skipped:
        print(f"skipped {data.describe(skipped)}", file=sys.stderr)
    return torch.cat(scores), places


def show_search(args: argparse.Namespace) -> dict[str, list]:
    """The best images of a source for each text."""
    run, found, rows = load(args.run, args.device), {}, []
    for text in args.text:
        word_weights(run, text)  # report unknown words before the slow part
    source = run_source(run, args.data)
    scores, places = search(run, source, args.text)
    best = scores.topk(min(args.number, len(scores)), dim=0)
    hits = sorted({places[i] for i in best.indices.flatten().tolist()})
    if isinstance(source, sources.Shards):  # read a shard with several hits only once
        source.read = functools.lru_cache(maxsize=1)(source.read)
    raws = {place: source.raw(place) for place in hits}
    pictures = {place: Prepare(CenterCrop(TILE))(raw) for place, raw in raws.items()}
    for q, text in enumerate(args.text):
        chosen = zip(best.indices[:, q].tolist(), best.values[:, q].exp().tolist(), strict=True)
        chosen = [(places[i], value) for i, value in chosen]
        found[text] = [(name_of(raws[place]), value) for place, value in chosen]
        captions = [(f"{value:.1%}  {name}", INK) for name, value in found[text]]
        shown = (pixels(pictures[place]) for place, _ in chosen)
        rows.append((f'"{text}"', [*zip(shown, ([caption] for caption in captions), strict=True)]))
        print(f"{text}:", *(caption for caption, _ in captions), sep="\n  ")
    title = f"{args.run.resolve().name}: the best of {len(scores):,} images for a text"
    about = "percentage: mean probability of the text's tokens; then the image's caption or file"
    sheet(title, about, rows, 6, args.out)
    return found


# ------------------------------------------------------------------------------------------------
# Curves. A point is (panel, line, images seen, value, deviation).

CURVES = {"loss": "loss", "lr": "learning rate", "images_per_s": "images a second"}


def show_curves(args: argparse.Namespace) -> dict[str, dict]:
    """Loss, speed and scores of runs over the images seen."""
    panels, styles = {}, {}
    for title, line, *point in (final_points if args.final else curve_points)(args.run):
        panels.setdefault(title, {}).setdefault(line, []).append(tuple(point))
        dash, colour = divmod(len(styles), len(COLOURS))
        look = {"color": COLOURS[colour], "linestyle": ["-", "--", ":"][dash % 3]}
        styles.setdefault(line, look | {"label": line})
    rows, below = math.ceil(len(panels) / 3), 34 + 18 * math.ceil(len(styles) / 3)
    height = 225 * rows + below
    page = Figure((PAGE / 100, height / 100), dpi=100)
    grid, drawn = page.subplots(rows, min(3, len(panels)), sharex=True, squeeze=False), {}
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
        for line, points in lines.items():
            x, y, deviation = zip(*sorted(points), strict=True)
            marker = "" if title in CURVES.values() and x[1:] else "o"
            drawn[line] = axes.errorbar(x, y, deviation, ms=4, marker=marker, **styles[line])
            print(f"{line}: {title} {y[-1]:.4g} after {x[-1]:,} images")
        if title not in CURVES.values() and axes.dataLim.y1 <= 1:
            axes.set_ylim(0, 1.05)
        if args.final:
            axes.set_xscale("log")
            axes.set_xticks(sorted({x for points in panels[title].values() for x, *_ in points}))
            axes.minorticks_off()
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_title(title)
        axes.tick_params(labelbottom=True)
    page.legend(handles=[*drawn.values()], loc="lower center", ncols=3)
    page.text(0.5, below / height, "images seen", ha="center", va="top", size=9)
    page.tight_layout(rect=(0, below / height, 1, 1))
    save(page, args.out)
    return panels


def curve_points(folders: list[Path]) -> Iterator[tuple]:
    """Training and all evaluations of runs; a line is a run."""
    for folder in folders:
        batch_size = runs.read_config(folder).batch_size
        metrics = runs.read_jsonl(folder / "metrics.jsonl")
        if not metrics:
            raise UserError(f"{folder} has no line in its metrics.jsonl yet")
        for (key, title), line in itertools.product(CURVES.items(), metrics):
            yield title, str(folder), line["samples"], line[key], 0
        for row in runs.own_rows(folder):
            name = f"{evaluation.task_name(row)} {row.get('attribute', '')}".strip()
            scores = {f"{name} {key}": row[key] for key in row if isinstance(row[key], float)}
            for title, value in ({name: row["top1"]} if "top1" in row else scores).items():
                yield title, str(folder), row["step"] * batch_size, value, 0


def final_points(folders: list[Path]) -> Iterator[tuple]:
    """Final scores of whole runs, as in the paper's Figure 2: means over the seeds of a group.

    A line is an objective and a model.
    """
    names = {}
    for name, group in evaluation.grouped(folders).items():
        config, scores = group[0]
        line = f"{config.objective} {config.model}"
        other = names.setdefault((line, config.samples), name)
        if other != name:
            raise UserError(f"'{other}' and '{name}' would be one point: {line}, {config.samples}")
        tasks = {task for task in scores if all(task in found for _, found in group)}
        if not tasks - {*evaluation.COSTS}:
            raise UserError(f"'{name}' has no score of the end that all its runs have")
        for task in (task for task in scores if task in tasks - {*evaluation.COSTS}):
            mean, deviation = evaluation.mean_and_deviation([found[task] for _, found in group])
            yield task, line, config.samples, mean, deviation or 0


# ------------------------------------------------------------------------------------------------
# A source's data.


def show_data(args: argparse.Namespace) -> dict[str, list]:
    """A source as training would see it: augmented samples, captions, labels, bad samples."""
    source = sources.load_source(args.data, "train", args.data_root, args.class_names)
    tokenizer = load_tokenizer(args.tokenizer, source.captions(50_000))
    view = data.Augment(args.image_size, args.min_scale, args.flip, args.color_jitter)
    samples, bad = gather(source, 1000, Prepare(view, tokenizer, args.seed, args.drop_stopwords))
    captions = [name_of(raw) for raw, _ in samples]
    tokens = [caption_tokens(c, tokenizer, 10**6, args.drop_stopwords) for c in captions]
    labels = [list(dict.fromkeys(sample.tokens)) for _, sample in samples]
    numbers = {
        "words of a caption": [len(caption.split()) for caption in captions],
        "tokens of a caption": list(map(len, tokens)),
        "labels of an image": list(map(len, labels)),
        "shorter side, pixels": [min(data.open_image(raw.image).size) for raw, _ in samples],
    }
    shares = (0, 0.05, 0.5, 0.95, 1)
    quantiles = [["quantiles", "least", "5%", "median", "95%", "most"]]
    quantiles += [[key, *np.quantile(n, shares, method="nearest")] for key, n in numbers.items()]
    skipped = [["bad samples", f"of {len(samples) + len(bad)}"]]
    skipped += Counter(item.kind for item in bad).items()
    skipped += [("captions cut to 77 tokens", sum(len(ids) > 77 for ids in tokens))]
    idf, frequent = IDF(tokenizer.n_vocab), [["frequent tokens", "of captions", "IDF"]]
    idf.update(data.pad(labels))
    for i in idf.df.argsort(descending=True, stable=True)[: min(16, idf.df.count_nonzero())]:
        figures = f"{idf.df[i] / idf.n:.1%}", f"{idf.weights()[i]:.2f}"
        frequent.append([spell(i.item(), tokenizer), *figures])
    cells = []
    for i in np.linspace(0, len(samples), min(args.number, len(samples)), False, dtype=int):
        names = ", ".join(spell(token, tokenizer) for token in labels[i])
        cells.append((pixels(samples[i][1]), [(captions[i], INK), (names, AGAINST)]))
    about = f"views of {args.image_size} px as in training; captions; in blue their labels, the "
    about += f"tokens of {args.tokenizer}, where -x is a piece inside a word"
    sheet(f"{args.data}: {source}", about, [("", cells)], 6, args.out)
    for table in (quantiles, skipped, frequent):
        for first, *rest in table:
            print(f"{first:<26}", *(f"{cell:>11}" for cell in rest))
        print()
    return {"quantiles": quantiles, "skipped": skipped, "tokens": frequent}


# ------------------------------------------------------------------------------------------------
# Flags.


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Look at runs and sources.")
    commands = parser.add_subparsers(dest="command", required=True)
    style, count = argparse.ArgumentDefaultsHelpFormatter, runs.number(int, 1)

    def command(name: str, function: Callable) -> Callable:
        text = function.__doc__.splitlines()[0]
        sub = commands.add_parser(name, help=text, description=text, formatter_class=style)
        sub.set_defaults(function=function)
        sub.add_argument("--out", type=Path, default=Path(f"{name}.png"), help="the picture, a PNG")
        return sub.add_argument

    def run_flags(add: Callable):
        add("run", type=Path, help="the run's folder")
        add("--data", help="the source; default: what the run is evaluated on")
        add("--device", default="auto", help="auto, cuda, mps or cpu")

    add = command("words", show_words)
    run_flags(add)
    add("image", type=Path, nargs="*", help="image files, instead of a source")
    add("--number", type=count, default=4, help="samples of a source")
    add("--word", action="append", help="map this text instead of the top words; may be repeated")
    add("--lift", action="store_true", help="rank words by probability over frequency")
    add("--at", default="input", choices=tuple(SHARES), help="split there in the encoder")
    add = command("search", show_search)
    run_flags(add)
    add("text", nargs="+", help="what to look for; several texts, several answers")
    add("--number", type=count, default=6, help="images for each text")
    add = command("curves", show_curves)
    add("run", type=Path, nargs="+", help="folders of runs")
    add("--final", action="store_true", help="final scores over the length of finished runs")
    add = command("data", show_data)
    add("data", help=f"{', '.join(sources.BUILT_IN)}, a folder, a table, .tar shards")
    add("--number", type=count, default=12, help="samples to draw")
    runs.add_data_flags(add)
    return parser


def main(argv: list[str] | None = None):
    args = make_parser().parse_args(argv)
    try:
        if args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out}: pictures are written as PNG, name a .png file")
        if args.out.resolve() in {path.resolve() for path in getattr(args, "image", ())}:
            raise UserError(f"--out {args.out} is one of the images: name another file")
        args.function(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"the picture is {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
