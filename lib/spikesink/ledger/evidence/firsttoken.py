"""TODO."""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.firsttoken import Probe, _attend, after_text, is_delimiter, looking, prefixes
from spikesink.chain.lifecycle import Cycle, Lifecycle, check_model, check_windows, is_spike
from spikesink.common import NotApplicable, measure
from spikesink.ledger.claims import Evidence, make_evidence
from spikesink.model.anatomy import check_tokens, not_finite, run_layers
from spikesink.model.weights import Weights, require_linear_attention


def tk1_nearly_any(
    found: Probe | NotApplicable,
    counts: Int[Tensor, " vocabulary"],
    elsewhere: Evidence | NotApplicable,
) -> Evidence | NotApplicable:
    """TK1: how much of the vocabulary spikes at position 0.

    A share of the vocabulary is no share of text, so it is also given with every token counted as often as it occurs.
    Controls: of a sample of those that spike, the share that does so after a text; and the share of the vocabulary that
    is above the threshold just before the first step-up block (a check that it is that block's doing).

    Args:
        found: of the whole vocabulary.
        counts: how often each token occurs in the text.
        elsewhere: as `not_elsewhere` returns it.
    """
    if isinstance(found, NotApplicable):
        return found
    spiking, control = found.spiking, {"share_before_step_up": float((found.before >= found.threshold).double().mean())}
    if isinstance(elsewhere, Evidence):
        control["share_after_a_text"] = elsewhere.measured["share_elsewhere"]
    return Evidence(
        measured={
            "spiking": int(spiking.sum()),
            "vocabulary": len(spiking),
            "share": float(spiking.double().mean()),
            "threshold": found.threshold,
            "share_of_text": float((counts[found.tokens] * spiking).sum() / counts[found.tokens].sum().clamp(min=1)),
            "median_value": float(found.value.median()),
        },
        control=control,
    )


@torch.inference_mode()
@measure
def tk2_static_map(
    model: TransformerBridge, weights: Weights, tokens: Int[Tensor, "n length"], length: int = 16
) -> Evidence | NotApplicable:
    """TK2: attention's write at position 0 against W_O W_V h~ and the biases, in every layer of every window.

    The error is the largest difference over the write's largest entry. Control: the same map at later positions
    (median error), where a token has others to look at.

    Args:
        model: as `load` returns it.
        weights: its weights (`weights_of`).
        tokens: windows, of which the first `length` positions are run.

    Returns:
        The evidence; or why there is none: in bfloat16 and float16 rounding alone is larger than the tolerance.

    Raises:
        ValueError: `tokens` is not two-dimensional or empty, or a token is not in the model's vocabulary.
        FloatingPointError: a weight or an activation is not finite.
    """
    about = weights.anatomy
    check_tokens(model, tokens)
    require_linear_attention(about)
    if model.cfg.dtype != torch.float32:
        raise NotApplicable(f"the model runs in {model.cfg.dtype}, whose rounding hides the difference; use float32")
    seen: dict[str, Tensor] = {}
    names = (*about.layer_hooks[:-1], *about.write_hooks[::2])
    with model.hooks(fwd_hooks=[(n, lambda v, hook: seen.update({hook.name: v.float().cpu()})) for n in names]):
        run_layers(model, tokens[:, :length])
    if not all(values.isfinite().all() for values in seen.values()):
        raise FloatingPointError(not_finite(model, "the residual stream or what attention adds to it"))
    at_first, later = [], []
    for layer in range(about.n_layers):
        entered, wrote = seen[about.layer_hooks[layer]], seen[about.write_hooks[2 * layer]]
        mapped = torch.zeros_like(entered)
        _attend(weights, layer, torch.float32, "cpu")(entered.flatten(0, 1), mapped.view(-1, about.d_model))
        error = (mapped - wrote).abs().amax(-1) / wrote.abs().amax(-1)  # window, position
        at_first.append(error[:, 0].max())
        later.append(error[:, 1:])
    return Evidence(
        measured={"max_relative_error": float(max(at_first)), "layers": about.n_layers, "windows": len(tokens)},
        control={"median_relative_error_later_positions": float(torch.stack(later).median())},
    )


