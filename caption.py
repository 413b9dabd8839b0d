"""What a language model makes of a frozen encoder's patches: captions and answers to questions.

The paper also measures encoders through a language model, by ClipCap (Table 3) and by LLaVA (Tables
4 to 11). Both share one idea: a projector turns the locked encoder's output into prefix vectors
(`Captioner`), which a causal language model (`LanguageModel`, `load_gpt2`) continues. It reads

    prefix vectors, tokens of the question if there is one, end mark, tokens of the answer

and predicts the answer and another end mark. A caption is an answer without a question. The end
mark is the vocabulary's last id; in GPT-2 that is <|endoftext|>, which stands between two texts.

Letters in shapes:  B images, S image size, N patches, P prefix vectors, D and E widths of encoder
and language model, Q tokens of a question, K of an answer, L of both and the mark, V vocabulary.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from baselines import CausalAttention
from superclass import Block, SuperClass, init_transformer
from tokenizer import UserError


class LanguageModel(nn.Module):
    """GPT-2's architecture (Radford et al., 2019): causal, pre-norm, head tied to the embedding.

    Width, depth and heads are as for the ViT. V counts the end mark; P + L is at most `max_tokens`.
    """

    def __init__(self, vocab_size: int, width: int, depth: int, heads: int, max_tokens: int):
        super().__init__()
        self.vocab_size, self.width, self.max_tokens = vocab_size, width, max_tokens
        self.shape = vocab_size, width, depth, heads, max_tokens  # what builds another one
        self.token_embed = nn.Embedding(vocab_size, width)
        self.pos_embed = nn.Parameter(torch.zeros(max_tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-5)
        for block in self.blocks:
            fc1, fc2 = block.mlp.fc1, block.mlp.fc2
            block.mlp = nn.Sequential(OrderedDict(fc1=fc1, gelu=nn.GELU("tanh"), fc2=fc2))
            block.attn = CausalAttention(width, heads)
            block.norm1.eps = block.norm2.eps = 1e-5
        # Embeddings get std E^-0.5. They are the head, too, so that logits have variance one and
        # the loss starts at about log V + 0.5. Positions get half of that: GPT-2's ratio.
        init_transformer(self)
        nn.init.normal_(self.pos_embed, std=0.5 * width**-0.5)

    def forward(
        self, tokens: Tensor, prefix: Tensor | None = None, places: Tensor | None = None
    ) -> Tensor:
        """Tokens [B, L], padded with -1 at the end, after a prefix [B, P, E] -> logits [B, L, V].

        Those at one token predict the next. With places [B, K], indices into L, only the logits
        [B, K, V] there are computed. ValueError when P + L is more than `max_tokens`.
        """
        x = self.token_embed(tokens.clamp(min=0))  # [B, L, E]
        x = x if prefix is None else torch.cat([prefix, x], dim=1)  # [B, P + L, E]
        if x.shape[1] > self.max_tokens:
            raise ValueError(f"P + L = {x.shape[1]} is more than max_tokens = {self.max_tokens}")
        x = x + self.pos_embed[: x.shape[1]]
        for block in self.blocks:
            x = block(x)  # [B, P + L, E]
        x = x[:, -tokens.shape[1] :]  # [B, L, E]
        x = x if places is None else x.take_along_dim(places[:, :, None], dim=1)  # [B, K, E]
        return F.linear(self.norm(x), self.token_embed.weight)


# Parts of a parameter's name in the published state dicts, and ours.
NAMES = {"wte": "token_embed", "wpe.weight": "pos_embed", "h.": "blocks.", "ln_1": "norm1"}
NAMES |= {"c_attn": "qkv", "attn.c_proj": "attn.proj", "ln_2": "norm2", "c_fc": "fc1"}
NAMES |= {"mlp.c_proj": "mlp.fc2", "ln_f.": "norm."}


def load_gpt2(path: str | Path) -> LanguageModel:
    """A language model with the weights of a published GPT-2, of any size with heads of 64.

    The file is a state dict, .bin or .safetensors, with or without "transformer." before its keys.
    UserError when it cannot be read, or naming keys that are missing, unknown or do not fit.
    """
    try:
        if Path(path).suffix == ".safetensors":
            from safetensors.torch import load_file as load
        else:
            load = partial(torch.load, map_location="cpu", weights_only=True)
        state = {key.removeprefix("transformer."): p.float() for key, p in load(path).items()}
    except Exception as error:  # a damaged file can fail anywhere; safetensors may be missing
        raise UserError(f"{path} cannot be read as a state dict: {error!r}") from None
    ours = {}
    for key, p in state.items():
        for their_part, our_part in NAMES.items():
            key = key.replace(their_part, our_part)
        if not key.endswith((".attn.bias", ".attn.masked_bias", "lm_head.weight")):
            ours[key] = p.T if key.startswith("blocks.") and p.ndim == 2 else p
    try:
        # Where one of the two tables is missing, load_state_dict says so.
        V, E = ours.get("token_embed.weight", torch.empty(1, 64)).shape
        positions = len(ours.get("pos_embed", []))
        if E % 64:
            raise ValueError(f"its width {E} is not a multiple of 64")
        depth = len({key.split(".")[1] for key in ours if key.startswith("blocks.")}) or 1
        model = LanguageModel(V, E, depth, E // 64, positions)
        model.load_state_dict(ours)
    except (ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        for their_part, our_part in NAMES.items():
            reason = reason.replace(our_part, their_part)
        raise UserError(f"{path} is not GPT-2: {reason[:1000]}") from None
    return model


class Captioner(nn.Module):
    """A locked encoder, a projector that learns, and a `LanguageModel` that reads its vectors.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D.
        prefix: "pooled" for 10 vectors from the mean over the patches (ClipCap, Mokady et al.,
            2021), "patches" for one from each patch (LLaVA-1.5, Liu et al., 2023).
        frozen_lm: only the projector learns (Table 3).
    """

    def __init__(
        self, encoder: nn.Module, language_model: LanguageModel, prefix: str, frozen_lm=False
    ):
        super().__init__()
        self.encoder, self.language_model = encoder.requires_grad_(False), language_model
        self.pooled = prefix == "pooled"
        language_model.requires_grad_(not frozen_lm)
        D, E = encoder.width, language_model.width
        if self.pooled:
            layers = nn.Linear(D, 5 * E), nn.Tanh(), nn.Linear(5 * E, 10 * E)
            self.projector = nn.Sequential(*layers, nn.Unflatten(1, (10, E)))
        else:
            self.projector = nn.Sequential(nn.Linear(D, E), nn.GELU(), nn.Linear(E, E))

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.eval()  # a locked batch norm must not count any more
        return self

    features = SuperClass.features  # images [B, 3, S, S] -> the pooled representation [B, D]

    def project(self, images: Tensor) -> Tensor:
        """Images [B, 3, S, S] -> prefix vectors [B, P, E]."""
        return self.projector(self.features(images) if self.pooled else self.encoder(images))

    def forward(self, images: Tensor, tokens: Tensor, questions: Tensor | None = None) -> Tensor:
        """Images [B, 3, S, S], answers [B, K] and questions [B, Q] -> logits [B, K + 1, V].

        They predict the answer's tokens and the end mark. Ids are padded with -1 at the end.
        """
        return self.answer_logits(self.project(images), tokens, questions)

    def answer_logits(self, prefix: Tensor, tokens: Tensor, questions: Tensor | None) -> Tensor:
        """As `forward`, from prefix vectors [B, P, E]."""
        questions = tokens[:, :0] if questions is None else questions
        mark = tokens.new_full((len(tokens), 1), self.language_model.vocab_size - 1)
        rows = torch.cat([questions, mark, tokens], dim=1)  # [B, L]
        # Move all padding to the end, where no token sees it: logits do not depend on the batch.
        order = (rows < 0).long().argsort(dim=1, stable=True)
        places = torch.arange(tokens.shape[1] + 1, device=tokens.device)
        places = places + (questions >= 0).sum(dim=1, keepdim=True)  # [B, K + 1]
        return self.language_model(rows.gather(1, order), prefix, places)


def caption_loss(logits: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of logits [B, K + 1, V] on tokens [B, K], padded with -1, and the end mark.

    The mean over each answer, then over the batch; in float32. A mean over all tokens would weight
    an answer by the lengths of the others in its micro-batch, and change with the split.
    """
    length = (tokens >= 0).sum(dim=1, keepdim=True)  # [B, 1]
    targets = F.pad(tokens, (0, 1), value=-1).scatter(1, length, logits.shape[2] - 1)  # [B, K + 1]
    options = {"ignore_index": -1, "reduction": "none"}
    losses = F.cross_entropy(logits.float().transpose(1, 2), targets, **options)  # [B, K + 1]
    return (losses.sum(dim=1) / (length[:, 0] + 1)).mean()


@torch.no_grad()
def generate(
    captioner: Captioner, images: Tensor, questions: Tensor | None = None, max_tokens: int = 40
) -> list[list[int]]:
    """Greedy decoding: the ids of each answer up to its end mark, or the first `max_tokens`.

    Each step reads all tokens again; texts this short need no cache of keys and values.
    """
    prefix, end = captioner.project(images), captioner.language_model.vocab_size - 1
    answers = torch.empty(len(images), 0, dtype=torch.int64, device=images.device)
    while answers.shape[1] < max_tokens and not (answers == end).any(dim=1).all():
        logits = captioner.answer_logits(prefix, answers, questions)  # [B, K + 1, V]
        answers = torch.cat([answers, logits[:, -1:].argmax(dim=2)], dim=1)
    return [row[: row.index(end)] if end in row else row for row in answers.tolist()]
