"""TODO."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pandas as pd

from spikesink import paper
from spikesink.chain.trace import EPSILON, EPSILONS
from spikesink.common import NotApplicable
from spikesink.lab.families import BASE, FAMILIES
from spikesink.lab.findings import (
    AGREES,
    DIFFERS,
    FAMILY,
    LEAST_VARIANTS,
    LEVEL,
    NO_RECORDS,
    SIMULATED,
    SOME_SINKS,
    STANDS_OUT,
    UNDECIDED,
    Change,
    _half_width,
    _is_late,
    _rows,
    _values,
    at_the_end,
    by_name,
    compared,
    follow_loss,
    half_way,
    margin,
    of_family,
    pooled,
)
from spikesink.lab.records import Record
from spikesink.ledger.claims import Evidence, judge
from spikesink.ledger.rules import RULES

STRONG = -0.5  # X-TR7: a rank correlation with the loss, at least
CLAIMS = {f"TR{i}": family for i, family in enumerate(FAMILIES, start=1)}


def tr_family(records: Sequence[Record], family: str, task: Sequence[Record] = ()) -> Evidence | NotApplicable:
    """TR1 to TR6: for each variant that the paper reports, does the change go the paper's way here?

    A change counts where its interval over seeds leaves no doubt (see `Change`); how many sinks do by each threshold
    alone stands beside it. A claim has several parts, so that each kind of change must be supported by one. Where none
    goes another way, and the rule fails for those that stay open, it is not judged: that would be a verdict on the
    number of seeds. Nor is it while a variant that the paper reports is not trained.
    Control: each of the base's own seeds in a variant's place, put beside the others with the interval that a variant
    of one seed has, by what the seeds of other variants differ in; a "change" there is a false alarm, and where there
    are more of them than chance makes, nothing is judged.

    Args:
        records: of the text tier, by which the verdict is given.
        family: one of `families.FAMILIES`.
        task: records of the task tier, to set beside it.
    """
    named = by_name(records)
    found = compared(records, family) if BASE in named else []
    if not found:
        return NotApplicable(NO_RECORDS)
    if not all(pooled(records, measure)[1] for measure in ("sink", "spike")):
        return NotApplicable(
            "no variant that has spike and sinks has a second seed, so that no change can be told from chance"
        )
    asked = [(f"{one.name}: {of.measure}", of) for one in found for of in (one.sink, one.spike) if of.outcome]
    said = [(name, of.outcome) for name, of in asked]
    outcomes = {what: [name for name, outcome in said if outcome == what] for what in (AGREES, DIFFERS, UNDECIDED)}
    supported = {of.kind for _, of in asked if of.outcome == AGREES}
    measured = {
        "variants": _rows(records, found),
        **outcomes,
        **{f"n_{what}": len(names) for what, names in outcomes.items()},
        "n_reported": len(said),
        "unsupported": list(dict.fromkeys(of.kind for _, of in asked if of.kind not in supported)),
    }
    sinks = [of for _, of in asked if of.measure == "sink"]
    for epsilon in (EPSILON, *EPSILONS):
        alone = [_at(of, epsilon).outcome for of in sinks]
        measured |= {f"sinks_{what}_at_{epsilon:g}": alone.count(what) for what in (AGREES, DIFFERS)}
    control = _among_the_base(records)
    if control.get("chance_of_as_many", 1.0) < 1 - LEVEL:
        alarms, looks = control["changes_among_base_seeds"], control["of"]
        measured["reason"] = f"the base's own seeds count as changes in {alarms} of {looks} looks"
    elif missing := sorted(set(paper.TRAINED_VARIANTS[family]) - {one.name for one in found}):
        measured["reason"] = f"not all is trained yet: {', '.join(missing)}; make ablations TIER=text does it"
    elif not outcomes[DIFFERS] and not RULES[_claim(family)].is_met(measured):
        measured["reason"] = _why_open([of for _, of in asked], measured["unsupported"])
    if BASE in by_name(task):
        measured["variants_task"] = _rows(task, compared(task, family))
    return Evidence(measured, control)


def _at(change: Change, epsilon: float) -> Change:
    """A change of the sink ratio by one threshold of a sink alone; late queries know the usual one only."""
    return dict(zip(EPSILONS, change.others, strict=False)).get(epsilon, replace(change, others=()))


def _why_open(asked: Sequence[Change], unsupported: Sequence[str]) -> str:
    """How many changes stay open for want of what, where none goes another way."""
    open_ = [of for of in asked if of.outcome == UNDECIDED]
    agree = sum(of.outcome == AGREES for of in asked)
    few = sum(of.nothing_to_lose for of in open_)
    contradicted = sum(of.contradicted for of in open_)
    causes = {
        "for want of sinks in what they are set beside": few,
        "for thresholds of a sink contradict one another": contradicted,
        "that so few seeds do not tell from chance": len(open_) - few - contradicted,
    }
    said = ", ".join(f"{number} {cause}" for cause, number in causes.items() if number)
    rest = f"of the others {agree} go the paper's way and none another"
    rest += f"; among the {agree} is none of the {', nor of the '.join(unsupported)}" if agree and unsupported else ""
    return f"{len(open_)} of {len(asked)} changes stay open ({said}); {rest}"


def in_words(records: Sequence[Record], family: str) -> str:
    """A family's claim and outcome: what goes the paper's way, what another, what stays open, what is not there."""
    found = tr_family(records, family)
    if isinstance(found, NotApplicable):
        return found.reason
    words = {AGREES: "significantly the paper's way", DIFFERS: "significantly another way", UNDECIDED: "left open"}
    named = {what: [_bracketed(change) for change in found.measured[what]] for what in words}
    parts = [f"*{said}*: {', '.join(named[what]) or 'none'}" for what, said in words.items()]
    flat = [one.name for one in compared(records, family) if one.spike.outcome and one.over_elsewhere < STANDS_OUT]
    parts += (
        [f"*position 0 below twice the rest, so that the activation is no spike's*: {', '.join(flat)}"] if flat else []
    )
    absent = [name for name, of in FAMILY.items() if of == family and name not in by_name(records)]
    parts += [f"*not trained yet*: {', '.join(absent)}"] if absent else []
    claim = _claim(family)
    verdict = judge(claim, found, "").verdict
    why = f": {found.measured['reason']}" if "reason" in found.measured else ""
    return f"**{claim}** {RULES[claim].statement} **{verdict}**{why}. {'; '.join(parts)}."


def _claim(family: str) -> str:
    return next(claim for claim, of in CLAIMS.items() if of == family)


def _bracketed(change: str) -> str:
    """A change as the ledger names it, for a sentence: the largest activation need not be a spike."""
    name, measure = change.rsplit(": ", 1)
    return f"{name} ({'activation' if measure == 'spike' else measure})"


def _among_the_base(records: Sequence[Record]) -> dict[str, float | int | list[float]]:
    """The base's own seeds as if each were a variant; they are not judged where no other variant has several seeds."""
    rows = by_name(records)[BASE]
    base = {measure: _values(rows, measure) for measure in ("sink", "spike")}
    alarms = [
        abs(value - np.delete(of, i).mean()) > margin(records, measure, 1, len(of) - 1, without=BASE)
        for measure, of in base.items()
        for i, value in enumerate(of)
        if len(of) > 1 and pooled(records, measure, without=BASE)[1]
    ]
    found = {"base_sink_ratios": base["sink"].tolist(), "base_max_activations": np.exp(base["spike"]).tolist()}
    if alarms:
        counted = sum(map(bool, alarms))
        freedoms = [freedom for of in base if (freedom := pooled(records, of, without=BASE)[1])]
        chance = _chance_of_as_many(counted, len(rows), freedoms)
        found |= {"changes_among_base_seeds": counted, "of": len(alarms), "chance_of_as_many": chance}
    return found


