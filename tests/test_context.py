"""Long contexts: one pass against runs of each length; the record of a long run; needles; SV2 and SV3."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch.nn import functional

import spikesink
from spikesink import patching, plots
from spikesink.common import NotApplicable
from spikesink.ledger import claims
from spikesink.ledger.evidence import serving as evidence
from spikesink.model import texts
from spikesink.serving import cache, cells, context
from spikesink.serving.context import (
    OTHER,
    RECOMPUTED,
    Lengths,
    LongRun,
    choose_lengths,
    load_or_measure,
    make_needles,
    measure_lengths,
    perplexity_interval,
)
from tests import planted
from tests.test_cache import FEW
from tests.test_families import tiny
from tests.test_serving import outcome_of

TEXT = planted.text(4, 48)


@pytest.mark.parametrize("chunk", [7, 48])
def test_every_length_is_as_a_run_of_that_length(served, chunk):
    model, tokens = served
    lengths = measure_lengths(model, tokens, (9, 20, 48), chunk=chunk)
    for i, length in enumerate(lengths.lengths):
        expected = patching.evaluate(model, tokens[:, :length])
        torch.testing.assert_close(lengths.score[i], expected.score, **FEW)
        assert lengths.sink_ratios[i] == pytest.approx(expected.sink_ratio)
    torch.testing.assert_close(lengths.loss, expected.loss, **FEW)
    torch.testing.assert_close(lengths.largest, expected.largest, **FEW)
    assert lengths.first == pytest.approx(float(expected.largest[:, 0].median()), rel=1e-4)
    stretches = ((0, 9), (9, 20), (20, 48))
    elsewhere = [float(expected.largest[:, max(a, 1) : b].max()) for a, b in stretches]
    assert replace(lengths, largest=lengths.largest.index_fill(1, torch.tensor(0), 1e6)).elsewhere == lengths.elsewhere
    assert lengths.elsewhere == pytest.approx(elsewhere, rel=1e-4)
    losses = [float(expected.loss[:, a:b].mean().exp()) for a, b in stretches]
    assert lengths.perplexities == pytest.approx(losses, rel=1e-4)
    _, activations = model.run_with_cache(tokens)
    for layer, name in enumerate(model.anatomy.pattern_hooks):
        last = min(20, model.anatomy.sight[layer] or 20)
        if last > 9:
            for place, measured in ((0, lengths.late), (OTHER, lengths.other)):
                expected = activations[name][:, :, 9:last, place].mean((0, 2))
                torch.testing.assert_close(measured[1, layer], expected, **FEW)
        else:
            assert (lengths.late[1, layer] == 0).all()
            assert layer not in lengths.full_sight


@pytest.mark.parametrize("wrong", [(), (20, 9), (1, 9), (9, 49)])
def test_lengths_that_cannot_be_measured_are_refused(served, wrong):
    with pytest.raises(ValueError, match="must rise"):
        measure_lengths(*served, wrong)


def test_an_interval_is_over_pieces_and_none_of_one_piece():
    loss = torch.cat([torch.full((1, 64), 1.0), torch.full((1, 64), 3.0)], 1)
    half = stats.t.ppf(0.975, 3) * math.sqrt(4 / 3) / 2  # of 1, 3, 1 and 3
    expected = (math.exp(2 - half), math.exp(2 + half))
    assert perplexity_interval(torch.cat([loss, loss], 1)) == pytest.approx(expected)
    assert all(map(math.isnan, perplexity_interval(loss[:, :64])))


@pytest.mark.parametrize("change", ["nothing", "folder", "text", "model", "damaged"])
def test_a_long_text_is_measured_once_for_each_model_and_text(
    planted_model, random_model, tmp_path, change, monkeypatch
):
    source, kept, empty = tmp_path / "text.txt", tmp_path / "kept", tmp_path / "empty"
    source.write_text(TEXT)
    made = load_or_measure(planted_model, str(source), kept)
    assert list(made.streams) == [*context.POLICIES, RECOMPUTED]
    monkeypatch.setattr(context, "measure_long", lambda *_: replace(made, streams={}))
    if change == "text":
        source.write_text(TEXT + " more")
    if change == "damaged":
        (kept / context.FILE).write_bytes((kept / context.FILE).read_bytes()[:100])
    model = random_model if change == "model" else planted_model
    again = load_or_measure(model, str(source), *((empty, [kept]) if change == "folder" else (kept,)))
    if change not in ("nothing", "folder"):
        assert again.streams == {}
        return
    assert not empty.exists(), "what is read elsewhere is not written again"
    torch.testing.assert_close(vars(again.lengths), vars(made.lengths), rtol=0, atol=0)
    torch.testing.assert_close(again.streams, made.streams, rtol=0, atol=0)


@pytest.mark.parametrize("bos", [[], [7]])
def test_recomputed_each_prediction_knows_few_tokens(planted_model, bos, monkeypatch):
    monkeypatch.setattr(context.texts, "bos", lambda model: bos)
    tokens = texts.all_ids(planted_model, texts.Text("planted", TEXT))[None]
    losses = context.run_recomputed(planted_model, tokens, budget=16)
    assert losses.shape == (1, tokens.shape[1] - 1)
    for start in (0, 4, 60, 100):
        end = start + 4
        part = tokens[:, max(0, end - 16) : end]
        if end > 16:
            part[:, : len(bos)] = torch.tensor(bos)
        expected = functional.cross_entropy(
            planted_model(part)[0, -4:], tokens[0, start + 1 : end + 1], reduction="none"
        )
        torch.testing.assert_close(losses[0, start:end], expected, **FEW)


def test_a_text_reaches_past_a_limit_only_where_positions_do_not_run_out(planted_model, tmp_path):
    text = texts.Text("long", planted.text(12, 64))
    tokens, lengths = choose_lengths(planted_model, text)
    assert lengths == (256, 512, 640)
    assert torch.equal(tokens[0], texts.all_ids(planted_model, text)[:640])
    tokens, lengths = choose_lengths(planted_model, text, most=24 * 300**2 / 2)
    assert lengths == (256,), "300 tokens are hardly more"
    assert tokens.shape == (1, 256), "what is run is what is measured"
    learned = spikesink.load(tiny("gpt2", tmp_path))
    assert choose_lengths(learned)[1] == (256, learned.anatomy.context), "it has no positions past its limit"


def test_needles_are_told_once_and_asked_for_in_the_end(served):
    model, _ = served
    filler = spikesink.windows(model, "house", 1, 200)[0]
    needles = make_needles(model, filler, 120, n=2, depths=(0.1, 0.9))
    assert needles.tokens.shape == (8, 120)
    prompts = [model.tokenizer.decode(row) for row in needles.tokens]
    for i, prompt in enumerate(prompts):
        answer = needles.answer[i]
        place = model.tokenizer.decode(needles.tokens[i, answer.start + 1 : answer.stop + 1]).strip()
        assert prompt.endswith(place)
        assert prompt.count(f"in the {place}") == (2 if needles.told[i] else 1)
        at = prompt.rindex("is in the ", 0, prompt.index("So, once more"))
        assert (at < len(prompt) / 2) == (needles.depth[i] == 0.1)
    for told, control in zip(prompts[::2], prompts[1::2], strict=True):
        assert told != control
        assert told.split("\n")[-1] == control.split("\n")[-1]
    for length in (20, 400):
        with pytest.raises(NotApplicable, match="a longer text"):
            make_needles(model, filler, length)


def test_recall_is_what_telling_gains():
    told, answer = (True, False) * 2, (slice(0, 2), slice(0, 2), slice(1, 3), slice(1, 3))
    loss = torch.tensor([[1.0, 3, 9], [5, 5, 9], [9, 0, 0], [9, 2, 4]])
    needles = context.Needles(torch.zeros(4, 4, dtype=torch.long), answer, (0.1, 0.1, 0.9, 0.9), told)
    assert needles.gain_by_depth(outcome_of(loss)) == {0.1: 3.0, 0.9: 3.0}


def make_run(n: int, window: float = 0, first: float = 0, score: float = 0.5) -> LongRun:
    """2 nats with the full cache, so much more with others."""
    full, late = torch.full((1, n - 1), 2.0), torch.full((2, 2, 2), score)
    lengths = Lengths(
        (256, n), 4096, 0.3, late[:, None], late, 0 * late, full, torch.full((1, n), 2.0), (None, None), 1.0
    )
    more = dict(zip((*context.POLICIES, RECOMPUTED), (window, first, first - 0.01, window + 0.1, 0.1), strict=True))
    return LongRun(lengths, {name: full + x for name, x in more.items()})


@pytest.fixture
def short():
    """Short windows, on which two caches were tried."""
    plain, worse = (outcome_of(torch.full((2, 63), loss)) for loss in (1.0, 1.0 + math.log(3)))
    with_it = {cache.WINDOW: {cells.UNCHANGED: plain}, cache.HEAVY: {cells.UNCHANGED: worse}}
    return cells.Crossed({cells.UNCHANGED: plain}, with_it)


def test_a_cache_is_measured_on_the_long_text(short):
    result = evidence.sv2_needs_the_sink(make_run(2048, 0.5, 0.05), short, 16)
    assert result.measured == {
        "perplexity_full": pytest.approx(math.exp(2)),
        "perplexity_window": pytest.approx(math.exp(2.5)),
        "perplexity_window_with_sink": pytest.approx(math.exp(2.05)),
        "interval_window_over_full": pytest.approx(2 * [math.exp(0.5)]),
        "interval_with_sink_over_full": pytest.approx(2 * [math.exp(0.05)]),
        "perplexity_window_with_sink_shifted": pytest.approx(math.exp(2.04)),
        "interval_with_sink_over_shifted": pytest.approx(2 * [math.exp(0.01)]),
        "n_tokens": 2048,
        "n_keys": 256,
        "short_window": pytest.approx(1),
        "short_n_tokens": 64,
        "short_n_keys": 16,
    }
    assert result.control == {
        "perplexity_window_with_others": pytest.approx(math.exp(2.6)),
        "interval_with_others_over_full": pytest.approx(2 * [math.exp(0.6)]),
        "perplexity_run_anew": pytest.approx(math.exp(2.1)),
        "short_heavy_hitters": pytest.approx(3),
    }
    too_short = evidence.sv2_needs_the_sink(make_run(1000, 0.5, 0.05), short, 16)
    assert too_short == NotApplicable(evidence.SHORT)


# Half of the pieces at 1 nat more, or at 0.2: the intervals reach the limits of 1.5 and 1.1 times.
WIDE = torch.tensor([[0.0, 1.0]]).repeat_interleave(512, 1).repeat(1, 2)[:, :2047]


@pytest.mark.parametrize(
    ("window", "first", "verdict"),
    [
        (0.5, 0.05, "holds"),
        (0.3, 0.05, "differs"),
        (0.5, 0.2, "differs"),
        (WIDE, 0.05, "n/a"),
        (0.5, WIDE / 5, "n/a"),
        (WIDE, 0.2, "differs"),
    ],
)
def test_a_cache_is_judged_at_both_ends_of_its_intervals(short, window, first, verdict):
    result = evidence.sv2_needs_the_sink(make_run(2048, window, first), short, 16)
    assert claims.judge("SV2", result, "10").verdict == verdict
    assert ("leave it open" in result.measured.get("reason", "")) == (verdict == "n/a")


@pytest.mark.parametrize(
    ("late", "verdict"),
    [
        ([[0.5, 0.5], [0.5, 0.5]], "holds"),
        ([[0.5, 0.1], [0.5, 0.1]], "holds"),  # half of the heads is within a factor of two
        ([[0.5, 0.35], [0.35, 0.35]], "differs"),  # at epsilon = 0.4
    ],
)
def test_sinks_that_fade_show_in_the_late_queries(late, verdict):
    lengths = make_run(2048).lengths
    fading = replace(lengths, late=torch.stack([lengths.late[0], torch.tensor(late)]))
    assert fading.sink_ratios == [1, 1], "over all queries so far it does not show"
    result = evidence.sv3_over_lengths(fading)
    assert claims.judge("SV3", result, "10").verdict == verdict
    assert claims.passing_controls("SV3", result.measured, result.control) == []


def test_sinks_are_judged_where_there_are_some_within_the_limit():
    assert isinstance(evidence.sv3_over_lengths(make_run(2048, score=0.1).lengths), NotApplicable)
    beyond = evidence.sv3_over_lengths(replace(make_run(2048).lengths, limit=1024))
    assert beyond == NotApplicable(evidence.SHORT), "within the limit it is short"


def test_a_layer_that_cannot_see_the_first_token_is_not_asked_about_it():
    blind = replace(make_run(2048).lengths, late=torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.0], [0.5, 0.5]]]))
    assert blind.late_ratios() == [1, 0.5]
    one = replace(blind, sight=(512, 2048))
    assert one.full_sight == [1]
    assert one.late_ratios() == [1, 1]
    assert evidence.sv3_over_lengths(one).measured["n_layers"] == 1
    none = replace(blind, sight=(512, 2047))
    assert evidence.sv3_over_lengths(none) == NotApplicable(evidence.SHORT_SIGHTED)
    plots.lengths(none)
