"""The figures of notebook 09: what training does to spike and sink."""

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, LogLocator, NullFormatter
from scipy.optimize import linear_sum_assignment

from spikesink import paper
from spikesink.claims import brief
from spikesink.lab.families import BASE
from spikesink.lab.findings import (
    AGREES,
    DIFFERS,
    FAMILY,
    LEAST_VARIANTS,
    NO_RECORDS,
    UNDECIDED,
    Compared,
    at_the_end,
    by_name,
    follow_loss,
    means_of,
    of_family,
)
from spikesink.lab.records import Record
from spikesink.plots.style import ORDINARY, OTHERS, SINK, SPIKE, above, absent, figure, styled, thousands
from spikesink.trace import Profile

FAMILY_COLOURS = dict(
    zip(
        ("optimization", "ffn", "normalization", "heads", "gates", "context"),
        (ORDINARY, OTHERS[0], SPIKE, OTHERS[1], SINK, OTHERS[2]),
        strict=True,
    )
)
FAMILY_MARKERS = dict(zip(FAMILY_COLOURS, "osD^vP", strict=True))


Point = tuple[str, float, float, str]  # name, x, y, colour


@styled
def family(records: Sequence[Record], name: str) -> Figure:
    """09: a family in the plane of largest activation and sink ratio, a point a seed; beside it the paper's models."""
    fig, (ours, theirs) = figure(1, 2, size=(12, 4.4), width_ratios=(1.2, 1))
    here, there, only_sink = [], [(BASE, paper.TRAINED_BASE[1], 100 * paper.TRAINED_BASE[0], "black")], []
    for variant, rows in by_name(of_family(records, name)).items():
        ends = [at_the_end(record) for record in rows]
        here += [(variant, end["max_activation"], 100 * end["sink_ratio"], _colour(variant)) for end in ends]
    for variant, (sink, spike) in paper.TRAINED_VARIANTS[name].items():
        if isinstance(sink, float) and spike is not None:
            there.append((variant, spike, 100 * sink, SPIKE))
        elif sink is not None:
            said = f"{sink:.0%}" if isinstance(sink, float) else sink
            only_sink.append(f"{variant}: {said}")
    for ax, points, title in ((ours, here, "Here, 1 million parameters"), (theirs, there, "In the paper, 7B")):
        for variant, x, y, colour in points:
            ax.plot(x, y, marker="s" if variant == BASE else "o", color=colour, lw=0, ms=7, mec="white")
        _plane(ax)
        ax.set_title(title, fontsize=11)
        _leaders(ax, points)
    if only_sink:
        theirs.set_xlabel("largest activation\n(sink ratio alone: " + _wrapped("; ".join(only_sink)) + ")")
    return fig


def _colour(variant: str) -> str:
    return "black" if variant == BASE else SPIKE


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, 60))


def _plane(ax) -> None:
    """The axes of largest activation and sink ratio."""
    ax.set(xscale="log", xlabel="largest activation", ylabel="sink ratio (%)")
    ax.margins(x=0.12, y=0.12)
    low, high = ax.get_ylim()
    ax.set_ylim(min(-2.0, low), high + 0.08 * (high - min(-2.0, low)))
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
    low, high = ax.get_ylim()
    heights = [(y - low) / (high - low) for *_, y, _ in middles]
    step = min(0.065 * fontsize / 8.5 * 4.4 / ax.figure.get_figheight(), 1 / max(1, len(middles)))
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + step)
    heights[-1] = min(heights[-1], 1.0)
    for i in reversed(range(len(heights) - 1)):
        heights[i] = min(heights[i], heights[i + 1] - step)
    right = side == "right"
    column = 1.02 if right else -0.1
    ends = (ax.transData - ax.transAxes).transform([(x, y) for _, x, y, _ in middles])
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
            arrowprops={"arrowstyle": "-", "lw": 0.4, "color": colour, "alpha": 0.6, "shrinkB": 4},
        )


