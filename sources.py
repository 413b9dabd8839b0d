"""Sources: what `--data` names, as samples with an image, a caption and classes.

`load_source` opens a built-in source, a folder, a table or tar shards. `data.py` turns the samples
into tensors. Nothing in the data is trusted: archives are read and never extracted, and a sample
that cannot be used becomes a `BadSample`, counted and reported.
"""

import contextlib
import csv
import glob
import itertools
import json
import re
import tarfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO, NamedTuple

import fsspec
import numpy as np
import torchvision
from PIL import Image
from torch import Tensor

import shapes
from shapes import pick
from tokenizer import UserError

IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp")
KINDS = ("missing image", "unreadable image", "missing caption", "unusable caption")
KINDS += ("unreadable row", "damaged shard", "unknown label")


class BadSample(Exception):
    """A sample that cannot be used: one of the KINDS, and a detail for the user."""

    def __init__(self, kind: str, detail: object = ""):
        super().__init__(kind, str(detail))
        self.kind, self.detail = self.args

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" if self.detail else self.kind


class Raw(NamedTuple):
    """A sample as a source holds it. `targets` has one class per attribute."""

    image: Image.Image | bytes | Path | None
    caption: str | bytes | Path | None
    targets: tuple[int, ...] = ()
    question: str | None = None  # what the caption answers, if it is an answer


class Sample(NamedTuple):
    """A sample with its image as uint8 [3, S, S] and its texts as token ids in order."""

    image: Tensor | None
    tokens: list[int]
    question: list[int]
    targets: tuple[int, ...]


def read_part(part, what: str):
    """The image or caption of a Raw, its file's bytes for a Path; raises BadSample if missing."""
    try:
        part = part.read_bytes() if isinstance(part, Path) else part
    except (OSError, ValueError) as error:  # the latter for a name that no file can have
        raise BadSample(f"missing {what}", getattr(error, "strerror", error)) from None
    if part is None:
        raise BadSample(f"missing {what}")
    return part


def read_caption(caption: str | bytes | Path | None) -> str:
    """The text of a caption; raises BadSample if there is none."""
    caption = read_part(caption, "caption")
    try:
        if isinstance(caption, bytes):
            caption = caption.decode("utf-8-sig")  # some editors begin a file with a mark
        caption.encode("utf-8")  # a table's text has surrogates in place of bad bytes
    except UnicodeError:
        raise BadSample("unusable caption", "not UTF-8") from None
    if not caption.strip():
        raise BadSample("unusable caption", "empty")
    return caption


# ------------------------------------------------------------------------------------------------
# Sources.


class Start(NamedTuple):
    """Where a training stream starts."""

    samples: int = 0  # the samples that the whole run has seen
    lanes: int = 1  # shards only: the number of lanes, a property of the run
    places: dict[int, tuple[int, int, int]] = {}  # shards only: lane -> (pass, group, offset)


class Source:
    """Samples for training and evaluation. `attributes` is {attribute: [names of each class]}.

    Each kind of source defines:
        stream: the samples, good and bad, at the positions reader, reader + readers, ... of an
            endless stream, whose order depends only on the seed. Yields (Sample or BadSample,
            None), or for shards (..., (lane, (pass, group, offset) from where the lane goes on)).
        once: one reader's blocks of a single pass, as lists of (place, Raw or BadSample). What all
            readers have together does not depend on their number.
        raw: the sample at a place.
    """

    attributes: dict[str, list[list[str]]] = {}

    def captions(self, limit: int) -> Iterator[str]:
        """The questions and captions of the first `limit` samples, to learn a tokenizer."""
        samples = itertools.chain.from_iterable(self.once(0, 1, 1, None))
        for _, raw in itertools.islice(samples, limit):
            with contextlib.suppress(BadSample):
                caption = read_caption(getattr(raw, "caption", None))  # a BadSample has none
                yield f"{raw.question} {caption}" if raw.question else caption


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


