"""What a KV cache keeps, and what becomes of a model that can attend to nothing else.

A `Policy` says which keys a query still has. `forget` hides the others from attention in one run over whole windows:
exact, and as slow as full attention. `run_bounded` and `generate` run text of any length through a cache that really
lets go of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from spikesink.common import NotApplicable, measure, progress
from spikesink.model.anatomy import Anatomy, Model
from spikesink.patching import Intervention, apply, attention, hook, patched
from spikesink.patching.interventions import Hide
from spikesink.serving.cells import UNCHANGED, Cuts, Technique

CHUNK = 64  # tokens that run side by side; the cache lets go of keys between chunks
N_OTHERS = 4  # ordinary tokens that are kept as a control
FULL, WINDOW = "full cache", "window only"
WITH_1, WITH_FIRST = "window + first token", "window + first 4"
SHIFTED = "window + first 4, shifted"
FIRST = {1: WITH_1, 2: "window + first 2", 4: WITH_FIRST, 8: "window + first 8"}
OTHERS, HEAVY, CONSTANT = "window + 4 others", "window + heavy hitters", "window + constant sink"


@dataclass(frozen=True)
class Policy:
    """Which keys stay.

    Args:
        window: so many last tokens, the query's own among them; None: all.
        kept: positions that stay for good.
        heavy: how many others stay, by K/V head: those that have received the most attention (H2O, arXiv:2306.14048).
        shifted: whether kept tokens, the first ones, move up to the window, as if nothing had ever been between them,
            instead of keeping their positions (StreamingLLM, arXiv:2309.17453).
    """

    window: int | None = None
    kept: tuple[int, ...] = ()
    heavy: int = 0
    shifted: bool = False

    def __post_init__(self):
        if self.window is None and (self.kept or self.heavy or self.shifted):
            raise ValueError("without a window every key stays; give one.")
        if self.window is not None and self.window < 1:
            raise ValueError(f"a window of {self.window} tokens has no room for the query's own; give at least 1.")
        if self.kept and min(self.kept) < 0:
            raise ValueError(f"position {min(self.kept)} does not exist; positions count from 0.")
        if self.shifted and not self.keeps_first:
            raise ValueError(f"positions {self.kept} are not the first ones, and only those can be shifted.")
        if self.heavy < 0 or (self.heavy and self.kept):
            raise ValueError("give kept positions or a number of heavy hitters, not both, and none below zero.")

    @property
    def keeps_first(self) -> bool:
        """Whether the positions that stay for good are the first ones."""
        return self.kept == tuple(range(len(self.kept)))

    def __str__(self) -> str:
        if self.window is None:
            return FULL
        parts = [f"last {self.window}"]
        if self.kept:
            parts.append(f"first {len(self.kept)}" if self.keeps_first else f"{len(self.kept)} others")
        if self.heavy:
            parts.append(f"{self.heavy} heavy hitters")
        return " + ".join(parts) + (", shifted" if self.shifted else "")

    def sees(
        self, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"], sight: int | None = None
    ) -> Bool[Tensor, "query key"]:
        """Whether queries at these positions have keys at those, heavy hitters aside.

        `sight` is how many tokens back the layer itself sees, the query included (`Anatomy.sight`).
        """
        back = queries[:, None] - keys
        kept = torch.isin(keys, torch.tensor(self.kept, dtype=keys.dtype, device=keys.device))
        reach = torch.inf if self.shifted or sight is None else sight
        return (back >= 0) & (back < reach) & ((back < (self.window or torch.inf)) | kept)


def keep_first(n: int, budget: int, shifted: bool = False) -> Policy:
    """A cache of so many keys: the first n tokens, and the last ones in the rest of it."""
    return Policy(budget - n, tuple(range(n)), shifted=shifted)


def cache_policies(budget: int) -> dict[str, Policy]:
    """Caches of so many keys, by name; beside the full one."""
    return {
        FULL: Policy(),
        WINDOW: Policy(budget),
        WITH_1: keep_first(1, budget),
        WITH_FIRST: keep_first(4, budget),
        SHIFTED: keep_first(4, budget, shifted=True),
        HEAVY: Policy(budget // 2, heavy=budget - budget // 2),
    }


@measure
def eviction_techniques(
    model: Model, budget: int, where: Bool[Tensor, "window position"], sink: Cuts = (), seed: int = 0
) -> dict[str, Technique]:
    """The ways to keep `budget` keys of a query, its own among them, as techniques for `cross`.

    With the sink exempt, one of the keys is the first token's. Others are kept as a control: none of the spike tokens
    (`where`), nor the first. `sink` is a constant key and value in the first token's place (`sink_held`).
    """
    ordinary = (~where.any(0))[1:budget].nonzero()[:, 0] + 1
    order = torch.randperm(len(ordinary), generator=torch.Generator().manual_seed(seed))[:N_OTHERS]
    policies = {name: keep_first(n, budget) for n, name in FIRST.items() if n < budget}
    policies[OTHERS] = Policy(budget - N_OTHERS, tuple(sorted(ordinary[order].tolist())))
    policies[HEAVY] = cache_policies(budget)[HEAVY]
    cuts = {name: forget(model, policy) for name, policy in policies.items()}
    if sink:
        cuts[CONSTANT] = (*sink, *cuts[WITH_1])
    techniques = {name: Technique(cut, cells=(UNCHANGED,)) for name, cut in cuts.items()}
    return {WINDOW: Technique(forget(model, Policy(budget)), exempt=cuts[WITH_1]), **techniques}


def forget(model: Model, policy: Policy) -> tuple[Intervention, ...]:
    """Interventions that hide from every query what the policy has let go of; positions stay as they are."""
    anatomy = model.anatomy
    if policy.shifted:
        raise ValueError("positions of a run over whole windows cannot be shifted; use run_bounded.")
    check_editable(anatomy)
    if policy.window is None:
        return ()

    def hidden(
        pattern: Float[Tensor, "window head query key"], queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]
    ) -> Float[Tensor, "window head query key"]:
        if policy.heavy:
            return heavy_hitter_pattern(pattern, policy.window, policy.heavy, anatomy.n_kv_heads)
        return renormalize(pattern, policy.sees(queries, keys))

    return (Intervention(attention(range(anatomy.n_layers)), Hide(hidden, f"a cache of {policy}")),)


def check_editable(anatomy: Anatomy) -> None:
    """Raise NotApplicable where keys cannot be hidden from a family's attention."""
    anatomy.require_attention()
    if not anatomy.edits_pattern:
        raise NotApplicable(
            f"the attention of this {anatomy.family} model has read its pattern before it can be changed"
        )
    if anatomy.learned_sink:
        raise NotApplicable(
            f"a learned logit takes part in the attention of this {anatomy.family} model, beside its keys"
        )


