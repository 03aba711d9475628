"""What the records of a tier say: each variant beside what it is compared with, with an interval over seeds."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from spikesink.chain.trace import EPSILONS
from spikesink.common import NotApplicable, mean_of, measure
from spikesink.lab.changes import BANDS, LATE, Change, Compared, direction
from spikesink.lab.families import AGAINST, BASE, FAMILY, WITHOUT_BOS
from spikesink.lab.records import Record
from spikesink.lab.train import Run

LEVEL = 0.95
NO_RECORDS = "there are no records of these variants yet; make ablations trains them"
STAYS_LOSS = 0.01  # nats that training may go worse by and count as good as the base's
SOME_SINKS = 0.1  # sink ratio of a model that has sinks
STANDS_OUT = 2.0  # times the largest entry elsewhere, of a position 0 that has a spike of its own
SHOWN = {
    "sink_ratio": "sink ratio",
    "max_activation": "largest activation",
    "over_median": "medians",
    "over_elsewhere": "times elsewhere",
}
COLUMNS = ["seeds", "loss", "sink ratio", "change", "at this loss", "attention"]
COLUMNS += ["largest activation", "factor", "medians", "times elsewhere"]


@measure
def tabulate_runs(records: Sequence[Record]) -> pd.DataFrame:
    """The end of each run, a row each: the base's first, then variants in the order of their families.

    A run that was not trained to predict early tokens is judged by late queries alone (loss, sink ratio, attention). So
    what it is compared with, and the base, stand there once more as late queries see them, `LATE` added to the name.
    """
    if not any(record.name == BASE for record in records):
        raise NotApplicable(NO_RECORDS)
    late = {AGAINST[record.name] for record in records if _is_late(record)}
    order = [BASE, *(f"{name}{LATE}" for name in (BASE, *late)), *FAMILY]
    rows = [_end_of(record, _is_late(record)) for record in records]
    again = [record for record in records if late and record.name in {BASE, *late}]
    rows += [_end_of(record, late=True) | {"name": f"{record.name}{LATE}", "against": ""} for record in again]
    return pd.DataFrame(sorted(rows, key=lambda row: (order.index(row["name"]), row["seed"])))


def _is_late(record: Record) -> bool:
    return record.config.skipped > 0


def _end_of(record: Record, late: bool) -> dict[str, float | int | str | bool]:
    final = record.final
    end = final["late"] if late else final | {"loss": final["held_out_loss"]}
    activation, median = final["max_activation"], final["median"]
    return {
        "name": record.name,
        "against": AGAINST.get(record.name, "") + LATE * late,
        "seed": record.config.seed,
        "late": late,
        "loss": end["loss"],
        "sink_ratio": end["sink_ratio"],
        "attention": end["attention"],
        "max_activation": activation,
        "over_median": activation / median,
        "over_elsewhere": final["max_first"] / final["max_elsewhere"],
        "sink": end["sink_ratio"],
        "spike": math.log(activation),
        "relative": math.log(activation / median),
        **{f"sink_at_{e:g}": math.nan if late else final["sink_ratios"][f"{e:g}"] for e in EPSILONS},
        "curve": record.curve,
    }


def select_family(runs: pd.DataFrame, family: str) -> pd.DataFrame:
    """The runs of a family, of the base, and of what they are compared with."""
    ours = runs[runs["name"].map(FAMILY) == family]
    beside = {BASE, *ours["against"], f"{BASE}{LATE}" if ours["late"].any() else BASE}
    return runs[runs["name"].isin({*ours["name"], *beside})]


@measure
def average_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """Each variant's means over seeds, geometric ones of activations."""
    means = {name: (name, "mean") for name in ("loss", "sink_ratio", "attention")}
    means |= {name: (name, stats.gmean) for name in ("max_activation", "over_median", "over_elsewhere")}
    return runs.groupby("name", sort=False).agg(**means, seeds=("seed", "size"), late=("late", "first"))


