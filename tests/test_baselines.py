"""The other losses and CLIP against dense float64 versions, peers, and themselves on two ranks."""

import copy
import math
import queue

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor

import baselines
from baselines import (
    CLIP,
    LOSSES,
    SuperCLIP,
    TextTower,
    build_encoder,
    contrastive_loss,
    supervised_loss,
)
from superclass import IDF, SuperClass, ViT, superclass_loss
from tests.conftest import as_labels
from tests.die import SERVER

B, K, V = 7, 6, 23


@pytest.fixture
def labels(on_device):
    """Sets with padding; one caption of a single token, one token in every caption."""
    torch.manual_seed(1)
    labels = torch.randint(-1, V, (B, K))
    labels[3] = 5
    labels[:, 0] = 5
    return as_labels(labels)


def dense(labels):
    """Labels as K-hot rows [B, V], float64, on the CPU like all that devices are compared with."""
    y = torch.zeros(len(labels), V, dtype=torch.float64, device="cpu")
    for row, tokens in zip(y, labels.tolist(), strict=True):
        for token in tokens:
            if token >= 0:
                row[token] = 1
    return y


def dense_bce(x, y):
    p = torch.sigmoid(x)
    return -(y * p.log() + (1 - y) * (1 - p).log()).sum() / len(x)


def dense_soft_margin(x, y):
    return (1 + torch.exp(-(2 * y - 1) * x)).log().mean()


def dense_asl(x, y):
    p = torch.sigmoid(x)
    q = torch.clamp(p - 0.05, min=0)
    return -(y * p.log() + (1 - y) * q**4 * (1 - q).log()).sum() / len(x)


def dense_two_way(x, y):
    """Each image, then each token, on its own."""
    total = 0.0
    for scores, truth in ((x, y), (x.T, y.T)):
        values = []
        for row, here in zip(scores, truth, strict=True):
            if here.sum() == 0:
                continue
            others = row[here == 0].exp().sum()
            values.append((1 + others * (-row[here == 1] / 4).exp().sum() ** 4).log())
        total = total + torch.stack(values).mean()
    return total


DENSE = {
    "bce": dense_bce,
    "soft_margin": dense_soft_margin,
    "asl": dense_asl,
    "two_way": dense_two_way,
}


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_losses_equal_dense_float64(labels, name, scale):
    torch.manual_seed(2)
    x = torch.randn(B, V) * scale
    ours, theirs = x.clone().requires_grad_(), x.cpu().double().requires_grad_()
    loss, expected = LOSSES[name](ours, labels), DENSE[name](theirs, dense(labels))
    loss.backward()
    expected.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.grad.cpu().double(), theirs.grad, rtol=1e-4, atol=1e-6)


def test_losses_agree_with_torchs_own(labels):
    x = torch.randn(B, V)
    y = dense(labels).float().to(x.device)
    peer = torch.nn.MultiLabelSoftMarginLoss()(x, y)
    torch.testing.assert_close(LOSSES["soft_margin"](x, labels), peer)
    peer = F.binary_cross_entropy_with_logits(x, y, reduction="sum") / B
    torch.testing.assert_close(LOSSES["bce"](x, labels), peer)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_extreme_logits_are_finite(labels, name):
    for x in (torch.full((B, V), 80.0), torch.full((B, V), -80.0)):
        x = x.requires_grad_()
        LOSSES[name](x, labels).backward()
        assert torch.isfinite(x.grad).all()


def test_supervised_loss_is_the_mean_over_attributes(on_device):
    logits, targets = torch.randn(4, 5), torch.tensor([[0, 1], [1, 2], [1, -1], [0, 0]])
    known = F.cross_entropy(logits[[0, 1, 3], 2:], targets[[0, 1, 3], 1]) * 3 / 4
    expected = (F.cross_entropy(logits[:, :2], targets[:, 0]) + known) / 2
    torch.testing.assert_close(supervised_loss(logits, targets, [2, 3]), expected)


