"""Tokenizers, images, sources and streams; every kind of bad sample, made and met."""

import csv
import itertools
import json
import multiprocessing
import os
import signal
import sys
import threading
import zlib
from collections import Counter
from multiprocessing import connection
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

import data
from data import (
    KINDS,
    Augment,
    BadSample,
    CenterCrop,
    OnePass,
    Prepare,
    Raw,
    Sample,
    Start,
    TrainStream,
    UserError,
    batches,
    load_source,
    load_tokenizer,
    normalize,
    one_sentence,
    open_image,
    refuse_if_bad,
    resized_crop,
    to_rgb,
)
from tests.conftest import (
    COLOURS,
    caption,
    encoded,
    picture,
    run_python,
    sample_members,
    write_tar,
)

CPU = torch.device("cpu")

# ------------------------------------------------------------------------------------------------
# Images.


def test_all_good_modes_become_rgb():
    grey = np.full((20, 20), 100, np.uint8)
    deep = Image.fromarray(np.full((20, 20), 100 * 257, np.uint16))
    see_through = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 0, 10, 200, 30])
    cases = {
        (100, 100, 100): [
            encoded(Image.fromarray(grey)),
            encoded(Image.fromarray(grey), "WEBP", lossless=True),
            encoded(deep, "PNG"),
        ],
        (255, 255, 255): [
            encoded(see_through, "PNG"),
            encoded(palette, "PNG", transparency=bytes([255, 0])),
        ],
        (10, 200, 30): [encoded(palette, "PNG")],
    }
    for colour, files in cases.items():
        for file in files:
            image = to_rgb(open_image(file))
            assert image.mode == "RGB"
            assert np.abs(np.array(image).astype(int) - colour).max() <= 2
    cmyk = to_rgb(open_image(encoded(Image.new("CMYK", (20, 20), (0, 255, 255, 0)), quality=95)))
    assert cmyk.getpixel((5, 5))[0] > 200 and cmyk.getpixel((5, 5))[1] < 60


