"""The death of the worker between two stores of the write log's table.

The table lies in memory that outlives the worker; SIGKILL may come before any store in it.
"""

from __future__ import annotations

from collections.abc import Callable

from healfs import compiled
from healfs.core import writelog
from healfs.core.writelog import WriteLog


class Death(BaseException):
    """Not an Exception: the engine would catch it as a bug of its own."""


class Stores:
    """Counts stores down to a death. `counts` tells of a store that frees a record (True) or does
    not whether it counts."""

    def __init__(self) -> None:
        self._left: int | None = None
        self._counts: Callable[[bool], bool] = bool

    def arm(self, left: int, counts: Callable[[bool], bool]) -> None:
        self._left, self._counts = left, counts

    def disarm(self) -> None:
        self._left = None

    def before_one(self, frees: bool) -> None:
        if self._left is None or not self._counts(frees):
            return
        self._left -= 1
        if self._left < 0:
            self._left = None
            raise Death

    def watch(self, log: WriteLog) -> None:
        """Count its stores; in plain Python only."""
        if compiled.why_plain:
            log._words = _Counted(log._words, self, frees=False)  # type: ignore[assignment]
            log._states = _Counted(log._states, self, frees=True)  # type: ignore[assignment]


class _Counted:
    """In place of a view of the log's table."""

    def __init__(self, view: memoryview, stores: Stores, *, frees: bool) -> None:
        self._view = view
        self._stores = stores
        self._frees = frees

    def __getitem__(self, index: int) -> int:
        return int(self._view[index])

    def __setitem__(self, index: int, value: int) -> None:
        self._stores.before_one(self._frees and value == writelog.FREE)
        self._view[index] = value
