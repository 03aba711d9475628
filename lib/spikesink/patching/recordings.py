"""What passes a site, for `set_to`: means over windows, and what one prompt has at given positions."""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from spikesink.common import progress
from spikesink.model.anatomy import Model, check_ids
from spikesink.patching.interventions import Intervention, batches, checked, intervene, patched, set_to
from spikesink.patching.sites import At, Parts, Positions, Site, Tokens


def mean_of(
    model: Model, tokens: Tokens, site: Site, positions: At = None, channels: Parts = None, heads: Parts = None
) -> Float[Tensor, " place *part"]:
    """The mean of a site's activations over windows and positions, for `set_to`. Raises what `patched` does."""
    return means_of(model, tokens, {"": (site, positions, channels, heads)})[""]


def means_of(model: Model, tokens: Tokens, selected: Mapping[str, tuple]) -> dict[str, Float[Tensor, " place *part"]]:
    """`mean_of` for several selections in one pass: each a site, positions and, where it is not all, what of it."""
    sums = {name: [[0.0, 0] for _ in site.places] for name, (site, *_) in selected.items()}

    def take(name: str, place: int, x: Tensor) -> None:
        sums[name][place][0] += x.sum(0)
        sums[name][place][1] += len(x)

    _watch(model, tokens, selected, take)
    return {name: torch.stack([total / n for total, n in places]) for name, places in sums.items()}


def record(
    model: Model, tokens: Tokens, site: Site, positions: At, channels: Parts = None, heads: Parts = None
) -> Float[Tensor, " place position *part"]:
    """A site's activations at given positions of one prompt, for `set_to`. Raises what `patched` does."""
    recorded: dict[int, Tensor] = {}
    selected = {"": (site, positions, channels, heads)}
    _watch(model, one_prompt(tokens), selected, lambda name, place, x: recorded.update({place: x}))
    return torch.stack([recorded[i] for i in range(len(site.places))])


def _watch(
    model: Model, tokens: Tensor, selected: Mapping[str, tuple], take: Callable[[str, int, Tensor], None]
) -> None:
    """Run windows once, and hand on what is selected: take(name, place, x [token, *part])."""

    def passing(name: str, part_dims: int, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        take(name, place, x.flatten(0, -(part_dims + 1)).float().cpu())
        return x

    watches = []
    for name, (site, *where) in selected.items():
        if site.kind == "attention":
            raise ValueError("attention is not averaged or recorded; scale it, or look at it with trace.profile.")
        watches.append(intervene(site, partial(passing, name, site.traits.part_dims), *where))
    tokens = checked(model, tokens, watches)
    with torch.inference_mode():
        for rows in progress(batches(model.anatomy, tokens), "recording", "batch"):
            with patched(model, *watches, rows=rows):
                model(tokens[rows.start : rows.stop].to(model.cfg.device))


def one_prompt(tokens: Tokens) -> Int[Tensor, " length"]:
    """A single prompt, also out of a batch of one; ValueError where it is none, or several."""
    check_ids(tokens)
    if tokens.ndim == 2 and len(tokens) == 1:
        return tokens[0]
    if tokens.ndim != 1:
        raise ValueError(f"one prompt is wanted, but tokens are {list(tokens.shape)}; give one row of them.")
    return tokens


def patch_from(
    model: Model,
    tokens: Tokens,
    site: Site,
    positions: At,
    into: At = None,
    channels: Parts = None,
    heads: Parts = None,
) -> Intervention:
    """Put in what another prompt has at these positions of a site: activation patching proper.

    Args:
        tokens: the other prompt.
        positions: of the other prompt.
        into: as many positions of the prompt that is patched; by default the same.
    """
    values = record(model, tokens, site, positions, channels, heads)
    target = Positions.of(positions if into is None else into)
    if target.same is None or len(target.same) != values.shape[1]:
        raise ValueError(f"{values.shape[1]} positions were recorded; name as many to put them into.")
    return set_to(site, values, target.same, channels, heads)
