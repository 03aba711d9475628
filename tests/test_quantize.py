"""Quantizers against loops; ranges and what is rounded, on a model with a known spike."""

import pytest
import torch

import spikesink
from spikesink import patching
from spikesink.chain.lifecycle import find_spikes
from spikesink.lab import data
from spikesink.lab.data import Backcopy
from spikesink.lab.model import Decoder
from spikesink.serving import quantize
from spikesink.serving.quantize import (
    Quantizer,
    measure_ranges,
    not_rounded,
    round_activations,
    rounded_weights,
)
from tests.test_families import tiny
from tests.test_lab import SMALL, planted_decoder


@pytest.fixture(scope="module")
def planted():
    """A model in which block 4 alone writes a spike; windows of it, and their spike tokens."""
    model = planted_decoder()
    with torch.no_grad():
        model.blocks[3].mlp.out.weight[:, 0] = 0
    tokens = data.held_out(Backcopy(), 4, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    return model, tokens, life, find_spikes(model, tokens, life)


def round_by_loops(x: torch.Tensor, bits: int, per: str, split: tuple[int, ...] = ()) -> torch.Tensor:
    """Rounding a window, a token or a channel at a time."""
    most, out = 2 ** (bits - 1) - 1, x.clone()
    kept = [c for c in range(x.shape[-1]) if c not in split]
    groups = {
        "tensor": [(w, range(x.shape[1]), kept) for w in range(len(x))],
        "token": [(w, [p], kept) for w in range(len(x)) for p in range(x.shape[1])],
        "channel": [(w, range(x.shape[1]), [c]) for w in range(len(x)) for c in kept],
    }[per]
    for window, positions, channels in groups:
        entries = [(window, p, c) for p in positions for c in channels]
        step = max(abs(float(x[entry])) for entry in entries) / most
        for entry in entries:
            out[entry] = round(float(x[entry]) / step) * step
    return out


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("per", ["tensor", "token", "channel"])
@pytest.mark.parametrize("split", [(), (1, 4)])
def test_a_quantizer_is_its_formula(bits, per, split):
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 7
    before, quantizer = x.clone(), Quantizer(bits, per, split)
    torch.testing.assert_close(quantizer(x), round_by_loops(x, bits, per, split))
    assert torch.equal(x, before)
    assert torch.equal(quantizer(0 * x), 0 * x)
    assert (quantizer(x) - x).abs().max() <= quantizer.step(x).max() / 2 * (1 + 1e-9)


def test_keys_are_rounded_a_head_at_a_time():
    x = torch.tensor([[[[1.0, 0.55], [100.0, 30.0]]]])  # window, position, head, channel
    by_head = Quantizer(4, "token", by_head=True)(x)
    torch.testing.assert_close(by_head, torch.tensor([[[[1.0, 4 / 7], [100.0, 200 / 7]]]]))
    as_one_vector = Quantizer(4, "token")(x)  # as what a matrix multiplies
    torch.testing.assert_close(as_one_vector, torch.tensor([[[[0.0, 0.0], [100.0, 200 / 7]]]]))


def test_ranges_show_where_the_spike_is(planted):
    model, tokens, _, where = planted
    ranges = measure_ranges(model, tokens, where)
    assert list(ranges) == list(quantize.SITES)
    assert ranges["stream"].outliers[2] == (9,)
    hidden = ranges["FFN hidden"]
    assert 1 in hidden.set_by_spike
    assert hidden.outliers[1] == (0,)
    _, cache = model.run_with_cache(tokens)
    activation = cache["blocks.1.mlp.out.hook_in"]
    spike, other = activation.abs()[where], activation.abs()[~where]
    assert float(hidden.spike[1]) == pytest.approx(float(spike.max()))
    assert float(hidden.other[1]) == pytest.approx(float(other.max()))
    assert float(hidden.median[1]) == pytest.approx(float(other.median()))
    assert float(hidden.step()[1]) == pytest.approx(float(spike.max()) / 127)
    assert float(hidden.zeroed[1]) == pytest.approx(float((Quantizer()(activation)[~where] == 0).float().mean()))
    assert list(map(len, hidden.others)) == list(map(len, hidden.outliers))
    assert hidden.others[1] == (int(other.amax(0)[1:].argmax()) + 1,), "the strongest of the other channels"


def test_what_a_model_does_not_show_is_named_and_not_rounded(planted, tmp_path):
    """A router gives each expert some of the tokens, so inside the FFN no tensor holds a window's tokens."""
    assert not_rounded(planted[0]) == {}
    routed = spikesink.load(tiny("mixtral", tmp_path))
    assert list(not_rounded(routed)) == ["FFN input", "FFN hidden", "weights"]
    assert not [cut for cut in round_activations(routed, Quantizer()) if ".mlp." in str(cut.site)]


def test_what_is_rounded_is_what_was_asked_for(planted):
    model, tokens, _, where = planted
    split = {"FFN hidden": [(), (0,), (), ()]}
    cuts = round_activations(model, Quantizer(), ["FFN hidden", "keys"], split)
    assert [(cut.change.function.split, cut.change.function.by_head) for cut in cuts] == [
        *(((), False), ((0,), False), ((), False), ((), False)),
        *[((), True)] * 4,
    ]
    with pytest.raises(ValueError, match="per='token'"):
        round_activations(model, Quantizer(), ["keys"], positions=where)
    values = []
    for cuts in ((), round_activations(model, Quantizer(4, "token"), ["values"], positions=~where)):
        with patching.patched(model, *cuts):
            values.append(model.run_with_cache(tokens)[1]["blocks.0.attn.v.hook_out"])
    clean, rounded = values
    assert torch.equal(rounded[where], clean[where])
    torch.testing.assert_close(rounded[~where], Quantizer(4, "token", by_head=True)(clean)[~where])


def test_weights_are_rounded_while_the_context_lasts():
    model = Decoder(SMALL)
    weight = model.blocks[0].mlp.out.weight
    before, norm = weight.clone(), model.blocks[0].ln1.weight.clone()
    with rounded_weights(model, 8, "channel"):
        torch.testing.assert_close(model.blocks[0].mlp.out.weight, round_by_loops(before[None], 8, "token")[0])
        assert torch.equal(model.blocks[0].ln1.weight, norm)
    with rounded_weights(model, 4, "tensor"):
        torch.testing.assert_close(model.blocks[0].mlp.out.weight, round_by_loops(before[None], 4, "tensor")[0])
    with pytest.raises(IndexError), rounded_weights(model):
        model(torch.tensor([[SMALL.d_vocab]]))
    assert torch.equal(model.blocks[0].mlp.out.weight, before)
