"""What a model of the lab is like: what its records hold beside loss, sink ratio and largest activations."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from spikesink.chain.trace import EPSILON, EPSILONS
from spikesink.lab.config import BOS, LENGTH
from spikesink.lab.data import Backcopy, Task, held_out
from spikesink.lab.model import Decoder
from spikesink.patching.outcome import evaluate

WINDOWS = 64  # held-out windows that are looked at


@torch.inference_mode()
def stream_median(model: Decoder, tokens: Int[Tensor, "window position"]) -> float:
    """The median size of the stream's entries, at the layer where it is largest."""
    names = list(model.anatomy.layer_hooks)
    _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names)
    return max(float(cache[name].abs().median()) for name in names)


@torch.inference_mode()
def backcopy_truth(model: Decoder, task: Backcopy, windows: int = WINDOWS) -> dict[str, Any]:
    """Of Bigram-Backcopy, what is known beforehand: the least losses there are, and when a head has nothing to do.

    `copy_loss` is the mean loss of what is copied, at best 0; `excess` that of all else, above the bigram's entropy;
    `heads`, for each layer and head, the attention to position 0 [of queries that are triggers, of all others];
    `attention_trigger`, `attention_other`: those two of the head whose other queries attend to position 0 most.
    """
    tokens = held_out(task, windows, bos=model.config.bos)
    trigger = torch.from_numpy(task.is_trigger(tokens.numpy()))
    bigram = torch.from_numpy(task.bigram)
    least = -bigram.xlogy(bigram).sum(-1)[tokens][:, 1:-1]
    names = list(model.anatomy.pattern_hooks)
    logits, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names)
    loss = functional.cross_entropy(logits[:, 1:-1].transpose(1, 2).cpu(), tokens[:, 2:], reduction="none")
    copies, later = trigger[:, 1:-1], slice(2, None)  # the first queries have little else to look at
    to_first = torch.stack([cache[name][..., later, 0].cpu().transpose(0, 1) for name in names])
    # to_first: layer, head, window, query
    heads = torch.stack([to_first[..., at].mean(-1) for at in (trigger[:, later], ~trigger[:, later])], -1)
    dormant = heads.flatten(0, 1)[heads[..., 1].argmax()]
    return {
        "copy_loss": float(loss[copies].mean()),
        "excess": float((loss - least)[~copies].mean()),
        "attention_trigger": float(dormant[0]),
        "attention_other": float(dormant[1]),
        "heads": heads.tolist(),
    }


def measure_trained(model: Decoder, task: Task, windows: int) -> dict[str, Any]:
    """What is asked of a trained model only.

    `scores` and `sinks`: for each layer and head the mean sink score of position 0, and the share of windows in which
    it is a sink; `sink_ratios`: by other epsilons; `late`: `measure_late`, if it was trained on windows that long;
    `other_first`: sink ratio, mean score and position 0's largest activation with another first token.
    """
    bos = model.config.bos
    tokens = held_out(task, windows, bos=bos)
    score = evaluate(model, tokens).score
    measured = {
        "scores": score.mean(0).tolist(),
        "sinks": (score > EPSILON).float().mean(0).tolist(),
        "sink_ratios": {f"{epsilon:g}": float((score > epsilon).float().mean()) for epsilon in EPSILONS},
    }
    if model.anatomy.context >= 2 * LENGTH:
        measured["late"] = measure_late(model, held_out(task, windows, 2 * LENGTH, bos))
    if bos:
        drawn = torch.Generator().manual_seed(0)
        tokens[:, 0] = torch.randint(BOS + 1, model.config.d_vocab, (len(tokens),), generator=drawn)
        other = evaluate(model, tokens)
        measured["other_first"] = {
            "sink_ratio": other.sink_ratio,
            "attention": float(other.score.mean()),
            "max_first": float(other.largest[:, 0].median()),
        }
    return measured


@torch.inference_mode()
def measure_late(model: Decoder, tokens: Int[Tensor, "window position"], epsilon: float = EPSILON) -> dict[str, float]:
    """Loss, sink ratio and mean sink score as the second half of each window has them: of its queries alone.

    So models can be compared that were not trained to predict anything in the first half.
    """
    half, names = tokens.shape[1] // 2, list(model.anatomy.pattern_hooks)
    scores, losses = [], []
    for piece in tokens.to(model.cfg.device).split(WINDOWS):
        logits, cache = model.run_with_cache(piece, names_filter=names)
        predictions, targets = logits[:, half - 1 : -1].flatten(0, 1), piece[:, half:].flatten()
        losses.append(functional.cross_entropy(predictions, targets, reduction="none"))
        scores += [cache[name][..., half:, 0].mean(-1) for name in names]
    score = torch.cat(scores)
    return {
        "loss": float(torch.cat(losses).mean()),
        "sink_ratio": float((score > epsilon).float().mean()),
        "attention": float(score.mean()),
    }


@torch.inference_mode()
def read_gates(model: Decoder, tokens: Int[Tensor, "window position"]) -> list[Float[Tensor, "window position head"]]:
    """What the gates of each layer let through, the mean over a head's channels; nothing of a model without gates."""
    names = [f"blocks.{layer}.attn.gate.hook_gate" for layer in range(model.anatomy.n_layers)]
    _, cache = model.run_with_cache(tokens.to(model.cfg.device), names_filter=names)
    # A static gate is the same for all tokens, and one per token for all heads.
    return [cache[name].mean(-1).expand(*tokens.shape, -1).cpu() for name in names if name in cache]


def tabulate_gates(models: Mapping[str, Decoder], tokens: Int[Tensor, "window position"]) -> pd.DataFrame:
    """By layer of models of as many layers, what each head gives position 0, and what its gate lets through.

    The median over all tokens but the first, with the 5% and the 95% quantile.
    """
    columns = {}
    for name, model in models.items():
        scores = evaluate(model, tokens).score.mean(0)  # layer, head
        columns[f"{name}: attention"] = [", ".join(f"{score:.2f}" for score in heads) for heads in scores.tolist()]
        if gates := read_gates(model, tokens):
            ends = [gate[:, 1:].flatten(0, 1).quantile(torch.tensor([0.5, 0.05, 0.95]), dim=0).T for gate in gates]
            form = "{:.2f} ({:.2f} to {:.2f})".format
            columns[f"{name}: gate"] = [", ".join(form(*head) for head in heads.tolist()) for heads in ends]
    return pd.DataFrame(columns).rename_axis("layer")


def tabulate_idle(models: Mapping[str, Decoder], task: Backcopy) -> pd.DataFrame:
    """`tabulate_gates` of Bigram-Backcopy: medians of queries with nothing to copy, and in brackets of triggers."""
    columns = {}
    for name, model in models.items():
        heads = backcopy_truth(model, task)["heads"]  # layer, head, [triggers, others]
        columns[f"{name}: attention"] = [_paired((idle, trigger) for trigger, idle in layer) for layer in heads]
        tokens = held_out(task, WINDOWS, bos=model.config.bos)
        trigger = torch.from_numpy(task.is_trigger(tokens.numpy()))[:, 2:]
        if gates := read_gates(model, tokens):
            medians = [[gate[:, 2:][at].median(0).values.tolist() for at in (~trigger, trigger)] for gate in gates]
            columns[f"{name}: gate"] = [_paired(zip(*layer, strict=True)) for layer in medians]
    return pd.DataFrame(columns).rename_axis("layer")


def _paired(pairs) -> str:
    return ", ".join(f"{one:.2f} ({other:.2f})" for one, other in pairs)
