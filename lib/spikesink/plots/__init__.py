"""The house style, and one function per figure; each takes measured values and returns a matplotlib Figure.

The same colour means the same thing in all of them: spike (vermilion), sink (blue), ordinary (grey). Titles are the
finding, computed from the numbers that are drawn.
"""

from spikesink.plots.across import verdicts
from spikesink.plots.amplifier import alignment, gains, gates, shared_directions, spectra
from spikesink.plots.bench import growth
from spikesink.plots.collapse import collapse_of_size, collapsing, cosines, depth, implicit, learned_scale
from spikesink.plots.firsttoken import fork, instead, vocabulary
from spikesink.plots.lab import changes, decoupling, dormant, emergence, family, following_loss, growing, waiting
from spikesink.plots.lifecycle import (
    across_models,
    cancellation,
    chain,
    channels,
    cycles,
    lives,
    magnitudes,
    plateau,
    positions,
    ratios,
    skyline,
    waterfall,
)
from spikesink.plots.patching import broken_chain, causal_map, dose_response, near_and_far, patched_view, where_it_goes
from spikesink.plots.serving import costs, lengths, quantizer_steps, recalled, streaming
from spikesink.plots.sinks import (
    logits,
    places,
    queries_and_keys,
    secondary_sinks,
    sink_keys,
    sink_map,
    sinks_over_depth,
)
from spikesink.plots.style import absent, save

__all__ = [
    "absent",
    "across_models",
    "alignment",
    "broken_chain",
    "cancellation",
    "causal_map",
    "chain",
    "changes",
    "channels",
    "collapse_of_size",
    "collapsing",
    "cosines",
    "costs",
    "cycles",
    "decoupling",
    "depth",
    "dormant",
    "dose_response",
    "emergence",
    "family",
    "following_loss",
    "fork",
    "gains",
    "gates",
    "growing",
    "growth",
    "implicit",
    "instead",
    "learned_scale",
    "lengths",
    "lives",
    "logits",
    "magnitudes",
    "near_and_far",
    "patched_view",
    "places",
    "plateau",
    "positions",
    "quantizer_steps",
    "queries_and_keys",
    "ratios",
    "recalled",
    "save",
    "secondary_sinks",
    "shared_directions",
    "sink_keys",
    "sink_map",
    "sinks_over_depth",
    "skyline",
    "spectra",
    "streaming",
    "verdicts",
    "vocabulary",
    "waiting",
    "waterfall",
    "where_it_goes",
]
