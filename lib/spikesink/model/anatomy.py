"""What models of any family are made of, and the checks that measures begin with: the one place that knows families."""

from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import (
    AttentionBridge,
    NormalizationBridge,
    PositionEmbeddingsAttentionBridge,
)
from transformers import PretrainedConfig

from spikesink.common import NotApplicable

TRIED = 4, 12  # windows and tokens of what a model is tried on before it is measured


@dataclass(frozen=True)
class Anatomy:
    """What later modules need to know about a model's family.

    `write_hooks[b - 1]` is the hook that carries what block b adds to the residual stream (block 2i + 1 is
    the attention of layer i, or what mixes tokens in its place, block 2i + 2 its FFN), None where a layer has no such
    block; `layer_hooks[i]` carries the stream as it enters layer i, and the last one the stream as it leaves the last
    layer; `pattern_hooks[i]` carries the attention of layer i, None where it has none.
    """

    family: str
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    d_vocab: int
    context: int
    norm: str  # "RMS" or "LN"
    norm_placement: str  # "pre", "post" or "sandwich"
    norm_scale_offset: float  # the scale is offset + weight: 1 in Gemma, else 0
    norm_eps: float  # added to the mean square before the root
    gate_activation: str | None  # None: the MLP has no gate
    qk_norm: bool
    parallel: bool  # attention and MLP read the same stream
    n_experts: int  # FFNs that a router chooses from; 0 where there is one FFN and no router
    residual_multiplier: float  # what a block computes is multiplied by it before it is added: 1 but in Granite
    attention_norm: str | None  # the norm that attention reads through; None where it reads the stream itself
    ffn_norm: str | None  # the same of the FFN
    sight: tuple[int | None, ...]  # of each layer: how many tokens back a query sees, itself included; None: all
    softcap: float | None  # attention logits are bent to stay within it (Gemma 2)
    query_scale: float  # what a query's product with a key is multiplied by: 1 / sqrt(d_head) in most families
    sees_rotation: bool  # whether hook_rot_q and hook_rot_k show queries and keys after RoPE
    prepends_bos: bool  # the tokenizer's own habit
    bos_token: int | None
    layer_hooks: tuple[str, ...] = field(repr=False)
    write_hooks: tuple[str | None, ...] = field(repr=False)
    pattern_hooks: tuple[str | None, ...] = field(repr=False)
    # Each layer's weight of each expert; None: not to be seen.
    router_hooks: tuple[str | None, ...] = field(default=(), repr=False)
    edits_pattern: bool = True  # whether a change of the attention pattern reaches what the attention writes
    projects: bool = True  # whether keys and values are linear maps of h~, by matrices of their own
    separate_ffn: bool = True  # whether the FFN is a module of its own; else it reads all windows' tokens in one row
    learned_sink: bool = False  # a learned logit takes part in each softmax, so that a token alone gets less than all
    counts_places: bool = False  # attention goes by places in the cache (ALiBi), not by positions that keys carry

    @property
    def one_gated_ffn(self) -> bool:
        """Whether each layer has one FFN, with a gate: a quadratic form."""
        return not self.n_experts and self.gate_activation is not None

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """The layers that have attention; in a hybrid others mix tokens by convolution or recurrence."""
        return tuple(layer for layer, name in enumerate(self.pattern_hooks) if name is not None)

    def require_attention(self) -> None:
        """Raise NotApplicable unless each layer shows its attention."""
        if missing := self.n_layers - len(self.attention_layers):
            raise NotApplicable(f"{missing} of {self.n_layers} layers of this {self.family} model show no attention")

    @property
    def n_blocks(self) -> int:
        """Number of blocks as the paper counts them: two a layer, attention first."""
        return 2 * self.n_layers


@runtime_checkable
class Model(Protocol):
    """Whatever has an anatomy: what `load` returns, a model of the lab, or the weights of either."""

    anatomy: Anatomy


class Block(int):
    """A block by the paper's count: one write to the stream, from 1, attention odd and FFN even; 0 is the embedding.

    Printed it says its layer, from 0: "L11 MLP (block 24)". In arithmetic it is a number.
    """

    @property
    def layer(self) -> int:
        """The layer, from 0, that the block is in."""
        return (self - 1) // 2

    @property
    def is_attention(self) -> bool:
        """Whether it is the layer's attention, and not its FFN."""
        return self % 2 == 1

    def __str__(self) -> str:
        return (
            f"L{self.layer} {'attn' if self.is_attention else 'MLP'} (block {int(self)})" if self else "the embedding"
        )

    __repr__ = __str__