@styled
def changes(found: Sequence[Compared]) -> Figure:
    """09: how each variant differs from the base, with its interval over seeds, and which way the paper's goes."""
    if not found:
        return absent(NO_RECORDS)
    fig, axes = figure(1, 2, size=(11, 0.34 * len(found) + 1.6), sharey=True)
    rows = range(len(found))
    for ax, measure in zip(axes, ("sink", "spike"), strict=True):
        ax.axvline(0, color="black", lw=0.8)
        for row, one in zip(rows, found, strict=True):
            change = getattr(one, measure)
            colour = {AGREES: OTHERS[0], DIFFERS: SPIKE, UNDECIDED: ORDINARY, None: ORDINARY}[change.outcome]
            ax.plot([change.low, change.high], [row, row], color=colour, lw=2, solid_capstyle="butt")
            ax.plot(change.value, row, marker="o", color=colour, mfc=colour if one.seeds > 1 else "white", ms=6)
            mark = {"up": "▸", "down": "◂", "stays": "=", None: ""}[change.paper]
            ax.annotate(mark, (1.0, row), xycoords=("axes fraction", "data"), ha="right", va="center", fontsize=11)
        ax.grid(axis="x", lw=0.4)
    axes[0].set_yticks(rows, [one.name for one in found], fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("change of the sink ratio")
    axes[1].set_xlabel("largest activation, times the base's")
    ticks = [
        t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20) if axes[1].get_xlim()[0] < math.log(t) < axes[1].get_xlim()[1]
    ]
    axes[1].xaxis.set_major_locator(FixedLocator([math.log(t) for t in ticks]))
    axes[1].set_xticklabels([f"{t:g}" for t in ticks])
    outcomes = [change.outcome for one in found for change in (one.sink, one.spike)]
    count = Counter(outcome for outcome in outcomes if outcome)
    above(
        fig,
        f"Of {count.total()} changes that the paper reports, {count[AGREES]} go its way here, "
        f"{count[DIFFERS]} another, {count[UNDECIDED]} stay open",
    )
    return fig


