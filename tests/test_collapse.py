"""What RMSNorm makes of a spike: algebra, brute force over pairs, and a planted model whose spike tokens are known."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import spikesink
from spikesink.chain import collapse
from spikesink.chain.lifecycle import is_spike, plateau_layers
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.ledger.claims import Evidence
from spikesink.model.anatomy import normalise
from spikesink.model.weights import weights_of
from tests.test_families import tiny


@pytest.fixture(scope="module")
def parts(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
    return life, collapse.measure_collapse(planted_model, trigger_tokens, life)


@pytest.fixture(scope="module")
def stream(planted_model, trigger_tokens):
    """H~ of all tokens at every layer's attention, from the bridge's own norms: [window, position, layer, d]."""
    seen = {}
    names = [f"blocks.{layer}.ln1.hook_normalized" for layer in range(6)]
    with (
        torch.no_grad(),
        planted_model.hooks(
            fwd_hooks=[(name, lambda value, hook: seen.update({hook.name: value.clone()})) for name in names]
        ),
    ):
        planted_model(trigger_tokens)
    return torch.stack([seen[name] for name in names], dim=2)


def test_no_entry_of_a_normalised_vector_exceeds_the_root_of_d(random_model):
    about = spikesink.anatomy(random_model)
    h = torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    h[:100, 3] = torch.logspace(0, 6, 100)
    for norm in ("RMS", "LN"):
        out = normalise(h, replace(about, norm=norm))
        assert (out.norm(dim=-1) <= 8.0001).all()
        assert out.abs().max() <= 8.0001
    assert normalise(h, about)[99, 3] / 8 == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("d", "close"), [(64, 0.1), (576, 0.03)])
def test_the_closed_form_is_what_the_norm_does(d, close, random_model):
    about = replace(spikesink.anatomy(random_model), norm_eps=0.0, d_model=d)
    ratio = torch.logspace(-0.5, 1.5, 9) * (d - 1) ** 0.5
    measured, closed = collapse.normalise_random(ratio, about, n=400), collapse.closed_form(ratio.double(), d)
    torch.testing.assert_close(measured["largest"], closed["largest"], rtol=1e-9, atol=0)
    torch.testing.assert_close(measured["participation"], closed["participation"], rtol=close, atol=0)
    torch.testing.assert_close(measured["cosine"], closed["cosine"], rtol=0, atol=close / 6)
    # At the norm of all the rest, half of the budget; far above it, one channel and one vector.
    even = collapse.closed_form(torch.tensor([(d - 1) ** 0.5]), d)
    assert (float(even["largest"]) ** 2, float(even["cosine"])) == pytest.approx((0.5, 0.5))
    assert float(closed["participation"][-1]) == pytest.approx(1, abs=0.01)


def test_cosines_from_sums_are_those_of_all_pairs_of_different_windows():
    generator = torch.Generator().manual_seed(1)
    windows = [torch.randn(n, 2, 5, generator=generator) + 0.5 for n in (1, 3, 0, 2)]
    alike = collapse._Alike(2, 5)
    for window in windows:
        for point in (0, 1):
            alike.add(point, window[:, point])
    for point in (0, 1):
        found = [
            functional.cosine_similarity(a[point], b[point], dim=0)
            for i, one in enumerate(windows)
            for j, other in enumerate(windows)
            if i != j
            for a in one
            for b in other
        ]
        assert float(alike.cosine()[point]) == pytest.approx(float(torch.stack(found).mean()), abs=1e-6)


def test_measures_are_those_of_the_models_own_norms(parts, stream, trigger_tokens):
    life, found = parts
    spike = is_spike(life, life.main)
    after = torch.zeros_like(spike)
    for window, position in ((1, 1), (2, 21), (4, 6), (4, 31), (5, 1)):
        after[window, position] = True
    for group, mine in ((found.spike, spike), (found.other, ~spike), (found.after, after)):
        h = stream[mine]  # token, layer, d
        assert group.n == int(mine.sum())
        square = h.square()
        torch.testing.assert_close(
            group.participation[:12:2], (square.sum(-1) ** 2 / square.square().sum(-1)).mean(0), rtol=1e-4, atol=0
        )
        torch.testing.assert_close(
            group.share[:12:2], (square / square.sum(-1, keepdim=True)).mean(0), rtol=0, atol=1e-6
        )
        size = h.abs().amax(-1) / 8
        torch.testing.assert_close(group.largest[:12:2], size.amax(0), rtol=1e-5, atol=0)
        torch.testing.assert_close(group.smallest[:12:2], size.amin(0), rtol=1e-5, atol=0)
        for half in (0, 1):
            own = stream[half::2][mine[half::2]].mean(0)
            torch.testing.assert_close(group.mean[half, :12:2], own, rtol=0, atol=1e-5)
    assert len(found.spike.kept) == len(found.other.kept) == int(spike.sum())
    torch.testing.assert_close(found.spike.kept[:, :12:2], stream[spike], rtol=0, atol=1e-5)
    kept = {tuple(row) for row in found.other.kept[:, 0].round(decimals=3).tolist()}
    assert kept <= {tuple(row) for row in stream[~spike][:, 0].round(decimals=3).tolist()}


def test_the_cosine_without_the_spike_channels_leaves_just_those_out(parts, stream):
    life, found = parts
    spike, layer = is_spike(life, life.main), found.cycle.middle // 2
    rest = stream[:, :, layer].clone()
    rest[..., list(found.cycle.channels)] = 0
    unit = functional.normalize(rest, dim=-1)
    pairs = [
        unit[i][spike[i]] @ unit[j][spike[j]].T
        for i in range(6)
        for j in range(6)
        if i != j and spike[i].any() and spike[j].any()
    ]
    expected = torch.cat([p.flatten() for p in pairs]).mean()
    assert float(found.spike.cosine_rest[2 * layer]) == pytest.approx(float(expected), abs=1e-5)
    assert float(found.spike.cosine_rest[2 * layer]) < float(found.spike.cosine[2 * layer])


def test_a_planted_spike_collapses_and_other_tokens_do_not(parts, planted_model):
    """The spike of 1000 with a side channel of -250: |h~|^2 is shared 16 to 1, so the largest entry is 0.97 sqrt(d)."""
    found = parts[1]
    bounded = evidence.nm1_bounded(found)
    assert bounded.measured["max_over_sqrt_d"] == pytest.approx(1 / math.sqrt(1 + 1 / 16), abs=1e-3)
    sparse = evidence.nm2_sparse(found, weights_of(planted_model))
    assert sparse.measured["participation_after"] == pytest.approx(17**2 / (16**2 + 1), rel=1e-3)
    assert sparse.measured["participation_before"] == pytest.approx(float(found.spike.participation[3]))
    assert sparse.control["participation_after_other_tokens"] > 20
    constant = evidence.nm3_constant(found)
    assert constant.measured["cosine_after"] > 0.9999
    assert abs(constant.measured["cosine_other_tokens"]) < 0.6
    assert constant.measured["degrees_after"] == pytest.approx(
        math.degrees(math.acos(constant.measured["cosine_after"])), abs=1e-6
    )
    depth = evidence.nm4_constant_over_depth(found)
    assert depth.measured["cosine_of_the_two_least_alike"] > 0.999
    assert depth.measured["cosine_over_depth"] > depth.control["cosine_over_depth_other_tokens"]
    assert (depth.measured["first_layer"], depth.measured["last_layer"]) == (2, 4)


def test_the_vector_comes_from_the_other_half_of_the_windows(parts, stream):
    life, found = parts
    spike = is_spike(life, life.main)
    for window in range(6):
        others = [w for w in range(6) if w % 2 != window % 2]
        first, last = plateau_layers(found.cycle)[0], plateau_layers(found.cycle)[-1]
        mean = stream[others][spike[others]][:, first : last + 1].mean((0, 1))
        cosine = functional.cosine_similarity(found.held_out(window, found.spike), mean, dim=0)
        assert float(cosine) > 0.99999
        assert float(found.held_out(window, found.spike).norm()) == pytest.approx(8, rel=1e-6)


def test_what_is_replaced_is_what_the_plateaus_norms_give_at_spike_tokens_alone(parts, planted_model, trigger_tokens):
    life, found = parts
    names = collapse._norms(found)
    assert names == [f"blocks.{layer}.{norm}.hook_normalized" for layer in (2, 3, 4) for norm in ("ln1", "ln2")]
    where, seen = is_spike(life, life.main)[3], {}
    vectors = torch.stack([torch.full((64,), 0.5), torch.full((64,), -0.25)])
    watch = [f"blocks.{layer}.ln1.hook_out" for layer in (1, 2)]
    hooks = [(name, lambda value, hook: seen.update({hook.name: value.clone()})) for name in watch]
    with (
        collapse._reading(planted_model, found, where, vectors, collapse._Seen(6)),
        planted_model.hooks(fwd_hooks=hooks),
    ):
        planted_model(trigger_tokens[3].expand(3, -1))
    before, after = (seen[name] for name in watch)
    torch.testing.assert_close(before[1], before[0])
    scale = weights_of(planted_model).norm_scale(2)
    for variant, vector in enumerate(vectors, start=1):
        torch.testing.assert_close(after[variant][where], (vector * scale).expand(int(where.sum()), -1))
        torch.testing.assert_close(after[variant][:20], after[0][:20])


def test_perplexity_is_transformers_own_and_its_own_vector_changes_nothing(parts, planted_model, trigger_tokens):
    life, found = parts
    done = collapse.replace_input(planted_model, trigger_tokens, life, found)
    own = planted_model.original_model(trigger_tokens, labels=trigger_tokens).loss
    assert float(done.loss[0]) == pytest.approx(float(own), rel=1e-5)
    assert float(done.moved[0].abs().max()) == 0
    assert float(done.moved[1].max()) < float(done.moved[2].max()) / 50
    assert "makes no use of what stands there" in evidence.nm5_implicit_parameter(done).reason
    needed = replace(done, loss=done.loss + torch.tensor([0.0, 0.0, 0.02]))
    result = evidence.nm5_implicit_parameter(needed)
    assert result.measured["perplexity_replaced"] == pytest.approx(result.measured["perplexity_clean"], rel=1e-3)
    assert result.measured["n_tokens_replaced"] == 6
    assert result.control["attention_moved_other_tokens_mean"] > 5 * result.measured["attention_moved"]


@pytest.mark.filterwarnings("ignore:A forward hook edited")
def test_attention_moves_by_half_the_sum_of_differences(parts, planted_model, trigger_tokens):
    """Against two runs of their own, for a window whose spike token stands in the middle."""
    life, found = parts
    where, layer = is_spike(life, life.main)[2], 3
    vector = found.held_out(2, found.spike)
    runs = []
    for put in (False, True):

        def hook(h, hook, put=put):
            return torch.where(where[None, :, None], vector, h) if put else None

        keep = {}
        hooks = [(name, hook) for name in collapse._norms(found)]
        hooks.append((f"blocks.{layer}.attn.hook_pattern", lambda value, hook, keep=keep: keep.update(pattern=value)))
        with torch.inference_mode(), planted_model.hooks(fwd_hooks=hooks):
            planted_model(trigger_tokens[2:3])
        runs.append(keep["pattern"][0])
    expected = (runs[0] - runs[1]).abs().sum(-1)[:, 21:].mean() / 2
    seen = collapse._Seen(6)
    with collapse._reading(planted_model, found, where, torch.stack([vector, vector]), seen):
        planted_model(trigger_tokens[2].expand(3, -1))
    assert float(seen.moved[1, layer]) == pytest.approx(float(expected), rel=1e-3)
    assert float(seen.to_spike[0, layer]) == pytest.approx(float(runs[0][:, 21:, 20].mean()), rel=1e-4)


def test_where_it_does_not_apply_the_reason_is_given(parts, random_model, planted_model, trigger_tokens, tmp_path):
    tokens = spikesink.windows(random_model, "house", 2, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    none = collapse.measure_collapse(random_model, tokens, life)
    assert isinstance(none, NotApplicable)
    assert (
        evidence.nm1_bounded(none)
        == evidence.nm3_constant(none)
        == collapse.replace_input(random_model, tokens, life, none)
        == none
    )
    assert collapse.scale_at_spike(weights_of(random_model), life) == NotApplicable(life.reason)
    # Windows 1 and 5 spike and are odd; without the even ones' triggers a half has nothing to lend.
    odd = trigger_tokens[[0, 1, 0, 5]]
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, odd))
    found = collapse.measure_collapse(planted_model, odd, life)
    assert (
        "each half of the windows must hold a spike token"
        in collapse.replace_input(planted_model, odd, life, found).reason
    )
    # One window has no pair of spike tokens in different windows.
    one = trigger_tokens[1:2]
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, one))
    found = collapse.measure_collapse(planted_model, one, life)
    assert "no two spike tokens of different windows" in evidence.nm3_constant(found).reason
    with pytest.raises(ValueError, match="not the windows that this life cycle was found in"):
        collapse.measure_collapse(planted_model, odd, life)
    with pytest.raises(ValueError, match="not the windows that this life cycle was found in"):
        collapse.replace_input(planted_model, one.flip(1), life, found)
    assert isinstance(evidence.nm1_bounded(found), Evidence)
    post = spikesink.load(tiny("olmo2", tmp_path))
    posted = replace(life, trace=replace(life.trace, anatomy=spikesink.anatomy(post)))
    assert "not through a norm" in collapse.measure_collapse(post, one, posted).reason


def test_the_scale_is_the_one_that_the_norm_multiplies_by(tmp_path):
    """Gemma's is 1 + weight."""
    model = spikesink.load(tiny("gemma2", tmp_path))
    norms = [layer.input_layernorm.weight for layer in model.original_model.model.layers]
    for layer, weight in enumerate(norms):
        weight.data = torch.linspace(-0.5, 0.5, 64) * (layer + 1)
    life = replace_channel(model, 63)
    found = collapse.scale_at_spike(weights_of(model), life)
    expected = [float(1 + w[63]) / float((1 + w).abs().quantile(0.5)) for w in norms]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)


