"""Why a token is a sink: a hand-built head whose sink key is known, and brute force for the rest."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import spikesink
from spikesink.chain import keys as keys_
from spikesink.chain.collapse import measure_collapse, replace_input
from spikesink.chain.trace import reduce_windows, spearman
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.model.anatomy import block, normalise
from spikesink.model.weights import weights_of
from tests import planted
from tests.test_families import FAMILIES, tiny
from tests.test_sinks import transformers_attention

OF_KEYS = (
    evidence.sk3_few_dimensions,
    evidence.sk4_favoured,
    evidence.sk7_small_values,
    keys_.choose_heads,
    keys_.describe_queries,
)


def test_what_cannot_be_read_is_refused(sunk, sinking_model, trigger_tokens):
    life, collapse, attention = sunk
    for wrong in (trigger_tokens[:3], trigger_tokens[:, :20], trigger_tokens.flip(0)):
        with pytest.raises(ValueError, match="windows"):
            keys_.read_attention(sinking_model, wrong, life, collapse)
        with pytest.raises(ValueError, match="windows"):
            keys_.project_heads(sinking_model, wrong, life, attention, [(3, 0)])
    for head in ((6, 0), (0, 4), (-1, 0)):
        with pytest.raises(ValueError, match="no layer and head"):
            keys_.project_heads(sinking_model, trigger_tokens, life, attention, [head])


def test_the_head_that_was_built_to_sink_does_and_its_key_is_one_row(sunk, sinking_model):
    life, collapse, attention = sunk
    score, geometry, layer, head = attention.scores.received["spike"], attention.geometry, 3, 0
    # The triggers of window 4 share what comes after the second: five windows with (nearly) all, and 0.79 and a half.
    assert score[layer, head] > 0.8 > 0.3 > score[layer, 1:].max()
    assert keys_.choose_heads(attention, life)[0] == (layer, head)
    # Its queries are one vector and so is the key: h~ at channel 5 and at the spike's are positive on every token.
    assert geometry.cosine["spike"][layer, head] == pytest.approx(1, abs=1e-3)
    assert geometry.consistency["before"][layer, head] == pytest.approx(1, abs=1e-5)
    assert geometry.dimension["before"]["spike"][layer, 0] == pytest.approx(1, abs=1e-4)
    assert geometry.gap["spike"][layer, head] > 5 > 1 > geometry.gap["spike"][layer, 1:].abs().max()
    # q = 4 h~_5 and k = 4 h~_channel in one coordinate, so |k| is known: 4 times 0.97 sqrt(d).
    assert geometry.key_norm["spike"][layer, 0] == pytest.approx(4 * 8 / math.sqrt(1 + 1 / 16), rel=1e-2)
    rebuilt = keys_.rebuild_keys(weights_of(sinking_model), life, collapse)
    row = rebuilt.layers.index(layer)
    assert rebuilt.channels[0] == planted.Plant().channel
    assert rebuilt.spike[0, row, 0] == pytest.approx(1, abs=1e-6)
    assert rebuilt.other_channels[0, row, 0].abs() < 1e-6
    assert keys_.describe_bias(rebuilt) == NotApplicable("its keys have no bias")


VARIATIONS = [("gemma2", {"attn_logit_softcapping": 0.02}), ("llama", {"num_key_value_heads": 1})]


@pytest.mark.parametrize(("family", "more"), [*((family, {}) for family in FAMILIES), *VARIATIONS])
def test_geometry_is_that_of_logits_by_brute_force_in_every_family(family, more, sunk, tmp_path, monkeypatch):
    """The gap from the pattern (softmax keeps differences of logits); the rest from the vectors that hooks show."""
    name, sizes, expected = FAMILIES[family]
    monkeypatch.setitem(FAMILIES, family, (name, sizes | more, expected))
    directory = tiny(family, tmp_path)
    model, layer = spikesink.load(directory), 1
    about, tokens = model.anatomy, spikesink.windows(model, "house", 2, 20)
    spike = torch.zeros(2, 20, dtype=torch.bool)
    spike[0, 0] = spike[1, 3] = spike[1, 7] = True
    groups = {"spike": spike, "next": spike.roll(1, dims=1)}
    reducer = keys_._GeometryReducer(model, sunk[0], groups, seed=0)
    reduce_windows(model, tokens, [reducer], "")
    geometry = reducer.result()
    logs = transformers_attention(directory, tokens)[layer].double().log()  # window, head, query, key
    for name, mine in groups.items():
        gaps = []
        for window, key in mine.nonzero().tolist():
            for query in range(key + 1, 20):
                others = [j for j in range(query + 1) if not spike[window, j]]
                gaps.append(logs[window, :, query, key] - logs[window, :, query, others].mean(-1))
        expected = torch.stack(gaps).mean(0)
        torch.testing.assert_close(geometry.gap[name][layer].double(), expected, rtol=1e-3, atol=1e-4)
    names = keys_.HOOKS | (keys_.ROTATED if about.sees_rotation else {})
    _, cache = model.run_with_cache(tokens, names_filter=[f"blocks.{layer}.{hook}" for hook in names.values()])
    shown = {n: cache[f"blocks.{layer}.{hook}"].reshape(2, 20, -1, about.d_head) for n, hook in names.items()}
    q, k = (shown["rotated_q"], shown["rotated_k"]) if about.sees_rotation else (shown["q"], shown["k"])

    def close(values, expected, rtol=1e-4, atol=0.0):
        torch.testing.assert_close(values[layer], expected, rtol=rtol, atol=atol)

    close(geometry.key_norm["spike"], k[spike].norm(dim=-1).mean(0))
    close(geometry.value_norm["other"], shown["v"][~spike].norm(dim=-1).mean(0))
    eigen = torch.linalg.svdvals(shown["k"][spike].transpose(0, 1).double()) ** 2  # key head, value
    close(geometry.dimension["before"]["spike"], eigen.sum(-1) ** 2 / eigen.square().sum(-1))
    later = [(w, s, i) for w, s in spike.nonzero().tolist() for i in range(s + 1, 20)]
    close(geometry.query_norm, torch.stack([q[w, i].norm(dim=-1) for w, _, i in later]).mean(0))
    close(geometry.consistency["before"], functional.normalize(shown["q"].flatten(0, 1), dim=-1).mean(0).norm(dim=-1))
    if about.sees_rotation:
        full, cosine = k.repeat_interleave(about.n_heads // about.n_kv_heads, dim=2), functional.cosine_similarity
        to_spike = [cosine(q[w, i], full[w, s], dim=-1) for w, s, i in later]
        close(geometry.cosine["spike"], torch.stack(to_spike).mean(0), 1e-3, 1e-5)
        ordinary = [full[w, : i + 1][~spike[w, : i + 1]] for w, _, i in later]
        to_others = [cosine(q[w, i], some, dim=-1).mean(0) for (w, _, i), some in zip(later, ordinary, strict=True)]
        close(geometry.cosine["other"], torch.stack(to_others).mean(0), 1e-3, 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_keys_are_what_the_models_projection_gives(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    about = model.anatomy
    torch.manual_seed(0)
    for name, parameter in model.original_model.named_parameters():  # scales and biases that are not ones and zeros
        if parameter.ndim == 1 and "layernorm" in name.lower() + "ln_1":
            parameter.data += 0.3 * torch.randn(parameter.shape)
    names = ["blocks.1.attn.k.hook_out", about.layer_hooks[1]]
    _, cache = model.run_with_cache(spikesink.windows(model, "house", 1, 16), names_filter=names)
    matrix, bias = weights_of(model).keys(1)
    key, h = cache[names[0]], cache[names[1]][0]
    h = h if about.attention_norm is None else normalise(h, about)
    torch.testing.assert_close(h @ matrix.T + bias, key.reshape(16, -1), rtol=1e-3, atol=1e-4)


def test_keys_are_rebuilt_row_after_row_and_from_other_rows(sunk, sinking_model):
    life, collapse, _ = sunk
    rebuilt = keys_.rebuild_keys(weights_of(sinking_model), life, collapse)
    matrix = weights_of(sinking_model).keys(4)[0][16:32]  # of key head 1
    spike, other, row = collapse.spike.kept[:, 8], collapse.other.kept[:, 8], rebuilt.layers.index(4)
    channels = list(rebuilt.channels)

    def cosine(h, rows):
        return float(functional.cosine_similarity(h[:, rows] @ matrix[:, rows].T, h @ matrix.T, dim=-1).mean())

    ranked = collapse.spike.share[collapse.cycle.middle].argsort(descending=True).tolist()
    others = [channel for channel in ranked if channel not in channels]
    for n in range(1, len(channels) + 1):
        for values, h, rows in (
            (rebuilt.spike, spike, channels[:n]),
            (rebuilt.other_tokens, other, channels[:n]),
            (rebuilt.other_channels, spike, others[:n]),
        ):
            assert float(values[n - 1, row, 1]) == pytest.approx(cosine(h, rows), abs=1e-5)
    own = torch.tensor([cosine(h[None], h.abs().argsort(descending=True)[: len(channels)]) for h in other])
    assert float(rebuilt.own_channels[row, 1]) == pytest.approx(float(own.mean()), abs=1e-5)


def test_how_much_of_the_key_a_bias_is(sunk, sinking_model, monkeypatch):
    """With one of ten times the rest, keys are mostly bias."""
    weights = weights_of(sinking_model)
    matrix, _ = weights.keys(4)
    monkeypatch.setattr(type(weights), "keys", lambda self, layer: (matrix, torch.full((len(matrix),), 100.0)))
    rebuilt = keys_.rebuild_keys(weights, *sunk[:2])
    assert float(rebuilt.bias_share.min()) > 0.7
    assert float(rebuilt.with_bias.min()) > 0.9
    assert keys_.describe_bias(rebuilt)["share"] == pytest.approx(float(rebuilt.bias_share.quantile(0.5)))


def numbered(*shape):
    """A tensor whose entries are all different."""
    return torch.arange(1.0, math.prod(shape) + 1).view(*shape) / 100


def test_each_measure_takes_its_layers_heads_and_tokens(sunk):
    """Geometry by hand, every entry another number; layers 2 to 4 read the plateau, 0 and 1 lie before it."""
    life, _, attention = sunk
    per_head = {n: numbered(6, 4) * k for k, n in enumerate(("spike", "next", "other"), 1)}
    per_key = {n: numbered(6, 2) + 3 * k for k, n in enumerate(("spike", "next", "other"))}
    plain = {n: 1 + numbered(6, 2) * (k + 1) for k, n in enumerate(("spike", "matched", "next", "other"))}
    rotated = {n: 2 * dimension for n, dimension in plain.items()}
    score, ratio = numbered(6, 4).flip(1), per_key["spike"] / per_key["other"]
    geometry = replace(
        attention.geometry,
        gap={n: per_head[n] for n in ("spike", "next")},
        cosine=per_head,
        query_norm=-numbered(6, 4),
        key_norm=per_key,
        value_norm=per_key,
        dimension={"before": plain, "after": rotated},
    )
    scores = replace(attention.scores, epsilon=0.15, received={"spike": score, "next": score / 7})
    made = replace(attention, scores=scores, geometry=geometry)

    def middle(values, layers):
        return float(values[layers].flatten().double().quantile(0.5))

    during, before = [2, 3, 4], [0, 1]
    flat = score[during].flatten()
    of_sinks = {n: float(per_head[n][during].flatten()[flat > 0.15].mean()) for n in per_head}
    keys = per_key["spike"][during][:, [0, 0, 1, 1]].flatten()  # query heads 0 and 1 share key head 0
    expected = {
        "effective_dimension_sink": middle(plain["spike"], during),
        "effective_dimension_other": middle(plain["matched"], during),
        "effective_dimension_sink_rotated": middle(rotated["spike"], during),
        "effective_dimension_other_rotated": middle(rotated["matched"], during),
        "effective_dimension_all_others": middle(plain["other"], during),
        "effective_dimension_next_token": middle(plain["next"], during),
        "effective_dimension_sink_without_a_spike": middle(plain["spike"], before),
        "n_tokens": 6,
        "value_norm_ratio": middle(ratio, during),
        "largest_ratio": float(ratio[during].max()),
        "value_norm_ratio_next_token": middle(per_key["next"] / per_key["other"], during),
        "value_norm_ratio_without_a_spike": middle(ratio, before),
        "n_sink_heads": int((flat > 0.15).sum()),
        "logit_gap_sink": of_sinks["spike"],
        "logit_gap_other": float(per_head["spike"][during].flatten()[flat <= 0.15].mean()),
        "spearman": spearman(per_head["spike"][during].flatten(), flat),
        "cosine_sink": of_sinks["spike"],
        "logit_gap_sink_next_token": of_sinks["next"],
        "cosine_sink_all_other_keys": of_sinks["other"],
        "spearman_key_norm": spearman(keys, flat),
        "spearman_query_norm": spearman(-numbered(6, 4)[during].flatten(), flat),
    }
    values = {}
    for measure in (evidence.sk3_few_dimensions, evidence.sk4_favoured, evidence.sk7_small_values):
        values |= measure(made, life).measured | measure(made, life).control
    assert {name: values[name] for name in expected} == pytest.approx(expected)
    nobody = replace(made, scores=replace(scores, epsilon=0.9))
    for measure in (evidence.sk3_few_dimensions, evidence.sk4_favoured, evidence.sk7_small_values):
        assert "of the plateau sink" in measure(nobody, life).reason
    one = replace(life.main, is_spike=torch.zeros_like(life.main.is_spike).index_fill(0, torch.tensor([0]), True))
    assert "one key has one dimension" in evidence.sk3_few_dimensions(made, replace(life, cycles=(one,))).reason


def test_clouds_hold_the_queries_and_keys_of_the_heads_asked_for(sunk, sinking_model, trigger_tokens):
    """The built head's keys and queries lie on one line, and the spike tokens' keys at one end of it."""
    life, _, attention = sunk
    heads = keys_.choose_heads(attention, life)
    clouds = keys_.project_heads(sinking_model, trigger_tokens, life, attention, heads, most=60)
    assert [(cloud.layer, cloud.head) for cloud in clouds] == heads
    first = clouds[0]
    assert int(first.is_query.sum()) == len(first.is_query) // 2 == len(first.flat) // 2
    assert int((first.is_spike & first.is_query).sum()) == 6
    assert first.explained[0] > 0.99
    far, others = (first.flat[~first.is_query & mine, 0] for mine in (first.is_spike, ~first.is_spike))
    assert float(far.std()) < 0.05 * float((far.mean() - others.mean()).abs())


def test_clouds_take_a_query_head_and_the_key_head_that_it_shares(sunk, sinking_model, trigger_tokens):
    """Inner products of the plane's points about the origin are those of the vectors, projected on its two axes."""
    [cloud] = keys_.project_heads(sinking_model, trigger_tokens, sunk[0], sunk[2], [(4, 2)], most=6 * 48)
    names = [f"blocks.4.attn.hook_rot_{name}" for name in "qk"]
    _, cache = sinking_model.run_with_cache(trigger_tokens, names_filter=names)
    queries, keys = (cache[name].flatten(0, 1).double() for name in names)  # token, head, d_head
    vectors = torch.cat([queries[:, 2], keys[:, 1]])
    axes = torch.linalg.svd(vectors - vectors.mean(0), full_matrices=False).Vh[:2].T
    # Every token is there, each window's spike tokens first: compare what does not hang on order or sign.
    mine, theirs = (cloud.flat - cloud.origin).double(), vectors @ axes
    torch.testing.assert_close(mine.abs().sort(0).values, theirs.abs().sort(0).values, rtol=0, atol=1e-3)


def test_a_plateau_that_no_layer_reads_is_a_reason(sunk, sinking_model, trigger_tokens):
    """A spike that is written by the last block only: the stream is never read again but by the final norm."""
    late = replace(sunk[0], cycles=(replace(sunk[0].main, plateau=(block(12), block(12)), step_down=()),))
    collapse = measure_collapse(sinking_model, trigger_tokens, late)
    attention = keys_.read_attention(sinking_model, trigger_tokens, late, collapse)
    said = NotApplicable("no layer reads the plateau of the spike")
    for measure in OF_KEYS:
        assert measure(attention, late) == attention.geometry == said
    for measure in (evidence.sk2_on_spikes, evidence.sk5_over_depth, evidence.x_sk8_smaller_cycle):
        assert "no layer reads" in measure(attention, late).reason
    heads = keys_.choose_heads(attention, late)
    assert keys_.project_heads(sinking_model, trigger_tokens, late, attention, heads) == said
    assert isinstance(keys_.rebuild_keys(weights_of(sinking_model), late, collapse), NotApplicable)
    assert isinstance(replace_input(sinking_model, trigger_tokens, late, collapse), NotApplicable)
