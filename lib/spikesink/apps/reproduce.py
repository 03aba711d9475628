"""Run the notebooks headlessly, for one model or several in turn: what `make figures` calls.

A notebook runs again only when its cells, the library, a parameter, the model's file or the main libraries' versions
have changed, or when something that it wrote is gone. What it writes is whole or not there, whenever it is stopped.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import signal
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from rich.console import Console

from spikesink.apps import publish
from spikesink.apps.once import FOLDER
from spikesink.cli import absolute, open_console
from spikesink.common import CommandError, check_writable, in_a_sentence, write_atomically
from spikesink.lab.config import LAB
from spikesink.model.names import local, slug

LIBRARY = Path(__file__).parents[1]
QUIET_KERNEL = ["--log-level=CRITICAL"]  # the kernel warns of its transport at each start, and tells how it was stopped
ASKED = ("MODEL", "DEVICE", "DTYPE", "TEXT", "N_PROMPTS", "SEQ_LEN", "SEED")
VERSIONS = ("torch", "transformers", "transformer-lens", "matplotlib")


def command(chosen: argparse.Namespace) -> int:
    """Run what the arguments of `spikesink figures` ask for; returns 0 when all notebooks ran, else 1."""
    notebooks = sorted(chosen.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise CommandError(f"there are no notebooks in {chosen.notebooks}; run this from the project's root.")
    console = open_console()
    os.environ["TQDM_DISABLE"] = "1"  # progress bars have no place in a notebook that is stored
    code = store_all(notebooks, console) if chosen.store else run_all(plan(chosen, notebooks), console, chosen.jobs)
    if chosen.figures.is_dir():
        publish.render(chosen.figures)
        publish.draw(chosen.figures)
    return code


def plan(chosen: argparse.Namespace, notebooks: Sequence[Path]) -> list["Run"]:
    """What is asked for: the notebooks of each model, then those that ask for none, which are the lab's."""
    parameters = {
        "DEVICE": chosen.device,
        "DTYPE": chosen.dtype,
        "TEXT": absolute(chosen.text),
        "N_PROMPTS": chosen.n_prompts,
        "SEQ_LEN": chosen.seq_len,
        "SEED": chosen.seed,
        "FIGURES": str(chosen.figures.resolve()),
    }
    # Folders of figures do not share what was done: the same model can be in two of them, with other settings.
    places = chosen.figures, chosen.build / chosen.figures.name
    of_models = [notebook for notebook in notebooks if asks_for_a_model(notebook)]
    runs = [Run(slug(model), of_models, {"MODEL": model, **parameters}, *places) for model in chosen.models]
    if of_lab := [notebook for notebook in notebooks if notebook not in of_models]:
        runs.append(Run(LAB, of_lab, {key: parameters[key] for key in ("SEED", "FIGURES")}, *places))
    return runs


