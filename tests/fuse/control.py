"""The control socket as a test uses it: QMP, without a process for each question."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from healfs.control.client import Client, connect
from tests.mounts import HealfsMount, Status

ANSWER = 60.0  # seconds: "at once", on a busy machine


class Control:
    """One connection, which gets the events from its start on."""

    def __init__(self, client: Client) -> None:
        self.client = client

    def status(self) -> Status:
        answer: Status = self.execute("healfs-query-status")
        return answer

    def execute(self, name: str, **arguments: Any) -> Any:
        # Of each answer: the client's own is of the whole conversation.
        return self.client.execute(name, arguments, timeout=ANSWER)

    def until(self, holds: Callable[[Status], bool], seconds: float = 120) -> Status:
        """The first status for which it holds."""
        deadline = time.monotonic() + seconds
        while not holds(status := self.status()):
            assert time.monotonic() < deadline, f"after {seconds} s the status is still {status}"
            time.sleep(0.01)
        return status

    def parked(self, count: int, seconds: float = 120) -> Status:
        """Until so many requests are parked, or more."""
        return self.until(lambda status: status["requests"]["parked"] >= count, seconds)

    def state(self, name: str, seconds: float = 120) -> Status:
        return self.until(lambda status: status["state"] == name, seconds)

    def event(self, *names: str, seconds: float = 120) -> dict[str, Any]:
        return self.client.wait_event(*names, timeout=seconds)


@contextlib.contextmanager
def control(mount: HealfsMount) -> Iterator[Control]:
    with connect(mount.status()["control"], ANSWER) as client:
        yield Control(client)
