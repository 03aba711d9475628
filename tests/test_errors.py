"""What is wrong is said in one sentence, with what would do: a table of bad inputs to every public entry.

Beside the table stand the files that tests of their own follow further: GGUF files cut short, a full disk, and a
process killed while it caches, with a clean retry after it (test_models); patching's own (test_patching).
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken

import spikesink
from spikesink import patching, plots
from spikesink.__main__ import main
from spikesink.apps import notebook, reproduce, scan
from spikesink.chain import amplifier, collapse, firsttoken, keys, sinks
from spikesink.common import NotApplicable
from spikesink.ledger import claims
from spikesink.ledger.claims import Evidence
from spikesink.model import paths, texts
from spikesink.model.load import LoadError, prepare
from spikesink.model.texts import Text, TextError
from spikesink.model.weights import Weights, weights_of
from tests import planted
from tests.test_models import tiny_gguf

ROOT = Path(__file__).parent.parent
NAN, INFINITE = math.nan, math.inf
NONE = NotApplicable("nothing was collapsed")
HEADER = claims.Header("tiny", "tiny", "0", "house", "0", (1, 2), "float32", 0)
DOWN, NORM = "model.layers.2.mlp.down_proj.weight", "model.layers.1.post_attention_layernorm.weight"


@dataclass(frozen=True)
class World:
    """What the rows of the table take: models, windows and a life cycle that are whole, and ways to break them."""

    folder: Path
    whole: Path  # the planted model's directory
    model: object
    weights: Weights
    tokens: torch.Tensor
    life: object

    def copy(self, name: str, broken: Callable[[Path], None]) -> Path:
        """A copy of the model in several shards, after something was done to it; made once."""
        copy = self.folder / name
        if not copy.exists():
            shutil.copytree(self.folder / "sharded", copy)
            broken(copy)
        return copy

    def shard(self, name: str, change: Callable[[bytes], bytes | None]) -> Path:
        """A copy in which the third shard has other bytes, or is not there."""

        def broken(copy: Path) -> None:
            file = sorted(copy.glob("*.safetensors"))[2]
            new = change(file.read_bytes())
            if new is None:
                file.unlink()
            else:
                file.write_bytes(new)

        return self.copy(name, broken)

    def poisoned(self, weight: str, value: float, row: int = 3) -> Path:
        """The model with one number of a weight replaced."""
        copy = self.folder / f"poisoned-{weight}-{value}"
        if not copy.exists():
            shutil.copytree(self.whole, copy)
            tensors = load_file(copy / "model.safetensors")
            tensors[weight][row] = value
            save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return copy

    def other(self, vocabulary: int = 400, layers: int = planted.N_LAYERS) -> Path:
        """A random model of another size, with the same tokenizer of 400 tokens."""
        directory = self.folder / f"other-{vocabulary}-{layers}"
        if not directory.exists():
            config = planted.random_llama(vocabulary).config
            config.num_hidden_layers = layers
            planted.save(transformers.LlamaForCausalLM(config), directory)
        return directory

    def large(self) -> Path:
        """A model whose spike, on its token 1, is larger than any number in float16."""
        directory = self.folder / "large"
        if not directory.exists():
            planted.save(planted.plant(planted.random_llama(400), planted.Plant(size=1e5)), directory)
        return directory

    def file(self) -> Path:
        """A regular file: nothing can be made below it, by nobody."""
        (self.folder / "file").touch()
        return self.folder / "file"

    def gguf(self) -> Path:
        """A whole GGUF file, which goes through the cache."""
        path = self.folder / "tiny.gguf"
        return path if path.exists() else tiny_gguf(path)

    def with_environment(self, call: Callable, **variables: object) -> object:
        """What a call gives under environment variables."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, str(value))
            return call()


@pytest.fixture(scope="module")
def world(tmp_path_factory, planted_directory, planted_model):
    folder = tmp_path_factory.mktemp("errors")
    whole = transformers.AutoModelForCausalLM.from_pretrained(planted_directory)
    whole.save_pretrained(folder / "sharded", max_shard_size="100KB")
    planted.tokenizer().save_pretrained(folder / "sharded")
    tokens = spikesink.windows(planted_model, "house", 3, 32)
    tokens[1, 0] = tokens[2, 5] = planted_model.tokenizer.convert_tokens_to_ids(planted.TRIGGER)
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, tokens))
    return World(folder, planted_directory, planted_model, weights_of(planted_model), tokens, life)


