"""AM1 to AM7 and X-AM8: the step-up block as a directional quadratic amplifier; X-MX1 and X-MX2: where experts write.

Values of spike tokens are medians over them.
"""

import math
from collections.abc import Sequence

import torch
from torch.nn import functional

from spikesink.chain.amplifier import (
    Census,
    Reading,
    compute_write,
    draw_gates,
    largest,
    pair_cosines,
    predict_alone,
    r_squared,
    relative_error,
)
from spikesink.chain.experts import Routing
from spikesink.chain.lifecycle import Lifecycle
from spikesink.chain.trace import median
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence


@measure
def am1_near_identity(reading: Reading) -> Evidence:
    """AM1: is the activation close to the identity on spike tokens? Cosine and norm ratio of act(g) and g.

    The weighted cosine counts each neuron by what it adds to the spike channel. Gates drawn at random say what a cosine
    is worth.
    """
    fields = {"silu_cosine": "silu_cosine", "norm_ratio": "silu_ratio", "weighted_cosine": "weighted_cosine"}
    random, values = draw_gates(reading), {"block": reading.block, "channel": reading.channel}
    for name, field in fields.items():
        values[f"{name}_spike"] = median(getattr(reading, field)[reading.is_spike])
        values[f"{name}_other"] = median(getattr(reading, field)[~reading.is_spike])
    return make_evidence(values, {f"{name}_random_gates": median(random[field]) for name, field in fields.items()})


@measure
def am2_high_gain(reading: Reading, life: Lifecycle, census: Census) -> Evidence:
    """AM2: the spike channel's ||U_k||_F among all channels of its block. Controls are medians."""
    steps = {*life.main.step_up, *life.main.step_down}
    controls = {
        "ordinary_channels": [(reading.block, channel) for channel in reading.ordinary.channels],
        "other_blocks": [(block, reading.channel) for block in census.blocks if block not in steps],
    }
    control = {}
    for name, pairs in controls.items():
        control[f"gain_rank_{name}"] = _median([census.rank_in_block(*pair) for pair in pairs])
        control[f"gain_over_median_{name}"] = _median([census.over_median(*pair) for pair in pairs])
    return make_evidence(
        {
            "gain_rank": census.rank_in_block(reading.block, reading.channel),
            "gain_over_median": census.over_median(reading.block, reading.channel),
            "block": reading.block,
            "channel": reading.channel,
        },
        control,
    )


@measure
def am3_rank_one(reading: Reading) -> Evidence:
    """AM3: the top eigenvalue of S_k, the next, and the top one's share of the sum of squares of all."""
    first, second = reading.pairs.values.tolist()
    measured = {
        "top_eigenvalue": first,
        "second_eigenvalue": second,
        "rank_one_share": float(reading.spike.shares[0]),
        "form_norm": float(reading.spike.norms[0]),
    }
    if len(reading.spike.channels) > 1:
        measured["rank_one_share_other_spike_channels"] = median(reading.spike.shares[1:])
    return make_evidence(measured, {"rank_one_share_ordinary_channels": median(reading.ordinary.shares)})


@measure
def am4_shared_direction(reading: Reading) -> Evidence:
    """AM4: do the spike channels share s*? |cos| of their top eigenvectors, over pairs.

    A channel can be written along s* without s* being its *top* eigenvector. So beside it, what s* alone predicts of
    the write into each spike channel, over that write: how far the typical one is from 1, the smallest and the largest.
    """
    if len(reading.spike.channels) < 2:
        raise NotApplicable("only one channel spikes, so there is no direction to share")
    spikes, others = pair_cosines(reading.spike.vectors), pair_cosines(reading.ordinary.vectors)
    ours, theirs = (predict_alone(reading, found.channels) for found in (reading.spike, reading.ordinary))
    return make_evidence(
        measured={
            "cosine_min": float(spikes.min()),
            "cosine_control": median(others),
            "cosine_median": median(spikes),
            "cosine_min_top3": float(pair_cosines(reading.spike.vectors[:3]).min()),
            "n_spike_channels": len(reading.spike.channels),
            "misfit_of_prediction": median((ours - 1).abs()),
            "predicted_over_written_range": [float(ours.min()), float(ours.max())],
        },
        control={
            "cosine_max_ordinary_channels": largest(others),
            "misfit_of_prediction_ordinary_channels": median((theirs - 1).abs()),
            "predicted_over_written_range_ordinary_channels": [float(theirs.min()), float(theirs.max())],
        },
    )


@measure
def am5_quadratic_form(reading: Reading) -> Evidence:
    """AM5: lambda (s*.h~)^2 against what the block writes: median relative error over spike tokens, R^2 over all.

    Ordinary channels are predicted each by its own top eigenpair, on the spike tokens.
    """
    spikes, written, ordinary = reading.is_spike, reading.write, reading.ordinary
    into_ordinary = compute_write(reading.ffn, reading.h)[:, list(ordinary.channels)]
    predicted = ordinary.values.float() * (reading.h @ ordinary.vectors.T) ** 2
    measured = {
        "median_relative_error": relative_error(reading.rank_one[spikes], written[spikes]),
        "r2": r_squared(reading.rank_one, written),
        "median_relative_error_quadratic": relative_error(reading.quadratic[spikes], written[spikes]),
        "typical_write": median(written[spikes]),
    }
    if int(spikes.sum()) > 2 and float(written[spikes].var()) > 0:
        measured["r2_spike_tokens"] = r_squared(reading.rank_one[spikes], written[spikes])
    return make_evidence(
        measured=measured,
        control={
            "median_relative_error_ordinary_channels": relative_error(predicted, into_ordinary),
            "median_relative_error_other_tokens": relative_error(reading.rank_one[~spikes], written[~spikes]),
        },
    )


