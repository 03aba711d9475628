"""Who is a sink: scores by hand and by transformers' own attention, and a head that was built to sink."""

import math
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

import spikesink
from spikesink.chain import sinks
from spikesink.chain.trace import received, reduce_windows
from spikesink.ledger import evidence
from spikesink.model.anatomy import block
from tests.test_families import FAMILIES, tiny

OTHER_KEYS = ("sink_ratio_other_positions", "sink_ratio_highest_other_position", "sink_ratio_ordinary_tokens")


def transformers_attention(directory, tokens):
    """The patterns that transformers itself returns, layer by layer."""
    model = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager", dtype=torch.float32).eval()
    return model(tokens, output_attentions=True, use_cache=False).attentions


def alpha(pattern):
    """Scores by the definition: [window, head, key]."""
    return torch.stack([pattern[..., k:, k].mean(-1) for k in range(pattern.shape[-1])], dim=-1)


def test_the_score_is_the_mean_over_queries_at_or_after_the_key():
    pattern = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.7, 0, 0.1, 0.2]]])
    expected = [(1 + 0.5 + 0.2 + 0.7) / 4, (0.5 + 0.3 + 0) / 3, (0.5 + 0.1) / 2, 0.2]
    assert received(pattern)[0].tolist() == pytest.approx(expected)
    near = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0.3, 0.7, 0], [0, 0, 0.8, 0.2]]])  # a window of two
    assert received(near)[0].tolist() == pytest.approx([1.5 / 2, 0.8 / 2, 1.5 / 2, 0.2])
    chunks = torch.tensor([[[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, 0.6, 0.4]]])
    assert received(chunks)[0].tolist() == pytest.approx([1.5 / 2, 0.5, 1.6 / 2, 0.4])


def test_scores_are_those_of_transformers_attention(random_directory, random_model):
    tokens = spikesink.windows(random_model, "house", 3, 40)
    scores = sinks.score(random_model, tokens, epsilon=0.05)
    for layer, pattern in enumerate(transformers_attention(random_directory, tokens)):
        expected = alpha(pattern)
        assert (scores.at[:, layer] - expected[..., 0]).abs().max() < 1e-5
        assert (scores.mean[layer] - expected.mean(0)).abs().max() < 1e-5
        torch.testing.assert_close(scores.above[layer], (expected > 0.05).float().mean(0))
    assert scores.ratio() == pytest.approx(float((scores.at > 0.05).double().mean()))
    assert scores.ratio(1e-9) == 1 >= scores.ratio(0.01) >= scores.ratio() >= scores.ratio(0.2)
    short, same = sinks.score(random_model, tokens, length=16), sinks.score(random_model, tokens[:, :16])
    torch.testing.assert_close(short.at, same.at)
    assert (short.length, short.mean.shape[-1]) == (16, 16)


def test_a_sliding_window_counts_only_the_queries_that_see_the_key(tmp_path, monkeypatch):
    name, sizes, expected = FAMILIES["gemma2"]
    monkeypatch.setitem(FAMILIES, "gemma2", (name, sizes | {"sliding_window": 8}, expected))
    model = spikesink.load(tiny("gemma2", tmp_path))
    assert model.anatomy.sight == (8, None, 8)
    tokens = spikesink.windows(model, "house", 2, 32)
    patterns = transformers_attention(model.source.directory, tokens)
    assert patterns[0][0, 0, 20, :13].abs().max() == 0 < patterns[0][0, 0, 20, 13]
    scores = sinks.score(model, tokens)
    assert (scores.at[:, 0] - patterns[0][..., :8, 0].mean(-1)).abs().max() < 1e-6
    assert (scores.at[:, 1] - patterns[1][..., 0].mean(-1)).abs().max() < 1e-6


def test_what_cannot_be_scored_is_refused(random_model, trigger_tokens):
    refused = {
        "epsilon": [{"epsilon": epsilon} for epsilon in (0.0, 1.0, math.nan)],
        "give 0 to 47": [{"position": 48}, {"position": -1}],
        "give 0 to 15": [{"length": 16, "position": 20}],
        "give 2 to 48": [{"length": 64}, {"length": 1}],
        "context of 512": [{"length": 1000}],
        "vocabulary": [{"tokens": trigger_tokens + 400}],
        "nobody to attend to": [{"tokens": trigger_tokens[:, :1]}],
    }
    for said, given in refused.items():
        for wrong in given:
            with pytest.raises(ValueError, match=said):
                sinks.score(random_model, **{"tokens": trigger_tokens} | wrong)
    with pytest.raises(ValueError, match="epsilon"):
        sinks.score(random_model, trigger_tokens).ratio(2.0)


