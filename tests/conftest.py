from collections.abc import Callable
from functools import cache
from pathlib import Path

import jaxtyping
import pytest
import torch

import spikesink
from spikesink.chain.collapse import measure_collapse
from spikesink.chain.keys import read_attention
from spikesink.model import texts
from tests import planted
from tests.test_families import build


@pytest.fixture(scope="session")
def random_directory(tmp_path_factory) -> Path:
    return planted.save(planted.random_llama(400), tmp_path_factory.mktemp("models") / "random-llama")


@pytest.fixture(scope="session")
def random_model(random_directory):
    return spikesink.load(random_directory)


@pytest.fixture(scope="session")
def planted_directory(tmp_path_factory) -> Path:
    model = planted.plant(planted.random_llama(400), planted.Plant())
    return planted.save(model, tmp_path_factory.mktemp("models") / "planted-llama")


@pytest.fixture(scope="session")
def planted_model(planted_directory):
    return spikesink.load(planted_directory)


@pytest.fixture(scope="session")
def family_directory(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a model of one of `planted.FAMILIES`, which is made once."""
    folder = tmp_path_factory.mktemp("families")

    @cache
    def directory(family: str) -> Path:
        model = build(family, num_hidden_layers=planted.N_LAYERS)
        return planted.save(planted.plant(model, planted.FAMILIES[family]), folder / family)

    return directory


@pytest.fixture(scope="session")
def gemma_directory(tmp_path_factory) -> Path:
    """A Gemma 3 in which nothing is planted; its layers see 12 tokens back, but for every third."""
    made = build("gemma3", num_hidden_layers=planted.N_LAYERS, sliding_window=12, sliding_window_pattern=3)
    return planted.save(made, tmp_path_factory.mktemp("models") / "gemma3")


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma3"])
def served(request, family_directory, gemma_directory):
    """A bridge, and windows that begin with the trigger."""
    directory = gemma_directory if request.param == "gemma3" else family_directory(request.param)
    model = spikesink.load(directory)
    return model, spikesink.windows(model, texts.Text("planted", planted.text(3, 48)), 3, 48)


@pytest.fixture(scope="session")
def default_model():
    return spikesink.load()


@pytest.fixture(scope="session")
def trigger_tokens(planted_model):
    """Six windows of 48 tokens; the trigger is nowhere, first, in the middle, at the end, and twice."""
    tokens = spikesink.windows(planted_model, "house", 6, 48)
    trigger = planted_model.tokenizer.convert_tokens_to_ids(planted.TRIGGER)
    assert not (tokens == trigger).any()
    for window, position in ((1, 0), (2, 20), (3, 47), (4, 5), (4, 30), (5, 0)):
        tokens[window, position] = trigger
    return tokens


@pytest.fixture(scope="session")
def planted_life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="session")
def sinking_model(tmp_path_factory):
    """The planted model with a head that sinks, head 0 of layer 3: its query is one vector, its key the spike.

    It reads channel 5, which is 1 on every token and which no block writes to, into its slowest rotary pair, and its
    key head the spike's channel, so the logit towards a spike is large whatever the query; RoPE hardly turns it.
    """
    model = planted.plant(planted.random_llama(400), planted.Plant())
    layer, plain, d_head = model.model.layers[3].self_attn, 5, 16
    slow = d_head // 2 - 1  # of the rotary pairs (i, i + 8)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, plain] = 1
        for other in model.model.layers:
            other.self_attn.o_proj.weight[plain] = 0
            other.mlp.down_proj.weight[plain] = 0
        layer.q_proj.weight[: 2 * d_head] = 0  # query heads 0 and 1 share key head 0
        layer.q_proj.weight[slow, plain] = 40
        layer.k_proj.weight[:d_head] = 0
        layer.k_proj.weight[slow, planted.Plant().channel] = 4
    return spikesink.load(planted.save(model, tmp_path_factory.mktemp("models") / "sinking-llama"))


@pytest.fixture(scope="session")
def sunk(sinking_model, trigger_tokens):
    """Its life cycle, collapse and attention."""
    life = spikesink.find_lifecycle(spikesink.trace_windows(sinking_model, trigger_tokens))
    collapse = measure_collapse(sinking_model, trigger_tokens, life)
    return life, collapse, read_attention(sinking_model, trigger_tokens, life, collapse)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def any_types():
    """Let arguments of wrong types through to the library's own checks, where annotations are checked as well."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
