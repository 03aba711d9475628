"""Each link of the chain from spike to sink broken once, in the chain's order, with controls; and the two kept apart.

What is put in the place of something is measured on other windows than those it is then judged on (`constants`).
`CUTS` lists the cuts, `break_chain` makes them, `decouple` and `unsink` are the two that keep one without the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.lifecycle import Cycle, Lifecycle, find_spikes, is_spike, plateau_layers
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy, Block, block
from spikesink.model.weights import require_projections
from spikesink.patching.interventions import (
    Intervention,
    add,
    mask_key,
    means_of,
    one_prompt,
    scale,
    set_to,
    skip,
    zero,
)
from spikesink.patching.outcome import CLEAN, Outcome, compare
from spikesink.patching.sites import At, key, read, readout, stream, value

Where = Bool[Tensor, "window position"]


FACTORS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)


INDIFFERENT = 0.02  # a change of perplexity that is none to speak of: AB2's own limit


SAME = 1e-6  # nats: rounding


NO_CHANGE = "every spike token is the same one at the same place, so their mean is what stands there"


FEW_SINKS = 0.1  # AB5's limit: what it must come down to


NONE_TO_JUDGE = "no token of the windows to judge on spikes; measure more windows"


NO_SINK = "hardly any head sinks on the first token to begin with"


_SPIKE_CONTROLS = ("random_channels", "strongest_channels", "other_position", "another_way")


@dataclass(frozen=True)
class SpikeMeans:
    """What spike tokens, and others, are on average, over windows that are then not judged. Blocks from 1."""

    about: Anatomy
    cycle: Cycle
    point: Block  # in the stream, right after the step-up
    stream: Float[Tensor, " d_model"]  # of spike tokens, at that point
    # Of spike tokens, before QK norm and RoPE; None where the model has no projections of its own to them.
    keys: Float[Tensor, "layer kv_head d_head"] | None
    values: Float[Tensor, "layer kv_head d_head"] | None
    other_keys: Float[Tensor, "layer kv_head d_head"] | None  # of all other tokens
    # h~ as `reading` blocks read it; None where that is not to be seen.
    reads: Float[Tensor, "block d_model"] | None  # of spike tokens
    other_reads: Float[Tensor, "block d_model"] | None
    readout: Float[Tensor, " d_model"]  # h~ of spike tokens, as the unembedding reads it

    @property
    def layers(self) -> range:
        """Those whose attention reads the plateau."""
        return plateau_layers(self.cycle)

    @property
    def start(self) -> int:
        """The first layer that would meet the spike."""
        return (min(self.cycle.step_up, default=self.cycle.peak) + 1) // 2

    @property
    def steps(self) -> tuple[Block, ...]:
        """All step-up and step-down blocks."""
        return tuple(map(block, self.cycle.step_up + self.cycle.step_down))

    @property
    def reading(self) -> tuple[Block, ...]:
        """The blocks that read the plateau."""
        return _reading(self.about, self.cycle)

    @property
    def ordinary_channels(self) -> list[int]:
        """All that are no spike channels, the strongest of the spike tokens' stream first."""
        order = self.stream.abs().argsort(descending=True).tolist()
        return [c for c in order if c not in self.cycle.channels]


def _reading(about: Anatomy, cycle: Cycle) -> tuple[Block, ...]:
    first, last = cycle.plateau
    read_point = {b: b - 2 if about.parallel and b % 2 == 0 else b - 1 for b in range(1, about.n_blocks + 1)}
    return tuple(block(b) for b, point in read_point.items() if first <= point <= last)


