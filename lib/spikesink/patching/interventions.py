"""Change an activation on its way: interventions as small values, and a context in which a model carries them out.

An `Intervention` says what is done (`zero`, `scale`, `set_to`, `add`, or a function of your own), to which activations
(a *site*: `stream`, `write`, `read`, `query`, `key`, `value`, `z`, `attention`, `hook`), at which positions, in which
channels or heads; printed, it is a sentence. `patched` carries out any number of them, in order. Blocks are counted as
in the paper, from 1; layers, positions, channels and heads from 0.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from spikesink.common import progress
from spikesink.model.anatomy import Anatomy, anatomy, body_of, check_ids, check_length, check_tokens
from spikesink.patching.sites import (
    EVERYWHERE,
    MOST_LISTED,
    At,
    Blocks,
    Places,
    Positions,
    Site,
    attention,
    list_places,
    whole_numbers,
    write,
)


@dataclass(frozen=True)
class Scale:
    """Multiply by a factor."""

    factor: float

    def __str__(self) -> str:
        return "zero" if self.factor == 0 else f"scale by {self.factor:g}"

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        """The changed activations [..., *part]."""
        return torch.zeros_like(x) if self.factor == 0 else x * self.factor


@dataclass(frozen=True, eq=False)
class Given:
    """Values [place, position, *part] that are put in the place of what is there, or added to it."""

    values: Tensor = field(repr=False)
    added: float | None = None  # by this factor; None: put in its place

    def __str__(self) -> str:
        return "replace" if self.added is None else f"add {self.added:g} times a vector to"

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        """The changed activations [..., *part]; `order` says which of the positions are there."""
        given = self.values[place if len(self.values) > 1 else 0]
        given = given[order] if order is not None and len(given) > 1 else given
        given = given.to(x.device, x.dtype)
        return given.expand_as(x) if self.added is None else x + self.added * given


@dataclass(frozen=True)
class Apply:
    """A function of the selected activations [..., *part], which returns others of the same shape."""

    function: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return f"apply {getattr(self.function, '__name__', 'a function')} to"

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        """The changed activations [..., *part]."""
        new = self.function(x)
        if not isinstance(new, Tensor):
            raise ValueError(f"the function returned {new!r}; it must return activations of the same shape.")
        if new.shape != x.shape:
            raise ValueError(f"the function made {list(x.shape)} into {list(new.shape)}; the shape must stay the same.")
        return new.to(x.dtype)


Change = Scale | Given | Apply


@dataclass(frozen=True, repr=False)
class Intervention:
    """One change of one kind of activation. Printed, it is a sentence; `patched` and `evaluate` carry it out."""

    site: Site
    change: Change
    positions: Positions = EVERYWHERE
    parts: tuple[int, ...] | None = None  # channels, or heads; None: all

    def __repr__(self) -> str:
        parts, what = self.parts or (), f"{self.site.traits.parts}{'s' if len(self.parts or ()) != 1 else ''}"
        listed = f"{what} {list_places(parts)}" if len(parts) <= MOST_LISTED else f"{len(parts)} {what}"
        which = f"{listed} of " if parts else ""
        return f"{self.change} {which}{self.site} {self.positions}"

    def first_layer(self, about: Anatomy) -> int:
        """The first layer that it touches."""
        layers = []
        for name in self.site.hooks(about):
            head, number = (*name.split("."), "")[:2]
            late = head in ("ln_final", "unembed")
            layers.append(int(number) if head == "blocks" else about.n_layers - 1 if late else 0)
        return min(layers)


def zero(
    site: Site, positions: At = None, channels: Places | None = None, *, heads: Places | None = None
) -> Intervention:
    """Set to zero: all channels, or some; of queries, keys, values, z and attention all heads, or some."""
    return scale(site, 0.0, positions, channels, heads=heads)


def scale(
    site: Site, factor: float, positions: At = None, channels: Places | None = None, *, heads: Places | None = None
) -> Intervention:
    """Multiply by a factor: 1 is the clean run, bit for bit."""
    return _intervention(site, Scale(_factor(factor)), positions, channels, heads)


def _factor(factor: float) -> float:
    if not isinstance(factor, Real):
        raise ValueError(f"a factor must be a number, but is {factor!r}.")
    return float(factor)


def set_to(
    site: Site, values: Tensor, positions: At = None, channels: Places | None = None, *, heads: Places | None = None
) -> Intervention:
    """Put given values in the place of what is there.

    Args:
        site: which activations.
        values: one part for all: [channel] of a stream, a write or a read, [head, d_head] of queries, keys, values or z
            (of the chosen ones only, where channels or heads are given); with a first dimension more, one for each of
            the site's places, as `mean_of` returns it; with two more, [place, position, ...], as `record` returns it.
        positions: one, several, a mask [position] or [window, position]; None: all.
        channels: which; None: all.
        heads: which, where the site has heads.
    """
    return _intervention(site, Given(_given(site, values)), positions, channels, heads)


def add(
    site: Site,
    values: Tensor,
    positions: At = None,
    channels: Places | None = None,
    *,
    heads: Places | None = None,
    factor: float = 1.0,
) -> Intervention:
    """Add `factor` times given values, of shapes as in `set_to`."""
    return _intervention(site, Given(_given(site, values), _factor(factor)), positions, channels, heads)


def skip(block: Blocks, positions: At = None) -> Intervention:
    """Let blocks write nothing."""
    return zero(write(block), positions)


def mask_key(positions: At, layers: Places, heads: Places | None = None) -> Intervention:
    """Let no query attend to the keys at these positions, in these layers (and query heads).

    Raises:
        ValueError: no positions: without any key no attention is left.
    """
    if positions is None:
        raise ValueError("with every key masked no attention is left; name the positions to mask.")
    return zero(attention(layers), positions, heads=heads)


def apply(
    site: Site,
    function: Callable[[Tensor], Tensor],
    positions: At = None,
    channels: Places | None = None,
    *,
    heads: Places | None = None,
) -> Intervention:
    """A change of your own: `function` gets the selected activations [..., part] and returns others of that shape."""
    return _intervention(site, Apply(function), positions, channels, heads)


def _intervention(
    site: Site, change: Change, positions: At, channels: Places | None = None, heads: Places | None = None
) -> Intervention:
    _check_site(site)
    if site.kind == "attention" and isinstance(change, Given | Apply):
        raise ValueError("attention can be scaled or masked; to do anything else to it, name its hook: hook(name).")
    what = site.traits.parts
    parts, other = (channels, heads) if what == "channel" else (heads, channels)
    if other is not None:
        raise ValueError(f"{site} has {what}s; name them as {what}s=.")
    return Intervention(site, change, Positions.of(positions), None if parts is None else whole_numbers(parts, what))


def _check_site(site: Site) -> None:
    if not isinstance(site, Site):
        raise ValueError(f"{site!r} is no site; give one such as stream(mlp(11)), write(mlp(11)) or key(12).")


def _given(site: Site, values: Tensor) -> Tensor:
    """Values as [place, position, *part], in float32 on the CPU."""
    _check_site(site)
    if not isinstance(values, Tensor):
        raise ValueError(f"values must be a tensor, but are {values!r}; torch.tensor makes one.")
    n_dims = site.traits.part_dims
    missing = n_dims + 2 - values.ndim
    if not 0 <= missing <= 2:
        raise ValueError(
            f"values of shape {list(values.shape)} do not fit {site}: give {n_dims} to {n_dims + 2} dimensions."
        )
    values = values.detach().float().cpu()
    values = values[None, None] if missing == 2 else values[:, None] if missing == 1 else values
    if len(values) not in (1, len(site.places)):
        raise ValueError(f"there are values for {len(values)} places, but {site} is {len(site.places)}.")
    return values


def mean_of(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    site: Site,
    positions: At = None,
    channels: Places | None = None,
    *,
    heads: Places | None = None,
) -> Float[Tensor, " place *part"]:
    """The mean of a site's activations over windows and positions, for `set_to`.

    Raises:
        ValueError: as `patched` does.
    """
    return _means(model, tokens, {"": (site, positions, channels, heads)})[""]


def means_of(
    model: TransformerBridge,
    tokens: Int[Tensor, "n length"],
    selected: Mapping[str, tuple[Site, At]],
) -> dict[str, Float[Tensor, " place *part"]]:
    """`mean_of` for several sites in one pass: each given as site and positions."""
    return _means(model, tokens, selected)


def _means(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], of: Mapping[str, tuple]
) -> dict[str, Float[Tensor, " place *part"]]:
    sums = {name: [[0.0, 0] for _ in site.places] for name, (site, *_) in of.items()}

    def taking(name: str, site: Site) -> Callable:
        def take(place: int, x: Tensor, order: Tensor | None) -> None:
            x = x.flatten(0, -(site.traits.part_dims + 1)).float().cpu()
            sums[name][place][0] += x.sum(0)
            sums[name][place][1] += len(x)

        return take

    _watch(model, tokens, {name: (site, *rest, taking(name, site)) for name, (site, *rest) in of.items()})
    return {name: torch.stack([total / n for total, n in places]) for name, places in sums.items()}


def record(
    model: TransformerBridge,
    tokens: Int[Tensor, " length"],
    site: Site,
    positions: At,
    channels: Places | None = None,
    *,
    heads: Places | None = None,
) -> Float[Tensor, " place position *part"]:
    """A site's activations at given positions of one prompt, for `set_to`: activation patching proper.

    Raises:
        ValueError: as `patched` does.
    """
    found: dict[int, Tensor] = {}
    tokens = one_prompt(tokens)

    def take(place: int, x: Tensor, order: Tensor | None) -> None:
        found[place] = x.flatten(0, -(site.traits.part_dims + 1)).float().cpu()

    _watch(model, tokens, {"": (site, positions, channels, heads, take)})
    return torch.stack([found[i] for i in range(len(site.places))])


def one_prompt(tokens: Int[Tensor, " length"]) -> Int[Tensor, " length"]:
    """A single prompt, also out of a batch of one.

    Raises:
        ValueError: no token ids, or several prompts.
    """
    check_ids(tokens)
    if tokens.ndim == 2 and len(tokens) == 1:
        return tokens[0]
    if tokens.ndim != 1:
        raise ValueError(f"one prompt is wanted, but tokens are {list(tokens.shape)}; give one row of them.")
    return tokens


def patch_from(
    model: TransformerBridge,
    tokens: Int[Tensor, " length"],
    site: Site,
    positions: At,
    into: At = None,
    channels: Places | None = None,
    *,
    heads: Places | None = None,
) -> Intervention:
    """Put in what another prompt has at these positions of a site.

    Args:
        model: as `load` returns it.
        tokens: the other prompt.
        site: which activations.
        positions: of the other prompt.
        into: as many positions of the prompt that is patched; by default the same.
        channels: which; None: all.
        heads: which, where the site has heads.
    """
    values = record(model, tokens, site, positions, channels, heads=heads)
    target = Positions.of(positions if into is None else into)
    if target.same is None or len(target.same) != values.shape[1]:
        raise ValueError(f"{values.shape[1]} positions were recorded; name as many to put them into.")
    return set_to(site, values, target.same, channels, heads=heads)


@dataclass(frozen=True, eq=False)
class _Take:
    """Hand on what passes, and change nothing."""

    take: Callable[[int, Tensor, Tensor | None], None]

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        self.take(place, x, order)
        return x


def _watch(model: TransformerBridge, tokens: Int[Tensor, "n length"], of: Mapping[str, tuple]) -> None:
    """Run windows once, and hand what passes to each of `of`: site, positions, channels and heads, and who takes it."""
    about, watches = anatomy(model), []
    for site, at, *parts, take in of.values():
        if site.kind == "attention":
            raise ValueError("attention is not averaged or recorded; scale it, or look at it with trace.profile.")
        watches.append(_intervention(site, _Take(take), at, *parts))
    tokens = checked(model, tokens, watches)
    with torch.inference_mode():
        for rows in progress(batches(about, tokens), "recording", "batch"):
            with patched(model, *watches, rows=rows):
                model(tokens[rows.start : rows.stop].to(model.cfg.device))


def checked(
    model: TransformerBridge, tokens: Int[Tensor, "n length"], interventions: Sequence[Intervention]
) -> Int[Tensor, "n length"]:
    """Windows that interventions can be carried out on; a single prompt becomes one window.

    Raises:
        ValueError: no tokens, tokens that are not in the vocabulary, too many for the context; a position that does not
            exist in the windows, or a mask for another number of windows; what `patched` refuses.
    """
    if not hasattr(model, "hook_dict"):
        raise ValueError(f"{model!r} is no model; give what load returned.")
    check_ids(tokens)
    _check_interventions(interventions)
    about = anatomy(model)
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    check_tokens(model, tokens)
    n, length = tokens.shape
    check_length(model, length)
    for intervention in interventions:
        positions = intervention.positions
        if positions.last() >= length:
            raise ValueError(f"position {positions.last()} does not exist; there are positions 0 to {length - 1}.")
        if positions.by_window is not None and len(positions.by_window) != n:
            raise ValueError(f"the positions are of {len(positions.by_window)} windows, but there are {n}.")
        _hooks_of(model, about, intervention)
    return tokens


def _check_interventions(interventions: Sequence[Intervention]) -> None:
    if wrong := [one for one in interventions if not isinstance(one, Intervention)]:
        raise ValueError(f"{wrong[0]!r} is no intervention; of a list of them, give each by itself: *cuts.")


def batches(about: Anatomy, tokens: Int[Tensor, "n length"]) -> list[range]:
    """Windows to run side by side: as many as make good use of a processor, and hold logits in 256 MB."""
    n, length = tokens.shape
    size = max(1, min(1024 // length, 2**26 // (length * about.d_vocab)))
    return [range(i, min(n, i + size)) for i in range(0, n, size)]


class _Run:
    """What a patched model knows while it runs: which windows, how many tokens a cache holds, what took effect."""

    def __init__(self, rows: range | None):
        self.rows, self.offset, self.n_runs = rows, 0, 0
        self.fired: set[int] = set()
        self.reached: set[int] = set()

    def windows(self, intervention: Intervention, x: Tensor) -> range:
        """Which windows a tensor holds."""
        given = intervention.positions.by_window
        if self.rows is None and given is not None and len(given) != len(x):
            raise ValueError(f"the positions are of {len(given)} windows, but the model was given {len(x)}.")
        return range(len(x)) if self.rows is None else self.rows

    def before(self, module, args, kwargs) -> None:
        cache = kwargs.get("past_key_values")
        self.offset = 0 if cache is None else int(cache.get_seq_length())
        self.n_runs += 1


@contextmanager
def patched(model: TransformerBridge, *interventions: Intervention, rows: range | None = None) -> Iterator[None]:
    """Carry out interventions, in order, while the context lasts; during `generate` as well, KV cache included.

    Positions count from the start of the prompt, so in generation those beyond it are generated tokens. Afterwards the
    model is as it was, also after an exception.

    Args:
        model: as `load` returns it, or any HookedRootModule with an `anatomy`.
        interventions: what to do.
        rows: which windows the model is about to get, where positions differ between windows; by default all.

    Raises:
        ValueError: a block, layer, head, channel or hook that this model does not have, or values of the wrong size.
        RuntimeError: on leaving, if one never took effect though the model ran.
    """
    _check_interventions(interventions)
    run, about, edits, between = _Run(rows), anatomy(model), [], []
    for i, intervention in enumerate(interventions):
        edits += _bound(model, about, i, intervention, run, between)
    handle = body_of(model).register_forward_pre_hook(run.before, with_kwargs=True)
    try:
        with warnings.catch_warnings(), model.hooks(fwd_hooks=[*edits, *between]):
            warnings.filterwarnings("ignore", message="A forward hook edited")  # that is what it is for
            yield
    finally:
        handle.remove()
    for i, intervention in enumerate(interventions):
        if run.n_runs and i not in run.fired:
            raise RuntimeError(f"a hook of this {about.family} model never fired, so nothing came of: {intervention}.")
        if run.n_runs and rows is None and i not in run.reached:
            raise RuntimeError(f"no token stood at any of its positions, so nothing came of: {intervention}.")


def _hooks_of(model, about: Anatomy, intervention: Intervention) -> tuple[str, ...]:
    """The hooks that an intervention edits; checked, so that what is wrong is said before anything runs."""
    names = intervention.site.hooks(about)
    for name in names:
        if name not in model.hook_dict:
            raise ValueError(f"this {about.family} model has no hook {name}; model.hook_dict lists those it has.")
    _check_parts(about, intervention)
    return names


def _bound(model, about: Anatomy, number: int, intervention: Intervention, run: _Run, between: list) -> list[tuple]:
    """An intervention's hooks on one model; `between` gets those that its changes between attention and FFN need."""
    site, hooks = intervention.site, []
    edit = _edit_pattern if site.kind == "attention" else _edit
    for place, name in enumerate(_hooks_of(model, about, intervention)):

        def hooked(x, hook, place=place):
            run.fired.add(number)
            try:
                return edit(x, intervention, place, run, number)
            except (IndexError, RuntimeError) as error:
                if site.kind != "hook":
                    raise
                message = f"what passes there is {list(x.shape)}, which does not fit: {intervention}."
                raise ValueError(message) from error

        if site.kind == "stream" and site.places[place].is_attention:
            hooked = _between(about, site.places[place], hooked, between)
        hooks.append((name, hooked))
    return hooks


