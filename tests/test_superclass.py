"""The method against independent dense float64 versions, and the encoder against timm."""

import math

import pytest
import timm
import torch
import torch.nn.functional as F

from superclass import IDF, PatchEmbed, SuperClass, ViT, build_encoder, superclass_loss
from tests.conftest import as_labels


def dense_loss(logits, captions, weights):
    """The paper's equations, token by token in float64; `captions` are lists of ids."""
    total, weights = 0.0, weights.cpu()
    for x, caption in zip(logits.double(), captions, strict=True):
        target = torch.zeros_like(x)
        for token in caption:
            target[token] = weights[token].double()
        if target.sum() > 0:
            total = total - (target / target.sum() * torch.log_softmax(x, dim=0)).sum()
    return total / len(captions)


def pad(captions):
    longest = max(map(len, captions))
    return torch.tensor([caption + [-1] * (longest - len(caption)) for caption in captions])


CAPTIONS = [
    [3, 7, 11],
    [5, 9],
    [0],
    [60],  # a token of weight zero only
    [],  # nothing at all
    [60, 2, 49, 13],
]


def twin(x):
    """The same logits in float64 on the CPU, which all devices are compared with."""
    return x.detach().cpu().double().requires_grad_()


@pytest.fixture
def weights(on_device):
    torch.manual_seed(1)
    weights = torch.rand(61) * 5
    weights[60] = 0.0
    return weights


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_loss_equals_dense_float64(device, weights, autocast, scale):
    torch.manual_seed(0)
    x = (torch.randn(len(CAPTIONS), 61) * scale).requires_grad_()
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        loss = superclass_loss(x, pad(CAPTIONS), weights)
    assert loss.dtype == torch.float32
    z = twin(x)
    expected = dense_loss(z, CAPTIONS, weights)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    (3 * loss).backward()
    (3 * expected).backward()
    torch.testing.assert_close(x.grad.cpu().double(), z.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_loss_of_half_precision_logits_is_computed_in_float32(weights, dtype, rtol):
    torch.manual_seed(0)
    x = torch.randn(len(CAPTIONS), 61).to(dtype).requires_grad_()
    loss = superclass_loss(x, pad(CAPTIONS), weights)
    z = twin(x)
    expected = dense_loss(z, CAPTIONS, weights)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.cpu(), z.grad.to(dtype), rtol=rtol, atol=1e-6)


def test_loss_of_many_rows_at_once_equals_their_mean(on_device):
    """More rows than are worked through at a time."""
    torch.manual_seed(0)
    V = 2**16  # two rows at a time, on the CPU
    x = torch.randn(5, V).requires_grad_()
    labels = as_labels(torch.randint(V, (5, 4)))
    loss = superclass_loss(x, labels, torch.ones(V))
    z = twin(x)
    expected = dense_loss(z, labels.tolist(), torch.ones(V))
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-5)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(x.grad.cpu().double(), z.grad, rtol=1e-4, atol=1e-9)


def test_caption_without_weight_has_no_loss_and_no_gradient(weights):
    x = torch.randn(2, 61, requires_grad=True)
    loss = superclass_loss(x, torch.tensor([[60, -1], [-1, -1]]), weights)
    loss.backward()
    assert loss == 0 and torch.all(x.grad == 0)


def test_loss_keeps_one_tensor_as_wide_as_the_vocabulary(weights):
    x = torch.randn(4, 61, requires_grad=True)
    loss = superclass_loss(x, torch.tensor([[1, 2]] * 4), weights)
    wide = [t for t in loss.grad_fn.saved_tensors if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in wide] == [x.data_ptr()]


def test_loss_at_the_start_is_log_v_and_a_half(on_device):
    torch.manual_seed(0)
    V = 5000
    model = SuperClass(build_encoder("XS/8", 32), V)
    with torch.no_grad():
        loss = superclass_loss(
            model(torch.randn(64, 3, 32, 32)), as_labels(torch.randint(V, (64, 8))), torch.ones(V)
        )
    assert abs(loss.item() - (math.log(V) + 0.5)) < 0.1


def test_loss_refuses_what_does_not_fit():
    x, weights = torch.randn(2, 61), torch.ones(61)
    with pytest.raises(IndexError, match="61 is out of bounds"):
        superclass_loss(x, torch.tensor([[1], [61]]), weights)
    with pytest.raises(ValueError, match="do not fit"):
        superclass_loss(x, torch.tensor([[1], [2], [3]]), weights)
    with pytest.raises(ValueError, match="do not fit"):
        superclass_loss(x, torch.tensor([[1], [2]]), weights[:-1])


def test_idf_counts_captions(on_device):
    idf = IDF(6)
    idf.update(torch.tensor([[0, 1, 5], [0, 2, -1]]))
    idf.update(torch.tensor([[0, -1, -1, -1]]))
    assert idf.n == 3 and idf.df.tolist() == [3, 1, 1, 0, 0, 1]
    expected = [math.log(4 / (df + 1)) for df in (3, 1, 1, 0, 0, 1)]
    torch.testing.assert_close(idf.weights(), torch.tensor(expected))
    assert idf.weights()[0] == 0  # in every caption: the paper's own formula gives log(3/4) < 0


def test_idf_counts_nothing_of_ids_outside_the_vocabulary():
    idf = IDF(6)
    for outside in (6, 7, 100):
        with pytest.raises(RuntimeError, match="out of bounds"):
            idf.update(torch.tensor([[0, outside]]))
    assert idf.n == 0 and idf.df.sum() == 0


