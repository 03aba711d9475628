"""Text to measure on: the project's own prose by default, or pydoc's, a file's or a data set's."""

import hashlib
import os
from dataclasses import dataclass
from importlib.resources import files
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from spikesink.common import first_line
from spikesink.model.anatomy import Anatomy, Model, anatomy
from spikesink.model.load import Prepared

CHARACTERS_FROM_A_DATASET = 2_000_000
SOURCES = "house, pydoc, a file's path, or datasets:NAME"


class TextError(ValueError):
    """A text that cannot be read or does not suffice; the message is one sentence that says what would do."""


@dataclass(frozen=True)
class Text:
    """A text to cut windows from: the `name` it was asked for by, and its `content`."""

    name: str
    content: str

    def __post_init__(self):
        try:
            self.content.encode()
        except UnicodeEncodeError as error:
            raise TextError(
                f"the text {self.name!r} has half a character at place {error.start} (a lone surrogate), which no "
                "tokenizer takes; read it with errors='replace'."
            ) from None

    @property
    def sha256(self) -> str:
        """Hash of the content in UTF-8, so that a ledger says which text it was measured on."""
        return hashlib.sha256(self.content.encode()).hexdigest()


def read(source: str | os.PathLike = "house") -> Text:
    """Read a text.

    Args:
        source: "house" (the project's own prose, the same everywhere), "pydoc" (`pydoc_data.topics`, differs between
            Python versions), the path of a UTF-8 file, or "datasets:NAME[:CONFIG[:SPLIT[:COLUMN]]]" for a data set of
            the hub or a local folder (the split is "train" and the column "text" unless given; its first two million
            characters are used).
    """
    if not isinstance(source, str | os.PathLike):
        raise TextError(f"a text is named by a string, not by {source!r}; give {SOURCES}.")
    source = os.fspath(source)
    if source == "house":
        content = files("spikesink").joinpath("house.txt").read_text(encoding="utf-8")
    elif source == "pydoc":
        from pydoc_data.topics import topics

        content = "\n\n".join(topics[name] for name in sorted(topics))
    elif source.startswith("datasets:"):
        content = "\n\n".join(documents(source, CHARACTERS_FROM_A_DATASET))
    else:
        content = _read_file(source)
    if not content.strip():
        raise TextError(f"the text {source!r} is empty; give one with some words in it.")
    return Text(source, content)


def windows(
    model: Model | Prepared, source: str | Text = "house", n: int = 16, length: int = 256, seed: int = 0
) -> Int[Tensor, "n length"]:
    """Cut `n` windows of `length` tokens out of a text, none overlapping another, at places drawn by `seed`.

    A window begins with BOS where the tokenizer adds one of its own accord (`model.anatomy.prepends_bos`). What
    `prepare` returns will do as a model: its weights are not needed.

    Raises:
        TextError: the text is too short for the request, a window is longer than the model's context, or the tokenizer
            makes ids of the text that the model has no embedding for.
    """
    begin, context = bos(model), _shape(model).context
    for name, number, least in (("n", n, 1), ("length", length, 2 + len(begin)), ("seed", seed, 0)):
        if not isinstance(number, Integral) or isinstance(number, bool) or number < least:
            raise TextError(f"{name} is {number!r}; give a whole number of at least {least}.")
    if context is not None and length > context:
        raise TextError(f"a window of {length} tokens is longer than the model's context of {context}.")
    text = source if isinstance(source, Text) else read(source)
    ids, body = _encode(model, text), length - len(begin)
    there = len(ids) // body
    if there < n:
        raise TextError(
            f"the text {text.name!r} has {len(ids)} tokens, enough for {there} windows of {length}, not {n}; "
            "ask for fewer or shorter ones, or give a longer text."
        )
    chosen = np.random.default_rng(seed).permutation(there)[:n]
    return torch.tensor([begin + ids[i * body : (i + 1) * body] for i in chosen.tolist()])


def bos(model: Model | Prepared) -> list[int]:
    """What `windows` begin with: BOS where the tokenizer adds one of its own accord, else nothing."""
    return [model.tokenizer.bos_token_id] if _shape(model).prepends_bos else []


def all_ids(model: Model, source: str | Text = "house") -> Int[Tensor, " token"]:
    """A whole text's tokens, without BOS."""
    return torch.tensor(_encode(model, source if isinstance(source, Text) else read(source)))


def token_counts(model: Model, source: str | Text = "house") -> Int[Tensor, " vocabulary"]:
    """How often each vocabulary entry occurs in a text."""
    return torch.bincount(all_ids(model, source), minlength=anatomy(model).d_vocab)


def _shape(model: Model | Prepared) -> Anatomy | Prepared:
    """What tells a model's context, its vocabulary and whether it begins with BOS."""
    return model if isinstance(model, Prepared) else anatomy(model)


def _encode(model: Model | Prepared, text: Text) -> list[int]:
    """A text's token ids, without BOS."""
    ids = model.tokenizer(text.content, add_special_tokens=False, verbose=False).input_ids
    d_vocab = _shape(model).d_vocab
    if d_vocab is not None and ids and (largest := max(ids)) >= d_vocab:
        raise TextError(
            f"the tokenizer makes token {largest} of the text {text.name!r}, but the model has embeddings for 0 to "
            f"{d_vocab - 1} only; it seems to be another model's, so put this model's own tokenizer beside its weights."
        )
    return ids


def _read_file(source: str) -> str:
    try:
        return Path(source).expanduser().read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise TextError(f"the file {source} is not UTF-8 text; convert it, or give another.") from None
    except (OSError, RuntimeError, ValueError) as error:
        # Somebody may have given the text itself, which is longer than a name can be.
        short = source if len(source) <= 80 else f"{source[:80]}…"
        why = getattr(error, "strerror", None) or error
        raise TextError(f"there is no text {short!r} to be read ({why}); give {SOURCES}.") from None


def documents(source: str, characters: int) -> list[str]:
    """The first rows of a data set, named as `read` takes it, until they hold so many characters."""
    from datasets import load_dataset

    name, config, split, column = (source.split(":")[1:] + [""] * 4)[:4]
    if not name:
        raise TextError(f"{source!r} names no data set; give datasets:NAME.")
    try:
        rows = load_dataset(name, config or None, split=split or "train", streaming=True)
        content, size = [], 0
        for row in rows:
            content.append(row[column or "text"])
            size += len(content[-1])
            if size >= characters:
                break
    except KeyError:
        raise TextError(
            f"the data set {source!r} has no column {column or 'text'!r}; name one after the split."
        ) from None
    except Exception as error:
        raise TextError(f"{source!r} cannot be read ({first_line(error)}); check the name, or go online.") from None
    return content
