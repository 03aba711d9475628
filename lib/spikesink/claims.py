"""The claims ledger: what the paper says, what we measured, a control measured the same way, and a verdict.

A rule is a pure function of what was measured, the same for every model, and set from what the claim means before
the ledger was filled; `verdict` recomputes it from a claim as it stands in `figures/<model>/claims.json`.
"""

import importlib.metadata
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import wraps
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from filelock import FileLock

from spikesink.specs import DEFAULT_MODEL

SCHEMA = 1
PAPER = "arXiv:2603.05498"
LAB = "lab"  # the ledger of the models that we train ourselves


@dataclass(frozen=True)
class Evidence:
    """What a measure says to a claim: the measured values, and those of a control measured the same way."""

    measured: Mapping[str, Any]
    control: Mapping[str, Any]


@dataclass(frozen=True)
class NotApplicable:
    """Why a claim cannot be put to this model."""

    reason: str


def evidence(measured: Mapping[str, Any], control: Mapping[str, Any]) -> Evidence | NotApplicable:
    """Evidence without the controls that could not be measured; none at all, or a measure that is none, is a reason."""
    missing = [name for name, value in measured.items() if not _finite(value)]
    if missing:
        return NotApplicable(
            f"{', '.join(missing)} could not be measured: there is no token or channel to measure it on"
        )
    control = {key: value for key, value in control.items() if _finite(value)}
    if not control:
        return NotApplicable("no control could be measured: there is no ordinary token or channel to compare with")
    return Evidence(measured, control)


def _finite(value: Any) -> bool:
    """Whether no float in a value, or in the lists that it is made of, is none."""
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


def where_applicable(measure):
    """A measure of what is there; where one of its arguments is the reason why something is not, that reason."""

    @wraps(measure)
    def measured(*args, **options):
        for value in (*args, *options.values()):
            if isinstance(value, NotApplicable):
                return value
        return measure(*args, **options)

    return measured


@dataclass(frozen=True)
class Rule:
    """A claim's statement, where the paper makes it, and when it holds, in words and as a function of `measured`."""

    statement: str
    source: str
    words: str
    holds: Callable[[Mapping[str, Any]], bool]
    headline: str  # which measured value stands for the claim in a table
    beside: str = ""  # the measured value that the headline is to be compared with
    # Control values to put in place of measured ones: where the rule holds of those too, the claim is true of more than
    # spikes and sinks. Not among them are second ways to the same cut, which should meet the rule; and there are none
    # where the rule itself compares all that was measured with a control.
    controls: tuple[Mapping[str, str], ...] = ()


@dataclass(frozen=True)
class Claim:
    """One row of the ledger."""

    statement: str
    source: str
    verdict: str
    rule: str
    measured: Mapping[str, Any]
    control: Mapping[str, Any]
    notebook: str


