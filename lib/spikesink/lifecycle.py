"""The life cycle of a spike, found in a trace: which blocks write it, where it stays, which blocks cancel it.

Blocks are counted as in the paper, from 1: block 2l - 1 is the attention of layer l, block 2l its FFN. Rules, the same
for every model, with `step` = 0.1 unless the reader changes it:

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
from itertools import combinations
from numbers import Real

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.claims import Evidence, NotApplicable, evidence
from spikesink.models import Anatomy, anatomy, check_ids, check_tokens
from spikesink.trace import TOP, Rows, Trace, follow

STEP = 0.1
MAX_CYCLES = 4
MAX_PEELS = 12
MAX_PAIRS = 2000  # of spike tokens, for the Jaccard index
STEP_BLOCKS = 3  # the paper's "one to three" blocks; a cycle that needs more to be written is a ramp
MOSTLY = 0.8  # the share of the plateau value that those blocks must write


def block_kind(block: int) -> str:
    """What a block is: "attention" (odd) or "FFN" (even)."""
    return "attention" if block % 2 else "FFN"


def block_layer(block: int) -> int:
    """The TransformerLens layer (from 0) that a block (from 1) belongs to."""
    return (block - 1) // 2


@dataclass(frozen=True)
class Cycle:
    """One rise and fall of a channel. Points are places in the stream (p = after block p), values are signed."""

    channel: int
    value: float  # plateau value of the first channel, median over the spike tokens
    peak: int
    step_up: tuple[int, ...]
    step_down: tuple[int, ...]
    plateau: tuple[int, int]  # first and last point
    stream: Float[Tensor, " point"]  # first channel, median over the spike tokens
    writes: Float[Tensor, " block"]  # the same of what each block writes
    channels: tuple[int, ...]  # above 100 medians half-way through the plateau, the largest first
    is_spike: Bool[Tensor, " row"]  # which rows of the trace are this cycle's tokens
    blocks_needed: int  # fewest blocks that together write MOSTLY of the value; 0 if all do not

    @property
    def middle(self) -> int:
        """The point half-way through the plateau."""
        return sum(self.plateau) // 2

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


def find_lifecycle(trace: Trace, step: float = STEP) -> Lifecycle:
    """Find the cycles in a trace, by the rules at the top of this module.

    Args:
        trace: as `trace_windows` returns it.
        step: the share of a cycle's size that a write must reach to count as a step.

    Raises:
        ValueError: this is no trace, or `step` is not between 0 and 1.
    """
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


def _cycle(trace: Trace, left: Float[Tensor, "row point channel"], step: float) -> tuple[Cycle, int, int]:
    """The cycle around the largest entry of what is left, and the first and last point at which it is alive."""
    rows = trace.rows
    row, peak, index = (int(i) for i in torch.unravel_index(left.argmax(), left.shape))
    is_spike, size = _spike_tokens(rows, rows.stream[:, peak, index], left[:, peak, index] > 0, row, step)
    stream, writes = (_median(of[is_spike, :, index]) for of in (rows.stream, rows.writes))
    alive = stream * size.sign() >= torch.maximum(step * size.abs(), trace.threshold * trace.medians)
    first, last = _run_around(alive, peak)
    share = writes / size
    step_up = tuple(b for b in range(max(first, 1), peak + 1) if share[b - 1] >= step)
    step_down = tuple(b for b in range(peak + 1, min(last + 1, len(writes)) + 1) if share[b - 1] <= -step)
    plateau = (step_up[-1] if step_up else peak, step_down[0] - 1 if step_down else last)
    middle = sum(plateau) // 2
    cycle = Cycle(
        channel=int(trace.channels[index]),
        value=float(stream[middle]),
        peak=peak,
        step_up=step_up,
        step_down=step_down,
        plateau=plateau,
        stream=stream,
        writes=writes,
        channels=_spike_channels(trace, is_spike, middle),
        is_spike=is_spike,
        blocks_needed=_blocks_needed(writes[:middle], stream[middle]),
    )
    return cycle, first, last


def _spike_tokens(
    rows: Rows, entry: Float[Tensor, " row"], above: Bool[Tensor, " row"], largest: int, step: float
) -> tuple[Bool[Tensor, " row"], Float[Tensor, ""]]:
    """Which rows are spike tokens, by their entry at the peak, and the cycle's signed size.

    Args:
        entry: the first channel at the peak.
        above: which of them are above 100 medians and not explained by another cycle.
        largest: the row of the peak itself, which is a spike token whatever the others are.
    """
    sign = entry[largest].sign()
    above = above & (entry * sign > 0)
    size, least = _size_and_least(rows, entry * sign, above, step)
    is_spike = above & (entry * sign >= least)
    is_spike[largest] = True
    return is_spike, sign * size


def _size_and_least(
    rows: Rows, entry: Float[Tensor, " row"], among: Bool[Tensor, " row"], step: float
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """A cycle's size, and the least entry of a spike token: `step` of it, and nearer to it than to an ordinary one."""
    size = _median(torch.stack([entry[among & (rows.window == w)].max() for w in rows.window[among].unique()]))
    ordinary = entry[rows.drawn].abs().median()
    return size, torch.maximum(step * size, (size * ordinary).sqrt())


