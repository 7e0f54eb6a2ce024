"""The worker's events: to the control clients, to the log, and to the keeper's history."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any

import trio

from healfs.control.server import ControlServer
from healfs.daemon.parent import Parent
from healfs.events import UNKEPT, Throttle

log = logging.getLogger("healfs.worker")


class Telling:
    def __init__(
        self, parent: Parent, control: ControlServer, clock: Callable[[], float] = time.time
    ) -> None:
        self._parent = parent
        self._control = control
        self._clock = clock
        self._throttle = Throttle()
        self._held = trio.Event()  # something is held back

    def event(self, name: str, data: dict[str, Any]) -> None:
        """Never blocks. All of them go to the control clients, whole."""
        self._control.emit(name, data)
        kept = name not in UNKEPT
        # The keeper sends what it keeps to the journal, with fields.
        if not (kept and self._parent.greeting["log"] == "journal"):
            log.info("event %s %s", name, json.dumps(data))
        if kept:
            self._tell(self._throttle.offer(name, data, self._clock()))
            if self._throttle.pause is not None:
                self._held.set()

    def _tell(self, events: list[tuple[str, Any, float]]) -> None:
        for name, data, when in events:
            self._parent.tell({"do": "event", "event": name, "data": data, "time": when})

    async def run(self) -> None:
        """Tell what was held back when there is room for it."""
        while True:
            await self._held.wait()
            self._held = trio.Event()
            while (pause := self._throttle.pause) is not None:
                await trio.sleep(pause + 0.01)
                self._tell(self._throttle.due(self._clock()))
