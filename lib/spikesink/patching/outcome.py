"""What becomes of a model under interventions: `evaluate` one set of them, `compare` many, `sweep` into a table."""

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import bootstrap
from scipy.stats import t as student
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.chain.trace import EPSILON, received
from spikesink.common import brief, progress
from spikesink.model.anatomy import Anatomy, anatomy, not_finite
from spikesink.patching import prefix
from spikesink.patching.interventions import Intervention, batches, checked, patched

CLEAN = "clean"
RESAMPLES = 2000
Cut = Intervention | Sequence[Intervention]


@dataclass(frozen=True, repr=False)
class Outcome:
    """What a model does under interventions, on windows of text; `position` predicts the token after it.

    Printed, it is its main measures in one line.
    """

    what: str  # the interventions, in words
    epsilon: float
    loss: Float[Tensor, "window position"]  # cross-entropy of the next token, nats
    divergence: Float[Tensor, "window position"]  # KL divergence of its prediction from the clean run's, nats
    agrees: Bool[Tensor, "window position"]  # whether the likeliest next token is the clean run's
    score: Float[Tensor, "window layer head"]  # attention that position 0 gets: its sink score
    attention: Float[Tensor, "layer key"]  # what each key position gets of the queries that see it, mean over heads
    sinks: Float[Tensor, "layer key"]  # share of heads and windows in which it gets more than epsilon
    largest: Float[Tensor, "window token"]  # max |h| over channels, as the stream enters layers and leaves the last

    @property
    def perplexity(self) -> float:
        """exp of the mean loss."""
        return float(self.loss.mean().exp())

    @property
    def kl(self) -> float:
        """Mean KL divergence from the clean run, in nats."""
        return float(self.divergence.mean())

    @property
    def agreement(self) -> float:
        """Share of positions at which the likeliest next token is the clean run's."""
        return float(self.agrees.float().mean())

    @property
    def sink_ratio(self) -> float:
        """Share of layers, heads and windows in which position 0's sink score exceeds epsilon."""
        return float((self.score > self.epsilon).float().mean())

    @property
    def max_activation(self) -> float:
        """The largest entry of the stream, median over windows of each one's largest."""
        return float(self.largest.amax(1).quantile(0.5))

    def perplexity_at(self, where: Bool[Tensor, "window position"]) -> float:
        """exp of the mean loss over some predictions only."""
        return float(self.loss[where].mean().exp())

    def interval(self, what: str = "perplexity", level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """A bootstrap interval over windows (percentile method); not numbers where there is only one window.

        Args:
            what: "perplexity", "kl", "agreement", "sink_ratio" or "max_activation".
            level: of confidence.
            seed: of the resampling.

        Raises:
            ValueError: no such measure.
        """
        measures = {
            "perplexity": (self.loss.mean(1), _exp_mean),
            "kl": (self.divergence.mean(1), np.mean),
            "agreement": (self.agrees.float().mean(1), np.mean),
            "sink_ratio": ((self.score > self.epsilon).float().mean((1, 2)), np.mean),
            "max_activation": (self.largest.amax(1), np.median),
        }
        if what not in measures:
            raise ValueError(f"there is no measure {what!r}; give one of {', '.join(measures)}.")
        return bootstrapped(*measures[what], level, seed)

    def more(self, other: "Outcome") -> Float[np.ndarray, " window"]:
        """By how much more loss than another outcome each window has, in nats.

        Raises:
            ValueError: the other is of other windows.
        """
        if other.loss.shape != self.loss.shape:
            raise ValueError(
                f"outcomes of {list(self.loss.shape)} and {list(other.loss.shape)} predictions cannot be paired; "
                "evaluate both on the same windows."
            )
        return (self.loss - other.loss).mean(1).double().numpy()

    def times(self, other: "Outcome") -> tuple[float, float]:
        """Student's 95% interval over windows of how many times another outcome's perplexity this one's is.

        Paired: both are of the same windows, so that what these differ in among themselves does not widen it. Windows
        are few, and of few a bootstrap's interval is too narrow. Not numbers where there is only one window.

        Raises:
            ValueError: the other is of other windows.
        """
        return student_interval(self.more(other))

    def __repr__(self) -> str:
        low, high = self.interval()
        interval = f" ({brief(low)} to {brief(high)})" if math.isfinite(low) else ""
        return (
            f"{self.what}: perplexity {brief(self.perplexity)}{interval}, KL {self.kl:.2f} nats, "
            f"same token {self.agreement:.0%}, sink ratio {self.sink_ratio:.2f}, "
            f"max activation {brief(self.max_activation)}"
        )


def _exp_mean(x: np.ndarray, axis: int) -> np.ndarray:
    return np.exp(x.mean(axis=axis))


def student_interval(nats: Float[np.ndarray, " window"]) -> tuple[float, float]:
    """Student's 95% interval of exp of a mean over windows; not numbers where there is only one."""
    if len(nats) < 2:
        return math.nan, math.nan
    half = student.ppf(0.975, len(nats) - 1) * nats.std(ddof=1) / math.sqrt(len(nats))
    return math.exp(nats.mean() - half), math.exp(nats.mean() + half)


def bootstrapped(values: Tensor, statistic: Callable, level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """The percentile interval of a statistic of windows; not numbers where there is only one."""
    values = values.double().numpy()
    if len(values) < 2:
        return math.nan, math.nan
    if np.ptp(values) == 0:
        return (same := float(statistic(values, axis=0))), same
    found = bootstrap(
        (values,), statistic, n_resamples=RESAMPLES, confidence_level=level, method="percentile", rng=seed
    ).confidence_interval
    return float(found.low), float(found.high)


def evaluate(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], *interventions: Intervention, epsilon: float = EPSILON
) -> Outcome:
    """Run windows as they are and under interventions, and set the one beside the other.

    Args:
        model: as `load` returns it, or any HookedRootModule with an `anatomy` that returns logits.
        tokens: windows of two tokens or more, or one prompt [length].
        interventions: what to do, in order; none is the clean run.
        epsilon: what a sink's score exceeds.

    Raises:
        ValueError: no tokens, too many or unknown ones; a block, layer, head, channel, hook or position that does not
            exist; values of the wrong size.
        RuntimeError: an intervention that never took effect.
        FloatingPointError: the model's own predictions are not finite.
    """
    return compare(model, tokens, {"": interventions}, epsilon)[""]


def compare(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    cuts: Mapping[Hashable, Cut],
    epsilon: float = EPSILON,
    reuse: bool = True,
) -> dict[Hashable, Outcome]:
    """`evaluate` many sets of interventions on the same windows; the clean run is made once.

    Each run starts at the first layer that its interventions touch, with what the clean run had there, where the model
    allows it: layers before it would do the same again. `reuse` says whether to, for those who doubt it.

    Returns:
        An outcome for each of `cuts`, by the same keys, after that of the clean run, by the key "clean".
    """
    if not isinstance(cuts, Mapping):
        raise ValueError("give the cuts as a dictionary, so that each has a name in the answer.")
    if CLEAN in cuts:
        raise ValueError(f"{CLEAN!r} is the name of the run without any cut; give this one another.")
    listed = {key: (cut,) if isinstance(cut, Intervention) else tuple(cut) for key, cut in cuts.items()}
    listed = {key: cut for key, cut in listed.items() if cut}  # one without interventions is the clean run
    tokens = checked(model, tokens, [one for cut in listed.values() for one in cut])
    about = anatomy(model)
    if tokens.shape[1] < 2:
        raise ValueError("one token predicts nothing that could be compared; give prompts of at least two.")
    starts = {key: min(one.first_layer(about) for one in cut) for key, cut in listed.items()}
    form = prefix.layer_returns_tuple(model, tokens, starts.values()) if reuse else None
    sums = {key: _Sums(about, epsilon) for key in (CLEAN, *listed)}
    todo = [(rows, key) for rows in batches(about, tokens) for key in sums]
    for rows, key in progress(todo, "patching" if listed else "running", "run"):
        batch = tokens[rows.start : rows.stop].to(model.cfg.device)
        if key == CLEAN:
            clean = run(model, about, batch, (), rows, keep=set(starts.values()))
            if not clean.total.isfinite().all():
                raise FloatingPointError(not_finite(model, "what the model predicts when nothing is changed"))
            sums[CLEAN].add(batch, clean, clean)
        else:
            start = starts[key] if form is not None else 0
            sums[key].add(batch, run(model, about, batch, listed[key], rows, start, bool(form), clean), clean)
    words = {CLEAN: "the clean run", **{key: "; then ".join(map(str, cut)) for key, cut in listed.items()}}
    found = {key: total.outcome(words[key]) for key, total in sums.items()}
    return {key: found.get(key, found[CLEAN]) for key in (CLEAN, *cuts)}


def sweep(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    cuts: Mapping[Hashable, Cut],
    over: str = "cut",
    epsilon: float = EPSILON,
) -> pd.DataFrame:
    """`compare`, as a tidy table: doses, layers, channels, or whatever the keys of `cuts` are.

    Returns:
        As `table` does, with the keys of `cuts` as the index, named `over`.
    """
    return table(compare(model, tokens, cuts, epsilon), over)


def table(outcomes: Mapping[Hashable, Outcome], over: str = "cut") -> pd.DataFrame:
    """Outcomes as a tidy table: perplexity with its interval, KL, agreement, sink ratio, max activation."""
    rows = []
    for key, outcome in outcomes.items():
        low, high = outcome.interval()
        row = {over: key, "perplexity": outcome.perplexity, "low": low, "high": high, "kl": outcome.kl}
        row |= {"agreement": outcome.agreement, "sink_ratio": outcome.sink_ratio}
        rows.append(row | {"max_activation": outcome.max_activation})
    return pd.DataFrame(rows).set_index(over)


@dataclass(frozen=True)
class Ran:
    """One batch, run once."""

    output: Float[Tensor, "window token vocabulary"]
    received: list[Float[Tensor, "window head key"]]  # by layer
    sizes: list[Float[Tensor, "window token"]]  # max |h|, by layer hook
    entered: dict[int, Float[Tensor, "window position d_model"]]  # the stream that enters some layers

    @property
    def logits(self) -> Float[Tensor, "window position vocabulary"]:
        """The predictions that can be judged: all but the last token's."""
        return self.output[:, :-1]

    @cached_property
    def total(self) -> Float[Tensor, "window position"]:
        """Log of the sum of exp(logits), window by window: what is as large as all logits is slow to allocate."""
        return torch.stack([of.logsumexp(-1) for of in self.logits])

    @cached_property
    def best(self) -> Int[Tensor, "window position"]:
        """The likeliest next token."""
        return self.logits.argmax(-1)

    @cached_property
    def p(self) -> list[Float[Tensor, "position vocabulary"]]:
        """What it predicts, window by window."""
        return [(of - total[:, None]).exp_() for of, total in zip(self.logits, self.total, strict=True)]

    def divergence(self, other: "Ran") -> Float[Tensor, "window position"]:
        """KL divergence of another run's prediction from this one's, in nats."""
        expected = [
            torch.einsum("pv,pv->p", p, mine - theirs)
            for p, mine, theirs in zip(self.p, self.logits, other.logits, strict=True)
        ]
        return (torch.stack(expected) + other.total - self.total).clamp(min=0)


@torch.inference_mode()
def run(
    model: TransformerBridge,
    about: Anatomy,
    batch: Int[Tensor, "window position"],
    cut: Sequence[Intervention],
    rows: range,
    start: int = 0,
    in_a_tuple: bool = False,
    clean: Ran | None = None,
    keep: set[int] = frozenset(),
) -> Ran:
    """Run a batch under interventions, from layer `start` on; what the layers before it did is the clean run's."""
    scores = dict(enumerate(clean.received[:start])) if clean else {}
    sizes = dict(enumerate(clean.sizes[:start])) if clean else {}
    entered = {}

    def on_layer(value, hook):
        layer = about.layer_hooks.index(hook.name)
        sizes[layer] = value.abs().amax(-1).float().cpu()
        if layer in keep:
            entered[layer] = value

    def on_pattern(value, hook):
        layer = about.pattern_hooks.index(hook.name)
        of_window = received(value.flatten(0, 1).float(), about.sight[layer])
        scores[layer] = of_window.unflatten(0, value.shape[:2]).cpu()

    watch = [(name, on_layer) for name in about.layer_hooks[start:]]
    watch += [(name, on_pattern) for name in about.pattern_hooks[start:]]
    with ExitStack() as stack:
        if start:
            stack.enter_context(prefix.skipping(model, start, in_a_tuple))
            stack.enter_context(model.hooks(fwd_hooks=[prefix.injected(about, start, clean.entered[start])]))
        stack.enter_context(patched(model, *cut, rows=rows))
        stack.enter_context(model.hooks(fwd_hooks=watch))
        output = model(batch).float()
    seen = ([of for _, of in sorted(by_layer.items())] for by_layer in (scores, sizes))
    return Ran(output, *seen, entered)


class _Sums:
    """What `compare` keeps of one set of interventions, batch by batch."""

    def __init__(self, about: Anatomy, epsilon: float):
        self.about, self.epsilon = about, epsilon
        self.parts: list[tuple[Tensor, ...]] = []

    def add(self, batch: Int[Tensor, "window position"], ran: Ran, clean: Ran) -> None:
        target = batch[:, 1:, None].to(ran.logits.device)
        loss = ran.total - ran.logits.gather(-1, target)[..., 0]
        divergence = torch.zeros_like(loss) if ran is clean else clean.divergence(ran)
        scores = torch.stack([of[..., 0] for of in ran.received], 1)  # window, layer, head
        attention, sinks = (
            torch.stack([of.mean(1) for of in by_layer], 1)  # window, layer, key
            for by_layer in (ran.received, [(of > self.epsilon).float() for of in ran.received])
        )
        parts = loss, divergence, ran.best == clean.best, scores, attention, sinks, torch.stack(ran.sizes).amax(0)
        self.parts.append(tuple(part.cpu() for part in parts))

    def outcome(self, what: str) -> Outcome:
        loss, divergence, agrees, scores, attention, sinks, largest = map(torch.cat, zip(*self.parts, strict=True))
        means = attention.mean(0), sinks.mean(0)
        return Outcome(what, self.epsilon, loss, divergence, agrees, scores, *means, largest)
