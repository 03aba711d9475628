"""Progress for whatever takes more than a moment."""

import os
from collections.abc import Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def progress(items: Iterable[Item], label: str, unit: str) -> Iterable[Item]:
    """Go through `items` under a bar that appears after two seconds and goes when done; none if TQDM_DISABLE is set."""
    # tqdm's notebook bar does not read TQDM_DISABLE of its own accord.
    disable = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    return tqdm(items, desc=label, unit=unit, leave=False, delay=2, disable=disable)