def test_bad_images_are_told_apart(tmp_path):
    good = encoded(picture(0, 200))
    giant = bytearray(encoded(Image.new("RGB", (8, 8)), "PNG"))
    giant[16:24] = (60_000).to_bytes(4, "big") * 2
    giant[29:33] = zlib.crc32(giant[12:29]).to_bytes(4, "big")
    (tmp_path / "empty.jpg").touch()
    cases = [
        ("unreadable image", "0 bytes that are not JPEG", b""),
        ("unreadable image", "empty.jpg 0 bytes", tmp_path / "empty.jpg"),
        ("unreadable image", "10 bytes that are not JPEG, PNG, WEBP, BMP", b"plain text"),
        ("unreadable image", "truncated", good[: len(good) // 2]),
        ("unreadable image", "3600000000 pixels", bytes(giant)),
        ("missing image", "none.jpg No such file", tmp_path / "none.jpg"),
        ("missing image", "", None),
    ]
    prepare = Prepare(CenterCrop(32))
    for kind, detail, file in cases:
        item = prepare(Raw(file, None))
        assert isinstance(item, BadSample) and item.kind == kind, (kind, item)
        assert detail in item.detail and str(item).startswith(kind), (kind, item)


def test_bad_captions_are_told_apart(tmp_path):
    prepare = Prepare(CenterCrop(8), load_tokenizer("words:2", ["red red", "blue blue"] * 3))
    cases = [
        ("missing caption", "", None),
        ("missing caption", "none.txt No such file", tmp_path / "none.txt"),
        ("unusable caption", "not UTF-8", b"\xff\xfe"),
        ("unusable caption", "not UTF-8", "\udcff"),
        ("unusable caption", "empty", b" \n"),
        ("unusable caption", "no known token in 'green'", "green"),
    ]
    for kind, detail, text in cases:
        item = prepare(Raw(picture(0), text))
        assert isinstance(item, BadSample) and item.kind == kind, (kind, item)
        assert detail in item.detail, (kind, item)
    assert {kind for kind, *_ in cases} < set(KINDS) and len(KINDS) == 7


def test_the_end_of_a_last_line_is_no_part_of_a_caption(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a cat\non a mat\r\n")
    assert data.read_caption(tmp_path / "a.txt") == "a cat\non a mat"
    characters = SimpleNamespace(encode_ordinary=lambda text: list(text.encode()))  # any of a fork
    samples = [Prepare(CenterCrop(8), characters)(Raw(picture(0), text)) for text in ("a", "a\n")]
    assert samples[0].labels == samples[1].labels == [ord("a")]


def test_crop_from_the_dct_is_close_to_a_full_decode():
    smooth = (
        Image.effect_noise((512, 512), 60)
        .resize((64, 64))
        .resize((512, 512), Image.Resampling.BICUBIC)
    )
    file = encoded(Image.merge("RGB", (smooth, smooth.rotate(90), smooth.rotate(180))), quality=90)
    box = (10.0, 20.0, 500.0, 505.0)
    full = open_image(file).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC, box=box)
    image = open_image(file)
    fast = resized_crop(image, box, 224)
    assert image.size == (256, 256)  # it was decoded at half its resolution
    assert np.abs(np.array(fast).astype(int) - np.array(full)).mean() < 2


def test_normalize_is_torchvisions():
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    reference = v2.Compose(
        [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.MEAN, data.STD)]
    )
    torch.testing.assert_close(normalize(images), reference(images))


def test_views_are_drawn_from_seed_and_key_alone():
    raw = Raw(picture(1, 64), None)
    views = {}
    for seed, key in [(0, (1,)), (0, (2,)), (1, (1,)), (0, (1,))]:
        torch.rand(3)  # what the process did before does not matter
        prepare = Prepare(Augment(32, 0.3, flip=True, color_jitter=0.3), seed=seed)
        image = prepare(raw, key).image
        assert image.shape == (3, 32, 32) and image.dtype == torch.uint8
        if (seed, key) in views:
            assert torch.equal(views[seed, key], image)
        views[seed, key] = image
    assert len({image.numpy().tobytes() for image in views.values()}) == 3


def test_colour_jitter_takes_the_colour_of_two_in_ten():
    prepare, raw = Prepare(Augment(8, color_jitter=0.3)), Raw(picture(1, 64), None)
    plain, changed = Prepare(Augment(8)), 0
    grey = 0
    for i in range(200):
        image = prepare(raw, (i,)).image.int()
        grey += int((image.max(dim=0).values == image.min(dim=0).values).all())
        changed += int((image - plain(raw, (i,)).image).abs().max() > 2)
    assert 20 < grey < 60 and 150 < changed < 190  # 0.2 and 1 - 0.2 x 0.8 of them


def test_crops_keep_their_smallest_area_and_half_are_mirrored():
    ramp = np.zeros((100, 100, 3), np.uint8)
    ramp[..., 0], ramp[..., 1] = np.arange(100), np.arange(100)[:, None]
    for flip in (False, True):
        prepare, raw = Prepare(Augment(25, 0.4, flip=flip)), Raw(Image.fromarray(ramp), None)
        views = torch.stack([prepare(raw, (i,)).image for i in range(200)]).int()
        wide = views[:, 0, 12, -1] - views[:, 0, 12, 0]
        high = views[:, 1, -1, 12] - views[:, 1, 0, 12]
        areas = wide.abs() * high / 96**2  # between the centres of the first and the last pixel
        assert 0.35 < areas.min() < 0.5 and areas.max() > 0.85
        assert 70 < (wide < 0).sum() < 130 if flip else (wide > 0).all()


def test_the_evaluation_view_is_the_centred_square():
    wide = Image.new("RGB", (90, 30))
    wide.paste((0, 255, 0), (30, 0, 60, 30))
    for image in (wide, wide.rotate(90, expand=True)):
        inner = np.array(CenterCrop(10)(image))[3:7, 3:7]
        assert (inner == (0, 255, 0)).all()
        assert np.array_equal(Augment(10, 1.0)(image), CenterCrop(10)(image))  # nothing is random


# ------------------------------------------------------------------------------------------------
# Sources.


def test_folder_pairs_images_with_texts_and_folders_with_classes(tmp_path):
    for i in range(6):
        folder = tmp_path / ["big_red", "green"][i % 2]
        folder.mkdir(exist_ok=True)
        picture(i).save(folder / f"{i}.jpg")
        if i != 5:
            (folder / f"{i}.txt").write_text(caption(i))
    (tmp_path / "green" / "orphan.txt").write_text("a text without image")
    source = load_source(str(tmp_path))
    assert source.attributes == {"class": [["big red"], ["green"]]}
    raws = [source.raw(i) for i in range(len(source))]
    assert [raw.targets for raw in raws] == [(0,)] * 3 + [(1,)] * 3 + [(-1,)]
    kinds = [
        getattr(item, "kind", "good")
        for item in map(Prepare(CenterCrop(16), load_tokenizer("bpe:256", [])), raws)
    ]
    assert sorted(kinds) == ["good"] * 5 + ["missing caption", "missing image"]
    said = str(Prepare(CenterCrop(16), load_tokenizer("bpe:256", []))(raws[5]))
    assert said == f"missing caption: {tmp_path / 'green' / '5.jpg'} has no .txt beside it"
    # With names of classes, other folders have none. A mark at the start of a file is no text.
    (tmp_path / "names").write_bytes(b"\xef\xbb\xbfgreen\nblue")
    (tmp_path / "green" / "1.txt").write_bytes(b"\xef\xbb\xbfa dog")
    source = load_source(str(tmp_path), class_names=str(tmp_path / "names"))
    assert [source.raw(i).targets for i in range(7)] == [(-1,)] * 3 + [(0,)] * 3 + [(-1,)]
    assert data.read_caption(source.raw(3).caption) == "a dog"


def test_bad_files_are_named_and_mixed_folders_refused(tmp_path):
    picture(0).save(tmp_path / "a.PNG")
    (tmp_path / "a.TXT").write_text("a dog")
    (tmp_path / "b.jpg").write_bytes(encoded(picture(1))[:300])
    (tmp_path / "b.txt").write_text("another")
    tokenizer = load_tokenizer("bpe:260", ["a dog"] * 3)
    source, prepare = load_source(str(tmp_path)), Prepare(CenterCrop(8), tokenizer)
    good, bad = (prepare(source.raw(i)) for i in range(2))
    assert good.labels and bad.kind == "unreadable image" and "b.jpg" in str(bad)
    (tmp_path / "b.txt").write_text(" ")
    assert "b.jpg" in str(prepare(source.raw(1)))
    write_tar(tmp_path / "0.tar", sample_members(0))
    with pytest.raises(UserError, match="both shards and images"):
        load_source(str(tmp_path))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path, kind):
    picture(0).save(tmp_path / "0.png")
    rows = [
        ("0.png", 'red, "very" red', "red"),
        ("0.png", "", "blue"),
        ("gone.png", "a text", "red"),
    ]
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        lines = [json.dumps({"filepath": f, "caption": c, "label": y}) for f, c, y in rows]
        path.write_text("\n".join([*lines, "{broken"]) + "\n")
    else:
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="," if kind == "csv" else "\t")
            writer.writerows([("filepath", "title", "label"), *rows])
        with open(path, "ab") as file:
            file.write(b"0.png,\xff\xfe,red\n" if kind == "csv" else b"0.png\t\xff\xfe\tred\n")
    source = load_source(str(path))
    assert source.attributes == {"class": [["blue"], ["red"]]}
    prepare = Prepare(CenterCrop(16), load_tokenizer("bpe:256", []))
    items = [prepare(source.raw(i)) for i in range(len(source))]
    assert items[0].targets == (1,) and items[0].reads == {}
    last = "unreadable row" if kind == "jsonl" else "unusable caption"
    assert [item.kind for item in items[1:]] == ["unusable caption", "missing image", last]
    assert f"row 2 of {path}: {tmp_path / '0.png'} empty" in str(items[1])
    assert f"row 4 of {path}" in str(items[3])
    assert "JSON" in str(items[3]) if kind == "jsonl" else "not UTF-8" in str(items[3])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_tables_may_hold_questions(tmp_path, kind):
    picture(0).save(tmp_path / "0.png")
    path = tmp_path / f"t.{kind}"
    if kind == "jsonl":
        path.write_text('{"filepath": "0.png", "caption": "red", "question": "what colour?"}\n')
    else:
        path.write_text("filepath,caption,question\n0.png,red,what colour?\n")
    source, tokenizer = load_source(str(path)), load_tokenizer("bpe:256", [])
    assert list(source.captions(9)) == ["what colour? red"]
    reads = "tokens", "questions"
    sample = Prepare(CenterCrop(8), tokenizer, reads=reads)(source.raw(0))
    assert tokenizer.decode(sample.reads["questions"]) == " what colour?"
    assert tokenizer.decode(sample.reads["tokens"]) == " red"


