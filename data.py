"""Data: images become uint8 tensors, captions sets of token ids, sources become streams.

Three things live here, in this order: decoding and cropping of images, the sources of `--data`
(`load_source`), and the endless training stream and the finite evaluation pass over them. The
labels themselves are made in `tokenizer.py`, and the default pictures drawn in `shapes.py`.

One rule holds everywhere: the order of samples and every augmentation is a pure function of the
seed and the position in the stream, never of the state of a process. So a run can be killed
anywhere and continued exactly, and split over processes without changing (for shards: over any
processes with the same number of readers in all, processes x workers).

Nothing from data is trusted: archives are read and never extracted, only JPEG, PNG and WebP
decoders are used, and a sample that cannot be used raises `BadSample`, is counted by kind and
reported.

Letters in the shapes:  B images,  S image size,  K tokens of a caption,  A attributes with classes.
"""

import contextlib
import csv
import functools
import io
import itertools
import json
import math
import re
import signal
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import fsspec
import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2 as transforms

import shapes
from shapes import pick
from tokenizer import UserError, caption_labels
from tokenizer import load_tokenizer as load_tokenizer  # for those who look for it here

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `open_image` refuses such images


class BadSample(Exception):
    """A sample that cannot be used, of one of the KINDS."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(f"{kind}: {detail}" if str(detail) else kind)
        self.kind, self.detail = kind, str(detail)

    def of(self, raw: "Raw") -> "BadSample":
        """The same with the name of the file, where the sample is one and it is not told yet."""
        file = next((str(part) for part in raw[:2] if isinstance(part, Path)), "")
        if file not in self.detail:
            return BadSample(self.kind, f"{file} {self.detail}".strip())
        return self


KINDS = (
    "missing image",
    "empty image file",
    "not a JPEG, PNG or WebP image",
    "damaged image",
    "image of absurd dimensions",
    "missing caption",
    "empty caption",
    "caption that is not UTF-8",
    "caption without a known token",
    "unreadable row",
    "shard member that is not a file",
    "shard member with an unsafe name",
    "damaged shard",
    "unknown label",
)


# ------------------------------------------------------------------------------------------------
# Images become tensors.

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, for RGB in 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(file: Image.Image | bytes | Path) -> Image.Image:
    """Open an image from memory or disk, reading its header only; BadSample when that fails."""
    if isinstance(file, Image.Image):
        return file
    name = file if isinstance(file, Path) else ""
    try:
        if isinstance(file, Path) and not file.is_file():
            raise BadSample("missing image", name)
        content = file.read_bytes() if isinstance(file, Path) else file
    except OSError as error:
        raise BadSample("missing image", f"{name} {error.strerror}") from None
    if not content:
        raise BadSample("empty image file", name)
    try:
        image = Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Image.UnidentifiedImageError:
        raise BadSample("not a JPEG, PNG or WebP image", name) from None
    except Image.DecompressionBombError:
        raise BadSample("image of absurd dimensions", name) from None
    except Exception as error:  # decoders of untrusted bytes raise nearly anything
        raise BadSample("damaged image", f"{name} {error}") from None
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise BadSample("image of absurd dimensions", f"{name} {image.width} x {image.height}")
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB: 16-bit is scaled to 8, and what is transparent becomes white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def resized_crop(
    image: Image.Image, box: tuple[float, float, float, float], size: int
) -> Image.Image:
    """The part `box` (left, top, right, bottom; pixels) of an image as size x size RGB, bicubic.

    A JPEG is decoded at a half, a quarter or an eighth of its resolution where that still holds
    `size` pixels across the box, which is several times faster; then it is resized in one step.
    """
    width, height = image.size
    wanted = min(box[2] - box[0], box[3] - box[1]) / size  # pixels there for one pixel here
    if wanted >= 2:
        image.draft(None, (math.ceil(width / wanted), math.ceil(height / wanted)))
    fx, fy = image.width / width, image.height / height
    try:
        image = to_rgb(image)
    except Exception as error:  # as above
        raise BadSample("damaged image", error) from None
    box = (box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


class Augment:
    """The training view: a random resized crop (section 4); on demand flips, colours, grey.

    Draws from torch's default CPU generator, which the stream seeds for each sample.
    """

    def __init__(self, size: int, min_scale=0.9, flip=False, color_jitter=0.0, grayscale=0.0):
        self.size, self.scale = size, (min_scale, 1.0)
        steps = []
        if flip:
            steps.append(transforms.RandomHorizontalFlip())
        if color_jitter:  # the paper's largest run: 0.32, a quarter of that for the hue, p 0.8
            jitter = transforms.ColorJitter(
                color_jitter, color_jitter, color_jitter, color_jitter / 4
            )
            steps.append(transforms.RandomApply([jitter], p=0.8))
        if grayscale:
            steps.append(transforms.RandomGrayscale(grayscale))
        self.rest = transforms.Compose(steps) if steps else None

    def __call__(self, image: Image.Image) -> Image.Image:
        top, left, height, width = transforms.RandomResizedCrop.get_params(
            image, self.scale, (3 / 4, 4 / 3)
        )
        image = resized_crop(image, (left, top, left + width, top + height), self.size)
        return self.rest(image) if self.rest else image


class CenterCrop:
    """The evaluation view: the largest centred square."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return resized_crop(image, (left, top, left + side, top + side), self.size)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 [B, 3, S, S] -> float32, with CLIP's mean and deviation; on the images' device."""
    mean, std = statistics(images.device)
    return (images.float() / 255 - mean) / std


