"""python -m spikesink: a report on a model, or one of the two questions that its weights alone can answer.

Help, and what is wrong with an argument, need not wait for torch: what stands on it is imported when it is used.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

import spikesink as ss
from spikesink.cli import INTERRUPTED, NotebookError, Parser, a_folder, at_least, check_writable
from spikesink.common import NotApplicable, brief
from spikesink.model.names import ENTRIES, slug

TEXT_HELP = "house (default: spikesink's own prose), pydoc (Python's documentation), a file in UTF-8, or datasets:NAME"
MODEL = "a built-in name (smollm2-135m), .gguf file, directory or hub id"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` ask for; 0, 1 for an error, 2 for bad arguments, 130 if interrupted."""
    chosen = _parser().parse_args(arguments)
    from spikesink.model.load import LoadError
    from spikesink.model.texts import TextError

    console = Console(highlight=False, soft_wrap=True)
    try:
        chosen.run(chosen, console)
    except (LoadError, TextError, ValueError, FloatingPointError, NotebookError, OSError) as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(str(error), style="bold red", markup=False)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; what was finished is kept")
        return INTERRUPTED
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m spikesink", description="Where a model's spike and sinks are, and what that means.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser(
        "diagnose",
        help="a report: spike, sinks, and which ways of serving fail because of either",
        description="Measure a model on a text and write report.html (one page that opens offline) and report.json. "
        "Takes minutes on a small model; what is finished is written as it goes.",
    )
    one.add_argument("model", help=MODEL)
    one.add_argument("--text", default="house", help=TEXT_HELP)
    one.add_argument("--out", type=a_folder, help="folder for the report (default: reports/<model>)")
    one.add_argument("--long", action="store_true", help="also run one text as far as the context and some minutes go")
    one.add_argument("--n-prompts", type=at_least(4), default=16, help="windows to measure (default: %(default)s)")
    one.add_argument("--seq-len", type=at_least(16), default=256, help="tokens in a window (default: %(default)s)")
    one.add_argument("--device", default="cpu", help="cpu, cuda, cuda:N, auto or disk (default: %(default)s)")
    one.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16 (default: %(default)s)")
    one.add_argument("--seed", type=at_least(0), default=0, help="of what is drawn (default: %(default)s)")
    one.set_defaults(run=diagnose)
    two = commands.add_parser(
        "census",
        help="which channels each FFN can amplify, from the weights alone",
        description="The gain of every channel of every FFN: how much a gated block, seen as a quadratic form, can "
        "make of a token in that channel (||U_k||_F, notebook 04). No text is run.",
    )
    two.add_argument("model", help=MODEL)
    two.add_argument("--top", type=at_least(1), default=10, help="how many to show (default: %(default)s)")
    two.set_defaults(run=census)
    three = commands.add_parser(
        "probe",
        help="whether tokens spike when they stand first, from the weights alone",
        description="Send entries of the vocabulary, evenly spread, through the model as first tokens, a layer at a "
        "time.",
    )
    three.add_argument("model", help=MODEL)
    three.add_argument("--entries", type=at_least(1), default=ENTRIES, help="of the vocabulary (default: %(default)s)")
    three.set_defaults(run=probe)
    return parser


def diagnose(chosen: argparse.Namespace, console: Console) -> None:
    """Measure a model, and say each section as it is finished."""
    from spikesink.apps import report

    out = chosen.out or Path("reports") / slug(chosen.model)
    check_writable(out, keep=False)
    done = {}
    with console.status(f"loading {chosen.model}") as status:
        model = ss.load(chosen.model, chosen.device, chosen.dtype)
        tokens = ss.windows(model, chosen.text, chosen.n_prompts, chosen.seq_len, chosen.seed)
        for section in report.diagnose(model, chosen.text, tokens, out, chosen.long, chosen.seed, status.update):
            done[section.key] = section
            console.print(f"\n[bold]{report.TITLES[section.key]}[/bold]")
            console.print(section.prose, markup=False)
            if section.table is not None:
                table = (section.table[list(section.narrow)] if section.narrow else section.table).reset_index()
                console.print(_table(table.columns, table.itertuples(index=False)))
    console.print("\n[bold]In short[/bold]")
    for line in report.in_short(done):
        console.print(line, markup=False)
    console.print(f"\nWritten to {out / 'report.html'} and report.json")


def census(chosen: argparse.Namespace, console: Console) -> None:
    """Show the (block, channel) pairs of largest gain."""
    from spikesink.chain import amplifier

    weights = ss.open_weights(chosen.model)
    found = amplifier.census(weights)
    if isinstance(found, NotApplicable):
        raise ValueError(f"{found.reason}.")
    rows = [
        (block, channel, brief(gain), brief(found.over_median(block, channel)))
        for block, channel, gain in found.top(chosen.top)
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

    console.print(scan.scan(chosen.model, chosen.entries, None, console.print).sentence())


def _table(columns: Iterable[object], rows: Iterable[Iterable[object]]) -> Table:
    shown = Table(*map(str, columns), box=box.SIMPLE_HEAD, pad_edge=False)
    shown.columns[0].no_wrap = True
    for row in rows:
        shown.add_row(*map(str, row))
    return shown


if __name__ == "__main__":
    sys.exit(main())
