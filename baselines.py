"""What the paper compares SuperClass with, and what others combine it with.

`LOSSES` are the four other multi-label losses of Table 6. `CLIP` is the contrastive baseline of
Tables 3 and 9 (Radford et al., 2021); with a locked encoder it is the locked-image tuning with
which the paper measures zero-shot (LiT, Zhai et al., 2022), and with a head over the vocabulary
SuperCLIP, by the same group (Zhao et al., NeurIPS 2025, arXiv 2512.14480). `ConvNet` are the
encoders of Table 10. `supervised_loss` trains on a source's own classes: a ceiling, and fine-tuning
(Table 12).

Letters in shapes:  B images (b on one process), K tokens of a caption, V vocabulary, D width of a
tower, E joint embedding, W processes.
"""

import math
from collections import OrderedDict
from itertools import takewhile

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

import superclass
from superclass import SIZES, Attention, Block, SuperClass, init_transformer


class ConvNet(nn.Sequential):
    """torchvision's network up to its last feature map; each position becomes a token."""

    WIDTHS = {"resnet50": 2048, "convnext_tiny": 768}

    def __init__(self, name: str):
        # No block is left out at random, as in OpenCLIP, so results do not depend on the split.
        options = {"stochastic_depth_prob": 0.0} if name == "convnext_tiny" else {}
        layers = torchvision.models.get_model(name, weights=None, **options).named_children()
        super().__init__(OrderedDict(takewhile(lambda layer: layer[0] != "avgpool", layers)))
        self.width = self.WIDTHS[name]

    def forward(self, images: Tensor) -> Tensor:
        if images.is_cuda:  # tensor cores want the channels last
            images = images.contiguous(memory_format=torch.channels_last)
        return super().forward(images).flatten(2).transpose(1, 2)  # [B, D, S/32, S/32] -> [B, N, D]


def build_encoder(name: str, image_size: int) -> nn.Module:
    """`superclass.build_encoder`, which builds a ViT, and "resnet50" and "convnext_tiny".

    ResNet-50's batch norm sees one micro-batch (on GPUs, those of all processes), so its results
    depend on the split.
    Raises ValueError for another name and for an image size that does not fit.
    """
    if name not in ConvNet.WIDTHS:
        return superclass.build_encoder(name, image_size)
    if image_size < 32:
        raise ValueError(f"{name} takes images of 32 px or more")
    return ConvNet(name)


# Other losses (Table 6). Each takes logits [B, V] and labels [B, K], sets of token ids padded with
# -1, and returns a float32 scalar. None of them uses IDF weights; neither does Table 6, whose 75.6
# for softmax is Table 7's figure without IDF.


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each token's presence: sum over V, mean over B.

    -log sigmoid(x) = softplus(x) - x for the caption's tokens and -log(1 - sigmoid(x)) =
    softplus(x) for all others: a sum over V minus the caption's logits.
    """
    x, is_token = caption_logits(logits, labels)
    return (F.softplus(logits.float()).sum(dim=1) - (x * is_token).sum(dim=1)).mean()


def soft_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + exp(-y x)), y = 1 for the caption's tokens and -1 for others: mean over V and B.

    This is torch's MultiLabelSoftMarginLoss, and `bce` divided by V. Training differs nevertheless:
    gradient clipping affects only `bce`, AdamW's eps only this one.
    """
    return bce(logits, labels) / logits.shape[1]


def asl(logits: Tensor, labels: Tensor, gamma: float = 4.0, margin: float = 0.05) -> Tensor:
    """Asymmetric loss (Ridnik et al., 2021) with gamma+ = 0: sum over V, mean over B.

    Tokens of the caption cost -log p, others -q^gamma log(1 - q) with q = max(p - margin, 0), so
    tokens that are clearly absent stop contributing.
    """

    def absent(x: Tensor) -> Tensor:
        q = (x.sigmoid() - margin).clamp(min=0)
        return -(q**gamma) * (1 - q).log()

    x, is_token = caption_logits(logits, labels)
    present = (-F.logsigmoid(x) - absent(x)) * is_token
    return (absent(logits.float()).sum(dim=1) + present.sum(dim=1)).mean()