def block(number: int) -> Block:
    """A block by the paper's count, from 1."""
    return Block(_whole(number, "block"))


def attn(layer: int) -> Block:
    """The attention of a layer, counted from 0."""
    return Block(2 * _whole(layer, "layer") + 1)


def mlp(layer: int) -> Block:
    """The FFN of a layer, counted from 0."""
    return Block(2 * _whole(layer, "layer") + 2)


def _whole(number: int, what: str) -> int:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < 0:
        raise ValueError(f"a {what} is a whole number of at least 0, not {number!r}.")
    return int(number)


def normalise(x: Float[Tensor, "*batch d_model"], anatomy: Anatomy) -> Float[Tensor, "*batch d_model"]:
    """h~: the stream over its root mean square (less its mean first, where the model's norm is LayerNorm)."""
    if anatomy.norm == "LN":
        x = x - x.mean(-1, keepdim=True)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * size.square_().div_(x.shape[-1]).add_(anatomy.norm_eps).rsqrt_()


class Chunk(int):
    """A sight that is no window: so many tokens that see one another, from a multiple of it on."""


def in_sight(length: int, sight: int | None) -> Bool[Tensor, "query key"]:
    """Which keys each query may attend to, so many tokens back (itself included), or all."""
    queries, keys = torch.arange(length)[:, None], torch.arange(length)
    back = queries - keys
    if isinstance(sight, Chunk):
        return (back >= 0) & (queries // sight == keys // sight)
    return (back >= 0) & (back < (length if sight is None else sight))


def body_of(model: Model) -> torch.nn.Module:
    """What runs all layers: the transformers model under its head; a model that is none of transformers', itself."""
    return getattr(getattr(model, "original_model", None), "base_model", model)


def before_each_run(model: Model, hook: Callable) -> Callable[[], None]:
    """Call a forward pre-hook before a model's layers run, with or without the head; returns what removes it.

    Some heads call what is inside the body instead of the body itself.
    """
    modules = {id(one): one for one in (body_of(model), getattr(model, "original_model", None) or model)}.values()
    handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module in modules]
    return lambda: [handle.remove() for handle in handles]


def run_layers(model: Model, tokens: Int[Tensor, "window position"]) -> None:
    """Run a model for what its hooks see; of a bridge without the head, which can cost as much as all layers."""
    body = body_of(model)
    body(tokens.to(model.cfg.device), **({} if body is model else {"use_cache": False}))


