"""What becomes of a model under interventions: `evaluate` one set of them, `compare` many, `sweep` into a table."""

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import bootstrap
from scipy.stats import t as student
from torch import Tensor

from spikesink.chain.trace import EPSILON, received
from spikesink.common import brief, escape, progress
from spikesink.model.anatomy import Anatomy, Model, in_sight, not_finite
from spikesink.patching.interventions import Intervention, batches, checked, patched
from spikesink.patching.recordings import one_prompt
from spikesink.patching.sites import Tokens

CLEAN = "clean"
RESAMPLES = 2000
PROBED = 8  # tokens of the run that tells whether a model can be started at a later layer
TOP = 8  # next tokens that a view shows
Cut = Intervention | Sequence[Intervention]
# What an interval is of: each window's share of it, and the statistic of these.
MEASURES: Mapping[str, tuple[Callable, Callable]] = {
    "perplexity": (lambda outcome: outcome.loss.mean(1), lambda x, axis: np.exp(x.mean(axis=axis))),
    "kl": (lambda outcome: outcome.divergence.mean(1), np.mean),
    "agreement": (lambda outcome: outcome.agrees.float().mean(1), np.mean),
    "sink_ratio": (lambda outcome: _over(outcome.score, outcome.epsilon).nanmean((1, 2)), np.mean),
    "max_activation": (lambda outcome: outcome.largest.amax(1), np.median),
}


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
        return float(_over(self.score, self.epsilon).nanmean())

    @property
    def max_activation(self) -> float:
        """The largest entry of the stream, median over windows of each one's largest."""
        return float(self.largest.amax(1).quantile(0.5))

    def perplexity_at(self, where: Bool[Tensor, "window position"]) -> float:
        """exp of the mean loss over some predictions only."""
        return float(self.loss[where].mean().exp())

    def interval(self, what: str = "perplexity", level: float = 0.95, seed: int = 0) -> tuple[float, float]:
        """A bootstrap interval of one of `MEASURES` over windows (percentile method); NaN of one window."""
        if what not in MEASURES:
            raise ValueError(f"there is no measure {what!r}; give one of {', '.join(MEASURES)}.")
        by_window, statistic = MEASURES[what]
        values = by_window(self).double().numpy()
        if len(values) < 2:
            return math.nan, math.nan
        if np.ptp(values) == 0:
            return (same := float(statistic(values, axis=0))), same
        options = {"n_resamples": RESAMPLES, "confidence_level": level, "method": "percentile", "rng": seed}
        ends = bootstrap((values,), statistic, **options).confidence_interval
        return float(ends.low), float(ends.high)

    def times(self, other: "Outcome") -> tuple[float, float]:
        """Student's 95% interval over windows of how many times another outcome's perplexity this one's is.

        Paired, as both are of the same windows. Windows are few, and of few a bootstrap's interval is too narrow.
        """
        if other.loss.shape != self.loss.shape:
            raise ValueError(
                f"outcomes of {list(self.loss.shape)} and {list(other.loss.shape)} predictions cannot be paired; "
                "evaluate both on the same windows."
            )
        return student_interval((self.loss - other.loss).mean(1).double().numpy())

    def __repr__(self) -> str:
        low, high = self.interval()
        interval = f" ({brief(low)} to {brief(high)})" if math.isfinite(low) else ""
        return (
            f"{self.what}: perplexity {brief(self.perplexity)}{interval}, KL {self.kl:.2f} nats, "
            f"same token {self.agreement:.0%}, sink ratio {self.sink_ratio:.2f}, "
            f"max activation {brief(self.max_activation)}"
        )


def student_interval(nats: Float[np.ndarray, " window"]) -> tuple[float, float]:
    """Student's 95% interval of exp of a mean over windows; not numbers where there is only one."""
    if len(nats) < 2:
        return math.nan, math.nan
    half = student.ppf(0.975, len(nats) - 1) * nats.std(ddof=1) / math.sqrt(len(nats))
    return math.exp(nats.mean() - half), math.exp(nats.mean() + half)


