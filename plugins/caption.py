"""What a language model makes of an encoder's patches: captions and answers to questions.

    --objective cap                            the encoder learns, too, from nothing (Cap)
    --objective caption --init RUN             one prefix vector from each patch (LLaVA-1.5)
    --objective clipcap --init RUN             ten from the mean over the patches (ClipCap)
    --objective clipcap:GPT2.bin --init RUN    into a published GPT-2, which stays frozen (Table 3)
    python eval.py caption RUN                 generates texts and compares them by CIDEr

The paper also measures encoders through a language model, by ClipCap (Table 3) and by LLaVA (Tables
4 to 11). Both share one idea: a projector turns the locked encoder's output into prefix vectors
(`Captioner`), which a causal language model (`LanguageModel`, `load_gpt2`) continues. It reads

    prefix vectors, tokens of the question if there is one, end mark, tokens of the answer

and predicts the answer and another end mark. A caption is an answer without a question. The end
mark is the vocabulary's last id; in GPT-2 that is <|endoftext|>, which stands between two texts.

Letters in shapes:  B images, S image size, N patches, P prefix vectors, D and E widths of encoder
and language model, Q tokens of a question, K of an answer, L of both and the mark, V vocabulary.
"""

import json
import math
import re
from collections import Counter, OrderedDict
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import eval as evaluation
from data import UserError, normalize
from plugins.contrastive import TEXT_SIZES, CausalAttention
from superclass import Block, Objective, SuperClass, init_transformer


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
    """An encoder, a projector that learns, and a `LanguageModel` that reads its vectors.

    Args:
        encoder: maps images to tokens [B, N, D] and has `.width` = D.
        prefix: "pooled" for 10 vectors from the mean over the patches (ClipCap, Mokady et al.,
            2021), "patches" for one from each patch (LLaVA-1.5, Liu et al., 2023).
        frozen_lm: the language model does not learn (Table 3).
        locked: nor does the encoder.
    """

    def __init__(
        self,
        encoder: nn.Module,
        language_model: LanguageModel,
        prefix: str,
        frozen_lm=False,
        locked=True,
    ):
        super().__init__()
        self.encoder, self.language_model = encoder.requires_grad_(not locked), language_model
        self.pooled, self.locked = prefix == "pooled", locked
        language_model.requires_grad_(not frozen_lm)
        D, E = encoder.width, language_model.width
        if self.pooled:
            layers = nn.Linear(D, 5 * E), nn.Tanh(), nn.Linear(5 * E, 10 * E)
            self.projector = nn.Sequential(*layers, nn.Unflatten(1, (10, E)))
        else:
            self.projector = nn.Sequential(nn.Linear(D, E), nn.GELU(), nn.Linear(E, E))

    def train(self, mode: bool = True):
        super().train(mode)
        self.encoder.train(mode and not self.locked)  # a locked batch norm must not count any more
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
    return (-log_likelihood(logits, tokens) / ((tokens >= 0).sum(dim=1) + 1)).mean()


def log_likelihood(logits: Tensor, tokens: Tensor) -> Tensor:
    """The logarithm [B] of the probability of each answer and its end mark; as `caption_loss`."""
    length = (tokens >= 0).sum(dim=1, keepdim=True)  # [B, 1]
    targets = F.pad(tokens, (0, 1), value=-1).scatter(1, length, logits.shape[2] - 1)  # [B, K + 1]
    options = {"ignore_index": -1, "reduction": "none"}
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), **options)
    return -losses.view_as(targets).sum(dim=1)


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


# ------------------------------------------------------------------------------------------------
# The objectives.


class PatchesObjective(Objective):
    """Captions from one prefix vector for each patch, or answers where there are questions."""

    prefix, locked = "patches", True
    reads, tasks = ("tokens", "questions"), ("caption",)
    weighted = has_words = False

    @property
    def gpt2(self) -> str:
        """The file of a published language model, or nothing."""
        return self.config.objective.partition(":")[2]

    def check(self, config, source):
        if self.locked and not config.init:
            name = config.objective.partition(":")[0]
            raise ValueError(f"--objective {name} needs a trained encoder: name it with --init")
        config.lm_shape = load_gpt2(self.gpt2).shape if self.gpt2 else None

    def build(self, encoder: nn.Module, config) -> Captioner:
        known = config.lm_shape and config.lm_shape[0]
        if known and known != config.vocab_size:
            has = f"--tokenizer {config.tokenizer} has {config.vocab_size}"
            raise UserError(f"{self.gpt2} knows {known} tokens, {has}: use --tokenizer gpt2")
        longest = 1 + 2 * 77  # a question, the mark and an answer
        with torch.no_grad():
            longest += encoder.eval()(torch.zeros(1, 3, *2 * [config.image_size])).shape[1]
        width, depth, heads = TEXT_SIZES.get(config.model.split("/")[0], TEXT_SIZES["B"])
        small = config.vocab_size + 1, width, depth // 2, heads, 2048  # the last id is the end mark
        language_model = LanguageModel(*(config.lm_shape or small))
        if longest > language_model.max_tokens:
            most = f"the language model's {language_model.max_tokens} tokens"
            raise ValueError(f"{most} are too few for patches, question and answer")
        return Captioner(encoder, language_model, self.prefix, bool(config.lm_shape), self.locked)

    def load_pretrained(self, model: Captioner, config):
        if self.gpt2:
            model.language_model.load_state_dict(load_gpt2(self.gpt2).state_dict())

    def loss(self, outputs: Tensor, batch, weights: Tensor) -> Tensor:
        return caption_loss(outputs, batch.reads["tokens"])

    def answer(self, run, images: Tensor, questions: Tensor) -> list[str]:
        """The generated texts for images [B, 3, S, S] and questions [B, Q], padded with -1."""
        return [run.tokenizer.decode(ids).strip() for ids in generate(run.model, images, questions)]


