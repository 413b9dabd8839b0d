"""Run train.py and do something to the process at the n-th call of one of its functions.

python -m tests.die SIGKILL optimizer 5 --data ...     before the 5th step of the optimizer
python -m tests.die SIGTERM rename 2 --data ...        before the 2nd file is renamed into its place
"""

import os
import signal
import sys

import torch

import train


def at_call(function, n: int, act):
    """The function, which acts before its n-th call."""
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == n:
            act()
        return function(*args, **kwargs)

    return counted


if __name__ == "__main__":
    what, where, n = sys.argv[1:4]
    number = getattr(signal, what)
    if os.environ.get("RANK", "0") == os.environ.get("DIE_ON_RANK", "0"):
        owner, name = {
            "optimizer": (torch.optim.AdamW, "step"),
            "rename": (os, "replace"),
            "batch": (train, "normalize"),
        }[where]
        act = lambda: os.kill(os.getpid(), number)  # noqa: E731
        setattr(owner, name, at_call(getattr(owner, name), int(n), act))
    train.main(sys.argv[4:])
