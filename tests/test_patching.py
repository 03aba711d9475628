"""Interventions against the model computed by hand, hooks that are gone afterwards, and generation under them."""

import math
from dataclasses import replace

import pytest
import torch
import transformers
from torch.nn import functional

import spikesink
from spikesink import patching
from spikesink.chain.sinks import score
from spikesink.model.anatomy import mlp
from spikesink.patching import add, apply, block, key, mask_key, query, read, readout, scale, set_to, skip, stream, zero
from spikesink.patching import attention as attention_
from spikesink.patching import hook as hook_
from spikesink.patching import value as value_
from spikesink.patching import write as write_
from spikesink.patching import z as z_
from spikesink.patching.outcome import Start, find_start, student_interval
from spikesink.serving.cache import Policy, forget
from tests import planted, survey
from tests.test_families import FAMILIES, SIZES, tiny

VECTOR = torch.linspace(-3, 3, 64)
KEYS = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.fixture(scope="module")
def tokens(random_model):
    return spikesink.windows(random_model, "house", 5, 24)


def seen(model, tokens, names, *interventions, **options):
    """What passes some hooks under interventions, and the logits."""
    passing = {}
    hooks = [(name, lambda value, hook: passing.update({hook.name: value.clone()})) for name in names]
    with torch.no_grad(), patching.patched(model, *interventions, **options), model.hooks(fwd_hooks=hooks):
        logits = model(tokens)
    return passing, logits


def by_hand(model, tokens, change):
    """Logits of the tiny Llama, layer by layer through transformers' own modules; `change` edits what passes.

    It is called as change(what, number, x) for "stream" (by point), "write" and "read" (by block), "query", "key",
    "value", "z" and "pattern" (by layer), and returns x or another.
    """
    body = model.original_model.model
    own = lambda module: getattr(module, "original_component", module)  # noqa: E731
    x = change("stream", 0, functional.embedding(tokens, own(body.embed_tokens).weight))
    n, length, _ = x.shape
    cos, sin = own(body.rotary_emb)(x, torch.arange(length)[None])
    mask = torch.full((length, length), -math.inf).triu(1)

    def norm(x, module, block):
        h = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + own(module).variance_epsilon)
        return change("read", block, h) * own(module).weight

    def turned(x):
        half = x.shape[-1] // 2
        return x * cos[:, None] + torch.cat([-x[..., half:], x[..., :half]], -1) * sin[:, None]

    for i, bridge in enumerate(body.layers):
        layer = own(bridge)
        attn, mlp = own(layer.self_attn), own(layer.mlp)
        h = norm(x, layer.input_layernorm, 2 * i + 1)
        named = {"query": attn.q_proj, "key": attn.k_proj, "value": attn.v_proj}
        heads = (change(name, i, (h @ own(w).weight.T).view(n, length, -1, attn.head_dim)) for name, w in named.items())
        q, k, v = (t.transpose(1, 2) for t in heads)
        q, k = turned(q), turned(k)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        pattern = (q @ k.transpose(2, 3) / attn.head_dim**0.5 + mask).softmax(-1)
        z = change("z", i, (change("pattern", i, pattern) @ v).transpose(1, 2)).reshape(n, length, -1)
        x = x + change("write", 2 * i + 1, z @ own(attn.o_proj).weight.T)
        x = change("stream", 2 * i + 1, x)
        h = norm(x, layer.post_attention_layernorm, 2 * i + 2)
        hidden = functional.silu(h @ own(mlp.gate_proj).weight.T) * (h @ own(mlp.up_proj).weight.T)
        x = x + change("write", 2 * i + 2, hidden @ own(mlp.down_proj).weight.T)
        x = change("stream", 2 * i + 2, x)
    h = norm(x, body.norm, 2 * len(body.layers) + 1)
    return h @ own(model.original_model.lm_head).weight.T


def edited(what, number, index, new):
    """A `change` for `by_hand` that puts a value, or what a function makes of the old one, somewhere."""

    def change(kind, n, x):
        if (kind, n) != (what, number):
            return x
        x = x.clone()
        x[index] = new(x[index]) if callable(new) else new
        return x

    return change


