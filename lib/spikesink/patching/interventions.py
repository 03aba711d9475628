"""Change an activation on its way: interventions as small values, and a context in which a model carries them out.

An `Intervention` says what is done (`zero`, `scale`, `set_to`, `add`, or a function of your own), to which activations
(a *site*: `stream`, `write`, `read`, `query`, `key`, `value`, `z`, `attention`, `hook`), at which positions, in which
channels or heads; printed, it is a sentence. `patched` carries out any number of them, in order.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Real

import torch
from jaxtyping import Int
from torch import Tensor

from spikesink.model.anatomy import Anatomy, Model, anatomy, before_each_run, check_ids, check_length, check_tokens
from spikesink.patching.sites import (
    EVERYWHERE,
    MOST_LISTED,
    At,
    Blocks,
    Parts,
    Places,
    Positions,
    Site,
    Tokens,
    attention,
    list_places,
    whole_numbers,
    write,
)


@dataclass(frozen=True)
class Scale:
    """Multiply by a factor."""

    factor: Real

    def __str__(self) -> str:
        return "zero" if self.factor == 0 else f"scale by {self.factor:g}"

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        """The changed activations."""
        return torch.zeros_like(x) if self.factor == 0 else x * self.factor


@dataclass(frozen=True, eq=False)
class Given:
    """Values [place, position, *part] that are put in the place of what is there, or added to it."""

    values: Tensor = field(repr=False)
    added: Real | None = None  # by this factor; None: put in its place

    def __str__(self) -> str:
        return "replace" if self.added is None else f"add {self.added:g} times a vector to"

    def __call__(self, x: Tensor, place: int, order: Tensor | None) -> Tensor:
        """The changed activations."""
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
        """The changed activations."""
        new = self.function(x)
        if not isinstance(new, Tensor):
            raise ValueError(f"the function returned {new!r}; it must return activations of the same shape.")
        if new.shape != x.shape:
            raise ValueError(f"the function made {list(x.shape)} into {list(new.shape)}; the shape must stay the same.")
        return new.to(x.dtype)


@dataclass(frozen=True)
class Hide:
    """Keys that are hidden: a function of attention [window, head, query, key] and the positions of queries and keys.

    In generation these are not the places in the tensor: queries come one by one, and a sliding window lets go of keys.
    """

    function: Callable[[Tensor, Tensor, Tensor], Tensor]
    what: str

    def __str__(self) -> str:
        return f"let {self.what} limit"


# From selected activations [..., *part], the place they are of, and which of the positions are there, to changed ones.
Change = Callable[[Tensor, int, Tensor | None], Tensor] | Hide


@dataclass(frozen=True, repr=False)
class Intervention:
    """One change of one kind of activation. Printed, it is a sentence; `patched` and `evaluate` carry it out."""

    site: Site
    change: Change
    positions: Positions = EVERYWHERE
    parts: tuple[int, ...] | None = None  # channels, or heads; None: all

    def __repr__(self) -> str:
        which = ""
        if self.parts is not None:
            word = f"{self.site.traits.parts}{'s' if len(self.parts) > 1 else ''}"
            many = len(self.parts) > MOST_LISTED
            which = f"{len(self.parts)} {word} of " if many else f"{word} {list_places(self.parts)} of "
        return f"{self.change} {which}{self.site} {self.positions}"

    def first_layer(self, anatomy: Anatomy) -> int:
        """The first layer that it touches."""
        hooks = [name.split(".") for name in self.site.hooks(anatomy)]
        outside = {"ln_final": anatomy.n_layers - 1, "unembed": anatomy.n_layers - 1}
        return min(int(path[1]) if path[0] == "blocks" else outside.get(path[0], 0) for path in hooks)


def zero(site: Site, positions: At = None, channels: Parts = None, heads: Parts = None) -> Intervention:
    """Set to zero: all channels, or some; of queries, keys, values, z and attention all heads, or some."""
    return scale(site, 0.0, positions, channels, heads)


def scale(site: Site, factor: Real, positions: At = None, channels: Parts = None, heads: Parts = None) -> Intervention:
    """Multiply by a factor: 1 is the clean run, bit for bit."""
    return intervene(site, Scale(_factor(factor)), positions, channels, heads)


def set_to(
    site: Site, values: Tensor, positions: At = None, channels: Parts = None, heads: Parts = None
) -> Intervention:
    """Put given values in the place of what is there.

    Args:
        values: one part for all: [channel] of a stream, a write or a read, [head, d_head] of queries, keys, values or z
            (of the chosen ones only, where channels or heads are given); with a first dimension more, one for each of
            the site's places, as `mean_of` returns it; with two more, [place, position, ...], as `record` returns it.
        positions: one, several, a mask [position] or [window, position]; None: all.
        channels, heads: which of a stream, a write or a read; or of queries, keys, values, z or attention.
    """
    return intervene(site, Given(_values(site, values)), positions, channels, heads)


def add(
    site: Site, values: Tensor, positions: At = None, channels: Parts = None, heads: Parts = None, factor: Real = 1.0
) -> Intervention:
    """Add `factor` times given values, of shapes as in `set_to`."""
    return intervene(site, Given(_values(site, values), _factor(factor)), positions, channels, heads)


def apply(
    site: Site, function: Callable[[Tensor], Tensor], positions: At = None, channels: Parts = None, heads: Parts = None
) -> Intervention:
    """A change of your own: `function` gets the selected activations [..., part] and returns others of that shape."""
    return intervene(site, Apply(function), positions, channels, heads)


def skip(block: Blocks, positions: At = None) -> Intervention:
    """Let blocks write nothing."""
    return zero(write(block), positions)


def mask_key(positions: At, layers: Places, heads: Parts = None) -> Intervention:
    """Let no query attend to the keys at these positions, in these layers (and query heads)."""
    if positions is None:
        raise ValueError("with every key masked no attention is left; name the positions to mask.")
    return zero(attention(layers), positions, heads=heads)


def _factor(factor: Real) -> float:
    if not isinstance(factor, Real):
        raise ValueError(f"a factor must be a number, but is {factor!r}.")
    return float(factor)


def intervene(
    site: Site, change: Change, positions: At = None, channels: Parts = None, heads: Parts = None
) -> Intervention:
    """Any change of a site's activations, at some positions, of all its channels or heads, or some."""
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