def spread_tokens(d_vocab: int, context: int | None = None) -> Int[Tensor, "window position"]:
    """The few tokens that a model is tried on, spread over its vocabulary."""
    n, length = TRIED
    return (torch.arange(n * length).view(length, n).T * d_vocab // (n * length))[:, :context]


def check_ids(tokens: Tensor) -> None:
    """Raise ValueError unless this is a tensor of whole numbers, as token ids are."""
    if not isinstance(tokens, Tensor) or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError("tokens must be a tensor of token ids; of a text, model.to_tokens(text) makes them.")


def check_vocabulary(model: Model, tokens: Tensor) -> None:
    """Raise ValueError where an id, of one or more, is not in the vocabulary of a model (or of its weights)."""
    d_vocab = anatomy(model).d_vocab
    least, most = int(tokens.min()), int(tokens.max())
    if not 0 <= least <= most < d_vocab:
        wrong = least if least < 0 else most
        raise ValueError(f"token {wrong} does not exist; this model's vocabulary has ids 0 to {d_vocab - 1}.")


def check_tokens(model: Model, tokens: Tensor) -> None:
    """Raise ValueError unless these are windows [n, length] of a model's own tokens."""
    check_ids(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [windows, length] and not empty, but are {list(tokens.shape)}.")
    check_vocabulary(model, tokens)


def check_length(model: Model, length: int) -> None:
    """Raise ValueError where windows are longer than the context that a model was made for."""
    if length > (context := anatomy(model).context):
        raise ValueError(f"{length} tokens are longer than the model's context of {context}.")


def check_not_padding(model: Model, tokens: Tensor) -> None:
    """Raise ValueError where a window [n, length] of two tokens or more holds nothing but the tokenizer's padding.

    Or begins or ends with several such tokens, where that cannot be text's own end or beginning.
    """
    tokenizer = getattr(model, "tokenizer", None)
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None or tokens.shape[1] < 2:
        return
    if empty := (tokens == padding).all(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"window {empty[0]} holds nothing but padding (token {padding}); leave it out, or fill it with text."
        )
    ends = (tokens[:, :2] == padding).all(1) | (tokens[:, -2:] == padding).all(1)
    if padding not in (tokenizer.bos_token_id, tokenizer.eos_token_id) and ends.any():
        window = int(ends.nonzero()[0])
        raise ValueError(f"window {window} is padded (token {padding}); cut windows of one length, without padding.")


def anatomy(model: Model | TransformerBridge) -> Anatomy:
    """Describe a model's family: sizes, norm placement, gate, BOS habit, and the hooks to read it by.

    It is kept as `model.anatomy`: `load` sees to that, a bridge of your own gets it here.
    """
    if isinstance(getattr(model, "anatomy", None), Anatomy):
        return model.anatomy
    if not hasattr(model, "original_model"):
        raise ValueError(f"{model!r} is no model; give what load returned.")
    cfg, config = model.cfg, model.original_model.config.get_text_config()
    model.anatomy = Anatomy(
        family=config.model_type,
        n_layers=cfg.n_layers,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        context=cfg.n_ctx,
        parallel=bool(cfg.parallel_attn_mlp),
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1),
        prepends_bos=bool(cfg.default_prepend_bos),
        bos_token=model.tokenizer.bos_token_id if model.tokenizer is not None else None,
        **_describe_norms(model),
        **_describe_attention(model, config),
        **_describe_ffn(model, config),
        **_name_hooks(model),
    )
    return model.anatomy


def _describe_norms(model: TransformerBridge) -> dict[str, Any]:
    cfg, block = model.cfg, model.blocks[0]
    if "ln1_post" in block.hook_aliases.get("hook_attn_out", ""):
        placement = "sandwich" if hasattr(block, "ln1") else "post"
    else:
        placement = "pre"
    norms = [name for name in ("ln1", "norm", "ln2") if placement != "post" and hasattr(block, name)]
    return {
        "norm": "RMS" if cfg.uses_rms_norm else "LN",
        "norm_placement": placement,
        "norm_scale_offset": float(cfg.rmsnorm_uses_offset),
        "norm_eps": cfg.eps,
        "attention_norm": norms[0] if norms else None,
        "ffn_norm": norms[-1] if norms else None,  # where the two blocks share one, it is the only one
    }


def _describe_attention(model: TransformerBridge, config: PretrainedConfig) -> dict[str, Any]:
    cfg, attention = model.cfg, next((block.attn for block in model.blocks if hasattr(block, "attn")), None)
    own = getattr(attention, "original_component", None)
    parts = dict(attention.named_children()) if attention is not None else {}
    # What a configuration only carries along, its family does not know.
    usual = type(config)()
    known = [name for name in ("sliding_window", "window_size") if hasattr(usual, name)]
    window = next((size for name in known if (size := getattr(config, name))), None)
    kinds = (
        getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ["local"] * cfg.n_layers
    )
    sights = {"sliding_attention": window, "local": window}
    if chunk := getattr(config, "attention_chunk_size", None):
        sights["chunked_attention"] = Chunk(chunk)
    # Where the family's own code has read the pattern before a hook sees it, a change of it goes nowhere.
    delegates = getattr(type(attention), "forward", None) is AttentionBridge.forward
    return {
        "n_heads": cfg.n_heads,
        "n_kv_heads": cfg.n_key_value_heads or cfg.n_heads,
        "d_head": cfg.d_head,
        "qk_norm": "q_norm" in parts,
        "counts_places": cfg.positional_embedding_type == "alibi",
        "projects": {"k", "v"} <= parts.keys(),
        "sight": tuple(sights.get(kind) for kind in kinds),
        "softcap": getattr(config, "attn_logit_softcapping", None),
        "query_scale": float(getattr(own, "scaling", None) or cfg.d_head**-0.5),
        "sees_rotation": isinstance(attention, PositionEmbeddingsAttentionBridge),
        "edits_pattern": not delegates or bool(getattr(own, "accepts_pattern_fn", False)),
        "learned_sink": isinstance(getattr(own, "sinks", None), Tensor),
    }


def _describe_ffn(model: TransformerBridge, config: PretrainedConfig) -> dict[str, Any]:
    mlps = [getattr(block, "mlp", None) for block in model.blocks]
    mlp = next((mlp for mlp in mlps if mlp is not None), None)
    counts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    n_experts = next(filter(None, counts), 0)
    parts = {} if n_experts and hasattr(mlp, "dense_in") else linears(mlp)
    # In a mixture of experts "gate" is the router's name.
    gated = "gate" in parts
    if n_experts:
        gated = any(".gate_" in name for part in mlps if part is not None for name, _ in part.named_parameters())
    if "in" in parts:
        width = parts["in"].weight.numel() // model.cfg.d_model  # by its size, as some families keep it transposed
    else:
        width = getattr(config, "moe_intermediate_size", None)
    return {
        "d_mlp": width or model.cfg.d_mlp,
        "gate_activation": model.cfg.act_fn if gated else None,
        "n_experts": n_experts,
        "separate_ffn": all(mlp is not None and mlp.name is not None for mlp in mlps),
    }


def linears(mlp: torch.nn.Module | None) -> dict[str, torch.nn.Module]:
    """The linear parts of an FFN module of a bridge by their plain names ("gate", "in", "out"), as far as it has them.

    Where some layers have experts and others one FFN, the bridge calls the parts of the one FFN "dense_gate", ...
    """
    children = dict(mlp.named_children()) if mlp is not None else {}
    return {name: part for n, part in children.items() if (name := n.removeprefix("dense_")) in ("gate", "in", "out")}


def _write_hooks(block: torch.nn.Module) -> list[str | None]:
    """The hooks of a layer that carry what its two blocks write: an alias in most families, else a hook of the layer.

    Where no attention is, what mixes tokens in its place is the one part that is neither a norm nor the FFN.
    """
    children = dict(block.named_children())
    names = [block.hook_aliases.get(h, h if h in children else None) for h in ("hook_attn_out", "hook_mlp_out")]
    if "attn" not in children:
        parts = {name: part for name, part in children.items() if name != "mlp" and hasattr(part, "hook_out")}
        mixers = [name for name, part in parts.items() if not isinstance(part, NormalizationBridge)]
        names[0] = f"{mixers[0]}.hook_out" if len(mixers) == 1 else None
    return names


def _name_hooks(model: TransformerBridge) -> dict[str, tuple[str | None, ...]]:
    last = model.cfg.n_layers - 1
    routers = [getattr(getattr(block, "mlp", None), "hook_aliases", {}) for block in model.blocks]
    routers = [names.get("hook_expert_weights") for names in routers]
    return {
        "layer_hooks": (*(f"blocks.{i}.hook_in" for i in range(last + 1)), f"blocks.{last}.hook_out"),
        "write_hooks": tuple(
            hook and f"blocks.{i}.{hook}" for i, block in enumerate(model.blocks) for hook in _write_hooks(block)
        ),
        "pattern_hooks": tuple(
            name if (name := f"blocks.{i}.attn.hook_pattern") in model.hook_dict else None for i in range(last + 1)
        ),
        "router_hooks": tuple(name and f"blocks.{i}.mlp.{name}" for i, name in enumerate(routers)),
    }


def not_finite(model: Model, what: str) -> str:
    """A sentence that says why something is not finite: a weight that is not, or else an overflow."""
    narrow = model.cfg.dtype != torch.float32  # where rounding a weight or adding up can already overflow
    whole = getattr(model, "original_model", model)
    wrong = [name for name, w in whole.named_parameters() if not w.is_meta and not w.isfinite().all()]
    why = ""
    if wrong:
        why = f", because the weight {wrong[0].replace('_original_component.', '')} ({len(wrong)} in all) is not"
    ways = ["get the model again"] * (bool(wrong) or not narrow) + ["load it in float32"] * narrow
    return f"{what} is not finite in {str(model.cfg.dtype).removeprefix('torch.')}{why}; {' or '.join(ways)}."
