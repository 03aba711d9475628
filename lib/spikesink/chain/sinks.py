"""Why the constant is a sink: who gets the attention, and what the keys and queries are like that make it so.

The *sink score* of a key position in a head is the attention that it gets, mean over the queries at or after it (Gu et
al., arXiv:2410.10781); a head *sinks* there when that exceeds epsilon. `score` needs attention patterns only; `look`
also reads queries, keys and values: a logit is |q| |k| cos(q, k) / sqrt(d_head), and what is constant about the spike
tokens' normalised input is constant about their keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.collapse import Collapse
from spikesink.chain.lifecycle import Lifecycle, is_spike, right_after
from spikesink.chain.trace import EPSILON, follow, median, received
from spikesink.common import NotApplicable, progress
from spikesink.model.anatomy import Anatomy, anatomy, check_length, check_not_padding, check_tokens, normalise

ALIGNED = 0.9  # a cosine with the primary direction that counts as pointing the same way


MOST_ROWS = 512  # of secondary sinks kept


@dataclass(frozen=True)
class Scores:
    """Sink scores, reduced while windows stream by; groups are the sets of key tokens that `score` was given."""

    anatomy: Anatomy
    epsilon: float
    length: int  # tokens of each window that were used
    position: int  # the key position that `at` is about
    at: Float[Tensor, "window layer head"]  # its score, window by window
    mean: Float[Tensor, "layer head key"]  # of every key position, over windows
    above: Float[Tensor, "layer head key"]  # share of windows in which it exceeds epsilon
    received: Mapping[str, Float[Tensor, "layer head"]]  # mean score of a group's tokens; not a number without one
    sinks: Mapping[str, Int[Tensor, " layer"]]  # (head, token) pairs above epsilon; keys of the first half alone
    sinks_anywhere: Mapping[str, Int[Tensor, " layer"]]  # the same of all keys, also those that few queries judge
    n_tokens: Mapping[str, int]  # a group's tokens in the first half
    n_tokens_anywhere: Mapping[str, int]

    def ratio(self, epsilon: float | None = None) -> float:
        """The sink ratio: share of layers, heads and windows in which the key position's score exceeds epsilon."""
        return float((self.at > (self.epsilon if epsilon is None else _checked(epsilon))).double().mean())


def group_tokens(life: Lifecycle) -> dict[str, Bool[Tensor, "window position"]]:
    """Sets of key tokens to score.

    The main cycle's spike tokens ("spike"), those of smaller cycles alone ("smaller"), the tokens that stand right
    after one or the other and are neither ("next", "next_smaller"), and all that are neither ("other").
    """
    none = torch.zeros(life.trace.tokens.shape, dtype=torch.bool)
    spike = is_spike(life, life.main) if life.main is not None else none
    smaller = none.clone()
    for cycle in life.cycles[1:]:
        smaller |= is_spike(life, cycle)
    smaller &= ~spike
    other = ~(spike | smaller)

    named = {"spike": spike, "smaller": smaller, "other": other}
    return named | {"next": right_after(spike) & other, "next_smaller": right_after(smaller) & other}


def score(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    epsilon: float = EPSILON,
    length: int | None = None,
    position: int = 0,
    groups: Mapping[str, Bool[Tensor, "n length"]] | None = None,
) -> Scores:
    """Measure how much attention each key position gets, in every head.

    One pass; a layer's attention is reduced as it streams by. In sliding-window layers only the queries that have a key
    in sight count. A late key is judged by few queries, near ones, so a group's sinks are counted in the first half.

    Args:
        model: as `load` returns it.
        tokens: windows, as `windows` returns them.
        epsilon: what a sink's score exceeds.
        length: the T of the definition: use the first so many tokens of each window; by default all.
        position: the key position whose score is kept window by window, for the sink ratio.
        groups: sets of key tokens to average over, such as `group_tokens(life)`.

    Raises:
        ValueError: epsilon is not between 0 and 1, `length` exceeds the windows or the model's context, there is no
            such key position, a token is not in the vocabulary, or a window holds nothing but padding.
        FloatingPointError: as `follow` does.
    """
    about = anatomy(model)
    length = _length(model, tokens, length)
    check_not_padding(model, tokens)
    if position not in range(length):
        raise ValueError(f"key position {position} is not in a window of {length} tokens; give 0 to {length - 1}.")
    if wrong := [
        name for name, mine in (groups or {}).items() if mine.shape != tokens.shape or mine.dtype != torch.bool
    ]:
        raise ValueError(
            f"the set {wrong[0]!r} of key tokens must have the shape of the windows, {list(tokens.shape)}, and hold "
            "truth values."
        )
    scores = _Scores(about, _checked(epsilon), length, position, groups or {})
    _over(model, about, tokens[:, :length], [scores], "scoring attention")
    return scores.result()


