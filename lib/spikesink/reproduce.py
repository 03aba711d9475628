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

from rich.console import Console

from spikesink import claims
from spikesink.specs import DEFAULT_MODEL, slug

INTERRUPTED = 130
QUIET_KERNEL = ["--log-level=CRITICAL"]  # the kernel warns of its transport at each start, and tells how it was stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` (by default the command line's) ask for; the exit code is 0 when all notebooks ran."""
    parser = _Parser(prog="python -m spikesink.reproduce", description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=DEFAULT_MODEL, help="built-in name, .gguf file, directory or hub id")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N or auto")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("--text", default="house", help="house, pydoc, a file or datasets:NAME")
    parser.add_argument("--n-prompts", type=_at_least(1), default=16, help="windows to measure")
    parser.add_argument("--seq-len", type=_at_least(2), default=256, help="tokens in a window")
    parser.add_argument("--seed", type=_at_least(0), default=0)
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
    # Folders of figures do not share what was done: the same model can be in two of them, with other settings.
    return run(notebooks, parameters, chosen.figures, chosen.build / chosen.figures.name, console)


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
    name = slug(parameters["MODEL"])
    begun = time.monotonic()
    try:
        stamps = [Stamp(notebook, parameters, figures / name, build / name) for notebook in notebooks]
        if not all(stamp.is_current() for stamp in stamps):
            console.print(f"Preparing {name} and {parameters['TEXT']} ...")
            check(parameters)
    except KeyboardInterrupt:
        console.print("interrupted; nothing was changed")
        return INTERRUPTED
    except NotebookError as error:
        console.print(str(error), style="bold red")
        return 1
    for number, stamp in enumerate(stamps, 1):
        head = f"[{number}/{len(notebooks)}] {stamp.notebook.stem}"
        if stamp.is_current():
            console.print(f"{head}: up to date")
            continue
        left = len(notebooks) - number
        console.print(f"{head}: running on {name}, {left} more after it")
        started = time.monotonic()
        stamp.path.unlink(missing_ok=True)  # from here on, what is there is of no known run
        try:
            executed = _execute(stamp.notebook, parameters, build / name)
        except KeyboardInterrupt:
            console.print(f"{head}: interrupted; what was finished is kept, run the same command to go on")
            return INTERRUPTED
        except NotebookError as error:
            console.print(f"{head}: failed. {error}", style="bold red")
            return 1
        stamp.write()
        claims.render(figures)
        console.print(f"{head}: done in {time.monotonic() - started:.0f} s ({executed})")
    seconds, table = time.monotonic() - begun, claims.render(figures)
    console.print(f"{len(notebooks)} notebooks in {seconds:.0f} s: {figures / name}, table in {table}")
    return 0


def check(parameters: Mapping[str, Any]) -> None:
    """Find, fetch or dequantize the model and cut the windows, so that what is wrong is known before a kernel starts.

    Raises:
        NotebookError: with the message of the LoadError or TextError that every notebook would raise.
    """
    from spikesink.models import LoadError, prepare
    from spikesink.texts import TextError, cut

    n, length, seed = (parameters[key] for key in ("N_PROMPTS", "SEQ_LEN", "SEED"))
    try:
        ready = prepare(parameters["MODEL"], parameters["DEVICE"], parameters["DTYPE"])
        cut(parameters["TEXT"], ready.tokenizer, ready.prepends_bos, ready.context, n, length, seed)
    except (LoadError, TextError) as error:
        raise NotebookError(str(error)) from None


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence, without two paragraphs of usage before it."""

    def error(self, message: str):
        self.exit(2, f"{message} (see --help)\n")


def _at_least(least: int):
    def whole_number(text: str) -> int:
        if not text.strip().isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return int(text)

    return whole_number


class NotebookError(RuntimeError):
    """A notebook that raised, or could not be started; the message says what, and in which cell and where to look."""


class Stamp:
    """What a notebook was last run with, and what it left behind, kept beside the executed notebook."""

    def __init__(self, notebook: Path, parameters: Mapping[str, Any], figures: Path, build: Path):
        self.notebook, self.figures = notebook, figures
        self.path = build / f"{notebook.stem}.json"
        cells = [cell["source"] for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]]
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
    (build / f"{notebook.stem}.failed.ipynb").unlink(missing_ok=True)
    return whole


def _absolute(value: str) -> str:
    """A path as seen from the notebooks' folder; a name stays what it is."""
    path = Path(value).expanduser()
    return str(path.resolve()) if path.exists() else value


if __name__ == "__main__":
    sys.exit(main())
