"""A real Linux guest in QEMU, driven over a serial port."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from tests.mounts import HealfsMount
from tests.vm.image import image

Bus = Literal["virtio-blk", "virtio-scsi"]

# As healfs attach calls them, and as the guest does.
BUSES: dict[Bus, str] = {"virtio-blk": "virtio", "virtio-scsi": "scsi"}
NAMES: dict[Bus, str] = {"virtio-blk": "vda", "virtio-scsi": "sda"}
PLAIN: dict[Bus, list[str]] = {
    "virtio-blk": ["-device", "virtio-blk-pci,drive=d"],
    "virtio-scsi": ["-device", "virtio-scsi-pci,id=s", "-device", "scsi-hd,bus=s.0,drive=d"],
}


def arguments(disk: HealfsMount | Path, bus: Bus) -> list[str]:
    """QEMU's, for the disk: of a mount those that healfs attach prints."""
    if isinstance(disk, HealfsMount):
        printed = disk.run("attach", str(disk.mountpoint), "--bus", BUSES[bus])
        return shlex.split(printed.stdout)
    node = f"driver=file,node-name=d,filename={disk},aio=threads,discard=unmap"
    return ["-blockdev", node, *PLAIN[bus]]


class Guest:
    """One virtual machine with `disk` as its only disk; end it with stop().

    The commands it takes are those of tests/vm/init. QEMU is killed `limit` seconds
    after its start, and when the thread that started it ends.
    """

    def __init__(
        self, disk: HealfsMount | Path, bus: Bus = "virtio-blk", limit: float = 1700
    ) -> None:
        kernel, initrd = image()
        self._directory = tempfile.TemporaryDirectory(prefix="healfs-vm-")
        scratch = Path(self._directory.name)
        self.console = scratch / "console"
        self._monitor = scratch / "qmp"
        # KVM is not tried: where /dev/kvm exists and fails, QEMU dies or hangs at the
        # first guest instruction, and the tests need no speed.
        command = [
            *("setpriv", "--pdeathsig", "KILL"),
            *("qemu-system-x86_64", "-accel", "tcg", "-M", "q35", "-m", "256M", "-smp", "1"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(kernel), "-initrd", str(initrd)),
            *("-append", f"console=ttyS0 loglevel=4 panic=-1 healfs.disk={NAMES[bus]}"),
            *("-chardev", f"file,id=console,path={self.console}", "-serial", "chardev:console"),
            *("-chardev", "stdio,id=control,signal=off", "-serial", "chardev:control"),
            *("-qmp", f"unix:{self._monitor},server=on,wait=off"),
            *arguments(disk, bus),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._limit = threading.Timer(limit, self._process.kill)
        self._limit.daemon = True
        self._limit.start()
        self.lines: list[tuple[float, str]] = []
        self._changed = threading.Condition()
        self._over = False
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _read(self) -> None:
        assert self._process.stdout is not None
        for raw in self._process.stdout:
            with self._changed:
                self.lines.append((time.monotonic(), raw.decode(errors="replace").strip()))
                self._changed.notify_all()
        with self._changed:
            self._over = True
            self._changed.notify_all()

    def mark(self) -> int:
        """A place in the guest's output, for `since`."""
        return len(self.lines)

    def said(self, pattern: str, since: int = 0) -> list[str]:
        """The lines after `since` that match `pattern` whole."""
        return [line for _, line in self.lines[since:] if re.fullmatch(pattern, line)]

    def wait_line(self, pattern: str, timeout: float, since: int = 0, count: int = 1) -> str:
        """The `count`th line after `since` that matches `pattern` whole.

        Raises TimeoutError after `timeout` seconds, EOFError when QEMU has ended.
        """
        deadline = time.monotonic() + timeout
        with self._changed:
            while len(found := self.said(pattern, since)) < count:
                left = deadline - time.monotonic()
                if self._over or left <= 0:
                    error = EOFError if self._over else TimeoutError
                    last = [line for _, line in self.lines[-5:]]
                    raise error(f"no {pattern!r}; last lines {last}; console: {self.messages()}")
                self._changed.wait(left)
        return found[count - 1]

    def messages(self) -> str:
        """The end of the kernel's console."""
        return self.console.read_text(errors="replace")[-2000:] if self.console.exists() else ""

    def beats(self, since: int = 0) -> int:
        """How often the heartbeat, a process without the disk, was heard after `since`."""
        return len(self.said(r"BEAT \d+", since))

    def send(self, command: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(command.encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, command: str, answer: str, timeout: float) -> str:
        """Send `command`, wait for the line that answers it."""
        since = self.mark()
        self.send(command)
        return self.wait_line(answer, timeout, since)

    def sums(self) -> dict[str, str]:
        """For each file the sum of its last contents that the guest had synced."""
        written = (line.split() for line in self.said(r"FILE \d+ \d+ [0-9a-f]{64}"))
        return {slot: digest for _, _, slot, digest in written}

    def qmp(self, command: str, deadline: float = 60, **arguments: object) -> Any:
        """QEMU's own answer to `command`; TimeoutError `deadline` seconds later."""
        until = time.monotonic() + deadline
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as monitor:
            monitor.settimeout(deadline)
            monitor.connect(str(self._monitor))
            stream = monitor.makefile("rwb")
            answers = self._answers(stream, monitor, until)
            next(answers)
            for execute in (
                {"execute": "qmp_capabilities"},
                {"execute": command, "arguments": arguments},
            ):
                stream.write(json.dumps(execute).encode())
                stream.flush()
                answer = next(a for a in answers if "event" not in a)
                if "error" in answer:
                    raise RuntimeError(answer["error"]["desc"])
            return answer["return"]

    @staticmethod
    def _answers(stream: Any, monitor: socket.socket, until: float) -> Iterator[dict[str, Any]]:
        while True:
            # One deadline for all lines: an event a second must not put it off.
            monitor.settimeout(max(until - time.monotonic(), 0.001))
            yield json.loads(stream.readline())

    def reset(self) -> None:
        """The machine's reset button. QEMU answers, and resets, when the disk has answered."""
        # It is started with -no-reboot, so that a panic of the guest ends it.
        self.qmp("set-action", reboot="reset")
        with contextlib.suppress(TimeoutError):
            self.qmp("system_reset", deadline=1)

    def gone(self, seconds: float) -> None:
        """Until QEMU has ended; subprocess.TimeoutExpired `seconds` later."""
        self._process.wait(seconds)

    def kill(self) -> None:
        self._process.kill()

    def power_off(self, timeout: float) -> None:
        """Let the guest end by itself; subprocess.TimeoutExpired if it does not."""
        self.send("poweroff")
        self.gone(timeout)

    def stop(self) -> None:
        """Kill QEMU; harmless if it has ended. Bounded, though its threads may sit in D."""
        self._limit.cancel()
        self._process.kill()
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.wait(60)
            self._reader.join(60)
            # Not of a QEMU that has not ended: this waits for the reader.
            self._process.stdout.close()
        finally:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
            self._directory.cleanup()
