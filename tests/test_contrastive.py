"""CLIP, SigLIP, SuperCLIP: against dense float64 versions, a peer, themselves on two ranks."""

import copy
import math
import queue

import pytest
import torch
import torch.nn.functional as F

from data import caption_tokens, load_tokenizer
from eval import Run, classify
from plugins import contrastive, two_way
from plugins.contrastive import (
    CLIP,
    SigLIP,
    SuperCLIP,
    TextTower,
    contrastive_loss,
    sigmoid_loss,
)
from superclass import IDF, SuperClass, ViT, superclass_loss
from tests.conftest import as_labels
from tests.die import SERVER

B, K, V = 7, 6, 23


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
    attention = contrastive.CausalAttention(24, 2)
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


def test_sigmoid_loss_is_a_dense_one_in_float64_and_starts_as_in_the_paper(on_device):
    model = tiny_clip(SigLIP)
    images, texts, scale, bias = model(torch.randn(B, 3, 16, 16), torch.randint(V, (B, K)))
    assert (scale.item(), bias.item()) == (pytest.approx(10), -10)
    with torch.no_grad():
        model.log_scale.fill_(9.0)  # CLIP's bound is not SigLIP's
    *_, scale, bias = model(torch.randn(B, 3, 16, 16), torch.randint(V, (B, K)))
    assert scale.item() == pytest.approx(math.exp(9), rel=1e-5)
    outputs = [images, texts, torch.tensor(12.0, requires_grad=True), bias + 7]
    twins = [x.detach().cpu().double().requires_grad_() for x in outputs]
    u, v, t, b = twins
    expected = 0.0
    for i in range(B):
        for j in range(B):
            sign = 1 if i == j else -1
            expected = expected + (1 + (-sign * (t * u[i] @ v[j] + b)).exp()).log() / B
    loss = sigmoid_loss(*outputs)
    torch.testing.assert_close(loss.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    found = torch.autograd.grad(loss, outputs)
    for ours, theirs in zip(found, torch.autograd.grad(expected, twins), strict=True):
        torch.testing.assert_close(ours.cpu().double(), theirs, rtol=1e-4, atol=1e-6)


def test_superclips_head_is_superclasss(on_device):
    model, images = tiny_clip(SuperCLIP), torch.randn(2, 3, 16, 16)
    plain = SuperClass(model.encoder, V)
    plain.norm, plain.head = model.norm, model.head
    contrast, logits = model(images, torch.randint(V, (2, K)))
    torch.testing.assert_close(logits, plain(images))
    assert torch.equal(model.features(images), plain.features(images)) and len(contrast) == 3


# ------------------------------------------------------------------------------------------------
# What the text tower scores.


@pytest.fixture(params=[CLIP, SigLIP])
def towers(device, request):
    """A run of CLIP or SigLIP with random towers, and features of five images."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("bpe:280", ["a red ball", "one crimson ball", "a blue ball"] * 3)
    text = TextTower(tokenizer.n_vocab, 16, 1, 2)
    model = request.param(ViT(16, 8, 32, 1, 2), text).to(device)
    idf = IDF(tokenizer.n_vocab).to(device)
    objective = contrastive.ContrastiveObjective()
    return Run(None, None, objective, tokenizer, model, idf, 0), torch.randn(5, 32)


def embedded(run, features, texts: list[str]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Unit vectors [1, E] of texts, each embedded alone; and vectors [5, E] of the images."""
    device = run.idf.df.device
    ids = [torch.tensor([caption_tokens(text, run.tokenizer)]).to(device) for text in texts]
    return [run.model.embed_texts(row) for row in ids], run.model.image_proj(features.to(device))


@torch.no_grad()
def test_zeroshot_is_the_scaled_cosine_with_the_mean_prompt(towers):
    run, features = towers
    names, prompts = [["red", "crimson"], ["blue"]], ["a {}", "one {} ball"]
    expected = []
    for of_class in names:
        texts = [prompt.format(name) for name in of_class for prompt in prompts]
        rows, images = embedded(run, features, texts)
        mean = torch.cat(rows).mean(dim=0)
        expected.append(F.cosine_similarity(images, mean[None]))
    scores = classify(run, "zeroshot", names, features, prompts)
    scale = run.model.log_scale.exp().item()
    torch.testing.assert_close(scores, scale * torch.stack(expected, dim=1).cpu())


@torch.no_grad()
def test_captions_are_scored_by_their_cosine(towers):
    run, features = towers
    texts = ["a red ball", "blue", "one crimson ball"]
    rows, images = embedded(run, features, texts)
    expected = torch.stack([F.cosine_similarity(images, row) for row in rows], dim=1)
    tokens = [caption_tokens(text, run.tokenizer) for text in texts]
    torch.testing.assert_close(run.objective.score_captions(run, features, tokens), expected.cpu())


# ------------------------------------------------------------------------------------------------
# Two processes.


def one_rank(rank: int, world: int, path: str, results, device):
    """A rank's gradients of CLIP and those like it, and the two-way loss, averaged as DDP does."""
    if world > 1:
        torch.set_default_device(device)
        store = f"file://{path}"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=world)
    torch.manual_seed(3)
    images, tokens = torch.randn(8, 3, 16, 16), torch.randint(V, (8, K))
    logits = torch.randn(8, V, requires_grad=True)
    mine = slice(rank * 8 // world, (rank + 1) * 8 // world)
    model, pairs, both, idf = tiny_clip(), tiny_clip(SigLIP), tiny_clip(SuperCLIP), IDF(V)
    idf.update(as_labels(tokens[mine]))  # counts the other rank's captions, too
    losses = [
        contrastive_loss(*model(images[mine], tokens[mine])),
        sigmoid_loss(*pairs(images[mine], tokens[mine])),
        superclip_loss(both(images[mine], tokens[mine]), tokens[mine], idf.weights()),
        two_way.loss(logits[mine], as_labels(tokens[mine]), idf.weights()),
    ]
    sum(losses).backward()
    values = [torch.stack(losses).detach(), logits.grad, idf.df.float(), idf.n.float()]
    values += [p.grad for m in (model, pairs, both) for p in m.parameters()]
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
