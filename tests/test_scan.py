"""A scan finds from weights alone what a run on text finds; its plan comes true; an interrupted one goes on."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing

import spikesink
from spikesink.__main__ import main
from spikesink.apps import scan
from spikesink.chain import amplifier
from spikesink.model import paths
from spikesink.model.errors import LoadError
from spikesink.model.weights import open_weights, weights_of
from tests import planted
from tests.test_experts import make_moe
from tests.test_families import FAMILIES, tiny
from tests.test_models import tiny_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def measured(planted_directory):
    return scan.scan(planted_directory, entries=400)


def test_the_planted_spike_is_measured_without_any_text(measured):
    """One entry of 400 spikes, to 1000: in the mean it still stands out."""
    point, channel = measured.peak
    assert channel == planted.Plant.channel
    assert float(measured.mean[point, channel]) == pytest.approx(1000 / 400, rel=0.05)
    assert float(measured.share[point, channel]) == pytest.approx(1 / 400)
    assert measured.steps() == ([4], [10])
    two = measured.suspects[:2]
    assert {(one.block, one.expert, one.channel) for one in two} == {(4, None, channel), (10, None, channel)}
    assert all(one.over_median > 50 and one.rank_one > 0.9 for one in two)
    assert len(measured.suspects) == scan.SUSPECTS
    assert "Blocks that write it: L1 MLP (block 4); that take it back: L4 MLP (block 10)." in measured.sentence()


def test_the_spike_is_where_it_is_largest_though_the_median_grows(measured):
    """A ramp in channel 3, written by blocks 2, 4 and 6; largest in medians after block 2."""
    mean = torch.ones(13, 8)
    mean[:, 3] = torch.tensor([1, 1, 400, 400, 700, 700, 1000, 1000, 1000, 400, 700, 700, -100])
    median = torch.tensor([1.0, 1, 1, 1, 4, 4, 8, 8, 8, 8, 8, 8, 100])
    mean[12, 5] = 2000  # the largest of all, and 20 medians of its point
    nothing = {"share": torch.zeros(13, 8), "block_gain": None, "expert": None, "suspects": None}
    ramp = replace(measured, mean=mean, median=median, **nothing)
    assert ramp.peak == (6, 3)
    assert ramp.steps() == ([2, 4, 6], [9, 12])
    turned = replace(ramp, mean=-mean)
    assert (turned.peak, turned.steps()) == (ramp.peak, ramp.steps())


def test_entries_are_spread_over_the_vocabulary(planted_directory, measured, planted_model):
    some = scan.scan(planted_directory, entries=7)
    chosen = torch.tensor([0, 57, 114, 171, 228, 285, 342])
    stream = paths.static_path(weights_of(planted_model), chosen, 4)
    torch.testing.assert_close(some.mean[4], stream.mean(0))
    share = (stream.abs() > 100 * stream.abs().median()).float().mean(0)
    assert torch.equal(some.share[4], share)
    assert (measured.share[4] > 0).any()


def test_it_is_the_census_and_the_static_path(measured, planted_model):
    weights = weights_of(planted_model)
    torch.testing.assert_close(measured.block_gain, amplifier.census(weights).gain)
    seen = {}
    paths.static_path(weights, torch.arange(400), 12, watch=lambda p, part, x: seen.update({p: x.clone()}))
    assert len(measured.mean) == len(seen) == 13
    torch.testing.assert_close(measured.mean, torch.stack([seen[p].mean(0) for p in range(13)]))
    torch.testing.assert_close(measured.median, torch.stack([seen[p].abs().median() for p in range(13)]))
    ratio = measured.block_gain / measured.block_gain.median(dim=1, keepdim=True).values
    assert [one.over_median for one in measured.suspects] == ratio.flatten().topk(scan.SUSPECTS).values.tolist()
    for one in measured.suspects:
        layer = one.block // 2 - 1
        assert one.gain == float(measured.block_gain[layer, one.channel])
        shares = amplifier.directions(weights.ffn(layer), [one.channel]).shares
        assert one.rank_one == pytest.approx(float(shares[0]), rel=1e-4)


@pytest.mark.parametrize("changed", [None, "config", "weights"])
def test_an_interrupted_scan_goes_on_where_it_was_unless_the_model_changed(
    changed, measured, planted_directory, tmp_path, monkeypatch
):
    model = shutil.copytree(planted_directory, tmp_path / "model")
    scan_layer, scanned = scan._scan_layer, []

    def counted(weights, layer, x):
        if layer == 3 and not interrupted:
            interrupted.append(layer)
            raise KeyboardInterrupt
        scanned.append(layer)
        return scan_layer(weights, layer, x)

    interrupted = []
    monkeypatch.setattr(scan, "_scan_layer", counted)
    with pytest.raises(KeyboardInterrupt):
        scan.scan(model, 400, tmp_path / "kept")
    if changed == "config":
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 256}))
    elif changed == "weights":
        (model / "model.safetensors").touch()
    resumed = scan.scan(model, 400, tmp_path / "kept")
    assert scanned == [0, 1, 2, *range(0 if changed else 3, 6)]
    assert torch.equal(resumed.mean, measured.mean)
    assert torch.equal(resumed.block_gain, measured.block_gain)
    assert resumed.suspects == measured.suspects
    assert len(list((tmp_path / "kept").iterdir())) == (1 if changed else 0), "only what another model left"


def test_where_bos_always_stands_first_it_alone_is_sent_through(planted_directory, tmp_path):
    """The trigger is made the BOS of a tokenizer that adds one: the mean is the spike itself."""
    shutil.copytree(planted_directory, tmp_path / "with-bos")
    tokenizer = planted.tokenizer()
    tokenizer.bos_token = planted.TRIGGER
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{planted.TRIGGER} $A", special_tokens=[(planted.TRIGGER, tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "with-bos")
    done = scan.scan(tmp_path / "with-bos", 400)
    assert (done.entries, done.only_bos) == (1, True)
    assert float(done.mean[4, planted.Plant.channel]) == pytest.approx(1000, rel=0.05)
    assert done.steps() == ([4], [10])
    assert (
        "the stream of BOS (which always stands there) is largest in channel 9 after L1 MLP (block 4)"
        in done.sentence()
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned_and_scanned(family, tmp_path):
    directory = tiny(family, tmp_path)
    planned, done = scan.plan(directory, 50), scan.scan(directory, 50)
    assert planned.parameters == transformers.AutoModelForCausalLM.from_pretrained(directory).num_parameters()
    assert len(done.mean) == 7
    gateless, mixture = FAMILIES[family][2][3] is None, family == "mixtral"
    assert (done.block_gain is None) == gateless
    assert (planned.unpacked > 0) == mixture
    assert json.dumps(done.summary())
    if not gateless:
        assert scan.table(done).row_count == scan.SUSPECTS
        assert ("expert" in done.summary()["suspects"][0]) == mixture


def test_each_channel_is_that_of_the_expert_where_its_gain_is_largest(tmp_path):
    """A shared expert is named as the model names it."""
    directory = planted.save(make_moe("Qwen2Moe"), tmp_path / "Qwen2Moe")
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.shared_expert.down_proj.weight"][7] *= 1000
    save_file(tensors, file, metadata={"format": "pt"})
    done, weights = scan.scan(directory, 40), open_weights(directory)
    assert (done.suspects[0].block, done.suspects[0].expert, done.suspects[0].channel) == (4, "shared_expert", 7)
    assert len({one.expert for one in done.suspects}) > 1
    for one in done.suspects:
        ffns = weights.experts(one.block.layer)
        gains = {name: float(amplifier.gains(ffn)[one.channel]) for name, ffn in ffns.items()}
        assert gains[one.expert] == max(gains.values()) == pytest.approx(one.gain)
        share = amplifier.directions(ffns[one.expert], [one.channel]).shares[0]
        assert one.rank_one == pytest.approx(float(share), rel=1e-3)


def test_a_model_whose_first_token_is_no_fixed_map_is_not_scanned(tmp_path):
    with pytest.raises(ValueError, match=r"attention of this gpt_oss model does not give a token alone.*figures"):
        scan.scan(tiny("gpt_oss", tmp_path), 40)


def test_the_plan_is_counted(planted_directory):
    """A layer: q and o 64 x 64, k and v 32 x 64, three of 96 x 64, two norms; half of 3 products of 96 x 96 x 64."""
    planned = scan.plan(planted_directory, 100)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    assert planned.parameters == 6 * layer + 2 * 400 * 64 + 64
    assert planned.operations == 6 * (2 * 100 * layer + 3 * 96 * 96 * 64) + scan.SUSPECTS * 2 * 96 * 64 * 64
    assert planned.read == 4 * (2 * planned.parameters + 6 * 3 * 96 * 64)
    assert (planned.first, planned.disk, planned.unpacked) == ("", 0, 0)
    assert "operations, about 5 s here" in planned.sentences(planned.operations / 5)


def test_seventy_billion_parameters_are_planned_from_a_configuration_alone(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    more = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
    transformers.LlamaConfig(**sizes, **more).save_pretrained(tmp_path / "llama-70b")
    planned = scan.plan(tmp_path / "llama-70b")
    assert planned.parameters == pytest.approx(70.55e9, rel=1e-3)
    layer = planned.parameters / 80 * 4  # in float32; the model is in bfloat16
    assert layer < planned.peak < 6 * layer < 0.2 * planned.parameters * 2
    assert planned.sentences(5e11).startswith("llama-70b: 70.6 billion parameters in 80 layers.")
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**wide, vocab_size=2**20, tie_word_embeddings=True, dtype="float32")
    config.save_pretrained(tmp_path / "wide")
    embedding = 4 * 64 * 2**20
    assert embedding <= scan.plan(tmp_path / "wide").peak < 1.1 * embedding, "an embedding that outweighs a layer"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_plan_of_a_gguf_file_is_that_of_what_it_is_dequantized_to(tmp_path, cache):
    file = tiny_gguf(tmp_path / "tiny.gguf")
    before = scan.plan(file, 40)
    assert not cache.exists()
    assert (before.first, before.disk) == ("dequantize", 4 * before.parameters)
    assert f"First its file is dequantized into {cache}" in before.sentences()
    untied = spikesink.load(file).original_model
    assert before.parameters == untied.num_parameters()
    assert not untied.config.tie_word_embeddings
    assert scan.plan(file, 40) == replace(before, first="", disk=0)


def test_what_can_be_no_causal_model_is_not_planned_either(tmp_path, cache):
    transformers.BertConfig().save_pretrained(tmp_path / "bert")
    (tmp_path / "text.gguf").write_text("hello")
    half = tiny_gguf(tmp_path / "half.gguf")
    half.write_bytes(half.read_bytes()[:100])
    tiny_gguf(tmp_path / "odd.gguf", architecture="oddity")
    wrong = {"bert": "encoder-only", "odd.gguf": "not supported", "text.gguf": "not a GGUF", "half.gguf": "damaged"}
    for name, why in wrong.items():
        with pytest.raises(LoadError, match=why):
            scan.plan(tmp_path / name)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_resident_memory_of_a_scan_is_as_planned_and_far_below_the_model(default_model, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(default_model.source.directory)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="30MB")
    default_model.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 8
    script = f"""
