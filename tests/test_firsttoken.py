"""The static path against whole forward passes, in every family; the probe against a spike that was planted."""

import math
from dataclasses import replace

import pytest
import torch
import transformers

import spikesink
from spikesink.chain import firsttoken
from spikesink.ledger import evidence
from spikesink.model import paths
from spikesink.model.anatomy import block, mlp
from spikesink.model.weights import weights_of
from tests import planted
from tests.test_families import FAMILIES, tiny


@pytest.fixture(scope="module")
def planted_probe(planted_model, planted_life):
    return firsttoken.probe(weights_of(planted_model), planted_life)


def forward(model, tokens, last):
    """The same by whole forward passes, at every point: tokens with nothing before them."""
    return paths.after_text(model, tokens, torch.zeros(len(tokens), 0, dtype=torch.long), last)


def shake(model):
    """Give norms and biases values that are not all ones and zeros."""
    with torch.no_grad():
        for name, parameter in model.original_model.named_parameters():
            if "norm" in name or "bias" in name or "ln_" in name:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_tokens_path_is_static_in_every_family(family, tmp_path, monkeypatch):
    """Point by point, in batches of three tokens; tokens 0 and 4 are the same one."""
    monkeypatch.setattr(paths, "BATCH", 3)
    model, tokens, points = spikesink.load(tiny(family, tmp_path)), torch.tensor([5, 399, 0, 77, 5]), {}
    shake(model)
    weights, whole = weights_of(model), forward(model, tokens, 6)
    last = paths.static_path(weights, tokens, 6, watch=lambda p, _, x: points.setdefault(p, []).append(x.clone()))
    path = torch.stack([torch.cat(points[point]) for point in range(7)])
    torch.testing.assert_close(path, whole, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(last, path[6], rtol=0, atol=0)
    torch.testing.assert_close(paths.static_path(weights, tokens, 1), path[1])
    torch.testing.assert_close(last[0], last[4], rtol=1e-5, atol=1e-6)  # rows of a product may round apart
    result = evidence.tk2_static_map(paths.compare_static_map(model, spikesink.windows(model, "house", 3, 24)))
    assert result.measured["max_relative_error"] < 1e-5
    assert result.control["median_relative_error_later_positions"] > 100 * result.measured["max_relative_error"]
    assert (result.measured["layers"], result.measured["windows"]) == (3, 3)


def test_a_residual_multiplier_counts_for_biases_and_for_any_ffn(tmp_path):
    config = transformers.GraniteConfig(**FAMILIES["granite"][1], attention_bias=True, mlp_bias=True)
    torch.manual_seed(0)
    model = spikesink.load(planted.save(transformers.GraniteForCausalLM(config).eval(), tmp_path / "granite"))
    shake(model)
    tokens, weights = torch.tensor([5, 9]), weights_of(model)
    for gate in ("silu", None):  # with its gated FFN, and as if it had none
        model.anatomy = replace(model.anatomy, gate_activation=gate)
        stream = paths.static_path(weights, tokens, 6)
        torch.testing.assert_close(stream, forward(model, tokens, 6)[-1], rtol=1e-4, atol=1e-5)


def test_the_largest_error_of_all_windows_counts(planted_model, trigger_tokens, monkeypatch):
    """A map that is wrong in one layer, for the trigger alone, which stands first in two of six windows."""
    weights = weights_of(planted_model)
    maps = [weights.attention(layer) for layer in range(6)]
    maps[0] = replace(maps[0], value=maps[0].value.index_add(1, torch.tensor([0]), torch.ones(len(maps[0].value), 1)))
    monkeypatch.setattr(type(weights), "attention", lambda self, layer: maps[layer])
    static_map = paths.compare_static_map(planted_model, trigger_tokens)
    assert (static_map.at_first[0] > 0.1).tolist() == [False, True, False, False, False, True]
    assert evidence.tk2_static_map(static_map).measured["max_relative_error"] > 0.1


def test_the_probe_is_what_real_forward_passes_give_on_the_default_model(default_model):
    """A random sample of the vocabulary; in bfloat16 the same entries spike."""
    tokens = spikesink.windows(default_model, "house", 2, 32)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    weights = weights_of(default_model)
    some = torch.randperm(weights.anatomy.d_vocab, generator=torch.Generator().manual_seed(1))[:96]
    some = torch.cat([some, torch.tensor(default_model.tokenizer.convert_tokens_to_ids(['["', "!["]))])
    probe = firsttoken.probe(weights, life, some)
    real = probe.read(forward(default_model, some, life.main.step_up[-1])[-1])
    torch.testing.assert_close(probe.value, real, rtol=1e-4, atol=0.05)
    assert probe.spiking.tolist() == [True] * 96 + [False] * 2
    assert probe.exceptions().tolist() == some[96:][probe.value[96:].argsort()].tolist()
    assert torch.equal(firsttoken.probe(weights, life, some, torch.bfloat16).spiking, probe.spiking)


def test_the_probe_finds_the_planted_trigger_and_nothing_else(tmp_path, trigger_tokens):
    """It needs no first place, and the measures say so: claims that this model does not meet."""
    plant = planted.Plant(size=-1000.0, step_up_layers=(1, 2))
    model = spikesink.load(planted.save(planted.plant(planted.random_llama(400), plant), tmp_path))
    life = spikesink.find_lifecycle(spikesink.trace_windows(model, trigger_tokens))
    probe = firsttoken.probe(weights_of(model), life)
    assert probe.exceptions().tolist() == [1]
    assert (probe.block, probe.sign) == (mlp(2), -1)
    assert float(probe.value[1]) == pytest.approx(1000, rel=1e-3)
    assert probe.threshold == pytest.approx(0.1 * abs(life.main.value))
    elsewhere = firsttoken.place_elsewhere(model, trigger_tokens, probe, positions=(1, 9))
    counts = torch.ones(400, dtype=torch.long)
    counts[1] = 401
    nearly = evidence.tk1_nearly_any(probe, counts, elsewhere)
    assert (nearly.measured["spiking"], nearly.measured["share"]) == (1, 1 / 400)
    assert nearly.measured["share_of_text"] == pytest.approx(401 / 800)
    assert nearly.control == {"share_before_step_up": 0.0, "share_after_a_text": 1.0}
    later = evidence.tk3_not_elsewhere(elsewhere)
    assert later.measured["share_elsewhere"] == later.control["share_at_position_0"] == 1
    assert later.measured["share_by_position"] == [[1, 1.0], [9, 1.0]]
    for word, spikes in ((planted.TRIGGER, "6 of 6"), ("a", "0 of 6")):
        assert firsttoken.try_word(model, trigger_tokens, probe, word)["spikes there, windows"].tolist() == [spikes]


def test_exceptions_and_quiet_tokens_come_in_order():
    value = torch.tensor([50.0, -1.0, 9.0, 70.0, 3.0, 40.0])
    tokens = torch.tensor([11, 12, 13, 14, 15, 16])
    probe = firsttoken.Probe(block(4), 9, 1.0, 10.0, tokens, value, torch.zeros(6))
    assert probe.exceptions().tolist() == [12, 15, 13]
    counts = torch.zeros(20, dtype=torch.long)
    assert firsttoken.quiet_tokens(probe, counts).tolist() == [12, 15, 13]  # none occurs: the smallest first
    counts[[13, 14]] = torch.tensor([1, 5])
    assert firsttoken.quiet_tokens(probe, counts, 2).tolist() == [13, 12]
    assert replace(probe, threshold=45.0).exceptions().tolist() == [14, 11]  # of those that spike, the largest first


def test_special_tokens_that_spike_anywhere_are_named(planted_directory, planted_probe, trigger_tokens):
    model = spikesink.load(planted_directory)
    assert firsttoken.place_elsewhere(model, trigger_tokens, planted_probe).anywhere == ()  # the trigger is none yet
    model.tokenizer.add_special_tokens({"sep_token": planted.TRIGGER})
    result = evidence.tk3_not_elsewhere(firsttoken.place_elsewhere(model, trigger_tokens, planted_probe))
    assert result.measured["special_tokens"] == 1
    assert result.measured["special_tokens_that_spike_anywhere"] == [planted.TRIGGER]


def test_on_the_default_model_the_first_place_is_what_counts(default_model):
    tokens = spikesink.windows(default_model, "house", 4, 40)
    life = spikesink.find_lifecycle(spikesink.trace_windows(default_model, tokens))
    probe = firsttoken.probe(weights_of(default_model), life, torch.arange(500, 540))
    elsewhere = firsttoken.place_elsewhere(default_model, tokens, probe, n=24, positions=(2, 16))
    assert elsewhere.share[0] == 1
    assert evidence.tk3_not_elsewhere(elsewhere).measured["share_elsewhere"] <= 0.05
    fork = firsttoken.trace_fork(default_model, tokens, life, probe, n=16)
    assert fork.first.shape == fork.later.shape == (life.main.step_up[-1] + 1, 16)
    torch.testing.assert_close(fork.first[0], fork.later[0])  # the same embeddings
    embedded = torch.nn.functional.normalize(weights_of(default_model).embed(fork.tokens), dim=-1)
    pairs = (embedded @ embedded.T)[~torch.eye(16, dtype=torch.bool)]
    assert float(fork.alike_first[0]) == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert (fork.first[fork.block - 1] > 0.4).all()
    assert (fork.later[fork.block - 1].abs() < 0.2).all()


def test_where_the_paths_part_is_told():
    first = torch.tensor([[0.0, 0.1], [0.2, 0.3], [0.3, 0.2], [0.9, 0.8], [0.0, 0.0]])
    later = torch.tensor([[0.0, 0.1], [0.1, 0.0], [0.25, 0.2], [0.1, 0.1], [0.0, 0.0]])
    alike = torch.arange(1, 6) / 10
    fork = firsttoken.Fork(block(4), 8, torch.arange(2), first, later, torch.zeros(5, 0), alike, -alike)
    facts = firsttoken.describe_fork(fork)
    assert (facts["disjoint"], facts["rising_blocks"]) == (3, [1, 3])  # after block 1 they are not apart for good
    expected = {"first": 0.85, "later": 0.1, "alike_embedded": 0.1, "alike_first": 0.4, "alike_later": -0.4}
    assert {name: facts[name] for name in expected} == pytest.approx(expected)
    assert firsttoken.describe_fork(replace(fork, first=later, later=first))["disjoint"] == "no block"


def test_attention_to_oneself_is_the_diagonal_of_the_patterns(planted_model, trigger_tokens):
    about = planted_model.anatomy
    attention = firsttoken.read_self_attention(planted_model, trigger_tokens, 4, 9)
    _, cache = planted_model.run_with_cache(trigger_tokens)
    patterns = torch.stack([cache[name] for name in about.pattern_hooks[:2]])  # layer, window, head, query, key
    expected = patterns.diagonal(dim1=-2, dim2=-1).mean(2)
    torch.testing.assert_close(attention.by_layer, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.value, cache[about.layer_hooks[2]][..., 9], rtol=1e-5, atol=1e-3)
    negative = firsttoken.read_self_attention(planted_model, trigger_tokens, 4, 9, -1.0)
    assert torch.equal(negative.value, -attention.value)


def test_attention_is_compared_at_the_same_positions():
    own = torch.tensor([[1.0, 0.6, 0.2], [1.0, 0.4, 0.1]])
    tokens = torch.tensor([[4, 4, 5], [4, 5, 4]])
    value = torch.tensor([[9.0, 9.0, 9.0], [9.0, 0.0, 9.0]])
    attention = firsttoken.SelfAttention(tokens, torch.stack([own + 0.1, own - 0.1]), value)
    where = torch.tensor([[False, True, True], [False, True, False]])
    which = torch.tensor([[True, False, False], [True, True, True]])
    # Two of `where` stand at position 1 and one at 2: (2 * 0.4 + 1 * 0.1) / 3.
    assert attention.self_attention_at(which, where) == pytest.approx(0.3)
    assert attention.self_attention_at(which, where, 0) == pytest.approx(0.4)
    assert attention.self_attention_at(which, where, 1) == pytest.approx(0.2)
    assert math.isnan(attention.self_attention_at(torch.zeros(2, 3).bool(), where))
    assert attention.copies.tolist() == [[True, True, False], [True, False, False]]
    spikes, others = attention.later_spikes(5.0)
    assert spikes.tolist() == [[False, False, True], [False, False, True]]  # the copy at position 1 is in neither
    assert others.tolist() == [[False, False, False], [False, True, False]]


def test_delimiters_hold_no_letter_and_no_digit():
    assert all(map(firsttoken.is_delimiter, (".", "\n", " —")))
    assert not any(map(firsttoken.is_delimiter, ("", " the", "x)", "3", ". \ufffd")))


def test_what_spikes_where_something_else_stands_first_is_told(planted_model, planted_probe, trigger_tokens):
    """The trigger stands at positions 20, 47, 5 and 30 of three of six windows; what stands first changes nothing."""
    counts = torch.zeros(400, dtype=torch.long)
    counts[[50, 60]] = torch.tensor([2, 3])
    replaced = firsttoken.replace_first(planted_model, trigger_tokens, planted_probe, counts, 2)
    assert [int(attention.tokens[0, 0]) for _, attention in replaced[1:]] == [60, 50]
    (_, own), (_, other), _ = replaced
    assert torch.equal(other.tokens[:, 1:], trigger_tokens[:, 1:])
    decode = planted_model.tokenizer.decode
    table = firsttoken.first_replaced_table(replaced, planted_probe, decode)
    copies = [int(attention.copies.sum()) - 6 for _, attention in replaced]
    assert table["later spikes"].tolist() == [f"4 of {6 * 47 - n}" for n in copies]
    assert table["the commonest"].tolist() == [repr(planted.TRIGGER)] * 3
    later = trigger_tokens[:, 1:][~other.copies[:, 1:]].tolist()
    assert table["of all"][1] == pytest.approx(sum(firsttoken.is_delimiter(decode([t])) for t in later) / len(later))
    at = ([2, 3, 4, 4], [20, 47, 5, 30])
    assert table["attend to themselves"][0] == pytest.approx(float(own.mean[at].mean()), rel=1e-5)


def test_every_kind_of_token_is_measured_alike(tmp_path):
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
    delimiters = firsttoken.compare_delimiters(model, tokens, life, life.main)

    spiking = (tokens == ids[","]) | (tokens == ids["Ġthe"])
    kinds = [[firsttoken.is_delimiter(model.tokenizer.decode([t])) for t in window] for window in tokens.tolist()]
    delimiter, elsewhere = torch.tensor(kinds), torch.arange(64).repeat(8, 1) > 0
    elsewhere[1, 1] = False
    groups = {"spiking": spiking & delimiter, "words": spiking & ~delimiter}
    groups |= {"quiet": ~spiking & delimiter, "other": ~spiking & ~delimiter}
    groups = {name: which & elsewhere for name, which in groups.items()}
    _, cache = model.run_with_cache(tokens)
    patterns = [cache[f"blocks.{layer}.attn.hook_pattern"] for layer in (0, 1)]
    own = torch.stack([pattern.diagonal(dim1=-2, dim2=-1).mean(1) for pattern in patterns]).mean(0)
    cosine = torch.cosine_similarity(cache["blocks.0.hook_in"], model.blocks[0].ln1.weight, dim=-1)

    def matched(name, places):
        means = []
        for _, position in groups[places].nonzero().tolist():
            here = groups[name][:, position]
            means += [float(own[here, position].mean())] if here.any() else []
        return sum(means) / len(means)

    for name, which in groups.items():
        assert delimiters.n[name] == int(which.sum()) > 0
        assert delimiters.self_attention[name] == pytest.approx(matched(name, "spiking"), rel=1e-3, abs=1e-5)
        assert delimiters.scale_cosine[name] == pytest.approx(float(cosine[which].mean()), rel=1e-3, abs=1e-5)
    for name in ("words", "other"):
        assert delimiters.where_words_spike[name] == pytest.approx(matched(name, "words"), rel=1e-3, abs=1e-5)
    assert delimiters.n_types == 1
    result = evidence.tk4_delimiters(delimiters)
    assert result.measured["n_spiking_delimiters"] == delimiters.n["spiking"]
    assert result.control["self_attention_quiet_delimiters"] == delimiters.self_attention["quiet"]


def test_no_spiking_delimiter_is_a_reason(planted_model, planted_life, trigger_tokens):
    for cycle, reason in ((planted_life.main, "no delimiter spikes"), (None, "no smaller cycle")):
        delimiters = firsttoken.compare_delimiters(planted_model, trigger_tokens, planted_life, cycle)
        assert reason in evidence.tk4_delimiters(delimiters).reason


def test_bad_requests_are_named(planted_model, planted_probe, trigger_tokens):
    def static(model, tokens, last):
        return paths.static_path(weights_of(model), tokens, last)

    some = torch.tensor([3])
    refused = [(static, some, 13), (forward, some, 0)]
    refused += [(path, some + wrong, 4) for path in (static, forward) for wrong in (-4, 397)]
    for path, tokens, last in refused:
        with pytest.raises(ValueError, match=r"blocks 1 to 12|vocabulary"):
            path(planted_model, tokens, last)
    with pytest.raises(ValueError, match="48 tokens"):
        paths.prefixes(trigger_tokens, 3, 48)
    with pytest.raises(ValueError, match="give a word"):
        firsttoken.try_word(planted_model, trigger_tokens, planted_probe, "")


@pytest.mark.parametrize(
    ("family", "reason"), [("gpt_oss", "does not give a token alone"), ("deepseek_v3", "no W_K and W_V")]
)
def test_where_a_token_alone_is_not_mapped_by_its_values_there_is_no_path(family, reason, tmp_path, planted_life):
    weights = weights_of(spikesink.load(tiny(family, tmp_path)))
    theirs = replace(planted_life, trace=replace(planted_life.trace, anatomy=weights.anatomy))
    assert reason in firsttoken.probe(weights, theirs).reason
