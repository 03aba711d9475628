"""The figure of all ledgers: claims x models, by verdict."""

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from spikesink.common import brief
from spikesink.ledger.table import Board, Cell, Row
from spikesink.plots.palette import ORDINARY, OTHERS
from spikesink.plots.style import absent, figure, styled

# Neither is a spike's colour or a sink's, and they differ for every kind of colour blindness.
HOLDS, DIFFERS = OTHERS[0], "#A3487B"
LOOKS = {
    "holds": {"facecolor": "#BFE5D8", "edgecolor": HOLDS},
    "holds*": {"facecolor": "#EDF8F4", "edgecolor": HOLDS, "ls": (0, (2, 1.5))},
    "differs": {"facecolor": "#F6D3E6", "edgecolor": DIFFERS},
    "n/a": {"facecolor": "#F0F0F0", "edgecolor": "#D5D5D5"},
    "reported": {"facecolor": "white", "edgecolor": ORDINARY},
}
MARKS = {"holds": "✓", "holds*": "✓*", "differs": "≠", "n/a": "n/a", "reported": ""}
MEANINGS = {
    "holds": "holds",
    "holds*": "holds, and of a control too",
    "differs": "differs",
    "n/a": "cannot be put to this model",
    "reported": "reported, not judged",
}
CENTRED = {"ha": "center", "va": "center"}

# In inches.
HEIGHT, OURS, THEIRS, TALLY, GAP = 0.205, 1.2, 1.55, 0.52, 0.14
LINK, CLAIM, QUANTITY = 1.36, 2.75, 2.4
ABOVE, BELOW, HATCHED = 1.75, 1.2, 0.2
PER_INCH = 15  # characters of a cell's text
MOST_NAMED = 4  # claims in the second line of the title
LONGEST_NAME = 26  # of a column's head


@styled
def verdicts(board: Board) -> Figure:
    """Claims x models: rows by link of the chain, columns the models with a ledger, the last one all of the paper's.

    Each cell has its verdict as a colour, a mark and a hatching, the value that stands for the claim, and after a
    stroke what that is to be compared with.
    """
    if not board.rows:
        return absent("no model has a ledger here")
    left, several = LINK + CLAIM + QUANTITY + GAP, len(board.models) > 1
    columns = {name: left + OURS * i for i, name in enumerate(board.models)}
    tally = left + OURS * len(columns) + GAP
    theirs = tally + TALLY + GAP
    width, bottom = theirs + THEIRS, HEIGHT * len(board.rows)
    # The unit of the axes is an inch, with 0 at the first row's top and y downwards.
    fig, ax = figure(size=(width + 0.6, ABOVE + bottom + BELOW))
    fig.set_layout_engine("none")
    ax.set_position((0, 0, 1, 1))
    ax.set(xlim=(-0.1, width + 0.5), ylim=(bottom + BELOW, -ABOVE))
    ax.axis("off")
    for i, row in enumerate(board.rows):
        y = i * HEIGHT
        middle = y + HEIGHT / 2
        ax.text(LINK, middle, row.claim_id, fontsize=7.5, fontweight="bold", va="center")
        ax.text(LINK + 0.6, middle, row.short, fontsize=7.5, va="center")
        ax.text(LINK + CLAIM + QUANTITY, middle, row.quantity, fontsize=6.5, color="#555555", ha="right", va="center")
        for name, cell in row.cells.items():
            _cell(ax, cell, columns[name], y, OURS)
        if row.reported:
            _cell(ax, _together(row.reported), theirs, y, THEIRS)
        if row.put_to and several:
            _tally(ax, row, tally + TALLY / 2, middle)
    _links(ax, board.rows, width)
    for name, x in columns.items():
        turned = {"rotation": 28, "rotation_mode": "anchor", "ha": "left", "va": "bottom"}
        ax.text(x + OURS / 2, -0.08, _name(name), fontsize=8, fontweight="bold", **turned)
        judged = [row.cells[name].verdict for row in board.rows if name in row.cells]
        text = "{} hold\n{} differ\n{} n/a".format(*map(judged.count, ("holds", "differs", "n/a")))
        ax.text(x + OURS / 2, bottom + 0.06, text, fontsize=7.5, ha="center", va="top", linespacing=1.15)
    above = {"ha": "center", "va": "bottom"}
    if several:
        ax.text(tally + TALLY / 2, -0.08, "holds\non", fontsize=7.5, color="#555555", **above)
    ax.text(theirs + THEIRS / 2, -0.08, "the paper's models\n(how many)", fontsize=8, style="italic", **above)
    _key(ax, bottom + 0.9)
    ax.text(0, 0.14 - ABOVE, _finding(board), fontsize=13, fontweight="bold", va="top")
    ax.text(0, 0.48 - ABOVE, _where(board), fontsize=9.5, va="top")
    return fig


