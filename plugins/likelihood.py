"""Zero-shot by a language model: which class is the likeliest caption of an image?

    python eval.py likelihood RUN [--prompt "a {}"]

For runs of plugins/caption.py, as CapPa does it (Tschannen et al., 2023): a text scores the
logarithm of its probability, end mark included, and a class the sum of its texts' probabilities.
The language model reads every text after every image, which takes long if there are many.

Letters in shapes:  B images, M texts of all classes, K tokens of a text, L = K + 1 with the mark,
P prefix vectors, E width, H heads, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data import UserError, caption_tokens, normalize, pad
from eval import BATCH, Run, good_batches, measure_command, top1
from plugins.caption import Captioner, LanguageModel, log_likelihood
from superclass import Block


@torch.no_grad()
def likelihoods(model: Captioner, images: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities [B, M] of texts [M, K], padded with -1, for images [B, 3, S, S]."""
    prefixes, lengths = model.project(images), (tokens >= 0).sum(dim=1)  # [B, P, E], [M]
    found = prefixes.new_empty(len(images), len(tokens), dtype=torch.float32)
    for length in lengths.unique().tolist():  # texts of one length need no padding
        texts = tokens[lengths == length, :length]
        mark = texts.new_full((len(texts), 1), model.language_model.vocab_size - 1)
        ids = torch.cat([mark, texts], dim=1)
        logits = (continuations(model.language_model, x, ids) for x in prefixes)
        found[:, lengths == length] = torch.stack([log_likelihood(x, texts) for x in logits])
    return found


def continuations(model: LanguageModel, prefix: Tensor, ids: Tensor) -> Tensor:
    """Logits [M, L, V] of tokens [M, L], as the model's own, but one prefix [P, E] is read once."""
    (M, L), P = ids.shape, len(prefix)
    x = prefix[None] + model.pos_embed[:P]  # [1, P, E]
    y = model.token_embed(ids) + model.pos_embed[P : P + L]  # [M, L, E]
    visible = torch.ones(L, P + L, dtype=torch.bool, device=ids.device).tril(P)
    for block in model.blocks:
        (_, *before), (q, *own) = (heads(block, part) for part in (x, y))
        pairs = zip(before, own, strict=True)
        k, v = (torch.cat([a.expand(M, -1, -1, -1), b], dim=2) for a, b in pairs)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)  # [M, H, L, E/H]
        y = y + block.attn.proj(seen.transpose(1, 2).flatten(2))
        x, y = block(x), y + block.mlp(block.norm2(y))
    return F.linear(model.norm(y), model.token_embed.weight)


def heads(block: Block, x: Tensor) -> Tensor:
    """Queries, keys and values [3, B, H, N, E/H] of [B, N, E]."""
    qkv = block.attn.qkv(block.norm1(x)).unflatten(2, (3, block.attn.heads, -1))
    return qkv.permute(2, 0, 3, 1, 4)


def measure(run: Run, val, options: dict) -> list[dict]:
    """A row for each attribute of the source."""
    if not isinstance(run.model, Captioner):
        raise UserError(f"{run.folder} has no language model: train one with --objective cap")
    if not val.attributes:
        raise UserError("the validation data has no classes: give class folders or a label column")
    prompts, found, targets = options["prompts"] or ["{}"], {}, []
    for batch in good_batches(run, val, BATCH, workers=options["workers"]):
        targets.append(batch.targets.cpu())
        for attribute, names in val.attributes.items():
            texts = [[p.replace("{}", name) for name in ns for p in prompts] for ns in names]
            ids = pad([caption_tokens(text, run.tokenizer) for few in texts for text in few])
            scores = likelihoods(run.model, normalize(batch.images), ids.to(batch.images.device))
            classes = [few.logsumexp(dim=1) for few in scores.split([*map(len, texts)], dim=1)]
            found.setdefault(attribute, []).append(torch.stack(classes, dim=1).cpu())
    rows = []
    for (attribute, scores), labels in zip(found.items(), torch.cat(targets).T, strict=True):
        known = labels >= 0
        row = {"task": "likelihood", "attribute": attribute, "images": known.sum().item()}
        row |= {"classes": scores[0].shape[1]}
        rows.append(row | {"top1": top1(torch.cat(scores)[known], labels[known])})
    return rows


def main(argv: list[str]):
    measure_command(["likelihood", *argv])
