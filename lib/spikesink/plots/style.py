"""The house style: colours, fonts, how a figure is saved, and the words and marks that several figures share."""

import io
from collections.abc import Sequence
from functools import lru_cache, wraps
from pathlib import Path

import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from spikesink.chain.lifecycle import Cycle, Lifecycle
from spikesink.common import NotApplicable, brief, write_atomically, writing_to
from spikesink.model.anatomy import Block, mlp
from spikesink.plots.palette import ORDINARY, SPIKE

STYLE = {
    "figure.dpi": 90,
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "svg.hashsalt": "spikesink",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}


def figure(rows: int = 1, columns: int = 1, size: tuple[float | int, float | int] = (9.5, 4.2), **options):
    """A figure and its axes; `options` as plt.subplots takes them."""
    fig, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", **options)
    plt.close(fig)  # so that a notebook shows it once, when a cell returns it
    return fig, axes


def styled(draw):
    """Make a figure function draw in the house style."""

    @wraps(draw)
    def drawn(*args, **options) -> Figure:
        with sns.axes_style("ticks"), plt.rc_context(STYLE):
            return draw(*args, **options)

    return drawn


def save(fig: Figure, folder: Path, name: str) -> None:
    """Write `folder/name.png` and `.svg`, each atomically and without a date, so that equal figures are equal files."""
    with writing_to(folder), plt.rc_context(STYLE):
        fig.draw_without_rendering()
        fig.set_layout_engine("none")  # laid out once; each further drawing would do it again
        for kind, metadata in (("png", {"Software": None}), ("svg", {"Date": None, "Creator": None})):
            buffer = io.BytesIO()
            fig.savefig(buffer, format=kind, metadata=metadata)
            write_atomically(folder / f"{name}.{kind}", buffer.getvalue())


@styled
def absent(reason: str) -> Figure:
    """What stands where a figure would be, when a model has nothing to draw."""
    fig, ax = figure(size=(9.5, 1.6))
    ax.axis("off")
    ax.text(0.5, 0.5, f"Nothing to draw: {reason}.", ha="center", va="center", color=ORDINARY, wrap=True)
    return fig


def drawn_where_applicable(draw):
    """For figures of what a model may not have: the reason in the figure's place, where there is none of the first."""

    @wraps(draw)
    def drawn(first, *args, **options) -> Figure:
        nothing = isinstance(first, NotApplicable) or (isinstance(first, Lifecycle) and first.main is None)
        return absent(first.reason) if nothing else styled(draw)(first, *args, **options)

    return drawn


def thousands(ax, which: str = "y") -> None:
    """Write an axis's numbers out, with commas between thousands."""
    getattr(ax, f"{which}axis").set_major_formatter(
        FuncFormatter(lambda v, _: f"{v:,.0f}" if abs(v) >= 1 else f"{v:g}")
    )


def log_ticks(axis) -> None:
    """Numbers on a logarithmic axis, as many as its span has room for: one tick says nothing of a scale."""
    low, high = axis.get_view_interval()
    subs = (1,) if high > 1000 * low else (1, 2, 5) if high > 5 * low else (1, 1.2, 1.5, 2, 3, 5, 7)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter(FuncFormatter(lambda v, _: brief(float(v))))
    axis.set_minor_formatter(NullFormatter())


def above(fig: Figure, text: str) -> None:
    """A finding above all the axes of a figure."""
    fig.suptitle(text, fontsize=11, fontweight="bold", x=0.01, ha="left")


def whole(ax, which: str = "x") -> None:
    """Label an axis of layers, heads or rows with whole numbers only."""
    getattr(ax, f"{which}axis").set_major_locator(MaxNLocator(integer=True))


def token_text(text: str) -> str:
    """A token as it can be read in a figure: white space made visible, what the font lacks by its code point."""
    plain = text.replace("\n", "\\n").replace("\t", "\\t").replace(" ", "␣").replace("$", r"\$")
    return "".join(c if _font().get_char_index(ord(c)) else f"U+{ord(c):04X}" for c in plain) or "∅"


@lru_cache
def _font():
    return get_font(findfont(STYLE["font.family"]))


def note(ax, text: str, at, offset: tuple[float | int, float | int], **looks) -> None:
    """Text at a point of the data, moved by an offset in points."""
    ax.annotate(text, at, offset, textcoords="offset points", **looks)


def quoted(text: str) -> str:
    """The same in quotation marks."""
    return f"“{token_text(text)}”"


def blocks_text(blocks: Sequence[Block]) -> str:
    """L11 MLP (block 24); L28 MLP (block 58), L29 MLP (block 60); no block."""
    return ", ".join(map(str, blocks)) or "no block"


def verb(items: Sequence[object], many: str) -> str:
    """A verb that agrees with `blocks_text`: "write", or "writes" for one block and for none."""
    return many if len(items) > 1 else f"{many}s"


def label_layers(axis, n_layers: int, room: float = 0) -> None:
    """Layers on an axis of points or blocks, with `room` after the last one, as a share of the whole."""
    layers = range(0, n_layers, -(-n_layers // 12))
    axis.set_ticks([mlp(layer) for layer in layers], labels=layers)
    axis.set_label_text("layer (at the tick its MLP, one to the left its attention)")
    axis.set_view_interval(-0.5, 2 * n_layers * (1 + room) + 0.5, ignore=True)


def span(ax, cycle: Cycle, label: bool = True) -> None:
    """Mark step-up and step-down blocks on an axis of depth in blocks."""
    for blocks, text in ((cycle.step_up, "step-up"), (cycle.step_down, "step-down")):
        for block in blocks:
            ax.axvspan(block - 0.5, block + 0.5, color=SPIKE, alpha=0.13, lw=0)
        if blocks and label:
            x, side = (blocks[-1] + 0.8, "left") if text == "step-up" else (blocks[0] - 0.8, "right")
            place = {"ha": side, "va": "bottom", "transform": ax.get_xaxis_transform()}
            ax.text(x, 0.02, text, color=SPIKE, fontsize=9, **place)
