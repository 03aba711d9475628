"""What every notebook needs besides the measures: its ledger, its figures, and prose with measured numbers in it."""

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown
from jaxtyping import Int
from matplotlib.figure import Figure
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink import common, paper, plots
from spikesink.common import NotApplicable
from spikesink.lab import config
from spikesink.lab.config import LENGTH
from spikesink.lab.families import BASE
from spikesink.lab.records import LAST_WINDOWS, Record, digest
from spikesink.ledger import claims
from spikesink.ledger.claims import Evidence
from spikesink.model import texts

ROUNDING = 1e-5  # relative errors of float32 arithmetic stay below it


@dataclass(frozen=True)
class Ledger:
    """Where one notebook puts its figures and claims: `folder` is `figures/<model>/`."""

    notebook: str
    folder: Path
    header: claims.Header

    def save(self, fig: Figure, name: str) -> Figure:
        """Write a figure as `folder/name.png` and `.svg`, and return it, so that a cell can end with this call."""
        plots.save(fig, self.folder, name)
        return fig

    def record(self, evidence: Mapping[str, Evidence | NotApplicable]) -> Markdown:
        """Judge evidence by claim id, merge the claims into `folder/claims.json`, and show them as a table.

        A rule that several claims share is told once. A claim that holds of a control as well is marked: it is true of
        more than spikes and sinks.
        """
        judged = {key: claims.judge(key, value, self.notebook) for key, value in evidence.items()}
        claims.record(self.folder, self.header, judged)
        lines = ["| claim | verdict | measured | control |", "|---|---|---|---|"]
        before = claims.first_with_same_text({key: claim.rule for key, claim in judged.items()})
        for key, claim in judged.items():
            rule = f"the rule of {before[key]}" if key in before else claim.rule
            name = common.escape(f"**{key}** {claim.statement}<br>*{rule}*")
            held = claims.passing_controls(key, claim.measured, claim.control)
            verdict = f"**{claim.verdict}**" + (f"<br>of {', '.join(held)} too" if held else "")
            lines.append(f"| {name} | {verdict} | {_lines(claim.measured)} | {_lines(claim.control)} |")
        if any("<br>of " in line for line in lines):
            lines += [
                "",
                "*of … too*: the rule holds of that control as well, so the claim is true of more than spikes.",
            ]
        return Markdown("\n".join(lines))


def open_ledger(
    notebook: str,
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    text: str = "house",
    seed: int = 0,
    figures: str | os.PathLike | None = None,
) -> Ledger:
    """A ledger for one notebook.

    Args:
        notebook: its name, such as "01_step_up".
        model: as `load` returns it; its slug names the folder.
        tokens: the windows that are measured.
        text, seed: what they were cut from, and by which seed.
        figures: where the model's folder goes; by default $SPIKESINK_FIGURES, or `figures/` beside `notebooks/`.
    """
    base = Path(figures or os.environ.get("SPIKESINK_FIGURES") or Path.cwd().parent / "figures")
    spec = model.source.spec
    header = claims.Header(
        model=model.source.slug,
        spec=Path(spec).name if Path(spec).exists() else spec,  # a ledger names no machine's folders
        sha256=model.source.sha256,
        text=Path(text).name if Path(text).exists() else text,
        text_sha256=texts.read(text).sha256,
        windows=tuple(tokens.shape),
        dtype=str(model.cfg.dtype).removeprefix("torch."),
        seed=seed,
    )
    return Ledger(notebook, base / model.source.slug, header)


def open_lab_ledger(notebook: str, records: Sequence[Record], figures: str | os.PathLike | None = None) -> Ledger:
    """A ledger for what the lab's records say; it goes to `figures/lab/`.

    Args:
        notebook: its name.
        records: of the text tier.
        figures: as `open_ledger` takes it.
    """
    base = Path(figures or os.environ.get("SPIKESINK_FIGURES") or Path.cwd().parent / "figures")
    first = next((record for record in records if record.name == BASE), records[0])
    sizes = [record.parameters for record in records]
    header = claims.Header(
        model=config.LAB,
        spec=f"{len(records)} runs of {min(sizes):,} to {max(sizes):,} parameters",
        sha256=digest(records),
        text=first.text,
        text_sha256=first.text_sha256,
        windows=(LAST_WINDOWS, LENGTH),
        dtype="float32",
        seed=0,
    )
    return Ledger(notebook, base / config.LAB, header)


