"""Every measure on a tiny random model of every family: a result, or n/a with the reason that its build gives."""

import pytest

from spikesink.ledger import evidence
from spikesink.patching import cuts
from tests import in_process, planted, spiking
from tests.test_families import FAMILIES, MORE, build, n_experts, tiny

TEXT = "The<spike> river runs<spike> to the sea, and the mill stands<spike> by the weir.\n" * 40
NO_SPIKE = "no token has an entry above 100 medians anywhere in the residual stream"
OF_THE_FFN = [f"AM{i}" for i in range(1, 8)] + ["X-AM8"]
OF_EXPERTS = ["X-MX1", "X-MX2"]


@pytest.fixture(scope="module", params=FAMILIES | MORE)
def walked(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("walk")
    (folder / "text.txt").write_text(TEXT)
    see = {"see": in_process.draw} if request.param == "llama" else {}  # all have the same pictures: little but words
    found = in_process.walk(tiny(request.param, folder), folder / "text.txt", folder / "figures", **see)
    return request.param, found


def test_a_random_model_of_any_family_passes_every_measure(walked):
    """That position 0's attention is one static map needs no spike, nor does counting sinks, of which it has none."""
    family, found = walked
    assert set(found.rows) == set(in_process.OF_MODELS)
    applies = {key: verdict for key, verdict in found.verdicts.items() if verdict != "n/a"}
    # In gpt-oss a learned logit takes its share of a softmax over one key too; DeepSeek-V3 has no W_V to compare with.
    first = {"gpt_oss": {"TK2": "differs"}, "deepseek_v3": {}}.get(family, {"TK2": "holds"})
    assert applies == first | {"SK1": "differs"}


def test_where_a_measure_does_not_apply_it_says_why(walked):
    family, found = walked
    reasons = {key: row["measured"]["reason"] for key, row in found.rows.items() if row["verdict"] == "n/a"}
    expected, gate = dict.fromkeys(reasons, NO_SPIKE), (FAMILIES | MORE)[family][2][3]
    if experts := n_experts(family):
        reason = f"the FFN of this {family} model is a mixture of {experts} experts, not one gated FFN"
        expected |= dict.fromkeys(OF_THE_FFN, reason)
    else:
        expected |= dict.fromkeys(OF_EXPERTS, "every layer has one FFN, and no router chooses")
        if gate is None:
            reason = f"the FFN of this {family} model has no gate, so it is no quadratic form"
            expected |= dict.fromkeys(OF_THE_FFN, reason)
    expected |= dict.fromkeys(("SV2", "SV3"), evidence.serving.SHORT)
    if family == "gpt_oss":
        expected["SV2"] = "a learned logit takes part in the attention of this gpt_oss model, beside its keys"
    if family == "opt":
        expected["SV2"] = "the attention of this opt model has read its pattern before it can be changed"
    if family == "deepseek_v3":
        expected["TK2"] = "the attention of this deepseek_v3 model has no W_K and W_V of its own"
    assert reasons == expected


def test_every_picture_of_the_default_model_is_drawn_of_any_other(walked):
    committed = (in_process.ROOT / "figures" / "smollm2-135m").glob("*.png")
    assert walked[1].pictures == sorted(path.stem for path in committed)


@pytest.mark.parametrize("family", [family for family in FAMILIES | MORE if family not in planted.FAMILIES])
def test_a_spike_in_any_other_family_passes_every_measure(family, tmp_path):
    """What can be told of it is told in each; the rest says what the family lacks."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = spiking.make_spike(build(family, **{layers: spiking.N_LAYERS}))
    (tmp_path / "text.txt").write_text(planted.text(3, 32))
    found = in_process.walk(planted.save(model, tmp_path / "model"), tmp_path / "text.txt", tmp_path / "figures")
    assert set(found.rows) == set(in_process.OF_MODELS)
    measured = {key: row["measured"] for key, row in found.rows.items()}
    assert measured["LC1"]["step_up_blocks"] == [2 * spiking.STEP_UP + 2]
    assert measured["LC1"]["channels"] == [spiking.CHANNEL]
    assert measured["LC1"]["plateau_value"] == pytest.approx(spiking.SIZE, rel=1e-3)
    assert measured["LC3"]["step_down_blocks"] == [2 * spiking.STEP_DOWN + 2]
    assert measured["LC3"]["left_at_the_end"] == pytest.approx(spiking.STAYS, rel=0.01)
    reasons = {key: row["measured"].get("reason") for key, row in found.rows.items()}
    assert not {NO_SPIKE, "there is no plateau"} & set(reasons.values())
    # What each family has no part for; what is n/a for other reasons hangs on the random weights.
    norms, form = reasons["NM1"] is None, reasons["AM2"] is None
    assert norms == (family != "olmo2")
    assert form == (family in ("gemma2", "gemma3", "olmo2", "olmo"))
    assert (reasons["TK1"] is None) == (family not in ("opt", "gpt_oss", "deepseek_v3"))
    # In the windows that are judged the trigger may stand first alone, and what is held is what stands there.
    assert (reasons["AB4"] in (None, cuts.NO_CHANGE)) == (family not in ("gpt_oss", "deepseek_v3"))
    if form:
        assert measured["AM2"]["gain_rank"] == 1
