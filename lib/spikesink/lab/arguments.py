"""What `python -m spikesink.lab` can be asked for; light, so that help and errors need not wait for torch."""

import argparse
import os
from pathlib import Path

from spikesink.cli import Parser, a_folder, at_least
from spikesink.lab.config import CHARACTERS, KEPT_EVERY, SOURCE
from spikesink.lab.families import BASES


def parser() -> argparse.ArgumentParser:
    """What reads the command's arguments."""
    made = Parser(
        prog="python -m spikesink.lab",
        description="Train what is missing of a tier, several runs at once, or under torchrun one after the other.",
    )
    made.add_argument("--tier", choices=tuple(BASES), default="task", help="which runs (default: %(default)s)")
    made.add_argument("--only", default="", metavar="NAME", help="only runs with this in their name")
    made.add_argument(
        "--text",
        default=SOURCE,
        help="what the text tiers train on: packages (the Python source of what is installed, the default), house, "
        "pydoc, a file or datasets:NAME",
    )
    made.add_argument(
        "--characters", type=at_least(1), default=CHARACTERS, help="of that text, the most (default: %(default)s)"
    )
    made.add_argument("--figures", type=a_folder, default=Path("figures"), help="records go to FIGURES/lab")
    made.add_argument("--build", type=a_folder, default=Path("build"), help="checkpoints go to BUILD/lab")
    made.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count() or 1, help="runs at once (default: %(default)s)"
    )
    made.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    made.add_argument(
        "--precision", choices=("bfloat16", "float32"), help="of products (default: float32; on a GPU bfloat16)"
    )
    made.add_argument(
        "--checkpoint-every", type=_seconds, default=KEPT_EVERY, metavar="SECONDS", help="default: %(default)s"
    )
    made.add_argument("--eager", action="store_true", help="do not compile (a compiler is needed for that)")
    return made


def _seconds(given: str) -> float:
    try:
        found = float(given)
    except ValueError:
        found = -1.0
    if not 0 <= found < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is no number of seconds of at least 0")
    return found
