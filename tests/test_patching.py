"""Interventions against the model computed by hand, hooks that are gone afterwards, and generation under them."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformer_lens import HookedRootModule
from transformer_lens.hook_points import HookPoint

import spikesink
from spikesink import patching
from spikesink.patching import block
from spikesink.patching.interventions import batches
from spikesink.patching.outcome import Start, find_start
from spikesink.patching.sites import Positions
from tests import planted
from tests.test_families import FAMILIES, SIZES, tiny
from tests.test_lifecycle import ANATOMY


@pytest.fixture(scope="module")
def tokens(random_model):
    return spikesink.windows(random_model, "house", 5, 24)


def seen(model, tokens, names, *interventions, **options):
    """What passes some hooks under interventions, and the logits."""
    found = {}
    hooks = [(name, lambda value, hook: found.update({hook.name: value.clone()})) for name in names]
    with torch.no_grad(), patching.patched(model, *interventions, **options), model.hooks(fwd_hooks=hooks):
        logits = model(tokens)
    return found, logits


def by_hand(model, tokens, change):
    """Logits of the tiny Llama, layer by layer through transformers' own modules; `change` edits what passes.

    It is called as change(what, number, x) for "stream" (by point), "write" and "read" (by block), "key", "value", "z"
    and "pattern" (by layer), and returns x or another.
    """
    body = model.original_model.model
    own = lambda module: getattr(module, "original_component", module)  # noqa: E731
    x = change("stream", 0, functional.embedding(tokens, own(body.embed_tokens).weight))
    n, length, _ = x.shape
    positions = torch.arange(length)[None]
    cos, sin = own(body.rotary_emb)(x, positions)
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
        q = (h @ own(attn.q_proj).weight.T).view(n, length, -1, attn.head_dim)
        k = change("key", i, (h @ own(attn.k_proj).weight.T).view(n, length, -1, attn.head_dim))
        v = change("value", i, (h @ own(attn.v_proj).weight.T).view(n, length, -1, attn.head_dim))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
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


def edited(what, number, edit):
    """A `change` for `by_hand` that edits one thing, in place on a copy."""

    def change(kind, n, x):
        if (kind, n) != (what, number):
            return x
        x = x.clone()
        edit(x)
        return x

    return change


def put(index, value):
    return lambda x: x.__setitem__(index, value)


VECTOR = torch.linspace(-3, 3, 64)
KEYS = torch.linspace(-1, 1, 32).reshape(2, 16)


@pytest.mark.parametrize(
    ("intervention", "change"),
    [
        (patching.zero(patching.stream(block(4)), 0, [9, 30]), edited("stream", 4, put((slice(None), 0, [9, 30]), 0))),
        (patching.zero(patching.stream(block(5)), 3), edited("stream", 5, put((slice(None), 3), 0))),
        (patching.zero(patching.stream(block(0)), [0, 2], 7), edited("stream", 0, put((slice(None), [0, 2], 7), 0))),
        (patching.zero(patching.stream(block(12)), 1), edited("stream", 12, put((slice(None), 1), 0))),
        (patching.scale(patching.stream(block(6)), 2.5, 4), edited("stream", 6, lambda x: x[:, 4].mul_(2.5))),
        (patching.set_to(patching.stream(block(7)), VECTOR), edited("stream", 7, put(slice(None), VECTOR))),
        (
            patching.set_to(patching.stream(block(6)), VECTOR[:3], 2, [1, 5, 60]),
            edited("stream", 6, put((slice(None), 2, [1, 5, 60]), VECTOR[:3])),
        ),
        (
            patching.add(patching.write(block(8)), VECTOR, 1, factor=-0.5),
            edited("write", 8, lambda x: x[:, 1].sub_(0.5 * VECTOR)),
        ),
        (patching.skip(block(4), [0, 1]), edited("write", 4, put((slice(None), [0, 1]), 0))),
        (patching.skip(block(5)), edited("write", 5, put(slice(None), 0))),
        (patching.set_to(patching.read(block(3)), VECTOR, 2), edited("read", 3, put((slice(None), 2), VECTOR))),
        (patching.set_to(patching.read(block(6)), VECTOR, 2), edited("read", 6, put((slice(None), 2), VECTOR))),
        (patching.set_to(patching.readout(), VECTOR, 2), edited("read", 13, put((slice(None), 2), VECTOR))),
        (patching.set_to(patching.key(2), KEYS, 0), edited("key", 2, put((slice(None), 0), KEYS))),
        (patching.zero(patching.value(3), 1, heads=1), edited("value", 3, put((slice(None), 1, 1), 0))),
        (patching.zero(patching.z(3), [1, 4], heads=2), edited("z", 3, put((slice(None), [1, 4], 2), 0))),
        (
            patching.apply(patching.key(1), torch.neg, [0, 5], heads=0),
            edited("key", 1, lambda x: x.__setitem__((slice(None), [0, 5], 0), -x[:, [0, 5], 0])),
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, patching.Intervention) else "as asked",
)
def test_an_intervention_is_what_it_says(intervention, change, random_model, tokens):
    plain = by_hand(random_model, tokens, lambda what, number, x: x)
    torch.testing.assert_close(random_model(tokens), plain, rtol=0, atol=1e-4)
    expected = by_hand(random_model, tokens, change)
    assert (expected - plain).abs().max() > 1e-3
    torch.testing.assert_close(seen(random_model, tokens, [], intervention)[1], expected, rtol=0, atol=1e-4)


def masked_by_hand(layers, keys, heads=slice(None)):
    def change(what, number, x):
        if what != "pattern" or number not in layers:
            return x
        x = x.clone()
        part = x[:, heads].clone()
        part[..., keys] = 0
        total = part.sum(-1, keepdim=True)
        x[:, heads] = torch.where(total > 0, part / total, x[:, heads])
        return x

    return change


@pytest.mark.parametrize(
    ("layers", "keys", "heads"), [([2], [0], None), (range(6), [0, 3], None), ([1, 4], [2], [3, 0])]
)
def test_a_masked_key_leaves_the_softmax(layers, keys, heads, random_model, tokens):
    cut = patching.mask_key(keys, layers, heads)
    expected = by_hand(
        random_model, tokens, masked_by_hand(list(layers), keys, slice(None) if heads is None else heads)
    )
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in layers]
    found, logits = seen(random_model, tokens, names, cut)
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    for pattern in found.values():
        pattern = pattern if heads is None else pattern[:, heads]
        torch.testing.assert_close(pattern.sum(-1), torch.ones(pattern.shape[:-1]))
        assert float(pattern[:, :, 4:, keys].abs().max()) == 0
    first = next(iter(found.values()))
    torch.testing.assert_close(first[:, :, 0, 0], torch.ones(first.shape[:2]))  # position 0 has nobody else


def test_a_scaled_key_position_shares_out_what_it_loses(random_model, tokens):
    name = "blocks.2.attn.hook_pattern"
    clean = seen(random_model, tokens, [name])[0][name]
    half = seen(random_model, tokens, [name], patching.scale(patching.attention(2), 0.5, 1))[0][name]
    expected = clean.clone()
    expected[..., 1] /= 2
    torch.testing.assert_close(half, expected / expected.sum(-1, keepdim=True))


def test_positions_can_differ_between_windows(random_model, tokens):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[0, 0] = mask[3, 2] = mask[3, 5] = True
    name = "blocks.2.hook_in"
    clean = seen(random_model, tokens, [name])[0][name]
    changed = seen(random_model, tokens, [name], patching.zero(patching.stream(block(4)), mask))[0][name]
    expected = clean.clone()
    expected[mask] = 0
    assert torch.equal(changed, expected)
    part = seen(random_model, tokens[3:5], [name], patching.zero(patching.stream(block(4)), mask), rows=range(3, 5))[0][
        name
    ]
    torch.testing.assert_close(part, expected[3:5])

    with pytest.raises(ValueError, match="the positions are of 5 windows, but the model was given 2"):
        seen(random_model, tokens[:2], [], patching.zero(patching.stream(block(4)), mask))


def test_values_can_differ_between_places_and_positions(random_model, tokens):
    values = torch.arange(2 * 3 * 64).float().reshape(2, 3, 64)
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[1, 4] = mask[1, 6] = mask[4, 0] = True
    names = ["blocks.1.hook_in", "blocks.3.hook_in"]
    for at, index in ((mask, mask), ([4, 6, 9], (slice(None), [4, 6, 9]))):
        found = seen(random_model, tokens, names, patching.set_to(patching.stream([block(2), block(6)]), values, at))[0]
        for place, name in enumerate(names):
            expected = values[place] if at is mask else values[place].expand(5, -1, -1)
            assert torch.equal(found[name][index], expected)
    # In a batch that starts in the middle, the positions before it have been counted.
    late = seen(
        random_model,
        tokens[3:],
        names,
        patching.set_to(patching.stream([block(2), block(6)]), values, mask),
        rows=range(3, 5),
    )
    assert torch.equal(late[0][names[1]][1, 0], values[1, 2])


def test_a_change_between_attention_and_ffn_leaves_other_channels_to_the_bit(random_model, tokens):
    name = spikesink.anatomy(random_model).write_hooks[4]
    cut = patching.zero(patching.stream(block(5)), 3, 7)
    clean, changed = seen(random_model, tokens, [name])[0][name], seen(random_model, tokens, [name], cut)[0][name]
    same = torch.ones_like(clean, dtype=torch.bool)
    same[:, 3, 7] = False
    assert torch.equal(changed[same], clean[same])
    assert not torch.equal(changed, clean)


def test_a_masked_key_stays_masked_when_a_sliding_window_moves_on(tmp_path):
    """Layers that see 8 tokens back keep no more of a cache, so the place of a key in it moves."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    model = spikesink.load(planted.save(transformers.MistralForCausalLM(config).eval(), tmp_path / "sliding"))
    prompt = spikesink.windows(model, "house", 1, 12)
    assert spikesink.anatomy(model).sight == (8, 8, 8)
    cut = patching.mask_key([9, 14], range(3))
    grown, step = prompt, None
    with torch.no_grad(), patching.patched(model, cut):
        logits, cache = model(prompt, return_type="logits_and_cache", use_cache=True)
        for _ in range(6):
            torch.testing.assert_close(logits[:, -1], model(grown)[:, -1], rtol=0, atol=1e-5)
            step = logits[:, -1:].argmax(-1)
            grown = torch.cat([grown, step], dim=1)
            logits, cache = model(step, past_key_values=cache, return_type="logits_and_cache")
    assert float((model(grown)[:, -1] - logits[:, -1]).abs().max()) > 1e-5  # the mask was felt


