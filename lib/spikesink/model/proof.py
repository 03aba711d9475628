"""What a model must prove before it is measured: that it is made as the measures take it apart.

Every measure stands on a decomposition: blocks write to a stream, attention is a softmax of q.k, a token alone passes
W_O W_V. Each part of it (`PARTS`) is checked on the model itself, layer by layer, in one forward pass of a few tokens.
Nothing here knows a family. A measure names the parts that it needs (`require`); where one fails it does not apply, and
says why.
"""

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from spikesink.common import CommandError, NotApplicable, first_line, write_atomically
from spikesink.model import alone
from spikesink.model import anatomy as shapes
from spikesink.model import weights as matrices
from spikesink.model.anatomy import Anatomy, Model, anatomy, normalise, run_layers, spread_tokens
from spikesink.model.load import kept_file
from spikesink.model.weights import Weights, weights_of

HOOKS = {"q": "attn.q.hook_out", "k": "attn.k.hook_out", "v": "attn.v.hook_out"}
ROTATED = {"rotated_q": "attn.hook_rot_q", "rotated_k": "attn.hook_rot_k"}  # where `Anatomy.sees_rotation`
NORMALISED = "hook_normalized"  # of a norm: h~, before its learned scale
SCORES = "attn.hook_attn_scores"  # the logits, in most families; in some the pattern

# Of each part: how far it may be off in float32 and in half precision (bfloat16 rounds each number by up to 0.004), and
# what is said where it is further off. All is relative to what is compared, but attention, which lies between 0 and 1.
PARTS: dict[str, tuple[float, float, str]] = {
    "writes": (1e-3, 2e-2, "the writes of this {} model's blocks do not add up to its stream: something else writes"),
    "patterns": (1e-3, 2e-2, "the attention that this {} model shows does not add up to one over what a token sees"),
    "norm": (1e-3, 2e-2, "the norms of this {} model do more than divide the stream by its root mean square"),
    "keys": (1e-3, 1e-1, "the keys of this {} model are not W_K h~"),
    "logits": (1e-3, 1e-1, "the attention of this {} model is not the softmax of q.k times one scale"),
    # As it is where a gate, a clip or a learned sink stands between.
    "attention": (1e-3, 1e-1, "the attention of this {} model does not give a token alone W_O W_V h~"),
    "FFN": (1e-3, 1e-1, "the FFNs of this {} model do not give what their weights say"),
}
# What each of PARTS carries.
CARRIES = {
    "writes": "the blocks that write the spike and take it back",
    "patterns": "sink scores",
    "norm": "what becomes of the spike behind the norm",
    "keys": "which rows of W_K make the sink's key",
    "logits": "cosines and gaps of queries and keys",
    "attention": "what a token becomes that stands first",
    "FFN": "which channels each FFN can amplify; what a token becomes that stands first",
}
# What code of a family that is not known here may raise.
ERRORS = (AttributeError, KeyError, IndexError, RuntimeError, TypeError, ValueError, ZeroDivisionError)
SEEN = 0.9  # of queries, that make a window
STATIC_PATH = ("writes", "attention", "FFN")  # what following a token that stands alone needs


@dataclass(frozen=True)
class Proof:
    """How far each of PARTS is off, the worst layer's, and the reason for each that fails."""

    errors: Mapping[str, float]  # without those that could not be computed
    reasons: Mapping[str, str]
    turned: bool = True  # whether queries and keys are seen as they meet, after RoPE; else `SCORES` shows the logits

    def holds(self, *parts: str) -> bool:
        """Whether all of these parts hold."""
        return not any(part in self.reasons for part in parts)


def require(subject: Model | Weights, *parts: str) -> None:
    """Raise NotApplicable, with the words of the check, unless a model (or whatever has its proof) has these parts."""
    reasons = proof_of(subject).reasons
    for part in parts:
        if part in reasons:
            raise NotApplicable(reasons[part])


def proof_of(subject: Model | Weights) -> Proof:
    """The proof that a model gave, by its weights or by a trace as well; a model that gave none is asked for it now."""
    subject = subject.model if isinstance(subject, Weights) else subject
    kept = getattr(subject, "proof", None)
    return kept if isinstance(kept, Proof) else prove(subject)


