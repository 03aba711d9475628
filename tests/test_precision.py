"""What survives in half precision, on the default model: which numbers stay, and how many of their digits."""

import math

import pytest
import torch

import spikesink
from spikesink import patching
from spikesink.chain import amplifier, collapse, firsttoken, sinks
from spikesink.model import paths
from spikesink.model.weights import weights_of

# Half a unit in the last place, relative (8 and 11 bits of mantissa); and what README says of the plateau's value.
PRECISION = {"bfloat16": (2**-8, 0.01), "float16": (2**-11, 0.001)}


def measure(model) -> tuple[dict, dict[str, float]]:
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
        "steps": (main.step_up, main.step_down, main.channels),
        "spike tokens": (int(main.is_spike.sum()), int(probe.spiking.sum())),
        "largest gain": amplifier.census(weights).top(1)[0][:2],
    }
    return counted, {
        "plateau value": main.value,
        "top eigenvalue": float(reading.pairs.values[0]),
        "predicted write": float(reading.rank_one[reading.is_spike].mean()),
        "value at position 0": float(probe.value.median()),
        "cosine of h~": float(collapsed.spike.cosine[main.plateau[0]]),
        "sink ratio": sinks.score(model, tokens).ratio(),
        "loss": float(outcomes["clean"].loss.mean()),
        "loss without the spike": float(outcomes["cut"].loss.mean()),
    }


@pytest.fixture(scope="module")
def exact(default_model):
    return measure(default_model)


@pytest.mark.parametrize("dtype", PRECISION)
def test_counts_stay_and_numbers_keep_the_digits_of_their_precision(dtype, exact):
    """Everything is computed from what the model makes in float32, so no more is lost than the model itself loses."""
    model, (epsilon, of_plateau) = spikesink.load(dtype=dtype), PRECISION[dtype]
    counted, measured = measure(model)
    assert counted == exact[0]
    assert measured == pytest.approx(exact[1], rel=8 * epsilon)
    assert measured["plateau value"] == pytest.approx(exact[1]["plateau value"], rel=of_plateau)
    assert math.exp(measured["loss"] - exact[1]["loss"]) == pytest.approx(1, abs=0.01)
    assert measured["sink ratio"] == pytest.approx(exact[1]["sink ratio"], abs=0.01)
    # What is about rounding itself is not asked.
    assert "float32" in paths.compare_static_map(model, spikesink.windows(model, "house", 2, 16)).reason
