"""Why the first token: what becomes of a token that can attend only to itself (the paper's section on spike tokens).

At position 0 softmax runs over one key and is 1, so attention is the fixed map h~ -> W_O W_V h~, whatever the text is
(`model.paths`). `probe` sends the whole vocabulary through it; `trace_fork` compares it with the same tokens after a
text; `replace_first` and `compare_delimiters` ask which other tokens attend mostly to themselves.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from spikesink.chain.amplifier import step_up_direction
from spikesink.chain.lifecycle import STEP, Cycle, Lifecycle, check_model, check_windows, first_step_up, is_spike
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Block, Model, block, check_tokens, normalise
from spikesink.model.paths import after_text, prefixes, static_path
from spikesink.model.proof import STATIC_PATH, require
from spikesink.model.weights import Weights, weights_of

Decode = Callable[[list[int]], str]


@dataclass(frozen=True)
class Probe:
    """How large the spike's first channel gets when a token stands first; signed so that a spike is positive."""

    block: Block  # the last step-up block: values are those after it
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
        """Tokens that do not spike where most do, or that do where most do not; furthest from the threshold first."""
        which = self.spiking != self.mostly
        return self.tokens[which][self.value[which].argsort(descending=not self.mostly)]

    def read(self, stream: Float[Tensor, "token d_model"]) -> Float[Tensor, " token"]:
        """The channel of a stream after the block, with the sign that makes a spike positive."""
        return self.sign * stream[:, self.channel]


@measure
def probe(
    weights: Weights,
    life: Lifecycle,
    tokens: Int[Tensor, " token"] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Probe:
    """Put every entry of the vocabulary (or these) at position 0 and see whether it spikes, by `static_path`."""
    check_model(weights, life)
    cycle = life.require_main(*STATIC_PATH)
    if not cycle.step_up:
        raise NotApplicable("no block is step-up, so there is no place to look for the spike")
    tokens = torch.arange(weights.anatomy.d_vocab) if tokens is None else tokens
    sign, before = math.copysign(1, cycle.value), torch.zeros(len(tokens))

    def watch(point: int, part: slice, stream: Float[Tensor, "token d_model"]) -> None:
        if point == cycle.step_up[0] - 1:
            before[part] = sign * stream[:, cycle.channel]

    value = sign * static_path(weights, tokens, cycle.step_up[-1], dtype, watch)[:, cycle.channel]
    threshold = STEP * abs(cycle.value)
    return Probe(cycle.step_up[-1], cycle.channel, sign, threshold, tokens, value, before)


@measure
def exceptions_table(probe: Probe, decode: Decode, most: int = 12) -> pd.DataFrame:
    """The exceptions, the furthest from the threshold first: id, text, and what the spike's channel holds."""
    value = dict(zip(probe.tokens.tolist(), probe.value.tolist(), strict=True))
    rows = [(t, repr(decode([t])), round(value[t])) for t in probe.exceptions()[:most].tolist()]
    return pd.DataFrame(rows, columns=["token id", "text", f"channel {probe.channel}"])


def _shuffled(tokens: Int[Tensor, " token"], seed: int) -> Int[Tensor, " token"]:
    return tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]


def mean_cosine(total: Float[Tensor, "*batch d_model"], n: int) -> Float[Tensor, "*batch"]:
    """Mean cosine over all pairs of n unit vectors, from their sum."""
    return (total.square().sum(-1) - n) / (n * (n - 1))


@dataclass(frozen=True)
class Fork:
    """The same tokens on two paths, block by block: first in a window, and after a text.

    `first`, `later` and `exceptions` hold cos(s*, stream) at every point up to the last step-up block, with the sign
    of s* chosen so that tokens that stand first end up positive; `exceptions` is of those at position 0.
    """

    block: Block  # whose s* it is
    position: int
    tokens: Int[Tensor, " token"]
    first: Float[Tensor, "point token"]
    later: Float[Tensor, "point token"]
    exceptions: Float[Tensor, "point exception"]
    alike_first: Float[Tensor, " point"]  # mean cosine over pairs of tokens, of their streams
    alike_later: Float[Tensor, " point"]


