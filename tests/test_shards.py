"""Tar shards: each sample once a pass, whatever reads them; all kinds of damage; far addresses."""

import http.server
import itertools
import os
import threading
from collections import Counter
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

import data
import train
from data import (
    KINDS,
    BadSample,
    CenterCrop,
    OnePass,
    Prepare,
    Start,
    TrainStream,
    UserError,
    batches,
    load_source,
    load_tokenizer,
)
from tests.conftest import caption, encoded, picture, sample_members, train_flags, write_tar

CPU = torch.device("cpu")


def key_of(raw, key):
    """In place of Prepare: the sample's (pass, shard, number in the shard)."""
    return key


def take_pass(source, parts, number=0):
    """The keys that each part sees in one pass."""
    seen = []
    for part in range(parts):
        stream = (key for key, _ in source.stream(key_of, 3, part, parts, 1, Start()))
        keys = itertools.takewhile(lambda key: key[0] <= number, stream)
        seen.append([key[1:] for key in keys if key[0] == number])
    return seen


def test_specs_name_their_shards(shards, monkeypatch):
    names = [f"{s:05d}.tar" for s in range(6)]
    for spec in ("{00000..00005}.tar", "*.tar", "0000{0,1,2,3,4,5}.tar", ""):
        urls = load_source(os.path.join(shards, spec)).urls
        assert [Path(url).name for url in urls] == names
    with pytest.raises(UserError, match=r"there is no shard .*00006\.tar"):
        load_source(str(shards / "{00000..00006}.tar"))
    assert data.expand_shards("s3://b/{08..11}.tar")[::3] == ["s3://b/08.tar", "s3://b/11.tar"]


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 6, 8])
def test_no_sample_is_lost_or_doubled_within_a_pass(shards, parts):
    source = load_source(str(shards))
    everything = sorted((s, j) for s in range(6) for j in range(10))
    first, second = take_pass(source, parts), take_pass(source, parts, 1)
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == everything
    assert first != second
    assert all(len(part) > 0 for part in first)


def test_samples_mix_within_a_group_of_shards(shards):
    (order,) = take_pass(load_source(str(shards)), 1)
    groups = [order[i : i + 20] for i in range(0, 60, 20)]
    for group in groups:
        assert len({s for s, _ in group}) == data.Shards.GROUP
        assert len({s for s, _ in group[:10]}) == 2


def test_uneven_shards_over_processes_and_workers(tmp_path):
    """Shards of 1, 7 and 900 samples read by real loaders: 2 processes of 2 workers each."""
    first = 0
    for s, n in enumerate((1, 7, 900)):
        members = []
        for i in range(first, first + n):
            jpeg, text = sample_members(i, size=8)
            members += [jpeg, text, (f"{i:06d}.cls", str(i).encode())]
        write_tar(tmp_path / f"{s}.tar", members)
        first += n
    (tmp_path / "names.txt").write_text("\n".join(f"number {i}" for i in range(908)))
    source = load_source(str(tmp_path / "{0..2}.tar"), class_names=str(tmp_path / "names.txt"))
    seen = []
    for rank in range(2):
        prepare = Prepare(CenterCrop(8), load_tokenizer("bpe:256", []))
        stream = TrainStream(source, prepare, 0, 1, rank, 2, Start())
        passes = {}
        for batch in batches(stream, 2, CPU):
            ((part, place),) = batch["places"].items()
            passes[part] = place[0]
            if place[0] == 0:
                seen.append(batch["targets"].item())
            if len(passes) == 2 and min(passes.values()) > 0:
                break
    assert sorted(seen) == list(range(908))


def test_a_stream_continues_from_any_place(shards):
    source = load_source(str(shards))
    for part, parts in [(0, 1), (1, 2), (2, 8)]:
        stream = source.stream(key_of, 3, part, parts, 1, Start())
        whole = list(itertools.islice(stream, 150))
        for stop in (1, 7, 10, 33, 100):
            places = dict([whole[stop - 1][1]])
            again = source.stream(key_of, 3, part, parts, 1, Start(0, 0, places))
            assert list(itertools.islice(again, 40)) == whole[stop : stop + 40]


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_loaders_continue_where_the_last_used_batch_left_them(shards, workers):
    """What workers had prepared ahead, and nobody used, is neither lost nor repeated."""
    source, prepare = (
        load_source(str(shards)),
        Prepare(CenterCrop(8), load_tokenizer("bpe:256", [])),
    )

    def loader(start):
        return batches(TrainStream(source, prepare, 0, 4, 0, 1, start), workers, CPU)

    whole = list(itertools.islice(loader(Start()), 30))
    for used in (1, 5, 12):
        places = {}
        for batch in whole[:used]:
            places |= batch["places"]
        again = itertools.islice(loader(Start(used * 4, 0, places)), 10)
        for a, b in zip(again, whole[used:], strict=False):
            assert torch.equal(a["images"], b["images"]) and a["places"] == b["places"]