def pool_scatter(runs: pd.DataFrame, column: str, without: str = "") -> tuple[float, int]:
    """Standard deviation over seeds, one for all variants with several, and its degrees of freedom.

    A variant with hardly any sinks says nothing of how far sink ratios scatter, and one whose position 0 does not stand
    out nothing of spikes.
    """
    own = runs[~runs["name"].str.endswith(LATE) & (runs["name"] != without)].dropna(subset=column)
    if column.startswith("sink"):
        there = own.groupby("name")[column].transform("mean") >= SOME_SINKS
    else:
        there = own.groupby("name")["over_elsewhere"].transform(stats.gmean) >= STANDS_OUT
    seeds = own[there].groupby("name")[column]
    freedom = int((seeds.size() - 1).sum())
    return (math.sqrt((seeds.var() * (seeds.size() - 1)).sum() / freedom), freedom) if freedom else (math.nan, 0)


def half_width(scatter: float, freedom: int, ours: int, others: int) -> float:
    """Half of Student's interval for the difference of two means of so many seeds."""
    return float(stats.t.ppf((1 + LEVEL) / 2, freedom) * scatter * math.sqrt(1 / ours + 1 / others))


def measure_change(runs: pd.DataFrame, name: str, quantity: str, against: str | None = None) -> Change:
    """A variant's change in "sink", "spike" or "relative", against what it is a variant of or `against`."""
    ours = runs[runs["name"] == name]
    others = runs[runs["name"] == (against or ours["against"].iloc[0])]
    worse = bool(ours["loss"].mean() > others["loss"].mean() + STAYS_LOSS)
    way = direction(name, quantity, worse)

    def change(column: str, **more) -> Change:
        value = float(ours[column].mean() - others[column].mean())
        half = half_width(*pool_scatter(runs, column), len(ours), len(others))
        room = quantity != "sink" or bool(others[column].mean() >= SOME_SINKS)
        return Change(quantity, value, value - half, value + half, way, room, **more)

    several = quantity == "sink" and not ours["late"].any()  # late queries know one threshold alone
    return change(quantity, others=tuple(change(f"sink_at_{e:g}") for e in EPSILONS) if several else ())


@measure
def compare_variants(runs: pd.DataFrame, family: str | None = None) -> list[Compared]:
    """Every variant of a family (or of all) whose runs, and those it is compared with, are there."""
    rows = average_seeds(runs).reset_index().to_dict("records")
    names = [row["name"] for row in rows if family in (None, FAMILY.get(row["name"]))]
    trained = runs[runs["name"].isin(names) & runs["against"].isin(runs["name"])]["name"].unique()
    return [
        Compared(
            **row,
            sink_at_loss=_sink_at_loss(runs, row["name"]),
            **{what: measure_change(runs, row["name"], what) for what in ("sink", "spike", "relative")},
        )
        for row in rows
        if row["name"] in trained
    ]


def _sink_at_loss(runs: pd.DataFrame, name: str) -> tuple[float, ...]:
    """The sink ratio that each run a variant is compared with had when its loss was the variant's.

    By the loss on the curves' windows. None unless all of them came there, nor for what is judged by late queries, of
    which curves know nothing.
    """
    ours = runs[runs["name"] == name]
    if ours["late"].any():
        return ()
    loss = np.mean([curve["held_out_loss"][-1] for curve in ours["curve"]])
    curves = [pd.DataFrame(curve) for curve in runs[runs["name"] == ours["against"].iloc[0]]["curve"]]
    there = [curve[curve["held_out_loss"] <= loss]["sink_ratio"] for curve in curves]
    return tuple(ratios.iloc[0] for ratios in there) if all(map(len, there)) else ()


