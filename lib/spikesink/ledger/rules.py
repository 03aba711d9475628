"""TODO."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from spikesink.chain.trace import EPSILONS

LINKS = {
    "LC": "The spike's life",
    "AM": "The amplifier",
    "MX": "The amplifier",
    "TK": "The first token",
    "NM": "RMSNorm",
    "SK": "The sink",
    "AB": "Cutting the chain",
    "TR": "Trained variants",
    "SV": "Serving",
}


# The words that the table needs, in the order of the chain.
GLOSSARY = """<details><summary>What the words mean</summary>

- **Names of claims**: LC is the spike's life cycle, AM the amplifier, MX a mixture of experts, TK the first token, NM
  RMSNorm, SK the sink, AB what cutting the chain does, TR what training changes, SV what serving does. X- marks a claim
  of ours and SV is ours too; the others are the paper's.
- **Spike**: an entry of the residual stream thousands of times larger than most (some fifty times, in the small models
  that we train). Its *channel* is the coordinate, its *tokens* those that have it, its *step-up* and *step-down* the
  blocks that write it and take it back, the *plateau* all between. Blocks are counted from 1, attention odd and FFN
  even.
- **Cycle**: one rise and fall of a channel. The largest is the main one; a model can have smaller ones besides.
- **Ordinary**: tokens or channels drawn at random, without those that spike or are followed for their size.
- **Medians**: an entry over the median of all entries' absolute values there; other quantities over their own median
  over channels.
- **h̃, s\\***: h̃ is a token's vector as RMSNorm passes it on; s\\* the direction in it that the step-up block amplifies.
- **U_k, S_k, λ**: what of a block's weights makes channel k. ||U_k||_F is its gain; its form is h̃' S_k h̃, and λ the
  first eigenvalue of S_k.
- **Static map**: a token that stands first attends to itself alone, so what attention writes there is one matrix.
- **Participation ratio**: how many channels a vector's squares are spread over; 1 if one holds all.
- **Sink**: the key that most attention goes to. The *sink ratio* is the share of heads and windows in which it gets
  more than ε of the attention of a window's queries, on average; T is how many tokens the window has. SK1 has both.
- **BOS**: the token that some tokenizers put before every text.
- **Perplexity**: exp of the mean loss. The cuts (AB) are judged on fewer and shorter windows than stand under each
  model below; AB1 has their number and length.
- **Control**: the same measure where there should be no effect: on ordinary tokens, channels, heads, blocks. In AB it
  can also be a second way to the same cut.

</details>
"""


# A claim in a few words, for a picture; one that has none is shown by its statement, cut short.
SHORT = {
    "LC1": "one to three early FFN blocks write it",
    "LC2": "blocks in between hardly write",
    "LC3": "late FFN blocks cancel it",
    "LC4": "the spike lives in few channels",
    "LC5": "the same channels on all spike tokens",
    "LC6": "spike channels have fixed ratios",
    "LC7": "few tokens spike, the first nearly always",
    "AM1": "the gate is near the identity",
    "AM2": "the spike channel's gain is high",
    "AM3": "the channel's form is of rank one",
    "AM4": "spike channels share s*",
    "AM5": "the write is λ(s*·h̃)²",
    "AM6": "spike tokens lie along s*",
    "AM7": "weights alone find the blocks",
    "X-AM8": "a norm after the block makes the spike",
    "X-MX1": "the router sends spikes to one expert",
    "X-MX2": "one expert writes the spike",
    "TK1": "nearly any token spikes when first",
    "TK2": "the first token's attention: a static map",
    "TK3": "the same tokens elsewhere do not spike",
    "TK4": "spiking delimiters look at themselves",
    "X-TK5": "self-attending delimiters, smaller cycle",
    "NM1": "h̃ is bounded by √d, the spike close to it",
    "NM2": "h̃ is sparse: hardly more than one channel",
    "NM3": "one vector for all spike tokens",
    "NM4": "one vector over the plateau",
    "NM5": "a fixed vector can stand in its place",
    "SK1": "many heads sink on the first token",
    "SK2": "sinks sit on spike tokens",
    "SK3": "sink keys fill one or two dimensions",
    "SK4": "sink heads' queries favour that key",
    "SK5": "sinks follow the spike over depth",
    "SK6": "few rows of W_K make the key",
    "SK7": "the sink's values are small",
    "X-SK8": "a smaller cycle has sinks of its own",
    "X-SK9": "secondary sinks: the primary's direction",
    "AB1": "zeroing the spike breaks the model",
    "AB2": "the spike's mean in its place does no harm",
    "AB3": "without the step-up the sink goes",
    "AB4": "the spike can go, the sink stay",
    "AB5": "the sink can go, the spike stay",
    "AB6": "random channels, other places: nothing",
    "AB7": "the more of the spike, the better",
    "TR1": "better training, more sinks",
    "TR2": "spikes and sinks need no SwiGLU",
    "TR3": "norms set the spike, hardly the sink",
    "TR4": "wide heads sink, narrow ones do not",
    "TR5": "a gate that reads its input: no sinks",
    "TR6": "long windows only: no sinks",
    "X-TR7": "sinks follow the loss, spikes less",
    "X-TR8": "the spike comes before the sink",
    "X-TR9": "idle heads wait at position 0",
    "SV1": "spike tokens set int8's scale",
    "SV2": "a KV cache needs the sink",
    "SV3": "sinks stay as far as was measured",
}


PAPER = "arXiv:2603.05498"


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


LATE_RATIOS = {"sink_ratios": None, **{f"sink_ratios_at_{epsilon:g}": epsilon for epsilon in EPSILONS}}  # None: usual


BREAKS, REPAIRS = 1.5, 1.1  # SV2: times the full cache's perplexity, at least without and at most with the first tokens


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
