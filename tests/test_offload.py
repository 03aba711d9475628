"""A model that is spread over memory and disk gives the numbers of one that is loaded whole."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import spikesink
from spikesink import patching
from spikesink.model.placement import is_offloaded
from tests import in_process, planted
from tests.test_families import FAMILIES, tiny

PLACEMENTS = {
    "disk": {"device": "disk"},
    "auto": {"device": "auto", "max_memory": {"cpu": "120KB"}},
}  # of 400 to 700 KB


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_offloaded_models_of_every_family_compute_the_same(family, placement, tmp_path):
    directory = tiny(family, tmp_path)
    whole, spread = spikesink.load(directory), spikesink.load(directory, **PLACEMENTS[placement])
    assert is_offloaded(spread)
    assert not is_offloaded(whole)
    tokens = spikesink.windows(whole, "house", 2, 24)
    assert torch.equal(whole(tokens), spread(tokens))
    ours, theirs = (spikesink.trace_windows(model, tokens) for model in (spread, whole))
    for name in ("top_stream", "top_writes", "medians", "attention_to_first"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name


def test_every_measure_is_the_same_when_offloaded(family_directory, tmp_path):
    (tmp_path / "text.txt").write_text(planted.text(4, 48))
    whole, spread = (
        in_process.measure(family_directory("llama"), tmp_path / "text.txt", 4, 48, **placement)
        for placement in ({}, {"device": "auto", "max_memory": {"cpu": "300KB"}})
    )
    for key, claim in whole.items():
        assert (claim.measured, claim.control) == (spread[key].measured, spread[key].control), key


def test_a_part_is_in_memory_and_a_part_on_disk_and_generation_is_the_same(planted_directory, planted_model):
    spread = spikesink.load(planted_directory, device="auto", max_memory={"cpu": "300KB"})
    assert set(spread.original_model.hf_device_map.values()) == {"cpu", "disk"}
    assert spread.cfg.device == "cpu"
    texts = []
    for model in (spread, planted_model):
        with patching.patched(model, patching.mask_key(0, range(2, 5))):
            texts.append(model.generate("The old", max_new_tokens=6, do_sample=False, verbose=False))
    assert texts[0] == texts[1]


def test_what_was_written_for_offloading_goes_with_the_model(tmp_path, monkeypatch):
    """Experts are kept in files otherwise than in the model, so they are written anew where they can be read."""
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    model = spikesink.load(tiny("mixtral", tmp_path), device="disk")
    place = Path(model.offloaded.name)
    assert any(place.iterdir())
    other = spikesink.load(tiny("mixtral", tmp_path), device="disk")
    assert place.is_dir()  # a model that is in use keeps what it has
    del model
    gc.collect()
    assert not place.exists()
    del other
    gc.collect()
    assert list((tmp_path / "cache").glob(".offload-*")) == []


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_by_the_next(random_directory, tmp_path, monkeypatch):
    left, used = tmp_path / ".offload-left", tmp_path / ".offload-used"
    for place in (left, used):
        place.mkdir()
        (place / "weights.dat").write_bytes(b"0" * 100)
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path))
    hold = f"import filelock; lock = filelock.FileLock({str(used / '.lock')!r}); lock.acquire(); print(); input()"
    holder = subprocess.Popen([sys.executable, "-u", "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    holder.stdout.readline()
    try:
        model = spikesink.load(random_directory, device="disk")
        assert sorted(tmp_path.glob(".offload-*")) == sorted([used, Path(model.offloaded.name)])
    finally:
        holder.kill()
        holder.wait()
    model = spikesink.load(random_directory, device="disk")
    assert not used.exists()


@pytest.mark.parametrize("given", [None, {"cpu": "2gb"}], ids=["no budget", "more than enough"])
def test_a_model_that_fits_is_loaded_whole(given, planted_directory, planted_model, trigger_tokens):
    model = spikesink.load(planted_directory, device="auto", max_memory=given)
    assert not is_offloaded(model)
    if not torch.cuda.is_available():
        assert torch.equal(model(trigger_tokens), planted_model(trigger_tokens))


def test_the_budget_can_be_in_the_environment(random_directory, monkeypatch):
    monkeypatch.setenv("SPIKESINK_MAX_MEMORY", "cpu=300kb")  # bytes, and no bits
    assert is_offloaded(spikesink.load(random_directory, device="auto"))
    assert not is_offloaded(spikesink.load(random_directory, device="cpu"))
