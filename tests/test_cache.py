"""KV caches: policies against masks by hand, a cache that lets go of keys against attention that cannot see them."""

from dataclasses import replace

import pytest
import torch
import transformers

import spikesink
from spikesink import find_lifecycle, patching, trace_windows
from spikesink.chain.lifecycle import find_spikes
from spikesink.common import NotApplicable
from spikesink.model import anatomy, texts
from spikesink.patching import cuts as chain
from spikesink.serving import cache
from spikesink.serving.cache import (
    Policy,
    evictions,
    first,
    forget,
    generate_per_cache,
    heavy_hitter_pattern,
    stream,
    write,
)
from spikesink.serving.cells import cells, cross, sink_held
from spikesink.serving.diagnosis import ROUTING, diagnose
from tests import planted

FEW = dict(rtol=1e-4, atol=1e-5)


def test_what_a_policy_sees():
    at = torch.arange(6)
    rows = ["100000", "110000", "111000", "101100", "100110", "100011"]
    wanted = torch.tensor([[c == "1" for c in row] for row in rows])
    assert torch.equal(Policy(2, (0,)).sees(at, at), wanted | (torch.eye(6) == 1))
    assert torch.equal(Policy(2, (0,)).sees(at, at)[4], torch.tensor([True, False, False, True, True, False]))
    assert torch.equal(Policy().sees(at, at), torch.ones(6, 6, dtype=torch.bool).tril())
    assert first(1, 3) == Policy(2, (0,))
    # What a layer does not see is out of sight wherever it is kept.
    assert torch.equal(Policy(2, (0,)).sees(at, at, 3)[4], torch.tensor([False, False, False, True, True, False]))


def test_what_is_no_policy_is_refused():
    for wrong, says in (
        ({"window": 0}, "no room for the query's own"),
        ({"kept": (0,)}, "without a window"),
        ({"window": 4, "kept": (-1,)}, "does not exist"),
        ({"window": 4, "kept": (1, 2), "shifted": True}, "not the first ones"),
        ({"window": 4, "kept": (0,), "heavy": 2}, "not both"),
    ):
        with pytest.raises(ValueError, match=says):
            Policy(**wrong)


def test_a_policy_says_what_it_keeps():
    assert str(Policy()) == "every token"
    assert str(first(4, 64)) == "the last 60 and the first 4"
    assert str(first(1, 64, shifted=True)) == "the last 63 and the first 1, shifted"
    assert str(Policy(8, (5, 6))) == "the last 8 and 2 others"
    assert str(Policy(8, heavy=3)) == "the last 8 and the 3 most attended to"


@pytest.mark.parametrize("policy", [Policy(5), Policy(5, (0, 1)), Policy(5, (3, 9)), Policy(5, heavy=3)])
def test_attention_over_what_is_left_is_softmax_over_what_is_left(served, policy):
    """Each query's attention, made again of the whole one's logits."""
    model, tokens = served
    seen = {}
    name = model_patterns(model)[0]
    with model.hooks(fwd_hooks=[(name, lambda x, hook: seen.update(whole=x))]):
        model(tokens)
    with (
        patching.patched(model, *forget(model, policy)),
        model.hooks(fwd_hooks=[(name, lambda x, hook: seen.update(left=x))]),
    ):
        model(tokens)
    logits, left = seen["whole"].log(), seen["left"]
    assert not torch.allclose(seen["whole"], left, atol=1e-3)
    if policy.heavy:
        left_keys = (left > 0).sum(-1)[0]  # of each head and query
        assert int(left_keys.max()) <= policy.window + policy.heavy
        if anatomy.anatomy(model).sight[0] is None:
            assert int(left_keys[:, 8:].min()) == policy.window + policy.heavy
        mask = left > 0
    else:
        at = torch.arange(tokens.shape[1])
        mask = policy.sees(at, at)
    torch.testing.assert_close(logits.masked_fill(~mask, -torch.inf).softmax(-1), left, **FEW)


def model_patterns(model) -> tuple[str, ...]:
    return anatomy.anatomy(model).pattern_hooks


