"""One layer, of tokens that each see themselves alone: computed from its weights, without attention scores.

Softmax over one key is 1, so attention is the map h~ -> W_O W_V h~ plus biases, whatever the queries and keys are.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from spikesink.model.anatomy import Anatomy, normalise
from spikesink.model.weights import Weights

BATCH = 2048  # tokens at a time: as fast as any on the machines tried, and small beside the stream of a vocabulary

Watch = Callable[[int, slice, Float[Tensor, "token d_model"]], None]  # point, which tokens, their stream
Write = Callable[[Float[Tensor, "token d_model"]], Float[Tensor, "token d_model"]]  # of the stream, what a block adds


def batches(x: Tensor) -> list[slice]:
    """The tokens of a stream, BATCH at a time."""
    return [slice(i, i + BATCH) for i in range(0, len(x), BATCH)]


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
    attend = attend_alone(weights, layer, dtype)
    feed = feed_alone(weights, layer, dtype) if last is None or 2 * layer + 2 <= last else None
    scale = weights.anatomy.residual_multiplier
    for part in batches(x):
        here = x[part]
        entered = here.clone() if weights.anatomy.parallel else here
        here.add_(attend(here), alpha=scale)
        watch(2 * layer + 1, part, here)
        if feed is not None:
            here.add_(feed(entered), alpha=scale)
            watch(2 * layer + 2, part, here)
    if not x.isfinite().all():
        name = str(dtype).removeprefix("torch.")
        advice = "get the model again" if dtype == torch.float32 else "use float32"
        raise FloatingPointError(f"the static path is not finite after layer {layer} in {name}; {advice}.")


def attend_alone(weights: Weights, layer: int, dtype: torch.dtype = torch.float32) -> Write:
    """What a layer's attention computes of a stream whose tokens each see themselves alone: W_O W_V h~ and the biases.

    Before the residual multiplier, where a family has one.
    """
    attention, anatomy = weights.attention(layer), weights.anatomy
    value, out = attention.value.to(dtype), attention.out.to(dtype)

    def attend(x: Tensor) -> Tensor:
        h = x if anatomy.attention_norm is None else normalise(x, anatomy)
        write = functional.linear(functional.linear(h.to(dtype), value), out).float() + attention.bias
        return _through_norm(write, attention.post_scale, anatomy)

    return attend


def feed_alone(weights: Weights, layer: int, dtype: torch.dtype) -> Write:
    """What a layer's FFN computes of a stream, before the residual multiplier."""
    anatomy = weights.anatomy
    if not anatomy.one_gated_ffn:
        return _feed_by_modules(weights, layer)
    ffn = weights.ffn(layer)
    low = ffn.to(dtype)

    def feed(x: Tensor) -> Tensor:
        h = (x if anatomy.ffn_norm is None else normalise(x, anatomy)).to(dtype)
        hidden = low.activation(functional.linear(h, low.gate, low.gate_bias))
        write = functional.linear(hidden.mul_(functional.linear(h, low.up, low.up_bias)), low.down).float()
        write = write if ffn.down_bias is None else write + ffn.down_bias
        return _through_norm(write, ffn.post_scale, anatomy)

    return feed


def _feed_by_modules(weights: Weights, layer: int) -> Write:
    """The same by the model's own modules, where the FFN is not one gated FFN."""
    names = (weights.anatomy.ffn_norm, "mlp", "ln2_post")

    def feed(x: Tensor) -> Tensor:
        with weights.block(layer, *names) as modules:
            parts, like = dict(modules.named_children()), next(modules.mlp.parameters())
            h = x[:, None].to(like.device, like.dtype)
            for name in filter(parts.__contains__, names):
                h = parts[name](h)
                h = h[0] if isinstance(h, tuple) else h  # some experts return their router's choice as well
        return h[:, 0].to(x.device, x.dtype)

    return feed


def _through_norm(write: Tensor, post_scale: Tensor | None, anatomy: Anatomy) -> Tensor:
    """What a block writes: through its output norm, where it has one."""
    return write if post_scale is None else normalise(write, anatomy) * post_scale
