"""What is said of the lab's records: of records made up so that the answer is known, and of the committed ones."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

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
from spikesink.lab.changes import Change, direction
from spikesink.lab.config import Config
from spikesink.lab.data import BOS, Backcopy
from spikesink.lab.families import BASE, FAMILIES, VARIANTS
from spikesink.lab.measures import backcopy_truth, tabulate_gates, tabulate_idle
from spikesink.lab.model import Decoder
from spikesink.lab.records import Record
from spikesink.lab.train import start
from spikesink.ledger import claims, evidence
from spikesink.ledger.claims import Evidence
from spikesink.ledger.evidence import inside
from spikesink.model.anatomy import block
from tests.test_lab import SMALL, planted_decoder

RECORDS = Path(__file__).parent.parent / "figures" / config_.LAB
ON_CURVES = 0.06  # what the loss on the windows of a curve is more than that on all
BASE_SINKS, BASE_SPIKES = (0.30, 0.32, 0.34), (100.0, 110.0, 121.0)


def texts(fig) -> list[str]:
    return [text.get_text() for text in fig.findobj(Text)]


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


def changed(record: Record, **final) -> Record:
    return replace(record, final=record.final | final)


def base() -> list[Record]:
    return [record(BASE, i, s, a) for i, (s, a) in enumerate(zip(BASE_SINKS, BASE_SPIKES, strict=True))]


def three(name: str, sink: float, spike: float, loss: float = 2.0) -> list[Record]:
    return [
        record(name, i, sink + d, spike * f, loss) for i, d, f in ((0, -0.02, 0.9), (1, 0.0, 1.0), (2, 0.02, 1 / 0.9))
    ]


def gates(head: float) -> list[Record]:
    """A family of which all is trained."""
    rows = base() + three("gate per channel", 0.02, 10.0) + three("gate per head", head, 10.0)
    return [*rows, record("gate per token", 0, 0.1, 100.0), record("static gate", 0, 0.30, 100.0)]


def change(rows: list[Record], name: str, quantity: str) -> Change:
    return findings.measure_change(findings.tabulate_runs(rows), name, quantity)


def compared(rows: list[Record], name: str):
    return next(one for one in findings.compare_variants(findings.tabulate_runs(rows)) if one.name == name)


def judged(rows: list[Record], family: str = "gates") -> Evidence | NotApplicable:
    return evidence.tr_family(findings.tabulate_runs(rows), family)


def test_a_change_has_students_interval_with_the_scatter_that_all_variants_share():
    rows = base() + three("gate per head", 0.12, 10.0) + [record("gate per token", 0, 0.2, 50.0)]
    head = change(rows, "gate per head", "sink")
    deviation = 0.02  # of both triples
    t = stats.t.ppf(0.975, 4)
    assert head.value == pytest.approx(0.12 - 0.32)
    assert head.high - head.value == pytest.approx(t * deviation * math.sqrt(2 / 3))
    assert head.value - head.low == pytest.approx(head.high - head.value)
    token = change(rows, "gate per token", "sink")
    assert token.high - token.value == pytest.approx(t * deviation * math.sqrt(1 + 1 / 3)), "one seed, a wider interval"
    assert math.exp(change(rows, "gate per head", "spike").value) == pytest.approx(10 / 110)


@pytest.mark.parametrize(
    ("low", "high", "way", "outcome"),
    [
        (0.01, 0.03, "up", "agree"),
        (-0.01, 0.30, "up", "undecided"),
        (-0.01, 0.03, "up", "differ"),  # no change beyond the band, whatever it is
        (-0.30, 0.02, "down", "undecided"),
        (-0.03, -0.01, "down", "agree"),
        (0.01, 0.03, "stays", "agree"),
        (-0.30, -0.10, "stays", "differ"),
        (-0.30, 0.10, "stays", "undecided"),
        (0.02, 0.10, "stays", "undecided"),
        (-0.05, 0.4, paper.AT_LEAST, "agree"),  # 0.40 at least, where the base has 0.46
        (-0.07, 0.4, paper.AT_LEAST, "undecided"),
        (-0.4, -0.07, paper.AT_LEAST, "differ"),
        (0.1, 0.3, None, None),
    ],
)
def test_a_change_agrees_where_its_interval_leaves_no_doubt(low, high, way, outcome):
    assert Change("sink", (low + high) / 2, low, high, way).outcome == outcome
    without = Change("sink", (low + high) / 2, low, high, way, room=False).outcome
    assert without == ("undecided" if way in ("down", "stays", paper.AT_LEAST) else outcome)


@pytest.mark.parametrize(
    ("name", "at", "outcome"),
    [
        ("gate per head", (0.1, 0.1), "agree"),
        ("gate per head", (0.4, 0.1), "undecided"),
        ("gate per head", (0.1, 0.4), "undecided"),
        ("GeLU", (0.33, 0.33), "differ"),  # it is to rise; hardly any change is no rise
        ("static gate", (0.3, 0.1), "undecided"),  # 0.02 less at 0.2 is not less
        ("static gate", (0.2, 0.1), "differ"),
    ],
)
def test_what_other_thresholds_of_a_sink_contradict_is_left_open(name, at, outcome):
    rows = [*base(), record(name, 0, 0.1, 100.0, sink_ratios=dict(zip(("0.2", "0.4"), at, strict=True)))]
    sink = change(rows, name, "sink")
    assert (sink.outcome, [one.value for one in sink.others]) == (outcome, pytest.approx([x - 0.32 for x in at]))
    none = [changed(r, sink_ratios={"0.2": r.final["sink_ratio"], "0.4": 0.0}) for r in rows]
    assert change(none, name, "sink").others[1].room is False, "where there are no sinks, nothing is contradicted"


def test_what_is_said_of_bad_training_is_asked_where_training_went_worse():
    for loss, way in ((2.0, None), (2.005, None), (2.1, "down"), (1.8, None)):
        assert change(base() + three("beta2 0.8", 0.2, 100.0, loss), "beta2 0.8", "sink").paper == way


def test_directions_are_read_off_the_papers_numbers():
    ways = {"gate per head": "down", "static gate": paper.AT_LEAST, "sandwich": "stays", "DynamicTanh": "up"}
    assert {name: direction(name, "sink") for name in ways} == ways
    ways = {"GeLU": "stays", "linear": "down", "no weight decay": "up", "QK norm": None}
    assert {name: direction(name, "spike") for name in ways} == ways
    assert direction("GeLU", "relative") is None
    assert {name for family in paper.TRAINED_VARIANTS.values() for name in family} <= families.FAMILY.keys()
    assert tuple(paper.TRAINED_VARIANTS) == FAMILIES


def test_a_variant_of_a_variant_is_compared_with_that_one():
    rows = base() + three("embeddings of 1", 0.1, 50.0) + three("sandwich", 0.1, 10.0)
    assert change(rows, "sandwich", "sink").value == pytest.approx(0)
    for quantity in ("spike", "relative"):
        assert math.exp(change(rows, "sandwich", quantity).value) == pytest.approx(10 / 50)
    assert compared(rows, "sandwich").title == "sandwich (against embeddings of 1)"
    assert findings.compare_variants(findings.tabulate_runs(base() + three("sandwich", 0.1, 10.0))) == []


def test_models_that_know_long_contexts_only_are_judged_by_late_queries():
    rows = base() + three("only the longest", 0.30, 100.0) + [record("contexts from 1/2 on", 0, 0.10, 50.0)]
    late = compared(rows, "contexts from 1/2 on")
    assert late.sink.value == pytest.approx((0.10 - 0.30) / 2)
    assert late.sink.room
    assert late.sink.others == (), "of late queries there is one threshold"
    assert (late.loss, late.sink_ratio) == pytest.approx((2.5, 0.05))
    assert late.sink_at_loss == (), "curves are of all queries"
    sinks = findings.tabulate_family(findings.tabulate_runs(rows), "context")["sink ratio"]
    assert sinks["only the longest"] == pytest.approx(0.30)
    assert sinks["only the longest, late queries"] == pytest.approx(0.15), "what it is compared with"
    more = findings.tabulate_runs([*rows, *three("contexts from 1/2 on", 0.3, 100.0)])
    assert findings.pool_scatter(more, "sink_at_0.2")[1] == 4
    few = [changed(r, late={"loss": 2.5, "sink_ratio": 0.05, "attention": 0.1}) for r in rows]
    assert not change(few, "contexts from 1/2 on", "sink").room


def test_the_base_is_seen_at_the_loss_that_a_variant_ends_with():
    for loss, ratios in ((2.4, BASE_SINKS), (2.44, np.divide(BASE_SINKS, 4)), (3.1, (0, 0, 0)), (2.0, BASE_SINKS)):
        variant = record("GeLU", 0, 0.1, 100.0, loss=loss)  # on the windows of curves it is more
        assert compared([*base(), variant], "GeLU").sink_at_loss == pytest.approx(tuple(ratios))
    late = record(BASE, 3, 0.3, 9.0, loss=3.0)
    assert compared([*base(), late, record("GeLU", 0, 0.1, 100.0, loss=2.4)], "GeLU").sink_at_loss == ()
    rows = [*base(), record("GeLU", 0, 0.1, 100.0, loss=2.5 - ON_CURVES)]
    table = findings.tabulate_family(findings.tabulate_runs(rows), "ffn")
    assert table.loc["GeLU", "at this loss"] == "0.08 (0.07 to 0.09)"
    rows = [*base(), *three("embeddings of 1", 0.2, 50.0), record("sandwich", 0, 0.1, 9.0)]
    assert compared(rows, "sandwich").sink_at_loss == pytest.approx((0.18, 0.2, 0.22))


def test_scatter_is_taken_from_variants_that_have_what_scatters():
    def pooled(more: list[Record], column: str):
        return findings.pool_scatter(findings.tabulate_runs([*base(), *more]), column)

    none = [r for v in ("gate per channel", "gate per head") for r in three(v, 0.0, 50.0)]
    assert pooled(none, "sink") == pooled([], "sink")
    assert pooled(three("gate per channel", 0.2, 50.0), "sink")[1] == 4
    assert pooled(none, "spike")[1] == 6, "but they have spikes"
    flat = [changed(r, max_elsewhere=r.final["max_first"]) for r in three("gate per head", 0.3, 9.0)]
    for column, freedom in (("spike", 2), ("relative", 2), ("sink", 4)):
        assert pooled(flat, column)[1] == freedom
    assert pooled(flat, "spike") == pooled([], "spike")


def test_a_familys_evidence_lists_what_agrees_and_what_does_not():
    result = judged(gates(head=0.5))
    agree = ["gate per channel: sink", "gate per channel: spike", "gate per head: spike", "gate per token: sink"]
    lists = [result.measured[name] for name in ("agree", "differ", "undecided")]
    assert lists == [agree, ["gate per head: sink"], ["static gate: sink"]]
    assert [result.measured[f"n_{what}"] for what in ("agree", "differ", "undecided", "reported")] == [4, 1, 1, 6]

    def counts(result: Evidence) -> list[list[int]]:
        return [[result.measured[f"sinks_{what}_at_{at}"] for at in (0.2, 0.3, 0.4)] for what in ("agree", "differ")]

    assert counts(result) == [[2, 2, 2], [1, 1, 1]], "all are alike, in these"
    other = [changed(r, sink_ratios={"0.2": 0.32, "0.4": r.final["sink_ratio"]}) for r in gates(head=0.5)]
    assert counts(judged(other)) == [[1, 2, 2], [3, 1, 1]], "by 0.2 all sinks stay"
    rows = result.measured["variants"]
    assert [row["name"] for row in rows][:3] == [BASE, "gate per channel", "gate per head"]
    assert rows[0]["sink_ratio"] == pytest.approx(0.32)
    assert claims.judge("TR5", result, "09").verdict == "differs"
    assert result.control["base_sink_ratios"] == pytest.approx(BASE_SINKS)
    assert (result.control["changes_among_base_seeds"], result.control["of"]) == (0, 6)
    said = evidence.describe_family(findings.tabulate_runs(gates(head=0.5)), "gates")
    assert "**differs**" in said
    assert "*significantly another way*: gate per head (sink)" in said


@pytest.mark.parametrize(("sinks", "verdict"), [([0.30], "n/a"), ([0.34, 0.36, 0.38], "holds")])
def test_a_claim_of_several_parts_is_judged_where_each_has_some_support(sinks, verdict):
    rows = [r for r in gates(head=0.02) if r.name != "static gate"]
    result = judged(rows + [record("static gate", seed, sink, 95.0) for seed, sink in enumerate(sinks)])
    assert (claims.judge("TR5", result, "09").verdict, result.measured["n_differ"]) == (verdict, 0)
    assert result.measured["unsupported"] == (["sinks that stay"] if verdict == "n/a" else [])
    assert ("is none of the sinks that stay" in result.measured.get("reason", "")) == (verdict == "n/a")


def test_a_family_that_fails_for_open_changes_alone_is_not_judged():
    rows = base() + three("gate per channel", 0.31, 100.0) + three("gate per head", 0.31, 100.0)
    rows += [record("gate per token", 0, 0.3, 100.0), record("static gate", 0, 0.30, 100.0)]
    rows = [changed(r, sink_ratio=0.2 * r.config.seed + 0.05, max_activation=4.0**r.config.seed) for r in rows]
    result = judged(rows)
    claim = claims.judge("TR5", result, "09")
    assert (claim.verdict, result.measured["n_differ"]) == ("n/a", 0)
    assert claim.measured["reason"].startswith(f"{result.measured['n_undecided']} of 6 changes stay open")
    assert claim.measured["variants"], "what was measured stands there all the same"


def test_a_base_whose_seeds_differ_more_than_variants_do_raises_false_alarms():
    wild = [record(BASE, i, s, 100.0) for i, s in enumerate((0.1, 0.1, 0.9))]
    names = ("gate per channel", "gate per head", "gate per token", "static gate")
    result = judged(wild + [r for name in names for r in three(name, 0.2, 9)])
    assert result.control["changes_among_base_seeds"] == 3, "of the sinks, each beside the two others"
    assert claims.judge("TR5", result, "09").measured["reason"].endswith("count as changes in 3 of 6 looks")
    alone = judged(wild + [record(name, 0, 0.1, 9.0) for name in names])
    assert "of" not in alone.control, "nothing to tell the seeds apart by"


def test_without_records_or_second_seeds_there_is_no_verdict():
    assert judged([]).reason == judged(base()).reason == findings.NO_RECORDS
    assert "has a second seed" in judged([r for r in gates(0.1) if r.config.seed == 0]).reason
    result = judged([r for r in gates(0.1) if r.name not in ("static gate", "gate per token")])
    assert claims.judge("TR5", result, "09").verdict == "n/a"
    assert "not all is trained yet: gate per token, static gate" in result.measured["reason"]
    assert result.measured["n_agree"] == 4, "what was measured stands there all the same"


def test_the_corners_hold_what_goes_alone():
    rows = base() + three("only the longest", 0.3, 100.0) + three("gate per head", 0.01, 20.0)
    rows += [record("QK norm", 0, 0.01, 100.0), record("contexts from 1/2 on", 0, 0.01, 100.0)]
    rows += [record("half the steps", 0, 0.01, 100.0, sink_ratios={"0.2": 0.2, "0.4": 0.0})]  # some, by another ε
    rows += [record("learning rate x 3", 0, 0.0, 300.0, max_elsewhere=290.0)]  # large, and no spike of position 0
    rows += [record("no weight decay", 0, 0.3, 10.0, median=0.2)]  # a small stream, and as large a spike in it
    rows += [record("weight decay x 5", 0, 0.3, 10.0), record("GeLU", 0, 0.3, 100.0), record("linear", 0, 0.02, 9.0)]
    corners = findings.find_corners(findings.tabulate_runs(rows))
    assert [entry.split(" (")[0] for entry in corners["spike_alone"]] == ["QK norm"], "the others' spikes went as well"
    assert set(corners["names"]) == {"QK norm", "weight decay x 5"}
    low, high = (math.exp(end) for end in change(rows, "weight decay x 5", "relative").interval[1:])
    assert corners["sink_alone"] == [f"weight decay x 5 (5; times 0.09, {low:.2f} to {high:.2f})"]
    assert corners["medians"] == pytest.approx(55)
    both = [record(name, 0, s, 1000 * s) for name, s in (("GeLU", 0.1), ("linear", 0.2), ("QK norm", 0.5))]
    corners = findings.find_corners(findings.tabulate_runs(base() + both))
    assert (corners["together"], corners["together_raw"]) == pytest.approx((0.8, 0.8)), "110 of 0.32 is out of line"


def test_idle_heads_are_compared_with_themselves_before_training():
    rows = [record(BASE, 0, 0.3, 1.0, attention_other=0.9, attention_trigger=0.01, copy_loss=0.0)]
    result = evidence.x_tr9_dormant(rows)
    assert claims.judge("X-TR9", result, "09").verdict == "holds"
    assert result.control["attention_other_untrained"] == [0.05]
    assert claims.passing_controls("X-TR9", result.measured, result.control) == []
    assert isinstance(evidence.x_tr9_dormant([]), NotApplicable)


@torch.inference_mode()
def test_what_is_known_of_backcopy_is_measured_as_defined():
    task = Backcopy()
    model = Decoder(SMALL)
    for layer in model.blocks:
        layer.attn.q.weight.zero_()  # even attention
    model.unembed.weight.zero_()  # even predictions
    truth = backcopy_truth(model, task)
    rows = task.windows(0, 64, 64, held_out=True)
    trigger = task.is_trigger(rows)
    even = np.broadcast_to(1 / np.arange(1, 65), rows.shape)
    assert truth["attention_trigger"] == pytest.approx(even[:, 2:][trigger[:, 2:]].mean(), rel=1e-4)
    assert truth["attention_other"] == pytest.approx(even[:, 2:][~trigger[:, 2:]].mean(), rel=1e-4)
    assert np.array(truth["heads"]).shape == (2, 2, 2)
    assert truth["copy_loss"] == pytest.approx(math.log(64), rel=1e-5)
    entropy = -(task.bigram * np.log(np.where(task.bigram > 0, task.bigram, 1))).sum(1)
    others = ~trigger[:, 1:-1]
    assert truth["excess"] == pytest.approx(math.log(64) - entropy[rows[:, 1:-1][others]].mean(), rel=1e-4)


def test_the_picture_of_changes_counts_them_and_has_the_papers_beside():
    rows = base()
    for i, v in enumerate(VARIANTS):
        sink, spike = 0.02 + 0.02 * i, 20.0 + 10 * i
        rows += three(v.name, sink, spike, 2 + 0.01 * i) if v.headline else [record(v.name, 0, sink, spike)]
    several = findings.compare_variants(findings.tabulate_runs(rows))
    outcomes = [c.outcome for one in several for c in (one.sink, one.spike) if c.outcome]
    fig = plots.changes(several)
    numbers = [len(outcomes), *(outcomes.count(what) for what in ("agree", "differ", "undecided"))]
    assert [int(word) for word in texts(fig)[-1].split() if word.isdigit()] == numbers
    theirs = [values for family in paper.TRAINED_VARIANTS.values() for values in family.values()]
    for i, base_of in enumerate((lambda x: x - paper.TRAINED_BASE[0], lambda x: math.log(x / paper.TRAINED_BASE[1]))):
        diamonds = [line.get_xdata()[0] for line in fig.axes[i].lines if line.get_marker() == "d"]
        expected = [base_of(values[i]) for values in theirs if isinstance(values[i], int | float)]
        assert diamonds == pytest.approx(expected)


def test_pictures_of_curves_show_what_they_were_given():
    growing = plots.emergence(findings.tabulate_curves({"base": base()}))
    assert growing.axes[2].lines[0].get_ydata() == pytest.approx([0.0, 2.5, 5.0, 10.0]), "over what is elsewhere"
    assert growing.axes[3].lines[1].get_ydata() == pytest.approx([0.1, 0.1, 0.12, 0.2])

    def swinging(share: float) -> list[dict[str, float | int]]:
        swings = ((0, 0.9), (5, share - 0.01), (10, share + 0.01))
        return [{"step": at, "copy_loss": 1.0, "attention_other": s, "attention_trigger": 0.0} for at, s in swings]

    runs = {"gated": [replace(start(replace(SMALL, seed=i)), curve=swinging((0.01, 0.03)[i])) for i in range(2)]}
    curves = findings.tabulate_curves(runs)
    late = findings.average_late(curves, "attention_other")
    assert late["gated"].tolist() == pytest.approx([0.01, 0.03]), "what was in the first half is past"
    assert "gated: 2% at position 0 when idle (1%, 3%)" in texts(plots.dormant(curves, late))


def test_where_nothing_was_trained_it_says_so():
    nothing = findings.tabulate_runs([])
    assert "make ablations trains them" in nothing.reason
    assert findings.tabulate_family(nothing, "gates") == nothing
    for fig in (plots.decoupling(nothing, []), plots.waiting(nothing)):
        assert nothing.reason in " ".join(texts(fig))


def test_the_chain_can_be_put_to_a_model_of_our_own():
    model, tokens = planted_decoder(), torch.from_numpy(Backcopy().windows(0, 6, 64))
    model.tokenizer = SimpleNamespace(pad_token_id=None, decode=Backcopy().decode)
    measured = inside.measure_inside(model, tokens)
    values = {key: result.measured for key, result in measured.items() if isinstance(result, Evidence)}
    assert values["LC1"]["step_up_blocks"] == [4]
    assert values["LC1"]["channels"][0] == 9
    assert values["AM3"]["rank_one_share"] > 0.99
    assert values["AM2"]["gain_rank"] == 1
    assert values["LC7"]["position0_share"] == 1
    assert values["AM5"]["median_relative_error"] < 1e-5
    assert values["NM3"]["cosine_after"] == pytest.approx(1, abs=1e-4)
    table = inside.tabulate_claims({"made by hand": measured})
    assert table.loc["LC1", "made by hand"] == f"holds (step up blocks {block(4)})"
    assert table.loc["SK3", "made by hand"] == f"n/a: {measured['SK3'].reason}"
    tokens[:, ::8] = BOS
    everywhere = inside.measure_inside(model, tokens)
    assert claims.judge("LC7", everywhere["LC7"], "09").verdict == "differs"
    assert "so it marks no spike" in everywhere["LC1"].reason
    assert isinstance(everywhere["SK1"], Evidence), "which asks for no spike"


def gated_decoder(is_open: list[int]) -> Decoder:
    """Its attention is even; the gate of the first layer's second head is open on some tokens alone, others at half."""
    model = Decoder(replace(SMALL, gate="head"))
    for layer in model.blocks:
        layer.attn.q.weight.zero_()
        layer.attn.gate.logit.weight.zero_()
    model.embed.weight[:, 5] = -1.0
    model.embed.weight[is_open, 5] = 1.0
    model.blocks[0].attn.gate.logit.weight[1, 5] = 1e4
    return model


