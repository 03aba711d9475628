"""Try every architecture that TransformerLens's bridge lists, as a tiny random model; the page is docs/families.md.

`make families` runs this; no test does. Each model is held against transformers itself: logits, the stream between
layers, and the attention on position 0. Then every claim is put to it, which must end in numbers or reasons.
"""

import importlib.metadata
import re
import tempfile
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

import spikesink
from spikesink import patching
from spikesink.chain import keys, sinks
from spikesink.chain.lifecycle import find_lifecycle, is_spike
from spikesink.chain.trace import trace_windows
from spikesink.common import CommandError, NotApplicable, escape, markdown_table, progress, write_atomically
from spikesink.ledger.evidence.everything import measure_all
from spikesink.model.paths import static_path
from spikesink.model.proof import CARRIES, PARTS, prove
from spikesink.model.texts import Text
from spikesink.model.weights import weights_of
from tests import planted

PAGE = Path(__file__).parents[1] / "docs" / "families.md"
TOLERANCE = 1e-4  # of the largest value, in float32
LAYERS, WIDTH, HEADS, VOCABULARY = 4, 64, 4, 400
# What sizes are called; a configuration gets those that it has.
SIZES = (
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers"),
    (WIDTH, "hidden_size n_embd d_model word_embed_proj_dim lru_width"),
    (HEADS, "num_attention_heads n_head n_heads num_heads attention_heads linear_num_value_heads"),
    (VOCABULARY, "vocab_size"),
    (512, "max_position_embeddings n_positions n_ctx max_seq_len"),
    (96, "intermediate_size n_inner ffn_dim ffn_hidden_size intermediate_size_mlp"),
    (48, "moe_intermediate_size shared_expert_intermediate_size expert_intermediate_size"),
    (32, "attention_window_size"),
    (16, "head_dim q_lora_rank kv_lora_rank v_head_dim mamba_d_head mamba_head_dim mamba_chunk_size chunk_size"),
    (16, "linear_key_head_dim linear_value_head_dim"),
    (8, "qk_rope_head_dim qk_nope_head_dim rotary_dim sliding_window attention_chunk_size window_size"),
    (8, "mamba_n_heads mamba_num_heads mamba_d_state state_size ssm_state_size"),
    (4, "num_local_experts num_experts n_routed_experts"),
    (2, "num_key_value_heads num_experts_per_tok linear_num_key_heads"),
    (1, "n_group topk_group first_k_dense_replace num_shared_experts num_mem_blocks"),
)
HYBRID = {"layer_types": ["linear_attention", "full_attention"] * 2}
MLA = {"qk_head_dim": 16, "head_dim": 8, "num_key_value_heads": 4}
# What a configuration needs besides, or what makes it the case that people meet.
MORE = {
    "Bamba": {"attn_layer_indices": [1, 3]},
    "DeepseekV2": MLA,
    "DeepseekV3": MLA,
    "Falcon": {"multi_query": True, "new_decoder_architecture": False},
    "FalconH1": {"mamba_d_ssm": 128},
    "Gemma4": {"vocab_size_per_layer_input": 400, "hidden_size_per_layer_input": 16},
    "GPTNeo": {"attention_types": [[["global", "local"], 2]]},
    "Glm4MoeLite": MLA,
    "GlmMoeDsa": MLA,
    "GraniteMoeHybrid": {"layer_types": ["mamba", "attention"] * 2},
    "Jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "Lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "Lfm2Moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 2},
    "Llama4": {"interleave_moe_layer_step": 1},
    "Mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 1},
    "OlmoHybrid": HYBRID,
    "Qwen3Next": HYBRID,
    "Qwen3_5": HYBRID,
    "Qwen3_5Moe": HYBRID,
    "RecurrentGemma": {"block_types": ["recurrent", "attention"]},
    "Youtu": MLA,
    "Zamba2": {"layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}


@dataclass
class Row:
    """What became of one architecture."""

    name: str
    refused: str = ""
    reasons: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)  # where it differs from transformers, or breaks
    tolerance: float = TOLERANCE


def configure(name: str, cls: type, **own: Any) -> transformers.PretrainedConfig:
    """A tiny configuration of an architecture's own class; what is its `own` comes before all sizes here."""
    base, more = cls.config_class(), MORE.get(name, {}) | own
    sizes = {key: size for size, names in SIZES for key in names.split() if _has(base, key)} | more
    types = getattr(base, "layer_types", None)
    if isinstance(types, list) and "layer_types" not in more:
        sizes["layer_types"] = (list(dict.fromkeys(types)) * LAYERS)[:LAYERS]
    sizes |= {key: i for i, key in enumerate(("bos_token_id", "eos_token_id", "pad_token_id")) if hasattr(base, key)}
    for _ in range(5):  # some names are only read
        try:
            return cls.config_class(**sizes)
        except AttributeError as error:
            sizes.pop(re.search(r"'(\w+)'", str(error))[1], None)
            sizes.pop("layer_types", None)
    raise ValueError("no configuration could be made")


def _has(config: transformers.PretrainedConfig, key: str) -> bool:
    if key in (getattr(config, "per_layer_attributes", None) or ()):
        return False
    optional = {"head_dim", "num_key_value_heads", "n_inner", "num_experts_per_tok", "moe_intermediate_size"}
    return hasattr(config, key) and (getattr(config, key) is not None or key in optional)


def build(architecture: str, **own: Any) -> transformers.PreTrainedModel:
    """A tiny random model of an architecture, in whose layer 1 something writes a spike where it can be found."""
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(configure(re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture), cls, **own)).eval().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn_like(weight)
            weight.copy_(noise * 0.15 if weight.ndim > 1 else weight + noise * 0.1)
            writes = re.search(r"\.1\..*(down_proj|fc2|fc_out|dense_4h_to_h|mlp\.c_proj|w2|output_linear)", name)
            if writes and weight.ndim > 1 and WIDTH in weight.shape[-2:]:
                (weight[..., 9, :] if weight.shape[-2] == WIDTH else weight[..., 9]).mul_(3e3)
    return model


