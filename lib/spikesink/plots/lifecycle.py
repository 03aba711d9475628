"""The figures of notebooks 00 to 03: one prompt, and the life cycle of a spike."""

from collections.abc import Callable, Sequence
from itertools import groupby

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spikesink.chain.lifecycle import Lifecycle, index_of, late_step_down, middle_row, ordinary_rows, spike_rows
from spikesink.chain.trace import TOP, Profile, summarize, variation
from spikesink.common import brief
from spikesink.ledger.evidence.lifecycle import lc3_step_down
from spikesink.model.anatomy import Block
from spikesink.plots.palette import MARKERS, ORDINARY, OTHERS, SINK, SINK_MAP, SMALL, SPIKE, SPIKE_MAP
from spikesink.plots.style import (
    above,
    blocks_text,
    drawn_where_applicable,
    figure,
    label_layers,
    note,
    quoted,
    span,
    styled,
    thousands,
    token_text,
    verb,
    whole,
)

CYCLES = ((SPIKE, "o"), (SMALL, "s"), (SINK, "v"), (OTHERS[0], "^"))  # how each is drawn, the largest first


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]


def _annotate_end(ax, x, y: float, text: str, colour: str = "black") -> None:
    """Name a line at its right end."""
    note(ax, text, (x, float(y)), (5, 0), color=colour, va="center", fontsize=9, annotation_clip=False)


@styled
def skyline(profile: Profile) -> Figure:
    """00: how large every token gets at every depth, and how much attention it draws, side by side."""
    n_tokens, summary = len(profile.tokens), summarize(profile)
    fig, (left, right) = figure(1, 2, size=(11, 5.6))
    over = profile.magnitude / profile.median[:, None]
    colours = {"aspect": "auto", "origin": "lower"}
    image = left.imshow(over, cmap=SPIKE_MAP, norm=LogNorm(1, max(10.0, float(over.max()))), **colours)
    fig.colorbar(image, ax=left, label="largest |h| of the token ÷ median |h|", pad=0.02)
    label_layers(left.yaxis, len(profile.attention))
    peak, point = summary["token"], summary["point"]
    left.set_title(f"Spike: {quoted(profile.tokens[peak])} grows to {brief(summary['factor'])} medians", fontsize=11)
    received = profile.attention * 100
    image = right.imshow(received, cmap=SINK_MAP, vmin=0, vmax=100, **colours)
    fig.colorbar(image, ax=right, label="attention the token gets, %, mean over heads", pad=0.02)
    # The last token is seen by one query only, itself: no judgement of sinks can rest on it.
    most = int(received[:, : max(1, n_tokens - 3)].mean(0).argmax())
    right.set(ylabel="layer")
    whole(right, "y")
    right.set_title(f"Sink: {quoted(profile.tokens[most])} draws {float(received[:, most].mean()):.0f}%", fontsize=11)
    for ax in (left, right):
        ax.set(xlabel="token")
        ax.set_xticks(range(n_tokens), [token_text(t) for t in profile.tokens], rotation=90, fontsize=8)
        ax.spines[:].set_visible(False)
    n_spikes = int((profile.magnitude[point] >= profile.magnitude[point].max() / 2).sum())
    same = ", and attention piles onto the same one" if peak == most else ""
    above(
        fig,
        f"{n_spikes} of {n_tokens} tokens grow about equally large"
        if n_spikes > 1
        else f"One token becomes a giant{same}",
    )
    return fig


@styled
def chain() -> Figure:
    """00: the map of the chain, and which notebook takes which link apart."""
    links = [
        ((2.2, 0.6), "01  step-up", "one to three FFN\nblocks write it", SPIKE),
        ((6, 0.6), "02  plateau", "the residual stream\ncarries it unchanged", SPIKE),
        ((12.6, 0.6), "03  step-down", "late FFN blocks\ncancel it", SPIKE),
        ((0, 2.9), "04  amplifier", "SwiGLU is quadratic\nalong one direction", SPIKE),
        ((4.4, 2.9), "05  first token", "attention to itself alone\nis a fixed map", SPIKE),
        ((8.6, 2.9), "06  RMSNorm", "turns the spike\ninto a constant", ORDINARY),
        ((12.6, 2.9), "07  sink", "its key is what\nqueries favour", SINK),
    ]
    arrows = [
        ((1.6, 2.3), (2.6, 1.5)),
        ((5.4, 2.3), (4.6, 1.5)),
        ((5.1, 0.75), (6, 0.75)),
        ((8.9, 0.75), (12.6, 0.75)),
        ((8.4, 1.5), (9.4, 2.3)),
        ((11.5, 3.05), (12.6, 3.05)),
    ]
    notes = [(1.5, 4.1, "why it can happen, and to whom"), (10, 4.1, "what it does to attention")]
    fig, ax = figure(size=(11, 3.1))
    ax.set(xlim=(-0.3, 15.6), ylim=(-0.3, 4.6))
    ax.axis("off")
    for (x, y), name, what, colour in links:
        ax.add_patch(plt.Rectangle((x, y - 0.6), 2.9, 1.5, facecolor=colour, alpha=0.12, edgecolor=colour, lw=1.2))
        ax.text(x + 0.12, y + 0.68, name, va="top", fontsize=9.5, fontweight="bold")
        ax.text(x + 0.12, y + 0.22, what, va="top", fontsize=8)
    for start, end in arrows:
        ax.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": "black", "lw": 1.2})
    for x, y, text in (*notes, (3.8, -0.3, "the life of a spike")):
        ax.text(x, y, text, fontsize=9, style="italic")
    ax.set_title("The chain from spike to sink, by notebook", pad=2)
    return fig


@styled
def magnitudes(life: Lifecycle) -> Figure:
    """01 (the paper's figure 1): the three largest channels over depth, in the stream and in what blocks write."""
    trace, cycle = life.trace, life.main
    fig, (top, bottom) = figure(2, 1, size=(9.5, 6), sharex=True)
    points = np.arange(len(trace.medians))
    for rank, name in enumerate(("largest channel", "2nd", "3rd")[:TOP]):
        looks = {"color": SPIKE, "alpha": 1 - 0.3 * rank, "marker": MARKERS[rank], "ms": 3.5, "label": name}
        top.plot(points, trace.top_stream[:, rank], lw=1.6, **looks)
        bottom.plot(points[1:], trace.top_writes[:, rank], lw=0.8, **looks)
    top.plot(points, trace.medians, color=ORDINARY, lw=1.6, label="median")
    top.legend(ncols=TOP + 1, fontsize=8, loc="lower right", bbox_to_anchor=(1, 0.08))
    top.set(yscale="log", ylabel="|h| in the stream,\nlargest of all tokens")
    bottom.set(yscale="log", ylabel="|F| a block writes,\nlargest of all tokens")
    label_layers(bottom.xaxis, trace.anatomy.n_layers)
    for ax in (top, bottom):
        thousands(ax)
        if cycle is not None:
            span(ax, cycle, label=ax is top)
    if cycle is None:
        title = "No spike: the largest channels stay near the median"
    elif cycle.shape == "ramp":
        title = f"A ramp, not a step: it takes {cycle.blocks_needed or 'more than all early'} blocks to write the spike"
    else:
        title = f"{_sentence(blocks_text(cycle.step_up))} {verb(cycle.step_up, 'write')} the spike,\n"
        title += f"{blocks_text(cycle.step_down)} {verb(cycle.step_down, 'cancel')} it"
    top.set_title(title, fontsize=11)
    return fig


