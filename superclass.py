"""SuperClass: pretrain a vision encoder by classifying an image into the subwords of its caption.

The whole method of Huang et al., "Classification Done Right for Vision-Language Pre-Training"
(NeurIPS 2024, arXiv 2411.03313), in the order in which the paper tells it: a vision transformer
(`ViT`), a linear classifier over the tokenizer's vocabulary (`SuperClass`), the inverse document
frequencies that weight the tokens (`IDF`), and the loss (`superclass_loss`). There is no text
encoder, no contrast between the images of a batch, and no vocabulary made by hand.

Letters in shapes:  B images, S image size, P patch size, N patches, D width, H heads, K tokens of a
caption, V vocabulary.
"""

import re
from collections import OrderedDict
from itertools import takewhile

import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------
# The encoder (section 3). Parameters carry timm's names, so that a trained encoder loads there.


class PatchEmbed(nn.Module):
    """Cut the image into squares of P pixels and map each to D numbers: one strided convolution."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # [B, 3, S, S] -> [B, N, D]


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 x [B, H, N, D/H]
        x = F.scaled_dot_product_attention(q, k, v)  # [B, H, N, D/H]
        return self.proj(x.transpose(1, 2).reshape(B, N, D))  # [B, N, D]


class MLP(nn.Module):
    """Two linear layers, four times as wide in between."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: tokens talk to each other, then each thinks for itself."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def init_transformer(model: nn.Module):
    """Keep the variance of activations near one through the depth of `model.blocks`.

    A matrix that reads n numbers of variance one gets std n^-0.5. The two matrices of a block that
    write into the residual stream get less by sqrt(2 depth), because 2 depth of them add up there
    (Radford et al., 2019). Biases start at 0, norms at the identity. Positions start half as large
    as the embedding of a patch: with the customary 0.02 they drown in the patches at first, and
    what depends on place is learned late.
    """
    residual = (2 * len(model.blocks)) ** -0.5
    for name, p in model.named_parameters():
        if name == "pos_embed":
            nn.init.normal_(p, std=0.5)
        elif p.ndim >= 2:
            fan_in = p[0].numel()
            writes_residual = name.endswith(("attn.proj.weight", "mlp.fc2.weight"))
            nn.init.normal_(p, std=fan_in**-0.5 * (residual if writes_residual else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(p)


class ViT(nn.Module):
    """Vision transformer without a class token (Dosovitskiy et al., 2021).

    Images [B, 3, S, S], normalised floats, become patch tokens [B, N, D] with N = (S / P)^2 and the
    final layer norm applied to every token.

    Args:
        image_size: S, in pixels.
        patch_size: P, in pixels; divides S.
        width: D; a multiple of `heads`.
        depth: number of blocks.
        heads: H.
    Raises:
        ValueError: when P does not divide S, H does not divide D, or an image is not S x S.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        width: int = 768,
        depth: int = 12,
        heads: int = 12,
    ):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(
                f"an image of {image_size} px cannot be cut into patches of {patch_size} px"
            )
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.grad_checkpointing = False  # recompute each block in the backward pass, to save memory
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        init_transformer(self)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the encoder takes {self.image_size} px images, got {tuple(images.shape)}"
            )
        x = self.patch_embed(images) + self.pos_embed  # [B, N, D]
        for block in self.blocks:
            if self.grad_checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)  # [B, N, D]
        return self.norm(x)  # [B, N, D]


SIZES = {  # name: width, depth, heads; XXS and XS are ours, for laptops, Ti is timm's
    "XXS": (64, 4, 2),
    "XS": (128, 4, 4),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


class ConvNet(nn.Sequential):
    """torchvision's network of that name up to its last map, whose places are tokens (Table 10)."""

    WIDTHS = {"resnet50": 2048, "convnext_tiny": 768}

    def __init__(self, name: str):
        layers = torchvision.models.get_model(name, weights=None).named_children()
        super().__init__(OrderedDict(takewhile(lambda layer: layer[0] != "avgpool", layers)))
        self.width = self.WIDTHS[name]

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).flatten(2).transpose(1, 2)  # [B, D, S/32, S/32] -> [B, N, D]


def build_encoder(name: str, image_size: int) -> nn.Module:
    """Build a ViT from "SIZE/PATCH", such as "B/16": a size of `SIZES` and a patch size in pixels.

    "resnet50" and "convnext_tiny" are torchvision's, from scratch, for images of 32 px or more.
    Raises ValueError for another name, a patch that does not divide the image or one too small.
    """
    if name in ConvNet.WIDTHS:
        if image_size < 32:
            raise ValueError(f"{name} takes images of 32 px or more")
        return ConvNet(name)
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        raise ValueError(
            f"unknown model '{name}': use SIZE/PATCH with SIZE one of {', '.join(SIZES)}, as B/16, "
            f"or {' or '.join(ConvNet.WIDTHS)}"
        )
    width, depth, heads = SIZES[match[1]]
    return ViT(image_size, int(match[2]), width, depth, heads)


# ------------------------------------------------------------------------------------------------
# The classifier (section 3): mean over the patches, then a linear layer onto the vocabulary.


class SuperClass(nn.Module):
    """An encoder and a linear head with one output for each token of the tokenizer's vocabulary.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D; the ViT above or another.
        vocab_size: V.
    """

    def __init__(self, encoder: nn.Module, vocab_size: int):
        super().__init__()
        self.encoder = encoder
        # The paper does not speak of a norm here; the released code has it, and it helps.
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, vocab_size)
        # As in the released code: logits of a normed vector then have variance one, and the mean of
        # exp of such numbers is e^0.5, so the loss starts at about log V + 0.5. A head of zeros
        # starts at log V, but learns more slowly.
        nn.init.normal_(self.head.weight, std=encoder.width**-0.5)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> the pooled representation [B, D] that downstream tasks use."""
        return self.encoder(images).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> logits [B, V]."""
        return self.head(self.norm(self.features(images)))


