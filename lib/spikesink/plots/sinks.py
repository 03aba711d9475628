"""The figures of notebook 07: where attention goes, and what keys and queries are like that it does."""

from collections.abc import Callable

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spikesink.chain.keys import AttentionReading, Cloud, Geometry, Rebuilt, factors
from spikesink.chain.lifecycle import Lifecycle, plateau_layers
from spikesink.chain.sinks import Scores, Secondary
from spikesink.chain.trace import Profile, spearman
from spikesink.common import NotApplicable, brief
from spikesink.ledger.claims import Evidence
from spikesink.ledger.evidence.sinks import sk5_over_depth
from spikesink.plots.style import (
    ORDINARY,
    OTHERS,
    SINK,
    SINK_MAP,
    SMALL,
    SPIKE,
    SPIKE_MAP,
    above,
    drawn_where_applicable,
    figure,
    quoted,
    styled,
    thousands,
    whole,
)


@styled
def sink_map(scores: Scores, short: Scores) -> Figure:
    """07: the sink score of position 0 in every head, and the sink ratio as epsilon and the window's length change."""
    fig, (left, right) = figure(1, 2, size=(11, 4.6), width_ratios=(1.2, 1))
    mean = scores.at.mean(0)
    image = left.imshow(mean.T, aspect="auto", origin="lower", cmap=SINK_MAP, vmin=0, vmax=1, interpolation="nearest")
    for layer, head in (mean > scores.epsilon).nonzero().tolist():
        left.plot(layer, head, marker="o", ms=2.5, color=SMALL, lw=0)
    fig.colorbar(image, ax=left, label=f"sink score of position {scores.position}", pad=0.02)
    left.set(xlabel="layer", ylabel="head")
    for which in "xy":
        whole(left, which)
    left.spines[:].set_visible(False)
    n, n_heads = int((mean > scores.epsilon).sum()), mean.numel()
    left.set_title(f"{n} of {n_heads} heads sink on position {scores.position} (dots)", fontsize=11)
    epsilons = np.linspace(0.02, 0.98, 97)
    for of, colour, style in ((scores, SINK, "-"), (short, OTHERS[0], "--")):
        name = f"{of.length} tokens"
        right.plot(epsilons, [of.ratio(float(e)) for e in epsilons], color=colour, ls=style, lw=1.8, label=name)
        right.plot(of.epsilon, of.ratio(), color=colour, marker="o", ms=6)
        right.annotate(f"{of.ratio():.2f}", (of.epsilon, of.ratio()), (6, 4), textcoords="offset points", color=colour)
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
    image = axes[0].imshow(
        over, aspect="auto", origin="lower", cmap=SPIKE_MAP, norm=LogNorm(1, max(10.0, float(over.max())))
    )
    fig.colorbar(image, ax=axes[0], label="largest |h| ÷ median |h|", pad=0.01)
    axes[0].set_title("How large: the stream as it enters each layer", fontsize=11)
    attention = profile.attention[:, :n]
    image = axes[1].imshow(attention, aspect="auto", origin="lower", cmap=SINK_MAP, norm=LogNorm(0.01, 1))
    fig.colorbar(image, ax=axes[1], label="attention it gets (log scale)", pad=0.01)
    axes[1].set_title("How attended: mean over heads and over the queries that see it", fontsize=11)
    tall = (over > 100).any(0)
    axes[1].set_xticks(range(n), [quoted(t)[1:-1] for t in profile.tokens[:n]], rotation=90, fontsize=7)
    for label, spikes in zip(axes[1].get_xticklabels(), tall, strict=True):
        label.set_color(SPIKE if spikes else "black")
    axes[1].set_xlabel(f"the first {n} tokens of a window (coloured: above 100 medians in some layer)")
    for ax in axes:
        whole(ax, "y")
        ax.set_ylabel("layer")
        ax.spines[:].set_visible(False)
    return fig


@drawn_where_applicable
def sinks_over_depth(geometry: Geometry, seen: AttentionReading, life: Lifecycle, profile: Profile) -> Figure:
    """07: attention on the spike tokens layer by layer, under the size of the stream; with each cycle's plateau."""
    fig, (top, bottom) = figure(2, 1, size=(9.5, 6), sharex=True, height_ratios=(1, 1.5))
    n_layers = geometry.anatomy.n_layers
    layers, score = np.arange(n_layers), seen.scores.received
    over = (profile.magnitude.amax(1) / profile.median)[: 2 * n_layers]
    top.plot(np.arange(2 * n_layers) / 2, over, color=SPIKE, lw=1.6)
    top.axhline(100, color="black", lw=0.6, ls=":")
    top.set(yscale="log", ylabel="largest |h| ÷ median |h|\nin one window")
    thousands(top)
    bottom.plot(layers, 100 * score["spike"], color=SINK, marker=".", ms=3, lw=0, alpha=0.45)
    sides = [("spike", SPIKE, "o", "spike tokens"), ("next", ORDINARY, "s", "the token right after")]
    if seen.scores.n_tokens["smaller"]:
        sides.insert(1, ("smaller", SMALL, "^", "tokens of smaller cycles"))
    for name, colour, marker, label in sides:
        bottom.plot(layers, 100 * score[name].mean(1), color=colour, marker=marker, ms=5, lw=1.6, label=label)
    for i, cycle in enumerate(life.cycles):
        inside = plateau_layers(cycle)
        if not inside:
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
    found = sk5_over_depth(seen, life)
    if isinstance(found, Evidence):
        during, before = (found.measured[name] for name in ("attention_during", "attention_before"))
        top.set_title(f"Spike tokens get {during:.0%} of attention on the plateau, {before:.0%} before", fontsize=11)
    return fig


