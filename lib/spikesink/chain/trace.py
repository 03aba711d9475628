"""One pass over the windows that keeps what the life cycle needs, reduced at each hook as it streams by.

A *point* p = 0 … 2L is a place in the residual stream: point 0 is the embedding, point b the stream after block b.
Held for the length of one window: a few numbers a token. Kept in the end: sums over windows, and one row for each
token that spikes somewhere, so memory does not grow with the number of windows except by what was found in them.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import progress
from spikesink.model.anatomy import (
    Anatomy,
    Block,
    anatomy,
    check_ids,
    check_length,
    check_not_padding,
    check_tokens,
    check_vocabulary,
    not_finite,
    run_layers,
)


def median(values: Tensor) -> float:
    """Median; of an even number, the mean of the middle two; not a number of none."""
    return float(np.median(values.numpy())) if values.numel() else math.nan


EPSILONS = (0.2, 0.4)  # thresholds of a sink that SV3 and TR1 to TR6 ask for as well, beside the usual one


EPSILON = 0.3  # Gu et al.'s


def spearman(a: Float[Tensor, " head"], b: Float[Tensor, " head"]) -> float:
    """Rank correlation of two measures over heads, without those in which either is not a number."""
    return float(spearmanr(a.numpy(), b.numpy(), nan_policy="omit").statistic)


SPIKE_OVER_MEDIAN = 100.0  # an entry of the stream is a spike above this many medians of |h| (DESIGN: claim LC4)


TOP = 3  # the paper draws the three largest channels


ORDINARY_TOKENS = 4  # drawn from every window, as controls


ORDINARY_CHANNELS = 16  # drawn once, as controls


MAX_CHANNELS = 48  # followed, the strongest first


MAX_ROWS = 4096  # of candidates kept, the strongest first


MAX_DRAWN = 1024  # of ordinary tokens kept


OnStream = Callable[[Block, Float[Tensor, "token d_model"]], None]


OnWrite = Callable[[Block, Float[Tensor, "token d_model"]], None]


OnPattern = Callable[[int, Float[Tensor, "head query key"]], None]


OnHook = Callable[[Tensor], None]


@dataclass(frozen=True)
class Rows:
    """One row for each token that was followed: those that spike at some point, and some drawn at random."""

    window: Int[Tensor, " row"]
    position: Int[Tensor, " row"]
    token: Int[Tensor, " row"]
    drawn: Bool[Tensor, " row"]  # drawn at random, whether or not it spikes
    candidate: Bool[Tensor, " row"]  # some entry above the trace's threshold at some point
    largest: Float[Tensor, " row"]  # max |h| over points and channels
    stream: Float[Tensor, "row point channel"]  # h at the followed channels
    writes: Float[Tensor, "row block channel"]  # block outputs at the followed channels
    top_channels: Int[Tensor, "row point top"]  # the TOP largest |h|, over all channels of the model
    top_values: Float[Tensor, "row point top"]  # their |h|

    def __len__(self) -> int:
        return len(self.window)

    def __getitem__(self, which: Tensor) -> "Rows":
        return Rows(**{f.name: getattr(self, f.name)[which] for f in fields(self)})


@dataclass(frozen=True)
class Trace:
    """What one pass saw; medians and magnitudes are in the stream's own units."""

    anatomy: Anatomy
    tokens: Int[Tensor, "window position"]  # the windows themselves
    channels: Int[Tensor, " channel"]  # those followed for their size, the strongest first, then the ordinary ones
    n_followed: int  # how many of `channels` are followed for their size
    n_candidates: int  # tokens that spike somewhere, also those that are not among the rows
    rows: Rows
    medians: Float[Tensor, " point"]  # median of |h| over tokens and channels, mean over windows
    window_medians: Float[Tensor, "window point"]
    top_stream: Float[Tensor, "point top"]  # the largest channels' max |h| over tokens, mean over windows
    top_writes: Float[Tensor, "block top"]  # the same of the block outputs
    attention_to_first: Float[Tensor, "layer head"]  # attention that position 0 gets, of the queries that see it, mean
    closure: float  # largest |embedding + sum of writes - stream| at the followed channels, over the point's max |h|
    threshold: float = SPIKE_OVER_MEDIAN  # medians of |h| that a spike exceeds

    @property
    def n_windows(self) -> int:
        """How many windows were traced."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens in a window."""
        return self.tokens.shape[1]

    @property
    def ordinary(self) -> slice:
        """The part of `channels` that was drawn at random as a control."""
        return slice(self.n_followed, len(self.channels))


