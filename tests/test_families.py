"""Tiny random models of many families: anatomy tells them apart, and what their blocks write adds up to the stream."""

from pathlib import Path

import pytest
import torch
import transformers

import spikesink
from tests import planted

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 400,
    "max_position_embeddings": 512,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
# class, configuration, and what anatomy must say: norm, placement, scale offset, gate, parallel, QK norm
FAMILIES = {
    "llama": ("Llama", GROUPED, ("RMS", "pre", 0, "silu", False, False)),
    "mistral": ("Mistral", GROUPED, ("RMS", "pre", 0, "silu", False, False)),
    "qwen2": ("Qwen2", GROUPED, ("RMS", "pre", 0, "silu", False, False)),
    "qwen3": ("Qwen3", GROUPED | {"head_dim": 16}, ("RMS", "pre", 0, "silu", False, True)),
    "gemma2": ("Gemma2", GROUPED | {"head_dim": 16}, ("RMS", "sandwich", 1, "gelu_pytorch_tanh", False, False)),
    "gemma3": ("Gemma3", GROUPED | {"head_dim": 16}, ("RMS", "sandwich", 1, "gelu_pytorch_tanh", False, True)),
    "olmo2": ("Olmo2", GROUPED, ("RMS", "post", 0, "silu", False, True)),
    "phi3": ("Phi3", GROUPED | {"pad_token_id": 0}, ("RMS", "pre", 0, "silu", False, False)),
    "granite": ("Granite", GROUPED | {"residual_multiplier": 0.5}, ("RMS", "pre", 0, "silu", False, False)),
    "stablelm": ("StableLm", GROUPED, ("LN", "pre", 0, "silu", False, False)),
    "mixtral": ("Mixtral", GROUPED | {"num_local_experts": 4}, ("RMS", "pre", 0, "silu", False, False)),
    "gpt_neox": ("GPTNeoX", SIZES, ("LN", "pre", 0, None, True, False)),
    "gpt2": (
        "GPT2",
        {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "vocab_size": 400},
        ("LN", "pre", 0, None, False, False),
    ),
}


def tiny(family: str, folder: Path) -> Path:
    """The directory of a tiny random model of a family."""
    name, sizes, _ = FAMILIES[family]
    config_name = {"Gemma3": "Gemma3TextConfig"}.get(name, f"{name}Config")
    class_name = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**sizes)
    return planted.save(getattr(transformers, class_name)(config).eval(), folder / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_writes_add_up_to_the_stream_in_every_family(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    _, sizes, expected = FAMILIES[family]
    about = spikesink.anatomy(model)
    found = (
        about.norm,
        about.norm_placement,
        about.norm_scale_offset,
        about.gate_activation,
        about.parallel,
        about.qk_norm,
    )
    assert found == expected
    assert (about.n_blocks, about.d_model, about.n_heads) == (6, 64, 4)
    assert about.n_experts == (4 if family == "mixtral" else 0)
    assert about.residual_multiplier == (0.5 if family == "granite" else 1)
    assert about.n_kv_heads == (2 if "num_key_value_heads" in sizes else 4)
    trace = spikesink.trace_windows(model, spikesink.windows(model, "house", 2, 32))
    assert trace.closure < 1e-6
    assert spikesink.find_lifecycle(trace).main is None