def replace_channel(model, channel):
    class Main:
        pass

    life = Main()
    life.main = Main()
    life.main.channel = channel
    return life


def by_hand(parts, **fields):
    """The planted model's collapse, with some fields of its spike tokens set by hand."""
    found = parts[1]
    return replace(found, spike=replace(found.spike, **fields))


def test_a_window_is_lent_the_mean_of_the_other_half_over_the_plateau_alone(parts):
    """The plateau is points 4 to 9. The even half has e_0 there, the odd half e_1; both have e_2 everywhere else."""
    mean = torch.zeros(2, 13, 64)
    mean[:, :, 2] = 100
    mean[:, 4:10, 2] = 0
    mean[0, 4:10, 0], mean[1, 4:10, 1] = 1, 2
    found = by_hand(parts, mean=mean)
    assert found.held_out(0, found.spike).nonzero().tolist() == [[1]]
    assert found.held_out(3, found.spike).nonzero().tolist() == [[0]]
    assert float(found.held_out(0, found.spike)[1]) == pytest.approx(8)
    assert found.constant[:3].tolist() == pytest.approx([0.5, 1, 0])
    mean[:, 9, 3] = 6  # the plateau's last point counts
    assert float(by_hand(parts, mean=mean).constant[3]) == pytest.approx(1)


