"""One pass over the windows that keeps what the life cycle needs, reduced at each hook as it streams by.

A *point* p = 0 … 2L is a place in the residual stream: point 0 is the embedding, point b the stream after block b.
What is kept of a window is a few numbers a point and one row for each token that spikes somewhere, so memory does not
grow with the length of the text but by the spikes in it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from numbers import Real
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from spikesink.common import CommandError, progress
from spikesink.model.anatomy import (
    Anatomy,
    Block,
    Model,
    anatomy,
    check_ids,
    check_length,
    check_not_padding,
    check_tokens,
    check_vocabulary,
    not_finite,
    run_layers,
)
from spikesink.model.proof import Proof, proof_of, visible

SPIKE_OVER_MEDIAN = 100.0  # an entry of the stream is a spike above this many medians of |h| (claim LC4)
TOP = 3  # the paper draws the three largest channels
ORDINARY_TOKENS = 4  # drawn from every window, as controls
ORDINARY_CHANNELS = 16  # drawn once, as controls
MAX_CHANNELS = 48  # followed, the strongest first
MAX_ROWS = 4096  # of candidates kept, the strongest first
MAX_DRAWN = 1024  # of ordinary tokens kept

Hook = tuple[str, Callable[[Tensor], None]]  # a name of TransformerLens, and what is called with its value


def median(values: Tensor) -> float:
    """Median; of an even number, the mean of the middle two; nan of none."""
    return float(np.median(values.numpy())) if values.numel() else math.nan


def variation(values: Tensor) -> float:
    """Coefficient of variation: standard deviation over absolute mean; nan of none."""
    return float(values.std(correction=0) / values.mean().abs()) if len(values) else math.nan


def spearman(a: Float[Tensor, " head"], b: Float[Tensor, " head"]) -> float:
    """Rank correlation of two measures over heads, without those in which either is nan."""
    return float(spearmanr(a.numpy(), b.numpy(), nan_policy="omit").statistic)


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
    """What one pass over the windows keeps; medians and magnitudes are in the stream's own units."""

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
    proof: Proof  # of the model
    threshold: Real = SPIKE_OVER_MEDIAN  # medians of |h| that a spike exceeds

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
    """One prompt, token by token."""

    tokens: tuple[str, ...]
    magnitude: Float[Tensor, "point token"]  # max |h| over channels
    channel: Int[Tensor, "point token"]  # which channel that is
    median: Float[Tensor, " point"]  # median of |h| over tokens and channels
    attention: Float[Tensor, "layer token"]  # what each token gets, mean over heads and over the queries that see it


def trace_windows(
    model: Model, tokens: Int[Tensor, "n length"], seed: int = 0, threshold: Real = SPIKE_OVER_MEDIAN
) -> Trace:
    """Follow the residual stream, every block's write and the attention on position 0 through all windows.

    Which channels to follow is measured on the first window; where a channel spikes only later, a second pass over all
    windows follows it too. An entry is a spike above `threshold` medians of |h|; models that are small or young do not
    reach 100, and what is found with less is a spike in the making.
    """
    anatomy(model)  # what is no model is refused here
    check_tokens(model, tokens)
    check_length(model, tokens.shape[1])
    check_not_padding(model, tokens)
    if not isinstance(threshold, Real) or isinstance(threshold, bool) or not 1 < threshold < math.inf:
        raise ValueError(f"threshold is {threshold!r}; give a number of medians above 1.")
    first = _Pass(model, (), seed, threshold).over(tokens[:1], "finding channels")
    channels = first.above(threshold / 2)
    while True:
        traced = _Pass(model, channels, seed, threshold).over(tokens, "tracing windows")
        if set(traced.above(threshold)) <= set(channels):
            return traced.result(tokens)
        channels = traced.above(threshold / 2)


