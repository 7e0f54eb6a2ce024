"""The keeper's part of an upgrade: a new version of the worker takes over, or the old one goes on.

`healfs upgrade` sends one packet to the socket *keeper* of the mount, {"upgrade": {"interpreter":
path, "path": PYTHONPATH or null, "package": directory}} and one end of a socket for the answer:
{"version": text} or {"error": text}.

The candidate is started beside the worker, imports everything and sees whether it can live with
the log in memory, the configuration and the FUSE features: {"do": "fit", "version": text} or
{"do": "unfit", "reason": text}. Then {"event": "hand-over"} makes the worker end, as far as it
can with nothing in flight, and {"event": "go"} with a new greeting makes the candidate take over
as for a death: {"do": "serving"}. Whatever goes wrong before that, or at once after it, gives the
candidate up: its first connection and replay come then.

Standard library only.
"""

from __future__ import annotations

import contextlib
import enum
import json
import math
import socket
import time
from typing import TYPE_CHECKING, Any

from healfs.config import os_error_words
from healfs.daemon.children import PACKET, Child, Program, how

if TYPE_CHECKING:
    from healfs.daemon.keeper import Keeper

UPGRADE_SECONDS = 10.0  # for a new version to see whether it fits, and again to take over
HAND_OVER_SECONDS = 5.0  # for the old one to end; then it is killed
PROOF_SECONDS = 1.0  # the new one has to live, once it serves


class Phase(enum.Enum):
    IDLE = enum.auto()
    CHECKING = enum.auto()
    ENDING_OLD = enum.auto()
    TAKING_OVER = enum.auto()  # the candidate is the worker
    PROVING = enum.auto()  # and serves


