"""Why the constant is a sink: who gets the attention, and what the keys and queries are like that make it so.

The *sink score* of a key position in a head is the attention that it gets, mean over the queries at or after it (Gu et
al., arXiv:2410.10781); a head *sinks* there when that exceeds epsilon. `score` needs attention patterns only; `look`
also reads queries, keys and values: a logit is |q| |k| cos(q, k) / sqrt(d_head), and what is constant about the spike
tokens' normalised input is constant about their keys.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from numbers import Integral, Real

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.amplifier import median
from spikesink.claims import Evidence, NotApplicable, evidence, where_applicable
from spikesink.collapse import Collapse
from spikesink.firsttoken import normalise
from spikesink.lifecycle import (
    Lifecycle,
    check_model,
    check_windows,
    is_spike,
    plateau_layers,
    right_after,
    spike_rows,
)
from spikesink.models import Anatomy, anatomy, check_not_padding, check_tokens
from spikesink.progress import progress
from spikesink.trace import follow, received
from spikesink.weights import Weights, no_projections

EPSILON = 0.3  # Gu et al.'s
ALIGNED = 0.9  # a cosine with the primary direction that counts as pointing the same way
MOST_ROWS = 512  # of secondary sinks kept
HOOKS = {
    "q": "attn.q.hook_out",
    "k": "attn.k.hook_out",
    "v": "attn.v.hook_out",
    "rotated_q": "attn.hook_rot_q",  # these two where `Anatomy.sees_rotation`
    "rotated_k": "attn.hook_rot_k",
}


@dataclass(frozen=True)
class Scores:
    """Sink scores, reduced while windows stream by; groups are the sets of key tokens that `score` was given."""

    about: Anatomy
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


def groups(life: Lifecycle) -> dict[str, Bool[Tensor, "window position"]]:
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
    of: Mapping[str, Bool[Tensor, "n length"]] | None = None,
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
        of: sets of key tokens to average over, such as `groups(life)`.

    Raises:
        ValueError: epsilon is not between 0 and 1, `length` exceeds the windows or the model's context, there is no
            such key position, a token is not in the vocabulary, or a window holds nothing but padding.
        FloatingPointError: as `follow` does.
    """
    about = anatomy(model)
    length = _length(tokens, length, about)
    check_not_padding(model, tokens)
    if position not in range(length):
        raise ValueError(f"key position {position} is not in a window of {length} tokens; give 0 to {length - 1}.")
    if wrong := [name for name, mine in (of or {}).items() if mine.shape != tokens.shape or mine.dtype != torch.bool]:
        raise ValueError(
            f"the set {wrong[0]!r} of key tokens must have the shape of the windows, {list(tokens.shape)}, and hold "
            "truth values."
        )
    scores = _Scores(about, _checked(epsilon), length, position, of or {})
    _over(model, about, tokens[:, :length], [scores], "scoring attention")
    return scores.result()


def _checked(epsilon: float) -> float:
    if not isinstance(epsilon, Real) or isinstance(epsilon, bool) or not 0 < epsilon < 1:
        raise ValueError(f"epsilon must lie between 0 and 1, both excluded, but is {epsilon}.")
    return epsilon


def _length(tokens: Int[Tensor, "n length"], length: int | None, about: Anatomy) -> int:
    check_tokens(about, tokens)
    if tokens.shape[1] < 2:
        raise ValueError("windows of one token have nobody to attend to; cut longer ones.")
    length = tokens.shape[1] if length is None else length
    if not isinstance(length, Integral) or isinstance(length, bool):
        raise ValueError(f"length must be a whole number of tokens, but is {length!r}.")
    if length > about.context:
        raise ValueError(f"{length} tokens are longer than the model's context of {about.context}.")
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
        follow(model, about, window, all_of("on_stream"), None, on_pattern, also)
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
            about=self.about,
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
class Geometry:
    """Queries, keys and values of every head, towards the spike tokens' keys ("spike") and others.

    "next" is the token right after a spike token, the control; "other" all that are no spike tokens. Means over windows
    and over the queries after the key; logits are what enters the softmax.
    """

    about: Anatomy
    gap: Mapping[str, Float[Tensor, "layer head"]]  # logit to a "spike" or "next" key, less the mean to other keys
    cosine: Mapping[str, Float[Tensor, "layer head"]]  # of queries and keys, "spike", "next" and "other"
    query_norm: Float[Tensor, "layer head"]
    key_norm: Mapping[str, Float[Tensor, "layer kv_head"]]
    value_norm: Mapping[str, Float[Tensor, "layer kv_head"]]  # "spike", "next" and "other"
    # Effective dimension of "spike" keys, of as many others ("matched"), of "next" and of all "other" ones; by when.
    dimension: Mapping[str, Mapping[str, Float[Tensor, "layer kv_head"]]]
    # Length of the mean of unit queries, 1 where all point the same way; by when.
    consistency: Mapping[str, Float[Tensor, "layer head"]]


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


@dataclass(frozen=True)
class Look:
    """What one pass of `look` sees; of queries and keys nothing, where nothing spikes."""

    scores: Scores
    geometry: Geometry | NotApplicable
    secondary: Secondary | NotApplicable


def look(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    found: Collapse | NotApplicable,
    epsilon: float = EPSILON,
    seed: int = 0,
) -> Look:
    """Score attention, read queries, keys and values, and find secondary sinks, in one pass over the windows.

    Args:
        model: as `load` returns it.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        found: as `collapse` returns it, for the primary direction; without it no secondary sinks are looked for.
        epsilon: what a sink's score exceeds.
        seed: of the tokens that are matched with spike tokens.

    Raises:
        ValueError: epsilon is not between 0 and 1, or `life` was found in other windows or in another model.
    """
    check_model(life, anatomy(model))
    check_windows(life, tokens)
    about, named = life.trace.anatomy, groups(life)
    scores = _Scores(about, _checked(epsilon), tokens.shape[1], 0, named)
    reason = _nothing_to_read(life) or _no_keys(about)
    geometry = _Geometry(about, named, seed) if reason is None else reason
    others = found if isinstance(found, NotApplicable) else _Secondary(about, epsilon, named["spike"], found)
    reducers = [scores, *(part for part in (geometry, others) if isinstance(part, _Reducer))]
    _over(model, about, tokens, reducers, "looking at queries and keys")
    return Look(scores.result(), *(p if isinstance(p, NotApplicable) else p.result() for p in (geometry, others)))


def _nothing_to_read(life: Lifecycle) -> NotApplicable | None:
    """Why no layer's attention meets a spike, or None where one does."""
    if life.main is None:
        return NotApplicable(life.reason)
    return None if plateau_layers(life.main) else NotApplicable("no layer reads the plateau of the spike")


def _no_keys(about: Anatomy) -> NotApplicable | None:
    """Why queries, keys and values are not to be seen, or None where they are."""
    reason = no_projections(about)
    return None if reason is None else NotApplicable(reason)


class _Mean:
    """A running mean of tensors that are added with their number."""

    def __init__(self, *shape: int):
        self.sum, self.n = torch.zeros(*shape), torch.zeros(shape[0])

    def add(self, layer: int, values: Tensor) -> None:
        """Values of one layer, the last dimension to be averaged over."""
        self.sum[layer] += values.sum(-1).cpu()
        self.n[layer] += values.shape[-1]

    def result(self) -> Tensor:
        return self.sum / self.n.view(-1, *[1] * (self.sum.ndim - 1))


