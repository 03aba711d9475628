"""Integers in the place of activations, keys, values and weights, simulated: what is rounded is put back as a float.

A quantizer's *step* is the distance between two of its values: for eight bits, the largest entry that shares it over
127. Where one entry is thousands of times the others, a step is larger than they are, and they are rounded to zero.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformer_lens.model_bridge import TransformerBridge

from spikesink.models import anatomy
from spikesink.patching import Intervention, apply, hook
from spikesink.patching.interventions import HEADS, batches
from spikesink.progress import progress
from spikesink.serving.cells import Cuts

PER = ("tensor", "token", "channel")
# What is multiplied by matrices, layer by layer: the hooks of those that read it.
LINEAR_INPUTS = {
    "attention's input": ("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"),
    "mixed values": ("attn.o.hook_in",),
    "FFN's input": ("mlp.gate.hook_in", "mlp.in.hook_in"),
    "FFN's hidden": ("mlp.out.hook_in",),
}
CACHED = {"keys": (HEADS["key"],), "values": (HEADS["value"],)}  # keys before RoPE
STREAM = "stream"
PER_TENSOR, PER_TOKEN, PER_CHANNEL = "int8 per tensor", "int8 per token", "int8 per channel"
APART, OTHERS_APART = "int8 per tensor, spike channels apart", "int8 per tensor, as many others apart"
SITES = (STREAM, *LINEAR_INPUTS, *CACHED)


@dataclass(frozen=True)
class Quantizer:
    """Symmetric rounding to integers: x becomes step * round(x / step).

    Args:
        bits: of the integers.
        per: what shares a step: each window's "tensor", each "token" (of keys and values, each head's), or each
            "channel" of a window.
        split: channels that are left as they are, and out of the range.
    """

    bits: int = 8
    per: str = "tensor"
    split: tuple[int, ...] = ()

    def __post_init__(self):
        if self.per not in PER:
            raise ValueError(f"steps per {self.per!r} are not known; give one of {', '.join(PER)}.")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"{self.bits} bits are no integers to round to; give 2 to 16.")

    @property
    def most(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def step(self, x: Float[Tensor, "window position *part"]) -> Float[Tensor, "window position *part"]:
        """The distance between two values, for each group of entries that share one; it broadcasts against x."""
        size = x.abs()
        if self.split:
            size[..., list(self.split)] = 0
        dims = {"tensor": tuple(range(1, x.ndim)), "token": (-1,), "channel": (1,)}[self.per]
        return (size.amax(dims, keepdim=True) / self.most).clamp(min=torch.finfo(x.dtype).tiny)

    def __call__(self, x: Float[Tensor, "window position *part"]) -> Float[Tensor, "window position *part"]:
        """What is left of x."""
        step = self.step(x)
        rounded = (x / step).round().clamp(-self.most, self.most) * step
        if self.split:
            channels = list(self.split)
            rounded[..., channels] = x[..., channels]
        return rounded

    def __str__(self) -> str:
        split = f", {len(self.split)} channels apart" if self.split else ""
        return f"int{self.bits} per {self.per}{split}"

    @property
    def __name__(self) -> str:
        return str(self)


def hooks_of(model: TransformerBridge, site: str) -> list[tuple[str, ...]]:
    """The hooks that carry a site, layer by layer; the stream is met where it enters a layer.

    Raises:
        ValueError: no such site, or the model does not show it.
    """
    about = anatomy(model)
    if site == STREAM:
        return [(name,) for name in about.layer_hooks[: about.n_layers]]
    if site not in SITES:
        raise ValueError(f"there is no site {site!r}; give one of {', '.join(SITES)}.")
    names = (LINEAR_INPUTS | CACHED)[site]
    layers = range(about.n_layers)
    found = [tuple(n for n in (f"blocks.{i}.{name}" for name in names) if n in model.hook_dict) for i in layers]
    if not all(found):
        raise ValueError(f"the {site} of this {about.family} model cannot be seen in every layer.")
    return found


def shown(model: TransformerBridge, sites: Iterable[str] = SITES) -> list[str]:
    """Those sites that the model shows."""
    found = []
    for site in sites:
        try:
            hooks_of(model, site)
        except ValueError:
            continue
        found.append(site)
    return found


@dataclass(frozen=True)
class Range:
    """What passes a site, layer by layer: how large entries of spike tokens are, and of all others."""

    site: str
    spike: Float[Tensor, " layer"]  # the largest of spike tokens
    other: Float[Tensor, " layer"]  # the largest of all other tokens
    median: Float[Tensor, " layer"]  # of all other tokens' entries
    outliers: tuple[tuple[int, ...], ...]  # channels in which a spike token has more than any other token has anywhere
    zeroed: Float[Tensor, " layer"]  # share of other tokens' entries that int8 per tensor rounds to zero
    n_channels: int

    @property
    def touched(self) -> list[int]:
        """Layers in which the range is a spike token's."""
        return (self.spike > self.other).nonzero()[:, 0].tolist()

    def step(self, bits: int = 8) -> Float[Tensor, " layer"]:
        """The step of a quantizer whose range is that of all these windows."""
        return torch.maximum(self.spike, self.other) / Quantizer(bits).most

    def others(self, seed: int = 0) -> "Range":
        """The same with as many other channels, drawn at random, in the outliers' place: their control."""
        generator, drawn = torch.Generator().manual_seed(seed), []
        for outliers in self.outliers:
            free = [c for c in range(self.n_channels) if c not in outliers]
            order = torch.randperm(len(free), generator=generator)[: len(outliers)]
            drawn.append(tuple(sorted(free[i] for i in order.tolist())))
        return replace(self, outliers=tuple(drawn))


