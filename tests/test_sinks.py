"""Sinks: scores by hand and by transformers, a hand-built head whose sink key is known, brute force for the rest."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM

import spikesink
from spikesink.chain import collapse, sinks, trace
from spikesink.chain import keys as keys_
from spikesink.chain.lifecycle import is_spike
from spikesink.chain.trace import received
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.model.weights import weights_of
from tests import planted
from tests.test_families import FAMILIES, tiny

SINK_LAYER, SINK_HEAD, PLAIN = 3, 0, 5  # channel PLAIN is 1 on every token, and no block writes to it


@pytest.fixture(scope="module")
def sinking_model(tmp_path_factory):
    """The planted model with a head of layer 3 whose queries are one vector, and whose key reads the spike's channel.

    Query head 0 reads PLAIN into its first rotary pair and its key head the spike's channel, so the logit towards a
    spike token is large whatever the query; the lowest of the frequencies is used, so that RoPE hardly turns it.
    """
    model = planted.plant(planted.random_llama(400), planted.Plant())
    layer, d_head = model.model.layers[SINK_LAYER], 16
    with torch.no_grad():
        model.model.embed_tokens.weight[:, PLAIN] = 1
        for other in model.model.layers:
            other.self_attn.o_proj.weight[PLAIN] = 0
            other.mlp.down_proj.weight[PLAIN] = 0
        slow = d_head // 2 - 1  # of the rotary pairs (i, i + 8) the slowest
        layer.self_attn.q_proj.weight[: 2 * d_head] = 0  # query heads 0 and 1 share key head 0
        layer.self_attn.q_proj.weight[slow, PLAIN] = 40
        layer.self_attn.k_proj.weight[:d_head] = 0
        layer.self_attn.k_proj.weight[slow, planted.Plant().channel] = 4
    return spikesink.load(planted.save(model, tmp_path_factory.mktemp("models") / "sinking-llama"))


@pytest.fixture(scope="module")
def parts(sinking_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(sinking_model, trigger_tokens))
    found = collapse.measure_collapse(sinking_model, trigger_tokens, life)
    return life, found, keys_.read_attention(sinking_model, trigger_tokens, life, found)


def transformers_attention(directory, tokens):
    """The patterns that transformers itself returns, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(tokens, output_attentions=True, use_cache=False).attentions


def test_the_score_is_the_mean_over_queries_at_or_after_the_key():
    pattern = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.7, 0, 0.1, 0.2]]])
    expected = [(1 + 0.5 + 0.2 + 0.7) / 4, (0.5 + 0.3 + 0) / 3, (0.5 + 0.1) / 2, 0.2]
    assert received(pattern)[0].tolist() == pytest.approx(expected)
    near = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.3, 0.7, 0], [0, 0, 0.8, 0.2]]])
    assert received(near, sight=2)[0].tolist() == pytest.approx([1.5 / 2, 0.8 / 2, 1.5 / 2, 0.2])


def test_scores_are_those_of_transformers_attention(random_directory, random_model):
    tokens = spikesink.windows(random_model, "house", 3, 40)
    patterns = transformers_attention(random_directory, tokens)
    scores = sinks.score(random_model, tokens, epsilon=0.05)
    for layer, pattern in enumerate(patterns):
        alpha = torch.stack([pattern[..., k:, k].mean(-1) for k in range(40)], dim=-1)  # window, head, key
        assert (scores.at[:, layer] - alpha[..., 0]).abs().max() < 1e-5
        assert (scores.mean[layer] - alpha.mean(0)).abs().max() < 1e-5
        torch.testing.assert_close(scores.above[layer], (alpha > 0.05).float().mean(0))
    assert scores.ratio() == pytest.approx(float((scores.at > 0.05).double().mean()))
    assert scores.ratio(0.01) >= scores.ratio() >= scores.ratio(0.2)
    assert scores.ratio(1e-9) == 1


def test_scores_of_the_default_model_are_those_of_transformers(default_model):
    tokens = spikesink.windows(default_model, "house", 1, 48)
    patterns = transformers_attention(default_model.source.directory, tokens)
    scores = sinks.score(default_model, tokens)
    assert (torch.stack(patterns)[:, 0, :, :, 0].mean(-1) - scores.at[0]).abs().max() < 1e-5


def test_a_sliding_window_counts_only_the_queries_that_see_the_key(tmp_path, monkeypatch):
    name, sizes, expected = FAMILIES["gemma2"]
    monkeypatch.setitem(FAMILIES, "gemma2", (name, sizes | {"sliding_window": 8}, expected))
    directory = tiny("gemma2", tmp_path)
    model = spikesink.load(directory)
    assert spikesink.anatomy(model).sight == (8, None, 8)
    tokens = spikesink.windows(model, "house", 2, 32)
    patterns = transformers_attention(directory, tokens)
    assert patterns[0][0, 0, 20, :13].abs().max() == 0 < patterns[0][0, 0, 20, 13]
    scores = sinks.score(model, tokens)
    assert (scores.at[:, 0] - patterns[0][..., :8, 0].mean(-1)).abs().max() < 1e-6
    assert (scores.at[:, 1] - patterns[1][..., 0].mean(-1)).abs().max() < 1e-6
    torch.testing.assert_close(keys_._visible(32, 8, "cpu"), patterns[0][0, 0] > 0)


def test_the_first_tokens_of_a_window_score_as_a_shorter_window(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 40)
    short, same = sinks.score(random_model, tokens, length=16), sinks.score(random_model, tokens[:, :16])
    torch.testing.assert_close(short.at, same.at)
    assert (short.length, short.mean.shape[-1]) == (16, 16)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"epsilon": 0.0}, "epsilon must lie between 0 and 1"),
        ({"epsilon": 1.0}, "epsilon must lie between 0 and 1"),
        ({"epsilon": float("nan")}, "epsilon must lie between 0 and 1"),
        ({"position": 32}, "key position 32 is not in a window of 32 tokens"),
        ({"position": -1}, "key position -1 is not in a window of 32 tokens; give 0 to 31"),
        ({"epsilon": "0.3"}, "epsilon must lie between 0 and 1"),
        ({"length": 8.0}, "length must be a whole number of tokens"),
        ({"groups": {"mine": torch.zeros(2, 3, dtype=torch.bool)}}, "the set 'mine' of key tokens must have the shape"),
        ({"length": 16, "position": 20}, "key position 20 is not in a window of 16"),
        ({"length": 64}, "scores over 64 tokens cannot be had of windows of 32"),
        ({"length": 1000}, "1000 tokens are longer than the model's context of 512"),
        ({"length": 1}, "give 2 to 32"),
    ],
)
def test_what_cannot_be_scored_is_refused_in_one_sentence(given, said, random_model):
    tokens = spikesink.windows(random_model, "house", 1, 32)
    with pytest.raises(ValueError, match=said) as raised:
        sinks.score(random_model, tokens, **given)
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="epsilon"):
        sinks.score(random_model, tokens).ratio(2)


def test_windows_that_are_not_the_traced_ones_are_refused(parts, sinking_model, trigger_tokens):
    life, found, seen = parts
    for wrong in (trigger_tokens[:3], trigger_tokens[:, :20], trigger_tokens.flip(0)):
        with pytest.raises(ValueError, match="not the windows that this life cycle was found in"):
            keys_.read_attention(sinking_model, wrong, life, found)
        with pytest.raises(ValueError, match="not the windows that this life cycle was found in"):
            keys_.project_heads(sinking_model, wrong, life, seen, [(3, 0)])
    for head in ((6, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="there is no layer and head"):
            keys_.project_heads(sinking_model, trigger_tokens, life, seen, [head])
    for wrong, said in ((trigger_tokens + 400, "vocabulary"), (trigger_tokens[:, :1], "nobody to attend to")):
        with pytest.raises(ValueError, match=said):
            sinks.score(sinking_model, wrong)


def test_one_spike_token_has_no_dimension(parts):
    life, _, seen = parts
    one = replace(life.main, is_spike=torch.zeros_like(life.main.is_spike).index_fill(0, torch.tensor([0]), True))
    assert "one key has one dimension" in evidence.sk3_few_dimensions(seen, replace(life, cycles=(one,))).reason


def test_groups_are_disjoint_where_they_should_be(parts, trigger_tokens):
    life = parts[0]
    named = sinks.group_tokens(life)
    spike = named["spike"]
    assert spike.nonzero().tolist() == [[1, 0], [2, 20], [3, 47], [4, 5], [4, 30], [5, 0]]
    assert named["next"].nonzero().tolist() == [[1, 1], [2, 21], [4, 6], [4, 31], [5, 1]]
    assert not (named["other"] & spike).any()
    assert (named["other"] | spike | named["smaller"]).all()
    two = replace(life, cycles=(life.main, replace(life.main, is_spike=life.main.is_spike.roll(1))))
    named = sinks.group_tokens(two)
    assert not (named["smaller"] & named["spike"]).any()
    assert not (named["next"] & named["smaller"]).any()


def test_the_head_that_was_built_to_sink_does_and_its_key_is_one_row(parts, sinking_model):
    life, found, seen = parts
    score, geometry = seen.scores.received["spike"], seen.geometry
    ordinary = [head for head in range(4) if head != SINK_HEAD]
    # The triggers of window 4 share what comes after the second: five windows with (nearly) all, and 0.79 and a half.
    assert score[SINK_LAYER, SINK_HEAD] > 0.8 > 0.3 > score[SINK_LAYER, ordinary].max()
    assert keys_.choose_heads(seen, life)[0] == (SINK_LAYER, SINK_HEAD)
    # Its queries are one vector and so is the key: h~ at PLAIN and at the spike's channel are positive on every token.
    assert geometry.cosine["spike"][SINK_LAYER, SINK_HEAD] == pytest.approx(1, abs=1e-3)
    assert geometry.consistency["before"][SINK_LAYER, SINK_HEAD] == pytest.approx(1, abs=1e-5)
    assert geometry.dimension["before"]["spike"][SINK_LAYER, 0] == pytest.approx(1, abs=1e-4)
    assert (
        geometry.gap["spike"][SINK_LAYER, SINK_HEAD] > 5 > 1 > geometry.gap["spike"][SINK_LAYER, ordinary].abs().max()
    )
    # q = 4 h~_PLAIN and k = 4 h~_channel in one coordinate, so |k| is known: 4 times 0.97 sqrt(d).
    assert geometry.key_norm["spike"][SINK_LAYER, 0] == pytest.approx(4 * 8 / math.sqrt(1 + 1 / 16), rel=1e-2)
    rebuilt = keys_.rebuild_keys(weights_of(sinking_model), life, found)
    row = rebuilt.layers.index(SINK_LAYER)
    assert rebuilt.channels[0] == planted.Plant().channel
    assert rebuilt.spike[0, row, 0] == pytest.approx(1, abs=1e-6)
    assert rebuilt.other_channels[0, row, 0].abs() < 1e-6
    assert float(rebuilt.bias_share.max()) == 0
    assert keys_.describe_bias(rebuilt) == NotApplicable("its keys have no bias")


def test_sinks_are_counted_on_the_tokens_of_the_first_half(parts, sinking_model, trigger_tokens):
    life, _, seen = parts
    assert seen.scores.n_tokens["spike"] == 4  # of six, two stand in the second half
    above = torch.zeros(6, 4, 6, 48, dtype=torch.bool)  # layer, head, window, key
    keep = {}
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(6)]
    hooks = [(name, lambda value, hook: keep.update({hook.name: value})) for name in names]
    with torch.inference_mode(), sinking_model.hooks(fwd_hooks=hooks):
        sinking_model(trigger_tokens)
    for layer, name in enumerate(names):
        for k in range(48):
            above[layer, :, :, k] = (keep[name][:, :, k:, k].mean(-1) > 0.3).T
    named = sinks.group_tokens(life)
    for group in ("spike", "other", "next"):
        expected = (above & named[group][None, None]).sum((1, 2))  # layer, key
        assert seen.scores.sinks[group].tolist() == expected[:, :24].sum(1).tolist()
        assert seen.scores.sinks_anywhere[group].tolist() == expected.sum(1).tolist()
    assert seen.scores.sinks["spike"][SINK_LAYER] >= 4
    found = evidence.sk2_on_spikes(seen, life)
    layers = [2, 3, 4]
    on, off = (int(seen.scores.sinks[group][layers].sum()) for group in ("spike", "other"))
    assert found.measured["share_on_spike_tokens"] == pytest.approx(on / (on + off))
    assert found.control["share_of_tokens_that_spike"] == pytest.approx(4 / (6 * 24))


