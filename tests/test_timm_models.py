"""timm's networks as encoders: tokens, normalisation, names, published weights, exact resume."""

import sys
from argparse import Namespace

import pytest
import timm
import torch
from torchvision.transforms.v2 import functional as transforms

import data
import eval as evaluation
import train
from plugins import UserError
from plugins.timm_models import build_encoder, load_published, options
from superclass import SuperClass, ViT
from tests.conftest import load, make_pairs, train_flags
from tests.test_train import assert_same, metrics, refused, run_and_killed_copy, state

VIT = "test_vit"  # timm's own smallest; its mean and deviation are 0.5


@pytest.mark.parametrize(
    ("name", "prefix", "width"),
    [("test_vit4", 1, 96), ("vit_wee_patch16_reg1_gap_256", 1, 256), ("test_resnet", 0, 96)],
)
def test_tokens_are_timms_own_on_its_own_normalisation(name, prefix, width):
    torch.manual_seed(0)
    encoder = build_encoder(64, name).double().eval()
    network = timm.create_model(name, **options(name, 64)).double().eval()
    network.load_state_dict(encoder.state_dict())  # strictly: the names are timm's
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    config = network.pretrained_cfg
    own = transforms.normalize(pixels.double() / 255, list(config["mean"]), list(config["std"]))
    with torch.no_grad():
        expected = network.forward_features(own)
        if expected.ndim == 4:
            expected = expected.flatten(2).transpose(1, 2)
        tokens = encoder(data.normalize(pixels).double())
    assert tokens.shape[2] == encoder.width == width
    torch.testing.assert_close(tokens, expected[:, prefix:], atol=1e-5, rtol=1e-5)


def test_all_that_is_trained_gets_a_gradient():
    """Weights of a pooling that is not used would stop DistributedDataParallel."""
    encoder = build_encoder(64, "test_convnext")
    frozen = [name for name, p in encoder.named_parameters() if not p.requires_grad]
    assert frozen and all(name.startswith("head.") for name in frozen)
    SuperClass(encoder, 9)(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters() if p.requires_grad)


def flags_of(tmp_path, *more):
    flags = ["--model", f"timm:{VIT}", "--image-size", "64", "--samples", "20", "--batch-size"]
    flags += ["4", "--save-every", "2", "--workers", "0", "--no-first-eval", *more]
    return train_flags(make_pairs(tmp_path / "pairs"), tmp_path / "run", *flags)


def test_a_run_resumes_exactly_and_its_encoder_loads_into_timm(tmp_path, device):
    run, killed = run_and_killed_copy(flags_of(tmp_path, "--grad-checkpointing"), 4)
    train.main(["--out", str(killed), "--resume"])
    assert_same(state(killed), state(run))
    assert metrics(killed) == metrics(run)
    network = timm.create_model(VIT, **options(VIT, 64))
    network.load_state_dict(load(run / "encoder.pt"))
    again = evaluation.load_run(run, device).model.encoder
    assert_same(
        dict(again.state_dict()), {k: v.to(device) for k, v in network.state_dict().items()}
    )


@pytest.fixture
def published(tmp_path, monkeypatch):
    """The weights that timm publishes, as a file for another image size."""
    torch.manual_seed(1)
    network, create = timm.create_model(VIT, num_classes=7), timm.create_model
    torch.save(network.state_dict(), path := tmp_path / "published.pth")

    def fetch(name, pretrained=False, **given):
        cfg = {"file": str(path), "num_classes": 7} if pretrained else None
        return create(name, pretrained, pretrained_cfg_overlay=cfg, **given)

    monkeypatch.setattr(timm, "create_model", fetch)
    return network


def test_published_weights_are_what_a_run_starts_from(tmp_path, published, capsys):
    train.main(flags_of(tmp_path, "--init", "published", "--lr", "0"))
    assert f"init    the published weights of timm's {VIT}: " in capsys.readouterr().out
    weights = load(tmp_path / "run" / "encoder.pt")
    theirs = published.state_dict()
    assert {name for name in theirs if name not in weights} == {"head.weight", "head.bias"}
    same = [name for name in weights if torch.equal(weights[name], theirs[name])]
    assert {*weights} - {*same} == {"pos_embed"}  # for fewer patches, by timm


def test_weights_that_cannot_be_had_are_one_sentence(tmp_path, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise OSError("no network. And more")

    monkeypatch.setattr("timm.models._builder.load_pretrained", fail)
    error = refused(capsys, *flags_of(tmp_path, "--init", "published"))
    assert f"the published weights of timm's {VIT} cannot be had (no network): save" in error
    assert "pretrained=True, num_classes=0, global_pool='', img_size=64)" in error
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_used_is_refused_in_one_sentence(tmp_path, monkeypatch, capsys):
    for name, said in {
        "vit_tny_patch16_224": "timm has no network 'vit_tny_patch16_224'; close to it: vit_tiny",
        "hf-hub:stranger/vit": "timm has no network 'hf-hub:stranger/vit'",
        "": "timm has no network ''; timm.list_models",
    }.items():
        with pytest.raises(UserError, match=said):
            build_encoder(64, name)
    for name in ("test_vit4", "test_vit", "volo_d1_224"):  # 8 px left over; not square
        with pytest.raises(ValueError, match=r"cannot be used so: .*(square|divis)"):
            build_encoder(72, name)
    with pytest.raises(UserError, match="for --model timm:NAME, not for XS/8"):
        load_published(
            SuperClass(ViT(16, 8, 32, 1, 2), 9), None, Namespace(model="XS/8"), "", print
        )
    error = refused(capsys, *flags_of(tmp_path, "--image-size", "36"))
    assert f"--model timm:{VIT}, 36 px: timm's network cannot be used so: " in error
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="needs the package timm"):
        build_encoder(64, VIT)