@drawn_where_applicable
def waterfall(life: Lifecycle, decode: Callable[[list[int]], str], least: float = 0.02) -> Figure:
    """01: what each block adds to the first channel of the middle-sized spike token; the bars sum to the stream."""
    cycle, token, index = life.main, middle_row(life), index_of(life, life.main.channel)
    writes, stream = token.writes[0, :, index].numpy(), token.stream[0, :, index].numpy()
    bars = [("embed.", 0.0, stream[0], ORDINARY)]  # label, bottom, height, colour
    large = (np.abs(writes) >= least * abs(cycle.value)).tolist()
    for shown, group in groupby(map(Block, range(1, len(writes) + 1)), key=lambda block: large[block - 1]):
        blocks = list(group)
        if not shown:
            height = writes[blocks[0] - 1 : blocks[-1]].sum()
            bars.append(("…", stream[blocks[0] - 1], height, ORDINARY))
        for block in blocks if shown else ():
            colour = SPIKE if block in cycle.step_up else SINK if block in cycle.step_down else ORDINARY
            label = f"L{block.layer}\n{'attn' if block.is_attention else 'MLP'}"
            bars.append((label, stream[block - 1], writes[block - 1], colour))
    bars.append(("end", 0.0, stream[-1], "black"))
    fig, ax = figure(size=(9.5, 4.4))
    up = cycle.value > 0
    for x, (_, bottom, height, colour) in enumerate(bars):
        hatch = "//" if colour == SINK else ""
        ax.bar(x, height, bottom=bottom, color=colour, width=0.72, hatch=hatch, edgecolor="white", lw=0)
        if x < len(bars) - 1:
            ax.plot([x + 0.36, x + 0.64], [bottom + height] * 2, color="black", lw=0.7)
        if colour != ORDINARY or abs(height) >= 0.05 * abs(cycle.value) or len(bars) < 12:
            far = bottom + height if (height > 0) == up else bottom
            text = f"{height:+,.0f}" if abs(height) >= 1 else f"{height:+.2g}"
            note(ax, text, (x, far), (0, 3 if up else -3), ha="center", fontsize=8, va="bottom" if up else "top")
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    ax.set(
        ylabel=f"channel {cycle.channel} of {quoted(decode(token.token.tolist()))}",
        xlabel=f"block (…: those between, each below {least:.0%} of the plateau, summed)",
    )
    thousands(ax)
    low, high = ax.dataLim.intervaly
    ax.set_ylim(low - 0.1 * (high - low) * (low < 0), high + 0.1 * (high - low))
    made, taken = (
        sum(float(writes[b - 1]) for b in blocks) / float(stream[cycle.middle])
        for blocks in (cycle.step_up, cycle.step_down)
    )
    ax.set_title(
        f"Step-up ({blocks_text(cycle.step_up)}) makes {made:.0%} of this token's spike,\n"
        f"step-down ({blocks_text(cycle.step_down)}) takes {-taken:.0%} of it back",
        fontsize=11,
    )
    return fig


@drawn_where_applicable
def positions(life: Lifecycle) -> Figure:
    """01: where in the windows the spike tokens are, for each cycle."""
    trace = life.trace
    fig, ax = figure(size=(9.5, 3.6))
    names = ("main", "2nd", "3rd", "4th")
    for cycle, (colour, marker), name in reversed(list(zip(life.cycles, CYCLES, names, strict=False))):
        rows, main = trace.rows[cycle.is_spike], name == "main"
        label = f"{name} cycle, channel {cycle.channel}, {blocks_text(cycle.step_up)} up: {len(rows)} tokens"
        faces = colour if main else "none"  # so that both are seen where a token is in two cycles
        looks = {"s": 26 if main else 70, "marker": marker, "edgecolors": colour, "facecolors": faces, "zorder": 3}
        ax.scatter(rows.position, rows.window, label=label, clip_on=False, **looks)
    ax.set_xscale("symlog", linthresh=4, linscale=1.2)
    ticks = [p for p in (0, *(2**i for i in range(16))) if p < trace.length]
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(xlim=(-0.4, 1.1 * trace.length), ylim=(-0.8, trace.n_windows - 0.2))
    ax.set(xlabel="position in the window (log scale from 4 on)", ylabel="window")
    whole(ax, "y")
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, ncols=1)
    first = int((spike_rows(life).position == 0).sum())
    elsewhere = len(spike_rows(life)) - first
    others = f"{elsewhere or 'no'} other token{'s' if elsewhere != 1 else ''}"
    above(fig, f"The spike sits on position 0 in {first} of {trace.n_windows} windows, and on {others}")
    return fig


@drawn_where_applicable
def channels(life: Lifecycle) -> Figure:
    """01: channels by size half-way through the plateau, on spike tokens and on ordinary ones."""
    cycle, trace = life.main, life.trace
    fig, ax = figure(size=(9.5, 3.8))
    n = min(trace.n_followed, 24)
    groups = ((spike_rows(life), SPIKE, "o", "spike tokens"), (ordinary_rows(life), ORDINARY, "s", "ordinary tokens"))
    for rows, colour, marker, name in groups:
        held = rows.stream[:, cycle.middle, : trace.n_followed].abs() / trace.medians[cycle.middle]
        largest = held.quantile(0.5, dim=0).sort(descending=True).values[:n]
        ax.plot(range(1, n + 1), largest, color=colour, marker=marker, ms=5, lw=1)
        _annotate_end(ax, n, float(largest[-1]), name, colour)
        for rank, channel in enumerate(cycle.channels[:6] if colour == SPIKE else (), 1):
            note(ax, str(channel), (rank, largest[rank - 1]), (4, 4), fontsize=8)
    ax.axhline(trace.threshold, color="black", lw=0.8, ls="--")
    note(ax, f"{trace.threshold:g} medians", (n, trace.threshold), (5, 2), fontsize=9, annotation_clip=False)
    ax.set(
        yscale="log",
        xlabel=f"channels, the largest first (of {trace.anatomy.d_model}; labels: channel numbers)",
        ylabel="|h| ÷ median |h|",
        xlim=(0.4, n * 1.2),
    )
    ax.set_xticks([1, *range(4, n + 1, 4)])
    thousands(ax)
    held = f"{len(cycle.channels)} of {trace.anatomy.d_model} channels {verb(cycle.channels, 'hold')} the spike"
    ax.set_title(f"{held}, half-way through the plateau")
    return fig


@drawn_where_applicable
def plateau(life: Lifecycle) -> Figure:
    """02: the size of every block's write into the first channel, over the plateau value, with ordinary channels."""
    cycle, trace, spikes = life.main, life.trace, spike_rows(life)
    blocks = np.arange(1, trace.anatomy.n_blocks + 1)
    fig, ax = figure(size=(9.5, 4.2))
    share = (cycle.writes / cycle.value).abs().clamp(min=1e-8)
    held = spikes.stream[:, cycle.middle, trace.ordinary].abs()[:, None]
    ratio = spikes.writes[..., trace.ordinary].abs() / held  # row, block, channel
    ordinary = ratio.transpose(0, 1).flatten(1).quantile(0.5, dim=1)
    for values, colour, marker, name in (
        (ordinary, ORDINARY, "s", "ordinary\nchannels"),
        (share, SPIKE, "o", f"channel {cycle.channel}"),
    ):
        ax.plot(blocks, values, color=colour, marker=marker, ms=3.5, lw=0.8)
        _annotate_end(ax, blocks[-1], float(values[-1]), name, colour)
    ax.axhline(0.01, color="black", lw=0.8, ls="--")
    note(ax, "1%", (blocks[-1], 0.01), (5, 2), fontsize=9, annotation_clip=False)
    span(ax, cycle)
    label_layers(ax.xaxis, trace.anatomy.n_layers, room=0.08)
    ax.set(yscale="log", ylabel="|write| ÷ what the channel\nholds half-way")
    inside = share[cycle.plateau[0] : cycle.plateau[1]]
    typical = f"Between step-up and step-down a block's typical write is {float(inside.median()):.2%} of the spike"
    ax.set_title(typical if len(inside) else "No block lies between step-up and step-down")
    return fig


@drawn_where_applicable
def lives(life: Lifecycle) -> Figure:
    """02: the first channel of every spike token over depth, and of ordinary tokens."""
    cycle, trace, index = life.main, life.trace, index_of(life, life.main.channel)
    fig, ax = figure(size=(9.5, 4))
    smaller = trace.rows.drawn & ~cycle.is_spike & sum(c.is_spike for c in life.cycles).bool()
    groups = (
        (ordinary_rows(life), ORDINARY, 0.25, "tokens drawn at random"),
        (trace.rows[smaller], SMALL, 0.9, "of them in a smaller cycle"),
        (spike_rows(life), SPIKE, 0.6, "spike tokens"),
    )
    for rows, colour, alpha, name in groups:
        if len(rows):
            ax.plot(rows.stream[..., index].T, color=colour, alpha=alpha, lw=0.9)
            ax.plot([], [], color=colour, label=f"{len(rows)} {name}")
    ax.set_yscale("symlog", linthresh=10 ** np.floor(np.log10(max(1e-3, float(trace.medians[cycle.middle])))))
    ax.axhline(0, color="black", lw=0.6)
    thousands(ax)
    span(ax, cycle)
    label_layers(ax.xaxis, trace.anatomy.n_layers)
    ax.margins(y=0.08)
    ax.set(ylabel=f"value of channel {cycle.channel}\n(signed, log scale)")
    ax.legend(fontsize=9, loc="center", bbox_to_anchor=(0.5, 0.45), facecolor="white", framealpha=0.8, frameon=True)
    first, last = (float(cycle.stream[p]) for p in cycle.plateau)
    ax.set_title(f"From {cycle.plateau[0]} to {cycle.plateau[1]} the spike goes from {first:,.0f} to {last:,.0f}")
    return fig


