"""The chain broken on a planted model, whose spike and step blocks are known; rules' edges are in test_claims."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

import spikesink
from spikesink import patching
from spikesink.chain.lifecycle import find_spikes, is_spike
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.ledger.claims import judge
from spikesink.ledger.evidence.cuts import NO_CHANGE
from spikesink.patching import behaviour, cuts
from spikesink.patching.means import spike_means
from spikesink.patching.outcome import CLEAN
from tests.test_patching import seen

CHANNELS = [9, 30]
WRITE, STREAM, KEYS = "blocks.1.mlp.hook_out", "blocks.2.hook_in", "blocks.3.attn.k.hook_out"
READ, PATTERN, READOUT = "blocks.3.ln1.hook_normalized", "blocks.3.attn.hook_pattern", "ln_final.hook_normalized"
PASSING = (WRITE, "blocks.2.mlp.hook_out", "blocks.4.mlp.hook_out", STREAM, "blocks.3.hook_in", KEYS, READ, PATTERN)


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="module")
def broken(planted_model, life):
    """The trigger stands in windows 1 and 5 at position 0, in 3 at 47, in 2 at 20, in 4 at 5 and 30."""
    (held_out, out), (judged, where) = cuts.split_windows(life, 40)
    return cuts.break_chain(planted_model, judged, spike_means(planted_model, held_out, life, out), where)


@pytest.fixture(scope="module")
def passing(broken, planted_model):
    """What passes some hooks in the clean run and under every cut."""
    made = {CLEAN: (), **cuts.aim_cuts(broken.means, broken.targets)}
    names = (*PASSING, READOUT)
    return {name: seen(planted_model, broken.tokens, names, *cut, rows=range(3))[0] for name, cut in made.items()}


def test_spikes_of_any_prompt_are_found_by_the_rule_that_found_the_cycle(planted_model, trigger_tokens, life):
    assert torch.equal(find_spikes(planted_model, trigger_tokens, life), is_spike(life, life.main))
    prompts = trigger_tokens[:2, 10:20].clone()
    prompts[0, 7] = trigger_tokens[1, 0]
    assert find_spikes(planted_model, prompts, life).nonzero().tolist() == [[0, 7]]


def test_means_are_of_other_windows(broken, planted_model, trigger_tokens, life):
    means, where = broken.means, is_spike(life, life.main)[1::2, :40]
    keys, values = ([f"blocks.{i}.attn.{x}.hook_out" for i in range(6)] for x in "kv")
    reads = [f"blocks.{i}.{norm}.hook_normalized" for i in (2, 3, 4) for norm in ("ln1", "ln2")]
    clean = seen(planted_model, trigger_tokens[1::2, :40], [STREAM, READOUT, *keys, *values, *reads])[0]
    spike, other = ({name: x[group].mean(0) for name, x in clean.items()} for group in (where, ~where))
    assert (means.point, means.reading) == (4, (5, 6, 7, 8, 9, 10))
    for mean, group, names in (
        (means.stream[None], spike, [STREAM]),
        (means.readout[None], spike, [READOUT]),
        (means.keys, spike, keys),
        (means.values, spike, values),
        (means.other_keys, other, keys),
        (means.reads, spike, reads),
        (means.other_reads, other, reads),
    ):
        torch.testing.assert_close(mean, torch.stack([group[name] for name in names]), rtol=1e-4, atol=1e-4)


def test_other_targets_are_as_many_in_each_window_and_no_spikes(broken):
    targets = broken.targets
    assert targets.spike.sum(1).tolist() == targets.other.sum(1).tolist() == [0, 1, 2]  # windows 0, 2 and 4
    assert not (targets.spike & targets.other).any()
    assert not targets.other[:, 20:].any()


@pytest.mark.parametrize(
    ("cut", "group", "hook", "channels"),
    [
        ("skipped", "spike", WRITE, None),
        ("skipped_elsewhere", "other", WRITE, None),
        ("skipped_others", "spike", "blocks.2.mlp.hook_out", None),
        ("zeroed", "spike", STREAM, CHANNELS),
        ("rest_zeroed", "spike", STREAM, [c for c in range(64) if c not in CHANNELS]),
        ("other_position", "other", STREAM, CHANNELS),
        ("skipped_and_zeroed", "spike", WRITE, None),
        ("skipped_and_zeroed", "spike", STREAM, CHANNELS),
        ("decoupled", "spike", "blocks.4.mlp.hook_out", None),
        ("decoupled", "spike", "blocks.3.hook_in", CHANNELS),
    ],
)
def test_what_a_cut_zeroes_is_zero(cut, group, hook, channels, broken, passing):
    x, clean = passing[cut][hook][getattr(broken.targets, group)], passing[CLEAN][hook]
    assert float(x[..., channels or range(64)].abs().max()) == 0
    assert float(clean.abs().max()) > 0


def test_cuts_leave_alone_what_they_do_not_name(broken, passing):
    spike, clean = broken.targets.spike, passing[CLEAN]
    assert set(passing) == {CLEAN, *cuts.CUTS} == set(broken.outcomes)
    assert torch.equal(passing["skipped_elsewhere"][WRITE][spike], clean[WRITE][spike])
    assert torch.equal(passing["skipped_others"][WRITE], clean[WRITE])
    assert torch.equal(passing["rest_zeroed"][STREAM][spike][:, CHANNELS], clean[STREAM][spike][:, CHANNELS])
    torch.testing.assert_close(passing["zeroed"][STREAM][~spike], clean[STREAM][~spike])


def test_spikes_are_set_to_means_turned_and_compared_with_other_channels(broken, passing):
    spike, means = broken.targets.spike, broken.means
    stream = {name: changed[STREAM][spike] for name, changed in passing.items()}
    torch.testing.assert_close(stream["mean"][:, CHANNELS], means.stream[CHANNELS].expand(3, -1))
    torch.testing.assert_close(stream["whole"], means.stream.expand(3, -1))
    turned = stream["another_way"] - stream["zeroed"]
    torch.testing.assert_close(turned.norm(dim=-1), means.stream[CHANNELS].norm().expand(3), rtol=1e-4, atol=0)
    assert float(functional.cosine_similarity(turned[0], stream[CLEAN][0], dim=0).abs()) < 0.5
    gone = {name: set((stream[name] == 0).all(0).nonzero()[:, 0].tolist()) for name in cuts.CUTS}
    assert gone["strongest_channels"] == set(means.ordinary_channels[:2])
    assert len(gone["random_channels"]) == 2
    assert not gone["random_channels"] & set(CHANNELS)


def test_reads_are_one_vector_as_long_as_any(broken, passing):
    read = {name: changed[READ][broken.targets.spike] for name, changed in passing.items()}
    for name, mean in (("constant_read", broken.means.reads), ("others_read", broken.means.other_reads)):
        torch.testing.assert_close(read[name].norm(dim=-1), torch.full((3,), 8.0))
        assert float(functional.cosine_similarity(read[name][0], mean.mean(0), dim=0)) > 0.99999
    assert torch.equal(read["others_read_attention"], read["others_read"])
    assert float((read["others_read_ffn"] - read["others_read"]).abs().max()) > 0.1


def test_keys_are_turned_made_ordinary_held_and_masked(broken, passing):
    (spike, other), means = (broken.targets.spike, broken.targets.other), broken.means
    keys = {name: changed[KEYS][spike] for name, changed in passing.items()}
    torch.testing.assert_close(keys["ordinary_key"], means.other_keys[3].expand(3, -1, -1))
    torch.testing.assert_close(keys["decoupled"], means.keys[3].expand(3, -1, -1))
    length = means.keys[3].norm(dim=-1).expand(3, -1)
    torch.testing.assert_close(keys["turned_key"].norm(dim=-1), length, rtol=1e-4, atol=0)
    torch.testing.assert_close(passing["turned_key_elsewhere"][KEYS][other], keys["turned_key"])
    for window, position in spike.nonzero().tolist():
        at = (window, slice(None), slice(position, None), position)
        assert float(passing["masked"][PATTERN][at].max()) == 0 < float(passing["masked_elsewhere"][PATTERN][at].max())
    held, open_ = passing["decoupled"][READOUT], passing["decoupled_open"][READOUT]
    torch.testing.assert_close(held[spike], means.readout.expand(3, -1))
    assert float((open_[spike] - means.readout).abs().max()) > 0.1
    torch.testing.assert_close(open_[~spike], held[~spike])


@pytest.fixture(scope="module")
def sinking(broken):
    """With sinks, which the planted model has none of, and with a spike whose loss costs something; both by hand."""
    skipped, masked = torch.zeros(2, 3, 6, 4)  # window, layer, head
    skipped[0, 0, 0], masked[:, :2], half = 0.9, 0.4, torch.full((3, 6, 4), 0.5)
    scores = {"skipped": skipped, "masked": masked}
    outcomes = {name: replace(outcome, score=scores.get(name, half)) for name, outcome in broken.outcomes.items()}
    for name in ("zeroed", "another_way"):
        outcomes[name] = replace(outcomes[name], loss=outcomes[name].loss + 1)
    for name in ("mean", "decoupled"):
        outcomes[name] = replace(outcomes[name], divergence=outcomes[name].divergence + 0.01)
    return replace(broken, outcomes=outcomes)


# By claim: what its keys call a cut, where that is not the cut's own name.
PERPLEXITIES = {
    "ab1_zeroing_breaks": {},
    "ab2_mean_does_not": {"whole_vector": "whole", "random_direction": "another_way"},
    "ab3_step_up_makes_the_sink": {"other_blocks": "skipped_others", "other_tokens": "skipped_elsewhere"},
    "ab4_spike_removed": {"own_prediction_open": "decoupled_open"},
    "ab5_sink_removed": {"unsunk": "masked", "other_tokens_masked": "masked_elsewhere"},
    "ab6_wrong_places": {},
}


@pytest.mark.parametrize("claim", PERPLEXITIES)
def test_perplexities_of_a_claim_are_those_of_the_cuts_it_names(claim, sinking):
    result = getattr(evidence, claim)(sinking)
    values = {key.removeprefix("perplexity_"): x for key, x in (result.measured | result.control).items()}
    perplexities = {PERPLEXITIES[claim].get(name, name): x for name, x in values.items()}
    names = perplexities.keys() & sinking.outcomes.keys()
    assert names > {CLEAN, *PERPLEXITIES[claim].values()}
    for name in names:
        assert perplexities[name] == sinking.outcomes[name].perplexity


def test_a_planted_spike_can_be_taken_out_with_its_keys_and_values_held(broken, sinking):
    """Nobody but the step-down block reads the planted channels for itself, so all of its use is in keys and values."""
    apart, zeroed = broken.outcomes["decoupled"], broken.outcomes["zeroed"]
    others = ~broken.targets.spike[:, :-1]
    assert float(broken.clean.largest.max()) > 900
    assert float(apart.largest.max()) < 50
    assert float(apart.divergence[others].mean()) < 0.01 * float(zeroed.divergence[others].mean())
    result = evidence.ab4_spike_removed(sinking)
    assert judge("AB4", result, "08").verdict == "holds"
    elsewhere = result.measured["perplexity_clean_elsewhere"]
    assert result.measured["perplexity_decoupled_elsewhere"] == pytest.approx(elsewhere, rel=1e-4)
    wrong = evidence.ab6_wrong_places(sinking).measured["perplexity_clean_elsewhere"]
    assert wrong == pytest.approx(float(broken.clean.loss[~broken.targets.other[:, :-1]].mean().exp()))


def test_evidence_of_sinks_is_what_the_outcomes_say(broken, sinking):
    step = evidence.ab3_step_up_makes_the_sink(sinking)
    assert step.measured["step_up_blocks"] == [4]
    assert (step.measured["sink_ratio_clean"], step.control["sink_ratio_other_blocks"]) == (1, 1)
    assert step.measured["sink_ratio_skipped"] == pytest.approx(1 / 72)
    keys = broken.outcomes["skipped"].attention[2:5, 1:20].mean(0)
    assert step.measured["most_attended_other_key_skipped"] == pytest.approx(float(keys.max()))
    assert 950 < step.measured["largest_at_spike_tokens_clean"] < 1050
    assert step.measured["largest_at_spike_tokens_skipped"] < 50
    unsunk = evidence.ab5_sink_removed(sinking)
    assert unsunk.measured["sink_ratio_unsunk"] == pytest.approx(1 / 3)
    assert unsunk.measured["sink_ratio_unsunk_on_the_plateau"] == 0
    assert unsunk.measured["sink_ratio_clean_on_the_plateau"] == 1
    largest = broken.outcomes["masked_everywhere"].largest[~broken.targets.spike].max()
    assert unsunk.measured["largest_elsewhere_masked_everywhere"] == float(largest)


def test_what_could_not_fail_is_not_judged(broken, sinking):
    """Without sinks, or where the trigger's mean is what stands there, or where a dead spike costs nothing."""
    for of_sinks in (evidence.ab3_step_up_makes_the_sink, evidence.ab4_spike_removed, evidence.ab5_sink_removed):
        assert of_sinks(broken) == NotApplicable(cuts.NO_SINK)
    outcomes = sinking.outcomes | dict.fromkeys(("mean", "whole", "decoupled"), sinking.clean)
    the_same = replace(sinking, outcomes=outcomes)
    for of_means in (evidence.ab2_mean_does_not, evidence.ab4_spike_removed):
        assert of_means(the_same) == NotApplicable(NO_CHANGE)
    harmless = replace(sinking, outcomes=sinking.outcomes | dict.fromkeys(("zeroed", "another_way"), sinking.clean))
    for of_harm in (evidence.ab2_mean_does_not, evidence.ab6_wrong_places):
        assert isinstance(of_harm(harmless), NotApplicable)