def test_rows_that_tables_may_hold(tmp_path):
    """A JSON object may lack what others have, or name what no file can be called."""
    path = tmp_path / "t.jsonl"
    rows = [{"filepath": "a.png"}, {"filepath": "\0.png", "title": "x"}, {"filepath": "\ud83d"}]
    path.write_text("\n".join([*map(json.dumps, rows), "[" * 100_000]))
    source, prepare = load_source(str(path)), Prepare(CenterCrop(8))
    kinds = [prepare(source.raw(i)).kind for i in range(4)]
    assert kinds == ["missing image"] * 3 + ["unreadable row"]


def test_class_names_may_be_numbers_or_aliases(tmp_path):
    (tmp_path / "names.txt").write_text("red, crimson\ngreen\n")
    (tmp_path / "t.csv").write_text("filepath,caption,label\na.png,x,1\nb.png,y,crimson\n")
    source = load_source(str(tmp_path / "t.csv"), class_names=str(tmp_path / "names.txt"))
    assert [source.raw(i).targets for i in range(2)] == [(1,), (0,)]
    (tmp_path / "t.csv").write_text("filepath,caption,label\na.png,x,2\n")
    with pytest.raises(UserError, match="label '2' is not in --class-names"):
        load_source(str(tmp_path / "t.csv"), class_names=str(tmp_path / "names.txt"))