def survey(
    architecture: str,
    folder: Path,
    with_claims: bool = True,
    length: int = 24,
    tolerance: float = TOLERANCE,
    **own: Any,
) -> Row:
    """Try one architecture, on windows of so many tokens."""
    row = Row(re.sub(r"(ForCausalLM|LMHeadModel)$", "", architecture), tolerance=tolerance)
    try:
        theirs = build(architecture, **own)
    except Exception as error:
        row.refused = f"no tiny model could be made ({type(error).__name__})"
        return row
    planted.save(theirs, folder)
    try:
        model = spikesink.load(folder)
        row.reasons = dict(prove(model).reasons)
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        compare(model, theirs, row, length)
        if with_claims:
            claims(model, row)
    except (CommandError, ValueError, FloatingPointError) as error:
        row.refused = str(error).replace(str(folder), "it")
    except Exception as error:
        row.wrong.append(f"{type(error).__name__}: {error}")
    return row


def compare(model, theirs, row: Row, length: int = 24) -> None:
    """Hold what is measured against transformers' own outputs.

    Logits, the stream between layers, the attention on position 0; and where the model proves what they stand on, the
    static path of first tokens, and how much nearer queries are to a spike token's key.
    """
    tokens = torch.randint(4, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        plain = theirs(tokens, output_hidden_states=True, output_attentions=True, use_cache=False)
        close("logits", model(tokens), plain.logits, row)
        seen = {}
        hooks = [(name, lambda value, hook: seen.update({hook.name: value})) for name in model.anatomy.layer_hooks[:-1]]
        with model.hooks(fwd_hooks=hooks):
            model(tokens)
    for name in model.anatomy.layer_hooks[1:-1] if plain.hidden_states else ():
        # Some families begin with the embedding, others after their first layer.
        streams = [h for h in plain.hidden_states if h.shape == seen[name].shape]
        close("stream", seen[name], min(streams, key=lambda h: float((h - seen[name]).abs().max())), row)
    scores = sinks.score(model, tokens)
    attentions = [a for a in getattr(plain, "attentions", None) or () if a is not None]
    if isinstance(scores, NotApplicable) or len(attentions) != len(model.anatomy.attention_layers):
        return
    for layer, attention in zip(model.anatomy.attention_layers, attentions, strict=True):
        seen_by = (attention > 0).any(1).sum(1)[:, 0, None]  # how many queries have position 0 in sight
        close("attention", scores.at[:, layer], attention[..., 0].sum(-1) / seen_by, row)
    at = patching.evaluate(model, tokens).score[:, list(model.anatomy.attention_layers)]
    close("evaluate", at, scores.at[:, list(model.anatomy.attention_layers)], row)
    compare_alone(model, theirs, row)
    compare_gaps(model, tokens, attentions, row)


@torch.no_grad()
def compare_alone(model, theirs, row: Row) -> None:
    """What tokens become that stand alone, before the last layer."""
    tokens = torch.arange(4, VOCABULARY, 57)
    ours = static_path(weights_of(model), tokens, 2 * model.anatomy.n_layers - 2)
    plain = theirs(tokens[:, None], output_hidden_states=True, use_cache=False).hidden_states
    if not isinstance(ours, NotApplicable):
        nearest = min(
            (h[:, 0] for h in plain if h.shape[-1] == ours.shape[-1]), key=lambda h: float((h - ours).abs().max())
        )
        close("static path", ours, nearest, row)


def compare_gaps(model, tokens: torch.Tensor, attentions: list[torch.Tensor], row: Row) -> None:
    """Logits of queries with a spike token's key, less the mean over others: log attention has the same differences."""
    life = find_lifecycle(trace_windows(model, tokens))
    geometry = keys.read_attention(model, tokens, life, NotApplicable("not collapsed")).geometry
    if isinstance(geometry, NotApplicable):
        return
    spiking = is_spike(life, life.main)
    for layer, attention in zip(model.anatomy.attention_layers, attentions, strict=True):
        gaps = []
        for weights, spikes in zip(attention, spiking, strict=True):
            seen, logits = (weights > 0).any(0), weights.double().log()
            other = seen & ~spikes
            for key in spikes.nonzero()[:, 0].tolist():
                queries = [query for query in range(key + 1, len(seen)) if seen[query, key] and other[query].any()]
                gaps += [logits[:, query, key] - logits[:, query, other[query]].mean(-1) for query in queries]
        close("gap", geometry.gap["spike"][layer].double(), torch.stack(gaps).mean(0), row)


def close(what: str, ours: torch.Tensor, theirs: torch.Tensor, row: Row) -> None:
    """Note where two tensors differ."""
    off = float((ours - theirs).abs().max() / theirs.abs().max())
    if not off <= row.tolerance and not any(what in said for said in row.wrong):
        row.wrong.append(f"{what} off by {off:.1g}")


def claims(model, row: Row) -> None:
    """Put every claim to the model: what is neither evidence nor a reason is an error of ours."""
    tokens = torch.randint(4, VOCABULARY, (6, 32), generator=torch.Generator().manual_seed(2))
    for claim, found in measure_all(model, tokens, text=Text("random", planted.text(40, 60))).items():
        if not found and not isinstance(found, NotApplicable):
            row.wrong.append(f"{claim} says nothing")


def page(rows: list[Row], names: list[str]) -> str:
    """The table."""
    libraries = ("transformer-lens", "transformers", "torch")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    cells, notes = [], defaultdict(list)
    for row in rows:
        why = row.refused or "; ".join(dict.fromkeys(short(reason) for reason in row.reasons.values()))
        marks = ["" if row.refused else "n/a" if part in row.reasons else "yes" for part in PARTS]
        notes[bool(row.refused)].append(row.name)
        cells.append([row.name, *marks, escape("; ".join([*row.wrong, why]) if row.wrong else why)])
    missing = sorted(set(names) - {f"{row.name}{end}" for row in rows for end in ("ForCausalLM", "LMHeadModel")})
    return TEXT.format(
        versions=versions,
        n=len(rows),
        measured=len(notes[False]),
        whole=sum(not (row.refused or row.reasons or row.wrong) for row in rows),
        wrong=sum(bool(row.wrong) for row in rows),
        carries="\n".join(f"- **{part}**: {what}" for part, what in CARRIES.items()),
        table=markdown_table(["family", *PARTS, "why not"], cells),
        missing=", ".join(missing),
    )


def short(reason: str) -> str:
    """A reason without the family's name, which the row says."""
    return re.sub(r" of this \S+ model('s blocks)?| this \S+ model", "", reason)[:150]


TEXT = """# Does it work on mine?

Made by `make families` with {versions}: a tiny random model of each architecture that TransformerLens's
bridge lists and transformers can build, {n} in all; {measured} of them are measured, {whole} in everything, and {wrong}
differ from transformers or break. Each is held against transformers itself: logits, the stream between layers, the
attention on position 0, the static path of first tokens, the gaps of attention's logits. On your own model two things
are checked: when it is first loaded, that the bridge does what transformers does; when it is first traced, the columns.

What each column carries:

{carries}

The stream itself, so spikes, their channels and tokens, is measured in all that are not refused. In a layer without
attention, what mixes tokens in its place counts as the layer's first block.

{table}

Not tried, as they read images or sound, are encoders, are no class of transformers, or have no head: {missing}.
"""


def main() -> None:
    """Try all of them and write the page."""
    names = sorted(SUPPORTED_ARCHITECTURES)
    tried = [n for n in names if hasattr(transformers, n) and n.endswith(("ForCausalLM", "LMHeadModel"))]
    rows = []
    for name in progress(tried, "trying families", "family"):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(survey(name, Path(folder)))
    PAGE.parent.mkdir(exist_ok=True)
    write_atomically(PAGE, page(rows, names))


if __name__ == "__main__":
    main()
