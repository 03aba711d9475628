"""Serving: quantizers against plain formulas, and cells on a model whose spike is known."""

import math

import pytest
import torch

import spikesink
from spikesink import find_lifecycle, patching, trace_windows
from spikesink.claims import NotApplicable
from spikesink.lab import data
from spikesink.lab.data import Backcopy
from spikesink.lab.model import Decoder
from spikesink.lifecycle import find_spikes
from spikesink.patching import Outcome, chain
from spikesink.serving import quantize
from spikesink.serving.cells import (
    AS_IT_IS,
    CELLS,
    NEITHER,
    NO_SINK,
    NO_SPIKE,
    SPARED,
    Crossed,
    cells,
    cross,
    sink_held,
)
from spikesink.serving.diagnosis import FINE, MISMATCH, OUTLIERS, ROUTING, UNKNOWN, diagnose, diagnoses
from spikesink.serving.quantize import (
    Quantizer,
    by_torch,
    hooks_of,
    not_rounded,
    ranges,
    rounded,
    rounded_weights,
    shown,
)
from tests.test_families import tiny
from tests.test_lab import SMALL, planted_decoder


@pytest.fixture(scope="module")
def planted():
    model = planted_decoder()
    with torch.no_grad():
        model.blocks[3].mlp.out.weight[:, 0] = 0  # nothing else than block 4 writes a spike
    tokens = data.held_out(Backcopy(), 4, 32)
    life = find_lifecycle(trace_windows(model, tokens))
    return model, tokens, life, find_spikes(model, life, tokens)


def plain(x: torch.Tensor, bits: int, per: str, split: tuple[int, ...] = ()) -> torch.Tensor:
    """A window, a token or a channel at a time, by loops."""
    most, out = 2 ** (bits - 1) - 1, x.clone()
    keep = [c for c in range(x.shape[-1]) if c not in split]
    groups = {
        "tensor": [(w, range(x.shape[1]), keep) for w in range(len(x))],
        "token": [(w, [p], keep) for w in range(len(x)) for p in range(x.shape[1])],
        "channel": [(w, range(x.shape[1]), [c]) for w in range(len(x)) for c in keep],
    }[per]
    for window, positions, channels in groups:
        entries = [(window, p, c) for p in positions for c in channels]
        step = max(abs(float(x[entry])) for entry in entries) / most
        for entry in entries:
            out[entry] = round(float(x[entry]) / step) * step
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per", quantize.PER)
@pytest.mark.parametrize("split", [(), (1, 4)])
def test_a_quantizer_is_its_formula(bits, per, split):
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7
    before = x.clone()
    found = Quantizer(bits, per, split)(x)
    torch.testing.assert_close(found, plain(x, bits, per, split))
    assert torch.equal(x, before)
    assert (found - x).abs().max() <= Quantizer(bits, per, split).step(x).max() / 2 * (1 + 1e-9)


def test_keys_are_rounded_a_head_at_a_time():
    x = torch.tensor([[[[1.0, 0.55], [100.0, 30.0]]]])  # window, position, head, channel
    found = Quantizer(4, "token", by_head=True)(x)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([1.0, 4 / 7]))
    torch.testing.assert_close(found[0, 0, 1], torch.tensor([100.0, 200 / 7]))
    together = Quantizer(4, "token")(x)  # as what a matrix is multiplied by
    torch.testing.assert_close(together, torch.tensor([[[[0.0, 0.0], [100.0, 200 / 7]]]]))
    assert torch.equal(Quantizer(4, "token", split=(2,))(x)[..., 1, :1], x[..., 1, :1]), (
        "channels of all heads in a row"
    )


def test_zero_stays_zero_and_what_is_no_quantizer_is_refused():
    assert torch.equal(Quantizer()(torch.zeros(1, 2, 3)), torch.zeros(1, 2, 3))
    for wrong, says in (({"per": "row"}, "give one of tensor, token, channel"), ({"bits": 1}, "give 2 to 16")):
        with pytest.raises(ValueError, match=says):
            Quantizer(**wrong)


@torch.inference_mode()
def test_ranges_show_where_the_spike_is(planted):
    model, tokens, _, where = planted
    found = ranges(model, where, tokens)
    assert list(found) == list(quantize.SITES)
    hidden = found["FFN's hidden"]
    assert 1 in hidden.touched
    assert hidden.outliers[1] == (0,)
    assert found["stream"].outliers[2] == (9,)
    _, cache = model.run_with_cache(tokens)
    seen = cache["blocks.1.mlp.out.hook_in"].abs()
    assert float(hidden.spike[1]) == pytest.approx(float(seen[where].max()))
    assert float(hidden.other[1]) == pytest.approx(float(seen[~where].max()))
    assert float(hidden.step()[1]) == pytest.approx(float(seen.max()) / 127)
    assert float(hidden.zeroed[1]) > 0.99, "hardly anything is left of the others"
    others = hidden.others()
    assert [len(one) for one in others.outliers] == [len(one) for one in hidden.outliers]
    assert 0 not in others.outliers[1]


