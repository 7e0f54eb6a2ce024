"""healfs fail: errors for all that waits, now, on real mounts; what comes later waits again."""

from __future__ import annotations

import errno

import pytest

from tests.backends.nbd_servers import NbdServer
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.fuse.control import control
from tests.mounts import HealfsMount

BLOCK = b"f" * 4096


def _fail(mount: HealfsMount) -> str:
    said = mount.run("fail", str(mount.mountpoint)).stdout
    return said.removeprefix(f"{mount.mountpoint}: ")


def test_what_is_parked_fails_and_what_comes_later_waits(
    server: NbdServer, healfs_mount: Mounter, agent: Opener
) -> None:
    mount = healfs_mount(server.uri())
    writers = [agent(mount.file) for _ in range(3)]
    reader, later = agent(mount.file), agent(mount.file)
    writers[0].ok("pwrite", 0, b"o" * 4096)  # answered, not flushed: it stays in the log
    server.kill()
    with control(mount) as disk:
        for writer in writers:  # two of them wait for the first
            writer.ask("pwrite", 4096, BLOCK)
        reader.ask("pread", 4096, 4096)
        policy = disk.parked(4)["policy"]
        assert _fail(mount) == "requests answered with an error: 4\n"
        failed = disk.event("HEALFS_FAILED")["data"]["requests"]
        assert failed["write"] == {"requests": 3, "bytes": 3 * 4096}
        assert [one.answer().errno for one in (*writers, reader)] == [errno.EIO] * 4
        later.ask("pwrite", 8192, BLOCK)
        status = disk.parked(1)
        assert (status["state"], status["policy"]) == ("stalled", policy)
        assert status["totals"]["failed_by_operator"] == 4
        assert status["write_log"]["requests"] == 1
        server.start()
        assert later.answer().value == len(BLOCK)
        later.ok("fsync")
        assert reader.ok("pread", 0, 12288) == b"o" * 4096 + bytes(4096) + BLOCK
        assert _fail(mount) == "requests answered with an error: 0\n"


@pytest.mark.parametrize("calls", [[("pwrite", 0, BLOCK)], [("fsync",), ("pread", 4096, 512)]])
def test_what_hangs_in_the_server_fails(
    server: NbdServer, healfs_mount: Mounter, agent: Opener, calls: list[tuple[object, ...]]
) -> None:
    mount = healfs_mount(server.uri(), "--slow-after", "1s")
    waiting = [agent(mount.file) for _ in calls]
    later = agent(mount.file)
    waiting[0].ok("pwrite", 0, b"o" * 4096)  # an fsync has something to do
    server.pause()
    with control(mount) as disk:
        for one, call in zip(waiting, calls, strict=True):
            one.ask(*call)  # type: ignore[arg-type]
        disk.until(lambda status: status["requests"]["in_flight"] == len(calls))
        assert _fail(mount) == f"requests answered with an error: {len(calls)}\n"
        assert [one.answer().errno for one in waiting] == [errno.EIO] * len(calls)
        later.ask("pwrite", 0, b"n" * 4096)
        if calls[0][0] == "pwrite":  # newer than what may still land
            assert disk.parked(1)["requests"] == {"in_flight": 0, "parked": 1, "unsettled": 1}
        server.resume()
        assert later.answer().value == 4096
        later.ok("fsync")
        assert later.ok("pread", 0, 4096) == b"n" * 4096
        disk.state("ready")


def test_in_a_pause(server: NbdServer, healfs_mount: Mounter, agent: Opener) -> None:
    mount = healfs_mount(server.uri())
    waiting = agent(mount.file)
    with control(mount) as disk:
        disk.execute("stop")
        waiting.ask("pwrite", 0, BLOCK)
        disk.parked(1)
        assert disk.execute("healfs-fail") == {"failed": 1}
        assert waiting.answer().errno == errno.EIO
        assert disk.status()["state"] == "paused"
        waiting.ask("pwrite", 0, BLOCK)
        disk.parked(1)
        disk.execute("cont")
        assert waiting.answer().value == len(BLOCK)
