"""The figures of notebooks 08 and 11: what becomes of spike, sink and model where the chain is broken."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spikesink.common import brief
from spikesink.patching.behaviour import Behaviour
from spikesink.patching.cuts import CUTS, BlockMap, Broken, Doses, named
from spikesink.patching.outcome import CLEAN, View
from spikesink.plots.style import (
    ORDINARY,
    OTHERS,
    SINK,
    SINK_MAP,
    SPIKE,
    SPIKE_MAP,
    above,
    drawn_where_applicable,
    figure,
    log_ticks,
    quoted,
    span,
    styled,
    token_text,
    whole,
)

LOOKS = {
    CLEAN: ("black", "o", "-"),
    "skipped": (OTHERS[1], "^", "--"),
    "masked": (SINK, "s", "-"),
    "masked_everywhere": (OTHERS[2], "v", ":"),
    "decoupled": (SPIKE, "D", "-"),
}
SHOWN_KEYS = 12


def _name(key: str) -> str:
    return named(key, "as it is")


def _is_control(key: str) -> bool:
    return key in CUTS and CUTS[key].control


@drawn_where_applicable
def broken_chain(broken: Broken) -> Figure:
    """08: rows the cuts, columns what is left of the spike, of the sink, and the perplexity."""
    names = list(broken.outcomes)
    links = [CUTS[name].link if name in CUTS else "" for name in names]
    fig, axes = figure(1, 3, size=(12.5, 0.27 * len(names) + 1.3), sharey=True)
    y = np.arange(len(names))
    spike = [100 * broken.at_spikes(name) / broken.at_spikes(CLEAN) for name in names]
    sink = [broken.outcomes[name].sink_ratio for name in names]
    perplexity = [broken.outcomes[name].perplexity for name in names]
    panels = ((spike, SPIKE, "largest entry at the spike tokens,\n% of the clean run"), (sink, SINK, "sink ratio"))
    for ax, (values, colour, label) in zip(axes, panels, strict=False):
        colours = [ORDINARY if _is_control(name) else colour for name in names]
        ax.barh(y, values, color=colours, height=0.62)
        ax.axvline(values[0], color="black", lw=0.8, ls=":")
        ax.set_xlabel(label)
    last = axes[2]
    for i, name in enumerate(names):
        low, high = broken.outcomes[name].interval()
        colour = ORDINARY if _is_control(name) else "black"
        last.plot([low, high], [i, i], color=colour, lw=1.2)
        last.plot(perplexity[i], i, color=colour, marker="s" if colour == ORDINARY else "o", ms=5)
        last.annotate(
            brief(perplexity[i]),
            (np.nanmax([high, perplexity[i]]), i),
            (6, 0),
            "data",
            "offset points",
            va="center",
            fontsize=8,
        )
    last.axvline(perplexity[0], color="black", lw=0.8, ls=":")
    last.set(xscale="log", xlabel="perplexity (line: 95% over windows)", xlim=(None, 30 * max(perplexity)))
    axes[0].set_yticks(y, [_name(name) for name in names], fontsize=9)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(ORDINARY if _is_control(name) else "black")
    axes[0].invert_yaxis()
    for i in range(1, len(names)):
        if links[i] != links[i - 1]:
            for ax in axes:
                ax.axhline(i - 0.5, color=ORDINARY, lw=0.5)
            last.text(1.03, i - 0.4, links[i], transform=last.get_yaxis_transform(), va="top", style="italic")
    parts = {"decoupled": "spike out, keys and values held", "zeroed": "spike zeroed", "masked": "sink masked"}
    made = [f"{name} {brief(broken.outcomes[key].perplexity)}" for key, name in parts.items() if key in broken.outcomes]
    text = f"Perplexity {brief(perplexity[0])}; " + ", ".join(made) + " (grey: controls)"
    above(fig, text)
    return fig


@drawn_where_applicable
def dose_response(found: Doses) -> Figure:
    """08: perplexity and sink ratio against the factor by which the spike is scaled."""
    fig, (left, right) = figure(1, 2, size=(11, 4))
    x = [float(f) for f in found.factors]
    perplexity = [of.perplexity for of in found.outcomes]
    low, high = zip(*(of.interval() for of in found.outcomes), strict=True)
    left.fill_between(x, low, high, color=SPIKE, alpha=0.15, lw=0)
    left.plot(x, perplexity, color=SPIKE, marker="o", ms=5, label="spike channels")
    control = [found.control[f].perplexity for f in found.control]
    left.plot(list(found.control), control, color=ORDINARY, marker="s", ms=5, lw=0, label="as many random channels")
    left.set(yscale="log", xlabel="spike multiplied by", ylabel="perplexity (band: 95% over windows)")
    left.legend(fontsize=9)
    log_ticks(left.yaxis)
    right.plot(x, [of.sink_ratio for of in found.outcomes], color=SINK, marker="o", ms=5)
    controls = [of.sink_ratio for of in found.control.values()]
    right.plot(list(found.control), controls, color=ORDINARY, marker="s", ms=5, lw=0)
    right.set(xlabel="spike multiplied by", ylabel="sink ratio", ylim=(0, 1))
    for ax in (left, right):
        ax.axvline(1, color="black", lw=0.8, ls=":")
    half = [f for f, p in zip(x, perplexity, strict=True) if f < 1 and p <= 2 * perplexity[x.index(1)]]
    text = f"Perplexity {brief(perplexity[0])} with the spike zeroed, {brief(perplexity[x.index(1)])} as it is"
    if half and perplexity[0] > 2 * perplexity[x.index(1)]:
        text += f"; {half[0]:.0%} of the spike is enough for less than twice that"
    above(fig, text)
    return fig


@drawn_where_applicable
def where_it_goes(broken: Broken, names: Sequence[str] = (CLEAN, "skipped", "masked", "masked_everywhere")) -> Figure:
    """08: how much attention each of the first key positions gets, layer by layer, under some cuts."""
    names = [name for name in names if name in broken.outcomes]
    fig, axes = figure(1, len(names), size=(3.1 * len(names), 4.4), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], names, strict=True):
        attention = broken.outcomes[name].attention[:, :SHOWN_KEYS]
        image = ax.imshow(
            attention, aspect="auto", cmap=SINK_MAP, vmin=0, vmax=1, origin="lower", interpolation="nearest"
        )
        ax.set_title(f"{_name(name).capitalize()}", fontsize=9.5, fontweight="normal")
        ax.set_xlabel("key position")
        whole(ax)
        ax.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="attention it gets,\nmean over heads and queries", pad=0.01)
    layers = broken.means.layers
    shares = {name: float(broken.outcomes[name].attention[layers.start : layers.stop, 0].mean()) for name in names}
    text = f"Position 0 gets {shares[CLEAN]:.0%} of attention on the plateau"
    if "skipped" in shares:
        text += f", {shares['skipped']:.0%} without the step-up"
    if "masked_everywhere" in shares:
        of = broken.outcomes["masked_everywhere"].attention[layers.start : layers.stop].mean(0)
        text += f"; masked everywhere, position {int(of[:SHOWN_KEYS].argmax())} gets {float(of[:SHOWN_KEYS].max()):.0%}"
    above(fig, text)
    return fig


@drawn_where_applicable
def near_and_far(found: Behaviour) -> Figure:
    """08: what cuts cost by position; and what they do to copying, recall and greedy generation."""
    names = list(found.by_position)
    fig, axes = figure(1, 4, size=(13, 3.8), width_ratios=(1.7, 1, 1, 1))
    x = range(len(found.edges) - 1)
    for name in names[1:]:
        colour, marker, style = LOOKS.get(name, (ORDINARY, "x", "-"))
        change = found.by_position[name] - found.by_position[CLEAN]
        axes[0].plot(x, change, color=colour, marker=marker, ls=style, ms=5, label=_name(name))
    axes[0].axhline(0, color="black", lw=0.8)
    axes[0].set_xticks(x, [f"{a}–{b - 1}" for a, b in pairwise(found.edges)])
    axes[0].set(xlabel="position that predicts", ylabel="loss over the clean run's, nats")
    y = np.arange(len(names))
    colours = [LOOKS.get(name, (ORDINARY,))[0] for name in names]
    pairs = (
        (found.second_copy, found.first_copy, "loss on the second copy\n(grey: the first), nats"),
        (found.recall, found.no_answer, "loss on the answer\n(grey: not told), nats"),
    )
    for ax, (own, control, label) in zip(axes[1:3], pairs, strict=True):
        ax.barh(y + 0.2, [own.get(name, np.nan) for name in names], color=colours, height=0.38)
        ax.barh(y - 0.2, [control.get(name, np.nan) for name in names], color=ORDINARY, height=0.38, alpha=0.5)
        ax.set_xlabel(label)
    axes[3].barh(y, [100 * found.same_greedy.get(name, np.nan) for name in names], color=colours, height=0.6)
    axes[3].set_xlabel("% of greedy tokens\nthat are the clean run's")
    for ax in axes[1:]:
        ax.set_yticks(y, [_name(name) if ax is axes[1] else "" for name in names], fontsize=8)
        ax.invert_yaxis()
    axes[0].legend(fontsize=8)
    text = "What a cut costs, near and far, in copying, recall and writing"
    if "decoupled" in found.same_greedy:
        text = f"Spike out, keys and values held: the same token in {found.same_greedy['decoupled']:.0%} of places"
        if "masked" in found.same_greedy:
            text += f"; sink masked: in {found.same_greedy['masked']:.0%}"
    above(fig, text)
    return fig


@drawn_where_applicable
def causal_map(found: BlockMap) -> Figure:
    """08: for every block, what becomes of spike, sink and perplexity where it writes nothing at the spike tokens."""
    fig, axes = figure(3, 1, size=(9.5, 6.2), sharex=True)
    blocks = np.arange(1, len(found.outcomes) + 1)
    attention = blocks % 2 == 1
    ratio = np.array([of.perplexity for of in found.outcomes]) / found.clean.perplexity
    rows = (
        (100 * found.spike().numpy(), SPIKE, "largest entry at\nspike tokens, %", 100),
        (np.array([of.sink_ratio for of in found.outcomes]), SINK, "sink ratio", found.clean.sink_ratio),
        (ratio, "black", "perplexity ÷\nthe clean run's", 1),
    )
    for ax, (values, colour, label, clean) in zip(axes, rows, strict=True):
        ax.axhline(clean, color="black", lw=0.7, ls=":")
        for kind, marker, fill in ((attention, "o", "none"), (~attention, "s", colour)):
            ax.plot(blocks[kind], values[kind], color=colour, marker=marker, mfc=fill, ms=4.5, lw=0)
        ax.set_ylabel(label)
        span(ax, found.cycle, label=ax is axes[0])
    axes[1].set_ylim(0, 1)
    axes[2].set(yscale="log", xlabel="block that writes nothing at the spike tokens (circles: attention, squares: FFN)")
    log_ticks(axes[2].yaxis)
    worst, least = int(ratio.argmax()) + 1, int(found.spike().argmin()) + 1
    left, times = brief(100 * float(found.spike().min())), brief(float(ratio.max()))
    text = f"Without block {least}, {left}% of the spike is left; without block {worst}, {times} times the perplexity"
    above(fig, text)
    return fig


@styled
def patched_view(seen: View, head: int | None = None) -> Figure:
    """11: one prompt's largest entries and the attention its tokens get, as it is and under interventions."""
    fig, axes = figure(1, 4, size=(13, 0.16 * max(16, len(seen.tokens)) + 1.6), width_ratios=(1, 1, 1, 1))
    y, names = range(len(seen.tokens)), [token_text(text) for text in seen.tokens]
    size = seen.magnitude.clamp(min=1e-3)
    limits = {"vmin": float(size.quantile(0.05)), "vmax": float(size.max())}
    attention = seen.attention.mean(2) if head is None else seen.attention[:, :, head]
    for run, name in enumerate(("clean", "patched")):
        image = axes[run].imshow(
            size[run].T, aspect="auto", cmap=SPIKE_MAP, norm=LogNorm(**limits), interpolation="nearest"
        )
        axes[run].set_title(f"largest entry |h|, {name}", fontsize=10)
        axes[run].set_xlabel("layer it enters")
        blue = axes[2 + run].imshow(
            attention[run].T, aspect="auto", cmap=SINK_MAP, vmin=0, vmax=1, interpolation="nearest"
        )
        which = "mean over heads" if head is None else f"head {head}"
        axes[2 + run].set_title(f"attention it gets, {name}", fontsize=10)
        axes[2 + run].set_xlabel(f"layer ({which})")
    for i, ax in enumerate(axes):
        ax.set_yticks(y, names if not i else [""] * len(names), fontsize=8)
        whole(ax)
        ax.spines[:].set_visible(False)
    fig.colorbar(image, ax=axes[1], pad=0.02)
    fig.colorbar(blue, ax=axes[3], pad=0.02, label="attention, mean over queries")
    first = [max(seen.top, key=lambda row: row[run])[0] for run in (1, 2)]
    largest = [brief(float(seen.magnitude[run].max())) for run in (0, 1)]
    next_token = f"{quoted(first[0])} stays the next token"
    if first[0] != first[1]:
        next_token = f"the next token changes from {quoted(first[0])} to {quoted(first[1])}"
    above(fig, f"Largest entry of all {largest[0]}, patched {largest[1]}; {next_token}")
    return fig
