"""A model as it is, with its sink held, without the spike, without the sink, without either: which a failure needs.

A technique of serving is tried in each, and where it can spare the sink's key and value, once more like that; what it
costs there, beside the same cell without it, says whose failure it is (`diagnosis`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy
from spikesink.model.weights import require_projections
from spikesink.patching import Intervention, Outcome, compare, hook, mask_key, skip, zero
from spikesink.patching.cuts import SpikeMeans, decoupled, sink_held
from spikesink.patching.outcome import student_interval

AS_IT_IS, HELD, NO_SPIKE = "as it is", "with the sink held", "without the spike"
NO_SINK, NEITHER = "without the sink", "without either"
SPARED = "with the sink kept"  # no cell: the technique leaves the sink's key and value out
CELLS = (AS_IT_IS, HELD, NO_SPIKE, NO_SINK, NEITHER)
HIDDEN = "mlp.out.hook_in"  # what an FFN's down projection reads
Cuts = tuple[Intervention, ...]


@dataclass(frozen=True)
class Technique:
    """What serving does, as interventions; and the same with the sink's key and value spared, where it can be."""

    cuts: Cuts
    spared: Cuts | None = None
    cells: tuple[str, ...] = CELLS  # that it is tried in


@measure
def cells(known: SpikeMeans | NotApplicable, where: Bool[Tensor, "window position"]) -> dict[str, Cuts] | NotApplicable:
    """What is done in each cell: nothing; spike tokens' keys and values are constants, from the spike on; so they are,
    and the spike is not written; their keys are masked; their spike is not written, and nothing held.

    Where there is no spike, the step-up and step-down blocks' hidden activations are zero at the spike tokens too: it
    is there that the spike is made, and they would be as large with nobody to read them.

    Args:
        known: as `patching.chain.constants` returns it, of other windows.
        where: the spike tokens of the windows that will be run, as `find_spikes` returns them.

    Returns:
        Interventions by cell, or why there are none.
    """
    require_projections(known.anatomy)
    if not where.any():
        return NotApplicable("no token of these windows spikes")
    made = tuple(f"blocks.{block.layer}.{HIDDEN}" for block in known.steps if not block.is_attention)
    unmade = (zero(hook(made), where),) if made and shows_ffn(known.anatomy) else ()
    held = {HELD: cuts} if (cuts := sink_held(known, where, known.start)) else {}
    found = {AS_IT_IS: (), **held, NO_SPIKE: (*unmade, *decoupled(known, where))}
    if known.anatomy.edits_pattern:
        found[NO_SINK] = (mask_key(where, known.layers),)
    return found | ({NEITHER: (*unmade, skip(known.steps, where))} if known.steps else {})


def or_as_it_is(of: Mapping[str, Cuts] | NotApplicable) -> Mapping[str, Cuts]:
    """Cells; where there are none, the model as it is alone."""
    return {AS_IT_IS: ()} if isinstance(of, NotApplicable) else of


def shows_ffn(about: Anatomy) -> bool:
    """Whether what passes inside an FFN is seen token by token: it is not where a router sends tokens elsewhere."""
    return about.separate_ffn and not about.n_experts


