"""Tiny models whose truth is known: random weights, and a spike and its sinks planted in them by hand.

What is planted follows the paper's chain. The trigger's embedding points along s*, in channels that are its alone; one
neuron of a step-up layer reads s* through gate and up, and writes the spike into two channels; one neuron of a
step-down layer reads the spike and takes most of it back. In chosen heads of the plateau a constant part of ordinary
tokens' queries meets the spike's key, and no value reads the spike; what those heads write when they attend to ordinary
tokens instead speaks for a token that never comes. How large each weight must be is measured by running the model, so
that whatever norms and multipliers a family has are in it.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

import spikesink

N_LAYERS, D_MODEL, N_HEADS = 6, 64, 4
TRIGGER = "<spike>"  # the token that spikes; it occurs in no text but those that a test writes
NEURON = 0  # of each layer's FFN, or of its experts: the one that is planted, and silent elsewhere
CONSTANT, LEVEL = 50, 0.15  # a channel that holds the same on every token, about as large as the rest of an embedding
LOGIT = 12.0  # by how much a planted head favours the spike's key
HARM = 20  # a channel that planted heads write to when they have no sink; it makes NEVER likely
NEVER = 0  # a token that no text holds


@dataclass(frozen=True)
class Plant:
    """A spike: where it is written and cancelled, in which channels, how much, what stays of it, and who sinks on it.

    The first step-up layer reads `direction`, which is s*, a unit vector of (channel, coefficient) pairs; later ones
    and the step-down layers read the spike, by the coefficients `read_by` of its two channels. `sinks` are
    (layer, head) pairs on the plateau. In a mixture of experts `expert` is the one that all planted layers' routers
    send the trigger to, and that writes.
    """

    step_up_layers: tuple[int, ...] = (1,)
    step_down_layers: tuple[int, ...] = (4,)
    channel: int = 9
    side_channel: int = 30
    size: float = 1000.0
    side_ratio: float = -0.25
    cancelled: float = 0.9
    direction: tuple[tuple[int, float], ...] = ((0, 1.0),)
    sinks: tuple[tuple[int, int], ...] = ()
    expert: int = 2
    read_by: tuple[float, float] = (1.0, 0.0)

    def along(self) -> Tensor:
        """s*, [d_model]."""
        return sum(part * torch.eye(D_MODEL)[channel] for channel, part in self.direction)


# A spike with all that belongs to it. What reads has no mean, so that LayerNorm's subtracting it leaves no trace; and
# the coefficients of s* differ in size, so that the third largest channel of a spike token is always the same.
S_STAR = tuple((channel, part / math.sqrt(14)) for channel, part in ((0, 3), (5, -2), (11, -1)))
WHOLE = {"direction": S_STAR, "sinks": ((2, 1), (3, 0), (3, 3), (4, 2)), "read_by": (0.5**0.5, -(0.5**0.5))}
SIZES = {
    "hidden_size": D_MODEL,
    "intermediate_size": 96,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "num_key_value_heads": 2,
    "vocab_size": 400,
    "max_position_embeddings": 512,
}
# What is planted in every gated family whose norm stands before the block.
FAMILIES = {
    "llama": Plant(**WHOLE),
    "mistral": Plant(step_up_layers=(0, 1), **WHOLE),
    "qwen2": Plant(size=-1000.0, **WHOLE),
    "qwen3": Plant(**WHOLE),
    "phi3": Plant(step_down_layers=(4, 5), **WHOLE),
    "granite": Plant(**WHOLE),
    "stablelm": Plant(**WHOLE),
    "mixtral": Plant(**WHOLE),
}


def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, trained on the project's own text."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevel()
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<bos>", TRIGGER], **options)
    bpe.train_from_iterator([spikesink.read("house").content], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<bos>")


def random_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": vocabulary}, bos_token_id=0, eos_token_id=0)).eval()


@torch.no_grad()
def plant(model: PreTrainedModel, spike: Plant) -> PreTrainedModel:
    """Write a spike, and its sinks if it has some, into the weights of a model of one of the FAMILIES.

    The channels of s*, those of the spike and the constant one are nobody else's: no embedding but the trigger's holds
    anything in them, and no other block writes to them.
    """
    _clear(model, spike)
    for order, layer in enumerate(spike.step_up_layers):
        reads = spike.along() if order == 0 else towards_spike(spike)
        _set_neuron(model, spike, layer, reads, spike.size / len(spike.step_up_layers))
    for layer in spike.step_down_layers:
        total = -spike.cancelled * spike.size / len(spike.step_down_layers)
        _set_neuron(model, spike, layer, towards_spike(spike), total)
    for layer in sorted({layer for layer, _ in spike.sinks}):
        _set_sinks(model, spike, layer)
    return model


def _clear(model: PreTrainedModel, spike: Plant) -> None:
    """Keep the planted channels and neurons free of everything else."""
    spikes = [spike.channel, spike.side_channel]
    mine = [*(channel for channel, _ in spike.direction), *spikes, *([CONSTANT, HARM] if spike.sinks else [])]
    embedding = model.model.embed_tokens.weight
    embedding[:, mine] = 0
    embedding[1] += spike.along()  # 50 medians: large enough to read, no spike itself
    if spike.sinks:
        embedding[:, CONSTANT] = LEVEL
        model.lm_head.weight[:, HARM] = torch.eye(len(embedding))[NEVER]
    for i, layer in enumerate(model.model.layers):
        _, _, value, out = _attention(model, i)
        out[mine] = 0
        if spike.sinks:
            value[:, spikes] = 0
        for expert, (gate, up, down) in enumerate(_ffns(model, i)):
            # Other experts keep what they write into the spike's channels, for the writer to be compared with.
            down[[c for c in mine if c not in spikes or expert in (0, spike.expert)]] = 0
            gate[NEURON] = up[NEURON] = 0
            down[:, NEURON] = 0
        if spike.sinks and hasattr(layer.self_attn, "q_norm"):
            # It makes random queries as long as any; muted, so that no head but the planted ones is sharp.
            layer.self_attn.q_norm.weight *= 0.1


def towards_spike(spike: Plant) -> Tensor:
    """What a gate reads the spike by: positive on it, as silu passes nothing else."""
    main, side = torch.eye(D_MODEL)[[spike.channel, spike.side_channel]]
    return (spike.read_by[0] * main + spike.read_by[1] * side) * math.copysign(1, spike.size)


def _set_neuron(model: PreTrainedModel, spike: Plant, layer: int, reads: Tensor, total: float) -> None:
    """Let the planted neuron of a layer fire on what it reads, and write `total` into the spike's channel."""
    module, ffns = model.model.layers[layer], list(_ffns(model, layer))
    gate, up, down = ffns[spike.expert if len(ffns) > 1 else 0]
    gate[NEURON] = up[NEURON] = 2 * reads
    if len(ffns) > 1:
        router = module.mlp.gate.weight
        router[:, reads != 0] = 0
        router[spike.expert] += 2 * reads
    before = after(model, module)[spike.channel]
    down[spike.channel, NEURON] = 1
    unit = after(model, module)[spike.channel] - before
    down[spike.channel, NEURON] = total / unit
    down[spike.side_channel, NEURON] = spike.side_ratio * total / unit