RULES: dict[str, Rule] = {
    "LC1": Rule(
        "One to three early FFN blocks write the spike.",
        f"{PAPER}, step-up; table 1",
        "at most 3 FFN blocks of the first half write >= 80% of the plateau value, no attention block >= 10%",
        lambda m: m["share_written"] >= 0.8 and m["largest_attention_share"] < 0.1,
        "step_up_blocks",
        controls=(
            {"share_written": "share_written_ordinary_tokens"},
            {"share_written": "share_written_ordinary_channels"},
            {"share_written": "write_over_own_value_ordinary_channels"},
        ),
    ),
    "LC2": Rule(
        "Between step-up and step-down, what blocks write is orders of magnitude smaller.",
        f"{PAPER}, plateau",
        "median of abs(write) / plateau value between step-up and step-down <= 0.01",
        lambda m: m["plateau_write_ratio"] <= 0.01,
        "plateau_write_ratio",
        controls=({"plateau_write_ratio": "write_ratio_ordinary_channels"},),
    ),
    "LC3": Rule(
        "Late FFN blocks cancel the spike.",
        f"{PAPER}, step-down; table 1",
        "FFN blocks of the second half, each taking back >= 10%, cancel >= 50% together",
        lambda m: m["share_cancelled"] >= 0.5,
        "step_down_blocks",
        controls=({"share_cancelled": "share_cancelled_ordinary_tokens"},),
    ),
    "LC4": Rule(
        "The spike lives in a few channels.",
        f"{PAPER}, figure 1; arXiv:2402.17762",
        "channels above 100 medians: at least 1, at most max(10, 1% of d_model)",
        lambda m: 1 <= m["n_spike_channels"] <= max(10, 0.01 * m["d_model"]),
        "n_spike_channels",
        controls=({"n_spike_channels": "n_channels_ordinary_tokens"},),
    ),
    "LC5": Rule(
        "The same channels spike on all spike tokens.",
        f"{PAPER}, figure 1",
        "mean Jaccard index of the top-3 channels over pairs of spike tokens >= 0.9",
        lambda m: m["jaccard"] >= 0.9,
        "jaccard",
        controls=({"jaccard": "jaccard_ordinary_tokens"},),
    ),
    "LC6": Rule(
        "The spike channels keep fixed ratios.",
        f"{PAPER}, figure 1",
        "coefficient of variation of the ratio of the two largest channels over spike tokens <= 0.1",
        lambda m: m["ratio_cv"] <= 0.1,
        "ratio_cv",
        controls=(
            {"ratio_cv": "ratio_cv_ordinary_tokens"},
            {"ratio_cv": "ratio_cv_ordinary_channels"},
        ),
    ),
    "LC7": Rule(
        "Few tokens spike, and the first one nearly always does.",
        f"{PAPER}, spike tokens; table 2",
        "at most 5% of tokens spike; position 0 does in >= 90% of windows",
        lambda m: m["spike_token_share"] <= 0.05 and m["position0_share"] >= 0.9,
        "spike_token_share",
        controls=({"position0_share": "other_positions_share"},),
    ),
    "AM1": Rule(
        "On spike tokens the gate's activation is close to the identity.",
        f"{PAPER}, SwiGLU as a quadratic amplifier; figure 2",
        "plain cosine(silu(g), g) on spike tokens >= 0.9, and 0.05 above other tokens'",
        lambda m: m["silu_cosine_spike"] >= 0.9 and m["silu_cosine_spike"] >= m["silu_cosine_other"] + 0.05,
        "silu_cosine_spike",
        beside="silu_cosine_other",
        controls=({"silu_cosine_spike": "silu_cosine_random_gates"},),
    ),
    "AM2": Rule(
        "The spike channel has a high gain in the step-up block.",
        f"{PAPER}, SwiGLU as a quadratic amplifier; figure 3",
        "the spike channel is among the 3 largest ||U_k||_F of its block, and >= 5 medians",
        lambda m: m["gain_rank"] <= 3 and m["gain_over_median"] >= 5,
        "gain_over_median",
        controls=(
            {"gain_rank": "gain_rank_ordinary_channels", "gain_over_median": "gain_over_median_ordinary_channels"},
            {"gain_rank": "gain_rank_other_blocks", "gain_over_median": "gain_over_median_other_blocks"},
        ),
    ),
    "AM3": Rule(
        "Its quadratic form is of rank one, nearly.",
        f"{PAPER}, SwiGLU as a quadratic amplifier; figure 4",
        "top eigenvalue squared >= 80% of ||S_k||_F^2",
        lambda m: m["rank_one_share"] >= 0.8,
        "rank_one_share",
        controls=({"rank_one_share": "rank_one_share_ordinary_channels"},),
    ),
    "AM4": Rule(
        "The spike channels share one direction, s*.",
        f"{PAPER}, SwiGLU as a quadratic amplifier",
        "abs cosine of top eigenvectors over spike channels (smallest of all pairs) >= 0.9; over random channels "
        "(median of pairs) <= 0.3",
        lambda m: m["cosine_min"] >= 0.9 and m["cosine_control"] <= 0.3,
        "cosine_min",
        beside="cosine_control",
    ),
    "AM5": Rule(
        "The block's write is lambda (s*.h~)^2.",
        f"{PAPER}, SwiGLU as a quadratic amplifier (closed form)",
        "median relative error of lambda (s*.h~)^2 against the block's write on spike tokens <= 10%",
        lambda m: m["median_relative_error"] <= 0.1,
        "median_relative_error",
        controls=(
            {"median_relative_error": "median_relative_error_ordinary_channels"},
            {"median_relative_error": "median_relative_error_other_tokens"},
        ),
    ),
    "AM6": Rule(
        "Spike tokens point along s*, others do not.",
        f"{PAPER}, SwiGLU as a quadratic amplifier",
        "abs cosine(s*, h~) on spike tokens >= 3 times other tokens'",
        lambda m: m["cosine_spike"] >= 3 * m["cosine_other"],
        "cosine_spike",
        beside="cosine_other",
    ),
    "AM7": Rule(
        "The weights alone find the blocks that write and cancel the spike.",
        f"{PAPER}, figure 3",
        "step-up and step-down (block, channel) pairs are in the top 1% of all pairs by ||U_k||_F",
        lambda m: max(m["step_up_rank"], m["step_down_rank"]) <= 0.01 * m["n_pairs"],
        "step_up_rank",
        beside="top_pairs",
        controls=(
            {"step_up_rank": "rank_ordinary_channels", "step_down_rank": "rank_ordinary_channels"},
            {"step_up_rank": "rank_same_channel_other_blocks", "step_down_rank": "rank_same_channel_other_blocks"},
        ),
    ),
    "X-AM8": Rule(
        "Where a norm follows the block, its scale makes the spike, out of a write in one channel.",
        "ours; sandwich norm",
        "the norm's scale in the spike channel >= 10 medians, and the channel's share of |F| on spike tokens "
        ">= 3 times other tokens'",
        lambda m: m["scale_over_median"] >= 10 and m["share_of_norm_spike"] >= 3 * m["share_of_norm_other"],
        "scale_over_median",
        controls=(
            {"scale_over_median": "scale_over_median_ordinary_channels"},
            {"share_of_norm_spike": "share_of_norm_random_direction"},
        ),
    ),
    "X-MX1": Rule(
        "Where a router chooses, it sends spike tokens to one expert, and few others there.",
        "ours; mixture of experts",
        "the same first choice for >= 90% of spike tokens at the first step-up block, and for <= 50% of others",
        lambda m: m["share_of_spike_tokens"] >= 0.9 and m["share_of_other_tokens"] <= 0.5,
        "share_of_spike_tokens",
        beside="share_of_other_tokens",
        controls=({"share_of_spike_tokens": "share_if_even"},),
    ),
    "X-MX2": Rule(
        "One expert writes the spike: the one with the highest gain in its channel.",
        "ours; mixture of experts",
        "one expert writes 80% to 125% of it, and no expert of the block has a larger ||U_k||_F in that channel",
        lambda m: 0.8 <= m["share_written"] <= 1.25 and m["gain_rank"] == 1,
        "share_written",
        controls=({"gain_rank": "gain_rank_ordinary_channels"},),
    ),
    "TK1": Rule(
        "Nearly any token spikes when it stands first.",
        f"{PAPER}, table 2",
        ">= 98% of the vocabulary spikes at position 0",
        lambda m: m["share"] >= 0.98,
        "share",
        controls=(
            {"share": "share_before_step_up"},
            {"share": "share_after_a_text"},
        ),
    ),
    "TK2": Rule(
        "The first token's attention is one static map.",
        f"{PAPER}, spike tokens",
        "relative error <= 1e-4",
        lambda m: m["max_relative_error"] <= 1e-4,
        "max_relative_error",
        controls=({"max_relative_error": "median_relative_error_later_positions"},),
    ),
    "TK3": Rule(
        "The same tokens elsewhere do not spike.",
        f"{PAPER}, spike tokens",
        "<= 5% of the same tokens spike at later positions",
        lambda m: m["share_elsewhere"] <= 0.05,
        "share_elsewhere",
        controls=({"share_elsewhere": "share_at_position_0"},),
    ),
    "TK4": Rule(
        "Delimiters that spike attend to themselves, and lie near the norm's scale.",
        f"{PAPER}, spike tokens",
        "spiking delimiters attend to themselves >= 2 times as much as other tokens, and lie closer to the norm's "
        "scale; n/a where no delimiter spikes",
        lambda m: _delimiters_imitate(m),
        "self_attention_delimiters",
        beside="self_attention_other",
        controls=(
            {
                "self_attention_delimiters": "self_attention_quiet_delimiters",
                "scale_cosine_delimiters": "scale_cosine_quiet_delimiters",
            },
        ),
    ),
    "X-TK5": Rule(
        "In a smaller cycle too, delimiters that spike attend to themselves and lie near the norm's scale.",
        f"ours; {PAPER}, spike tokens",
        "spiking delimiters attend to themselves >= 2 times as much as other tokens, and lie closer to the norm's "
        "scale; n/a where no delimiter spikes",
        lambda m: _delimiters_imitate(m),
        "self_attention_delimiters",
        beside="self_attention_other",
        controls=(
            {
                "self_attention_delimiters": "self_attention_quiet_delimiters",
                "scale_cosine_delimiters": "scale_cosine_quiet_delimiters",
            },
        ),
    ),
    "NM1": Rule(
        "RMSNorm bounds the spike: no entry exceeds sqrt(d), and the spike's comes close.",
        f"{PAPER}, RMSNorm",
        "0.5 <= max abs(h~_k) / sqrt(d) <= 1.001 during the plateau",
        lambda m: 0.5 <= m["max_over_sqrt_d"] <= 1.001,
        "max_over_sqrt_d",
        controls=(
            {"max_over_sqrt_d": "max_over_sqrt_d_before"},
            {"max_over_sqrt_d": "max_over_sqrt_d_other_tokens"},
        ),
    ),
    "NM2": Rule(
        "RMSNorm makes a spike token sparse: hardly more than one channel is left.",
        f"{PAPER}, RMSNorm",
        "participation ratio after <= 1% of d_model",
        lambda m: m["participation_after"] <= 0.01 * m["d_model"],
        "participation_after",
        controls=({"participation_after": "participation_after_other_tokens"},),
    ),
    "NM3": Rule(
        "RMSNorm makes all spike tokens the same vector.",
        f"{PAPER}, RMSNorm; figure 5",
        "mean cosine of h~ over spike tokens of different windows >= 0.99 after; other tokens' <= 0.9",
        lambda m: m["cosine_after"] >= 0.99 and m["cosine_other_tokens"] <= 0.9,
        "cosine_after",
        beside="cosine_other_tokens",
        controls=(
            {"cosine_after": "cosine_before_other_tokens"},
            {"cosine_after": "cosine_next_tokens"},
        ),
    ),
    "NM4": Rule(
        "It is the same vector at every layer of the plateau.",
        f"{PAPER}, RMSNorm",
        "cosine of h~ between plateau layers >= 0.99",
        lambda m: m["cosine_over_depth"] >= 0.99,
        "cosine_over_depth",
        controls=({"cosine_over_depth": "cosine_over_depth_other_tokens"},),
    ),
    "NM5": Rule(
        "It is an implicit parameter: one fixed vector, of other prompts, can stand in its place.",
        f"{PAPER}, RMSNorm",
        "perplexity changes by <= 1%",
        lambda m: abs(m["perplexity_replaced"] / m["perplexity_clean"] - 1) <= 0.01,
        "perplexity_replaced",
        beside="perplexity_clean",
        controls=({"perplexity_replaced": "perplexity_other_tokens_mean"},),
    ),
    "SK1": Rule(
        "Many heads sink on the first token.",
        f"{PAPER}, attention sinks; arXiv:2410.10781",
        "sink ratio >= 0.1",
        lambda m: m["sink_ratio"] >= 0.1,
        "sink_ratio",
        controls=(
            {"sink_ratio": "sink_ratio_other_positions"},
            {"sink_ratio": "sink_ratio_highest_other_position"},
            {"sink_ratio": "sink_ratio_ordinary_tokens"},
        ),
    ),
    "SK2": Rule(
        "Sinks sit on spike tokens.",
        f"{PAPER}, attention sinks",
        ">= 90% of the (head, position) sinks during the plateau are on spike tokens",
        lambda m: m["share_on_spike_tokens"] >= 0.9,
        "share_on_spike_tokens",
        controls=(
            {"share_on_spike_tokens": "share_of_tokens_that_spike"},
            {"share_on_spike_tokens": "share_on_spike_tokens_before"},
        ),
    ),
    "SK3": Rule(
        "The keys of spike tokens live in one or two dimensions.",
        f"{PAPER}, attention sinks; figure 6",
        "effective dimension of sink keys <= 2 and below other tokens'",
        lambda m: m["effective_dimension_sink"] <= 2 and m["effective_dimension_sink"] < m["effective_dimension_other"],
        "effective_dimension_sink",
        beside="effective_dimension_other",
        controls=(
            {"effective_dimension_sink": "effective_dimension_next_token"},
            {"effective_dimension_sink": "effective_dimension_sink_without_a_spike"},
        ),
    ),
    "SK4": Rule(
        "The queries of sink heads favour that key.",
        f"{PAPER}, attention sinks; figure 6",
        "mean logit gap in sink heads > in other heads; Spearman correlation over heads of gap and score >= 0.5",
        lambda m: m["logit_gap_sink"] > m["logit_gap_other"] and m["spearman"] >= 0.5,
        "spearman",
        controls=(
            {
                "logit_gap_sink": "logit_gap_sink_next_token",
                "logit_gap_other": "logit_gap_other_next_token",
                "spearman": "spearman_next_token",
            },
        ),
    ),
    "SK5": Rule(
        "Sinks follow the spike over depth.",
        f"{PAPER}, attention sinks",
        "mean attention to the spike token during the plateau >= 3 times that before the step-up",
        lambda m: m["attention_during"] >= 3 * m["attention_before"],
        "attention_during",
        beside="attention_before",
        controls=(
            {"attention_during": "attention_during_next_token", "attention_before": "attention_before_next_token"},
        ),
    ),
    "SK6": Rule(
        "A few rows of W_K make the sink's key.",
        f"{PAPER}, attention sinks",
        "cosine of key and its rebuilding from the spike channels' rows >= 0.95",
        lambda m: m["cosine_reconstructed"] >= 0.95,
        "cosine_reconstructed",
        controls=(
            {"cosine_reconstructed": "cosine_other_tokens"},
            {"cosine_reconstructed": "cosine_other_tokens_own_channels"},
            {"cosine_reconstructed": "cosine_strongest_other_channels"},
        ),
    ),
    "SK7": Rule(
        "The sink's values are small: attention that adds little.",
        f"{PAPER}, attention sinks; arXiv:2410.10781",
        "norm of the sink's value <= half of other tokens'",
        lambda m: m["value_norm_ratio"] <= 0.5,
        "value_norm_ratio",
        controls=(
            {"value_norm_ratio": "value_norm_ratio_next_token"},
            {"value_norm_ratio": "value_norm_ratio_without_a_spike"},
        ),
    ),
    "X-SK8": Rule(
        "A smaller cycle brings sinks of its own, and takes them away.",
        f"ours; {PAPER}, attention sinks",
        "mean attention to the tokens of smaller cycles while one is on its plateau >= 3 times that in other layers",
        lambda m: m["attention_during"] >= 3 * m["attention_otherwise"],
        "attention_during",
        beside="attention_otherwise",
        controls=(
            {
                "attention_during": "attention_during_next_token",
                "attention_otherwise": "attention_otherwise_next_token",
            },
        ),
    ),
    "X-SK9": Rule(
        "Secondary sinks lie along the primary sink's direction.",
        "arXiv:2512.22213",
        "median cosine with the primary direction while a sink >= 0.5, and >= 2 times other tokens'",
        lambda m: m["cosine_secondary"] >= max(0.5, 2 * m["cosine_others"]),
        "cosine_secondary",
        beside="cosine_others",
        controls=({"cosine_secondary": "cosine_next_token"},),
    ),
    "AB1": Rule(
        "Zeroing the spike breaks the model.",
        f"{PAPER}, separating spike and sink; arXiv:2402.17762",
        "perplexity zeroed >= 1.2 times clean",
        lambda m: m["perplexity_zeroed"] >= 1.2 * m["perplexity_clean"],
        "perplexity_zeroed",
        beside="perplexity_clean",
        controls=(
            {"perplexity_zeroed": "perplexity_random_channels"},
            {"perplexity_zeroed": "perplexity_strongest_channels"},
            {"perplexity_zeroed": "perplexity_other_position"},
        ),
    ),
    "AB2": Rule(
        "Its mean in its place does not.",
        "arXiv:2402.17762",
        "perplexity within 2% of clean",
        lambda m: abs(m["perplexity_mean"] / m["perplexity_clean"] - 1) <= 0.02,
        "perplexity_mean",
        beside="perplexity_clean",
        controls=({"perplexity_mean": "perplexity_random_direction"},),
    ),
    "AB3": Rule(
        "Without the step-up most of the sink goes.",
        f"{PAPER}, separating spike and sink",
        "sink ratio <= half of clean",
        lambda m: m["sink_ratio_skipped"] <= 0.5 * m["sink_ratio_clean"],
        "sink_ratio_skipped",
        beside="sink_ratio_clean",
        controls=(
            {"sink_ratio_skipped": "sink_ratio_other_blocks"},
            {"sink_ratio_skipped": "sink_ratio_other_tokens"},
        ),
    ),
    "AB4": Rule(
        "With all that is read of its tokens held constant, the spike can go and the sink stay.",
        f"{PAPER}, separating spike and sink",
        "perplexity <= 1.05 times clean, sink ratio within 0.05, max activation <= 10%",
        lambda m: _decoupled(m),
        "perplexity_decoupled",
        beside="perplexity_clean",
        controls=({"perplexity_decoupled": "perplexity_zeroed", "max_activation_decoupled": "max_activation_zeroed"},),
    ),
    "AB5": Rule(
        "The sink can go and the spike stay.",
        f"{PAPER}, separating spike and sink",
        "sink ratio <= 0.1, max activation >= 90%",
        lambda m: m["sink_ratio_unsunk"] <= 0.1 and m["max_activation_unsunk"] >= 0.9 * m["max_activation_clean"],
        "sink_ratio_unsunk",
        beside="sink_ratio_clean",
        controls=({"sink_ratio_unsunk": "sink_ratio_other_tokens_masked"},),
    ),
    "AB6": Rule(
        "Random channels and other positions do nothing.",
        f"control of AB1; {PAPER}, separating spike and sink",
        "perplexity within 1% of clean for each control",
        lambda m: all(
            abs(m[key] / m["perplexity_clean"] - 1) <= 0.01
            for key in ("perplexity_random_channels", "perplexity_other_position")
        ),
        "perplexity_other_position",
        beside="perplexity_clean",
        controls=(
            {"perplexity_random_channels": "perplexity_zeroed", "perplexity_other_position": "perplexity_zeroed"},
        ),
    ),
    "AB7": Rule(
        "The more of the spike is left, up to all of it, the better the model.",
        f"{PAPER}, separating spike and sink",
        "perplexity falls at every step of the dose from 0 to 1",
        lambda m: _falls_up_to_one(m["factors"], m["perplexities"]),
        "perplexities",
    ),
}


_TRAINED = (
    "of the changes that the paper reports, at least half go its way here significantly (95% intervals over seeds), at "
    "least one of each kind (sinks and activations, those that rise, fall and stay), and none significantly "
    "another way, nor surely stays where the paper's does not; a value stays within 0.05 (sink ratio) or a factor 1.5 "
    "(largest activation), a static gate's sink ratio is lower by 0.06 at most; sink ratios at ε = 0.2 and 0.4 must "
    "not contradict what 0.3 says (of late queries there is 0.3 alone), and what is below 0.1 has no sinks to lose; "
    "where it fails for changes that stay open alone, where not all is trained, or where the base's own seeds count as "
    "changes more often than by chance, it is not judged"
)


def _trained(statement: str, source: str) -> Rule:
    return Rule(
        statement,
        source,
        _TRAINED,
        lambda m: m["n_differ"] == 0 and 0 < m["n_reported"] <= 2 * m["n_agree"] and not m["unsupported"],
        "n_agree",
        "n_reported",
    )


STRONG = -0.5  # X-TR7: a rank correlation with the loss, at least
SETS = 1.05  # SV1: times the perplexity that the spike's channels apart leave, at least
EPSILONS = (0.2, 0.4)  # thresholds of a sink that SV3 and TR1 to TR6 ask for as well, beside the usual one
LATE_RATIOS = {"sink_ratios": None, **{f"sink_ratios_at_{epsilon:g}": epsilon for epsilon in EPSILONS}}  # None: usual
BREAKS, REPAIRS = 1.5, 1.1  # SV2: times the full cache's perplexity, at least without and at most with the first tokens


