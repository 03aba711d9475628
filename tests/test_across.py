"""What ledgers say together: the table, the reasons under it, the picture; and what of the paper stands beside ours."""

import copy
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from spikesink import common, paper, plots
from spikesink.apps import publish
from spikesink.common import NotApplicable
from spikesink.lab import config
from spikesink.ledger import claims, rules, table
from spikesink.ledger.claims import Evidence, Header
from spikesink.ledger.table import NOT_LOOKED_INTO, NOT_MEASURED

FIGURES = Path(__file__).parent.parent / "figures"


def ledger(folder: Path, model: str, **result) -> None:
    """A ledger of a made-up model; a claim's id has _ for -."""
    judged = {key: claims.judge(key.replace("_", "-"), of, "01_step_up") for key, of in result.items()}
    header = Header(model, model, "ab", "house", "cd", (2, 64), "float32", 0)
    claims.record(folder / model, header, {key.replace("_", "-"): claim for key, claim in judged.items()})


def writes(share: float, attention: float = 0.0) -> Evidence:
    measured = {"step_up_blocks": [4], "share_written": share, "largest_attention_share": attention}
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
    data["claims"]["X-OWN1"] = data["claims"]["LC1"] | {
        "statement": "Mine | alone.",
        "verdict": "differs",
        "rule": "a|b",
    }
    path.write_text(json.dumps(data))
    return tmp_path


def lines(figures: Path) -> list[str]:
    return publish.render(figures).read_text().splitlines()


