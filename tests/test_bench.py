"""The benchmarks that need a GPU to say anything, on the CPU: do they run, do they count right?"""

import json
import sys
from argparse import Namespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data import load_source, load_tokenizer
from superclass import SuperClass, ViT
from tests import bench_gpu, bench_recipe, roofline

TINY = "--device cpu --precision fp32 --model XXS/8 --image-size 16 --micro-batches 2 --quick"


def test_ladder_adds_each_row_to_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)  # as where it is not installed
    monkeypatch.setattr(bench_gpu, "KINDS", bench_gpu.KINDS[::2])
    monkeypatch.setattr(bench_gpu, "LADDER", [["float32 stream"], [], ["compiled blocks"]])
    monkeypatch.setattr(bench_gpu, "SINGLE", [["compiled blocks", "convolution"]])
    monkeypatch.setitem(bench_gpu.LEVERS, "compiled update", lambda step: 1 / 0)
    file = tmp_path / "ladder.jsonl"
    bench_gpu.main([*TINY.split(), "--ladder", "--json", str(file)])
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert rows[0]["matrix_product_tflops"] > 0
    levers = [row["levers"] for row in rows if "levers" in row]
    assert levers[:3] == bench_gpu.LADDER and levers[-1][-1] == "compiled update"
    assert all(row["images_per_s"] > 0 for row in rows[1:-2])
    assert "division by zero" in rows[-2]["failed"]  # does not end the ladder
    assert rows[-1]["kind"].startswith("SuperClass")
    assert "OpenCLIP, V 49,408 is left out" in capsys.readouterr().out


def test_ladder_skips_what_does_not_fit_its_time(capsys):
    bench_gpu.main([*TINY.split(), "--ladder", "--minutes", "0"])
    lines = capsys.readouterr().out.splitlines()
    skipped = [line for line in lines if "skipped" in line]
    assert len(skipped) > len(bench_gpu.LADDER) and "No time is left" in lines[-1]


@pytest.mark.parametrize("lever", ["float32 stream", "float32 norms", "convolution"])
def test_levers_change_no_loss(lever):
    args = Namespace(device=torch.device("cpu"), dtype=torch.float32, model="XXS/8", image_size=16)
    plain, changed = (bench_gpu.DeviceStep(args, 2, levers=some) for some in ([], [lever]))
    torch.testing.assert_close(changed.loss(), plain.loss())


def test_counted_flops_are_torchs():
    B, N, D, V, P, depth = 3, 4, 32, 50, 8, 2
    model = SuperClass(ViT(16, P, D, depth, 2), V)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.randn(B, 3, 16, 16)).sum().backward()
    ours = depth * sum(map(sum, roofline.block_flops(B, N, D).values()))
    ours += sum(map(sum, roofline.rest_flops(B, N, D, V, P).values()))
    assert ours == counter.get_total_flops()


def test_the_recipes_bench_makes_data_that_train_py_reads(tmp_path):
    words = bench_recipe.write_vocabulary(tmp_path / "v.tiktoken")
    bench_recipe.write_shards(tmp_path, 64, words)
    tokenizer = load_tokenizer(str(tmp_path / "v.tiktoken"), [])
    captions = list(load_source(str(tmp_path / "shards")).captions(100))
    assert tokenizer.n_vocab == bench_recipe.V and len(captions) == len(set(captions)) == 64