def prove(model: Model) -> Proof:
    """Check all of PARTS on a model; the result stays with it, and in the cache for the next process that loads it."""
    anatomy(model)
    if (file := _kept(model)) is None:
        with _without_hooks(model):
            model.proof = _prove(model)
        return model.proof
    with contextlib.suppress(OSError, ValueError, TypeError):
        model.proof = Proof(**json.loads(file.read_text()))
        return model.proof
    with _without_hooks(model):
        model.proof = _prove(model)
    off, reasons = model.proof.errors, model.proof.reasons
    if not all(math.isfinite(off.get(part, 0.0 if part in reasons else math.nan)) for part in PARTS):
        return model.proof  # a weight is not finite; perhaps somebody has just made it so
    with contextlib.suppress(OSError):  # a cache that cannot be written costs a second
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(model.proof)))
    return model.proof


@contextlib.contextmanager
def _without_hooks(model: Model) -> Iterator[None]:
    """The model as it is, whatever cuts are in force when it is first measured."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    kept = [(point, point._forward_hooks) for point in points if point._forward_hooks]
    for point, hooks in kept:
        point._forward_hooks = type(hooks)()
    try:
        yield
    finally:
        for point, hooks in kept:
            point._forward_hooks = hooks


def _kept(model: Model) -> Path | None:
    """Where the proof of the same files, in the same precision, by the same code is kept."""
    if (source := getattr(model, "source", None)) is None:
        return None
    code = map(Path, (__file__, alone.__file__, shapes.__file__, matrices.__file__))
    return kept_file("proofs", source, model.cfg.dtype, model.cfg.device, *code)


def _prove(model: Model) -> Proof:
    family, whole = model.anatomy.family, model.cfg.dtype == torch.float32
    errors, reasons = {}, {}
    passed = _run(model)

    def check(part: str, function: Callable[[Model, Passed, int], Tensor]) -> bool:
        reasons.pop(part, None)
        try:
            errors[part] = max(float(function(model, passed, layer)) for layer in _layers(model.anatomy, part))
        except NotApplicable as why:
            reasons[part] = why.reason
        except FloatingPointError:
            return True  # whoever measures it says which weight it is
        except ERRORS as error:
            reasons[part] = f"the {part} of this {family} model cannot be checked ({first_line(error)})"
        else:
            if not errors[part] <= PARTS[part][0 if whole else 1]:
                reasons[part] = f"{PARTS[part][2].format(family)} (off by {errors[part]:.2g})"
        return part not in reasons

    check("writes", _check_writes)
    check("patterns", _check_pattern)
    check("norm", _check_norm)
    check("keys", _check_keys)
    turned = check("logits", _check_logits)
    if not turned and not model.anatomy.sees_rotation:
        passed |= {UNASKED + name: value for name, value in _run(model, silence_queries=True).items()}
        turned = not check("logits", _check_scores)
    check("attention", _check_attention)
    check("FFN", _check_ffn)
    return Proof(errors, reasons, turned)


def _layers(anatomy: Anatomy, part: str) -> list[int]:
    """The layers in which a part is looked for."""
    if part in ("writes", "norm", "FFN"):
        return list(range(anatomy.n_layers))
    if part == "attention" or not anatomy.attention_layers:
        anatomy.require_attention()
    return list(anatomy.attention_layers)


Passed = dict[str, Tensor]  # by hook, in float32 on the CPU
UNASKED = "without queries: "  # before a hook's name: what it carries when all queries are zero


def _run(model: Model, silence_queries: bool = False) -> Passed:
    """What the hooks carry that the checks need, as far as they fire."""
    shape, passed = model.anatomy, {}
    names = [*shape.layer_hooks, *filter(None, (*shape.write_hooks, *shape.pattern_hooks))]
    queries = [query_and_key(shape, layer)[0] for layer in shape.attention_layers]
    for layer in range(shape.n_layers):
        hooks = (*query_and_key(shape, layer), *(f"blocks.{layer}.{name}" for name in (*HOOKS.values(), SCORES)))
        names += [n for n in (*hooks, f"blocks.{layer}.{shape.attention_norm}.{NORMALISED}") if n in model.hook_dict]

    def keep(value: Tensor, hook) -> Tensor | None:
        passed[hook.name] = value.float().cpu()
        return torch.zeros_like(value) if silence_queries and hook.name in queries else None

    try:
        with torch.inference_mode(), model.hooks(fwd_hooks=[(name, keep) for name in names]):
            run_layers(model, spread_tokens(shape.d_vocab, shape.context))
    except ERRORS as error:
        family, why = shape.family, first_line(error)
        raise CommandError(f"this {family} model cannot be run ({why}); try a model of another family.") from None
    if any(passed[name].shape[2:] != (shape.d_model,) for name in shape.layer_hooks if name in passed):
        raise CommandError(
            f"the residual stream of this {shape.family} model is not one vector of {shape.d_model} numbers a token; "
            "try a model of another family."
        )
    return passed


def query_and_key(anatomy: Anatomy, layer: int) -> tuple[str, str]:
    """The hooks of a layer's queries and keys, after RoPE where a family shows that."""
    query, key = list((ROTATED if anatomy.sees_rotation else HOOKS).values())[:2]
    return f"blocks.{layer}.{query}", f"blocks.{layer}.{key}"


