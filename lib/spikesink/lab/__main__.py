"""`python -m spikesink.lab`: see `run`, which is a module of its own so that the processes it starts can import it."""

import sys

from spikesink.lab.arguments import parser

if __name__ == "__main__":
    chosen = parser().parse_args()
    from spikesink.lab.run import run  # seconds of imports, which help and errors can spare

    sys.exit(run(chosen))