def test_each_measure_is_taken_at_its_point(parts):
    """Step-up block 4, so before is point 3; the plateau is points 4 to 9, half-way 6."""
    points = torch.arange(13.0)
    found = by_hand(
        parts,
        largest=points / 20,
        smallest=points / 40,
        participation=points + 1,
        cosine=points / 13,
        cosine_rest=points / 26,
    )
    found = replace(
        found, other=replace(found.other, largest=points / 100, participation=points + 50, cosine=points / 130)
    )
    found = replace(found, after=replace(found.after, cosine=points / 15))
    bounded, constant = evidence.nm1_bounded(found), evidence.nm3_constant(found)
    assert bounded.measured == pytest.approx({"max_over_sqrt_d": 9 / 20, "smallest_over_sqrt_d": 4 / 40})
    assert bounded.control["max_over_sqrt_d_before"] == pytest.approx(3 / 20)
    assert bounded.control["max_over_sqrt_d_other_tokens"] == pytest.approx(6 / 100)
    measured = {k: constant.measured[k] for k in ("cosine_before", "cosine_after", "cosine_other_tokens")}
    assert measured == pytest.approx({"cosine_before": 3 / 13, "cosine_after": 6 / 13, "cosine_other_tokens": 6 / 130})
    assert constant.measured["cosine_highest_before"] == pytest.approx(3 / 13)
    assert constant.measured["degrees_before"] == pytest.approx(math.degrees(math.acos(3 / 13)))
    assert constant.control == pytest.approx(
        {
            "cosine_before_other_tokens": 3 / 130,
            "cosine_next_tokens": 6 / 15,
            "cosine_rest_before": 3 / 26,
            "cosine_rest_after": 6 / 26,
            "cosine_rest_other_tokens": float(found.other.cosine_rest[6]),
        }
    )

    class Scales:
        def norm_scale(self, layer):
            return torch.full((64,), 0.1).index_fill(0, torch.tensor(layer), 1000.0)

    sparse = evidence.nm2_sparse(found, Scales())
    assert sparse.measured["participation_before"] == 4
    assert sparse.measured["participation_lowest_before"] == 1
    assert sparse.measured["participation_after"] == 7
    scaled = (found.spike.kept[:, 4] * Scales().norm_scale(2)).square()  # layer 2 is the plateau's first
    expected = float((scaled.sum(-1) ** 2 / scaled.square().sum(-1)).mean())
    assert sparse.measured["participation_scaled"] == pytest.approx(expected)
    assert sparse.control == pytest.approx(
        {"participation_before_other_tokens": 53, "participation_after_other_tokens": 56}
    )