@measure
def spike_means(
    model: TransformerBridge, life: Lifecycle, held_out: Int[Tensor, "n length"], where: Where | None = None
) -> SpikeMeans | NotApplicable:
    """Measure the means that cuts put in place of things, in one pass over windows that are then not judged.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it.
        held_out: windows; at least one must hold a spike token.
        where: their spike tokens, if they are known; by default they are looked for.

    Returns:
        The means, or why there are none: nothing spikes, here or at all, or no layer reads the plateau.
    """
    about, cycle = life.trace.anatomy, life.main
    if cycle is None:
        return NotApplicable(life.reason)
    if not plateau_layers(cycle):
        return NotApplicable(
            "no layer reads the plateau of the spike, so there is nothing to cut between it and a sink"
        )
    where = find_spikes(model, life, held_out) if where is None else where
    if not where.any() or where.all():
        kind = "no" if not where.any() else "every"
        return NotApplicable(f"{kind} token of the windows that means are taken of spikes; measure more windows")
    layers, blocks = range(about.n_layers), _reading(about, cycle)
    point = block(cycle.plateau[0] + (cycle.plateau[0] % 2 if about.parallel else 0))
    of = {
        "stream": (stream(point), where),
        "readout": (readout(), where),
    }
    if about.projects:
        of |= {"keys": (key(layers), where), "values": (value(layers), where), "other_keys": (key(layers), ~where)}
    if about.attention_norm is not None and about.separate_ffn:
        of |= {"reads": (read(blocks), where), "other_reads": (read(blocks), ~where)}
    absent = dict.fromkeys(("keys", "values", "other_keys", "reads", "other_reads"))
    found = absent | means_of(model, held_out, of)
    found |= {name: found[name][0] for name in ("stream", "readout")}
    return SpikeMeans(about, cycle, point, **found)


def decoupled(known: SpikeMeans, where: Where, hold_readout: bool = True) -> tuple[Intervention, ...]:
    """No spike, and yet its sinks: all that others read of spike tokens are constants, so nothing needs the spike.

    The step-up and step-down blocks write nothing at the spike tokens, and the spike channels are kept empty there for
    the rest of the depth; their keys and values are held at constants from the first layer that would meet the spike.

    Args:
        known: as `constants` returns it.
        where: the spike tokens of the windows to be run.
        hold_readout: whether what the unembedding reads of the spike tokens is held too. Without it, their own
            predictions, and nothing else, are those of a token that has lost its spike.

    Returns:
        The interventions; none where the model has no keys and values that could be held.
    """
    about = known.about
    if known.keys is None:
        return ()
    cuts = [skip(known.steps, where)] if known.steps else []
    cuts += [
        zero(stream(map(block, range(2 * known.start, about.n_blocks + 1, 2))), where, known.cycle.channels),
        *sink_held(known, where, known.start),
    ]
    if hold_readout:
        cuts.append(set_to(readout(), known.readout, where))
    return tuple(cuts)


def sink_held(known: SpikeMeans | NotApplicable, positions: At = 0, start: int = 0) -> tuple[Intervention, ...]:
    """The spike tokens' mean key and value at some positions: a sink that needs no token of its own there.

    Args:
        known: as `constants` returns it, of other windows.
        positions: where; by default the first.
        start: the first layer.

    Returns:
        The interventions; none where there are no spike tokens, or no keys and values that could be held.
    """
    if isinstance(known, NotApplicable) or known.keys is None:
        return ()
    layers = range(start, known.about.n_layers)
    return (set_to(key(layers), known.keys[start:], positions), set_to(value(layers), known.values[start:], positions))


def decouple(
    model: TransformerBridge,
    life: Lifecycle,
    tokens: Int[Tensor, "n length"],
    held_out: Int[Tensor, "m length"] | None = None,
    hold_readout: bool = True,
) -> tuple[Intervention, ...]:
    """Interventions that take the spike out of a model's run on these windows or prompts and keep its sinks.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it.
        tokens: what will be run; one prompt [length], or several of one length.
        held_out: other windows, of which the constants are taken; by default those that `life` was found in.
        hold_readout: as in `decoupled`.

    Raises:
        ValueError: nothing spikes in this model, in these tokens or in those held out.
        NotApplicable: the model has no keys and values that could be held.
    """
    tokens = _windows(tokens)
    require_projections(model.anatomy)
    known = spike_means(model, life, life.trace.tokens if held_out is None else held_out)
    if isinstance(known, NotApplicable):
        raise ValueError(f"{known.reason}.")
    return decoupled(known, _spikes(model, life, tokens), hold_readout)


