"""One long text: kept where it was measured, read where it is known, and against runs that are short."""

import json
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats
from torch.nn import functional

import spikesink
from spikesink import plots
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model import texts
from spikesink.serving import cache, diagnosis, long
from spikesink.serving.cache import Policy, Streamed
from spikesink.serving.context import Lengths, interval_of, reach
from tests import planted
from tests.test_cache import FEW
from tests.test_families import tiny

TEXT = planted.text(4, 48)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return str(path)


def test_a_long_text_is_measured_once(planted_model, source, tmp_path, monkeypatch):
    first, other = tmp_path / "first", tmp_path / "other"
    made = long.recorded(planted_model, source, first)
    assert set(made.streams) == set(long.POLICIES)
    monkeypatch.setattr(long, "measure", lambda *_: pytest.fail("it was to be read"))
    for found in (long.recorded(planted_model, source, first), long.recorded(planted_model, source, other, [first])):
        assert found.lengths.lengths == made.lengths.lengths
        assert found.lengths.sink_ratios == made.lengths.sink_ratios
        assert torch.equal(found.lengths.loss, made.lengths.loss)
        assert torch.equal(found.afresh, made.afresh)
        for name, streamed in found.streams.items():
            assert (streamed.policy, streamed.most_held) == (made.streams[name].policy, made.streams[name].most_held)
            assert torch.equal(streamed.loss, made.streams[name].loss)
    assert not other.exists(), "what is read elsewhere is not written again"


@pytest.mark.parametrize("change", ["text", "model", "damaged"])
def test_of_anything_else_it_is_measured_anew(planted_model, random_model, source, tmp_path, change, monkeypatch):
    made = long.recorded(planted_model, source, tmp_path)
    monkeypatch.setattr(long, "measure", lambda *_: replace(made, streams={}))
    model = random_model if change == "model" else planted_model
    if change == "text":
        (tmp_path / "text.txt").write_text(TEXT + " more")
    if change == "damaged":
        (tmp_path / long.FILE).write_bytes((tmp_path / long.FILE).read_bytes()[:100])
    assert long.recorded(model, source, tmp_path).streams == {}
    monkeypatch.setattr(long, "measure", lambda *_: pytest.fail("it was to be read"))
    assert long.recorded(model, source, tmp_path).streams == {}


def test_run_anew_each_prediction_knows_few_tokens(planted_model):
    tokens = texts.all_ids(planted_model, texts.Text("planted", TEXT))[None]
    found = long.run_afresh(planted_model, tokens, budget=16)
    assert found.shape == (1, tokens.shape[1] - 1)
    for start in (0, 4, 60, 100):
        end = start + 4
        logits = planted_model(tokens[:, max(0, end - 16) : end])[0, start - end :]
        wanted = functional.cross_entropy(logits, tokens[0, start + 1 : end + 1], reduction="none")
        torch.testing.assert_close(found[0, start:end], wanted, **FEW)


def test_run_anew_begins_with_bos_where_windows_do(planted_model, monkeypatch):
    tokens = texts.all_ids(planted_model, texts.Text("planted", TEXT))[None]
    without = long.run_afresh(planted_model, tokens, budget=16)
    monkeypatch.setattr(long.texts, "bos", lambda model: [7])
    found = long.run_afresh(planted_model, tokens, budget=16)
    torch.testing.assert_close(found[:, :16], without[:, :16])
    part = torch.cat([torch.tensor([[7]]), tokens[:, 49:64]], 1)
    logits = planted_model(part)[0, -4:]
    wanted = functional.cross_entropy(logits, tokens[0, 61:65], reduction="none")
    torch.testing.assert_close(found[0, 60:64], wanted, **FEW)


def test_a_text_reaches_past_a_limit_only_where_positions_do_not_run_out(planted_model, tmp_path):
    text = texts.Text("long", planted.text(12, 64))
    tokens, lengths = reach(planted_model, text)
    assert lengths == (256, 512, 640)
    assert tokens.shape == (1, 640)
    tokens, lengths = reach(planted_model, text, most=24 * 300**2 / 2)
    assert lengths == (256,), "300 tokens are hardly more"
    assert tokens.shape == (1, 256), "what is run is what is measured"
    tokens, _ = reach(planted_model, text)
    assert torch.equal(tokens[0], texts.all_ids(planted_model, text)[:640])
    learned = spikesink.load(tiny("gpt2", tmp_path))
    assert reach(learned, "house")[1] == (256, spikesink.anatomy(learned).context), "it has no positions past its limit"


def a_long(n: int, window: float, first: float, score: float = 0.5) -> long.Long:
    """Losses by hand: 2 nats with every token, so much more with others."""
    full = torch.full((1, n - 1), 2.0)
    scores, late = torch.full((2, 1, 2, 2), score), torch.full((2, 2, 2), score)
    lengths = Lengths((256, n), 4096, 0.3, scores, late, 0 * late, full, full, (None, None), 1.0)
    more = dict(zip(long.POLICIES, (window, first, first - 0.01, window + 0.1), strict=True))
    return long.Long(lengths, {name: Streamed(Policy(256), full + x, 256) for name, x in more.items()}, full + 0.1)


class Short:
    """Short windows, on which some techniques were tried."""

    with_it = (cache.WINDOW, cache.WITH_FIRST, cache.HEAVY)

    def __init__(self):
        self.plain = {diagnosis.AS_IT_IS: type("Outcome", (), {"loss": torch.zeros(2, 63)})()}

    def cost(self, name: str) -> float:
        return 1 + self.with_it.index(name)


