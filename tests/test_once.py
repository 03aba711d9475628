"""What several notebooks measure is measured once, comes back equal, and never stands for another measurement."""

from dataclasses import dataclass
from multiprocessing import get_context

import pytest
import torch

import spikesink
from spikesink.apps import once
from spikesink.chain import collapse
from spikesink.common import NotApplicable
from tests import planted

calls = []


@dataclass(frozen=True)
class Measured:
    """What measures give: numbers, tensors, and reasons."""

    values: torch.Tensor
    reason: NotApplicable
    blocks: tuple


def measure(model, tokens, scale=1.0):
    """A measure that says when it is asked."""
    calls.append(scale)
    return Measured(model(tokens)[0, 0, :3] * scale, NotApplicable("nothing spikes"), (None, {"a": [1]}))


@pytest.fixture
def asked(monkeypatch, tmp_path):
    calls.clear()
    monkeypatch.setenv(once.FOLDER, str(tmp_path / "once"))
    return calls


@pytest.fixture
def model(planted_directory):
    return spikesink.load(planted_directory)


@pytest.mark.parametrize("change", ["nothing", "weight", "config", "tokens", "number", "kind", "source", "folder"])
def test_a_value_comes_back_equal_unless_anything_it_depends_on_changed(
    change, asked, model, planted_directory, monkeypatch
):
    tokens, scale = torch.arange(8)[None], 2
    first = once.once(measure, model, tokens, scale)
    if change == "nothing":
        again = once.once(measure, spikesink.load(planted_directory), tokens.clone(), scale)
        assert asked == [2]
        assert torch.equal(again.values, first.values)
        assert (again.reason, again.blocks) == (first.reason, first.blocks)
        return
    if change == "weight":
        model.original_model.model.layers[3].mlp.down_proj.weight.data[0, 0] += 1e-6
    elif change == "config":
        model.original_model.config.rms_norm_eps *= 2
    elif change == "tokens":
        tokens = tokens.flip(1)
    elif change == "source":
        monkeypatch.setattr(once, "_library", lambda: "changed")
    elif change == "folder":
        monkeypatch.delenv(once.FOLDER)
    else:
        scale = 3 if change == "number" else 2.0
    once.once(measure, model, tokens, scale)
    assert asked == [2, scale]


def test_a_model_that_is_hooked_and_arguments_that_cannot_be_told_apart_are_measured_each_time(asked, model):
    tokens = torch.arange(8)[None]
    with model.hooks(fwd_hooks=[("blocks.0.hook_in", lambda value, hook: 0 * value)]):
        hooked = [once.once(measure, model, tokens) for _ in range(2)]
    assert len(asked) == 2
    assert not torch.equal(once.once(measure, model, tokens).values, hooked[0].values)
    for _ in range(2):
        once.once(lambda model, function: asked.append(function), model, len)
    assert asked[3:] == [len, len]


def test_a_life_cycle_and_a_collapse_are_the_same_from_what_is_kept(asked, model):
    tokens = spikesink.windows(model, spikesink.model.texts.Text("planted", planted.text(3, 48)), 3, 48)
    runs = []
    for _ in range(2):
        life = spikesink.find_lifecycle(once.once(spikesink.trace_windows, model, tokens, 0))
        runs.append((life, once.once(collapse.measure_collapse, model, tokens, life, 0)))
    assert once._plain(runs[0]) == once._plain(runs[1])
    assert runs[0][0].main.step_up == runs[1][0].main.step_up == (4,)
    assert type(runs[1][0].main.step_up[0]) is type(runs[0][0].main.step_up[0])


@pytest.mark.slow
def test_two_processes_at_a_time_do_not_both_measure(planted_directory, monkeypatch, tmp_path):
    monkeypatch.setenv(once.FOLDER, str(tmp_path))
    with get_context("spawn").Pool(2) as pool:
        both = pool.map(_process, [str(planted_directory)] * 2)
    assert sorted(number for number, _ in both) == [0, 1]
    assert torch.equal(both[0][1], both[1][1])


def _process(directory):
    model = spikesink.load(directory)
    value = once.once(measure, model, torch.arange(8)[None])
    return len(calls), value.values
