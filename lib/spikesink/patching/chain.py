"""Each link of the chain from spike to sink broken once, in the chain's order, with controls; and the two kept apart.

What is put in the place of something is measured on other windows than those it is then judged on (`constants`).
`CUTS` lists the cuts, `break_chain` makes them, `decouple` and `unsink` are the two that keep one without the other.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.claims import Evidence, NotApplicable, evidence, where_applicable
from spikesink.lifecycle import Cycle, Lifecycle, block_kind, find_spikes, is_spike, plateau_layers
from spikesink.models import Anatomy
from spikesink.patching.interventions import (
    At,
    Intervention,
    add,
    key,
    mask_key,
    means_of,
    one_prompt,
    read,
    scale,
    set_to,
    skip,
    stream,
    value,
    zero,
)
from spikesink.patching.outcome import CLEAN, Outcome, compare
from spikesink.weights import no_projections

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
class Constants:
    """What spike tokens, and others, are on average, over windows that are then not judged. Blocks from 1."""

    about: Anatomy
    cycle: Cycle
    point: int  # in the stream, right after the step-up
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
    def steps(self) -> tuple[int, ...]:
        """All step-up and step-down blocks."""
        return self.cycle.step_up + self.cycle.step_down

    @property
    def reading(self) -> tuple[int, ...]:
        """The blocks that read the plateau."""
        return _reading(self.about, self.cycle)

    @property
    def ordinary_channels(self) -> list[int]:
        """All that are no spike channels, the strongest of the spike tokens' stream first."""
        order = self.stream.abs().argsort(descending=True).tolist()
        return [c for c in order if c not in self.cycle.channels]


def _reading(about: Anatomy, cycle: Cycle) -> tuple[int, ...]:
    first, last = cycle.plateau
    read_point = {b: b - 2 if about.parallel and b % 2 == 0 else b - 1 for b in range(1, about.n_blocks + 1)}
    return tuple(block for block, point in read_point.items() if first <= point <= last)


@where_applicable
def constants(
    model: TransformerBridge, life: Lifecycle, held_out: Int[Tensor, "n length"], where: Where | None = None
) -> Constants | NotApplicable:
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
    point = cycle.plateau[0] + (cycle.plateau[0] % 2 if about.parallel else 0)
    of = {
        "stream": (stream(point), where),
        "readout": (read(about.n_blocks + 1), where),
    }
    if about.projects:
        of |= {"keys": (key(layers), where), "values": (value(layers), where), "other_keys": (key(layers), ~where)}
    if about.attention_norm is not None and about.separate_ffn:
        of |= {"reads": (read(blocks), where), "other_reads": (read(blocks), ~where)}
    absent = dict.fromkeys(("keys", "values", "other_keys", "reads", "other_reads"))
    found = absent | means_of(model, held_out, of)
    found |= {name: found[name][0] for name in ("stream", "readout")}
    return Constants(about, cycle, point, **found)


def decoupled(known: Constants, where: Where, readout: bool = True) -> tuple[Intervention, ...]:
    """No spike, and yet its sinks: all that others read of spike tokens are constants, so nothing needs the spike.

    The step-up and step-down blocks write nothing at the spike tokens, and the spike channels are kept empty there for
    the rest of the depth; their keys and values are held at constants from the first layer that would meet the spike.

    Args:
        known: as `constants` returns it.
        where: the spike tokens of the windows to be run.
        readout: whether what the unembedding reads of the spike tokens is held too. Without it, their own next-token
            predictions, and nothing else, are those of a token that has lost its spike.

    Returns:
        The interventions; none where the model has no keys and values that could be held.
    """
    about = known.about
    if known.keys is None:
        return ()
    cuts = [skip(known.steps, where)] if known.steps else []
    cuts += [
        zero(stream(range(2 * known.start, about.n_blocks + 1, 2)), where, known.cycle.channels),
        *sink_held(known, where, known.start),
    ]
    if readout:
        cuts.append(set_to(read(about.n_blocks + 1), known.readout, where))
    return tuple(cuts)


def sink_held(known: Constants | NotApplicable, positions: At = 0, start: int = 0) -> tuple[Intervention, ...]:
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
    readout: bool = True,
) -> tuple[Intervention, ...]:
    """Interventions that take the spike out of a model's run on these windows or prompts and keep its sinks.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it.
        tokens: what will be run; one prompt [length], or several of one length.
        held_out: other windows, of which the constants are taken; by default those that `life` was found in.
        readout: as in `decoupled`.

    Raises:
        ValueError: nothing spikes in this model, in these tokens or in those held out; or it has no keys and values
            that could be held.
    """
    tokens = _windows(tokens)
    if (reason := no_projections(life.trace.anatomy)) is not None:
        raise ValueError(f"{reason}.")
    known = constants(model, life, life.trace.tokens if held_out is None else held_out)
    if isinstance(known, NotApplicable):
        raise ValueError(f"{known.reason}.")
    return decoupled(known, _spikes(model, life, tokens), readout)


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
class Targets:
    """What cuts are aimed at in some windows: the spike tokens, as many others, and the seed of what is drawn."""

    spike: Where
    other: Where
    seed: int


