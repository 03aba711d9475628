"""The command for owners of a model: what it says, what it leaves when stopped, and what it says of bad input."""

import contextlib
import io
import json
import re
from dataclasses import replace

import pytest

import spikesink
from spikesink import __main__
from spikesink.apps import report
from spikesink.ledger import evidence
from spikesink.serving import cache, cells
from spikesink.serving.cells import Crossed
from spikesink.serving.diagnosis import IN_PART, ROUTING, UNSURE, Diagnosis, diagnoses
from tests import planted
from tests.test_serving import outcome


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(planted.text(12, 64))
    return str(path)


@pytest.fixture(scope="module")
def made(family_directory, text, tmp_path_factory):
    """A model whose spike and sinks are known, diagnosed."""
    out = tmp_path_factory.mktemp("report")
    options = ["--text", text, "--n-prompts", "6", "--seq-len", "64", "--out", str(out)]
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert __main__.main(["diagnose", str(family_directory("llama")), *options]) == 0
    return json.loads((out / "report.json").read_text()), (out / "report.html").read_text(), said.getvalue()


def test_a_report_says_where_spike_and_sinks_are(made):
    found, _, _ = made
    assert list(found["sections"]) == ["spike", "sink", "quantization", "cache"]
    assert found["sections"]["spike"]["LC1"]["step_up_blocks"] == [4]
    assert found["sections"]["spike"]["LC1"]["channels"] == [9, 30]
    assert found["sections"]["sink"]["SK1"]["sink_ratio"] == pytest.approx(4 / 24)
    assert found["sections"]["cache"]["the last ones"]["verdict"] in (ROUTING, IN_PART + ROUTING)
    assert found["sections"]["cache"]["with the first token"]["verdict"] == "no failure"
    assert found["not_tested"] == ["Long contexts (not measured)", *report.NOT_TESTED]
    assert len(found["sha256"]) == 64


def test_a_table_fits_a_terminal(made):
    """What it has no room for is on the page."""
    _, page, said = made
    columns = diagnoses({"it": Diagnosis(2.0, (1.5, 2.5))}).columns
    for column in columns:
        assert f"<th>{column}</th>" in page
        assert (column in said) == (column in ("perplexity, times", "diagnosis"))
    assert max(len(line) for line in said.splitlines() if "weights in int4 per channel" in line) <= 80


def test_what_costs_is_said_whatever_its_diagnosis():
    techniques = {"harmless": (1.01, 1.01), "nothing helps": (2.2, 2.3), "on one window": (1.0, 2.3)}
    crossed = Crossed(
        {cells.AS_IT_IS: outcome(1.0, 1.0)},
        {name: {cells.AS_IT_IS: outcome(*losses)} for name, losses in techniques.items()},
    )
    found = report._told("cache", crossed, None)
    assert "nothing helps (3.49 times: not taken apart)" in found.prose.split("Not surely")[0]
    assert re.search(
        r"Not surely a failure, on so few windows: on one window \(1.92 times, 0.00 to \d+\.\d\d\).", found.prose
    )
    assert "harmless" not in found.prose
    assert found.facts["nothing helps"]["left_with_sink"] is None
    alone = Crossed({cells.AS_IT_IS: outcome(1.0)}, {"it": {cells.AS_IT_IS: outcome(2.0)}})
    facts = report._told("cache", alone, None).facts["it"]
    assert (facts["interval"], facts["verdict"]) == (None, UNSURE)


def test_the_page_needs_nothing_else(made):
    _, page, _ = made
    assert not re.search(r"https?://|<script|<link|src=\"(?!data:)|url\(", page)
    assert "<h2>In short</h2>" in page
    assert "<dt>Spike</dt>" in page
    assert page.count("<img") == page.count("data:image/png;base64,") == 4
    assert 'name="viewport"' in page
    assert "Attention routing, all or in part: a KV cache of the last ones (" in page
    assert "With a remedy: " in page
    assert "with 4 others (" not in page, "a control is no failure"
    assert "<li>Long contexts (not measured)</li>" in page
    for title in list(report.TITLES.values())[:4]:
        assert page.count(f"<h2>{title}</h2>") == 1