RULES |= {
    "TR1": _trained(
        "The better training goes, the more sinks; without weight decay spikes grow and sinks wane.",
        f"{PAPER}, trained families: optimization",
    ),
    "TR2": _trained(
        "Sinks and spikes need no SwiGLU: GeLU has both, a linear FFN or none has sinks and smaller spikes.",
        f"{PAPER}, trained families: FFN",
    ),
    "TR3": _trained(
        "Normalization sets the size of the spike, and hardly the sinks.",
        f"{PAPER}, trained families: normalization",
    ),
    "TR4": _trained("Wide heads make sinks, narrow ones hardly any.", f"{PAPER}, trained families: heads"),
    "TR5": _trained(
        "A gate that reads its input takes sinks and spikes away; a static one does not.",
        f"{PAPER}, trained families: gated attention; arXiv:2505.06708",
    ),
    "TR6": _trained(
        "Where no prediction with a short context is trained, there are hardly any sinks, and larger spikes.",
        f"{PAPER}, trained families: context length",
    ),
    "X-TR7": Rule(
        "The sink ratio follows how well training went more than the size of the spike does.",
        f"of our own; {PAPER}, trained families: optimization",
        f"over the optimization variants the rank correlation of sink ratio and loss <= {STRONG}, and stronger than "
        "the spike's; where the variants, resampled, leave either open, it is not judged",
        lambda m: m["spearman_sink"] <= STRONG and abs(m["spearman_sink"]) > abs(m["spearman_spike"]),
        "spearman_sink",
        beside="spearman_spike",
        controls=(
            {"spearman_sink": "spearman_sink_other_families", "spearman_spike": "spearman_spike_other_families"},
        ),
    ),
    "X-TR8": Rule(
        "In training the spike comes before the sink.",
        "of our own; arXiv:2410.10781 on when sinks emerge",
        "in nine of ten runs that end with sinks, position 0's largest entry, as a multiple of the largest elsewhere, "
        "has come half of its way after fewer tokens than the attention to it (control: the largest elsewhere, as a "
        "multiple of the median)",
        lambda m: m["share_spike_first"] >= 0.9,
        "share_spike_first",
        controls=({"share_spike_first": "share_elsewhere_first"},),
    ),
    "X-TR9": Rule(
        "Where the truth is known, a head waits at position 0 when it has nothing to do, and only then.",
        "arXiv:2410.13835",
        "in every run of the task's base some head gives position 0 >= half of the attention of queries that have "
        "nothing to copy, and <= 10% of those that have",
        lambda m: min(m["attention_other"]) >= 0.5 and max(m["attention_trigger"]) <= 0.1,
        "attention_other",
        beside="attention_trigger",
        controls=(
            {"attention_other": "attention_other_untrained", "attention_trigger": "attention_trigger_untrained"},
        ),
    ),
}