def unsink(model: TransformerBridge, life: Lifecycle, tokens: Int[Tensor, "n length"]) -> tuple[Intervention, ...]:
    """Interventions that mask the spike tokens' keys in all layers that read the plateau; the spike stays.

    Takes and raises what `decouple` does.
    """
    tokens = _windows(tokens)
    return (mask_key(_spikes(model, life, tokens), plateau_layers(life.main)),)


def _windows(tokens: Int[Tensor, "n length"]) -> Int[Tensor, "n length"]:
    return tokens if isinstance(tokens, Tensor) and tokens.ndim == 2 else one_prompt(tokens)[None]


def _spikes(model: TransformerBridge, life: Lifecycle, tokens: Int[Tensor, "n length"]) -> Where:
    where = find_spikes(model, life, tokens)
    if not where.any():
        raise ValueError("none of these tokens spikes, so there is nothing to take apart; give another prompt.")
    return where


@dataclass(frozen=True)
class CutTokens:
    """What cuts are aimed at in some windows: the spike tokens, as many others, and the seed of what is drawn."""

    spike: Where
    other: Where
    seed: int


def choose_tokens(where: Where, seed: int = 0) -> CutTokens:
    """Targets in windows whose spike tokens are known.

    As many other tokens of each window are drawn out of its first half, whose tokens have many queries after them.
    """
    generator, other = torch.Generator().manual_seed(seed), torch.zeros_like(where)
    for window, spikes in enumerate(where):
        free = (~spikes[: max(2, len(spikes) // 2)]).nonzero()[:, 0]
        other[window, free[torch.randperm(len(free), generator=generator)[: int(spikes.sum())]]] = True
    return CutTokens(where, other, seed)


Build = Callable[[SpikeMeans, CutTokens], Sequence[Intervention]]


@dataclass(frozen=True)
class Cut:
    """One way to break the chain: a short name, the link that it tests, and how it is made."""

    name: str
    link: str
    build: Build
    control: bool = False
    elsewhere: bool = False  # whether it is aimed at other tokens, of which a window may have none


def _random(at: CutTokens, *size: int) -> Tensor:
    """A random direction of unit length."""
    return functional.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(at.seed)), dim=-1)


def _random_channels(known: SpikeMeans, at: CutTokens) -> list[int]:
    free = sorted(known.ordinary_channels)
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(at.seed)).tolist()
    return [free[i] for i in order[: len(known.cycle.channels)]]


def _another_way(known: SpikeMeans, at: CutTokens) -> list[Intervention]:
    """The spike channels' part of the vector, as long, in a random direction."""
    size = known.stream[list(known.cycle.channels)].norm()
    turned = size * _random(at, known.about.d_model)
    site = stream(known.point)
    return [zero(site, at.spike, known.cycle.channels), add(site, turned, at.spike)]


def _turned_keys(known: SpikeMeans, at: CutTokens, where: Where) -> list[Intervention]:
    """Keys as long as those of spike tokens, in a random direction of each head's own."""
    if known.keys is None:
        return []
    keys = known.keys[known.layers.start : known.layers.stop]
    return [set_to(key(known.layers), keys.norm(dim=-1, keepdim=True) * _random(at, *keys.shape), where)]


def _ordinary_keys(known: SpikeMeans, where: Where) -> list[Intervention]:
    """Keys set to other tokens' mean."""
    if known.other_keys is None:
        return []
    return [set_to(key(known.layers), known.other_keys[known.layers.start : known.layers.stop], where)]


def _read_instead(
    known: SpikeMeans, at: CutTokens, means: Float[Tensor, "block d_model"] | None, kinds: Sequence[int] = (0, 1)
) -> list[Intervention]:
    """What blocks of some kinds (1 attention, 0 FFN) read at the spike tokens is one vector, as long as any h~."""
    blocks = [b for b in known.reading if b % 2 in kinds]
    if means is None or not blocks:
        return []
    mean = means.mean(0)
    return [set_to(read(blocks), mean * (known.about.d_model**0.5 / mean.norm()), at.spike)]


def _following(known: SpikeMeans) -> list[Block]:
    """As many FFN blocks right after the step-up as there are step-up blocks."""
    after = [block(b) for b in range(known.cycle.plateau[0] + 1, known.cycle.plateau[1] + 1) if b % 2 == 0]
    return after[: len(known.cycle.step_up)]


def _up(known: SpikeMeans, blocks: Sequence[int], where: Where) -> list[Intervention]:
    return [skip(map(block, blocks), where)] if known.cycle.step_up and blocks else []


def _masked(known: SpikeMeans, where: Where, layers: Sequence[int], *others: Intervention) -> list[Intervention]:
    """Keys masked, after other interventions; nothing where the family's attention takes no change of its pattern."""
    return [*others, mask_key(where, layers)] if known.about.edits_pattern else []


CUTS: Mapping[str, Cut] = {
    "skipped": Cut("step-up blocks write nothing", "step-up", lambda k, at: _up(k, k.cycle.step_up, at.spike)),
    "skipped_others": Cut(
        "as many blocks after them write nothing", "step-up", lambda k, at: _up(k, _following(k), at.spike), True
    ),
    "skipped_elsewhere": Cut(
        "step-up blocks write nothing at other tokens",
        "step-up",
        lambda k, at: _up(k, k.cycle.step_up, at.other),
        True,
        True,
    ),
    "zeroed": Cut("spike channels zeroed", "spike", lambda k, at: [zero(stream(k.point), at.spike, k.cycle.channels)]),
    "mean": Cut(
        "spike channels set to their mean",
        "spike",
        lambda k, at: [set_to(stream(k.point), k.stream[list(k.cycle.channels)], at.spike, k.cycle.channels)],
    ),
    "whole": Cut("whole vector set to its mean", "spike", lambda k, at: [set_to(stream(k.point), k.stream, at.spike)]),
    "rest_zeroed": Cut(
        "all but the spike channels zeroed",
        "spike",
        lambda k, at: [zero(stream(k.point), at.spike, k.ordinary_channels)],
    ),
    "another_way": Cut("spike turned in a random direction", "spike", _another_way, True),
    "random_channels": Cut(
        "as many random channels zeroed",
        "spike",
        lambda k, at: [zero(stream(k.point), at.spike, _random_channels(k, at))],
        True,
    ),
    "strongest_channels": Cut(
        "as many next-strongest channels zeroed",
        "spike",
        lambda k, at: [zero(stream(k.point), at.spike, k.ordinary_channels[: len(k.cycle.channels)])],
        True,
    ),
    "other_position": Cut(
        "spike channels zeroed at other tokens",
        "spike",
        lambda k, at: [zero(stream(k.point), at.other, k.cycle.channels)],
        True,
        True,
    ),
    "constant_read": Cut("what blocks read: one vector", "RMSNorm", lambda k, at: _read_instead(k, at, k.reads)),
    "others_read": Cut("what blocks read: others' mean", "RMSNorm", lambda k, at: _read_instead(k, at, k.other_reads)),
    "others_read_attention": Cut(
        "only what attention reads: others' mean", "RMSNorm", lambda k, at: _read_instead(k, at, k.other_reads, (1,))
    ),
    "others_read_ffn": Cut(
        "only what FFNs read: others' mean", "RMSNorm", lambda k, at: _read_instead(k, at, k.other_reads, (0,))
    ),
    "turned_key": Cut("keys turned at random", "key", lambda k, at: _turned_keys(k, at, at.spike)),
    "ordinary_key": Cut(
        "keys set to others' mean",
        "key",
        lambda k, at: _ordinary_keys(k, at.spike),
    ),
    "turned_key_elsewhere": Cut(
        "keys of other tokens turned", "key", lambda k, at: _turned_keys(k, at, at.other), True, True
    ),
    "masked": Cut("sink masked on the plateau", "sink", lambda k, at: _masked(k, at.spike, k.layers)),
    "masked_everywhere": Cut(
        "sink masked in all layers", "sink", lambda k, at: _masked(k, at.spike, range(k.about.n_layers))
    ),
    "masked_elsewhere": Cut("other tokens masked", "sink", lambda k, at: _masked(k, at.other, k.layers), True, True),
    "skipped_and_zeroed": Cut(
        "no step-up, and spike channels zeroed",
        "both",
        lambda k, at: (
            [*_up(k, k.cycle.step_up, at.spike), zero(stream(k.point), at.spike, k.cycle.channels)]
            if k.cycle.step_up
            else []
        ),
    ),
    "zeroed_and_masked": Cut(
        "spike zeroed, sink masked",
        "both",
        lambda k, at: _masked(k, at.spike, k.layers, zero(stream(k.point), at.spike, k.cycle.channels)),
    ),
    "decoupled": Cut("spike out, keys and values held", "both", lambda k, at: decoupled(k, at.spike)),
    "decoupled_open": Cut(
        "the same, own prediction left alone", "both", lambda k, at: decoupled(k, at.spike, hold_readout=False)
    ),
}


