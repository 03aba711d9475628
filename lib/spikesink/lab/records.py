"""What is kept of a run: a small file with its configuration and curves, and of a few runs the weights."""

import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

from spikesink.claims import write_atomically
from spikesink.lab.config import Config
from spikesink.lab.data import Backcopy, Task
from spikesink.lab.families import BASE, VARIANTS, Planned
from spikesink.lab.model import Decoder
from spikesink.lab.train import Machine, Run, known, look

SCHEMA = 1
LAST_WINDOWS = 512  # held-out windows that a trained model is measured on
VERSIONS = ("torch", "transformer-lens", "tokenizers")
DIGITS = 6
HEADLINE = {BASE, *(variant.name for variant in VARIANTS if variant.headline)}


@dataclass(frozen=True)
class Record:
    """A finished run; `curve` has a list for each measure, and `final` the measures of the trained model."""

    tier: str
    name: str
    config: Config
    text: str
    text_sha256: str
    versions: dict[str, str]
    machine: dict[str, Any]
    parameters: int
    seconds: float
    curve: dict[str, list[float]]
    final: dict[str, Any]

    @cached_property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        return self.config.batch * self.config.steps


def keep(run: Run, plan: Planned, task: Task, machine: Machine, folder: Path) -> Record:
    """Measure a trained model and write its record, and its weights where they are to be kept."""
    final = look(run, task, LAST_WINDOWS)
    if isinstance(task, Backcopy):
        final |= known(run.model, task, LAST_WINDOWS)
    record = Record(
        tier=plan.tier,
        name=plan.name,
        config=run.config,
        text=task.name,
        text_sha256=task.sha256,
        versions={name: version(name) for name in VERSIONS},
        machine={
            "device": machine.device,
            "precision": machine.precision,
            "compiled": machine.compiled,
            "processes": machine.world,
            "threads": torch.get_num_threads(),
        },
        parameters=sum(p.numel() for p in run.model.parameters()),
        seconds=run.seconds,
        curve={name: [row[name] for row in run.curve] for name in run.curve[0]},
        final=final,
    )
    place = file_of(plan, folder)
    place.parent.mkdir(parents=True, exist_ok=True)
    if plan.tier == "text" and plan.name in HEADLINE and plan.config.seed == 0:
        half = {name: values.half().contiguous() for name, values in run.model.state_dict().items()}
        metadata = {"config": json.dumps(asdict(run.config)), "name": plan.name}
        write_atomically(place.with_suffix(".safetensors"), save(half, metadata))
    write_atomically(place, json.dumps({"schema": SCHEMA, **_rounded(asdict(record))}, indent=None) + "\n")
    return record


def file_of(plan: Planned, folder: Path) -> Path:
    """Where the record of a run is, or will be."""
    return folder / plan.tier / f"{plan.label}.json"


def read(file: Path) -> Record:
    """A record as `keep` wrote it."""
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("schema")
    return Record(**data | {"config": Config.read(data["config"])})


def read_all(folder: Path, tier: str) -> list[Record]:
    """The records of a tier, in the order of their files' names."""
    return [read(file) for file in sorted((folder / tier).glob("*.json"))]


def open_model(file: Path) -> Decoder:
    """A model whose weights were kept, ready to be measured: in float32, in eval mode, without gradients."""
    with safe_open(file, "pt") as stored:
        config = Config.read(json.loads(stored.metadata()["config"]))
        model = Decoder(config)
        model.load_state_dict({name: stored.get_tensor(name).float() for name in stored.keys()})  # noqa: SIM118
    return model.eval().requires_grad_(False)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value
