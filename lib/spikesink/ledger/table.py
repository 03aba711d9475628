"""What the ledgers of several models say together: claims x models, beside what the paper reports of its own models.

`render` writes it as a table, `draw` as a picture, and both show the same `Board`. Why a claim differs somewhere is
written by hand, in `reasons.md` beside them, with placeholders for numbers that the ledgers hold.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikesink import paper
from spikesink.common import brief, escape, mean_of
from spikesink.lab import config
from spikesink.ledger import claims
from spikesink.ledger.rules import LINKS, RULES

OTHERS = "Further claims"


TRAINED = "The models that we train ourselves"


NOT_MEASURED = "(not measured here)"


NOT_LOOKED_INTO = "The reason was not looked into."


PICTURE = "claims"


@dataclass(frozen=True)
class Cell:
    """A claim on one model: the verdict ("reported" where it is the paper's and no rule can be put to it), its value.

    `value` is the measured value that stands for the claim; None where it does not apply.
    """

    verdict: str
    value: Any = None
    beside: Any = None  # what the value is to be compared with
    held_by: Sequence[str] = ()  # controls that the rule holds of as well


@dataclass(frozen=True)
class Row:
    """A claim across models: `cells` by the name of a model with a ledger, `reported` by that of one of the paper's."""

    claim_id: str
    link: str
    statement: str
    rule: str  # when it holds, in words
    notebook: str
    quantity: str  # what the values are, and what each is compared with
    cells: Mapping[str, Cell]
    reported: Mapping[str, Cell]

    @property
    def short(self) -> str:
        """The claim in a few words."""
        return RULES[self.claim_id].short if self.claim_id in RULES else _shortened(self.statement.rstrip("."))

    @property
    def differs_on(self) -> list[str]:
        """The models here that it differs on."""
        return [name for name, cell in self.cells.items() if cell.verdict == "differs"]

    @property
    def put_to(self) -> list[str]:
        """The models here that it could be put to."""
        return [name for name, cell in self.cells.items() if cell.verdict in ("holds", "differs")]

    @property
    def of_controls_on(self) -> list[str]:
        """The models here that it holds on, and of a control there as well."""
        return [name for name, cell in self.cells.items() if cell.verdict == "holds" and cell.held_by]


@dataclass(frozen=True)
class Board:
    """Claims x models. `models` have a ledger here, `others` are the paper's."""

    models: Sequence[str]
    others: Sequence[str]
    rows: Sequence[Row]

    @property
    def judged(self) -> list[Row]:
        """The claims that could be put to a model here."""
        return [row for row in self.rows if row.put_to]

    @property
    def universal(self) -> list[Row]:
        """Of those, the ones that hold wherever they were put."""
        return [row for row in self.judged if not row.differs_on]

    @property
    def firm(self) -> list[Row]:
        """Of the universal ones, those that were put to two models or more, and hold of no control on any."""
        return [row for row in self.universal if len(row.put_to) > 1 and not row.of_controls_on]

    @property
    def nowhere(self) -> list[Row]:
        """The ones that differ wherever they were put."""
        return [row for row in self.judged if row.differs_on == row.put_to]

    def only_on(self, model: str) -> list[Row]:
        """The ones that differ on this model and hold on all others that they were put to, at least one."""
        return [row for row in self.judged if row.differs_on == [model] != row.put_to]

    @property
    def on_several(self) -> list[Row]:
        """The ones that differ on several models and hold on others."""
        return [row for row in self.judged if 1 < len(row.differs_on) < len(row.put_to)]


def board(found: Mapping[str, Mapping[str, Any]]) -> Board:
    """Set ledgers side by side, in the order of the chain.

    Args:
        found: ledgers by model, as `claims.ledgers` returns them.
    """
    reported = paper.reported()
    ids = sorted({key for data in found.values() for key in data["claims"]}, key=_order)
    rows = []
    for key in ids:
        mine = {name: data["claims"][key] for name, data in found.items() if key in data["claims"]}
        first = next(iter(mine.values()))
        theirs = {name: _reported(key, values[key]) for name, values in reported.items() if key in values}
        names = [name for name in (RULES[key].headline, RULES[key].beside) if name] if key in RULES else []
        rows.append(
            Row(
                claim_id=key,
                link=link(key),
                statement=first["statement"],
                rule=first["rule"],
                notebook=first["notebook"],
                quantity=" / ".join(names).replace("_", " "),
                cells={name: _cell(key, claim) for name, claim in mine.items()},
                reported=theirs,
            )
        )
    return Board(tuple(found), tuple(reported), tuple(rows))


def _cell(claim_id: str, claim: Mapping[str, Any]) -> Cell:
    measured, control, rule = claim["measured"], claim["control"], RULES.get(claim_id)
    if rule is None or claim["verdict"] == "n/a":
        return Cell(claim["verdict"])
    held = claims.passing_controls(claim_id, measured, control) if _of_todays_rule(claim_id, claim) else []
    return Cell(claim["verdict"], measured.get(rule.headline), measured.get(rule.beside), held)


def _of_todays_rule(claim_id: str, claim: Mapping[str, Any]) -> bool:
    """Whether the rule stands here that judged a claim; a verdict of another version's stands as it was reached."""
    return claim_id in RULES and claim["rule"] == RULES[claim_id].words


def _reported(claim_id: str, value: paper.Reported) -> Cell:
    return Cell("reported" if value.measured is None else claims.verdict(claim_id, value.measured), value.value)


def link(claim_id: str) -> str:
    """Which link of the chain a claim is about."""
    return LINKS.get(claim_id.removeprefix("X-")[:2], OTHERS)


def _order(claim_id: str) -> tuple[int, bool, int, str]:
    links, ids = [*dict.fromkeys(LINKS.values()), OTHERS], list(RULES)
    known = claim_id in RULES
    return links.index(link(claim_id)), not known, ids.index(claim_id) if known else 0, claim_id


def _in_order(of: Mapping[str, Any]) -> list[tuple[str, Any]]:
    return sorted(of.items(), key=lambda item: _order(item[0]))


def _shortened(text: str, most: int = 40) -> str:
    return text if len(text) <= most else text[: most - 1].rstrip() + "…"


def _summary(whole: Board) -> list[str]:
    """In words: what holds everywhere and how firmly, what differs on one model alone, on several, on all."""

    def listed(rows: Sequence[Row], on=lambda row: [], how: str = "put to") -> str:
        return "; ".join(
            f"{row.claim_id} {row.short}" + (f" ({how} {', '.join(on(row))})" if on(row) else "") for row in rows
        )

    def where(row: Row) -> list[str]:
        return [] if len(row.of_controls_on) == len(row.put_to) else row.of_controls_on

    def once(row: Row) -> list[str]:
        return row.put_to if len(row.put_to) < len(whole.models) else []

    def alone(row: Row) -> list[str]:
        return [*once(row), *(["and hold of a control"] if row.of_controls_on else [])]

    whatever = [row for row in whole.universal if len(row.put_to) > 1 and row.of_controls_on]
    single = [row for row in whole.universal if len(row.put_to) == 1]
    judged, lines = f"of {len(whole.judged)} claims", []
    if whole.universal:
        lines.append(f"- **{len(whole.universal)} {judged} hold wherever they were put.**")
    if whole.firm:
        what = "hold firmly: on two models or more, and of no control"
        lines.append(f"  - {len(whole.firm)} {what}: {listed(whole.firm, once)}.")
    if whatever:
        what = "hold of a control as well, so that they are true of more than spikes and sinks"
        lines.append(f"  - {len(whatever)} {what}: {listed(whatever, where, 'on')}.")
    if single:
        lines.append(f"  - {len(single)} hold on the only model that they were put to: {listed(single, alone)}.")
    groups = [(f"differ on {model} alone", whole.only_on(model)) for model in whole.models]
    groups += [("differ on several models and hold on others", whole.on_several)]
    groups += [("differ wherever they were put", whole.nowhere)]
    lines += [f"- **{len(rows)} {judged} {what}**: {listed(rows, once)}." for what, rows in groups if rows]
    if unjudged := [row for row in whole.rows if not row.put_to]:
        lines.append(f"- {len(unjudged)} more could be put to none of these models: {listed(unjudged)}.")
    if len(whole.models) > 1:
        lines += ["", "One model of a family cannot tell the family's habit from its own."]
    return [*lines, ""] if lines else []


def _table(whole: Board) -> list[str]:
    names = ["claim", "holds where", *map(escape, whole.models), "what the numbers are"]
    lines = ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    for row in whole.rows:
        cells = [_words(row.cells.get(name)) for name in whole.models]
        name = f"[{escape(row.claim_id)}](../notebooks/{row.notebook}.ipynb)"
        lines.append(
            "| "
            + " | ".join((f"**{name}** {escape(row.statement)}", escape(row.rule), *cells, escape(row.quantity)))
            + " |"
        )
    return [
        *lines,
        "",
        "A number after a stroke is what the one before it is compared with. *holds\\** means that the rule holds of a "
        "control too, which is named under the model below.",
        "",
        *_theirs(whole),
    ]


def _theirs(whole: Board) -> list[str]:
    """What the paper reports of its own models, for the claims where it does."""
    rows = [row for row in whole.rows if row.reported]
    if not rows:
        return []
    lines = ["| the paper's models | " + " | ".join(f"{row.claim_id} {row.quantity}" for row in rows) + " |"]
    lines.append("|---" * (len(rows) + 1) + "|")
    for name in whole.others:
        lines.append(f"| {name} | " + " | ".join(_words(row.reported.get(name)) for row in rows) + " |")
    return [
        *lines,
        "",
        "The paper's models have a number where it reports the value that stands for a claim: blocks in its table 1, "
        "shares of the vocabulary in its table 2, and the sink ratio of the 7B model that it trains. LC1 and LC3 ask "
        "for the share that each block writes, which it does not list, and with which ε and T it counts sinks could "
        "not be confirmed, so these are *reported* and not judged. TK1's rule can be put to the reported share.",
    ]


def _words(cell: Cell | None) -> str:
    """A cell of the table: the verdict, the value that stands for the claim, and what that is compared with."""
    if cell is None:
        return ""
    verdict = cell.verdict + ("\\*" if cell.held_by else "")
    numbers = " / ".join(brief(value) for value in (cell.value, cell.beside) if value is not None)
    return f"{verdict} ({escape(numbers)})" if numbers else verdict


def _one_model(name: str, data: Mapping[str, Any], about: str) -> list[str]:
    n, length = data["windows"]
    lines = [
        f"## {name}",
        "",
        f"`{data['spec']}`, {n} windows of {length} tokens of `{data['text']}`, {data['dtype']}, seed {data['seed']}.",
        *(["", about] if about else []),
        "",
        "| claim | verdict | measured | control |",
        "|---|---|---|---|",
    ]
    for key, claim in _in_order(data["claims"]):
        cells = [_values(claim["measured"]), _values(claim["control"])]
        held = ", ".join(_cell(key, claim).held_by)
        verdict = claim["verdict"] + (f" (of {held} too)" if held else "")
        lines.append(f"| {escape(key)} | {verdict} | " + " | ".join(cells) + " |")
    return lines


def _trained_in_short(data: Mapping[str, Any]) -> list[str]:
    """The claims about the models that we train ourselves, by verdict."""
    by_verdict = defaultdict(list)
    for key, claim in _in_order(data["claims"]):
        by_verdict[claim["verdict"]].append(key)
    parts = [f"{said} {', '.join(by_verdict[said])}" for said in ("holds", "differs", "n/a") if by_verdict[said]]
    where = "#" + TRAINED.lower().replace(" ", "-")
    return [f"Besides, [{TRAINED[0].lower()}{TRAINED[1:]}]({where}) ({data['spec']}): {'; '.join(parts)}.", ""]


def _trained(data: Mapping[str, Any], written: Mapping[str, str]) -> list[str]:
    """The models that we train ourselves: each claim with its verdict, why, and its variants."""
    lines = [
        f"## {TRAINED}",
        "",
        f"{data['spec']}, on the text `{data['text']}` (`packages`: the Python source of what is installed with this "
        f"project); looked at on {data['windows'][0]} held-out windows of {data['windows'][1]} tokens, late queries on "
        "longer ones. Changes are against the base, or what a variant is said to be of, with 95% intervals over seeds; "
        "[09](../notebooks/09_trained.ipynb) says what each column is, and which way the paper goes.",
    ]
    found = dict(_in_order(data["claims"]))
    before = claims.first_with_same_text({key: claim["rule"] for key, claim in found.items()})
    for key, claim in found.items():
        variants = claim["measured"].get("variants", ())
        rule = f"As for {before[key]}" if key in before else f"Holds where {claim['rule']}"
        measured = {name: value for name, value in claim["measured"].items() if not name.startswith("variants")}
        lines += [
            "",
            f"### [{key}](../notebooks/{claim['notebook']}.ipynb): {claim['statement']}",
            "",
            f"**{claim['verdict']}**. {rule}.",
            "",
            f"Measured: {_values(measured)}. Control: {_values(claim['control'])}.",
            *(["", fill(written[key], {config.LAB: data})] if key in written else []),
            *(["", *_variants(variants)] if variants else []),
        ]
    return lines


def _variants(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """A family's table, as notebook 09 has it, but for what the paper says."""
    table = []
    for row in rows:
        compared = "sink_change" in row
        table.append(
            {
                "variant": row.get("title", row["name"]),
                "seeds": str(row["seeds"]),
                "loss": f"{row['loss']:.2f}",
                "sink ratio": brief(row["sink_ratio"]),
                "change": "{sink_change:+.2f} ({sink_low:+.2f} to {sink_high:+.2f})".format(**row) if compared else "",
                "at this loss": mean_of(row.get("sink_at_loss_by_seed", ())),
                "attention": brief(row["attention"]),
                "largest activation": brief(row["max_activation"]),
                "factor": "{spike_factor:.2f} ({spike_low:.2f} to {spike_high:.2f})".format(**row) if compared else "",
                "medians": brief(row["over_median"]),
                "times elsewhere": brief(row["over_elsewhere"]),
            }
        )
    lines = ["| " + " | ".join(table[0]) + " |", "|---" * len(table[0]) + "|"]
    return lines + ["| " + " | ".join(row.values()) + " |" for row in table]


def _values(values: Mapping[str, Any]) -> str:
    text = "; ".join(f"{key} {brief(value)}" for key, value in values.items())
    return escape(text).replace("\n", "\\n")


def _reasons(written: Mapping[str, str], found: Mapping[str, Mapping[str, Any]], whole: Board) -> list[str]:
    """A paragraph for each claim that differs somewhere: its section, and a sentence for each model it leaves out.

    And after them, the sections of claims that hold wherever they were put.
    """
    lines, held = [], []
    for row in whole.rows:
        text = written.get(row.claim_id, "")
        head = ["", f"### {row.claim_id}: {row.statement}", ""]
        if not row.differs_on:
            if any(speaks_of(text, name) for name in row.put_to):
                held += [*head, fill(text, found)]
            continue
        silent = [name for name in row.differs_on if not speaks_of(text, name)]
        # A section that speaks of no model that is here was written about others.
        paragraphs = [fill(text, found)] if len(silent) < len(row.differs_on) else []
        paragraphs += [_unexplained(row.claim_id, name, found[name]["claims"][row.claim_id]) for name in silent]
        lines += [*head, "\n\n".join(paragraphs)]
    lines = ["", "## Where models differ, and why as far as it was tested", *lines] if lines else []
    return [*lines, *(["", "## What to keep in mind where claims hold", *held] if held else [])]


def reasons(figures: Path) -> dict[str, str]:
    """The sections of `figures/reasons.md`, a claim's id or a model's name each; none where there is no such file.

    Raises:
        ValueError: two sections are about one claim.
    """
    path = figures / "reasons.md"
    if not path.is_file():
        return {}
    _, *sections = re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found: dict[str, str] = {}
    for section in sections:
        name, _, text = section.partition("\n")
        if name.strip() in found:
            raise ValueError(f"{path} has two sections {name.strip()}; make one of them.")
        found[name.strip()] = text.strip()
    return found


def speaks_of(text: str, model: str) -> bool:
    """Whether a text names a model, and not only one whose longer name begins or ends like it."""
    return re.search(rf"(?<![\w.-]){re.escape(model)}(?![\w-]|\.\w)", text) is not None


_NAME = r"\w+(?:(?<=\d)\.\d+)?"  # of a value; it may end in a number such as 0.2


_STEP = rf"\[([^\[\]{{}}]+)\]|\.({_NAME})"  # to a part of it


_PLACEHOLDER = re.compile(
    rf"\{{([^{{}}:\s]+):([A-Z][\w-]*)\.({_NAME})((?:\[[^\[\]{{}}]+\]|\.{_NAME})*)(?::([^{{}}]*))?\}}"
)


def fill(text: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """Put the ledgers' numbers in a text's placeholders.

    `{model:claim.name}` is a measured value, or a control of that name, as `claims.brief` has it; `{…name[2]}` the
    third of a list; `{…variants[GeLU].loss}` a value of the row with that name; `{…name:.0%}` the value in a format of
    Python's own.
    """

    def value(match: re.Match) -> str:
        model, claim_id, name, path, form = match.groups()
        claim = found.get(model, {}).get("claims", {}).get(claim_id, {})
        try:
            at = (claim.get("control", {}) | claim.get("measured", {}))[name]
            for bracketed, dotted in re.findall(_STEP, path):
                step = bracketed or dotted
                at = at[step] if isinstance(at, dict) else at[int(step)] if step.isdecimal() else _named(at, step)
            return format(at, form) if form else brief(at)
        except (LookupError, TypeError, ValueError):
            return NOT_MEASURED

    return _PLACEHOLDER.sub(value, text)


def _named(rows: Sequence[Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    return next((row for row in rows if row["name"] == name), {})


def _unexplained(claim_id: str, model: str, claim: Mapping[str, Any]) -> str:
    """What can be said of a difference that nobody has looked into: what its rule asks for."""
    met = RULES[claim_id].read(claim["measured"]) if _of_todays_rule(claim_id, claim) else claim["measured"]
    found = ", ".join(f"{name} {brief(value)}" for name, value in met.items())
    return f"On {model}: {found}; the rule asks for: {claim['rule']}. {NOT_LOOKED_INTO}"