@measure
def am6_alignment(reading: Reading) -> Evidence:
    """AM6: |cos(s*, h~)| of spike tokens and of all others, medians.

    A quadratic form does not know a vector from its opposite, but the gates do: beside it, the share of other tokens
    that lie on the spike tokens' side at all.
    """
    with_others = (functional.normalize(reading.h, dim=-1) @ reading.ordinary.vectors.T).abs()
    spike, other = reading.cosine[reading.is_spike], reading.cosine[~reading.is_spike]
    return make_evidence(
        measured={
            "cosine_spike": median(spike.abs()),
            "cosine_other": median(other.abs()),
            "cosine_other_max": largest(other.abs()),
            "same_side_spike": float((spike > 0).double().mean()),
            "same_side_other": float((other > 0).double().mean()),
        },
        control={"cosine_spike_ordinary_channels": median(with_others), "one_over_root_d": reading.d_model**-0.5},
    )


@measure
def am7_weights_alone(life: Lifecycle, census: Census, n: int = 10) -> Evidence:
    """AM7: where the census ranks the first channel in its step-up and step-down FFN blocks (the worst of each).

    Beside it, how much that list finds: how many of the top 1% of pairs are a spike channel in a step block.
    """
    main = life.require_main("writes")
    up, down = ([b for b in blocks if not b.is_attention] for blocks in (main.step_up, main.step_down))
    if not up or not down:
        raise NotApplicable(f"no FFN block is step-{'down' if up else 'up'}, so there is no pair to look for")
    ranks = {block: census.rank(block, main.channel) for block in census.blocks}
    ordinary = life.trace.channels[life.trace.ordinary].tolist()
    top = census.top(census.gain.numel() // 100)
    return make_evidence(
        measured={
            "census_top": [list(pair) for pair in census.top(n)],
            "step_up_rank": max(ranks[b] for b in up),
            "step_down_rank": max(ranks[b] for b in down),
            "step_up_ranks": [[b, ranks[b]] for b in up],
            "step_down_ranks": [[b, ranks[b]] for b in down],
            "n_pairs": census.gain.numel(),
            "top_pairs": len(top),
            "step_pairs_among_them": sum(b in (*up, *down) and c in main.channels for b, c, _ in top),
        },
        control={
            "rank_same_channel_other_blocks": _median([ranks[b] for b in ranks if b not in (*up, *down)]),
            "rank_ordinary_channels": _median([census.rank(b, c) for b in (*up, *down) for c in ordinary]),
        },
    )


@measure
def x_am8_output_norm(reading: Reading) -> Evidence:
    """X-AM8: where a norm follows the block, whether its scale makes the spike rather than the block's own gain.

    After that norm the channel holds sqrt(d) scale_k F_k / |F|: the size of F is gone, its direction is left. Measured:
    scale_k over the median scale, and |F_k| / |F| on spike tokens.
    """
    scale = reading.ffn.post_scale
    if scale is None:
        raise NotApplicable("no norm stands between the block and the stream")
    size = scale.abs() / scale.abs().median()
    share = reading.write.abs() / reading.size
    return make_evidence(
        measured={
            "scale_over_median": float(size[reading.channel]),
            "share_of_norm_spike": median(share[reading.is_spike]),
            "share_of_norm_other": median(share[~reading.is_spike]),
            "largest_possible": math.sqrt(reading.d_model) * float(scale[reading.channel].abs()),
            "block": reading.block,
            "channel": reading.channel,
        },
        control={
            "scale_over_median_ordinary_channels": float(size[list(reading.ordinary.channels)].max()),
            "share_of_norm_random_direction": 1 / math.sqrt(reading.d_model),
        },
    )


@measure
def x_mx1_same_choice(routing: Routing) -> Evidence:
    """X-MX1: whether the router sends all spike tokens to the same expert first, and other tokens elsewhere."""
    first, spikes, n = routing.first_choice, routing.is_spike, len(routing.experts)
    expert = int(torch.bincount(first[spikes]).argmax())
    return make_evidence(
        measured={
            "expert": routing.experts[expert],
            "block": routing.block,
            "share_of_spike_tokens": float((first[spikes] == expert).double().mean()),
            "share_of_other_tokens": float((first[~spikes] == expert).double().mean()),
            "weight": float(routing.weight[spikes, expert].mean()),
            "n_experts": n,
            "n_chosen": int((routing.weight > 0).sum(1).max()),
            "n_spike_tokens": int(spikes.sum()),
        },
        control={"share_if_even": 1 / n, "weight_other_tokens": float(routing.weight[~spikes, expert].mean())},
    )


@measure
def x_mx2_one_writer(routing: Routing) -> Evidence:
    """X-MX2: whether one expert writes the spike, and whether it is the one of largest gain in the spike's channel.

    `share_written` is of the block's own write; `share_of_all_experts` what those that the router chooses from write
    together, 1 where there are no others.
    """
    expert = routing.writer
    rank_ordinary = (routing.gain_ordinary > routing.gain_ordinary[:, [expert]]).sum(1) + 1
    return make_evidence(
        measured={
            "expert": routing.experts[expert],
            "block": routing.block,
            "channel": routing.channel,
            "share_written": float((routing.write[:, expert] / routing.own).mean()),
            "share_of_all_experts": float((routing.write.sum(1) / routing.own).mean()),
            "gain_rank": int((routing.gain > routing.gain[expert]).sum()) + 1,
            "gain_over_median": float(routing.gain[expert] / routing.gain.median()),
            "experts_every_token_passes": routing.shares,
        },
        control={"gain_rank_ordinary_channels": median(rank_ordinary.float())},
    )


def _median(values: Sequence[int | float]) -> float:
    return median(torch.tensor(values, dtype=torch.float))