def test_doses_do_not_run_anew_what_is_known(broken, planted_model, monkeypatch):
    plain, asked = cuts.compare, []
    monkeypatch.setattr(cuts, "compare", lambda m, tokens, those: asked.extend(those) or plain(m, tokens, those))
    doses = cuts.dose_spike(planted_model, broken, (0, 0.5, 1, 3))
    assert asked == [0.5, 3, "control"]
    assert doses.factors == (0, 0.5, 1, 3)
    assert (doses.outcomes[0], doses.outcomes[2]) == (broken.outcomes["zeroed"], broken.clean)
    spike = broken.targets.spike
    sizes = [float(outcome.largest[spike].quantile(0.5)) for outcome in doses.outcomes]
    assert sizes[1:] == pytest.approx([500, 1000, 3000], rel=0.05)
    result = evidence.ab7_dose_response(doses)
    assert result.measured["perplexities"] == [outcome.perplexity for outcome in doses.outcomes]
    elsewhere = float(doses.outcomes[0].loss[~spike[:, :-1]].mean().exp())
    assert result.measured["perplexities_elsewhere"][0] == pytest.approx(elsewhere)
    assert set(result.control) == {"perplexity_random_channels_0", "perplexity_random_channels_3"}


def test_the_map_finds_the_block_that_makes_the_spike(broken, planted_model):
    mapped = cuts.map_blocks(planted_model, broken.tokens, broken.means, broken.targets.spike)
    left = mapped.spike()
    assert left.argmin() + 1 == patching.mlp(1)
    assert float(left[3]) < 0.05
    assert left[4:].tolist() == pytest.approx([1] * 8, abs=0.02)
    cut = patching.skip(patching.mlp(1), broken.targets.spike)
    skipped = patching.evaluate(planted_model, broken.tokens, cut)
    assert mapped.outcomes[3].perplexity == pytest.approx(skipped.perplexity)


