"""TODO."""

from dataclasses import dataclass, field
from numbers import Integral

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import AttentionBridge, PositionEmbeddingsAttentionBridge
from transformers import PretrainedConfig


@dataclass(frozen=True)
class Anatomy:
    """What later modules need to know about a model's family. Sizes are counts, d_* are widths.

    `write_hooks[b - 1]` is the hook that carries what block b adds to the residual stream (block 2i + 1 is
    the attention of layer i, block 2i + 2 its FFN); `layer_hooks[i]` carries the stream as it enters layer i,
    and the last one the stream as it leaves the last layer.
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
    norm: str  # "RMS", "LN", or "tanh" where DynamicTanh stands in its place
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
    write_hooks: tuple[str, ...] = field(repr=False)
    pattern_hooks: tuple[str, ...] = field(repr=False)
    # Each layer's weight of each expert; None: not to be seen.
    router_hooks: tuple[str | None, ...] = field(default=(), repr=False)
    edits_pattern: bool = True  # whether a change of the attention pattern reaches what the attention writes
    projects: bool = True  # whether keys and values are linear maps of h~, by matrices of their own
    separate_ffn: bool = True  # whether the FFN is a module of its own; else it reads all windows' tokens in one row
    gated_attention: bool = False  # what the heads give passes a gate before it is written
    learned_sink: bool = False  # a learned logit takes part in each softmax, so that a token alone gets less than all

    @property
    def one_gated_ffn(self) -> bool:
        """Whether each layer has one FFN, with a gate: a quadratic form."""
        return not self.n_experts and self.gate_activation is not None

    @property
    def n_blocks(self) -> int:
        """Number of blocks as the paper counts them: two a layer, attention first."""
        return 2 * self.n_layers


class Block(int):
    """A block by the paper's count: one write to the stream, from 1, attention odd and FFN even; 0 is the embedding.

    Printed it says its layer, by TransformerLens's count from 0: "L11 MLP (block 24)". In arithmetic it is a number.
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


def normalise(x: Float[Tensor, "*batch d_model"], about: Anatomy) -> Float[Tensor, "*batch d_model"]:
    """h~: the stream over its root mean square (less its mean first, where the model's norm is LayerNorm)."""
    if about.norm == "LN":
        x = x - x.mean(-1, keepdim=True)
    size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x * size.square_().div_(x.shape[-1]).add_(about.norm_eps).rsqrt_()


def body_of(model: TransformerBridge) -> torch.nn.Module:
    """What runs all layers: the transformers model under its head; a model that is none of transformers', itself."""
    return getattr(getattr(model, "original_model", None), "base_model", model)


def run_layers(model: TransformerBridge, tokens: Int[Tensor, "window position"]) -> None:
    """Run a model for what its hooks see; of a bridge without the head, which can cost as much as all layers."""
    body = body_of(model)
    body(tokens.to(model.cfg.device), **({} if body is model else {"use_cache": False}))


def check_ids(tokens: Tensor) -> None:
    """Raise ValueError unless this is a tensor of whole numbers, as token ids are."""
    if not isinstance(tokens, Tensor) or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise ValueError("tokens must be a tensor of token ids; of a text, model.to_tokens(text) makes them.")


def check_vocabulary(model: TransformerBridge, tokens: Tensor) -> None:
    """Raise ValueError where an id, of one or more, is not in the vocabulary of a model (or of its weights)."""
    d_vocab = model.anatomy.d_vocab
    least, most = int(tokens.min()), int(tokens.max())
    if not 0 <= least <= most < d_vocab:
        wrong = least if least < 0 else most
        raise ValueError(f"token {wrong} does not exist; this model's vocabulary has ids 0 to {d_vocab - 1}.")


def check_tokens(model: TransformerBridge, tokens: Tensor) -> None:
    """Raise ValueError unless these are windows [n, length] of a model's own tokens."""
    check_ids(tokens)
    if tokens.ndim != 2 or 0 in tokens.shape:
        raise ValueError(f"tokens must be [windows, length] and not empty, but are {list(tokens.shape)}.")
    check_vocabulary(model, tokens)


def check_length(model: TransformerBridge, length: int) -> None:
    """Raise ValueError where windows are longer than the context that a model was made for."""
    if length > model.anatomy.context:
        raise ValueError(f"{length} tokens are longer than the model's context of {model.anatomy.context}.")


def check_not_padding(model: TransformerBridge, tokens: Tensor) -> None:
    """Raise ValueError where a window [n, length] of two tokens or more holds nothing but the tokenizer's padding."""
    padding = getattr(getattr(model, "tokenizer", None), "pad_token_id", None)
    if padding is None or tokens.shape[1] < 2:
        return
    if empty := (tokens == padding).all(1).nonzero()[:, 0].tolist():
        raise ValueError(
            f"window {empty[0]} holds nothing but padding (token {padding}); leave it out, or fill it with text."
        )