def test_what_is_finished_is_left_when_it_is_stopped(random_directory, text, tmp_path, monkeypatch, capsys):
    def stopped(of):
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "STAGES", {**report.STAGES, "quantization": stopped})
    options = ["--text", text, "--n-prompts", "4", "--seq-len", "32", "--out", str(tmp_path / "new" / "folder")]
    assert __main__.main(["diagnose", str(random_directory), *options]) == 130
    assert "what was finished is kept" in capsys.readouterr().out
    found = json.loads((tmp_path / "new" / "folder" / "report.json").read_text())
    assert list(found["sections"]) == ["spike", "sink"]
    left = [f"{report.TITLES[key]} (not measured)" for key in ("quantization", "cache", "long")]
    assert found["not_tested"] == [*left, *report.NOT_TESTED]
    assert "No spike: " in (tmp_path / "new" / "folder" / "report.html").read_text()


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("out", "is a file; give a folder"),
        ("below", "cannot be written"),
        ("empty", "is empty"),
        ("binary", "is not UTF-8 text"),
        ("model", "no-such-model"),
    ],
)
def test_bad_input_is_one_sentence(wrong, says, random_directory, text, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    given = {"out": tmp_path / "out", "text": text, "model": random_directory}
    given |= {
        "out": {"out": tmp_path / "file"},
        "below": {"out": tmp_path / "file" / "out"},
        "empty": {"text": tmp_path / "file"},
        "binary": {"text": tmp_path / "binary"},
        "model": {"model": tmp_path / "no-such-model"},
    }[wrong]
    options = ["--text", str(given["text"]), "--out", str(given["out"]), "--n-prompts", "4", "--seq-len", "32"]
    before = set(tmp_path.rglob("*"))
    assert __main__.main(["diagnose", str(given["model"]), *options]) == 1
    printed = capsys.readouterr()
    said = " ".join(printed.err.split())
    assert says in said
    assert said.count(". ") == 0
    assert says not in printed.out, "what is wrong is no part of a report"
    assert set(tmp_path.rglob("*")) == before, "nothing is left of a report that was not begun"


def test_weights_alone_say_where_a_spike_can_be_written(family_directory, capsys):
    assert __main__.main(["census", str(family_directory("llama")), "--top", "2"]) == 0
    rows = re.findall(r"^ ?(L\d MLP \(block \d+\)) +(\d+) ", capsys.readouterr().out, re.MULTILINE)
    assert {("L1 MLP (block 4)", "9"), ("L4 MLP (block 10)", "9")} == set(rows)
    assert __main__.main(["probe", str(family_directory("llama")), "--entries", "400"]) == 0
    said = capsys.readouterr().out
    assert "channel 9 after block 4" in said
    assert "Blocks that write it: 4; that take it back: 10." in said


@pytest.mark.parametrize(
    "arguments", [[], ["nosuch"], ["diagnose"], ["diagnose", "x", "--n-prompts", "3"], ["diagnose", "x", "--out", ""]]
)
def test_bad_arguments_point_to_the_help(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        __main__.main(arguments)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.endswith("(see --help)\n")


def test_what_fails_is_said_first_with_what_helps(made):
    _, page, said = made
    first = page.index("the last ones (")
    assert first < page.index("<h2>The spike</h2>")
    assert report.HELPS["attention routing"][1].replace("'", "&#x27;") in page
    assert report.HELPS["attention routing"][1] in " ".join(said.split())
    fine = {"it": {"cost": 1.0, "verdict": "no failure"}}
    assert report.in_short({"cache": report.Section("cache", "", fine)}) == [
        "Of what was tried nothing surely costs more than 2% of perplexity."
    ]
    torn = {"it": {"cost": 2.0, "verdict": f"{IN_PART}activation outliers and attention routing"}}
    lines = report.in_short({"cache": report.Section("cache", "", torn)})
    assert [line.split(",")[0] for line in lines] == ["Activation outliers", "Attention routing"], (
        "it stands under both"
    )


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        ("cause left open", "Cause left open: it (3.50 times)."),
        ("not taken apart", "Costs something, not taken apart: it (3.50 times)."),
        ("attention routing", "Attention routing, all or in part: it (3.50 times). "),
    ],
)
def test_what_costs_is_never_left_out_of_the_short(verdict, said):
    fact = {"it": {"cost": 3.5, "verdict": verdict}}
    (line,) = report.in_short({"cache": report.Section("cache", "", fact)})
    assert line.startswith(said)
    unsure = {"it": {"cost": 1.5, "interval": [0.9, 2.5], "verdict": UNSURE}}
    lines = report.in_short({"cache": report.Section("cache", "", unsure)})
    assert lines[0].startswith("Of what was tried nothing surely costs")
    assert lines[1] == "Not surely a failure, on so few windows: it (1.50 times, 0.90 to 2.50)."


