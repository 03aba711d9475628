"""The figures of notebook 05: why the first token."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from spikesink.chain.firsttoken import Elsewhere, FirstReplaced, Fork, Probe
from spikesink.chain.trace import median
from spikesink.common import NotApplicable
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SPIKE
from spikesink.plots.style import drawn_where_applicable, figure, quoted, thousands, whole


@drawn_where_applicable
def fork(fork: Fork, elsewhere: Elsewhere | NotApplicable) -> Figure:
    """05: the same tokens block by block towards s*, first in a window and after a text; and how many spike where."""
    fig, (ax, right) = figure(1, 2, size=(11, 4.4), width_ratios=(3, 1))
    end = fork.block  # what enters the block is what its direction is about
    for path, colour, marker, name in (
        (fork.first, SPIKE, "o", "first"),
        (fork.exceptions, OTHERS[0], "^", "the exceptions, first"),
        (fork.later, ORDINARY, "s", f"after {fork.position} tokens of text"),
    ):
        if path.shape[1]:
            depth = np.arange(end) / 2
            ax.plot(depth, path[:end], color=colour, alpha=0.12, lw=0.6)
            ax.plot(depth, path[:end].quantile(0.5, dim=1), color=colour, marker=marker, ms=4, lw=1.6, label=name)
    ax.axhline(0, color="black", lw=0.6)
    ax.set(xlabel=f"layer that the stream enters (up to {fork.block})", ylabel=f"cosine with s* of\n{fork.block}")
    whole(ax)
    ax.legend(loc="upper left", fontsize=9)
    first, later = (median(path[end - 1]) for path in (fork.first, fork.later))
    text = f"The same {fork.first.shape[1]} tokens reach cosine {first:.2f} standing first, {later:.2f} after a text"
    ax.set_title(text, fontsize=11)
    if isinstance(elsewhere, NotApplicable):
        right.axis("off")
        return fig
    values = [100 * share for share in elsewhere.share.values()]
    right.plot(range(len(values)), values, color=SPIKE, marker="o", lw=1)
    right.set_xticks(range(len(values)), elsewhere.share.keys())
    ylabel = f"% of another {elsewhere.n_tokens} tokens\nthat spike there"
    right.set(xlabel="position", ylabel=ylabel, ylim=(-4, 104))
    most = max(values[1:])
    right.set_title(f"Later at most {most:.0f}% spike" if most else "Later none spikes", fontsize=11)
    return fig


@drawn_where_applicable
def vocabulary(probe: Probe, decode: Callable[[list[int]], str], counts: Int[Tensor, " vocabulary"]) -> Figure:
    """05: what every vocabulary entry reaches at position 0, and the share that spikes, by threshold."""
    fig, (left, right) = figure(1, 2, size=(11, 4.2))
    value, weight = probe.value, counts[probe.tokens].double()
    bins = np.linspace(min(0.0, float(value.min())), float(value.max()), 80)
    before = probe.before.clamp(bins[0], bins[-1]).numpy()
    left.hist(value.numpy(), bins=bins, color=SPIKE, alpha=0.8, log=True, label=f"after {probe.block}")
    left.hist(before, bins=bins, histtype="step", color="black", log=True, label="before the step-up")
    left.legend(fontsize=9, loc="upper center")
    left.axvline(probe.threshold, color="black", lw=0.8, ls="--")
    left.text(probe.threshold, 0.97, " threshold", transform=left.get_xaxis_transform(), fontsize=9, va="top")
    left.set(xlabel=f"channel {probe.channel} at position 0", ylabel="vocabulary entries")
    thousands(left, "x")
    thousands(left)
    left.set_title(_exceptions_in_words(probe.exceptions().tolist(), decode), fontsize=10)
    thresholds = np.geomspace(0.001, 2, 120) * probe.threshold * 10
    ordered, order = value.sort()
    for weights, colour, style, name in (
        (np.ones(len(value)), SPIKE, "-", "each entry once"),
        (weight[order].numpy(), SINK, ":", "as often as it occurs in the text"),
    ):
        below = np.concatenate([[0], np.cumsum(weights)])
        at = np.searchsorted(ordered.numpy(), thresholds)
        right.plot(
            thresholds / (10 * probe.threshold), 100 * (1 - below[at] / below[-1]), color=colour, ls=style, label=name
        )
    right.axvline(0.1, color="black", lw=0.8, ls="--")
    right.set(
        xscale="log",
        xlabel="threshold ÷ plateau value (dashed: the tenth that counts)",
        ylabel="% above it",
        ylim=(-3, 103),
    )
    thousands(right, "x")
    right.legend(loc="lower left", fontsize=9)
    share = float(probe.spiking.double().mean())
    right.set_title(f"{share:.2%} of {len(value):,} entries spike at position 0", fontsize=11)
    return fig


def _exceptions_in_words(tokens: Sequence[int], decode: Callable[[list[int]], str], most: int = 4) -> str:
    """How many there are, and the first of them."""
    if not tokens:
        return "No exceptions"
    shown = ", ".join(quoted(decode([token])) for token in tokens[:most])
    return f"{len(tokens):,} exception{'s' * (len(tokens) > 1)}: {shown}{' …' * (len(tokens) > most)}"


@drawn_where_applicable
def first_replaced(replaced: FirstReplaced, probe: Probe) -> Figure:
    """05: windows in which something else stands first: attention to oneself against what the channel then holds."""
    fig, axes = figure(1, len(replaced), size=(11, 4), sharex=True, sharey=True, squeeze=False)
    n_spikes, n_later, own, rest = [], [], [], []
    for ax, (name, attention) in zip(axes[0], replaced, strict=True):
        spikes, others = attention.later_spikes(probe.threshold)
        for which, colour, marker, size in ((others, ORDINARY, "s", 7), (spikes, SPIKE, "o", 16)):
            value = attention.value[which].clamp(min=probe.threshold * 1e-4)
            style = {"color": colour, "marker": marker, "s": size, "alpha": 0.7, "linewidths": 0}
            ax.scatter(attention.mean[which], value, rasterized=True, **style)
        ax.axhline(probe.threshold, color="black", lw=0.8, ls="--")
        ax.set(yscale="log", xlim=(0, 1.02), xlabel="attention to itself")
        thousands(ax)
        n_spikes.append(int(spikes.sum()))
        n_later.append(int((spikes | others).sum()))
        own.append(attention.self_attention_at(spikes, spikes))
        rest.append(attention.self_attention_at(others, spikes))
        ax.set_title(f"{name} first:\n{n_spikes[-1]} of {n_later[-1]} later spike", fontsize=10)
    axes[0, 0].set_ylabel("spike channel after the step-up\n(at the lower edge: nothing)")
    total = sum(n_spikes[1:])  # the first windows are as they are
    text = f"{total or 'no'} of {sum(n_later[1:]):,} later tokens {'does' if total == 1 else 'do'}"
    if total:
        text += f": attention to itself {np.nanmean(own[1:]):.0%}, others there {np.nanmean(rest[1:]):.0%}"
    fig.suptitle(f"When the first token does not spike, {text}", x=0.01, ha="left", fontsize=12, fontweight="bold")
    return fig