import re
from spikesink.apps import scan
def peak():  # bytes
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
weights = scan.open_weights({str(tmp_path / "shards")!r})
before = peak()
measured = scan.scan({str(tmp_path / "shards")!r}, 64)
print(peak() - before, *map(str, measured.steps()), sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    took, up, down = ran.stdout.strip().split("|")
    assert (up, down) == ("[L11 MLP (block 24)]", "[L28 MLP (block 58), L29 MLP (block 60)]")
    assert int(took) < scan.plan(tmp_path / "shards", 64).peak < 4 * whole.num_parameters() / 2


def test_the_command_plans_scans_and_names_what_is_wrong(
    planted_directory, random_directory, tmp_path, capsys, monkeypatch
):
    places = ["--figures", str(tmp_path / "figures"), "--build", str(tmp_path / "build")]
    command = ["scan", str(planted_directory), "--entries", "40", *places]
    assert main([*command, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("planted-llama: 0.236 million parameters in 6 layers.")
    assert list(tmp_path.iterdir()) == []
    assert main(["scan", f"{planted_directory},./nowhere,{random_directory}", *command[2:]]) == 1
    said = capsys.readouterr().out
    assert "nowhere not done: there is no file or directory ./nowhere" in said
    for name in ("planted-llama", "random-llama"):
        file = tmp_path / "figures" / name / "scan.json"
        assert f"Written to {file}" in said
        assert json.loads(file.read_text())["entries"] == 40
    for plan in ([], ["--plan"]):
        assert main(["scan", str(planted_directory), "--entries", "500", *places, *plan]) == 1
        assert "ask for 1 to 400" in capsys.readouterr().out
    assert main([*command[:-1], str(tmp_path / "figures" / "planted-llama" / "scan.json")]) == 1
    assert re.search("is a file|cannot be written", capsys.readouterr().out)
    planned = scan.plan
    monkeypatch.setattr(scan, "plan", lambda model, n: {}[0] if "planted" in model else planned(model, n))
    assert main(["scan", f"{planted_directory},{random_directory}", "--plan", "--entries", "40"]) == 1
    assert re.search("planted-llama not done: KeyError: 0.\nrandom-llama: 0", capsys.readouterr().out)
    monkeypatch.setattr(scan, "plan", planned)
    monkeypatch.setattr(scan, "scan", Mock(side_effect=KeyboardInterrupt))
    assert main(command) == 130
    assert "run the same command to go on" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
@pytest.mark.parametrize(("target", "variable"), [("scan", "DEVICE=cuda"), ("plan", "DTYPE=bfloat16")])
def test_make_refuses_what_a_scan_does_not_take(target, variable):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    command = ["make", target, "READY=", "BIN=nowhere", variable]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2
    assert f"make {target} works in float32 on the CPU; leave out DEVICE and DTYPE" in ran.stderr
