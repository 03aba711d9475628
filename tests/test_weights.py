"""Weights by layer: what is read from files is what is loaded, and both give what the model's own block writes."""

import platform

import psutil
import pytest
import torch

import spikesink
from spikesink.chain import amplifier
from spikesink.common import NotApplicable
from spikesink.model.weights import give_back, open_weights, weights_of
from tests import planted
from tests.test_families import FAMILIES, build, tiny

GATED = [name for name, (_, _, expected) in FAMILIES.items() if expected[3] and name != "mixtral"]


def normalised(model, layer, tokens):
    """What enters an FFN's matrices, without the norm's learned scale, and what comes out, by the model's own hooks."""
    about, seen = spikesink.anatomy(model), {}
    source = f"blocks.{layer}.{about.ffn_norm}.hook_normalized" if about.ffn_norm else f"blocks.{layer}.mlp.hook_in"
    names = (source, f"blocks.{layer}.mlp.hook_out", about.write_hooks[2 * layer + 1])
    with model.hooks(fwd_hooks=[(name, lambda value, hook: seen.update({hook.name: value})) for name in names]):
        model(tokens)
    return tuple(seen[name] for name in names)


@pytest.mark.parametrize("family", [*GATED, "llama with biases"])
def test_the_weights_give_what_the_block_writes_in_every_gated_family(family, tmp_path):
    model = build("llama", mlp_bias=True) if family == "llama with biases" else build(family)
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):  # not all ones and zeros
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    directory = planted.save(model, tmp_path / "model")
    model = spikesink.load(directory)
    h, raw, added = normalised(model, 1, spikesink.windows(model, "house", 2, 16))
    for ffn in (weights_of(model).ffn(1), open_weights(directory).ffn(1)):
        torch.testing.assert_close(amplifier.compute_write(ffn, h), raw, rtol=1e-4, atol=1e-6)
        if ffn.post_scale is not None:
            eps = model.original_model.config.get_text_config().rms_norm_eps
            normed = raw * (raw.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * ffn.post_scale
            torch.testing.assert_close(normed, added, rtol=1e-4, atol=1e-6)


def same(ours, theirs) -> bool:
    return all(
        (value is None) == (vars(theirs)[name] is None)
        and (not isinstance(value, torch.Tensor) or torch.equal(value, vars(theirs)[name]))
        for name, value in vars(ours).items()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_read_from_files_is_what_is_loaded(family, tmp_path):
    directory = tiny(family, tmp_path)
    loaded, read = weights_of(spikesink.load(directory)), open_weights(directory)
    assert read.anatomy == loaded.anatomy
    for layer in (2, 0):
        assert same(read.attention(layer), loaded.attention(layer))
        assert all(torch.equal(a, b) for a, b in zip(read.keys(layer), loaded.keys(layer), strict=True))
        if family in GATED:
            assert same(read.ffn(layer), loaded.ffn(layer))
        if family == "mixtral":
            ours, theirs = read.experts(layer), loaded.experts(layer)
            assert list(ours) == list(theirs) == ["0", "1", "2", "3"]
            assert all(same(ours[name], theirs[name]) for name in ours)
    assert torch.equal(read.embed(torch.arange(9)), loaded.embed(torch.arange(9)))


def test_one_layer_outlives_the_next(planted_directory):
    weights = open_weights(planted_directory)
    first = weights.ffn(0)
    kept = {name: getattr(first, name).clone() for name in ("gate", "up", "down")}
    weights.ffn(1)
    weights.attention(2)
    for name, value in kept.items():
        assert torch.equal(getattr(first, name), value), name


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory in ways of their own")
def test_freed_memory_between_blocks_in_use_is_given_back():
    blocks = [bytes(1000) for _ in range(100_000)]
    between = blocks[::1000]  # they stay
    del blocks
    before = psutil.Process().memory_info().rss
    give_back()
    assert before - psutil.Process().memory_info().rss > 5e7
    assert len(between) == 100


@pytest.mark.parametrize(
    ("family", "reason"),
    [("gpt2", "shows no gate, so no quadratic form"), ("mixtral", "is a mixture of 4 experts, not one gated FFN")],
)
def test_a_family_without_one_gated_ffn_says_so(family, reason, tmp_path):
    with pytest.raises(NotApplicable, match=f"the FFN of this {family} model {reason}"):
        weights_of(spikesink.load(tiny(family, tmp_path))).ffn(0)
