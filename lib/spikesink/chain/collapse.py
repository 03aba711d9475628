"""What normalization makes of a spike: a constant vector (the paper's section on RMSNorm).

h~ = h / sqrt(mean(h^2) + eps) is what every block reads, before the norm's learned scale. Its norm is sqrt(d_model)
whatever that of h is, so one huge entry leaves nothing for the others: h~ is bounded, sparse, and the same for every
spike token at every depth of the plateau. `implicit_parameter` puts one fixed vector in its place.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.lifecycle import (
    Cycle,
    Lifecycle,
    check_model,
    check_windows,
    is_spike,
    plateau_layers,
    right_after,
)
from spikesink.chain.trace import follow
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Anatomy, normalise
from spikesink.model.weights import Weights, require_separate_ffn

MOST_KEPT = 32  # tokens of either kind whose h~ is kept at every point


MOST_OF_A_WINDOW = 4  # of them out of one window


INDIFFERENT = 0.01  # NM5's rule must be one that the control can break


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
    """What `measure_collapse` measures: h~ of the main cycle's spike tokens and of other tokens, at every point."""

    anatomy: Anatomy
    cycle: Cycle
    spike: Group
    other: Group  # all that are no spike tokens
    after: Group  # of those, the ones right after a spike token, at nearly its place

    @property
    def before(self) -> int:
        """The last point before the first block that is step-up; where none is, the one before the peak."""
        return (self.cycle.step_up[0] if self.cycle.step_up else self.cycle.peak) - 1

    @property
    def plateau(self) -> slice:
        """The plateau's points."""
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


def measure_collapse(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], life: Lifecycle, seed: int = 0
) -> Collapse | NotApplicable:
    """Normalise the stream at every point, and see how alike spike tokens are, and how alike others.

    One pass; what is kept are sums, and h~ of a few tokens.

    Args:
        model: as `load` returns it.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        seed: of the other tokens that are kept, as many of each window as there are spike tokens of it.

    Returns:
        The measures, or why there are none: nothing spikes, or blocks read the stream with no norm before them.

    Raises:
        ValueError: `life` was found in other windows or in another model.
    """
    about, cycle = life.trace.anatomy, life.main
    check_model(model, life)
    if cycle is None:
        return NotApplicable(life.reason)
    if about.attention_norm is None:
        return NotApplicable(f"the blocks of this {about.family} model read the stream itself, not through a norm")
    if about.norm == "tanh":
        return NotApplicable(f"the blocks of this {about.family} model read the stream through DynamicTanh, not a norm")
    check_windows(life, tokens)
    generator = torch.Generator().manual_seed(seed)
    sums = [_Sums(about, cycle.channels) for _ in range(3)]
    for index, (window, where) in enumerate(
        zip(progress(tokens, "normalising the stream", "window"), is_spike(life, cycle), strict=True)
    ):
        kept = where.nonzero()[:MOST_OF_A_WINDOW, 0]
        others = (~where).nonzero()[:, 0]
        drawn = others[torch.randperm(len(others), generator=generator)[: len(kept)]]
        after = right_after(where) & ~where
        sides = list(zip(sums, (where, ~where, after), (kept, drawn, drawn[:0]), strict=True))

        def on_stream(point: int, h: Float[Tensor, "token d_model"], sides=sides, half=index % 2) -> None:
            h = normalise(h, about).cpu()
            for side, mine, in_full in sides:
                side.add(point, h[mine], h[in_full], half)

        follow(model, window, on_stream)
        for side, *_ in sides:
            side.end_of_window()
    return Collapse(about, cycle, *(side.group() for side in sums))