@dataclass(frozen=True)
class Profile:
    """One prompt, token by token: what `profile` returns."""

    tokens: tuple[str, ...]
    magnitude: Float[Tensor, "point token"]  # max |h| over channels
    channel: Int[Tensor, "point token"]  # which channel that is
    median: Float[Tensor, " point"]  # median of |h| over tokens and channels
    attention: Float[Tensor, "layer token"]  # what each token gets, mean over heads and over the queries that see it


def trace_windows(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], seed: int = 0, threshold: float = SPIKE_OVER_MEDIAN
) -> Trace:
    """Follow the residual stream, every block's write and the attention on position 0 through all windows.

    Which channels to follow is measured first, on the first window; a channel that spikes only later is then
    followed too, in a second pass over all windows.

    Args:
        model: as `load` returns it.
        tokens: windows, as `windows` returns them.
        seed: of the ordinary channels and tokens that serve as controls.
        threshold: how many medians of |h| an entry must exceed to be a spike. Models that are small or young do not
            reach 100; what is found with less is a spike in the making.

    Raises:
        ValueError: `tokens` is not two-dimensional, is empty, or is longer than the model's context; a token is not in
            its vocabulary; a window holds nothing but padding; or the threshold is not above 1.
        FloatingPointError: as `follow` does.
    """
    about = anatomy(model)
    check_tokens(model, tokens)
    check_length(model, tokens.shape[1])
    check_not_padding(model, tokens)
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 1 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold!r}; give a number of medians above 1.")
    first = _Pass(model, about, (), seed, threshold).over(tokens[:1], "finding channels")
    followed = first.above(threshold / 2)
    while True:
        done = _Pass(model, about, followed, seed, threshold).over(tokens, "tracing windows")
        if set(done.above(threshold)) <= set(followed):
            return done.result()
        followed = done.above(threshold / 2)


def profile(model: TransformerBridge, tokens: Int[Tensor, " length"]) -> Profile:
    """Look at one prompt token by token: how large each gets at every point, and how much attention it draws.

    Args:
        model: as `load` returns it.
        tokens: the token ids of one prompt, without a batch dimension (`model.to_tokens(prompt)[0]`).

    Raises:
        ValueError: no tokens, more than the model's context, or one that is not in its vocabulary.
        FloatingPointError: as `follow` does.
    """
    about = anatomy(model)
    check_ids(tokens)
    if tokens.ndim != 1 or not 0 < len(tokens) <= about.context:
        raise ValueError(
            f"a prompt of shape {list(tokens.shape)} cannot be looked at; give 1 to {about.context} tokens."
        )
    check_vocabulary(model, tokens)
    n_points, length = about.n_blocks + 1, len(tokens)
    magnitude = torch.zeros(n_points, length)
    channel = torch.zeros(n_points, length, dtype=torch.long)
    median = torch.zeros(n_points)
    attention = torch.zeros(about.n_layers, length)

    def on_stream(point: int, h: Float[Tensor, "token d_model"]) -> None:
        magnitude[point], channel[point] = (x.cpu() for x in h.abs().max(-1))
        median[point] = h.abs().median()

    def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        attention[layer] = received(pattern, about.sight[layer]).mean(0).cpu()

    follow(model, tokens, on_stream, on_pattern=on_pattern)
    return Profile(tuple(model.tokenizer.decode([i]) for i in tokens.tolist()), magnitude, channel, median, attention)


def summarize(profile: Profile) -> dict[str, Any]:
    """What stands out in a profile: the largest entry over the median, whose it is, and what the first token draws.

    Returns:
        token, text, channel and point of the largest entry; its value and its factor over the median there; the
        runner_up token's factor at that point; the attention that the first token gets, mean over layers, and the
        share it would get if every query attended evenly to all it sees.
    """
    over = profile.magnitude / profile.median[:, None]
    point, token = (int(i) for i in torch.unravel_index(over.argmax(), over.shape))
    others = over[point].clone()
    others[token] = 0
    n_tokens = len(profile.tokens)
    return {
        "token": token,
        "text": profile.tokens[token].replace("\n", "\\n"),
        "channel": int(profile.channel[point, token]),
        "point": point,
        "value": float(profile.magnitude[point, token]),
        "factor": float(over[point, token]),
        "runner_up": float(others.max()),
        "first": float(profile.attention[:, 0].mean()),
        "even": sum(1 / (i + 1) for i in range(n_tokens)) / n_tokens,
    }


