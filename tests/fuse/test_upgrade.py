"""Another version of healfs takes over a mount that is in use, or the old one goes on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.backends.nbd_servers import NbdServer, nbdkit, wait_until
from tests.conftest import Mounter
from tests.fuse.conftest import Opener
from tests.fuse.test_verify import _fio
from tests.mounts import HEALFS, ROOT, HealfsMount

MEGABYTES, SOAK_MEGABYTES = 1024, 6144
BLOCK = b"x" * 4096
# Of several, nbdkit 1.32 dies by an assertion when a client goes amid a reply, which a failure of
# these tests would hide behind.
ONE_THREAD = ("--threads=1",)
SECONDS = 240  # for `healfs upgrade`, whose own limits are ten seconds each


class Version:
    """A copy of healfs as another installation has it: found by PYTHONPATH before the real one."""

    def __init__(self, directory: Path, number: str = "9.9") -> None:
        self.directory = directory
        self.number = number
        # Plain Python, so that what a test writes into it is what runs; *.pyc.* goes in a moment.
        compiled = shutil.ignore_patterns("*.so", "*.c", "*.pyc.*")
        shutil.copytree(ROOT / "healfs", directory / "healfs", ignore=compiled)
        self.write("__init__.py", f'__version__ = "{number}"\n')

    def write(self, file: str, text: str) -> None:
        """Whole or not at all: a worker may be starting."""
        new = self.directory / "new"
        new.write_text(text)
        new.replace(self.directory / "healfs" / file)

    def change(self, file: str, old: str, new: str) -> None:
        text = (self.directory / "healfs" / file).read_text()
        assert text.count(old) == 1, f"{file} has changed: {old}"
        self.write(file, text.replace(old, new))

    def start_upgrade(self, mount: HealfsMount) -> subprocess.Popen[str]:
        environment = {
            "HEALFS_RUNTIME_DIR": str(mount.runtime),
            "PYTHONPATH": str(self.directory),
        }
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", HEALFS, "upgrade", str(mount.mountpoint)],
            env=os.environ | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def upgrade(self, mount: HealfsMount) -> None:
        """It takes over."""
        upgrading = self.start_upgrade(mount)
        said, wrong = upgrading.communicate(timeout=SECONDS)
        assert upgrading.returncode == 0, wrong
        assert f"{self.number} took over from " in said and not wrong


@pytest.fixture
def version(tmp_path: Path) -> Version:
    return Version(tmp_path / "version")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    path = tmp_path / "large.img"
    with open(path, "xb") as file:
        file.truncate(MEGABYTES << 20)
    return path


def _log(mount: HealfsMount) -> str:
    return Path(mount.status()["log"]).read_text()


def _done(mount: HealfsMount) -> int:
    totals = mount.status()["totals"]
    return int(totals["write"]["requests"] + totals["read"]["requests"])


def _verify_through_upgrades(
    mount: HealfsMount, versions: list[Version], megabytes: int = MEGABYTES
) -> None:
    load = _fio(mount.file, megabytes)
    try:
        for version in versions:
            wait_until(lambda: _done(mount) > 100 or load.poll() is not None, "I/O", 240)
            assert load.poll() is None, "the load was over before the upgrade"
            version.upgrade(mount)
            status = mount.status()
            assert status["version"] == version.number
            assert status["worker_restarts"] == 0  # nothing has died
        said, _ = load.communicate(timeout=800)
        assert load.returncode == 0, said
    finally:
        load.kill()
        load.communicate()
    # The old one had sent nothing that was not answered: nothing is unsettled.
    lines = [line for line in _log(mount).splitlines() if "made room" in line]
    assert len(lines) == len(versions)
    assert all(line.endswith("in flight: 0") for line in lines), lines


@pytest.mark.parametrize("kind", ["file", "nbd"])
def test_fio_verifies_through_upgrades(
    tmp_path: Path, large: Path, healfs_mount: Mounter, kind: str
) -> None:
    versions = [Version(tmp_path / number, number) for number in ("9.1", "9.2")]
    if kind == "file":
        _verify_through_upgrades(healfs_mount(large), versions)
    else:
        with nbdkit(*ONE_THREAD, "file", str(large)) as server:
            _verify_through_upgrades(healfs_mount(server.uri()), versions)


def test_an_upgrade_in_an_outage(
    server: NbdServer, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    mount = healfs_mount(server.uri())
    writers = [agent(mount.file) for _ in range(4)]
    server.kill()
    for number, writer in enumerate(writers):
        writer.ask("pwrite", number * 4096, bytes([number + 1]) * 4096)
    mount.wait_until(lambda status: status["requests"]["parked"] == 4)
    version.upgrade(mount)
    status = mount.wait_until(lambda status: status["requests"]["parked"] == 4)
    assert status["version"] == version.number and status["outages"]["count"] == 1
    server.start()
    assert [writer.answer().errno for writer in writers] == [0] * 4
    read = agent(mount.file).ok("pread", 0, 4 * 4096)
    assert read == b"".join(bytes([number + 1]) * 4096 for number in range(4))


def test_what_hangs_in_the_server_is_not_waited_for_long(
    server: NbdServer, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    """What the old version had sent is unsettled for the new one, as after a death."""
    mount = healfs_mount(server.uri(), "--settle", "1h", "--slow-after", "1h")
    writer = agent(mount.file)
    server.pause()
    writer.ask("pwrite", 0, BLOCK)
    mount.wait_until(lambda status: status["requests"]["in_flight"] == 1)
    version.upgrade(mount)
    assert "made room for another version, requests in flight: 1" in _log(mount)
    server.resume()
    assert not writer.answer().errno  # the same bytes may be sent again
    status = mount.status()
    assert (status["version"], status["requests"]["unsettled"]) == (version.number, 1)


def test_the_version_that_took_over_is_started_again_when_it_dies(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    mount = healfs_mount(image)
    version.upgrade(mount)
    old = mount.status()["pids"]["worker"]
    writer = agent(mount.file)
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    os.kill(old, 9)
    assert writer.ok("pread", 0, 4096) == BLOCK
    status = mount.status()
    assert status["version"] == version.number and status["pids"]["worker"] != old
    assert mount.run("list", "--json").stdout.count(f'"version": "{version.number}"') == 1


def test_the_old_worker_dies_while_the_new_one_is_looked_at(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    """Another old one is started at once, and makes room in its turn."""
    mount = healfs_mount(image)
    old = mount.status()["pids"]["worker"]
    writer = agent(mount.file)
    looks = "    reason = await _unfit("
    version.change("daemon/takeover.py", looks, "    await trio.sleep(3)\n" + looks)
    upgrading = version.start_upgrade(mount)
    wait_until(lambda: len(mount.processes()) == 4, "the candidate")
    os.kill(old, 9)
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    _, wrong = upgrading.communicate(timeout=SECONDS)
    assert upgrading.returncode == 0, wrong
    status = mount.status()
    assert (status["version"], status["worker_restarts"]) == (version.number, 1)
    assert writer.ok("pread", 0, 4096) == BLOCK


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["file", "nbd"])
def test_fio_verifies_through_ten_upgrades(
    tmp_path: Path, large: Path, healfs_mount: Mounter, kind: str
) -> None:
    versions = [Version(tmp_path / number, number) for number in ("9.1", "9.2")] * 5
    with open(large, "r+b") as file:
        file.truncate(SOAK_MEGABYTES << 20)
    if kind == "file":
        _verify_through_upgrades(healfs_mount(large), versions, SOAK_MEGABYTES)
    else:
        with nbdkit(*ONE_THREAD, "file", str(large)) as server:
            _verify_through_upgrades(healfs_mount(server.uri()), versions, SOAK_MEGABYTES)


# --- versions that do not fit, or do not come up ------------------------------------------------

WORKER = "daemon/worker.py"


def _exits(version: Version) -> None:
    version.write(WORKER, "raise SystemExit(7)\n")


def _lacks_a_library(version: Version) -> None:
    version.change(WORKER, "import pyfuse3\n", "import pyfuse3_that_is_not_there\n")


def _talks_nonsense(version: Version) -> None:
    tell = 'parent.tell({"do": "fit", "version": healfs.__version__})'
    said = [b"\xff", b"[1]", b"7", b'{"do": 1}', b"{", b'{"fit": 1}']
    said.append(b'{"do": "unfit"}')
    sends = "; ".join(f"parent._socket.send({words!r})" for words in said)
    version.change("daemon/takeover.py", tell, sends)


def _has_other_features(version: Version) -> None:
    version.change("fuse/wire.py", "flags2 | HAS_RESEND_FLAGS2)", "flags2 | HAS_RESEND_FLAGS2 | 1)")


def _has_another_layout(version: Version) -> None:
    version.change("core/writelog.py", 'b"healfs write log 1\\n"', 'b"healfs write log 2\\n"')


def _has_larger_records(version: Version) -> None:
    version.change("core/writelog.py", "HEADER = 16384", "HEADER = 32768")


def _speaks_another_protocol(version: Version) -> None:
    version.change("daemon/children.py", "PROTOCOL = 2", "PROTOCOL = 3")


def _knows_no_such_option(version: Version) -> None:
    version.change("config.py", "    log_size: int = 64 << 20\n", "")


REFUSED = {
    _exits: "it ended with status 7",
    _lacks_a_library: "it ended with status 1",
    _talks_nonsense: "not upgraded: None; version",
    _has_other_features: "its FUSE features differ from the mount's (flags 0x100000000)",
    _has_another_layout: "the write log is of layout",
    _has_larger_records: "bytes of memory for the write log",
    _speaks_another_protocol: "the keeper speaks protocol 2, not 3",
    _knows_no_such_option: "not a mount's configuration",
}


def test_versions_that_do_not_fit_change_nothing(
    image: Path, healfs_mount: Mounter, agent: Opener, tmp_path: Path
) -> None:
    mount = healfs_mount(image)
    writer = agent(mount.file)
    before = mount.status()
    for make, words in REFUSED.items():
        version = Version(tmp_path / make.__name__)
        make(version)
        upgrading = version.start_upgrade(mount)
        said, wrong = upgrading.communicate(timeout=SECONDS)
        assert (upgrading.returncode, said) == (1, ""), make
        (line,) = wrong.splitlines()
        assert line.startswith(f"healfs: {mount.mountpoint}: not upgraded: "), line
        assert words in line and f"version {before['version']} goes on" in line
        assert writer.ok("pwrite", 0, BLOCK) == 4096
    after = mount.status()
    assert after["pids"] == before["pids"] and after["outages"] == before["outages"]
    wait_until(lambda: len(mount.processes()) == 2, "the end of the candidates")


def test_the_package_must_be_that_of_the_command(
    image: Path, healfs_mount: Mounter, version: Version
) -> None:
    """An interpreter that finds another healfs than the one that asks would surprise."""
    mount = healfs_mount(image)
    version.change("cli/upgrade.py", '"path": path', '"path": None')
    _, wrong = version.start_upgrade(mount).communicate(timeout=SECONDS)
    assert f"finds healfs in {ROOT / 'healfs'}, not in {version.directory / 'healfs'}" in wrong
    version.change("cli/upgrade.py", "sys.executable,", '"/nowhere/python",')
    _, wrong = version.start_upgrade(mount).communicate(timeout=SECONDS)
    assert wrong == (
        f"healfs: {mount.mountpoint}: not upgraded: /nowhere/python: No such file or directory\n"
    )


def test_a_version_that_dies_in_the_takeover_is_given_up(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    mount = healfs_mount(image)
    before = mount.status()
    writer = agent(mount.file)
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    version.change(WORKER, "        self.engine.take_over(", "        os._exit(8)\n        (")
    upgrading = version.start_upgrade(mount)
    _, wrong = upgrading.communicate(timeout=SECONDS)
    assert upgrading.returncode == 1 and "ended with status 8 in the take-over" in wrong
    assert writer.ok("pread", 0, 4096) == BLOCK
    after = mount.status()
    assert after["version"] == before["version"]
    assert after["pids"]["worker"] != before["pids"]["worker"]
    assert after["outages"]["count"] == 1


def test_a_version_that_dies_when_it_has_just_taken_over_is_given_up(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    """It would each time; and nothing tells `healfs upgrade` of success before."""
    mount = healfs_mount(image)
    before = mount.status()
    writer = agent(mount.file)
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    says = '            log.info("version %s took over"'
    version.change(WORKER, says, '            raise RuntimeError("planted")\n' + says)
    said, wrong = version.start_upgrade(mount).communicate(timeout=SECONDS)
    assert not said and "ended by an internal error right after the take-over" in wrong
    assert f"version {before['version']} goes on" in wrong
    assert writer.ok("pread", 0, 4096) == BLOCK
    after = mount.status()
    assert after["version"] == before["version"]
    assert after["worker_restarts"] == 0
    assert "HEALFS_UPGRADE_FAILED" in mount.run("events", str(mount.mountpoint), "--json").stdout


def test_a_candidate_that_dies_when_the_old_one_makes_room(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    mount = healfs_mount(image)
    before = mount.status()
    writer = agent(mount.file)
    waits = "    return await parent.wait_for_go()"
    version.change("daemon/takeover.py", waits, "    os._exit(8)\n" + waits)
    _, wrong = version.start_upgrade(mount).communicate(timeout=SECONDS)
    assert "it ended with status 8; version" in wrong
    assert writer.ok("pwrite", 0, BLOCK) == 4096
    after = mount.status()
    assert (after["version"], after["worker_restarts"]) == (before["version"], 0)


def test_an_old_worker_that_hangs_is_killed(
    tmp_path: Path, image: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """What is told of a new one that dies then is its own end."""
    mount = healfs_mount(image)
    writer = agent(mount.file)
    dies, fits = Version(tmp_path / "dies"), Version(tmp_path / "fits")
    dies.change(WORKER, "        self.engine.take_over(", "        os._exit(8)\n        (")
    os.kill(mount.status()["pids"]["worker"], signal.SIGSTOP)
    writer.ask("pwrite", 0, BLOCK)
    _, wrong = dies.start_upgrade(mount).communicate(timeout=SECONDS)
    assert "it ended with status 8 in the take-over" in wrong
    assert writer.answer().value == 4096  # by the old version
    os.kill(mount.status()["pids"]["worker"], signal.SIGSTOP)
    fits.upgrade(mount)
    assert mount.status()["version"] == fits.number
    assert writer.ok("pread", 0, 4096) == BLOCK


def test_the_keeper_dies_while_a_candidate_is_looked_at(
    image: Path, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    """No candidate stays behind, and none takes over beside the old one."""
    mount = healfs_mount(image)
    before = mount.status()
    writer = agent(mount.file)
    looks = "    reason = await _unfit("
    version.change("daemon/takeover.py", looks, "    await trio.sleep(3)\n" + looks)
    upgrading = version.start_upgrade(mount)
    wait_until(lambda: len(mount.processes()) == 4, "the candidate")
    os.kill(before["pids"]["keeper"], signal.SIGKILL)
    assert upgrading.communicate(timeout=SECONDS)[1].count("\n") == 1
    assert upgrading.returncode == 1
    wait_until(lambda: mount.processes() == [before["pids"]["worker"]], "the candidate's end")
    assert writer.ok("pwrite", 0, BLOCK) == 4096


def test_the_keeper_dies_while_the_old_one_makes_room(
    tmp_path: Path, server: NbdServer, healfs_mount: Mounter, agent: Opener, version: Version
) -> None:
    """Nobody would start the new one: the old one goes on."""
    mount = healfs_mount(server.uri(), "--slow-after", "1h")
    patient = Version(tmp_path / "patient")
    patient.change("daemon/takeover.py", "DRAIN_SECONDS = 2.0", "DRAIN_SECONDS = 4.0")
    patient.upgrade(mount)
    writers = agent(mount.file), agent(mount.file)
    server.pause()
    writers[0].ask("pwrite", 0, BLOCK)
    pids = mount.wait_until(lambda status: status["requests"]["in_flight"] == 1)["pids"]
    upgrading = version.start_upgrade(mount)
    mount.wait_until(lambda status: status["limits"]["in_flight"]["limit"] == 0)
    os.kill(pids["keeper"], signal.SIGKILL)
    writers[1].ask("pwrite", 4096, BLOCK)
    assert upgrading.communicate(timeout=SECONDS)[1].count("\n") == 1
    mount.wait_until(lambda status: status["limits"]["in_flight"]["limit"] > 0)
    server.resume()
    assert [writer.answer().value for writer in writers] == [4096, 4096]
    assert mount.processes() == [pids["worker"]]
    assert mount.status()["version"] == patient.number


def test_versions_that_hang_are_given_up(
    tmp_path: Path, healfs_mount: Mounter, agent: Opener
) -> None:
    """One before it has reported, and one in the take-over. Both wait ten seconds: side by side."""
    hang = "import time\ntime.sleep(600)\n"
    early, late = Version(tmp_path / "early"), Version(tmp_path / "late")
    early.write(WORKER, hang)
    late.change(WORKER, "        self.engine.take_over(", "        time.sleep(600)\n        (")
    mounts = []
    for name in ("one.img", "two.img"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
        mounts.append(healfs_mount(tmp_path / name))
    writers = [agent(mount.file) for mount in mounts]
    before = [mount.status() for mount in mounts]
    upgrading = [v.start_upgrade(m) for v, m in zip((early, late), mounts, strict=True)]
    wait_until(lambda: "made room" in Path(before[1]["log"]).read_text(), "the take-over")
    writers[1].ask("pwrite", 0, BLOCK)
    # Nobody is disturbed by a version that does not report, nor is a second one begun.
    assert writers[0].ok("pwrite", 0, BLOCK) == 4096
    _, wrong = early.start_upgrade(mounts[0]).communicate(timeout=SECONDS)
    assert "an upgrade is under way already" in wrong
    said = [one.communicate(timeout=SECONDS)[1] for one in upgrading]
    assert "it did not report within 10 s" in said[0]
    assert "it did not take over within 10 s" in said[1]
    assert writers[1].answer().value == 4096  # by the old version
    after = [mount.status() for mount in mounts]
    assert [one["version"] for one in after] == [one["version"] for one in before]
    assert after[0]["pids"] == before[0]["pids"]
    assert after[1]["worker_restarts"] == 0


def test_an_unmount_while_a_candidate_is_looked_at(
    image: Path, healfs_mount: Mounter, version: Version
) -> None:
    mount = healfs_mount(image)
    version.write(WORKER, "import time\ntime.sleep(600)\n")
    upgrading = version.start_upgrade(mount)
    wait_until(lambda: len(mount.processes()) == 4, "the candidate")
    mount.umount()
    _, wrong = upgrading.communicate(timeout=SECONDS)
    assert "the mount was ended" in wrong
    wait_until(lambda: not mount.processes(), "the end of all")


def test_the_keeper_needs_the_standard_library_only() -> None:
    code = (
        "import sys; before = set(sys.modules); import healfs.daemon.keeper;"
        "print({name.partition('.')[0] for name in set(sys.modules) - before}"
        " - sys.stdlib_module_names)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout == "{'healfs'}\n"
