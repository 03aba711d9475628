"""Why the first token: what a token becomes that can attend to nobody but itself (the paper's section on spike tokens).

At position 0 softmax runs over one key and is 1, so attention is the fixed map h -> W_O W_V h, the same whatever the
text is. `static_path` sends tokens through that map and the FFNs, without any attention scores; `probe` asks it of the
whole vocabulary. `after_text` is the other path: the same tokens at the end of a text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.amplifier import step_up_direction
from spikesink.chain.lifecycle import STEP, Lifecycle, check_model, first_step_up
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Anatomy, check_tokens, check_vocabulary, normalise
from spikesink.model.weights import Weights, require_static_map

BATCH = 2048  # tokens at a time: as fast as any on the machines tried, and small beside the stream of a vocabulary


Watch = Callable[[int, slice, Float[Tensor, "token d_model"]], None]  # point, which tokens, their stream


Decode = Callable[[list[int]], str]


@measure
@torch.inference_mode()
def static_path(
    weights: Weights,
    tokens: Int[Tensor, " token"],
    block: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    watch: Watch | None = None,
) -> Float[Tensor, "token d_model"]:
    """The residual stream after a block, of tokens that each stand at position 0 of a window of their own.

    Layer by layer, so that each layer's weights are needed once; what is held is the stream, in float32.

    Args:
        weights: of a loaded model (`weights_of`), or read as they are needed (`open_weights`).
        tokens: their ids.
        block: the last block to run, as the paper counts them; 0 is the embedding.
        dtype: of the matrix products; the stream itself stays in float32.
        device: where to compute.
        watch: called as watch(point, which tokens, their stream) at the embedding and after every block.

    Raises:
        ValueError: the model has no such block, or no such token.
        FloatingPointError: a weight is not finite, or the stream overflows.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"a static path is one of weights, not of a {type(weights).__name__}; give weights_of(model).")
    about = weights.anatomy
    if not isinstance(block, Integral) or not 0 <= block <= about.n_blocks:
        raise ValueError(f"block {block!r} does not exist; this model has blocks 1 to {about.n_blocks}.")
    require_static_map(about)
    _check(weights, tokens)
    x = weights.embed(tokens).to(device)  # all at once: an embedding that is on disk is read for every call
    for part in batches(len(tokens)) if watch else ():
        watch(0, part, x[part])
    for layer in progress(range((block + 1) // 2), "following the static path", "layer"):
        through_layer(weights, layer, x, block, dtype, watch)
    return x


def batches(n: int) -> list[slice]:
    """BATCH tokens at a time."""
    return [slice(i, i + BATCH) for i in range(0, n, BATCH)]


@torch.inference_mode()
def through_layer(
    weights: Weights,
    layer: int,
    x: Float[Tensor, "token d_model"],
    block: int | None = None,
    dtype: torch.dtype = torch.float32,
    watch: Watch | None = None,
) -> None:
    """Send tokens that stand at position 0 through one layer: x, what enters it, becomes what leaves it.

    Args:
        weights: as for `static_path`.
        layer: which, from 0.
        x: the stream, in float32; changed in place.
        block: the last block to run; by default the layer's own last one.
        dtype, watch: as for `static_path`.
    """
    watch = watch or (lambda point, part, stream: None)
    attend = _attend(weights, layer, dtype, x.device)
    feed = _feed(weights, layer, dtype, x.device) if block is None or 2 * layer + 2 <= block else None
    for part in batches(len(x)):
        here = x[part]
        entered = here.clone() if weights.anatomy.parallel else here
        attend(here, here)
        watch(2 * layer + 1, part, here)
        if feed is not None:
            feed(entered, here)
            watch(2 * layer + 2, part, here)
    if not x.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        advice = "get the model again" if dtype == torch.float32 else "use float32"
        raise FloatingPointError(f"the static path is not finite after layer {layer} in {name}; {advice}.")


def _check(model: TransformerBridge | Weights, tokens: Int[Tensor, " token"]) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError("tokens must be a one-dimensional tensor of token ids, and not empty.")
    check_vocabulary(model, tokens)


def _attend(weights: Weights, layer: int, dtype: torch.dtype, device) -> Callable[[Tensor, Tensor], None]:
    """Add a layer's attention, of the stream in the first argument, to the second."""
    about, attention = weights.anatomy, weights.attention(layer)
    value, out = (t.to(device, dtype) for t in (attention.value, attention.out))
    bias = attention.bias.to(device)

    def attend(x: Tensor, into: Tensor) -> None:
        h = x if about.attention_norm is None else normalise(x, about)
        _add(into, functional.linear(h.to(dtype), value), out, bias, attention.post_scale, about)

    return attend


def _feed(weights: Weights, layer: int, dtype: torch.dtype, device) -> Callable[[Tensor, Tensor], None]:
    """Add a layer's FFN, of the stream in the first argument, to the second."""
    about = weights.anatomy
    if not about.one_gated_ffn:
        return _feed_through(weights, layer)
    ffn = weights.ffn(layer)
    gate, up, down = (t.to(device, dtype) for t in (ffn.gate, ffn.up, ffn.down))
    gate_bias, up_bias = (t.to(device, dtype) if t.any() else None for t in (ffn.gate_bias, ffn.up_bias))
    bias = (torch.zeros(about.d_model) if ffn.down_bias is None else ffn.down_bias).to(device)

    def feed(x: Tensor, into: Tensor) -> None:
        h = (x if about.ffn_norm is None else normalise(x, about)).to(dtype)
        hidden = ffn.activation(functional.linear(h, gate, gate_bias)).mul_(functional.linear(h, up, up_bias))
        _add(into, hidden, down, bias, ffn.post_scale, about)

    return feed


def _feed_through(weights: Weights, layer: int) -> Callable[[Tensor, Tensor], None]:
    """The same by the model's own modules, where the FFN is not one gated FFN."""
    about, names = weights.anatomy, (weights.anatomy.ffn_norm, "mlp", "ln2_post")

    def feed(x: Tensor, into: Tensor) -> None:
        with weights.block(layer, *names) as block:
            parts, like = dict(block.named_children()), next(block.mlp.parameters())
            h = x[:, None].to(like.device, like.dtype)
            for name in names:
                if name in parts:
                    h = parts[name](h)
                    h = h[0] if isinstance(h, tuple) else h  # some experts return their router's choice as well
        into.add_(h[:, 0].to(into.device, into.dtype), alpha=about.residual_multiplier)

    return feed


def _add(into: Tensor, hidden: Tensor, matrix: Tensor, bias: Tensor, post_scale: Tensor | None, about: Anatomy) -> None:
    """Add matrix @ hidden + bias, through the block's output norm where it has one, to the stream."""
    if post_scale is None and hidden.dtype == into.dtype:
        into.addmm_(hidden, matrix.T, alpha=about.residual_multiplier)
        if bias.any():
            into.add_(bias, alpha=about.residual_multiplier)
        return
    write = functional.linear(hidden, matrix).float() + bias
    if post_scale is not None:
        write = normalise(write, about) * post_scale.to(write.device)
    into.add_(write, alpha=about.residual_multiplier)


@torch.inference_mode()
def after_text(
    model: TransformerBridge,
    about: Anatomy,
    tokens: Int[Tensor, " token"],
    prefixes: Int[Tensor, "token position"],
    block: int,
    watch: Watch | None = None,
) -> Float[Tensor, "token d_model"]:
    """The residual stream after a block, of tokens that each stand at the end of a text, by whole forward passes.

    Args:
        model: as `load` returns it.
        about: its anatomy.
        tokens: their ids.
        prefixes: what stands before each of them; no columns for nothing.
        block: the last block to run, as the paper counts them, from 1.
        watch: as for `static_path`.

    Raises:
        ValueError: the model has no such block, or no such token.
    """
    if not 0 < block <= about.n_blocks:
        raise ValueError(f"block {block} does not exist; this model has blocks 1 to {about.n_blocks}.")
    _check(model, tokens)
    last = torch.zeros(len(tokens), about.d_model)
    windows = torch.cat([prefixes, tokens[:, None]], dim=1)
    size = max(1, BATCH // windows.shape[1])
    for start in range(0, len(tokens), size):
        part = slice(start, start + size)
        points = _points_at_the_end(model, about, windows[part], (block + 1) // 2)
        if watch is not None:
            for point in range(block + 1):
                watch(point, part, points[point])
        last[part] = points[block]
    return last


def _points_at_the_end(
    model: TransformerBridge, about: Anatomy, windows: Int[Tensor, "window position"], n_layers: int
) -> list[Float[Tensor, "window d_model"]]:
    """The stream of the last token, at the embedding and after every block of the first layers."""
    seen: dict[str, Tensor] = {}
    names = (*about.layer_hooks[:n_layers], *about.write_hooks[: 2 * n_layers])
    hooks = [(name, lambda value, hook: seen.update({hook.name: value[:, -1].float().cpu()})) for name in names]
    with model.hooks(fwd_hooks=hooks):
        model(windows.to(model.cfg.device), stop_at_layer=n_layers)
    points = []
    for layer in range(n_layers):
        entered = seen[about.layer_hooks[layer]]
        attended = entered + seen[about.write_hooks[2 * layer]]
        points += [entered, attended]
    return [*points, attended + seen[about.write_hooks[2 * n_layers - 1]]]


@dataclass(frozen=True)
class Probe:
    """How large the spike's first channel gets when a token stands first; signed so that a spike is positive."""

    block: int  # the last step-up block: values are those after it
    channel: int
    sign: float  # of the plateau value
    threshold: float  # a tenth of the plateau value
    tokens: Int[Tensor, " token"]
    value: Float[Tensor, " token"]
    before: Float[Tensor, " token"]  # before the first step-up block

    @property
    def spiking(self) -> Bool[Tensor, " token"]:
        """Which tokens reach the threshold."""
        return self.value >= self.threshold

    @property
    def mostly(self) -> bool:
        """Whether most tokens spike."""
        return float(self.spiking.double().mean()) >= 0.5

    def exceptions(self) -> Int[Tensor, " token"]:
        """The tokens that do not spike where most do, or those that do where most do not.

        The furthest from the threshold first.
        """
        which = self.spiking != self.mostly
        return self.tokens[which][self.value[which].argsort(descending=not self.mostly)]


@measure
def probe(
    weights: Weights,
    life: Lifecycle,
    tokens: Int[Tensor, " token"] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Probe | NotApplicable:
    """Put every entry of the vocabulary at position 0 and see whether it spikes, by the static path.

    Args:
        weights: of a loaded model (`weights_of`), or read as they are needed (`open_weights`).
        life: as `find_lifecycle` returns it: which channel to look at, after which block.
        tokens: only these ids.
        dtype, device: as for `static_path`.

    Returns:
        The probe, or why there is none: nothing spikes, or no block is step-up.

    Raises:
        ValueError: a token that the vocabulary does not have, or `life` was found in another model.
        FloatingPointError: as `static_path` does.
    """
    check_model(weights, life)
    cycle = life.main
    if cycle is None:
        return NotApplicable(life.reason)
    if not cycle.step_up:
        return NotApplicable("no block is step-up, so there is no place to look for the spike")
    require_static_map(weights.anatomy)
    tokens = torch.arange(weights.anatomy.d_vocab) if tokens is None else tokens
    _check(weights, tokens)
    sign, first, last = math.copysign(1, cycle.value), cycle.step_up[0], cycle.step_up[-1]
    before = torch.zeros(len(tokens))

    def watch(point: int, part: slice, stream: Float[Tensor, "token d_model"]) -> None:
        if point == first - 1:
            before[part] = sign * stream[:, cycle.channel].cpu()

    stream = static_path(weights, tokens, last, dtype, device, watch)
    value = sign * stream[:, cycle.channel].cpu()
    return Probe(last, cycle.channel, sign, STEP * abs(cycle.value), tokens, value, before)


def exceptions_table(found: Probe | NotApplicable, decode: Decode, most: int = 12) -> pd.DataFrame | NotApplicable:
    """The exceptions, the furthest from the threshold first: id, text, and what the spike's channel holds."""
    if isinstance(found, NotApplicable):
        return found
    value = dict(zip(found.tokens.tolist(), found.value.tolist(), strict=True))
    rows = [(t, repr(decode([t])), round(value[t])) for t in found.exceptions()[:most].tolist()]
    return pd.DataFrame(rows, columns=["token id", "text", f"channel {found.channel}"])


def in_common(
    weights: Weights, found: Probe | NotApplicable, decode: Decode, most: int = 64, seed: int = 0
) -> dict[str, float] | NotApplicable:
    """What the exceptions have in common, beside tokens drawn at random.

    Returns:
        For both: the mean cosine between their embeddings, the mean norm of an embedding, and the share of them that
        is punctuation or white space.
    """
    if isinstance(found, NotApplicable):
        return found
    some = found.exceptions()[:most]
    if len(some) < 2:
        return NotApplicable("there are not two exceptions to compare")
    order = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(seed))
    values, mostly = {"n": len(some)}, found.tokens[order][found.spiking[order] == found.mostly]
    for name, tokens in (("exceptions", some), ("random", mostly[:256])):
        embedded = weights.embed(tokens)
        values[f"cosine_{name}"] = _alike(functional.normalize(embedded, dim=-1).sum(0), len(tokens))
        values[f"norm_{name}"] = float(embedded.norm(dim=-1).mean())
        values[f"delimiters_{name}"] = sum(is_delimiter(decode([t])) for t in tokens.tolist()) / len(tokens)
    return values


def _alike(total: Float[Tensor, "*batch d_model"], n: int) -> Tensor | float:
    """Mean cosine over all pairs of n unit vectors, from their sum."""
    alike = (total.square().sum(-1) - n) / (n * (n - 1))
    return float(alike) if alike.ndim == 0 else alike


@dataclass(frozen=True)
class Fork:
    """The same tokens on two paths, block by block: first in a window, and after a text.

    `first`, `later` and `exceptions` hold cos(s*, stream) at every point up to the last step-up block, with the sign
    of s* chosen so that tokens that stand first end up positive; `exceptions` is of those at position 0.
    """

    block: int  # whose s* it is
    position: int
    tokens: Int[Tensor, " token"]
    first: Float[Tensor, "point token"]
    later: Float[Tensor, "point token"]
    exceptions: Float[Tensor, "point exception"]
    alike_first: Float[Tensor, " point"]  # mean cosine over pairs of tokens, of their streams
    alike_later: Float[Tensor, " point"]


def fork(
    model: TransformerBridge,
    weights: Weights,
    life: Lifecycle,
    direction: Float[Tensor, " d_model"] | NotApplicable,
    tokens: Int[Tensor, " token"],
    exceptions: Int[Tensor, " exception"],
    windows: Int[Tensor, "n length"],
    position: int = 32,
) -> Fork | NotApplicable:
    """Follow tokens block by block towards s*, at position 0 and after a text.

    Args:
        model, weights: a model and its weights.
        life: as `find_lifecycle` returns it.
        direction: s* of the first step-up block (`step_up_direction`), or why there is none.
        tokens: ids to follow on both paths.
        exceptions: ids to follow at position 0 only.
        windows: text to put the tokens after, one window after another.
        position: how many tokens of text stand before (fewer where the windows are shorter).
    """
    if isinstance(direction, NotApplicable):
        return direction
    about, last, position = weights.anatomy, life.main.step_up[-1], min(position, windows.shape[1] - 1)
    paths = [torch.zeros(last + 1, len(t)) for t in (tokens, tokens, exceptions)]
    sums = torch.zeros(3, last + 1, about.d_model)

    def into(which: int) -> Watch:
        def watch(point: int, part: slice, stream: Float[Tensor, "token d_model"]) -> None:
            unit = functional.normalize(normalise(stream.cpu(), about), dim=-1)
            paths[which][point, part] = unit @ direction
            sums[which, point] += unit.sum(0)

        return watch

    static_path(weights, tokens, last, watch=into(0))
    if len(exceptions):
        static_path(weights, exceptions, last, watch=into(2))
    after_text(model, about, tokens, prefixes(windows, len(tokens), position), last, into(1))
    block = first_step_up(life)
    sign = paths[0][block - 1].median().sign()
    first, later, others = (sign * path for path in paths)
    return Fork(block, position, tokens, first, later, others, *_alike(sums[:2], len(tokens)))


def fork_of_probe(
    model: TransformerBridge,
    weights: Weights,
    life: Lifecycle,
    found: Probe | NotApplicable,
    windows: Int[Tensor, "n length"],
    n: int = 64,
    seed: int = 0,
) -> Fork | NotApplicable:
    """`fork` of n tokens drawn at random from the probed ones, with up to eight of the exceptions beside them."""
    if isinstance(found, NotApplicable):
        return found
    order = torch.randperm(len(found.tokens), generator=torch.Generator().manual_seed(seed))
    drawn, direction = found.tokens[order[:n]], step_up_direction(weights, life)
    return fork(model, weights, life, direction, drawn, found.exceptions()[:8], windows)


def fork_facts(found: Fork | NotApplicable) -> dict[str, float] | NotApplicable:
    """Where the two paths part: medians of the cosine, and by which blocks.

    Returns:
        The number of tokens; the last point before the step-up block and both paths' medians there; from which point on
        every first token is above every later one (`disjoint`, "no block" if none); the two blocks that raise the
        first path's median most, with by how much; and the mean cosine over pairs of tokens at the embedding and there.
    """
    if isinstance(found, NotApplicable):
        return found
    end = found.block - 1
    first, later = (path[: end + 1].quantile(0.5, dim=1) for path in (found.first, found.later))
    apart = (found.first.amin(1) > found.later.amax(1))[: end + 1]
    together = (~apart).nonzero()
    disjoint = int(together[-1]) + 1 if len(together) else 0
    rise = first.diff()
    blocks = (rise.argsort(descending=True)[:2] + 1).sort().values.tolist()
    return {
        "n": found.first.shape[1],
        "position": found.position,
        "block": found.block,
        "first": float(first[end]),
        "later": float(later[end]),
        "disjoint": disjoint if disjoint <= end else "no block",
        "rising_blocks": blocks,
        "rises": [float(rise[b - 1]) for b in blocks],
        "alike_embedded": float(found.alike_first[0]),
        "alike_first": float(found.alike_first[end]),
        "alike_later": float(found.alike_later[end]),
    }


def prefixes(windows: Int[Tensor, "n length"], n: int, position: int) -> Int[Tensor, "n position"]:
    """What stands before a position in so many windows, one window after another, over and over.

    Raises:
        ValueError: the windows are shorter than that, or it is no whole number.
    """
    if not isinstance(position, Integral) or not 0 <= position < windows.shape[1]:
        raise ValueError(f"position {position} is not in windows of {windows.shape[1]} tokens.")
    return windows[torch.arange(n) % len(windows), :position]


@dataclass(frozen=True)
class Looking:
    """How much each token of some windows looks at itself up to a block, and what a channel holds after it."""

    tokens: Int[Tensor, "window position"]
    own_by_layer: Float[Tensor, "layer window position"]  # attention to itself, mean over heads
    value: Float[Tensor, "window position"]  # of the channel after the block, signed so that a spike is positive

    @property
    def own(self) -> Float[Tensor, "window position"]:
        """Attention to itself, mean over layers and heads."""
        return self.own_by_layer.mean(0)

    @property
    def copies(self) -> Bool[Tensor, "window position"]:
        """Tokens equal to all before them: they compute what position 0 does (but for learned absolute positions)."""
        return (self.tokens == self.tokens[:, :1]).long().cumprod(1).bool()

    @property
    def later(self) -> Bool[Tensor, "window position"]:
        """All positions but the first."""
        return torch.arange(self.tokens.shape[1]).expand(self.tokens.shape) > 0

    def understudies(self, threshold: float) -> tuple[Bool[Tensor, "window position"], Bool[Tensor, "window position"]]:
        """The later tokens that spike, and those that do not; copies of the first one are in neither."""
        own = self.later & ~self.copies
        return own & (self.value >= threshold), own & (self.value < threshold)

    def own_of(
        self,
        which: Bool[Tensor, "window position"],
        where: Bool[Tensor, "window position"],
        layer: int | None = None,
    ) -> float:
        """Mean attention to themselves of some tokens, as if they stood at the positions that others do.

        An early token has fewer others to look at, so that only the same positions compare: the mean over `which` at
        each position, weighted by how many of `where` stand there. Not a number where the two share no position.
        In one layer, or in the mean over all.
        """
        own = self.own if layer is None else self.own_by_layer[layer]
        there = which.sum(0)
        weight = where.sum(0) * (there > 0)
        mean = (own * which).sum(0) / there.clamp(min=1)
        return float((mean * weight).sum() / weight.sum()) if weight.any() else math.nan


@torch.inference_mode()
def looking(
    model: TransformerBridge, about: Anatomy, tokens: Int[Tensor, "n length"], block: int, channel: int, sign: float = 1
) -> Looking:
    """Run windows up to a block, and see how much each token attends to itself and what a channel holds.

    Args:
        model: as `load` returns it.
        about: its anatomy.
        tokens: the windows.
        block: the last block to run, from 1.
        channel: which channel to read after it.
        sign: of the spike, so that values come out positive for it.

    Raises:
        ValueError: `tokens` is not two-dimensional or empty, or a token is not in the model's vocabulary.
    """
    check_tokens(model, tokens)
    n_layers = (block + 1) // 2
    own, value = torch.zeros(n_layers, *tokens.shape), torch.zeros(tokens.shape)
    for row, window in enumerate(progress(tokens, "watching attention", "window")):
        seen: dict[str, Tensor] = {}

        def on_pattern(pattern, hook, row=row):
            layer = about.pattern_hooks.index(hook.name)
            own[layer, row] = pattern[0].float().diagonal(dim1=-2, dim2=-1).mean(0).cpu()

        def keep(stream, hook, seen=seen):
            seen[hook.name] = stream[0].float().cpu()

        names = (about.layer_hooks[n_layers - 1], *about.write_hooks[2 * n_layers - 2 : block])
        hooks = [(name, on_pattern) for name in about.pattern_hooks[:n_layers]] + [(name, keep) for name in names]
        with model.hooks(fwd_hooks=hooks):
            model(window[None].to(model.cfg.device), stop_at_layer=n_layers)
        value[row] = sign * sum(seen[name][:, channel] for name in names)
    return Looking(tokens, own, value)


def is_delimiter(text: str) -> bool:
    """Whether a token is punctuation or white space: no letter in it, no digit, and no part of a broken character."""
    return bool(text) and not any(character.isalnum() or character == "\ufffd" for character in text)


def quiet_tokens(found: Probe, counts: Int[Tensor, " vocabulary"], n: int = 3) -> Int[Tensor, " token"]:
    """The commonest tokens of a text that do not spike at position 0 (of equally common ones, the smallest first)."""
    tokens, value = found.tokens[~found.spiking], found.value[~found.spiking]
    tokens = tokens[value.argsort(stable=True)]
    return tokens[counts[tokens].argsort(descending=True, stable=True)][:n]


def first_replaced(tokens: Int[Tensor, "n length"], first: int) -> Int[Tensor, "n length"]:
    """The same windows with another token at position 0."""
    changed = tokens.clone()
    changed[:, 0] = first
    return changed


def replace_first(
    model: TransformerBridge,
    weights: Weights,
    found: Probe | NotApplicable,
    windows: Int[Tensor, "n length"],
    counts: Int[Tensor, " vocabulary"],
    n: int = 3,
) -> tuple[list[Looking] | NotApplicable, list[str]]:
    """The windows as they are, and with each of n tokens that do not spike put first (as `quiet_tokens` chooses them).

    Returns:
        One `Looking` for each group of windows, and what stands first in it, as text; or why there are none.
    """
    if isinstance(found, NotApplicable):
        return found, []
    quiet = quiet_tokens(found, counts, n).tolist()
    if not quiet:
        return NotApplicable("every entry of the vocabulary spikes at position 0, so there is none to put there"), []
    groups = [windows, *(first_replaced(windows, token) for token in quiet)]
    seen = [looking(model, weights.anatomy, group, found.block, found.channel, found.sign) for group in groups]
    return seen, ["its own token", *(repr(model.tokenizer.decode([token])) for token in quiet)]


def first_replaced_table(
    seen: Sequence[Looking] | NotApplicable, names: Sequence[str], found: Probe | NotApplicable, decode: Decode
) -> pd.DataFrame | NotApplicable:
    """Windows in which something else stands first: which later tokens spike, and how much they look at themselves.

    Args:
        seen, names: as `replace_first` returns them.
        found: as `probe` returns it.
        decode: from a list of token ids to text.

    Returns:
        For each group how many of the later tokens spike (those that only copy the first one, and so compute what it
        does, are left out), the commonest of them, the share of them that is punctuation or white space and that share
        of all later tokens; their mean attention to themselves, and that of other tokens at the same positions.
    """
    if isinstance(seen, NotApplicable):
        return seen
    rows = []
    for looked, name in zip(seen, names, strict=True):
        spikes, others = looked.understudies(found.threshold)
        tokens, counts = looked.tokens[spikes].unique(return_counts=True)
        commonest = tokens[counts.argsort(descending=True, stable=True)][:4].tolist()

        def delimiters_among(which: Bool[Tensor, "window position"], looked=looked) -> float:
            texts = [is_delimiter(decode([t])) for t in looked.tokens[which].tolist()]
            return sum(texts) / len(texts) if texts else math.nan

        shown = {
            "first": name,
            "later spikes": f"{int(spikes.sum())} of {int((spikes | others).sum())}",
            "the commonest": " ".join(repr(decode([t])) for t in commonest),
            "delimiters": delimiters_among(spikes),
            "of all": delimiters_among(spikes | others),
            "attend to themselves": looked.own_of(spikes, spikes),
            "others there": looked.own_of(others, spikes),
            "… in the first layer": looked.own_of(spikes, spikes, 0),
            "others": looked.own_of(others, spikes, 0),
        }
        rows.append({key: "" if value != value else value for key, value in shown.items()})
    return pd.DataFrame(rows)


def try_word(
    model: TransformerBridge,
    weights: Weights,
    found: Probe | NotApplicable,
    word: str,
    windows: Int[Tensor, "n length"],
    position: int = 5,
) -> pd.DataFrame | NotApplicable:
    """Put a word at position 0, and after the beginning of every window, and see whether it spikes.

    Of a word that is several tokens each is tried.

    Raises:
        ValueError: the word is no token at all.
    """
    if isinstance(found, NotApplicable):
        return found
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"{word!r} has no tokens; give a word.")
    position = min(position, windows.shape[1] - 1)
    first = found.sign * static_path(weights, torch.tensor(ids), found.block)[:, found.channel]
    rows = []
    for token, value in zip(ids, first.tolist(), strict=True):
        many = torch.full((len(windows),), token)
        later = after_text(model, weights.anatomy, many, prefixes(windows, len(windows), position), found.block)
        size = found.sign * later[:, found.channel]
        rows.append(
            {
                "token": repr(model.tokenizer.decode([token])),
                "first": value,
                "spikes there": "yes" if value >= found.threshold else "no",
                f"at position {position} (median)": float(size.median()),
                "spikes there, windows": f"{int((size >= found.threshold).sum())} of {len(windows)}",
            }
        )
    return pd.DataFrame(rows)
