"""A small blocking QMP client for the CLI. Every wait has a deadline; every error is one line."""

from __future__ import annotations

import socket
import time
from collections import deque
from types import TracebackType
from typing import Any

from healfs.control import qmp

_MAXIMUM_REPLY = 16 << 20
_AGAIN = 0.01  # seconds until another try, where many connect


class ControlError(Exception):
    """The daemon cannot be reached or does not answer; one line."""


class CommandFailed(ControlError):
    """The daemon answered, with an error; `cls` is the QMP error class."""

    def __init__(self, desc: str, cls: str = "GenericError") -> None:
        super().__init__(desc)
        self.cls = cls


class Client:
    """One connection, negotiated. `timeout`, seconds, bounds the whole conversation; an execute()
    with a timeout of its own is bounded by that instead."""

    def __init__(self, path: str, timeout: float) -> None:
        self._deadline = deadline = time.monotonic() + timeout
        self._input = bytearray()
        self._events: deque[dict[str, Any]] = deque()
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            while not self._connect(path, deadline):
                time.sleep(_AGAIN)
            greeting = self._message(deadline)
            if isinstance(error := greeting.get("error"), dict):
                raise CommandFailed(str(error.get("desc")))  # refused: it lives
            if "QMP" not in greeting:
                raise ControlError("the daemon speaks no QMP")
            self.version: str = str(greeting["QMP"].get("version", {}).get("package", ""))
            self.execute("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, path: str, deadline: float) -> bool:
        """False: the backlog is full for now (EAGAIN, unix(7))."""
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._socket.connect(path)
            return True
        except TimeoutError:
            raise ControlError("the daemon does not answer") from None
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise ControlError("the daemon does not answer (its backlog is full)") from None
            return False
        except (FileNotFoundError, ConnectionRefusedError):
            raise ControlError("the daemon is gone") from None
        except OSError as exc:
            raise ControlError(f"{path}: {exc.strerror}") from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def left(self) -> float:
        """Seconds of the conversation's time that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def close(self) -> None:
        self._socket.close()

    def execute(
        self, name: str, arguments: dict[str, Any] | None = None, *, timeout: float | None = None
    ) -> Any:
        """The command's return value. Raises CommandFailed, ControlError."""
        deadline = self._deadline if timeout is None else time.monotonic() + timeout
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = arguments
        self._socket.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            self._socket.sendall(qmp.encode(request))
        except TimeoutError:
            raise ControlError("the daemon does not answer") from None
        except OSError:
            pass  # what it said before it closed the connection is still to be read
        while True:
            message = self._message(deadline)
            if "event" in message:
                self._events.append(message)
            elif "return" in message:
                return message["return"]
            elif isinstance(error := message.get("error"), dict):
                raise CommandFailed(str(error.get("desc")), str(error.get("class")))
            else:
                raise ControlError("the daemon's answer is not QMP")

    def wait_event(self, *names: str, timeout: float) -> dict[str, Any]:
        """The next event with one of these names; others before it are dropped."""
        deadline = time.monotonic() + timeout
        while True:
            message = self._events.popleft() if self._events else self._message(deadline)
            if message.get("event") in names:
                return message

    def _message(self, deadline: float) -> dict[str, Any]:
        """The next line as an object: the server ends each message with a newline."""
        searched = 0
        while (end := self._input.find(b"\n", searched)) < 0:
            searched = len(self._input)
            if searched > _MAXIMUM_REPLY:
                raise ControlError("the daemon's answer is too long")
            left = deadline - time.monotonic()
            if left <= 0:
                raise ControlError("the daemon does not answer")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65536)
            except TimeoutError:
                raise ControlError("the daemon does not answer") from None
            except OSError:
                data = b""
            if not data:
                raise _Closed("the daemon closed the connection")
            self._input += data
        line = bytes(self._input[:end])
        del self._input[: end + 1]
        try:
            value = qmp.parse(line)
        except qmp.ProtocolError as exc:
            raise ControlError(f"the daemon's answer is not QMP: {exc.desc}") from None
        if not isinstance(value, dict):
            raise ControlError("the daemon's answer is not QMP")
        return value


class _Closed(ControlError):
    """The daemon has closed the connection."""


def connect(path: str, timeout: float = 5.0) -> Client:
    """Connect and negotiate within `timeout` seconds. Raises ControlError."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            return Client(path, max(0.001, deadline - time.monotonic()))
        except _Closed:
            # Where very many connect, one that has not negotiated yet makes room for the next.
            if time.monotonic() + _AGAIN >= deadline:
                raise
            time.sleep(_AGAIN)
