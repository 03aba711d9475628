"""Each link of the chain from spike to sink cut once, in the chain's order, with controls; and the two kept apart.

What is put in the place of something is measured on other windows than those it is then judged on (`spike_means`).
`CUTS` lists the cuts, `break_chain` makes them; `decouple` and `unsink` keep the one without the other.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from numbers import Real

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from spikesink.chain.lifecycle import Cycle, Lifecycle, find_spikes, is_spike
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Block, Model
from spikesink.model.weights import require_projections
from spikesink.patching.interventions import Intervention, add, mask_key, scale, set_to, skip, zero
from spikesink.patching.means import SpikeMeans, Where, spike_means
from spikesink.patching.outcome import CLEAN, Outcome, compare, table
from spikesink.patching.recordings import one_prompt
from spikesink.patching.sites import At, Tokens, key, read, readout, stream, value

FACTORS = (0, 0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4)
INDIFFERENT = 0.02  # a change of perplexity that is none to speak of: AB2's own limit
FEW_SINKS = 0.1  # AB5's limit: what it must come down to
NO_SINK = "hardly any head sinks on the first token to begin with"
NONE_TO_JUDGE = "no token of the windows to judge on spikes; measure more windows"


def decoupled(means: SpikeMeans, where: Where, hold_readout: bool = True) -> tuple[Intervention, ...]:
    """No spike, and yet its sinks: all that others read of spike tokens are constants, so nothing needs the spike.

    The step-up and step-down blocks write nothing at the spike tokens, and the spike channels are kept empty there for
    the rest of the depth; their keys and values are held at constants from the first layer that would meet the spike.
    None where the model has no keys and values that could be held. `hold_readout`: what the unembedding reads of them
    is held too. Without it their own next-token predictions, and nothing else, are those of a token without its spike.
    """
    if means.keys is None:
        return ()
    rest = map(Block, range(2 * means.start, means.anatomy.n_blocks + 1, 2))
    return (
        *([skip(means.steps, where)] if means.steps else []),
        zero(stream(rest), where, means.cycle.channels),
        *sink_held(means, where, means.start),
        *([set_to(readout(), means.readout, where)] if hold_readout else []),
    )


def sink_held(means: SpikeMeans | NotApplicable, positions: At = 0, start: int = 0) -> tuple[Intervention, ...]:
    """The spike tokens' mean key and value at some positions, from a layer on: a sink that needs no token of its own.

    None where there are no spike tokens, or no keys and values that could be held.
    """
    if isinstance(means, NotApplicable) or means.keys is None:
        return ()
    layers = range(start, means.anatomy.n_layers)
    return (set_to(key(layers), means.keys[start:], positions), set_to(value(layers), means.values[start:], positions))


def decouple(
    model: Model,
    tokens: Tokens,
    life: Lifecycle,
    held_out: Int[Tensor, "m length"] | None = None,
    hold_readout: bool = True,
) -> tuple[Intervention, ...]:
    """Interventions that take the spike out of a model's run on these windows or prompts and keep its sinks.

    The constants are taken of `held_out`, other windows; by default those that `life` was found in. `hold_readout` is
    as in `decoupled`.

    Raises:
        ValueError: nothing spikes in this model, in these tokens or in those held out.
        NotApplicable: the model has no keys and values that could be held.
    """
    require_projections(model.anatomy)
    means = spike_means(model, life.trace.tokens if held_out is None else held_out, life)
    if isinstance(means, NotApplicable):
        raise ValueError(f"{means.reason}.")
    return decoupled(means, _spikes(model, tokens, life), hold_readout)


def unsink(model: Model, tokens: Tokens, life: Lifecycle) -> tuple[Intervention, ...]:
    """Interventions that mask the spike tokens' keys in all layers that read the plateau; the spike stays.

    Takes and raises what `decouple` does.
    """
    return (mask_key(_spikes(model, tokens, life), life.main.layers),)


def _spikes(model: Model, tokens: Tokens, life: Lifecycle) -> Where:
    tokens = tokens if isinstance(tokens, Tensor) and tokens.ndim == 2 else one_prompt(tokens)[None]
    where = find_spikes(model, tokens, life)
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
    """The spike tokens, and as many others of each window, drawn out of its first half: many queries come after it."""
    generator, other = torch.Generator().manual_seed(seed), torch.zeros_like(where)
    for window, spikes in enumerate(where):
        free = (~spikes[: max(2, len(spikes) // 2)]).nonzero()[:, 0]
        other[window, free[torch.randperm(len(free), generator=generator)[: int(spikes.sum())]]] = True
    return CutTokens(where, other, seed)


Build = Callable[[SpikeMeans, Where, int], Sequence[Intervention]]  # of means, tokens and a seed; empty: not possible


@dataclass(frozen=True)
class Cut:
    """One way to break the chain: what is done, in words, the link that it tests, and how it is made."""

    name: str
    link: str
    build: Build
    control: bool = False
    elsewhere: bool = False  # whether it is aimed at other tokens, of which a window may have none


def _random_direction(seed: int, *size: int) -> Tensor:
    return functional.normalize(torch.randn(*size, generator=torch.Generator().manual_seed(seed)), dim=-1)


def _random_channels(means: SpikeMeans, seed: int) -> list[int]:
    """As many ordinary channels as there are spike channels, drawn at random."""
    free = torch.tensor(sorted(means.ordinary_channels))
    order = torch.randperm(len(free), generator=torch.Generator().manual_seed(seed))
    return free[order[: len(means.cycle.channels)]].tolist()


def _zero(channels: Callable[[SpikeMeans, int], Sequence[int]]) -> Build:
    return lambda means, at, seed: [zero(stream(means.point), at, channels(means, seed))]


def _turn(means: SpikeMeans, at: Where, seed: int) -> list[Intervention]:
    """The spike channels' part of the vector, as long, in a random direction."""
    size = means.stream[list(means.cycle.channels)].norm()
    turned = size * _random_direction(seed, means.anatomy.d_model)
    return [*_zero_spike(means, at, seed), add(stream(means.point), turned, at)]


