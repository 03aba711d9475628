"""What RMSNorm makes of a spike: algebra, brute force over pairs, and a planted model whose spike tokens are known."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import spikesink
from spikesink.chain import collapse
from spikesink.chain.lifecycle import is_spike
from spikesink.ledger import evidence
from spikesink.model.weights import weights_of
from tests.test_families import tiny

NORMS = [f"blocks.{layer}.{norm}.hook_normalized" for layer in (2, 3, 4) for norm in ("ln1", "ln2")]  # of the plateau


@pytest.fixture(scope="module")
def measured(planted_model, trigger_tokens, planted_life):
    return collapse.measure_collapse(planted_model, trigger_tokens, planted_life)


@pytest.fixture(scope="module")
def stream(planted_model, trigger_tokens):
    """H~ of all tokens at every layer's attention, from the bridge's own norms: [window, position, layer, d]."""
    names = [f"blocks.{layer}.ln1.hook_normalized" for layer in range(6)]
    _, cache = planted_model.run_with_cache(trigger_tokens, names_filter=names)
    return torch.stack([cache[name] for name in names], dim=2)


@pytest.mark.parametrize(("d", "close"), [(64, 0.1), (576, 0.03)])
def test_the_closed_form_is_what_the_norm_does(d, close, random_model):
    about = replace(random_model.anatomy, norm_eps=0.0, d_model=d)
    ratio = torch.logspace(-0.5, 1.5, 9) * (d - 1) ** 0.5
    drawn, closed = collapse.normalise_random(ratio, about, n=400), collapse.closed_form(ratio.double(), d)
    torch.testing.assert_close(drawn["largest"], closed["largest"], rtol=1e-9, atol=0)
    torch.testing.assert_close(drawn["participation"], closed["participation"], rtol=close, atol=0)
    torch.testing.assert_close(drawn["cosine"], closed["cosine"], rtol=0, atol=close / 6)
    # At the norm of all the rest, half of the budget; far above it, one channel and one vector.
    even = collapse.closed_form(torch.tensor([(d - 1) ** 0.5]), d)
    assert (float(even["largest"]) ** 2, float(even["cosine"])) == pytest.approx((0.5, 0.5))
    assert float(closed["participation"][-1]) == pytest.approx(1, abs=0.01)


def test_measures_are_those_of_the_models_own_norms(measured, planted_life, stream):
    spike, after = is_spike(planted_life, planted_life.main), torch.zeros(6, 48, dtype=torch.bool)
    after[[1, 2, 4, 4, 5], [1, 21, 6, 31, 1]] = True
    for group, mine in ((measured.spike, spike), (measured.other, ~spike), (measured.after, after)):
        h = stream[mine]  # token, layer, d
        square, size = h.square(), h.abs().amax(-1) / 8
        participation = square.sum(-1) ** 2 / square.square().sum(-1)
        share = square / square.sum(-1, keepdim=True)
        assert group.n == int(mine.sum())
        torch.testing.assert_close(group.participation[:12:2], participation.mean(0), rtol=1e-4, atol=0)
        torch.testing.assert_close(group.share[:12:2], share.mean(0), rtol=0, atol=1e-6)
        torch.testing.assert_close(group.largest[:12:2], size.amax(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(group.smallest[:12:2], size.amin(0), rtol=1e-5, atol=0)
        for half in (0, 1):
            own = stream[half::2][mine[half::2]].mean(0)
            torch.testing.assert_close(group.mean[half, :12:2], own, rtol=0, atol=1e-5)
    assert len(measured.spike.kept) == len(measured.other.kept) == int(spike.sum())
    torch.testing.assert_close(measured.spike.kept[:, :12:2], stream[spike], rtol=0, atol=1e-5)
    kept = {tuple(row) for row in measured.other.kept[:, 0].round(decimals=3).tolist()}
    assert kept <= {tuple(row) for row in stream[~spike][:, 0].round(decimals=3).tolist()}


def test_cosines_are_of_all_pairs_of_different_windows(measured, planted_life, stream):
    """With all channels, and without the spike channels."""
    layer, spike = measured.cycle.middle // 2, is_spike(planted_life, planted_life.main)
    rest = stream.index_fill(3, torch.tensor(measured.cycle.channels), 0)
    for vectors, cosine in ((stream, measured.spike.cosine), (rest, measured.spike.cosine_rest)):
        unit = functional.normalize(vectors[:, :, layer], dim=-1)
        pairs = [unit[i][spike[i]] @ unit[j][spike[j]].T for i in range(6) for j in range(6) if i != j]
        expected = torch.cat([pair.flatten() for pair in pairs]).mean()
        assert float(cosine[2 * layer]) == pytest.approx(float(expected), abs=1e-5)
    assert measured.spike.cosine_rest[2 * layer] < measured.spike.cosine[2 * layer]


def test_a_window_is_lent_the_mean_of_the_other_half_over_the_plateau_alone(measured, planted_life, stream):
    """The plateau is points 4 to 9. The even half has e_0 there, the odd half e_1; both have e_2 everywhere else."""
    spike, layers = is_spike(planted_life, planted_life.main), list(planted_life.main.layers)
    for window in range(6):
        others = [w for w in range(6) if w % 2 != window % 2]
        mean = stream[others][spike[others]][:, layers].mean((0, 1))
        lent = measured.held_out(window, measured.spike)
        assert functional.cosine_similarity(lent, mean, dim=0) > 0.99999
        assert float(lent.norm()) == pytest.approx(8, rel=1e-6)
    mean = torch.zeros(2, 13, 64)
    mean[:, [0, 1, 2, 3, 10, 11, 12], 2] = 100
    mean[0, 4:10, 0], mean[1, 4:10, 1] = 1, 2
    mean[:, 9, 3] = 6  # the plateau's last point counts
    by_hand = replace(measured, spike=replace(measured.spike, mean=mean))
    assert by_hand.held_out(0, by_hand.spike).nonzero().flatten().tolist() == [1, 3]
    assert by_hand.held_out(3, by_hand.spike).nonzero().flatten().tolist() == [0, 3]
    assert by_hand.constant[:4].tolist() == pytest.approx([0.5, 1, 0, 1])


@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_replacing_is_what_runs_of_their_own_give(measured, planted_life, planted_model, trigger_tokens):
    """Window by window: the plateau's norms give the lent vector at spike tokens alone; attention moves by half the sum
    of differences, for the queries after the first spike token.
    """
    spike, layer = is_spike(planted_life, planted_life.main), 3
    replaced = collapse.replace_input(planted_model, trigger_tokens, planted_life, measured)
    moved, to_spike, losses = [], [], []
    for window, where in enumerate(spike):
        runs = []
        for vector in (None, measured.held_out(window, measured.spike)):

            def put(h, hook, vector=vector, where=where):
                return h if vector is None else torch.where(where[None, :, None], vector, h)

            keep = {}
            hooks = [(name, put) for name in NORMS]
            hooks.append((f"blocks.{layer}.attn.hook_pattern", lambda value, hook, keep=keep: keep.update(p=value[0])))
            with torch.inference_mode(), planted_model.hooks(fwd_hooks=hooks):
                logits = planted_model(trigger_tokens[window : window + 1])
            runs.append((keep["p"], float(functional.cross_entropy(logits[0, :-1], trigger_tokens[window, 1:]))))
        losses.append([loss for _, loss in runs])
        if where[:-1].any():
            after = int(where.nonzero()[0]) + 1
            moved.append(float((runs[0][0] - runs[1][0]).abs().sum(-1)[:, after:].mean() / 2))
            to_spike.append(float(runs[0][0][:, after:, where].sum(-1).mean()))
    assert len(moved) == 4
    assert replaced.loss[:2].tolist() == pytest.approx(torch.tensor(losses).mean(0).tolist(), rel=1e-5)
    assert float(replaced.moved[1, layer]) == pytest.approx(sum(moved) / 4, rel=1e-3)
    assert float(replaced.to_spike[0, layer]) == pytest.approx(sum(to_spike) / 4, rel=1e-4)
    assert float(replaced.moved[0].abs().max()) == 0
    assert float(replaced.moved[1].max()) < float(replaced.moved[2].max()) / 50  # its own vector changes nothing
    own = planted_model.original_model(trigger_tokens, labels=trigger_tokens).loss
    assert float(replaced.loss[0]) == pytest.approx(float(own), rel=1e-5)


def test_where_it_does_not_apply_the_reason_is_given(planted_life, planted_model, trigger_tokens, tmp_path):
    def collapsed(tokens):
        life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, tokens))
        return life, collapse.measure_collapse(planted_model, tokens, life)

    # Windows 1 and 5 spike and are odd; without the even ones' triggers a half has nothing to lend.
    odd, one = trigger_tokens[[0, 1, 0, 5]], trigger_tokens[1:2]
    own, lending = collapsed(odd)
    assert "each half" in collapse.replace_input(planted_model, odd, own, lending).reason
    lonely, alone = collapsed(one)  # one window has no pair of spike tokens in different windows
    assert "different windows" in evidence.nm3_constant(alone).reason
    with pytest.raises(ValueError, match="windows"):
        collapse.measure_collapse(planted_model, odd, lonely)
    with pytest.raises(ValueError, match="windows"):
        collapse.replace_input(planted_model, one.flip(1), lonely, alone)
    post = spikesink.load(tiny("olmo2", tmp_path))
    posted = replace(planted_life, trace=replace(planted_life.trace, anatomy=post.anatomy))
    assert "not through a norm" in collapse.measure_collapse(post, one, posted).reason


def test_the_scale_is_the_one_that_the_norm_multiplies_by(planted_life, tmp_path):
    """Gemma's is 1 + weight."""
    model = spikesink.load(tiny("gemma2", tmp_path))
    norms = [layer.input_layernorm.weight for layer in model.original_model.model.layers]
    for layer, weight in enumerate(norms):
        weight.data = torch.linspace(-0.5, 0.5, 64) * (layer + 1)
    far = replace(planted_life, cycles=(replace(planted_life.main, channel=63),))
    expected = [float(1 + w[63]) / float((1 + w).abs().quantile(0.5)) for w in norms]
    assert collapse.scale_at_spike(weights_of(model), far).tolist() == pytest.approx(expected, rel=1e-5)


