"""Why a token is a sink: what its keys, its values and the queries of a head are like.

A logit is |q| |k| cos(q, k) / sqrt(d_head), and what is constant about the spike tokens' normalised input is constant
about their keys. `read_attention` reads queries, keys and values beside the scores of `sinks`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA
from torch import Tensor
from torch.nn import functional

from spikesink.chain.collapse import Collapse
from spikesink.chain.lifecycle import Lifecycle, check_model, check_windows, is_spike
from spikesink.chain.sinks import (
    ScoreReducer,
    Scores,
    Secondary,
    SecondaryReducer,
    check_epsilon,
    group_tokens,
    median_of_heads,
)
from spikesink.chain.trace import EPSILON, Hook, Mean, Reducer, reduce_windows
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy, Model
from spikesink.model.proof import (
    HOOKS,
    ROTATED,
    SCORES,
    attention_logits,
    by_head,
    proof_of,
    query_and_key,
    require,
    visible,
)
from spikesink.model.weights import Weights, require_projections


@dataclass(frozen=True)
class Geometry:
    """Queries, keys and values of every head, towards the spike tokens' keys ("spike") and others.

    "next" is the token right after a spike token, the control; "other" all that are no spike tokens. Means over windows
    and over the queries after the key; logits are what enters the softmax.
    """

    anatomy: Anatomy
    gap: Mapping[str, Float[Tensor, "layer head"]]  # logit to a "spike" or "next" key, less the mean to other keys
    cosine: Mapping[str, Float[Tensor, "layer head"]]  # of queries and keys, "spike", "next" and "other"
    query_norm: Float[Tensor, "layer head"]
    key_norm: Mapping[str, Float[Tensor, "layer kv_head"]]
    value_norm: Mapping[str, Float[Tensor, "layer kv_head"]]  # "spike", "next" and "other"
    # Effective dimension of "spike" keys, of as many others ("matched"), of "next" and of all "other" ones; "before"
    # and, where it is seen, "after" RoPE.
    dimension: Mapping[str, Mapping[str, Float[Tensor, "layer kv_head"]]]
    # Length of the mean of unit queries, 1 where all point the same way; before and after RoPE.
    consistency: Mapping[str, Float[Tensor, "layer head"]]

    def factors(self, layers: Sequence[int]) -> dict[str, Float[Tensor, " head"]]:
        """What a logit towards the spike tokens' keys is made of, |q| |k| cos, in all heads of some layers."""
        heads_per_key = self.anatomy.n_heads // self.anatomy.n_kv_heads
        factors = {
            "cosine": self.cosine["spike"],
            "query_norm": self.query_norm,
            "key_norm": self.key_norm["spike"].repeat_interleave(heads_per_key, dim=1),
        }
        return {name: values[list(layers)].flatten() for name, values in factors.items()}


@dataclass(frozen=True)
class AttentionReading:
    """What one pass of `read_attention` reads; of queries and keys nothing, where nothing spikes."""

    scores: Scores
    geometry: Geometry | NotApplicable
    secondary: Secondary | NotApplicable


def read_attention(
    model: Model,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    collapse: Collapse | NotApplicable,
    epsilon: float = EPSILON,
    seed: int = 0,
) -> AttentionReading | NotApplicable:
    """Score attention, read queries, keys and values, and find secondary sinks, in one pass over the windows.

    `collapse` gives the primary direction; without it no secondary sinks are looked for.
    """
    check_model(model, life)
    check_windows(life, tokens)
    if (why := measure(require)(model, "patterns")) is not None:
        return why
    groups = group_tokens(life)
    scores = ScoreReducer(model.anatomy, check_epsilon(epsilon), tokens.shape[1], 0, groups)
    # Where one of these does not apply, its reason stands in its place.
    geometry = measure(_GeometryReducer)(model, life, groups, seed)
    secondary = measure(SecondaryReducer)(epsilon, groups["spike"], collapse)
    reducers = [part for part in (scores, geometry, secondary) if isinstance(part, Reducer)]
    reduce_windows(model, tokens, reducers, "reading queries and keys")
    return AttentionReading(*map(measure(lambda part: part.result()), (scores, geometry, secondary)))


def layers_with_spike(life: Lifecycle) -> list[int]:
    """The layers whose attention reads the main cycle's plateau; raise NotApplicable where none does."""
    if not (layers := list(life.require_main().layers)):
        raise NotApplicable("no layer reads the plateau of the spike")
    return layers


