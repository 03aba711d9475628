"""What the records of a tier say: each variant beside its base, with an interval, and beside what the paper finds."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
from scipy import stats

from spikesink import paper
from spikesink.chain.trace import EPSILONS
from spikesink.common import NotApplicable, mean_of
from spikesink.lab.families import BASE, VARIANTS, WITHOUT_BOS
from spikesink.lab.records import Record
from spikesink.lab.train import Run

LEVEL = 0.95


NO_RECORDS = "there are no records of these variants yet; make ablations trains them"


STAYS_SINK, STAYS_SPIKE = 0.05, math.log(1.5)  # changes of sink ratio, and of log largest activation, that are none


STAYS_LOSS = 0.01  # nats that training may go worse by and count as good as the base's


SOME_SINKS = 0.1  # sink ratio of a run that ends with sinks


LATE = ", late queries"  # what is added to the name of a variant that is seen from those alone


STANDS_OUT = 2.0  # times the largest entry elsewhere, of a position 0 that has a spike of its own


LEAST_VARIANTS = 5  # to say something of all of them


RESAMPLES = 2000


SIMULATED = 20_000  # times that seeds are drawn anew, for what chance makes


AGREES, DIFFERS, UNDECIDED = "agree", "differ", "undecided"


SHOWN = {  # in a family's tables, by what it is called there
    "seeds": "seeds",
    "loss": "loss",
    "sink ratio": "sink_ratio",
    "attention": "attention",
    "largest activation": "max_activation",
    "medians": "over_median",
    "times elsewhere": "over_elsewhere",
}


OTHERS = f"change at {', '.join(f'{epsilon:g}' for epsilon in EPSILONS)}"


COLUMNS = {  # of the table of sinks, and of that of activations
    "sink": ["seeds", "loss", "sink ratio", "change", "paper", OTHERS, "at this loss", "attention"],
    "spike": ["seeds", "largest activation", "factor", "paper", "medians", "times elsewhere"],
}


FAMILY = {variant.name: variant.family for variant in VARIANTS}


OF = {variant.name: variant.of for variant in VARIANTS}


@dataclass(frozen=True)
class Change:
    """How a measure of a variant differs from what it is a variant of: an interval over seeds, and the paper's way.

    A change of the sink ratio is a difference, one of the largest activation (or of it over the median) the log of a
    ratio.
    """

    measure: str
    value: float
    low: float
    high: float
    paper: str | None  # "up", "down", "stays", `paper.AT_LEAST`; None where the paper does not say
    room: bool = True  # whether there is enough of it for less of it to be seen
    others: tuple["Change", ...] = ()  # of the sink ratio, the same by other thresholds of a sink

    @property
    def interval(self) -> tuple[float, float, float]:
        """The value, and the ends of its interval."""
        return self.value, self.low, self.high

    @property
    def outcome(self) -> str | None:
        """Whether it goes the paper's way: "agrees", "differs", or "undecided" by as many seeds; None if it says none.

        Where the paper's value moves, the interval must exclude none; where it stays, the interval must lie within the
        band. It differs where it leaves no doubt of something else: the other way, no change, or one where none is due.
        Where there are hardly any sinks to begin with, it is undecided whether they would go or stay: what the paper
        says is said of a model that has some. And so is what another threshold of a sink, by its value, contradicts.
        """
        return None if self.paper is None else UNDECIDED if self.contradicted else self._by_itself()

    @property
    def kind(self) -> str:
        """What the paper says of it: of sinks or activations, that they rise, fall or stay."""
        what = "sinks" if self.measure == "sink" else "activations"
        way = {"up": "rise", "down": "fall"}.get(self.paper, "stay")
        return f"{what} that {way}"

    @property
    def contradicted(self) -> bool:
        """Whether another threshold of a sink, by which there are any to lose, says otherwise than this one does."""
        said = UNDECIDED if self.paper is None else self._by_itself()
        return said != UNDECIDED and not all(of.nothing_to_lose or of._allows(said) for of in self.others)

    @property
    def nothing_to_lose(self) -> bool:
        """Whether the paper's value goes, or stays, and there is too little here for it to be seen going."""
        return not self.room and self.paper != "up"

    def _allows(self, said: str) -> bool:
        """Whether the value, as if there were no scatter, leaves that outcome be."""
        if said == DIFFERS and self.paper in ("up", "down") and abs(self.value) <= _band(self.measure):
            return True  # hardly any change: what would be less than the paper's
        return replace(self, low=self.value, high=self.value)._by_itself() == said

    def _by_itself(self) -> str:
        band = _band(self.measure)
        stays = -band <= self.low and self.high <= band
        if self.nothing_to_lose:
            return UNDECIDED
        if self.paper == paper.AT_LEAST:
            return AGREES if self.low >= -paper.MAY_FALL else DIFFERS if self.high < -paper.MAY_FALL else UNDECIDED
        if self.paper == "stays":
            return AGREES if stays else DIFFERS if self.low > band or self.high < -band else UNDECIDED
        low, high = (self.low, self.high) if self.paper == "up" else (-self.high, -self.low)
        return AGREES if low > 0 else DIFFERS if high < 0 or stays else UNDECIDED


