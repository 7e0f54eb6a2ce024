"""One run of fio, and what it moved."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path

DISK_BYTES = 256 << 20


@dataclass(frozen=True)
class Load:
    """A fio job. `depth` is the queue depth; 1 is a synchronous caller."""

    pattern: str  # fio's rw
    block: str
    depth: int
    options: tuple[str, ...] = ()

    @property
    def writes(self) -> bool:
        return "write" in self.pattern or "rw" in self.pattern

    def run(self, file: Path, seconds: float) -> float:
        """Requests a second. Raises subprocess.SubprocessError when fio fails or hangs."""
        engine = ("libaio", f"--iodepth={self.depth}") if self.depth > 1 else ("psync",)
        done = subprocess.run(
            (
                *("fio", "--name=bench", f"--filename={file}", f"--size={DISK_BYTES}"),
                *("--direct=1", f"--rw={self.pattern}", f"--bs={self.block}"),
                f"--ioengine={engine[0]}",
                *engine[1:],
                *("--time_based", f"--runtime={seconds}", "--ramp_time=300ms"),
                *("--norandommap", "--randrepeat=0", "--invalidate=0", "--allow_file_create=0"),
                *("--thread", "--output-format=json", *self.options),
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


RANDOM_READ = Load("randread", "4k", 32)
RANDOM_WRITE = Load("randwrite", "4k", 32)
SEQUENTIAL_READ = Load("read", "1m", 8)
SEQUENTIAL_WRITE = Load("write", "1m", 8)
READ_DEPTH_1 = Load("randread", "4k", 1)
WRITE_FSYNC = Load("randwrite", "4k", 1, ("--fsync=1",))
# A flush each 31 MiB: a log of 64 MiB needs none of its own, which come at half of it.
RANDOM_WRITE_FLUSHED = Load("randwrite", "4k", 32, ("--fdatasync=7936",))
SEQUENTIAL_WRITE_FLUSHED = Load("write", "1m", 8, ("--fdatasync=31",))

LOADS = {
    "4k-randread-qd32": RANDOM_READ,
    "4k-randwrite-qd32": RANDOM_WRITE,
    "1m-read-qd8": SEQUENTIAL_READ,
    "1m-write-qd8": SEQUENTIAL_WRITE,
    "4k-randread-qd1": READ_DEPTH_1,
    "4k-write-fsync-qd1": WRITE_FSYNC,
}
PLAIN = tuple(LOADS)
LOADS |= {
    "4k-randwrite-qd32-flushed": RANDOM_WRITE_FLUSHED,
    "1m-write-qd8-flushed": SEQUENTIAL_WRITE_FLUSHED,
}
