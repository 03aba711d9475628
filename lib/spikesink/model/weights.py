"""A model's weights, one layer at a time: out of a loaded model, or straight from its safetensors.

`open_weights` leaves a model on disk, from where each layer is read when it is asked for, so that memory does not grow
with the number of layers. Everywhere the norm's learned scale is folded into the matrices that read through it, so that
what enters them is h~, the normalised stream without that scale, whose norm is sqrt(d_model).
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TypeVar

import torch
from accelerate.utils import align_module_device
from jaxtyping import Float, Int
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from spikesink.common import NotApplicable
from spikesink.model.anatomy import Anatomy, Model, anatomy, linears
from spikesink.model.load import DEFAULT_MODEL, load


@dataclass(frozen=True)
class FFN:
    """A gated feed-forward block, F(h~) = down (act(gate h~ + b) * (up h~ + c)) + e.

    Where its output passes another norm before it is added to the stream, `post_scale` is that norm's scale and F is
    what enters it.
    """

    gate: Float[Tensor, "d_mlp d_model"]
    up: Float[Tensor, "d_mlp d_model"]
    down: Float[Tensor, "d_model d_mlp"]
    gate_bias: Float[Tensor, " d_mlp"]
    up_bias: Float[Tensor, " d_mlp"]
    activation: Callable[[Tensor], Tensor]
    post_scale: Float[Tensor, " d_model"] | None = None
    down_bias: Float[Tensor, " d_model"] | None = None  # None: zeros

    def to(self, dtype: torch.dtype) -> "FFN":
        """The same in another precision."""
        return replace(self, **{k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class Attention:
    """What a layer's attention does to a token that sees itself alone: the fixed map h~ -> out (value h~) + bias.

    Softmax over one key is 1 whatever the query, so W_V and W_O are all that is left. Query heads that share a K/V head
    pass on the same value: their columns of W_O are added up. `bias` is W_O b_V + b_O and what the norm's bias makes of
    it; `post_scale` as in `FFN`.
    """

    value: Float[Tensor, "d_kv d_model"]
    out: Float[Tensor, "d_model d_kv"]
    bias: Float[Tensor, " d_model"]
    post_scale: Float[Tensor, " d_model"] | None = None


@dataclass(frozen=True)
class Weights:
    """Where weights come from; what they give is float32 on the CPU, layer by layer, with the norms' scales folded in.

    All methods raise ValueError for a layer that does not exist, FloatingPointError for weights that are not finite,
    and NotApplicable where the family has no such part.
    """

    model: Model

    @property
    def anatomy(self) -> Anatomy:
        """The model's own."""
        return anatomy(self.model)

    def block(self, layer: int, *parts: str | None) -> AbstractContextManager[torch.nn.Module]:
        """A layer's TransformerLens block, with the weights of some parts ("mlp", "ln2", ...) in them meanwhile."""
        return _present(self.model.blocks[layer], *parts)

    @torch.no_grad()
    def embed(self, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
        """The stream as it enters layer 0, of tokens that are each alone in a window of their own."""
        entering = _floats(self.model(ids[:, None].to(self.model.cfg.device), stop_at_layer=0)[:, 0])
        if len(wrong := ids[~entering.isfinite().all(-1).to(ids.device)]):
            raise FloatingPointError(f"the embedding of token {int(wrong[0])} is not finite; get the model again.")
        return entering

    def ffn(self, layer: int) -> FFN:
        """The gated FFN of a layer."""
        require_form(self.anatomy)
        with self._parts(layer, "mlp", self.anatomy.ffn_norm, "ln2_post") as block:
            parts = linears(block.mlp)
            if not {"gate", "in", "out"} <= parts.keys():
                raise NotApplicable(f"the FFN of layer {layer} has no gate, up and down matrix of its own")
            gate, up, down = (parts[name] for name in ("gate", "in", "out"))
            ffn = self._fold_ffn(block, [gate.weight, up.weight, down.weight], [gate.bias, up.bias, down.bias])
        return _require_finite(ffn, f"the FFN of layer {layer}")

    def experts(self, layer: int) -> dict[str, FFN]:
        """The gated FFNs of a layer of a mixture of experts, by their names.

        "0", "1", ... are those that the router chooses from; a name from the model's own code is an expert that every
        token passes; and where a layer has one FFN and no router, it is named "mlp". Experts that are kept in a way
        that is not known here are not among them.
        """
        with self._parts(layer, "mlp", self.anatomy.ffn_norm, "ln2_post") as block:
            return {
                name: _require_finite(self._fold_ffn(block, weights, biases), f"expert {name} of layer {layer}")
                for name, weights, biases in gated_parts(_unwrap(block.mlp))
            }

    def attention(self, layer: int) -> Attention:
        """The attention of a layer as a token sees it that can attend only to itself."""
        shape = self.anatomy
        require_projections(shape)
        with self._parts(layer, "attn", shape.attention_norm, "ln1_post") as block:
            value, out = _projections(shape, block, layer, "v", "o")
            by_head = _matrix(out).unflatten(1, (shape.n_kv_heads, -1, shape.d_head))
            summed = by_head.sum(2).flatten(1)  # d_model, K/V head, query head, d_head -> d_model, K/V head and d_head
            matrix, value_bias = self._fold(block, value)
            attention = Attention(
                value=matrix,
                out=summed,
                bias=summed @ value_bias + _floats(out.bias, shape.d_model),
                post_scale=self._post_scale(block, "ln1_post"),
            )
        return _require_finite(attention, f"the attention of layer {layer}")

    def keys(self, layer: int) -> tuple[Float[Tensor, "d_kv d_model"], Float[Tensor, " d_kv"]]:
        """W_K of a layer, head after head, and b_K: a key is W_K h~ + b_K, before any QK norm and any rotation."""
        require_projections(self.anatomy)
        with self._parts(layer, "attn", self.anatomy.attention_norm) as block:
            keys = self._fold(block, *_projections(self.anatomy, block, layer, "k"))
        return _require_finite(keys, f"the keys of layer {layer}")

    def norm_scale(self, layer: int) -> Float[Tensor, " d_model"]:
        """The learned scale of the norm that a layer's attention reads through; ones where it reads the stream."""
        with self._parts(layer, self.anatomy.attention_norm) as block:
            return self._norm(block, self.anatomy.attention_norm)[0].clone()

    def _parts(self, layer: int, *parts: str | None) -> AbstractContextManager[torch.nn.Module]:
        if not isinstance(layer, Integral) or not 0 <= layer < self.anatomy.n_layers:
            raise ValueError(f"layer {layer!r} does not exist; this model has layers 0 to {self.anatomy.n_layers - 1}.")
        return self.block(layer, *parts)

    def _fold_ffn(self, block: torch.nn.Module, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> FFN:
        gate, up, down = map(_floats, weights)
        gate_bias, up_bias = (_floats(bias, gate.shape[0]) for bias in biases[:2])
        scale, shift = self._norm(block, self.anatomy.ffn_norm)
        return FFN(
            gate=gate * scale,
            up=up * scale,
            down=down,
            gate_bias=gate_bias + gate @ shift,
            up_bias=up_bias + up @ shift,
            activation=ACT2FN[self.anatomy.gate_activation],
            post_scale=self._post_scale(block, "ln2_post"),
            down_bias=None if biases[2] is None else _floats(biases[2]),
        )

    def _fold(self, block: torch.nn.Module, linear: torch.nn.Module) -> tuple[Tensor, Tensor]:
        """The matrix and bias of an attention's projection, with the scale and bias of the norm before it in them."""
        matrix, (scale, shift) = _matrix(linear), self._norm(block, self.anatomy.attention_norm)
        return matrix * scale, _floats(linear.bias, matrix.shape[0]) + matrix @ shift

    def _norm(self, block: torch.nn.Module, name: str | None) -> tuple[Tensor, Tensor]:
        """A norm's scale and its bias; ones and zeros where there is no norm, or one that learns nothing."""
        norm = _unwrap(dict(block.named_children())[name]) if name is not None else None
        scale, bias = (getattr(norm, part, None) for part in ("weight", "bias"))
        ones = torch.ones(self.anatomy.d_model)
        return (
            ones if scale is None else _floats(scale) + self.anatomy.norm_scale_offset,
            _floats(bias, self.anatomy.d_model),
        )

    def _post_scale(self, block: torch.nn.Module, name: str) -> Tensor | None:
        norm = dict(block.named_children()).get(name)
        return None if norm is None else _floats(norm.weight) + self.anatomy.norm_scale_offset


def _projections(shape: Anatomy, block: torch.nn.Module, layer: int, *names: str) -> list[torch.nn.Module]:
    """Matrices of a layer's attention; NotApplicable where it has none of its own, or with heads of another width."""
    if not hasattr(block, "attn"):
        raise NotApplicable(f"layer {layer} has no attention")
    parts, wide, narrow = (
        dict(block.attn.named_children()),
        shape.n_heads * shape.d_head,
        shape.n_kv_heads * shape.d_head,
    )
    sizes = {"k": (narrow, shape.d_model), "v": (narrow, shape.d_model), "o": (shape.d_model, wide)}
    if any(name not in parts or _matrix(parts[name]).shape != sizes[name] for name in names):
        raise NotApplicable(f"layer {layer} has keys or values that are shared, or heads of another width than others")
    return [parts[name] for name in names]


def require_form(anatomy: Anatomy) -> None:
    """Raise NotApplicable unless a layer's FFN is one gated FFN: without a gate there is no quadratic form."""
    if anatomy.n_experts:
        raise NotApplicable(
            f"the FFN of this {anatomy.family} model is a mixture of {anatomy.n_experts} experts, not one gated FFN"
        )
    if anatomy.gate_activation is None:
        raise NotApplicable(f"the FFN of this {anatomy.family} model shows no gate, so no quadratic form")


def require_projections(anatomy: Anatomy) -> None:
    """Raise NotApplicable unless keys and values are linear maps of h~."""
    if not anatomy.projects:
        raise NotApplicable(f"the attention of this {anatomy.family} model has no W_K and W_V of its own")


def require_separate_ffn(anatomy: Anatomy) -> None:
    """Raise NotApplicable unless a layer's FFN can be run, and be seen reading, by itself."""
    if not anatomy.separate_ffn:
        raise NotApplicable(f"the FFN of this {anatomy.family} model is no module of its own")


def weights_of(model: Model) -> Weights:
    """The weights of a loaded model; of an offloaded one, each layer is read when it is asked for."""
    anatomy(model)  # what is no model is refused here
    return Weights(model)


def open_weights(spec: str | os.PathLike = DEFAULT_MODEL, dtype: str | torch.dtype | None = None) -> Weights:
    """The weights of a model that stays on disk; each layer is read when it is asked for, and then let go."""
    return weights_of(load(spec, "disk", dtype))


@contextmanager
def _present(block: torch.nn.Module, *parts: str | None) -> Iterator[torch.nn.Module]:
    """A block with some of its parts' weights in them, also where accelerate keeps them elsewhere in the meantime."""
    children = dict(block.named_children())
    if any(parameter.is_meta for parameter in block.parameters()):
        give_back()
    with ExitStack() as stack:
        for module in [m for part in parts if part in children for m in children[part].modules()]:
            stack.enter_context(align_module_device(module))
        yield block


def give_back() -> None:
    """Give freed memory back to the system: glibc keeps what lies between blocks in use, more with every layer read."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


Part = tuple[str, Sequence[Tensor], Sequence[Tensor | None]]  # name; gate, up and down; their biases


def gated_parts(mlp: torch.nn.Module) -> Iterator[Part]:
    """The gated FFNs in a layer's FFN module, in the two forms that transformers keeps them in."""
    for name, module in mlp.named_modules():
        if name.endswith("_original_component"):
            continue  # the bridge's wrapper around it has the same parts
        both, down = (getattr(module, part, None) for part in ("gate_up_proj", "down_proj"))
        linears = [getattr(module, part, None) for part in ("gate_proj", "up_proj", "down_proj")]
        if isinstance(both, Tensor) and both.ndim == 3:
            if getattr(module, "is_transposed", False) or any("bias" in n for n, _ in module.named_parameters()):
                return  # another order of the matrix, or an activation that is not the plain one
            if both.shape[-1] != down.shape[-2]:
                return
            for expert in range(len(both)):
                yield str(expert), (*both[expert].chunk(2), down[expert]), (None, None, None)
        elif all(hasattr(linear, "weight") for linear in linears):
            yield name.split(".")[-1] or "mlp", [part.weight for part in linears], [part.bias for part in linears]


Matrices = TypeVar("Matrices", FFN, Attention, tuple[Tensor, Tensor])


def _require_finite(matrices: Matrices, what: str) -> Matrices:
    for values in matrices if isinstance(matrices, tuple) else vars(matrices).values():
        if isinstance(values, Tensor) and not values.isfinite().all():
            raise FloatingPointError(
                f"{what}, or the norm that it reads through, has weights that are not finite; get the model again."
            )
    return matrices


def _unwrap(module: torch.nn.Module) -> torch.nn.Module:
    """The module that a bridge has wrapped; where there is no bridge, itself."""
    return getattr(module, "original_component", module)


def _matrix(linear: torch.nn.Module) -> Float[Tensor, "out in"]:
    """A linear module's matrix; some families keep it transposed."""
    weight = _floats(linear.weight)
    return weight.T if isinstance(_unwrap(linear), Conv1D) else weight


def _floats(values: Tensor | None, zeros: int = 0) -> Tensor:
    """Float32 on the CPU; zeros for what a family does not have."""
    return torch.zeros(zeros) if values is None else values.detach().float().cpu()