def _skip(blocks: Callable[[SpikeMeans], Sequence[Block]]) -> Build:
    return lambda means, at, seed: [skip(blocks(means), at)] if means.cycle.step_up and blocks(means) else []


def _following(means: SpikeMeans) -> Sequence[Block]:
    """As many FFN blocks right after the step-up as there are step-up blocks."""
    first, last = means.cycle.plateau
    after = [b for b in map(Block, range(first + 1, last + 1)) if not b.is_attention]
    return after[: len(means.cycle.step_up)]


def _read(mean: str, attention: bool = True, ffn: bool = True) -> Build:
    """What blocks of some kinds read is one vector, as long as any h~."""

    def build(means: SpikeMeans, at: Where, seed: int) -> list[Intervention]:
        vectors, blocks = getattr(means, mean), [b for b in means.reading if (attention if b.is_attention else ffn)]
        if vectors is None or not blocks:
            return []
        vector = vectors.mean(0)
        return [set_to(read(blocks), vector * (means.anatomy.d_model**0.5 / vector.norm()), at)]

    return build


def _set_keys(vectors: Callable[[SpikeMeans, int], Tensor]) -> Build:
    """Keys of the plateau's layers are [layer, head, d_head] others."""

    def build(means: SpikeMeans, at: Where, seed: int) -> list[Intervention]:
        return [] if means.keys is None else [set_to(key(means.layers), vectors(means, seed), at)]

    return build


def _turned_keys(means: SpikeMeans, seed: int) -> Tensor:
    """As long as those of spike tokens, in a random direction of each head's own."""
    keys = means.keys[means.layers]
    return keys.norm(dim=-1, keepdim=True) * _random_direction(seed, *keys.shape)


def _mask(layers: Callable[[SpikeMeans], Iterable[int]]) -> Build:
    """Keys masked, where the family's attention takes a change of its pattern."""
    return lambda means, at, seed: [mask_key(at, layers(means))] if means.anatomy.edits_pattern else []


def _both(*builds: Build) -> Build:
    def build(means: SpikeMeans, at: Where, seed: int) -> list[Intervention]:
        cuts = [one(means, at, seed) for one in builds]
        return [*chain.from_iterable(cuts)] if all(cuts) else []

    return build