def _spike_channels(trace: Trace, is_spike: Bool[Tensor, " row"], point: int) -> tuple[int, ...]:
    """The channels that exceed the threshold at a point, median over the spike tokens, the largest first."""
    typical = _median(trace.rows.stream[is_spike, point, : trace.n_followed].abs())
    order = typical.argsort(descending=True, stable=True)
    return tuple(int(trace.channels[i]) for i in order if typical[i] > trace.threshold * trace.medians[point])


def _blocks_needed(writes: Float[Tensor, " block"], value: Tensor) -> int:
    """Fewest blocks whose writes add up to MOSTLY of the value; 0 if even all that push towards it do not."""
    towards = (writes / value).clamp(min=0).sort(descending=True).values.cumsum(0)
    enough = (towards >= MOSTLY).nonzero()
    return int(enough[0]) + 1 if len(enough) else 0


def _run_around(alive: Bool[Tensor, " point"], peak: int) -> tuple[int, int]:
    """First and last point of the unbroken run of `alive` that holds `peak`."""
    first = last = peak
    while first > 0 and alive[first - 1]:
        first -= 1
    while last + 1 < len(alive) and alive[last + 1]:
        last += 1
    return first, last


def _explained(
    spiking: Bool[Tensor, "row point"], tokens: Bool[Tensor, " row"], first: int, last: int
) -> Bool[Tensor, "row point"]:
    """What a cycle accounts for: on its tokens, its own points and all that spike without a gap before or after."""
    explained = torch.zeros_like(spiking)
    explained[:, first : last + 1] = tokens[:, None]
    for point in range(last + 1, spiking.shape[1]):
        explained[:, point] = explained[:, point - 1] & spiking[:, point]
    for point in range(first - 1, -1, -1):
        explained[:, point] = explained[:, point + 1] & spiking[:, point]
    return explained


def _median(values: Tensor) -> Tensor:
    """Median over the first dimension; of an even number, the mean of the middle two."""
    return values.quantile(0.5, dim=0)


def ordinary_rows(life: Lifecycle) -> Rows:
    """The tokens drawn at random from every window, less those that spike in the main cycle: the control."""
    keep = life.trace.rows.drawn.clone()
    if life.main is not None:
        keep &= ~life.main.is_spike
    return life.trace.rows[keep]


def spike_rows(life: Lifecycle) -> Rows:
    """The spike tokens of the main cycle."""
    return life.trace.rows[life.main.is_spike]


