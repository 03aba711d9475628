"""The life cycle against ground truth: a spike planted by hand is found exactly, and where there is none, none is."""

import math

import pytest
import torch

import spikesink
from spikesink.chain import lifecycle
from spikesink.chain import trace as module
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.ledger.claims import Evidence, verdict
from spikesink.model.anatomy import Anatomy
from tests import planted


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


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
    up, down = evidence.lc1_step_up(life), evidence.lc3_step_down(life)
    assert up.measured["share_written"] == pytest.approx(1, abs=0.01)
    assert up.measured["largest_attention_share"] == 0  # no attention block writes to that channel
    assert down.measured["share_cancelled"] == pytest.approx(planted.Plant.cancelled, abs=0.05)
    assert down.measured["left_at_the_end"] == pytest.approx(1 - planted.Plant.cancelled, abs=0.05)
    assert evidence.lc2_plateau(life).measured["plateau_write_ratio"] == 0
    assert evidence.lc6_fixed_ratios(life).measured["ratio"] == pytest.approx(planted.Plant.side_ratio, abs=1e-3)
    tokens = evidence.lc7_few_tokens(life, planted_model.tokenizer.decode).measured
    assert tokens["n_spike_tokens"] == 6
    assert tokens["position0_share"] == pytest.approx(2 / 6)
    assert tokens["spike_tokens"] == [planted.TRIGGER]
    # Position 0 spikes in a third of the windows only, and the rule says so.
    assert verdict("LC7", tokens) == "differs"
    assert verdict("LC1", up.measured) == "holds"
    assert verdict("LC3", down.measured) == "holds"


def test_default_model_has_the_cycle_that_was_measured_before(default_model):
    """The blocks and channel that an independent run on other text found (they are the model's, not the text's)."""
    tokens = spikesink.windows(default_model, "pydoc", 3, 128)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    assert life.main.step_up == (24,)
    assert life.main.step_down == (58, 60)
    assert life.main.channel == 507
    assert life.main.value == pytest.approx(22_500, rel=0.1)


@pytest.mark.parametrize(
    ("spike", "step_up", "step_down", "shape"),
    [
        (planted.Plant(size=-1000.0, channel=20, side_channel=40), (4,), (10,), "step"),
        (planted.Plant(step_up_layers=(0, 2), step_down_layers=(4, 5)), (2, 6), (10, 12), "step"),
        (planted.Plant(step_up_layers=(0, 1, 2, 3, 4), step_down_layers=()), (2, 4, 6, 8, 10), (), "ramp"),
    ],
    ids=["negative", "two blocks up and two down", "a ramp"],
)
def test_a_spike_is_found_with_its_sign_and_all_its_blocks(spike, step_up, step_down, shape, tmp_path, trigger_tokens):
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "planted"))
    trace = spikesink.trace_windows(model, trigger_tokens)
    life = spikesink.find_lifecycle(trace)
    cycle = life.main
    assert (cycle.channel, cycle.step_up, cycle.step_down, cycle.shape) == (spike.channel, step_up, step_down, shape)
    assert cycle.value == pytest.approx(spike.size, rel=0.05)
    assert (verdict("LC1", evidence.lc1_step_up(life).measured) == "differs") == (shape == "ramp")
    if len(step_up) == 2:  # each writes half: 0.6 is more than either
        assert [spikesink.find_lifecycle(trace, step=step).main.step_up for step in (0.4, 0.6)] == [(2, 6), ()]


@pytest.mark.parametrize("model", ["random_model", "planted_model"])
def test_where_nothing_spikes_every_claim_says_so(model, trigger_tokens, request):
    model = request.getfixturevalue(model)
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, trigger_tokens[:1]))  # without the trigger
    assert (life.main, life.cycles) == (None, ())
    claims = [evidence.lc1_step_up, evidence.lc2_plateau, evidence.lc3_step_down, evidence.lc4_few_channels]
    for claim in (*claims, evidence.lc5_same_channels, evidence.lc6_fixed_ratios, lifecycle.writes_table):
        assert claim(life) == NotApplicable(life.reason)
    assert evidence.lc7_few_tokens(life, model.tokenizer.decode) == NotApplicable(life.reason)
    assert not lifecycle.find_spikes(model, trigger_tokens, life).any()