_zero_spike = _zero(lambda means, seed: means.cycle.channels)
_skip_step_up = _skip(lambda means: means.cycle.step_up)
_turn_keys = _set_keys(_turned_keys)
_ordinary_keys = _set_keys(lambda means, seed: means.other_keys[means.layers])
_plateau_mask = _mask(lambda means: means.layers)
CUTS: Mapping[str, Cut] = {
    "skipped": Cut("step-up blocks write nothing", "step-up", _skip_step_up),
    "skipped_others": Cut("as many blocks after them write nothing", "step-up", _skip(_following), True),
    "skipped_elsewhere": Cut("step-up blocks write nothing at other tokens", "step-up", _skip_step_up, True, True),
    "zeroed": Cut("spike channels zeroed", "spike", _zero_spike),
    "mean": Cut(
        "spike channels set to their mean",
        "spike",
        lambda m, at, seed: [set_to(stream(m.point), m.stream[[*m.cycle.channels]], at, m.cycle.channels)],
    ),
    "whole": Cut("whole vector set to its mean", "spike", lambda m, at, seed: [set_to(stream(m.point), m.stream, at)]),
    "rest_zeroed": Cut(
        "all but the spike channels zeroed", "spike", _zero(lambda means, seed: means.ordinary_channels)
    ),
    "another_way": Cut("spike turned in a random direction", "spike", _turn, True),
    "random_channels": Cut("as many random channels zeroed", "spike", _zero(_random_channels), True),
    "strongest_channels": Cut(
        "as many next-strongest channels zeroed",
        "spike",
        _zero(lambda m, seed: m.ordinary_channels[: len(m.cycle.channels)]),
        True,
    ),
    "other_position": Cut("spike channels zeroed at other tokens", "spike", _zero_spike, True, True),
    "constant_read": Cut("what blocks read: one vector", "RMSNorm", _read("reads")),
    "others_read": Cut("what blocks read: others' mean", "RMSNorm", _read("other_reads")),
    "others_read_attention": Cut("only what attention reads: others' mean", "RMSNorm", _read("other_reads", ffn=False)),
    "others_read_ffn": Cut("only what FFNs read: others' mean", "RMSNorm", _read("other_reads", attention=False)),
    "turned_key": Cut("keys turned at random", "key", _turn_keys),
    "ordinary_key": Cut("keys set to others' mean", "key", _ordinary_keys),
    "turned_key_elsewhere": Cut("keys of other tokens turned", "key", _turn_keys, True, True),
    "masked": Cut("sink masked on the plateau", "sink", _plateau_mask),
    "masked_everywhere": Cut("sink masked in all layers", "sink", _mask(lambda means: range(means.anatomy.n_layers))),
    "masked_elsewhere": Cut("other tokens masked", "sink", _plateau_mask, True, True),
    "skipped_and_zeroed": Cut("no step-up, and spike channels zeroed", "both", _both(_skip_step_up, _zero_spike)),
    "zeroed_and_masked": Cut("spike zeroed, sink masked", "both", _both(_zero_spike, _plateau_mask)),
    "decoupled": Cut("spike out, keys and values held", "both", lambda means, at, seed: decoupled(means, at)),
    "decoupled_open": Cut(
        "the same, own prediction left alone", "both", lambda means, at, seed: decoupled(means, at, hold_readout=False)
    ),
}


def named(key: str, clean: str = "the clean run") -> str:
    """The short name of a cut, or of the run without any."""
    return CUTS[key].name if key in CUTS else clean


@dataclass(frozen=True)
class Broken:
    """The chain broken: outcomes by the names in `CUTS`, the clean run first; only the cuts that could be made."""

    means: SpikeMeans
    targets: CutTokens
    tokens: Int[Tensor, "window position"]
    outcomes: Mapping[str, Outcome]

    @property
    def clean(self) -> Outcome:
        """The run as it is."""
        return self.outcomes[CLEAN]

    def at_spikes(self, name: str) -> float:
        """The largest entry of the stream at the spike tokens, median over them."""
        return float(self.outcomes[name].largest[self.targets.spike].quantile(0.5))

    def elsewhere(self, name: str) -> float:
        """The largest entry of the stream at all other tokens."""
        return float(self.outcomes[name].largest[~self.targets.spike].max())

    def plateau_sink_ratio(self, name: str) -> float:
        """The sink ratio over the layers that read the plateau alone."""
        layers, outcome = self.means.layers, self.outcomes[name]
        return float((outcome.score[:, layers] > outcome.epsilon).float().mean())

    def most_attended_other_key(self, name: str) -> float:
        """The largest share of the plateau's attention that a key position of the first half gets, but the first."""
        layers, half = self.means.layers, self.tokens.shape[1] // 2
        return float(self.outcomes[name].attention[layers, 1:half].mean(0).max())


