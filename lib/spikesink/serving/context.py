"""Long contexts: sink, spike and perplexity by length, to a model's limit and past it; recall by depth.

Running a long text takes minutes, so what it gave is kept in a file, for one model, one text and one way to measure.
"""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from spikesink.chain.trace import EPSILON
from spikesink.common import NotApplicable, measure, progress, write_atomically, writing_to
from spikesink.model import texts
from spikesink.model.anatomy import Model, body_of
from spikesink.model.proof import require
from spikesink.patching import Outcome, compare
from spikesink.patching.behaviour import PLACES, THINGS, asked, ids_of
from spikesink.patching.outcome import CLEAN, student_interval
from spikesink.serving.cache import (
    FULL,
    HEAVY,
    OTHERS,
    SHIFTED,
    WINDOW,
    WITH_FIRST,
    BoundedCache,
    Policy,
    cache_policies,
    forget,
    run_bounded,
    token_losses,
)

CHUNK = 128
BLOCK = 64  # predictions that are drawn together where an interval is made: neighbours are not independent
LONG_BLOCK = 512  # the same of a whole text: pieces of 64 are still like their neighbours
OTHER = 1  # the position that position 0 is compared with
MOST = 1.6e10  # entries of attention: a minute or so on two cores
PAST = 1.25  # times a model's limit
DEPTHS = (0.05, 0.35, 0.65, 0.95)
BUDGET = 256  # keys that the bounded caches hold on the long text
LONG = 4 * BUDGET  # tokens that make a text long
POLICIES = {name: cache_policies(BUDGET)[name] for name in (WINDOW, WITH_FIRST, SHIFTED)}
POLICIES[OTHERS] = Policy(BUDGET - 4, (97, 98, 99, 100))
RECOMPUTED = "window recomputed"
FILE = "10-long.safetensors"
MEASURES = 3  # of what a file holds, to be raised when that changes; one of other measures is not read


def perplexity_interval(loss: Float[Tensor, "window prediction"], block: int = BLOCK) -> tuple[float, float]:
    """Student's 95% interval of exp of a mean loss, over pieces of so many predictions; NaN of one piece."""
    return student_interval(torch.cat([piece.mean(1) for piece in loss.split(block, 1)]).double().numpy())


@dataclass(frozen=True)
class Lengths:
    """Sink, spike and loss along a text, in stretches: each from one length to before the next."""

    lengths: tuple[int, ...]  # the end of each stretch; the first one begins at 0
    limit: int  # the model's context
    epsilon: float
    score: Float[Tensor, "stretch window layer head"]  # position 0's attention from all queries up to this length
    late: Float[Tensor, "stretch layer head"]  # from the queries of this stretch alone, mean over windows
    other: Float[Tensor, "stretch layer head"]  # the same of position OTHER
    loss: Float[Tensor, "window prediction"]  # cross-entropy of the next token, nats
    largest: Float[Tensor, "window position"]  # max |h| over channels, as the stream enters layers and leaves the last
    sight: tuple[int | None, ...]  # of each layer: how far back a query sees, itself included; None: to position 0
    seconds: float

    @property
    def sink_ratios(self) -> list[float]:
        """Share of windows, layers and heads whose score at each length exceeds epsilon."""
        return (self.score > self.epsilon).float().mean((1, 2, 3)).tolist()

    @property
    def full_sight(self) -> list[int]:
        """The layers in which every query sees position 0."""
        return [layer for layer, sight in enumerate(self.sight) if sight is None or sight >= self.lengths[-1]]

    def late_ratios(self, epsilon: float | None = None, other: bool = False) -> list[float]:
        """Share of heads, in layers of full sight, in which each stretch's queries give position 0 more than epsilon.

        Or, as a control, position OTHER.
        """
        attention = (self.other if other else self.late)[:, self.full_sight]
        return (attention > (epsilon or self.epsilon)).float().mean((1, 2)).tolist()

    def _split(self, values: Float[Tensor, "window position"]) -> list[Float[Tensor, "window part"]]:
        starts = (0, *self.lengths[:-1])
        return [values[:, start:end] for start, end in zip(starts, self.lengths, strict=True)]

    @property
    def perplexities(self) -> list[float]:
        """exp of the mean loss of each stretch's predictions."""
        return [float(part.mean().exp()) for part in self._split(self.loss)]

    def intervals(self) -> list[tuple[float, float]]:
        """The interval of each stretch's perplexity."""
        return [perplexity_interval(part) for part in self._split(self.loss)]

    @property
    def first(self) -> float:
        """The largest entry of the stream at position 0, median over windows; it does not depend on the length."""
        return float(self.largest[:, 0].median())

    @property
    def elsewhere(self) -> list[float]:
        """The largest entry of the stream in each stretch, without position 0."""
        first, *rest = self._split(self.largest)
        return [float(part.max()) for part in (first[:, 1:], *rest)]


