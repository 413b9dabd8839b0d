"""From what `--data` names to batches of images and label sets.

A source holds samples: an image, a caption, classes. A tokenizer turns a caption into its label
set. Loaders draw, crop and join them into batches. Every augmentation is a pure function of the
seed and of the position in the stream, so a run can be killed anywhere and continued exactly, and
split over any number of processes and workers.

Nothing in the data is trusted: a sample that cannot be used becomes a `BadSample`, counted and
reported.

    python data.py SPEC        look at a source as training would see it

Letters in shapes:  B images,  S image size,  K tokens of a caption,  A attributes with classes.
"""

import atexit
import contextlib
import ctypes
import functools
import io
import itertools
import math
import multiprocessing
import os
import re
import signal
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2 as transforms
from tqdm import tqdm

from plugins import TABLE, UnknownName, UserError, find, names, number

# ------------------------------------------------------------------------------------------------
# Captions become label sets (section 3).


def caption_tokens(caption: str, tokenizer, max_tokens: int = 77) -> list[int]:
    """The ids of a caption's first `max_tokens` tokens: in order, repeats kept, no special ids."""
    return tokenizer.encode_ordinary(caption)[:max_tokens]


def caption_labels(caption: str, tokenizer, max_tokens: int = 77) -> list[int]:
    """The label set of a caption (section 3): the sorted, distinct ids of its `caption_tokens`."""
    return sorted(set(caption_tokens(caption, tokenizer, max_tokens)))


def load_tokenizer(spec: str, captions: Iterable[str] | None = None):
    """A tokenizer with `.encode_ordinary(text)`, `.decode(ids)` and `.n_vocab`.

    Args:
        spec: NAME or NAME:ARG of the shelf, such as "bpe:512", learned from `captions`, or "clip",
            the paper's; or a file of a type that has a name there.
    Raises:
        UserError: for an unknown spec, or an unusable or missing file.
    """
    (name, _, arg), ending = spec.partition(":"), Path(spec).suffix
    if name not in TABLE["tokenizer"] and ending in TABLE["tokenizer"]:
        name, arg = ending, spec
    return find("tokenizer", name)(arg, captions)


def save_tokenizer(tokenizer) -> tuple[bytes, dict]:
    """The content of a tokenizer's file, and the entries of config.json that go with it."""
    content, settings = tokenizer.save()
    kind = f"{type(tokenizer).__module__.removeprefix('plugins.')}.{type(tokenizer).__name__}"
    return content, {"tokenizer_kind": kind, **settings}


def read_tokenizer(content: bytes | Path, config: dict):
    """The tokenizer that `save_tokenizer` made this content, or file, and these entries of.

    Raises UserError when the file cannot be read or is damaged.
    """
    try:
        file, _, kind = config["tokenizer_kind"].partition(".")
        saved = content.read_bytes() if isinstance(content, Path) else content
        return find("tokenizer", file, kind).read(saved, config)
    except Exception as error:  # a plug-in may raise anything
        path = content if isinstance(content, Path) else ""
        raise UserError(f"tokenizer file {path} cannot be read or is damaged: {error}") from None


# ------------------------------------------------------------------------------------------------
# Samples.

IMAGE_TYPES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
UNREAD_TYPES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg")  # images, too
KINDS = ("missing image", "unreadable image", "missing caption", "unusable caption")
KINDS += ("unreadable row", "damaged shard", "unknown label")


class BadSample(Exception):
    """A sample that cannot be used: one of the KINDS, and a detail for the user."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(kind, printable(detail))
        self.kind, self.detail = self.args

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


class Raw(NamedTuple):
    """A sample as a source holds it. `targets` has one class per attribute."""

    image: Image.Image | bytes | Path | None
    caption: str | bytes | Path | BadSample | None  # a BadSample says why there is none
    targets: tuple[int, ...] = ()
    question: str | None = None  # what the caption answers, if it is an answer
    where: str = ""  # in which file of many samples, and which one there, for messages


class Sample(NamedTuple):
    """A sample as tensors are made of it."""

    image: Tensor | None  # uint8 [3, S, S]
    labels: list[int]  # the set of the caption's token ids
    targets: tuple[int, ...]
    reads: dict[str, list[int]] = {}  # what else the objective reads


def printable(text: object) -> str:
    """A short text for messages, whatever the data holds: file names need not be UTF-8."""
    text = str(text).encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= 300 else f"{text[:200]} ... {text[-95:]}"


def normal(text: str) -> str:
    """Unicode's form C: the same text has the same code points, whoever wrote it."""
    return unicodedata.normalize("NFC", text)


