"""A scan finds from weights alone what a run on text finds; its plan comes true; an interrupted one goes on."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
import transformers
from tokenizers.processors import TemplateProcessing

import spikesink
from spikesink import amplifier, firsttoken, scan
from spikesink.weights import weights_of
from tests import planted
from tests.test_families import FAMILIES, tiny


@pytest.fixture(scope="module")
def found(planted_directory):
    return scan.scan(planted_directory, entries=400)


def test_the_planted_spike_is_found_without_any_text(found):
    """One entry of 400 spikes, to 1000: in the mean it still stands out."""
    point, channel = found.peak
    assert channel == planted.Plant.channel
    assert float(found.mean[point, channel]) == pytest.approx(1000 / 400, rel=0.05)
    assert float(found.share[point, channel]) == pytest.approx(1 / 400)
    assert found.steps() == ([4], [10])
    two = found.suspects(2)
    assert {row[:3] for row in two} == {(4, 0, planted.Plant.channel), (10, 0, planted.Plant.channel)}
    assert all(over > 50 and share > 0.9 for *_, over, share in two)
    assert "Blocks that write it: 4; that take it back: 10." in found.sentence()


def test_it_is_the_census_and_the_static_path(found, planted_model):
    weights = weights_of(planted_model)
    torch.testing.assert_close(found.block_gain, amplifier.census(weights).gain)
    seen = {}
    firsttoken.static_path(weights, torch.arange(400), 12, watch=lambda p, part, x: seen.update({p: x.clone()}))
    assert len(found.mean) == len(seen) == 13
    torch.testing.assert_close(found.mean, torch.stack([seen[p].mean(0) for p in range(13)]))
    torch.testing.assert_close(found.median, torch.stack([seen[p].abs().median() for p in range(13)]))
    ffn = weights.ffn(1)
    assert found.rank_one[1] == pytest.approx(float(amplifier.directions(ffn, [9]).shares[0]), rel=1e-4)


@pytest.mark.parametrize("lost", [None, "layer-002.safetensors", "stream-003.safetensors"])
def test_an_interrupted_scan_goes_on_where_it_was(lost, found, planted_directory, tmp_path, monkeypatch):
    """Interrupted at layer 3; or killed between the two files that a layer leaves."""
    one_layer, began = scan._one_layer, []

    def interrupted(weights, layer, x):
        if layer == 3:
            raise KeyboardInterrupt
        return one_layer(weights, layer, x)

    monkeypatch.setattr(scan, "_one_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scan.scan(planted_directory, 400, tmp_path)
    [place] = tmp_path.iterdir()
    assert len(list(place.iterdir())) == 4  # three layers and the stream that leaves the last
    if lost:
        (place / lost).unlink()
    monkeypatch.setattr(
        scan, "_one_layer", lambda weights, layer, x: began.append(layer) or one_layer(weights, layer, x)
    )
    resumed = scan.scan(planted_directory, 400, tmp_path)
    assert began[0] == (0 if lost else 3)
    for name, value in vars(resumed).items():
        same = torch.equal(value, vars(found)[name]) if isinstance(value, torch.Tensor) else value == vars(found)[name]
        assert same, name
    began.clear()
    scan.scan(planted_directory, 400, tmp_path)
    assert began == []
    scan.scan(planted_directory, 200, tmp_path)  # another question
    assert began == list(range(6))


def test_a_layer_that_was_kept_before_its_stream_is_done_again(planted_directory, found, tmp_path, monkeypatch):
    one_layer, began = scan._one_layer, []
    scan.scan(planted_directory, 400, tmp_path)
    [place] = tmp_path.iterdir()
    kept = scan._stream(place, 6)
    for layer in (4, 5):
        (place / f"layer-{layer:03d}.safetensors").unlink()
    (place / "stream-006.safetensors").unlink()
    # Killed after layer 3 was kept and before the stream that leaves it was: the one that enters it is there.
    weights = weights_of(spikesink.load(planted_directory))
    x = firsttoken.static_path(weights, torch.arange(400), 6)
    scan.save_file({"stream": x}, place / "stream-003.safetensors")
    monkeypatch.setattr(
        scan, "_one_layer", lambda weights, layer, x: began.append(layer) or one_layer(weights, layer, x)
    )
    again = scan.scan(planted_directory, 400, tmp_path)
    assert began == [3, 4, 5]
    assert torch.equal(again.mean, found.mean)
    assert torch.equal(scan._stream(place, 6), kept)


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
    assert "the stream of BOS (which always stands there) is largest in channel 9 after block" in done.sentence()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned_and_scanned(family, tmp_path):
    directory = tiny(family, tmp_path)
    planned, done = scan.plan(directory, 50), scan.scan(directory, 50)
    assert planned.parameters == transformers.AutoModelForCausalLM.from_pretrained(directory).num_parameters()
    assert len(done.mean) == 7
    gateless = FAMILIES[family][2][3] is None
    assert (done.block_gain is None) == gateless
    if family == "mixtral":
        assert set(done.expert.flatten().tolist()) == {0, 1, 2, 3}
    assert json.dumps(done.summary())
    assert scan.table(done).row_count == scan.SUSPECTS if not gateless else True


def test_the_plan_is_counted(planted_directory):
    """A layer: q and o 64 x 64, k and v 32 x 64, three of 96 x 64, two norms; eleven products of 96 x 96 x 64."""
    planned = scan.plan(planted_directory, 100)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 96 * 64 + 2 * 64
    assert planned.parameters == 6 * layer + 2 * 400 * 64 + 64
    assert planned.operations == 6 * (2 * 100 * layer + 22 * 96 * 96 * 64)
    assert planned.read == 2 * 4 * planned.parameters
    assert planned.seconds(planned.operations / 5) == 5


def test_seventy_billion_parameters_are_planned_from_a_configuration_alone(tmp_path):
    sizes = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
    more = {"num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16"}
    transformers.LlamaConfig(**sizes, **more).save_pretrained(tmp_path / "llama-70b")
    planned = scan.plan(tmp_path / "llama-70b")
    assert planned.parameters == pytest.approx(70.55e9, rel=1e-3)
    layer = planned.parameters / 80 * 4
    assert (
        layer < planned.peak < 6 * layer < 0.2 * planned.parameters * 2
    )  # of float32 layers; the model is in bfloat16
    said = planned.sentences(1e12)
    assert said.startswith("llama-70b: 70.6 billion parameters in 80 layers.")
    assert re.search(r"about \d+\.\d h here", said)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_resident_memory_of_a_scan_is_as_planned_and_far_below_the_model(default_model, tmp_path):
    whole = transformers.AutoModelForCausalLM.from_pretrained(default_model.source.directory)
    whole.save_pretrained(tmp_path / "shards", max_shard_size="30MB")
    default_model.tokenizer.save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 8
    script = f"""
