"""Long contexts: sink, spike and perplexity by length, to a model's limit and past it; and recall by depth."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.trace import EPSILON
from spikesink.common import NotApplicable, progress
from spikesink.model import texts
from spikesink.model.anatomy import anatomy, body_of
from spikesink.patching import Outcome, compare
from spikesink.patching.behaviour import PLACES, THINGS, asked, ids_of
from spikesink.patching.outcome import CLEAN, student_interval
from spikesink.serving.cache import (
    EVERY,
    HEAVY,
    WINDOW,
    WITH_FIRST,
    Bounded,
    Policy,
    cannot,
    first,
    forget,
    heaviest,
    losses_of,
)

CHUNK = 128
BLOCK = 64  # predictions that are drawn together where an interval is made: neighbours are no independent draws
LONG_BLOCK = 512  # the same of a whole text: pieces of 64 are still like their neighbours
OTHER = 1  # the position that what position 0 gets is compared with
MOST = 1.6e10  # entries of attention: a minute or so on two cores
PAST = 1.25  # times a model's limit
DEPTHS = (0.05, 0.35, 0.65, 0.95)


def interval_of(loss: Float[Tensor, "window position"], block: int = BLOCK) -> tuple[float, float]:
    """Student's 95% interval of exp of a mean loss, over pieces of so many predictions; none of one piece."""
    return student_interval(torch.cat([piece.mean(1) for piece in loss.split(block, 1)]).double().numpy())


@dataclass(frozen=True)
class Lengths:
    """What a text's first tokens do for later ones, bin by bin: from one length to before the next."""

    lengths: tuple[int, ...]  # the end of each bin; the first one begins at 0
    limit: int  # the model's context
    epsilon: float
    score: Float[Tensor, "bin window layer head"]  # attention that position 0 gets of all queries up to this length
    late: Float[Tensor, "bin layer head"]  # of the queries of this bin alone, mean over windows
    other: Float[Tensor, "bin layer head"]  # the same, of what the token at position OTHER gets
    loss: Float[Tensor, "window position"]  # cross-entropy of the next token, nats
    largest: Float[Tensor, "window position"]  # max |h| over channels, as the stream enters layers and leaves the last
    sight: tuple[int | None, ...]  # of each layer: how far back a query sees, itself included; None: to position 0
    seconds: float

    @property
    def sink_ratios(self) -> list[float]:
        """Share of windows, layers and heads whose score at each length exceeds epsilon."""
        return (self.score > self.epsilon).float().mean((1, 2, 3)).tolist()

    @property
    def throughout(self) -> list[int]:
        """The layers in which every query has position 0 in sight."""
        return [layer for layer, sight in enumerate(self.sight) if sight is None or sight >= self.lengths[-1]]

    def late_ratios(
        self, of: Float[Tensor, "bin layer head"] | None = None, epsilon: float | None = None
    ) -> list[float]:
        """Share of heads, in the layers of `throughout`, that give position 0 more than epsilon of each bin's queries'
        attention; or, of `other`, another position.
        """
        most = self.epsilon if epsilon is None else epsilon
        return ((self.late if of is None else of)[:, self.throughout] > most).float().mean((1, 2)).tolist()

    def _bins(self, of: Float[Tensor, "window position"]) -> list[Float[Tensor, "window part"]]:
        starts = (0, *self.lengths[:-1])
        return [of[:, start:end] for start, end in zip(starts, self.lengths, strict=True)]

    @property
    def perplexities(self) -> list[float]:
        """exp of the mean loss of each bin's predictions."""
        return [float(of.mean().exp()) for of in self._bins(self.loss)]

    def intervals(self) -> list[tuple[float, float]]:
        """An interval of each bin's perplexity, as `interval_of` makes it."""
        return [interval_of(of) for of in self._bins(self.loss)]

    @property
    def first(self) -> float:
        """The largest entry of the stream at position 0, median over windows; it does not depend on the length."""
        return float(self.largest[:, 0].median())

    @property
    def elsewhere(self) -> list[float]:
        """The largest entry of the stream in each bin, position 0 left out."""
        return [float((of[:, 1:] if i == 0 else of).max()) for i, of in enumerate(self._bins(self.largest))]