def test_groups_are_disjoint_where_they_should_be(sunk):
    life = sunk[0]
    groups = sinks.group_tokens(life)
    spike = groups["spike"]
    assert spike.nonzero().tolist() == [[1, 0], [2, 20], [3, 47], [4, 5], [4, 30], [5, 0]]
    assert groups["next"].nonzero().tolist() == [[1, 1], [2, 21], [4, 6], [4, 31], [5, 1]]
    assert not (groups["other"] & spike).any()
    assert (groups["other"] | spike | groups["smaller"]).all()
    two = replace(life, cycles=(life.main, replace(life.main, is_spike=life.main.is_spike.roll(1))))
    groups = sinks.group_tokens(two)
    assert groups["smaller"].any()
    assert not (groups["smaller"] & groups["spike"]).any()
    assert not (groups["next"] & groups["smaller"]).any()


def test_sinks_are_counted_on_the_tokens_of_the_first_half(sunk, sinking_model, trigger_tokens):
    life, _, attention = sunk
    assert attention.scores.n_tokens["spike"] == 4  # of six, two stand in the second half
    _, cache = sinking_model.run_with_cache(trigger_tokens)
    patterns = [cache[name] for name in sinking_model.anatomy.pattern_hooks]
    above = torch.stack([alpha(pattern) > 0.3 for pattern in patterns])  # layer, window, head, key
    groups = sinks.group_tokens(life)
    for name in ("spike", "other", "next"):
        expected = (above & groups[name][None, :, None]).sum((1, 2))  # layer, key
        assert attention.scores.sinks[name].tolist() == expected[:, :24].sum(1).tolist()
        assert attention.scores.sinks_anywhere[name].tolist() == expected.sum(1).tolist()
    assert attention.scores.sinks["spike"][3] >= 4
    result = evidence.sk2_on_spikes(attention, life)
    on, off = (int(attention.scores.sinks[name][2:5].sum()) for name in ("spike", "other"))
    assert result.measured["share_on_spike_tokens"] == pytest.approx(on / (on + off))
    assert result.control["share_of_tokens_that_spike"] == pytest.approx(4 / (6 * 24))


def test_sinks_are_shared_out_between_the_groups(sunk):
    life, _, attention = sunk
    counts = {"spike": [9, 1, 6, 3, 1, 9], "smaller": [9, 1, 0, 1, 1, 9], "other": [9, 2, 1, 1, 0, 9]}
    on = {name: torch.tensor(values) for name, values in counts.items()}
    everywhere = on | {"other": torch.tensor([9, 2, 11, 1, 0, 9])}
    scores = replace(attention.scores, sinks=on, sinks_anywhere=everywhere)
    result = evidence.sk2_on_spikes(replace(attention, scores=scores), life)
    assert result.measured == pytest.approx(
        {"share_on_spike_tokens": 10 / 14, "share_whole_windows": 10 / 24, "n_sinks": 14, "n_sinks_before": 31}
    )
    assert result.control["share_on_spike_tokens_before"] == pytest.approx(10 / 31)
    assert result.control["share_on_tokens_of_any_cycle_before"] == pytest.approx(20 / 31)


def test_the_other_positions_leave_out_the_first(sunk):
    scores = sunk[2].scores
    above = torch.zeros(6, 4, 48)
    above[..., 0] = 1
    above[0, 0, 2] = above[0, 0, 3] = above[1, 0, 3] = 0.5
    above[..., 24:] = 1
    control = evidence.sk1_many_heads(replace(scores, above=above)).control
    on_others = int(scores.sinks["other"].sum()) / 24 / (6 * 24 - 4)
    assert [control[name] for name in OTHER_KEYS] == pytest.approx([1.5 / 24 / 23, 1 / 24, on_others])


def hand_made(attention, **received_by):
    """Attention whose mean scores are given by group and layer."""
    by_layer = {name: torch.tensor(values)[:, None].expand(6, 4) for name, values in received_by.items()}
    return replace(attention, scores=replace(attention.scores, received=attention.scores.received | by_layer))