def tk3_not_elsewhere(
    model: TransformerBridge,
    weights: Weights,
    found: Probe | NotApplicable,
    windows: Int[Tensor, "n length"],
    n: int = 128,
    seed: int = 0,
    positions: Sequence[int] = (1, 2, 4, 8, 16, 32),
) -> Evidence | NotApplicable:
    """TK3: of tokens that spike at position 0, drawn at random, how many spike later, after a text.

    Special tokens (a document's beginning or end) are few, and a draw misses them; those that spike at position 0 are
    tried apart, and named where they spike in more than half of the windows.
    Control: the same tokens at position 0, by the same whole forward passes.

    Args:
        model, weights: a model and its weights.
        found: as `probe` returns it.
        windows: text to put them after.
        n, seed: how many tokens are drawn, and how.
        positions: places to put them in (counted from 0, so as many tokens of text stand before).
    """
    if isinstance(found, NotApplicable):
        return found
    spiking = found.tokens[found.spiking]
    if not len(spiking):
        return NotApplicable("no entry of the vocabulary spikes at position 0, so there is none to put elsewhere")
    drawn = spiking[torch.randperm(len(spiking), generator=torch.Generator().manual_seed(seed))[:n]]

    def share(position: int, tokens: Int[Tensor, " token"] = drawn) -> float:
        before = prefixes(windows, len(tokens), position)
        stream = after_text(model, weights.anatomy, tokens, before, found.block)
        return float((found.sign * stream[:, found.channel] >= found.threshold).double().mean())

    later = {p: share(p) for p in positions if p < windows.shape[1]}
    furthest = max(later)
    special = [t for t in sorted(set(model.tokenizer.all_special_ids)) if t in set(spiking.tolist())]
    anywhere = [t for t in special if share(furthest, torch.tensor([t] * len(windows))) > 0.5]
    return Evidence(
        measured={
            "share_elsewhere": sum(later.values()) / len(later),
            "share_by_position": [[p, value] for p, value in later.items()],
            "n_tokens": len(drawn),
            "special_tokens": len(special),
            "special_tokens_that_spike_anywhere": [model.tokenizer.decode([t]) for t in anywhere],
        },
        control={"share_at_position_0": share(0)},
    )


def tk4_delimiters(
    model: TransformerBridge,
    weights: Weights,
    tokens: Int[Tensor, "n length"],
    life: Lifecycle,
    cycle: Cycle | None,
) -> Evidence | NotApplicable:
    """TK4: delimiters that spike in the text: do they attend to themselves, and do their embeddings lie near the scale?

    Compared are, over the layers up to the cycle's first step-up block (after it, a token that spikes may attend to
    itself because it does), the attention to itself of each spiking delimiter with that of tokens that do not spike,
    are no delimiters, and stand at the same positions of the windows; and the cosine of the embedding with the first
    attention norm's scale, mean over occurrences, so that frequent tokens count as such. A token that has only copies
    of itself before it is left out: it computes what position 0 does. Controls: delimiters that do not spike, and words
    that do. `n_types` says how many different tokens a verdict rests on.

    Args:
        model, weights: a model and its weights.
        tokens: the windows that `life` was found in.
        life: as `find_lifecycle` returns it.
        cycle: whose spikes to look at: `life.main`, or a smaller one; None where there is no such cycle.

    Raises:
        ValueError: `life` was found in other windows or in another model.
    """
    about = weights.anatomy
    check_model(model, life)
    check_windows(life, tokens)
    if cycle is None:
        return NotApplicable(life.reason if life.main is None else "there is no smaller cycle")
    if not cycle.step_up:
        return NotApplicable("no block is step-up, so there is no place before which to look")
    if about.attention_norm is None:
        return NotApplicable("no norm stands before the first attention, so there is no scale to lie near")
    seen = looking(model, about, tokens, cycle.step_up[0], cycle.channel)
    kind = {t: is_delimiter(model.tokenizer.decode([t])) for t in tokens.unique().tolist()}
    delimiter = torch.tensor([[kind[t] for t in window] for window in tokens.tolist()])
    spiking = is_spike(life, cycle)
    elsewhere = ~seen.copies
    ours, words = spiking & delimiter & elsewhere, spiking & ~delimiter & elsewhere
    quiet, others = ~spiking & delimiter & elsewhere, ~spiking & ~delimiter & elsewhere
    if not ours.any():
        return NotApplicable("no delimiter spikes, except where it has nothing but copies of itself before it")
    scale = weights.norm_scale(0)

    def to_scale(which: Bool[Tensor, "window position"]) -> float:
        types, counts = tokens[which].unique(return_counts=True)
        if not len(types):
            return math.nan
        cosine = functional.cosine_similarity(weights.embed(types), scale[None], dim=-1)
        return float((cosine * counts).sum() / counts.sum())

    compared = {
        "self_attention_delimiters": seen.own_of(ours, ours),
        "self_attention_other": seen.own_of(others, ours),
        "scale_cosine_delimiters": to_scale(ours),
        "scale_cosine_other": to_scale(others),
    }
    if not all(math.isfinite(value) for value in compared.values()):
        return NotApplicable("no word that does not spike stands where the spiking delimiters do")
    return make_evidence(
        measured={
            **compared,
            "n_spiking_delimiters": int(ours.sum()),
            "n_types": len(tokens[ours].unique()),
            "n_spiking_words": int(words.sum()),
            "channel": cycle.channel,
            "step_up_blocks": list(cycle.step_up),
        },
        control={
            "n_quiet_delimiters": int(quiet.sum()),
            "self_attention_quiet_delimiters": seen.own_of(quiet, ours),
            "scale_cosine_quiet_delimiters": to_scale(quiet),
            "self_attention_spiking_words": seen.own_of(words, words),
            "self_attention_other_where_words_spike": seen.own_of(others, words),
            "scale_cosine_spiking_words": to_scale(words),
        },
    )