@torch.inference_mode()
def ranges(
    model: TransformerBridge, where: Bool[Tensor, "window position"], tokens: Int[Tensor, "n length"]
) -> dict[str, Range]:
    """Measure every site that the model shows, in one pass.

    Args:
        model: as `load` returns it.
        where: the windows' spike tokens, as `find_spikes` returns them.
        tokens: windows.
    """
    sites = shown(model)
    found: dict[str, list[list[tuple]]] = {site: [[] for _ in hooks_of(model, site)] for site in sites}

    def watching(site: str, layer: int, rows: range):
        def watch(value, hook):
            x = value.flatten(2) if value.ndim > 3 else value
            spike = where[rows.start : rows.stop].to(x.device)
            size = x.abs().float()
            of_spike, of_other = size[spike], size[~spike]
            zeroed = (Quantizer()(x)[~spike] == 0).float().mean()
            none = size.new_zeros(size.shape[-1])
            largest = of_spike.amax(0) if len(of_spike) else none
            found[site][layer].append((largest.cpu(), float(of_other.amax()), float(of_other.median()), float(zeroed)))

        return watch

    for rows in progress(batches(anatomy(model), tokens), "ranges", "batch"):
        watches = [
            (names[0], watching(site, layer, rows))
            for site in sites
            for layer, names in enumerate(hooks_of(model, site))
        ]
        with model.hooks(fwd_hooks=watches):
            model(tokens[rows.start : rows.stop].to(model.cfg.device))
    return {site: _joined(site, layers) for site, layers in found.items()}


def _joined(site: str, layers: list[list[tuple]]) -> Range:
    spike, other, median, outliers, zeroed = [], [], [], [], []
    for seen in layers:
        largest = torch.stack([one[0] for one in seen]).amax(0)
        most = max(one[1] for one in seen)
        spike.append(float(largest.max()))
        other.append(most)
        median.append(sum(one[2] for one in seen) / len(seen))
        zeroed.append(sum(one[3] for one in seen) / len(seen))
        outliers.append(tuple((largest > most).nonzero()[:, 0].tolist()))
    values = map(torch.tensor, (spike, other, median))
    return Range(site, *values, tuple(outliers), torch.tensor(zeroed), len(layers[0][0][0]))


def rounded(
    model: TransformerBridge,
    quantizer: Quantizer,
    sites: Iterable[str] = tuple(LINEAR_INPUTS),
    apart: Mapping[str, Range] | None = None,
    positions: Bool[Tensor, "window position"] | None = None,
) -> tuple[Intervention, ...]:
    """Interventions that round activations wherever they pass a site.

    Args:
        model: as `load` returns it.
        quantizer: how.
        sites: of `SITES`; those that the model does not show are left out.
        apart: ranges by site; their outlier channels are left as they are, and out of the range.
        positions: the tokens that are rounded; all by default. Steps must then be per token.

    Raises:
        ValueError: some positions only, and steps that tokens share.
    """
    if positions is not None and quantizer.per != "token":
        raise ValueError(f"steps per {quantizer.per} are shared by all tokens; give per='token' to round some only.")
    cuts = []
    for site in shown(model, sites):
        for layer, names in enumerate(hooks_of(model, site)):
            split = apart[site].outliers[layer] if apart is not None and site in apart else quantizer.split
            cuts += [apply(hook(name), replace(quantizer, split=split), positions) for name in names]
    return tuple(cuts)


@contextmanager
def rounded_weights(model: TransformerBridge, bits: int = 8, per: str = "channel") -> Iterator[None]:
    """Round the matrices of all layers while the context lasts; a channel is what one output is computed from."""
    quantizer = Quantizer(bits, {"channel": "token", "tensor": "tensor"}.get(per, per))
    kept = []
    try:
        for module in _matrices(model):
            kept.append((module, module.weight.data))
            rows = module.weight.data if isinstance(module, nn.Linear) else module.weight.data.T  # Conv1D: [in, out]
            new = quantizer(rows[None])[0]
            module.weight.data = new if isinstance(module, nn.Linear) else new.T
        yield
    finally:
        for module, weight in kept:
            module.weight.data = weight


def _matrices(model: TransformerBridge) -> list[nn.Module]:
    """The modules of the layers that multiply by a matrix, each once."""
    seen = {}
    for block in model.blocks:
        for module in block.modules():
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                seen[id(module)] = module
    return list(seen.values())


def activations(model: TransformerBridge, found: Mapping[str, Range], seed: int = 0) -> dict[str, Cuts]:
    """The ways to round what matrices are multiplied by, as techniques for `cross`.

    Args:
        model: as `load` returns it.
        found: as `ranges` returns it.
        seed: of the channels that are drawn as a control.
    """
    inputs = {site: found[site] for site in LINEAR_INPUTS if site in found}
    others = {site: one.others(seed) for site, one in inputs.items()}
    return {
        PER_TENSOR: rounded(model, Quantizer(8, "tensor")),
        PER_TOKEN: rounded(model, Quantizer(8, "token")),
        PER_CHANNEL: rounded(model, Quantizer(8, "channel")),
        APART: rounded(model, Quantizer(8, "tensor"), apart=inputs),
        OTHERS_APART: rounded(model, Quantizer(8, "tensor"), apart=others),
    }
