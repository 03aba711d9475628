"""Which activations an intervention changes: sites of blocks, layers or hooks, and positions in a prompt."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from spikesink.model.anatomy import Anatomy, Block

Blocks = Block | Iterable[Block]
Places = int | Iterable[int]
Parts = int | Iterable[int] | None  # which channels or heads; None: all
At = int | Sequence[int] | Bool[Tensor, " position"] | Bool[Tensor, "window position"] | None
Tokens = Int[Tensor, "window length"] | Int[Tensor, " length"]  # windows, or one prompt
MOST_LISTED = 6  # numbers that a sentence lists before it only counts them


@dataclass(frozen=True)
class Kind:
    """All there is to know of one kind of site."""

    sentence: str  # what it is called; {} stands for its places
    places: str  # what these are: "block", "layer" or "hook"
    hook: Callable[[Anatomy, Block | int | str], str | None]  # the TransformerLens hook that carries it, at a place
    parts: str = "channel"  # what it consists of: channels, or heads
    part_dims: int = 1  # dimensions of a part: a channel is a number, a head of queries a vector
    first: int = 0  # place


def _stream_hook(anatomy: Anatomy, after: Block) -> str | None:
    if after.is_attention and anatomy.parallel:
        raise ValueError(
            f"attention and FFN of this {anatomy.family} model read the same stream, so there is none after {after}, "
            "between them; give an FFN's block, mlp(layer)."
        )
    return anatomy.write_hooks[after - 1] if after.is_attention else anatomy.layer_hooks[after // 2]


def _read_hook(anatomy: Anatomy, block: Block) -> str:
    norm = anatomy.attention_norm if block.is_attention else anatomy.ffn_norm
    if norm is None:
        raise ValueError(f"the blocks of this {anatomy.family} model read the stream itself, not through a norm.")
    if not block.is_attention and not anatomy.separate_ffn:
        raise ValueError(
            f"the FFN of this {anatomy.family} model is no module of its own; change what it writes (write) instead."
        )
    return f"blocks.{block.layer}.{norm}.hook_normalized"


def _projection(name: str) -> Callable[[Anatomy, int], str]:
    def hook(anatomy: Anatomy, layer: int) -> str:
        if not anatomy.projects:
            raise ValueError(
                f"the attention of this {anatomy.family} model has no W_K and W_V of its own; change what it reads "
                "(read) or what it writes (write) instead."
            )
        return f"blocks.{layer}.attn.{name}.hook_out"

    return hook


def _pattern_hook(anatomy: Anatomy, layer: int) -> str | None:
    if not anatomy.edits_pattern:
        # TransformerLens leaves such attention to the model itself: https://github.com/TransformerLensOrg/TransformerLens/pull/1673
        raise ValueError(
            f"the attention of this {anatomy.family} model has read its pattern before a hook can change it; change "
            "its keys (key) or what it writes (write) instead."
        )
    return anatomy.pattern_hooks[layer]


KINDS = {
    "stream": Kind("the stream after {}", "block", _stream_hook),
    "write": Kind("the write of {}", "block", lambda anatomy, block: anatomy.write_hooks[block - 1], first=1),
    "read": Kind("h~ as read by {}", "block", _read_hook, first=1),
    "readout": Kind("h~ as read by the unembedding", "hook", lambda anatomy, name: name),
    "query": Kind("the queries of {}", "layer", _projection("q"), "head", 2),
    "key": Kind("the keys of {}", "layer", _projection("k"), "head", 2),
    "value": Kind("the values of {}", "layer", _projection("v"), "head", 2),
    "z": Kind("the mixed values z of {}", "layer", lambda anatomy, i: f"blocks.{i}.attn.o.hook_in", "head", 2),
    "attention": Kind("the attention of {}", "layer", _pattern_hook, "head"),
    "hook": Kind("{}", "hook", lambda anatomy, name: name),
}


@dataclass(frozen=True)
class Site:
    """Which activations: their kind, and the blocks, layers or hooks that they are of."""

    kind: str
    places: tuple[Block, ...] | tuple[int, ...] | tuple[str, ...]

    @property
    def traits(self) -> Kind:
        """What is to be known of its kind."""
        return KINDS[self.kind]

    def __str__(self) -> str:
        unit = f"{self.traits.places}{'s' if len(self.places) > 1 else ''} "  # a block says so itself
        return self.traits.sentence.format(("" if self.traits.places == "block" else unit) + list_places(self.places))

    def hooks(self, anatomy: Anatomy) -> tuple[str, ...]:
        """The TransformerLens hook that carries it, place by place; ValueError where the model has no such place."""
        kind = self.traits
        last = anatomy.n_blocks if kind.places == "block" else anatomy.n_layers - 1
        for place in self.places if kind.places != "hook" else ():
            if not kind.first <= place <= last:
                named = place if kind.places == "block" else f"layer {place}"
                raise ValueError(f"{named} does not exist; this model has {kind.places}s {kind.first} to {last}.")
            if kind.places == "layer" and place not in anatomy.attention_layers:
                raise ValueError(f"layer {place} of this {anatomy.family} model shows no attention.")
        hooks = tuple(kind.hook(anatomy, place) for place in self.places)
        if None in hooks:
            raise ValueError(f"this {anatomy.family} model does not show {self}; change another place.")
        return hooks


def stream(after: Blocks) -> Site:
    """The residual stream [window, position, d_model] after blocks; after block(0), the embedding."""
    return Site("stream", whole_numbers(after, "block"))


def write(block: Blocks) -> Site:
    """What blocks add to the stream [window, position, d_model]."""
    return Site("write", whole_numbers(block, "block"))


def read(block: Blocks) -> Site:
    """h~, what blocks read [window, position, d_model], before the norm's learned scale.

    Where attention and FFN share one norm, so do their reads.
    """
    return Site("read", whole_numbers(block, "block"))


def readout() -> Site:
    """h~, what the unembedding reads [window, position, d_model], before the norm's learned scale."""
    return Site("readout", ("ln_final.hook_normalized",))


