"""Long contexts: what is measured in one pass by length against runs of that length; needles against their words."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import spikesink
from spikesink import patching
from spikesink.model import anatomy
from spikesink.serving.context import OTHER, lengthen, needles
from tests.test_cache import FEW


@pytest.mark.parametrize("chunk", [7, 48])
def test_every_length_is_as_a_run_of_that_length(served, chunk):
    model, tokens = served
    found = lengthen(model, tokens, (9, 20, 48), chunk=chunk)
    for i, length in enumerate(found.lengths):
        wanted = patching.evaluate(model, tokens[:, :length])
        torch.testing.assert_close(found.score[i], wanted.score, **FEW)
        assert found.sink_ratios[i] == pytest.approx(wanted.sink_ratio)
    torch.testing.assert_close(found.loss, wanted.loss, **FEW)
    torch.testing.assert_close(found.largest, wanted.largest, **FEW)
    assert found.first == pytest.approx(float(wanted.largest[:, 0].median()), rel=1e-4)
    assert found.elsewhere == pytest.approx(
        [float(wanted.largest[:, a:b].max()) for a, b in ((1, 9), (9, 20), (20, 48))], rel=1e-4
    )
    largest_first = replace(found, largest=found.largest.index_fill(1, torch.tensor(0), 1e6))
    assert largest_first.elsewhere == found.elsewhere
    losses = [wanted.loss[:, a:b].mean() for a, b in ((0, 9), (9, 20), (20, 47))]
    assert found.perplexities == pytest.approx([float(loss.exp()) for loss in losses], rel=1e-4)
    _, cache = model.run_with_cache(tokens)
    sight = anatomy.anatomy(model).sight
    for layer, name in enumerate(anatomy.anatomy(model).pattern_hooks):
        last = min(20, sight[layer] or 20)
        if last > 9:
            for place, of in ((0, found.late), (OTHER, found.other)):
                torch.testing.assert_close(of[1, layer], cache[name][:, :, 9:last, place].mean((0, 2)), **FEW)
        else:
            assert (found.late[1, layer] == 0).all()
            assert layer not in found.throughout


def test_intervals_hold_the_perplexity_and_are_none_of_one_piece(served):
    model, tokens = served
    found = lengthen(model, torch.cat([tokens] * 4, dim=1), (40, 190))
    (low, high), (low_2, high_2) = found.intervals()
    assert low <= found.perplexities[0] <= high
    assert low_2 < found.perplexities[1] < high_2
    alone = lengthen(model, tokens[:1], (40,)).intervals()[0]
    assert all(end != end for end in alone)


def test_lengths_that_cannot_be_measured_are_refused(served):
    model, tokens = served
    for wrong in ((), (9, 9), (20, 9), (1, 9), (9, 49)):
        with pytest.raises(ValueError, match="lengths must rise"):
            lengthen(model, tokens, wrong)


def test_needles_are_told_once_and_asked_for_in_the_end(served):
    model, _ = served
    filler = spikesink.windows(model, "house", 1, 200)[0]
    found = needles(model, filler, 120, n=2, depths=(0.1, 0.9))
    assert found.tokens.shape == (8, 120)
    texts = [model.tokenizer.decode(row) for row in found.tokens]
    for i, text in enumerate(texts):
        where = found.answer[i]
        place = model.tokenizer.decode(found.tokens[i, where.start + 1 : where.stop + 1]).strip()
        assert text.endswith(place)
        assert where.stop == 119
        assert text.count(f"in the {place}") == (2 if found.told[i] else 1)
        told = text.rindex("is in the ", 0, text.index("So, once more"))
        assert (told < len(text) / 2) == (found.depth[i] == 0.1)
    for told, not_told in zip(texts[::2], texts[1::2], strict=True):
        assert told != not_told
        assert told.split("\n")[-1] == not_told.split("\n")[-1]


def test_recall_is_what_telling_gains():
    told, answer = (True, False) * 2, (slice(0, 2), slice(0, 2), slice(1, 3), slice(1, 3))
    loss = torch.tensor([[1.0, 3, 9], [5, 5, 9], [9, 0, 0], [9, 2, 4]])
    found = spikesink.serving.context.Needles(torch.zeros(4, 4), answer, (0.1, 0.1, 0.9, 0.9), told)
    assert found.recalled(SimpleNamespace(loss=loss)) == {0.1: 3.0, 0.9: 3.0}


def test_a_text_too_short_for_needles_is_said(served):
    model, tokens = served
    for length in (20, 400):
        with pytest.raises(ValueError, match="another length or a longer text"):
            needles(model, tokens[0], length)
