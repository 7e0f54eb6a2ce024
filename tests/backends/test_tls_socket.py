"""The socket that speaks TLS: every byte once and in order, whatever the socket below takes."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from healfs.backends.base import SourceError
from healfs.backends.nbd import BUFFER, PIECE_MAX, NbdBackend
from healfs.backends.nbd_link import Link
from healfs.backends.nbd_protocol import Export
from healfs.backends.nbd_tls import SEND, TlsSocket, credentials
from healfs.backends.nbd_uri import NbdUri, Tls
from healfs.core.request import Kind, Request
from tests.backends.certificates import Authority
from tests.backends.nbd_disk import DEADLINE, pattern

VERSIONS = [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3]


@pytest.fixture(scope="module")
def directory(authority: Authority) -> Path:
    return authority.directory("socket", "server")


@contextmanager
def connected(
    directory: Path, version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3
) -> Iterator[tuple[TlsSocket, ssl.SSLSocket]]:
    """Ours, and the server's blocking end, after the handshake; the buffers between are small."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    theirs.settimeout(DEADLINE)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server-cert.pem", directory / "server-key.pem")
    context.maximum_version = version
    ended: list[ssl.SSLSocket] = []
    shaking = threading.Thread(
        target=lambda: ended.append(context.wrap_socket(theirs, server_side=True))
    )
    shaking.start()
    ours.setblocking(False)
    uri = NbdUri("", socket="/s", tls=Tls("localhost", certificates=str(directory)))
    tls = TlsSocket(ours, credentials(uri), uri)

    async def shake() -> None:
        with trio.fail_after(DEADLINE):
            await tls.handshake()

    trio.run(shake)
    shaking.join()
    with ended[0]:
        try:
            yield tls, ended[0]
        finally:
            tls.close()


def _retried(do: Callable[[], int], sock: TlsSocket, events: int) -> int:
    poll = select.poll()
    poll.register(sock.fileno(), events)
    while True:
        try:
            return do()
        except BlockingIOError:
            assert poll.poll(DEADLINE * 1000)


_parts = st.lists(
    st.one_of(st.integers(1, 200), st.sampled_from([16383, 16384, 16385, SEND - 1, SEND + 1])),
    min_size=1,
    max_size=12,
)


@pytest.mark.parametrize("version", VERSIONS)
@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(parts=_parts, views=st.lists(st.integers(1, 70_000), min_size=1, max_size=5))
def test_an_echo_is_what_was_sent(
    directory: Path, version: ssl.TLSVersion, parts: list[int], views: list[int]
) -> None:
    """Sent as the transmission phase sends (what was not taken is given again), received into
    views of any size."""
    whole = pattern(sum(parts))
    out: list[memoryview] = []
    for length in parts:
        start = sum(map(len, out))
        out.append(memoryview(whole)[start : start + length])
    with connected(directory, version) as (ours, theirs):

        def echo() -> None:
            data = bytearray()
            while len(data) < len(whole):
                data += theirs.recv(100_000)
            theirs.sendall(data)

        echoing = threading.Thread(target=echo)
        echoing.start()
        while out:
            count = _retried(lambda: ours.sendmsg(out), ours, select.POLLOUT)
            assert not ours.handed
            while count and count >= len(out[0]):
                count -= len(out.pop(0))
            if count:
                out[0] = out[0][count:]
        got = bytearray()
        while len(got) < len(whole):
            view = memoryview(bytearray(views[len(got) % len(views)]))
            count = _retried(lambda: ours.recv_into(view), ours, select.POLLIN)  # noqa: B023
            assert count
            got += view[:count]
        echoing.join()
    assert got == whole


def test_what_was_handed_over_is_known_and_not_more(directory: Path) -> None:
    data = pattern(3 * SEND)
    with connected(directory) as (ours, theirs):
        out = [memoryview(data)]
        with pytest.raises(BlockingIOError):
            ours.sendmsg(out)
        assert ours.handed == SEND
        with pytest.raises(BlockingIOError):
            ours.sendmsg([*out, memoryview(b"more")])
        assert ours.handed == SEND
        theirs.suppress_ragged_eofs = False
        ours.close()
        got = bytearray()
        with pytest.raises(OSError):  # the end of a record is missing
            while True:
                got += theirs.recv(1 << 20)
        assert got == data[: len(got)] and len(got) < SEND