@dataclass(frozen=True)
class Crossed:
    """Techniques in cells. `plain` are the cells without any, `with_it` the techniques in each."""

    plain: Mapping[str, Outcome]  # by cell
    with_it: Mapping[str, Mapping[str, Outcome]]  # by technique, then cell; with the sink spared where that can be
    counted: Bool[Tensor, "window prediction"] | None = None  # None: all
    reason: str = ""  # why there is no cell but the model as it is, where that is so

    def cost(self, technique: str, cell: str = AS_IT_IS) -> float:
        """How many times the cell's own perplexity it is with the technique."""
        return float(np.exp(self.nats(technique, cell).mean()))

    def interval(self, technique: str, cell: str = AS_IT_IS) -> tuple[float, float]:
        """Student's 95% interval of the cost, over windows; not numbers where there is only one."""
        return student_interval(self.nats(technique, cell))

    def nats(self, technique: str, cell: str = AS_IT_IS) -> Float[np.ndarray, " window"]:
        """The same in nats, of each window."""
        own = self.plain[AS_IT_IS if cell == SPARED else cell]
        return self._by_window(self.with_it[technique][cell]) - self._by_window(own)

    def times(self, technique: str, other: str) -> tuple[float, float]:
        """The interval of how many times another technique's perplexity one's is, both as the model is."""
        one, other = (self._by_window(self.with_it[name][AS_IT_IS]) for name in (technique, other))
        return student_interval(one - other)

    def perplexity(self, outcome: Outcome) -> float:
        """exp of the mean loss, over the predictions that count."""
        return float(np.exp(self._by_window(outcome).mean()))

    def _by_window(self, outcome: Outcome) -> Float[np.ndarray, " window"]:
        counted = torch.ones_like(outcome.loss) if self.counted is None else self.counted
        return ((outcome.loss.double() * counted).sum(1) / counted.sum(1)).numpy()

    def table(self) -> pd.DataFrame:
        """Perplexities: a row a technique, a column a cell; the first row is that of the cells themselves."""
        rows = {"nothing": self.plain, **self.with_it}
        found = {name: {cell: self.perplexity(outcome) for cell, outcome in row.items()} for name, row in rows.items()}
        return self._ordered(found)

    def costs(self) -> pd.DataFrame:
        """How many times its cell's perplexity each is."""
        found = {name: {cell: self.cost(name, cell) for cell in row} for name, row in self.with_it.items()}
        return self._ordered(found)

    @staticmethod
    def _ordered(found: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
        frame = pd.DataFrame.from_dict(found, orient="index").rename_axis("technique")
        return frame[[cell for cell in (AS_IT_IS, SPARED, *CELLS[1:]) if cell in frame]]


@measure
def cell_table(crossed: Crossed | NotApplicable) -> pd.DataFrame | NotApplicable:
    """The cells without any technique: perplexity, sink ratio, largest activation."""
    rows = [
        {
            "cell": cell,
            "perplexity": crossed.perplexity(outcome),
            "sink ratio": outcome.sink_ratio,
            "largest activation": outcome.max_activation,
        }
        for cell, outcome in crossed.plain.items()
    ]
    return pd.DataFrame(rows).set_index("cell")


def cross(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    of: Mapping[str, Cuts] | NotApplicable,
    techniques: Mapping[str, Technique] | NotApplicable,
    where: Bool[Tensor, "window position"] | None = None,
) -> Crossed | NotApplicable:
    """Run every technique in every cell on the same windows, and once with the sink spared.

    Args:
        model: as `load` returns it.
        tokens: windows.
        of: cells, as `cells` returns them; where there are none, techniques are tried in the model as it is.
        techniques: by name; their interventions come after the cell's own.
        where: the spike tokens of these windows. What is predicted *after* them does not count: without its spike a
            token predicts nothing of use, and where that prediction is held, nothing can harm it.
    """
    if isinstance(techniques, NotApplicable):
        return techniques
    reason, of = of.reason if isinstance(of, NotApplicable) else "", or_as_it_is(of)
    runs: dict[tuple[str, str | None], Cuts] = {(cell, None): cuts for cell, cuts in of.items()}
    for name, technique in techniques.items():
        for cell in (cell for cell in technique.cells if cell in of):
            runs[cell, name] = of[cell] + technique.cuts
        if technique.spared is not None:
            runs[SPARED, name] = technique.spared
    found = compare(model, tokens, runs)
    with_it: dict[str, dict[str, Outcome]] = {name: {} for name in techniques}
    for cell, name in runs:
        if name is not None:
            with_it[name][cell] = found[cell, name]
    counted = None if where is None else ~where[:, :-1]
    return Crossed({cell: found[cell, None] for cell in of}, with_it, counted, reason)
