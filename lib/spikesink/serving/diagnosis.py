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

from spikesink.common import NotApplicable, measure
from spikesink.patching.cuts import INDIFFERENT
from spikesink.serving.cells import AS_IT_IS, HELD, NO_SPIKE, SPARED, Crossed

GONE = 0.2  # of a cost, in nats: what is left, at most, where it has gone


PART = 0.8  # and where it has gone in part


IN_PART = "at least in part "


FINE = "no failure"


UNSURE = "not surely a failure"  # the interval reaches what is none


OUTLIERS = "activation outliers"


ROUTING = "attention routing"


MISMATCH = "neither remedy helps"


OPEN = "cause left open"  # on as many windows a remedy may help, or not


UNKNOWN = "not taken apart"


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


@measure
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


@measure
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
