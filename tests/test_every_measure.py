"""Every measure on a tiny model of every family, random or with a spike: a result, or n/a with the reason it has."""

import pytest

from spikesink.ledger.evidence import cuts, serving
from tests import in_process, planted, spiking
from tests.test_families import FAMILIES, MORE, build, n_experts, tiny

TEXT = "The<spike> river runs<spike> to the sea, and the mill stands<spike> by the weir.\n" * 40
NO_SPIKE = "no token has an entry above 100 medians anywhere in the residual stream"
OF_THE_FFN = [f"AM{i}" for i in range(1, 8)] + ["X-AM8"]
OF_EXPERTS = ["X-MX1", "X-MX2"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


def expected_reasons(family: str) -> dict[str, str]:
    """Why each claim cannot be put to a random model of a family; TK2 and SK1 need no spike."""
    reasons, gate = dict.fromkeys(in_process.OF_MODELS, NO_SPIKE), (FAMILIES | MORE)[family][2][3]
    if experts := n_experts(family):
        mixture = f"the FFN of this {family} model is a mixture of {experts} experts, not one gated FFN"
        reasons |= dict.fromkeys(OF_THE_FFN, mixture)
    else:
        reasons |= dict.fromkeys(OF_EXPERTS, "every layer has one FFN, and no router chooses")
        if gate is None:
            no_gate = f"the FFN of this {family} model shows no gate, so no quadratic form"
            reasons |= dict.fromkeys(OF_THE_FFN, no_gate)
    reasons |= dict.fromkeys(("SV2", "SV3"), serving.SHORT)
    if family == "gpt_oss":
        reasons["SV2"] = "a learned logit takes part in the attention of this gpt_oss model, beside its keys"
    if family == "opt":
        reasons["SV2"] = "the attention of this opt model has read its pattern before it can be changed"
    del reasons["SK1"], reasons["TK2"]
    if family == "deepseek_v3":
        reasons["TK2"] = "the attention of this deepseek_v3 model has no W_K and W_V of its own"
    return reasons


@pytest.mark.parametrize("family", FAMILIES | MORE)
def test_a_random_model_of_any_family_passes_every_measure(family, text, tmp_path):
    judged = in_process.measure(tiny(family, tmp_path), text)
    assert set(judged) == set(in_process.OF_MODELS)
    reasons = {key: claim.measured["reason"] for key, claim in judged.items() if claim.verdict == "n/a"}
    assert reasons == expected_reasons(family)
    # In gpt-oss a learned logit takes its share of a softmax over one key too.
    static = {} if "TK2" in reasons else {"TK2": "differs" if family == "gpt_oss" else "holds"}
    verdicts = {key: claim.verdict for key, claim in judged.items() if key not in reasons}
    assert verdicts == static | {"SK1": "differs"}


@pytest.mark.parametrize("kind", ["random", "planted"])
def test_notebooks_record_what_one_call_measures_and_draw_all_their_pictures(kind, text, tmp_path, family_directory):
    if kind == "planted":
        text = tmp_path / "planted.txt"
        text.write_text(planted.text(6, 64))
    given = (tiny("llama", tmp_path), text) if kind == "random" else (family_directory("llama"), text, 6, 64)
    rows, pictures = in_process.walk(*given, folder=tmp_path / "figures")
    judged = in_process.measure(*given)
    assert {key: row["measured"] for key, row in rows.items()} == {key: row.measured for key, row in judged.items()}
    committed = (in_process.ROOT / "figures" / "smollm2-135m").glob("*.png")
    assert pictures == sorted(path.stem for path in committed)


@pytest.mark.parametrize("family", [family for family in FAMILIES | MORE if family not in planted.FAMILIES])
def test_a_spike_in_any_other_family_passes_every_measure(family, tmp_path):
    """What can be told of it is told in each; the rest says what the family lacks."""
    layers = "n_layer" if family == "gpt2" else "num_hidden_layers"
    model = spiking.make_spike(build(family, **{layers: spiking.N_LAYERS}))
    (tmp_path / "text.txt").write_text(planted.text(3, 32))
    judged = in_process.measure(planted.save(model, tmp_path / "model"), tmp_path / "text.txt")
    measured = {key: claim.measured for key, claim in judged.items()}
    assert set(measured) == set(in_process.OF_MODELS)
    assert measured["LC1"]["step_up_blocks"] == [2 * spiking.STEP_UP + 2]
    assert measured["LC1"]["channels"] == [spiking.CHANNEL]
    assert measured["LC1"]["plateau_value"] == pytest.approx(spiking.SIZE, rel=1e-3)
    assert measured["LC3"]["step_down_blocks"] == [2 * spiking.STEP_DOWN + 2]
    reasons = {key: values.get("reason") for key, values in measured.items()}
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
