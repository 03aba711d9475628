"""What survives in half precision, on the default model: which numbers stay, and how many of their digits."""

import math

import pytest
import torch

import spikesink
from spikesink import patching
from spikesink.chain import amplifier, collapse, firsttoken, sinks
from spikesink.model import paths
from spikesink.model.weights import weights_of

# Half a unit in the last place, relative: 8 and 11 bits of mantissa.
EPSILON = {"bfloat16": 2**-8, "float16": 2**-11}
PLATEAU = {"bfloat16": 0.01, "float16": 0.001}


def measured(model) -> tuple[dict, dict[str, float]]:
    """What is counted, and what is measured, link by link."""
    tokens, weights = spikesink.windows(model, "house", 2, 64), weights_of(model)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    main = life.main
    reading = amplifier.read_block(model, tokens, life)
    probe = firsttoken.probe(weights, life, torch.arange(0, weights.anatomy.d_vocab, 512))
    collapsed = collapse.measure_collapse(model, tokens, life)
    cut = patching.zero(patching.stream(patching.block(main.plateau[0])), 0, main.channels)
    outcomes = patching.compare(model, tokens, {"cut": cut})
    counted = {
        "step-up": main.step_up,
        "step-down": main.step_down,
        "channels": main.channels,
        "spike tokens": int(main.is_spike.sum()),
        "spiking entries": int(probe.spiking.sum()),
        "largest gain": amplifier.census(weights).top(1)[0][:2],
    }
    found = {
        "plateau value": main.value,
        "top eigenvalue": float(reading.pairs.values[0]),
        "predicted write": float(reading.rank_one[reading.is_spike].mean()),
        "value at position 0": float(probe.value.median()),
        "cosine of h~": float(collapsed.spike.cosine[main.plateau[0]]),
        "sink ratio": sinks.score(model, tokens).ratio(),
        "loss": float(outcomes["clean"].loss.mean()),
        "loss without the spike": float(outcomes["cut"].loss.mean()),
    }
    return counted, found


@pytest.fixture(scope="module")
def exact(default_model):
    return measured(default_model)


@pytest.mark.parametrize("dtype", EPSILON)
def test_counts_stay_and_numbers_keep_the_digits_of_their_precision(dtype, exact):
    """Everything is computed from what the model makes in float32, so no more is lost than the model itself loses."""
    counted, found = measured(spikesink.load(dtype=dtype))
    assert counted == exact[0]
    for name, value in found.items():
        assert value == pytest.approx(exact[1][name], rel=8 * EPSILON[dtype]), name
    # As README says it.
    assert found["plateau value"] == pytest.approx(exact[1]["plateau value"], rel=PLATEAU[dtype])
    assert math.exp(found["loss"] - exact[1]["loss"]) == pytest.approx(1, abs=0.01)
    assert found["sink ratio"] == pytest.approx(exact[1]["sink ratio"], abs=0.01)


@pytest.mark.parametrize("dtype", EPSILON)
def test_what_is_about_rounding_itself_is_not_asked_in_half_precision(dtype):
    model = spikesink.load(dtype=dtype)
    found = paths.compare_static_map(model, spikesink.windows(model, "house", 2, 16))
    assert "float32" in found.reason
