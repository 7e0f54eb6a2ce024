"""One run of fio, and what it moved."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Load:
    """A fio job. `depth` is the queue depth; 1 is a synchronous caller, or `threads` of them."""

    pattern: str  # fio's rw
    block: str
    depth: int
    options: tuple[str, ...] = ()
    engine: str = "libaio"
    threads: int = 1

    @property
    def writes(self) -> bool:
        return "write" in self.pattern or "rw" in self.pattern

    def run(self, file: Path, seconds: float) -> float:
        """Requests a second. Raises subprocess.SubprocessError when fio fails or hangs."""
        engine = (self.engine, f"--iodepth={self.depth}") if self.depth > 1 else ("psync",)
        done = subprocess.run(
            (
                *("fio", "--name=bench", f"--filename={file}", f"--size={DISK_BYTES}"),
                *("--direct=1", f"--rw={self.pattern}", f"--bs={self.block}"),
                f"--ioengine={engine[0]}",
                *engine[1:],
                *("--time_based", f"--runtime={seconds}", "--ramp_time=300ms"),
                *("--norandommap", "--randrepeat=0", "--invalidate=0", "--allow_file_create=0"),
                *("--thread", f"--numjobs={self.threads}", "--group_reporting"),
                *("--output-format=json", *self.options),
            ),
            capture_output=True,
            text=True,
            timeout=60 + 10 * seconds,
        )
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, "fio", done.stdout, done.stderr)
        # fio may print warnings before the JSON.
        jobs = json.loads(done.stdout[done.stdout.index("{") :])["jobs"]
        return float(sum(job["read"]["iops"] + job["write"]["iops"] for job in jobs))


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
    "4k-write-fsync-qd8": Load("randwrite", "4k", 8, FSYNC),
}
PLAIN = tuple(LOADS)
# A flush each 20 MiB, and up to 8 in flight: a log of 64 MiB needs no flush of its own, at half.
LOADS |= {
    "4k-randwrite-qd32-flushed": Load("randwrite", "4k", 32, ("--fdatasync=5120",)),
    "1m-write-qd8-flushed": Load("write", "1m", 8, ("--fdatasync=20",)),
}
