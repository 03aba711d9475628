"""The life cycle of a spike, found in a trace: which blocks write it, where it stays, which blocks cancel it.

The rules, the same for every model, with `step` = 0.1 unless the reader changes it:

- the *peak* is the largest entry of the stream that is above 100 medians of |h|; its channel is the first channel, and
  the cycle's size is the largest such entry of a window, median over the windows that have one;
- the *spike tokens* are those above 100 medians whose entry at the peak reaches `step` of that size and lies nearer to
  it, on a log scale, than to an ordinary token's (in some families a channel is large on every token);
- the cycle lasts while their median entry stays above 100 medians and above `step` of the size; a block in it that
  writes at least `step` of the size, with its sign, is *step-up* (up to the peak), with the opposite sign *step-down*
  (after it);
- the *plateau* lies between the last step-up and the first step-down block, and the *plateau value* is what the first
  channel holds half-way through it. The other measures are taken there too;
- then what this cycle explains is set aside, and the largest entry of what is left starts the next, smaller cycle.
  One counts if it outlives the layer that wrote it, has at least two tokens, and is not the weak tail of a cycle
  already found (same channel, a step-up block in common).
"""

import math
from dataclasses import dataclass
from numbers import Real

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikesink.chain.trace import Rows, Trace, follow
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Block, Model, anatomy, check_ids, check_tokens
from spikesink.model.proof import require
from spikesink.model.weights import Weights

STEP = 0.1
MAX_CYCLES = 4
MAX_PEELS = 12
STEP_BLOCKS = 3  # the paper's "one to three" blocks; a cycle that needs more to be written is a ramp
MOSTLY = 0.8  # the share of the plateau value that those blocks must write


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of a channel. A point of the stream is the Block that it comes after; values are signed."""

    channel: int
    value: float  # plateau value of the first channel, median over the spike tokens
    peak: Block
    step_up: tuple[Block, ...]
    step_down: tuple[Block, ...]
    plateau: tuple[Block, Block]  # first and last point
    stream: Float[Tensor, " point"]  # first channel, median over the spike tokens
    writes: Float[Tensor, " block"]  # the same of what each block writes
    channels: tuple[int, ...]  # above 100 medians half-way through the plateau, the largest first
    is_spike: Bool[Tensor, " row"]  # which rows of the trace are this cycle's tokens
    blocks_needed: int  # fewest blocks that together write MOSTLY of the value; 0 if all do not
    attention_layers: tuple[int, ...]  # of the model

    @property
    def layers(self) -> list[int]:
        """The layers, from 0, whose attention reads a point of the plateau."""
        return [layer for layer in self.attention_layers if self.plateau[0] <= 2 * layer <= self.plateau[1]]

    @property
    def middle(self) -> Block:
        """The point half-way through the plateau."""
        return Block(sum(self.plateau) // 2)

    @property
    def shape(self) -> str:
        """ "step" when at most three blocks write most of it, else "ramp"."""
        return "step" if 0 < self.blocks_needed <= STEP_BLOCKS else "ramp"


@dataclass(frozen=True)
class Lifecycle:
    """The cycles of a model, the largest first; none where nothing spikes."""

    trace: Trace
    cycles: tuple[Cycle, ...]

    @property
    def main(self) -> Cycle | None:
        """The largest cycle, or None."""
        return self.cycles[0] if self.cycles else None

    @property
    def reason(self) -> str:
        """Why claims about a spike do not apply, for a model without one."""
        return f"no token has an entry above {self.trace.threshold:g} medians anywhere in the residual stream"

    def require_main(self, *parts: str) -> Cycle:
        """The largest cycle; raises NotApplicable where nothing spikes, or these parts of the model's proof fail."""
        if self.main is None:
            raise NotApplicable(self.reason)
        require(self.trace, *parts)
        return self.main