def replaced(name: str, content: str) -> Callable[[Path], None]:
    return lambda copy: (copy / name).write_text(content) and None


def removed(pattern: str) -> Callable[[Path], None]:
    return lambda copy: [file.unlink() for file in copy.glob(pattern)] and None


def narrower(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


MODELS = "smollm2-135m, a .gguf file, a directory or a hub id"
SOURCES = "house, pydoc, a file's path, or datasets:NAME"
IDS = "tokens must be a tensor of token ids; of a text, model.to_tokens(text) makes them."
OTHER_WINDOWS = "these are not the windows that this life cycle was found in; trace these, or give those."
OTHER_MODEL = (
    "this life cycle was found in a llama model of 6 layers, 64 channels and 400 tokens, not in this llama model; "
    "trace this one."
)

# What is called; the error; its sentence, in which … stands for what differs between machines and libraries.
LOADING = {
    "no model": (lambda w: spikesink.load(None), LoadError, f"a model is named by … not by None; give {MODELS}."),
    "a list": (lambda w: spikesink.load([]), LoadError, f"a model is named by … not by []; give {MODELS}."),
    "a number": (lambda w: spikesink.open_weights(3), LoadError, f"a model is named by … not by 3; give {MODELS}."),
    "an empty name": (lambda w: prepare(""), LoadError, f"a model is named by … not by ''; give {MODELS}."),
    "nobody's home": (
        lambda w: spikesink.load("~no-such-user/model"),
        LoadError,
        "there is no file or directory ~no-such-user/model; check the path.",
    ),
    "a NUL": (lambda w: spikesink.load("a\0b"), LoadError, "there is no file or directory a\0b; check the path."),
    "a list of devices": (
        lambda w: spikesink.load(w.whole, device=["cpu"]),
        LoadError,
        "device ['cpu'] is not one that torch knows; give one of cpu, cuda, cuda:N, auto, disk.",
    ),
    "a device without numbers": (
        lambda w: spikesink.load(w.whole, device="meta"),
        LoadError,
        "device 'meta' cannot be used here; give cpu.",
    ),
    "a dtype that is none": (
        lambda w: spikesink.load(w.whole, dtype=32),
        LoadError,
        "dtype 32 is not one that models run in; give one of float32, bfloat16, float16.",
    ),
    "a shard's header damaged": (
        lambda w: spikesink.load(w.shard("header", lambda b: b[:8] + b"x" * 32 + b[40:])),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (model-00003-of-…safetensors: …); get it again.",
    ),
    "a shard's header damaged, weights only": (
        lambda w: spikesink.open_weights(w.shard("header", lambda b: b[:8] + b"x" * 32 + b[40:])),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (model-00003-of-…safetensors: …); get it again.",
    ),
    "a shard cut short": (
        lambda w: spikesink.load(w.shard("cut", lambda b: b[:1000])),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (model-00003-of-…safetensors: …); get it again.",
    ),
    "an empty shard": (
        lambda w: spikesink.open_weights(w.shard("empty", lambda b: b"")),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (model-00003-of-…safetensors: …); get it again.",
    ),
    "a shard that is not there": (
        lambda w: spikesink.load(w.shard("gone", lambda b: None)),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (…model-00003-of-…safetensors); get it again.",
    ),
    "a shard that is not there, weights only": (
        lambda w: spikesink.open_weights(w.shard("gone", lambda b: None)),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (…model-00003-of-…safetensors); get it again.",
    ),
    "shards without their index": (
        lambda w: spikesink.load(w.copy("index", removed("*.index.json"))),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (…); get it again.",
    ),
    "an index that is no JSON": (
        lambda w: spikesink.load(w.copy("index-json", replaced("model.safetensors.index.json", "{"))),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (…); get it again.",
    ),
    "a config that is no JSON": (
        lambda w: spikesink.load(w.copy("config-json", replaced("config.json", "{"))),
        LoadError,
        "… cannot be loaded: it is incomplete or damaged (…config.json' is not a valid JSON file); get it again.",
    ),
    "another model's config": (
        lambda w: spikesink.load(w.copy("narrower", narrower)),
        LoadError,
        "… cannot be loaded: its weights have other shapes than its config.json says; put two there that belong "
        "together.",
    ),
    "no tokenizer": (
        lambda w: spikesink.load(w.copy("no-tokenizer", removed("tokenizer*"))),
        LoadError,
        "… cannot be loaded: its tokenizer is incomplete or damaged (…); get it again.",
    ),
    "a damaged tokenizer": (
        lambda w: spikesink.load(w.copy("tokenizer-json", replaced("tokenizer.json", "{}"))),
        LoadError,
        "… cannot be loaded: its tokenizer is incomplete or damaged (…); get it again.",
    ),
}

ENVIRONMENT = {
    "a cache that cannot be made": (
        lambda w: w.with_environment(lambda: spikesink.load(w.gguf()), SPIKESINK_CACHE=w.file() / "cache"),
        LoadError,
        "the cache … could not be written (Not a directory); make room there or set SPIKESINK_CACHE to another "
        "directory.",
    ),
    "a cache that is a file": (
        lambda w: w.with_environment(lambda: spikesink.load(w.gguf()), SPIKESINK_CACHE=w.file()),
        LoadError,
        "the cache … could not be written (File exists); make room there or set SPIKESINK_CACHE to another directory.",
    ),
    "nowhere to offload to": (
        lambda w: w.with_environment(lambda: spikesink.load(w.whole, "disk"), SPIKESINK_CACHE=w.file() / "cache"),
        LoadError,
        "the cache … could not be written (Not a directory); make room there or set SPIKESINK_CACHE to another "
        "directory.",
    ),
    "a budget without a device": (
        lambda w: w.with_environment(lambda: spikesink.load(w.whole, "auto"), SPIKESINK_MAX_MEMORY="8GB"),
        LoadError,
        "SPIKESINK_MAX_MEMORY is '8GB'; give a device and a size each, without spaces between them, as in "
        "0=20GB cpu=8GB.",
    ),
    "a budget with a space in it": (
        lambda w: w.with_environment(lambda: spikesink.load(w.whole, "auto"), SPIKESINK_MAX_MEMORY="cpu=600 MB"),
        LoadError,
        "SPIKESINK_MAX_MEMORY is 'cpu=600 MB'; give a device and a size each, without spaces between them, as in "
        "0=20GB cpu=8GB.",
    ),
    "a budget that no notebook could use": (
        lambda w: w.with_environment(lambda: prepare(w.whole, "auto"), SPIKESINK_MAX_MEMORY="cpu=much"),
        LoadError,
        "SPIKESINK_MAX_MEMORY 'cpu=much' holds no size such as 8GB; give sizes, as in 0=20GB cpu=8GB.",
    ),
    "figures that cannot be made": (
        lambda w: w.with_environment(
            lambda: notebook.open_ledger("01_one", w.model, w.tokens).save(plots.chain(), "one"),
            SPIKESINK_FIGURES=w.file() / "figures",
        ),
        OSError,
        "the folder … cannot be written (Not a directory); make room there, or give another place for figures.",
    ),
    "a ledger that cannot be made": (
        lambda w: w.with_environment(
            lambda: notebook.open_ledger("01_one", w.model, w.tokens).record({"LC1": NONE}),
            SPIKESINK_FIGURES=w.file() / "figures",
        ),
        OSError,
        "the folder … cannot be written (Not a directory); make room there, or give another place for figures.",
    ),
}

TEXTS = {
    "no text": (lambda w: spikesink.read(None), TextError, f"a text is named by … not by None; give {SOURCES}."),
    "a directory": (lambda w: spikesink.read(w.folder), TextError, f"there is no text '…'; give {SOURCES}."),
    "the text itself": (
        lambda w: spikesink.read("The river runs to the sea. " * 200),
        TextError,
        f"there is no text 'The river …'; give {SOURCES}.",
    ),
    "a data set without a name": (
        lambda w: spikesink.read("datasets:"),
        TextError,
        "'datasets:' names no data set; give datasets:NAME.",
    ),
    "an empty text": (
        lambda w: spikesink.windows(w.model, Text("mine", ""), 2, 16),
        TextError,
        "the text 'mine' has 0 tokens, enough for 0 windows of 16, not 2; ask for fewer or shorter ones, or give a "
        "longer text.",
    ),
    "a number in words": (
        lambda w: spikesink.windows(w.model, n="4"),
        TextError,
        "n must be a whole number, but is '4'.",
    ),
    "half a window": (lambda w: spikesink.windows(w.model, n=1.5), TextError, "n must be a whole number, but is 1.5."),
    "yes as a length": (
        lambda w: spikesink.windows(w.model, length=True),
        TextError,
        "length must be a whole number, but is True.",
    ),
    "a seed below zero": (
        lambda w: spikesink.windows(w.model, seed=-1),
        TextError,
        "seed -1 is negative; give a whole number of at least 0.",
    ),
    "a name for a model": (
        lambda w: spikesink.windows("smollm2-135m"),
        ValueError,
        "'smollm2-135m' is no model; give what load returned.",
    ),
    "another model's tokenizer": (
        lambda w: spikesink.windows(spikesink.load(w.other(vocabulary=100))),
        TextError,
        "the tokenizer makes token 399 of the text 'house', but the model has embeddings for 0 to 99 only; it seems to "
        "be another model's, so put this model's own tokenizer beside its weights.",
    ),
    "another model's tokenizer, counted": (
        lambda w: texts.token_counts(spikesink.load(w.other(vocabulary=100)), Text("mine", "The clock")),
        TextError,
        "the tokenizer makes token … of the text 'mine', but the model has embeddings for 0 to 99 only; it seems to "
        "be another model's, so put this model's own tokenizer beside its weights.",
    ),
}

TRACE = {
    "a list": (lambda w: spikesink.trace_windows(w.model, w.tokens.tolist()), ValueError, IDS),
    "a text": (lambda w: spikesink.profile(w.model, "The clock"), ValueError, IDS),
    "floats": (lambda w: spikesink.trace_windows(w.model, w.tokens.float()), ValueError, IDS),
    "truth values": (lambda w: sinks.score(w.model, w.tokens > 3), ValueError, IDS),
    "nothing": (lambda w: spikesink.find_spikes(w.model, w.life, None), ValueError, IDS),
    "an array": (lambda w: firsttoken.compare_static_map(w.model, w.tokens.numpy()), ValueError, IDS),
    "one window without a batch": (
        lambda w: firsttoken.read_self_attention(w.model, w.tokens[0], 4, 9),
        ValueError,
        "tokens must be [windows, length] and not empty, but are [32].",
    ),
    "a token beyond the vocabulary": (
        lambda w: spikesink.trace_windows(w.model, w.tokens + 400),
        ValueError,
        "token … does not exist; this model's vocabulary has ids 0 to 399.",
    ),
    "a prompt with a token below zero": (
        lambda w: spikesink.profile(w.model, w.tokens[0] - 400),
        ValueError,
        "token -… does not exist; this model's vocabulary has ids 0 to 399.",
    ),
    "all padding": (
        lambda w: spikesink.trace_windows(w.model, padded(w.tokens, w.model, 1)),
        ValueError,
        "window 1 holds nothing but padding (token 0); leave it out, or fill it with text.",
    ),
    "all padding, scored": (
        lambda w: sinks.score(w.model, padded(w.tokens, w.model, 0, 1, 2)),
        ValueError,
        "window 0 holds nothing but padding (token 0); leave it out, or fill it with text.",
    ),
    "a model's name": (
        lambda w: spikesink.trace_windows("smollm2-135m", w.tokens),
        ValueError,
        "'smollm2-135m' is no model; give what load returned.",
    ),
}

NOT_FINITE = {
    "NaN, traced": (
        lambda w: spikesink.trace_windows(spikesink.load(w.poisoned(DOWN, NAN)), w.tokens),
        FloatingPointError,
        f"the residual stream as it enters layer 3 is not finite in float32, because the weight {DOWN} is not; get the "
        "model again.",
    ),
    "infinite, traced": (
        lambda w: spikesink.trace_windows(spikesink.load(w.poisoned(DOWN, INFINITE)), w.tokens),
        FloatingPointError,
        f"the residual stream as it enters layer 3 is not finite in float32, because the weight {DOWN} is not; get the "
        "model again.",
    ),
    "NaN in half precision": (
        lambda w: spikesink.profile(spikesink.load(w.poisoned(NORM, NAN), dtype="bfloat16"), w.tokens[0]),
        FloatingPointError,
        f"the residual stream as it enters layer 2 is not finite in bfloat16, because the weight {NORM} is not; get "
        "the model again, or load it in float32.",
    ),
    "NaN on disk": (
        lambda w: sinks.score(spikesink.load(w.poisoned(DOWN, NAN), "disk"), w.tokens),
        FloatingPointError,
        "the residual stream as it enters layer 3 is not finite in float32; its activations overflow, or weights that "
        "are on disk are not finite, so get the model again.",
    ),
    "NaN, by the census": (
        lambda w: amplifier.census(spikesink.open_weights(w.poisoned(DOWN, NAN))),
        FloatingPointError,
        "the FFN of layer 2, or the norm that it reads through, has weights that are not finite; get the model again.",
    ),
    "NaN in a norm, by the census": (
        lambda w: amplifier.census(weights_of(spikesink.load(w.poisoned(NORM, NAN)))),
        FloatingPointError,
        "the FFN of layer 1, or the norm that it reads through, has weights that are not finite; get the model again.",
    ),
    "NaN, on the static path": (
        lambda w: paths.static_path(
            spikesink.open_weights(w.poisoned("model.layers.1.self_attn.v_proj.weight", NAN)), torch.tensor([7]), 4
        ),
        FloatingPointError,
        "the attention of layer 1, or the norm that it reads through, has weights that are not finite; get the model "
        "again.",
    ),
    "NaN in an embedding, by the probe": (
        lambda w: firsttoken.probe(spikesink.open_weights(w.poisoned("model.embed_tokens.weight", NAN, row=5)), w.life),
        FloatingPointError,
        "the embedding of token 5 is not finite; get the model again.",
    ),
    "NaN past the layers that TK2 would compare": (
        lambda w: firsttoken.compare_static_map(spikesink.load(w.poisoned(DOWN, NAN)), w.tokens),
        FloatingPointError,
        f"the residual stream or what attention adds to it is not finite in float32, because the weight {DOWN} is not; "
        "get the model again.",
    ),
    "NaN in the unembedding": (
        lambda w: patching.evaluate(
            spikesink.load(w.poisoned("lm_head.weight", NAN)), w.tokens, patching.skip(patching.mlp(1))
        ),
        FloatingPointError,
        "what the model predicts when nothing is changed is not finite in float32, because the weight lm_head.weight "
        "is not; get the model again.",
    ),
    "a static path that overflows": (
        lambda w: paths.static_path(spikesink.open_weights(w.large()), torch.tensor([1]), 4, torch.float16),
        FloatingPointError,
        "the static path is not finite after layer 1 in float16; use float32.",
    ),
}

MEASURES = {
    "a life cycle of tokens": (
        lambda w: spikesink.find_lifecycle(w.tokens),
        ValueError,
        "a life cycle is found in what trace_windows returned, not in a Tensor.",
    ),
    "a step in words": (
        lambda w: spikesink.find_lifecycle(w.life.trace, step="0.1"),
        ValueError,
        "step must lie between 0 and 1, but is '0.1'.",
    ),
    "other windows, amplifier": (
        lambda w: amplifier.read_block(w.model, w.tokens.flip(0), w.life),
        ValueError,
        OTHER_WINDOWS,
    ),
    "fewer windows, amplifier": (
        lambda w: amplifier.read_block(w.model, w.tokens[:2], w.life),
        ValueError,
        OTHER_WINDOWS,
    ),
    "other windows, hits": (
        lambda w: amplifier.census_on_text(w.model, w.tokens[1:], w.life, amplifier.census(w.weights)),
        ValueError,
        OTHER_WINDOWS,
    ),
    "shorter windows, delimiters": (
        lambda w: firsttoken.compare_delimiters(w.model, w.tokens[:, :20], w.life, w.life.main),
        ValueError,
        OTHER_WINDOWS,
    ),
    "another model, amplifier": (
        lambda w: amplifier.step_up_direction(spikesink.open_weights(w.other(layers=3)), w.life),
        ValueError,
        OTHER_MODEL,
    ),
    "another model, spikes": (
        lambda w: spikesink.find_spikes(spikesink.load(w.other(layers=3)), w.life, w.tokens),
        ValueError,
        OTHER_MODEL,
    ),
    "another model, first token": (
        lambda w: firsttoken.probe(spikesink.open_weights(w.other(layers=3)), w.life),
        ValueError,
        OTHER_MODEL,
    ),
    "another model, collapse": (
        lambda w: collapse.measure_collapse(spikesink.load(w.other(layers=3)), w.tokens, w.life),
        ValueError,
        OTHER_MODEL,
    ),
    "another model, sinks": (
        lambda w: keys.read_attention(spikesink.load(w.other(layers=3)), w.tokens, w.life, NONE),
        ValueError,
        OTHER_MODEL,
    ),
    "a model for weights": (
        lambda w: amplifier.census(w.model),
        ValueError,
        "a census is of weights, not of a TransformerBridge; give weights_of(model).",
    ),
    "a model on the static path": (
        lambda w: paths.static_path(w.model, torch.tensor([7]), 4),
        ValueError,
        "a static path is one of weights, not of a TransformerBridge; give weights_of(model).",
    ),
    "a layer in words": (
        lambda w: w.weights.ffn("1"),
        ValueError,
        "layer '1' does not exist; this model has layers 0 to 5.",
    ),
    "a channel in words": (
        lambda w: amplifier.eigenpairs(w.weights.ffn(1), "9"),
        ValueError,
        "channel '9' does not exist; this model has channels 0 to 63.",
    ),
    "half an eigenpair": (
        lambda w: amplifier.eigenpairs(w.weights.ffn(1), 9, 1.5),
        ValueError,
        "1.5 eigenpairs were asked for, and Lanczos finds 1 to 63 of 64.",
    ),
    "an attention block in the census": (
        lambda w: amplifier.census(w.weights).rank_in_block(3, 9),
        ValueError,
        "L1 attn (block 3), channel 9 is not among the FFN blocks up to L5 MLP (block 12) with channels 0 to 63.",
    ),
    "a block in words": (
        lambda w: paths.static_path(w.weights, torch.tensor([7]), "4"),
        ValueError,
        "block '4' does not exist; this model has blocks 1 to 12.",
    ),
    "a list to probe": (
        lambda w: firsttoken.probe(w.weights, w.life, [7, 8]),
        ValueError,
        "tokens must be a one-dimensional tensor of token ids, and not empty.",
    ),
    "half a position": (
        lambda w: paths.prefixes(w.tokens, 2, 1.5),
        ValueError,
        "position 1.5 is not in windows of 32 tokens.",
    ),
    "yes as an epsilon": (
        lambda w: sinks.score(w.model, w.tokens, epsilon=True),
        ValueError,
        "epsilon must lie between 0 and 1, both excluded, but is True.",
    ),
    "yes as a length": (
        lambda w: sinks.score(w.model, w.tokens, length=True),
        ValueError,
        "length must be a whole number of tokens, but is True.",
    ),
    "a set of floats": (
        lambda w: sinks.score(w.model, w.tokens, groups={"mine": torch.ones(3, 32)}),
        ValueError,
        "the set 'mine' of key tokens must have the shape of the windows, [3, 32], and hold truth values.",
    ),
    "a patch of a model's name": (
        lambda w: patching.evaluate("smollm2-135m", w.tokens),
        ValueError,
        "'smollm2-135m' is no model; give what load returned.",
    ),
}

CLAIMS = {
    "a claim that there is not": (
        lambda w: claims.judge("LC99", NONE, "01_one"),
        ValueError,
        "there is no claim 'LC99'; rules.RULES lists those there are.",
    ),
    "a dictionary for evidence": (
        lambda w: claims.judge("LC2", {"plateau_write_ratio": 0.0}, "01_one"),
        ValueError,
        "LC2 is judged by Evidence or NotApplicable, not by a dict.",
    ),
    "a measure left out": (
        lambda w: claims.judge("LC2", Evidence({"ratio": 0.0}, {"ratio": 1.0}), "01_one"),
        ValueError,
        "LC2 cannot be judged without 'plateau_write_ratio'; measure it too.",
    ),
    "NaN in a list": (
        lambda w: claims.judge("AB7", Evidence({"factors": [0.0, 1.0], "perplexities": [NAN, 1.0]}, {"a": 1}), "08"),
        ValueError,
        "AB7: perplexities[0] is nan, which is no number that a ledger can hold.",
    ),
    "a damaged ledger": (
        lambda w: claims.record(w.copy("ledger", replaced("claims.json", "{")), HEADER, {}),
        ValueError,
        "the ledger … is damaged (…); remove it and run its notebooks again.",
    ),
    "a damaged ledger, rendered": (
        lambda w: claims.ledgers(w.copy("ledger", replaced("claims.json", "{")).parent),
        ValueError,
        "the ledger … is damaged (…); remove it and run its notebooks again.",
    ),
}

SCAN = {
    "no entries": (
        lambda w: scan.plan(w.whole, 0),
        ValueError,
        "0 entries were asked for, and this model's vocabulary has 400; ask for 1 to 400.",
    ),
    "more entries than there are": (
        lambda w: scan.scan(w.whole, 500),
        ValueError,
        "500 entries were asked for, and this model's vocabulary has 400; ask for 1 to 400.",
    ),
    "nowhere to keep layers": (
        lambda w: scan.scan(w.whole, 40, w.file() / "kept"),
        OSError,
        "the layers cannot be kept in … (Not a directory); make room there, or keep them elsewhere.",
    ),
    "NaN, scanned": (
        lambda w: scan.scan(w.poisoned(DOWN, NAN), 40),
        FloatingPointError,
        "the FFN of layer 2, or the norm that it reads through, has weights that are not finite; get the model again.",
    ),
    "no GGUF file, planned": (
        lambda w: scan.plan(w.file()),
        LoadError,
        "… is a file but not GGUF; give a .gguf file, or the directory the model is in.",
    ),
    "a number, planned": (lambda w: scan.plan(3), LoadError, f"a model is named by … not by 3; give {MODELS}."),
}

TABLE = {
    f"{group}: {name}": row
    for group, rows in {
        "load": LOADING,
        "environment": ENVIRONMENT,
        "text": TEXTS,
        "trace": TRACE,
        "not finite": NOT_FINITE,
        "scan": SCAN,
        "measure": MEASURES,
        "claims": CLAIMS,
    }.items()
    for name, row in rows.items()
}


def padded(tokens: torch.Tensor, model, *windows: int) -> torch.Tensor:
    """The same tokens, with nothing but padding in some windows."""
    return tokens.index_fill(0, torch.tensor(windows), model.tokenizer.pad_token_id)


def says(sentence: str, text: str) -> bool:
    """Whether a text is a sentence in which … stands for anything."""
    return re.fullmatch(".*".join(map(re.escape, sentence.split("…"))), text) is not None


@pytest.mark.parametrize(("call", "error", "sentence"), TABLE.values(), ids=TABLE)
def test_what_is_wrong_is_said_in_one_sentence(call, error, sentence, world):
    with pytest.raises(error) as raised:
        call(world)
    text = str(raised.value)
    assert says(sentence, text), text
    assert "\n" not in text
    assert len(text) < 400


def test_the_table_is_as_long_as_it_should_be():
    assert len(TABLE) >= 30


def test_what_is_broken_in_the_table_is_all_that_is_wrong_with_it(world):
    """The same calls on what is whole: each row's error is about what its name says."""
    sharded = spikesink.load(world.folder / "sharded")
    assert torch.equal(spikesink.trace_windows(sharded, world.tokens).medians, world.life.trace.medians)
    assert amplifier.census(spikesink.open_weights(world.folder / "sharded")).gain.isfinite().all()
    assert firsttoken.probe(world.weights, world.life).spiking.any()
    assert sinks.score(world.model, world.tokens).at.isfinite().all()
    assert math.isfinite(patching.evaluate(world.model, world.tokens, patching.skip(patching.mlp(1))).perplexity)


def test_a_larger_embedding_than_the_tokenizer_is_no_error(world):
    """Vocabularies are padded to round numbers."""
    model = spikesink.load(world.other(vocabulary=512))
    assert spikesink.anatomy(model).d_vocab == 512 > len(model.tokenizer)
    assert int(spikesink.windows(model, "house", 2, 16).max()) < 400
    assert len(texts.token_counts(model)) == 512


def test_a_token_without_an_embedding_is_an_error_only_where_a_text_needs_it(world):
    """Tokens that somebody added to a tokenizer (for padding, mostly) often have no embedding, and do no harm."""
    directory = world.copy("added", lambda copy: None)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken("<mine>", special=True)])
    tokenizer.save_pretrained(directory)
    model = spikesink.load(directory)
    assert len(model.tokenizer) == 401 > spikesink.anatomy(model).d_vocab
    assert spikesink.windows(model, "house", 2, 16).shape == (2, 16)
    with pytest.raises(TextError, match="token 400 of the text 'mine', but the model has embeddings for 0 to 399 only"):
        spikesink.windows(model, Text("mine", "The <mine> clock " * 20), 2, 16)