@drawn_where_applicable
def ratios(life: Lifecycle) -> Figure:
    """02: each spike channel over the first one, token by token, over its own median; flat lines are fixed ratios."""
    cycle, trace = life.main, life.trace
    shown = cycle.channels[:4] if len(cycle.channels) > 1 else trace.channels[:2].tolist()
    first, *others = (index_of(life, c) for c in shown)
    fig, axes = figure(1, 2, size=(9.5, 4), sharey=True)
    groups = ((spike_rows(life), SPIKE, "spike tokens"), (ordinary_rows(life), ORDINARY, "ordinary tokens"))
    for ax, (rows, colour, name) in zip(axes, groups, strict=True):
        held = rows.stream[:, cycle.middle]
        order = held[:, first].abs().argsort(descending=True)
        order = order[:: -(-len(order) // 80)]  # evenly, if there are too many to draw
        for rank, (index, marker) in enumerate(zip(others, MARKERS, strict=False)):
            ratio = held[order, index] / held[order, first]
            looks = {"color": colour, "alpha": 1 - 0.25 * rank, "marker": marker, "ms": 4, "lw": 0.8}
            values = (ratio / ratio.median()).clamp(-1, 3)
            ax.plot(range(1, len(order) + 1), values, label=f"channel {shown[rank + 1]}", **looks)
        ax.axhline(1, color="black", lw=0.6, zorder=0)
        ax.set(xlabel=f"{len(order)} {name}, the largest first", ylim=(-1.1, 3.7), yticks=range(-1, 4))
        whole(ax)
        ax.legend(fontsize=8, loc="upper center", ncols=3)
        varies = brief(100 * variation(held[:, others[0]] / held[:, first]))
        ax.set_title(f"{name.capitalize()}: channel {shown[1]} ÷ {shown[0]}\nvaries by {varies}%", fontsize=11)
    axes[0].set_ylabel(f"channel ÷ channel {shown[0]},\nover its own median (edge: beyond)")
    return fig


@drawn_where_applicable
def cancellation(life: Lifecycle) -> Figure:
    """03: what step-down blocks take back from each token, against what the token holds on the plateau."""
    cycle, index, late = life.main, index_of(life, life.main.channel), late_step_down(life)
    which = torch.tensor(late, dtype=torch.long) - 1
    fig, ax = figure(size=(9.5, 4.2))
    for rows, colour, marker, name in (
        (ordinary_rows(life), ORDINARY, "s", "ordinary"),
        (spike_rows(life), SPIKE, "o", "spike tokens"),
    ):
        held, taken = rows.stream[:, cycle.middle, index], -rows.writes[:, which, index].sum(1)
        ax.scatter(held, taken, s=26, color=colour, marker=marker, label=name)
    end = float(held[held.abs().argmax()])
    ax.plot([0, end], [0, end], color="black", lw=0.8, ls="--")
    ax.text(end, end, "all of it ", ha="right", va="bottom", fontsize=9)
    ax.legend(fontsize=9, loc="upper left")
    ax.set(xlabel=f"channel {cycle.channel} half-way through the plateau", ylabel=f"taken back by\n{blocks_text(late)}")
    thousands(ax, "x")
    thousands(ax, "y")
    evidence = lc3_step_down(life)
    title = f"{_sentence(blocks_text(late))}\n{verb(late, 'take')} back {evidence.measured['share_cancelled']:.0%} "
    title += "of the plateau value on spike tokens"
    elsewhere = evidence.control.get("share_cancelled_ordinary_tokens")
    ax.set_title(title + (f", {elsewhere:.1%} elsewhere" if elsewhere is not None else ""), fontsize=11)
    return fig


@drawn_where_applicable
def cycles(life: Lifecycle, decode: Callable[[list[int]], str]) -> Figure:
    """03: every cycle's first channel over depth, on its own tokens, with the words it falls on."""
    trace = life.trace
    fig, ax = figure(size=(9.5, 4.2))
    points = np.arange(len(trace.medians))
    for cycle, (colour, marker) in zip(life.cycles, CYCLES, strict=False):
        rows = trace.rows[cycle.is_spike]
        tokens, counts = rows.token.unique(return_counts=True)
        common = [quoted(decode([int(t)])) for t in tokens[counts.argsort(descending=True, stable=True)][:4]]
        label = f"channel {cycle.channel} on {len(rows)} tokens: {' '.join(common)} …"
        ax.plot(points, cycle.stream.abs(), color=colour, lw=1.6, marker=marker, ms=3, label=label)
    ax.plot(points, trace.threshold * trace.medians, color="black", ls="--", lw=0.8)
    _annotate_end(ax, points[-1], trace.threshold * float(trace.medians[-1]), f"{trace.threshold:g}\nmedians")
    ax.plot(points, trace.medians, color=ORDINARY, lw=1.4)
    _annotate_end(ax, points[-1], float(trace.medians[-1]), "median", ORDINARY)
    label_layers(ax.xaxis, trace.anatomy.n_layers, room=0.08)
    ax.set(yscale="log", ylabel="|h| of the first channel,\nmedian over the cycle's tokens")
    ax.margins(y=0.12)
    thousands(ax)
    ax.legend(loc="lower right", fontsize=9)
    words = f"{('One', 'Two', 'Three', 'Four')[len(life.cycles) - 1]} cycle{'s' * (len(life.cycles) > 1)}"
    written = " and by ".join(blocks_text(cycle.step_up) for cycle in life.cycles)
    ax.set_title(f"{words}, written by {written}", fontsize=11)
    return fig


@styled
def across_models(rows: Sequence[tuple[str, int, Sequence[int], Sequence[int], bool]]) -> Figure:
    """03: step-up and step-down blocks of many models over relative depth; `rows` as `across_models` has them."""
    fig, ax = figure(size=(9.5, 0.9 + 0.36 * len(rows)))
    spans = []
    for y, (_, n_blocks, *steps, paper) in enumerate(reversed(rows)):
        colour = ORDINARY if paper else SPIKE
        up, down = ([100 * block / n_blocks for block in blocks] for blocks in steps)
        ax.plot([0, 100], [y, y], color="#DDDDDD", lw=1, zorder=0)
        if up and down:
            ax.plot([max(up), min(down)], [y, y], color=colour, lw=4, alpha=0.35, zorder=1)
            spans.append(min(down) - max(up))
        for depths, marker in ((up, "^"), (down, "v")):
            ax.scatter(depths, [y] * len(depths), marker=marker, color=colour, s=46, zorder=2)
    ax.set_yticks(range(len(rows)), [f"{name}{' (paper)' if paper else ''}" for name, *_, paper in reversed(rows)])
    for tick, (*_, paper) in zip(ax.get_yticklabels(), reversed(rows), strict=True):
        tick.set_fontweight("normal" if paper else "bold")
    ax.set(xlim=(-1, 101), ylim=(-0.6, len(rows) - 0.4))
    ax.set_xlabel("depth of the block, % of all blocks (▲ step-up, ▼ step-down, bar: plateau)")
    n_long = sum(length > 50 for length in spans)
    ax.set_title(f"In {n_long} of {len(rows)} models the plateau spans more than half of the depth")
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig
