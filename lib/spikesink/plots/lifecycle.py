"""The figures of notebooks 00 to 03: one prompt, and the life cycle of a spike."""

from collections.abc import Callable, Sequence
from functools import wraps

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spikesink.chain.lifecycle import Lifecycle, index_of, late_step_down, middle_row, ordinary_rows, spike_rows
from spikesink.chain.trace import TOP, Profile, summarize
from spikesink.common import NotApplicable, brief
from spikesink.ledger.evidence.lifecycle import lc3_step_down
from spikesink.plots.style import (
    MARKERS,
    ORDINARY,
    SINK,
    SINK_MAP,
    SMALL,
    SPIKE,
    SPIKE_MAP,
    blocks_text,
    drawn_where_applicable,
    figure,
    quoted,
    span,
    styled,
    thousands,
    token_text,
    verb,
)


def drawn_if_spiking(draw):
    """For figures of a spike: the reason in its place where there is none."""
    drawn = drawn_where_applicable(draw)

    @wraps(draw)
    def drawn_of(life: Lifecycle, *args, **options) -> Figure:
        return drawn(NotApplicable(life.reason) if life.main is None else life, *args, **options)

    return drawn_of


def _sentence(text: str) -> str:
    """A text that begins with a capital."""
    return text[:1].upper() + text[1:]


@styled
def skyline(profile: Profile) -> Figure:
    """00: how large every token gets at every depth, and how much attention it draws, side by side."""
    n_tokens = len(profile.tokens)
    fig, (left, right) = figure(1, 2, size=(11, 5.6))
    over = profile.magnitude / profile.median[:, None]
    image = left.imshow(
        over, aspect="auto", origin="lower", cmap=SPIKE_MAP, norm=LogNorm(1, max(10.0, float(over.max())))
    )
    fig.colorbar(image, ax=left, label="largest |h| of the token ÷ median |h|", pad=0.02)
    left.set(ylabel="depth: after block … (two a layer)", xlabel="token")
    facts = summarize(profile)
    peak = facts["token"]
    left.set_title(f"Spike: {quoted(profile.tokens[peak])} grows to {brief(facts['factor'])} medians", fontsize=11)
    received = profile.attention * 100
    image = right.imshow(received, aspect="auto", origin="lower", cmap=SINK_MAP, vmin=0, vmax=100)
    fig.colorbar(image, ax=right, label="attention the token gets, %, mean over heads", pad=0.02)
    # The last token is seen by one query only, itself: no judgement of sinks can rest on it.
    most = int(received[:, : max(1, n_tokens - 3)].mean(0).argmax())
    right.set(ylabel="layer", xlabel="token")
    right.set_title(f"Sink: {quoted(profile.tokens[most])} draws {float(received[:, most].mean()):.0f}%", fontsize=11)
    for ax in (left, right):
        ax.set_xticks(range(n_tokens), [token_text(t) for t in profile.tokens], rotation=90, fontsize=8)
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
        ax.spines[:].set_visible(False)
    at_peak = profile.magnitude[facts["point"]]
    n_spikes = int((at_peak >= at_peak.max() / 2).sum())
    if n_spikes > 1:
        title = f"{n_spikes} of {n_tokens} tokens grow about equally large"
    else:
        title = "One token becomes a giant" + (", and attention piles onto the same one" if peak == most else "")
    fig.suptitle(title, fontsize=13, fontweight="bold", x=0.01, ha="left")
    return fig


