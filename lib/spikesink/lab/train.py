"""Train one configuration, watch spike and sink grow, and keep a record of it.

A run that is stopped goes on from its last checkpoint as if nothing had been: its batches are functions of seed and
step, and the checkpoint holds all else. Several processes (torchrun) each take their part of every batch.
"""

import contextlib
import io
import math
import os
import pickle
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from spikesink.cli import KEPT_EVERY
from spikesink.common import progress, write_atomically
from spikesink.lab.config import Config
from spikesink.lab.data import Backcopy, Task, batch, held_out
from spikesink.lab.measures import WINDOWS, backcopy_truth, stream_median
from spikesink.lab.model import Decoder
from spikesink.patching.outcome import evaluate

LOOKS = 30  # times in a run
LEAST = 0.1  # what a cosine schedule ends at, of the learning rate
LONGEST_STEP = 1.0  # norm that gradients are clipped to
CHECKPOINT = "checkpoint.pt"
STATE = ("step", "seconds", "losses", "curve")  # of a run, beside model and optimizer
MULTIPLY_BFLOAT16 = ("avx512_bf16", "amx_bf16")  # capabilities of a CPU, by torch's names


class TrainingError(RuntimeError):
    """A run that cannot go on; the message is one sentence that names the step and the configuration."""


@dataclass(frozen=True)
class Machine:
    """What a run is computed with; it changes the speed, and the last digits.

    `rank` and `world` are this process's number and how many there are; `piece` is the most tokens that go through the
    model at once, of each process.
    """

    device: str = "cpu"
    precision: str = "float32"  # of the products; weights and stream stay in float32
    compiled: bool = True
    piece: int = 2**15
    rank: int = 0
    world: int = 1


@dataclass
class Run:
    """A run as far as it has come; `curve` has a row a look."""

    config: Config
    model: Decoder
    optimizer: torch.optim.Optimizer
    step: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)  # of the steps since the last look
    curve: list[dict[str, float | int]] = field(default_factory=list)


def start(config: Config, machine: Machine = Machine()) -> Run:
    """A run before its first step: weights drawn by the seed."""
    model = Decoder(config).to(machine.device)
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True)
    return Run(config, model, optimizer)


def rate(config: Config, step: int) -> float:
    """The learning rate of a step: up from nothing in the warm-up, then down a cosine, or constant."""
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.learning_rate * (LEAST + (1 - LEAST) * (1 + math.cos(math.pi * done)) / 2)


def train(
    config: Config,
    task: Task,
    folder: Path | None = None,
    machine: Machine = Machine(),
    tell: Callable[[Run], None] = lambda run: None,
    until: int | None = None,
    kept_every: float = KEPT_EVERY,
) -> Run:
    """Train to the last step, or `until` another, from the checkpoint in `folder` if one is there.

    Checkpoints go there every `kept_every` seconds; without a folder none are kept. `tell` is called after every step.
    A loss that is not finite, and a checkpoint of another configuration, raise a TrainingError.
    """
    run, identity = start(config, machine), [config.key, task.sha256, machine.precision]
    if folder is not None:
        _resume(run, folder, identity)
    mean_loss, looks = make_loss(run.model, machine), look_steps(config)
    last, kept = min(until or config.steps, config.steps), time.monotonic()
    begun = kept - run.seconds
    while True:
        if run.step in looks and (not run.curve or run.curve[-1]["step"] < run.step):
            run.curve.append({name: value for name, value in look(run, task).items() if isinstance(value, float | int)})
            run.losses.clear()
        run.seconds = time.monotonic() - begun
        done = run.step >= last
        if folder is not None and machine.rank == 0 and (done or time.monotonic() - kept > kept_every):
            _keep(run, folder, identity)
            kept = time.monotonic()
        tell(run)
        if done:
            return run
        step(run, task, mean_loss, machine)


def train_seeds(config: Config, task: Task, seeds: int) -> list[Run]:
    """Train a configuration several times, from its own seed on, under a bar: for models of seconds."""
    numbers = range(config.seed, config.seed + seeds)
    machine = Machine(compiled=False)
    return [train(replace(config, seed=seed), task, machine=machine) for seed in progress(numbers, "training", "run")]


def multiplies_bfloat16(device: str) -> bool:
    """Whether a device has instructions for products in bfloat16.

    On a CPU without them bfloat16 is slower, and gradients are NaN as torch.compile makes them (on Apple's as well:
    pytorch issue 171764).
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(torch.cpu.get_capabilities().get(name) for name in MULTIPLY_BFLOAT16)


def can_compile() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs on a CPU."""
    return any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "c++", "clang++") if name)


def look_steps(config: Config) -> tuple[int, ...]:
    """The steps before which spike and sink are measured, denser at the beginning; the last is the end of the run."""
    return tuple(sorted({round(config.steps * (i / LOOKS) ** 1.5) for i in range(LOOKS + 1)}))


