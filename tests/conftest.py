from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers

import spikesink
from spikesink.model import texts
from tests import planted


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
    return cache(lambda family: planted.save(planted.planted_family(family), folder / family))


@pytest.fixture(scope="session")
def gemma_directory(tmp_path_factory) -> Path:
    """A Gemma 3 in which nothing is planted; its layers see 12 tokens back, but for every third."""
    more = {"sliding_window": 12, "sliding_window_pattern": 3, "head_dim": 16}
    torch.manual_seed(0)
    made = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**planted.SIZES | more)).eval()
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


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield
