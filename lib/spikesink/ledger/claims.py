"""The claims ledger: what the paper says, what we measured, a control measured the same way, and a verdict.

A rule is a pure function of what was measured, the same for every model, and set from what the claim means before
the ledger was filled; `verdict` recomputes it from a claim as it stands in `figures/<model>/claims.json`.
"""

import importlib.metadata
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from filelock import FileLock

from spikesink.common import NotApplicable, write_atomically, writing_to
from spikesink.lab.config import LAB
from spikesink.ledger.rules import BREAKS, LATE_RATIOS, PAPER, REPAIRS, RULES, SETS, STRONG, Rule, _trained
from spikesink.model.names import DEFAULT_MODEL

SCHEMA = 1


@dataclass(frozen=True)
class Evidence:
    """What a measure says to a claim: the measured values, and those of a control measured the same way."""

    measured: Mapping[str, Any]
    control: Mapping[str, Any]


def make_evidence(measured: Mapping[str, Any], control: Mapping[str, Any]) -> Evidence | NotApplicable:
    """Evidence without the controls that could not be measured; none at all, or a measure that is none, is a reason."""
    missing = [name for name, value in measured.items() if not _finite(value)]
    if missing:
        return NotApplicable(
            f"{', '.join(missing)} could not be measured: there is no token or channel to measure it on"
        )
    control = {key: value for key, value in control.items() if _finite(value)}
    if not control:
        return NotApplicable("no control could be measured: there is no ordinary token or channel to compare with")
    return Evidence(measured, control)


def _finite(value: Any) -> bool:
    """Whether no float in a value, or in the lists that it is made of, is none."""
    if isinstance(value, list | tuple):
        return all(map(_finite, value))
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


RULES |= {
    "TR1": _trained(
        "The better training goes, the more sinks; without weight decay spikes grow and sinks wane.",
        f"{PAPER}, trained families: optimization",
    ),
    "TR2": _trained(
        "Sinks and spikes need no SwiGLU: GeLU has both, a linear FFN or none has sinks and smaller spikes.",
        f"{PAPER}, trained families: FFN",
    ),
    "TR3": _trained(
        "Normalization sets the size of the spike, and hardly the sinks.",
        f"{PAPER}, trained families: normalization",
    ),
    "TR4": _trained("Wide heads make sinks, narrow ones hardly any.", f"{PAPER}, trained families: heads"),
    "TR5": _trained(
        "A gate that reads its input takes sinks and spikes away; a static one does not.",
        f"{PAPER}, trained families: gated attention; arXiv:2505.06708",
    ),
    "TR6": _trained(
        "Where no prediction with a short context is trained, there are hardly any sinks, and larger spikes.",
        f"{PAPER}, trained families: context length",
    ),
    "X-TR7": Rule(
        "The sink ratio follows how well training went more than the size of the spike does.",
        f"of our own; {PAPER}, trained families: optimization",
        f"over the optimization variants the rank correlation of sink ratio and loss <= {STRONG}, and stronger than "
        "the spike's; where the variants, resampled, leave either open, it is not judged",
        lambda m: m["spearman_sink"] <= STRONG and abs(m["spearman_sink"]) > abs(m["spearman_spike"]),
        "spearman_sink",
        beside="spearman_spike",
        controls=(
            {"spearman_sink": "spearman_sink_other_families", "spearman_spike": "spearman_spike_other_families"},
        ),
    ),
    "X-TR8": Rule(
        "In training the spike comes before the sink.",
        "of our own; arXiv:2410.10781 on when sinks emerge",
        "in nine of ten runs that end with sinks, position 0's largest entry, as a multiple of the largest elsewhere, "
        "has come half of its way after fewer tokens than the attention to it (control: the largest elsewhere, as a "
        "multiple of the median)",
        lambda m: m["share_spike_first"] >= 0.9,
        "share_spike_first",
        controls=({"share_spike_first": "share_elsewhere_first"},),
    ),
    "X-TR9": Rule(
        "Where the truth is known, a head waits at position 0 when it has nothing to do, and only then.",
        "arXiv:2410.13835",
        "in every run of the task's base some head gives position 0 >= half of the attention of queries that have "
        "nothing to copy, and <= 10% of those that have",
        lambda m: min(m["attention_other"]) >= 0.5 and max(m["attention_trigger"]) <= 0.1,
        "attention_other",
        beside="attention_trigger",
        controls=(
            {"attention_other": "attention_other_untrained", "attention_trigger": "attention_trigger_untrained"},
        ),
    ),
}


