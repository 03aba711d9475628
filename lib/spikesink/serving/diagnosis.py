"""Whose failure it is: the spike's, the sink's, or neither's; and what claims SV1 to SV3 are judged by.

A failure that goes when the spike goes, its sinks held in both cases, is one of *activation outliers*. One that goes
when the sink's key and value are spared, or held, is one of *attention routing*. That neither helps is no
explanation: often the model is served what it was not trained for. Of a cost, and of what is left of it, nothing is
said that does not hold at both ends of its interval.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import t as student

from spikesink.claims import LATE_RATIOS, Evidence, NotApplicable, evidence, left_open, where_applicable
from spikesink.patching.chain import FEW_SINKS, INDIFFERENT, NO_SINK
from spikesink.serving import cache
from spikesink.serving.cells import AS_IT_IS, HELD, NO_SPIKE, SPARED, Crossed
from spikesink.serving.context import LONG_BLOCK, Lengths, interval_of
from spikesink.serving.long import LONG, Long
from spikesink.serving.quantize import APART, OTHERS_APART, PER_TENSOR, PER_TOKEN

GONE = 0.2  # of a cost, in nats: what is left, at most, where it has gone
PART = 0.8  # and where it has gone in part
IN_PART = "at least in part "
FINE = "no failure"
UNSURE = "not surely a failure"  # the interval reaches what is none
OUTLIERS = "activation outliers"
ROUTING = "attention routing"
MISMATCH = "neither remedy helps"
OPEN = "cause left open"  # on as many windows a remedy may help, or not
SHORT_SIGHTED = "no layer sees the first token from the end of the text"
SHORT = f"text and context are too short: fewer than {LONG:,} tokens"
UNKNOWN = "not taken apart"
OPEN_SV2 = "{:.2f} to {:.2f} times without the first tokens, {:.2f} to {:.2f} with four of them, leave it open"
SAME = 1e-3  # nats of a window, within which two cells are one
AS_HELD = "as with the sink held"


@dataclass(frozen=True)
class Share:
    """What is left of a cost in nats, with its 95% interval over windows; None where there is none."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """Of the interval; any share will do where there is none."""
        return self.interval or (-math.inf, math.inf)

    def __str__(self) -> str:
        return f"{self.value:.0%}" + (" ({:.0%} to {:.0%})".format(*self.interval) if self.interval else "")


@dataclass(frozen=True)
class Diagnosis:
    """What a technique costs, as times of the perplexity without it, and what of that is left under each remedy.

    No share where the remedy was not tried, or the cost is none to speak of. Nor is there one of the spike where tokens
    share nothing that is rounded: others see a spike token's key and value alone, and these are held.
    """

    cost: float
    interval: tuple[float, float]  # 95%, over windows
    without_spike: Share | None = None  # left where the spike is gone
    with_sink: Share | None = None  # left where the sink is spared, or held where it cannot be
    remedy: str = SPARED  # which of the two that is
    as_held: bool = False  # without the spike it is, window by window, what it is with the sink held

    @property
    def verdict(self) -> str:
        """One of the three kinds of failure, or none; of both where either remedy suffices, in part where none does."""
        low, high = self.interval
        if high <= 1 + INDIFFERENT:
            return FINE
        if not low > 1 + INDIFFERENT:  # nor where there is none, of one window
            return UNSURE
        could = {ROUTING: self.with_sink} if self.as_held else {OUTLIERS: self.without_spike, ROUTING: self.with_sink}
        ends = {kind: share.ends for kind, share in could.items() if share is not None}
        if not ends:
            return UNKNOWN
        for most, word in ((GONE, ""), (PART, IN_PART)):
            if kinds := [kind for kind, (_, high) in ends.items() if high <= most]:
                return word + (" and " if word else " or ").join(kinds)
        return MISMATCH if len(ends) == len(could) and all(low > PART for low, _ in ends.values()) else OPEN


@where_applicable
def diagnose(crossed: Crossed | NotApplicable) -> dict[str, Diagnosis] | NotApplicable:
    """A diagnosis of each technique.

    What goes with the spike is what the cost loses from the cell in which the sink is held to the one whose spike is
    gone as well. Where to hold the sink makes it dearer, whose that harm is stays open: the share is by what the cost
    loses from what it is, and its interval reaches down to that of the other reading.
    """
    found = {}
    for name, row in crossed.with_it.items():
        nats = {cell: crossed.nats(name, cell) for cell in row}
        remedy, left = SPARED if SPARED in row else HELD, {}
        both = {HELD, NO_SPIKE} <= set(row)
        as_held = both and np.allclose(nats[HELD], nats[NO_SPIKE], rtol=0, atol=SAME)
        if both and not as_held:
            from_held = nats[AS_IT_IS] - nats[HELD] + nats[NO_SPIKE]
            left["without_spike"] = from_held, max(from_held, nats[NO_SPIKE], key=np.mean)
        if remedy in row:
            left["with_sink"] = nats[remedy], nats[remedy]
        cost = crossed.cost(name)
        shares = {which: share(*parts, nats[AS_IT_IS]) for which, parts in left.items() if cost > 1 + INDIFFERENT}
        found[name] = Diagnosis(cost, crossed.interval(name), **shares, remedy=remedy, as_held=as_held)
    return found


def share(
    least: Float[np.ndarray, " window"], most: Float[np.ndarray, " window"], whole: Float[np.ndarray, " window"]
) -> Share:
    """The mean of a part over the mean of the whole; of a part that can be read in two ways, the larger one.

    The interval holds those of both readings.
    """
    ends = share_interval(least, whole), share_interval(most, whole)
    interval = None if None in ends else (min(low for low, _ in ends), max(high for _, high in ends))
    return Share(float(most.mean() / whole.mean()), interval)


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
                "diagnosis": one.verdict,
                "95% interval": f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "–",
                "left without the spike": _share(one, AS_HELD if one.as_held else one.without_spike),
                "left with the sink kept or held": _share(one, one.with_sink),
            }
        )
    return pd.DataFrame(rows).set_index("technique")


def surely(verdict: str) -> bool:
    """Whether what has this verdict surely costs something."""
    return verdict not in (FINE, UNSURE)


def _share(one: Diagnosis, left: Share | str | None) -> str:
    return str(left) if surely(one.verdict) and left is not None else "–"


@where_applicable
def sets_the_scale(crossed: Crossed | NotApplicable) -> Evidence | NotApplicable:
    """SV1: what int8 per tensor costs, and what of it is left when the spike's channels are apart.

    Nothing is judged where int8 per tensor costs nothing that is told from none, nor where the interval leaves open
    whether the spike's channels are what it costs. Controls: as many other channels apart, those in which other tokens
    have most; and the model whose spike is removed and whose sinks are held.
    """
    if crossed.reason:
        return NotApplicable(crossed.reason)
    if len(crossed.nats(PER_TENSOR)) < 2:
        return NotApplicable("one window alone has no interval")
    low, high = crossed.interval(PER_TENSOR)
    over = crossed.times(PER_TENSOR, APART)
    n, length = crossed.plain[AS_IT_IS].loss.shape

    def perplexity(technique: str, cell: str = AS_IT_IS) -> float:
        return crossed.perplexity(crossed.with_it[technique][cell])

    measured = {
        "perplexity_fp": crossed.perplexity(crossed.plain[AS_IT_IS]),
        "perplexity_int8_per_tensor": perplexity(PER_TENSOR),
        "perplexity_int8_spike_split": perplexity(APART),
        "perplexity_int8_per_token": perplexity(PER_TOKEN),
        "interval_per_tensor_over_fp": [low, high],
        "interval_per_tensor_over_split": list(over),
        "n_windows": n,
        "length": length + 1,
    }
    if low <= 1 + INDIFFERENT:
        measured["reason"] = f"int8 per tensor costs nothing that is told from none ({low:.2f} to {high:.2f} times)"
    elif left_open("SV1", measured):
        measured["reason"] = "{:.2f} to {:.2f} times that with the spike's channels apart leaves it open".format(*over)
    return evidence(
        measured=measured,
        control={
            "perplexity_int8_others_split": perplexity(OTHERS_APART),
            "interval_per_tensor_over_others": list(crossed.times(PER_TENSOR, OTHERS_APART)),
            "perplexity_fp_no_spike": crossed.perplexity(crossed.plain[NO_SPIKE]),
            "perplexity_int8_per_tensor_no_spike": perplexity(PER_TENSOR, NO_SPIKE),
        },
    )


@where_applicable
def needs_the_sink(long: Long, crossed: Crossed | NotApplicable, budget: int) -> Evidence | NotApplicable:
    """SV2: one long text through caches of the last tokens alone, and of the last and the first four.

    `short_…` are the techniques of `cache.evictions`, with their own budget, on short windows: how many times the
    perplexity with every key. Nothing is judged where an interval leaves it open. Controls: four other tokens are kept;
    and the last tokens are run anew, so that there is a first token among them, and nothing to keep: what is lost then
    is what the others said.
    """
    if long.lengths.lengths[-1] < LONG:
        return NotApplicable(SHORT)
    window, with_first, others = (long.streams[name] for name in (cache.WINDOW, cache.WITH_FIRST, cache.OTHERS))
    without, kept, instead = (long.times(of.loss)[1:] for of in (window, with_first, others))

    def short(**names: str) -> dict[str, float]:
        return {f"short_{key}": crossed.cost(name) for key, name in names.items() if name in crossed.with_it}

    measured = {
        "perplexity_full": float(long.lengths.loss.mean().exp()),
        "perplexity_window": window.perplexity(),
        "perplexity_window_with_sink": with_first.perplexity(),
        "interval_window_over_full": list(without),
        "interval_with_sink_over_full": list(kept),
        "perplexity_window_with_sink_shifted": long.streams[cache.SHIFTED].perplexity(),
        "interval_with_sink_over_shifted": list(
            interval_of(with_first.loss - long.streams[cache.SHIFTED].loss, LONG_BLOCK)
        ),
        "n_tokens": long.lengths.lengths[-1],
        "n_keys": window.policy.window,
        **short(window=cache.WINDOW, first=cache.named(1), first_4=cache.WITH_FIRST, constant=cache.CONSTANT),
        "short_n_tokens": crossed.plain[AS_IT_IS].loss.shape[1] + 1,
        "short_n_keys": budget,
    }
    if left_open("SV2", measured):
        measured["reason"] = OPEN_SV2.format(*without, *kept)
    return evidence(
        measured=measured,
        control={
            "perplexity_window_with_others": others.perplexity(),
            "interval_with_others_over_full": list(instead),
            "perplexity_run_anew": float(long.afresh.mean().exp()),
            **short(others=cache.OTHERS, heavy_hitters=cache.HEAVY),
        },
    )


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
    ratios = {name: [found.late_ratios(epsilon=at)[i] for i in within] for name, at in LATE_RATIOS.items()}
    beyond = {
        "lengths_past": [found.lengths[i] for i in past],
        "sink_ratios_past": [late[i] for i in past],
        "perplexities_past": [found.perplexities[i] for i in past],
    }
    return evidence(
        measured={
            "lengths": [found.lengths[i] for i in within],
            **ratios,
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
