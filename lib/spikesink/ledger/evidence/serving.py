"""Evidence for SV1 to SV3: quantization, KV caches and long contexts."""

from spikesink.chain.trace import EPSILONS
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, left_open, make_evidence
from spikesink.patching.cuts import FEW_SINKS, INDIFFERENT, NO_SINK
from spikesink.serving import cache, cells, quantize
from spikesink.serving.cells import Crossed
from spikesink.serving.context import LONG, LONG_BLOCK, POLICIES, RECOMPUTED, Lengths, LongRun, perplexity_interval

LATE_RATIOS = {"sink_ratios": None, **{f"sink_ratios_at_{epsilon:g}": epsilon for epsilon in EPSILONS}}  # None: usual
SHORT_SIGHTED = "no layer sees the first token from the end of the text"
SHORT = f"text and context are too short: fewer than {LONG:,} tokens"


@measure
def sv1_sets_the_scale(crossed: Crossed) -> Evidence:
    """SV1: what int8 per-tensor costs, and what is left with the spike's channels unrounded.

    Nothing is judged where int8 per-tensor costs nothing significant, nor where the interval leaves it open. Controls:
    equally many other channels unrounded; and the model whose spike is removed and whose sinks are held.
    """
    if crossed.reason:
        raise NotApplicable(crossed.reason)
    if quantize.PER_TENSOR not in crossed.with_it:
        raise NotApplicable(quantize.NOT_SHOWN)
    low, high = crossed.interval(quantize.PER_TENSOR)
    if low != low:
        raise NotApplicable("one window alone has no interval")
    over_split = crossed.times(quantize.PER_TENSOR, quantize.APART)
    n, predictions = crossed.plain[cells.UNCHANGED].loss.shape

    def perplexity(technique: str, cell: str = cells.UNCHANGED) -> float:
        return crossed.perplexity(crossed.with_it[technique][cell])

    measured = {
        "perplexity_fp": crossed.perplexity(crossed.plain[cells.UNCHANGED]),
        "perplexity_int8_per_tensor": perplexity(quantize.PER_TENSOR),
        "perplexity_int8_spike_split": perplexity(quantize.APART),
        "perplexity_int8_per_token": perplexity(quantize.PER_TOKEN),
        "interval_per_tensor_over_fp": [low, high],
        "interval_per_tensor_over_split": list(over_split),
        "n_windows": n,
        "length": predictions + 1,
    }
    if low <= 1 + INDIFFERENT:
        measured["reason"] = f"int8 per-tensor costs nothing significant ({low:.2f} to {high:.2f} times)"
    elif left_open("SV1", measured):
        low, high = over_split
        measured["reason"] = f"{low:.2f} to {high:.2f} times that with the spike's channels unrounded leaves it open"
    control = {
        "perplexity_int8_others_split": perplexity(quantize.OTHERS_APART),
        "interval_per_tensor_over_others": list(crossed.times(quantize.PER_TENSOR, quantize.OTHERS_APART)),
        "perplexity_fp_no_spike": crossed.perplexity(crossed.plain[cells.NO_SPIKE]),
        "perplexity_int8_per_tensor_no_spike": perplexity(quantize.PER_TENSOR, cells.NO_SPIKE),
    }
    return make_evidence(measured=measured, control=control)


@measure
def sv2_needs_the_sink(run: LongRun, crossed: Crossed, budget: int) -> Evidence:
    """SV2: one long text through caches of the last tokens alone, and of the last and the first four.

    `short_…` are the techniques of `eviction_techniques`, of so many keys, on short windows: how many times the
    perplexity with every key. Nothing is judged where an interval leaves it open. Controls: four other tokens are kept;
    and the window is recomputed, so that it has a first token: what is lost then is what the forgotten tokens said.
    """
    if run.lengths.lengths[-1] < LONG:
        raise NotApplicable(SHORT)
    if cache.WITH_FIRST not in run.streams:
        raise NotApplicable("first tokens cannot be kept in this model's cache while others go")
    _, *window = run.times(cache.WINDOW)
    _, *with_first = run.times(cache.WITH_FIRST)
    over_shifted = perplexity_interval(run.streams[cache.WITH_FIRST] - run.streams[cache.SHIFTED], LONG_BLOCK)

    def short(**names: str) -> dict[str, float]:
        return {f"short_{key}": crossed.cost(name) for key, name in names.items() if name in crossed.with_it}

    measured = {
        "perplexity_full": float(run.lengths.loss.mean().exp()),
        "perplexity_window": run.perplexity(cache.WINDOW),
        "perplexity_window_with_sink": run.perplexity(cache.WITH_FIRST),
        "interval_window_over_full": window,
        "interval_with_sink_over_full": with_first,
        "perplexity_window_with_sink_shifted": run.perplexity(cache.SHIFTED),
        "interval_with_sink_over_shifted": list(over_shifted),
        "n_tokens": run.lengths.lengths[-1],
        "n_keys": POLICIES[cache.WINDOW].window,
        **short(window=cache.WINDOW, first=cache.WITH_1, first_4=cache.WITH_FIRST, constant=cache.CONSTANT),
        "short_n_tokens": crossed.plain[cells.UNCHANGED].loss.shape[1] + 1,
        "short_n_keys": budget,
    }
    if left_open("SV2", measured):
        measured["reason"] = (
            "{:.2f} to {:.2f} times without the first tokens, {:.2f} to {:.2f} with four of them, leave it open"
        ).format(*window, *with_first)
    _, *with_others = run.times(cache.OTHERS)
    control = {
        "perplexity_window_with_others": run.perplexity(cache.OTHERS),
        "interval_with_others_over_full": with_others,
        "perplexity_run_anew": run.perplexity(RECOMPUTED),
        **short(others=cache.OTHERS, heavy_hitters=cache.HEAVY),
    }
    return make_evidence(measured=measured, control=control)


@measure
def sv3_over_lengths(lengths: Lengths) -> Evidence:
    """SV3: sink ratio and perplexity by length, to the context's limit as far as the text goes; and past it.

    The ratio is of what the queries of each stretch alone give position 0, in the layers that see it from everywhere.
    Controls: the same of another position; and the usual ratio, over all queries so far and all layers, which is slow
    to move.
    """
    n = sum(length <= lengths.limit for length in lengths.lengths)
    if lengths.lengths[n - 1] < LONG:
        raise NotApplicable(SHORT)
    if max(lengths.sink_ratios) <= FEW_SINKS:
        raise NotApplicable(NO_SINK)
    if not lengths.full_sight:
        raise NotApplicable(SHORT_SIGHTED)
    measured = {
        "lengths": list(lengths.lengths[:n]),
        **{name: lengths.late_ratios(epsilon)[:n] for name, epsilon in LATE_RATIOS.items()},
        "perplexities": lengths.perplexities[:n],
        "largest_first": lengths.first,
        "largest_elsewhere": lengths.elsewhere[:n],
        "limit": lengths.limit,
        "n_layers": len(lengths.full_sight),
    }
    if past := list(lengths.lengths[n:]):
        measured |= {"lengths_past": past, "sink_ratios_past": lengths.late_ratios()[n:]}
        measured["perplexities_past"] = lengths.perplexities[n:]
    control = {
        "sink_ratios_other_position": lengths.late_ratios(other=True)[:n],
        "sink_ratios_of_all_queries": lengths.sink_ratios[:n],
    }
    return make_evidence(measured=measured, control=control)