def find_lifecycle(trace: Trace, step: Real = STEP) -> Lifecycle:
    """Find the cycles in a trace, by the rules at the top of this module."""
    if not isinstance(trace, Trace):
        raise ValueError(f"a life cycle is found in what trace_windows returned, not in a {type(trace).__name__}.")
    if not isinstance(step, Real) or not 0 < step < 1:
        raise ValueError(f"step must lie between 0 and 1, but is {step!r}.")
    size = trace.rows.stream[..., : trace.n_followed].abs()  # row, point, channel
    spiking = size > trace.threshold * trace.window_medians[trace.rows.window][..., None]
    left = size * spiking
    cycles: list[Cycle] = []
    for _ in range(MAX_PEELS):
        if not left.numel() or left.max() == 0 or len(cycles) == MAX_CYCLES:
            break
        cycle, first, last = _cycle(trace, left, step)
        tail = any(c.channel == cycle.channel and set(c.step_up) & set(cycle.step_up) for c in cycles)
        if not cycles or (last - first >= 2 and cycle.is_spike.sum() >= 2 and not tail):
            cycles.append(cycle)
        left = left * ~_explained(spiking.any(-1), cycle.is_spike, first, last)[..., None]
    return Lifecycle(trace, tuple(cycles))


def _cycle(trace: Trace, left: Float[Tensor, "row point channel"], step: Real) -> tuple[Cycle, int, int]:
    """The cycle around the largest entry of what is left, and the first and last point at which it is alive."""
    rows = trace.rows
    row, peak, index = (int(i) for i in torch.unravel_index(left.argmax(), left.shape))
    is_spike, size = _spike_tokens(rows, rows.stream[:, peak, index], left[:, peak, index] > 0, row, step)
    stream, writes = (values[is_spike, :, index].quantile(0.5, dim=0) for values in (rows.stream, rows.writes))
    alive = stream * size.sign() >= torch.maximum(step * size.abs(), trace.threshold * trace.medians)
    dead = [-1, *(~alive).nonzero()[:, 0].tolist(), len(alive)]
    first, last = max(p for p in dead if p < peak) + 1, min(p for p in dead if p > peak) - 1
    share = writes / size
    step_up = tuple(Block(b) for b in range(max(first, 1), peak + 1) if share[b - 1] >= step)
    step_down = tuple(Block(b) for b in range(peak + 1, min(last + 1, len(writes)) + 1) if share[b - 1] <= -step)
    plateau = (Block(step_up[-1] if step_up else peak), Block(step_down[0] - 1 if step_down else last))
    if not trace.proof.holds("writes"):
        step_up = step_down = ()  # a layer's change is known, and not which of its blocks made it
    middle = sum(plateau) // 2
    held = rows.stream[is_spike, middle, : trace.n_followed].abs().quantile(0.5, dim=0)
    strongest = held.argsort(descending=True, stable=True)
    cycle = Cycle(
        channel=int(trace.channels[index]),
        value=float(stream[middle]),
        peak=Block(peak),
        step_up=step_up,
        step_down=step_down,
        plateau=plateau,
        stream=stream,
        writes=writes,
        channels=tuple(int(trace.channels[i]) for i in strongest if held[i] > trace.threshold * trace.medians[middle]),
        is_spike=is_spike,
        blocks_needed=_blocks_needed(writes[:middle], stream[middle]),
        attention_layers=trace.anatomy.attention_layers,
    )
    return cycle, first, last


def _spike_tokens(
    rows: Rows, entry: Float[Tensor, " row"], above: Bool[Tensor, " row"], largest: int, step: Real
) -> tuple[Bool[Tensor, " row"], Float[Tensor, ""]]:
    """Which rows are spike tokens, by the first channel at the peak, and the cycle's signed size.

    `above`: over 100 medians and not explained by another cycle; `largest`: the peak's own row, a spike token anyway.
    """
    sign = entry[largest].sign()
    above = above & (entry * sign > 0)
    size, least = _size_and_least(rows, entry * sign, above, step)
    is_spike = above & (entry * sign >= least)
    is_spike[largest] = True
    return is_spike, sign * size


