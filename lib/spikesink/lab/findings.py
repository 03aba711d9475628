"""What the records of a tier say: each variant beside its base, with an interval, and beside what the paper finds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from spikesink import paper
from spikesink.claims import Evidence, NotApplicable, evidence
from spikesink.lab.families import BASE, FAMILIES, VARIANTS
from spikesink.lab.records import Record

LEVEL = 0.95
NO_RECORDS = "there are no records of these variants yet; make ablations trains them"
STAYS_SINK, STAYS_SPIKE = 0.05, math.log(1.5)  # changes of sink ratio, and of log largest activation, that are none
CLAIMS = {f"TR{i}": family for i, family in enumerate(FAMILIES, start=1)}
FAMILY = {variant.name: variant.family for variant in VARIANTS}


@dataclass(frozen=True)
class Change:
    """How a measure of a variant differs from the base's: an interval over seeds, and which way the paper's goes.

    A change of the sink ratio is a difference, one of the largest activation the log of a ratio.
    """

    measure: str
    value: float
    low: float
    high: float
    paper: str | None  # "up", "down", "stays"; None where the paper does not say

    @property
    def interval(self) -> tuple[float, float, float]:
        """The value, and the ends of its interval."""
        return self.value, self.low, self.high

    @property
    def way(self) -> str:
        """Which way it goes here: "up" or "down" if the interval leaves no doubt, else "unclear"."""
        return "up" if self.low > 0 else "down" if self.high < 0 else "unclear"

    @property
    def agrees(self) -> bool | None:
        """Whether it goes the paper's way; None where the paper does not say.

        What stays in the paper is to stay here: to show no change that is beyond doubt and beyond the band.
        """
        if self.paper is None:
            return None
        if self.paper == "stays":
            return self.way == "unclear" or abs(self.value) <= _band(self.measure)
        return self.way == self.paper


@dataclass(frozen=True)
class Compared:
    """A variant beside its base; means over seeds, of the largest activation the geometric one."""

    name: str
    loss: float
    sink_ratio: float
    max_activation: float
    over_median: float  # the largest activation over the stream's median, which does not change with the stream's size
    seeds: int
    sink: Change
    spike: Change


def _band(measure: str) -> float:
    return STAYS_SINK if measure == "sink" else STAYS_SPIKE


def _values(records: Iterable[Record], measure: str) -> np.ndarray:
    values = np.array([record.final["sink_ratio" if measure == "sink" else "max_activation"] for record in records])
    return values if measure == "sink" else np.log(values)


def _over_median(records: Sequence[Record]) -> float:
    ratios = [record.final["max_activation"] / record.final["median"] for record in records]
    return float(np.exp(np.mean(np.log(ratios))))


def by_name(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by variant, the base first, in the order in which families list them."""
    order = [BASE, *FAMILY]
    found = {name: [r for r in records if r.name == name] for name in order}
    return {name: rows for name, rows in found.items() if rows}


def pooled(records: Sequence[Record], measure: str) -> tuple[float, int]:
    """Standard deviation over seeds, one for all variants of which there are several, and its degrees of freedom."""
    groups = [_values(rows, measure) for rows in by_name(records).values() if len(rows) > 1]
    freedom = sum(len(group) - 1 for group in groups)
    if not freedom:
        return math.nan, 0
    return math.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / freedom), freedom


def margin(records: Sequence[Record], measure: str, ours: int, others: int) -> float:
    """Half the width of an interval for the difference of two means, of so many seeds each."""
    deviation, freedom = pooled(records, measure)
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * deviation * math.sqrt(1 / ours + 1 / others))


def change(records: Sequence[Record], name: str, measure: str) -> Change:
    """A variant's change against the base, with an interval from the spread over seeds that all variants share.

    One standard deviation is estimated from all variants with several seeds; a variant with one seed has the wider
    interval that its one value deserves.
    """
    named = by_name(records)
    ours, base = _values(named[name], measure), _values(named[BASE], measure)
    value, half = float(ours.mean() - base.mean()), margin(records, measure, len(ours), len(base))
    return Change(measure, value, value - half, value + half, direction(name, measure))


def direction(name: str, measure: str) -> str | None:
    """Which way the paper's variant goes against its base; None where it does not say."""
    sink, spike = paper.TRAINED_VARIANTS[FAMILY[name]].get(name, (None, None))
    found, base = (sink, paper.TRAINED_BASE[0]) if measure == "sink" else (spike, paper.TRAINED_BASE[1])
    if found is None or isinstance(found, str):
        return found
    moved = found - base if measure == "sink" else math.log(found / base)
    return "stays" if abs(moved) <= _band(measure) else "up" if moved > 0 else "down"