class _Sums:
    """The sums of one kind of token, while windows stream by."""

    def __init__(self, about: Anatomy, channels: Sequence[int]):
        n_points, d = about.n_blocks + 1, about.d_model
        self.channels, self.root = list(channels), d**0.5
        self.counts = torch.zeros(2, n_points)
        self.mean = torch.zeros(2, n_points, d)
        self.share = torch.zeros(n_points, d)
        self.participation = torch.zeros(n_points)
        self.largest, self.smallest = torch.zeros(n_points), torch.full((n_points,), math.inf)
        self.alike = [_Alike(n_points, d), _Alike(n_points, d)]
        self.kept: list[list[Tensor]] = []
        self.now: list[Tensor] = []

    def add(
        self, point: int, h: Float[Tensor, "token d_model"], in_full: Float[Tensor, "kept d_model"], half: int
    ) -> None:
        self.now.append(in_full)
        if not len(h):
            return
        square = h.square()
        size = h.abs().amax(-1) / self.root
        self.counts[half, point] += len(h)
        self.mean[half, point] += h.sum(0)
        self.share[point] += (square / square.sum(-1, keepdim=True)).sum(0)
        self.participation[point] += _participation(h).sum()
        self.largest[point] = max(self.largest[point], size.max())
        self.smallest[point] = min(self.smallest[point], size.min())
        rest = h.clone()
        rest[:, self.channels] = 0
        for alike, vectors in zip(self.alike, (h, rest), strict=True):
            alike.add(point, vectors)

    def end_of_window(self) -> None:
        if sum(len(tokens[0]) for tokens in self.kept) < MOST_KEPT:
            self.kept.append(self.now)
        self.now = []

    def group(self) -> Group:
        n = self.counts.sum(0)
        return Group(
            n=int(n[0]),
            cosine=self.alike[0].cosine(),
            cosine_rest=self.alike[1].cosine(),
            participation=self.participation / n,
            largest=self.largest.where(n > 0, math.nan),
            smallest=self.smallest.where(n > 0, math.nan),
            share=self.share / n[:, None],
            mean=self.mean / self.counts[..., None],
            kept=torch.cat([torch.stack(points, dim=1) for points in self.kept])[:MOST_KEPT],
        )


def _participation(h: Float[Tensor, "*token d_model"]) -> Float[Tensor, "*token"]:
    """Over how many channels a vector spreads: |h|^4 / sum_k h_k^4."""
    square = h.square()
    return square.sum(-1) ** 2 / square.square().sum(-1)


class _Alike:
    """Mean cosine over pairs of vectors out of different windows, from sums: (|sum|^2 - each window's own) / pairs."""

    def __init__(self, n_points: int, d: int):
        self.sum = torch.zeros(n_points, d, dtype=torch.float64)
        self.within = torch.zeros(n_points, dtype=torch.float64)
        self.n, self.pairs_within = torch.zeros(n_points), torch.zeros(n_points)

    def add(self, point: int, h: Float[Tensor, "token d_model"]) -> None:
        window = functional.normalize(h.double(), dim=-1).sum(0)
        self.sum[point] += window
        self.within[point] += window @ window
        self.n[point] += len(h)
        self.pairs_within[point] += len(h) ** 2

    def cosine(self) -> Float[Tensor, " point"]:
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
    """The same three, measured on random vectors that go through the norm: means over n vectors and their pairs."""
    rest = torch.randn(n, anatomy.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    rest[:, 0] = 0
    rest *= (anatomy.d_model - 1) ** 0.5 / rest.norm(dim=-1, keepdim=True)
    found: dict[str, list[Tensor]] = {"largest": [], "participation": [], "cosine": []}
    for size in ratio.double():
        rest[:, 0] = size
        h = normalise(rest, anatomy)
        cosines = functional.normalize(h, dim=-1) @ functional.normalize(h, dim=-1).T
        found["largest"].append(h[:, 0].abs().mean() / anatomy.d_model**0.5)
        found["participation"].append(_participation(h).mean())
        found["cosine"].append((cosines.sum() - cosines.trace()) / (n * (n - 1)))
    return {name: torch.stack(values) for name, values in found.items()}


def spike_ratio(found: Collapse) -> Float[Tensor, " point"]:
    """How large the first channel of a spike token is against the root mean square of its others, by point, median."""
    square = found.spike.kept.square()
    first = square[..., found.cycle.channel]
    return (first / ((square.sum(-1) - first) / (found.anatomy.d_model - 1))).sqrt().quantile(0.5, dim=0)


@dataclass(frozen=True)
class Replaced:
    """What a model does when spike tokens' h~ is put out of its hand; `VARIANTS` in order."""

    layers: range  # whose reads are replaced
    n_tokens: int
    loss: Float[Tensor, " variant"]  # mean cross-entropy of the next token, in nats
    moved: Float[Tensor, "variant layer"]  # total variation distance to the clean attention, mean over heads, queries
    to_spike: Float[Tensor, "variant layer"]  # attention that the spike tokens get of later queries, the same mean

    @property
    def perplexity(self) -> Mapping[str, float]:
        """By variant."""
        return dict(zip(VARIANTS, self.loss.exp().tolist(), strict=True))


@measure
def replace_input(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], life: Lifecycle, found: Collapse
) -> Replaced | NotApplicable:
    """Let every block of the plateau's layers read one fixed vector at the spike tokens, in place of their own h~.

    Three runs of each window, side by side in one batch: as it is; with the vector (the mean h~ of the spike tokens and
    the plateau's points, of the *other* half of the windows, as long as h~); as a control, with other tokens' mean.

    Args:
        model: as `load` returns it.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        found: as `measure_collapse` returns it.

    Returns:
        The measures, or why there are none: a half of the windows has no spike token, or no layer reads the plateau.

    Raises:
        ValueError: `life` was found in other windows or in another model.
    """
    check_model(model, life)
    check_windows(life, tokens)
    layers = plateau_layers(found.cycle)
    where = is_spike(life, found.cycle)
    require_separate_ffn(found.anatomy)
    if not layers:
        return NotApplicable("no layer reads the plateau")
    if found.spike.mean.isnan().any():
        return NotApplicable(
            "each half of the windows must hold a spike token, to lend to the other; measure more windows"
        )
    if found.other.mean.isnan().any():
        return NotApplicable("every token spikes, so there is no ordinary one to compare with")
    seen = _Seen(found.anatomy.n_layers)
    for index, window in enumerate(progress(tokens, "replacing what is read", "window")):
        vectors = torch.stack([found.held_out(index, group) for group in (found.spike, found.other)])
        with _reading(model, found, where[index], vectors, seen):
            logits = model(window.expand(len(VARIANTS), -1).to(model.cfg.device))
        for variant, of in enumerate(logits):
            seen.loss[variant] += functional.cross_entropy(of[:-1].float().cpu(), window[1:].cpu())
    return Replaced(
        layers=layers,
        n_tokens=int(where.sum()),
        loss=seen.loss / len(tokens),
        moved=seen.moved / seen.n,
        to_spike=seen.to_spike / seen.n,
    )


