"""A spike in a model of any family, crudely: to see what the measures make of it, not to find what was put there.

One neuron of every FFN or expert of a layer reads the trigger's embedding and writes the spike; one of a later layer
reads the spike and takes most of it back. Where a norm follows the block, it is the norm's scale that makes the size.
Queries are made long, so that some heads are sharp.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.planted import NEURON, S_STAR

CHANNEL, SIZE, STAYS, SHARP = 9, 1000.0, 0.1, 8
STEP_UP, STEP_DOWN, N_LAYERS = 1, 4, 6
MINE = [*(channel for channel, _ in S_STAR), CHANNEL]
READS = ("gate_proj.weight", "up_proj.weight", "dense_h_to_4h.weight", "fc1.weight", "c_fc.weight")
WRITES = ("down_proj.weight", "dense_4h_to_h.weight", "fc2.weight", "mlp.c_proj.weight")
ATTENTION_WRITES = ("o_proj.weight", "out_proj.weight", "attn.c_proj.weight", "attention.dense.weight")
QUERIES = ("q_proj.weight", "q_b_proj.weight", "query_key_value.weight", "c_attn.weight", "q_norm.weight")


@torch.no_grad()
def make_spike(model: PreTrainedModel) -> PreTrainedModel:
    """Write a spike into a tiny random model's weights; token 1 has it."""
    width = model.config.hidden_size
    reads = torch.zeros(width)
    for channel, part in S_STAR:
        reads[channel] = part
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed", "wte", "wpe")) and not name.endswith("bias"):
            parameter[:, MINE] = 0
    model.get_input_embeddings().weight[1] += reads
    layers = _layers(model)
    for layer in layers:
        for matrix in [*_matrices(layer, WRITES), *_matrices(layer, ATTENTION_WRITES)]:
            matrix[MINE] = 0
        for name, parameter in layer.named_parameters():
            if name.endswith(QUERIES):
                parameter *= SHARP
    spike = torch.zeros(width).index_fill(0, torch.tensor(CHANNEL), 1.0)
    _set_neuron(model, STEP_UP, 2 * reads, SIZE)
    _set_neuron(model, STEP_DOWN, 2 * spike, -(1 - STAYS) * SIZE)
    return model


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)


def _set_neuron(model: PreTrainedModel, number: int, reads: Tensor, total: float) -> None:
    layer = _layers(model)[number]
    before = _after(model, layer)
    for row in _rows(layer):
        row[:] = reads
    writers = list(_matrices(layer, WRITES))
    for matrix in writers:
        matrix[:, NEURON] = 0
        matrix[CHANNEL, NEURON] = SIZE
    norm = getattr(layer, "post_feedforward_layernorm", None)
    unit = _after(model, layer) - before
    if norm is None:
        for matrix in writers:
            matrix[CHANNEL, NEURON] *= total / unit
    else:
        offset = 1 if "Gemma" in type(norm).__name__ else 0
        norm.weight[CHANNEL] = (norm.weight[CHANNEL] + offset) * total / unit - offset


def _rows(layer: torch.nn.Module) -> Iterator[Tensor]:
    """What the planted neuron of each FFN or expert reads with, as views."""
    for matrix in _matrices(layer, READS):
        yield matrix[NEURON]
    for name, parameter in layer.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert in parameter:
                if len(expert) == layer_width(layer):  # gates and ups in turns, each a column
                    yield from (expert[:, 2 * NEURON], expert[:, 2 * NEURON + 1])
                else:
                    yield from (expert[NEURON], expert[len(expert) // 2 + NEURON])


def _matrices(layer: torch.nn.Module, names: tuple[str, ...]) -> Iterator[Tensor]:
    """Matrices [out, in] by the end of their names, and what experts write with, as views."""
    for name, parameter in layer.named_parameters():
        if name.endswith(names):
            yield parameter.T if "c_fc" in name or "c_proj" in name else parameter
        elif names is WRITES and name.endswith("experts.down_proj"):
            yield from (expert if len(expert) == layer_width(layer) else expert.T for expert in parameter)


def layer_width(layer: torch.nn.Module) -> int:
    """d_model of a layer."""
    return next(len(matrix) for matrix in _matrices(layer, ATTENTION_WRITES))


def _after(model: PreTrainedModel, layer: torch.nn.Module) -> float:
    """The spike's channel of a trigger that stands first, as it leaves a layer."""
    seen = []
    hook = layer.register_forward_hook(lambda module, args, output: seen.append(output))
    model(torch.tensor([[1]]))
    hook.remove()
    return float((seen[0][0] if isinstance(seen[0], tuple) else seen[0]).reshape(-1)[CHANNEL])
