"""What a KV cache keeps, and what becomes of a model that can attend to nothing else.

A `Policy` says which keys a query still has. `forget` hides the others from attention in one run over whole windows:
exact, and as slow as full attention. `stream` and `write` run text of any length through a cache that really lets go
of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformer_lens.model_bridge import TransformerBridge
from transformers import DynamicCache

from spikesink.common import NotApplicable, progress
from spikesink.model.anatomy import Anatomy, anatomy
from spikesink.patching import Intervention, apply, hook, patched
from spikesink.patching.cuts import SpikeMeans
from spikesink.serving.cells import AS_IT_IS, Cuts, Technique, sink_held

CHUNK = 64  # tokens that run side by side; the cache lets go of keys between chunks


FIRST = (1, 2, 4, 8)


MOST_FIRST = 4  # as many others are kept as a control


EVERY = "every token"


WINDOW, OTHERS, HEAVY, CONSTANT = "the last ones", "with 4 others", "with heavy hitters", "with a constant sink"


WITH_FIRST, SHIFTED = "with the first 4", "with the first 4, shifted"


@dataclass(frozen=True)
class Policy:
    """Which keys stay.

    Args:
        window: the last so many tokens, the query's own among them; None: all.
        kept: positions that stay for good.
        heavy: how many others stay, by K/V head: those that have received the most attention (H2O, arXiv:2306.14048).
        shifted: whether kept tokens move up to the window, as if nothing had ever been between them, instead of keeping
            their positions (StreamingLLM, arXiv:2309.17453); they are then the first ones.
    """

    window: int | None = None
    kept: tuple[int, ...] = ()
    heavy: int = 0
    shifted: bool = False

    def __post_init__(self):
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens has no room for the query's own; give at least 1.")
        if self.window is None and (self.kept or self.heavy or self.shifted):
            raise ValueError("without a window every key stays, so there is nothing to keep or to shift; give one.")
        if self.kept and min(self.kept) < 0:
            raise ValueError(f"position {min(self.kept)} does not exist; positions count from 0.")
        if self.shifted and self.kept != tuple(range(len(self.kept))):
            raise ValueError(f"positions {self.kept} are not the first ones, and only those can be shifted.")
        if self.heavy < 0 or (self.heavy and self.kept):
            raise ValueError("give kept positions or a number of heavy hitters, not both, and no negative one.")

    def __str__(self) -> str:
        if self.window is None:
            return EVERY
        first = self.kept == tuple(range(len(self.kept)))
        kept = f" and {'the first ' if first else ''}{len(self.kept)}{'' if first else ' others'}" if self.kept else ""
        heavy = f" and the {self.heavy} most attended to" if self.heavy else ""
        return f"the last {self.window}{kept}{heavy}{', shifted' if self.shifted else ''}"

    def sees(
        self, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"], sight: int | None = None
    ) -> Bool[Tensor, "query key"]:
        """Whether queries at these positions have keys at those, heavy hitters aside.

        Args:
            queries: their positions.
            keys: theirs.
            sight: how many tokens back the layer itself sees, the query included (`Anatomy.sight`).
        """
        back = queries[:, None] - keys
        near = back < (self.window or torch.inf)
        kept = torch.isin(keys, torch.tensor(self.kept, dtype=keys.dtype, device=keys.device))
        far = back >= (sight or torch.inf) if not self.shifted else torch.zeros_like(back, dtype=torch.bool)
        return (back >= 0) & (near | kept) & ~far


def first(n: int, budget: int, shifted: bool = False) -> Policy:
    """A cache of so many keys: the first n tokens, and the last ones in the rest of it."""
    return Policy(budget - n, tuple(range(n)), shifted=shifted)


def heaviest(budget: int) -> Policy:
    """A cache of so many keys: half of them the last ones, the others those that have received the most attention."""
    return Policy(budget // 2, heavy=budget - budget // 2)


def evictions(
    model: TransformerBridge,
    known: SpikeMeans | NotApplicable,
    budget: int,
    where: Bool[Tensor, "window position"],
    seed: int = 0,
) -> dict[str, Technique] | NotApplicable:
    """The ways to keep so many keys, as techniques for `cross`: the last ones, some of the first, and others instead.

    Where the sink is spared, one of the keys is the first token's; of `CONSTANT`, a constant key and value stand in its
    place from the start.

    Args:
        model: as `load` returns it.
        known: as `patching.chain.constants` returns it.
        budget: how many keys a query has, its own among them.
        where: the windows' spike tokens; others that are kept instead are none of them, nor the first.
        seed: of which others.
    """
    if (reason := cannot(anatomy(model))) is not None:
        return NotApplicable(reason)
    ordinary = (~where.any(0))[1:budget].nonzero()[:, 0] + 1
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))[:MOST_FIRST]
    others = Policy(budget - MOST_FIRST, tuple(sorted(ordinary[order].tolist())))
    policies = {named(n): first(n, budget) for n in FIRST if n < budget} | {OTHERS: others, HEAVY: heaviest(budget)}
    cuts = {name: forget(model, policy) for name, policy in policies.items()}
    with_first = cuts[named(1)]
    if held := sink_held(known):
        cuts[CONSTANT] = (*held, *with_first)
    alone = {WINDOW: Technique(forget(model, Policy(budget)), with_first)}
    return alone | {name: Technique(of, cells=(AS_IT_IS,)) for name, of in cuts.items()}


def named(n: int) -> str:
    """What the policy that keeps the first n tokens is called."""
    return f"with the first {n}" if n > 1 else "with the first token"


def forget(model: TransformerBridge, policy: Policy) -> tuple[Intervention, ...]:
    """Interventions that hide from every query what the policy has let go of; positions stay as they are.

    Raises:
        ValueError: a policy that shifts, or attention that has read its pattern before it can be changed.
    """
    about = anatomy(model)
    if policy.shifted:
        raise ValueError("positions of a run over whole windows cannot be shifted; use stream.")
    _check(about)
    if policy.window is None:
        return ()
    groups = about.n_kv_heads

    def hidden(pattern: Float[Tensor, "window head query key"]) -> Float[Tensor, "window head query key"]:
        if policy.heavy:
            return heavy_hitter_pattern(pattern, policy.window, policy.heavy, groups)
        keys = torch.arange(pattern.shape[-1], device=pattern.device)
        return renormalized(pattern, policy.sees(keys[-pattern.shape[-2] :], keys))

    hidden.__name__ = f"a cache of {policy}"
    return (apply(hook(about.pattern_hooks), hidden),)


def cannot(about: Anatomy) -> str | None:
    """Why keys cannot be hidden from a family's attention; None where they can."""
    if not about.edits_pattern:
        return f"the attention of this {about.family} model has read its pattern before it can be changed"
    if about.learned_sink:
        return f"a learned logit takes part in the attention of this {about.family} model, beside its keys"
    return None


