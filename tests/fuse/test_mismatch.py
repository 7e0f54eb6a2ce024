"""Another disk comes back (promise 6): it is not written to, until the operator says so."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit
from tests.conftest import Mounter
from tests.fuse.agent import Agent
from tests.fuse.commands import Commands
from tests.fuse.conftest import SIZE, Opener
from tests.fuse.control import control
from tests.mounts import HealfsMount

ANSWERED, WAITING = b"A" * 4096, b"B" * 4096  # written before, and during, the outage
SECOND = 1 << 20  # where the second one goes


class Exchange:
    """One address, where disks come and go."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._arguments: list[str] = []

        def command(server: NbdServer) -> Sequence[str]:
            common = ["nbdkit", "-f", "-U", str(server.path), "--filter=exportname", "file"]
            return [*common, *self._arguments]

        self.server = NbdServer(command)

    def image(self, name: str, size: int = SIZE) -> Path:
        path = self.directory / name
        with open(path, "ab") as file:
            file.truncate(size)
        return path

    def serve(self, image: Path, description: str = "the disk") -> None:
        self._arguments = [str(image), f"exportdesc=fixed:{description}"]
        self.server.start()


@pytest.fixture
def exchange(tmp_path: Path) -> Iterator[Exchange]:
    made = Exchange(tmp_path)
    yield made
    made.server.close()


class Away:
    """A mount whose disk is away, with one write answered, not flushed, and one waiting."""

    def __init__(self, exchange: Exchange, mount: Mounter, agent: Opener) -> None:
        self.exchange = exchange
        self.image = exchange.image("disk.raw")
        exchange.serve(self.image)
        self.mount = mount(exchange.server.uri(), "--retry-interval", "100ms", "--settle", "0")
        self.agent = agent(self.mount.file)
        self.agent.ok("pwrite", 0, ANSWERED)
        exchange.server.kill()
        self.agent.ask("pwrite", SECOND, WAITING)
        self.mount.wait_until(lambda status: status["requests"]["parked"] == 1)

    def come_back_as(self, image: Path, description: str, says: str) -> None:
        """Another disk: it is found, told of, and not written to."""
        before = image.read_bytes()
        with control(self.mount) as control_:
            self.exchange.serve(image, description)
            assert says in control_.event("HEALFS_MISMATCH")["data"]["reason"]
            status = control_.state("mismatch")
        assert says in status["reason"]
        assert status["requests"]["parked"] == 1 and status["write_log"]["requests"] >= 1
        assert not self.agent.answered
        assert image.read_bytes() == before

    def done(self) -> None:
        assert self.agent.answer().value == len(WAITING)
        self.agent.ok("fsync")
        assert self.mount.status()["state"] == "ready"


@pytest.fixture
def away(exchange: Exchange, healfs_mount: Mounter, agent: Opener) -> Away:
    return Away(exchange, healfs_mount, agent)


def blocks(image: Path) -> tuple[bytes, bytes]:
    """What it has where the two writes go."""
    data = image.read_bytes()
    return data[:4096], data[SECOND : SECOND + 4096]


def accept(mount: HealfsMount, *options: str) -> subprocess.CompletedProcess[str]:
    return mount.run("accept", str(mount.mountpoint), *options, check=False)


