"""What the ledgers of several models say together: claims x models, beside what the paper reports of its own models.

`make_board` sets the ledgers side by side; `apps.publish` writes and draws it. Why a claim differs somewhere is written
by hand, in `reasons.md` beside the ledgers, with placeholders for numbers that the ledgers hold.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spikesink import paper
from spikesink.common import brief
from spikesink.ledger import claims
from spikesink.ledger.rules import LINKS, RULES
from spikesink.model.anatomy import Block

Ledgers = Mapping[str, Mapping[str, Any]]  # by model, as `claims.ledgers` returns them

OTHERS = "Further claims"
NOT_MEASURED = "(not measured here)"
NOT_LOOKED_INTO = "The reason was not looked into."
OF_BLOCKS = ("block", "step_up_blocks", "step_down_blocks", "first_point", "last_point")  # values that are blocks


@dataclass(frozen=True)
class Cell:
    """A claim on one model: the verdict, or "reported" where it is the paper's and no rule can be put to it."""

    verdict: str
    value: Any = None  # the measured value that stands for the claim; None where it does not apply
    beside: Any = None  # what the value is to be compared with
    held_by: Sequence[str] = ()  # controls that the rule holds of as well


@dataclass(frozen=True)
class Row:
    """A claim across models: `cells` by the name of a model with a ledger, `reported` by that of one of the paper's."""

    claim_id: str
    statement: str
    rule: str  # when it holds, in words
    notebook: str
    cells: Mapping[str, Cell]
    reported: Mapping[str, Cell]

    @property
    def link(self) -> str:
        """The link of the chain that the claim is about."""
        return find_link(self.claim_id)

    @property
    def short(self) -> str:
        """The claim in a few words; of one that has no rule here, its statement cut short."""
        text = self.statement.rstrip(".")
        cut = text if len(text) <= 40 else text[:39].rstrip() + "…"
        return RULES[self.claim_id].short if self.claim_id in RULES else cut

    @property
    def headline(self) -> str:
        """The measured value that stands for the claim."""
        return RULES[self.claim_id].headline if self.claim_id in RULES else ""

    @property
    def quantity(self) -> str:
        """What the values are, and what each is compared with."""
        beside = RULES[self.claim_id].beside if self.claim_id in RULES else ""
        return " / ".join(filter(None, (self.headline, beside))).replace("_", " ")

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

    @property
    def standing(self) -> str:
        """How it stands over all models that it was put to, in a word that `Board.those` takes.

        It holds on all: "firm" if they are two or more and it holds of no control, "loose" if it holds of one, "single"
        if there is but one model. It differs on all ("nowhere"), on "several" of them, or on one: that model's name. Or
        it could be put to none ("unjudged").
        """
        if not self.put_to:
            return "unjudged"
        if self.differs_on:
            one_or_several = self.differs_on[0] if len(self.differs_on) == 1 else "several"
            return "nowhere" if self.differs_on == self.put_to else one_or_several
        return "single" if len(self.put_to) == 1 else "loose" if self.of_controls_on else "firm"


@dataclass(frozen=True)
class Board:
    """Claims x models. `models` have a ledger here, `others` are the paper's."""

    models: Sequence[str]
    others: Sequence[str]
    rows: Sequence[Row]

    @property
    def holding(self) -> list[Row]:
        """The claims that hold wherever they were put."""
        return self.those("firm", "loose", "single")

    def those(self, *standings: str) -> list[Row]:
        """The claims that stand so; see `Row.standing`."""
        return [row for row in self.rows if row.standing in standings]

    @property
    def judged(self) -> list[Row]:
        """The claims that could be put to a model here."""
        return [row for row in self.rows if row.put_to]


def make_board(ledgers: Ledgers) -> Board:
    """Set ledgers side by side, in the order of the chain."""
    reported, rows = paper.reported(), []
    for claim_id in sort_claims({name for data in ledgers.values() for name in data["claims"]}):
        mine = {name: data["claims"][claim_id] for name, data in ledgers.items() if claim_id in data["claims"]}
        first = next(iter(mine.values()))
        rows.append(
            Row(
                claim_id,
                *(first[name] for name in ("statement", "rule", "notebook")),
                cells={name: make_cell(claim_id, claim) for name, claim in mine.items()},
                reported={
                    name: Cell(
                        "reported" if value.measured is None else claims.verdict(claim_id, value.measured), value.value
                    )
                    for name, row in reported.items()
                    if (value := row.get(claim_id))
                },
            )
        )
    return Board(tuple(ledgers), tuple(reported), tuple(rows))


