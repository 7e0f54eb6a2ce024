"""The worker's beats: they show the keeper that the loop which drives the engine goes round.

A disk that nobody uses sends none, and nothing wakes its processes. The keeper is told so in the
last moment before the loop sleeps, and otherwise in the first after it: whatever the loop hangs in
then, the keeper counts. What comes while the loop does not even wake, the keeper sees for itself
(see Keeper._wait). What it makes of all that: daemon/heartbeat.py.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import trio

from healfs.core.states import State
from healfs.daemon import commands

if TYPE_CHECKING:
    from healfs.daemon.worker import Worker

REST_SECONDS = 60.0  # so long idle, a disk gives back the memory of its empty log


class Beats(trio.abc.Instrument):
    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._text = ""
        self._asleep = False
        self._woken = trio.Event()

    async def beat(self) -> None:
        greeting = self._worker.parent.greeting
        period, may_rest = greeting["beat"], greeting.get("may_rest", False)
        ring = self._worker.engine.log.ring
        answered = -1
        while True:
            self._text = self._look()
            before, answered = answered, sum(self._worker.engine.totals.requests)
            idle = (
                self._text == State.READY and answered == before and not self._worker.channel.held
            )
            if not (idle and may_rest):
                self._tell(idle=False)
                await trio.sleep(period)
            elif ring.used or ring.is_small:
                await self._rest(math.inf)
            elif await self._rest(REST_SECONDS):
                ring.shrink()

    def _look(self) -> str:
        worker = self._worker
        try:
            if hasattr(worker, "channel"):
                worker.count_unflushed()
            return commands.summary(worker)
        except Exception as exc:
            return f"internal error: {exc!r}"

    def _tell(self, *, idle: bool) -> None:
        self._worker.parent.tell({"do": "beat", "status": self._text, "idle": idle})

    async def _rest(self, seconds: float) -> bool:
        """True: nothing came for so long. (That it is over wakes the loop as anything does.)"""
        until = trio.current_time() + seconds
        self._woken = trio.Event()
        trio.lowlevel.add_instrument(self)
        with trio.move_on_at(until):
            await self._woken.wait()
        return trio.current_time() >= until

    def before_io_wait(self, timeout: float) -> None:
        if timeout > 0 and not self._asleep:
            self._asleep = True
            self._tell(idle=True)

    def after_io_wait(self, timeout: float) -> None:
        if self._asleep:
            self._asleep = False
            self._tell(idle=False)
            trio.lowlevel.remove_instrument(self)
            self._woken.set()