@styled
def chain() -> Figure:
    """00: the map of the chain, and which notebook takes which link apart."""
    links = [
        ("step-up", "one to three FFN\nblocks write it", "01", SPIKE),
        ("plateau", "the residual stream\ncarries it unchanged", "02", SPIKE),
        ("step-down", "late FFN blocks\ncancel it", "03", SPIKE),
        ("amplifier", "SwiGLU is quadratic\nalong one direction", "04", SPIKE),
        ("first token", "attention to itself alone\nis a fixed map", "05", SPIKE),
        ("RMSNorm", "turns the spike\ninto a constant", "06", ORDINARY),
        ("sink", "its key is what\nqueries favour", "07", SINK),
    ]
    fig, ax = figure(size=(11, 3.1))
    ax.set(xlim=(-0.3, 15.6), ylim=(-0.2, 4.6))
    ax.axis("off")
    places = {3: (0, 2.9), 4: (4.4, 2.9), 0: (2.2, 0.6), 1: (6, 0.6), 2: (12.6, 0.6), 5: (8.6, 2.9), 6: (12.6, 2.9)}
    for i, (name, what, notebook, colour) in enumerate(links):
        x, y = places[i]
        ax.add_patch(plt.Rectangle((x, y - 0.6), 2.9, 1.5, facecolor=colour, alpha=0.12, edgecolor=colour, lw=1.2))
        ax.text(x + 0.12, y + 0.68, f"{notebook}  {name}", va="top", fontsize=9.5, fontweight="bold")
        ax.text(x + 0.12, y + 0.22, what, va="top", fontsize=8)
    arrow = {"arrowstyle": "-|>", "color": "black", "lw": 1.2, "shrinkA": 2, "shrinkB": 2}
    for start, end in (
        ((1.6, 2.3), (2.6, 1.5)),
        ((5.4, 2.3), (4.6, 1.5)),
        ((5.1, 0.75), (6, 0.75)),
        ((8.9, 0.75), (12.6, 0.75)),
        ((8.4, 1.5), (9.4, 2.3)),
        ((11.5, 3.05), (12.6, 3.05)),
    ):
        ax.annotate("", end, start, arrowprops=arrow)
    ax.text(1.5, 4.15, "why it can happen, and to whom", fontsize=9, style="italic")
    ax.text(10, 4.15, "what it does to attention", fontsize=9, style="italic")
    ax.text(3.8, -0.15, "the life of a spike", fontsize=9, style="italic", va="center")
    ax.set_title("The chain from spike to sink, by notebook", pad=2)
    return fig


@styled
def magnitudes(life: Lifecycle) -> Figure:
    """01 (the paper's figure 1): the three largest channels over depth, in the stream and in what blocks write."""
    trace, cycle = life.trace, life.main
    fig, (above, below) = figure(2, 1, size=(9.5, 6), sharex=True)
    points, blocks = np.arange(len(trace.medians)), np.arange(1, trace.anatomy.n_blocks + 1)
    for rank in range(TOP):
        shade = {"color": SPIKE, "alpha": 1 - 0.3 * rank, "lw": 1.6}
        above.plot(points, trace.top_stream[:, rank], **shade)
        below.plot(blocks, trace.top_writes[:, rank], marker=MARKERS[rank], ms=3.5, **{**shade, "lw": 0.8})
    above.plot(points, trace.medians, color=ORDINARY, lw=1.6)
    at = cycle.middle if cycle else len(points) // 2
    label = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "fontsize": 9}
    names = {}  # lines that run together share a label
    for rank, name in enumerate(("largest", "2nd", "3rd")):
        value = float(trace.top_stream[at, rank])
        near = next((v for v in names if v < 1.6 * value), value)
        names[near] = [*names.get(near, []), name]
    for value, together in names.items():
        above.annotate(", ".join(together), (at, value), color=SPIKE, **label)
    above.annotate("median", (at, trace.medians[at]), color=ORDINARY, **label)
    above.set(yscale="log", ylabel="|h| in the stream,\nlargest of all tokens")
    below.set(
        yscale="log", ylabel="|F| a block writes,\nlargest of all tokens", xlabel="block (odd: attention, even: FFN)"
    )
    for rank, name in enumerate(("largest channel", "2nd", "3rd")):
        below.plot([], [], marker=MARKERS[rank], color=SPIKE, alpha=1 - 0.3 * rank, lw=0.8, ms=3.5, label=name)
    below.legend(ncols=TOP, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1))
    for ax in (above, below):
        thousands(ax)
        if cycle is not None:
            span(ax, cycle, label=ax is above)
    if cycle is None:
        above.set_title("No spike: the largest channels stay near the median")
    elif cycle.shape == "step":
        above.set_title(
            f"{_sentence(blocks_text(cycle.step_up))} {verb(cycle.step_up, 'write')} the spike, "
            f"{blocks_text(cycle.step_down)} {verb(cycle.step_down, 'cancel')} it"
        )
    else:
        above.set_title(
            f"A ramp, not a step: it takes {cycle.blocks_needed or 'more than all early'} blocks to write the spike"
        )
    return fig