def _check(about: Anatomy) -> None:
    if (reason := cannot(about)) is not None:
        raise ValueError(f"{reason}.")


def renormalized(
    pattern: Float[Tensor, "window head query key"], seen: Bool[Tensor, "query key"]
) -> Float[Tensor, "window head query key"]:
    """Attention over the keys that are seen alone: what softmax makes of their logits."""
    return functional.normalize(pattern * seen, p=1, dim=-1, eps=torch.finfo(pattern.dtype).tiny)


def heavy_hitter_pattern(
    pattern: Float[Tensor, "window head query key"], window: int, heavy: int, n_kv_heads: int
) -> Float[Tensor, "window head query key"]:
    """Attention where, beside the last tokens, only the most attended to are left: of those, and of the one that leaves
    the window, the one that has received least goes, query by query and for each K/V head by itself.
    """
    if pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError("heavy hitters are found over whole windows; run them without a cache.")
    grouped = pattern.unflatten(1, (n_kv_heads, -1))  # window, K/V head, query head of it, query, key
    out = torch.zeros_like(grouped)
    n = pattern.shape[-1]
    received = pattern.new_zeros(len(pattern), n_kv_heads, n)
    stays = torch.zeros_like(received, dtype=torch.bool)
    for q in range(n):
        seen = stays.clone()
        seen[..., max(0, q - window + 1) : q + 1] = True
        row = functional.normalize(grouped[..., q, :] * seen[:, :, None], p=1, dim=-1)
        out[..., q, :] = row
        received += row.sum(2)
        leaving = q - window + 1
        if leaving >= 0:
            stays[..., leaving] = True
            if leaving >= heavy:
                least = received.masked_fill(~stays, torch.inf).argmin(-1, keepdim=True)
                stays.scatter_(-1, least, False)
    return out.flatten(1, 2)