def _values(site: Site, values: Tensor) -> Tensor:
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


def checked(model: Model, tokens: Tokens, interventions: Sequence[Intervention]) -> Int[Tensor, "n length"]:
    """Windows that interventions can be carried out on, else ValueError; a single prompt becomes one window."""
    if not hasattr(model, "hook_dict"):
        raise ValueError(f"{model!r} is no model; give what load returned.")
    check_ids(tokens)
    anatomy(model)  # which a bridge of one's own gets here
    tokens = tokens[None] if tokens.ndim == 1 else tokens
    check_tokens(model, tokens)
    n, length = tokens.shape
    check_length(model, length)
    for intervention in interventions:
        _check(model, intervention)
        positions = intervention.positions
        if positions.last() >= length:
            raise ValueError(f"position {positions.last()} does not exist; there are positions 0 to {length - 1}.")
        if positions.by_window is not None and len(positions.by_window) != n:
            raise ValueError(f"the positions are of {len(positions.by_window)} windows, but there are {n}.")
    return tokens


def _check(model: Model, intervention: Intervention) -> None:
    """Raise ValueError where an intervention cannot be carried out on a model."""
    if not isinstance(intervention, Intervention):
        raise ValueError(f"{intervention!r} is no intervention; of a list of them, give each by itself: *cuts.")
    anatomy, site, parts, change = model.anatomy, intervention.site, intervention.parts, intervention.change
    for name in site.hooks(anatomy):
        if name not in model.hook_dict:
            raise ValueError(f"this {anatomy.family} model has no hook {name}; model.hook_dict lists those it has.")
    if site.kind == "hook":
        return
    what, n = site.traits.parts, anatomy.d_model
    if what == "head":
        n = anatomy.n_kv_heads if site.kind in ("key", "value") else anatomy.n_heads
    if parts is not None and not 0 <= min(parts) <= max(parts) < n:
        wrong = min(parts) if min(parts) < 0 else max(parts)
        raise ValueError(f"{what} {wrong} does not exist; there are {what}s 0 to {n - 1} in {site}.")
    if not isinstance(change, Given):
        return
    wanted = [n if parts is None else len(parts), anatomy.d_head][: site.traits.part_dims]
    _, n_given, *shape = change.values.shape
    if any(given not in (1, size) for given, size in zip(shape, wanted, strict=True)):
        raise ValueError(f"the values are {shape}, but {site} takes {wanted}.")
    if n_given not in (1, len(intervention.positions)):
        raise ValueError(f"there are values for {n_given} positions, but it is {len(intervention.positions)} of them.")