def test_too_few_samples_for_the_readers_are_refused_with_the_numbers(tmp_path):
    write_tar(tmp_path / "0.tar", sample_members(0))
    stream = load_source(str(tmp_path)).stream(key_of, 0, 1, 2, 1, Start())
    with pytest.raises(UserError, match="1 shards hold too few samples for 2 readers"):
        next(stream)


def test_one_pass_over_shards(shards):
    for workers in (0, 2):
        dataset = OnePass(load_source(str(shards)), Prepare(CenterCrop(8)), 7)
        assert sum(len(b["images"]) for b in batches(dataset, workers, CPU)) == 60


# ------------------------------------------------------------------------------------------------
# Damage.


def giant_png() -> bytes:
    import zlib

    png = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    png[16:24] = (60_000).to_bytes(4, "big") * 2
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    return bytes(png)


def broken_set(folder: Path) -> set[str]:
    """Shards with one bad sample of each kind, one in twenty; returns the kinds that are met."""
    import tarfile

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
            ("m8.jpg", encoded(picture(2), "GIF", save_all=True, append_images=[picture(3)])),
            ("m8.txt", text),
        ],
        [("../../evil.jpg", good)],
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
        directory = tarfile.TarInfo("some/folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
    cut = (folder / "0.tar").read_bytes()
    (folder / "0.tar").write_bytes(cut[: len(cut) - 30_000])
    return set(KINDS) - {"unreadable row", "caption without a known token", "unknown label"}


def test_a_set_with_every_kind_of_damage_trains_and_is_reported(tmp_path, capsys):
    kinds = broken_set(tmp_path / "set")
    source, readable = load_source(str(tmp_path / "set")), 0
    for url in source.urls:
        items = [
            Prepare(CenterCrop(8), load_tokenizer("bpe:256", []))(raw) for raw in source.read(url)
        ]
        readable += sum(not isinstance(item, BadSample) for item in items)
    flags = ["--samples", str(readable // 8 * 8), "--workers", "1", "--warmup", "1"]
    train.main(train_flags(tmp_path / "set", tmp_path / "run", *flags))
    skipped = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["skipped"]
    counts = {kind: n for kind, n in zip(KINDS, skipped.tolist(), strict=True) if n}
    assert counts.keys() <= kinds and len(counts) >= len(kinds) - 1  # the pass may end before one
    assert all(n == 1 for n in counts.values())
    said = capsys.readouterr()
    assert all(kind in said.out and f"skipping: {kind}" in said.err for kind in counts)
    assert {path.name for path in tmp_path.iterdir()} == {"set", "run"}
    assert not (tmp_path.parent.parent / "evil.jpg").exists()


def test_every_kind_of_damage_is_told_apart_and_the_good_are_kept(tmp_path):
    kinds = broken_set(tmp_path / "set")
    source, prepare = (
        load_source(str(tmp_path / "set")),
        Prepare(CenterCrop(8), load_tokenizer("bpe:256", [])),
    )
    items = [prepare(raw) for url in source.urls for raw in source.read(url)]
    bad = Counter(item.kind for item in items if isinstance(item, BadSample))
    assert bad.keys() == kinds and set(bad.values()) == {1}
    assert len(items) - len(bad) > 200


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


def resident() -> int:
    """Bytes of memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_memory_stays_bounded(tmp_path):
    for s in range(8):
        members = [m for i in range(100) for m in sample_members(i, size=16)]
        write_tar(tmp_path / f"{s}.tar", members)
    prepare = Prepare(CenterCrop(8), load_tokenizer("bpe:256", []))
    stream = iter(TrainStream(load_source(str(tmp_path)), prepare, 0, 50, 0, 1, Start()))
    for _ in range(100):  # 5,000 samples
        next(stream)
    early = resident()
    for _ in range(900):  # 50,000 samples
        next(stream)
    assert resident() < 1.1 * early


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
    monkeypatch.setattr(data.time, "sleep", lambda _: None)
    source = load_source(server.address + "/{00000..00005}.tar")
    assert len(source.read(source.urls[0])) == 10
    server.breaks = 2
    assert len(source.read(source.urls[1])) == 10 and server.breaks == 0
    server.breaks = 99
    with pytest.raises(
        UserError, match=r"shard http://127.*00002\.tar could not be read in 5 tries"
    ):
        source.read(source.urls[2])
