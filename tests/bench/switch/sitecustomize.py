"""Changes a healfs worker for a measurement; on PYTHONPATH only where the bench puts it.

HEALFS_BENCH_SWITCH is a list of words: `nolog` turns the write log and the order off (what is
left is no disk to keep anything on), `profile=FILE` writes a cProfile there when it ends.
"""

from __future__ import annotations

import os
import sys
from typing import Any


def _without_log() -> None:
    from healfs.core.order import Order
    from healfs.core.request import Request
    from healfs.core.writelog import WriteLog
    from healfs.daemon import log_memory, worker

    class NoLog(WriteLog):
        def enter(self, request: Request) -> bool:
            self.keep = False
            return True

    class NoOrder(Order):
        def enter(self, request: Request) -> None:
            pass

        def leave(self, request: Request) -> list[Request]:
            return []

    class Engine(worker.Engine):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._writes = NoOrder()

    for module, changed in (log_memory, NoLog), (worker, Engine):
        name = changed.__base__.__name__
        assert getattr(module, name) is changed.__base__  # else nothing would be switched off
        setattr(module, name, changed)


def _profiled(file: str) -> None:
    import cProfile

    import trio

    run = trio.run

    def profiled(*arguments: object) -> object:
        profile = cProfile.Profile()
        try:
            return profile.runcall(run, *arguments)
        finally:
            profile.dump_stats(file)

    trio.run = profiled  # type: ignore[assignment]


if "healfs.daemon.worker" in sys.orig_argv:
    for _word in os.environ.get("HEALFS_BENCH_SWITCH", "").split():
        _name, _, _value = _word.partition("=")
        if _name == "nolog":
            _without_log()
        elif _name == "profile":
            _profiled(_value)