def _check_parts(about: Anatomy, intervention: Intervention) -> None:
    kind, parts, change = intervention.site.kind, intervention.parts, intervention.change
    n_heads = about.n_kv_heads if kind in ("key", "value") else about.n_heads
    what = intervention.site.traits.parts
    n = n_heads if what == "head" else about.d_model
    if kind == "hook":
        return
    if parts is not None and not 0 <= min(parts) <= max(parts) < n:
        wrong = min(parts) if min(parts) < 0 else max(parts)
        raise ValueError(f"{what} {wrong} does not exist; there are {what}s 0 to {n - 1} in {intervention.site}.")
    if not isinstance(change, Given):
        return
    size = n if parts is None else len(parts)
    wanted = [size, about.d_head][: intervention.site.traits.part_dims]
    got = list(change.values.shape[2:])
    if any(g not in (1, w) for g, w in zip(got, wanted, strict=True)):
        raise ValueError(f"the values are {got}, but {intervention.site} takes {wanted}.")
    count = intervention.positions
    n_positions = len(count.same) if count.same is not None else sum(map(len, count.by_window or ()))
    if change.values.shape[1] not in (1, n_positions):
        raise ValueError(f"there are values for {change.values.shape[1]} positions, but it is {n_positions} of them.")


def _edit(x: Tensor, intervention: Intervention, place: int, run: _Run, number: int) -> Tensor:
    """Change a tensor [window, position, *part]."""
    index, order = intervention.positions.index(run.windows(intervention, x), run.offset, x.shape[1])
    if index is None:
        return x
    run.reached.add(number)
    index = tuple(i.to(x.device) if isinstance(i, Tensor) else i for i in index)
    x = x.clone()
    chosen, parts = x[index], intervention.parts
    if parts is None:
        x[index] = intervention.change(chosen, place, order)
        return x
    axis = -intervention.site.traits.part_dims
    parts = torch.tensor(parts, device=x.device)
    x[index] = chosen.index_copy(
        axis, parts, intervention.change(chosen.index_select(axis, parts), place, order).contiguous()
    )
    return x