def _size_and_least(
    rows: Rows, entry: Float[Tensor, " row"], among: Bool[Tensor, " row"], step: Real
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """A cycle's size, and the least entry of a spike token: `step` of it, and nearer to it than to an ordinary one."""
    by_window = [entry[among & (rows.window == window)].max() for window in rows.window[among].unique()]
    size = torch.stack(by_window).quantile(0.5)
    ordinary = entry[rows.drawn].abs().median()
    return size, torch.maximum(step * size, (size * ordinary).sqrt())


def _blocks_needed(writes: Float[Tensor, " block"], value: Tensor) -> int:
    """Fewest blocks whose writes add up to MOSTLY of the value; 0 if even all that push towards it do not."""
    towards = (writes / value).clamp(min=0).sort(descending=True).values.cumsum(0)
    enough = (towards >= MOSTLY).nonzero()[:, 0].tolist()
    return enough[0] + 1 if enough else 0


def _explained(
    spiking: Bool[Tensor, "row point"], tokens: Bool[Tensor, " row"], first: int, last: int
) -> Bool[Tensor, "row point"]:
    """What a cycle accounts for: on its tokens, its own points and all that spike without a gap before or after."""
    explained = spiking.clone()
    explained[:, first : last + 1] = True
    explained[:, last:] = explained[:, last:].cumprod(1).bool()
    explained[:, : first + 1] = explained[:, : first + 1].flip(1).cumprod(1).flip(1).bool()
    return explained & tokens[:, None]


def spike_rows(life: Lifecycle) -> Rows:
    """The spike tokens of the main cycle."""
    return life.trace.rows[life.main.is_spike]


def ordinary_rows(life: Lifecycle) -> Rows:
    """The tokens drawn at random from every window, less those that spike in the main cycle: the control."""
    drawn = life.trace.rows.drawn
    return life.trace.rows[drawn if life.main is None else drawn & ~life.main.is_spike]


def middle_row(life: Lifecycle) -> Rows:
    """The spike token whose size is in the middle: one real token, whose writes add up to its stream."""
    rows = spike_rows(life)
    held = rows.stream[:, life.main.middle, index_of(life, life.main.channel)]
    return rows[held.argsort()[[len(rows) // 2]]]


def index_of(life: Lifecycle, channel: int) -> int:
    """Where among the trace's followed channels a channel of the model is."""
    return int((life.trace.channels == channel).nonzero()[0])


def is_spike(life: Lifecycle, cycle: Cycle) -> Bool[Tensor, "window position"]:
    """Which tokens of the windows are a cycle's spike tokens."""
    rows = life.trace.rows[cycle.is_spike]
    spikes = torch.zeros(life.trace.tokens.shape, dtype=torch.bool)
    spikes[rows.window, rows.position] = True
    return spikes


def find_spikes(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle) -> Bool[Tensor, "n length"]:
    """Which tokens of any windows are spike tokens of the main cycle, by the rule that found it; none without one."""
    check_model(model, life)
    check_tokens(model, tokens)
    cycle, trace = life.main, life.trace
    spikes = torch.zeros(tokens.shape, dtype=torch.bool)
    if cycle is None:
        return spikes
    sign = math.copysign(1, cycle.value)
    held = trace.rows.stream[:, cycle.peak, index_of(life, cycle.channel)] * sign
    _, least = _size_and_least(trace.rows, held, cycle.is_spike, STEP)
    for window, spiking in zip(tokens, spikes, strict=True):

        def on_stream(point: Block, h: Float[Tensor, "token d_model"], spiking: Tensor = spiking) -> None:
            if point == cycle.peak:
                above = torch.maximum(least, trace.threshold * h.abs().median().cpu())
                spiking.copy_(h[:, cycle.channel].cpu() * sign >= above)

        follow(model, window, on_stream)
    return spikes


@measure
def first_step_up(life: Lifecycle) -> Block:
    """The main cycle's first FFN block that is step-up: it meets tokens that do not spike yet, a later one may not."""
    for block in life.require_main("writes").step_up:
        if not block.is_attention:
            return block
    raise NotApplicable("no single FFN block writes a tenth of the spike, so there is none to take apart")


def late_step_down(life: Lifecycle) -> tuple[Block, ...]:
    """The step-down blocks of the main cycle that are FFN blocks of the model's second half, as LC3 counts them."""
    return tuple(b for b in life.main.step_down if not b.is_attention and b > life.trace.anatomy.n_blocks // 2)


def layers_before(life: Lifecycle) -> list[int]:
    """Layers whose attention reads the stream before the main cycle's first step-up block (or, without, its peak)."""
    first = life.main.step_up[0] if life.main.step_up else life.main.peak
    return [layer for layer in life.trace.anatomy.attention_layers if 2 * layer < first]


def layers_quiet(life: Lifecycle) -> list[int]:
    """Of the layers before the main cycle, those that read no other cycle's plateau and spike tokens without a spike.

    These can spike before their cycle in another channel, which is then no cycle of its own.
    """
    trace = life.trace
    alive = {layer for cycle in life.cycles for layer in cycle.layers}
    largest = spike_rows(life).stream.abs().amax(-1).quantile(0.5, dim=0)  # of each point
    spiking = largest > trace.threshold * trace.medians
    return [layer for layer in layers_before(life) if layer not in alive and not spiking[2 * layer]]


def layers_after(life: Lifecycle) -> list[int]:
    """Layers whose attention reads the stream past the main cycle's plateau."""
    return [layer for layer in life.trace.anatomy.attention_layers if 2 * layer > life.main.plateau[1]]


def right_after(tokens: Bool[Tensor, "*window position"]) -> Bool[Tensor, "*window position"]:
    """The tokens that stand right after those, whether or not they are of them too."""
    return tokens.roll(1, dims=-1).index_fill(-1, torch.tensor(0), False)


def check_model(model: Model | Weights, life: Lifecycle) -> None:
    """Raise ValueError where a life cycle was found in a model of another shape than this one's."""
    ours, theirs = anatomy(model), life.trace.anatomy
    if any(getattr(ours, name) != getattr(theirs, name) for name in ("family", "n_layers", "d_model", "d_vocab")):
        raise ValueError(
            f"this life cycle was found in a {theirs.family} model of {theirs.n_layers} layers, {theirs.d_model} "
            f"channels and {theirs.d_vocab} tokens, not in this {ours.family} model; trace this one."
        )


def check_windows(life: Lifecycle, tokens: Int[Tensor, "n length"], part: bool = False) -> None:
    """Raise ValueError unless these are the windows that a life cycle was found in, or a `part`: the first of them."""
    check_ids(tokens)
    theirs = life.trace.tokens[: len(tokens)] if part and tokens.ndim else life.trace.tokens
    if not tokens.numel() or not torch.equal(tokens.cpu().to(theirs.dtype), theirs):
        raise ValueError("these are not the windows that this life cycle was found in; trace these, or give those.")


@measure
def writes_table(life: Lifecycle, least: float = 0.02) -> pd.DataFrame:
    """Every block that writes at least `least` of the main cycle's value: its write, its share, its step."""
    cycle = life.require_main("writes")
    steps = dict.fromkeys(cycle.step_up, "up") | dict.fromkeys(cycle.step_down, "down")
    pairs = zip(cycle.writes.tolist(), (cycle.writes / cycle.value).tolist(), strict=True)
    rows = [(str(Block(b)), *pair, steps.get(b, "")) for b, pair in enumerate(pairs, 1)]
    frame = pd.DataFrame(rows, columns=["block", "write", "share of the plateau", "step"]).set_index("block")
    return frame[frame["share of the plateau"].abs() >= least]


@measure
def cycles_table(life: Lifecycle) -> pd.DataFrame:
    """One line a cycle: first channel, its plateau value, step-up and step-down blocks, tokens."""
    life.require_main()
    fields = {"channel": "channel", "plateau value": "value", "step-up": "step_up", "step-down": "step_down"}
    rows = []
    for cycle in life.cycles:
        position = life.trace.rows.position[cycle.is_spike]
        counts = {"tokens": len(position), "at position 0": int((position == 0).sum())}
        rows.append({name: getattr(cycle, field) for name, field in fields.items()} | {"shape": cycle.shape} | counts)
    return pd.DataFrame(rows)