def received(pattern: Float[Tensor, "head query key"], sight: int | None = None) -> Float[Tensor, "head key"]:
    """Attention that each key gets, mean over the queries at or after it that have it in sight (Gu et al.'s alpha).

    Args:
        pattern: of one layer; of its keys all, or the first ones.
        sight: how many tokens back a query sees, itself included (`Anatomy.sight`); None for all.
    """
    queries = torch.arange(pattern.shape[-2], 0, -1, device=pattern.device)[: pattern.shape[-1]]
    return pattern.sum(1) / (queries if sight is None else queries.clamp(max=sight))


def follow(
    model: TransformerBridge,
    tokens: Int[Tensor, " length"],
    on_stream: OnStream | None = None,
    on_write: OnWrite | None = None,
    on_pattern: OnPattern | None = None,
    also: Sequence[tuple[str, OnHook]] = (),
) -> None:
    """Run one window and hand on what passes, in float32: each point of the stream, each write, each pattern.

    The stream between a layer's attention and its MLP is the stream that entered the layer plus the attention's
    write; some families have no such place in their code, because both read the same stream. No logits are made.

    Args:
        model: as `load` returns it.
        tokens: one window.
        on_stream: called as on_stream(point, h [token, d_model]) for every point, from 0.
        on_write: called as on_write(block, what it adds [token, d_model]) for every block, from 1.
        on_pattern: called as on_pattern(layer, attention [head, query, key]) for every layer.
        also: further hooks, by TransformerLens's names; each is called with the hook's value, without its batch.

    Raises:
        FloatingPointError: an activation overflows, as spikes do in float16, or a weight is not finite.
        RuntimeError: a hook of this family never fires.
    """
    about = anatomy(model)
    entered: dict[int, Tensor] = {}
    fired: set[str] = set()

    def layer_hook(value, hook):
        fired.add(hook.name)
        layer = about.layer_hooks.index(hook.name)
        entered.clear()
        entered[layer] = value[0].float()
        if not entered[layer].isfinite().all():
            raise FloatingPointError(not_finite(model, f"the residual stream as it enters layer {layer}"))
        if on_stream is not None:
            on_stream(Block(2 * layer), entered[layer])

    def write_hook(value, hook):
        fired.add(hook.name)
        block = about.write_hooks.index(hook.name) + 1
        write = value[0].float()
        if on_write is not None:
            on_write(Block(block), write)
        if on_stream is not None and block % 2:
            on_stream(Block(block), entered[block // 2] + write)

    def pattern_hook(value, hook):
        fired.add(hook.name)
        on_pattern(about.pattern_hooks.index(hook.name), value[0].float())

    def other_hook(call):
        def hooked(value, hook):
            fired.add(hook.name)
            call(value[0].float())

        return hooked

    hooks = [(name, layer_hook) for name in about.layer_hooks]
    if on_stream is not None or on_write is not None:
        hooks += [(name, write_hook) for name in about.write_hooks]
    if on_pattern is not None:
        hooks += [(name, pattern_hook) for name in about.pattern_hooks]
    hooks += [(name, other_hook(call)) for name, call in also]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        run_layers(model, tokens[None])
    if silent := [name for name, _ in hooks if name not in fired]:
        raise RuntimeError(f"{len(silent)} hooks of this {about.family} model never fired, the first is {silent[0]}.")


class _Pass:
    """The sums of one pass, while it runs."""

    def __init__(self, model: TransformerBridge, about: Anatomy, followed: Sequence[int], seed: int, threshold: float):
        self.model, self.about, self.threshold = model, about, threshold
        self.generator = torch.Generator().manual_seed(seed)
        others = [c for c in torch.randperm(about.d_model, generator=self.generator).tolist() if c not in followed]
        self.n_followed = len(followed)
        self.channels = torch.tensor([*followed, *others[:ORDINARY_CHANNELS]])
        n_points = about.n_blocks + 1
        self.n_candidates = 0
        self.windows: list[Tensor] = []
        self.medians: list[Tensor] = []
        self.top_stream = torch.zeros(n_points, TOP)
        self.top_writes = torch.zeros(about.n_blocks, TOP)
        self.attention = torch.zeros(about.n_layers, about.n_heads)
        self.ratio = torch.zeros(about.d_model)  # the largest |h| over its window's median, by channel
        self.closure = 0.0
        self.rows: Rows | None = None

    def over(self, tokens: Int[Tensor, "n length"], label: str) -> "_Pass":
        for window in progress(tokens, label, "window"):
            self._one(window)
        return self

    def above(self, medians: float) -> list[int]:
        """Channels with an entry above so many medians, the strongest first."""
        order = self.ratio.argsort(descending=True, stable=True).tolist()
        return [c for c in order if self.ratio[c] > medians][:MAX_CHANNELS]

    def _one(self, window: Int[Tensor, " length"]) -> None:
        about, length = self.about, len(window)
        n_points = about.n_blocks + 1
        stream = torch.zeros(length, n_points, len(self.channels))
        writes = torch.zeros(length, about.n_blocks, len(self.channels))
        top_channels = torch.zeros(length, n_points, TOP, dtype=torch.long)
        top_values = torch.zeros(length, n_points, TOP)
        medians = torch.zeros(n_points)
        candidate = torch.zeros(length, dtype=torch.bool)

        def on_stream(point: int, h: Float[Tensor, "token d_model"]) -> None:
            size = h.abs()
            median = size.median()
            by_channel = size.amax(0)
            values, indices = size.topk(TOP, dim=-1)
            medians[point] = median
            stream[:, point] = h[:, self.channels.to(h.device)].cpu()
            top_values[:, point], top_channels[:, point] = values.cpu(), indices.cpu()
            candidate.logical_or_((values[:, 0] > self.threshold * median).cpu())
            torch.maximum(self.ratio, (by_channel / median).cpu(), out=self.ratio)
            self.top_stream[point] += by_channel.topk(TOP).values.cpu()

        def on_write(block: int, write: Float[Tensor, "token d_model"]) -> None:
            writes[:, block - 1] = write[:, self.channels.to(write.device)].cpu()
            self.top_writes[block - 1] += write.abs().amax(0).topk(TOP).values.cpu()

        def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
            self.attention[layer] += received(pattern[..., :1], about.sight[layer])[:, 0].cpu()

        follow(self.model, window, on_stream, on_write, on_pattern)

        drawn = torch.zeros(length, dtype=torch.bool)
        drawn[torch.randperm(length, generator=self.generator)[:ORDINARY_TOKENS]] = True
        largest = top_values[..., 0].amax(1)
        error = (stream[:, :1] + writes.cumsum(1) - stream[:, 1:]).abs().amax((0, 2))
        self.closure = max(self.closure, float((error / top_values[:, 1:, 0].amax(0)).max()))
        found = Rows(
            window=torch.full((length,), len(self.windows)),
            position=torch.arange(length),
            token=window.cpu(),
            drawn=drawn,
            candidate=candidate,
            largest=largest,
            stream=stream,
            writes=writes,
            top_channels=top_channels,
            top_values=top_values,
        )[candidate | drawn]
        self.rows = found if self.rows is None else _joined(self.rows, found)
        self.medians.append(medians)
        self.n_candidates += int(candidate.sum())
        self.windows.append(window.cpu())

    def result(self) -> Trace:
        medians, n_windows = torch.stack(self.medians), len(self.windows)
        return Trace(
            anatomy=self.about,
            tokens=torch.stack(self.windows),
            channels=self.channels,
            n_followed=self.n_followed,
            n_candidates=self.n_candidates,
            rows=self.rows,
            medians=medians.mean(0),
            window_medians=medians,
            top_stream=self.top_stream / n_windows,
            top_writes=self.top_writes / n_windows,
            attention_to_first=self.attention / n_windows,
            closure=self.closure,
            threshold=self.threshold,
        )


def _joined(first: Rows, second: Rows) -> Rows:
    """Both; of candidates the MAX_ROWS strongest, and of tokens drawn at random the first MAX_DRAWN."""
    both = Rows(**{f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Rows)})
    candidates = both.largest.masked_fill(~both.candidate, -1)
    keep = both.drawn & (both.drawn.cumsum(0) <= MAX_DRAWN)
    keep[candidates.topk(min(MAX_ROWS, len(both))).indices] = True
    return both[keep & (both.candidate | both.drawn)]