def test_each_measure_is_taken_at_its_point(measured, planted_model, monkeypatch):
    """Step-up block 4, so before is point 3; the plateau is points 4 to 9, half-way 6."""
    points = torch.arange(13.0)
    sizes = {"largest": points / 20, "smallest": points / 40, "participation": points + 1}
    spike = replace(measured.spike, cosine=points / 13, cosine_rest=points / 26, **sizes)
    other = replace(measured.other, largest=points / 100, participation=points + 50, cosine=points / 130)
    by_hand = replace(measured, spike=spike, other=other, after=replace(measured.after, cosine=points / 15))
    expected = {
        "max_over_sqrt_d": 9 / 20,
        "smallest_over_sqrt_d": 4 / 40,
        "max_over_sqrt_d_before": 3 / 20,
        "max_over_sqrt_d_other_tokens": 6 / 100,
        "cosine_before": 3 / 13,
        "cosine_after": 6 / 13,
        "cosine_other_tokens": 6 / 130,
        "cosine_highest_before": 3 / 13,
        "degrees_before": math.degrees(math.acos(3 / 13)),
        "cosine_before_other_tokens": 3 / 130,
        "cosine_next_tokens": 6 / 15,
        "cosine_rest_before": 3 / 26,
        "cosine_rest_after": 6 / 26,
        "participation_before": 4,
        "participation_lowest_before": 1,
        "participation_after": 7,
        "participation_before_other_tokens": 53,
        "participation_after_other_tokens": 56,
    }
    scale = torch.full((64,), 0.1).index_fill(0, torch.tensor(2), 1000.0)  # layer 2 is the plateau's first
    weights = weights_of(planted_model)
    monkeypatch.setattr(type(weights), "norm_scale", lambda self, layer: {2: scale}[layer])
    scaled = (measured.spike.kept[:, 4] * scale).square()
    expected["participation_scaled"] = float((scaled.sum(-1) ** 2 / scaled.square().sum(-1)).mean())
    every = (evidence.nm1_bounded(by_hand), evidence.nm2_sparse(by_hand, weights), evidence.nm3_constant(by_hand))
    values = {name: value for one in every for name, value in (one.measured | one.control).items()}
    assert {name: values[name] for name in expected} == pytest.approx(expected)