# ------------------------------------------------------------------------------------------------
# The labels: each row of [B, K] is the set of a caption's token ids, filled up with -1.


def as_sets(labels: Tensor, vocab_size: int) -> Tensor:
    """Sort each row of labels [B, K] and put -1 for repeats: a token counts once.

    ValueError, on the CPU, where looking is free, when an id is `vocab_size` or more.
    """
    if labels.device.type == "cpu" and labels.numel() and labels.max() >= vocab_size:
        raise ValueError(f"label {labels.max()} is outside the vocabulary of {vocab_size}")
    labels = labels.sort(dim=1).values
    repeated = labels[:, 1:] == labels[:, :-1]
    return torch.cat([labels[:, :1], labels[:, 1:].masked_fill(repeated, -1)], dim=1)


class IDF(nn.Module):
    """Inverse document frequencies, counted online from the captions seen so far (section 3).

    w_c = log((n + 1) / (df_c + 1)), where n captions were seen and df_c of them contain token c.
    The paper writes log(n / (1 + df_c)), which is negative for a token that every caption contains,
    so that weights cancel or sum to less than zero. This smoothing, that of the released code, is
    never negative. Counts are integers: exact, and the same however a batch is split. Call `update`
    with all of a global batch before `weights`: before any update all weights are zero.

    Buffers: df [V] and n [], int64; up to date once `weights` or `wait` was called.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_buffer("df", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))
        self._sent, self._handle = None, None  # counts that are being summed over processes

    @torch.no_grad()
    def update(self, labels: Tensor):
        """Count the captions of labels [B, K], and those of all other processes, if there are any.

        The sum over processes only starts here; it runs beside whatever comes next (the encoder's
        forward pass) until `weights` or `wait` needs it. Raises ValueError as `as_sets` does.
        """
        self.wait()
        tokens = as_sets(labels, len(self.df)).flatten()  # [B * K]
        count = torch.zeros(len(self.df) + 1, dtype=torch.int64, device=labels.device)
        count.scatter_add_(0, tokens.clamp(min=0), (tokens >= 0).long())
        count[-1] = len(labels)  # the captions travel with the tokens, in one message
        self._sent = count
        self._handle = dist.all_reduce(count, async_op=True) if dist.is_initialized() else None
        if self._handle is None:
            self.wait()

    def wait(self):
        """Finish a count that was started."""
        if self._sent is not None:
            if self._handle is not None:
                self._handle.wait()
            self.df += self._sent[:-1]
            self.n += self._sent[-1]
            self._sent = None

    def weights(self) -> Tensor:
        """Weights [V], float32, zero or more."""
        self.wait()
        # The same as log((n + 1) / (df + 1)), but where df is close to a large n that quotient
        # would be rounded to one in float32.
        return torch.log1p((self.n - self.df).float() / (self.df + 1).float())


# ------------------------------------------------------------------------------------------------
# The loss (section 3).


def superclass_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy between softmax(logits) and the IDF-weighted tokens of the caption.

    With logits x and targets ŷ_c = w_c / sum of w over the caption's tokens, an image's loss is
    - sum_c ŷ_c log softmax(x)_c = logsumexp(x) - sum_c ŷ_c x_c, since its targets sum to one; then
    the mean over the batch. A caption without a token of positive weight adds zero loss and zero
    gradient.

    Args:
        logits: [B, V], any float type; the loss is computed in float32.
        labels: [B, K] int64, each row a set of token ids, padded with -1; repeats count once.
        weights: [V], zero or more, such as `IDF.weights()`; all ones for plain label averaging.
    Returns:
        A scalar, float32.
    Raises:
        ValueError: when shapes do not fit, or as `as_sets` does.
    """
    B, V = logits.shape
    if labels.ndim != 2 or len(labels) != B or weights.shape != (V,):
        raise ValueError(
            f"logits {(B, V)} do not fit labels {tuple(labels.shape)} and weights "
            f"{tuple(weights.shape)}"
        )
    labels = as_sets(labels, V)  # [B, K]
    w = weights.float()[labels.clamp(min=0)] * (labels >= 0)  # [B, K]
    targets = w / w.sum(dim=1, keepdim=True).clamp(min=1e-30)  # [B, K], rows sum to one, or to zero
    return SoftmaxCrossEntropy.apply(logits, labels.clamp(min=0), targets)