def test_depths_are_compared_pair_by_pair(parts):
    found = parts[1]
    depth = evidence.nm4_constant_over_depth(found)
    channels = list(found.cycle.channels)
    for key, group, left_out in (
        ("cosine_over_depth", found.spike, []),
        ("cosine_rest_over_depth", found.spike, channels),
        ("cosine_over_depth_other_tokens", found.other, []),
    ):
        h = group.kept.clone()
        h[..., left_out] = 0
        pairs = [functional.cosine_similarity(h[:, a], h[:, b], dim=-1).mean() for a, b in ((4, 6), (4, 8), (6, 8))]
        assert (depth.measured | depth.control)[key] == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-5)


def test_attention_counts_in_the_plateaus_layers(parts):
    moved = torch.arange(18.0).view(3, 6) / 100
    done = collapse.Replaced(range(2, 5), 6, torch.tensor([1.0, 1.0, 2.0]), moved, moved + 0.1)
    found = evidence.nm5_implicit_parameter(done)
    assert found.measured["attention_moved"] == pytest.approx(0.09)
    assert found.control["attention_moved_other_tokens_mean"] == pytest.approx(0.15)
    assert found.measured["attention_to_spike_clean"] == pytest.approx(0.13)
    blind = replace(done, moved=moved / 0, to_spike=moved / 0)
    assert "attention_moved" not in evidence.nm5_implicit_parameter(blind).measured


def test_the_spike_is_set_against_the_root_mean_square_of_the_others(parts):
    kept = torch.ones(2, 13, 64)
    kept[..., 9] = 30.0
    kept[..., 10] = 50.0  # larger, and not the first channel
    assert collapse.spike_ratio(by_hand(parts, kept=kept)).tolist() == pytest.approx(
        [30 / ((62 + 2500) / 63) ** 0.5] * 13
    )
