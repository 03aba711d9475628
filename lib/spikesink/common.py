"""What every part uses and nothing of it needs torch: what is not applicable, files, short numbers, progress."""

import contextlib
import math
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm


class NotApplicable(Exception):  # noqa: N818 (an answer, not an error: "n/a" in the ledger)
    """Why something cannot be asked of this model. Measures raise it; to who calls a measure it is a value."""

    @property
    def reason(self) -> str:
        """Why, in a few words."""
        return self.args[0]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, NotApplicable) and self.reason == other.reason

    def __hash__(self) -> int:
        return hash(self.reason)

    def __getattr__(self, name: str) -> "NotApplicable":
        """What a measure that does not apply would hold does not apply either."""
        if name.startswith("_"):
            raise AttributeError(name)
        return self


_inside: ContextVar[bool] = ContextVar("inside a measure", default=False)


def measure(function):
    """Turn a raised NotApplicable into the value that the outermost measure returns; pass on one that is given."""

    @wraps(function)
    def measured(*args, **options):
        nested = _inside.get()
        token = _inside.set(True)
        try:
            for value in (*args, *options.values()):
                if isinstance(value, NotApplicable):
                    raise value
            return function(*args, **options)
        except NotApplicable as why:
            if nested:
                raise
            return why.with_traceback(None)
        finally:
            _inside.reset(token)

    return measured


class CommandError(RuntimeError):
    """What cannot be done as it was asked for; the message is a sentence that says why and what would do."""


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it came of, the last cause last."""
    found = [error]
    while (cause := found[-1].__cause__ or found[-1].__context__) is not None:
        found.append(cause)
    return found


def was_interrupted(error: BaseException) -> bool:
    """Whether an error is Ctrl-C, or what some library made of it."""
    return any(isinstance(cause, KeyboardInterrupt) for cause in causes(error))


def in_a_sentence(error: Exception) -> str:
    """What an error says where other models are to follow: its own sentence, or its kind and its first line."""
    if was_interrupted(error):
        raise KeyboardInterrupt from None
    if isinstance(error, CommandError | ValueError | FloatingPointError | OSError):
        return str(error)
    return f"{type(error).__name__}: {first_line(error)}."


def first_line(error: BaseException) -> str:
    """What an error says, in one line without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")[:160]


def check_writable(folder: Path, keep: bool = True) -> None:
    """Raise CommandError unless something can be written in a folder, which is made (and stays, if it is to `keep`)."""
    made = [] if keep else [path for path in (folder, *folder.parents) if not path.exists()]
    if folder.is_file():
        raise CommandError(f"{folder} is a file; give a folder for what is written.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CommandError(
            f"the folder {folder} cannot be written ({error.strerror or error}); make it writable, or give another."
        ) from None
    finally:
        for path in made:
            with contextlib.suppress(OSError):
                path.rmdir()


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there; what the system says against writing to it, as one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be written ({error.strerror or error}); make room there, or give another "
            "place for figures."
        ) from None


def mean_of(values: Sequence[float]) -> str:
    """A mean as a table shows it, with the least and the most where there are several; nothing of none."""
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{ends}" if values else ""


def brief(value: Any) -> str:
    """A measured value in few characters: three significant digits (a fourth differs between processors), no e+03."""
    if isinstance(value, list | tuple):
        return ", ".join(f"({brief(v)})" if isinstance(v, list | tuple) else brief(v) for v in value) or "none"
    if isinstance(value, float):
        short = f"{value:.3g}"
        return f"{float(short):,.0f}" if 1000 <= abs(float(short)) < math.inf else short
    return str(value)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that whoever looks sees the old one or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as scratch:
        try:
            scratch.write(data)
            scratch.close()
            os.chmod(scratch.name, 0o644)
            os.replace(scratch.name, path)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise


def escape(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown, of cells in which `escape` was used."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *rows))


Item = TypeVar("Item")


def progress(items: Collection[Item], label: str, unit: str, done: int = 0) -> Iterable[Item]:
    """Go through `items`, after `done` others, under a bar that appears after two seconds (TQDM_DISABLE: none)."""
    # tqdm's notebook bar does not read TQDM_DISABLE of its own accord.
    disable = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    total = done + len(items) if done else None
    return tqdm(items, label, total, initial=done, unit=unit, leave=False, delay=2, disable=disable)
