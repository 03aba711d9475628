"""Perplexity is not behaviour: what cuts do near and far, to copying, to recall, and to what the model writes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.lifecycle import Lifecycle, find_spikes
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.texts import bos
from spikesink.patching.cuts import Broken, SpikeMeans, aim_cuts, choose_tokens, named
from spikesink.patching.interventions import patched
from spikesink.patching.outcome import CLEAN, Outcome, compare

MAIN = ("skipped", "masked", "masked_everywhere", "decoupled")
THINGS = ("key", "lamp", "coin", "letter", "spoon", "map", "ring", "knife", "bell")
PLACES = ("drawer", "garden", "pocket", "stable", "basket", "tower", "barn", "shop", "boat")


@dataclass(frozen=True)
class Behaviour:
    """What cuts do beyond perplexity; by the names in `CUTS`, the clean run first. Losses in nats a token.

    A kind of prompt in which no token spikes has the clean run only.
    """

    edges: tuple[int, ...]  # of the bins of positions: a bin is from one edge to before the next
    by_position: Mapping[str, Float[Tensor, " bin"]]
    first_copy: Mapping[str, float]  # of random tokens that come twice, without the first of each copy
    second_copy: Mapping[str, float]
    recall: Mapping[str, float]  # of the answer, asked for in the end
    no_answer: Mapping[str, float]  # of the same word where the prompt has not said so: the control
    same_greedy: Mapping[str, float]  # share of greedily written tokens that are the clean run's, place by place
    before_parting: Mapping[str, float]  # how many of them come before the first other one, mean over prompts
    written: Mapping[str, str]  # what follows the first prompt
    prompt: str


@measure
def measure_behaviour(
    model: TransformerBridge,
    life: Lifecycle,
    broken: Broken | NotApplicable,
    names: Sequence[str] = MAIN,
    n: int = 4,
    new_tokens: int = 24,
    seed: int = 0,
) -> Behaviour | NotApplicable:
    """Measure what cuts do near and far, to copying, to recall from the middle of a prompt, and to greedy generation.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it.
        broken: as `break_chain` returns it, for its constants, windows and losses.
        names: which of its cuts.
        n: how many prompts of each kind.
        new_tokens: how many tokens to generate.
        seed: of random tokens and places.
    """
    names = [name for name in names if name in broken.outcomes]
    edges = _edges(broken.clean.loss.shape[1])
    copies = _on(model, life, broken.means, repeated(model, broken.tokens, n, seed=seed), names, seed)
    half = copies[CLEAN].loss.shape[1] // 2 + 1  # the first prediction of the second copy's second token, or after
    prompts, at = recall_prompts(model, n, seed)
    answers = _on(model, life, broken.means, prompts, names, seed)
    written = greedy(model, broken, names, n, new_tokens)
    same = {name: tokens == written[CLEAN] for name, tokens in written.items()}
    return Behaviour(
        edges=edges,
        by_position={
            name: torch.stack([broken.outcomes[name].loss[:, a:b].mean() for a, b in pairwise(edges)])
            for name in (CLEAN, *names)
        },
        first_copy={name: float(of.loss[:, 1 : half - 1].mean()) for name, of in copies.items()},
        second_copy={name: float(of.loss[:, half:].mean()) for name, of in copies.items()},
        recall={name: _answer(of.loss[:n], at[:n]) for name, of in answers.items()},
        no_answer={name: _answer(of.loss[n:], at[n:]) for name, of in answers.items()},
        same_greedy={name: float(of.float().mean()) for name, of in same.items()},
        before_parting={name: float(of.long().cumprod(1).sum(1).float().mean()) for name, of in same.items()},
        written={name: model.tokenizer.decode(tokens[0]) for name, tokens in written.items()},
        prompt=model.tokenizer.decode(_prompts(broken, n)[0]),
    )


def _edges(n: int) -> tuple[int, ...]:
    """Bins of positions, each twice as wide as the one before; the very first prediction has one token to go by."""
    edges = [1]
    while (edge := 2 ** (len(edges) + 2)) < n:
        edges.append(edge)
    return (*edges, n)


def _on(
    model: TransformerBridge,
    life: Lifecycle,
    means: SpikeMeans,
    prompts: Int[Tensor, "n length"],
    names: Sequence[str],
    seed: int,
) -> dict[str, Outcome]:
    """Cuts on other prompts: their spike tokens are looked for, the constants are the same."""
    where = find_spikes(model, life, prompts)
    return compare(model, prompts, aim_cuts(means, choose_tokens(where, seed), names) if where.any() else {})


def _answer(loss: Float[Tensor, "prompt position"], at: Sequence[slice]) -> float:
    """Loss of the answer, mean over its tokens, mean over prompts."""
    return float(torch.stack([of[place].mean() for of, place in zip(loss, at, strict=True)]).mean())


def repeated(
    model: TransformerBridge, tokens: Int[Tensor, "window position"], n: int, length: int = 40, seed: int = 0
) -> Int[Tensor, "n twice"]:
    """Random tokens, out of those that occur in some windows, twice in a row; BOS first, where it is the habit.

    Only copying helps on the second copy: an induction head's work.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = tokens.unique()
    kinds = kinds[~torch.isin(kinds, torch.tensor(model.tokenizer.all_special_ids))]
    once = kinds[torch.randint(len(kinds), (n, length), generator=generator)]
    return torch.cat([_bos(model, n), once, once], dim=1)


