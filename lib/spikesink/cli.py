"""What `spikesink` can be asked for, without torch: help and wrong arguments need not wait for it."""

import argparse
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from spikesink.common import check_writable, write_atomically
from spikesink.model.names import DEFAULT_MODEL, ENTRIES, cache_directory, local, slug

# What the lab trains by default, here so that its parser imports nothing of it.
TIERS = ("task", "text", "large")
SOURCE = "packages"  # the text: Python source of the packages that spikesink is made with
CHARACTERS = 120_000_000  # of it that are tokenized
KEPT_EVERY = 60.0  # seconds between checkpoints

MODEL = "a built-in name (smollm2-135m), .gguf file, directory or hub id"
SEVERAL = f"{MODEL}; several with commas between them"
TEXT = (
    "house (spikesink's own prose), pydoc (Python's documentation), a UTF-8 file (-: what is piped in) or datasets:NAME"
)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without two paragraphs of usage before it."""

    def error(self, message: str):
        """Say what is wrong and where help is, and leave."""
        self.exit(2, f"{message} (see --help)\n")


def open_console(stderr: bool = False) -> Console:
    """Where a command says what it does."""
    return Console(stderr=stderr, highlight=False, markup=False, soft_wrap=True)


def make_table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Table:
    """A table for the console."""
    shown = Table(*map(str, columns), box=box.SIMPLE_HEAD, pad_edge=False)
    shown.columns[0].no_wrap = True
    for row in rows:
        shown.add_row(*map(str, row))
    return shown


def parser() -> argparse.ArgumentParser:
    """What reads the command's arguments; the name of the command is in `command`."""
    made = Parser(prog="spikesink", description="Where a model's spike and sinks are, and what that means.")
    commands = made.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for add in (_report, _census, _probe, _scan, _figures, _lab, _bench):
        add(commands)
    return made


def _report(commands) -> None:
    command = commands.add_parser(
        "report",
        aliases=["diagnose"],
        help="spike, sinks, and which ways of serving fail because of either",
        description="Measure a model on a text and write report.html (one page that opens offline) and report.json. "
        "Takes minutes on a small model; what is finished is written as it goes.",
    )
    command.add_argument("model", help=MODEL)
    command.add_argument("--out", type=a_folder, help="folder for the report (default: reports/<model>)")
    command.add_argument("--long", action="store_true", help="also run one text as far as context and minutes go")
    _add_measuring(command, least_windows=4, least_tokens=16)


def _census(commands) -> None:
    command = commands.add_parser(
        "census",
        help="which channels each FFN can amplify, from the weights alone",
        description="The gain of every channel of every FFN: how much a gated block, as a quadratic form, can make "
        "of a token in that channel (||U_k||_F, notebook 04). No text is run.",
    )
    command.add_argument("model", help=MODEL)
    command.add_argument("--top", type=at_least(1), default=10, help="how many to show (default: %(default)s)")


def _probe(commands) -> None:
    command = commands.add_parser(
        "probe",
        help="whether tokens spike when they stand first, from the weights alone",
        description="Send entries of the vocabulary, evenly spread, through the model as first tokens, layer by layer.",
    )
    command.add_argument("model", help=MODEL)
    _add_entries(command)


def _scan(commands) -> None:
    command = commands.add_parser(
        "scan",
        help="probe and census of a model larger than memory, planned first",
        description="Say what a scan takes, then read a model's weights layer by layer: which channel spikes when "
        "a token stands first, which blocks write it, which channels each FFN can amplify.",
    )
    command.add_argument("models", type=model_names, metavar="model", help=SEVERAL)
    _add_entries(command)
    command.add_argument("--plan", action="store_true", help="only say what it takes, from the configuration alone")
    _add_folders(command)


def _figures(commands) -> None:
    command = commands.add_parser(
        "figures",
        help="run the notebooks: pictures and claims, in FIGURES/<model>",
        description="Run every notebook that is not up to date, for one model or several in turn.",
    )
    command.add_argument("--model", type=model_names, default=DEFAULT_MODEL, dest="models", help=SEVERAL)
    _add_measuring(command, least_windows=1, least_tokens=2)
    command.add_argument("--jobs", type=at_least(1), default=1, help="notebooks at a time (default: %(default)s)")
    command.add_argument("--notebooks", type=a_folder, default=Path("notebooks"), help="their folder")
    command.add_argument("--store", action="store_true", help="run as the notebooks are, keep outputs in them")
    _add_folders(command)