@functools.cache
def statistics(device: torch.device) -> list[torch.Tensor]:
    """MEAN and STD as [3, 1, 1], copied to the device once: each copy would wait for the GPU."""
    return [torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD)]


# ------------------------------------------------------------------------------------------------
# From a raw sample to tensors.


class Raw(NamedTuple):
    """A sample as a source has it; files are pictures, bytes or paths, targets a class each."""

    image: Image.Image | bytes | Path | None
    caption: str | bytes | Path | None
    targets: tuple[int, ...] = ()


class Prepare:
    """Turn a Raw into (image uint8 [3, S, S], label ids, targets), or what fails into a BadSample.

    Args:
        view: from a PIL image to an S x S one, such as `Augment`.
        tokenizer: for the labels; None when captions are not wanted.
        seed: of the augmentation, together with the sample's key.
        encode: from a caption and the tokenizer to ids; a text tower needs them in their order.
    """

    def __init__(
        self, view: Callable, tokenizer=None, seed: int = 0, encode: Callable = caption_labels
    ):
        self.view, self.tokenizer, self.seed, self.encode = view, tokenizer, seed, encode

    def __call__(self, raw: Raw | BadSample, key: tuple[int, ...] = ()) -> tuple | BadSample:
        try:
            if isinstance(raw, BadSample):
                return raw
            labels = self.labels(raw.caption) if self.tokenizer else []
            if raw.image is None:
                raise BadSample("missing image")
            # Seeding the process's own generator is enough: nothing else draws from it meanwhile.
            state = np.random.SeedSequence((self.seed, *key)).generate_state(1, np.uint64)
            torch.default_generator.manual_seed(int(state[0]) >> 1)
            pixels = np.array(self.view(open_image(raw.image)))
            return torch.from_numpy(pixels).permute(2, 0, 1), labels, raw.targets
        except BadSample as error:
            return error.of(raw)

    def labels(self, caption: str | bytes | Path | None) -> list[int]:
        text = read_caption(caption)
        labels = self.encode(text, self.tokenizer)
        if not labels:
            raise BadSample("caption without a known token", repr(text[:60]))
        return labels


