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

# The words that the table needs, in the order of the chain.
GLOSSARY = """<details><summary>What the words mean</summary>

- **Names of claims**: LC is the spike's life cycle, AM the amplifier, MX a mixture of experts, TK the first token, NM
  RMSNorm, SK the sink, AB what cutting the chain does, TR what training changes, SV what serving does. X- marks a claim
  of ours and SV is ours too; the others are the paper's.
- **Spike**: an entry of the residual stream thousands of times larger than most (some fifty times, in the small models
  that we train). Its *channel* is the coordinate, its *tokens* those that have it, its *step-up* and *step-down* the
  blocks that write it and take it back, the *plateau* all between. Blocks are counted from 1, attention odd and FFN
  even.
- **Cycle**: one rise and fall of a channel. The largest is the main one; a model can have smaller ones besides.
- **Ordinary**: tokens or channels drawn at random, without those that spike or are followed for their size.
- **Medians**: an entry over the median of all entries' absolute values there; other quantities over their own median
  over channels.
- **h̃, s\\***: h̃ is a token's vector as RMSNorm passes it on; s\\* the direction in it that the step-up block amplifies.
- **U_k, S_k, λ**: what of a block's weights makes channel k. ||U_k||_F is its gain; its form is h̃' S_k h̃, and λ the
  first eigenvalue of S_k.
- **Static map**: a token that stands first attends to itself alone, so what attention writes there is one matrix.
- **Participation ratio**: how many channels a vector's squares are spread over; 1 if one holds all.
- **Sink**: the key that most attention goes to. The *sink ratio* is the share of heads and windows in which it gets
  more than ε of the attention of a window's queries, on average; T is how many tokens the window has. SK1 has both.
- **BOS**: the token that some tokenizers put before every text.
- **Perplexity**: exp of the mean loss. The cuts (AB) are judged on fewer and shorter windows than stand under each
  model below; AB1 has their number and length.
- **Control**: the same measure where there should be no effect: on ordinary tokens, channels, heads, blocks. In AB it
  can also be a second way to the same cut.

</details>
"""


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
