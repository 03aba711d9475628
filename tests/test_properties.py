"""What must hold for any numbers, not only for those of one model: properties of the numeric parts, from algebra.

Examples are drawn by hypothesis, the same ones in every run.
"""

import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch.nn import functional
from transformers import PretrainedConfig

from spikesink import patching
from spikesink.chain import amplifier, trace
from spikesink.chain import keys as keys_
from spikesink.model import anatomy, load, names, texts
from spikesink.model.anatomy import Block, attn, mlp
from spikesink.model.weights import FFN
from spikesink.patching import interventions

pytestmark = pytest.mark.usefixtures("any_types")  # stand-ins for models and cycles
settings.register_profile(
    "repeatable",
    max_examples=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # one switch for all examples
)
settings.load_profile("repeatable")

SEEDS = st.integers(0, 2**31 - 1)
FACTORS = st.floats(-8, 8).filter(lambda x: abs(x) > 1 / 8)  # neither zero nor so small that squares underflow
SILU, IDENTITY = functional.silu, torch.nn.Identity()


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def ffns(draw, least_d: int = 2) -> FFN:
    """Gated FFNs of a few channels and neurons in float64, without biases; some neurons may be dead."""
    d, m, seed = draw(st.integers(least_d, 8)), draw(st.integers(1, 9)), draw(SEEDS)
    gate, up, down = normal(seed, m, d), normal(seed + 1, m, d), normal(seed + 2, d, m)
    down = down * torch.tensor(draw(st.lists(st.booleans(), min_size=m, max_size=m)), dtype=torch.float64)
    none = torch.zeros(m, dtype=torch.float64)
    return FFN(gate, up, down, none, none, draw(st.sampled_from([SILU, IDENTITY])))


@st.composite
def vectors(draw, most: float = 1e3) -> torch.Tensor:
    """Some rows of numbers [row, channel], in float64, none of them all zero."""
    size = st.floats(-most, most, allow_subnormal=False)
    rows = draw(arrays(np.float64, array_shapes(min_dims=2, max_dims=2), elements=size))
    assume((np.abs(rows).max(1) > 1e-3).all())
    return torch.from_numpy(rows)


