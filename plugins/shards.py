"""Webdataset shards, and the lanes in which any number of readers sees the same samples.

--data 'PATTERN.tar'      braces {00..99} or {a,b}, a glob, a folder, or a remote address
"""

import glob
import itertools
import re
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import fsspec
import numpy as np

from data import IMAGE_TYPES, BadSample, Raw, Sample, Source, Start, UserError, number_classes


class Shards(Source):
    """Webdataset shards: tar files in which KEY.jpg (png, webp), KEY.txt and KEY.cls lie together.

    Members are read as a stream and never extracted. Remote addresses go through fsspec.
    """

    GROUP = 2  # shards that a lane holds in memory at a time, compressed, to mix their samples
    DELAYS = (0, 1, 2, 4, 8)  # seconds before each try to read a shard

    def __init__(self, spec: str, names: list[list[str]] | None):
        self.urls = expand_shards(spec)
        self.most_lanes = len(self.urls)
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


def open_source(spec: str, split: str, root: str, class_names: list | None) -> Shards:
    return Shards(spec, class_names)
