"""Whose failure it is: the spike's, the sink's, or neither's; and what claims SV1 to SV3 are judged by.

A failure that goes when the spike goes, its sinks held in both cases, is one of *activation outliers*. One that goes
when the sink's key and value are spared, or held, is one of *attention routing*. That neither helps is no
explanation: often the model is served what it was not trained for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import t as student

from spikesink.claims import Evidence, NotApplicable, evidence, where_applicable
from spikesink.patching.chain import FEW_SINKS, INDIFFERENT, NO_SINK
from spikesink.serving import cache
from spikesink.serving.cells import AS_IT_IS, HELD, NO_SPIKE, SPARED, Crossed
from spikesink.serving.context import Lengths, interval_of
from spikesink.serving.long import LONG, Long
from spikesink.serving.quantize import APART, OTHERS_APART, PER_TENSOR, PER_TOKEN

GONE = 0.2  # of a cost, in nats: what is left, at most, where it has gone
PART = 0.8  # and where it has gone in part
FINE = "no failure"
UNSURE = "not to be told from none"  # the interval reaches 1
OUTLIERS = "activation outliers"
ROUTING = "attention routing"
MISMATCH = "neither remedy helps"
OPEN = "cause left open"  # a remedy helps on these windows, and may not on others
SHORT_SIGHTED = "no layer sees the first token from the end of the text"
SHORT = f"text and context are too short: fewer than {LONG:,} tokens"
UNKNOWN = "not taken apart"


@dataclass(frozen=True)
class Diagnosis:
    """What a technique costs, as times of the perplexity without it, and what of that is left under each remedy."""

    cost: float
    interval: tuple[float, float]  # 95%, over windows
    held: float | None = None  # times, where the sink is held; None: not tried
    without_spike: float | None = None  # times, where it is held as well and the spike is gone
    spared: float | None = None  # times, where the technique leaves the sink's key and value out
    spike_interval: tuple[float, float] | None = None  # 95%, of the share that is left without the spike
    sink_interval: tuple[float, float] | None = None  # and of that with the sink spared or held

    @property
    def left_without_spike(self) -> float | None:
        """The share of the cost, in nats, that does not go with the spike: by which it costs less than with the sink
        held alone.
        """
        if self.held is None or self.without_spike is None:
            return None
        return None if self._none else 1 - math.log(self.held / self.without_spike) / math.log(self.cost)

    @property
    def left_with_sink(self) -> float | None:
        """The share of the cost, in nats, that is left where the sink is spared, or held where it cannot be."""
        remedied = self.held if self.spared is None else self.spared
        return None if remedied is None or self._none else math.log(remedied) / math.log(self.cost)

    @property
    def _none(self) -> bool:
        """Whether there is no cost to speak of, and so no share of it."""
        return self.cost <= 1 + INDIFFERENT

    @property
    def verdict(self) -> str:
        """One of the three kinds of failure, or none; of both where either remedy suffices, in part where none does."""
        if self._none:
            return FINE
        if not self.interval[0] > 1:  # nor where there is none, of one window
            return UNSURE
        tried = {
            OUTLIERS: (self.left_without_spike, self.spike_interval),
            ROUTING: (self.left_with_sink, self.sink_interval),
        }
        tried = {kind: of for kind, of in tried.items() if of[0] is not None}
        if not tried:
            return UNKNOWN
        # Some of the cost goes beyond doubt: less than all of it is left at the upper end, too.
        sure = {kind: share for kind, (share, interval) in tried.items() if interval is None or interval[1] < 1}
        for most, word in ((GONE, ""), (PART, "in part ")):
            if kinds := [kind for kind, share in sure.items() if share <= most]:
                return word + (" and " if word else " or ").join(kinds)
        return OPEN if any(share <= PART for share, _ in tried.values()) else MISMATCH


@where_applicable
def diagnose(crossed: Crossed | NotApplicable) -> dict[str, Diagnosis] | NotApplicable:
    """A diagnosis of each technique."""
    found = {}
    for name, row in crossed.with_it.items():
        under = [crossed.cost(name, cell) if cell in row else None for cell in (HELD, NO_SPIKE, SPARED)]
        nats = {cell: crossed.nats(name, cell) for cell in row}
        without = nats[AS_IT_IS] - nats[HELD] + nats[NO_SPIKE] if {HELD, NO_SPIKE} <= set(row) else None
        kept = nats.get(SPARED, nats.get(HELD))
        shares = [None if left is None else share_interval(left, nats[AS_IT_IS]) for left in (without, kept)]
        found[name] = Diagnosis(crossed.cost(name), crossed.interval(name), *under, *shares)
    return found


def share_interval(
    part: Float[np.ndarray, " window"], whole: Float[np.ndarray, " window"], level: float = 0.95
) -> tuple[float, float] | None:
    """Fieller's interval for the mean of a part over the mean of the whole, paired by window.

    None where the whole cannot be told from nothing, or there is one window alone: any share would do then.
    """
    n = len(whole)
    if n < 2:
        return None
    spread = np.cov(part, whole) * student.ppf((1 + level) / 2, n - 1) ** 2 / n
    least = whole.mean() ** 2 - spread[1, 1]
    if least <= 0:
        return None
    middle = part.mean() * whole.mean() - spread[0, 1]
    root = math.sqrt(max(0.0, middle**2 - least * (part.mean() ** 2 - spread[0, 0])))
    return (middle - root) / least, (middle + root) / least


@where_applicable
def diagnoses(found: Mapping[str, Diagnosis] | NotApplicable) -> pd.DataFrame | NotApplicable:
    """Diagnoses as a table: perplexity, times that without the technique, and the share left under each remedy.

    A share is of the cost in nats, with its interval; below 0% the remedy does more good than the technique harm, above
    100% it does harm of its own.
    """
    rows = []
    for name, one in found.items():
        low, high = one.interval
        rows.append(
            {
                "technique": name,
                "perplexity, times": f"{one.cost:.2f}",
                "95% interval": f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "–",
                "left without the spike": _share(one, one.left_without_spike, one.spike_interval),
                "left with the sink kept or held": _share(one, one.left_with_sink, one.sink_interval),
                "diagnosis": one.verdict,
            }
        )
    return pd.DataFrame(rows).set_index("technique")


def _share(one: Diagnosis, left: float | None, interval: tuple[float, float] | None) -> str:
    if one.verdict in (FINE, UNSURE) or left is None:
        return "–"
    return f"{left:.0%}" + (f" ({interval[0]:.0%} to {interval[1]:.0%})" if interval else "")


@where_applicable
def sets_the_scale(crossed: Crossed | NotApplicable) -> Evidence | NotApplicable:
    """SV1: what int8 per tensor costs, and what of it is left when the spike's channels are apart.

    Controls: as many other channels apart; and the model whose spike is removed and whose sinks are held.
    """
    done, plain = crossed.with_it, crossed.plain
    per_tensor, split, others = (done[name][AS_IT_IS] for name in (PER_TENSOR, APART, OTHERS_APART))
    if len(per_tensor.loss) < 2:
        return NotApplicable("one window alone has no interval")
    n, length = plain[AS_IT_IS].loss.shape
    return evidence(
        measured={
            "perplexity_fp": plain[AS_IT_IS].perplexity,
            "perplexity_int8_per_tensor": done[PER_TENSOR][AS_IT_IS].perplexity,
            "perplexity_int8_spike_split": done[APART][AS_IT_IS].perplexity,
            "perplexity_int8_per_token": done[PER_TOKEN][AS_IT_IS].perplexity,
            "interval_per_tensor_over_split": list(per_tensor.times(split)),
            "n_windows": n,
            "length": length + 1,
        },
        control={
            "perplexity_int8_others_split": done[OTHERS_APART][AS_IT_IS].perplexity,
            "interval_per_tensor_over_others": list(per_tensor.times(others)),
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
            **_interval("with_sink_over_shifted", interval_of(with_first.loss - long.streams[cache.SHIFTED].loss)),
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

    The ratio is of what the queries of each stretch alone give position 0, in the layers that see it from everywhere.
    Controls: the same of another position; and the ratio over all queries so far and all layers, which is the usual one
    and slow to move.
    """
    within = [i for i, length in enumerate(found.lengths) if length <= found.limit]
    if found.lengths[within[-1]] < LONG:
        return NotApplicable(SHORT)
    if max(found.sink_ratios) <= FEW_SINKS:
        return NotApplicable(NO_SINK)
    if not found.throughout:
        return NotApplicable(SHORT_SIGHTED)
    past, late = range(len(within), len(found.lengths)), found.late_ratios()
    beyond = {
        "lengths_past": [found.lengths[i] for i in past],
        "sink_ratios_past": [late[i] for i in past],
        "perplexities_past": [found.perplexities[i] for i in past],
    }
    return evidence(
        measured={
            "lengths": [found.lengths[i] for i in within],
            "sink_ratios": [late[i] for i in within],
            "perplexities": [found.perplexities[i] for i in within],
            "largest_first": found.first,
            "largest_elsewhere": [found.elsewhere[i] for i in within],
            "limit": found.limit,
            "n_layers": len(found.throughout),
            **(beyond if past else {}),
        },
        control={
            "sink_ratios_other_position": [found.late_ratios(found.other)[i] for i in within],
            "sink_ratios_of_all_queries": [found.sink_ratios[i] for i in within],
        },
    )