@torch.no_grad()
def test_what_gates_let_through_is_read_head_by_head_and_by_whether_there_is_something_to_copy():
    models = {"gated": gated_decoder([3]), "static": Decoder(replace(SMALL, gate="static")), "none": Decoder(SMALL)}
    tokens = torch.full((4, 10), 40).index_fill(1, torch.tensor(0), 3)
    table, even = tabulate_gates(models, tokens), "0.50 (0.50 to 0.50)"
    assert list(table) == ["gated: attention", "gated: gate", "static: attention", "static: gate", "none: attention"]
    assert list(table["gated: attention"]) == ["0.29, 0.29"] * SMALL.n_layers  # the mean of 1, 1/2, ... 1/10
    assert table["gated: gate"][0] == f"{even}, 0.00 (0.00 to 0.00)", "the first token's does not count"
    assert set(table["gated: gate"][1:]) | set(table["static: gate"]) == {f"{even}, {even}"}
    tokens[:, 4:6] = 3
    assert tabulate_gates(models, tokens)["gated: gate"][0] == f"{even}, 0.00 (0.00 to 1.00)"
    task = Backcopy()
    table = tabulate_idle({"none": models["none"], "gated": gated_decoder(list(task.triggers))}, task)
    assert list(table["gated: gate"]) == ["0.50 (0.50), 0.00 (1.00)", "0.50 (0.50), 0.50 (0.50)"]
    heads = backcopy_truth(models["none"], task)["heads"]
    assert table["none: attention"][0] == ", ".join(f"{other:.2f} ({trigger:.2f})" for trigger, other in heads[0])


def test_the_committed_records_are_of_the_variants_that_there_are():
    """Else they would be trained once more, and nobody would know what the records are of."""
    for tier in ("text", "task"):
        plans = {plan.label: plan for plan in families.planned(tier)}
        files = sorted((RECORDS / tier).glob("*-[0-9].json"))
        assert files
        for file in files:
            plan, kept = plans[file.stem], records.read(file)
            assert (kept.config, kept.name) == (plan.config, plan.name)
            assert kept.curve["step"][-1] == kept.config.steps
    text = records.read_all(RECORDS, "text")
    assert claims.lab_ledger(RECORDS.parent)["sha256"] == records.digest(text)
    assert records.digest(text) != records.digest([replace(text[0], seconds=2.0), *text[1:]])


def test_kept_weights_are_those_of_their_records():
    folder = RECORDS / "text"
    files = sorted(folder.glob("*-0.safetensors"))
    assert sum(file.stat().st_size for file in files) < 20 * 2**20
    for file in files:
        model, kept = records.open_model(file), records.read(file.with_suffix(".json"))
        tokens = records.windows_of(folder, kept.config.bos)
        loss = torch.nn.functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        assert model.config == kept.config
        # The windows are those of the curve's last point; weights are kept in half precision.
        assert float(loss) == pytest.approx(kept.curve["held_out_loss"][-1], abs=0.01)


def test_the_ledger_of_the_lab_is_shown_by_variants_and_counts_as_no_model(tmp_path):
    rows = gates(head=0.5)
    shown = open_lab_ledger("09_trained", rows, tmp_path).record({"TR5": judged(rows)}).data
    assert "**TR5**" in shown
    assert "variants: 5, in a table of their own" in shown
    assert claims.ledgers(tmp_path) == {}
    assert claims.lab_ledger(tmp_path)["sha256"] == records.digest(rows)
    (tmp_path / "reasons.md").write_text("# Why\n\n## TR5\n\nWith {lab:TR5.n_agree} of {lab:TR5.n_reported}.\n")
    page = publish.render(tmp_path).read_text()
    for part in (
        "### [TR5](../notebooks/09_trained.ipynb)",
        "| gate per head | 3 | 2.00 | 0.5 | +0.18 (",
        "With 4 of 6",
    ):
        assert part in page


def test_whether_a_sink_is_of_the_place_or_of_the_token():
    other = {"sink_ratio": 0.0, "attention": 0.05, "max_first": 9.0}
    ends = {"max_first": 100.0, "sinks": [[0.6, 0.2], [0.2, 0.2]], "other_first": other}
    rows = [record(BASE, seed, 0.3, 100.0, **ends) for seed in range(2)]
    without = record("no BOS", 0, 0.1, 10.0, max_first=4.0, sinks=[[0.0, 0.0], [0.0, 0.0]])
    table = findings.tabulate_first_token([*rows, without])
    assert table["sink ratio"].tolist() == pytest.approx([0.3, 0.0, 0.1])
    assert table["position 0's largest entry"].tolist() == pytest.approx([100, 9, 4])
    assert table["of the sinks, in the first layer"].tolist() == ["67%", "", ""]


