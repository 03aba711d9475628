"""Figures hold what they are given, and step aside where there is nothing to draw. All are drawn by the notebooks."""

import inspect
import re

import pytest

import spikesink
from spikesink import plots
from spikesink.chain import amplifier, firsttoken, keys, sinks
from spikesink.common import NotApplicable
from spikesink.model.weights import weights_of
from spikesink.plots import style


def title(figure, axes=0):
    return figure.axes[axes].get_title(loc="left")


def test_every_spike_token_is_drawn_and_ordinary_ones_thinned(planted_model, trigger_tokens, monkeypatch):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    reading = amplifier.read_block(planted_model, trigger_tokens, life)
    monkeypatch.setattr("spikesink.plots.amplifier.MOST_POINTS", 50)
    spikes, others = (collection.get_offsets() for collection in plots.alignment(reading).axes[0].collections[1::-1])
    assert len(spikes) == int(reading.is_spike.sum())
    assert 25 <= len(others) <= 50


def test_the_numbers_of_a_title_are_those_of_the_measure(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    probe = firsttoken.probe(weights_of(planted_model), life)
    figure = plots.vocabulary(probe, planted_model.tokenizer.decode, probe.tokens.new_ones(400))
    assert title(figure) == "1 exception: “<spike>”"
    assert title(figure, 1) == "0.25% of 400 entries spike at position 0"


def test_what_is_drawn_of_sinks_is_what_was_measured(sunk, sinking_model, trigger_tokens):
    life, _, attention = sunk
    short = sinks.score(sinking_model, trigger_tokens, length=12)
    figure = plots.sink_map(attention.scores, short)
    n_sinks = int((attention.scores.at.mean(0) > attention.scores.epsilon).sum())
    assert title(figure) == f"{n_sinks} of 24 heads sink on position 0 (dots)"
    labels = [str(line.get_label()) for line in figure.axes[1].lines]
    assert [label for label in labels if "tokens" in label] == ["48 tokens", "12 tokens"]
    figure = plots.logits(attention.geometry, attention, life)
    assert len(figure.axes[0].collections[0].get_offsets()) == 12  # heads of the plateau's three layers
    clouds = keys.project_heads(sinking_model, trigger_tokens, life, attention, [(3, 0), (3, 1)], most=60)
    sizes = [len(collection.get_offsets()) for collection in plots.queries_and_keys(clouds).axes[0].collections]
    assert sizes == [60, 60, 6, 6]  # keys, queries, and the spike tokens' of both


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