RULES |= {
    "SV1": Rule(
        "Spike tokens set the scale of an activation quantizer.",
        "arXiv:2211.10438 on outliers",
        f"int8 per tensor costs >= {SETS - 1:.0%} more perplexity than the same with the spike's channels apart, at "
        "the lower end of the 95% interval",
        lambda m: m["interval_per_tensor_over_split"][0] >= SETS,
        "perplexity_int8_per_tensor",
        beside="perplexity_int8_spike_split",
        controls=({"interval_per_tensor_over_split": "interval_per_tensor_over_others"},),
    ),
    "SV2": Rule(
        "A cache that lets go of the sink breaks the model, one that keeps it does not.",
        "arXiv:2309.17453",
        f"perplexity without the first tokens >= {BREAKS} times that of the full cache; with four of them <= {REPAIRS} "
        "times, each at both ends of its 95% interval",
        lambda m: m["interval_window_over_full"][0] >= BREAKS and m["interval_with_sink_over_full"][1] <= REPAIRS,
        "perplexity_window",
        beside="perplexity_window_with_sink",
        controls=({"interval_with_sink_over_full": "interval_with_others_over_full"},),
    ),
    "SV3": Rule(
        "Sinks stay, within a factor of two, as far into the context as was measured.",
        f"{PAPER}, sinks; arXiv:2410.10781",
        "of each stretch's queries, in layers that see all of the text, the sink ratio is within a factor 2 from the "
        "first 256 tokens to the longest that was measured within the context, at ε = 0.2, 0.3 and 0.4",
        lambda m: max(m["sink_ratios"]) > 0 and all(max(m[of]) <= 2 * min(m[of]) for of in LATE_RATIOS),
        "sink_ratios",
        controls=(dict.fromkeys(LATE_RATIOS, "sink_ratios_other_position"),),
    ),
}


def judge(claim_id: str, evidence: Evidence | NotApplicable, notebook: str) -> Claim:
    """Put evidence to a claim's rule.

    Raises:
        ValueError: no rule has this id, or needs what was not measured; or a measured or control value is not a finite
            number, a string, or a list or mapping of those.
    """
    if claim_id not in RULES:
        raise ValueError(f"there is no claim {claim_id!r}; claims.RULES lists those there are.")
    rule = RULES[claim_id]
    if isinstance(evidence, NotApplicable):
        return Claim(rule.statement, rule.source, "n/a", rule.words, {"reason": evidence.reason}, {}, notebook)
    if not isinstance(evidence, Evidence):
        raise ValueError(f"{claim_id} is judged by Evidence or NotApplicable, not by a {type(evidence).__name__}.")
    measured, control = _plain(evidence.measured, claim_id), _plain(evidence.control, claim_id)
    if not control:
        raise ValueError(f"{claim_id} has no control; measure one the same way.")
    try:
        found = verdict(claim_id, measured)
    except KeyError as missing:
        raise ValueError(f"{claim_id} cannot be judged without {missing}; measure it too.") from None
    return Claim(rule.statement, rule.source, found, rule.words, measured, control, notebook)


def verdict(claim_id: str, measured: Mapping[str, Any]) -> str:
    """The verdict that a claim's rule gives on measured values: "holds", "differs", or "n/a" where a reason stands."""
    if "reason" in measured:
        return "n/a"
    return "holds" if RULES[claim_id].holds(measured) else "differs"


