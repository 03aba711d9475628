"""The quadratic amplifier against brute force on small sizes, and against a planted one whose answer is known."""

from dataclasses import replace

import pytest
import torch

import spikesink
from spikesink.chain import amplifier
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model.anatomy import Block, attn, mlp
from spikesink.model.weights import FFN, open_weights, weights_of
from tests import planted

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


def test_the_worst_of_several_steps_is_ranked(planted_life):
    """Two step-up blocks, one of which the census puts last."""
    life = replace(planted_life, cycles=(replace(planted_life.main, step_up=(mlp(1), mlp(2))),))
    gain = torch.ones(6, 64)
    gain[1, 9], gain[2, 9], gain[4, 9] = 5, 0.1, 3
    found = evidence.am7_weights_alone(life, amplifier.Census(tuple(map(mlp, range(6))), gain))
    assert found.measured["step_up_ranks"] == [[4, 1], [6, 384]]
    assert (found.measured["step_up_rank"], found.measured["step_down_rank"]) == (384, 2)
    assert claims.judge("AM7", found, "04").verdict == "differs"


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


def test_another_block_can_be_read(planted_model, planted_life, trigger_tokens, reading):
    down = amplifier.read_block(planted_model, trigger_tokens, planted_life, mlp(4))
    assert (down.block, down.channel) == (mlp(4), reading.channel)
    assert down.write[down.is_spike].mean() < -500
    for wrong in (attn(4), Block(0), mlp(6)):
        with pytest.raises(ValueError, match="not among the FFN blocks"):
            amplifier.read_block(planted_model, trigger_tokens, planted_life, wrong)


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


def test_a_census_read_from_files_is_that_of_the_loaded_model(planted_directory, planted_model):
    ours, loaded = map(amplifier.census, (open_weights(planted_directory), weights_of(planted_model)))
    assert torch.equal(ours.gain, loaded.gain)


@pytest.mark.parametrize("channel", [-1, D])
def test_a_channel_that_does_not_exist(channel):
    for measure in (amplifier.form, amplifier.operator, amplifier.eigenpairs):
        with pytest.raises(ValueError, match=f"channel {channel} does not exist"):
            measure(random_ffn(), channel)


def test_more_eigenpairs_than_there_are():
    with pytest.raises(ValueError, match="1 to 11 of 12"):
        amplifier.eigenpairs(random_ffn(), 0, D)


def test_biases_are_in_what_is_measured():
    ffn = replace(random_ffn(), gate_bias=torch.ones(M), up_bias=2 * torch.ones(M), down_bias=3 * torch.ones(D)).to(
        torch.float32
    )
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    parts = amplifier.take_apart(ffn, 3, amplifier.eigenpairs(ffn, 3), h)
    gate = h @ ffn.gate.T + 1
    active = torch.nn.functional.silu(gate)
    expected = (active * (h @ ffn.up.T + 2)) @ ffn.down[3] + 3
    torch.testing.assert_close(parts["write"], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts["write"], amplifier.compute_write(ffn, h)[:, 3], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts["silu_cosine"], torch.cosine_similarity(active, gate, dim=-1))


def test_all_claims_about_the_planted_amplifier_hold(reading, planted_life, planted_model):
    census = amplifier.census(weights_of(planted_model))
    said = {
        "AM2": evidence.am2_high_gain(reading, planted_life, census),
        "AM3": evidence.am3_rank_one(reading),
        "AM5": evidence.am5_quadratic_form(reading),
        "AM6": evidence.am6_alignment(reading),
        "AM7": evidence.am7_weights_alone(planted_life, census),
    }
    assert {claims.judge(key, value, "04").verdict for key, value in said.items()} == {"holds"}
    assert said["AM6"].measured["same_side_spike"] == 1
    assert said["AM3"].control["rank_one_share_ordinary_channels"] < 0.5
    shared = evidence.am4_shared_direction(reading).measured
    assert shared["predicted_over_written_range"] == pytest.approx([1, 1], abs=0.02)
    assert shared["cosine_min"] == pytest.approx(1, abs=1e-3)
    assert shared["cosine_control"] < 0.5
    assert evidence.am1_near_identity(reading).measured["weighted_cosine_spike"] > 0.999