def aim(where: Where, seed: int = 0) -> Targets:
    """Targets in windows whose spike tokens are known.

    As many other tokens of each window are drawn out of its first half, whose tokens have many queries after them.
    """
    generator, other = torch.Generator().manual_seed(seed), torch.zeros_like(where)
    for window, spikes in enumerate(where):
        free = (~spikes[: max(2, len(spikes) // 2)]).nonzero()[:, 0]
        other[window, free[torch.randperm(len(free), generator=generator)[: int(spikes.sum())]]] = True
    return Targets(where, other, seed)


Build = Callable[[Constants, Targets], Sequence[Intervention]]


@dataclass(frozen=True)
class Cut:
    """One way to break the chain: a short name, the link that it tests, and how it is made."""

    name: str
    link: str
    build: Build
    control: bool = False
    elsewhere: bool = False  # whether it is aimed at other tokens, of which a window may have none


def _random(at: Targets, *size: int) -> Tensor:
    """A random direction of unit length."""
    return functional.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(at.seed)), dim=-1)


def _random_channels(known: Constants, at: Targets) -> list[int]:
    free = sorted(known.ordinary_channels)
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(at.seed)).tolist()
    return [free[i] for i in order[: len(known.cycle.channels)]]


def _another_way(known: Constants, at: Targets) -> list[Intervention]:
    """The spike channels' part of the vector, as long, in a random direction."""
    size = known.stream[list(known.cycle.channels)].norm()
    turned = size * _random(at, known.about.d_model)
    site = stream(known.point)
    return [zero(site, at.spike, known.cycle.channels), add(site, turned, at.spike)]


def _turned_keys(known: Constants, at: Targets, where: Where) -> list[Intervention]:
    """Keys as long as those of spike tokens, in a random direction of each head's own."""
    if known.keys is None:
        return []
    keys = known.keys[known.layers.start : known.layers.stop]
    return [set_to(key(known.layers), keys.norm(dim=-1, keepdim=True) * _random(at, *keys.shape), where)]


def _ordinary_keys(known: Constants, where: Where) -> list[Intervention]:
    """Keys set to other tokens' mean."""
    if known.other_keys is None:
        return []
    return [set_to(key(known.layers), known.other_keys[known.layers.start : known.layers.stop], where)]


def _read_instead(
    known: Constants, at: Targets, means: Float[Tensor, "block d_model"] | None, kinds: Sequence[int] = (0, 1)
) -> list[Intervention]:
    """What blocks of some kinds (1 attention, 0 FFN) read at the spike tokens is one vector, as long as any h~."""
    blocks = [block for block in known.reading if block % 2 in kinds]
    if means is None or not blocks:
        return []
    mean = means.mean(0)
    return [set_to(read(blocks), mean * (known.about.d_model**0.5 / mean.norm()), at.spike)]


def _following(known: Constants) -> list[int]:
    """As many FFN blocks right after the step-up as there are step-up blocks."""
    after = [b for b in range(known.cycle.plateau[0] + 1, known.cycle.plateau[1] + 1) if b % 2 == 0]
    return after[: len(known.cycle.step_up)]


def _up(known: Constants, blocks: Sequence[int], where: Where) -> list[Intervention]:
    return [skip(blocks, where)] if known.cycle.step_up and blocks else []


def _masked(known: Constants, where: Where, layers: Sequence[int], *others: Intervention) -> list[Intervention]:
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
        "the same, own prediction left alone", "both", lambda k, at: decoupled(k, at.spike, readout=False)
    ),
}


def named(key: str, clean: str = "the clean run") -> str:
    """The short name of a cut, or of the run without any."""
    return CUTS[key].name if key in CUTS else clean


@dataclass(frozen=True)
class Broken:
    """The chain broken: outcomes by the names in `CUTS`, the clean run first; only the cuts that could be made."""

    known: Constants
    targets: Targets
    tokens: Int[Tensor, "window position"]
    outcomes: Mapping[str, Outcome]

    @property
    def clean(self) -> Outcome:
        """The run as it is."""
        return self.outcomes[CLEAN]

    def at_spikes(self, key: str) -> float:
        """The largest entry of the stream at the spike tokens, median over them."""
        return float(self.outcomes[key].largest[self.targets.spike].quantile(0.5))


