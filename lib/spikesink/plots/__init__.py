"""The house style, and one function per figure; each takes measured values and returns a matplotlib Figure.

The same colour means the same thing in all of them: spike (vermilion), sink (blue), ordinary (grey). Titles are the
finding, computed from the numbers that are drawn.
"""

from spikesink.plots.amplifier import alignment, gains, gates, shared_directions, spectra
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
from spikesink.plots.style import absent, save

__all__ = [
    "absent",
    "across_models",
    "alignment",
    "cancellation",
    "chain",
    "channels",
    "cycles",
    "fork",
    "gains",
    "gates",
    "instead",
    "lives",
    "magnitudes",
    "plateau",
    "positions",
    "ratios",
    "save",
    "shared_directions",
    "skyline",
    "spectra",
    "vocabulary",
    "waterfall",
]
