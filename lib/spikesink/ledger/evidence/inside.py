"""The claims about finished models, put to one of our own: the same functions, the same rules."""

from collections.abc import Iterable, Mapping

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikesink.chain import amplifier, collapse, keys, lifecycle, sinks
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable, brief
from spikesink.lab.data import Backcopy, held_out
from spikesink.lab.measures import WINDOWS, backcopy_truth
from spikesink.lab.model import Decoder
from spikesink.ledger import claims, evidence
from spikesink.ledger.claims import Evidence
from spikesink.ledger.rules import RULES
from spikesink.model.weights import weights_of

THRESHOLD = 20.0  # medians that a spike exceeds here; of a model this small and young none reaches the usual 100


MOST_TOKENS = 0.05  # of those after the first can be spike tokens; LC7 says it of all, however short windows are


WITHOUT_SPIKE = ("LC7", "SK1")  # what is asked whether there is a spike or not


GATE = "blocks.{}.attn.gate.hook_gate"


def chain(
    model: Decoder, tokens: Int[Tensor, "n length"], threshold: float = THRESHOLD, seed: int = 0
) -> dict[str, Evidence | NotApplicable]:
    """Measure what notebooks 01 to 07 claim of a spike's life, the block that writes it, h~, and the sink.

    Args:
        model: a model of our own, or any other.
        tokens: windows.
        threshold: as `trace_windows` takes it.
        seed: of what serves as controls.

    Returns:
        Evidence by claim id, in the order of the chain. Where so many tokens pass the threshold that passing it marks
        no spike, LC7 says so, and what asks for spike tokens does not apply.
    """
    weights = weights_of(model)
    life = lifecycle.find_lifecycle(trace_windows(model, tokens, seed, threshold))
    reading, census = amplifier.read_block(model, tokens, life), amplifier.census(weights)
    found = collapse.measure_collapse(model, tokens, life, seed)
    seen = keys.read_attention(model, tokens, life, found, seed=seed)
    chain = {
        "LC1": evidence.lc1_step_up(life),
        "LC3": evidence.lc3_step_down(life),
        "LC4": evidence.lc4_few_channels(life),
        "LC7": evidence.lc7_few_tokens(life, model.tokenizer.decode),
        "AM2": evidence.am2_high_gain(reading, life, census),
        "AM3": evidence.am3_rank_one(reading),
        "AM5": evidence.am5_quadratic_form(reading),
        "AM6": evidence.am6_alignment(reading),
        "NM3": evidence.nm3_constant(found),
        "NM4": evidence.nm4_constant_over_depth(found),
        "SK1": evidence.sk1_many_heads(seen.scores),
        "SK2": evidence.sk2_on_spikes(seen, life),
        "SK3": evidence.sk3_few_dimensions(seen, life),
        "SK5": evidence.sk5_over_depth(seen, life),
        "SK7": evidence.sk7_small_values(seen, life),
    }
    if (reason := _no_mark(chain["LC7"], threshold)) is not None:
        return {key: said if key in WITHOUT_SPIKE else NotApplicable(reason) for key, said in chain.items()}
    return chain


def _no_mark(few: Evidence | NotApplicable, threshold: float) -> str | None:
    """Why a threshold marks no spike, of LC7; None where it does."""
    if isinstance(few, NotApplicable):
        return few.reason
    share = few.control["other_positions_share"]
    passing = f"{share:.0%} of tokens after the first pass {threshold:g} medians, so it marks no spike"
    return passing if share > MOST_TOKENS else None


def with_verdict(chain: Mapping[str, Evidence | NotApplicable], wanted: str) -> list[str]:
    """The claims of a chain that a verdict is given to, in a few words each."""
    return [
        f"{RULES[claim_id].short} ({claim_id})"
        for claim_id, said in chain.items()
        if claims.judge(claim_id, said, "").verdict == wanted
    ]