RULES |= {
    "SV1": Rule(
        "Spike tokens set the scale of an activation quantizer.",
        "arXiv:2211.10438 on outliers",
        f"int8 per tensor costs >= {SETS - 1:.0%} more perplexity than the same with the spike's channels apart, at "
        "the lower end of the 95% interval",
        lambda m: m["interval_per_tensor_over_split"][0] >= SETS,
        "perplexity_int8_per_tensor",
        beside="perplexity_int8_spike_split",
        controls=({"interval_per_tensor_over_split": "interval_per_tensor_over_others"},),
    ),
    "SV2": Rule(
        "A cache that lets go of the sink breaks the model, one that keeps it does not.",
        "arXiv:2309.17453",
        f"perplexity without the first tokens >= {BREAKS} times that of the full cache; with four of them <= {REPAIRS} "
        "times, each at both ends of its 95% interval",
        lambda m: m["interval_window_over_full"][0] >= BREAKS and m["interval_with_sink_over_full"][1] <= REPAIRS,
        "perplexity_window",
        beside="perplexity_window_with_sink",
        controls=({"interval_with_sink_over_full": "interval_with_others_over_full"},),
    ),
    "SV3": Rule(
        "Sinks stay, within a factor of two, as far into the context as was measured.",
        f"{PAPER}, sinks; arXiv:2410.10781",
        "of each stretch's queries, in layers that see all of the text, the sink ratio is within a factor 2 from the "
        "first 256 tokens to the longest that was measured within the context, at ε = 0.2, 0.3 and 0.4",
        lambda m: max(m["sink_ratios"]) > 0 and all(max(m[of]) <= 2 * min(m[of]) for of in LATE_RATIOS),
        "sink_ratios",
        controls=(dict.fromkeys(LATE_RATIOS, "sink_ratios_other_position"),),
    ),
}