ALL = slice(None)


@pytest.mark.parametrize(
    ("intervention", "change"),
    [
        (zero(stream(block(4)), 0, [9, 30]), edited("stream", 4, (ALL, 0, [9, 30]), 0)),
        (zero(stream(block(0)), [0, 2], 7), edited("stream", 0, (ALL, [0, 2], 7), 0)),
        (scale(stream(block(5)), 2.5, 3), edited("stream", 5, (ALL, 3), lambda x: 2.5 * x)),
        (zero(stream(block(12)), 1), edited("stream", 12, (ALL, 1), 0)),
        (set_to(stream(block(6)), VECTOR[:3], 2, [1, 5, 60]), edited("stream", 6, (ALL, 2, [1, 5, 60]), VECTOR[:3])),
        (add(write_(block(8)), VECTOR, 1, factor=-0.5), edited("write", 8, (ALL, 1), lambda x: x - 0.5 * VECTOR)),
        (skip(block(4), [0, 1]), edited("write", 4, (ALL, [0, 1]), 0)),
        (set_to(read(block(3)), VECTOR, 2), edited("read", 3, (ALL, 2), VECTOR)),
        (set_to(readout(), VECTOR, 2), edited("read", 13, (ALL, 2), VECTOR)),
        (apply(query(2), torch.neg, heads=3), edited("query", 2, (ALL, ALL, 3), torch.neg)),
        (set_to(key(2), KEYS, 0), edited("key", 2, (ALL, 0), KEYS)),
        (zero(value_(3), 1, heads=1), edited("value", 3, (ALL, 1, 1), 0)),
        (zero(z_(3), [1, 4], heads=2), edited("z", 3, (ALL, [1, 4], 2), 0)),
    ],
    ids=lambda value: str(value) if isinstance(value, patching.Intervention) else "by hand",
)
def test_an_intervention_is_what_it_says(intervention, change, random_model, tokens):
    plain = by_hand(random_model, tokens, lambda what, number, x: x)
    torch.testing.assert_close(random_model(tokens), plain, rtol=0, atol=1e-4)
    expected = by_hand(random_model, tokens, change)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(seen(random_model, tokens, [], intervention)[1], expected, rtol=0, atol=1e-4)


def masked_by_hand(layers, keys, heads):
    def change(what, number, x):
        if what != "pattern" or number not in layers:
            return x
        x, part = x.clone(), x[:, heads].clone()
        part[..., keys] = 0
        total = part.sum(-1, keepdim=True)
        x[:, heads] = torch.where(total > 0, part / total, x[:, heads])
        return x

    return change


@pytest.mark.parametrize(
    ("layers", "keys", "heads"), [([2], [0], None), (range(6), [0, 3], None), ([1, 4], [2], [3, 0])]
)
def test_a_masked_key_leaves_the_softmax(layers, keys, heads, random_model, tokens):
    those = ALL if heads is None else heads
    expected = by_hand(random_model, tokens, masked_by_hand(list(layers), keys, those))
    names = [random_model.anatomy.pattern_hooks[layer] for layer in layers]
    patterns, logits = seen(random_model, tokens, names, mask_key(keys, layers, heads))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for pattern in patterns.values():
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        assert float(pattern[:, those][:, :, 4:, keys].abs().max()) == 0
        torch.testing.assert_close(pattern[:, :, 0, 0], torch.ones(pattern.shape[:2]))  # it has nobody else