def _chance_of_as_many(alarms: int, seeds: int, freedoms: Sequence[int]) -> float:
    """How often so many false alarms or more are raised where seeds scatter in the base as they do elsewhere.

    By simulation: each of so many seeds is put beside the mean of the others, for measures whose standard deviation is
    estimated with so many degrees of freedom.
    """
    rng, count = np.random.default_rng(0), np.zeros(SIMULATED)
    for freedom in freedoms:
        drawn, deviation = rng.normal(size=(SIMULATED, seeds)), np.sqrt(rng.chisquare(freedom, SIMULATED) / freedom)
        others = (drawn.sum(1, keepdims=True) - drawn) / (seeds - 1)
        half = _half_width(deviation, freedom, 1, seeds - 1)
        count += (np.abs(drawn - others) > half[:, None]).sum(1)
    return float((count >= alarms).mean())


def x_tr7_follows_loss(records: Sequence[Record]) -> Evidence | NotApplicable:
    """X-TR7: rank correlations with the loss over the optimization family's variants and the base.

    Not judged where variants, resampled, leave open how strong the first is, or which of the two is stronger. Control:
    the same over the variants of all other families, where what differs is no matter of training.
    """
    ours = of_family(records, "optimization")
    others = [record for record in records if record.name == BASE or FAMILY[record.name] != "optimization"]
    others = [record for record in others if not _is_late(record)]  # whose loss is another one
    if min(len({record.name for record in rows}) for rows in (ours, others)) < LEAST_VARIANTS:
        return NotApplicable(
            f"fewer than {LEAST_VARIANTS} variants to correlate over; train them with make ablations TIER=text"
        )
    found, control = follow_loss(ours), follow_loss(others)
    measured = {
        "spearman_sink": found.sink,
        "spearman_spike": found.spike,
        "spearman_sink_interval": list(found.sink_interval),
        "spearman_spike_interval": list(found.spike_interval),
        "stronger_by": found.by,
        "stronger_by_interval": list(found.by_interval),
        "n_variants": found.variants,
    }
    low, high = found.sink_interval
    doubts = [f"how strong the sink ratio's is ({low:.2f} to {high:.2f})"] if low <= STRONG < high else []
    least, most = found.by_interval
    if low <= STRONG and least <= 0 <= most:
        doubts.append(f"which is stronger (the sink ratio's by {least:.2f} to {most:.2f}, without signs)")
    if doubts:
        measured["reason"] = f"{found.variants} variants, resampled, leave open {' and '.join(doubts)}"
    return Evidence(
        measured,
        {
            "spearman_sink_other_families": control.sink,
            "spearman_spike_other_families": control.spike,
            "n_variants_other_families": control.variants,
        },
    )


