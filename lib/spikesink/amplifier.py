"""The gated FFN as a directional quadratic amplifier (the paper's section on SwiGLU), from its weights alone.

With g_i and u_i the rows of the gate and up matrices, w_i the down projection's row of channel k, and the norm's scale
folded in, the block writes F_k = sum_i w_i act(g_i . h~) (u_i . h~). Where act is close to the identity, that is the
quadratic form h~' S_k h~ with U_k = sum_i w_i g_i u_i' and S_k = (U_k + U_k') / 2; and where one eigenvalue lambda of
S_k, with eigenvector s*, outweighs the others, it is lambda (s* . h~)^2 = lambda d cos^2(s*, h~), as |h~|^2 = d.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.claims import Evidence, NotApplicable, evidence, where_applicable
from spikesink.lifecycle import Lifecycle, block_kind, block_layer, check_model, check_windows, first_step_up, is_spike
from spikesink.models import anatomy
from spikesink.progress import progress
from spikesink.weights import FFN, Weights, no_form

KERNEL = 2**22  # entries of a d_mlp x d_mlp kernel that are held at a time


def write(ffn: FFN, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What the block writes, exactly, before any norm of its output: F(h~)."""
    hidden = ffn.activation(h @ ffn.gate.T + ffn.gate_bias) * (h @ ffn.up.T + ffn.up_bias)
    return functional.linear(hidden, ffn.down, ffn.down_bias)


def quadratic(ffn: FFN, h: Float[Tensor, "*batch d_model"], channel: int) -> Float[Tensor, "*batch"]:
    """h~' S_k h~: what the block would write into a channel if its activation were the identity (and had no bias)."""
    return ((h @ ffn.gate.T) * (h @ ffn.up.T)) @ ffn.down[_checked(ffn, channel)]


def form(ffn: FFN, channel: int) -> Float[Tensor, "d_model d_model"]:
    """S_k, whole: d_model squared numbers. `operator` needs none of them."""
    u = torch.einsum("m,md,me->de", ffn.down[_checked(ffn, channel)], ffn.gate, ffn.up)
    return (u + u.T) / 2


def operator(ffn: FFN, channel: int) -> LinearOperator:
    """S_k as a LinearOperator in float64, without forming it: two products with the gate, two with the up matrix."""
    w = ffn.down[_checked(ffn, channel)].double().numpy()
    gate, up = ffn.gate.double().numpy(), ffn.up.double().numpy()

    def product(v: np.ndarray) -> np.ndarray:
        v = v.ravel()
        return (gate.T @ (w * (up @ v)) + up.T @ (w * (gate @ v))) / 2

    return LinearOperator(2 * (gate.shape[1],), matvec=product, rmatvec=product, dtype=np.float64)


@dataclass(frozen=True)
class Eigenpairs:
    """The eigenvalues of S_k that are largest in size, the largest first, with their eigenvectors as columns."""

    values: Float[Tensor, " pair"]
    vectors: Float[Tensor, "d_model pair"]


def eigenpairs(ffn: FFN, channel: int, n: int = 2) -> Eigenpairs:
    """The n eigenpairs of S_k of largest size, by Lanczos on `operator`.

    Raises:
        ValueError: the model has no such channel, or not so many eigenvalues.
    """
    d = ffn.gate.shape[1]
    if not isinstance(n, Integral) or isinstance(n, bool) or not 0 < n < d:
        raise ValueError(f"{n} eigenpairs were asked for, and Lanczos finds 1 to {d - 1} of {d}.")
    start, of = np.random.default_rng(0).standard_normal(d), operator(ffn, channel)  # so that signs and digits repeat
    if not (of @ start).any():  # a channel that no neuron writes into, where Lanczos has nothing to begin with
        return Eigenpairs(torch.zeros(n, dtype=torch.float64), torch.eye(d, n, dtype=torch.float64))
    values, vectors = eigsh(of, k=n, which="LM", v0=start)
    order = np.argsort(-np.abs(values))
    return Eigenpairs(torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy()))