@measure
def trace_fork(
    model: Model,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    probe: Probe,
    n: int = 64,
    position: int = 32,
    seed: int = 0,
) -> Fork:
    """Follow n tokens drawn from the probed ones block by block towards s*, at position 0 and after a text.

    Up to eight exceptions are followed at position 0 besides.
    """
    weights = weights_of(model)
    direction = step_up_direction(weights, life)
    last, position = life.main.step_up[-1], min(position, tokens.shape[1] - 1)
    drawn, exceptions = _shuffled(probe.tokens, seed)[:n], probe.exceptions()[:8]

    alone = torch.zeros(last + 1, len(drawn) + len(exceptions), weights.anatomy.d_model)

    def watch(point: int, part: slice, stream: Float[Tensor, "token d_model"]) -> None:
        alone[point, part] = stream

    static_path(weights, torch.cat([drawn, exceptions]), last, watch=watch)
    later = after_text(model, drawn, prefixes(tokens, len(drawn), position), last)
    unit = functional.normalize(normalise(torch.cat([alone, later], dim=1), weights.anatomy), dim=-1)
    first, others, later = unit.split([len(drawn), len(exceptions), len(drawn)], dim=1)
    reader = first_step_up(life)
    sign = (first[reader - 1] @ direction).median().sign()
    alike = [mean_cosine(points.sum(1), len(drawn)) for points in (first, later)]
    return Fork(reader, position, drawn, *(sign * (points @ direction) for points in (first, later, others)), *alike)


@measure
def describe_fork(fork: Fork) -> dict[str, object]:
    """Where the two paths part: medians of the cosine at the point that the block reads, and what leads there.

    `disjoint`: after which block every first token is above every later one for good; `rising_blocks`: the two that
    raise the first path's median most; `alike_*`: mean cosine over pairs of tokens.
    """
    end = fork.block - 1
    first, later = (path[: end + 1].quantile(0.5, dim=1) for path in (fork.first, fork.later))
    together = (fork.first.amin(1) <= fork.later.amax(1))[: end + 1].nonzero()
    disjoint = int(together[-1]) + 1 if len(together) else 0
    rising = (first.diff().argsort(descending=True)[:2] + 1).sort().values.tolist()
    return {
        "n": fork.first.shape[1],
        "position": fork.position,
        "block": fork.block,
        "first": float(first[end]),
        "later": float(later[end]),
        "disjoint": block(disjoint) if disjoint <= end else "no block",
        "rising_blocks": list(map(block, rising)),
        "alike_embedded": float(fork.alike_first[0]),
        "alike_first": float(fork.alike_first[end]),
        "alike_later": float(fork.alike_later[end]),
    }


@dataclass(frozen=True)
class Elsewhere:
    """Of tokens that spike at position 0, the share that spikes at each position of a text."""

    n_tokens: int
    share: Mapping[int, float]  # by position, 0 as well: there by the same forward passes
    special: int  # how many special tokens spike at position 0
    anywhere: tuple[str, ...]  # those of them that spike at the last position in most windows

    @property
    def later(self) -> list[tuple[int, float]]:
        """Position and share, of all positions but the first."""
        return [(position, share) for position, share in self.share.items() if position]


@measure
def place_elsewhere(
    model: Model,
    tokens: Int[Tensor, "n length"],
    probe: Probe,
    n: int = 128,
    seed: int = 0,
    positions: Sequence[int] = (1, 2, 4, 8, 16, 32),
) -> Elsewhere:
    """Put n tokens that spike at position 0, drawn at random, at later positions of the windows.

    Special tokens (a document's beginning or end) are few, and a draw misses them: they are tried apart.
    """
    spiking = probe.tokens[probe.spiking]
    if not len(spiking):
        raise NotApplicable("no entry of the vocabulary spikes at position 0, so there is none to put elsewhere")
    drawn = _shuffled(spiking, seed)[:n]

    def share(some: Int[Tensor, " token"], position: int) -> float:
        return float((_values_after(model, tokens, probe, some, position) >= probe.threshold).double().mean())

    shares = {p: share(drawn, p) for p in (0, *positions) if p < tokens.shape[1]}
    special = sorted(set(model.tokenizer.all_special_ids) & set(spiking.tolist()))
    anywhere = [t for t in special if share(torch.tensor([t] * len(tokens)), max(shares)) > 0.5]
    return Elsewhere(len(drawn), shares, len(special), tuple(model.tokenizer.decode([t]) for t in anywhere))


def _values_after(
    model: Model, tokens: Int[Tensor, "n length"], probe: Probe, some: Int[Tensor, " token"], position: int
) -> Float[Tensor, " token"]:
    """What the spike's channel holds of some tokens, each put at a position of another window."""
    return probe.read(after_text(model, some, prefixes(tokens, len(some), position), probe.block)[-1])