def read_caption(caption: str | bytes | Path | None) -> str:
    """The text of a caption; BadSample when there is none."""
    try:
        if isinstance(caption, Path):
            caption = caption.read_bytes()
        if isinstance(caption, bytes):
            caption = caption.decode("utf-8")
        if caption is None:
            raise BadSample("missing caption")
        caption.encode("utf-8")  # tables are read with surrogates in place of bad bytes
    except UnicodeError:
        raise BadSample("caption that is not UTF-8") from None
    except OSError:
        raise BadSample("missing caption", caption) from None
    if not caption.strip():
        raise BadSample("empty caption")
    return caption


def collate(samples: list[tuple]) -> dict[str, torch.Tensor]:
    """Stack samples: images uint8 [B, 3, S, S], labels [B, K] padded with -1, targets [B, A]."""
    images, labels, targets = zip(*samples, strict=True)
    rows = [torch.tensor(row, dtype=torch.int64) for row in labels]
    return {
        "images": torch.stack(images),
        "labels": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1),
        "targets": torch.tensor(targets, dtype=torch.int64).reshape(len(images), -1),
    }


# ------------------------------------------------------------------------------------------------
# Sources. Each has `.attributes`, what can be evaluated: {attribute: [names of each class]}.


class Pairs:
    """A source of known length. A subclass gives `__len__` and `raw(i)`, a Raw or a BadSample."""

    attributes: dict[str, list[list[str]]] = {}

    def __str__(self) -> str:
        return f"{len(self):,} pairs"

    def captions(self, limit: int) -> Iterator[str]:
        """The captions of `limit` samples, for a tokenizer to learn from, less the bad ones."""
        for i in range(min(limit, len(self))):
            with contextlib.suppress(BadSample):
                yield read_caption(getattr(self.raw(i), "caption", None))

    def stream(
        self, prepare: Prepare, seed: int, part: int, parts: int, block: int, start: "Start"
    ):
        """Part `part` of `parts` of the endless training stream.

        Position p of the whole holds sample p mod N of pass p div N, each pass in its own order.
        The parts take turns in blocks (micro-batches), so the whole does not depend on their
        number. A bad sample is followed by another in its place, drawn from the seed and p.

        Yields: prepared samples, good and bad, each with None for a position: `start` says it all.
        """
        N, current, order = len(self), -1, None
        for first in itertools.count(start.samples + part * block, parts * block):
            for p in range(first, first + block):
                if p // N != current:
                    current = p // N
                    order = np.random.default_rng((seed, current)).permutation(N)
                i, item = int(order[p % N]), None
                for attempt in itertools.count(1):
                    item = prepare(self.raw(i), (p, attempt))
                    yield item, None
                    if not isinstance(item, BadSample):
                        break
                    i = int(np.random.default_rng((seed, p, attempt)).integers(N))

    def once(self, prepare: Prepare, part: int, parts: int, block: int, limit: int | None):
        """Part `part` of `parts` of one pass: yields lists of prepared samples, good and bad.

        A limit takes samples evenly spaced: the first ones of a folder may all be of one class.
        """
        n = min(limit or len(self), len(self))
        for first in range(part * block, n, parts * block):
            chosen = (j * len(self) // n for j in range(first, min(first + block, n)))
            yield [prepare(self.raw(i)) for i in chosen]


class Start(NamedTuple):
    """Where a training stream starts: images seen so far, and for shards the place in each part."""

    samples: int = 0
    first_pass: int = 0
    places: dict[int, tuple[int, int, int]] = {}  # part: (pass, group, offset)


class Shapes(Pairs):
    """Pictures of a coloured shape with free-text captions, drawn when they are asked for."""

    attributes = shapes.ATTRIBUTES

    def __init__(self, split: str):
        self.split = split

    def __len__(self) -> int:
        return shapes.LENGTHS[self.split]

    def raw(self, i: int) -> Raw:
        scene = shapes.scene_of(i, self.split)
        caption = shapes.caption(scene)
        return Raw(shapes.draw(scene)[0], caption, (scene["shape"], scene["colour"]))

    def captions(self, limit: int) -> Iterator[str]:
        some = range(min(limit, len(self)))
        return (shapes.caption(shapes.scene_of(i, self.split)) for i in some)


TEMPLATES = """a photo of a {}|one {}|the {} in the picture|my favourite {}|{}|is this a {} ?
i found this {} yesterday|a small picture of a {}|a {} on a plain background|new {} for sale
{}, front view|a close look at the {}|just a {}|what a nice {}!|an old {}|{} seen from the side
there is a {} here|a {} and nothing else|low resolution {}|image 12 of 40: {}
the best {} of the year
a picture of the {} at home|buy the {} online today|this {} belongs to my friend|somebody's {}
{} in good condition|we sell a {} like this|photo: {}|you are looking at a {}|{} with free shipping
a typical {}|an unusual {}|size m {}|the label says {}|please rate my {}|a {} that i drew"""
TEMPLATES = TEMPLATES.replace("\n", "|").split("|")


class Labelled(Pairs):
    """A classified set of torchvision's; captions put the class's name into one of 36 templates."""

    NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}

    def __init__(self, spec: str, split: str, root: str):
        make = getattr(torchvision.datasets, self.NAMES[spec])
        try:
            try:
                self.set = make(root, train=split == "train", download=False)
            except RuntimeError:  # it is not there yet
                self.set = make(root, train=split == "train", download=True)
        except (RuntimeError, OSError) as error:
            folder = Path(root) / (getattr(make, "base_folder", None) or f"{make.__name__}/raw")
            raise UserError(
                f"{spec} is not complete in {folder} and could not be fetched ({error}): copy its "
                "files there as torchvision expects them, name another folder with --data-root, or "
                "use --data shapes, which needs no files"
            ) from None
        self.names = [name.lower().replace("_", " ").split("/") for name in self.set.classes]
        self.attributes = {"class": self.names}

    def __len__(self) -> int:
        return len(self.set)

    def caption(self, i: int) -> str:
        rng = np.random.default_rng(i)
        return pick(rng, TEMPLATES).format(pick(rng, self.names[int(self.set.targets[i])]))

    def raw(self, i: int) -> Raw:
        image, target = self.set[i]
        return Raw(image, self.caption(i), (target,))

    def captions(self, limit: int) -> Iterator[str]:
        return (self.caption(i) for i in range(min(limit, len(self))))


