"""Progress for whatever takes more than a moment."""

import os
from collections.abc import Collection, Iterable
from typing import TypeVar

from tqdm.auto import tqdm

Item = TypeVar("Item")


def progress(items: Collection[Item], label: str, unit: str, done: int = 0) -> Iterable[Item]:
    """Go through `items` under a bar that appears after two seconds and goes when done; none if TQDM_DISABLE is set.

    The bar counts from `done`: how many were gone through before these.
    """
    # tqdm's notebook bar does not read TQDM_DISABLE of its own accord.
    disable = os.environ.get("TQDM_DISABLE", "") not in ("", "0")
    total = done + len(items) if done else None
    return tqdm(items, label, total, initial=done, unit=unit, leave=False, delay=2, disable=disable)