@drawn_if_spiking
def waterfall(life: Lifecycle, decode: Callable[[list[int]], str], least: float = 0.02) -> Figure:
    """01: what each block adds to the first channel of the middle-sized spike token; the bars sum to the stream."""
    cycle = life.main
    token = middle_row(life)
    index = index_of(life, cycle.channel)
    writes, stream = token.writes[0, :, index].numpy(), token.stream[0, :, index]
    fig, ax = figure(size=(9.5, 4.4))
    level = start = float(stream[0])
    bars, rest = [("embed.", 0.0, start, ORDINARY)], 0.0
    for block, write in enumerate(writes, 1):
        if abs(write) < least * abs(cycle.value):
            rest += write
            continue
        if rest:
            bars.append(("…", level, rest, ORDINARY))
            level, rest = level + rest, 0.0
        up = block in cycle.step_up
        colour = SPIKE if up else SINK if block in cycle.step_down else ORDINARY
        bars.append((f"{block}\n{'attn' if block % 2 else 'FFN'}", level, write, colour))
        level += write
    if rest:
        bars.append(("…", level, rest, ORDINARY))
        level += rest
    bars.append(("end", 0.0, float(stream[-1]), "black"))
    for x, (_, bottom, height, colour) in enumerate(bars):
        hatch = "//" if colour == SINK else ""
        ax.bar(x, height, bottom=bottom, color=colour, width=0.72, hatch=hatch, edgecolor="white", lw=0)
        if x < len(bars) - 1 and (colour != ORDINARY or abs(height) >= 0.05 * abs(cycle.value) or len(bars) < 12):
            top = bottom + height if cycle.value * height > 0 else bottom
            text = f"{height:+,.0f}" if abs(height) >= 1 else f"{height:+.2g}"
            offset = {"xytext": (0, 3 if cycle.value > 0 else -3), "textcoords": "offset points"}
            ax.annotate(text, (x, top), ha="center", va="bottom" if cycle.value > 0 else "top", fontsize=8, **offset)
    end = float(stream[-1])
    ax.annotate(f"{end:,.0f}", (len(bars) - 1 + 0.45, end), va="center", fontsize=8, fontweight="bold")
    for x, (_, bottom, height, _) in enumerate(bars[:-1]):
        ax.plot([x + 0.36, x + 0.64], [bottom + height] * 2, color="black", lw=0.7)
    ax.axhline(0, color="black", lw=0.8)
    ax.set_xticks(range(len(bars)), [label for label, *_ in bars], fontsize=8)
    ax.set(
        ylabel=f"channel {cycle.channel} of {quoted(decode(token.token.tolist()))}",
        xlabel=f"block (…: those between, each below {least:.0%} of the plateau, summed)",
    )
    thousands(ax)
    low, high = ax.dataLim.intervaly
    ax.set_ylim(low - 0.1 * (high - low) * (low < 0), high + 0.1 * (high - low))
    held = float(stream[cycle.middle])
    up, down = (sum(float(writes[b - 1]) for b in blocks) / held for blocks in (cycle.step_up, cycle.step_down))
    ax.set_title(
        f"Step-up ({blocks_text(cycle.step_up)}) makes {up:.0%} of this token's spike,\n"
        f"step-down ({blocks_text(cycle.step_down)}) takes {-down:.0%} of it back",
        fontsize=11,
    )
    return fig


