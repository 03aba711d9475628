"""The figures of notebook 06: what normalization makes of a spike."""

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor
from torch.nn import functional

from spikesink.chain.collapse import Collapse, Replaced, closed_form, spike_ratio
from spikesink.chain.lifecycle import Lifecycle
from spikesink.common import brief
from spikesink.plots.palette import ORDINARY, SINK, SPIKE, SPIKE_MAP
from spikesink.plots.style import (
    above,
    absent,
    drawn_where_applicable,
    figure,
    label_layers,
    note,
    span,
    thousands,
    whole,
)

MOST_TOKENS = 24  # of either kind in the cosine matrices
MOST_CHANNELS = 6  # of either kind in the heat map
MARKED = 5  # depths that are marked on the closed form


@drawn_where_applicable
def cosines(collapse: Collapse) -> Figure:
    """06 (the paper's figure 5): cosines between h~ of spike tokens and of others, before and after the step-up."""
    points = (collapse.before, collapse.cycle.middle)
    if not collapse.spike.cosine[collapse.cycle.middle].isfinite() or not len(collapse.other.kept):
        return absent("there are no two spike tokens of different windows to compare")
    spike, other = (group.kept[:MOST_TOKENS] for group in (collapse.spike, collapse.other))
    fig, axes = figure(1, 2, size=(11, 4.8))
    for ax, point in zip(axes, points, strict=True):
        h = functional.normalize(torch.cat([spike[:, point], other[:, point]]), dim=-1)
        image = ax.imshow(h @ h.T, cmap=SPIKE_MAP, vmin=-0.2, vmax=1, interpolation="nearest")
        for line in (ax.axhline, ax.axvline):
            line(len(spike) - 0.5, color="black", lw=1.2)
        places = (len(spike) / 2 - 0.5, len(spike) + len(other) / 2 - 0.5)
        ax.set_xticks(places, [f"{len(spike)} spike tokens", f"{len(other)} others"])
        ax.set_yticks(places, ["spike", "others"], rotation=90, va="center")
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
        between = collapse.spike.cosine[point], collapse.other.cosine[point]
        ax.set_title(
            f"After {point}: spike tokens {float(between[0]):.3f}, others {float(between[1]):.3f}", fontsize=11
        )
    fig.colorbar(image, ax=axes, label="cosine of h~", pad=0.01)
    return fig


@drawn_where_applicable
def depth(collapse: Collapse, life: Lifecycle) -> Figure:
    """06: how alike the tokens of either kind are at every depth, and over how many channels h~ spreads."""
    fig, (top, bottom) = figure(2, 1, size=(9.5, 6), sharex=True)
    x = np.arange(collapse.anatomy.n_blocks + 1)
    sides = ((collapse.spike, SPIKE, "spike tokens", "o"), (collapse.other, ORDINARY, "all other tokens", "s"))
    for group, colour, name, marker in sides:
        looks = {"color": colour, "marker": marker, "ms": 3, "lw": 1.4}
        top.plot(x, group.cosine, label=name, **looks)
        bottom.plot(x, group.participation, **looks)
    top.set(ylabel="cosine of h~ between\ntokens of different windows", ylim=(0, 1.04))
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9)
    bottom.set(yscale="log", ylabel="participation ratio of h~\n(channels)")
    label_layers(bottom.xaxis, collapse.anatomy.n_layers)
    thousands(bottom)
    bottom.yaxis.set_minor_formatter(NullFormatter())
    span(top, life.main)
    span(bottom, life.main, label=False)
    middle = collapse.cycle.middle
    spread = [brief(float(group.participation[middle])) for group in (collapse.spike, collapse.other)]
    text = f"Half-way, h~ has a participation ratio of {spread[0]} in spike tokens, of {spread[1]} in others"
    top.set_title(text, fontsize=11, pad=24)
    return fig


@drawn_where_applicable
def collapsing(collapse: Collapse, life: Lifecycle) -> Figure:
    """06: how much of |h~|^2 each of a few channels holds at every depth, in spike tokens and in others."""
    middle = collapse.cycle.middle
    strongest = collapse.spike.share[middle].argsort(descending=True)
    top = [int(c) for c in strongest[:MOST_CHANNELS]]
    ordinary = [c for c in life.trace.channels[life.trace.ordinary].tolist() if c not in top][:MOST_CHANNELS]
    chosen = [*top, *ordinary]
    rest = [c for c in range(collapse.anatomy.d_model) if c not in chosen]
    fig, axes = figure(2, 1, size=(10.5, 6.6), sharex=True)
    for ax, group, name in ((axes[0], collapse.spike, "Spike tokens"), (axes[1], collapse.other, "All other tokens")):
        shares = torch.cat([group.share[:, chosen], group.share[:, rest].sum(1, keepdim=True)], dim=1).T
        image = ax.imshow(shares, aspect="auto", cmap=SPIKE_MAP, vmin=0, vmax=1, interpolation="nearest")
        ax.set_yticks(range(len(chosen) + 1), [*map(str, chosen), f"the {len(rest)} others"], fontsize=8)
        for i, label in enumerate(ax.get_yticklabels()):
            label.set_color(SPIKE if i < len(top) else "black")
        ax.set_ylabel("channel")
        for below in (top, chosen):
            ax.axhline(len(below) - 0.5, color="black", lw=0.8)
        for step in (*collapse.cycle.step_up, *collapse.cycle.step_down):
            ax.axvline(step - 0.5, color=SPIKE, lw=1, ls=":")
        held = float(group.share[middle, collapse.cycle.channel])
        ax.set_title(f"{name}: half-way, channel {collapse.cycle.channel} holds {held:.1%} of |h~|²", fontsize=11)
        ax.spines[:].set_visible(False)
    label_layers(axes[1].xaxis, collapse.anatomy.n_layers)
    axes[1].set_xlabel(f"{axes[1].get_xlabel()}; dotted: step-up and step-down")
    fig.colorbar(image, ax=axes, label="share of |h~|²", pad=0.01)
    return fig


