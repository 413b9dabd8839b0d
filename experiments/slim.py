"""A copy of a finished run with what evaluation and drawing need, in half precision.

    python experiments/slim.py runs/icons runs/slim

The copy cannot be resumed, because the optimizer's state is left out, nor has it an encoder.pt
beside the checkpoint; a sixth remains. Paths in its config.json are as seen from where this is
run.
"""

import argparse
import json
import shutil
from pathlib import Path

from common import finished

from data import UserError
from eval import fingerprint, publish, read_checkpoint
from plugins import PATHS


def main():
    parser = argparse.ArgumentParser(description="Copy a run without what only training needs.")
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if args.out.exists():
        parser.error(f"{args.out} exists: name a new folder")
    try:
        config, _ = finished(args.run)
        state = read_checkpoint(config)
    except UserError as error:
        parser.error(str(error))
    flags = portable({key: value for key, value in vars(config).items() if key != "out"})
    kept = {"idf": state["idf"], "progress": state["progress"]}
    kept["fingerprint"] = fingerprint(argparse.Namespace(**flags, out=args.run))
    args.out.mkdir(parents=True)
    publish(json.dumps(flags, indent=2) + "\n", args.out / "config.json")
    kept["model"] = {name: value.half() for name, value in state["model"].items()}
    publish(kept, args.out / "checkpoint.pt")
    for name in ("tokenizer.tiktoken", "metrics.jsonl", "eval.jsonl"):
        if (args.run / name).exists():  # a run without --val-data has no scores
            shutil.copy(args.run / name, args.out / name)


def portable(flags: dict) -> dict:
    """A run's flags with paths that start where this is run, so that no machine's go with it."""
    here = f"{Path.cwd()}/"
    return flags | {key: flags[key].replace(here, "") for key in PATHS if flags.get(key)}


if __name__ == "__main__":
    main()
