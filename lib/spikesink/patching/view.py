"""One prompt, as it is and under interventions: what a picture of it needs, and what the model would say next."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import escape
from spikesink.model.anatomy import anatomy
from spikesink.patching.interventions import Intervention, checked, one_prompt
from spikesink.patching.outcome import run

TOP = 8  # next tokens shown


@dataclass(frozen=True)
class View:
    """One prompt, as it is ("clean") and under interventions ("patched"): the first index of each tensor."""

    what: str  # the interventions, in words
    tokens: tuple[str, ...]
    magnitude: Float[Tensor, "run layer token"]  # max |h|, as the stream enters layers and leaves the last
    attention: Float[Tensor, "run layer head token"]  # what each token gets of the queries that see it
    top: tuple[tuple[str, float, float], ...]  # next tokens, the likeliest first, and their probability in either run


def view(model: TransformerBridge, tokens: Int[Tensor, " length"], *interventions: Intervention) -> View:
    """Run one prompt with and without interventions, and keep what a picture of it needs.

    Args:
        model: as `load` returns it.
        tokens: one prompt, such as `model.to_tokens(prompt)[0]`.
        interventions: what to do, in order.

    Raises:
        ValueError: as `evaluate` does.
    """
    prompt = checked(model, one_prompt(tokens), interventions)
    batch = prompt.to(model.cfg.device)
    ran = [run(model, anatomy(model), batch, cut, range(1)) for cut in ((), interventions)]
    next_token = [of.output[0, -1].softmax(-1).cpu() for of in ran]
    decode = model.tokenizer.decode
    best = torch.maximum(*next_token).argsort(descending=True)[:TOP].tolist()
    best = sorted(best, key=lambda i: -float(next_token[1][i]))
    return View(
        what="; then ".join(map(str, interventions)) or "as it is",
        tokens=tuple(decode([i]) for i in prompt[0].tolist()),
        magnitude=torch.stack([torch.cat(of.sizes) for of in ran]),
        attention=torch.stack([torch.cat(of.received) for of in ran]),
        top=tuple((decode([i]), float(next_token[0][i]), float(next_token[1][i])) for i in best),
    )


def next_tokens(seen: View) -> str:
    """A view's next-token table, as Markdown."""
    lines = ["| next token | clean | patched |", "|---|---|---|"]
    lines += [f"| `{escape(text)!r}` | {clean:.1%} | {changed:.1%} |" for text, clean, changed in seen.top]
    return "\n".join(lines)