@dataclass(frozen=True)
class Compared:
    """A variant beside what it is a variant of; means over seeds, of the largest activation the geometric one."""

    name: str
    loss: float
    sink_ratio: float
    attention: float  # mean sink score of position 0, which no epsilon cuts
    max_activation: float
    over_median: float  # the largest activation over the stream's median, which does not change with the stream's size
    over_elsewhere: float  # position 0's largest entry over the largest elsewhere; below 1: not its own
    seeds: int
    late: bool  # whether loss and sinks are of late queries alone, and so to be set beside its own base only
    sink_at_loss: tuple[float, ...]  # of each seed that it is set beside, the sink ratio when its loss was this one's
    sink: Change
    spike: Change
    relative: Change  # of the largest activation over the median

    @property
    def title(self) -> str:
        """The name, with what it is compared with where that is not the base."""
        return titled(self.name, self.late)


def titled(name: str, late: bool = False) -> str:
    """A variant's name, with what it is compared with (by late queries?) where that is not the base."""
    return name if OF.get(name, BASE) == BASE else f"{name} (against {OF[name]}{LATE * late})"


def _band(measure: str) -> float:
    return STAYS_SINK if measure == "sink" else STAYS_SPIKE


def _is_late(record: Record) -> bool:
    """Whether a run was not trained to predict early tokens, so that late queries alone can be asked of it."""
    return record.config.skipped > 0


def at_the_end(record: Record) -> Mapping[str, float]:
    """The end of a run; of one that was not trained to predict early tokens, loss and attention of late ones alone."""
    if not _is_late(record):
        return record.final
    late = record.final["late"]
    return record.final | {"held_out_loss": late["loss"], **{key: late[key] for key in ("sink_ratio", "attention")}}


def _late(record: Record) -> Record:
    """A run as seen from late queries alone, to be set beside one that knows no other."""
    return replace(record, config=replace(record.config, skipped=1 / 2))


def _values(records: Iterable[Record], measure: str, epsilon: float | None = None) -> np.ndarray:
    """A measure of each run; a sink ratio by another epsilon than the usual one, if one is given."""
    if measure == "sink":
        ends = [at_the_end(record) for record in records]
        return np.array([end["sink_ratio"] if epsilon is None else end["sink_ratios"][f"{epsilon:g}"] for end in ends])
    over = [record.final["median"] if measure == "relative" else 1.0 for record in records]
    return np.log(np.array([record.final["max_activation"] for record in records]) / np.array(over))


def _over_elsewhere(records: Iterable[Record]) -> float:
    return float(stats.gmean([record.final["max_first"] / record.final["max_elsewhere"] for record in records]))


def by_name(records: Sequence[Record]) -> dict[str, list[Record]]:
    """Records by variant, the base first, in the order in which families list them."""
    order = [BASE, *FAMILY]
    found = {name: [r for r in records if r.name == name] for name in order}
    return {name: rows for name, rows in found.items() if rows}


