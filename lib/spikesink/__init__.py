"""How massive activations (spikes) become attention sinks, measured on real language models."""

from spikesink.lifecycle import find as find_lifecycle
from spikesink.models import LoadError, anatomy, load
from spikesink.texts import TextError, read, windows
from spikesink.trace import profile, summarize, trace_windows

__all__ = [
    "LoadError",
    "TextError",
    "anatomy",
    "find_lifecycle",
    "load",
    "profile",
    "read",
    "summarize",
    "trace_windows",
    "windows",
]