@measure
def tabulate_family(runs: pd.DataFrame, family: str) -> pd.DataFrame:
    """A family's means, changes and factors with their intervals: what it is compared with, then each variant."""
    compared = {one.name: one for one in compare_variants(runs, family)}
    if not compared:
        raise NotApplicable(NO_RECORDS)
    means = average_seeds(select_family(runs, family))
    means = means[[name in compared or name not in FAMILY for name in means.index]]
    cells = {
        name: {
            "change": "{:+.2f} ({:+.2f} to {:+.2f})".format(*one.sink.interval),
            "at this loss": mean_of(one.sink_at_loss),
            "factor": "{:.2f} ({:.2f} to {:.2f})".format(*map(math.exp, one.spike.interval)),
        }
        for name, one in compared.items()
    }
    titles = [compared[name].title if name in compared else name for name in means.index]
    table = means.join(pd.DataFrame.from_dict(cells, orient="index")).fillna("").rename(columns=SHOWN)
    return table[COLUMNS].set_axis(pd.Index(titles, name="variant"))


@measure
def find_corners(runs: pd.DataFrame) -> dict[str, list[str] | float]:
    """Variants in which spike or sink goes without the other, and rank correlations of the two over all variants.

    By the largest activation in medians of the stream, and without variants that are judged by late queries.
    `spike_alone`: significantly fewer sinks than the base, hardly any by the least epsilon as well; position 0 stands
    out, and its activation is not lower by more than the band. `sink_alone`: a significantly smaller activation, and
    perhaps as many sinks. Each with the activation, and that over the base's with its interval; `names`: of all these.
    """
    corners = {"spike_alone": [], "sink_alone": [], "names": []}
    seen = runs[~runs["late"]]
    means, least = average_seeds(seen), f"sink_at_{min(EPSILONS):g}"
    for one in compare_variants(seen):
        sink, spike = (measure_change(runs, one.name, what, BASE) for what in ("sink", "relative"))
        times = "{:.2f}, {:.2f} to {:.2f}".format(*map(math.exp, spike.interval))
        entry = f"{one.name} ({one.over_median:.0f}; times {times})"
        stands_out = one.over_elsewhere >= STANDS_OUT and spike.value >= -BANDS["relative"]
        hardly_any = max(one.sink_ratio, seen[seen["name"] == one.name][least].mean()) < SOME_SINKS
        alone = {
            "spike_alone": sink.high < 0 and hardly_any and stands_out,
            "sink_alone": spike.high < 0 <= sink.high and one.sink_ratio >= SOME_SINKS,
        }
        for corner in (corner for corner, is_in in alone.items() if is_in):
            corners[corner].append(entry)
            corners["names"].append(one.name)
    rho = means[["sink_ratio", "over_median", "max_activation"]].corr("spearman")["sink_ratio"]
    return corners | {
        "together": float(rho["over_median"]),
        "together_raw": float(rho["max_activation"]),
        "medians": float(means.loc[BASE, "over_median"]),
    }


@measure
def tabulate_first_token(records: Sequence[Record]) -> pd.DataFrame:
    """Whether a sink is of the place or of BOS: the base with BOS, with another token there, and trained without BOS.

    Means over seeds (geometric ones of activations), and the share of the sink ratio that is the first layer's, whose
    heads have read the embedding alone.
    """
    base = [record.final for record in records if record.name == BASE]
    if not base:
        raise NotApplicable(NO_RECORDS)
    ends = {"base": base, "base, another token in BOS's place": [final["other_first"] for final in base]}
    if without := [record.final for record in records if record.name == WITHOUT_BOS]:
        ends["trained without BOS"] = without
    rows = {}
    for name, finals in ends.items():
        by_layer = np.mean([final.get("sinks", [[0.0]]) for final in finals], axis=(0, 2))
        rows[name] = {
            "sink ratio": np.mean([final["sink_ratio"] for final in finals]),
            "attention": np.mean([final["attention"] for final in finals]),
            "position 0's largest entry": stats.gmean([final["max_first"] for final in finals]),
            "of the sinks, in the first layer": f"{by_layer[0] / by_layer.sum():.0%}" if by_layer.sum() else "",
        }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("model")


