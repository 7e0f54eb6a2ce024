"""The control socket: QMP over a Unix socket, for the owner of the mount and whom it allows."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import os
import socket
import struct
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from healfs.control import qmp

log = logging.getLogger(__name__)

SAID_EVERY = 1.0  # seconds: refusals and drops in the log
FAIR_SHARE = 4  # connections of one process; who has more makes room before all others
_READ_SIZE = 4096  # small, so that one client's flood yields to the disk's work often
# Where thousands connect, the honest one is behind them: these are let in and out fast, a few
# milliseconds' worth at a time; between two the disk has its turn, and who is connected.
_ACCEPTED_AT_ONCE, _ACCEPT_PAUSE = 128, 0.01


class CommandError(Exception):
    """A handler's refusal, in one line for the operator; `cls` is the QMP error class."""

    def __init__(self, desc: str, cls: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.cls = cls


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end, as the kernel says (SO_PEERCRED, unix(7))."""

    uid: int
    pid: int

    def as_dict(self) -> dict[str, object]:
        """As events say it."""
        return {"uid": self.uid, "pid": self.pid}


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument's JSON type: str, bool, int, float (any number), dict or list."""

    type: type
    optional: bool = False

    def accepts(self, value: Any) -> bool:
        if isinstance(value, bool):
            return self.type is bool
        return isinstance(value, (int, float) if self.type is float else self.type)


Handler = Callable[[dict[str, Any], Peer], Any | Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Verb:
    """A command: its handler and the arguments it declares. All others are refused."""

    handler: Handler
    arguments: Mapping[str, Argument] = field(default_factory=dict)

    def check(self, arguments: dict[str, Any]) -> None:
        """Raises CommandError."""
        for name, value in arguments.items():
            declared = self.arguments.get(name)
            if declared is None:
                raise CommandError(f"Parameter '{name[:100]}' is unexpected")
            if not declared.accepts(value):
                raise CommandError(
                    f"Invalid parameter type for '{name}', expected: {_JSON_TYPES[declared.type]}"
                )
        for name, declared in self.arguments.items():
            if not declared.optional and name not in arguments:
                raise CommandError(f"Parameter '{name}' is missing")


_JSON_TYPES = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    dict: "object",
    list: "array",
}


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the server: connections; of each connection: messages waiting to be sent, and the
    seconds that a client may take to negotiate, and to read what was sent to it."""

    connections: int = 32
    output_messages: int = 256
    send_seconds: float = 30.0
    negotiation_seconds: float = 5.0


class _Connection:
    """One client. Replies wait for room in its queue; an event that finds none drops it."""

    def __init__(self, server: ControlServer, client: socket.socket, peer: Peer) -> None:
        self._server = server
        self.client = client
        self.peer = peer
        self._queue, self._unsent = trio.open_memory_channel[bytes](server.limits.output_messages)
        self._scope = trio.CancelScope(
            deadline=trio.current_time() + server.limits.negotiation_seconds
        )
        self._command_under_way = False
        self.negotiated = False
        self.since = trio.current_time()  # idle, when no command is under way

    @property
    def droppable(self) -> bool:
        return not self._command_under_way

    def drop(self, why: str) -> None:
        self._server.say(f"pid {self.peer.pid} of uid {self.peer.uid} dropped: {why}")
        self._scope.cancel()

    async def run(self) -> None:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(self.client))
        with self._scope:
            async with stream, trio.open_nursery() as nursery:
                nursery.start_soon(self._write, stream)
                await self._reply(qmp.greeting(self._server.version))
                await self._read(stream)
                await self._queue.aclose()  # the writer ends when it has sent the rest
        if self._scope.deadline <= trio.current_time():
            self._server.say(f"pid {self.peer.pid} of uid {self.peer.uid} never negotiated")

    def push(self, line: bytes) -> None:
        """Queue an event."""
        try:
            self._queue.send_nowait(line)
        except trio.WouldBlock:
            self.drop("it does not read")
        except trio.ClosedResourceError:
            pass

    async def _write(self, stream: trio.SocketStream) -> None:
        async for line in self._unsent:
            try:
                with trio.fail_after(self._server.limits.send_seconds):
                    await stream.send_all(line)
            except (trio.BrokenResourceError, trio.TooSlowError):
                self._scope.cancel()
                return

    async def _read(self, stream: trio.SocketStream) -> None:
        splitter = qmp.Splitter()
        try:
            while data := await stream.receive_some(_READ_SIZE):
                async with self._server.turn:
                    messages = [*splitter.feed(data)]
                for message in messages:
                    if isinstance(message, qmp.ProtocolError):
                        await self._reply(qmp.failure(message.desc))
                        if message.fatal:
                            return
                    else:
                        await self._command(message)
        except trio.BrokenResourceError:
            self._scope.cancel()

    async def _reply(self, message: dict[str, Any]) -> None:
        await self._queue.send(qmp.encode(message))

    async def _command(self, message: bytes) -> None:
        try:
            command = qmp.parse_command(message)
        except qmp.ProtocolError as exc:
            await self._reply(qmp.failure(exc.desc, of=exc))
            return
        try:
            async with self._server.turn:
                value = self._execute(command)
            if inspect.isawaitable(value):
                value = await value
            reply = qmp.encode(qmp.success(value, command))
        except CommandError as exc:
            reply = qmp.encode(qmp.failure(exc.desc, exc.cls, command))
        except Exception as exc:
            # A fault in a command is the command's: neither the disk nor the other clients pay.
            log.exception("control: %s failed", command.name)
            desc = f"internal error in {command.name}: {type(exc).__name__}; see the log"
            reply = qmp.encode(qmp.failure(desc, of=command))
        finally:
            if self._command_under_way:
                self._command_under_way = False
                self.since = trio.current_time()
        await self._queue.send(reply)

    def _execute(self, command: qmp.Command) -> Any:
        """Its value, or what is to be awaited for it."""
        if command.name == "qmp_capabilities":
            return self._negotiate(command.arguments)
        if not self.negotiated:
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", "CommandNotFound"
            )
        verb = self._server.commands.get(command.name)
        if verb is None:
            raise CommandError(
                f"The command {command.name[:100]} has not been found", "CommandNotFound"
            )
        verb.check(command.arguments)
        self._command_under_way = True
        return verb.handler(command.arguments, self.peer)

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.negotiated:
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored", "CommandNotFound"
            )
        _NEGOTIATION.check(arguments)
        if arguments.get("enable"):
            raise CommandError("Capability not available: none is offered")
        self.negotiated = True
        self.since = trio.current_time()
        self._scope.deadline = math.inf
        return {}


_NEGOTIATION = Verb(lambda arguments, peer: {}, {"enable": Argument(list, optional=True)})


class ControlServer:
    """Serves `commands` (and query-commands, query-version, qmp_capabilities) as QMP.

    A handler returns what JSON can say, or an awaitable of it; the commands of one connection
    run one after the other, those of different connections side by side. `owner` is the uid
    that may connect beside root, and so may the uids `allowed`.
    """

    def __init__(
        self,
        commands: Mapping[str, Verb],
        *,
        version: str,
        owner: int | None = None,
        allowed: Iterable[int] = (),
        limits: Limits | None = None,
    ) -> None:
        self.version = version
        self.limits = limits or Limits()
        self._allowed = {0, os.geteuid() if owner is None else owner, *allowed}
        self._connections: set[_Connection] = set()
        # What a client says is read and done one piece at a time, and the loop goes round between
        # two: neither the disk nor the listener waits for all of a flood.
        self.turn = trio.Lock()
        self._said_at, self._unsaid = -math.inf, 0
        self.commands: dict[str, Verb] = {
            **commands,
            "query-commands": Verb(lambda arguments, peer: self._names()),
            "query-version": Verb(lambda arguments, peer: qmp.version(version)),
        }

    def _names(self) -> list[dict[str, str]]:
        return [{"name": name} for name in sorted((*self.commands, "qmp_capabilities"))]

    @property
    def connected(self) -> int:
        """The connections there are, for status."""
        return len(self._connections)

    def emit(self, name: str, data: Mapping[str, Any]) -> None:
        """Send an event to every client that has negotiated. Never blocks."""
        line = qmp.encode(qmp.event(name, dict(data), time.time()))
        for connection in tuple(self._connections):
            if connection.negotiated:
                connection.push(line)

    async def serve(self, listener: socket.socket) -> None:
        """Serve until cancelled. The listening socket stays the caller's."""
        # A duplicate: it is closed here, and the keeper passes it on again.
        with listener.dup() as listening:
            listening.setblocking(False)
            async with trio.open_nursery() as nursery:
                while True:
                    await trio.lowlevel.wait_readable(listening)
                    came: list[_Connection] = []
                    try:
                        pause = self._accept(listening, came)
                    except OSError as exc:  # EMFILE, ENFILE, ENOMEM: passing troubles
                        log.warning("control: accept: %s", exc)
                        pause = 0.1
                    for connection in self._find_room(came):
                        self._connections.add(connection)
                        nursery.start_soon(self._run, connection)
                    await trio.sleep(pause)

    def _accept(self, listening: socket.socket, came: list[_Connection]) -> float:
        """Add those that wait and may; returns how long the next ones are to wait."""
        for _ in range(_ACCEPTED_AT_ONCE):
            try:
                client, _ = listening.accept()
            except BlockingIOError:
                return 0.0
            client.setblocking(False)
            if peer := self._admit(client):
                came.append(_Connection(self, client, peer))
        return _ACCEPT_PAUSE

    def _find_room(self, came: list[_Connection]) -> list[_Connection]:
        """Those of the new ones that can stay. Where they are too many, what one process has
        beyond its share makes room first, then who has not negotiated, then who is idle longest."""
        limit = self.limits.connections
        if len(self._connections) + len(came) <= limit:
            return came
        busy = [connection for connection in self._connections if not connection.droppable]
        idle = [connection for connection in self._connections if connection.droppable]
        idle.sort(key=lambda connection: (connection.negotiated, connection.since), reverse=True)
        count = Counter(connection.peer for connection in busy)

        def share(connection: _Connection) -> int:
            count[connection.peer] += 1
            return max(FAIR_SHARE, count[connection.peer])

        staying = sorted((*reversed(came), *idle), key=share)[: max(0, limit - len(busy))]
        for connection in {*came, *idle}.difference(staying):
            if not staying:
                why = f"all {limit} connections have a command under way; try again"
                self.refuse(connection.client, connection.peer, why)
                continue
            connection.drop("idle, and another one came")
            self._connections.discard(connection)
            if connection in came:  # not served yet
                connection.client.close()
        return [connection for connection in came if connection in staying]

    async def _run(self, connection: _Connection) -> None:
        try:
            await connection.run()
        except Exception:
            log.exception("control: a connection failed")
        finally:
            self._connections.discard(connection)

    def say(self, text: str) -> None:
        """To the log, but rarely: a client may do a thousand times what is told here."""
        if (now := time.monotonic()) < self._said_at + SAID_EVERY:
            self._unsaid += 1
            return
        more = f" ({self._unsaid} others were not told)" if self._unsaid else ""
        self._said_at, self._unsaid = now, 0
        log.warning("control: %s%s", text, more)

    def _admit(self, client: socket.socket) -> Peer | None:
        raw = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("iII"))
        pid, uid, _ = struct.unpack("iII", raw)
        if uid in self._allowed:
            return Peer(uid, pid)
        self.refuse(
            client,
            Peer(uid, pid),
            f"uid {uid} may not: only root, the owner, and whom mount --allow-uid names",
        )
        return None

    def refuse(self, client: socket.socket, peer: Peer, why: str) -> None:
        self.say(f"pid {peer.pid} of uid {peer.uid} refused: {why}")
        with client, contextlib.suppress(OSError):  # a new socket's buffer has room for a line
            client.send(qmp.encode(qmp.failure(why)))
