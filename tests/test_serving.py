"""Cells on a model whose spike is known, diagnoses of costs made by hand, and SV1."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from spikesink import find_lifecycle, patching, trace_windows
from spikesink.chain.lifecycle import find_spikes
from spikesink.common import NotApplicable
from spikesink.lab import data
from spikesink.lab.data import BOS, Backcopy
from spikesink.lab.model import Decoder
from spikesink.ledger import claims
from spikesink.ledger.evidence import sv1_sets_the_scale
from spikesink.patching import Outcome, cuts
from spikesink.patching.means import spike_means
from spikesink.serving import cache, cells, quantize
from spikesink.serving.cells import NEITHER, NO_SINK, NO_SPIKE, SINK_EXEMPT, SINK_HELD, UNCHANGED, Crossed, cross
from spikesink.serving.diagnosis import (
    NEITHER_HELPS,
    NO_FAILURE,
    NOT_SIGNIFICANT,
    NOT_TESTED,
    OUTLIERS,
    PARTLY,
    ROUTING,
    UNCLEAR,
    Diagnosis,
    Share,
    diagnose,
    ratio_interval,
    share_left,
)
from spikesink.serving.quantize import APART, OTHERS_APART, PER_TENSOR, PER_TOKEN, Quantizer, measure_ranges
from tests.test_lab import SMALL, planted_decoder
from tests.test_quantize import planted  # noqa: F401 (a fixture)


@pytest.fixture(scope="module")
def means(planted):  # noqa: F811
    model, _, life, _ = planted
    return spike_means(model, data.held_out(Backcopy(), 8, 32)[4:], life)


def test_a_cell_has_what_it_says(planted, means):  # noqa: F811
    model, tokens, _, where = planted
    versions = cells.make_cells(means, where)
    assert tuple(versions.cuts) == cells.CELLS
    techniques = quantize.rounding_techniques(model, measure_ranges(model, tokens, where), where)
    crossed = cross(model, tokens, versions, {name: techniques[name] for name in (PER_TENSOR, APART, "int4 KV cache")})
    clean, plain = patching.evaluate(model, tokens), crossed.plain
    assert plain[UNCHANGED].perplexity == pytest.approx(clean.perplexity)
    for cell, spikes in ((SINK_HELD, True), (NO_SINK, True), (NO_SPIKE, False), (NEITHER, False)):
        of_clean = plain[cell].max_activation / clean.max_activation
        assert of_clean == pytest.approx(1) if spikes else of_clean < 0.2
    assert plain[NO_SINK].score[:, 2:].max() == pytest.approx(1 / 32), "of layers that read the plateau: its own"
    # The spike is written by block 4: what the layers after it read is held, with the spike and without.
    hold = cuts.sink_held(means, where, 2)
    held = patching.evaluate(model, tokens, *hold)
    assert plain[SINK_HELD].perplexity == pytest.approx(held.perplexity)
    torch.testing.assert_close(plain[SINK_HELD].loss[~where[:, :-1]], plain[NO_SPIKE].loss[~where[:, :-1]])
    int8 = quantize.round_activations(model, Quantizer())
    alone, both = patching.evaluate(model, tokens, *int8), patching.evaluate(model, tokens, *hold, *int8)
    assert crossed.cost(PER_TENSOR) == pytest.approx(alone.perplexity / clean.perplexity)
    assert crossed.cost(PER_TENSOR, SINK_HELD) == pytest.approx(both.perplexity / held.perplexity)
    assert crossed.costs().loc[PER_TENSOR, NO_SINK] == crossed.cost(PER_TENSOR, NO_SINK)
    assert list(crossed.with_it[APART]) == [UNCHANGED]
    int4 = quantize.round_activations(model, Quantizer(4, "token"), quantize.CACHED, positions=~where)
    exempt = patching.evaluate(model, tokens, *int4)
    assert crossed.cost("int4 KV cache", SINK_EXEMPT) == pytest.approx(exempt.perplexity / clean.perplexity)
    weighed = quantize.cross_weights(model, tokens, versions, crossed, {"int4": (4, "tensor")})
    with quantize.rounded_weights(model, 4, "tensor"):
        expected = patching.evaluate(model, tokens, *versions.cuts[NO_SPIKE])
    assert weighed.with_it["int4"][NO_SPIKE].perplexity == pytest.approx(expected.perplexity)
    assert weighed.with_it[PER_TENSOR] is crossed.with_it[PER_TENSOR]


@pytest.mark.parametrize("cell", [NO_SPIKE, NEITHER])
def test_without_the_spike_nothing_makes_it(planted, means, cell):  # noqa: F811
    """The step-up block's hidden activation is as large as ever if only what it writes is removed."""
    model, tokens, _, where = planted
    with patching.patched(model, *cells.make_cells(means, where).cuts[cell]):
        assert float(measure_ranges(model, tokens, where)["FFN hidden"].spike[1]) == 0
    with patching.patched(model, *cuts.decoupled(means, where)):
        hidden = measure_ranges(model, tokens, where)["FFN hidden"]
    assert float(hidden.spike[1]) > 10 * float(hidden.other[1])


def test_without_a_spike_techniques_are_tried_in_the_unchanged_model():
    model, tokens = Decoder(SMALL).eval(), data.held_out(Backcopy(), 4, 32)
    life, none = find_lifecycle(trace_windows(model, tokens)), torch.zeros_like(tokens, dtype=torch.bool)
    means = spike_means(model, tokens, life)
    assert isinstance(means, NotApplicable)
    versions = cells.make_cells(means, none)
    techniques = quantize.rounding_techniques(model, measure_ranges(model, tokens, none), none)
    crossed = cross(model, tokens, versions, techniques, none)
    crossed = quantize.cross_weights(model, tokens, versions, crossed, {"weights": (2, "tensor")})
    assert crossed.reason == means.reason == sv1_sets_the_scale(crossed).reason
    assert not {APART, OTHERS_APART} & set(crossed.with_it), "no channels are the spike's"
    assert {cell for row in (crossed.plain, *crossed.with_it.values()) for cell in row} == {UNCHANGED}
    evicted = cross(model, tokens, versions, cache.eviction_techniques(model, 16, none), none)
    assert set(evicted.with_it[cache.WINDOW]) == {UNCHANGED, SINK_EXEMPT}, "a sink can be kept where no spike makes it"


def test_what_spike_tokens_predict_does_not_count():
    """Where their prediction is held, no technique could harm it, and the cost would seem to go with the spike."""
    loss = torch.full((2, 3), 2.0)
    worse = loss + torch.tensor([[9.0, 0.1, 0.3], [0.2, 9.0, 0.2]])
    crossed = Crossed(
        {UNCHANGED: outcome_of(loss)},
        {"one": {UNCHANGED: outcome_of(worse)}, "none": {UNCHANGED: outcome_of(loss)}},
        counted=torch.tensor([[False, True, True], [True, False, True]]),
    )
    assert crossed.nats("one") == pytest.approx([0.2, 0.2])
    assert crossed.cost("one") == pytest.approx(math.exp(0.2))
    assert crossed.interval("one") == crossed.times("one", "none") == pytest.approx((math.exp(0.2),) * 2, rel=1e-5)


def outcome(*losses: float) -> Outcome:
    """One loss a window."""
    return outcome_of(torch.tensor(losses)[:, None].repeat(1, 3))


def outcome_of(loss: torch.Tensor) -> Outcome:
    """These losses, and nothing else that would matter."""
    zero, by_layer, sizes = torch.zeros_like(loss), torch.zeros(1, 4), torch.zeros(len(loss), loss.shape[1] + 1)
    return Outcome("", 0.3, loss, zero, zero > 0, zero[:, :1, None], by_layer, by_layer, sizes)


NEARLY = (2.5, 2.6, 2.5, 2.6)  # losses, of 2 without the technique


@pytest.mark.parametrize(
    ("with_it", "held", "without_spike", "exempt", "verdict"),
    [
        ((2.01, 2.01), 2.0, 2.0, None, NO_FAILURE),
        ((2.0, 2.0), 2.0, 2.1, None, NO_FAILURE),  # of no cost at all there is no share
        ((2.0, 2.6), 2.6, 2.3, None, NOT_SIGNIFICANT),  # on one window it costs nothing: the interval reaches 1
        (NEARLY, 2.55, 2.55, None, NEITHER_HELPS),  # the spike can do nothing here, and holding the sink does nothing
        (NEARLY, 2.3, 2.3, None, PARTLY + ROUTING),
        (NEARLY, 2.05, 2.05, None, ROUTING),  # it goes with the sink held; that the spike goes too adds nothing
        (NEARLY, None, None, 2.05, ROUTING),
        (NEARLY, 2.55, 2.0, None, OUTLIERS),
        (NEARLY, 2.55, 2.0, 2.05, f"{OUTLIERS} or {ROUTING}"),
        (NEARLY, 2.55, 2.1, None, PARTLY + OUTLIERS),  # 18% is left, and perhaps 30%
        (NEARLY, 2.3, 2.1, None, f"{PARTLY}{OUTLIERS} and {ROUTING}"),
        (NEARLY, 2.9, 2.52, None, UNCLEAR),  # holding the sink does harm, which removing the spike undoes: whose is it?
        (NEARLY, None, None, None, NOT_TESTED),
    ],
)
def test_whose_failure_it_is(with_it, held, without_spike, exempt, verdict):
    n, worse = len(with_it), 1.0  # a model that is worse by itself makes nothing dearer: each cell has its own baseline
    plain = {UNCHANGED: outcome(*[2.0] * n)} | dict.fromkeys((SINK_HELD, NO_SPIKE), outcome(*[2.0 + worse] * n))
    losses = {SINK_HELD: held and held + worse, NO_SPIKE: without_spike and without_spike + worse, SINK_EXEMPT: exempt}
    row = {cell: outcome(*[loss] * n) for cell, loss in losses.items() if loss} | {UNCHANGED: outcome(*with_it)}
    diagnosis = diagnose(Crossed(plain, {"it": row}))["it"]
    assert diagnosis.verdict == verdict
    assert diagnosis.cost == pytest.approx(math.exp(sum(with_it) / n - 2))


def test_a_share_has_the_interval_beyond_which_the_parts_cannot_be_it():
    """At its ends Student's test of part - share * whole, paired by window, is just what the level asks for."""
    drawn = np.random.default_rng(0)
    whole = 1 + 0.2 * drawn.normal(size=9)
    part = 0.5 * whole + 0.1 * drawn.normal(size=9)
    low, high = ratio_interval(part, whole)
    for end in (low, high):
        assert stats.ttest_1samp(part - end * whole, 0).pvalue == pytest.approx(0.05)
    assert low < part.mean() / whole.mean() < high
    assert ratio_interval(part[:1], whole[:1]) is None
    assert ratio_interval(part, whole - whole.mean()) is None, "a whole of nothing has no shares"
    assert ratio_interval(0.25 * whole, whole) == pytest.approx((0.25, 0.25))
    least, most = 0.07 * whole + np.tile([0.3, -0.3], 5)[:9], 0.14 * whole
    assert share_left(least, most, whole).interval == ratio_interval(least, whole), "it covers the narrower one"


@pytest.mark.parametrize("harm", [0.0, 1.0])
def test_shares_have_the_intervals_of_their_parts(harm):
    """Where holding the sink does harm, the share of the spike covers both readings of it."""
    plain = dict.fromkeys((UNCHANGED, SINK_HELD, NO_SPIKE), outcome(2.0, 2.0, 2.0))
    cost, held, without = np.array([0.9, 1.0, 1.1]), np.array([0.8, 0.9, 1.2]) + harm, np.array([0.1, 0.3, 0.5]) + harm
    rows = {UNCHANGED: cost, SINK_HELD: held, NO_SPIKE: without}
    row = {cell: outcome(*(2 + nats)) for cell, nats in rows.items()}
    both = {"held": row, "exempt": row | {SINK_EXEMPT: outcome(2.2, 2.1, 2.0)}}
    diagnoses = diagnose(Crossed(plain, both))
    from_held, given = ratio_interval(cost - held + without, cost), diagnoses["held"].without_spike
    assert given.interval[0] == pytest.approx(from_held[0], rel=1e-4)
    assert given.interval[1] == pytest.approx((ratio_interval(without, cost) if harm else from_held)[1], rel=1e-4)
    assert given.value == pytest.approx(without.mean() if harm else 1 - (held - without).mean(), rel=1e-4)
    assert diagnoses["held"].with_sink.interval == pytest.approx(ratio_interval(held, cost), rel=1e-4)
    exempt = ratio_interval(np.array([0.2, 0.1, 0.0]), cost)
    assert diagnoses["exempt"].with_sink.interval == pytest.approx(exempt, rel=1e-4)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (None, UNCLEAR),
        ((0.05, 0.2), ROUTING),
        ((0.05, 0.8), PARTLY + ROUTING),
        ((0.05, 0.99), UNCLEAR),
        ((0.85, 1.3), UNCLEAR),  # of the spike nothing is known
    ],
)
def test_nothing_is_said_that_does_not_hold_at_both_ends_of_an_interval(interval, verdict):
    with_sink, cost = Share(0.1, interval), (2.0, (1.5, 2.5))
    assert Diagnosis(*cost, with_sink=with_sink).verdict == verdict
    suffices = Share(0.0, (-0.1, 0.1))
    expected = f"{OUTLIERS} or {ROUTING}" if verdict == ROUTING else OUTLIERS
    assert Diagnosis(*cost, suffices, with_sink).verdict == expected