def test_a_smaller_disk_waits_for_the_right_one(away: Away) -> None:
    away.come_back_as(away.exchange.image("small", SIZE // 2), "the disk", says=f"{SIZE // 2}")
    shown = away.mount.run("status", str(away.mount.mountpoint)).stdout
    assert "mismatch for" in shown and f"{SIZE // 2} bytes" in shown and "healfs accept" in shown
    away.exchange.server.kill()
    away.mount.wait_state("stalled")
    away.exchange.serve(away.image)
    away.done()
    assert blocks(away.image) == (ANSWERED, WAITING)


def test_another_disk_gets_the_log(away: Away) -> None:
    other = away.exchange.image("other")
    away.come_back_as(other, "another", says="'another', was 'the disk'")
    said = accept(away.mount, "--replay")
    assert said.returncode == 0 and "written to it" in said.stdout, said
    away.done()
    assert blocks(other) == (ANSWERED, WAITING)
    # It is the disk now: when it goes and comes, nobody is asked again.
    away.exchange.server.kill()
    away.mount.wait_state("stalled")
    away.exchange.serve(other, "another")
    away.mount.wait_state("ready")


def test_another_disk_without_the_log(away: Away) -> None:
    other = away.exchange.image("other")
    away.come_back_as(other, "another", says="description")
    for verb in "umount", "reconnect":
        said = away.mount.run(verb, str(away.mount.mountpoint), check=False)
        (line,) = said.stderr.splitlines()
        assert said.returncode == 1 and line.count(str(away.mount.mountpoint)) == 1, line
        assert "another disk came back (its description" in line and "healfs accept" in line
    said = accept(away.mount, "--drop")
    assert said.returncode == 0 and "thrown away" in said.stdout, said
    away.done()
    assert blocks(other) == (bytes(4096), WAITING)
    events = away.mount.run("events", str(away.mount.mountpoint), "--json").stdout.splitlines()
    (told,) = [e for e in map(json.loads, events) if e["event"] == "HEALFS_ACCEPTED"]
    assert told["data"]["uid"] == os.geteuid() and told["data"]["pid"] > 1
    assert told["data"]["log"] == "dropped" and told["data"]["unflushed"] >= 1


def test_consent_is_for_the_disk_that_was_there(away: Away) -> None:
    away.come_back_as(away.exchange.image("small", SIZE // 2), "the disk", says=f"{SIZE // 2}")
    with control(away.mount) as control_:
        control_.execute("healfs-accept", replay=True)  # a smaller disk: it cannot be
        away.exchange.server.kill()
        control_.state("stalled")
        away.exchange.serve(away.exchange.image("third"), "a third")
        found = control_.until(lambda status: status["state"] in ("mismatch", "ready"))
    assert found["state"] == "mismatch"


def test_what_cannot_be_accepted(away: Away) -> None:
    for options in ((), ("--replay", "--drop")):
        said = accept(away.mount, *options)
        assert said.returncode == 2 and "exactly one" in said.stderr, said
    said = accept(away.mount, "--drop")
    assert said.returncode == 1 and "is stalled, not in mismatch" in said.stderr, said
    assert said.stderr.count("\n") == 1
    away.exchange.serve(away.image)
    away.done()
    assert blocks(away.image) == (ANSWERED, WAITING)


def test_a_disk_that_grew_is_the_same(away: Away) -> None:
    os.truncate(away.image, 2 * SIZE)
    away.exchange.serve(away.image)
    away.done()
    assert blocks(away.image) == (ANSWERED, WAITING)
    assert away.agent.ok("lseek", 0, os.SEEK_END) == SIZE
    assert away.mount.status()["size"] == SIZE


def test_the_connection_that_hangs_is_given_up(
    exchange: Exchange, healfs_mount: Mounter, agent: Opener
) -> None:
    exchange.serve(exchange.image("disk.raw"))
    mount = healfs_mount(exchange.server.uri(), "--settle", "1h", "--slow-after", "1h")
    disk = agent(mount.file)
    disk.ok("pwrite", SECOND, WAITING)
    exchange.server.pause()
    disk.ask("pwrite", 0, ANSWERED)
    mount.wait_until(lambda status: status["requests"]["in_flight"] == 1)
    said = mount.run("reconnect", str(mount.mountpoint))
    assert "given up" in said.stdout and "1 unsettled" in said.stdout, said
    shown = " ".join(mount.run("events", str(mount.mountpoint)).stdout.split())
    assert f"a new connection was asked for by uid {os.geteuid()} (pid " in shown
    exchange.server.resume()
    # The same bytes go again at once; newer ones wait for the settle time.
    assert disk.answer().value == len(ANSWERED)
    disk.ask("pwrite", 0, WAITING)
    mount.wait_until(lambda status: status["requests"]["parked"] == 1)
    assert mount.status()["requests"]["unsettled"] == 1


def test_the_first_disk_is_too_small(exchange: Exchange, healfs_mount: Mounter) -> None:
    uri = exchange.server.uri()
    mount = healfs_mount(
        uri, "--no-wait", "--size", str(SIZE), "--retry-interval", "100ms", "--settle", "0"
    )
    mount.wait_state("connecting")
    exchange.serve(exchange.image("small", SIZE // 2))
    assert f"{SIZE // 2} bytes" in mount.wait_state("mismatch")["reason"]
    exchange.server.kill()
    mount.wait_state("connecting")
    exchange.serve(exchange.image("disk.raw"))
    mount.wait_state("ready")


def test_a_pause_in_a_mismatch_ends_in_it(away: Away) -> None:
    other = away.exchange.image("other")
    away.come_back_as(other, "another", says="description")
    with control(away.mount) as control_:
        control_.execute("stop")
        control_.state("paused")
        said = accept(away.mount, "--drop")
        assert said.returncode == 1 and "is paused, not in mismatch" in said.stderr, said
        control_.execute("cont")
        control_.state("mismatch")
    assert blocks(other) == (bytes(4096), bytes(4096))


# --- fences -------------------------------------------------------------------------------------


def test_a_fence_decides(
    exchange: Exchange, healfs_mount: Mounter, agent: Opener, tmp_path: Path
) -> None:
    """It is run with the source and the identity, again until it succeeds."""
    told, may = tmp_path / "told", tmp_path / "may"
    fence = f"env >{told}; test -e {may} || {{ echo not yet >&2; exit 3; }}"
    exchange.serve(exchange.image("disk.raw"))
    options = ("--fence", fence, "--retry-interval", "100ms", "--slow-after", "1h")
    mount = healfs_mount(exchange.server.uri(), *options)
    disk = agent(mount.file)
    exchange.server.pause()
    disk.ask("pwrite", 0, ANSWERED)
    mount.wait_until(lambda status: status["requests"]["in_flight"] == 1)
    with control(mount) as control_:
        mount.run("reconnect", str(mount.mountpoint))
        reason = control_.event("HEALFS_FENCE_FAILED")["data"]["reason"]
        assert reason == "it ended with status 3: not yet"
        exchange.server.resume()
        assert disk.answer().value == len(ANSWERED)  # the same bytes
        disk.ask("pwrite", 0, WAITING)
        control_.parked(1)
        control_.event("HEALFS_FENCE_FAILED")
        assert not disk.answered
        may.touch()
        assert disk.answer().value == len(WAITING)
        assert control_.status()["requests"]["unsettled"] == 0
    environment = told.read_text().splitlines()
    assert f"HEALFS_SOURCE={exchange.server.uri()}" in environment
    assert "HEALFS_IDENTITY_DESCRIPTION=the disk" in environment


# --- what mount says ----------------------------------------------------------------------------


def test_a_server_that_cannot_flush(commands: Commands) -> None:
    script = (f"get_size=echo {SIZE}", "pread=head -c $3 /dev/zero", "pwrite=cat >/dev/null")
    with nbdkit("eval", *script) as server:
        done = commands.mount(server.uri())
        assert done.returncode == 0 and done.stdout == f"{commands.file}\n", done
        note, log = done.stderr.splitlines()
        assert "cannot flush" in note
        assert log.startswith("healfs: no write log: ") and "cannot flush" in log
        shown = commands.run("status", commands.mountpoint).stdout
        assert "off: the backend cannot flush" in shown
        assert commands.run("umount", commands.mountpoint).returncode == 0


def test_a_device_without_a_volatile_cache(
    write_through: str, commands: Commands, agent: Opener
) -> None:
    done = commands.mount(write_through)
    assert done.returncode == 0 and done.stdout == f"{commands.file}\n", done
    (log,) = done.stderr.splitlines()
    assert log.startswith("healfs: no write log: ") and "no volatile cache" in log
    disk = agent(commands.file)
    disk.ok("pwrite", 0, ANSWERED)
    status = json.loads(commands.run("status", commands.mountpoint, "--json").stdout)
    assert (status["write_log"]["enabled"], status["write_log"]["requests"]) == (False, 0)
    disk.ok("fsync")
    disk.ended()
    assert commands.run("umount", commands.mountpoint).returncode == 0


def test_the_log_is_as_large_as_the_operator_says(image: Path, healfs_mount: Mounter) -> None:
    mount = healfs_mount(image, "--log-size", "3000000", "--log-entries", "2000")
    log = mount.status()["write_log"]
    assert (log["limit_bytes"], log["limit_requests"]) == (3002368, 2000 - 512)
    assert mount.printed == f"{mount.file}\n"


# --- files --------------------------------------------------------------------------------------


@pytest.fixture
def on_file(image: Path, healfs_mount: Mounter, agent: Opener) -> tuple[HealfsMount, Agent]:
    mount = healfs_mount(image, "--retry-interval", "100ms")
    disk = agent(mount.file)
    disk.ok("pwrite", 0, ANSWERED)
    return mount, disk


def look_again(mount: HealfsMount) -> None:
    mount.run("reconnect", str(mount.mountpoint))


def test_a_file_that_shrank(image: Path, on_file: tuple[HealfsMount, Agent]) -> None:
    mount, disk = on_file
    os.truncate(image, SIZE // 2)
    look_again(mount)
    assert f"{SIZE // 2} bytes" in mount.wait_state("mismatch")["reason"]
    disk.ask("pwrite", SECOND, WAITING)
    mount.wait_until(lambda status: status["requests"]["parked"] == 1)
    assert blocks(image)[1] == bytes(4096)
    os.truncate(image, SIZE)
    assert disk.answer().value == len(WAITING)
    disk.ok("fsync")
    assert blocks(image) == (ANSWERED, WAITING)


def test_a_file_is_cut_and_nobody_says_so(image: Path, on_file: tuple[HealfsMount, Agent]) -> None:
    """A read behind the new end finds it out, and waits."""
    mount, disk = on_file
    os.truncate(image, SECOND)
    disk.ask("pread", SECOND, 4096)
    assert f"{SECOND} bytes" in mount.wait_state("mismatch")["reason"]
    assert not disk.answered
    with open(image, "r+b") as file:
        file.seek(SECOND)
        file.write(WAITING)
        file.truncate(SIZE)
    assert disk.answer().value == WAITING
    disk.ok("fsync")
    assert blocks(image) == (ANSWERED, WAITING)


def test_a_file_is_emptied_and_nobody_says_so(
    image: Path, on_file: tuple[HealfsMount, Agent]
) -> None:
    """As by `: > disk.img`: what is not there is waited for, and the log brings back its part."""
    mount, disk = on_file
    os.truncate(image, 0)
    disk.ask("pread", SECOND, 4096)
    assert "is empty" in mount.wait_until(_is_empty)["reason"]
    assert not disk.answered and image.stat().st_size == 0
    os.truncate(image, SIZE)
    assert disk.answer().value == bytes(4096)
    disk.ok("fsync")
    assert blocks(image) == (ANSWERED, bytes(4096))


def _is_empty(status: dict[str, Any]) -> bool:
    return status["state"] == "stalled" and "is empty" in status["reason"]


@pytest.mark.parametrize("option", ["--replay", "--drop"])
def test_a_file_that_was_replaced(
    image: Path, on_file: tuple[HealfsMount, Agent], option: str
) -> None:
    mount, disk = on_file
    mine = image.rename(image.with_name("mine"))
    look_again(mount)
    mount.wait_state("stalled")
    with open(image, "xb") as file:
        file.truncate(SIZE)
    assert "inode" in mount.wait_state("mismatch")["reason"]
    assert blocks(image) == (bytes(4096), bytes(4096))
    assert accept(mount, option).returncode == 0
    disk.ok("fsync")
    assert blocks(image)[0] == (ANSWERED if option == "--replay" else bytes(4096))
    assert blocks(mine)[0] == ANSWERED


def test_a_file_that_is_back_in_its_place(image: Path, on_file: tuple[HealfsMount, Agent]) -> None:
    mount, disk = on_file
    mine = image.rename(image.with_name("mine"))
    with open(image, "xb") as file:
        file.truncate(SIZE)
    look_again(mount)
    mount.wait_state("mismatch")
    other = image.rename(image.with_name("other"))
    mine.rename(image)
    mount.wait_state("ready")
    disk.ok("fsync")
    assert blocks(image)[0] == ANSWERED and blocks(other)[0] == bytes(4096)