def choose_lengths(
    model: Model, source: str | texts.Text = "house", most: float = MOST
) -> tuple[Int[Tensor, "1 position"], tuple[int, ...]]:
    """The beginning of a text, to a quarter past a model's limit if that fits, and lengths to measure at.

    `most` is how many entries of attention, over all layers and heads, may be computed.
    """
    anatomy = model.anatomy
    anatomy.require_attention()
    ids = torch.cat([torch.tensor(texts.bos(model), dtype=torch.long), texts.all_ids(model, source)])
    rotates = any("Rotary" in type(module).__name__ for module in body_of(model).modules())  # else positions run out
    limit = anatomy.context * (PAST if rotates else 1)
    longest = int(min(len(ids), limit, (2 * most / (anatomy.n_layers * anatomy.n_heads)) ** 0.5))
    within = min(longest, anatomy.context)
    lengths = [2**power for power in range(8, within.bit_length()) if 2**power <= within]
    if within > 1.2 * max(lengths, default=1):
        lengths.append(within)
    if longest > within:
        lengths.append(longest)
    return ids[None, : lengths[-1]], tuple(lengths)


def measure_lengths(
    model: Model,
    tokens: Int[Tensor, "window position"],
    lengths: Sequence[int],
    chunk: int = CHUNK,
    epsilon: float = EPSILON,
) -> Lengths:
    """Run long windows once, `chunk` tokens at a time with every key in the cache, and measure at each length."""
    lengths = tuple(lengths)
    if list(lengths) != sorted(set(lengths)) or not lengths or lengths[0] < 2 or lengths[-1] > tokens.shape[1]:
        raise ValueError(f"lengths must rise from at least 2 to the windows' {tokens.shape[1]}, but are {lengths}.")
    begun, tokens, sight = time.perf_counter(), tokens[:, : lengths[-1]], model.anatomy.sight
    attention, largest, loss = _run_in_chunks(model, tokens, [0, min(OTHER, lengths[0] - 1)], chunk)
    sees = torch.stack([torch.arange(lengths[-1]) < (reach or torch.inf) for reach in sight])  # layer, query
    attention = attention * sees[:, None, :, None]

    def mean_attention(start: int, end: int) -> Float[Tensor, "window layer head place"]:
        n = sees[:, start:end].sum(1).clamp(min=1)
        return attention[:, :, :, start:end].sum(3) / n[:, None, None]

    stretches = zip((0, *lengths[:-1]), lengths, strict=True)
    late, other = torch.stack([mean_attention(*stretch).mean(0) for stretch in stretches]).unbind(-1)
    score = torch.stack([mean_attention(0, end)[..., 0] for end in lengths])
    seconds = time.perf_counter() - begun
    return Lengths(lengths, model.anatomy.context, epsilon, score, late, other, loss, largest, sight, seconds)


