"""TODO."""

import math
from collections.abc import Sequence
from functools import wraps

from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.patching.cuts import (
    _SPIKE_CONTROLS,
    CUTS,
    FEW_SINKS,
    INDIFFERENT,
    NO_CHANGE,
    NO_SINK,
    SAME,
    Broken,
    Doses,
)
from spikesink.patching.outcome import CLEAN, Outcome


def _made_of(*names: str, of_sinks: bool = False):
    """A measure of some cuts: it gets their outcomes, where a model has them all, and sinks if it is about those."""

    def made(function):
        @measure
        @wraps(function)
        def measured(broken: Broken) -> Evidence | NotApplicable:
            if of_sinks and broken.clean.sink_ratio <= FEW_SINKS:
                return NotApplicable(NO_SINK)
            if missing := [name for name in names if name not in broken.outcomes]:
                return NotApplicable(f"this model does not have what is cut here ({CUTS[missing[0]].name})")
            return function(broken, *(broken.outcomes[name] for name in names))

        return measured

    return made


def _facts(broken: Broken) -> dict[str, int]:
    n, length = broken.tokens.shape
    return {"n_windows": n, "length": length, "n_spike_tokens": int(broken.targets.spike.sum())}


def _intervals(**ends: Sequence[float]) -> dict[str, list[float]]:
    """Ends of intervals by name; nothing where there is only one window, and so no interval."""
    return {name: list(values) for name, values in ends.items() if all(map(math.isfinite, values))}


@_made_of("zeroed", "zeroed_and_masked", "rest_zeroed", *_SPIKE_CONTROLS)
def ab1_zeroing_breaks(
    broken: Broken, zeroed: Outcome, masked: Outcome, rest: Outcome, *controls: Outcome
) -> Evidence | NotApplicable:
    """AB1: the spike channels zeroed at the spike tokens, right after the step-up.

    Beside it, with the spike tokens' keys masked as well: what of the damage goes through attention to them; and with
    the step-up blocks silenced as well: what of it is due to what else those write into the spike tokens. Controls:
    as many random channels, as many of the next-strongest, the same channels at other tokens, and the spike turned in a
    random direction, as long as it was.
    """
    silent = broken.outcomes.get("skipped_and_zeroed")
    return make_evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_zeroed": zeroed.perplexity,
            **_intervals(
                interval_clean=broken.clean.interval(),
                interval_zeroed=zeroed.interval(),
                interval_zeroed_over_clean=zeroed.times(broken.clean),
            ),
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_zeroed": zeroed.sink_ratio,
            "perplexity_zeroed_and_masked": masked.perplexity,
            "perplexity_rest_zeroed": rest.perplexity,
            **({"perplexity_skipped_and_zeroed": silent.perplexity} if silent else {}),
            **_facts(broken),
        },
        control={f"perplexity_{name}": of.perplexity for name, of in zip(_SPIKE_CONTROLS, controls, strict=True)},
    )


@_made_of("mean", "whole", "another_way")
def ab2_mean_does_not(broken: Broken, mean: Outcome, whole: Outcome, another_way: Outcome) -> Evidence | NotApplicable:
    """AB2: the spike channels set to their mean over other windows. Control: the same size in a random direction.

    Where that does nothing either, or the mean is what stands there anyway (a BOS token), the rule could not fail, and
    the claim is not applicable.
    """
    if abs(another_way.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        return NotApplicable("as large a vector in a random direction changes nothing either, so no mean could do harm")
    if max(float(of.divergence.max()) for of in (mean, whole)) < SAME:
        return NotApplicable(NO_CHANGE)
    return make_evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_mean": mean.perplexity,
            "perplexity_whole_vector": whole.perplexity,
            "kl_mean": mean.kl,
            "kl_whole_vector": whole.kl,
            "same_token_mean": mean.agreement,
        },
        control={"perplexity_random_direction": another_way.perplexity, "kl_random_direction": another_way.kl},
    )


@_made_of("skipped", "skipped_others", "skipped_elsewhere", of_sinks=True)
def ab3_step_up_makes_the_sink(
    broken: Broken, skipped: Outcome, others: Outcome, elsewhere: Outcome
) -> Evidence | NotApplicable:
    """AB3: the step-up blocks write nothing at the spike tokens.

    `most_attended_other_key` is the largest share of attention, mean over windows, heads and the plateau's layers, that
    any key position of the first half gets but the first: whether the sink has moved to another early token. Controls:
    as many FFN blocks right after them, and the step-up blocks at other tokens.
    """
    return make_evidence(
        measured={
            "step_up_blocks": list(broken.known.cycle.step_up),
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_skipped": skipped.perplexity,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_skipped": skipped.sink_ratio,
            "most_attended_other_key_clean": _other_keys(broken, broken.clean),
            "most_attended_other_key_skipped": _other_keys(broken, skipped),
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_skipped": broken.at_spikes("skipped"),
        },
        control={
            "perplexity_other_blocks": others.perplexity,
            "sink_ratio_other_blocks": others.sink_ratio,
            "perplexity_other_tokens": elsewhere.perplexity,
            "sink_ratio_other_tokens": elsewhere.sink_ratio,
        },
    )


