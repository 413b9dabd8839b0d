"""Tar shards: one order for any split, each sample once a pass, all kinds of damage, far addresses.

Samples are told apart by their `.cls` member, a number that no other sample of the set has.
"""

import functools
import http.server
import itertools
import os
import tarfile
import threading
import weakref
import zlib
from argparse import Namespace
from collections import Counter
from pathlib import Path
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import data
import eval as evaluation
import train
from data import (
    KINDS,
    Augment,
    BadSample,
    CenterCrop,
    OnePass,
    Prepare,
    Sample,
    Start,
    TrainStream,
    UserError,
    batches,
    load_source,
    load_tokenizer,
)
from eval import Run
from plugins.shards import Shards, expand_shards
from superclass import IDF, SuperClass
from tests.conftest import caption, encoded, picture, sample_members, train_flags, write_tar

CPU = torch.device("cpu")
NAMES = [[f"number {i}"] for i in range(1000)]


def bytes_prepare(view=None) -> Prepare:
    """A Prepare whose tokens are the caption's bytes."""
    return Prepare(view or CenterCrop(8), load_tokenizer("bpe:256", []))


def numbered(folder: Path, *sizes: int) -> Path:
    """A folder of shards with so many samples, numbered through, after a byte order mark."""
    folder.mkdir()
    numbers = itertools.count()
    for s, n in enumerate(sizes):
        members = []
        for i in itertools.islice(numbers, n):
            members += [*sample_members(i, size=8), (f"{i:06d}.cls", str(i).encode("utf-8-sig"))]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


def key_of(raw, key) -> Sample:
    """In place of Prepare: the targets are the sample's (pass, shard, number in the shard)."""
    return Sample(None, [], key)


def take_pass(source, lanes, number=0):
    """The (shard, number) that each lane holds in one pass, in order."""
    seen = []
    for lane in range(lanes):
        stream = source.lane(key_of, 3, lane, Start(0, lanes, {}))
        keys = (item.targets for item, _ in stream)
        keys = itertools.takewhile(lambda key: key[0] <= number, keys)
        seen.append([key[1:] for key in keys if key[0] == number])
    return seen


def test_specs_name_their_shards(shards, monkeypatch):
    names = [f"{s:05d}.tar" for s in range(6)]
    for spec in ("{00000..00005}.tar", "*.tar", "0000{0,1,2,3,4,5}.tar", ""):
        urls = load_source(os.path.join(shards, spec)).urls
        assert [Path(url).name for url in urls] == names
    with pytest.raises(UserError, match=r"there is no shard .*00006\.tar"):
        load_source(str(shards / "{00000..00006}.tar"))
    with pytest.raises(UserError, match="there is no shard"):
        load_source(str(shards / "{00005..00000}.tar"))
    shards.rename(shards.with_name("b[1]"))
    assert len(load_source(str(shards.with_name("b[1]"))).urls) == 6
    assert expand_shards("s3://b/{08..11}.tar")[::3] == ["s3://b/08.tar", "s3://b/11.tar"]


# ------------------------------------------------------------------------------------------------
# Lanes.


@pytest.mark.parametrize("lanes", [1, 2, 3, 4, 6, 8])
def test_no_sample_is_lost_or_doubled_within_a_pass(shards, lanes):
    """Six shards; eight lanes share them."""
    source = load_source(str(shards))
    everything = sorted((s, j) for s in range(6) for j in range(10))
    for number in range(3):
        assert sorted(itertools.chain(*take_pass(source, lanes, number))) == everything
    assert all(len(lane) > 0 for lane in take_pass(source, lanes))


def test_each_pass_has_another_order(shards):
    """Of the shards, of the samples of a shard, and of the shards' lanes."""
    source = load_source(str(shards))
    passes = [take_pass(source, 1, number)[0] for number in range(3)]
    for a, b in itertools.combinations(passes, 2):
        of_shards = [list(dict.fromkeys(s for s, _ in order)) for order in (a, b)]
        assert of_shards[0] != of_shards[1]
        of_groups = [[set(order[i : i + 2]) for i in (0, 2, 4)] for order in of_shards]
        assert of_groups[0] != of_groups[1]
        for shard in range(6):
            assert [j for s, j in a if s == shard] != [j for s, j in b if s == shard]
    lanes = [take_pass(source, 2, number) for number in range(3)]
    dealt = [{s for s, _ in pair[0]} for pair in lanes]
    assert len({frozenset(few) for few in dealt}) > 1