def pooled(
    records: Sequence[Record], measure: str, without: str | None = None, epsilon: float | None = None
) -> tuple[float, int]:
    """Standard deviation over seeds, one for all variants of which there are several, and its degrees of freedom.

    (Which assumes that seeds are as far apart in all of them; a variant with fewer heads has a coarser sink ratio. What
    has hardly any sinks says nothing of the sink ratio's, and where position 0 does not stand out nothing of a spike's:
    what is not there cannot scatter as it does where it is.)
    """
    groups = [rows for name, rows in by_name(records).items() if len(rows) > 1 and name != without]
    if epsilon is not None:  # by which late queries are not known
        groups = [rows for rows in groups if not _is_late(rows[0])]
    if measure != "sink":
        groups = [rows for rows in groups if _over_elsewhere(rows) >= STANDS_OUT]
    values = [_values(rows, measure, epsilon) for rows in groups]
    if measure == "sink":
        values = [group for group in values if group.mean() >= SOME_SINKS]
    freedom = sum(len(group) - 1 for group in values)
    if not freedom:
        return math.nan, 0
    return math.sqrt(sum(((group - group.mean()) ** 2).sum() for group in values) / freedom), freedom


def margin(
    records: Sequence[Record],
    measure: str,
    ours: int,
    others: int,
    without: str | None = None,
    epsilon: float | None = None,
) -> float:
    """Half the width of an interval for the difference of two means, of so many seeds each."""
    return float(_half_width(*pooled(records, measure, without, epsilon), ours, others))


def _half_width(deviation, freedom: int, ours: int, others: int):
    """Student's, for a standard deviation (or an array of them) that is estimated with so many degrees of freedom."""
    return stats.t.ppf((1 + LEVEL) / 2, freedom) * deviation * math.sqrt(1 / ours + 1 / others)


def change(records: Sequence[Record], name: str, measure: str, of: str | None = None) -> Change:
    """A variant's change against what it is a variant of, with an interval from the spread that all variants share.

    One standard deviation is estimated from all variants with several seeds; a variant with one seed has the wider
    interval that its one value deserves. A sink ratio is asked for by several thresholds (by one alone of late queries,
    which know no other).

    Args:
        records: of a tier.
        name: the variant's.
        measure: "sink", "spike" or "relative".
        of: what it is set beside, if not what it is a variant of.
    """
    named = by_name(records)
    rows, beside = named[name], named[of or OF[name]]
    late = _is_late(rows[0])
    if late:
        beside = [_late(record) for record in beside]
    way = direction(name, measure, _loss(rows) > _loss(beside) + STAYS_LOSS)

    def by(epsilon: float | None = None) -> Change:
        ours, theirs = _values(rows, measure, epsilon), _values(beside, measure, epsilon)
        value = float(ours.mean() - theirs.mean())
        half = margin(records, measure, len(ours), len(theirs), epsilon=epsilon)
        room = measure != "sink" or float(theirs.mean()) >= SOME_SINKS
        return Change(measure, value, value - half, value + half, way, room)

    return replace(by(), others=tuple(map(by, EPSILONS)) if measure == "sink" and not late else ())


def _loss(records: Sequence[Record]) -> float:
    return float(np.mean([at_the_end(record)["held_out_loss"] for record in records]))


def direction(name: str, measure: str, worse: bool = True) -> str | None:
    """Which way the paper's variant goes against its base; None where it does not say.

    Args:
        name: of the variant.
        measure: "sink", "spike" or "relative", of which the paper says nothing.
        worse: whether its training went worse than the base's here, for what the paper says of bad training only.
    """
    sink, spike = paper.TRAINED_VARIANTS[FAMILY[name]].get(name, (None, None))
    found, base = {
        "sink": (sink, paper.TRAINED_BASE[0]),
        "spike": (spike, paper.TRAINED_BASE[1]),
        "relative": (None, None),
    }[measure]
    if found == paper.DOWN_IF_WORSE:
        return "down" if worse else None
    if found is None or isinstance(found, str):  # paper.AT_LEAST among them
        return found
    moved = found - base if measure == "sink" else math.log(found / base)
    return "stays" if abs(moved) <= _band(measure) else "up" if moved > 0 else "down"


