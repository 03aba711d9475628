"""What is kept of a run: a small file with its configuration and curves, and of a few runs the weights."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from spikesink.common import write_atomically
from spikesink.lab.config import LAB, Config, ConfigError
from spikesink.lab.data import Corpus, Task, held_out, tokenizer_of
from spikesink.lab.families import BASE, VARIANTS, Planned
from spikesink.lab.measures import measure_trained
from spikesink.lab.model import Decoder
from spikesink.lab.train import Machine, Run, look

SCHEMA = 1
LAST_WINDOWS = 512  # held-out windows that a trained model is measured on
VERSIONS = ("torch", "transformer-lens", "tokenizers")
DIGITS = 6
TOKENIZER, WINDOWS_FILE = "tokenizer.json", "held-out.safetensors"
WITH_BOS, NO_BOS = "tokens", "tokens without BOS"
KEPT = {BASE, *(variant.name for variant in VARIANTS if variant.headline and variant.kept)}  # their weights are kept


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
    curve: dict[str, list[float | int]]
    final: dict[str, Any]

    @property
    def tokens(self) -> int:
        """Tokens that it was trained on."""
        return self.config.batch * self.config.steps


def keep(run: Run, plan: Planned, task: Task, machine: Machine, folder: Path) -> Record:
    """Measure a trained model and write its record, and its weights where they are to be kept."""
    record = Record(
        tier=plan.tier,
        name=plan.name,
        config=run.config,
        text=task.name,
        text_sha256=task.sha256,
        versions={name: version(name) for name in VERSIONS},
        machine={name: getattr(machine, name) for name in ("device", "precision", "compiled")}
        | {"processes": machine.world, "threads": torch.get_num_threads()},
        parameters=sum(p.numel() for p in run.model.parameters()),
        seconds=run.seconds,
        curve={name: [row[name] for row in run.curve] for name in run.curve[0]},
        final=look(run, task, LAST_WINDOWS) | measure_trained(run.model, task, LAST_WINDOWS),
    )
    file = file_of(plan, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    if plan.tier == "text" and plan.name in KEPT and plan.config.seed == 0:
        half = {name: values.half().contiguous() for name, values in run.model.state_dict().items()}
        metadata = {"config": json.dumps(asdict(run.config)), "name": plan.name}
        write_atomically(file.with_suffix(".safetensors"), save(half, metadata))
    rounded = json.loads(json.dumps(asdict(record)), parse_float=lambda digits: float(f"{float(digits):.{DIGITS}g}"))
    # The configuration to the last digit: a run whose record has another one is missing.
    write_atomically(file, json.dumps({"schema": SCHEMA, **rounded, "config": asdict(record.config)}) + "\n")
    return record


def keep_text(task: Task, folder: Path) -> None:
    """Write what it takes to look at trained models without their text: the tokenizer, and held-out windows."""
    if isinstance(task, Corpus):
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / TOKENIZER, task.tokenizer.backend_tokenizer.to_str())
        windows = {name: held_out(task, bos=bos).contiguous() for name, bos in ((WITH_BOS, True), (NO_BOS, False))}
        write_atomically(folder / WINDOWS_FILE, save(windows))


def windows_of(folder: Path, bos: bool = True) -> Int[Tensor, "window position"]:
    """The windows that models were looked at while they were trained; those that begin with BOS, or the others."""
    return load_file(folder / WINDOWS_FILE)[WITH_BOS if bos else NO_BOS]


def file_of(plan: Planned, folder: Path) -> Path:
    """Where the record of a run is, or will be."""
    return folder / plan.tier / f"{plan.label}.json"


def read(file: Path) -> Record:
    """A record as `keep` wrote it."""
    data = json.loads(file.read_text(encoding="utf-8"))
    data.pop("schema")
    return Record(**data | {"config": Config.read(data["config"])})


def folder_of(given: str | os.PathLike | None = None) -> Path:
    """Where records are: the folder that is given, or `figures/lab` beside the folder that this runs in."""
    folder = Path(given or Path.cwd().parent / "figures" / LAB)
    if not any(folder.glob("*/*.json")):
        raise ConfigError(f"there are no records in {folder}; train some with make ablations, or name another folder.")
    return folder


def read_all(folder: Path, tier: str) -> list[Record]:
    """The records of a tier, in the order of their files' names; of several texts or precisions a ConfigError."""
    records = [read(file) for file in sorted((folder / tier).glob("*-[0-9].json"))]
    texts, precisions = {r.text_sha256 for r in records}, {r.machine["precision"] for r in records}
    if len(texts) > 1 or len(precisions) > 1:
        raise ConfigError(
            f"the records in {folder / tier} are of more than one text or precision and cannot be compared; move those "
            "of one elsewhere, or train all with make ablations FIGURES=another folder."
        )
    return records


def digest(records: Sequence[Record]) -> str:
    """A hash of records, so that a ledger says which ones it was made from."""
    return hashlib.sha256(json.dumps([asdict(record) for record in records], sort_keys=True).encode()).hexdigest()


def open_model(file: Path) -> Decoder:
    """A model whose weights were kept, ready to be measured: in float32, in eval mode, without gradients.

    With the tokenizer that lies beside them, if there is one.
    """
    with safe_open(file, "pt") as stored:
        config = Config.read(json.loads(stored.metadata()["config"]))
        model = Decoder(config)
        model.load_state_dict({name: stored.get_tensor(name).float() for name in stored.keys()})  # noqa: SIM118
    tokenizer = file.with_name(TOKENIZER)
    model.tokenizer = tokenizer_of(tokenizer) if tokenizer.is_file() else None
    return model.eval().requires_grad_(False)