@drawn_if_spiking
def positions(life: Lifecycle) -> Figure:
    """01: where in the windows the spike tokens are, for each cycle."""
    trace = life.trace
    fig, ax = figure(size=(9.5, 3.6))
    for cycle, colour, marker, size, name in reversed(
        list(
            zip(
                life.cycles,
                (SPIKE, SMALL, SINK, ORDINARY),
                "osv^",
                (26, 70, 70, 70),
                ("main", "2nd", "3rd", "4th"),
                strict=False,
            )
        )
    ):
        rows = trace.rows[cycle.is_spike]
        label = f"{name} cycle, channel {cycle.channel}, {blocks_text(cycle.step_up)} up: {len(rows)} tokens"
        ax.scatter(
            rows.position,
            rows.window,
            s=size,
            marker=marker,
            edgecolors=colour,
            facecolors=colour if name == "main" else "none",  # so that both are seen where a token is in two cycles
            label=label,
            clip_on=False,
            zorder=3,
        )
    ax.set_xscale("symlog", linthresh=4, linscale=1.2)
    ticks = [p for p in (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) if p < trace.length]
    ax.set_xticks(ticks, ticks)
    ax.minorticks_off()
    ax.set(
        xlabel="position in the window (log scale from 4 on)",
        ylabel="window",
        xlim=(-0.4, 1.1 * trace.length),
        ylim=(-0.8, trace.n_windows - 0.2),
    )
    ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1.0), fontsize=8, ncols=1)
    rows = spike_rows(life)
    first = int((rows.position == 0).sum())
    elsewhere = len(rows) - first
    title = f"The spike sits on position 0 in {first} of {trace.n_windows} windows, and on {elsewhere or 'no'} "
    title += "other token" if elsewhere == 1 else "other tokens"
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return fig


@drawn_if_spiking
def channels(life: Lifecycle) -> Figure:
    """01: channels by size half-way through the plateau, on spike tokens and on ordinary ones."""
    cycle, trace = life.main, life.trace
    fig, ax = figure(size=(9.5, 3.8))
    spikes, ordinary = spike_rows(life), ordinary_rows(life)
    n = min(trace.n_followed, 24)
    for rows, colour, marker, name in (
        (spikes, SPIKE, "o", "spike tokens"),
        (ordinary, ORDINARY, "s", "ordinary tokens"),
    ):
        at = rows.stream[:, cycle.middle, : trace.n_followed].abs() / trace.medians[cycle.middle]
        typical = at.quantile(0.5, dim=0)
        order = typical.argsort(descending=True)[:n]
        ax.plot(range(1, n + 1), typical[order], color=colour, marker=marker, ms=5, lw=1)
        ax.text(n + 0.4, typical[order[-1]], name, color=colour, va="center")
        if colour == SPIKE:
            for rank, index in enumerate(order[: len(cycle.channels)][:6], 1):
                ax.annotate(
                    int(trace.channels[index]), (rank, typical[index]), (4, 4), textcoords="offset points", fontsize=8
                )
    ax.plot([0.4, n], [trace.threshold] * 2, color="black", lw=0.8, ls="--")
    ax.text(n + 0.4, trace.threshold, f"{trace.threshold:g} medians", va="center", fontsize=9)
    ax.set(
        yscale="log",
        xlabel=f"channels, the largest first (of {trace.anatomy.d_model}; labels: channel numbers)",
        ylabel="|h| ÷ median |h|",
        xlim=(0.4, n + 5.5),
    )
    ax.set_xticks([1, *range(4, n + 1, 4)])
    thousands(ax)
    n_channels = len(cycle.channels)
    verb = "holds" if n_channels == 1 else "hold"
    ax.set_title(f"{n_channels} of {trace.anatomy.d_model} channels {verb} the spike, half-way through the plateau")
    return fig


