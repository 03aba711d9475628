"""TODO."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial, wraps

import torch
from jaxtyping import Bool, Float, Int
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.collapse import Collapse
from spikesink.chain.lifecycle import Lifecycle, check_model, check_windows, is_spike, plateau_layers
from spikesink.chain.sinks import (
    Scores,
    Secondary,
    _checked,
    _median,
    _over,
    _Reducer,
    _Scores,
    _Secondary,
    group_tokens,
)
from spikesink.chain.trace import EPSILON, follow
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy
from spikesink.model.weights import Weights, require_projections

HOOKS = {
    "q": "attn.q.hook_out",
    "k": "attn.k.hook_out",
    "v": "attn.v.hook_out",
    "rotated_q": "attn.hook_rot_q",  # these two where `Anatomy.sees_rotation`
    "rotated_k": "attn.hook_rot_k",
}


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
    # Effective dimension of "spike" keys, of as many others ("matched"), of "next" and of all "other" ones; by when.
    dimension: Mapping[str, Mapping[str, Float[Tensor, "layer kv_head"]]]
    # Length of the mean of unit queries, 1 where all point the same way; by when.
    consistency: Mapping[str, Float[Tensor, "layer head"]]


@dataclass(frozen=True)
class AttentionReading:
    """What one pass of `read_attention` sees; of queries and keys nothing, where nothing spikes."""

    scores: Scores
    geometry: Geometry | NotApplicable
    secondary: Secondary | NotApplicable


def read_attention(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    found: Collapse | NotApplicable,
    epsilon: float = EPSILON,
    seed: int = 0,
) -> AttentionReading:
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
    check_model(model, life)
    check_windows(life, tokens)
    about, named = life.trace.anatomy, group_tokens(life)
    scores = _Scores(about, _checked(epsilon), tokens.shape[1], 0, named)
    reason = _nothing_to_read(life) or _no_keys(about)
    geometry = _Geometry(about, named, seed) if reason is None else reason
    others = found if isinstance(found, NotApplicable) else _Secondary(about, epsilon, named["spike"], found)
    reducers = [scores, *(part for part in (geometry, others) if isinstance(part, _Reducer))]
    _over(model, about, tokens, reducers, "looking at queries and keys")
    return AttentionReading(
        scores.result(), *(p if isinstance(p, NotApplicable) else p.result() for p in (geometry, others))
    )


def _nothing_to_read(life: Lifecycle) -> NotApplicable | None:
    """Why no layer's attention meets a spike, or None where one does."""
    if life.main is None:
        return NotApplicable(life.reason)
    return None if plateau_layers(life.main) else NotApplicable("no layer reads the plateau of the spike")


@measure
def _no_keys(about: Anatomy) -> NotApplicable | None:
    """Why queries, keys and values are not to be seen, or None where they are."""
    require_projections(about)


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
            anatomy=self.about,
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


def _where_there_is_a_spike(measure):
    """A measure of a look and a life cycle, or the reason why no layer meets a spike."""

    @wraps(measure)
    def measured(seen: AttentionReading, life: Lifecycle):
        return _nothing_to_read(life) or measure(seen, life)

    return measured


def _where_keys_are_seen(measure):
    """A measure of queries, keys or values, or the reason why there are none to be seen."""

    @wraps(measure)
    def measured(seen: AttentionReading, life: Lifecycle):
        return seen.geometry if isinstance(seen.geometry, NotApplicable) else measure(seen, life)

    return measured


def factors(geometry: Geometry, layers: Sequence[int]) -> dict[str, Float[Tensor, " head"]]:
    """What a logit towards the spike tokens' keys is made of, |q| |k| cos, in every head of some layers, in order."""
    heads_per_key = geometry.anatomy.n_heads // geometry.anatomy.n_kv_heads
    found = {
        "cosine": geometry.cosine["spike"],
        "query_norm": geometry.query_norm,
        "key_norm": geometry.key_norm["spike"].repeat_interleave(heads_per_key, dim=1),
    }
    return {name: of[list(layers)].flatten() for name, of in found.items()}


@_where_keys_are_seen
def describe_queries(seen: AttentionReading, life: Lifecycle) -> dict[str, float] | NotApplicable:
    """Length of the mean unit query of a head, mean over the plateau's heads: before RoPE and, where shown, after."""
    layers = list(plateau_layers(life.main))
    return {when: float(of[layers].mean()) for when, of in seen.geometry.consistency.items()}


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


@measure
def rebuild_keys(weights: Weights, life: Lifecycle, found: Collapse | NotApplicable) -> Rebuilt | NotApplicable:
    """Rebuild the spike tokens' keys from the rows of W_K (norm's scale folded in) at the spike channels alone.

    Keys as the projection gives them: before any QK norm and RoPE.

    Args:
        weights: of the model (`weights_of`).
        life: as `find_lifecycle` returns it.
        found: as `collapse` returns it: h~ of some spike tokens and of as many others.

    Raises:
        ValueError: `life` was found in another model.
    """
    check_model(weights, life)
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
        matrix, bias = (x.unflatten(0, (found.anatomy.n_kv_heads, -1)) for x in (matrix, bias))
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


@measure
def describe_bias(rebuilt: Rebuilt) -> dict[str, float] | NotApplicable:
    """How much of the spike tokens' keys b_K is, and how well whole keys are rebuilt with it; or that there is none."""
    if not rebuilt.bias_share.any():
        return NotApplicable("its keys have no bias")
    return {"share": _median(rebuilt.bias_share), "cosine": _median(rebuilt.with_bias)}


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
def choose_heads(seen: AttentionReading, life: Lifecycle) -> list[tuple[int, int]] | NotApplicable:
    """The head that sinks most during the plateau, and the one of its layer that does least: (layer, head) each."""
    score, layers = seen.scores.received["spike"], list(plateau_layers(life.main))
    layer = layers[int(score[layers].amax(1).argmax())]
    return [(layer, int(score[layer].argmax())), (layer, int(score[layer].argmin()))]


@measure
def project_heads(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    seen: AttentionReading,
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
        follow(model, window, also=hooks)
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