class PooledObjective(PatchesObjective):
    """The same from ten prefix vectors for the pooled feature."""

    prefix = "pooled"


class CapObjective(PatchesObjective):
    """An encoder that learns from captioning alone: Cap of Tschannen et al. (arXiv 2306.07915).

    There the decoder looks at the patches by cross-attention. Here they are its prefix, as in
    GenLIP (arXiv 2605.00809), where one transformer does both.
    """

    locked, tasks = False, ("probe", "fewshot")


# ------------------------------------------------------------------------------------------------
# The evaluation.


def measure(run: evaluation.Run, val, options: dict) -> list[dict]:
    """The row of `caption`: CIDEr of the generated texts, and the share that equals a reference.

    Rows with the same pixels and question are one image with several references. The texts are
    written to captions.jsonl in the run's folder.
    """
    if not isinstance(run.model, Captioner):
        raise UserError(f"{run.folder} has no language model: train one with --objective caption")
    decode, found, size = run.tokenizer.decode, {}, evaluation.BATCH // 4  # logits are [B, K, V]
    given = size, options["limit"], options["workers"], run.objective.reads
    for batch in evaluation.good_batches(run, val, *given):
        tokens, questions = batch.reads["tokens"], batch.reads["questions"]
        answers = run.objective.answer(run, normalize(batch.images), questions)
        rows = zip(batch.images.cpu(), questions, tokens, answers, strict=True)
        for image, *ids, answer in rows:
            question, reference = (decode(row[row >= 0].tolist()).strip() for row in ids)
            text = {"question": question, "generated": answer, "references": []}
            key = hash((image.numpy().tobytes(), question))
            found.setdefault(key, text)["references"].append(reference)
    texts = list(found.values())
    if not any(text["generated"] for text in texts):
        raise UserError(f"all {len(texts)} generated texts are empty: train longer")
    lines = "".join(json.dumps(text) + "\n" for text in texts)
    evaluation.publish(lines, run.folder / "captions.jsonl")
    score = cider([text["generated"] for text in texts], [text["references"] for text in texts])
    exact = sum(text["generated"] in text["references"] for text in texts) / len(texts)
    return [{"task": "caption", "images": len(texts), "cider": score, "exact": exact}]


def main(argv: list[str]):
    evaluation.measure_command(["caption", *argv])


def cider(hypotheses: list[str], references: list[list[str]]) -> float:
    """Agreement of captions with their references, 0 to 10: CIDEr-D, coco-caption's "CIDEr".

    Two texts are compared by the cosine of their n-grams' tf-idf vectors, where a repeated n-gram
    counts at most as often as in the reference, and less the more their lengths differ (Vedantam et
    al., 2015). The score is the mean over n from 1 to 4, the references and the images, times 10;
    papers print 100 times this number. An n-gram that all images have in their references has
    weight 0, so a single image scores 0. Each image has one hypothesis and one or more references.
    """

    def grams(text: str) -> list[Counter]:
        words = re.findall(r"\w+(?:['’-]\w+)*", text.lower())
        return [Counter(zip(*(words[i:] for i in range(n)), strict=False)) for n in range(1, 5)]

    def weigh(counts: Counter) -> dict:
        return {gram: tf * math.log(N / max(1, df[gram])) for gram, tf in counts.items()}

    def similarity(hypothesis: list[Counter], reference: list[Counter]) -> float:
        total = 0.0
        for h, r in zip(map(weigh, hypothesis), map(weigh, reference), strict=True):
            dot = sum(min(weight, r.get(gram, 0)) * r.get(gram, 0) for gram, weight in h.items())
            total += dot / (math.hypot(*h.values()) * math.hypot(*r.values()) or 1)
        longer = hypothesis[1].total() - reference[1].total()
        return total / 4 * math.exp(-(longer**2) / 72)

    N, targets = len(references), [list(map(grams, texts)) for texts in references]
    df = Counter(g for texts in targets for g in {g for text in texts for n in text for g in n})
    scores = [
        sum(similarity(grams(text), target) for target in targets_of) / len(targets_of)
        for text, targets_of in zip(hypotheses, targets, strict=True)
    ]
    return 10 * sum(scores) / N