def _checked(epsilon: float) -> float:
    if not isinstance(epsilon, Real) or isinstance(epsilon, bool) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, both excluded, but is {epsilon}.")
    return epsilon


def _length(model: TransformerBridge, tokens: Int[Tensor, "n length"], length: int | None) -> int:
    check_tokens(model, tokens)
    if tokens.shape[1] < 2:
        raise ValueError("windows of one token have nobody to attend to; cut longer ones.")
    length = tokens.shape[1] if length is None else length
    if not isinstance(length, Integral) or isinstance(length, bool):
        raise ValueError(f"length must be a whole number of tokens, but is {length!r}.")
    check_length(model, length)
    if not 2 <= length <= tokens.shape[1]:
        raise ValueError(
            f"scores over {length} tokens cannot be had of windows of {tokens.shape[1]}; give 2 to {tokens.shape[1]}, "
            "or cut longer windows."
        )
    return length


class _Reducer:
    """Something that reduces a window while it streams by; what it does not override is not asked for."""

    def hooks(self) -> Sequence[tuple[str, Callable[[Tensor], None]]]:
        return ()

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None: ...

    def on_stream(self, point: int, h: Float[Tensor, "token d_model"]) -> None: ...

    def on_scores(self, layer: int, scores: Float[Tensor, "head key"]) -> None: ...

    def end(self) -> None: ...


def _over(
    model: TransformerBridge,
    about: Anatomy,
    tokens: Int[Tensor, "n length"],
    reducers: Sequence[_Reducer],
    label: str,
) -> None:
    """Run every window once, through all reducers."""

    def all_of(name: str) -> Callable | None:
        calls = [getattr(r, name) for r in reducers if getattr(type(r), name) is not getattr(_Reducer, name)]
        return (lambda *values: [call(*values) for call in calls]) if calls else None

    on_scores = all_of("on_scores")

    def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        if on_scores is not None:
            on_scores(layer, received(pattern, about.sight[layer]).cpu())

    for index, window in enumerate(progress(tokens, label, "window")):
        for reducer in reducers:
            reducer.begin(index, window)
        also = [hook for reducer in reducers for hook in reducer.hooks()]
        follow(model, window, all_of("on_stream"), None, on_pattern, also)
        for reducer in reducers:
            reducer.end()