class Shapes(Pairs):
    """Pictures of a coloured shape, drawn when needed, with captions or questions and answers."""

    attributes = shapes.ATTRIBUTES

    def __init__(self, split: str, asks: bool = False):
        self.split, self.asks = split, asks

    def __len__(self) -> int:
        return shapes.LENGTHS[self.split]

    def raw(self, i: int) -> Raw:
        scene, question = shapes.scene_of(i, self.split), None
        text = shapes.caption(scene)  # always made: the picture's random numbers come after it
        if self.asks:
            question, text = shapes.question(scene)
        return Raw(shapes.draw(scene)[0], text, (scene["shape"], scene["colour"]), question)

    def captions(self, limit: int) -> Iterator[str]:
        scenes = (shapes.scene_of(i, self.split) for i in range(min(limit, len(self))))
        return (" ".join(shapes.question(s)) if self.asks else shapes.caption(s) for s in scenes)


TEMPLATES = """a photo of a {}|one {}|the {} in the picture|my favourite {}|{}|is this a {} ?
i found this {} yesterday|a small picture of a {}|a {} on a plain background|new {} for sale
{}, front view|a close look at the {}|just a {}|what a nice {}!|an old {}|{} seen from the side
there is a {} here|a {} and nothing else|low resolution {}|image 12 of 40: {}
the best {} of the year
a picture of the {} at home|buy the {} online today|this {} belongs to my friend|somebody's {}
{} in good condition|we sell a {} like this|photo: {}|you are looking at a {}|{} with free shipping
a typical {}|an unusual {}|size m {}|the label says {}|please rate my {}|a {} that i drew"""
TEMPLATES = re.split(r"[|\n]", TEMPLATES)


class Labelled(Pairs):
    """A classified set of torchvision's; captions put the class name into one of 36 templates."""

    NAMES = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}

    def __init__(self, spec: str, split: str, root: str):
        make = getattr(torchvision.datasets, self.NAMES[spec])
        try:  # files that are already there are not downloaded
            self.set = make(root, train=split == "train", download=True)
        except (RuntimeError, OSError) as error:
            folder = Path(root) / (getattr(make, "base_folder", None) or f"{make.__name__}/raw")
            raise UserError(
                f"{spec} could not be downloaded ({error}): copy its files to {folder} as "
                "torchvision expects them, or name another folder with --data-root"
            ) from None
        names = [name.lower().replace("_", " ").split("/") for name in self.set.classes]
        self.attributes = {"class": names}

    def __len__(self) -> int:
        return len(self.set)

    def raw(self, i: int) -> Raw:
        image, target = self.set[i]
        rng = np.random.default_rng(i)
        template, name = pick(rng, TEMPLATES), pick(rng, self.attributes["class"][target])
        return Raw(image, template.format(name), (target,))


def number_classes(names: list[list[str]]) -> dict[str | None, int]:
    """The class of each label: its names, and its number from 0; -1 without a label."""
    numbers = {None: -1} | {str(c): c for c in range(len(names))}
    for c, aliases in enumerate(names):
        numbers |= {name.replace("_", " "): c for name in aliases}
    return numbers


class Files(Pairs):
    """Images on disk, from rows of (image path, caption or its path, label, question) or None."""

    def __init__(self, rows: list[tuple | None], names: list[list[str]] | None):
        labels = {row[2] for row in rows if row} - {None}
        names = names or [[label] for label in sorted(labels)]  # by default each label is a class
        self.rows, self.numbers = rows, number_classes(names)
        self.attributes = {"class": names} if labels else {}
        if unknown := sorted(labels - self.numbers.keys()):
            raise UserError(f"label '{unknown[0]}' is not one of the {len(names)} of --class-names")

    def __len__(self) -> int:
        return len(self.rows)

    def raw(self, i: int) -> Raw | BadSample:
        if self.rows[i] is None:
            return BadSample("unreadable row", f"number {i + 1}")
        image, caption, label, question = self.rows[i]
        return Raw(image, caption, (self.numbers[label],) * len(self.attributes), question)