def asks_for_a_model(notebook: Path) -> bool:
    """Whether a notebook has MODEL among its parameters; what it does is the same for all models otherwise."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = (cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    return any(line.startswith("MODEL =") for source in tagged for line in "".join(source).splitlines())


@dataclass(frozen=True)
class Run:
    """Notebooks to run for one model, or for the lab: with what parameters, and where what they make goes."""

    name: str
    notebooks: Sequence[Path]
    parameters: Mapping[str, Any]
    figures: Path
    build: Path  # executed notebooks, and stamps of what was done

    def stamps(self) -> list["Stamp"]:
        """One for each notebook."""
        places = self.figures / self.name, self.build / self.name
        return [Stamp(notebook, self.parameters, *places) for notebook in self.notebooks]


def run_all(runs: Sequence[Run], console: Console, jobs: int = 1) -> int:
    """Run what is not up to date, one model after the other, and say so as it goes.

    What is wrong with a model, or with the text for it, is said before any notebook runs; it does not stop the others.
    """
    failed = {}
    for step in (prepare, run_one):
        for run in runs:
            if run.name in failed or (failed and run.name == LAB):
                continue
            try:
                step(run, console, jobs)
            except Exception as error:
                failed[run.name] = in_a_sentence(error)
                console.print(failed[run.name], style="bold red")
    models = [run.name for run in runs if "MODEL" in run.parameters]
    if len(models) > 1:
        whole = [name for name in models if name not in failed]
        console.print(f"{len(whole)} of {len(models)} models done: {', '.join(whole) or 'none'}")
        for name, message in failed.items():
            console.print(f"{name} not done: {message}", style="bold red")
    return int(bool(failed))


def prepare(run: Run, console: Console, jobs: int = 1) -> None:
    """If a notebook has to run, find, fetch or dequantize the model and cut the windows, before a kernel starts."""
    if all(stamp.is_current() for stamp in run.stamps()):
        return
    if "MODEL" in run.parameters:
        console.print(f"Preparing {run.name} and {run.parameters['TEXT']} ...")
        check(run.parameters)
    for folder in (run.figures, run.build):
        check_writable(folder)


def check(parameters: Mapping[str, Any]) -> None:
    """Raise, as a CommandError, what every notebook would raise of the model or the text."""
    from spikesink.model.load import prepare
    from spikesink.model.texts import TextError, windows

    model, device, dtype, text, *which = (parameters[key] for key in ASKED)
    try:
        windows(prepare(model, device, dtype), text, *which)
    except TextError as error:
        raise CommandError(str(error)) from None


def run_one(run: Run, console: Console, jobs: int = 1) -> None:
    """Run a model's notebooks that are not up to date, `jobs` at a time; a CommandError begins with which failed."""
    begun, stamps = time.monotonic(), run.stamps()
    heads = {stamp.notebook: f"[{i}/{len(stamps)}] {stamp.notebook.stem}" for i, stamp in enumerate(stamps, 1)}
    os.environ[FOLDER] = str((run.build / run.name / "once").resolve())
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (jobs,)) as pool:
        # Side by side in groups, for a notebook may show what one before it put into the ledger.
        for first in range(0, len(stamps), jobs):
            group = stamps[first : first + jobs]
            for stamp in group:
                if stamp.is_current():
                    console.print(f"{heads[stamp.notebook]}: up to date")
            _run_group([stamp for stamp in group if not stamp.is_current()], run, heads, pool, console)
    shutil.rmtree(os.environ.pop(FOLDER), ignore_errors=True)
    seconds = time.monotonic() - begun
    console.print(f"{len(stamps)} notebooks in {seconds:.0f} s: {run.figures / run.name}, table in {run.figures}")


def _run_group(
    stamps: Sequence["Stamp"], run: Run, heads: Mapping[Path, str], pool: ProcessPoolExecutor, console: Console
) -> None:
    """Run notebooks side by side: one here, several in processes of their own."""
    begun, waiting, errors = time.monotonic(), [], []
    for stamp in stamps:
        console.print(f"{heads[stamp.notebook]}: running on {run.name}")
        stamp.path.unlink(missing_ok=True)  # from here on, what is there is of no known run
        call = (stamp.notebook, dict(run.parameters), stamp.path.parent)
        waiting.append(partial(execute, *call) if len(stamps) == 1 else pool.submit(_in_process, *call).result)
    for stamp, wait in zip(stamps, waiting, strict=True):
        try:
            executed = wait()
        except CommandError as error:
            errors.append(f"{heads[stamp.notebook]}: failed. {error}")
            continue
        stamp.write()
        console.print(f"{heads[stamp.notebook]}: done after {time.monotonic() - begun:.0f} s ({executed})")
    publish.render(run.figures)
    if errors:
        raise CommandError("; ".join(errors))