def reach(
    model: TransformerBridge, source: str | texts.Text = "house", most: float = MOST
) -> tuple[Int[Tensor, "1 position"], tuple[int, ...]]:
    """The beginning of a text, to a quarter past a model's limit if the text and `most` allow, and lengths to stop at.

    Args:
        model: as `load` returns it.
        source: a text, as `texts.windows` takes it.
        most: entries of attention, over all layers and heads, that may be computed.

    Raises:
        TextError: as `texts.windows` does.
    """
    about = anatomy(model)
    ids = torch.cat([torch.tensor(texts.bos(model), dtype=torch.long), texts.all_ids(model, source)])
    rotates = any("Rotary" in type(module).__name__ for module in body_of(model).modules())  # else positions run out
    limit = about.context * (PAST if rotates else 1)
    longest = int(min(len(ids), limit, (2 * most / (about.n_layers * about.n_heads)) ** 0.5))
    within = min(longest, about.context)
    lengths = [2**power for power in range(8, within.bit_length()) if 2**power <= within]
    if within > 1.2 * max(lengths, default=1):
        lengths.append(within)
    if longest > within:
        lengths.append(longest)
    return ids[None, : lengths[-1]], tuple(lengths)


@torch.inference_mode()
def lengthen(
    model: TransformerBridge,
    tokens: Int[Tensor, "window position"],
    lengths: Sequence[int],
    chunk: int = CHUNK,
    epsilon: float = EPSILON,
) -> Lengths:
    """Run long windows once, and measure at each length; every key stays in the cache.

    Args:
        model: as `load` returns it.
        tokens: windows as long as the last of `lengths`.
        lengths: where bins end, rising.
        chunk: how many tokens run side by side.
        epsilon: what a sink's score exceeds.

    Raises:
        ValueError: lengths that do not rise, or more than there are tokens.
    """
    lengths = tuple(lengths)
    if list(lengths) != sorted(set(lengths)) or not lengths or lengths[0] < 2 or lengths[-1] > tokens.shape[1]:
        raise ValueError(f"lengths must rise from at least 2 to the windows' {tokens.shape[1]}, but are {lengths}.")
    begun, about, tokens = time.perf_counter(), anatomy(model), tokens[:, : lengths[-1]]
    ends = torch.tensor(lengths)
    places = [0, min(OTHER, lengths[0] - 1)]
    # Attention to either place, summed over queries.
    got = torch.zeros(len(lengths), len(tokens), about.n_layers, about.n_heads, len(places))
    queries = torch.zeros(len(lengths), about.n_layers)  # that have position 0 in sight
    sizes: list[Float[Tensor, "window part"]] = []
    losses, bounded, now = [], Bounded(model, Policy()), {}

    def on_pattern(value, hook):
        layer = about.pattern_hooks.index(hook.name)
        at = bounded.done + torch.arange(value.shape[2])
        if (sight := about.sight[layer]) is not None:
            at = at[at < sight]
        to_places = value[:, :, : len(at), places].float().cpu()  # window, head, query, place
        where = torch.bucketize(at, ends, right=True)
        got[:, :, layer].index_add_(0, where, to_places.movedim(2, 0))
        queries[:, layer] += where.bincount(minlength=len(ends))

    def on_layer(value, hook):
        now[hook.name] = value.abs().amax(-1).float().cpu()

    watch = [(name, on_pattern) for name in about.pattern_hooks] + [(name, on_layer) for name in about.layer_hooks]
    for start in progress(range(0, lengths[-1], chunk), "long context", "chunk"):
        with model.hooks(fwd_hooks=watch):
            logits = bounded(tokens[:, start : start + chunk])
        sizes.append(torch.stack(list(now.values())).amax(0))
        losses.append(losses_of(logits, tokens[:, start + 1 : start + chunk + 1]))
    late, other = (got / queries[:, None, :, None, None].clamp(min=1)).mean(1).unbind(-1)
    return Lengths(
        lengths,
        about.context,
        epsilon,
        got[..., 0].cumsum(0) / queries.cumsum(0)[:, None, :, None].clamp(min=1),
        late,
        other,
        torch.cat(losses, 1),
        torch.cat(sizes, 1),
        about.sight,
        time.perf_counter() - begun,
    )


