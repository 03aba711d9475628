"""What the lab's records say of the trained families (TR1 to TR6), and of heads that wait (X-TR9)."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from spikesink import paper
from spikesink.chain.trace import EPSILON, EPSILONS
from spikesink.common import NotApplicable, measure
from spikesink.lab.changes import AGREES, DIFFERS, UNDECIDED, Change, Compared
from spikesink.lab.families import BASE, FAMILIES, FAMILY
from spikesink.lab.findings import (
    NO_RECORDS,
    STANDS_OUT,
    average_seeds,
    compare_variants,
    half_width,
    pool_scatter,
    select_family,
)
from spikesink.lab.records import Record
from spikesink.ledger.claims import Evidence, judge
from spikesink.ledger.rules import RULES

TRAINED_CLAIMS = {f"TR{i}": family for i, family in enumerate(FAMILIES, start=1)}
WORDS = {AGREES: "significantly the paper's way", DIFFERS: "significantly another way", UNDECIDED: "left open"}


@measure
def tr_family(runs: pd.DataFrame, family: str, task: pd.DataFrame | None = None) -> Evidence:
    """TR1 to TR6: for each variant that the paper reports, does the change go the paper's way here?

    Each kind of change that the claim names must be supported by one. Where none goes another way, and the rule fails
    for those that stay open or are not trained yet, the claim is not judged. Control: each of the base's seeds in a
    variant's place; where half of these looks or more count as changes, nothing is judged. `runs` are of the text tier;
    those of the `task` tier stand beside it.
    """
    compared = compare_variants(runs, family)
    if not compared:
        raise NotApplicable(NO_RECORDS)
    if not all(pool_scatter(runs, quantity)[1] for quantity in ("sink", "spike")):
        raise NotApplicable(
            "no variant that has spike and sinks has a second seed, so that no change can be told from chance"
        )
    asked = {f"{one.name}: {c.quantity}": c for one in compared for c in (one.sink, one.spike) if c.outcome}
    outcomes = {what: [name for name, c in asked.items() if c.outcome == what] for what in (AGREES, DIFFERS, UNDECIDED)}
    supported = {asked[name].kind for name in outcomes[AGREES]}
    measured = {
        "variants": _rows(runs, family, compared),
        **outcomes,
        **{f"n_{what}": len(names) for what, names in outcomes.items()},
        "n_reported": len(asked),
        "unsupported": list(dict.fromkeys(c.kind for c in asked.values() if c.kind not in supported)),
    }
    for epsilon in (EPSILON, *EPSILONS):
        alone = [_at(change, epsilon).outcome for change in asked.values() if change.quantity == "sink"]
        measured |= {f"sinks_{what}_at_{epsilon:g}": alone.count(what) for what in (AGREES, DIFFERS)}
    control = _count_false_alarms(runs)
    alarms, looks = control.get("changes_among_base_seeds", 0), control.get("of", 1)
    if 2 * alarms >= looks:
        measured["reason"] = f"the base's own seeds count as changes in {alarms} of {looks} looks"
    elif missing := sorted(set(paper.TRAINED_VARIANTS[family]) - {one.name for one in compared}):
        measured["reason"] = f"not all is trained yet: {', '.join(missing)}; make ablations TIER=text does it"
    elif not outcomes[DIFFERS] and not RULES[claim_of(family)].is_met(measured):
        measured["reason"] = _why_open(list(asked.values()), measured["unsupported"])
    if task is not None:
        measured["variants_task"] = _rows(task, family, compare_variants(task, family))
    return Evidence(measured, control)


def claim_of(family: str) -> str:
    """The claim that is a family's."""
    return next(claim for claim, other in TRAINED_CLAIMS.items() if other == family)


def _at(change: Change, epsilon: float) -> Change:
    """A change of the sink ratio by one threshold alone; late queries know the usual one only."""
    return dict(zip(EPSILONS, change.others, strict=False)).get(epsilon, replace(change, others=()))