@pytest.mark.parametrize(("name", "width"), [("resnet50", 2048), ("convnext_tiny", 768)])
def test_torchvisions_networks_give_tokens_and_keep_their_names(on_device, name, width):
    torch.manual_seed(0)
    network, images = torchvision.models.get_model(name).double().eval(), torch.randn(2, 3, 64, 64)
    images = images.double()  # a GPU rounds float32 differently with the channels last
    model = SuperClass(build_encoder(name, 64), 30).double().eval()
    missing, unexpected = network.load_state_dict(model.encoder.state_dict(), strict=False)
    assert unexpected == [] and all(key.startswith(("fc.", "classifier.")) for key in missing)
    with torch.no_grad():
        tokens = model.encoder(images)
        assert tokens.shape == (2, 4, width) and model(images).shape == (2, 30)
        maps = create_feature_extractor(network, {"avgpool": "pooled"})(images)["pooled"]
        torch.testing.assert_close(tokens.mean(dim=1), maps.flatten(1))
        if name == "convnext_tiny":  # it leaves out no block at random: any split gives the same
            for layer in model.encoder.modules():
                if hasattr(layer, "layer_scale"):
                    layer.layer_scale.fill_(1)  # with its 1e-6, no difference would be seen
            torch.testing.assert_close(model.train()(images), model.eval()(images))
    with pytest.raises(ValueError, match="32 px or more"):
        build_encoder(name, 28)


def test_other_names_are_vits_or_refused():
    assert isinstance(build_encoder("XS/8", 32), ViT)
    with pytest.raises(ValueError, match="unknown model 'resnet51'"):
        build_encoder("resnet51", 64)


# ------------------------------------------------------------------------------------------------
# CLIP and SuperCLIP.


def tiny_clip(kind=CLIP, **options):
    torch.manual_seed(0)
    return kind(ViT(16, 8, 32, 2, 2), TextTower(V, 24, 2, 2, max_tokens=K), **options)


def superclip_loss(outputs, tokens, weights):
    contrast, logits = outputs
    return contrastive_loss(*contrast) + superclass_loss(logits, as_labels(tokens), weights)


def test_a_text_sees_neither_padding_nor_the_batch(on_device):
    tower = tiny_clip().text
    short, long = torch.tensor([[3, 4, -1, -1, -1, -1]]), torch.tensor([[3, 4, 5, 6, 7, 8]])
    both = tower(torch.cat([short, long]))
    torch.testing.assert_close(both[:1], tower(short[:, :2]))
    torch.testing.assert_close(both[1:], tower(long))
    assert (tower(torch.tensor([[4, 3]])) - both[:1]).abs().max() > 1e-3  # order counts


def test_a_token_sees_only_those_before_it(on_device):
    attention = baselines.CausalAttention(24, 2)
    x = torch.randn(1, 5, 24)
    changed = x.clone()
    changed[:, 3:] += 1
    torch.testing.assert_close(attention(x)[:, :3], attention(changed)[:, :3])


def test_contrastive_loss_is_openclips(on_device):
    from open_clip.loss import ClipLoss  # slow to import, in each process of the last test, too

    images = F.normalize(torch.randn(9, 16), dim=1).requires_grad_()
    texts = F.normalize(torch.randn(9, 16), dim=1).requires_grad_()
    scale = torch.tensor(12.0, requires_grad=True)
    ours = torch.autograd.grad(contrastive_loss(images, texts, scale), (images, texts, scale))
    theirs = torch.autograd.grad(ClipLoss()(images, texts, scale), (images, texts, scale))
    torch.testing.assert_close(
        contrastive_loss(images, texts, scale), ClipLoss()(images, texts, scale)
    )
    torch.testing.assert_close(ours, theirs)


def test_the_scale_stays_below_a_hundred_and_can_come_back(on_device):
    model = tiny_clip()
    with torch.no_grad():
        model.log_scale.fill_(9.0)
    images, texts, scale = model(torch.randn(3, 3, 16, 16), torch.tensor([[1], [2], [3]]))
    assert scale.item() == pytest.approx(100, rel=1e-5)
    contrastive_loss(images, texts, scale).backward()
    assert model.log_scale.grad.abs() > 0
    torch.testing.assert_close(images.norm(dim=1), torch.ones(3))


def test_a_locked_encoder_gets_no_gradient(on_device):
    model = tiny_clip(locked=True).train()
    contrastive_loss(*model(torch.randn(4, 3, 16, 16), torch.randint(V, (4, 3)))).backward()
    assert all(p.grad is None and not p.requires_grad for p in model.encoder.parameters())
    assert model.image_proj.weight.grad is not None and not model.encoder.training


def test_clip_starts_near_log_batch(on_device):
    """With unrelated towers each of B texts is about as likely; a sharp scale adds some spread."""
    model = tiny_clip()
    with torch.no_grad():
        model.log_scale.zero_()  # without that spread
        loss = contrastive_loss(*model(torch.randn(32, 3, 16, 16), torch.randint(V, (32, K))))
    assert loss.item() == pytest.approx(math.log(32), abs=0.1)


