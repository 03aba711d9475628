"""Where a model is put: its precision, its device, how much memory it may take, and what of it stays on disk."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import convert_file_size_to_int, get_max_memory
from filelock import FileLock, Timeout
from transformers import PreTrainedModel

from spikesink.model.anatomy import Model
from spikesink.model.errors import LoadError
from spikesink.model.gguf import writing_to_cache

SPREAD = ("auto", "disk")  # placements that accelerate makes, part by part
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LOCK = ".lock"

Memory = Mapping[int | str, int | str]


def choose_dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    """A precision by its name; by default float32."""
    name = str(dtype or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise LoadError(f"dtype {dtype!r} is not one that models run in; give one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def choose_device(device: str | torch.device | None) -> str | torch.device:
    """A device that can compute here, by its name; by default the CPU."""
    if device is None or device in SPREAD:
        return device or "cpu"
    try:
        there = torch.device(device)
        torch.empty(1, device=there).tolist()  # "meta" holds no numbers, and torch may be built without the others
    except (RuntimeError, TypeError, NotImplementedError, AssertionError):
        ways, gpus = ", ".join(("cpu", "cuda", "cuda:N", *SPREAD)), torch.cuda.device_count()
        raise LoadError(
            f"device {str(device)!r} cannot be used here, where torch sees {gpus} GPUs; give one of {ways}."
        ) from None
    return there


def read_budget(given: Memory | None) -> dict[int | str, int | str] | None:
    """How much of each device a model may take: what is given, or $SPIKESINK_MAX_MEMORY, and what is free elsewhere."""
    asked, name = os.environ.get("SPIKESINK_MAX_MEMORY", ""), f"max_memory {given}"
    if given is None:
        if not asked.split():
            return None
        name, pairs = f"SPIKESINK_MAX_MEMORY {asked!r}", [pair.partition("=")[::2] for pair in asked.split()]
        given = {int(device) if device.isdecimal() else device: size for device, size in pairs}
    try:
        # A small b would be read as bits, which nobody counts memory in.
        sizes = {device: convert_file_size_to_int(str(size).upper()) for device, size in given.items()}
    except ValueError:
        raise LoadError(
            f"{name} holds no size such as 8GB; give a device and a size each, as in 0=20GB cpu=8GB."
        ) from None
    there = get_max_memory()
    if unknown := [device for device in sizes if device not in there]:
        raise LoadError(f"{name} names {unknown[0]!r}, which is no device here; there are {list(there)}.")
    return there | sizes


class OffloadDirectory:
    """A place for what must be written anew to be read part by part (experts, mostly); it goes with the model.

    It is locked while its process lives, so that the next one can remove what a killed process left.
    """

    def __init__(self):
        with writing_to_cache() as cache, FileLock(cache / ".offload.lock"):
            for left in cache.glob(".offload-*"):
                with contextlib.suppress(Timeout), FileLock(left / LOCK, timeout=0):
                    shutil.rmtree(left, ignore_errors=True)
            self._made = tempfile.TemporaryDirectory(prefix=".offload-", dir=cache, ignore_cleanup_errors=True)
            self.name = self._made.name
            self._lock = FileLock(Path(self.name) / LOCK)
            self._lock.acquire()


def main_device(hf_model: PreTrainedModel) -> str:
    """Where a model that is spread takes its tokens: the first GPU that holds a part of it, or the CPU."""
    # There is no map where one device holds the whole.
    places = getattr(hf_model, "hf_device_map", None) or {"": next(hf_model.parameters()).device}
    gpus = [place for place in places.values() if str(place) not in ("cpu", "disk")]
    return str(torch.device(gpus[0])) if gpus else "cpu"


def is_offloaded(model: Model) -> bool:
    """Whether some of a model's weights are where they are only when they are needed."""
    return any(parameter.is_meta for parameter in getattr(model, "original_model", model).parameters())
