"""Integers in the place of activations, keys, values and weights, simulated: what is rounded is put back as a float.

A quantizer's *step* is the distance between two of its values: for eight bits, the largest entry that shares it over
127. Where one entry is thousands of times the others, a step is larger than they are, and they are rounded to zero.
"""

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.nn.quantized import dynamic
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import anatomy
from spikesink.patching import Intervention, apply, compare, evaluate, hook
from spikesink.patching.interventions import batches
from spikesink.serving.cache import losses_of
from spikesink.serving.cells import AS_IT_IS, HIDDEN, Crossed, Cuts, Technique, or_as_it_is, shows_ffn

PER = ("tensor", "token", "channel")
# What is multiplied by matrices, layer by layer: the hooks of those that read it.
LINEAR_INPUTS = {
    "attention's input": ("attn.q.hook_in", "attn.k.hook_in", "attn.v.hook_in"),
    "mixed values": ("attn.o.hook_in",),
    "FFN's input": ("mlp.gate.hook_in", "mlp.in.hook_in"),
    "FFN's hidden": (HIDDEN,),
}
CACHED = {"keys": ("attn.k.hook_out",), "values": ("attn.v.hook_out",)}  # keys before RoPE
STREAM = "stream"
PER_TENSOR, PER_TOKEN, PER_CHANNEL = "int8 per tensor", "int8 per token", "int8 per channel"
PER_NAMES = dict(zip((PER_TENSOR, PER_TOKEN, PER_CHANNEL), PER, strict=True))
APART, OTHERS_APART = "int8 per tensor, spike channels apart", "int8 per tensor, as many others apart"
CACHE_NAMES = {"KV cache in int8": 8, "KV cache in int4": 4}
WEIGHTS = {
    "weights in int8 per channel": (8, "channel"),
    "weights in int8 per tensor": (8, "tensor"),
    "weights in int4 per channel": (4, "channel"),
}
SITES = (STREAM, *LINEAR_INPUTS, *CACHED)


@dataclass(frozen=True)
class Quantizer:
    """Symmetric rounding to integers: x becomes step * round(x / step).

    Args:
        bits: of the integers.
        per: what shares a step: each window's "tensor", each "token", or each "channel" of a window.
        split: channels that are left as they are, and out of the range.
        by_head: whether each head of [window, position, head, d_head] has steps of its own, as in a KV cache; what a
            matrix is multiplied by is one vector a token, whichever heads it comes from.
    """

    bits: int = 8
    per: str = "tensor"
    split: tuple[int, ...] = ()
    by_head: bool = False

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
        if x.ndim > 3 and not self.by_head:
            return self(x.flatten(2)).view_as(x)
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
    if site.startswith("FFN") and not shows_ffn(about):
        raise ValueError(f"the {site} of this {about.family} model is not seen token by token.")
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


def not_rounded(model: TransformerBridge) -> list[str]:
    """What matrices are multiplied by and the model does not show, so that it stays as it is."""
    seen = shown(model, LINEAR_INPUTS)
    return [site for site in LINEAR_INPUTS if site not in seen]


@dataclass(frozen=True)
class Range:
    """What passes a site, layer by layer: how large entries of spike tokens are, and of all others."""

    site: str
    spike: Float[Tensor, " layer"]  # the largest of spike tokens
    other: Float[Tensor, " layer"]  # the largest of all other tokens
    median: Float[Tensor, " layer"]  # of all other tokens' entries
    outliers: tuple[tuple[int, ...], ...]  # channels in which a spike token has more than any other token has anywhere
    zeroed: Float[Tensor, " layer"]  # share of other tokens' entries that int8 per tensor rounds to zero
    rest: tuple[tuple[int, ...], ...]  # as many channels, those in which other tokens have most of what is left

    @property
    def touched(self) -> list[int]:
        """Layers in which the range is a spike token's."""
        return (self.spike > self.other).nonzero()[:, 0].tolist()

    def step(self, bits: int = 8) -> Float[Tensor, " layer"]:
        """The step of a quantizer whose range is that of all these windows."""
        return torch.maximum(self.spike, self.other) / Quantizer(bits).most

    def others(self) -> "Range":
        """The same with as many other channels in the outliers' place: their control, which has nothing of the spike's
        range and most of what else there is to gain.
        """
        return replace(self, outliers=self.rest)