def say(template: str, evidence: Evidence | NotApplicable | Mapping[str, Any] | None = None, **values: Any) -> Markdown:
    """Prose with measured numbers in it: a format string over the evidence's measured and control values.

    Lists are joined by commas and floats shortened to three digits unless the template formats them itself. Where a
    claim does not apply, the reason stands in place of the prose.
    """
    if isinstance(evidence, NotApplicable):
        return Markdown(f"*Not applicable here: {evidence.reason}.*")
    if isinstance(evidence, Evidence):
        values = {**evidence.control, **evidence.measured, **values}
    elif evidence is not None:
        values = {**evidence, **values}
    return Markdown(
        inspect.cleandoc(template).format_map(_Values({key: _Brief(value) for key, value in values.items()}))
    )


def tidy(frame: pd.DataFrame | NotApplicable) -> Markdown:
    """A table with its numbers shortened, so that it reads the same on every machine; or why there is none."""
    if isinstance(frame, NotApplicable):
        return say("", frame)
    columns = [*(frame.index.names if frame.index.names[0] else []), *frame.columns]
    lines = ["| " + " | ".join(map(str, columns)) + " |", "|" + "---|" * len(columns)]
    for index, *row in frame.itertuples(name=None):
        cells = ([index] if frame.index.names[0] else []) + row
        lines.append("| " + " | ".join(common.escape(_short(cell)) for cell in cells) + " |")
    return Markdown("\n".join(lines))


def vocabularies(ledger: Ledger) -> pd.DataFrame:
    """How much of the vocabulary spikes at position 0: of every model with a ledger beside this one, and in the paper.

    Returns:
        A row a model: spiking entries, vocabulary, share, and who measured it.
    """
    rows = []
    for name, data in claims.ledgers(ledger.folder.parent).items():
        found = data["claims"].get("TK1", {}).get("measured", {})
        if "spiking" in found:
            rows.append((name, found["spiking"], found["vocabulary"], "here"))
    rows += [(*row, "paper, table 2") for row in paper.TABLE_2]
    frame = pd.DataFrame(rows, columns=["model", "spiking", "vocabulary", "measured"]).set_index("model")
    frame.insert(2, "share", [f"{s / v:.2%}" for s, v in zip(frame["spiking"], frame["vocabulary"], strict=True)])
    return frame


def across_models(ledger: Ledger) -> list[tuple[str, int, tuple[int, ...], tuple[int, ...], bool]]:
    """Step-up and step-down blocks of every model with a ledger beside this one, and of the paper's table 1.

    Returns:
        For each model its name, number of blocks, step-up blocks, step-down blocks, and whether the paper measured it.
    """
    rows = []
    for name, data in claims.ledgers(ledger.folder.parent).items():
        up, down = (data["claims"].get(key, {}).get("measured", {}) for key in ("LC1", "LC3"))
        if "step_up_blocks" in up and "step_down_blocks" in down:
            rows.append((name, down["n_blocks"], tuple(up["step_up_blocks"]), tuple(down["step_down_blocks"]), False))
    return rows + [(*row, True) for row in paper.TABLE_1]


class _Brief:
    """A value that formats itself briefly unless a format is given."""

    def __init__(self, value: Any):
        self.value = value

    def __format__(self, spec: str) -> str:
        if spec and isinstance(self.value, list):
            return ", ".join(format(_Brief(value), spec) for value in self.value) or "none"
        return format(self.value, spec) if spec and not isinstance(self.value, str) else _short(self.value)

    def __getitem__(self, key: int | str) -> "_Brief":
        return self if isinstance(self.value, str) else _Brief(self.value[key])


class _Values(dict):
    """Values for a template; one that could not be measured reads "(not measurable here)"."""

    def __missing__(self, key: str) -> _Brief:
        return _Brief("(not measurable here)")


def _lines(values: Mapping[str, Any]) -> str:
    return "<br>".join(f"{key}: {_cell(value)}" for key, value in values.items())


def _cell(value: Any) -> str:
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return f"{len(value)}, in a table of their own"
    text = (
        ", ".join(repr(v) for v in value) if isinstance(value, list) and value and isinstance(value[0], str) else None
    )
    return common.escape(text or _short(value))


def _short(value: Any) -> str:
    """A value as a notebook shows it: what is nearly nothing is rounding, another number on every processor."""
    rounding = isinstance(value, float) and 0 < abs(value) < ROUNDING
    return f"< {ROUNDING:g}".replace("e-05", "e-5") if rounding else common.brief(value)
