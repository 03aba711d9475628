"""TODO."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from spikesink.chain import trace
from spikesink.chain.amplifier import (
    Census,
    Reading,
    _weighted_cosine,
    largest,
    pair_cosines,
    r_squared,
    relative_error,
    write,
)
from spikesink.chain.experts import Routing
from spikesink.chain.lifecycle import Lifecycle
from spikesink.chain.trace import median
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence


@measure
def am1_near_identity(reading: Reading) -> Evidence | NotApplicable:
    """AM1: is the activation close to the identity on spike tokens? Cosine and norm ratio of act(g) and g, medians.

    The plain cosine counts every neuron alike; the weighted one counts each by what it adds to the spike channel.
    Controls: other tokens; and gates drawn at random, as large as the spike tokens' own, which say what a cosine is
    worth (half of their entries are negative, and the activation drops those; the weighting drops them too).
    """
    ffn = reading.ffn
    gate = functional.linear(reading.h, ffn.gate, ffn.gate_bias)
    up = functional.linear(reading.h, ffn.up, ffn.up_bias)
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    active = ffn.activation(random)
    values = {
        f"{name}_{who}": median(getattr(reading, field)[where])
        for name, field in (
            ("silu_cosine", "silu_cosine"),
            ("norm_ratio", "silu_ratio"),
            ("weighted_cosine", "weighted_cosine"),
        )
        for who, where in (("spike", reading.is_spike), ("other", ~reading.is_spike))
    }
    return make_evidence(
        measured={**values, "block": reading.block, "channel": reading.channel},
        control={
            "silu_cosine_random_gates": median(functional.cosine_similarity(active, random, dim=-1)),
            "norm_ratio_random_gates": median(active.norm(dim=-1) / random.norm(dim=-1)),
            "weighted_cosine_random_gates": median(_weighted_cosine(active, random, ffn.down[reading.channel] * up)),
        },
    )


@measure
def am2_high_gain(reading: Reading, life: Lifecycle, census: Census) -> Evidence | NotApplicable:
    """AM2: the spike channel's ||U_k||_F among all channels of its block.

    Controls: ordinary channels of the same block, and the same channel in FFN blocks that are no step (medians).
    """
    steps = {*life.main.step_up, *life.main.step_down}
    other_blocks = [b for b in census.blocks if b not in steps]

    def typical(pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
        ranks = torch.tensor([census.rank_in_block(*pair) for pair in pairs], dtype=torch.float)
        return median(ranks), median(torch.tensor([census.over_median(*pair) for pair in pairs]))

    rank, over = typical([(reading.block, channel) for channel in reading.ordinary.channels])
    control = {"gain_rank_ordinary_channels": rank, "gain_over_median_ordinary_channels": over}
    if other_blocks:
        rank, over = typical([(block, reading.channel) for block in other_blocks])
        control |= {"gain_rank_other_blocks": rank, "gain_over_median_other_blocks": over}
    return make_evidence(
        measured={
            "gain_rank": census.rank_in_block(reading.block, reading.channel),
            "gain_over_median": census.over_median(reading.block, reading.channel),
            "block": reading.block,
            "channel": reading.channel,
        },
        control=control,
    )


@measure
def am3_rank_one(reading: Reading) -> Evidence | NotApplicable:
    """AM3: the top eigenvalue of S_k, the next, and the top one's share of the sum of squares of all.

    Controls: the same share of ordinary channels of the block; and of the other spike channels, which are no control
    but the same question put to them (medians).
    """
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
def am4_shared_direction(reading: Reading) -> Evidence | NotApplicable:
    """AM4: do the spike channels share s*? |cos| of their top eigenvectors, over pairs.

    Beside the smallest over all pairs: the median, and the smallest among the three largest channels. And since a
    channel can be written along s* without s* being its *top* eigenvector: what s* alone, by s*'S_k s* (s*.h~)^2,
    predicts of the write into each spike channel, over the write (median over spike tokens): how far the typical
    channel is from 1, and the smallest and the largest. Control: pairs of ordinary channels (median and largest), and
    the same ratios for them.
    """
    if len(reading.spike.channels) < 2:
        return NotApplicable("only one channel spikes, so there is no direction to share")
    spikes, others = pair_cosines(reading.spike.vectors), pair_cosines(reading.ordinary.vectors)
    ours, theirs = _along(reading, reading.spike.channels), _along(reading, reading.ordinary.channels)
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
def am5_quadratic_form(reading: Reading) -> Evidence | NotApplicable:
    """AM5: lambda (s*.h~)^2 against what the block writes: median relative error over spike tokens, R^2 over all.

    Controls: the same for ordinary channels, each by its own top eigenpair, on the spike tokens (median over channels);
    and the error on other tokens.
    """
    spikes, written, ordinary = reading.is_spike, reading.write, reading.ordinary
    theirs = write(reading.ffn, reading.h)[:, list(ordinary.channels)]
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
            "median_relative_error_ordinary_channels": relative_error(predicted, theirs),
            "median_relative_error_other_tokens": relative_error(reading.rank_one[~spikes], written[~spikes]),
        },
    )


@measure
def am6_alignment(reading: Reading) -> Evidence | NotApplicable:
    """AM6: |cos(s*, h~)| of spike tokens and of all others, medians.

    A quadratic form does not know a vector from its opposite, but the gates do: beside it, the share of other tokens
    that lie on the spike tokens' side at all.
    Control: of the spike tokens with the top eigenvectors of ordinary channels; and 1/sqrt(d), what a random direction
    would give.
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
        control={
            "cosine_spike_ordinary_channels": median(with_others),
            "one_over_root_d": 1 / math.sqrt(reading.d_model),
        },
    )