def test_sources_that_hold_nothing_say_what_they_hold(tmp_path):
    (tmp_path / "a.mp4").touch()
    (tmp_path / "b.txt").touch()
    with pytest.raises(UserError, match=r"no image .*found: 1 x .* type \(\.mp4\), 1 x text"):
        load_source(str(tmp_path))
    (tmp_path / "t.csv").write_text("file,text\na.png,x\n")
    with pytest.raises(UserError, match=r"columns filepath and caption .*found: file, text"):
        load_source(str(tmp_path / "t.csv"))
    (tmp_path / "e.csv").write_text("")
    with pytest.raises(UserError, match="found: none"):
        load_source(str(tmp_path / "e.csv"))
    for spec in ("nothing", "missing.csv", str(tmp_path / "x{0..3}.tar")):
        with pytest.raises(UserError, match=r"no source|no shard"):
            load_source(spec)
    with pytest.raises(UserError, match="cannot be read"):
        load_source(str(tmp_path / "t.csv"), class_names="missing.txt")


# ------------------------------------------------------------------------------------------------
# Streams.


class Numbers(data.Pairs):
    """N samples of which some are bad; the label of sample i is i."""

    attributes = {"number": [[str(i)] for i in range(23)]}

    def __init__(self, bad=()):
        self.bad = bad

    def __len__(self):
        return 23

    def raw(self, i):
        return (
            BadSample("unreadable image", i) if i in self.bad else Raw(picture(i, 8), f"{i}", (i,))
        )


