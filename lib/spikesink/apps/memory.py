"""How much memory it takes, of processes of their own: the most that was resident, above what the libraries take."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain import amplifier
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable, brief
from spikesink.model.anatomy import anatomy
from spikesink.model.load import load, prepare
from spikesink.model.texts import windows
from spikesink.model.weights import Weights, open_weights, weights_of

GROWING = (2, 4, 8, 16)  # windows that the trace is measured on


LENGTH = 256  # their tokens, or the model's context


@dataclass(frozen=True)
class Memory:
    """Two ways to the same answer: the most that each held resident, in bytes above what the libraries take."""

    what: str
    way: str
    peak: float
    against: str
    against_peak: float
    agree: str

    @property
    def ratio(self) -> float:
        """How many times less the first way holds."""
        return self.against_peak / self.peak


@dataclass(frozen=True)
class Growth:
    """The trace of more and more windows: seconds, and the most bytes held above what the libraries take."""

    length: int
    windows: tuple[int, ...]
    seconds: tuple[float, ...]
    peaks: tuple[float, ...]


def _census(weights: Weights) -> float:
    found = amplifier.census(weights)
    return 0.0 if isinstance(found, NotApplicable) else float(found.gain.double().sum())


def _traced(model: TransformerBridge, n: int = 2) -> float:
    length = min(LENGTH, anatomy(model).context)
    return float(trace_windows(model, windows(model, "house", n, length)).medians.double().sum())


def _cached(model: TransformerBridge, n: int) -> float:
    about = anatomy(model)
    tokens = windows(model, "house", n, min(LENGTH, about.context))
    _, cache = model.run_with_cache(tokens)
    return sum(float(cache[hook].abs().median()) for hook in about.layer_hooks)


def _spread(spec: str) -> TransformerBridge:
    """A model of which a quarter may be in memory."""
    size = sum(file.stat().st_size for file in prepare(spec).source.directory.glob("*.safetensors"))
    return load(spec, "auto", max_memory={"cpu": size // 4})


# What a process of its own does, given a model; each returns a number that must agree with its counterpart's.
WORK: dict[str, Callable[[str], float]] = {
    "census, streamed": lambda spec: _census(open_weights(spec)),
    "census, whole": lambda spec: _census(weights_of(load(spec))),
    "trace, spread": lambda spec: _traced(_spread(spec)),
    "trace, whole": lambda spec: _traced(load(spec)),
    "8 windows, traced": lambda spec: _traced(load(spec), 8),
    "8 windows, cached": lambda spec: _cached(load(spec), 8),
    **{f"{n} windows": partial(lambda n, spec: _timed_trace(spec, n), n) for n in GROWING},
}


def _timed_trace(spec: str, n: int) -> float:
    """Seconds of the trace alone; what was resident before it does not count."""
    model = load(spec)
    _traced(model, 1)
    _reset_peak()
    begun = time.perf_counter()
    _traced(model, n)
    return time.perf_counter() - begun


def work(name: str, spec: str) -> None:
    """Do what WORK names and print what it gave and the most that was resident meanwhile, as JSON."""
    _reset_peak()
    before = _resident("VmRSS")
    gave = WORK[name](spec)
    print(json.dumps({"gave": gave, "peak": _resident("VmHWM") - before}))


def _resident(what: str) -> int:
    """Bytes, as the kernel counts them: VmRSS now, VmHWM the most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+)", status)[1])


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _in_a_process(name: str, spec: str) -> dict[str, float]:
    script = f"from spikesink.apps import memory; memory.work({name!r}, {spec!r})"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def memory(spec: str) -> tuple[Memory, ...]:
    """What a streamed census, an offloaded run and a trace hold, each against the plain way; none where not Linux."""
    if not sys.platform.startswith("linux"):
        return ()
    rows = []
    for what, (way, name), (against, other) in (
        ("census of all blocks", ("read layer by layer", "census, streamed"), ("the model loaded", "census, whole")),
        ("trace of 2 windows", ("a quarter in memory", "trace, spread"), ("the model loaded", "trace, whole")),
        ("8 windows", ("trace", "8 windows, traced"), ("run_with_cache", "8 windows, cached")),
    ):
        ours, theirs = _in_a_process(name, spec), _in_a_process(other, spec)
        same = within(abs(ours["gave"] / theirs["gave"] - 1)) if "cached" not in other else "not asked"
        rows.append(Memory(f"{what}, memory", way, ours["peak"], against, theirs["peak"], same))
    return tuple(rows)


def growth(spec: str) -> Growth | None:
    """Time and memory of the trace with the number of windows; None where the system is not Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found = [_in_a_process(f"{n} windows", spec) for n in GROWING]
    return Growth(LENGTH, GROWING, tuple(f["gave"] for f in found), tuple(f["peak"] for f in found))


def megabytes(n_bytes: float) -> str:
    """Bytes in words."""
    return f"{brief(n_bytes / 1e6)} MB"


def within(error: float, unit: str = "") -> str:
    """How nearly two ways give the same answer, in words."""
    return f"to {brief(error)}{unit}" if error else "exactly"
