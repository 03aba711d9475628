"""The ledger: what the paper says, what we measured, a control measured the same way, and a verdict.

`verdict` recomputes it from a claim as it stands in `figures/<model>/claims.json`.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from spikesink.common import NotApplicable, measure, write_atomically, writing_to
from spikesink.lab.config import LAB
from spikesink.ledger.rules import RULES
from spikesink.model.names import DEFAULT_MODEL

SCHEMA = 1
VERSIONS = ("torch", "transformers", "transformer-lens")  # of what a ledger was measured with


@dataclass(frozen=True)
class Evidence:
    """What a measure says to a claim: the measured values, and those of a control measured the same way."""

    measured: Mapping[str, Any]
    control: Mapping[str, Any]


@measure
def make_evidence(measured: Mapping[str, Any], control: Mapping[str, Any]) -> Evidence:
    """Evidence without the controls that are NaN; NotApplicable if a measured value is, or no control is left."""
    missing = [name for name, value in measured.items() if not _is_finite(value)]
    if missing:
        raise NotApplicable(
            f"{', '.join(missing)} could not be measured: there is no token or channel to measure it on"
        )
    control = {name: value for name, value in control.items() if _is_finite(value)}
    if not control:
        raise NotApplicable("no control could be measured: there is no ordinary token or channel to compare with")
    return Evidence(measured, control)


def _is_finite(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)


@dataclass(frozen=True)
class Claim:
    """One row of the ledger."""

    statement: str
    source: str
    verdict: str
    rule: str
    measured: Mapping[str, Any]
    control: Mapping[str, Any]
    notebook: str


def judge(claim_id: str, evidence: Evidence | NotApplicable, notebook: str) -> Claim:
    """Put evidence to a claim's rule; ValueError where it has no control, or lacks what the rule asks for."""
    if claim_id not in RULES:
        raise ValueError(f"there is no claim {claim_id!r}; rules.RULES lists those there are.")
    rule = RULES[claim_id]
    if isinstance(evidence, NotApplicable):
        return Claim(rule.statement, rule.source, "n/a", rule.words, {"reason": evidence.reason}, {}, notebook)
    measured, control = _make_plain(claim_id, evidence.measured), _make_plain(claim_id, evidence.control)
    if not control:
        raise ValueError(f"{claim_id} has no control; measure one the same way.")
    try:
        judged = verdict(claim_id, measured)
    except KeyError as missing:
        raise ValueError(f"{claim_id} cannot be judged without {missing}; measure it too.") from None
    return Claim(rule.statement, rule.source, judged, rule.words, measured, control, notebook)


def _make_plain(claim_id: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as JSON gives them back, floats at six significant digits."""
    plain = {}
    for name, value in values.items():
        try:
            text = json.dumps(value, allow_nan=False, default=lambda v: v.tolist() if hasattr(v, "tolist") else list(v))
        except (TypeError, ValueError):
            text = "null"
        if "null" in text:
            raise ValueError(f"{claim_id}: {name} is {value}, which is no number that a ledger can hold.")
        plain[name] = json.loads(text, parse_float=lambda digits: float(f"{float(digits):.6g}"))
    return plain


def verdict(claim_id: str, measured: Mapping[str, Any]) -> str:
    """The verdict that a claim's rule gives on measured values: "holds", "differs", or "n/a" where a reason stands."""
    if "reason" in measured:
        return "n/a"
    return "holds" if RULES[claim_id].is_met(measured) else "differs"


def left_open(claim_id: str, measured: Mapping[str, Any]) -> bool:
    """Whether a rule that asks for one end of each `interval_…` fails there, and would hold at the other ends."""
    rule = RULES[claim_id]
    turned = {name: value[::-1] if name.startswith("interval_") else value for name, value in measured.items()}
    return not rule.is_met(measured) and rule.is_met(turned)


def passing_controls(claim_id: str, measured: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    """The controls that a claim's rule holds of as well, by the name of their first value; none where it differs.

    A claim that holds of ordinary tokens too is true, but says nothing of spikes.
    """
    rule = RULES.get(claim_id)
    if rule is None or verdict(claim_id, measured) != "holds":
        return []
    measured_controls = [names for names in rule.controls if control.keys() >= set(names.values())]
    return [
        next(iter(names.values()))
        for names in measured_controls
        if rule.is_met({**measured, **{name: control[other] for name, other in names.items()}})
    ]


@dataclass(frozen=True)
class Header:
    """What a ledger was measured with. Claims measured with another model, text, precision or seed are not mixed."""

    model: str
    spec: str
    sha256: str
    text: str
    text_sha256: str
    windows: tuple[int, int]
    dtype: str
    seed: int


def record(folder: Path, header: Header, claims: Mapping[str, Claim]) -> Path:
    """Merge claims into `folder/claims.json`, atomically, and return its path.

    Claims already there stay if they were measured with the same header, and go otherwise.
    """
    path = folder / "claims.json"
    head = json.loads(json.dumps(asdict(header)))
    with writing_to(folder), FileLock(folder / ".claims.lock"):
        old = _read(path) if path.is_file() else {}
        kept = old["claims"] if head.items() <= old.items() else {}
        merged = kept | {name: asdict(claim) for name, claim in claims.items()}
        versions = {name.replace("-", "_"): importlib.metadata.version(name) for name in VERSIONS}
        data = {"schema": SCHEMA, **head, "versions": versions, "claims": dict(sorted(merged.items()))}
        write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return path


def ledgers(figures: Path) -> dict[str, dict[str, Any]]:
    """Every `figures/*/claims.json` of a model (not the lab's), by its name; the default model's first."""
    of_models = [_read(path) for path in figures.glob("*/claims.json") if path.parent.name != LAB]
    return {data["model"]: data for data in sorted(of_models, key=lambda d: (d["model"] != DEFAULT_MODEL, d["model"]))}


def lab_ledger(figures: Path) -> dict[str, Any] | None:
    """The ledger of the models that we train ourselves; None where there is none."""
    path = figures / LAB / "claims.json"
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"the ledger {path} is damaged ({error}); remove it and run its notebooks again.") from None


def first_with_same_text(texts: Mapping[str, str]) -> dict[str, str]:
    """Of texts by name, those that an earlier one says as well: the name of the first that does."""
    first = {text: name for name, text in reversed(texts.items())}
    return {name: first[text] for name, text in texts.items() if first[text] != name}