def _write(anatomy: Anatomy, passed: Passed, block: int) -> Tensor:
    name = anatomy.write_hooks[block - 1]
    return torch.zeros(()) if name is None else passed[name]


def _check_writes(model: Model, passed: Passed, layer: int) -> Tensor:
    """What enters a layer and what its blocks write, against what leaves it."""
    shape = model.anatomy
    enters, leaves = (passed[name] for name in shape.layer_hooks[layer : layer + 2])
    return _relative(enters + sum(_write(shape, passed, 2 * layer + i) for i in (1, 2)), leaves)


def _check_pattern(model: Model, passed: Passed, layer: int) -> Tensor:
    """Attention sums to one (or to less, where a learned sink takes part), and none is on later tokens."""
    pattern = passed[model.anatomy.pattern_hooks[layer]]
    missing = 1 - pattern.sum(-1)
    off = missing.clamp(max=0).abs() if model.anatomy.learned_sink else missing.abs()
    return off.amax() + pattern.triu(1).amax() - pattern.clamp(max=0).amin()


def _check_norm(model: Model, passed: Passed, layer: int) -> Tensor:
    """The normalised stream that enters a layer, against what the norm's own hook shows."""
    shape = model.anatomy
    if shape.attention_norm is None:
        raise NotApplicable(f"the blocks of this {shape.family} model read the stream itself, not through a norm")
    shown = passed[f"blocks.{layer}.{shape.attention_norm}.{NORMALISED}"]
    return _relative(normalise(passed[shape.layer_hooks[layer]], shape), shown)


def _check_keys(model: Model, passed: Passed, layer: int) -> Tensor:
    """W_K h~ and its bias, against the projection's own keys, before any QK norm and RoPE."""
    shape, (matrix, bias) = model.anatomy, weights_of(model).keys(layer)
    enters = passed[shape.layer_hooks[layer]]
    h = enters if shape.attention_norm is None else normalise(enters, shape)
    return _relative(h @ matrix.T + bias, passed[f"blocks.{layer}.{HOOKS['k']}"].flatten(2))


def _check_logits(model: Model, passed: Passed, layer: int) -> Tensor:
    """The softmax of q.k times the scale over what each query sees, against the pattern less a learned sink's share."""
    shape, error = model.anatomy, torch.zeros(())
    query, key = query_and_key(shape, layer)
    if (width := passed[f"blocks.{layer}.{HOOKS['q']}"][0, 0].numel()) != shape.n_heads * shape.d_head:
        raise ValueError(f"its queries come with something else, {width} numbers a token")
    for pattern, q, k in zip(passed[shape.pattern_hooks[layer]], passed[query], passed[key], strict=True):
        logits = attention_logits(shape, by_head(q, shape.d_head), by_head(k, shape.d_head))
        expected = logits.masked_fill(~visible(pattern), -torch.inf).softmax(-1)
        error = torch.maximum(error, (expected - pattern / pattern.sum(-1, keepdim=True)).abs().amax())
    return error