def open_folder(root: Path, names: list[list[str]] | None) -> Files:
    """All images below a folder; a subfolder's name is the class of its images.

    With `names`, folders of other names have no class: they may just sort the files.
    """
    files = sorted(path for path in root.rglob("*") if path.is_file())
    texts = {path.with_suffix(""): path for path in files if path.suffix.lower() == ".txt"}
    images = [path for path in files if path.suffix.lower() in IMAGE_TYPES]
    if not images:
        kinds = Counter(path.suffix or "no extension" for path in files)
        found = ", ".join(f"{n} x {kind}" for kind, n in kinds.most_common(5)) or "no file at all"
        raise UserError(f"{root} holds no image ({', '.join(IMAGE_TYPES)}); found: {found}")
    rows, known = [], number_classes(names) if names else None
    for path in images:
        label = path.parent.name.replace("_", " ") if path.parent != root else None
        label = label if known is None or label in known else None
        rows.append((path, texts.get(path.with_suffix("")), label, None))
    alone = sorted(texts.keys() - {path.with_suffix("") for path in images})
    return Files(rows + [(None, texts[stem], None, None) for stem in alone], names)


def open_table(path: Path, names: list[list[str]] | None) -> Files:
    """A CSV, TSV or JSON-lines file: filepath, caption (or title), optional label and question."""
    rows, columns = [], {}
    # surrogateescape carries bad bytes to `read_caption`, which reports their row.
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as lines:
        delimiter = "\t" if path.suffix == ".tsv" else ","
        records = csv.DictReader(lines, delimiter=delimiter, strict=True)
        try:
            for record in map(parse_json, lines) if path.suffix == ".jsonl" else records:
                columns |= dict.fromkeys(record)  # a JSON object may leave out what others have
                file, text = record.get("filepath"), record.get("caption", record.get("title"))
                label, question = record.get("label"), record.get("question")
                label = None if label in (None, "") else str(label).replace("_", " ")
                rows.append((path.parent / file, text, label, question) if file else None)
        except csv.Error as error:
            raise UserError(f"{path} is not a table: row {len(rows) + 2}: {error}") from None
    if "filepath" not in columns or not {"caption", "title", "label"} & columns.keys():
        found = ", ".join(map(str, columns)) or "none"
        raise UserError(f"{path} needs the columns filepath and caption (or title); found: {found}")
    return Files(rows, names)


def parse_json(line: str) -> dict:
    """One JSON object whose path, caption and question are text; an empty one if there is none."""
    with contextlib.suppress(ValueError, AttributeError, RecursionError):
        record = json.loads(line)
        texts = [record.get(key) for key in ("filepath", "caption", "title", "question")]
        if all(isinstance(text, str | None) for text in texts):
            return record
    return {}