def test_what_a_model_does_not_show_is_named_and_left_as_it_is(planted, tmp_path):
    """A router gives each expert some of the tokens, so that inside the FFN there is no tensor of a window's tokens."""
    assert not_rounded(planted[0]) == []
    routed = spikesink.load(tiny("mixtral", tmp_path))
    assert not_rounded(routed) == ["FFN's input", "FFN's hidden"]
    assert not [cut for cut in rounded(routed, Quantizer(8)) if ".mlp." in str(cut.site)]


def test_what_is_rounded_is_what_was_asked_for(planted):
    model, tokens, _, where = planted
    assert [len(names) for names in hooks_of(model, "attention's input")] == [3] * 4
    cuts = rounded(model, Quantizer(8), ["FFN's hidden"])
    assert [str(cut.site) for cut in cuts] == [f"hook blocks.{i}.mlp.out.hook_in" for i in range(4)]
    assert str(cuts[0]) == "apply int8 per tensor to hook blocks.0.mlp.out.hook_in at all positions"
    apart = rounded(model, Quantizer(8), ["FFN's hidden"], apart=ranges(model, where, tokens))
    assert [cut.change.function.split for cut in apart][1] == (0,)
    with pytest.raises(ValueError, match="give per='token' to round some only"):
        rounded(model, Quantizer(8), ["keys"], positions=where)
    with pytest.raises(ValueError, match="there is no site 'queries'"):
        hooks_of(model, "queries")
    assert shown(model, ["queries", "keys"]) == ["keys"]
    seen = {}

    def keep(name):
        return lambda value, hook: seen.setdefault(name, value.clone())

    only = rounded(model, Quantizer(4, "token"), ["values"], positions=~where)
    with patching.patched(model, *only), model.hooks(fwd_hooks=[("blocks.0.attn.v.hook_out", keep("rounded"))]):
        model(tokens)
    with model.hooks(fwd_hooks=[("blocks.0.attn.v.hook_out", keep("clean"))]):
        model(tokens)
    assert torch.equal(seen["rounded"][where], seen["clean"][where])
    torch.testing.assert_close(seen["rounded"][~where], Quantizer(4, "token", by_head=True)(seen["clean"])[~where])


@torch.inference_mode()
def test_weights_are_rounded_while_the_context_lasts():
    model = Decoder(SMALL)
    weight = model.blocks[0].mlp.out.weight
    before, norm = weight.clone(), model.blocks[0].ln1.weight.clone()
    with rounded_weights(model, 8, "channel"):
        torch.testing.assert_close(model.blocks[0].mlp.out.weight, plain(before[None], 8, "token")[0])
        assert torch.equal(model.blocks[0].ln1.weight, norm)
    assert torch.equal(model.blocks[0].mlp.out.weight, before)
    with rounded_weights(model, 4, "tensor"):
        torch.testing.assert_close(model.blocks[0].mlp.out.weight, plain(before[None], 4, "tensor")[0])
    with pytest.raises(IndexError), rounded_weights(model):
        model(torch.tensor([[SMALL.d_vocab]]))
    assert torch.equal(model.blocks[0].mlp.out.weight, before)


def test_a_cell_has_what_it_says(planted):
    model, tokens, life, where = planted
    known = chain.constants(model, life, data.held_out(Backcopy(), 8, 32)[4:])
    of = cells(known, where)
    assert tuple(of) == CELLS
    techniques = quantize.activations(model, ranges(model, where, tokens), known, where)
    assert len({str([cut.change.function for cut in one.cuts]) for one in techniques.values()}) == len(techniques)
    found = cross(model, tokens, of, {"int8": techniques[quantize.PER_TENSOR], "apart": techniques[quantize.APART]})
    clean = patching.evaluate(model, tokens)
    assert found.plain[AS_IT_IS].perplexity == pytest.approx(clean.perplexity)
    assert found.plain[NO_SPIKE].max_activation < clean.max_activation / 5
    assert found.plain[NEITHER].max_activation < clean.max_activation / 5
    assert found.plain[NO_SINK].max_activation == pytest.approx(clean.max_activation)
    assert found.plain[NO_SINK].score[:, 2:].max() == pytest.approx(1 / 32), "of layers that read the plateau: its own"
    alone = patching.evaluate(model, tokens, *rounded(model, Quantizer(8)))
    assert found.cost("int8") == pytest.approx(alone.perplexity / clean.perplexity)
    assert found.table().loc["int8", AS_IT_IS] == pytest.approx(alone.perplexity)
    assert found.costs().loc["int8", NO_SINK] == found.cost("int8", NO_SINK)
    held = patching.evaluate(model, tokens, *rounded(model, Quantizer(8)), *sink_held(known, where))
    assert found.with_it["int8"][SPARED].perplexity == pytest.approx(held.perplexity)
    assert found.cost("int8", SPARED) == pytest.approx(held.perplexity / clean.perplexity)
    assert list(found.with_it["apart"]) == [AS_IT_IS]
    weighed = quantize.weights(model, tokens, of, found, {"int4": (4, "tensor")})
    with rounded_weights(model, 4, "tensor"):
        wanted = patching.evaluate(model, tokens, *of[NO_SPIKE])
    assert weighed.with_it["int4"][NO_SPIKE].perplexity == pytest.approx(wanted.perplexity)
    assert weighed.with_it["int8"] is found.with_it["int8"]


