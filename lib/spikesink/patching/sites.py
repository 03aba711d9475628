"""TODO."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Integral

import torch
from jaxtyping import Bool
from torch import Tensor

from spikesink.model.anatomy import Anatomy

Places = int | Iterable[int]


At = int | Sequence[int] | Bool[Tensor, " position"] | Bool[Tensor, "window position"] | None


HEADS = {"query": "attn.q.hook_out", "key": "attn.k.hook_out", "value": "attn.v.hook_out", "z": "attn.o.hook_in"}


MOST_LISTED = 6  # numbers that a sentence lists before it only counts them


@dataclass(frozen=True)
class Site:
    """Which activations: their kind, and the blocks, layers or hooks that they are of."""

    kind: str
    places: tuple[int, ...] | tuple[str, ...]

    def __str__(self) -> str:
        where = _numbers(self.places)
        many = len(self.places) != 1
        block, layer = ("blocks" if many else "block"), ("layers" if many else "layer")
        plural = {"query": "queries", "key": "keys", "value": "values", "z": "mixed values z"}
        return {
            "stream": f"the stream after {block} {where}",
            "write": f"what {block} {where} write{'' if many else 's'}",
            "read": f"h~ as {block} {where} read{'' if many else 's'} it",
            "attention": f"the attention of {layer} {where}",
            "hook": f"{'hooks' if many else 'hook'} {where}",
        }.get(self.kind, f"the {plural.get(self.kind)} of {layer} {where}")

    @property
    def of_heads(self) -> bool:
        """Whether its parts are heads; else they are channels."""
        return self.kind in HEADS or self.kind == "attention"

    def hooks(self, about: Anatomy) -> tuple[str, ...]:
        """The TransformerLens hook that carries it, place by place.

        Raises:
            ValueError: the model has no such block, layer or hook.
        """
        return tuple(_hook(self.kind, place, about) for place in self.places)


def stream(after: Places) -> Site:
    """The residual stream [window, position, d_model] after one or several blocks; after block 0, the embedding."""
    return Site("stream", _places(after))


def write(block: Places) -> Site:
    """What blocks add to the stream [window, position, d_model]."""
    return Site("write", _places(block))


def read(block: Places) -> Site:
    """h~, what blocks read [window, position, d_model], before the norm's learned scale.

    Block n_blocks + 1 is the unembedding. Where attention and FFN share one norm, so do their reads.
    """
    return Site("read", _places(block))


def query(layer: Places) -> Site:
    """Queries [window, position, head, d_head] of layers, before QK norm and RoPE."""
    return Site("query", _places(layer))


def key(layer: Places) -> Site:
    """Keys [window, position, K/V head, d_head] of layers, before QK norm and RoPE."""
    return Site("key", _places(layer))


def value(layer: Places) -> Site:
    """Values [window, position, K/V head, d_head] of layers."""
    return Site("value", _places(layer))


def z(layer: Places) -> Site:
    """What heads make of the values they attend to, before W_O [window, position, head, d_head], of layers."""
    return Site("z", _places(layer))


def attention(layer: Places) -> Site:
    """Attention [window, head, query, key] of layers; positions are those of the keys.

    After a change, each query's attention is made to add up to 1 again; a query with no other key keeps what it had.
    """
    return Site("attention", _places(layer))


def hook(name: str | Iterable[str]) -> Site:
    """Any TransformerLens hooks [window, position, ..., channel], by name."""
    return Site("hook", (name,) if isinstance(name, str) else tuple(name))


def _places(given: Places, what: str = "block or layer") -> tuple[int, ...]:
    """Whole numbers, of one or several; anything else is told, for a mask or a text would be read as other numbers."""
    several = given.tolist() if hasattr(given, "tolist") else given
    several = [several] if isinstance(several, Integral) else several
    if isinstance(several, str) or not isinstance(several, Iterable):
        raise ValueError(f"{given!r} is no {what}; give a whole number, or several.")
    places = tuple(several)
    if wrong := [place for place in places if not isinstance(place, Integral) or isinstance(place, bool)]:
        raise ValueError(f"{wrong[0]!r} is no {what}; give whole numbers.")
    if not places:
        raise ValueError(f"no {what} was given; name at least one.")
    return tuple(map(int, places))


def _hook(kind: str, place: int | str, about: Anatomy) -> str:
    if kind == "hook":
        return str(place)
    first, last, what = {
        "stream": (0, about.n_blocks, "block"),
        "write": (1, about.n_blocks, "block"),
        "read": (1, about.n_blocks + 1, "block"),
    }.get(kind, (0, about.n_layers - 1, "layer"))
    if not first <= place <= last:
        raise ValueError(f"{what} {place} does not exist; this model has {what}s {first} to {last}.")
    if kind == "stream":
        if place % 2 and about.parallel:
            raise ValueError(
                f"attention and FFN of this {about.family} model read the same stream, so there is none after block "
                f"{place}, between them; give an even block."
            )
        return about.write_hooks[place - 1] if place % 2 else about.layer_hooks[place // 2]
    if kind == "write":
        return about.write_hooks[place - 1]
    if kind == "read":
        if place > about.n_blocks:
            return "ln_final.hook_normalized"
        norm = about.attention_norm if place % 2 else about.ffn_norm
        if norm is None:
            raise ValueError(f"the blocks of this {about.family} model read the stream itself, not through a norm.")
        if place % 2 == 0 and not about.separate_ffn:
            raise ValueError(
                f"the FFN of this {about.family} model is no module of its own; change what it writes (write) instead."
            )
        return f"blocks.{(place - 1) // 2}.{norm}.hook_normalized"
    if kind == "attention" and not about.edits_pattern:
        # TransformerLens leaves such attention to the model itself: https://github.com/TransformerLensOrg/TransformerLens/pull/1673
        raise ValueError(
            f"the attention of this {about.family} model has read its pattern before a hook can change it; change its "
            "keys (key) or what it writes (write) instead."
        )
    if kind in ("query", "key", "value") and not about.projects:
        raise ValueError(
            f"the attention of this {about.family} model has no W_K and W_V of its own; change what it reads (read) or "
            "what it writes (write) instead."
        )
    return f"blocks.{place}.{HEADS[kind]}" if kind in HEADS else about.pattern_hooks[place]


def _numbers(numbers: Sequence[int | str]) -> str:
    """Numbers as a sentence lists them: 12; 3, 5; 12 to 28; 24, 26, ... 60."""
    steps = {b - a for a, b in pairwise(numbers)} if all(isinstance(n, int) for n in numbers) else set()
    if steps == {1} and len(numbers) > 2:
        return f"{numbers[0]} to {numbers[-1]}"
    if len(steps) == 1 and len(numbers) > 4:
        return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
    return ", ".join(map(str, numbers))


@dataclass(frozen=True)
class Positions:
    """Which tokens: the same in every window, or window by window; all, where it is neither."""

    same: tuple[int, ...] | None = None
    by_window: tuple[tuple[int, ...], ...] | None = None

    @staticmethod
    def of(at: "At | Positions") -> "Positions":
        """From one position, several, or a mask; None is all.

        Raises:
            ValueError: a negative position, none at all, or a mask that is not of truth values.
        """
        if at is None or isinstance(at, Positions):
            return at or Positions()
        if hasattr(at, "dtype") or (isinstance(at, list) and at and all(isinstance(p, bool | list) for p in at)):
            at = torch.as_tensor(at)
            if at.dtype == torch.bool and at.ndim in (1, 2):
                return Positions._masked(at)
            if at.dtype.is_floating_point or at.dtype == torch.bool or at.ndim > 1:
                raise ValueError(
                    "a mask of positions must hold truth values and be [position] or [window, position], but is "
                    f"{at.dtype} {list(at.shape)}; numbers must be whole ones, in a list."
                )
        if isinstance(at, slice):
            raise ValueError(f"{at!r} has no end that is known beforehand; give a range.")
        positions = _places(at, "position")
        if min(positions) < 0:
            raise ValueError(
                f"position {min(positions)} does not exist; positions count from 0, and the last is len(tokens) - 1."
            )
        return Positions(same=positions)

    @staticmethod
    def _masked(at: Bool[Tensor, "*window position"]) -> "Positions":
        rows = [tuple(row.nonzero()[:, 0].tolist()) for row in (at if at.ndim == 2 else at[None])]
        if not any(rows):
            raise ValueError("the mask of positions is empty, so nothing would be changed.")
        return Positions(same=rows[0]) if len(rows) == 1 else Positions(by_window=tuple(rows))

    def __str__(self) -> str:
        if self.by_window is not None:
            return f"at {sum(map(len, self.by_window))} tokens of {len(self.by_window)} windows"
        if self.same is None:
            return "at all positions"
        if len(self.same) > MOST_LISTED:
            return f"at {len(self.same)} positions"
        return f"at position{'s' if len(self.same) > 1 else ''} {_numbers(self.same)}"

    def last(self) -> int:
        """The furthest of them; -1 for all."""
        rows = self.by_window if self.by_window is not None else (self.same or (),)
        return max((max(row) for row in rows if row), default=-1)

    def index(self, rows: range, offset: int, n: int) -> tuple[tuple | None, Tensor | None]:
        """Where they are in a tensor [window, position, ...] that holds windows `rows` and positions from `offset`.

        Returns:
            An index for the tensor, None where none of them is in it; and which of the positions these are.
        """
        if self.by_window is None:
            if self.same is None:
                return (slice(None),), None
            here = [(i, p - offset) for i, p in enumerate(self.same) if offset <= p < offset + n]
            order, columns = torch.tensor(here, dtype=torch.long).reshape(-1, 2).T
            return ((slice(None), columns) if here else None), order
        found, i = [], sum(map(len, self.by_window[: rows.start]))
        for row in rows:
            for p in self.by_window[row]:
                if offset <= p < offset + n:
                    found.append((row - rows.start, p - offset, i))
                i += 1
        window, columns, order = torch.tensor(found, dtype=torch.long).reshape(-1, 3).T
        return ((window, columns) if found else None), order


EVERYWHERE = Positions()


def _part_dims(site: Site) -> int:
    """How many dimensions a part has: heads are of queries, keys or values, channels are numbers."""
    return 2 if site.kind in HEADS else 1