class Shards(Source):
    """Webdataset shards: tar files in which KEY.jpg (png, webp), KEY.txt and KEY.cls lie together.

    Members are read as a stream and never extracted. Remote addresses go through fsspec.
    """

    GROUP = 2  # shards that a lane holds in memory at a time, compressed, to mix their samples
    DELAYS = (0, 1, 2, 4, 8)  # seconds before each try to read a shard

    def __init__(self, spec: str, names: list[list[str]] | None):
        self.urls = expand_shards(spec)
        self.numbers = number_classes(names or [])
        self.attributes = {"class": names} if names else {}

    def __str__(self) -> str:
        return f"{len(self.urls):,} shards"

    def read(self, url: str) -> list[Raw | BadSample]:
        """The samples of one shard; raises UserError if no try succeeds."""
        for delay in self.DELAYS:
            time.sleep(delay)
            try:
                with fsspec.open(url, "rb") as file:
                    return list(self.samples(file, url))
            except Exception as error:  # each file system of fsspec has its own
                reason = f"{type(error).__name__} {error.__cause__ or error}"
        raise UserError(f"shard {url} could not be read in {len(self.DELAYS)} tries: {reason}")

    def samples(self, file: BinaryIO, url: str) -> Iterator[Raw | BadSample]:
        """The samples of a tar file: its members grouped by their name up to its first dot."""
        last, parts = None, {}
        try:
            with tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar:
                for member in tar:
                    path = PurePosixPath(member.name)
                    if not member.isfile() or path.is_absolute() or ".." in path.parts:
                        yield BadSample("damaged shard", f"{url}: {path} is not a plain file")
                        continue
                    stem, _, kind = path.name.partition(".")
                    key = path.parent / stem
                    if parts and key != last:
                        yield self.sample(parts, f"{last} in {url}")
                        parts = {}
                    parts[kind.lower()] = tar.extractfile(member).read()
                    last = key
        except tarfile.ReadError as error:
            parts = {}  # the current sample is cut off
            yield BadSample("damaged shard", f"{url}: {error}")
        if parts:
            yield self.sample(parts, f"{last} in {url}")

    def sample(self, parts: dict[str, bytes], where: str) -> Raw | BadSample:
        image = next((parts[kind[1:]] for kind in IMAGE_TYPES if kind[1:] in parts), None)
        if image is None or not {"txt", "cls"} & parts.keys():
            missing = "missing image" if image is None else "missing caption"
            return BadSample(missing, f"{where} has only {', '.join(sorted(parts))}")
        label = parts["cls"].decode("utf-8-sig", "replace").strip() if "cls" in parts else None
        number = self.numbers.get(label and label.replace("_", " "))
        if self.attributes and number is None:
            return BadSample("unknown label", f"{where}: '{label}' is not one of --class-names")
        return Raw(image, parts.get("txt"), (number,) * len(self.attributes))

    def stream(self, prepare: Callable, seed: int, reader: int, readers: int, start: Start):
        """Position p holds the next good sample of lane p mod L, whoever reads the lane.

        So the stream is the same for any number of readers that divides L.
        """
        lanes = [self.lane(prepare, seed, lane, start) for lane in range(start.lanes)]
        for p in itertools.count(start.samples + (reader - start.samples) % readers, readers):
            item = None
            while not isinstance(item, Sample):
                item, place = next(lanes[p % start.lanes])
                yield item, (p % start.lanes, place)

    def lane(self, prepare: Callable, seed: int, lane: int, start: Start):
        """One lane's endless samples, good and bad, with the place after each of them.

        Each pass deals the shards to the lanes in a new order. With fewer shards than lanes, some
        lanes share a shard: each of them reads it and keeps every n-th sample.
        """
        S, L = len(self.urls), start.lanes
        # Lanes lane % S, lane % S + S, ... read the same shards; this is number `share` of them.
        share, sharers = lane // S, len(range(lane % S, L, S))
        first = start.places.get(lane, (0, 0, 0))
        last = first[0]  # the last pass with a sample
        for number in itertools.count(first[0]):
            if number == last + 10:
                raise UserError(
                    f"{S} shards hold too few samples for {L} lanes: lane {lane} found none in ten "
                    "passes; start with fewer processes, --workers or --lanes"
                )
            mine = np.random.default_rng((seed, number)).permutation(S)[lane % S :: L].tolist()
            groups = [mine[i : i + self.GROUP] for i in range(0, len(mine), self.GROUP)]
            for group, numbers in enumerate(groups):
                if (number, group) < first[:2]:
                    continue
                samples = None  # free the last group before the next one is read
                samples = [
                    (s, j, raw)
                    for s in numbers
                    for j, raw in enumerate(self.read(self.urls[s]))
                    if j % sharers == share
                ]
                mixed = np.random.default_rng((seed, number, lane, group)).permutation(len(samples))
                for offset, i in enumerate(mixed):
                    if (number, group, offset) >= first:
                        s, j, raw = samples[i]
                        last = number
                        yield prepare(raw, (number, s, j)), (number, group, offset + 1)

    def once(self, reader: int, readers: int, block: int, limit: int | None):
        """Reader r has shards r, r + readers, ...; a limit gives reader 0 the first samples."""
        if limit:
            reader, readers = reader * len(self.urls), 1
        pairs = (
            ((s, j), raw)
            for s in range(reader, len(self.urls), readers)
            for j, raw in enumerate(self.read(self.urls[s]))
        )
        pairs = itertools.islice(pairs, limit)
        while items := list(itertools.islice(pairs, block)):
            yield items

    def raw(self, place: tuple[int, int]) -> Raw | BadSample:
        """The sample at a place; reads its shard again."""
        return self.read(self.urls[place[0]])[place[1]]


