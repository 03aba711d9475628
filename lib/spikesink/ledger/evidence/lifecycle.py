"""TODO."""

import math
from itertools import combinations

import torch
from jaxtyping import Float
from torch import Tensor

from spikesink.chain.lifecycle import (
    MAX_PAIRS,
    STEP_BLOCKS,
    Lifecycle,
    _median,
    index_of,
    late_step_down,
    ordinary_rows,
    spike_rows,
)
from spikesink.chain.trace import TOP, Rows
from spikesink.common import NotApplicable
from spikesink.ledger.claims import Evidence, make_evidence


def lc1_step_up(life: Lifecycle) -> Evidence | NotApplicable:
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
    early = [b for b in cycle.step_up if not b.is_attention and b <= n_blocks // 2]
    which = torch.tensor(sorted(early, key=lambda b: -share[b - 1])[:STEP_BLOCKS], dtype=torch.long) - 1
    ordinary, spikes, controls = ordinary_rows(life), spike_rows(life), life.trace.ordinary
    same_channel = ordinary.writes[:, which, index_of(life, cycle.channel)].sum(1)  # token
    other_channels = spikes.writes[:, which][..., controls].sum(1)  # token, channel
    held = spikes.stream[:, cycle.middle, controls]
    return make_evidence(
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


def lc2_plateau(life: Lifecycle) -> Evidence | NotApplicable:
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
    return make_evidence(
        measured={
            "plateau_write_ratio": float((writes[..., index].abs() / abs(cycle.value)).median()),
            "first_point": cycle.plateau[0],
            "last_point": cycle.plateau[1],
            "value_at_first_point": float(cycle.stream[cycle.plateau[0]]),
            "value_at_last_point": float(cycle.stream[cycle.plateau[1]]),
        },
        control={"write_ratio_ordinary_channels": _typical(ratio[..., life.trace.ordinary])},
    )


def lc3_step_down(life: Lifecycle) -> Evidence | NotApplicable:
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
    return make_evidence(
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


def lc4_few_channels(life: Lifecycle) -> Evidence | NotApplicable:
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


def lc5_same_channels(life: Lifecycle) -> Evidence | NotApplicable:
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


def lc6_fixed_ratios(life: Lifecycle) -> Evidence | NotApplicable:
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
    return make_evidence(
        measured=measured,
        control={
            "ratio_cv_ordinary_tokens": _variation(ratio(ordinary_rows(life))),
            "ratio_cv_ordinary_channels": _typical(torch.tensor([_variation(ratio(spikes, i)) for i in others])),
        },
    )


def lc7_few_tokens(life: Lifecycle, decode) -> Evidence | NotApplicable:
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


def _jaccard(top: Tensor) -> float:
    """Mean over pairs of rows of |A n B| / |A u B|, of sets of TOP channels each; at most MAX_PAIRS pairs."""
    pairs = torch.tensor(list(combinations(range(min(len(top), 400)), 2)))
    pairs = pairs[:: -(-len(pairs) // MAX_PAIRS)]
    shared = (top[pairs[:, 0], :, None] == top[pairs[:, 1], None, :]).sum((1, 2))
    return float((shared / (2 * TOP - shared)).mean())