def x_tr8_spike_first(records: Sequence[Record]) -> Evidence | NotApplicable:
    """X-TR8: which comes first, that position 0 is a multiple of the rest, or the attention that it gets?

    Over all runs that end with sinks: after how many tokens each has come half of its way; what is called a spike is
    position 0's largest entry over the largest elsewhere. Beside it, the same of that entry's size alone, which is no
    mark of a spike while all entries grow. Control: the largest entry elsewhere, as a multiple of the median; and its
    size.
    """
    rows = [record for record in records if at_the_end(record)["sink_ratio"] >= SOME_SINKS]
    if len(rows) < LEAST_VARIANTS:
        return NotApplicable(f"fewer than {LEAST_VARIANTS} runs end with sinks; make ablations TIER=text trains them")
    sink, size = (np.array([half_way(record, measure) for record in rows]) for measure in ("attention", "max_first"))
    pairs = ("max_first", "max_elsewhere"), ("max_elsewhere", "median"), ("max_elsewhere",)
    spike, elsewhere, its_size = (np.array([half_way(record, *pair) for record in rows]) for pair in pairs)
    return Evidence(
        {
            "share_spike_first": float((spike < sink).mean()),
            "share_together": float((spike == sink).mean()),
            "share_size_first": float((size < sink).mean()),
            "runs": len(rows),
            "tokens_spike": float(np.median(spike)),
            "tokens_size": float(np.median(size)),
            "tokens_sink": float(np.median(sink)),
        },
        {
            "share_elsewhere_first": float((elsewhere < sink).mean()),
            "tokens_elsewhere": float(np.median(elsewhere)),
            "share_elsewhere_size_first": float((its_size < sink).mean()),
        },
    )


def in_order(found: Evidence | NotApplicable) -> pd.DataFrame | NotApplicable:
    """What `spike_first` found, as a table: medians over runs, in millions of tokens, and how often each came first."""
    if isinstance(found, NotApplicable):
        return found
    values = {**found.measured, **found.control}
    names = {
        "sink": "attention to position 0",
        "spike": "position 0's largest entry, over the largest elsewhere",
        "size": "position 0's largest entry",
        "elsewhere": "control: the largest elsewhere, over the median",
    }
    rows = [
        {
            "measure": name,
            "half of its way after (million tokens)": values[f"tokens_{key}"] / 1e6,
            "came before the attention in (share of runs)": f"{values[f'share_{key}_first']:.0%}"
            if key != "sink"
            else "",
        }
        for key, name in names.items()
    ]
    return pd.DataFrame(rows).set_index("measure")


def x_tr9_dormant(records: Sequence[Record]) -> Evidence | NotApplicable:
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
