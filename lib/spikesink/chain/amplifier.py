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

from spikesink.chain.lifecycle import (
    Lifecycle,
    check_model,
    check_windows,
    first_step_up,
    is_spike,
)
from spikesink.chain.trace import median
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Block, mlp
from spikesink.model.weights import FFN, Weights, require_form, weights_of

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

    blocks: tuple[Block, ...]
    gain: Float[Tensor, "ffn d_model"]

    def top(self, n: int) -> list[tuple[Block, int, float]]:
        """The n pairs of largest gain, the largest first: block, channel, gain."""
        values, where = self.gain.flatten().topk(min(n, self.gain.numel()))
        rows, channels = where // self.gain.shape[1], where % self.gain.shape[1]
        return [(self.blocks[r], int(c), float(v)) for r, c, v in zip(rows, channels, values, strict=True)]

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
        if block not in self.blocks or not 0 <= channel < self.gain.shape[1]:
            raise ValueError(
                f"{Block(block)}, channel {channel} is not among the FFN blocks up to {self.blocks[-1]} "
                f"with channels 0 to {self.gain.shape[1] - 1}."
            )
        return self.gain[self.blocks.index(block)]


@measure
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
    require_form(weights.anatomy)
    layers = range(weights.anatomy.n_layers) if layers is None else layers
    rows = []
    for layer in progress(layers, "weighing FFN blocks", "block"):
        rows.append(gains(weights.ffn(layer)).float())
    return Census(tuple(mlp(layer) for layer in layers), torch.stack(rows))


@measure
def step_up_direction(weights: Weights, life: Lifecycle) -> Float[Tensor, " d_model"] | NotApplicable:
    """s* of the first step-up block's first channel, from the weights; or why there is none."""
    block = _block_to_read(weights, life)
    if isinstance(block, NotApplicable):
        return block
    return eigenpairs(weights.ffn(block.layer), life.main.channel, 1).vectors[:, 0].float()


def _block_to_read(weights: Weights, life: Lifecycle) -> Block | NotApplicable:
    """The first step-up block; or why there is none to take apart."""
    check_model(weights, life)
    require_form(weights.anatomy)
    return first_step_up(life)


@dataclass(frozen=True)
class Reading:
    """What a step-up block does to every token, in the spike's first channel; `read_block` makes it.

    Writes are before any norm of the block's output.
    """

    block: Block
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


@measure
def read_block(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    block: int | None = None,
) -> Reading | NotApplicable:
    """Run the windows up to a step-up block and see what it does to each token.

    Args:
        model: as `load` returns it.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        block: another FFN block than the main cycle's first step-up block.

    Returns:
        The reading, or why there is none: no spike, no gate, or no FFN block that writes it.

    Raises:
        ValueError: `block` is no FFN block of this model, or `life` was found in other windows or in another model.
    """
    check_model(model, life)
    check_windows(life, tokens)
    weights = weights_of(model)
    about, main = weights.anatomy, life.main
    if block is not None and block not in (blocks := [mlp(layer) for layer in range(about.n_layers)]):
        raise ValueError(f"{Block(block)} is not among the FFN blocks, {blocks[0]} to {blocks[-1]}.")
    first = _block_to_read(weights, life)
    if isinstance(first, NotApplicable):
        return first
    block = Block(block or first)
    ffn = weights.ffn(block.layer)
    pairs = eigenpairs(ffn, main.channel)
    seen: dict[str, list[Tensor]] = {}
    spiking, drawn = is_spike(life, main), life.trace.channels[life.trace.ordinary].tolist()
    for window, where in zip(progress(tokens, "reading the step-up block", "window"), spiking, strict=True):
        [(h, own)] = _passing(model, about.ffn_norm, [block.layer], window)
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


STEPS = {  # of the derivation: in words, and where a reading has it
    "exact": ("F from the weights, against the model's own block", "own"),
    "identity": ("activation replaced by the identity: h~' S_k h~", "quadratic"),
    "rank one": ("one eigenpair left: lambda (s*.h~)^2", "rank_one"),
    "closed form": ("lambda d cos^2(s*, h~)", "closed_form"),
}


@measure
def step(reading: Reading, name: str) -> pd.DataFrame | NotApplicable:
    """One step of the derivation: how far it is from what the block writes, on spike tokens and on others.

    The error, median over tokens, over the token's own write, and over the typical write on spike tokens (on other
    tokens the write is nearly nothing, and an error over nearly nothing says little).

    Args:
        reading: as `read_block` returns it.
        name: one of STEPS: "exact", "identity", "rank one", "closed form".
    """
    words, field = STEPS[name]
    value = getattr(reading, field)
    error, typical = (value - reading.write).abs(), median(reading.write.abs()[reading.is_spike])
    row = {"step": words}
    for who, where in (("spike", reading.is_spike), ("other", ~reading.is_spike)):
        # An error of exactly nothing is luck: rounding on one processor, none on another.
        row[f"{who} tokens: error ÷ own write"] = max(relative_error(value[where], reading.write[where]), 1e-9)
        row[f"{who} tokens: error ÷ typical spike"] = max(median(error[where]) / typical, 1e-9)
    return pd.DataFrame([row])