@drawn_where_applicable
def collapse_of_size(
    collapse: Collapse, ratio: Float[Tensor, " size"], measured: Mapping[str, Float[Tensor, " size"]]
) -> Figure:
    """06: what the norm does to one entry of growing size, on random vectors, with the closed form and the model."""
    root = (collapse.anatomy.d_model - 1) ** 0.5
    fine = torch.logspace(float(ratio.min().log10()), float(ratio.max().log10()), 300)
    curves, sizes = closed_form(fine, collapse.anatomy.d_model), spike_ratio(collapse)
    risen = np.linspace(collapse.before, collapse.cycle.middle, MARKED)
    points = sorted({*map(int, risen), int(collapse.cycle.plateau[1])})
    largest = collapse.spike.share[..., collapse.cycle.channel].sqrt()
    fig, axes = figure(1, 3, size=(12, 4.2))
    for ax, key, model, label in (
        (axes[0], "largest", largest, "|h~_k| ÷ √d of the large entry"),
        (axes[1], "participation", collapse.spike.participation, "participation ratio, channels"),
        (axes[2], "cosine", collapse.spike.cosine, "cosine between two such vectors"),
    ):
        ax.plot(fine / root, curves[key], color="black", lw=1, label="closed form")
        ax.plot(ratio / root, measured[key], "s", color=ORDINARY, ms=4, label="random vectors")
        of_model = "the model's spike tokens, at several depths"
        ax.plot(sizes[points] / root, model[points], "o", color=SPIKE, ms=6, label=of_model)
        ax.axvline(1, color="black", lw=0.6, ls=":")
        ax.set(xscale="log", xlabel="spike ÷ norm of all the rest", ylabel=label)
        thousands(ax, "x")
    axes[1].set_yscale("log")
    thousands(axes[1])
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9)
    at = float(sizes[collapse.cycle.middle]) / root
    above(fig, f"Past the size of all the rest, size no longer shows: half-way the spike is {brief(at)} times that")
    return fig


@drawn_where_applicable
def implicit(replaced: Replaced) -> Figure:
    """06: perplexity and attention, with one fixed vector in place of what the spike tokens' blocks read."""
    fig, (left, right) = figure(1, 2, size=(11, 4), width_ratios=(1, 1.7))
    names, colours = ("as it is", "one fixed vector", "others' mean\n(control)"), ("black", SPIKE, ORDINARY)
    values = list(replaced.perplexity.values())
    bars = left.bar(names, values, color=colours, width=0.6)
    left.bar_label(bars, [brief(v) for v in values], padding=2)
    left.set(ylabel="perplexity", ylim=(0, 1.12 * max(values)))
    change = values[1] / values[0] - 1
    text = f"by {change:+.2%}" if abs(change) >= 1e-4 else "by less than 0.01%"
    left.set_title(f"Perplexity changes {text}", fontsize=11)
    for name, colour, look, share in zip(names, colours, ("o-", "s--", "^-"), 100 * replaced.to_spike, strict=True):
        right.plot(share, look, color=colour, ms=4, label=name.replace("\n", " "))
    right.axvspan(replaced.layers[0] - 0.5, replaced.layers[-1] + 0.5, color=SINK, alpha=0.07, lw=0)
    right.set(xlabel="layer (shaded: replaced)", ylabel="% of their attention that later\ntokens give spike tokens")
    whole(right)
    right.legend(fontsize=9, loc="lower left", bbox_to_anchor=(0, 1.06), ncols=3)
    plateau = torch.tensor(replaced.layers)
    moved = [float(100 * replaced.moved[i, plateau].mean()) for i in (1, 2)]
    right.set_title(f"{brief(moved[0])}% of attention moves, {brief(moved[1])}% in the control", fontsize=11)
    return fig


@drawn_where_applicable
def learned_scale(scale: Float[Tensor, " layer"], life: Lifecycle) -> Figure:
    """06: the norm's learned scale at the spike's first channel, layer by layer."""
    fig, ax = figure(size=(9.5, 3.4))
    ax.plot(range(len(scale)), scale, color=SPIKE, marker="o", ms=4, lw=1.2)
    ax.axhline(1, color=ORDINARY, lw=1)
    note(ax, "the median channel", (len(scale) - 1, 1), (0, 3), ha="right", fontsize=9)
    if plateau := life.main.layers:
        ax.axvspan(plateau[0] - 0.5, plateau[-1] + 0.5, color=SPIKE, alpha=0.1, lw=0)
    ax.set(
        yscale="log",
        xlabel="layer (shaded: its attention reads the plateau)",
        ylabel=f"|γ| at channel {life.main.channel}\n÷ median |γ|",
    )
    whole(ax)
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    thousands(ax)
    ax.yaxis.set_minor_formatter(NullFormatter())
    if plateau:
        middle = brief(float(scale[plateau].quantile(0.5)))
        text = f"On the plateau the scale at the spike's channel is {middle} of the median"
        ax.set_title(text, fontsize=11)
    return fig