def evaluate(model: Model, tokens: Tokens, *interventions: Intervention, epsilon: float = EPSILON) -> Outcome:
    """Run windows of two tokens or more, or one prompt, as they are and under interventions, and compare the two.

    Without interventions it is the clean run. `epsilon` is what a sink's score exceeds.

    Raises:
        ValueError: no tokens, too many or unknown ones; a block, layer, head, channel, hook or position that does not
            exist; values of the wrong size.
        RuntimeError: an intervention that never took effect.
        FloatingPointError: the model's own predictions are not finite.
    """
    return compare(model, tokens, {"": interventions}, epsilon)[""]


def compare(
    model: Model, tokens: Tokens, cuts: Mapping[Hashable, Cut], epsilon: float = EPSILON, reuse: bool = True
) -> dict[Hashable, Outcome]:
    """`evaluate` many sets of interventions on the same windows; the clean run, "clean", is made once and comes first.

    Each run starts at the first layer that its interventions touch, with what the clean run had there, where the model
    allows it: layers before it would do the same again. `reuse` says whether to, for those who doubt it.
    """
    if not isinstance(cuts, Mapping):
        raise ValueError("give the cuts as a dictionary, so that each has a name in the answer.")
    if CLEAN in cuts:
        raise ValueError(f"{CLEAN!r} is the name of the run without any cut; give this one another.")
    listed = {key: (cut,) if isinstance(cut, Intervention) else tuple(cut) for key, cut in cuts.items()}
    listed = {key: cut for key, cut in listed.items() if cut}  # one without interventions is the clean run
    tokens = checked(model, tokens, [one for cut in listed.values() for one in cut])
    if tokens.shape[1] < 2:
        raise ValueError("one token predicts nothing that could be compared; give prompts of at least two.")
    starts = {_first_layer(cut, model.anatomy) for cut in listed.values()}
    start = find_start(model, tokens, starts) if reuse else None
    parts = {key: [] for key in (CLEAN, *listed)}
    todo = [(rows, key) for rows in batches(model.anatomy, tokens) for key in parts]
    for rows, key in progress(todo, "patching" if listed else "running", "run"):
        batch = tokens[rows.start : rows.stop].to(model.cfg.device)
        if key == CLEAN:
            clean = run(model, batch, rows=rows, keep=starts if start else ())
            if not clean.total.isfinite().all():
                raise FloatingPointError(not_finite(model, "what the model predicts when nothing is changed"))
            parts[CLEAN].append(_summarize(batch, clean, clean, epsilon))
        else:
            ran = run(model, batch, listed[key], rows, start and (start, clean))
            parts[key].append(_summarize(batch, ran, clean, epsilon))
    words = {CLEAN: "the clean run", **{key: "; then ".join(map(str, cut)) for key, cut in listed.items()}}
    outcomes = {key: _join(words[key], epsilon, several) for key, several in parts.items()}
    return {key: outcomes.get(key, outcomes[CLEAN]) for key in (CLEAN, *cuts)}


def sweep(
    model: Model, tokens: Tokens, cuts: Mapping[Hashable, Cut], over: str = "cut", epsilon: float = EPSILON
) -> pd.DataFrame:
    """`compare`, as a tidy table: doses, layers, channels, or whatever the keys of `cuts` are, named `over`."""
    return table(compare(model, tokens, cuts, epsilon), over)


def table(outcomes: Mapping[Hashable, Outcome], over: str = "cut") -> pd.DataFrame:
    """Outcomes as a tidy table: perplexity with its interval, KL, agreement, sink ratio, max activation."""
    rows = [
        {over: key, "perplexity": outcome.perplexity, **dict(zip(("low", "high"), outcome.interval(), strict=True))}
        | {name: getattr(outcome, name) for name in ("kl", "agreement", "sink_ratio", "max_activation")}
        for key, outcome in outcomes.items()
    ]
    return pd.DataFrame(rows).set_index(over)


@dataclass(frozen=True)
class View:
    """One prompt, as it is ("clean") and under interventions ("patched"): the first index of each tensor."""

    what: str  # the interventions, in words
    tokens: tuple[str, ...]
    magnitude: Float[Tensor, "run entry token"]  # max |h|, as the stream enters layers and leaves the last
    attention: Float[Tensor, "run layer head token"]  # what each token gets of the queries that see it
    top: tuple[tuple[str, float, float], ...]  # next tokens, the likeliest first, and their probability in either run


