"""Quantization, simulated: activations, keys, values and weights are rounded to integers and put back as floats.

A quantizer's *step* is the distance between two of its values: in int8, the largest entry that shares it over 127.
Where one entry is thousands of times the others, they are smaller than half a step and become zero.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from spikesink.common import measure, progress
from spikesink.model.anatomy import Model
from spikesink.model.placement import is_offloaded
from spikesink.patching import Intervention, apply, compare, hook
from spikesink.patching.interventions import batches
from spikesink.serving.cells import HIDDEN, UNCHANGED, Cells, Crossed, Technique, shows_ffn

# What can be rounded: its role, and by which hooks it is read in each layer. The stream is met where it enters a layer.
SITES: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "stream": ("read through a norm", ()),
    "attention input": ("multiplied", ("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in")),
    "head outputs": ("multiplied", ("attn.o.hook_in",)),
    "FFN input": ("multiplied", ("mlp.gate.hook_in", "mlp.in.hook_in")),
    "FFN hidden": ("multiplied", (HIDDEN,)),
    "keys": ("cached", ("attn.k.hook_out",)),  # before RoPE
    "values": ("cached", ("attn.v.hook_out",)),
}
INPUTS = tuple(site for site, (role, _) in SITES.items() if role == "multiplied")  # what matrices multiply
CACHED = tuple(site for site, (role, _) in SITES.items() if role == "cached")

NOT_SHOWN = "this model does not show in every layer what its matrices multiply"

DIMS = {"tensor": (1, 2), "token": (-1,), "channel": (1,)}  # of [window, position, channel]: what shares a step
PER_TENSOR, PER_TOKEN, PER_CHANNEL = "int8 per-tensor", "int8 per-token", "int8 per-channel"
APART, OTHERS_APART = "int8 per-tensor, spike channels unrounded", "int8 per-tensor, other channels unrounded"
KV_BITS = {"int8 KV cache": 8, "int4 KV cache": 4}
WEIGHTS = {
    "int8 weights, per-channel": (8, "channel"),
    "int8 weights, per-tensor": (8, "tensor"),
    "int4 weights, per-channel": (4, "channel"),
}
Activations = Float[Tensor, "window position *part"]


@dataclass(frozen=True)
class Quantizer:
    """Symmetric rounding to integers: x becomes step * round(x / step)."""

    bits: int = 8
    per: str = "tensor"  # what shares a step: each window's "tensor", each "token", or each "channel" of a window
    split: tuple[int, ...] = ()  # channels that are not rounded, and do not count for the step
    # Whether each head of [window, position, head, d_head] has its own steps, as in a KV cache. What a matrix
    # multiplies is one vector a token, whichever heads it comes from.
    by_head: bool = False

    def __post_init__(self):
        if self.per not in DIMS:
            raise ValueError(f"there are no steps per {self.per!r}; give one of {', '.join(DIMS)}.")
        if not 2 <= self.bits <= 16:
            raise ValueError(f"cannot round to integers of {self.bits} bits; give 2 to 16.")

    @property
    def most(self) -> int:
        """The largest integer."""
        return 2 ** (self.bits - 1) - 1

    def step(self, x: Activations) -> Float[Tensor, "..."]:
        """The distance between two values, for each group of entries that share one; it broadcasts against x."""
        size = x.abs()
        size[..., list(self.split)] = 0
        dims = tuple(range(1, x.ndim)) if self.per == "tensor" else DIMS[self.per]
        return (size.amax(dims, keepdim=True) / self.most).clamp(min=torch.finfo(x.dtype).tiny)

    def __call__(self, x: Activations) -> Activations:
        """x, rounded."""
        if x.ndim > 3 and not self.by_head:
            return self(x.flatten(2)).view_as(x)
        step = self.step(x)
        rounded = (x / step).round().clamp(-self.most, self.most) * step
        rounded[..., list(self.split)] = x[..., list(self.split)]
        return rounded

    def __str__(self) -> str:
        split = f", {len(self.split)} channels unrounded" if self.split else ""
        return f"int{self.bits} per-{self.per}{split}"

    @property
    def __name__(self) -> str:
        return str(self)


def shown_sites(model: Model) -> dict[str, list[tuple[str, ...]]]:
    """The hooks of each of SITES that the model shows, layer by layer; what passes inside experts is not shown."""
    shown, anatomy = {}, model.anatomy
    for site, (_, ends) in SITES.items():
        layers = [tuple(f"blocks.{i}.{end}" for end in ends) for i in range(anatomy.n_layers)]
        layers = [tuple(name for name in names if name in model.hook_dict) for names in layers]
        if site == "stream":
            layers = [(name,) for name in anatomy.layer_hooks[:-1]]
        if all(layers) and (shows_ffn(anatomy) or not site.startswith("FFN")):
            shown[site] = layers
    return shown


def not_rounded(model: Model) -> dict[str, str]:
    """What no technique here rounds in this model, and why: what matrices multiply, what is cached, and weights."""
    shown = shown_sites(model)
    hidden = {site: "this model does not show it in every layer" for site in (*INPUTS, *CACHED) if site not in shown}
    if is_offloaded(model):
        return {**hidden, "weights": "some are on disk; load the model into memory"}
    fused = model.anatomy.n_experts and any(p.ndim > 2 for block in model.blocks for p in block.parameters())
    return {**hidden, "weights": "the matrices of this model's experts are in one array"} if fused else hidden


@dataclass(frozen=True)
class Range:
    """How large the entries at a site are, layer by layer: those of spike tokens, and all others."""

    spike: Float[Tensor, " layer"]  # the largest of spike tokens
    other: Float[Tensor, " layer"]  # the largest of all other tokens
    median: Float[Tensor, " layer"]  # of all other tokens' entries
    zeroed: Float[Tensor, " layer"]  # share of other tokens' entries that int8 per-tensor rounds to zero
    outliers: tuple[tuple[int, ...], ...]  # channels in which a spike token has more than any other token has anywhere
    others: tuple[tuple[int, ...], ...]  # equally many channels, those in which other tokens have most: the control

    @property
    def set_by_spike(self) -> list[int]:
        """Layers in which a spike token has the largest entry."""
        return (self.spike > self.other).nonzero()[:, 0].tolist()

    def step(self, bits: int = 8) -> Float[Tensor, " layer"]:
        """The step of a quantizer whose range is that of all these windows."""
        return torch.maximum(self.spike, self.other) / Quantizer(bits).most


@torch.inference_mode()
def measure_ranges(
    model: Model, tokens: Int[Tensor, "window position"], where: Bool[Tensor, "window position"]
) -> dict[str, Range]:
    """Measure the range of every site that the model shows, in one pass over windows that are then not judged."""
    shown = shown_sites(model)
    hooks = [names[0] for layers in shown.values() for names in layers]
    entries = {name: [] for name in hooks}
    for rows in progress(batches(model.anatomy, tokens), "ranges", "batch"):
        batch, spike = tokens[rows.start : rows.stop], where[rows.start : rows.stop]
        _, activations = model.run_with_cache(batch.to(model.cfg.device), names_filter=hooks)
        for name in hooks:
            entries[name].append(_measure_entries(activations[name].flatten(2).cpu(), spike))
    ranges = {}
    for site, layers in shown.items():
        *numbers, outliers, others = zip(*(_join(entries[names[0]]) for names in layers), strict=True)
        ranges[site] = Range(*map(torch.tensor, numbers), outliers, others)
    return ranges


def _measure_entries(x: Float[Tensor, "window position channel"], spike: Bool[Tensor, "window position"]) -> tuple:
    """The largest entry by channel of spike tokens and of others; the others' median, and their share of zeros."""
    size = x.abs().float()
    largest = torch.where(spike[..., None], size, 0).amax((0, 1))
    zeroed = (Quantizer()(x)[~spike] == 0).float().mean()
    return largest, size[~spike].amax(0), size[~spike].median(), zeroed


