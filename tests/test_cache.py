"""KV caches: policies against masks by hand, a cache that lets go of keys against attention that cannot see them."""

from dataclasses import replace

import pytest
import torch
import transformers

import spikesink
from spikesink import find_lifecycle, patching, trace_windows
from spikesink.chain.lifecycle import find_spikes
from spikesink.common import NotApplicable
from spikesink.model import texts
from spikesink.patching import cuts
from spikesink.patching.means import spike_means
from spikesink.serving import cache
from spikesink.serving.cache import (
    BoundedCache,
    Policy,
    eviction_techniques,
    forget,
    generate,
    heavy_hitter_pattern,
    keep_first,
    run_bounded,
)
from spikesink.serving.cells import cross, make_cells
from spikesink.serving.diagnosis import ROUTING, diagnose
from tests import planted, survey

FEW = dict(rtol=1e-4, atol=1e-5)


def test_what_a_policy_sees():
    at = torch.arange(6)
    rows = ["100000", "110000", "111000", "101100", "100110", "100011"]
    expected = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(keep_first(1, 3).sees(at, at), expected)
    assert torch.equal(Policy().sees(at, at), torch.ones(6, 6, dtype=torch.bool).tril())
    # What a layer does not see is out of sight wherever it is kept.
    assert keep_first(1, 3).sees(at, at, 3)[4].tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"kept": (0,)}, "without a window"),
        ({"window": 4, "kept": (1, 2), "shifted": True}, "not the first"),
        ({"window": 4, "kept": (0,), "heavy": 2}, "not both"),
    ],
)
def test_what_is_no_policy_is_refused(wrong, says):
    with pytest.raises(ValueError, match=says):
        Policy(**wrong)


@pytest.mark.parametrize("policy", [Policy(5), Policy(5, (0, 1)), Policy(5, (3, 9)), Policy(5, heavy=3)], ids=str)
def test_attention_over_what_is_left_is_softmax_over_what_is_left(served, policy):
    model, tokens = served
    name, patterns = model.anatomy.pattern_hooks[0], []
    for hidden in ((), forget(model, policy)):
        with patching.patched(model, *hidden):
            patterns.append(model.run_with_cache(tokens, names_filter=[name])[1][name])
    whole, left = patterns
    assert not torch.allclose(whole, left, atol=1e-3)
    at = torch.arange(tokens.shape[1])
    mask = left > 0 if policy.heavy else policy.sees(at, at)
    if policy.heavy and model.anatomy.sight[0] is None:
        assert set(mask.sum(-1)[0, :, 8:].flatten().tolist()) == {8}, "as many keys as the cache has room for"
    torch.testing.assert_close(whole.log().masked_fill(~mask, -torch.inf).softmax(-1), left, **FEW)


def keep_heavy_hitters(pattern: torch.Tensor, window: int, heavy: int) -> torch.Tensor:
    """H2O for the query heads of one K/V head, [head, query, key], in plain words."""
    out, received, others = torch.zeros_like(pattern), [0.0] * pattern.shape[1], []
    for q in range(pattern.shape[1]):
        recent = list(range(max(0, q - window + 1), q + 1))
        for head in range(len(pattern)):
            total = sum(float(pattern[head, q, k]) for k in others + recent)
            for k in others + recent:
                out[head, q, k] = float(pattern[head, q, k]) / total
                received[k] += float(out[head, q, k])
        if q - window + 1 >= 0:
            others.append(q - window + 1)
        if len(others) > heavy:
            others.remove(min(others, key=lambda k: received[k]))
    return out