def view(model: Model, tokens: Tokens, *interventions: Intervention) -> View:
    """Run one prompt, such as `model.to_tokens(prompt)[0]`, with and without interventions, for a picture of it."""
    prompt = checked(model, one_prompt(tokens), interventions)
    runs = [run(model, prompt.to(model.cfg.device), cut) for cut in ((), interventions)]
    clean, changed = (ran.output[0, -1].softmax(-1).cpu() for ran in runs)
    decode = model.tokenizer.decode
    best = torch.maximum(clean, changed).argsort(descending=True)[:TOP].tolist()
    return View(
        what="; then ".join(map(str, interventions)) or "as it is",
        tokens=tuple(decode([i]) for i in prompt[0].tolist()),
        magnitude=torch.stack([torch.cat(ran.sizes) for ran in runs]),
        attention=torch.stack([torch.cat(ran.received) for ran in runs]),
        top=tuple(
            (decode([i]), float(clean[i]), float(changed[i])) for i in sorted(best, key=lambda i: -float(changed[i]))
        ),
    )


def next_tokens(view: View) -> str:
    """A view's next-token table, as Markdown."""
    lines = ["| next token | clean | patched |", "|---|---|---|"]
    lines += [f"| `{escape(text)!r}` | {clean:.1%} | {changed:.1%} |" for text, clean, changed in view.top]
    return "\n".join(lines)


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
        return torch.stack([logits.logsumexp(-1) for logits in self.logits])

    @cached_property
    def best(self) -> Int[Tensor, "window position"]:
        """The likeliest next token."""
        return self.logits.argmax(-1)

    @cached_property
    def p(self) -> list[Float[Tensor, "position vocabulary"]]:
        """What it predicts, window by window."""
        return [(logits - total[:, None]).exp_() for logits, total in zip(self.logits, self.total, strict=True)]

    def divergence(self, other: "Ran") -> Float[Tensor, "window position"]:
        """KL divergence of another run's prediction from this one's, in nats."""
        expected = [
            torch.einsum("pv,pv->p", p, mine - theirs)
            for p, mine, theirs in zip(self.p, self.logits, other.logits, strict=True)
        ]
        return (torch.stack(expected) + other.total - self.total).clamp(min=0)


def _over(score: Float[Tensor, "*batch"], epsilon: float) -> Float[Tensor, "*batch"]:
    """1 where a score exceeds epsilon, 0 where not, and no number where there is none."""
    return (score > epsilon).float().masked_fill(score.isnan(), torch.nan)


def _summarize(batch: Int[Tensor, "window position"], ran: Ran, clean: Ran, epsilon: float) -> tuple[Tensor, ...]:
    """What `compare` keeps of one batch: an outcome's tensors, window by window."""
    target = batch[:, 1:, None].to(ran.logits.device)
    loss = ran.total - ran.logits.gather(-1, target)[..., 0]
    divergence = torch.zeros_like(loss) if ran is clean else clean.divergence(ran)
    scores = torch.stack([layer[..., 0] for layer in ran.received], 1)  # window, layer, head
    attention = torch.stack([layer.mean(1) for layer in ran.received], 1)  # window, layer, key
    sinks = torch.stack([_over(layer, epsilon).mean(1) for layer in ran.received], 1)
    kept = loss, divergence, ran.best == clean.best, scores, attention, sinks, torch.stack(ran.sizes).amax(0)
    return tuple(tensor.cpu() for tensor in kept)


def _join(what: str, epsilon: float, parts: list[tuple[Tensor, ...]]) -> Outcome:
    loss, divergence, agrees, scores, attention, sinks, largest = map(torch.cat, zip(*parts, strict=True))
    return Outcome(what, epsilon, loss, divergence, agrees, scores, attention.mean(0), sinks.mean(0), largest)


def _first_layer(cut: Sequence[Intervention], anatomy: Anatomy) -> int:
    return min(one.first_layer(anatomy) for one in cut)


class _Passing(torch.nn.Module):
    """Stands where a layer stood that does not run: hands on what it gets, in the form in which that layer would."""

    def __init__(self, layer: torch.nn.Module, in_tuple: bool):
        super().__init__()
        object.__setattr__(self, "stood_for", layer)  # no submodule, so that nobody finds it twice
        self.in_tuple = in_tuple

    def forward(self, hidden_states, *args, **kwargs):
        return (hidden_states,) if self.in_tuple else hidden_states

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "stood_for"), name)


