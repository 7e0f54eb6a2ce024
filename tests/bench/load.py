"""One run of fio, and what it moved."""

from __future__ import annotations

import contextlib
import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DISK_BYTES = 256 << 20


class FioFailed(Exception):
    """One line that says why. `hung`: it has not ended, and the disk is of no use any more."""

    def __init__(self, why: str, *, hung: bool = False) -> None:
        super().__init__(f"fio: {why}")
        self.hung = hung


@dataclass(frozen=True)
class Load:
    """A fio job. `depth` is the queue depth; 1 is a synchronous caller, or `threads` of them."""

    pattern: str  # fio's rw
    block: str
    depth: int
    options: tuple[str, ...] = ()
    engine: str = "libaio"
    threads: int = 1

    def run(self, file: Path, seconds: float) -> float:
        """Requests a second."""
        engine = (self.engine, f"--iodepth={self.depth}") if self.depth > 1 else ("psync",)
        found = _fio(
            *("--name=bench", f"--filename={file}", f"--size={DISK_BYTES}"),
            *("--direct=1", f"--rw={self.pattern}", f"--bs={self.block}"),
            f"--ioengine={engine[0]}",
            *engine[1:],
            # Not in seconds: fio takes 1.5 for 1, and 0.5 for 50 ms.
            *("--time_based", f"--runtime={seconds * 1e3:.0f}ms", "--ramp_time=300ms"),
            *("--norandommap", "--randrepeat=0", "--invalidate=0", "--allow_file_create=0"),
            *("--thread", f"--numjobs={self.threads}", "--group_reporting"),
            *self.options,
            timeout=60 + 10 * seconds,
        )
        figure = sum(job["read"]["iops"] + job["write"]["iops"] for job in found["jobs"])
        if not figure:
            raise FioFailed(f"no request was answered in {seconds:g} s")
        return float(figure)


def _fio(*arguments: str, timeout: float) -> dict[str, Any]:
    """What it prints as JSON."""
    command = ("fio", "--output-format=json", *arguments)
    fio = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        printed, complaint = fio.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        fio.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            fio.communicate(timeout=10)  # what waits in the kernel ends with the disk only
        raise FioFailed(f"no end after {timeout:g} s", hung=True) from None
    # It complains here and there, and may print warnings before the JSON.
    before, brace, after = printed.partition("{")
    if fio.returncode or not brace:
        lines = [line.strip() for line in (complaint + before).splitlines() if line.strip()]
        told = [line for line in lines if "err" in line] or lines or ["it says nothing"]
        raise FioFailed(told[0].removeprefix("fio: "))
    found: dict[str, Any] = json.loads(brace + after)
    return found


FSYNC = ("--fsync=1",)
MIXED = ("--rwmixread=70",)
LOADS = {
    "4k-randread-qd32": Load("randread", "4k", 32),
    "4k-randread-qd32-io_uring": Load("randread", "4k", 32, engine="io_uring"),
    "4k-randwrite-qd32": Load("randwrite", "4k", 32),
    "4k-randwrite-qd32-io_uring": Load("randwrite", "4k", 32, engine="io_uring"),
    "4k-randrw-70-30-qd32": Load("randrw", "4k", 32, MIXED),
    "4k-randread-16-threads": Load("randread", "4k", 1, threads=16),
    "4k-randwrite-16-threads": Load("randwrite", "4k", 1, threads=16),
    "4k-randread-qd1": Load("randread", "4k", 1),
    "4k-randwrite-qd1": Load("randwrite", "4k", 1),
    "1m-read-qd8": Load("read", "1m", 8),
    "1m-write-qd8": Load("write", "1m", 8),
    "4k-write-fsync-qd1": Load("randwrite", "4k", 1, FSYNC),
    # fio's fsync waits by itself, with the other seven writes in flight or done: so threads, too.
    "4k-write-fsync-qd8": Load("randwrite", "4k", 8, FSYNC),
    "4k-write-fsync-8-threads": Load("randwrite", "4k", 1, FSYNC, threads=8),
}
PLAIN = tuple(LOADS)
# A flush each 20 MiB, and up to 8 in flight: a log of 64 MiB needs no flush of its own, at half.
LOADS |= {
    "4k-randwrite-qd32-flushed": Load("randwrite", "4k", 32, ("--fdatasync=5120",)),
    "1m-write-qd8-flushed": Load("write", "1m", 8, ("--fdatasync=20",)),
}
