"""The figures of notebook 04: the step-up block as a directional quadratic amplifier."""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from torch import Tensor

from spikesink.chain.amplifier import Census, Reading, pair_cosines
from spikesink.chain.lifecycle import Lifecycle
from spikesink.chain.trace import median
from spikesink.common import brief
from spikesink.plots.palette import ORDINARY, SPIKE, SPIKE_MAP
from spikesink.plots.style import drawn_where_applicable, figure, note, thousands

MOST_POINTS = 4000  # of ordinary tokens drawn, evenly chosen


def _points(reading: Reading) -> tuple[Tensor, Tensor]:
    """Which tokens to draw: every spike token, and ordinary ones, evenly, if there are too many."""
    others = (~reading.is_spike).flatten().nonzero()[:, 0]
    return reading.is_spike.flatten().nonzero()[:, 0], others[:: max(1, -(-len(others) // MOST_POINTS))]


@drawn_where_applicable
def gates(reading: Reading) -> Figure:
    """04 (the paper's figure 2): how close the activation is to the identity, token by token."""
    spikes, others = _points(reading)
    fig, (left, right) = figure(1, 2, size=(10.5, 4.4))
    size = reading.largest.flatten()
    low = max(float(size.quantile(0.01)), float(size.max()) * 1e-6)
    norm = LogNorm(low, max(float(size.max()), 10 * low))
    for which, marker, scale in ((others, "s", 7), (spikes, "o", 44)):
        looks = {"c": size[which], "cmap": SPIKE_MAP, "norm": norm, "marker": marker, "s": scale, "rasterized": True}
        looks |= {"edgecolors": "black", "linewidths": 0.7} if marker == "o" else {"linewidths": 0}
        values = (reading.silu_ratio, reading.silu_cosine, reading.weighted_cosine)
        ratio, cosine, weighted = (value.flatten()[which] for value in values)
        left.scatter(ratio, cosine, **looks)
        drawn = right.scatter(cosine, weighted, **looks)
    fig.colorbar(drawn, ax=right, label="largest entry of the block's output")
    left.set(xlabel="norm ratio |σ(g)| ÷ |g|", ylabel="cosine of σ(g) and g, all neurons alike")
    right.set_xlabel("cosine, all neurons alike")
    right.set_ylabel("cosine, neurons weighted by what\nthey add to the spike channel")
    plain, weighted = (median(value[reading.is_spike]) for value in values[1:])
    left.set_title(f"All neurons: {plain:.2f} on spike tokens (circles)", fontsize=11)
    right.set_title(f"Those that write the spike: {weighted:.2f}", fontsize=11)
    return fig


@drawn_where_applicable
def gains(census: Census, life: Lifecycle) -> Figure:
    """04 (the paper's figure 3): ||U_k||_F of every channel of every FFN block, with the spike's pairs marked."""
    fig, (ax, right) = figure(1, 2, size=(11, 5), width_ratios=(2, 1), sharey=True)
    low = float(census.gain[census.gain > 0].quantile(0.02))
    looks = {"aspect": "auto", "origin": "lower", "cmap": SPIKE_MAP, "norm": LogNorm(), "interpolation": "nearest"}
    image = ax.imshow(census.gain.clamp(min=low), rasterized=True, **looks)
    fig.colorbar(image, ax=ax, label="gain ||U_k||_F (log scale)", pad=0.02)
    rows = census.blocks
    shown = range(0, len(rows), max(1, len(rows) // 10))
    ax.set_yticks(shown, [rows[i].layer for i in shown])
    ax.set(xlabel="channel", ylabel="FFN of layer")
    ax.spines[:].set_visible(False)
    levels = range(len(rows))
    right.plot(census.gain.quantile(0.5, dim=1), levels, color=ORDINARY, lw=1.4, label="median channel")
    right.plot(census.gain.amax(1), levels, color="black", lw=0.8, ls=":", label="largest")
    right.set(xscale="log", xlabel="gain ||U_k||_F")
    if life.main is None:
        ax.set_title("The gains of all channels; nothing spikes in this model")
        return fig
    channel, ranks = life.main.channel, []
    right.plot(census.gain[:, channel], levels, color=SPIKE, lw=1.4, label=f"channel {channel}")
    for blocks, marker, name in ((life.main.step_up, "^", "step-up"), (life.main.step_down, "v", "step-down")):
        y = [rows.index(block) for block in blocks if block in rows]
        ax.plot([channel] * len(y), y, marker=marker, ms=9, mfc="none", mec="black", mew=1.5, lw=0, clip_on=False)
        right.plot(census.gain[y, channel], y, marker=marker, color=SPIKE, ms=7, lw=0, label=name, clip_on=False)
        ranks += [census.rank(rows[i], channel) for i in y]
    right.legend(fontsize=7, loc="lower left", bbox_to_anchor=(-0.05, 1), ncols=2)
    title = f"The gains of all channels; no FFN block is a step for channel {channel}"
    if ranks:
        title = f"Without any text: channel {channel} of the step blocks ranks {min(ranks):,} to {max(ranks):,} "
        title += f"of {census.gain.numel():,} pairs"
    ax.set_title(title, fontsize=11)
    return fig


@drawn_where_applicable
def spectra(reading: Reading, spectra: Mapping[int, Float[Tensor, " pair"]]) -> Figure:
    """04 (the paper's figure 4): the eigenvalues of S_k of the spike channel and of ordinary ones, over its norm."""
    fig, ax = figure(size=(9.5, 4.2))
    for channel, values in reversed(list(spectra.items())):
        spike, ranks = channel == reading.channel, np.arange(1, len(values) + 1)
        looks = {"color": SPIKE if spike else ORDINARY, "zorder": 2 + spike}
        ax.plot(ranks, values.abs(), lw=1.6 if spike else 0.7, alpha=1 if spike else 0.6, **looks)
        for sign, marker in ((1, "^"), (-1, "v")):
            of_sign = values.sign() == sign
            ax.plot(ranks[of_sign], values.abs()[of_sign], marker=marker, lw=0, ms=6 if spike else 3, **looks)
    first = spectra[reading.channel]
    height, share = float(first[0].abs()), float(reading.spike.shares[0])
    text = f"channel {reading.channel} (spike): {height:.2f}² = {share:.0%}"
    note(ax, text, (1, height), (10, 0), color=SPIKE, va="center")
    others = [v for channel, v in spectra.items() if channel != reading.channel]
    if others:
        typical = float(np.median([v[0].abs() for v in others]))
        note(ax, f"{len(others)} ordinary channels", (2, typical), (10, 12), color=ORDINARY)
    ax.set(
        yscale="log",
        xlabel="eigenvalues of S_k, the largest in size first (▲ positive, ▼ negative)",
        ylabel="|eigenvalue| ÷ ||S_k||_F",
    )
    thousands(ax)
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_title(f"One direction holds {share:.0%} of the spike channel's form in {reading.block}", fontsize=11)
    return fig


@drawn_where_applicable
def shared_directions(reading: Reading) -> Figure:
    """04: |cos| between the top eigenvectors of all spike channels and of as many ordinary ones."""
    spike, ordinary = reading.spike, reading.ordinary
    n = min(len(ordinary.channels), max(6, len(spike.channels)))
    vectors = np.concatenate([spike.vectors.numpy(), ordinary.vectors.numpy()[:n]])
    channels = [*spike.channels, *ordinary.channels[:n]]
    cosines = np.abs(vectors @ vectors.T)
    fig, ax = figure(size=(7.4, 6.2))
    image = ax.imshow(cosines, cmap=SPIKE_MAP, vmin=0, vmax=1)
    fig.colorbar(image, ax=ax, label="|cos| of the top eigenvectors", pad=0.02)
    for (i, j), cosine in np.ndenumerate(cosines):
        shade = "white" if cosine > 0.55 else "black"
        ax.text(j, i, f"{cosine:.1f}".removeprefix("0"), ha="center", va="center", fontsize=6, color=shade)
    for line in (ax.axhline, ax.axvline):
        line(len(spike.channels) - 0.5, color="black", lw=1.2)
    ax.set_xticks(range(len(channels)), channels, rotation=90, fontsize=8)
    ax.set_yticks(range(len(channels)), channels, fontsize=8)
    for labels in (ax.get_xticklabels(), ax.get_yticklabels()):
        for i, label in enumerate(labels):
            label.set_color(SPIKE if i < len(spike.channels) else ORDINARY)
    many = "s" * (len(spike.channels) > 1)
    ax.set(xlabel=f"channel ({len(spike.channels)} spike channel{many}, then {n} ordinary ones)", ylabel="channel")
    ax.spines[:].set_visible(False)
    pairs = pair_cosines(spike.vectors)
    text = "One spike channel, one direction"
    if len(pairs):
        text = (
            f"Spike channels' directions: |cos| {brief(median(pairs))} (median), {brief(float(pairs.min()))} at least"
        )
    ax.set_title(text, fontsize=11)
    return fig


@drawn_where_applicable
def alignment(reading: Reading) -> Figure:
    """04: what the block writes into the spike channel against cos(s*, h~), with |lambda| d cos^2 drawn over it."""
    spikes, others = _points(reading)
    cosine, size = reading.cosine.flatten(), reading.write.abs().flatten()
    fig, ax = figure(size=(9.5, 4.6))
    floor = max(float(size.max()) * 1e-6, 1e-12)
    for which, looks in (
        (others, {"color": ORDINARY, "marker": "s", "s": 6, "alpha": 0.5, "label": "all other tokens"}),
        (spikes, {"color": SPIKE, "marker": "o", "s": 30, "alpha": 0.9, "label": f"{len(spikes)} spike tokens"}),
    ):
        ax.scatter(cosine[which], size[which].clamp(min=floor), rasterized=True, linewidths=0, **looks)
    ax.legend(fontsize=9, loc="lower right")
    top, far = abs(float(reading.pairs.values[0])) * reading.d_model, float(cosine.abs().max())
    for side, style in ((1, "-"), (-1, ":")):
        x = np.linspace(far * 1e-3, far, 400)
        ax.plot(side * x, top * x**2, color="black", lw=1, ls=style)
    note(ax, "|λ| d cos²", (0.75 * far, top * (0.75 * far) ** 2), (6, -14), fontsize=10)
    ax.axvline(0, color="black", lw=0.5)
    ax.set(
        yscale="log",
        xlabel="cos(s*, h~): how far the token points along the block's direction (s* has the spike tokens' side)",
        ylabel=f"|what {reading.block} writes\ninto channel {reading.channel}|",
        ylim=(float(size.quantile(0.002).clamp(min=floor)) / 2, 3 * float(size.max())),
    )
    thousands(ax)
    typical, other = (median(reading.cosine.abs()[which]) for which in (reading.is_spike, ~reading.is_spike))
    if not len(others):
        text = f"Every token spikes, and |cos(s*, h~)| is {brief(typical)}"
    elif typical >= 3 * other:
        text = f"Spike tokens point along s* (|cos| {brief(typical)}), others do not ({brief(other)})"
    else:
        text = f"Spike tokens point along s* no more than others do: |cos| {brief(typical)} and {brief(other)}"
    ax.set_title(text, fontsize=11)
    return fig
