"""Webdataset shards, and the lanes in which any number of readers sees the same samples.

--data 'PATTERN.tar'      braces {00..99} or {a,b}, a glob, a folder, or a remote address; .tar.gz
                          and .tgz, too; several joined by ::
"""

import itertools
import lzma
import os
import re
import tarfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec
import numpy as np

from data import (
    IMAGE_TYPES,
    UNREAD_TYPES,
    BadSample,
    Raw,
    Sample,
    Source,
    Start,
    UserError,
)
from plugins.labels import number_classes, plain_label, unknown_label

IMAGES = {kind[1:]: None for kind in IMAGE_TYPES}.keys()  # a set with an order
UNREAD, TEXTS = {kind[1:] for kind in UNREAD_TYPES}, {"txt", "cls"}
DAMAGE = (tarfile.TarError, EOFError, ValueError, ArithmeticError, zlib.error, lzma.LZMAError)


class Shards(Source):
    """Webdataset shards: tar files in which KEY.jpg (png, webp), KEY.txt and KEY.cls lie together.

    Members are read as a stream and never extracted. Remote addresses go through fsspec.
    """

    GROUP = 2  # shards that a lane holds in memory at a time, compressed, to mix their samples
    DELAYS = (0, 1, 2, 4, 8)  # seconds before each try to read a shard

    def __init__(self, spec: str, names: list[list[str]] | None):
        self.rows = self.urls = expand_shards(spec)
        self.most_lanes = len(self.urls)
        self.numbers = number_classes(names or [])
        self.attributes = {"class": names} if names else {}
        beside = (
            [path for path in Path(spec).iterdir() if not is_shard(path)]
            if os.path.isdir(spec)
            else []
        )
        self.beside = Counter("file or folder beside the shards" for _ in beside)
        self.left: dict[str, Counter] = {}  # shard -> rule -> number

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

    @property
    def left_out(self) -> Counter:
        """Of the shards that this process has read, and of what lies beside them."""
        return sum(self.left.values(), self.beside)

    def samples(self, file: BinaryIO, url: str) -> Iterator[Raw | BadSample]:
        """The samples of a tar file: neighbours whose file names agree up to the first dot.

        A second member of one name starts another sample.
        """
        last, parts, tar = None, {}, None
        left_out = self.left[url] = Counter()  # anew each time that the shard is read
        try:
            # With `ignore_zeros`, a tar that was appended to another one is read, too.
            options = {"mode": "r|*", "tarinfo": StrictTarInfo, "ignore_zeros": True}
            with tarfile.open(fileobj=file, **options) as tar:
                for member in tar:
                    # A PurePosixPath would be a fifth of the time that a shard takes.
                    path = member.name.replace("/./", "/").removeprefix("./")
                    folder, slash, name = path.rpartition("/")
                    stem, _, kind = name.partition(".")
                    if not is_plain(member):
                        yield BadSample("damaged shard", f"{url}: {path} is not a plain file")
                    elif member.isdir():
                        left_out["folder in a shard"] += 1
                    elif path[:1] == "." or "/." in path:
                        left_out["hidden file"] += 1
                    else:
                        key, kind = folder + slash + stem, kind.lower()
                        if parts and (key != last or kind in parts):
                            yield from self.split(parts, last, url)
                            parts = {}
                        parts[kind], last = tar.extractfile(member).read(), key
        except DAMAGE as error:
            parts = parts if getattr(tar, "has_ended", False) else {}  # else it is cut off
            yield BadSample("damaged shard", f"{url}: {error}")
        if parts:
            yield from self.split(parts, last, url)

    def split(self, parts: dict[str, bytes], key: str, url: str):
        """The samples among neighbours with one key, more than one if their keys had dots in them.

        A key ends at the first dot, as in webdataset: `7.jpg 7.seg.png 7.txt` are one sample. But
        an image and its text with a longer name in common, up to the last dot, are a sample of
        their own, and without an image KEY.jpg (or the like) all names end there:
        `v1.5.jpg v1.5.txt v1.6.jpg v1.6.txt`.
        """
        stems = {}
        for kind, content in parts.items():
            stem, _, ending = kind.rpartition(".")
            stems.setdefault(stem, {})[ending] = content
        for stem, some in stems.items():
            image, text = some.keys() & IMAGES, some.keys() & TEXTS
            ends_here = not stem or not stems.get("", {}).keys() & IMAGES
            if (image and text) or (ends_here and (image or text)):
                yield self.sample(some, f"{key}{stem and '.'}{stem} in {url}", url)
            else:
                self.left[url].update(map(other_type, some))

    def sample(self, parts: dict[str, bytes], where: str, url: str) -> Raw | BadSample:
        image = next((kind for kind in IMAGES if kind in parts), None)
        self.left[url].update(map(other_type, parts.keys() - TEXTS - {image} - UNREAD))
        if image is None or not TEXTS & parts.keys():
            what = "unreadable" if UNREAD & parts.keys() and not image else "missing"
            missing = "missing caption" if image else f"{what} image"
            return BadSample(missing, f"{where} has only {', '.join(sorted(parts))}")
        label = parts["cls"].decode("utf-8-sig", "replace").strip() if "cls" in parts else None
        number = self.numbers.get(label and plain_label(label))
        if self.attributes and number is None:
            reason = unknown_label(label, tuple(self.numbers))
            return BadSample("unknown label", f"{where}: {reason}")
        return Raw(parts[image], parts.get("txt"), (number,) * len(self.attributes), None, where)

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