def make_cell(claim_id: str, claim: Mapping[str, Any]) -> Cell:
    """What a ledger's row says. A verdict by another version's rule stands as it was reached, without its controls."""
    rule, measured = RULES.get(claim_id), claim["measured"]
    if rule is None or claim["verdict"] == "n/a":
        return Cell(claim["verdict"])
    held = claims.passing_controls(claim_id, measured, claim["control"]) if claim["rule"] == rule.words else []
    return Cell(claim["verdict"], measured.get(rule.headline), measured.get(rule.beside), held)


def find_link(claim_id: str) -> str:
    """Which link of the chain a claim is about."""
    return LINKS.get(claim_id.removeprefix("X-")[:2], OTHERS)


def sort_claims(claim_ids: Iterable[str]) -> list[str]:
    """Claims in the order of the chain; those that have no rule here come last of their link, by name."""
    links, ids = [*dict.fromkeys(LINKS.values()), OTHERS], list(RULES)

    def order(claim_id: str) -> tuple[int, int, str]:
        return links.index(find_link(claim_id)), ids.index(claim_id) if claim_id in ids else len(ids), claim_id

    return sorted(claim_ids, key=order)


def show_value(name: str, value: Any) -> str:
    """A measured value in few characters; blocks with the layers that they are of."""
    if name in OF_BLOCKS:
        value = [Block(one) for one in value] if isinstance(value, list | tuple) else Block(value)
    return brief(value)


def read_reasons(figures: Path) -> dict[str, str]:
    """The sections of `figures/reasons.md`, a claim's id or a model's name each; none where there is no such file."""
    path = figures / "reasons.md"
    if not path.is_file():
        return {}
    reasons: dict[str, str] = {}
    for section in re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]:
        name, _, text = section.partition("\n")
        if name.strip() in reasons:
            raise ValueError(f"{path} has two sections {name.strip()}; make one of them.")
        reasons[name.strip()] = text.strip()
    return reasons


def explain_differences(board: Board, reasons: Mapping[str, str], ledgers: Ledgers) -> list[tuple[Row, list[str]]]:
    """Paragraphs for each claim that differs somewhere: its section, and a sentence for each model it leaves out."""
    explained = []
    for row in (row for row in board.rows if row.differs_on):
        text = reasons.get(row.claim_id, "")
        silent = [name for name in row.differs_on if not speaks_of(text, name)]
        # A section that speaks of no model that is here was written about others.
        paragraphs = [fill(text, ledgers)] if len(silent) < len(row.differs_on) else []
        paragraphs += [_state_difference(row.claim_id, name, ledgers[name]["claims"][row.claim_id]) for name in silent]
        explained.append((row, paragraphs))
    return explained


def _state_difference(claim_id: str, model: str, claim: Mapping[str, Any]) -> str:
    """What can be said of a difference that nobody has looked into: the values that the rule asks for."""
    rule, measured = RULES.get(claim_id), claim["measured"]
    asked = rule.read(measured) if rule and claim["rule"] == rule.words else measured
    values = ", ".join(f"{name} {show_value(name, value)}" for name, value in asked.items())
    return f"On {model}: {values}; the rule asks for: {claim['rule']}. {NOT_LOOKED_INTO}"


def speaks_of(text: str, model: str) -> bool:
    """Whether a text names a model, and not only one whose longer name begins or ends like it."""
    return re.search(rf"(?<![\w.-]){re.escape(model)}(?![\w-]|\.\w)", text) is not None


_PLACEHOLDER = re.compile(r"\{([^{}:\s]+):([A-Z][\w-]*)\.([^{}:]+)(?::([^{}]*))?\}")
_STEP = re.compile(r"\[([^\[\]]+)\]|(\w+(?:(?<=\d)\.\d+)?)")  # of a path; a name may end in a number such as 0.2


def fill(text: str, ledgers: Ledgers) -> str:
    """Put the ledgers' numbers in a text's placeholders.

    `{model:claim.name}` is a measured value, or a control of that name, as `brief` has it; `{…name[2]}` the third of a
    list; `{…variants[GeLU].loss}` a value of the row with that name; `{…name:.0%}` the value in a format of Python's.
    """

    def value(match: re.Match) -> str:
        model, claim_id, path, form = match.groups()
        try:
            claim = ledgers[model]["claims"][claim_id]
            at: Any = claim["control"] | claim["measured"]
            for step in (bracketed or name for bracketed, name in _STEP.findall(path)):
                if isinstance(at, list):
                    at = at[int(step)] if step.isdecimal() else {row["name"]: row for row in at}[step]
                else:
                    at = at[step]
            return format(at, form) if form else brief(at)
        except (LookupError, TypeError, ValueError):
            return NOT_MEASURED

    return _PLACEHOLDER.sub(value, text)