def query(layer: Places) -> Site:
    """Queries [window, position, head, d_head] of layers, before QK norm and RoPE."""
    return Site("query", whole_numbers(layer, "layer"))


def key(layer: Places) -> Site:
    """Keys [window, position, K/V head, d_head] of layers, before QK norm and RoPE."""
    return Site("key", whole_numbers(layer, "layer"))


def value(layer: Places) -> Site:
    """Values [window, position, K/V head, d_head] of layers."""
    return Site("value", whole_numbers(layer, "layer"))


def z(layer: Places) -> Site:
    """What heads make of the values they attend to, before W_O [window, position, head, d_head], of layers."""
    return Site("z", whole_numbers(layer, "layer"))


def attention(layer: Places) -> Site:
    """Attention [window, head, query, key] of layers; positions are those of the keys.

    After a change, each query's attention is made to add up to 1 again; a query with no other key keeps what it had.
    """
    return Site("attention", whole_numbers(layer, "layer"))


def hook(name: str | Iterable[str]) -> Site:
    """Any TransformerLens hooks [window, position, ..., channel], by name."""
    return Site("hook", (name,) if isinstance(name, str) else tuple(name))


def whole_numbers(given: Places | Blocks, what: str) -> tuple[int, ...]:
    """Places, positions or parts, one or several: whole numbers, and Blocks where `what` is "block".

    ValueError for anything else, as a mask or a text would be read as other numbers.
    """
    several = given.tolist() if hasattr(given, "tolist") else given
    several = [several] if isinstance(several, Integral) else several
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise ValueError(f"{given!r} is no {what}; give a whole number, or several.")
    numbers = tuple(several)
    if not numbers:
        raise ValueError(f"no {what} was given; name at least one.")
    for n in numbers:
        if not isinstance(n, Integral) or isinstance(n, bool):
            raise ValueError(f"{n!r} is no {what}; give whole numbers.")
        if what == "block" and not isinstance(n, Block):
            raise ValueError(
                f"a bare {n} may be a block or a layer; write block({n}) if it is {Block(n)}, or attn({n}) or mlp({n})."
            )
        if what != "block" and isinstance(n, Block):
            raise ValueError(f"{n} is a block, but a {what} is wanted; give a plain number, such as its .layer.")
    return numbers if what == "block" else tuple(map(int, numbers))


