"""Kinds of model that people report trouble with: right against transformers, or n/a with the reason that is true.

Each is a tiny random model that is held against transformers as `make families` does it (`survey.compare`): logits, the
stream, the attention on position 0, the static path of first tokens, the gaps of logits. What a model does not prove
must be exactly what is named here.
"""

import re

import pytest
import torch

import spikesink
from spikesink.__main__ import main
from tests import planted, survey

NOT_QK = {"logits": "is not the softmax of q.k times one scale"}
NOT_ALONE = {"attention": "does not give a token alone W_O W_V h~"}
HYBRID = {"attention": "2 of 4 layers of this .* model show no attention"}
ODD_FFN = {"FFN": "FFN of this .* cannot be checked"}
OTHER_WRITER = {"writes": "something else writes"}
GATED = {**HYBRID, "logits": "its queries come with something else"}
ALL_WITHOUT = dict.fromkeys(("patterns", "keys", "logits", "attention"), "4 of 4 layers of this .* show no attention")
OTHERWISE = "runs it otherwise than transformers does .logits off by"
NO_VARIANT = "not built as those of the families that can be read .*; try one of another family"
# Kind, class, what its configuration has of its own; which parts fail and why, or with which sentence it is refused.
CASES = [
    ("hooks that carry something else", "OPT", {}, ODD_FFN),
    ("hooks that carry something else", "GPTJ", {}, NOT_QK),
    ("hooks that carry something else", "GPTNeo", {}, NOT_QK),
    ("hooks that carry something else", "CodeGen", {}, {}),
    ("hooks that carry something else", "XGLM", {}, ODD_FFN),
    ("hooks that carry something else", "GPT2LMHeadModel", {}, {}),
    ("logits that are more than q.k", "Mpt", {}, NOT_QK | ODD_FFN),
    ("logits that are more than q.k", "Bloom", {}, NOT_QK | ODD_FFN),
    ("logits that are more than q.k", "GPT2LMHeadModel", {"scale_attn_by_inverse_layer_idx": True}, NOT_QK),
    ("logits that are more than q.k", "Falcon", {"alibi": True, "multi_query": False, "parallel_attn": False}, NOT_QK),
    ("logits that are more than q.k", "NanoChat", {}, NOT_QK),
    ("logits that are more than q.k", "Llama4", {}, NOT_QK | ODD_FFN),
    ("logits that are more than q.k", "Granite", {"attention_multiplier": 0.5}, {}),
    ("logits that are more than q.k", "Gemma2", {"attn_logit_softcapping": 1.0}, {}),
    ("writers besides attention and FFN", "FalconH1", {}, OTHER_WRITER | {"FFN": "do not give what their weights say"}),
    ("writers besides attention and FFN", "OPT", {"do_layer_norm_before": False}, NO_VARIANT),
    ("writers besides attention and FFN", "OPT", {"word_embed_proj_dim": 32}, ODD_FFN),
    ("writers besides attention and FFN", "Granite", {"residual_multiplier": 0.3}, {}),
    ("writers besides attention and FFN", "StableLm", {"use_parallel_residual": True, "qk_layernorm": True}, {}),
    ("writers besides attention and FFN", "GPTNeoX", {"use_parallel_residual": False}, {}),
    ("attention that is no W_O W_V", "Olmo", {"clip_qkv": 0.05}, NOT_ALONE),
    ("attention that is no W_O W_V", "Olmoe", {"clip_qkv": 0.05}, NOT_ALONE),
    ("attention that is no W_O W_V", "Mpt", {"attn_config": {"clip_qkv": 0.05}}, NOT_QK | NOT_ALONE | ODD_FFN),
    ("attention that is no W_O W_V", "GptOss", {}, NOT_ALONE),
    ("attention that is no W_O W_V", "Afmoe", {}, NOT_QK | NOT_ALONE),
    ("attention that is no W_O W_V", "Qwen3Next", {}, GATED),
    ("attention that is no W_O W_V", "Qwen3_5", {}, GATED),
    ("windows by whatever name", "Gemma3", {}, {}),
    ("windows by whatever name", "Mistral", {"sliding_window": 8}, {}),
    ("windows by whatever name", "Phi3", {"sliding_window": 8}, {}),
    ("windows by whatever name", "Qwen2", {"use_sliding_window": True, "max_window_layers": 2}, {}),
    ("windows by whatever name", "Cohere2", {"sliding_window": 8}, {}),
    ("layers without attention", "Lfm2", {}, HYBRID),
    ("layers without attention", "Jamba", {}, HYBRID),
    ("layers without attention", "Bamba", {}, HYBRID),
    ("layers without attention", "Mamba", {}, ALL_WITHOUT | ODD_FFN),
    ("layers without attention", "NemotronH", {}, ALL_WITHOUT | ODD_FFN),
    ("layers without attention", "GraniteMoeHybrid", {}, NO_VARIANT),
    ("heads that differ by layer", "Gemma4", {}, None),
    ("heads that differ by layer", "Gemma4", {"num_kv_shared_layers": 2}, None),
    ("heads that differ by layer", "Gemma4", {"attention_k_eq_v": True}, None),
    ("variants that the bridge lacks", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, NO_VARIANT),
    ("variants that the bridge lacks", "GPTBigCode", {"multi_query": False}, NO_VARIANT),
    ("variants that the bridge runs otherwise", "GPT2LMHeadModel", {"scale_attn_weights": False}, OTHERWISE),
    ("variants that the bridge runs otherwise", "Gemma3", {"attn_logit_softcapping": 2.0}, OTHERWISE),
    ("variants that the bridge has", "GPTBigCode", {"multi_query": True}, {}),
    ("variants that the bridge has", "Llama", {"attention_bias": True, "mlp_bias": True}, {}),
    ("variants that the bridge has", "Llama", {"tie_word_embeddings": True}, {}),
    ("variants that the bridge has", "Llama", {"head_dim": 24}, {}),
]  # fmt: skip
SHARED = {
    **OTHER_WRITER,
    "norm": "cannot be checked",
    "keys": "shared, or heads of another width",
    "logits": "cannot be checked",
    "attention": "shared, or heads of another width",
}