def test_controls_by_their_definition_from_the_blocks_weights_and_the_models_own_h(
    reading, planted_model, trigger_tokens
):
    ffn, spikes, h = reading.ffn, reading.is_spike, reading.h
    name = "blocks.1.ln2.hook_normalized"
    everyone = planted_model.run_with_cache(trigger_tokens, names_filter=name)[1][name]
    torch.testing.assert_close(everyone[spikes], h)
    channels = list(reading.ordinary.channels)
    values, vectors = torch.linalg.eigh(torch.stack([amplifier.form(ffn, c).double() for c in channels]))
    top = values.abs().argmax(1)
    lambdas, s = (x.float() for x in (values.gather(1, top[:, None])[:, 0], vectors[range(len(top)), :, top]))

    wrote = amplifier.compute_write(ffn, h)[:, channels]
    error = ((lambdas * (h @ s.T) ** 2 - wrote) / wrote).abs()[wrote != 0]
    control = evidence.am5_quadratic_form(reading).control
    assert control["median_relative_error_ordinary_channels"] == pytest.approx(float(error.quantile(0.5)), rel=1e-3)
    cosine = (h @ s.T).abs() / h.norm(dim=-1, keepdim=True)
    control = evidence.am6_alignment(reading).control
    assert control["cosine_spike_ordinary_channels"] == pytest.approx(float(cosine.quantile(0.5)), rel=1e-3)
    shared = evidence.am4_shared_direction(reading)
    pairs = (s @ s.T).abs()[*torch.triu_indices(len(s), len(s), 1)]
    assert shared.measured["cosine_control"] == pytest.approx(float(pairs.quantile(0.5)), rel=1e-3)
    assert shared.control["cosine_max_ordinary_channels"] == pytest.approx(float(pairs.max()), rel=1e-3)

    gate = h @ ffn.gate.T
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    cosine = torch.cosine_similarity(torch.nn.functional.silu(random), random, dim=-1)
    control = evidence.am1_near_identity(reading).control
    assert control["silu_cosine_random_gates"] == pytest.approx(float(cosine.quantile(0.5)), rel=1e-5)


def test_controls_of_the_census_leave_the_step_blocks_out(planted_life, reading):
    """Of six FFN blocks L1 is step-up and L4 step-down; the spike channel's gain is its own in each of the others."""
    gain = torch.ones(6, 64)
    gain[[1, 4], 9] = torch.tensor([5.0, 6.0])
    gain[[0, 2, 3, 5], 9] = torch.tensor([0.1, 0.2, 0.3, 0.4])
    census = amplifier.Census(tuple(map(mlp, range(6))), gain)
    said = evidence.am7_weights_alone(planted_life, census)
    assert said.control["rank_same_channel_other_blocks"] == (382 + 383) / 2  # of 384, 383, 382 and 381
    assert said.control["rank_ordinary_channels"] == 3
    said = evidence.am2_high_gain(reading, planted_life, census)
    assert said.control["gain_over_median_other_blocks"] == pytest.approx(0.25)
    assert (said.control["gain_rank_ordinary_channels"], said.control["gain_over_median_ordinary_channels"]) == (2, 1)
    assert said.measured["gain_over_median"] == 5


def test_spike_tokens_are_not_among_the_others(reading):
    half = torch.zeros_like(reading.is_spike)
    half[:3] = True
    values = torch.where(half, 1.0, 3.0)
    bent = replace(reading, is_spike=half, cosine=values / 4, write=values, rank_one=torch.where(half, 1.0, 9.0))
    bent = replace(bent, silu_cosine=values / 4, h=reading.h[:1].expand(int(half.sum()), -1))
    error = evidence.am5_quadratic_form(bent)
    assert error.measured["median_relative_error"] == 0
    assert error.control["median_relative_error_other_tokens"] == 2
    for name, measured in (
        ("cosine", evidence.am6_alignment(bent).measured),
        ("silu_cosine", evidence.am1_near_identity(bent).measured),
    ):
        assert (measured[f"{name}_spike"], measured[f"{name}_other"]) == (0.25, 0.75)


def test_the_steps_of_the_derivation_get_their_own_errors(reading):
    spikes, error = reading.is_spike, (reading.quadratic - reading.write).abs()
    relative = float((error[spikes] / reading.write[spikes].abs()).quantile(0.5))
    assert amplifier.compare_step(reading, "identity").iloc[0, 1] == pytest.approx(relative)
    assert amplifier.compare_step(reading, "exact").iloc[0, 1] < 1e-5
    torch.testing.assert_close(reading.closed_form, reading.rank_one, rtol=1e-3, atol=1e-3)  # as |h~|^2 is d
    wrong = replace(reading, own=reading.write * 1.5)
    assert amplifier.compare_step(wrong, "exact").iloc[0, 1] == pytest.approx(0.5)


def test_the_largest_pairs_of_the_census_are_followed_on_text(planted_model, planted_life, trigger_tokens):
    census, spike = amplifier.census(weights_of(planted_model)), planted.Plant()
    table = amplifier.census_on_text(planted_model, trigger_tokens, planted_life, census, 60)
    steps = table[table["step"] != ""]
    assert {*zip(steps["block"], steps["step"], strict=True)} == {(str(mlp(1)), "up"), (str(mlp(4)), "down")}
    assert set(steps["channel"]) <= {spike.channel, spike.side_channel}
    first = table.iloc[0]
    assert (first["block"], first["channel"], first["step"]) == (str(mlp(1)), spike.channel, "up")
    assert first["write, spike"] == pytest.approx(1000, rel=0.05)
    assert first["write, other"] < 100
    assert first["cos, spike"] > 0.9 > first["cos, other"]
    assert first["form, spike"] == pytest.approx(first["write, spike"], rel=0.01)


def test_spectra_are_shares_of_the_norm(reading):
    spectra = amplifier.find_spectra(reading, n=5, ordinary=2)
    assert list(spectra) == [reading.channel, *reading.ordinary.channels[:2]]
    dense = torch.linalg.eigvalsh(amplifier.form(reading.ffn.to(torch.float64), reading.channel))
    top = dense[dense.abs().argsort(descending=True)[:5]] / dense.norm()
    torch.testing.assert_close(spectra[reading.channel], top, rtol=1e-6, atol=1e-12)
