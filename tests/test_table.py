"""What ledgers say together: the table, the reasons under it, the picture; and what of the paper stands beside ours."""

import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from spikesink import paper, plots
from spikesink.apps import publish
from spikesink.common import NotApplicable
from spikesink.lab.config import LAB
from spikesink.ledger import claims, rules, table
from spikesink.ledger.claims import Evidence, Header
from spikesink.ledger.table import NOT_LOOKED_INTO, NOT_MEASURED

FIGURES = Path(__file__).parent.parent / "figures"


def ledger(folder: Path, model: str, **evidence) -> None:
    judged = {claim_id: claims.judge(claim_id, given, "01_step_up") for claim_id, given in evidence.items()}
    claims.record(folder / model, Header(model, model, "ab", "house", "cd", (2, 64), "float32", 0), judged)


def writes(share: float) -> Evidence:
    measured = {"step_up_blocks": [4], "share_written": share, "largest_attention_share": 0.0}
    return Evidence(measured, {"share_written_ordinary_tokens": 0.25})


def jaccard(value: float) -> Evidence:
    return Evidence({"jaccard": value}, {"jaccard_ordinary_tokens": 0.5})


@pytest.fixture
def figures(tmp_path):
    """Three models: LC1 differs on one, LC5 on two, LC2 can be put to none, SK1 is of one; and a claim of one's own."""
    ledger(tmp_path, "one|bar", LC1=writes(0.4321), LC5=jaccard(0.5), LC2=NotApplicable("there is no plateau"))
    ledger(tmp_path, "two", LC1=writes(0.9), LC5=jaccard(0.25), LC2=NotApplicable("there is no plateau"))
    sinks = Evidence({"sink_ratio": 0.75}, {"sink_ratio_other_positions": 0.0})
    ledger(tmp_path, "three", LC1=writes(0.95), LC5=jaccard(1.0), SK1=sinks)
    path = tmp_path / "two" / "claims.json"
    data = json.loads(path.read_text())
    own = {"statement": "Mine | alone.", "verdict": "differs", "rule": "a|b"}
    data["claims"]["X-OWN1"] = data["claims"]["LC1"] | own
    path.write_text(json.dumps(data))
    return tmp_path


def read_rows(figures: Path) -> dict[str, dict[str, str]]:
    """The table of `README.md`, by claim and column."""
    lines = [line for line in publish.render(figures).read_text().splitlines() if line.startswith(("| claim", "| **["))]
    head, *rows = [
        [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in lines
        if "| verdict |" not in line
    ]
    return {re.search(r"\[([\w-]+)\]", row[0])[1]: dict(zip(head, row, strict=True)) for row in rows}


def board(figures: Path) -> table.Board:
    return table.make_board(claims.ledgers(figures))


def committed() -> dict:
    return claims.ledgers(FIGURES) | {LAB: claims.lab_ledger(FIGURES)}


def test_the_committed_pages_are_made_from_the_committed_ledgers_and_reasons(tmp_path):
    for path in [*FIGURES.glob("*/claims.json"), FIGURES / "reasons.md", *FIGURES.glob("*/*.png")]:
        target = tmp_path / "figures" / path.relative_to(FIGURES)
        target.parent.mkdir(exist_ok=True, parents=True)
        target.write_bytes(path.read_bytes() if path.suffix != ".png" else b"")
    (tmp_path / "notebooks").symlink_to(FIGURES.parent / "notebooks")
    publish.render(tmp_path / "figures")
    pages = [path.relative_to(tmp_path) for path in tmp_path.glob("figures/**/README.md")]
    assert len(pages) == 1 + len(committed())
    for page in pages:
        assert (tmp_path / page).read_text() == (FIGURES.parent / page).read_text(), page


def test_pictures_stand_under_the_headings_of_their_notebook_in_its_order_with_its_verdicts(figures):
    figures = figures.rename(figures.parent / "figures")
    notebook = new_notebook()
    for number, names in enumerate((["b", "a"], ["c"])):
        notebook.cells.append(new_markdown_cell(f"# title\n\n## Part {number}\n\nprose\n"))
        notebook.cells += [new_code_cell(f'ledger.save(\n    drawn(),\n    "01-{name}",\n)') for name in names]
    (figures.parent / "notebooks").mkdir()
    nbformat.write(notebook, figures.parent / "notebooks" / "01_step_up.ipynb")
    for name in ("01-a", "01-b", "01-old", "02-alone", "notes"):
        (figures / "two" / f"{name}.png").touch()
    publish.render(figures)
    _, step_up, alone = (figures / "two" / "README.md").read_text().split("\n## ")
    title, verdicts, *pictures = step_up.split("\n\n")
    assert title == "[01 step up](../../notebooks/01_step_up.ipynb)"
    assert "- X-OWN1 Mine \\| alone. **differs**" in verdicts
    assert pictures == ["### Part 0", "![Part 0](01-b.png)", "![Part 0](01-a.png)", "![01-old](01-old.png)\n"]
    assert alone == "02\n\n![02-alone](02-alone.png)\n"  # no claim is from it, and no notebook beside it: its number


def test_every_committed_difference_has_its_paragraph_and_no_paragraph_is_left_over():
    """What is written of a claim that differs nowhere is what to keep in mind where it holds."""
    ledgers, reasons, text = claims.ledgers(FIGURES), table.read_reasons(FIGURES), (FIGURES / "README.md").read_text()
    _, kept = text.split("## What to keep in mind where claims hold")
    differs_on = {row.claim_id: row.differs_on for row in board(FIGURES).rows if row.differs_on}
    for claim_id, models in differs_on.items():
        assert all(table.speaks_of(reasons[claim_id], model) for model in models), claim_id
    trained = claims.lab_ledger(FIGURES)["claims"]
    for claim_id, row in trained.items():
        if row["verdict"] == "differs":
            assert text.count(table.fill(reasons[claim_id], {LAB: {"claims": trained}})) == 1
    for claim_id in reasons.keys() - differs_on.keys() - trained.keys() - ledgers.keys():
        assert kept.count(f"### {claim_id}: ") == 1, claim_id
    assert NOT_LOOKED_INTO not in text


def test_every_committed_placeholder_is_a_number_of_a_ledger():
    for name, text in table.read_reasons(FIGURES).items():
        filled = table.fill(text, committed())
        assert NOT_MEASURED not in filled, name
        assert not re.search(r"[{}]", filled), name


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("rows[d_head / 4, 4 times as many].at_0.2[1]:.1f", "2.5"),
        ("rows[0].loss", "2"),
        ("rows[no].loss", NOT_MEASURED),
        ("ratio_at_0.4[0]:.0%", "25%"),
        ("ratio_at_0.4[7]", NOT_MEASURED),
        ("ratio_at_0.5", NOT_MEASURED),
        ("other", "23,800"),
    ],
)
def test_a_placeholder_is_filled_from_the_ledger(path, text):
    rows = [{"name": "base", "loss": 2.0}, {"name": "d_head / 4, 4 times as many", "loss": 2.25, "at_0.2": [1.0, 2.5]}]
    claim = {"measured": {"rows": rows, "ratio_at_0.4": [0.25, 0.5]}, "control": {"other": 23754.4}}
    assert table.fill(f"a {{m-0.5:TR4.{path}}} b", {"m-0.5": {"claims": {"TR4": claim}}}) == f"a {text} b"


