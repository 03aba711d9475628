"""The figures of notebooks 08 and 11: what becomes of spike, sink and model where the chain is broken."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from spikesink.common import brief
from spikesink.model.anatomy import Block
from spikesink.patching.behaviour import Behaviour
from spikesink.patching.cuts import CUTS, BlockMap, Broken, Doses, named
from spikesink.patching.outcome import CLEAN, View
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SINK_MAP, SPIKE, SPIKE_MAP
from spikesink.plots.style import (
    above,
    drawn_where_applicable,
    figure,
    label_layers,
    log_ticks,
    note,
    quoted,
    span,
    styled,
    token_text,
    whole,
)

LOOKS = {
    CLEAN: ("black", "o", "-"),
    "skipped": (OTHERS[1], "^", "--"),
    "masked": (SINK, "s", "-"),
    "masked_everywhere": (OTHERS[2], "v", ":"),
    "decoupled": (SPIKE, "D", "-"),
}
SHOWN_KEYS = 12
AS_IT_IS = "as it is"
MAPPED = {"aspect": "auto", "interpolation": "nearest"}


def _is_control(key: str) -> bool:
    return key in CUTS and CUTS[key].control


@drawn_where_applicable
def broken_chain(broken: Broken) -> Figure:
    """08: rows the cuts, columns what is left of the spike, of the sink, and the perplexity."""
    names, outcomes = list(broken.outcomes), list(broken.outcomes.values())
    fig, axes = figure(1, 3, size=(12.5, 0.27 * len(names) + 1.3), sharey=True)
    y = np.arange(len(names))
    spike = [100 * broken.at_spikes(name) / broken.at_spikes(CLEAN) for name in names]
    bars = (
        (spike, SPIKE, "largest entry at the spike tokens,\n% of the clean run"),
        ([outcome.sink_ratio for outcome in outcomes], SINK, "sink ratio"),
    )
    for ax, (values, colour, label) in zip(axes, bars, strict=False):
        ax.barh(y, values, color=[ORDINARY if _is_control(name) else colour for name in names], height=0.62)
        ax.axvline(values[0], color="black", lw=0.8, ls=":")
        ax.set_xlabel(label)
    last, perplexity = axes[2], [outcome.perplexity for outcome in outcomes]
    for i, (name, outcome) in enumerate(broken.outcomes.items()):
        low, high = outcome.interval()
        colour, marker = (ORDINARY, "s") if _is_control(name) else ("black", "o")
        last.plot([low, high], [i, i], color=colour, lw=1.2)
        last.plot(perplexity[i], i, color=colour, marker=marker, ms=5)
        note(last, brief(perplexity[i]), (np.nanmax([high, perplexity[i]]), i), (6, 0), va="center", fontsize=8)
    last.axvline(perplexity[0], color="black", lw=0.8, ls=":")
    last.set(xscale="log", xlabel="perplexity (line: 95% over windows)", xlim=(None, 30 * max(perplexity)))
    axes[0].set_yticks(y, [named(name, AS_IT_IS) for name in names], fontsize=9)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(ORDINARY if _is_control(name) else "black")
    axes[0].invert_yaxis()
    links = [CUTS[name].link if name in CUTS else "" for name in names]
    for i, (before, link) in enumerate(pairwise(links), 1):
        if link != before:
            for ax in axes:
                ax.axhline(i - 0.5, color=ORDINARY, lw=0.5)
            last.text(1.03, i - 0.4, link, transform=last.get_yaxis_transform(), va="top", style="italic")
    main = {"decoupled": "spike out, keys and values held", "zeroed": "spike zeroed", "masked": "sink masked"}
    told = [f"{words} {brief(broken.outcomes[key].perplexity)}" for key, words in main.items() if key in names]
    above(fig, f"Perplexity {brief(perplexity[0])}; " + ", ".join(told) + " (grey: controls)")
    return fig


@drawn_where_applicable
def dose_response(doses: Doses) -> Figure:
    """08: perplexity and sink ratio against the factor by which the spike is scaled."""
    fig, (left, right) = figure(1, 2, size=(11, 4))
    x, control = [float(factor) for factor in doses.factors], doses.control.values()
    perplexity = [outcome.perplexity for outcome in doses.outcomes]
    low, high = zip(*(outcome.interval() for outcome in doses.outcomes), strict=True)
    grey = {"color": ORDINARY, "marker": "s", "ms": 5, "lw": 0}
    left.fill_between(x, low, high, color=SPIKE, alpha=0.15, lw=0)
    left.plot(x, perplexity, color=SPIKE, marker="o", ms=5, label="spike channels")
    left.plot(list(doses.control), [outcome.perplexity for outcome in control], label="as many random channels", **grey)
    left.set(yscale="log", xlabel="spike multiplied by", ylabel="perplexity (band: 95% over windows)")
    left.legend(fontsize=9)
    log_ticks(left.yaxis)
    right.plot(x, [outcome.sink_ratio for outcome in doses.outcomes], color=SINK, marker="o", ms=5)
    right.plot(list(doses.control), [outcome.sink_ratio for outcome in control], **grey)
    right.set(xlabel="spike multiplied by", ylabel="sink ratio", ylim=(0, 1))
    for ax in (left, right):
        ax.axvline(1, color="black", lw=0.8, ls=":")
    clean = perplexity[x.index(1)]
    enough = [factor for factor, value in zip(x, perplexity, strict=True) if factor < 1 and value <= 2 * clean]
    text = f"Perplexity {brief(perplexity[0])} with the spike zeroed, {brief(clean)} as it is"
    if enough and perplexity[0] > 2 * clean:
        text += f"; {enough[0]:.0%} of the spike is enough for less than twice that"
    above(fig, text)
    return fig


@drawn_where_applicable
def where_it_goes(broken: Broken, names: Sequence[str] = (CLEAN, "skipped", "masked", "masked_everywhere")) -> Figure:
    """08: how much attention each of the first key positions gets, layer by layer, under some cuts."""
    shown = {name: broken.outcomes[name].attention[:, :SHOWN_KEYS] for name in names if name in broken.outcomes}
    fig, axes = figure(1, len(shown), size=(3.1 * len(shown), 4.4), sharey=True, squeeze=False)
    for ax, (name, attention) in zip(axes[0], shown.items(), strict=True):
        image = ax.imshow(attention, cmap=SINK_MAP, vmin=0, vmax=1, origin="lower", **MAPPED)
        ax.set_title(named(name, AS_IT_IS).capitalize(), fontsize=9.5, fontweight="normal")
        ax.set_xlabel("key position")
        whole(ax)
        ax.spines[:].set_visible(False)
    axes[0, 0].set_ylabel("layer")
    fig.colorbar(image, ax=axes, label="attention it gets,\nmean over heads and queries", pad=0.01)
    layers = broken.means.layers
    plateau = {name: attention[layers].mean(0) for name, attention in shown.items()}
    text = f"Position 0 gets {float(plateau[CLEAN][0]):.0%} of attention on the plateau"
    if "skipped" in plateau:
        text += f", {float(plateau['skipped'][0]):.0%} without the step-up"
    if "masked_everywhere" in plateau:
        most, position = plateau["masked_everywhere"].max(0)
        text += f"; masked everywhere, position {int(position)} gets {float(most):.0%}"
    above(fig, text)
    return fig


@drawn_where_applicable
def near_and_far(behaviour: Behaviour) -> Figure:
    """08: what cuts cost by position; and what they do to copying, recall and greedy generation."""
    names = list(behaviour.by_position)
    fig, axes = figure(1, 4, size=(13, 3.8), width_ratios=(1.7, 1, 1, 1))
    for name in names[1:]:
        colour, marker, style = LOOKS.get(name, (ORDINARY, "x", "-"))
        change = behaviour.by_position[name] - behaviour.by_position[CLEAN]
        axes[0].plot(change, color=colour, marker=marker, ls=style, ms=5, label=named(name, AS_IT_IS))
    axes[0].axhline(0, color="black", lw=0.8)
    axes[0].set_xticks(range(len(behaviour.edges) - 1), [f"{a}–{b - 1}" for a, b in pairwise(behaviour.edges)])
    axes[0].set(xlabel="position that predicts", ylabel="loss over the clean run's, nats")
    axes[0].legend(fontsize=8)
    y, colours = np.arange(len(names)), [LOOKS.get(name, (ORDINARY,))[0] for name in names]
    pairs = (
        (behaviour.second_copy, behaviour.first_copy, "loss on the second copy\n(grey: the first), nats"),
        (behaviour.recall, behaviour.no_answer, "loss on the answer\n(grey: not told), nats"),
    )
    for ax, (own, control, label) in zip(axes[1:3], pairs, strict=True):
        ax.barh(y + 0.2, [own.get(name, np.nan) for name in names], color=colours, height=0.38)
        ax.barh(y - 0.2, [control.get(name, np.nan) for name in names], color=ORDINARY, height=0.38, alpha=0.5)
        ax.set_xlabel(label)
    same = {name: behaviour.same_greedy.get(name, np.nan) for name in names}
    axes[3].barh(y, [100 * share for share in same.values()], color=colours, height=0.6)
    axes[3].set_xlabel("% of greedy tokens\nthat are the clean run's")
    for ax in axes[1:]:
        ax.set_yticks(y, [named(name, AS_IT_IS) if ax is axes[1] else "" for name in names], fontsize=8)
        ax.invert_yaxis()
    text = "What a cut costs, near and far, in copying, recall and writing"
    if "decoupled" in same:
        text = f"Spike out, keys and values held: the same token in {same['decoupled']:.0%} of places"
        text += f"; sink masked: in {same['masked']:.0%}" if "masked" in same else ""
    above(fig, text)
    return fig


@drawn_where_applicable
def causal_map(mapped: BlockMap) -> Figure:
    """08: for every block, what becomes of spike, sink and perplexity where it writes nothing at the spike tokens."""
    fig, axes = figure(3, 1, size=(9.5, 6.2), sharex=True)
    blocks, left = np.arange(1, len(mapped.outcomes) + 1), mapped.spike().numpy()
    ratio = np.array([outcome.perplexity for outcome in mapped.outcomes]) / mapped.clean.perplexity
    sinks = np.array([outcome.sink_ratio for outcome in mapped.outcomes])
    rows = (
        (100 * left, SPIKE, "largest entry at\nspike tokens, %", 100),
        (sinks, SINK, "sink ratio", mapped.clean.sink_ratio),
        (ratio, "black", "perplexity ÷\nthe clean run's", 1),
    )
    for ax, (values, colour, label, clean) in zip(axes, rows, strict=True):
        ax.axhline(clean, color="black", lw=0.7, ls=":")
        for odd, marker, fill in ((1, "o", "none"), (0, "s", colour)):
            kind = blocks % 2 == odd
            ax.plot(blocks[kind], values[kind], color=colour, marker=marker, mfc=fill, ms=4.5, lw=0)
        ax.set_ylabel(label)
        span(ax, mapped.cycle, label=ax is axes[0])
    axes[1].set_ylim(0, 1)
    axes[2].set(yscale="log")
    label_layers(axes[2].xaxis, len(blocks) // 2)
    axes[2].set_xlabel("layer whose block writes nothing at the spike tokens (circles: attention, squares: MLP)")
    log_ticks(axes[2].yaxis)
    least, worst = (Block(blocks[i]) for i in (left.argmin(), ratio.argmax()))
    text = f"Without {least}, {brief(100 * float(left.min()))}% of the spike is left"
    above(fig, f"{text}; without {worst}, {brief(float(ratio.max()))} times the perplexity")
    return fig


@styled
def patched_view(view: View, head: int | None = None) -> Figure:
    """11: one prompt's largest entries and the attention its tokens get, as it is and under interventions."""
    fig, axes = figure(1, 4, size=(13, 0.16 * max(16, len(view.tokens)) + 1.6))
    size = view.magnitude.clamp(min=1e-3)
    norm = {"norm": LogNorm(float(size.quantile(0.05)), float(size.max()))}
    attention = view.attention.mean(2) if head is None else view.attention[:, :, head]
    for run, name in enumerate(("clean", "patched")):
        spikes = axes[run].imshow(size[run].T, cmap=SPIKE_MAP, **norm, **MAPPED)
        axes[run].set(title=f"largest entry |h|, {name}", xlabel="layer it enters")
        sinks = axes[2 + run].imshow(attention[run].T, cmap=SINK_MAP, vmin=0, vmax=1, **MAPPED)
        which = "mean over heads" if head is None else f"head {head}"
        axes[2 + run].set(title=f"attention it gets, {name}", xlabel=f"layer ({which})")
    for i, ax in enumerate(axes):
        ax.title.set_fontsize(10)
        ax.set_yticks(range(len(view.tokens)), ["" if i else token_text(text) for text in view.tokens], fontsize=8)
        whole(ax)
        ax.spines[:].set_visible(False)
    fig.colorbar(spikes, ax=axes[1], pad=0.02)
    fig.colorbar(sinks, ax=axes[3], pad=0.02, label="attention, mean over queries")
    clean, patched = (quoted(max(view.top, key=lambda row: row[run])[0]) for run in (1, 2))
    told = f"{clean} stays the next token" if clean == patched else f"the next token changes from {clean} to {patched}"
    largest = [brief(float(view.magnitude[run].max())) for run in (0, 1)]
    above(fig, f"Largest entry of all {largest[0]}, patched {largest[1]}; {told}")
    return fig
