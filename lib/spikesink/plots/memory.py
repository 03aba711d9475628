"""The figure of the bench: what more windows cost."""

from matplotlib.figure import Figure

from spikesink.memory import Growth
from spikesink.plots.style import OTHERS, SINK, SPIKE, figure, styled


@styled
def growth(found: Growth) -> Figure:
    """Seconds and memory of the trace with the number of windows; a straight line through the first point beside them.

    Its title says how much time and memory grow from the first number of windows to the last.
    """
    fig, (time, held) = figure(1, 2, size=(9.5, 3.6))
    n, seconds = found.windows, found.seconds
    megabytes = [peak / 1e6 for peak in found.peaks]
    time.plot(n, [seconds[0] * k / n[0] for k in n], color=OTHERS[2], lw=1, ls="--")
    time.plot(n, seconds, "o-", color=SPIKE)
    time.annotate("proportional", (n[-1], seconds[0] * n[-1] / n[0]), ha="right", va="bottom", color=OTHERS[2])
    time.set(xlabel=f"windows of {found.length} tokens", ylabel="seconds", ylim=(0, None))
    held.plot(n, megabytes, "o-", color=SINK)
    held.set(xlabel=f"windows of {found.length} tokens", ylabel="MB held above the model", ylim=(0, None))
    time.set_title(f"{n[-1] / n[0]:.0f} times the windows: {seconds[-1] / seconds[0]:.1f} times the time")
    held.set_title(f"and {megabytes[-1] / megabytes[0]:.1f} times the memory")
    for ax in (time, held):
        ax.set_xticks(n)
    return fig
