"""What normalization makes of a spike: a constant vector (the paper's section on RMSNorm).

h~ = h / sqrt(mean(h^2) + eps) is what every block reads, before the norm's learned scale. Its norm is sqrt(d_model)
whatever that of h is, so one huge entry leaves nothing for the others: h~ is bounded, sparse, and the same for every
spike token at every depth of the plateau. `replace_input` puts one fixed vector in its place.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from spikesink.chain.lifecycle import (
    Cycle,
    Lifecycle,
    check_model,
    check_windows,
    is_spike,
    right_after,
)
from spikesink.chain.trace import Mean, Reducer, reduce_windows
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Anatomy, Block, Model, normalise
from spikesink.model.proof import require
from spikesink.model.weights import Weights, require_separate_ffn

MOST_KEPT = 32  # tokens of either kind whose h~ is kept at every point
MOST_OF_A_WINDOW = 4  # of them out of one window
VARIANTS = ("clean", "replaced", "other_tokens_mean")


@dataclass(frozen=True)
class Group:
    """h~ of one kind of token, point by point."""

    n: int
    cosine: Float[Tensor, " point"]  # mean over pairs of tokens out of different windows; not a number without a pair
    cosine_rest: Float[Tensor, " point"]  # the same of h~ without the spike channels
    participation: Float[Tensor, " point"]  # participation ratio |h~|^4 / sum_k h~_k^4, mean over tokens
    largest: Float[Tensor, " point"]  # max over tokens of max_k |h~_k| / sqrt(d_model)
    smallest: Float[Tensor, " point"]  # min over tokens of the same
    share: Float[Tensor, "point d_model"]  # each channel's share of |h~|^2, mean over tokens
    mean: Float[Tensor, "half point d_model"]  # mean h~ over the even windows (0) and the odd ones (1)
    kept: Float[Tensor, "token point d_model"]  # of a few tokens, in full


@dataclass(frozen=True)
class Collapse:
    """h~ of the main cycle's spike tokens and of other tokens, at every point."""

    anatomy: Anatomy
    cycle: Cycle
    spike: Group
    other: Group  # all that are no spike tokens
    after: Group  # of those, the ones right after a spike token, at nearly its place

    @property
    def before(self) -> Block:
        """The last point before the first block that is step-up; where none is, the one before the peak."""
        return Block((self.cycle.step_up[0] if self.cycle.step_up else self.cycle.peak) - 1)

    @property
    def plateau(self) -> slice:
        """The points of the plateau."""
        return slice(self.cycle.plateau[0], self.cycle.plateau[1] + 1)

    @property
    def constant(self) -> Float[Tensor, " d_model"]:
        """The one vector: mean h~ over spike tokens and over the plateau's points."""
        return self.spike.mean.nanmean(0)[self.plateau].mean(0)

    def held_out(self, window: int, group: Group) -> Float[Tensor, " d_model"]:
        """A group's mean h~ over the plateau's points, out of the half of the windows that `window` is not in.

        As long as any h~, sqrt(d_model); not numbers where that half has no such token.
        """
        mean = group.mean[1 - window % 2, self.plateau].mean(0)
        return mean * (self.anatomy.d_model**0.5 / mean.norm())


@measure
def measure_collapse(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, seed: int = 0) -> Collapse:
    """Normalise the stream at every point, and see how alike spike tokens are, and how alike others.

    One pass; what is kept are sums, and h~ of a few tokens: of others as many as there are spike tokens in a window.
    """
    check_model(model, life)
    anatomy, cycle = model.anatomy, life.require_main()
    if anatomy.attention_norm is None:
        raise NotApplicable(f"the blocks of this {anatomy.family} model read the stream itself, not through a norm")
    require(model, "norm")
    check_windows(life, tokens)
    groups = _Groups(anatomy, life, seed)
    reduce_windows(model, tokens, [groups], "normalising the stream")
    return Collapse(anatomy, cycle, *(sums.result() for sums in groups.sums))


class _Groups(Reducer):
    """The sums of the three groups of tokens."""

    def __init__(self, anatomy: Anatomy, life: Lifecycle, seed: int):
        self.anatomy, self.spikes = anatomy, is_spike(life, life.main)
        self.generator = torch.Generator().manual_seed(seed)
        self.sums = [_Sums(anatomy, life.main.channels) for _ in range(3)]

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        where = self.spikes[index]
        spikes, others = (which.nonzero()[:, 0] for which in (where, ~where))
        kept = spikes[:MOST_OF_A_WINDOW]
        drawn = others[torch.randperm(len(others), generator=self.generator)[: len(kept)]]
        after = (right_after(where) & ~where).nonzero()[:, 0]
        self.half, self.groups = index % 2, ((spikes, kept), (others, drawn), (after, after[:0]))

    def on_stream(self, point: int, h: Float[Tensor, "token d_model"]) -> None:
        h = normalise(h, self.anatomy).cpu()
        for sums, (which, in_full) in zip(self.sums, self.groups, strict=True):
            sums.add(point, h[which], self.half, h[in_full])


