"""usage: server.py SOCKET STABLE JOURNAL HANDOVER SETTINGS [LATE_DELAY]

An NBD server that keeps what it has answered in memory until it is told to flush, and that can
carry out a write long after the connection it came on has ended. Standard library only.

STABLE is the disk. JOURNAL gets a record of each answer (see Record). HANDOVER holds the writes
that were taken and neither carried out nor answered: it outlives kill -9, and its writes land
LATE_DELAY seconds after the next client has connected (without it: when they are told to). It
begins with the time (time.monotonic) after which nothing of it may land, 0: none.

SETTINGS is a JSON object: see Settings. SOCKET.control takes such objects, one a line, and answers
each with the state.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import struct
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

BLOCK = 4096
REQUEST = struct.Struct(">IHHQQI")
REPLY = struct.Struct(">IIQ")
REQUEST_MAGIC, REPLY_MAGIC = 0x25609513, 0x67446698
OPTION_MAGIC, OPTION_REPLY_MAGIC = b"IHAVEOPT", 0x3E889045565A9
READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1
# HAS_FLAGS, SEND_FLUSH, SEND_FUA, SEND_TRIM, SEND_WRITE_ZEROES
FLAGS = 1 << 0 | 1 << 2 | 1 << 3 | 1 << 5 | 1 << 6
OPT_ABORT, OPT_GO = 2, 7
REP_ACK, REP_INFO, REP_ERR_UNSUP = 1, 3, (1 << 31) | 1

# What the journal says: a client is in, a write was answered, a flush was
# carried out, a write landed late.
CONNECTED, WRITTEN, FLUSHED, LATE = b"CWFL"
RECORD = struct.Struct("<BxxxIQQd")
HELD = struct.Struct("<QQ")  # offset, length; the data follows
DEADLINE = struct.Struct("<d")


@dataclass(frozen=True, slots=True)
class Record:
    """`crc` is the bytes' of a write; `stable`: it was written through. `at`: time.monotonic."""

    what: int
    crc: int
    offset: int
    length: int
    stable: bool
    at: float


def read_journal(path: Path) -> Iterator[Record]:
    data = path.read_bytes()
    for place in range(0, len(data) - len(data) % RECORD.size, RECORD.size):
        what, crc, offset, length, at = RECORD.unpack_from(data, place)
        yield Record(what, crc, offset, length & ~(1 << 63), bool(length >> 63), at)


@dataclass
class Settings:
    """What the control socket sets."""

    hold: int = 0  # so many of the next writes are taken and not answered
    hang: bool = False  # every request is
    fail_flushes: int = 0  # so many of the next flushes fail
    drop: bool = False  # a flush that fails drops the cache, as Linux marks its pages clean
    flush_errno: int = errno.EIO
    flush_delay: float = 0.0  # seconds until a flush is answered; others go on meanwhile
    flush_early: bool = False  # it is carried out before that delay: covers nothing that came in it
    refuse: list[list[int]] = field(default_factory=list)  # writes: [start, end, errno]


@dataclass
class Held:
    conn: socket.socket
    command: int
    flags: int
    cookie: int
    offset: int
    length: int
    data: bytes


