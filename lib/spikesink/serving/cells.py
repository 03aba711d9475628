"""The versions of a model that a serving technique is tried in: unchanged, or without spike, sink or both.

What a technique costs in each, compared with the same version without it, tells whose failure it is (`diagnosis`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from spikesink.common import NotApplicable, measure
from spikesink.model.anatomy import Anatomy, Model
from spikesink.model.weights import require_projections
from spikesink.patching import Intervention, Outcome, compare, hook, mask_key, skip, zero
from spikesink.patching.cuts import decoupled, sink_held
from spikesink.patching.means import SpikeMeans
from spikesink.patching.outcome import student_interval

UNCHANGED, SINK_HELD, NO_SPIKE = "unchanged", "sink held", "spike removed"
NO_SINK, NEITHER = "sink removed", "both removed"
SINK_EXEMPT = "sink exempt"  # no cell: the technique itself leaves the sink's key and value alone
CELLS = (UNCHANGED, SINK_HELD, NO_SPIKE, NO_SINK, NEITHER)
HIDDEN = "mlp.out.hook_in"  # what an FFN's down projection reads
Cuts = tuple[Intervention, ...]


@dataclass(frozen=True)
class Technique:
    """What serving does, as interventions."""

    cuts: Cuts
    exempt: Cuts | None = None  # the same, with the sink's key and value left alone
    cells: tuple[str, ...] = CELLS  # that it is tried in


@dataclass(frozen=True)
class Cells:
    """The interventions that make each cell; where the unchanged model is the only one, `reason` says why."""

    cuts: Mapping[str, Cuts]
    reason: str = ""


def make_cells(means: SpikeMeans | NotApplicable, where: Bool[Tensor, "window position"]) -> Cells:
    """All cells, or the unchanged model alone where there is no spike to remove.

    Sink held: from the spike on, spike tokens' keys and values are constants. Spike removed: the same, and no spike is
    written; the hidden activations that write it are zero there too, or they would set the range of a quantizer with
    nobody to read them. Sink removed: the spike tokens' keys are masked. Both removed: no spike is written, and nothing
    is held. `means` are of other windows; `where` are the spike tokens of those that will be run.
    """
    made = _cut(means, where)
    return Cells({UNCHANGED: ()}, made.reason) if isinstance(made, NotApplicable) else Cells(made)


@measure
def _cut(means: SpikeMeans, where: Bool[Tensor, "window position"]) -> dict[str, Cuts]:
    require_projections(means.anatomy)
    if not where.any():
        raise NotApplicable("no token of these windows spikes")
    ffns = [block for block in means.steps if not block.is_attention]
    hidden = tuple(f"blocks.{block.layer}.{HIDDEN}" for block in ffns)
    unmade = (zero(hook(hidden), where),) if hidden and shows_ffn(means.anatomy) else ()
    cuts = {
        UNCHANGED: (),
        SINK_HELD: sink_held(means, where, means.start),
        NO_SPIKE: (*unmade, *decoupled(means, where)),
    }
    if means.anatomy.edits_pattern:
        cuts[NO_SINK] = (mask_key(where, means.layers),)
    if means.steps:
        cuts[NEITHER] = (*unmade, skip(means.steps, where))
    return cuts


def shows_ffn(anatomy: Anatomy) -> bool:
    """Whether what passes inside an FFN is seen token by token: a router sends tokens elsewhere."""
    return anatomy.separate_ffn and not anatomy.n_experts


@dataclass(frozen=True)
class Crossed:
    """Techniques in cells."""

    plain: Mapping[str, Outcome]  # the cells without any technique
    with_it: Mapping[str, Mapping[str, Outcome]]  # by technique, then cell; with the sink exempt where that can be
    counted: Bool[Tensor, "window prediction"] | None = None  # None: all
    reason: str = ""  # why the unchanged model is the only cell, where it is

    def nats(self, technique: str, cell: str = UNCHANGED) -> Float[np.ndarray, " window"]:
        """By how much a technique raises each window's loss, compared with the same cell without it."""
        own = self.plain[UNCHANGED if cell == SINK_EXEMPT else cell]
        return self._by_window(self.with_it[technique][cell]) - self._by_window(own)

    def cost(self, technique: str, cell: str = UNCHANGED) -> float:
        """How many times the cell's own perplexity it is with the technique."""
        return float(np.exp(self.nats(technique, cell).mean()))

    def interval(self, technique: str, cell: str = UNCHANGED) -> tuple[float, float]:
        """Student's 95% interval of the cost, over windows; NaN where there is one window."""
        return student_interval(self.nats(technique, cell))

    def times(self, technique: str, other: str) -> tuple[float, float]:
        """The interval of one technique's perplexity over another's, in the unchanged model."""
        one, other = (self._by_window(self.with_it[name][UNCHANGED]) for name in (technique, other))
        return student_interval(one - other)

    def perplexity(self, outcome: Outcome) -> float:
        """exp of the mean loss, over the predictions that count."""
        return float(np.exp(self._by_window(outcome).mean()))

    def _by_window(self, outcome: Outcome) -> Float[np.ndarray, " window"]:
        if self.counted is None:
            return outcome.loss.double().mean(1).numpy()
        return ((outcome.loss.double() * self.counted).sum(1) / self.counted.sum(1)).numpy()

    def costs(self) -> pd.DataFrame:
        """A row a technique, a column a cell: the cost."""
        rows = {name: {cell: self.cost(name, cell) for cell in row} for name, row in self.with_it.items()}
        return pd.DataFrame.from_dict(rows, orient="index").rename_axis("technique")


@measure
def cell_table(crossed: Crossed) -> pd.DataFrame:
    """The cells without any technique: perplexity, sink ratio, largest activation."""
    rows = [
        (cell, crossed.perplexity(outcome), outcome.sink_ratio, outcome.max_activation)
        for cell, outcome in crossed.plain.items()
    ]
    return pd.DataFrame(rows, columns=["cell", "perplexity", "sink ratio", "largest activation"]).set_index("cell")


@measure
def cross(
    model: Model,
    tokens: Int[Tensor, "window position"],
    cells: Cells,
    techniques: Mapping[str, Technique],
    where: Bool[Tensor, "window position"] | None = None,
) -> Crossed:
    """Run every technique in every cell on the same windows, and where it can be, once with the sink exempt.

    A technique's interventions come after the cell's own. `where` are the spike tokens of these windows: the
    predictions *after* them do not count. Without its spike a token predicts nothing of use, and where that prediction
    is held, nothing can harm it.
    """
    runs: dict[tuple[str, str | None], Cuts] = {(cell, None): cuts for cell, cuts in cells.cuts.items()}
    for name, technique in techniques.items():
        runs |= {(cell, name): cells.cuts[cell] + technique.cuts for cell in technique.cells if cell in cells.cuts}
        if technique.exempt is not None:
            runs[SINK_EXEMPT, name] = technique.exempt
    outcomes = compare(model, tokens, runs)
    with_it = {name: {cell: outcomes[cell, other] for cell, other in runs if other == name} for name in techniques}
    counted = None if where is None else ~where[:, :-1]
    return Crossed({cell: outcomes[cell, None] for cell in cells.cuts}, with_it, counted, cells.reason)