class SoftmaxCrossEntropy(torch.autograd.Function):
    """Cross-entropy with K-sparse targets, whose gradient is written as what it is.

    For an image with targets ŷ that is (sum of ŷ) softmax(x) - ŷ, over B for the mean. Autograd
    would keep several [B, V] tensors; at V = 49,408 they are what fills the memory. Here the
    gradient is the only one beside the logits: rows are worked through a few at a time, in float32.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
        lse = torch.empty(len(logits), device=logits.device)  # [B]
        rows = rows_at_once(logits)
        for piece, x in zip(lse.split(rows), logits.split(rows), strict=True):
            torch.logsumexp(x.float(), dim=1, out=piece)
        ctx.save_for_backward(logits, labels, targets, lse)
        chosen = logits.gather(1, labels).float()  # [B, K]
        return (targets.sum(dim=1) * lse - (targets * chosen).sum(dim=1)).mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        logits, labels, targets, lse = ctx.saved_tensors
        targets = targets * (grad_loss / len(logits))
        scale = targets.sum(dim=1, keepdim=True)  # [B, 1]; zero where a caption has nothing to say
        gradient = torch.empty_like(logits)
        tensors = gradient, logits, labels, targets, lse[:, None], scale
        pieces = zip(*(t.split(rows_at_once(logits)) for t in tensors), strict=True)
        for rows, x, ids, target, log_sum, factor in pieces:
            scaled_softmax = (x.float() - log_sum).exp_().mul_(factor)  # [rows, V]
            rows.copy_(scaled_softmax.scatter_add_(1, ids, -target))
        return gradient, None, None


def rows_at_once(logits: Tensor) -> int:
    """Rows of logits [B, V] that fit a CPU's cache, or that keep a GPU busy."""
    return max(1, 2 ** (17 if logits.device.type == "cpu" else 24) // logits.shape[1])
