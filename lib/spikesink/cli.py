"""TODO."""

import argparse
import contextlib
import tempfile
from pathlib import Path

from spikesink.model.names import local, slug

INTERRUPTED = 130


def check_writable(folder: Path, keep: bool = True) -> None:
    """Make a folder, if need be, and raise NotebookError unless something can be written there.

    If it is not to be kept, what was made is gone again afterwards.
    """
    made = [] if keep else [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_file():
        raise NotebookError(f"{folder} is a file; give a folder for what is written.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise NotebookError(
            f"the folder {folder} cannot be written ({error.strerror or error}); make it writable, or give another."
        ) from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without two paragraphs of usage before it."""

    def error(self, message: str):
        """Say it, and where help is, and leave."""
        self.exit(2, f"{message} (see --help)\n")


def model_names(given: str) -> list[str]:
    """The models that are asked for: one, or several with commas between them; a path may have commas of its own."""
    parts = [given] if local(given) else [part.strip() for part in given.split(",")]
    models = list(dict.fromkeys(_absolute(part) for part in parts if part))
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


def a_folder(given: str) -> Path:
    """The folder that an argument names, or an error of it: an empty name would be the folder one stands in."""
    if not given.strip():
        raise argparse.ArgumentTypeError("an empty name is no folder")
    return Path(given)


def at_least(least: int):
    """What makes a whole number of at least `least` of an argument, or an error of it."""

    def whole_number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole_number


class NotebookError(RuntimeError):
    """A notebook that raised, or could not be started; the message says what, and in which cell and where to look."""


def _absolute(value: str) -> str:
    """A path as seen from the notebooks' folder; a name stays what it is."""
    path = local(value)
    return value if path is None else str(path.resolve())
