"""The ledger: rules on hand-made measurements, merging, and verdicts that can be recomputed from the files."""

import json
import math
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from spikesink import common
from spikesink.common import NotApplicable
from spikesink.lab import config
from spikesink.ledger import claims, rules
from spikesink.ledger.claims import Evidence, Header

FIGURES = Path(__file__).parent.parent / "figures"
HEADER = Header("tiny", "tiny", "ab", "house", "cd", (2, 64), "float32", 0)
HOLDS = {
    "LC1": {"share_written": 0.8, "largest_attention_share": 0.09},
    "LC2": {"plateau_write_ratio": 0.01},
    "SV1": {"interval_per_tensor_over_split": [1.05, 2.0]},
    "SV2": {"interval_window_over_full": [1.5, 2.0], "interval_with_sink_over_full": [1.0, 1.1]},
    "SV3": {"sink_ratios": [0.4, 0.2, 0.3], "sink_ratios_at_0.2": [0.4, 0.4], "sink_ratios_at_0.4": [0.2, 0.1]},
    "LC3": {"share_cancelled": 0.5},
    "LC4": {"n_spike_channels": 10, "d_model": 576},
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
    "TK4": {
        "self_attention_delimiters": 0.5,
        "self_attention_other": 0.25,
        "scale_cosine_delimiters": 0.11,
        "scale_cosine_other": 0.1,
    },
}
HOLDS |= {
    "NM1": {"max_over_sqrt_d": 0.5},
    "NM2": {"participation_after": 5.76, "d_model": 576},
    "NM3": {"cosine_after": 0.99, "cosine_other_tokens": 0.9},
    "NM4": {"cosine_over_depth": 0.99},
    "NM5": {"perplexity_clean": 100.0, "perplexity_replaced": 99.1},
    "SK1": {"sink_ratio": 0.1},
    "SK2": {"share_on_spike_tokens": 0.9},
    "SK3": {"effective_dimension_sink": 2.0, "effective_dimension_other": 2.1},
    "SK4": {"logit_gap_sink": 1.1, "logit_gap_other": 1.0, "spearman": 0.5},
    "SK5": {"attention_during": 0.75, "attention_before": 0.25},
    "SK6": {"cosine_reconstructed": 0.95},
    "SK7": {"value_norm_ratio": 0.5},
    "X-SK8": {"attention_during": 0.75, "attention_otherwise": 0.25},
    "X-SK9": {"cosine_secondary": 0.5, "cosine_others": 0.25},
}
HOLDS |= {
    "AB1": {"perplexity_zeroed": 120.0, "perplexity_clean": 100.0},
    "AB2": {"perplexity_mean": 101.9, "perplexity_clean": 100.0},
    "AB3": {"sink_ratio_skipped": 0.25, "sink_ratio_clean": 0.5},
    "AB4": {
        "perplexity_decoupled": 105.0,
        "perplexity_clean": 100.0,
        "sink_ratio_decoupled": 0.46,
        "sink_ratio_clean": 0.5,
        "max_activation_decoupled": 100.0,
        "max_activation_clean": 1000.0,
    },
    "AB5": {"sink_ratio_unsunk": 0.1, "max_activation_unsunk": 90.0, "max_activation_clean": 100.0},
    "AB6": {"perplexity_random_channels": 99.1, "perplexity_other_position": 100.9, "perplexity_clean": 100.0},
    "AB7": {"factors": [0, 0.5, 1, 2], "perplexities": [9.0, 8.0, 7.9, 12.0]},
}
HOLDS["X-TK5"] = HOLDS["TK4"]
HOLDS |= {f"TR{i}": {"n_agree": 2, "n_differ": 0, "n_reported": 4, "unsupported": []} for i in range(1, 7)}
HOLDS |= {
    "X-TR9": {"attention_other": [0.5, 0.9], "attention_trigger": [0.1, 0.0]},
}
DIFFERS = [
    ("NM1", {"max_over_sqrt_d": 0.49}),
    ("NM1", {"max_over_sqrt_d": 1.002}),
    ("NM2", {"participation_after": 5.77, "d_model": 576}),
    ("NM3", {"cosine_after": 0.98, "cosine_other_tokens": 0.5}),
    ("NM3", {"cosine_after": 1.0, "cosine_other_tokens": 0.91}),
    ("NM4", {"cosine_over_depth": 0.98}),
    ("NM5", {"perplexity_clean": 100.0, "perplexity_replaced": 101.1}),
    ("NM5", {"perplexity_clean": 100.0, "perplexity_replaced": 98.9}),
    ("SK1", {"sink_ratio": 0.09}),
    ("SK2", {"share_on_spike_tokens": 0.89}),
    ("SK3", {"effective_dimension_sink": 2.1, "effective_dimension_other": 9.0}),
    ("SK3", {"effective_dimension_sink": 1.1, "effective_dimension_other": 1.1}),
    ("SK4", {"logit_gap_sink": 1.0, "logit_gap_other": 1.0, "spearman": 0.9}),
    ("SK4", {"logit_gap_sink": 9.0, "logit_gap_other": 1.0, "spearman": 0.49}),
    ("SK5", {"attention_during": 0.74, "attention_before": 0.25}),
    ("SK6", {"cosine_reconstructed": 0.94}),
    ("SK7", {"value_norm_ratio": 0.51}),
    ("X-SK8", {"attention_during": 0.74, "attention_otherwise": 0.25}),
    ("X-SK9", {"cosine_secondary": 0.49, "cosine_others": 0.0}),
    ("X-SK9", {"cosine_secondary": 0.9, "cosine_others": 0.46}),
    ("LC1", {"share_written": 0.79, "largest_attention_share": 0.0}),
    ("LC1", {"share_written": 1.0, "largest_attention_share": 0.1}),
    ("LC2", {"plateau_write_ratio": 0.011}),
    ("LC3", {"share_cancelled": 0.49}),
    ("LC4", {"n_spike_channels": 0, "d_model": 576}),
    ("LC4", {"n_spike_channels": 11, "d_model": 576}),
    ("LC5", {"jaccard": 0.89}),
    ("LC6", {"ratio_cv": 0.11}),
    ("LC7", {"spike_token_share": 0.051, "position0_share": 1.0}),
    ("LC7", {"spike_token_share": 0.01, "position0_share": 0.89}),
    ("AM1", {"silu_cosine_spike": 0.89, "silu_cosine_other": 0.5}),
    ("AM1", {"silu_cosine_spike": 0.99, "silu_cosine_other": 0.95}),
    ("AM2", {"gain_rank": 4, "gain_over_median": 9.0}),
    ("AM2", {"gain_rank": 1, "gain_over_median": 4.9}),
    ("AM3", {"rank_one_share": 0.79}),
    ("AM4", {"cosine_min": 0.89, "cosine_control": 0.1}),
    ("AM4", {"cosine_min": 0.99, "cosine_control": 0.31}),
    ("AM5", {"median_relative_error": 0.11}),
    ("AM6", {"cosine_spike": 0.74, "cosine_other": 0.25}),
    ("AM7", {"step_up_rank": 11, "step_down_rank": 1, "n_pairs": 1000}),
    ("AM7", {"step_up_rank": 1, "step_down_rank": 11, "n_pairs": 1000}),
    *((f"TR{i}", {"n_agree": 1, "n_differ": 0, "n_reported": 3, "unsupported": []}) for i in range(1, 7)),
    ("TR1", HOLDS["TR1"] | {"n_agree": 3, "n_differ": 1}),
    ("TR1", HOLDS["TR1"] | {"n_agree": 0, "n_reported": 0}),
    ("TR1", HOLDS["TR1"] | {"n_agree": 3, "unsupported": ["sinks that stay"]}),
    ("SV1", {"interval_per_tensor_over_split": [1.049, 2.0]}),
    ("SV2", HOLDS["SV2"] | {"interval_window_over_full": [1.49, 2.0]}),
    ("SV2", HOLDS["SV2"] | {"interval_with_sink_over_full": [1.0, 1.11]}),
    ("SV3", HOLDS["SV3"] | {"sink_ratios": [0.41, 0.2, 0.3]}),
    ("SV3", HOLDS["SV3"] | {"sink_ratios": [0.1, 0.0]}),
    ("SV3", HOLDS["SV3"] | {"sink_ratios": [0.0, 0.0]}),
    ("SV3", HOLDS["SV3"] | {"sink_ratios_at_0.2": [0.4, 0.19]}),
    ("SV3", HOLDS["SV3"] | {"sink_ratios_at_0.4": [0.21, 0.1]}),
    ("X-TR9", {"attention_other": [0.49, 0.9], "attention_trigger": [0.1, 0.0]}),
    ("X-TR9", {"attention_other": [0.5, 0.9], "attention_trigger": [0.11, 0.0]}),
    ("X-AM8", HOLDS["X-AM8"] | {"scale_over_median": 9.9}),
    ("X-AM8", HOLDS["X-AM8"] | {"share_of_norm_other": 0.26}),
    ("X-MX1", HOLDS["X-MX1"] | {"share_of_spike_tokens": 0.89}),
    ("X-MX1", HOLDS["X-MX1"] | {"share_of_other_tokens": 0.51}),
    ("X-MX2", HOLDS["X-MX2"] | {"share_written": 0.79}),
    ("X-MX2", HOLDS["X-MX2"] | {"share_written": 1.26}),
    ("X-MX2", HOLDS["X-MX2"] | {"gain_rank": 2}),
    ("TK1", {"share": 0.979}),
    ("TK2", {"max_relative_error": 1.1e-4}),
    ("TK3", {"share_elsewhere": 0.051}),
    ("AB1", HOLDS["AB1"] | {"perplexity_zeroed": 119.9}),
    ("AB2", HOLDS["AB2"] | {"perplexity_mean": 102.1}),
    ("AB2", HOLDS["AB2"] | {"perplexity_mean": 97.9}),
    ("AB3", HOLDS["AB3"] | {"sink_ratio_skipped": 0.26}),
    ("AB4", HOLDS["AB4"] | {"perplexity_decoupled": 105.1}),
    ("AB4", HOLDS["AB4"] | {"sink_ratio_decoupled": 0.44}),
    ("AB4", HOLDS["AB4"] | {"sink_ratio_decoupled": 0.56}),
    ("AB4", HOLDS["AB4"] | {"max_activation_decoupled": 100.1}),
    ("AB5", HOLDS["AB5"] | {"sink_ratio_unsunk": 0.11}),
    ("AB5", HOLDS["AB5"] | {"max_activation_unsunk": 89.9}),
    ("AB6", HOLDS["AB6"] | {"perplexity_random_channels": 98.9}),
    ("AB6", HOLDS["AB6"] | {"perplexity_other_position": 101.1}),
    ("AB7", {"factors": [0, 0.5, 1, 2], "perplexities": [9.0, 8.0, 8.0, 1.0]}),
    ("AB7", {"factors": [0, 0.5, 1, 2], "perplexities": [9.0, 9.1, 8.0, 1.0]}),
    ("AB7", {"factors": [1, 2], "perplexities": [9.0, 8.0]}),
    *((key, HOLDS["TK4"] | {"self_attention_other": 0.26}) for key in ("TK4", "X-TK5")),
    *((key, HOLDS["TK4"] | {"scale_cosine_other": 0.11}) for key in ("TK4", "X-TK5")),
]


