"""The trace against a second way to compute the same: run_with_cache, which holds everything."""

import subprocess
import sys

import pytest
import torch

import spikesink
from spikesink.chain import trace as module
from tests import planted


def stream_of(cache, n_layers):
    """[window, point, token, channel]"""
    points = [cache["blocks.0.hook_resid_pre"]]
    for layer in range(n_layers):
        points += [cache[f"blocks.{layer}.hook_resid_mid"], cache[f"blocks.{layer}.hook_resid_post"]]
    return torch.stack(points, dim=1)


def test_the_trace_is_what_the_cache_holds(planted_model, trigger_tokens):
    _, cache = planted_model.run_with_cache(trigger_tokens)
    trace = spikesink.trace_windows(planted_model, trigger_tokens)
    rows, n_layers, close = trace.rows, trace.anatomy.n_layers, {"rtol": 1e-5, "atol": 1e-4}
    stream = stream_of(cache, n_layers)
    names = [f"blocks.{layer}.hook_{kind}_out" for layer in range(n_layers) for kind in ("attn", "mlp")]
    writes = torch.stack([cache[name] for name in names], dim=1)
    torch.testing.assert_close(rows.stream, stream[rows.window, :, rows.position][..., trace.channels], **close)
    torch.testing.assert_close(rows.writes, writes[rows.window, :, rows.position][..., trace.channels], **close)
    assert trace.closure < 1e-6

    size = stream.abs()
    medians = size.flatten(2).median(2).values
    torch.testing.assert_close(trace.window_medians, medians, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(trace.top_stream, size.amax(2).topk(module.TOP).values.mean(0), **close)
    torch.testing.assert_close(trace.top_writes, writes.abs().amax(2).topk(module.TOP).values.mean(0), **close)
    over = size > module.SPIKE_OVER_MEDIAN * medians[..., None, None]  # window, point, token, channel
    assert trace.n_candidates == int(over.any(-1).any(1).sum()) == int(rows.candidate.sum())
    spiking = over.any(0).any(0).any(0).nonzero()[:, 0]
    assert set(spiking.tolist()) <= set(trace.channels[: trace.n_followed].tolist())

    assert not any(point.fwd_hooks for point in planted_model.hook_dict.values())  # none is left behind

    patterns = [cache[f"blocks.{i}.attn.hook_pattern"][..., 0].mean((0, 2)) for i in range(n_layers)]
    torch.testing.assert_close(trace.attention_to_first, torch.stack(patterns), rtol=1e-5, atol=1e-6)


def test_a_channel_that_spikes_only_in_a_later_window_is_followed(planted_model, trigger_tokens):
    # The first window has no trigger, so its spike channels are unknown when the pass begins.
    trace = spikesink.trace_windows(planted_model, trigger_tokens[[0, 2]])
    assert {9, 30} <= set(trace.channels[: trace.n_followed].tolist())
    assert trace.n_windows == 2


def test_only_what_was_found_is_kept(random_model):
    tokens = spikesink.windows(random_model, "house", 12, 128)

    def kept_per_window(n):
        rows = spikesink.trace_windows(random_model, tokens[:n]).rows
        return sum(getattr(rows, f).nbytes for f in ("stream", "writes", "top_channels", "top_values")) / n

    # Nothing spikes in this model: kept are the four tokens drawn from each window, and nothing of the others.
    row = 4 * (13 * 16 + 12 * 16 + 13 * 3 + 2 * 13 * 3)
    assert kept_per_window(2) == kept_per_window(12) == module.ORDINARY_TOKENS * row


def test_strongest_rows_are_kept_when_there_are_too_many(planted_model, trigger_tokens, monkeypatch):
    monkeypatch.setattr(module, "MAX_ROWS", 6)
    monkeypatch.setattr(module, "MAX_DRAWN", 3)
    tokens = trigger_tokens.repeat(3, 1)
    rows = spikesink.trace_windows(planted_model, tokens).rows
    assert rows.candidate.sum() == 6
    assert 3 <= rows.drawn.sum() <= 3 + 6  # the first three, and those among the strongest that were drawn too
    assert (rows.drawn & ~rows.candidate).sum() <= 3
    assert spikesink.find_lifecycle(spikesink.trace_windows(planted_model, tokens)).main.step_up == (4,)


def test_a_spike_is_followed_though_weaker_channels_fill_the_list_first(planted_model, trigger_tokens, monkeypatch):
    monkeypatch.setattr(module, "MAX_CHANNELS", 1)
    # With 20 medians, ordinary channels reach half of it in the first window.
    trace = spikesink.trace_windows(planted_model, trigger_tokens, threshold=20)
    assert trace.threshold == 20
    assert trace.channels[: trace.n_followed].tolist() == [9]


def test_profile_is_what_the_cache_holds(planted_model, trigger_tokens):
    window = trigger_tokens[2]
    profile = spikesink.profile(planted_model, window)
    _, cache = planted_model.run_with_cache(window[None])
    stream = stream_of(cache, 6)[0].abs()
    torch.testing.assert_close(profile.magnitude, stream.amax(-1), rtol=1e-5, atol=1e-4)
    assert int(profile.magnitude[6].argmax()) == 20
    assert int(profile.channel[6, 20]) == 9
    pattern = cache["blocks.3.attn.hook_pattern"][0]
    received = torch.stack([pattern[:, k:, k].mean(1) for k in range(len(window))], dim=1).mean(0)
    torch.testing.assert_close(profile.attention[3], received, rtol=1e-5, atol=1e-6)


def test_overflow_is_an_error_and_not_the_absence_of_a_spike(tmp_path, trigger_tokens):
    large = planted.plant(planted.random_llama(400), planted.Plant(size=1e5))
    model = spikesink.load(planted.save(large, tmp_path / "large"), dtype="float16")
    with pytest.raises(FloatingPointError, match="float32"):
        spikesink.trace_windows(model, trigger_tokens)


@pytest.mark.usefixtures("any_types")
def test_windows_and_prompts_of_a_wrong_shape_or_length_are_refused(random_model):
    for shape in ((0, 5), (5,), (2, 3, 4), (1, 513)):
        with pytest.raises(ValueError, match=r"windows|context"):
            spikesink.trace_windows(random_model, torch.zeros(shape, dtype=torch.long))
    for length in (0, 513):
        with pytest.raises(ValueError, match="1 to 512 tokens"):
            spikesink.profile(random_model, torch.zeros(length, dtype=torch.long))


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_resident_memory_is_flat_and_far_below_a_cache():
    """On the default model, in a process of its own: resident memory at its peak, after each step."""
    script = """
import re
import spikesink
def peak():  # MB; the kernel's own mark, which unlike getrusage's does not begin at the parent process's peak
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
model = spikesink.load()
tokens = spikesink.windows(model, "house", 8, 256)
model.original_model.base_model(tokens[:1], use_cache=False)  # the weights are mapped in by now
print(peak())
spikesink.trace_windows(model, tokens[:2])
print(peak())
spikesink.trace_windows(model, tokens)
print(peak())
held = model.run_with_cache(tokens[:1])
print(peak())
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    forward, two, eight, cache = map(float, ran.stdout.split())
    assert eight - two < 60
    assert eight - forward < (cache - forward) / 3