def _together(reported: Mapping[str, Cell]) -> Cell:
    """All of the paper's models in one cell: the least and the largest value, and how many models it reports."""
    cells = list(reported.values())
    values = np.concatenate([np.atleast_1d(cell.value) for cell in cells]).tolist()
    ends = dict.fromkeys(brief(value) for value in (min(values), max(values)))
    verdicts = {cell.verdict for cell in cells}
    return Cell(verdicts.pop() if len(verdicts) == 1 else "differs", f"{' … '.join(ends)}  ({len(cells)})")


def _cell(ax, cell: Cell, x: float, y: float, width: float) -> None:
    look = "holds*" if cell.verdict == "holds" and cell.held_by else cell.verdict
    mark, middle = MARKS[look], y + HEIGHT / 2
    corner, height = (x + 0.02, y + 0.015), HEIGHT - 0.03
    ax.add_patch(Rectangle(corner, width - 0.04, height, lw=0.6, label=look, **LOOKS[look]))
    if cell.verdict == "differs":  # at one end only, so as not to bury the number
        ax.add_patch(Rectangle(corner, HATCHED, height, lw=0, fill=False, hatch="////", edgecolor="#E3A9C9"))
    if cell.value is None:
        colour = ORDINARY if cell.verdict == "n/a" else "black"
        ax.text(x + width / 2, middle, mark, fontsize=7, color=colour, **CENTRED)
        return
    ax.text(x + 0.05, middle, mark, fontsize=7.5, fontweight="bold", ha="left", va="center")
    taken = 0.2 if mark else 0
    text = _number(cell.value, int((width - taken) * PER_INCH))
    if cell.beside is not None:
        text += f" / {brief(cell.beside)}"
    ax.text(x + (width + taken) / 2, middle, text, fontsize=7.5 if len(text) < 12 else 6.8, **CENTRED)


def _number(value: Any, room: int) -> str:
    """A value in as many characters as there is room for: of a long list, its first and its last."""
    text = brief(value)
    if len(text) > room and isinstance(value, list | tuple) and len(value) > 1:
        text = f"{brief(value[0])} … {brief(value[-1])}"
    return text if len(text) <= room + 2 else text[:room] + "…"


def _tally(ax, row: Row, x: float, y: float) -> None:
    """On how many of the models it was put to a claim holds; bold where it does so firmly."""
    weight, color = "bold" if row.standing == "firm" else "normal", DIFFERS if row.differs_on else HOLDS
    text = f"{len(row.put_to) - len(row.differs_on)} of {len(row.put_to)}"
    ax.text(x, y, text, fontsize=7.5, fontweight=weight, color=color, **CENTRED)


def _links(ax, rows: Sequence[Row], width: float) -> None:
    start = 0
    for name, group in groupby(rows, key=lambda row: row.link):
        n = len(list(group))
        ax.plot([0, width], [start * HEIGHT] * 2, color="#999999", lw=0.7, zorder=0)
        ax.text(0, (start + 0.5) * HEIGHT, name, fontsize=8.5, fontweight="bold", va="center")
        start += n
    ax.plot([0, width], [start * HEIGHT] * 2, color="#999999", lw=0.7, zorder=0)


def _name(model: str) -> str:
    return model if len(model) <= LONGEST_NAME else model[: LONGEST_NAME - 1] + "…"


def _key(ax, y: float) -> None:
    what = (
        "Small print: what the numbers are; after a stroke, what the first is compared with. Blank: not measured here.",
        "Firmly (bold): on two models or more, and for no control, as it should be. More: README.md beside this.",
    )
    for i, line in enumerate(what):
        ax.text(0, y - 0.28 + 0.16 * i, line, fontsize=7.5, va="center", color="#555555")
    x = 0.0
    for verdict, meaning in MEANINGS.items():
        held = ("",) if verdict == "holds*" else ()
        _cell(ax, Cell(verdict.rstrip("*"), None if verdict == "n/a" else "", held_by=held), x, y, 0.42)
        ax.text(x + 0.47, y + HEIGHT / 2, meaning, fontsize=7.5, va="center")
        x += 0.67 + 0.068 * len(meaning)


def _finding(board: Board) -> str:
    judged, holding, firm = len(board.judged), len(board.holding), len(board.those("firm"))
    if not judged:
        return "No claim could be put to a model here"
    if len(board.models) == 1:
        return f"{holding} of {judged} claims hold on {_name(board.models[0])}"
    text = f"{holding} of {judged} claims hold on every model they were put to, {firm} of them firmly"
    most = max(board.models, key=lambda model: len(board.those(model)))
    n = len(board.those(most))
    return text + (f"; {n} {'differ' if n > 1 else 'differs'} on {_name(most)} alone" if n else "")


def _where(board: Board) -> str:
    """Where the others differ."""
    if len(board.models) == 1:
        return ""
    counts = {f"on {_name(model)} alone": len(board.those(model)) for model in board.models}
    parts = [f"{n} {where}" for where, n in (counts | {"on several": len(board.those("several"))}).items() if n]
    nowhere = [row.claim_id for row in board.those("nowhere")]
    parts += [f"{', '.join(nowhere) if len(nowhere) <= MOST_NAMED else len(nowhere)} wherever put"] if nowhere else []
    return f"The other {len(board.judged) - len(board.holding)} differ: {', '.join(parts)}." if parts else ""
