"""What tests and notebooks are run with, whichever of them are collected."""

import os
from datetime import timedelta
from pathlib import Path

import joblib
import pytest

# The notebooks' stored outputs are checked in a folder of their own, so that a test run changes no committed figure.
os.environ["SPIKESINK_FIGURES"] = str(Path(__file__).parent / "build" / "tested-figures")
ONCE = Path(__file__).parent / "build" / "tested-once"  # what several of them measure is measured once
os.environ["SPIKESINK_ONCE"] = str(ONCE)
os.environ["TQDM_DISABLE"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

SLOWEST = "10_serving.ipynb"  # run by `make test-slow`
ROUNDS = "10_serving.ipynb"  # to eight bits: which entries tip over depends on a processor's vector instructions
STORED_WITH = "AVX2"  # those that its outputs were stored with


def pytest_configure(config):
    """Let go of what earlier versions of the library measured."""
    if ONCE.is_dir() and not hasattr(config, "workerinput"):
        joblib.Memory(ONCE, verbose=0).reduce_size(age_limit=timedelta(hours=6))


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(items):
    """Mark the slowest notebook, and compare what is comparable."""
    for item in items:
        if item.path.name == SLOWEST:
            item.add_marker("slow")
    rounded = [item for item in items if item.path.name == ROUNDS]
    if not rounded:
        return
    import torch

    if torch.backends.cpu.get_cpu_capability() != STORED_WITH:
        for item in rounded:
            item.options["check"] = False
