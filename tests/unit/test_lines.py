"""Standard error that nobody reads: dropped and counted, never waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from healfs.daemon import log_file
from healfs.daemon.lines import Lines

Ends = tuple[int, int]  # to read, to write; both wait


def _pipe() -> Ends:
    return os.pipe()


def _journal() -> Ends:
    ours, theirs = socket.socketpair()
    return ours.detach(), theirs.detach()


def _terminal() -> Ends:
    return os.openpty()


@pytest.fixture(params=[_pipe, _journal, _terminal])
def ends(request: pytest.FixtureRequest) -> Iterator[Ends]:
    reader, writer = request.param()
    yield reader, writer
    for fd in reader, writer:
        with contextlib.suppress(OSError):
            os.close(fd)


def _read_all(reader: int) -> str:
    os.set_blocking(reader, False)
    found = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(reader, 1 << 16):
            found += data
    return found.decode().replace("\r\n", "\n")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("length", [100, 3000, 100_000])
def test_what_nobody_reads_is_dropped_and_counted(ends: Ends, length: int) -> None:
    reader, writer = ends
    lines = Lines(writer)
    read, written = "", 0
    while written * length < 500_000:
        print(f"{written} {'x' * length}", file=lines)
        written += 1
    while not read.endswith("last\n"):  # what is left of others goes first
        read += _read_all(reader)
        print(f"{written} last", file=lines)
        written += 1
        read += _read_all(reader)
    found = read.splitlines()
    whole = {f"{number} {'x' * length}" for number in range(written)}
    whole |= {f"{number} last" for number in range(written)}
    notes = [line for line in found if line not in whole]
    dropped = [re.fullmatch("healfs: ([0-9]+) lines dropped: nobody read them", n) for n in notes]
    assert dropped and len(set(found)) == len(found)
    assert sum(int(match[1]) for match in dropped if match) == written - (len(found) - len(notes))


def test_a_line_goes_whole(ends: Ends) -> None:
    reader, writer = ends
    lines = Lines(writer)
    lines.write("one ")
    assert _read_all(reader) == ""
    lines.write("line\ntwo\nand")
    assert _read_all(reader) == "one line\ntwo\n"


def test_nobody_ever_reads() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        print("lost", file=Lines(writer))
    finally:
        os.close(writer)


def test_a_name_that_is_no_text_is_a_line_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = []
    try:
        log_file.set_up(str(tmp_path / "log"))
        root.info("mounted on %s", "/mnt/b\udcffd")
        root.handlers[0].close()
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert "mounted on /mnt/b\\udcffd\n" in (tmp_path / "log").read_text()
    assert capsys.readouterr().err == ""
