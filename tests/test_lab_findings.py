"""What is said of the lab's records: on records made up so that the answer is known."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from scipy import stats

from spikesink import paper, plots
from spikesink.apps import publish
from spikesink.apps.notebook import open_lab_ledger
from spikesink.common import NotApplicable
from spikesink.lab import config as config_
from spikesink.lab import families, findings, records
from spikesink.lab.config import Config
from spikesink.lab.data import BOS, Backcopy
from spikesink.lab.families import BASE, FAMILIES, VARIANTS
from spikesink.lab.findings import Change
from spikesink.lab.measures import backcopy_truth
from spikesink.lab.model import Decoder
from spikesink.lab.records import Record
from spikesink.lab.train import Run
from spikesink.ledger import claims, evidence
from spikesink.ledger.claims import Evidence
from spikesink.ledger.evidence import inside
from tests.test_lab import SMALL, planted_decoder


def texts(fig) -> list[str]:
    return [text.get_text() for text in fig.findobj(Text)]


RECORDS = Path(__file__).parent.parent / "figures" / config_.LAB
ON_CURVES = 0.06  # what the loss on the windows of a curve is more than that on all
BASE_SINKS, BASE_SPIKES = (0.30, 0.32, 0.34), (100.0, 110.0, 121.0)


def record(name: str, seed: int, sink: float, spike: float, loss: float = 2.0, **final) -> Record:
    curve = {
        "step": [0, 10, 20, 40],
        "max_first": [0.0, spike / 4, spike / 2, spike],
        "max_elsewhere": [0.1, spike / 10, spike / 10, spike / 10],
        "median": [0.1] * 4,
        "sink_ratio": [0.0, 0.0, sink / 4, sink],
        "attention": [0.1, 0.1, 0.12, 0.2],
        "held_out_loss": [4.0, 3.0, 2.5, loss + ON_CURVES],
        "attention_other": [0.05] * 4,
        "attention_trigger": [0.06] * 4,
    }
    values = {"sink_ratio": sink, "attention": 0.2, "max_activation": spike, "held_out_loss": loss, "median": 2.0}
    values |= {"max_first": spike, "max_elsewhere": spike / 10, "sink_ratios": {"0.2": sink, "0.4": sink}}
    values |= {"late": {"loss": loss + 0.5, "sink_ratio": sink / 2, "attention": 0.1}} | final
    variant = next((variant for variant in VARIANTS if variant.name == name), None)
    config = variant.config(Config(seed=seed)) if variant else Config(seed=seed)
    return Record("text", name, config, "t", "0", {}, {"precision": "float32"}, 1, 1.0, curve, values)


def base() -> list[Record]:
    return [record(BASE, i, s, a) for i, (s, a) in enumerate(zip(BASE_SINKS, BASE_SPIKES, strict=True))]


def three(name: str, sink: float, spike: float, loss: float = 2.0) -> list[Record]:
    return [
        record(name, i, sink + d, spike * f, loss) for i, d, f in ((0, -0.02, 0.9), (1, 0.0, 1.0), (2, 0.02, 1 / 0.9))
    ]


def test_a_change_has_the_interval_of_a_shared_standard_deviation():
    rows = base() + three("gate per head", 0.12, 10.0) + [record("gate per token", 0, 0.2, 50.0)]
    found = findings.change(rows, "gate per head", "sink")
    deviation = 0.02  # of both triples
    t = stats.t.ppf(0.975, 4)
    assert found.value == pytest.approx(0.12 - 0.32)
    assert found.high - found.value == pytest.approx(t * deviation * math.sqrt(2 / 3))
    assert found.value - found.low == pytest.approx(found.high - found.value)
    one = findings.change(rows, "gate per token", "sink")
    assert one.high - one.value == pytest.approx(t * deviation * math.sqrt(1 + 1 / 3)), "one seed, a wider interval"
    spike = findings.change(rows, "gate per head", "spike")
    assert math.exp(spike.value) == pytest.approx(10 / 110)


@pytest.mark.parametrize(
    ("low", "high", "said", "outcome"),
    [
        (0.01, 0.03, "up", "agree"),
        (-0.01, 0.30, "up", "undecided"),
        (-0.01, 0.03, "up", "differ"),  # no change beyond the band, whatever it is
        (-0.03, -0.01, "up", "differ"),
        (-0.30, 0.02, "down", "undecided"),
        (-0.03, -0.01, "down", "agree"),
        (0.10, 0.30, "down", "differ"),
        (-0.01, 0.03, "stays", "agree"),
        (0.01, 0.03, "stays", "agree"),
        (0.10, 0.30, "stays", "differ"),
        (-0.30, -0.10, "stays", "differ"),
        (-0.30, 0.10, "stays", "undecided"),
        (0.02, 0.10, "stays", "undecided"),
        (0.1, 0.3, None, None),
    ],
)
def test_a_change_agrees_where_its_interval_leaves_no_doubt(low, high, said, outcome):
    assert Change("sink", (low + high) / 2, low, high, said).outcome == outcome
    without = Change("sink", (low + high) / 2, low, high, said, room=False).outcome
    assert without == ("undecided" if said in ("down", "stays") else outcome)


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.05, 0.4, "agree"),
        (0.1, 0.4, "agree"),
        (-0.07, 0.4, "undecided"),
        (-0.4, -0.05, "undecided"),
        (-0.4, -0.07, "differ"),
    ],
)
def test_of_at_least_0_40_the_base_having_0_46_less_is_what_differs(low, high, outcome):
    assert Change("sink", (low + high) / 2, low, high, paper.AT_LEAST).outcome == outcome


def test_what_other_thresholds_of_a_sink_contradict_is_left_open():
    for at in ({"0.2": 0.1, "0.4": 0.1}, {"0.2": 0.4, "0.4": 0.1}, {"0.2": 0.1, "0.4": 0.4}):
        rows = [*base(), record("gate per head", 0, 0.1, 100.0, sink_ratios=at)]
        found = findings.change(rows, "gate per head", "sink")
        assert found.outcome == ("agree" if max(at.values()) == 0.1 else "undecided")
        assert [one.value for one in found.others] == pytest.approx([at["0.2"] - 0.32, at["0.4"] - 0.32])
    assert found.contradicted
    table = findings.table(rows, "gates")
    assert table.loc["gate per head", "change at 0.2, 0.4"] == "-0.22, +0.08"
    none = [replace(r, final=r.final | {"sink_ratios": {"0.2": r.final["sink_ratio"], "0.4": 0.0}}) for r in rows]
    found = findings.change(none, "gate per head", "sink")
    assert (found.outcome, found.others[1].room) == ("agree", False), "where there are none none can be lost"
    for at, outcome in ((0.33, "differ"), (0.40, "undecided"), (0.1, "differ")):
        rows = [*base(), record("GeLU", 0, 0.1, 100.0, sink_ratios={"0.2": at, "0.4": at})]
        assert findings.change(rows, "GeLU", "sink").outcome == outcome, "it is to rise; hardly any change is no rise"
    rows = [*base(), record("static gate", 0, 0.1, 100.0, sink_ratios={"0.2": 0.3, "0.4": 0.1})]
    assert findings.change(rows, "static gate", "sink").outcome == "undecided", "0.02 less at 0.2 is not less"
    rows[-1].final["sink_ratios"]["0.2"] = 0.2
    assert findings.change(rows, "static gate", "sink").outcome == "differ"


def test_what_is_said_of_bad_training_is_asked_where_training_went_worse():
    for loss, says in ((2.0, None), (2.005, None), (2.1, "down"), (1.8, None)):
        rows = base() + three("beta2 0.8", 0.2, 100.0, loss)
        assert findings.change(rows, "beta2 0.8", "sink").paper == says


def test_a_variant_of_a_variant_is_compared_with_that_one():
    rows = base() + three("embeddings of 1", 0.1, 50.0) + three("sandwich", 0.1, 10.0)
    assert findings.change(rows, "sandwich", "sink").value == pytest.approx(0)
    assert math.exp(findings.change(rows, "sandwich", "spike").value) == pytest.approx(10 / 50)
    assert math.exp(findings.change(rows, "sandwich", "relative").value) == pytest.approx(10 / 50)
    assert [one.name for one in findings.compared(base() + three("sandwich", 0.1, 10.0))] == []
    assert "sandwich (against embeddings of 1)" in findings.table(rows).index


def test_models_that_know_long_contexts_only_are_judged_by_late_queries():
    rows = base() + three("only the longest", 0.30, 100.0) + [record("contexts from 1/2 on", 0, 0.10, 50.0)]
    found = findings.change(rows, "contexts from 1/2 on", "sink")
    assert found.value == pytest.approx((0.10 - 0.30) / 2)
    (one,) = (one for one in findings.compared(rows) if one.name == "contexts from 1/2 on")
    assert found.room
    assert found.others == (), "of late queries there is one threshold"
    assert findings.pooled([*rows, *three("contexts from 1/2 on", 0.3, 100.0)], "sink", epsilon=0.2)[1] == 4
    few = [replace(r, final=r.final | {"late": {"loss": 2.5, "sink_ratio": 0.05, "attention": 0.1}}) for r in rows]
    assert not findings.change(few, "contexts from 1/2 on", "sink").room
    assert one.loss == pytest.approx(2.5)
    assert one.sink_ratio == pytest.approx(0.05)
    assert one.sink_at_loss == (), "curves are of all queries"
    assert one.title == "contexts from 1/2 on (against only the longest, late queries)"
    table = findings.table(rows, "context")
    assert table.loc["only the longest", "sink ratio"] == pytest.approx(0.30)
    assert table.loc["only the longest, late queries", "sink ratio"] == pytest.approx(0.15), "what it is set beside"
    assert "only the longest, late queries" not in findings.table(rows, "context", "spike").index
    more = [record(name, 0, 0.3, 100.0) for name in ("half as long", "contexts from 1/4 on")]
    scattered = [replace(r, final=r.final | {"max_activation": 100.0 * 3.0**r.config.seed}) for r in few]
    said = evidence.tr_family([*scattered, *more], "context").measured["reason"]
    assert "stay open (2 for want of sinks in what they are set beside, " in said
    assert "only the longest, late queries" in texts(plots.family(rows, "context"))
    assert "contexts from 1/2 on" not in texts(plots.decoupling(findings.compared(rows), findings.centre(rows)))


def test_the_base_is_seen_at_the_loss_that_a_variant_ends_with():
    rows = base()
    assert findings.sink_at_loss(rows, 2.4) == pytest.approx(BASE_SINKS)
    assert findings.sink_at_loss(rows, 2.5) == pytest.approx([sink / 4 for sink in BASE_SINKS])
    assert findings.sink_at_loss(rows, 3.1) == (0, 0, 0)
    assert findings.sink_at_loss([*rows, record(BASE, 3, 0.3, 9.0, loss=3.0)], 2.4) == (), "one never came there"
    table = findings.table([*rows, record("GeLU", 0, 0.1, 100.0, loss=2.5 - ON_CURVES)], "ffn")
    assert table.loc["GeLU", "at this loss"] == "0.08 (0.07 to 0.09)"
    (one,) = findings.compared([*rows, record("GeLU", 0, 0.1, 100.0, loss=2.5 - ON_CURVES)])
    assert np.mean(one.sink_at_loss) == pytest.approx(0.32 / 4), "on the windows of curves its loss was 2.5"
    (one,) = findings.compared([*rows, record("GeLU", 0, 0.1, 100.0, loss=2.0)])
    assert np.mean(one.sink_at_loss) == pytest.approx(0.32), "as good as the base in the end"
    of = three("embeddings of 1", 0.2, 50.0)
    ends = [one.sink_at_loss for one in findings.compared([*rows, *of, record("sandwich", 0, 0.1, 9.0)])]
    assert ends[1] == pytest.approx((0.18, 0.2, 0.22)), "of what it is set beside, which is not the base"


def test_directions_are_read_off_the_papers_numbers():
    assert [
        findings.direction(name, "sink") for name in ("gate per head", "static gate", "sandwich", "DynamicTanh")
    ] == [
        "down",
        paper.AT_LEAST,
        "stays",
        "up",
    ]
    assert findings.direction("GeLU", "spike") == "stays"
    assert findings.direction("linear", "spike") == "down"
    assert findings.direction("no weight decay", "spike") == "up"
    assert findings.direction("QK norm", "sink") is None
    named = {name for family in paper.TRAINED_VARIANTS.values() for name in family}
    assert named <= {variant.name for variant in VARIANTS}
    assert tuple(paper.TRAINED_VARIANTS) == FAMILIES


def test_a_familys_evidence_lists_what_agrees_and_what_does_not():
    rows = gates(head=0.5)
    found = evidence.tr_family(rows, "gates")
    assert found.measured["agree"] == [
        "gate per channel: sink",
        "gate per channel: spike",
        "gate per head: spike",
        "gate per token: sink",
    ]
    assert found.measured["differ"] == ["gate per head: sink"]
    counts = [found.measured[f"sinks_{what}_at_{at}"] for what in ("agree", "differ") for at in ("0.2", "0.3", "0.4")]
    assert counts == [2, 2, 2, 1, 1, 1], "all are alike, in these"
    other = [replace(r, final=r.final | {"sink_ratios": {"0.2": 0.32, "0.4": r.final["sink_ratio"]}}) for r in rows]
    counts = evidence.tr_family(other, "gates").measured
    assert [counts[f"sinks_agree_at_{at}"] for at in ("0.2", "0.3", "0.4")] == [1, 2, 2], "by 0.2 all sinks stay"
    assert [counts[f"sinks_differ_at_{at}"] for at in ("0.2", "0.3", "0.4")] == [3, 1, 1]
    assert counts["agree"] == ["gate per channel: spike", "gate per head: spike"]
    assert counts["differ"] == ["gate per head: sink"], "more by 0.3, as many by 0.2: surely not fewer"
    assert found.measured["undecided"] == ["static gate: sink"]
    assert [found.measured[f"n_{what}"] for what in ("agree", "differ", "undecided", "reported")] == [4, 1, 1, 6]
    assert [row["name"] for row in found.measured["variants"]][:3] == [BASE, "gate per channel", "gate per head"]
    assert found.measured["variants"][0]["sink_ratio"] == pytest.approx(0.32)
    assert claims.judge("TR5", found, "09").verdict == "differs"
    assert found.control["base_sink_ratios"] == pytest.approx(BASE_SINKS)
    assert found.control["changes_among_base_seeds"] == 0
    assert found.control["of"] == 6


def test_a_family_of_which_little_is_beyond_doubt_does_not_hold():
    measured = {"n_differ": 0, "n_agree": 2, "n_reported": 5, "unsupported": []}
    assert claims.verdict("TR5", measured) == "differs"
    assert claims.verdict("TR5", measured | {"n_agree": 3}) == "holds"
    assert claims.verdict("TR5", measured | {"n_agree": 4, "n_differ": 1}) == "differs"


def test_a_claim_of_several_parts_is_judged_where_each_has_some_support():
    there = [r for r in gates(head=0.02) if r.name != "static gate"]
    for static, verdict in (
        ([record("static gate", 0, 0.30, 100.0)], "n/a"),
        (three("static gate", 0.36, 90.0), "holds"),
    ):
        found = evidence.tr_family([*there, *static], "gates")
        claim = claims.judge("TR5", found, "09")
        assert (claim.verdict, found.measured["n_differ"]) == (verdict, 0)
        assert found.measured["unsupported"] == (["sinks that stay"] if verdict == "n/a" else [])
        assert ("reason" in found.measured) == (verdict == "n/a")
        if verdict == "n/a":
            assert claim.measured["reason"].endswith(
                "of the others 5 go the paper's way and none another; among the 5 is none of the sinks that stay"
            )
    kinds = {
        name: (findings.change([*there, record(name, 0, 0.3, 90.0)], name, m).kind)
        for name, m in (
            ("static gate", "sink"),
            ("d_head x 2, half as many", "sink"),
            ("GeLU", "spike"),
            ("linear", "spike"),
        )
    }
    assert kinds == {
        "static gate": "sinks that stay",
        "d_head x 2, half as many": "sinks that rise",
        "GeLU": "activations that stay",
        "linear": "activations that fall",
    }


def test_a_family_that_fails_for_open_changes_alone_is_not_judged():
    rows = base() + three("gate per channel", 0.31, 100.0) + three("gate per head", 0.31, 100.0)
    rows += [record("gate per token", 0, 0.3, 100.0), record("static gate", 0, 0.30, 100.0)]
    scattered = [
        replace(r, final=r.final | {"sink_ratio": 0.2 * r.config.seed + 0.05, "max_activation": 4.0**r.config.seed})
        for r in rows
    ]
    found = evidence.tr_family(scattered, "gates")
    assert found.measured["n_differ"] == 0
    assert 2 * found.measured["n_agree"] < found.measured["n_reported"]
    claim = claims.judge("TR5", found, "09")
    assert claim.verdict == "n/a"
    n = found.measured["n_undecided"]
    seeds = f"({n} that so few seeds do not tell from chance)"
    assert claim.measured["reason"].startswith(f"{n} of 6 changes stay open {seeds}; of the")
    assert f"**n/a**: {claim.measured['reason']}. *significantly" in evidence.in_words(scattered, "gates")
    assert claim.measured["variants"], "what was measured stands there all the same"
    assert "reason" not in evidence.tr_family(gates(head=0.5), "gates").measured


def gates(head: float) -> list[Record]:
    """A family of which all is trained."""
    rows = base() + three("gate per channel", 0.02, 10.0) + three("gate per head", head, 10.0)
    return [*rows, record("gate per token", 0, 0.1, 100.0), record("static gate", 0, 0.30, 100.0)]


def test_a_base_whose_seeds_differ_more_than_variants_do_raises_false_alarms():
    wild = [record(BASE, i, s, 100.0) for i, s in enumerate((0.1, 0.1, 0.9))]
    calm = [r for v in ("gate per channel", "gate per head", "gate per token", "static gate") for r in three(v, 0.2, 9)]
    few = evidence.tr_family(wild + calm, "gates")
    assert few.control["changes_among_base_seeds"] == 3, "of the sinks, each beside the two others"
    said = claims.judge("TR5", few, "09").measured["reason"]
    assert said == "the base's own seeds count as changes in 3 of 6 looks"
    assert few.control["chance_of_as_many"] < 0.05
    alone = [record(name, 0, 0.1, 9.0) for name in ("gate per channel", "gate per head", "gate per token")]
    alone.append(record("static gate", 0, 0.1, 9.0))
    assert "of" not in evidence.tr_family(wild + alone, "gates").control, "nothing to tell the seeds apart by"


def test_false_alarms_are_as_many_as_chance_makes():
    assert evidence.trained._chance_of_as_many(0, 3, [4, 5]) == 1
    one = evidence.trained._chance_of_as_many(1, 3, [1000])
    assert one == pytest.approx(0.12, abs=0.01), "three looks that hang together"
    two, three = (evidence.trained._chance_of_as_many(alarms, 3, [4, 5]) for alarms in (2, 3))
    assert 1 - findings.LEVEL < two < 0.12, "two of six are no wonder"
    assert three < two


def test_variants_without_sinks_say_nothing_of_how_far_sink_ratios_scatter():
    none = [r for v in ("gate per channel", "gate per head") for r in three(v, 0.0, 50.0)]
    assert findings.pooled([*base(), *none], "sink") == findings.pooled(base(), "sink")
    some = three("gate per channel", 0.2, 50.0)
    assert findings.pooled([*base(), *some], "sink")[1] == 4
    assert findings.pooled([*base(), *none], "spike")[1] == 6, "but they have spikes"


def test_variants_without_a_spike_say_nothing_of_how_far_spikes_scatter():
    flat = [replace(r, final=r.final | {"max_elsewhere": r.final["max_first"]}) for r in three("sandwich", 0.3, 9.0)]
    for measure, freedom in (("spike", 2), ("relative", 2), ("sink", 4)):
        assert findings.pooled([*base(), *flat], measure)[1] == freedom
    assert findings.pooled([*base(), *flat], "spike") == findings.pooled(base(), "spike")
    at = [replace(r, final=r.final | {"sink_ratios": {"0.2": 0.5, "0.4": 0.0}}) for r in base()]
    assert findings.pooled(at, "sink", epsilon=0.2) == (0, 2)
    assert findings.pooled(at, "sink", epsilon=0.4)[1] == 0


def test_the_committed_ledger_is_of_the_committed_records():
    text = records.read_all(RECORDS, "text")
    assert claims.lab_ledger(RECORDS.parent)["sha256"] == records.digest(text)


def test_the_plane_of_all_is_in_medians_of_the_stream():
    rows = [*base(), record("GeLU", 0, 0.3, 90.0, median=3.0)]
    fig = plots.decoupling(findings.compared(rows), findings.centre(rows))
    points = [line.get_xdata()[0] for line in fig.axes[0].lines if len(line.get_xdata())]
    assert 30 in [pytest.approx(x) for x in points]
    assert 55 in [pytest.approx(x) for x in points], "the base's, whose median is 2"


def test_without_records_or_second_seeds_there_is_no_verdict():
    assert isinstance(evidence.tr_family([], "gates"), NotApplicable)
    lone = [r for r in gates(0.1) if r.config.seed == 0]
    assert "no variant that has spike and sinks has a second seed" in evidence.tr_family(lone, "gates").reason
    some = [r for r in gates(0.1) if r.name not in ("static gate", "gate per token")]
    found = evidence.tr_family(some, "gates")
    assert claims.judge("TR5", found, "09").verdict == "n/a"
    assert "not all is trained yet: gate per token, static gate" in found.measured["reason"]
    assert found.measured["n_agree"] == 4, "what was measured stands there all the same"
    assert evidence.tr_family(base(), "gates").reason == findings.NO_RECORDS


def test_a_family_is_summed_up_in_a_sentence():
    said = evidence.in_words(gates(head=0.5), "gates")
    assert "*significantly another way*: gate per head (sink)" in said
    assert said.startswith("**TR5** A gate that reads its input takes sinks and spikes away; a static one does not. **")
    assert "**differs**" in said
    assert said.endswith("*left open*: static gate (sink).")
    flat = [replace(r, final=r.final | {"max_elsewhere": r.final["max_first"]}) for r in gates(head=0.5)]
    flat = [after if after.name == "gate per head" else r for r, after in zip(gates(head=0.5), flat, strict=True)]
    said = evidence.in_words(flat, "gates")
    assert said.endswith("*position 0 below twice the rest, so that the activation is no spike's*: gate per head.")
    some = [r for r in gates(0.02) if r.name != "static gate"]
    assert evidence.in_words(some, "gates").endswith("; *not trained yet*: static gate.")
    assert "*significantly another way*: none" in evidence.in_words(some, "gates")
    assert evidence.in_words(base(), "gates") == findings.NO_RECORDS
    apart = [*base(), *three("QK norm", 0.0, 90.0), record("sandwich", 0, 0.0, 9.0)]
    assert "sandwich," not in evidence.in_words(apart, "normalization").split("*not trained yet*: ")[1]


def test_the_corners_hold_what_goes_alone():
    rows = base() + three("only the longest", 0.3, 100.0) + three("gate per head", 0.01, 20.0)
    rows += [record("QK norm", 0, 0.01, 100.0), record("contexts from 1/2 on", 0, 0.01, 100.0)]
    rows += [record("half the steps", 0, 0.01, 100.0, sink_ratios={"0.2": 0.2, "0.4": 0.0})]  # some, by another ε
    rows += [record("learning rate x 3", 0, 0.0, 300.0, max_elsewhere=290.0)]  # large, and no spike of position 0
    rows += [record("no weight decay", 0, 0.3, 10.0, median=0.2)]  # a small stream, and as large a spike in it
    rows += [record("weight decay x 5", 0, 0.3, 10.0), record("GeLU", 0, 0.3, 100.0), record("linear", 0, 0.02, 9.0)]
    found = findings.corners(rows)
    assert [said.split(" (")[0] for said in found["spike_alone"]] == ["QK norm"], "the others' spikes went as well"
    assert [said.split(" (")[0] for said in found["sink_alone"]] == ["weight decay x 5"]
    low, high = (math.exp(end) for end in findings.change(rows, "weight decay x 5", "relative").interval[1:])
    assert found["sink_alone"] == [f"weight decay x 5 (5; times 0.09, {low:.2f} to {high:.2f})"]
    assert found["medians"] == pytest.approx(55)
    both = [record(name, 0, s, 1000 * s) for name, s in (("GeLU", 0.1), ("linear", 0.2), ("QK norm", 0.5))]
    assert findings.corners(base() + both)["together"] == pytest.approx(0.8), "110 of 0.32 is out of line"
    assert findings.corners(base() + both)["together_raw"] == pytest.approx(0.8)
    assert findings.corners(base() + both)["together_interval"] == [-1, 1], "of four variants there is none"
    low, high = findings.corners(rows)["together_interval"]
    assert -1 <= low < findings.corners(rows)["together"] < high <= 1


def test_the_sink_that_follows_the_loss_has_the_stronger_correlation():
    names = ["learning rate / 3", "learning rate x 3", "no weight decay", "beta2 0.8", "constant rate"]
    sinks = [0.5, 0.4, 0.3, 0.2, 0.1]
    spikes = [300.0, 100.0, 500.0, 200.0, 400.0]
    rows = [record(n, 0, s, a, loss=2.5 - s) for n, s, a in zip(names, sinks, spikes, strict=True)]
    others = [record(v.name, 0, 0.3, 10.0 * i + 10) for i, v in enumerate(VARIANTS) if v.family == "gates"]
    found = evidence.x_tr7_follows_loss([record(BASE, 0, 0.6, 250.0, loss=1.9), *rows, *others])
    assert found.measured["spearman_sink"] == pytest.approx(-1)
    assert abs(found.measured["spearman_spike"]) < 0.5
    low, high = found.measured["stronger_by_interval"]
    assert low <= 0 < found.measured["stronger_by"] < high
    assert "6 variants, resampled, leave open which is stronger" in found.measured["reason"]
    assert claims.judge("X-TR7", found, "09").verdict == "n/a"


def test_more_variants_tell_two_correlations_apart():
    names = [BASE, *(v.name for v in VARIANTS if v.family == "optimization")]
    spikes = [100.0 * (1 + (3 * i) % 10) for i in range(10)]
    others = [record(v.name, 0, 0.3, 10.0 * i + 10) for i, v in enumerate(VARIANTS) if v.family == "gates"]

    def of(sinks: list[float], spikes: list[float]):
        rows = zip(names, sinks, spikes, strict=True)
        made = [record(n, 0, s, a, loss=2 + i / 10) for i, (n, s, a) in enumerate(rows)]
        return claims.judge("X-TR7", evidence.x_tr7_follows_loss(made + others), "09")

    falling = [1 - i / 10 for i in range(10)]
    assert of(falling, spikes).verdict == "holds"
    rising = falling[::-1]
    assert of(rising, spikes).verdict == "differs"
    assert of(rising, [1000 * f for f in falling]).verdict == "differs", "that both are as strong is no doubt then"
    unsure = of([0.6, 1.0, 0.5, 0.9, 0.2, 0.8, 0.3, 0.7, 0.1, 0.4], spikes)
    assert unsure.verdict == "n/a"
    assert "leave open how strong the sink ratio's is" in unsure.measured["reason"]


def test_models_with_another_loss_are_no_control_of_what_follows_the_loss():
    rows = [record(v.name, 0, 0.3, 10.0 * i + 10) for i, v in enumerate(VARIANTS) if v.family != "context"]
    more = [record("contexts from 1/2 on", 0, 0.9, 9.0), record("only the longest", 0, 0.3, 10.0)]
    found = evidence.x_tr7_follows_loss([*base(), *rows, *more]).control["n_variants_other_families"]
    assert found == evidence.x_tr7_follows_loss([*base(), *rows]).control["n_variants_other_families"] + 1


def test_half_way_is_where_half_of_the_way_to_the_last_value_is_first_reached():
    rows = base() + three("gate per head", 0.3, 10.0)
    found, batch = evidence.x_tr8_spike_first(rows), rows[0].config.batch
    table = evidence.in_order(found)
    assert table.iloc[:, 0].tolist() == [found.measured[f"tokens_{of}"] / 1e6 for of in ("sink", "spike", "size")] + [
        found.control["tokens_elsewhere"] / 1e6
    ]
    assert table.iloc[:, 1].tolist()[:2] == ["", f"{found.measured['share_spike_first']:.0%}"]
    assert found.measured["tokens_spike"] == found.measured["tokens_size"] == 20 * batch
    assert found.measured["tokens_sink"] == 40 * batch, "half way from 0.1 to 0.2"
    assert found.measured["share_spike_first"] == found.control["share_elsewhere_first"] == 1
    assert found.measured["share_together"] == 0
    assert claims.judge("X-TR8", found, "09").verdict == "holds"
    assert claims.passing_controls("X-TR8", found.measured, found.control), (
        "what is elsewhere outgrows the median as early"
    )
    late = [replace(r, curve=r.curve | {"max_elsewhere": [0.1, 0.2, 0.4, 9.0]}) for r in rows]
    found = evidence.x_tr8_spike_first(late)
    assert found.control["tokens_elsewhere"] == 40 * batch
    assert found.control["share_elsewhere_first"] == 0
    together = [
        replace(r, curve=r.curve | {"max_elsewhere": [0.1, 0.5, 0.5, 0.1], "max_first": [0.1, 0.5, 0.9, 1.0]})
        for r in rows
    ]
    found = evidence.x_tr8_spike_first(together)
    assert found.measured["share_size_first"] == 1, "the whole stream grows"
    assert found.measured["share_spike_first"] == 0, "and position 0 is no multiple of the rest yet"
    assert claims.judge("X-TR8", found, "09").verdict == "differs"
    assert found.measured["share_together"] == 1
    assert findings.half_way(rows[0], "held_out_loss") == 10 * batch, "what falls, too"
    assert findings.half_way(rows[0], "attention_other") == 40 * batch, "what ends where it began is there at the end"
    curve = rows[0].curve | {"max_first": [1.0, 1.0, 8.0, 9.0], "max_elsewhere": [1.0, 1.0, 8.0, 3.0]}
    assert findings.half_way(replace(rows[0], curve=curve), "max_first", "max_elsewhere") == 40 * batch
    dip = rows[0].curve | {"max_first": [1.2, 0.5, 1.5, 1.9], "max_elsewhere": [1.0] * 4}
    assert findings.half_way(replace(rows[0], curve=dip), "max_first", "max_elsewhere") == 40 * batch, "down is not up"
    late = [replace(r, curve=r.curve | {"attention": [0.1, 0.2, 0.2, 0.2]}) for r in rows]
    assert evidence.x_tr8_spike_first(late).measured["share_size_first"] == 0
    assert isinstance(evidence.x_tr8_spike_first([record(BASE, i, 0.05, 1.0) for i in range(9)]), NotApplicable)
    no_sinks = {"loss": 2.5, "sink_ratio": 0.05, "attention": 0.1}  # of the queries that it is judged by
    judged_late = record("contexts from 1/4 on", 0, 0.3, 1.0, late=no_sinks)
    assert (
        evidence.x_tr8_spike_first([*rows, judged_late]).measured["runs"]
        == evidence.x_tr8_spike_first(rows).measured["runs"]
    )


def test_idle_heads_are_compared_with_themselves_before_training():
    rows = [record(BASE, 0, 0.3, 1.0, attention_other=0.9, attention_trigger=0.01, copy_loss=0.0)]
    found = evidence.x_tr9_dormant(rows)
    assert claims.judge("X-TR9", found, "09").verdict == "holds"
    assert found.control["attention_other_untrained"] == [0.05]
    assert claims.passing_controls("X-TR9", found.measured, found.control) == []


@torch.inference_mode()
def test_what_is_known_of_backcopy_is_measured_as_defined():
    task = Backcopy()
    model = Decoder(SMALL)
    for block in model.blocks:
        block.attn.q.weight.zero_()  # even attention
    model.unembed.weight.zero_()  # even predictions
    found = backcopy_truth(model, task)
    rows = task.windows(0, 64, 64, held_out=True)
    trigger = task.is_trigger(rows)
    even = np.broadcast_to(1 / np.arange(1, 65), rows.shape)
    assert found["attention_trigger"] == pytest.approx(even[:, 2:][trigger[:, 2:]].mean(), rel=1e-4)
    assert found["attention_other"] == pytest.approx(even[:, 2:][~trigger[:, 2:]].mean(), rel=1e-4)
    assert np.array(found["heads"]).shape == (2, 2, 2)
    assert found["copy_loss"] == pytest.approx(math.log(64), rel=1e-5)
    entropy = -(task.bigram * np.log(np.where(task.bigram > 0, task.bigram, 1))).sum(1)
    others = ~trigger[:, 1:-1]
    assert found["excess"] == pytest.approx(math.log(64) - entropy[rows[:, 1:-1][others]].mean(), rel=1e-4)


def made_up() -> list[Record]:
    found = base()
    for i, variant in enumerate(VARIANTS):
        sink, spike = 0.02 + 0.02 * i, 20.0 + 10 * i
        found += (
            three(variant.name, sink, spike, 2 + 0.01 * i)
            if variant.headline
            else [record(variant.name, 0, sink, spike)]
        )
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_picture_names_every_variant_here_and_in_the_paper(family):
    fig = plots.family(made_up(), family)
    said = texts(fig)
    reported = paper.TRAINED_VARIANTS[family]
    ticks = [line.get_ydata()[0] for line in fig.axes[1].lines if line.get_marker() == "_"]
    assert ticks == [sink for sink, spike in reported.values() if isinstance(sink, float) and spike is None]
    named = findings.by_name(findings.of_family(made_up(), family))
    joined = {**named, **findings.beside_late(named)}.values()
    assert [len(line.get_xdata()) for line in fig.axes[0].lines] == [len(seeds) for seeds in joined]
    for variant in VARIANTS:
        assert (variant.name in said) == (variant.family == family)
    named = {name: f"{name} ({paper.TRAINED_AS[name]})" if name in paper.TRAINED_AS else name for name in reported}
    assert all(any(named[name] in text for text in said) for name, (sink, _) in reported.items() if sink is not None)


def test_pictures_say_what_they_were_given():
    rows = made_up()
    found = findings.compared(rows)
    outcomes = [change.outcome for one in found for change in (one.sink, one.spike) if change.outcome]
    agree, differ = outcomes.count("agree"), outcomes.count("differ")
    assert (
        f"Of {len(outcomes)} changes that the paper reports, {agree} go its way here, {differ} another, "
        f"{len(outcomes) - agree - differ} stay open"
    ) in texts(plots.changes(found))
    assert {BASE, *(one.name for one in found if not one.late)} <= set(
        texts(plots.decoupling(found, findings.centre(rows)))
    )
    rho = findings.follow_loss(findings.of_family(rows, "optimization")).sink
    assert any(f"Rank correlation with the loss:\n{rho:+.2f} (" in text for text in texts(plots.following_loss(rows)))
    growing = plots.emergence(findings.emergence(base()))
    assert {"position 0", "attention"} <= set(texts(growing))
    spike, sink = growing.axes[2].lines[0], growing.axes[3].lines[1]
    assert spike.get_ydata() == pytest.approx([0.0, 2.5, 5.0, 10.0]), "over what is elsewhere"
    assert sink.get_ydata() == pytest.approx([0.1, 0.1, 0.12, 0.2])
    runs = {
        name: [
            Run(replace(SMALL, seed=seed), None, None, curve=swinging(share))
            for seed, share in enumerate((mean - 0.01, mean + 0.01))
        ]
        for name, mean in {"plain": 0.4, "gated": 0.02}.items()
    }
    curves = findings.curves(runs)
    assert findings.settled(curves, "attention_other")["plain"].tolist() == pytest.approx([0.39, 0.41])
    said = texts(plots.dormant(curves))
    assert "plain: 40% at position 0 when idle (39%, 41%)" in said
    assert "gated: 2% at position 0 when idle (1%, 3%)" in said


def swinging(share: float) -> list[dict[str, float]]:
    """A curve that swings about a share in the second half of its steps; what was before is past."""
    swings = ((0, 0.9), (5, share - 0.01), (10, share + 0.01))
    return [{"step": at, "copy_loss": 1.0, "attention_other": s, "attention_trigger": 0.0} for at, s in swings]


def test_the_table_of_variants_has_one_row_each_with_intervals():
    table = findings.table(made_up(), "gates")
    assert list(table.index) == [BASE, *(v.name for v in VARIANTS if v.family == "gates")]
    assert table.loc["gate per head", "seeds"] == 3
    assert table.loc["gate per head", "attention"] == pytest.approx(0.2)
    assert table.loc["gate per head", "paper"] == "down"
    assert table.loc[BASE, "sink ratio"] == pytest.approx(0.32)
    assert table.loc[BASE, "change"] == "", "the base is not compared with itself"
    of_spikes = findings.table(made_up(), "gates", "spike")
    assert list(of_spikes.index) == list(table.index)
    assert of_spikes.loc["gate per head", "times elsewhere"] == pytest.approx(10)
    assert list(of_spikes["paper"]) == ["", "down", "down", "", ""], "what it says of activations, not of sinks"


def test_where_nothing_was_trained_it_says_so():
    assert findings.compared(base()) == []
    assert "make ablations trains them" in findings.table([]).reason
    for picture in (plots.changes([]), plots.decoupling([], (1.0, 0.1))):
        assert "make ablations trains them" in " ".join(texts(picture))


def test_records_are_told_apart_by_their_digest():
    rows = base()
    assert records.digest(rows) == records.digest(base())
    assert records.digest(rows) != records.digest([*rows[:2], replace(rows[2], seconds=2.0)])


def test_the_chain_can_be_put_to_a_model_of_our_own():
    model, tokens = planted_decoder(), torch.from_numpy(Backcopy().windows(0, 6, 64))
    model.tokenizer = Characters()
    found = inside.chain(model, tokens)
    assert found["LC1"].measured["step_up_blocks"] == [4]
    assert found["LC1"].measured["channels"][0] == 9
    assert found["AM3"].measured["rank_one_share"] > 0.99
    assert found["AM2"].measured["gain_rank"] == 1
    assert found["LC7"].measured["position0_share"] == 1
    assert found["AM5"].measured["median_relative_error"] < 1e-5
    assert found["NM3"].measured["cosine_after"] == pytest.approx(1, abs=1e-4)
    assert found["SK3"].reason == "no head of the plateau sinks on the spike tokens"
    assert any("(LC1)" in claim for claim in inside.with_verdict(found, "holds"))
    assert any("(SK3)" in claim for claim in inside.with_verdict(found, "n/a"))
    short = inside.chain(model, tokens[:, :32])
    assert short["LC1"].measured["channels"][0] == 9, "of a shorter window the first token is a larger share"
    tokens[:, ::8] = BOS
    everywhere = inside.chain(model, tokens)
    assert claims.judge("LC7", everywhere["LC7"], "09").verdict == "differs"
    assert "of tokens after the first pass 20 medians, so it marks no spike" in everywhere["LC1"].reason
    assert isinstance(everywhere["SK1"], Evidence), "which asks for no spike"
    table = inside.table({"made by hand": found, "none": {key: NotApplicable("it is none") for key in found}})
    assert table.loc["LC1", "made by hand"] == "holds (step up blocks 4)"
    assert table.loc["LC1", "none"] == "n/a: it is none"
    assert table.loc["AM3", "none"] == "n/a: as LC1"


@torch.no_grad()
def test_what_gates_let_through_is_read_head_by_head():
    gated, static = (Decoder(replace(SMALL, gate=gate)) for gate in ("head", "static"))
    for layer in gated.blocks:
        layer.attn.q.weight.zero_()  # attention is even: 1, 1/2, ... 1/10 on position 0
        layer.attn.gate.logit.weight.zero_()
    gated.embed.weight[:, 5] = 1.0
    gated.embed.weight[32:, 5] = -1.0
    gated.blocks[0].attn.gate.logit.weight[1, 5] = 1e4  # the second head's is open on tokens below 32 alone
    tokens = torch.full((4, 10), 40).index_fill(1, torch.tensor(0), 3)
    table = inside.gates({"gated": gated, "static": static, "none": Decoder(SMALL)}, tokens)
    assert list(table) == ["gated: attention", "gated: gate", "static: attention", "static: gate", "none: attention"]
    assert list(table["gated: attention"]) == ["0.29, 0.29"] * SMALL.n_layers
    even = "0.50 (0.50 to 0.50)"
    assert table["gated: gate"][0] == f"{even}, 0.00 (0.00 to 0.00)", "the first token's does not count"
    assert set(table["gated: gate"][1:]) | set(table["static: gate"]) == {f"{even}, {even}"}
    tokens[:, 4:6] = 3
    assert inside.gates({"gated": gated}, tokens)["gated: gate"][0] == f"{even}, 0.00 (0.00 to 1.00)"


@torch.no_grad()
def test_what_heads_and_gates_do_is_told_apart_by_whether_there_is_something_to_copy():
    task = Backcopy()
    config = replace(SMALL, task="backcopy", d_vocab=64, gate="head")
    gated, plain = Decoder(config), Decoder(replace(config, gate="none"))
    for layer in gated.blocks:
        layer.attn.gate.logit.weight.zero_()
    gated.embed.weight[:, 5] = -1.0
    gated.embed.weight[list(task.triggers), 5] = 1.0
    gated.blocks[0].attn.gate.logit.weight[1, 5] = 1e4  # the second head's is open on triggers alone
    table = inside.when_idle({"plain": plain, "gated": gated}, task)
    assert list(table) == ["plain: attention", "gated: attention", "gated: gate"]
    assert table["gated: gate"][0] == "0.50 (0.50), 0.00 (1.00)"
    assert set(table["gated: gate"][1:]) == {"0.50 (0.50), 0.50 (0.50)"}
    heads = backcopy_truth(plain, task)["heads"]
    assert table["plain: attention"][0] == ", ".join(f"{other:.2f} ({trigger:.2f})" for trigger, other in heads[0])
    one = Decoder(replace(config, gate="token"))
    assert ", " not in inside.when_idle({"one": one}, task)["one: gate"][0], "one gate for all heads"


class Characters:
    pad_token_id = None

    def decode(self, tokens):
        return Backcopy().decode(tokens)


def test_the_committed_records_are_of_the_variants_that_there_are():
    for tier in ("text", "task"):
        plans = {plan.label: plan for plan in families.planned(tier)}
        files = sorted((RECORDS / tier).glob("*-[0-9].json"))
        assert files
        for file in files:
            plan, found = plans[file.stem], records.read(file)
            assert found.config == plan.config
            assert found.name == plan.name
            assert found.curve["step"][-1] == found.config.steps
    assert len({r.text_sha256 for r in records.read_all(RECORDS, "text")}) == 1


def test_kept_weights_are_those_of_their_records():
    folder = RECORDS / "text"
    files = sorted(folder.glob("*-0.safetensors"))
    assert sum(file.stat().st_size for file in files) < 20 * 2**20
    for file in files:
        model, found = records.open_model(file), records.read(file.with_suffix(".json"))
        tokens = records.windows_of(folder, found.config.bos)
        logits = model(tokens)
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert model.config == found.config
        # The windows are those of the curve's last point; weights are kept in half precision.
        assert float(loss) == pytest.approx(found.curve["held_out_loss"][-1], abs=0.01)


def test_the_ledger_of_the_lab_is_shown_by_variants_and_counts_as_no_model(tmp_path):
    rows = gates(head=0.5)
    ledger = open_lab_ledger("09_trained", rows, tmp_path)
    shown = ledger.record({"TR5": evidence.tr_family(rows, "gates")}).data
    assert "**TR5**" in shown
    assert "variants: 5, in a table of their own" in shown
    assert claims.ledgers(tmp_path) == {}
    assert claims.lab_ledger(tmp_path)["sha256"] == records.digest(rows)
    text = publish.render(tmp_path).read_text()
    assert "### [TR5](../notebooks/09_trained.ipynb): A gate that reads its input" in text
    assert "**differs**. Holds where of the changes" in text
    assert "| gate per head | 3 | 2.00 | 0.5 | +0.18 (" in text
    assert "differ gate per head: sink" in text
    (tmp_path / "reasons.md").write_text("# Why\n\n## TR5\n\nWith {lab:TR5.n_agree} of {lab:TR5.n_reported}.\n")
    assert "With 4 of 6." in publish.render(tmp_path).read_text()


def test_whether_a_sink_is_of_the_place_or_of_the_token():
    other = {"sink_ratio": 0.0, "attention": 0.05, "max_first": 9.0}
    ends = {"max_first": 100.0, "sinks": [[0.6, 0.2], [0.2, 0.2]], "other_first": other}
    rows = [record(BASE, seed, 0.3, 100.0, **ends) for seed in range(2)]
    table = findings.first_token([*rows, record("no BOS", 0, 0.1, 10.0, max_first=4.0, sinks=[[0.0, 0.0], [0.0, 0.0]])])
    assert table["sink ratio"].tolist() == pytest.approx([0.3, 0.0, 0.1])
    assert table["position 0's largest entry"].tolist() == pytest.approx([100, 9, 4])
    assert table["of the sinks, in the first layer"].tolist() == ["67%", "", ""]
    assert len(findings.first_token(rows)) == 2
    assert "make ablations trains them" in findings.first_token([]).reason


def test_who_waits_is_listed_a_number_a_seed():
    ends = {"attention_trigger": 0.01, "copy_loss": 0.002}
    rows = [record(BASE, i, 0.3, 1.0, attention_other=0.9 - i / 10, **ends) for i in range(2)]
    rows.append(record("gate per head", 0, 0.3, 1.0, attention_other=0.05, **ends))
    table = findings.waiting(rows, "gates")
    assert table["nothing to copy"].to_dict() == {BASE: "90%, 80%", "gate per head": "5%"}
    assert table["triggers"].tolist()[0] == "1%, 1%"
    assert isinstance(findings.waiting([], "gates"), NotApplicable)


def waiting(**waits: tuple[float, ...]) -> list[Record]:
    """Runs of Bigram-Backcopy whose idle queries leave position 0 that much, a number a seed; _ stands for a space."""
    found = []
    for name, shares in waits.items():
        for seed, share in enumerate(shares):
            ends = {"attention_other": share, "attention_trigger": share / 10}
            found.append(record(name.replace("_", " "), seed, 0.3, 1.0, **ends))
    return found


def test_to_leave_position_0_less_is_to_do_so_in_every_seed_and_what_chance_makes_is_told():
    rows = waiting(
        base=(0.9, 0.4),
        gate_per_head=(0.1, 0.39),  # below both of the base
        gate_per_channel=(0.1, 0.41),  # one is not
        only_the_longest=(0.6, 0.3, 0.6),
        half_as_long=(0.31,),  # below the base, not below what it is set beside
        sandwich=(0.0,),  # what it is set beside is not trained
    )
    late = record("contexts from 1/2 on", 0, 0.3, 1.0, attention_other=0.0, attention_trigger=0.0)
    found = findings.wait_less([*rows, late])
    assert found["less"] == ["gate per head"]
    assert set(found["judged"]) == {"gate per head", "gate per channel", "only the longest", "half as long"}
    assert found["by_chance"] == pytest.approx(1 / 6 + 1 / 6 + 1 / 10 + 1 / 4, abs=0.01)
    assert found["as_many"] == pytest.approx(1 - 0.5, abs=0.1), "several are set beside the same runs"
    picture = plots.waiting([*rows, late])
    assert any(text.startswith("1 of 4 variants: all seeds below any they are set beside") for text in texts(picture))
    names = [label.get_text().split(" (")[0] for label in picture.axes[0].get_yticklabels()]
    for marker, measure in (("o", "attention_other"), ("|", "attention_trigger")):
        drawn = [line for line in picture.axes[0].lines if line.get_marker() == marker]
        for name, line in zip(names, drawn, strict=True):
            shares = [r.final[measure] for r in [*rows, late] if r.name == name]
            assert line.get_xdata() / 100 == pytest.approx(shares)
    open_ = [line.get_markerfacecolor() == "white" for line in picture.axes[0].lines if line.get_marker() == "o"]
    assert [name for name, is_open in zip(names, open_, strict=True) if is_open] == ["contexts from 1/2 on"]
    assert isinstance(findings.wait_less(rows[:2]), NotApplicable)
    assert "make ablations trains them" in " ".join(texts(plots.waiting([])))


def test_gates_that_read_are_set_beside_none_and_a_static_one_within_a_seed():
    rows = waiting(base=(0.9, 0.30), static_gate=(0.8, 0.9), gate_per_head=(0.1, 0.35), gate_per_token=(0.2, 0.1))
    found = findings.gates_by_seed(rows)
    # A seed's four values can be dealt in six ways, with 0, 1, 2, 2, 3, 4 pairs the other way; here they are 0 and 1.
    assert (found["pairs"], found["less"]) == (8, 7)
    assert found["by_chance"] == pytest.approx(3 / 36), "0 and 0, 0 and 1, 1 and 0"
    worse = findings.gates_by_seed(waiting(base=(0.1,), gate_per_head=(0.9,)))
    assert worse == {"pairs": 1, "less": 0, "by_chance": 1.0}
    assert isinstance(findings.gates_by_seed(rows[:2]), NotApplicable)
