"""The channel at a socketpair, whose other end is played: what is a batch, and what is not."""

from __future__ import annotations

import errno as e
import socket
from collections.abc import Callable, Iterator

import pytest
import trio

from healfs.core.request import Request
from healfs.core.ring import PayloadRing
from healfs.fuse import wire
from healfs.fuse.channel import Channel

LARGE = 128 << 10
DISK = 8 << 20


class Sink:
    """Who takes the requests; "resent" among them is the end of what came again."""

    def __init__(self) -> None:
        self.taken: list[object] = []

    def submit(self, request: Request) -> None:
        self.taken.append(request.tag)

    def cancel(self, request: Request, errno: int = e.EINTR) -> None:
        raise AssertionError("nobody asked for it")

    def resent(self) -> None:
        self.taken.append("resent")


@pytest.fixture
def kernel() -> Iterator[tuple[socket.socket, Channel, Sink]]:
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)
    sink = Sink()

    async def seek(offset: int, whence: int) -> None:
        return None

    ring = PayloadRing(memoryview(bytearray(4 << 20)), 1 << 20)
    channel = Channel(ours.fileno(), DISK, sink, lambda: None, seek, ring)
    yield theirs, channel, sink
    channel.close()
    theirs.close()
    ours.close()


def read(unique: int, size: int) -> bytes:
    header = wire.IN_HEADER.pack(wire.FIXED_SIZE, wire.READ, unique, 1, 0, 0, 0, 0, 0)
    return header + wire.RW_IN.pack(0, 0, size, 0, 0, 0, 0)


def write(unique: int, size: int) -> bytes:
    length = wire.FIXED_SIZE + size
    header = wire.IN_HEADER.pack(length, wire.WRITE, unique, 1, 0, 0, 0, 0, 0)
    return header + wire.RW_IN.pack(0, 0, size, 0, 0, 0, 0) + bytes(size)


INIT = wire.IN_HEADER.pack(104, wire.INIT, 7, 0, 0, 0, 0, 0, 0) + bytes(64)
INIT_REPLY = wire.OUT_HEADER.pack(wire.INIT_OUT_SIZE, 0, 7) + b"r" * (wire.INIT_OUT_SIZE - 16)
Message = Callable[[int, int], bytes]


@pytest.mark.parametrize("message", [read, write])
def test_what_is_large_is_a_batch_alone(
    kernel: tuple[socket.socket, Channel, Sink], message: Message
) -> None:
    theirs, channel, sink = kernel
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * LARGE)
    theirs.send(message(1, LARGE))
    for unique in 2, 3:
        theirs.send(message(unique, 4096))
    for taken in [1], [1, 2, 3]:
        assert channel.drain()
        assert sink.taken == taken


async def test_large_reads_that_come_again_are_collected_with_the_others(
    kernel: tuple[socket.socket, Channel, Sink], autojump_clock: trio.testing.MockClock
) -> None:
    theirs, channel, sink = kernel
    init, reply = INIT, INIT_REPLY
    channel.resume(init, reply)
    for unique, size in (13, LARGE), (12, LARGE), (11, 4096):
        theirs.send(read(unique, size))
    with socket.socket(fileno=channel.theirs.detach()) as pyfuse3, trio.fail_after(60):
        assert pyfuse3.recv(1 << 16)[:104] == init
        pyfuse3.send(reply)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(channel.pump)
            assert channel.resuming is not None
            await channel.resuming.wait()
            nursery.cancel_scope.cancel()
    assert sink.taken == [11, 12, 13, "resent"]


def test_a_successor_answers_the_init_that_the_dead_worker_had_not(
    kernel: tuple[socket.socket, Channel, Sink],
) -> None:
    theirs, channel, _ = kernel
    channel.resume(INIT, INIT_REPLY)
    again = 7 | 1 << 63
    theirs.send(wire.IN_HEADER.pack(104, wire.INIT, again, 0, 0, 0, 0, 0, 0) + bytes(64))
    assert channel.drain()
    reply = theirs.recv(1 << 16)
    assert wire.OUT_HEADER.unpack_from(reply) == (wire.INIT_OUT_SIZE, 0, again)
    assert reply[wire.OUT_HEADER.size :] == INIT_REPLY[wire.OUT_HEADER.size :]