def test_the_order_of_samples_is_not_that_of_their_shard(shards):
    """Groups may differ between passes while each is read in the same order: not so."""
    source = load_source(str(shards / "00000.tar"))
    passes = [[j for _, j in take_pass(source, 1, number)[0]] for number in range(4)]
    assert len({tuple(order) for order in [*passes, range(10)]}) == 5


def test_samples_mix_within_a_group_of_shards(shards):
    (order,) = take_pass(load_source(str(shards)), 1)
    groups = [order[i : i + 20] for i in range(0, 60, 20)]
    for group in groups:
        assert len({s for s, _ in group}) == Shards.GROUP
        assert len({s for s, _ in group[:10]}) == 2


def test_a_shard_is_read_by_one_lane_if_there_are_enough(shards):
    source = load_source(str(shards))
    for lanes, readers in ((4, 1), (6, 1), (8, 2)):
        lanes_of = Counter(s for lane in take_pass(source, lanes) for s in {s for s, _ in lane})
        assert max(lanes_of.values()) == readers


def test_a_lane_continues_from_any_place(shards):
    source = load_source(str(shards))
    for lane, lanes in [(0, 1), (1, 2), (2, 8)]:
        whole = list(itertools.islice(source.lane(key_of, 3, lane, Start(0, lanes, {})), 150))
        for stop in (1, 7, 10, 33, 100):
            start = Start(0, lanes, {lane: whole[stop - 1][1]})
            again = itertools.islice(source.lane(key_of, 3, lane, start), 40)
            assert list(again) == whole[stop : stop + 40]


def pieces(source, processes, workers, micro_batch, start, prepare):
    """What each worker of each process makes, one micro-batch after another, in this process."""
    streams = []
    for rank in range(processes):
        for worker in range(workers):
            stream = TrainStream(source, prepare, 5, micro_batch, rank, processes, start)
            with mock.patch.object(data, "worker_id", lambda w=worker: (w, workers)):
                stream = iter(stream)
                streams.append((rank, itertools.chain([next(stream)], stream)))
    return streams


def global_batches(source, split, B, accumulation, steps, start, prepare, real=False):
    """The global batches of a split: {position: sample}, what was skipped, and the next Start.

    Every sample is its number with its pixels and token ids. Positions count from 0, the place of a
    sample in the global batch. With `real`, loader processes make them.
    """
    processes, workers = split
    micro_batch = B // processes // accumulation
    if real:
        loaders = [
            batches(
                TrainStream(source, prepare, 5, micro_batch, rank, processes, start),
                workers,
                CPU,
                accumulation,
            )
            for rank in range(processes)
        ]
    else:
        streams = pieces(source, processes, workers, micro_batch, start, prepare)
    seen, places = [], dict(start.places)
    for step in range(steps):
        batch, skipped = {}, []
        for rank in range(processes):
            if real:
                share = next(loaders[rank])
            else:
                own = [stream for r, stream in streams if r == rank]
                some = [next(stream) for _ in range(accumulation) for stream in own]
                share = data.join(some, CPU)
            assert share.images.dtype == torch.uint8 and len(share.images) == B // processes
            for i, q in enumerate(share.places):
                position = q * processes + rank - start.samples - step * B
                pixels = zlib.crc32(share.images[i].numpy().tobytes())
                ids = share.labels[i]
                batch[position] = share.targets[i].item(), pixels, ids[ids >= 0].tolist()
            skipped += map(str, share.bad)
            places |= share.lanes
        assert sorted(batch) == list(range(B))
        seen.append((batch, sorted(skipped)))
    return seen, Start(start.samples + steps * B, start.lanes, places)


