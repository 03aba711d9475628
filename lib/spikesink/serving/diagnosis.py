"""Whose failure it is: the spike's, the sink's, or neither's; and what claims SV1 to SV3 are judged by.

A failure that goes when the spike goes, its sinks kept, is one of *activation outliers*. One that goes when the sink's
key and value are spared is one of *attention routing*. Where neither helps, the model is served what it was not trained
for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd

from spikesink.claims import Evidence, NotApplicable, evidence, where_applicable
from spikesink.patching.chain import FEW_SINKS, INDIFFERENT, NO_SINK
from spikesink.serving import cache
from spikesink.serving.cells import AS_IT_IS, NO_SPIKE, SPARED, Crossed
from spikesink.serving.context import Lengths
from spikesink.serving.long import LONG, Long
from spikesink.serving.quantize import APART, OTHERS_APART, PER_TENSOR, PER_TOKEN

GONE = 0.2  # of a cost, in nats: what is left, at most, where it has gone
PART = 0.8  # and where it has gone in part
FINE = "no failure"
OUTLIERS = "activation outliers"
ROUTING = "attention routing"
MISMATCH = "neither: not what it was trained for"
SHORT = f"text and context are too short: fewer than {LONG:,} tokens"
UNKNOWN = "–"  # no remedy was tried


@dataclass(frozen=True)
class Diagnosis:
    """What a technique costs, as times of the perplexity without it, and what of that is left under each remedy."""

    cost: float
    interval: tuple[float, float]  # 95%, over windows
    without_spike: float | None  # None: not tried
    with_sink: float | None

    def left(self, remedied: float | None) -> float | None:
        """The share of the cost, in nats, that is left under a remedy."""
        return None if remedied is None else math.log(remedied) / math.log(self.cost)

    @property
    def verdict(self) -> str:
        """One of the three kinds of failure, or none; of both where either remedy suffices, in part where none does."""
        if self.cost <= 1 + INDIFFERENT or self.interval[0] <= 1:
            return FINE
        tried = {OUTLIERS: self.left(self.without_spike), ROUTING: self.left(self.with_sink)}
        tried = {kind: share for kind, share in tried.items() if share is not None}
        if not tried:
            return UNKNOWN
        for most, word in ((GONE, ""), (PART, "in part ")):
            if kinds := [kind for kind, share in tried.items() if share <= most]:
                return word + (" and " if word else " or ").join(kinds)
        return MISMATCH


@where_applicable
def diagnose(crossed: Crossed | NotApplicable) -> dict[str, Diagnosis] | NotApplicable:
    """A diagnosis of each technique."""
    found = {}
    for name, row in crossed.with_it.items():
        without, spared = (crossed.cost(name, cell) if cell in row else None for cell in (NO_SPIKE, SPARED))
        found[name] = Diagnosis(crossed.cost(name), crossed.interval(name), without, spared)
    return found


@where_applicable
def diagnoses(found: Mapping[str, Diagnosis] | NotApplicable) -> pd.DataFrame | NotApplicable:
    """Diagnoses as a table: perplexity, times that without the technique, and the share left under each remedy."""
    rows = []
    for name, one in found.items():
        low, high = one.interval
        rows.append(
            {
                "technique": name,
                "perplexity, times": f"{one.cost:.2f}",
                "95% interval": f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "–",
                "left without the spike": _share(one, one.without_spike),
                "left with the sink kept": _share(one, one.with_sink),
                "diagnosis": one.verdict,
            }
        )
    return pd.DataFrame(rows).set_index("technique")


def _share(one: Diagnosis, remedied: float | None) -> str:
    return "–" if one.verdict == FINE or remedied is None else f"{max(0, one.left(remedied)):.0%}"


@where_applicable
def sets_the_scale(crossed: Crossed | NotApplicable) -> Evidence | NotApplicable:
    """SV1: what int8 per tensor costs, and what of it is left when the spike's channels are apart.

    Controls: as many other channels apart; and the model whose spike is removed and whose sinks are kept.
    """
    done, plain = crossed.with_it, crossed.plain
    n, length = plain[AS_IT_IS].loss.shape
    return evidence(
        measured={
            "perplexity_fp": plain[AS_IT_IS].perplexity,
            "perplexity_int8_per_tensor": done[PER_TENSOR][AS_IT_IS].perplexity,
            "perplexity_int8_spike_split": done[APART][AS_IT_IS].perplexity,
            "perplexity_int8_per_token": done[PER_TOKEN][AS_IT_IS].perplexity,
            **_interval("per_tensor_over_split", done[PER_TENSOR][AS_IT_IS].times(done[APART][AS_IT_IS])),
            "n_windows": n,
            "length": length + 1,
        },
        control={
            "perplexity_int8_others_split": done[OTHERS_APART][AS_IT_IS].perplexity,
            "perplexity_fp_no_spike": plain[NO_SPIKE].perplexity,
            "perplexity_int8_per_tensor_no_spike": done[PER_TENSOR][NO_SPIKE].perplexity,
        },
    )


@where_applicable
def needs_the_sink(long: Long, crossed: Crossed | NotApplicable, budget: int) -> Evidence | NotApplicable:
    """SV2: one long text through caches of the last tokens alone, and of the last and the first four.

    `short_…` are the techniques of `cache.evictions`, with their own budget, on short windows: how many times the
    perplexity with every key. Controls: four other tokens are kept; and the last tokens are run anew, so that there is
    a first token among them, and nothing to keep: what is lost then is what the others said.
    """
    if long.lengths.lengths[-1] < LONG:
        return NotApplicable(SHORT)
    window, with_first, others = (long.streams[name] for name in (cache.WINDOW, cache.WITH_FIRST, cache.OTHERS))

    def short(**names: str) -> dict[str, float]:
        return {f"short_{key}": crossed.cost(name) for key, name in names.items() if name in crossed.with_it}

    return evidence(
        measured={
            "perplexity_full": float(long.lengths.loss.mean().exp()),
            "perplexity_window": window.perplexity(),
            "perplexity_window_with_sink": with_first.perplexity(),
            **_interval("window_over_full", long.times(window.loss)[1:]),
            **_interval("with_sink_over_full", long.times(with_first.loss)[1:]),
            "perplexity_window_with_sink_shifted": long.streams[cache.SHIFTED].perplexity(),
            "n_tokens": long.lengths.lengths[-1],
            "n_keys": window.policy.window,
            **short(window=cache.WINDOW, first=cache.named(1), first_4=cache.WITH_FIRST, constant=cache.CONSTANT),
            "short_n_tokens": crossed.plain[AS_IT_IS].loss.shape[1] + 1,
            "short_n_keys": budget,
        },
        control={
            "perplexity_window_with_others": others.perplexity(),
            "perplexity_run_anew": float(long.afresh.mean().exp()),
            **short(others=cache.OTHERS, heavy_hitters=cache.HEAVY),
        },
    )


def _interval(name: str, ends: tuple[float, float]) -> dict[str, list[float]]:
    return {f"interval_{name}": list(ends)} if all(map(math.isfinite, ends)) else {}


@where_applicable
def over_lengths(found: Lengths | NotApplicable) -> Evidence | NotApplicable:
    """SV3: sink ratio and perplexity by length, to the context's limit as far as the text goes; and past it.

    The control is what the queries of each stretch alone give position 0: a ratio over all queries is slow to move.
    """
    within = [i for i, length in enumerate(found.lengths) if length <= found.limit]
    if found.lengths[within[-1]] < LONG:
        return NotApplicable(SHORT)
    if max(found.sink_ratios) <= FEW_SINKS:
        return NotApplicable(NO_SINK)
    past = range(len(within), len(found.lengths))
    beyond = {
        "lengths_past": [found.lengths[i] for i in past],
        "sink_ratios_past": [found.sink_ratios[i] for i in past],
        "perplexities_past": [found.perplexities[i] for i in past],
    }
    return evidence(
        measured={
            "lengths": [found.lengths[i] for i in within],
            "sink_ratios": [found.sink_ratios[i] for i in within],
            "perplexities": [found.perplexities[i] for i in within],
            "largest_first": found.first,
            "largest_elsewhere": [found.elsewhere[i] for i in within],
            "limit": found.limit,
            **(beyond if past else {}),
        },
        control={"sink_ratios_of_late_queries": [found.late_ratios[i] for i in within]},
    )