def test_depths_are_compared_pair_by_pair(measured):
    depth = evidence.nm4_constant_over_depth(measured)
    assert (depth.measured["first_layer"], depth.measured["last_layer"]) == (2, 4)
    for key, group, left_out in (
        ("cosine_over_depth", measured.spike, []),
        ("cosine_rest_over_depth", measured.spike, list(measured.cycle.channels)),
        ("cosine_over_depth_other_tokens", measured.other, []),
    ):
        h = group.kept.clone()
        h[..., left_out] = 0
        pairs = [functional.cosine_similarity(h[:, a], h[:, b], dim=-1).mean() for a, b in ((4, 6), (4, 8), (6, 8))]
        assert (depth.measured | depth.control)[key] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)


def test_attention_counts_in_the_plateaus_layers():
    moved = torch.arange(18.0).view(3, 6) / 100
    replaced = collapse.Replaced([2, 3, 4], 6, torch.tensor([1.0, 1.0, 2.0]), moved, moved + 0.1)
    result = evidence.nm5_implicit_parameter(replaced)
    assert result.measured["attention_moved"] == pytest.approx(0.09)
    assert result.control["attention_moved_other_tokens_mean"] == pytest.approx(0.15)
    assert result.measured["attention_to_spike_clean"] == pytest.approx(0.13)
    assert "makes no use" in evidence.nm5_implicit_parameter(replace(replaced, loss=torch.ones(3))).reason
    blind = replace(replaced, moved=moved / 0, to_spike=moved / 0)
    assert "attention_moved" not in evidence.nm5_implicit_parameter(blind).measured


def test_the_spike_is_compared_with_the_root_mean_square_of_the_others(measured):
    kept = torch.ones(2, 13, 64)
    kept[..., 9] = 30.0
    kept[..., 10] = 50.0  # larger, and not the first channel
    by_hand = replace(measured, spike=replace(measured.spike, kept=kept))
    assert collapse.spike_ratio(by_hand).tolist() == pytest.approx([30 / ((62 + 2500) / 63) ** 0.5] * 13)
