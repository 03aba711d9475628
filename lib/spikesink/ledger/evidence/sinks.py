"""What sink scores say to claims SK1, SK2, SK5, X-SK8 and X-SK9: who is a sink."""

import math
from collections.abc import Callable, Sequence

import pandas as pd
import torch

from spikesink.chain.keys import AttentionReading, layers_with_spike
from spikesink.chain.lifecycle import Lifecycle, layers_after, layers_before, layers_quiet
from spikesink.chain.sinks import Scores, Secondary, median_of_heads
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.model.anatomy import mlp


@measure
def sk1_many_heads(scores: Scores) -> Evidence:
    """SK1: the share of heads (over layers, heads and windows) that sink on position 0, and what attention it gets.

    Other positions of the first half can hold a spike token too; ordinary tokens are those that spike in no cycle.
    """
    others = slice(1, max(2, scores.length // 2))
    ratios = scores.above[..., others].nanmean((0, 1))
    control = {
        "sink_ratio_other_positions": float(ratios.mean()),
        "sink_ratio_highest_other_position": float(ratios.max()),
        "mean_attention_other_positions": float(scores.mean[..., others].nanmean()),
        "attention_if_even": float((1 / torch.arange(1, scores.length + 1)).mean()),
    }
    if scores.n_tokens.get("other"):
        pairs = scores.n_tokens["other"] * len(scores.anatomy.attention_layers) * scores.anatomy.n_heads
        control["sink_ratio_ordinary_tokens"] = int(scores.sinks["other"].sum()) / pairs
    return make_evidence(
        measured={
            "sink_ratio": scores.ratio(),
            "epsilon": scores.epsilon,
            "length": scores.length,
            "mean_attention": float(scores.at.nanmean()),
        },
        control=control,
    )


@measure
def sk2_on_spikes(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """SK2: of the (head, token) pairs that are sinks during the plateau, the share that falls on spike tokens.

    Tokens of the first half of each window; `share_whole_windows` counts all. Controls: what chance would give; and the
    share before the step-up, on the same tokens and on those of any cycle, since a smaller one can be alive there.
    """
    scores, layers, before = attention.scores, layers_with_spike(life), layers_before(life)

    def count(sinks, which: Sequence[int], *groups: str) -> int:
        return sum(int(sinks[name][which].sum()) for name in groups)

    def share(sinks, which: Sequence[int], *groups: str) -> float:
        total = count(sinks, which, "spike", "smaller", "other")
        return count(sinks, which, *groups) / total if total else math.nan

    n_sinks, n_before = (count(scores.sinks, which, "spike", "smaller", "other") for which in (layers, before))
    if not n_sinks:
        raise NotApplicable("no head sinks on any token during the plateau")
    n = scores.n_tokens
    return make_evidence(
        measured={
            "share_on_spike_tokens": share(scores.sinks, layers, "spike"),
            "share_whole_windows": share(scores.sinks_anywhere, layers, "spike"),
            "n_sinks": n_sinks,
            "n_sinks_before": n_before,
        },
        control={
            "share_of_tokens_that_spike": n["spike"] / (n["spike"] + n["smaller"] + n["other"]),
            "share_on_spike_tokens_before": share(scores.sinks, before, "spike"),
            "share_on_tokens_of_any_cycle_before": share(scores.sinks, before, "spike", "smaller"),
        },
    )


@measure
def sk5_over_depth(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """SK5: attention that the spike tokens get, mean over heads and over the layers before, during, after the plateau.

    `attention_before_without_a_spike` leaves out layers in which a smaller cycle is alive. There is no after where the
    step-down ends in the last layer.
    """
    during = layers_with_spike(life)
    layers = {"before": layers_before(life), "during": during, "after": layers_after(life)}
    spike, following = (attention.scores.received[name].mean(1) for name in ("spike", "next"))
    measured = {f"attention_{name}": float(spike[which].mean()) for name, which in layers.items()}
    if not layers["after"]:
        measured["attention_after"] = []
    if quiet := layers_quiet(life):
        measured["attention_before_without_a_spike"] = float(spike[quiet].mean())
    control = {f"attention_{name}_next_token": float(following[which].mean()) for name, which in layers.items()}
    return make_evidence(measured, control)


@measure
def x_sk8_smaller_cycle(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """X-SK8: attention that the tokens of smaller cycles alone get, while one is on its plateau, and otherwise.

    Mean over heads and layers; sinks are counted in the first halves.
    """
    layers_with_spike(life)
    scores = attention.scores
    if len(life.cycles) < 2 or not scores.n_tokens_anywhere["smaller"]:
        raise NotApplicable("there is no second cycle with tokens of its own")
    alive = sorted({layer for cycle in life.cycles[1:] for layer in cycle.layers})
    if not alive:
        raise NotApplicable("no layer reads the plateau of a smaller cycle")
    resting = [layer for layer in range(life.trace.anatomy.n_layers) if layer not in alive]
    smaller, following = (scores.received[name].mean(1) for name in ("smaller", "next_smaller"))
    return make_evidence(
        measured={
            "attention_during": float(smaller[alive].mean()),
            "attention_otherwise": float(smaller[resting].mean()),
            "n_sinks_during": int(scores.sinks["smaller"][alive].sum()),
            "n_sinks_otherwise": int(scores.sinks["smaller"][resting].sum()),
            "n_tokens": scores.n_tokens_anywhere["smaller"],
            "n_tokens_first_half": scores.n_tokens["smaller"],
        },
        control={
            "attention_during_next_token": float(following[alive].mean()),
            "attention_otherwise_next_token": float(following[resting].mean()),
        },
    )


@measure
def x_sk9_secondary(secondary: Secondary) -> Evidence:
    """X-SK9: cosine of secondary sinks' h~ with the primary direction, in the layers where they are sinks, median.

    Controls, in the same layers: the token right after each, all other tokens' mean; and how many others are ALIGNED.
    """
    while_sink = secondary.heads > 0
    cosine, after = (values[:, :-1:2] for values in (secondary.cosine, secondary.cosine_after))
    other = secondary.cosine_other[:-1:2].expand_as(cosine)
    lasting, layers = secondary.lasting(), while_sink.any(0).nonzero()[:, 0]
    return make_evidence(
        measured={
            "cosine_secondary": median_of_heads(cosine[while_sink]),
            "cosine_others": median_of_heads(other[while_sink]),
            "n_tokens": secondary.n,
            "first_layer": int(layers[0]),
            "last_layer": int(layers[-1]),
            "fewest_layers": int(lasting.min()),
            "most_layers": int(lasting.max()),
        },
        control={
            "cosine_next_token": median_of_heads(after[while_sink]),
            "n_aligned_but_no_sinks": secondary.n_aligned,
        },
    )


@measure
def secondary_table(secondary: Secondary, decode: Callable[[list[int]], str], most: int = 12) -> pd.DataFrame:
    """Secondary sinks by token: how many, the layers they last, the FFN that turns them, and the cosine then.

    That FFN is the one over which the cosine with the primary direction rises most, the commonest of a token's.
    """
    turned = (secondary.cosine[:, 2::2] - secondary.cosine[:, 1::2]).argmax(1)
    while_sink = secondary.heads > 0
    lines = []
    for token in secondary.token.unique().tolist():
        mine = secondary.token == token
        layers = while_sink[mine].any(0).nonzero()[:, 0]
        cosine = secondary.cosine[mine][:, :-1:2][while_sink[mine]]
        lines.append(
            {
                "token": repr(decode([token])),
                "times": int(mine.sum()),
                "layers": f"{int(layers[0])} to {int(layers[-1])}",
                "in so many layers (median)": int(secondary.lasting()[mine].median()),
                "share of heads at most": float(secondary.heads[mine].max()),
                "turned by": str(mlp(int(turned[mine].mode().values))),
                "cosine while a sink": median_of_heads(cosine),
            }
        )
    return pd.DataFrame(lines).sort_values(["times", "token"], ascending=[False, True]).head(most)
