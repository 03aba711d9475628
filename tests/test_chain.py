"""The chain broken on a planted model, whose spike and step blocks are known; rules' edges are in test_claims."""

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

import spikesink
from spikesink import patching, plots
from spikesink.chain.lifecycle import find_spikes, is_spike
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.ledger.claims import judge
from spikesink.ledger.evidence.cuts import NO_CHANGE
from spikesink.patching import behaviour
from spikesink.patching import cuts as chain
from spikesink.patching.means import spike_means
from spikesink.patching.outcome import CLEAN
from tests.test_patching import seen

CHANNELS = (9, 30)


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="module")
def parts(planted_model, trigger_tokens, life):
    """The trigger stands in windows 1 and 5 at position 0, in 3 at 47, in 2 at 20, in 4 at 5 and 30."""
    (held_out, out), (judged, where) = chain.split_windows(life, 40)
    known = spike_means(planted_model, held_out, life, out)
    return known, chain.break_chain(planted_model, judged, known, where)


def at(model, tokens, names, cuts, rows=None):
    return seen(model, tokens, names, *cuts, rows=rows)[0]


def test_spikes_of_any_prompt_are_found_by_the_rule_that_found_the_cycle(planted_model, trigger_tokens, life):
    assert torch.equal(find_spikes(planted_model, life, trigger_tokens), is_spike(life, life.main))
    trigger = int(trigger_tokens[1, 0])
    prompts = trigger_tokens[:2, 10:20].clone()
    prompts[0, 7] = trigger
    found = find_spikes(planted_model, life, prompts)
    assert found.nonzero().tolist() == [[0, 7]]


def test_spikes_of_the_default_model_are_found_again(default_model):
    tokens = spikesink.windows(default_model, "house", 3, 48)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    assert torch.equal(find_spikes(default_model, life, tokens), is_spike(life, life.main))