class Bounded:
    """A model with a KV cache that lets go of what a policy does not keep."""

    def __init__(self, model: TransformerBridge, policy: Policy, cuts: Sequence[Intervention] = ()):
        if policy.heavy:
            raise ValueError("heavy hitters differ from head to head, and no cache here does; use forget.")
        self.model, self.policy, self.cuts, self.about = model, policy, tuple(cuts), anatomy(model)
        if policy.window is not None:
            _check(self.about)
        self.cache = DynamicCache()
        self.held = torch.zeros(0, dtype=torch.long)  # positions of what the cache holds
        self.begin: Int[Tensor, "window kept"] | None = None
        self.done = 0

    @torch.inference_mode()
    def __call__(self, tokens: Int[Tensor, "window new"]) -> Float[Tensor, "window new vocabulary"]:
        """Run the next tokens; returns what is predicted after each."""
        n_kept, new = len(self.policy.kept), tokens.shape[1]
        if self.done == 0:
            if new < n_kept:
                raise ValueError(f"the first {new} tokens are fewer than the {n_kept} to be kept; run more at once.")
            self.begin = tokens[:, :n_kept]
        elif self.policy.shifted and n_kept:
            self._move_up()
        positions = torch.arange(self.done, self.done + new)
        keys = torch.cat([self.held, positions])
        logits = self._run(tokens, positions, keys, self.cuts if self.done == 0 else (), self.cache)
        self.done += new
        stays = self.policy.sees(torch.tensor([self.done]), keys)[0]
        self.held = keys[stays]
        for layer in self.cache.layers:
            index = stays.nonzero()[:, 0].to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        return logits

    def _hiding(self, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]) -> Iterator[Intervention]:
        """Within a chunk, too, a query sees no more than the policy keeps; the same for all layers with one sight."""
        if self.policy.window is None:
            return
        for sight in set(self.about.sight):
            seen = self.policy.sees(queries, keys, sight)
            names = [name for name, of in zip(self.about.pattern_hooks, self.about.sight, strict=True) if of == sight]
            yield apply(hook(names), lambda pattern, seen=seen: renormalized(pattern, seen.to(pattern.device)))

    def _run(
        self,
        tokens: Int[Tensor, "window new"],
        positions: Int[Tensor, " new"],
        keys: Int[Tensor, " key"],
        cuts: Sequence[Intervention],
        cache: DynamicCache,
    ) -> Float[Tensor, "window new vocabulary"]:
        device = self.model.cfg.device
        with patched(self.model, *cuts, *self._hiding(positions, keys)):
            try:
                return self.model(
                    tokens.to(device),
                    past_key_values=cache,
                    use_cache=True,
                    position_ids=positions[None].expand(len(tokens), -1).to(device),
                )
            except IndexError:
                if int(positions[-1]) < self.about.context:
                    raise
                raise ValueError(
                    f"this {self.about.family} model has no positions beyond its context of {self.about.context}; "
                    "give a shorter text."
                ) from None

    def _move_up(self) -> None:
        """Run the kept tokens once more, right before the window: attention knows distances only, so that all that
        becomes of them is the rotation of their keys.
        """
        n = len(self.policy.kept)
        if len(self.held) <= n or self.held[n] == n:
            return
        place = torch.arange(int(self.held[n]) - n, int(self.held[n]))
        anew = DynamicCache()
        self._run(self.begin, place, place, self.cuts, anew)
        for layer, moved in zip(self.cache.layers, anew.layers, strict=True):
            layer.keys = torch.cat([moved.keys, layer.keys[:, :, n:]], dim=2)