SPLITS = [(1, 1), (1, 2), (2, 1), (2, 2)]  # processes x workers
SETS = {
    "eight shards of ten": (10,) * 8,
    "fewer shards than lanes": (13, 9),
    "uneven shards": (1, 7, 90, 22),
}


@pytest.mark.parametrize("sizes", SETS.values(), ids=SETS)
def test_no_split_changes_a_global_batch(tmp_path, sizes):
    """Two passes and more, by four splits with three sizes of micro-batches, the order included."""
    source = Shards(str(numbered(tmp_path / "set", *sizes)), NAMES)
    prepare = bytes_prepare(Augment(8, 0.4, flip=True))
    B, start = 24, Start(0, 4, {})
    steps = 2 * sum(sizes) // B + 1
    whole, end = global_batches(source, (1, 1), B, 1, steps, start, prepare)
    for split, accumulation in itertools.product(SPLITS, (1, 2, 4)):
        seen, there = global_batches(source, split, B, accumulation, steps, start, prepare)
        assert seen == whole and there == end, (split, accumulation)
    assert not any(skipped for _, skipped in whole)


def test_loader_processes_make_the_same_global_batches(shards, tmp_path):
    source = Shards(str(numbered(tmp_path / "set", 10, 10, 10, 10)), NAMES)
    B, start, prepare = 16, Start(0, 4, {}), bytes_prepare(Augment(8))
    whole, end = global_batches(source, (1, 1), B, 1, 6, start, prepare)
    for split, accumulation in (((1, 2), 1), ((2, 2), 4)):
        seen, there = global_batches(source, split, B, accumulation, 6, start, prepare, real=True)
        assert seen == whole and there == end
    # What workers have made ahead, and nobody used, is neither lost nor repeated.
    seen, middle = global_batches(source, (1, 2), B, 1, 2, start, prepare, real=True)
    more, there = global_batches(source, (1, 4), B, 2, 4, middle, prepare, real=True)
    assert seen + more == whole and there == end


@pytest.mark.parametrize("sizes", SETS.values(), ids=SETS)
def test_any_split_continues_any_other_with_the_very_next_sample(tmp_path, sizes):
    source, prepare = Shards(str(numbered(tmp_path / "set", *sizes)), NAMES), bytes_prepare()
    B, start = 16, Start(0, 4, {})
    steps = 2 * sum(sizes) // B + 1
    whole, _ = global_batches(source, (1, 1), B, 1, steps, start, prepare)
    splits = itertools.cycle([(2, 2), (1, 1), (1, 4), (4, 1), (2, 1), (1, 2)])
    seen, lengths = [], itertools.cycle([1, 3, 2])
    while len(seen) < steps:
        few = min(next(lengths), steps - len(seen))
        more, start = global_batches(source, next(splits), B, 1, few, start, prepare)
        seen += more
    assert seen == whole
    if len(set(sizes)) == 1:  # each lane has a quarter of a pass: passes end at the same step
        numbers = [number for batch, _ in seen for number, *_ in batch.values()]
        assert sorted(numbers[:80]) == sorted(numbers[80:160]) == list(range(80))


def test_uneven_shards_over_processes_and_workers(tmp_path):
    """Shards of 1, 7 and 900 samples, by readers of 2 processes with 2 workers: each once."""
    source = Shards(str(numbered(tmp_path / "set", 1, 7, 900)), NAMES)
    for number in (0, 1):
        assert sorted(itertools.chain(*take_pass(source, 4, number))) == [
            (s, j) for s, n in enumerate((1, 7, 900)) for j in range(n)
        ]
    start, prepare = Start(0, 4), bytes_prepare()
    seen, _ = global_batches(source, (2, 2), 40, 1, 5, start, prepare, real=True)
    alone, _ = global_batches(source, (1, 1), 40, 2, 5, start, prepare)
    assert seen == alone


