"""The bench compares ways that give the same answer, and writes what it found."""

import json
import subprocess
import sys

import pytest
import torch

import spikesink
from spikesink import bench
from spikesink.weights import weights_of


@pytest.fixture(scope="module")
def found(planted_model, trigger_tokens):
    life = spikesink.find_lifecycle(spikesink.trace_windows(planted_model, trigger_tokens))
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
    ]
    assert found.rows[1].agree == "the same entries spike"
    assert "(from 8)" in found.rows[2].against
    for row in (found.rows[0], *found.rows[2:7]):
        assert float(row.agree.split()[1]) < 1e-4
        assert row.ratio == row.against_seconds / row.seconds > 0


def test_the_work_of_the_static_path_is_counted(planted_model):
    """Layer 0 and 1: V and O are 32 x 64 each (K/V heads), and three matrices of 96 x 64."""
    assert bench.operations(weights_of(planted_model), 4) == 2 * 2 * (2 * 32 * 64 + 3 * 96 * 64)
    assert bench.operations(weights_of(planted_model), 3) == 2 * (2 * 2 * 32 * 64 + 3 * 96 * 64)


def test_what_was_found_is_written(found, tmp_path):
    found.write(tmp_path / "new" / "bench.json")
    data = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert data["model"] == "planted-llama"
    assert data["rows"][0]["ratio"] == found.rows[0].ratio
    assert found.table().row_count == len(found.rows) == 8


def test_a_slower_way_is_a_smaller_ratio():
    seconds, (a, b) = bench.in_turns(
        [lambda: torch.tensor(1), lambda: sum(torch.randn(400, 400) for _ in range(99))], 2
    )
    assert seconds[0] < seconds[1]
    assert int(a) == 1
    assert b.shape == (400, 400)


def test_a_wrong_model_is_one_sentence(tmp_path):
    command = [sys.executable, "-m", "spikesink.bench", "--model", "./nowhere", "--figures", str(tmp_path)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1
    assert "there is no file or directory ./nowhere; check the path." in ran.stdout
    assert not list(tmp_path.iterdir())


def test_the_random_block_has_a_direction_to_find():
    ffn = bench.random_ffn(32)
    row = bench.lanczos(ffn, 0, turns=1)
    assert float(row.agree.split()[1]) < 1e-6


def test_what_is_timed_on_some_channels_is_scaled_up_to_all(monkeypatch):
    monkeypatch.setattr(bench, "in_turns", lambda ways, turns: ([1.0, 2.0], [way() for way in ways]))
    row = bench.census(bench.random_ffn(32), turns=1, some=4)
    assert (row.seconds, row.against_seconds) == (1, 2 * 32 / 4)