def _decoupled(m: Mapping[str, Any]) -> bool:
    sink_stays = abs(m["sink_ratio_decoupled"] - m["sink_ratio_clean"]) <= 0.05
    spike_goes = m["max_activation_decoupled"] <= 0.1 * m["max_activation_clean"]
    return m["perplexity_decoupled"] <= 1.05 * m["perplexity_clean"] and sink_stays and spike_goes


def _falls_up_to_one(factors: Iterable[float], perplexities: Iterable[float]) -> bool:
    dosed = [perplexity for factor, perplexity in zip(factors, perplexities, strict=True) if factor <= 1]
    return len(dosed) > 1 and all(later < earlier for earlier, later in pairwise(dosed))


def _delimiters_imitate(m: Mapping[str, Any]) -> bool:
    twice = m["self_attention_delimiters"] >= 2 * m["self_attention_other"]
    return twice and m["scale_cosine_delimiters"] > m["scale_cosine_other"]


def judge(claim_id: str, evidence: Evidence | NotApplicable, notebook: str) -> Claim:
    """Put evidence to a claim's rule.

    Raises:
        ValueError: no rule has this id, or needs what was not measured; or a measured or control value is not a finite
            number, a string, or a list or mapping of those.
    """
    if claim_id not in RULES:
        raise ValueError(f"there is no claim {claim_id!r}; claims.RULES lists those there are.")
    rule = RULES[claim_id]
    if isinstance(evidence, NotApplicable):
        return Claim(rule.statement, rule.source, "n/a", rule.words, {"reason": evidence.reason}, {}, notebook)
    if not isinstance(evidence, Evidence):
        raise ValueError(f"{claim_id} is judged by Evidence or NotApplicable, not by a {type(evidence).__name__}.")
    measured, control = _plain(evidence.measured, claim_id), _plain(evidence.control, claim_id)
    if not control:
        raise ValueError(f"{claim_id} has no control; measure one the same way.")
    try:
        found = verdict(claim_id, measured)
    except KeyError as missing:
        raise ValueError(f"{claim_id} cannot be judged without {missing}; measure it too.") from None
    return Claim(rule.statement, rule.source, found, rule.words, measured, control, notebook)


