"""Run the notebooks headlessly for one model: what `make figures` calls.

A notebook runs again only when its cells, the library, a parameter, the model's file or the main libraries' versions
have changed, or when something that it wrote is gone. What it writes is whole or not there, whenever it is stopped.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nbformat
from rich.console import Console

from spikesink import claims

INTERRUPTED = 130
QUIET_KERNEL = ["--log-level=ERROR"]  # the kernel warns of its own transport at every start


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` (by default the command line's) ask for; the exit code is 0 when all notebooks ran."""
    parser = argparse.ArgumentParser(prog="python -m spikesink.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="built-in name, .gguf file, directory or hub id")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--text", default="house", help="house, pydoc, a file or datasets:NAME")
    parser.add_argument("--n-prompts", type=int, default=16, help="windows to measure")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens in a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--notebooks", type=Path, default=Path("notebooks"))
    parser.add_argument("--figures", type=Path, default=Path("figures"))
    parser.add_argument("--build", type=Path, default=Path("build"))
    parser.add_argument("--store", action="store_true", help="run with the notebooks' own parameters, keep the outputs")
    chosen = parser.parse_args(arguments)
    notebooks = sorted(chosen.notebooks.glob("[0-9][0-9]_*.ipynb"))
    if not notebooks:
        parser.error(f"there are no notebooks in {chosen.notebooks}; run this from the project's root")
    os.environ["TQDM_DISABLE"] = "1"  # progress bars have no place in a notebook that is stored
    console = Console(highlight=False, soft_wrap=True)
    if chosen.store:
        for notebook in notebooks:
            with console.status(notebook.stem):
                store(notebook)
            console.print(f"{notebook.stem}: outputs stored")
        claims.render(chosen.figures)
        return 0
    parameters = {
        "MODEL": _absolute(chosen.model),
        "DEVICE": chosen.device,
        "DTYPE": chosen.dtype,
        "TEXT": _absolute(chosen.text),
        "N_PROMPTS": chosen.n_prompts,
        "SEQ_LEN": chosen.seq_len,
        "SEED": chosen.seed,
        "FIGURES": str(chosen.figures.resolve()),
    }
    return run(notebooks, parameters, chosen.figures, chosen.build, console)


def run(notebooks: Sequence[Path], parameters: Mapping[str, Any], figures: Path, build: Path, console: Console) -> int:
    """Run the notebooks that are not up to date, say so as it goes, and render the table of claims.

    Args:
        notebooks: in the order to run them.
        parameters: what papermill puts in place of each notebook's own parameters.
        figures, build: where results go, and the executed notebooks with the stamps of what was done.
        console: to print to.

    Returns:
        An exit code: 0, 1 when a notebook failed, or 130 when interrupted.
    """
    from spikesink.models import slug

    name = slug(parameters["MODEL"])
    begun = time.monotonic()
    for number, notebook in enumerate(notebooks, 1):
        head = f"[{number}/{len(notebooks)}] {notebook.stem}"
        stamp = Stamp(notebook, parameters, figures / name, build / name)
        if stamp.is_current():
            console.print(f"{head}: up to date")
            continue
        left = len(notebooks) - number
        console.print(f"{head}: running on {name}, {left} more after it")
        started = time.monotonic()
        stamp.path.unlink(missing_ok=True)  # from here on, what is there is of no known run
        try:
            executed = _execute(notebook, parameters, build / name)
        except KeyboardInterrupt:
            console.print(f"{head}: interrupted; what was finished is kept, run the same command to go on")
            return INTERRUPTED
        except NotebookError as error:
            console.print(f"{head}: failed. {error}", style="bold red")
            return 1
        stamp.write()
        console.print(f"{head}: done in {time.monotonic() - started:.0f} s ({executed})")
    table = claims.render(figures)
    console.print(f"{len(notebooks)} notebooks in {time.monotonic() - begun:.0f} s: {figures / name}, table in {table}")
    return 0


class NotebookError(RuntimeError):
    """A notebook that raised; the message says in which cell, what, and where to look."""


class Stamp:
    """What a notebook was last run with, and what it left behind, kept beside the executed notebook."""

    def __init__(self, notebook: Path, parameters: Mapping[str, Any], figures: Path, build: Path):
        self.notebook, self.figures = notebook, figures
        self.path = build / f"{notebook.stem}.json"
        cells = [cell.source for cell in nbformat.read(notebook, as_version=4).cells]
        library = sorted(p for p in Path(__file__).parent.rglob("*") if p.suffix in (".py", ".txt"))
        versions = [importlib.metadata.version(p) for p in ("torch", "transformers", "transformer-lens", "matplotlib")]
        versions.append(sys.version)
        named = [Path(str(parameters[key]).removeprefix("datasets:")) for key in ("MODEL", "TEXT")]
        files = [f for path in named for f in (sorted(path.iterdir()) if path.is_dir() else [path]) if f.is_file()]
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
        claims.write_atomically(self.path, json.dumps({"digest": self.digest, **self.left()}))


def store(notebook: Path) -> None:
    """Run a notebook with its own parameters and write its outputs into the file itself, without traces of the run."""
    from nbclient import NotebookClient

    content = nbformat.read(notebook, as_version=4)
    NotebookClient(
        content, timeout=None, record_timing=False, resources={"metadata": {"path": notebook.parent}}
    ).execute()
    content.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    claims.write_atomically(notebook, nbformat.writes(content).rstrip("\n") + "\n")


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
        raise NotebookError(f"{error.ename}: {error.evalue} (cell {error.cell_index}; all of it in {failed})") from None
    except KeyboardInterrupt:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, whole)
    return whole


def _absolute(value: str) -> str:
    """A path as seen from the notebooks' folder; a name stays what it is."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


if __name__ == "__main__":
    sys.exit(main())
