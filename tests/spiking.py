"""A spike in a model of any family, crudely: to see what the measures make of it, not to find what was put there.

One neuron of every FFN or expert of a layer reads the trigger's embedding and writes the spike; one of a later layer
reads the spike and takes most of it back. Where a norm follows the block, it is the norm's scale that makes the size.
Queries are made long, so that some heads are sharp.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from tests.planted import D_MODEL, NEURON, S_STAR, Plant, after

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
    reads = Plant(direction=S_STAR).along()
    for name, parameter in model.named_parameters():
        if any(part in name for part in ("embed", "wte", "wpe")) and not name.endswith("bias"):
            parameter[:, MINE] = 0
    model.get_input_embeddings().weight[1] += reads
    for layer in _layers(model):
        for matrix in (*_matrices(layer, WRITES), *_matrices(layer, ATTENTION_WRITES)):
            matrix[MINE] = 0
        for name, parameter in layer.named_parameters():
            if name.endswith(QUERIES):
                parameter *= SHARP
    spike = torch.eye(D_MODEL)[CHANNEL]
    _set_neuron(model, STEP_UP, 2 * reads, SIZE)
    _set_neuron(model, STEP_DOWN, 2 * spike, -(1 - STAYS) * SIZE)
    return model


def _layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    return next(m for m in model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == N_LAYERS)


def _set_neuron(model: PreTrainedModel, number: int, reads: Tensor, total: float) -> None:
    layer = _layers(model)[number]
    before = after(model, layer)[CHANNEL]
    for row in _rows(layer):
        row[:] = reads
    writers = list(_matrices(layer, WRITES))
    for matrix in writers:
        matrix[:, NEURON] = 0
        matrix[CHANNEL, NEURON] = SIZE
    norm = getattr(layer, "post_feedforward_layernorm", None)
    unit = after(model, layer)[CHANNEL] - before
    if norm is not None:
        offset = 1 if "Gemma" in type(norm).__name__ else 0
        norm.weight[CHANNEL] = (norm.weight[CHANNEL] + offset) * total / unit - offset
        return
    for matrix in writers:
        matrix[CHANNEL, NEURON] *= total / unit


def _rows(layer: torch.nn.Module) -> Iterator[Tensor]:
    """What the planted neuron of each FFN or expert reads with, as views."""
    for matrix in _matrices(layer, READS):
        yield matrix[NEURON]
    for name, parameter in layer.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            for expert in parameter:
                if len(expert) == D_MODEL:  # gates and ups in turns, each a column
                    yield from (expert[:, 2 * NEURON], expert[:, 2 * NEURON + 1])
                else:
                    yield from (expert[NEURON], expert[len(expert) // 2 + NEURON])


def _matrices(layer: torch.nn.Module, names: tuple[str, ...]) -> Iterator[Tensor]:
    """Matrices [out, in] by the end of their names, and what experts write with, as views."""
    for name, parameter in layer.named_parameters():
        if name.endswith(names):
            yield parameter.T if "c_fc" in name or "c_proj" in name else parameter
        elif names is WRITES and name.endswith("experts.down_proj"):
            yield from (expert if len(expert) == D_MODEL else expert.T for expert in parameter)