class SwappedCaptions(Pairs):
    """A source in which a share of the images carry another image's caption; always the same."""

    def __init__(self, source: Pairs, share: float):
        self.source, self.share = source, share
        self.attributes, self.captions = source.attributes, source.captions

    def __str__(self) -> str:
        return f"{self.source}, {self.share:.0%} of them with the caption of another"

    def __len__(self) -> int:
        return len(self.source)

    def raw(self, i: int) -> Raw | BadSample:
        raw, rng = self.source.raw(i), np.random.default_rng((i, len(self)))
        if rng.random() >= self.share or isinstance(raw, BadSample):
            return raw
        other = self.source.raw(int(rng.integers(len(self))))
        return other if isinstance(other, BadSample) else raw._replace(caption=other.caption)


class Classes:
    """The classes of a user's data: which number a label has, and its names.

    Without --class-names every label found is a class; with it, labels are its names or line
    numbers from 0. Folders may write a blank as an underscore.
    """

    def __init__(self, found: Iterable[str], names: list[list[str]] | None):
        found = sorted(set(found))
        self.names = names or [[label.replace("_", " ")] for label in found]
        self.numbers = {label: c for c, label in enumerate(found)}
        if names:
            self.numbers = {str(c): c for c in range(len(names))}
            self.numbers |= {name: c for c, aliases in enumerate(names) for name in aliases}
        for label in found:
            self.number(label)

    def number(self, label: str | None) -> tuple[int]:
        """The class of a label, -1 for none; UserError for one that is not among the classes."""
        if label is None:
            return (-1,)
        number = self.numbers.get(label, self.numbers.get(label.replace("_", " ")))
        if number is None:
            raise UserError(f"label '{label}' is not one of the {len(self.names)} of --class-names")
        return (number,)


