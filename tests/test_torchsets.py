"""torchvision's classified sets, from files as it writes them."""

import numpy as np
import pytest

from data import UserError, load_source
from plugins.torchsets import TEMPLATES


def test_torchvision_sets_without_files_or_network_say_where_they_belong(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(UserError, match=r"FashionMNIST/raw .*--data-root"):
        load_source("fashion-mnist", root=str(tmp_path))
    with pytest.raises(UserError, match="cifar-10-batches-py"):
        load_source("cifar10", root=str(tmp_path))


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
    assert "boot" in source.raw(9).caption and source.raw(9).targets == (9,)
    val = load_source("fashion-mnist", "val", str(tmp_path))
    assert val.raw(0).image.tobytes() != source.raw(0).image.tobytes()
