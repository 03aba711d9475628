"""The numbers that the paper reports (arXiv:2603.05498), as `paper.toml` beside this file has them, next to ours."""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PAPER = tomllib.loads((Path(__file__).parent / "paper.toml").read_text(encoding="utf-8"))
TABLE_1 = tuple((name, n_blocks, tuple(up), tuple(down)) for name, n_blocks, up, down in _PAPER["table_1"])
TABLE_2 = tuple(map(tuple, _PAPER["table_2"]))

# The 7B models that it trains, base and variants: sink ratio and largest activation. None: it does not say.
_TRAINED = _PAPER["trained"]
TRAINED = "trained 7B"
TRAINED_BASE = (_TRAINED["base"]["sink"], _TRAINED["base"]["spike"])
TRAINED_VARIANTS: dict[str, dict[str, tuple[float | str | None, float | None]]] = {
    family: {name: (row.get("sink"), row.get("spike")) for name, row in rows.items()}
    for family, rows in _TRAINED["variants"].items()
}
TRAINED_AS = {name: row["as"] for rows in _TRAINED["variants"].values() for name, row in rows.items() if "as" in row}
DOWN_IF_WORSE = "down if worse"
AT_LEAST = TRAINED_VARIANTS["gates"]["static gate"][0]  # "0.40 or more"
MAY_FALL = TRAINED_BASE[0] - float(AT_LEAST.split()[0])  # what a static gate's ratio is below the base's, at most


@dataclass(frozen=True)
class Reported:
    """A value that stands for a claim as the paper reports it, and what of it our rule for the claim can be put to.

    `measured` is None where the rule asks for what the paper does not report.
    """

    value: object
    source: str
    measured: Mapping[str, object] | None = None


def reported() -> dict[str, dict[str, Reported]]:
    """What the paper reports of each of its models, by model and claim.

    Table 1 lists blocks but not what share each writes, which is what LC1 and LC3 ask for; and by which ε and over how
    long windows the sink ratio of the trained model is counted could not be confirmed. So none of these is judged. The
    share of the vocabulary in table 2 is what TK1 asks for, and its rule can be put to it.
    """
    reports: dict[str, dict[str, Reported]] = {name: {} for name, *_ in TABLE_1}
    for name, _, up, down in TABLE_1:
        reports[name] |= {"LC1": Reported(up, "table 1"), "LC3": Reported(down, "table 1")}
    for name, spiking, vocabulary in TABLE_2:
        share = spiking / vocabulary
        reports[name]["TK1"] = Reported(share, "table 2", {"share": share})
    return reports | {TRAINED: {"SK1": Reported(TRAINED_BASE[0], "trained families")}}
