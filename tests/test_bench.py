"""The bench compares ways that give the same answer, and writes what it measured."""

import json
import os
from pathlib import Path

import pytest
import torch

from spikesink.__main__ import main
from spikesink.apps import bench
from spikesink.model.texts import Text
from tests import planted
from tests.test_models import tiny_gguf

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def rows(family_directory):
    return list(bench.bench(str(family_directory("llama")), Text("planted", planted.text(4, 256))))


def test_both_ways_of_every_row_agree(rows):
    assert len(rows) == 6
    for row in rows:
        assert row.error < 1e-4
        assert row.ratio == row.against_takes / row.takes > 0
    assert rows[-1].ratio > 10, "run_with_cache keeps every activation"


def test_what_is_timed_on_some_channels_is_scaled_up_to_all(monkeypatch):
    monkeypatch.setattr(bench, "time_in_turns", lambda what, ways: bench.Row(what, "a", 1.0, "b", 2.0, 0.0))
    ffn = bench.FFN(*torch.randn(2, 48, 32), torch.randn(32, 48), *torch.zeros(2, 48), torch.nn.functional.silu)
    row = bench.compare_gains(ffn)
    assert (row.takes, row.against_takes) == (1, 2 * 32 / bench.FORMED)


def test_a_model_that_is_dequantized_is_loaded_cold_and_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SPIKESINK_CACHE", str(tmp_path / "cache"))
    assert bench.compare_loading(str(tiny_gguf(tmp_path / "tiny.gguf"))).error == 0
    assert os.environ["SPIKESINK_CACHE"] == str(tmp_path / "cache")


def test_a_model_that_is_not_there_is_one_sentence(tmp_path, capsys):
    assert main(["bench", "--model", "./nowhere", "--figures", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "there is no file or directory ./nowhere; check the path.\n"
    assert not (tmp_path / "bench.json").exists()


def test_the_command_writes_a_table_and_its_rows(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "bench", lambda spec: rows)
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- bench -->\nold\n<!-- /bench -->\nafter\n")
    for _ in range(2):
        assert main(["bench", "--figures", str(tmp_path / "new"), "--readme", str(readme)]) == 0
        assert readme.read_text() == f"before\n<!-- bench -->\n{bench.markdown(rows)}\n<!-- /bench -->\nafter\n"
    written = json.loads((tmp_path / "new" / "bench.json").read_text())["rows"]
    assert [bench.Row(**row) for row in written] == rows
    readme.write_text("nothing")
    assert main(["bench", "--figures", str(tmp_path), "--readme", str(readme)]) == 1
    assert "has no place for the table" in capsys.readouterr().err
    committed = json.loads((ROOT / "figures" / "bench.json").read_text())["rows"]
    assert bench.markdown([bench.Row(**row) for row in committed]) in (ROOT / "README.md").read_text()