@pytest.mark.parametrize("step", [0, 1, -0.1, 2])
def test_a_step_outside_0_and_1_is_refused(life, step):
    with pytest.raises(ValueError, match="between 0 and 1"):
        spikesink.find_lifecycle(life.trace, step)


def test_controls_are_measured_on_tokens_and_channels_that_do_not_spike(life):
    ordinary = lifecycle.ordinary_rows(life)
    assert len(ordinary) > 0
    assert 1 not in ordinary.token.tolist()
    assert set(life.trace.channels[life.trace.ordinary].tolist()).isdisjoint(life.main.channels)
    assert evidence.lc1_step_up(life).control["share_written_ordinary_tokens"] == pytest.approx(0, abs=1e-3)


def test_the_tables_say_what_the_cycle_holds(life):
    writes, (line,) = lifecycle.writes_table(life), lifecycle.cycles_table(life).to_dict("records")
    assert writes["step"].to_dict() == {"L1 MLP (block 4)": "up", "L4 MLP (block 10)": "down"}
    assert writes["share of the plateau"].tolist() == pytest.approx([1, -planted.Plant.cancelled], abs=0.05)
    assert (line["step-up"], line["tokens"], line["at position 0"]) == (life.main.step_up, 6, 2)


# Hand-made traces: every number below can be worked out on paper.
N_BLOCKS, SECOND = 12, 1


def handmade(spikes, drawn, medians=None, n_windows=2, length=20):
    """A trace of tokens given as (window, position, {block: write into the first channel, ...}).

    The second channel gets half of every write and each of four ordinary channels a hundredth; all start from 0, the
    median is 1 at every point, and tokens that are drawn hold 0.5 in every channel and get writes of 0.1.
    """
    base = torch.tensor([1.0, 0.5, 0.01, -0.01, 0.01, -0.01])
    tokens = [(w, p, writes, 0.0, base, False) for w, p, writes in spikes]
    tokens += [(w, p, writes, 0.5, torch.ones(6), True) for w, p, writes in drawn]
    writes = torch.zeros(len(tokens), N_BLOCKS, 6)
    stream = torch.zeros(len(tokens), N_BLOCKS + 1, 6)
    for i, (_, _, of_block, start, channels, _) in enumerate(tokens):
        for block, write in of_block.items():
            writes[i, block - 1] = write * channels
        stream[i] = start + torch.cat([torch.zeros(1, 6), writes[i].cumsum(0)])
    medians = torch.ones(n_windows, N_BLOCKS + 1) if medians is None else medians
    top = stream.abs().topk(3, dim=-1)
    rows = module.Rows(
        window=torch.tensor([t[0] for t in tokens]),
        position=torch.tensor([t[1] for t in tokens]),
        token=torch.tensor([7 + t[5] for t in tokens]),
        drawn=torch.tensor([t[5] for t in tokens]),
        candidate=(stream.abs() > 100 * medians[[t[0] for t in tokens]][..., None]).any(-1).any(-1),
        largest=stream.abs().amax((1, 2)),
        stream=stream,
        writes=writes,
        top_channels=top.indices,
        top_values=top.values,
    )
    zeros = torch.zeros(N_BLOCKS + 1, 3)
    channels = torch.tensor([10, 11, 12, 13, 14, 15])
    n = int(rows.candidate.sum())
    text = torch.full((n_windows, length), 6)
    text[rows.window, rows.position] = rows.token
    return module.Trace(ANATOMY, text, channels, 2, n, rows, medians.mean(0), medians, zeros, zeros[1:], zeros, 0.0)


