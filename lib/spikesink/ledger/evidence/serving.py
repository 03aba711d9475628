"""TODO."""

from spikesink.chain.trace import EPSILONS
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, left_open, make_evidence
from spikesink.patching.cuts import FEW_SINKS, INDIFFERENT, NO_SINK
from spikesink.serving import cache
from spikesink.serving.cells import AS_IT_IS, NO_SPIKE, Crossed
from spikesink.serving.context import LONG_BLOCK, Lengths, interval_of
from spikesink.serving.long import LONG, Long
from spikesink.serving.quantize import APART, OTHERS_APART, PER_TENSOR, PER_TOKEN

LATE_RATIOS = {"sink_ratios": None, **{f"sink_ratios_at_{epsilon:g}": epsilon for epsilon in EPSILONS}}  # None: usual


SHORT_SIGHTED = "no layer sees the first token from the end of the text"


SHORT = f"text and context are too short: fewer than {LONG:,} tokens"


OPEN_SV2 = "{:.2f} to {:.2f} times without the first tokens, {:.2f} to {:.2f} with four of them, leave it open"


@measure
def sv1_sets_the_scale(crossed: Crossed | NotApplicable) -> Evidence | NotApplicable:
    """SV1: what int8 per tensor costs, and what of it is left when the spike's channels are apart.

    Nothing is judged where int8 per tensor costs nothing that is told from none, nor where the interval leaves open
    whether the spike's channels are what it costs. Controls: as many other channels apart, those in which other tokens
    have most; and the model whose spike is removed and whose sinks are held.
    """
    if crossed.reason:
        return NotApplicable(crossed.reason)
    if len(crossed.nats(PER_TENSOR)) < 2:
        return NotApplicable("one window alone has no interval")
    low, high = crossed.interval(PER_TENSOR)
    over = crossed.times(PER_TENSOR, APART)
    n, length = crossed.plain[AS_IT_IS].loss.shape

    def perplexity(technique: str, cell: str = AS_IT_IS) -> float:
        return crossed.perplexity(crossed.with_it[technique][cell])

    measured = {
        "perplexity_fp": crossed.perplexity(crossed.plain[AS_IT_IS]),
        "perplexity_int8_per_tensor": perplexity(PER_TENSOR),
        "perplexity_int8_spike_split": perplexity(APART),
        "perplexity_int8_per_token": perplexity(PER_TOKEN),
        "interval_per_tensor_over_fp": [low, high],
        "interval_per_tensor_over_split": list(over),
        "n_windows": n,
        "length": length + 1,
    }
    if low <= 1 + INDIFFERENT:
        measured["reason"] = f"int8 per tensor costs nothing that is told from none ({low:.2f} to {high:.2f} times)"
    elif left_open("SV1", measured):
        measured["reason"] = "{:.2f} to {:.2f} times that with the spike's channels apart leaves it open".format(*over)
    return make_evidence(
        measured=measured,
        control={
            "perplexity_int8_others_split": perplexity(OTHERS_APART),
            "interval_per_tensor_over_others": list(crossed.times(PER_TENSOR, OTHERS_APART)),
            "perplexity_fp_no_spike": crossed.perplexity(crossed.plain[NO_SPIKE]),
            "perplexity_int8_per_tensor_no_spike": perplexity(PER_TENSOR, NO_SPIKE),
        },
    )


@measure
def sv2_needs_the_sink(long: Long, crossed: Crossed | NotApplicable, budget: int) -> Evidence | NotApplicable:
    """SV2: one long text through caches of the last tokens alone, and of the last and the first four.

    `short_…` are the techniques of `cache.evictions`, with their own budget, on short windows: how many times the
    perplexity with every key. Nothing is judged where an interval leaves it open. Controls: four other tokens are kept;
    and the last tokens are run anew, so that there is a first token among them, and nothing to keep: what is lost then
    is what the others said.
    """
    if long.lengths.lengths[-1] < LONG:
        return NotApplicable(SHORT)
    window, with_first, others = (long.streams[name] for name in (cache.WINDOW, cache.WITH_FIRST, cache.OTHERS))
    without, kept, instead = (long.times(of.loss)[1:] for of in (window, with_first, others))

    def short(**names: str) -> dict[str, float]:
        return {f"short_{key}": crossed.cost(name) for key, name in names.items() if name in crossed.with_it}

    measured = {
        "perplexity_full": float(long.lengths.loss.mean().exp()),
        "perplexity_window": window.perplexity(),
        "perplexity_window_with_sink": with_first.perplexity(),
        "interval_window_over_full": list(without),
        "interval_with_sink_over_full": list(kept),
        "perplexity_window_with_sink_shifted": long.streams[cache.SHIFTED].perplexity(),
        "interval_with_sink_over_shifted": list(
            interval_of(with_first.loss - long.streams[cache.SHIFTED].loss, LONG_BLOCK)
        ),
        "n_tokens": long.lengths.lengths[-1],
        "n_keys": window.policy.window,
        **short(window=cache.WINDOW, first=cache.named(1), first_4=cache.WITH_FIRST, constant=cache.CONSTANT),
        "short_n_tokens": crossed.plain[AS_IT_IS].loss.shape[1] + 1,
        "short_n_keys": budget,
    }
    if left_open("SV2", measured):
        measured["reason"] = OPEN_SV2.format(*without, *kept)
    return make_evidence(
        measured=measured,
        control={
            "perplexity_window_with_others": others.perplexity(),
            "interval_with_others_over_full": list(instead),
            "perplexity_run_anew": float(long.afresh.mean().exp()),
            **short(others=cache.OTHERS, heavy_hitters=cache.HEAVY),
        },
    )


@measure
def sv3_over_lengths(found: Lengths | NotApplicable) -> Evidence | NotApplicable:
    """SV3: sink ratio and perplexity by length, to the context's limit as far as the text goes; and past it.

    The ratio is of what the queries of each stretch alone give position 0, in the layers that see it from everywhere.
    Controls: the same of another position; and the ratio over all queries so far and all layers, which is the usual one
    and slow to move.
    """
    within = [i for i, length in enumerate(found.lengths) if length <= found.limit]
    if found.lengths[within[-1]] < LONG:
        return NotApplicable(SHORT)
    if max(found.sink_ratios) <= FEW_SINKS:
        return NotApplicable(NO_SINK)
    if not found.throughout:
        return NotApplicable(SHORT_SIGHTED)
    past, late = range(len(within), len(found.lengths)), found.late_ratios()
    ratios = {name: [found.late_ratios(epsilon=at)[i] for i in within] for name, at in LATE_RATIOS.items()}
    beyond = {
        "lengths_past": [found.lengths[i] for i in past],
        "sink_ratios_past": [late[i] for i in past],
        "perplexities_past": [found.perplexities[i] for i in past],
    }
    return make_evidence(
        measured={
            "lengths": [found.lengths[i] for i in within],
            **ratios,
            "perplexities": [found.perplexities[i] for i in within],
            "largest_first": found.first,
            "largest_elsewhere": [found.elsewhere[i] for i in within],
            "limit": found.limit,
            "n_layers": len(found.throughout),
            **(beyond if past else {}),
        },
        control={
            "sink_ratios_other_position": [found.late_ratios(found.other)[i] for i in within],
            "sink_ratios_of_all_queries": [found.sink_ratios[i] for i in within],
        },
    )
