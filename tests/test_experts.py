"""A mixture of experts: the census against forming each form, and the router's choice on a spike that was planted."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional

import spikesink
from spikesink.chain import amplifier, experts
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model.anatomy import Block
from spikesink.model.weights import weights_of
from tests import planted, spiking
from tests.test_families import GROUPED, tiny


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    return spikesink.load(tiny("mixtral", tmp_path_factory.mktemp("experts")))


def test_the_census_is_that_of_every_expert_by_itself(mixtral):
    weights = weights_of(mixtral)
    found = experts.census(weights)
    assert found.gain.shape == (3 * 4, 64)
    assert list(found.blocks) == [2] * 4 + [4] * 4 + [6] * 4
    layer = mixtral.original_model.model.layers[1]
    own, scale = layer.mlp.experts, layer.post_attention_layernorm.weight
    gate, up = own.gate_up_proj[2].chunk(2)
    u = torch.einsum("m,md,me->de", own.down_proj[2, 7], gate * scale, up * scale)
    assert found.of(4, 7)["2"] == pytest.approx(float(u.norm()), rel=1e-5)
    block, expert, channel, gain = found.top(3)[0]
    assert gain == float(found.gain.max()) == found.of(block, channel)[expert]
    some = experts.census(weights, [1])
    assert torch.equal(some.gain, found.gain[4:8])
    with pytest.raises(ValueError, match="channel 7 is not in this census of 12 experts"):
        found.of(5, 7)


def moe(name: str, folder, **more):
    torch.manual_seed(0)
    sizes = GROUPED | {"num_experts": 4, "moe_intermediate_size": 48, "num_experts_per_tok": 2} | more
    config = getattr(transformers, f"{name}Config")(**sizes)
    hf_model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    return spikesink.load(planted.save(hf_model, folder / name))


@pytest.mark.parametrize(("name", "shared"), [("Qwen3Moe", []), ("Qwen2Moe", ["shared_expert"])])
def test_weighted_experts_add_up_to_what_the_block_writes(name, shared, tmp_path):
    """All that the router's weights and the experts as read say is what the model computes, without what is shared."""
    model = moe(name, tmp_path, shared_expert_intermediate_size=56)
    about, ffns = spikesink.anatomy(model), weights_of(model).experts(1)
    assert list(ffns) == ["0", "1", "2", "3", *shared]
    seen = experts._pass_router(model, about, 1, spikesink.windows(model, "house", 1, 16)[0])
    assert ((seen["weight"] > 0).sum(1) == 2).all()
    ours = sum(seen["weight"][:, [int(n)]] * amplifier.write(ffns[n], seen["h"]) for n in ffns if n not in shared)
    if shared:
        mlp = model.original_model.model.layers[1].mlp
        h = seen["h"] * model.original_model.model.layers[1].post_attention_layernorm.weight
        ours += torch.sigmoid(h @ mlp.shared_expert_gate.weight.T) * amplifier.write(ffns[shared[0]], seen["h"])
    torch.testing.assert_close(ours, seen["own"], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("name", "shares"), [("Qwen3Moe", False), ("Qwen2Moe", True)])
