"""What several notebooks measure is measured once a run: kept in $SPIKESINK_ONCE, where that is set.

A value is found again by all that it depends on: the function, the library's source, every weight of the model as it
is in memory, its configuration, dtype and device, and the arguments. What cannot be told apart so is not kept.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import NotApplicable

FOLDER = "SPIKESINK_ONCE"
PLAIN = (str, bytes, int, float, type(None), torch.dtype, torch.device, Path)


def once(function: Callable, model: TransformerBridge, *args: Any) -> Any:
    """`function(model, *args)`, or what that gave when it was last asked for in this run, perhaps by another process.

    A model that is hooked, or whose weights are not in memory, is measured each time.
    """
    folder = os.environ.get(FOLDER)
    key = _key(function, model, args) if folder else None
    if key is None:
        return function(model, *args)
    Path(folder).mkdir(parents=True, exist_ok=True)
    kept = joblib.Memory(folder, verbose=0).cache(_measure, ignore=["function", "model", "args"])
    with FileLock(Path(folder) / f"{key}.lock"):
        return kept(key, function, model, args)


def _measure(key: str, function: Callable, model: TransformerBridge, args: tuple) -> Any:
    return function(model, *args)


def _key(function: Callable, model: TransformerBridge, args: tuple) -> str | None:
    """What tells this measurement from any other; None where nothing does for certain."""
    hooked = any(point.fwd_hooks or point.bwd_hooks for point in model.hook_dict.values())
    if hooked or any(weight.is_meta for weight in model.state_dict().values()):
        return None
    try:
        parts = (function.__module__, function.__qualname__, _library(), _state(model), _plain(args))
    except TypeError:
        return None
    return hashlib.sha256(repr(parts).encode()).hexdigest()


@cache
def _library() -> str:
    """The library's own source, and the versions of what computes."""
    digest = hashlib.sha256(repr([version(name) for name in ("torch", "transformers", "transformer-lens")]).encode())
    for file in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _state(model: TransformerBridge) -> tuple:
    """The model as it is in memory."""
    weights = {(weight.data_ptr(), weight.shape): (name, weight) for name, weight in model.state_dict().items()}
    sums = [(name, tuple(weight.shape), _checksum(weight)) for name, weight in weights.values()]
    return sums, model.original_model.config.to_json_string(), str(model.cfg.dtype), str(model.cfg.device)


def _checksum(values: Tensor) -> int:
    return zlib.crc32(values.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _plain(value: Any) -> Any:
    """An argument in a form whose `repr` says all of it; raises TypeError for what has none."""
    if isinstance(value, Tensor):
        return "tensor", str(value.dtype), tuple(value.shape), _digest(value.detach().cpu().numpy())
    if isinstance(value, np.ndarray) and value.dtype != object:
        return "array", str(value.dtype), value.shape, _digest(value)
    if isinstance(value, NotApplicable):
        return "n/a", value.reason
    if is_dataclass(value) and not isinstance(value, type):
        return type(value).__qualname__, [(field.name, _plain(getattr(value, field.name))) for field in fields(value)]
    if isinstance(value, Mapping):
        return type(value).__qualname__, [(_plain(key), _plain(item)) for key, item in value.items()]
    if isinstance(value, list | tuple | frozenset | set):
        items = sorted(value, key=repr) if isinstance(value, frozenset | set) else value
        return type(value).__qualname__, [_plain(item) for item in items]
    if isinstance(value, PLAIN):
        return type(value).__qualname__, repr(value), int(value) if isinstance(value, int) else None
    raise TypeError(f"{type(value).__qualname__} is nothing that a measurement can be found again by")


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(values).tobytes()).hexdigest()
