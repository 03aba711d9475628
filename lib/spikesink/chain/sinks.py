"""Who is a sink: which tokens get the attention, in which heads.

The *sink score* of key position k in a head is the attention that it gets, mean over the queries at or after it
(Gu et al., arXiv:2410.10781; `trace.received`):

    alpha_k = 1 / (T - k) sum_{i >= k} A_ik

The head *sinks* on k where alpha_k > epsilon; EPSILON = 0.3 is theirs, and T = 64. The *sink ratio* is the share of
heads, over layers, heads and windows, that sink on position 0: the mean of 1[alpha_0 > epsilon] (`Scores.ratio`).
In sliding-window layers only queries that have the key in sight count; layers without attention are left out, and not
a number where a table has a place for them. `score` needs attention patterns alone; why a
token is a sink is told by `keys`.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from spikesink.chain.collapse import Collapse
from spikesink.chain.lifecycle import Lifecycle, is_spike, right_after
from spikesink.chain.trace import EPSILON, Mean, Reducer, median, reduce_windows
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy, Model, anatomy, check_length, check_not_padding, check_tokens, normalise
from spikesink.model.proof import require

ALIGNED = 0.9  # a cosine with the primary direction that counts as pointing the same way
MOST_ROWS = 512  # of secondary sinks kept


Groups = Mapping[str, Bool[Tensor, "n length"]]  # sets of key tokens, by name


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
        at = self.at[:, list(self.anatomy.attention_layers)]
        return float((at > (self.epsilon if epsilon is None else check_epsilon(epsilon))).double().mean())


@measure
def score(
    model: Model,
    tokens: Int[Tensor, "n length"],
    epsilon: float = EPSILON,
    length: int | None = None,
    position: int = 0,
    groups: Groups | None = None,
) -> Scores:
    """Measure how much attention each key position gets, in every head, in one pass.

    `length` is the T of the definition: the first so many tokens of each window are used, by default all. The score of
    `position` is kept window by window, for the sink ratio. `groups` are sets of key tokens to average over, such as
    `group_tokens(life)`. A late key is judged by few queries, near ones, so their sinks are counted in the first half.
    """
    require(model, "patterns")
    groups = groups or {}
    length = _checked_length(model, tokens, length)
    check_not_padding(model, tokens)
    if position not in range(length):
        raise ValueError(f"key position {position} is not in a window of {length} tokens; give 0 to {length - 1}.")
    if wrong := [name for name, mine in groups.items() if mine.shape != tokens.shape or mine.dtype != torch.bool]:
        raise ValueError(
            f"the set {wrong[0]!r} of key tokens must have the shape of the windows, {list(tokens.shape)}, and hold "
            "truth values."
        )
    scores = ScoreReducer(anatomy(model), check_epsilon(epsilon), length, position, groups)
    reduce_windows(model, tokens[:, :length], [scores], "scoring attention")
    return scores.result()


def check_epsilon(epsilon: float) -> float:
    """Epsilon as it is; raise ValueError unless it lies between 0 and 1."""
    if not isinstance(epsilon, Real) or isinstance(epsilon, bool) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, both excluded, but is {epsilon}.")
    return epsilon


def _checked_length(model: Model, tokens: Int[Tensor, "n length"], length: int | None) -> int:
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


def group_tokens(life: Lifecycle) -> dict[str, Bool[Tensor, "window position"]]:
    """Sets of key tokens to score.

    The main cycle's spike tokens ("spike"), those of smaller cycles alone ("smaller"), the tokens that stand right
    after one or the other and are neither ("next", "next_smaller"), and all that are neither ("other").
    """
    none = torch.zeros(life.trace.tokens.shape, dtype=torch.bool)
    spike, *rest = [is_spike(life, cycle) for cycle in life.cycles] or [none]
    smaller = torch.stack([none, *rest]).any(0) & ~spike
    other = ~(spike | smaller)
    named = {"spike": spike, "smaller": smaller, "other": other}
    return named | {"next": right_after(spike) & other, "next_smaller": right_after(smaller) & other}


class ScoreReducer(Reducer):
    """Makes `Scores`."""

    def __init__(self, anatomy: Anatomy, epsilon: float, length: int, position: int, groups: Groups):
        self.anatomy, self.epsilon, self.length, self.position = anatomy, epsilon, length, position
        self.groups = {name: tokens[:, :length] for name, tokens in groups.items()}
        heads = (anatomy.n_layers, anatomy.n_heads)
        self.at: list[Tensor] = []
        self.mean, self.above = Mean(*heads, length), Mean(*heads, length)
        self.received = {name: Mean(*heads) for name in groups}
        self.sinks = {name: torch.zeros(2, anatomy.n_layers, dtype=torch.long) for name in groups}

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        """Make room for its scores."""
        self.index = index
        self.at.append(torch.full((self.anatomy.n_layers, self.anatomy.n_heads), math.nan))

    def on_scores(self, layer: int, scores: Float[Tensor, "head key"]) -> None:
        """Add a layer's scores to the sums."""
        above, half = scores > self.epsilon, self.length // 2
        self.at[-1][layer] = scores[:, self.position]
        self.mean.add(layer, scores[None])
        self.above.add(layer, above[None])
        for name, tokens in self.groups.items():
            mine = tokens[self.index]
            self.received[name].add(layer, scores[:, mine].T)
            on_mine = above & mine
            self.sinks[name][:, layer] += torch.stack([on_mine[:, :half].sum(), on_mine.sum()])

    def result(self) -> Scores:
        """The scores, once all windows have passed."""
        return Scores(
            anatomy=self.anatomy,
            epsilon=self.epsilon,
            length=self.length,
            position=self.position,
            at=torch.stack(self.at),
            mean=self.mean.result(),
            above=self.above.result(),
            received={name: mean.result() for name, mean in self.received.items()},
            sinks={name: counts[0] for name, counts in self.sinks.items()},
            sinks_anywhere={name: counts[1] for name, counts in self.sinks.items()},
            n_tokens={name: int(tokens[:, : self.length // 2].sum()) for name, tokens in self.groups.items()},
            n_tokens_anywhere={name: int(tokens.sum()) for name, tokens in self.groups.items()},
        )


@dataclass(frozen=True)
class Secondary:
    """Tokens that are sinks in some layer and no spike tokens of the main cycle (arXiv:2512.22213), of the first half.

    Cosines are between h~ and the primary direction, the mean h~ of the main cycle's spike tokens over its plateau.
    """

    n: int  # how many there are, also those beyond the rows
    window: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    heads: Float[Tensor, "row layer"]  # share of heads that sink on it
    cosine: Float[Tensor, "row point"]
    cosine_after: Float[Tensor, "row point"]  # of the token right after it
    cosine_other: Float[Tensor, " point"]  # mean over all other tokens
    n_aligned: int  # other tokens of the first half that point the same way at some layer, and are sinks nowhere

    def lasting(self) -> Int[Tensor, " row"]:
        """In how many layers each is a sink."""
        return (self.heads > 0).sum(1)


class SecondaryReducer(Reducer):
    """Makes `Secondary`."""

    def __init__(self, epsilon: float, spike: Bool[Tensor, "window position"], collapse: Collapse):
        self.anatomy, self.epsilon, self.spike = collapse.anatomy, epsilon, spike
        self.direction = functional.normalize(collapse.constant, dim=-1)
        self.n, self.n_aligned, self.rows = 0, 0, []
        self.other = Mean(1, self.anatomy.n_blocks + 1)

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        """Forget the last window."""
        self.index, self.window = index, window.cpu()
        self.heads = torch.zeros(self.anatomy.n_layers, len(window))
        self.cosine = torch.zeros(self.anatomy.n_blocks + 1, len(window))

    def on_stream(self, point: int, h: Float[Tensor, "token d_model"]) -> None:
        """Keep each token's cosine with the primary direction."""
        unit = functional.normalize(normalise(h, self.anatomy), dim=-1)
        self.cosine[point] = (unit @ self.direction.to(h.device)).cpu()

    def on_scores(self, layer: int, scores: Float[Tensor, "head key"]) -> None:
        """Keep the share of heads that sink on each token."""
        self.heads[layer] = (scores > self.epsilon).float().mean(0)

    def end(self) -> None:
        """Pick the window's secondary sinks."""
        first_half = torch.arange(len(self.window)) < len(self.window) // 2
        sinks = self.heads.any(0) & ~self.spike[self.index] & first_half
        others = ~sinks & ~self.spike[self.index]
        aligned = others & first_half & (self.cosine[:-1:2] >= ALIGNED).any(0)
        self.n += int(sinks.sum())
        self.n_aligned += int(aligned.sum())
        self.other.add(0, self.cosine[:, others].T)
        for position in sinks.nonzero()[: MOST_ROWS - len(self.rows), 0].tolist():
            where = torch.tensor([self.index, position, int(self.window[position])])
            cosines = self.cosine[:, position], self.cosine[:, position + 1]
            self.rows.append((where, self.heads[:, position], *cosines))

    def result(self) -> Secondary:
        """The rows; raise NotApplicable where there are none."""
        if not self.rows:
            raise NotApplicable("no token but the spike tokens is a sink anywhere")
        where, *columns = (torch.stack(column) for column in zip(*self.rows, strict=True))
        return Secondary(self.n, *where.T, *columns, self.other.result()[0], self.n_aligned)


def median_of_heads(values: Tensor) -> float:
    """Median over the layers and heads in which there is something to measure."""
    return median(values[values.isfinite()].double())
