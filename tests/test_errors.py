"""What is wrong is said in one sentence, with what would do: a table of bad inputs to every public entry.

Files that tests of their own follow further are in test_models (GGUF cut short, a full disk, a process killed while it
caches); patching's own bad inputs are in test_patching, the command line's in test_reproduce.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

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
from spikesink.model.errors import LoadError
from spikesink.model.texts import Text, TextError
from spikesink.model.weights import Weights, weights_of
from tests import planted
from tests.test_models import tiny_gguf

pytestmark = pytest.mark.usefixtures("any_types")

ROOT = Path(__file__).parent.parent
NAN = math.nan
NONE = NotApplicable("nothing was collapsed")
HEADER = claims.Header("tiny", "tiny", "0", "house", "0", (1, 2), "float32", 0)
DOWN, NORM = "model.layers.2.mlp.down_proj.weight", "model.layers.1.post_attention_layernorm.weight"
FIRST = "model.layers.1.mlp.down_proj.weight"  # it writes the spike
EMBEDDING, VALUE = "model.embed_tokens.weight", "model.layers.1.self_attn.v_proj.weight"


@dataclass(frozen=True)
class World:
    """What the rows of the table take: models, windows and a life cycle that are whole, and ways to break them."""

    folder: Path
    whole: Path  # the planted model's directory
    model: object
    tokens: torch.Tensor
    life: object

    @property
    def weights(self) -> Weights:
        return weights_of(self.model)

    def fresh(self) -> Path:
        return Path(tempfile.mkdtemp(dir=self.folder))

    def copy(self, broken: Callable[[Path], object] = lambda copy: None) -> Path:
        """A copy of the model in several shards, after something was done to it."""
        copy = shutil.copytree(self.folder / "sharded", self.fresh(), dirs_exist_ok=True)
        broken(copy)
        return copy

    def load(self, *options: object, **variables: object) -> object:
        """The whole model, placed or rounded as asked, under environment variables."""
        return self.under(lambda: spikesink.load(self.whole, *options), **variables)

    def config(self, config: transformers.PretrainedConfig | dict) -> object:
        """Load a configuration, with weights that nobody should get to."""
        directory = self.fresh()
        content = config if isinstance(config, dict) else config.to_dict()
        (directory / "config.json").write_text(json.dumps(content, default=str))
        (directory / "model.safetensors").touch()
        return spikesink.load(directory)

    def poisoned(self, weight: str, value: float = NAN, *options: str) -> object:
        """The model with a row of a weight replaced."""
        copy = shutil.copytree(self.whole, self.fresh(), dirs_exist_ok=True)
        tensors = load_file(copy / "model.safetensors")
        tensors[weight][3] = value
        save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
        return spikesink.load(copy, *options)

    def other(self, vocabulary: int = 400) -> object:
        """A random model of three layers, with the same tokenizer of 400 tokens."""
        config = planted.random_llama(vocabulary).config
        config.num_hidden_layers = 3
        return spikesink.load(planted.save(transformers.LlamaForCausalLM(config), self.fresh()))

    def file(self, name: str = "file", content: bytes = b"") -> Path:
        """A regular file: nothing can be made below it, by nobody."""
        (self.folder / name).write_bytes(content)
        return self.folder / name

    def under(self, call: Callable, **variables: object) -> object:
        """What a call gives under environment variables."""
        with mock.patch.dict(os.environ, {name: str(value) for name, value in variables.items()}):
            return call()

    def ledger(self) -> notebook.Ledger:
        """A ledger in a folder that cannot be made."""
        return self.under(
            lambda: notebook.open_ledger("01_one", self.model, self.tokens), SPIKESINK_FIGURES=self.file()
        )


@pytest.fixture(scope="module")
def world(tmp_path_factory, planted_directory, planted_model):
    folder = tmp_path_factory.mktemp("errors")
    whole = transformers.AutoModelForCausalLM.from_pretrained(planted_directory)
    whole.save_pretrained(folder / "sharded", max_shard_size="100KB")
    planted.tokenizer().save_pretrained(folder / "sharded")
    tokens = spikesink.windows(planted_model, "house", 3, 32)
    tokens[1, 0] = tokens[2, 5] = planted_model.tokenizer.convert_tokens_to_ids(planted.TRIGGER)
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, tokens))
    return World(folder, planted_directory, planted_model, tokens, life)


def third(copy: Path) -> Path:
    """The third shard of a copy."""
    return sorted(copy.glob("*.safetensors"))[2]


def remove(pattern: str) -> Callable[[Path], object]:
    return lambda copy: [file.unlink() for file in copy.glob(pattern)]


def write(pattern: str, content: str) -> Callable[[Path], object]:
    return lambda copy: [file.write_text(content) for file in copy.glob(pattern)]


def cut_shard(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda copy: third(copy).write_bytes(change(third(copy).read_bytes()))


def drop_matrix(copy: Path) -> None:
    save_file(dict(list(load_file(third(copy)).items())[1:]), third(copy), metadata={"format": "pt"})


def narrow(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


MODELS = "give .*gguf file, a directory or a hub id"
SOURCES = "give house, pydoc, a file's path, or datasets:NAME"
IDS = r"token ids.*model\.to_tokens\(text\)"
OTHERS = ", but .* 0 to 99 only.*put this model's own tokenizer"
SHARD = r"model-00003-of-\d+\.safetensors is incomplete or damaged.*get it again"
DAMAGED = "incomplete or damaged.*get it again"
OTHER_WINDOWS = "not the windows that this life cycle was found in"
OTHER_MODEL = "6 layers, 64 channels and 400 tokens, not in this llama model; trace this one"
UNWRITABLE = r"cannot be written \(Not a directory\); make room there"
BUDGET = "SPIKESINK_MAX_MEMORY '.*' .*as in 0=20GB cpu=8GB"
CACHE = "cache .* could not be written.*SPIKESINK_CACHE"


# What is done to a directory of shards, and what the sentence names.
BROKEN = {
    "no weights": (remove("*.safetensors"), r"lacks \d+ of its files, the first is model-00001.*put it there"),
    "a shard's header damaged": (cut_shard(lambda whole: whole[:8] + b"x" * 32 + whole[40:]), SHARD),
    "a shard cut short": (cut_shard(lambda whole: whole[:1000]), SHARD),
    "an empty shard": (cut_shard(lambda whole: b""), SHARD),
    "a shard that is not there": (
        lambda copy: third(copy).unlink(),
        "lacks 1 of its files, the first is model-00003.*put it there",
    ),
    "a matrix that is not there": (drop_matrix, r"lacks 1 of its weights, the first is model\."),
    "shards without their index": (remove("*.index.json"), "no weights in safetensors .*; put them beside"),
    "an index that is no JSON": (write("*.index.json", "{"), DAMAGED),
    "a config that is no JSON": (write("config.json", "{"), DAMAGED),
    "a config that is a list": (write("config.json", "[]"), "no description of a model"),
    "a config that is a number": (write("config.json", "3"), "no description of a model"),
    "a weight map of numbers": (
        write("*.index.json", '{"weight_map": {"a": 3}}'),
        "lacks 1 of its files, the first is 3",
    ),
    "no tokenizer": (remove("tokenizer*"), f"tokenizer is {DAMAGED}"),
    "a damaged tokenizer": (write("tokenizer.json", "{}"), f"tokenizer is {DAMAGED}"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_directory_is_one_sentence(name, world):
    breaks, words = BROKEN[name]
    for way in (spikesink.load, spikesink.open_weights):
        assert_one_sentence(LoadError, words, lambda way=way: way(world.copy(breaks)))


def assert_one_sentence(error: type, words: str, call: Callable) -> None:
    with pytest.raises(error, match=words) as raised:
        call()
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 400


# What is called, and what the sentence names: the value that is wrong, and what would do.
MODELS_THAT_CANNOT_BE_LOADED = {
    "no model": (lambda w: spikesink.load(None), f"None; {MODELS}"),
    "nobody's home": (lambda w: spikesink.load("~no-such-user/model"), "directory ~no-such-user/model"),
    "a NUL": (lambda w: spikesink.load("a\0b"), "no file or directory a\0b"),
    "no hub": (lambda w: spikesink.load("nobody/nothing"), "nobody/nothing.*smollm2-135m.*not be reached"),
    "no such GPU": (lambda w: w.load("cuda:99"), "'cuda:99'.*give one of cpu, cuda,"),
    "a device without numbers": (lambda w: w.load("meta"), "'meta'.*give one of cpu"),
    "a dtype that is none": (lambda w: w.load("cpu", 32), "32.*give one of float32,"),
    "a directory without a model": (lambda w: spikesink.load(w.folder), r"no config\.json"),
    "another model's config": (lambda w: spikesink.load(w.copy(narrow)), "put two there that belong together"),
    "encoder only": (lambda w: w.config(transformers.BertConfig()), r"\(type bert\).*decoder-only"),
    "encoder and decoder": (lambda w: w.config(transformers.T5Config()), "encoder-decoder.*decoder-on"),
    "images too": (lambda w: w.config(transformers.Gemma3Config()), "images or sound.*give a text-only"),
    "an unknown model type": (lambda w: w.config({"model_type": "oddity"}), "not supported.*oddity"),
    "a budget in words": (lambda w: w.load("auto", None, {"cpu": "much"}), "'much'.* size such as 8GB"),
    "a budget of no device": (lambda w: w.load("auto", None, {"attic": "8GB"}), "'attic'.*'cpu'"),
    "a cache that cannot be made": (
        lambda w: w.under(lambda: spikesink.load(tiny_gguf(w.fresh() / "a.gguf")), SPIKESINK_CACHE=w.file() / "x"),
        CACHE,
    ),
    "nowhere to offload to": (lambda w: w.load("disk", SPIKESINK_CACHE=w.file() / "x"), CACHE),
    "a budget without a device": (lambda w: w.load("auto", SPIKESINK_MAX_MEMORY="8GB"), BUDGET),
    "no GGUF file, planned": (lambda w: scan.plan(w.file()), r"not GGUF; give a \.gguf file"),
}

PLACES_THAT_CANNOT_BE_WRITTEN = {
    "figures": (lambda w: w.ledger().save(plots.chain(), "a"), UNWRITABLE),
    "a ledger": (lambda w: w.ledger().record({"LC1": NONE}), UNWRITABLE),
}

TEXTS_THAT_DO_NOT_DO = {
    "no such text": (lambda w: spikesink.read("nowhere.txt"), f"'nowhere.txt'.*{SOURCES}"),
    "a directory": (lambda w: spikesink.read(w.folder), SOURCES),
    "the text itself": (lambda w: spikesink.read("The river runs. " * 200), f"'The river .*{SOURCES}"),
    "a data set without a name": (lambda w: spikesink.read("datasets:"), "'datasets:'.*give datasets:NAME"),
    "no such data set": (lambda w: spikesink.read("datasets:nobody/nothing"), "nobody/nothing.*check the"),
    "an empty file": (lambda w: spikesink.read(w.file("empty.txt", b" \n\n ")), r"empty\.txt' is empty"),
    "latin": (lambda w: spikesink.read(w.file("latin.txt", b"caf\xe9")), r"latin\.txt is not UTF-8"),
    "an empty text": (lambda w: spikesink.windows(w.model, Text("mine", ""), 2, 16), "'mine' has 0 .*ask for fewer"),
    "half a character": (lambda w: Text("mine", "caf\udce9"), r"half a character at place 3 .*errors='replace'"),
    "beyond the context": (lambda w: spikesink.windows(w.model, length=513), "513 .*context of 512"),
    "a number in words": (lambda w: spikesink.windows(w.model, n="4"), "n is '4'; give a whole number"),
    "another tokenizer": (lambda w: spikesink.windows(w.other(100)), f"token 399 of the text 'house'{OTHERS}"),
    "another tokenizer, counted": (lambda w: texts.token_counts(w.other(100)), f"of the text 'house'{OTHERS}"),
}

WRONG_ARGUMENTS = {
    "a name for a model": (lambda w: spikesink.windows("smollm2-135m"), "'smollm2-135m' is no model"),
    "a name to patch": (lambda w: patching.evaluate("smollm2-135m", w.tokens), "what load"),
    "floats": (lambda w: spikesink.trace_windows(w.model, w.tokens.float()), IDS),
    "one window without a batch": (lambda w: spikesink.trace_windows(w.model, w.tokens[0]), r"length\].*are \[32\]"),
    "a token beyond the vocabulary": (lambda w: spikesink.trace_windows(w.model, w.tokens + 400), r"\d+ .*0 to 399"),
    "a token below zero": (lambda w: spikesink.profile(w.model, w.tokens[0] - 400), r"-\d+ .*0 to 399"),
    "all padding": (lambda w: spikesink.trace_windows(w.model, torch.zeros(2, 32).long()), "window 0 .*leave it out"),
    "a life cycle of tokens": (lambda w: spikesink.find_lifecycle(w.tokens), "trace_windows.* not in a Te"),
    "other windows": (lambda w: amplifier.read_block(w.model, w.tokens.flip(0), w.life), OTHER_WINDOWS),
    "other windows, census": (
        lambda w: amplifier.census_on_text(w.model, w.tokens[1:], w.life, amplifier.census(w.weights)),
        OTHER_WINDOWS,
    ),
    "another model, amplifier": (lambda w: amplifier.step_up_direction(weights_of(w.other()), w.life), OTHER_MODEL),
    "another model, spikes": (lambda w: spikesink.find_spikes(w.other(), w.tokens, w.life), OTHER_MODEL),
    "another model, collapse": (lambda w: collapse.measure_collapse(w.other(), w.tokens, w.life), OTHER_MODEL),
    "another model, sinks": (lambda w: keys.read_attention(w.other(), w.tokens, w.life, NONE), OTHER_MODEL),
    "a model for weights": (lambda w: amplifier.census(w.model), r"TransformerBridge; give weights_of\("),
    "a model on a path": (lambda w: paths.static_path(w.model, torch.tensor([7]), 4), "Bridge; give weights_of"),
    "a layer too many": (lambda w: w.weights.norm_scale(6), "layer 6 .*layers 0 to 5"),
    "a channel in words": (lambda w: amplifier.eigenpairs(w.weights.ffn(1), "9"), "'9' .* 0 to 63"),
    "half an eigenpair": (lambda w: amplifier.eigenpairs(w.weights.ffn(1), 9, 1.5), r"1\.5 .* 1 to 63"),
    "attention in the census": (lambda w: amplifier.census(w.weights).rank_in_block(3, 9), "block 3.*9 .*block 12"),
    "a list to probe": (lambda w: firsttoken.probe(w.weights, w.life, [7, 8]), "one-dimensional tensor"),
    "yes as an epsilon": (lambda w: sinks.score(w.model, w.tokens, epsilon=True), "0 and 1.*True"),
    "a set of floats": (lambda w: sinks.score(w.model, w.tokens, groups={"mine": torch.ones(3, 32)}), "'mine' .*truth"),
    "a claim that there is not": (lambda w: claims.judge("LC99", NONE, "01"), r"'LC99'; rules\.RULES"),
    "a measure left out": (lambda w: claims.judge("LC2", Evidence({"a": 0}, {"a": 1}), "01"), "LC2 .*'plateau_"),
    "NaN in a list": (lambda w: claims.judge("AB7", Evidence({"xs": [NAN, 1]}, {"a": 1}), "08"), "AB7: xs is .*nan"),
    "a damaged ledger": (
        lambda w: claims.record(w.copy(lambda copy: (copy / "claims.json").write_text("{")), HEADER, {}),
        "the ledger .* is damaged .*; remove it and run its notebooks again",
    ),
    "no entries": (lambda w: scan.plan(w.whole, 0), "0 entries .*ask for 1 to 400"),
}

NUMBERS_THAT_ARE_NOT_FINITE = {
    "NaN": (lambda w: spikesink.trace_windows(w.poisoned(DOWN), w.tokens), f"layer 3 .*, because the weight {DOWN}"),
    "infinite": (lambda w: spikesink.trace_windows(w.poisoned(DOWN, math.inf), w.tokens), "layer 3 .*get the model"),
    "NaN in half": (lambda w: spikesink.profile(w.poisoned(NORM, NAN, "cpu", "bfloat16"), w.tokens[0]), NORM),
    "NaN on disk": (lambda w: sinks.score(w.poisoned(DOWN, NAN, "disk"), w.tokens), "layer 3 .*get the model again"),
    "NaN in the census": (lambda w: amplifier.census(weights_of(w.poisoned(DOWN))), "the FFN of layer 2.*get the"),
    "NaN in a norm": (lambda w: amplifier.census(weights_of(w.poisoned(NORM))), "the FFN of layer 1, or the norm"),
    "NaN on a path": (
        lambda w: paths.static_path(weights_of(w.poisoned(VALUE)), torch.tensor([7]), 4),
        "the attention of layer 1, or the norm .*get the model again",
    ),
    "NaN in an embedding": (lambda w: firsttoken.probe(weights_of(w.poisoned(EMBEDDING)), w.life), "of token 3 "),
    "NaN in the unembedding": (
        lambda w: patching.evaluate(w.poisoned("lm_head.weight"), w.tokens, patching.skip(patching.mlp(1))),
        r"nothing is changed is not finite in float32, because the weight lm_head\.weight",
    ),
    "a static path that overflows": (
        lambda w: paths.static_path(weights_of(w.poisoned(FIRST, 6e4)), torch.tensor([1]), 4, torch.float16),
        "not finite after layer 1 in float16; use float32",
    ),
    "NaN, scanned": (lambda w: scan.scan(w.poisoned(DOWN).source.directory, 40), "the FFN of layer 2.*not finite"),
}

TABLE = {
    LoadError: MODELS_THAT_CANNOT_BE_LOADED,
    OSError: PLACES_THAT_CANNOT_BE_WRITTEN,
    TextError: TEXTS_THAT_DO_NOT_DO,
    ValueError: WRONG_ARGUMENTS,
    FloatingPointError: NUMBERS_THAT_ARE_NOT_FINITE,
}
ROWS = [pytest.param(error, *row, id=name) for error, rows in TABLE.items() for name, row in rows.items()]


@pytest.mark.parametrize(("error", "call", "words"), ROWS)
def test_what_is_wrong_is_said_in_one_sentence(error, call, words, world):
    assert_one_sentence(error, words, lambda: call(world))


def test_what_is_broken_in_the_table_is_all_that_is_wrong_with_it(world):
    """The same calls on what is whole: each row's error is about what its name says."""
    sharded = spikesink.load(world.copy())
    assert torch.equal(spikesink.trace_windows(sharded, world.tokens).medians, world.life.trace.medians)
    assert amplifier.census(spikesink.open_weights(world.copy())).gain.isfinite().all()


