"""The claims about finished models, put to one of our own: the same measures, the same rules."""

from collections.abc import Mapping

import pandas as pd
from jaxtyping import Int
from torch import Tensor

from spikesink.chain.lifecycle import find_lifecycle
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable, brief
from spikesink.lab.model import Decoder
from spikesink.ledger import claims
from spikesink.ledger.claims import Evidence
from spikesink.ledger.evidence.everything import measure_chain
from spikesink.ledger.rules import RULES

THRESHOLD = 20.0  # medians that a spike exceeds here; of a model this small and young none reaches the usual 100
MOST_TOKENS = 0.05  # of those after the first can be spike tokens
ASKED = tuple(["LC1", "LC3", "LC4", "LC7", "AM2", "AM3", "AM5", "AM6", "NM3", "NM4", "SK1", "SK2", "SK3", "SK5", "SK7"])
WITHOUT_SPIKE = ("LC7", "SK1")  # asked whether there is a spike or not

Evidences = dict[str, Evidence | NotApplicable]


def measure_inside(
    model: Decoder, tokens: Int[Tensor, "n length"], threshold: float = THRESHOLD, seed: int = 0
) -> Evidences:
    """What notebooks 01 to 07 claim, measured in a small model, by claim.

    Where so many tokens pass the threshold that passing it marks no spike, LC7 says so, and what asks for spike tokens
    does not apply.
    """
    life = find_lifecycle(trace_windows(model, tokens, seed, threshold))
    measured = measure_chain(model, tokens, life, seed)
    few = measured["LC7"]
    why = few if isinstance(few, NotApplicable) else None
    if why is None and (share := few.control["other_positions_share"]) > MOST_TOKENS:
        why = NotApplicable(f"{share:.0%} of tokens after the first pass {threshold:g} medians, so it marks no spike")
    if why is not None:
        measured |= {claim: why for claim in ASKED if claim not in WITHOUT_SPIKE}
    return {claim: measured[claim] for claim in ASKED}


def list_claims(measured: Evidences, verdict: str) -> list[str]:
    """The claims with a verdict, in a few words each."""
    judged = {claim: claims.judge(claim, evidence, "").verdict for claim, evidence in measured.items()}
    return [f"{RULES[claim].short} ({claim})" for claim in judged if judged[claim] == verdict]


def tabulate_claims(models: Mapping[str, Evidences]) -> pd.DataFrame:
    """Each rule, its verdict on each model, and the value that stands for the claim with what it is compared with."""
    rows = {}
    for claim in ASKED:
        rows[claim] = {"claim": RULES[claim].statement, "rule": RULES[claim].words}
        rows[claim] |= {name: _in_words(claim, measured[claim]) for name, measured in models.items()}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("id")


def _in_words(claim: str, evidence: Evidence | NotApplicable) -> str:
    if isinstance(evidence, NotApplicable):
        return f"n/a: {evidence.reason}"
    names = [name for name in (RULES[claim].headline, RULES[claim].beside) if name]
    values = ", ".join(f"{name} {brief(evidence.measured[name])}" for name in names)
    return f"{claims.verdict(claim, evidence.measured)} ({values.replace('_', ' ')})"
