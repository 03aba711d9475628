"""The life cycle against ground truth: a spike planted by hand is found exactly, and where there is none, none is."""

import pytest
import spikesink
import torch
from spikesink import lifecycle
from spikesink.claims import Evidence, NotApplicable, verdict

from tests import planted


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


def found(directory, tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(spikesink.load(directory), tokens))


def test_planted_spike_is_found_at_its_blocks_and_channels(life):
    cycle = life.main
    assert cycle.channel == planted.Plant.channel
    assert cycle.step_up == (4,)  # the FFN of layer 1
    assert cycle.step_down == (10,)  # the FFN of layer 4
    assert cycle.plateau == (4, 9)
    assert cycle.channels == (planted.Plant.channel, planted.Plant.side_channel)
    assert cycle.value == pytest.approx(planted.Plant.size, rel=0.05)
    assert cycle.shape == "step"
    assert len(life.cycles) == 1


def test_spike_tokens_are_found_wherever_they_are(life):
    rows = lifecycle.spike_rows(life)
    places = sorted(zip(rows.window.tolist(), rows.position.tolist(), strict=True))
    assert places == [(1, 0), (2, 20), (3, 47), (4, 5), (4, 30), (5, 0)]
    assert set(rows.token.tolist()) == {1}


def test_claims_say_what_was_planted(life, planted_model):
    up, down = lifecycle.step_up(life), lifecycle.step_down(life)
    assert up.measured["share_written"] == pytest.approx(1, abs=0.01)
    assert up.measured["largest_attention_share"] == 0  # no attention block writes to that channel
    assert down.measured["share_cancelled"] == pytest.approx(planted.Plant.cancelled, abs=0.05)
    assert down.measured["left_at_the_end"] == pytest.approx(1 - planted.Plant.cancelled, abs=0.05)
    assert lifecycle.plateau(life).measured["plateau_write_ratio"] == 0
    assert lifecycle.fixed_ratios(life).measured["ratio"] == pytest.approx(planted.Plant.side_ratio, abs=1e-3)
    tokens = lifecycle.few_tokens(life, planted_model.tokenizer.decode).measured
    assert tokens["n_spike_tokens"] == 6
    assert tokens["position0_share"] == pytest.approx(2 / 6)
    assert tokens["spike_tokens"] == [planted.TRIGGER]
    # Position 0 spikes in a third of the windows only, and the rule says so.
    assert verdict("LC7", tokens) == "differs"
    assert verdict("LC1", up.measured) == "holds"
    assert verdict("LC3", down.measured) == "holds"


def test_negative_spike_is_found_with_its_sign(tmp_path, trigger_tokens):
    model = planted.plant(planted.random_llama(400), planted.Plant(size=-1000.0, channel=20, side_channel=40))
    cycle = found(planted.save(model, tmp_path / "negative"), trigger_tokens).main
    assert (cycle.channel, cycle.step_up, cycle.step_down) == (20, (4,), (10,))
    assert cycle.value == pytest.approx(-1000, rel=0.05)


def test_two_step_up_and_two_step_down_blocks_are_all_found(tmp_path, trigger_tokens):
    spike = planted.Plant(step_up_layers=(0, 2), step_down_layers=(4, 5))
    cycle = found(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "two"), trigger_tokens).main
    assert (cycle.step_up, cycle.step_down) == ((2, 6), (10, 12))
    assert cycle.shape == "step"


def test_many_small_writes_are_a_ramp(tmp_path, trigger_tokens):
    spike = planted.Plant(step_up_layers=(0, 1, 2, 3, 4), step_down_layers=())
    life = found(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "ramp"), trigger_tokens)
    assert life.main.shape == "ramp"
    assert life.main.step_up == (2, 4, 6, 8, 10)
    assert life.main.step_down == ()
    assert verdict("LC1", lifecycle.step_up(life).measured) == "differs"


def test_a_smaller_cycle_on_other_tokens_is_reported_too(planted_model, trigger_tokens):
    trace = spikesink.trace_windows(planted_model, trigger_tokens)
    rows = trace.rows
    ordinary = (~rows.candidate).nonzero()[:3, 0]
    channel = int((trace.channels == planted.Plant.side_channel).nonzero()[0])
    rows.stream[ordinary, 3:7, channel] = 40.0
    rows.writes[ordinary, 2, channel] = 40.0
    rows.writes[ordinary, 6, channel] = -40.0
    cycles = spikesink.find_lifecycle(trace).cycles
    assert [c.channel for c in cycles] == [planted.Plant.channel, planted.Plant.side_channel]
    assert (cycles[1].step_up, cycles[1].step_down, cycles[1].plateau) == ((3,), (7,), (3, 6))
    assert cycles[1].is_spike.nonzero()[:, 0].tolist() == ordinary.tolist()


def test_without_a_spike_every_claim_says_why_it_does_not_apply(random_model):
    life = spikesink.find_lifecycle(
        spikesink.trace_windows(random_model, spikesink.windows(random_model, "house", 3, 64))
    )
    assert life.main is None
    assert life.cycles == ()
    for measure in ("step_up", "plateau", "step_down", "few_channels", "same_channels", "fixed_ratios"):
        assert isinstance(getattr(lifecycle, measure)(life), NotApplicable)
    assert isinstance(lifecycle.few_tokens(life, random_model.tokenizer.decode), NotApplicable)


def test_windows_without_a_spike_token_only_have_none(planted_model, trigger_tokens):
    assert spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens[:1])).main is None


def test_a_larger_step_leaves_out_the_smaller_writes(tmp_path, trigger_tokens):
    spike = planted.Plant(step_up_layers=(0, 2))
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "halves"))
    trace = spikesink.trace_windows(model, trigger_tokens)
    assert spikesink.find_lifecycle(trace, step=0.4).main.step_up == (2, 6)
    assert spikesink.find_lifecycle(trace, step=0.6).main.step_up == ()


@pytest.mark.parametrize("step", [0, 1, -0.1, 2])
def test_a_step_outside_0_and_1_is_refused(planted_model, trigger_tokens, step):
    trace = spikesink.trace_windows(planted_model, trigger_tokens[:2])
    with pytest.raises(ValueError, match="step must lie between 0 and 1"):
        spikesink.find_lifecycle(trace, step)


def test_controls_are_measured_on_tokens_and_channels_that_do_not_spike(life):
    ordinary = lifecycle.ordinary_rows(life)
    assert len(ordinary) > 0
    assert 1 not in ordinary.token.tolist()
    controls = set(life.trace.channels[life.trace.ordinary].tolist())
    assert controls.isdisjoint(life.main.channels)
    assert lifecycle.step_up(life).control["share_written_ordinary_tokens"] == pytest.approx(0, abs=1e-3)


def test_default_model_has_the_cycle_that_was_measured_before(default_model):
    """The blocks and channel that an independent run on other text found (they are the model's, not the text's)."""
    tokens = spikesink.windows(default_model, "pydoc", 3, 128)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    assert life.main.step_up == (24,)
    assert life.main.step_down == (58, 60)
    assert life.main.channel == 507
    assert life.main.value == pytest.approx(22_500, rel=0.1)


def test_evidence_is_finite(life, planted_model):
    for measure in (lifecycle.step_up, lifecycle.plateau, lifecycle.step_down, lifecycle.few_channels):
        evidence = measure(life)
        assert isinstance(evidence, Evidence)
        numbers = [v for values in (evidence.measured, evidence.control) for v in values.values()]
        assert all(torch.tensor(v, dtype=torch.float64).isfinite().all() for v in numbers)