ANATOMY = Anatomy(
    family="hand",
    n_layers=6,
    n_heads=1,
    n_kv_heads=1,
    d_model=576,
    d_head=8,
    d_mlp=8,
    d_vocab=100,
    context=64,
    norm="RMS",
    norm_placement="pre",
    norm_scale_offset=0.0,
    norm_eps=1e-6,
    gate_activation="silu",
    qk_norm=False,
    parallel=False,
    n_experts=0,
    residual_multiplier=1.0,
    attention_norm="ln1",
    ffn_norm="ln2",
    sight=(None,) * 6,
    softcap=None,
    query_scale=0.25,
    sees_rotation=True,
    prepends_bos=False,
    bos_token=None,
    layer_hooks=(),
    write_hooks=(),
    pattern_hooks=(),
)
ORDINARY = [(0, 5, {4: 0.1}), (0, 9, {4: -0.1}), (1, 5, {4: 0.1}), (1, 9, {4: 0.1})]


def test_step_up_is_the_sum_of_early_ffn_writes_and_no_other():
    """Blocks 2, 3 (attention), 4 and 8 (late) write 300, 200, 400 and 100: 70% of 1000 are early FFN writes."""
    spikes = [(w, 0, {2: 300.0, 3: 200.0, 4: 400.0, 8: 100.0}) for w in (0, 1)]
    measured = evidence.lc1_step_up(spikesink.find_lifecycle(handmade(spikes, ORDINARY))).measured
    assert measured["step_up_blocks"] == [2, 3, 4, 8]
    assert measured["share_written"] == pytest.approx(0.7)
    assert measured["largest_attention_share"] == pytest.approx(0.2)
    assert measured["blocks_needed"] == 3


def test_an_attention_block_that_takes_away_counts_as_well():
    spikes = [(w, 0, {2: 1500.0, 3: -600.0}) for w in (0, 1)]
    result = evidence.lc1_step_up(spikesink.find_lifecycle(handmade(spikes, ORDINARY)))
    assert result.measured["largest_attention_share"] == pytest.approx(0.4)
    assert verdict("LC1", result.measured) == "differs"


def test_at_most_three_blocks_count_as_having_written_the_spike():
    spikes = [(w, 0, {1: 0.0, 2: 300.0, 4: 300.0, 6: 240.0, 8: 160.0}) for w in (0, 1)]
    early = [(w, p, {2: 250.0, 4: 250.0, 6: 250.0}) for w, p, _ in spikes]
    many = [(w, p, {b: 200.0 for b in (1, 2, 3, 4, 6)}) for w, p, _ in spikes]
    shares = [
        evidence.lc1_step_up(spikesink.find_lifecycle(handmade(s, ORDINARY))).measured["share_written"]
        for s in (spikes, early, many)
    ]
    assert shares == pytest.approx([0.84, 1.0, 0.6])
    wide = handmade([(w, 0, {2: 200.0, 4: 190.0, 6: 180.0, 8: 170.0}) for w in (0, 1)], ORDINARY)
    assert evidence.lc1_step_up(spikesink.find_lifecycle(wide)).measured["share_written"] == pytest.approx(570 / 740)


def test_a_plateau_write_counts_whatever_its_sign():
    spikes = [(w, 0, {2: 1000.0, 4: -50.0, 5: 50.0, 6: -50.0, 10: -900.0}) for w in (0, 1)]
    measured = evidence.lc2_plateau(spikesink.find_lifecycle(handmade(spikes, ORDINARY))).measured
    assert (measured["first_point"], measured["last_point"]) == (2, 9)
    # Blocks 3 to 9 write 0, 50, 50, 50, 0, 0, 0 in size: the median is 0; with one more it is 50 of 950.
    assert measured["plateau_write_ratio"] == 0
    spikes = [(w, 0, {2: 1000.0, 3: -50.0, 4: -50.0, 5: 50.0, 6: -50.0, 10: -900.0}) for w in (0, 1)]
    measured = evidence.lc2_plateau(spikesink.find_lifecycle(handmade(spikes, ORDINARY))).measured
    assert measured["plateau_write_ratio"] == pytest.approx(50 / 950)


