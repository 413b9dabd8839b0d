"""torchvision's sets and COCO, from files in the layout that they are published in."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

import eval as evaluation
import train
from data import BadSample, UserError, load_source
from plugins.torchsets import TEMPLATES
from tests.conftest import COLOURS, caption, encoded, make_pairs, picture, train_flags, write_tar
from tests.test_train import refused

NAMES = list(COLOURS)


def test_torchvision_sets_without_files_or_network_say_where_they_belong(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"FashionMNIST/raw .*--data-root"):
        load_source("fashion-mnist", root=str(tmp_path))
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        load_source("cifar10", root=str(tmp_path))
    with pytest.raises(UserError, match=r"meta.bin .*ILSVRC2012_img_val.tar\) under .*--data-root"):
        load_source("imagenet", "val", root=str(tmp_path))
    with pytest.raises(UserError, match=r"cars_train_annos.mat, .*cars_test/ .*scipy"):
        load_source("cars", root=str(tmp_path))
    with pytest.raises(UserError, match=r"put the images into .*coco/train2014 and captions_train"):
        load_source("coco:2014", root=str(tmp_path))
    for name in ("pets", "food101", "flowers102", "dtd", "stl10", "eurosat", "sun397"):
        with pytest.raises(UserError, match=r"no network\): torchvision wants .*--data-root"):
            load_source(name, root=str(tmp_path / name))


def test_fashion_mnist_reads_torchvisions_files(tmp_path):
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("train", "t10k"):
        images = np.random.default_rng(len(name)).integers(0, 255, (20, 28, 28), dtype=np.uint8)
        header = b"\0\0\x08\x03" + b"".join(n.to_bytes(4, "big") for n in (20, 28, 28))
        (raw / f"{name}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        labels = bytes(i % 10 for i in range(20))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(
            b"\0\0\x08\x01" + (20).to_bytes(4, "big") + labels
        )
    source = load_source("fashion-mnist", root=str(tmp_path))
    assert source.attributes["class"][0] == ["t-shirt", "top"]
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 36
    assert list(source.captions(20)) == [source.raw(i).caption for i in range(20)]
    assert source.raw(0).caption == "a typical top"  # as in the runs so far
    assert "boot" in source.raw(9).caption and source.raw(9).targets == (9,)
    val = load_source("fashion-mnist", "val", str(tmp_path))
    assert val.raw(0).image.tobytes() != source.raw(0).image.tobytes()
    (tmp_path / "two.txt").write_text("yes\nno\n")
    with pytest.raises(UserError, match="has 2 classes, FashionMNIST has 10"):
        load_source("fashion-mnist", root=str(tmp_path), class_names=str(tmp_path / "two.txt"))


# ------------------------------------------------------------------------------------------------
# Sets of files. A picture's colour is its class: i % 3 of red, green and blue.


def put(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def jpeg(i: int) -> bytes:
    return encoded(picture(i))


def tar_bytes(members: list[tuple[str, bytes]], mode="w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


WNIDS = ("n01440764", "n01443537", "n01484850")
SYNONYMS = [(f"{name.title()} thing", f"{name} synonym") for name in NAMES]


def imagenet(root):
    """As torchvision leaves it: folders of wnids, and meta.bin."""
    for split in ("train", "val"):
        for i in range(24):
            put(root / split / WNIDS[i % 3] / f"{WNIDS[i % 3]}_{i}.JPEG", jpeg(i))
    meta = dict(zip(WNIDS, SYNONYMS, strict=True)), [WNIDS[i % 3] for i in range(24)]
    torch.save(meta, root / "meta.bin")


def imagenet_archives(root, monkeypatch):
    """As image-net.org has it: a tar of tars, a tar of images, and the devkit."""
    savemat = pytest.importorskip("scipy.io").savemat
    from torchvision.datasets import imagenet as module

    kinds = [("ILSVRC2012_ID", float), ("WNID", object), ("words", object), ("gloss", object)]
    rows = [
        (i + 1.0, wnid, ", ".join(names), "a gloss", 0.0)
        for i, (wnid, names) in enumerate(zip(WNIDS, SYNONYMS, strict=True))
    ]
    rows.append((4.0, "n00001740", "entity", "a class above them", 3.0))
    synsets, mat = np.array(rows, dtype=[*kinds, ("num_children", float)]), io.BytesIO()
    savemat(mat, {"synsets": synsets})
    inside, truth = "ILSVRC2012_devkit_t12/data", "".join(f"{i % 3 + 1}\n" for i in range(24))
    members = [
        (f"{inside}/meta.mat", mat.getvalue()),
        (f"{inside}/ILSVRC2012_validation_ground_truth.txt", truth.encode()),
    ]
    put(root / "ILSVRC2012_devkit_t12.tar.gz", tar_bytes(members, "w:gz"))
    classes = [
        (f"{wnid}.tar", tar_bytes([(f"{wnid}_{i}.JPEG", jpeg(i)) for i in range(c, 24, 3)]))
        for c, wnid in enumerate(WNIDS)
    ]
    write_tar(root / "ILSVRC2012_img_train.tar", classes)
    val = [(f"ILSVRC2012_val_{i + 1:08d}.JPEG", jpeg(i)) for i in range(24)]
    write_tar(root / "ILSVRC2012_img_val.tar", val)
    files = {key: (name, None) for key, (name, _) in module.ARCHIVE_META.items()}
    monkeypatch.setattr(module, "ARCHIVE_META", files)  # their sums are those of the real files


def pets(root):
    folder = root / "oxford-iiit-pet"
    for split in ("trainval", "test"):
        lines = []
        for i in range(24):
            name = f"{NAMES[i % 3].title()}_Cat_{split}{i}".replace(f"_{split}", f"_{len(split)}")
            put(folder / "images" / f"{name}.jpg", jpeg(i))
            lines.append(f"{name} {i % 3 + 1} 1 {i % 3 + 1}\n")
        put(folder / "annotations" / f"{split}.txt", "".join(lines).encode())


def cars(root):
    savemat = pytest.importorskip("scipy.io").savemat
    folder = root / "stanford_cars"
    (folder / "devkit").mkdir(parents=True)
    names = np.array([f"{name.title()} C/V Van 2012" for name in NAMES], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    kinds = [(f"bbox_{side}", np.uint16) for side in ("x1", "y1", "x2", "y2")]
    kinds += [("class", np.uint8), ("fname", object)]
    for split, file in (
        ("train", "devkit/cars_train_annos"),
        ("test", "cars_test_annos_withlabels"),
    ):
        rows = [(0, 0, 40, 40, i % 3 + 1, f"{i + 1:05d}.jpg") for i in range(24)]
        savemat(folder / f"{file}.mat", {"annotations": np.array(rows, dtype=kinds)})
        for i in range(24):
            put(folder / f"cars_{split}" / f"{i + 1:05d}.jpg", jpeg(i))


def food101(root):
    for split in ("train", "test"):
        found = {name: [] for name in NAMES}
        for i in range(24):
            found[NAMES[i % 3]].append(f"{NAMES[i % 3]}/{i}")
            put(root / "food-101/images" / NAMES[i % 3] / f"{i}.jpg", jpeg(i))
        put(root / "food-101/meta" / f"{split}.json", json.dumps(found).encode())


def dtd(root):
    for split in ("train", "val", "test"):
        names = [f"{NAMES[i % 3]}/{NAMES[i % 3]}_{i}.jpg" for i in range(24)]
        put(root / "dtd/dtd/labels" / f"{split}1.txt", "".join(f"{n}\n" for n in names).encode())
        for i, name in enumerate(names):
            put(root / "dtd/dtd/images" / name, jpeg(i))


def eurosat(root):
    for i in range(24):
        put(root / "eurosat/2750" / f"{NAMES[i % 3].title()}Lake" / f"{i}.jpg", jpeg(i))


def sun397(root):
    for i in range(24):
        put(root / "SUN397/a" / NAMES[i % 3] / "outdoor" / f"sun_{i}.jpg", jpeg(i))
    put(root / "SUN397/ClassName.txt", "".join(f"/a/{n}/outdoor\n" for n in NAMES).encode())


def caltech101(root):
    pytest.importorskip("scipy")
    for i in range(24):
        name = f"{NAMES[i % 3]}/image_{i // 3 + 1:04d}.jpg"
        put(root / "caltech101/101_ObjectCategories" / name, jpeg(i))
    put(root / "caltech101/101_ObjectCategories/BACKGROUND_Google/image_0001.jpg", jpeg(0))


@pytest.fixture(scope="module")
def run(tmp_path_factory, device):
    """A run that knows red, green and blue from captions."""
    folder = tmp_path_factory.mktemp("colours")
    flags = train_flags(make_pairs(folder / "pairs"), folder / "run", "--no-first-eval")
    train.main([*flags, "--samples", "800", "--workers", "0"])
    return folder / "run"


def score(run, capsys, *argv) -> list[str]:
    """The last line that eval.py prints."""
    capsys.readouterr()
    evaluation.main([argv[0], str(run), *map(str, argv[1:]), "--workers", "0"])
    return capsys.readouterr().out.splitlines()[-1].split()


PUBLISHED = {
    imagenet: "red thing",
    pets: "red cat",
    cars: "red c v van 2012",
    food101: "red",
    dtd: "red",
}
WHOLE = {eurosat: "red lake", sun397: "red outdoor", caltech101: "red"}


@pytest.mark.parametrize("make", PUBLISHED, ids=lambda make: make.__name__)
def test_from_the_published_files_to_a_printed_score(run, capsys, tmp_path, make):
    make(tmp_path)
    spec, place = make.__name__, ("--data-root", tmp_path)
    source = load_source(spec, "val", str(tmp_path))
    assert sorted(source.attributes["class"])[-1] == [PUBLISHED[make]]
    mine = source.attributes["class"].index([PUBLISHED[make]])
    captions = [raw.caption for raw in map(source.raw, range(24)) if raw.targets == (mine,)]
    assert len(captions) == 8 and all(PUBLISHED[make] in caption for caption in captions)
    line = score(run, capsys, "zeroshot", "--data", spec, *place)
    assert line[:4] == ["zeroshot", "class", "3", "24"] and float(line[4]) > 0.9
    line = score(run, capsys, "probe", "--data", spec, *place)
    assert line[:6] == ["probe", "on", "24", "class", "3", "24"] and float(line[6]) > 0.9
    names = tmp_path / "names.txt"
    names.write_text("green\nblue\nred\n")  # all wrong
    if make in (imagenet, pets, cars):  # whose classes are red, green and blue, in this order
        line = score(run, capsys, "zeroshot", "--data", spec, *place, "--class-names", names)
        assert float(line[4]) < 0.1


@pytest.mark.parametrize("make", WHOLE, ids=lambda make: make.__name__)
def test_a_set_without_an_official_split_says_so(run, capsys, tmp_path, make):
    make(tmp_path)
    spec, place = make.__name__, ("--data-root", tmp_path)
    source = load_source(spec, "val", str(tmp_path))
    assert "no official split" in capsys.readouterr().err and len(source) == 24
    assert [WHOLE[make]] in source.attributes["class"] and not source.has_splits
    assert float(score(run, capsys, "zeroshot", "--data", spec, *place)[4]) > 0.9
    error = refused(capsys, "probe", run, "--data", spec, *place, main=evaluation.main)
    assert "no validation data" in error


def test_imagenet_is_read_from_its_archives(run, capsys, tmp_path, monkeypatch):
    imagenet_archives(tmp_path, monkeypatch)
    line = score(run, capsys, "probe", "--data", "imagenet", "--data-root", tmp_path)
    assert line[2:6] == ["24", "class", "3", "24"] and float(line[6]) > 0.9
    assert load_source("imagenet", "val", str(tmp_path)).attributes["class"][0] == ["red thing"]


@pytest.mark.parametrize("damage", [b"", b"no pickle", b"PK\x03\x04"])
def test_damaged_names_are_one_sentence(tmp_path, damage):
    imagenet(tmp_path)
    (tmp_path / "meta.bin").write_bytes(damage)
    with pytest.raises(UserError, match="ImageNet cannot be opened"):
        load_source("imagenet", "val", str(tmp_path))


@pytest.mark.parametrize("make", [imagenet, pets], ids=lambda make: make.__name__)
def test_a_damaged_file_is_a_bad_sample(run, capsys, tmp_path, make):
    """torchvision opens pets by itself; the files of the others are opened as all are."""
    make(tmp_path)
    source = load_source(make.__name__, "val", str(tmp_path))
    pattern = "val/*/*.JPEG" if make is imagenet else "oxford-iiit-pet/images/*_40.jpg"
    next(tmp_path.glob(pattern)).write_bytes(b"no image")
    if make is pets:
        assert sum(isinstance(source.raw(i), BadSample) for i in range(24)) == 1
    capsys.readouterr()
    flags = ["--data", make.__name__, "--data-root", str(tmp_path), "--workers", "0"]
    evaluation.main(["zeroshot", str(run), *flags])
    said = capsys.readouterr()
    assert "skipped 1 x unreadable image" in said.err and " 23 " in said.out


# ------------------------------------------------------------------------------------------------
# COCO.


def coco(root):
    for name in ("train2017", "val2017"):
        images = [{"id": 10 * i, "file_name": f"{i:012d}.jpg", "width": 40} for i in range(24)]
        texts = [
            {"image_id": 10 * i, "id": 100 * i + n, "caption": text}
            for i in range(24)
            for n, text in enumerate((caption(i), f"a {NAMES[i % 3]} picture"))
        ]
        for i in range(24):
            put(root / "coco" / name / f"{i:012d}.jpg", jpeg(i))
        found = {"info": {}, "licenses": [], "images": images, "annotations": texts}
        put(root / "coco/annotations" / f"captions_{name}.json", json.dumps(found).encode())


def test_coco_from_the_published_files_to_recall(run, capsys, tmp_path):
    coco(tmp_path)
    place = ("--data", "coco", "--data-root", tmp_path)
    line = score(run, capsys, "retrieval", *place)
    assert line[:3] == ["retrieval", "48", "images"]
    recall = dict(zip(line[3::2], map(float, line[4::2]), strict=True))
    assert recall["i2t@10"] >= recall["i2t@1"] > 0.4  # chance: 0.03


def test_coco_trains_a_captioner_to_a_printed_score(run, capsys, tmp_path):
    coco(tmp_path)
    flags = train_flags(
        "coco", tmp_path / "captioner", "--objective", "caption", "--init", str(run)
    )
    flags += ["--data-root", str(tmp_path), "--samples", "16", "--no-first-eval", "--workers", "0"]
    train.main(flags)
    assert "caption        24 images  cider" in capsys.readouterr().out  # two references each


def test_what_coco_does_not_fit_together_is_counted(tmp_path):
    coco(tmp_path)
    path = tmp_path / "coco/annotations/captions_val2017.json"
    found = json.loads(path.read_text())
    found["annotations"][0]["image_id"] = 7  # there is no such image
    found["annotations"][1]["image_id"] = 7  # and now one image has no caption
    path.write_text(json.dumps(found))
    source = load_source("coco", "val", str(tmp_path))
    bad = [raw for raw in map(source.raw, range(len(source))) if isinstance(raw, BadSample)]
    assert len(source) == 49 and [sample.kind for sample in bad] == ["unreadable row"] * 2
    assert "captions_val2017.json" in source.raw(48).caption.detail
    path.write_text("[]")
    with pytest.raises(UserError, match="COCO cannot be opened"):
        load_source("coco", "val", str(tmp_path))