@pytest.mark.parametrize("n_kv_heads", [4, 2, 1])
def test_heavy_hitters_against_a_loop(n_kv_heads):
    logits = torch.randn(4, 4, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    pattern = logits.masked_fill(torch.ones(16, 16).triu(1) == 1, -torch.inf).softmax(-1)
    left = heavy_hitter_pattern(pattern, 4, 3, n_kv_heads)
    expected = [torch.cat([keep_heavy_hitters(heads, 4, 3) for heads in one.chunk(n_kv_heads)]) for one in pattern]
    torch.testing.assert_close(left, torch.stack(expected))
    with pytest.raises(ValueError, match="whole windows"):
        heavy_hitter_pattern(pattern[:, :, -1:], 4, 3, 4)


@pytest.mark.parametrize("chunk", [5, 48])
@pytest.mark.parametrize("policy", [Policy(), Policy(48), Policy(9), Policy(7, (0, 1)), Policy(7, (2, 3))], ids=str)
def test_a_cache_that_lets_go_is_attention_that_cannot_see(served, policy, chunk):
    model, tokens = served
    masked = patching.evaluate(model, tokens, *forget(model, policy)).loss
    torch.testing.assert_close(run_bounded(model, tokens, policy, chunk=chunk), masked, **FEW)
    bounded = BoundedCache(model, policy)
    bounded(tokens)
    assert {len(bounded.held)} | {layer.keys.shape[2] for layer in bounded.cache.layers} == {
        min(48, (policy.window or 49) - 1 + len(policy.kept))
    }, "the next token takes the last place"


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """In one layer keys and values know nothing of what came before: what is left can be run by itself."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**planted.SIZES | {"num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 20  # so that positions make a difference
    return spikesink.load(planted.save(model, tmp_path_factory.mktemp("models") / "one-layer"))


@pytest.mark.parametrize(("kept", "changed"), [(0, False), (1, False), (3, True)])
def test_shifted_is_as_if_nothing_had_been_between(one_layer, kept, changed):
    """Whatever an intervention has made of the first token's key moves up as it is."""
    model = one_layer
    scaled = (patching.scale(patching.hook("blocks.0.attn.k.hook_out"), -2, 0),) if changed else ()
    tokens = spikesink.windows(model, "house", 2, 40)
    at, chunk = 36, max(1, kept)  # where a chunk begins: there kept tokens have just moved up
    moved, stayed = (
        run_bounded(model, tokens, keep_first(kept, 8 + kept, shifted), scaled, chunk)[:, at]
        for shifted in (True, False)
    )
    left = torch.cat([tokens[:, :kept], tokens[:, at - 7 : at + 1]], dim=1)
    with patching.patched(model, *scaled):
        expected = -model(left)[:, -1].log_softmax(-1).gather(1, tokens[:, at + 1, None])[:, 0]
    torch.testing.assert_close(moved, expected, **FEW)
    assert ((stayed - expected).abs().max() > 1e-3) == (kept > 0)


@pytest.mark.parametrize("served", ["llama", "qwen3"], indirect=True)
def test_a_cache_without_the_sink_fails_by_routing(served):
    """Whatever becomes of the spike; and the first token, or a constant in its place, is all that it takes."""
    model, tokens = served
    life = find_lifecycle(trace_windows(model, tokens))
    held_out = spikesink.windows(model, texts.Text("planted", planted.text(6, 48)), 3, 48, seed=5)
    means, where = spike_means(model, held_out, life), find_spikes(model, tokens, life)
    sink, name = cuts.sink_held(means), model.anatomy.pattern_hooks[-1]
    techniques = eviction_techniques(model, 8, where, sink)
    firsts = [first for n, first in cache.FIRST.items() if n < 8]
    assert set(techniques) == {cache.WINDOW, *firsts, cache.OTHERS, cache.HEAVY, cache.CONSTANT}
    for technique in techniques.values():
        with patching.patched(model, *technique.cuts):
            pattern = model.run_with_cache(tokens, names_filter=[name])[1][name]
        assert set((pattern > 0).sum(-1)[:, :, 16:].unique().tolist()) == {8}, "as many keys as all others"
    diagnoses = diagnose(cross(model, tokens, make_cells(means, where), techniques))
    assert diagnoses[cache.WINDOW].verdict == ROUTING
    costs = {name: one.cost for name, one in diagnoses.items()}
    assert min(costs[cache.WINDOW], costs[cache.OTHERS]) > 2
    assert max(costs[name] for name in (*firsts, cache.CONSTANT, cache.HEAVY)) < 1.05
    no_first = tokens.clone()
    no_first[:, 0] = tokens[:, 1]  # no spike, no sink: a constant has to stand for one
    with_token, constant = (
        patching.evaluate(model, no_first, *techniques[name].cuts).loss[:, 24:].mean()
        for name in (cache.WITH_1, cache.CONSTANT)
    )
    assert constant < with_token - 0.1
    streamed = run_bounded(model, tokens, Policy(7, (0,)), sink, chunk=16)
    masked = patching.evaluate(model, tokens, *techniques[cache.CONSTANT].cuts).loss
    torch.testing.assert_close(streamed, masked, **FEW)


def test_generating_from_a_cache_is_generating_from_what_it_holds(served):
    model, tokens = served
    how = dict(max_new_tokens=10, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    assert torch.equal(generate(model, tokens[0, :20], Policy(), 10), model.generate(tokens[:1, :20], **how)[0, 20:])
    policy, whole = Policy(6, (0,)), tokens[0, :20]
    for token in generate(model, whole, policy, 10):  # each from all before it, of which attention sees what is held
        with patching.patched(model, *forget(model, policy)):
            assert int(model(whole[None])[0, -1].argmax()) == token
        whole = torch.cat([whole, token[None]])


@pytest.mark.parametrize(("family", "own"), [("Gemma3", {}), ("Mistral", {"sliding_window": 8}), ("Llama", {})])
def test_what_is_forgotten_in_generation_is_what_is_forgotten_without_a_cache(family, own, tmp_path):
    """Where a sliding window lets go of keys, the first one that is left is not the first token."""
    model = spikesink.load(planted.save(survey.build(f"{family}ForCausalLM", **own), tmp_path))
    tokens = torch.randint(4, 400, (1, 20), generator=torch.Generator().manual_seed(0))
    how = dict(max_new_tokens=20, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    with patching.patched(model, *forget(model, Policy(4, (0, 1)))):
        cached = model.generate(tokens, **how)
        assert torch.equal(cached, model.generate(tokens, use_past_kv_cache=False, **how))
    assert not torch.equal(cached, model.generate(tokens, **how))


@pytest.mark.parametrize(("field", "value"), [("edits_pattern", False), ("learned_sink", True)])
def test_attention_that_cannot_be_made_again_is_not_applicable(served, field, value, monkeypatch):
    model, tokens = served
    monkeypatch.setattr(model, "anatomy", replace(model.anatomy, **{field: value}))
    with pytest.raises(NotApplicable):
        forget(model, Policy(8))
    with pytest.raises(NotApplicable):
        run_bounded(model, tokens, Policy(8))
    assert isinstance(eviction_techniques(model, 8, tokens > 0), NotApplicable)


@pytest.mark.parametrize(
    ("family", "policy", "said"),
    [
        ("Mamba", Policy(), "show no attention"),
        ("Lfm2", Policy(), "show no attention"),
        ("FalconH1", Policy(8), "keeps more than keys and values"),
        ("Bloom", Policy(8, (0,)), "goes by places in the cache"),
    ],
)
def test_what_a_cache_of_keys_and_values_cannot_hold_is_not_applicable(family, policy, said, tmp_path):
    model = spikesink.load(planted.save(survey.build(f"{family}ForCausalLM"), tmp_path))
    with pytest.raises(NotApplicable, match=said):
        run_bounded(model, torch.arange(10, 40)[None], policy)


def test_what_a_cache_cannot_do_names_what_can(served):
    model, tokens = served
    with pytest.raises(ValueError, match="use run_bounded"):
        forget(model, keep_first(1, 8, shifted=True))
    with pytest.raises(ValueError, match="use forget"):
        run_bounded(model, tokens, Policy(8, heavy=2))
    with pytest.raises(ValueError, match="run more at once"):
        run_bounded(model, tokens, keep_first(4, 8), chunk=2)
