"""`python -m spikesink.lab`: see `run`, which is a module of its own so that the processes it starts can import it."""

import sys

from spikesink.lab.run import main

if __name__ == "__main__":
    sys.exit(main())
