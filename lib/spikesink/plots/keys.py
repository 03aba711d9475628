"""The figures of notebook 07 about why a token is a sink: what keys, values and queries are like."""

import numpy as np
import torch
from matplotlib.figure import Figure

from spikesink.chain.keys import AttentionReading, Cloud, Geometry, Rebuilt
from spikesink.chain.lifecycle import Lifecycle
from spikesink.chain.trace import spearman
from spikesink.common import NotApplicable, brief
from spikesink.plots.palette import ORDINARY, OTHERS, SINK, SMALL, SPIKE
from spikesink.plots.style import above, drawn_where_applicable, figure, note, whole

BELOW = {"fontsize": 8, "loc": "upper left", "bbox_to_anchor": (0, -0.18)}


@drawn_where_applicable
def sink_keys(geometry: Geometry, rebuilt: Rebuilt | NotApplicable, life: Lifecycle) -> Figure:
    """07: the spike tokens' keys: how many dimensions, how many rows of W_K, and how small their values."""
    fig, (left, middle, right) = figure(1, 3, size=(13, 4.2))
    layers, plateau = np.arange(geometry.anatomy.n_layers), list(life.main.layers)
    for (stage, groups), style in zip(geometry.dimension.items(), ("-", ":"), strict=False):
        for name, colour, label in (("spike", SPIKE, "spike tokens"), ("matched", ORDINARY, "as many others")):
            values = groups[name].quantile(0.5, dim=1)
            left.plot(layers, values, color=colour, ls=style, lw=1.6, label=f"{label}, {stage} RoPE")
    left.set(xlabel="layer", ylabel="effective dimension of keys")
    left.set_ylim(0.9, 1.05 * max(1.5, left.get_ylim()[1]))
    on_plateau = float(geometry.dimension["before"]["spike"][plateau].quantile(0.5))
    left.set_title(f"Dimension {on_plateau:.2f} on the plateau", fontsize=11)
    if isinstance(rebuilt, NotApplicable):
        middle.axis("off")
    else:
        _rows(middle, rebuilt, geometry.anatomy.d_model)
    for name, colour, marker, label in (
        ("spike", SPIKE, "o", "spike tokens"),
        ("next", ORDINARY, "s", "the token right after"),
    ):
        ratio = geometry.value_norm[name] / geometry.value_norm["other"]
        right.plot(layers, ratio.quantile(0.5, dim=1), color=colour, marker=marker, ms=4, lw=1.4, label=label)
    right.axhline(0.5, color="black", lw=0.6, ls=":")
    right.set(xlabel="layer", ylabel="|v| ÷ |v| of other tokens", ylim=(0, None))
    small = float((geometry.value_norm["spike"] / geometry.value_norm["other"])[plateau].quantile(0.5))
    right.set_title(f"Values are {small:.2f} as long", fontsize=11)
    for ax in (left, right):
        whole(ax)
        ax.legend(**BELOW)
        ax.axvspan(plateau[0] - 0.5, plateau[-1] + 0.5, color=SPIKE, alpha=0.1, lw=0)
    return fig


def _rows(ax, rebuilt: Rebuilt, d_model: int) -> None:
    """How well keys are rebuilt, by how many rows of W_K."""
    rows = np.arange(1, len(rebuilt.channels) + 1)
    for values, colour, marker, label in (
        (rebuilt.spike, SPIKE, "o", "spike tokens"),
        (rebuilt.other_tokens, ORDINARY, "s", "other tokens, same rows"),
        (rebuilt.other_channels, OTHERS[0], "^", "spike tokens, their next strongest"),
    ):
        low, median, high = values.flatten(1).quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
        ax.plot(rows, median, color=colour, marker=marker, ms=5, lw=1.4, label=label)
        ax.fill_between(rows, low, high, color=colour, alpha=0.12)
    ax.set(xlabel="rows of W_K used", ylabel="cosine with the whole W_K h~", ylim=(-0.3, 1.05))
    ax.set_xlim(0.5, len(rows) + 0.5)
    whole(ax)
    ax.legend(**BELOW)
    best = float(rebuilt.spike[-1].quantile(0.5))
    ax.set_title(f"{len(rows)} of {d_model} rows: cosine {best:.2f}", fontsize=11)


