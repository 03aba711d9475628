"""AB1 to AB7: what becomes of model, spike and sink where the chain between them is cut."""

import math
from collections.abc import Sequence

from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.patching.cuts import CUTS, FEW_SINKS, INDIFFERENT, NO_SINK, Broken, Doses
from spikesink.patching.outcome import CLEAN, Outcome

NO_CHANGE = "every spike token is the same one at the same place, so their mean is what stands there"
SAME = 1e-6  # nats: rounding


def _outcomes(broken: Broken, *names: str) -> list[Outcome]:
    """The outcomes of some cuts; not applicable where a model does not have them all."""
    if missing := [name for name in names if name not in broken.outcomes]:
        raise NotApplicable(f"this model does not have what is cut here ({CUTS[missing[0]].name})")
    return [broken.outcomes[name] for name in names]


def _require_sinks(broken: Broken) -> None:
    if broken.clean.sink_ratio <= FEW_SINKS:
        raise NotApplicable(NO_SINK)


def _each(*measures: str, **outcomes: Outcome) -> dict[str, float]:
    """Measures of several outcomes, as "perplexity_clean" and so on."""
    return {f"{what}_{name}": getattr(outcome, what) for what in measures for name, outcome in outcomes.items()}


def _intervals(**ends: Sequence[float]) -> dict[str, list[float]]:
    """Ends of intervals by name; nothing where there is only one window, and so no interval."""
    return {name: list(values) for name, values in ends.items() if all(map(math.isfinite, values))}


@measure
def ab1_zeroing_breaks(broken: Broken) -> Evidence:
    """AB1: the spike channels zeroed at the spike tokens, right after the step-up.

    Compared with the same and the spike tokens' keys masked (what of the damage goes through attention to them), and
    with the step-up blocks silenced as well (what is due to what else they write). Controls: as many random channels,
    as many of the next-strongest, the same channels at other tokens, and the spike turned in a random direction.
    """
    zeroed, masked, rest = _outcomes(broken, "zeroed", "zeroed_and_masked", "rest_zeroed")
    controls = ("random_channels", "strongest_channels", "other_position", "another_way")
    beside = {"clean": broken.clean, "zeroed": zeroed, "zeroed_and_masked": masked, "rest_zeroed": rest}
    beside |= {name: outcome for name, outcome in broken.outcomes.items() if name == "skipped_and_zeroed"}
    n, length = broken.tokens.shape
    return make_evidence(
        measured={
            **_each("perplexity", **beside),
            **_intervals(interval_clean=broken.clean.interval(), interval_zeroed=zeroed.interval()),
            **_intervals(interval_zeroed_over_clean=zeroed.times(broken.clean)),
            **_each("sink_ratio", clean=broken.clean, zeroed=zeroed),
            "n_windows": n,
            "length": length,
            "n_spike_tokens": int(broken.targets.spike.sum()),
        },
        control=_each("perplexity", **dict(zip(controls, _outcomes(broken, *controls), strict=True))),
    )


