"""How fast the heavier measures are beside the obvious way to the same answer: what `make bench` calls.

A second on one machine says nothing about another, so two ways to the same answer are timed in turns within one run;
the ratio of the two is what counts.
"""

import argparse
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from spikesink import patching
from spikesink.apps.scan import matmul_peak
from spikesink.chain import amplifier
from spikesink.chain.lifecycle import Lifecycle, find_lifecycle, first_step_up
from spikesink.chain.trace import trace_windows
from spikesink.cli import open_console
from spikesink.common import NotApplicable, brief, check_writable, escape, markdown_table, write_atomically
from spikesink.model import paths
from spikesink.model.anatomy import Block, Model
from spikesink.model.load import load, prepare
from spikesink.model.names import DEFAULT_MODEL, slug
from spikesink.model.texts import Text, windows
from spikesink.model.weights import FFN, weights_of

TURNS = 3
SAMPLE = 2048  # vocabulary entries that go through whole forward passes
FORMED = 8  # channels whose U_k is formed; the time is scaled up to all of them
DOSES = tuple(0.2 * i for i in range(10))
COLUMNS = ("what", "one way", "takes", "the other", "takes", "ratio", "same answer")


@dataclass(frozen=True)
class Row:
    """Two ways to the same answer, what each takes (the best of several turns), and how nearly they agree."""

    what: str
    way: str
    takes: float
    against: str
    against_takes: float
    error: float  # relative
    unit: str = "s"

    @property
    def ratio(self) -> float:
        """How many times less the first way takes."""
        return self.against_takes / self.takes

    def cells(self) -> tuple[str, ...]:
        """It as text, a cell for each of COLUMNS."""
        takes, against_takes = (f"{brief(value)} {self.unit}" for value in (self.takes, self.against_takes))
        agree = f"to {brief(self.error)}" if self.error else "exactly"
        return self.what, self.way, takes, self.against, against_takes, f"{self.ratio:.1f}x", agree


def command(chosen: argparse.Namespace) -> None:
    """Run the bench that the arguments of `spikesink bench` ask for."""
    check_writable(chosen.figures)
    console = open_console()
    with console.status("timing"):
        rows = list(bench(chosen.model))
    console.print(markdown(rows))
    machine = {"threads": torch.get_num_threads(), "capability": torch.backends.cpu.get_cpu_capability()}
    content = {"model": slug(chosen.model), **machine, "torch": torch.__version__, "rows": list(map(asdict, rows))}
    write_atomically(chosen.figures / "bench.json", json.dumps(content, indent=2) + "\n")
    if chosen.readme is not None and chosen.model == DEFAULT_MODEL:
        put_into_readme(chosen.readme, markdown(rows))
    console.print(f"Written to {chosen.figures / 'bench.json'}")


def bench(spec: str, text: str | Text = "house") -> Iterator[Row]:
    """Each row as it is measured; those that need a spike, a gate or a file to dequantize only where there is one."""
    source = prepare(spec).source
    if source.files[0].parent != source.directory:
        yield compare_loading(spec)
    model = load(spec)
    tokens = windows(model, text, 4, min(256, model.anatomy.context))
    life = find_lifecycle(trace_windows(model, tokens))
    with suppress(NotApplicable):
        step_up = first_step_up(life)
        yield compare_static_path(model, step_up, life.main.channel)
        yield compare_sweep(model, tokens[:, :64], life)
        ffn = weights_of(model).ffn(step_up.layer)
        yield compare_gains(ffn)
        yield compare_eigenpairs(ffn, life.main.channel)
    yield from compare_trace(model, tokens)


def time_in_turns(what: str, ways: Mapping[str, Callable[[], Tensor]], turns: int = TURNS) -> Row:
    """Time two ways in turns, and compare what they return."""
    takes, results = {name: float("inf") for name in ways}, {}
    for _ in range(turns):
        for name, way in ways.items():
            scope = {"way": way, "results": results, "name": name}
            timer = Timer("results[name] = way()", globals=scope, num_threads=torch.get_num_threads())
            takes[name] = min(takes[name], timer.timeit(1).median)
    (way, first), (against, second) = results.items()
    error = float((first - second).abs().max() / second.abs().max())
    return Row(what, way, takes[way], against, takes[against], error)


def compare_loading(spec: str) -> Row:
    """A model from the cache, against dequantizing it first."""
    tokens = torch.arange(8)[None]

    def cold() -> Tensor:
        with tempfile.TemporaryDirectory() as empty, patch.dict(os.environ, SPIKESINK_CACHE=empty):
            return load(spec)(tokens)

    return time_in_turns("loading", {"from the cache": lambda: load(spec)(tokens), "dequantized first": cold}, turns=1)