def _bos(model: TransformerBridge, n: int) -> Int[Tensor, "n bos"]:
    return torch.tensor([bos(model)] * n, dtype=torch.long)


def recall_prompts(model: TransformerBridge, n: int, seed: int = 0) -> tuple[Int[Tensor, "prompt length"], list[slice]]:
    """Prompts that say where nine things are, and at last ask for one out of their middle.

    Returns:
        n prompts, and n in which the asked-for sentence has said another place, so that the answer is not told; and
        which predictions are those of the answer. What follows it fills the prompts up to one length.
    """
    generator = torch.Generator().manual_seed(seed)
    told, untold = [], []
    for _ in range(n):
        things = [THINGS[i] for i in torch.randperm(len(THINGS), generator=generator)]
        places = [PLACES[i] for i in torch.randperm(len(PLACES), generator=generator)]
        middle = int(torch.randint(len(things) // 3, 2 * len(things) // 3, (1,), generator=generator))
        for prompts, place in ((told, places[middle]), (untold, places[0])):
            said = [place if i == middle else other for i, other in enumerate(places)]
            lines = [f"The {thing} is in the {where}." for thing, where in zip(things, said, strict=True)]
            question = "\n".join([*lines, f"So, once more: the {things[middle]} is in the"])
            prompts.append(asked(model, question, places[middle]))
    length = max(len(whole) for whole, _ in told + untold)
    rows = [whole + whole[-1:] * (length - len(whole)) for whole, _ in told + untold]
    begin = _bos(model, 2 * n)
    before = begin.shape[1] - 1  # each predicts the token after it
    at = [slice(len(whole) - size + before, len(whole) + before) for whole, size in told + untold]
    return torch.cat([begin, torch.tensor(rows)], dim=1), at


def asked(model: TransformerBridge, question: str, answer: str) -> tuple[list[int], int]:
    """A question and its answer in tokens, without BOS, and how many of them, at the end, are the answer's."""
    alone, whole = (ids_of(model, text) for text in (question, f"{question} {answer}"))
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False)))
    return whole, len(whole) - common


def ids_of(model: TransformerBridge, text: str) -> list[int]:
    """A text's tokens, without BOS."""
    return model.tokenizer(text, add_special_tokens=False).input_ids


def _prompts(broken: Broken, n: int) -> Int[Tensor, "n position"]:
    return broken.tokens[:n, : max(2, broken.tokens.shape[1] // 2)]


@torch.inference_mode()
def greedy(
    model: TransformerBridge, broken: Broken, names: Sequence[str], n: int, new_tokens: int
) -> dict[str, Int[Tensor, "n new"]]:
    """What the model writes greedily after the first half of some windows, as it is and under each cut."""
    prompts = _prompts(broken, n)
    where = broken.targets.spike[:n, : prompts.shape[1]]
    cuts = aim_cuts(broken.means, choose_tokens(where, broken.targets.seed), names) if where.any() else {}
    written = {}
    for name, cut in progress({CLEAN: (), **cuts}.items(), "generating", "cut"):
        with patched(model, *cut):
            out = model.generate(
                prompts.to(model.cfg.device),
                max_new_tokens=new_tokens,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
            )
        written[name] = out[:, prompts.shape[1] :].cpu()
    return written


@measure
def behaviour_table(found: Behaviour | NotApplicable) -> pd.DataFrame | NotApplicable:
    """One row a cut: losses near and far, of copies and of recall, and what is left of greedy generation."""
    rows = []
    for name in found.by_position:
        losses = found.by_position[name]
        rows.append(
            {
                "cut": named(name),
                f"loss, positions {found.edges[0]} to {found.edges[1] - 1}": float(losses[0]),
                f"loss, positions {found.edges[-2]} on": float(losses[-1]),
                "first copy": found.first_copy.get(name, math.nan),
                "second copy": found.second_copy.get(name, math.nan),
                "recall": found.recall.get(name, math.nan),
                "not told (control)": found.no_answer.get(name, math.nan),
                "same greedy tokens": found.same_greedy.get(name, math.nan),
                "before parting": found.before_parting.get(name, math.nan),
            }
        )
    return pd.DataFrame(rows).set_index("cut")


def writing(found: Behaviour | NotApplicable) -> str:
    """What the model writes after the first prompt, as it is and under each cut, as Markdown."""
    if isinstance(found, NotApplicable):
        return f"*Not applicable here: {found.reason}.*"

    def quoted(text: str) -> str:
        return "`" + text.replace("`", "'").replace("\n", "\\n").replace("{", "(").replace("}", ")") + "`"

    lines = [f"- {named(name, 'as it is')}: {quoted(text)}" for name, text in found.written.items()]
    return "\n".join([f"After {quoted(found.prompt[-60:])} it writes:", "", *lines])
