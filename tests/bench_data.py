"""Images a second on one core, from 512 px JPEGs to 224 px, against torchvision's usual pipeline.

python -m tests.bench_data       about half a minute; both in turn, in one process, on one thread
"""

import io
import statistics
import time

import numpy as np
import torch
from PIL import Image
from torchvision import transforms

from data import MEAN, STD, Augment, Prepare, Raw


def photograph(i: int, side: int = 512) -> bytes:
    """A JPEG with detail at all scales, as a photograph has: noise whose amplitude falls as 1/f."""
    rng = np.random.default_rng(i)
    fy, fx = np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None]
    amplitude = 1 / np.maximum(np.hypot(fy, fx), 1 / side)
    channels = []
    for _ in range(3):
        spectrum = amplitude * np.exp(2j * np.pi * rng.random(amplitude.shape))
        noise = np.fft.irfft2(spectrum, s=(side, side))
        channels.append((128 + 50 * noise / noise.std()).clip(0, 255).astype(np.uint8))
    luma, *chroma = channels
    mixed = [(0.8 * luma + 0.2 * c).astype(np.uint8) for c in (luma, *chroma)]
    buffer = io.BytesIO()
    Image.fromarray(np.stack(mixed, axis=-1)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def main(images: int = 64, rounds: int = 5):
    torch.set_num_threads(1)
    files = [photograph(i) for i in range(images)]
    usual = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, (0.9, 1.0), interpolation=Image.Resampling.BICUBIC),
            transforms.ToTensor(),
            transforms.Normalize(MEAN, STD),
        ]
    )
    prepare, view = Prepare(Augment(224)), Augment(224)

    def ours():
        for i, file in enumerate(files):
            prepare(Raw(file, None), (i,))

    def theirs():
        for file in files:
            usual(Image.open(io.BytesIO(file)).convert("RGB"))

    def seconds(function):
        start = time.perf_counter()
        function()
        return time.perf_counter() - start

    seconds(ours), seconds(theirs)
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(rounds)]
    for name, column in (("ours", 0), ("usual", 1)):
        speed = images / statistics.median(pair[column] for pair in pairs)
        print(f"{name:<6} {speed:7.0f} images a second and core")
    ratio = statistics.median(theirs / ours for ours, theirs in pairs)
    print(f"ratio  {ratio:7.2f} (median over rounds)")

    differences = []
    for i, file in enumerate(files):  # the same crops, decoded at full size
        torch.manual_seed(i)
        fast = np.asarray(view(Image.open(io.BytesIO(file))), dtype=int)
        torch.manual_seed(i)
        full = np.asarray(view(Image.open(io.BytesIO(file)).convert("RGB")), dtype=int)
        differences.append(np.abs(fast - full).mean())
    size = len(files[0]) // 1000
    print(f"mean absolute difference {statistics.mean(differences):.2f} of 255 ({size} kB a file)")


if __name__ == "__main__":
    main()