def test_every_rule_is_tried_at_its_limit():
    assert set(HOLDS) == set(rules.RULES) == {claim_id for claim_id, _ in DIFFERS}


def claim(claim_id="LC2", value=0.001, notebook="02_plateau"):
    measured = dict(HOLDS[claim_id])
    if claim_id == "LC2":
        measured["plateau_write_ratio"] = value
    return claims.judge(claim_id, Evidence(measured, {"other": 0.5}), notebook)


@pytest.mark.parametrize("claim_id", HOLDS)
def test_a_rule_holds_at_its_own_limit(claim_id):
    assert claims.verdict(claim_id, HOLDS[claim_id]) == "holds"


@pytest.mark.parametrize(("claim_id", "measured"), DIFFERS)
def test_a_rule_differs_just_beyond_its_limit(claim_id, measured):
    assert claims.verdict(claim_id, measured) == "differs"


def test_channels_may_be_one_per_cent_of_a_wide_model():
    assert claims.verdict("LC4", {"n_spike_channels": 40, "d_model": 4096}) == "holds"
    assert claims.verdict("LC4", {"n_spike_channels": 41, "d_model": 4096}) == "differs"


def all_ledgers() -> dict:
    return claims.ledgers(FIGURES) | {config.LAB: claims.lab_ledger(FIGURES)}