class _Sums:
    """The sums of one group of tokens."""

    def __init__(self, anatomy: Anatomy, channels: tuple[int, ...]):
        n_points, d = anatomy.n_blocks + 1, anatomy.d_model
        self.channels, self.root = torch.tensor(channels), d**0.5
        self.means = [Mean(n_points, d), Mean(n_points, d)]
        self.share, self.participation = Mean(n_points, d), Mean(n_points)
        self.largest, self.smallest = torch.full((n_points,), -math.inf), torch.full((n_points,), math.inf)
        self.cosine, self.cosine_rest = PairCosine(n_points, d), PairCosine(n_points, d)
        self.kept: list[list[Tensor]] = [[] for _ in range(n_points)]

    def add(
        self, point: int, h: Float[Tensor, "token d_model"], half: int, in_full: Float[Tensor, "kept d_model"]
    ) -> None:
        if sum(map(len, self.kept[point])) < MOST_KEPT:
            self.kept[point].append(in_full)
        if not len(h):
            return
        square, size = h.square(), h.abs().amax(-1) / self.root
        self.means[half].add(point, h)
        self.share.add(point, square / square.sum(-1, keepdim=True))
        self.participation.add(point, participation_ratio(h))
        self.largest[point] = max(self.largest[point], size.max())
        self.smallest[point] = min(self.smallest[point], size.min())
        self.cosine.add(point, h)
        self.cosine_rest.add(point, h.index_fill(1, self.channels, 0))

    def result(self) -> Group:
        n = self.participation.n
        return Group(
            n=int(n[0]),
            cosine=self.cosine.result(),
            cosine_rest=self.cosine_rest.result(),
            participation=self.participation.result(),
            largest=self.largest.where(n > 0, math.nan),
            smallest=self.smallest.where(n > 0, math.nan),
            share=self.share.result(),
            mean=torch.stack([mean.result() for mean in self.means]),
            kept=torch.stack([torch.cat(tokens) for tokens in self.kept], dim=1)[:MOST_KEPT],
        )


def participation_ratio(h: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token"]:
    """Over how many channels a vector spreads: |h|^4 / sum_k h_k^4."""
    square = h.square()
    return square.sum(-1) ** 2 / square.square().sum(-1)


class PairCosine:
    """Mean cosine over pairs of vectors out of different windows, from sums: (|sum|^2 - each window's own) / pairs."""

    def __init__(self, n_points: int, d: int):
        self.sum = torch.zeros(n_points, d, dtype=torch.float64)
        self.within = torch.zeros(n_points, dtype=torch.float64)
        self.n, self.pairs_within = torch.zeros(n_points), torch.zeros(n_points)

    def add(self, point: int, h: Float[Tensor, "token d_model"]) -> None:
        """Count one window's vectors at a point."""
        window = functional.normalize(h.double(), dim=-1).sum(0)
        self.sum[point] += window
        self.within[point] += window @ window
        self.n[point] += len(h)
        self.pairs_within[point] += len(h) ** 2

    def result(self) -> Float[Tensor, " point"]:
        """The mean at each point; not a number without a pair."""
        pairs = self.n.square() - self.pairs_within
        return ((self.sum.square().sum(-1) - self.within) / pairs).where(pairs > 0, math.nan)


def closed_form(ratio: Float[Tensor, " size"], d_model: int) -> dict[str, Float[Tensor, " size"]]:
    """What h~ is like when one entry is `ratio` times the root mean square of d_model - 1 Gaussian others.

    With s the ratio and n = d_model - 1, the largest entry over sqrt(d_model) is s / sqrt(s^2 + n), the participation
    ratio (s^2 + n)^2 / (s^4 + 3 n), and the cosine between two such vectors, whose other entries are independent,
    s^2 / (s^2 + n). All that counts is s / sqrt(n): the spike against the rest of the vector, not against an entry.
    """
    square, n = ratio**2, d_model - 1
    return {
        "largest": ratio / (square + n).sqrt(),
        "participation": (square + n) ** 2 / (square**2 + 3 * n),
        "cosine": square / (square + n),
    }


def normalise_random(
    ratio: Float[Tensor, " size"], anatomy: Anatomy, n: int = 64, seed: int = 0
) -> dict[str, Float[Tensor, " size"]]:
    """The same three, measured on n random vectors that go through the norm: means over vectors and their pairs."""
    d_model = anatomy.d_model
    rest = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)[:, 1:]
    rest *= (d_model - 1) ** 0.5 / rest.norm(dim=-1, keepdim=True)
    spike = ratio.double()[:, None, None].expand(-1, n, 1)  # size, vector, channel
    h = normalise(torch.cat([spike, rest.expand(len(ratio), -1, -1)], dim=-1), anatomy)
    alike = functional.normalize(h, dim=-1).sum(1).square().sum(-1)
    return {
        "largest": h[..., 0].abs().mean(1) / d_model**0.5,
        "participation": participation_ratio(h).mean(1),
        "cosine": (alike - n) / (n * (n - 1)),
    }