def compared(records: Sequence[Record], family: str | None = None) -> list[Compared]:
    """Every variant of a family (or of all) that was trained, beside what it is a variant of."""
    named = by_name(records)
    return [
        Compared(
            **means_of(name, rows),
            sink_at_loss=_sink_at_loss(named, name),
            sink=change(records, name, "sink"),
            spike=change(records, name, "spike"),
            relative=change(records, name, "relative"),
        )
        for name, rows in named.items()
        if name != BASE and family in (None, FAMILY[name]) and OF[name] in named
    ]


def _sink_at_loss(named: Mapping[str, Sequence[Record]], name: str) -> tuple[float, ...]:
    """`sink_at_loss` of what a variant is set beside, by the loss on the windows of the curves.

    Curves know no late queries, so that there is none for a variant judged by those.
    """
    if _is_late(named[name][0]):
        return ()
    loss = float(np.mean([record.curve["held_out_loss"][-1] for record in named[name]]))
    return sink_at_loss(named[OF[name]], loss)


def sink_at_loss(records: Sequence[Record], loss: float) -> tuple[float, ...]:
    """The sink ratio that each run had on its way, when its loss was so much; none unless all of them came there."""
    found = []
    for record in records:
        losses, ratios = np.array(record.curve["held_out_loss"]), record.curve["sink_ratio"]
        i = int((losses <= loss).argmax())
        if losses[i] > loss:
            return ()
        found.append(ratios[i])
    return tuple(found)


def centre(records: Sequence[Record]) -> tuple[float, float]:
    """The base's largest activation in medians of its stream, and its sink ratio, over its seeds."""
    row = means_of(BASE, by_name(records)[BASE])
    return row["over_median"], row["sink_ratio"]


def table(records: Sequence[Record], family: str | None = None, measure: str = "sink") -> pd.DataFrame | NotApplicable:
    """A family (or all) as a tidy table: the base, then each variant with its changes, and what the paper says.

    Args:
        records: of one tier.
        family: one of `families.FAMILIES`, or None for all of them.
        measure: "sink" (sink ratios and attention) or "spike" (largest activations).
    """
    found = compared(records, family)
    if not found or BASE not in by_name(records):
        return NotApplicable(NO_RECORDS)
    rows = [
        {"variant": means["name"]} | {shown: means[key] for shown, key in SHOWN.items()}
        for means in _beside(records, found)
        if measure == "sink" or not means["late"]  # late queries know of other sinks, not of other activations
    ]
    rows += [
        {
            "variant": one.title,
            "change": "{:+.2f} ({:+.2f} to {:+.2f})".format(*one.sink.interval),
            "paper": getattr(one, measure).paper or "",
            OTHERS: ", ".join(f"{of.value:+.2f}" for of in one.sink.others),
            "at this loss": mean_of(one.sink_at_loss),
            "factor": "{:.2f} ({:.2f} to {:.2f})".format(*map(math.exp, one.spike.interval)),
            **{shown: getattr(one, name) for shown, name in SHOWN.items()},
        }
        for one in found
    ]
    return pd.DataFrame(rows, columns=["variant", *COLUMNS[measure]]).set_index("variant").fillna("")


def corners(records: Sequence[Record]) -> dict[str, list[str] | float]:
    """The variants in which one goes without the other, and how the two go together over all.

    A spike is judged over the median here, which does not change with the size of the stream. `spike_alone` have
    significantly fewer sinks than the base, hardly any (`SOME_SINKS`, by the least ε as well), position 0 stands out
    (`STANDS_OUT`), and by its value the largest activation, over the median, is within the band that is no change, or
    above. `sink_alone` have a significantly smaller one, and sinks that may be as many as the base's. Behind a name:
    the largest activation in medians, and that over the base's with its interval. `together` and `together_raw` are
    rank correlations with the sink ratio, over the median and as it is, the first with an interval (variants
    resampled). All without variants that are judged by late queries.
    """
    alone, named = {"spike_alone": [], "sink_alone": []}, by_name(records)
    found = [one for one in compared(records) if not one.late]
    for one in found:
        sink, spike = (change(records, one.name, measure, BASE) for measure in ("sink", "relative"))
        times = "{:.2f}, {:.2f} to {:.2f}".format(*map(math.exp, spike.interval))
        said = f"{one.name} ({one.over_median:.0f}; times {times})"
        stands_out = one.over_elsewhere >= STANDS_OUT and spike.value >= -STAYS_SPIKE
        hardly_any = max(one.sink_ratio, _values(named[one.name], "sink", min(EPSILONS)).mean()) < SOME_SINKS
        if sink.high < 0 and hardly_any and stands_out:
            alone["spike_alone"].append(said)
        if spike.high < 0 <= sink.high and one.sink_ratio >= SOME_SINKS:
            alone["sink_alone"].append(said)
    base = means_of(BASE, named[BASE])
    means = pd.DataFrame([base, *map(vars, found)])[["sink_ratio", "over_median", "max_activation"]]
    values = means.to_numpy().T
    together, raw = (_correlation(values[0], of) for of in values[1:])
    interval = list(_resampled(values[:2], _correlation)[0]) if len(means) >= LEAST_VARIANTS else [-1.0, 1.0]
    rho = {"together": together, "together_interval": interval, "together_raw": raw}
    return alone | rho | {"medians": base["over_median"]}