def anatomy(model: TransformerBridge) -> Anatomy:
    """Describe a model's family: sizes, norm placement, gate, BOS habit, and the hooks to read it by.

    It is found once and kept as `model.anatomy`; `load` does so, a bridge of your own gets it here.

    Raises:
        ValueError: this is no model.
    """
    if isinstance(getattr(model, "anatomy", None), Anatomy):
        return model.anatomy
    if not hasattr(model, "original_model"):
        raise ValueError(f"{model!r} is no model; give what load returned.")
    cfg = model.cfg
    config = model.original_model.config.get_text_config()
    block = model.blocks[0]
    mlp = getattr(block, "mlp", None)
    experts = [getattr(config, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts")]
    n_experts = next(filter(None, experts), 0)
    if n_experts:  # there "gate" is the router's name
        gated = any(".gate_" in name for name, _ in mlp.named_parameters())
    else:
        gated = mlp is not None and "gate" in dict(mlp.named_children())
    if "ln1_post" in block.hook_aliases.get("hook_attn_out", ""):
        placement = "sandwich" if hasattr(block, "ln1") else "post"
    else:
        placement = "pre"
    norms = [name for name in ("ln1", "ln2") if placement != "post" and hasattr(block, name)]
    attention = block.attn.original_component
    layers = range(cfg.n_layers)
    model.anatomy = Anatomy(
        family=config.model_type,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_key_value_heads or cfg.n_heads,
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        d_mlp=_ffn_width(mlp, config, cfg.d_model) or cfg.d_mlp,
        d_vocab=cfg.d_vocab,
        context=cfg.n_ctx,
        norm="RMS" if cfg.uses_rms_norm else "LN",
        norm_placement=placement,
        norm_scale_offset=float(cfg.rmsnorm_uses_offset),
        norm_eps=cfg.eps,
        gate_activation=cfg.act_fn if gated else None,
        qk_norm="q_norm" in dict(block.attn.named_children()),
        parallel=bool(cfg.parallel_attn_mlp),
        n_experts=n_experts,
        residual_multiplier=float(getattr(config, "residual_multiplier", None) or 1),
        attention_norm=norms[0] if norms else None,
        ffn_norm=norms[-1] if norms else None,  # where the two blocks share one, it is the only one
        sight=_sight(config, cfg.n_layers),
        softcap=getattr(config, "attn_logit_softcapping", None),
        query_scale=float(getattr(attention, "scaling", None) or cfg.d_head**-0.5),
        sees_rotation=isinstance(block.attn, PositionEmbeddingsAttentionBridge),
        prepends_bos=bool(cfg.default_prepend_bos),
        bos_token=model.tokenizer.bos_token_id if model.tokenizer is not None else None,
        layer_hooks=(*(f"blocks.{i}.hook_in" for i in layers), f"blocks.{cfg.n_layers - 1}.hook_out"),
        write_hooks=tuple(
            # An alias in most families; Granite's block has hooks of its own, with its residual multiplier applied.
            f"blocks.{i}.{block.hook_aliases.get(hook, hook)}"
            for i in layers
            for hook in ("hook_attn_out", "hook_mlp_out")
        ),
        pattern_hooks=tuple(f"blocks.{i}.attn.hook_pattern" for i in layers),
        router_hooks=tuple(_router_hook(model.blocks[i], i) for i in layers),
        edits_pattern=_edits_pattern(block.attn),
        projects={"k", "v"} <= dict(block.attn.named_children()).keys(),
        separate_ffn=mlp is not None and block.mlp.name is not None,
        learned_sink=isinstance(getattr(attention, "sinks", None), Tensor),
    )
    return model.anatomy


def _edits_pattern(attention: torch.nn.Module) -> bool:
    """Where the family's own code has read the pattern before a hook sees it, a change of it goes nowhere."""
    delegates = getattr(type(attention), "forward", None) is AttentionBridge.forward
    return not delegates or bool(getattr(attention.original_component, "accepts_pattern_fn", False))


def _ffn_width(mlp: torch.nn.Module | None, config: PretrainedConfig, d_model: int) -> int | None:
    """Hidden neurons of a layer's FFN, or of one of its experts; None where that is not to be seen."""
    into = dict(mlp.named_children()).get("in") if mlp is not None else None
    if into is None:
        return getattr(config, "moe_intermediate_size", None)
    return into.weight.numel() // d_model  # by its size, as some families keep it transposed


def _router_hook(block: torch.nn.Module, layer: int) -> str | None:
    name = getattr(getattr(block, "mlp", None), "hook_aliases", {}).get("hook_expert_weights")
    return name and f"blocks.{layer}.mlp.{name}"


def _sight(config: PretrainedConfig, n_layers: int) -> tuple[int | None, ...]:
    """How far back each layer sees: sliding-window layers so many tokens, the others everything."""
    window = getattr(config, "sliding_window", None) or None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * n_layers
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def not_finite(model: TransformerBridge, what: str) -> str:
    """A sentence that says why something is not finite: a weight that is not, or else an overflow."""
    said = f"{what} is not finite in {str(model.cfg.dtype).removeprefix('torch.')}"
    whole = getattr(model, "original_model", model)
    wrong = [name for name, w in whole.named_parameters() if not w.is_meta and not w.isfinite().all()]
    narrow = model.cfg.dtype != torch.float32  # where rounding a weight or adding up can already overflow
    if wrong:
        name = wrong[0].replace("_original_component.", "")
        others = f", the first of {len(wrong)}" if len(wrong) > 1 else ""
        advice = "get the model again, or load it in float32" if narrow else "get the model again"
        return f"{said}, because the weight {name}{others} is not; {advice}."
    if narrow:
        return f"{said}; load it in float32."
    return f"{said}; its activations overflow, or weights that are on disk are not finite, so get the model again."