def test_too_few_samples_for_the_lanes_are_refused_with_the_numbers(tmp_path):
    write_tar(tmp_path / "0.tar", sample_members(0))
    stream = load_source(str(tmp_path)).stream(key_of, 0, 1, 2, Start(0, 2))
    with pytest.raises(UserError, match="1 shards hold too few samples for 2 lanes: lane 1"):
        next(stream)


def test_a_lane_without_a_good_sample_is_not_searched_for_ever(tmp_path):
    """Good and bad samples in turn, shared by two lanes: one of them gets the bad ones."""
    members = [*sample_members(0), *sample_members(1)[:1]]
    write_tar(tmp_path / "0.tar", members)
    stream = TrainStream(load_source(str(tmp_path)), bytes_prepare(), 0, 4, 0, 1, Start(0, 2))
    with pytest.raises(UserError, match=r"not one of 1000 samples in a row .*missing caption"):
        next(batches(stream, 0, CPU, 1))


def test_one_pass_over_shards(shards):
    for workers in (0, 2):
        dataset = OnePass(load_source(str(shards)), Prepare(CenterCrop(8)), 7)
        assert sum(len(b.images) for b in batches(dataset, workers, CPU)) == 60


class Pixels(nn.Module):
    """An encoder of 16 px images whose one token is the pixels: the same bits in any batch."""

    width = 3 * 16 * 16

    def forward(self, images):
        return images.flatten(1)[:, None]


@pytest.mark.parametrize("limit", [None, 25])
def test_features_of_shards_do_not_depend_on_the_readers(shards, limit):
    tokenizer = load_tokenizer("bpe:300", ["a red dog"])
    model = SuperClass(Pixels(), 300)
    run = Run(None, Namespace(image_size=16), None, tokenizer, model, IDF(300), 0)
    extract = functools.partial(evaluation.extract, run, load_source(str(shards)), limit)
    (features, _, tokens), *others = (extract(workers, True) for workers in (0, 2, 3))
    assert len(features) == len(tokens) == (limit or 60)
    for other in others:
        assert torch.equal(other[0], features) and other[2] == tokens


def test_a_place_of_one_pass_leads_back_to_the_sample(shards):
    source, prepare = load_source(str(shards)), Prepare(CenterCrop(8))
    for batch in batches(OnePass(source, prepare, 25, limit=25), 0, CPU):
        for place, image in zip(batch.places[::12], batch.images[::12], strict=True):
            assert torch.equal(prepare(source.raw(place)).image, image)


# ------------------------------------------------------------------------------------------------
# Damage.


def giant_png() -> bytes:
    png = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def broken_set(folder: Path) -> dict[str, int]:
    """Shards of bad samples, one in twenty, of all kinds but a table's; returns the counts."""
    folder.mkdir()
    good, text = encoded(picture(0)), b"a red picture"
    palette = picture(1).quantize(8)
    deep = Image.fromarray(np.full((40, 40), 30_000, np.uint16))
    samples = [
        [("m1.jpg", good[:300]), ("m1.txt", text)],
        [("m2.jpg", b""), ("m2.txt", text)],
        [("m3.jpg", good), ("m3.txt", b"\xff\xfe\xfa")],
        [("m4.jpg", good), ("m4.txt", b" \n")],
        [("m5.jpg", good), ("m5.json", b"{}")],
        [("m6.txt", text)],
        [("m7.png", giant_png()), ("m7.txt", text)],
        [
            ("m8.jpg", b"GIF89a is all"),
            ("m8.txt", text),
        ],
        [("../../evil.jpg", good)],
        [("m9.jpg", good), ("m9.txt", text), ("m9.cls", b"no such class")],
    ]
    samples += [  # these are good
        [("g1.jpg", encoded(picture(1).convert("CMYK"))), ("g1.txt", text)],
        [("g2.png", encoded(deep, "PNG")), ("g2.txt", text)],
        [("g3.png", encoded(palette, "PNG", transparency=3)), ("g3.txt", text)],
    ]
    numbers = itertools.count(100)
    for s, few in enumerate((samples[:4], samples[4:8], samples[8:])):
        members = [
            m
            for sample in few
            for m in [
                *sample,
                *itertools.chain(*(sample_members(next(numbers)) for _ in range(22))),
            ]
        ]
        write_tar(folder / f"{s}.tar", members)
    with tarfile.open(folder / "1.tar", "a") as tar:
        link = tarfile.TarInfo("some/link.jpg")
        link.type = tarfile.SYMTYPE
        tar.addfile(link)
    cut = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(cut[: len(cut) - 30_000])
    return {
        "missing image": 1,
        "unreadable image": 4,
        "missing caption": 1,
        "unusable caption": 2,
        "damaged shard": 3,
        "unknown label": 1,
    }