@drawn_if_spiking
def plateau(life: Lifecycle) -> Figure:
    """02: the size of every block's write into the first channel, over the plateau value, with ordinary channels."""
    cycle, trace = life.main, life.trace
    spikes = spike_rows(life)
    blocks = np.arange(1, trace.anatomy.n_blocks + 1)
    fig, ax = figure(size=(9.5, 4.2))
    share = (cycle.writes / cycle.value).abs().clamp(min=1e-8)
    held = spikes.stream[:, cycle.middle, trace.ordinary].abs()[:, None]
    ordinary = (
        (spikes.writes[..., trace.ordinary].abs() / held).flatten(2).transpose(0, 1).flatten(1).quantile(0.5, dim=1)
    )
    ax.plot(blocks, ordinary, color=ORDINARY, marker="s", ms=3.5, lw=0.8)
    ax.plot(blocks, share, color=SPIKE, marker="o", ms=3.5, lw=0.8)
    ax.axhline(0.01, color="black", lw=0.8, ls="--")
    ax.text(blocks[-1] * 1.02 + 1.2, 0.01, "1%", va="center", fontsize=9)
    ax.text(blocks[-1] + 1, float(share[-1]), f"channel {cycle.channel}", color=SPIKE, va="center", fontsize=9)
    ax.text(blocks[-1] + 1, float(ordinary[-1]), "ordinary\nchannels", color=ORDINARY, va="center", fontsize=9)
    span(ax, cycle)
    ax.set(
        yscale="log",
        xlabel="block (odd: attention, even: FFN)",
        ylabel="|write| ÷ what the channel\nholds half-way",
        xlim=(0, blocks[-1] * 1.02 + 1),
    )
    inside = share[cycle.plateau[0] : cycle.plateau[1]]
    typical = float(inside.median()) if len(inside) else float("nan")
    ax.set_title(
        f"Between step-up and step-down a block's typical write is {typical:.2%} of the spike"
        if len(inside)
        else "No block lies between step-up and step-down"
    )
    return fig


@drawn_if_spiking
def lives(life: Lifecycle) -> Figure:
    """02: the first channel of every spike token over depth, and of ordinary tokens."""
    cycle, trace = life.main, life.trace
    index = index_of(life, cycle.channel)
    fig, ax = figure(size=(9.5, 4))
    points = np.arange(len(trace.medians))
    smaller = trace.rows.drawn & ~cycle.is_spike & sum(c.is_spike for c in life.cycles).bool()
    for rows, colour, alpha in (
        (ordinary_rows(life), ORDINARY, 0.25),
        (trace.rows[smaller], SMALL, 0.9),
        (spike_rows(life), SPIKE, 0.6),
    ):
        ax.plot(points, rows.stream[..., index].T, color=colour, alpha=alpha, lw=0.9)
    linear = 10 ** np.floor(np.log10(max(1e-3, float(trace.medians[cycle.middle]))))
    ax.set_yscale("symlog", linthresh=linear)
    ax.axhline(0, color="black", lw=0.6)
    thousands(ax)
    span(ax, cycle)
    at = cycle.middle
    label = {"textcoords": "offset points", "ha": "center", "fontsize": 9}
    held = spike_rows(life).stream[:, at, index]
    ax.annotate(
        f"{len(held)} spike tokens", (at, float(held[held.abs().argmax()])), (0, 4), color=SPIKE, va="bottom", **label
    )
    low = float(ordinary_rows(life).stream[:, at, index].quantile(0.5))
    text = f"{len(ordinary_rows(life))} tokens drawn at random"
    if smaller.any():
        text += f" ({int(smaller.sum())} of them, in yellow, in a smaller cycle)"
    box = {"facecolor": "white", "alpha": 0.8, "lw": 0, "pad": 1}
    ax.annotate(text, (at, low), (0, -28), color="#404040", bbox=box, **label)
    ax.margins(y=0.08)
    ax.set(
        xlabel="depth: after block …",
        ylabel=f"value of channel {cycle.channel}\n(signed, log scale)",
        xlim=(0, points[-1] + 0.5),
    )
    first, last = (float(cycle.stream[p]) for p in cycle.plateau)
    ax.set_title(f"From {cycle.plateau[0]} to {cycle.plateau[1]} the spike goes from {first:,.0f} to {last:,.0f}")
    return fig