@dataclass(frozen=True)
class Needles:
    """Prompts that say once where a thing is, at some depth of another text, and ask for it in the end."""

    tokens: Int[Tensor, "prompt length"]
    answer: tuple[slice, ...]  # which predictions are the answer's, by prompt
    depth: tuple[float, ...]  # how deep it is told; of a control, where another place is told
    told: tuple[bool, ...]

    def recalled(self, outcome: Outcome) -> dict[float, float]:
        """How many nats likelier each token of the answer is where it was told than where another was, by depth."""
        loss = [float(of[where].mean()) for of, where in zip(outcome.loss, self.answer, strict=True)]
        found = {}
        for depth in dict.fromkeys(self.depth):
            of = {
                told: [x for x, d, t in zip(loss, self.depth, self.told, strict=True) if d == depth and t == told]
                for told in (True, False)
            }
            found[depth] = sum(of[False]) / len(of[False]) - sum(of[True]) / len(of[True])
        return found


@dataclass(frozen=True)
class Recall:
    """What caches keep of a fact, and of the text around it; by their names, the model with every token first."""

    gained: Mapping[str, Mapping[float, float]]  # nats a token of the answer, by depth
    perplexity: Mapping[str, float]


def recall(
    model: TransformerBridge,
    filler: Int[Tensor, " token"],
    length: int,
    budget: int,
    n: int = 2,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> Recall | NotApplicable:
    """Ask for a fact under caches that hold so many keys: the last ones, with the first four, with heavy hitters.

    Takes what `needles` does; where that raises, it is the reason why there is none.
    """
    if (reason := cannot(anatomy(model))) is not None:
        return NotApplicable(reason)
    try:
        found = needles(model, filler, length, n, depths, seed)
    except ValueError as reason:
        return NotApplicable(str(reason).rstrip("."))
    policies = {WINDOW: Policy(budget), WITH_FIRST: first(4, budget), HEAVY: heaviest(budget)}
    outcomes = compare(model, found.tokens, {name: forget(model, policy) for name, policy in policies.items()})
    outcomes = {EVERY: outcomes.pop(CLEAN), **outcomes}
    return Recall(
        {name: found.recalled(outcome) for name, outcome in outcomes.items()},
        {name: outcome.perplexity for name, outcome in outcomes.items()},
    )


def needles(
    model: TransformerBridge,
    filler: Int[Tensor, " token"],
    length: int,
    n: int = 2,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> Needles:
    """Hide a sentence at several depths of a text, and ask for it in the end; beside each, one that says another place.

    Args:
        model: as `load` returns it.
        filler: the text, in tokens without BOS.
        length: of the prompts, in tokens.
        n: how many things are hidden, each at all depths.
        depths: shares of the text that come before.
        seed: of things and places.

    Raises:
        ValueError: the text is too short, or the prompts are.
    """
    generator = torch.Generator().manual_seed(seed)
    things = [THINGS[i] for i in torch.randperm(len(THINGS), generator=generator)[:n]]
    places = [PLACES[i] for i in torch.randperm(len(PLACES), generator=generator)]
    begin = texts.bos(model)
    rows, answer, of = [], [], []
    for i, thing in enumerate(things):
        place, other = places[i], places[-1 - i]
        whole, size = asked(model, f"\nSo, once more: the {thing} is in the", place)
        for depth in depths:
            for told, where in ((True, place), (False, other)):
                said = ids_of(model, f"\nThe {thing} is in the {where}.\n")
                room = length - len(begin) - len(said) - len(whole)
                if room < 1 or room > len(filler):
                    raise ValueError(
                        f"prompts of {length} tokens need {max(room, 1)} of text, and there are {len(filler)}; "
                        "give another length or a longer text."
                    )
                text, before = filler[:room].tolist(), round(depth * room)
                rows.append([*begin, *text[:before], *said, *text[before:], *whole])
                answer.append(slice(length - size - 1, length - 1))
                of.append((depth, told))
    return Needles(torch.tensor(rows), tuple(answer), *(tuple(column) for column in zip(*of, strict=True)))
