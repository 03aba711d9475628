"""LC1 to LC7: who writes the spike, keeps it and cancels it; in which channels, of which tokens.

A share is of the plateau value: what the first channel holds half-way through the plateau.
"""

from collections.abc import Callable

import torch
from jaxtyping import Int
from torch import Tensor

from spikesink.chain.lifecycle import STEP_BLOCKS, Lifecycle, index_of, late_step_down, ordinary_rows, spike_rows
from spikesink.chain.trace import TOP, Rows, variation
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence

MAX_PAIRS = 2000  # of spike tokens, for the Jaccard index


@measure
def lc1_step_up(life: Lifecycle) -> Evidence:
    """LC1: which blocks write the spike, and what share the three largest writes of early FFN blocks make of it.

    Of attention blocks, the largest write of either sign in the first half or before the step-down. A step-up block can
    dominate every channel of its tokens: what sets the spike channels apart is the size.
    """
    cycle, n_blocks, controls = life.require_main("writes"), life.trace.anatomy.n_blocks, life.trace.ordinary
    share = cycle.writes / cycle.value
    early = [b for b in cycle.step_up if not b.is_attention and b <= n_blocks // 2]
    which = torch.tensor(sorted(early, key=lambda b: -share[b - 1])[:STEP_BLOCKS], dtype=torch.long) - 1
    spikes = spike_rows(life)
    held = spikes.stream[:, cycle.middle, controls]  # token, channel
    same_channel = ordinary_rows(life).writes[:, which, index_of(life, cycle.channel)].sum(1)  # token
    other_channels = spikes.writes[:, which][..., controls].sum(1)  # token, channel
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


@measure
def lc2_plateau(life: Lifecycle) -> Evidence:
    """LC2: the median share that a block between step-up and step-down writes, whatever its sign."""
    cycle = life.require_main("writes")
    first, last = cycle.plateau
    if first == last:
        raise NotApplicable("no block lies between the last step-up and the first step-down block")
    spikes = spike_rows(life)
    writes = spikes.writes[:, first:last].abs()  # row, block, channel; block b is at b - 1
    ratio = (writes / spikes.stream[:, cycle.middle].abs()[:, None])[..., life.trace.ordinary]
    return make_evidence(
        measured={
            "plateau_write_ratio": float((writes[..., index_of(life, cycle.channel)] / abs(cycle.value)).median()),
            "first_point": first,
            "last_point": last,
            "value_at_first_point": float(cycle.stream[first]),
            "value_at_last_point": float(cycle.stream[last]),
        },
        control={"write_ratio_ordinary_channels": _typical(ratio)},
    )


@measure
def lc3_step_down(life: Lifecycle) -> Evidence:
    """LC3: which blocks cancel the spike, and what share the late FFN blocks among them take back."""
    cycle, spikes, late = life.require_main("writes"), spike_rows(life), late_step_down(life)
    which, index = torch.tensor(late, dtype=torch.long) - 1, index_of(life, cycle.channel)
    held, taken = spikes.stream[:, cycle.middle], -spikes.writes[:, which].sum(1)  # token, channel
    from_others = -ordinary_rows(life).writes[:, which, index].sum(1)
    return make_evidence(
        measured={
            "step_down_blocks": list(cycle.step_down),
            "share_cancelled": float(-(cycle.writes[which] / cycle.value).sum()),
            "left_at_the_end": float(cycle.stream[-1] / cycle.value),
            "cv_held": variation(held[:, index]),
            "cv_taken_back": variation(taken[:, index]) if late else 0.0,
            "n_blocks": life.trace.anatomy.n_blocks,
        },
        control={
            "share_cancelled_ordinary_tokens": _typical(from_others / cycle.value),
            "change_over_own_value_ordinary_channels": _typical((taken / held)[:, life.trace.ordinary].abs()),
        },
    )


@measure
def lc4_few_channels(life: Lifecycle) -> Evidence:
    """LC4: how many channels hold more than 100 medians half-way through the plateau, and the largest over the median.

    Also at both ends of the plateau, since the median grows with depth.
    """
    cycle, medians, ordinary = life.require_main(), life.trace.medians, ordinary_rows(life)
    if not len(ordinary):
        raise NotApplicable("every token spikes, so there is no ordinary one to compare with")

    def count(rows: Rows, point: int) -> int:
        typical = rows.stream[:, point, : life.trace.n_followed].abs().quantile(0.5, dim=0)
        return int((typical > life.trace.threshold * medians[point]).sum())

    middle, spikes = cycle.middle, spike_rows(life)
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


@measure
def lc5_same_channels(life: Lifecycle) -> Evidence:
    """LC5: mean Jaccard index of the top-3 channels, over pairs of spike tokens, half-way through the plateau."""
    middle, spikes, ordinary = life.require_main().middle, spike_rows(life), ordinary_rows(life)
    if min(len(spikes), len(ordinary)) < 2:
        raise NotApplicable("a pair of spike tokens and a pair of ordinary ones are needed, and were not found")
    return Evidence(
        measured={"jaccard": _jaccard(spikes.top_channels[:, middle]), "n_tokens": len(spikes)},
        control={"jaccard_ordinary_tokens": _jaccard(ordinary.top_channels[:, middle]), "n_tokens": len(ordinary)},
    )


@measure
def lc6_fixed_ratios(life: Lifecycle) -> Evidence:
    """LC6: coefficient of variation, over spike tokens, of the second channel's value over the first's.

    Controls: ordinary tokens; and the ratio of each ordinary channel to the first (median over channels), since a
    step-up block can fix every channel of its tokens.
    """
    cycle = life.require_main()
    if len(cycle.channels) < 2:
        raise NotApplicable("only one channel spikes, and a ratio needs two")
    first, second = (index_of(life, channel) for channel in cycle.channels[:2])

    def ratio(rows: Rows, other: int = second) -> Tensor:
        held = rows.stream[:, cycle.middle]
        return (held[:, other] / held[:, first])[held[:, first] != 0]

    spikes = spike_rows(life)
    controls = range(len(life.trace.channels))[life.trace.ordinary]
    measured = {
        "ratio_cv": variation(ratio(spikes)),
        "ratio": float(ratio(spikes).median()),
        "channels": list(cycle.channels[:2]),
    }
    if (spikes.position == 0).sum() > 1:
        measured["ratio_cv_position0"] = variation(ratio(spikes[spikes.position == 0]))
    return make_evidence(
        measured=measured,
        control={
            "ratio_cv_ordinary_tokens": variation(ratio(ordinary_rows(life))),
            "ratio_cv_ordinary_channels": _typical(torch.tensor([variation(ratio(spikes, i)) for i in controls])),
        },
    )


@measure
def lc7_few_tokens(life: Lifecycle, decode: Callable[[list[int]], str]) -> Evidence:
    """LC7: the share of tokens that spike, of windows in which position 0 does, and the commonest spike tokens.

    Where the share of tokens above 100 medians is much larger, a channel is large on ordinary tokens too, and only its
    size tells a spike token from them. `same_tokens_*`: of the tokens that spike at position 0, how many do where they
    occur later (a BOS token does not, and has no such control).
    """
    trace, main = life.trace, life.require_main()
    spikes = spike_rows(life)
    if trace.n_candidates > trace.rows.candidate.sum() and main.is_spike.sum() == trace.rows.candidate.sum():
        raise NotApplicable(f"more than {len(spikes)} tokens spike, too many to follow; measure fewer windows")
    total, first = trace.tokens.numel(), spikes.position == 0
    n_first = int(first.sum())
    same_elsewhere = int(torch.isin(trace.tokens[:, 1:], spikes.token[first]).sum())
    control = {"other_positions_share": (len(spikes) - n_first) / max(1, total - trace.n_windows)}
    if same_elsewhere:
        spiking_elsewhere = int(torch.isin(spikes.token[~first], spikes.token[first]).sum())
        control["same_tokens_elsewhere_share"] = spiking_elsewhere / same_elsewhere
        control["n_same_tokens_elsewhere"] = same_elsewhere
    tokens, counts = spikes.token.unique(return_counts=True)
    commonest = tokens[counts.argsort(descending=True, stable=True)][:5].tolist()
    return Evidence(
        measured={
            "spike_token_share": len(spikes) / total,
            "position0_share": n_first / trace.n_windows,
            "spike_tokens": [decode([token]) for token in commonest],
            "n_spike_tokens": len(spikes),
            "share_above_100_medians": trace.n_candidates / total,
        },
        control=control,
    )


def _typical(values: Tensor) -> float:
    """Median of the finite values; nan where there are none."""
    return float(values[values.isfinite()].median())


def _jaccard(top: Int[Tensor, "token top"]) -> float:
    """Mean over pairs of tokens of |A n B| / |A u B|, of sets of TOP channels each; at most MAX_PAIRS pairs."""
    pairs = torch.combinations(torch.arange(min(len(top), 400)))
    a, b = pairs[:: -(-len(pairs) // MAX_PAIRS)].T
    shared = (top[a, :, None] == top[b, None, :]).sum((1, 2))
    return float((shared / (2 * TOP - shared)).mean())
