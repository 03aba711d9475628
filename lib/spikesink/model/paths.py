"""The two paths of a token up to a block: alone in its window, and after a text.

Alone, softmax runs over one key and is 1, so attention is the map h~ -> W_O W_V h~ plus biases: `static_path` computes
it from the weights, without attention scores. After a text it takes whole forward passes.
"""

from collections.abc import Callable
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import measure, progress
from spikesink.model.anatomy import Anatomy, check_vocabulary, normalise
from spikesink.model.weights import Weights, require_static_map

BATCH = 2048  # tokens at a time: as fast as any on the machines tried, and small beside the stream of a vocabulary

Watch = Callable[[int, slice, Float[Tensor, "token d_model"]], None]  # point, which tokens, their stream


@measure
@torch.inference_mode()
def static_path(
    weights: Weights,
    tokens: Int[Tensor, " token"],
    last: int,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    watch: Watch | None = None,
) -> Float[Tensor, "token d_model"]:
    """The residual stream after block `last` (0: the embedding), of tokens that each stand at position 0 of a window.

    Each layer's weights are needed once. Products are computed in `dtype` on `device`; the stream stays in float32.
    `watch` is called as watch(point, which tokens, their stream) at the embedding and after every block.

    Raises:
        ValueError: the model has no such block, or no such token.
        FloatingPointError: a weight is not finite, or the stream overflows.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"a static path is one of weights, not of a {type(weights).__name__}; give weights_of(model).")
    require_static_map(weights.anatomy)
    if last != 0:
        check_block(last, weights.anatomy)
    check_flat_ids(weights, tokens)
    x = weights.embed(tokens).to(device)  # all at once: an embedding that is on disk is read for every call
    for part in batches(len(tokens)) if watch else ():
        watch(0, part, x[part])
    for layer in progress(range((last + 1) // 2), "following the static path", "layer"):
        through_layer(weights, layer, x, last, dtype, watch)
    return x


def batches(n: int) -> list[slice]:
    """BATCH tokens at a time."""
    return [slice(i, i + BATCH) for i in range(0, n, BATCH)]


@torch.inference_mode()
def through_layer(
    weights: Weights,
    layer: int,
    x: Float[Tensor, "token d_model"],
    last: int | None = None,
    dtype: torch.dtype = torch.float32,
    watch: Watch | None = None,
) -> None:
    """Send tokens that stand at position 0 through one layer, in place: x, float32, what enters it, then what leaves.

    `last` is the last block to run, by default the layer's FFN; `dtype` and `watch` as for `static_path`.
    """
    watch = watch or (lambda point, part, stream: None)
    attend = attend_alone(weights, layer, dtype, x.device)
    feed = _feed(weights, layer, dtype, x.device) if last is None or 2 * layer + 2 <= last else None
    for part in batches(len(x)):
        here = x[part]
        entered = here.clone() if weights.anatomy.parallel else here
        attend(here, here)
        watch(2 * layer + 1, part, here)
        if feed is not None:
            feed(entered, here)
            watch(2 * layer + 2, part, here)
    if not x.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        advice = "get the model again" if dtype == torch.float32 else "use float32"
        raise FloatingPointError(f"the static path is not finite after layer {layer} in {name}; {advice}.")


def check_block(number: int, anatomy: Anatomy) -> None:
    """Raise ValueError unless the model has this block, counted from 1."""
    if not isinstance(number, Integral) or not 0 < number <= anatomy.n_blocks:
        raise ValueError(f"block {number!r} does not exist; this model has blocks 1 to {anatomy.n_blocks}.")


def check_flat_ids(model: TransformerBridge | Weights, tokens: Int[Tensor, " token"]) -> None:
    """Raise ValueError unless these are ids [n] of a model's own tokens."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError("tokens must be a one-dimensional tensor of token ids, and not empty.")
    check_vocabulary(model, tokens)


def attend_alone(weights: Weights, layer: int, dtype: torch.dtype, device) -> Callable[[Tensor, Tensor], None]:
    """A function of (x, into) that adds W_O W_V h~ and the biases, h~ of the stream x, to the stream `into`."""
    attention, norm = weights.attention(layer), weights.anatomy.attention_norm
    value, out = (t.to(device, dtype) for t in (attention.value, attention.out))
    bias = attention.bias.to(device)

    def attend(x: Tensor, into: Tensor) -> None:
        h = x if norm is None else normalise(x, weights.anatomy)
        _add(into, functional.linear(h.to(dtype), value), out, bias, attention.post_scale, weights.anatomy)

    return attend


