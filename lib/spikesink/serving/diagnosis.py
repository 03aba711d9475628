"""Whose failure it is when a serving technique costs perplexity: the spike's, the sink's, or neither's.

A failure that goes when the spike goes, its sink held in both cases, is one of *activation outliers*. One that goes
when the sink's key and value are exempt, or held, is one of *attention routing*. A verdict must hold at both ends of
the interval of the cost, and of the share of it that a remedy leaves.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.stats import t as student

from spikesink.common import measure
from spikesink.patching.cuts import INDIFFERENT
from spikesink.serving.cells import NO_SPIKE, SINK_EXEMPT, SINK_HELD, UNCHANGED, Crossed

GONE = 0.2  # share of a cost, in nats, that a remedy leaves at most where it removes the failure
PART = 0.8  # and where it removes part of it
SAME = 1e-3  # nats of a window, within which two cells are one
NO_FAILURE, NOT_SIGNIFICANT = "no failure", "not significant"  # the interval includes "no failure"
OUTLIERS, ROUTING, PARTLY = "activation outliers", "attention routing", "partly "
NEITHER_HELPS, UNCLEAR, NOT_TESTED = "neither remedy helps", "cause unclear", "cause not tested"
AS_HELD = "same as sink held"


@dataclass(frozen=True)
class Share:
    """What a remedy leaves of a cost in nats, with its 95% interval over windows; None where there is none."""

    value: float
    interval: tuple[float, float] | None = None

    @property
    def ends(self) -> tuple[float, float]:
        """The interval; without one, any share is possible."""
        return self.interval or (-math.inf, math.inf)

    def __str__(self) -> str:
        return f"{self.value:.0%}" + (" ({:.0%} to {:.0%})".format(*self.interval) if self.interval else "")


@dataclass(frozen=True)
class Diagnosis:
    """What a technique costs, as a multiple of the perplexity without it, and the share each remedy leaves.

    There is no share where a remedy was not tried, or where there is hardly a cost.
    """

    cost: float
    interval: tuple[float, float]  # 95%, over windows
    without_spike: Share | None = None
    with_sink: Share | None = None  # the sink exempt, or held where it cannot be
    remedy: str = SINK_EXEMPT  # which of the two that is
    as_held: bool = False  # window by window, removing the spike gives what holding the sink gives

    @property
    def verdict(self) -> str:
        """The cause; both where either remedy suffices, or where each removes part of the cost."""
        low, high = self.interval
        if high <= 1 + INDIFFERENT:
            return NO_FAILURE
        if not low > 1 + INDIFFERENT:  # nor where it is NaN
            return NOT_SIGNIFICANT
        shares = {ROUTING: self.with_sink} if self.as_held else {OUTLIERS: self.without_spike, ROUTING: self.with_sink}
        ends = {cause: share.ends for cause, share in shares.items() if share is not None}
        if not ends:
            return NOT_TESTED
        for most, prefix, conjunction in ((GONE, "", " or "), (PART, PARTLY, " and ")):
            if causes := [cause for cause, (_, high) in ends.items() if high <= most]:
                return prefix + conjunction.join(causes)
        useless = len(ends) == len(shares) and all(low > PART for low, _ in ends.values())
        return NEITHER_HELPS if useless else UNCLEAR


def is_failure(verdict: str) -> bool:
    """Whether this verdict is one of a technique that costs something, at both ends of the interval."""
    return verdict not in (NO_FAILURE, NOT_SIGNIFICANT)


@measure
def diagnose(crossed: Crossed) -> dict[str, Diagnosis]:
    """Diagnose each technique.

    The spike's part is what the cost loses between the cell with the sink held and the one whose spike is removed as
    well. Where holding the sink raises the cost, that harm may be the spike's or not: the share is then of the cost in
    the unchanged model, and its interval covers both readings. Where tokens share no quantizer's range, others meet a
    spike token in its key and value alone, which are held in both cells: there is no share (`as_held`).
    """
    return {name: _diagnose_one(crossed, name) for name in crossed.with_it}


def _diagnose_one(crossed: Crossed, name: str) -> Diagnosis:
    nats = {cell: crossed.nats(name, cell) for cell in crossed.with_it[name]}
    cost, interval, whole = crossed.cost(name), crossed.interval(name), nats[UNCHANGED]
    both = {SINK_HELD, NO_SPIKE} <= set(nats)
    as_held = both and np.allclose(nats[SINK_HELD], nats[NO_SPIKE], rtol=0, atol=SAME)
    remedy = SINK_EXEMPT if SINK_EXEMPT in nats else SINK_HELD
    without_spike = with_sink = None
    if both and not as_held and cost > 1 + INDIFFERENT:
        from_held = whole - nats[SINK_HELD] + nats[NO_SPIKE]
        without_spike = share_left(from_held, max(from_held, nats[NO_SPIKE], key=np.mean), whole)
    if remedy in nats and cost > 1 + INDIFFERENT:
        with_sink = share_left(nats[remedy], nats[remedy], whole)
    return Diagnosis(cost, interval, without_spike, with_sink, remedy, as_held)


Nats = Float[np.ndarray, " window"]


def share_left(least: Nats, most: Nats, whole: Nats) -> Share:
    """The mean of `most` over the mean of the whole, with an interval that also covers the reading `least`."""
    ends = ratio_interval(least, whole), ratio_interval(most, whole)
    interval = None if None in ends else (min(low for low, _ in ends), max(high for _, high in ends))
    return Share(float(most.mean() / whole.mean()), interval)


def ratio_interval(part: Nats, whole: Nats, level: float = 0.95) -> tuple[float, float] | None:
    """Fieller's interval for the mean of a part over the mean of the whole, paired by window.

    None where the whole is not significantly different from zero, or there is one window.
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
def diagnosis_table(diagnoses: Mapping[str, Diagnosis]) -> pd.DataFrame:
    """A row a technique: its cost and what each remedy leaves of it, in nats.

    Below 0% a remedy does more good than the technique does harm; above 100% it does harm of its own.
    """
    rows = []
    for name, one in diagnoses.items():
        low, high = one.interval
        interval = f"{low:.2f} to {high:.2f}" if math.isfinite(low) else "–"
        shares = (AS_HELD if one.as_held else one.without_spike, one.with_sink)
        left = [str(share) if share and is_failure(one.verdict) else "–" for share in shares]
        rows.append((name, f"{one.cost:.2f}", one.verdict, interval, *left))
    columns = ["technique", "perplexity ratio", "diagnosis", "95% interval"]
    columns += ["left with spike removed", "left with sink exempt or held"]
    return pd.DataFrame(rows, columns=columns).set_index("technique")
