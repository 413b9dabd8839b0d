"""SuperClass: pretrain a vision encoder by classifying an image into the subwords of its caption.

The whole method of Huang et al., "Classification Done Right for Vision-Language Pre-Training"
(NeurIPS 2024, arXiv 2411.03313), in the paper's order: a vision transformer (`ViT`), a linear
classifier over the tokenizer's vocabulary (`SuperClass`), inverse document frequencies that weight
the tokens (`IDF`), and the loss (`superclass_loss`). There is no text encoder, no contrast between
the images of a batch, and no hand-made vocabulary. `Objective` is what a training loop uses.

Letters: B images, S image size, P patch size, N patches, D width, H heads, K tokens, V vocabulary.
"""

import re

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

# ------------------------------------------------------------------------------------------------
# The model (section 3). The encoder's parameters carry timm's names, so they load into timm.


class PatchEmbed(nn.Module):
    """Map each square of P x P pixels to D numbers, by a convolution with stride P."""

    def __init__(self, patch_size: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_cuda:  # without .contiguous(), each norm would copy its input
            return self.proj(images).flatten(2).transpose(1, 2).contiguous()  # [B, N, D]
        # The same as one matrix product, which is faster on a GPU.
        (B, _, S, _), P = images.shape, self.proj.kernel_size[0]
        x = images.reshape(B, 3, S // P, P, S // P, P).permute(0, 2, 4, 1, 3, 5)
        x = x.reshape(B, (S // P) ** 2, 3 * P * P)
        return F.linear(x, self.proj.weight.flatten(1), self.proj.bias)  # [B, N, D]


class LayerNorm(nn.LayerNorm):
    """Layer norm in its input's type, where torch's own would return float32 under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


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
    """Two linear layers with a GELU between them; the hidden layer is four times as wide."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block: attention mixes the tokens, the MLP works on each of them."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1 = LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = LayerNorm(width, eps=1e-6)
        self.mlp = MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


@torch.no_grad()
def init_transformer(model: nn.Module):
    """Initialise `model` so that activations keep a variance near one through `model.blocks`.

    A matrix with n inputs of variance one gets std n^-0.5. Two matrices of each block write into
    the residual stream; 2 x depth such terms add up, so their std is divided by sqrt(2 x depth)
    (Radford et al., 2019). Biases start at 0 and norms at the identity. Positions start with std
    0.5: with the usual 0.02, the default run learned shapes much later.
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

    Maps normalised images [B, 3, S, S] to patch tokens [B, N, D], N = (S / P)^2, after a last norm.

    image_size and patch_size are in pixels, depth is the number of blocks. Raises ValueError if P
    does not divide S, H does not divide D, or an image is not S x S.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, depth: int, heads: int):
        super().__init__()
        if image_size < patch_size or image_size % patch_size:
            raise ValueError(f"{image_size} px cannot be cut into patches of {patch_size} px")
        if width % heads:
            raise ValueError(f"a width of {width} cannot be divided among {heads} heads")
        self.image_size, self.patch_size, self.width = image_size, patch_size, width
        self.grad_checkpointing = False  # recompute each block in the backward pass to save memory
        self.patch_embed = PatchEmbed(patch_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = LayerNorm(width, eps=1e-6)
        init_transformer(self)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.image_size, self.image_size):
            raise ValueError(f"images must have {self.image_size} px, not {tuple(images.shape)}")
        x = self.patch_embed(images)  # [B, N, D], in bf16 under autocast
        x = x + self.pos_embed.to(x.dtype)  # float32 would make all that is added to it float32
        recompute = self.grad_checkpointing and self.training
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)  # [B, N, D]
        return self.norm(x)  # [B, N, D]


SIZES = {  # name: width, depth, heads. XXS, XS and Ti5 are ours, for laptops; Ti is timm's
    "XXS": (64, 4, 2),
    "XS": (128, 4, 4),
    "Ti5": (192, 5, 3),
    "Ti": (192, 12, 3),
    "S": (384, 12, 6),
    "B": (768, 12, 12),
    "L": (1024, 24, 16),
}


def build_encoder(name: str, image_size: int) -> ViT:
    """Build a ViT from "SIZE/PATCH", such as "B/16": one of `SIZES` and a patch size in pixels.

    Raises ValueError for any other name and for a patch size that does not divide the image size.
    """
    match = re.fullmatch(r"(\w+)/([1-9]\d*)", name)
    if not match or match[1] not in SIZES:
        raise ValueError(f"unknown model '{name}': use SIZE/PATCH, SIZE one of {', '.join(SIZES)}")
    return ViT(image_size, int(match[2]), *SIZES[match[1]])


class SuperClass(nn.Module):
    """An encoder, the mean over its patches, and a linear head with one output for each token.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D: the ViT above or any other.
        vocab_size: V.
    """

    def __init__(self, encoder: nn.Module, vocab_size: int):
        super().__init__()
        self.encoder = encoder
        # The released code has this norm. A small trial had 0.90 with it, 0.88 without (one seed).
        self.norm = nn.LayerNorm(encoder.width, eps=1e-6)
        self.head = nn.Linear(encoder.width, vocab_size)
        # As in the released code. The logits of a normalised vector then have variance one, so the
        # loss starts at about log V + 0.5. A head of zeros starts at log V but learns more slowly.
        nn.init.normal_(self.head.weight, std=encoder.width**-0.5)
        nn.init.zeros_(self.head.bias)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> the pooled representation [B, D] that downstream tasks use."""
        return self.encoder(images).mean(dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> logits [B, V]."""
        return self.head(self.norm(self.features(images)))


# ------------------------------------------------------------------------------------------------
# The weights of the tokens and the loss (section 3). Labels [B, K] hold one caption a row: the set
# of its token ids, each once, padded with -1.


class IDF(nn.Module):
    """Inverse document frequencies, counted online from the captions seen so far (section 3).

    w_c = log((n + 1) / (df_c + 1)), where n captions were seen and df_c of them contain token c.
    The paper writes log(n / (1 + df_c)), which is negative for a token in every caption; then a
    caption's weights can sum to zero or less. This smoothing, the released code's, is never
    negative. Buffers: df [V] and n [], int64, so the counts are exact however a batch is split.
    """

    def __init__(self, vocab_size: int):
        super().__init__()
        self.register_buffer("df", torch.zeros(vocab_size, dtype=torch.int64))
        self.register_buffer("n", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, labels: Tensor):
        """Count a global batch, of which each process passes its share: labels [B, K]."""
        slots = labels.flatten() + 1  # padding is counted in slot 0
        counts = torch.zeros(len(self.df) + 1, dtype=torch.int64, device=labels.device)
        counts.scatter_add_(0, slots, torch.ones_like(slots))
        captions = torch.full_like(self.n, len(labels))
        if dist.is_initialized():
            dist.all_reduce(counts)
            dist.all_reduce(captions)
        self.df += counts[1:]
        self.n += captions

    def weights(self) -> Tensor:
        """Weights [V], float32, zero or more."""
        # log((n + 1) / (df + 1)), in a form that does not round to zero where df is near n.
        return torch.log1p((self.n - self.df).float() / (self.df + 1).float())


def superclass_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy between softmax(logits) and the IDF-weighted tokens of the caption.

    With logits x and targets ŷ_c = w_c / (sum of w over the caption's tokens), the loss of an image
    is - sum_c ŷ_c log softmax(x)_c = logsumexp(x) - sum_c ŷ_c x_c, because its targets sum to one.
    The batch's loss is the mean. A caption whose weights are all zero adds no loss and no gradient.

    Args:
        logits: [B, V], any float type; the loss is computed in float32.
        labels: [B, K] int64, each row a set of token ids, padded with -1.
        weights: [V], zero or more, such as `IDF.weights()`; all ones to weight tokens equally.
    Returns a scalar, float32. Raises ValueError if the shapes do not fit, IndexError (on the CPU)
    for an id of V or more.
    """
    B, V = logits.shape
    if labels.ndim != 2 or len(labels) != B or weights.shape != (V,):
        raise ValueError(f"{logits.shape=}, {labels.shape=} and {weights.shape=} do not fit")
    is_token = labels >= 0  # [B, K]
    tokens = labels.masked_fill(~is_token, 0)  # padding reads token 0, and gets a target of zero
    w = weights.float()[tokens] * is_token  # [B, K]
    targets = w / w.sum(dim=1, keepdim=True).clamp(min=1e-30)  # [B, K], rows sum to one or to zero
    # x = logits.float()
    # return (targets.sum(1) * x.logsumexp(1) - (targets * x.gather(1, tokens)).sum(1)).mean()
    return SparseCrossEntropy.apply(logits, tokens, targets)  # the same loss in less memory


class SparseCrossEntropy(torch.autograd.Function):
    """The two lines above with their gradient written out; skip this on a first reading.

    At V = 49,408, autograd would keep 3.8 tensors of [B, V] beside the logits. This keeps 1.5, one
    of them the gradient, and takes a third of the time: it works on a few rows at a time.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, tokens: Tensor, targets: Tensor) -> Tensor:
        # So many rows at a time fit a CPU's cache, or keep a GPU busy.
        ctx.rows = max(1, 2 ** (17 if logits.device.type == "cpu" else 24) // logits.shape[1])
        lse = torch.cat([x.float().logsumexp(dim=1) for x in logits.split(ctx.rows)])
        ctx.save_for_backward(logits, tokens, targets, lse)
        x = logits.gather(1, tokens).float()  # [B, K], the logits of the caption's own tokens
        return (targets.sum(dim=1) * lse - (targets * x).sum(dim=1)).mean()

    @staticmethod
    def backward(ctx, grad_loss: Tensor):
        logits, tokens, targets, lse = ctx.saved_tensors
        targets = targets * (grad_loss / len(logits))  # [B, K]
        total = targets.sum(dim=1, keepdim=True)  # [B, 1]; zero where a caption has no weight
        grad = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.rows):
            few = slice(start, start + ctx.rows)
            softmax = (logits[few].float() - lse[few, None]).exp_()  # [rows, V]
            grad[few] = softmax.mul_(total[few]).scatter_add_(1, tokens[few], -targets[few])
        return grad, None, None


class Objective:
    """What is learned and how it is measured: SuperClass. Others are subclasses, on the shelf.

    reads: fields of a batch that the model takes by name, besides the images.
    tasks, prompts: what measures a run, and the texts that zero-shot puts class names in.
    whole_batch: the loss compares the images of a batch, so it allows no micro-batches.
    weighted, captions: the loss uses IDF weights; training needs captions.
    has_words: the model has `.norm` and `.head`, with one logit for each token.
    classify(run, features, texts), optional: scores of classes, if not those of the words.
    """

    reads, tasks, prompts = (), ("retrieval", "zeroshot", "probe", "fewshot"), ("{}",)
    whole_batch, weighted, captions, has_words = False, True, True, True
    token_loss = staticmethod(superclass_loss)  # or what --loss names

    def check(self, config, source):
        """Raise ValueError for flags or data that cannot be used; may add to config."""

    def build(self, encoder: nn.Module, config) -> nn.Module:
        return SuperClass(encoder, config.vocab_size)

    def load_pretrained(self, model: nn.Module, config):
        """Load what a new run starts from, besides the encoder."""

    def loss(self, outputs: Tensor, batch, weights: Tensor) -> Tensor:
        return self.token_loss(outputs, batch.labels, weights)

    def log_probabilities(self, logits: Tensor) -> Tensor:
        return logits.log_softmax(dim=-1)