def step(run: Run, task: Task, mean_loss: nn.Module, machine: Machine) -> None:
    """Take the next step of a run; TrainingError where the loss is not finite."""
    for group in run.optimizer.param_groups:
        group["lr"] = rate(run.config, run.step)
    windows = batch(task, run.config, run.step)
    if machine.world > len(windows):
        raise TrainingError(f"a batch of {len(windows)} windows is too few for {machine.world} processes; start fewer.")
    mine = torch.from_numpy(windows[machine.rank :: machine.world]).to(machine.device)
    pieces = mine.split(max(1, machine.piece // mine.shape[1]))
    total = torch.zeros((), device=machine.device)
    for i, piece in enumerate(pieces):
        alone = machine.world == 1 or i == len(pieces) - 1
        with contextlib.nullcontext() if alone else mean_loss.no_sync(), torch.enable_grad():
            loss = mean_loss(piece) * (len(piece) * machine.world / len(windows))  # processes may have unequal shares
            loss.backward()
        total += loss.detach()
    if machine.world > 1:
        dist.all_reduce(total)
        total /= machine.world
    if not math.isfinite(value := float(total)):
        raise _diverged(run, f"the loss is {value}")
    nn.utils.clip_grad_norm_(run.model.parameters(), LONGEST_STEP)
    run.optimizer.step()
    run.optimizer.zero_grad()
    run.losses.append(value)
    run.step += 1


def _diverged(run: Run, what: str) -> TrainingError:
    return TrainingError(f"{what} at step {run.step} of {run.config}; try a smaller learning rate.")


class _MeanLoss(nn.Module):
    """Mean loss of a batch, as one module, so that it can be compiled and spread as a whole."""

    def __init__(self, model: Decoder, machine: Machine):
        super().__init__()
        self.model, self.machine = model, machine

    def forward(self, tokens: Int[Tensor, "window position"]) -> Tensor:
        narrow = self.machine.precision != "float32"
        kind = torch.device(self.machine.device).type
        with torch.autocast(kind, dtype=getattr(torch, self.machine.precision)) if narrow else contextlib.nullcontext():
            logits = self.model(tokens)
        first = max(1, int(self.model.config.skipped * tokens.shape[1]))
        return functional.cross_entropy(logits[:, first - 1 : -1].float().flatten(0, 1), tokens[:, first:].flatten())


def make_loss(model: Decoder, machine: Machine) -> nn.Module:
    """What computes the mean loss of windows: compiled, and spread over processes, as the machine has it."""
    loss = _MeanLoss(model, machine)
    if machine.world > 1:
        loss = DistributedDataParallel(loss)
    return torch.compile(loss, dynamic=False) if machine.compiled else loss


def look(run: Run, task: Task, windows: int = WINDOWS) -> dict[str, Any]:
    """What the model is like at this step, on held-out windows: loss, sink ratio, largest activations.

    Activations are medians over windows of each one's largest: anywhere in the stream, at position 0, and elsewhere;
    `median` is the median entry of the stream, at the layer where it is largest. `loss` is the mean over the steps
    since the last look. Of Bigram-Backcopy also `backcopy_truth`.
    """
    tokens = held_out(task, windows, bos=run.config.bos)
    try:
        outcome = evaluate(run.model, tokens)
    except FloatingPointError:
        raise _diverged(run, "what the model predicts is not finite") from None
    row = {
        "step": run.step,
        "loss": sum(run.losses) / len(run.losses) if run.losses else float(outcome.loss.mean()),
        "held_out_loss": float(outcome.loss.mean()),
        "sink_ratio": outcome.sink_ratio,
        "attention": float(outcome.score.mean()),
        "max_activation": outcome.max_activation,
        "max_first": float(outcome.largest[:, 0].median()),
        "max_elsewhere": float(outcome.largest[:, 1:].amax(1).median()),
        "median": stream_median(run.model, tokens),
    }
    if isinstance(task, Backcopy):
        row |= backcopy_truth(run.model, task, windows)
    return row


def _keep(run: Run, folder: Path, identity: list[str]) -> None:
    """Write the checkpoint, whole or not at all."""
    state = {name: getattr(run, name) for name in STATE}
    state |= {"of": identity, "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    buffer = io.BytesIO()
    torch.save(state, buffer)
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / CHECKPOINT, buffer.getvalue())


def _resume(run: Run, folder: Path, identity: list[str]) -> None:
    file = folder / CHECKPOINT
    if not file.exists():
        return
    try:
        state = torch.load(file, map_location=run.model.cfg.device, weights_only=True)
    except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise TrainingError(
            f"the checkpoint {file} is damaged ({error}); remove it, and the run begins anew."
        ) from None
    if state.get("of") != identity:
        raise TrainingError(
            f"the checkpoint {file} is of another configuration, text or precision; remove it, and the run begins anew."
        )
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    for name in STATE:
        setattr(run, name, state[name])