class Server:
    def __init__(
        self,
        stable: str,
        journal: str,
        handover: str,
        settings: Settings,
        late_delay: float | None,
    ) -> None:
        self.file = os.open(stable, os.O_RDWR)
        self.size = os.fstat(self.file).st_size
        self.cache = bytearray(os.pread(self.file, self.size, 0))
        self.dirty: set[int] = set()
        self.journal = os.open(journal, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.handover = handover
        self.late_delay = late_delay
        self.settings = settings
        self.lock = threading.RLock()
        self.held: list[Held] = []
        self.counters = dict.fromkeys(("flushes", "failed_flushes", "refused", "late"), 0)

    # --- the disk ---------------------------------------------------------------------------

    def record(self, what: int, crc: int, offset: int, length: int, stable: bool = False) -> bytes:
        return RECORD.pack(what, crc, offset, length | stable << 63, time.monotonic())

    def store(self, offset: int, data: bytes, *, through: bool = False) -> None:
        end = offset + len(data)
        self.cache[offset:end] = data
        blocks = range(offset // BLOCK, -(-end // BLOCK))
        if through:
            os.pwrite(self.file, data, offset)
            self.dirty.difference_update(blocks)
        else:
            self.dirty.update(blocks)

    def flush(self, records: list[bytes]) -> int:
        if self.settings.fail_flushes:
            self.settings.fail_flushes -= 1
            self.counters["failed_flushes"] += 1
            if self.settings.drop:
                for block in self.dirty:
                    at = block * BLOCK
                    self.cache[at : at + BLOCK] = os.pread(self.file, BLOCK, at)
                self.dirty.clear()
            return self.settings.flush_errno
        for block in self.dirty:
            at = block * BLOCK
            os.pwrite(self.file, self.cache[at : at + BLOCK], at)
        self.dirty.clear()
        self.counters["flushes"] += 1
        records.append(self.record(FLUSHED, 0, 0, 0))
        return 0

    # --- late writes ------------------------------------------------------------------------

    def hand_over(self, held: Held) -> None:
        """Kept where kill -9 leaves it."""
        with open(self.handover, "ab") as file:
            if not file.tell():
                file.write(DEADLINE.pack(0))
            file.write(HELD.pack(held.offset, held.length) + held.data)

    def land(self) -> None:
        """What was held on a connection that is gone lands now."""
        with self.lock:
            try:
                left = Path(self.handover).read_bytes()
            except FileNotFoundError:
                return
            os.unlink(self.handover)
            (deadline,) = DEADLINE.unpack_from(left)
            at = DEADLINE.size
            while at < len(left):
                offset, length = HELD.unpack_from(left, at)
                data = left[at + HELD.size :][:length]
                at += HELD.size + length
                if not deadline or time.monotonic() < deadline:
                    self.store(offset, data)
                    self.counters["late"] += 1
                    os.write(self.journal, self.record(LATE, zlib.crc32(data), offset, length))

    # --- one client -------------------------------------------------------------------------

    def serve(self, conn: socket.socket) -> None:
        try:
            if self.negotiate(conn):
                os.write(self.journal, self.record(CONNECTED, 0, 0, 0))
                if self.late_delay is not None:
                    threading.Timer(self.late_delay, self.land).start()
                self.transmit(conn)
        except OSError:
            pass  # the client is gone
        finally:
            with self.lock:
                self.held = [held for held in self.held if held.conn is not conn]
            conn.close()

    def negotiate(self, conn: socket.socket) -> bool:
        conn.sendall(b"NBDMAGIC" + OPTION_MAGIC + struct.pack(">H", 3))
        exactly(conn, 4)
        while True:
            _, option, length = struct.unpack(">8sII", exactly(conn, 16))
            exactly(conn, length)
            head = struct.Struct(">QIII")
            if option == OPT_GO:
                export = struct.pack(">HQH", 0, self.size, FLAGS)
                sizes = struct.pack(">HIII", 3, BLOCK, BLOCK, 1 << 20)
                for info in (export, sizes):
                    conn.sendall(head.pack(OPTION_REPLY_MAGIC, option, REP_INFO, len(info)) + info)
                conn.sendall(head.pack(OPTION_REPLY_MAGIC, option, REP_ACK, 0))
                return True
            answer = REP_ACK if option == OPT_ABORT else REP_ERR_UNSUP
            conn.sendall(head.pack(OPTION_REPLY_MAGIC, option, answer, 0))
            if option == OPT_ABORT:
                return False

    def transmit(self, conn: socket.socket) -> None:
        data = bytearray()
        while chunk := conn.recv(1 << 20):
            data += chunk
            at = 0
            replies: list[bytes] = []
            records: list[bytes] = []
            with self.lock:
                while len(data) - at >= REQUEST.size:
                    magic, flags, command, cookie, offset, length = REQUEST.unpack_from(data, at)
                    assert magic == REQUEST_MAGIC, "the client broke the protocol"
                    payload = length if command == WRITE else 0
                    if len(data) - at < REQUEST.size + payload:
                        break
                    at += REQUEST.size
                    body = bytes(data[at : at + payload])
                    at += payload
                    if command == DISCONNECT:
                        return
                    request = Held(conn, command, flags, cookie, offset, length, body)
                    if self.holds(request):
                        continue
                    self.answer(request, replies, records)
                # The journal comes second: what it says was answered, was.
                if replies:
                    conn.sendall(b"".join(replies))
                    os.write(self.journal, b"".join(records))
            del data[:at]

    def holds(self, request: Held) -> bool:
        settings = self.settings
        is_write = request.command == WRITE
        if not settings.hang and not (is_write and settings.hold):
            return False
        if is_write:
            settings.hold -= bool(settings.hold)
            self.hand_over(request)
        self.held.append(request)
        return True

    def release(self) -> None:
        """The end of a hang: all that is held is carried out, in order, and answered."""
        held, self.held = self.held, []
        Path(self.handover).unlink(missing_ok=True)
        for request in held:
            replies: list[bytes] = []
            records: list[bytes] = []
            self.answer(request, replies, records)
            try:
                request.conn.sendall(b"".join(replies))
                os.write(self.journal, b"".join(records))
            except OSError:
                pass

    def answer(self, request: Held, replies: list[bytes], records: list[bytes]) -> None:
        offset, length, command = request.offset, request.length, request.command
        end = offset + length
        error, data = 0, b""
        if command == READ:
            data = bytes(self.cache[offset:end])
        elif command in (WRITE, WRITE_ZEROES):
            body = request.data if command == WRITE else bytes(length)
            error = self.refusal(offset, end)
            if not error:
                through = bool(request.flags & FUA)
                self.store(offset, body, through=through)
                records.append(self.record(WRITTEN, zlib.crc32(body), offset, length, through))
        elif command == FLUSH:
            delay = self.settings.flush_delay
            early = self.settings.flush_early or not delay
            error = self.flush(records) if early else 0
            if delay:
                result = error if early else None
                threading.Timer(delay, self.flush_later, (request, result)).start()
                return
        elif command != TRIM:  # a hint
            error = errno.EINVAL
        replies.append(REPLY.pack(REPLY_MAGIC, error, request.cookie) + data)

    def refusal(self, offset: int, end: int) -> int:
        for start, stop, error in self.settings.refuse:
            if offset < stop and start < end:
                self.counters["refused"] += 1
                return error
        return 0

    def flush_later(self, request: Held, error: int | None) -> None:
        with self.lock:
            records: list[bytes] = []
            if error is None:
                error = self.flush(records)
            try:
                request.conn.sendall(REPLY.pack(REPLY_MAGIC, error, request.cookie))
            except OSError:
                pass
            os.write(self.journal, b"".join(records))

    # --- control ----------------------------------------------------------------------------

    def control(self, conn: socket.socket) -> None:
        with conn, conn.makefile("rw") as lines:
            for line in lines:
                with self.lock:
                    for name, value in json.loads(line).items():
                        if name == "land":
                            self.land()
                        elif name == "release":
                            self.release()
                        else:
                            setattr(self.settings, name, value)
                    state = {
                        **asdict(self.settings),
                        **self.counters,
                        "held": len(self.held),
                        "dirty": len(self.dirty),
                    }
                lines.write(json.dumps(state) + "\n")
                lines.flush()


def exactly(conn: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        chunk = conn.recv(length - len(data))
        if not chunk:
            raise ConnectionResetError
        data += chunk
    return data


def listen(path: str) -> socket.socket:
    Path(path).unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(16)
    return listener


def accept(listener: socket.socket, serve: object) -> None:
    while True:
        conn, _ = listener.accept()
        threading.Thread(target=serve, args=(conn,), daemon=True).start()  # type: ignore[arg-type]


def main(
    path: str, stable: str, journal: str, handover: str, settings: str, delay: str = ""
) -> None:
    given = Settings(**json.loads(settings))
    server = Server(stable, journal, handover, given, float(delay) if delay else None)
    control = listen(f"{path}.control")
    threading.Thread(target=accept, args=(control, server.control), daemon=True).start()
    accept(listen(path), server.serve)


if __name__ == "__main__":
    main(*sys.argv[1:])