def test_decouple_and_unsink_find_the_spike_tokens_of_a_prompt(planted_model, trigger_tokens, life):
    prompt, largest = trigger_tokens[2], []
    made = patching.decouple(planted_model, prompt, life)
    assert all(cut.positions.same == (20,) for cut in made)
    assert float(patching.evaluate(planted_model, prompt, *made).largest.max()) < 50
    assert len(patching.decouple(planted_model, prompt, life, hold_readout=False)) == len(made) - 1
    (mask,) = patching.unsink(planted_model, prompt, life)
    assert (mask.positions.same, mask.site.places) == ((20,), (2, 3, 4))
    # Generation goes on without the spike.
    watch = [("blocks.3.hook_in", lambda value, hook: largest.append(float(value.abs().max())))]
    with patching.patched(planted_model, *made), planted_model.hooks(fwd_hooks=watch):
        planted_model.generate(prompt[None, :30], max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(largest) == 5
    assert max(largest) < 50
    with pytest.raises(ValueError, match="none of these tokens spikes"):
        patching.decouple(planted_model, trigger_tokens[0], life)
    with pytest.raises(ValueError, match="no token of the windows that means are taken of spikes"):
        patching.decouple(planted_model, prompt, life, held_out=trigger_tokens[:1])


def test_where_nothing_spikes_there_is_nothing_to_cut(random_model, planted_model, trigger_tokens, broken):
    tokens = spikesink.windows(random_model, "house", 4, 24)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    with pytest.raises(ValueError, match="no token has an entry above 100 medians"):
        patching.decouple(random_model, tokens[0], life, held_out=tokens)
    with pytest.raises(ValueError, match="none of these tokens spikes"):
        patching.unsink(random_model, tokens[0], life)
    none = torch.zeros(2, 48, dtype=torch.bool)
    judged = cuts.break_chain(planted_model, trigger_tokens[:2], broken.means, none)
    assert judged == NotApplicable(cuts.NONE_TO_JUDGE)


def test_one_window_has_no_interval_and_can_be_recorded(planted_model, trigger_tokens, life, broken):
    where = is_spike(life, life.main)[2:3]
    one = cuts.break_chain(planted_model, trigger_tokens[2:3], broken.means, where)
    doses = cuts.dose_spike(planted_model, one, (0, 1, 2))
    zeroing, dose = evidence.ab1_zeroing_breaks(one), evidence.ab7_dose_response(doses)
    assert not {"interval_clean", "lows"} & {*zeroing.measured, *dose.measured}
    for claim, measured in (("AB1", zeroing), ("AB7", dose)):
        assert judge(claim, measured, "08").verdict in ("holds", "differs")


def test_a_repeated_prompt_is_the_same_tokens_twice(planted_model, trigger_tokens):
    prompts = behaviour.repeated(planted_model, trigger_tokens, 3, length=7)
    bos = int(planted_model.anatomy.prepends_bos)
    assert prompts.shape == (3, 14 + bos)
    assert torch.equal(prompts[:, bos : 7 + bos], prompts[:, 7 + bos :])


@pytest.mark.parametrize("model", ["planted_model", "default_model"])
def test_recall_asks_for_what_was_said_once(model, request):
    model = request.getfixturevalue(model)
    prompts, at = behaviour.recall_prompts(model, 3)
    assert len(prompts) == len(at) == 6
    for told, untold, place, other in zip(prompts[:3], prompts[3:], at[:3], at[3:], strict=True):
        text, without = (model.tokenizer.decode(p[: s.stop + 1]) for p, s in ((told, place), (untold, other)))
        answer = text.rsplit(" ", 1)[1]
        assert answer in behaviour.PLACES
        for prompt, where in ((told, place), (untold, other)):
            assert model.tokenizer.decode(prompt[where.start + 1 : where.stop + 1]).strip().endswith(answer)
        assert (text.count(f"is in the {answer}"), without.count(f"is in the {answer}")) == (2, 1)
        thing = text.rsplit("the ", 2)[1].removesuffix(" is in ").strip()
        assert 3 <= text.splitlines().index(f"The {thing} is in the {answer}.") < 6


def test_behaviour_is_measured_for_every_cut_that_can_be_made(broken, planted_model, life):
    names = ("masked", "decoupled")
    measured = behaviour.measure_behaviour(planted_model, life, broken, names, n=2, new_tokens=4)
    assert list(measured.by_position) == [CLEAN, *names]
    loss = broken.outcomes["masked"].loss
    torch.testing.assert_close(measured.by_position["masked"][1], loss[:, 8:16].mean())
    assert measured.same_greedy[CLEAN] == 1
    assert set(measured.recall) == {CLEAN}  # no trigger in those prompts, so there is nothing to cut


def test_copies_and_answers_are_read_at_their_own_predictions(monkeypatch, broken, planted_model, life):
    """On a stand-in whose loss at each position is the position's number."""

    def numbered(model, prompts, *_):
        n, length = prompts.shape
        return {CLEAN: SimpleNamespace(loss=torch.arange(length - 1.0).expand(n, -1))}

    monkeypatch.setattr(behaviour, "compare_on", numbered)
    measured = behaviour.measure_behaviour(planted_model, life, broken, (), n=2, new_tokens=1)
    bos = int(planted_model.anatomy.prepends_bos)
    # The second copy begins at token 40 + bos; its first token cannot be known, the others are predicted from there on.
    assert measured.second_copy[CLEAN] == pytest.approx((40 + bos + 78 + bos) / 2)
    assert measured.first_copy[CLEAN] == pytest.approx((1 + 38 + bos) / 2)
    middles = [(place.start + place.stop - 1) / 2 for place in behaviour.recall_prompts(planted_model, 2)[1]]
    assert measured.recall[CLEAN] == pytest.approx(sum(middles[:2]) / 2)
    assert measured.no_answer[CLEAN] == pytest.approx(sum(middles[2:]) / 2)
