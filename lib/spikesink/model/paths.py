"""The two paths of a token up to a block: alone in its window, and after a text.

Alone, softmax runs over one key and is 1, so attention is the map h~ -> W_O W_V h~ plus biases: `static_path` computes
it from the weights, without attention scores. After a text it takes whole forward passes.
"""

from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikesink.common import NotApplicable, measure, progress
from spikesink.model.alone import BATCH, Watch, attend_alone, batches, through_layer
from spikesink.model.anatomy import Anatomy, Model, check_tokens, check_vocabulary, not_finite
from spikesink.model.proof import STATIC_PATH, require
from spikesink.model.weights import Weights, require_projections, weights_of


@measure
@torch.inference_mode()
def static_path(
    weights: Weights,
    tokens: Int[Tensor, " token"],
    last: int,
    dtype: torch.dtype = torch.float32,
    watch: Watch | None = None,
) -> Float[Tensor, "token d_model"]:
    """The residual stream after block `last` (0: the embedding), of tokens that each stand at position 0 of a window.

    Each layer's weights are needed once. Products are computed in `dtype`, the stream stays in float32. `watch` is
    called as watch(point, which tokens, their stream) at the embedding and after every block.
    """
    if not isinstance(weights, Weights):
        raise ValueError(f"a static path is one of weights, not of a {type(weights).__name__}; give weights_of(model).")
    require(weights, *STATIC_PATH)
    if last != 0:
        _check_block(weights.anatomy, last)
    check_flat_ids(weights, tokens)
    x = weights.embed(tokens)  # all at once: an embedding that is on disk is read for every call
    for part in batches(x) if watch else ():
        watch(0, part, x[part])
    for layer in progress(range((last + 1) // 2), "following the static path", "layer"):
        through_layer(weights, layer, x, last, dtype, watch)
    return x


def _check_block(anatomy: Anatomy, number: int) -> None:
    if not isinstance(number, Integral) or not 0 < number <= anatomy.n_blocks:
        raise ValueError(f"block {number!r} does not exist; this model has blocks 1 to {anatomy.n_blocks}.")


def check_flat_ids(model: Model, tokens: Int[Tensor, " token"]) -> None:
    """Raise ValueError unless these are ids [n] of a model's own tokens."""
    if not isinstance(tokens, Tensor) or tokens.ndim != 1 or tokens.is_floating_point() or not tokens.numel():
        raise ValueError("tokens must be a one-dimensional tensor of token ids, and not empty.")
    check_vocabulary(model, tokens)


@dataclass(frozen=True)
class StaticMap:
    """Attention's write against W_O W_V h~ and the biases: largest difference over the write's largest entry."""

    at_first: Float[Tensor, "layer window"]  # at position 0
    later: Float[Tensor, "layer window position"]


@measure
@torch.inference_mode()
def compare_static_map(model: Model, tokens: Int[Tensor, "n length"], length: int = 16) -> StaticMap:
    """Compare what attention writes in the first `length` positions with the map that holds at position 0.

    In bfloat16 and float16 rounding alone is larger than the tolerance, so they are not asked.
    """
    weights, anatomy = weights_of(model), model.anatomy
    check_tokens(model, tokens)
    require_projections(anatomy)
    anatomy.require_attention()
    if model.cfg.dtype != torch.float32:
        raise NotApplicable(f"the model runs in {model.cfg.dtype}, whose rounding hides the difference; use float32")
    names = [*anatomy.layer_hooks[:-1], *anatomy.write_hooks[::2]]
    _, cache = model.run_with_cache(
        tokens[:, :length].to(model.cfg.device), names_filter=names, stop_at_layer=anatomy.n_layers
    )
    passed = {name: values.float().cpu() for name, values in cache.items()}
    if not all(values.isfinite().all() for values in passed.values()):
        raise FloatingPointError(not_finite(model, "the residual stream or what attention adds to it"))
    errors = []
    for layer in range(anatomy.n_layers):
        entered, wrote = passed[anatomy.layer_hooks[layer]], passed[anatomy.write_hooks[2 * layer]]
        mapped = attend_alone(weights, layer)(entered) * anatomy.residual_multiplier
        errors.append((mapped - wrote).abs().amax(-1) / wrote.abs().amax(-1))  # window, position
    error = torch.stack(errors)
    return StaticMap(error[..., 0], error[..., 1:])


@torch.inference_mode()
def after_text(
    model: Model, tokens: Int[Tensor, " token"], before: Int[Tensor, "token position"], last: int
) -> Float[Tensor, "point token d_model"]:
    """The stream from the embedding to block `last`, of tokens that each stand after a text of their own, in `before`.

    By whole forward passes; no columns in `before` for nothing.
    """
    anatomy = model.anatomy
    _check_block(anatomy, last)
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


def prefixes(windows: Int[Tensor, "window length"], n: int, position: int) -> Int[Tensor, "n position"]:
    """What stands before a position in n windows, one window after another, over and over."""
    if not isinstance(position, Integral) or not 0 <= position < windows.shape[1]:
        raise ValueError(f"position {position} is not in windows of {windows.shape[1]} tokens.")
    return windows[torch.arange(n) % len(windows), :position]
