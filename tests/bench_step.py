"""A training step, part by part: SuperClass with small and large vocabularies against CLIP.

python -m tests.bench_step                                     the toy size, about a minute
python -m tests.bench_step --model B/16 --image-size 224 --batch-size 16 --repeats 5

Encoder, data and optimizer are the same; captions are random ids, 16 each. CLIP's text tower is
ours, which reads as many tokens as the longest caption of the batch has, and OpenCLIP's, which
always reads 77; the latter comes with OpenCLIP's own encoder of the same size. Times are medians
over rounds in which the kinds take turns; memory is the peak of a process that makes steps of one
kind, beyond what it held before the model was built.
"""

import argparse
import itertools
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from plugins.contrastive import CLIP, TEXT_SIZES, build_text_tower, contrastive_loss
from superclass import IDF, SIZES, SuperClass, build_encoder, superclass_loss

K = 16
KINDS = {"SuperClass, V 512": 512, "SuperClass, V 49,408": 49_408}
KINDS |= {"CLIP, V 49,408": 49_408, "OpenCLIP, V 49,408": 49_408}


class Step:
    """A model with its optimizer; calling it makes one step and returns the seconds by part."""

    def __init__(self, kind: str, args: argparse.Namespace):
        torch.manual_seed(0)
        self.kind, V = kind.split(",")[0], KINDS.get(kind, 49_408)
        if self.kind == "OpenCLIP":
            self.model = open_clip_model(args.model, args.image_size)
        elif self.kind == "timm":
            self.model = timm_model(args.model, args.image_size, V)
        else:
            encoder = build_encoder(args.model, args.image_size)
            text = build_text_tower(args.model, V) if self.kind == "CLIP" else None
            self.model = CLIP(encoder, text) if text else SuperClass(encoder, V)
        flags = train.make_parser().parse_args([])
        self.optimizer = train.make_optimizer(self.model, flags, lambda *_: None)
        self.idf = IDF(V)
        self.images = torch.randn(args.batch_size, 3, args.image_size, args.image_size)
        blocks = torch.randint(V // K, (args.batch_size, K))
        self.labels = blocks * K + torch.arange(K)  # each id of a caption once

    def __call__(self) -> dict[str, float]:
        clock = [time.perf_counter()]
        self.idf.update(self.labels)
        if self.kind == "OpenCLIP":
            features = self.model.encode_image(self.images, normalize=True)
        else:
            features = self.model.features(self.images)
        clock.append(time.perf_counter())
        if self.kind == "SuperClass":
            logits = self.model.head(self.model.norm(features))
            clock.append(time.perf_counter())
            loss = superclass_loss(logits, self.labels, self.idf.weights())
        elif self.kind == "CLIP":
            images, texts = self.model.embed_images(features), self.model.embed_texts(self.labels)
            clock.append(time.perf_counter())
            loss = contrastive_loss(images, texts, self.model.log_scale.exp())
        else:
            context = F.pad(self.labels, (0, self.model.context_length - K))
            texts = self.model.encode_text(context, normalize=True)
            clock.append(time.perf_counter())
            import open_clip

            loss = open_clip.ClipLoss()(features, texts, self.model.logit_scale.exp())
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        clock.append(time.perf_counter())
        parts = ("encoder", "head or text", "loss", "backward", "optimizer")
        seconds = [b - a for a, b in itertools.pairwise(clock)]
        return dict(zip(parts, seconds, strict=True)) | {"step": sum(seconds)}


def open_clip_model(model: str, image_size: int) -> torch.nn.Module:
    """OpenCLIP's CLIP with the widths, depths and heads that ours has."""
    import open_clip  # here, so that other benchmarks work where it is not installed

    size, patch = model.split("/")
    (width, depth, heads), text = SIZES[size], TEXT_SIZES[size]
    vision = {"image_size": image_size, "patch_size": int(patch), "width": width, "layers": depth}
    vision |= {"head_width": width // heads}
    text = dict(zip(("width", "layers", "heads"), text, strict=True))
    clip = open_clip.CLIP(text["width"], vision, text)
    clip.encoder = clip.visual  # where bench_gpu sets checkpointing
    return clip


def timm_model(model: str, image_size: int, classes: int) -> torch.nn.Module:
    """timm's plain classifier of that size, with its class token."""
    import timm

    size, patch = model.split("/")
    shape = dict(zip(("embed_dim", "depth", "num_heads"), SIZES[size], strict=True))
    shape |= {"img_size": image_size, "patch_size": int(patch), "num_classes": classes}
    vit = timm.models.VisionTransformer(**shape)
    vit.encoder = torch.nn.Identity()
    return vit


def peak_memory() -> int:
    """Megabytes at the process's highest, which Linux counts."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) // 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="XS/8")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--memory-of", choices=KINDS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        before = peak_memory()
        step = Step(args.memory_of, args)
        for _ in range(2):  # the second has the optimizer's moments
            step()
        return print(peak_memory() - before)
    memory = {}
    for kind in KINDS:
        command = [sys.executable, "-m", "tests.bench_step", *sys.argv[1:], "--memory-of", kind]
        memory[kind] = int(subprocess.check_output(command, text=True))
    steps = {kind: Step(kind, args) for kind in KINDS}
    rounds = [{kind: step() for kind, step in steps.items()} for _ in range(args.repeats + 1)][1:]
    columns = list(next(iter(rounds[0].values())))
    print(f"{args.model} at {args.image_size} px, {args.batch_size} images, K {K}; ms")
    print(f"{'':<21}{''.join(f'{column:>14}' for column in columns)}{'images/s':>10}{'MB':>7}")
    for kind in KINDS:
        middle = {c: statistics.median(r[kind][c] for r in rounds) for c in columns}
        line = "".join(f"{1000 * middle[column]:14.1f}" for column in columns)
        print(f"{kind:<21}{line}{args.batch_size / middle['step']:10.1f}{memory[kind]:7}")
    plain, large, clip, theirs = KINDS
    for kind, other in ((large, plain), (clip, large), (theirs, large)):
        ratio = statistics.median(r[kind]["step"] / r[other]["step"] for r in rounds)
        more = f"{memory[kind] / memory[other]:.2f} x the memory"
        print(f"{kind}: {ratio:.2f} x the time of {other} (median over rounds), {more}")


if __name__ == "__main__":
    main()
