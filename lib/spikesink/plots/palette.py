"""One colour for one thing in all figures: what is no spike, sink or ordinary token takes one of the others."""

SPIKE, SINK, ORDINARY, SMALL = "#D55E00", "#0072B2", "#7F7F7F", "#E69F00"  # Okabe and Ito's colour-blind safe hues
OTHERS = ("#009E73", "#CC79A7", "#56B4E9")
SPIKE_MAP, SINK_MAP = "rocket_r", "Blues"
MARKERS = ("o", "s", "^")