@drawn_where_applicable
def sink_keys(geometry: Geometry, rebuilt: Rebuilt | NotApplicable, life: Lifecycle) -> Figure:
    """07: the spike tokens' keys: how many dimensions, how many rows of W_K, and how small their values."""
    fig, axes = figure(1, 3, size=(13, 4.2))
    layers, plateau = np.arange(geometry.anatomy.n_layers), plateau_layers(life.main)
    left, middle, right = axes
    for stage, style in zip(geometry.dimension, ("-", ":"), strict=False):
        for name, colour in (("spike", SPIKE), ("matched", ORDINARY)):
            values = geometry.dimension[stage][name].quantile(0.5, dim=1)
            label = f"{'spike tokens' if name == 'spike' else 'as many others'}, {stage} RoPE"
            left.plot(layers, values, color=colour, ls=style, lw=1.6, label=label)
    left.set(xlabel="layer", ylabel="effective dimension of keys")
    left.set_ylim(0.9, 1.05 * max(1.5, left.get_ylim()[1]))
    left.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=1)
    on = geometry.dimension["before"]["spike"][list(plateau)].quantile(0.5)
    left.set_title(f"Dimension {float(on):.2f} on the plateau", fontsize=11)
    if isinstance(rebuilt, NotApplicable):
        middle.axis("off")
    else:
        rows = np.arange(1, len(rebuilt.channels) + 1)
        for values, colour, marker, label in (
            (rebuilt.spike, SPIKE, "o", "spike tokens"),
            (rebuilt.other_tokens, ORDINARY, "s", "other tokens, same rows"),
            (rebuilt.other_channels, OTHERS[0], "^", "spike tokens, their next strongest"),
        ):
            flat = values.flatten(1)
            middle.plot(rows, flat.quantile(0.5, dim=1), color=colour, marker=marker, ms=5, lw=1.4, label=label)
            middle.fill_between(rows, flat.quantile(0.1, dim=1), flat.quantile(0.9, dim=1), color=colour, alpha=0.12)
        limits = {"xlim": (0.5, len(rows) + 0.5), "ylim": (-0.3, 1.05)}
        middle.set(xlabel="rows of W_K used", ylabel="cosine with the whole W_K h~", **limits)
        whole(middle)
        middle.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18))
        best = float(rebuilt.spike[-1].quantile(0.5))
        middle.set_title(f"{len(rows)} of {geometry.anatomy.d_model} rows: cosine {best:.2f}", fontsize=11)
    for name, colour, marker, label in (
        ("spike", SPIKE, "o", "spike tokens"),
        ("next", ORDINARY, "s", "the token right after"),
    ):
        ratio = (geometry.value_norm[name] / geometry.value_norm["other"]).quantile(0.5, dim=1)
        right.plot(layers, ratio, color=colour, marker=marker, ms=4, lw=1.4, label=label)
    right.axhline(0.5, color="black", lw=0.6, ls=":")
    right.set(xlabel="layer", ylabel="|v| ÷ |v| of other tokens", ylim=(0, None))
    right.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, -0.18))
    small = (geometry.value_norm["spike"] / geometry.value_norm["other"])[list(plateau)].quantile(0.5)
    right.set_title(f"Values are {float(small):.2f} as long", fontsize=11)
    for ax in (left, right):
        whole(ax)
        ax.axvspan(plateau[0] - 0.5, plateau[-1] + 0.5, color=SPIKE, alpha=0.1, lw=0)
    return fig