def test_interventions_act_in_their_order(random_model, tokens):
    site, name = patching.stream(block(4)), "blocks.2.hook_in"
    double, plus = patching.scale(site, 2.0, 1), patching.add(site, VECTOR, 1)
    clean = seen(random_model, tokens, [name])[0][name][:, 1]
    torch.testing.assert_close(seen(random_model, tokens, [name], double, plus)[0][name][:, 1], 2 * clean + VECTOR)
    torch.testing.assert_close(seen(random_model, tokens, [name], plus, double)[0][name][:, 1], 2 * (clean + VECTOR))
    # The stream between attention and FFN is changed after what enters the layer, whatever order they were named in.
    late = patching.scale(patching.stream(block(5)), 3.0, 1)
    for cuts in ((late, double), (double, late)):
        found = seen(random_model, tokens, [name, "blocks.2.hook_attn_out", "blocks.2.ln2.hook_in"], *cuts)[0]
        torch.testing.assert_close(
            found["blocks.2.ln2.hook_in"][:, 1] / 3, found[name][:, 1] + _write(random_model, tokens, double)
        )


def _write(model, tokens, *cuts):
    name = spikesink.anatomy(model).write_hooks[4]
    return seen(model, tokens, [name], *cuts)[0][name][:, 1]


@pytest.mark.parametrize("point", [0, 4, 5, 12])
@pytest.mark.parametrize("at", [None, 0, [0, 7]])
def test_zero_strength_is_the_clean_run_bit_for_bit(point, at, random_model, tokens):
    clean = random_model(tokens)
    for cut in (
        patching.scale(patching.stream(block(point)), 1.0, at),
        patching.add(patching.stream(block(point)), VECTOR, at, factor=0.0),
        patching.scale(patching.attention(range(6)), 1.0, at),
    ):
        assert torch.equal(seen(random_model, tokens, [], cut)[1], clean)
        outcome = patching.evaluate(random_model, tokens, cut)
        assert torch.equal(outcome.loss, patching.evaluate(random_model, tokens).loss)
        assert float(outcome.divergence.abs().max()) == 0
        assert outcome.agreement == 1