def test_the_table_has_a_column_for_each_model_and_a_cell_for_each_verdict(figures):
    rows = read_rows(figures)
    assert list(rows) == ["LC1", "LC2", "LC5", "SK1", "X-OWN1"]
    models = ("one|bar", "three", "two")
    blocks = "L1 MLP (block 4)"
    lc1, own = rows["LC1"], rows["X-OWN1"]
    assert lc1["claim"] == "**[LC1](../notebooks/01_step_up.ipynb)** One to three early FFN blocks write the spike."
    assert lc1["holds where"] == rules.RULES["LC1"].words
    assert [lc1[name] for name in models] == [f"differs ({blocks})", f"holds ({blocks})", f"holds ({blocks})"]
    assert [rows["LC2"][name] for name in models] == ["n/a", "", "n/a"]
    assert "Mine | alone." in own["claim"]
    assert [own[name] for name in (*models, "holds where")] == ["", "", "differs", "a|b"]
    assert (rows["SK1"]["three"], rows["SK1"]["what the numbers are"]) == ("holds (0.75)", "sink ratio")
    text = (figures / "README.md").read_text()
    assert "| Qwen2.5-7B | reported (L3 MLP (block 8), L4 MLP (block 10)) |  |\n" in text
    assert "| trained 7B |  | reported (0.46) |\n" in text


def test_a_claim_that_holds_of_its_control_too_is_marked_and_the_control_named(tmp_path):
    perplexity = {"perplexity_replaced": 30.0, "perplexity_clean": 20.0}
    for name, ordinary in (("tiny", 0.25), ("large", 0.75)):
        bounded = Evidence({"max_over_sqrt_d": 0.9}, {"max_over_sqrt_d_other_tokens": ordinary})
        worse = Evidence(perplexity, {"perplexity_other_tokens_mean": 40.0})
        ledger(tmp_path, name, LC1=writes(0.9), NM1=bounded, NM5=worse)
    lc1, nm1, _ = board(tmp_path).rows
    assert (lc1.standing, nm1.standing, nm1.of_controls_on) == ("firm", "loose", ["large"])
    rows = read_rows(tmp_path)
    assert (rows["NM1"]["large"], rows["NM1"]["tiny"]) == ("holds\\* (0.9)", "holds (0.9)")
    assert rows["NM5"]["tiny"] == "differs (30 / 20)", "a value stands beside what it is compared with"
    text = (tmp_path / "README.md").read_text()
    assert text.count("| NM1 | holds (of max_over_sqrt_d_other_tokens too) |") == text.count("| NM1 | holds |") == 1
    assert drawn(plots.verdicts(board(tmp_path))).count("holds*") == 1


def test_the_paper_is_judged_only_where_our_rule_asks_for_what_it_reports(tmp_path):
    """Shares to four digits; of the Qwen2.5 models it prints 98.40%, and counts that give 98.37% and 98.41%."""
    ledger(tmp_path, "tiny", LC1=writes(0.9), TK1=Evidence({"share": 0.5}, {"share_before_step_up": 0.0}))
    lc1, tk1 = board(tmp_path).rows
    assert {cell.verdict for cell in lc1.reported.values()} == {"reported"}
    assert {cell.verdict for cell in tk1.reported.values()} == {"holds"}
    assert tk1.cells["tiny"].verdict == "differs"
    shares = [f"{cell.value:.4%}" for cell in tk1.reported.values()]
    assert shares == ["99.6469%", "99.6531%", "99.7661%", "98.3711%", "98.4092%", "99.9302%", "99.9263%"]
    assert sum(len(up) + len(down) for _, _, up, down in paper.TABLE_1) == 8 + 13


def test_the_summary_sorts_claims_by_where_they_hold(figures):
    ledger(figures, "three", LC3=Evidence({"share_cancelled": 0.1, "step_down_blocks": [10]}, {"other": 0.0}))
    whole = board(figures)
    expected = {"LC1": "one|bar", "LC2": "unjudged", "LC3": "nowhere"}
    expected |= {"LC5": "several", "SK1": "single", "X-OWN1": "nowhere"}
    assert {row.claim_id: row.standing for row in whole.rows} == expected
    assert len(whole.judged) == 5
    text = publish.render(figures).read_text()
    assert "- **1 of 5 claims hold wherever they were put.**\n" in text
    assert "- **1 of 5 claims differ on one|bar alone**: LC1 one to three early FFN blocks write it.\n" in text
    values = "share_written 0.432, largest_attention_share 0"
    assert f"On one|bar: {values}; the rule asks for: {rules.RULES['LC1'].words}. {NOT_LOOKED_INTO}\n" in text
    assert text.count(NOT_LOOKED_INTO) == 5  # LC1 once, LC3 once, LC5 twice, X-OWN1; LC2 is n/a, which is no difference