def compared(records: Sequence[Record], family: str | None = None) -> list[Compared]:
    """Every variant of a family (or of all) that was trained, beside the base."""
    return [
        Compared(
            **_means(name, rows),
            sink=change(records, name, "sink"),
            spike=change(records, name, "spike"),
        )
        for name, rows in by_name(records).items()
        if name != BASE and family in (None, FAMILY[name])
    ]


def centre(records: Sequence[Record]) -> tuple[float, float]:
    """The base's largest activation and its sink ratio, over its seeds."""
    row = _means(BASE, by_name(records)[BASE])
    return row["max_activation"], row["sink_ratio"]


def table(found: Sequence[Compared]) -> pd.DataFrame | NotApplicable:
    """Variants as a tidy table, each change with its interval, and what the paper says of it."""
    if not found:
        return NotApplicable(NO_RECORDS)
    rows = [
        {
            "variant": one.name,
            "seeds": one.seeds,
            "loss": one.loss,
            "sink ratio": one.sink_ratio,
            "against base": "{:+.2f} ({:+.2f} to {:+.2f})".format(*one.sink.interval),
            "paper: sink": one.sink.paper or "",
            "largest activation": one.max_activation,
            "times base": "{:.2f} ({:.2f} to {:.2f})".format(*map(math.exp, one.spike.interval)),
            "paper: spike": one.spike.paper or "",
            "over median": one.over_median,
        }
        for one in found
    ]
    return pd.DataFrame(rows).set_index("variant")


def family_evidence(records: Sequence[Record], family: str, task: Sequence[Record] = ()) -> Evidence | NotApplicable:
    """TR1 to TR6: for each variant that the paper reports, does the change against the base go its way here?

    A change counts where its interval over seeds leaves no doubt (see `Change`). Control: each of the base's own seeds
    in a variant's place, put beside the others with the interval that a variant of one seed has; a "change" there is a
    false alarm.

    Args:
        records: of the text tier, by which the verdict is given.
        family: one of `families.FAMILIES`.
        task: records of the task tier, to set beside it.
    """
    named = by_name(records)
    found = compared(records, family) if BASE in named else []
    if not found:
        return NotApplicable(f"no record of the {family} family; train them with make ablations TIER=text")
    if pooled(records, "sink")[1] == 0:
        return NotApplicable("no variant has a second seed, so that no change can be told from chance")
    said = [(one.name, change) for one in found for change in (one.sink, one.spike) if change.agrees is not None]
    agree, differ = ([f"{name}: {one.measure}" for name, one in said if one.agrees is what] for what in (True, False))
    measured = {
        "variants": _rows(records, found),
        "agree": agree,
        "differ": differ,
        "n_agree": len(agree),
        "n_reported": len(said),
    }
    if BASE in by_name(task):
        measured["variants_task"] = _rows(task, compared(task, family))
    base = {m: _values(named[BASE], m) for m in ("sink", "spike")}
    alarms = [
        abs(value - np.delete(of, i).mean()) > margin(records, m, 1, len(of) - 1)
        for m, of in base.items()
        for i, value in enumerate(of)
        if len(of) > 1
    ]
    control = {
        "base_sink_ratios": base["sink"].tolist(),
        "base_max_activations": np.exp(base["spike"]).tolist(),
        "changes_among_base_seeds": sum(map(bool, alarms)),
        "of": len(alarms),
    }
    return Evidence(measured, control)


def _rows(records: Sequence[Record], found: Sequence[Compared]) -> list[dict[str, float | int | str]]:
    """The base and the variants as the ledger has them."""
    rows = [_means(BASE, by_name(records)[BASE])]
    for one in found:
        row = {name: value for name, value in vars(one).items() if name not in ("sink", "spike")}
        for name, values in (("sink", one.sink.interval), ("spike", map(math.exp, one.spike.interval))):
            middle = "change" if name == "sink" else "factor"
            row |= dict(zip((f"{name}_{middle}", f"{name}_low", f"{name}_high"), values, strict=True))
        rows.append(row)
    return rows


