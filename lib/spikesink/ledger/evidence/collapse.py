"""What normalised spike tokens say to claims NM1 to NM5."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from spikesink.chain.collapse import Collapse, Replaced, participation_ratio
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.model.weights import Weights

INDIFFERENT = 0.01  # NM5's rule must be one that the control can break


@measure
def nm1_bounded(collapse: Collapse) -> Evidence:
    """NM1: the largest entry of h~ over sqrt(d_model), over spike tokens and the plateau's points."""
    plateau, middle = collapse.plateau, collapse.cycle.middle
    return make_evidence(
        measured={
            "max_over_sqrt_d": float(collapse.spike.largest[plateau].max()),
            "smallest_over_sqrt_d": float(collapse.spike.smallest[plateau].min()),
        },
        control={
            "max_over_sqrt_d_before": float(collapse.spike.largest[collapse.before]),
            "max_over_sqrt_d_other_tokens": float(collapse.other.largest[middle]),
            "smallest_over_sqrt_d_other_tokens": float(collapse.other.smallest[middle]),
        },
    )


@measure
def nm2_sparse(collapse: Collapse, weights: Weights) -> Evidence:
    """NM2: the participation ratio of h~ (how many channels it spreads over), before the step-up and half-way.

    `participation_lowest_before` is that of any earlier point, which a smaller cycle can make as low;
    `participation_scaled` that of what a matrix really reads, h~ times the norm's scale, at the plateau's first layer.
    """
    middle = collapse.cycle.middle
    measured = {
        "participation_before": float(collapse.spike.participation[collapse.before]),
        "participation_lowest_before": float(collapse.spike.participation[: collapse.before + 1].min()),
        "participation_after": float(collapse.spike.participation[middle]),
        "d_model": collapse.anatomy.d_model,
    }
    if layers := collapse.cycle.layers:
        scaled = collapse.spike.kept[:, 2 * layers[0]] * weights.norm_scale(layers[0])
        measured["participation_scaled"] = float(participation_ratio(scaled).mean())
    return make_evidence(
        measured,
        control={
            "participation_before_other_tokens": float(collapse.other.participation[collapse.before]),
            "participation_after_other_tokens": float(collapse.other.participation[middle]),
        },
    )


@measure
def nm3_constant(collapse: Collapse) -> Evidence:
    """NM3: mean cosine between h~ of spike tokens of different windows, before the step-up and half-way.

    `degrees_*` are the same as angles, which show what a cosine near 1 hides; `cosine_rest_*` leave the spike channels
    out; `cosine_highest_before` is that of the earlier point at which they are most alike.
    """
    spike, other, middle, before = collapse.spike, collapse.other, collapse.cycle.middle, collapse.before
    if not spike.cosine[middle].isfinite():
        raise NotApplicable("there are no two spike tokens of different windows to compare; measure more windows")
    return make_evidence(
        measured={
            "cosine_before": float(spike.cosine[before]),
            "cosine_after": float(spike.cosine[middle]),
            "cosine_other_tokens": float(other.cosine[middle]),
            "cosine_highest_before": float(spike.cosine[: before + 1].max()),
            "degrees_before": _degrees(spike.cosine[before]),
            "degrees_after": _degrees(spike.cosine[middle]),
            "degrees_other_tokens": _degrees(other.cosine[middle]),
            "n_tokens": spike.n,
        },
        control={
            "cosine_before_other_tokens": float(other.cosine[before]),
            "cosine_next_tokens": float(collapse.after.cosine[middle]),
            "cosine_rest_before": float(spike.cosine_rest[before]),
            "cosine_rest_after": float(spike.cosine_rest[middle]),
            "cosine_rest_other_tokens": float(other.cosine_rest[middle]),
        },
    )


@measure
def nm4_constant_over_depth(collapse: Collapse) -> Evidence:
    """NM4: cosine between h~ of one spike token at two layers of the plateau, mean over pairs of layers and tokens.

    `cosine_rest_over_depth` leaves the spike channels out: it matters where the norm's learned scale mutes those.
    """
    layers = collapse.cycle.layers
    if len(layers) < 2:
        raise NotApplicable("fewer than two layers read the plateau, so there is no depth to compare over")
    spike, other = (group.kept[:, 2 * torch.tensor(layers)].double() for group in (collapse.spike, collapse.other))
    rest = spike.index_fill(2, torch.tensor(collapse.cycle.channels), 0)
    cosines = {}
    for name, vectors in (("spike", spike), ("other", other), ("rest", rest)):
        h = functional.normalize(vectors, dim=-1)
        pairs = torch.einsum("tld,tmd->tlm", h, h).mean(0)
        upper = pairs[tuple(torch.triu_indices(len(layers), len(layers), 1))]
        cosines[name] = float(upper.mean()), float(upper.min())
    return make_evidence(
        measured={
            "cosine_over_depth": cosines["spike"][0],
            "cosine_of_the_two_least_alike": cosines["spike"][1],
            "cosine_rest_over_depth": cosines["rest"][0],
            "first_layer": layers[0],
            "last_layer": layers[-1],
        },
        control={
            "cosine_over_depth_other_tokens": cosines["other"][0],
            "cosine_of_the_two_least_alike_other_tokens": cosines["other"][1],
        },
    )


def _degrees(cosine: Tensor) -> float:
    return math.degrees(math.acos(min(1.0, float(cosine)))) if cosine.isfinite() else math.nan


@measure
def nm5_implicit_parameter(replaced: Replaced) -> Evidence:
    """NM5: perplexity with one held-out vector in place of h~ at the spike tokens, in every layer of the plateau.

    And how much the attention of later queries moves (total variation distance, mean over the plateau's layers). Where
    other tokens' mean in the same place changes nothing either, the rule could not fail: not applicable.
    """
    perplexity = replaced.perplexity
    if abs(perplexity["other_tokens_mean"] / perplexity["clean"] - 1) <= INDIFFERENT:
        raise NotApplicable(
            f"with other tokens' mean in its place perplexity changes by at most {INDIFFERENT:.0%} too: the model "
            "makes no use of what stands there"
        )
    measured = {
        "perplexity_clean": perplexity["clean"],
        "perplexity_replaced": perplexity["replaced"],
        "n_tokens_replaced": replaced.n_tokens,
        "first_layer": replaced.layers[0],
        "last_layer": replaced.layers[-1],
    }
    control = {"perplexity_other_tokens_mean": perplexity["other_tokens_mean"]}
    if not replaced.moved.isnan().any():  # a spike token in last place has no later ones
        plateau = torch.tensor(replaced.layers)
        moved, to_spike = (of[:, plateau].mean(1).tolist() for of in (replaced.moved, replaced.to_spike))
        measured |= {
            "attention_moved": moved[1],
            "attention_to_spike_clean": to_spike[0],
            "attention_to_spike_replaced": to_spike[1],
        }
        control |= {
            "attention_moved_other_tokens_mean": moved[2],
            "attention_to_spike_other_tokens_mean": to_spike[2],
        }
    return make_evidence(measured, control)