VARIATIONS = {
    "gemma2 with a low cap": ("gemma2", {"attn_logit_softcapping": 0.02}),
    "llama with one key head": ("llama", {"num_key_value_heads": 1}),
}


@pytest.mark.parametrize("family", [*FAMILIES, *VARIATIONS])
def test_geometry_is_that_of_logits_by_brute_force_in_every_family(family, tmp_path, monkeypatch):
    """The gap from the pattern (softmax keeps differences of logits); the rest from the vectors that hooks show."""
    if family in VARIATIONS:
        family, other = VARIATIONS[family]
        name, sizes, expected = FAMILIES[family]
        monkeypatch.setitem(FAMILIES, family, (name, sizes | other, expected))
    directory = tiny(family, tmp_path)
    model = spikesink.load(directory)
    about = spikesink.anatomy(model)
    tokens = spikesink.windows(model, "house", 2, 20)
    spike = torch.zeros(2, 20, dtype=torch.bool)
    spike[0, 0] = spike[1, 3] = spike[1, 7] = True
    after = spike.roll(1, dims=1)
    geometry = keys_._Geometry(about, {"spike": spike, "next": after}, seed=0)
    sinks._over(model, about, tokens, [geometry], "")
    geometry = geometry.result()
    patterns = transformers_attention(directory, tokens)
    gaps = {"spike": [], "next": []}
    layer = 1
    logs = patterns[layer].double().log()  # window, head, query, key
    for name, mine in (("spike", spike), ("next", after)):
        for window, key in mine.nonzero().tolist():
            for query in range(key + 1, 20):
                others = [j for j in range(query + 1) if not spike[window, j]]
                gaps[name].append(logs[window, :, query, key] - logs[window, :, query, others].mean(-1))
        torch.testing.assert_close(
            geometry.gap[name][layer].double(), torch.stack(gaps[name]).mean(0), rtol=1e-3, atol=1e-4
        )
    keep = {}
    names = {"q": "attn.q.hook_out", "k": "attn.k.hook_out", "v": "attn.v.hook_out"}
    if about.sees_rotation:
        names |= {"rq": "attn.hook_rot_q", "rk": "attn.hook_rot_k"}
    hooks = [(f"blocks.{layer}.{hook}", lambda value, hook, n=n: keep.update({n: value})) for n, hook in names.items()]
    with torch.inference_mode(), model.hooks(fwd_hooks=hooks):
        model(tokens)
    keep = {n: x.reshape(2, 20, -1, about.d_head) for n, x in keep.items()}
    group = about.n_heads // about.n_kv_heads
    q, k = (keep["rq"], keep["rk"]) if about.sees_rotation else (keep["q"], keep["k"])
    torch.testing.assert_close(geometry.key_norm["spike"][layer], k[spike].norm(dim=-1).mean(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(
        geometry.value_norm["other"][layer], keep["v"][~spike].norm(dim=-1).mean(0), rtol=1e-4, atol=0
    )
    for head in range(about.n_kv_heads):
        keys = keep["k"][spike][:, head].double()
        eigen = torch.linalg.svdvals(keys) ** 2
        dimension = geometry.dimension["before"]["spike"][layer, head]
        assert float(dimension) == pytest.approx(float(eigen.sum() ** 2 / eigen.square().sum()), rel=1e-4)
    queries = torch.cat([q[w, s + 1 :] for w, s in spike.nonzero().tolist()])
    torch.testing.assert_close(geometry.query_norm[layer], queries.norm(dim=-1).mean(0), rtol=1e-4, atol=0)
    unit = functional.normalize(keep["q"].flatten(0, 1), dim=-1).mean(0).norm(dim=-1)
    torch.testing.assert_close(geometry.consistency["before"][layer], unit, rtol=1e-4, atol=1e-6)
    if about.sees_rotation:
        full = k.repeat_interleave(group, dim=2)
        cosines = torch.stack(
            [
                functional.cosine_similarity(q[w, i], full[w, s], dim=-1)
                for w, s in spike.nonzero().tolist()
                for i in range(s + 1, 20)
            ]
        )
        torch.testing.assert_close(geometry.cosine["spike"][layer], cosines.mean(0), rtol=1e-3, atol=1e-5)
        others = torch.stack(
            [
                functional.cosine_similarity(q[w, i], full[w, : i + 1][~spike[w, : i + 1]], dim=-1).mean(0)
                for w, s in spike.nonzero().tolist()
                for i in range(s + 1, 20)
            ]
        )
        torch.testing.assert_close(geometry.cosine["other"][layer], others.mean(0), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_what_the_models_projection_gives(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    about = spikesink.anatomy(model)
    torch.manual_seed(0)
    for name, parameter in model.original_model.named_parameters():  # scales and biases that are not ones and zeros
        if parameter.ndim == 1 and "layernorm" in name.lower() + "ln_1":
            parameter.data += 0.3 * torch.randn(parameter.shape)
    seen = {}
    tokens = spikesink.windows(model, "house", 1, 16)
    names = {"k": "blocks.1.attn.k.hook_out", "h": about.layer_hooks[1]}
    with (
        torch.inference_mode(),
        model.hooks(fwd_hooks=[(hook, lambda value, hook, n=n: seen.update({n: value})) for n, hook in names.items()]),
    ):
        model(tokens)
    matrix, bias = weights_of(model).keys(1)
    h = seen["h"][0] if about.attention_norm is None else sinks.normalise(seen["h"][0], about)
    torch.testing.assert_close(h @ matrix.T + bias, seen["k"].reshape(16, -1), rtol=1e-3, atol=1e-4)


def test_effective_dimension():
    assert float(keys_.effective_dimension(torch.eye(7))) == pytest.approx(7)
    line = torch.tensor([1.0, -2.0, 3.0])
    assert float(keys_.effective_dimension(4 * torch.outer(line, line))) == pytest.approx(1)
    assert float(keys_.effective_dimension(torch.diag(torch.tensor([3.0, 1.0, 0.0])))) == pytest.approx(16 / 10)


def test_rebuilding_adds_row_after_row(parts, sinking_model):
    life, found, _ = parts
    rebuilt = keys_.rebuild_keys(weights_of(sinking_model), life, found)
    matrix, _ = weights_of(sinking_model).keys(4)
    h, head = found.spike.kept[:, 8], matrix[16:32]
    for n in range(1, len(rebuilt.channels) + 1):
        some = list(rebuilt.channels[:n])
        cosine = functional.cosine_similarity(h[:, some] @ head[:, some].T, h @ head.T, dim=-1).mean()
        assert float(rebuilt.spike[n - 1, rebuilt.layers.index(4), 1]) == pytest.approx(float(cosine), abs=1e-5)
    h = found.other.kept[:, 8]
    some = list(rebuilt.channels)
    cosine = functional.cosine_similarity(h[:, some] @ head[:, some].T, h @ head.T, dim=-1).mean()
    assert float(rebuilt.other_tokens[-1, rebuilt.layers.index(4), 1]) == pytest.approx(float(cosine), abs=1e-5)


def test_a_bias_is_said_how_much_of_the_key_it_is(tmp_path, parts):
    """Qwen2's keys have biases: with one of ten times the rest, keys are mostly bias."""
    life, found, _ = parts
    weights = weights_of(spikesink.load(tiny("qwen2", tmp_path)))
    matrix, _ = weights.keys(1)
    bias = torch.full((matrix.shape[0],), 10.0)

    class Biased:
        anatomy = life.trace.anatomy

        def keys(self, layer):
            return matrix, bias

    rebuilt = keys_.rebuild_keys(Biased(), life, found)
    assert float(rebuilt.bias_share.min()) > 0.7
    assert float(rebuilt.with_bias.min()) > 0.9
    assert keys_.describe_bias(rebuilt)["share"] == pytest.approx(float(rebuilt.bias_share.quantile(0.5)))


def hand_made(parts, layers=6, heads=4, **received_by):
    """A look whose mean scores are given by group and layer."""
    life, _, seen = parts
    scores = replace(
        seen.scores,
        received=seen.scores.received
        | {n: torch.tensor(v)[:, None].expand(layers, heads) for n, v in received_by.items()},
    )
    return life, replace(seen, scores=scores)


def test_attention_is_compared_before_during_and_after_the_plateau(parts):
    """The plateau is read by layers 2, 3 and 4; layers 0 and 1 lie before the step-up, layer 5 after it."""
    given = [0.1, 0.2, 0.6, 0.7, 0.8, 0.4]
    life, seen = hand_made(parts, spike=given, next=[0.01] * 6)
    found = evidence.sk5_over_depth(seen, life)
    assert found.measured["attention_before"] == pytest.approx(0.15)
    assert found.measured["attention_during"] == pytest.approx(0.7)
    assert found.measured["attention_after"] == pytest.approx(0.4)
    assert found.measured["attention_before_without_a_spike"] == pytest.approx(0.15)
    small = replace(life.main, plateau=(2, 3))  # read by layer 1
    small = evidence.sk5_over_depth(seen, replace(life, cycles=(life.main, small)))
    assert small.measured["attention_before"] == pytest.approx(0.15)
    assert small.measured["attention_before_without_a_spike"] == pytest.approx(0.1)
    rows = life.trace.rows
    early = rows.stream.clone()  # the spike tokens already spike as they enter layer 1, in a channel that has no cycle
    early[life.main.is_spike, 2, -1] = 101 * life.trace.medians[2]
    early = replace(life, trace=replace(life.trace, rows=replace(rows, stream=early)))
    assert evidence.sk5_over_depth(seen, early).measured["attention_before_without_a_spike"] == pytest.approx(0.1)
    shorter = replace(life, cycles=(replace(life.main, plateau=(4, 8)),))
    assert evidence.sk5_over_depth(seen, shorter).measured["attention_after"] == pytest.approx(
        0.4
    )  # layer 4 still reads it
    assert found.control["attention_during_next_token"] == pytest.approx(0.01)
    endless = replace(life, cycles=(replace(life.main, plateau=(4, 12)),))
    assert evidence.sk5_over_depth(seen, endless).measured["attention_after"] == []


def test_a_smaller_cycle_is_compared_with_the_layers_in_which_it_rests(parts):
    life, seen = hand_made(parts, smaller=[0.5, 0.4, 0.1, 0.0, 0.1, 0.0], next_smaller=[0.0] * 6)
    assert "no second cycle" in evidence.x_sk8_smaller_cycle(seen, life).reason
    two = replace(life, cycles=(life.main, replace(life.main, plateau=(0, 2))))
    scores = replace(seen.scores, n_tokens_anywhere=seen.scores.n_tokens_anywhere | {"smaller": 3})
    seen = replace(seen, scores=scores)
    found = evidence.x_sk8_smaller_cycle(seen, two)
    assert found.measured["attention_during"] == pytest.approx(0.45)
    assert found.measured["attention_otherwise"] == pytest.approx(0.05)


def test_sink_heads_are_told_from_others_by_their_score(parts):
    life, _, seen = parts
    found = evidence.sk4_favoured(seen, life)
    score = seen.scores.received["spike"][2:5].flatten()
    gap = seen.geometry.gap["spike"][2:5].flatten()
    assert found.measured["n_sink_heads"] == int((score > 0.3).sum())
    assert found.measured["n_heads"] == 12
    assert found.measured["logit_gap_sink"] == pytest.approx(float(gap[score > 0.3].mean()))
    assert found.measured["logit_gap_other"] == pytest.approx(float(gap[score <= 0.3].mean()))
    assert found.measured["logit_gap_sink"] > 5 > 1 > abs(found.measured["logit_gap_other"])
    ranks = torch.stack([gap.argsort().argsort(), score.argsort().argsort()]).double()
    assert found.measured["spearman"] == pytest.approx(float(torch.corrcoef(ranks)[0, 1]), abs=1e-6)
    none = replace(seen, scores=replace(seen.scores, epsilon=0.999))
    assert "no heads of the plateau sink" in evidence.sk4_favoured(none, life).reason


def test_a_trigger_that_is_called_no_spike_token_is_a_secondary_sink(parts, sinking_model, trigger_tokens):
    """Told that only the other windows' triggers spike, the one at position 5 of window 4 is found, with its layers."""
    life, found, _ = parts
    spike = is_spike(life, life.main)
    spike[4, 5] = False
    rows = sinks._Secondary(life.trace.anatomy, 0.3, spike, found)
    sinks._over(sinking_model, life.trace.anatomy, trigger_tokens, [rows], "")
    rows = rows.result()
    mine = (rows.window == 4) & (rows.position == 5)
    assert int(mine.sum()) == 1
    assert rows.heads[mine][0, SINK_LAYER] > 0
    assert rows.cosine[mine][0, 2 * SINK_LAYER] > 0.999
    assert rows.cosine_other[2 * SINK_LAYER] < 0.6
    assert (rows.position < 24).all()
    seen = keys_.AttentionReading(parts[2].scores, parts[2].geometry, replace_rows(rows, mine))
    result = evidence.x_sk9_secondary(seen)
    assert result.measured["cosine_secondary"] > 0.999
    assert result.measured["first_layer"] <= SINK_LAYER <= result.measured["last_layer"]
    table = evidence.secondary_table(seen, sinking_model.tokenizer.decode)
    assert table.iloc[0][["token", "times"]].tolist() == ["'<spike>'", 1]


def replace_rows(rows, which):
    names = ("window", "position", "token", "heads", "cosine", "cosine_after")
    return replace(rows, n=int(which.sum()), **{name: getattr(rows, name)[which] for name in names})


def test_clouds_hold_the_queries_and_keys_of_the_heads_asked_for(parts, sinking_model, trigger_tokens):
    life, _, seen = parts
    heads = keys_.choose_heads(seen, life)
    clouds = keys_.project_heads(sinking_model, trigger_tokens, life, seen, heads, most=60)
    assert [(cloud.layer, cloud.head) for cloud in clouds] == heads
    for cloud in clouds:
        n = len(cloud.is_query)
        assert int(cloud.is_query.sum()) == n // 2
        assert int((cloud.is_spike & cloud.is_query).sum()) == 6
        assert cloud.tsne.shape == cloud.pca.shape == (n, 2)
    # The built head's keys and queries lie on one line, and the spike tokens' keys at one end of it.
    first = clouds[0]
    assert first.explained[0] > 0.99
    along = first.pca[:, 0]
    key, query = ~first.is_query, first.is_query
    far = along[key & first.is_spike]
    assert float(far.std()) < 0.05 * float((far.mean() - along[key & ~first.is_spike].mean()).abs())
    assert query.any()


def numbered(*shape):
    """A tensor whose entries are all different."""
    return torch.arange(1.0, math.prod(shape) + 1).view(*shape) / 100


def test_each_measure_takes_its_layers_heads_and_tokens(parts):
    """Geometry by hand, every entry another number; layers 2 to 4 read the plateau, 0 and 1 lie before it."""
    life, _, seen = parts
    per_head = {n: numbered(6, 4) * k for k, n in enumerate(("spike", "next", "other"), 1)}
    per_key = {n: numbered(6, 2) + 3 * k for k, n in enumerate(("spike", "next", "other"))}
    dimension = {
        stage: {n: 1 + numbered(6, 2) * (k + 1) * (2 if stage == "after" else 1) for k, n in enumerate(kinds)}
        for stage in ("before", "after")
        for kinds in [("spike", "matched", "next", "other")]
    }
    score = numbered(6, 4).flip(1)
    scores = replace(
        seen.scores, epsilon=0.15, received={"spike": score, "next": score / 7}, sinks_anywhere=seen.scores.sinks
    )
    geometry = replace(
        seen.geometry,
        gap={n: per_head[n] for n in ("spike", "next")},
        cosine=per_head,
        query_norm=-numbered(6, 4),
        key_norm=per_key,
        value_norm=per_key,
        dimension=dimension,
    )
    made = replace(seen, scores=scores, geometry=geometry)

    def middle(of, layers):
        return float(of[layers].flatten().double().quantile(0.5))

    during, before = [2, 3, 4], [0, 1]
    plain, rotated = dimension["before"], dimension["after"]
    found_dimensions = evidence.sk3_few_dimensions(made, life)
    assert found_dimensions.measured == pytest.approx(
        {
            "effective_dimension_sink": middle(plain["spike"], during),
            "effective_dimension_other": middle(plain["matched"], during),
            "n_tokens": 6,
            "effective_dimension_sink_rotated": middle(rotated["spike"], during),
            "effective_dimension_other_rotated": middle(rotated["matched"], during),
        }
    )
    assert found_dimensions.control == pytest.approx(
        {
            "effective_dimension_all_others": middle(plain["other"], during),
            "effective_dimension_next_token": middle(plain["next"], during),
            "effective_dimension_sink_without_a_spike": middle(plain["spike"], before),
        }
    )
    values = evidence.sk7_small_values(made, life)
    ratio = per_key["spike"] / per_key["other"]
    assert values.measured["value_norm_ratio"] == pytest.approx(middle(ratio, during))
    assert values.measured["largest_ratio"] == pytest.approx(float(ratio[during].max()))
    assert values.control["value_norm_ratio_next_token"] == pytest.approx(
        middle(per_key["next"] / per_key["other"], during)
    )
    assert values.control["value_norm_ratio_without_a_spike"] == pytest.approx(middle(ratio, before))
    favoured = evidence.sk4_favoured(made, life)
    flat = score[during].flatten()
    sinking = flat > 0.15
    for name, which in (("sink", sinking), ("other", ~sinking)):
        expected = float(per_head["spike"][during].flatten()[which].mean())
        assert favoured.measured[f"logit_gap_{name}"] == pytest.approx(expected)
        assert favoured.measured[f"cosine_{name}"] == pytest.approx(expected)
    sink_of = {n: float(per_head[n][during].flatten()[sinking].mean()) for n in per_head}
    assert favoured.control["logit_gap_sink_next_token"] == pytest.approx(sink_of["next"])
    assert favoured.control["cosine_sink_all_other_keys"] == pytest.approx(sink_of["other"])
    keys = per_key["spike"][during][:, [0, 0, 1, 1]].flatten()  # query heads 0 and 1 share key head 0
    assert favoured.measured["spearman_key_norm"] == pytest.approx(trace.spearman(keys, flat))
    assert favoured.measured["spearman_query_norm"] == pytest.approx(
        -trace.spearman(numbered(6, 4)[during].flatten(), flat)
    )
    nobody = replace(made, scores=replace(scores, epsilon=0.9))
    for measure in (evidence.sk3_few_dimensions, evidence.sk7_small_values):
        assert "no head of the plateau sinks" in measure(nobody, life).reason


def test_sinks_are_shared_out_between_the_groups(parts):
    life, _, seen = parts
    counts = {"spike": [9, 1, 6, 3, 1, 9], "smaller": [9, 1, 0, 1, 1, 9], "other": [9, 2, 1, 1, 0, 9]}
    on = {name: torch.tensor(values) for name, values in counts.items()}
    everywhere = on | {"other": torch.tensor([9, 2, 11, 1, 0, 9])}
    scores = replace(seen.scores, sinks=on, sinks_anywhere=everywhere)
    found = evidence.sk2_on_spikes(replace(seen, scores=scores), life)
    assert found.measured == pytest.approx(
        {"share_on_spike_tokens": 10 / 14, "share_whole_windows": 10 / 24, "n_sinks": 14, "n_sinks_before": 31}
    )
    assert found.control["share_on_spike_tokens_before"] == pytest.approx(10 / 31)
    assert found.control["share_on_tokens_of_any_cycle_before"] == pytest.approx(20 / 31)


def test_the_other_positions_leave_out_the_first(parts):
    scores = parts[2].scores
    above = torch.zeros(6, 4, 48)
    above[..., 0] = 1
    above[0, 0, 2] = above[0, 0, 3] = above[1, 0, 3] = 0.5
    above[..., 24:] = 1
    found = evidence.sk1_many_heads(replace(scores, above=above)).control
    assert found["sink_ratio_other_positions"] == pytest.approx(1.5 / 24 / 23)
    assert found["sink_ratio_highest_other_position"] == pytest.approx(1 / 24)
    assert found["sink_ratio_ordinary_tokens"] == pytest.approx(int(scores.sinks["other"].sum()) / 24 / (6 * 24 - 4))


def test_rebuilding_has_controls_of_other_rows(parts, sinking_model):
    life, found, _ = parts
    rebuilt = keys_.rebuild_keys(weights_of(sinking_model), life, found)
    matrix, _ = weights_of(sinking_model).keys(4)
    head, row, n = matrix[16:32], rebuilt.layers.index(4), len(rebuilt.channels)
    spike, other = found.spike.kept[:, 8], found.other.kept[:, 8]
    ranked = found.spike.share[found.cycle.middle].argsort(descending=True).tolist()
    rows = [channel for channel in ranked if channel not in rebuilt.channels][:n]
    cosine = functional.cosine_similarity(spike[:, rows] @ head[:, rows].T, spike @ head.T, dim=-1).mean()
    assert float(rebuilt.other_channels[-1, row, 1]) == pytest.approx(float(cosine), abs=1e-5)
    own = []
    for h in other:
        rows = h.abs().argsort(descending=True)[:n]
        own.append(functional.cosine_similarity(head[:, rows] @ h[rows], head @ h, dim=0))
    assert float(rebuilt.own_channels[row, 1]) == pytest.approx(float(torch.stack(own).mean()), abs=1e-5)


def test_clouds_take_a_query_head_and_the_key_head_that_it_shares(parts, sinking_model, trigger_tokens, monkeypatch):
    seen_points = []

    class Flat:
        def __init__(self, *args, **options): ...

        def fit_transform(self, points):
            seen_points.append(points)
            return points[:, :2]

    monkeypatch.setattr(keys_, "TSNE", Flat)
    life, _, seen = parts
    [cloud] = keys_.project_heads(sinking_model, trigger_tokens, life, seen, [(4, 2)], most=24)
    keep = {}
    names = ("q", "k")
    hooks = [(f"blocks.4.attn.hook_rot_{n}", lambda value, hook, n=n: keep.update({n: value})) for n in names]
    with torch.inference_mode(), sinking_model.hooks(fwd_hooks=hooks):
        sinking_model(trigger_tokens)
    for which, name, head in ((cloud.is_query, "q", 2), (~cloud.is_query, "k", 1)):
        there = keep[name][:, :, head, :2].flatten(0, 1)
        assert float((cloud.tsne[which][:, None] - there).abs().amax(-1).amin(1).max()) < 1e-5
    # The origin is where the zero vector goes: taken off every point, it leaves a map that is linear.
    points = torch.from_numpy(seen_points[0]).double()
    there = (cloud.pca - cloud.origin).double()
    torch.testing.assert_close(points @ torch.linalg.lstsq(points, there).solution, there, rtol=0, atol=1e-4)
    assert torch.linalg.matrix_rank(points) == 16


def test_secondary_sinks_are_tabulated_by_token():
    """Two tokens; the cosine of the first jumps over block 2, of the second over block 4."""
    first, second, third = (
        [0, 0, 0.9, 0.9, 0.9, 0.5, 0],
        [0, 0.1, 0.2, 0.1, 0.8, 0.9, 0],
        [0, 0.1, 0.1, 0.6, 0.7, 0.9, 0],
    )
    cosine = torch.tensor([first, second, third])
    heads = torch.tensor([[0, 0.5, 1.0], [0, 0, 0.25], [0.0, 0, 0.5]])
    three = torch.arange(3)
    rows = sinks.Secondary(
        3, three, three, torch.tensor([7, 8, 8]), heads, cosine, torch.full((7,), 0.1), cosine / 2, 5
    )
    seen = keys_.AttentionReading(None, None, rows)
    table = evidence.secondary_table(seen, lambda ids: str(ids[0]))
    assert table.values.tolist() == [
        ["'8'", 2, "2 to 2", 1, 0.5, 4, pytest.approx(0.75)],
        ["'7'", 1, "1 to 2", 2, 1.0, 2, pytest.approx(0.9)],
    ]
    found = evidence.x_sk9_secondary(seen)
    assert found.measured["cosine_secondary"] == pytest.approx(0.85)  # of 0.9, 0.9, 0.8 and 0.7
    assert (found.measured["fewest_layers"], found.measured["most_layers"]) == (1, 2)
    assert (found.measured["first_layer"], found.measured["last_layer"]) == (1, 2)
    assert found.control == {"cosine_next_token": pytest.approx(0.425), "n_aligned_but_no_sinks": 5}


def test_the_token_right_after_a_secondary_sink_is_its_control(parts, sinking_model, trigger_tokens):
    life, found, _ = parts
    none = torch.zeros(6, 48, dtype=torch.bool)
    rows = sinks._Secondary(life.trace.anatomy, 0.3, none, found)
    sinks._over(sinking_model, life.trace.anatomy, trigger_tokens, [rows], "")
    after = rows.result()
    spike = is_spike(life, life.main)
    first = sinks._Secondary(life.trace.anatomy, 1e-6, none, found)  # every token is a sink, so all cosines are kept
    sinks._over(sinking_model, life.trace.anatomy, trigger_tokens, [first], "")
    everything = first.result()
    mine = int(((after.window == 4) & (after.position == 5)).nonzero()[0])
    there = int(((everything.window == 4) & (everything.position == 6)).nonzero()[0])
    torch.testing.assert_close(after.cosine_after[mine], everything.cosine[there])
    assert spike[4, 5]
    # Asked for an epsilon that only those at position 0 reach, the other two triggers are aligned and no sinks.
    aligned = sinks._Secondary(life.trace.anatomy, 0.9999, none, found)
    sinks._over(sinking_model, life.trace.anatomy, trigger_tokens, [aligned], "")
    assert (aligned.result().n, aligned.result().n_aligned) == (2, 2)


def test_a_plateau_that_no_layer_reads_is_a_reason(parts, sinking_model, trigger_tokens):
    """A spike that is written by the last block only: the stream is never read again but by the final norm."""
    life, _, _ = parts
    late = replace(life, cycles=(replace(life.main, plateau=(12, 12), step_down=()),))
    found = collapse.measure_collapse(sinking_model, trigger_tokens, late)
    seen = keys_.read_attention(sinking_model, trigger_tokens, late, found)
    said = NotApplicable("no layer reads the plateau of the spike")
    measures = [
        evidence.sk2_on_spikes,
        evidence.sk3_few_dimensions,
        evidence.sk4_favoured,
        evidence.sk5_over_depth,
        evidence.x_sk8_smaller_cycle,
    ]
    for measure in (*measures, evidence.sk7_small_values, keys_.choose_heads, keys_.describe_queries):
        assert measure(seen, late) == said
    assert seen.geometry == said
    assert keys_.project_heads(sinking_model, trigger_tokens, late, seen, keys_.choose_heads(seen, late)) == said
    assert isinstance(keys_.rebuild_keys(weights_of(sinking_model), late, found), NotApplicable)
    assert isinstance(collapse.replace_input(sinking_model, trigger_tokens, late, found), NotApplicable)


def test_where_nothing_spikes_heads_are_scored_and_the_rest_says_why(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    none = collapse.measure_collapse(random_model, tokens, life)
    seen = keys_.read_attention(random_model, tokens, life, none)
    assert evidence.sk1_many_heads(seen.scores).measured["sink_ratio"] == 0
    measures = [
        evidence.sk2_on_spikes,
        evidence.sk3_few_dimensions,
        evidence.sk4_favoured,
        evidence.sk5_over_depth,
        evidence.x_sk8_smaller_cycle,
    ]
    for measure in (*measures, evidence.sk7_small_values, keys_.choose_heads, keys_.describe_queries):
        assert measure(seen, life) == NotApplicable(life.reason)
    assert evidence.x_sk9_secondary(seen) == keys_.rebuild_keys(weights_of(random_model), life, none) == none
    assert keys_.project_heads(random_model, tokens, life, seen, keys_.choose_heads(seen, life)) == none


def test_memory_does_not_grow_with_the_number_of_windows(random_model):
    """What `look` keeps of 2 windows and of 8 is the same but for a few numbers a window."""
    sizes = []
    for n in (2, 8):
        scores = sinks.score(random_model, spikesink.windows(random_model, "house", n, 32))
        sizes.append(sum(t.numel() for t in vars(scores).values() if isinstance(t, torch.Tensor)))
    assert sizes[1] - sizes[0] == 6 * 6 * 4  # windows, layers, heads
