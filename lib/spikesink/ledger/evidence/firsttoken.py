"""What the first token says to claims TK1 to TK4."""

import math

from jaxtyping import Int
from torch import Tensor

from spikesink.chain.firsttoken import Delimiters, Elsewhere, Probe
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.model.paths import StaticMap


def tk1_nearly_any(
    probe: Probe | NotApplicable, counts: Int[Tensor, " vocabulary"], elsewhere: Elsewhere | NotApplicable
) -> Evidence | NotApplicable:
    """TK1: how much of the vocabulary spikes at position 0; and of the text, tokens counted as often as they occur."""
    if isinstance(probe, NotApplicable):
        return probe
    control = {"share_before_step_up": float((probe.before >= probe.threshold).double().mean())}
    if isinstance(elsewhere, Elsewhere):
        control["share_after_a_text"] = _mean_share(elsewhere)
    times = counts[probe.tokens]
    return Evidence(
        measured={
            "spiking": int(probe.spiking.sum()),
            "vocabulary": len(probe.tokens),
            "share": float(probe.spiking.double().mean()),
            "threshold": probe.threshold,
            "share_of_text": float((times * probe.spiking).sum() / times.sum().clamp(min=1)),
            "median_value": float(probe.value.median()),
        },
        control=control,
    )


def _mean_share(elsewhere: Elsewhere) -> float:
    return sum(share for _, share in elsewhere.later) / len(elsewhere.later)


@measure
def tk2_static_map(static_map: StaticMap) -> Evidence:
    """TK2: attention's write at position 0 against the fixed map, in every layer of every window, the largest error."""
    layers, windows = static_map.at_first.shape
    return Evidence(
        measured={"max_relative_error": float(static_map.at_first.max()), "layers": layers, "windows": windows},
        control={"median_relative_error_later_positions": float(static_map.later.median())},
    )


@measure
def tk3_not_elsewhere(elsewhere: Elsewhere) -> Evidence:
    """TK3: of tokens that spike at position 0, how many spike later, after a text: mean over positions."""
    return Evidence(
        measured={
            "share_elsewhere": _mean_share(elsewhere),
            "share_by_position": [list(pair) for pair in elsewhere.later],
            "n_tokens": elsewhere.n_tokens,
            "special_tokens": elsewhere.special,
            "special_tokens_that_spike_anywhere": list(elsewhere.anywhere),
        },
        control={"share_at_position_0": elsewhere.share[0]},
    )


@measure
def tk4_delimiters(delimiters: Delimiters) -> Evidence:
    """TK4: do delimiters that spike attend to themselves, and do their embeddings lie near the norm's scale?

    `n_types` says how many different tokens a verdict rests on.
    """
    attention, cosine = delimiters.self_attention, delimiters.scale_cosine
    compared = {
        "self_attention_delimiters": attention["spiking"],
        "self_attention_other": attention["other"],
        "scale_cosine_delimiters": cosine["spiking"],
        "scale_cosine_other": cosine["other"],
    }
    if not all(map(math.isfinite, compared.values())):
        raise NotApplicable("no word that does not spike stands where the spiking delimiters do")
    return make_evidence(
        measured={
            **compared,
            "n_spiking_delimiters": delimiters.n["spiking"],
            "n_types": delimiters.n_types,
            "n_spiking_words": delimiters.n["words"],
            "channel": delimiters.cycle.channel,
            "step_up_blocks": list(delimiters.cycle.step_up),
        },
        control={
            "n_quiet_delimiters": delimiters.n["quiet"],
            "self_attention_quiet_delimiters": attention["quiet"],
            "scale_cosine_quiet_delimiters": cosine["quiet"],
            "self_attention_spiking_words": delimiters.where_words_spike["words"],
            "self_attention_other_where_words_spike": delimiters.where_words_spike["other"],
            "scale_cosine_spiking_words": cosine["words"],
        },
    )