def _join(batched: list[tuple]) -> tuple:
    """What a Range holds of one layer, from its batches."""
    spike, other, median, zeroed = (torch.stack(column) for column in zip(*batched, strict=True))
    spike, other = spike.amax(0), other.amax(0)  # by channel
    apart = spike > other.max()
    controls = other.masked_fill(apart, -1).argsort(descending=True)[: min(int(apart.sum()), int((~apart).sum()))]
    numbers = (float(x) for x in (spike.max(), other.max(), median.mean(), zeroed.mean()))
    return *numbers, tuple(apart.nonzero()[:, 0].tolist()), tuple(sorted(controls.tolist()))


def round_activations(
    model: Model,
    quantizer: Quantizer,
    sites: Iterable[str] = INPUTS,
    split: Mapping[str, Sequence[tuple[int, ...]]] | None = None,
    positions: Bool[Tensor, "window position"] | None = None,
) -> tuple[Intervention, ...]:
    """Interventions that round activations wherever they pass a site; without those that the model does not show.

    `split` are channels, by site and layer, that are not rounded and do not count for the step; `positions` the tokens
    that are rounded, if not all: steps must then be per-token.
    """
    if unknown := [site for site in sites if site not in SITES]:
        raise ValueError(f"there is no site {unknown[0]!r}; give one of {', '.join(SITES)}.")
    if positions is not None and quantizer.per != "token":
        raise ValueError(f"all tokens share a step per {quantizer.per}; give per='token' to round some only.")
    cuts, shown = [], shown_sites(model)
    for site in sites:
        for layer, names in enumerate(shown.get(site, ())):
            channels = split[site][layer] if split and site in split else quantizer.split
            here = replace(quantizer, split=channels, by_head=site in CACHED)
            cuts += [apply(hook(name), here, positions) for name in names]
    return tuple(cuts)