@pytest.mark.parametrize("version", VERSIONS)
def test_close_notify_is_the_end_while_the_socket_stays_open(
    directory: Path, version: ssl.TLSVersion
) -> None:
    with connected(directory, version) as (ours, theirs):
        theirs.sendall(b"last words")
        theirs.setblocking(False)
        with pytest.raises(ssl.SSLWantReadError):
            theirs.unwrap()

        async def receive() -> list[int]:
            view, counts = memoryview(bytearray(4)), []
            with trio.fail_after(DEADLINE):
                while not counts or counts[-1]:
                    await ours.readable()  # it does not wait for what is decrypted already
                    counts.append(ours.recv_into(view))
            return counts

        assert trio.run(receive) == [4, 4, 2, 0]


def test_a_closed_one_is_not_readable(directory: Path) -> None:
    with connected(directory) as (ours, theirs):
        theirs.sendall(b"four" * 2)
        assert _retried(lambda: ours.recv_into(memoryview(bytearray(4))), ours, select.POLLIN) == 4
        ours.close()

        async def wait() -> None:
            with trio.fail_after(DEADLINE):
                await ours.readable()

        with pytest.raises(trio.ClosedResourceError):
            trio.run(wait)


def test_our_end_is_orderly(directory: Path) -> None:
    with connected(directory) as (ours, theirs):
        assert ours.send(b"bye") == 3
        ours.close()
        assert theirs.recv(10) == b"bye"
        theirs.suppress_ragged_eofs = False
        assert theirs.recv(10) == b""


def test_garbage_after_data_is_an_error_after_the_data(directory: Path) -> None:
    with connected(directory) as (ours, theirs):
        theirs.sendall(b"good")
        raw = socket.socket(fileno=theirs.fileno())
        raw.send(b"\x17\x03\x03\x00\x20" + bytes(32))
        raw.detach()
        view = memoryview(bytearray(100))
        assert _retried(lambda: ours.recv_into(view), ours, select.POLLIN) == 4
        with pytest.raises(SourceError) as caught:
            ours.recv_into(view)
        assert caught.value.errno == errno.EPROTO and "TLS failed" in str(caught.value)


class Trickle:
    """A socket that gives a byte at a time."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw = raw
        self.calls = 0
        self.send, self.fileno, self.close = raw.send, raw.fileno, raw.close

    def recv_into(self, view: memoryview) -> int:
        self.calls += 1
        return self._raw.recv_into(view[:1])


def test_what_brings_no_data_does_not_hold_the_loop(directory: Path) -> None:
    """Each wake-up reads once from the socket, whatever came of it."""
    with connected(directory) as (ours, theirs):
        ours._raw = trickle = Trickle(ours._raw)  # type: ignore[assignment]
        theirs.sendall(b"data")
        view = memoryview(bytearray(100))
        for calls in range(1, 10_000):
            count = 0
            with contextlib.suppress(BlockingIOError):
                count = ours.recv_into(view)
            assert trickle.calls == calls
            if count:
                break
        assert view[:count] == b"data" and calls > 20


def test_a_poll_leaves_nothing_that_no_descriptor_tells_of(directory: Path) -> None:
    """More whole replies than one poll receives: it goes on with what came off the socket."""
    count, size = 49, 128 << 10
    backend = NbdBackend("nbd+unix:///?socket=/s")
    answered: list[int] = []
    with connected(directory) as (ours, theirs):
        with contextlib.suppress(PermissionError):
            theirs.setsockopt(socket.SOL_SOCKET, 32, 1 << 24)  # SO_SNDBUFFORCE
        view = memoryview(bytearray(BUFFER))
        export = Export(size=count * size)
        link = Link(ours, export, view, PIECE_MAX, backend._seldom)
        for number in range(count):
            request = Request(Kind.READ, number * size, size, lambda *_: None)
            link.submit(request, lambda request, errno, data: answered.append(errno))
        link.commit()
        cookies = range(1, count + 1)
        replies = b"".join(struct.pack(">IIQ", 0x67446698, 0, c) + bytes(size) for c in cookies)
        sending = threading.Thread(target=theirs.sendall, args=(replies,))
        sending.start()
        while len(answered) < count:
            assert select.select([ours], [], [], DEADLINE)[0]
            link.poll()
            assert not ours.pending()
        sending.join()
        assert answered == [0] * count