def test_every_committed_verdict_can_be_recomputed_from_its_file():
    ledgers = all_ledgers()
    assert "smollm2-135m" in ledgers
    for data in ledgers.values():
        for claim_id, row in data["claims"].items():
            assert claims.verdict(claim_id, row["measured"]) == row["verdict"], (data["model"], claim_id)
            assert row["rule"] == rules.RULES[claim_id].words
            assert row["control"] or row["verdict"] == "n/a"


def test_a_reason_is_no_verdict():
    row = claims.judge("LC1", NotApplicable("nothing spikes"), "01_step_up")
    assert row.verdict == "n/a"
    assert row.measured == {"reason": "nothing spikes"}
    assert claims.verdict("LC1", row.measured) == "n/a"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None])
def test_what_is_no_number_is_refused(bad):
    with pytest.raises(ValueError, match="LC2: plateau_write_ratio is"):
        claims.judge("LC2", Evidence({"plateau_write_ratio": bad}, {"other": 1.0}), "02_plateau")


def test_a_claim_without_a_control_is_refused():
    with pytest.raises(ValueError, match="no control"):
        claims.judge("LC2", Evidence({"plateau_write_ratio": 0.1}, {}), "02_plateau")


def test_notebooks_merge_their_claims(tmp_path):
    claims.record(tmp_path, HEADER, {"LC2": claim("LC2")})
    path = claims.record(tmp_path, HEADER, {"LC1": claim("LC1", notebook="01_step_up")})
    data = json.loads(path.read_text())
    assert list(data["claims"]) == ["LC1", "LC2"]
    assert data["schema"] == 1
    assert data["windows"] == [2, 64]
    claims.record(tmp_path, HEADER, {"LC2": claim("LC2", 0.5)})
    assert json.loads(path.read_text())["claims"]["LC2"]["verdict"] == "differs"


