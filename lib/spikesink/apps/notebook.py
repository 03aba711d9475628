"""What every notebook needs besides the measures: its ledger, its figures, and prose with measured numbers in it."""

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor

from spikesink import paper, plots
from spikesink.apps.once import once
from spikesink.common import NotApplicable, brief, escape, markdown_table
from spikesink.lab.config import LAB, LENGTH
from spikesink.lab.families import BASE
from spikesink.lab.records import LAST_WINDOWS, Record, digest
from spikesink.ledger import claims
from spikesink.ledger.claims import Evidence, Header
from spikesink.ledger.table import show_value
from spikesink.model import texts
from spikesink.model.anatomy import Block, Model

NOTE = "\n\n*of … too*: the rule holds of that control as well, so the claim is true of more than spikes."
ROUNDING = 1e-5  # relative errors of float32 arithmetic stay below it


@dataclass(frozen=True)
class Ledger:
    """Where one notebook puts its figures and claims: `folder` is `figures/<model>/`."""

    notebook: str
    folder: Path
    header: Header

    def once(self, function: Callable, model: Model, *args: Any) -> Any:
        """What `function(model, *args)` gives: measured once a run, however many notebooks ask for it."""
        return once(function, model, *args)

    def save(self, fig: Figure, name: str) -> Figure:
        """Write a figure as `folder/name.png` and `.svg`, and return it, so that a cell can end with this call."""
        plots.save(fig, self.folder, name)
        return fig

    def record(self, evidence: Mapping[str, Evidence | NotApplicable]) -> Markdown:
        """Judge evidence by claim id, merge the claims into `folder/claims.json`, and show them as a table."""
        judged = {claim_id: claims.judge(claim_id, given, self.notebook) for claim_id, given in evidence.items()}
        claims.record(self.folder, self.header, judged)
        first = claims.first_with_same_text({claim_id: claim.rule for claim_id, claim in judged.items()})
        rows, note = [], ""
        for claim_id, claim in judged.items():
            rule = f"the rule of {first[claim_id]}" if claim_id in first else claim.rule
            verdict = f"**{claim.verdict}**"
            if held := claims.passing_controls(claim_id, claim.measured, claim.control):
                verdict += f"<br>of {', '.join(held)} too"
                note = NOTE
            name = escape(f"**{claim_id}** {claim.statement}<br>*{rule}*")
            rows.append((name, verdict, *map(_list_values, (claim.measured, claim.control))))
        return Markdown(markdown_table(("claim", "verdict", "measured", "control"), rows) + note)


def open_ledger(
    notebook: str,
    model: Model,
    tokens: Int[Tensor, "n length"],
    text: str = "house",
    seed: int = 0,
    figures: str | os.PathLike | None = None,
) -> Ledger:
    """A ledger for the notebook of this name ("01_step_up"), in a folder of `figures`.

    That is by default $SPIKESINK_FIGURES, or `figures/` beside `notebooks/`.
    """
    source = model.source
    header = Header(
        model=source.slug,
        spec=_name_only(source.spec),
        sha256=source.sha256,
        text=_name_only(text),
        text_sha256=texts.read(text).sha256,
        windows=tuple(tokens.shape),
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        seed=seed,
    )
    return Ledger(notebook, _figures_folder(figures) / source.slug, header)


def _name_only(path: str) -> str:
    """A ledger names no machine's folders."""
    return Path(path).name if Path(path).exists() else path


def _figures_folder(figures: str | os.PathLike | None) -> Path:
    return Path(figures or os.environ.get("SPIKESINK_FIGURES") or Path.cwd().parent / "figures")


def open_lab_ledger(notebook: str, records: Sequence[Record], figures: str | os.PathLike | None = None) -> Ledger:
    """A ledger for what the lab's records of the text tier say, in `figures/lab/`; `figures` as in `open_ledger`."""
    first = next((record for record in records if record.name == BASE), records[0])
    sizes = [record.parameters for record in records]
    header = Header(
        model=LAB,
        spec=f"{len(records)} runs of {min(sizes):,} to {max(sizes):,} parameters",
        sha256=digest(records),
        text=first.text,
        text_sha256=first.text_sha256,
        windows=(LAST_WINDOWS, LENGTH),
        dtype="float32",
        seed=0,
    )
    return Ledger(notebook, _figures_folder(figures) / LAB, header)