@contextmanager
def rounded_weights(model: Model, bits: int = 8, per: str = "channel") -> Iterator[None]:
    """Round the matrices of all layers while the context lasts; a channel is what one output is computed from."""
    quantizer = Quantizer(bits, {"channel": "token"}.get(per, per))
    kept = [(module, module.weight.data) for module in _matrices(model)]
    try:
        for module, weight in kept:
            linear = isinstance(module, nn.Linear)
            rounded = quantizer((weight if linear else weight.T)[None])[0]  # Conv1D: [in, out]
            module.weight.data = rounded if linear else rounded.T
        yield
    finally:
        for module, weight in kept:
            module.weight.data = weight


def _matrices(model: Model) -> list[nn.Module]:
    """The modules of the layers that multiply by a matrix, each once."""
    modules = [module for block in model.blocks for module in block.modules()]
    return list({id(m): m for m in modules if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}.values())


def rounding_techniques(
    model: Model, ranges: Mapping[str, Range], where: Bool[Tensor, "window position"]
) -> dict[str, Technique]:
    """The ways to round what matrices multiply, and what is cached, as techniques for `cross`.

    With the sink exempt, the cached keys and values of the spike tokens (`where`, of the windows to be run) are not
    rounded. What matrices multiply has no sink's part that could be exempt. Without those that would round nothing.
    """
    techniques, left = {}, not_rounded(model)
    multiplied, cached = (not set(sites) <= set(left) for sites in (INPUTS, CACHED))
    per = {PER_TENSOR: "tensor", PER_TOKEN: "token", PER_CHANNEL: "channel"}
    for name, shared in per.items() if multiplied else ():
        techniques[name] = Technique(round_activations(model, Quantizer(8, shared)))
    if multiplied and where.any():
        for name, field in ((APART, "outliers"), (OTHERS_APART, "others")):
            split = {site: getattr(ranges[site], field) for site in INPUTS if site in ranges}
            techniques[name] = Technique(round_activations(model, Quantizer(), split=split), cells=(UNCHANGED,))
    for name, bits in KV_BITS.items() if cached else ():
        quantizer = Quantizer(bits, "token")
        exempt = round_activations(model, quantizer, CACHED, positions=~where) if where.any() else None
        techniques[name] = Technique(round_activations(model, quantizer, CACHED), exempt)
    return techniques


@measure
def cross_weights(
    model: Model,
    tokens: Int[Tensor, "window position"],
    cells: Cells,
    crossed: Crossed,
    settings: Mapping[str, tuple[int, str]] = WEIGHTS,
) -> Crossed:
    """Round the layers' matrices in every cell, and add that to what was tried on the same windows, if it can be."""
    if "weights" in not_rounded(model):
        return crossed
    with_it = dict(crossed.with_it)
    for name, (bits, per) in settings.items():
        with rounded_weights(model, bits, per):
            outcomes = compare(model, tokens, cells.cuts)
        with_it[name] = {cell: outcomes[cell] for cell in cells.cuts}
    return replace(crossed, with_it=with_it)