def gains(ffn: FFN) -> Float[Tensor, " d_model"]:
    """||U_k||_F of every channel at once, without forming any of them.

    ||U_k||_F^2 = w' ((G G') o (U U')) w with w = down[k, :]; some rows of the d_mlp x d_mlp kernel are made at a time.
    """
    squares = torch.zeros(ffn.down.shape[0], dtype=torch.float64)
    for some in _rows_of_kernel(ffn):
        kernel = (ffn.gate[some] @ ffn.gate.T).mul_(ffn.up[some] @ ffn.up.T)
        squares += (ffn.down[:, some] @ kernel).mul_(ffn.down).sum(1, dtype=torch.float64)
    return squares.clamp(min=0).sqrt()


def _rows_of_kernel(ffn: FFN) -> list[slice]:
    m = len(ffn.gate)
    rows = max(1, KERNEL // m)
    return [slice(i, i + rows) for i in range(0, m, rows)]


def form_norms(ffn: FFN, channels: Sequence[int]) -> Float[Tensor, " channel"]:
    """||S_k||_F, whose square is (||U_k||_F^2 + tr(U_k^2)) / 2 and the sum of all squared eigenvalues."""
    w = ffn.down[[_checked(ffn, channel) for channel in channels]].double()
    gate, up = ffn.gate.double(), ffn.up.double()
    squares = torch.zeros(len(w), dtype=torch.float64)
    for some in _rows_of_kernel(ffn):
        kernel = (gate[some] @ gate.T).mul_(up[some] @ up.T)
        kernel += (up[some] @ gate.T).mul_(gate[some] @ up.T)
        squares += (w[:, some] @ kernel).mul_(w).sum(1)
    return (squares / 2).clamp(min=0).sqrt()


@dataclass(frozen=True)
class Directions:
    """The top eigenpair of each of several channels' S_k: lambda, s* (a unit vector), and ||S_k||_F beside it."""

    channels: tuple[int, ...]
    values: Float[Tensor, " channel"]
    vectors: Float[Tensor, "channel d_model"]
    norms: Float[Tensor, " channel"]

    @property
    def shares(self) -> Float[Tensor, " channel"]:
        """The first eigenvalue's share of the sum of the squares of all."""
        return (self.values / self.norms) ** 2


def directions(ffn: FFN, channels: Sequence[int]) -> Directions:
    """The top eigenpairs of several channels of one block.

    Raises:
        ValueError: the model has no such channel.
    """
    exact = ffn.to(torch.float64)  # once, not for every channel
    pairs = [eigenpairs(exact, channel, 1) for channel in progress(channels, "finding directions", "channel")]
    return Directions(
        tuple(channels),
        torch.cat([pair.values for pair in pairs]) if pairs else torch.zeros(0),
        torch.cat([pair.vectors.T for pair in pairs]).float() if pairs else torch.zeros(0, ffn.gate.shape[1]),
        form_norms(exact, channels),
    )


@dataclass(frozen=True)
class Census:
    """||U_k||_F of every channel of every FFN block: what the weights alone say about where a spike can be written.

    Where a block's output passes a norm of its own, this is before it: that norm divides the size of the output out.
    """

    blocks: Int[Tensor, " ffn"]  # as the paper counts them: 2, 4, ...
    gain: Float[Tensor, "ffn d_model"]

    def top(self, n: int) -> list[tuple[int, int, float]]:
        """The n pairs of largest gain, the largest first: block, channel, gain."""
        values, where = self.gain.flatten().topk(min(n, self.gain.numel()))
        rows, channels = where // self.gain.shape[1], where % self.gain.shape[1]
        return [(int(self.blocks[r]), int(c), float(v)) for r, c, v in zip(rows, channels, values, strict=True)]

    def rank(self, block: int, channel: int) -> int:
        """The place of a pair among all pairs, 1 for the largest gain.

        Raises:
            ValueError: the census has no such block or channel.
        """
        return int((self.gain > self._of(block, channel)[channel]).sum()) + 1

    def rank_in_block(self, block: int, channel: int) -> int:
        """The place of a channel within its block, 1 for the largest gain; raises what `rank` does."""
        of_block = self._of(block, channel)
        return int((of_block > of_block[channel]).sum()) + 1

    def over_median(self, block: int, channel: int) -> float:
        """A channel's gain over the median gain of its block; raises what `rank` does."""
        of_block = self._of(block, channel)
        return float(of_block[channel] / of_block.median())

    def _of(self, block: int, channel: int) -> Float[Tensor, " d_model"]:
        if block not in self.blocks.tolist() or not 0 <= channel < self.gain.shape[1]:
            raise ValueError(
                f"block {block}, channel {channel} is not among the FFN blocks 2, 4, ..., {int(self.blocks[-1])} "
                f"with channels 0 to {self.gain.shape[1] - 1}."
            )
        return self.gain[self.blocks.tolist().index(block)]


def census(weights: Weights, layers: Sequence[int] | None = None) -> Census | NotApplicable:
    """Measure every channel of every FFN block, a layer at a time, without running any text.

    Args:
        weights: of a loaded model (`weights_of`), or read as they are needed (`open_weights`).
        layers: only these, from 0; by default all.

    Returns:
        The census, or why there is none: the model's FFN is not one gated FFN.

    Raises:
        ValueError: these are no weights, or the model has no such layer.
        FloatingPointError: a weight is not finite.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"a census is of weights, not of a {type(weights).__name__}; give weights_of(model).")
    if (reason := no_form(weights.anatomy)) is not None:
        return NotApplicable(reason)
    layers = range(weights.anatomy.n_layers) if layers is None else layers
    rows = []
    for layer in progress(layers, "weighing FFN blocks", "block"):
        rows.append(gains(weights.ffn(layer)).float())
    return Census(torch.tensor([2 * layer + 2 for layer in layers]), torch.stack(rows))


def step_up_direction(weights: Weights, life: Lifecycle) -> Float[Tensor, " d_model"] | NotApplicable:
    """s* of the first step-up block's first channel, from the weights; or why there is none."""
    block = _block_to_read(weights, life)
    if isinstance(block, NotApplicable):
        return block
    return eigenpairs(weights.ffn(block_layer(block)), life.main.channel, 1).vectors[:, 0].float()


def _block_to_read(weights: Weights, life: Lifecycle) -> int | NotApplicable:
    """The first step-up block; or why there is none to take apart."""
    check_model(life, weights.anatomy)
    reason = no_form(weights.anatomy)
    return first_step_up(life) if reason is None else NotApplicable(reason)


@dataclass(frozen=True)
class Reading:
    """What a step-up block does to every token, in the spike's first channel; `read` makes it.

    Writes are before any norm of the block's output.
    """

    block: int
    channel: int
    d_model: int
    ffn: FFN
    pairs: Eigenpairs  # the first two of the first channel
    spike: Directions  # of the spike channels, the first channel's first
    ordinary: Directions  # of channels drawn at random
    is_spike: Bool[Tensor, "window position"]
    h: Float[Tensor, "spike d_model"]  # h~ of the spike tokens
    own: Float[Tensor, "window position"]  # what the model's own block writes
    write: Float[Tensor, "window position"]  # the same from `FFN`
    quadratic: Float[Tensor, "window position"]  # h~' S_k h~
    rank_one: Float[Tensor, "window position"]  # lambda (s*.h~)^2
    cosine: Float[Tensor, "window position"]  # cos(s*, h~), with the sign of s* that makes spike tokens' positive
    silu_cosine: Float[Tensor, "window position"]  # cos(act(g), g) over all neurons
    silu_ratio: Float[Tensor, "window position"]  # |act(g)| / |g|
    weighted_cosine: Float[Tensor, "window position"]  # the same cosine, each neuron by |what it adds to the channel|
    largest: Float[Tensor, "window position"]  # max over channels of |the block's output|
    size: Float[Tensor, "window position"]  # its norm

    @property
    def closed_form(self) -> Float[Tensor, "window position"]:
        """Lambda d cos^2(s*, h~)."""
        return float(self.pairs.values[0]) * self.d_model * self.cosine**2


def read(
    model: TransformerBridge,
    weights: Weights,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    block: int | None = None,
) -> Reading | NotApplicable:
    """Run the windows up to a step-up block and see what it does to each token.

    Args:
        model: as `load` returns it.
        weights: its weights (`weights_of`).
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        block: another FFN block than the main cycle's first step-up block.

    Returns:
        The reading, or why there is none: no spike, no gate, or no FFN block that writes it.

    Raises:
        ValueError: `block` is no FFN block of this model, or `life` was found in other windows or in another model.
    """
    about, main = weights.anatomy, life.main
    check_model(life, anatomy(model))
    check_windows(life, tokens)
    if block is not None and not (block_kind(block) == "FFN" and 0 < block <= about.n_blocks):
        raise ValueError(f"block {block} is not among the FFN blocks 2, 4, ..., {about.n_blocks}.")
    first = _block_to_read(weights, life)
    if isinstance(first, NotApplicable):
        return first
    block = block or first
    ffn = weights.ffn(block_layer(block))
    pairs = eigenpairs(ffn, main.channel)
    seen: dict[str, list[Tensor]] = {}
    spiking, drawn = is_spike(life, main), life.trace.channels[life.trace.ordinary].tolist()
    for window, where in zip(progress(tokens, "reading the step-up block", "window"), spiking, strict=True):
        [(h, own)] = _passing(model, about.ffn_norm, [block_layer(block)], window)
        found = _measures(ffn, main.channel, pairs, h)
        for name, values in {"h": h[where], "own": own[:, main.channel], **found}.items():
            seen.setdefault(name, []).append(values)
    side = math.copysign(1, median(torch.stack(seen["cosine"])[spiking]))
    seen["cosine"] = [side * cosine for cosine in seen["cosine"]]
    return Reading(
        block=block,
        channel=main.channel,
        d_model=about.d_model,
        ffn=ffn,
        pairs=pairs,
        spike=directions(ffn, (main.channel, *(c for c in main.channels if c != main.channel))),
        ordinary=directions(ffn, [c for c in drawn if ffn.down[c].any()]),  # a row of zeros has no direction
        is_spike=spiking,
        h=torch.cat(seen.pop("h")),
        **{name: torch.stack(values) for name, values in seen.items()},
    )


def _passing(
    model: TransformerBridge, norm: str | None, layers: Sequence[int], window: Int[Tensor, " position"]
) -> list[tuple[Float[Tensor, "position d_model"], Float[Tensor, "position d_model"]]]:
    """What enters each layer's FFN (h~, or the stream itself where no norm stands before it) and what comes out."""
    seen = {}
    enters, leaves = f"{norm}.hook_normalized" if norm else "mlp.hook_in", "mlp.hook_out"
    names = [(f"blocks.{layer}.{enters}", f"blocks.{layer}.{leaves}") for layer in layers]
    hooks = [(name, lambda value, hook: seen.update({hook.name: value})) for pair in names for name in pair]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        model(window[None].to(model.cfg.device), stop_at_layer=max(layers) + 1)
    return [tuple(seen[name][0].float().cpu() for name in pair) for pair in names]


def _measures(
    ffn: FFN, channel: int, pairs: Eigenpairs, h: Float[Tensor, "position d_model"]
) -> dict[str, Float[Tensor, " position"]]:
    gate, up = functional.linear(h, ffn.gate, ffn.gate_bias), functional.linear(h, ffn.up, ffn.up_bias)
    active = ffn.activation(gate)
    out = functional.linear(active * up, ffn.down, ffn.down_bias)
    along = h @ pairs.vectors[:, 0].float()
    return {
        "write": out[:, channel],
        "quadratic": quadratic(ffn, h, channel),
        "rank_one": float(pairs.values[0]) * along**2,
        "cosine": along / h.norm(dim=-1),
        "silu_cosine": functional.cosine_similarity(active, gate, dim=-1),
        "silu_ratio": active.norm(dim=-1) / gate.norm(dim=-1),
        "weighted_cosine": _weighted_cosine(active, gate, ffn.down[channel] * up),
        "largest": out.abs().amax(-1),
        "size": out.norm(dim=-1),
    }


def _weighted_cosine(
    active: Float[Tensor, "token d_mlp"], gate: Float[Tensor, "token d_mlp"], rest: Float[Tensor, "token d_mlp"]
) -> Float[Tensor, " token"]:
    """Cosine of act(g) and g, each neuron weighted by |what it adds to the channel|, which is active times the rest."""
    weight = (active * rest).abs().sqrt()
    return functional.cosine_similarity(weight * active, weight * gate, dim=-1, eps=1e-30)


@where_applicable
def near_identity(reading: Reading) -> Evidence | NotApplicable:
    """AM1: is the activation close to the identity on spike tokens? Cosine and norm ratio of act(g) and g, medians.

    The plain cosine counts every neuron alike; the weighted one counts each by what it adds to the spike channel.
    Controls: other tokens; and gates drawn at random, as large as the spike tokens' own, which say what a cosine is
    worth (half of their entries are negative, and the activation drops those; the weighting drops them too).
    """
    ffn = reading.ffn
    gate = functional.linear(reading.h, ffn.gate, ffn.gate_bias)
    up = functional.linear(reading.h, ffn.up, ffn.up_bias)
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    active = ffn.activation(random)
    values = {
        f"{name}_{who}": median(getattr(reading, field)[where])
        for name, field in (
            ("silu_cosine", "silu_cosine"),
            ("norm_ratio", "silu_ratio"),
            ("weighted_cosine", "weighted_cosine"),
        )
        for who, where in (("spike", reading.is_spike), ("other", ~reading.is_spike))
    }
    return evidence(
        measured={**values, "block": reading.block, "channel": reading.channel},
        control={
            "silu_cosine_random_gates": median(functional.cosine_similarity(active, random, dim=-1)),
            "norm_ratio_random_gates": median(active.norm(dim=-1) / random.norm(dim=-1)),
            "weighted_cosine_random_gates": median(_weighted_cosine(active, random, ffn.down[reading.channel] * up)),
        },
    )


@where_applicable
def high_gain(reading: Reading, life: Lifecycle, census: Census) -> Evidence | NotApplicable:
    """AM2: the spike channel's ||U_k||_F among all channels of its block.

    Controls: ordinary channels of the same block, and the same channel in FFN blocks that are no step (medians).
    """
    steps = {*life.main.step_up, *life.main.step_down}
    other_blocks = [b for b in census.blocks.tolist() if b not in steps]

    def typical(pairs: Sequence[tuple[int, int]]) -> tuple[float, float]:
        ranks = torch.tensor([census.rank_in_block(*pair) for pair in pairs], dtype=torch.float)
        return median(ranks), median(torch.tensor([census.over_median(*pair) for pair in pairs]))

    rank, over = typical([(reading.block, channel) for channel in reading.ordinary.channels])
    control = {"gain_rank_ordinary_channels": rank, "gain_over_median_ordinary_channels": over}
    if other_blocks:
        rank, over = typical([(block, reading.channel) for block in other_blocks])
        control |= {"gain_rank_other_blocks": rank, "gain_over_median_other_blocks": over}
    return evidence(
        measured={
            "gain_rank": census.rank_in_block(reading.block, reading.channel),
            "gain_over_median": census.over_median(reading.block, reading.channel),
            "block": reading.block,
            "channel": reading.channel,
        },
        control=control,
    )


@where_applicable
def rank_one(reading: Reading) -> Evidence | NotApplicable:
    """AM3: the top eigenvalue of S_k, the next, and the top one's share of the sum of squares of all.

    Controls: the same share of ordinary channels of the block; and of the other spike channels, which are no control
    but the same question put to them (medians).
    """
    first, second = reading.pairs.values.tolist()
    measured = {
        "top_eigenvalue": first,
        "second_eigenvalue": second,
        "rank_one_share": float(reading.spike.shares[0]),
        "form_norm": float(reading.spike.norms[0]),
    }
    if len(reading.spike.channels) > 1:
        measured["rank_one_share_other_spike_channels"] = median(reading.spike.shares[1:])
    return evidence(measured, {"rank_one_share_ordinary_channels": median(reading.ordinary.shares)})


@where_applicable
def shared_direction(reading: Reading) -> Evidence | NotApplicable:
    """AM4: do the spike channels share s*? |cos| of their top eigenvectors, over pairs.

    Beside the smallest over all pairs: the median, and the smallest among the three largest channels. And since a
    channel can be written along s* without s* being its *top* eigenvector: what s* alone, by s*'S_k s* (s*.h~)^2,
    predicts of the write into each spike channel, over the write (median over spike tokens): how far the typical
    channel is from 1, and the smallest and the largest. Control: pairs of ordinary channels (median and largest), and
    the same ratios for them.
    """
    if len(reading.spike.channels) < 2:
        return NotApplicable("only one channel spikes, so there is no direction to share")
    spikes, others = pair_cosines(reading.spike.vectors), pair_cosines(reading.ordinary.vectors)
    ours, theirs = _along(reading, reading.spike.channels), _along(reading, reading.ordinary.channels)
    return evidence(
        measured={
            "cosine_min": float(spikes.min()),
            "cosine_control": median(others),
            "cosine_median": median(spikes),
            "cosine_min_top3": float(pair_cosines(reading.spike.vectors[:3]).min()),
            "n_spike_channels": len(reading.spike.channels),
            "misfit_of_prediction": median((ours - 1).abs()),
            "predicted_over_written_range": [float(ours.min()), float(ours.max())],
        },
        control={
            "cosine_max_ordinary_channels": _largest(others),
            "misfit_of_prediction_ordinary_channels": median((theirs - 1).abs()),
            "predicted_over_written_range_ordinary_channels": [float(theirs.min()), float(theirs.max())],
        },
    )


@where_applicable
def quadratic_prediction(reading: Reading) -> Evidence | NotApplicable:
    """AM5: lambda (s*.h~)^2 against what the block writes: median relative error over spike tokens, R^2 over all.

    Controls: the same for ordinary channels, each by its own top eigenpair, on the spike tokens (median over channels);
    and the error on other tokens.
    """
    spikes, written, ordinary = reading.is_spike, reading.write, reading.ordinary
    theirs = write(reading.ffn, reading.h)[:, list(ordinary.channels)]
    predicted = ordinary.values.float() * (reading.h @ ordinary.vectors.T) ** 2
    measured = {
        "median_relative_error": _relative(reading.rank_one[spikes], written[spikes]),
        "r2": _r2(reading.rank_one, written),
        "median_relative_error_quadratic": _relative(reading.quadratic[spikes], written[spikes]),
        "typical_write": median(written[spikes]),
    }
    if int(spikes.sum()) > 2 and float(written[spikes].var()) > 0:
        measured["r2_spike_tokens"] = _r2(reading.rank_one[spikes], written[spikes])
    return evidence(
        measured=measured,
        control={
            "median_relative_error_ordinary_channels": _relative(predicted, theirs),
            "median_relative_error_other_tokens": _relative(reading.rank_one[~spikes], written[~spikes]),
        },
    )


@where_applicable
def alignment(reading: Reading) -> Evidence | NotApplicable:
    """AM6: |cos(s*, h~)| of spike tokens and of all others, medians.

    A quadratic form does not know a vector from its opposite, but the gates do: beside it, the share of other tokens
    that lie on the spike tokens' side at all.
    Control: of the spike tokens with the top eigenvectors of ordinary channels; and 1/sqrt(d), what a random direction
    would give.
    """
    with_others = (functional.normalize(reading.h, dim=-1) @ reading.ordinary.vectors.T).abs()
    spike, other = reading.cosine[reading.is_spike], reading.cosine[~reading.is_spike]
    return evidence(
        measured={
            "cosine_spike": median(spike.abs()),
            "cosine_other": median(other.abs()),
            "cosine_other_max": _largest(other.abs()),
            "same_side_spike": float((spike > 0).double().mean()),
            "same_side_other": float((other > 0).double().mean()),
        },
        control={
            "cosine_spike_ordinary_channels": median(with_others),
            "one_over_root_d": 1 / math.sqrt(reading.d_model),
        },
    )


def by_weights_alone(life: Lifecycle, found: Census | NotApplicable, n: int = 10) -> Evidence | NotApplicable:
    """AM7: where the census ranks the first channel in its step-up and step-down FFN blocks (the worst of each).

    How much that list finds is another matter than whether it misses them: beside it, how many of the top 1% of pairs
    are a spike channel in a step block. Controls: the median rank of that channel in the other FFN blocks, and of
    ordinary channels in the step blocks.
    """
    if isinstance(found, NotApplicable):
        return found
    if life.main is None:
        return NotApplicable(life.reason)
    channel = life.main.channel
    up, down = ([b for b in blocks if block_kind(b) == "FFN"] for blocks in (life.main.step_up, life.main.step_down))
    if not up or not down:
        return NotApplicable(f"no FFN block is step-{'down' if up else 'up'}, so there is no pair to look for")
    ranks = {block: found.rank(block, channel) for block in found.blocks.tolist()}
    ordinary = life.trace.channels[life.trace.ordinary].tolist()
    others = [found.rank(block, c) for block in (*up, *down) for c in ordinary]
    elsewhere = [rank for block, rank in ranks.items() if block not in (*up, *down)]
    top = found.top(found.gain.numel() // 100)
    return evidence(
        measured={
            "census_top": [list(pair) for pair in found.top(n)],
            "step_up_rank": max(ranks[b] for b in up),
            "step_down_rank": max(ranks[b] for b in down),
            "step_up_ranks": [[b, ranks[b]] for b in up],
            "step_down_ranks": [[b, ranks[b]] for b in down],
            "n_pairs": found.gain.numel(),
            "top_pairs": len(top),
            "step_pairs_among_them": sum(b in (*up, *down) and c in life.main.channels for b, c, _ in top),
        },
        control={
            "rank_same_channel_other_blocks": median(torch.tensor(elsewhere, dtype=torch.float)),
            "rank_ordinary_channels": median(torch.tensor(others, dtype=torch.float)),
        },
    )


@where_applicable
def output_norm(reading: Reading) -> Evidence | NotApplicable:
    """X-AM8: where a norm follows the block, whether its scale makes the spike rather than the block's own gain.

    After that norm the channel holds sqrt(d) scale_k F_k / |F|: the size of F is gone, its direction is left. Measured:
    the scale of the channel over the median scale, and |F_k| / |F| on spike tokens. Controls: the largest scale of an
    ordinary channel over the median, and |F_k| / |F| on other tokens.
    """
    scale = reading.ffn.post_scale
    if scale is None:
        return NotApplicable("no norm stands between the block and the stream")
    size = scale.abs() / scale.abs().median()
    share = reading.write.abs() / reading.size
    return evidence(
        measured={
            "scale_over_median": float(size[reading.channel]),
            "share_of_norm_spike": median(share[reading.is_spike]),
            "share_of_norm_other": median(share[~reading.is_spike]),
            "largest_possible": math.sqrt(reading.d_model) * float(scale[reading.channel].abs()),
            "block": reading.block,
            "channel": reading.channel,
        },
        control={
            "scale_over_median_ordinary_channels": float(size[list(reading.ordinary.channels)].max()),
            "share_of_norm_random_direction": 1 / math.sqrt(reading.d_model),
        },
    )


STEPS = {  # of the derivation: in words, and where a reading has it
    "exact": ("F from the weights, against the model's own block", "own"),
    "identity": ("activation replaced by the identity: h~' S_k h~", "quadratic"),
    "rank one": ("one eigenpair left: lambda (s*.h~)^2", "rank_one"),
    "closed form": ("lambda d cos^2(s*, h~)", "closed_form"),
}


@where_applicable
def step(reading: Reading, name: str) -> pd.DataFrame | NotApplicable:
    """One step of the derivation: how far it is from what the block writes, on spike tokens and on others.

    The error, median over tokens, over the token's own write, and over the typical write on spike tokens (on other
    tokens the write is nearly nothing, and an error over nearly nothing says little).

    Args:
        reading: as `read` returns it.
        name: one of STEPS: "exact", "identity", "rank one", "closed form".
    """
    words, field = STEPS[name]
    value = getattr(reading, field)
    error, typical = (value - reading.write).abs(), median(reading.write.abs()[reading.is_spike])
    row = {"step": words}
    for who, where in (("spike", reading.is_spike), ("other", ~reading.is_spike)):
        # An error of exactly nothing is luck: rounding on one processor, none on another.
        row[f"{who} tokens: error ÷ own write"] = max(_relative(value[where], reading.write[where]), 1e-9)
        row[f"{who} tokens: error ÷ typical spike"] = max(median(error[where]) / typical, 1e-9)
    return pd.DataFrame([row])


@where_applicable
def facts(reading: Reading) -> dict[str, int] | NotApplicable:
    """What was read: block, channel, number of hidden neurons, of spike tokens and of others."""
    n_spike = int(reading.is_spike.sum())
    return {
        "block": reading.block,
        "channel": reading.channel,
        "neurons": len(reading.ffn.gate),
        "n_spike": n_spike,
        "n_other": reading.is_spike.numel() - n_spike,
    }


@where_applicable
def spectra(reading: Reading, n: int = 16, ordinary: int = 6) -> dict[int, Float[Tensor, " pair"]] | NotApplicable:
    """The n eigenvalues of S_k of largest size over ||S_k||_F, the largest first: of the first channel and of others.

    The squares of all of them would add up to 1.

    Args:
        reading: as `read` returns it.
        n: how many eigenvalues.
        ordinary: of how many ordinary channels besides.
    """
    exact = reading.ffn.to(torch.float64)
    channels = (reading.channel, *reading.ordinary.channels[:ordinary])
    n = min(n, reading.d_model - 1)
    values = [eigenpairs(exact, channel, n).values for channel in progress(channels, "finding spectra", "channel")]
    return dict(zip(channels, torch.stack(values) / form_norms(exact, channels)[:, None], strict=True))


def hits(
    model: TransformerBridge,
    weights: Weights,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    found: Census | NotApplicable,
    n: int = 10,
) -> pd.DataFrame | NotApplicable:
    """The census's largest pairs, and what becomes of them on text.

    Args:
        model, weights: a model and its weights.
        tokens: the windows that `life` was found in, or the first of them.
        life: as `find_lifecycle` returns it.
        found: as `census` returns it.
        n: how many pairs.

    Returns:
        For each pair its block, channel, gain, the gain over the block's median, what step of the main cycle it is; and
        on spike tokens and on all others, the largest |cos(s*, h~)|, |h~' S_k h~| and |write|. Where the form is small,
        no token points that way; where the form is large and the write small, the gates are shut. (All are before any
        norm of the block's output.)

    Raises:
        ValueError: these are not the windows that `life` was found in, nor the first of them.
    """
    if isinstance(found, NotApplicable):
        return found
    check_windows(life, tokens, part=True)
    top = found.top(n)
    spiking = torch.zeros(tokens.shape, dtype=torch.bool)
    if life.main is not None:
        spiking = is_spike(life, life.main)[: len(tokens)]
    blocks = sorted({block for block, _, _ in top})
    layers = [block_layer(block) for block in blocks]
    each = [
        [h for h, _ in _passing(model, weights.anatomy.ffn_norm, layers, window)]
        for window in progress(tokens, "reading the census's blocks", "window")
    ]
    passed = {block: torch.stack(h) for block, h in zip(blocks, zip(*each, strict=True), strict=True)}
    main = () if life.main is None else (("up", life.main.step_up), ("down", life.main.step_down))
    rows = {}
    for block, h in passed.items():
        ffn, unit = weights.ffn(block_layer(block)), functional.normalize(h, dim=-1)
        for _, channel, gain in (pair for pair in top if pair[0] == block):
            row = {
                "block": block,
                "channel": channel,
                "gain": gain,
                "÷ block's median": found.over_median(block, channel),
                "step": next((s for s, blocks in main if block in blocks and channel in life.main.channels), ""),
            }
            sizes = {
                "cos": unit @ eigenpairs(ffn, channel, 1).vectors[:, 0].float(),
                "form": quadratic(ffn, h, channel),
                "write": write(ffn, h)[..., channel],
            }
            for who, where in (("spike", spiking), ("other", ~spiking)):
                row |= {f"{name}, {who}": _largest(size.abs()[where]) for name, size in sizes.items()}
            rows[block, channel] = row
    return pd.DataFrame([rows[block, channel] for block, channel, _ in top])


def _largest(values: Tensor) -> float:
    return float(values.max()) if len(values) else 0.0


def median(values: Tensor) -> float:
    """Median; of an even number, the mean of the middle two; not a number of none."""
    return float(np.median(values.numpy())) if values.numel() else math.nan


def _relative(predicted: Tensor, true: Tensor) -> float:
    """Median relative error; what is nothing at all has none."""
    there = true != 0
    return median(((predicted - true).abs() / true.abs())[there])


def _r2(predicted: Tensor, true: Tensor) -> float:
    true, predicted = true.double(), predicted.double()
    return float(1 - (predicted - true).square().sum() / (true - true.mean()).square().sum())


def pair_cosines(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, " pair"]:
    """|cos| of every pair of unit vectors; empty where there is one only."""
    i, j = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors[i] * vectors[j]).sum(-1).abs()


def _along(reading: Reading, channels: Sequence[int]) -> Float[Tensor, " channel"]:
    """For each channel, what s* alone predicts of a write, over the write: median over spike tokens."""
    s, ffn, at = reading.spike.vectors[0], reading.ffn, list(channels)
    along = ((ffn.gate @ s) * (ffn.up @ s)) @ ffn.down[at].T  # s*' S_k s* of each
    predicted = along * (reading.h @ s)[:, None] ** 2
    return (predicted / write(ffn, reading.h)[:, at]).quantile(0.5, dim=0)


def _checked(ffn: FFN, channel: int) -> int:
    if not isinstance(channel, Integral) or not 0 <= channel < ffn.down.shape[0]:
        raise ValueError(f"channel {channel!r} does not exist; this model has channels 0 to {ffn.down.shape[0] - 1}.")
    return channel