class _GeometryReducer(Reducer):
    """The sums of `Geometry`."""

    def __init__(self, model: Model, life: Lifecycle, groups: Mapping[str, Bool[Tensor, "window position"]], seed: int):
        layers_with_spike(life)
        anatomy = model.anatomy
        require_projections(anatomy)
        require(model, "logits")
        self.turned = proof_of(model).turned
        self.anatomy, self.groups = anatomy, groups
        self.generator = torch.Generator().manual_seed(seed)
        heads, kv_heads = (anatomy.n_layers, anatomy.n_heads), (anatomy.n_layers, anatomy.n_kv_heads)
        names, stages = ("spike", "next", "other"), ("before", "after") if anatomy.sees_rotation else ("before",)
        self.gap = {name: Mean(*heads) for name in names[:2]}
        self.cosine = {name: Mean(*heads) for name in names}
        self.query_norm = Mean(*heads)
        self.key_norm, self.value_norm = ({name: Mean(*kv_heads) for name in names} for _ in range(2))
        square = (*kv_heads, anatomy.d_head, anatomy.d_head)
        self.moment = {stage: {name: torch.zeros(square) for name in (*names, "matched")} for stage in stages}
        self.unit = {stage: Mean(*heads, anatomy.d_head) for stage in stages}

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        spike, after = (self.groups[name][index] for name in ("spike", "next"))
        others = (~spike).nonzero()[:, 0]
        chosen = others[torch.randperm(len(others), generator=self.generator)[: int(spike.sum())]]
        self.mine = {"spike": spike, "next": after, "other": ~spike}
        self.matched = torch.zeros(len(window), dtype=torch.bool).index_fill(0, chosen, True)
        self.passed: dict[str, Tensor] = {}

    def hooks(self) -> list[Hook]:
        names = HOOKS | (ROTATED if self.anatomy.sees_rotation else {"scores": SCORES})
        hooks = []
        for layer in self.anatomy.attention_layers:
            hooks += [(f"blocks.{layer}.{hook}", partial(self.keep, name)) for name, hook in names.items()]
            hooks.append((self.anatomy.pattern_hooks[layer], partial(self.reduce, layer)))
        return hooks

    def keep(self, name: str, x: Tensor) -> None:
        self.passed[name] = x if name == "scores" else by_head(x, self.anatomy.d_head)

    def reduce(self, layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        """All of a layer, once its pattern is there, which comes last."""
        passed, groups = self.passed, {name: mine.to(pattern.device) for name, mine in self.mine.items()}
        for stage, q, k in zip(self.unit, ("q", "rotated_q"), ("k", "rotated_k"), strict=False):
            for name, mine in (groups | {"matched": self.matched.to(pattern.device)}).items():
                some = passed[k][:, mine]
                self.moment[stage][name][layer] += torch.einsum("hpd,hpe->hde", some, some).cpu()
            self.unit[stage].add(layer, functional.normalize(passed[q], dim=-1).transpose(0, 1))
        key_norm, value_norm = (passed[name].norm(dim=-1) for name in (k, "v"))
        for name, mine in groups.items():
            self.value_norm[name].add(layer, value_norm[:, mine].T)
            self.key_norm[name].add(layer, key_norm[:, mine].T)
        self.towards(layer, visible(pattern), passed[q], passed[k])

    def towards(self, layer: int, sees: Bool[Tensor, "query key"], q: Tensor, k: Tensor) -> None:
        """Logits and cosines towards single keys, and towards all others that a query sees."""
        anatomy, query_norm = self.anatomy, q.norm(dim=-1)
        logits = attention_logits(anatomy, q, k) if self.turned else self.passed["scores"]
        other = sees & self.mine["other"].to(sees.device)
        n_other = other.sum(-1)  # query
        per_head = k.norm(dim=-1).repeat_interleave(len(q) // len(k), dim=0)
        flat = logits if anatomy.softcap is None else attention_logits(replace(anatomy, softcap=None), q, k)
        cosines = flat / (anatomy.query_scale * query_norm[:, :, None] * per_head[:, None, :]).clamp(min=1e-30)
        to_others, cosine_others = (x.masked_fill(~other, 0).sum(-1) / n_other.clamp(min=1) for x in (logits, cosines))
        for name in ("spike", "next"):
            for key in self.mine[name].nonzero()[:, 0].tolist():
                queries = sees[:, key] & (n_other > 0)
                queries[: key + 1] = False
                self.gap[name].add(layer, (logits[:, :, key] - to_others)[:, queries].T)
                self.cosine[name].add(layer, cosines[:, queries, key].T)
                if name == "spike":
                    self.cosine["other"].add(layer, cosine_others[:, queries].T)
                    self.query_norm.add(layer, query_norm[:, queries].T)

    def result(self) -> Geometry:
        def means(by_name: dict[str, Mean]) -> dict[str, Tensor]:
            return {name: mean.result() for name, mean in by_name.items()}

        return Geometry(
            anatomy=self.anatomy,
            gap=means(self.gap),
            cosine=means(self.cosine),
            query_norm=self.query_norm.result(),
            key_norm=means(self.key_norm),
            value_norm=means(self.value_norm),
            dimension={
                stage: {name: effective_dimension(moment) for name, moment in moments.items()}
                for stage, moments in self.moment.items()
            },
            consistency={stage: mean.norm(dim=-1) for stage, mean in means(self.unit).items()},
        )


def effective_dimension(moment: Float[Tensor, "*batch d d"]) -> Float[Tensor, "*batch"]:
    """Participation ratio of the eigenvalues of a second moment sum k k': (trace M)^2 / trace M^2, 1 for one line.

    About the origin, not about the mean: keys that are one and the same vector have dimension 1.
    """
    moment = moment.double()
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1) ** 2 / moment.square().sum((-2, -1))


@measure
def describe_queries(attention: AttentionReading, life: Lifecycle) -> dict[str, float]:
    """Length of the mean unit query of a head, mean over the plateau's heads: before RoPE and, where shown, after."""
    geometry, layers = with_geometry(attention, life)
    return {when: float(lengths[layers].mean()) for when, lengths in geometry.consistency.items()}


def with_geometry(attention: AttentionReading, life: Lifecycle) -> tuple[Geometry, list[int]]:
    """The geometry, and the layers that read the plateau; raise NotApplicable where queries and keys were not read."""
    if isinstance(attention.geometry, NotApplicable):
        raise attention.geometry
    return attention.geometry, layers_with_spike(life)


@dataclass(frozen=True)
class Rebuilt:
    """Keys made of a few rows of W_K: cosine with the whole W_K h~, mean over tokens, by how many rows."""

    channels: tuple[int, ...]  # the spike channels, in the order in which their rows are added
    layers: list[int]
    spike: Float[Tensor, "row layer kv_head"]  # spike tokens
    other_tokens: Float[Tensor, "row layer kv_head"]  # the same rows, of other tokens
    other_channels: Float[Tensor, "row layer kv_head"]  # as many rows of the spike tokens' strongest other channels
    own_channels: Float[Tensor, "layer kv_head"]  # as many rows of the other tokens' own strongest channels
    with_bias: Float[Tensor, "layer kv_head"]  # all the rows and b_K, against the whole key
    bias_share: Float[Tensor, "layer kv_head"]  # |b_K| over |W_K h~ + b_K| of spike tokens


@measure
def rebuild_keys(weights: Weights, life: Lifecycle, collapse: Collapse) -> Rebuilt:
    """Rebuild the spike tokens' keys from the rows of W_K (norm's scale folded in) at the spike channels alone.

    Keys as the projection gives them: before any QK norm and RoPE.
    """
    check_model(weights, life)
    require_projections(weights.anatomy)
    require(weights, "norm", "keys")
    layers, channels = collapse.cycle.layers, list(collapse.cycle.channels)
    if not layers:
        raise NotApplicable("no layer reads the plateau")
    strongest = collapse.spike.share[collapse.cycle.middle].argsort(descending=True).tolist()
    others = [channel for channel in strongest if channel not in channels][: len(channels)]
    curves: list[list[Tensor]] = []
    for layer in layers:
        matrix, bias = (x.unflatten(0, (weights.anatomy.n_kv_heads, -1)) for x in weights.keys(layer))
        spike, other = (group.kept[:, 2 * layer] for group in (collapse.spike, collapse.other))
        own = torch.zeros_like(other).scatter(1, other.abs().topk(len(channels), dim=1).indices, 1)
        whole, rows = (_projected(matrix[..., some], spike[:, some]) for some in (slice(None), channels))
        curves.append(
            [
                _cosine_by_rows(matrix, spike, channels),
                _cosine_by_rows(matrix, other, channels),
                _cosine_by_rows(matrix, spike, others),
                _cosine(_projected(matrix, other * own), _projected(matrix, other)),
                _cosine(rows + bias, whole + bias),
                (bias.norm(dim=-1) / (whole + bias).norm(dim=-1)).mean(0),
            ]
        )
    stacked = (torch.stack(curve, dim=-2) for curve in zip(*curves, strict=True))
    return Rebuilt(collapse.cycle.channels, layers, *stacked)


def _projected(matrix: Float[Tensor, "kv_head d_head channel"], h: Float[Tensor, "token channel"]) -> Tensor:
    return torch.einsum("hkd,td->thk", matrix, h)


def _cosine(part: Float[Tensor, "*row token kv_head d_head"], whole: Float[Tensor, "token kv_head d_head"]) -> Tensor:
    return functional.cosine_similarity(part, whole, dim=-1).mean(-2)


def _cosine_by_rows(
    matrix: Float[Tensor, "kv_head d_head d_model"], h: Float[Tensor, "token d_model"], channels: list[int]
) -> Float[Tensor, "row kv_head"]:
    """Cosine of W_K h~ with what the first 1, 2, ... of these channels make of it, mean over tokens."""
    parts = torch.einsum("hkc,tc->cthk", matrix[..., channels], h[:, channels]).cumsum(0)
    return _cosine(parts, _projected(matrix, h))


@measure
def describe_bias(rebuilt: Rebuilt) -> dict[str, float]:
    """How much of the spike tokens' keys b_K is, and how well whole keys are rebuilt with it."""
    if not rebuilt.bias_share.any():
        raise NotApplicable("its keys have no bias")
    return {"share": median_of_heads(rebuilt.bias_share), "cosine": median_of_heads(rebuilt.with_bias)}


@dataclass(frozen=True)
class Cloud:
    """Queries and keys of one head, as they are scored, on their two principal axes."""

    layer: int
    head: int
    score: float  # attention that spike tokens get in this head
    is_query: Bool[Tensor, " point"]
    is_spike: Bool[Tensor, " point"]
    flat: Float[Tensor, "point 2"]
    origin: Float[Tensor, " 2"]  # where the zero vector lies
    explained: tuple[float, float]  # share of the variance along each axis


@measure
def choose_heads(attention: AttentionReading, life: Lifecycle) -> list[tuple[int, int]]:
    """The head that sinks most during the plateau, and the one of its layer that does least: (layer, head) each."""
    score, layers = attention.scores.received["spike"], layers_with_spike(life)
    layer = layers[int(score[layers].amax(1).argmax())]
    return [(layer, int(score[layer].argmax())), (layer, int(score[layer].argmin()))]


@measure
@torch.inference_mode()
def project_heads(
    model: Model,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    attention: AttentionReading,
    heads: Sequence[tuple[int, int]],
    most: int = 320,
    seed: int = 0,
) -> list[Cloud]:
    """Queries and keys of some heads, (layer, head) each, by PCA (after the paper's figure 6).

    Every spike token and others drawn at random, `most` in all. Where a family does not show them after RoPE, before.
    """
    check_windows(life, tokens)
    require_projections(model.anatomy)
    anatomy, generator = model.anatomy, torch.Generator().manual_seed(seed)
    if wrong := [at for at in heads if at[0] not in range(anatomy.n_layers) or at[1] not in range(anatomy.n_heads)]:
        raise ValueError(f"there is no layer and head {wrong[0]}; both are counted from 0.")
    names = [name for layer in {layer for layer, _ in heads} for name in query_and_key(anatomy, layer)]
    marks, points = [], {head: ([], []) for head in heads}
    for window, spikes in zip(tokens, is_spike(life, life.main), strict=True):
        others = (~spikes).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others), generator=generator)[: max(1, most // len(tokens))]]
        chosen = torch.cat([spikes.nonzero()[:, 0], drawn])
        marks.append(spikes[chosen])
        _, cache = model.run_with_cache(
            window[None].to(model.cfg.device), names_filter=names, stop_at_layer=max(heads)[0] + 1
        )
        for (layer, head), queries_and_keys in points.items():
            indices = head, head * anatomy.n_kv_heads // anatomy.n_heads
            for kept, name, index in zip(queries_and_keys, query_and_key(anatomy, layer), indices, strict=True):
                vectors = by_head(cache[name][0].float(), anatomy.d_head)
                kept.append(vectors[index].cpu()[chosen])
    is_spike_token = torch.cat(marks).repeat(2)
    is_query = torch.arange(len(is_spike_token)) < len(is_spike_token) // 2
    clouds = []
    for (layer, head), (queries, keys) in points.items():
        both = torch.cat([*queries, *keys]).numpy()
        pca = PCA(2).fit(both)
        clouds.append(
            Cloud(
                layer,
                head,
                score=float(attention.scores.received["spike"][layer, head]),
                is_query=is_query,
                is_spike=is_spike_token,
                flat=torch.from_numpy(pca.transform(both)),
                origin=torch.from_numpy(-pca.components_ @ pca.mean_),
                explained=tuple(float(share) for share in pca.explained_variance_ratio_),
            )
        )
    return clouds