def test_only_late_ffn_blocks_count_as_cancelling():
    """Of what blocks 6 (early), 9 (attention) and 12 take back, 100, 200 and 300 of 1000, only 12's counts."""
    spikes = [(w, 0, {2: 1000.0, 6: -100.0, 9: -200.0, 12: -300.0}) for w in (0, 1)]
    life = spikesink.find_lifecycle(handmade(spikes, [(w, p, {12: -10.0}) for w, p, _ in ORDINARY]))
    result = evidence.lc3_step_down(life)
    assert result.measured["step_down_blocks"] == [6, 9, 12]
    assert result.measured["share_cancelled"] == pytest.approx(0.3)
    assert result.measured["left_at_the_end"] == pytest.approx(0.4)
    assert result.control["share_cancelled_ordinary_tokens"] == pytest.approx(0.01)


def test_ratios_and_jaccard_are_those_of_the_tokens():
    trace = handmade([(w, 0, {2: 1000.0 * (1 + w)}) for w in (0, 1)], ORDINARY)
    trace.rows.stream[1, :, SECOND] *= 3  # the ratio is 0.5 on one token and 1.5 on the other
    trace.rows.top_channels[0, :] = torch.tensor([10, 11, 12])
    trace.rows.top_channels[1, :] = torch.tensor([10, 11, 15])
    life = spikesink.find_lifecycle(trace)
    assert evidence.lc6_fixed_ratios(life).measured["ratio_cv"] == pytest.approx(0.5)
    assert evidence.lc5_same_channels(life).measured["jaccard"] == pytest.approx(0.5)


def test_each_window_is_held_against_its_own_median():
    """An entry of 1000 is a spike where the median is 1, and none where it is 50."""
    medians = torch.ones(2, N_BLOCKS + 1)
    medians[1] = 50.0
    life = spikesink.find_lifecycle(handmade([(w, 0, {2: 1000.0}) for w in (0, 1)], ORDINARY, medians))
    assert life.trace.rows.window[life.main.is_spike].tolist() == [0]


def test_a_channel_that_is_large_on_every_token_does_not_make_them_spike_tokens():
    """Ordinary tokens hold 200 medians, more than a tenth of the spike, but are nearer to each other than to it."""
    drawn = [(w, p, {1: 200.0}) for w, p, _ in ORDINARY]
    life = spikesink.find_lifecycle(handmade([(w, 0, {2: 1000.0}) for w in (0, 1)], drawn))
    assert life.main.is_spike.tolist() == [True, True, False, False, False, False]
    result = evidence.lc7_few_tokens(life, str)
    assert result.measured["n_spike_tokens"] == 2
    assert result.measured["share_above_100_medians"] == pytest.approx(6 / 40)


def test_the_same_tokens_later_in_the_windows_are_the_control_of_place():
    """The token of both first places occurs five times later and spikes in one of those: a fifth."""
    trace = handmade([(0, 0, {2: 1000.0}), (1, 0, {2: 1000.0}), (1, 7, {2: 1000.0})], ORDINARY)
    trace.tokens[0, [2, 3, 19]] = 7
    trace.tokens[1, 3] = 7
    result = evidence.lc7_few_tokens(spikesink.find_lifecycle(trace), str)
    assert result.measured["position0_share"] == 1
    assert result.control["n_same_tokens_elsewhere"] == 5
    assert result.control["same_tokens_elsewhere_share"] == pytest.approx(0.2)
    assert result.control["other_positions_share"] == pytest.approx(1 / 38)
    nowhere_else = handmade([(w, 0, {2: 1000.0}) for w in (0, 1)], ORDINARY)
    control = evidence.lc7_few_tokens(spikesink.find_lifecycle(nowhere_else), str).control
    assert set(control) == {"other_positions_share"}