def cells(row: str) -> list[str]:
    return [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def test_a_verdict_of_an_older_rule_stands_as_it_was_reached(figures):
    """Its values may be others than today's rule asks for, and the table is made all the same."""
    path = figures / "two" / "claims.json"
    data = json.loads(path.read_text())
    data["claims"]["LC1"] |= {"rule": "as it was", "measured": {"share": 0.9}}
    path.write_text(json.dumps(data))
    rows = {row.claim_id: row for row in table.board(claims.ledgers(figures)).rows}
    assert rows["LC1"].cells["two"].verdict == "holds"
    assert rows["LC1"].cells["two"].held_by == []
    publish.render(figures)


def test_the_committed_table_is_made_from_the_committed_ledgers_and_reasons(tmp_path):
    for path in [*FIGURES.glob("*/claims.json"), FIGURES / "reasons.md"]:
        target = tmp_path / path.relative_to(FIGURES)
        target.parent.mkdir(exist_ok=True)
        target.write_text(path.read_text())
    assert publish.render(tmp_path).read_text() == (FIGURES / "README.md").read_text()


def test_each_committed_page_of_pictures_has_all_of_them_and_all_verdicts():
    found = claims.ledgers(FIGURES)
    assert len(found) > 1
    for name, data in found.items():
        page = (FIGURES / name / "README.md").read_text()
        assert page.splitlines() == publish.gallery(FIGURES / name, data)
        shown = re.findall(r"^!\[.*\]\((.*)\)$", page, flags=re.MULTILINE)
        assert sorted(shown) == sorted(path.name for path in (FIGURES / name).glob("*.png"))
        verdicts = dict(re.findall(r"^- (\S+) .*?\*\*([a-z/]+)\*\*", page, flags=re.MULTILINE))
        why = [claim["measured"]["reason"] for claim in data["claims"].values() if claim["verdict"] == "n/a"]
        assert all(f"**n/a**: {common.escape(reason)}\n" in page for reason in why)
        assert verdicts == {key: claim["verdict"] for key, claim in data["claims"].items()}


def test_a_page_of_pictures_puts_a_verdict_under_the_notebook_that_reached_it(figures):
    for name in ("01-writes.png", "11-panel.png", "notes.png"):
        (figures / "two" / name).touch()
    publish.render(figures)
    head, step_up, bench = (figures / "two" / "README.md").read_text().split("\n## ")
    assert head.startswith("# two: the pictures\n")
    assert step_up.startswith("[01 step up](../../notebooks/01_step_up.ipynb)\n")
    assert "- LC5 The same channels spike on all spike tokens. **differs**\n" in step_up
    assert "- X-OWN1 Mine \\| alone. **differs**\n" in step_up
    assert "![01-writes](01-writes.png)" in step_up
    assert bench == "11\n\n![11-panel](11-panel.png)\n"  # no claim is from it, and no notebook beside it: its number


def test_pictures_stand_under_the_headings_of_their_notebook_and_in_its_order(tmp_path):
    notebook = new_notebook()
    for number, cells in enumerate((["b", "a"], ["c"])):
        notebook.cells.append(new_markdown_cell(f"# title\n\n## Part {number}\n\nprose\n"))
        notebook.cells += [new_code_cell(f'ledger.save(\n    drawn(),\n    "01-{name}",\n)') for name in cells]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(notebook, tmp_path / "notebooks" / "01_first.ipynb")
    folder = tmp_path / "figures" / "some"
    folder.mkdir(parents=True)
    for name in ("01-a", "01-b", "01-old", "02-alone"):
        (folder / f"{name}.png").touch()
    _, *parts = "\n".join(publish.gallery(folder, {"claims": {}})).split("\n## ")
    assert parts[0].split("\n\n") == [
        "[01 first](../../notebooks/01_first.ipynb)",
        "### Part 0",
        "![Part 0](01-b.png)",
        "![Part 0](01-a.png)",
        "![01-old](01-old.png)\n",
    ]
    assert parts[1] == "02\n\n![02-alone](02-alone.png)"


def test_every_committed_difference_has_its_paragraph_and_no_paragraph_is_left_over():
    """What is written of a claim that differs nowhere is what to keep in mind where it holds."""
    found, written = claims.ledgers(FIGURES), table.reasons(FIGURES)
    differing = {
        (key, name)
        for name, data in found.items()
        for key, row in data["claims"].items()
        if row["verdict"] == "differs"
    }
    text = (FIGURES / "README.md").read_text()
    _, kept = text.split("## What to keep in mind where claims hold")
    trained = claims.lab_ledger(FIGURES)["claims"]
    differ = {key for key, row in trained.items() if row["verdict"] == "differs"}
    assert {key for key, _ in differing} | differ <= set(written)
    assert all(text.count(table.fill(written[key], {config.LAB: {"claims": trained}})) == 1 for key in differ)
    for key in set(written) - {key for key, _ in differing} - set(trained) - set(found):
        assert kept.count(f"### {key}: ") == 1, key
    assert all(text.count(written[name]) == 1 for name in found)
    assert [pair for pair in sorted(differing) if not table.speaks_of(written[pair[0]], pair[1])] == []


def test_a_placeholder_finds_a_row_by_its_name():
    rows = [{"name": "base", "loss": 2.0}, {"name": "d_head / 4, 4 times as many", "loss": 2.25, "at_0.2": [1.0, 2.5]}]
    found = {"lab": {"claims": {"TR4": {"measured": {"variants": rows}, "control": {}}}}}
    narrow = "[d_head / 4, 4 times as many]"
    of = (f"{narrow}.loss:.2f", f"{narrow}.at_0.2[1]:.1f", "[0].loss", "[no].loss")
    assert [table.fill(f"{{lab:TR4.variants{one}}}", found) for one in of] == ["2.25", "2.5", "2", NOT_MEASURED]


def test_a_placeholders_name_may_end_in_a_number():
    found = {"m": {"claims": {"SV3": {"measured": {"ratio_at_0.4": [0.25, 0.5], "ratio": 1.0}, "control": {}}}}}
    asked = ("ratio_at_0.4[1]", "ratio_at_0.4[0]:.0%", "ratio", "ratio_at_0.5[0]")
    assert [table.fill(f"{{m:SV3.{one}}}", found) for one in asked] == ["0.5", "25%", "1", NOT_MEASURED]


def test_every_committed_placeholder_is_a_number_of_a_ledger():
    found = claims.ledgers(FIGURES) | {config.LAB: claims.lab_ledger(FIGURES)}
    for key, text in table.reasons(FIGURES).items():
        filled = table.fill(text, found)
        assert NOT_MEASURED not in filled, key
        assert not re.search(r"[{}]", filled), key
        assert len(filled) > (150 if key not in found else 50), key


def test_the_table_has_a_column_for_each_model_and_a_cell_for_each_verdict(figures):
    rows = [cells(line) for line in lines(figures) if line.startswith("| **[")]
    head = next(cells(line) for line in lines(figures) if line.startswith("| claim | holds where"))
    assert head == ["claim", "holds where", "one|bar", "three", "two", "what the numbers are"]
    assert all(len(row) == len(head) for row in rows)
    lc1, lc2, _, own, sinks = ({**dict(zip(head, row, strict=True))} for row in rows_in_order(rows))
    assert lc1["claim"] == "**[LC1](../notebooks/01_step_up.ipynb)** One to three early FFN blocks write the spike."
    assert lc1["holds where"] == rules.RULES["LC1"].words
    assert [lc1[name] for name in ("one|bar", "three", "two")] == ["differs (4)", "holds (4)", "holds (4)"]
    assert [lc2[name] for name in ("one|bar", "three", "two")] == ["n/a", "", "n/a"]
    assert "Mine | alone." in own["claim"]
    assert [own[name] for name in ("one|bar", "three", "two", "holds where")] == ["", "", "differs", "a|b"]
    assert sinks["three"] == "holds (0.75)"
    assert sinks["what the numbers are"] == "sink ratio"


def rows_in_order(rows: list[list[str]]) -> list[list[str]]:
    """LC1, LC2, LC5, a claim of one's own, SK1."""
    ids = [re.search(r"\[([\w-]+)\]", row[0])[1] for row in rows]
    assert sorted(ids) == ["LC1", "LC2", "LC5", "SK1", "X-OWN1"]
    return [rows[ids.index(key)] for key in ("LC1", "LC2", "LC5", "X-OWN1", "SK1")]


def test_what_the_paper_reports_stands_in_a_table_of_its_own(figures):
    text = lines(figures)
    at = next(i for i, line in enumerate(text) if line.startswith("| the paper's models"))
    assert cells(text[at]) == ["the paper's models", "LC1 step up blocks", "SK1 sink ratio"]
    found = {name: rest for name, *rest in map(cells, text[at + 2 : at + 2 + len(paper.reported())])}
    assert list(found) == list(paper.reported())
    assert found["Qwen2.5-7B"] == ["reported (8, 10)", ""]
    assert found["trained 7B"] == ["", "reported (0.46)"]


def test_a_claim_that_holds_of_its_control_too_is_marked_and_the_control_named(tmp_path):
    ordinary = {"max_over_sqrt_d_other_tokens": 0.25}
    for name, control in (("tiny", ordinary), ("large", {"max_over_sqrt_d_other_tokens": 0.75})):
        both = {"LC1": writes(0.9), "NM1": Evidence({"max_over_sqrt_d": 0.9, "smallest_over_sqrt_d": 0.8}, control)}
        ledger(tmp_path, name, **both)
    board = table.board(claims.ledgers(tmp_path))
    lc1, nm1 = board.rows
    assert nm1.of_controls_on == ["large"]
    assert (board.universal, board.firm) == ([lc1, nm1], [lc1])
    text = lines(tmp_path)
    row = next(cells(line) for line in text if "[NM1]" in line and line.startswith("| **"))
    assert row[2:4] == ["holds\\* (0.9)", "holds (0.9)"]
    assert any(line.startswith("| NM1 | holds (of max_over_sqrt_d_other_tokens too) |") for line in text)
    assert sum("| NM1 | holds |" in line for line in text) == 1
    assert any("- 1 hold firmly: on two models or more, and of no control: LC1 " in line for line in text)
    assert any("and sinks: NM1 h̃ is bounded by √d, the spike close to it (on large)." in line for line in text)
    assert drawn(plots.verdicts(board)).count("holds*") == 1


def test_a_value_stands_beside_what_it_is_compared_with(tmp_path):
    ledger(
        tmp_path,
        "tiny",
        NM5=Evidence({"perplexity_replaced": 30.0, "perplexity_clean": 20.0}, {"perplexity_other_tokens_mean": 40.0}),
    )
    row = next(cells(line) for line in lines(tmp_path) if line.startswith("| **["))
    assert row[2:] == ["differs (30 / 20)", "perplexity replaced / perplexity clean"]
    assert "30 / 20" in texts(plots.verdicts(table.board(claims.ledgers(tmp_path))))


def test_the_paper_is_judged_only_where_our_rule_asks_for_what_it_reports(tmp_path):
    share = Evidence({"share": 0.5}, {"share_before_step_up": 0.0})
    ledger(tmp_path, "tiny", LC1=writes(0.9), TK1=share)
    board = table.board(claims.ledgers(tmp_path))
    lc1, tk1 = board.rows
    assert {cell.verdict for cell in lc1.reported.values()} == {"reported"}
    assert {name: cell.verdict for name, cell in tk1.reported.items()} == {
        name: "holds" if spiking / vocabulary >= 0.98 else "differs" for name, spiking, vocabulary in paper.TABLE_2
    }
    assert tk1.cells["tiny"].verdict == "differs"


def test_the_paper_s_tables_are_copied_without_a_slip():
    """Shares to four digits; of the Qwen2.5 models it prints 98.40%, and counts that give 98.37% and 98.41%."""
    assert paper.TABLE_1 == (
        ("Llama-2-7B", 64, (4,), (62,)),
        ("Llama-2-13B", 80, (8,), (78, 79)),
        ("Llama-3-8B", 64, (4,), (64,)),
        ("Qwen2.5-7B", 56, (8, 10), (54, 55)),
        ("Qwen2.5-14B", 96, (10,), (90, 92, 94, 95)),
        ("Qwen3-8B", 72, (14,), (70, 72)),
        ("Qwen3-14B", 80, (14,), (79,)),
    )
    values = {name: f"{found['TK1'].value:.4%}" for name, found in paper.reported().items() if "TK1" in found}
    assert values == {
        "Llama-2-7B": "99.6469%",
        "Llama-2-13B": "99.6531%",
        "Llama-3-8B": "99.7661%",
        "Qwen2.5-7B": "98.3711%",
        "Qwen2.5-14B": "98.4092%",
        "Qwen3-8B": "99.9302%",
        "Qwen3-14B": "99.9263%",
    }


def test_the_summary_sorts_claims_by_where_they_hold(figures):
    ledger(figures, "three", LC3=Evidence({"share_cancelled": 0.1, "step_down_blocks": [10]}, {"other": 0.0}))
    board = table.board(claims.ledgers(figures))
    names = {
        "judged": [row.claim_id for row in board.judged],
        "universal": [row.claim_id for row in board.universal],
        "one": [row.claim_id for row in board.only_on("one|bar")],
        "two": [row.claim_id for row in board.only_on("two")],
        "several": [row.claim_id for row in board.on_several],
        "nowhere": [row.claim_id for row in board.nowhere],
    }
    assert names == {
        "judged": ["LC1", "LC3", "LC5", "SK1", "X-OWN1"],
        "universal": ["SK1"],
        "one": ["LC1"],
        "two": [],
        "several": ["LC5"],
        "nowhere": ["LC3", "X-OWN1"],
    }
    text = lines(figures)
    assert "- **1 of 5 claims hold wherever they were put.**" in text
    only = "  - 1 hold on the only model that they were put to: SK1 many heads sink on the first token (put to three)."
    assert only in text
    assert "- **1 of 5 claims differ on one|bar alone**: LC1 one to three early FFN blocks write it." in text
    assert "- 1 more could be put to none of these models: LC2 blocks in between hardly write." in text


def test_a_difference_that_nobody_looked_into_says_so_with_its_numbers(figures):
    text = lines(figures)
    rule = rules.RULES["LC1"].words
    values = "share_written 0.432, largest_attention_share 0"
    assert f"On one|bar: {values}; the rule asks for: {rule}. {NOT_LOOKED_INTO}" in text
    assert sum(NOT_LOOKED_INTO in line for line in text) == 4  # LC1 once, LC5 twice, X-OWN1
    assert not any("LC2:" in line for line in text)  # n/a is no difference


def test_what_the_rule_failed_on_is_what_is_shown(tmp_path):
    ledger(tmp_path, "tiny", LC1=writes(0.9, attention=0.5))
    text = publish.render(tmp_path).read_text()
    assert "On tiny: share_written 0.9, largest_attention_share 0.5; the rule asks for" in text


def test_reasons_stand_under_the_table_with_numbers_out_of_the_ledgers(figures):
    (figures / "reasons.md").write_text(
        "# Why\n\nA preface with {two:LC1.share_written}.\n\n"
        "## LC5\n\nOn two it is {two:LC5.jaccard} ({two:LC5.jaccard:.0%}, control {two:LC5.jaccard_ordinary_tokens}), "
        "of block {two:LC1.step_up_blocks[0]}; {two:LC5.nosuch}, {gone:LC5.jaccard}, {two:LC1.step_up_blocks[7]}.\n\n"
        "## LC2\n\nNothing differs here.\n"
    )
    text = lines(figures)
    at = text.index("### LC5: The same channels spike on all spike tokens.")
    said = f"On two it is 0.25 (25%, control 0.5), of block 4; {NOT_MEASURED}, {NOT_MEASURED}, {NOT_MEASURED}."
    assert text[at + 2] == said
    assert text[at + 4].startswith("On one|bar: jaccard 0.5;")
    assert text[at + 4].endswith(NOT_LOOKED_INTO)
    assert not any("preface" in line or "Nothing differs" in line for line in text)
    assert text.index("### LC1: One to three early FFN blocks write the spike.") < at < text.index("## one|bar")


def test_what_to_keep_in_mind_and_what_a_model_is_stand_in_their_places(figures):
    (figures / "reasons.md").write_text(
        "## SK1\n\nOn three it is {three:SK1.sink_ratio}.\n\n## two\n\nTwo is tuned.\n\n## LC2\n\nOn two: nothing.\n"
    )
    text = lines(figures)
    at = text.index("## What to keep in mind where claims hold")
    assert text[at + 2 : at + 5] == ["### SK1: Many heads sink on the first token.", "", "On three it is 0.75."]
    assert at < text.index("## two") < text.index("Two is tuned.")
    assert "On two: nothing." not in text  # it could be put to none


def test_a_section_about_other_models_is_not_shown(figures):
    (figures / "reasons.md").write_text("## LC1\n\nOn two-instruct it is the norm, on my-one|bar another.\n")
    text = lines(figures)
    assert not any("two-instruct" in line for line in text)


@pytest.mark.parametrize(
    ("text", "speaks"),
    [
        ("on qwen2.5-0.5b.", True),
        ("{qwen2.5-0.5b:LC1.value}", True),
        ("qwen2.5-0.5b", True),
        ("on qwen2.5-0.5b-instruct", False),
        ("on my-qwen2.5-0.5b", False),
        ("on qwen2.5-0.5b.gguf", False),
        ("", False),
    ],
)
def test_a_model_is_spoken_of_by_its_whole_name(text, speaks):
    assert table.speaks_of(text, "qwen2.5-0.5b") is speaks


def test_two_sections_about_one_claim_are_refused(tmp_path):
    (tmp_path / "reasons.md").write_text("## LC1\n\na\n\n## LC1\n\nb\n")
    with pytest.raises(ValueError, match="has two sections LC1"):
        table.reasons(tmp_path)


def test_a_table_that_says_it_all_already_is_left_alone(figures):
    path = publish.render(figures)
    os.utime(path, ns=(1, 1))
    publish.render(figures)
    assert path.stat().st_mtime_ns == 1
    ledger(figures, "two", LC5=jaccard(0.26))
    publish.render(figures)
    assert path.stat().st_mtime_ns > 1


def drawn(figure) -> list[str]:
    """The verdicts of the cells in a picture, without those of its key."""
    found = [patch.get_label() for patch in figure.axes[0].patches if patch.get_label() in plots.across.LOOKS]
    shown = len(plots.across.LOOKS)
    assert found[-shown:] == list(plots.across.LOOKS)
    return found[:-shown]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_the_picture_has_a_cell_for_every_verdict(figures):
    found = drawn(plots.verdicts(table.board(claims.ledgers(figures))))
    ours = {"holds": 2 + 1 + 1, "differs": 1 + 2 + 1, "n/a": 2}
    assert {verdict: found.count(verdict) for verdict in ours} == ours
    assert found.count("reported") == 1 + 1  # LC1 and SK1, all of the paper's models in one
    assert {"4 … 14  (7)", "0.46  (1)"} <= set(texts(plots.verdicts(table.board(claims.ledgers(figures)))))


def test_the_committed_picture_is_of_the_committed_ledgers():
    found = claims.ledgers(FIGURES)
    cells = drawn(plots.verdicts(table.board(found)))
    rows = [row["verdict"] for data in found.values() for row in data["claims"].values()]
    judged = 1  # all of the paper's shares are above the rule's
    assert cells.count("holds") + cells.count("holds*") == rows.count("holds") + judged
    assert cells.count("holds*") == sum(len(row.of_controls_on) for row in table.board(found).rows)
    assert cells.count("differs") == rows.count("differs")
    assert cells.count("n/a") == rows.count("n/a")
    assert (FIGURES / "claims.png").is_file()
    assert (FIGURES / "claims.svg").is_file()


def test_every_committed_claim_has_a_few_words_for_the_picture():
    ids = {key for data in claims.ledgers(FIGURES).values() for key in data["claims"]}
    assert ids <= set(rules.RULES)
    assert max(len(rule.short) for rule in rules.RULES.values()) <= 42


def test_the_title_is_counted(figures):
    title, where = texts(plots.verdicts(table.board(claims.ledgers(figures))))[-2:]
    holding = "1 of 4 claims hold on every model they were put to, 0 of them firmly"
    assert title == f"{holding}; 1 differs on one|bar alone"
    assert where == "The other 3 differ: 1 on one|bar alone, 1 on several, X-OWN1 wherever put."


def test_the_picture_of_one_model_counts_its_own(tmp_path):
    ledger(tmp_path, "tiny", LC1=writes(0.9), LC5=jaccard(0.5))
    said = texts(plots.verdicts(table.board(claims.ledgers(tmp_path))))
    assert "1 of 2 claims hold on tiny" in said
    assert "1 hold\n1 differ\n0 n/a" in said
    assert "holds\non" not in said


def test_nothing_overlaps_in_a_picture_of_twelve_models():
    """Every text of a cell lies within its column, and no two of a row's texts touch."""
    found = claims.ledgers(FIGURES)
    many = {f"m{i}": copy.deepcopy(data) | {"model": f"m{i}"} for i, data in enumerate([*found.values()] * 4)}
    board = table.board(many)
    figure = plots.verdicts(board)
    figure.draw_without_rendering()
    rows: dict[float, list] = {}
    for text in figure.axes[0].texts:
        if text.get_text().strip() and not text.get_rotation() and 0 < text.get_position()[1] < 0.205 * len(board.rows):
            rows.setdefault(round(text.get_position()[1], 3), []).append(text.get_window_extent())
    assert len(rows) == len(board.rows)
    for boxes in rows.values():
        boxes.sort(key=lambda box: box.x0)
        assert all(left.x1 <= right.x0 for left, right in pairwise(boxes))


def test_a_folder_without_ledgers_says_so(tmp_path):
    assert "Nothing to draw" in plots.verdicts(table.board({})).axes[0].texts[0].get_text()
    assert "## " not in publish.render(tmp_path).read_text()
    assert publish.draw(tmp_path).is_file()


def test_the_picture_is_drawn_again_when_a_ledger_is_newer_and_only_then(figures):
    publish.render(figures)
    path = publish.draw(figures)
    first = {kind: path.with_suffix(kind).read_bytes() for kind in (".png", ".svg")}
    path.write_bytes(b"old")
    publish.draw(figures)
    assert path.read_bytes() == b"old"
    newer = path.stat().st_mtime_ns + 10**9
    os.utime(figures / "two" / "claims.json", ns=(newer, newer))
    publish.draw(figures)
    assert {kind: path.with_suffix(kind).read_bytes() for kind in (".png", ".svg")} == first  # and to the same bytes