def test_reasons_stand_under_the_table_with_numbers_out_of_the_ledgers(figures):
    (figures / "reasons.md").write_text(
        "# Why\n\nA preface.\n\n## LC5\n\nOn two {two:LC5.jaccard:.0%} ({two:LC5.jaccard_ordinary_tokens}).\n\n"
        "## LC2\n\nOn two: nothing differs.\n\n## SK1\n\nOn three it is {three:SK1.sink_ratio}.\n\n"
        "## LC1\n\nOn two-instruct it is the norm, on my-one|bar another.\n\n## two\n\nTwo is tuned.\n"
    )
    text = publish.render(figures).read_text()
    start = "### LC5: The same channels spike on all spike tokens.\n\nOn two 25% (0.5).\n\nOn one|bar: jaccard 0.5;"
    kept = "### SK1: Many heads sink on the first token.\n\nOn three it is 0.75.\n"
    parts = ("### LC1: ", start, "## What to keep in mind where claims hold", kept, "\n## two\n", "Two is tuned.")
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert not re.search("preface|nothing differs|two-instruct", text)
    (figures / "reasons.md").write_text("## LC1\n\na\n\n## LC1\n\nb\n")
    with pytest.raises(ValueError, match="two sections LC1"):
        publish.render(figures)


def test_a_model_is_spoken_of_by_its_whole_name():
    assert all(table.speaks_of(text, "m-0.5b") for text in ("on m-0.5b.", "{m-0.5b:LC1.value}"))
    assert not any(table.speaks_of(text, "m-0.5b") for text in ("on m-0.5b-instruct", "my-m-0.5b", "m-0.5b.gguf", ""))


def drawn(figure) -> list[str]:
    """The verdicts of the cells in a picture, without those of its key."""
    looks = list(plots.table.LOOKS)
    labels = [patch.get_label() for patch in figure.axes[0].patches if patch.get_label() in looks]
    assert labels[-len(looks) :] == looks
    return labels[: -len(looks)]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_picture_has_a_cell_for_every_verdict_and_counts_them(figures):
    figure = plots.verdicts(board(figures))
    ours = {"holds": 2 + 1 + 1, "differs": 1 + 2 + 1, "n/a": 2, "reported": 1 + 1}  # all of the paper's models in one
    assert {verdict: drawn(figure).count(verdict) for verdict in ours} == ours
    assert {"4 … 14  (7)", "0.46  (1)"} <= set(texts(figure))
    assert texts(figure)[-1] == "The other 3 differ: 1 on one|bar alone, 1 on several, X-OWN1 wherever put."


def test_a_folder_without_ledgers_says_so(tmp_path):
    assert "Nothing to draw" in texts(plots.verdicts(table.make_board({})))[0]
    assert "## " not in publish.render(tmp_path).read_text()
    assert publish.draw(tmp_path).is_file()


def test_the_picture_is_drawn_again_when_a_ledger_is_newer_and_only_then(figures):
    publish.render(figures)
    path = publish.draw(figures)
    first = path.read_bytes()
    path.write_bytes(b"old")
    publish.draw(figures)
    assert path.read_bytes() == b"old"
    newer = path.stat().st_mtime_ns + 10**9
    os.utime(figures / "two" / "claims.json", ns=(newer, newer))
    publish.draw(figures)
    assert path.read_bytes() == first  # and to the same bytes
