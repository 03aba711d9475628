"""The lab: its model against plain formulas and transformers, its tasks against their definitions, its training."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from spikesink import find_lifecycle, patching, trace_windows
from spikesink.__main__ import main
from spikesink.chain import sinks
from spikesink.lab import data, families, records, run
from spikesink.lab.config import BOS, Config, ConfigError, doubled
from spikesink.lab.data import Backcopy
from spikesink.lab.measures import measure_late, measure_trained
from spikesink.lab.model import Decoder, DynamicTanh, Gate, RMSNorm
from spikesink.lab.train import (
    CHECKPOINT,
    Machine,
    TrainingError,
    look_steps,
    make_loss,
    rate,
    start,
    step,
    train,
)
from spikesink.model import texts

PLAIN = Machine(compiled=False)
SIZES = {"d_vocab": 64, "d_model": 32, "n_layers": 2, "heads": (16, 2), "lengths": (32, 128), "batch": 512}
SMALL = Config(task="backcopy", **SIZES, steps=4, warmup=2, learning_rate=1e-2)
# Of processes that tests start: one thread each, and the same modules.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
# What each family changes in a model: parameters with one of these words in their names.
CHANGED = {
    "optimization": (),
    "ffn": ("mlp",),
    "normalization": ("ln1", "ln2", "ln_final", "_norm", "embed.weight"),
    "heads": ("attn",),
    "gates": ("attn.gate",),
    "context": (),
}


def parameters(config: Config) -> dict[str, torch.Tensor]:
    return dict(Decoder(config).named_parameters())


def random_tokens(config: Config, n: int = 3, length: int = 16) -> torch.Tensor:
    return torch.randint(config.d_vocab, (n, length), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def base_run():
    return train(SMALL, Backcopy(), None, PLAIN, until=2)


@pytest.mark.parametrize("variant", [pytest.param(variant, id=variant.name) for variant in families.VARIANTS])
def test_a_variant_differs_from_the_base_where_it_should_and_nowhere_else(variant, base_run):
    config = variant.config(SMALL)
    changed = next((other.config(SMALL) for other in families.VARIANTS if other.name == variant.against), SMALL)
    assert [f.name for f in fields(Config) if getattr(config, f.name) != getattr(changed, f.name)] == [variant.field]
    assert changed == SMALL or variant.against != families.BASE
    assert Config.read(json.loads(json.dumps(asdict(config)))) == config
    ours, base = parameters(config), parameters(changed)
    for name in ours.keys() | base.keys():
        same = name in ours and name in base and torch.equal(ours[name], base[name])
        assert same or any(word in name for word in CHANGED[variant.family]), name
    run = train(config, Backcopy(), None, PLAIN, until=2)
    trained = dict(run.model.named_parameters())
    assert all(values.isfinite().all() for values in trained.values())
    unread = "ln2" if config.ffn == "none" else "nothing"
    assert all(not torch.equal(values, ours[name]) for name, values in trained.items() if unread not in name)
    if variant.family == "optimization" and variant.field not in ("steps", "schedule"):
        assert run.curve[0] == base_run.curve[0]
        others = base_run.model.named_parameters()
        assert any(not torch.equal(values, trained[name]) for name, values in others), "it trains otherwise"


def test_weight_decay_is_of_matrices_and_embeddings_alone():
    run = start(replace(SMALL, gate="static", norm="dynamic_tanh"))
    decayed, free = (group["params"] for group in run.optimizer.param_groups)
    assert [group["weight_decay"] for group in run.optimizer.param_groups] == [SMALL.weight_decay, 0]
    assert all(p.ndim == 2 for p in decayed)
    names = {id(p): name.rsplit(".", 1)[-1] for name, p in run.model.named_parameters()}
    assert {names[id(p)] for p in free} == {"alpha", "weight", "bias", "logit"}
    assert id(run.model.embed.weight) in map(id, decayed)


@torch.inference_mode()
def test_what_is_skipped_of_a_window_is_not_trained_to_be_predicted():
    tokens = random_tokens(SMALL, length=64)
    for skipped, first in ((0.0, 1), (1 / 4, 16), (1 / 2, 32)):
        model = Decoder(replace(SMALL, skipped=skipped))
        each = functional.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        assert float(make_loss(model, PLAIN)(tokens)) == pytest.approx(float(each[:, first - 1 :].mean()), rel=1e-5)


def test_windows_without_bos_are_the_rest_of_windows_with_it(small_corpus):
    for task in (Backcopy(), small_corpus[0]):
        with_bos = data.held_out(task, 4, 33)
        without = data.held_out(task, 4, 32, bos=False)
        assert torch.equal(without, with_bos[:, 1:])
        config = replace(SMALL, bos=False, lengths=(64, 64))
        assert (data.batch(task, config, 3)[:, 0] != BOS).all()
        assert data.batch(task, config, 3).shape == (config.batch // 64, 64)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"norm": "batch"}, "pre, sandwich"),
        ({"heads": (15, 2)}, "an even number"),
        ({"lengths": (48, 64)}, "double"),
        ({"lengths": (16, 32)}, "64 or more"),
        ({"batch": 100}, "a multiple of .* 128"),
        ({"skipped": 1.0}, "less than 1"),
        ({"learning_rate": -1e-3}, "no less than"),
        ({"n_layers": True}, "no less than 1"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused_when_it_is_made(values, says):
    with pytest.raises(ConfigError, match=says):
        replace(SMALL, **values)


@pytest.mark.parametrize("norm", ["pre", "qk"])
@torch.inference_mode()
def test_the_base_is_transformers_llama_and_with_qk_norm_its_qwen3(norm):
    config = replace(SMALL, norm=norm)
    ours = Decoder(config)
    generator = torch.Generator().manual_seed(1)
    for values in ours.parameters():  # scales of one and small matrices would hide much
        values.add_(0.3 * torch.randn(values.shape, generator=generator))
    kind, settings = (LlamaForCausalLM, LlamaConfig) if norm == "pre" else (Qwen3ForCausalLM, Qwen3Config)
    sizes = {"vocab_size": config.d_vocab, "hidden_size": config.d_model, "intermediate_size": config.d_mlp}
    sizes |= {"num_hidden_layers": config.n_layers, "max_position_embeddings": 64, "head_dim": config.d_head}
    sizes |= dict.fromkeys(("num_attention_heads", "num_key_value_heads"), config.n_heads)
    more = {"rope_theta": 10_000.0, "rms_norm_eps": 1e-6, "tie_word_embeddings": False}
    theirs = kind(settings(**sizes, **more, attn_implementation="eager"))
    names = {"embed.weight": "model.embed_tokens.weight", "unembed": "lm_head", "ln_final": "model.norm"}
    names |= {"blocks": "model.layers", "ln1": "input_layernorm", "ln2": "post_attention_layernorm"}
    names |= {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
    names |= {f"attn.{x}": f"self_attn.{x}_proj" for x in "qkvo"}
    names |= {"mlp.gate": "mlp.gate_proj", "mlp.in": "mlp.up_proj", "mlp.out": "mlp.down_proj"}
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, names))})(?=\.|$)")
    state = {pattern.sub(lambda match: names[match[1]], name): values for name, values in ours.state_dict().items()}
    theirs.load_state_dict(state)
    tokens = random_tokens(config)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_norms_and_ffns_are_their_formulas():
    x = torch.randn(5, 32) * 7
    rms, tanh = RMSNorm(32), DynamicTanh(32)
    for values in (rms.weight, tanh.weight, tanh.bias):
        values.normal_()
    torch.testing.assert_close(rms(x), functional.rms_norm(x, (32,), rms.weight, 1e-6))
    tanh.alpha.fill_(0.1)
    e = torch.exp(0.2 * x)
    torch.testing.assert_close(tanh(x), (e - 1) / (e + 1) * tanh.weight + tanh.bias)
    ffns = {kind: Decoder(replace(SMALL, ffn=kind)).blocks[0].mlp for kind in ("swiglu", "gelu", "linear", "none")}
    for kind, activation in (("gelu", functional.gelu), ("linear", lambda y: y)):
        mlp = ffns[kind]
        torch.testing.assert_close(mlp(x), activation(x @ getattr(mlp, "in").weight.T) @ mlp.out.weight.T)
    assert not ffns.pop("none")(x).any()
    sizes = [sum(p.numel() for p in mlp.parameters()) for mlp in ffns.values()]
    assert max(sizes) / min(sizes) < 1.05, "FFNs that are compared have as many weights"


@pytest.mark.parametrize(
    ("kind", "shape"), [("channel", (2, 16)), ("head", (2, 1)), ("token", (1, 1)), ("static", (2, 16))]
)
@torch.inference_mode()
def test_a_gate_is_a_sigmoid_of_its_input_and_a_static_one_sees_none(kind, shape):
    gate = Gate(replace(SMALL, gate=kind))
    z, x = torch.randn(3, 5, 2, 16), torch.randn(3, 5, 32)
    logit = gate.logit.normal_() if kind == "static" else x @ gate.logit.weight.T
    torch.testing.assert_close(gate(z, x), z / (1 + torch.exp(-logit.unflatten(-1, shape))))


@torch.inference_mode()
def test_a_gate_acts_before_the_output_matrix_and_a_sandwich_norms_each_write():
    gated = Decoder(replace(SMALL, gate="head"))
    attn = gated.blocks[0].attn
    attn.gate.logit.weight.mul_(50)
    _, cache = gated.run_with_cache(random_tokens(SMALL))
    z = torch.einsum("bhqk,bkhd->bqhd", cache["blocks.0.attn.hook_pattern"], cache["blocks.0.attn.v.hook_out"])
    z = z * torch.sigmoid(cache["blocks.0.ln1.hook_normalized"] @ attn.gate.logit.weight.T)[..., None]
    torch.testing.assert_close(cache["blocks.0.hook_attn_out"], z.flatten(2) @ attn.o.weight.T)
    sandwich = Decoder(replace(SMALL, norm="sandwich"))
    scales = [norm.weight.normal_() for norm in (sandwich.blocks[1].ln1_post, sandwich.blocks[1].ln2_post)]
    _, cache = sandwich.run_with_cache(random_tokens(SMALL))
    for inside, wrote, scale in (("attn.o.hook_out", "attn", scales[0]), ("mlp.hook_out", "mlp", scales[1])):
        normed = functional.rms_norm(cache[f"blocks.1.{inside}"], (32,), eps=1e-6) * scale
        torch.testing.assert_close(cache[f"blocks.1.hook_{wrote}_out"], normed)


def test_backcopy_copies_after_a_trigger_and_follows_the_bigram_of_the_house_text_elsewhere():
    task = Backcopy()
    rows = task.windows(3, 3000, 48)
    assert (rows[:, 0] == BOS).all()
    assert not (rows[:, 1:] == BOS).any()
    triggers = np.isin(rows, task.triggers)
    assert not triggers[:, :2].any(), "a trigger has a token before it that can be copied"
    copies = triggers[:, 1:-1]
    assert (rows[:, 2:][copies] == rows[:, :-2][copies]).all()
    assert 0.05 < copies.mean() < 0.5
    counts = np.zeros((64, 64))
    np.add.at(counts, (rows[:, 1:-1][~copies], rows[:, 2:][~copies]), 1)
    for token in np.argsort(-counts.sum(1))[:5]:
        n, p = counts[token].sum(), task.bigram[token]
        assert (np.abs(counts[token] / n - p) <= 5 * np.sqrt(p * (1 - p) / n) + 1e-9).all()
    text = "".join(c for c in texts.read("house").content if c in task.characters)
    e, t = task.characters.index("e"), task.characters.index("t")
    assert task.bigram[t, e] == pytest.approx((text.count("te") + 1) / (text[:-1].count("t") + 63))


def test_batches_are_functions_of_the_seed_of_an_allowed_length_and_as_many_tokens():
    task, config = Backcopy(), replace(SMALL, lengths=(16, 64))
    np.testing.assert_array_equal(task.windows((1, 2), 4, 32), task.windows((1, 2), 4, 32))
    for other in (task.windows((1, 3), 4, 32), task.windows((1, 2), 4, 32, held_out=True)):
        assert (task.windows((1, 2), 4, 32) != other).any()
    batches = [data.batch(task, config, i) for i in range(30)]
    assert {rows.size for rows in batches} == {config.batch}
    assert {rows.shape[1] for rows in batches} == set(doubled(16, 64)) == {16, 32, 64}


@pytest.fixture(scope="module")
def small_corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    text = "\n\n\n".join(f"document {i}: " + f"word{i} and others " * 40 for i in range(120))
    (folder / "text.txt").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKESINK_CACHE", str(folder))
        yield data.corpus(str(folder / "text.txt"), 300), text


def test_a_window_of_a_corpus_is_bos_and_a_piece_of_one_document(small_corpus):
    corpus, text = small_corpus
    documents = text.split("\n\n\n")
    for held_out in (False, True):
        for row in corpus.windows(0, 50, 24, held_out):
            assert row[0] == BOS
            piece = corpus.decode(row[1:].tolist())
            where = [i for i, document in enumerate(documents) if piece in document]
            assert where
            assert any((i % data.HELD_OUT == 0) == held_out for i in where)
    with pytest.raises(ConfigError, match=r"no document of .* has 100000 tokens"):
        corpus.windows(0, 1, 100_000)


def test_a_corpus_of_a_data_set_has_a_document_for_each_row_up_to_so_many_characters(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    rows = [json.dumps({"text": f"Story number {i} of the river and the mill. " * 5}) for i in range(60)]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(rows))
    assert len(data.corpus(f"datasets:{tmp_path / 'set'}", 300).ends) == 60
    assert len(data.corpus(f"datasets:{tmp_path / 'set'}", 300, 1000).ends) == 5


def test_a_corpus_is_tokenized_once(small_corpus, tmp_path, monkeypatch):
    _, text = small_corpus
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text(text)
    made = [data.corpus(str(tmp_path / "text.txt"), 300)]
    monkeypatch.setattr(data, "_tokenize", None)  # what another process would call now
    data.corpus.cache_clear()
    made.append(data.corpus(str(tmp_path / "text.txt"), 300))
    np.testing.assert_array_equal(*(corpus.tokens for corpus in made))


def test_more_processes_than_windows_are_refused():
    begun = start(replace(SMALL, batch=128, lengths=(64, 64)))
    with pytest.raises(TrainingError, match="a batch of 2 windows is too few for 3 processes; start fewer"):
        step(begun, Backcopy(), begun.model, replace(PLAIN, world=3))


def test_the_schedule_warms_up_and_comes_down_or_stays():
    config = replace(SMALL, steps=1000, warmup=100)
    assert rate(config, 0) == pytest.approx(config.learning_rate / 100)
    assert rate(config, 100) == pytest.approx(config.learning_rate)
    assert rate(config, 550) == pytest.approx(config.learning_rate * 0.55)
    assert rate(config, 1000) == pytest.approx(config.learning_rate / 10)
    assert rate(replace(config, schedule="constant"), 999) == config.learning_rate


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path):
    config = replace(SMALL, steps=12)
    whole = train(config, Backcopy(), None, PLAIN)
    train(config, Backcopy(), tmp_path, PLAIN, until=5)
    resumed = train(config, Backcopy(), tmp_path, PLAIN)
    assert resumed.curve == whole.curve
    assert [row["step"] for row in whole.curve] == list(look_steps(config))
    for name, values in whole.model.state_dict().items():
        assert torch.equal(values, resumed.model.state_dict()[name])


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    train(SMALL, Backcopy(), tmp_path, PLAIN, until=1)
    with pytest.raises(TrainingError, match="another configuration, text or precision; remove it"):
        train(replace(SMALL, seed=1), Backcopy(), tmp_path, PLAIN)
    with pytest.raises(TrainingError, match="text or precision"):
        train(SMALL, Backcopy(), tmp_path, replace(PLAIN, precision="bfloat16"))
    (tmp_path / CHECKPOINT).write_bytes(b"nothing")
    with pytest.raises(TrainingError, match="is damaged"):
        train(SMALL, Backcopy(), tmp_path, PLAIN)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_configuration():
    config = replace(SMALL, steps=50, learning_rate=1e30, warmup=0)
    with pytest.raises(TrainingError, match=r"at step \d+ of Config\(task='backcopy'"):
        train(config, Backcopy(), None, PLAIN)


def test_pieces_of_a_batch_add_up_to_the_whole():
    one = train(SMALL, Backcopy(), None, PLAIN)
    several = train(SMALL, Backcopy(), None, replace(PLAIN, piece=128))
    for row, other in zip(one.curve, several.curve, strict=True):
        assert other == pytest.approx(row, rel=1e-3)


TOGETHER = """
import json, sys, torch
from dataclasses import replace
from spikesink.lab.train import Machine, train
from spikesink.lab.data import Backcopy
from tests.test_lab import PLAIN, SMALL
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
run = train(replace(SMALL, steps=8), Backcopy(), None, replace(PLAIN, rank=rank, world=world))
if rank == 0:
    json.dump(run.curve, open(sys.argv[1], "w"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_several_processes_give_the_curve_of_one(tmp_path, processes):
    """Of three, one has fewer windows than the others."""
    script, out = tmp_path / "together.py", tmp_path / "curve.json"
    script.write_text(TOGETHER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    subprocess.run([*command, script, out], check=True, capture_output=True, env=ENVIRONMENT, timeout=120)
    alone = train(replace(SMALL, steps=8), Backcopy(), None, PLAIN)
    for row, other in zip(alone.curve, json.loads(out.read_text()), strict=True):
        assert other == pytest.approx(row, rel=1e-4)


@torch.no_grad()
def planted_decoder() -> Decoder:
    """Four layers; block 4 writes BOS's spike into channel 9, by a form of rank one along channel 5."""
    model = Decoder(replace(SMALL, n_layers=4)).eval()
    model.embed.weight[BOS] = 0
    model.embed.weight[BOS, 5] = 3
    for layer, sign in ((1, 1), (3, -1)):
        mlp = model.blocks[layer].mlp
        for matrix in (mlp.gate, getattr(mlp, "in")):
            matrix.weight[0] = 0
            matrix.weight[0, 5] = 10
        mlp.out.weight[:, 0] = 0
        mlp.out.weight[9, 0] = sign
    return model


@torch.inference_mode()
def test_the_library_sees_a_spike_that_is_written_into_a_lab_model():
    model, tokens = planted_decoder(), torch.from_numpy(Backcopy().windows(0, 6, 32))
    life = find_lifecycle(trace_windows(model, tokens))
    assert life.main.step_up == (4,)
    assert life.main.channel == 9
    assert life.trace.closure < 1e-5


def test_a_record_is_read_as_it_was_written_and_weights_give_the_same_model(tmp_path):
    plan = families.Planned("text", families.BASE, replace(SMALL, steps=2, learning_rate=0.01 / 3))
    run = train(plan.config, Backcopy(), None, PLAIN)
    kept = records.keep(run, plan, Backcopy(), PLAIN, tmp_path)
    [again] = records.read_all(tmp_path, "text")
    assert (again.config, again.curve["step"]) == (plan.config, [0, 1, 2])
    assert again.final["held_out_loss"] == pytest.approx(kept.final["held_out_loss"], rel=1e-5)
    model = records.open_model(records.file_of(plan, tmp_path).with_suffix(".safetensors"))
    tokens = random_tokens(SMALL)
    torch.testing.assert_close(model(tokens), run.model(tokens), rtol=1e-2, atol=2e-3)


COMMAND = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # the tests may be run in the background, where it is ignored
from spikesink.__main__ import main
from spikesink.lab import families
from tests.test_lab import LONGER
if __name__ == "__main__":
    families.BASES["task"] = LONGER
    options = ["--only", "base-0", "--jobs", "1", "--eager", "--precision", "float32", "--checkpoint-every", "0"]
    sys.exit(main(["lab", *options, "--figures", sys.argv[1], "--build", sys.argv[2]]))
"""
LONGER = replace(SMALL, n_layers=1, steps=150)


def written(folder: Path) -> list[str | Path]:
    """The command above as a script in a folder, which it also works in."""
    script = folder / "command.py"
    script.write_text(COMMAND)
    return [sys.executable, script, folder / "figures", folder / "build"]


def test_a_run_that_is_asked_for_alone_goes_by_its_name_or_its_files(tmp_path, capsys, monkeypatch):
    asked, places = [], ["--figures", str(tmp_path), "--build", str(tmp_path)]
    monkeypatch.setattr(run, "_is_there", lambda plan, folder: not asked.append(plan.name))
    assert main(["lab", "--only", "no such", *places]) == 2
    assert "'no such' in its name; there are: base, no weight decay, " in capsys.readouterr().err
    for part in ("d_head x 2, half", "d-head-x-2-half"):
        asked.clear()
        assert main(["lab", "--only", part, *places]) == 0
        assert set(asked) == {"d_head x 2, half as many"}


@pytest.mark.slow
def test_the_command_that_was_interrupted_goes_on_and_ends_at_the_same_curve(tmp_path):
    command = written(tmp_path)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    begun = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True, **pipes)
    checkpoint = tmp_path / "build" / "lab" / "task" / "base-0" / CHECKPOINT
    deadline = time.monotonic() + 60
    while not checkpoint.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.killpg(begun.pid, signal.SIGINT)
    said, _ = begun.communicate(timeout=60)
    assert begun.returncode == 130, said
    assert said.endswith("run the same command to go on\n")
    record = tmp_path / "figures" / "lab" / "task" / "base-0.json"
    assert not record.exists()
    assert torch.load(checkpoint, weights_only=True)["step"] < LONGER.steps
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=120, **pipes)
    assert not checkpoint.exists()
    curve, whole = records.read(record).curve, train(LONGER, Backcopy(), None, PLAIN).curve
    for name in ("loss", "sink_ratio", "max_activation"):
        assert curve[name] == pytest.approx([row[name] for row in whole], rel=1e-3), name
    assert "All runs" in subprocess.run(command, env=ENVIRONMENT, check=True, timeout=60, **pipes).stdout


def killed(plan, args, machine):
    """In the place of a run's process: what a system short of memory does to it."""
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_process_that_was_killed_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "_in_process", killed)
    arguments = ["--only", "base-0", "--jobs", "1", "--figures", str(tmp_path), "--build", str(tmp_path)]
    assert main(["lab", *arguments]) == 1
    assert "was killed, perhaps for want of memory: try --jobs 1" in capsys.readouterr().err


@pytest.mark.slow
def test_of_two_commands_one_leaves_a_run_to_the_other(tmp_path):
    place = tmp_path / "build" / "lab" / "task" / "base-0"
    place.mkdir(parents=True)
    command = written(tmp_path)
    with FileLock(place / ".lock"):
        ended = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True, timeout=120)
    assert "base-0: another process is at it" in ended.stdout


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (["--text", "nosuch.txt"], "nosuch.txt"),
        (["--device", "tpu"], "give --device cpu or cuda"),
        (["--device", "cuda"], "there is no GPU that torch can use"),
    ],
)
def test_what_cannot_be_trained_on_is_one_sentence(wrong, says, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["lab", "--tier", "text", *wrong, "--figures", str(tmp_path), "--build", str(tmp_path)]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("where", ["--figures", "--build"])
def test_where_nothing_can_be_written_nothing_is_trained(where, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run, "_side_by_side", lambda *_: pytest.fail("it trains"))
    (tmp_path / "file").write_text("")
    places = {"--figures": tmp_path / "figures", "--build": tmp_path / "build"} | {where: tmp_path / "file"}
    assert main(["lab", *(str(part) for option in places.items() for part in option)]) == 2
    assert f"{tmp_path / 'file' / 'lab'} cannot be written" in capsys.readouterr().err


@torch.inference_mode()
def test_a_trained_model_is_looked_at_closely():
    model, task = planted_decoder(), Backcopy()
    measured, tokens = measure_trained(model, task, 5), data.held_out(task, 5)
    score = sinks.score(model, tokens)
    assert measured["sink_ratios"] == {f"{e:g}": pytest.approx(score.ratio(e)) for e in (0.2, 0.4)}
    assert np.array(measured["scores"]) == pytest.approx(score.at.mean(0).numpy(), abs=1e-5)
    assert np.array(measured["sinks"]) == pytest.approx((score.at > 0.3).float().mean(0).numpy())
    other = tokens.clone()
    other[:, 0] = torch.randint(1, 64, (5,), generator=torch.Generator().manual_seed(0))
    there = patching.evaluate(model, other)
    assert measured["other_first"]["sink_ratio"] == there.sink_ratio
    assert measured["other_first"]["max_first"] == pytest.approx(float(there.largest[:, 0].median()))
    assert float(patching.evaluate(model, tokens).largest[:, 0].median()) > 2 * measured["other_first"]["max_first"]
    assert "other_first" not in measure_trained(Decoder(replace(SMALL, bos=False)), task, 5)
    assert "late" not in measure_trained(Decoder(replace(SMALL, lengths=(64, 64))), task, 5)


@torch.inference_mode()
def test_late_queries_are_those_of_the_second_half_alone():
    model, tokens = planted_decoder(), data.held_out(Backcopy(), 70, 128)
    found = measure_late(model, tokens)
    _, cache = model.run_with_cache(tokens)
    score = torch.stack([cache[hook][:, :, 64:, 0].mean(-1) for hook in model.anatomy.pattern_hooks])
    each = functional.cross_entropy(model(tokens)[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
    assert found["attention"] == pytest.approx(float(score.mean()), rel=1e-4)
    assert found["sink_ratio"] == pytest.approx(float((score > 0.3).float().mean()))
    assert found["loss"] == pytest.approx(float(each[:, 63:].mean()), rel=1e-4)