def name(case) -> str:
    return f"{case[0]}: {case[1]} {' '.join(case[2])}"


@pytest.mark.parametrize(("kind", "family", "own", "expected"), CASES, ids=map(name, CASES))
def test_it_is_right_or_says_why_not(kind, family, own, expected, tmp_path):
    architecture = family if family.endswith("Model") else f"{family}ForCausalLM"
    row = survey.survey(architecture, tmp_path / "model", with_claims=False, **own)
    assert row.wrong == []
    if isinstance(expected, str):
        assert re.search(expected, row.refused)
        return
    expected = SHARED if expected is None else expected
    assert row.refused == ""
    assert set(row.reasons) == set(expected)
    for part, words in expected.items():
        assert re.search(words, row.reasons[part])


ROPE = {"rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 32}
BY_POSITION = {"llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
LONG = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}


@pytest.mark.parametrize(
    ("family", "own"),
    [
        ("Llama", {"rope_parameters": {**ROPE, "rope_type": "yarn"}}),
        ("Ministral3", {"rope_parameters": {**ROPE, **BY_POSITION, "rope_type": "yarn"}}),
        ("Phi3", {"rope_parameters": {**ROPE, **LONG}, "original_max_position_embeddings": 32}),
        ("Gemma3", {"sliding_window": 100}),
        ("GPTNeo", {"window_size": 100}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 100, "max_window_layers": 2}),
    ],
)
def test_it_is_right_beyond_the_few_tokens_that_the_proof_is_of(family, own, tmp_path):
    """What begins later: other rotations, queries that grow with their position, windows."""
    row = survey.survey(
        f"{family}ForCausalLM", tmp_path / "model", with_claims=False, length=300, tolerance=1e-3, **own
    )
    assert (row.refused, row.wrong) == ("", [])


@pytest.mark.parametrize("family", ["Bloom", "Mpt", "GPTBigCode", "Gemma4", "Lfm2"])
def test_probe_and_scan_of_odd_families_are_a_result_or_a_sentence(family, tmp_path, capsys):
    planted.save(survey.build(f"{family}ForCausalLM"), tmp_path / "model")
    places = ["--figures", str(tmp_path / "figures"), "--build", str(tmp_path / "build")]
    for command in (["probe"], ["scan", *places], ["census"]):
        options = [] if command == ["census"] else ["--entries", "40"]
        code = main([command[0], str(tmp_path / "model"), *command[1:], *options])
        printed = capsys.readouterr()
        said = (printed.out + printed.err).strip()
        assert code in (0, 1)
        assert said.splitlines()[-1].endswith((".", "scan.json")) or "||U_k||_F" in said


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["Olmo2", "CodeGen", "GPTJ", "Gemma2", "Mpt", "Falcon"])
def test_what_transformers_runs_in_half_precision_runs(family, dtype, tmp_path):
    theirs = survey.build(f"{family}ForCausalLM")
    theirs = type(theirs)(theirs.config).eval()  # without the spike, whose rounding would be all that is seen
    planted.save(theirs, tmp_path)
    tokens = torch.randint(4, survey.VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))
    ours = spikesink.load(tmp_path, dtype=dtype)(tokens).float()
    plain = theirs.to(getattr(torch, dtype))(tokens).logits.float()
    assert float((ours - plain).abs().max() / plain.abs().max()) < 0.1
