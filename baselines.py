"""What the paper compares SuperClass with: other losses on the same labels, and CLIP.

`LOSSES` are the four other multi-label losses of Table 6. `CLIP` is the contrastive baseline of
Tables 3 and 9 (Radford et al., 2021), and with a locked encoder the locked-image tuning by which
the paper measures zero-shot (LiT, Zhai et al., 2022). `supervised_loss` trains on a source's own
classes: the ceiling, and fine-tuning (Table 12).

Letters in shapes:  B images (b of one process), K tokens of a caption, V vocabulary, D width of a
tower, E joint embedding, W processes.
"""

import math

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from superclass import Attention, Block, as_sets, init_transformer

# ------------------------------------------------------------------------------------------------
# Other losses (Table 6). Each takes logits [B, V] and labels [B, K], rows of token ids padded with
# -1, and returns a float32 scalar. None uses IDF weights, nor does Table 6: its 75.6 for softmax is
# Table 7's figure without IDF.


def bce(logits: Tensor, labels: Tensor) -> Tensor:
    """Binary cross-entropy of each token's presence; summed over V, mean over B.

    -log sigmoid(x) = softplus(x) - x for the caption's tokens and -log(1 - sigmoid(x)) =
    softplus(x) for the others: a sum over all V, less the caption's logits.
    """
    x, here = caption_logits(logits, labels)
    return (F.softplus(logits.float()).sum(dim=1) - (x * here).sum(dim=1)).mean()


def soft_margin(logits: Tensor, labels: Tensor) -> Tensor:
    """log(1 + exp(-y x)), y = 1 for the caption's tokens and -1 for others; mean over V and B.

    torch's MultiLabelSoftMarginLoss. It is `bce` divided by V. AdamW does not mind the scale of a
    loss but for its eps (1e-6 here); the clipping of gradients does, and cuts those of `bce` only.
    """
    return bce(logits, labels) / logits.shape[1]


def asl(logits: Tensor, labels: Tensor, gamma: float = 4.0, margin: float = 0.05) -> Tensor:
    """Asymmetric loss (Ridnik et al., 2021), with gamma+ = 0; summed over V, mean over B.

    Tokens of the caption pay -log p, others -q^gamma log(1 - q) with q = max(p - margin, 0): what
    is known to be absent is soon left alone.
    """

    def absent(x: Tensor) -> Tensor:
        q = (x.sigmoid() - margin).clamp(min=0)
        return -(q**gamma) * (1 - q).log()

    x, here = caption_logits(logits, labels)
    present = (-F.logsigmoid(x) - absent(x)) * here
    return (absent(logits.float()).sum(dim=1) + present.sum(dim=1)).mean()


def two_way(logits: Tensor, labels: Tensor, t_pos: float = 4.0, t_neg: float = 1.0) -> Tensor:
    """Two-way multi-label loss (Kobayashi, CVPR 2023), with its published temperatures.

        softplus(t_neg logsumexp_neg(x / t_neg) + t_pos logsumexp_pos(-x / t_pos))

    over negatives and positives, once among the tokens of each image and once among the images for
    each token that occurs; the mean of each is taken, and the two are added. The second way sees
    the whole global batch: each process sends two rows of V numbers.
    """
    x, labels = logits.float(), as_sets(labels, logits.shape[1])
    rows, _ = (labels >= 0).nonzero(as_tuple=True)
    is_positive = torch.zeros_like(x, dtype=torch.bool)
    is_positive[rows, labels[labels >= 0]] = True
    negatives = (x / t_neg).masked_fill(is_positive, -torch.inf)  # [B, V]
    positives = (-x / t_pos).masked_fill(~is_positive, -torch.inf)  # [B, V]

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
    """The logits [B, K] of each caption's tokens, in float32, and which are there, not padding."""
    labels = as_sets(labels, logits.shape[1])
    return logits.gather(1, labels.clamp(min=0)).float(), labels >= 0