@drawn_where_applicable
def logits(geometry: Geometry, seen: AttentionReading, life: Lifecycle) -> Figure:
    """07: all heads of the plateau: their sink score against the logit's gap, and against the factors it is made of."""
    layers = list(plateau_layers(life.main))
    score = seen.scores.received["spike"][layers].flatten()
    names = {"cosine": "cosine of query and sink key", "query_norm": "|q|", "key_norm": "|k| of the sink"}
    panels = {"gap of the logit": geometry.gap["spike"][layers].flatten()}
    panels |= {names[name]: values for name, values in factors(geometry, layers).items()}
    fig, axes = figure(1, 4, size=(13, 3.9), sharey=True)
    found: dict[str, float] = {}
    depth = torch.tensor(layers).repeat_interleave(geometry.anatomy.n_heads)
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        drawn = ax.scatter(values, score, c=depth, cmap="viridis", s=16, linewidths=0, rasterized=True)
        ax.axhline(seen.scores.epsilon, color="black", lw=0.6, ls=":")
        ax.set(xlabel=name, ylim=(0, 1))
        found[name] = spearman(values, score)
        ax.set_title(f"ρ = {found[name]:.2f}", fontsize=11)
    axes[0].plot(
        geometry.gap["next"][layers].flatten(),
        seen.scores.received["next"][layers].flatten(),
        marker="x",
        ms=3,
        lw=0,
        color=ORDINARY,
        zorder=0,
    )
    axes[0].annotate(
        "× the token right after", (0.02, 0.93), xycoords="axes fraction", color=ORDINARY, fontsize=8, va="top"
    )
    axes[0].set_ylabel("sink score of the head")
    fig.colorbar(drawn, ax=axes, label="layer", pad=0.01)
    gap, *parts = found
    best = max(parts, key=lambda name: found[name] ** 2)
    text = f"Heads sink by the gap (rank correlation {found[gap]:.2f})"
    above(fig, f"{text}; of its factors most by the {best} ({found[best]:.2f})")
    return fig


@drawn_where_applicable
def queries_and_keys(clouds: list[Cloud]) -> Figure:
    """07 (the paper's figure 6): queries and keys of a sink head and of an ordinary one, by t-SNE and by PCA."""
    fig, axes = figure(len(clouds), 2, size=(9.5, 4.1 * len(clouds)), squeeze=False)
    for row, cloud in zip(axes, clouds, strict=True):
        for ax, flat, name in ((row[0], cloud.tsne, "t-SNE"), (row[1], cloud.pca, "PCA")):
            kinds = (
                (~cloud.is_query & ~cloud.is_spike, ORDINARY, "s", 9, "keys"),
                (cloud.is_query & ~cloud.is_spike, SINK, ".", 14, "queries"),
                (cloud.is_query & cloud.is_spike, SMALL, "v", 22, "spike tokens' own queries"),
                (~cloud.is_query & cloud.is_spike, SPIKE, "*", 90, "keys of spike tokens"),
            )
            for which, colour, marker, size, label in kinds:
                looks = {"color": colour, "marker": marker, "s": size, "linewidths": 0, "label": label}
                ax.scatter(*flat[which].T, alpha=0.6 if marker != "*" else 1, rasterized=True, **looks)
            ax.set(xticks=[], yticks=[])
            ax.set_title(f"{name}, layer {cloud.layer}, head {cloud.head}: score {brief(cloud.score)}", fontsize=10.5)
        row[1].plot(*cloud.origin, marker="+", ms=11, mew=1.4, color="black", lw=0)
        row[1].annotate("0", tuple(cloud.origin.tolist()), (6, 4), textcoords="offset points", fontsize=9)
        row[1].set_aspect("equal", adjustable="datalim")
        row[1].set(
            xlabel=f"{cloud.explained[0]:.0%} of the variance",
            ylabel=f"{cloud.explained[1]:.0%}",
        )
    axes[0, 0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=4)
    return fig


@drawn_where_applicable
def secondary_sinks(rows: Secondary, life: Lifecycle, decode: Callable[[list[int]], str], most: int = 24) -> Figure:
    """07: secondary sinks: how far each points along the primary direction at every depth, and where it is a sink."""
    fig, ax = figure(size=(10, 4.4))
    points = np.arange(rows.cosine.shape[1])
    for cosine, heads in zip(rows.cosine[:most], rows.heads[:most], strict=True):
        ax.plot(points, cosine, color=SMALL, lw=0.8, alpha=0.7)
        sinks = heads > 0
        ax.scatter(points[:-1:2][sinks], cosine[:-1:2][sinks], s=70 * heads[sinks], color=SINK, zorder=3, linewidths=0)
    ax.plot(points, rows.cosine_other, color=ORDINARY, lw=2)
    left = len(points) // 8
    looks = {"textcoords": "offset points", "color": ORDINARY, "fontsize": 9, "va": "top"}
    ax.annotate("all other tokens (mean)", (left, rows.cosine_other[left]), (0, -6), **looks)
    for cycle, colour in zip(life.cycles[:2], (SPIKE, SMALL), strict=False):
        for block in (*cycle.step_up, *cycle.step_down):
            ax.axvline(block - 0.5, color=colour, lw=1, ls=":")
    ax.set(
        xlabel="depth: after block … (dotted: step-up and step-down blocks)",
        ylabel="cosine of h~ with the\nprimary sink's direction",
    )
    names = ", ".join(quoted(decode([token])) for token in rows.token.unique().tolist()[:4])
    while_sink = rows.heads > 0
    layers = while_sink.any(0).nonzero()[:, 0]
    ax.set_title(
        f"{rows.n} secondary sinks ({names}), layers {int(layers[0])} to {int(layers[-1])}"
        " (dots: as large as the share of heads)",
        fontsize=11,
    )
    return fig