@where_applicable
def break_chain(
    model: TransformerBridge,
    known: Constants | NotApplicable,
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
    targets = aim(where, seed)
    return Broken(known, targets, tokens, compare(model, tokens, cuts_on(known, targets, names)))


def cuts_on(
    known: Constants, targets: Targets, names: Sequence[str] = tuple(CUTS)
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


def halves(life: Lifecycle, length: int) -> tuple[tuple[Tensor, Where], tuple[Tensor, Where]]:
    """The first `length` tokens of every second window, to take constants of, and of the others, to judge on.

    Each with its spike tokens; none where nothing spikes.
    """
    tokens = life.trace.tokens
    none = torch.zeros(tokens.shape, dtype=torch.bool)
    where = none if life.main is None else is_spike(life, life.main)
    odd, even = (slice(1, None, 2), slice(length)), (slice(0, None, 2), slice(length))
    return (tokens[odd], where[odd]), (tokens[even], where[even])


@where_applicable
def sentences(broken: Broken | NotApplicable, name: str = "decoupled") -> pd.DataFrame | NotApplicable:
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


@where_applicable
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


@where_applicable
def block_map(
    model: TransformerBridge,
    known: Constants | NotApplicable,
    tokens: Int[Tensor, "n length"],
    where: Where,
) -> BlockMap | NotApplicable:
    """For every block of the model, let it write nothing at the spike tokens. Takes what `break_chain` does."""
    if not where.any():
        return NotApplicable(NONE_TO_JUDGE)
    found = compare(model, tokens, {b: skip(b, where) for b in range(1, known.about.n_blocks + 1)})
    return BlockMap(known.cycle, found.pop(CLEAN), tuple(found.values()), where)


@where_applicable
def block_table(found: BlockMap | NotApplicable, most: int = 6) -> pd.DataFrame | NotApplicable:
    """The blocks without which perplexity changes most: what is left of spike and sink, and perplexity."""
    clean, spike = found.clean, found.spike()
    ratio = torch.tensor([of.perplexity for of in found.outcomes]) / clean.perplexity
    chosen = sorted(ratio.log().abs().argsort(descending=True)[:most].tolist())
    rows = [
        {
            "block": i + 1,
            "kind": block_kind(i + 1),
            "largest at spike tokens, of clean": f"{float(spike[i]):.0%}",
            "sink ratio": f"{found.outcomes[i].sink_ratio:.2f} (clean {clean.sink_ratio:.2f})",
            "perplexity, of clean": float(ratio[i]),
        }
        for i in chosen
    ]
    return pd.DataFrame(rows).set_index("block")


@where_applicable
def links(broken: Broken | NotApplicable, *only: str) -> pd.DataFrame | NotApplicable:
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


def _made_of(*names: str, of_sinks: bool = False):
    """A measure of some cuts: it gets their outcomes, where a model has them all, and sinks if it is about those."""

    def made(measure):
        @where_applicable
        @wraps(measure)
        def measured(broken: Broken) -> Evidence | NotApplicable:
            if of_sinks and broken.clean.sink_ratio <= FEW_SINKS:
                return NotApplicable(NO_SINK)
            if missing := [name for name in names if name not in broken.outcomes]:
                return NotApplicable(f"this model does not have what is cut here ({CUTS[missing[0]].name})")
            return measure(broken, *(broken.outcomes[name] for name in names))

        return measured

    return made


def _facts(broken: Broken) -> dict[str, int]:
    n, length = broken.tokens.shape
    return {"n_windows": n, "length": length, "n_spike_tokens": int(broken.targets.spike.sum())}


def _intervals(**ends: Sequence[float]) -> dict[str, list[float]]:
    """Ends of intervals by name; nothing where there is only one window, and so no interval."""
    return {name: list(values) for name, values in ends.items() if all(map(math.isfinite, values))}


@_made_of("zeroed", "zeroed_and_masked", "rest_zeroed", *_SPIKE_CONTROLS)
def zeroing_breaks(
    broken: Broken, zeroed: Outcome, masked: Outcome, rest: Outcome, *controls: Outcome
) -> Evidence | NotApplicable:
    """AB1: the spike channels zeroed at the spike tokens, right after the step-up.

    Beside it, with the spike tokens' keys masked as well: what of the damage goes through attention to them; and with
    the step-up blocks silenced as well: what of it is due to what else those write into the spike tokens. Controls:
    as many random channels, as many of the next-strongest, the same channels at other tokens, and the spike turned in a
    random direction, as long as it was.
    """
    silent = broken.outcomes.get("skipped_and_zeroed")
    return evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_zeroed": zeroed.perplexity,
            **_intervals(
                interval_clean=broken.clean.interval(),
                interval_zeroed=zeroed.interval(),
                interval_zeroed_over_clean=zeroed.times(broken.clean),
            ),
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_zeroed": zeroed.sink_ratio,
            "perplexity_zeroed_and_masked": masked.perplexity,
            "perplexity_rest_zeroed": rest.perplexity,
            **({"perplexity_skipped_and_zeroed": silent.perplexity} if silent else {}),
            **_facts(broken),
        },
        control={f"perplexity_{name}": of.perplexity for name, of in zip(_SPIKE_CONTROLS, controls, strict=True)},
    )


