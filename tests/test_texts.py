"""Windows of text: the same everywhere, by the tokenizer's habits, from every kind of source."""

import json
import shutil

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import spikesink
from spikesink.model.texts import TextError


def test_the_house_text_is_the_same_everywhere():
    # The stored notebooks were measured on these very bytes; whoever changes the text must run `make store`.
    text = spikesink.read("house")
    assert text.sha256 == "a555d5616556b0780206dd8f4be6221b7fa655e98d17653791e0f0664b873fed"


def test_the_seed_chooses_the_windows(default_model):
    first, again, other = (spikesink.windows(default_model, "house", 4, 64, seed) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_bos_follows_the_tokenizers_habit(random_directory, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(random_directory)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    shutil.copytree(random_directory, tmp_path / "with-bos")
    tokenizer.save_pretrained(tmp_path / "with-bos")
    for directory, prepends in ((random_directory, False), (tmp_path / "with-bos", True)):
        model = spikesink.load(directory)
        assert spikesink.anatomy(model).prepends_bos is prepends
        assert bool((spikesink.windows(model, "house", 3, 32)[:, 0] == 0).all()) is prepends
        assert (model.to_tokens("word")[0, 0] == 0).item() is prepends


def test_texts_come_from_files_and_data_sets(default_model, tmp_path):
    assert spikesink.windows(default_model, "pydoc", 2, 128).shape == (2, 128)
    (tmp_path / "own.txt").write_text("A line of my own.\n" * 100)
    assert spikesink.windows(default_model, str(tmp_path / "own.txt"), 2, 64).shape == (2, 64)
    rows = [{"text": f"Story number {i} of the river and the mill.", "body": "x"} for i in range(200)]
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = f"datasets:{tmp_path / 'set'}"
    assert "Story number 7 of the river" in spikesink.read(source).content
    assert set(spikesink.read(f"{source}:::body").content.split()) == {"x"}
    with pytest.raises(TextError, match="no column 'nothing'"):
        spikesink.read(f"{source}:::nothing")
