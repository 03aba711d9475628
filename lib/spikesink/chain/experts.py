"""Where a router chooses among experts: to which of them it sends spike tokens, and which of them writes the spike.

In a mixture of experts a layer has several gated FFNs. A router, one linear map of h~, chooses a few of them for each
token and adds up what they write, each by its weight. So the question of `amplifier`, which FFN can write the spike,
becomes two: which expert can, and who is sent to it.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikesink.chain.amplifier import cache_hooks, compute_write, ffn_hooks, gains, largest_gains
from spikesink.chain.lifecycle import Lifecycle, check_model, check_windows, first_step_up, is_spike
from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Anatomy, Block, Model, mlp
from spikesink.model.weights import Weights, weights_of


@dataclass(frozen=True)
class ExpertCensus:
    """||U_k||_F of every channel of every expert: what the weights alone say about where a spike can be written."""

    blocks: tuple[Block, ...]  # of each row
    experts: tuple[str, ...]  # of each row, as `Weights.experts` names them
    gain: Float[Tensor, "row d_model"]

    def top(self, n: int) -> list[tuple[Block, str, int, float]]:
        """The n of largest gain, the largest first: block, expert, channel, gain."""
        pairs = largest_gains(self.gain, n)
        return [(self.blocks[row], self.experts[row], channel, gain) for row, channel, gain in pairs]


@measure
def census_experts(weights: Weights) -> ExpertCensus:
    """Measure every channel of every expert, a layer at a time, without running any text."""
    _require_experts(weights.anatomy)
    rows = [
        (mlp(layer), name, gains(ffn).float())
        for layer in progress(range(weights.anatomy.n_layers), "weighing experts", "layer")
        for name, ffn in weights.experts(layer).items()
    ]
    if not rows:
        raise NotApplicable(
            f"the experts of this {weights.anatomy.family} model are kept in a way that is not known here"
        )
    blocks, names, gain = zip(*rows, strict=True)
    return ExpertCensus(blocks, names, torch.stack(gain))


@dataclass(frozen=True)
class Routing:
    """What the router of the first step-up block does, and what each expert writes into the spike's first channel."""

    block: Block
    channel: int
    experts: tuple[str, ...]  # those that the router chooses from
    is_spike: Bool[Tensor, " token"]
    weight: Float[Tensor, "token expert"]  # of the router's choice, 0 where an expert is not chosen
    write: Float[Tensor, "spike expert"]  # weight times what the expert computes, in the spike's first channel
    own: Float[Tensor, " spike"]  # what the model's own block writes there, experts that every token passes included
    shares: bool  # whether there are such experts
    gain: Float[Tensor, " expert"]  # ||U_k||_F there
    gain_ordinary: Float[Tensor, "channel expert"]  # the same in channels drawn at random

    @property
    def first_choice(self) -> Int[Tensor, " token"]:
        """The expert of largest weight."""
        return self.weight.argmax(1)

    @property
    def writer(self) -> int:
        """The expert that writes most of the spike: its place in `experts`."""
        return int(self.write.abs().mean(0).argmax())


@measure
def route(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle) -> Routing:
    """Run the windows up to the first step-up block and see which experts its router sends each token to."""
    check_model(model, life)
    check_windows(life, tokens)
    anatomy = model.anatomy
    _require_experts(anatomy)
    block = first_step_up(life)
    ffns, choice = weights_of(model).experts(block.layer), anatomy.router_hooks[block.layer]
    routed = {name: ffn for name, ffn in ffns.items() if name.isdecimal()}
    if choice is None or not routed:
        raise NotApplicable(f"no router's choice of known experts can be seen in {block}, the first that steps up")
    hooks = (*ffn_hooks(anatomy, block.layer), choice)
    passed = [cache_hooks(model, window, hooks) for window in progress(tokens, "following the router", "window")]
    h, own, weight = map(torch.cat, zip(*passed, strict=True))
    if weight.shape[1] != len(routed):
        raise NotApplicable(f"the router's hook of this {anatomy.family} model does not show a weight for each expert")
    spiking, channel = is_spike(life, life.main).flatten(), life.main.channel
    written = [compute_write(ffn, h[spiking])[:, channel] for ffn in routed.values()]
    gain = torch.stack([gains(ffn).float() for ffn in routed.values()], dim=1)
    return Routing(
        block=block,
        channel=channel,
        experts=tuple(routed),
        is_spike=spiking,
        weight=weight,
        write=weight[spiking] * torch.stack(written, dim=1),
        own=own[spiking, channel],
        shares=len(routed) < len(ffns),
        gain=gain[channel],
        gain_ordinary=gain[life.trace.channels[life.trace.ordinary]],
    )


def _require_experts(anatomy: Anatomy) -> None:
    if not anatomy.n_experts:
        raise NotApplicable("every layer has one FFN, and no router chooses")
    if anatomy.gate_activation is None:
        raise NotApplicable(f"the experts of this {anatomy.family} model have no gate")
