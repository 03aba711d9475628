"""The quadratic amplifier against brute force on small sizes, and against a planted one whose answer is known."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from spikesink.chain import amplifier
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model.anatomy import Block, attn, mlp
from spikesink.model.weights import FFN, open_weights, weights_of
from tests import planted

D, M = 12, 20


def random_ffn(seed=0) -> FFN:
    generator = torch.Generator().manual_seed(seed)
    gate, up = (torch.randn(M, D, generator=generator, dtype=torch.float64) for _ in range(2))
    down = torch.randn(D, M, generator=generator, dtype=torch.float64)
    zeros = torch.zeros(M, dtype=torch.float64)
    return FFN(gate, up, down, zeros, zeros, functional.silu)


def brute_force(ffn, channel):
    """U_k by its definition, a sum of outer products."""
    return sum(ffn.down[channel, i] * torch.outer(ffn.gate[i], ffn.up[i]) for i in range(M))


def test_the_form_is_the_symmetric_part_of_the_sum_of_outer_products():
    ffn = random_ffn()
    u = brute_force(ffn, 5)
    torch.testing.assert_close(amplifier.form(ffn, 5), (u + u.T) / 2)
    h = torch.randn(7, D, dtype=torch.float64)
    torch.testing.assert_close(amplifier.quadratic(ffn, h, 5), torch.einsum("bd,de,be->b", h, u, h))
    plain = replace(ffn, activation=lambda x: x)  # then the block is its quadratic form
    torch.testing.assert_close(amplifier.compute_write(plain, h)[:, 5], amplifier.quadratic(plain, h, 5))


def test_lanczos_agrees_with_a_dense_solve():
    ffn = random_ffn(3)
    values, vectors = torch.linalg.eigh(amplifier.form(ffn, 2))
    order = values.abs().argsort(descending=True)[:4]
    pairs = amplifier.eigenpairs(ffn, 2, 4)
    torch.testing.assert_close(pairs.values, values[order], rtol=1e-6, atol=0)
    assert float((pairs.vectors * vectors[:, order]).sum(0).abs().min()) > 1 - 1e-6
    with pytest.raises(ValueError, match="1 to 11 of 12"):
        amplifier.eigenpairs(ffn, 0, D)
    for channel in (-1, D):
        with pytest.raises(ValueError, match=f"channel {channel} does not exist"):
            amplifier.form(ffn, channel)


@pytest.mark.parametrize("held", [1, 50, 2**22])
def test_gains_are_the_norms_of_the_forms_that_they_do_not_make(held, monkeypatch):
    monkeypatch.setattr(amplifier, "KERNEL", held)
    ffn = random_ffn()
    expected = torch.stack([brute_force(ffn, k).norm() for k in range(D)])
    torch.testing.assert_close(amplifier.gains(ffn), expected)
    for k in (0, D - 1):
        assert float(amplifier.form_norms(ffn, [k])) == pytest.approx(amplifier.form(ffn, k).norm().item(), rel=1e-12)


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
    # It works on one side of its direction: for -h~ the form is the same, and the gates are shut.
    form = amplifier.quadratic(reading.ffn, -reading.h, reading.channel)
    torch.testing.assert_close(form, reading.quadratic[reading.is_spike])
    opposite = amplifier.compute_write(reading.ffn, -reading.h)[:, reading.channel]
    assert (opposite.abs() < 0.01 * form.abs()).all()
    assert (reading.cosine[reading.is_spike] > 0).all()


def test_shut_gates_count_in_the_plain_cosine_and_not_in_the_weighted_one():
    """Neuron 0 is open and writes the channel; neuron 1 is shut as wide and writes nothing."""
    eye = torch.eye(2)
    gate = torch.tensor([[10.0, 0], [-10.0, 0]])
    ffn = FFN(gate, torch.ones(2, 2), eye, torch.zeros(2), torch.zeros(2), torch.relu)
    pairs = amplifier.Eigenpairs(torch.tensor([5.0]), torch.tensor([[1.0], [0.0]]).double())
    parts = {name: value.item() for name, value in amplifier.take_apart(ffn, 0, pairs, eye[:1]).items()}
    cosines = {"silu_cosine": 0.5**0.5, "silu_ratio": 0.5**0.5, "weighted_cosine": 1, "cosine": 1}
    sizes = {"write": 10, "quadratic": 10, "rank_one": 5, "largest": 10, "size": 10}
    assert parts == pytest.approx(cosines | sizes)


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


def test_a_census_read_from_files_is_that_of_the_loaded_model(planted_directory, planted_model):
    ours, loaded = map(amplifier.census, (open_weights(planted_directory), weights_of(planted_model)))
    assert torch.equal(ours.gain, loaded.gain)
    assert loaded.rank(4, planted.Plant.channel) == loaded.rank_in_block(4, planted.Plant.channel) == 1


def test_biases_are_in_what_is_measured():
    biases = {"gate_bias": torch.ones(M), "up_bias": 2 * torch.ones(M), "down_bias": 3 * torch.ones(D)}
    ffn = replace(random_ffn(), **biases).to(torch.float32)
    h = torch.randn(5, D, generator=torch.Generator().manual_seed(2))
    parts = amplifier.take_apart(ffn, 3, amplifier.eigenpairs(ffn, 3), h)
    gate = h @ ffn.gate.T + 1
    active = functional.silu(gate)
    expected = (active * (h @ ffn.up.T + 2)) @ ffn.down[3] + 3
    torch.testing.assert_close(parts["write"], expected, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts["write"], amplifier.compute_write(ffn, h)[:, 3], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(parts["silu_cosine"], torch.cosine_similarity(active, gate, dim=-1))


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
    assert shared.measured["predicted_over_written_range"] == pytest.approx([1, 1], abs=0.02)
    pairs = (s @ s.T).abs()[*torch.triu_indices(len(s), len(s), 1)]
    assert shared.measured["cosine_control"] == pytest.approx(float(pairs.quantile(0.5)), rel=1e-3)
    assert shared.control["cosine_max_ordinary_channels"] == pytest.approx(float(pairs.max()), rel=1e-3)

    gate = h @ ffn.gate.T
    random = torch.randn(gate.shape, generator=torch.Generator().manual_seed(0)) * gate.square().mean().sqrt()
    cosine = torch.cosine_similarity(functional.silu(random), random, dim=-1)
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
    # Of several steps the worst is ranked: here the census puts the second step-up block near the end.
    two = replace(planted_life, cycles=(replace(planted_life.main, step_up=(mlp(1), mlp(0))),))
    several = evidence.am7_weights_alone(two, census)
    assert several.measured["step_up_ranks"] == [[4, 2], [2, 384]]
    assert (several.measured["step_up_rank"], several.measured["step_down_rank"]) == (384, 1)
    assert claims.judge("AM7", several, "04").verdict == "differs"
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
    measured = evidence.am6_alignment(bent).measured | evidence.am1_near_identity(bent).measured
    for name in ("cosine", "silu_cosine"):
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
    steps, first = table[table["step"] != ""], table.iloc[0]
    assert {*zip(steps["block"], steps["step"], strict=True)} == {(str(mlp(1)), "up"), (str(mlp(4)), "down")}
    assert set(steps["channel"]) <= {spike.channel, spike.side_channel}
    assert (first["block"], first["channel"], first["step"]) == (str(mlp(1)), spike.channel, "up")
    assert [first["write, spike"], first["form, spike"]] == pytest.approx([spike.size] * 2, rel=0.05)
    assert first["write, other"] < 100
    assert first["cos, spike"] > 0.9 > first["cos, other"]


def test_spectra_are_shares_of_the_norm(reading):
    spectra = amplifier.find_spectra(reading, n=5, ordinary=2)
    assert list(spectra) == [reading.channel, *reading.ordinary.channels[:2]]
    dense = torch.linalg.eigvalsh(amplifier.form(reading.ffn.to(torch.float64), reading.channel))
    top = dense[dense.abs().argsort(descending=True)[:5]] / dense.norm()  # their squares add up to 1
    torch.testing.assert_close(spectra[reading.channel], top, rtol=1e-6, atol=1e-12)
