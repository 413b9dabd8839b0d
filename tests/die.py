"""Run train.py in processes of their own, and end one of them at the n-th call of a function.

`launch` forks the processes from one that has imported everything, which takes a tenth of a second
where a new Python takes several. The same under torchrun, here to kill rank 1 at its 5th step:

    torchrun --nproc_per_node=2 -m tests.die 1 SIGKILL optimizer 5 --data ...
"""

import multiprocessing
import os
import signal
import socket
import sys
import traceback
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

import train

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.die"])
PLACES = {  # what is counted: the function's owner and name
    "optimizer": (torch.optim.AdamW, "step"),
    "batch": (train, "normalize"),
    "checkpoint.pt": (os, "replace"),  # only the renaming of this file,
    "encoder.pt": (os, "replace"),  # or of that
}


def at_call(function, n: int, act, counts=lambda *_: True):
    """The function, which acts before the n-th of those calls that count."""
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += counts(*args)
        if calls == n and counts(*args):
            act()
        return function(*args, **kwargs)

    return counted


def die(number: str, place: str, n: int):
    """Send this process the signal of that name at the n-th call of what `place` counts."""
    owner, name = PLACES[place]
    counts = (lambda _, path: path.name == place) if name == "replace" else None
    act = lambda: os.kill(os.getpid(), getattr(signal, number))  # noqa: E731
    counted = at_call(getattr(owner, name), n, act, *[counts] * bool(counts))
    setattr(owner, name, counted)


class Ended(NamedTuple):
    """The processes' exit codes, minus the signal's number where one killed, and all they said."""

    codes: list[int]
    said: str


def launch(flags: list, world: int = 1, death: tuple | None = None) -> Ended:
    """Run train.py in so many processes; `death` has a rank and the arguments of `die`."""
    log = Path(flags[flags.index("--out") + 1]).with_suffix(".log")
    log.unlink(missing_ok=True)
    processes = start(flags, log, world, death)
    for process in processes:
        process.join(120)
        process.kill()  # does nothing if it has ended
        process.join()
    return Ended([process.exitcode for process in processes], log.read_text())


def start(flags: list, log: Path, world: int = 1, death: tuple | None = None) -> list[BaseProcess]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags, processes = [str(flag) for flag in flags], []
    for rank in range(world):
        mine = death[1:] if death and death[0] == rank else None
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        env = {key: str(value) for key, value in env.items()} | {"MASTER_ADDR": "127.0.0.1"}
        method = multiprocessing.get_start_method()  # for its loaders; else they fork as it did
        args = flags, str(log), env if world > 1 else {}, mine, method
        processes.append(SERVER.Process(target=child, args=args))
        processes[-1].start()
    return processes


def child(flags: list[str], log: str, env: dict[str, str], death: tuple | None, method: str):
    os.environ.update(env)
    if hasattr(signal, "SIGHUP"):
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # else tests would fail under nohup
    multiprocessing.set_start_method(method, force=True)
    torch.set_num_threads(1)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    code = 0
    try:
        if death:
            die(*death)
        train.main(flags)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
        code = 1
    for loader in multiprocessing.active_children():
        loader.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    rank, number, place, n = sys.argv[1:5]
    if os.environ.get("RANK", "0") == rank:
        die(number, place, int(n))
    train.main(sys.argv[5:])
