"""What queries, keys and values say to claims SK3, SK4, SK6 and SK7: why a token is a sink."""

from collections.abc import Sequence

from spikesink.chain.keys import AttentionReading, Rebuilt, with_geometry
from spikesink.chain.lifecycle import Lifecycle, layers_quiet
from spikesink.chain.sinks import median_of_heads as median
from spikesink.chain.trace import spearman
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence


@measure
def sk3_few_dimensions(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """SK3: effective dimension of the spike tokens' keys, and of as many other tokens' keys; before RoPE.

    Median over the plateau's layers and their key heads; `*_rotated` after RoPE, which turns keys by their position and
    so spreads others over more dimensions. `*_without_a_spike`: before the step-up, where no cycle is on its plateau.
    """
    geometry, layers = with_geometry(attention, life)
    _require_sinks(attention, layers)
    n = int(life.main.is_spike.sum())
    if n < 2:
        raise NotApplicable("one key has one dimension; two spike tokens are needed, so measure more windows")
    dimension = geometry.dimension["before"]
    measured = {
        "effective_dimension_sink": median(dimension["spike"][layers]),
        "effective_dimension_other": median(dimension["matched"][layers]),
        "n_tokens": n,
    }
    if rotated := geometry.dimension.get("after"):
        measured["effective_dimension_sink_rotated"] = median(rotated["spike"][layers])
        measured["effective_dimension_other_rotated"] = median(rotated["matched"][layers])
    return make_evidence(
        measured,
        control={
            "effective_dimension_all_others": median(dimension["other"][layers]),
            "effective_dimension_next_token": median(dimension["next"][layers]),
            "effective_dimension_sink_without_a_spike": median(dimension["spike"][layers_quiet(life)]),
        },
    )


@measure
def sk4_favoured(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """SK4: how far the logit to the spike token's key lies above those to other keys, in sink heads and other heads.

    A head of the plateau's layers is a sink head where the spike tokens' mean score exceeds epsilon. `spearman` is the
    rank correlation over all those heads between gap and score; `spearman_*` that of the score with each factor of the
    logit |q| |k| cos / sqrt(d_head), and with the mean cosine to other keys. Attention is a function of logits, so some
    correlation is a matter of course; which factor carries it is not.
    """
    geometry, layers = with_geometry(attention, life)
    score, score_after = (attention.scores.received[name][layers].flatten() for name in ("spike", "next"))
    gap, gap_after = (geometry.gap[name][layers].flatten() for name in ("spike", "next"))
    cosine = {name: values[layers].flatten() for name, values in geometry.cosine.items()}
    sinks = score > attention.scores.epsilon
    if not sinks.any() or sinks.all():
        raise NotApplicable(f"{'all' if sinks.any() else 'no'} heads of the plateau sink, so there are not two kinds")
    return make_evidence(
        measured={
            "logit_gap_sink": float(gap[sinks].mean()),
            "logit_gap_other": float(gap[~sinks].mean()),
            "cosine_sink": float(cosine["spike"][sinks].mean()),
            "cosine_other": float(cosine["spike"][~sinks].mean()),
            "spearman": spearman(gap, score),
            **{f"spearman_{name}": spearman(values, score) for name, values in geometry.factors(layers).items()},
            "key_norm_ratio": median((geometry.key_norm["spike"] / geometry.key_norm["other"])[layers]),
            "spearman_cosine_other_keys": spearman(cosine["other"], score),
            "n_sink_heads": int(sinks.sum()),
            "n_heads": len(sinks),
        },
        control={
            "logit_gap_sink_next_token": float(gap_after[sinks].mean()),
            "logit_gap_other_next_token": float(gap_after[~sinks].mean()),
            "cosine_sink_next_token": float(cosine["next"][sinks].mean()),
            "cosine_sink_all_other_keys": float(cosine["other"][sinks].mean()),
            "spearman_next_token": spearman(gap_after, score_after),
        },
    )


@measure
def sk6_few_rows(rebuilt: Rebuilt, attention: AttentionReading) -> Evidence:
    """SK6: cosine of the spike tokens' keys with their rebuilding from the rows of W_K at the spike channels.

    Median over the plateau's layers and key heads. `cosine_with_bias` compares whole keys, where there is a b_K;
    `bias_share` says how much of them that is.
    """
    _require_sinks(attention, rebuilt.layers)
    return make_evidence(
        measured={
            "cosine_reconstructed": median(rebuilt.spike[-1]),
            "rows": len(rebuilt.channels),
            "cosine_least": float(rebuilt.spike[-1].min()),
            "cosine_one_row": median(rebuilt.spike[0]),
            "cosine_with_bias": median(rebuilt.with_bias),
            "bias_share": median(rebuilt.bias_share),
        },
        control={
            "cosine_other_tokens": median(rebuilt.other_tokens[-1]),
            "cosine_other_tokens_own_channels": median(rebuilt.own_channels),
            "cosine_strongest_other_channels": median(rebuilt.other_channels[-1]),
        },
    )


@measure
def sk7_small_values(attention: AttentionReading, life: Lifecycle) -> Evidence:
    """SK7: norm of the spike tokens' values over that of other tokens', median over the plateau's layers and heads."""
    geometry, layers = with_geometry(attention, life)
    _require_sinks(attention, layers)
    spike, after = (geometry.value_norm[name] / geometry.value_norm["other"] for name in ("spike", "next"))
    return make_evidence(
        measured={"value_norm_ratio": median(spike[layers]), "largest_ratio": float(spike[layers].max())},
        control={
            "value_norm_ratio_next_token": median(after[layers]),
            "value_norm_ratio_without_a_spike": median(spike[layers_quiet(life)]),
        },
    )


def _require_sinks(attention: AttentionReading, layers: Sequence[int]) -> None:
    """Raise NotApplicable where no head's mean score of the spike tokens exceeds epsilon in these layers."""
    if not (attention.scores.received["spike"][list(layers)] > attention.scores.epsilon).any():
        raise NotApplicable("no head of the plateau sinks on the spike tokens")