class Files(Pairs):
    """Images on disk. A row is (image path, caption or its path, label), or None if unreadable."""

    def __init__(self, rows: list[tuple | None], names: list[list[str]] | None):
        self.rows = rows
        labels = {row[2] for row in rows if row and row[2] is not None}
        self.classes = Classes(labels, names)
        self.attributes = {"class": self.classes.names} if labels else {}

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, i: int) -> Raw | BadSample:
        if self.rows[i] is None:
            return BadSample("unreadable row", f"number {i + 1}")
        image, caption, label = self.rows[i]
        return Raw(image, caption, self.classes.number(label) if self.attributes else ())


def open_folder(root: Path, names: list[list[str]] | None) -> Files:
    """All images below a folder; the class of an image is the name of its own folder, if any."""
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    images = [path for path in files if path.suffix.lower() in IMAGE_TYPES]
    if not images:
        kinds = Counter(path.suffix or "no extension" for path in files)
        found = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)) or "no file at all"
        raise UserError(f"{root} holds no image ({', '.join(IMAGE_TYPES)}); found: {found}")
    rows = []
    for path in images:
        label = path.parent.name if path.parent != root else None
        rows.append((path, texts.get(path.with_suffix("")), label))
    for stem in sorted(texts.keys() - {path.with_suffix("") for path in images}):
        rows.append((None, texts[stem], None))
    return Files(rows, names)


def open_table(path: Path, names: list[list[str]] | None) -> Files:
    """A CSV, TSV or JSON-lines file: columns filepath, caption (or title) and optionally label."""
    rows, columns = [], []
    # surrogateescape carries bad bytes to `read_caption`, which counts their row.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        json_lines = path.suffix == ".jsonl"
        reader = csv.DictReader(lines, delimiter=delimiter)
        try:
            columns = [] if json_lines else list(reader.fieldnames or ())
            for record in map(parse_json, lines) if json_lines else reader:
                columns = columns or list(record or ())
                record = record or {}
                text = record.get("caption", record.get("title"))
                file, label = record.get("filepath"), record.get("label")
                label = None if label in (None, "") else str(label)
                rows.append((path.parent / file, text, label) if file else None)
        except csv.Error as error:
            raise UserError(f"{path} is no table: row {len(rows) + 2}: {error}") from None
    if "filepath" not in columns or not {"caption", "title", "label"} & set(columns):
        found = ", ".join(map(str, columns)) or "none"
        raise UserError(f"{path} needs the columns filepath and caption (or title); found: {found}")
    return Files(rows, names)


def parse_json(line: str) -> dict | None:
    """One JSON object whose path and caption are text, or None."""
    try:
        record = json.loads(line)
        texts = [record.get(key) for key in ("filepath", "caption", "title")]
    except (ValueError, AttributeError):
        return None
    return record if all(isinstance(text, str | None) for text in texts) else None


