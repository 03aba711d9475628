"""The command for owners of a model: what it says, what it leaves when stopped, and what it says of bad input."""

import contextlib
import io
import json
import re

import pytest

from spikesink import __main__
from spikesink.apps import report
from spikesink.serving import cache, quantize
from spikesink.serving.diagnosis import (
    NO_FAILURE,
    NOT_TESTED,
    OUTLIERS,
    PARTLY,
    ROUTING,
    UNCLEAR,
)
from tests import planted, survey


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(planted.text(12, 64))
    return str(path)


@pytest.fixture(scope="module")
def made(family_directory, text, tmp_path_factory):
    """The report on a model whose spike and sinks are known: data, page, and what is printed."""
    out = tmp_path_factory.mktemp("report")
    options = ["--text", text, "--n-prompts", "6", "--seq-len", "64", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert __main__.main(["report", str(family_directory("llama")), *options]) == 0
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text(), printed.getvalue()


def test_a_report_says_where_spike_and_sinks_are(made):
    data, _, _ = made
    sections = data["sections"]
    assert list(sections) == ["spike", "sink", "quantization", "cache", "holds"]
    assert set(sections["holds"].values()) == {"holds"}
    assert sections["spike"]["LC1"]["step_up_blocks"] == [4]
    assert sections["spike"]["LC1"]["channels"] == [9, 30]
    assert sections["sink"]["SK1"]["sink_ratio"] == pytest.approx(4 / 24)
    assert sections["cache"][cache.WINDOW]["verdict"] in (ROUTING, PARTLY + ROUTING)
    assert sections["cache"][cache.WITH_1]["verdict"] == NO_FAILURE
    assert data["not_tested"] == ["Long contexts (not measured)", *report.NOT_TESTED]
    assert len(data["sha256"]) == 64


def test_the_page_needs_nothing_else(made):
    data, page, _ = made
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)|url\(", page)
    assert page.count("<img") == page.count("data:image/png;base64,") == 4
    for title in ("In short", *(report.TITLES[key] for key in data["sections"]), "What the words mean", "Not tested"):
        assert page.count(f"<h2>{title}</h2>") == 1
    assert "<li>Long contexts (not measured)</li>" in page


def test_what_fails_comes_first_with_what_helps(made):
    _, page, printed = made
    first, advice = page[: page.index("<h2>The spike</h2>")], report.ADVICE[ROUTING][1]
    assert f"{cache.WINDOW} (" in first
    assert f"{cache.OTHERS} (" not in page, "a control is no failure"
    assert advice.replace("'", "&#39;") in first
    assert advice in " ".join(printed.split())


@pytest.mark.parametrize("verdict", [UNCLEAR, NOT_TESTED, ROUTING, f"{PARTLY}{OUTLIERS} and {ROUTING}"])
def test_what_costs_is_never_left_out_of_the_short(verdict):
    section = report.Section("cache", "", {"it": {"cost": 3.5, "interval": None, "verdict": verdict}})
    causes = [cause for cause in report.ADVICE if cause in verdict]
    for line, cause in zip(report.in_short({"cache": section}), causes, strict=True):  # both, where there are two
        assert line.startswith(f"{report.ADVICE[cause][0]}: it (3.50 times).")


def test_controls_are_no_failures_and_remedies_stand_apart():
    names = (cache.WINDOW, cache.OTHERS, cache.HEAVY, cache.WITH_1, cache.FIRST[8])
    facts = {name: {"cost": 3.0, "interval": [2.0, 4.0], "verdict": NOT_TESTED} for name in names}
    failures, remedies = report.in_short({"cache": report.Section("cache", "", facts)})
    assert [name for name in names if f"{name} (3.00 times, 2.00 to 4.00)" in failures] == [cache.WINDOW, cache.HEAVY]
    assert [name for name in names if f"{name} (3.00 times, 2.00 to 4.00)" in remedies] == [cache.WITH_1]


def test_what_is_finished_is_left_when_it_is_stopped(random_directory, text, tmp_path, monkeypatch, capsys):
    def stop(subject):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "STAGES", {**report.STAGES, "quantization": stop})
    out = tmp_path / "new" / "folder"
    options = ["--text", text, "--n-prompts", "4", "--seq-len", "32", "--out", str(out)]
    assert __main__.main(["report", str(random_directory), *options]) == 130
    assert "what was finished is kept" in capsys.readouterr().out
    data = json.loads((out / "report.json").read_text())
    assert list(data["sections"]) == ["spike", "sink"]
    missing = [f"{report.TITLES[key]} (not measured)" for key in ("quantization", "cache", "long", "holds")]
    assert data["not_tested"] == [*missing, *report.NOT_TESTED]
    assert "No spike: " in (out / "report.html").read_text()


