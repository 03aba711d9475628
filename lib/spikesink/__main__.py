"""One command: `python -m spikesink`, installed as `spikesink` too. `cli` says what it can be asked for.

What a command needs is imported when it is asked for, so that help and what is wrong with an argument come at once.
"""

import sys
from collections.abc import Sequence
from pkgutil import resolve_name

from spikesink.cli import open_console, parser
from spikesink.common import INTERRUPTED, CommandError

COMMANDS = {
    "report": "apps.report:command",
    "diagnose": "apps.report:command",
    "census": "apps.scan:show_census",
    "probe": "apps.scan:show_probe",
    "scan": "apps.scan:command",
    "figures": "apps.reproduce:command",
    "lab": "lab.run:run",
    "bench": "apps.bench:command",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` (by default the command line's) ask for; 0, 1 for an error, 2 for bad arguments, 130."""
    chosen = parser().parse_args(arguments)
    try:
        return resolve_name(f"spikesink.{COMMANDS[chosen.command]}")(chosen) or 0
    except KeyboardInterrupt:
        open_console().print("interrupted; what was finished is kept, run the same command to go on")
        return INTERRUPTED
    except (CommandError, ValueError, FloatingPointError, OSError) as error:
        open_console(stderr=True).print(str(error), style="bold red", markup=False)
        return 1


if __name__ == "__main__":
    sys.exit(main())
