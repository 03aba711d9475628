"""The life cycle against ground truth: a spike planted by hand is found exactly, and where there is none, none is."""

import math

import pytest
import torch

import spikesink
from spikesink.chain import lifecycle
from spikesink.chain import trace as module
from spikesink.common import NotApplicable
from spikesink.lab.config import Config
from spikesink.lab.model import Decoder
from spikesink.ledger import evidence
from spikesink.ledger.claims import verdict
from spikesink.model.proof import Proof
from tests import planted


def test_claims_say_what_was_planted(planted_life, planted_model):
    places = lifecycle.is_spike(planted_life, planted_life.main).nonzero().tolist()
    assert places == [[1, 0], [2, 20], [3, 47], [4, 5], [4, 30], [5, 0]]
    up = evidence.lc1_step_up(planted_life)
    assert up.control["share_written_ordinary_tokens"] == pytest.approx(0, abs=1e-3)
    assert up.measured["largest_attention_share"] == 0  # no attention block writes to that channel
    assert evidence.lc2_plateau(planted_life).measured["plateau_write_ratio"] == 0
    tokens = evidence.lc7_few_tokens(planted_life, planted_model.tokenizer.decode).measured
    assert tokens["position0_share"] == pytest.approx(2 / 6)
    # Position 0 spikes in a third of the windows only, and the rule says so.
    assert verdict("LC7", tokens) == "differs"


def test_default_model_has_the_cycle_that_was_measured_before(default_model):
    """The blocks and channel that an independent run on other text found (they are the model's, not the text's)."""
    tokens = spikesink.windows(default_model, "pydoc", 3, 128)
    cycle = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens)).main
    assert (cycle.step_up, cycle.step_down, cycle.channel) == ((24,), (58, 60), 507)
    assert cycle.value == pytest.approx(22_500, rel=0.1)


@pytest.mark.parametrize(
    ("spike", "step_up", "step_down", "shape"),
    [
        (planted.Plant(step_up_layers=(0, 2), step_down_layers=(4, 5)), (2, 6), (10, 12), "step"),
        (planted.Plant(step_up_layers=(0, 1, 2, 3, 4), step_down_layers=()), (2, 4, 6, 8, 10), (), "ramp"),
    ],
    ids=["two blocks up and two down", "a ramp"],
)
def test_a_spike_is_found_with_all_its_blocks(spike, step_up, step_down, shape, tmp_path, trigger_tokens):
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "planted"))
    trace = spikesink.trace_windows(model, trigger_tokens)
    life = spikesink.find_lifecycle(trace)
    assert (life.main.step_up, life.main.step_down, life.main.shape) == (step_up, step_down, shape)
    assert (verdict("LC1", evidence.lc1_step_up(life).measured) == "differs") == (shape == "ramp")
    if len(step_up) == 2:  # each writes half: 0.6 is more than either
        assert [spikesink.find_lifecycle(trace, step=step).main.step_up for step in (0.4, 0.6)] == [(2, 6), ()]


def test_windows_without_the_trigger_have_no_cycle(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens[:1]))
    assert life.cycles == ()
    assert lifecycle.writes_table(life) == evidence.lc1_step_up(life) == NotApplicable(life.reason)
    assert not lifecycle.find_spikes(planted_model, trigger_tokens, life).any()


def test_the_tables_say_what_the_cycle_holds(planted_life):
    writes, (line,) = lifecycle.writes_table(planted_life), lifecycle.cycles_table(planted_life).to_dict("records")
    assert writes["step"].to_dict() == {"L1 MLP (block 4)": "up", "L4 MLP (block 10)": "down"}
    assert writes["share of the plateau"].tolist() == pytest.approx([1, -planted.Plant.cancelled], abs=0.05)
    assert (line["step-up"], line["tokens"], line["at position 0"]) == ((4,), 6, 2)


# Hand-made traces: every number below can be worked out on paper.
N_BLOCKS, SECOND = 12, 1


def handmade(spikes, drawn, medians=None, n_windows=2, length=20, reasons=None):
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
    means = (medians.mean(0), medians, zeros, zeros[1:], zeros)
    return module.Trace(ANATOMY, text, channels, 2, n, rows, *means, closure=0.0, proof=Proof({}, reasons or {}))


ANATOMY = Decoder(Config(n_layers=6, d_model=8, heads=(8, 1), bos=False)).anatomy
ORDINARY = [(0, 5, {4: 0.1}), (0, 9, {4: -0.1}), (1, 5, {4: 0.1}), (1, 9, {4: 0.1})]


def by_hand(writes, drawn=ORDINARY, **more):
    """The life cycle of a hand-made trace whose windows begin with tokens that get these writes."""
    return spikesink.find_lifecycle(handmade([(w, 0, writes) for w in (0, 1)], drawn, **more))


LC1, LC2, LC3 = evidence.lc1_step_up, evidence.lc2_plateau, evidence.lc3_step_down
SHARED = {"share_written": 0.7, "largest_attention_share": 0.2, "blocks_needed": 3}
# What each block writes to the spike tokens, and what follows. Blocks 3 and 9 are attention, 8 and 12 late.
WRITTEN = [
    (LC1, {2: 300, 3: 200, 4: 400, 8: 100}, SHARED),
    (LC1, {2: 1500, 3: -600}, {"largest_attention_share": 0.4}),
    (LC1, {2: 300, 4: 300, 6: 240, 8: 160}, {"share_written": 0.84}),
    (LC1, {1: 200, 2: 200, 3: 200, 4: 200, 6: 200}, {"share_written": 0.6}),
    # Blocks 3 to 9 write 0, 50, 50, 50, 0, 0, 0 in size: the median is 0; with one more it is 50 of 950.
    (LC2, {2: 1000, 4: -50, 5: 50, 6: -50, 10: -900}, {"first_point": 2, "last_point": 9, "plateau_write_ratio": 0}),
    (LC2, {2: 1000, 3: -50, 4: -50, 5: 50, 6: -50, 10: -900}, {"plateau_write_ratio": 50 / 950}),
    (LC3, {2: 1000, 6: -100, 9: -200, 12: -300}, {"share_cancelled": 0.3, "left_at_the_end": 0.4}),
]


@pytest.mark.parametrize(("measure", "writes", "expected"), WRITTEN)
def test_what_blocks_write_counts_by_the_rules(measure, writes, expected):
    measured = measure(by_hand(writes)).measured
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


def test_verdict_and_control_by_hand():
    assert verdict("LC1", LC1(by_hand({2: 1500, 3: -600})).measured) == "differs"
    life = by_hand({2: 1000, 6: -100, 9: -200, 12: -300}, drawn=[(w, p, {12: -10.0}) for w, p, _ in ORDINARY])
    assert (life.main.step_up, life.main.step_down) == ((2,), (6, 9, 12))
    assert LC3(life).control["share_cancelled_ordinary_tokens"] == pytest.approx(0.01)


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
    life = by_hand({2: 1000.0}, medians=medians)
    assert life.trace.rows.window[life.main.is_spike].tolist() == [0]


def test_a_channel_that_is_large_on_every_token_does_not_make_them_spike_tokens():
    """Ordinary tokens hold 200 medians, more than a tenth of the spike, but are nearer to each other than to it."""
    drawn = [(w, p, {1: 200.0}) for w, p, _ in ORDINARY]
    life = by_hand({2: 1000.0}, drawn=drawn)
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
    assert set(evidence.lc7_few_tokens(by_hand({2: 1000.0}), str).control) == {"other_positions_share"}


def test_one_outlier_does_not_set_the_size():
    """One window's spike is thirty times the others': the size is the median window's, so all of them are found."""
    spikes = [(w, 0, {2: 1000.0}) for w in range(4)] + [(4, 0, {2: 30_000.0})]
    life = spikesink.find_lifecycle(handmade(spikes, [(w, 5, {4: 0.1}) for w in range(5)], n_windows=5))
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
    life = by_hand({2: 1000.0})
    life.trace.rows.drawn[0] = True
    assert lifecycle.ordinary_rows(life).token.tolist() == [8] * 4


def test_when_every_token_spikes_there_is_no_control_and_the_claims_say_so():
    life = spikesink.find_lifecycle(handmade([(w, p, {2: 1000.0}) for w in (0, 1) for p in (0, 1)], []))
    for measure in (evidence.lc4_few_channels, evidence.lc5_same_channels):
        assert isinstance(measure(life), NotApplicable)
    for measure in (evidence.lc1_step_up, evidence.lc3_step_down, evidence.lc6_fixed_ratios):
        control = measure(life).control.values()  # the ordinary channels are left to compare with
        assert min(map(math.isfinite, control))
