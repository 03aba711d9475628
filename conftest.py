"""What tests and notebooks are run with, whichever of them are collected."""

import os
from pathlib import Path

# The notebooks' stored outputs are checked in a folder of their own, so that a test run changes no committed figure.
os.environ["SPIKESINK_FIGURES"] = str(Path(__file__).parent / "build" / "tested-figures")
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