def is_plain(member: tarfile.TarInfo) -> bool:
    """Whether a member is a file or a folder, inside of the archive."""
    is_inside = member.name[:1] != "/" and ".." not in member.name.split("/")
    return is_inside and (member.isreg() or member.isdir())


def other_type(kind: str) -> str:
    """The rule by which a member is left out, as for the files of a folder."""
    return f"file of another type ({kind and '.'}{kind or 'none'})"


class StrictTarInfo(tarfile.TarInfo):
    """Raises for a header that is broken or cut off, which tarfile takes for the archive's end.

    So it does for a missing end-of-archive mark: whoever wrote the shard did not finish it.
    """

    @classmethod
    def fromtarfile(cls, tar):
        try:
            info = super().fromtarfile(tar)
            tar.has_ended = False
            return info
        except tarfile.EOFHeaderError:
            tar.has_ended = True
            raise
        except tarfile.HeaderError as error:
            if isinstance(error, tarfile.EmptyHeaderError) and getattr(tar, "has_ended", True):
                raise
            raise tarfile.ReadError(f"{error}; what follows is lost") from None


def expand_shards(spec: str) -> list[str]:
    """The shards that braces {00..99} or {a,b}, a glob, a folder or a remote address stand for.

    Several of these are joined by `::`, which is also what chains file systems for fsspec: there
    the part before it is no shard (simplecache::s3://...), or one inside the archive that follows.
    """
    joined = re.split(r"(?<=\.tar|\.tgz)::|(?<=\.tar\.gz)::", spec, flags=re.IGNORECASE)
    braces = re.fullmatch(r"(.*?)\{([^{}]*)\}(.*)", spec)
    if len(joined) > 1 and not re.match(r"(zip|tar|libarchive)://", spec):
        urls = [url for part in joined for url in expand_shards(part)]
    elif braces:
        before, options, after = braces[1], braces[2].split(","), braces[3]
        if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", braces[2]):
            width = len(numbers[1])
            options = [f"{i:0{width}d}" for i in range(int(numbers[1]), int(numbers[2]) + 1)]
        urls = [url for option in options for url in expand_shards(before + option + after)]
    elif os.path.isdir(spec):
        urls = [str(path) for path in sorted(Path(spec).iterdir()) if is_shard(path)]
    elif os.path.isfile(spec) or ("://" in spec and "*" not in spec):
        urls = [spec]
    else:
        try:
            files, path = fsspec.url_to_fs(spec)
            urls = [files.unstrip_protocol(name) for name in sorted(files.glob(path))]
        except Exception as error:  # each file system of fsspec has its own
            raise UserError(f"{spec} cannot be listed: {type(error).__name__} {error}") from None
    if not urls:
        raise UserError(f"there is no shard {spec}")
    return urls


def is_shard(path: Path) -> bool:
    return path.name.lower().endswith((".tar", ".tar.gz", ".tgz")) and path.name[0] != "."


def open_source(spec: str, split: str, root: str, class_names: list | None) -> Shards:
    return Shards(spec, class_names)
