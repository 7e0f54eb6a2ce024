"""The death of the worker between two stores of the write log's table.

The table lies in memory that outlives the worker; SIGKILL may come before any store in it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from healfs.core import writelog


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

    @contextmanager
    def counted(self) -> Iterator[None]:
        with (
            mock.patch.object(writelog, "STATE", _Counted(writelog.STATE, self)),
            mock.patch.object(writelog, "RECORD", _Counted(writelog.RECORD, self)),
        ):
            yield


class _Counted:
    """In place of a Struct of the log's."""

    def __init__(self, real: struct.Struct, stores: Stores) -> None:
        self._pack_into = real.pack_into
        self._stores = stores
        self.size = real.size
        self.unpack_from = real.unpack_from

    def pack_into(self, *arguments: Any) -> None:
        self._stores.before_one(arguments[2:] == (writelog.FREE,))
        self._pack_into(*arguments)
