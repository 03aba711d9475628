"""The gated FFN as a directional quadratic amplifier (the paper's section on SwiGLU), from its weights alone.

With g_i and u_i the rows of the gate and up matrices, w_i the down projection's row of channel k, and the norm's scale
folded in, the block writes F_k = sum_i w_i act(g_i . h~) (u_i . h~). Where act is close to the identity, that is the
quadratic form h~' S_k h~ with U_k = sum_i w_i g_i u_i' and S_k = (U_k + U_k') / 2; and where one eigenvalue lambda of
S_k, with eigenvector s*, outweighs the others, it is lambda (s* . h~)^2 = lambda d cos^2(s*, h~), as |h~|^2 = d.

Writes are before any norm of the block's output, which divides their size out. A channel that the model does not have
is a ValueError.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor
from torch.nn import functional

from spikesink.chain.lifecycle import Lifecycle, check_model, check_windows, first_step_up, is_spike
from spikesink.chain.trace import median
from spikesink.common import measure, progress
from spikesink.model.anatomy import Anatomy, Block, Model, mlp
from spikesink.model.proof import require
from spikesink.model.weights import FFN, Weights, require_form, weights_of

KERNEL = 2**23  # entries of a d_mlp x d_mlp kernel that are held at a time


def compute_write(ffn: FFN, h: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
    """What the block writes, exactly: F(h~)."""
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

    def multiply(v: np.ndarray) -> np.ndarray:
        v = v.ravel()
        return (gate.T @ (w * (up @ v)) + up.T @ (w * (gate @ v))) / 2

    return LinearOperator(2 * (gate.shape[1],), matvec=multiply, rmatvec=multiply, dtype=np.float64)


class Eigenpairs(NamedTuple):
    """The eigenvalues of S_k that are largest in size, the largest first, with their eigenvectors as columns."""

    values: Float[Tensor, " pair"]
    vectors: Float[Tensor, "d_model pair"]


def eigenpairs(ffn: FFN, channel: int, n: int = 2) -> Eigenpairs:
    """The n eigenpairs of S_k of largest size, by Lanczos on `operator`; ValueError where there are not so many."""
    d = ffn.gate.shape[1]
    if not isinstance(n, Integral) or isinstance(n, bool) or not 0 < n < d:
        raise ValueError(f"{n} eigenpairs were asked for, and Lanczos finds 1 to {d - 1} of {d}.")
    start, s = np.random.default_rng(0).standard_normal(d), operator(ffn, channel)  # so that signs and digits repeat
    if not (s @ start).any():  # a channel that no neuron writes into, where Lanczos has nothing to begin with
        return Eigenpairs(torch.zeros(n, dtype=torch.float64), torch.eye(d, n, dtype=torch.float64))
    values, vectors = eigsh(s, k=n, which="LM", v0=start)
    order = np.argsort(-np.abs(values))
    return Eigenpairs(torch.from_numpy(values[order].copy()), torch.from_numpy(vectors[:, order].copy()))


def gains(ffn: FFN) -> Float[Tensor, " d_model"]:
    """||U_k||_F of every channel at once: ||U_k||_F^2 = w' ((G G') o (U U')) w with w = down[k, :]."""
    return _contract(ffn.down, ffn.gate, ffn.gate, ffn.up, ffn.up).clamp(min=0).sqrt()


def operations(d_mlp: int, d_model: int) -> int:
    """What `gains` computes of one block, in additions and multiplications: half of three products."""
    return 3 * d_mlp**2 * d_model


def form_norms(ffn: FFN, channels: Sequence[int]) -> Float[Tensor, " channel"]:
    """||S_k||_F, whose square is (||U_k||_F^2 + tr(U_k^2)) / 2 and the sum of all squared eigenvalues."""
    w = ffn.down[[_checked(ffn, channel) for channel in channels]].double()
    gate, up = ffn.gate.double(), ffn.up.double()
    squares = _contract(w, gate, gate, up, up) + _contract(w, up, gate, gate, up)
    return (squares / 2).clamp(min=0).sqrt()


def _contract(w: Float[Tensor, "channel d_mlp"], a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """w' K w of each channel, of a symmetric kernel K = (a b') o (c d') of d_mlp x d_mlp.

    An eighth of its rows or fewer are made at a time, from the diagonal on; what is beyond those rows counts twice.
    """
    squares, size = torch.zeros(len(w), dtype=torch.float64), max(1, min(KERNEL, len(a) ** 2 // 8) // max(1, len(a)))
    for start in range(0, len(a), size):
        rows, on = slice(start, start + size), slice(start, None)
        kernel = (a[rows] @ b[on].T).mul_(c[rows] @ d[on].T)
        kernel[:, size:] *= 2
        squares += (w[:, rows] @ kernel).mul_(w[:, on]).sum(1, dtype=torch.float64)
    return squares


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
    """The top eigenpairs of several channels of one block."""
    exact = ffn.to(torch.float64)  # once, not for every channel
    pairs = [eigenpairs(exact, channel, 1) for channel in progress(channels, "finding directions", "channel")]
    values = torch.cat([torch.zeros(0), *(pair.values for pair in pairs)])
    vectors = torch.cat([torch.zeros(0, ffn.gate.shape[1]), *(pair.vectors.T for pair in pairs)]).float()
    return Directions(tuple(channels), values, vectors, form_norms(exact, channels))


def largest_gains(gain: Float[Tensor, "row d_model"], n: int) -> list[tuple[int, int, float]]:
    """The n largest gains, the largest first: row, channel, gain."""
    values, where = gain.flatten().topk(min(n, gain.numel()))
    rows, channels = divmod(where.numpy(), gain.shape[1])
    return list(zip(rows.tolist(), channels.tolist(), values.tolist(), strict=True))


@dataclass(frozen=True)
class Census:
    """||U_k||_F of every channel of every FFN block: what the weights alone say about where a spike can be written."""

    blocks: tuple[Block, ...]
    gain: Float[Tensor, "ffn d_model"]

    def top(self, n: int) -> list[tuple[Block, int, float]]:
        """The n pairs of largest gain, the largest first: block, channel, gain."""
        return [(self.blocks[row], channel, gain) for row, channel, gain in largest_gains(self.gain, n)]

    def rank(self, block: int, channel: int) -> int:
        """The place of a pair among all pairs, 1 for the largest gain; ValueError where there is no such pair."""
        return int((self.gain > self._gains(block, channel)[channel]).sum()) + 1

    def rank_in_block(self, block: int, channel: int) -> int:
        """The place of a channel within its block, 1 for the largest gain."""
        gains = self._gains(block, channel)
        return int((gains > gains[channel]).sum()) + 1

    def over_median(self, block: int, channel: int) -> float:
        """A channel's gain over the median gain of its block."""
        gains = self._gains(block, channel)
        return float(gains[channel] / gains.median())

    def _gains(self, block: int, channel: int) -> Float[Tensor, " d_model"]:
        if block not in self.blocks or not 0 <= channel < self.gain.shape[1]:
            raise ValueError(
                f"{Block(block)}, channel {channel} is not among the FFN blocks up to {self.blocks[-1]} "
                f"with channels 0 to {self.gain.shape[1] - 1}."
            )
        return self.gain[self.blocks.index(block)]


@measure
def census(weights: Weights) -> Census:
    """Measure every channel of every FFN block, a layer at a time, without running any text."""
    if not isinstance(weights, Weights):
        raise ValueError(f"a census is of weights, not of a {type(weights).__name__}; give weights_of(model).")
    require_form(weights.anatomy)
    require(weights, "FFN")
    layers = range(weights.anatomy.n_layers)
    gain = [gains(weights.ffn(layer)).float() for layer in progress(layers, "weighing FFN blocks", "block")]
    return Census(tuple(map(mlp, layers)), torch.stack(gain))


@measure
def step_up_direction(weights: Weights, life: Lifecycle) -> Float[Tensor, " d_model"]:
    """s* of the first step-up block's first channel, from the weights."""
    check_model(weights, life)
    require_form(weights.anatomy)
    return eigenpairs(weights.ffn(first_step_up(life).layer), life.main.channel, 1).vectors[:, 0].float()


@dataclass(frozen=True)
class Reading:
    """What a step-up block does to every token, in the spike's first channel."""

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
def read_block(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, block: Block | None = None) -> Reading:
    """Run the windows up to a step-up block, by default the main cycle's first, and see what it does to each token."""
    check_model(model, life)
    check_windows(life, tokens)
    anatomy, weights = model.anatomy, weights_of(model)
    if block is not None and block not in (blocks := [mlp(layer) for layer in range(anatomy.n_layers)]):
        raise ValueError(f"{Block(block)} is not among the FFN blocks, {blocks[0]} to {blocks[-1]}.")
    require_form(anatomy)
    require(model, "FFN")
    block, main = Block(block or first_step_up(life)), life.require_main()
    ffn = weights.ffn(block.layer)
    pairs, hooks = eigenpairs(ffn, main.channel), ffn_hooks(anatomy, block.layer)
    spiking, drawn = is_spike(life, main), life.trace.channels[life.trace.ordinary].tolist()
    spikes, parts = [], []
    for window, where in zip(progress(tokens, "reading the step-up block", "window"), spiking, strict=True):
        h, own = cache_hooks(model, window, hooks)
        spikes.append(h[where])
        parts.append({"own": own[:, main.channel], **take_apart(ffn, main.channel, pairs, h)})
    by_token = {name: torch.stack([part[name] for part in parts]) for name in parts[0]}
    by_token["cosine"] *= math.copysign(1, median(by_token["cosine"][spiking]))
    return Reading(
        block=block,
        channel=main.channel,
        d_model=anatomy.d_model,
        ffn=ffn,
        pairs=pairs,
        spike=directions(ffn, (main.channel, *(c for c in main.channels if c != main.channel))),
        ordinary=directions(ffn, [c for c in drawn if ffn.down[c].any()]),  # a row of zeros has no direction
        is_spike=spiking,
        h=torch.cat(spikes),
        **by_token,
    )


def ffn_hooks(anatomy: Anatomy, layer: int) -> tuple[str, str]:
    """What enters a layer's FFN (h~, or the stream itself where no norm stands before it) and what comes out."""
    enters = f"{anatomy.ffn_norm}.hook_normalized" if anatomy.ffn_norm else "mlp.hook_in"
    return f"blocks.{layer}.{enters}", f"blocks.{layer}.mlp.hook_out"


@torch.inference_mode()
def cache_hooks(
    model: Model, window: Int[Tensor, " token"], names: Sequence[str]
) -> list[Float[Tensor, "token width"]]:
    """What hooks carry while one window runs up to the last layer that is named, in float32 on the CPU."""
    n_layers = 1 + max(int(name.split(".")[1]) for name in names)
    _, cache = model.run_with_cache(window[None].to(model.cfg.device), names_filter=[*names], stop_at_layer=n_layers)
    return [cache[name].float().cpu().flatten(0, -2) for name in names]  # some see no windows, only tokens


def take_apart(
    ffn: FFN, channel: int, pairs: Eigenpairs, h: Float[Tensor, "token d_model"]
) -> dict[str, Float[Tensor, " token"]]:
    """What a block does to tokens, by the names of `Reading`."""
    gate, up = functional.linear(h, ffn.gate, ffn.gate_bias), functional.linear(h, ffn.up, ffn.up_bias)
    out = functional.linear(ffn.activation(gate) * up, ffn.down, ffn.down_bias)
    along = h @ pairs.vectors[:, 0].float()
    return {
        "write": out[:, channel],
        "quadratic": quadratic(ffn, h, channel),
        "rank_one": float(pairs.values[0]) * along**2,
        "cosine": along / h.norm(dim=-1),
        "largest": out.abs().amax(-1),
        "size": out.norm(dim=-1),
        **_compare_gates(ffn, gate, ffn.down[channel] * up),
    }


def _compare_gates(
    ffn: FFN, gate: Float[Tensor, "token d_mlp"], rest: Float[Tensor, "token d_mlp"]
) -> dict[str, Float[Tensor, " token"]]:
    """Cosine of act(g) and g, plain and with each neuron's weight |act(g) rest|; and the ratio of their norms."""
    active = ffn.activation(gate)
    weight = (active * rest).abs().sqrt()
    return {
        "silu_cosine": functional.cosine_similarity(active, gate, dim=-1),
        "silu_ratio": active.norm(dim=-1) / gate.norm(dim=-1),
        "weighted_cosine": functional.cosine_similarity(weight * active, weight * gate, dim=-1, eps=1e-30),
    }


def draw_gates(reading: Reading) -> dict[str, Float[Tensor, " spike"]]:
    """What gates drawn at random, as large as the spike tokens' own, give in `silu_cosine` and its like."""
    ffn, gate = reading.ffn, functional.linear(reading.h, reading.ffn.gate, reading.ffn.gate_bias)
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    return _compare_gates(ffn, random, ffn.down[reading.channel] * functional.linear(reading.h, ffn.up, ffn.up_bias))


def predict_alone(reading: Reading, channels: Sequence[int]) -> Float[Tensor, " channel"]:
    """For each channel, s*'S_k s* (s*.h~)^2 over the write, with s* of the first: median over spike tokens."""
    s, ffn = reading.spike.vectors[0], reading.ffn
    along = ((ffn.gate @ s) * (ffn.up @ s)) @ ffn.down[list(channels)].T  # s*' S_k s* of each
    predicted = along * (reading.h @ s)[:, None] ** 2
    return (predicted / compute_write(ffn, reading.h)[:, list(channels)]).quantile(0.5, dim=0)


STEPS = {  # of the derivation: in words, and where a reading has it
    "exact": ("F from the weights, against the model's own block", "own"),
    "identity": ("activation replaced by the identity: h~' S_k h~", "quadratic"),
    "rank one": ("one eigenpair left: lambda (s*.h~)^2", "rank_one"),
    "closed form": ("lambda d cos^2(s*, h~)", "closed_form"),
}


@measure
def compare_step(reading: Reading, name: str) -> pd.DataFrame:
    """One of STEPS: how far it is from what the block writes, on spike tokens and on others.

    The error, median over tokens, over the token's own write, and over the typical write on spike tokens (on other
    tokens the write is nearly nothing, and an error over nearly nothing says little).
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
def find_spectra(reading: Reading, n: int = 16, ordinary: int = 6) -> dict[int, Float[Tensor, " pair"]]:
    """The n eigenvalues of S_k of largest size over ||S_k||_F: of the first channel and of some ordinary ones."""
    exact = reading.ffn.to(torch.float64)
    channels = (reading.channel, *reading.ordinary.channels[:ordinary])
    n = min(n, reading.d_model - 1)
    values = [eigenpairs(exact, channel, n).values for channel in progress(channels, "finding spectra", "channel")]
    return dict(zip(channels, torch.stack(values) / form_norms(exact, channels)[:, None], strict=True))


@measure
def census_on_text(
    model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, census: Census, n: int = 10
) -> pd.DataFrame:
    """The census's n largest pairs, and what becomes of them on text.

    On spike tokens and on all others, the largest |cos(s*, h~)|, |h~' S_k h~| and |write|. Where the form is small, no
    token points that way; where the form is large and the write small, the gates are shut.
    """
    check_windows(life, tokens, part=True)
    weights, top, main = weights_of(model), census.top(n), life.main
    spiking = is_spike(life, main)[: len(tokens)] if main else torch.zeros(tokens.shape, dtype=torch.bool)
    steps = dict.fromkeys(main.step_up, "up") | dict.fromkeys(main.step_down, "down") if main else {}
    blocks = sorted({block for block, _, _ in top})
    hooks = [ffn_hooks(model.anatomy, block.layer)[0] for block in blocks]
    passed = [cache_hooks(model, w, hooks) for w in progress(tokens, "reading the census's blocks", "window")]
    sizes = {}
    for block, h in zip(blocks, map(torch.stack, zip(*passed, strict=True)), strict=True):
        ffn, unit = weights.ffn(block.layer), functional.normalize(h, dim=-1)  # one block's weights at a time
        for channel in [channel for of, channel, _ in top if of == block]:
            sizes[block, channel] = {
                "cos": unit @ eigenpairs(ffn, channel, 1).vectors[:, 0].float(),
                "form": quadratic(ffn, h, channel),
                "write": compute_write(ffn, h)[..., channel],
            }
    rows = []
    for block, channel, gain in top:
        row = {"block": str(block), "channel": channel, "gain": gain}
        step = steps.get(block, "") if main and channel in main.channels else ""
        row |= {"÷ block's median": census.over_median(block, channel), "step": step}
        for who, where in (("spike", spiking), ("other", ~spiking)):
            row |= {f"{name}, {who}": largest(size.abs()[where]) for name, size in sizes[block, channel].items()}
        rows.append(row)
    return pd.DataFrame(rows)


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
