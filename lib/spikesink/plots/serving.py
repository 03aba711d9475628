"""The figures of notebook 10: what serving does, with and without spike and sink."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from spikesink.common import brief
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SINK_MAP, SPIKE
from spikesink.plots.style import above, drawn_where_applicable, figure, log_ticks, styled, thousands, whole
from spikesink.serving import cache, context
from spikesink.serving.cells import NEITHER, NO_SINK, NO_SPIKE, SINK_EXEMPT, SINK_HELD, UNCHANGED, Crossed
from spikesink.serving.context import OTHER, Lengths, LongRun, Recall
from spikesink.serving.diagnosis import NOT_TESTED, Diagnosis, is_failure
from spikesink.serving.quantize import INPUTS, Range

# Colour, marker, whether it is filled, and where in its row it is drawn: cells often coincide.
CELL_MARKS = {
    UNCHANGED: ("black", "o", True, 0),
    SINK_EXEMPT: (SINK, "s", True, -0.25),
    SINK_HELD: (SINK, "P", True, -0.25),
    NO_SPIKE: (SPIKE, "D", True, 0.25),
    NO_SINK: (OTHERS[2], "v", False, 0),
    NEITHER: (ORDINARY, "^", False, 0),
}
STREAM_LINES = {
    cache.WINDOW: (SPIKE, "-"),
    cache.OTHERS: (ORDINARY, "-."),
    cache.WITH_FIRST: (SINK, "-"),
    cache.SHIFTED: (OTHERS[0], "--"),
    context.RECOMPUTED: ("black", "-"),
}
SMOOTHED = 256  # predictions in a running mean


@drawn_where_applicable
def quantizer_steps(ranges: Mapping[str, Range]) -> Figure:
    """10: site by site, how large entries of spike tokens and of others are, and the step of int8 per-tensor."""
    columns = 4
    rows = -(-len(ranges) // columns)
    fig, axes = figure(rows, columns, size=(13, 2.9 * rows), sharex=True, squeeze=False)
    for ax, (site, at_site) in zip(axes.flat, ranges.items(), strict=False):
        layers, half_step = np.arange(len(at_site.spike)), at_site.step() / 2
        ax.plot(layers, at_site.spike, color=SPIKE, marker="o", ms=3, label="largest, spike tokens")
        ax.plot(layers, at_site.other, color="black", lw=1.2, ls="--", label="largest, other tokens")
        ax.plot(layers, at_site.median, color=ORDINARY, lw=1.2, ls="-.", label="median, other tokens")
        ax.fill_between(layers, half_step, color=SINK, alpha=0.2, lw=0, label="rounded to zero by int8 per-tensor")
        smallest = float(min(at_site.median.min(), half_step.min()))
        ax.set(yscale="log", ylim=(max(smallest, 1e-6) / 5, None))
        ax.set_title(site, fontsize=10)
        whole(ax)
    for ax in axes.flat:
        ax.tick_params(labelbottom=True)
    for ax in axes.flat[len(ranges) :]:
        ax.axis("off")
    fig.supxlabel("layer")
    fig.supylabel("size of an entry")
    axes.flat[-1].legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8.5, loc="center")  # a free place
    if multiplied := [site for site in ranges if site in INPUTS]:
        worst = max(multiplied, key=lambda site: float(ranges[site].zeroed.max()))
        zeroed, n = ranges[worst].zeroed, len(ranges[worst].set_by_spike)
        above(
            fig,
            f"Of what matrices multiply, {worst} loses most: {float(zeroed.max()):.0%} of other tokens' entries, in "
            f"layer {int(zeroed.argmax())}; spike tokens set its range in {n} of {len(zeroed)} layers",
        )
    return fig


@drawn_where_applicable
def costs(crossed: Crossed, diagnoses: Mapping[str, Diagnosis]) -> Figure:
    """10: what each technique costs, in every cell it was tried in, and its diagnosis."""
    names = list(crossed.with_it)
    fig, ax = figure(size=(11.5, 0.42 * len(names) + 1.6))
    for i, name in enumerate(names):
        ax.plot(diagnoses[name].interval, [i, i], color="black", lw=1.2)
        if diagnoses[name].verdict != NOT_TESTED:
            ax.text(1.02, i, diagnoses[name].verdict, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
    for cell, (colour, marker, filled, lane) in CELL_MARKS.items():
        at = [(crossed.cost(name, cell), i + lane) for i, name in enumerate(names) if cell in crossed.with_it[name]]
        if at:
            face = colour if filled else "white"
            ax.plot(*zip(*at, strict=True), marker=marker, color=colour, mfc=face, ms=6, lw=0, label=cell)
    ax.axvline(1, color="black", lw=0.8, ls=":")
    ax.set(xscale="log", xlabel="perplexity over that of the same cell without the technique (line: 95% over windows)")
    ax.set_yticks(range(len(names)), names, fontsize=9)
    ax.invert_yaxis()
    log_ticks(ax.xaxis)
    ax.legend(fontsize=8.5, ncols=len(CELL_MARKS), loc="lower left", bbox_to_anchor=(0, 1))
    told = [name for name, one in diagnoses.items() if is_failure(one.verdict) and one.verdict != NOT_TESTED]
    if told:
        worst = max(told, key=crossed.cost)
        one = diagnoses[worst]
        remedies = {NO_SPIKE: one.without_spike, one.remedy: one.with_sink}
        helping = [f"{share} with {cell}" for cell, share in remedies.items() if share and share.ends[1] < 1]
        left = f"left of that: {', '.join(helping)}" if helping else "no remedy significantly helps"
        above(fig, f"{worst} costs {one.cost:.2f} times the perplexity; {left}")
    return fig


@styled
def streaming(run: LongRun) -> Figure:
    """10: along a text that runs through bounded caches, how many times the full cache's perplexity it is."""
    fig, ax = figure(size=(11, 4.2))
    for name, loss in run.streams.items():
        colour, style = STREAM_LINES[name]
        more = pd.Series((loss - run.lengths.loss).mean(0).double().numpy())
        width = min(SMOOTHED, max(1, len(more) // 8))
        running = np.exp(more.rolling(width).mean())[width - 1 :: max(1, width // 16)]  # it is smooth: a few points do
        times, low, high = run.times(name)
        ax.plot(running, color=colour, ls=style, lw=1.4, label=f"{name}: {times:.2f} ({low:.2f} to {high:.2f})")
    ax.axhline(1, color="black", lw=0.8, ls=":")
    limit = run.lengths.limit
    if limit < run.lengths.lengths[-1]:
        ax.axvline(limit, color="black", lw=0.8, ls=":")
        ax.text(limit, 0.99, " the model's limit", transform=ax.get_xaxis_transform(), va="top", fontsize=9)
    ax.set(yscale="log", xlabel="position in the text")
    ax.set_ylabel(f"perplexity over the full cache's\n(mean of {SMOOTHED} predictions)")
    thousands(ax, "x")
    log_ticks(ax.yaxis)
    ax.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    if cache.WINDOW in run.streams:
        window, with_first = (run.times(name)[0] for name in (cache.WINDOW, cache.WITH_FIRST))
        above(
            fig,
            f"With the last {context.BUDGET} tokens alone, perplexity is {window:.2f} times the full cache's; "
            f"with the first four among them {with_first:.2f} times",
        )
    return fig


@drawn_where_applicable
def lengths(measured: Lengths) -> Figure:
    """10: sink ratio, largest entries and perplexity by length, to the model's limit and past it."""
    fig, (left, middle, right) = figure(1, 3, size=(13, 3.9))
    x, n = measured.lengths, len(measured.full_sight)
    ratios = measured.late_ratios() if n else measured.sink_ratios
    left.plot(x, measured.sink_ratios, color=SINK, ls=":", lw=1.6, label="all queries so far, all layers")
    if n:
        some = f", {n} layers that see so far" if n < len(measured.sight) else ""
        left.plot(x, ratios, color=SINK, marker="o", ms=5, label=f"this stretch's queries{some}")
        control = measured.late_ratios(other=True)
        left.plot(x, control, color=ORDINARY, marker="s", ms=5, ls="--", label=f"the same, to position {OTHER}")
    left.set(ylim=(-0.03, 1.4), yticks=np.linspace(0, 1, 6), ylabel="sink ratio")  # with room for the names
    left.legend(fontsize=8.5, loc="upper left")
    middle.plot(x, [measured.first] * len(x), color=SPIKE, marker="o", ms=5, label="position 0")
    middle.plot(x, measured.elsewhere, color=ORDINARY, marker="s", ms=5, ls="--", label="elsewhere in this stretch")
    middle.set(yscale="log", ylabel="largest entry of the stream")
    middle.legend(fontsize=8.5)
    right.fill_between(x, *zip(*measured.intervals(), strict=True), color="black", alpha=0.12, lw=0)
    right.plot(x, measured.perplexities, color="black", marker="o", ms=5)
    right.set(yscale="log", ylabel="perplexity of this stretch (band: 95%)")
    for ax in (middle, right):
        log_ticks(ax.yaxis)
    for ax in (left, middle, right):
        ax.set(xscale="log", xlabel="tokens of context")
        ax.set_xticks(x, [f"{length:,}" for length in x], rotation=45, fontsize=8.5)
        ax.xaxis.set_minor_formatter(NullFormatter())
        if x[-1] > measured.limit:
            ax.axvline(measured.limit, color="black", lw=0.8, ls=":")
    last = sum(length <= measured.limit for length in x) - 1
    limit = " (upright line: the model's limit)" if x[-1] > measured.limit else ""
    above(
        fig,
        f"From {x[0]:,} to {x[last]:,} tokens the sink ratio goes from {ratios[0]:.2f} to {ratios[last]:.2f}{limit}",
    )
    return fig


@drawn_where_applicable
def recalled(recall: Recall) -> Figure:
    """10: what is recalled of a fact by the depth it was told at, under each cache; and perplexity."""
    names, depths = list(recall.gained), list(next(iter(recall.gained.values())))
    values = np.array([[recall.gained[name][depth] for depth in depths] for name in names])
    fig, ax = figure(size=(8.5, 0.42 * len(names) + 1.7))
    top = max(1.0, float(values.max()))
    ax.imshow(values, cmap=SINK_MAP, vmin=0, vmax=top, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        colour = "white" if value > 0.6 * top else "black"
        ax.text(j, i, f"{round(value, 1) + 0.0:.1f}", ha="center", va="center", color=colour)
    for i, name in enumerate(names):
        perplexity = f"perplexity {brief(recall.perplexity[name])}"
        ax.text(1.02, i, perplexity, transform=ax.get_yaxis_transform(), va="center")
    ax.set_xticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="told at this depth of the text")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    above(fig, "How much likelier the answer is where it was told than where another was: nats a token")
    return fig
