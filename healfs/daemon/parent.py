"""The worker's end of the socket to the keeper."""

from __future__ import annotations

import json
import os
import signal
import socket
from typing import Any

import trio

from healfs.daemon.children import PACKET

SIGNAL_SECONDS = 5.0  # a signal that came to all is remembered for so long


class ParentError(OSError):
    """The keeper could not do it; `str(error)` is its one line."""

    def __str__(self) -> str:
        return str(self.args[1])


class UnmountError(Exception):
    """Not unmounted; the text says what waits and what to do."""


class Parent:
    """Requests to the keeper are answered in their order; one is under way at a time."""

    def __init__(self, fd: int) -> None:
        self._socket = socket.socket(fileno=fd)
        first = self._socket.recv(PACKET)  # the keeper sends it right after the start
        self.greeting: dict[str, Any] = json.loads(first)
        self._socket.setblocking(False)
        self._lock = trio.Lock()
        self._to_reply, self._replies = trio.open_memory_channel[tuple[dict[str, Any], int]](16)
        self.terminate = trio.Event()
        self.hand_over = trio.Event()
        self.gone = trio.Event()

    async def heed_signals(self) -> None:
        """The keeper gets them, and says so; only without one they are ours.

        SIGABRT is that of systemd's watchdog, which ends a keeper that hangs.
        """
        numbers = signal.SIGTERM, signal.SIGINT, signal.SIGABRT
        with trio.open_signal_receiver(*numbers) as signals:
            async for _ in signals:
                # Killed a moment ago, it may not be known to be gone yet.
                with trio.move_on_after(SIGNAL_SECONDS):
                    await self.gone.wait()
                    self.terminate.set()

    async def wait_for_go(self) -> bool:
        """A candidate's wait until it is the worker, with a new greeting; False: it is not."""
        await trio.lowlevel.wait_readable(self._socket)
        try:
            packet = self._socket.recv(PACKET)
        except OSError:
            packet = b""
        if packet:
            self.greeting = json.loads(packet)
        return bool(packet)

    async def listen(self) -> None:
        """Take the keeper's messages until it is gone."""
        try:
            await self._listen()
        finally:
            self._to_reply.close()  # who asks would wait for ever

    async def _listen(self) -> None:
        while True:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                packet, fds, _, _ = socket.recv_fds(self._socket, PACKET, 1)
            except BlockingIOError:
                continue
            except OSError:
                packet, fds = b"", []
            if not packet:
                self.gone.set()
                return
            message = json.loads(packet)
            if message.get("event") == "terminate":
                self.terminate.set()
            elif message.get("event") == "hand-over":
                self.hand_over.set()
            elif message.get("event") == "beat":
                pass  # it has woken the loop, which beats then
            else:
                for fd in fds:
                    os.set_inheritable(fd, False)
                await self._to_reply.send((message, fds[0] if fds else -1))

    def tell(self, message: dict[str, Any]) -> None:
        """Send and forget."""
        try:
            self._socket.send(json.dumps(message).encode())
        except OSError:
            pass  # it is gone; `gone` tells

    async def _send(self, message: dict[str, Any]) -> None:
        """Unlike `tell`, wait for a keeper that does not read just now: it was frozen, say."""
        packet = json.dumps(message).encode()
        while True:
            try:
                self._socket.send(packet)
                return
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self._socket)
            except OSError:
                return  # it is gone; `gone` tells

    async def ask(self, message: dict[str, Any]) -> int:
        """Send and wait; returns the descriptor that came with the reply, or -1.

        Raises ParentError, also when the keeper is gone.
        """
        async with self._lock:
            await self._send(message)
            try:
                # Cancelled halfway, the reply would be taken for the next one's. The keeper's
                # work is bounded, and so is this.
                with trio.CancelScope(shield=True):
                    reply, fd = await self._replies.receive()
            except trio.EndOfChannel:
                await trio.lowlevel.checkpoint_if_cancelled()  # it is we who end
                raise ParentError(5, "the keeper is gone") from None
            if "error" in reply:
                raise ParentError(reply["errno"], reply["error"])
            return fd