@measure
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


@measure
def spectra(reading: Reading, n: int = 16, ordinary: int = 6) -> dict[int, Float[Tensor, " pair"]] | NotApplicable:
    """The n eigenvalues of S_k of largest size over ||S_k||_F, the largest first: of the first channel and of others.

    The squares of all of them would add up to 1.

    Args:
        reading: as `read_block` returns it.
        n: how many eigenvalues.
        ordinary: of how many ordinary channels besides.
    """
    exact = reading.ffn.to(torch.float64)
    channels = (reading.channel, *reading.ordinary.channels[:ordinary])
    n = min(n, reading.d_model - 1)
    values = [eigenpairs(exact, channel, n).values for channel in progress(channels, "finding spectra", "channel")]
    return dict(zip(channels, torch.stack(values) / form_norms(exact, channels)[:, None], strict=True))


def census_on_text(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    census: Census | NotApplicable,
    n: int = 10,
) -> pd.DataFrame | NotApplicable:
    """The census's largest pairs, and what becomes of them on text.

    Args:
        tokens: the windows that `life` was found in, or the first of them.
        life: as `find_lifecycle` returns it.
        census: as the function of this name returns it.
        n: how many pairs.

    Returns:
        For each pair its block, channel, gain, the gain over the block's median, what step of the main cycle it is; and
        on spike tokens and on all others, the largest |cos(s*, h~)|, |h~' S_k h~| and |write|. Where the form is small,
        no token points that way; where the form is large and the write small, the gates are shut. (All are before any
        norm of the block's output.)

    Raises:
        ValueError: these are not the windows that `life` was found in, nor the first of them.
    """
    if isinstance(census, NotApplicable):
        return census
    check_windows(life, tokens, part=True)
    weights = weights_of(model)
    top = census.top(n)
    spiking = torch.zeros(tokens.shape, dtype=torch.bool)
    if life.main is not None:
        spiking = is_spike(life, life.main)[: len(tokens)]
    blocks = sorted({block for block, _, _ in top})
    layers = [block.layer for block in blocks]
    each = [
        [h for h, _ in _passing(model, weights.anatomy.ffn_norm, layers, window)]
        for window in progress(tokens, "reading the census's blocks", "window")
    ]
    passed = {block: torch.stack(h) for block, h in zip(blocks, zip(*each, strict=True), strict=True)}
    main = () if life.main is None else (("up", life.main.step_up), ("down", life.main.step_down))
    rows = {}
    for block, h in passed.items():
        ffn, unit = weights.ffn(block.layer), functional.normalize(h, dim=-1)
        for _, channel, gain in (pair for pair in top if pair[0] == block):
            row = {
                "block": str(block),
                "channel": channel,
                "gain": gain,
                "÷ block's median": census.over_median(block, channel),
                "step": next((s for s, blocks in main if block in blocks and channel in life.main.channels), ""),
            }
            sizes = {
                "cos": unit @ eigenpairs(ffn, channel, 1).vectors[:, 0].float(),
                "form": quadratic(ffn, h, channel),
                "write": write(ffn, h)[..., channel],
            }
            for who, where in (("spike", spiking), ("other", ~spiking)):
                row |= {f"{name}, {who}": largest(size.abs()[where]) for name, size in sizes.items()}
            rows[block, channel] = row
    return pd.DataFrame([rows[block, channel] for block, channel, _ in top])


def largest(values: Tensor) -> float:
    """Largest value; 0 of none."""
    return float(values.max()) if len(values) else 0.0


def relative_error(predicted: Tensor, true: Tensor) -> float:
    """Median relative error; what is nothing at all has none."""
    there = true != 0
    return median(((predicted - true).abs() / true.abs())[there])


def r_squared(predicted: Tensor, true: Tensor) -> float:
    """Share of the variance that a prediction explains."""
    true, predicted = true.double(), predicted.double()
    return float(1 - (predicted - true).square().sum() / (true - true.mean()).square().sum())


def pair_cosines(vectors: Float[Tensor, "vector d_model"]) -> Float[Tensor, " pair"]:
    """|cos| of every pair of unit vectors; empty where there is one only."""
    i, j = torch.triu_indices(len(vectors), len(vectors), 1)
    return (vectors[i] * vectors[j]).sum(-1).abs()


def _checked(ffn: FFN, channel: int) -> int:
    if not isinstance(channel, Integral) or not 0 <= channel < ffn.down.shape[0]:
        raise ValueError(f"channel {channel!r} does not exist; this model has channels 0 to {ffn.down.shape[0] - 1}.")
    return channel