class _Scores(_Reducer):
    """The sums of `score`."""

    def __init__(
        self, about: Anatomy, epsilon: float, length: int, position: int, of: Mapping[str, Bool[Tensor, "n length"]]
    ):
        self.about, self.epsilon, self.length, self.position = about, epsilon, length, position
        self.groups = {name: tokens[:, :length] for name, tokens in of.items()}
        heads = (about.n_layers, about.n_heads)
        self.at: list[Tensor] = []
        self.mean, self.above = torch.zeros(2, *heads, length)
        self.received = {name: torch.zeros(heads) for name in of}
        self.sinks, self.anywhere = (
            {name: torch.zeros(about.n_layers, dtype=torch.long) for name in of} for _ in range(2)
        )

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        self.index = index
        self.at.append(torch.zeros(self.about.n_layers, self.about.n_heads))

    def on_scores(self, layer: int, scores: Float[Tensor, "head key"]) -> None:
        above = scores > self.epsilon
        self.at[-1][layer] = scores[:, self.position]
        self.mean[layer] += scores
        self.above[layer] += above
        for name, tokens in self.groups.items():
            mine = tokens[self.index]
            self.received[name][layer] += scores[:, mine].sum(-1)
            self.sinks[name][layer] += above[:, : self.length // 2][:, mine[: self.length // 2]].sum()
            self.anywhere[name][layer] += above[:, mine].sum()

    def result(self) -> Scores:
        n = len(self.at)
        return Scores(
            anatomy=self.about,
            epsilon=self.epsilon,
            length=self.length,
            position=self.position,
            at=torch.stack(self.at),
            mean=self.mean / n,
            above=self.above / n,
            received={name: total / self.groups[name].sum() for name, total in self.received.items()},
            sinks=self.sinks,
            sinks_anywhere=self.anywhere,
            n_tokens={name: int(tokens[:, : self.length // 2].sum()) for name, tokens in self.groups.items()},
            n_tokens_anywhere={name: int(tokens.sum()) for name, tokens in self.groups.items()},
        )


@dataclass(frozen=True)
class Secondary:
    """Tokens that are sinks in some layer and no spike tokens of the main cycle (arXiv:2512.22213), of the first half.

    Cosines are between h~ and the primary direction, the mean h~ of the main cycle's spike tokens over its plateau.
    """

    n: int  # found, also those beyond the rows
    window: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    heads: Float[Tensor, "row layer"]  # share of heads that sink on it
    cosine: Float[Tensor, "row point"]
    cosine_other: Float[Tensor, " point"]  # mean over all other tokens
    cosine_after: Float[Tensor, "row point"]  # of the token right after it
    n_aligned: int  # other tokens of the first half that point the same way at some layer, and are sinks nowhere

    def lasting(self) -> Int[Tensor, " row"]:
        """In how many layers each is a sink."""
        return (self.heads > 0).sum(1)


class _Secondary(_Reducer):
    """The rows of `Secondary`."""

    def __init__(self, about: Anatomy, epsilon: float, spike: Bool[Tensor, "window position"], found: Collapse):
        self.about, self.epsilon, self.spike = about, epsilon, spike
        self.direction = functional.normalize(found.constant, dim=-1)
        self.n, self.n_aligned, self.rows = 0, 0, []
        self.other, self.n_other = torch.zeros(about.n_blocks + 1), 0

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        self.index, self.window = index, window.cpu()
        self.heads = torch.zeros(self.about.n_layers, len(window))
        self.cosine = torch.zeros(self.about.n_blocks + 1, len(window))

    def on_stream(self, point: int, h: Float[Tensor, "token d_model"]) -> None:
        unit = functional.normalize(normalise(h, self.about), dim=-1)
        self.cosine[point] = (unit @ self.direction.to(h.device)).cpu()

    def on_scores(self, layer: int, scores: Float[Tensor, "head key"]) -> None:
        self.heads[layer] = (scores > self.epsilon).float().mean(0)

    def end(self) -> None:
        half = len(self.window) // 2
        sinks = self.heads.any(0) & ~self.spike[self.index]
        sinks[half:] = False
        others = ~sinks & ~self.spike[self.index]
        aligned = others & (self.cosine[:-1:2] >= ALIGNED).any(0)
        self.n += int(sinks.sum())
        self.n_aligned += int(aligned[:half].sum())
        self.n_other += int(others.sum())
        self.other += self.cosine[:, others].sum(-1)
        for position in sinks.nonzero()[: MOST_ROWS - len(self.rows), 0].tolist():
            after = position + 1
            self.rows.append(
                (
                    torch.tensor([self.index, position, int(self.window[position])]),
                    self.heads[:, position],
                    self.cosine[:, position],
                    self.cosine[:, after],
                )
            )

    def result(self) -> Secondary | NotApplicable:
        if not self.rows:
            return NotApplicable("no token but the spike tokens is a sink anywhere")
        where, heads, cosine, after = (torch.stack(column) for column in zip(*self.rows, strict=True))
        return Secondary(self.n, *where.T, heads, cosine, self.other / self.n_other, after, self.n_aligned)


def _median(values: Tensor) -> float:
    """Median over the layers and heads in which there is something to measure."""
    return median(values[values.isfinite()].double())