def read_part(part, what: str):
    """The image or caption of a Raw, its file's bytes for a Path; raises BadSample if missing."""
    try:
        if isinstance(part, Path):  # but to read a pipe might never end
            part = None if part.exists() and not part.is_file() else part.read_bytes()
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise BadSample(f"missing {what}", getattr(error, "strerror", error)) from None
    if part is None or isinstance(part, BadSample):
        raise part or BadSample(f"missing {what}")
    return part


def read_caption(caption: str | bytes | Path | BadSample | None) -> str:
    """A caption in normal form, without its last line's end; raises BadSample if it has none."""
    caption = read_part(caption, "caption")
    try:
        if isinstance(caption, bytes):
            caption = caption.decode("utf-8-sig")  # some editors begin a file with a mark
        caption.encode("utf-8")  # a table's text has surrogates in place of bad bytes
    except UnicodeError:
        raise BadSample("unusable caption", "not UTF-8") from None
    if not caption.strip():
        raise BadSample("unusable caption", "empty")
    return normal(caption.rstrip("\r\n"))


# ------------------------------------------------------------------------------------------------
# Sources.


class Start(NamedTuple):
    """Where a training stream starts."""

    samples: int = 0  # the samples that the whole run has seen
    lanes: int = 1  # the number of lanes, if the source has some, a property of the run
    places: dict[int, tuple[int, int, int]] = {}  # lane -> where it goes on


class Source:
    """Samples for training and evaluation. `attributes` is {attribute: [names of each class]}.

    What a source holds is a sample, good or bad, or counted in `left_out` under the rule by which
    it is neither (docs/data.md). Each kind of source defines:
        stream: the samples, good and bad, at the positions reader, reader + readers, ... of an
            endless stream, whose order depends only on the seed. Yields (Sample or BadSample,
            None), or, with lanes, (..., (lane, from where the lane goes on)).
        once: one reader's blocks of a single pass, as lists of (place, Raw or BadSample). What all
            readers have together does not depend on their number.
        raw: the sample at a place.
    """

    attributes: dict[str, list[list[str]]] = {}
    most_lanes = 0  # more lanes than this share some of the data; 0: no lanes, one order for all
    has_splits = False  # whether "val" is other data than "train"
    left_out: Counter = Counter()  # rule -> number; this one stays empty
    rows: list = []  # names or addresses in their order, which a resumed run must find again

    def captions(self, limit: int) -> Iterator[str]:
        """The questions and captions of the first `limit` samples, to learn a tokenizer."""
        samples = itertools.chain.from_iterable(self.once(0, 1, 1, None))
        for _, raw in itertools.islice(samples, limit):
            with contextlib.suppress(BadSample):
                caption = read_caption(getattr(raw, "caption", None))  # a BadSample has none
                yield f"{read_caption(raw.question)} {caption}" if raw.question else caption


