"""The figures of notebook 09: what training does to spike and sink."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from spikesink import paper
from spikesink.chain.trace import Profile
from spikesink.common import brief
from spikesink.lab.changes import AGREES, DIFFERS, UNDECIDED, Compared, title_of
from spikesink.lab.families import BASE, FAMILIES, FAMILY
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SPIKE
from spikesink.plots.style import above, absent, drawn_where_applicable, figure, log_ticks, note, styled, thousands

FAMILY_COLOURS = dict(zip(FAMILIES, (ORDINARY, OTHERS[0], SPIKE, OTHERS[1], SINK, OTHERS[2]), strict=True))
FAMILY_MARKERS = dict(zip(FAMILIES, "osD^vP", strict=True))
MARKS = {"up": "+", "down": "\N{MINUS SIGN}", "stays": "=", paper.AT_LEAST: "\N{GREATER-THAN OR EQUAL TO}"}
OUTCOME_COLOURS = {AGREES: OTHERS[0], DIFFERS: SPIKE, UNDECIDED: ORDINARY, None: ORDINARY}
FACTORS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


@drawn_where_applicable
def changes(compared: Sequence[Compared]) -> Figure:
    """09: how each variant differs from what it is compared with, with its interval over seeds, and the paper's model.

    Open circles are variants of one seed, diamonds the paper's change; signs at the right its way.
    """
    if not compared:
        return absent("no variant is trained yet")
    fig, axes = figure(1, 2, size=(11, 0.34 * len(compared) + 1.9), sharey=True)
    rows = range(len(compared))
    for i, (ax, quantity) in enumerate(zip(axes, ("sink", "spike"), strict=True)):
        ax.axvline(0, color="black", lw=0.8)
        for row, one in zip(rows, compared, strict=True):
            change = getattr(one, quantity)
            colour = OUTCOME_COLOURS[change.outcome]
            width = 2 if change.outcome else 0.8  # where the paper says nothing, there is nothing to judge
            ax.plot([change.low, change.high], [row, row], color=colour, lw=width, solid_capstyle="butt")
            ax.plot(change.value, row, marker="o", color=colour, mfc=colour if one.seeds > 1 else "white", ms=6)
            theirs = paper.TRAINED_VARIANTS[FAMILY[one.name]].get(one.name, (None, None))[i]
            if isinstance(theirs, int | float):
                base = paper.TRAINED_BASE[i]
                moved = theirs - base if quantity == "sink" else math.log(theirs / base)
                ax.plot(moved, row + 0.28, marker="d", color="black", mfc="none", ms=5)
            at = {"xycoords": ("axes fraction", "data"), "ha": "center", "va": "center"}
            ax.annotate(MARKS.get(change.paper, ""), (1.02, row), fontsize=11, **at)
        ax.annotate("paper", (1.02, 1.005), xycoords="axes fraction", ha="center", va="bottom", fontsize=8)
        ax.grid(axis="x", lw=0.4)
        for row in _family_starts([one.name for one in compared]):
            ax.axhline(row - 0.5, color=ORDINARY, lw=0.5)
    axes[0].set_yticks(rows, [one.title for one in compared], fontsize=9)
    axes[0].invert_yaxis()
    axes[0].set_xlabel("change of the sink ratio\n(diamonds: the paper's, at 7B; thin: it says nothing)")
    axes[1].set_xlabel("largest activation, times the base's\n(or that of what a variant is compared with)")
    low, high = axes[1].get_xlim()
    ticks = [factor for factor in FACTORS if low < math.log(factor) < high]
    axes[1].xaxis.set_major_locator(FixedLocator([math.log(factor) for factor in ticks]))
    axes[1].set_xticklabels([f"{factor:g}" for factor in ticks])
    count = Counter(change.outcome for one in compared for change in (one.sink, one.spike) if change.outcome)
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
def decoupling(means: pd.DataFrame, named: Sequence[str]) -> Figure:
    """09: all variants in one plane, but those judged by late queries; the base's values divide it into four.

    Sizes are in medians of the stream. `means` are as `findings.average_seeds` gives them; some variants are `named`.
    """
    fig, ax = figure(size=(9.5, 5.4))
    means = means[~means["late"]]
    base = means.loc[BASE]
    ax.axvline(base["over_median"], color="black", lw=0.6, ls=":")
    ax.axhline(base["sink_ratio"], color="black", lw=0.6, ls=":")
    for name, colour in FAMILY_COLOURS.items():
        ours = means[means.index.map(FAMILY) == name]
        style = {"color": colour, "marker": FAMILY_MARKERS[name], "lw": 0, "ms": 8, "mfc": "none", "mew": 1.6}
        ax.plot(ours["over_median"], ours["sink_ratio"], label=name, **style)
    ax.plot(base["over_median"], base["sink_ratio"], marker="*", color="black", ms=15, lw=0, mec="white", label=BASE)
    for name in named:
        at = (means.loc[name, "over_median"], means.loc[name, "sink_ratio"])
        note(ax, name, at, (7, 5), fontsize=9, color=FAMILY_COLOURS[FAMILY[name]])
    ax.set_yscale("function", functions=(lambda y: np.sign(y) * np.sqrt(np.abs(y)), lambda y: np.sign(y) * y**2))
    ax.set(xscale="log", xlabel="largest activation, in medians of the stream", ylabel="sink ratio")
    ax.set_ylim(bottom=-0.004)
    ax.margins(x=0.12)
    log_ticks(ax.xaxis)
    looks = {"transform": ax.transAxes, "color": ORDINARY, "fontsize": 9, "style": "italic"}
    ax.text(0.01, 0.01, "less of both", ha="left", va="bottom", **looks)
    ax.text(0.99, 0.01, "more spike, less sink", ha="right", va="bottom", **looks)
    ax.text(0.01, 0.99, "more sink, less spike", ha="left", va="top", **looks)
    ax.text(0.99, 0.99, "more of both", ha="right", va="top", **looks)
    ax.legend(fontsize=9, loc="upper center", ncols=7, bbox_to_anchor=(0.5, 1.1))
    return fig


@styled
def emergence(curves: pd.DataFrame) -> Figure:
    """09: loss, largest activations, position 0's as a multiple of the rest, and sinks over training, of some runs."""
    fig, axes = figure(1, 4, size=(14.5, 3.8))
    panels = (
        ("Loss", "loss on held-out text (nats)"),
        ("Sizes", "largest activation"),
        ("Spike", "position 0 over elsewhere"),
        ("Sink", "sink ratio, attention to position 0"),
    )
    for ax, (title, label) in zip(axes, panels, strict=True):
        ax.set(xlabel="tokens trained on (million)", ylabel=label)
        ax.set_title(title, fontsize=11)
    for _, run in curves.groupby(["name", "seed"], sort=False):
        x = run["tokens"].clip(lower=1) / 1e6
        axes[0].plot(x, run["held_out_loss"], color="black", lw=1.4)
        axes[1].plot(x, run["max_first"], color=SPIKE, lw=1.6)
        axes[1].plot(x, run["max_elsewhere"], color=ORDINARY, lw=1.4, ls="--")
        axes[2].plot(x, run["max_first"] / run["max_elsewhere"], color=SPIKE, lw=1.6)
        axes[3].plot(x, run["sink_ratio"], color=SINK, lw=1.6)
        axes[3].plot(x, run["attention"], color=SINK, lw=1.2, ls="--")
    last = curves.groupby(["name", "seed"], sort=False).last()
    for ax, name, y, below, colour in (
        (axes[1], "position 0", last["max_first"].max(), 8, SPIKE),
        (axes[1], "elsewhere", last["max_elsewhere"].min(), -14, ORDINARY),
        (axes[3], "sink ratio", last["sink_ratio"].max(), 8, SINK),
        (axes[3], "attention", last["attention"].min(), -14, SINK),
    ):
        note(ax, name, (last["tokens"].max() / 1e6, y), (0, below), ha="right", color=colour)
    axes[1].set_yscale("log")
    thousands(axes[1])
    axes[2].axhline(1, color="black", lw=0.8, ls=":")
    axes[2].set_ylim(bottom=0)
    axes[3].margins(y=0.12)
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
            note(ax, text, (points[-1], values[-1]), (-2, below), ha="right", color=colour)
        ax.set(yscale="log", xlabel="block", ylabel="largest entry of the stream")
        apart = float((profile.magnitude[:, 0] / profile.magnitude[:, 1:].median(1).values).max())
        ax.set_title(f"{name}: position 0 up to {brief(apart)} times the middle one", fontsize=11)
        thousands(ax)
    return fig