@drawn_where_applicable
def logits(geometry: Geometry, attention: AttentionReading, life: Lifecycle) -> Figure:
    """07: all heads of the plateau: their sink score against the logit's gap, and against the factors it is made of."""
    layers = list(life.main.layers)
    score, score_next = (attention.scores.received[name][layers].flatten() for name in ("spike", "next"))
    names = {"cosine": "cosine of query and sink key", "query_norm": "|q|", "key_norm": "|k| of the sink"}
    panels = {"gap of the logit": geometry.gap["spike"][layers].flatten()}
    panels |= {names[name]: values for name, values in geometry.factors(layers).items()}
    fig, axes = figure(1, 4, size=(13, 3.9), sharey=True)
    rho = {name: spearman(values, score) for name, values in panels.items()}
    depth = torch.tensor(layers).repeat_interleave(geometry.anatomy.n_heads)
    for ax, (name, values) in zip(axes, panels.items(), strict=True):
        drawn = ax.scatter(values, score, c=depth, cmap="viridis", s=16, linewidths=0, rasterized=True)
        ax.axhline(attention.scores.epsilon, color="black", lw=0.6, ls=":")
        ax.set(xlabel=name, ylim=(0, 1))
        ax.set_title(f"ρ = {rho[name]:.2f}", fontsize=11)
    axes[0].plot(geometry.gap["next"][layers].flatten(), score_next, "x", ms=3, color=ORDINARY, zorder=0)
    text = {"xycoords": "axes fraction", "color": ORDINARY, "fontsize": 8, "va": "top"}
    axes[0].annotate("× the token right after", (0.02, 0.93), **text)
    axes[0].set_ylabel("sink score of the head")
    fig.colorbar(drawn, ax=axes, label="layer", pad=0.01)
    gap, *parts = rho
    best = max(parts, key=lambda name: rho[name] ** 2)
    finding = f"Heads sink by the gap (rank correlation {rho[gap]:.2f})"
    above(fig, f"{finding}; of its factors most by the {best} ({rho[best]:.2f})")
    return fig


@drawn_where_applicable
def queries_and_keys(clouds: list[Cloud]) -> Figure:
    """07 (after the paper's figure 6): queries and keys of a sink head and of an ordinary one, by PCA."""
    fig, axes = figure(1, len(clouds), size=(5 * len(clouds), 4.4), squeeze=False)
    for ax, cloud in zip(axes[0], clouds, strict=True):
        for which, colour, marker, size, label in (
            (~cloud.is_query & ~cloud.is_spike, ORDINARY, "s", 9, "keys"),
            (cloud.is_query & ~cloud.is_spike, SINK, ".", 14, "queries"),
            (cloud.is_query & cloud.is_spike, SMALL, "v", 22, "spike tokens' own queries"),
            (~cloud.is_query & cloud.is_spike, SPIKE, "*", 90, "keys of spike tokens"),
        ):
            looks = {"color": colour, "marker": marker, "s": size, "linewidths": 0, "label": label}
            ax.scatter(*cloud.flat[which].T, alpha=0.6 if marker != "*" else 1, rasterized=True, **looks)
        ax.plot(*cloud.origin, marker="+", ms=11, mew=1.4, color="black", lw=0)
        note(ax, "0", tuple(cloud.origin.tolist()), (6, 4), fontsize=9)
        ax.set_aspect("equal", adjustable="datalim")
        ax.set(xticks=[], yticks=[], xlabel=f"{cloud.explained[0]:.0%} of the variance")
        ax.set_ylabel(f"{cloud.explained[1]:.0%}")
        ax.set_title(f"Layer {cloud.layer}, head {cloud.head}: score {brief(cloud.score)}", fontsize=10.5)
    axes[0, 0].legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.08), ncols=2)
    return fig
