"""An ext4 that has an error when it is told to, on a loop device."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.backends.nbd_servers import wait_until

SIZE = 1 << 20
SECONDS = 60


class Ext4:
    """`image` is a file on it."""

    def __init__(self, directory: Path) -> None:
        self._medium, self._where = directory / "medium", directory / "ext4"
        self._where.mkdir()
        self.image = self._where / "disk.img"
        self._medium.touch()
        os.truncate(self._medium, 16 * SIZE)
        subprocess.run(["mkfs.ext4", "-q", self._medium], check=True, timeout=SECONDS)
        self._mount()
        try:
            self.image.write_bytes(bytes(SIZE))
            subprocess.run(["sync", "-f", self._where], check=True, timeout=SECONDS)
            if not self._trigger().exists():
                pytest.skip("this kernel's ext4 takes no error on demand")
        except BaseException:
            self.close()
            raise

    def _mount(self) -> None:
        words = ["mount", "-o", "loop,errors=remount-ro", self._medium, self._where]
        if subprocess.run(words, timeout=SECONDS).returncode:
            pytest.skip("no loop device with ext4 here")

    def _trigger(self) -> Path:
        device = os.stat(self._where).st_dev
        name = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}").resolve().name
        return Path("/sys/fs/ext4", name, "trigger_fs_error")

    def _loop_devices(self) -> str:
        words = ["losetup", "--associated", self._medium]
        done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=SECONDS)
        return done.stdout

    def fail(self) -> None:
        self._trigger().write_text("1")

    def mend(self) -> None:
        """As an operator does it; nobody may hold it."""
        subprocess.run(["umount", self._where], check=True, timeout=SECONDS)
        # A mount namespace that another test made meanwhile has it mounted, too, while it lives.
        wait_until(lambda: not self._loop_devices(), "the file system to be let go", SECONDS)
        done = subprocess.run(
            ["fsck.ext4", "-p", self._medium], capture_output=True, timeout=SECONDS
        )
        assert done.returncode in (0, 1), done  # 1: errors were corrected
        self._mount()

    def close(self) -> None:
        subprocess.run(["umount", "--lazy", self._where], check=False, timeout=SECONDS)
