"""A text as long as a model's context and longer, run once: what takes minutes is kept, and read where it is known.

What is kept is of one model, one text and one way to measure; of any other, it is measured anew.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import progress, write_atomically, writing_to
from spikesink.model import texts
from spikesink.model.anatomy import anatomy
from spikesink.serving.cache import (
    OTHERS,
    SHIFTED,
    WINDOW,
    WITH_FIRST,
    Policy,
    Streamed,
    cannot,
    first,
    losses_of,
    stream,
)
from spikesink.serving.context import LONG_BLOCK, MOST, Lengths, interval_of, lengthen, reach

FILE = "10-long.safetensors"
MEASURES = "2"  # of what a file holds, to be raised when that changes; one of other measures is not read
ANEW = "the last ones, run anew"
BUDGET = 256  # keys that the bounded caches hold
LONG = 4 * BUDGET  # tokens that make a text long
POLICIES = {
    WINDOW: Policy(BUDGET),
    WITH_FIRST: first(4, BUDGET),
    SHIFTED: first(4, BUDGET, shifted=True),
    OTHERS: Policy(BUDGET - 4, (97, 98, 99, 100)),
}


@dataclass(frozen=True)
class Long:
    """One long text through a cache that keeps everything, and through some that do not."""

    lengths: Lengths
    streams: Mapping[str, Streamed]
    afresh: Float[Tensor, "window position"]  # loss where the last tokens are run anew and nothing else is known

    def times(self, loss: Float[Tensor, "window position"]) -> tuple[float, float, float]:
        """How many times the perplexity with every token it is, and its interval over pieces of the text."""
        more = loss - self.lengths.loss
        return float(more.mean().exp()), *interval_of(more, LONG_BLOCK)


def measure(model: TransformerBridge, source: str | texts.Text = "house", most: float = MOST) -> Long:
    """Run a text as `reach` cuts it. Takes and raises what `reach`, `lengthen` and `stream` do."""
    tokens, lengths = reach(model, source, most)
    policies = POLICIES if cannot(anatomy(model)) is None else {}
    streams = {name: stream(model, tokens, policy, chunk=BUDGET) for name, policy in policies.items()}
    return Long(lengthen(model, tokens, lengths), streams, run_afresh(model, tokens))


@torch.inference_mode()
def run_afresh(
    model: TransformerBridge, tokens: Int[Tensor, "window position"], budget: int = BUDGET
) -> Float[Tensor, "window position"]:
    """Losses where each token is predicted from a run of at least 3/4 of `budget` tokens before it and of nothing else:
    what so few tokens tell a model, whichever keys a cache would have kept. A run begins as `texts.windows` do.
    """
    new, losses, bos = budget // 4, [], torch.tensor([texts.bos(model)], dtype=torch.long)
    for start in progress(range(0, tokens.shape[1] - 1, new), "the last tokens run anew", "chunk"):
        end = min(start + new, tokens.shape[1] - 1)
        part = tokens[:, max(0, end - budget) : end]
        if end > budget:  # they begin in the middle of the text: BOS takes the place of the first
            part = torch.cat([bos.expand(len(part), -1), part[:, bos.shape[1] :]], 1)
        logits = model(part.to(model.cfg.device))[:, start - end :]
        losses.append(losses_of(logits, tokens[:, start + 1 : end + 1]))
    return torch.cat(losses, 1)


def recorded(
    model: TransformerBridge, source: str, folder: Path, also: Iterable[Path] = (), most: float = MOST
) -> Long:
    """What is known of this model and text, out of a folder or out of others; else it is measured, and kept there.

    Args:
        model: as `load` returns it.
        source: a text, as `texts.windows` takes it.
        folder: where it is kept, such as `figures/<model>/`.
        also: other folders that may have it.
        most: as `reach` takes it.
    """
    text = texts.read(source)
    key = {
        "model": model.source.sha256,
        "dtype": str(model.cfg.dtype),
        "text": text.sha256,
        "most": f"{most:g}",
        "measures": MEASURES,
        "policies": json.dumps({name: repr(policy) for name, policy in POLICIES.items()}),
    }
    for place in (folder, *also):
        if (found := _read(place / FILE, key)) is not None:
            return found
    made = measure(model, text, most)
    tensors = {name: getattr(made.lengths, name).contiguous() for name in ("score", "late", "other", "loss", "largest")}
    tensors["afresh"] = made.afresh
    tensors |= {f"stream {name}": of.loss.contiguous() for name, of in made.streams.items()}
    numbers = {name: getattr(made.lengths, name) for name in ("lengths", "limit", "epsilon", "sight", "seconds")}
    held = {name: of.most_held for name, of in made.streams.items()}
    with writing_to(folder):
        data = save(tensors, {**key, "numbers": json.dumps(numbers), "held": json.dumps(held)})
        write_atomically(folder / FILE, data)
    return made


def _read(path: Path, key: Mapping[str, str]) -> Long | None:
    """What a file holds, if it is of this key; a damaged one is as good as none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            about = file.metadata()
            if any(about.get(name) != value for name, value in key.items()):
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError:
        return None
    numbers, held = json.loads(about["numbers"]), json.loads(about["held"])
    numbers |= {name: tuple(numbers[name]) for name in ("lengths", "sight")}
    streams = {name: Streamed(POLICIES[name], tensors.pop(f"stream {name}"), most) for name, most in held.items()}
    return Long(afresh=tensors.pop("afresh"), streams=streams, lengths=Lengths(**numbers, **tensors))
