"""The figure of the bench: what more windows cost."""

from matplotlib.figure import Figure

from spikesink.apps.memory import Growth
from spikesink.common import brief
from spikesink.plots.style import ORDINARY, SINK, SPIKE, figure, styled


@styled
def growth(found: Growth) -> Figure:
    """Seconds and memory of the trace with the number of windows, beside a straight line and a level one.

    Its titles say what each window adds.
    """
    fig, (time, held) = figure(1, 2, size=(9.5, 3.6))
    n, seconds = found.windows, found.seconds
    megabytes = [peak / 1e6 for peak in found.peaks]
    more = n[-1] - n[0]
    each, larger = (seconds[-1] - seconds[0]) / more, (megabytes[-1] - megabytes[0]) / more
    for ax, values, color in ((time, seconds, SPIKE), (held, megabytes, SINK)):
        name, last = ("a straight line", values[-1]) if ax is time else ("no growth", values[0])
        ax.plot([n[0], n[-1]], [values[0], last], color=ORDINARY, lw=1, ls="--", label=name)
        ax.plot(n, values, "o-", color=color, label="measured")
        ax.set(xlabel=f"windows of {found.length} tokens", ylim=(0, 1.2 * max(values)), xticks=n)
        ax.legend(loc="lower right")
    time.set(ylabel="seconds", title=f"A trace takes {brief(each)} s for each window")
    held.set(ylabel="MB held above the libraries", title=f"and {brief(larger)} MB, on top of {brief(megabytes[0])} MB")
    return fig