def take(source, n, reader=0, readers=1, start=0):
    """The first n good samples of a reader, as numbers."""
    stream = source.stream(Prepare(CenterCrop(8)), 7, reader, readers, Start(start))
    good = (item.targets[0] for item, _ in stream if isinstance(item, Sample))
    return list(itertools.islice(good, n))


@pytest.mark.parametrize("bad", [(), (3, 11)])
def test_stream_does_not_depend_on_readers_and_continues_anywhere(bad):
    source = Numbers(bad)
    whole = take(source, 72)
    for readers in (2, 3):
        parts = [take(source, 72 // readers, reader, readers) for reader in range(readers)]
        assert whole == [number for turn in zip(*parts, strict=True) for number in turn]
    for start in (4, 25, 48):
        assert take(source, 24, start=start) == whole[start : start + 24]
        assert take(source, 8, 1, 3, start) == [
            whole[p] for p in range(start, start + 24) if p % 3 == 1
        ]
    if not bad:
        passes = [whole[i : i + 23] for i in range(0, 69, 23)]
        assert all(sorted(p) == list(range(23)) for p in passes)
        assert all(a != b for a, b in itertools.combinations(passes, 2))
    else:
        assert not set(whole) & set(bad)


def same(a, b) -> bool:
    """Whether two batches hold the same, bit for bit; the order of what was skipped is free."""
    skipped = [sorted(map(str, batch.bad)) for batch in (a, b)]
    return (
        all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("images", "labels", "targets"))
        and a.images.dtype == b.images.dtype
        and a.places == b.places
        and skipped[0] == skipped[1]
    )


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_are_the_same_with_any_number_of_workers(workers):
    prepare = Prepare(Augment(8), load_tokenizer("bpe:256", []), 3)

    def loader(workers, micro_batch, accumulation):
        stream = TrainStream(Numbers((5,)), prepare, 7, micro_batch, 0, 1, Start(8))
        return itertools.islice(batches(stream, workers, CPU, accumulation), 12)

    for accumulation in (1, 2, 4):  # in the end one image each: fewer than workers
        pairs = zip(loader(workers, 4 // accumulation, accumulation), loader(0, 4, 1), strict=True)
        assert all(same(a, b) for a, b in pairs)
    batch = next(loader(0, 4, 1))
    assert batch.images.dtype == torch.uint8 and batch.places == [8, 9, 10, 11]


def test_loaders_make_a_whole_batch_of_micro_batches_while_the_main_process_does_not_ask():
    class Counted(Numbers):
        made = multiprocessing.Value("i", 0)

        def raw(self, i):
            with self.made.get_lock():
                self.made.value += 1
            return super().raw(i)

    stream = TrainStream(Counted(), Prepare(CenterCrop(8)), 0, 2, 0, 1, Start())
    running = batches(stream, 2, CPU, 8)
    next(running)  # 8 micro-batches of 2 images
    for _ in range(2000):
        if Counted.made.value < 32:
            threading.Event().wait(0.01)
    assert Counted.made.value >= 32
    running.close()


def test_a_batch_has_sets_for_labels_and_the_order_for_tokens():
    class Twice(Numbers):
        def raw(self, i):
            return Raw(picture(i, 8), ["b a b", "aa"][i % 2], (i,), "a?" if i % 2 else None)

    tokenizer = load_tokenizer("bpe:256", [])
    prepare = Prepare(CenterCrop(8), tokenizer, reads=("tokens", "questions"))
    stream = TrainStream(Twice(), prepare, 0, 6, 0, 1, Start())
    batch = next(batches(stream, 0, CPU))
    texts = batch.reads["tokens"], batch.reads["questions"]
    for labels, target, tokens, question in zip(batch.labels, batch.targets, *texts, strict=True):
        text = [" b a b", " aa"][target.item() % 2]
        assert tokens[tokens >= 0].tolist() == tokenizer.encode_ordinary(text)
        assert labels[labels >= 0].tolist() == sorted(set(tokenizer.encode_ordinary(text)))
        assert (question >= 0).any() == bool(target.item() % 2)
    parts = batch.split(4)
    assert [len(part.images) for part in parts] == [4, 2]
    for name in ("images", "labels", "targets"):
        joined = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(joined, getattr(batch, name))
    for name, whole in batch.reads.items():
        assert torch.equal(torch.cat([part.reads[name] for part in parts]), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_one_pass_takes_every_sample_once_in_order(workers):
    dataset = OnePass(Numbers((4,)), Prepare(CenterCrop(8)), 5)
    got = list(batches(dataset, workers, CPU))
    assert torch.cat([b.targets for b in got]).flatten().tolist() == [
        i for i in range(23) if i != 4
    ]
    assert [bad.kind for b in got for bad in b.bad] == ["unreadable image"]
    some = batches(OnePass(Numbers(), Prepare(CenterCrop(8)), 5, limit=6), workers, CPU)
    assert torch.cat([b.targets for b in some]).flatten().tolist() == [0, 3, 7, 11, 15, 19]


def test_one_pass_over_a_block_without_a_good_sample():
    dataset = OnePass(Numbers(range(5)), Prepare(CenterCrop(8)), 5)
    got = list(batches(dataset, 0, CPU))
    assert [len(batch.images) for batch in got] == [0, 5, 5, 5, 3]
    assert len(got[0].bad) == 5 and len(got[0].labels) == len(got[0].targets) == 0


def test_a_place_of_one_pass_leads_back_to_the_sample():
    source, prepare = Numbers(), Prepare(CenterCrop(8))
    batch = next(batches(OnePass(source, prepare, 5, limit=5), 0, CPU))
    for place, image in zip(batch.places, batch.images, strict=True):
        assert torch.equal(prepare(source.raw(place)).image, image)


def test_a_stream_without_a_good_sample_ends_with_a_sentence():
    stream = TrainStream(Numbers(range(23)), Prepare(CenterCrop(8)), 0, 4, 0, 1, Start())
    with pytest.raises(UserError, match=r"not one of 1000 samples .*: unreadable image: "):
        next(batches(stream, 1, CPU))


def make_long(*_) -> Sample:
    """Four of them are more than a pipe between processes holds."""
    return Sample(torch.zeros(3, 8, 8, dtype=torch.uint8), list(range(9999)), (0,))


@pytest.fixture
def fresh_handler(monkeypatch):
    """torch sets its handler of dead loaders once in a process, which `one_sentence` takes away."""
    monkeypatch.setattr(torch.utils.data._utils.signal_handling, "_SIGCHLD_handler_set", False)


def died(capsys, use) -> str:
    """What the user reads when a loader dies while `use` goes on; nothing else interrupts him."""
    with pytest.raises(SystemExit, match="2"), one_sentence():
        use()
    (line,) = (line for line in capsys.readouterr().err.splitlines() if "error: " in line)
    return line


@pytest.mark.usefixtures("fresh_handler")
def test_a_loader_process_that_dies_while_it_sends_is_a_users_error(monkeypatch, capsys):
    send, ours = connection.Connection._send, os.getpid()

    def send_half(self, content, *args):
        if os.getpid() == ours or len(content) < 2**16:
            return send(self, content, *args)
        send(self, content[: 2**15])
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(connection.Connection, "_send", send_half)
    stream = TrainStream(Numbers(), make_long, 0, 8, 0, 1, Start())
    line = died(capsys, lambda: next(batches(stream, 1, CPU, 1)))
    assert "a DataLoader worker died" in line and "--workers" in line


@pytest.mark.usefixtures("fresh_handler")
@pytest.mark.parametrize("at_work", [False, True])
def test_a_killed_loader_process_is_a_users_error(capsys, at_work):
    """Also while the main process is somewhere else than at the loader."""
    others = set(multiprocessing.active_children())
    stream = TrainStream(Numbers(), Prepare(CenterCrop(8)), 0, 4, 0, 1, Start())
    running = batches(stream, 2, CPU, 1)
    next(running)
    loader, *_ = set(multiprocessing.active_children()) - others
    for number in (signal.SIGINT, signal.SIGTERM):  # a terminal or Slurm sends them to all
        os.kill(loader.pid, number)
    for _ in range(20):
        next(running)

    def go_on():
        os.kill(loader.pid, signal.SIGKILL)
        if at_work:
            threading.Event().wait(20)  # the end of the loader interrupts whatever is done
        for _ in range(20):  # some batches are ready
            next(running)

    line = died(capsys, go_on)
    assert "a DataLoader worker died" in line and "--workers" in line
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    running.close()  # ends the other loader


def be_killed(end):
    """With loaders that have more to send than anybody reads; they hold `end` open."""
    torch.set_num_threads(1)
    running = batches(TrainStream(Numbers(), make_long, 0, 8, 0, 1, Start()), 2, CPU, 1)
    next(running)
    os.kill(os.getpid(), signal.SIGKILL)


def test_loaders_end_when_their_process_is_killed():
    ours, theirs = multiprocessing.Pipe(duplex=False)
    killed = multiprocessing.get_context("fork").Process(target=be_killed, args=(theirs,))
    killed.start()
    theirs.close()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    assert ours.poll(20)  # nobody holds the other end


def test_full_shared_memory_is_a_users_error(monkeypatch):
    def share(_):
        raise RuntimeError("no space left")

    monkeypatch.setattr(torch.Tensor, "share_memory_", share)
    monkeypatch.setattr(data, "get_worker_info", lambda: SimpleNamespace(id=0, num_workers=1))
    with pytest.raises(UserError, match=r"shared memory is full \(no space left\): .*--workers 0"):
        next(batches(OnePass(Numbers(), Prepare(CenterCrop(8)), 5), 0, CPU))


FAULT = """import torch, data
pictures = data.OnePass(data.load_source("shapes", "val"), lambda raw: 1 / 0, 5)
next(data.batches(pictures, 2, torch.device("cpu")))"""


def test_a_program_ends_after_an_error_in_a_loader_process():
    ended = run_python("-c", FAULT, check=False)
    assert ended.returncode == 1 and "ZeroDivisionError" in ended.stderr


def name_parent(_) -> BadSample:
    return BadSample("unreadable image", str(os.getppid()))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere loaders start as Python has it")
def test_loaders_are_children_of_the_process_that_they_serve():
    before = multiprocessing.get_start_method()
    multiprocessing.set_start_method("forkserver", force=True)  # Python 3.14's own choice
    try:
        got = list(batches(OnePass(Numbers(), name_parent, 5), 2, CPU))
    finally:
        multiprocessing.set_start_method(before, force=True)
    # A loader ends when its parent does: no other parent may stand between the two.
    assert {bad.detail for batch in got for bad in batch.bad} == {str(os.getpid())}


def test_an_error_in_a_loader_process_is_not_taken_for_its_death():
    def prepare(*_):
        raise RuntimeError("a fault of ours")

    with pytest.raises(RuntimeError, match="a fault of ours"):
        next(batches(TrainStream(Numbers(), prepare, 0, 4, 0, 1, Start()), 1, CPU))


def test_more_than_a_tenth_is_too_much():
    skipped = Counter({"unreadable image": 8, "missing caption": 2})
    refuse_if_bad(90, skipped)
    refuse_if_bad(80, skipped, enough=1000)
    with pytest.raises(UserError, match=r"10 of 99 .*: 8 x unreadable image, 2 x missing caption"):
        refuse_if_bad(89, skipped)


def test_colours_of_the_test_pictures_are_seen(pairs):
    source = load_source(str(pairs))
    for i in range(3):
        image = Prepare(CenterCrop(16))(source.raw(i)).image.float().mean(dim=(1, 2))
        assert (image - torch.tensor(list(COLOURS.values())[i]).float()).abs().max() < 25