class Shards:
    """Webdataset shards: tar files in which KEY.jpg (png, webp), KEY.txt and KEY.cls lie together.

    Members are read as a stream and never extracted. Remote addresses go through fsspec. A group of
    GROUP shards is held in memory at a time, compressed, and its samples are mixed.
    """

    GROUP = 2
    TRIES = 5

    def __init__(self, spec: str, names: list[list[str]] | None):
        self.urls = expand_shards(spec)
        self.classes = Classes((), names)
        self.attributes = {"class": names} if names else {}

    def __str__(self) -> str:
        return f"{len(self.urls):,} shards"

    def read(self, url: str) -> list[Raw | BadSample]:
        """The samples of one shard; UserError when its address cannot be read in TRIES tries."""
        for attempt in range(1, self.TRIES + 1):
            try:
                with fsspec.open(url, "rb") as file:
                    return list(self.samples(file, url))
            except ImportError as error:
                raise UserError(f"{url} cannot be read without another package: {error}") from None
            except Exception as error:  # every file system of fsspec has its own
                if isinstance(error, FileNotFoundError) and "://" not in url:
                    raise UserError(f"there is no shard {url}") from None
                reason = f"{type(error).__name__} {error.__cause__ or error}"
                time.sleep(2**attempt / 2 if attempt < self.TRIES else 0)
        raise UserError(f"shard {url} could not be read in {self.TRIES} tries: {reason}")

    def samples(self, file: BinaryIO, url: str) -> Iterator[Raw | BadSample]:
        """Group the members of a tar file by their key: all up to the first dot of a name."""
        key, parts = None, {}
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if not member.isfile():
                        yield BadSample("shard member that is not a file", f"{path} in {url}")
                    elif path.is_absolute() or ".." in path.parts:
                        yield BadSample("shard member with an unsafe name", f"{path} in {url}")
                    else:
                        stem, _, kind = path.name.partition(".")
                        if (path.parent, stem) != key and parts:
                            yield self.sample(parts, f"{key[1]} in {url}")
                            parts = {}
                        key = path.parent, stem
                        parts[kind.lower()] = tar.extractfile(member).read()
        except tarfile.ReadError as error:
            parts = {}  # the sample in hand is cut off
            yield BadSample("damaged shard", f"{url} {error}")
        if parts:
            yield self.sample(parts, f"{key[1]} in {url}")

    def sample(self, parts: dict[str, bytes], where: str) -> Raw | BadSample:
        image = next((parts[kind[1:]] for kind in IMAGE_TYPES if kind[1:] in parts), None)
        if image is None or ("txt" not in parts and "cls" not in parts):
            missing = "missing image" if image is None else "missing caption"
            return BadSample(missing, f"{where} has only {', '.join(sorted(parts))}")
        label = parts["cls"].decode("utf-8", "replace").strip() if "cls" in parts else None
        try:
            targets = self.classes.number(label) if self.attributes else ()
        except UserError as error:
            return BadSample("unknown label", f"{where}: {error}")
        return Raw(image, parts.get("txt"), targets)

    def captions(self, limit: int) -> Iterator[str]:
        """The captions of the first `limit` samples, less the bad ones."""
        samples = (sample for url in self.urls for sample in self.read(url))
        for sample in itertools.islice(samples, limit):
            with contextlib.suppress(BadSample):
                yield read_caption(getattr(sample, "caption", None))

    def stream(self, prepare: Prepare, seed: int, part: int, parts: int, block: int, start: Start):
        """Part `part` of `parts` of the endless training stream.

        Each pass puts the shards in a new order and deals them out to the parts; where there are
        fewer shards than parts, every part reads all shards and keeps each `parts`-th sample.
        Within a pass no sample is in two parts.

        Yields: prepared samples, good and bad, each with (part, (pass, group, offset)), from where
        the
            part goes on after it.
        """
        # The loader asks its first worker first. On a resume the next micro-batch may belong to
        # another part, so the parts are shifted by the micro-batches that were used.
        part = (part + start.samples // block) % parts
        place = start.places.get(part, (start.first_pass, 0, 0))
        empty = 0
        for current in itertools.count(place[0]):
            order = np.random.default_rng((seed, current)).permutation(len(self.urls))
            split = len(self.urls) < parts
            mine = order if split else order[part::parts]
            groups = [mine[i : i + self.GROUP] for i in range(0, len(mine), self.GROUP)]
            for g in range(place[1], len(groups)):
                samples = None  # let go of the last group before the next one is read
                samples = [
                    (s, j, raw) for s in groups[g] for j, raw in enumerate(self.read(self.urls[s]))
                ]
                if split:
                    samples = samples[part::parts]
                mixed = np.random.default_rng((seed, current, part, g)).permutation(len(samples))
                for offset in range(place[2], len(samples)):
                    s, j, raw = samples[mixed[offset]]
                    empty = 0
                    yield prepare(raw, (current, int(s), j)), (part, (current, g, offset + 1))
                place = (current, g + 1, 0)
            place, empty = (current + 1, 0, 0), empty + 1
            if empty == 10:
                raise UserError(
                    f"{len(self.urls)} shards hold too few samples for {parts} readers (processes "
                    "x --workers): one of them got none in ten passes"
                )

    def once(self, prepare: Prepare, part: int, parts: int, block: int, limit: int | None):
        """Part `part` of `parts` of one pass: yields lists of prepared samples, good and bad."""
        samples = (raw for url in self.urls[part::parts] for raw in self.read(url))
        samples = itertools.islice(samples, limit and -(-limit // parts))
        while items := [prepare(raw) for raw in itertools.islice(samples, block)]:
            yield items


class StrictTarInfo(tarfile.TarInfo):
    """Raises for a header that is broken or cut off; tarfile takes that for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def expand_shards(spec: str) -> list[str]:
    """The shards that braces {00..99} or {a,b}, a glob, a folder or a remote address stand for."""
    braces = re.search(r"\{([^{}]*)\}", spec)
    if braces:
        first, dots, last = braces[1].partition("..")
        options = braces[1].split(",")
        if dots and first.isdecimal() and last.isdecimal():
            options = [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
        before, after = spec[: braces.start()], spec[braces.end() :]
        return [url for option in options for url in expand_shards(before + option + after)]
    remote = "://" in spec
    if not remote and Path(spec).is_dir():
        spec = str(Path(spec) / "*.tar")
    if "*" in spec:
        try:
            files, path = fsspec.url_to_fs(spec)
            found = sorted(files.glob(path))
        except Exception as error:  # every file system of fsspec has its own
            raise UserError(f"{spec} cannot be listed: {type(error).__name__} {error}") from None
        urls = [files.unstrip_protocol(name) for name in found] if remote else found
    else:
        urls = [spec] if remote or Path(spec).is_file() else []
    if not urls:
        raise UserError(f"there is no shard {spec}")
    return urls


def read_class_names(path: str | None) -> list[list[str]] | None:
    """The file of --class-names: a line for each class, its names between commas."""
    if path is None:
        return None
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--class-names {path} cannot be read: {error}") from None
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if not names or not all(names):
        raise UserError(f"--class-names {path} must name a class on every line")
    return names


BUILT_IN = ("shapes", *Labelled.NAMES)


def load_source(
    spec: str,
    split: str = "train",
    root: str = "data",
    class_names: str | None = None,
    caption_noise: float = 0.0,
):
    """Open what --data names.

    Args:
        spec: "shapes", "cifar10", "cifar100", "fashion-mnist"; a folder of images, a .csv, .tsv or
            .jsonl file; .tar shards as braces, a glob, a folder or a remote address.
        split: "train" or "val"; what is not built in is the same for both.
        root: where torchvision keeps its sets.
        class_names: a file with the names of the classes, for what is not built in.
        caption_noise: share of the images that get another image's caption, 0 to 1.
    Raises:
        UserError: when there is no such source, or nothing usable in it.
    """
    source = open_source(spec, split, root, class_names)
    if not caption_noise:
        return source
    if isinstance(source, Shards):
        raise UserError("--caption-noise needs a source of known length, which shards are not")
    return SwappedCaptions(source, caption_noise)


def open_source(spec: str, split: str, root: str, class_names: str | None):
    """The source of that name, as it is."""
    if spec == "shapes":
        return Shapes(split)
    if spec in Labelled.NAMES:
        return Labelled(spec, split, root)
    path, names = Path(spec), read_class_names(class_names)
    if spec.endswith(".tar") or (path.is_dir() and next(path.glob("*.tar"), None)):
        if path.is_dir() and any(file.suffix.lower() in IMAGE_TYPES for file in path.iterdir()):
            raise UserError(f"{path} holds both shards and images: give each a folder of its own")
        return Shards(spec, names)
    if path.is_dir():
        return open_folder(path, names)
    if path.suffix in (".csv", ".tsv", ".jsonl") and path.is_file():
        return open_table(path, names)
    raise UserError(
        f"no source '{spec}': use {', '.join(BUILT_IN)}, or a folder, a .csv, .tsv or .jsonl "
        "file or .tar shards that exist"
    )


# ------------------------------------------------------------------------------------------------
# Streams of batches.


class TrainStream(IterableDataset):
    """One process's endless stream of micro-batches, made by its workers in turn.

    A batch is what `collate` makes, with "skipped" (how many of each of KINDS), "examples" (a
    sentence for each kind) and "places" (of the shards' parts, after this batch). In place of a
    batch may come the sentence of a UserError: an exception would reach the user as a worker's
    traceback.
    """

    def __init__(self, source, prepare: Prepare, seed, micro_batch, rank, world, start: Start):
        self.args = source, prepare, seed, micro_batch, rank, world, start

    def __iter__(self):
        source, prepare, seed, micro_batch, rank, world, start = self.args
        worker, workers = worker_id()
        part, parts = worker * world + rank, workers * world
        good, bad = [], []
        try:
            for item, place in source.stream(prepare, seed, part, parts, micro_batch, start):
                (bad if isinstance(item, BadSample) else good).append(item)
                if len(good) == micro_batch:
                    yield (
                        collate(good) | count_bad(bad) | {"places": dict([place] if place else [])}
                    )
                    good, bad = [], []
                elif len(bad) == 1000 and not good:
                    kinds = "; ".join(count_bad(bad)["examples"].values())
                    raise UserError(f"not one of 1000 samples in a row could be used: {kinds}")
        except UserError as error:
            yield str(error)


class OnePass(IterableDataset):
    """One pass over a source, for evaluation, in batches as above; a batch may have no image."""

    def __init__(self, source, prepare: Prepare, batch_size: int, limit: int | None = None):
        self.args = source, prepare, batch_size, limit

    def __iter__(self):
        source, prepare, batch_size, limit = self.args
        try:
            for items in source.once(prepare, *worker_id(), batch_size, limit):
                bad = [item for item in items if isinstance(item, BadSample)]
                good = [item for item in items if not isinstance(item, BadSample)]
                yield (collate(good) if good else {}) | count_bad(bad)
        except UserError as error:
            yield str(error)


def batches(dataset: IterableDataset, workers: int, device: torch.device) -> Iterator[dict]:
    """The batches of a stream, loaded by worker processes; raises the UserErrors that they send."""
    pin = device.type == "cuda"
    for batch in DataLoader(
        dataset, None, num_workers=workers, pin_memory=pin, worker_init_fn=init_worker
    ):
        if isinstance(batch, str):
            raise UserError(batch)
        yield batch


def init_worker(worker: int):
    """Leave signals to the main process, which finishes its step and saves."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def worker_id() -> tuple[int, int]:
    """This worker's number, and the number of workers."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def count_bad(bad: list[BadSample]) -> dict:
    """How many bad samples of each of KINDS, and a sentence for each kind."""
    count = Counter(sample.kind for sample in bad)
    examples = {sample.kind: str(sample) for sample in reversed(bad)}
    return {"skipped": torch.tensor([count[kind] for kind in KINDS]), "examples": examples}


def tell_skipped(skipped: torch.Tensor) -> str:
    """Counts of KINDS in words."""
    return ", ".join(f"{n} x {kind}" for kind, n in zip(KINDS, skipped.tolist(), strict=True) if n)


def refuse_if_bad(good: int, skipped: torch.Tensor, enough: int = 0):
    """UserError when more than a tenth of the samples, `enough` at least, could not be used."""
    bad = int(skipped.sum())
    if good + bad >= enough and bad > (good + bad) / 10:
        raise UserError(
            f"{bad} of {good + bad} samples could not be used, which is more than a tenth: "
            f"{tell_skipped(skipped)}"
        )
