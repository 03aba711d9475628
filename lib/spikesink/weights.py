"""A model's weights, one layer at a time: out of a loaded model, or straight from its safetensors.

What only needs weights need not hold a model. `open_weights` makes a shell of it, one layer deep, into which each layer
is read when it is asked for, so that memory does not grow with the number of layers.

Everywhere the norm's learned scale is folded into the matrices that read through it, so that what enters them is h~,
the normalised stream without that scale, whose norm is sqrt(d_model).
"""

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN
from transformers.pytorch_utils import Conv1D

from spikesink.models import DEFAULT_MODEL, Anatomy, LoadError, anatomy, prepare


@dataclass(frozen=True)
class FFN:
    """A gated feed-forward block, F(h~) = down (act(gate h~ + b) * (up h~ + c)) + e, with the norm's scale folded in.

    h~ is the normalised stream without its learned scale (and, where the norm has a bias, without that): its norm is
    sqrt(d_model). Where the block's output passes another norm before it is added to the stream, `post_scale` is that
    norm's scale and F is what enters it.
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
    """Where weights come from.

    `block(i, attention)` is the TransformerLens block of layer i, with its weights in it (attention's only if asked
    for). The blocks of a shell are one and the same object: what was taken from one is gone when the next is asked for.
    `embed(ids)` is the residual stream as it enters layer 0, of tokens that are each at position 0.
    """

    anatomy: Anatomy
    block: Callable[[int, bool], torch.nn.Module]
    embed: Callable[[Int[Tensor, " token"]], Float[Tensor, "token d_model"]]

    def ffn(self, layer: int) -> FFN:
        """The gated FFN of a layer (from 0), in float32 on the CPU.

        Raises:
            ValueError: the model has no such layer, or its FFN is not one gated FFN.
        """
        about = self.anatomy
        self._check(layer)
        if (reason := no_form(about)) is not None:
            raise ValueError(f"{reason}.")
        block = self.block(layer, False)
        parts = {name: dict(block.mlp.named_children())[name] for name in ("gate", "in", "out")}
        gate, up, down = (_floats(parts[name].weight) for name in ("gate", "in", "out"))
        gate_bias, up_bias = (_floats(parts[name].bias, gate.shape[0]) for name in ("gate", "in"))
        scale, shift = self._norm(block, about.ffn_norm)
        return FFN(
            gate=gate * scale,
            up=up * scale,
            down=down.clone(),  # a shell's own is overwritten by the next layer
            gate_bias=gate_bias + gate @ shift,
            up_bias=up_bias + up @ shift,
            activation=ACT2FN[about.gate_activation],
            post_scale=self._post_scale(block, "ln2_post"),
            down_bias=None if parts["out"].bias is None else _floats(parts["out"].bias).clone(),
        )

    def attention(self, layer: int) -> Attention:
        """The attention of a layer (from 0) as a token sees it that can attend only to itself, float32 on the CPU.

        Raises:
            ValueError: the model has no such layer.
        """
        about = self.anatomy
        self._check(layer)
        block = self.block(layer, True)
        value, out = (dict(block.attn.named_children())[name] for name in ("v", "o"))
        heads = _matrix(out).unflatten(1, (about.n_kv_heads, -1, about.d_head))  # d_model, K/V head, query head, d_head
        summed = heads.sum(2).flatten(1)
        scale, shift = self._norm(block, about.attention_norm)
        matrix, value_bias = _folded(value, scale, shift)
        return Attention(
            value=matrix,
            out=summed,
            bias=summed @ value_bias + _floats(out.bias, about.d_model),
            post_scale=self._post_scale(block, "ln1_post"),
        )

    def keys(self, layer: int) -> tuple[Float[Tensor, "d_kv d_model"], Float[Tensor, " d_kv"]]:
        """W_K of a layer (from 0), head after head, and b_K, in float32 on the CPU: a key is W_K h~ + b_K.

        Before any QK norm and any rotation; the norm's scale and bias are folded in.

        Raises:
            ValueError: the model has no such layer.
        """
        self._check(layer)
        block = self.block(layer, True)
        scale, shift = self._norm(block, self.anatomy.attention_norm)
        return _folded(dict(block.attn.named_children())["k"], scale, shift)

    def norm_scale(self, layer: int) -> Float[Tensor, " d_model"]:
        """The learned scale of the norm that a layer's attention reads through; ones where it reads the stream itself.

        Raises:
            ValueError: the model has no such layer.
        """
        self._check(layer)
        return self._norm(self.block(layer, False), self.anatomy.attention_norm)[0]

    def _check(self, layer: int) -> None:
        if not 0 <= layer < self.anatomy.n_layers:
            raise ValueError(f"layer {layer} does not exist; this model has layers 0 to {self.anatomy.n_layers - 1}.")

    def _norm(self, block: torch.nn.Module, name: str | None) -> tuple[Tensor, Tensor]:
        """A norm's scale and its bias; ones and zeros where there is no norm."""
        if name is None:
            return torch.ones(self.anatomy.d_model), torch.zeros(self.anatomy.d_model)
        norm = dict(block.named_children())[name]
        bias = getattr(norm.original_component, "bias", None)
        return _floats(norm.weight) + self.anatomy.norm_scale_offset, _floats(bias, self.anatomy.d_model)

    def _post_scale(self, block: torch.nn.Module, name: str) -> Tensor | None:
        norm = dict(block.named_children()).get(name)
        return None if norm is None else _floats(norm.weight) + self.anatomy.norm_scale_offset