def test_hooks_are_gone_afterwards_also_after_an_exception(random_model, tokens):
    clean = random_model(tokens)
    n_pre = len(random_model.original_model.base_model._forward_pre_hooks)
    cut = patching.zero(patching.stream(block(5)), 0)

    def broken(x):
        raise ZeroDivisionError

    for inside in (lambda: None, lambda: 1 / 0):
        try:
            with patching.patched(random_model, cut):
                random_model(tokens)
                inside()
        except ZeroDivisionError:
            pass
    with pytest.raises(ZeroDivisionError):
        patching.evaluate(random_model, tokens, patching.apply(patching.stream(block(8)), broken))
    assert torch.equal(random_model(tokens), clean)
    assert len(random_model.original_model.base_model._forward_pre_hooks) == n_pre
    assert not any(point.fwd_hooks for point in random_model.hook_dict.values())
    assert all(type(layer).__name__ == "BlockBridge" for layer in random_model.original_model.model.layers)


CUTS_WHILE_WRITING = [
    (patching.zero(patching.stream(block(4)), 0, [3, 9]),),
    (patching.scale(patching.stream(block(5)), 0.2),),
    (patching.mask_key(0, range(6)),),
    (patching.set_to(patching.key(range(6)), KEYS, 0), patching.zero(patching.value([2, 3]), [0, 1], heads=1)),
    (patching.skip(block(6), [2, 17, 18]), patching.mask_key([5, 16], [1, 2], [0, 3])),
    (patching.set_to(patching.readout(), VECTOR, 15),),
]