def test_one_token_of_padding_is_no_window_of_it(world):
    """A beginning-of-text token can serve as padding too, and is looked at by itself."""
    assert spikesink.profile(world.model, torch.tensor([0])).magnitude.shape == (13, 1)
    assert spikesink.trace_windows(world.model, torch.tensor([[0]])).n_windows == 1


COMMAND = {
    "nobody's home": (["--model", "~no-such-user/x"], "there is no file or directory ~no-such-user/x; check the path."),
    "no text": (["--text", ""], f"there is no text ''; give {SOURCES}."),
    "the text itself": (["--text", "word " * 200], f"there is no text 'word …'; give {SOURCES}."),
    "another model's tokenizer": (["--model", "{other}"], "the tokenizer makes token 399 of the text 'house', but …"),
    "a damaged tokenizer": (["--model", "{damaged}"], "… its tokenizer is incomplete or damaged (…); get it again."),
    "figures below a file": (
        ["--figures", "{file}/figures"],
        "the folder … cannot be written (Not a directory); make it writable, or give another.",
    ),
    "a build folder below a file": (
        ["--build", "{file}/build"],
        "the folder … cannot be written (Not a directory); make it writable, or give another.",
    ),
}


@pytest.mark.parametrize(("given", "sentence"), COMMAND.values(), ids=COMMAND)
def test_make_says_it_before_a_kernel_starts(given, sentence, world, tmp_path, monkeypatch, capfd):
    """As `make` passes its variables on; more of them are in test_reproduce."""
    monkeypatch.setattr(reproduce, "_execute", lambda *_: pytest.fail("a notebook was started"))
    places = {
        "other": world.other(vocabulary=100),
        "damaged": world.copy("tokenizer-json", replaced("tokenizer.json", "{}")),
        "file": world.file(),
    }
    arguments = ["--notebooks", str(ROOT / "notebooks"), "--figures", str(tmp_path / "figures")]
    arguments += ["--build", str(tmp_path / "build"), "--model", str(world.whole)]
    assert main(["figures", *arguments, *(part.format(**places) for part in given)]) == 1
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 2
    assert says(sentence, lines[1]), lines[1]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(
    ("variable", "sentence"),
    [
        ("MODEL=", "argument --model: '' names no model (see --help)"),
        ("N_PROMPTS=x", "argument --n-prompts: 'x' is not a whole number of at least 1 (see --help)"),
        ("SEQ_LEN=", "argument --seq-len: '' is not a whole number of at least 2 (see --help)"),
        ("SEED=-1", "argument --seed: '-1' is not a whole number of at least 0 (see --help)"),
    ],
)
def test_make_itself_passes_it_on(variable, sentence):
    # Without READY the environment is taken as it is.
    command = ["make", "figures", "READY=", f"BIN={Path(sys.executable).parent}", variable]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    said = ran.stderr.splitlines()
    assert ran.returncode == 2
    assert said[0] == sentence
    assert len(said) == 2  # the other is make's own
    assert said[1].startswith("make")
