"""The captioner against transformers' GPT-2 and a dense loss, and CIDEr against coco-caption's."""

import copy
import random
import sys

import pytest
import torch
from pycocoevalcap.cider.cider_scorer import CiderScorer
from safetensors.torch import save_file
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

import eval as evaluation
import train
from data import UserError
from plugins import likelihood
from plugins.caption import Captioner, LanguageModel, caption_loss, cider, generate, load_gpt2
from superclass import ViT
from tests.conftest import COLOURS, picture, train_flags

V, E = 61, 128


@pytest.fixture(scope="module")
def gpt2():
    """A tiny GPT-2 with large random weights, so that what it generates varies."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=V, n_positions=40, n_embd=E, n_layer=3, n_head=2, initializer_range=0.2,
        bos_token_id=V - 1, eos_token_id=V - 1, pad_token_id=V - 1,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).eval()
    for name, p in model.named_parameters():
        if p.ndim == 1:  # biases and norms, which would be zeros and ones
            p.data += 0.1 * torch.randn(len(p), generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture
def weights(gpt2):
    """Its weights under the names of the oldest published files, with their masks and head."""
    state = {k.removeprefix("transformer."): v.clone() for k, v in gpt2.state_dict().items()}
    for i in range(3):
        state[f"h.{i}.attn.bias"] = torch.ones(1, 1, 40, 40).tril().bool()
        state[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    return state


def saved(weights, path):
    save_file(weights, path) if path.suffix == ".safetensors" else torch.save(weights, path)
    return path


def encoder():
    return ViT(image_size=16, patch_size=8, width=32, depth=1, heads=2)


def captioner(prefix="patches", frozen_lm=False, seed=0):
    torch.manual_seed(seed)
    model = LanguageModel(V, 32, 2, 2, max_tokens=40)
    return Captioner(encoder(), model, prefix, frozen_lm).train()


def padded(rows):
    return nn.utils.rnn.pad_sequence([torch.tensor(r).long() for r in rows], True, -1)


@pytest.fixture
def batch(on_device):
    """Four images, answers (one of them empty) and questions (one of them empty)."""
    torch.manual_seed(1)
    images = torch.randn(4, 3, 16, 16)
    tokens = padded([[5, 6, 7], [8], [], [9, 9, 9, 10, 11]])
    return images, tokens, padded([[1, 2], [3, 4, 5, 6], [7], []])


# ------------------------------------------------------------------------------------------------
# GPT-2.


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("suffix", [".bin", ".safetensors"])
def test_logits_are_those_of_transformers(
    on_device, device, gpt2, weights, tmp_path, prefix, suffix
):
    path = saved({prefix + k: v for k, v in weights.items()}, tmp_path / f"gpt2{suffix}")
    model, ids = load_gpt2(path), torch.randint(V, (3, 17))
    gpt2 = copy.deepcopy(gpt2).to(device)
    with torch.no_grad():
        assert (model(ids) - gpt2(ids).logits).abs().max() < 1e-4
        vectors = torch.randn(3, 5, E)
        embeds = torch.cat([vectors, gpt2.transformer.wte(ids)], dim=1)
        expected = gpt2(inputs_embeds=embeds).logits[:, 5:]
        assert (model(ids, vectors) - expected).abs().max() < 1e-4
        places = torch.tensor([[0, 3], [16, 2], [5, 5]])
        some = expected.gather(1, places[:, :, None].expand(-1, -1, V))
        assert (model(ids, vectors, places) - some).abs().max() < 1e-4


def test_half_precision_files_become_float32(weights, tmp_path):
    model = load_gpt2(saved({k: v.half() for k, v in weights.items()}, tmp_path / "gpt2.bin"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    # Too small a difference for the logits to show it after the last block.
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}


@pytest.mark.parametrize("prefix", ["pooled", "patches"])
def test_generation_is_that_of_transformers(on_device, device, gpt2, weights, tmp_path, prefix):
    torch.manual_seed(2)
    model = load_gpt2(saved(weights, tmp_path / "gpt2.bin"))
    # Half of the rows should end early.
    with torch.no_grad():
        model.token_embed.weight[-1] *= 2
        gpt2 = copy.deepcopy(gpt2).to(device)
        gpt2.transformer.wte.weight[-1] *= 2
    captioner = Captioner(encoder(), model, prefix).eval()
    images = torch.randn(12, 3, 16, 16)
    questions = [torch.randint(V - 1, (n % 4,)).tolist() for n in range(12)]
    ours = generate(captioner, images, padded(questions), max_tokens=12)
    expected = []
    for image, question in zip(images, questions, strict=True):
        ids = gpt2.transformer.wte(torch.tensor([[*question, V - 1]]))
        embeds = torch.cat([captioner.project(image[None]), ids], dim=1)
        mask = torch.ones(embeds.shape[:2]).long()
        options = {"attention_mask": mask, "do_sample": False, "max_new_tokens": 12}
        ids = gpt2.generate(inputs_embeds=embeds, **options)[0].tolist()
        expected.append(ids[: ids.index(V - 1)] if V - 1 in ids else ids)
    assert ours == expected
    assert len(set(map(len, ours))) > 2


def test_a_file_that_does_not_fit_names_the_keys(weights, tmp_path):
    class Code:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    def message(state):
        with pytest.raises(UserError) as caught:
            load_gpt2(saved(state, tmp_path / "gpt2.bin"))
        assert "\n" not in str(caught.value)
        assert "gpt2.bin" in str(caught.value)
        return str(caught.value)

    for key in ("wte.weight", "wpe.weight", "h.1.ln_2.bias", "h.0.attn.c_proj.weight", "ln_f.bias"):
        state = {k: v for k, v in weights.items() if k != key}
        assert f'Missing key(s) in state_dict: "{key}"' in message(state)
    state = weights | {"h.1.crossattention.bias": torch.zeros(3)}
    assert 'Unexpected key(s) in state_dict: "h.1.crossattention.bias"' in message(state)
    state = weights | {"h.2.mlp.c_fc.weight": torch.zeros(E, 7)}
    assert "size mismatch for h.2.mlp.c_fc.weight" in message(state)
    assert "width 96 is not" in message(weights | {"wte.weight": torch.zeros(V, 96)})
    assert "not GPT-2" in message(weights | {"wte.weight": torch.zeros(V)})
    assert "state dict" in message({"step": 3, "model": weights})
    assert "state dict" in message([1, 2])
    assert "not GPT-2" in message(encoder().state_dict())
    assert "state dict" in message({"wte.weight": Code()})  # pickled code,
    assert not (tmp_path / "ran").exists()  # which is not run


def test_a_file_that_cannot_be_read_is_named(weights, tmp_path, monkeypatch):
    for name in ("none.bin", "none.safetensors"):
        with pytest.raises(UserError, match=name):
            load_gpt2(tmp_path / name)
        (tmp_path / name).write_bytes(b"no weights")
        with pytest.raises(UserError, match=name):
            load_gpt2(tmp_path / name)
    path = saved(weights, tmp_path / "gpt2.safetensors")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(UserError, match="safetensors"):
        load_gpt2(path)


# ------------------------------------------------------------------------------------------------
# The captioner.


@pytest.mark.parametrize("prefix", ["pooled", "patches"])
def test_a_row_does_not_depend_on_its_batch(batch, prefix):
    model = captioner(prefix).double()
    images, tokens, questions = batch[0].double(), *batch[1:]
    logits = model(images, tokens, questions)
    assert logits.shape == (4, 6, V)
    for i in range(4):
        answer, question = (row[i][row[i] >= 0].tolist() for row in (tokens, questions))
        alone = model(images[i : i + 1], padded([answer]), padded([question]))
        torch.testing.assert_close(logits[i : i + 1, : len(answer) + 1], alone)
        # The same by hand: prefix, question, mark, answer, without any padding.
        ids = torch.tensor([[*question, V - 1, *answer]])
        dense = model.language_model(ids, model.project(images[i : i + 1]))
        torch.testing.assert_close(alone, dense[:, len(question) :])
    wider = torch.nn.functional.pad(questions, (0, 3), value=-1)
    torch.testing.assert_close(model(images, tokens, wider), logits)
    none = torch.full((4, 2), -1)
    torch.testing.assert_close(model(images, tokens, none), model(images, tokens))


def test_the_prefix_and_the_question_matter_and_the_future_does_not(batch):
    images, tokens, questions = batch
    model = captioner()
    logits = model(images, tokens, questions)
    assert not torch.allclose(model(images.flip(0), tokens, questions)[0], logits[0])
    assert not torch.allclose(model(images, tokens, questions + (questions >= 0))[0], logits[0])
    later = tokens.clone()
    later[3, 4] = 20
    torch.testing.assert_close(model(images, later, questions)[3, :5], logits[3, :5])


def test_batched_generation_equals_one_by_one(batch):
    images, _, questions = batch
    model = captioner(seed=3).eval()
    with torch.no_grad():
        model.language_model.token_embed.weight *= 3  # so that answers vary
    together = generate(model, images, questions, max_tokens=8)
    for i in range(4):
        question = questions[i][questions[i] >= 0][None]
        assert generate(model, images[i : i + 1], question, max_tokens=8) == [together[i]]
    without = generate(model, images, max_tokens=5)
    assert [len(row) <= 5 for row in without] == [True] * 4
    assert generate(model, images[:0]) == []


def test_training_learns_to_caption_and_to_stop(batch):
    images, tokens, questions = batch
    model = captioner("pooled")
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, 3e-3)
    for _ in range(60):
        loss = caption_loss(model(images, tokens, questions), tokens)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = [[5, 6, 7], [8], [], [9, 9, 9, 10, 11]]
    assert generate(model.eval(), images, questions) == expected


@pytest.mark.parametrize("frozen_lm", [False, True])
def test_what_is_locked_stays_as_it_is(batch, frozen_lm):
    locked = encoder()
    locked.norm = nn.BatchNorm1d(4)  # over the four patches; counts when in training mode
    model = Captioner(locked, LanguageModel(V, 32, 2, 2, 40), "patches", frozen_lm).train()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    caption_loss(model(*batch), batch[1]).backward()
    optimizer.step()
    for key, p in model.state_dict().items():
        stays = key.startswith("encoder.") or (frozen_lm and key.startswith("language_model."))
        assert torch.equal(p, before[key]) == stays, key


def test_an_encoder_that_is_not_locked_learns(batch):
    model = Captioner(encoder(), LanguageModel(V, 32, 2, 2, 40), "patches", locked=False).train()
    caption_loss(model(*batch), batch[1]).backward()
    assert model.encoder.training
    assert all(p.grad.abs().max() > 0 for p in model.encoder.parameters())


def test_errors_and_features(batch):
    model = captioner()
    assert torch.equal(model.features(batch[0]), model.encoder(batch[0]).mean(dim=1))
    with pytest.raises(ValueError, match="P \\+ L = 41 is more than max_tokens = 40"):
        model.language_model(torch.zeros(1, 41).long())


# ------------------------------------------------------------------------------------------------
# The loss.


def test_loss_is_that_of_a_dense_loop(batch):
    torch.manual_seed(4)
    tokens = batch[1]
    x = torch.randn(4, tokens.shape[1] + 1, V, dtype=torch.float64)
    total = 0.0
    for row, ids in zip(x, tokens.tolist(), strict=True):
        targets = [*(i for i in ids if i >= 0), V - 1]
        terms = [row[k].exp().sum().log() - row[k, target] for k, target in enumerate(targets)]
        total += sum(terms) / len(terms)
    assert caption_loss(x, tokens).item() == pytest.approx(total.item() / 4, rel=1e-6)
    assert caption_loss(x.bfloat16(), tokens).dtype == torch.float32


def test_loss_starts_at_about_log_v_and_a_half(on_device):
    torch.manual_seed(5)
    model = Captioner(encoder(), LanguageModel(2000, 128, 2, 4, 60), "patches")
    tokens = torch.randint(1999, (32, 20))
    loss = caption_loss(model(torch.randn(32, 3, 16, 16), tokens), tokens)
    assert loss.item() == pytest.approx(torch.tensor(2000.0).log().item() + 0.5, abs=0.15)


@pytest.mark.parametrize("prefix", ["pooled", "patches"])
def test_micro_batches_give_the_gradient_of_the_batch(batch, prefix):
    model = captioner(prefix).double()
    images, tokens, questions = batch[0].double(), *batch[1:]
    logits = model(images, tokens, questions).double()
    caption_loss(logits, tokens).backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    for some in (slice(0, 2), slice(2, 4)):  # of different lengths, each padded on its own
        rows = [[row[row >= 0].tolist() for row in x[some]] for x in (tokens, questions)]
        answers, asked = map(padded, rows)
        (caption_loss(model(images[some], answers, asked), answers) / 2).backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(p.grad, whole[name], rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------------------------
# Zero-shot by likelihood.


@torch.no_grad()
def test_a_text_has_the_probability_of_its_tokens_one_after_the_other(batch):
    model = captioner().double().eval()
    images, tokens = batch[0].double(), batch[1]
    found = likelihood.likelihoods(model, images, tokens)
    assert found.shape == (4, 4)
    for i, image in enumerate(images):
        for j, row in enumerate(tokens.tolist()):
            ids, total = [V - 1], 0.0
            for token in [*(t for t in row if t >= 0), V - 1]:
                x = model.language_model(torch.tensor([ids]), model.project(image[None]))
                total += x[0, -1].log_softmax(dim=0)[token]
                ids.append(token)
            assert found[i, j].item() == pytest.approx(total.item(), abs=1e-5)


def test_the_likeliest_class_is_measured(tmp_path, capsys):
    """On colours, of which a run of 40 steps has learned the names."""
    for i in range(24):
        place = tmp_path / "data" / list(COLOURS)[i % 3]
        place.mkdir(parents=True, exist_ok=True)
        picture(i).save(place / f"{i:03d}.png")
        (place / f"{i:03d}.txt").write_text(f"a {place.name} picture")
    data, run = str(tmp_path / "data"), tmp_path / "run"
    flags = ["--objective", "cap", "--samples", "320", "--lr", "3e-3", "--workers", "0"]
    train.main(train_flags(data, run, *flags))
    task = ["likelihood", str(run), "--data", data, "--workers", "0", "--prompt", "a {} picture"]
    evaluation.main(task)
    *_, row = evaluation.read_jsonl(run / "eval.jsonl")
    assert (row["task"], row["images"], row["classes"]) == ("likelihood", 24, 3)
    assert row["top1"] > 0.9 and "likelihood" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------
# CIDEr.


def peer(hypotheses, references):
    scorer = CiderScorer()
    for hypothesis, texts in zip(hypotheses, references, strict=True):
        scorer += (hypothesis, texts)
    return scorer.compute_score()[0]


def test_cider_is_that_of_coco_caption():
    rng = random.Random(0)
    words = [*"abcdefgh", "red", "ball", "don't", "well-known", "7"]

    def text(most):
        # Few words, so that n-grams repeat and texts share them.
        return " ".join(rng.choices(words[: rng.randint(1, len(words))], k=rng.randint(0, most)))

    for case in range(300):
        n = rng.choice([1, 2, 3, 10])
        references = [[text(12) for _ in range(rng.randint(1, 4))] for _ in range(n)]
        hypotheses = [rng.choice(rng.choice(references)) for _ in range(n)]
        hypotheses = [h if rng.random() < 0.5 else text(15) for h in hypotheses]
        if not any(map(any, references)):
            continue  # coco-caption stops where no reference has a word
        score = cider(hypotheses, references)
        assert score == pytest.approx(peer(hypotheses, references), abs=1e-6), case
        assert n > 1 or score == 0


def test_cider_of_edge_cases():
    two = [["a red ball on the left"], ["the small blue star"]]
    assert cider(["a red ball on the left", "the small blue star"], two) == pytest.approx(10)
    assert cider(["", ""], two) == 0
    assert cider(["A RED ball, on the left!", "the small (blue) star."], two) == pytest.approx(10)
    repeated = ["red red red red red red", "the small blue star"]
    assert cider(repeated, two) == pytest.approx(peer(repeated, two), abs=1e-6)
    assert cider(["a ball"], [["a ball", "a ball"]]) == 0  # a single image
