"""--optimizer muon: its arithmetic, its share of the weights, and runs that use it."""

import pytest
import torch

import train
from eval import build_model, open_objective
from plugins.muon import MATRICES, Muon, orthogonalize
from tests.conftest import make_shards, train_flags
from tests.die import launch
from tests.test_ddp import TWENTY, assert_same_run, losses
from tests.test_train import assert_resumes_exactly, refused, state

MUON = ("--optimizer", "muon")


@pytest.mark.parametrize("shape", [(96, 32), (32, 96), (32, 32)])
def test_orthogonalize_keeps_directions_and_evens_out_their_sizes(shape, on_device):
    """Against the singular value decomposition of a matrix that is far from orthogonal."""
    u, _, v = torch.linalg.svd(torch.randn(*shape), full_matrices=False)
    matrix = u @ torch.diag(torch.linspace(0.05, 1, 32)) @ v
    sizes = (u.T @ orthogonalize(matrix) @ v.T).float()
    assert sizes.diagonal().min() > 0.5 and sizes.diagonal().max() < 1.3
    assert (sizes - sizes.diagonal().diag()).abs().max() < (0.05 if sizes.is_cuda else 1e-4)


def test_muon_is_torchs_but_for_bfloat16(monkeypatch):
    theirs = getattr(torch.optim, "Muon", None)
    if theirs is None:
        pytest.skip("this torch is older than 2.9")
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    weights = [torch.randn(shape) for shape in ((48, 16), (16, 16), (16, 64))]
    params = [[torch.nn.Parameter(w.clone()) for w in weights] for _ in range(2)]
    options = {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"}
    ours, theirs = Muon(params[0], 1e-2), theirs(params[1], 1e-2, **options)
    for _ in range(5):
        for p, q in zip(*params, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(*params, rtol=0, atol=1e-5)


@pytest.mark.parametrize("objective", ["superclass", "clip", "superclip"])
def test_muon_has_the_matrices_of_the_blocks(objective):
    config = train.make_parser().parse_args([*MUON, "--objective", objective])
    config.vocab_size = 300
    model = build_model(open_objective(config), config)
    optimizer = train.make_optimizer(model, config, lambda *_: None)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, decayed, others = [[names[id(p)] for p in g["params"]] for g in optimizer.param_groups]
    assert len(muon) == 4 * 4 * (2 if objective != "superclass" else 1)
    assert all(name.endswith(MATRICES) for name in muon)
    assert "encoder.patch_embed.proj.weight" in decayed and "encoder.pos_embed" in others
    assert sorted(muon + decayed + others) == sorted(names.values())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 0.2, 0]


RESUMED = [["--objective", "clip"], ["--precision", "fp16"], ["--micro-batch", "2"]]


@pytest.mark.parametrize("flags", RESUMED, ids="-".join)
def test_a_run_with_muon_resumes_exactly(pairs, tmp_path, flags):
    flags = ["--samples", "20", "--batch-size", "4", "--workers", "0", *MUON, *flags]
    assert_resumes_exactly(train_flags(pairs, tmp_path / "run", "--save-every", "2", *flags), 4)


def test_both_parts_follow_the_schedule(pairs, tmp_path):
    train.main(train_flags(pairs, tmp_path / "run", "--samples", "32", "--workers", "0", *MUON))
    rates = losses(tmp_path / "run", "lr")
    parts = state(tmp_path / "run")["optimizer"]["parts"]
    assert [g["lr"] for part in parts for g in part["param_groups"]] == [rates[-1]] * 3


def test_two_processes_with_muon_are_one(tmp_path, device):
    if device.type == "mps":
        pytest.skip("gloo has no MPS")
    shards = make_shards(tmp_path / "shards")
    train.main(train_flags(shards, tmp_path / "one", *TWENTY, "--workers", "0", *MUON))
    two = launch(train_flags(shards, tmp_path / "two", *TWENTY, "--workers", "2", *MUON), world=2)
    assert two.codes == [0, 0], two.said
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_a_network_without_blocks_is_refused(capsys, pairs, tmp_path):
    flags = train_flags(pairs, tmp_path / "run", *MUON, "--model", "convnext_tiny")
    error = refused(capsys, *flags, "--samples", "8")
    assert "--optimizer muon is for transformer blocks" in error
