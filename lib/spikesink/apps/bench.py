"""How fast it is and how much memory it takes, as ratios within one run: what `make bench` calls.

A second on one machine says nothing about another, and little about the same one an hour later; so each row sets two
ways to the same answer side by side, timed in turns, and says how many times faster the one is. Memory is that of
processes of their own: the most that was resident, above what the libraries take.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink import patching, plots
from spikesink.apps.memory import Growth, Memory, growth, megabytes, memory, within
from spikesink.apps.scan import matmul_peak
from spikesink.chain import amplifier, firsttoken
from spikesink.chain.lifecycle import Lifecycle, find_lifecycle, first_step_up
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable, brief, escape, write_atomically
from spikesink.lab import train
from spikesink.lab.config import LENGTH, Config
from spikesink.lab.data import Backcopy
from spikesink.lab.families import BASES
from spikesink.model import paths
from spikesink.model.anatomy import anatomy
from spikesink.model.load import load, prepare
from spikesink.model.names import DEFAULT_MODEL
from spikesink.model.texts import windows
from spikesink.model.weights import FFN, Weights, weights_of

TURNS = 3


COLUMNS = ("what", "one way", "takes", "the other", "takes", "ratio", "same answer")


DOSES = tuple(0.2 * i for i in range(10))


SWEPT = (12, 64)  # windows and tokens that a sweep is timed on


WIDE = 2048  # the width at which Lanczos and a dense solve are compared besides the model's own


SAMPLE = 2048  # vocabulary entries that go through whole forward passes


@dataclass(frozen=True)
class Row:
    """Two ways to the same answer: seconds of each (best of the turns), their ratio, and whether they agree."""

    what: str
    way: str
    seconds: float
    against: str
    against_seconds: float
    agree: str

    @property
    def ratio(self) -> float:
        """How many times faster the first way is."""
        return self.against_seconds / self.seconds


@dataclass(frozen=True)
class Bench:
    """What one run measured."""

    model: str
    threads: int
    capability: str  # of the processor, as torch names it
    torch: str
    rows: tuple[Row, ...]
    peak_share: float | None  # of the measured float32 matrix-product peak that the probe reaches; None: no probe
    memory: tuple[Memory, ...] = ()
    growth: Growth | None = None

    def write(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        rows, memory = ([asdict(row) | {"ratio": row.ratio} for row in of] for of in (self.rows, self.memory))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(self) | {"rows": rows, "memory": memory}, indent=2) + "\n")

    def lines(self) -> list[tuple[str, ...]]:
        """Its rows as text: what, one way, what it took, the other way, what that took, ratio, same answer."""
        timed = [
            (row.what, row.way, f"{brief(row.seconds)} s", row.against, f"{brief(row.against_seconds)} s", row)
            for row in self.rows
        ]
        held = [(m.what, m.way, megabytes(m.peak), m.against, megabytes(m.against_peak), m) for m in self.memory]
        return [(*cells, f"{row.ratio:.1f}x", row.agree) for *cells, row in timed + held]

    def table(self) -> Table:
        """It as a table."""
        table = Table(*COLUMNS)
        for line in self.lines():
            table.add_row(*line)
        return table

    def markdown(self) -> str:
        """It as a table in Markdown."""
        rows = [COLUMNS, ("---",) * len(COLUMNS), *self.lines()]
        return "\n".join("| " + " | ".join(escape(cell) for cell in row) + " |" for row in rows)


def bench(model: TransformerBridge, life: Lifecycle, turns: int = TURNS, wide: int = WIDE) -> Bench:
    """Time the vocabulary probe, the census, the eigenpairs and sweeps of interventions on one model.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it, for the step-up block.
        turns: how often each way is timed; the best counts.
        wide: a second width for the eigenpairs, of a random block.
    """
    weights, rows, share = weights_of(model), [], None
    tokens = torch.arange(weights.anatomy.d_vocab)
    if life.main is not None and life.main.step_up:
        vocabulary, share = probes(weights, life, tokens, turns)
        rows.append(whole_passes(model, weights, life, tokens[:: max(1, len(tokens) // SAMPLE)], turns))
        rows += [vocabulary] if vocabulary else []
    block = first_step_up(life)
    if weights.anatomy.one_gated_ffn and not isinstance(block, NotApplicable):
        ffn = weights.ffn(block.layer)
        rows += [census(ffn, turns), lanczos(ffn, life.main.channel, turns), lanczos(random_ffn(wide), 0, turns)]
    if life.main is not None:
        rows += sweeps(model, life, turns)
    rows.append(traces(model, turns))
    return Bench(
        model=model.source.slug,
        threads=torch.get_num_threads(),
        capability=torch.backends.cpu.get_cpu_capability(),
        torch=torch.__version__,
        rows=tuple(rows),
        peak_share=share,
    )


def in_turns(ways: Sequence[Callable[[], Tensor]], turns: int) -> tuple[list[float], list[Tensor]]:
    """Run each way in turn, several times over; the best time of each, and what it returned last."""
    best, found = [float("inf")] * len(ways), [torch.empty(0)] * len(ways)
    for _ in range(turns):
        for i, way in enumerate(ways):
            begun = time.perf_counter()
            found[i] = way()
            best[i] = min(best[i], time.perf_counter() - begun)
    return best, found


def whole_passes(
    model: TransformerBridge, weights: Weights, life: Lifecycle, tokens: Tensor, turns: int = TURNS
) -> Row:
    """The static path against the same question asked by whole forward passes, on a sample of the vocabulary."""
    layers = (life.main.step_up[-1] + 1) // 2  # to the end of the layer with the last step-up block
    seen = {}
    hook = weights.anatomy.layer_hooks[layers]

    @torch.inference_mode()
    def whole() -> Tensor:
        found = []
        with model.hooks(fwd_hooks=[(hook, lambda value, hook: seen.update(stream=value[:, 0].float().cpu()))]):
            for part in tokens.split(256):
                model(part[:, None].to(model.cfg.device))
                found.append(seen["stream"][:, life.main.channel])
        return torch.cat(found)

    def static() -> Tensor:
        return paths.static_path(weights, tokens, 2 * layers)[:, life.main.channel]

    (ours, theirs), (a, b) = in_turns([static, whole], turns)
    return Row(
        f"{len(tokens):,} vocabulary entries at position 0",
        "static path",
        ours,
        "whole forward passes",
        theirs,
        within(float((a - b).abs().max() / b.abs().max()), " of the largest"),
    )


def probes(weights: Weights, life: Lifecycle, tokens: Tensor, turns: int = TURNS) -> tuple[Row | None, float]:
    """The whole vocabulary in bfloat16 against float32, and float32's share of the measured matrix-product peak.

    No row where the processor has no instructions for products in bfloat16: there they take many times as long.
    """
    peak = max(matmul_peak() for _ in range(2))
    ways = [
        lambda dtype=dtype: firsttoken.probe(weights, life, tokens, dtype)
        for dtype in (torch.float32, *([torch.bfloat16] if train.multiplies_bfloat16("cpu") else []))
    ]
    (full, *short), (exact, *rounded) = in_turns(ways, max(1, turns - 1))
    peak = max(peak, matmul_peak())
    share = operations(weights, life.main.step_up[-1]) * len(tokens) / full / peak
    if not short:
        return None, share
    other = int((exact.spiking != rounded[0].spiking).sum())
    agree = "the same entries spike" if not other else f"{other} of {len(tokens):,} differ"
    name = f"all {len(tokens):,} entries at position 0"
    return Row(name, "bfloat16 products", short[0], "float32", full, agree), share


def operations(weights: Weights, block: int) -> int:
    """Floating-point operations that one token's static path takes, in its matrix products alone."""
    total = 0
    for layer in range((block + 1) // 2):
        attention = weights.attention(layer)
        total += 2 * (attention.value.numel() + attention.out.numel())
        if 2 * layer + 2 <= block:
            with weights.block(layer, "mlp") as one:
                parts = [p for p in one.mlp.parameters() if p.ndim == 2]
                total += 2 * sum({p.data_ptr(): p.numel() for p in parts}.values())
    return total


def census(ffn: FFN, turns: int = TURNS, some: int = 8) -> Row:
    """||U_k||_F of all channels of one block at once, against forming U_k (some of them, scaled up to all)."""
    d = ffn.down.shape[0]
    chosen = range(0, d, max(1, d // some))

    def formed() -> Tensor:
        return torch.stack([torch.einsum("m,md,me->de", ffn.down[k], ffn.gate, ffn.up).norm() for k in chosen])

    (ours, theirs), (a, b) = in_turns([lambda: amplifier.gains(ffn), formed], turns)
    return Row(
        f"gains of all {d} channels of one block",
        "one kernel for all",
        ours,
        f"forming each U_k (from {len(chosen)})",
        theirs * d / len(chosen),
        within(float((a[list(chosen)] - b).abs().max() / b.max())),
    )


def lanczos(ffn: FFN, channel: int, turns: int = TURNS) -> Row:
    """The top eigenpair of S_k by Lanczos, against forming S_k and a dense solve."""
    exact = ffn.to(torch.float64)

    def dense() -> Tensor:
        values = torch.linalg.eigh(amplifier.form(exact, channel)).eigenvalues
        return values[values.abs().argmax()]

    ways = [lambda: amplifier.eigenpairs(exact, channel, 1).values[0], dense]
    (ours, theirs), (a, b) = in_turns(ways, turns)
    name = f"top eigenpair of S_k, width {ffn.down.shape[0]}"
    return Row(name, "Lanczos", ours, "dense solve", theirs, within(float(((a - b) / b).abs())))


def sweeps(model: TransformerBridge, life: Lifecycle, turns: int = TURNS) -> list[Row]:
    """Ten doses of the spike in one sweep, against ten evaluations and against runs that reuse nothing; and one cut."""
    n, length = SWEPT
    tokens = windows(model, "house", n, min(length, anatomy(model).context))
    site, channels = patching.stream(patching.block(life.main.plateau[0])), life.main.channels
    cuts = {dose: patching.scale(site, dose, 0, channels) for dose in DOSES}

    def losses(outcomes) -> Tensor:
        return torch.stack([of.loss for key, of in outcomes.items() if key != "clean"])

    ways = [
        lambda: losses(patching.compare(model, tokens, cuts)),
        lambda: torch.stack([patching.evaluate(model, tokens, cut).loss for cut in cuts.values()]),
        lambda: losses(patching.compare(model, tokens, cuts, reuse=False)),
    ]
    (ours, alone, whole), found = in_turns(ways, max(1, turns - 1))
    name = f"{len(DOSES)} doses on {n} windows of {tokens.shape[1]}"
    agree = [within(float((found[0] - other).abs().max()), " nats") for other in found[1:]]
    one = [lambda: patching.evaluate(model, tokens, cuts[0.0]).loss, lambda: patching.evaluate(model, tokens).loss]
    (cut, clean), _ = in_turns(one, turns)
    return [
        Row(name, "one sweep", ours, "ten evaluations, one by one", alone, agree[0]),
        Row(name, "one sweep", ours, "a sweep of whole runs", whole, agree[1]),
        Row(
            f"{n} windows of {tokens.shape[1]}", "clean and under a cut", cut, "the clean run alone", clean, "not asked"
        ),
    ]


def random_ffn(width: int) -> FFN:
    """A random block with one planted neuron, so that the top eigenpair stands out as in a step-up block."""
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(3 * width, width, generator=generator) / width**0.5 for _ in range(2))
    down = torch.randn(width, 3 * width, generator=generator) / width**0.5
    up[0] = gate[0]
    down[0, 0] = 20
    zeros = torch.zeros(3 * width)
    return FFN(gate, up, down, zeros, zeros, torch.nn.functional.silu)


def loading(spec: str) -> Row | None:
    """A model from the cache, against dequantizing it first; None where it is read as it is."""
    source = prepare(spec).source
    if source.files[0].parent == source.directory:
        return None
    tokens = torch.arange(8)[None]
    found = []

    def cold() -> Tensor:
        with tempfile.TemporaryDirectory() as empty, _environment(SPIKESINK_CACHE=empty):
            return load(spec)(tokens)

    (warm_seconds, cold_seconds), found = in_turns([lambda: load(spec)(tokens), cold], 1)
    agree = within(float((found[0] - found[1]).abs().max()))
    return Row("loading", "from the cache", warm_seconds, "dequantized first", cold_seconds, agree)


@contextmanager
def _environment(**changed: str) -> Iterator[None]:
    old = {key: os.environ.get(key) for key in changed}
    os.environ |= changed
    try:
        yield
    finally:
        for key, value in old.items():
            os.environ.pop(key) if value is None else os.environ.update({key: value})


def traces(model: TransformerBridge, turns: int = TURNS, n: int = 4, length: int = 256) -> Row:
    """The trace, which keeps what it needs of each window, against run_with_cache, which keeps all of it."""
    about = anatomy(model)
    tokens = windows(model, "house", n, min(length, about.context))

    def cached() -> Tensor:
        found = []
        for window in tokens:
            _, cache = model.run_with_cache(window[None])
            found.append(torch.stack([cache[hook][0].abs().median() for hook in about.layer_hooks]))
        return torch.stack(found).mean(0)

    ways = [lambda: trace_windows(model, tokens).medians[::2], cached]
    (ours, theirs), (a, b) = in_turns(ways, max(1, turns - 1))
    name = f"{n} windows of {tokens.shape[1]}"
    return Row(name, "trace", ours, "run_with_cache", theirs, within(float(((a - b) / b).abs().max())))


def training(turns: int = TURNS, config: Config = BASES["text"], steps: int = 4) -> Row | None:
    """A few steps of the lab's model, compiled and with products in what is fastest here, against float32 as written.

    None where there is no C++ compiler. What the two agree to is the loss of the last step.
    """
    if not train.can_compile():
        return None
    runs = []
    precision = "bfloat16" if train.multiplies_bfloat16("cpu") else "float32"
    for machine in (train.Machine(precision=precision), train.Machine(compiled=False)):
        run = train.start(replace(config, lengths=(LENGTH, LENGTH)), machine)
        mean_loss = train.loss_of(run.model, machine)

        def few(run=run, mean_loss=mean_loss, machine=machine) -> Tensor:
            for _ in range(steps):
                train.step(run, Backcopy(), mean_loss, machine)
            return torch.tensor(run.losses[-1])

        few()  # compiles
        runs.append(few)
    (ours, theirs), losses = in_turns(runs, turns)
    tokens = steps * config.batch
    return Row(
        f"{tokens:,} tokens of training, {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f}M parameters",
        f"compiled, {precision} products ({brief(float(round(tokens / ours)))} tokens/s)",
        ours,
        f"as written, float32 ({brief(float(round(tokens / theirs)))} tokens/s)",
        theirs,
        within(abs(float(losses[0] / losses[1]) - 1)),
    )


def into_readme(readme: Path, table: str) -> None:
    """Put the table between the two comments that mark its place."""
    begin, end = "<!-- bench -->\n", "<!-- /bench -->"
    head, found, rest = readme.read_text(encoding="utf-8").partition(begin)
    _, also, tail = rest.partition(end)
    if not found or not also:
        raise ValueError(f"{readme} has no place for the table: {begin.strip()} and, below it, {end}.")
    write_atomically(readme, f"{head}{begin}{table}\n{end}{tail}")


def command(chosen: argparse.Namespace, console: Console) -> None:
    """Run the bench that the arguments of `spikesink bench` ask for."""
    model = load(chosen.model)
    life = find_lifecycle(trace_windows(model, windows(model, "house", 4, 128)))
    with console.status("timing"):
        found = bench(model, life)
    del model
    with console.status("loading, and measuring memory in processes of their own"):
        loaded, trained = loading(chosen.model), training()
        rows = (*([loaded] if loaded else []), *found.rows, *([trained] if trained else []))
        found = replace(found, rows=rows, memory=memory(chosen.model), growth=growth(chosen.model))
    found.write(chosen.figures / "bench.json")
    if found.growth is not None:
        plots.save(plots.growth(found.growth), chosen.figures, "bench")
    if chosen.readme is not None and chosen.model == DEFAULT_MODEL:
        into_readme(chosen.readme, found.markdown())
    console.print(found.table())
    if found.peak_share is not None:
        console.print(
            f"The probe in float32 reaches {found.peak_share:.0%} of this machine's measured matrix-product peak."
        )
    console.print(f"Written to {chosen.figures / 'bench.json'}")