def _lab(commands) -> None:
    command = commands.add_parser(
        "lab",
        help="train small models that differ in one choice each",
        description="Train what is missing of a tier, several runs at once, or under torchrun one after the other.",
    )
    command.add_argument("--tier", choices=TIERS, default=TIERS[0], help="which runs (default: %(default)s)")
    command.add_argument("--only", default="", metavar="NAME", help="only runs with this in their name")
    command.add_argument("--text", type=a_text, default=SOURCE, help=f"for the text tiers: {SOURCE} (default), {TEXT}")
    command.add_argument(
        "--characters", type=at_least(1), default=CHARACTERS, help="of that text, the most (default: %(default)s)"
    )
    command.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count() or 1, help="runs at once (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    command.add_argument(
        "--precision", choices=("bfloat16", "float32"), help="of products (default: float32; on a GPU bfloat16)"
    )
    command.add_argument(
        "--checkpoint-every", type=_seconds, default=KEPT_EVERY, metavar="SECONDS", help="default: %(default)s"
    )
    command.add_argument("--eager", action="store_true", help="do not compile (a compiler is needed for that)")
    _add_folders(command)


def _bench(commands) -> None:
    command = commands.add_parser(
        "bench",
        help="how fast the heavier measures are beside the obvious way to the same answer",
        description="Time both ways to the same answer within one run, and show the ratios.",
    )
    command.add_argument("--model", default=DEFAULT_MODEL, help=f"{MODEL} (default: %(default)s)")
    command.add_argument("--readme", type=a_folder, help="put the table of the default model there")
    _add_folders(command)


def _add_entries(command: argparse.ArgumentParser) -> None:
    command.add_argument("--entries", type=at_least(1), default=ENTRIES, help="how many (default: %(default)s)")


def _add_folders(command: argparse.ArgumentParser) -> None:
    command.add_argument("--figures", type=a_folder, default=Path("figures"), help="results (default: %(default)s)")
    command.add_argument("--build", type=a_folder, default=Path("build"), help="what is kept (default: %(default)s)")


def _add_measuring(command: argparse.ArgumentParser, least_windows: int, least_tokens: int) -> None:
    command.add_argument("--text", type=a_text, default="house", help=f"{TEXT} (default: %(default)s)")
    command.add_argument("--n-prompts", type=at_least(least_windows), default=16, help="windows (default: %(default)s)")
    command.add_argument(
        "--seq-len", type=at_least(least_tokens), default=256, help="tokens in a window (default: %(default)s)"
    )
    command.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, auto or disk (default: %(default)s)")
    command.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    command.add_argument("--seed", type=at_least(0), default=0, help="of what is drawn (default: %(default)s)")


def model_names(given: str) -> list[str]:
    """The models that are asked for: one, or several with commas between them; a path may have commas of its own."""
    parts = [given] if local(given) else [part.strip() for part in given.split(",")]
    models = list(dict.fromkeys(absolute(part) for part in parts if part))
    folders: dict[str, str] = {}
    for model in models:
        other = folders.setdefault(slug(model), model)
        if other != model:
            raise argparse.ArgumentTypeError(
                f"{other!r} and {model!r} would share the folder {slug(model)}; give one of them another name"
            )
    if not models:
        raise argparse.ArgumentTypeError(f"{given!r} names no model")
    return models


def absolute(value: str) -> str:
    """A path as seen from any folder; a name stays what it is."""
    path = local(value)
    return value if path is None else str(path.resolve())


def a_folder(given: str) -> Path:
    """The folder that an argument names; an empty name would be the folder one stands in."""
    if not given.strip():
        raise argparse.ArgumentTypeError("an empty name is no folder")
    return Path(os.path.expanduser(given))


def a_text(given: str) -> str:
    """The text that an argument names; what is piped in can be read once only, so it is kept in the cache as a file."""
    path = Path("/dev/stdin") if given == "-" else local(given)
    if path is None or path.is_file() or path.is_dir():
        return given
    content = path.read_bytes()
    file = cache_directory() / "texts" / f"{hashlib.sha256(content).hexdigest()[:20]}.txt"
    check_writable(file.parent)
    write_atomically(file, content)
    return str(file)


def at_least(least: int):
    """The type of an argument that is a whole number of at least `least`."""

    def whole_number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole_number


def _seconds(given: str) -> float:
    try:
        seconds = float(given)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{given!r} is no number of seconds of at least 0")
    return seconds