def _means(name: str, rows: Sequence[Record]) -> dict[str, float | int | str]:
    """What stands for a variant: means over its seeds."""
    return {
        "name": name,
        "loss": float(np.mean([record.final["held_out_loss"] for record in rows])),
        "sink_ratio": float(_values(rows, "sink").mean()),
        "max_activation": float(np.exp(_values(rows, "spike").mean())),
        "over_median": _over_median(rows),
        "seeds": len(rows),
    }


@dataclass(frozen=True)
class Followed:
    """Rank correlations over runs with the loss on held-out text."""

    sink: float
    spike: float
    runs: int


def of_family(records: Sequence[Record], family: str) -> list[Record]:
    """The runs of the base and of a family's variants."""
    return [record for record in records if record.name == BASE or FAMILY[record.name] == family]


def follow_loss(records: Sequence[Record], family: str | None = "optimization") -> Followed:
    """Whether sink ratio and largest activation follow the loss, over the runs of a family (or all) and the base's."""
    rows = records if family is None else of_family(records, family)
    loss = [record.final["held_out_loss"] for record in rows]
    sink, spike = (float(stats.spearmanr(loss, _values(rows, m)).statistic) for m in ("sink", "spike"))
    return Followed(sink, spike, len(rows))


def follows_loss(records: Sequence[Record]) -> Evidence | NotApplicable:
    """X-TR7: rank correlations with the loss over the optimization family's runs and the base's.

    Control: the same over the runs of all other families, where what differs between runs is no matter of training.
    """
    ours = of_family(records, "optimization")
    others = [record for record in records if record.name == BASE or FAMILY[record.name] != "optimization"]
    if min(len({record.name for record in rows}) for rows in (ours, others)) < 4:
        return NotApplicable(
            "fewer than four different runs to correlate over; train them with make ablations TIER=text"
        )
    found, control = follow_loss(records), follow_loss(others, None)
    return evidence(
        {"spearman_sink": found.sink, "spearman_spike": found.spike, "runs": found.runs},
        {
            "spearman_sink_other_families": control.sink,
            "spearman_spike_other_families": control.spike,
            "runs_other_families": control.runs,
        },
    )


def spike_first(records: Sequence[Record]) -> Evidence | NotApplicable:
    """X-TR8: at how many tokens position 0's largest entry, and the sink ratio, first reach half of their last value.

    Of every run of the base. Control: the same of the largest entry elsewhere.
    """
    rows = by_name(records).get(BASE, [])
    if not rows:
        return NotApplicable("no record of the base; train it with make ablations TIER=text")
    if any(record.final["sink_ratio"] == 0 for record in rows):
        return NotApplicable("a run of the base has no sinks")
    return Evidence(
        {
            "tokens_spike": [half_way(record, "max_first") for record in rows],
            "tokens_sink": [half_way(record, "sink_ratio") for record in rows],
            "tokens": [record.tokens for record in rows],
        },
        {"tokens_elsewhere": [half_way(record, "max_elsewhere") for record in rows]},
    )


def half_way(record: Record, measure: str) -> int:
    """The tokens at which a measure of a run first reaches half of what it is in the end."""
    values = np.array(record.curve[measure])
    return int(record.curve["step"][int((values >= values[-1] / 2).argmax())] * record.config.batch)


def dormant(records: Sequence[Record]) -> Evidence | NotApplicable:
    """X-TR9: of Bigram-Backcopy, the attention to position 0 of the head that waits there most, by kind of query.

    Of every run of the base. Control: the same before the first step.
    """
    rows = by_name(records).get(BASE, [])
    if not rows:
        return NotApplicable("no record of the base; train it with make ablations TIER=task")
    kinds = ("attention_other", "attention_trigger")
    return Evidence(
        {kind: [record.final[kind] for record in rows] for kind in kinds}
        | {"copy_loss": [record.final["copy_loss"] for record in rows]},
        {f"{kind}_untrained": [record.curve[kind][0] for record in rows] for kind in kinds},
    )


def curves(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> pd.DataFrame:
    """The curves of runs that were just made, by name, as one tidy table."""
    return pd.concat([pd.DataFrame(curve).assign(name=name) for name, curve in runs.items()], ignore_index=True)


def emergence(records: Sequence[Record]) -> pd.DataFrame:
    """Curves of runs as one tidy table: a row for each run and step at which it was looked at."""
    frames = [
        pd.DataFrame(record.curve).assign(
            name=record.name, seed=record.config.seed, tokens=np.array(record.curve["step"]) * record.config.batch
        )
        for record in records
    ]
    return pd.concat(frames, ignore_index=True)