def spike_ratio(collapse: Collapse) -> Float[Tensor, " point"]:
    """How large the first channel of a spike token is against the root mean square of its others, by point, median."""
    square = collapse.spike.kept.square()
    first = square[..., collapse.cycle.channel]
    return (first / ((square.sum(-1) - first) / (collapse.anatomy.d_model - 1))).sqrt().quantile(0.5, dim=0)


@dataclass(frozen=True)
class Replaced:
    """What a model does when its blocks read other vectors at the spike tokens; `VARIANTS` in order."""

    layers: list[int]  # whose reads are replaced
    n_tokens: int
    loss: Float[Tensor, " variant"]  # mean cross-entropy of the next token, in nats
    moved: Float[Tensor, "variant layer"]  # total variation distance to the clean attention, mean over heads, queries
    to_spike: Float[Tensor, "variant layer"]  # attention that the spike tokens get of later queries, the same mean

    @property
    def perplexity(self) -> Mapping[str, float]:
        """By variant."""
        return dict(zip(VARIANTS, self.loss.exp().tolist(), strict=True))


@measure
@torch.inference_mode()
def replace_input(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, collapse: Collapse) -> Replaced:
    """Let every block of the plateau's layers read one fixed vector at the spike tokens, in place of their own h~.

    Three runs of each window, side by side in one batch: as it is; with the vector (the mean h~ of the spike tokens and
    the plateau's points, of the *other* half of the windows, as long as h~); as a control, with other tokens' mean.
    """
    check_model(model, life)
    check_windows(life, tokens)
    require_separate_ffn(model.anatomy)
    model.anatomy.require_attention()
    layers, spikes = collapse.cycle.layers, is_spike(life, collapse.cycle)
    if not layers:
        raise NotApplicable("no layer reads the plateau")
    if collapse.spike.mean.isnan().any():
        raise NotApplicable(
            "each half of the windows must hold a spike token, to lend to the other; measure more windows"
        )
    if collapse.other.mean.isnan().any():
        raise NotApplicable("every token spikes, so there is no ordinary one to compare with")
    loss, (moved, to_spike) = torch.zeros(3), (Mean(model.anatomy.n_layers, 3) for _ in range(2))
    for index, window in enumerate(progress(tokens, "replacing what is read", "window")):
        vectors = torch.stack([collapse.held_out(index, group) for group in (collapse.spike, collapse.other)])
        hooks = [(name, _put(vectors, spikes[index])) for name in _norms(collapse)]
        for layer, name in enumerate(model.anatomy.pattern_hooks if spikes[index, :-1].any() else ()):
            hooks.append((name, _compare(layer, spikes[index], moved, to_spike)))
        with warnings.catch_warnings(), model.hooks(fwd_hooks=hooks):
            warnings.filterwarnings("ignore", message="A forward hook edited")  # that is what it is for
            logits = model(window.expand(3, -1).to(model.cfg.device))[:, :-1].float().cpu()
        targets = window[1:].cpu().expand(3, -1)
        loss += functional.cross_entropy(logits.transpose(1, 2), targets, reduction="none").mean(1)
    return Replaced(layers, int(spikes.sum()), loss / len(tokens), moved.result().T, to_spike.result().T)


def _put(vectors: Float[Tensor, "variant d_model"], where: Bool[Tensor, " position"]) -> Callable[..., Tensor]:
    """A hook that puts a vector at some positions of all variants but the first, which stays clean."""

    def put(h: Tensor, hook) -> Tensor:
        h = h.clone()
        h[1:, where.to(h.device)] = vectors[:, None].to(h.device, h.dtype)
        return h

    return put


def _compare(layer: int, where: Bool[Tensor, " position"], moved: Mean, to_spike: Mean) -> Callable[..., None]:
    """A hook that compares each variant's pattern with the first one's, for the queries after a spike token."""
    after = int(where.nonzero()[0]) + 1

    def compare(pattern: Tensor, hook) -> None:
        pattern = pattern[:, :, after:].float()  # variant, head, query, key
        moved.add(layer, (pattern - pattern[:1]).abs().sum(-1).mean((1, 2))[None] / 2)
        to_spike.add(layer, pattern[..., where.to(pattern.device)].sum(-1).mean((1, 2))[None])

    return compare


def _norms(collapse: Collapse) -> list[str]:
    """The hooks of all norms that read a point of the plateau; a parallel FFN reads what attention does."""
    anatomy, last, names = collapse.anatomy, collapse.cycle.plateau[1], []
    for layer in collapse.cycle.layers:
        names.append(f"blocks.{layer}.{anatomy.attention_norm}.hook_normalized")
        reads = 2 * layer if anatomy.parallel else 2 * layer + 1
        if anatomy.ffn_norm != anatomy.attention_norm and reads <= last:
            names.append(f"blocks.{layer}.{anatomy.ffn_norm}.hook_normalized")
    return names


@measure
def scale_at_spike(weights: Weights, life: Lifecycle) -> Float[Tensor, " layer"]:
    """The learned scale of each layer's attention norm at the first channel, over the median of its sizes; by layer."""
    cycle = life.require_main()
    scales = torch.stack([weights.norm_scale(layer).abs() for layer in range(weights.anatomy.n_layers)])
    return scales[:, cycle.channel] / scales.quantile(0.5, dim=1)
