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
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from spikesink import common
from spikesink.apps import publish
from spikesink.apps.once import FOLDER
from spikesink.cli import absolute
from spikesink.common import INTERRUPTED, CommandError, check_writable
from spikesink.lab import config
from spikesink.model.names import local, slug

QUIET_KERNEL = ["--log-level=CRITICAL"]  # the kernel warns of its transport at each start, and tells how it was stopped


def command(chosen: argparse.Namespace, console: Console) -> int:
    """Run what the arguments of `spikesink figures` ask for; returns the exit code, 0 when all notebooks ran."""
    notebooks = sorted(chosen.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        raise CommandError(f"there are no notebooks in {chosen.notebooks}; run this from the project's root.")
    os.environ["TQDM_DISABLE"] = "1"  # progress bars have no place in a notebook that is stored
    if chosen.store:
        from spikesink.model.load import prepare

        prepare()  # here, for the notebook that converted the model would keep the bars of it
        for notebook in notebooks:
            with console.status(notebook.stem):
                store(notebook)
            console.print(f"{notebook.stem}: outputs stored")
        _publish(chosen.figures)
        return 0
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
    build = chosen.build / chosen.figures.name
    models = [{"MODEL": model, **parameters} for model in chosen.models]
    of_models = [notebook for notebook in notebooks if asks_for_a_model(notebook)]
    code = run_each(of_models, models, chosen.figures, build, console)
    if code:
        return code
    return run_lab([n for n in notebooks if n not in of_models], parameters, chosen.figures, build, console)


def asks_for_a_model(notebook: Path) -> bool:
    """Whether a notebook has MODEL among its parameters; what it does is the same for all models otherwise."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    tagged = (cell["source"] for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    return any(line.startswith("MODEL =") for source in tagged for line in "".join(source).splitlines())


def run_lab(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], figures: Path, build: Path, console: Console
) -> int:
    """Run the notebooks about the lab's records that are not up to date; takes and returns what `run_each` does."""
    if not notebooks:
        return 0
    given = {key: parameters[key] for key in ("SEED", "FIGURES")}
    stamps = [Stamp(notebook, given, figures / config.LAB, build / config.LAB) for notebook in notebooks]
    try:
        for folder in (figures, build):
            check_writable(folder)
        _run_one(config.LAB, given, stamps, figures, build, console)
    except KeyboardInterrupt:
        return INTERRUPTED
    except CommandError as error:
        console.print(str(error), style="bold red")
        return 1
    return 0


def run(notebooks: Sequence[Path], parameters: Mapping[str, Any], figures: Path, build: Path, console: Console) -> int:
    """Run the notebooks that are not up to date for one model; `run_each` says how."""
    return run_each(notebooks, [parameters], figures, build, console)


def run_each(
    notebooks: Sequence[Path], models: Sequence[Mapping[str, Any]], figures: Path, build: Path, console: Console
) -> int:
    """Run the notebooks that are not up to date, one model after the other, say so as it goes, and show all claims.

    What is wrong with a model, or with the text for it, is said before any notebook runs; it does not stop the others.

    Args:
        notebooks: in the order to run them.
        models: for each what papermill puts in place of a notebook's own parameters.
        figures, build: where results go, and the executed notebooks with the stamps of what was done.
        console: to print to.

    Returns:
        An exit code: 0, 1 when a model or a notebook failed, or 130 when interrupted.
    """
    ready, failed = [], {}
    for parameters in models:
        name = slug(parameters["MODEL"])
        try:
            ready.append((name, parameters, _prepare(notebooks, parameters, figures, build, console)))
        except KeyboardInterrupt:
            console.print("interrupted; nothing was changed")
            return INTERRUPTED
        except CommandError as error:
            console.print(str(error), style="bold red")
            failed[name] = str(error)
    for name, parameters, stamps in ready:
        try:
            _run_one(name, parameters, stamps, figures, build, console)
        except KeyboardInterrupt:
            return INTERRUPTED
        except CommandError as error:
            console.print(str(error), style="bold red")
            failed[name] = str(error)
    if len(models) > 1:
        done = [name for name, *_ in ready if name not in failed]
        console.print(f"{len(done)} of {len(models)} models done: {', '.join(done) or 'none'}")
        for name, message in failed.items():
            console.print(f"{name} not done: {message}", style="bold red")
    return 1 if failed else 0


def _prepare(
    notebooks: Sequence[Path], parameters: Mapping[str, Any], figures: Path, build: Path, console: Console
) -> list["Stamp"]:
    """The stamps of a model's notebooks; if one of them has to run, after it is sure that it can.

    Raises:
        CommandError: the model, the text or a folder is not to be used.
    """
    name = slug(parameters["MODEL"])
    stamps = [Stamp(notebook, parameters, figures / name, build / name) for notebook in notebooks]
    if not all(stamp.is_current() for stamp in stamps):
        console.print(f"Preparing {name} and {parameters['TEXT']} ...")
        check(parameters)
        for folder in (figures, build):
            check_writable(folder)
    return stamps


def _run_one(
    name: str, parameters: Mapping[str, Any], stamps: Sequence["Stamp"], figures: Path, build: Path, console: Console
) -> None:
    """Run a model's notebooks that are not up to date.

    Raises:
        CommandError: a notebook failed; its message begins with which.
        KeyboardInterrupt: after it was said what is kept.
    """
    begun = time.monotonic()
    os.environ[FOLDER] = str((build / name / "once").resolve())
    for number, stamp in enumerate(stamps, 1):
        head = f"[{number}/{len(stamps)}] {stamp.notebook.stem}"
        if stamp.is_current():
            console.print(f"{head}: up to date")
            continue
        console.print(f"{head}: running on {name}, {len(stamps) - number} more after it")
        started = time.monotonic()
        stamp.path.unlink(missing_ok=True)  # from here on, what is there is of no known run
        try:
            executed = _execute(stamp.notebook, parameters, build / name)
        except KeyboardInterrupt:
            console.print(f"{head}: interrupted; what was finished is kept, run the same command to go on")
            raise
        except CommandError as error:
            _publish(figures)
            raise CommandError(f"{head}: failed. {error}") from None
        stamp.write()
        publish.render(figures)
        console.print(f"{head}: done in {time.monotonic() - started:.0f} s ({executed})")
    shutil.rmtree(build / name / "once", ignore_errors=True)
    table = _publish(figures)
    seconds = time.monotonic() - begun
    console.print(f"{len(stamps)} notebooks in {seconds:.0f} s: {figures / name}, table in {table}")


def _publish(figures: Path) -> Path:
    """Bring the table of all claims and its picture up to date."""
    table = publish.render(figures)
    publish.draw(figures)
    return table


def check(parameters: Mapping[str, Any]) -> None:
    """Find, fetch or dequantize the model and cut the windows, so that what is wrong is known before a kernel starts.

    Raises:
        CommandError: with the message of the LoadError or TextError that every notebook would raise.
    """
    from spikesink.model.errors import LoadError
    from spikesink.model.load import prepare
    from spikesink.model.texts import TextError, windows

    n, length, seed = (parameters[key] for key in ("N_PROMPTS", "SEQ_LEN", "SEED"))
    try:
        ready = prepare(parameters["MODEL"], parameters["DEVICE"], parameters["DTYPE"])
        windows(ready, parameters["TEXT"], n, length, seed)
    except (LoadError, TextError) as error:
        raise CommandError(str(error)) from None


class Stamp:
    """What a notebook was last run with, and what it left behind, kept beside the executed notebook."""

    def __init__(self, notebook: Path, parameters: Mapping[str, Any], figures: Path, build: Path):
        self.notebook, self.figures = notebook, figures
        self.path = build / f"{notebook.stem}.json"
        cells = [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
        library = sorted(p for p in Path(__file__).parents[1].rglob("*") if p.suffix in (".py", ".toml", ".txt"))
        versions = [importlib.metadata.version(p) for p in ("torch", "transformers", "transformer-lens", "matplotlib")]
        versions.append(platform.python_version())
        named = [str(parameters[key]) for key in ("MODEL", "TEXT") if key in parameters]
        given = (local(name.removeprefix("datasets:")) for name in named)
        paths = [path for path in given if path is not None]
        files = [f for path in paths for f in (sorted(path.iterdir()) if path.is_dir() else [path]) if f.is_file()]
        status = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        seen = json.dumps([cells, dict(parameters), versions, status], sort_keys=True).encode()
        digest = hashlib.sha256(seen)
        for source in library:
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
        common.write_atomically(self.path, json.dumps({"digest": self.digest, **self.left()}))


def store(notebook: Path) -> None:
    """Run a notebook with its own parameters and write its outputs into the file itself, without traces of the run."""
    import nbformat
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    place = {"metadata": {"path": notebook.parent}}
    NotebookClient(content, timeout=None, record_timing=False, resources=place, extra_arguments=QUIET_KERNEL).execute()
    for cell in content.cells:
        for output in cell.get("outputs", []):
            # A widget is gone with its kernel; what it shows where there are no widgets stays.
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    content.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    common.write_atomically(notebook, nbformat.writes(content).rstrip("\n") + "\n")


def _execute(notebook: Path, parameters: Mapping[str, Any], build: Path) -> Path:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    build.mkdir(parents=True, exist_ok=True)
    partial, whole = build / f".{notebook.name}", build / notebook.name
    try:
        papermill.execute_notebook(
            notebook,
            partial,
            dict(parameters),
            cwd=notebook.parent,
            kernel_name="python3",
            progress_bar=False,
            extra_arguments=QUIET_KERNEL,
        )
    except PapermillExecutionError as error:
        failed = build / f"{notebook.stem}.failed.ipynb"
        os.replace(partial, failed)
        raise CommandError(f"{error.ename}: {error.evalue} (cell {error.cell_index}; all of it in {failed})") from None
    except KeyboardInterrupt:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, whole)
    (build / f"{notebook.stem}.failed.ipynb").unlink(missing_ok=True)
    return whole