def two_way(logits: Tensor, labels: Tensor, t_pos: float = 4.0, t_neg: float = 1.0) -> Tensor:
    """Two-way multi-label loss (Kobayashi, CVPR 2023) with its published temperatures.

        softplus(t_neg logsumexp_neg(x / t_neg) + t_pos logsumexp_pos(-x / t_pos))

    over negatives and positives: once over the tokens of each image, and once over the images for
    each token that occurs. The means of both are added. The second term sees the whole global
    batch: each process sends two rows of V numbers.
    """
    V = logits.shape[1]
    padded = torch.zeros(len(labels), V + 1, dtype=torch.bool, device=labels.device)
    is_positive = padded.scatter(1, labels.masked_fill(labels < 0, V), True)[:, :V]
    negatives = (logits.float() / t_neg).masked_fill(is_positive, -torch.inf)  # [B, V]
    positives = (-logits.float() / t_pos).masked_fill(~is_positive, -torch.inf)  # [B, V]

    by_image = torch.stack([negatives.logsumexp(dim=1), positives.logsumexp(dim=1)])  # [2, B]
    by_token = torch.stack([negatives.logsumexp(dim=0), positives.logsumexp(dim=0)])  # [2, V]
    by_token = gather(by_token).logsumexp(dim=0)  # [W, 2, V] -> [2, V]
    loss = 0.0
    for lse_neg, lse_pos in (by_image, by_token):
        occurs = lse_pos > -torch.inf
        margin = t_neg * lse_neg[occurs] + t_pos * lse_pos[occurs]
        loss = loss + F.softplus(margin).sum() / occurs.sum().clamp(min=1)
    return loss


LOSSES = {"bce": bce, "asl": asl, "soft_margin": soft_margin, "two_way": two_way}


def caption_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits [B, K] of each caption's tokens, in float32, and a mask [B, K] without padding."""
    is_token = labels >= 0
    return logits.gather(1, labels.masked_fill(~is_token, 0)).float(), is_token


def supervised_loss(logits: Tensor, targets: Tensor, sizes: list[int]) -> Tensor:
    """Cross-entropy on a source's own classes, the mean over its attributes.

    Args:
        logits: [B, C], the classes of all attributes side by side.
        targets: [B, A], a class for each attribute; -1 where there is no label: zero loss.
        sizes: the number of classes of each attribute; they sum to C.
    """
    losses = [
        F.cross_entropy(x, y, ignore_index=-1, reduction="sum") / len(x)
        for x, y in zip(logits.float().split(sizes, dim=1), targets.T, strict=True)
    ]
    return sum(losses) / len(losses)


class CausalAttention(Attention):
    """Self-attention in which a token sees itself and the tokens before it."""

    def forward(self, x: Tensor) -> Tensor:
        B, K, D = x.shape
        qkv = self.qkv(x).reshape(B, K, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, H, K, D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).reshape(B, K, D))


