"""One prompt under interventions, and the panel of controls: what it shows, and what it says when all is not well."""

import base64

import pytest
import torch

import spikesink
from spikesink import patching
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
    view, anatomy = patching.view(planted_model, prompt, cut), planted_model.anatomy
    for run, cuts in enumerate(((), (cut,))):
        with patching.patched(planted_model, *cuts):
            logits, passing = planted_model.run_with_cache(prompt[None])
        p = logits[0, -1].softmax(-1)
        assert torch.equal(
            view.magnitude[run], torch.stack([passing[h][0].abs().amax(-1) for h in anatomy.layer_hooks])
        )
        pattern = passing[anatomy.pattern_hooks[3]][0]
        torch.testing.assert_close(view.attention[run, 3], pattern.sum(1) / torch.arange(48, 0, -1))
        for text, *probabilities in view.top:
            token = planted_model.tokenizer.encode(text, add_special_tokens=False)
            if len(token) == 1:
                assert probabilities[run] == pytest.approx(float(p[token[0]]), rel=1e-5)
    assert view.tokens[20] == "<spike>"
    assert [row[2] for row in view.top] == sorted((row[2] for row in view.top), reverse=True)
    assert float(view.magnitude[0, 3, 20]) > 900 > float(view.magnitude[1, 3, 20])


@pytest.mark.parametrize(("text", "channels"), [("3, 10-12 ,5", [3, 5, 10, 11, 12]), ("spike 9 1", [1, 9, 30])])
def test_channels_are_read_as_they_are_typed(text, channels):
    assert panels.parse_channels(text, 64, (9, 30)) == channels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no channel was given"),
        ("3-x", "'3-x' names no channel"),
        ("0-99999999999", "channel 99999999999 does not exist; there are channels 0 to 63"),
    ],
)
def test_what_names_no_channel_is_said(text, said):
    with pytest.raises(ValueError, match=said):
        panels.parse_channels(text, 64, (9, 30))


def test_the_panel_starts_where_the_spike_is(panel):
    assert panel.block.value == patching.mlp(1)
    assert panel.said.value == "<b>zero channels 9, 30 of the stream after L1 MLP (block 4) at position 0</b>"
    bundle = panel._repr_mimebundle_()  # without widgets the picture stands
    assert base64.b64decode(bundle["image/png"]) == panel.picture.value
    assert "application/vnd.jupyter.widget-view+json" in bundle


def test_every_control_redraws_and_is_obeyed(panel):
    for name, value, sentence in (
        ("factor", 0.5, "scale by 0.5 channels 9, 30 of the stream after L1 MLP"),
        ("block", patching.mlp(3), "of the stream after L3 MLP (block 8) at position 0"),
        ("channels", "1-3", "channels 1 to 3 of the stream after L3 MLP"),
        ("channels", "all", "scale by 0.5 the stream after L3 MLP"),
        ("position", 2, "at position 2"),
        ("head", 1, "at position 2"),
        ("mask", True, "; then zero the attention of layers 4, 5 at position 2"),
    ):
        picture = panel.picture.value
        getattr(panel, name).value = value
        assert sentence in panel.said.value
        assert name == "mask" or panel.picture.value != picture
    table = panel.table.value
    panel.prompt.value = "<spike> is what we saw"
    assert panel.table.value != table


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [("channels", "spkie", "names no channel"), ("prompt", "a b c d e " * 40, "tokens is not for this panel")],
)
def test_what_is_wrong_is_said_in_the_panel_and_the_picture_stays(control, value, said, panel):
    picture, control = panel.picture.value, getattr(panel, control)
    right, control.value = control.value, value
    assert said in panel.said.value
    assert "color" in panel.said.value
    assert panel.picture.value == picture
    control.value = right
    assert "color" not in panel.said.value


def test_a_model_without_a_spike_has_a_panel_too(random_model):
    tokens = spikesink.windows(random_model, "house", 2, 16)
    life = spikesink.find_lifecycle(spikesink.trace_windows(random_model, tokens))
    panel = panels.panel(random_model, life, PROMPT)
    assert panel.said.value == "<b>zero the stream after L2 MLP (block 6) at position 0</b>"
    panel.channels.value = "spike"
    assert "no channel was given" in panel.said.value
