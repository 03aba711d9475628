"""A model as it is, without the spike, without the sink, and without either: which of the two a failure needs.

A technique of serving is tried in each; what it costs there, beside the same cell without it, says whose failure it is.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from jaxtyping import Bool, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.claims import NotApplicable, where_applicable
from spikesink.lifecycle import Lifecycle, find_spikes, plateau_layers
from spikesink.patching import Intervention, Outcome, compare, mask_key, skip
from spikesink.patching.chain import constants, decoupled
from spikesink.weights import no_projections

AS_IT_IS, NO_SPIKE, NO_SINK, NEITHER = "as it is", "without the spike", "without the sink", "without either"
GONE = 0.2  # of a cost that is left where it has gone
Cuts = tuple[Intervention, ...]


@where_applicable
def cells(
    model: TransformerBridge,
    life: Lifecycle,
    tokens: Int[Tensor, "n length"],
    held_out: Int[Tensor, "m length"],
    where: Bool[Tensor, "n length"] | None = None,
) -> dict[str, Cuts] | NotApplicable:
    """What is done in each cell: nothing; spike tokens are decoupled; their keys masked; their spike never written.

    Args:
        model: as `load` returns it.
        life: as `find_lifecycle` returns it.
        tokens: the windows that will be run.
        held_out: other windows, of which the constants are taken.
        where: the spike tokens of `tokens`, if they are known.

    Returns:
        Interventions by cell, or why there are none.
    """
    if (reason := no_projections(life.trace.anatomy)) is not None:
        return NotApplicable(reason)
    known = constants(model, life, held_out)
    if isinstance(known, NotApplicable):
        return known
    where = find_spikes(model, life, tokens) if where is None else where
    if not where.any():
        return NotApplicable("no token of these windows spikes")
    return {
        AS_IT_IS: (),
        NO_SPIKE: decoupled(known, where),
        NO_SINK: (mask_key(where, plateau_layers(life.main)),),
        NEITHER: (skip(known.steps, where),) if known.steps else (),
    }


@dataclass(frozen=True)
class Crossed:
    """Techniques in cells. `plain` are the cells without any, `with_it` the techniques in each."""

    plain: Mapping[str, Outcome]  # by cell
    with_it: Mapping[str, Mapping[str, Outcome]]  # by technique, then cell

    def cost(self, technique: str, cell: str = AS_IT_IS) -> float:
        """How many times the cell's perplexity it is with the technique."""
        return float((self.with_it[technique][cell].loss.mean() - self.plain[cell].loss.mean()).exp())

    def table(self) -> pd.DataFrame:
        """Perplexities: a row a technique, a column a cell; the first row is that of the cells themselves."""
        rows = {"nothing": self.plain, **self.with_it}
        found = {name: {cell: outcome.perplexity for cell, outcome in row.items()} for name, row in rows.items()}
        return pd.DataFrame.from_dict(found, orient="index").rename_axis("technique")

    def costs(self) -> pd.DataFrame:
        """How many times its cell's perplexity each is."""
        found = {name: {cell: self.cost(name, cell) for cell in self.plain} for name in self.with_it}
        return pd.DataFrame.from_dict(found, orient="index").rename_axis("technique")

    def gone(self, technique: str, cell: str) -> bool:
        """Whether hardly anything is left in a cell of what the technique costs the model as it is (in nats)."""
        return math.log(self.cost(technique, cell)) <= GONE * math.log(self.cost(technique))


def cross(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    of: Mapping[str, Cuts],
    techniques: Mapping[str, Cuts],
    only: Sequence[str] | None = None,
) -> Crossed:
    """Run every technique in every cell on the same windows.

    Args:
        model: as `load` returns it.
        tokens: windows.
        of: cells, as `cells` returns them.
        techniques: interventions by name; they come after the cell's own.
        only: cells; by default all.
    """
    names = list(of) if only is None else list(only)
    runs: dict[tuple[str, str | None], Cuts] = {(cell, None): of[cell] for cell in names}
    runs |= {(cell, name): of[cell] + cuts for name, cuts in techniques.items() for cell in names}
    found = compare(model, tokens, runs)
    plain = {cell: found[cell, None] for cell in names}
    return Crossed(plain, {name: {cell: found[cell, name] for cell in names} for name in techniques})