@torch.inference_mode()
def test_without_the_spike_nothing_makes_it(planted):
    """The step-up block's hidden activation is as large as ever if only what it writes is taken away."""
    model, tokens, life, where = planted
    known = chain.constants(model, life, data.held_out(Backcopy(), 8, 32)[4:])
    with patching.patched(model, *cells(known, where)[NO_SPIKE]):
        found = ranges(model, where, tokens)["FFN's hidden"]
    assert float(found.spike[1]) == 0
    with patching.patched(model, *chain.decoupled(known, where)):
        assert float(ranges(model, where, tokens)["FFN's hidden"].spike[1]) > 10 * float(found.other[1])


def outcome(*losses: float):
    """One loss a window."""
    loss = torch.tensor(losses)[:, None].repeat(1, 3)
    names = ("what", "epsilon", "divergence", "agrees", "score", "attention", "sinks", "largest")
    return Outcome(loss=loss, **dict.fromkeys(names))


@pytest.mark.parametrize(
    ("with_it", "without_spike", "with_sink", "verdict"),
    [
        ((2.01, 2.01), 2.0, 2.0, FINE),
        ((2.0, 2.6), 2.3, 2.3, FINE),  # on one window it costs nothing: the interval reaches 1
        ((2.5, 2.6), 2.1, 2.5, OUTLIERS),
        ((2.5, 2.6), 2.5, 2.1, ROUTING),
        ((2.5, 2.6), 2.1, 2.1, f"{OUTLIERS} or {ROUTING}"),
        ((2.5, 2.6), 2.3, 2.5, f"in part {OUTLIERS}"),
        ((2.5, 2.6), 2.3, 2.4, f"in part {OUTLIERS} and {ROUTING}"),
        ((2.5, 2.6), 2.54, 2.6, MISMATCH),
        ((2.5, 2.6), None, 2.1, ROUTING),
        ((2.5, 2.6), None, None, UNKNOWN),
    ],
)
def test_whose_failure_it_is(with_it, without_spike, with_sink, verdict):
    row = {AS_IT_IS: outcome(*with_it), NO_SPIKE: without_spike, SPARED: with_sink}
    row = {cell: outcome(of, of) if isinstance(of, float) else of for cell, of in row.items() if of is not None}
    crossed = Crossed({AS_IT_IS: outcome(2.0, 2.0), NO_SPIKE: outcome(2.0, 2.0)}, {"it": row})
    found = diagnose(crossed)["it"]
    assert found.verdict == verdict
    assert found.cost == pytest.approx(math.exp(sum(with_it) / 2 - 2))
    assert diagnoses({"it": found}).loc["it", "diagnosis"] == verdict


def test_without_a_spike_there_are_no_cells():
    model, tokens = Decoder(SMALL).eval(), data.held_out(Backcopy(), 4, 32)
    life = find_lifecycle(trace_windows(model, tokens))
    known = chain.constants(model, life, tokens)
    for found in (cells(known, tokens > 0), cross(model, tokens, cells(known, tokens > 0), {}), diagnose(known)):
        assert isinstance(found, NotApplicable)
    assert sink_held(known) == ()


def test_integers_give_what_rounded_floats_give(random_model):
    """By torch's own kernels; what differs is how a range is cut into steps."""
    tokens = spikesink.windows(random_model, "house", 2, 24)
    clean = patching.evaluate(random_model, tokens)
    with rounded_weights(random_model, 8, "tensor"):
        ours = patching.evaluate(random_model, tokens, *rounded(random_model, Quantizer(8)))
    for per in ("tensor", "channel"):
        theirs = by_torch(random_model, tokens, per)
        assert theirs.shape == clean.loss.shape
        far, near = (theirs - clean.loss).abs().max(), (theirs - ours.loss).abs().max()
        assert 0 < far < 0.1
        assert near < 0.1
    assert torch.equal(patching.evaluate(random_model, tokens).loss, clean.loss), "the model itself is not rounded"
