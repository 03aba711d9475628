"""TODO."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spikesink import common
from spikesink.common import escape
from spikesink.lab import config
from spikesink.ledger import claims
from spikesink.ledger.rules import GLOSSARY
from spikesink.ledger.table import (
    PICTURE,
    TRAINED,
    _in_order,
    _one_model,
    _reasons,
    _summary,
    _table,
    _trained,
    _trained_in_short,
    board,
    reasons,
)


def render(figures: Path) -> Path:
    """Write `figures/README.md` from all ledgers below it: claims x models, why some differ, each with its control.

    Beside each ledger goes a page of that model's pictures. A file is left alone where it says all that already.

    Raises:
        ValueError: a ledger, or `reasons.md` beside it, is damaged.
    """
    found, written, lab = claims.ledgers(figures), reasons(figures), claims.lab_ledger(figures)
    whole = board(found)
    lines = [
        "# Claims, by model",
        "",
        "Each claim of the paper, what we measured on each model, and the verdict of a rule that is the same for all.",
        "`differs` is a finding, not an error. Made from `claims.json` in each folder and from `reasons.md`; do not "
        "edit by hand.",
        "",
        f"![Claims x models, coloured by verdict]({PICTURE}.png)",
        "",
        *_summary(whole),
        *([] if lab is None else _trained_in_short(lab)),
        *GLOSSARY.splitlines(),
        "",
        *_table(whole),
        *_reasons(written, found, whole),
    ]
    if lab is not None:
        lines += ["", *_trained(lab, written)]
    for name, data in found.items():
        lines += ["", *_one_model(name, data, written.get(name, ""))]
    for name, data in (found if lab is None else {**found, config.LAB: lab}).items():
        _put(figures / name, gallery(figures / name, data))
    return _put(figures, lines)


def _put(folder: Path, lines: Sequence[str]) -> Path:
    path, text = folder / "README.md", "\n".join(lines) + "\n"
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with common.writing_to(folder):
            common.write_atomically(path, text)
    return path


def gallery(folder: Path, data: Mapping[str, Any]) -> list[str]:
    """The lines of a page of all pictures of a model, by notebook, with the verdicts that each notebook reached.

    Pictures stand under the notebook's own headings and in its order, if it lies beside the figures.
    """
    verdicts = defaultdict(list)
    for key, claim in _in_order(data["claims"]):
        reason = f": {escape(claim['measured']['reason'])}" if claim["verdict"] == "n/a" else ""
        verdicts[claim["notebook"]].append(
            f"- {escape(key)} {escape(claim['statement'])} **{claim['verdict']}**{reason}"
        )
    notebooks = sorted((folder.parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    stems = {stem[:2]: stem for stem in (*[path.stem for path in notebooks], *verdicts)}
    headings = {name: heading for path in notebooks for name, heading in _headings(path).items()}
    drawn = {path.stem for path in folder.glob("[0-9][0-9]-*.png")}
    pictures = defaultdict(list)
    for name in [*(name for name in headings if name in drawn), *sorted(drawn - set(headings))]:
        pictures[name[:2]].append(name)
    lines = [
        f"# {TRAINED if folder.name == config.LAB else folder.name}: the pictures",
        "",
        "Each notebook's pictures, with the claims that it put to them; the numbers are in [the table of "
        "all](../README.md). Made from `claims.json`; do not edit by hand.",
    ]
    for number, shown in sorted(pictures.items()):
        stem = stems.get(number)
        lines += ["", f"## [{stem.replace('_', ' ')}](../../notebooks/{stem}.ipynb)" if stem else f"## {number}"]
        lines += ["", *verdicts[stem]] if stem in verdicts else []
        above = None
        for name in shown:
            heading = headings.get(name)
            lines += ["", f"### {heading}"] if heading not in (None, above) else []
            lines += ["", f"![{heading or name}]({name}.png)"]
            above = heading
    return lines


def _headings(notebook: Path) -> dict[str, str]:
    """The pictures that a notebook saves, in its order, and for each the heading that it stands under."""
    found, heading = {}, ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = ([heading, *re.findall(r"^##+ (.+)$", source, flags=re.MULTILINE)])[-1]
        else:
            found |= dict.fromkeys(re.findall(r'"(\d\d-[\w-]+)"', source), heading)
    return found


def draw(figures: Path) -> Path:
    """Draw `figures/claims.png` and `.svg` from the same ledgers, unless they are younger than all of those."""
    pictures = [figures / f"{PICTURE}.{kind}" for kind in ("png", "svg")]
    sources = [path for path in (figures / "README.md", *figures.glob("*/claims.json")) if path.is_file()]
    made = min((path.stat().st_mtime_ns if path.is_file() else 0) for path in pictures)
    if not made or made < max((path.stat().st_mtime_ns for path in sources), default=0):
        from spikesink import plots  # seconds of imports that a run with nothing to do can spare

        plots.save(plots.verdicts(board(claims.ledgers(figures))), figures, PICTURE)
    return pictures[0]