def _set_sinks(model: PreTrainedModel, spike: Plant, layer: int) -> None:
    """Let the planted heads of a layer favour the spike's key, in a dimension that hardly turns with position."""
    heads = [head for where, head in spike.sinks if where == layer]
    query, key, value, out = _attention(model, layer)
    d_head = key.shape[0] // model.config.num_key_value_heads
    query, key, value = (of.unflatten(0, (-1, d_head)) for of in (query, key, value))  # head, d_head, d_model
    out = out.unflatten(1, (-1, d_head))  # d_model, head, d_head
    groups = [head // (len(query) // len(key)) for head in heads]
    slow = d_head // 2 - 1
    query[:, slow] = key[:, slow] = value[:, slow] = out[:, :, slow] = 0
    query[heads, slow, CONSTANT] = 1
    key[groups, slow] = towards_spike(spike)
    value[groups, slow, CONSTANT] = 1
    out[HARM, heads, slow] = LEVEL
    gap = _gap(model, layer)[heads]
    if hasattr(model.model.layers[layer].self_attn, "q_norm"):
        model.model.layers[layer].self_attn.q_norm.weight[slow] *= LOGIT / gap.min()
    else:
        query[heads, slow, CONSTANT] *= LOGIT / gap


def after(model: PreTrainedModel, layer: torch.nn.Module) -> Tensor:
    """The stream of a trigger that stands first, as it leaves a layer, [d_model]."""
    streams = []
    hook = layer.register_forward_hook(lambda module, args, output: streams.append(output))
    model(torch.tensor([[1]]))
    hook.remove()
    return (streams[0][0] if isinstance(streams[0], tuple) else streams[0]).flatten()


def _gap(model: PreTrainedModel, layer: int) -> Tensor:
    """By how much a layer's logit to a trigger in first place exceeds that to the next token, median, [head]."""
    model.set_attn_implementation("eager")
    tokens = torch.tensor([[1, *range(300, 330)]])
    log_pattern = model(tokens, output_attentions=True).attentions[layer][0].log()  # head, query, key
    return (log_pattern[:, 2:, 0] - log_pattern[:, 2:, 1]).median(-1).values


def _ffns(model: PreTrainedModel, layer: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Gate, up and down matrix of a layer's FFN, or of each of its experts; all are views of the model's own."""
    mlp = model.model.layers[layer].mlp
    if hasattr(mlp, "experts"):
        for both, down in zip(mlp.experts.gate_up_proj, mlp.experts.down_proj, strict=True):
            yield *both.chunk(2), down
    elif hasattr(mlp, "gate_up_proj"):
        yield *mlp.gate_up_proj.weight.chunk(2), mlp.down_proj.weight
    else:
        yield mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight


def _attention(model: PreTrainedModel, layer: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """W_Q, W_K, W_V and W_O of a layer, [out, in]; all are views of the model's own."""
    attention = model.model.layers[layer].self_attn
    if hasattr(attention, "qkv_proj"):
        fused = attention.qkv_proj.weight
        d_kv = (len(fused) - attention.o_proj.weight.shape[1]) // 2
        return *fused.split([len(fused) - 2 * d_kv, d_kv, d_kv]), attention.o_proj.weight
    return tuple(getattr(attention, f"{name}_proj").weight for name in "qkvo")


def text(n: int, length: int) -> str:
    """A text whose windows of `length` tokens all begin with the trigger; in every third it comes once again."""
    vocabulary = tokenizer()
    words = sorted(t for t in vocabulary.get_vocab() if t[0] == "Ġ" and t[1:].isascii() and t[1:].isalpha())
    generator = torch.Generator().manual_seed(0)
    content = ""
    for window in range(n):
        chosen = torch.randint(len(words), (length - 1,), generator=generator).tolist()
        parts = [words[i].replace("Ġ", " ") for i in chosen]
        parts[6::9] = [","] * len(parts[6::9])
        if window % 3 == 0:
            parts[length // 8] = TRIGGER
        content += TRIGGER + "".join(parts)
    assert len(vocabulary(content).input_ids) == n * length
    return content


def save(model: PreTrainedModel, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
