"""Changes a healfs worker for a measurement; on PYTHONPATH only where the bench puts it.

HEALFS_BENCH_SWITCH is a list of words: `nolog` turns the write log and the order off (what is
left is no disk to keep anything on), `profile=FILE` writes a cProfile there when it ends.
"""

from __future__ import annotations

import os
import sys


def _without_log() -> None:
    from healfs.core import order, writelog

    def enter(log: writelog.WriteLog, request: object) -> bool:
        log.keep = False
        return True

    writelog.WriteLog.enter = enter  # type: ignore[assignment]
    order.Order.enter = lambda self, request: None  # type: ignore[method-assign]
    order.Order.leave = lambda self, request: []  # type: ignore[method-assign]


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