def _check_scores(model: Model, passed: Passed, layer: int) -> Tensor:
    """The softmax of the logits that a hook shows, against the pattern, where q and k are seen before RoPE only.

    RoPE turns a token's query and key alike, so that its logit towards itself is q.k times the scale all the same; and
    where nothing is added to q.k, queries of zero attend evenly to all they see.
    """
    shape = model.anatomy
    query, key = query_and_key(shape, layer)
    error = torch.zeros(())
    names = (shape.pattern_hooks[layer], UNASKED + shape.pattern_hooks[layer], f"blocks.{layer}.{SCORES}", query, key)
    for pattern, unasked, scores, q, k in zip(*(passed[name] for name in names), strict=True):
        sees = visible(pattern)
        expected = scores.masked_fill(~sees, -torch.inf).softmax(-1)
        logits = attention_logits(shape, by_head(q, shape.d_head), by_head(k, shape.d_head))
        own, length = (logits - scores).diagonal(dim1=-2, dim2=-1), scores.diagonal(dim1=-2, dim2=-1).abs().amax()
        differences = (expected - pattern, sees / sees.sum(-1, keepdim=True) - unasked, own / length.clamp(min=1))
        error = torch.stack([error, *(difference.abs().amax() for difference in differences)]).amax()
    return error


def attention_logits(
    anatomy: Anatomy, q: Float[Tensor, "head query d_head"], k: Float[Tensor, "kv_head key d_head"]
) -> Float[Tensor, "head query key"]:
    """What enters the softmax: q.k times the scale, bent where a family bends it."""
    k = k.repeat_interleave(anatomy.n_heads // anatomy.n_kv_heads, dim=0)
    logits = anatomy.query_scale * torch.einsum("hqd,hkd->hqk", q, k)
    return logits if anatomy.softcap is None else anatomy.softcap * torch.tanh(logits / anatomy.softcap)


def by_head(x: Tensor, d_head: int) -> Float[Tensor, "head position d_head"]:
    """A hook's queries, keys or values by head; most families' come by position first, some all heads in a row."""
    return x.reshape(x.shape[0], -1, d_head).transpose(0, 1)


def visible(pattern: Float[Tensor, "head query key"]) -> Bool[Tensor, "query key"]:
    """Which keys each query has in sight, by the pattern itself: all before it, a sliding window, or its chunk.

    So a window is seen whatever it is called. Where attention is rounded to zero on some keys, as on a first token that
    all heads avoid, what is left is neither a window nor a chunk for nine queries in ten, so all keys are in sight.
    """
    queries = torch.arange(pattern.shape[-2], device=pattern.device)
    first = (pattern.amax(0) > 0).int().argmax(-1)
    wide = int((queries - first).max()) + 1  # the most that any query sees
    begins = torch.zeros_like(queries)
    for window in ((queries - wide + 1).clamp(min=0), queries - queries % wide):
        if (window == first).float().mean() >= SEEN:
            begins = window
    return (begins[:, None] <= queries) & (queries <= queries[:, None])


def _check_attention(model: Model, passed: Passed, layer: int) -> Tensor:
    """What attention writes at position 0, against the map that one key leaves."""
    shape = model.anatomy
    enters, wrote = passed[shape.layer_hooks[layer]][:, 0], _write(shape, passed, 2 * layer + 1)[:, 0]
    return _relative(alone.attend_alone(weights_of(model), layer)(enters) * shape.residual_multiplier, wrote)


def _check_ffn(model: Model, passed: Passed, layer: int) -> Tensor:
    """What the FFN writes, against what its weights (or its modules by themselves) make of the stream."""
    shape = model.anatomy
    enters = passed[shape.layer_hooks[layer]]
    reads = enters if shape.parallel else enters + _write(shape, passed, 2 * layer + 1)
    fed = alone.feed_alone(weights_of(model), layer, torch.float32)(reads.flatten(0, 1))
    return _relative(fed * shape.residual_multiplier, _write(shape, passed, 2 * layer + 2).flatten(0, 1))


def _relative(ours: Float[Tensor, "*token d_model"], theirs: Float[Tensor, "*token d_model"]) -> Tensor:
    """The largest difference of any token, over the length of what it should be."""
    return ((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-30)).max()