class _Geometry(_Reducer):
    """The sums of `Geometry`."""

    def __init__(self, about: Anatomy, named: Mapping[str, Bool[Tensor, "window position"]], seed: int):
        self.about, self.named = about, named
        self.generator = torch.Generator().manual_seed(seed)
        layers, heads, kv_heads = about.n_layers, about.n_heads, about.n_kv_heads
        self.gap = {name: _Mean(layers, heads) for name in ("spike", "next")}
        self.cosine = {name: _Mean(layers, heads) for name in ("spike", "next", "other")}
        self.query_norm = _Mean(layers, heads)
        self.key_norm, self.value_norm = (
            {name: _Mean(layers, kv_heads) for name in ("spike", "next", "other")} for _ in range(2)
        )
        self.stages = ("before", "after") if about.sees_rotation else ("before",)
        moments = (layers, kv_heads, about.d_head, about.d_head)
        self.moment = {
            s: {name: torch.zeros(moments) for name in ("spike", "matched", "next", "other")} for s in self.stages
        }
        self.unit = {s: _Mean(layers, heads, about.d_head) for s in self.stages}

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        mine = {name: self.named[name][index] for name in ("spike", "next")}
        mine["other"] = ~mine["spike"]
        others = mine["other"].nonzero()[:, 0]
        chosen = others[torch.randperm(len(others), generator=self.generator)[: int(mine["spike"].sum())]]
        self.mine = mine
        self.matched = torch.zeros(len(window), dtype=torch.bool).index_fill(0, chosen, True)
        self.seen: dict[str, Tensor] = {}

    def hooks(self) -> list[tuple[str, Callable[[Tensor], None]]]:
        names = HOOKS if self.about.sees_rotation else ("q", "k", "v")
        hooks = []
        for layer in range(self.about.n_layers):
            for name in names:
                hooks.append((f"blocks.{layer}.{HOOKS[name]}", lambda x, name=name: self.seen.update({name: x})))
            hooks.append((f"blocks.{layer}.attn.hook_attn_scores", lambda x, layer=layer: self.reduce(layer, x)))
        return hooks

    def reduce(self, layer: int, logits: Float[Tensor, "head query key"]) -> None:
        """All of a layer, once its logits are there, which come last."""
        seen = self.seen
        k, v = (_headed(seen[name], self.about.d_head) for name in ("k", "v"))
        q = _headed(seen["q"], self.about.d_head)  # head, position, d_head
        keys, queries = {"before": k}, {"before": q}
        if self.about.sees_rotation:
            keys["after"] = _headed(seen["rotated_k"], self.about.d_head)
            queries["after"] = _headed(seen["rotated_q"], self.about.d_head)
        for stage in self.stages:
            for name, mine in (self.mine | {"matched": self.matched}).items():
                some = keys[stage][:, mine.to(k.device)]
                self.moment[stage][name][layer] += torch.einsum("hpd,hpe->hde", some, some).cpu()
            self.unit[stage].add(layer, functional.normalize(queries[stage], dim=-1).transpose(1, 2))
        for name, mine in self.mine.items():
            self.value_norm[name].add(layer, v[:, mine.to(v.device)].norm(dim=-1))
            self.key_norm[name].add(layer, keys[self.stages[-1]][:, mine.to(k.device)].norm(dim=-1))
        self.towards(layer, logits, queries[self.stages[-1]].norm(dim=-1), keys[self.stages[-1]].norm(dim=-1))

    def towards(
        self,
        layer: int,
        logits: Float[Tensor, "head query key"],
        query_norm: Float[Tensor, "head query"],
        key_norm: Float[Tensor, "kv_head key"],
    ) -> None:
        """Logits and cosines towards single keys, and towards all others that a query sees."""
        about, device = self.about, logits.device
        sees = _visible(logits.shape[-1], about.sight[layer], device)
        other = sees & self.mine["other"].to(device)
        n_other = other.sum(-1)  # query
        per_head = key_norm.repeat_interleave(about.n_heads // about.n_kv_heads, dim=0)
        flat = logits if about.softcap is None else _uncapped(logits, about.softcap)
        cosines = flat / (about.query_scale * query_norm[:, :, None] * per_head[:, None, :]).clamp(min=1e-30)
        to_others, cosine_others = (
            x.masked_fill(~other, 0).sum(-1) / n_other.clamp(min=1) for x in (logits, cosines)
        )  # head, query
        for name in ("spike", "next"):
            for key in self.mine[name].nonzero()[:, 0].tolist():
                queries = sees[:, key] & (n_other > 0)
                queries[: key + 1] = False
                self.gap[name].add(layer, (logits[:, :, key] - to_others)[:, queries])
                self.cosine[name].add(layer, cosines[:, queries, key])
                if name == "spike":
                    self.cosine["other"].add(layer, cosine_others[:, queries])
                    self.query_norm.add(layer, query_norm[:, queries])

    def result(self) -> Geometry:
        return Geometry(
            about=self.about,
            gap={name: mean.result() for name, mean in self.gap.items()},
            cosine={name: mean.result() for name, mean in self.cosine.items()},
            query_norm=self.query_norm.result(),
            key_norm={name: mean.result() for name, mean in self.key_norm.items()},
            value_norm={name: mean.result() for name, mean in self.value_norm.items()},
            dimension={
                stage: {name: effective_dimension(moment) for name, moment in of.items()}
                for stage, of in self.moment.items()
            },
            consistency={stage: mean.result().norm(dim=-1) for stage, mean in self.unit.items()},
        )


def _uncapped(logits: Tensor, softcap: float) -> Tensor:
    """Logits before they were bent to stay within the cap."""
    return softcap * torch.atanh((logits / softcap).clamp(-1 + 1e-6, 1 - 1e-6))


def effective_dimension(moment: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    """Participation ratio of the eigenvalues of a second moment sum k k': (trace M)^2 / trace M^2, 1 for one line.

    About the origin, not about the mean: keys that are one and the same vector have dimension 1.
    """
    moment = moment.double()
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / moment.square().sum((-2, -1))


def _headed(x: Tensor, d_head: int) -> Float[Tensor, "head position d_head"]:
    """A hook's queries, keys or values by head; most families' come by position first."""
    return x.reshape(x.shape[0], -1, d_head).transpose(0, 1)


def _visible(length: int, sight: int | None, device) -> Bool[Tensor, "query key"]:
    """Which keys a query may attend to."""
    back = torch.arange(length, device=device)[:, None] - torch.arange(length, device=device)
    return (back >= 0) & (back < (length if sight is None else sight))


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


def _where_there_is_a_spike(measure):
    """A measure of a look and a life cycle, or the reason why no layer meets a spike."""

    @wraps(measure)
    def measured(seen: Look, life: Lifecycle):
        return _nothing_to_read(life) or measure(seen, life)

    return measured


def _where_keys_are_seen(measure):
    """A measure of queries, keys or values, or the reason why there are none to be seen."""

    @wraps(measure)
    def measured(seen: Look, life: Lifecycle):
        return seen.geometry if isinstance(seen.geometry, NotApplicable) else measure(seen, life)

    return measured


def many_heads(scores: Scores) -> Evidence | NotApplicable:
    """SK1: the share of heads (over layers, heads and windows) that sink on position 0, and what attention it gets.

    Controls: the same share for the other key positions of the first half, mean and largest (which can hold a spike
    token too); and for ordinary tokens, that spike in no cycle, where the scores were told which they are.
    """
    others = scores.above[..., 1 : max(2, scores.length // 2)].mean((0, 1))
    control = {
        "sink_ratio_other_positions": float(others.mean()),
        "sink_ratio_highest_other_position": float(others.max()),
        "mean_attention_other_positions": float(scores.mean[..., 1 : max(2, scores.length // 2)].mean()),
    }
    if scores.n_tokens.get("other"):
        pairs = scores.n_tokens["other"] * scores.about.n_layers * scores.about.n_heads
        control["sink_ratio_ordinary_tokens"] = int(scores.sinks["other"].sum()) / pairs
    return evidence(
        measured={
            "sink_ratio": scores.ratio(),
            "epsilon": scores.epsilon,
            "length": scores.length,
            "mean_attention": float(scores.at.mean()),
        },
        control=control | {"attention_if_even": float((1 / torch.arange(1, scores.length + 1)).mean())},
    )


@_where_there_is_a_spike
def on_spikes(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """SK2: of the (head, token) pairs that are sinks during the plateau, the share that falls on spike tokens.

    Tokens of the first half of each window; `share_whole_windows` counts all. Controls: the share of those tokens that
    spike, which is what chance would give; and the share before the step-up, on the same tokens and on tokens of any
    cycle, since a smaller one can be alive there.
    """
    scores, layers, before = seen.scores, list(plateau_layers(life.main)), _layers_before(life)

    def share(sinks: Mapping[str, Tensor], which: Sequence[int], *mine: str) -> tuple[float, int]:
        on = sum(int(sinks[name][which].sum()) for name in mine)
        total = sum(int(sinks[name][which].sum()) for name in ("spike", "smaller", "other"))
        return (on / total if total else float("nan")), total

    found, total = share(scores.sinks, layers, "spike")
    if not total:
        return NotApplicable("no head sinks on any token during the plateau")
    n = scores.n_tokens
    same, n_before = share(scores.sinks, before, "spike")
    return evidence(
        measured={
            "share_on_spike_tokens": found,
            "share_whole_windows": share(scores.sinks_anywhere, layers, "spike")[0],
            "n_sinks": total,
            "n_sinks_before": n_before,
        },
        control={
            "share_of_tokens_that_spike": n["spike"] / (n["spike"] + n["smaller"] + n["other"]),
            "share_on_spike_tokens_before": same,
            "share_on_tokens_of_any_cycle_before": share(scores.sinks, before, "spike", "smaller")[0],
        },
    )


@_where_keys_are_seen
def few_dimensions(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """SK3: effective dimension of the spike tokens' keys, and of as many other tokens' keys; before RoPE.

    Median over the plateau's layers and their key heads; `*_rotated` after RoPE, which turns keys by their position and
    so spreads others over more dimensions. Controls: all other tokens; the tokens right after, at nearly the same
    places; and the spike tokens' own keys before the step-up, in layers that read no cycle's plateau.
    """
    layers, quiet = list(plateau_layers(life.main)), _layers_quiet(life)
    if (reason := _no_sinks(seen, layers)) is not None:
        return reason
    if life.main.is_spike.sum() < 2:
        return NotApplicable("one key has one dimension; two spike tokens are needed, so measure more windows")
    plain, rotated = (seen.geometry.dimension.get(stage) for stage in ("before", "after"))
    measured = {
        "effective_dimension_sink": _median(plain["spike"][layers]),
        "effective_dimension_other": _median(plain["matched"][layers]),
        "n_tokens": int(life.main.is_spike.sum()),
    }
    if rotated is not None:
        measured["effective_dimension_sink_rotated"] = _median(rotated["spike"][layers])
        measured["effective_dimension_other_rotated"] = _median(rotated["matched"][layers])
    return evidence(
        measured,
        control={
            "effective_dimension_all_others": _median(plain["other"][layers]),
            "effective_dimension_next_token": _median(plain["next"][layers]),
            "effective_dimension_sink_without_a_spike": _median(plain["spike"][quiet]),
        },
    )


def factors(geometry: Geometry, layers: Sequence[int]) -> dict[str, Float[Tensor, " head"]]:
    """What a logit towards the spike tokens' keys is made of, |q| |k| cos, in every head of some layers, in order."""
    heads_per_key = geometry.about.n_heads // geometry.about.n_kv_heads
    found = {
        "cosine": geometry.cosine["spike"],
        "query_norm": geometry.query_norm,
        "key_norm": geometry.key_norm["spike"].repeat_interleave(heads_per_key, dim=1),
    }
    return {name: of[list(layers)].flatten() for name, of in found.items()}


@_where_keys_are_seen
def favoured(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """SK4: how far the logit to the spike token's key lies above those to other keys, in sink heads and other heads.

    A head of the plateau's layers is a sink head where the spike tokens' mean score exceeds epsilon. `spearman` is the
    rank correlation over all those heads between gap and score; `spearman_*` that of the score with each factor of the
    logit |q| |k| cos / sqrt(d_head), and with the mean cosine to other keys, the other side of the gap. Attention is a
    function of logits, so some correlation is a matter of course; which factor carries it is not. Control: the same of
    the token right after the spike token.
    """
    geometry, layers = seen.geometry, list(plateau_layers(life.main))
    score, gap, after = (x[layers].flatten() for x in (seen.scores.received["spike"], *geometry.gap.values()))
    sinks = score > seen.scores.epsilon
    if not sinks.any() or sinks.all():
        return NotApplicable(f"{'all' if sinks.any() else 'no'} heads of the plateau sink, so there are not two kinds")
    cosine = {name: of[layers].flatten() for name, of in geometry.cosine.items()}
    score_after = seen.scores.received["next"][layers].flatten()
    return evidence(
        measured={
            "logit_gap_sink": float(gap[sinks].mean()),
            "logit_gap_other": float(gap[~sinks].mean()),
            "cosine_sink": float(cosine["spike"][sinks].mean()),
            "cosine_other": float(cosine["spike"][~sinks].mean()),
            "spearman": spearman(gap, score),
            **{f"spearman_{name}": spearman(values, score) for name, values in factors(geometry, layers).items()},
            "key_norm_ratio": _median((geometry.key_norm["spike"] / geometry.key_norm["other"])[layers]),
            "spearman_cosine_other_keys": spearman(cosine["other"], score),
            "n_sink_heads": int(sinks.sum()),
            "n_heads": len(sinks),
        },
        control={
            "logit_gap_sink_next_token": float(after[sinks].mean()),
            "logit_gap_other_next_token": float(after[~sinks].mean()),
            "cosine_sink_next_token": float(cosine["next"][sinks].mean()),
            "cosine_sink_all_other_keys": float(cosine["other"][sinks].mean()),
            "spearman_next_token": spearman(after, score_after),
        },
    )


@_where_keys_are_seen
def query_consistency(seen: Look, life: Lifecycle) -> dict[str, float] | NotApplicable:
    """Length of the mean unit query of a head, mean over the plateau's heads: before RoPE and, where shown, after."""
    layers = list(plateau_layers(life.main))
    return {when: float(of[layers].mean()) for when, of in seen.geometry.consistency.items()}


@_where_there_is_a_spike
def over_depth(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """SK5: attention that the spike tokens get, mean over heads and over the layers before, during, after the plateau.

    Before: layers that read the stream before the first step-up block; `attention_before_without_a_spike` leaves out
    those in which a smaller cycle is alive. After: past the plateau (none, where the step-down ends in the last layer).
    Control: the token right after each spike token.
    """
    layers = (_layers_before(life), list(plateau_layers(life.main)), _layers_after(life))
    spike, after = (seen.scores.received[name].mean(1) for name in ("spike", "next"))
    values = [float(spike[which].mean()) for which in layers]
    quiet = _layers_quiet(life)
    measured = {
        "attention_before": values[0],
        "attention_during": values[1],
        "attention_after": values[2] if layers[2] else [],
    }
    if quiet:
        measured["attention_before_without_a_spike"] = float(spike[quiet].mean())
    return evidence(
        measured,
        control={
            f"attention_{name}_next_token": float(after[which].mean())
            for name, which in zip(("before", "during", "after"), layers, strict=True)
        },
    )


@_where_there_is_a_spike
def smaller_cycle(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """X-SK8: attention that the tokens of smaller cycles alone get, while such a cycle is alive, and otherwise.

    Alive: on its plateau. Mean over heads and layers; sinks are counted in the first halves. Control: the token right
    after each of them.
    """
    if len(life.cycles) < 2 or not seen.scores.n_tokens_anywhere["smaller"]:
        return NotApplicable("there is no second cycle with tokens of its own")
    alive = sorted({layer for cycle in life.cycles[1:] for layer in plateau_layers(cycle)})
    if not alive:
        return NotApplicable("no layer reads the plateau of a smaller cycle")
    resting = [layer for layer in range(life.trace.anatomy.n_layers) if layer not in alive]
    smaller, after = (seen.scores.received[name].mean(1) for name in ("smaller", "next_smaller"))
    return evidence(
        measured={
            "attention_during": float(smaller[alive].mean()),
            "attention_otherwise": float(smaller[resting].mean()) if resting else float("nan"),
            "n_sinks_during": int(seen.scores.sinks["smaller"][alive].sum()),
            "n_sinks_otherwise": int(seen.scores.sinks["smaller"][resting].sum()),
            "n_tokens": seen.scores.n_tokens_anywhere["smaller"],
            "n_tokens_first_half": seen.scores.n_tokens["smaller"],
        },
        control={
            "attention_during_next_token": float(after[alive].mean()),
            "attention_otherwise_next_token": float(after[resting].mean()),
        },
    )


@dataclass(frozen=True)
class Rebuilt:
    """Keys made of a few rows of W_K: cosine with the whole W_K h~, mean over tokens, by how many rows."""

    channels: tuple[int, ...]  # the spike channels, in the order in which their rows are added
    layers: range
    spike: Float[Tensor, "row layer kv_head"]  # spike tokens
    other_tokens: Float[Tensor, "row layer kv_head"]  # the same rows, of other tokens
    other_channels: Float[Tensor, "row layer kv_head"]  # as many rows of the spike tokens' strongest other channels
    own_channels: Float[Tensor, "layer kv_head"]  # as many rows of the other tokens' own strongest channels
    with_bias: Float[Tensor, "layer kv_head"]  # all the rows and b_K, against the whole key
    bias_share: Float[Tensor, "layer kv_head"]  # |b_K| over |W_K h~ + b_K| of spike tokens


@where_applicable
def rebuild(weights: Weights, life: Lifecycle, found: Collapse | NotApplicable) -> Rebuilt | NotApplicable:
    """Rebuild the spike tokens' keys from the rows of W_K (norm's scale folded in) at the spike channels alone.

    Keys as the projection gives them: before any QK norm and RoPE.

    Args:
        weights: of the model (`weights_of`).
        life: as `find_lifecycle` returns it.
        found: as `collapse` returns it: h~ of some spike tokens and of as many others.

    Raises:
        ValueError: `life` was found in another model.
    """
    check_model(life, weights.anatomy)
    if (reason := _no_keys(weights.anatomy)) is not None:
        return reason
    layers, channels = plateau_layers(found.cycle), list(found.cycle.channels)
    if not layers:
        return NotApplicable("no layer reads the plateau")
    strongest = found.spike.share[found.cycle.middle].argsort(descending=True).tolist()
    others = [channel for channel in strongest if channel not in channels][: len(channels)]
    curves: list[list[Tensor]] = []
    for layer in layers:
        matrix, bias = weights.keys(layer)
        matrix, bias = (x.unflatten(0, (found.about.n_kv_heads, -1)) for x in (matrix, bias))
        spike, other = (group.kept[:, 2 * layer] for group in (found.spike, found.other))
        whole = torch.einsum("hkd,td->thk", matrix, spike)
        parts = torch.einsum("hkd,td->thk", matrix[..., channels], spike[:, channels])
        curves.append(
            [
                _partial(matrix, spike, channels),
                _partial(matrix, other, channels),
                _partial(matrix, spike, others),
                _own(matrix, other, len(channels)),
                functional.cosine_similarity(parts + bias, whole + bias, dim=-1).mean(0),
                (bias.norm(dim=-1) / (whole + bias).norm(dim=-1)).mean(0),
            ]
        )
    return Rebuilt(found.cycle.channels, layers, *(torch.stack(curve, dim=-2) for curve in zip(*curves, strict=True)))


def _partial(
    matrix: Float[Tensor, "kv_head d_head d_model"], h: Float[Tensor, "token d_model"], channels: list[int]
) -> Float[Tensor, "row kv_head"]:
    """Cosine of W_K h~ with what the first 1, 2, ... of these channels make of it, mean over tokens."""
    whole = torch.einsum("hkd,td->thk", matrix, h)
    parts = torch.einsum("hkc,tc->cthk", matrix[..., channels], h[:, channels]).cumsum(0)
    return functional.cosine_similarity(parts, whole[None], dim=-1).mean(1)


def _own(
    matrix: Float[Tensor, "kv_head d_head d_model"], h: Float[Tensor, "token d_model"], n: int
) -> Float[Tensor, " kv_head"]:
    """Cosine of W_K h~ with what each token's own n strongest channels make of it, mean over tokens."""
    kept = torch.zeros_like(h).scatter(1, h.abs().topk(n, dim=1).indices, 1)
    whole, part = (torch.einsum("hkd,td->thk", matrix, x) for x in (h, h * kept))
    return functional.cosine_similarity(part, whole, dim=-1).mean(0)


@where_applicable
def key_bias(rebuilt: Rebuilt) -> dict[str, float] | NotApplicable:
    """How much of the spike tokens' keys b_K is, and how well whole keys are rebuilt with it; or that there is none."""
    if not rebuilt.bias_share.any():
        return NotApplicable("its keys have no bias")
    return {"share": _median(rebuilt.bias_share), "cosine": _median(rebuilt.with_bias)}


@where_applicable
def few_rows(rebuilt: Rebuilt, seen: Look) -> Evidence | NotApplicable:
    """SK6: cosine of the spike tokens' keys with their rebuilding from the rows of W_K at the spike channels.

    Median over the plateau's layers and key heads. `cosine_with_bias` compares whole keys, where there is a b_K;
    `bias_share` says how much of them that is. Controls: the same rows, of other tokens; as many rows of those tokens'
    own strongest channels; as many rows of the spike tokens' strongest channels that do not spike.
    """
    if (reason := _no_sinks(seen, rebuilt.layers)) is not None:
        return reason
    return evidence(
        measured={
            "cosine_reconstructed": _median(rebuilt.spike[-1]),
            "rows": len(rebuilt.channels),
            "cosine_least": float(rebuilt.spike[-1].min()),
            "cosine_one_row": _median(rebuilt.spike[0]),
            "cosine_with_bias": _median(rebuilt.with_bias),
            "bias_share": _median(rebuilt.bias_share),
        },
        control={
            "cosine_other_tokens": _median(rebuilt.other_tokens[-1]),
            "cosine_other_tokens_own_channels": _median(rebuilt.own_channels),
            "cosine_strongest_other_channels": _median(rebuilt.other_channels[-1]),
        },
    )


@_where_keys_are_seen
def small_values(seen: Look, life: Lifecycle) -> Evidence | NotApplicable:
    """SK7: norm of the spike tokens' values over that of other tokens', median over the plateau's layers and heads.

    Controls: the token right after the spike token; and the spike token itself before the step-up, in layers that read
    no cycle's plateau.
    """
    norm, layers = seen.geometry.value_norm, list(plateau_layers(life.main))
    if (reason := _no_sinks(seen, layers)) is not None:
        return reason
    spike, after = (norm[name] / norm["other"] for name in ("spike", "next"))
    return evidence(
        measured={"value_norm_ratio": _median(spike[layers]), "largest_ratio": float(spike[layers].max())},
        control={
            "value_norm_ratio_next_token": _median(after[layers]),
            "value_norm_ratio_without_a_spike": _median(spike[_layers_quiet(life)]),
        },
    )


def _no_sinks(seen: Look, layers: Sequence[int]) -> NotApplicable | None:
    """Why nothing can be said of sinks: no head's mean score of the spike tokens exceeds epsilon in these layers."""
    if (seen.scores.received["spike"][list(layers)] > seen.scores.epsilon).any():
        return None
    return NotApplicable("no head of the plateau sinks on the spike tokens")


def secondary(seen: Look) -> Evidence | NotApplicable:
    """X-SK9: cosine of secondary sinks' h~ with the primary direction, in the layers where they are sinks, median.

    Controls: the token right after each, in the same layers; all other tokens', mean over the same layers; and how many
    other tokens point along it (cosine above ALIGNED) at some layer without being a sink anywhere.
    """
    rows = seen.secondary
    if isinstance(rows, NotApplicable):
        return rows
    while_sink = rows.heads > 0
    cosine, after = (of[:, :-1:2] for of in (rows.cosine, rows.cosine_after))
    other = rows.cosine_other[:-1:2].expand_as(cosine)
    lasting, layers = rows.lasting(), while_sink.any(0).nonzero()[:, 0]
    return evidence(
        measured={
            "cosine_secondary": _median(cosine[while_sink]),
            "cosine_others": _median(other[while_sink]),
            "n_tokens": rows.n,
            "first_layer": int(layers[0]),
            "last_layer": int(layers[-1]),
            "fewest_layers": int(lasting.min()),
            "most_layers": int(lasting.max()),
        },
        control={"cosine_next_token": _median(after[while_sink]), "n_aligned_but_no_sinks": rows.n_aligned},
    )


def secondary_table(seen: Look, decode: Callable[[list[int]], str], most: int = 12) -> pd.DataFrame | NotApplicable:
    """Secondary sinks by token: how many, the layers they last, the FFN block that turns them, and the cosine then.

    The block is the FFN block over which the cosine with the primary direction rises most, the commonest of a token's.
    """
    rows = seen.secondary
    if isinstance(rows, NotApplicable):
        return rows
    rise = (rows.cosine[:, 2::2] - rows.cosine[:, 1::2]).argmax(1) * 2 + 2
    while_sink = rows.heads > 0
    lines = []
    for token in rows.token.unique().tolist():
        mine = rows.token == token
        layers = while_sink[mine].any(0).nonzero()[:, 0]
        cosine = rows.cosine[mine][:, :-1:2][while_sink[mine]]
        lines.append(
            {
                "token": repr(decode([token])),
                "times": int(mine.sum()),
                "layers": f"{int(layers[0])} to {int(layers[-1])}",
                "in so many layers (median)": int(rows.lasting()[mine].median()),
                "share of heads at most": float(rows.heads[mine].max()),
                "turned by block": int(rise[mine].mode().values),
                "cosine while a sink": _median(cosine),
            }
        )
    return pd.DataFrame(lines).sort_values(["times", "token"], ascending=[False, True]).head(most)


@dataclass(frozen=True)
class Cloud:
    """Queries and keys of one head, as they are scored, in two flat pictures: `tsne` and `pca`."""

    layer: int
    head: int
    score: float  # attention that spike tokens get in this head
    is_query: Bool[Tensor, " point"]
    is_spike: Bool[Tensor, " point"]
    tsne: Float[Tensor, "point 2"]
    pca: Float[Tensor, "point 2"]
    origin: Float[Tensor, " 2"]  # where the zero vector lies in `pca`
    explained: tuple[float, float]  # share of the variance along each axis of `pca`


@_where_there_is_a_spike
def two_heads(seen: Look, life: Lifecycle) -> list[tuple[int, int]] | NotApplicable:
    """The head that sinks most during the plateau, and the one of its layer that does least: (layer, head) each."""
    score, layers = seen.scores.received["spike"], list(plateau_layers(life.main))
    layer = layers[int(score[layers].amax(1).argmax())]
    return [(layer, int(score[layer].argmax())), (layer, int(score[layer].argmin()))]


@where_applicable
def clouds(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    seen: Look,
    heads: Sequence[tuple[int, int]] | NotApplicable,
    most: int = 320,
    seed: int = 0,
) -> list[Cloud] | NotApplicable:
    """Lay out queries and keys of some heads by t-SNE and by PCA (the paper's figure 6).

    Every spike token and others drawn at random, `most` in all. Where a family does not show them after RoPE, before.

    Raises:
        ValueError: the model has no such head, or these are not the windows that `life` was found in.
    """
    check_windows(life, tokens)
    about, where, generator = life.trace.anatomy, is_spike(life, life.main), torch.Generator().manual_seed(seed)
    if (reason := _no_keys(about)) is not None:
        return reason
    if wrong := [at for at in heads if at[0] not in range(about.n_layers) or at[1] not in range(about.n_heads)]:
        raise ValueError(f"there is no layer and head {wrong[0]}; both are counted from 0.")
    names = ("rotated_q", "rotated_k") if about.sees_rotation else ("q", "k")
    found: dict[tuple[int, int, str], list[Tensor]] = {}
    marks = []
    for window, spikes in zip(tokens, where, strict=True):
        others = (~spikes).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others), generator=generator)[: max(1, most // len(tokens))]]
        chosen = torch.cat([spikes.nonzero()[:, 0], drawn])
        marks.append(spikes[chosen])
        passed: dict[tuple[int, str], Tensor] = {}
        hooks = [
            (f"blocks.{layer}.{HOOKS[name]}", partial(_keep, passed, (layer, name), about.d_head))
            for layer in {layer for layer, _ in heads}
            for name in names
        ]
        follow(model, about, window, also=hooks)
        for layer, head in heads:
            for name, of in zip(names, (head, head * about.n_kv_heads // about.n_heads), strict=True):
                found.setdefault((layer, head, name), []).append(passed[layer, name][of].cpu()[chosen])
    marked = torch.cat(marks)
    is_query = torch.cat([torch.ones_like(marked), torch.zeros_like(marked)])
    laid = []
    for layer, head in heads:
        points = torch.cat([torch.cat(found[layer, head, name]) for name in names]).numpy()
        pca = PCA(2).fit(points)
        tsne = TSNE(2, perplexity=min(30, len(points) // 4), init="pca", random_state=seed).fit_transform(points)
        score = float(seen.scores.received["spike"][layer, head])
        explained = tuple(float(share) for share in pca.explained_variance_ratio_)
        flat = (
            torch.from_numpy(tsne),
            torch.from_numpy(pca.transform(points)),
            torch.from_numpy(-pca.components_ @ pca.mean_),
        )
        laid.append(Cloud(layer, head, score, is_query, torch.cat([marked, marked]), *flat, explained))
    return laid


def _keep(passed: dict, key: tuple[int, str], d_head: int, x: Tensor) -> None:
    passed[key] = _headed(x, d_head)


def _layers_before(life: Lifecycle) -> list[int]:
    """Layers that read the stream before the main cycle's first step-up block (or, of a ramp, before its peak)."""
    first = life.main.step_up[0] if life.main.step_up else life.main.peak
    return [layer for layer in range(life.trace.anatomy.n_layers) if 2 * layer < first]


def _layers_quiet(life: Lifecycle) -> list[int]:
    """Of the layers before the main cycle, those that read no other cycle's plateau and spike tokens without a spike.

    These can spike before their cycle in another channel, which is then no cycle of its own.
    """
    trace = life.trace
    alive = {layer for cycle in life.cycles for layer in plateau_layers(cycle)}
    largest = spike_rows(life).stream.abs().amax(-1).quantile(0.5, dim=0)  # of each point
    spiking = largest > trace.threshold * trace.medians
    return [layer for layer in _layers_before(life) if layer not in alive and not spiking[2 * layer]]


def _layers_after(life: Lifecycle) -> list[int]:
    """Layers that read the stream past the main cycle's plateau."""
    return [layer for layer in range(life.trace.anatomy.n_layers) if 2 * layer > life.main.plateau[1]]


def _median(values: Tensor) -> float:
    """Median over the layers and heads in which there is something to measure."""
    return median(values[values.isfinite()].double())


def spearman(a: Float[Tensor, " head"], b: Float[Tensor, " head"]) -> float:
    """Rank correlation of two measures over heads, without those in which either is not a number."""
    return float(spearmanr(a.numpy(), b.numpy(), nan_policy="omit").statistic)