def test_idf_keeps_its_digits_for_billions_of_captions(on_device):
    idf = IDF(3)
    idf.n += 12_800_000_000
    idf.df += torch.tensor([12_799_999_999, 6_400_000_000, 0])
    expected = [math.log1p(1 / 12.8e9), math.log(2), math.log(12.8e9)]
    torch.testing.assert_close(idf.weights(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_idf_does_not_depend_on_how_a_batch_is_split(on_device):
    labels = as_labels(torch.randint(-1, 50, (64, 9)))
    whole, parts = IDF(50), IDF(50)
    whole.update(labels)
    for part in labels.split(7):
        parts.update(part)
    assert torch.equal(whole.df, parts.df) and torch.equal(whole.n, parts.n)


def timm_twin(image_size, patch_size, width, depth, heads):
    return timm.models.VisionTransformer(
        img_size=image_size, patch_size=patch_size, embed_dim=width, depth=depth, num_heads=heads,
        class_token=False, global_pool="avg", fc_norm=False, num_classes=0,
    ).eval()  # fmt: skip


@pytest.mark.parametrize("image_size", [32, 48])
def test_encoder_loads_strictly_into_timm_and_back(on_device, image_size):
    torch.manual_seed(0)
    shape = image_size, 8, 64, 3, 4
    ours, theirs = SuperClass(ViT(*shape), 10).eval(), timm_twin(*shape)
    images = torch.randn(3, 3, image_size, image_size)
    theirs.load_state_dict(ours.encoder.state_dict(), strict=True)
    with torch.no_grad():
        torch.testing.assert_close(ours.features(images), theirs(images), atol=1e-5, rtol=1e-5)
        other = timm_twin(*shape)
        ours.encoder.load_state_dict(other.state_dict(), strict=True)
        torch.testing.assert_close(ours.features(images), other(images), atol=1e-5, rtol=1e-5)


def test_named_sizes_are_timms():
    ours = build_encoder("S/16", 224)
    options = {"class_token": False, "global_pool": "avg", "fc_norm": False, "num_classes": 0}
    theirs = timm.create_model("vit_small_patch16_224", **options)
    theirs.load_state_dict(ours.state_dict(), strict=True)


def test_under_autocast_the_residual_stream_has_its_type(device, on_device):
    """Half the bytes; parameters, their gradients and everything outside autocast are float32."""
    encoder, images, seen = ViT(16, 8, 32, 2, 2), torch.randn(2, 3, 16, 16), []
    for module in (encoder.blocks[0].norm1, encoder.blocks[1], encoder.norm):
        module.register_forward_hook(lambda _, x, y: seen.extend([x[0].dtype, y.dtype]))
    with torch.autocast(device.type, torch.bfloat16):
        encoder(images).float().square().mean().backward()
    assert set(seen) == {torch.bfloat16}
    assert {p.grad.dtype for p in encoder.parameters()} == {torch.float32}
    assert encoder(images).dtype == torch.float32


def test_checkpointing_changes_no_gradient(on_device):
    torch.manual_seed(0)
    model, images = ViT(16, 8, 32, 2, 2), torch.randn(2, 3, 16, 16)
    grads, calls = [], []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for model.grad_checkpointing in (False, True):
        model.zero_grad()
        model(images).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    assert len(calls) == 1 + 2  # once more in the backward pass


def test_any_encoder_that_gives_tokens_fits():
    class Convolution(torch.nn.Module):
        width = 12

        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(3, 12, 4, 4)

        def forward(self, images):
            return self.conv(images).flatten(2).transpose(1, 2)

    model = SuperClass(Convolution(), 30)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 30)
    assert model.features(torch.randn(2, 3, 16, 16)).shape == (2, 12)


def test_encoder_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="patches of 5 px"):
        build_encoder("XS/5", 32)
    for name in ("B16", "XXL/16", "B/0"):
        with pytest.raises(ValueError, match="unknown model"):
            build_encoder(name, 32)
    with pytest.raises(ValueError, match="16 px"):
        ViT(16, 8, 32, 1, 2)(torch.zeros(1, 3, 24, 24))
    with pytest.raises(ValueError, match="5 heads"):
        ViT(16, 8, 32, 1, 5)


def test_a_few_steps_learn_captions_by_heart(on_device):
    torch.manual_seed(0)
    model, idf = SuperClass(ViT(16, 8, 64, 2, 2), 40), IDF(40)
    images, labels = torch.randn(8, 3, 16, 16), torch.arange(40).reshape(8, 5)
    idf.update(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        loss = superclass_loss(model(images), labels, idf.weights())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    best = F.softmax(model(images), dim=1).topk(5).indices.sort(dim=1).values
    assert torch.equal(best, labels)
    assert loss < math.log(5) + 0.1  # the entropy of the targets: no loss is lower


def test_patches_by_a_matrix_product_are_those_of_the_convolution(monkeypatch):
    """PatchEmbed has one way for the CPU and one for a GPU; here the CPU goes both."""
    torch.manual_seed(0)
    embed, images = PatchEmbed(8, 16).double(), torch.randn(2, 3, 32, 32).double()
    expected = embed(images)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(embed.proj, "forward", None)
    torch.testing.assert_close(embed(images), expected)
