"""What a model must prove: each part fails where the model breaks it, and what needs it is n/a in its words."""

import pytest
import torch
import transformers

import spikesink
from spikesink import patching
from spikesink.chain import keys, sinks
from spikesink.chain.amplifier import census
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.model import proof
from spikesink.model.paths import static_path
from spikesink.model.weights import weights_of
from tests import planted
from tests.test_families import GROUPED

MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 16}
FOUR = GROUPED | {"num_hidden_layers": 4}
HYBRIDS = {
    "lfm2": transformers.Lfm2Config(**FOUR, layer_types=["conv", "full_attention"] * 2),
    "bamba": transformers.BambaConfig(**FOUR, **MAMBA, attn_layer_indices=[1, 3]),
    "jamba": transformers.JambaConfig(
        **FOUR, attn_layer_period=2, attn_layer_offset=1, num_experts=2, use_mamba_kernels=False, mamba_d_state=8
    ),
}


def made(config, folder, spread=0.15):
    """A random model whose attention is not even."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.copy_(spread * torch.randn_like(weight))
    return spikesink.load(planted.save(model, folder))


@pytest.mark.parametrize("part", ["writes", "patterns", "logits", "norm", "keys", "attention", "FFN"])
def test_a_part_that_is_broken_on_purpose_fails(part, random_directory):
    model = spikesink.load(random_directory)
    assert proof._prove(model).holds(*proof.PARTS)
    places = {"writes": "hook_out", "patterns": "attn.hook_pattern", "norm": "ln1.hook_normalized"}
    places |= {"logits": "attn.hook_attn_scores", "keys": "attn.k.hook_out", "attention": "attn.o.hook_in"}
    places |= {"FFN": "mlp.hook_out"}
    noise = torch.Generator().manual_seed(0)

    def disturb(value, hook):
        return value * 0.9 + 0.1 * torch.rand(value.shape, generator=noise)

    with model.hooks(fwd_hooks=[(f"blocks.1.{places[part]}", disturb)]):
        assert not proof._prove(model).holds(part)


def test_what_a_broken_weight_proves_is_not_kept_for_the_whole_model(random_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path))
    broken = spikesink.load(random_directory)
    broken.original_model.model.layers[1].mlp.down_proj.weight[3] = torch.nan
    proof.prove(broken)
    assert not (tmp_path / "proofs").exists()
    assert set(proof.prove(spikesink.load(random_directory)).errors) == set(proof.PARTS)
    assert len(list((tmp_path / "proofs").iterdir())) == 1


def test_where_writes_do_not_add_up_there_is_a_spike_and_no_step_up(tmp_path):
    config = transformers.FalconH1Config(**FOUR, **MAMBA, head_dim=16, mamba_d_ssm=128)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    model.model.layers[1].mamba.out_proj.weight[9] *= 3e5  # a writer besides attention and FFN
    model = spikesink.load(planted.save(model, tmp_path))
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, spikesink.windows(model, "house", 3, 32)))
    assert (life.main.channel, life.main.step_up, life.main.step_down) == (9, (), ())
    assert life.main.stream[4].abs() > 100 * life.trace.medians[4] > life.main.stream[2].abs()
    for judge in (evidence.lc1_step_up, evidence.lc2_plateau, evidence.lc3_step_down):
        assert "do not add up to its stream" in judge(life).reason
    assert not isinstance(evidence.lc4_few_channels(life), NotApplicable)


@pytest.mark.parametrize("name", HYBRIDS)
def test_hybrids_are_measured_in_the_layers_that_have_attention(name, tmp_path):
    model = made(HYBRIDS[name], tmp_path)
    assert model.anatomy.attention_layers == (1, 3)
    tokens = spikesink.windows(model, "house", 2, 24)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    plain = theirs(tokens, output_attentions=True, output_hidden_states=True, use_cache=False)
    scores, trace = sinks.score(model, tokens), spikesink.trace_windows(model, tokens)
    for layer, attention in zip((1, 3), [a for a in plain.attentions if a is not None], strict=True):
        torch.testing.assert_close(scores.at[:, layer], attention[..., 0].mean(-1), rtol=1e-5, atol=1e-5)
    assert scores.at[:, [0, 2]].isnan().all()
    assert scores.ratio() == pytest.approx(float((scores.at[:, [1, 3]] > 0.3).float().mean()))
    assert trace.proof.holds("writes", "patterns")
    median = torch.stack([plain.hidden_states[2][w].abs().median() for w in range(2)]).mean()
    torch.testing.assert_close(trace.medians[4], median, rtol=1e-5, atol=0)
    assert patching.evaluate(model, tokens, epsilon=0.1).sink_ratio == pytest.approx(scores.ratio(0.1))
    with pytest.raises(ValueError, match=r"layer 0 .* shows no attention"):
        patching.evaluate(model, tokens, patching.mask_key(0, [0]))


def test_a_window_by_another_name_is_seen_in_the_pattern(tmp_path):
    config = transformers.GPTNeoConfig(
        hidden_size=64, num_layers=4, num_heads=4, vocab_size=400, intermediate_size=96, window_size=8,
        max_position_embeddings=512, attention_types=[[["global", "local"], 2]],
    )  # fmt: skip
    model = made(config, tmp_path)
    tokens = spikesink.windows(model, "house", 2, 32)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    attentions = theirs(tokens, output_attentions=True).attentions
    scores = sinks.score(model, tokens)
    for layer, seen in enumerate((32, 8, 32, 8)):
        torch.testing.assert_close(scores.at[:, layer], attentions[layer][..., 0].sum(-1) / seen, rtol=1e-5, atol=1e-6)
    assert model.anatomy.sight == (None, 8, None, 8)


@pytest.mark.parametrize("where", ["window", "chunk", "everywhere", "nobody attends to the first", "rounded to zero"])
def test_what_is_in_sight_is_a_window_a_chunk_or_all(where):
    queries, keys = torch.arange(64)[:, None], torch.arange(64)
    sees = keys <= queries
    if where in ("window", "rounded to zero"):
        sees = sees & (queries - keys < 8)
    if where == "chunk":
        sees = sees & (queries // 16 == keys // 16)
    pattern = (torch.rand(2, 64, 64) + 0.1) * sees
    if where == "nobody attends to the first":
        pattern[:, 1:, 0] = 0
    if where == "rounded to zero":
        pattern[:, [20, 40], [13, 33]] = 0
    assert torch.equal(proof.visible(pattern), sees)


def test_a_cut_in_force_is_no_part_of_the_proof(random_directory, tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path))
    model = spikesink.load(random_directory)
    with patching.patched(model, patching.scale(patching.stream(patching.mlp(1)), 0.5)):
        assert proof.prove(model).holds(*proof.PARTS)
        spikesink.trace_windows(model, spikesink.windows(model, "house", 1, 16))


def test_a_measure_says_which_part_it_lacks(planted_life, planted_model, trigger_tokens, monkeypatch):
    for part, measured in {
        "patterns": lambda: sinks.score(planted_model, trigger_tokens),
        "logits": lambda: keys.read_attention(planted_model, trigger_tokens, planted_life, NotApplicable("-")).geometry,
        "attention": lambda: static_path(weights_of(planted_model), trigger_tokens[0], 4),
        "FFN": lambda: census(weights_of(planted_model)),
    }.items():
        lacking = proof.Proof({}, {part: f"no {part}"})
        monkeypatch.setattr(planted_model, "proof", lacking)
        assert measured() == NotApplicable(f"no {part}")