@styled
def decoupling(found: Sequence[Compared], base: tuple[float, float]) -> Figure:
    """09: all variants in one plane; the base's values divide it into four."""
    if not found:
        return absent(NO_RECORDS)
    fig, ax = figure(size=(12, 6.4))
    spike, sink = base
    ax.axvline(spike, color="black", lw=0.6, ls=":")
    ax.axhline(100 * sink, color="black", lw=0.6, ls=":")
    points = [(one.name, one.max_activation, 100 * one.sink_ratio, FAMILY_COLOURS[FAMILY[one.name]]) for one in found]
    for name, colour in FAMILY_COLOURS.items():
        mine = [point for point in points if FAMILY[point[0]] == name]
        x, y = ([point[i] for point in mine] for i in (1, 2))
        ax.plot(x, y, color=colour, marker=FAMILY_MARKERS[name], lw=0, ms=7, label=name, mec="white")
    ax.plot(spike, 100 * sink, marker="*", color="black", ms=15, lw=0, mec="white")
    _plane(ax)
    corners = {
        (0.01, 0.99): "more sink, less spike",
        (0.99, 0.99): "more of both",
        (0.01, 0.01): "less of both",
        (0.99, 0.01): "more spike, less sink",
    }
    for (x, y), text in corners.items():
        sides = {"ha": "left" if x < 0.5 else "right", "va": "top" if y > 0.5 else "bottom"}
        ax.text(x, y, text, transform=ax.transAxes, color=ORDINARY, fontsize=9, style="italic", **sides)
    points.append((BASE, spike, 100 * sink, "black"))
    points.sort(key=lambda point: point[1])
    ax.set_ylabel("")
    ax.text(0, 1.01, "sink ratio (%)", transform=ax.transAxes, ha="right")  # clear of the lines on the left
    _leaders(ax, points[: len(points) // 2], "left", 8)
    _leaders(ax, points[len(points) // 2 :], "right", 8)
    ax.legend(fontsize=8.5, loc="upper center", ncols=6, bbox_to_anchor=(0.5, 1.08))
    return fig


@styled
def emergence(curves: pd.DataFrame, unit: str = "tokens") -> Figure:
    """09: loss, largest activations and sink ratio over training, of one or more runs."""
    fig, axes = figure(1, 3, size=(12, 3.8))
    for _, run in curves.groupby(["name", "seed"], sort=False):
        x = run[unit].clip(lower=1) / 1e6
        axes[0].plot(x, run["held_out_loss"], color="black", lw=1.4)
        axes[1].plot(x, run["max_first"], color=SPIKE, lw=1.6)
        axes[1].plot(x, run["max_elsewhere"], color=ORDINARY, lw=1.4, ls="--")
        axes[2].plot(x, 100 * run["sink_ratio"], color=SINK, lw=1.6)
    last = curves.groupby(["name", "seed"], sort=False).last()
    axes[1].set_yscale("log")
    thousands(axes[1])
    for name, y, below, colour in (
        ("position 0", last["max_first"].max(), 8, SPIKE),
        ("elsewhere", last["max_elsewhere"].min(), -14, ORDINARY),
    ):
        axes[1].annotate(name, (x.iloc[-1], y), (0, below), textcoords="offset points", ha="right", color=colour)
    for ax, title, label in zip(
        axes,
        ("Loss", "Spike", "Sink"),
        ("loss on held-out text (nats)", "largest activation", "sink ratio (%)"),
        strict=True,
    ):
        ax.set(xlabel="tokens trained on (million)", ylabel=label)
        ax.set_title(title, fontsize=11)
    return fig


@styled
def following_loss(records: Sequence[Record], name: str = "optimization") -> Figure:
    """09: sink ratio and largest activation against the loss, over the variants of a family and the base."""
    rows = of_family(records, name)
    means = [means_of(name, of) for name, of in by_name(rows).items()]
    fig, axes = figure(1, 2, size=(11, 4.2))
    found = follow_loss(rows) if len(means) >= LEAST_VARIANTS else None
    loss = [mean["loss"] for mean in means]
    for ax, values, colour, label, measure in (
        (axes[0], [100 * mean["sink_ratio"] for mean in means], SINK, "sink ratio (%)", "sink"),
        (axes[1], [mean["max_activation"] for mean in means], SPIKE, "largest activation", "spike"),
    ):
        ax.plot(loss, values, marker="o", lw=0, color=colour, ms=6, mec="white")
        for x, y, mean in zip(loss, values, means, strict=True):
            ax.annotate(mean["name"], (x, y), (5, 4), textcoords="offset points", fontsize=7.5, color=ORDINARY)
        ax.set(xlabel="loss on held-out text (nats)", ylabel=label)
        if found is not None:
            low, high = getattr(found, f"{measure}_interval")
            rho = getattr(found, measure)
            ax.set_title(f"Rank correlation with the loss: {rho:+.2f} ({low:+.2f} to {high:+.2f})", fontsize=11)
    axes[1].set_yscale("log")
    _written_out(axes[1], "y")
    return fig


@styled
def dormant(curves: pd.DataFrame) -> Figure:
    """09: Bigram-Backcopy, live: copying is learned, and the queries that have nothing to copy learn where to look."""
    fig, axes = figure(1, 2, size=(11, 4))
    for name, run in curves.groupby("name", sort=False):
        style = "-" if name == curves["name"].iloc[0] else "--"
        axes[0].plot(run["step"], run["copy_loss"], color="black", ls=style, lw=1.5)
        axes[1].plot(run["step"], 100 * run["attention_other"], color=SINK, ls=style, lw=1.8)
        axes[1].plot(run["step"], 100 * run["attention_trigger"], color=ORDINARY, ls=style, lw=1.5)
        last = run.iloc[-1]
        at = last["step"], 100 * last["attention_other"]
        axes[1].annotate(f" {name}", at, color=SINK, fontsize=9, va="center")
    lines = {"-": curves["name"].iloc[0], "--": curves["name"].iloc[-1]}
    handles = [Line2D([], [], color="black", ls=style, label=name) for style, name in lines.items()]
    axes[0].legend(handles=handles, fontsize=9)
    for colour, text, height in ((SINK, "queries with nothing to copy", 0.97), (ORDINARY, "triggers", 0.9)):
        axes[1].text(0.02, height, text, color=colour, transform=axes[1].transAxes, va="top")
    for ax, label in zip(axes, ("loss on copied tokens (nats)", "attention to position 0 (%)"), strict=True):
        ax.set(xlabel="step", ylabel=label)
        ax.set_ylim(bottom=0, top=1.15 * ax.get_ylim()[1])
    axes[1].margins(x=0.12)
    held = curves.groupby("name", sort=False).last()["attention_other"]
    above(
        fig,
        "; ".join(
            f"{name}: {brief(float(100 * share))}% of the attention waits at position 0" for name, share in held.items()
        ),
    )
    return fig


@styled
def growing(profiles: Mapping[str, Profile]) -> Figure:
    """09: how large each token of one window is, block by block, in models of our own; position 0 on top."""
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
        ax.set_title(f"{name}: {brief(float((profile.magnitude[:, 0] / profile.median).max()))} medians", fontsize=11)
        thousands(ax)
    return fig