import re
from spikesink import scan
def peak():  # MB
    return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
weights = scan.open_weights({str(tmp_path / "shards")!r})
before = peak()
found = scan.scan({str(tmp_path / "shards")!r}, 64)
print(before, peak(), *map(str, found.steps()), sep="|")
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=300)
    before, after, up, down = ran.stdout.strip().split("|")
    assert (up, down) == ("[24]", "[58, 60]")
    took, size = (float(after) - float(before)) * 2**20, 4 * whole.num_parameters()
    assert took < scan.plan(tmp_path / "shards", 64).peak < size / 2


def test_the_command_plans_scans_and_names_what_is_wrong(planted_directory, tmp_path, capsys, monkeypatch):
    places = ["--figures", str(tmp_path / "figures"), "--build", str(tmp_path / "build")]
    command = ["--model", str(planted_directory), "--entries", "40", *places]
    assert scan.main([*command, "--plan"]) == 0
    assert capsys.readouterr().out.startswith("planted-llama: 0.000")
    assert list(tmp_path.iterdir()) == []
    assert scan.main(command) == 0
    assert json.loads((tmp_path / "figures" / "planted-llama" / "scan.json").read_text())["entries"] == 40
    assert scan.main(["--model", str(planted_directory), "--entries", "500", *places]) == 1
    assert "500 entries were asked for, and this model's vocabulary has 400." in capsys.readouterr().out
    assert scan.main(["--model", "./nowhere", *places]) == 1
    assert "there is no file or directory ./nowhere" in capsys.readouterr().out

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(scan, "scan", interrupted)
    assert scan.main(command) == 130
    assert "run the same command to go on" in capsys.readouterr().out
