"""A Llama-style decoder with everything that the families change, and a HookPoint wherever there is something to see.

Hooks and modules have the names that TransformerLens gives them in a bridge around a transformers model, and the model
says its own `anatomy`, so every measure and every intervention of the library works on it as it is.
"""

import zlib
from types import SimpleNamespace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

from spikesink.lab.config import BOS, Config
from spikesink.model.anatomy import Anatomy

EPS = 1e-6  # added to the mean square before the root
ROPE_BASE = 10_000.0
INIT_STD = 0.02  # of matrices
ALPHA = 1.0  # what DynamicTanh begins with; of 0.2, 0.5 and 1 the one whose loss falls at this width


class Linear(nn.Linear):
    """A matrix without a bias, whose input and output can be hooked."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__(d_in, d_out, bias=False)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_out(super().forward(self.hook_in(x)))


class RMSNorm(nn.Module):
    """x over its root mean square, h~, times a learned scale."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.hook_normalized = HookPoint()

    def forward(self, x):
        h = self.hook_normalized(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS))
        return h * self.weight


class DynamicTanh(nn.Module):
    """tanh(alpha x) in the place of a norm, times a learned scale (Zhu et al., arXiv:2503.10622)."""

    def __init__(self, width: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(ALPHA))
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.hook_normalized = HookPoint()

    def forward(self, x):
        return self.hook_normalized(torch.tanh(self.alpha * x)) * self.weight + self.bias


class Gate(nn.Module):
    """A sigmoid that what the heads give is multiplied by (Qiu et al., arXiv:2505.06708); "static" sees no input."""

    def __init__(self, config: Config):
        super().__init__()
        d_head, n_heads = config.heads
        self.shape = {"head": (n_heads, 1), "token": (1, 1)}.get(config.gate, (n_heads, d_head))
        width = self.shape[0] * self.shape[1]
        self.is_static = config.gate == "static"
        self.logit = nn.Parameter(torch.zeros(width)) if self.is_static else Linear(config.d_model, width)
        self.hook_gate = HookPoint()

    def forward(self, z, x):  # z (B, T, n_heads, d_head), x (B, T, d_model)
        logit = self.logit if self.is_static else self.logit(x)
        return z * self.hook_gate(torch.sigmoid(logit.unflatten(-1, self.shape)))


class Attention(nn.Module):
    """Causal attention with rotary positions; queries and keys may be normalised, what the heads give may be gated."""

    def __init__(self, config: Config):
        super().__init__()
        self.d_head, self.n_heads = config.heads
        inner = self.d_head * self.n_heads
        self.q, self.k, self.v = (Linear(config.d_model, inner) for _ in range(3))
        self.o = Linear(inner, config.d_model)
        if config.norm in ("sandwich_qk", "qk"):
            self.q_norm, self.k_norm = RMSNorm(self.d_head), RMSNorm(self.d_head)
        if config.gate != "none":
            self.gate = Gate(config)
        self.hook_rot_q, self.hook_rot_k, self.hook_attn_scores, self.hook_pattern = (HookPoint() for _ in range(4))
        cos, sin = _rotation(config.lengths[1], self.d_head)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        unseen = torch.ones(config.lengths[1], config.lengths[1], dtype=torch.bool).triu(1)
        self.register_buffer("unseen", unseen, persistent=False)

    def forward(self, x):  # (B, T, d_model)
        length = x.shape[1]
        q, k = self._normed("q", x), self._normed("k", x)  # (B, T, n_heads, d_head)
        v = self._headed(self.v, x)
        q, k = (_rotate(y, self.cos[:length], self.sin[:length]) for y in (q, k))
        q, k = self.hook_rot_q(q), self.hook_rot_k(k)
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * self.d_head**-0.5
        scores = self.hook_attn_scores(scores.masked_fill(self.unseen[:length, :length], -torch.inf))
        pattern = self.hook_pattern(scores.softmax(-1))
        z = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        if hasattr(self, "gate"):
            z = self.gate(z, x)
        z = self.o.hook_in(z)
        return self.o.hook_out(functional.linear(z.flatten(2), self.o.weight))

    def _headed(self, linear: Linear, x):
        return linear.hook_out(functional.linear(linear.hook_in(x), linear.weight).unflatten(-1, (-1, self.d_head)))

    def _normed(self, name: str, x):
        y, norm = self._headed(getattr(self, name), x), getattr(self, f"{name}_norm", None)
        return y if norm is None else norm(y)