class Upgrading:
    """One upgrade at a time."""

    def __init__(self, keeper: Keeper) -> None:
        self._keeper = keeper
        self.phase = Phase.IDLE
        self.deadline = math.inf
        self._candidate: Child | None = None
        self._given_up: list[Child] = []  # killed, not reaped yet
        self._program = Program("", None)
        self._version = ""
        self._why = ""
        self._asker: socket.socket | None = None

    def descriptors(self) -> list[int]:
        children = list(self._given_up)
        if self._candidate is not None and not self.is_worker:
            children.append(self._candidate)
        return [fd for child in children for fd in child.descriptors()]

    @property
    def is_worker(self) -> bool:
        """The candidate is."""
        return self.phase in (Phase.TAKING_OVER, Phase.PROVING)

    def turn(self, now: float) -> None:
        """Look at what has happened."""
        for child in [child for child in self._given_up if child.has_ended()]:
            child.reap()
            self._given_up.remove(child)
        candidate = self._candidate
        if candidate is not None and not self.is_worker:
            for message in candidate.messages():
                self._heard(message, now)
            if self._candidate is candidate and candidate.has_ended():
                self._candidate = None
                self.give_up(f"it ended {how(candidate.reap())}")
        if now >= self.deadline:
            self._too_late(now)

    # --- the request ------------------------------------------------------------------------

    def asked(self) -> None:
        """There is a packet on the keeper's socket."""
        flags = socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
        try:
            packet, fds, _, _ = socket.recv_fds(self._keeper.door, PACKET, 1, flags)
            asker = socket.socket(fileno=fds[0])
        except (OSError, IndexError):
            return
        error = self._refusal()
        if not error:
            try:
                self._begin(json.loads(packet)["upgrade"])
            except (ValueError, KeyError, TypeError, RecursionError):
                error = "that is no request for an upgrade"
            except OSError as exc:
                error = os_error_words(exc)
        if error:
            _answer(asker, {"error": error})
        else:
            self._asker = asker

    def _refusal(self) -> str:
        keeper = self._keeper
        if self.phase is not Phase.IDLE:
            return "an upgrade is under way already"
        if keeper.kill_at is not None:
            return "the mount is being ended"
        if not keeper.reported:
            return "the mount is not ready yet"
        if not keeper.resend:
            return "this kernel is older than 6.9 and cannot pass the mount on; umount, then mount"
        return ""

    def _begin(self, request: dict[str, Any]) -> None:
        path = request["path"]
        self._program = Program(str(request["interpreter"]), None if path is None else str(path))
        greeting = self._keeper.greeting() | {"package": str(request["package"])}
        self._candidate = Child(self._program, self._keeper.descriptors(), greeting)
        self._why = ""
        self.phase = Phase.CHECKING
        self.deadline = time.monotonic() + UPGRADE_SECONDS

    # --- its course -------------------------------------------------------------------------

    def _heard(self, message: dict[str, Any], now: float) -> None:
        if message["do"] == "unfit":
            self.give_up(str(message.get("reason")))
        elif message["do"] == "fit" and self.phase is Phase.CHECKING:
            self._version = str(message.get("version"))
            self.phase = Phase.ENDING_OLD
            self.deadline = now + HAND_OVER_SECONDS
            if self._keeper.worker is None:
                self.old_has_ended()
            else:
                self._keeper.worker.tell({"event": "hand-over"})

    def old_has_ended(self) -> None:
        """The candidate becomes the worker."""
        assert self._candidate is not None
        self._why = ""
        self.phase = Phase.TAKING_OVER
        self.deadline = time.monotonic() + UPGRADE_SECONDS
        self._candidate.tell({"event": "go", **self._keeper.greeting()})
        self._keeper.employ(self._candidate)

    def serving(self) -> None:
        """The candidate has taken over."""
        if self._why:
            return  # too late: it was killed
        self.phase = Phase.PROVING
        self.deadline = time.monotonic() + PROOF_SECONDS

    def _succeed(self) -> None:
        self._keeper.upgraded(self._program, self._version)
        self._answer({"version": self._version})
        self._end()

    def _too_late(self, now: float) -> None:
        if self.phase is Phase.CHECKING:
            self.give_up(f"it did not report within {UPGRADE_SECONDS:g} s")
        elif self.phase is Phase.PROVING:
            self._succeed()
        elif self.phase is Phase.TAKING_OVER:
            assert self._candidate is not None
            self._why = f"it did not take over within {UPGRADE_SECONDS:g} s"
            self.deadline = math.inf
            self._candidate.kill()  # its end is the worker's: see candidate_has_died
        elif not self._why:
            self._why = "the old worker was killed and cannot end"
            self.deadline = now + HAND_OVER_SECONDS
            if self._keeper.worker is not None:
                self._keeper.worker.kill()
        else:
            self.give_up(self._why)

    def candidate_has_died(self, status: int) -> None:
        """In the take-over or at once after it, and reaped."""
        self._candidate = None
        when = "in" if self.phase is Phase.TAKING_OVER else "right after"
        self.give_up(self._why or f"it ended {how(status)} {when} the take-over")

    def give_up(self, why: str) -> None:
        """The old version goes on."""
        if self._candidate is not None:
            self._candidate.give_up()
            self._given_up.append(self._candidate)
        keeper = self._keeper
        keeper.say(f"upgrade with {self._program.interpreter} given up: {why}")
        keeper.happened("HEALFS_UPGRADE_FAILED", {"reason": why})
        self._answer({"error": f"{why}; version {keeper.version} goes on"})
        self._end()

    def _answer(self, message: dict[str, Any]) -> None:
        if self._asker is not None:
            _answer(self._asker, message)
            self._asker = None

    def _end(self) -> None:
        self.phase = Phase.IDLE
        self.deadline = math.inf
        self._candidate = None

    def close(self) -> None:
        """The end of the keeper: no candidate stays behind."""
        if self.phase in (Phase.CHECKING, Phase.ENDING_OLD):
            self.give_up("the mount was ended")
        until = time.monotonic() + 1.0
        while self._given_up and time.monotonic() < until:
            self.turn(0.0)
            time.sleep(0.01)


def _answer(asker: socket.socket, message: dict[str, Any]) -> None:
    with asker, contextlib.suppress(OSError):  # it has gone away, or reads nothing
        asker.send(json.dumps(message).encode(), socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
