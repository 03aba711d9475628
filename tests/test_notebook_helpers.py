"""What the notebooks say and tabulate."""

from dataclasses import replace

import pandas as pd

from spikesink import paper
from spikesink.apps import notebook
from spikesink.common import NotApplicable
from spikesink.ledger import claims, rules
from spikesink.ledger.claims import Header
from spikesink.model.anatomy import block

HEADER = Header("tiny", "tiny", "ab", "house", "cd", (2, 64), "float32", 0)


def test_prose_takes_its_numbers_from_the_evidence():
    result = claims.Evidence({"share": 0.98765, "tiny": 3e-7, "none": 0.0}, {"other": 23754.4})
    said = notebook.say("{share:.1%} {share} {tiny} {none} {other} {missing}", result).data
    assert said == "98.8% 0.988 < 1e-5 0 23,800 (not measurable here)"
    assert notebook.say("{share}", NotApplicable("it has none")).data == "*Not applicable here: it has none.*"


def test_tables_shorten_numbers_and_escape_what_would_break_them():
    frame = pd.DataFrame({"a": [1.23456, 2e-8], "b": ["x|y", ""], "block": [(block(24),), ()]})
    rows = ["| 1.23 | x\\|y | L11 MLP (block 24) |", "| < 1e-5 |  | none |"]
    assert notebook.tidy(frame).data.splitlines() == ["| a | b | block |", "| --- | --- | --- |", *rows]
    assert notebook.tidy(NotApplicable("it has none")).data == "*Not applicable here: it has none.*"


def test_a_model_joins_the_paper_s_table_2(tmp_path):
    measured = {"spiking": 90, "vocabulary": 100, "share": 0.9, "threshold": 1.0}
    for name, evidence in (("tiny", claims.Evidence(measured, {"before": 0.0})), ("other", NotApplicable("no spike"))):
        claim = claims.judge("TK1", evidence, "05_first_token")
        claims.record(tmp_path / name, replace(HEADER, model=name), {"TK1": claim})
    table = notebook.vocabularies(notebook.Ledger("05_first_token", tmp_path / "tiny", HEADER))
    assert table.loc["tiny"].tolist() == [90, 100, "90.00%", "here"]
    assert len(table) == 1 + len(paper.TABLE_2)
    assert table.loc["Llama-3-8B", "share"] == "99.77%"  # as the paper prints it


def test_a_recorded_claim_says_that_it_holds_of_a_control_too_and_tells_a_shared_rule_once(tmp_path):
    ledger = notebook.Ledger("06_rmsnorm", tmp_path / "tiny", HEADER)
    for ordinary, said in ((0.25, "| **holds** |"), (0.75, "| **holds**<br>of max_over_sqrt_d_other_tokens too |")):
        result = claims.Evidence({"max_over_sqrt_d": 0.9}, {"max_over_sqrt_d_other_tokens": ordinary})
        assert said in ledger.record({"NM1": result}).data
    none = dict.fromkeys(("TR1", "TR2"), NotApplicable("nothing is trained"))
    shown = ledger.record(none).data.splitlines()
    assert f"<br>*{rules.RULES['TR1'].words}* |" in shown[2]
    assert "<br>*the rule of TR1* |" in shown[3]