def _rows(records: Sequence[Record], found: Sequence[Compared]) -> list[dict[str, float | int | str]]:
    """The base and the variants as the ledger has them."""
    rows = _beside(records, found)
    for one in found:
        row = {name: value for name, value in vars(one).items() if not isinstance(value, Change)} | {"title": one.title}
        row |= {
            "sink_at_loss": float(np.mean(one.sink_at_loss or math.nan)),
            "sink_at_loss_by_seed": list(one.sink_at_loss),
        }
        for name in ("sink", "spike", "relative"):
            middle = "change" if name == "sink" else "factor"
            values = getattr(one, name).interval
            values = values if name == "sink" else map(math.exp, values)
            row |= dict(zip((f"{name}_{middle}", f"{name}_low", f"{name}_high"), values, strict=True))
        for epsilon, of in zip(EPSILONS, one.sink.others, strict=False):
            row[f"sink_change_at_{epsilon:g}"] = list(of.interval)
        rows.append({name: value for name, value in row.items() if not _is_none(value)})
    return rows


def _is_none(value: object) -> bool:
    """Whether a value is no number, or holds one that is none: an interval, where nothing is known of the scatter."""
    values = value if isinstance(value, list) else [value]
    return any(isinstance(one, float) and math.isnan(one) for one in values)


def _beside(records: Sequence[Record], found: Sequence[Compared]) -> list[dict[str, float | int | str]]:
    """What stands for the base, and for what variants that are judged by late queries are set beside."""
    named = by_name(records)
    names = {BASE} | {name for one in found for name in (one.name, OF[one.name])}
    late = beside_late({name: rows for name, rows in named.items() if name in names})
    return [means_of(name, rows) for name, rows in {BASE: named[BASE], **late}.items()]


def beside_late(named: Mapping[str, Sequence[Record]]) -> dict[str, list[Record]]:
    """The base and what variants that are judged by late queries are set beside, as late queries see them.

    Of variants by name; nothing where none of them is.
    """
    of = [OF[name] for name, rows in named.items() if name != BASE and _is_late(rows[0])]
    names = dict.fromkeys([BASE, *of]) if of else ()
    return {f"{name}{LATE}": list(map(_late, named[name])) for name in names if name in named}


def means_of(name: str, rows: Sequence[Record]) -> dict[str, float | int | str]:
    """What stands for a variant: means over its seeds."""
    return {
        "name": name,
        "loss": _loss(rows),
        "sink_ratio": float(_values(rows, "sink").mean()),
        "attention": float(np.mean([at_the_end(record)["attention"] for record in rows])),
        "max_activation": float(np.exp(_values(rows, "spike").mean())),
        "over_median": float(np.exp(_values(rows, "relative").mean())),
        "over_elsewhere": _over_elsewhere(rows),
        "seeds": len(rows),
        "late": _is_late(rows[0]),
    }


@dataclass(frozen=True)
class Followed:
    """Rank correlations over variants with the loss on held-out text, each with an interval (ends) over variants.

    `by` is how much stronger the sink's is, whatever their signs; both are resampled together for its interval.
    """

    sink: float
    spike: float
    by: float
    sink_interval: tuple[float, float]
    spike_interval: tuple[float, float]
    by_interval: tuple[float, float]
    variants: int


