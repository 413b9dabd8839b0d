"""From samples to batches: images become uint8 tensors, captions become token ids.

Every augmentation is a pure function of the seed and of the position in the stream, so a run can be
killed anywhere and continued exactly, and split over any number of processes and workers.

Letters in shapes:  B images,  S image size,  K tokens of a caption,  A attributes with classes.
"""

import atexit
import contextlib
import functools
import io
import itertools
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchvision.transforms import v2 as transforms

from sources import KINDS, BadSample, Raw, Sample, load_source, read_caption, read_part  # noqa: F401
from tokenizer import UserError, caption_labels, caption_tokens, load_tokenizer  # noqa: F401

warnings.simplefilter("error", Image.DecompressionBombWarning)  # such an image is a bad sample

# ------------------------------------------------------------------------------------------------
# Images become tensors.

MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's, for RGB in 0 to 1
STD = (0.26862954, 0.26130258, 0.27577711)


def open_image(file: Image.Image | bytes | Path | None) -> Image.Image:
    """Open an image from memory or disk, reading only its header; raises BadSample if it cannot."""
    content = read_part(file, "image")
    if isinstance(content, Image.Image):
        return content
    try:
        return Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP"))
    except Image.UnidentifiedImageError:
        what = f"{len(content)} bytes that are not JPEG, PNG or WebP"
        raise BadSample("unreadable image", what) from None
    except Exception as error:  # decoders of untrusted bytes raise almost anything
        raise BadSample("unreadable image", error) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode to RGB: 16-bit images are scaled to 8 bits, transparent pixels become white."""
    if image.mode.startswith("I"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def resized_crop(image: Image.Image, box: tuple[float, ...], size: int) -> Image.Image:
    """The part `box` (left, top, right, bottom; pixels) of an image as size x size RGB, bicubic.

    A JPEG is decoded at a half, a quarter or an eighth of its resolution if that still leaves
    `size` pixels across the box, which is several times faster. Raises BadSample if it is damaged.
    """
    width, height = image.size
    wanted = min(box[2] - box[0], box[3] - box[1]) / size  # source pixels per output pixel
    if wanted >= 2:
        image.draft(None, (math.ceil(width / wanted), math.ceil(height / wanted)))
    fx, fy = image.width / width, image.height / height
    box = (box[0] * fx, box[1] * fy, box[2] * fx, box[3] * fy)
    try:
        return to_rgb(image).resize((size, size), Image.Resampling.BICUBIC, box=box)
    except Exception as error:  # as in `open_image`
        raise BadSample("unreadable image", error) from None


class Augment:
    """The training view (section 4): a random resized crop; if asked for, mirroring and colours.

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
        top, left, height, width = self.crop.get_params(image, self.crop.scale, self.crop.ratio)
        image = resized_crop(image, (left, top, left + width, top + height), self.size)
        for step in self.steps:
            image = step(image)
        return image


class CenterCrop:
    """The evaluation view: the largest centred square."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        side = min(image.size)
        left, top = (image.width - side) / 2, (image.height - side) / 2
        return resized_crop(image, (left, top, left + side, top + side), self.size)


def normalize(images: Tensor) -> Tensor:
    """uint8 [B, 3, S, S] -> float32 with CLIP's mean and deviation, on the images' device."""
    mean, std = statistics(images.device)
    return images.float().div_(255).sub_(mean).div_(std)  # in place: half the time


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
        drop_stopwords: leave function words out of the captions (Table 7).
    """

    def __init__(self, view: Callable, tokenizer=None, seed: int = 0, drop_stopwords: bool = False):
        self.view, self.tokenizer, self.seed = view, tokenizer, seed
        self.drop_stopwords = drop_stopwords

    def __call__(self, raw: Raw | BadSample, key: tuple[int, ...] = ()) -> Sample | BadSample:
        if isinstance(raw, BadSample):
            return raw
        try:
            tokens = self.encode(read_caption(raw.caption)) if self.tokenizer else []
            # Nothing else draws from the process's own generator while a view is made.
            torch.default_generator.manual_seed(seed_of(self.seed, *key))
            image = torch.from_numpy(np.array(self.view(open_image(raw.image)))).permute(2, 0, 1)
            question = self.encode(raw.question) if self.tokenizer and raw.question else []
            return Sample(image, tokens, question, raw.targets)
        except BadSample as bad:
            file = next((str(part) for part in raw[:2] if isinstance(part, Path)), "")
            return BadSample(bad.kind, f"{file} {bad.detail}".strip())

    def encode(self, text: str) -> list[int]:
        tokens = caption_tokens(text, self.tokenizer, without_stopwords=self.drop_stopwords)
        if not tokens:
            raise BadSample("unusable caption", f"no known token in {text[:60]!r}")
        return tokens


def seed_of(*numbers: int) -> int:
    """A seed for torch's generators that is a function of these numbers alone."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


# ------------------------------------------------------------------------------------------------
# Streams of batches.


class Batch(NamedTuple):
    """Samples as tensors, and what happened on the way to them."""

    images: Tensor  # uint8 [B, 3, S, S]
    labels: Tensor  # int64 [B, K]: each row the set of its caption's token ids, padded with -1
    tokens: Tensor  # int64 [B, K']: the same ids in the caption's order
    questions: Tensor  # int64 [B, Q]
    targets: Tensor  # int64 [B, A]
    places: list  # of the samples: positions in a training stream, or places in a source
    bad: list[BadSample]  # skipped
    lanes: dict[int, tuple[int, int, int]]  # of shards: where each lane goes on after this batch

    def split(self, size: int) -> list["Batch"]:
        """The same samples in batches of `size`."""
        parts = zip(*(tensor.split(size) for tensor in self[:5]), strict=True)
        return [Batch(*tensors, [], [], {}) for tensors in parts]


class Piece:
    """A worker's share of a batch, with one tensor of images, which is quick to send."""

    def __init__(self, samples: list[Sample], places: list, bad: list[BadSample], lanes: dict):
        images = [sample.image for sample in samples]
        self.images = torch.stack(images) if images else torch.empty(0, dtype=torch.uint8)
        if get_worker_info():  # torch would share them in a thread whose errors nobody sees
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
                    item, place = next(stream)
                    is_good = isinstance(item, Sample)
                    (good if is_good else bad).append(item)
                    in_a_row = 0 if is_good else in_a_row + 1
                    lanes |= [place] if place else []
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