def heaviest(pattern: torch.Tensor, window: int, heavy: int) -> torch.Tensor:
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
    logits = torch.randn(8, 4, 20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    pattern = logits.masked_fill(torch.ones(20, 20).triu(1) == 1, -torch.inf).softmax(-1)
    found = heavy_hitter_pattern(pattern, 4, 3, n_kv_heads)
    for window in range(len(pattern)):
        for of, heads in enumerate(pattern[window].chunk(n_kv_heads)):
            mine = found[window].chunk(n_kv_heads)[of]
            torch.testing.assert_close(mine, heaviest(heads, 4, 3))
    with pytest.raises(ValueError, match="whole windows"):
        heavy_hitter_pattern(pattern[:, :, -1:], 4, 3, 3)


@pytest.mark.parametrize("chunk", [5, 48])
@pytest.mark.parametrize("policy", [Policy(), Policy(48), Policy(9), Policy(7, (0, 1)), Policy(7, (2, 3))])
def test_a_cache_that_lets_go_is_attention_that_cannot_see(served, policy, chunk):
    model, tokens = served
    found = stream(model, tokens, policy, chunk=chunk)
    wanted = patching.evaluate(model, tokens, *forget(model, policy))
    torch.testing.assert_close(found.loss, wanted.loss, **FEW)
    assert found.most_held == min(48, (policy.window or 49) - 1 + len(policy.kept))


def test_a_window_as_long_as_the_text_is_no_window(served):
    model, tokens = served
    whole = patching.evaluate(model, tokens)
    torch.testing.assert_close(patching.evaluate(model, tokens, *forget(model, Policy(48))).loss, whole.loss, **FEW)
    short = patching.evaluate(model, tokens, *forget(model, Policy(46)))
    assert not torch.allclose(short.loss[:, -1], whole.loss[:, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(stream(model, tokens, Policy()).loss, whole.loss, **FEW)


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    """In one layer keys and values know nothing of what came before: what is left can be run by itself."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**planted.SIZES | {"num_hidden_layers": 1})
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight *= 20  # so that positions make a difference
    return spikesink.load(planted.save(model, tmp_path_factory.mktemp("models") / "one-layer"))


@pytest.mark.parametrize(("kept", "changed"), [(0, False), (1, False), (3, False), (1, True), (3, True)])
def test_shifted_is_as_if_nothing_had_been_between(one_layer, kept, changed):
    """Whatever an intervention has made of the first token's key moves up as it is."""
    model = one_layer
    cuts = (patching.scale(patching.hook("blocks.0.attn.k.hook_out"), -2, 0),) if changed else ()
    tokens = spikesink.windows(model, "house", 2, 40)
    at = 36  # where a chunk begins: there kept tokens have just moved up
    chunk = max(1, kept)
    bounded, stays = (stream(model, tokens, first(kept, 8 + kept, shifted), cuts, chunk) for shifted in (True, False))
    left = torch.cat([tokens[:, :kept], tokens[:, at - 7 : at + 1]], dim=1)
    with patching.patched(model, *cuts):
        wanted = -model(left)[:, -1].log_softmax(-1).gather(1, tokens[:, at + 1, None])[:, 0]
    torch.testing.assert_close(bounded.loss[:, at], wanted, **FEW)
    assert ((stays.loss[:, at] - wanted).abs().max() > 1e-3) == (kept > 0)


def test_generating_from_a_cache_is_generating_from_what_it_holds(served):
    model, tokens = served
    written = write(model, tokens[0, :20], Policy(), 10)
    usual = model.generate(
        tokens[:1, :20], max_new_tokens=10, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False
    )
    assert torch.equal(written, usual[0, 20:])
    policy = Policy(6, (0,))
    short, whole = write(model, tokens[0, :20], policy, 10), tokens[0, :20]
    for token in short:  # greedy, each from all that came before, of which attention sees what the cache holds
        with patching.patched(model, *forget(model, policy)):
            assert int(model(whole[None])[0, -1].argmax()) == token
        whole = torch.cat([whole, token[None]])


@pytest.mark.parametrize("served", ["llama", "qwen3"], indirect=True)
def test_a_constant_key_and_value_does_for_the_first_token(served):
    """Without the sink's key, a planted head writes what harms; with a constant one in its place it does not."""
    model, tokens = served
    life = find_lifecycle(trace_windows(model, tokens))
    held_out = spikesink.windows(model, texts.Text("planted", planted.text(6, 48)), 3, 48, seed=5)
    known = chain.spike_means(model, held_out, life)
    loss = {
        name: patching.evaluate(model, tokens, *cuts).loss[:, 24:].mean()
        for name, cuts in {
            "all": (),
            "window": forget(model, Policy(8)),
            "others": forget(model, Policy(8, (3,))),
            "first": forget(model, Policy(8, (0,))),
            "constant": (*sink_held(known), *forget(model, Policy(8, (0,)))),
        }.items()
    }
    assert loss["window"] > loss["all"] + 0.1
    assert loss["others"] > loss["all"] + 0.1
    assert abs(loss["first"] - loss["all"]) < 0.05
    assert abs(loss["constant"] - loss["all"]) < 0.05
    streamed = stream(model, tokens, Policy(8, (0,)), sink_held(known), chunk=16)
    masked = patching.evaluate(model, tokens, *sink_held(known), *forget(model, Policy(8, (0,))))
    torch.testing.assert_close(streamed.loss, masked.loss, **FEW)


def seen_by_each_query(model, tokens, cuts) -> torch.Tensor:
    """How many keys get attention: [window, head, query], of the last layer."""
    seen = []
    name = model_patterns(model)[-1]
    with patching.patched(model, *cuts), model.hooks(fwd_hooks=[(name, lambda p, hook: seen.append((p > 0).sum(-1)))]):
        model(tokens)
    return seen[0]


@pytest.mark.parametrize("served", ["llama", "qwen3"], indirect=True)
def test_a_cache_without_the_sink_fails_by_routing(served):
    """Whatever becomes of the spike; and the first token, or a constant in its place, is all that it takes."""
    model, tokens = served
    life = find_lifecycle(trace_windows(model, tokens))
    text = texts.Text("planted", planted.text(6, 48))
    known = chain.spike_means(model, spikesink.windows(model, text, 3, 48, seed=5), life)
    where = find_spikes(model, life, tokens)
    ways = evictions(model, known, 8, where)
    assert set(ways) == {cache.WINDOW, *map(cache.named, (1, 2, 4)), cache.OTHERS, cache.HEAVY, cache.CONSTANT}
    for name, way in ways.items():
        keys = seen_by_each_query(model, tokens, way.cuts)
        assert set(keys[:, :, 16:].unique().tolist()) == {8}, f"{name}: no more keys than others have, and no fewer"
    crossed = cross(model, tokens, cells(known, where), ways)
    found = diagnose(crossed)
    assert found[cache.WINDOW].verdict == ROUTING
    assert found[cache.WINDOW].cost > 2
    assert found[cache.OTHERS].cost > 2
    for name in (cache.named(1), cache.named(4), cache.CONSTANT, cache.HEAVY):
        assert found[name].cost < 1.05, name
    no_first = tokens.clone()
    no_first[:, 0] = tokens[:, 1]  # no spike, no sink: a constant has to stand for one
    late = {n: patching.evaluate(model, no_first, *ways[n].cuts).loss[:, 24:] for n in (cache.named(1), cache.CONSTANT)}
    assert late[cache.CONSTANT].mean() < late[cache.named(1)].mean() - 0.1
    written = generate_per_cache(model, tokens[0, :24], known, 8, 4)
    wanted = [cache.EVERY, cache.WINDOW, "with the first 4", "with the first 4, shifted", cache.CONSTANT]
    assert list(written.index) == wanted
    for name, policy in ((cache.EVERY, Policy()), (cache.WINDOW, Policy(8))):
        whole = torch.cat([tokens[0, :24], write(model, tokens[0, :24], policy, 4)])[None]
        judged = patching.evaluate(model, whole).loss[:, 23:]
        assert written.loc[name, "judged perplexity"] == pytest.approx(float(judged.mean().exp()), rel=1e-3)
    assert list(generate_per_cache(model, tokens[0, :24], NotApplicable("no spike"), 8, 4).index) == wanted[:-1]


@pytest.mark.parametrize(
    ("field", "says"), [("edits_pattern", "has read its pattern"), ("learned_sink", "learned logit")]
)
def test_attention_that_cannot_be_made_again_is_refused(served, field, says, monkeypatch):
    model, tokens = served
    about = anatomy.anatomy(model)
    monkeypatch.setattr(cache, "anatomy", lambda model: replace(about, **{field: not getattr(about, field)}))
    for run in (forget, lambda model, policy: stream(model, tokens, policy)):
        with pytest.raises(ValueError, match=says):
            run(model, Policy(8))


def test_what_a_cache_cannot_do_is_said(served):
    model, tokens = served
    with pytest.raises(ValueError, match="use stream"):
        forget(model, first(1, 8, shifted=True))
    with pytest.raises(ValueError, match="use forget"):
        stream(model, tokens, Policy(8, heavy=2))
    with pytest.raises(ValueError, match="fewer than the 4 to be kept"):
        stream(model, tokens, first(4, 8), chunk=2)
