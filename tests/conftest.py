"""--device, small data sets that the tests draw for themselves, and a way to run a command."""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

if "OMP_WAIT_POLICY" not in os.environ:  # as in train.py, before torch is imported
    os.environ.setdefault("GOMP_SPINCOUNT", "4000")

import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
from data import UserError

torch.set_num_threads(1)  # as in the processes that tests start: sums depend on the number
ROOT = Path(__file__).parent.parent
FIRST = ("resume", "processes", "waits", "networks", "killed", "compiled")  # on a device
COLOURS = {"red": (200, 30, 30), "green": (30, 160, 40), "blue": (20, 60, 220)}


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where what has a device is tested: cuda, mps")
    parser.addoption("--part", default="1/1", help="1/2 and 2/2: every other test, each on its own")


def pytest_configure(config):
    config.addinivalue_line("markers", "device: a test that runs on --device")
    name = config.getoption("device")
    if name == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # or --device auto would find a GPU
    elif name.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the same bits each time
    try:
        config.device = evaluation.pick_device("cuda:0" if name == "cuda" else name)
    except UserError as error:
        raise pytest.UsageError(str(error)) from None
    TINY.extend(["--device", str(config.device)])


def pytest_itemcollected(item):
    if "device" in item.fixturenames:
        item.add_marker("device")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config, items):
    """With --device, the slowest files first, and in each what failed on a GPU before."""
    part, parts = map(int, config.getoption("part").split("/"))
    if config.device.type != "cpu":  # a file's tests stay together, since they share runs
        named = lambda item: any(word in item.name for word in FIRST)  # noqa: E731
        slow = ("test_ddp", "test_train")
        items.sort(key=lambda i: (i.path.stem not in slow, i.path.stem, not named(i)))
    items[:] = items[part - 1 :: parts]


@pytest.fixture(scope="session")
def device(request) -> torch.device:
    """A test that asks for this, itself or through a fixture, does its work on --device."""
    return request.config.device


@pytest.fixture
def on_device(device):
    """Tensors and modules that a test makes are on --device."""
    if device.type == "cpu":
        yield
    else:
        with device:
            yield


def load(path: Path) -> dict:
    """A file of tensors, on the CPU."""
    return torch.load(path, map_location="cpu", weights_only=True)


def picture(i: int, size: int = 40) -> Image.Image:
    """A noisy picture in the colour of its class."""
    rng = np.random.default_rng(i)
    colour = list(COLOURS.values())[i % 3]
    pixels = (np.array(colour) + rng.normal(0, 20, (size, size, 3))).clip(0, 255)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def caption(i: int) -> str:
    return f"a {list(COLOURS)[i % 3]} picture number {i % 10}"


def as_labels(ids: torch.Tensor) -> torch.Tensor:
    """Token ids [B, K] with repeats -> labels: the set of each row, padded with -1."""
    rows = [sorted(set(row) - {-1}) for row in ids.tolist()]
    longest = max(map(len, rows))
    return torch.tensor([row + [-1] * (longest - len(row)) for row in rows], dtype=torch.int64)


def write_tar(path: Path, members: list[tuple[str, bytes]]):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def sample_members(i: int, size: int = 40) -> list[tuple[str, bytes]]:
    key = f"{i:06d}"
    return [(f"{key}.jpg", encoded(picture(i, size))), (f"{key}.txt", caption(i).encode())]


def make_pairs(folder: Path) -> Path:
    """A folder of 24 pictures with captions, without classes."""
    folder.mkdir()
    for i in range(24):
        picture(i).save(folder / f"{i:03d}.png")
        (folder / f"{i:03d}.txt").write_text(caption(i))
    return folder


def make_shards(folder: Path) -> Path:
    """A folder of six shards of ten samples each."""
    folder.mkdir()
    for s in range(6):
        members = [m for i in range(10) for m in sample_members(10 * s + i)]
        write_tar(folder / f"{s:05d}.tar", members)
    return folder


@pytest.fixture
def pairs(tmp_path) -> Path:
    return make_pairs(tmp_path / "pairs")


@pytest.fixture
def shards(tmp_path) -> Path:
    return make_shards(tmp_path / "shards")


TINY = [
    "--model",
    "XS/16",
    "--tokenizer",
    "bpe:300",
    "--batch-size",
    "8",
    "--log-every",
    "1",
    "--warmup",
    "2",
    "--lr",
    "1e-3",
    "--precision",
    "fp32",  # whatever the machine prefers: promises are kept to float32's rounding
]


def train_flags(data: Path, out: Path, *more: str) -> list[str]:
    return [*TINY, "--data", str(data), "--out", str(out), *more]


def run_python(*command: str, check: bool = True, **env: str) -> subprocess.CompletedProcess:
    """Run Python on the command in the repository, with one thread a process."""
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, text=True, capture_output=True, check=check,
        timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )  # fmt: skip