def losses_of(
    logits: Float[Tensor, "window position vocabulary"], targets: Int[Tensor, "window target"]
) -> Float[Tensor, "window target"]:
    """Cross-entropy in nats of the tokens that follow the first positions; what no target follows is left out."""
    logits = logits[:, : targets.shape[1]].float()
    # The vocabulary last: over another dimension, log_softmax adds up in an order that loses four digits.
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return loss.view_as(targets).cpu()


@dataclass(frozen=True)
class Streamed:
    """A text that ran through a bounded cache."""

    policy: Policy
    loss: Float[Tensor, "window position"]  # cross-entropy of the next token, nats
    most_held: int  # keys in the cache between two chunks

    def perplexity(self, start: int = 0, end: int | None = None) -> float:
        """exp of the mean loss from one position to before another."""
        return float(self.loss[:, start:end].mean().exp())


def stream(
    model: TransformerBridge,
    tokens: Int[Tensor, "window position"],
    policy: Policy,
    cuts: Sequence[Intervention] = (),
    chunk: int = CHUNK,
) -> Streamed:
    """Run text through a cache that lets go of what the policy does not keep; it may be longer than the context.

    Args:
        model: as `load` returns it.
        tokens: windows, of any length.
        policy: what the cache keeps. Where it shifts, kept tokens move up between chunks.
        cuts: interventions, at positions of the first chunk only.
        chunk: how many tokens run side by side.

    Raises:
        ValueError: fewer tokens in a chunk than the policy keeps for good, or heavy hitters.
    """
    bounded, losses, most = Bounded(model, policy, cuts), [], 0
    for start in progress(range(0, tokens.shape[1], chunk), str(policy), "chunk"):
        logits = bounded(tokens[:, start : start + chunk])
        losses.append(losses_of(logits, tokens[:, start + 1 : start + chunk + 1]))
        most = max(most, len(bounded.held))
    return Streamed(policy, torch.cat(losses, dim=1), most)


def generate_per_cache(
    model: TransformerBridge, prompt: Int[Tensor, " length"], known: SpikeMeans | NotApplicable, budget: int, n: int
) -> pd.DataFrame | NotApplicable:
    """What the model writes from caches that hold so many keys, and its perplexity as every token judges it.

    Args:
        model: as `load` returns it.
        prompt: what it goes on from.
        known: as `patching.chain.constants` returns it, for a constant sink.
        budget: how many keys a query has, its own among them.
        n: how many tokens to write.
    """
    about = anatomy(model)
    if (reason := cannot(about)) is not None:
        return NotApplicable(reason)
    n = min(n, about.context - len(prompt))
    caches: dict[str, tuple[Policy, Cuts]] = {EVERY: (Policy(), ()), WINDOW: (Policy(budget), ())}
    caches |= {WITH_FIRST: (first(4, budget), ()), SHIFTED: (first(4, budget, shifted=True), ())}
    if held := sink_held(known):
        caches[CONSTANT] = (first(1, budget), held)
    rows = []
    for name, (policy, cuts) in caches.items():
        written = write(model, prompt, policy, n, cuts)
        judged = stream(model, torch.cat([prompt, written])[None], Policy())
        text = model.tokenizer.decode(written).replace("\n", "\\n")
        rows.append({"cache": name, "judged perplexity": judged.perplexity(len(prompt) - 1), "writes": f"`{text}`"})
    return pd.DataFrame(rows).set_index("cache")


def write(
    model: TransformerBridge,
    prompt: Int[Tensor, " length"],
    policy: Policy,
    n: int,
    cuts: Sequence[Intervention] = (),
    chunk: int = CHUNK,
) -> Int[Tensor, " n"]:
    """Generate greedily from a cache that lets go of what the policy does not keep; raises what `stream` does."""
    bounded, written = Bounded(model, policy, cuts), []
    for start in range(0, len(prompt), chunk):
        logits = bounded(prompt[None, start : start + chunk])
    for _ in progress(range(n), str(policy), "token"):
        written.append(int(logits[0, -1].argmax()))
        logits = bounded(torch.tensor([written[-1:]]))
    return torch.tensor(written)