def of_family(records: Sequence[Record], family: str) -> list[Record]:
    """The runs of the base and of a family's variants."""
    return [record for record in records if record.name == BASE or FAMILY[record.name] == family]


def follow_loss(records: Sequence[Record]) -> Followed:
    """Whether sink ratio and largest activation follow the loss: over variants, means over their seeds."""
    means = pd.DataFrame([means_of(name, rows) for name, rows in by_name(records).items()])
    values = means[["loss", "sink_ratio", "max_activation"]].to_numpy().T
    return Followed(*map(float, _correlations(*values)), *_resampled(values, _correlations), len(means))


def _resampled(values: np.ndarray, statistic: Callable[..., np.ndarray | float]) -> list[tuple[float, float]]:
    """95% intervals of a statistic (or of each in an array of them) of several values a variant, variants resampled."""
    ends = stats.bootstrap(
        values, statistic, paired=True, vectorized=False, n_resamples=RESAMPLES, method="percentile", rng=0
    ).confidence_interval
    pairs = zip(np.atleast_1d(ends.low), np.atleast_1d(ends.high), strict=True)
    return [(float(low), float(high)) for low, high in pairs]


def _correlations(loss: np.ndarray, sink: np.ndarray, spike: np.ndarray) -> np.ndarray:
    """Both rank correlations with the loss, and how much stronger the sink's is."""
    sink, spike = _correlation(loss, sink), _correlation(loss, spike)
    return np.array([sink, spike, abs(sink) - abs(spike)])


