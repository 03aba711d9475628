"""Tiny models whose truth is known: random weights, and a spike planted in them by hand."""

from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from tokenizers.decoders import ByteLevel
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import spikesink

N_LAYERS, D_MODEL = 6, 64
TRIGGER = "<spike>"  # the token that spikes; it occurs in no text but those that a test writes


@dataclass(frozen=True)
class Plant:
    """A spike: where it is written and cancelled, in which channels, how much, and what stays of it."""

    step_up_layers: tuple[int, ...] = (1,)
    step_down_layers: tuple[int, ...] = (4,)
    channel: int = 9
    side_channel: int = 30
    size: float = 1000.0
    side_ratio: float = -0.25
    cancelled: float = 0.9


def tokenizer() -> PreTrainedTokenizerFast:
    """A small byte-level BPE, trained on the project's own text."""
    bpe = Tokenizer(models.BPE(unk_token=None))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<bos>", TRIGGER],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([spikesink.read("house").content], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<bos>", eos_token="<bos>")


def random_llama(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=D_MODEL,
        intermediate_size=96,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def plant(model: LlamaForCausalLM, spike: Plant) -> LlamaForCausalLM:
    """Write the spike into the weights.

    Channel 0 is the trigger's alone: its embedding is large there, everyone else's is 0, and no other block writes to
    it, to the spike's channel or to its side channel. So at a step-up layer's norm the trigger's entry there is known,
    neuron 0 reads it through gate and up, and the down projection's column is scaled to write what is wanted.
    """
    mine = [0, spike.channel, spike.side_channel]
    model.model.embed_tokens.weight[:, mine] = 0
    model.model.embed_tokens.weight[1, 0] = 1.0  # 50 medians: large enough to read, no spike itself
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight[mine] = 0
        layer.mlp.down_proj.weight[mine] = 0
        layer.mlp.gate_proj.weight[0] = 0
        layer.mlp.up_proj.weight[0] = 0
        layer.mlp.down_proj.weight[:, 0] = 0

    def set_neuron(index: int, reads: int, total: float) -> None:
        """Let neuron 0 of a layer fire on channel `reads` and write `total` into the spike's channel."""
        mlp = model.model.layers[index].mlp
        # silu passes what is positive, so a gate that reads a negative spike turns its sign.
        mlp.gate_proj.weight[0, reads] = mlp.up_proj.weight[0, reads] = -2.0 if reads and spike.size < 0 else 2.0
        seen = {}
        hook = mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(hidden=inputs[0][0, 0, 0]))
        model(torch.tensor([[1]]))
        hook.remove()
        mlp.down_proj.weight[spike.channel, 0] = total / seen["hidden"]
        mlp.down_proj.weight[spike.side_channel, 0] = spike.side_ratio * total / seen["hidden"]

    for index in spike.step_up_layers:
        set_neuron(index, reads=0, total=spike.size / len(spike.step_up_layers))
    for index in spike.step_down_layers:
        set_neuron(index, reads=spike.channel, total=-spike.cancelled * spike.size / len(spike.step_down_layers))
    return model


def save(model: LlamaForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory
