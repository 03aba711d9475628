"""What the lab's models are trained on: Bigram-Backcopy, where the truth is known, or text through a small BPE.

Every batch is a function of the seed and the step alone, so that a run that was stopped goes on as if it had not been,
and several processes can each make their own part of it.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from jaxtyping import Bool, Float, Int, Integer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from spikesink.cli import CHARACTERS, SOURCE
from spikesink.common import progress, write_atomically
from spikesink.lab.config import BOS, LENGTH, Config, ConfigError, doubled
from spikesink.model import texts
from spikesink.model.names import cache_directory

BOS_TOKEN = "<bos>"
CHARACTERS_FOR_BPE = 20_000_000  # of these, from the beginning, that the BPE is learned from
HELD_OUT = 50  # one document in so many is never trained on
ENCODED_AT_ONCE = 256  # documents
DRAWS_LENGTH = 1  # in a seed: it is a batch's length that is drawn, not its windows
HELD_OUT_SEED = 2**31  # of windows that are looked at and never trained on


@dataclass(frozen=True)
class Backcopy:
    """Bigram-Backcopy (Guo et al., arXiv:2410.13835): after a trigger comes the token before it; else, a bigram's.

    The bigram is that of the house text's characters, so its entropy is the least loss that a model can have.
    """

    d_vocab: int = 64
    name: str = "backcopy"
    triggers: tuple[int, ...] = (5, 6, 7, 8, 9)  # common, but not the commonest, which would leave little else to see

    @property
    def sha256(self) -> str:
        """Hash of the text that the bigram is counted in."""
        return hashlib.sha256(texts.read("house").content.encode()).hexdigest()

    @cached_property
    def characters(self) -> tuple[str, ...]:
        """What each token stands for: BOS, then the commonest characters, the commonest first."""
        common = Counter(texts.read("house").content).most_common(self.d_vocab - 1)
        return (BOS_TOKEN, *(character for character, _ in common))

    @cached_property
    def bigram(self) -> Float[np.ndarray, "d_vocab d_vocab"]:
        """Probability of the next token; every pair counts once more than it occurs, and nothing leads to BOS."""
        index = {character: i for i, character in enumerate(self.characters)}
        ids = [index[character] for character in texts.read("house").content if character in index]
        counts = np.ones((self.d_vocab, self.d_vocab))
        counts[:, BOS] = 0
        np.add.at(counts, (ids[:-1], ids[1:]), 1)
        counts[BOS, list(self.triggers)] = 0  # a trigger in the first place would have BOS to copy
        return counts / counts.sum(1, keepdims=True)

    def windows(
        self, seed: int | tuple[int, ...], n: int, length: int, held_out: bool = False
    ) -> Int[np.ndarray, "n length"]:
        """Windows drawn by a seed, BOS in front; every one is new, held out or not."""
        rng = np.random.default_rng((HELD_OUT_SEED, *np.atleast_1d(seed)) if held_out else seed)
        draws, after = rng.random((n, length)), self.bigram.cumsum(1)
        tokens = np.zeros((n, length), dtype=np.int64)
        for i in range(1, length):
            before = tokens[:, i - 1]
            tokens[:, i] = np.minimum((after[before] < draws[:, i, None]).sum(1), self.d_vocab - 1)
            if i > 1:
                copied = np.isin(before, self.triggers)
                tokens[copied, i] = tokens[copied, i - 2]
        return tokens

    def is_trigger(self, tokens: Int[np.ndarray, "*window"]) -> Bool[np.ndarray, "*window"]:
        """Which tokens the next one is copied after."""
        return np.isin(tokens, self.triggers)

    def decode(self, tokens):
        """What tokens read."""
        return "".join(self.characters[token] for token in tokens)


@dataclass(frozen=True)
class Corpus:
    """Documents as tokens in one memory-mapped array; a window is BOS and a piece of one document."""

    name: str
    sha256: str
    tokens: Integer[np.ndarray, " token"]
    ends: Int[np.ndarray, " document"]  # where each document ends
    tokenizer: PreTrainedTokenizerFast

    def windows(
        self, seed: int | tuple[int, ...], n: int, length: int, held_out: bool = False
    ) -> Int[np.ndarray, "n length"]:
        """Windows drawn by a seed, evenly over all places of documents that are long enough, BOS in front."""
        begins = np.concatenate([[0], self.ends[:-1]])
        places = self.ends - begins - (length - 1) + 1  # in each document where a window may begin
        use = (places > 0) & ((np.arange(len(self.ends)) % HELD_OUT == 0) == held_out)
        if not use.any():
            raise ConfigError(f"no document of {self.name} has {length} tokens; ask for shorter windows.")
        begins, places = begins[use], places[use]
        upto = places.cumsum()
        drawn = np.random.default_rng(seed).integers(upto[-1], size=n)
        document = np.searchsorted(upto, drawn, side="right")
        start = begins[document] + drawn - (upto[document] - places[document])
        body = self.tokens[start[:, None] + np.arange(length - 1)]
        return np.concatenate([np.full((n, 1), BOS), body], axis=1).astype(np.int64)

    def decode(self, tokens):
        """What tokens read."""
        return self.tokenizer.decode(tokens)


Task = Backcopy | Corpus


def batch(task: Task, config: Config, step: int) -> Int[np.ndarray, "window position"]:
    """The whole batch of a step; its windows have one length, drawn from those the configuration allows."""
    lengths = doubled(*config.lengths)
    length = lengths[int(np.random.default_rng((config.seed, step, DRAWS_LENGTH)).integers(len(lengths)))]
    return _begun(task, (config.seed, step), config.batch // length, length, config.bos)


def _begun(
    task: Task, seed: int | tuple[int, ...], n: int, length: int, bos: bool, held_out: bool = False
) -> Int[np.ndarray, "n length"]:
    """Windows with BOS in front, or without."""
    return task.windows(seed, n, length, held_out) if bos else task.windows(seed, n, length + 1, held_out)[:, 1:]


def held_out(task: Task, n: int = 64, length: int = LENGTH, bos: bool = True) -> Int[Tensor, "n length"]:
    """The windows of a task that models are looked at: the same ones every time, of documents not trained on.

    (Of source code, a document that was not trained on can have pieces in common with others that were.)
    """
    return torch.from_numpy(_begun(task, 0, n, length, bos, held_out=True))


def open_task(config: Config, source: str = SOURCE, characters: int = CHARACTERS) -> Task:
    """What a configuration trains on: of a text, "packages" or what `texts.read` takes, as many characters at most."""
    return Backcopy(config.d_vocab) if config.task == "backcopy" else corpus(source, config.d_vocab, characters)


@cache
def corpus(source: str = SOURCE, d_vocab: int = Config.d_vocab, characters: int = CHARACTERS) -> Corpus:
    """A text as tokens of a byte-level BPE that is learned from it; made once and kept in the cache.

    The BPE has seen held-out documents as well: how pieces are cut, not what follows what.
    """
    if source == SOURCE:
        documents = list(_packages(characters))
    elif source.startswith("datasets:"):
        documents = texts.documents(source, characters)
    else:
        documents = texts.read(source).content.split("\n\n\n")
    sha256 = hashlib.sha256("\0".join(documents).encode()).hexdigest()
    place = cache_directory() / "lab" / f"{sha256[:20]}-{d_vocab}"
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_suffix(".lock")):
        if not (place / "done.json").exists():
            _tokenize(documents, d_vocab, place)
    tokens, ends = np.load(place / "tokens.npy", mmap_mode="r"), np.load(place / "ends.npy")
    return Corpus(source, sha256, tokens, ends, tokenizer_of(place / "tokenizer.json"))


def tokenizer_of(file: Path) -> PreTrainedTokenizerFast:
    """A tokenizer as `corpus` keeps it."""
    return PreTrainedTokenizerFast(tokenizer_file=str(file), bos_token=BOS_TOKEN)


def _packages(characters: int) -> Iterator[str]:
    """The Python files of the packages that spikesink asks for, in an order that is the same everywhere, each once."""
    requirements = [name for name in metadata.requires("spikesink") or () if "extra ==" not in name]
    files = [file for name in requirements for file in metadata.files(re.match(r"[\w.-]+", name)[0]) or ()]
    own = [file for file in files if file.suffix == ".py" and not file.is_absolute() and ".." not in file.parts]
    seen, size = set(), 0
    for _, file in sorted((hashlib.sha256(str(file).encode()).hexdigest(), file) for file in own):
        content = file.locate().read_text(encoding="utf-8", errors="ignore")
        if content and content not in seen:
            seen.add(content)
            size += len(content)
            yield content
        if size >= characters:
            return


def _tokenize(documents: list[str], d_vocab: int, place: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=d_vocab, special_tokens=[BOS_TOKEN], **options)
    before = np.cumsum([0, *map(len, documents[:-1])])  # characters before each document
    tokenizer.train_from_iterator(documents[: int((before < CHARACTERS_FOR_BPE).sum())], trainer)
    parts = []
    for start in progress(range(0, len(documents), ENCODED_AT_ONCE), "tokenizing", "batch"):
        encoded = tokenizer.encode_batch(documents[start : start + ENCODED_AT_ONCE])
        parts += [np.array(document.ids, dtype=np.uint16) for document in encoded]
    ends = np.cumsum([len(part) for part in parts])
    np.save(place / "tokens.npy", np.concatenate(parts))
    np.save(place / "ends.npy", ends)
    tokenizer.save(str(place / "tokenizer.json"))
    write_atomically(place / "done.json", json.dumps({"documents": len(ends), "tokens": int(ends[-1])}))
