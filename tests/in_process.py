"""Every measure of a model in this process: by one call, or as the notebooks' code cells go through them."""

import ast
from pathlib import Path
from typing import Any
from unittest.mock import patch

import nbformat
import torch
from matplotlib import pyplot
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

import spikesink
from spikesink import plots
from spikesink.apps.reproduce import asks_for_a_model
from spikesink.ledger import claims, rules
from spikesink.ledger.evidence import measure_all

ROOT = Path(__file__).parent.parent
NOTEBOOKS = [n for n in sorted((ROOT / "notebooks").glob("*.ipynb")) if asks_for_a_model(n)]
# The claims that are put to a model; the others are of those that the lab trains.
OF_MODELS = [key for key in rules.RULES if not key.removeprefix("X-").startswith("TR")]


def measure(directory: Path, text: Path, n: int = 3, length: int = 32, **placement: Any) -> dict[str, claims.Claim]:
    """Every claim of the model in a directory, judged on windows of a text, by one call and without notebooks."""
    model = spikesink.load(directory, **placement)
    tokens = spikesink.windows(model, str(text), n, length)
    return {key: claims.judge(key, value, "") for key, value in measure_all(model, tokens, text=str(text)).items()}


def walk(
    directory: Path, text: Path, n: int = 3, length: int = 32, *, folder: Path
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The ledger's rows by claim, and the names of the pictures, that the notebooks leave of the model in a directory.

    They are run with `n` windows of `length` tokens of a text. The model is loaded once; pictures are drawn, small, and
    not written. The ledger goes to `folder`, as with `make`.
    """
    model = spikesink.load(directory)
    given = {"MODEL": str(directory), "TEXT": str(text), "N_PROMPTS": n, "SEQ_LEN": length, "FIGURES": str(folder)}
    pictures: list[str] = []

    def saved(fig: Figure, _folder: Path, name: str) -> None:
        draw(fig)
        pictures.append(name)

    with (
        patch.object(spikesink, "load", lambda *_, **__: model),
        patch.object(plots, "save", saved),
        patch.object(Figure, "savefig", lambda figure, *_, **__: draw(figure)),
    ):
        for notebook in NOTEBOOKS:
            _run(notebook, given)
    [data] = claims.ledgers(folder).values()
    return data["claims"], sorted(pictures)


def draw(fig: Figure) -> None:
    """Draw a figure as small as it goes, and not laid out."""
    fig.set_layout_engine("none")
    fig.set_dpi(20)
    FigureCanvasAgg(fig).draw()
    pyplot.close(fig)


def _run(notebook: Path, given: dict[str, Any]) -> None:
    names: dict[str, Any] = {}
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
        if cell.cell_type != "code":
            continue
        try:
            with torch.enable_grad():  # as in a kernel
                _execute(cell.source, names, f"{notebook.stem}, cell {number}")
        except Exception as error:
            error.add_note(f"in {notebook.name}, cell {number}")
            raise
        if "parameters" in cell.metadata.get("tags", []):
            names.update(given)
    pyplot.close("all")


def _execute(source: str, names: dict[str, Any], where: str) -> None:
    """Run a cell, and ask for the text of its last line's value, if that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    if last is not None:
        repr(eval(compile(ast.Expression(last.value), where, "eval"), names))
