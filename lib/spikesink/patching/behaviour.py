"""Perplexity is not behaviour: what cuts do near and far, to copying, to recall, and to what the model writes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikesink.chain.lifecycle import Lifecycle, find_spikes
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Model
from spikesink.model.texts import bos
from spikesink.patching.cuts import Broken, aim_cuts, choose_tokens, named
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
    written: Mapping[str, str]  # what follows the first prompt
    prompt: str


@measure
def measure_behaviour(
    model: Model,
    life: Lifecycle,
    broken: Broken,
    names: Sequence[str] = MAIN,
    n: int = 4,
    new_tokens: int = 24,
    seed: int = 0,
) -> Behaviour:
    """Measure what cuts do near and far, to copying, to recall from the middle of a prompt, and to greedy generation.

    `broken` gives means, windows and losses, `names` which of its cuts; there are `n` prompts of each kind.
    """
    names = [name for name in names if name in broken.outcomes]
    last = broken.clean.loss.shape[1]
    # Each bin is twice as wide as the one before; the very first prediction has one token to go by.
    edges = (1, *(2**i for i in range(3, last.bit_length()) if 2**i < last), last)
    copies = compare_on(model, repeated(model, broken.tokens, n, seed=seed), life, broken, names, seed)
    half = copies[CLEAN].loss.shape[1] // 2 + 1  # the first prediction of the second copy's second token, or after
    prompts, at = recall_prompts(model, n, seed)
    answers = compare_on(model, prompts, life, broken, names, seed)
    starts = broken.tokens[:n, : max(2, broken.tokens.shape[1] // 2)]
    written = write_greedily(model, starts, broken, names, new_tokens)
    return Behaviour(
        edges=edges,
        by_position={
            name: torch.stack([broken.outcomes[name].loss[:, a:b].mean() for a, b in pairwise(edges)])
            for name in (CLEAN, *names)
        },
        first_copy={name: float(outcome.loss[:, 1 : half - 1].mean()) for name, outcome in copies.items()},
        second_copy={name: float(outcome.loss[:, half:].mean()) for name, outcome in copies.items()},
        recall={name: _loss_at(outcome.loss[:n], at[:n]) for name, outcome in answers.items()},
        no_answer={name: _loss_at(outcome.loss[n:], at[n:]) for name, outcome in answers.items()},
        same_greedy={name: float((tokens == written[CLEAN]).float().mean()) for name, tokens in written.items()},
        written={name: model.tokenizer.decode(tokens[0]) for name, tokens in written.items()},
        prompt=model.tokenizer.decode(starts[0]),
    )


def compare_on(
    model: Model, prompts: Int[Tensor, "n length"], life: Lifecycle, broken: Broken, names: Sequence[str], seed: int
) -> dict[str, Outcome]:
    """Cuts on other prompts: their spike tokens are looked for, the means are the same."""
    targets = choose_tokens(find_spikes(model, prompts, life), seed)
    return compare(model, prompts, aim_cuts(broken.means, targets, names))


def _loss_at(loss: Float[Tensor, "prompt position"], at: Sequence[slice]) -> float:
    """Loss of the answer, mean over its tokens, mean over prompts."""
    return float(torch.stack([of_prompt[place].mean() for of_prompt, place in zip(loss, at, strict=True)]).mean())


def repeated(
    model: Model, tokens: Int[Tensor, "window position"], n: int, length: int = 40, seed: int = 0
) -> Int[Tensor, "n twice"]:
    """Random tokens, out of those that occur in some windows, twice in a row; BOS first, where it is the habit.

    Only copying helps on the second copy: an induction head's work.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = tokens.unique()
    kinds = kinds[~torch.isin(kinds, torch.tensor(model.tokenizer.all_special_ids))]
    once = kinds[torch.randint(len(kinds), (n, length), generator=generator)]
    return torch.cat([_bos(model, n), once, once], dim=1)


def _bos(model: Model, n: int) -> Int[Tensor, "n bos"]:
    return torch.tensor([bos(model)] * n, dtype=torch.long)


def recall_prompts(model: Model, n: int, seed: int = 0) -> tuple[Int[Tensor, "prompt length"], list[slice]]:
    """Prompts that say where nine things are, and at last ask for one out of their middle.

    First n that tell, then n in which the asked-for sentence says another place; and which predictions are the
    answer's. What follows it fills the prompts up to one length.
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


def asked(model: Model, question: str, answer: str) -> tuple[list[int], int]:
    """A question and its answer in tokens, without BOS, and how many of them, at the end, are the answer's."""
    alone, whole = (ids_of(model, text) for text in (question, f"{question} {answer}"))
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(alone, whole, strict=False)))
    return whole, len(whole) - common


def ids_of(model: Model, text: str) -> list[int]:
    """A text's tokens, without BOS."""
    return model.tokenizer(text, add_special_tokens=False).input_ids


@torch.inference_mode()
def write_greedily(
    model: Model, prompts: Int[Tensor, "n position"], broken: Broken, names: Sequence[str], n: int
) -> dict[str, Int[Tensor, "n new"]]:
    """What the model writes greedily after the first part of some windows, as it is and under each cut."""
    targets = choose_tokens(broken.targets.spike[: len(prompts), : prompts.shape[1]], broken.targets.seed)
    cuts = {CLEAN: (), **aim_cuts(broken.means, targets, names)}
    options = {"do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    written = {}
    for name, cut in progress(cuts.items(), "generating", "cut"):
        with patched(model, *cut):
            out = model.generate(prompts.to(model.cfg.device), max_new_tokens=n, **options)
        written[name] = out[:, prompts.shape[1] :].cpu()
    return written


def quote_writing(behaviour: Behaviour | NotApplicable) -> str:
    """What the model writes after the first prompt, as it is and under each cut, as Markdown."""
    if isinstance(behaviour, NotApplicable):
        return f"*Not applicable here: {behaviour.reason}.*"

    def quoted(text: str) -> str:
        return "`" + text.replace("`", "'").replace("\n", "\\n").replace("{", "(").replace("}", ")") + "`"

    lines = [f"- {named(name, 'as it is')}: {quoted(text)}" for name, text in behaviour.written.items()]
    return "\n".join([f"After {quoted(behaviour.prompt[-60:])} it writes:", "", *lines])
