"""The figures of notebook 07 about who is a sink: where attention goes, over heads, tokens and layers."""

from collections.abc import Callable

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spikesink.chain.keys import AttentionReading
from spikesink.chain.lifecycle import Lifecycle
from spikesink.chain.sinks import Scores, Secondary
from spikesink.chain.trace import Profile
from spikesink.ledger.claims import Evidence
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SINK_MAP, SMALL, SPIKE, SPIKE_MAP
from spikesink.plots.style import drawn_where_applicable, figure, note, quoted, styled, thousands, whole


@styled
def sink_map(scores: Scores, short: Scores) -> Figure:
    """07: the sink score of position 0 in every head, and the sink ratio as epsilon and the window's length change."""
    fig, (left, right) = figure(1, 2, size=(11, 4.6), width_ratios=(1.2, 1))
    mean = scores.at.mean(0)
    image = left.imshow(mean.T, aspect="auto", origin="lower", cmap=SINK_MAP, vmin=0, vmax=1, interpolation="nearest")
    layers, heads = (mean > scores.epsilon).nonzero().T
    left.plot(layers, heads, marker="o", ms=2.5, color=SMALL, lw=0)
    fig.colorbar(image, ax=left, label=f"sink score of position {scores.position}", pad=0.02)
    left.set(xlabel="layer", ylabel="head")
    for which in "xy":
        whole(left, which)
    left.spines[:].set_visible(False)
    n_heads = int((~mean.isnan()).sum())
    left.set_title(f"{len(heads)} of {n_heads} heads sink on position {scores.position} (dots)", fontsize=11)
    epsilons = np.linspace(0.02, 0.98, 97)
    for some, colour, style in ((scores, SINK, "-"), (short, OTHERS[0], "--")):
        name, ratio = f"{some.length} tokens", some.ratio()
        right.plot(epsilons, [some.ratio(float(e)) for e in epsilons], color=colour, ls=style, lw=1.8, label=name)
        right.plot(some.epsilon, ratio, color=colour, marker="o", ms=6)
        note(right, f"{ratio:.2f}", (some.epsilon, ratio), (6, 4), color=colour)
    right.axvline(scores.epsilon, color="black", lw=0.6, ls=":")
    right.set(xlabel="ε: what a sink's score exceeds", ylabel="sink ratio", ylim=(0, 1), xlim=(0, 1))
    right.legend(fontsize=9, loc="upper right")
    right.set_title("The ratio depends on ε and on T", fontsize=11)
    return fig


@styled
def places(profile: Profile, most: int = 64) -> Figure:
    """07: one window, token by token: how large each is at every depth, and how much attention it gets there."""
    n = min(most, len(profile.tokens))
    over = (profile.magnitude / profile.median[:, None])[:-1:2, :n]
    fig, axes = figure(2, 1, size=(11, 6.4), sharex=True)
    for ax, values, colours, norm, label, title in (
        (axes[0], over, SPIKE_MAP, LogNorm(1, max(10.0, float(over.max()))), "largest |h| ÷ median |h|",
         "How large: the stream as it enters each layer"),
        (axes[1], profile.attention[:, :n], SINK_MAP, LogNorm(0.01, 1), "attention it gets (log scale)",
         "How attended: mean over heads and over the queries that see it"),
    ):  # fmt: skip
        image = ax.imshow(values, aspect="auto", origin="lower", cmap=colours, norm=norm)
        fig.colorbar(image, ax=ax, label=label, pad=0.01)
        ax.set_title(title, fontsize=11)
        ax.set_ylabel("layer")
        whole(ax, "y")
        ax.spines[:].set_visible(False)
    axes[1].set_xticks(range(n), [quoted(t)[1:-1] for t in profile.tokens[:n]], rotation=90, fontsize=7)
    for label, spikes in zip(axes[1].get_xticklabels(), (over > 100).any(0), strict=True):
        label.set_color(SPIKE if spikes else "black")
    axes[1].set_xlabel(f"the first {n} tokens of a window (coloured: above 100 medians in some layer)")
    return fig


@drawn_where_applicable
def sinks_over_depth(depth: Evidence, attention: AttentionReading, life: Lifecycle, profile: Profile) -> Figure:
    """07: attention on the spike tokens layer by layer, under the size of the stream; with each cycle's plateau.

    `depth` is what SK5 is judged by.
    """
    fig, (top, bottom) = figure(2, 1, size=(9.5, 6), sharex=True, height_ratios=(1, 1.5))
    score, n_layers = attention.scores.received, attention.scores.anatomy.n_layers
    over = (profile.magnitude.amax(1) / profile.median)[: 2 * n_layers]
    top.plot(np.arange(2 * n_layers) / 2, over, color=SPIKE, lw=1.6)
    top.axhline(100, color="black", lw=0.6, ls=":")
    top.set(yscale="log", ylabel="largest |h| ÷ median |h|\nin one window")
    thousands(top)
    bottom.plot(range(n_layers), 100 * score["spike"], color=SINK, marker=".", ms=3, lw=0, alpha=0.45)
    sides = [("spike", SPIKE, "o", "spike tokens"), ("next", ORDINARY, "s", "the token right after")]
    if attention.scores.n_tokens["smaller"]:
        sides.insert(1, ("smaller", SMALL, "^", "tokens of smaller cycles"))
    for name, colour, marker, label in sides:
        mean = 100 * score[name].mean(1)
        bottom.plot(range(n_layers), mean, color=colour, marker=marker, ms=5, lw=1.6, label=label)
    for i, cycle in enumerate(life.cycles):
        if not (inside := cycle.layers):
            continue
        colour, name = (SPIKE, "plateau") if i == 0 else (SMALL, f"cycle {i + 1}")
        for ax in (top, bottom):
            ax.axvspan(inside[0] - 0.5, inside[-1] + 0.5, color=colour, alpha=0.1, lw=0)
        place = {"xycoords": ("data", "axes fraction"), "ha": "center", "va": "top", "fontsize": 9, "color": colour}
        top.annotate(name, ((inside[0] + inside[-1]) / 2, 0.98 - 0.12 * i), **place)
    bottom.set(
        xlabel="layer (its attention reads the stream that enters it)",
        ylabel="% of attention it gets\n(dots: each head; lines: mean)",
        ylim=(0, 100),
    )
    whole(bottom)
    bottom.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    during, before = (depth.measured[name] for name in ("attention_during", "attention_before"))
    top.set_title(f"Spike tokens get {during:.0%} of attention on the plateau, {before:.0%} before", fontsize=11)
    return fig


@drawn_where_applicable
def secondary_sinks(
    secondary: Secondary, life: Lifecycle, decode: Callable[[list[int]], str], most: int = 24
) -> Figure:
    """07: secondary sinks: how far each points along the primary direction at every depth, and where it is a sink."""
    fig, ax = figure(size=(10, 4.4))
    depth = np.arange(secondary.cosine.shape[1]) / 2
    for cosine, heads in zip(secondary.cosine[:most], secondary.heads[:most], strict=True):
        ax.plot(depth, cosine, color=SMALL, lw=0.8, alpha=0.7)
        sinks = heads > 0
        ax.scatter(depth[:-1:2][sinks], cosine[:-1:2][sinks], s=70 * heads[sinks], color=SINK, zorder=3, linewidths=0)
    ax.plot(depth, secondary.cosine_other, color=ORDINARY, lw=2)
    left = len(depth) // 8
    at = (depth[left], secondary.cosine_other[left])
    note(ax, "all other tokens (mean)", at, (0, -6), color=ORDINARY, fontsize=9, va="top")
    for cycle, colour in zip(life.cycles[:2], (SPIKE, SMALL), strict=False):
        for block in (*cycle.step_up, *cycle.step_down):
            ax.axvline((block - 0.5) / 2, color=colour, lw=1, ls=":")
    ax.set(
        xlabel="layer that the stream enters (dotted: step-up and step-down blocks)",
        ylabel="cosine of h~ with the\nprimary sink's direction",
    )
    whole(ax)
    names = ", ".join(quoted(decode([token])) for token in secondary.token.unique().tolist()[:4])
    layers = (secondary.heads > 0).any(0).nonzero()[:, 0]
    title = f"{secondary.n} secondary sinks ({names}), layers {int(layers[0])} to {int(layers[-1])}"
    ax.set_title(f"{title} (dots: as large as the share of heads)", fontsize=11)
    return fig
