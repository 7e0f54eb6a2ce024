"""Named points at which a test has the worker die or fail, each seen to have been reached.

The workers of a mount that was made inside `kill_points` load worker/sitecustomize.py, which puts
itself around the methods that pass these points.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from healfs.compiled import PLAIN
from tests.backends.nbd_servers import wait_until

WORKER = Path(__file__).parent / "worker"
SIZE = 128  # bytes of the file `armed`, which the workers map
SECONDS = 180.0

# The name, and how many passings of it make a moment in full flight.
IN_FLIGHT = {
    "half-entry": 40,  # the record is written, its state not
    "log-entry": 40,  # the write is in the log, and was not sent
    "backend-completed": 40,  # the backend's answer has come, and nobody was told
    "completed-entry": 40,  # and the log knows of it
    "reply": 40,  # the reply is the next system call
    "replied": 40,  # and others wait for theirs
    "trim": 5,  # of the entries of one trim
}
SUCCESSOR = {  # of a worker that has died
    "take-over": 1,  # it has read the log, and not asked for the requests
    "resent": 3,  # of the requests that came again
    "replay": 2,  # so many pieces were written again
    "replay-flushed": 1,  # and flushed, and the log does not know of it
}
OUTAGE = {"outage": 2}  # tries to connect in vain
ELSEWHERE = {
    "received": 40,  # a write was taken from the kernel, and nobody knows of it
    "beat": 1,  # a task beside the data's
}
STATES = {
    "take-over": "stalled",
    "resent": "stalled",
    "replay": "replaying",
    "replay-flushed": "replaying",
    "outage": "stalled",
}


class KillPoints:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._armed = directory / "armed"
        self._armed.write_bytes(bytes(SIZE))
        self._reached = directory / "reached"
        self._reached.touch()
        self._seen = 0

    def arm(self, *points: tuple[str, int], manner: str = "SIGKILL") -> None:
        """The worker ends at this passing of this point; its successor at the next, and so on.

        By a signal, or where the `manner` is to raise: an exception, or memory: a MemoryError.
        """
        chain = ";".join(f"{name} {count} {manner}" for name, count in points)
        with open(self._armed, "r+b") as file:
            file.write(chain.encode().ljust(SIZE, b"\0"))

    @property
    def pending(self) -> bool:
        """A worker has died at a point, and nobody has looked yet."""
        return self._reached.read_text().count("\n") > self._seen

    def reached(self, name: str) -> dict[str, Any]:
        """Wait until a worker has died there; what it noted of its state."""
        wait_until(lambda: self.pending, f"the point {name}", SECONDS)
        found: dict[str, Any] = json.loads(self._reached.read_text().splitlines()[self._seen])
        self._seen += 1
        assert found["point"] == name
        assert found["state"] == STATES.get(name, found["state"])
        return found

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """A successor does not ask for the unanswered requests meanwhile."""
        gate = self.directory / "gate"
        gate.touch()
        try:
            yield
        finally:
            gate.unlink()


@pytest.fixture
def kill_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KillPoints:
    """For all mounts that the test makes."""
    directory = tmp_path / "points"
    directory.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(WORKER))
    monkeypatch.setenv("HEALFS_KILL_POINTS", str(directory))
    monkeypatch.setenv(PLAIN, "1")  # what is compiled cannot be got around
    return KillPoints(directory)
