"""Figures draw what they are given, say their finding in the title, and step aside where there is nothing to draw."""

import pytest
import torch

import spikesink
from spikesink import amplifier, firsttoken, plots
from spikesink.claims import NotApplicable
from spikesink.plots import style
from spikesink.weights import weights_of


@pytest.fixture(scope="module")
def parts(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    weights = weights_of(planted_model)
    reading = amplifier.read(planted_model, weights, trigger_tokens, life)
    return life, weights, reading, firsttoken.probe(weights, life)


def title(figure, axes=0):
    return figure.axes[axes].get_title(loc="left")


def test_figures_of_the_amplifier_say_what_they_show(parts, planted_model):
    life, weights, reading, _ = parts
    census = amplifier.census(weights)
    ranks = [census.rank(block, reading.channel) for block in (4, 10)]
    text = f"channel {reading.channel} of the step blocks ranks {min(ranks)} to {max(ranks)} of 384 pairs"
    assert text in title(plots.gains(census, life))
    share = float(reading.spike.shares[0])
    spectrum = plots.spectra(reading, amplifier.spectra(reading, n=5))
    assert title(spectrum) == f"One direction holds {share:.0%} of the spike channel's form in block 4"
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
    life, weights, _, probe = parts
    decode = planted_model.tokenizer.decode
    counts = torch.ones(400, dtype=torch.long)
    figure = plots.vocabulary(probe, decode, counts)
    assert title(figure) == "1 exception: “<spike>”"
    assert title(figure, 1) == "0.25% of 400 entries spike at position 0"
    elsewhere = firsttoken.not_elsewhere(planted_model, weights, probe, trigger_tokens, positions=(1, 2))
    found = firsttoken.fork_of_probe(planted_model, weights, life, probe, trigger_tokens, n=8)
    figure = plots.fork(found, elsewhere)
    assert title(figure).startswith("The same 8 tokens reach cosine")
    assert title(figure, 1) == "Later at most 100% spike"
    seen, names = firsttoken.replace_first(planted_model, weights, probe, trigger_tokens, counts, 2)
    figure = plots.instead(seen, names, probe)
    assert figure.get_suptitle().startswith("When the first token does not spike, 8 of ")
    assert [title(figure, i).split("\n")[1].split(" of ")[0] for i in range(3)] == ["4", "4", "4"]


def test_where_there_is_nothing_to_draw_the_reason_stands():
    reason = NotApplicable("this model has no gate")
    for figure in (
        plots.gates(reason),
        plots.gains(reason, None),
        plots.spectra(reason, reason),
        plots.shared_directions(reason),
        plots.alignment(reason),
        plots.fork(reason, reason),
        plots.vocabulary(reason, None, None),
        plots.instead(reason, [], reason),
    ):
        assert [text.get_text() for text in figure.axes[0].texts] == ["Nothing to draw: this model has no gate."]


@pytest.mark.parametrize(
    ("text", "shown"), [(" a\n", "␣a\\n"), ("", "∅"), ("$x", r"\$x"), ("আ", "U+0986"), ("“ö”", "“ö”")]
)
def test_tokens_can_be_read_in_any_alphabet(text, shown):
    assert style.token_text(text) == shown
