"""The ledger: rules at their limits, merging, and verdicts that can be recomputed from the files."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from spikesink import common
from spikesink.common import NotApplicable
from spikesink.lab.config import LAB
from spikesink.ledger import claims, rules
from spikesink.ledger.claims import Evidence, Header
from spikesink.model.anatomy import Block

FIGURES = Path(__file__).parent.parent / "figures"
COMMITTED = claims.ledgers(FIGURES) | {LAB: claims.lab_ledger(FIGURES)}
HEADER = Header("tiny", "tiny", "ab", "house", "cd", (2, 64), "float32", 0)
DELIMITERS = {
    "self_attention_delimiters": 0.5,
    "self_attention_other": 0.25,
    "scale_cosine_delimiters": 0.101,
    "scale_cosine_other": 0.1,
}
DECOUPLED = {"perplexity_decoupled": 105.0, "sink_ratio_decoupled": 0.45, "max_activation_decoupled": 100.0}
UNSUNK = {"sink_ratio_unsunk": 0.1, "max_activation_unsunk": 90.0, "max_activation_clean": 100.0}
CLEAN = {"perplexity_clean": 100.0, "sink_ratio_clean": 0.5, "max_activation_clean": 1000.0}
RANDOM = {"perplexity_random_channels": 99.01, "perplexity_other_position": 100.99, "perplexity_clean": 100.0}
FAMILY = {"n_agree": 2, "n_differ": 0, "n_reported": 4, "unsupported": []}
# Values that just meet each rule: any of them moved by two per cent, one way or the other, no longer does.
AT_THE_LIMIT = {
    "LC1": {"share_written": 0.8, "largest_attention_share": 0.0999},
    "LC2": {"plateau_write_ratio": 0.01},
    "LC3": {"share_cancelled": 0.5},
    "LC4": {"n_spike_channels": 41, "d_model": 4100},
    "LC5": {"jaccard": 0.9},
    "LC6": {"ratio_cv": 0.1},
    "LC7": {"spike_token_share": 0.05, "position0_share": 0.9},
    "AM1": {"silu_cosine_spike": 0.9, "silu_cosine_other": 0.85},
    "AM2": {"gain_rank": 3, "gain_over_median": 5.0},
    "AM3": {"rank_one_share": 0.8},
    "AM4": {"cosine_min": 0.9, "cosine_control": 0.3},
    "AM5": {"median_relative_error": 0.1},
    "AM6": {"cosine_spike": 0.75, "cosine_other": 0.25},
    "AM7": {"step_up_rank": 10, "step_down_rank": 10, "n_pairs": 1000},
    "X-AM8": {"scale_over_median": 10.0, "share_of_norm_spike": 0.75, "share_of_norm_other": 0.25},
    "X-MX1": {"share_of_spike_tokens": 0.9, "share_of_other_tokens": 0.5},
    "X-MX2": {"share_written": 0.8, "gain_rank": 1},
    "TK1": {"share": 0.98},
    "TK2": {"max_relative_error": 1e-4},
    "TK3": {"share_elsewhere": 0.05},
    "TK4": DELIMITERS,
    "X-TK5": DELIMITERS,
    "NM1": {"max_over_sqrt_d": 0.5},
    "NM2": {"participation_after": 5.76, "d_model": 576},
    "NM3": {"cosine_after": 0.99, "cosine_other_tokens": 0.9},
    "NM4": {"cosine_over_depth": 0.99},
    "NM5": {"perplexity_clean": 100.0, "perplexity_replaced": 99.01},
    "SK1": {"sink_ratio": 0.1},
    "SK2": {"share_on_spike_tokens": 0.9},
    "SK3": {"effective_dimension_sink": 2.0, "effective_dimension_other": 2.01},
    "SK4": {"logit_gap_sink": 1.01, "logit_gap_other": 1.0, "spearman": 0.5},
    "SK5": {"attention_during": 0.75, "attention_before": 0.25},
    "SK6": {"cosine_reconstructed": 0.95},
    "SK7": {"value_norm_ratio": 0.5},
    "X-SK8": {"attention_during": 0.75, "attention_otherwise": 0.25},
    "X-SK9": {"cosine_secondary": 0.5, "cosine_others": 0.25},
    "AB1": {"perplexity_zeroed": 120.0, "perplexity_clean": 100.0},
    "AB2": {"perplexity_mean": 101.99, "perplexity_clean": 100.0},
    "AB3": {"sink_ratio_skipped": 0.25, "sink_ratio_clean": 0.5},
    "AB4": DECOUPLED | CLEAN,
    "AB5": UNSUNK,
    "AB6": RANDOM,
    "AB7": {"factors": [0, 0.5, 1, 2], "perplexities": [9.0, 8.0, 7.9, 12.0]},
    **dict.fromkeys(("TR1", "TR2", "TR3", "TR4", "TR5", "TR6"), FAMILY),
    "X-TR9": {"attention_other": [0.5, 0.9], "attention_trigger": [0.1, 0.0]},
    "SV1": {"interval_per_tensor_over_split": [1.05, 2.0]},
    "SV2": {"interval_window_over_full": [1.5, 2.0], "interval_with_sink_over_full": [1.0, 1.1]},
    "SV3": {"sink_ratios": [0.4, 0.2, 0.3], "sink_ratios_at_0.2": [0.4, 0.2], "sink_ratios_at_0.4": [0.2, 0.1]},
}


def moved(value) -> list:
    """The same value a little to either side; of a list, each of its values in turn."""
    if not isinstance(value, list):
        return [value + step * (abs(value) or 1) for step in (-0.02, 0.02)]
    return [[*value[:i], other, *value[i + 1 :]] for i in range(len(value)) for other in moved(value[i])] or [["one"]]


@pytest.mark.parametrize("claim_id", rules.RULES)
def test_a_rule_holds_at_its_limit_and_differs_just_beyond_it(claim_id):
    measured = AT_THE_LIMIT[claim_id]
    assert claims.verdict(claim_id, measured) == "holds"
    assert rules.RULES[claim_id].read(measured | {"more": 1}) == measured  # it asks for all of them, and for no other
    for name in measured.keys() - {"factors"}:
        verdicts = {claims.verdict(claim_id, measured | {name: other}) for other in moved(measured[name])}
        assert "differs" in verdicts, name


@pytest.mark.parametrize(
    ("claim_id", "measured", "verdict"),
    [
        ("LC4", {"n_spike_channels": 10, "d_model": 576}, "holds"),
        ("LC4", {"n_spike_channels": 11, "d_model": 576}, "differs"),
        ("LC4", {"n_spike_channels": 0, "d_model": 576}, "differs"),
        ("NM1", {"max_over_sqrt_d": 1.0}, "holds"),
        ("NM1", {"max_over_sqrt_d": 1.002}, "differs"),
        ("NM5", {"perplexity_clean": 100.0, "perplexity_replaced": 101.1}, "differs"),
        ("AB4", DECOUPLED | CLEAN | {"sink_ratio_decoupled": 0.56}, "differs"),
        ("AB7", {"factors": [0, 0.5, 1], "perplexities": [9.0, 8.0, 8.0]}, "differs"),
        ("AB7", {"factors": [1, 2], "perplexities": [9.0, 8.0]}, "differs"),
        ("X-MX2", {"share_written": 1.26, "gain_rank": 1}, "differs"),
        ("SV3", AT_THE_LIMIT["SV3"] | {"sink_ratios": [0.0, 0.0]}, "differs"),
        ("TR1", FAMILY | {"n_agree": 0, "n_reported": 0}, "differs"),
        ("LC1", {"reason": "nothing spikes"}, "n/a"),
    ],
)
def test_rules_with_two_ends_or_none(claim_id, measured, verdict):
    assert claims.verdict(claim_id, measured) == verdict


@pytest.mark.parametrize("name", COMMITTED)
def test_every_committed_verdict_can_be_recomputed_from_its_file(name):
    for claim_id, row in COMMITTED[name]["claims"].items():
        rule = rules.RULES[claim_id]
        assert claims.verdict(claim_id, row["measured"]) == row["verdict"], claim_id
        assert (row["rule"], row["statement"]) == (rule.words, rule.statement), claim_id
        assert row["control"] or row["verdict"] == "n/a"


@pytest.mark.parametrize("claim_id", rules.RULES)
def test_a_rule_names_its_controls_or_compares_with_them_itself(claim_id):
    rule = rules.RULES[claim_id]
    measured = {name for names in rule.controls for name in names}
    controls = {name for names in rule.controls for name in names.values()}
    compares_by_itself = claim_id in ("AM4", "AM6", "AB7") or claim_id.startswith("TR")
    assert bool(controls) != compares_by_itself
    rows = [data["claims"][claim_id] for data in COMMITTED.values() if claim_id in data["claims"]]
    judged = [row for row in rows if row["verdict"] != "n/a"]
    assert rows
    assert all(measured <= row["measured"].keys() for row in judged)
    assert all(controls <= set().union(*(row["measured"] | row["control"] for row in judged)) for _ in judged)


def test_a_control_passes_where_the_rule_holds_with_its_values_in_place_of_the_measured_ones():
    rank, control = {"gain_rank": 1, "gain_over_median": 9.0}, {"gain_rank_other_blocks": 1}
    assert claims.passing_controls("AM2", rank, control) == []  # the other half of this control was not measured
    assert claims.passing_controls("AM2", rank, control | {"gain_over_median_other_blocks": 4.0}) == []
    passing = claims.passing_controls("AM2", rank, control | {"gain_over_median_other_blocks": 5.0})
    assert passing == ["gain_rank_other_blocks"]
    assert claims.passing_controls("X-OWN1", rank, control) == []


@pytest.mark.parametrize(("ends", "is_open"), [([1.0, 1.2], True), ([1.06, 1.2], False), ([0.9, 1.04], False)])
def test_an_interval_that_holds_the_limit_leaves_the_claim_open(ends, is_open):
    assert claims.left_open("SV1", {"interval_per_tensor_over_split": ends}) is is_open


def test_evidence_becomes_plain_numbers_of_six_digits():
    measured = {
        "plateau_write_ratio": np.float32(1 / 128),
        "tensor": torch.tensor([1.0, 2.0]),
        "blocks": (Block(24),),
        "rows": [{"name": "a", "loss": 1 / 3, "flag": True}],
    }
    row = claims.judge("LC2", Evidence(measured, {"other": range(2)}), "02_plateau")
    rows = [{"name": "a", "loss": 0.333333, "flag": True}]
    assert row.measured == {"plateau_write_ratio": 0.0078125, "tensor": [1.0, 2.0], "blocks": [24], "rows": rows}
    assert (row.control, row.verdict, row.rule) == ({"other": [0, 1]}, "holds", rules.RULES["LC2"].words)


@pytest.mark.parametrize("bad", [math.nan, math.inf, None, [1.0, math.nan], torch.tensor([math.nan]), object()])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="LC2: plateau_write_ratio"):
        claims.judge("LC2", Evidence({"plateau_write_ratio": bad}, {"other": 1.0}), "02_plateau")


@pytest.mark.parametrize(
    ("claim_id", "evidence", "why"),
    [
        ("LC99", Evidence({}, {}), "LC99"),
        ("LC2", Evidence({"plateau_write_ratio": 0.1}, {}), "control"),
        ("LC2", Evidence({"another": 0.1}, {"other": 1.0}), "plateau_write_ratio"),
    ],
)
def test_what_cannot_be_judged_is_refused(claim_id, evidence, why):
    with pytest.raises(ValueError, match=why):
        claims.judge(claim_id, evidence, "02_plateau")


def test_what_could_not_be_measured_is_left_out_or_is_the_reason():
    nan = math.nan
    assert claims.make_evidence({"a": 1.0}, {"b": nan, "c": 2, "d": [1.0, nan]}) == Evidence({"a": 1.0}, {"c": 2})
    assert "no control" in claims.make_evidence({"a": 1.0}, {"b": nan}).reason
    assert claims.make_evidence({"a": nan, "b": 1.0}, {"b": 1.0}).reason.startswith("a could not be measured")
    row = claims.judge("LC1", NotApplicable("nothing spikes"), "01_step_up")
    assert (row.verdict, row.measured) == ("n/a", {"reason": "nothing spikes"})


def claim(claim_id: str = "LC2", **measured) -> claims.Claim:
    return claims.judge(claim_id, Evidence(AT_THE_LIMIT[claim_id] | measured, {"other": 0.5}), "02_plateau")


def test_notebooks_merge_their_claims_unless_they_measured_otherwise(tmp_path):
    def rows() -> dict[str, str]:
        data = json.loads((tmp_path / "claims.json").read_text())
        assert data["schema"] == claims.SCHEMA
        return {claim_id: row["verdict"] for claim_id, row in data["claims"].items()}

    claims.record(tmp_path, HEADER, {"LC2": claim("LC2")})
    claims.record(tmp_path, HEADER, {"LC1": claim("LC1")})
    assert list(rows().items()) == [("LC1", "holds"), ("LC2", "holds")]
    claims.record(tmp_path, HEADER, {"LC2": claim("LC2", plateau_write_ratio=0.5)})
    assert rows()["LC2"] == "differs"
    for change in ({"text_sha256": "ef"}, {"windows": (4, 64)}, {"sha256": "00"}, {"dtype": "bfloat16"}, {"seed": 1}):
        claims.record(tmp_path, HEADER, {"LC2": claim("LC2")})
        claims.record(tmp_path, replace(HEADER, **change), {"LC1": claim("LC1")})
        assert list(rows()) == ["LC1"], change


def test_many_notebooks_at_once_lose_nothing(tmp_path):
    with ThreadPoolExecutor(len(AT_THE_LIMIT)) as pool:
        list(pool.map(lambda claim_id: claims.record(tmp_path, HEADER, {claim_id: claim(claim_id)}), AT_THE_LIMIT))
    assert json.loads((tmp_path / "claims.json").read_text())["claims"].keys() == AT_THE_LIMIT.keys()


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    common.write_atomically(path, "old")
    monkeypatch.setattr(common.os, "replace", Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        common.write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0001234, "0.000123"),
        (-23749.9, "-23,700"),
        (999.6, "1,000"),
        (math.inf, "inf"),
        ([[24, 3], [58, 0.5]], "(24, 3), (58, 0.5)"),
        ([], "none"),
    ],
)
def test_values_are_shortened(value, text):
    assert common.brief(value) == text