def renormalize(
    pattern: Float[Tensor, "window head query key"], visible: Bool[Tensor, "query key"]
) -> Float[Tensor, "window head query key"]:
    """Attention over the visible keys alone: what softmax makes of their logits."""
    return functional.normalize(pattern * visible, p=1, dim=-1, eps=torch.finfo(pattern.dtype).tiny)


def heavy_hitter_pattern(
    pattern: Float[Tensor, "window head query key"], window: int, heavy: int, n_kv_heads: int
) -> Float[Tensor, "window head query key"]:
    """Attention where, beside the last tokens, only the most attended to are left.

    Query by query and for each K/V head by itself: of those and the one that leaves the window, the one that has
    received least attention goes.
    """
    if pattern.shape[-1] != pattern.shape[-2]:
        raise ValueError("heavy hitters are found over whole windows; run them without a cache.")
    grouped = pattern.unflatten(1, (n_kv_heads, -1))  # window, K/V head, query head of it, query, key
    out = torch.zeros_like(grouped)
    received = pattern.new_zeros(len(pattern), n_kv_heads, pattern.shape[-1])
    stays = torch.zeros_like(received, dtype=torch.bool)
    for q in range(pattern.shape[-1]):
        visible = stays.clone()
        visible[..., max(0, q - window + 1) : q + 1] = True
        out[..., q, :] = functional.normalize(grouped[..., q, :] * visible[:, :, None], p=1, dim=-1)
        received += out[..., q, :].sum(2)
        leaving = q - window + 1
        if leaving >= 0:
            stays[..., leaving] = True
        if leaving >= heavy:
            least = received.masked_fill(~stays, torch.inf).argmin(-1, keepdim=True)
            stays.scatter_(-1, least, False)
    return out.flatten(1, 2)