class _Seen:
    """Sums over windows of what `replace` measures."""

    def __init__(self, n_layers: int):
        self.loss = torch.zeros(len(VARIANTS))
        self.moved, self.to_spike = torch.zeros(2, len(VARIANTS), n_layers)
        self.n = 0


@contextmanager
def _reading(
    model: TransformerBridge,
    found: Collapse,
    where: Bool[Tensor, " position"],
    vectors: Float[Tensor, "variant d_model"],
    seen: _Seen,
) -> Iterator[None]:
    """Hooks that put each variant's vector at the spike tokens, and compare its attention with the clean run's."""
    patterns = found.anatomy.pattern_hooks

    def put(h, hook):
        h = h.clone()
        for variant, vector in enumerate(vectors, start=1):
            h[variant, where.to(h.device)] = vector.to(h.device, h.dtype)
        return h

    def compare(pattern, hook):
        layer, after = patterns.index(hook.name), slice(int(where.nonzero()[0]) + 1, None)
        pattern = pattern[:, :, after].float()  # variant, head, query, key
        moved = (pattern - pattern[:1]).abs().sum(-1) / 2
        seen.moved[:, layer] += moved.mean((1, 2)).cpu()
        seen.to_spike[:, layer] += pattern[..., where.to(pattern.device)].sum(-1).mean((1, 2)).cpu()

    hooks = [(name, put) for name in _norms(found)]
    if where[:-1].any():
        seen.n += 1
        hooks += [(name, compare) for name in patterns]
    with warnings.catch_warnings(), torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        warnings.filterwarnings("ignore", message="A forward hook edited")  # that is what it is for
        yield


def _norms(found: Collapse) -> list[str]:
    """The hooks of all norms that read a point of the plateau; a parallel FFN reads what attention does."""
    about, last, names = found.anatomy, found.cycle.plateau[1], []
    for layer in plateau_layers(found.cycle):
        names.append(f"blocks.{layer}.{about.attention_norm}.hook_normalized")
        reads = 2 * layer if about.parallel else 2 * layer + 1
        if about.ffn_norm != about.attention_norm and reads <= last:
            names.append(f"blocks.{layer}.{about.ffn_norm}.hook_normalized")
    return names


def scale_at_spike(weights: Weights, life: Lifecycle) -> Float[Tensor, " layer"] | NotApplicable:
    """The learned scale of each layer's attention norm at the first channel, over the median of its sizes; by layer."""
    if life.main is None:
        return NotApplicable(life.reason)
    scales = torch.stack([weights.norm_scale(layer).abs() for layer in range(weights.anatomy.n_layers)])
    return scales[:, life.main.channel] / scales.quantile(0.5, dim=1)