@pytest.mark.parametrize(
    "change", [{"text_sha256": "ef"}, {"windows": (4, 64)}, {"sha256": "00"}, {"dtype": "bfloat16"}, {"seed": 1}]
)
def test_claims_measured_otherwise_are_not_mixed(tmp_path, change):
    claims.record(tmp_path, HEADER, {"LC2": claim("LC2")})
    path = claims.record(tmp_path, replace(HEADER, **change), {"LC1": claim("LC1")})
    assert list(json.loads(path.read_text())["claims"]) == ["LC1"]


def test_many_notebooks_at_once_lose_nothing(tmp_path, monkeypatch):
    write = common.write_atomically
    monkeypatch.setattr(common, "write_atomically", lambda *file: (time.sleep(0.05), write(*file)))  # time to collide
    threads = [
        threading.Thread(target=claims.record, args=(tmp_path, HEADER, {claim_id: claim(claim_id)}))
        for claim_id in HOLDS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(json.loads((tmp_path / "claims.json").read_text())["claims"]) == set(HOLDS)


def test_an_interrupted_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "file.txt"
    common.write_atomically(path, "old")

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(common.os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        common.write_atomically(path, "new")
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0001234, "0.000123"),
        (23754.4, "23,800"),
        (-23749.9, "-23,700"),
        (999.6, "1,000"),
        (math.inf, "inf"),
        ([24, 58], "24, 58"),
        ([[24, 3], [58, 0.5]], "(24, 3), (58, 0.5)"),
        ([], "none"),
        (1.0018, "1"),
        ("a", "a"),
        (3, "3"),
    ],
)
def test_values_are_shortened(value, text):
    assert common.brief(value) == text


def test_what_cannot_be_measured_is_left_out_or_is_the_reason():
    nan = math.nan
    assert claims.make_evidence({"a": 1.0}, {"b": nan, "c": 2, "d": [1.0, nan]}) == Evidence({"a": 1.0}, {"c": 2})
    assert claims.make_evidence({"a": 1.0}, {"b": nan}).reason.startswith("no control could be measured")
    assert claims.make_evidence({"a": nan, "b": 1.0}, {"b": 1.0}).reason.startswith("a could not be measured")


def test_every_rule_names_its_controls_or_compares_with_them_itself():
    for claim_id, rule in rules.RULES.items():
        measured = {name for names in rule.controls for name in names}
        controls = {name for names in rule.controls for name in names.values()}
        compare_by_themselves = ("AM4", "AM6", "AB7", *(f"TR{i}" for i in range(1, 7)))
        assert bool(controls) != (claim_id in compare_by_themselves), claim_id
        rows = [data["claims"][claim_id] for data in all_ledgers().values() if claim_id in data["claims"]]
        assert rows, claim_id
        for row in rows:
            if row["verdict"] != "n/a":
                assert measured <= set(row["measured"]), claim_id
                # A control that could not be measured on a model is left out of its ledger.
                assert controls & set(row["control"]) or not controls, claim_id
                assert rule.beside in ("", *row["measured"]), claim_id
        known = {name for row in rows for name in row["control"]}
        assert controls <= known or not known, claim_id


def test_a_claim_is_held_by_a_control_where_the_rule_holds_with_its_values_in_their_place():
    rank, median = {"gain_rank": 1, "gain_over_median": 9.0}, {"gain_rank_other_blocks": 1}
    assert claims.passing_controls("AM2", rank, median) == []  # the other half of this control was not measured
    assert claims.passing_controls("AM2", rank, median | {"gain_over_median_other_blocks": 4.0}) == []
    assert claims.passing_controls("AM2", rank, median | {"gain_over_median_other_blocks": 5.0}) == [
        "gain_rank_other_blocks"
    ]
    assert claims.passing_controls("X-OWN1", rank, median) == []