def test_an_embedding_larger_than_the_tokenizer_is_no_error(world):
    """Vocabularies are padded to round numbers."""
    model = world.other(vocabulary=512)
    assert model.anatomy.d_vocab == len(texts.token_counts(model)) == 512 > len(model.tokenizer)
    assert int(spikesink.windows(model, "house", 2, 16).max()) < 400


def test_a_token_without_an_embedding_is_an_error_only_where_a_text_needs_it(world):
    """Tokens that somebody added to a tokenizer (for padding, mostly) often have no embedding, and do no harm."""
    directory = world.copy()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    tokenizer.add_tokens([AddedToken("<mine>", special=True)])
    tokenizer.save_pretrained(directory)
    model = spikesink.load(directory)
    assert len(model.tokenizer) == 401 > model.anatomy.d_vocab
    assert spikesink.windows(model, "house", 2, 16).shape == (2, 16)
    with pytest.raises(TextError, match="token 400 of the text 'mine'"):
        spikesink.windows(model, Text("mine", "The <mine> clock " * 20), 2, 16)


def test_one_token_of_padding_is_no_window_of_it(world):
    """A beginning-of-text token can serve as padding too, and is looked at by itself."""
    assert spikesink.profile(world.model, torch.tensor([0])).magnitude.shape == (13, 1)
    assert spikesink.trace_windows(world.model, torch.tensor([[0]])).n_windows == 1


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--model", lambda w: w.other(vocabulary=100).source.directory, "token 399 of the text 'house'"),
        ("--model", lambda w: w.copy(write("tokenizer.json", "{}")), f"tokenizer is {DAMAGED}"),
        ("--figures", lambda w: w.file() / "figures", r"cannot be written \(Not a directory\)"),
        ("--build", lambda w: w.file() / "build", r"cannot be written \(Not a directory\)"),
    ],
)
def test_make_says_it_before_a_kernel_starts(option, value, words, world, tmp_path, monkeypatch, capfd):
    """As `make` passes its variables on; more of them are in test_reproduce."""
    monkeypatch.setattr(reproduce, "execute", lambda *_: pytest.fail("a notebook was started"))
    given = {"--notebooks": ROOT / "notebooks", "--figures": tmp_path / "figures", "--build": tmp_path / "build"}
    given |= {"--model": world.whole, option: value(world)}
    assert main(["figures", *(str(part) for pair in given.items() for part in pair)]) == 1
    assert re.search(words, capfd.readouterr().out.splitlines()[1])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_itself_passes_it_on():
    # Without READY the environment is taken as it is.
    command = ["make", "figures", "READY=", f"BIN={Path(sys.executable).parent}", "N_PROMPTS=x"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    said = ran.stderr.splitlines()
    assert (ran.returncode, len(said)) == (2, 2)  # the other line is make's own
    assert "--n-prompts: 'x' is not a whole number of at least 1" in said[0]