def no_form(about: Anatomy) -> str | None:
    """Why a model's FFN is no quadratic form, or None where it is one."""
    if about.n_experts:
        return f"the FFN of this {about.family} model is a mixture of {about.n_experts} experts, not one gated FFN"
    if about.gate_activation is None:
        return f"the FFN of this {about.family} model has no gate, so it is no quadratic form"
    return None


def weights_of(model: TransformerBridge) -> Weights:
    """The weights of a loaded model."""
    return Weights(anatomy(model), lambda layer, attention: model.blocks[layer], lambda ids: _embedded(model, ids))


def open_weights(spec: str | os.PathLike = DEFAULT_MODEL) -> Weights:
    """The weights of a model that is not loaded; each layer is read when it is asked for, and replaces the one before.

    Args:
        spec: as `load` takes it.

    Raises:
        LoadError: as `load` does, or when the files name the weights otherwise than the model does.
    """
    ready = prepare(spec)
    config = copy.deepcopy(ready.config)
    n_layers = config.num_hidden_layers
    config.num_hidden_layers = 1
    config.vocab_size, config.pad_token_id = 8, None  # the shell is asked for its layer only
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = kinds[:1]
    hf_model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
    shell = TransformerBridge.boot_transformers(
        str(ready.source.directory),
        hf_model=hf_model.eval().requires_grad_(False),
        tokenizer=ready.tokenizer,
        dtype=torch.float32,
    )
    about = replace(anatomy(shell), n_layers=n_layers, d_vocab=ready.config.vocab_size)
    files = _where(ready.source.directory)
    layer_of = shell.blocks[0].original_component
    prefix = _prefix(files, shell, layer_of)
    of_attention = {id(parameter) for parameter in shell.blocks[0].attn.parameters()}
    parameters = {_in_files(layer_of, name): parameter for name, parameter in layer_of.named_parameters()}

    @torch.no_grad()
    def block(layer: int, attention: bool) -> torch.nn.Module:
        wanted = {n: p for n, p in parameters.items() if attention or id(p) not in of_attention}
        keys = {name: f"{prefix}{layer}.{name}" for name in wanted}
        filled = set()
        for name, key in keys.items():
            if key in files:
                wanted[name].copy_(_read(files, key))
                filled.add(wanted[name].untyped_storage().data_ptr())
        # Where a family fuses matrices, the bridge's parts are views of what the file holds.
        for name, key in keys.items():
            if wanted[name].untyped_storage().data_ptr() not in filled:
                raise LoadError(f"{ready.source.spec} has no weights named {key}; load the whole model instead.")
        return shell.blocks[0]

    @lru_cache
    def with_embedding() -> TransformerBridge:
        """The shell, once the model's embedding has taken the place of its own, which has a few random rows."""
        of_shell = shell.original_model.get_input_embeddings()
        name = next(n for n, p in shell.original_model.named_parameters() if p is of_shell.weight)
        name = name.replace("_original_component.", "")
        key = name if name in files else name.split(".", 1)[1]
        if key not in files:
            raise LoadError(f"{ready.source.spec} has no weights named {name}; load the whole model instead.")
        of_shell.weight = torch.nn.Parameter(_read(files, key).float(), requires_grad=False)
        return shell

    return Weights(about, block, lambda ids: _embedded(with_embedding(), ids))


@torch.no_grad()
def _embedded(model: TransformerBridge, ids: Int[Tensor, " token"]) -> Float[Tensor, "token d_model"]:
    """The stream as it enters layer 0, of tokens that are each alone in a window of their own."""
    return _floats(model(ids[:, None].to(model.cfg.device), stop_at_layer=0)[:, 0])


def _in_files(layer: torch.nn.Module, name: str) -> str:
    """A parameter's name as transformers saves it: without the bridge's wrapping, and by the module's own name.

    Where a family fuses queries, keys and values, the bridge puts its modules in place of the model's, under its own
    names; each still says what it was called.
    """
    path, _, kind = name.replace("._original_component", "").rpartition(".")
    parent, _, last = path.rpartition(".")
    wrapper, _, inside = name.rpartition("._original_component.")
    if parent and inside == kind:
        called = layer.get_submodule(wrapper).name or last
        path = f"{parent}.{called.rpartition('.')[2]}"
    return f"{path}.{kind}"


def _read(files: dict[str, Path], key: str) -> Tensor:
    with safe_open(files[key], framework="pt") as file:
        return file.get_tensor(key)


def _where(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    found = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= dict.fromkeys(file.keys(), path)
    return found


def _prefix(files: dict[str, Path], shell: TransformerBridge, layer: torch.nn.Module) -> str:
    """What stands before a layer's number in its weights' names; files of a bare model lack the first part of it."""
    name = next(name for name, module in shell.original_model.named_modules() if module is layer)
    prefix = name.replace("._original_component", "").removesuffix("0")
    return prefix if any(key.startswith(prefix) for key in files) else prefix.split(".", 1)[1]


def _folded(linear: torch.nn.Module, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    """A projection's matrix and bias, of what the norm before it makes: with that norm's scale and bias folded in."""
    matrix = _matrix(linear)
    return matrix * scale, _floats(linear.bias, matrix.shape[0]) + matrix @ shift


def _matrix(linear: torch.nn.Module) -> Float[Tensor, "out in"]:
    """A linear module's matrix; GPT-2 keeps it transposed."""
    weight = _floats(linear.weight)
    return weight.T if isinstance(linear.original_component, Conv1D) else weight


def _floats(values: Tensor | None, zeros: int = 0) -> Tensor:
    """Float32 on the CPU; zeros for what a family does not have."""
    return torch.zeros(zeros) if values is None else values.detach().float().cpu()
