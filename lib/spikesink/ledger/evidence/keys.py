"""TODO."""

from spikesink.chain.keys import AttentionReading, Rebuilt, _where_keys_are_seen, factors
from spikesink.chain.lifecycle import Lifecycle, layers_quiet, plateau_layers
from spikesink.chain.sinks import _median
from spikesink.chain.trace import spearman
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.ledger.evidence.sinks import _no_sinks


@_where_keys_are_seen
def sk3_few_dimensions(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """SK3: effective dimension of the spike tokens' keys, and of as many other tokens' keys; before RoPE.

    Median over the plateau's layers and their key heads; `*_rotated` after RoPE, which turns keys by their position and
    so spreads others over more dimensions. Controls: all other tokens; the tokens right after, at nearly the same
    places; and the spike tokens' own keys before the step-up, in layers that read no cycle's plateau.
    """
    layers, quiet = list(plateau_layers(life.main)), layers_quiet(life)
    if (reason := _no_sinks(seen, layers)) is not None:
        return reason
    if life.main.is_spike.sum() < 2:
        return NotApplicable("one key has one dimension; two spike tokens are needed, so measure more windows")
    plain, rotated = (seen.geometry.dimension.get(stage) for stage in ("before", "after"))
    measured = {
        "effective_dimension_sink": _median(plain["spike"][layers]),
        "effective_dimension_other": _median(plain["matched"][layers]),
        "n_tokens": int(life.main.is_spike.sum()),
    }
    if rotated is not None:
        measured["effective_dimension_sink_rotated"] = _median(rotated["spike"][layers])
        measured["effective_dimension_other_rotated"] = _median(rotated["matched"][layers])
    return make_evidence(
        measured,
        control={
            "effective_dimension_all_others": _median(plain["other"][layers]),
            "effective_dimension_next_token": _median(plain["next"][layers]),
            "effective_dimension_sink_without_a_spike": _median(plain["spike"][quiet]),
        },
    )


@_where_keys_are_seen
def sk4_favoured(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """SK4: how far the logit to the spike token's key lies above those to other keys, in sink heads and other heads.

    A head of the plateau's layers is a sink head where the spike tokens' mean score exceeds epsilon. `spearman` is the
    rank correlation over all those heads between gap and score; `spearman_*` that of the score with each factor of the
    logit |q| |k| cos / sqrt(d_head), and with the mean cosine to other keys, the other side of the gap. Attention is a
    function of logits, so some correlation is a matter of course; which factor carries it is not. Control: the same of
    the token right after the spike token.
    """
    geometry, layers = seen.geometry, list(plateau_layers(life.main))
    score, gap, after = (x[layers].flatten() for x in (seen.scores.received["spike"], *geometry.gap.values()))
    sinks = score > seen.scores.epsilon
    if not sinks.any() or sinks.all():
        return NotApplicable(f"{'all' if sinks.any() else 'no'} heads of the plateau sink, so there are not two kinds")
    cosine = {name: of[layers].flatten() for name, of in geometry.cosine.items()}
    score_after = seen.scores.received["next"][layers].flatten()
    return make_evidence(
        measured={
            "logit_gap_sink": float(gap[sinks].mean()),
            "logit_gap_other": float(gap[~sinks].mean()),
            "cosine_sink": float(cosine["spike"][sinks].mean()),
            "cosine_other": float(cosine["spike"][~sinks].mean()),
            "spearman": spearman(gap, score),
            **{f"spearman_{name}": spearman(values, score) for name, values in factors(geometry, layers).items()},
            "key_norm_ratio": _median((geometry.key_norm["spike"] / geometry.key_norm["other"])[layers]),
            "spearman_cosine_other_keys": spearman(cosine["other"], score),
            "n_sink_heads": int(sinks.sum()),
            "n_heads": len(sinks),
        },
        control={
            "logit_gap_sink_next_token": float(after[sinks].mean()),
            "logit_gap_other_next_token": float(after[~sinks].mean()),
            "cosine_sink_next_token": float(cosine["next"][sinks].mean()),
            "cosine_sink_all_other_keys": float(cosine["other"][sinks].mean()),
            "spearman_next_token": spearman(after, score_after),
        },
    )


@measure
def sk6_few_rows(rebuilt: Rebuilt, seen: AttentionReading) -> Evidence | NotApplicable:
    """SK6: cosine of the spike tokens' keys with their rebuilding from the rows of W_K at the spike channels.

    Median over the plateau's layers and key heads. `cosine_with_bias` compares whole keys, where there is a b_K;
    `bias_share` says how much of them that is. Controls: the same rows, of other tokens; as many rows of those tokens'
    own strongest channels; as many rows of the spike tokens' strongest channels that do not spike.
    """
    if (reason := _no_sinks(seen, rebuilt.layers)) is not None:
        return reason
    return make_evidence(
        measured={
            "cosine_reconstructed": _median(rebuilt.spike[-1]),
            "rows": len(rebuilt.channels),
            "cosine_least": float(rebuilt.spike[-1].min()),
            "cosine_one_row": _median(rebuilt.spike[0]),
            "cosine_with_bias": _median(rebuilt.with_bias),
            "bias_share": _median(rebuilt.bias_share),
        },
        control={
            "cosine_other_tokens": _median(rebuilt.other_tokens[-1]),
            "cosine_other_tokens_own_channels": _median(rebuilt.own_channels),
            "cosine_strongest_other_channels": _median(rebuilt.other_channels[-1]),
        },
    )


@_where_keys_are_seen
def sk7_small_values(seen: AttentionReading, life: Lifecycle) -> Evidence | NotApplicable:
    """SK7: norm of the spike tokens' values over that of other tokens', median over the plateau's layers and heads.

    Controls: the token right after the spike token; and the spike token itself before the step-up, in layers that read
    no cycle's plateau.
    """
    norm, layers = seen.geometry.value_norm, list(plateau_layers(life.main))
    if (reason := _no_sinks(seen, layers)) is not None:
        return reason
    spike, after = (norm[name] / norm["other"] for name in ("spike", "next"))
    return make_evidence(
        measured={"value_norm_ratio": _median(spike[layers]), "largest_ratio": float(spike[layers].max())},
        control={
            "value_norm_ratio_next_token": _median(after[layers]),
            "value_norm_ratio_without_a_spike": _median(spike[layers_quiet(life)]),
        },
    )
