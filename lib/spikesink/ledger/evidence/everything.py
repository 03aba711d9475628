"""Every claim that can be put to one model, measured in one call: what its notebooks measure, without pictures."""

from jaxtyping import Int
from torch import Tensor

from spikesink.chain import amplifier, collapse, experts, firsttoken, keys
from spikesink.chain.lifecycle import Lifecycle, find_lifecycle
from spikesink.chain.trace import trace_windows
from spikesink.common import NotApplicable
from spikesink.ledger import evidence
from spikesink.ledger.claims import Evidence
from spikesink.model import paths, texts
from spikesink.model.anatomy import Model
from spikesink.model.weights import weights_of
from spikesink.patching import cuts
from spikesink.patching.means import spike_means
from spikesink.serving import cache, cells, quantize
from spikesink.serving.context import LongRun, measure_long

Claims = dict[str, Evidence | NotApplicable]


def measure_all(
    model: Model,
    tokens: Int[Tensor, "n length"],
    seed: int = 0,
    text: str | texts.Text = "house",
    long: LongRun | None = None,
) -> Claims:
    """What every claim of a model (all but TR…) is judged by, or why it cannot be put to this model.

    Cuts and serving are judged as notebooks 08 and 10 do. `text` is what the windows were cut from: its tokens are
    counted. `long` is what SV2 and SV3 are judged by; by default it is measured on `text`.
    """
    life = find_lifecycle(trace_windows(model, tokens, seed))
    return (
        measure_chain(model, tokens, life, seed)
        | _first_token(model, tokens, life, text, seed)
        | _cuts_and_serving(model, life, long or measure_long(model, text), seed)
    )


def measure_chain(model: Model, tokens: Int[Tensor, "n length"], life: Lifecycle, seed: int = 0) -> Claims:
    """What the claims of the chain itself are judged by: a spike's life, the block that writes it, h~, and the sink."""
    lifecycle = {
        "LC1": evidence.lc1_step_up(life),
        "LC2": evidence.lc2_plateau(life),
        "LC3": evidence.lc3_step_down(life),
        "LC4": evidence.lc4_few_channels(life),
        "LC5": evidence.lc5_same_channels(life),
        "LC6": evidence.lc6_fixed_ratios(life),
        "LC7": evidence.lc7_few_tokens(life, model.tokenizer.decode),
    }
    return lifecycle | _amplifier(model, tokens, life) | _norm_and_sinks(model, tokens, life, seed)


def _amplifier(model: Model, tokens: Tensor, life: Lifecycle) -> Claims:
    weights = weights_of(model)
    reading, census = amplifier.read_block(model, tokens, life), amplifier.census(weights)
    routing = experts.route(model, tokens, life)
    return {
        "AM1": evidence.am1_near_identity(reading),
        "AM2": evidence.am2_high_gain(reading, life, census),
        "AM3": evidence.am3_rank_one(reading),
        "AM4": evidence.am4_shared_direction(reading),
        "AM5": evidence.am5_quadratic_form(reading),
        "AM6": evidence.am6_alignment(reading),
        "AM7": evidence.am7_weights_alone(life, census),
        "X-AM8": evidence.x_am8_output_norm(reading),
        "X-MX1": evidence.x_mx1_same_choice(routing),
        "X-MX2": evidence.x_mx2_one_writer(routing),
    }


def _first_token(model: Model, tokens: Tensor, life: Lifecycle, text: str | texts.Text, seed: int) -> Claims:
    probe = firsttoken.probe(weights_of(model), life)
    elsewhere = firsttoken.place_elsewhere(model, tokens, probe, seed=seed)
    smaller = life.cycles[1] if len(life.cycles) > 1 else None
    return {
        "TK1": evidence.tk1_nearly_any(probe, texts.token_counts(model, text), elsewhere),
        "TK2": evidence.tk2_static_map(paths.compare_static_map(model, tokens)),
        "TK3": evidence.tk3_not_elsewhere(elsewhere),
        "TK4": evidence.tk4_delimiters(firsttoken.compare_delimiters(model, tokens, life, life.main)),
        "X-TK5": evidence.tk4_delimiters(firsttoken.compare_delimiters(model, tokens, life, smaller)),
    }


def _norm_and_sinks(model: Model, tokens: Tensor, life: Lifecycle, seed: int) -> Claims:
    weights = weights_of(model)
    collapsed = collapse.measure_collapse(model, tokens, life, seed)
    attention = keys.read_attention(model, tokens, life, collapsed, seed=seed)
    return {
        "NM1": evidence.nm1_bounded(collapsed),
        "NM2": evidence.nm2_sparse(collapsed, weights),
        "NM3": evidence.nm3_constant(collapsed),
        "NM4": evidence.nm4_constant_over_depth(collapsed),
        "NM5": evidence.nm5_implicit_parameter(collapse.replace_input(model, tokens, life, collapsed)),
        "SK1": evidence.sk1_many_heads(attention.scores),
        "SK2": evidence.sk2_on_spikes(attention, life),
        "SK3": evidence.sk3_few_dimensions(attention, life),
        "SK4": evidence.sk4_favoured(attention, life),
        "SK5": evidence.sk5_over_depth(attention, life),
        "SK6": evidence.sk6_few_rows(keys.rebuild_keys(weights, life, collapsed), attention),
        "SK7": evidence.sk7_small_values(attention, life),
        "X-SK8": evidence.x_sk8_smaller_cycle(attention, life),
        "X-SK9": evidence.x_sk9_secondary(attention.secondary),
    }


def _cuts_and_serving(model: Model, life: Lifecycle, long: LongRun, seed: int) -> Claims:
    """On windows that the means are not taken from: shorter ones for cuts and rounding, whole ones for caches."""
    length = life.trace.length
    budget = length // 4
    (held_out, out), (judged, where) = cuts.split_windows(life, length=max(4, budget))
    means = spike_means(model, held_out, life, out)
    broken = cuts.break_chain(model, judged, means, where, seed=seed)

    techniques = quantize.rounding_techniques(model, quantize.measure_ranges(model, held_out, out), where)
    versions = cells.make_cells(means, where)
    rounded = cells.cross(model, judged, versions, techniques, where)
    rounded = quantize.cross_weights(model, judged, versions, rounded)

    _, (whole, spikes) = cuts.split_windows(life, length=length)
    techniques = cache.eviction_techniques(model, budget, spikes, cuts.sink_held(means), seed)
    evicted = cells.cross(model, whole, cells.make_cells(means, spikes), techniques, spikes)
    return {
        "AB1": evidence.ab1_zeroing_breaks(broken),
        "AB2": evidence.ab2_mean_does_not(broken),
        "AB3": evidence.ab3_step_up_makes_the_sink(broken),
        "AB4": evidence.ab4_spike_removed(broken),
        "AB5": evidence.ab5_sink_removed(broken),
        "AB6": evidence.ab6_wrong_places(broken),
        "AB7": evidence.ab7_dose_response(cuts.dose_spike(model, broken)),
        "SV1": evidence.sv1_sets_the_scale(rounded),
        "SV2": evidence.sv2_needs_the_sink(long, evicted, budget),
        "SV3": evidence.sv3_over_lengths(long.lengths),
    }
