"""One prompt under interventions, and the panel of controls: what it shows, and what it says when all is not well."""

import base64

import pytest
import torch

import spikesink
from spikesink import patching, plots
from spikesink.apps import panel as panels

PROMPT = "The old mill stands by the weir, and the river runs to the sea."


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture
def panel(planted_model, life):
    return panels.panel(planted_model, life, "<spike>" + PROMPT)


def test_a_view_is_one_prompt_with_and_without(planted_model, trigger_tokens):
    prompt, cut = trigger_tokens[2], patching.zero(patching.stream(patching.mlp(1)), 20, 9)
    seen = patching.view(planted_model, prompt, cut)
    about = spikesink.anatomy(planted_model)
    for run, cuts in enumerate(((), (cut,))):
        found = {}
        names = [*about.layer_hooks, *about.pattern_hooks]
        hooks = [(name, lambda value, hook, found=found: found.update({hook.name: value.clone()})) for name in names]
        with patching.patched(planted_model, *cuts), planted_model.hooks(fwd_hooks=hooks):
            p = planted_model(prompt[None])[0, -1].softmax(-1)
        sizes = torch.stack([found[name][0].abs().amax(-1) for name in about.layer_hooks])
        assert torch.equal(seen.magnitude[run], sizes)
        pattern = found[about.pattern_hooks[3]][0]
        torch.testing.assert_close(seen.attention[run, 3], pattern.sum(1) / torch.arange(48, 0, -1))
        for text, *probabilities in seen.top:
            token = planted_model.tokenizer.encode(text, add_special_tokens=False)
            if len(token) == 1:
                assert probabilities[run] == pytest.approx(float(p[token[0]]), rel=1e-5)
    assert seen.tokens[20] == "<spike>"
    assert [row[2] for row in seen.top] == sorted((row[2] for row in seen.top), reverse=True)
    assert float(seen.magnitude[0, 3, 20]) > 900 > float(seen.magnitude[1, 3, 20])
    table = patching.next_tokens(seen)
    assert table.count("\n") == 1 + len(seen.top)
    for head in (None, 1):
        assert plots.patched_view(seen, head).axes
    with pytest.raises(ValueError, match=r"must be \[windows, length\] and not empty"):
        patching.view(planted_model, prompt[:0])


@pytest.mark.parametrize(
    ("text", "channels"),
    [("3", [3]), ("3, 10-12 ,5", [3, 5, 10, 11, 12]), ("spike", [9, 30]), ("spike 9 1", [1, 9, 30]), ("63-63", [63])],
)
def test_channels_are_read_as_they_are_typed(text, channels, planted_model):
    assert panels.parse_channels(text, spikesink.anatomy(planted_model), (9, 30)) == channels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no channel was given"),
        ("12-3", "no channel was given"),
        ("spikes", "'spikes' names no channel; give numbers, ranges such as 3-7"),
        ("-3", "'-3' names no channel"),
        ("3-x", "'3-x' names no channel"),
        ("60-64", "channel 64 does not exist; there are channels 0 to 63"),
        ("0-99999999999", "channel 99999999999 does not exist"),
    ],
)
def test_what_names_no_channel_is_said(text, said, planted_model):
    with pytest.raises(ValueError, match=said):
        panels.parse_channels(text, spikesink.anatomy(planted_model), (9, 30))


def test_the_panel_starts_where_the_spike_is(panel):
    assert panel.block.value == 4
    assert panel.said.value == "<b>zero channels 9, 30 of the stream after L1 MLP (block 4) at position 0</b>"
    assert bytes(panel.picture.value).startswith(b"\x89PNG")
    assert panel.table.value.count("<tr>") == 9


def test_every_control_redraws_and_is_obeyed(panel):
    for change, sentence in (
        (
            lambda: setattr(panel.factor, "value", 0.5),
            "scale by 0.5 channels 9, 30 of the stream after L1 MLP",
        ),
        (lambda: setattr(panel.block, "value", 8), "of the stream after L3 MLP (block 8) at position 0"),
        (lambda: setattr(panel.channels, "value", "1-3"), "channels 1 to 3 of the stream after L3 MLP (block 8)"),
        (
            lambda: setattr(panel.channels, "value", "all"),
            "scale by 0.5 the stream after L3 MLP (block 8)",
        ),
        (lambda: setattr(panel.position, "value", 2), "after L3 MLP (block 8) at position 2"),
        (lambda: setattr(panel.mask, "value", True), "; then zero the attention of layers 4, 5 at position 2"),
    ):
        picture = panel.picture.value
        change()
        assert sentence in panel.said.value
        if not panel.mask.value:
            assert panel.picture.value != picture
    picture = panel.picture.value
    panel.head.value = 1
    assert panel.picture.value != picture
    table = panel.table.value
    panel.prompt.value = "<spike> is what we saw"
    assert panel.table.value != table


def test_what_is_wrong_is_said_in_the_panel_and_the_picture_stays(panel):
    picture = panel.picture.value
    for control, value, said in (
        (panel.channels, "spkie", "names no channel"),
        (panel.prompt, "", "a prompt of 0 tokens is not for this panel; give 1 to 64"),
        (panel.prompt, "a b c d e " * 40, "tokens is not for this panel"),
        (panel.prompt, "<spike> so", "position 40 does not exist"),
    ):
        panel.channels.value, panel.position.value = "spike", 40 if "so" in value else 0
        control.value = value
        assert said in panel.said.value
        assert "color" in panel.said.value
        assert "<spike>" not in panel.said.value
    assert bytes(panel.picture.value).startswith(b"\x89PNG")
    panel.prompt.value, panel.position.value = "<spike>" + PROMPT, 0
    assert "color" not in panel.said.value
    assert panel.picture.value == picture


def test_without_widgets_the_picture_stands(panel):
    bundle = panel._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == panel.picture.value
    assert "application/vnd.jupyter.widget-view+json" in bundle
    assert bundle["text/plain"] == "a panel of controls"


def test_a_model_without_a_spike_has_a_panel_too(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 16)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    panel = panels.panel(random_model, life, PROMPT)
    assert panel.said.value == "<b>zero the stream after L2 MLP (block 6) at position 0</b>"
    panel.channels.value = "spike"
    assert "no channel was given" in panel.said.value


def test_controls_wait_until_the_mouse_lets_go(panel):
    controls = (panel.prompt, panel.block, panel.factor, panel.channels, panel.position)
    assert not any(control.continuous_update for control in controls)
