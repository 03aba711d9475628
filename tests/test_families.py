"""Tiny random models of many families: anatomy tells them apart, and what their blocks write adds up to the stream."""

import warnings
from pathlib import Path

import pytest
import torch
import transformers

import spikesink
from spikesink import patching
from tests import planted

GROUPED = planted.SIZES | {"num_hidden_layers": 3}
SIZES = {key: value for key, value in GROUPED.items() if key != "num_key_value_heads"}
UNSAID = {key: value for key, value in SIZES.items() if key != "intermediate_size"}  # its name is another
# What anatomy must say: norm, placement, scale offset, gate, parallel, QK norm.
LLAMA, GPT = ("RMS", "pre", 0, "silu", False, False), ("LN", "pre", 0, None, False, False)
GEMMA, NEOX = ("RMS", "sandwich", 1, "gelu_pytorch_tanh", False), ("LN", "pre", 0, None, True, False)
# Class, configuration, and what anatomy must say.
FAMILIES = {
    "llama": ("Llama", GROUPED, LLAMA),
    "mistral": ("Mistral", GROUPED, LLAMA),
    "qwen2": ("Qwen2", GROUPED, LLAMA),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}, ("RMS", "pre", 0, "silu", False, True)),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 16}, (*GEMMA, False)),
    "gemma3": ("Gemma3", GROUPED | {"head_dim": 16}, (*GEMMA, True)),
    "olmo2": ("Olmo2", GROUPED, ("RMS", "post", 0, "silu", False, True)),
    "phi3": ("Phi3", GROUPED | {"pad_token_id": 0}, LLAMA),
    "granite": ("Granite", GROUPED | {"residual_multiplier": 0.5}, LLAMA),
    "stablelm": ("StableLm", GROUPED, ("LN", "pre", 0, "silu", False, False)),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}, LLAMA),
    "gpt_neox": ("GPTNeoX", SIZES, NEOX),
    "gpt2": ("GPT2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 400}, GPT),
}

# Families that only what goes through every family sees: built as one of those above, but for one thing.
MORE = {
    "olmo": ("Olmo", GROUPED, ("LN", "pre", 0, "silu", False, False)),  # its norms learn nothing
    "falcon": ("Falcon", UNSAID | {"ffn_hidden_size": 96}, NEOX),  # one K/V head for all
    "opt": ("OPT", UNSAID | {"ffn_dim": 96, "word_embed_proj_dim": 64}, GPT),  # learned positions
    "qwen3_moe": (
        "Qwen3Moe",
        GROUPED | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
        ("RMS", "pre", 0, "silu", False, True),
    ),
    # a learned logit in every softmax, so that a first token does not attend to itself alone
    "gpt_oss": ("GptOss", GROUPED | {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}, LLAMA),
    "deepseek_v3": (  # keys and values are made of a compressed vector; the first layer has one FFN and no router
        "DeepseekV3",
        GROUPED
        | {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
        | {"n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16}
        | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16, "num_key_value_heads": 4},
        LLAMA,
    ),
}


def n_experts(family: str) -> int:
    """How many FFNs a router chooses from; 0 without one."""
    sizes = (FAMILIES | MORE)[family][1]
    return next((sizes[key] for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in sizes), 0)


def build(family: str, **sizes: int) -> transformers.PreTrainedModel:
    """A tiny random model of a family; `sizes` are put in place of its own."""
    name, own, _ = (FAMILIES | MORE)[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**own | sizes)
    return getattr(transformers, class_name)(config).eval()


def tiny(family: str, folder: Path) -> Path:
    """The directory of a tiny random model of a family."""
    return planted.save(build(family), folder / family)


# Of one expert; four times d_model, as nothing else was said.
WIDTHS = {"qwen3_moe": 48, "deepseek_v3": 48, "gpt2": 256}


@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_anatomy_tells_families_apart_and_writes_add_up_to_the_stream(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    _, sizes, expected = (FAMILIES | MORE)[family]
    shape = model.anatomy
    norm = (shape.norm, shape.norm_placement, shape.norm_scale_offset)
    assert (*norm, shape.gate_activation, shape.parallel, shape.qk_norm) == expected
    assert (shape.n_blocks, shape.d_model, shape.n_heads) == (6, 64, 4)
    assert shape.n_kv_heads == (1 if family == "falcon" else sizes.get("num_key_value_heads", 4))
    assert (shape.d_mlp, shape.n_experts) == (WIDTHS.get(family, 96), n_experts(family))
    assert shape.residual_multiplier == (0.5 if family == "granite" else 1)
    assert shape.projects == (family != "deepseek_v3")
    assert shape.separate_ffn == (family != "opt")
    assert shape.learned_sink == (family == "gpt_oss")
    tokens = spikesink.windows(model, "house", 2, 32)
    trace = spikesink.trace_windows(model, tokens)
    assert trace.closure < 1e-6
    assert spikesink.find_lifecycle(trace).main is None
    with warnings.catch_warnings(), model.hooks(fwd_hooks=[(shape.pattern_hooks[1], lambda value, hook: value * 0)]):
        warnings.simplefilter("ignore")  # where it goes nowhere, TransformerLens says so
        without = model(tokens)
    assert shape.edits_pattern == (family != "opt") == (not torch.equal(without, model(tokens)))


def test_a_pattern_that_no_hook_can_change_is_not_masked(tmp_path):
    model = spikesink.load(tiny("opt", tmp_path))
    with pytest.raises(ValueError, match="has read its pattern before a hook can change it"):
        patching.evaluate(model, spikesink.windows(model, "house", 2, 32), patching.mask_key(0, 1))