def named(key: str, clean: str = "the clean run") -> str:
    """The short name of a cut, or of the run without any."""
    return CUTS[key].name if key in CUTS else clean


@dataclass(frozen=True)
class Broken:
    """The chain broken: outcomes by the names in `CUTS`, the clean run first; only the cuts that could be made."""

    known: SpikeMeans
    targets: CutTokens
    tokens: Int[Tensor, "window position"]
    outcomes: Mapping[str, Outcome]

    @property
    def clean(self) -> Outcome:
        """The run as it is."""
        return self.outcomes[CLEAN]

    def at_spikes(self, key: str) -> float:
        """The largest entry of the stream at the spike tokens, median over them."""
        return float(self.outcomes[key].largest[self.targets.spike].quantile(0.5))


@measure
def break_chain(
    model: TransformerBridge,
    known: SpikeMeans | NotApplicable,
    tokens: Int[Tensor, "n length"],
    where: Where,
    names: Sequence[str] = tuple(CUTS),
    seed: int = 0,
) -> Broken | NotApplicable:
    """Make cuts, and measure each on the same windows.

    Args:
        model: as `load` returns it.
        known: as `constants` returns it, of other windows.
        tokens: windows to judge on.
        where: their spike tokens.
        names: which of `CUTS`; those that a model does not have (no step-up block, no norm) are left out.
        seed: of what controls draw: channels, tokens, directions.

    Raises:
        ValueError: there is no such cut.
    """
    if not where.any():
        return NotApplicable(NONE_TO_JUDGE)
    targets = choose_tokens(where, seed)
    return Broken(known, targets, tokens, compare(model, tokens, cuts_on(known, targets, names)))


def cuts_on(
    known: SpikeMeans, targets: CutTokens, names: Sequence[str] = tuple(CUTS)
) -> dict[str, tuple[Intervention, ...]]:
    """The interventions of some cuts, aimed; without those that this model does not have.

    Raises:
        ValueError: there is no such cut.
    """
    if wrong := [name for name in names if name not in CUTS]:
        raise ValueError(f"there is no cut {wrong[0]!r}; give some of {', '.join(CUTS)}.")
    possible = [name for name in names if targets.other.any() or not CUTS[name].elsewhere]
    made = {name: tuple(CUTS[name].build(known, targets)) for name in possible}
    return {name: cut for name, cut in made.items() if cut}


def split_windows(life: Lifecycle, length: int) -> tuple[tuple[Tensor, Where], tuple[Tensor, Where]]:
    """The first `length` tokens of every second window, to take constants of, and of the others, to judge on.

    Each with its spike tokens; none where nothing spikes.
    """
    tokens = life.trace.tokens
    none = torch.zeros(tokens.shape, dtype=torch.bool)
    where = none if life.main is None else is_spike(life, life.main)
    odd, even = (slice(1, None, 2), slice(length)), (slice(0, None, 2), slice(length))
    return (tokens[odd], where[odd]), (tokens[even], where[even])


@measure
def describe_cut(broken: Broken | NotApplicable, name: str = "decoupled") -> pd.DataFrame | NotApplicable:
    """The interventions that one cut is made of, in words."""
    cut = cuts_on(broken.known, broken.targets, [name]).get(name, ())
    return pd.DataFrame({"the interventions, in order": [str(one) for one in cut]}).set_index(
        "the interventions, in order"
    )


@dataclass(frozen=True)
class Doses:
    """The spike channels scaled at the spike tokens, right after the step-up; factor 1 is the clean run."""

    factors: tuple[float, ...]
    outcomes: tuple[Outcome, ...]
    where: Where  # the spike tokens
    control: Mapping[float, Outcome]  # as many random channels, by some of the factors