def test_a_set_with_every_kind_of_damage_trains_and_is_reported(tmp_path, capsys):
    kinds = broken_set(tmp_path / "set")
    (tmp_path / "names.txt").write_text("red\ngreen\nblue\n")
    names = str(tmp_path / "names.txt")
    source, prepare = load_source(str(tmp_path / "set"), class_names=names), bytes_prepare()
    items = [prepare(raw) for url in source.urls for raw in source.read(url)]
    readable = sum(isinstance(item, Sample) for item in items)
    flags = ["--samples", str(readable // 8 * 8), "--workers", "1", "--warmup", "1"]
    flags += ["--class-names", names, "--no-first-eval"]
    train.main(train_flags(tmp_path / "set", tmp_path / "run", *flags))
    saved = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["progress"]
    counts = {kind: n for kind, n in saved["skipped"].items() if n}
    assert counts.keys() <= kinds.keys() and all(n <= kinds[kind] for kind, n in counts.items())
    assert sum(counts.values()) >= sum(kinds.values()) - 1  # the pass may end before one
    said = capsys.readouterr()
    assert all(kind in said.out and f"skipping: {kind}" in said.err for kind in counts)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "run", "names.txt"}
    assert not (tmp_path.parent.parent / "evil.jpg").exists()


def test_every_kind_of_damage_is_told_apart_and_the_good_are_kept(tmp_path):
    kinds = broken_set(tmp_path / "set")
    source, prepare = Shards(str(tmp_path / "set"), [["red"], ["green"]]), bytes_prepare()
    items = [prepare(raw) for url in source.urls for raw in source.read(url)]
    assert Counter(item.kind for item in items if isinstance(item, BadSample)) == kinds
    assert all(".tar" in item.detail for item in items if isinstance(item, BadSample))
    assert sum(isinstance(item, Sample) for item in items) > 200
    assert kinds.keys() | {"unreadable row"} == set(KINDS)


def test_no_split_changes_what_is_skipped(tmp_path):
    kinds = broken_set(tmp_path / "set")
    source, prepare = Shards(str(tmp_path / "set"), NAMES), bytes_prepare()
    B, steps, start = 24, 19, Start(0, 4, {})
    whole, end = global_batches(source, (1, 1), B, 1, steps, start, prepare)
    skipped = Counter(text.split(": ")[0] for _, texts in whole for text in texts)
    assert skipped.keys() == kinds.keys() and skipped.total() > 1.5 * sum(kinds.values())
    for split, accumulation in [((1, 2), 4), ((2, 1), 2), ((2, 2), 1), ((2, 2), 4)]:
        seen, there = global_batches(source, split, B, accumulation, steps, start, prepare)
        assert seen == whole and there == end
    seen, start = global_batches(source, (2, 2), B, 1, 7, start, prepare)
    for split in ((1, 1), (1, 4)):
        more, start = global_batches(source, split, B, 2, 6, start, prepare)
        seen += more
    assert seen == whole and start == end


def test_a_shard_damaged_between_two_passes_is_counted_and_the_rest_goes_on(tmp_path):
    source = Shards(str(numbered(tmp_path / "set", 20, 20, 20)), NAMES)
    lane = source.lane(bytes_prepare(), 0, 0, Start(0, 1, {}))
    first = [next(lane)[0] for _ in range(60)]
    assert sorted(item.targets[0] for item in first) == list(range(60))
    path = tmp_path / "set" / "00001.tar"
    path.write_bytes(path.read_bytes()[:9000])
    later = [item for item, place in itertools.takewhile(lambda pair: pair[1][0] < 3, lane)]
    for number in (1, 2):
        some = later[: len(later) // 2] if number == 1 else later[len(later) // 2 :]
        good = sorted(item.targets[0] for item in some if isinstance(item, Sample))
        bad = [item for item in some if isinstance(item, BadSample)]
        kept = [i for i in good if 20 <= i < 40]
        assert good == [*range(20), *kept, *range(40, 60)]
        assert kept == list(range(20, 20 + len(kept))) and 0 < len(kept) < 20
        assert len(bad) == 1 and bad[0].kind == "damaged shard" and str(path) in str(bad[0])


def test_a_set_without_captions_stops_and_names_what_it_found(tmp_path, capsys):
    members = [(f"{i}.{kind}", encoded(picture(i))) for i in range(30) for kind in ("jpg", "json")]
    write_tar(tmp_path / "0.tar", members)
    with pytest.raises(SystemExit) as stop:
        train.main(train_flags(tmp_path / "0.tar", tmp_path / "run", "--workers", "1"))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "missing caption" in error and "has only jpg, json" in error


def test_a_header_that_is_broken_in_the_middle_is_not_the_end(tmp_path):
    write_tar(tmp_path / "0.tar", [m for i in range(4) for m in sample_members(i)])
    content = bytearray((tmp_path / "0.tar").read_bytes())
    second = content.index(b"000001.jpg")
    content[second : second + 512] = os.urandom(512)
    (tmp_path / "0.tar").write_bytes(bytes(content))
    samples = load_source(str(tmp_path / "0.tar")).read(str(tmp_path / "0.tar"))
    assert samples[-1].kind == "damaged shard"


def test_a_lane_holds_one_group_of_shards_at_a_time(shards, monkeypatch):
    class Tracked:
        pass

    alive, counts = weakref.WeakSet(), []

    def read(self, url):
        samples = [Tracked() for _ in range(10)]
        alive.update(samples)
        counts.append(len(alive))
        return samples

    monkeypatch.setattr(Shards, "read", read)
    lane = load_source(str(shards)).lane(lambda raw, _: raw, 3, 0, Start(0, 1, {}))
    for _ in range(300):
        next(lane)
    assert max(counts) <= 10 * Shards.GROUP + 1  # and the sample that was yielded last


# ------------------------------------------------------------------------------------------------
# Far addresses.


def test_shards_from_fsspecs_memory(shards):
    files = fsspec.filesystem("memory")
    for path in sorted(shards.iterdir()):
        files.pipe(f"/bucket/{path.name}", path.read_bytes())
    for spec in ("memory://bucket/{00000..00005}.tar", "memory://bucket/*.tar"):
        source = load_source(spec)
        assert sum(len(source.read(url)) for url in source.urls) == 60
    assert list(source.captions(2)) == [caption(0), caption(1)]


@pytest.fixture
def server(shards):
    """The address of shards on a server that breaks off the first `server.breaks` answers."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        breaks = 0

        def __init__(self, *args):
            super().__init__(*args, directory=str(shards))

        def copyfile(self, source, target):
            if Handler.breaks > 0:
                Handler.breaks -= 1
                target.write(source.read(3000))
                self.connection.close()
            else:
                super().copyfile(source, target)

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        Handler.address = f"http://127.0.0.1:{running.server_port}"
        yield Handler
        running.shutdown()


def test_shards_from_a_server_whose_connection_breaks(server, monkeypatch):
    monkeypatch.setattr(Shards, "DELAYS", (0,) * 5)
    source = load_source(server.address + "/{00000..00005}.tar")
    assert len(source.read(source.urls[0])) == 10
    server.breaks = 2
    assert len(source.read(source.urls[1])) == 10 and server.breaks == 0
    server.breaks = 99
    with pytest.raises(
        UserError, match=r"shard http://127.*00002\.tar could not be read in 5 tries"
    ):
        source.read(source.urls[2])