@measure
def break_chain(
    model: Model,
    tokens: Int[Tensor, "n length"],
    means: SpikeMeans,
    where: Where,
    names: Sequence[str] = tuple(CUTS),
    seed: int = 0,
) -> Broken:
    """Make cuts, and measure each on the same windows: others than those of the means.

    `where` are their spike tokens. Cuts that a model does not have (no step-up block, no norm) are left out.
    """
    if not where.any():
        raise NotApplicable(NONE_TO_JUDGE)
    targets = choose_tokens(where, seed)
    return Broken(means, targets, tokens, compare(model, tokens, aim_cuts(means, targets, names)))


def aim_cuts(
    means: SpikeMeans, targets: CutTokens, names: Sequence[str] = tuple(CUTS)
) -> dict[str, tuple[Intervention, ...]]:
    """The interventions of some cuts; without those that this model does not have.

    Raises:
        ValueError: there is no such cut.
    """
    if wrong := [name for name in names if name not in CUTS]:
        raise ValueError(f"there is no cut {wrong[0]!r}; give some of {', '.join(CUTS)}.")
    aimed = {name: targets.other if CUTS[name].elsewhere else targets.spike for name in names}
    made = {name: tuple(CUTS[name].build(means, at, targets.seed)) for name, at in aimed.items() if at.any()}
    return {name: cut for name, cut in made.items() if cut}


def split_windows(life: Lifecycle, length: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The first `length` tokens of every second window, to take means of, and of the others, to judge on.

    Each with its spike tokens; none where nothing spikes.
    """
    tokens = life.trace.tokens
    where = is_spike(life, life.main) if life.main else torch.zeros(tokens.shape, dtype=torch.bool)
    odd, even = (slice(1, None, 2), slice(length)), (slice(0, None, 2), slice(length))
    return (tokens[odd], where[odd]), (tokens[even], where[even])


@dataclass(frozen=True)
class Doses:
    """The spike channels scaled at the spike tokens, right after the step-up; factor 1 is the clean run."""

    factors: tuple[Real, ...]
    outcomes: tuple[Outcome, ...]
    where: Where  # the spike tokens
    control: Mapping[Real, Outcome]  # as many random channels, by some of the factors


@measure
def dose_spike(model: Model, broken: Broken, factors: Sequence[Real] = FACTORS) -> Doses:
    """Scale the spike channels by each factor, and as many random channels by the largest and by 0.

    What `break_chain` has run already (0 is "zeroed", 1 the clean run) is not run again.
    """
    means, where, most = broken.means, broken.targets.spike, max(factors)
    site, random = stream(means.point), _random_channels(means, broken.targets.seed)
    outcomes = {0: broken.outcomes["zeroed"], 1: broken.clean}
    cuts = {factor: scale(site, factor, where, means.cycle.channels) for factor in factors if factor not in outcomes}
    outcomes |= compare(model, broken.tokens, cuts | {"control": scale(site, most, where, random)})
    factors = tuple(sorted(factors))
    control = {0: broken.outcomes["random_channels"], most: outcomes["control"]}
    return Doses(factors, tuple(outcomes[factor] for factor in factors), where, control)


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
        return torch.stack([(outcome.largest[self.where] / own).quantile(0.5) for outcome in self.outcomes])


@measure
def map_blocks(model: Model, tokens: Int[Tensor, "n length"], means: SpikeMeans, where: Where) -> BlockMap:
    """Let every block of the model in turn write nothing at the spike tokens. Takes what `break_chain` does."""
    if not where.any():
        raise NotApplicable(NONE_TO_JUDGE)
    blocks = map(Block, range(1, means.anatomy.n_blocks + 1))
    outcomes = compare(model, tokens, {block: skip(block, where) for block in blocks})
    return BlockMap(means.cycle, outcomes.pop(CLEAN), tuple(outcomes.values()), where)


@measure
def describe_cut(broken: Broken, name: str) -> pd.DataFrame:
    """The interventions that a cut is made of, in words."""
    words = [str(one) for one in aim_cuts(broken.means, broken.targets, [name]).get(name, ())]
    return pd.DataFrame(index=pd.Index(words, name="the interventions, in order"))


@measure
def cut_table(broken: Broken, *links: str) -> pd.DataFrame:
    """What each cut does, one row a cut, the clean run first; of some links, or all."""
    shown = [name for name in broken.outcomes if name == CLEAN or not links or CUTS[name].link in links]
    controls = [name for name in shown if name != CLEAN and CUTS[name].control]
    words = [f"{named(name)} (control)" if name in controls else named(name) for name in shown]
    rows = table({word: broken.outcomes[name] for word, name in zip(words, shown, strict=True)})
    return rows.assign(largest_at_spike_tokens=[broken.at_spikes(name) for name in shown])
