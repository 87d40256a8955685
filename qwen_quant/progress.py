"""How stages report progress: a callable passed in, so that library code never prints."""

from __future__ import annotations

from collections.abc import Callable

ProgressFn = Callable[[str, int, int], None]
"""Called as progress(label, done, total): what is being done, and how many of `total` steps are finished."""


def no_progress(label: str, done: int, total: int) -> None:
    """Report nothing: for tests, for --quiet and for a stderr that is not a terminal."""