@measure
def doses(
    model: TransformerBridge, broken: Broken | NotApplicable, factors: Sequence[float] = FACTORS
) -> Doses | NotApplicable:
    """Scale the spike by each factor, and as many random channels by the largest and by 0.

    What `break_chain` has run already (0 is zeroed, 1 the clean run) is not run again.

    Args:
        model: as `load` returns it.
        broken: as `break_chain` returns it, with the cuts "zeroed" and "random_channels".
        factors: by which the spike channels are multiplied at the spike tokens, right after the step-up.
    """
    known, where, most = broken.known, broken.targets.spike, max(factors)
    site, random = stream(known.point), _random_channels(known, broken.targets)
    found = {0: broken.outcomes["zeroed"], 1: broken.clean}
    cuts = {factor: scale(site, factor, where, known.cycle.channels) for factor in factors if factor not in found}
    found |= compare(model, broken.tokens, cuts | {"control": scale(site, most, where, random)})
    factors = tuple(sorted(factors))
    control = {0: broken.outcomes["random_channels"], most: found["control"]}
    return Doses(factors, tuple(found[factor] for factor in factors), where, control)


@dataclass(frozen=True)
class BlockMap:
    """What becomes of the model where one block writes nothing at the spike tokens; by block, from 1."""

    cycle: Cycle
    clean: Outcome
    outcomes: tuple[Outcome, ...]
    where: Where

    def spike(self) -> Float[Tensor, " block"]:
        """The largest entry at the spike tokens, as a share of the clean run's, median over them."""
        own = self.clean.largest[self.where]
        return torch.stack([(of.largest[self.where] / own).quantile(0.5) for of in self.outcomes])


@measure
def block_map(
    model: TransformerBridge,
    known: SpikeMeans | NotApplicable,
    tokens: Int[Tensor, "n length"],
    where: Where,
) -> BlockMap | NotApplicable:
    """For every block of the model, let it write nothing at the spike tokens. Takes what `break_chain` does."""
    if not where.any():
        return NotApplicable(NONE_TO_JUDGE)
    found = compare(model, tokens, {b: skip(block(b), where) for b in range(1, known.about.n_blocks + 1)})
    return BlockMap(known.cycle, found.pop(CLEAN), tuple(found.values()), where)


@measure
def block_table(found: BlockMap | NotApplicable, most: int = 6) -> pd.DataFrame | NotApplicable:
    """The blocks without which perplexity changes most: what is left of spike and sink, and perplexity."""
    clean, spike = found.clean, found.spike()
    ratio = torch.tensor([of.perplexity for of in found.outcomes]) / clean.perplexity
    chosen = sorted(ratio.log().abs().argsort(descending=True)[:most].tolist())
    rows = [
        {
            "block": str(Block(i + 1)),
            "largest at spike tokens, of clean": f"{float(spike[i]):.0%}",
            "sink ratio": f"{found.outcomes[i].sink_ratio:.2f} (clean {clean.sink_ratio:.2f})",
            "perplexity, of clean": float(ratio[i]),
        }
        for i in chosen
    ]
    return pd.DataFrame(rows).set_index("block")


@measure
def cut_table(broken: Broken | NotApplicable, *only: str) -> pd.DataFrame | NotApplicable:
    """What each cut tests and does, one row a cut, the clean run first; `only` the cuts of some links."""
    rows = []
    for name, outcome in broken.outcomes.items():
        cut = CUTS.get(name)
        if cut and only and cut.link not in only:
            continue
        rows.append(
            {
                "cut": f"{named(name)}{' (control)' if cut and cut.control else ''}",
                "perplexity": outcome.perplexity,
                "95% interval": " to ".join(f"{end:.3g}" for end in outcome.interval() if math.isfinite(end)),
                "KL, nats": f"{outcome.kl:.2f}",
                "same token": f"{outcome.agreement:.0%}",
                "sink ratio": f"{outcome.sink_ratio:.2f}",
                "largest at spike tokens": broken.at_spikes(name),
            }
        )
    return pd.DataFrame(rows).set_index("cut")