class BoundedCache:
    """A model with a KV cache that lets go of what a policy does not keep; `cuts` hold in the first chunk only."""

    def __init__(self, model: Model, policy: Policy, cuts: Sequence[Intervention] = ()):
        if policy.heavy:
            raise ValueError("heavy hitters differ from head to head, and no cache here does; use forget.")
        model.anatomy.require_attention()
        if policy.window is not None:
            check_editable(model.anatomy)
        if policy.kept and not policy.shifted and model.anatomy.counts_places:
            raise NotApplicable(
                f"the attention of this {model.anatomy.family} model goes by places in the cache, so tokens that are "
                "kept while others go would move"
            )
        self.model, self.policy, self.cuts = model, policy, tuple(cuts)
        self.cache = DynamicCache()
        self.held = torch.zeros(0, dtype=torch.long)  # positions of what the cache holds
        self.kept_tokens: Int[Tensor, "window kept"] | None = None
        self.n_run = 0

    @torch.inference_mode()
    def __call__(self, tokens: Int[Tensor, "window new"]) -> Float[Tensor, "window new vocabulary"]:
        """Run the next tokens; returns what is predicted after each."""
        n_kept, new = len(self.policy.kept), tokens.shape[1]
        first = self.n_run == 0
        if first:
            if new < n_kept:
                raise ValueError(f"the first {new} tokens are fewer than the {n_kept} to be kept; run more at once.")
            self.kept_tokens = tokens[:, :n_kept]
        elif self.policy.shifted and n_kept:
            self._move_up()
        positions = torch.arange(self.n_run, self.n_run + new)
        keys = torch.cat([self.held, positions])
        try:
            logits = self._run(tokens, positions, keys, self.cuts if first else (), self.cache)
        except (AttributeError, IndexError):
            raise NotApplicable(f"a {self.model.anatomy.family} model keeps more than keys and values") from None
        if self.cache.get_seq_length() == 0:
            raise NotApplicable(f"a {self.model.anatomy.family} model does not take a cache of keys and values")
        self.n_run += new
        stays = self.policy.sees(torch.tensor([self.n_run]), keys)[0]
        self.held = keys[stays]
        for layer in self.cache.layers:
            index = stays.nonzero()[:, 0].to(layer.keys.device)
            layer.keys, layer.values = layer.keys.index_select(2, index), layer.values.index_select(2, index)
        return logits

    def _run(
        self,
        tokens: Int[Tensor, "window new"],
        positions: Int[Tensor, " new"],
        keys: Int[Tensor, " key"],
        cuts: Sequence[Intervention],
        cache: DynamicCache,
    ) -> Float[Tensor, "window new vocabulary"]:
        device = self.model.cfg.device
        position_ids = positions[None].expand(len(tokens), -1).to(device)
        with patched(self.model, *cuts, *self._hide(positions, keys)):
            return self.model(tokens.to(device), past_key_values=cache, use_cache=True, position_ids=position_ids)

    def _hide(self, queries: Int[Tensor, " query"], keys: Int[Tensor, " key"]) -> Iterator[Intervention]:
        """Within a chunk, too, a query sees no more than the policy keeps; the same for all layers with one sight."""
        if self.policy.window is None:
            return
        anatomy = self.model.anatomy
        for sight in set(anatomy.sight):
            names = [name for name, own in zip(anatomy.pattern_hooks, anatomy.sight, strict=True) if own == sight]
            visible = self.policy.sees(queries, keys, sight).to(self.model.cfg.device)
            yield apply(hook(names), lambda pattern, visible=visible: renormalize(pattern, visible.to(pattern.device)))

    def _move_up(self) -> None:
        """Run the kept tokens once more, right before the window: attention knows distances only, so the rotation of
        their keys is all that changes.
        """
        n = len(self.policy.kept)
        if len(self.held) <= n or self.held[n] == n:
            return
        positions = torch.arange(int(self.held[n]) - n, int(self.held[n]))
        moved = DynamicCache()
        self._run(self.kept_tokens, positions, positions, self.cuts, moved)
        for layer, new in zip(self.cache.layers, moved.layers, strict=True):
            layer.keys = torch.cat([new.keys, layer.keys[:, :, n:]], dim=2)


def token_losses(
    logits: Float[Tensor, "window position vocabulary"], targets: Int[Tensor, "window target"]
) -> Float[Tensor, "window target"]:
    """Cross-entropy in nats of the tokens that follow the first positions; what no target follows is left out."""
    logits = logits[:, : targets.shape[1]].float()
    # The vocabulary last: over another dimension, log_softmax adds up in an order that loses four digits.
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.to(logits.device).flatten(), reduction="none")
    return loss.view_as(targets).cpu()


def run_bounded(
    model: Model,
    tokens: Int[Tensor, "window position"],
    policy: Policy,
    cuts: Sequence[Intervention] = (),
    chunk: int = CHUNK,
) -> Float[Tensor, "window prediction"]:
    """Losses, in nats, of text that runs through a bounded cache; it may be longer than the context.

    Where the policy shifts, kept tokens move up between chunks. `cuts` are at positions of the first chunk only.
    """
    bounded, losses = BoundedCache(model, policy, cuts), []
    for start in progress(range(0, tokens.shape[1], chunk), str(policy), "chunk"):
        logits = bounded(tokens[:, start : start + chunk])
        losses.append(token_losses(logits, tokens[:, start + 1 : start + chunk + 1]))
    return torch.cat(losses, dim=1)


def generate(
    model: Model, prompt: Int[Tensor, " length"], policy: Policy, n: int, cuts: Sequence[Intervention] = ()
) -> Int[Tensor, " n"]:
    """Write n tokens greedily from a bounded cache."""
    bounded, written = BoundedCache(model, policy, cuts), []
    for part in prompt.split(CHUNK):
        logits = bounded(part[None])
    for _ in progress(range(n), str(policy), "token"):
        written.append(int(logits[0, -1].argmax()))
        logits = bounded(torch.tensor([written[-1:]]))
    return torch.tensor(written)
