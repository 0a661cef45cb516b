"""Progress bars on stderr, with the time left."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def quiet() -> bool:
    """Whether progress is switched off: the environment variable OFFBOOK_QUIET is set, as `--json` does."""
    return os.environ.get("OFFBOOK_QUIET", "") not in ("", "0")


def note(text: str) -> None:
    """Says something on stderr that a user should know, and that is no error; also where progress is switched off."""
    print(text, file=sys.stderr)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Hands the items on and shows how many of them are done and when the rest will be.

    Args:
        items: what is worked through.
        label: what is counted, a word or two.
        total: how many there are, where `items` has no length.

    Example:
        >>> sum(track([1, 2, 3], "adding"))
        6
    """
    if quiet():
        yield from items
        return
    from tqdm import tqdm

    # A log file gets a line now and then; a terminal sees the bar move.
    pause = 0.1 if sys.stderr.isatty() else 10.0
    yield from tqdm(items, desc=label, total=total, file=sys.stderr, mininterval=pause, dynamic_ncols=True)