def middle_row(life: Lifecycle) -> Rows:
    """The spike token whose size is in the middle: one real token, whose writes add up to its stream."""
    rows = spike_rows(life)
    held = rows.stream[:, life.main.middle, index_of(life, life.main.channel)]
    return rows[held.argsort()[len(rows) // 2 : len(rows) // 2 + 1]]


def late_step_down(life: Lifecycle) -> tuple[int, ...]:
    """The step-down blocks of the main cycle that are FFN blocks of the model's second half, as LC3 counts them."""
    return tuple(b for b in life.main.step_down if b % 2 == 0 and b > life.trace.anatomy.n_blocks // 2)


def table(life: Lifecycle, least: float = 0.02) -> pd.DataFrame:
    """Every block that writes at least `least` of the main cycle's value: block, layer, kind, write, share, step."""
    cycle = life.main
    rows = []
    for block in range(1, life.trace.anatomy.n_blocks + 1):
        write = float(cycle.writes[block - 1])
        step = "up" if block in cycle.step_up else "down" if block in cycle.step_down else ""
        rows.append((block, block_layer(block), block_kind(block), write, write / cycle.value, step))
    frame = pd.DataFrame(rows, columns=["block", "layer", "kind", "write", "share of the plateau", "step"])
    return frame[frame["share of the plateau"].abs() >= least].set_index("block")


def cycles_table(life: Lifecycle) -> pd.DataFrame:
    """One line a cycle: first channel, its plateau value, step-up and step-down blocks, tokens."""
    rows = life.trace.rows
    lines = []
    for cycle in life.cycles:
        positions = rows.position[cycle.is_spike]
        lines.append(
            {
                "channel": cycle.channel,
                "plateau value": cycle.value,
                "step-up": cycle.step_up,
                "step-down": cycle.step_down,
                "shape": cycle.shape,
                "tokens": int(cycle.is_spike.sum()),
                "at position 0": int((positions == 0).sum()),
            }
        )
    return pd.DataFrame(lines)


def step_up(life: Lifecycle) -> Evidence | NotApplicable:
    """LC1: which blocks write the spike, and what share of the plateau value the early FFN blocks among them write.

    Of more than three such blocks the three largest writes count; of the attention blocks, the largest write of either
    sign in the first half or before the step-down. Controls: what the same blocks write into the same channel on
    ordinary tokens, and into ordinary channels on the spike tokens, both over the plateau value; and the latter over
    what those channels themselves hold half-way through the plateau (a step-up block can dominate every channel of its
    tokens; what sets the spike channels apart is the size).
    """
    if life.main is None:
        return NotApplicable(life.reason)
    cycle, n_blocks = life.main, life.trace.anatomy.n_blocks
    share = cycle.writes / cycle.value
    early = [b for b in cycle.step_up if b % 2 == 0 and b <= n_blocks // 2]
    which = torch.tensor(sorted(early, key=lambda b: -share[b - 1])[:STEP_BLOCKS], dtype=torch.long) - 1
    ordinary, spikes, controls = ordinary_rows(life), spike_rows(life), life.trace.ordinary
    same_channel = ordinary.writes[:, which, index_of(life, cycle.channel)].sum(1)  # token
    other_channels = spikes.writes[:, which][..., controls].sum(1)  # token, channel
    held = spikes.stream[:, cycle.middle, controls]
    return evidence(
        measured={
            "step_up_blocks": list(cycle.step_up),
            "channels": list(cycle.channels),
            "plateau_value": cycle.value,
            "share_written": float(share[which].sum()),
            "largest_attention_share": float(share[: max(n_blocks // 2, cycle.plateau[1]) : 2].abs().max()),
            "blocks_needed": cycle.blocks_needed,
        },
        control={
            "share_written_ordinary_tokens": _typical(same_channel / cycle.value),
            "share_written_ordinary_channels": _typical(other_channels.abs() / abs(cycle.value)),
            "write_over_own_value_ordinary_channels": _typical(other_channels / held),
        },
    )


def plateau(life: Lifecycle) -> Evidence | NotApplicable:
    """LC2: the median size of a write between step-up and step-down, over the plateau value.

    Control: the same blocks' writes into ordinary channels of the same tokens, over what those channels hold half-way.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    cycle = life.main
    between = torch.arange(cycle.plateau[0] + 1, cycle.plateau[1] + 1)
    if not len(between):
        return NotApplicable("no block lies between the last step-up and the first step-down block")
    spikes = spike_rows(life)
    index = index_of(life, cycle.channel)
    writes = spikes.writes[:, between - 1]  # row, block, channel
    ratio = writes.abs() / spikes.stream[:, cycle.middle].abs()[:, None]
    return evidence(
        measured={
            "plateau_write_ratio": float((writes[..., index].abs() / abs(cycle.value)).median()),
            "first_point": cycle.plateau[0],
            "last_point": cycle.plateau[1],
            "value_at_first_point": float(cycle.stream[cycle.plateau[0]]),
            "value_at_last_point": float(cycle.stream[cycle.plateau[1]]),
        },
        control={"write_ratio_ordinary_channels": _typical(ratio[..., life.trace.ordinary])},
    )


def step_down(life: Lifecycle) -> Evidence | NotApplicable:
    """LC3: which blocks cancel the spike, and what share of the plateau value the late FFN blocks among them take back.

    Control: what the same blocks take back from the same channel on ordinary tokens, over the same plateau value, and
    by how much they change ordinary channels of the spike tokens, in either direction, over what those hold.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    cycle, n_blocks = life.main, life.trace.anatomy.n_blocks
    late = late_step_down(life)
    which = torch.tensor(late, dtype=torch.long) - 1
    ordinary, spikes = ordinary_rows(life), spike_rows(life)
    index = index_of(life, cycle.channel)
    controls = life.trace.ordinary
    taken = -spikes.writes[:, which].sum(1)  # token, channel
    held = spikes.stream[:, cycle.middle]
    return evidence(
        measured={
            "step_down_blocks": list(cycle.step_down),
            "share_cancelled": float(-(cycle.writes[which] / cycle.value).sum()),
            "left_at_the_end": float(cycle.stream[-1] / cycle.value),
            "cv_held": _variation(held[:, index]),
            "cv_taken_back": _variation(taken[:, index]) if late else 0.0,
            "n_blocks": n_blocks,
        },
        control={
            "share_cancelled_ordinary_tokens": _typical(-ordinary.writes[:, which, index].sum(1) / cycle.value),
            "change_over_own_value_ordinary_channels": _typical((taken / held)[:, controls].abs()),
        },
    )


def few_channels(life: Lifecycle) -> Evidence | NotApplicable:
    """LC4: how many channels hold more than 100 medians half-way through the plateau, and the largest over the median.

    Control: the same on ordinary tokens; and the count at both ends of the plateau, since the median grows with depth.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    cycle, medians = life.main, life.trace.medians
    ordinary, spikes = ordinary_rows(life), spike_rows(life)
    if not len(ordinary):
        return NotApplicable("every token spikes, so there is no ordinary one to compare with")

    def count(rows: Rows, point: int) -> int:
        typical = _median(rows.stream[:, point, : life.trace.n_followed].abs())
        return int((typical > life.trace.threshold * medians[point]).sum())

    middle = cycle.middle
    return Evidence(
        measured={
            "n_spike_channels": len(cycle.channels),
            "top_over_median": abs(cycle.value) / float(medians[middle]),
            "d_model": life.trace.anatomy.d_model,
            "n_after_step_up": count(spikes, cycle.plateau[0]),
            "n_before_step_down": count(spikes, cycle.plateau[1]),
        },
        control={
            "n_channels_ordinary_tokens": count(ordinary, middle),
            "top_over_median_ordinary_tokens": float(ordinary.top_values[:, middle, 0].median() / medians[middle]),
        },
    )


def same_channels(life: Lifecycle) -> Evidence | NotApplicable:
    """LC5: mean Jaccard index of the top-3 channels, over pairs of spike tokens, half-way through the plateau.

    Control: the same over pairs of ordinary tokens.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    spikes, ordinary, middle = spike_rows(life), ordinary_rows(life), life.main.middle
    if min(len(spikes), len(ordinary)) < 2:
        return NotApplicable("a pair of spike tokens and a pair of ordinary ones are needed, and were not found")
    return Evidence(
        measured={"jaccard": _jaccard(spikes.top_channels[:, middle]), "n_tokens": len(spikes)},
        control={"jaccard_ordinary_tokens": _jaccard(ordinary.top_channels[:, middle]), "n_tokens": len(ordinary)},
    )


def fixed_ratios(life: Lifecycle) -> Evidence | NotApplicable:
    """LC6: coefficient of variation, over spike tokens, of the second channel's value over the first's.

    Controls: the same two channels on ordinary tokens; and on the spike tokens, the ratio of each ordinary channel to
    the first (median over channels), since a step-up block can fix every channel of its tokens. The ratio is given for
    the spike tokens at position 0 alone as well.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    if len(life.main.channels) < 2:
        return NotApplicable("only one channel spikes, and a ratio needs two")
    first, second = (index_of(life, channel) for channel in life.main.channels[:2])

    def ratio(rows: Rows, other: int = second) -> Tensor:
        at = rows.stream[:, life.main.middle]
        return (at[:, other] / at[:, first])[at[:, first] != 0]

    spikes = spike_rows(life)
    others = range(len(life.trace.channels))[life.trace.ordinary]
    measured = {
        "ratio_cv": _variation(ratio(spikes)),
        "ratio": float(ratio(spikes).median()),
        "channels": list(life.main.channels[:2]),
    }
    if (spikes.position == 0).sum() > 1:
        measured["ratio_cv_position0"] = _variation(ratio(spikes[spikes.position == 0]))
    return evidence(
        measured=measured,
        control={
            "ratio_cv_ordinary_tokens": _variation(ratio(ordinary_rows(life))),
            "ratio_cv_ordinary_channels": _typical(torch.tensor([_variation(ratio(spikes, i)) for i in others])),
        },
    )


def few_tokens(life: Lifecycle, decode) -> Evidence | NotApplicable:
    """LC7: the share of tokens that spike, of windows in which position 0 does, and the commonest spike tokens.

    Beside them the share of tokens with any entry above 100 medians at any depth: where it is much larger, a channel is
    large on ordinary tokens too, and what tells a spike token from them is its size alone.

    Controls: the mean share of windows in which another position spikes; and of the very tokens that spike at position
    0, the share that do so where they occur later in the windows (a BOS token does not, and then there is no such
    control).

    Args:
        life: as `find_lifecycle` returns it.
        decode: from a list of token ids to text, such as `model.tokenizer.decode`.
    """
    if life.main is None:
        return NotApplicable(life.reason)
    trace, spikes = life.trace, spike_rows(life)
    if trace.n_candidates > trace.rows.candidate.sum() and life.main.is_spike.sum() == trace.rows.candidate.sum():
        return NotApplicable(f"more than {len(spikes)} tokens spike, too many to follow; measure fewer windows")
    total = trace.n_windows * trace.length
    first = spikes.position == 0
    at_first = int(first.sum())
    same_elsewhere = int(torch.isin(trace.tokens[:, 1:], spikes.token[first]).sum())
    spiking_elsewhere = int(torch.isin(spikes.token[~first], spikes.token[first]).sum())
    control = {"other_positions_share": (len(spikes) - at_first) / max(1, total - trace.n_windows)}
    if same_elsewhere:
        control["same_tokens_elsewhere_share"] = spiking_elsewhere / same_elsewhere
        control["n_same_tokens_elsewhere"] = same_elsewhere
    return Evidence(
        measured={
            "spike_token_share": len(spikes) / total,
            "position0_share": at_first / trace.n_windows,
            "spike_tokens": [decode([token]) for token in _commonest(spikes.token)],
            "n_spike_tokens": len(spikes),
            "share_above_100_medians": trace.n_candidates / total,
        },
        control=control,
    )


def _typical(values: Tensor) -> float:
    """Median of the finite values; not a number where there are none."""
    finite = values[values.isfinite()]
    return float(finite.median()) if len(finite) else math.nan


def _variation(values: Float[Tensor, " token"]) -> float:
    """Coefficient of variation: standard deviation over absolute mean."""
    return float(values.std(correction=0) / values.mean().abs()) if len(values) else math.nan


def _commonest(tokens: Tensor, most: int = 5) -> list[int]:
    values, counts = tokens.unique(return_counts=True)
    return values[counts.argsort(descending=True, stable=True)][:most].tolist()


def index_of(life: Lifecycle, channel: int) -> int:
    """Where among the trace's followed channels a channel of the model is."""
    return int((life.trace.channels == channel).nonzero()[0])


def _jaccard(top: Tensor) -> float:
    """Mean over pairs of rows of |A n B| / |A u B|, of sets of TOP channels each; at most MAX_PAIRS pairs."""
    pairs = torch.tensor(list(combinations(range(min(len(top), 400)), 2)))
    pairs = pairs[:: -(-len(pairs) // MAX_PAIRS)]
    shared = (top[pairs[:, 0], :, None] == top[pairs[:, 1], None, :]).sum((1, 2))
    return float((shared / (2 * TOP - shared)).mean())


def first_step_up(life: Lifecycle) -> int | NotApplicable:
    """The main cycle's first FFN block that is step-up: it meets tokens that do not spike yet, a later one may not."""
    if life.main is None:
        return NotApplicable(life.reason)
    ffn = [block for block in life.main.step_up if block_kind(block) == "FFN"]
    if not ffn:
        return NotApplicable("no single FFN block writes a tenth of the spike, so there is none to take apart")
    return ffn[0]


def check_model(life: Lifecycle, about: Anatomy) -> None:
    """Raise ValueError where a life cycle was found in a model of another shape than this one's."""
    theirs = life.trace.anatomy
    if any(getattr(about, name) != getattr(theirs, name) for name in ("family", "n_layers", "d_model", "d_vocab")):
        raise ValueError(
            f"this life cycle was found in a {theirs.family} model of {theirs.n_layers} layers, {theirs.d_model} "
            f"channels and {theirs.d_vocab} tokens, not in this {about.family} model; trace this one."
        )


def check_windows(life: Lifecycle, tokens: Int[Tensor, "n length"], part: bool = False) -> None:
    """Raise ValueError unless these are the windows that a life cycle was found in, or a `part`: the first of them."""
    check_ids(tokens)
    theirs = life.trace.tokens[: len(tokens)] if part and tokens.ndim else life.trace.tokens
    if not tokens.numel() or not torch.equal(tokens.cpu().to(theirs.dtype), theirs):
        raise ValueError("these are not the windows that this life cycle was found in; trace these, or give those.")


def right_after(tokens: Bool[Tensor, "*window position"]) -> Bool[Tensor, "*window position"]:
    """The tokens that stand right after those, whether or not they are of them too."""
    return tokens.roll(1, dims=-1).index_fill(-1, torch.tensor(0), False)


def plateau_layers(cycle: Cycle) -> range:
    """The layers, from 0, whose attention reads a point of a cycle's plateau."""
    first, last = cycle.plateau
    return range((first + 1) // 2, min(last // 2 + 1, len(cycle.writes) // 2))  # no layer reads the last point


def is_spike(life: Lifecycle, cycle: Cycle) -> Bool[Tensor, "window position"]:
    """Which tokens of the windows are a cycle's spike tokens."""
    rows = life.trace.rows[cycle.is_spike]
    found = torch.zeros(life.trace.tokens.shape, dtype=torch.bool)
    found[rows.window, rows.position] = True
    return found


def find_spikes(model: TransformerBridge, life: Lifecycle, tokens: Int[Tensor, "n length"]) -> Bool[Tensor, "n length"]:
    """Which tokens of any windows are spike tokens of the main cycle, by the rule that found it; none without one.

    Args:
        model: the one that `life` was found in.
        life: as `find_lifecycle` returns it.
        tokens: windows or prompts of one length.

    Raises:
        ValueError: `tokens` is not two-dimensional or empty, a token is not in the model's vocabulary, or `life` was
            found in another model.
    """
    check_model(life, anatomy(model))
    check_tokens(life.trace.anatomy, tokens)
    found = torch.zeros(tokens.shape, dtype=torch.bool)
    cycle, trace = life.main, life.trace
    if cycle is None:
        return found
    sign = math.copysign(1, cycle.value)
    held = trace.rows.stream[:, cycle.peak, index_of(life, cycle.channel)] * sign
    _, least = _size_and_least(trace.rows, held, cycle.is_spike, STEP)
    for i, window in enumerate(tokens):

        def on_stream(point: int, h: Float[Tensor, "token d_model"], i: int = i) -> None:
            if point == cycle.peak:
                found[i] = (
                    h[:, cycle.channel] * sign >= torch.maximum(least, trace.threshold * h.abs().median())
                ).cpu()

        follow(model, trace.anatomy, window, on_stream)
    return found