@measure
def ab2_mean_does_not(broken: Broken) -> Evidence:
    """AB2: the spike channels set to their mean over other windows. Control: the same size in a random direction.

    Where that does nothing either, or the mean is what stands there anyway (a BOS token), the rule could not fail.
    """
    mean, whole, turned = _outcomes(broken, "mean", "whole", "another_way")
    if abs(turned.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        raise NotApplicable("as large a vector in a random direction changes nothing either, so no mean could do harm")
    if max(float(outcome.divergence.max()) for outcome in (mean, whole)) < SAME:
        raise NotApplicable(NO_CHANGE)
    return make_evidence(
        measured={
            **_each("perplexity", clean=broken.clean, mean=mean, whole_vector=whole),
            "same_token_mean": mean.agreement,
        },
        control=_each("perplexity", random_direction=turned),
    )


@measure
def ab3_step_up_makes_the_sink(broken: Broken) -> Evidence:
    """AB3: the step-up blocks write nothing at the spike tokens.

    `most_attended_other_key` says whether the sink has moved to another early token. Controls: as many FFN blocks right
    after them, and the step-up blocks at other tokens.
    """
    _require_sinks(broken)
    skipped, others, elsewhere = _outcomes(broken, "skipped", "skipped_others", "skipped_elsewhere")
    return make_evidence(
        measured={
            "step_up_blocks": list(broken.means.cycle.step_up),
            **_each("perplexity", "sink_ratio", clean=broken.clean, skipped=skipped),
            "most_attended_other_key_clean": broken.most_attended_other_key(CLEAN),
            "most_attended_other_key_skipped": broken.most_attended_other_key("skipped"),
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_skipped": broken.at_spikes("skipped"),
        },
        control=_each("perplexity", "sink_ratio", other_blocks=others, other_tokens=elsewhere),
    )


@measure
def ab4_spike_removed(broken: Broken) -> Evidence:
    """AB4: no spike in the stream, and all that is read of the spike tokens held at constants (`decoupled`).

    `perplexity_own_prediction_open` leaves the spike tokens' own predictions alone, and `elsewhere` is over all other
    positions. Control: the spike taken out with nothing held. Where the constants are what stands there anyway (a BOS
    token) nothing could be lost.
    """
    _require_sinks(broken)
    apart, open_, zeroed = _outcomes(broken, "decoupled", "decoupled_open", "zeroed")
    if float(apart.divergence.max()) < SAME:
        raise NotApplicable(NO_CHANGE)
    elsewhere = ~broken.targets.spike[:, :-1]
    return make_evidence(
        measured={
            **_each("perplexity", clean=broken.clean, decoupled=apart, own_prediction_open=open_),
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(elsewhere),
            "perplexity_decoupled_elsewhere": open_.perplexity_at(elsewhere),
            "same_token_decoupled": apart.agreement,
            **_each("sink_ratio", "max_activation", clean=broken.clean, decoupled=apart),
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_decoupled": broken.at_spikes("decoupled"),
        },
        control=_each("perplexity", "max_activation", zeroed=zeroed),
    )


@measure
def ab5_sink_removed(broken: Broken) -> Evidence:
    """AB5: the spike tokens' keys masked in the layers that read the plateau; the spike is left alone.

    `masked_everywhere`: in all layers, where another token may take its place (`largest_elsewhere` says whether one
    grows a spike). Controls: other tokens masked; and the sink's key replaced by the mean of others, without a mask.
    """
    _require_sinks(broken)
    names = ("masked", "masked_everywhere", "masked_elsewhere", "ordinary_key")
    masked, everywhere, elsewhere, ordinary = _outcomes(broken, *names)
    return make_evidence(
        measured={
            **_each("perplexity", clean=broken.clean, unsunk=masked, masked_everywhere=everywhere),
            **_each("sink_ratio", clean=broken.clean, unsunk=masked),
            "sink_ratio_unsunk_on_the_plateau": broken.plateau_sink_ratio("masked"),
            "sink_ratio_clean_on_the_plateau": broken.plateau_sink_ratio(CLEAN),
            **_each("max_activation", clean=broken.clean, unsunk=masked),
            "largest_elsewhere_clean": broken.elsewhere(CLEAN),
            "largest_elsewhere_unsunk": broken.elsewhere("masked"),
            "largest_elsewhere_masked_everywhere": broken.elsewhere("masked_everywhere"),
        },
        control=_each("perplexity", "sink_ratio", other_tokens_masked=elsewhere, ordinary_key=ordinary),
    )


@measure
def ab6_wrong_places(broken: Broken) -> Evidence:
    """AB6: two controls of AB1 as a claim of their own: random channels, and other positions.

    `elsewhere` leaves out the changed tokens' own next-token predictions. Control: the cut itself; where that does
    nothing, there is nothing that the others could fall short of.
    """
    random, other, zeroed = _outcomes(broken, "random_channels", "other_position", "zeroed")
    if abs(zeroed.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        raise NotApplicable("zeroing the spike changes nothing either, so the controls have nothing to fall short of")
    unchanged = ~broken.targets.other[:, :-1]
    return make_evidence(
        measured={
            **_each("perplexity", clean=broken.clean, random_channels=random, other_position=other),
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(unchanged),
            "perplexity_other_position_elsewhere": other.perplexity_at(unchanged),
            "n_channels": len(broken.means.cycle.channels),
        },
        control=_each("perplexity", zeroed=zeroed),
    )


@measure
def ab7_dose_response(doses: Doses) -> Evidence:
    """AB7: perplexity and sink ratio against the factor by which the spike is scaled, with intervals over windows.

    `perplexities_elsewhere` leave out the spike tokens' own next-token predictions. Controls: as many random channels,
    by the smallest factor and the largest.
    """
    lows, highs = zip(*(outcome.interval() for outcome in doses.outcomes), strict=True)
    elsewhere = ~doses.where[:, :-1]
    return make_evidence(
        measured={
            "factors": list(doses.factors),
            "perplexities": [outcome.perplexity for outcome in doses.outcomes],
            "perplexities_elsewhere": [outcome.perplexity_at(elsewhere) for outcome in doses.outcomes],
            **_intervals(lows=lows, highs=highs),
            "sink_ratios": [outcome.sink_ratio for outcome in doses.outcomes],
        },
        control={f"perplexity_random_channels_{f:g}": outcome.perplexity for f, outcome in doses.control.items()},
    )