@torch.inference_mode()
def ranges(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], where: Bool[Tensor, "window position"]
) -> dict[str, Range]:
    """Measure every site that the model shows, in one pass.

    Args:
        model: as `load` returns it.
        tokens: windows; others than will be judged, where channels are chosen by them.
        where: the windows' spike tokens, as `find_spikes` returns them.
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
            found[site][layer].append((largest.cpu(), of_other.amax(0).cpu(), float(of_other.median()), float(zeroed)))

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
    spike, other, median, zeroed, outliers, rest = [], [], [], [], [], []
    for seen in layers:
        largest, of_other = (torch.stack([one[i] for one in seen]).amax(0) for i in (0, 1))
        apart = largest > of_other.max()
        strongest = of_other[~apart].argsort(descending=True)[: int(apart.sum())]
        spike.append(float(largest.max()))
        other.append(float(of_other.max()))
        median.append(sum(one[2] for one in seen) / len(seen))
        zeroed.append(sum(one[3] for one in seen) / len(seen))
        outliers.append(tuple(apart.nonzero()[:, 0].tolist()))
        rest.append(tuple(sorted((~apart).nonzero()[strongest, 0].tolist())))
    values = map(torch.tensor, (spike, other, median))
    return Range(site, *values, tuple(outliers), torch.tensor(zeroed), tuple(rest))


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
            how = replace(quantizer, split=split, by_head=site in CACHED)
            cuts += [apply(hook(name), how, positions) for name in names]
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


def activations(
    model: TransformerBridge,
    found: Mapping[str, Range],
    where: Bool[Tensor, "window position"],
) -> dict[str, Technique]:
    """The ways to round what matrices are multiplied by, and what is cached, as techniques for `cross`.

    Where the sink is spared, keys and values of spike tokens are not rounded: of what is cached, that is; what matrices
    read has no sink's part to spare, and is looked at with the sink held (`cells.HELD`).

    Args:
        model: as `load` returns it.
        found: as `ranges` returns it.
        where: the spike tokens of the windows to be run.
    """
    inputs = {site: found[site] for site in LINEAR_INPUTS if site in found}
    others = {site: one.others() for site, one in inputs.items()}
    done = {name: Technique(rounded(model, Quantizer(8, per))) for name, per in PER_NAMES.items()}
    for name, apart in ((APART, inputs), (OTHERS_APART, others)) if where.any() else ():
        done[name] = Technique(rounded(model, Quantizer(8, "tensor"), apart=apart), cells=(AS_IT_IS,))
    for name, bits in CACHE_NAMES.items():
        quantizer = Quantizer(bits, "token")
        spared = rounded(model, quantizer, CACHED, positions=~where) if where.any() else None
        done[name] = Technique(rounded(model, quantizer, CACHED), spared)
    return done


def weights(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    of: Mapping[str, Cuts] | NotApplicable,
    crossed: Crossed,
    settings: Mapping[str, tuple[int, str]] = WEIGHTS,
) -> Crossed:
    """Round the layers' matrices, in every cell, beside what else was tried.

    Args:
        model: as `load` returns it.
        tokens: windows.
        of: cells, as `cells` returns them.
        crossed: what was tried on these windows.
        settings: bits and what shares a step, by name.
    """
    with_it, of = {}, or_as_it_is(of)
    for name, (bits, per) in settings.items():
        with rounded_weights(model, bits, per):
            found = compare(model, tokens, of)
        with_it[name] = {cell: found[cell] for cell in of}
    return replace(crossed, with_it={**crossed.with_it, **with_it})


@measure
def beside_integers(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], crossed: Crossed | NotApplicable
) -> pd.DataFrame | NotApplicable:
    """Perplexity with int8 matrices and inputs, as simulated here and as torch computes it with integers."""
    rows = {"as it is": 2 * [crossed.plain[AS_IT_IS].perplexity]}
    for name, per in (("a step a matrix", "tensor"), ("a step an output", "channel")):
        losses = by_torch(model, tokens, per)
        if isinstance(losses, NotApplicable):
            return losses
        with rounded_weights(model, 8, per):
            ours = evaluate(model, tokens, *rounded(model, Quantizer(8, "tensor")))
        rows[f"int8, inputs per tensor, {name}"] = [ours.perplexity, float(losses.mean().exp())]
    return pd.DataFrame.from_dict(rows, orient="index", columns=["simulated", "torch"]).rename_axis("perplexity")


@torch.no_grad()
def by_torch(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], per: str = "tensor"
) -> Float[Tensor, "window position"] | NotApplicable:
    """Losses of a model whose layers multiply integers: torch's dynamic quantization, one range for all inputs.

    Args:
        model: as `load` returns it; a copy of it is rounded.
        tokens: windows.
        per: what of a matrix shares a step, "tensor" or "channel".

    Returns:
        Cross-entropy of the next token, in nats, or why there is none.
    """
    matrices = [module for module in _matrices(model) if type(module) is nn.Linear]
    if not matrices or {(one.weight.dtype, one.weight.device.type) for one in matrices} != {(torch.float32, "cpu")}:
        return NotApplicable("torch multiplies integers in place of float32 matrices on the CPU only")
    how = {"tensor": quantization.default_dynamic_qconfig, "channel": quantization.per_channel_dynamic_qconfig}[per]
    memo: dict[int, Any] = {}
    copied = copy.deepcopy(model.original_model, memo)
    wanted, done = {id(memo[id(one)]) for one in matrices}, {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchao is to take its place
        for module in list(copied.modules()):  # the bridge has each matrix in several places
            for name, child in list(module.named_children()):
                if id(child) in wanted:
                    child.qconfig = how
                    done[id(child)] = done.get(id(child)) or dynamic.Linear.from_float(child)
                    setattr(module, name, done[id(child)])
    # A window at a time, so that a tensor is a window's, as it is here.
    return torch.cat([losses_of(copied(window[None]).logits, window[None, 1:]) for window in tokens])