def test_attention_is_compared_before_during_and_after_the_plateau(sunk):
    """The plateau is read by layers 2, 3 and 4; layers 0 and 1 lie before the step-up, layer 5 after it."""
    life, _, attention = sunk
    attention = hand_made(attention, spike=[0.1, 0.2, 0.6, 0.7, 0.8, 0.4], next=[0.01] * 6)

    def measured(life):
        return evidence.sk5_over_depth(attention, life).measured

    sizes = {"attention_before": 0.15, "attention_during": 0.7, "attention_after": 0.4}
    assert measured(life) == pytest.approx(sizes | {"attention_before_without_a_spike": 0.15})
    assert evidence.sk5_over_depth(attention, life).control["attention_during_next_token"] == pytest.approx(0.01)
    small = replace(life, cycles=(life.main, replace(life.main, plateau=(block(2), block(3)))))  # read by layer 1
    assert measured(small)["attention_before"] == pytest.approx(0.15)
    assert measured(small)["attention_before_without_a_spike"] == pytest.approx(0.1)
    early = life.trace.rows.stream.clone()  # spike tokens already spike as they enter layer 1, in another channel
    early[life.main.is_spike, 2, -1] = 101 * life.trace.medians[2]
    early = replace(life, trace=replace(life.trace, rows=replace(life.trace.rows, stream=early)))
    assert measured(early)["attention_before_without_a_spike"] == pytest.approx(0.1)
    shorter, endless = (
        replace(life, cycles=(replace(life.main, plateau=(block(4), block(last))),)) for last in (8, 12)
    )
    assert measured(shorter)["attention_after"] == pytest.approx(0.4)  # layer 4 still reads it
    assert measured(endless)["attention_after"] == []


def test_a_smaller_cycle_is_compared_with_the_layers_in_which_it_rests(sunk):
    life, _, attention = sunk
    attention = hand_made(attention, smaller=[0.5, 0.4, 0.1, 0.0, 0.1, 0.0], next_smaller=[0.0] * 6)
    assert "no second cycle" in evidence.x_sk8_smaller_cycle(attention, life).reason
    two = replace(life, cycles=(life.main, replace(life.main, plateau=(block(0), block(2)))))
    n_tokens = attention.scores.n_tokens_anywhere | {"smaller": 3}
    attention = replace(attention, scores=replace(attention.scores, n_tokens_anywhere=n_tokens))
    measured = evidence.x_sk8_smaller_cycle(attention, two).measured
    assert measured["attention_during"] == pytest.approx(0.45)
    assert measured["attention_otherwise"] == pytest.approx(0.05)


def secondary(model, tokens, spike, collapse, epsilon):
    reducer = sinks.SecondaryReducer(epsilon, spike, collapse)
    reduce_windows(model, tokens, [reducer], "")
    return reducer.result()


def test_a_trigger_that_is_called_no_spike_token_is_a_secondary_sink(sunk, sinking_model, trigger_tokens):
    """Told that no token spikes, each trigger of the first half is found; the token right after is its control."""
    none = torch.zeros(6, 48, dtype=torch.bool)
    rows, everything, aligned = (
        secondary(sinking_model, trigger_tokens, none, sunk[1], epsilon) for epsilon in (0.3, 1e-6, 0.9999)
    )
    mine = int(((rows.window == 4) & (rows.position == 5)).nonzero()[0])
    assert rows.heads[mine, 3] > 0
    assert rows.cosine[mine, 6] > 0.999
    assert rows.cosine_other[6] < 0.6
    assert (rows.position < 24).all()
    after = int(((everything.window == 4) & (everything.position == 6)).nonzero()[0])
    torch.testing.assert_close(rows.cosine_after[mine], everything.cosine[after])
    # Asked for an epsilon that only those at position 0 reach, the other two triggers are aligned and no sinks.
    assert (aligned.n, aligned.n_aligned) == (2, 2)


def test_secondary_sinks_are_tabulated_by_token():
    """Two tokens; the cosine of the first jumps over block 2, of the second over block 4."""
    cosine = torch.tensor([[0, 0, 9, 9, 9, 5, 0], [0, 1, 2, 1, 8, 9, 0], [0, 1, 1, 6, 7, 9, 0]]) / 10
    heads, three = torch.tensor([[0, 0.5, 1.0], [0, 0, 0.25], [0.0, 0, 0.5]]), torch.arange(3)
    tokens = torch.tensor([7, 8, 8])
    rows = sinks.Secondary(3, three, three, tokens, heads, cosine, cosine / 2, torch.full((7,), 0.1), 5)
    table = evidence.secondary_table(rows, lambda ids: str(ids[0]))
    assert table.values.tolist() == [
        ["'8'", 2, "2 to 2", 1, 0.5, "L1 MLP (block 4)", pytest.approx(0.75)],
        ["'7'", 1, "1 to 2", 2, 1.0, "L0 MLP (block 2)", pytest.approx(0.9)],
    ]
    result = evidence.x_sk9_secondary(rows)
    assert result.measured["cosine_secondary"] == pytest.approx(0.85)  # of 0.9, 0.9, 0.8 and 0.7
    assert (result.measured["fewest_layers"], result.measured["most_layers"]) == (1, 2)
    assert (result.measured["first_layer"], result.measured["last_layer"]) == (1, 2)
    assert result.control == {"cosine_next_token": pytest.approx(0.425), "n_aligned_but_no_sinks": 5}