@measure
def compare_waits(records: Sequence[Record]) -> pd.DataFrame:
    """Of Bigram-Backcopy, what the head that waits most gives position 0, a row a run.

    `idle` is the attention of queries that have nothing to copy, `trigger` that of triggers; `judged`: whether the
    variant is compared (not if it was not trained on most of the queries that count); `less`: whether all of its seeds
    leave less than any of those it is compared with, which chance does `by_chance` of the time: 1 / (n + m choose n).
    """
    order = [BASE, *FAMILY]
    rows = [
        {
            "name": record.name,
            "family": FAMILY.get(record.name, ""),
            "gate": record.config.gate,
            "seed": record.config.seed,
            "late": _is_late(record),
            "idle": record.final["attention_other"],
            "trigger": record.final["attention_trigger"],
            "copy_loss": record.final["copy_loss"],
        }
        for record in sorted(records, key=lambda record: (order.index(record.name), record.config.seed))
    ]
    if not rows:
        raise NotApplicable(NO_RECORDS)
    waits = pd.DataFrame(rows)
    idle = {name: seeds["idle"] for name, seeds in waits[~waits["late"]].groupby("name")}
    judged = {name: idle[AGAINST[name]] for name in idle if AGAINST.get(name) in idle}
    less = {name for name, others in judged.items() if idle[name].max() < others.min()}
    chance = {name: 1 / math.comb(len(idle[name]) + len(others), len(others)) for name, others in judged.items()}
    names = waits["name"]
    return waits.assign(judged=names.isin(judged), less=names.isin(less), by_chance=names.map(chance))


@measure
def tabulate_waits(waits: pd.DataFrame, family: str) -> pd.DataFrame:
    """What `compare_waits` gives of the base and a family, a number a seed."""
    ours = waits[waits["family"].isin(["", family])].groupby("name", sort=False)
    forms = {"idle": "{:.0%}", "trigger": "{:.0%}", "copy_loss": "{:.3f}"}
    joined = {name: lambda seeds, form=form: ", ".join(map(form.format, seeds)) for name, form in forms.items()}
    columns = ["nothing to copy", "triggers", "loss on copied tokens"]
    return ours.agg(joined).rename_axis("variant").set_axis(columns, axis="columns")


@measure
def compare_gates(waits: pd.DataFrame) -> dict[str, int | float]:
    """Whether gates that read their input leave position 0 less than none or a static one, pairs within a seed.

    `by_chance` is exact: how often as many pairs would, a seed's values dealt to its runs in every way (a one-sided
    Mann-Whitney test in strata, for a seed is the same batches for all of its runs).
    """
    pairs, more, ways = 0, 0, np.ones(1)
    for _, runs in waits[waits["family"].isin(["", "gates"])].groupby("seed"):
        reads = ~runs["gate"].isin(["none", "static"])
        idle, n = runs.assign(reads=reads).sort_values("reads", ascending=False)["idle"].to_numpy(), int(reads.sum())
        dealt = [
            int((idle[list(mine)][:, None] > np.delete(idle, mine)).sum())
            for mine in itertools.combinations(range(len(idle)), n)
        ]
        pairs += n * (len(idle) - n)
        more += dealt[0]  # as it is: those that read come first
        ways = np.convolve(ways, np.bincount(dealt))
    if not pairs:
        raise NotApplicable(NO_RECORDS)
    return {"pairs": pairs, "less": pairs - more, "by_chance": float(ways[: more + 1].sum() / ways.sum())}


def tabulate_curves(runs: Mapping[str, Iterable[Run | Record]]) -> pd.DataFrame:
    """The curves of runs by name as one tidy table: a row for each run and step at which it was looked at."""
    frames = [
        pd.DataFrame(run.curve).assign(
            name=name, seed=run.config.seed, tokens=lambda curve, run=run: curve["step"] * run.config.batch
        )
        for name, several in runs.items()
        for run in several
    ]
    return pd.concat(frames, ignore_index=True)


def average_late(curves: pd.DataFrame, column: str) -> pd.Series:
    """The mean of a measure over the second half of the steps, by name and seed: for what swings from look to look."""
    late = curves[2 * curves["step"] >= curves["step"].max()]
    return late.groupby(["name", "seed"], sort=False)[column].mean()