class StrictTarInfo(tarfile.TarInfo):
    """Raises for a header that is broken or cut off, which tarfile takes for the archive's end."""

    @classmethod
    def fromtarfile(cls, tar):
        try:
            return super().fromtarfile(tar)
        except (tarfile.TruncatedHeaderError, tarfile.InvalidHeaderError) as error:
            raise tarfile.ReadError(str(error)) from None


def expand_shards(spec: str) -> list[str]:
    """The shards that braces {00..99} or {a,b}, a glob, a folder or a remote address stand for."""
    if braces := re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", spec):
        before, options, after = braces[1], braces[2].split(","), braces[3]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[2]):
            width = len(numbers[1])
            options = [f"{i:0{width}d}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
        urls = [url for option in options for url in expand_shards(before + option + after)]
    elif Path(spec).is_file() or ("://" in spec and "*" not in spec):
        urls = [spec]
    else:
        pattern = str(Path(glob.escape(spec)) / "*.tar") if Path(spec).is_dir() else spec
        try:
            files, path = fsspec.url_to_fs(pattern)
            urls = [files.unstrip_protocol(name) for name in sorted(files.glob(path))]
        except Exception as error:  # each file system of fsspec has its own
            raise UserError(f"{spec} cannot be listed: {type(error).__name__} {error}") from None
    if not urls:
        raise UserError(f"there is no shard {spec}")
    return urls


def read_class_names(path: str) -> list[list[str]]:
    """The file of --class-names: one class a line, its names separated by commas."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"--class-names {path} cannot be read: {error}") from None
    names = [[name.strip() for name in line.split(",") if name.strip()] for line in lines]
    if not names or not all(names):
        raise UserError(f"--class-names {path} must name a class on every line")
    return names


BUILT_IN = ("shapes", "shapes-questions", *Labelled.NAMES)


def load_source(
    spec: str, split: str = "train", root: str = "data", class_names: str | None = None
) -> Pairs | Shards:
    """Open what --data names.

    Args:
        spec: one of BUILT_IN, a folder of images, a .csv, .tsv or .jsonl file, or .tar shards.
        split: "train" or "val"; only built-in sources have different ones.
        root: where torchvision keeps its data sets.
        class_names: a file with the names of the classes, for sources that are not built in.
    Raises:
        UserError: if there is no such source, or it holds nothing of its kind.
    """
    if spec in ("shapes", "shapes-questions"):
        return Shapes(split, asks=spec != "shapes")
    if spec in Labelled.NAMES:
        return Labelled(spec, split, root)
    path, names = Path(spec), read_class_names(class_names) if class_names else None
    if spec.endswith(".tar") or (path.is_dir() and next(path.glob("*.tar"), None)):
        if path.is_dir() and any(file.suffix.lower() in IMAGE_TYPES for file in path.iterdir()):
            raise UserError(f"{path} holds both shards and images: give each its own folder")
        return Shards(spec, names)
    if path.is_dir():
        return open_folder(path, names)
    if path.suffix in (".csv", ".tsv", ".jsonl") and path.is_file():
        return open_table(path, names)
    raise UserError(
        f"no source '{spec}': use {', '.join(BUILT_IN)}, a folder, table or .tar shards that exist"
    )