@_made_of("decoupled", "decoupled_open", "zeroed", of_sinks=True)
def ab4_spike_removed(broken: Broken, apart: Outcome, open_: Outcome, zeroed: Outcome) -> Evidence | NotApplicable:
    """AB4: no spike in the stream, and all that is read of the spike tokens held at constants (`decoupled`).

    `perplexity_own_prediction_open` leaves the spike tokens' own next-token predictions alone, and `elsewhere` is over
    all other positions: where they are the same as the clean run's, those predictions are all that it costs. Control:
    the spike taken out with nothing held. Not applicable where the constants are what stands there anyway (a BOS
    token), as then nothing could be lost.
    """
    if float(apart.divergence.max()) < SAME:
        return NotApplicable(NO_CHANGE)
    elsewhere = ~broken.targets.spike[:, :-1]
    return make_evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_decoupled": apart.perplexity,
            "perplexity_own_prediction_open": open_.perplexity,
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(elsewhere),
            "perplexity_decoupled_elsewhere": open_.perplexity_at(elsewhere),
            "kl_decoupled": apart.kl,
            "same_token_decoupled": apart.agreement,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_decoupled": apart.sink_ratio,
            "max_activation_clean": broken.clean.max_activation,
            "max_activation_decoupled": apart.max_activation,
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_decoupled": broken.at_spikes("decoupled"),
        },
        control={"perplexity_zeroed": zeroed.perplexity, "max_activation_zeroed": zeroed.max_activation},
    )


@_made_of("masked", "masked_everywhere", "masked_elsewhere", "ordinary_key", of_sinks=True)
def ab5_sink_removed(
    broken: Broken, masked: Outcome, everywhere: Outcome, elsewhere: Outcome, ordinary: Outcome
) -> Evidence | NotApplicable:
    """AB5: the spike tokens' keys masked in the layers that read the plateau; the spike is left alone.

    `masked_everywhere`: in all layers, where another token may take its place (`largest_elsewhere` says whether one
    grows a spike). That no attention is left on the plateau, and that a spike at position 0 stays, is so by
    construction; what is measured is what is left of the sink elsewhere, and what it costs. Controls: other tokens
    masked; and the sink's key replaced by the mean of others, without a mask.
    """
    others = ~broken.targets.spike
    return make_evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_unsunk": masked.perplexity,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_unsunk": masked.sink_ratio,
            "sink_ratio_unsunk_on_the_plateau": _on(broken, masked),
            "sink_ratio_clean_on_the_plateau": _on(broken, broken.clean),
            "max_activation_clean": broken.clean.max_activation,
            "max_activation_unsunk": masked.max_activation,
            "perplexity_masked_everywhere": everywhere.perplexity,
            "largest_elsewhere_clean": float(broken.clean.largest[others].max()),
            "largest_elsewhere_unsunk": float(masked.largest[others].max()),
            "largest_elsewhere_masked_everywhere": float(everywhere.largest[others].max()),
        },
        control={
            "perplexity_other_tokens_masked": elsewhere.perplexity,
            "sink_ratio_other_tokens_masked": elsewhere.sink_ratio,
            "perplexity_ordinary_key": ordinary.perplexity,
            "sink_ratio_ordinary_key": ordinary.sink_ratio,
        },
    )


def _other_keys(broken: Broken, outcome: Outcome) -> float:
    layers = broken.known.layers
    return float(outcome.attention[layers.start : layers.stop, 1 : broken.tokens.shape[1] // 2].mean(0).max())


def _on(broken: Broken, outcome: Outcome) -> float:
    """The sink ratio over the layers that read the plateau alone."""
    layers = broken.known.layers
    return float((outcome.score[:, layers.start : layers.stop] > outcome.epsilon).float().mean())


@_made_of("random_channels", "other_position", "zeroed")
def ab6_wrong_places(broken: Broken, random: Outcome, other: Outcome, zeroed: Outcome) -> Evidence | NotApplicable:
    """AB6: the controls of AB1 and AB3 as a claim of their own: random channels, and other positions.

    `elsewhere` leaves out the changed tokens' own next-token predictions. Control: the cut itself; where that does
    nothing, there is nothing that the others could fall short of.
    """
    if abs(zeroed.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        return NotApplicable("zeroing the spike changes nothing either, so the controls have nothing to fall short of")
    kept = ~broken.targets.other[:, :-1]
    return make_evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_random_channels": random.perplexity,
            "perplexity_other_position": other.perplexity,
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(kept),
            "perplexity_other_position_elsewhere": other.perplexity_at(kept),
            "n_channels": len(broken.known.cycle.channels),
        },
        control={"perplexity_zeroed": zeroed.perplexity},
    )


@measure
def ab7_dose_response(found: Doses | NotApplicable) -> Evidence | NotApplicable:
    """AB7: perplexity and sink ratio against the factor by which the spike is scaled, with intervals over windows.

    `perplexities_elsewhere` leave out the spike tokens' own next-token predictions. Controls:
    as many random channels, by the smallest factor and the largest.
    """
    lows, highs = zip(*(of.interval() for of in found.outcomes), strict=True)
    elsewhere = ~found.where[:, :-1]
    return make_evidence(
        measured={
            "factors": list(found.factors),
            "perplexities": [of.perplexity for of in found.outcomes],
            "perplexities_elsewhere": [of.perplexity_at(elsewhere) for of in found.outcomes],
            **_intervals(lows=lows, highs=highs),
            "sink_ratios": [of.sink_ratio for of in found.outcomes],
        },
        control={f"perplexity_random_channels_{f:g}": of.perplexity for f, of in found.control.items()},
    )