@_made_of("mean", "whole", "another_way")
def mean_does_not(broken: Broken, mean: Outcome, whole: Outcome, another_way: Outcome) -> Evidence | NotApplicable:
    """AB2: the spike channels set to their mean over other windows. Control: the same size in a random direction.

    Where that does nothing either, or the mean is what stands there anyway (a BOS token), the rule could not fail, and
    the claim is not applicable.
    """
    if abs(another_way.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        return NotApplicable("as large a vector in a random direction changes nothing either, so no mean could do harm")
    if max(float(of.divergence.max()) for of in (mean, whole)) < SAME:
        return NotApplicable(NO_CHANGE)
    return evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_mean": mean.perplexity,
            "perplexity_whole_vector": whole.perplexity,
            "kl_mean": mean.kl,
            "kl_whole_vector": whole.kl,
            "same_token_mean": mean.agreement,
        },
        control={"perplexity_random_direction": another_way.perplexity, "kl_random_direction": another_way.kl},
    )


@_made_of("skipped", "skipped_others", "skipped_elsewhere", of_sinks=True)
def step_up_makes_the_sink(
    broken: Broken, skipped: Outcome, others: Outcome, elsewhere: Outcome
) -> Evidence | NotApplicable:
    """AB3: the step-up blocks write nothing at the spike tokens.

    `most_attended_other_key` is the largest share of attention, mean over windows, heads and the plateau's layers, that
    any key position of the first half gets but the first: whether the sink has moved to another early token. Controls:
    as many FFN blocks right after them, and the step-up blocks at other tokens.
    """
    return evidence(
        measured={
            "step_up_blocks": list(broken.known.cycle.step_up),
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_skipped": skipped.perplexity,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_skipped": skipped.sink_ratio,
            "most_attended_other_key_clean": _other_keys(broken, broken.clean),
            "most_attended_other_key_skipped": _other_keys(broken, skipped),
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_skipped": broken.at_spikes("skipped"),
        },
        control={
            "perplexity_other_blocks": others.perplexity,
            "sink_ratio_other_blocks": others.sink_ratio,
            "perplexity_other_tokens": elsewhere.perplexity,
            "sink_ratio_other_tokens": elsewhere.sink_ratio,
        },
    )


@_made_of("decoupled", "decoupled_open", "zeroed", of_sinks=True)
def spike_without_which(broken: Broken, apart: Outcome, open_: Outcome, zeroed: Outcome) -> Evidence | NotApplicable:
    """AB4: no spike in the stream, and all that is read of the spike tokens held at constants (`decoupled`).

    `perplexity_own_prediction_open` leaves the spike tokens' own next-token predictions alone, and `elsewhere` is over
    all other positions: where they are the same as the clean run's, those predictions are all that it costs. Control:
    the spike taken out with nothing held. Not applicable where the constants are what stands there anyway (a BOS
    token), as then nothing could be lost.
    """
    if float(apart.divergence.max()) < SAME:
        return NotApplicable(NO_CHANGE)
    elsewhere = ~broken.targets.spike[:, :-1]
    return evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_decoupled": apart.perplexity,
            "perplexity_own_prediction_open": open_.perplexity,
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(elsewhere),
            "perplexity_decoupled_elsewhere": open_.perplexity_at(elsewhere),
            "kl_decoupled": apart.kl,
            "same_token_decoupled": apart.agreement,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_decoupled": apart.sink_ratio,
            "max_activation_clean": broken.clean.max_activation,
            "max_activation_decoupled": apart.max_activation,
            "largest_at_spike_tokens_clean": broken.at_spikes(CLEAN),
            "largest_at_spike_tokens_decoupled": broken.at_spikes("decoupled"),
        },
        control={"perplexity_zeroed": zeroed.perplexity, "max_activation_zeroed": zeroed.max_activation},
    )