def test_positions_and_values_can_differ_between_windows_and_places(random_model, tokens):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[1, 4] = mask[3, 2] = mask[3, 5] = True
    values = torch.arange(2 * 3 * 64).float().reshape(2, 3, 64)
    names, site = ["blocks.1.hook_in", "blocks.3.hook_in"], stream([block(2), block(6)])
    clean = seen(random_model, tokens, names)[0]
    for at, index in ((mask, mask), ([4, 6, 9], (ALL, [4, 6, 9]))):
        passing = seen(random_model, tokens, names, set_to(site, values, at))[0]
        for place, name in enumerate(names):
            assert torch.equal(passing[name][index], values[place].expand_as(passing[name][index]))
        untouched = ~mask if at is mask else (ALL, [0, 5, 23])
        assert torch.equal(passing[names[0]][untouched], clean[names[0]][untouched])
    # In a batch that starts in the middle, the positions before it have been counted.
    late = seen(random_model, tokens[3:], names, set_to(site, values, mask), rows=range(3, 5))[0]
    assert torch.equal(late[names[1]][0, [2, 5]], values[1, 1:])
    with pytest.raises(ValueError, match="of 5 windows, but the model was given 2"):
        seen(random_model, tokens[:2], [], zero(site, mask))


def test_a_masked_key_stays_masked_when_a_sliding_window_moves_on(tmp_path):
    """Layers that see 8 tokens back keep no more of a cache, so the place of a key in it moves."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    model = spikesink.load(planted.save(transformers.MistralForCausalLM(config).eval(), tmp_path / "sliding"))
    grown = prompt = spikesink.windows(model, "house", 1, 12)
    assert model.anatomy.sight == (8, 8, 8)
    with torch.no_grad(), patching.patched(model, mask_key([9, 14], range(3))):
        logits, cache = model(prompt, return_type="logits_and_cache", use_cache=True)
        for _ in range(6):
            torch.testing.assert_close(logits[:, -1], model(grown)[:, -1], rtol=0, atol=1e-5)
            step = logits[:, -1:].argmax(-1)
            grown = torch.cat([grown, step], dim=1)
            logits, cache = model(step, past_key_values=cache, return_type="logits_and_cache")
    assert float((model(grown)[:, -1] - logits[:, -1]).abs().max()) > 1e-5  # the mask was felt


def test_interventions_act_in_their_order(random_model, tokens):
    site, name, between = stream(block(4)), "blocks.2.hook_in", "blocks.2.ln2.hook_in"
    write = random_model.anatomy.write_hooks[4]
    double, plus = scale(site, 2.0, 1), add(site, VECTOR, 1)
    clean = seen(random_model, tokens, [name])[0][name][:, 1]
    torch.testing.assert_close(seen(random_model, tokens, [name], double, plus)[0][name][:, 1], 2 * clean + VECTOR)
    torch.testing.assert_close(seen(random_model, tokens, [name], plus, double)[0][name][:, 1], 2 * (clean + VECTOR))
    # The stream between attention and FFN is changed after what enters the layer, whatever order they were named in.
    late, written = scale(stream(block(5)), 3.0, 1), seen(random_model, tokens, [write], double)[0][write][:, 1]
    for cuts in ((late, double), (double, late)):
        passing = seen(random_model, tokens, [name, between], *cuts)[0]
        torch.testing.assert_close(passing[between][:, 1] / 3, passing[name][:, 1] + written)


@pytest.mark.parametrize("point", [0, 4, 5, 12])
@pytest.mark.parametrize("at", [None, [0, 7]])
def test_zero_strength_is_the_clean_run_bit_for_bit(point, at, random_model, tokens):
    site, clean = stream(block(point)), patching.evaluate(random_model, tokens)
    for cut in (scale(site, 1.0, at), add(site, VECTOR, at, factor=0.0), scale(attention_(range(6)), 1.0, at)):
        assert torch.equal(seen(random_model, tokens, [], cut)[1], random_model(tokens))
        outcome = patching.evaluate(random_model, tokens, cut)
        assert torch.equal(outcome.loss, clean.loss)
        assert (float(outcome.divergence.abs().max()), outcome.agreement) == (0, 1)


def test_hooks_are_gone_afterwards_also_after_an_exception(random_model, tokens):
    clean, body = random_model(tokens), random_model.original_model.base_model
    n_pre = len(body._forward_pre_hooks)
    with patching.patched(random_model, zero(stream(block(5)), 0)):
        random_model(tokens)
    with pytest.raises(ZeroDivisionError), patching.patched(random_model, zero(stream(block(5)), 0)):
        random_model(tokens[:, : 1 // 0])
    with pytest.raises(ZeroDivisionError):
        patching.evaluate(random_model, tokens, apply(stream(block(8)), lambda x: 1 // 0))
    assert torch.equal(random_model(tokens), clean)
    assert len(body._forward_pre_hooks) == n_pre
    assert not any(point.fwd_hooks for point in random_model.hook_dict.values())
    assert all(type(layer).__name__ == "BlockBridge" for layer in body.layers)


CUTS_WHILE_WRITING = [
    (zero(stream(block(4)), 0, [3, 9]),),
    (scale(stream(block(5)), 0.2),),
    (mask_key(0, range(6)),),
    (set_to(key(range(6)), KEYS, 0), zero(value_([2, 3]), [0, 1], heads=1)),
    (skip(block(6), [2, 17, 18]), mask_key([5, 16], [1, 2], [0, 3])),
    (set_to(readout(), VECTOR, 15),),
]


@pytest.mark.parametrize("cuts", CUTS_WHILE_WRITING, ids=lambda cuts: "; ".join(map(str, cuts)))
def test_generation_with_a_cache_is_generation_without_and_step_by_step(cuts, random_model, tokens):
    grown, written = tokens[:2, :16], []
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    for cached in (True, False):
        with patching.patched(random_model, *cuts):
            written.append(random_model.generate(grown, use_past_kv_cache=cached, **options))
    assert torch.equal(*written)
    for _ in range(8):
        logits = seen(random_model, grown, [], *cuts, rows=range(2))[1]
        grown = torch.cat([grown, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written[0], grown)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_take_effect_in_every_family(family, tmp_path):
    """At every site that a family has, what later hooks see is what was put in; and a later start gives the same."""
    model = spikesink.load(tiny(family, tmp_path))
    anatomy, tokens = model.anatomy, spikesink.windows(model, "house", 2, 12)
    clean = model(tokens)
    keys = torch.linspace(-1, 1, anatomy.n_kv_heads * 16).reshape(-1, 16)
    sites = {
        "stream": set_to(stream(block(2)), VECTOR, 3),
        "last stream": scale(stream(block(6)), 3.0, 3, 5),
        "write": set_to(write_([block(3), block(4)]), VECTOR, 3),
        "readout": set_to(readout(), VECTOR, 3),
        "key": set_to(key(1), keys, 3),
        "value": set_to(value_(1), keys, 3),
        "z": zero(z_(1), 3, heads=2),
        "mask": mask_key(0, [1]),
    }
    if anatomy.attention_norm is not None:
        sites["read"] = set_to(read(block(3)), VECTOR, 3)
    if not anatomy.parallel:
        sites["stream between"] = set_to(stream(block(3)), VECTOR, 3)
    assert find_start(model, tokens, [1, 2]) is not None
    outcomes = patching.compare(model, tokens, sites)
    for name, cut in sites.items():
        changed = seen(model, tokens, [], cut)[1]
        assert not torch.equal(changed[:, 3:], clean[:, 3:]), name
        if name != "mask":
            torch.testing.assert_close(changed[:, :3], clean[:, :3], rtol=0, atol=1e-5)
        loss = functional.cross_entropy(changed[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        torch.testing.assert_close(outcomes[name].loss, loss, rtol=1e-5, atol=1e-5)
    hook = anatomy.layer_hooks[2]
    entered = seen(model, tokens, [hook], set_to(stream(block(4)), VECTOR, 3))[0][hook]
    assert torch.equal(entered[:, 3], VECTOR.expand(2, -1))


def test_a_later_start_is_a_whole_run_bit_for_bit(random_model, tokens):
    hooks, start = random_model.anatomy.layer_hooks, find_start(random_model, tokens, range(6))
    whole, logits = seen(random_model, tokens, hooks)
    for layer in range(1, 6):
        ran = []
        watch = [(name, lambda value, hook, ran=ran: ran.append(hook.name)) for name in hooks[:-1]]
        with start.at(layer, whole[hooks[layer]]), random_model.hooks(fwd_hooks=watch):
            assert torch.equal(random_model(tokens), logits)
        assert ran == list(hooks[layer:-1])  # the layers before it did not run


def test_where_a_later_start_gives_something_else_every_run_is_whole(random_model, tokens, monkeypatch):
    cuts = {"late": zero(stream(block(8)), 0), "early": skip(block(1), 0)}
    quick, at = patching.compare(random_model, tokens, cuts), Start.at
    monkeypatch.setattr(Start, "at", lambda self, layer, entered: at(self, layer, 2 * entered))
    assert find_start(random_model, tokens, [4]) is None
    whole = patching.compare(random_model, tokens, cuts)
    for name, outcome in quick.items():
        for part in ("loss", "score", "largest"):
            assert torch.equal(getattr(outcome, part), getattr(whole[name], part))


def test_an_outcome_is_what_it_says(random_model, tokens):
    cut, anatomy = zero(stream(block(4)), 0), random_model.anatomy
    passing, logits = seen(random_model, tokens, [*anatomy.layer_hooks, *anatomy.pattern_hooks], cut)
    outcome = patching.evaluate(random_model, tokens, cut, epsilon=0.25)
    p, q = (of.double().log_softmax(-1)[:, :-1] for of in (random_model(tokens), logits))
    loss = -q.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(outcome.loss.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.divergence.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
    assert torch.equal(outcome.agrees, p.argmax(-1) == q.argmax(-1))
    assert outcome.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-5)
    pattern = torch.stack([passing[name] for name in anatomy.pattern_hooks], 1)  # window, layer, head, query, key
    score = pattern.sum(3) / torch.arange(24, 0, -1)
    torch.testing.assert_close(outcome.score, score[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.attention, score.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.sinks, (score > 0.25).float().mean((0, 2)))
    assert outcome.sink_ratio == pytest.approx(float((score[..., 0] > 0.25).float().mean()))
    size = torch.stack([passing[name].abs().amax(-1) for name in anatomy.layer_hooks]).amax(0)
    assert torch.equal(outcome.largest, size)
    assert outcome.max_activation == pytest.approx(float(size.amax(1).median()))
    assert str(outcome).startswith(f"{cut}: perplexity ")


def test_windows_may_come_in_batches(random_model, tokens, monkeypatch):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[1, 2] = mask[4, 0] = True
    cut = zero(stream(block(4)), mask)
    together = patching.evaluate(random_model, tokens, cut)
    monkeypatch.setattr("spikesink.patching.outcome.batches", lambda *_: [range(0, 2), range(2, 3), range(3, 5)])
    apart = patching.evaluate(random_model, tokens, cut)
    torch.testing.assert_close(apart.loss, together.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart.score, together.score, rtol=1e-5, atol=1e-6)


def test_intervals_are_bootstrapped_over_windows(random_model, tokens):
    outcome = patching.evaluate(random_model, tokens)
    by_window = outcome.loss.mean(1).exp()
    low, high = outcome.interval()
    assert float(by_window.min()) <= low < outcome.perplexity < high <= float(by_window.max())
    assert outcome.interval() == (low, high)
    one = patching.evaluate(random_model, tokens[:1])
    assert all(math.isnan(end) for end in (*one.interval(), *one.times(one)))


def test_what_windows_differ_in_among_themselves_does_not_widen_a_paired_interval(random_model, tokens):
    clean = patching.evaluate(random_model, tokens)
    worse = replace(clean, loss=clean.loss + math.log(2))
    assert worse.times(clean) == pytest.approx((2, 2))
    uneven = replace(clean, loss=clean.loss + torch.linspace(0, 1, len(tokens))[:, None])
    low, high = uneven.times(clean)
    assert 1 < low < uneven.perplexity / clean.perplexity < high < math.e
    with pytest.raises(ValueError, match="evaluate both on the same windows"):
        clean.times(patching.evaluate(random_model, tokens[:1]))


def test_an_interval_of_few_windows_is_students():
    nats = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).numpy()
    covered = [low <= 1 <= high for low, high in map(student_interval, nats)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)


def test_a_sweep_is_a_tidy_table(random_model, tokens):
    doses = {dose: scale(stream(block(4)), dose, 0) for dose in (0.0, 1.0, 2.0)}
    frame = patching.sweep(random_model, tokens, doses, over="dose")
    assert (frame.index.tolist(), frame.index.name) == (["clean", 0.0, 1.0, 2.0], "dose")
    assert frame.loc[0.0, "kl"] > 0
    assert frame.loc[2.0, "perplexity"] == patching.evaluate(random_model, tokens, doses[2.0]).perplexity


def test_means_are_of_the_given_windows_and_positions(random_model, tokens):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = mask[2, 9] = True
    names = ["blocks.2.hook_in", "blocks.4.hook_in", "blocks.1.attn.k.hook_out"]
    passing = seen(random_model, tokens, names)[0]
    point, keys = passing[names[0]], passing[names[2]]
    for given, expected in (
        ((stream([block(4), block(8)]), mask), torch.stack([passing[name][mask].mean(0) for name in names[:2]])),
        ((stream(block(4)), [0, 2], [5, 1]), point[:, [0, 2]][..., [5, 1]].mean((0, 1))[None]),
        ((key(1), mask), keys[mask].mean(0)[None]),
        ((key(1), None, None, 1), keys[:, :, [1]].mean((0, 1))[None]),
    ):
        torch.testing.assert_close(patching.mean_of(random_model, tokens, *given), expected)


def test_activation_patching_puts_one_prompt_into_another(random_model, tokens):
    source, target, names = tokens[0], tokens[1:2], ["blocks.2.hook_in", "blocks.1.attn.v.hook_out"]
    own = seen(random_model, source[None], names)[0]
    cut = patching.patch_from(random_model, source, stream(block(4)), [2, 3], [7, 5])
    passing = seen(random_model, target, names, cut)[0]
    torch.testing.assert_close(passing[names[0]][0, [7, 5]], own[names[0]][0, [2, 3]])
    values = patching.patch_from(random_model, source, value_(1), 4)
    assert torch.equal(seen(random_model, target, names, values)[0][names[1]][0, 4], own[names[1]][0, 4])
    # All of a prompt's stream put in is that prompt's own run from there on.
    whole = patching.patch_from(random_model, source, stream(block(4)), range(24))
    torch.testing.assert_close(seen(random_model, target, [], whole)[1], random_model(source[None]))
    with pytest.raises(ValueError, match="2 positions were recorded"):
        patching.patch_from(random_model, source, stream(block(4)), [2, 3], 7)


def test_any_hook_can_be_named(random_model, tokens):
    cut, name = zero(hook_("blocks.3.mlp.hook_post"), 2, range(40)), "blocks.3.mlp.out.hook_in"
    clean, changed = (seen(random_model, tokens, [name], *cuts)[0][name] for cuts in ((), (cut,)))
    assert float(changed[:, 2, :40].abs().max()) == 0
    assert torch.equal(changed[:, 2, 40:], clean[:, 2, 40:])


FOUR = stream(block(4))


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: zero(stream(block(13))), "block 13.* does not exist; this model has blocks 0 to 12"),
        (lambda: zero(read(block(13))), "blocks 1 to 12"),
        (lambda: mask_key(0, [2, -1]), "layer -1 does not exist"),
        (lambda: zero(stream(24)), r"write block\(24\) if it is L11 MLP"),
        (lambda: skip([block(3), 4]), r"or attn\(4\) or mlp\(4\)"),
        (lambda: zero(key(block(4))), "a layer is wanted"),
        (lambda: zero(FOUR, 0, -1), "channel -1 does not exist"),
        (lambda: zero(FOUR, 0, heads=1), "has channels; name them as channels="),
        (lambda: zero(key(2), 0, heads=1.5), "1.5 is no head"),
        (lambda: zero(FOUR, 24), "position 24 does not exist; there are positions 0 to 23"),
        (lambda: zero(FOUR, []), "no position was given"),
        (lambda: zero(FOUR, True), "True is no position"),
        (lambda: zero(FOUR, torch.zeros(5, 24).bool()), "mask of positions is empty"),
        (lambda: zero(FOUR, torch.ones(3, 24).bool()), "are of 3 windows, but there are 5"),
        (lambda: set_to(FOUR, torch.ones(63)), r"values are \[63\], but the stream .* \[64\]"),
        (lambda: set_to(key(2), torch.ones(16)), r"shape \[16\] do not fit the keys of layer 2"),
        (lambda: set_to(FOUR, torch.ones(1, 3, 64), [0, 1]), "for 3 positions, but it is 2"),
        (lambda: set_to(FOUR, 3.0), "values must be a tensor"),
        (lambda: add(FOUR, VECTOR, factor="2"), "a factor must be a number"),
        (lambda: apply(FOUR, lambda x: x[..., :3]), "the shape must stay the same"),
        (lambda: apply(attention_(2), torch.neg, 0), "attention can be scaled or masked"),
        (lambda: mask_key(None, 2), "with every key masked no attention is left"),
        (lambda: zero(hook_("blocks.9.hook_in")), "this llama model has no hook blocks.9.hook_in"),
        (lambda: set_to(hook_("blocks.1.hook_in"), torch.ones(63), 0), "which does not fit: replace"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(make, said, random_model, tokens):
    with pytest.raises(ValueError, match=said) as raised:
        patching.evaluate(random_model, tokens, make())
    assert "\n" not in str(raised.value)


@pytest.mark.usefixtures("any_types")
def test_positions_may_be_numbers_or_masks_of_any_kind():
    for at in ([1, 3], (1, 3), torch.tensor([1, 3]), torch.tensor([False, True, False, True]).numpy(), range(1, 4, 2)):
        assert zero(FOUR, at).positions.same == (1, 3)
    assert zero(FOUR, [False, True]).positions.same == (1,)
    assert zero(FOUR, [[True, False], [True, True]]).positions.by_window == ((0,), (0, 1))
    assert len({zero(FOUR, 0, 7), zero(stream([block(4)]), [0], [7])}) == 1


@pytest.mark.usefixtures("any_types")
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (lambda m, t, cut: patching.evaluate(m, t.float(), cut), "a tensor of token ids"),
        (lambda m, t, cut: patching.evaluate(m, t, [cut, cut]), r"\*cuts"),
        (lambda m, t, cut: patching.evaluate(m, t[:, :0], cut), "and not empty"),
        (lambda m, t, cut: patching.evaluate(m, t + 400, cut), "vocabulary has ids 0 to 399"),
        (lambda m, t, cut: patching.sweep(m, t, [cut]), "a dictionary"),
        (lambda m, t, cut: patching.compare(m, t, {"clean": cut}), "the run without any cut"),
        (lambda m, t, cut: patching.view(m, t, cut), r"one prompt is wanted, but tokens are \[5, 24\]"),
        (lambda m, t, cut: patching.record(m, t, FOUR, 0), "one prompt is wanted"),
        (lambda m, t, cut: patching.mean_of(m, t, attention_(2), 0), "attention is not averaged"),
    ],
)
def test_what_is_no_model_no_token_and_no_cut_is_said(run, said, random_model, tokens):
    with pytest.raises(ValueError, match=said):
        run(random_model, tokens, skip(block(4)))


def test_what_takes_no_effect_is_told(random_model, tokens):
    """The bridge has hooks that only fire where an option is set; an intervention there would do nothing, silently."""
    with pytest.raises((RuntimeError, ValueError), match=r"hook_result|not to be seen"):
        patching.evaluate(random_model, tokens, zero(hook_("blocks.1.attn.hook_result")))
    cut = skip(block(4), 30)
    with (
        pytest.raises(RuntimeError, match="no token stood at any of its positions"),
        patching.patched(random_model, cut),
    ):
        random_model(tokens)
    with patching.patched(random_model, cut):
        pass  # nothing ran, so nothing could take effect


@pytest.mark.parametrize(
    ("family", "site", "said"),
    [("gpt_neox", stream(block(3)), "read the same stream"), ("olmo2", read(block(3)), "read the stream itself")],
)
def test_families_without_a_place_say_so(family, site, said, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    with pytest.raises(ValueError, match=said):
        patching.evaluate(model, spikesink.windows(model, "house", 1, 12), zero(site))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_a_cut_in_generation_is_the_same_with_a_cache(family, tmp_path):
    """OPT's head calls what is inside the body, so that nothing is heard of the body itself."""
    model = spikesink.load(tiny(family, tmp_path))
    for weight in model.original_model.parameters():
        if weight.ndim > 1:
            weight.copy_(0.3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())))
    tokens = torch.arange(10, 22)[None]
    how = dict(max_new_tokens=8, do_sample=False, stop_at_eos=False, return_type="tokens", verbose=False)
    with patching.patched(model, patching.set_to(write_(mlp(1)), 3 * torch.ones(64), [0, 1])):
        assert torch.equal(model.generate(tokens, **how), model.generate(tokens, use_past_kv_cache=False, **how))
    with (
        pytest.raises(RuntimeError, match="no token stood at any of its positions"),
        patching.patched(model, zero(write_(mlp(1)), 50)),
    ):
        model(tokens)


@pytest.mark.parametrize(("family", "said"), [("Qwen3Next", "8 vectors a token, not one for each head")])
def test_queries_that_come_with_something_else_are_not_cut_by_head(family, said, tmp_path):
    model = spikesink.load(planted.save(survey.build(f"{family}ForCausalLM"), tmp_path))
    with pytest.raises(ValueError, match=said):
        patching.evaluate(model, torch.arange(10, 40)[None], zero(query(3), heads=[3]))


def test_a_recurrent_cache_has_no_positions_for_cuts(tmp_path):
    model = spikesink.load(planted.save(survey.build("MambaForCausalLM"), tmp_path))
    with pytest.raises(ValueError, match="does not count tokens"), patching.patched(model, zero(stream(mlp(1)), 0)):
        model.generate(torch.arange(10, 20)[None], max_new_tokens=3, verbose=False)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "gpt_neox"])
@pytest.mark.parametrize("site", ["stream", "write", "read", "key", "value", "z", "attention", "forget"])
def test_a_cut_does_to_a_prompt_what_it_does_to_it_alone(family, site, tmp_path):
    model = spikesink.load(tiny(family, tmp_path))
    torch.manual_seed(0)
    for weight in model.original_model.parameters():
        if weight.ndim > 1:  # what a cut changes is to change what comes next
            weight.copy_(0.3 * torch.randn_like(weight))
    heads = {"key": model.anatomy.n_kv_heads, "value": model.anatomy.n_kv_heads, "z": 4}
    ones = torch.ones(heads[site], 16) if site in heads else torch.ones(64)
    if site == "forget":
        [cut] = forget(model, Policy(2, (0,)))
    elif site == "attention":
        cut = patching.mask_key([0, 1], 1)
    else:
        cut = patching.set_to(getattr(patching, site)(1 if site in heads else mlp(1)), 3 * ones, [0, 1])
    prompts = ["a word and then another one, and more of them", "so short", "in between these two"]

    def generate(given):
        with patching.patched(model, cut):
            return model.generate(given, max_new_tokens=5, do_sample=False, verbose=False)

    alone = [generate(prompt) for prompt in prompts]
    assert list(generate(prompts)) == alone
    assert alone != list(model.generate(prompts, max_new_tokens=5, do_sample=False, verbose=False))


def test_what_is_no_prompt_is_refused_in_a_sentence(random_directory):
    random_model = spikesink.load(random_directory)
    random_model.tokenizer.pad_token = random_model.tokenizer.convert_ids_to_tokens(7)
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        random_model.generate("", max_new_tokens=1, verbose=False)
    tokens, pad = spikesink.windows(random_model, "house", 3, 24), 7
    tokens[1, :3] = pad
    for measured in (spikesink.trace_windows, score):
        with pytest.raises(ValueError, match="window 1 is padded"):
            measured(random_model, tokens)
