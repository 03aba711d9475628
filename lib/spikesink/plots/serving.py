"""The figures of notebook 10: what serving does, with and without spike and sink."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from spikesink.common import brief
from spikesink.plots.style import (
    ORDINARY,
    OTHERS,
    SINK,
    SINK_MAP,
    SPIKE,
    above,
    drawn_where_applicable,
    figure,
    log_ticks,
    styled,
    thousands,
    whole,
)
from spikesink.serving import cache
from spikesink.serving.cells import AS_IT_IS, HELD, NEITHER, NO_SINK, NO_SPIKE, SPARED, Crossed
from spikesink.serving.context import OTHER, Lengths, Recall
from spikesink.serving.diagnosis import FINE, UNKNOWN, UNSURE, Diagnosis
from spikesink.serving.long import ANEW, BUDGET, Long
from spikesink.serving.quantize import LINEAR_INPUTS, Range

LOOKS = {
    AS_IT_IS: ("black", "o"),
    SPARED: (SINK, "s"),
    HELD: (SINK, "P"),
    NO_SPIKE: (SPIKE, "D"),
    NO_SINK: (OTHERS[2], "v"),
    NEITHER: (ORDINARY, "^"),
}
LANES = {SPARED: -0.25, HELD: -0.25, NO_SPIKE: 0.25}  # of a row
STREAMED = {
    cache.WINDOW: (SPIKE, "-"),
    cache.OTHERS: (ORDINARY, "-."),
    cache.WITH_FIRST: (SINK, "-"),
    cache.SHIFTED: (OTHERS[0], "--"),
    ANEW: ("black", "-"),
}
SMOOTHED = 256  # predictions in a running mean


@drawn_where_applicable
def quantizer_steps(found: Mapping[str, Range]) -> Figure:
    """10: site by site, how large entries of spike tokens and of others are, and the step of int8 per tensor."""
    columns = 4
    rows = -(-len(found) // columns)
    fig, axes = figure(rows, columns, size=(13, 2.9 * rows), sharex=True, squeeze=False)
    for ax, (site, one) in zip(axes.flat, found.items(), strict=False):
        layers = np.arange(len(one.spike))
        ax.plot(layers, one.spike, color=SPIKE, marker="o", ms=3, label="largest, spike tokens")
        ax.plot(layers, one.other, color="black", lw=1.2, ls="--", label="largest, other tokens")
        ax.plot(layers, one.median, color=ORDINARY, lw=1.2, ls="-.", label="median, other tokens")
        ax.fill_between(layers, one.step() / 2, color=SINK, alpha=0.2, lw=0, label="rounded to zero by int8 per tensor")
        smallest = float(min(one.median.min(), (one.step() / 2).min()))
        ax.set(yscale="log", ylim=(max(smallest, 1e-6) / 5, None), title=site)
        ax.title.set_fontsize(10)
        whole(ax)
    for ax in axes.flat[len(found) :]:
        ax.axis("off")
    for ax in axes.flat[: len(found)][-columns:]:  # those with none below
        ax.set_xlabel("layer")
        ax.tick_params(labelbottom=True)
    for ax in axes[:, 0]:
        ax.set_ylabel("size of an entry")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    place = axes.flat[-1] if len(found) < axes.size else axes.flat[0]
    place.legend(handles, labels, fontsize=8.5, loc="center" if len(found) < axes.size else "best")
    layers = len(next(iter(found.values())).spike)
    most = max((site for site in found if site in LINEAR_INPUTS), key=lambda site: float(found[site].zeroed.max()))
    lost = found[most].zeroed
    above(
        fig,
        f"Of what matrices read, the {most} loses most: {float(lost.max()):.0%} of other tokens' entries, in layer "
        f"{int(lost.argmax())}; spike tokens set its range in {len(found[most].touched)} of {layers} layers",
    )
    return fig


@drawn_where_applicable
def costs(crossed: Crossed, found: Mapping[str, Diagnosis]) -> Figure:
    """10: what each technique costs, in every cell it was tried in, and the diagnosis beside it."""
    names = list(crossed.with_it)
    fig, ax = figure(size=(11.5, 0.42 * len(names) + 1.6))
    for i, name in enumerate(names):
        ax.plot(found[name].interval, [i, i], color="black", lw=1.2)
        verdict = "" if found[name].verdict == UNKNOWN else found[name].verdict
        ax.text(1.02, i, verdict, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    tried = [cell for cell in LOOKS if any(cell in row for row in crossed.with_it.values())]
    for cell in tried:
        colour, marker = LOOKS[cell]
        at = {i: crossed.cost(name, cell) for i, name in enumerate(names) if cell in crossed.with_it[name]}
        face = "white" if cell in (NO_SINK, NEITHER) else colour
        lane = [i + LANES.get(cell, 0) for i in at]  # cells often coincide
        ax.plot(list(at.values()), lane, marker=marker, color=colour, mfc=face, ms=6, lw=0, label=cell)
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="perplexity, times the same cell's without it (line: 95% over windows)")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    log_ticks(ax.xaxis)
    ax.legend(fontsize=8.5, ncols=len(tried), loc="lower left", bbox_to_anchor=(0, 1))
    if told := [name for name in names if found[name].verdict not in (FINE, UNSURE, UNKNOWN)]:
        one = found[worst := max(told, key=crossed.cost)]
        remedies = {NO_SPIKE: one.without_spike, one.remedy: one.with_sink}
        helping = [f"{share} {remedy}" for remedy, share in remedies.items() if share is not None and share.ends[1] < 1]
        found_left = f"left of that: {', '.join(helping)}" if helping else "no remedy that was tried surely helps"
        above(fig, f"“{worst}” costs {one.cost:.2f} times; {found_left}")
    return fig


@styled
def streaming(found: Long) -> Figure:
    """10: along a text that runs through bounded caches, how many times the perplexity with every token it is."""
    fig, ax = figure(size=(11, 4.2))
    losses = {name: streamed.loss for name, streamed in found.streams.items()}
    losses[ANEW] = found.afresh
    ends = []
    for name, loss in losses.items():
        colour, style = STREAMED[name]
        more = (loss - found.lengths.loss).mean(0).double().numpy()
        width = min(SMOOTHED, max(1, len(more) // 8))
        running = np.exp(np.convolve(more, np.ones(width) / width, "valid"))
        at = slice(None, None, max(1, width // 16))  # a running mean is smooth: a few points of it are enough
        ax.plot(np.arange(width - 1, len(more))[at], running[at], color=colour, ls=style, lw=1.4)
        times, low, high = found.times(loss)
        ends.append((float(running[-1]), f"{name}: {times:.2f} ({low:.2f} to {high:.2f})", colour))
    ax.axhline(1, color="black", lw=0.8, ls=":")
    limit = found.lengths.limit
    if limit < found.lengths.lengths[-1]:
        ax.axvline(limit, color="black", lw=0.8, ls=":")
        ax.text(limit, 0.99, " the model's limit", transform=ax.get_xaxis_transform(), va="top", fontsize=9)
    ax.set(yscale="log", xlabel="position in the text")
    ax.set_ylabel(f"perplexity, times that with every token\n(mean of {SMOOTHED} predictions)")
    thousands(ax, "x")
    log_ticks(ax.yaxis)
    _names_at_the_end(ax, ends)
    if found.streams:
        alone, first = (found.times(found.streams[name].loss)[0] for name in (cache.WINDOW, cache.WITH_FIRST))
        above(
            fig,
            f"With the last {BUDGET} tokens alone, perplexity is {alone:.2f} times that with every token; "
            f"with the first four among them {first:.2f} times",
        )
    return fig


def _names_at_the_end(ax, ends: Sequence[tuple[float, str, str]]) -> None:
    """Label curves at their last values, moved apart where they would overlap."""
    low, high = np.log(ax.get_ylim())
    placed = -math.inf
    for value, name, colour in sorted(ends):
        placed = max((math.log(value) - low) / (high - low), placed + 0.06)
        ax.text(1.01, placed, name, color=colour, transform=ax.transAxes, va="center", fontsize=9)


@drawn_where_applicable
def lengths(found: Lengths) -> Figure:
    """10: sink ratio, largest activations and perplexity by length, to the model's limit and past it."""
    fig, (left, middle, right) = figure(1, 3, size=(13, 3.9))
    x = found.lengths
    n, late = len(found.throughout), found.late_ratios()
    left.plot(x, found.sink_ratios, color=SINK, ls=":", lw=1.6, label="all queries so far, all layers")
    if n:
        of = "this stretch's queries" + (f", {n} layers that see so far" if n < len(found.sight) else "")
        left.plot(x, late, color=SINK, marker="o", ms=5, label=of)
        other = found.late_ratios(found.other)
        left.plot(x, other, color=ORDINARY, marker="s", ms=5, ls="--", label=f"the same, to position {OTHER}")
    left.set(ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6), ylabel="sink ratio")  # with room for the names
    left.legend(fontsize=8.5, loc="upper left")
    middle.plot(x, [found.first] * len(x), color=SPIKE, marker="o", ms=5, label="position 0")
    middle.plot(x, found.elsewhere, color=ORDINARY, marker="s", ms=5, ls="--", label="elsewhere in this stretch")
    middle.set(yscale="log", ylabel="largest entry of the stream")
    log_ticks(middle.yaxis)
    middle.legend(fontsize=8.5)
    low, high = zip(*found.intervals(), strict=True)
    right.fill_between(x, low, high, color="black", alpha=0.12, lw=0)
    right.plot(x, found.perplexities, color="black", marker="o", ms=5)
    right.set(yscale="log", ylabel="perplexity of this stretch (band: 95%)")
    log_ticks(right.yaxis)
    for ax in (left, middle, right):
        ax.set(xscale="log", xlabel="tokens of context")
        ax.set_xticks(x, [f"{length:,}" for length in x], rotation=45, fontsize=8.5)
        ax.xaxis.set_minor_formatter(NullFormatter())
        if x[-1] > found.limit:
            ax.axvline(found.limit, color="black", lw=0.8, ls=":")
    last, ratios = sum(length <= found.limit for length in x) - 1, late if n else found.sink_ratios
    above(
        fig,
        f"From {x[0]:,} to {x[last]:,} tokens the sink ratio goes from {ratios[0]:.2f} to {ratios[last]:.2f}"
        + (" (upright line: the model's limit)" if x[-1] > found.limit else ""),
    )
    return fig


@drawn_where_applicable
def recalled(found: Recall) -> Figure:
    """10: what is recalled of a fact by the depth it was told at, under each cache; beside it, perplexity."""
    names = list(found.gained)
    depths = list(found.gained[names[0]])
    values = np.array([[found.gained[name][depth] for depth in depths] for name in names])
    fig, ax = figure(size=(8.5, 0.42 * len(names) + 1.7))
    top = max(1.0, float(values.max()))
    ax.imshow(values, cmap=SINK_MAP, vmin=0, vmax=top, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            colour = "white" if value > 0.6 * top else "black"
            ax.text(j, i, f"{round(value, 1) + 0.0:.1f}", ha="center", va="center", color=colour)
        beside = f"perplexity {brief(found.perplexity[names[i]])}"
        ax.text(1.02, i, beside, transform=ax.get_yaxis_transform(), va="center")
    ax.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="told at this depth of the text")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    above(fig, "How much likelier the answer is where it was told than where another was: nats a token")
    return fig