@drawn_if_spiking
def ratios(life: Lifecycle) -> Figure:
    """02: each spike channel over the first one, token by token, over its own median; flat lines are fixed ratios."""
    cycle, trace = life.main, life.trace
    shown = cycle.channels[:4] if len(cycle.channels) > 1 else trace.channels[:2].tolist()
    index = [index_of(life, c) for c in shown]
    fig, axes = figure(1, 2, size=(9.5, 4), sharey=True)
    groups = ((spike_rows(life), SPIKE, "spike tokens"), (ordinary_rows(life), ORDINARY, "ordinary tokens"))
    for ax, (rows, colour, name) in zip(axes, groups, strict=True):
        at = rows.stream[:, cycle.middle]
        order = at[:, index[0]].abs().argsort(descending=True)
        order = order[:: -(-len(order) // 80)]  # evenly, if there are too many to draw
        for rank, i in enumerate(index[1:]):
            ratio = at[order, i] / at[order, index[0]]
            shade = {
                "color": colour,
                "alpha": 1 - 0.25 * rank,
                "ms": 4,
                "lw": 0.8,
                "label": f"channel {shown[rank + 1]}",
            }
            ax.plot(range(1, len(order) + 1), (ratio / ratio.median()).clamp(-1, 3), marker=MARKERS[rank], **shade)
        ax.axhline(1, color="black", lw=0.6, zorder=0)
        ax.set(xlabel=f"{len(order)} {name}, the largest first", ylim=(-1.1, 3.7), yticks=range(-1, 4))
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.legend(fontsize=8, loc="upper center", ncols=3)
        spread = at[:, index[1]] / at[:, index[0]]
        varies = float(spread.std(correction=0) / spread.mean().abs())
        text = f"{name.capitalize()}: channel {shown[1]} ÷ {shown[0]}\nvaries by {brief(100 * varies)}%"
        ax.set_title(text, fontsize=11)
    axes[0].set_ylabel(f"channel ÷ channel {shown[0]},\nover its own median (edge: beyond)")
    return fig


@drawn_if_spiking
def cancellation(life: Lifecycle) -> Figure:
    """03: what step-down blocks take back from each token, against what the token holds on the plateau."""
    cycle = life.main
    index = index_of(life, cycle.channel)
    late = late_step_down(life)
    which = torch.tensor(late, dtype=torch.long) - 1
    fig, ax = figure(size=(9.5, 4.2))
    spikes, ordinary = spike_rows(life), ordinary_rows(life)
    for rows, colour, marker, name in ((ordinary, ORDINARY, "s", "ordinary"), (spikes, SPIKE, "o", "spike tokens")):
        ax.scatter(
            rows.stream[:, cycle.middle, index],
            -rows.writes[:, which, index].sum(1),
            s=26,
            color=colour,
            marker=marker,
            label=name,
        )
    held = spikes.stream[:, cycle.middle, index]
    ends = torch.tensor([0.0, float(held[held.abs().argmax()])])
    ax.plot(ends, ends, color="black", lw=0.8, ls="--")
    ax.text(float(ends[1]), float(ends[1]), "all of it ", ha="right", va="bottom", fontsize=9)
    ax.legend(fontsize=9, loc="upper left")
    ax.set(
        xlabel=f"channel {cycle.channel} half-way through the plateau",
        ylabel=f"taken back by\n{blocks_text(late)}",
    )
    thousands(ax, "x")
    thousands(ax, "y")
    evidence = lc3_step_down(life)
    taken = f"{evidence.measured['share_cancelled']:.0%}"
    elsewhere = evidence.control.get("share_cancelled_ordinary_tokens")
    ax.set_title(
        f"{_sentence(blocks_text(late))} {verb(late, 'take')} back {taken} of the plateau value on spike tokens"
        + (f", {elsewhere:.1%} elsewhere" if elsewhere is not None else ""),
        fontsize=11,
    )
    return fig


@drawn_if_spiking
def cycles(life: Lifecycle, decode: Callable[[list[int]], str]) -> Figure:
    """03: every cycle's first channel over depth, on its own tokens, with the words it falls on."""
    trace = life.trace
    fig, ax = figure(size=(9.5, 4.2))
    points = np.arange(len(trace.medians))
    for cycle, colour, marker in zip(life.cycles, (SPIKE, SMALL, SINK, "#009E73"), "os^v", strict=False):
        rows = trace.rows[cycle.is_spike]
        tokens, counts = rows.token.unique(return_counts=True)
        common = [quoted(decode([int(t)])) for t in tokens[counts.argsort(descending=True, stable=True)][:4]]
        label = f"channel {cycle.channel} on {len(rows)} tokens: {' '.join(common)} …"
        ax.plot(points, cycle.stream.abs(), color=colour, lw=1.6, marker=marker, ms=3, label=label)
    ax.plot(points, trace.threshold * trace.medians, color="black", ls="--", lw=0.8)
    ax.text(
        points[-1] + 0.5,
        trace.threshold * float(trace.medians[-1]),
        f"{trace.threshold:g}\nmedians",
        fontsize=8,
        va="center",
    )
    ax.plot(points, trace.medians, color=ORDINARY, lw=1.4)
    ax.text(points[-1] + 0.5, float(trace.medians[-1]), "median", color=ORDINARY, fontsize=9, va="center")
    ax.set(
        yscale="log",
        xlabel="depth: after block …",
        ylabel="|h| of the first channel,\nmedian over the cycle's tokens",
        xlim=(0, points[-1] * 1.06 + 1),
    )
    ax.margins(y=0.12)
    thousands(ax)
    ax.legend(loc="lower right", fontsize=9)
    words = {1: "One cycle", 2: "Two cycles", 3: "Three cycles", 4: "Four cycles"}[len(life.cycles)]
    ax.set_title(f"{words}, written by {' and by '.join(blocks_text(c.step_up) for c in life.cycles)}")
    return fig


@styled
def across_models(rows: Sequence[tuple[str, int, Sequence[int], Sequence[int], bool]]) -> Figure:
    """03: step-up and step-down blocks of many models over relative depth.

    Args:
        rows: a name, the number of blocks, step-up blocks, step-down blocks, and whether the paper measured it.
    """
    fig, ax = figure(size=(9.5, 0.9 + 0.36 * len(rows)))
    for y, (_, n_blocks, up, down, paper) in enumerate(reversed(rows)):
        colour = ORDINARY if paper else SPIKE
        ax.plot([0, 100], [y, y], color="#DDDDDD", lw=1, zorder=0)
        if up and down:
            ax.plot(
                [100 * max(up) / n_blocks, 100 * min(down) / n_blocks], [y, y], color=colour, lw=4, alpha=0.35, zorder=1
            )
        for blocks, marker in ((up, "^"), (down, "v")):
            ax.scatter(
                [100 * b / n_blocks for b in blocks], [y] * len(blocks), marker=marker, color=colour, s=46, zorder=2
            )
    ax.set_yticks(range(len(rows)), [f"{name}{' (paper)' if paper else ''}" for name, *_, paper in reversed(rows)])
    for tick, (*_, paper) in zip(ax.get_yticklabels(), reversed(rows), strict=True):
        tick.set_fontweight("normal" if paper else "bold")
    ax.set(
        xlabel="depth of the block, % of all blocks (▲ step-up, ▼ step-down, bar: plateau)",
        xlim=(-1, 101),
        ylim=(-0.6, len(rows) - 0.4),
    )
    spans = [(min(down) - max(up)) / n_blocks for _, n_blocks, up, down, _ in rows if up and down]
    ax.set_title(
        f"In {sum(s > 0.5 for s in spans)} of {len(rows)} models the plateau spans more than half of the depth"
    )
    ax.spines["left"].set_visible(False)
    ax.tick_params(axis="y", length=0)
    return fig