@pytest.fixture(scope="module")
@torch.inference_mode()
def spoken():
    """A model whose second FFN says what comes next, where BOS's spike is written too; and text of its own."""
    model = planted_decoder()
    model.blocks[3].mlp.gate.weight[0] = 0  # no other FFN has a large hidden activation,
    model.embed.weight[1:, 5] = 0  # and no other token anything in the channel that it reads
    for layer in (0, 1):
        model.blocks[layer].attn.o.weight[5] = 0
        model.blocks[layer].mlp.out.weight[5] = 0
    model.blocks[1].mlp.out.weight[:, 1:] *= 3000
    model.unembed.weight *= 20
    tokens, drawn = torch.full((16, 32), BOS), torch.Generator().manual_seed(0)
    for at in range(1, tokens.shape[1]):
        p = model(tokens[:, :at])[:, -1].softmax(-1)
        tokens[:, at] = p[:, 1:].multinomial(1, generator=drawn)[:, 0] + 1  # anything but BOS
    return model, tokens, find_lifecycle(trace_windows(model, tokens))


def test_what_a_spike_breaks_shows_where_tokens_share_a_step(spoken):
    model, tokens, life = spoken
    held_out, judged = tokens[:8], tokens[8:]
    means, where = spike_means(model, held_out, life), find_spikes(model, judged, life)
    ranges = measure_ranges(model, held_out, find_spikes(model, held_out, life))
    techniques = quantize.rounding_techniques(model, ranges, where)
    crossed = cross(model, judged, cells.make_cells(means, where), techniques, where)
    diagnoses = diagnose(crossed)
    assert diagnoses[PER_TENSOR].verdict == OUTLIERS
    assert crossed.cost(PER_TENSOR) > 10
    assert crossed.cost(OTHERS_APART) > 10 > 2 > crossed.cost(APART)
    as_held = {name: diagnoses[name].as_held for name in (PER_TENSOR, PER_TOKEN)}
    assert as_held == {PER_TENSOR: False, PER_TOKEN: True}, "no step is shared over tokens"
    evidence = sv1_sets_the_scale(crossed)
    assert claims.judge("SV1", evidence, "10").verdict == "holds"
    per_tensor, apart, others = (crossed.with_it[name][UNCHANGED] for name in (PER_TENSOR, APART, OTHERS_APART))
    assert evidence.measured["perplexity_int8_spike_split"] == pytest.approx(crossed.perplexity(apart))
    assert evidence.control["perplexity_int8_others_split"] == pytest.approx(crossed.perplexity(others))
    not_spike = ~where[:, :-1]
    nats = ((per_tensor.loss - apart.loss) * not_spike).sum(1) / not_spike.sum(1)
    low, high = evidence.measured["interval_per_tensor_over_split"]
    assert low < float(nats.mean().exp()) < high
    no_spike = crossed.perplexity(crossed.with_it[PER_TENSOR][NO_SPIKE])
    assert evidence.control["perplexity_int8_per_tensor_no_spike"] == pytest.approx(no_spike)


@pytest.mark.parametrize(
    ("per_tensor", "split", "verdict", "reason"),
    [
        (NEARLY, (2.01, 2.02, 2.01, 2.02), "holds", ""),
        (NEARLY, NEARLY, "differs", ""),
        (NEARLY, (2.5, 2.3, 2.5, 2.6), "n/a", "leaves it open"),
        ((2.0, 2.1, 2.0, 2.1), (2.0, 2.1, 2.0, 2.1), "n/a", "nothing significant (0.96 to 1.15 times)"),
        ((2.5,), (2.0,), "n/a", "one window"),
    ],
)
def test_a_scale_is_judged_where_there_is_a_cost_and_an_interval_tells(per_tensor, split, verdict, reason):
    losses = dict.fromkeys((OTHERS_APART, PER_TOKEN), per_tensor) | {PER_TENSOR: per_tensor, APART: split}
    with_it = {name: dict.fromkeys((UNCHANGED, NO_SPIKE), outcome(*loss)) for name, loss in losses.items()}
    plain = dict.fromkeys((UNCHANGED, NO_SPIKE), outcome(*[2.0] * len(split)))
    claim = claims.judge("SV1", sv1_sets_the_scale(Crossed(plain, with_it)), "10")
    assert claim.verdict == verdict
    assert reason in claim.measured.get("reason", "")
