"""The whole chain planted in every gated pre-norm family: each measure finds what was put there, and no more."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM

import spikesink
from spikesink import patching
from spikesink.chain import amplifier, collapse, experts, firsttoken, sinks
from spikesink.chain.lifecycle import is_spike
from spikesink.common import NotApplicable
from spikesink.model.anatomy import mlp
from spikesink.model.weights import FFN, weights_of
from tests import in_process, planted

N, LENGTH = 6, 64


@dataclass(frozen=True)
class Grown:
    """A model with a planted chain, and windows that begin with its trigger."""

    family: str
    plant: planted.Plant
    directory: Path
    model: TransformerBridge
    tokens: Tensor
    spikes: Tensor  # where the trigger stands

    @cached_property
    def life(self):
        return spikesink.find_lifecycle(spikesink.trace_windows(self.model, self.tokens))

    @cached_property
    def weights(self):
        return weights_of(self.model)

    @property
    def step_up_blocks(self) -> tuple[int, ...]:
        return tuple(map(mlp, self.plant.step_up_layers))

    @property
    def step_down_blocks(self) -> tuple[int, ...]:
        return tuple(map(mlp, self.plant.step_down_layers))

    def ffn(self, layer: int) -> FFN:
        """The FFN of a layer that was planted in, or its planted expert."""
        if self.weights.anatomy.n_experts:
            return self.weights.experts(layer)[str(self.plant.expert)]
        return self.weights.ffn(layer)

    def normalised_spike(self) -> Tensor:
        """What a norm makes of the planted channels alone, [d_model]: known without running the model."""
        h = torch.zeros(planted.D_MODEL)
        h[[self.plant.channel, self.plant.side_channel]] = self.plant.size * torch.tensor([1, self.plant.side_ratio])
        if self.family == "stablelm":
            h -= h.mean()
        return h * (planted.D_MODEL**0.5 / h.norm())


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(planted.text(N, LENGTH))
    return file


@pytest.fixture(scope="module", params=planted.FAMILIES)
def grown(request, family_directory, text):
    directory = family_directory(request.param)
    model = spikesink.load(directory)
    tokens = spikesink.windows(model, str(text), N, LENGTH)
    spikes = tokens == 1
    assert spikes[:, 0].all()
    assert spikes[:, LENGTH // 8 + 1].sum() == int(spikes.sum()) - N == 2
    return Grown(request.param, planted.FAMILIES[request.param], directory, model, tokens, spikes)


@pytest.fixture(scope="module")
def judged(grown, text):
    return in_process.measure(grown.directory, text, N, LENGTH)


def test_the_life_cycle_is_the_planted_one(grown):
    cycle, plant = grown.life.main, grown.plant
    assert len(grown.life.cycles) == 1
    assert (cycle.step_up, cycle.step_down) == (grown.step_up_blocks, grown.step_down_blocks)
    assert cycle.plateau == (grown.step_up_blocks[-1], grown.step_down_blocks[0] - 1)
    assert cycle.channels == (plant.channel, plant.side_channel)
    assert cycle.value == pytest.approx(plant.size, rel=1e-4)
    assert float(cycle.stream[-1]) == pytest.approx((1 - plant.cancelled) * plant.size, rel=1e-3)
    assert torch.equal(is_spike(grown.life, cycle), grown.spikes)
    written = cycle.writes[[block - 1 for block in cycle.step_up]]
    torch.testing.assert_close(written, torch.full_like(written, plant.size / len(written)), rtol=1e-4, atol=0)


def test_the_stream_is_that_of_transformers_own_run(grown):
    own = AutoModelForCausalLM.from_pretrained(grown.directory, attn_implementation="eager")
    streams = own(grown.tokens, output_hidden_states=True).hidden_states
    held = streams[grown.plant.step_up_layers[-1] + 1][..., grown.plant.channel]
    assert torch.equal(held.abs() > 100, grown.spikes)
    torch.testing.assert_close(held[:, 0], torch.full((N,), grown.plant.size), rtol=1e-4, atol=0)
    # Elsewhere attention moves the trigger a little off s*, which is not what was measured when it was planted.
    assert held[grown.spikes].tolist() == pytest.approx([grown.plant.size] * 8, rel=0.05)


def test_the_form_is_the_planted_direction_and_nothing_else(grown):
    for order, layer in enumerate(grown.plant.step_up_layers):
        ffn, reads = grown.ffn(layer), grown.plant.along() if order == 0 else planted.towards_spike(grown.plant)
        for channel in (grown.plant.channel, grown.plant.side_channel):
            pairs = amplifier.eigenpairs(ffn, channel, 1)
            assert float((pairs.vectors[:, 0].float() @ reads).abs()) > 0.9999
            share = (pairs.values[0] / amplifier.form_norms(ffn, [channel])[0]) ** 2
            assert float(share) == pytest.approx(1, abs=1e-6)


def test_the_census_lists_the_planted_pairs_first(grown):
    steps = (*grown.step_up_blocks, *grown.step_down_blocks)
    meant = {(block, c) for block in steps for c in (grown.plant.channel, grown.plant.side_channel)}
    if grown.weights.anatomy.n_experts:
        top = experts.census_experts(grown.weights).top(len(meant))
        assert {(block, channel) for block, _, channel, _ in top} == meant
        assert {expert for _, expert, _, _ in top} == {str(grown.plant.expert)}
        assert isinstance(amplifier.census(grown.weights), NotApplicable)
    else:
        assert {pair[:2] for pair in amplifier.census(grown.weights).top(len(meant))} == meant


def test_the_probe_finds_the_trigger_and_no_other_token(grown):
    probe = firsttoken.probe(grown.weights, grown.life)
    assert probe.exceptions().tolist() == [1]
    assert float(probe.value[1]) == pytest.approx(abs(grown.plant.size), rel=1e-4)
    assert float(probe.value[probe.tokens != 1].abs().max()) < 1


def test_the_norm_makes_the_known_vector_of_every_spike(grown):
    measured, known = collapse.measure_collapse(grown.model, grown.tokens, grown.life), grown.normalised_spike()
    kept = measured.spike.kept[:, measured.plateau]
    assert float(functional.cosine_similarity(kept, known.expand_as(kept), dim=-1).min()) > 0.9999
    expected = {
        "participation": known.square().sum() ** 2 / known.pow(4).sum(),
        "largest": known.abs().max() / known.norm(),
    }
    for name, value in expected.items():
        plateau = getattr(measured.spike, name)[measured.plateau]
        torch.testing.assert_close(plateau, value.to(plateau).expand(len(plateau)), rtol=1e-3, atol=0)


def test_the_planted_heads_sink_on_every_trigger_and_no_other_head(grown):
    scores = sinks.score(grown.model, grown.tokens, groups={"spike": grown.spikes, "other": ~grown.spikes})
    meant = torch.zeros(planted.N_LAYERS, planted.N_HEADS, dtype=torch.bool)
    meant[tuple(torch.tensor(grown.plant.sinks).T)] = True
    assert torch.equal((scores.at > scores.epsilon), meant.expand(N, -1, -1))
    assert scores.ratio() == pytest.approx(len(grown.plant.sinks) / meant.numel())
    triggers = int(grown.spikes.sum())
    assert torch.equal(scores.sinks_anywhere["spike"], triggers * meant.sum(1))
    assert int(scores.sinks["other"].sum()) == 0


def test_without_the_step_up_there_is_no_sink_and_with_constants_there_is_no_spike(grown):
    without = {
        "step-up": patching.skip(grown.step_up_blocks, grown.spikes),
        "spike": patching.decouple(grown.model, grown.tokens, grown.life),
        "sinks": patching.unsink(grown.model, grown.tokens, grown.life),
    }
    outcomes = patching.compare(grown.model, grown.tokens, without)
    clean, skipped, apart, unsunk = (outcomes[name] for name in ("clean", *without))
    assert clean.sink_ratio == pytest.approx(len(grown.plant.sinks) / 24)
    assert skipped.sink_ratio == unsunk.sink_ratio == 0
    assert torch.equal(apart.score > 0.3, clean.score > 0.3)
    assert max(skipped.max_activation, apart.max_activation) < 0.01 * clean.max_activation
    assert unsunk.max_activation == pytest.approx(clean.max_activation, rel=1e-6)
    assert skipped.perplexity > 2 * clean.perplexity  # the planted heads now speak for what never comes
    assert apart.perplexity == pytest.approx(clean.perplexity, rel=1e-3)


# What cannot hold here, by construction, and why. All other claims hold.
DIFFERS = {
    "AM1": "the other neurons' gates are so small that silu is half the identity, whose cosine is 1 on any token",
    "TK1": "one token spikes, and no other",
    "TK3": "the trigger spikes wherever it stands",
    "NM2": "one of 64 channels is more than 1% of them",
}
NOT_APPLICABLE = {
    "SV1": "what other tokens say is random, and rounding it costs nothing",
    "SV2": "the text is short",
    "SV3": "the text is short",
    "TK4": "no delimiter spikes",
    "X-AM8": "no norm follows the block",
    "X-TK5": "there is one cycle",
    "X-SK8": "there is one cycle",
    "X-SK9": "no other token is a sink",
}
OF_ONE_FFN = {f"AM{i}" for i in range(1, 8)}
OF_EXPERTS = {"X-MX1", "X-MX2"}
# The norm makes one vector of any dose but none, so that between those perplexity moves by rounding; and one token at
# two places is nearly its own mean, in some families so nearly that the claim does not apply.
BY_CHANCE = {"AB7", "AB2"}


def test_every_claim_has_the_verdict_that_was_planted(grown, judged):
    expected = (
        dict.fromkeys(in_process.OF_MODELS, "holds")
        | dict.fromkeys(DIFFERS, "differs")
        | dict.fromkeys(NOT_APPLICABLE, "n/a")
    )
    expected |= dict.fromkeys(OF_ONE_FFN if grown.weights.anatomy.n_experts else OF_EXPERTS, "n/a")
    for claim in BY_CHANCE:
        expected[claim] = judged[claim].verdict
    assert {key: claim.verdict for key, claim in judged.items()} == expected
    assert judged["AB2"].verdict in ("holds", "n/a")


def test_the_ledger_says_how_much(grown, judged):
    measured = {key: claim.measured for key, claim in judged.items()}
    assert measured["LC1"]["share_written"] == pytest.approx(1, rel=1e-3)
    assert measured["LC3"]["share_cancelled"] == pytest.approx(grown.plant.cancelled, rel=1e-3)
    assert measured["LC5"]["jaccard"] == 1  # the third largest channel is the first of s*
    assert measured["LC6"]["ratio"] == pytest.approx(grown.plant.side_ratio, rel=1e-3)
    assert measured["LC7"]["spike_token_share"] == pytest.approx(float(grown.spikes.double().mean()), rel=1e-5)
    assert measured["LC7"]["spike_tokens"] == [planted.TRIGGER]
    assert measured["TK1"]["spiking"] == 1
    assert measured["SK2"]["share_on_spike_tokens"] == 1
    assert measured["AB3"]["sink_ratio_skipped"] == measured["AB5"]["sink_ratio_unsunk"] == 0
    # Of a small dose the step-down takes more than there is: the trigger's own prediction changes, and no other.
    doses = dict(zip(measured["AB7"]["factors"], measured["AB7"]["perplexities_elsewhere"], strict=True))
    some = [perplexity for factor, perplexity in doses.items() if factor > 0]
    assert max(some) < 1.001 * min(some) < 0.8 * doses[0]
    if grown.weights.anatomy.n_experts:
        assert measured["X-MX1"]["expert"] == measured["X-MX2"]["expert"] == str(grown.plant.expert)
        assert measured["X-MX1"]["share_of_spike_tokens"] == 1
        assert measured["X-MX2"]["share_written"] == pytest.approx(1, rel=1e-3)
    else:
        assert measured["AM2"]["gain_rank"] == 1
        assert measured["AM6"]["cosine_spike"] > 0.9
        assert measured["AM6"]["cosine_other"] < 0.1