def batches(
    dataset: IterableDataset,
    workers: int,
    device: torch.device,
    micro_batches: int = 0,
    reads: tuple[str, ...] = (),
) -> Iterator[Batch]:
    """The batches of a dataset; raises the UserErrors that its workers send.

    Images, labels and the fields `reads` are on the device, others on the CPU. With
    `micro_batches`, the pieces that all workers made of so many are one batch: a process's share
    of a global batch.
    """
    # Loaders that Python 3.14 starts by default would outlive a process that is killed.
    method = "fork" if workers and sys.platform == "linux" else None
    options = {"worker_init_fn": init_worker, "multiprocessing_context": method}
    pieces = iter(DataLoader(dataset, None, num_workers=workers, **options))
    try:
        while True:
            some = []
            with watch_loaders(workers):
                for piece in itertools.islice(pieces, micro_batches * max(1, workers) or 1):
                    if isinstance(piece, UserError):
                        raise piece
                    if workers and micro_batches > 1:  # open files, of all these
                        piece.images = piece.images.clone()
                    some.append(piece)
            if not some:
                return
            yield join(some, device, reads)
    except (RuntimeError, ConnectionError, EOFError) as error:
        # A connection breaks if the process dies while it hands its images over.
        if isinstance(error, RuntimeError) and "DataLoader worker (pid" not in str(error):
            raise
        died = f"a DataLoader worker died ({str(error).partition(chr(10))[0]})"
        raise UserError(f"{died}: if memory ran out, use fewer --workers") from None


@contextlib.contextmanager
def watch_loaders(workers: int):
    """Raise torch's RuntimeError at once if a loader dies; outside, only at the next time.

    Its own handler would raise anywhere, also while a checkpoint is saved. Without any, half of a
    message would be waited for, for ever.
    """
    check = torch._C._error_if_any_worker_fails
    if not workers or sys.platform == "win32":  # where there is no such signal
        yield
        return
    try:
        signal.signal(signal.SIGCHLD, lambda *_: check())
        check()
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def join(pieces: list[Piece], device: torch.device, reads: tuple[str, ...] = ()) -> Batch:
    """Pieces as one batch, in the order of the samples' places; see `batches`."""
    places = [place for piece in pieces for place in piece.places]
    order = sorted(range(len(places)), key=places.__getitem__)
    samples = [sample for piece in pieces for sample in piece.samples]
    samples = [samples[i] for i in order]
    # numpy, because torch would wait for threads that the loaders keep busy.
    images = [piece.images.numpy() for piece in pieces if piece.samples] or [pieces[0].images]
    images = torch.from_numpy(np.concatenate(images)[order])
    labels = pad([sorted(set(sample.tokens)) for sample in samples], side="left")
    columns = [pad([sample[i] for sample in samples]) for i in (1, 2, 3)]  # tokens to targets
    tensors = dict(zip(Batch._fields, (images, labels, *columns), strict=False))
    for name in ("images", "labels", *reads):  # a GPU copies pinned memory while the CPU goes on
        is_pinned = device.type == "cuda"
        x = tensors[name].pin_memory() if is_pinned else tensors[name]
        tensors[name] = x.to(device, non_blocking=is_pinned)
    lanes = {lane: place for piece in pieces for lane, place in piece.lanes.items()}
    bad = [sample for piece in pieces for sample in piece.bad]
    return Batch(**tensors, places=[places[i] for i in order], bad=bad, lanes=lanes)


def pad(rows: list[list[int]], side: str = "right") -> Tensor:
    """Lists of token ids -> int64 [B, K], padded with -1."""
    longest = max(map(len, rows), default=0)
    ids = np.full((len(rows), longest), -1)  # one tensor per row would take ten times as long
    for i, row in enumerate(rows):
        first = longest - len(row) if side == "left" else 0
        ids[i, first : first + len(row)] = row
    return torch.from_numpy(ids)


def init_worker(worker: int):
    """Leave signals to the main process, which finishes its step and saves, but do not outlive it.

    torch looks for the main process, too, but then waits until what was made is read.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def follow(parent: int):
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, args=(os.getppid(),), daemon=True).start()


@atexit.register
def kill_loaders():
    """Python's own end would send them SIGTERM and wait for ever."""
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def worker_id() -> tuple[int, int]:
    """This worker's number, and the number of workers."""
    info = get_worker_info()
    return (info.id, info.num_workers) if info else (0, 1)


def describe(skipped: Counter) -> str:
    """Counts by kind in words."""
    return ", ".join(f"{skipped[kind]} x {kind}" for kind in KINDS if skipped[kind])


def refuse_if_bad(good: int, skipped: Counter, enough: int = 0):
    """Raise UserError if more than a tenth of the samples, of at least `enough`, cannot be used."""
    bad = skipped.total()
    if good + bad >= enough and bad > (good + bad) / 10:
        found = f"{bad} of {good + bad} samples cannot be used, more than a tenth"
        raise UserError(f"{found}: {describe(skipped)}")