def profile(model: Model, tokens: Int[Tensor, " length"]) -> Profile:
    """How large each token of one prompt (no batch dimension) gets at every point, and how much attention it draws."""
    check_ids(tokens)
    hooked = anatomy(model)
    context = hooked.context
    if tokens.ndim != 1 or not 0 < len(tokens) <= context:
        raise ValueError(f"a prompt of shape {list(tokens.shape)} cannot be looked at; give 1 to {context} tokens.")
    check_vocabulary(model, tokens)
    points, attention = {}, {}

    def on_stream(point: Block, h: Float[Tensor, "token d_model"]) -> None:
        points[point] = [x.cpu() for x in (*h.abs().max(-1), h.abs().median())]

    def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        attention[layer] = received(pattern).mean(0).cpu()

    follow(model, tokens, on_stream, on_pattern=on_pattern)
    texts = tuple(model.tokenizer.decode([i]) for i in tokens.tolist())
    magnitude, channel, medians = (torch.stack(x) for x in zip(*_in_order(points), strict=True))
    received_by = torch.full((hooked.n_layers, len(tokens)), math.nan)
    for layer, values in attention.items():
        received_by[layer] = values
    return Profile(texts, magnitude, channel, medians, received_by)


def summarize(profile: Profile) -> dict[str, Any]:
    """What stands out in a profile: the token, text, channel, point and value of the largest entry.

    `factor`: over the median there; `runner_up`: the next token's factor at that point; `first`: attention that the
    first token gets, mean over layers; `even`: what it would get if every query attended evenly to all it sees.
    """
    over = profile.magnitude / profile.median[:, None]
    point, token = (int(i) for i in torch.unravel_index(over.argmax(), over.shape))
    n_tokens = len(profile.tokens)
    return {
        "token": token,
        "text": profile.tokens[token].replace("\n", "\\n"),
        "channel": int(profile.channel[point, token]),
        "point": Block(point),
        "value": float(profile.magnitude[point, token]),
        "factor": float(over[point, token]),
        "runner_up": float(over[point, torch.arange(n_tokens) != token].max()) if n_tokens > 1 else 0.0,
        "first": float(profile.attention[:, 0].nanmean()),
        "even": sum(1 / (i + 1) for i in range(n_tokens)) / n_tokens,
    }


EPSILON = 0.3  # a sink's score (`received`) exceeds it: Gu et al.'s
EPSILONS = (0.2, 0.4)  # that SV3 and TR1 to TR6 ask for as well


def received(
    pattern: Float[Tensor, "head query key"], sees: Bool[Tensor, "query key"] | None = None
) -> Float[Tensor, "head key"]:
    """Attention that each key gets, mean over the queries at or after it that have it in sight (Gu et al.'s alpha).

    Which those are is read off the pattern, unless it was edited: then `sees` must say.
    """
    return pattern.sum(1) / (visible(pattern) if sees is None else sees).sum(0).clamp(min=1)


def follow(
    model: Model,
    tokens: Int[Tensor, " length"],
    on_stream: Callable[[Block, Float[Tensor, "token d_model"]], None] | None = None,
    on_write: Callable[[Block, Float[Tensor, "token d_model"]], None] | None = None,
    on_pattern: Callable[[int, Float[Tensor, "head query key"]], None] | None = None,
    also: Sequence[Hook] = (),
) -> None:
    """Run one window and hand on what passes, in float32: each point of the stream, each write, each pattern.

    Called as on_stream(point, h), on_write(block, what it adds) and on_pattern(layer, attention); `also` are further
    hooks, each called with its value, unbatched. The stream between a layer's attention and its MLP is the stream
    that entered the layer plus the attention's write; some families have no such place in their code, because both read
    the same stream. A block that a layer does not have writes zeros. Where the writes that hooks show do not add up to
    the stream, all that a layer changes is handed on as its second block's. No logits are made. A hook that never fires
    is a CommandError.
    """
    hooks_of, entered = anatomy(model), torch.empty(0)
    proof = proof_of(model)
    adds_up = proof.holds("writes")
    shown = hooks_of.write_hooks if adds_up else (None,) * hooks_of.n_blocks

    def enter_layer(layer: int, h: Tensor) -> None:
        nonlocal entered
        if not h.isfinite().all():
            raise FloatingPointError(not_finite(model, f"the residual stream as it enters layer {layer}"))
        if layer and not adds_up and on_write is not None:
            on_write(Block(2 * layer), h - entered)
        entered = h
        if on_stream is not None:
            on_stream(Block(2 * layer), h)
        for block in map(Block, (2 * layer + 1, 2 * layer + 2)):
            if block <= hooks_of.n_blocks and shown[block - 1] is None and (adds_up or block.is_attention):
                write_block(block, torch.zeros_like(h))

    def write_block(block: Block, write: Tensor) -> None:
        if on_write is not None:
            on_write(block, write)
        if on_stream is not None and block.is_attention:
            on_stream(block, entered + write)

    calls = [(name, partial(enter_layer, layer)) for layer, name in enumerate(hooks_of.layer_hooks)]
    if on_stream is not None or on_write is not None:
        calls += [(name, partial(write_block, Block(b))) for b, name in enumerate(shown, 1) if name is not None]
    if on_pattern is not None and proof.holds("patterns"):
        patterns = [(layer, hooks_of.pattern_hooks[layer]) for layer in hooks_of.attention_layers]
        calls += [(name, partial(on_pattern, layer)) for layer, name in patterns]
    _run_hooked(model, tokens, [*calls, *also])


def _run_hooked(model: Model, tokens: Int[Tensor, " length"], calls: Sequence[Hook]) -> None:
    """Run one window, and call each function with the value of its hook, without its batch and in float32."""
    fired: set[str] = set()

    def hooked(call: Callable[[Tensor], None]):
        def hook_function(value, hook) -> None:
            fired.add(hook.name)
            call(value[0].float())

        return hook_function

    with torch.inference_mode(), model.hooks(fwd_hooks=[(name, hooked(call)) for name, call in calls]):
        run_layers(model, tokens[None])
    if silent := [name for name, _ in calls if name not in fired]:
        family = anatomy(model).family
        raise CommandError(
            f"this {family} model cannot be measured: {len(silent)} places in it are not to be seen, the first is "
            f"{silent[0]}; try a model of another family."
        )


class _Pass:
    """One pass over windows: what is summed over them, and the rows that are kept."""

    def __init__(self, model: Model, followed: Sequence[int], seed: int, threshold: Real):
        self.model, self.anatomy, self.threshold = model, anatomy(model), threshold
        self.generator = torch.Generator().manual_seed(seed)
        d_model = self.anatomy.d_model
        others = [c for c in torch.randperm(d_model, generator=self.generator).tolist() if c not in followed]
        self.n_followed, self.channels = len(followed), torch.tensor([*followed, *others[:ORDINARY_CHANNELS]])
        self.medians: list[Float[Tensor, " point"]] = []
        self.top_stream = torch.zeros(self.anatomy.n_blocks + 1, TOP)
        self.top_writes = torch.zeros(self.anatomy.n_blocks, TOP)
        self.attention = torch.full((self.anatomy.n_layers, self.anatomy.n_heads), math.nan)
        self.attention[list(self.anatomy.attention_layers)] = 0
        self.ratio = torch.zeros(d_model)  # the largest |h| over its window's median, by channel
        self.closure, self.n_candidates = 0.0, 0
        self.rows: Rows | None = None

    def over(self, tokens: Int[Tensor, "n length"], label: str) -> "_Pass":
        """Add up windows."""
        for window in progress(tokens, label, "window"):
            rows = self._follow(window)
            self.n_candidates += int(rows.candidate.sum())
            error = (rows.stream[:, :1] + rows.writes.cumsum(1) - rows.stream[:, 1:]).abs().amax((0, 2))
            self.closure = max(self.closure, float((error / rows.top_values[:, 1:, 0].amax(0)).max()))
            rows.drawn[torch.randperm(len(rows), generator=self.generator)[:ORDINARY_TOKENS]] = True
            kept = rows[rows.candidate | rows.drawn]
            self.rows = kept if self.rows is None else _joined(self.rows, kept)
        return self

    def above(self, medians: Real) -> list[int]:
        """Channels with an entry above so many medians, the strongest first."""
        order = self.ratio.argsort(descending=True, stable=True).tolist()
        return [c for c in order if self.ratio[c] > medians][:MAX_CHANNELS]

    def result(self, tokens: Int[Tensor, "n length"]) -> Trace:
        """All that was added up."""
        medians, n_windows = torch.stack(self.medians), len(self.medians)
        return Trace(
            anatomy=self.anatomy,
            tokens=tokens.cpu(),
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
            proof=proof_of(self.model),
            threshold=self.threshold,
        )

    def _follow(self, window: Int[Tensor, " length"]) -> Rows:
        """Add one window to the sums; a row for each of its tokens."""
        stream, writes, top, medians = {}, {}, {}, {}

        def on_stream(point: Block, h: Float[Tensor, "token d_model"]) -> None:
            size = h.abs()
            by_channel, middle = size.amax(0), size.median()
            self.top_stream[point] += by_channel.topk(TOP).values.cpu()
            torch.maximum(self.ratio, (by_channel / middle).cpu(), out=self.ratio)
            medians[point] = middle.cpu()
            stream[point] = h[:, self.channels.to(h.device)].cpu()
            top[point] = [x.cpu() for x in size.topk(TOP, dim=-1)]

        def on_write(block: Block, write: Float[Tensor, "token d_model"]) -> None:
            self.top_writes[block - 1] += write.abs().amax(0).topk(TOP).values.cpu()
            writes[block] = write[:, self.channels.to(write.device)].cpu()

        def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
            self.attention[layer] += received(pattern)[:, 0].cpu()

        follow(self.model, window, on_stream, on_write, on_pattern)
        self.medians.append(torch.stack(_in_order(medians)))
        values, channels = (torch.stack(x, dim=1) for x in zip(*_in_order(top), strict=True))
        return Rows(
            window=torch.full((len(window),), len(self.medians) - 1),
            position=torch.arange(len(window)),
            token=window.cpu(),
            drawn=torch.zeros(len(window), dtype=torch.bool),
            candidate=(values[..., 0] > self.threshold * self.medians[-1]).any(1),
            largest=values[..., 0].amax(1),
            stream=torch.stack(_in_order(stream), dim=1),
            writes=torch.stack(_in_order(writes), dim=1),
            top_channels=channels,
            top_values=values,
        )