def test_what_each_expert_writes_is_what_the_model_s_own_code_makes_of_it(name, shares, tmp_path, monkeypatch):
    """Against transformers' own modules, with a router that is far from sure."""
    torch.manual_seed(0)
    more = {"num_experts": 4, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 56}
    sizes = GROUPED | {"num_experts_per_tok": 2, "num_hidden_layers": spiking.N_LAYERS} | more
    hf_model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes)).eval()
    spiking.make_spike(hf_model)
    (tmp_path / "text.txt").write_text(planted.text(3, 32))
    model = spikesink.load(planted.save(hf_model, tmp_path / name))
    tokens = spikesink.windows(model, str(tmp_path / "text.txt"), 3, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    found = experts.route(model, tokens, life)
    assert (found.block, found.channel, found.shares) == (2 * spiking.STEP_UP + 2, spiking.CHANNEL, shares)
    mlp, seen = hf_model.model.layers[spiking.STEP_UP].mlp, {}
    mlp.register_forward_hook(lambda module, args, output: seen.update(h=args[0], out=output))
    with torch.no_grad():
        hf_model(tokens)
        spikes = (tokens == 1).flatten()
        h = seen["h"].flatten(0, 1)[spikes]
        out = seen["out"][0] if isinstance(seen["out"], tuple) else seen["out"]
        chances = (h @ mlp.gate.weight.T).softmax(-1)
        chosen = chances * (chances >= chances.topk(2).values[:, -1:])
        chosen = chosen / chosen.sum(-1, keepdim=True) if hf_model.config.norm_topk_prob else chosen
        writes = []
        for both, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
            gate, up = (h @ both.T).chunk(2, dim=-1)
            writes.append((functional.silu(gate) * up) @ down[spiking.CHANNEL])
    assert torch.equal(found.is_spike, spikes)
    assert 0.1 < float(chosen[chosen > 0].min()) < float(chosen.max()) < 0.9
    torch.testing.assert_close(found.weight[spikes], chosen, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.write, chosen * torch.stack(writes, dim=1), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(found.own, out.flatten(0, 1)[spikes, spiking.CHANNEL], rtol=1e-4, atol=1e-3)
    together = evidence.x_mx2_one_writer(found).measured["share_of_all_experts"]
    assert together == pytest.approx(float((found.write.sum(1) / found.own).mean()))
    assert (together == pytest.approx(1, abs=1e-4)) != shares
    ordinary = life.trace.channels[life.trace.ordinary]
    gains = torch.stack([amplifier.gains(ffn) for n, ffn in weights_of(model).experts(1).items() if n.isdecimal()], 1)
    torch.testing.assert_close(found.gain, gains[spiking.CHANNEL].float())
    torch.testing.assert_close(found.gain_ordinary, gains[ordinary].float())
    own = experts._pass_router  # in some families the hook gives the chosen experts alone
    monkeypatch.setattr(experts, "_pass_router", lambda *a: (passed := own(*a)) | {"weight": passed["weight"][:, :2]})
    reason = experts.route(model, tokens, life).reason
    assert "does not show one weight for each expert" in reason


def test_the_writer_writes_most_whatever_its_sign():
    turned = by_hand(write=torch.tensor([[0.0, -90, 10], [10, -90, 0]]), own=torch.tensor([-100.0, -100]))
    assert turned.writer == 1
    either = by_hand(write=torch.tensor([[0.0, -90, 10], [10, 90, 0]]), own=torch.tensor([-100.0, 100]))
    assert either.writer == 1


def test_layers_without_a_router_have_one_ffn(tmp_path):
    model = moe("Qwen3Moe", tmp_path, mlp_only_layers=[0])
    weights = weights_of(model)
    assert [list(weights.experts(layer)) for layer in range(3)] == [["mlp"], ["0", "1", "2", "3"], ["0", "1", "2", "3"]]
    assert spikesink.anatomy(model).router_hooks[0] is None
    found = experts.census(weights)
    assert list(found.blocks) == [2] + [4] * 4 + [6] * 4
    assert found.gain[0].max() > 0


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss", "the experts of this gpt_oss model are kept in a way that is not known here"),
        ("llama", "every layer has one FFN, and no router chooses"),
    ],
)
def test_where_there_is_no_census_it_says_why(name, reason, tmp_path):
    model = spikesink.load(tiny(name, tmp_path)) if name == "llama" else moe("GptOss", tmp_path, num_local_experts=4)
    weights, tokens = weights_of(model), spikesink.windows(model, "house", 2, 24)
    assert experts.census(weights) == NotApplicable(reason)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    routing = experts.route(model, tokens, life)
    assert isinstance(routing, NotApplicable)
    assert evidence.x_mx1_same_choice(routing) == evidence.x_mx2_one_writer(routing) == routing


def test_no_routing_without_a_router_that_can_be_seen_or_of_other_windows(planted_model, trigger_tokens, monkeypatch):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    found = experts.route(planted_model, trigger_tokens, life)
    assert found == NotApplicable("every layer has one FFN, and no router chooses")
    with pytest.raises(ValueError, match="windows"):
        experts.route(planted_model, trigger_tokens[:5], life)
    unseen = replace(planted_model.anatomy, n_experts=4, router_hooks=(None,) * 6)
    monkeypatch.setattr(planted_model, "anatomy", unseen)
    found = experts.route(planted_model, trigger_tokens, life)
    assert (
        found.reason == "in L1 MLP (block 4), the first that steps up, no router's choice of known experts can be seen"
    )


def by_hand(**changed) -> experts.Routing:
    """Three experts, two spike tokens that are sent to the second with weight 0.9, and two others."""
    values = {
        "block": Block(4),
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
    assert chosen.measured["share_of_spike_tokens"] == 1
    assert chosen.measured["share_of_other_tokens"] == 0.5
    assert chosen.measured["weight"] == pytest.approx(0.9)
    assert chosen.measured["n_chosen"] == 2
    assert chosen.control == {"share_if_even": 1 / 3, "weight_other_tokens": pytest.approx(0.3)}
    assert written.measured["share_written"] == pytest.approx(0.9)
    assert written.measured["share_of_all_experts"] == 1
    assert (written.measured["gain_rank"], written.measured["gain_over_median"]) == (1, 4)
    assert written.control == {"gain_rank_ordinary_channels": 2}
    assert claims.judge("X-MX1", chosen, "04").verdict == claims.judge("X-MX2", written, "04").verdict == "holds"
    other = by_hand(gain=torch.tensor([9.0, 8, 2]), weight=torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]]))
    assert claims.judge("X-MX1", evidence.x_mx1_same_choice(other), "04").verdict == "differs"
    assert claims.judge("X-MX2", evidence.x_mx2_one_writer(other), "04").verdict == "differs"