@measure
def try_word(model: Model, tokens: Int[Tensor, "n length"], probe: Probe, word: str, position: int = 5) -> pd.DataFrame:
    """Put a word, or each token of one, at position 0 and after the beginning of every window: does it spike there?"""
    ids = model.tokenizer(word, add_special_tokens=False).input_ids
    if not ids:
        raise ValueError(f"{word!r} has no tokens; give a word.")
    position, rows = min(position, tokens.shape[1] - 1), []
    for token in ids:
        first = float(probe.read(static_path(weights_of(model), torch.tensor([token]), probe.block)))
        later = _values_after(model, tokens, probe, torch.full((len(tokens),), token), position)
        in_windows = f"{int((later >= probe.threshold).sum())} of {len(tokens)}"
        there = "yes" if first >= probe.threshold else "no"
        rows.append((repr(model.tokenizer.decode([token])), first, there, float(later.median()), in_windows))
    later = f"at position {position} (median)"
    return pd.DataFrame(rows, columns=["token", "first", "spikes there", later, "spikes there, windows"])


@dataclass(frozen=True)
class SelfAttention:
    """How much each token of some windows attends to itself up to a block, and what a channel holds after it."""

    tokens: Int[Tensor, "window position"]
    by_layer: Float[Tensor, "layer window position"]  # attention to itself, mean over heads
    value: Float[Tensor, "window position"]  # of the channel after the block, signed so that a spike is positive

    @property
    def mean(self) -> Float[Tensor, "window position"]:
        """Attention to itself, mean over layers and heads."""
        return self.by_layer.mean(0)

    @property
    def copies(self) -> Bool[Tensor, "window position"]:
        """Tokens equal to all before them: they compute what position 0 does (but for learned absolute positions)."""
        return (self.tokens == self.tokens[:, :1]).long().cumprod(1).bool()

    def later_spikes(self, threshold: float) -> tuple[Bool[Tensor, "window position"], Bool[Tensor, "window position"]]:
        """Later tokens that spike, and those that do not; copies of the first one are in neither."""
        spiking = self.value >= threshold
        return spiking & ~self.copies, ~spiking & ~self.copies

    def self_attention_at(
        self, which: Bool[Tensor, "window position"], where: Bool[Tensor, "window position"], layer: int | None = None
    ) -> float:
        """Mean attention to themselves of some tokens, as if they stood at the positions that others do.

        An early token has fewer others to attend to, so only the same positions compare: the mean over `which` at each
        position, weighted by how many of `where` stand there; NaN where the two share none. In a layer, or mean of all.
        """
        attention = self.mean if layer is None else self.by_layer[layer]
        n = which.sum(0)
        weight = where.sum(0) * (n > 0)
        mean = (attention * which).sum(0) / n.clamp(min=1)
        return float((mean * weight).sum() / weight.sum())


@torch.inference_mode()
def read_self_attention(
    model: Model, tokens: Int[Tensor, "n length"], last: int, channel: int, sign: float = 1
) -> SelfAttention:
    """Run windows up to block `last`; see how much each token attends to itself and what a channel then holds."""
    anatomy = model.anatomy
    check_tokens(model, tokens)
    n_layers = (last + 1) // 2
    patterns = anatomy.pattern_hooks[:n_layers]
    if None in patterns:
        anatomy.require_attention()
    stream = (anatomy.layer_hooks[n_layers - 1], *anatomy.write_hooks[2 * n_layers - 2 : last])
    by_layer, value = torch.zeros(n_layers, *tokens.shape), torch.zeros(tokens.shape)
    for row, window in enumerate(progress(tokens, "watching attention", "window")):
        _, cache = model.run_with_cache(
            window[None].to(model.cfg.device), names_filter=[*patterns, *stream], stop_at_layer=n_layers
        )
        for layer, name in enumerate(patterns):
            by_layer[layer, row] = cache[name][0].float().diagonal(dim1=-2, dim2=-1).mean(0).cpu()
        value[row] = sign * sum(cache[name][0, :, channel].float().cpu() for name in stream)
    return SelfAttention(tokens, by_layer, value)


def is_delimiter(text: str) -> bool:
    """Whether a token is punctuation or white space: no letter in it, no digit, and no part of a broken character."""
    return bool(text) and not any(character.isalnum() or character == "\ufffd" for character in text)


def quiet_tokens(probe: Probe, counts: Int[Tensor, " vocabulary"], n: int = 3) -> Int[Tensor, " token"]:
    """The commonest tokens of a text that do not spike at position 0; of equally common ones, the smallest first."""
    tokens, value = probe.tokens[~probe.spiking], probe.value[~probe.spiking]
    tokens = tokens[value.argsort(stable=True)]
    return tokens[counts[tokens].argsort(descending=True, stable=True)][:n]


FirstReplaced = Sequence[tuple[str, SelfAttention]]  # what stands first, and how the tokens of the windows then attend