class TextTower(nn.Module):
    """CLIP's causal text transformer, made of the ViT's blocks.

    Maps token ids [B, K], in order and padded with -1, to features [B, D]: those of an end mark, id
    V, that follows each caption. Padding comes after the end mark and is never seen.

    Args:
        vocab_size: V.
        width, depth, heads: as in the ViT.
        max_tokens: the largest K.
    """

    def __init__(self, vocab_size: int, width: int, depth: int, heads: int, max_tokens: int = 77):
        super().__init__()
        self.vocab_size, self.width = vocab_size, width
        self.token_embed = nn.Embedding(vocab_size + 1, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, max_tokens + 1, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        for block in self.blocks:
            block.attn = CausalAttention(width, heads)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        init_transformer(self)
        nn.init.normal_(self.token_embed.weight)  # twice the std of the positions: CLIP's ratio

    def forward(self, tokens: Tensor) -> Tensor:
        end = (tokens >= 0).sum(dim=1, keepdim=True)  # [B, 1]
        ids = F.pad(tokens.clamp(min=0), (0, 1)).scatter(1, end, self.vocab_size)  # [B, K + 1]
        x = self.token_embed(ids) + self.pos_embed[:, : ids.shape[1]]  # [B, K + 1, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[torch.arange(len(x), device=x.device), end[:, 0]])  # [B, D]


# Width, depth and heads of the text tower beside an encoder; for S, B and L as in OpenCLIP.
TEXT_SIZES = SIZES | {"B": (512, 12, 8), "L": (768, 12, 12)}


def build_text_tower(model: str, vocab_size: int) -> TextTower:
    """The text tower for the encoder of that name, such as "B/16"; CNN encoders get B's."""
    return TextTower(vocab_size, *TEXT_SIZES.get(model.split("/")[0], TEXT_SIZES["B"]))


class CLIP(nn.Module):
    """Two towers that map into one space, where an image lies close to its own caption.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D.
        text: the text tower; the joint space has its width.
        locked: keep the encoder as it is (LiT).
    """

    MAX_LOG_SCALE = math.log(100)

    def __init__(self, encoder: nn.Module, text: TextTower, locked: bool = False):
        super().__init__()
        self.encoder, self.text, self.locked = encoder, text, locked
        self.image_proj = nn.Linear(encoder.width, text.width, bias=False)
        self.text_proj = nn.Linear(text.width, text.width, bias=False)
        for proj in (self.image_proj, self.text_proj):
            nn.init.normal_(proj.weight, std=proj.in_features**-0.5)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))  # one over the temperature
        encoder.requires_grad_(not locked)

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.train(mode and not self.locked)  # a locked batch norm must not update either
        return self

    features = SuperClass.features  # images [B, 3, S, S] -> the pooled representation [B, D]

    def embed_images(self, features: Tensor) -> Tensor:
        """Pooled features [B, D] -> unit vectors [B, E]."""
        return F.normalize(self.image_proj(features).float(), dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Token ids [B, K], in order, padded with -1 -> unit vectors [B, E]."""
        return F.normalize(self.text_proj(self.text(tokens)).float(), dim=1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, S, S] and their captions' tokens -> twice [B, E], and the scale []."""
        return self.contrast(self.features(images), tokens)

    def contrast(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            self.log_scale.clamp_(max=self.MAX_LOG_SCALE)
        return self.embed_images(features), self.embed_texts(tokens), self.log_scale.exp()


class SuperCLIP(CLIP):
    """CLIP with SuperClass's head on the same pooled features (arXiv 2512.14480).

    Its loss is `contrastive_loss` plus lambda times `superclass_loss`, with lambda = 1 as there.
    """

    def __init__(self, encoder: nn.Module, text: TextTower):
        super().__init__(encoder, text)
        classifier = SuperClass(encoder, text.vocab_size)
        self.norm, self.head = classifier.norm, classifier.head

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[tuple, Tensor]:
        """Images [B, 3, S, S] and their captions' tokens -> CLIP's outputs, and logits [B, V]."""
        features = self.features(images)
        return self.contrast(features, tokens), self.head(self.norm(features))


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss over the whole global batch: each finds its partner among B.

    Every process compares its own b rows with those of all processes. DDP averages the gradients
    over processes, which gives the gradient of one process with all B.

    Args:
        images, texts: [b, E], unit vectors of this process; row i of both is one pair.
        scale: [], one over the temperature.
    """
    first = dist.get_rank() * len(images) if dist.is_initialized() else 0
    own = torch.arange(first, first + len(images), device=images.device)
    to_texts = scale * images @ gather(texts).flatten(0, 1).T  # [b, B]
    to_images = scale * texts @ gather(images).flatten(0, 1).T  # [b, B]
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def gather(x: Tensor) -> Tensor:
    """The x of all processes, [W, ...]; gradients flow back to each of them."""
    if not dist.is_initialized():
        return x[None]
    return torch.stack(torch.distributed.nn.all_gather(x.contiguous()))