def am7_weights_alone(life: Lifecycle, found: Census | NotApplicable, n: int = 10) -> Evidence | NotApplicable:
    """AM7: where the census ranks the first channel in its step-up and step-down FFN blocks (the worst of each).

    How much that list finds is another matter than whether it misses them: beside it, how many of the top 1% of pairs
    are a spike channel in a step block. Controls: the median rank of that channel in the other FFN blocks, and of
    ordinary channels in the step blocks.
    """
    if isinstance(found, NotApplicable):
        return found
    if life.main is None:
        return NotApplicable(life.reason)
    channel = life.main.channel
    up, down = ([b for b in blocks if not b.is_attention] for blocks in (life.main.step_up, life.main.step_down))
    if not up or not down:
        return NotApplicable(f"no FFN block is step-{'down' if up else 'up'}, so there is no pair to look for")
    ranks = {block: found.rank(block, channel) for block in found.blocks}
    ordinary = life.trace.channels[life.trace.ordinary].tolist()
    others = [found.rank(block, c) for block in (*up, *down) for c in ordinary]
    elsewhere = [rank for block, rank in ranks.items() if block not in (*up, *down)]
    top = found.top(found.gain.numel() // 100)
    return make_evidence(
        measured={
            "census_top": [list(pair) for pair in found.top(n)],
            "step_up_rank": max(ranks[b] for b in up),
            "step_down_rank": max(ranks[b] for b in down),
            "step_up_ranks": [[b, ranks[b]] for b in up],
            "step_down_ranks": [[b, ranks[b]] for b in down],
            "n_pairs": found.gain.numel(),
            "top_pairs": len(top),
            "step_pairs_among_them": sum(b in (*up, *down) and c in life.main.channels for b, c, _ in top),
        },
        control={
            "rank_same_channel_other_blocks": median(torch.tensor(elsewhere, dtype=torch.float)),
            "rank_ordinary_channels": median(torch.tensor(others, dtype=torch.float)),
        },
    )


@measure
def x_am8_output_norm(reading: Reading) -> Evidence | NotApplicable:
    """X-AM8: where a norm follows the block, whether its scale makes the spike rather than the block's own gain.

    After that norm the channel holds sqrt(d) scale_k F_k / |F|: the size of F is gone, its direction is left. Measured:
    the scale of the channel over the median scale, and |F_k| / |F| on spike tokens. Controls: the largest scale of an
    ordinary channel over the median, and |F_k| / |F| on other tokens.
    """
    scale = reading.ffn.post_scale
    if scale is None:
        return NotApplicable("no norm stands between the block and the stream")
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


def _along(reading: Reading, channels: Sequence[int]) -> Float[Tensor, " channel"]:
    """For each channel, what s* alone predicts of a write, over the write: median over spike tokens."""
    s, ffn, at = reading.spike.vectors[0], reading.ffn, list(channels)
    along = ((ffn.gate @ s) * (ffn.up @ s)) @ ffn.down[at].T  # s*' S_k s* of each
    predicted = along * (reading.h @ s)[:, None] ** 2
    return (predicted / write(ffn, reading.h)[:, at]).quantile(0.5, dim=0)


@measure
def x_mx1_same_choice(routing: Routing) -> Evidence | NotApplicable:
    """X-MX1: whether the router sends all spike tokens to the same expert first, and other tokens elsewhere.

    Controls: what an even choice would give, and the expert's mean weight on other tokens.
    """
    first, n = routing.first_choice, len(routing.experts)
    counts = torch.bincount(first[routing.is_spike], minlength=n)
    expert = int(counts.argmax())
    spike, other = (float(routing.weight[where, expert].mean()) for where in (routing.is_spike, ~routing.is_spike))
    return make_evidence(
        measured={
            "expert": routing.experts[expert],
            "block": routing.block,
            "share_of_spike_tokens": float(counts[expert] / counts.sum()),
            "share_of_other_tokens": float((first[~routing.is_spike] == expert).double().mean()),
            "weight": spike,
            "n_experts": n,
            "n_chosen": int((routing.weight > 0).sum(1).max()),
            "n_spike_tokens": int(routing.is_spike.sum()),
        },
        control={"share_if_even": 1 / n, "weight_other_tokens": other},
    )


@measure
def x_mx2_one_writer(routing: Routing) -> Evidence | NotApplicable:
    """X-MX2: whether one expert writes the spike, and whether it is the one of largest gain in the spike's channel.

    `share_written` is of the block's own write. `share_of_all_experts` is what the experts that the router chooses from
    write together: 1 where there are no others, which checks that they were read as the model runs them. Control: the
    same expert's rank by gain in ordinary channels (median).
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
        control={"gain_rank_ordinary_channels": trace.median(rank_ordinary.float())},
    )


def experts_together(chosen: Evidence | NotApplicable, writer: Evidence | NotApplicable) -> Evidence | NotApplicable:
    """What both say, for one paragraph; the expert that writes is `writer_expert`."""
    if isinstance(chosen, NotApplicable) or isinstance(writer, NotApplicable):
        return chosen if isinstance(chosen, NotApplicable) else writer
    renamed = {"writer_expert" if key == "expert" else key: value for key, value in writer.measured.items()}
    return Evidence({**renamed, **chosen.measured}, {**writer.control, **chosen.control})