def _edit_pattern(x: Tensor, intervention: Intervention, place: int, run: _Run, number: int) -> Tensor:
    """Change a pattern [window, head, query, key] at some keys, and let each query's attention add up to 1 again."""
    first = run.offset + x.shape[2] - x.shape[3]  # a cache with a sliding window has let go of the earliest keys
    index, order = intervention.positions.index(run.windows(intervention, x), first, x.shape[3])
    if index is None:
        return x
    run.reached.add(number)
    keys = torch.zeros(len(x), x.shape[3], dtype=torch.bool, device=x.device)
    keys[tuple(i.to(x.device) if isinstance(i, Tensor) else i for i in index)] = True
    heads = slice(None) if intervention.parts is None else torch.tensor(intervention.parts, device=x.device)
    old = x[:, heads]
    new = torch.where(keys[:, None, None], intervention.change(old, place, order), old)
    total = new.sum(-1, keepdim=True)
    changed = (new != old).any(-1, keepdim=True) & (total > 0)
    x = x.clone()
    x[:, heads] = torch.where(changed, new / total, old)
    return x


def _between(about: Anatomy, point: int, hooked: Callable, between: list) -> Callable:
    """A change of the stream between a layer's attention and its FFN, as one of what the attention writes."""
    seen = {}
    between.append((about.layer_hooks[point // 2], lambda x, hook: seen.update(stream=x)))

    def written(write, hook):
        before = seen["stream"] + write
        after = hooked(before, hook)
        return write if after is before else torch.where(after != before, after - seen["stream"], write)

    return written