def compare_static_path(model: Model, step_up: Block, channel: int) -> Row:
    """The stream of vocabulary entries at position 0 after the step-up, against whole forward passes."""
    tokens = torch.arange(0, model.anatomy.d_vocab, max(1, model.anatomy.d_vocab // SAMPLE))
    hook = model.anatomy.layer_hooks[step_up.layer + 1]

    @torch.inference_mode()
    def run_all() -> Tensor:
        parts = (model.run_with_cache(part[:, None], names_filter=hook)[1][hook] for part in tokens.split(256))
        return torch.cat([part[:, 0, channel] for part in parts])

    def static() -> Tensor:
        return paths.static_path(weights_of(model), tokens, step_up)[:, channel]

    what = f"{len(tokens):,} vocabulary entries at position 0"
    return time_in_turns(what, {"static path": static, "whole forward passes": run_all})


def compare_gains(ffn: FFN) -> Row:
    """||U_k||_F of all channels of one block at once, against forming U_k (of some, scaled up to all)."""
    d = ffn.down.shape[0]
    some = list(range(0, d, max(1, d // FORMED)))

    def formed() -> Tensor:
        return torch.stack([torch.einsum("m,md,me->de", ffn.down[k], ffn.gate, ffn.up).norm() for k in some])

    ways = {"one kernel for all": lambda: amplifier.gains(ffn)[some], f"forming each U_k (from {len(some)})": formed}
    row = time_in_turns(f"gains of all {d} channels of one block", ways)
    share = amplifier.operations(*ffn.gate.shape) / row.takes / matmul_peak()
    way = f"{row.way} ({share:.0%} of a matrix product's speed)"
    return replace(row, way=way, against_takes=row.against_takes * d / len(some))


def compare_eigenpairs(ffn: FFN, channel: int) -> Row:
    """The top eigenvalue of S_k by Lanczos, against forming S_k and a dense solve."""
    exact = ffn.to(torch.float64)

    def dense() -> Tensor:
        values, _ = torch.linalg.eigh(amplifier.form(exact, channel))
        return values[values.abs().argmax()]

    ways = {"Lanczos": lambda: amplifier.eigenpairs(exact, channel, 1).values[0], "dense solve": dense}
    return time_in_turns(f"top eigenpair of S_k, width {ffn.down.shape[0]}", ways)


def compare_sweep(model: Model, tokens: Tensor, life: Lifecycle) -> Row:
    """Ten doses of the spike in one sweep, against as many evaluations."""
    site = patching.stream(life.main.plateau[0])
    cuts = {dose: patching.scale(site, dose, 0, channels=life.main.channels) for dose in DOSES}

    def sweep() -> Tensor:
        outcomes = patching.compare(model, tokens, cuts)
        return torch.stack([outcomes[dose].loss for dose in cuts])

    def one_by_one() -> Tensor:
        return torch.stack([patching.evaluate(model, tokens, cut).loss for cut in cuts.values()])

    what = f"{len(DOSES)} doses on {len(tokens)} windows of {tokens.shape[1]}"
    return time_in_turns(what, {"one sweep": sweep, "ten evaluations, one by one": one_by_one}, turns=1)


def compare_trace(model: Model, tokens: Tensor) -> Iterator[Row]:
    """The trace against run_with_cache, which keeps every activation: how long they take, and what they keep."""
    kept = {}

    def trace() -> Tensor:
        trace = trace_windows(model, tokens)
        kept["trace"] = [*vars(trace).values(), *vars(trace.rows).values()]
        return trace.medians[::2]

    def cached() -> Tensor:
        _, cache = model.run_with_cache(tokens)
        kept["run_with_cache"] = cache.values()
        streams = [cache[hook] for hook in model.anatomy.layer_hooks]
        return torch.stack([stream.abs().flatten(1).median(1).values.mean() for stream in streams])

    row = time_in_turns(f"{len(tokens)} windows of {tokens.shape[1]}", {"trace": trace, "run_with_cache": cached})
    yield row
    ours, theirs = (sum(value.nbytes for value in kept[way] if isinstance(value, Tensor)) / 1e6 for way in kept)
    yield replace(row, what=f"{row.what}, what is kept", takes=ours, against_takes=theirs, unit="MB")


def markdown(rows: list[Row]) -> str:
    """The rows as a table in Markdown."""
    return markdown_table(COLUMNS, (list(map(escape, row.cells())) for row in rows))


def put_into_readme(readme: Path, table: str) -> None:
    """Put the table between the two comments that mark its place."""
    place = re.compile(r"(?<=<!-- bench -->\n).*?(?=<!-- /bench -->)", re.DOTALL)
    text, n_places = place.subn(lambda _: f"{table}\n", readme.read_text(encoding="utf-8"))
    if n_places != 1:
        raise ValueError(f"{readme} has no place for the table: <!-- bench --> and, on a line below, <!-- /bench -->.")
    write_atomically(readme, text)