def waiting(**waits: tuple[float, ...]) -> list[Record]:
    """Runs of Bigram-Backcopy whose idle queries leave position 0 that much, a number a seed; _ stands for a space."""
    return [
        record(name.replace("_", " "), seed, 0.3, 1.0, attention_other=x, attention_trigger=x / 10, copy_loss=0.002)
        for name, shares in waits.items()
        for seed, x in enumerate(shares)
    ]


def test_to_leave_position_0_less_is_to_do_so_in_every_seed():
    rows = waiting(
        base=(0.9, 0.4),
        gate_per_head=(0.1, 0.39),  # below both of the base
        gate_per_channel=(0.1, 0.41),  # one is not
        only_the_longest=(0.6, 0.3, 0.6),
        half_as_long=(0.31,),  # below the base, not below what it is compared with
        sandwich=(0.0,),  # what it is compared with is not trained
    )
    late = replace(waiting(late=(0.0,))[0], name="contexts from 1/2 on", config=Config(skipped=0.5))
    waits = findings.compare_waits([*rows, late])
    variants = waits.drop_duplicates("name").set_index("name")
    assert list(variants.index[variants["less"]]) == ["gate per head"]
    judged = {"gate per head", "gate per channel", "only the longest", "half as long"}
    assert set(variants.index[variants["judged"]]) == judged
    assert variants["by_chance"].sum() == pytest.approx(1 / 6 + 1 / 6 + 1 / 10 + 1 / 4)
    axes = plots.waiting(waits).axes[0]
    names = [label.get_text().split(" (")[0] for label in axes.get_yticklabels()]
    for marker, column in (("o", "idle"), ("|", "trigger")):
        lines = [line for line in axes.lines if line.get_marker() == marker]
        for name, line in zip(names, lines, strict=True):
            assert line.get_xdata() / 100 == pytest.approx(waits[waits["name"] == name][column])
    table = findings.tabulate_waits(waits, "gates")["nothing to copy"]
    assert table.to_dict() == {BASE: "90%, 40%", "gate per channel": "10%, 41%", "gate per head": "10%, 39%"}


def test_gates_that_read_are_compared_with_none_and_a_static_one_within_a_seed():
    rows = waiting(base=(0.9, 0.30), static_gate=(0.8, 0.9), gate_per_head=(0.1, 0.35), gate_per_token=(0.2, 0.1))
    gates = findings.compare_gates(findings.compare_waits(rows))
    # A seed's four values can be dealt in six ways, with 0, 1, 2, 2, 3, 4 pairs the other way; here they are 0 and 1.
    assert (gates["pairs"], gates["less"]) == (8, 7)
    assert gates["by_chance"] == pytest.approx(3 / 36), "0 and 0, 0 and 1, 1 and 0"
    worse = findings.compare_gates(findings.compare_waits(waiting(base=(0.1,), gate_per_head=(0.9,))))
    assert worse == {"pairs": 1, "less": 0, "by_chance": 1.0}
    assert isinstance(findings.compare_gates(findings.compare_waits(rows[:2])), NotApplicable)
