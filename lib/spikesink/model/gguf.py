"""GGUF files, and the cache of their dequantized twins: safetensors in float32, by the hash of the file.

A twin is written into a scratch directory beside its place and renamed there when it is whole; a lock keeps two
processes from doing the work twice. What an interrupted process left is removed by the next one.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from filelock import FileLock
from platformdirs import user_cache_path
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from spikesink.model.errors import LoadError, explain_errors, first_line, quiet


def cache_directory() -> Path:
    """Where dequantized models are kept: $SPIKESINK_CACHE, or the platform's own place for caches."""
    return Path(os.environ.get("SPIKESINK_CACHE") or user_cache_path("spikesink"))


@contextlib.contextmanager
def writing_to_cache() -> Iterator[Path]:
    """The cache, made if it is not there; what the system says against writing to it, as one sentence."""
    cache = cache_directory()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        yield cache
    except OSError as error:
        raise LoadError(
            f"the cache {cache} could not be written ({error.strerror or error}); make room there or set "
            "SPIKESINK_CACHE to another directory."
        ) from None


def hash_file(file: Path) -> str:
    """SHA-256 of a file; read once, as long as its size and time stay what they are."""
    status = file.stat()
    return _hash(file, status.st_size, status.st_mtime_ns)


@lru_cache
def _hash(file: Path, _size: int, _modified: int) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def is_gguf(file: Path) -> bool:
    """Whether a file begins as GGUF does."""
    with file.open("rb") as stream:
        return stream.read(4) == b"GGUF"


def is_dequantized(file: Path) -> bool:
    """Whether a file's twin is cached. The file is hashed for that, unless nothing at all is."""
    return any(cache_directory().glob("*/config.json")) and _is_whole(_twin(file))


def dequantize(file: Path) -> Path:
    """The cached twin of a GGUF file, made now if it is not there yet."""
    if not is_gguf(file):
        raise LoadError(f"{file} is not a GGUF file (it does not begin with GGUF); download it again.")
    twin = _twin(file)
    if _is_whole(twin):
        return twin
    with writing_to_cache() as cache, FileLock(cache / f"{twin.name}.lock"):
        if not _is_whole(twin):
            for stale in (twin, *cache.glob(f".{twin.name}-*")):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f".{twin.name}-", dir=cache) as scratch:
                _write_twin(file, Path(scratch) / "model")
                os.replace(Path(scratch) / "model", twin)
    return twin


def _twin(file: Path) -> Path:
    return cache_directory() / hash_file(file)[:32]


def _is_whole(twin: Path) -> bool:
    """Whether a twin has all that it needs; what somebody took out of it, or damaged, is made anew."""
    files = list(twin.glob("*.safetensors"))
    try:
        for file in files:
            with safe_open(file, "pt"):
                pass
    except SafetensorError:
        return False
    return bool(files) and (twin / "config.json").is_file()


def _write_twin(file: Path, directory: Path) -> None:
    from gguf import GGUFReader

    try:
        GGUFReader(file)
    except Exception as error:  # it ends before the tensors that its header announces
        raise LoadError(f"{file} is cut short or damaged ({first_line(error)}); download it again.") from None
    with explain_errors(str(file)):
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        hf_model = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    # transformers refuses to save what it loaded from GGUF until it forgets that it was quantized.
    hf_model.hf_quantizer = None
    if hasattr(hf_model.config, "quantization_config"):
        del hf_model.config.quantization_config
    try:
        with quiet():
            hf_model.save_pretrained(directory)
            tokenizer.save_pretrained(directory)
    except SafetensorError as error:  # it has the system's error in it
        raise OSError(first_line(error)) from None
