"""What a backend is.

A backend lives through many connections. The worker drives it so:

    geometry = await backend.connect()      # OSError: not there (yet), or refused
    ... backend.submit(request, done) ...; backend.commit()
    error = await backend.serve()           # returns the OSError that ended the connection
    backend.close()                         # at any time; idempotent

`submit` and `commit` are plain calls on the event loop's thread and never block, whatever the
storage does. `done(request, errno, data)` is called on the same thread, from inside `serve`,
`commit` or `polled.poll`, once for each submitted request while the connection lives. After
`serve` has returned or `close` was called, no `done` comes any more for what was submitted
before: the engine has these requests parked and will send them again. What still goes on in the
kernel then must have ended before the next `connect` returns: payloads stay where they are until
then.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Protocol

from healfs.core.request import Done, Request


@dataclass(frozen=True, slots=True)
class Geometry:
    """What a connected backend says of itself. Sizes in bytes."""

    size: int
    minimum_block: int = 1  # offsets and lengths of requests are multiples of it
    maximum_payload: int = 32 << 20  # of one READ or WRITE
    read_only: bool = False
    can_flush: bool = True
    can_fua: bool = False  # else the backend's submit makes a FUA write of WRITE and FLUSH
    can_discard: bool = False
    can_write_zeroes: bool = False
    volatile_cache: bool = True  # False: what is answered is stable already
    multi_conn: bool = False
    identity: dict[str, str] = field(default_factory=dict)  # compared after each reconnect
    notes: tuple[str, ...] = ()  # for status: what this backend cannot promise
    tls: dict[str, str] = field(default_factory=dict)  # for status: version, cipher, peer


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of bytes with one answer to SEEK_DATA and SEEK_HOLE."""

    offset: int
    length: int
    hole: bool


class SourceError(OSError):
    """The source is wrong, and no waiting mends it: missing path, directory, refused export,
    locked by somebody else. `str(error)` is the one line for the operator: what is wrong and
    what to do. Any other OSError of connect() means: away, try again."""

    def __init__(self, message: str, errno: int = 22) -> None:
        super().__init__(errno, message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class Polled(Protocol):
    """A connection that completions can be had from without going by the event loop."""

    ready_fd: int  # readable when `poll` has something to do
    blocked: bool  # `poll` has something to do when it is writable, too

    def poll(self) -> bool:
        """Deliver the completions that are there, and send on; whether any were. Plain call, never
        blocks; what it meets that ends the connection is for `serve` to return."""

    def attend(self, attended: bool) -> None:
        """True: `poll` is called again and again, so `ready_fd` need not become readable; False:
        from now on it has to, for what was not polled yet, too."""


class Backend(abc.ABC):
    """See the module's text for the life of a backend."""

    #: as the operator wrote it (without passwords, should there be any)
    source: str
    #: seconds that an attempt stays unsettled after its connection was closed; 0: close() fences
    settle: float = 0.0
    #: errnos of which only a probe tells whether the backend is away or a request failed
    ambiguous: frozenset[int] = frozenset()

    def resumed(self) -> None:  # noqa: B027 - most have nothing to do
        """An earlier worker was connected: whatever connect() meets now, waiting may mend it."""

    @abc.abstractmethod
    async def connect(self) -> Geometry:
        """Open a fresh connection. Bounded in time (raises ETIMEDOUT) and cancellable.

        Raises SourceError for what waiting does not mend, else OSError: the backend is away.
        """

    @abc.abstractmethod
    async def serve(self) -> OSError:
        """Deliver completions until the connection is lost; return why."""

    @abc.abstractmethod
    def submit(self, request: Request, done: Done) -> None:
        """Queue one request. Errors come by `done` too, never as an exception.

        The request is inside the disk, aligned to minimum_block, and is not wrong for this
        backend's read_only. A WRITE_ZEROES or DISCARD may have any length; the backend splits
        it. What the backend cannot do is answered with EOPNOTSUPP (errno 95).
        """

    @abc.abstractmethod
    def commit(self) -> None:
        """End of a batch: what was submitted goes out now (one system call if possible)."""

    @abc.abstractmethod
    def close(self) -> None:
        """Give up the connection. Never blocks."""

    @property
    def polled(self) -> Polled | None:
        """The connection, while there is one; None: `serve` alone delivers completions."""
        return None

    @property
    def heard(self) -> float:
        """time.monotonic() when anything came, were it a part of an answer; 0: nobody knows."""
        return 0.0

    def taken(self, request: Request) -> bool:
        """After close, until the next connect: may an unanswered request still be carried out?"""
        return True

    async def probe(self) -> str:
        """After an ambiguous errno: why the backend is away; "" if only the request failed.

        Bounded in time: a backend that does not answer is away.
        """
        return ""

    async def extents(self, offset: int, length: int) -> list[Extent] | None:
        """Data and holes of the range, in order, at least the first run; None: cannot tell."""
        return None

    async def wait_changed(self) -> None:
        """Return when a new attempt to connect is worth trying early (the socket file appeared).

        The default never returns. Cancelled when the next attempt starts anyway.
        """
        import trio

        await trio.sleep_forever()

    async def aclose(self) -> None:
        """The end of the backend: close, and release locks and threads (bounded)."""
        self.close()