def supervised_loss(logits: Tensor, targets: Tensor, sizes: list[int]) -> Tensor:
    """Cross-entropy on a source's own classes.

    Args:
        logits: [B, C], the classes of all attributes side by side.
        targets: [B, A], a class for each attribute; -1 where there is no label: zero loss.
        sizes: the number of classes of each attribute, C in all.
    """
    losses = [
        F.cross_entropy(x, y, ignore_index=-1, reduction="sum") / len(x)
        for x, y in zip(logits.float().split(sizes, dim=1), targets.T, strict=True)
    ]
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------------
# CLIP.


class CausalAttention(Attention):
    """Self-attention in which a token sees itself and those before it."""

    def forward(self, x: Tensor) -> Tensor:
        B, K, D = x.shape
        qkv = self.qkv(x).reshape(B, K, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, H, K, D/H]
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.proj(x.transpose(1, 2).reshape(B, K, D))


class TextTower(nn.Module):
    """CLIP's causal text transformer, made of the ViT's blocks.

    Token ids [B, K], in their order and padded with -1, become features [B, D]: those of an end
    mark, id V, that is put behind each caption. Padding comes after it and is never seen.

    Args:
        vocab_size: V.
        width, depth, heads: as those of the ViT.
        max_tokens: K at most.
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
        nn.init.normal_(self.token_embed.weight)  # twice the positions' deviation: CLIP's ratio

    def forward(self, tokens: Tensor) -> Tensor:
        end = (tokens >= 0).sum(dim=1, keepdim=True)  # [B, 1]
        ids = F.pad(tokens.clamp(min=0), (0, 1)).scatter(1, end, self.vocab_size)  # [B, K + 1]
        x = self.token_embed(ids) + self.pos_embed[:, : ids.shape[1]]  # [B, K + 1, D]
        for block in self.blocks:
            x = block(x)
        return self.norm(x[torch.arange(len(x), device=x.device), end[:, 0]])  # [B, D]


# Width, depth and heads of the text tower beside an encoder; for S, B and L as in OpenCLIP.
TEXT_SIZES = {"XXS": (64, 4, 2), "XS": (128, 4, 4), "Ti": (192, 12, 3)}
TEXT_SIZES |= {"S": (384, 12, 6), "B": (512, 12, 8), "L": (768, 12, 12)}


def build_text_tower(model: str, vocab_size: int) -> TextTower:
    """The text tower beside the encoder of that name, such as "B/16"; others get B's."""
    return TextTower(vocab_size, *TEXT_SIZES.get(model.split("/")[0], TEXT_SIZES["B"]))


class CLIP(nn.Module):
    """Two towers whose features meet in one space: an image lies close to its own caption.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D.
        text: the text tower; the joint space is as wide as it.
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
        self.encoder.train(mode and not self.locked)  # a locked batch norm counts no more either
        return self

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> the pooled representation [B, D], as that of SuperClass."""
        return self.encoder(images).mean(dim=1)

    def embed_images(self, features: Tensor) -> Tensor:
        """Pooled features [B, D] -> unit vectors [B, E]."""
        return F.normalize(self.image_proj(features).float(), dim=1)

    def embed_texts(self, tokens: Tensor) -> Tensor:
        """Token ids [B, K], in order, padded with -1 -> unit vectors [B, E]."""
        return F.normalize(self.text_proj(self.text(tokens)).float(), dim=1)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images [B, 3, S, S] and their captions' tokens -> two times [B, E], and the scale []."""
        with torch.no_grad():
            self.log_scale.clamp_(max=self.MAX_LOG_SCALE)
        images, texts = self.embed_images(self.features(images)), self.embed_texts(tokens)
        return images, texts, self.log_scale.exp()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor) -> Tensor:
    """CLIP's symmetric loss over the whole global batch: each finds the other among B.

    Every process compares its own b rows with those of all. The mean over processes, which DDP
    takes of the gradients, is then the loss of one process with all B.

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
    """The x of all processes, [W, ...]; gradients find their way back to each of them."""
    if not dist.is_initialized():
        return x[None]
    return torch.stack(torch.distributed.nn.all_gather(x.contiguous()))
