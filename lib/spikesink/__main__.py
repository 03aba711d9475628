"""One command: `python -m spikesink`, installed as `spikesink` too. `cli` says what it can be asked for.

What a command needs is imported when it is asked for, so that help and what is wrong with an argument come at once.
"""

import os
import signal
import sys
from collections.abc import Sequence

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
INTERRUPTED = 130  # the exit code of a command that was


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what `arguments` (by default the command line's) ask for; 0, 1 for an error, 2 for bad arguments, 130."""
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # not of a command in the background, which is not to be interrupted
        signal.signal(signal.SIGINT, _leave)
    from pkgutil import resolve_name

    from spikesink.cli import open_console, parser
    from spikesink.common import CommandError, was_interrupted

    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a terminal may lack letters that names and tables have
            stream.reconfigure(errors="replace")
    try:
        chosen = parser().parse_args(arguments)
        command = resolve_name(f"spikesink.{COMMANDS[chosen.command]}")
        signal.signal(signal.SIGINT, before)
        return command(chosen) or 0
    except (KeyboardInterrupt, Exception) as error:
        if was_interrupted(error):
            open_console().print("interrupted; what was finished is kept, run the same command to go on")
            return INTERRUPTED
        if not isinstance(error, CommandError | ValueError | FloatingPointError | OSError):
            raise
        open_console(stderr=True).print(str(error), style="bold red")
        return 1
    finally:
        signal.signal(signal.SIGINT, before)


def _leave(*_) -> None:
    """Interrupted while libraries are imported, of which some turn that into an error of their own: leave at once."""
    os.write(1, b"interrupted; nothing was begun\n")
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
