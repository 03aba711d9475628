"""The figure of the bench: what more windows cost."""

from matplotlib.figure import Figure

from spikesink.claims import brief
from spikesink.memory import Growth
from spikesink.plots.style import ORDINARY, SINK, SPIKE, figure, styled


@styled
def growth(found: Growth) -> Figure:
    """Seconds and memory of the trace with the number of windows, beside a straight line and a level one.

    Its titles say what a window more takes: time, and memory next to nothing.
    """
    fig, (time, held) = figure(1, 2, size=(9.5, 3.6))
    n, seconds = found.windows, found.seconds
    megabytes = [peak / 1e6 for peak in found.peaks]
    more = n[-1] - n[0]
    each, larger = (seconds[-1] - seconds[0]) / more, (megabytes[-1] - megabytes[0]) / more
    for ax, values, color in ((time, seconds, SPIKE), (held, megabytes, SINK)):
        ax.plot([n[0], n[-1]], [values[0], values[-1] if ax is time else values[0]], color=ORDINARY, lw=1, ls="--")
        ax.plot(n, values, "o-", color=color)
        ax.set(xlabel=f"windows of {found.length} tokens", ylim=(0, 1.2 * max(values)), xticks=n)
    time.set(ylabel="seconds", title=f"A window more takes {brief(each)} s")
    held.set(ylabel="MB held above the libraries", title=f"and {brief(larger)} MB of {brief(megabytes[0])}")
    return fig
