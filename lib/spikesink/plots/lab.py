"""The figures of notebook 09: what training does to spike and sink."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from scipy.optimize import linear_sum_assignment

from spikesink import paper
from spikesink.chain.trace import Profile
from spikesink.common import brief
from spikesink.lab.changes import AGREES, DIFFERS, LATE, UNDECIDED, Compared, title_of
from spikesink.lab.families import AGAINST, BASE, FAMILIES, FAMILY
from spikesink.plots.style import (
    ORDINARY,
    OTHERS,
    SINK,
    SPIKE,
    above,
    absent,
    drawn_where_applicable,
    figure,
    styled,
    thousands,
)

FAMILY_COLOURS = dict(zip(FAMILIES, (ORDINARY, OTHERS[0], SPIKE, OTHERS[1], SINK, OTHERS[2]), strict=True))
FAMILY_MARKERS = dict(zip(FAMILIES, "osD^vP", strict=True))
# Of the variants of one family; but for the yellow, in which a name cannot be read.
VARIANT_COLOURS = [colour for i, colour in enumerate(sns.color_palette("colorblind").as_hex()) if i != 8]
MARKS = {"up": "+", "down": "\N{MINUS SIGN}", "stays": "=", paper.AT_LEAST: "\N{GREATER-THAN OR EQUAL TO}"}
OUTCOME_COLOURS = {AGREES: OTHERS[0], DIFFERS: SPIKE, UNDECIDED: ORDINARY, None: ORDINARY}

Point = tuple[str, float, float, str]  # name, x, y, colour


@drawn_where_applicable
def family(runs: pd.DataFrame, name: str) -> Figure:
    """09: a family in the plane of largest activation and sink ratio, a point a seed; beside it the paper's models.

    Lines join the seeds of a variant. Squares are what others are compared with (filled: the base), diamonds the same
    by late queries. Where the paper has a sink ratio alone it is a tick at the left.
    """
    fig, (ours, theirs) = figure(1, 2, size=(12, 4.4), width_ratios=(1.2, 1))
    here = [
        (row.name, row.max_activation, row.sink_ratio, _colour(row.name))
        for row in runs[["name", "max_activation", "sink_ratio"]].itertuples(index=False, name="Run")
    ]
    reported = {BASE: (*paper.TRAINED_BASE, "black")}
    for variant, ends in paper.TRAINED_VARIANTS[name].items():
        model = f"{variant} ({paper.TRAINED_AS[variant]})" if variant in paper.TRAINED_AS else variant
        reported[model] = (*ends, _colour(variant))
    numbers = {model: ends for model, ends in reported.items() if isinstance(ends[0], float)}
    there = [(model, spike, sink, colour) for model, (sink, spike, colour) in numbers.items() if spike is not None]
    ticks = [(model, sink, colour) for model, (sink, spike, colour) in numbers.items() if spike is None]
    worded = [f"{model}: {sink}" for model, (sink, *_) in reported.items() if isinstance(sink, str)]
    for ax, points, title in ((ours, here, "Here, 1 million parameters"), (theirs, there, "In the paper, 7B")):
        for variant in dict.fromkeys(point[0] for point in points):
            x, y, (colour, *_) = zip(*sorted(point[1:] for point in points if point[0] == variant), strict=True)
            looks = {"mfc": "white", "mew": 1.5} if _is_compared_with(variant) and variant != BASE else {"mec": "white"}
            marker = "o" if not _is_compared_with(variant) else "D" if variant.endswith(LATE) else "s"
            ax.plot(x, y, marker=marker, color=colour, lw=0.5, ms=7, **looks)
        _plane(ax)
        ax.set_title(title, fontsize=11)
        _leaders(ax, points)
    for model, sink, colour in ticks:
        theirs.plot(0, sink, marker="_", color=colour, ms=14, mew=2, transform=theirs.get_yaxis_transform())
        theirs.text(0.03, sink, model, color=colour, fontsize=8.5, va="center", transform=theirs.get_yaxis_transform())
    notes = ["at the left: a sink ratio alone"] if ticks else []
    notes += [f"sink ratio, {'; '.join(worded)}"] if worded else []
    if notes:
        theirs.set_xlabel("largest activation\n" + textwrap.fill(f"({'; '.join(notes)})", 60))
    return fig


def _is_compared_with(variant: str) -> bool:
    """Whether other variants are compared with it."""
    return variant.removesuffix(LATE) in AGAINST.values()


def _colour(variant: str) -> str:
    """Black for what others are compared with, and within a family one of its own for each of the others."""
    if _is_compared_with(variant):
        return "black"
    return VARIANT_COLOURS[[name for name in FAMILY if FAMILY[name] == FAMILY[variant]].index(variant)]


def _plane(ax) -> None:
    """The axes of largest activation and sink ratio."""
    ax.set(xscale="log", xlabel="largest activation", ylabel="sink ratio")
    ax.margins(x=0.12, y=0.12)
    low, high = ax.get_ylim()
    low = min(-0.02, low)
    ax.set_ylim(low, high + 0.08 * (high - low))
    _written_out(ax, "x")


def _written_out(ax, which: str) -> None:
    """A logarithmic axis whose ticks read 1, 2, 5, 10 and so on, for values that span less than a few decades."""
    axis = getattr(ax, f"{which}axis")
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_minor_formatter(NullFormatter())
    thousands(ax, which)


def _leaders(ax, points: Sequence[Point], side: str = "right", fontsize: float = 8.5) -> None:
    """Name points in a column beside the axes, each name once and on a line to the middle one of its points."""
    named: dict[str, list[Point]] = {}
    for point in points:
        named.setdefault(point[0], []).append(point)
    # The point whose activation is the middle one's: a mean could lie where there is none.
    middles = [sorted(of, key=lambda point: point[1])[len(of) // 2] for of in named.values()]
    middles.sort(key=lambda middle: middle[2])
    ax.autoscale_view()  # what is drawn so far sets the limits that places are read off
    ends = (ax.transData - ax.transAxes).transform([(x, y) for _, x, y, _ in middles])
    heights = ends[:, 1].tolist()
    step = min(0.065 * fontsize / 8.5 * 4.4 / ax.figure.get_figheight(), 1 / max(1, len(middles)))
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    heights[-1] = min(heights[-1], 0.97)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - step)
    right = side == "right"
    column = 1.02 if right else -0.1
    # Lines of the least length together do not cross.
    _, order = linear_sum_assignment(np.hypot(ends[:, :1] - column, ends[:, 1:] - heights))
    for (name, x, y, colour), place in zip(middles, order, strict=True):
        ax.annotate(
            name,
            (x, y),
            (column, heights[place]),
            textcoords="axes fraction",
            ha="left" if right else "right",
            va="center",
            fontsize=fontsize,
            color=colour,
            arrowprops={
                "arrowstyle": "-",
                "lw": 0.4,
                "color": colour,
                "alpha": 0.6,
                "relpos": (0 if right else 1, 0.5),  # a line from its middle would cross other names
                "shrinkB": 4,
            },
        )


@drawn_where_applicable
def changes(compared: Sequence[Compared]) -> Figure:
    """09: how each variant differs from the base, with its interval over seeds, and which way the paper's goes."""
    if not compared:
        return absent("no variant is trained yet")
    fig, axes = figure(1, 2, size=(11, 0.34 * len(compared) + 1.6), sharey=True)
    rows = range(len(compared))
    for ax, measure in zip(axes, ("sink", "spike"), strict=True):
        ax.axvline(0, color="black", lw=0.8)
        for row, one in zip(rows, compared, strict=True):
            change = getattr(one, measure)
            colour = OUTCOME_COLOURS[change.outcome]
            width = 2 if change.outcome else 0.8  # where the paper says nothing, there is nothing to judge
            ax.plot([change.low, change.high], [row, row], color=colour, lw=width, solid_capstyle="butt")
            ax.plot(change.value, row, marker="o", color=colour, mfc=colour if one.seeds > 1 else "white", ms=6)
            mark = MARKS.get(change.paper, "")
            ax.annotate(mark, (1.02, row), xycoords=("axes fraction", "data"), ha="center", va="center", fontsize=11)
        ax.annotate("paper", (1.02, 1.005), xycoords="axes fraction", ha="center", va="bottom", fontsize=8)
        ax.grid(axis="x", lw=0.4)
    for row in _family_starts([one.name for one in compared]):
        for ax in axes:
            ax.axhline(row - 0.5, color=ORDINARY, lw=0.5)
    axes[0].set_yticks(rows, [one.title for one in compared], fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("change of the sink ratio\n(thin: the paper says nothing)")
    axes[1].set_xlabel("largest activation, times the base's\n(or that of what a variant is set against)")
    ticks = [
        t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if axes[1].get_xlim()[0] < math.log(t) < axes[1].get_xlim()[1]
    ]
    axes[1].xaxis.set_major_locator(FixedLocator([math.log(t) for t in ticks]))
    axes[1].set_xticklabels([f"{t:g}" for t in ticks])
    outcomes = [change.outcome for one in compared for change in (one.sink, one.spike)]
    count = Counter(outcome for outcome in outcomes if outcome)
    above(
        fig,
        f"Of {count.total()} changes that the paper reports, {count[AGREES]} go its way here, "
        f"{count[DIFFERS]} another, {count[UNDECIDED]} stay open",
    )
    return fig


def _family_starts(names: Sequence[str]) -> list[int]:
    """The rows of variants at which another family begins, but for the first row."""
    return [row for row in range(1, len(names)) if FAMILY.get(names[row]) != FAMILY.get(names[row - 1])]


@drawn_where_applicable
def decoupling(means: pd.DataFrame) -> Figure:
    """09: all variants in one plane, but those judged by late queries; the base's values divide it into four.

    Sizes are in medians of the stream. `means` are as `findings.average_seeds` gives them.
    """
    fig, ax = figure(size=(12, 6.4))
    means = means[~means["late"]]
    base = means.loc[BASE]
    ax.set_yscale("function", functions=(lambda y: np.sign(y) * np.sqrt(np.abs(y)), lambda y: np.sign(y) * y**2))
    ax.axvline(base["over_median"], color="black", lw=0.6, ls=":")
    ax.axhline(base["sink_ratio"], color="black", lw=0.6, ls=":")
    points = [
        (name, x, y, FAMILY_COLOURS[FAMILY[name]] if name in FAMILY else "black")
        for name, x, y in means[["over_median", "sink_ratio"]].itertuples()
    ]
    for name, colour in FAMILY_COLOURS.items():
        ours = means[means.index.map(FAMILY) == name]
        style = {"color": colour, "marker": FAMILY_MARKERS[name], "lw": 0, "ms": 8, "mfc": "none", "mew": 1.6}
        ax.plot(ours["over_median"], ours["sink_ratio"], label=name, **style)
    ax.plot(base["over_median"], base["sink_ratio"], marker="*", color="black", ms=15, lw=0, mec="white")
    _plane(ax)
    ax.set_ylim(bottom=-0.004)
    corners = {
        (0.01, 0.99): "more sink, less spike",
        (0.99, 0.99): "more of both",
        (0.01, 0.01): "less of both",
        (0.99, 0.01): "more spike, less sink",
    }
    for (x, y), text in corners.items():
        sides = {"ha": "left" if x < 0.5 else "right", "va": "top" if y > 0.5 else "bottom"}
        ax.text(x, y, text, transform=ax.transAxes, color=ORDINARY, fontsize=9, style="italic", **sides)
    points.sort(key=lambda point: point[1])
    ax.set(xlabel="largest activation, in medians of the stream", ylabel="")
    ax.text(0, 1.01, "sink ratio", transform=ax.transAxes, ha="right")  # clear of the lines on the left
    ax.yaxis.set_zorder(4)  # numbers over the lines to names on the left
    for number in ax.get_yticklabels():
        number.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})
    _leaders(ax, points[: len(points) // 2], "left", 9)
    _leaders(ax, points[len(points) // 2 :], "right", 9)
    ax.legend(fontsize=9, loc="upper center", ncols=6, bbox_to_anchor=(0.5, 1.08))
    return fig


@styled
def emergence(curves: pd.DataFrame, unit: str = "tokens") -> Figure:
    """09: loss, largest activations, position 0's as a multiple of the rest, and sinks over training, of some runs."""
    fig, axes = figure(1, 4, size=(14.5, 3.8))
    for _, run in curves.groupby(["name", "seed"], sort=False):
        x = run[unit].clip(lower=1) / 1e6
        axes[0].plot(x, run["held_out_loss"], color="black", lw=1.4)
        axes[1].plot(x, run["max_first"], color=SPIKE, lw=1.6)
        axes[1].plot(x, run["max_elsewhere"], color=ORDINARY, lw=1.4, ls="--")
        axes[2].plot(x, run["max_first"] / run["max_elsewhere"], color=SPIKE, lw=1.6)
        axes[3].plot(x, run["sink_ratio"], color=SINK, lw=1.6)
        axes[3].plot(x, run["attention"], color=SINK, lw=1.2, ls="--")
    last = curves.groupby(["name", "seed"], sort=False).last()
    axes[1].set_yscale("log")
    thousands(axes[1])
    for ax, name, y, below, colour in (
        (axes[1], "position 0", last["max_first"].max(), 8, SPIKE),
        (axes[1], "elsewhere", last["max_elsewhere"].min(), -14, ORDINARY),
        (axes[3], "sink ratio", last["sink_ratio"].max(), 8, SINK),
        (axes[3], "attention", last["attention"].min(), -14, SINK),
    ):
        ax.annotate(name, (x.iloc[-1], y), (0, below), textcoords="offset points", ha="right", color=colour)
    axes[2].axhline(1, color="black", lw=0.8, ls=":")
    axes[2].set_ylim(bottom=0)
    axes[3].margins(y=0.12)
    for ax, title, label in zip(
        axes,
        ("Loss", "Sizes", "Spike", "Sink"),
        (
            "loss on held-out text (nats)",
            "largest activation",
            "position 0 over elsewhere",
            "sink ratio, attention to position 0",
        ),
        strict=True,
    ):
        ax.set(xlabel="tokens trained on (million)", ylabel=label)
        ax.set_title(title, fontsize=11)
    return fig


@styled
def dormant(curves: pd.DataFrame, held: pd.Series) -> Figure:
    """09: Bigram-Backcopy, live: copying is learned, and queries that have nothing to copy learn where to look.

    A panel for the loss and one for each name; a line a seed, and above it what queries with nothing to copy leave at
    position 0 in the end (`held`, by name and seed).
    """
    names = list(curves["name"].unique())
    fig, (learned, *panels) = figure(1, 1 + len(names), size=(3.9 * (1 + len(names)), 3.6))
    for ax, name in zip(panels, names, strict=True):
        style = "-" if name == names[0] else "--"
        for seed, run in curves[curves["name"] == name].groupby("seed"):
            label = name if seed == curves["seed"].min() else None
            learned.plot(run["step"], run["copy_loss"], color="black", ls=style, lw=1.2, label=label)
            ax.plot(run["step"], 100 * run["attention_other"], color=SINK, lw=1.8)
            ax.plot(run["step"], 100 * run["attention_trigger"], color=ORDINARY, lw=1.2)
        each = f" ({', '.join(f'{share:.0%}' for share in held[name])})" if len(held[name]) > 1 else ""
        ax.set_title(f"{name}: {held[name].mean():.0%} at position 0 when idle{each}", fontsize=11)
        ax.set(xlabel="step", ylabel="attention to position 0 (%)", ylim=(0, 118))
        for colour, text, height in ((SINK, "queries with nothing to copy", 0.98), (ORDINARY, "triggers", 0.91)):
            ax.text(0.02, height, text, color=colour, transform=ax.transAxes, va="top", fontsize=9)
    learned.set(xlabel="step", ylabel="loss on copied tokens (nats)")
    learned.set_ylim(bottom=0)
    learned.legend(fontsize=9)
    return fig


@drawn_where_applicable
def waiting(waits: pd.DataFrame) -> Figure:
    """09: Bigram-Backcopy, all variants: attention to position 0 of the head that waits there most, a point a seed.

    Dots are queries that have nothing to copy (open where the model was not trained on most of them), ticks triggers,
    at the height of their dot; shaded from the least to the most of the base. `waits`: of `findings.compare_waits`.
    """
    variants = waits.drop_duplicates("name")
    names = list(variants["name"])
    fig, ax = figure(size=(9, 0.33 * len(names) + 1.6))
    for row, name in enumerate(names):
        runs = waits[waits["name"] == name]
        heights = row + 0.22 * (runs["seed"] - 1)
        colour = "black" if name == BASE else SINK if runs["less"].all() else ORDINARY
        filled = "white" if runs["late"].all() else colour
        ax.plot(100 * runs["idle"], heights, marker="o", lw=0, ms=5, mfc=filled, color=colour)
        ax.plot(100 * runs["trigger"], heights, marker="|", lw=0, ms=6, mew=1.2, color=colour)
        if name == BASE:
            ax.axvspan(100 * runs["idle"].min(), 100 * runs["idle"].max(), color=ORDINARY, alpha=0.12, lw=0)
    for row in _family_starts(names):
        ax.axhline(row - 0.5, color=ORDINARY, lw=0.5)
        at = {"transform": ax.get_yaxis_transform(), "va": "center"}
        ax.text(1.01, row, FAMILY[names[row]], fontsize=9, style="italic", **at)
    ax.set_yticks(range(len(names)), list(map(title_of, names)), fontsize=9)
    ax.set(xlim=(-2, 102), ylim=(len(names) - 0.5, -0.5))
    ax.set_xlabel(
        "attention to position 0 (%), in the head where idle queries give it most: of queries with nothing to copy\n"
        "(dots; open: not trained on most of them) and of triggers (ticks)"
    )
    above(
        fig,
        f"{variants['less'].sum()} of {variants['judged'].sum()} variants: all seeds below any they are compared with "
        f"(blue); by chance {variants['by_chance'].sum():.1f}",
    )
    return fig


@styled
def growing(profiles: Mapping[str, Profile]) -> Figure:
    """09: how large each token of one window is, block by block, in models of our own; position 0 on top.

    Above each, where position 0 is largest beside the middle one of the other tokens at the same block.
    """
    fig, axes = figure(1, len(profiles), size=(5.2 * len(profiles), 3.8), squeeze=False)
    for ax, (name, profile) in zip(axes[0], profiles.items(), strict=True):
        points = range(len(profile.median))
        ax.plot(points, profile.magnitude[:, 1:], color=ORDINARY, lw=0.6, alpha=0.5)
        ax.plot(points, profile.magnitude[:, 0], color=SPIKE, lw=2)
        ax.plot(points, profile.median, color="black", lw=1, ls=":")
        for text, values, colour, below in (
            ("position 0", profile.magnitude[:, 0], SPIKE, 6),
            ("median entry", profile.median, "black", -28),
        ):
            ax.annotate(
                text, (points[-1], values[-1]), (-2, below), textcoords="offset points", ha="right", color=colour
            )
        ax.set(yscale="log", xlabel="block", ylabel="largest entry of the stream")
        apart = float((profile.magnitude[:, 0] / profile.magnitude[:, 1:].median(1).values).max())
        ax.set_title(f"{name}: position 0 up to {brief(apart)} times the middle one", fontsize=11)
        thousands(ax)
    return fig