@_made_of("masked", "masked_everywhere", "masked_elsewhere", "ordinary_key", of_sinks=True)
def sink_without_which(
    broken: Broken, masked: Outcome, everywhere: Outcome, elsewhere: Outcome, ordinary: Outcome
) -> Evidence | NotApplicable:
    """AB5: the spike tokens' keys masked in the layers that read the plateau; the spike is left alone.

    `masked_everywhere`: in all layers, where another token may take its place (`largest_elsewhere` says whether one
    grows a spike). That no attention is left on the plateau, and that a spike at position 0 stays, is so by
    construction; what is measured is what is left of the sink elsewhere, and what it costs. Controls: other tokens
    masked; and the sink's key replaced by the mean of others, without a mask.
    """
    others = ~broken.targets.spike
    return evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_unsunk": masked.perplexity,
            "sink_ratio_clean": broken.clean.sink_ratio,
            "sink_ratio_unsunk": masked.sink_ratio,
            "sink_ratio_unsunk_on_the_plateau": _on(broken, masked),
            "sink_ratio_clean_on_the_plateau": _on(broken, broken.clean),
            "max_activation_clean": broken.clean.max_activation,
            "max_activation_unsunk": masked.max_activation,
            "perplexity_masked_everywhere": everywhere.perplexity,
            "largest_elsewhere_clean": float(broken.clean.largest[others].max()),
            "largest_elsewhere_unsunk": float(masked.largest[others].max()),
            "largest_elsewhere_masked_everywhere": float(everywhere.largest[others].max()),
        },
        control={
            "perplexity_other_tokens_masked": elsewhere.perplexity,
            "sink_ratio_other_tokens_masked": elsewhere.sink_ratio,
            "perplexity_ordinary_key": ordinary.perplexity,
            "sink_ratio_ordinary_key": ordinary.sink_ratio,
        },
    )


def _other_keys(broken: Broken, outcome: Outcome) -> float:
    layers = broken.known.layers
    return float(outcome.attention[layers.start : layers.stop, 1 : broken.tokens.shape[1] // 2].mean(0).max())


def _on(broken: Broken, outcome: Outcome) -> float:
    """The sink ratio over the layers that read the plateau alone."""
    layers = broken.known.layers
    return float((outcome.score[:, layers.start : layers.stop] > outcome.epsilon).float().mean())


@_made_of("random_channels", "other_position", "zeroed")
def wrong_places_do_nothing(
    broken: Broken, random: Outcome, other: Outcome, zeroed: Outcome
) -> Evidence | NotApplicable:
    """AB6: the controls of AB1 and AB3 as a claim of their own: random channels, and other positions.

    `elsewhere` leaves out the changed tokens' own next-token predictions. Control: the cut itself; where that does
    nothing, there is nothing that the others could fall short of.
    """
    if abs(zeroed.perplexity / broken.clean.perplexity - 1) <= INDIFFERENT:
        return NotApplicable("zeroing the spike changes nothing either, so the controls have nothing to fall short of")
    kept = ~broken.targets.other[:, :-1]
    return evidence(
        measured={
            "perplexity_clean": broken.clean.perplexity,
            "perplexity_random_channels": random.perplexity,
            "perplexity_other_position": other.perplexity,
            "perplexity_clean_elsewhere": broken.clean.perplexity_at(kept),
            "perplexity_other_position_elsewhere": other.perplexity_at(kept),
            "n_channels": len(broken.known.cycle.channels),
        },
        control={"perplexity_zeroed": zeroed.perplexity},
    )


@where_applicable
def dose_and_response(found: Doses | NotApplicable) -> Evidence | NotApplicable:
    """AB7: perplexity and sink ratio against the factor by which the spike is scaled, with intervals over windows.

    `perplexities_elsewhere` leave out the spike tokens' own next-token predictions. Controls:
    as many random channels, by the smallest factor and the largest.
    """
    lows, highs = zip(*(of.interval() for of in found.outcomes), strict=True)
    elsewhere = ~found.where[:, :-1]
    return evidence(
        measured={
            "factors": list(found.factors),
            "perplexities": [of.perplexity for of in found.outcomes],
            "perplexities_elsewhere": [of.perplexity_at(elsewhere) for of in found.outcomes],
            **_intervals(lows=lows, highs=highs),
            "sink_ratios": [of.sink_ratio for of in found.outcomes],
        },
        control={f"perplexity_random_channels_{f:g}": of.perplexity for f, of in found.control.items()},
    )