def list_places(places: Sequence[int | str]) -> str:
    """Numbers or names as a sentence lists them: 12; 3, 5; 12 to 28; 24, 26, ... 60."""
    steps = {b - a for a, b in pairwise(places)} if all(isinstance(n, int) for n in places) else set()
    if steps == {1} and len(places) > 2:
        return f"{places[0]} to {places[-1]}"
    if len(steps) == 1 and len(places) > 4:
        return f"{places[0]}, {places[1]}, ... {places[-1]}"
    return ", ".join(map(str, places))


@dataclass(frozen=True)
class Positions:
    """Which tokens: the same in every window, or window by window; all, where it is neither."""

    same: tuple[int, ...] | None = None
    by_window: tuple[tuple[int, ...], ...] | None = None

    @staticmethod
    def of(at: "At | Positions") -> "Positions":
        """From one position, several, or a mask; None is all."""
        if at is None or isinstance(at, Positions):
            return Positions() if at is None else at
        if hasattr(at, "dtype") or (isinstance(at, list) and at and all(isinstance(p, bool | list) for p in at)):
            at = torch.as_tensor(at)
            if at.dtype == torch.bool and at.ndim in (1, 2):
                rows = tuple(tuple(row.nonzero()[:, 0].tolist()) for row in (at if at.ndim == 2 else at[None]))
                if not any(rows):
                    raise ValueError("the mask of positions is empty, so nothing would be changed.")
                return Positions(same=rows[0]) if len(rows) == 1 else Positions(by_window=rows)
            if at.dtype.is_floating_point or at.dtype == torch.bool or at.ndim > 1:
                raise ValueError(
                    "a mask of positions must hold truth values and be [position] or [window, position], but is "
                    f"{at.dtype} {list(at.shape)}; numbers must be whole ones, in a list."
                )
        if isinstance(at, slice):
            raise ValueError(f"{at!r} has no end that is known beforehand; give a range.")
        positions = whole_numbers(at, "position")
        if min(positions) < 0:
            raise ValueError(
                f"position {min(positions)} does not exist; positions count from 0, and the last is len(tokens) - 1."
            )
        return Positions(same=positions)

    def __str__(self) -> str:
        if self.by_window is not None:
            return f"at {sum(map(len, self.by_window))} tokens of {len(self.by_window)} windows"
        if self.same is None:
            return "at all positions"
        if len(self.same) > MOST_LISTED:
            return f"at {len(self.same)} positions"
        return f"at position{'s' if len(self.same) > 1 else ''} {list_places(self.same)}"

    def __len__(self) -> int:
        """How many are named; none for all."""
        return len(self.same or ()) + sum(map(len, self.by_window or ()))

    def last(self) -> int:
        """The furthest of them; -1 for all."""
        return max((*(self.same or ()), *(p for row in self.by_window or () for p in row)), default=-1)

    def index(self, rows: range, offset: int, n: int) -> tuple[tuple | None, Tensor | None]:
        """Where they are in a tensor [window, position, ...] that holds windows `rows` and positions from `offset`.

        An index for the tensor, None where none of them is in it; and which of the positions these are.
        """
        if self.by_window is None:
            if self.same is None:
                return (slice(None),), None
            here = [(i, p - offset) for i, p in enumerate(self.same) if offset <= p < offset + n]
            order, columns = torch.tensor(here, dtype=torch.long).reshape(-1, 2).T
            return ((slice(None), columns) if here else None), order
        listed = [(row, p) for row, positions in enumerate(self.by_window) for p in positions]
        here = [(r - rows.start, p - offset, i) for i, (r, p) in enumerate(listed) if r in rows and 0 <= p - offset < n]
        window, columns, order = torch.tensor(here, dtype=torch.long).reshape(-1, 3).T
        return ((window, columns) if here else None), order


EVERYWHERE = Positions()