def _rows(runs: pd.DataFrame, family: str, compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """The base and the variants as the ledger has them."""
    means = average_seeds(select_family(runs, family)).reset_index().to_dict("records")
    return [row for row in means if row["name"] not in FAMILY] + [_row(one) for one in compared]


def _row(one: Compared) -> dict[str, Any]:
    row = {name: value for name, value in vars(one).items() if not isinstance(value, Change)}
    row |= {"title": one.title, "sink_at_loss": math.nan, "sink_at_loss_by_seed": list(one.sink_at_loss)}
    if one.sink_at_loss:
        row["sink_at_loss"] = float(np.mean(one.sink_at_loss))
    names = [f"sink_{end}" for end in ("change", "low", "high")]
    row |= zip(names, one.sink.interval, strict=True)
    for quantity in ("spike", "relative"):
        names = [f"{quantity}_{end}" for end in ("factor", "low", "high")]
        row |= zip(names, map(math.exp, getattr(one, quantity).interval), strict=True)
    for epsilon, other in zip(EPSILONS, one.sink.others, strict=False):
        row[f"sink_change_at_{epsilon:g}"] = list(other.interval)
    unknown = [name for name, value in row.items() if isinstance(value, float | list) and np.isnan(value).any()]
    return {name: value for name, value in row.items() if name not in unknown}


def _why_open(asked: Sequence[Change], unsupported: Sequence[str]) -> str:
    """How many changes stay open, and why, where none goes another way."""
    undecided = [change for change in asked if change.outcome == UNDECIDED]
    agree = sum(change.outcome == AGREES for change in asked)
    few = sum(change.nothing_to_lose for change in undecided)
    contradicted = sum(change.contradicted for change in undecided)
    causes = {
        "for want of sinks in what they are compared with": few,
        "for thresholds of a sink contradict one another": contradicted,
        "that so few seeds do not tell from chance": len(undecided) - few - contradicted,
    }
    why = ", ".join(f"{number} {cause}" for cause, number in causes.items() if number)
    rest = f"of the others {agree} go the paper's way and none another"
    rest += f"; among the {agree} is none of the {', nor of the '.join(unsupported)}" if agree and unsupported else ""
    return f"{len(undecided)} of {len(asked)} changes stay open ({why}); {rest}"


def _count_false_alarms(runs: pd.DataFrame) -> dict[str, Any]:
    """The base's seeds as if each were a variant, by the scatter of the others; not judged where that is not known."""
    base = runs[runs["name"] == BASE]
    n, alarms, looks = len(base), 0, 0
    for quantity in ("sink", "spike"):
        scatter, freedom = pool_scatter(runs, quantity, without=BASE)
        if freedom and n > 1:
            values = base[quantity].to_numpy()
            others = (values.sum() - values) / (n - 1)
            alarms += int((np.abs(values - others) > half_width(scatter, freedom, 1, n - 1)).sum())
            looks += n
    control = {"base_sink_ratios": base["sink"].tolist(), "base_max_activations": base["max_activation"].tolist()}
    return control | ({"changes_among_base_seeds": alarms, "of": looks} if looks else {})


@measure
def describe_family(runs: pd.DataFrame, family: str) -> str:
    """A family's claim and verdict in a sentence: what goes the paper's way, what another, what stays open."""
    evidence, claim = tr_family(runs, family), claim_of(family)
    lists = {said: [_in_words(name) for name in evidence.measured[what]] or ["none"] for what, said in WORDS.items()}
    flat = [one.name for one in compare_variants(runs, family) if one.spike.outcome and one.over_elsewhere < STANDS_OUT]
    lists["position 0 below twice the rest, so that the activation is no spike's"] = flat
    lists["not trained yet"] = [name for name, its in FAMILY.items() if its == family and name not in set(runs["name"])]
    parts = [f"*{said}*: {', '.join(names)}" for said, names in lists.items() if names]
    why = f": {evidence.measured['reason']}" if "reason" in evidence.measured else ""
    verdict = judge(claim, evidence, "").verdict
    return f"**{claim}** {RULES[claim].statement} **{verdict}**{why}. {'; '.join(parts)}."


def _in_words(change: str) -> str:
    """A change as the ledger names it, for a sentence: the largest activation need not be a spike."""
    name, quantity = change.rsplit(": ", 1)
    return f"{name} ({'activation' if quantity == 'spike' else quantity})"


@measure
def x_tr9_dormant(records: Sequence[Record]) -> Evidence:
    """X-TR9: of Bigram-Backcopy, the attention to position 0 of the head that waits there most, by kind of query.

    Of every run of the base. Control: the same before the first step.
    """
    base = [record for record in records if record.name == BASE]
    if not base:
        raise NotApplicable("no record of the base; train it with make ablations TIER=task")
    kinds = ("attention_other", "attention_trigger")
    return Evidence(
        {key: [record.final[key] for record in base] for key in (*kinds, "copy_loss")},
        {f"{kind}_untrained": [record.curve[kind][0] for record in base] for kind in kinds},
    )