def _feed(weights: Weights, layer: int, dtype: torch.dtype, device) -> Callable[[Tensor, Tensor], None]:
    """The same of a layer's FFN."""
    if not weights.anatomy.one_gated_ffn:
        return _feed_through(weights, layer)
    ffn, norm = weights.ffn(layer), weights.anatomy.ffn_norm
    gate, up, down = (t.to(device, dtype) for t in (ffn.gate, ffn.up, ffn.down))
    gate_bias, up_bias = (t.to(device, dtype) if t.any() else None for t in (ffn.gate_bias, ffn.up_bias))
    bias = (torch.zeros(len(down)) if ffn.down_bias is None else ffn.down_bias).to(device)

    def feed(x: Tensor, into: Tensor) -> None:
        h = (x if norm is None else normalise(x, weights.anatomy)).to(dtype)
        hidden = ffn.activation(functional.linear(h, gate, gate_bias)).mul_(functional.linear(h, up, up_bias))
        _add(into, hidden, down, bias, ffn.post_scale, weights.anatomy)

    return feed


def _feed_through(weights: Weights, layer: int) -> Callable[[Tensor, Tensor], None]:
    """The same by the model's own modules, where the FFN is not one gated FFN."""
    names = (weights.anatomy.ffn_norm, "mlp", "ln2_post")

    def feed(x: Tensor, into: Tensor) -> None:
        with weights.block(layer, *names) as modules:
            parts, like = dict(modules.named_children()), next(modules.mlp.parameters())
            h = x[:, None].to(like.device, like.dtype)
            for name in filter(parts.__contains__, names):
                h = parts[name](h)
                h = h[0] if isinstance(h, tuple) else h  # some experts return their router's choice as well
        into.add_(h[:, 0].to(into.device, into.dtype), alpha=weights.anatomy.residual_multiplier)

    return feed


def _add(
    into: Tensor, hidden: Tensor, matrix: Tensor, bias: Tensor, post_scale: Tensor | None, anatomy: Anatomy
) -> None:
    """Add matrix @ hidden + bias, through the block's output norm where it has one, to the stream."""
    write = functional.linear(hidden, matrix).float().add_(bias)
    if post_scale is not None:
        write = normalise(write, anatomy) * post_scale.to(write.device)
    into.add_(write, alpha=anatomy.residual_multiplier)


@torch.inference_mode()
def after_text(
    model: TransformerBridge, tokens: Int[Tensor, " token"], before: Int[Tensor, "token position"], last: int
) -> Float[Tensor, "point token d_model"]:
    """The stream from the embedding to block `last`, of tokens that each stand after a text of their own, in `before`.

    By whole forward passes; no columns in `before` for nothing.

    Raises:
        ValueError: the model has no such block, or no such token.
    """
    anatomy = model.anatomy
    check_block(last, anatomy)
    check_flat_ids(model, tokens)
    windows, n_layers = torch.cat([before, tokens[:, None]], dim=1), (last + 1) // 2
    entering, writes = anatomy.layer_hooks[:n_layers], anatomy.write_hooks[: 2 * n_layers]
    parts = []
    for part in windows.split(max(1, BATCH // windows.shape[1])):
        _, cache = model.run_with_cache(
            part.to(model.cfg.device), names_filter=[*entering, *writes], stop_at_layer=n_layers, pos_slice=-1
        )
        passed = {name: values[:, -1].float().cpu() for name, values in cache.items()}
        points = []
        for layer, name in enumerate(entering):
            points += [passed[name], passed[name] + passed[writes[2 * layer]]]
        parts.append(torch.stack([*points, points[-1] + passed[writes[-1]]])[: last + 1])
    return torch.cat(parts, dim=1)


def prefixes(windows: Int[Tensor, "n length"], n: int, position: int) -> Int[Tensor, "n position"]:
    """What stands before a position in n windows, one window after another, over and over.

    Raises:
        ValueError: the windows are shorter than that, or it is no whole number.
    """
    if not isinstance(position, Integral) or not 0 <= position < windows.shape[1]:
        raise ValueError(f"position {position} is not in windows of {windows.shape[1]} tokens.")
    return windows[torch.arange(n) % len(windows), :position]
