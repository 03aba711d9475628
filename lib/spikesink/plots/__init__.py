"""The house style, and one function per figure; each takes measured values and returns a matplotlib Figure.

The same colour means the same thing in all of them: spike (vermilion), sink (blue), ordinary (grey). Titles are the
finding, computed from the numbers that are drawn.
"""

from spikesink.plots.amplifier import alignment, gains, gates, shared_directions, spectra
from spikesink.plots.collapse import collapse_of_size, collapsing, cosines, depth, implicit, learned_scale
from spikesink.plots.firsttoken import fork, instead, vocabulary
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
    "cancellation",
    "chain",
    "channels",
    "collapse_of_size",
    "collapsing",
    "cosines",
    "cycles",
    "depth",
    "fork",
    "gains",
    "gates",
    "implicit",
    "instead",
    "learned_scale",
    "lives",
    "logits",
    "magnitudes",
    "places",
    "plateau",
    "positions",
    "queries_and_keys",
    "ratios",
    "save",
    "secondary_sinks",
    "shared_directions",
    "sink_keys",
    "sink_map",
    "sinks_over_depth",
    "skyline",
    "spectra",
    "vocabulary",
    "waterfall",
]