def _in_order(values: dict[int, Any]) -> list[Any]:
    """What hooks gave, by depth, in whatever order they fired."""
    return [values[key] for key in sorted(values)]


def _joined(first: Rows, second: Rows) -> Rows:
    """Both; of candidates the MAX_ROWS strongest, and of tokens drawn at random the first MAX_DRAWN."""
    both = Rows(**{f.name: torch.cat([getattr(first, f.name), getattr(second, f.name)]) for f in fields(Rows)})
    candidates = both.largest.masked_fill(~both.candidate, -1)
    keep = both.drawn & (both.drawn.cumsum(0) <= MAX_DRAWN)
    keep[candidates.topk(min(MAX_ROWS, len(both))).indices] = True
    return both[keep & (both.candidate | both.drawn)]


class Mean:
    """A running mean at each of several places (points or layers), of values that come a few at a time."""

    def __init__(self, *shape: int):
        self.sum, self.n = torch.zeros(*shape), torch.zeros(shape[0])

    def add(self, place: int, values: Tensor) -> None:
        """Count values [item, ...] at a place."""
        self.sum[place] += values.sum(0).cpu()
        self.n[place] += len(values)

    def result(self) -> Tensor:
        """The means [place, ...]; not a number where there were no values."""
        return self.sum / self.n.view(-1, *[1] * (self.sum.ndim - 1))


class Reducer:
    """What reduces each window to a few numbers while it streams by; `reduce_windows` runs several in one pass."""

    on_stream: Callable[[Block, Float[Tensor, "token d_model"]], None] | None = None
    on_scores: Callable[[int, Float[Tensor, "head key"]], None] | None = None  # layer, `received` attention

    def begin(self, index: int, window: Int[Tensor, " position"]) -> None:
        """A window begins."""

    def hooks(self) -> Sequence[Hook]:
        """Further hooks, as `follow` takes them."""
        return ()

    def end(self) -> None:
        """The window has passed."""


def reduce_windows(model: Model, tokens: Int[Tensor, "n length"], reducers: Sequence[Reducer], label: str) -> None:
    """Run every window once, through all reducers."""
    streams = [reducer.on_stream for reducer in reducers if reducer.on_stream]
    scores = [reducer.on_scores for reducer in reducers if reducer.on_scores]

    def on_stream(point: Block, h: Float[Tensor, "token d_model"]) -> None:
        for call in streams:
            call(point, h)

    def on_pattern(layer: int, pattern: Float[Tensor, "head query key"]) -> None:
        of_layer = received(pattern).cpu()
        for call in scores:
            call(layer, of_layer)

    for index, window in enumerate(progress(tokens, label, "window")):
        for reducer in reducers:
            reducer.begin(index, window)
        hooks = [hook for reducer in reducers for hook in reducer.hooks()]
        follow(model, window, on_stream if streams else None, None, on_pattern if scores else None, hooks)
        for reducer in reducers:
            reducer.end()