def verdict(claim_id: str, measured: Mapping[str, Any]) -> str:
    """The verdict that a claim's rule gives on measured values: "holds", "differs", or "n/a" where a reason stands."""
    if "reason" in measured:
        return "n/a"
    return "holds" if RULES[claim_id].holds(measured) else "differs"


def left_open(claim_id: str, measured: Mapping[str, Any]) -> bool:
    """Whether a rule that asks for one end of each `interval_…` fails there, and would hold at the other ends."""
    turned = {name: of[::-1] if name.startswith("interval_") else of for name, of in measured.items()}
    return not RULES[claim_id].holds(measured) and RULES[claim_id].holds(turned)


def held_by(claim_id: str, measured: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    """The controls that a claim's rule holds of as well, by the name of their first value; none where it differs.

    A claim that holds of ordinary tokens too is true, but says nothing of spikes. Of an unknown claim there are none.
    """
    rule = RULES.get(claim_id)
    if rule is None or verdict(claim_id, measured) != "holds":
        return []
    there = [names for names in rule.controls if set(names.values()) <= set(control)]
    return [
        next(iter(names.values()))
        for names in there
        if rule.holds(dict(measured) | {name: control[other] for name, other in names.items()})
    ]


@dataclass(frozen=True)
class Header:
    """What a ledger was measured with. Claims measured with another model, text, precision or seed are not mixed."""

    model: str
    spec: str
    sha256: str
    text: str
    text_sha256: str
    windows: tuple[int, int]
    dtype: str
    seed: int


def record(folder: Path, header: Header, claims: Mapping[str, Claim]) -> Path:
    """Merge claims into `folder/claims.json`, atomically, and return its path.

    Claims already there stay if they were measured with the same header; otherwise they go, so that a file never
    mixes two measurements.

    Raises:
        ValueError: the file that is there is damaged.
        OSError: the folder cannot be written.
    """
    path = folder / "claims.json"
    head = json.loads(json.dumps(asdict(header)))
    with writing_to(folder), FileLock(folder / ".claims.lock"):
        old = _read(path) if path.is_file() else {}
        same = all(old.get(key) == value for key, value in head.items())
        merged = (old.get("claims", {}) if same else {}) | {key: asdict(claim) for key, claim in claims.items()}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer-lens")}
        versions = {name.replace("-", "_"): version for name, version in versions.items()}
        data = {"schema": SCHEMA, **head, "versions": versions, "claims": dict(sorted(merged.items()))}
        write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return path


def ledgers(figures: Path) -> dict[str, dict[str, Any]]:
    """Every `figures/*/claims.json` of a model, by its name; the default model first, the others by name.

    The lab's is not among them: what it says is of many models that were trained to be compared.
    """
    found = [_read(path) for path in figures.glob("*/claims.json") if path.parent.name != LAB]
    return {data["model"]: data for data in sorted(found, key=lambda d: (d["model"] != DEFAULT_MODEL, d["model"]))}


def lab_ledger(figures: Path) -> dict[str, Any] | None:
    """The ledger of the models that we train ourselves; None where there is none."""
    path = figures / LAB / "claims.json"
    return _read(path) if path.is_file() else None


@contextmanager
def writing_to(folder: Path) -> Iterator[None]:
    """A folder, made if it is not there; what the system says against writing to it, as one sentence."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise OSError(
            f"the folder {folder} cannot be written ({error.strerror or error}); make room there, or give another "
            "place for figures."
        ) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"the ledger {path} is damaged ({error}); remove it and run its notebooks again.") from None


def said_before(texts: Mapping[str, str]) -> dict[str, str]:
    """Of texts by name, those that an earlier one says as well: the name of the first that does."""
    first = {text: name for name, text in reversed(texts.items())}
    return {name: first[text] for name, text in texts.items() if first[text] != name}


def mean_of(values: Sequence[float]) -> str:
    """A mean as a table shows it, with the least and the most where there are several; nothing of none."""
    ends = f" ({min(values):.2f} to {max(values):.2f})" if len(values) > 1 else ""
    return f"{sum(values) / len(values):.2f}{ends}" if values else ""


def brief(value: Any) -> str:
    """A measured value in few characters: three significant digits (a fourth differs between processors), no e+03."""
    if isinstance(value, list | tuple):
        return ", ".join(f"({brief(v)})" if isinstance(v, list | tuple) else brief(v) for v in value) or "none"
    if isinstance(value, float):
        short = f"{value:.3g}"
        return f"{float(short):,.0f}" if 1000 <= abs(float(short)) < math.inf else short
    return str(value)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file so that whoever looks sees the old one or the new one, never a part."""
    data = content.encode() if isinstance(content, str) else content
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}-", delete=False) as scratch:
        try:
            scratch.write(data)
            scratch.close()
            os.chmod(scratch.name, 0o644)
            os.replace(scratch.name, path)
        except BaseException:
            Path(scratch.name).unlink(missing_ok=True)
            raise


def escape(text: str) -> str:
    """Text as it may stand in a cell of a Markdown table."""
    return text.replace("|", "\\|")


def _plain(values: Mapping[str, Any], claim_id: str) -> dict[str, Any]:
    """The same values as plain JSON, floats at six significant digits; refuses what JSON cannot say."""

    def plain(value: Any, name: str) -> Any:
        value = value.item() if getattr(value, "shape", None) == () else value  # one number of numpy's or torch's
        if isinstance(value, bool | str):
            return value
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{name}.{k}") for k, v in value.items()}
        if isinstance(value, Iterable):
            return [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, int):
            return value
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{claim_id}: {name} is {value}, which is no number that a ledger can hold.")
        return float(f"{float(value):.6g}")

    return {key: plain(value, key) for key, value in values.items()}
