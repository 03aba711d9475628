"""The pages and the picture of all ledgers: `figures/README.md`, a page a model, and `claims.png`."""

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from spikesink import common
from spikesink.common import brief, escape, mean_of
from spikesink.lab.config import LAB
from spikesink.ledger import claims, table

PICTURE = "claims"
TRAINED = "The models that we train ourselves"


def render(figures: Path) -> Path:
    """Write `figures/README.md` from all ledgers below it: claims x models, why some differ, each with its control.

    Beside each ledger goes a page of that model's pictures. A file is left alone where it says all that already.
    """
    ledgers, reasons, lab = claims.ledgers(figures), table.read_reasons(figures), claims.lab_ledger(figures)
    everything = ledgers if lab is None else {**ledgers, LAB: lab}
    for name, data in everything.items():
        title = TRAINED if name == LAB else name
        _put(figures / name, "model.md.j2", title=title, sections=_find_pictures(figures / name, data))
    board = table.make_board(ledgers)
    kept = [
        (row, [table.fill(reasons[row.claim_id], ledgers)])
        for row in board.rows
        if not row.differs_on and any(table.speaks_of(reasons.get(row.claim_id, ""), name) for name in row.put_to)
    ]
    trained = {} if lab is None else {name: lab["claims"][name] for name in table.sort_claims(lab["claims"])}
    return _put(
        figures,
        "claims.md.j2",
        picture=PICTURE,
        board=board,
        ledgers=ledgers,
        explained={
            "Where models differ, and why as far as it was tested": table.explain_differences(board, reasons, ledgers),
            "What to keep in mind where claims hold": kept,
        },
        reasons={name: table.fill(text, everything) for name, text in reasons.items()},
        lab=lab,
        first_with=claims.first_with_same_text({name: claim["rule"] for name, claim in trained.items()}),
        by_verdict={
            verdict: names
            for verdict in ("holds", "differs", "n/a")
            if (names := [name for name, claim in trained.items() if claim["verdict"] == verdict])
        },
    )


def _put(folder: Path, template: str, **values: Any) -> Path:
    pages = Environment(
        loader=PackageLoader("spikesink.apps", "."), trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    pages.globals["held_by"] = _name_controls
    pages.filters |= {
        "brief": brief,
        "cell": escape,
        "in_order": table.sort_claims,
        "listed": _list_claims,
        "mean_of": mean_of,
        "shown": _show_cell,
        "values": _show_values,
    }
    path, text = folder / "README.md", pages.get_template(template).render(values)
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        with common.writing_to(folder):
            common.write_atomically(path, text)
    return path


def _list_claims(rows: Sequence[table.Row], board: table.Board) -> str:
    """Claims in a few words, each with the models that it was put to, or holds of controls on, if those are not all."""

    def note(row: table.Row) -> str:
        if row.standing == "loose":
            partly = len(row.of_controls_on) < len(row.put_to)
            return f" (on {', '.join(row.of_controls_on)})" if partly else ""
        parts = row.put_to if len(row.put_to) < len(board.models) else []
        parts = parts + (["and hold of a control"] if row.of_controls_on and row.standing == "single" else [])
        return f" (put to {', '.join(parts)})" if parts else ""

    return "; ".join(f"{row.claim_id} {row.short}{note(row)}" for row in rows)


def _show_cell(cell: table.Cell | None, row: table.Row) -> str:
    """The verdict, the value that stands for the claim, and what that is compared with."""
    if not cell:
        return ""
    numbers = " / ".join(table.show_value(row.headline, v) for v in (cell.value, cell.beside) if v is not None)
    return cell.verdict + ("\\*" if cell.held_by else "") + (f" ({escape(numbers)})" if numbers else "")


def _name_controls(claim_id: str, claim: Mapping[str, Any]) -> str:
    held_by = table.make_cell(claim_id, claim).held_by
    return f" (of {', '.join(held_by)} too)" if held_by else ""


def _show_values(values: Mapping[str, Any]) -> str:
    """What was measured, as it may stand in a cell of a table; the variants of trained models have one of their own."""
    shown = (f"{name} {table.show_value(name, v)}" for name, v in values.items() if not name.startswith("variants"))
    return escape("; ".join(shown)).replace("\n", "\\n")


def _find_pictures(folder: Path, data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A model's pictures, by the notebook that drew them, with the claims that it judged.

    Pictures stand under the notebook's own headings and in its order, if it lies beside the figures.
    """
    notebooks = sorted((folder.parent.parent / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    headings = {name: heading for path in notebooks for name, heading in _read_headings(path).items()}
    judged = defaultdict(list)
    for claim_id in table.sort_claims(data["claims"]):
        judged[data["claims"][claim_id]["notebook"]].append((claim_id, data["claims"][claim_id]))
    stems = {stem[:2]: stem for stem in (*(path.stem for path in notebooks), *judged)}
    places = {name: place for place, name in enumerate(headings)}
    drawn = sorted(path.stem for path in folder.glob("[0-9][0-9]-*.png"))
    drawn.sort(key=lambda name: (name[:2], places.get(name, len(places))))
    sections = []
    for number, names in groupby(drawn, key=lambda name: name[:2]):
        stem = stems.get(number)
        title = f"[{stem.replace('_', ' ')}](../../notebooks/{stem}.ipynb)" if stem else number
        pictures = [(name, headings.get(name)) for name in names]
        sections.append({"title": title, "claims": judged.get(stem, []), "pictures": pictures})
    return sections


def _read_headings(notebook: Path) -> dict[str, str]:
    """The pictures that a notebook saves, in its order, and for each the heading that it stands under."""
    headings, heading = {}, ""
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = ([heading, *re.findall(r"^##+ (.+)$", source, flags=re.MULTILINE)])[-1]
        else:
            headings |= dict.fromkeys(re.findall(r'"(\d\d-[\w-]+)"', source), heading)
    return headings


def draw(figures: Path) -> Path:
    """Draw `figures/claims.png` and `.svg` from the same ledgers, unless they are younger than all of those."""
    pictures = [figures / f"{PICTURE}.{kind}" for kind in ("png", "svg")]
    sources = [path for path in (figures / "README.md", *figures.glob("*/claims.json")) if path.is_file()]
    made = min((path.stat().st_mtime_ns if path.is_file() else 0) for path in pictures)
    if not made or made < max((path.stat().st_mtime_ns for path in sources), default=0):
        from spikesink import plots  # seconds of imports that a run with nothing to do can spare

        plots.save(plots.verdicts(table.make_board(claims.ledgers(figures))), figures, PICTURE)
    return pictures[0]