def test_what_has_no_interval_is_said_and_written_without_one():
    assert report._numbers((float("nan"), float("nan"))) is None
    assert report._numbers((1.0, 2.0)) == [1.0, 2.0]
    assert report._listed("With it", {"it": {"cost": 2.0, "interval": None}}) == "With it: it (2.00 times)."


def test_controls_are_no_failures_and_remedies_stand_apart():
    names = (cache.WINDOW, cache.OTHERS, cache.HEAVY, cache.named(1), cache.named(8))
    facts = {name: {"cost": 3.0, "interval": [2.0, 4.0], "verdict": "not taken apart"} for name in names}
    lines = report.in_short({"cache": report.Section("cache", "", facts)})
    costs = "a KV cache of the last ones (3.00 times); a KV cache with heavy hitters (3.00 times)"
    assert lines == [
        f"Costs something, not taken apart: {costs}.",
        "With a remedy: a KV cache with the first token (3.00 times, 2.00 to 4.00).",
    ]


def test_a_model_without_a_spike_is_told_what_serving_costs(random_directory, text, tmp_path, capsys):
    options = ["--text", text, "--n-prompts", "4", "--seq-len", "48", "--out", str(tmp_path), "--long"]
    assert __main__.main(["diagnose", str(random_directory), *options]) == 0
    found = json.loads((tmp_path / "report.json").read_text())["sections"]
    assert found["quantization"]["weights in int4 per channel"]["cost"] > 0
    assert found["cache"]["the last ones"]["left_without_spike"] is None
    page = (tmp_path / "report.html").read_text()
    assert page.count("Tried in the model as it is alone: no token has an entry above") == 2
    assert page.count("<img") == 4, "all but the spike's picture"
    assert "Perplexity, stretch by stretch: " in page
    assert "Over all of it, with 256 keys: a KV cache of the last ones (" in page


def test_a_spike_of_many_blocks_is_said_to_be_one(family_directory, text, monkeypatch):
    model = spikesink.load(family_directory("llama"))
    of = report.Subject(model, text, spikesink.windows(model, text, 2, 64), 0)
    assert "come from other blocks" not in report._spike(of).prose
    up = evidence.lc1_step_up(of.life)
    few = replace(up, measured={**up.measured, "share_written": 0.43})
    monkeypatch.setattr(evidence, "lc1_step_up", lambda life: few)
    assert "write 43% of it, the other 57% come from other blocks." in report._spike(of).prose


def test_gains_that_a_norm_follows_are_said_to_be_without_it(family_directory, gemma_directory, capsys):
    assert __main__.main(["census", str(gemma_directory)]) == 0
    assert "passes another norm" in " ".join(capsys.readouterr().out.split())
    assert __main__.main(["census", str(family_directory("llama"))]) == 0
    assert "passes another norm" not in " ".join(capsys.readouterr().out.split())


def test_a_section_that_does_not_apply_says_why(made):
    reason = report.Section("cache", "Not told apart: no spike.", {"reason": "no spike"})
    page = report.page("x<y", {"a": "<b>"}, {"cache": reason}, [])
    assert "x&lt;y" in page
    assert "&lt;b&gt;" in page
    assert "Not told apart: no spike." in page
    assert replace(reason, prose="<i>").prose not in report.page("x", {}, {"cache": replace(reason, prose="<i>")}, [])