def test_constants_are_means_over_other_windows(parts, planted_model, trigger_tokens, life):
    known = parts[0]
    held_out = trigger_tokens[1::2, :40]
    where = is_spike(life, life.main)[1::2, :40]
    names = ["blocks.2.hook_in", *(f"blocks.{i}.attn.{x}.hook_out" for i in range(6) for x in "kv")]
    names += [f"blocks.{i}.{norm}.hook_normalized" for i in (2, 3, 4) for norm in ("ln1", "ln2")]
    found = at(planted_model, held_out, [*names, "ln_final.hook_normalized"], ())
    mean = {name: value[where].mean(0) for name, value in found.items()}
    others = {name: value[~where].mean(0) for name, value in found.items()}
    assert (known.point, known.reading) == (4, (5, 6, 7, 8, 9, 10))
    torch.testing.assert_close(known.stream, mean["blocks.2.hook_in"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(known.readout, mean["ln_final.hook_normalized"], rtol=1e-5, atol=1e-4)
    for i in range(6):
        torch.testing.assert_close(known.keys[i], mean[f"blocks.{i}.attn.k.hook_out"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(known.values[i], mean[f"blocks.{i}.attn.v.hook_out"], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(known.other_keys[i], others[f"blocks.{i}.attn.k.hook_out"], rtol=1e-4, atol=1e-4)
    for row, block in enumerate(known.reading):
        name = f"blocks.{(block - 1) // 2}.{'ln1' if block % 2 else 'ln2'}.hook_normalized"
        torch.testing.assert_close(known.reads[row], mean[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(known.other_reads[row], others[name], rtol=1e-4, atol=1e-4)


def test_other_targets_are_as_many_in_each_window_and_no_spikes(parts):
    targets = parts[1].targets
    assert targets.spike.sum(1).tolist() == [0, 1, 2]  # windows 0, 2 and 4
    assert targets.other.sum(1).tolist() == [0, 1, 2]
    assert not (targets.spike & targets.other).any()
    assert not targets.other[:, 20:].any()


def test_each_cut_changes_what_it_names_and_nothing_before_it(parts, planted_model):
    known, broken = parts
    spike, other = broken.targets.spike, broken.targets.other
    cuts = chain.aim_cuts(known, broken.targets)
    assert set(cuts) == set(chain.CUTS) == set(broken.outcomes) - {CLEAN}
    names = [
        "blocks.2.mlp.hook_out",
        "blocks.4.mlp.hook_out",
        "blocks.1.mlp.hook_out",
        "blocks.2.hook_in",
        "blocks.3.hook_in",
        "blocks.3.attn.k.hook_out",
    ]
    names += ["blocks.3.attn.hook_pattern", "blocks.3.ln1.hook_normalized", "ln_final.hook_normalized"]
    clean = at(planted_model, broken.tokens, names, ())
    changed = {name: at(planted_model, broken.tokens, names, cut, range(3)) for name, cut in cuts.items()}
    write, stream, keys = "blocks.1.mlp.hook_out", "blocks.2.hook_in", "blocks.3.attn.k.hook_out"
    assert float(changed["skipped"][write][spike].abs().max()) == 0
    assert float(changed["skipped_elsewhere"][write][other].abs().max()) == 0
    assert torch.equal(changed["skipped_elsewhere"][write][spike], clean[write][spike])
    assert float(changed["skipped_others"]["blocks.2.mlp.hook_out"][spike].abs().max()) == 0
    assert torch.equal(changed["skipped_others"][write], clean[write])
    assert float(changed["decoupled"]["blocks.4.mlp.hook_out"][spike].abs().max()) == 0
    both = changed["skipped_and_zeroed"]
    assert float(both[write][spike].abs().max()) == float(both[stream][spike][:, CHANNELS].abs().max()) == 0
    rest = [c for c in range(64) if c not in CHANNELS]
    assert float(changed["rest_zeroed"][stream][spike][:, rest].abs().max()) == 0
    assert torch.equal(changed["rest_zeroed"][stream][spike][:, CHANNELS], clean[stream][spike][:, CHANNELS])
    assert float(changed["zeroed"][stream][spike][:, CHANNELS].abs().max()) == 0
    torch.testing.assert_close(changed["zeroed"][stream][~spike], clean[stream][~spike])
    torch.testing.assert_close(changed["mean"][stream][spike][:, CHANNELS], known.stream[list(CHANNELS)].expand(3, -1))
    torch.testing.assert_close(changed["whole"][stream][spike], known.stream.expand(3, -1))
    size = known.stream[list(CHANNELS)].norm()
    turned = changed["another_way"][stream][spike] - changed["zeroed"][stream][spike]
    torch.testing.assert_close(turned.norm(dim=-1), size.expand(3), rtol=1e-4, atol=0)
    assert float(functional.cosine_similarity(turned[0], clean[stream][spike][0], dim=0).abs()) < 0.5
    for name in ("random_channels", "strongest_channels"):
        gone = (changed[name][stream][spike] == 0).all(0).nonzero()[:, 0].tolist()
        assert len(gone) == 2
        assert not set(gone) & set(CHANNELS)
    assert set((changed["strongest_channels"][stream][spike] == 0).all(0).nonzero()[:, 0].tolist()) == set(
        known.ordinary_channels[:2]
    )
    assert float(changed["other_position"][stream][other][:, CHANNELS].abs().max()) == 0
    reads = "blocks.3.ln1.hook_normalized"
    for name, group in (("constant_read", known.reads), ("others_read", known.other_reads)):
        got = changed[name][reads][spike]
        torch.testing.assert_close(got.norm(dim=-1), torch.full((3,), 8.0))
        assert float(functional.cosine_similarity(got[0], group.mean(0), dim=0)) > 0.99999
    torch.testing.assert_close(changed["others_read_ffn"][reads], changed["others_read_ffn"][reads])
    assert float((changed["others_read_ffn"][reads][spike] - changed["others_read"][reads][spike]).abs().max()) > 0.1
    assert torch.equal(changed["others_read_attention"][reads][spike], changed["others_read"][reads][spike])
    torch.testing.assert_close(changed["ordinary_key"][keys][spike], known.other_keys[3].expand(3, -1, -1))
    torch.testing.assert_close(
        changed["turned_key"][keys][spike].norm(dim=-1), known.keys[3].norm(dim=-1).expand(3, -1), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(changed["turned_key_elsewhere"][keys][other], changed["turned_key"][keys][spike])
    pattern = "blocks.3.attn.hook_pattern"
    for window, position in spike.nonzero().tolist():
        assert float(changed["masked"][pattern][window, :, position:, position].max()) == 0
        assert float(changed["masked_elsewhere"][pattern][window, :, position:, position].max()) > 0
    held = changed["decoupled"]
    assert float(held["blocks.3.hook_in"][spike][:, CHANNELS].abs().max()) == 0
    torch.testing.assert_close(held[keys][spike], known.keys[3].expand(3, -1, -1))
    torch.testing.assert_close(held["ln_final.hook_normalized"][spike], known.readout.expand(3, -1))
    open_ = changed["decoupled_open"]["ln_final.hook_normalized"]
    assert float((open_[spike] - known.readout).abs().max()) > 0.1
    torch.testing.assert_close(open_[~spike], held["ln_final.hook_normalized"][~spike])


def test_a_planted_spike_can_be_taken_out_with_its_keys_and_values_held(parts, planted_model):
    """Nobody but the step-down block reads the planted channels for itself, so all of its use is in keys and values."""
    broken = parts[1]
    apart, zeroed = broken.outcomes["decoupled"], broken.outcomes["zeroed"]
    others = ~broken.targets.spike[:, :-1]
    assert float(broken.clean.largest.max()) > 900
    assert float(apart.largest.max()) < 50
    assert float(apart.divergence[others].mean()) < 0.01 * float(zeroed.divergence[others].mean())
    assert evidence.ab4_spike_removed(broken) == NotApplicable(chain.NO_SINK)
    many = {key: replace(of, score=torch.full((3, 6, 4), 0.5)) for key, of in broken.outcomes.items()}
    # The trigger stands first in every window here, and what is held is what stands there.
    assert evidence.ab4_spike_removed(replace(broken, outcomes=many)) == NotApplicable(NO_CHANGE)
    many["decoupled"] = replace(many["decoupled"], divergence=many["decoupled"].divergence + 1e-5)
    result = evidence.ab4_spike_removed(replace(broken, outcomes=many))
    assert judge("AB4", result, "08").verdict == "holds"
    assert result.measured["perplexity_own_prediction_open"] == many["decoupled_open"].perplexity
    assert many["decoupled_open"].perplexity != many["decoupled"].perplexity
    assert result.measured["perplexity_decoupled_elsewhere"] == pytest.approx(
        result.measured["perplexity_clean_elsewhere"], rel=1e-4
    )


def test_evidence_is_what_the_outcomes_say(parts):
    broken = parts[1]
    of = broken.outcomes
    zeroing = evidence.ab1_zeroing_breaks(broken)
    assert zeroing.measured["perplexity_zeroed"] == of["zeroed"].perplexity
    assert zeroing.control["perplexity_other_position"] == of["other_position"].perplexity
    assert (
        evidence.ab3_step_up_makes_the_sink(broken) == evidence.ab5_sink_removed(broken) == NotApplicable(chain.NO_SINK)
    )
    # The planted model has no sinks, so its scores are made here: windows 3, layers 6, heads 4.
    scores = {CLEAN: torch.full((3, 6, 4), 0.5), "skipped": torch.zeros(3, 6, 4), "masked": torch.zeros(3, 6, 4)}
    scores["masked"][:, :2] = 0.4
    scores["skipped"][0, 0, 0] = 0.9
    broken = replace(broken, outcomes={k: replace(o, score=scores.get(k, scores[CLEAN])) for k, o in of.items()})
    step = evidence.ab3_step_up_makes_the_sink(broken)
    assert step.measured["step_up_blocks"] == [4]
    assert (step.measured["sink_ratio_clean"], step.control["sink_ratio_other_blocks"]) == (1, 1)
    assert step.measured["sink_ratio_skipped"] == pytest.approx(1 / 72)
    keys = of["skipped"].attention[2:5, 1:20].mean(0)
    assert step.measured["most_attended_other_key_skipped"] == pytest.approx(float(keys.max()))
    assert step.measured["largest_at_spike_tokens_clean"] == broken.at_spikes(CLEAN)
    assert step.measured["largest_at_spike_tokens_skipped"] < 50
    unsunk = evidence.ab5_sink_removed(broken)
    assert unsunk.measured["sink_ratio_unsunk"] == pytest.approx(1 / 3)
    assert unsunk.measured["sink_ratio_unsunk_on_the_plateau"] == 0
    assert unsunk.measured["sink_ratio_clean_on_the_plateau"] == 1
    others = ~broken.targets.spike
    assert unsunk.measured["largest_elsewhere_masked_everywhere"] == float(
        of["masked_everywhere"].largest[others].max()
    )
    assert unsunk.control["perplexity_other_tokens_masked"] == of["masked_elsewhere"].perplexity
    assert unsunk.control["perplexity_ordinary_key"] == of["ordinary_key"].perplexity
    # Nor does a dead spike cost this model much; where it does not, the claims that need that have nothing to say.
    assert isinstance(evidence.ab6_wrong_places(broken), NotApplicable)
    assert (
        "could do harm"
        in evidence.ab2_mean_does_not(replace(broken, outcomes=broken.outcomes | {"another_way": broken.clean})).reason
    )
    assert (
        "what stands there"
        in evidence.ab2_mean_does_not(
            replace(
                broken,
                outcomes=broken.outcomes
                | {key: broken.clean for key in ("mean", "whole")}
                | {"another_way": replace(of["another_way"], loss=of["another_way"].loss + 1)},
            )
        ).reason
    )
    broken = replace(
        broken, outcomes=broken.outcomes | {"mean": replace(of["mean"], divergence=of["mean"].divergence + 0.01)}
    )
    worse = {key: replace(of[key], loss=of[key].loss + 1) for key in ("zeroed", "another_way")}
    broken = replace(broken, outcomes=broken.outcomes | worse)
    mean = evidence.ab2_mean_does_not(broken)
    assert mean.measured["perplexity_mean"] == of["mean"].perplexity
    assert mean.measured["perplexity_whole_vector"] == of["whole"].perplexity
    assert mean.control["perplexity_random_direction"] == pytest.approx(math.e * of["another_way"].perplexity, rel=1e-5)
    wrong = evidence.ab6_wrong_places(broken)
    assert wrong.measured["perplexity_random_channels"] == of["random_channels"].perplexity
    assert wrong.measured["perplexity_other_position"] == of["other_position"].perplexity
    assert wrong.measured["perplexity_clean_elsewhere"] == pytest.approx(
        float(of[CLEAN].loss[~broken.targets.other[:, :-1]].mean().exp())
    )
    assert 950 < broken.at_spikes(CLEAN) < 1050


def test_doses_do_not_run_anew_what_is_known(parts, planted_model, monkeypatch):
    broken, asked = parts[1], []
    plain = chain.compare

    def counted(model, tokens, cuts):
        asked.extend(cuts)
        return plain(model, tokens, cuts)

    monkeypatch.setattr(chain, "compare", counted)
    found = chain.dose_spike(planted_model, broken, (0, 0.5, 1, 3))
    assert asked == [0.5, 3, "control"]
    assert found.factors == (0, 0.5, 1, 3)
    assert found.outcomes[0] is broken.outcomes["zeroed"]
    assert found.outcomes[2] is broken.clean
    spike = broken.targets.spike
    sizes = [float(of.largest[spike].quantile(0.5)) for of in found.outcomes]
    assert sizes[1:] == pytest.approx([500, 1000, 3000], rel=0.05)
    result = evidence.ab7_dose_response(found)
    assert result.measured["perplexities"] == [of.perplexity for of in found.outcomes]
    assert result.measured["perplexities_elsewhere"][0] == pytest.approx(
        float(found.outcomes[0].loss[~spike[:, :-1]].mean().exp())
    )
    assert set(result.control) == {"perplexity_random_channels_0", "perplexity_random_channels_3"}


def test_the_map_finds_the_block_that_makes_the_spike(parts, planted_model):
    known, broken = parts
    found = chain.map_blocks(planted_model, broken.tokens, known, broken.targets.spike)
    spike = found.spike()
    assert len(spike) == 12
    assert int(spike.argmin()) + 1 == 4
    assert float(spike[3]) < 0.05
    assert spike[4:].tolist() == pytest.approx([1] * 8, abs=0.02)
    skipped = patching.evaluate(planted_model, broken.tokens, patching.skip(patching.mlp(1), broken.targets.spike))
    assert found.outcomes[3].perplexity == pytest.approx(skipped.perplexity)


def test_decouple_and_unsink_find_the_spike_tokens_of_a_prompt(planted_model, trigger_tokens, life):
    prompt = trigger_tokens[2]
    cuts = patching.decouple(planted_model, prompt, life)
    assert all(cut.positions.same == (20,) for cut in cuts)
    outcome = patching.evaluate(planted_model, prompt, *cuts)
    assert float(outcome.largest.max()) < 50
    assert len(patching.decouple(planted_model, prompt, life, hold_readout=False)) == len(cuts) - 1
    (mask,) = patching.unsink(planted_model, prompt, life)
    assert (mask.positions.same, mask.site.places) == ((20,), (2, 3, 4))
    with pytest.raises(ValueError, match="none of these tokens spikes, so there is nothing to take apart"):
        patching.decouple(planted_model, trigger_tokens[0], life)
    with pytest.raises(ValueError, match="no token of the windows that means are taken of spikes"):
        patching.decouple(planted_model, prompt, life, held_out=trigger_tokens[:1])


def test_generation_goes_on_without_the_spike(planted_model, trigger_tokens, life):
    prompt = trigger_tokens[2:3, :30]
    cuts, largest = patching.decouple(planted_model, prompt, life), []
    watch = [("blocks.3.hook_in", lambda value, hook: largest.append(float(value.abs().max())))]
    with patching.patched(planted_model, *cuts), planted_model.hooks(fwd_hooks=watch):
        planted_model.generate(prompt, max_new_tokens=5, do_sample=False, stop_at_eos=False, verbose=False)
    assert len(largest) == 5
    assert max(largest) < 50


def test_where_nothing_spikes_there_is_nothing_to_cut(random_model):
    tokens = spikesink.windows(random_model, "house", 4, 24)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    (held_out, out), (judged, where) = chain.split_windows(life, 12)
    assert judged.shape == where.shape == (2, 12)
    known = spike_means(random_model, held_out, life, out)
    broken = chain.break_chain(random_model, judged, known, where)
    nothing = [
        known,
        broken,
        chain.dose_spike(random_model, broken),
        chain.map_blocks(random_model, judged, known, where),
        evidence.ab1_zeroing_breaks(broken),
        chain.cut_table(broken),
        behaviour.measure_behaviour(random_model, life, broken),
    ]
    assert all(isinstance(of, NotApplicable) and "100 medians" in of.reason for of in nothing)
    with pytest.raises(ValueError, match="no token has an entry above 100 medians"):
        patching.decouple(random_model, tokens[0], life, held_out=tokens)
    with pytest.raises(ValueError, match="none of these tokens spikes"):
        patching.unsink(random_model, tokens[0], life)


def test_windows_without_a_spike_on_one_side_say_so(planted_model, trigger_tokens, life, parts):
    none = torch.zeros(2, 48, dtype=torch.bool)
    held = spike_means(planted_model, trigger_tokens[:2], life, none)
    assert held == NotApplicable("no token of the windows that means are taken of spikes; measure more windows")
    judged = chain.break_chain(planted_model, trigger_tokens[:2], parts[0], none)
    assert judged == NotApplicable("no token of the windows to judge on spikes; measure more windows")
    with pytest.raises(ValueError, match="there is no cut 'sawn'; give some of skipped"):
        chain.aim_cuts(parts[0], parts[1].targets, ["sawn"])


def test_a_repeated_prompt_is_the_same_tokens_twice(planted_model, trigger_tokens):
    prompts = behaviour.repeated(planted_model, trigger_tokens, 3, length=7)
    bos = int(spikesink.anatomy(planted_model).prepends_bos)
    assert prompts.shape == (3, 14 + bos)
    assert torch.equal(prompts[:, bos : 7 + bos], prompts[:, 7 + bos :])
    assert set(prompts[:, bos:].flatten().tolist()) <= set(trigger_tokens.flatten().tolist())


@pytest.mark.parametrize("model", ["planted_model", "default_model"])
def test_recall_asks_for_what_was_said_once(model, request):
    model = request.getfixturevalue(model)
    prompts, at = behaviour.recall_prompts(model, 3)
    assert len(prompts) == len(at) == 6
    for yes, no, place, other in zip(prompts[:3], prompts[3:], at[:3], at[3:], strict=True):
        text = model.tokenizer.decode(yes[: place.stop + 1])
        without = model.tokenizer.decode(no[: other.stop + 1])
        answer = text.rsplit(" ", 1)[1]
        assert answer in behaviour.PLACES
        for row, where in ((yes, place), (no, other)):
            assert model.tokenizer.decode(row[where.start + 1 : where.stop + 1]).strip().endswith(answer)
        assert text.endswith(f"is in the {answer}")
        assert (text.count(f"is in the {answer}"), without.count(f"is in the {answer}")) == (2, 1)
        asked = text.rsplit("the ", 2)[1].removesuffix(" is in ").strip()
        lines = text.splitlines()
        assert 3 <= lines.index(f"The {asked} is in the {answer}.") < 6


def test_behaviour_is_measured_for_every_cut_that_can_be_made(parts, planted_model, life):
    broken = parts[1]
    names = ("masked", "decoupled")
    found = behaviour.measure_behaviour(planted_model, life, broken, names, n=2, new_tokens=4)
    assert list(found.by_position) == [CLEAN, *names]
    assert found.edges == (1, 8, 16, 32, 39)
    loss = broken.outcomes["masked"].loss
    torch.testing.assert_close(found.by_position["masked"][1], loss[:, 8:16].mean())
    assert found.same_greedy[CLEAN] == 1
    assert found.before_parting[CLEAN] == 4
    assert set(found.recall) == {CLEAN}  # no trigger in those prompts, so there is nothing to cut
    table = behaviour.behaviour_table(found)
    assert math.isnan(table.loc[chain.CUTS["masked"].name, "recall"])
    assert "it writes:" in behaviour.writing(found)


def test_copies_and_answers_are_read_at_their_own_predictions(random_model, monkeypatch, parts, planted_model, life):
    """On a stand-in whose loss at each position is the position's number."""
    broken = parts[1]

    def numbered(model, life, known, prompts, names, seed):
        n, length = prompts.shape
        return {CLEAN: type("Outcome", (), {"loss": torch.arange(length - 1.0).expand(n, -1)})}

    monkeypatch.setattr(behaviour, "_on", numbered)
    monkeypatch.setattr(
        behaviour, "greedy", lambda model, broken, names, n, new: {CLEAN: torch.zeros(n, new, dtype=torch.long)}
    )
    found = behaviour.measure_behaviour(planted_model, life, broken, (), n=2)
    bos = int(spikesink.anatomy(planted_model).prepends_bos)
    # The second copy begins at token 40 + bos; its first token cannot be known, the others are predicted from there on.
    assert found.second_copy[CLEAN] == pytest.approx((40 + bos + 78 + bos) / 2)
    assert found.first_copy[CLEAN] == pytest.approx((1 + 38 + bos) / 2)
    at = behaviour.recall_prompts(planted_model, 2)[1]
    assert found.recall[CLEAN] == pytest.approx(sum((p.start + p.stop - 1) / 2 for p in at[:2]) / 2)
    assert found.no_answer[CLEAN] == pytest.approx(sum((p.start + p.stop - 1) / 2 for p in at[2:]) / 2)


def test_one_window_has_no_interval_and_can_be_recorded(planted_model, trigger_tokens, life, parts):
    where = is_spike(life, life.main)
    broken = chain.break_chain(planted_model, trigger_tokens[2:3], parts[0], where[2:3])
    dosed = chain.dose_spike(planted_model, broken, (0, 1, 2))
    zeroing, dose = evidence.ab1_zeroing_breaks(broken), evidence.ab7_dose_response(dosed)
    assert "interval_clean" not in zeroing.measured
    assert "lows" not in dose.measured
    for key, found in (("AB1", zeroing), ("AB7", dose)):
        assert judge(key, found, "08").verdict in ("holds", "differs")
    assert chain.cut_table(broken)["low"].isna().all()
    for fig in (plots.broken_chain(broken), plots.dose_response(dosed)):
        fig.draw_without_rendering()
    both = evidence.ab1_zeroing_breaks(parts[1]).measured
    assert both["interval_clean"] == list(parts[1].clean.interval())