def _run_in_chunks(model: Model, tokens: Int[Tensor, "window position"], places: list[int], chunk: int):
    """Attention to places [window, layer, head, query, place], largest entries and losses [window, position]."""
    anatomy, bounded, now = model.anatomy, BoundedCache(model, Policy()), {}
    attention, largest, losses = [], [], []

    def on_pattern(value, hook):
        now[hook.name] = value[..., places].float().cpu()

    def on_layer(value, hook):
        now[hook.name] = value.abs().amax(-1).float().cpu()

    watch = [(name, on_pattern) for name in anatomy.pattern_hooks] + [(name, on_layer) for name in anatomy.layer_hooks]
    for start in progress(range(0, tokens.shape[1], chunk), "long context", "chunk"):
        with model.hooks(fwd_hooks=watch):
            logits = bounded(tokens[:, start : start + chunk])
        attention.append(torch.stack([now[name] for name in anatomy.pattern_hooks], 1))
        largest.append(torch.stack([now[name] for name in anatomy.layer_hooks]).amax(0))
        losses.append(token_losses(logits, tokens[:, start + 1 : start + chunk + 1]))
    return torch.cat(attention, 3), torch.cat(largest, 1), torch.cat(losses, 1)


@dataclass(frozen=True)
class LongRun:
    """One long text through a full cache, and its losses through some that do not keep everything, by their names."""

    lengths: Lengths
    streams: Mapping[str, Float[Tensor, "window prediction"]]

    def times(self, name: str) -> tuple[float, float, float]:
        """How many times the full cache's perplexity a stream's is, and its interval over pieces of the text."""
        more = self.streams[name] - self.lengths.loss
        return float(more.mean().exp()), *perplexity_interval(more, LONG_BLOCK)

    def perplexity(self, name: str) -> float:
        """exp of a stream's mean loss."""
        return float(self.streams[name].mean().exp())


@measure
def measure_long(model: Model, source: str | texts.Text = "house", most: float = MOST) -> LongRun:
    """Run a text as `choose_lengths` cuts it, through a full cache and, where keys can be hidden, bounded ones."""
    require(model, "writes", "patterns")
    tokens, lengths = choose_lengths(model, source, most)
    streams = {}
    with suppress(NotApplicable):
        for name, policy in POLICIES.items():
            streams[name] = run_bounded(model, tokens, policy, chunk=BUDGET)
    streams[RECOMPUTED] = run_recomputed(model, tokens)
    return LongRun(measure_lengths(model, tokens, lengths), streams)


@torch.inference_mode()
def run_recomputed(
    model: Model, tokens: Int[Tensor, "window position"], budget: int = BUDGET
) -> Float[Tensor, "window prediction"]:
    """Losses where each token is predicted from a new run of the 3/4 of `budget` tokens before it, or more.

    That is what so few tokens tell a model, whichever keys a cache would have kept.
    """
    new, losses, bos = budget // 4, [], torch.tensor([texts.bos(model)], dtype=torch.long)
    for start in progress(range(0, tokens.shape[1] - 1, new), "recomputing the window", "chunk"):
        end = min(start + new, tokens.shape[1] - 1)
        part = tokens[:, max(0, end - budget) : end]
        if end > budget:  # it begins in the middle of the text: BOS takes the place of the first token
            part = torch.cat([bos.expand(len(part), -1), part[:, bos.shape[1] :]], 1)
        logits = model(part.to(model.cfg.device))[:, start - end :]
        losses.append(token_losses(logits, tokens[:, start + 1 : end + 1]))
    return torch.cat(losses, 1)


@measure
def load_or_measure(
    model: Model, source: str, folder: Path, others: Iterable[Path] = (), most: float = MOST
) -> LongRun:
    """`measure_long`, out of `folder` or one of `others` where that was done before; else it is kept in `folder`."""
    text = texts.read(source)
    policies = {name: repr(policy) for name, policy in POLICIES.items()}
    key = json.dumps([MEASURES, model.source.sha256, str(model.cfg.dtype), text.sha256, f"{most:g}", policies])
    for place in (folder, *others):
        if (kept := _load(place / FILE, key)) is not None:
            return kept
    made = measure_long(model, text, most)
    fields = vars(made.lengths)
    numbers = {name: value for name, value in fields.items() if not isinstance(value, Tensor)}
    tensors = {name: value.contiguous() for name, value in fields.items() if isinstance(value, Tensor)}
    tensors |= {f"stream {name}": loss.contiguous() for name, loss in made.streams.items()}
    with writing_to(folder):
        write_atomically(folder / FILE, save(tensors, {"key": key, "numbers": json.dumps(numbers)}))
    return made


def _load(path: Path, key: str) -> LongRun | None:
    """What a file holds, if it is of this key; a damaged one counts as none."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except SafetensorError:
        return None
    names = [name for name in (*POLICIES, RECOMPUTED) if f"stream {name}" in tensors]
    streams = {name: tensors.pop(f"stream {name}") for name in names}
    numbers = json.loads(metadata["numbers"])
    numbers |= {name: tuple(numbers[name]) for name in ("lengths", "sight")}
    return LongRun(Lengths(**numbers, **tensors), streams)


@dataclass(frozen=True)
class Needles:
    """Prompts that say once where a thing is, at some depth of another text, and ask for it in the end."""

    tokens: Int[Tensor, "prompt length"]
    answer: tuple[slice, ...]  # which predictions are the answer's, by prompt
    depth: tuple[float, ...]  # the share of the text that comes before
    told: tuple[bool, ...]  # whether the answer is told; else another place is, as a control

    def gain_by_depth(self, outcome: Outcome) -> dict[float, float]:
        """How many nats likelier each token of the answer is where it was told than where another was."""
        loss = [float(row[answer].mean()) for row, answer in zip(outcome.loss, self.answer, strict=True)]
        frame = pd.DataFrame({"depth": self.depth, "told": self.told, "loss": loss})
        means = frame.groupby(["depth", "told"])["loss"].mean().unstack()
        return (means[False] - means[True]).to_dict()


@dataclass(frozen=True)
class Recall:
    """What caches keep of a fact, and of the text around it, by their names; the full cache first."""

    gained: Mapping[str, Mapping[float, float]]  # nats a token of the answer, by depth
    perplexity: Mapping[str, float]


@measure
def measure_recall(
    model: Model,
    filler: Int[Tensor, " token"],
    length: int,
    budget: int,
    n: int = 2,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> Recall:
    """Ask for a fact under caches of `budget` keys; the prompts are those of `make_needles`."""
    needles, policies = make_needles(model, filler, length, n, depths, seed), cache_policies(budget)
    cuts = {name: forget(model, policies[name]) for name in (WINDOW, WITH_FIRST, HEAVY)}
    outcomes = compare(model, needles.tokens, cuts)
    outcomes = {FULL: outcomes.pop(CLEAN), **outcomes}
    gained = {name: needles.gain_by_depth(outcome) for name, outcome in outcomes.items()}
    return Recall(gained, {name: outcome.perplexity for name, outcome in outcomes.items()})


def make_needles(
    model: Model,
    filler: Int[Tensor, " token"],
    length: int,
    n: int = 2,
    depths: Sequence[float] = DEPTHS,
    seed: int = 0,
) -> Needles:
    """Hide a sentence at several depths of a text, and ask for it in the end; beside each, one that says another place.

    `n` things are hidden in `filler`, a text in tokens without BOS, each at all depths; prompts have `length` tokens.
    """
    generator = torch.Generator().manual_seed(seed)
    things = [THINGS[i] for i in torch.randperm(len(THINGS), generator=generator)[:n]]
    places = [PLACES[i] for i in torch.randperm(len(PLACES), generator=generator)]
    begin, prompts = texts.bos(model), []
    for i, thing in enumerate(things):
        question, size = asked(model, f"\nSo, once more: the {thing} is in the", places[i])
        for depth in depths:
            for told, place in ((True, places[i]), (False, places[-1 - i])):
                fact = ids_of(model, f"\nThe {thing} is in the {place}.\n")
                room = length - len(begin) - len(fact) - len(question)
                if room < 1 or room > len(filler):
                    raise NotApplicable(
                        f"prompts of {length} tokens need {max(room, 1)} of text, and there are {len(filler)}; "
                        "give another length or a longer text"
                    )
                text, before = filler[:room].tolist(), round(depth * room)
                row = [*begin, *text[:before], *fact, *text[before:], *question]
                prompts.append((row, slice(length - size - 1, length - 1), depth, told))
    rows, *columns = zip(*prompts, strict=True)
    return Needles(torch.tensor(rows), *columns)