@pytest.mark.parametrize("cuts", CUTS_WHILE_WRITING, ids=lambda cuts: "; ".join(map(str, cuts)))
def test_generation_with_a_cache_is_generation_without(cuts, random_model, tokens):
    prompt, written = tokens[:2, :16], []
    options = {"max_new_tokens": 8, "do_sample": False, "stop_at_eos": False, "return_type": "tokens", "verbose": False}
    for cached in (True, False):
        with patching.patched(random_model, *cuts):
            written.append(random_model.generate(prompt, use_past_kv_cache=cached, **options))
    assert torch.equal(*written)
    # And step by step, whole prompts run anew.
    grown = prompt
    for _ in range(8):
        logits = seen(random_model, grown, [], *cuts)[1] if grown.shape[1] > 18 or "17" not in str(cuts[0]) else None
        if logits is None:  # a position that no token has reached yet is none to complain of while writing
            with patching.patched(random_model, *cuts):
                logits = random_model(grown)
        grown = torch.cat([grown, logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(written[0], grown)


def test_logits_of_a_cached_step_are_those_of_the_whole_prompt(random_model, tokens):
    prompt, last = tokens[:2, :15], tokens[:2, 15:16]
    for cuts in CUTS_WHILE_WRITING:
        with torch.no_grad(), patching.patched(random_model, *cuts[:1], rows=range(2)):
            _, cache = random_model(prompt, return_type="logits_and_cache", use_cache=True)
            step = random_model(last, past_key_values=cache)
            whole = random_model(tokens[:2, :16])
        torch.testing.assert_close(step[:, -1], whole[:, -1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_take_effect_in_every_family(family, tmp_path):
    """At every site that a family has, what later hooks see is what was put in; and a later start gives the same."""
    model = spikesink.load(tiny(family, tmp_path))
    about, tokens = spikesink.anatomy(model), spikesink.windows(model, "house", 2, 12)
    clean = model(tokens)
    keys = torch.linspace(-1, 1, about.n_kv_heads * 16).reshape(-1, 16)
    sites = {
        "stream": patching.set_to(patching.stream(block(2)), VECTOR, 3),
        "last stream": patching.scale(patching.stream(block(6)), 3.0, 3, 5),
        "write": patching.set_to(patching.write([block(3), block(4)]), VECTOR, 3),
        "readout": patching.set_to(patching.readout(), VECTOR, 3),
        "key": patching.set_to(patching.key(1), keys, 3),
        "value": patching.set_to(patching.value(1), keys, 3),
        "z": patching.zero(patching.z(1), 3, heads=2),
        "mask": patching.mask_key(0, [1]),
    }
    if about.attention_norm is not None:
        sites["read"] = patching.set_to(patching.read(block(3)), VECTOR, 3)
    if not about.parallel:
        sites["stream between"] = patching.set_to(patching.stream(block(3)), VECTOR, 3)
    for name, cut in sites.items():
        changed = seen(model, tokens, [], cut)[1]
        assert not torch.equal(changed[:, 3:], clean[:, 3:]), name
        if name != "mask":
            torch.testing.assert_close(changed[:, :3], clean[:, :3], rtol=0, atol=1e-5)
    stream = seen(model, tokens, [about.layer_hooks[2]], patching.set_to(patching.stream(block(4)), VECTOR, 3))[0]
    assert torch.equal(stream[about.layer_hooks[2]][:, 3], VECTOR.expand(2, -1))
    assert find_start(model, tokens, [1, 2]) is not None
    outcomes = patching.compare(model, tokens, sites)
    for name, cut in sites.items():
        logits = seen(model, tokens, [], cut)[1][:, :-1]
        loss = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")
        torch.testing.assert_close(outcomes[name].loss, loss, rtol=1e-5, atol=1e-5)


def test_a_later_start_is_a_whole_run_bit_for_bit(random_model, tokens):
    about = spikesink.anatomy(random_model)
    start = find_start(random_model, tokens, range(6))
    whole, logits = seen(random_model, tokens, about.layer_hooks)
    for layer in range(1, 6):
        ran, entered = [], whole[about.layer_hooks[layer]]
        watch = [(name, lambda value, hook, ran=ran: ran.append(hook.name)) for name in about.layer_hooks[:-1]]
        with start.at(layer, entered), random_model.hooks(fwd_hooks=watch):
            assert torch.equal(random_model(tokens), logits)
        assert ran == list(about.layer_hooks[layer:-1])  # the layers before it did not run


def test_where_a_later_start_gives_something_else_every_run_is_whole(random_model, tokens, monkeypatch):
    cuts = {"late": patching.zero(patching.stream(block(8)), 0), "early": patching.skip(block(1), 0)}
    quick = patching.compare(random_model, tokens, cuts)
    at = Start.at
    monkeypatch.setattr(Start, "at", lambda self, layer, stream: at(self, layer, 2 * stream))
    assert find_start(random_model, tokens, [4]) is None
    whole = patching.compare(random_model, tokens, cuts)
    for key in quick:
        assert torch.equal(quick[key].loss, whole[key].loss)
        assert torch.equal(quick[key].score, whole[key].score)
        assert torch.equal(quick[key].largest, whole[key].largest)


def test_an_outcome_is_what_it_says(random_model, tokens):
    cut = patching.zero(patching.stream(block(4)), 0)
    about = spikesink.anatomy(random_model)
    clean_logits = random_model(tokens).double()
    found, logits = seen(random_model, tokens, [*about.layer_hooks, *about.pattern_hooks], cut)
    outcome = patching.evaluate(random_model, tokens, cut, epsilon=0.25)
    p, q = (of.double().log_softmax(-1)[:, :-1] for of in (clean_logits, logits))
    loss = -q.gather(-1, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(outcome.loss.double(), loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(outcome.divergence.double(), (p.exp() * (p - q)).sum(-1), rtol=1e-3, atol=1e-6)
    assert torch.equal(outcome.agrees, p.argmax(-1) == q.argmax(-1))
    assert outcome.perplexity == pytest.approx(float(loss.mean().exp()), rel=1e-5)
    pattern = torch.stack([found[name] for name in about.pattern_hooks], 1)  # window, layer, head, query, key
    score = pattern.sum(3) / torch.arange(24, 0, -1)
    torch.testing.assert_close(outcome.score, score[..., 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.attention, score.mean((0, 2)), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(outcome.sinks, (score > 0.25).float().mean((0, 2)))
    assert outcome.sink_ratio == pytest.approx(float((score[..., 0] > 0.25).float().mean()))
    size = torch.stack([found[name].abs().amax(-1) for name in about.layer_hooks]).amax(0)
    assert torch.equal(outcome.largest, size)
    assert outcome.max_activation == pytest.approx(float(size.amax(1).median()))
    assert str(outcome).startswith("zero the stream after L1 MLP (block 4) at position 0: perplexity ")


def test_windows_may_come_in_batches(random_model, tokens, monkeypatch):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[1, 2] = mask[4, 0] = True
    cut = patching.zero(patching.stream(block(4)), mask)
    together = patching.evaluate(random_model, tokens, cut)
    monkeypatch.setattr(
        "spikesink.patching.outcome.batches", lambda about, tokens: [range(0, 2), range(2, 3), range(3, 5)]
    )
    apart = patching.evaluate(random_model, tokens, cut)
    torch.testing.assert_close(apart.loss, together.loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(apart.score, together.score, rtol=1e-5, atol=1e-6)
    about = spikesink.anatomy(random_model)
    assert batches(about, torch.zeros(5, 512)) == [range(0, 2), range(2, 4), range(4, 5)]
    assert batches(about, torch.zeros(2, 4096)) == [range(0, 1), range(1, 2)]


def test_intervals_are_bootstrapped_over_windows(random_model, tokens):
    outcome = patching.evaluate(random_model, tokens)
    by_window = outcome.loss.mean(1).exp()
    low, high = outcome.interval()
    assert float(by_window.min()) <= low < outcome.perplexity < high <= float(by_window.max())
    assert outcome.interval() == (low, high)
    narrow = outcome.interval(level=0.5)
    assert low < narrow[0] < narrow[1] < high
    assert outcome.interval("agreement") == (1, 1)
    assert all(math.isnan(end) for end in patching.evaluate(random_model, tokens[:1]).interval())
    with pytest.raises(ValueError, match="there is no measure 'loss'; give one of perplexity"):
        outcome.interval("loss")


def test_what_windows_differ_in_among_themselves_does_not_widen_a_paired_interval(random_model, tokens):
    clean = patching.evaluate(random_model, tokens)
    worse = replace(clean, loss=clean.loss + math.log(2))
    assert worse.times(clean) == pytest.approx((2, 2))
    alone = worse.interval()
    assert alone[1] / alone[0] > 1.001
    uneven = replace(clean, loss=clean.loss + torch.linspace(0, 1, len(tokens))[:, None])
    low, high = uneven.times(clean)
    assert 1 < low < uneven.perplexity / clean.perplexity < high < math.e
    with pytest.raises(ValueError, match="evaluate both on the same windows"):
        clean.times(patching.evaluate(random_model, tokens[:1]))


def test_an_interval_of_few_windows_is_students(random_model, tokens):
    clean = patching.evaluate(random_model, tokens[:1])
    none = replace(clean, loss=torch.zeros(4, 1))
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(4000, 4, 1, generator=generator, dtype=torch.float64)
    covered = [low <= 1 <= high for low, high in (replace(clean, loss=of).times(none) for of in losses)]
    assert sum(covered) / len(covered) == pytest.approx(0.95, abs=0.015)
    assert all(math.isnan(end) for end in clean.times(clean))


def test_a_sweep_is_a_tidy_table(random_model, tokens):
    doses = {dose: patching.scale(patching.stream(block(4)), dose, 0) for dose in (0.0, 1.0, 2.0)}
    found = patching.sweep(random_model, tokens, doses, over="dose")
    assert found.index.tolist() == ["clean", 0.0, 1.0, 2.0]
    assert found.index.name == "dose"
    assert list(found.columns) == [
        "perplexity", "low", "high", "kl", "agreement", "sink_ratio", "max_activation",
    ]  # fmt: skip
    assert found.loc[1.0, "perplexity"] == found.loc["clean", "perplexity"]
    assert found.loc[0.0, "kl"] > 0
    alone = patching.evaluate(random_model, tokens, doses[2.0])
    assert found.loc[2.0, "perplexity"] == alone.perplexity


def test_means_are_of_the_given_windows_and_positions(random_model, tokens):
    mask = torch.zeros(5, 24, dtype=torch.bool)
    mask[0, 3] = mask[2, 1] = mask[2, 9] = True
    names = ["blocks.2.hook_in", "blocks.4.hook_in", "blocks.1.attn.k.hook_out"]
    found = seen(random_model, tokens, names)[0]
    mean = patching.mean_of(random_model, tokens, patching.stream([block(4), block(8)]), mask)
    torch.testing.assert_close(mean, torch.stack([found[name][mask].mean(0) for name in names[:2]]))
    some = patching.mean_of(random_model, tokens, patching.stream(block(4)), [0, 2], [5, 1])
    torch.testing.assert_close(some[0], found[names[0]][:, [0, 2]][..., [5, 1]].mean((0, 1)))
    keys = patching.mean_of(random_model, tokens, patching.key(1), mask)
    torch.testing.assert_close(keys[0], found[names[2]][mask].mean(0))
    everywhere = patching.mean_of(random_model, tokens, patching.key(1), heads=1)
    torch.testing.assert_close(everywhere[0], found[names[2]][:, :, [1]].mean((0, 1)))


def test_activation_patching_puts_one_prompt_into_another(random_model, tokens):
    source, target = tokens[0], tokens[1:2]
    names = ["blocks.2.hook_in", "blocks.1.attn.v.hook_out"]
    own = seen(random_model, source[None], names)[0]
    cut = patching.patch_from(random_model, source, patching.stream(block(4)), [2, 3], [7, 5])
    found = seen(random_model, target, names, cut)[0]
    torch.testing.assert_close(found[names[0]][0, [7, 5]], own[names[0]][0, [2, 3]])
    values = patching.patch_from(random_model, source, patching.value(1), 4)
    assert torch.equal(seen(random_model, target, names, values)[0][names[1]][0, 4], own[names[1]][0, 4])
    # All of a prompt's stream put in is that prompt's own run from there on.
    whole = patching.patch_from(random_model, source, patching.stream(block(4)), range(24))
    torch.testing.assert_close(seen(random_model, target, [], whole)[1], random_model(source[None]))
    with pytest.raises(ValueError, match="2 positions were recorded; name as many"):
        patching.patch_from(random_model, source, patching.stream(block(4)), [2, 3], 7)


def test_any_hook_can_be_named(random_model, tokens):
    cut = patching.zero(patching.hook("blocks.3.mlp.hook_post"), 2, range(40))
    name = "blocks.3.mlp.out.hook_in"
    clean, changed = seen(random_model, tokens, [name])[0][name], seen(random_model, tokens, [name], cut)[0][name]
    assert float(changed[:, 2, :40].abs().max()) == 0
    assert torch.equal(changed[:, 2, 40:], clean[:, 2, 40:])
    assert cut.first_layer(spikesink.anatomy(random_model)) == 3
    assert patching.skip(block(12)).first_layer(spikesink.anatomy(random_model)) == 5
    assert patching.zero(patching.hook("hook_embed")).first_layer(spikesink.anatomy(random_model)) == 0


class Lab(HookedRootModule):
    """A model that is none of transformers': two layers of attention and FFN, with TransformerLens hooks."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.unembed = nn.Embedding(20, 8), nn.Linear(8, 20)
        self.mixes = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"hook_in": HookPoint(), "hook_out": HookPoint(), "hook_attn_out": HookPoint(),
                           "hook_mlp_out": HookPoint(), "attn": nn.ModuleDict({"hook_pattern": HookPoint()})})
            for _ in range(2)
        )  # fmt: skip
        self.cfg = SimpleNamespace(device="cpu")
        layers = range(2)
        self.anatomy = replace(
            ANATOMY,
            family="lab",
            n_layers=2,
            d_model=8,
            d_vocab=20,
            context=16,
            attention_norm=None,
            ffn_norm=None,
            sight=(None, None),
            layer_hooks=(*(f"blocks.{i}.hook_in" for i in layers), "blocks.1.hook_out"),
            write_hooks=tuple(f"blocks.{i}.{hook}" for i in layers for hook in ("hook_attn_out", "hook_mlp_out")),
            pattern_hooks=tuple(f"blocks.{i}.attn.hook_pattern" for i in layers),
        )
        self.setup()

    def forward(self, tokens):
        x = self.embed(tokens)
        for layer, mix in zip(self.blocks, self.mixes, strict=True):
            x = layer["hook_in"](x)
            scores = x @ x.transpose(1, 2) + torch.full((x.shape[1],) * 2, -math.inf).triu(1)
            pattern = layer["attn"]["hook_pattern"](scores.softmax(-1)[:, None])
            x = x + layer["hook_attn_out"](pattern[:, 0] @ x)
            x = layer["hook_out"](x + layer["hook_mlp_out"](torch.tanh(mix(x))))
        return self.unembed(x)


def test_models_of_our_own_can_be_patched_too():
    model, tokens = Lab(), torch.arange(12).reshape(2, 6)
    clean = model(tokens)
    cut = patching.set_to(patching.stream(block(2)), torch.arange(8.0), 1)
    found, changed = seen(model, tokens, ["blocks.1.hook_in"], cut)
    assert torch.equal(found["blocks.1.hook_in"][:, 1], torch.arange(8.0).expand(2, -1))
    assert torch.equal(changed[:, 0], clean[:, 0])
    outcome = patching.evaluate(model, tokens, cut, patching.mask_key(0, [0, 1]))
    assert outcome.kl > 0
    assert float(outcome.score[:, :, :].max()) <= 1 / 6 + 1e-6  # position 0 keeps its own query only
    with pytest.raises(ValueError, match=r"has no hook blocks.0.attn.k.hook_out"):
        patching.evaluate(model, tokens, patching.zero(patching.key(0), 0))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: patching.zero(patching.stream(block(13))),
            r"block 13\) does not exist; this model has blocks 0 to 12",
        ),
        (
            lambda: patching.zero(patching.write(block(0))),
            "the embedding does not exist; this model has blocks 1 to 12",
        ),
        (lambda: patching.zero(patching.read(block(13))), "this model has blocks 1 to 12"),
        (lambda: patching.zero(patching.key(6)), "layer 6 does not exist; this model has layers 0 to 5"),
        (lambda: patching.mask_key(0, [2, -1]), "layer -1 does not exist"),
        (
            lambda: patching.zero(patching.stream(block(4)), 0, 64),
            "channel 64 does not exist; there are channels 0 to 63",
        ),
        (lambda: patching.zero(patching.stream(block(4)), 0, -1), "channel -1 does not exist"),
        (lambda: patching.zero(patching.key(2), 0, heads=2), "head 2 does not exist; there are heads 0 to 1"),
        (lambda: patching.mask_key(0, 2, 4), "head 4 does not exist; there are heads 0 to 3"),
        (
            lambda: patching.zero(patching.stream(block(4)), 24),
            "position 24 does not exist; there are positions 0 to 23",
        ),
        (lambda: patching.zero(patching.stream(block(4)), -1), "position -1 does not exist; positions count from 0"),
        (lambda: patching.zero(patching.stream(block(4)), []), "no position was given"),
        (lambda: patching.zero(patching.stream([])), "no block was given"),
        (
            lambda: patching.zero(patching.stream(block(4)), torch.zeros(5, 24)),
            "a mask of positions must hold truth values",
        ),
        (lambda: patching.zero(patching.stream(block(4)), torch.zeros(5, 24).bool()), "the mask of positions is empty"),
        (
            lambda: patching.zero(patching.stream(block(4)), torch.ones(3, 24).bool()),
            "are of 3 windows, but there are 5",
        ),
        (
            lambda: patching.set_to(patching.stream(block(4)), torch.ones(63)),
            r"values are \[63\], but the stream .* \[64\]",
        ),
        (lambda: patching.set_to(patching.stream(block(4)), torch.ones(2), 0, [1, 2, 3]), r"\[2\], but .* takes \[3\]"),
        (lambda: patching.set_to(patching.key(2), torch.ones(3, 16)), r"\[3, 16\], but the keys .* \[2, 16\]"),
        (lambda: patching.set_to(patching.key(2), torch.ones(16)), r"shape \[16\] do not fit the keys of layer 2"),
        (lambda: patching.set_to(patching.stream(block(4)), torch.ones(3, 64)), "there are values for 3 places, but"),
        (
            lambda: patching.set_to(patching.stream(block(4)), torch.ones(1, 3, 64), [0, 1]),
            "for 3 positions, but it is 2",
        ),
        (lambda: patching.scale(patching.stream(block(4)), "much"), "a factor must be a number, but is 'much'"),
        (lambda: patching.zero(patching.hook("blocks.9.hook_in")), "this llama model has no hook blocks.9.hook_in"),
        (lambda: patching.apply(patching.stream(block(4)), lambda x: x[..., :3]), "the shape must stay the same"),
        (lambda: patching.apply(patching.stream(block(4)), lambda x: None), "the function returned None"),
        (lambda: patching.zero(patching.stream(24)), r"write block\(24\) if it is L11 MLP"),
        (lambda: patching.zero(patching.key(block(4))), "is a block, but a layer is wanted"),
        (lambda: patching.zero(patching.stream("24")), "'24' is no block; give a whole number"),
        (lambda: patching.zero(patching.stream(block(4)), 0, "507"), "'507' is no channel"),
        (lambda: patching.zero(patching.key(2), 0, heads=1.5), "1.5 is no head"),
        (lambda: patching.zero(patching.stream(block(4)), 0, torch.arange(64) == 9), "False is no channel"),
        (lambda: patching.zero(patching.stream(block(4)), 0, heads=1), "has channels; name them as channels="),
        (lambda: patching.zero(patching.key(2), 0, 1), "of layer 2 has heads; name them as heads="),
        (lambda: patching.zero(patching.stream(block(4)), "0"), "'0' is no position"),
        (lambda: patching.zero(patching.stream(block(4)), [1.7]), "1.7 is no position"),
        (lambda: patching.zero(patching.stream(block(4)), True), "True is no position"),
        (lambda: patching.zero(patching.stream(block(4)), slice(0, 3)), "give a range"),
        (lambda: patching.zero(4, 0), "4 is no site; give one such as stream"),
        (lambda: patching.set_to(patching.stream(block(4)), 3.0), "values must be a tensor, but are 3.0"),
        (lambda: patching.set_to("stream", VECTOR), "'stream' is no site"),
        (lambda: patching.add(patching.stream(block(4)), VECTOR, factor="2"), "a factor must be a number, but is '2'"),
        (lambda: patching.set_to(patching.attention(2), torch.ones(4), 0), "attention can be scaled or masked"),
        (lambda: patching.apply(patching.attention(2), torch.neg, 0), "attention can be scaled or masked"),
        (lambda: patching.mask_key(None, 2), "with every key masked no attention is left"),
        (lambda: patching.zero(patching.hook("blocks.1.hook_in"), 0, 9999), r"what passes there is \[5, 24, 64\]"),
        (lambda: patching.set_to(patching.hook("blocks.1.hook_in"), torch.ones(63), 0), "which does not fit: replace"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(make, said, random_model, tokens):
    with pytest.raises(ValueError, match=said) as raised:
        patching.evaluate(random_model, tokens, make())
    assert "\n" not in str(raised.value)


def test_positions_may_be_numbers_or_masks_of_any_kind(random_model):
    site = patching.stream(block(4))
    for at in ([1, 3], (1, 3), torch.tensor([1, 3]), torch.tensor([False, True, False, True]).numpy(), range(1, 4, 2)):
        assert patching.zero(site, at).positions.same == (1, 3)
    assert patching.zero(site, [False, True]).positions.same == (1,)
    assert patching.zero(site, [[True, False], [True, True]]).positions.by_window == ((0,), (0, 1))
    assert patching.zero(site, torch.tensor(2)).positions.same == (2,)


def test_what_is_no_model_no_token_and_no_cut_is_said(random_model, tokens):
    cut = patching.skip(block(4))
    for make, said in (
        (
            lambda: patching.evaluate(random_model, "The old clock", cut),
            r"of a text, model.to_tokens\(text\) makes them",
        ),
        (lambda: patching.evaluate(random_model, tokens.float(), cut), "tokens must be a tensor of token ids"),
        (lambda: patching.evaluate(random_model, tokens, [cut, cut]), r"give each by itself: \*cuts"),
        (lambda: patching.evaluate("smollm2-135m", tokens, cut), "'smollm2-135m' is no model; give what load returned"),
        (lambda: patching.sweep(random_model, tokens, [cut]), "give the cuts as a dictionary"),
        (lambda: patching.compare(random_model, tokens, {"clean": cut}), "is the name of the run without any cut"),
        (lambda: patching.view(random_model, tokens, cut), r"one prompt is wanted, but tokens are \[5, 24\]"),
        (lambda: patching.view(random_model, "The old clock"), "of a text, model.to_tokens"),
        (lambda: patching.record(random_model, tokens, patching.stream(block(4)), 0), "one prompt is wanted"),
        (lambda: patching.patched(random_model, [cut]).__enter__(), r"give each by itself: \*cuts"),
    ):
        with pytest.raises(ValueError, match=said) as raised:
            make()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.zeros(2, 0, dtype=torch.long), r"tokens must be \[windows, length\] and not empty"),
        (torch.zeros(0, dtype=torch.long), "and not empty"),
        (torch.zeros(1, 1, dtype=torch.long), "one token predicts nothing"),
        (torch.full((1, 4), 400), "token 400 does not exist; this model's vocabulary has ids 0 to 399"),
        (torch.zeros(1, 513, dtype=torch.long), "513 tokens are longer than the model's context of 512"),
    ],
)
def test_bad_prompts_are_refused(wrong, said, random_model):
    with pytest.raises(ValueError, match=said):
        patching.evaluate(random_model, wrong, patching.skip(block(4)))


def test_a_hook_that_never_fires_is_told(random_model, tokens):
    """The bridge has hooks that only fire where an option is set; an intervention there would do nothing, silently."""
    with pytest.raises((RuntimeError, ValueError), match=r"hook_result|never fired"):
        patching.evaluate(random_model, tokens, patching.zero(patching.hook("blocks.1.attn.hook_result")))


def test_a_position_that_is_never_reached_is_told(random_model, tokens):
    cut = patching.skip(block(4), 30)
    with (
        pytest.raises(RuntimeError, match="no token stood at any of its positions, so nothing came of: zero the write"),
        patching.patched(random_model, cut),
    ):
        random_model(tokens)
    with patching.patched(random_model, cut):
        pass  # nothing ran, so nothing could take effect


def test_families_without_a_place_say_so(tmp_path):
    parallel = spikesink.load(tiny("gpt_neox", tmp_path))
    tokens = spikesink.windows(parallel, "house", 1, 12)
    with pytest.raises(ValueError, match="attention and FFN of this gpt_neox model read the same stream"):
        patching.evaluate(parallel, tokens, patching.zero(patching.stream(block(3))))
    post = spikesink.load(tiny("olmo2", tmp_path))
    with pytest.raises(ValueError, match="the blocks of this olmo2 model read the stream itself"):
        patching.evaluate(post, tokens, patching.zero(patching.read(block(3))))


@pytest.mark.parametrize(
    ("intervention", "sentence"),
    [
        (
            patching.zero(patching.stream(block(24)), 0, 507),
            "zero channel 507 of the stream after L11 MLP (block 24) at position 0",
        ),
        (
            patching.scale(patching.stream([block(4), block(6)]), 0.5, [0, 1], [1, 2, 3]),
            "scale by 0.5 channels 1 to 3 of the stream after L1 MLP (block 4), L2 MLP (block 6) at positions 0, 1",
        ),
        (patching.skip(block(24)), "zero the write of L11 MLP (block 24) at all positions"),
        (
            patching.mask_key(range(9), range(3, 8), 2),
            "zero head 2 of the attention of layers 3 to 7 at 9 positions",
        ),
        (
            patching.set_to(patching.value(3), KEYS, torch.ones(2, 3).bool()),
            "replace the values of layer 3 at 6 tokens of 2 windows",
        ),
        (
            patching.add(patching.read([block(3), block(4)]), VECTOR, 0, range(10), factor=-2),
            "add -2 times a vector to 10 channels of h~ as read by L1 attn (block 3), L1 MLP (block 4) at position 0",
        ),
        (patching.apply(patching.hook("hook_embed"), torch.neg, 1), "apply neg to hook hook_embed at position 1"),
    ],
)
def test_an_intervention_prints_as_a_sentence(intervention, sentence):
    assert str(intervention) == sentence


def test_interventions_are_immutable_values():
    cut = patching.zero(patching.stream(block(24)), 0, 507)
    assert cut == patching.zero(patching.stream([block(24)]), [0], [507])
    assert len({cut, patching.zero(patching.stream(block(24)), 0, 507)}) == 1
    with pytest.raises(AttributeError):
        cut.positions = Positions()
