"""The bench compares ways that give the same answer, and writes what it found."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import spikesink
from spikesink import plots
from spikesink.apps import bench, memory
from spikesink.model.weights import weights_of
from tests.test_models import tiny_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def life(planted_model, trigger_tokens):
    return spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))


@pytest.fixture(scope="module")
def found(planted_model, life):
    """As on a processor that multiplies bfloat16, whatever this one does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.train, "multiplies_bfloat16", lambda device: True)
        return bench.bench(planted_model, life, turns=2, wide=24)


def test_both_ways_of_every_row_agree(found):
    assert [row.way for row in found.rows] == [
        "static path",
        "bfloat16 products",
        "one kernel for all",
        "Lanczos",
        "Lanczos",
        "one sweep",
        "one sweep",
        "clean and under a cut",
        "trace",
    ]
    assert found.rows[1].agree == "the same entries spike"
    assert "(from 8)" in found.rows[2].against
    for row in (found.rows[0], *found.rows[2:7], found.rows[8]):
        assert error(row) < 1e-4
        assert row.ratio == row.against_seconds / row.seconds > 0


def test_bfloat16_is_timed_only_where_it_is_multiplied(planted_model, life, monkeypatch):
    weights, tokens = weights_of(planted_model), torch.arange(8)
    for can in (True, False):
        monkeypatch.setattr(bench.train, "multiplies_bfloat16", lambda device, can=can: can)
        row, share = bench.probes(weights, life, tokens, turns=1)
        assert (row is not None) == can
        assert 0 < share < 1


def error(row: bench.Row) -> float:
    return 0 if row.agree == "exactly" else float(row.agree.split()[1])


def test_the_work_of_the_static_path_is_counted(planted_model):
    """Layer 0 and 1: V and O are 32 x 64 each (K/V heads), and three matrices of 96 x 64."""
    assert bench.operations(weights_of(planted_model), 4) == 2 * 2 * (2 * 32 * 64 + 3 * 96 * 64)
    assert bench.operations(weights_of(planted_model), 3) == 2 * (2 * 2 * 32 * 64 + 3 * 96 * 64)


def test_what_was_found_is_written(found, tmp_path):
    found.write(tmp_path / "new" / "bench.json")
    data = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert data["model"] == "planted-llama"
    assert data["rows"][0]["ratio"] == found.rows[0].ratio
    assert found.table().row_count == len(found.rows) == 9


def test_a_slower_way_is_a_smaller_ratio():
    seconds, (a, b) = bench.in_turns(
        [lambda: torch.tensor(1), lambda: sum(torch.randn(400, 400) for _ in range(99))], 2
    )
    assert seconds[0] < seconds[1]
    assert int(a) == 1
    assert b.shape == (400, 400)


def test_a_wrong_model_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "spikesink", "bench", "--model", "./nowhere", "--figures", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "there is no file or directory ./nowhere; check the path." in ran.stderr
    assert not list(tmp_path.iterdir())


def test_the_random_block_has_a_direction_to_find():
    ffn = bench.random_ffn(32)
    row = bench.lanczos(ffn, 0, turns=1)
    assert error(row) < 1e-6


def test_what_is_timed_on_some_channels_is_scaled_up_to_all(monkeypatch):
    monkeypatch.setattr(bench, "in_turns", lambda ways, turns: ([1.0, 2.0], [way() for way in ways]))
    row = bench.census(bench.random_ffn(32), turns=1, some=4)
    assert (row.seconds, row.against_seconds) == (1, 2 * 32 / 4)


def test_a_model_that_is_dequantized_is_loaded_cold_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    row = bench.loading(str(tiny_gguf(tmp_path / "tiny.gguf")))
    assert row.agree == "exactly"
    assert row.ratio > 1
    assert os.environ["SPIKESINK_CACHE"] == str(tmp_path / "cache")


def test_a_directory_is_read_as_it_is(planted_directory):
    assert bench.loading(str(planted_directory)) is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_memory_is_measured_in_processes_of_their_own(planted_directory):
    ours, theirs = (memory._in_a_process(f"census, {way}", str(planted_directory)) for way in ("streamed", "whole"))
    assert ours["gave"] == theirs["gave"] > 0
    assert min(ours["peak"], theirs["peak"]) > 0
    script = "from spikesink.apps import memory; memory._reset_peak(); before = memory._resident('VmRSS')"
    script += "; x = bytearray(10**8)"
    script += "; del x; print(memory._resident('VmHWM') - before, memory._resident('VmRSS') - before)"
    peak, now = map(int, subprocess.check_output([sys.executable, "-c", script], text=True).split())
    assert 0.95e8 < peak < 1.2e8
    assert now < 0.5e8


def some_growth() -> memory.Growth:
    return memory.Growth(256, (2, 4, 8), (1.0, 2.0, 4.2), (50e6, 51e6, 52e6))


def test_growth_is_drawn_with_what_was_found():
    fig = plots.growth(some_growth())
    assert [ax.get_title("left") for ax in fig.axes] == [
        "A trace takes 0.533 s for each window",
        "and 0.333 MB, on top of 50 MB",
    ]
    assert fig.axes[1].lines[1].get_ydata().tolist() == [50, 51, 52]


def test_the_table_goes_to_its_place_in_the_readme(found, tmp_path):
    held = memory.Memory("census", "read", 2e6, "loaded", 8e6, "exactly")
    table = replace(found, memory=(held,), growth=some_growth()).markdown()
    assert table.splitlines()[-1] == "| census | read | 2 MB | loaded | 8 MB | 4.0x | exactly |"
    assert len(table.splitlines()) == 2 + 9 + 1
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        bench.into_readme(readme, table)
        assert readme.read_text() == f"before\n<!-- bench -->\n{table}\n<!-- /bench -->\nafter\n"
    readme.write_text("nothing")
    with pytest.raises(ValueError, match="has no place for the table"):
        bench.into_readme(readme, table)


def test_the_readme_has_the_table_of_the_committed_bench():
    data = json.loads((ROOT / "figures" / "bench.json").read_text())
    rows = [bench.Row(**{k: v for k, v in row.items() if k != "ratio"}) for row in data["rows"]]
    held = [memory.Memory(**{k: v for k, v in row.items() if k != "ratio"}) for row in data["memory"]]
    whole = bench.Bench("", 1, "", "", tuple(rows), None, tuple(held))
    assert whole.markdown() in (ROOT / "README.md").read_text()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
def test_what_was_held_before_the_work_does_not_count():
    """200 MB come and go before the work and 50 MB stay; the work itself takes 100 MB. So of a trace, after loading."""
    script = (
        "import torch; from spikesink.apps import memory\n"
        "torch.ones(50_000_000); stays = torch.ones(12_500_000)\n"
        "memory.WORK['some'] = lambda spec: float(torch.ones(25_000_000).sum())\n"
        "memory.work('some', '')\n"
        "memory.load = lambda spec: torch.ones(50_000_000).sum()\n"
        "memory._traced = lambda model, n: float(torch.ones(n * 6_250_000).sum())\n"
        "memory.work('4 windows', '')"
    )
    ran = subprocess.check_output([sys.executable, "-c", script], text=True)
    work, trace = map(json.loads, ran.splitlines())
    assert work["gave"] == 25_000_000
    assert 0.95e8 < work["peak"] < 1.2e8
    assert 0.95e8 < trace["peak"] < 1.2e8