class Pairs(Source):
    """A source of known length. Subclasses give `__len__` and `raw(i)`, a Raw or a BadSample."""

    def __str__(self) -> str:
        return f"{len(self):,} pairs"

    def stream(self, prepare: Callable, seed: int, reader: int, readers: int, start: Start):
        """Position p holds sample p mod N of pass p div N; each pass has its own order.

        A bad sample is followed by another for the same position, drawn from the seed and p.
        """
        N, current = len(self), -1
        for p in itertools.count(start.samples + (reader - start.samples) % readers, readers):
            if p // N != current:
                current = p // N
                order = np.random.default_rng((seed, current)).permutation(N)
            i = int(order[p % N])
            for attempt in itertools.count(1):
                item = prepare(self.raw(i), (p, attempt))
                yield item, None
                if isinstance(item, Sample):
                    break
                i = int(np.random.default_rng((seed, p, attempt)).integers(N))

    def once(self, reader: int, readers: int, block: int, limit: int | None):
        """Readers take turns. A limit takes evenly spaced samples: of all classes, if sorted."""
        n = min(limit or len(self), len(self))
        for first in range(reader * block, n, readers * block):
            chosen = (j * len(self) // n for j in range(first, min(first + block, n)))
            yield [(i, self.raw(i)) for i in chosen]


def read_class_names(path: str) -> list[list[str]]:
    """The file of --class-names: one class a line, its names separated by commas."""
    try:
        lines = normal(Path(path).read_text(encoding="utf-8-sig")).rstrip().split("\n")
    except (OSError, UnicodeError) as error:
        raise UserError(f"--class-names {path} cannot be read: {error}") from None
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if not names or not all(names):
        raise UserError(f"--class-names {path} must name a class on every line")
    return names


def load_source(
    spec: str, split: str = "train", root: str = "data", class_names: str | None = None
) -> Source:
    """Open what --data names, and say what of it is left out.

    Args:
        spec: a folder of images, or NAME or NAME:ARG of the shelf, where types of files, such as
            .csv and .tar, have names, too.
        split: "train" or "val"; only sources with `has_splits` tell them apart.
        root: where torchvision keeps its data sets.
        class_names: a file with the names of the classes, for sources that do not bring them.
    Raises:
        UserError: if there is no such source, or it holds nothing of its kind.
    """
    (name, _, arg), known = spec.partition(":"), TABLE["data"].keys()
    of_classes = read_class_names(class_names) if class_names else None
    endings = [name for name in known if name[0] == "."]

    def kind(name: str) -> str:
        return next((end for end in endings if name.lower().endswith(end)), "")

    try:
        if name not in known and os.path.isdir(spec):
            inside = {entry for entry in os.listdir(spec) if entry[0] != "."}
            shards = {f"*{kind(entry)}" for entry in inside if kind(entry)} & known
            if shards and any(entry.lower().endswith(IMAGE_TYPES) for entry in inside):
                raise UserError(f"{spec} holds both shards and images: give each its own folder")
            name, arg = next(iter(shards), "*"), spec
        elif name not in known and kind(spec):
            name, arg = kind(spec), spec
        source = find("data", name)(arg, split, root, of_classes)
    except (UnknownName, FileNotFoundError):
        what = f"the type of {spec} is not read" if os.path.exists(spec) else f"no source '{spec}'"
        use = f"{names('data')}, or a folder, table or shards that exist ({', '.join(endings)})"
        raise UserError(f"{what}: use {use}") from None
    except OSError as error:
        raise UserError(f"{spec} cannot be read: {error}") from None
    if source.left_out and os.environ.get("RANK", "0") == "0":
        say_once(f"{spec}: left out {describe(source.left_out)}")
    return source


say_once = functools.cache(lambda line: tqdm.write(printable(line), file=sys.stderr))


# ------------------------------------------------------------------------------------------------
# Images become tensors.

warnings.simplefilter("error", Image.DecompressionBombWarning)  # such an image is a bad sample

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, for RGB in 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # of several pictures, the first
# EXIF's orientations that are not upright, sideways from 5 on, and what turns them
TURNS = {i: Image.Transpose(n) for i, n in enumerate((0, 3, 1, 5, 4, 6, 2), 2)}


@contextlib.contextmanager
def decoding():
    """Decoders of untrusted bytes raise almost anything; here, a BadSample."""
    try:
        yield
    except Exception as error:
        raise BadSample("unreadable image", error) from None


def open_image(file: Image.Image | bytes | Path | None) -> Image.Image:
    """Open an image from memory or disk, reading only its header; raises BadSample if it cannot."""
    content = read_part(file, "image")
    if isinstance(content, Image.Image):
        return content
    with decoding():
        try:
            return Image.open(io.BytesIO(content), formats=FORMATS)
        except Image.UnidentifiedImageError:
            raise ValueError(f"{len(content)} bytes that are not {', '.join(FORMATS)}") from None


def upright(image: Image.Image) -> tuple[int, int, int]:
    """Width and height of an image as its camera was held, and its orientation: EXIF's, 1 to 8.

    Phones store pictures sideways and say so there. Raises BadSample if the image is damaged.
    """
    with decoding():
        if image.format == "PNG":  # its EXIF may come last
            image.load()
    turn = 1
    with contextlib.suppress(Exception):  # damaged EXIF is none
        turn = image.getexif().get(0x0112)
    turn = turn if turn in TURNS and image.format != "TIFF" else 1  # Pillow itself turns a TIFF
    return *(image.size[::-1] if turn > 4 else image.size), turn


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB: 16-bit images are scaled to 8 bits, transparent pixels become white."""
    level = image.info.get("transparency")
    if image.mode[0] in "IF":
        pixels = np.asarray(image)
        if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
            raise ValueError(f"pixels from {pixels.min()} to {pixels.max()}")  # black and white?
        grey = np.where(pixels == level, 255, pixels >> 8).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if isinstance(level, tuple) and max(level) > 255:  # of 16 bits; Pillow has made 8 of the pixels
        image.info["transparency"] = tuple(value >> 8 for value in level)
    if "A" in image.getbands() or level is not None:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resized_crop(image: Image.Image, box: tuple[float, ...], size: int) -> Image.Image:
    """The part `box` (left, top, right, bottom; pixels) of an image as size x size RGB, bicubic.

    The image is turned upright first. A JPEG is decoded at a half, a quarter or an eighth of its
    resolution if that still leaves `size` pixels across the box, which is several times faster.
    Raises BadSample if it is damaged.
    """
    width, height, turn = upright(image)
    wanted = min(box[2] - box[0], box[3] - box[1]) / size  # source pixels per output pixel
    if wanted >= 2:
        enough = math.ceil(width / wanted), math.ceil(height / wanted)
        image.draft(None, enough[::-1] if turn > 4 else enough)
    with decoding():
        image = to_rgb(image)
        image = image if turn == 1 else image.transpose(TURNS[turn])
        fx, fy = image.width / width, image.height / height
        box = (box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy)
        return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class Augment:
    """The training view (section 4): a random resized crop; if asked for, mirroring and colours.

    With a `min_scale` of 1 nothing is cut off at random: the view is evaluation's centre crop.
    `color_jitter` follows the paper's largest run (0.32 there): brightness, contrast and saturation
    of that strength and hue of a quarter of it, for 8 images in 10; 2 in 10 lose their colour.
    Draws from torch's default CPU generator, which the stream seeds for each sample.
    """

    def __init__(self, size: int, min_scale: float = 0.9, flip=False, color_jitter: float = 0.0):
        self.size, self.crop = size, transforms.RandomResizedCrop(size, (min_scale, 1.0))
        self.steps = [transforms.RandomHorizontalFlip()] if flip else []
        if color_jitter:
            strengths = (color_jitter, color_jitter, color_jitter, color_jitter / 4)
            self.steps.append(transforms.RandomApply([transforms.ColorJitter(*strengths)], p=0.8))
            self.steps.append(transforms.RandomGrayscale(0.2))

    def __call__(self, image: Image.Image) -> Image.Image:
        if self.crop.scale[0] == 1:
            image = CenterCrop(self.size)(image)
        else:
            width, height, _ = upright(image)
            shape = torch.empty(1, height, width, device="meta")  # all that `get_params` looks at
            top, left, height, width = self.crop.get_params(shape, self.crop.scale, self.crop.ratio)
            image = resized_crop(image, (left, top, left + width, top + height), self.size)
        for step in self.steps:
            image = step(image)
        return image


class CenterCrop:
    """The evaluation view: the largest centred square."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height, _ = upright(image)
        side = min(width, height)
        left, top = (width - side) / 2, (height - side) / 2
        return resized_crop(image, (left, top, left + side, top + side), self.size)


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB image as uint8 [3, S, S]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 with CLIP's mean and deviation, on the images' device."""
    mean, std = statistics(images.device)
    if images.device.type != "cpu":
        return images.float().div_(255).sub_(mean).div_(std)  # in place: half the time
    # The same bits by numpy: torch would wait four times for threads that loaders keep busy.
    x = np.divide(images.numpy(), 255, dtype=np.float32)
    x -= mean.numpy()
    x /= std.numpy()
    return torch.from_numpy(x)


@functools.cache
def statistics(device: torch.device) -> list[Tensor]:
    """MEAN and STD as [3, 1, 1], copied to the device once: each copy would wait for the GPU."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


# ------------------------------------------------------------------------------------------------
# From a raw sample to tensors.


class Prepare:
    """Turn a Raw into a Sample, or into a BadSample if it cannot be used.

    Args:
        view: maps a PIL image to an S x S one, such as `Augment`.
        tokenizer: for the captions; None leaves them out.
        seed: of the augmentation, together with the sample's key.
        reads: what an objective reads besides labels: "tokens", the caption's ids in order, and
            "questions".
    """

    def __init__(self, view: Callable, tokenizer=None, seed: int = 0, reads: tuple[str, ...] = ()):
        self.view, self.tokenizer, self.seed, self.reads = view, tokenizer, seed, reads

    def __call__(self, raw: Raw | BadSample, key: tuple[int, ...] = ()) -> Sample | BadSample:
        if isinstance(raw, BadSample):
            return raw
        try:
            caption = read_caption(raw.caption) if self.tokenizer else ""
            labels = self.encode(caption_labels, caption)
            # Nothing else draws from the process's own generator while a view is made.
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            image = to_tensor(self.view(open_image(raw.image)))
            question = raw.question and read_caption(raw.question)
            texts = {"tokens": caption, "questions": question}
            reads = {name: self.encode(caption_tokens, texts[name]) for name in self.reads}
            return Sample(image, labels, raw.targets, reads)
        except BadSample as bad:
            files = (str(part) for part in (raw.image, raw.caption) if isinstance(part, Path))
            where = ": ".join(filter(None, (raw.where, next(files, ""))))
            return BadSample(bad.kind, f"{where} {bad.detail}".strip())

    def encode(self, function: Callable, text: str | None) -> list[int]:
        ids = function(text, self.tokenizer) if text else []
        if text and not ids:
            raise BadSample("unusable caption", f"no known token in {text[:60]!r}")
        return ids


def seed_of(*numbers: int) -> int:
    """A seed for torch's generators that is a function of these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


# ------------------------------------------------------------------------------------------------
# Streams of batches.


class Batch(NamedTuple):
    """Samples as tensors, and what happened on the way to them."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B, K]: each row the set of its caption's token ids, padded with -1
    targets: Tensor  # int64 [B, A]
    reads: dict[str, Tensor]  # what else the objective reads: int64 [B, ...], padded with -1
    places: list  # of the samples: positions in a training stream, or places in a source
    bad: list[BadSample]  # skipped
    lanes: dict[int, tuple[int, int, int]]  # where each lane goes on after this batch

    def split(self, size: int) -> list["Batch"]:
        """The same samples in batches of `size`."""
        tensors = self.images, self.labels, self.targets, *self.reads.values()
        parts = zip(*(tensor.split(size) for tensor in tensors), strict=True)
        return [
            Batch(images, labels, targets, dict(zip(self.reads, reads, strict=True)), [], [], {})
            for images, labels, targets, *reads in parts
        ]


class Piece:
    """A worker's share of a batch, with one tensor of images, which is quick to send."""

    def __init__(self, samples: list[Sample], places: list, bad: list[BadSample], lanes: dict):
        images = [sample.image for sample in samples]
        self.images = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
        if get_worker_info():  # here, because torch would hide a failure and hang
            try:
                self.images.share_memory_()
            except RuntimeError as error:
                advice = "give the container more of it, or use --workers 0"
                raise UserError(f"shared memory is full ({error}): {advice}") from None
        self.samples = [sample._replace(image=None) for sample in samples]
        self.places, self.bad, self.lanes = places, bad, lanes


class TrainStream(IterableDataset):
    """One worker's pieces of the micro-batches of one process, endlessly.

    Position q of a process is position q x world + rank of the run. Worker w of W contributes the
    positions with q mod W = w to each micro-batch. So the samples of a micro-batch do not depend on
    the number of workers, nor those of a global batch on the number of processes. A UserError is
    yielded: raised here, it would reach the user as a worker's traceback.
    """

    def __init__(self, source, prepare, seed: int, micro_batch: int, rank: int, world: int, start):
        self.args = source, prepare, seed, micro_batch, rank, world, start

    def __iter__(self) -> Iterator[Piece | UserError]:
        source, prepare, seed, micro_batch, rank, world, start = self.args
        worker, workers = worker_id()
        stream = source.stream(prepare, seed, worker * world + rank, workers * world, start)
        try:
            for first in itertools.count(start.samples // world, micro_batch):
                mine = [q for q in range(first, first + micro_batch) if q % workers == worker]
                good, bad, lanes, in_a_row = [], [], {}, 0
                while len(good) < len(mine):
                    item, lane = next(stream)
                    is_good = isinstance(item, Sample)
                    (good if is_good else bad).append(item)
                    in_a_row = 0 if is_good else in_a_row + 1
                    if lane:
                        number, lanes[number] = lane[0], lane[1]
                    if in_a_row == 1000:
                        found = "; ".join({s.kind: str(s) for s in bad[-1000:]}.values())
                        raise UserError(f"not one of 1000 samples in a row can be used: {found}")
                yield Piece(good, mine, bad, lanes)
        except UserError as error:
            yield error


class OnePass(IterableDataset):
    """One pass over a source, for evaluation; a batch may hold no image."""

    def __init__(self, source, prepare: Prepare, batch_size: int, limit: int | None = None):
        self.args = source, prepare, batch_size, limit

    def __iter__(self) -> Iterator[Piece | UserError]:
        source, prepare, batch_size, limit = self.args
        try:
            for pairs in source.once(*worker_id(), batch_size, limit):
                items = [(place, prepare(raw)) for place, raw in pairs]
                good = {place: item for place, item in items if isinstance(item, Sample)}
                bad = [item for _, item in items if isinstance(item, BadSample)]
                yield Piece(list(good.values()), list(good), bad, {})
        except UserError as error:
            yield error


def worker_id() -> tuple[int, int]:
    """This worker's number, and the number of workers."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def batches(
    dataset: IterableDataset, workers: int, device: torch.device, micro_batches: int = 0
) -> Iterator[Batch]:
    """The batches of a dataset, on the device; raises the UserErrors that its workers send.

    With `micro_batches`, the pieces that all workers made of so many are one batch: a process's
    share of a global batch. Otherwise each piece is one.
    """
    # A loader must be a child of this process to end with it; Python 3.14 starts them elsewhere.
    method = "fork" if workers and sys.platform == "linux" else None
    options = {"worker_init_fn": init_worker, "multiprocessing_context": method}
    if workers:  # while a GPU's queue is full this process waits, and they make a whole batch
        options["prefetch_factor"] = min(max(2, micro_batches), 8)
    pieces = iter(DataLoader(dataset, None, num_workers=workers, **options))

    def received() -> Iterator[Piece]:
        try:
            for piece in pieces:
                if isinstance(piece, UserError):
                    raise piece
                if workers and micro_batches > 1:  # shared memory is an open file: few may be open
                    piece.images = piece.images.clone()
                yield piece
        except (ConnectionError, EOFError) as error:  # it died while it handed its images over
            raise RuntimeError(f"DataLoader worker (pid unknown): {error!r}") from None

    stream = received()
    while some := list(itertools.islice(stream, max(1, micro_batches * max(1, workers)))):
        yield join(some, device)


def join(pieces: list[Piece], device: torch.device) -> Batch:
    """Pieces as one batch, in the order of the samples' places."""
    places = [place for piece in pieces for place in piece.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    samples = [sample for piece in pieces for sample in piece.samples]
    samples = [samples[i] for i in order]
    # numpy, because torch would wait for threads that the loaders keep busy.
    images = [piece.images.numpy() for piece in pieces if piece.samples] or [pieces[0].images]
    images = torch.from_numpy(np.concatenate(images)[order])
    # A set has no order, so its padding may stand anywhere; on the left it keeps the last bits of
    # the sums that runs so far were made of.
    labels = pad([sample.labels for sample in samples], left=True)
    targets = pad([sample.targets for sample in samples])
    reads = {n: pad([s.reads[n] for s in samples]) for n in (samples[0].reads if samples else ())}

    def move(x: Tensor) -> Tensor:
        """A GPU copies pinned memory while the CPU goes on."""
        is_pinned = device.type == "cuda"
        return (x.pin_memory() if is_pinned else x).to(device, non_blocking=is_pinned)

    images, labels, targets = move(images), move(labels), move(targets)
    reads = {name: move(x) for name, x in reads.items()}
    lanes = {lane: place for piece in pieces for lane, place in piece.lanes.items()}
    bad = [sample for piece in pieces for sample in piece.bad]
    return Batch(images, labels, targets, reads, [places[i] for i in order], bad, lanes)


def pad(rows: list[list[int]], left: bool = False) -> Tensor:
    """Lists of token ids -> int64 [B, K], padded with -1."""
    longest = max(map(len, rows), default=0)
    ids = np.full((len(rows), longest), -1)  # one tensor per row would take ten times as long
    for i, row in enumerate(rows):
        first = longest - len(row) if left else 0
        ids[i, first : first + len(row)] = row
    return torch.from_numpy(ids)


def init_worker(worker: int):
    """Leave signals to the main process, which finishes its step and saves; and end with it."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform == "linux":  # elsewhere torch's own watch ends a loader that is not sending
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def forget_loaders():
    """Let no other loader's end interrupt what comes now."""
    if hasattr(signal, "SIGCHLD"):  # for which torch has a handler that raises; not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


@atexit.register
def kill_loaders():
    """Python's own end would send them SIGTERM, which they ignore, and wait for ever."""
    forget_loaders()
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def describe(counts: Counter) -> str:
    """Counts by reason in words, the most frequent ones first."""
    some = [f"{n} x {reason}" for reason, n in counts.most_common(8) if n]
    return ", ".join(some + [f"{len(counts) - 8} more"] * (len(counts) > 8))


def refuse_if_bad(good: int, skipped: Counter, enough: int = 0):
    """Raise UserError if more than a tenth of the samples, of at least `enough`, cannot be used."""
    bad = skipped.total()
    if good + bad >= enough and bad > (good + bad) / 10:
        found = f"{bad} of {good + bad} samples cannot be used, more than a tenth"
        raise UserError(f"{found}: {describe(skipped)}")


# ------------------------------------------------------------------------------------------------
# What the three commands share.

NO_MEMORY = MemoryError, torch.OutOfMemoryError
NO_MEMORY_SAID = "out of memory|can't allocate memory|not enough memory"  # MPS; CPU; Windows' CPU


@contextlib.contextmanager
def one_sentence():
    """Report a mistake of the user in one sentence, with exit status 2 and without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):  # as standard error is: file names need not be UTF-8
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:  # `head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)  # as after SIGPIPE
    except KeyboardInterrupt:
        forget_loaders()
        tqdm.write("interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except UserError as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        reason = str(error).partition("\n")[0]
        # torch raises this when a loader dies, wherever the main process is at that time.
        if "DataLoader worker (pid" in reason:
            forget_loaders()
            message = f"a DataLoader worker died ({reason}): if memory ran out, use fewer --workers"
        elif isinstance(error, NO_MEMORY) or re.search(NO_MEMORY_SAID, reason):
            advice = "train with a smaller --micro-batch or with --grad-checkpointing"
            message = f"memory ran out ({reason:.200}): {advice}"
        else:
            raise
    else:
        return
    tqdm.write(f"error: {message}", file=sys.stderr)  # on a line below the progress bar
    sys.exit(2)


def add_data_flags(add: Callable):
    """Flags that describe a source and how training sees it."""
    add("--data-root", default="data", help="where torchvision keeps its data sets")
    add("--class-names", help="file with one class a line, several names separated by commas")
    add("--tokenizer", default="bpe:512", help=f"{names('tokenizer')}, or a file")
    add("--image-size", type=number(int, 1), default=32, help="pixels")
    add("--min-scale", type=number(float, 0, 1), default=0.9, help="smallest area of a random crop")
    add("--flip", action="store_true", help="mirror half of the images")
    add("--color-jitter", type=number(float, 0, 1), default=0.0, help="strength; the paper: 0.32")
    add("--seed", type=number(int, 0, 2**63 - 1), default=0)


def main(argv: list[str] | None = None):
    with one_sentence():
        find("task", "look")(argv)


if __name__ == "__main__":
    import data  # plug-ins import this module by its name

    data.main()