@dataclass(frozen=True)
class Start:
    """How a model is started at a later layer: a change there leaves the layers before it as they were."""

    model: Model
    layers: torch.nn.ModuleList
    in_tuple: bool  # whether they return tuples

    @contextmanager
    def at(self, layer: int, stream: Float[Tensor, "window position d_model"]) -> Iterator[None]:
        """Let the layers before `layer` stand aside while the context lasts, and put in what enters it."""
        own, enters = list(self.layers), self.model.anatomy.layer_hooks[layer]
        try:
            for i in range(layer):
                self.layers[i] = _Passing(own[i], self.in_tuple)
            with self.model.hooks(fwd_hooks=[(enters, lambda value, hook: stream)]):
                yield
        finally:
            for i in range(layer):
                self.layers[i] = own[i]


@torch.inference_mode()
def find_start(model: Model, tokens: Int[Tensor, "n length"], layers: Iterable[int]) -> Start | None:
    """How a model can be started at these layers: done on a few tokens, logits are those of a whole run; else None."""
    whole = getattr(model, "original_model", model)
    lists = [module for module in whole.modules() if isinstance(module, torch.nn.ModuleList) and len(module)]
    stack = next((modules for modules in lists if modules[0] is model.blocks[0]), None)
    later = sorted({layer for layer in layers if layer})
    if stack is None or not later:
        return None
    few, outputs = tokens[:1, :PROBED].to(model.cfg.device), []
    handle = stack[0].register_forward_hook(lambda module, args, output: outputs.append(output))
    try:
        ran = run(model, few, keep=later)
    finally:
        handle.remove()
    if not outputs:  # the model goes through its layers in another way
        return None
    start = Start(model, stack, isinstance(outputs[0], tuple))
    for layer in later:
        try:
            with start.at(layer, ran.entered[layer]):
                resumed = model(few)
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
            return None
        if not torch.equal(ran.output, resumed.float()):
            return None
    return start


@torch.inference_mode()
def run(
    model: Model,
    batch: Int[Tensor, "window position"],
    cut: Sequence[Intervention] = (),
    rows: range | None = None,
    later: tuple[Start, Ran] | None = None,
    keep: Iterable[int] = (),
) -> Ran:
    """Run a batch, windows `rows`, under interventions; `keep` the stream as it enters some layers.

    `later` is how the model is started at a later layer, and the clean run, for what the layers before it did.
    """
    anatomy = model.anatomy
    start, clean = (_first_layer(cut, anatomy), later[1]) if later else (0, None)
    scores = dict(enumerate(clean.received[:start])) if clean else {}
    sizes = dict(enumerate(clean.sizes[:start])) if clean else {}
    entered = {}

    def on_layer(value, hook):
        layer = anatomy.layer_hooks.index(hook.name)
        sizes[layer] = value.abs().amax(-1).float().cpu()
        if layer in keep:
            entered[layer] = value

    def on_pattern(value, hook):
        layer = anatomy.pattern_hooks.index(hook.name)
        sees = in_sight(value.shape[-1], anatomy.sight[layer]).to(value.device)
        by_query = received(value.flatten(0, 1).float(), sees)
        scores[layer] = by_query.unflatten(0, value.shape[:2]).cpu()

    watch = [(name, on_layer) for name in anatomy.layer_hooks[start:]]
    watch += [(name, on_pattern) for name in anatomy.pattern_hooks[start:] if name is not None]
    unseen = torch.full((len(batch), anatomy.n_heads, batch.shape[1]), torch.nan)  # where a layer shows no attention
    scores |= {layer: unseen for layer, name in enumerate(anatomy.pattern_hooks) if name is None}
    with ExitStack() as stack:
        if start:
            stack.enter_context(later[0].at(start, clean.entered[start]))
        stack.enter_context(patched(model, *cut, rows=range(len(batch)) if rows is None else rows))
        stack.enter_context(model.hooks(fwd_hooks=watch))
        output = model(batch).float()
    return Ran(output, *([values for _, values in sorted(by.items())] for by in (scores, sizes)), entered)
