"""Figures draw what they are given, say their finding in the title, and step aside where there is nothing to draw."""

import inspect
import re

import pytest
import torch

import spikesink
from spikesink import plots
from spikesink.chain import amplifier, collapse, firsttoken, keys, sinks
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.model.anatomy import mlp
from spikesink.model.weights import weights_of
from spikesink.plots import style


@pytest.fixture(scope="module")
def parts(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    weights = weights_of(planted_model)
    reading = amplifier.read_block(planted_model, trigger_tokens, life)
    return life, weights, reading, firsttoken.probe(weights, life)


def title(figure, axes=0):
    return figure.axes[axes].get_title(loc="left")


def test_figures_of_the_amplifier_say_what_they_show(parts, planted_model):
    life, weights, reading, _ = parts
    census = amplifier.census(weights)
    ranks = [census.rank(step, reading.channel) for step in (mlp(1), mlp(4))]
    text = f"channel {reading.channel} of the step blocks ranks {min(ranks)} to {max(ranks)} of 384 pairs"
    assert text in title(plots.gains(census, life))
    share = float(reading.spike.shares[0])
    spectrum = plots.spectra(reading, amplifier.find_spectra(reading, n=5))
    assert title(spectrum) == f"One direction holds {share:.0%} of the spike channel's form in L1 MLP (block 4)"
    assert "Spike tokens point along s*" in title(plots.alignment(reading))
    assert title(plots.gates(reading), 1) == "Those that write the spike: 1.00"
    assert "|cos| 1 (median), 1 at least" in title(plots.shared_directions(reading))


def test_every_spike_token_is_drawn_and_ordinary_ones_thinned(parts, monkeypatch):
    reading = parts[2]
    monkeypatch.setattr("spikesink.plots.amplifier.MOST_POINTS", 50)
    spikes, others = (collection.get_offsets() for collection in plots.alignment(reading).axes[0].collections[1::-1])
    assert len(spikes) == int(reading.is_spike.sum())
    assert 25 <= len(others) <= 50


def test_figures_of_the_first_token_say_what_they_show(parts, planted_model, trigger_tokens):
    life, *_, probe = parts
    decode = planted_model.tokenizer.decode
    counts = torch.ones(400, dtype=torch.long)
    figure = plots.vocabulary(probe, decode, counts)
    assert title(figure) == "1 exception: “<spike>”"
    assert title(figure, 1) == "0.25% of 400 entries spike at position 0"
    elsewhere = firsttoken.place_elsewhere(planted_model, trigger_tokens, probe, positions=(1, 2))
    fork = firsttoken.trace_fork(planted_model, trigger_tokens, life, probe, n=8)
    figure = plots.fork(fork, elsewhere)
    assert title(figure).startswith("The same 8 tokens reach cosine")
    assert title(figure, 1) == "Later at most 100% spike"
    replaced = firsttoken.replace_first(planted_model, trigger_tokens, probe, counts, 2)
    figure = plots.first_replaced(replaced, probe)
    assert figure.get_suptitle().startswith("When the first token does not spike, 8 of ")
    assert [title(figure, i).split("\n")[1].split(" of ")[0] for i in range(3)] == ["4", "4", "4"]


@pytest.fixture(scope="module")
def sunk(parts, planted_model, trigger_tokens):
    life, weights, *_ = parts
    collapsed = collapse.measure_collapse(planted_model, trigger_tokens, life)
    return life, collapsed, keys.read_attention(planted_model, trigger_tokens, life, collapsed, epsilon=0.05), weights


def test_figures_of_the_collapse_say_what_they_show(sunk, planted_model, trigger_tokens):
    life, collapsed, _, weights = sunk
    assert (
        title(plots.collapsing(collapsed, life)) == "Spike tokens: half-way, channel 9 holds 94.1% of |h~|²"
    )  # 16 of 17
    middle = collapsed.cycle.middle
    assert title(plots.cosines(collapsed), 1).startswith(f"After {middle}: spike tokens 1.000, others ")
    assert "a participation ratio of 1.12 in spike tokens" in title(plots.depth(collapsed, life))
    ratio = torch.logspace(-1, 1, 5) * 63**0.5
    figure = plots.collapse_of_size(collapsed, ratio, collapse.normalise_random(ratio, collapsed.anatomy))
    assert figure.get_suptitle().endswith("half-way the spike is 4 times that")  # 1000 against a side channel of -250
    replaced = collapse.replace_input(planted_model, trigger_tokens, life, collapsed)
    figure = plots.implicit(replaced)
    change = replaced.perplexity["replaced"] / replaced.perplexity["clean"] - 1
    assert title(figure) == f"Perplexity changes by {change:+.2%}" or abs(change) < 1e-4
    assert len(figure.axes[1].lines) == 3
    scale = collapse.scale_at_spike(weights, life)
    assert title(plots.learned_scale(scale, life)).endswith("the scale at the spike's channel is 1 of the median")


def test_figures_of_the_sinks_say_what_they_show(sunk, planted_model, trigger_tokens):
    life, collapsed, attention, weights = sunk
    short = sinks.score(planted_model, trigger_tokens, epsilon=0.05, length=12)
    mean = attention.scores.at.mean(0)
    figure = plots.sink_map(attention.scores, short)
    assert title(figure) == f"{int((mean > 0.05).sum())} of 24 heads sink on position 0 (dots)"
    labels = [str(line.get_label()) for line in figure.axes[1].lines]
    assert [label for label in labels if "tokens" in label] == ["48 tokens", "12 tokens"]
    profile = spikesink.profile(planted_model, trigger_tokens[1])
    assert len(plots.places(profile, most=20).axes[1].get_xticklabels()) == 20
    depth = evidence.sk5_over_depth(attention, life)
    during, before = (depth.measured[name] for name in ("attention_during", "attention_before"))
    expected = f"{during:.0%} of attention on the plateau, {before:.0%} before"
    assert expected in title(plots.sinks_over_depth(depth, attention, life, profile))
    rebuilt = keys.rebuild_keys(weights, life, collapsed)
    figure = plots.sink_keys(attention.geometry, rebuilt, life)
    assert title(figure, 1).startswith(f"{len(rebuilt.channels)} of 64 rows: cosine ")
    assert title(plots.sink_keys(attention.geometry, NotApplicable("none"), life), 1) == ""
    figure = plots.logits(attention.geometry, attention, life)
    assert len(figure.axes[0].collections[0].get_offsets()) == 12  # heads of the plateau's three layers
    clouds = keys.project_heads(planted_model, trigger_tokens, life, attention, [(3, 0), (3, 1)], most=60)
    figure = plots.queries_and_keys(clouds)
    sizes = [len(collection.get_offsets()) for collection in figure.axes[0].collections]
    assert sizes == [60, 60, 6, 6]  # keys, queries, and the spike tokens' of both
    figure = plots.secondary_sinks(attention.secondary, life, planted_model.tokenizer.decode)
    assert title(figure).startswith(f"{attention.secondary.n} secondary sinks (")


NOT_OF_EVERY_MODEL = """
    alignment broken_chain causal_map changes collapse_of_size collapsing cosines costs decoupling depth dose_response
    first_replaced fork gains gates implicit learned_scale lengths logits near_and_far quantizer_steps
    queries_and_keys recalled secondary_sinks shared_directions sink_keys sinks_over_depth spectra vocabulary waiting
    where_it_goes
"""


@pytest.mark.parametrize("name", re.findall(r"\w+", NOT_OF_EVERY_MODEL))
def test_where_there_is_nothing_to_draw_the_reason_stands(name):
    draw, reason = getattr(plots, name), NotApplicable("this model has no gate")
    required = [p for p in inspect.signature(draw).parameters.values() if p.default is p.empty]
    figure = draw(*[reason] * len(required))
    assert [text.get_text() for text in figure.axes[0].texts] == ["Nothing to draw: this model has no gate."]


@pytest.mark.parametrize(
    ("text", "shown"), [(" a\n", "␣a\\n"), ("", "∅"), ("$x", r"\$x"), ("আ", "U+0986"), ("“ö”", "“ö”")]
)
def test_tokens_can_be_read_in_any_alphabet(text, shown):
    assert style.token_text(text) == shown