def _begin(jobs: int) -> None:
    """In a process of its own: share the processor; end without a word if interrupted while there is nothing to do."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _in_process(notebook: Path, parameters: dict[str, Any], build: Path) -> Path:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return execute(notebook, parameters, build)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def execute(notebook: Path, parameters: dict[str, Any], build: Path) -> Path:
    """Run a notebook; what it became is in `build`, whole, or as `<name>.failed.ipynb` with a CommandError."""
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    build.mkdir(parents=True, exist_ok=True)
    unfinished, whole = build / f".{notebook.name}", build / notebook.name
    failed = build / f"{notebook.stem}.failed.ipynb"
    options = {"kernel_name": "python3", "progress_bar": False, "extra_arguments": QUIET_KERNEL}
    try:
        papermill.execute_notebook(notebook, unfinished, parameters, cwd=notebook.parent, **options)
        os.replace(unfinished, whole)
        failed.unlink(missing_ok=True)
    except PapermillExecutionError as error:
        os.replace(unfinished, failed)
        raise CommandError(f"{error.ename}: {error.evalue} (cell {error.cell_index}; all of it in {failed})") from None
    except DeadKernelError:
        raise CommandError(
            "its kernel was killed, perhaps for want of memory: try JOBS=1 or a smaller model."
        ) from None
    finally:
        unfinished.unlink(missing_ok=True)
    return whole


class Stamp:
    """What a notebook was last run with, and what it left behind, kept beside the executed notebook."""

    def __init__(self, notebook: Path, parameters: Mapping[str, Any], figures: Path, build: Path):
        self.notebook, self.figures = notebook, figures
        self.path = build / f"{notebook.stem}.json"
        cells = [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
        versions = [platform.python_version(), *map(importlib.metadata.version, VERSIONS)]
        paths = [local(str(parameters.get(key, "")).removeprefix("datasets:")) for key in ("MODEL", "TEXT")]
        files = [file for path in paths if path for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
        status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file()]
        digest = hashlib.sha256(json.dumps([cells, dict(parameters), versions, status], sort_keys=True).encode())
        for source in sorted(path for path in LIBRARY.rglob("*") if path.suffix in (".py", ".txt", ".toml")):
            digest.update(source.read_bytes())
        self.digest = digest.hexdigest()

    def left(self) -> dict[str, list[str]]:
        """The pictures and claims of this notebook that are there now."""
        ledger = self.figures / "claims.json"
        recorded = json.loads(ledger.read_text())["claims"] if ledger.is_file() else {}
        return {
            "figures": sorted(path.name for path in self.figures.glob(f"{self.notebook.stem[:2]}-*")),
            "claims": sorted(key for key, claim in recorded.items() if claim["notebook"] == self.notebook.stem),
        }

    def is_current(self) -> bool:
        """Whether the notebook was run like this before, and all that it left is still there."""
        if not self.path.is_file():
            return False
        old, now = json.loads(self.path.read_text()), self.left()
        return old["digest"] == self.digest and all(set(old[key]) <= set(now[key]) for key in now)

    def write(self) -> None:
        """Remember this run."""
        write_atomically(self.path, json.dumps({"digest": self.digest, **self.left()}))


def store_all(notebooks: Sequence[Path], console: Console) -> int:
    """Run notebooks with their own parameters and write the outputs into them."""
    from spikesink.model.load import prepare

    prepare()  # here, for the notebook that converted the model would keep the bars of it
    for notebook in notebooks:
        with console.status(notebook.stem):
            store(notebook)
        console.print(f"{notebook.stem}: outputs stored")
    return 0


def store(notebook: Path) -> None:
    """Run a notebook with its own parameters and write its outputs into the file itself, without traces of the run."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": notebook.parent}}
    NotebookClient(content, timeout=None, record_timing=False, resources=place, extra_arguments=QUIET_KERNEL).execute()
    for output in (output for cell in content.cells for output in cell.get("outputs", [])):
        # A widget is gone with its kernel; what it shows where there are no widgets stays.
        output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    write_atomically(notebook, nbformat.writes(content).rstrip("\n") + "\n")