@given(ffns(), st.integers(1, 60))
def test_gains_and_norms_are_those_of_the_forms_however_they_are_cut(ffn, held):
    channels = range(len(ffn.down))
    whole = torch.einsum("kn,nd,ne->kde", ffn.down, ffn.gate, ffn.up)  # U_k
    symmetric = torch.stack([amplifier.form(ffn, k) for k in channels])
    torch.testing.assert_close(symmetric, (whole + whole.mT) / 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(amplifier, "KERNEL", held)
        gains, norms = amplifier.gains(ffn), amplifier.form_norms(ffn, channels)
    torch.testing.assert_close(gains, whole.norm(dim=(1, 2)), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(norms, symmetric.norm(dim=(1, 2)), rtol=1e-6, atol=1e-7)


@given(ffns(), SEEDS)
def test_the_form_is_what_an_identity_would_make_the_block_write(ffn, seed):
    h = normal(seed, 5, ffn.gate.shape[1])
    written = amplifier.compute_write(FFN(**vars(ffn) | {"activation": IDENTITY}), h)
    for channel in range(len(ffn.down)):
        by_form = torch.einsum("td,de,te->t", h, amplifier.form(ffn, channel), h)
        torch.testing.assert_close(by_form, written[:, channel])
        torch.testing.assert_close(amplifier.quadratic(ffn, h, channel), written[:, channel])


@given(ffns(least_d=3), st.data())
def test_eigenpairs_are_those_of_the_whole_matrix(ffn, data):
    d = ffn.gate.shape[1]
    channel, n = data.draw(st.integers(0, d - 1)), data.draw(st.integers(1, d - 1))
    pairs, s = amplifier.eigenpairs(ffn, channel, n), amplifier.form(ffn, channel)
    every = torch.linalg.eigvalsh(s).abs().sort(descending=True).values
    scale = float(every[0]) or 1.0
    torch.testing.assert_close(pairs.values.abs() / scale, every[:n] / scale, rtol=0, atol=1e-8)
    torch.testing.assert_close(s @ pairs.vectors / scale, pairs.vectors * pairs.values / scale, rtol=0, atol=1e-7)
    torch.testing.assert_close(pairs.vectors.norm(dim=0), torch.ones(n, dtype=torch.float64))


@pytest.mark.parametrize("norm", ["RMS", "LN"])
@given(x=vectors(), eps=st.sampled_from([1e-5, 1e-6]))
def test_normalising_is_what_torch_does(norm, x, eps):
    about, d = SimpleNamespace(norm=norm, norm_eps=eps), x.shape[1]
    theirs = {"RMS": functional.rms_norm, "LN": functional.layer_norm}[norm](x, (d,), eps=eps)
    torch.testing.assert_close(anatomy.normalise(x, about), theirs)


@st.composite
def patterns(draw) -> tuple[torch.Tensor, int | None]:
    """Attention [head, query, key] that sees only what is before it, all or so many tokens back."""
    heads, length = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    sight = draw(st.none() | st.integers(1, length + 2))
    back = torch.arange(length)[:, None] - torch.arange(length)
    hidden = (back < 0) | (back >= (length if sight is None else sight))
    return (3 * normal(draw(SEEDS), heads, length, length)).masked_fill(hidden, -math.inf).softmax(-1), sight


@given(patterns())
def test_attention_received_is_a_mean_over_the_queries_that_see_the_key(drawn):
    pattern, sight = drawn
    length = pattern.shape[-1]
    seen_by = [range(k, min(length, k + (sight or length))) for k in range(length)]
    received = trace.received(pattern)
    direct = torch.stack([pattern[:, list(queries), k].mean(1) for k, queries in enumerate(seen_by)], dim=1)
    torch.testing.assert_close(received, direct)
    counts = torch.tensor([len(queries) for queries in seen_by], dtype=torch.float64)
    torch.testing.assert_close(received @ counts, torch.full((len(pattern),), float(length), dtype=torch.float64))


@given(SEEDS, st.integers(1, 5), st.integers(1, 5), FACTORS)
def test_effective_dimension_counts_directions(seed, n, d, factor):
    keys, turn = normal(seed, n, d), torch.linalg.qr(normal(seed + 1, d, d)).Q
    values = torch.linalg.eigvalsh(keys.T @ keys)
    line = torch.outer(normal(seed, n), keys[0])
    for rows, expected in (
        (keys, float(values.sum() ** 2 / values.square().sum())),
        (factor * keys @ turn, float(values.sum() ** 2 / values.square().sum())),
        (line, 1),
    ):
        assert float(keys_.effective_dimension(rows.T @ rows)) == pytest.approx(expected)


@given(st.integers(1, 400))
def test_a_block_is_one_half_of_one_layer(block):
    half = Block(block)
    assert (attn if half.is_attention else mlp)(half.layer) == half == block


def counting(n: int, bos: bool):
    """A tokenizer whose token ids are their places in the text, which has n tokens; with or without BOS first."""

    def tokenizer(text, add_special_tokens=True, **options):
        return SimpleNamespace(input_ids=[0] * (bos and add_special_tokens) + list(range(1, n + 1)))

    tokenizer.bos_token_id = 0
    return tokenizer


@given(st.integers(0, 200), st.integers(1, 8), st.integers(3, 40), st.integers(0, 5), st.booleans())
def test_windows_are_whole_pieces_of_the_text_that_share_no_token(size, n, length, seed, bos):
    body = length - bos
    text, config = texts.Text("counting", "."), PretrainedConfig(vocab_size=size + 1)
    model = load.Prepared(None, config, counting(size, bos), "cpu", torch.float32)
    if size // body < n:
        with pytest.raises(texts.TextError, match=f"enough for {size // body} windows"):
            texts.windows(model, text, n, length, seed)
        return
    windows = texts.windows(model, text, n, length, seed)
    assert (windows.shape, windows.dtype) == ((n, length), torch.int64)
    assert not bos or (windows[:, 0] == 0).all()
    pieces = windows[:, int(bos) :]
    assert (pieces.diff(dim=1) == 1).all()
    assert len(pieces.unique()) == n * body
    assert 1 <= int(pieces.min()) <= int(pieces.max()) <= size
    assert torch.equal(texts.windows(model, text, n, length, seed), windows)
    config.vocab_size = size
    with pytest.raises(texts.TextError, match=f"makes token {size} of the text"):
        texts.windows(model, text, n, length, seed)


CHANNELS, LENGTH = 6, 5


@st.composite
def cuts(draw) -> tuple[torch.Tensor, dict]:
    """A stream [window, position, channel], and where in it to change something."""
    at = draw(st.none() | st.lists(st.integers(0, LENGTH - 1), min_size=1, max_size=LENGTH, unique=True))
    channels = draw(st.none() | st.lists(st.integers(0, CHANNELS - 1), min_size=1, max_size=CHANNELS, unique=True))
    return normal(draw(SEEDS), 2, LENGTH, CHANNELS), {"positions": at, "channels": channels}


def changed(x: torch.Tensor, *those: patching.Intervention) -> torch.Tensor:
    """A tensor after interventions, by the function that every hook calls."""
    for one in those:
        x = interventions._Run([one]).edit(0, 0, x)
    return x


STREAM = patching.stream(patching.mlp(0))


@given(cuts(), SEEDS, FACTORS)
def test_what_is_added_is_where_it_was_asked_and_can_be_taken_away(drawn, seed, factor):
    x, where = drawn
    at, channels = (list(where[name] or range(n)) for name, n in (("positions", LENGTH), ("channels", CHANNELS)))
    vector = normal(seed, len(channels))
    added = changed(x, patching.add(STREAM, vector, **where, factor=factor))
    torch.testing.assert_close(changed(added, patching.add(STREAM, vector, **where, factor=-factor)), x)
    named = torch.zeros(LENGTH, CHANNELS, dtype=torch.bool)
    named[torch.tensor(at)[:, None], torch.tensor(channels)] = True
    assert torch.equal((added != x).any(0), named)  # what is named is changed, and nothing else
    replaced = changed(x, patching.set_to(STREAM, vector, **where))
    from_nothing = changed(x, patching.zero(STREAM, **where), patching.add(STREAM, vector, **where))
    torch.testing.assert_close(replaced, from_nothing)


@given(patterns(), st.data(), st.floats(0, 4))
def test_attention_still_adds_up_to_one(drawn, data, factor):
    pattern, _ = drawn
    length = pattern.shape[-1]
    keys = data.draw(st.lists(st.integers(0, length - 1), min_size=1, unique=True))
    cut = patching.scale(patching.attention(0), factor, keys)
    scaled = changed(pattern[None], cut)[0]
    torch.testing.assert_close(scaled.sum(-1), torch.ones(pattern.shape[:2], dtype=torch.float64))
    others = [key for key in range(length) if key not in keys]
    left = pattern[..., others].sum(-1)
    weight = left + factor * pattern[..., keys].sum(-1)
    expected = torch.where(weight > 0, left / weight, left)  # a query with nothing left keeps what it had
    torch.testing.assert_close(scaled[..., others].sum(-1), expected)


@given(st.text(max_size=300))
@example("smollm2-135m")
@example("smollm2-135m!")
@example("")
@example("a" * 300)
@example("../../etc/passwd")
def test_a_slug_is_a_folder_name_and_its_own_slug(spec):
    name = names.slug(spec)
    assert re.fullmatch(r"[a-z0-9_][a-z0-9._-]{0,199}", name)
    assert names.slug(name) == name
    assert (name in names.BUILTINS) == (spec in names.BUILTINS)
