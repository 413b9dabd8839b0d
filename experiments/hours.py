"""Hours of a run and the dial's learning rate, calculated: the tables of docs/reproduce.md."""

WIDTH, DEPTH = {"XS": 128, "Ti": 192, "S": 384, "B": 768, "L": 1024}, {"XS": 4, "L": 24}
REACHED = {  # by B/16: FLOP/s; cores. The first two are measured, the rest 30 % of a data sheet
    "H200, `--compile`": (3790 * 104.8e9, 16),
    "H200": (3087 * 104.8e9, 16),
    "24 GB (A10)": (0.3 * 125e12, 8),
    "free T4": (0.3 * 65e12, 2),
}
BUSY = {"S": 0.74, "L": 1.11}  # against B, by tests/roofline.py
# JPEGs of 256 px and 39 kB, a second and core, while all 16 of an H200's machine load for S/16:
DECODED = 172  # measured by tests/bench_recipe.py
RUNS = {"CC3M": 116e6, "CC12M": 385e6, "DataComp small": 12.8e6, "COCO": 12e6}  # images seen


def flops(model: str, image_size: int = 224, V: int = 49_408) -> float:
    """FLOP of an image, forward and backward, which the images themselves do not need."""
    size, patch = model.split("/")
    D, P, N = WIDTH[size], int(patch), (image_size // int(patch)) ** 2
    blocks = DEPTH.get(size, 12) * (24 * N * D * D + 4 * N * N * D)
    return 3 * (blocks + 2 * D * V) + 2 * (2 * N * 3 * P * P * D)


def stepped(model: str, card: str) -> float:
    """Images a second of the card's steps, without data."""
    return REACHED[card][0] * BUSY.get(model.split("/")[0], 1) / flops(model)


def images_per_s(model: str, card: str) -> float:
    """Of the card's steps, or of its cores' loaders, if they are slower."""
    return min(stepped(model, card), REACHED[card][1] * DECODED)


def hours(samples: float, rate: float) -> float:
    return samples / rate / 3600


def peak_rate(model: str, batch_size: int) -> float:
    return 1e-3 * (batch_size / 16_384) ** 0.5 * WIDTH["B"] / WIDTH[model.split("/")[0]]


if __name__ == "__main__":
    for model, card in ((model, card) for model in ("S/16", "B/16", "L/16") for card in REACHED):
        rate = images_per_s(model, card)
        print(model, card, f"{rate:,.0f}", *(f"{hours(n, rate):.1f}" for n in RUNS.values()))
