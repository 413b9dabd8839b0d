"""CLIP, and what is built on it: an image and its caption meet in one space.

    --objective clip                    the baseline of Tables 3 and 9 (Radford et al., 2021)
    --objective siglip                  CLIP that judges each pair alone (Zhai et al., 2023, arXiv
                                        2303.15343)
    --objective lit --init RUN          a text tower for a locked encoder (Zhai et al., 2022), with
                                        which the paper measures zero-shot
    --objective superclip               CLIP with SuperClass's loss beside it, by the same group
                                        (Zhao et al., NeurIPS 2025, arXiv 2512.14480)

Letters in shapes:  B images (b on one process), K tokens of a caption, V vocabulary, D width of a
tower, E joint embedding, W processes, N images of a source, C classes, M texts.
"""

import math
from functools import partial

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from torch import Tensor, nn

from data import caption_tokens, pad
from superclass import (
    SIZES,
    Attention,
    Block,
    Objective,
    SuperClass,
    init_transformer,
    superclass_loss,
)


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


class SigLIP(CLIP):
    """CLIP with SigLIP's start of the scale, which has no bound, and a bias that is learned, too.

    The bias starts so low because few of the pairs of an image and a text belong together.
    """

    MAX_LOG_SCALE = math.inf

    def __init__(self, encoder: nn.Module, text: TextTower):
        super().__init__(encoder, text)
        nn.init.constant_(self.log_scale, math.log(10))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def contrast(self, features: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
        return *super().contrast(features, tokens), self.bias


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
    own = places(images)
    to_texts = scale * images @ gather(texts).flatten(0, 1).T  # [b, B]
    to_images = scale * texts @ gather(images).flatten(0, 1).T  # [b, B]
    return (F.cross_entropy(to_texts, own) + F.cross_entropy(to_images, own)) / 2


def sigmoid_loss(images: Tensor, texts: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """SigLIP's loss over the whole global batch: is this the image's own text, for all B x B pairs?

    -log sigmoid(z (scale x cosine + bias)), with z = 1 for a pair and -1 for all others, is summed
    over the pairs and divided by B. Processes share the work as in `contrastive_loss`.

    Args:
        images, texts: as there.
        scale, bias: [].
    """
    logits = scale * images @ gather(texts).flatten(0, 1).T + bias  # [b, B]
    z = torch.full_like(logits, -1).scatter(1, places(images)[:, None], 1)
    return -F.logsigmoid(z * logits).sum(dim=1).mean()


def places(x: Tensor) -> Tensor:
    """The rows of the global batch [b] that this process has."""
    first = dist.get_rank() * len(x) if share_batches() else 0
    return torch.arange(first, first + len(x), device=x.device)


def share_batches() -> bool:
    """Whether each process has a part of a batch: not in an evaluation, which one makes alone."""
    return dist.is_initialized() and torch.is_grad_enabled()


def gather(x: Tensor) -> Tensor:
    """The x of all processes, [W, ...]; gradients flow back to each of them."""
    if not share_batches():
        return x[None]
    return torch.stack(torch.distributed.nn.all_gather(x.contiguous()))


# ------------------------------------------------------------------------------------------------
# The objectives.


class ContrastiveObjective(Objective):
    """CLIP."""

    reads, prompts = ("tokens",), ("a {}", "a photo of a {}", "a picture of the {}")
    whole_batch, weighted, has_words = True, False, False
    model = CLIP

    def build(self, encoder: nn.Module, config) -> CLIP:
        return self.model(encoder, build_text_tower(config.model, config.vocab_size))

    def loss(self, outputs: tuple, batch, weights: Tensor) -> Tensor:
        return contrastive_loss(*outputs)

    def classify(self, run, features: Tensor, texts: list[list[str]]) -> Tensor:
        """Scores [N, C]: the cosine of an image and the mean of a class's texts (section 4).

        Multiplied by the loss's scale, so that a softmax over classes means what it means there.
        """
        tokens = [[caption_tokens(text, run.tokenizer) for text in of_class] for of_class in texts]
        classes = torch.stack([embed_texts(run.model, few).mean(dim=0) for few in tokens])
        scale = run.model.log_scale.exp().item()
        return scale * (embed_features(run, features) @ F.normalize(classes, dim=1).T)

    def score_captions(self, run, features: Tensor, tokens: list[list[int]]) -> Tensor:
        """Scores [N, M] of M captions for N images, for retrieval."""
        return embed_features(run, features) @ embed_texts(run.model, tokens).T


class SigLIPObjective(ContrastiveObjective):
    """CLIP with SigLIP's loss."""

    model = SigLIP

    def loss(self, outputs: tuple, batch, weights: Tensor) -> Tensor:
        return sigmoid_loss(*outputs)


class LiTObjective(ContrastiveObjective):
    """CLIP with a locked encoder."""

    model = partial(CLIP, locked=True)

    def check(self, config, source):
        if not config.init:
            raise ValueError("--objective lit needs a trained encoder to lock: name it with --init")


class SuperCLIPObjective(ContrastiveObjective):
    """Both losses, with the paper's lambda of 1."""

    tasks = ("head", *ContrastiveObjective.tasks)
    weighted = has_words = True
    model = SuperCLIP

    def loss(self, outputs: tuple, batch, weights: Tensor) -> Tensor:
        contrast, logits = outputs
        return contrastive_loss(*contrast) + superclass_loss(logits, batch.labels, weights)


@torch.inference_mode()
def embed_features(run, features: Tensor) -> Tensor:
    """Pooled features [N, D] -> unit vectors [N, E], on the CPU."""
    return run.model.embed_images(features.to(run.idf.df.device)).cpu()


@torch.inference_mode()
def embed_texts(model: CLIP, tokens: list[list[int]], batch: int = 256) -> Tensor:
    """Token ids of M texts -> unit vectors [M, E], on the CPU."""
    pieces = (pad(tokens[i : i + batch]) for i in range(0, len(tokens), batch))
    return torch.cat([model.embed_texts(ids.to(model.log_scale.device)).cpu() for ids in pieces])
