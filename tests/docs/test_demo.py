"""healfs demo, as a user runs it: what it shows, what it says of a bad disk, what it leaves."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from healfs.cli.demo_load import BLOCK, content
from healfs.cli.demo_plot import HEIGHT, Mark, plot
from tests.backends.nbd_servers import wait_until
from tests.mounts import HEALFS, mountinfo

INTERRUPTED = "healfs: interrupted; all is cleaned up\n"
COMMANDS = ("truncate", "mkdir", "rm", "umount", "fusermount3")  # what the demo runs
DEADLINE = 240.0  # seconds for what takes ten on an idle machine

pytestmark = pytest.mark.skipif(not os.access("/dev/fuse", os.W_OK), reason="needs /dev/fuse")


class Demo:
    """`healfs demo` under way. Whatever it starts inherits its TMPDIR, and is known by it."""

    def __init__(self, *options: str, terminal: bool = False, path: str | None = None) -> None:
        self.tmpdir = Path(tempfile.mkdtemp(prefix="demo-", dir="/tmp"))
        self.marker = f"TMPDIR={self.tmpdir}"
        environment = os.environ | {"TMPDIR": str(self.tmpdir), "TERM": "xterm"}
        environment |= {"COLUMNS": "80"} | ({"PATH": path} if path else {})
        self._output, theirs = pty.openpty() if terminal else os.pipe()
        self._process = subprocess.Popen(
            [HEALFS, "demo", *options],
            env=environment,
            stdin=theirs if terminal else subprocess.DEVNULL,
            stdout=theirs,
            stderr=subprocess.PIPE,
            # Its controlling terminal, so that ^C is a key.
            preexec_fn=(lambda: os.login_tty(os.dup(0))) if terminal else None,
            start_new_session=not terminal,
        )
        os.close(theirs)
        self.terminal = self._output
        self.text = ""

    def read_until(self, pattern: str) -> str:
        """What was printed so far, which has the pattern now."""
        deadline = time.monotonic() + DEADLINE
        while not re.search(pattern, self.text):
            assert self._read(deadline), f"no {pattern!r} in:\n{self.text}"
        return self.text

    def end(self) -> tuple[int, str]:
        """Exit status and standard error; all output is in `text` then."""
        deadline = time.monotonic() + DEADLINE
        while self._read(deadline):
            pass
        said = self._process.communicate(timeout=DEADLINE)[1]
        return self._process.returncode, said.decode()

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._output], [], [], max(0, deadline - time.monotonic()))
        assert ready, f"nothing more for {DEADLINE} s after:\n{self.text}"
        try:
            data = os.read(self._output, 1 << 16)
        except OSError:  # EIO: how a terminal ends
            data = b""
        self.text += data.decode(errors="replace")
        return bool(data)

    def healfs(self, verb: str, *options: str) -> str:
        """What somebody else says to its mount, and is told."""
        runtime = re.search(r"export HEALFS_RUNTIME_DIR=(\S+)", self.text)
        assert runtime is not None
        return subprocess.run(
            [HEALFS, verb, Path(runtime[1]).parent / "mnt", *options],
            env=os.environ | {"HEALFS_RUNTIME_DIR": runtime[1]},
            check=True,
            timeout=DEADLINE,
            capture_output=True,
            text=True,
        ).stdout

    def send_signal(self, number: int) -> None:
        self._process.send_signal(number)

    def left(self) -> list[str]:
        """What it has not cleaned up."""
        return [
            *map(str, self.tmpdir.rglob("*")),
            *(" ".join(fields) for fields in mountinfo() if str(self.tmpdir) in fields[4]),
            *(f"process {pid}" for pid in self._processes()),
        ]

    def _processes(self) -> list[int]:
        found = []
        for directory in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if self.marker.encode() in (directory / "environ").read_bytes().split(b"\0"):
                    found.append(int(directory.name))
        return found

    def close(self) -> None:
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for fields in list(mountinfo()):
            if (place := fields[4]).startswith(str(self.tmpdir)):
                subprocess.run(["umount", "-l", place], check=False, timeout=60)
        self._process.communicate(timeout=DEADLINE)
        os.close(self._output)
        shutil.rmtree(self.tmpdir, ignore_errors=True)


Demos = Callable[..., Demo]


@pytest.fixture
def demo() -> Iterator[Demos]:
    started: list[Demo] = []

    def start(*options: str, terminal: bool = False, path: str | None = None) -> Demo:
        started.append(Demo(*options, terminal=terminal, path=path))
        return started[-1]

    yield start
    for one in started:
        one.close()


def directory_with(tmp_path: Path, *names: str) -> str:
    """A PATH with these commands only."""
    for name in names:
        found = shutil.which(name)
        if found is None:
            pytest.skip(f"{name} is not installed")
        (tmp_path / name).symlink_to(found)
    return str(tmp_path)


def test_the_whole_piece(demo: Demos, tmp_path: Path) -> None:
    running = demo("--seconds", "3", path=directory_with(tmp_path, "nbdkit", *COMMANDS))
    status, said = running.end()
    assert (status, said) == (0, ""), running.text
    lines = running.text.splitlines()

    commands = [line.split()[1:3] for line in lines if line.startswith("$ ")]
    assert [words[0] for words in commands] == [
        *("export", "truncate", "mkdir", "nbdkit", "healfs", "kill", "rm", "nbdkit", "healfs")
    ]
    assert [words[1] for words in commands if words[0] == "healfs"] == ["mount", "umount"]
    assert any(re.search(r"stalled +\d+ MiB/s +[1-8] parked", line) for line in lines)
    for mark in ("kill -9", "server back"):  # left or right of its ^, as there is room
        assert re.search(rf"\^ {mark}, [0-9.]+ s|{mark}, [0-9.]+ s \^", running.text), mark
    assert [line for line in lines if not line.startswith("$") and len(line) > 80] == []
    verdict = re.fullmatch(
        r"PASS: (\d+) blocks written, (\d+) verified, 0 errors, longest wait ([0-9.]+) s", lines[-1]
    )
    assert verdict is not None, lines[-1]
    assert int(verdict[1]) >= int(verdict[2]) > 0
    assert float(verdict[3]) >= 0.9  # it did wait: the server was away for a second
    assert running.left() == []


def test_wrong_bytes_are_found(demo: Demos) -> None:
    running = demo("--seconds", "15")
    running.read_until(r"(?s)\$ kill -9.*\$ nbdkit")
    wait_until(lambda: [*running.tmpdir.rglob("nbd.sock")], "the server")
    running.send_signal(signal.SIGSTOP)
    # Not sooner: the replay mends what is in the write log, on a slow machine all there is.
    wait_until(lambda: '"state": "ready"' in running.healfs("status", "--json"), "the replay")
    (disk,) = running.tmpdir.rglob("disk.raw")
    with disk.open("r+b") as file:
        file.write(bytes(disk.stat().st_size))
    running.send_signal(signal.SIGCONT)
    status, said = running.end()
    assert status == 1 and said.startswith("healfs: ") and said.count("\n") == 1
    assert re.search(r"^FAILED: \d+ errors .* was written, .* was read", running.text, re.MULTILINE)
    assert "PASS" not in running.text
    assert running.left() == []


def test_errors_of_the_load_are_counted(demo: Demos) -> None:
    """The control: somebody changes the policy to report during the outage."""
    running = demo("--seconds", "30")  # status, a process, is to be faster than a third of it
    running.read_until(r"stalled")
    running.send_signal(signal.SIGSTOP)  # nobody starts the server meanwhile
    running.healfs("policy", "--rerror=report", "--werror=report")
    running.send_signal(signal.SIGCONT)
    assert running.end()[0] == 1
    wanted = r"^FAILED: \d+ errors .*(write|read) at \d+: \[Errno 5\]"
    assert re.search(wanted, running.text, re.MULTILINE), running.text
    assert running.left() == []


@pytest.mark.parametrize(
    ("number", "pattern"),
    [
        (signal.SIGINT, r"\$ export"),  # before there is anything
        (signal.SIGTERM, r"\$ healfs mount"),
        (signal.SIGHUP, r"\d written"),
        (signal.SIGTERM, r"stalled"),  # with the load waiting in the kernel
        (signal.SIGINT, r"reading back"),
    ],
)
def test_a_signal_cleans_up(
    demo: Demos, tmp_path: Path, number: signal.Signals, pattern: str
) -> None:
    # qemu-nbd: it is the other server, and nbdkit would end with its parent anyway (tried)
    running = demo("--seconds", "3", path=directory_with(tmp_path, "qemu-nbd", *COMMANDS))
    running.read_until(pattern)
    running.send_signal(number)
    assert running.end() == (130, INTERRUPTED), running.text
    assert running.left() == []


def test_on_a_terminal(demo: Demos) -> None:
    """Live until Ctrl-C, pressed during the outage."""
    running = demo("--seconds", "6", terminal=True)
    running.read_until(r"stalled.*MiB/s +[1-8] parked")
    assert "MiB/s┤" in running.text or "MiB/s|" in running.text
    os.write(running.terminal, b"\x03")
    status, said = running.end()
    assert status == 130 and said == ""
    assert running.text.replace("\r", "").endswith(INTERRUPTED)
    assert running.text.count("\x1b[?25l") == running.text.count("\x1b[?25h")  # the cursor is back
    assert running.left() == []


def test_without_a_server_program(demo: Demos, tmp_path: Path) -> None:
    running = demo(path=str(tmp_path))
    status, said = running.end()
    assert (status, running.text) == (2, "")
    assert "nbdkit" in said and said.count("\n") == 1
    assert running.left() == []


def test_a_server_that_does_not_start(demo: Demos, tmp_path: Path) -> None:
    path = directory_with(tmp_path, *COMMANDS)
    (tmp_path / "nbdkit").write_text("#!/bin/sh\necho 'nbdkit: no plugin called file' >&2; exit 1")
    (tmp_path / "nbdkit").chmod(0o755)
    running = demo(path=path)
    assert running.end() == (1, "healfs: nbdkit ended: nbdkit: no plugin called file\n")
    assert running.left() == []


def test_blocks_differ_with_number_and_version() -> None:
    blocks = {content(block, version) for block in range(64) for version in range(1, 9)}
    assert len(blocks) == 64 * 8 and {len(block) for block in blocks} == {BLOCK}


def samples(*rates: float) -> list[tuple[float, float]]:
    """Bytes moved after each second, at these MiB/s."""
    total, result = 0.0, [(100.0, 0.0)]
    for second, rate in enumerate(rates, 1):
        total += rate * 2**20
        result.append((100.0 + second, total))
    return result


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("columns", [40, 80])
def test_plot_shows_the_gap(columns: int, ascii_only: bool) -> None:
    rates = [50.0] * 4 + [0.0] * 4 + [100.0] * 4
    marks = [Mark(104, "gone"), Mark(108, "back")]
    lines = plot(samples(*rates), marks, columns=columns, ascii_only=ascii_only)
    assert max(map(len, lines)) <= columns
    assert lines[0].strip().startswith("100 MiB/s")
    assert not ascii_only or "".join(lines).isascii()
    bottom = lines[HEIGHT - 1].ljust(columns)
    gone, back = lines[-1].index("^ gone"), lines[-1].index("^ back")
    assert set(bottom[gone + 1 : back - 1]) == {" "}
    assert " " not in bottom[11 : gone - 1] + bottom[back + 1 :].rstrip()
    # twice as fast is twice as high
    heights = [sum(line.ljust(columns)[at] != " " for line in lines[:HEIGHT]) for at in (15, -5)]
    assert heights == [HEIGHT // 2, HEIGHT]


def test_plot_of_a_trickle_is_not_empty() -> None:
    lines = plot(samples(1000, 0.1, 0), columns=80)
    assert lines[HEIGHT - 1][40] == "▁" and len(lines[HEIGHT - 1]) < 70


def test_plot_of_nothing() -> None:
    assert plot([]) == plot([(1.0, 0.0)]) == []
    assert plot(samples(0, 0))[0].strip().startswith("0 MiB/s")


def test_marks_that_crowd_go_below_each_other() -> None:
    marks = [Mark(101.0, "first"), Mark(101.1, "second"), Mark(101.9, "at the very edge")]
    lines = plot(samples(1, 1), marks, columns=80)[HEIGHT + 1 :]
    assert len(lines) == 2 and max(map(len, lines)) <= 80
    assert "^ first" in lines[0] and "at the very edge ^" in lines[0] and "^ second" in lines[1]


def test_a_span_leaves_room_at_the_right() -> None:
    lines = plot(samples(1, 1), columns=80, span=4)
    assert 44 <= len(lines[HEIGHT - 1]) <= 46