def test_a_cache_is_judged_on_the_long_text():
    found = evidence.sv2_needs_the_sink(a_long(2048, 0.5, 0.05), Short(), 16)
    assert found.measured["perplexity_window"] == pytest.approx(math.exp(2.5))
    assert found.measured["perplexity_window_with_sink"] == pytest.approx(math.exp(2.05))
    assert found.measured["interval_window_over_full"] == pytest.approx(2 * [math.exp(0.5)])
    assert found.measured["perplexity_window_with_sink_shifted"] == pytest.approx(math.exp(2.04))
    assert found.measured["interval_with_sink_over_shifted"] == pytest.approx(2 * [math.exp(0.01)])
    assert found.control["perplexity_run_anew"] == pytest.approx(math.exp(2.1))
    assert found.control["perplexity_window_with_others"] == pytest.approx(math.exp(2.6))
    short = {"short_window": 1, "short_first_4": 2}  # as Short has them
    assert {key: found.measured[key] for key in short} == short
    assert found.control["short_heavy_hitters"] == 3
    assert not {"short_first", "short_constant"} & set(found.measured)
    assert claims.judge("SV2", found, "10").verdict == "holds"
    for window, first in ((0.3, 0.05), (0.5, 0.2)):
        differs = evidence.sv2_needs_the_sink(a_long(2048, window, first), Short(), 16)
        assert claims.judge("SV2", differs, "10").verdict == "differs"
    # Half of the pieces at 2.5 nats more, or at 0.1: the intervals reach 1.5 and 1.1.
    wide = torch.tensor([[0.0, 1.0]]).repeat_interleave(512, 1).repeat(1, 2)[:, :2047]
    for window, first, verdict in ((wide, 0.05, "n/a"), (0.5, wide / 5, "n/a"), (wide, 0.2, "differs")):
        judged = claims.judge("SV2", evidence.sv2_needs_the_sink(a_long(2048, window, first), Short(), 16), "10")
        assert judged.verdict == verdict
        assert ("leave it open" in judged.measured.get("reason", "")) == (verdict == "n/a")
    assert evidence.sv2_needs_the_sink(a_long(1000, 0.5, 0.05), Short(), 16) == NotApplicable(evidence.serving.SHORT)


def over_lengths_verdict(lengths: Lengths) -> str:
    found = evidence.sv3_over_lengths(lengths)
    return claims.judge("SV3", found, "10").verdict


def test_sinks_over_lengths_are_judged_within_the_limit():
    lengths = a_long(2048, 0, 0).lengths
    held = evidence.sv3_over_lengths(lengths)
    assert json.loads(json.dumps(held.measured))["lengths"] == [256, 2048]
    assert claims.judge("SV3", held, "10").verdict == "holds"
    assert claims.passing_controls("SV3", held.measured, held.control) == []
    assert isinstance(evidence.sv3_over_lengths(a_long(2048, 0, 0, 0.1).lengths), NotApplicable)
    past = replace(lengths, limit=1024)
    assert isinstance(evidence.sv3_over_lengths(past), NotApplicable), "within the limit it is short"


def test_sinks_that_fade_are_seen_in_the_late_queries():
    """Heads by layer; two of four are half of them, which is within a factor two, and one of four is not."""
    lengths = a_long(2048, 0, 0).lengths
    half, fewer, weaker = [[0.5, 0.1], [0.5, 0.1]], [[0.5, 0.1], [0.1, 0.1]], [[0.5, 0.35], [0.35, 0.35]]
    for late, verdict in ((half, "holds"), (fewer, "differs"), (weaker, "differs")):
        fading = replace(lengths, late=torch.stack([lengths.late[0], torch.tensor(late)]))
        assert fading.sink_ratios == [1, 1], "over all queries so far it is not seen"
        assert over_lengths_verdict(fading) == verdict


def test_a_layer_that_cannot_see_the_first_token_is_not_asked_about_it():
    lengths = a_long(2048, 0, 0).lengths
    blind = replace(lengths, late=torch.tensor([[[0.5, 0.5], [0.5, 0.5]], [[0.0, 0.0], [0.5, 0.5]]]))
    assert blind.late_ratios() == [1, 0.5]
    short_sighted = replace(blind, sight=(512, None))
    assert short_sighted.throughout == [1]
    assert short_sighted.late_ratios() == [1, 1]
    assert evidence.sv3_over_lengths(short_sighted).measured["n_layers"] == 1
    assert replace(blind, sight=(512, 2048)).throughout == [1], "all of the text is far enough"
    none = replace(blind, sight=(512, 2047))
    assert evidence.sv3_over_lengths(none) == NotApplicable(evidence.serving.SHORT_SIGHTED)
    plots.lengths(none)


def test_an_interval_is_of_pieces():
    loss = torch.cat([torch.full((1, 64), 1.0), torch.full((1, 64), 3.0)], 1)
    low, high = interval_of(torch.cat([loss, loss], 1))
    half = stats.t.ppf(0.975, 3) * math.sqrt(4 / 3) / 2  # of 1, 3, 1 and 3
    assert (low, high) == pytest.approx((math.exp(2 - half), math.exp(2 + half)))
    assert all(map(math.isnan, interval_of(loss[:, :64])))
