"""Start a run at a later layer: a change there leaves all layers before it as they were, so they need not run again."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.model.anatomy import Anatomy, anatomy

PROBED = 8  # tokens of the run that tells whether a model allows it


class _Passing(torch.nn.Module):
    """Stands where a layer stood that does not run: hands on what it gets, in the form in which that layer would."""

    def __init__(self, layer: torch.nn.Module, in_a_tuple: bool):
        super().__init__()
        object.__setattr__(self, "stood_for", layer)  # no submodule, so that nobody finds it twice
        self.in_a_tuple = in_a_tuple

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states,) if self.in_a_tuple else hidden_states

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "stood_for"), name)


@contextmanager
def skipping(model: TransformerBridge, layer: int, in_a_tuple: bool) -> Iterator[None]:
    """Let the layers before `layer` stand aside while the context lasts; a hook must then put in what enters it."""
    stack = _stack(model)
    own = list(stack)
    try:
        for i in range(layer):
            stack[i] = _Passing(own[i], in_a_tuple)
        yield
    finally:
        for i in range(layer):
            stack[i] = own[i]


def injected(about: Anatomy, layer: int, stream: Float[Tensor, "window position d_model"]) -> tuple[str, Callable]:
    """The hook that puts in what enters a layer."""
    return about.layer_hooks[layer], lambda value, hook: stream


@torch.inference_mode()
def layer_returns_tuple(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], layers: Iterable[int]
) -> bool | None:
    """Whether the model's layers return tuples; None if it cannot be started at one of these layers.

    Found by doing it on a few tokens, for each of them: the logits must be those of a whole run.
    """
    about, stack = anatomy(model), _stack(model)
    later = sorted({layer for layer in layers if layer})
    if stack is None or not later:
        return None
    few, seen = tokens[:1, :PROBED].to(model.cfg.device), {}
    handle = stack[0].register_forward_hook(lambda module, args, output: seen.update(tuple=isinstance(output, tuple)))
    keep = [(about.layer_hooks[i], lambda value, hook: seen.update({hook.name: value})) for i in later]
    try:
        with model.hooks(fwd_hooks=keep):
            whole = model(few)
    finally:
        handle.remove()
    for layer in later:
        put_in = injected(about, layer, seen[about.layer_hooks[layer]])
        try:
            with skipping(model, layer, seen["tuple"]), model.hooks(fwd_hooks=[put_in]):
                resumed = model(few)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None
        if not torch.equal(whole, resumed):
            return None
    return seen["tuple"]


def _stack(model: TransformerBridge) -> torch.nn.ModuleList | None:
    """The list of layers that the model itself goes through; None where there is no such list."""
    whole = getattr(model, "original_model", model)
    first = model.blocks[0]
    lists = (module for module in whole.modules() if isinstance(module, torch.nn.ModuleList))
    return next((found for found in lists if len(found) and found[0] is first), None)
