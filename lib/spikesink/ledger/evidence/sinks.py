"""TODO."""

from collections.abc import Callable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from spikesink.chain.keys import AttentionReading, _where_there_is_a_spike
from spikesink.chain.lifecycle import Lifecycle, layers_after, layers_before, layers_quiet, plateau_layers
from spikesink.chain.sinks import Scores, _median
from spikesink.common import NotApplicable
from spikesink.ledger.claims import Evidence, make_evidence


def sk1_many_heads(scores: Scores) -> Evidence | NotApplicable:
    """SK1: the share of heads (over layers, heads and windows) that sink on position 0, and what attention it gets.

    Controls: the same share for the other key positions of the first half, mean and largest (which can hold a spike
    token too); and for ordinary tokens, that spike in no cycle, where the scores were told which they are.
    """
    others = scores.above[..., 1 : max(2, scores.length // 2)].mean((0, 1))
    control = {
        "sink_ratio_other_positions": float(others.mean()),
        "sink_ratio_highest_other_position": float(others.max()),
        "mean_attention_other_positions": float(scores.mean[..., 1 : max(2, scores.length // 2)].mean()),
    }
    if scores.n_tokens.get("other"):
        pairs = scores.n_tokens["other"] * scores.anatomy.n_layers * scores.anatomy.n_heads
        control["sink_ratio_ordinary_tokens"] = int(scores.sinks["other"].sum()) / pairs
    return make_evidence(
        measured={
            "sink_ratio": scores.ratio(),
            "epsilon": scores.epsilon,
            "length": scores.length,
            "mean_attention": float(scores.at.mean()),
        },
        control=control | {"attention_if_even": float((1 / torch.arange(1, scores.length + 1)).mean())},
    )


@_where_there_is_a_spike
def sk2_on_spikes(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """SK2: of the (head, token) pairs that are sinks during the plateau, the share that falls on spike tokens.

    Tokens of the first half of each window; `share_whole_windows` counts all. Controls: the share of those tokens that
    spike, which is what chance would give; and the share before the step-up, on the same tokens and on tokens of any
    cycle, since a smaller one can be alive there.
    """
    scores, layers, before = seen.scores, list(plateau_layers(life.main)), layers_before(life)

    def share(sinks: Mapping[str, Tensor], which: Sequence[int], *mine: str) -> tuple[float, int]:
        on = sum(int(sinks[name][which].sum()) for name in mine)
        total = sum(int(sinks[name][which].sum()) for name in ("spike", "smaller", "other"))
        return (on / total if total else float("nan")), total

    found, total = share(scores.sinks, layers, "spike")
    if not total:
        return NotApplicable("no head sinks on any token during the plateau")
    n = scores.n_tokens
    same, n_before = share(scores.sinks, before, "spike")
    return make_evidence(
        measured={
            "share_on_spike_tokens": found,
            "share_whole_windows": share(scores.sinks_anywhere, layers, "spike")[0],
            "n_sinks": total,
            "n_sinks_before": n_before,
        },
        control={
            "share_of_tokens_that_spike": n["spike"] / (n["spike"] + n["smaller"] + n["other"]),
            "share_on_spike_tokens_before": same,
            "share_on_tokens_of_any_cycle_before": share(scores.sinks, before, "spike", "smaller")[0],
        },
    )


@_where_there_is_a_spike
def sk5_over_depth(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """SK5: attention that the spike tokens get, mean over heads and over the layers before, during, after the plateau.

    Before: layers that read the stream before the first step-up block; `attention_before_without_a_spike` leaves out
    those in which a smaller cycle is alive. After: past the plateau (none, where the step-down ends in the last layer).
    Control: the token right after each spike token.
    """
    layers = (layers_before(life), list(plateau_layers(life.main)), layers_after(life))
    spike, after = (seen.scores.received[name].mean(1) for name in ("spike", "next"))
    values = [float(spike[which].mean()) for which in layers]
    quiet = layers_quiet(life)
    measured = {
        "attention_before": values[0],
        "attention_during": values[1],
        "attention_after": values[2] if layers[2] else [],
    }
    if quiet:
        measured["attention_before_without_a_spike"] = float(spike[quiet].mean())
    return make_evidence(
        measured,
        control={
            f"attention_{name}_next_token": float(after[which].mean())
            for name, which in zip(("before", "during", "after"), layers, strict=True)
        },
    )


@_where_there_is_a_spike
def x_sk8_smaller_cycle(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """X-SK8: attention that the tokens of smaller cycles alone get, while such a cycle is alive, and otherwise.

    Alive: on its plateau. Mean over heads and layers; sinks are counted in the first halves. Control: the token right
    after each of them.
    """
    if len(life.cycles) < 2 or not seen.scores.n_tokens_anywhere["smaller"]:
        return NotApplicable("there is no second cycle with tokens of its own")
    alive = sorted({layer for cycle in life.cycles[1:] for layer in plateau_layers(cycle)})
    if not alive:
        return NotApplicable("no layer reads the plateau of a smaller cycle")
    resting = [layer for layer in range(life.trace.anatomy.n_layers) if layer not in alive]
    smaller, after = (seen.scores.received[name].mean(1) for name in ("smaller", "next_smaller"))
    return make_evidence(
        measured={
            "attention_during": float(smaller[alive].mean()),
            "attention_otherwise": float(smaller[resting].mean()) if resting else float("nan"),
            "n_sinks_during": int(seen.scores.sinks["smaller"][alive].sum()),
            "n_sinks_otherwise": int(seen.scores.sinks["smaller"][resting].sum()),
            "n_tokens": seen.scores.n_tokens_anywhere["smaller"],
            "n_tokens_first_half": seen.scores.n_tokens["smaller"],
        },
        control={
            "attention_during_next_token": float(after[alive].mean()),
            "attention_otherwise_next_token": float(after[resting].mean()),
        },
    )


def _no_sinks(seen: AttentionReading, layers: Sequence[int]) -> NotApplicable | None:
    """Why nothing can be said of sinks: no head's mean score of the spike tokens exceeds epsilon in these layers."""
    if (seen.scores.received["spike"][list(layers)] > seen.scores.epsilon).any():
        return None
    return NotApplicable("no head of the plateau sinks on the spike tokens")


def x_sk9_secondary(seen: AttentionReading) -> Evidence | NotApplicable:
    """X-SK9: cosine of secondary sinks' h~ with the primary direction, in the layers where they are sinks, median.

    Controls: the token right after each, in the same layers; all other tokens', mean over the same layers; and how many
    other tokens point along it (cosine above ALIGNED) at some layer without being a sink anywhere.
    """
    rows = seen.secondary
    if isinstance(rows, NotApplicable):
        return rows
    while_sink = rows.heads > 0
    cosine, after = (of[:, :-1:2] for of in (rows.cosine, rows.cosine_after))
    other = rows.cosine_other[:-1:2].expand_as(cosine)
    lasting, layers = rows.lasting(), while_sink.any(0).nonzero()[:, 0]
    return make_evidence(
        measured={
            "cosine_secondary": _median(cosine[while_sink]),
            "cosine_others": _median(other[while_sink]),
            "n_tokens": rows.n,
            "first_layer": int(layers[0]),
            "last_layer": int(layers[-1]),
            "fewest_layers": int(lasting.min()),
            "most_layers": int(lasting.max()),
        },
        control={"cosine_next_token": _median(after[while_sink]), "n_aligned_but_no_sinks": rows.n_aligned},
    )


def secondary_table(
    seen: AttentionReading, decode: Callable[[list[int]], str], most: int = 12
) -> pd.DataFrame | NotApplicable:
    """Secondary sinks by token: how many, the layers they last, the FFN block that turns them, and the cosine then.

    The block is the FFN block over which the cosine with the primary direction rises most, the commonest of a token's.
    """
    rows = seen.secondary
    if isinstance(rows, NotApplicable):
        return rows
    rise = (rows.cosine[:, 2::2] - rows.cosine[:, 1::2]).argmax(1) * 2 + 2
    while_sink = rows.heads > 0
    lines = []
    for token in rows.token.unique().tolist():
        mine = rows.token == token
        layers = while_sink[mine].any(0).nonzero()[:, 0]
        cosine = rows.cosine[mine][:, :-1:2][while_sink[mine]]
        lines.append(
            {
                "token": repr(decode([token])),
                "times": int(mine.sum()),
                "layers": f"{int(layers[0])} to {int(layers[-1])}",
                "in so many layers (median)": int(rows.lasting()[mine].median()),
                "share of heads at most": float(rows.heads[mine].max()),
                "turned by block": int(rise[mine].mode().values),
                "cosine while a sink": _median(cosine),
            }
        )
    return pd.DataFrame(lines).sort_values(["times", "token"], ascending=[False, True]).head(most)