def table(chains: Mapping[str, Mapping[str, Evidence | NotApplicable]]) -> pd.DataFrame:
    """Each rule, what it says of each model, and the value that stands for the claim with what it is compared with.

    A reason why claims do not apply is told once.
    """
    rows = {}
    for name, found in chains.items():
        before = claims.first_with_same_text(
            {key: no.reason for key, no in found.items() if isinstance(no, NotApplicable)}
        )
        for claim_id, of in found.items():
            row = rows.setdefault(claim_id, {"claim": RULES[claim_id].statement, "rule": RULES[claim_id].words})
            if isinstance(of, NotApplicable):
                row[name] = f"n/a: {f'as {before[claim_id]}' if claim_id in before else of.reason}"
            else:
                row[name] = _words(claim_id, of)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("id")


@torch.inference_mode()
def gates(models: Mapping[str, Decoder], tokens: Int[Tensor, "n length"]) -> pd.DataFrame:
    """By layer, what each head gives position 0 of its attention, and what its gate lets through: the median over all
    tokens but the first, with the 5% and the 95% quantile. A gate of many channels counts as their mean.

    Args:
        models: by name, of as many layers each.
        tokens: windows.
    """
    columns = {}
    for name, model in models.items():
        scores = sinks.score(model, tokens).at.mean(0)  # layer, head
        columns[f"{name}: attention"] = [", ".join(f"{at:.2f}" for at in layer) for layer in scores.tolist()]
        if opened := _opened(model, tokens):
            columns[f"{name}: gate"] = [", ".join(_ends(gate[:, 1:].flatten(0, 1))) for gate in opened]
    return pd.DataFrame(columns).rename_axis("layer")


@torch.inference_mode()
def when_idle(models: Mapping[str, Decoder], task: Backcopy) -> pd.DataFrame:
    """By layer of models of Bigram-Backcopy, what each head gives position 0, and what its gate lets through (medians):
    of queries that have nothing to copy, and in brackets of triggers.

    Args:
        models: by name, of as many layers each.
        task: what they were trained on.
    """
    columns = {}
    for name, model in models.items():
        found = backcopy_truth(model, task)["heads"]  # layer, head, [triggers, others]
        columns[f"{name}: attention"] = [_both((other, trigger) for trigger, other in layer) for layer in found]
        tokens = held_out(task, WINDOWS, bos=model.config.bos)
        trigger = torch.from_numpy(task.is_trigger(tokens.numpy()))[:, 2:]
        if opened := _opened(model, tokens):
            medians = [[gate[:, 2:][at].median(0).values.tolist() for at in (~trigger, trigger)] for gate in opened]
            columns[f"{name}: gate"] = [_both(zip(*layer, strict=True)) for layer in medians]
    return pd.DataFrame(columns).rename_axis("layer")


def _both(pairs: Iterable[tuple[float, float]]) -> str:
    return ", ".join("{:.2f} ({:.2f})".format(*pair) for pair in pairs)


def _opened(model: Decoder, tokens: Int[Tensor, "n length"]) -> list[Float[Tensor, "n length head"]]:
    """What the gates of each layer let through, the mean over a head's channels; nothing of a model without gates."""
    hooks = [GATE.format(layer) for layer in range(model.anatomy.n_layers)]
    _, seen = model.run_with_cache(tokens.to(model.cfg.device), names_filter=hooks)
    # A static gate is the same for all tokens, and one per token for all heads.
    return [seen[hook].mean(-1).expand(*tokens.shape, -1).cpu() for hook in hooks if hook in seen]


def _ends(gate: Float[Tensor, "token head"]) -> list[str]:
    ends = gate.quantile(torch.tensor([0.5, 0.05, 0.95]), dim=0)
    return ["{:.2f} ({:.2f} to {:.2f})".format(*of) for of in ends.T.tolist()]


def _words(claim_id: str, evidence: Evidence) -> str:
    rule = RULES[claim_id]
    values = [f"{name} {brief(evidence.measured[name])}" for name in (rule.headline, rule.beside) if name]
    return f"{claims.verdict(claim_id, evidence.measured)} ({', '.join(values).replace('_', ' ')})"
