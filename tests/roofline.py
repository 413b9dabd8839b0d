"""What a training step of B/16 must cost on an H100, counted from shapes: FLOP, bytes, time.

python -m tests.roofline [MICRO_BATCH]

Everything is counted in passes: one reading or writing of a bf16 tensor [B, N, D]. An operation
takes as long as its FLOP or its bytes need, whichever is longer, and nothing runs beside it.
"""

import sys

PEAK, ATTENTION, MEMORY = 801e12, 250e12, 3.35e12  # FLOP/s of products (measured), assumed; bytes/s
MODES = ("eager, float32 stream", "compiled, float32 stream", "eager", "compiled")
# Matrix products of a block: inputs x outputs in D^2, and passes forward and backward. The backward
# pass makes two products of the same size, for the input and for the weights.
PRODUCTS = {"qkv": (3, 4, 8), "proj": (1, 2, 4), "fc1": (4, 5, 10), "fc2": (4, 5, 10)}
# All else in a block, in passes forward and backward for each mode. A float32 stream takes two
# passes where bf16 takes one; before, norms also copied to float32 and back. Compiled, a norm and
# the sum before it are one kernel, and so are the gradients of q, k and v put together.
PASSES = {
    "attention": [(4, 10)] * 4,
    "2 norms": [(14, 26), (12, 22), (4, 10), (8, 12)],
    "2 residual sums": [(10, 18), (0, 0), (6, 6), (0, 0)],
    "GELU": [(8, 12)] * 4,
    "gradients of biases": [(0, 9)] * 4,
    "gradients of q, k, v as one": [(0, 12), (0, 6), (0, 12), (0, 6)],
}


def block_flops(B: int, N: int, D: int) -> dict[str, tuple[int, int]]:
    """FLOP forward and backward of what multiplies; what attention computes twice counts once."""
    products = {name: 2 * size * D * D * B * N for name, (size, *_) in PRODUCTS.items()}
    return {name: (n, 2 * n) for name, n in (products | {"attention": 4 * B * N * N * D}).items()}


def rest_flops(B: int, N: int, D: int, V: int, P: int) -> dict[str, tuple[int, int]]:
    """FLOP forward and backward outside the blocks. Images need no gradient."""
    patches, head = 2 * B * N * 3 * P * P * D, 2 * B * D * V
    return {"patches": (patches, patches), "head": (head, 2 * head)}


def block(B: int, N: int, D: int, mode: int) -> dict[str, tuple[float, float, float]]:
    """Each operation's FLOP, bytes and seconds, forward and backward together."""
    one, flops, rows = 2 * B * N * D, block_flops(B, N, D), {}
    for name in (*PRODUCTS, *PASSES):
        passes = PRODUCTS[name][1:] if name in PRODUCTS else PASSES[name][mode]
        both = zip(flops.get(name, (0, 0)), (n * one for n in passes), strict=True)
        rate = ATTENTION if name == "attention" else PEAK
        seconds = sum(max(flop / rate, size / MEMORY) for flop, size in both)
        rows[name] = sum(flops.get(name, (0, 0))), sum(passes) * one, seconds
    return rows


def rest(B: int, N: int, D: int, V: int, P: int, depth: int, mode: int) -> tuple[float, float]:
    """Bytes and seconds of what is not in a block."""
    one, pixels, compiled = 2 * B * N * D, 3 * P * P * N * B, mode % 2 == 1
    parameters = depth * 12 * D * D + D * V
    size = pixels * (3 if compiled else 35) + one * 20  # normalised, cut, embedded; last norm, mean
    size += 70 * B * V  # the loss, whose gradient is made in float32
    size += parameters * (12 + 12 + 28)  # casts of weights and gradients; clipping; AdamW
    return size, size / MEMORY + sum(map(sum, rest_flops(B, N, D, V, P).values())) / PEAK


def main():
    B, N, D, V, P, depth = int((sys.argv[1:] or [256])[0]), 196, 768, 49_408, 16, 12
    blocks = [block(B, N, D, mode) for mode in range(4)]
    print(f"B/16 at 224 px, micro-batch {B}: one block, forward and backward\n")
    print("| operation | GFLOP |", " | ".join(f"GB, {mode}" for mode in MODES), end=" |\n")
    print("|---" * 6, end="|\n")
    for name in blocks[0]:
        sizes = " | ".join(f"{rows[name][1] / 1e9:.2f}" for rows in blocks)
        print(f"| {name} | {blocks[0][name][0] / 1e9:.0f} | {sizes} |")
    others = [rest(B, N, D, V, P, depth, mode) for mode in range(4)]
    lines = {
        "a block, ms": [1e3 * sum(s for *_, s in rows.values()) for rows in blocks],
        f"{depth} blocks, GB": [
            depth * sum(b for _, b, _ in rows.values()) / 1e9 for rows in blocks
        ],
        "all else in a step, GB": [size / 1e9 for size, _ in others],
        "all else in a step, ms": [1e3 * s for _, s in others],
    }
    steps = zip(lines["a block, ms"], lines["all else in a step, ms"], strict=True)
    lines["**a step, ms**"] = [depth * block + other for block, other in steps]
    lines["images a second, at most"] = [1e3 * B / step for step in lines["**a step, ms**"]]
    for name, values in lines.items():
        print(
            f"| {name} | |",
            " | ".join(f"{x:,.{0 if x > 1000 else 1}f}" for x in values),
            end=" |\n",
        )


if __name__ == "__main__":
    main()
