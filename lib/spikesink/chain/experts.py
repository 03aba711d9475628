"""Where a router chooses among experts: to which of them it sends spike tokens, and which of them writes the spike.

In a mixture of experts a layer has several gated FFNs. A router, one linear map of h~, chooses a few of them for each
token and adds up what they write, each by its weight. So the question of `amplifier`, which FFN can write the spike,
becomes two: which expert can, and who is sent to it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain import amplifier
from spikesink.chain.lifecycle import Lifecycle, check_windows, first_step_up, is_spike
from spikesink.common import NotApplicable, progress
from spikesink.model.anatomy import Anatomy, Block, anatomy, mlp
from spikesink.model.weights import Weights, weights_of


@dataclass(frozen=True)
class ExpertCensus:
    """||U_k||_F of every channel of every expert: what the weights alone say about where a spike can be written."""

    blocks: tuple[Block, ...]  # of each row
    experts: tuple[str, ...]  # of each row, as `Weights.experts` names them
    gain: Float[Tensor, "row d_model"]

    def top(self, n: int) -> list[tuple[Block, str, int, float]]:
        """The n of largest gain, the largest first: block, expert, channel, gain."""
        values, where = self.gain.flatten().topk(min(n, self.gain.numel()))
        found = zip(where.tolist(), values.tolist(), strict=True)
        width = self.gain.shape[1]
        return [(self.blocks[i // width], self.experts[i // width], i % width, value) for i, value in found]

    def of(self, block: int, channel: int) -> dict[str, float]:
        """The gain of each expert of a block in one channel.

        Raises:
            ValueError: the census has no such block or channel.
        """
        rows = [row for row, of in enumerate(self.blocks) if of == block]
        if not rows or not 0 <= channel < self.gain.shape[1]:
            raise ValueError(f"{Block(block)}, channel {channel} is not in this census of {len(self.blocks)} experts.")
        return {self.experts[row]: float(self.gain[row, channel]) for row in rows}


def census(weights: Weights, layers: Sequence[int] | None = None) -> ExpertCensus | NotApplicable:
    """Measure every channel of every expert, a layer at a time, without running any text.

    Args:
        weights: of a loaded model (`weights_of`), or read as they are needed (`open_weights`).
        layers: only these, from 0; by default all.

    Returns:
        The census, or why there is none: the model has no router, or its experts have no gate that is known.

    Raises:
        ValueError: the model has no such layer.
    """
    about = weights.anatomy
    if (reason := _no_experts(about)) is not None:
        return reason
    layers = range(about.n_layers) if layers is None else layers
    blocks, names, rows = [], [], []
    for layer in progress(layers, "weighing experts", "layer"):
        for name, ffn in weights.experts(layer).items():
            blocks.append(mlp(layer))
            names.append(name)
            rows.append(amplifier.gains(ffn).float())
    if not rows and len(layers):
        return NotApplicable(f"the experts of this {about.family} model are kept in a way that is not known here")
    gain = torch.stack(rows) if rows else torch.zeros(0, about.d_model)
    return ExpertCensus(tuple(blocks), tuple(names), gain)


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


def route(model: TransformerBridge, tokens: Int[Tensor, "n length"], life: Lifecycle) -> Routing | NotApplicable:
    """Run the windows up to the first step-up block and see which experts its router sends each token to.

    Args:
        model: as `load` returns it.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.

    Returns:
        The routing, or why there is none: no router or none to be seen, no spike, or no FFN block that writes it.

    Raises:
        ValueError: these are not the windows that `life` was found in.
    """
    about = anatomy(model)
    check_windows(life, tokens)
    if (reason := _no_experts(about)) is not None:
        return reason
    block = first_step_up(life)
    if isinstance(block, NotApplicable):
        return block
    layer, channel = block.layer, life.main.channel
    ffns = weights_of(model).experts(layer)
    routed = {name: ffn for name, ffn in ffns.items() if name.isdecimal()}
    if about.router_hooks[layer] is None or not routed:
        return NotApplicable(f"in {block}, the first that steps up, no router's choice of known experts can be seen")
    seen = [_pass_router(model, about, layer, window) for window in progress(tokens, "following the router", "window")]
    h, weight, own = (torch.cat([window[name] for window in seen]) for name in ("h", "weight", "own"))
    if weight.shape[1] != len(routed):
        return NotApplicable(f"the router's hook of this {about.family} model does not show one weight for each expert")
    spiking = is_spike(life, life.main).flatten()
    written = [amplifier.write(ffn, h[spiking])[:, channel] for ffn in routed.values()]
    gain = torch.stack([amplifier.gains(ffn).float() for ffn in routed.values()], dim=1)
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


def _no_experts(about: Anatomy) -> NotApplicable | None:
    if not about.n_experts:
        return NotApplicable("every layer has one FFN, and no router chooses")
    if about.gate_activation is None:
        return NotApplicable(f"the experts of this {about.family} model have no gate")
    return None


def _pass_router(
    model: TransformerBridge, about: Anatomy, layer: int, window: Int[Tensor, " token"]
) -> dict[str, Tensor]:
    """What a layer's router reads of each token, the weight it gives each expert, and what the block writes."""
    reads = f"{about.ffn_norm}.hook_normalized" if about.ffn_norm else "mlp.hook_in"
    names = {
        about.router_hooks[layer]: "weight",
        f"blocks.{layer}.{reads}": "h",
        f"blocks.{layer}.mlp.hook_out": "own",
    }
    seen: dict[str, Tensor] = {}

    def keep(value: Tensor, hook) -> None:
        seen[names[hook.name]] = value.detach().float().cpu().flatten(0, -2)  # some see no windows, only tokens

    with torch.inference_mode(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
        model(window[None].to(model.cfg.device), stop_at_layer=layer + 1)
    return seen
