"""The two splits of a logit: against the formula in float64, against each other, and their sums."""

import numpy as np
import pytest
import torch

from shares import Held, input_shares, output_shares
from superclass import SuperClass, ViT, build_encoder


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model whose norms, biases and statistics are as far from their start as training's."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p += 0.3 * torch.randn_like(p)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return model.eval()


def small_model() -> SuperClass:
    torch.manual_seed(0)
    return shaken(SuperClass(ViT(16, 4, 32, 2, 4), 50))


@pytest.mark.parametrize("bf16", [False, True])
def test_shares_of_the_output_sum_to_the_logit(bf16):
    model, images = small_model(), torch.randn(3, 3, 16, 16)
    weights = torch.zeros(50)
    weights[[3, 8]] = torch.tensor([0.3, 0.7])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        shares, constant = output_shares(model, images, weights)
        tokens, rounded = model.encoder(images), model(images).float()
    assert shares.shape == (3, 16) and constant.shape == (3,) and shares.dtype == torch.float32
    with torch.no_grad():
        logits = model.head(model.norm(tokens.float().mean(dim=1)))  # from the same tokens
    total = shares.sum(dim=1) + constant
    torch.testing.assert_close(total, logits @ weights, rtol=0, atol=1e-4)
    torch.testing.assert_close(total, rounded @ weights, rtol=0, atol=0.05 if bf16 else 1e-4)


def test_shares_of_the_output_are_those_of_each_patch():
    """By hand, in float64, from before the encoder's last norm: through both norms."""
    model, images, c = small_model().double(), torch.randn(2, 3, 16, 16).double(), 5
    before = []
    model.encoder.norm.register_forward_pre_hook(lambda _, args: before.append(args[0]))
    with torch.no_grad():
        p = model.features(images).numpy()
    x, encoder_norm, norm = before[0].numpy(), model.encoder.norm, model.norm
    g1, b1, g2 = (t.detach().numpy() for t in (encoder_norm.weight, encoder_norm.bias, norm.weight))
    w = model.head.weight[c].detach().numpy()
    expected = np.zeros((2, 16))
    for i in range(2):
        deviation = np.sqrt(p[i].var() + norm.eps)
        for n in range(16):
            own = (x[i, n] - x[i, n].mean()) / np.sqrt(x[i, n].var() + encoder_norm.eps)
            z = g1 * own + b1
            expected[i, n] = sum(w * g2 * (z - z.mean())) / deviation / 16
    weights = torch.nn.functional.one_hot(torch.tensor(c), 50).float()
    shares, _ = output_shares(model.float(), images.float(), weights)
    np.testing.assert_allclose(shares.numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["XXS/8", "resnet50", "convnext_tiny"])
@pytest.mark.parametrize("split", [output_shares, input_shares])
def test_shares_of_all_encoders_sum_to_the_logit(name, split):
    model = shaken(SuperClass(build_encoder(name, 64), 20))
    images, weights = torch.randn(2, 3, 64, 64), torch.rand(2, 20)
    shares, constant = split(model, images, weights)
    assert shares.shape == (2, 64 if name == "XXS/8" else 4)
    with torch.no_grad():
        logits = model(images)
    expected = (logits * weights).sum(dim=1)
    torch.testing.assert_close(shares.sum(dim=1) + constant, expected, rtol=1e-4, atol=1e-4)


def test_shares_of_the_input_leave_nothing_out():
    """Without biases and positions, no constant is left: all of a logit comes from the pixels."""
    model = small_model()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("bias", "pos_embed")):
                p.zero_()
    images = torch.randn(3, 3, 16, 16)
    shares, constant = input_shares(model, images, torch.eye(50)[7])
    torch.testing.assert_close(constant, torch.zeros(3), rtol=0, atol=1e-4)
    with torch.no_grad():
        logits = model(images)
    torch.testing.assert_close(shares.sum(dim=1), logits[:, 7], rtol=0, atol=1e-4)
    assert logits[:, 7].abs().min() > 0.01


def test_holding_changes_no_value_and_mends_every_gradient():
    """The map that is held is linear: its gradient is that of a difference, however large."""
    model, images = small_model(), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        plain = model(images)
        with Held():
            torch.testing.assert_close(model(images), plain, rtol=1e-5, atol=1e-5)
    x = torch.linspace(-4, 4, 9, requires_grad=True)
    with Held():
        y = torch.nn.functional.gelu(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close((gradient * x).detach(), y.detach())
    q, k, v = (torch.randn(1, 2, 5, 3, requires_grad=True) for _ in range(3))
    with Held():
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    assert not out.grad_fn.next_functions[0][0] or torch.autograd.grad(
        out.sum(), [q, k], allow_unused=True
    ) == (None, None)


def test_a_patch_that_does_not_reach_others_has_the_same_share_at_both_ends():
    """Without attention and positions, output and input differ in the constants only."""
    model = small_model()
    with torch.no_grad():
        model.encoder.pos_embed.zero_()
        for name, p in model.named_parameters():
            if ".attn.proj" in name or name.endswith("bias"):
                p.zero_()
    images, weights = torch.randn(2, 3, 16, 16), torch.rand(50)
    at_input, _ = input_shares(model, images, weights)
    at_output, _ = output_shares(model, images, weights)
    torch.testing.assert_close(at_input, at_output, rtol=1e-4, atol=1e-5)
