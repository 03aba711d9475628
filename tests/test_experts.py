"""A mixture of experts: the census against forming each form, and the router's choice on a spike that was planted."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional

import spikesink
from spikesink.chain import amplifier, experts
from spikesink.ledger import claims, evidence
from spikesink.model.anatomy import mlp
from spikesink.model.weights import weights_of
from tests import planted, spiking
from tests.test_families import GROUPED, tiny

MOE = {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 56}


def make_moe(name: str, **more) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**GROUPED | MOE | more)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def test_the_census_is_that_of_every_expert_by_itself(tmp_path):
    mixtral = spikesink.load(tiny("mixtral", tmp_path))
    census = experts.census_experts(weights_of(mixtral))
    assert census.gain.shape == (3 * 4, 64)
    assert census.blocks == (mlp(0),) * 4 + (mlp(1),) * 4 + (mlp(2),) * 4
    assert census.experts == ("0", "1", "2", "3") * 3
    layer = mixtral.original_model.model.layers[1]
    own, scale = layer.mlp.experts, layer.post_attention_layernorm.weight
    gate, up = own.gate_up_proj[2].chunk(2)
    u = torch.einsum("m,md,me->de", own.down_proj[2, 7], gate * scale, up * scale)
    assert float(census.gain[6, 7]) == pytest.approx(float(u.norm()), rel=1e-5)
    block, expert, channel, gain = census.top(3)[0]
    row = list(zip(census.blocks, census.experts, strict=True)).index((block, expert))
    assert gain == float(census.gain.max()) == float(census.gain[row, channel])


@pytest.mark.parametrize(("name", "shared"), [("Qwen3Moe", False), ("Qwen2Moe", True)])
def test_what_each_expert_writes_is_what_the_models_own_code_makes_of_it(name, shared, tmp_path, monkeypatch):
    """Against transformers' own modules, with a router that is far from sure."""
    hf_model = spiking.make_spike(make_moe(name, num_hidden_layers=spiking.N_LAYERS))
    (tmp_path / "text.txt").write_text(planted.text(3, 32))
    model = spikesink.load(planted.save(hf_model, tmp_path / name))
    tokens = spikesink.windows(model, str(tmp_path / "text.txt"), 3, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    routing = experts.route(model, tokens, life)
    assert (routing.block, routing.channel, routing.shares) == (mlp(spiking.STEP_UP), spiking.CHANNEL, shared)

    layer, passed = hf_model.model.layers[spiking.STEP_UP].mlp, {}
    layer.register_forward_hook(lambda module, args, output: passed.update(h=args[0], out=output))
    hf_model(tokens)
    spikes = (tokens == 1).flatten()
    h = passed["h"].flatten(0, 1)[spikes]
    out = passed["out"][0] if isinstance(passed["out"], tuple) else passed["out"]
    chances = (h @ layer.gate.weight.T).softmax(-1)
    chosen = chances * (chances >= chances.topk(2).values[:, -1:])
    chosen = chosen / chosen.sum(-1, keepdim=True) if hf_model.config.norm_topk_prob else chosen
    writes = []
    for both, down in zip(layer.experts.gate_up_proj, layer.experts.down_proj, strict=True):
        gate, up = (h @ both.T).chunk(2, dim=-1)
        writes.append((functional.silu(gate) * up) @ down[spiking.CHANNEL])
    assert torch.equal(routing.is_spike, spikes)
    assert 0.1 < float(chosen[chosen > 0].min()) < float(chosen.max()) < 0.9
    torch.testing.assert_close(routing.weight[spikes], chosen, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(routing.write, chosen * torch.stack(writes, dim=1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(routing.own, out.flatten(0, 1)[spikes, spiking.CHANNEL], rtol=1e-4, atol=1e-3)

    ffns = weights_of(model).experts(spiking.STEP_UP)
    rest = torch.zeros(len(h))
    if shared:
        norm = hf_model.model.layers[spiking.STEP_UP].post_attention_layernorm.weight
        written = amplifier.compute_write(ffns["shared_expert"], h / norm)[:, spiking.CHANNEL]
        rest = torch.sigmoid(h @ layer.shared_expert_gate.weight[0]) * written
    torch.testing.assert_close(routing.write.sum(1) + rest, routing.own, rtol=1e-4, atol=1e-2)
    share = evidence.x_mx2_one_writer(routing).measured["share_of_all_experts"]
    assert (share == pytest.approx(1, abs=1e-4)) != shared
    gains = torch.stack([amplifier.gains(ffn) for name, ffn in ffns.items() if name.isdecimal()], 1).float()
    torch.testing.assert_close(routing.gain, gains[spiking.CHANNEL])
    torch.testing.assert_close(routing.gain_ordinary, gains[life.trace.channels[life.trace.ordinary]])

    def of_the_chosen(*args):  # what some families' hooks give
        h, own, weight = amplifier.cache_hooks(*args)
        return h, own, weight[:, :2]

    monkeypatch.setattr(experts, "cache_hooks", of_the_chosen)
    assert "a weight for each expert" in experts.route(model, tokens, life).reason


def test_layers_without_a_router_have_one_ffn(tmp_path):
    model = spikesink.load(planted.save(make_moe("Qwen3Moe", mlp_only_layers=[0]), tmp_path))
    assert model.anatomy.router_hooks[0] is None
    census = experts.census_experts(weights_of(model))
    assert census.experts == ("mlp", *("0", "1", "2", "3") * 2)
    assert census.blocks == (mlp(0), *[mlp(1)] * 4, *[mlp(2)] * 4)
    assert census.gain[0].max() > 0


def test_where_there_is_no_census_it_says_why(planted_model, tmp_path):
    gpt_oss = spikesink.load(planted.save(make_moe("GptOss", num_local_experts=4), tmp_path))
    for model, reason in ((gpt_oss, "not known here"), (planted_model, "no router chooses")):
        assert reason in experts.census_experts(weights_of(model)).reason


def test_no_routing_without_a_router_that_can_be_seen_or_of_other_windows(
    planted_model, planted_life, trigger_tokens, monkeypatch
):
    with pytest.raises(ValueError, match="windows"):
        experts.route(planted_model, trigger_tokens[:5], planted_life)
    unseen = replace(planted_model.anatomy, n_experts=4, router_hooks=(None,) * 6)
    monkeypatch.setattr(planted_model, "anatomy", unseen)
    assert "can be seen in L1 MLP (block 4)" in experts.route(planted_model, trigger_tokens, planted_life).reason


def by_hand(**changed) -> experts.Routing:
    """Three experts, two spike tokens that are sent to the second with weight 0.9, and two others."""
    values = {
        "block": mlp(1),
        "channel": 9,
        "experts": ("0", "1", "2"),
        "is_spike": torch.tensor([True, True, False, False]),
        "weight": torch.tensor([[0, 0.9, 0.1], [0.1, 0.9, 0], [1, 0, 0], [0, 0.6, 0.4]]),
        "write": torch.tensor([[0.0, 90, 10], [10, 90, 0]]),
        "own": torch.tensor([100.0, 100]),
        "shares": False,
        "gain": torch.tensor([1.0, 8, 2]),
        "gain_ordinary": torch.tensor([[3.0, 1, 2], [3, 2, 1], [1, 2, 3]]),
    }
    return experts.Routing(**values | changed)


def test_the_choice_and_the_writer_by_hand():
    chosen, written = evidence.x_mx1_same_choice(by_hand()), evidence.x_mx2_one_writer(by_hand())
    assert chosen.measured["expert"] == written.measured["expert"] == "1"
    assert (chosen.measured["share_of_spike_tokens"], chosen.measured["share_of_other_tokens"]) == (1, 0.5)
    assert (chosen.measured["weight"], chosen.measured["n_chosen"]) == (pytest.approx(0.9), 2)
    assert chosen.control == {"share_if_even": 1 / 3, "weight_other_tokens": pytest.approx(0.3)}
    assert written.measured["share_written"] == pytest.approx(0.9)
    assert written.measured["share_of_all_experts"] == 1
    assert (written.measured["gain_rank"], written.measured["gain_over_median"]) == (1, 4)
    assert written.control == {"gain_rank_ordinary_channels": 2}
    assert claims.judge("X-MX1", chosen, "04").verdict == claims.judge("X-MX2", written, "04").verdict == "holds"
    other = by_hand(gain=torch.tensor([9.0, 8, 2]), weight=torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    assert claims.judge("X-MX1", evidence.x_mx1_same_choice(other), "04").verdict == "differs"
    assert claims.judge("X-MX2", evidence.x_mx2_one_writer(other), "04").verdict == "differs"
    for sign in (1, -1):
        assert by_hand(write=torch.tensor([[0.0, -90, 10], [10, 90 * sign, 0]])).writer == 1
