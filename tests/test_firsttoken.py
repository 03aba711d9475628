"""The static path against whole forward passes, in every family; the probe against a spike that was planted."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

import spikesink
from spikesink.chain import firsttoken
from spikesink.common import NotApplicable
from spikesink.ledger import claims, evidence
from spikesink.model.weights import open_weights, weights_of
from tests import planted
from tests.test_families import FAMILIES, tiny
from tests.test_weights import GATED

NOTHING = torch.zeros(0, dtype=torch.long)


@pytest.fixture(scope="module")
def planted_life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="module")
def planted_probe(planted_model, planted_life):
    return firsttoken.probe(weights_of(planted_model), planted_life)


@pytest.fixture(scope="module")
def trigger(planted_model):
    return planted_model.tokenizer.convert_tokens_to_ids(planted.TRIGGER)


def alone(model, tokens, block, watch=None):
    """The same by whole forward passes: tokens with nothing before them."""
    nothing = torch.zeros(len(tokens), 0, dtype=torch.long)
    return firsttoken.after_text(model, spikesink.anatomy(model), tokens, nothing, block, watch)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_static_path_is_what_a_token_alone_goes_through_in_every_family(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    shake(model)
    tokens = torch.tensor([5, 399, 0, 77, 5])
    for block in (1, 2, 5, 6):
        found = firsttoken.static_path(weights_of(model), tokens, block)
        torch.testing.assert_close(found, alone(model, tokens, block), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[4], rtol=1e-5, atol=1e-6)  # rows of a product may round apart


def shake(model):
    """Give norms and biases values that are not all ones and zeros."""
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "norm" in name or "bias" in name or "ln_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("family", GATED)
def test_the_static_path_can_be_read_from_files(family, tmp_path):
    directory, tokens = tiny(family, tmp_path), torch.tensor([3, 200])
    loaded, read = weights_of(spikesink.load(directory)), open_weights(directory)
    torch.testing.assert_close(
        firsttoken.static_path(read, tokens, 6), firsttoken.static_path(loaded, tokens, 6), rtol=1e-6, atol=1e-6
    )


def test_every_point_of_the_two_paths_is_shown_to_whoever_watches(planted_model):
    tokens, points = torch.arange(7), ({}, {})

    def into(found):
        return lambda point, part, stream: found.setdefault(point, []).append(stream.clone())

    firsttoken.static_path(weights_of(planted_model), tokens, 5, watch=into(points[0]))
    alone(planted_model, tokens, 5, into(points[1]))
    assert list(points[0]) == list(points[1]) == list(range(6))
    for point in range(6):
        torch.testing.assert_close(torch.cat(points[0][point]), torch.cat(points[1][point]), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("batch", [1, 3, 2048])
def test_batches_change_nothing(planted_model, batch, monkeypatch):
    weights, tokens = weights_of(planted_model), torch.arange(10)
    whole = firsttoken.static_path(weights, tokens, 4)
    monkeypatch.setattr(firsttoken, "BATCH", batch)
    torch.testing.assert_close(firsttoken.static_path(weights, tokens, 4), whole, rtol=1e-5, atol=1e-5)


def test_the_probe_is_what_real_forward_passes_give_on_the_default_model(default_model):
    """A random sample of the vocabulary, and in bfloat16 the same entries spike."""
    life = spikesink.find_lifecycle(
        spikesink.trace_windows(default_model, spikesink.windows(default_model, "house", 2, 32))
    )
    weights = weights_of(default_model)
    tokens = torch.randperm(weights.anatomy.d_vocab, generator=torch.Generator().manual_seed(1))[:96]
    tokens = torch.cat([tokens, torch.tensor(default_model.tokenizer.convert_tokens_to_ids(['["', "!["]))])
    found = firsttoken.probe(weights, life, tokens)
    real = alone(default_model, tokens, life.main.step_up[-1])[:, life.main.channel]
    torch.testing.assert_close(found.value, real * found.sign, rtol=1e-4, atol=0.05)
    assert found.spiking[:96].all()
    assert not found.spiking[96:].any()
    assert found.exceptions().tolist() == tokens[96:][found.value[96:].argsort()].tolist()
    assert torch.equal(firsttoken.probe(weights, life, tokens, torch.bfloat16).spiking, found.spiking)


@pytest.mark.parametrize("size", [1000.0, -1000.0])
def test_the_probe_finds_the_planted_trigger_and_nothing_else(size, tmp_path, trigger_tokens, trigger):
    spike = planted.Plant(size=size)
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "model"))
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, trigger_tokens))
    found = firsttoken.probe(weights_of(model), life)
    assert found.exceptions().tolist() == [trigger]
    assert float(found.value[trigger]) == pytest.approx(1000, rel=1e-3)
    counts = torch.ones(400, dtype=torch.long)
    counts[trigger] = 401
    assert found.block == spike.step_up_layers[0] * 2 + 2
    assert found.threshold == pytest.approx(0.1 * abs(life.main.value))
    result = evidence.tk1_nearly_any(found, counts, NotApplicable("not looked for"))
    assert result.measured["spiking"] == 1
    assert result.measured["share"] == 1 / 400
    assert result.measured["share_of_text"] == pytest.approx(401 / 800)
    assert result.control == {"share_before_step_up": 0.0}
    assert claims.judge("TK1", result, "05").verdict == "differs"


def test_where_every_token_but_some_is_a_trigger_those_are_the_exceptions(tmp_path, trigger_tokens):
    hf_model = planted.plant(planted.random_llama(400), planted.Plant())
    hf_model.model.embed_tokens.weight[:, 0] = 1.0
    hf_model.model.embed_tokens.weight[[7, 300], 0] = 0.0
    model = spikesink.load(planted.save(hf_model, tmp_path / "model"))
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, trigger_tokens))
    found = firsttoken.probe(weights_of(model), life)
    assert sorted(found.exceptions().tolist()) == [7, 300]
    counts = torch.ones(400, dtype=torch.long)
    elsewhere = claims.Evidence({"share_elsewhere": 0.25}, {})
    result = evidence.tk1_nearly_any(found, counts, elsewhere)
    assert result.measured["spiking"] == 398
    assert result.control["share_after_a_text"] == 0.25
    counts[300] = 2
    assert firsttoken.quiet_tokens(found, counts).tolist() == [300, 7]
    table = firsttoken.exceptions_table(found, model.tokenizer.decode)
    assert sorted(table["token id"]) == [7, 300]
    assert (table["channel 9"].abs() < 100).all()
    assert firsttoken.in_common(weights_of(model), found, model.tokenizer.decode)["n"] == 2


def test_exceptions_and_quiet_tokens_come_in_order():
    value = torch.tensor([50.0, -1.0, 9.0, 70.0, 3.0, 40.0])
    found = firsttoken.Probe(4, 9, 1.0, 10.0, torch.tensor([11, 12, 13, 14, 15, 16]), value, torch.zeros(6))
    assert found.exceptions().tolist() == [12, 15, 13]
    counts = torch.zeros(20, dtype=torch.long)
    assert firsttoken.quiet_tokens(found, counts).tolist() == [12, 15, 13]  # none occurs: the smallest first
    counts[[13, 14]] = torch.tensor([1, 5])
    assert firsttoken.quiet_tokens(found, counts, 2).tolist() == [13, 12]
    mostly_not = firsttoken.Probe(4, 9, 1.0, 45.0, found.tokens, value, torch.zeros(6))
    assert mostly_not.exceptions().tolist() == [14, 11]  # of those that spike, the largest first


@pytest.mark.parametrize("family", FAMILIES)
def test_first_token_attention_is_static(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    shake(model)
    result = evidence.tk2_static_map(model, weights_of(model), spikesink.windows(model, "house", 3, 24))
    assert result.measured["max_relative_error"] < 1e-5
    assert result.control["median_relative_error_later_positions"] > 100 * result.measured["max_relative_error"]
    assert result.measured["layers"] == 3


def test_a_planted_trigger_spikes_wherever_it_stands(planted_model, planted_probe, trigger_tokens, trigger):
    """It needs no first place, and the measure says so: a claim that this model does not meet."""
    weights = weights_of(planted_model)
    result = evidence.tk3_not_elsewhere(planted_model, weights, planted_probe, trigger_tokens, positions=(1, 9))
    assert result.measured["share_elsewhere"] == result.control["share_at_position_0"] == 1
    assert result.measured["share_by_position"] == [[1, 1.0], [9, 1.0]]
    assert claims.judge("TK3", result, "05").verdict == "differs"
    table = firsttoken.try_word(planted_model, weights, planted_probe, planted.TRIGGER, trigger_tokens)
    assert table["spikes there"].tolist() == ["yes"]
    assert table["spikes there, windows"].tolist() == ["6 of 6"]
    table = firsttoken.try_word(planted_model, weights, planted_probe, "a", trigger_tokens)
    assert table["spikes there, windows"].tolist() == ["0 of 6"]


def test_on_the_default_model_the_first_place_is_what_counts(default_model):
    tokens = spikesink.windows(default_model, "house", 4, 40)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    weights = weights_of(default_model)
    drawn = torch.arange(500, 540)
    found = firsttoken.probe(weights, life, drawn)
    result = evidence.tk3_not_elsewhere(default_model, weights, found, tokens, n=24, positions=(2, 16))
    assert result.control["share_at_position_0"] == 1
    assert result.measured["share_elsewhere"] <= 0.05
    fork = firsttoken.fork_of_probe(default_model, weights, life, found, tokens, n=16)
    assert fork.first.shape == fork.later.shape == (life.main.step_up[-1] + 1, 16)
    assert torch.equal(fork.first[0], fork.later[0])  # the same embeddings
    embedded = torch.nn.functional.normalize(weights.embed(fork.tokens), dim=-1)
    pairs = (embedded @ embedded.T)[~torch.eye(16, dtype=torch.bool)]
    assert float(fork.alike_first[0]) == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert (fork.first[fork.block - 1] > 0.4).all()
    assert (fork.later[fork.block - 1].abs() < 0.2).all()


def test_attention_to_oneself_is_the_diagonal_of_the_patterns(planted_model, trigger_tokens):
    about = spikesink.anatomy(planted_model)
    seen = firsttoken.looking(planted_model, about, trigger_tokens, 4, 9)
    _, cache = planted_model.run_with_cache(trigger_tokens)
    patterns = torch.stack([cache[name] for name in about.pattern_hooks[:2]])  # layer, window, head, query, key
    expected = patterns.diagonal(dim1=-2, dim2=-1).mean(2)
    torch.testing.assert_close(seen.own_by_layer, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.own, expected.mean(0), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(seen.value, cache[about.layer_hooks[2]][..., 9], rtol=1e-5, atol=1e-3)
    assert torch.equal(firsttoken.looking(planted_model, about, trigger_tokens, 4, 9, -1).value, -seen.value)


def test_attention_is_compared_at_the_same_positions():
    own = torch.tensor([[1.0, 0.6, 0.2], [1.0, 0.4, 0.1]])
    tokens = torch.tensor([[4, 4, 5], [4, 5, 4]])
    seen = firsttoken.Looking(tokens, torch.stack([own + 0.1, own - 0.1]), torch.zeros(2, 3))
    where = torch.tensor([[False, True, True], [False, True, False]])
    which = torch.tensor([[True, False, False], [True, True, True]])
    # Two of `where` stand at position 1 and one at 2: (2 * 0.4 + 1 * 0.1) / 3.
    assert seen.own_of(which, where) == pytest.approx(0.3)
    assert seen.own_of(which, where, 0) == pytest.approx(0.4)
    assert seen.own_of(which, where, 1) == pytest.approx(0.2)
    assert math.isnan(seen.own_of(torch.zeros(2, 3).bool(), where))
    assert seen.copies.tolist() == [[True, True, False], [True, False, False]]
    assert seen.later.tolist() == [[False, True, True]] * 2
    spikes, others = replace(seen, value=torch.tensor([[9.0, 9.0, 9.0], [9.0, 0.0, 9.0]])).understudies(5)
    assert spikes.tolist() == [[False, False, True], [False, False, True]]  # the copy at position 1 is in neither
    assert others.tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (".", True),
        ("\n", True),
        (" —", True),
        ("", False),
        (" the", False),
        ("x)", False),
        ("3", False),
        (". \ufffd", False),
    ],
)
def test_delimiters_hold_no_letter_and_no_digit(text, expected):
    assert firsttoken.is_delimiter(text) is expected


def test_spiking_delimiters_are_counted_and_their_attention_measured(tmp_path):
    """A comma is the trigger; it spikes wherever it is, and counts where something else stands before it."""
    hf_model = planted.plant(planted.random_llama(400), planted.Plant())
    comma = planted.tokenizer().convert_tokens_to_ids(",")
    hf_model.model.embed_tokens.weight[comma, 0] = 1.0
    model = spikesink.load(planted.save(hf_model, tmp_path / "model"))
    tokens = spikesink.windows(model, "house", 6, 48)
    tokens[0, :2] = comma  # copies: the second one computes what the first does
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    result = evidence.tk4_delimiters(model, weights_of(model), tokens, life, life.main)
    ours = tokens == comma
    ours[0, :2] = ours[:, 0] = False
    assert result.measured["n_spiking_delimiters"] == int(ours.sum()) > 0
    assert result.measured["n_spiking_words"] == 0
    seen = firsttoken.looking(model, spikesink.anatomy(model), tokens, 4, 9)
    assert result.measured["self_attention_delimiters"] == pytest.approx(float(seen.own[ours].mean()), rel=1e-5)
    scale = model.blocks[0].ln1.weight
    expected = torch.cosine_similarity(hf_model.model.embed_tokens.weight[comma], scale, dim=0)
    assert result.measured["scale_cosine_delimiters"] == pytest.approx(float(expected), rel=1e-4)


def test_every_group_of_tokens_is_measured_alike(tmp_path):
    """Commas and the word "the" spike, full stops do not; by brute force over occurrences, up to the first step-up."""
    hf_model = planted.plant(planted.random_llama(400), planted.Plant(step_up_layers=(1, 2)))
    generator = torch.Generator().manual_seed(5)
    for layer in hf_model.model.layers:  # a scale of its own for every norm, but where the spike is read
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.weight.data += 0.3 * torch.randn(norm.weight.shape, generator=generator) * (torch.arange(64) > 30)
    ids = {text: planted.tokenizer().convert_tokens_to_ids(text) for text in (",", "Ġthe", ".")}
    hf_model.model.embed_tokens.weight.data[[ids[","], ids["Ġthe"]], 0] = 1.0
    model = spikesink.load(planted.save(hf_model, tmp_path / "model"))
    tokens = spikesink.windows(model, "house", 8, 64)
    tokens[1, :2] = ids["Ġthe"]  # the second one only copies the first
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, tokens))
    assert life.main.step_up == (4, 6)
    result = evidence.tk4_delimiters(model, weights_of(model), tokens, life, life.main)

    spiking = (tokens == ids[","]) | (tokens == ids["Ġthe"])
    kinds = [[firsttoken.is_delimiter(model.tokenizer.decode([t])) for t in window] for window in tokens.tolist()]
    delimiter, elsewhere = torch.tensor(kinds), torch.arange(64).repeat(8, 1) > 0
    elsewhere[1, 1] = False
    groups = {
        "delimiters": spiking & delimiter & elsewhere,
        "words": spiking & ~delimiter & elsewhere,
        "quiet": ~spiking & delimiter & elsewhere,
        "other": ~spiking & ~delimiter & elsewhere,
    }
    _, cache = model.run_with_cache(tokens)
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1)]
    own = torch.stack([pattern.diagonal(dim1=-2, dim2=-1).mean(1) for pattern in patterns]).mean(0)
    cosine = torch.cosine_similarity(cache["blocks.0.hook_in"], model.blocks[0].ln1.weight, dim=-1)

    def matched(name, places):
        value = weight = 0.0
        for _, position in groups[places].nonzero().tolist():
            here = groups[name][:, position]
            if here.any():
                value, weight = value + float(own[here, position].mean()), weight + 1
        return value / weight

    found = {**result.measured, **result.control}
    for key, expected in {
        "self_attention_delimiters": matched("delimiters", "delimiters"),
        "self_attention_other": matched("other", "delimiters"),
        "self_attention_quiet_delimiters": matched("quiet", "delimiters"),
        "self_attention_spiking_words": matched("words", "words"),
        "self_attention_other_where_words_spike": matched("other", "words"),
        "scale_cosine_delimiters": float(cosine[groups["delimiters"]].mean()),
        "scale_cosine_other": float(cosine[groups["other"]].mean()),
        "scale_cosine_quiet_delimiters": float(cosine[groups["quiet"]].mean()),
        "scale_cosine_spiking_words": float(cosine[groups["words"]].mean()),
    }.items():
        assert found[key] == pytest.approx(expected, rel=1e-3, abs=1e-5), key
    assert (found["n_types"], found["n_spiking_words"]) == (1, int(groups["words"].sum()))


def test_a_spike_of_two_steps_and_negative_sign_is_probed_after_the_last(tmp_path, trigger_tokens, trigger):
    spike = planted.Plant(step_up_layers=(1, 2), size=-1000.0)
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), spike), tmp_path / "model"))
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, trigger_tokens))
    weights = weights_of(model)
    found = firsttoken.probe(weights, life)
    assert (found.block, found.sign) == (6, -1)
    assert float(found.value[trigger]) == pytest.approx(1000, rel=1e-3)
    assert found.threshold == pytest.approx(0.1 * abs(life.main.value))
    result = evidence.tk3_not_elsewhere(model, weights, found, trigger_tokens, positions=(3,))
    assert result.measured["share_elsewhere"] == result.control["share_at_position_0"] == 1


@pytest.mark.parametrize("family", ["granite", "gemma2", "phi3", "stablelm"])
def test_the_static_path_in_bfloat16_is_near_the_one_in_float32(family, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    shake(model)
    tokens, weights = torch.arange(50), weights_of(model)
    full, short = (firsttoken.static_path(weights, tokens, 6, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert float((full - short).norm() / full.norm()) < 0.02


@pytest.mark.parametrize("bias", [True, False])
def test_a_residual_multiplier_counts_for_biases_and_for_any_ffn(bias, tmp_path):
    config = transformers.GraniteConfig(**FAMILIES["granite"][1], attention_bias=bias, mlp_bias=bias)
    torch.manual_seed(0)
    model = spikesink.load(planted.save(transformers.GraniteForCausalLM(config).eval(), tmp_path / "granite"))
    shake(model)
    tokens, weights = torch.tensor([5, 9]), weights_of(model)
    by_modules = replace(weights, anatomy=replace(weights.anatomy, gate_activation=None))  # as if it had no gated FFN
    for some in (weights, by_modules):
        found = firsttoken.static_path(some, tokens, 6)
        torch.testing.assert_close(found, alone(model, tokens, 6), rtol=1e-4, atol=1e-5)


def test_rounding_is_no_finding(planted_directory):
    model = spikesink.load(planted_directory, dtype="bfloat16")
    tokens = spikesink.windows(model, "house", 2, 16)
    assert "float32" in evidence.tk2_static_map(model, weights_of(model), tokens).reason


def test_the_largest_error_of_all_windows_counts(planted_model, trigger_tokens, monkeypatch):
    """A map that is wrong for the trigger alone, which stands first in two of six windows."""
    weights = weights_of(planted_model)
    attention = weights.attention(0)
    bent = attention.value.clone()
    bent[:, 0] += 1  # only the trigger has an entry in channel 0
    monkeypatch.setattr(type(weights), "attention", lambda self, layer: replace(attention, value=bent))
    one_layer = replace(weights, anatomy=replace(weights.anatomy, n_layers=1))
    found = evidence.tk2_static_map(planted_model, one_layer, trigger_tokens)
    assert found.measured["max_relative_error"] > 0.1


def test_no_spiking_delimiter_is_a_reason(planted_model, planted_life, trigger_tokens):
    weights = weights_of(planted_model)
    found = evidence.tk4_delimiters(planted_model, weights, trigger_tokens, planted_life, planted_life.main)
    assert found == NotApplicable("no delimiter spikes, except where it has nothing but copies of itself before it")
    found = evidence.tk4_delimiters(planted_model, weights, trigger_tokens, planted_life, None)
    assert found == NotApplicable("there is no smaller cycle")


def test_what_spikes_instead_is_told_with_its_place(planted_model, planted_probe, trigger_tokens, trigger):
    counts = torch.zeros(400, dtype=torch.long)
    counts[[50, 60]] = torch.tensor([2, 3])
    seen, names = firsttoken.replace_first(
        planted_model, weights_of(planted_model), planted_probe, trigger_tokens, counts, 2
    )
    assert [int(looked.tokens[0, 0]) for looked in seen[1:]] == [60, 50]
    assert torch.equal(seen[1].tokens[:, 1:], trigger_tokens[:, 1:])
    table = firsttoken.first_replaced_table(seen, names, planted_probe, planted_model.tokenizer.decode)
    # The trigger stands at positions 20, 47, 5 and 30 of three of the six windows; what stands first changes nothing.
    copies = [int(looked.copies.sum()) - 6 for looked in seen]
    assert table["later spikes"].tolist() == [f"4 of {6 * 47 - n}" for n in copies]
    assert table["the commonest"].tolist() == [repr(planted.TRIGGER)] * 3
    assert table["delimiters"].tolist() == [0] * 3
    later = trigger_tokens[:, 1:][~seen[1].copies[:, 1:]].tolist()
    share = sum(firsttoken.is_delimiter(planted_model.tokenizer.decode([t])) for t in later) / len(later)
    assert table["of all"][1] == pytest.approx(share)
    at = ([2, 3, 4, 4], [20, 47, 5, 30])
    assert table["attend to themselves"][0] == pytest.approx(float(seen[0].own[at].mean()), rel=1e-5)


def test_where_the_paths_part_is_told():
    first = torch.tensor([[0.0, 0.1], [0.2, 0.3], [0.3, 0.2], [0.9, 0.8], [0.0, 0.0]])
    later = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.25, 0.2], [0.1, 0.1], [0.0, 0.0]])
    alike = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5])
    facts = firsttoken.fork_facts(
        firsttoken.Fork(4, 8, torch.arange(2), first, later, torch.zeros(5, 0), alike, -alike)
    )
    assert facts["disjoint"] == 3  # after block 1 they are apart too, but not for good
    assert (facts["first"], facts["later"]) == pytest.approx((0.85, 0.1))
    assert facts["rising_blocks"] == [1, 3]
    assert (facts["alike_embedded"], facts["alike_first"], facts["alike_later"]) == pytest.approx((0.1, 0.4, -0.4))
    assert facts["rises"] == pytest.approx([0.2, 0.6])
    facts = firsttoken.fork_facts(
        firsttoken.Fork(4, 8, torch.arange(2), later, first, torch.zeros(5, 0), alike, -alike)
    )
    assert facts["disjoint"] == "no block"


def test_special_tokens_that_spike_anywhere_are_named(planted_directory, planted_probe, trigger_tokens):
    model = spikesink.load(planted_directory)
    weights = weights_of(model)
    found = evidence.tk3_not_elsewhere(model, weights, planted_probe, trigger_tokens, positions=(1, 9))
    assert found.measured["special_tokens_that_spike_anywhere"] == []  # the trigger is no special token yet
    model.tokenizer.add_special_tokens({"sep_token": planted.TRIGGER})
    found = evidence.tk3_not_elsewhere(model, weights, planted_probe, trigger_tokens, positions=(1, 9))
    assert found.measured["special_tokens"] == 1
    assert found.measured["special_tokens_that_spike_anywhere"] == [planted.TRIGGER]


def test_a_model_without_a_spike_gets_the_reason(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 16)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    weights = weights_of(random_model)
    found = firsttoken.probe(weights, life)
    assert isinstance(found, NotApplicable)
    assert evidence.tk1_nearly_any(found, torch.ones(400), found) is found
    assert evidence.tk3_not_elsewhere(random_model, weights, found, tokens) is found
    assert firsttoken.fork_of_probe(random_model, weights, life, found, tokens) is found
    assert firsttoken.replace_first(random_model, weights, found, tokens, torch.ones(400)) == (found, [])
    assert evidence.tk4_delimiters(random_model, weights, tokens, life, life.main) == NotApplicable(life.reason)


def test_bad_requests_are_named(planted_model, planted_probe, trigger_tokens):
    weights = weights_of(planted_model)
    some = torch.tensor([3])
    with pytest.raises(ValueError, match="block 13 does not exist; this model has blocks 1 to 12"):
        firsttoken.static_path(weights, some, 13)
    with pytest.raises(ValueError, match="block 0 does not exist; this model has blocks 1 to 12"):
        alone(planted_model, some, 0)
    for wrong in (-1, 400):
        with pytest.raises(ValueError, match=f"token {wrong} does not exist; this model's vocabulary has ids 0 to 399"):
            firsttoken.static_path(weights, torch.tensor([3, wrong]), 4)
        with pytest.raises(ValueError, match=f"token {wrong} does not exist"):
            alone(planted_model, torch.tensor([wrong]), 4)
    for wrong in (NOTHING, [1, 2], torch.tensor([1.0]), torch.tensor([[1]])):
        with pytest.raises(ValueError, match="tokens must be a one-dimensional tensor of token ids, and not empty"):
            firsttoken.static_path(weights, wrong, 4)
    with pytest.raises(ValueError, match="position 48 is not in windows of 48 tokens"):
        firsttoken.prefixes(trigger_tokens, 3, 48)
    with pytest.raises(ValueError, match="'' has no tokens; give a word"):
        firsttoken.try_word(planted_model, weights, planted_probe, "", trigger_tokens)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gpt_oss", "a learned logit takes part in each softmax of this gpt_oss model, also where one token is alone"),
        ("deepseek_v3", "the attention of this deepseek_v3 model has no W_K and W_V of its own"),
    ],
)
def test_where_a_token_alone_is_not_mapped_by_its_values_there_is_no_path(family, reason, tmp_path, planted_life):
    weights = weights_of(spikesink.load(tiny(family, tmp_path)))
    assert firsttoken.static_path(weights, torch.arange(5), 2) == NotApplicable(reason)
    about = weights.anatomy
    theirs = replace(planted_life, trace=replace(planted_life.trace, anatomy=about))
    assert firsttoken.probe(weights, theirs) == NotApplicable(reason)
