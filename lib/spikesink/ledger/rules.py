"""The rules of the claims, as `rules.toml` beside this file has them: each said once, in words that can be computed.

A rule is the same for every model, and set from what the claim means before the ledger was filled.
"""

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import CodeType
from typing import Any

LINKS = {
    "LC": "The spike's life",
    "AM": "The amplifier",
    "MX": "The amplifier",
    "TK": "The first token",
    "NM": "RMSNorm",
    "SK": "The sink",
    "AB": "Cutting the chain",
    "TR": "Trained variants",
    "SV": "Serving",
}


def largest_step(factors: Sequence[float | int], values: Sequence[float | int]) -> float:
    """By how much values change from one factor to the next, at most, up to a factor of 1; of one value, endlessly."""
    dosed = [value for factor, value in zip(factors, values, strict=True) if factor <= 1]
    return max((later - earlier for earlier, later in pairwise(dosed)), default=float("inf"))


FUNCTIONS: dict[str, Callable] = {"abs": abs, "len": len, "max": max, "min": min, "largest_step": largest_step}
_CONDITION = re.compile(r"\{(.+?)\}")
_COMPARED = re.compile(r".*?(>=|<=|==|<|>) ")
_POINT = re.compile(r"(?<=[a-z]_\d)\.(?=\d)")  # in the name of a value, such as sink_ratios_at_0.2


@dataclass(frozen=True)
class Rule:
    """A claim's statement, where it is made, and when it holds. What each field is, `rules.toml` says."""

    statement: str
    short: str
    source: str
    holds: str
    headline: str
    beside: str = ""
    controls: Sequence[Mapping[str, str]] = ()

    @property
    def words(self) -> str:
        """When the claim holds, in words: of each condition, what stands from its comparison on."""

        def limit(condition: re.Match) -> str:
            text = _COMPARED.sub(r"\1 ", condition[1], count=1).removeprefix("== ")
            return text.replace("% * ", "% of ").replace(" * ", " times ")

        return _CONDITION.sub(limit, self.holds)

    @cached_property
    def _conditions(self) -> list[CodeType]:
        texts = (_POINT.sub("_", re.sub(r"([\d.]+)%", r"(\1 / 100)", text)) for text in _CONDITION.findall(self.holds))
        return [compile(text, "rules.toml", "eval") for text in texts]

    def read(self, measured: Mapping[str, Any]) -> dict[str, Any]:
        """The values that the rule asks for; KeyError where one was not measured."""
        names = {_POINT.sub("_", name): name for name in measured}
        asked = dict.fromkeys(name for code in self._conditions for name in code.co_names if name not in FUNCTIONS)
        return {names.get(name, name): measured[names.get(name, name)] for name in asked}

    def is_met(self, measured: Mapping[str, Any]) -> bool:
        """Whether all conditions are met. Raises what `read` does."""
        values = {_POINT.sub("_", name): value for name, value in self.read(measured).items()}
        return all(eval(code, {"__builtins__": {}} | FUNCTIONS, values) for code in self._conditions)


_TABLE = tomllib.loads((Path(__file__).parent / "rules.toml").read_text(encoding="utf-8"))
RULES = {name: Rule(**row | {"holds": _TABLE.get(row["holds"], row)["holds"]}) for name, row in _TABLE.items()}