def test_one_outlier_does_not_set_the_size():
    """One window's spike is thirty times the others': the size is the median window's, so all of them are found."""
    spikes = [(w, 0, {2: 1000.0}) for w in range(4)] + [(4, 0, {2: 30_000.0})]
    life = spikesink.find_lifecycle(handmade(spikes, [(w, 5, {4: 0.1}) for w in range(5)], n_windows=5, medians=None))
    assert life.main.is_spike.sum() == 5
    assert life.main.value == pytest.approx(1000)
    assert len(life.cycles) == 1


LARGE = [(w, 0, {4: 10_000.0, 8: -9_900.0}) for w in (0, 1)]


def later(stream, writes):
    """The second channel stays when the first falls."""
    writes[:, 7, SECOND], stream[:, 8:, SECOND] = 0, 5_000


def earlier(stream, writes):
    """The second channel rises before the first."""
    writes[:, 0, SECOND], stream[:, 1:4, SECOND] = 300, 300


def brief(stream, writes):
    """The second channel rises and falls before the first rises."""
    writes[:, 0, SECOND], writes[:, 2, SECOND] = 300, -290
    stream[:, 1:3, SECOND], stream[:, 3, SECOND] = 300, 10


@pytest.mark.parametrize("change", [later, earlier, brief])
def test_what_else_a_spikes_tokens_do_is_no_cycle_of_its_own(change):
    trace = handmade(LARGE, ORDINARY)
    change(trace.rows.stream[:2], trace.rows.writes[:2])
    (cycle,) = spikesink.find_lifecycle(trace).cycles
    assert (cycle.channel, cycle.step_up, int(cycle.is_spike.sum())) == (10, (4,), 2)


@pytest.mark.parametrize(("block", "step_ups"), [(4, [(4,)]), (3, [(4,), (3,)])])
def test_a_weak_cycle_is_one_of_its_own_unless_it_is_the_tail_of_another(block, step_ups):
    """Two tokens get a twentieth of the spike, too small to be its tokens: from the same block, or from another."""
    weak = [(w, 3, {block: 500.0, 8: -490.0}) for w in (0, 1)]
    life = spikesink.find_lifecycle(handmade(LARGE + weak, ORDINARY))
    assert life.main.is_spike.sum() == 2
    assert [cycle.step_up for cycle in life.cycles] == step_ups


def test_a_smaller_cycle_on_other_tokens_is_reported_too():
    trace = handmade(LARGE, [(w, p, {}) for w in (0, 1) for p in (5, 9)])
    trace.rows.stream[2:4, 3:7, SECOND] = 400.0
    trace.rows.writes[2:4, 2, SECOND], trace.rows.writes[2:4, 6, SECOND] = 400.0, -400.0
    cycles = spikesink.find_lifecycle(trace).cycles
    assert [c.channel for c in cycles] == [10, 11]
    assert (cycles[1].step_up, cycles[1].step_down, cycles[1].plateau) == ((3,), (7,), (3, 6))
    assert cycles[1].is_spike.nonzero()[:, 0].tolist() == [2, 3]


def test_spike_tokens_that_are_drawn_are_no_controls():
    trace = handmade([(w, 0, {2: 1000.0}) for w in (0, 1)], ORDINARY)
    trace.rows.drawn[0] = True
    life = spikesink.find_lifecycle(trace)
    assert len(lifecycle.ordinary_rows(life)) == 4
    assert 7 not in lifecycle.ordinary_rows(life).token.tolist()


def test_when_every_token_spikes_there_is_no_control_and_the_claims_say_so():
    life = spikesink.find_lifecycle(handmade([(w, p, {2: 1000.0}) for w in (0, 1) for p in (0, 1)], []))
    for measure in (evidence.lc4_few_channels, evidence.lc5_same_channels):
        assert isinstance(measure(life), NotApplicable)
    for measure in (evidence.lc1_step_up, evidence.lc3_step_down, evidence.lc6_fixed_ratios):
        result = measure(life)
        assert isinstance(result, Evidence)  # the ordinary channels are left to compare with
        assert all(math.isfinite(v) for v in result.control.values())