def dense_superclip(model, images, tokens, weights):
    """Both losses from the pooled features on, pair by pair and token by token, in float64."""
    features = model.encoder(images).mean(dim=1)
    u, v = model.image_proj(features), model.text_proj(model.text(tokens))
    u, v = u / u.square().sum(dim=1, keepdim=True).sqrt(), v / v.square().sum(1, True).sqrt()
    cosines = model.log_scale.exp() * u @ v.T
    contrast = classify = 0.0
    for i in range(len(images)):
        contrast = contrast + cosines[i].exp().sum().log() + cosines[:, i].exp().sum().log()
        contrast = contrast - 2 * cosines[i, i]
        x = features[i] - features[i].mean()
        x = x / (x.square().mean() + 1e-6).sqrt() * model.norm.weight + model.norm.bias
        log_p = (model.head.weight @ x + model.head.bias).log_softmax(dim=0)
        caption = set(tokens[i].tolist()) - {-1}
        total = sum(weights[token] for token in caption)
        classify = classify - sum(weights[token] / total * log_p[token] for token in caption)
    return contrast / (2 * len(images)) + classify / len(images)


def test_superclip_is_the_sum_of_two_dense_losses_in_float64(on_device):
    model = tiny_clip(SuperCLIP)
    images, tokens, weights = torch.randn(B, 3, 16, 16), torch.randint(V, (B, K)), torch.rand(V)
    tokens[2, 3:] = -1
    twin = copy.deepcopy(model).cpu().double()
    loss = superclip_loss(model(images, tokens), tokens, weights)
    expected = dense_superclip(twin, images.cpu().double(), tokens.cpu(), weights.cpu().double())
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    twins = dict(twin.named_parameters())
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad.cpu().double(), twins[name].grad, rtol=1e-4, atol=1e-6)
    assert model.head.weight.grad.abs().max() > 0 < model.text_proj.weight.grad.abs().max()


def test_superclips_head_is_superclasss(on_device):
    model, images = tiny_clip(SuperCLIP), torch.randn(2, 3, 16, 16)
    plain = SuperClass(model.encoder, V)
    plain.norm, plain.head = model.norm, model.head
    contrast, logits = model(images, torch.randint(V, (2, K)))
    torch.testing.assert_close(logits, plain(images))
    assert torch.equal(model.features(images), plain.features(images)) and len(contrast) == 3


def one_rank(rank: int, world: int, path: str, results, device):
    """A rank's gradients of CLIP, SuperCLIP and the two-way loss, averaged as DDP does."""
    if world > 1:
        torch.set_default_device(device)
        store = f"file://{path}"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    torch.manual_seed(3)
    images, tokens = torch.randn(8, 3, 16, 16), torch.randint(V, (8, K))
    logits = torch.randn(8, V, requires_grad=True)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    model, both, idf = tiny_clip(), tiny_clip(SuperCLIP), IDF(V)
    idf.update(as_labels(tokens[mine]))  # counts the other rank's captions, too
    losses = [
        contrastive_loss(*model(images[mine], tokens[mine])),
        superclip_loss(both(images[mine], tokens[mine]), tokens[mine], idf.weights()),
        LOSSES["two_way"](logits[mine], as_labels(tokens[mine])),
    ]
    sum(losses).backward()
    values = [torch.stack(losses).detach(), logits.grad, idf.df.float(), idf.n.float()]
    values += [p.grad for p in (*model.parameters(), *both.parameters())]
    for value in values:
        if world > 1:
            torch.distributed.all_reduce(value)
            value /= world
    if rank == 0:
        results.put([value.cpu().numpy() for value in values])
    if world > 1:
        torch.distributed.destroy_process_group()


def test_two_processes_have_the_loss_and_the_gradients_of_one(on_device, device, tmp_path):
    if device.type == "mps":
        pytest.skip("gloo has no MPS")
    alone = queue.SimpleQueue()
    one_rank(0, 1, "", alone, device)
    together, store = SERVER.Queue(), str(tmp_path / "store")
    ranks = [
        SERVER.Process(target=one_rank, args=(r, 2, store, together, device)) for r in range(2)
    ]
    for process in ranks:
        process.start()
    results = alone.get(), together.get(timeout=120)
    for process in ranks:
        process.join()
        assert process.exitcode == 0
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-4, atol=1e-6)
