"""GGUF files, and the cache of their dequantized twins: safetensors in float32, by the hash of the file.

A twin is written into a scratch directory beside its place and renamed there when it is whole; a lock keeps two
processes from doing the work twice. What an interrupted process left is removed by the next one.
"""

import contextlib
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from spikesink.common import first_line
from spikesink.model.errors import LoadError, explain_errors, quiet
from spikesink.model.names import cache_directory

if TYPE_CHECKING:
    from gguf import GGUFReader


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
    if (part := re.search(r"-(\d{5})-of-(\d{5})\.gguf$", file.name)) and int(part[2]) > 1:
        whole = file.name.replace(part[0], ".gguf")
        raise LoadError(
            f"{file} is part {int(part[1])} of {int(part[2])}; put them together with llama-gguf-split --merge "
            f"{file.name.replace(part[1], '00001', 1)} {whole}, and give {whole}."
        )
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


# What a header may say that changes what a model computes.
_COMPUTES = re.compile(r"scal|softcap|window|clamp")


def _check_read_whole(file: Path, reader: "GGUFReader", hf_model: PreTrainedModel, missing: list[str]) -> None:
    """Raise LoadError unless the model is the file's: no gap is made up, no tensor and no setting left unread."""
    instead = "give the model as a directory of safetensors, or a GGUF file that was made of it anew"
    if missing:
        raise LoadError(f"{file} lacks {len(missing)} of its model's weights, the first is {missing[0]}; {instead}.")
    if sum(int(t.n_elements) for t in reader.tensors) > sum(p.numel() for p in hf_model.parameters()):
        places = get_gguf_hf_weights_map(hf_model, TensorProcessor())
        extra = [tensor.name for tensor in reader.tensors if tensor.name not in places]
        raise LoadError(f"{file} holds tensors that its model would not use ({', '.join(extra[:3])}); {instead}.")
    family = reader.fields["general.architecture"].contents()
    settings = hf_model.config.to_dict()
    known = {*GGUF_CONFIG_MAPPING.get(family, {})}
    values = [v for part in (settings, *(p for p in settings.values() if isinstance(p, dict))) for v in part.values()]
    for name, field in reader.fields.items():
        key, value = name.removeprefix(f"{family}."), field.contents()
        trivial = value in (0, 1, "none", "") or any(value == v for v in values if not isinstance(v, list | dict))
        if name != key and key not in known and _COMPUTES.search(key) and not trivial:
            raise LoadError(f"the header of {file} says {key} = {value}, which would not be obeyed; {instead}.")


def _write_twin(file: Path, directory: Path) -> None:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # it ends before the tensors that its header announces
        raise LoadError(f"{file} is cut short or damaged ({first_line(error)}); download it again.") from None
    with explain_errors(str(file)):
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        tokenizer = AutoTokenizer.from_pretrained(**where)
        hf_model, report = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, output_loading_info=True)
        _check_read_whole(file, reader, hf_model, sorted(report["missing_keys"]))
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