def batches(anatomy: Anatomy, tokens: Int[Tensor, "n length"]) -> list[range]:
    """Windows to run side by side: as many as make good use of a processor, and hold logits in 256 MB."""
    n, length = tokens.shape
    size = max(1, min(1024 // length, 2**26 // (length * anatomy.d_vocab)))
    return [range(i, min(n, i + size)) for i in range(0, n, size)]


@contextmanager
def patched(model: Model, *interventions: Intervention, rows: range | None = None) -> Iterator[None]:
    """Carry out interventions, in order, while the context lasts; during `generate` as well, KV cache included.

    Positions count from the start of the prompt, so in generation those beyond it are generated tokens. Afterwards the
    model is as it was, also after an exception. `rows` are the windows that the model is about to get, where positions
    differ between windows; by default all.

    Raises:
        ValueError: a block, layer, head, channel or hook that this model does not have, or values of the wrong size.
        RuntimeError: on leaving, if one never took effect though the model ran.
    """
    family = anatomy(model).family
    shape = model.anatomy
    heads = {"query": shape.n_heads, "z": shape.n_heads, "key": shape.n_kv_heads, "value": shape.n_kv_heads}
    run, edits, between = _Run(interventions, rows, heads), [], []
    for number, intervention in enumerate(interventions):
        _check(model, intervention)
        for place, name in enumerate(intervention.site.hooks(model.anatomy)):
            edit = partial(run.edit, number, place)
            after = intervention.site.places[place]
            if intervention.site.kind == "stream" and after.is_attention:
                edit = _between(model.anatomy.layer_hooks[after.layer], edit, between)
            edits.append((name, lambda x, hook, edit=edit: edit(x)))
    remove = before_each_run(model, run.before)
    try:
        with warnings.catch_warnings(), model.hooks(fwd_hooks=[*edits, *between]):
            warnings.filterwarnings("ignore", message="A forward hook edited")  # that is what it is for
            yield
    finally:
        remove()
    for number, intervention in enumerate(interventions):
        if run.n_runs and number not in run.fired:
            raise RuntimeError(f"a hook of this {family} model never fired, so nothing came of: {intervention}.")
        if run.n_runs and rows is None and number not in run.reached:
            raise RuntimeError(f"no token stood at any of its positions, so nothing came of: {intervention}.")


@dataclass
class _Run:
    """Interventions while a model runs: which windows it gets, how many tokens a cache holds, what took effect."""

    interventions: Sequence[Intervention]
    rows: range | None = None
    heads: Mapping[str, int] = field(default_factory=dict)  # of each kind of site that has some
    offset: int = 0
    padding: list[int] | None = None  # how many tokens stand before each prompt's own, where the model is told so
    n_runs: int = 0
    fired: set[int] = field(default_factory=set)
    reached: set[int] = field(default_factory=set)

    def before(self, module, args, kwargs) -> None:
        """Look at the cache, before the model runs."""
        if kwargs.get("cache_params") is not None:
            raise ValueError(
                "a recurrent model's cache does not count tokens, so cuts cannot be placed; run whole windows."
            )
        cache = kwargs.get("past_key_values")
        self.offset = 0 if cache is None else int(cache.get_seq_length())
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2 and not mask[:, 0].all()
        self.padding = mask.long().argmax(1).tolist() if padded else None
        self.n_runs += 1

    def edit(self, number: int, place: int, x: Tensor) -> Tensor:
        """Carry out one intervention on activations [window, position, *part], or attention [window, head, q, k]."""
        self.fired.add(number)
        one = self.interventions[number]
        by_window, rows = one.positions.by_window, range(len(x)) if self.rows is None else self.rows
        if self.rows is None and by_window is not None and len(by_window) != len(x):
            raise ValueError(f"the positions are of {len(by_window)} windows, but the model was given {len(x)}.")
        if self.padding is None:
            return self._edit(number, place, x, rows, self.offset)
        if len(x) != len(self.padding):
            raise ValueError(f"what passes there knows no prompts, and they are padded; run them one by one: {one}.")
        edited = x.clone()
        for row, pad in enumerate(self.padding):  # each from its own first token on
            skip, part = max(0, pad - self.offset), (slice(row, row + 1),)
            if one.site.kind == "attention":
                part += (
                    slice(None),
                    slice(skip, None),
                    slice(max(0, pad - self.offset - x.shape[2] + x.shape[3]), None),
                )
            else:
                part += (slice(skip, None),)
            edited[part] = self._edit(number, place, x[part], rows[row : row + 1], self.offset + skip - pad)
        return edited

    def _edit(self, number: int, place: int, x: Tensor, rows: range, first: int) -> Tensor:
        """The same for windows `rows`, of which x holds what begins at position `first`."""
        one, length = self.interventions[number], x.shape[1]
        if one.site.kind == "attention":  # a cache with a sliding window has let go of the earliest keys
            first, length = first + x.shape[2] - x.shape[3], x.shape[3]
            if isinstance(one.change, Hide):
                self.reached.add(number)
                keys = torch.arange(first, first + length, device=x.device)
                return one.change.function(x, keys[-x.shape[2] :], keys)
        index, order = one.positions.index(rows, first, length)
        if index is None:
            return x
        self.reached.add(number)
        index = tuple(i.to(x.device) if isinstance(i, Tensor) else i for i in index)
        if x.ndim == 4 and x.shape[2] != self.heads.get(one.site.kind, x.shape[2]):
            raise ValueError(f"what passes there is {x.shape[2]} vectors a token, not one for each head: {one}.")
        if one.site.kind == "attention":
            return _edit_pattern(x, one, place, index, order)
        try:
            return _edit(x, one, place, index, order)
        except (IndexError, RuntimeError) as error:
            if one.site.kind != "hook":
                raise
            raise ValueError(f"what passes there is {list(x.shape)}, which does not fit: {one}.") from error


def _edit(x: Tensor, one: Intervention, place: int, index: tuple, order: Tensor | None) -> Tensor:
    """Change a tensor [window, position, *part]."""
    x = x.clone()
    chosen = x[index]
    if one.parts is None:
        changed = one.change(chosen, place, order)
    else:
        axis, parts = -one.site.traits.part_dims, torch.tensor(one.parts, device=x.device)
        part = one.change(chosen.index_select(axis, parts), place, order)
        changed = chosen.index_copy(axis, parts, part.contiguous())
    x[index] = changed
    return x


def _edit_pattern(x: Tensor, one: Intervention, place: int, index: tuple, order: Tensor | None) -> Tensor:
    """Change a pattern [window, head, query, key] at some keys, and let each query's attention add up to 1 again."""
    keys = torch.zeros(len(x), x.shape[3], dtype=torch.bool, device=x.device)
    keys[index] = True
    heads = slice(None) if one.parts is None else torch.tensor(one.parts, device=x.device)
    old = x[:, heads]
    new = torch.where(keys[:, None, None], one.change(old, place, order), old)
    total = new.sum(-1, keepdim=True)
    changed = (new != old).any(-1, keepdim=True) & (total > 0)
    x = x.clone()
    x[:, heads] = torch.where(changed, new / total, old)
    return x


def _between(layer_hook: str, edit: Callable[[Tensor], Tensor], between: list) -> Callable[[Tensor], Tensor]:
    """A change of the stream between a layer's attention and its FFN, as one of what the attention writes."""
    entered = {}
    between.append((layer_hook, lambda x, hook: entered.update(stream=x)))

    def edit_write(write: Tensor) -> Tensor:
        before = entered["stream"] + write
        after = edit(before)
        return write if after is before else torch.where(after != before, after - entered["stream"], write)

    return edit_write