def left_open(claim_id: str, measured: Mapping[str, Any]) -> bool:
    """Whether a rule that asks for one end of each `interval_…` fails there, and would hold at the other ends."""
    turned = {name: of[::-1] if name.startswith("interval_") else of for name, of in measured.items()}
    return not RULES[claim_id].holds(measured) and RULES[claim_id].holds(turned)


def passing_controls(claim_id: str, measured: Mapping[str, Any], control: Mapping[str, Any]) -> list[str]:
    """The controls that a claim's rule holds of as well, by the name of their first value; none where it differs.

    A claim that holds of ordinary tokens too is true, but says nothing of spikes. Of an unknown claim there are none.
    """
    rule = RULES.get(claim_id)
    if rule is None or verdict(claim_id, measured) != "holds":
        return []
    there = [names for names in rule.controls if set(names.values()) <= set(control)]
    return [
        next(iter(names.values()))
        for names in there
        if rule.holds(dict(measured) | {name: control[other] for name, other in names.items()})
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

    Claims already there stay if they were measured with the same header; otherwise they go, so that a file never
    mixes two measurements.

    Raises:
        ValueError: the file that is there is damaged.
        OSError: the folder cannot be written.
    """
    path = folder / "claims.json"
    head = json.loads(json.dumps(asdict(header)))
    with writing_to(folder), FileLock(folder / ".claims.lock"):
        old = _read(path) if path.is_file() else {}
        same = all(old.get(key) == value for key, value in head.items())
        merged = (old.get("claims", {}) if same else {}) | {key: asdict(claim) for key, claim in claims.items()}
        versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "transformer-lens")}
        versions = {name.replace("-", "_"): version for name, version in versions.items()}
        data = {"schema": SCHEMA, **head, "versions": versions, "claims": dict(sorted(merged.items()))}
        write_atomically(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")
    return path


def ledgers(figures: Path) -> dict[str, dict[str, Any]]:
    """Every `figures/*/claims.json` of a model, by its name; the default model first, the others by name.

    The lab's is not among them: what it says is of many models that were trained to be compared.
    """
    found = [_read(path) for path in figures.glob("*/claims.json") if path.parent.name != LAB]
    return {data["model"]: data for data in sorted(found, key=lambda d: (d["model"] != DEFAULT_MODEL, d["model"]))}


def lab_ledger(figures: Path) -> dict[str, Any] | None:
    """The ledger of the models that we train ourselves; None where there is none."""
    path = figures / LAB / "claims.json"
    return _read(path) if path.is_file() else None


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"the ledger {path} is damaged ({error}); remove it and run its notebooks again.") from None


def first_with_same_text(texts: Mapping[str, str]) -> dict[str, str]:
    """Of texts by name, those that an earlier one says as well: the name of the first that does."""
    first = {text: name for name, text in reversed(texts.items())}
    return {name: first[text] for name, text in texts.items() if first[text] != name}


def _plain(values: Mapping[str, Any], claim_id: str) -> dict[str, Any]:
    """The same values as plain JSON, floats at six significant digits; refuses what JSON cannot say."""

    def plain(value: Any, name: str) -> Any:
        value = value.item() if getattr(value, "shape", None) == () else value  # one number of numpy's or torch's
        if isinstance(value, bool | str):
            return value
        if isinstance(value, Mapping):
            return {str(k): plain(v, f"{name}.{k}") for k, v in value.items()}
        if isinstance(value, Iterable):
            return [plain(v, f"{name}[{i}]") for i, v in enumerate(value)]
        if isinstance(value, int):
            return value
        if not isinstance(value, Real) or not math.isfinite(value):
            raise ValueError(f"{claim_id}: {name} is {value}, which is no number that a ledger can hold.")
        return float(f"{float(value):.6g}")

    return {key: plain(value, key) for key, value in values.items()}