class GatedFFN(nn.Module):
    """SwiGLU: out (silu(gate x) * (in x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_mlp)
        self.add_module("in", Linear(config.d_model, config.d_mlp))
        self.out = Linear(config.d_mlp, config.d_model)
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x):
        x = self.hook_in(x)
        return self.hook_out(self.out(functional.silu(self.gate(x)) * getattr(self, "in")(x)))


class PlainFFN(nn.Module):
    """Two matrices with GeLU between them, or with nothing."""

    def __init__(self, config: Config):
        super().__init__()
        self.add_module("in", Linear(config.d_model, config.d_mlp))
        self.out = Linear(config.d_mlp, config.d_model)
        self.activation = nn.GELU() if config.ffn == "gelu" else nn.Identity()
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_out(self.out(self.activation(getattr(self, "in")(self.hook_in(x)))))


class NoFFN(nn.Module):
    """Writes nothing, so that blocks are numbered as in every other model."""

    def __init__(self):
        super().__init__()
        self.hook_in, self.hook_out = HookPoint(), HookPoint()

    def forward(self, x):
        return self.hook_out(0 * self.hook_in(x))  # so that what it reads through has a gradient


class Block(nn.Module):
    """A layer: attention and FFN, each added to the stream; each reads it through a norm, or writes through one too."""

    def __init__(self, config: Config):
        super().__init__()
        norm = DynamicTanh if config.norm == "dynamic_tanh" else RMSNorm
        self.ln1, self.ln2 = norm(config.d_model), norm(config.d_model)
        if config.norm in ("sandwich", "sandwich_qk"):
            self.ln1_post, self.ln2_post = RMSNorm(config.d_model), RMSNorm(config.d_model)
        self.attn = Attention(config)
        self.mlp = {"swiglu": GatedFFN, "none": lambda _: NoFFN()}.get(config.ffn, PlainFFN)(config)
        self.hook_in, self.hook_attn_out, self.hook_mlp_out, self.hook_out = (HookPoint() for _ in range(4))

    def forward(self, h):
        h = self.hook_in(h)
        h = h + self.hook_attn_out(self._post("ln1_post", self.attn(self.ln1(h))))
        h = h + self.hook_mlp_out(self._post("ln2_post", self.mlp(self.ln2(h))))
        return self.hook_out(h)

    def _post(self, name: str, write):
        norm = getattr(self, name, None)
        return write if norm is None else norm(write)


class Decoder(HookedRootModule):
    """Tokens to logits. `stop_at_layer` gives the stream as it enters a layer instead, as in TransformerLens."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.d_vocab, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layers))
        self.ln_final = (DynamicTanh if config.norm == "dynamic_tanh" else RMSNorm)(config.d_model)
        self.unembed = Linear(config.d_model, config.d_vocab)
        for name, parameter in self.named_parameters():
            if parameter.ndim > 1:
                # By its own name, so that what two configurations have in common begins the same in both.
                drawn = torch.Generator().manual_seed(zlib.crc32(f"{config.seed} {name}".encode()))
                std = config.embedding if name == "embed.weight" else INIT_STD
                nn.init.normal_(parameter, std=std, generator=drawn)
        self.tokenizer, self.source = None, None
        self.anatomy = _anatomy(config)
        self.setup()

    @property
    def cfg(self) -> SimpleNamespace:
        """Where the model is and in what precision, by the names that a bridge's `cfg` has."""
        weight = self.embed.weight
        return SimpleNamespace(device=weight.device, dtype=weight.dtype, default_prepend_bos=self.config.bos)

    def forward(
        self, tokens: Int[Tensor, "window position"], stop_at_layer: int | None = None
    ) -> Float[Tensor, "window position width"]:
        h = self.embed(tokens)
        for block in self.blocks[:stop_at_layer]:
            h = block(h)
        return h if stop_at_layer is not None else self.unembed(self.ln_final(h))


def _anatomy(config: Config) -> Anatomy:
    layers = range(config.n_layers)
    return Anatomy(
        family="lab",
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_heads,
        d_model=config.d_model,
        d_head=config.d_head,
        d_mlp=config.d_mlp,
        d_vocab=config.d_vocab,
        context=config.lengths[1],
        norm="RMS",
        norm_placement="sandwich" if config.norm in ("sandwich", "sandwich_qk") else "pre",
        norm_scale_offset=0.0,
        norm_eps=EPS,
        gate_activation="silu" if config.ffn == "swiglu" else None,
        qk_norm=config.norm in ("sandwich_qk", "qk"),
        parallel=False,
        n_experts=0,
        residual_multiplier=1.0,
        attention_norm="ln1",
        ffn_norm="ln2",
        sight=(None,) * config.n_layers,
        softcap=None,
        query_scale=config.d_head**-0.5,
        sees_rotation=True,
        prepends_bos=config.bos,
        bos_token=BOS,
        layer_hooks=(*(f"blocks.{i}.hook_in" for i in layers), f"blocks.{config.n_layers - 1}.hook_out"),
        write_hooks=tuple(f"blocks.{i}.{name}" for i in layers for name in ("hook_attn_out", "hook_mlp_out")),
        pattern_hooks=tuple(f"blocks.{i}.attn.hook_pattern" for i in layers),
        router_hooks=(None,) * config.n_layers,
    )


def _rotation(length: int, d_head: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of every position's angles, [position, 1, d_head]; the two halves of a head turn as pairs."""
    frequency = ROPE_BASE ** -(torch.arange(0, d_head, 2) / d_head)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)[:, None]
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin
