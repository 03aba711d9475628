"""The quadratic amplifier against brute force on small sizes, and against a planted one whose answer is known."""

from dataclasses import replace

import pytest
import torch

import spikesink
from spikesink.chain import amplifier
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model.anatomy import mlp
from spikesink.model.weights import FFN, open_weights, weights_of
from tests import planted
from tests.test_families import tiny

D, M = 12, 20


def random_ffn(seed=0, activation=torch.nn.functional.silu) -> FFN:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(M, D, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.randn(D, M, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(M, dtype=torch.float64)
    return FFN(gate, up, down, zeros, zeros, activation)


def rank_one_ffn(channel=3, size=40.0) -> tuple[FFN, torch.Tensor]:
    """One neuron reads a direction s through gate and up and writes `size` into a channel; the rest is a whisper."""
    ffn = random_ffn()
    direction = torch.nn.functional.normalize(torch.arange(1.0, D + 1, dtype=torch.float64), dim=0)
    for part in (ffn.gate, ffn.up, ffn.down):
        part.mul_(0.01)
    ffn.gate[0], ffn.up[0] = 2 * direction, 3 * direction
    ffn.down[:, 0] = 0
    ffn.down[channel, 0] = size
    return ffn, direction


def brute_force(ffn, channel):
    """U_k by its definition, a sum of outer products."""
    return sum(ffn.down[channel, i] * torch.outer(ffn.gate[i], ffn.up[i]) for i in range(M))


def test_the_form_is_the_symmetric_part_of_the_sum_of_outer_products():
    ffn = random_ffn()
    u = brute_force(ffn, 5)
    torch.testing.assert_close(amplifier.form(ffn, 5), (u + u.T) / 2)
    h = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(amplifier.quadratic(ffn, h, 5), torch.einsum("bd,de,be->b", h, u, h))


def test_with_the_identity_for_an_activation_the_block_is_its_quadratic_form():
    ffn = random_ffn(activation=lambda x: x)
    h = torch.randn(4, D, dtype=torch.float64)
    forms = torch.stack([amplifier.quadratic(ffn, h, k) for k in range(D)], dim=-1)
    torch.testing.assert_close(amplifier.compute_write(ffn, h), forms)


@pytest.mark.parametrize("held", [1, 100, 2**22])
def test_gains_are_the_norms_of_the_forms_that_they_do_not_make(held, monkeypatch):
    monkeypatch.setattr(amplifier, "KERNEL", held)
    ffn = random_ffn()
    expected = torch.stack([brute_force(ffn, k).norm() for k in range(D)])
    torch.testing.assert_close(amplifier.gains(ffn), expected)
    for k in (0, D - 1):
        assert float(amplifier.form_norms(ffn, [k])) == pytest.approx(amplifier.form(ffn, k).norm().item(), rel=1e-12)


def test_lanczos_agrees_with_a_dense_solve():
    ffn = random_ffn(3)
    values, vectors = torch.linalg.eigh(amplifier.form(ffn, 2))
    order = values.abs().argsort(descending=True)[:4]
    found = amplifier.eigenpairs(ffn, 2, 4)
    torch.testing.assert_close(found.values, values[order], rtol=1e-6, atol=0)
    cosines = (found.vectors * vectors[:, order]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_lanczos_agrees_with_a_dense_solve_on_the_real_block(default_model):
    life = spikesink.find_lifecycle(
        spikesink.trace_windows(default_model, spikesink.windows(default_model, "house", 2, 32))
    )
    ffn = weights_of(default_model).ffn(life.main.step_up[0] // 2 - 1)
    values = torch.linalg.eigvalsh(amplifier.form(ffn.to(torch.float64), life.main.channel))
    top = values[values.abs().argsort(descending=True)[:2]]
    torch.testing.assert_close(amplifier.eigenpairs(ffn, life.main.channel).values, top, rtol=1e-6, atol=0)


def test_a_planted_direction_is_found_with_its_eigenvalue():
    """The neuron writes 40 (2 s.h)(3 s.h), so lambda is 240 and s* is s."""
    ffn, direction = rank_one_ffn()
    found = amplifier.eigenpairs(ffn, 3)
    assert found.values[0].item() == pytest.approx(240, rel=1e-3)
    assert abs(float(found.vectors[:, 0] @ direction)) == pytest.approx(1, abs=1e-5)
    assert (found.values[0] / amplifier.form_norms(ffn, [3])) ** 2 > 0.999
    gains = amplifier.gains(ffn)
    assert int(gains.argmax()) == 3
    assert float(gains[3] / gains.median()) > 1000


def test_a_random_block_has_no_such_direction():
    ffn = random_ffn()
    assert amplifier.directions(ffn, range(D)).shares.max() < 0.6


@pytest.mark.parametrize("channel", [-1, D])
def test_a_channel_that_does_not_exist(channel):
    ffn = random_ffn()
    for measure in (amplifier.form, amplifier.operator, amplifier.eigenpairs):
        with pytest.raises(ValueError, match=f"channel {channel} does not exist; this model has channels 0 to 11"):
            measure(ffn, channel)
    with pytest.raises(ValueError, match=f"channel {channel} does not exist"):
        amplifier.directions(ffn, [0, channel])


def test_more_eigenpairs_than_there_are(planted_model):
    with pytest.raises(ValueError, match="12 eigenpairs were asked for, and Lanczos finds 1 to 11 of 12"):
        amplifier.eigenpairs(random_ffn(), 0, D)


@pytest.fixture(scope="module")
def planted_life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="module")
def reading(planted_model, planted_life, trigger_tokens):
    return amplifier.read_block(planted_model, trigger_tokens, planted_life)


def test_the_planted_amplifier_is_read_with_its_numbers(reading, planted_model):
    """Neuron 0 of layer 1 reads channel 0 by 2 twice and writes w into the channel: lambda is 4 w, s* is e_0."""
    spike, mlp = planted.Plant(), planted_model.blocks[1].mlp
    w = float(dict(mlp.named_children())["out"].weight[spike.channel, 0])
    assert (reading.block, reading.channel) == (4, spike.channel)
    assert float(reading.pairs.values[0]) == pytest.approx(4 * w, rel=1e-4)
    assert abs(float(reading.spike.vectors[0, 0])) == pytest.approx(1, abs=1e-4)
    assert reading.spike.channels == (spike.channel, spike.side_channel)
    assert int(reading.is_spike.sum()) == len(reading.h) == 6
    assert reading.write[reading.is_spike] == pytest.approx(torch.full((6,), spike.size), rel=0.05)
    torch.testing.assert_close(reading.own, reading.write, rtol=1e-4, atol=1e-3)


def test_all_claims_about_the_planted_amplifier_hold(reading, planted_life, planted_model):
    census = amplifier.census(weights_of(planted_model))
    found = {
        "AM2": evidence.am2_high_gain(reading, planted_life, census),
        "AM3": evidence.am3_rank_one(reading),
        "AM5": evidence.am5_quadratic_form(reading),
        "AM6": evidence.am6_alignment(reading),
        "AM7": evidence.am7_weights_alone(planted_life, census),
    }
    assert {key: claims.judge(key, value, "04").verdict for key, value in found.items()} == dict.fromkeys(
        found, "holds"
    )
    assert found["AM6"].measured["same_side_spike"] == 1
    shared = evidence.am4_shared_direction(reading)
    assert shared.measured["predicted_over_written_range"] == pytest.approx([1, 1], abs=0.02)
    assert shared.measured["cosine_min"] == pytest.approx(1, abs=1e-3)
    assert shared.measured["misfit_of_prediction"] < 0.01
    assert shared.measured["cosine_control"] < 0.5
    near = evidence.am1_near_identity(reading).measured
    assert near["weighted_cosine_spike"] > 0.999
    assert found["AM3"].measured["rank_one_share"] > 0.99
    assert found["AM3"].control["rank_one_share_ordinary_channels"] < 0.5
    assert found["AM6"].control["one_over_root_d"] == 1 / 8
    assert found["AM7"].measured["step_up_ranks"][0][0] == 4


def test_controls_of_the_amplifier_are_what_they_say(reading, planted_life, planted_model, trigger_tokens):
    """Every control by its definition, from the block's weights and the model's own h~."""
    ffn, spikes, h = reading.ffn, reading.is_spike, reading.h
    name = "blocks.1.ln2.hook_normalized"
    everyone = planted_model.run_with_cache(trigger_tokens, names_filter=name)[1][name]
    torch.testing.assert_close(everyone[spikes], h)
    others = everyone[~spikes]
    pairs = {c: torch.linalg.eigh(amplifier.form(ffn, c).double()) for c in reading.ordinary.channels}
    tops = {c: int(values.abs().argmax()) for c, (values, _) in pairs.items()}
    lambdas = torch.stack([pairs[c].eigenvalues[tops[c]] for c in pairs]).float()
    directions = torch.stack([pairs[c].eigenvectors[:, tops[c]] for c in pairs]).float()

    control = evidence.am5_quadratic_form(reading).control
    wrote = amplifier.compute_write(ffn, h)[:, list(pairs)]
    error = ((lambdas * (h @ directions.T) ** 2 - wrote) / wrote).abs()[wrote != 0]
    assert control["median_relative_error_ordinary_channels"] == pytest.approx(float(error.quantile(0.5)), rel=1e-3)

    found = evidence.am6_alignment(reading)
    cosine = (h @ directions.T).abs() / h.norm(dim=-1, keepdim=True)
    assert found.control["cosine_spike_ordinary_channels"] == pytest.approx(float(cosine.quantile(0.5)), rel=1e-3)
    other = others[:, 0].abs() / others.norm(dim=-1)  # s* is e_0
    assert found.measured["cosine_other"] == pytest.approx(float(other.quantile(0.5)), rel=0.01, abs=1e-4)

    mine, rest = amplifier.pair_cosines(reading.spike.vectors), amplifier.pair_cosines(directions)
    found = evidence.am4_shared_direction(reading)
    assert found.measured["cosine_min"] == pytest.approx(float(mine.min()))
    assert found.measured["cosine_control"] == pytest.approx(float(rest.quantile(0.5)), rel=1e-3)
    assert found.control["cosine_max_ordinary_channels"] == pytest.approx(float(rest.max()), rel=1e-3)

    census = amplifier.census(weights_of(planted_model))
    ranks = torch.tensor([float(census.rank_in_block(4, c)) for c in reading.ordinary.channels])
    found = evidence.am2_high_gain(reading, planted_life, census)
    assert found.control["gain_rank_ordinary_channels"] == float(ranks.quantile(0.5))
    no_steps = [2, 6, 8, 12]  # all FFN blocks but step-up 4 and step-down 10
    ranks = torch.tensor([float(census.rank_in_block(b, reading.channel)) for b in no_steps])
    assert found.control["gain_rank_other_blocks"] == float(ranks.quantile(0.5))
    over = torch.stack([census.gain[b // 2 - 1, reading.channel] / census.gain[b // 2 - 1].median() for b in no_steps])
    assert found.control["gain_over_median_other_blocks"] == pytest.approx(float(over.quantile(0.5)))

    found = evidence.am7_weights_alone(planted_life, census)
    ranks = torch.tensor([float(census.rank(b, reading.channel)) for b in no_steps])
    assert found.control["rank_same_channel_other_blocks"] == float(ranks.quantile(0.5))
    ranks = torch.tensor([float(census.rank(b, c)) for b in (4, 10) for c in reading.ordinary.channels])
    assert found.control["rank_ordinary_channels"] == float(ranks.quantile(0.5))
    assert found.measured["top_pairs"] == 3
    steps = [pair for pair in census.top(3) if pair[0] in (4, 10) and pair[1] in reading.spike.channels]
    assert found.measured["step_pairs_among_them"] == len(steps) > 0

    gate = h @ ffn.gate.T
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    cosine = torch.cosine_similarity(torch.nn.functional.silu(random), random, dim=-1)
    control = evidence.am1_near_identity(reading).control
    assert control["silu_cosine_random_gates"] == pytest.approx(float(cosine.quantile(0.5)), rel=1e-5)
    assert control["weighted_cosine_random_gates"] > control["silu_cosine_random_gates"]


def test_the_worst_of_several_steps_is_ranked(planted_life):
    """Two step-up blocks, one of which the census puts last."""
    life = replace(planted_life, cycles=(replace(planted_life.main, step_up=(mlp(1), mlp(2))),))
    gain = torch.ones(6, 64)
    gain[1, 9], gain[2, 9], gain[4, 9] = 5, 0.1, 3
    found = evidence.am7_weights_alone(life, amplifier.Census(tuple(map(mlp, range(6))), gain))
    assert found.measured["step_up_ranks"] == [[4, 1], [6, 384]]
    assert (found.measured["step_up_rank"], found.measured["step_down_rank"]) == (384, 2)
    assert claims.judge("AM7", found, "04").verdict == "differs"


def test_controls_leave_the_step_blocks_out(planted_life, reading):
    """Of six FFN blocks 4 is step-up and 10 step-down; the spike channel's gain is its own in each of the others."""
    gain = torch.ones(6, 64)
    gain[[1, 4], 9] = torch.tensor([5.0, 6.0])
    gain[[0, 2, 3, 5], 9] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    census = amplifier.Census(tuple(map(mlp, range(6))), gain)
    found = evidence.am7_weights_alone(planted_life, census)
    assert found.control["rank_same_channel_other_blocks"] == (382 + 383) / 2  # of 384, 383, 382 and 381
    found = evidence.am2_high_gain(reading, planted_life, census)
    assert found.control["gain_over_median_other_blocks"] == pytest.approx(0.25)
    assert found.measured["gain_over_median"] == 5


def test_spike_tokens_are_not_among_the_others(reading):
    half = torch.zeros_like(reading.is_spike)
    half[:3] = True
    values = torch.where(half, 1.0, 3.0)
    bent = replace(reading, is_spike=half, cosine=values / 4, write=values, rank_one=torch.where(half, 1.0, 9.0))
    bent = replace(bent, silu_cosine=values / 4, h=reading.h[:1].expand(int(half.sum()), -1))
    assert evidence.am5_quadratic_form(bent).measured["median_relative_error"] == 0
    assert evidence.am5_quadratic_form(bent).control["median_relative_error_other_tokens"] == 2
    found = evidence.am6_alignment(bent).measured
    assert (found["cosine_spike"], found["cosine_other"], found["cosine_other_max"]) == (0.25, 0.75, 0.75)
    found = evidence.am1_near_identity(bent).measured
    assert (found["silu_cosine_spike"], found["silu_cosine_other"]) == (0.25, 0.75)


def test_r2_is_about_the_mean():
    true = torch.tensor([10.0, 11.0, 12.0])
    assert amplifier.r_squared(true, true) == 1
    assert amplifier.r_squared(torch.full((3,), 11.0), true) == 0
    assert amplifier.r_squared(torch.full((3,), 12.0), true) == pytest.approx(1 - 5 / 2)


def test_biases_are_in_what_is_measured():
    gate_bias, up_bias, down_bias = torch.ones(M).double(), 2 * torch.ones(M).double(), 3 * torch.ones(D).double()
    ffn = replace(random_ffn(), gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias).to(torch.float32)
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    found = amplifier.take_apart(ffn, 3, amplifier.eigenpairs(ffn, 3), h)
    torch.testing.assert_close(found["write"], amplifier.compute_write(ffn, h)[:, 3])
    gate = h @ ffn.gate.T + 1
    hidden = torch.nn.functional.silu(gate) * (h @ ffn.up.T + 2)
    torch.testing.assert_close(found["write"], hidden @ ffn.down[3] + 3, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(
        found["silu_cosine"], torch.cosine_similarity(torch.nn.functional.silu(gate), gate, dim=-1)
    )


def test_the_steps_of_the_derivation_get_their_own_errors(reading):
    spikes = reading.is_spike
    error = (reading.quadratic - reading.write).abs()
    row = amplifier.compare_step(reading, "identity").iloc[0]
    relative = (error[spikes] / reading.write[spikes].abs()).median()
    assert row["spike tokens: error ÷ own write"] == pytest.approx(float(relative), rel=0.5)
    assert amplifier.compare_step(reading, "exact").iloc[0, 1] < 1e-5
    torch.testing.assert_close(reading.closed_form, reading.rank_one, rtol=1e-3, atol=1e-3)  # as |h~|^2 is d
    wrong = replace(reading, own=reading.write * 1.5)
    assert amplifier.compare_step(wrong, "exact").iloc[0, 1] == pytest.approx(0.5)


def test_shut_gates_count_in_the_plain_cosine_and_not_in_the_weighted_one():
    """Neuron 0 is open and writes the channel; neuron 1 is shut as wide and writes nothing."""
    eye = torch.eye(2)
    ffn = FFN(
        10 * torch.tensor([[1.0, 0], [-1.0, 0]]), torch.ones(2, 2), eye, torch.zeros(2), torch.zeros(2), torch.relu
    )
    pairs = amplifier.Eigenpairs(torch.tensor([5.0]), torch.tensor([[1.0], [0.0]]).double())
    found = amplifier.take_apart(ffn, 0, pairs, torch.tensor([[1.0, 0.0]]))
    assert found["silu_cosine"].item() == pytest.approx(0.5**0.5)
    assert found["silu_ratio"].item() == pytest.approx(0.5**0.5)
    assert found["weighted_cosine"].item() == pytest.approx(1)
    assert (found["write"].item(), found["rank_one"].item(), found["cosine"].item()) == (10, 5, 1)
    assert (found["largest"].item(), found["size"].item()) == (10, 10)


def test_an_amplifier_works_on_one_side_of_its_direction(reading):
    """For -h~ the form is the same, and the gates are shut."""
    opposite = amplifier.compute_write(reading.ffn, -reading.h)[:, reading.channel]
    form = amplifier.quadratic(reading.ffn, -reading.h, reading.channel)
    torch.testing.assert_close(form, amplifier.quadratic(reading.ffn, reading.h, reading.channel))
    assert (opposite.abs() < 0.01 * form.abs()).all()
    assert (reading.cosine[reading.is_spike] > 0).all()


def test_the_scale_of_a_norm_after_the_block_is_measured(reading):
    scale = torch.ones(planted.D_MODEL)
    scale[reading.channel] = -50
    scale[reading.ordinary.channels[3]] = 7
    normed = replace(reading, ffn=replace(reading.ffn, post_scale=scale))
    found = evidence.x_am8_output_norm(normed)
    assert found.measured["scale_over_median"] == 50
    assert found.measured["largest_possible"] == 50 * 8
    share = reading.write.abs() / reading.size
    assert found.measured["share_of_norm_spike"] == pytest.approx(float(share[reading.is_spike].median()), rel=1e-3)
    assert found.control["scale_over_median_ordinary_channels"] == 7  # the largest
    assert claims.judge("X-AM8", found, "04").verdict == "holds"
    assert evidence.x_am8_output_norm(reading) == NotApplicable("no norm stands between the block and the stream")


def test_the_census_s_hits_are_followed_on_text(planted_model, planted_life, trigger_tokens):
    weights = weights_of(planted_model)
    table = amplifier.census_on_text(planted_model, trigger_tokens, planted_life, amplifier.census(weights), 3)
    many = amplifier.census_on_text(planted_model, trigger_tokens, planted_life, amplifier.census(weights), 60)
    in_step = many[many["block"].isin([str(mlp(1)), str(mlp(4))])]
    assert set(in_step["step"]) == {"", "up", "down"}
    assert set(in_step[in_step["step"] != ""]["channel"]) <= {planted.Plant().channel, planted.Plant().side_channel}
    first = table.iloc[0]
    assert (first["block"], first["channel"], first["step"]) == (str(mlp(1)), planted.Plant().channel, "up")
    assert first["write, spike"] == pytest.approx(1000, rel=0.05)
    assert first["write, other"] < 100
    assert first["cos, spike"] > 0.9 > first["cos, other"]
    assert first["form, spike"] == pytest.approx(first["write, spike"], rel=0.01)
    assert first["÷ block's median"] == pytest.approx(first["gain"] / amplifier.census(weights).gain[1].median())


def test_another_block_can_be_read(planted_model, planted_life, trigger_tokens, reading):
    down = amplifier.read_block(planted_model, trigger_tokens, planted_life, block=10)
    assert (down.block, down.channel) == (10, reading.channel)
    assert down.write[down.is_spike].mean() < -500
    for wrong in (9, 0, 14):
        with pytest.raises(ValueError, match=rf"block {wrong}|embedding.*is not among the FFN blocks"):
            amplifier.read_block(planted_model, trigger_tokens, planted_life, block=wrong)


def test_spectra_are_shares_of_the_norm(reading):
    found = amplifier.find_spectra(reading, n=5, ordinary=2)
    assert list(found) == [reading.channel, *reading.ordinary.channels[:2]]
    dense = torch.linalg.eigvalsh(amplifier.form(reading.ffn.to(torch.float64), reading.channel))
    top = dense[dense.abs().argsort(descending=True)[:5]] / dense.norm()
    torch.testing.assert_close(found[reading.channel], top, rtol=1e-6, atol=1e-12)


def test_a_model_without_a_spike_gets_the_reason(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 16)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    found = amplifier.read_block(random_model, tokens, life)
    assert found == amplifier.step_up_direction(weights_of(random_model), life) == NotApplicable(life.reason)
    for measure in (evidence.am1_near_identity, evidence.am3_rank_one, amplifier.find_spectra):
        assert measure(found) is found
    census = amplifier.census(weights_of(random_model))
    assert evidence.am7_weights_alone(life, census) == NotApplicable(life.reason)


def test_the_weights_alone_find_the_planted_blocks(planted_model):
    census = amplifier.census(weights_of(planted_model))
    assert census.gain.shape == (planted.N_LAYERS, planted.D_MODEL)
    spike = planted.Plant
    assert census.top(1)[0][:2] == (4, spike.channel)
    assert census.rank(4, spike.channel) == census.rank_in_block(4, spike.channel) == 1
    assert census.rank(10, spike.channel) <= 4
    with pytest.raises(ValueError, match="channel 3 is not among the FFN blocks"):
        census.rank(5, 3)


def test_a_norm_after_the_block_is_not_in_its_gain(tmp_path):
    """It divides the size of what the block writes out: ||U_k||_F is before it."""
    model = spikesink.load(tiny("gemma2", tmp_path))
    with torch.no_grad():
        model.blocks[1].ln2_post.original_component.weight.fill_(99)
    weights = weights_of(model)
    assert weights.ffn(1).post_scale.tolist() == [100.0] * 64
    torch.testing.assert_close(amplifier.census(weights).gain[1], amplifier.gains(weights.ffn(1)).float())


def test_a_census_read_from_files_is_that_of_the_loaded_model(planted_directory, planted_model):
    ours, loaded = (
        amplifier.census(weights) for weights in (open_weights(planted_directory), weights_of(planted_model))
    )
    assert torch.equal(ours.gain, loaded.gain)