def say(template: str, evidence: Evidence | NotApplicable | Mapping[str, Any] | None = None, **values: Any) -> Markdown:
    """Prose with measured numbers in it: a format string over the evidence's measured and control values.

    Lists are joined by commas and floats shortened to three digits unless the template formats them itself. Where a
    claim does not apply, the reason stands in place of the prose.
    """
    if isinstance(evidence, NotApplicable):
        return Markdown(f"*Not applicable here: {evidence.reason}.*")
    if isinstance(evidence, Evidence):
        evidence = {**evidence.control, **evidence.measured}
    shown = _Shown({name: _Value(value) for name, value in {**(evidence or {}), **values}.items()})
    return Markdown(inspect.cleandoc(template).format_map(shown))


class _Value:
    """A value that formats itself briefly unless a format is given, and a list's values one by one."""

    def __init__(self, value: Any):
        self.value = value

    def __format__(self, spec: str) -> str:
        if not spec or isinstance(self.value, str):
            return _shorten(self.value)
        if isinstance(self.value, list):
            return ", ".join(format(_Value(value), spec) for value in self.value) or "none"
        return format(self.value, spec)

    def __getitem__(self, key: int | str) -> "_Value":
        return self if isinstance(self.value, str) else _Value(self.value[key])


class _Shown(dict):
    """Values for a template; one that could not be measured reads "(not measurable here)"."""

    def __missing__(self, key: str) -> _Value:
        return _Value("(not measurable here)")


def tidy(frame: pd.DataFrame | NotApplicable) -> Markdown:
    """A table with its numbers shortened, so that it reads the same on every machine; or why there is none."""
    if isinstance(frame, NotApplicable):
        return say("", frame)
    if frame.index.names[0]:
        frame = frame.reset_index()
    frame = frame.astype(object).where(frame.notna(), "")
    rows = [[escape(_shorten(value)) for value in row] for row in frame.itertuples(index=False, name=None)]
    return Markdown(markdown_table([str(column) for column in frame.columns], rows))


def _list_values(values: Mapping[str, Any]) -> str:
    return "<br>".join(f"{name}: {_show_value(name, value)}" for name, value in values.items())


def _show_value(name: str, value: Any) -> str:
    first = value[0] if isinstance(value, list) and value else value
    if isinstance(first, Mapping):
        return f"{len(value)}, in a table of their own"
    if isinstance(value, list) and isinstance(first, str):
        return escape(", ".join(map(repr, value)))
    return escape(_shorten(value) if isinstance(value, float) else show_value(name, value))


def _shorten(value: Any) -> str:
    """A value as a notebook shows it: what is nearly nothing is rounding, another number on every processor."""
    rounding = isinstance(value, float) and 0 < abs(value) < ROUNDING
    return f"< {ROUNDING:g}".replace("e-05", "e-5") if rounding else brief(value)


def vocabularies(ledger: Ledger) -> pd.DataFrame:
    """How much of the vocabulary spikes at position 0, in every model with a ledger here and in the paper's."""
    rows = []
    for name, data in claims.ledgers(ledger.folder.parent).items():
        measured = data["claims"].get("TK1", {}).get("measured", {})
        if "spiking" in measured:
            rows.append((name, measured["spiking"], measured["vocabulary"], "here"))
    rows += [(*row, "paper, table 2") for row in paper.TABLE_2]
    frame = pd.DataFrame(rows, columns=["model", "spiking", "vocabulary", "measured"]).set_index("model")
    frame.insert(2, "share", (frame["spiking"] / frame["vocabulary"]).map("{:.2%}".format))
    return frame


def across_models(ledger: Ledger) -> list[tuple[str, int, tuple[Block, ...], tuple[Block, ...], bool]]:
    """Every model with a ledger beside this one, and of the paper's table 1.

    Of each its name, number of blocks, step-up blocks, step-down blocks, and whether the paper measured it.
    """
    rows = []
    for name, data in claims.ledgers(ledger.folder.parent).items():
        up, down = (data["claims"].get(claim_id, {}).get("measured", {}) for claim_id in ("LC1", "LC3"))
        if "step_up_blocks" in up and "step_down_blocks" in down:
            rows.append((name, down["n_blocks"], up["step_up_blocks"], down["step_down_blocks"], False))
    rows += [(*row, True) for row in paper.TABLE_1]
    return [(name, n, tuple(map(Block, up)), tuple(map(Block, down)), theirs) for name, n, up, down, theirs in rows]