@pytest.mark.parametrize(
    ("text", "out", "says"), [(b"The old mill", "file", "give a folder"), (bytes(range(256)), "out", "not UTF-8 text")]
)
def test_bad_input_is_one_sentence(text, out, says, random_directory, tmp_path, capsys):
    (tmp_path / "file").write_bytes(text)
    options = ["--text", str(tmp_path / "file"), "--out", str(tmp_path / out)]
    assert __main__.main(["report", str(random_directory), *options]) == 1
    printed = capsys.readouterr()
    sentence = " ".join(printed.err.split())
    assert says in sentence
    assert sentence.count(". ") == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "file"], "nothing is left of a report that was not begun"


def test_weights_alone_say_where_a_spike_can_be_written(family_directory, gemma_directory, capsys):
    assert __main__.main(["census", str(family_directory("llama")), "--top", "2"]) == 0
    printed = capsys.readouterr().out
    rows = re.findall(r"^ ?(L\d MLP \(block \d+\)) +(\d+) ", printed, re.MULTILINE)
    assert {("L1 MLP (block 4)", "9"), ("L4 MLP (block 10)", "9")} == set(rows)
    assert "another norm" not in " ".join(printed.split())
    assert __main__.main(["census", str(gemma_directory)]) == 0
    assert "another norm" in " ".join(capsys.readouterr().out.split())
    assert __main__.main(["probe", str(family_directory("llama")), "--entries", "400"]) == 0
    assert "channel 9" in capsys.readouterr().out


def test_a_model_without_a_spike_is_told_what_serving_costs(random_directory, text, tmp_path, capsys):
    options = ["--text", text, "--n-prompts", "4", "--seq-len", "48", "--out", str(tmp_path), "--long"]
    assert __main__.main(["diagnose", str(random_directory), *options]) == 0
    sections = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert sections["quantization"]["int4 weights, per-channel"]["cost"] > 0
    assert sections["cache"][cache.WINDOW]["left_without_spike"] is None
    assert set(sections["long"]["streams"]) > {cache.WINDOW, cache.WITH_FIRST}
    page = (tmp_path / "report.html").read_text()
    assert page.count("Tried in the unchanged model alone: no token") == 2


NO_ATTENTION = {"attention": "2 of 4 layers of this"}
SOMETHING_ELSE = {"writes": "something else writes", "FFN": "do not give what their weights say"}


@pytest.mark.parametrize(
    ("family", "fails", "said"),
    [
        ("Lfm2", NO_ATTENTION, "2 of its 4 layers show attention: 1, 3."),
        ("Qwen3Next", {**NO_ATTENTION, "logits": "cannot be checked"}, f"Not tried: {quantize.NOT_SHOWN}."),
        ("Qwen3", {}, "A tiny run of the model was compared"),
        ("Olmo2", {"norm": "not through a norm"}, "A norm follows each block"),
        ("FalconH1", SOMETHING_ELSE, "something else writes"),
        ("Bloom", {"logits": "is not the softmax of q.k", "FFN": "cannot be checked"}, "A tiny run of the model was"),
    ],
)
def test_a_report_ends_with_what_holds_for_the_model(family, fails, said, text, tmp_path, capsys):
    """A hybrid, a gated one, one with a norm after each block, one that something else writes in."""
    planted.save(survey.build(f"{family}ForCausalLM"), tmp_path)
    options = ["--text", text, "--n-prompts", "4", "--seq-len", "32", "--out", str(tmp_path / "report")]
    assert __main__.main(["report", str(tmp_path), *options]) == 0
    printed, data = capsys.readouterr().out, json.loads((tmp_path / "report" / "report.json").read_text())
    holds = data["sections"]["holds"]
    assert {part for part, fact in holds.items() if fact != "holds"} == set(fails)
    for part, reason in fails.items():
        assert reason in holds[part]
    assert said in printed
    assert "nan" not in printed
    assert (tmp_path / "report" / "report.html").read_text().count("<h2>What holds for this model</h2>") == 1


def test_a_page_escapes_what_it_is_given():
    section = report.Section("cache", "Not tried: <i>.", {"reason": "no spike"})
    page = report.render_page("x<y", {"a": "<b>"}, {"cache": section}, ["<u>"])
    assert not re.search("x<y|<b>|<i>|<u>", page)
    assert "Not tried: &lt;i&gt;." in page
