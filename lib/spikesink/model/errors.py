"""One sentence for whatever goes wrong while a model is loaded: what it was, and the way out."""

import contextlib
import logging
import re
from collections.abc import Iterator

from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers.utils import logging as transformers_logging

from spikesink.common import CommandError, causes, first_line, was_interrupted
from spikesink.model.names import BUILTINS, local


class LoadError(CommandError):
    """A model that cannot be loaded; the message is one sentence that names the cause and the way out."""


MISMATCHED = "its weights have other shapes than its config.json says; put two there that belong together"
# What is among the causes of an error, or in its text, and what is said of it; the first that fits counts.
_ADVICE: dict[type[Exception] | str, str] = {
    GatedRepoError: "access to it is restricted on the hub; ask for it there, then log in with: hf auth login",
    RepositoryNotFoundError: (
        "the hub has no such model, or it is private; check the spelling, or log in with: hf auth login"
    ),
    UnicodeEncodeError: "its path has letters that the locale cannot hold; set PYTHONUTF8=1, or move it",
    "architecture|model type": "its architecture is not supported ({line}); try a model of another family",
    "ignore_mismatched_sizes": MISMATCHED,
}
_UNREACHABLE = (
    f"it is no local path and not one of the built-in models ({', '.join(BUILTINS)}), and the hub could not be "
    "reached; go online or give a local model"
)
_UNREADABLE = "its layers are not built as those of the families that can be read ({line}); try one of another family"
_DAMAGED = "{part} is incomplete or damaged ({line}); get it again"


@contextlib.contextmanager
def explain_errors(spec: str, part: str = "it", unreadable: bool = False) -> Iterator[None]:
    """Turn what transformers and the hub raise into a LoadError about a model, or a part of it.

    `unreadable`: the model is whole, and it is its form that is not known.
    """
    try:
        yield
    except LoadError:
        raise
    except Exception as error:
        if was_interrupted(error):
            raise KeyboardInterrupt from None
        on_the_hub = local(spec) is None and spec not in BUILTINS
        advice = _UNREACHABLE if on_the_hub and isinstance(error, OSError) else _DAMAGED
        advice = _UNREADABLE if unreadable else advice
        for sign, words in _ADVICE.items():
            by_kind = isinstance(sign, type) and any(isinstance(cause, sign) for cause in causes(error))
            if by_kind or (isinstance(sign, str) and re.search(sign, str(error))):
                advice = words
                break
        raise LoadError(f"{spec} cannot be loaded: {advice.format(part=part, line=first_line(error))}.") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bar for what takes a second, and no advice of other libraries in between."""
    dispatch = logging.getLogger("accelerate.big_modeling")
    verbosity, level = transformers_logging.get_verbosity(), dispatch.level
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    dispatch.setLevel(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        dispatch.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
