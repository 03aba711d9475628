"""What spike tokens, and others, are on average: what cuts put in the place of things."""

from dataclasses import dataclass

from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikesink.chain.lifecycle import Cycle, Lifecycle, find_spikes
from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy, Block, Model
from spikesink.model.proof import require
from spikesink.patching.recordings import means_of
from spikesink.patching.sites import key, read, readout, stream, value

Where = Bool[Tensor, "window position"]


@dataclass(frozen=True)
class SpikeMeans:
    """What spike tokens, and others, are on average, over windows that are then not judged."""

    anatomy: Anatomy
    cycle: Cycle
    point: Block  # in the stream, right after the step-up
    reading: tuple[Block, ...]  # the blocks that read the plateau
    stream: Float[Tensor, " d_model"]  # of spike tokens, at that point
    readout: Float[Tensor, " d_model"]  # h~ of spike tokens, as the unembedding reads it
    # Of spike tokens, before QK norm and RoPE; None where the model has no projections of its own to them.
    keys: Float[Tensor, "layer kv_head d_head"] | None = None
    values: Float[Tensor, "layer kv_head d_head"] | None = None
    other_keys: Float[Tensor, "layer kv_head d_head"] | None = None  # of all other tokens
    # h~ as `reading` blocks read it; None where that is not to be seen.
    reads: Float[Tensor, "block d_model"] | None = None  # of spike tokens
    other_reads: Float[Tensor, "block d_model"] | None = None

    @property
    def layers(self) -> list[int]:
        """Those whose attention reads the plateau."""
        return self.cycle.layers

    @property
    def start(self) -> int:
        """The first layer that would meet the spike."""
        return (min(self.cycle.step_up, default=self.cycle.peak) + 1) // 2

    @property
    def steps(self) -> tuple[Block, ...]:
        """All step-up and step-down blocks."""
        return self.cycle.step_up + self.cycle.step_down

    @property
    def ordinary_channels(self) -> list[int]:
        """All that are no spike channels, the strongest of the spike tokens' stream first."""
        order = self.stream.abs().argsort(descending=True).tolist()
        return [c for c in order if c not in self.cycle.channels]


@measure
def spike_means(
    model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, where: Where | None = None
) -> SpikeMeans:
    """Measure the means that cuts put in place of things, in one pass over windows that are then not judged.

    `where` are their spike tokens, if they are known; by default they are looked for.
    """
    anatomy, cycle = model.anatomy, life.main
    if cycle is None:
        raise NotApplicable(life.reason)
    if not cycle.layers:
        raise NotApplicable("no layer reads the plateau of the spike, so there is nothing to cut between it and a sink")
    anatomy.require_attention()
    require(model, "writes", "patterns")
    if not model.hook_dict.keys() >= set(readout().hooks(anatomy)):
        raise NotApplicable(f"the unembedding of this {anatomy.family} model does not read the stream through a norm")
    where = find_spikes(model, tokens, life) if where is None else where
    if not where.any() or where.all():
        kind = "no" if not where.any() else "every"
        raise NotApplicable(f"{kind} token of the windows that means are taken of spikes; measure more windows")
    first, last = cycle.plateau
    point = Block(first + (first % 2 if anatomy.parallel else 0))
    blocks = map(Block, range(1, anatomy.n_blocks + 1))
    reading = tuple(b for b in blocks if first <= b - 1 - (anatomy.parallel and not b.is_attention) <= last)
    layers = range(anatomy.n_layers)
    sites = {"stream": (stream(point), where), "readout": (readout(), where)}
    if anatomy.projects:
        sites |= {"keys": (key(layers), where), "values": (value(layers), where), "other_keys": (key(layers), ~where)}
    if anatomy.attention_norm is not None and anatomy.separate_ffn:
        sites |= {"reads": (read(reading), where), "other_reads": (read(reading), ~where)}
    means = means_of(model, tokens, sites)
    means |= {name: means[name][0] for name in ("stream", "readout")}
    return SpikeMeans(anatomy, cycle, point, reading, **means)
