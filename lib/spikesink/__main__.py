"""One command: `python -m spikesink`, installed as `spikesink` too. `cli` says what it can be asked for.

What needs torch is imported when it is used, so that help and what is wrong with an argument come at once.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

import spikesink as ss
from spikesink.cli import parser
from spikesink.common import INTERRUPTED, CommandError, NotApplicable, brief, check_writable
from spikesink.model.names import slug


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` (by default the command line's) ask for; 0, 1 for an error, 2 for bad arguments, 130."""
    chosen = parser().parse_args(arguments)
    console = Console(highlight=False, soft_wrap=True)
    try:
        return COMMANDS[chosen.command](chosen, console) or 0
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept, run the same command to go on")
        return INTERRUPTED
    except _sentences() as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), style="bold red", markup=False)
        return 1


def _sentences() -> tuple[type[Exception], ...]:
    """The errors whose messages are sentences for whoever gave the command."""
    from spikesink.model.errors import LoadError

    return LoadError, ValueError, FloatingPointError, CommandError, OSError


def report(chosen: argparse.Namespace, console: Console) -> None:
    """Measure a model, and show each section as it is finished."""
    from spikesink.apps import report

    out = chosen.out or Path("reports") / slug(chosen.model)
    check_writable(out, keep=False)
    sections = {}
    with console.status(f"loading {chosen.model}") as status:
        model = ss.load(chosen.model, chosen.device, chosen.dtype)
        tokens = ss.windows(model, chosen.text, chosen.n_prompts, chosen.seq_len, chosen.seed)
        for section in report.diagnose(model, tokens, chosen.text, out, chosen.long, chosen.seed, status.update):
            sections[section.key] = section
            console.print(f"\n[bold]{report.TITLES[section.key]}[/bold]")
            console.print(section.prose, markup=False)
            if section.table is not None:
                table = (section.table[list(section.narrow)] if section.narrow else section.table).reset_index()
                console.print(_table(table.columns, table.itertuples(index=False)))
    console.print("\n[bold]In short[/bold]")
    for line in report.in_short(sections):
        console.print(line, markup=False)
    console.print(f"\nWritten to {out / 'report.html'} and report.json")


def census(chosen: argparse.Namespace, console: Console) -> None:
    """Show the (block, channel) pairs of largest gain."""
    from spikesink.chain import amplifier

    weights = ss.open_weights(chosen.model)
    census = amplifier.census(weights)
    if isinstance(census, NotApplicable):
        raise ValueError(f"{census.reason}.")
    rows = [
        (block, channel, brief(gain), brief(census.over_median(block, channel)))
        for block, channel, gain in census.top(chosen.top)
    ]
    console.print(_table(["block", "channel", "||U_k||_F", "over its block's median"], rows))
    if weights.anatomy.norm_placement != "pre":
        console.print(
            "In this model what an FFN gives passes another norm before it is added. Its scale is not in these gains, "
            "so the spike's channel can be another one: probe names it."
        )


def probe(chosen: argparse.Namespace, console: Console) -> None:
    """Say where the first token spikes."""
    from spikesink.apps import scan

    console.print(scan.scan(chosen.model, chosen.entries).sentence())


def scan(chosen: argparse.Namespace, console: Console) -> int:
    """Plan and scan."""
    from spikesink.apps.scan import command

    return command(chosen, console)


def figures(chosen: argparse.Namespace, console: Console) -> int:
    """Run the notebooks."""
    from spikesink.apps.reproduce import command

    return command(chosen, console)


def lab(chosen: argparse.Namespace, console: Console) -> int:
    """Train."""
    from spikesink.lab.run import run

    return run(chosen)


def bench(chosen: argparse.Namespace, console: Console) -> None:
    """Time."""
    from spikesink.apps.bench import command

    command(chosen, console)


COMMANDS = {
    "report": report,
    "diagnose": report,
    "census": census,
    "probe": probe,
    "scan": scan,
    "figures": figures,
    "lab": lab,
    "bench": bench,
}


def _table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Table:
    shown = Table(*map(str, columns), box=box.SIMPLE_HEAD, pad_edge=False)
    shown.columns[0].no_wrap = True
    for row in rows:
        shown.add_row(*map(str, row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