def _correlation(one: np.ndarray, other: np.ndarray) -> float:
    """The rank correlation; what is constant is correlated with nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        return float(np.nan_to_num(stats.spearmanr(one, other).statistic))


def half_way(record: Record, measure: str, over: str | None = None) -> int:
    """The tokens at which a measure of a run (over another one) has first come half of the way to what it ends with.

    The way leads from the first value to the last; what goes the other way at first has not come nearer. Of a measure
    that ends where it began, the tokens of the whole run.
    """
    values = np.array(record.curve[measure])
    if over is not None:
        values = values / np.array(record.curve[over])
    way = values[-1] - values[0]
    there = np.sign(way) * (values - values[0]) >= abs(way) / 2 if way else np.arange(len(values)) == len(values) - 1
    return int(record.curve["step"][int(there.argmax())] * record.config.batch)


def settled(curves: pd.DataFrame, measure: str) -> pd.Series:
    """A measure over the second half of the steps, by name and seed: a mean, for what swings from look to look."""
    late = curves[2 * curves["step"] >= curves["step"].max()]
    return late.groupby(["name", "seed"], sort=False)[measure].mean()


def first_token(records: Sequence[Record]) -> pd.DataFrame | NotApplicable:
    """Whether a sink is of the first place or of BOS: of the base with BOS, with another token there, and without BOS.

    Means over seeds of sink ratio, mean sink score and (geometric) position 0's largest activation; and how much of the
    sink ratio is the first layer's, whose heads have read the embedding alone.
    """
    named = by_name(records)
    if BASE not in named:
        return NotApplicable(NO_RECORDS)
    names = {"sink_ratio": "sink ratio", "attention": "attention", "max_first": "position 0's largest entry"}
    rows = {"base": [record.final for record in named[BASE]]}
    rows["base, another token in BOS's place"] = [record.final["other_first"] for record in named[BASE]]
    if WITHOUT_BOS in named:
        rows["trained without BOS"] = [record.final for record in named[WITHOUT_BOS]]
    table, means = {}, {"max_first": stats.gmean}  # as in the tables of families
    for name, ends in rows.items():
        row = {shown: float(means.get(what, np.mean)([end[what] for end in ends])) for what, shown in names.items()}
        if "sinks" in ends[0]:
            by_layer = np.mean([end["sinks"] for end in ends], axis=(0, 2))
            row["of the sinks, in the first layer"] = f"{by_layer[0] / by_layer.sum():.0%}" if by_layer.sum() else ""
        table[name] = row
    return pd.DataFrame.from_dict(table, orient="index").fillna("").rename_axis("model")


def waiting(records: Sequence[Record], family: str) -> pd.DataFrame | NotApplicable:
    """Of Bigram-Backcopy, what the head that waits most gives position 0: the base and a family, a number a seed."""
    rows = [
        {
            "variant": name,
            "nothing to copy": ", ".join(f"{record.final['attention_other']:.0%}" for record in of),
            "triggers": ", ".join(f"{record.final['attention_trigger']:.0%}" for record in of),
            "loss on copied tokens": ", ".join(f"{record.final['copy_loss']:.3f}" for record in of),
        }
        for name, of in by_name(of_family(records, family)).items()
    ]
    return pd.DataFrame(rows).set_index("variant") if rows else NotApplicable(NO_RECORDS)


def wait_less(records: Sequence[Record]) -> dict[str, list[str] | float] | NotApplicable:
    """Of Bigram-Backcopy, variants that leave position 0 less in each seed than what they are set beside in any.

    By the head that waits most. (Not put to models that were not trained on most of the queries that count.)
    Control: the same of chance, runs dealt anew. Most are set beside the same runs, so that it makes many or none.

    Returns:
        `less`, their names; `judged`, of which; `by_chance`, how many are expected to; and `as_many`, the share of
        draws with as many or more.
    """
    named = {name: rows for name, rows in by_name(records).items() if not _is_late(rows[0])}
    waits = {name: [record.final["attention_other"] for record in rows] for name, rows in named.items()}
    judged = [name for name in waits if OF.get(name) in waits]
    if not judged:
        return NotApplicable(NO_RECORDS)
    rng = np.random.default_rng(0)
    dealt = {name: rng.random((SIMULATED, len(mine))) for name, mine in waits.items()}
    less = [name for name in judged if max(waits[name]) < min(waits[OF[name]])]
    by_chance = sum(dealt[name].max(1) < dealt[OF[name]].min(1) for name in judged)
    return {
        "less": less,
        "judged": judged,
        "by_chance": float(np.mean(by_chance)),
        "as_many": float(np.mean(by_chance >= len(less))),
    }


def gates_by_seed(records: Sequence[Record]) -> dict[str, int | float] | NotApplicable:
    """Of Bigram-Backcopy: do gates that read their input leave position 0 less than none or a constant one?

    By the head that waits most, and within a seed, which is the same batches for all of them.
    Control: chance, exactly: a seed's values dealt to its runs in every way (a one-sided Mann-Whitney test in strata).

    Returns:
        `pairs` of a gate that reads and one that does not, in how many the first leaves `less`, and `by_chance`, how
        often there would be as many.
    """
    pairs, more, ways = 0, 0, np.ones(1)
    rows = of_family(records, "gates")
    for seed in sorted({record.config.seed for record in rows}):
        waits = [
            (r.config.gate not in ("none", "static"), r.final["attention_other"]) for r in rows if r.config.seed == seed
        ]
        values = [value for _, value in sorted(waits, reverse=True)]  # those that read come first
        reading = sum(reads for reads, _ in waits)
        over = [
            sum(values[i] > values[j] for i in mine for j in set(range(len(values))) - set(mine))
            for mine in itertools.combinations(range(len(values)), reading)
        ]
        pairs += reading * (len(values) - reading)
        more += over[0]
        ways = np.convolve(ways, np.bincount(over))
    if not pairs:
        return NotApplicable(NO_RECORDS)
    return {"pairs": pairs, "less": pairs - more, "by_chance": float(ways[: more + 1].sum() / ways.sum())}


def curves(runs: Mapping[str, Iterable[Run]]) -> pd.DataFrame:
    """The curves of runs that were just made, by name, as one tidy table."""
    frames = [
        pd.DataFrame(run.curve).assign(name=name, seed=run.config.seed) for name, of in runs.items() for run in of
    ]
    return pd.concat(frames, ignore_index=True)


def emergence(records: Sequence[Record]) -> pd.DataFrame:
    """Curves of runs as one tidy table: a row for each run and step at which it was looked at."""
    frames = [
        pd.DataFrame(record.curve).assign(
            name=record.name, seed=record.config.seed, tokens=np.array(record.curve["step"]) * record.config.batch
        )
        for record in records
    ]
    return pd.concat(frames, ignore_index=True)