@measure
def replace_first(
    model: Model,
    tokens: Int[Tensor, "n length"],
    probe: Probe,
    counts: Int[Tensor, " vocabulary"],
    n: int = 3,
) -> FirstReplaced:
    """The windows as they are, and with each of n tokens that do not spike put first (`quiet_tokens` chooses them)."""
    quiet = quiet_tokens(probe, counts, n)
    if not len(quiet):
        raise NotApplicable("every entry of the vocabulary spikes at position 0, so there is none to put there")
    groups = [("its own token", tokens)]
    for token in quiet:
        changed = torch.cat([token.expand(len(tokens), 1), tokens[:, 1:]], dim=1)
        groups.append((repr(model.tokenizer.decode([int(token)])), changed))
    at = (probe.block, probe.channel, probe.sign)
    return [(name, read_self_attention(model, windows, *at)) for name, windows in groups]


@measure
def first_replaced_table(replaced: FirstReplaced, probe: Probe, decode: Decode) -> pd.DataFrame:
    """By first token, which later tokens spike, how many are delimiters, and how much they attend to themselves.

    Beside each the same of other later tokens (of attention, at the same positions).
    """
    rows = []
    for name, attention in replaced:
        spikes, others = attention.later_spikes(probe.threshold)
        tokens, counts = attention.tokens[spikes].unique(return_counts=True)
        commonest = tokens[counts.argsort(descending=True, stable=True)][:4].tolist()
        kinds = [[is_delimiter(decode([t])) for t in attention.tokens[w].tolist()] for w in (spikes, spikes | others)]
        row = {
            "first": name,
            "later spikes": f"{len(kinds[0])} of {len(kinds[1])}",
            "the commonest": " ".join(repr(decode([t])) for t in commonest),
            "delimiters": sum(kinds[0]) / len(kinds[0]) if kinds[0] else math.nan,
            "of all": sum(kinds[1]) / len(kinds[1]),
            "attend to themselves": attention.self_attention_at(spikes, spikes),
            "others there": attention.self_attention_at(others, spikes),
            "… in the first layer": attention.self_attention_at(spikes, spikes, 0),
            "others": attention.self_attention_at(others, spikes, 0),
        }
        rows.append(row)
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Delimiters:
    """What spikes in a text, delimiters and words, beside what does not; copies of a window's first token left out.

    Kinds are "spiking" and "quiet" delimiters, "words" that spike and "other" words.
    """

    cycle: Cycle
    n: Mapping[str, int]  # of each kind
    n_types: int  # different tokens among the spiking delimiters
    self_attention: Mapping[str, float]  # of each kind, where spiking delimiters stand
    where_words_spike: Mapping[str, float]  # the same of "words" and "other", where spiking words stand
    scale_cosine: Mapping[str, float]  # cosine of the embedding with the first attention norm's scale, over occurrences


@measure
def compare_delimiters(
    model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, cycle: Cycle | None
) -> Delimiters:
    """Do delimiters that spike in a cycle attend to themselves, and do their embeddings lie near the norm's scale?

    Self-attention is over the layers up to the cycle's first step-up block: after it, a token that spikes may attend to
    itself because it does. `cycle` is `life.main`, or a smaller one; None where there is none.
    """
    weights = weights_of(model)
    check_model(model, life)
    check_windows(life, tokens)
    if cycle is None:
        life.require_main()
        raise NotApplicable("there is no smaller cycle")
    require(model, "writes", "patterns")
    if not cycle.step_up:
        raise NotApplicable("no block is step-up, so there is no place before which to look")
    if weights.anatomy.attention_norm is None:
        raise NotApplicable("no norm stands before the first attention, so there is no scale to lie near")
    attention = read_self_attention(model, tokens, cycle.step_up[0], cycle.channel)
    types, index = tokens.unique(return_inverse=True)
    delimiter = torch.tensor([is_delimiter(model.tokenizer.decode([t])) for t in types.tolist()])[index]
    near = functional.cosine_similarity(weights.embed(types), weights.norm_scale(0)[None], dim=-1)[index]
    spiking, own = is_spike(life, cycle), ~attention.copies
    kinds = {"spiking": spiking & delimiter & own, "quiet": ~spiking & delimiter & own}
    kinds |= {"words": spiking & ~delimiter & own, "other": ~spiking & ~delimiter & own}
    if not kinds["spiking"].any():
        raise NotApplicable("no delimiter spikes, except where it has nothing but copies of itself before it")
    at = attention.self_attention_at
    return Delimiters(
        cycle=cycle,
        n={name: int(which.sum()) for name, which in kinds.items()},
        n_types=len(tokens[kinds["spiking"]].unique()),
        self_attention={name: at(which, kinds["spiking"]) for name, which in kinds.items()},
        where_words_spike={name: at(kinds[name], kinds["words"]) for name in ("words", "other")},
        scale_cosine={name: float(near[which].mean()) for name, which in kinds.items()},
    )
