"""The verbs: what they refuse, in one line, and what they show of a daemon that is a toy here."""

from __future__ import annotations

import errno
import importlib
import json
import os
import signal
from pathlib import Path

import pytest

from healfs.cli import daemons, log_options, recovery
from healfs.cli import mount as mount_module
from healfs.cli import status as status_module
from healfs.cli import umount as umount_module
from healfs.cli.main import VERBS
from healfs.cli.output import CliError, os_error
from healfs.cli.policy_options import changes
from healfs.config import MAXIMUM_CONFIGURATION, MAXIMUM_UIDS, MountConfig
from healfs.control import mounts
from healfs.control.mounts import Mount
from healfs.core.policy import Action, Policy
from healfs.core.ring import PAGE
from healfs.core.writelog import WriteLog, memory_size
from healfs.daemon.children import PACKET
from healfs.fuse.wire import MAX_WRITE
from tests.unit.toy import DEADLINE, Daemon, assert_refused, run
from tests.unit.toy import daemon as daemon
from tests.unit.toy import runtime as runtime

ON_A_MOUNT = ("status", "events", "policy", "reconnect", "accept --drop", "pause", "resume", "fail")
ON_A_MOUNT += ("attach", "upgrade", "umount", "doctor")

# --- bad input ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", ["no verb", "--help"]),
        ("nope", ["No such command 'nope'"]),
        ("--nope", ["--nope"]),
        ("mount", ["SOURCE", "healfs mount --help"]),
        ("mount a M --nope", ["--nope"]),
        ("mount a M --retry-timeout 5", ["500ms, 5s"]),
        ("mount a M --retry-interval 0", ["from 1ms to 24h"]),
        ("mount a M --read-retry-interval 25h", ["from 1ms to 24h"]),
        ("mount a M --rerror enospc", ["--rerror"]),
        ("mount a M --read-then enospc", ["enospc is for writes only"]),
        ("mount a M --then retry", ["--then"]),
        ("mount a M --device ide", ["--device"]),
        ("mount a M --create 0", ["0 bytes"]),
        ("mount a M --create 1.5G", ["64K, 64M"]),
        ("mount a M --no-wait", ["--size"]),
        ("mount a M --size 1G", ["--no-wait"]),
        ("mount a M --create 1G --read-only", ["--create"]),
        ("mount a M --slow-after 0", ["100ms"]),
        ("mount a M --log-size 2105343", ["too small for one request", "2105344"]),
        ("mount a M --log-size 0", ["too small for one request"]),
        ("mount a M --log-size 17G", ["at most 16 GiB"]),
        ("mount a M --log-size 64MB", ["64K, 64M"]),
        ("mount a M --log-entries 1023", ["from 1024 to 1048576"]),
        ("mount a M --log-entries 1048577", ["from 1024 to 1048576"]),
        ("mount a M --log-entries many", ["--log-entries"]),
        ("mount a M --settle -5s", ["not a duration"]),
        ("mount a M --settle 61m", ["from 0 to 1h"]),
        ("mount a M --settle 5s --fence true", ["--settle does not go with --fence"]),
        ("mount a M --fence no-such-program", ["no-such-program: no such command"]),
        ("mount a M --fence /no/such", ["/no/such: no such command"]),
        ("mount a M --fence /etc/passwd", ["no such command"]),
        ("mount a M --fence ./fence", ["absolute path"]),
        ("mount a M --fence (true", ["--fence: ", "yntax error"]),
        ("mount a M --name a/b", ["not a file name"]),
        ("mount a M --name ..", ["not a file name"]),
        ("mount a M --name " + "ä" * 128, ["256 bytes are too long", "at most 255"]),
        ("mount a M --name \x1b[31m", ["control characters"]),
        ("mount nbd://h M --create 1G", ["--create is for files"]),
        ("mount ftp://h/x M", ["unknown scheme"]),
        ("mount a M/missing", ["no such directory", "mkdir"]),
        ("mount a /proc", ["mounted there already"]),
        ("mount a /etc", ["not empty"]),
        ("mount a /etc/passwd", ["not a directory"]),
        ("status M", ["not a healfs mount"]),
        ("status M --json", ["not a healfs mount"]),
        ("policy M", ["not a healfs mount"]),
        ("policy M --read-then enospc", ["enospc is for writes only"]),
        ("reconnect M", ["not a healfs mount"]),
        ("fail M", ["not a healfs mount"]),
        ("accept M", ["exactly one of --replay", "--drop"]),
        ("accept M --replay --drop", ["exactly one"]),
        ("accept M --drop", ["not a healfs mount"]),
        ("attach M --qemu --libvirt", ["not both"]),
        ("attach M --bus ide", ["--bus", "virtio", "scsi"]),
        ("attach M", ["not a healfs mount"]),
        ("umount M", ["not a healfs mount"]),
        ("umount M --forc", ["--force"]),
        ("status \x1b]0;evil\x07", ["not a healfs mount"]),
        ("mount a EMPTY", ["MOUNTPOINT is empty"]),
        ("mount EMPTY M", ["SOURCE is empty"]),
        ("mount EMPTY", ["SOURCE is empty"]),
        ("mount --config EMPTY", ["--config is empty"]),
        ("mount --config", ["'--config' requires", "; see healfs mount --help"]),
        ("pause M --timeout", ["'--timeout' requires", "; see healfs pause --help"]),
        ("accept M --dro", ["Did you mean '--drop'? See healfs accept --help"]),
        ("policy M --read-then enospc", ["read-then: enospc"]),
        ("policy M --rerror enospc", ["'--rerror': 'enospc'"]),
        ("demo --seconds x", ["'x' is not a valid number of seconds; see healfs demo --help"]),
        ("demo --seconds 2", ["3<=x<=600"]),
        *((f"{verb} EMPTY", ["MOUNTPOINT is empty; healfs list"]) for verb in ON_A_MOUNT),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    tmp_path: Path, arguments: str, words: list[str]
) -> None:
    (tmp_path / "m").mkdir()
    words_ = {"M": str(tmp_path / "m"), "EMPTY": ""}
    given = [words_.get(word, word) for word in arguments.split(" ") if word]
    result = run(*(word.replace("M/", f"{tmp_path}/m/") for word in given))
    assert_refused(result, *words)
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


def test_what_a_worker_is_greeted_with_has_room(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    allowed = [f"--allow-uid={uid}" for uid in range(4294960000, 4294960257)]
    fence = f"--fence=true # {'x' * 30_000}"
    for options, words in (
        (allowed, "--allow-uid: it may be given at most 256 times"),
        ([fence], "too long together"),
        ([*allowed[:256], fence[:26_000]], "too long together"),
    ):
        assert_refused(run("mount", "a", tmp_path / "m", *options), words)
    values = {"allow_uid": {"value": [4294960000] * MAXIMUM_UIDS, "from": "option"}}
    most = MountConfig(
        *("/" + "s" * 4095, "/" + "m" * 4095),
        allow_uid=(4294960000,) * MAXIMUM_UIDS,
        configuration={"file": "/" + "f" * 4095, "values": values},
    )
    assert most.greeting_bytes() < MAXIMUM_CONFIGURATION < PACKET - 4096


LOG = {"log_size": 64 << 20, "log_entries": 16384, "settle": None, "fence": None}


def test_a_mount_of_another_is_not_denied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    at = str(tmp_path / "m")
    monkeypatch.setattr(daemons, "mountinfo", lambda: iter([(at, "fuse.healfs", 51)]))
    for path in at, f"{at}/disk.img":
        said = "a healfs mount, but not in " + str(tmp_path / "run")
        assert_refused(run("status", path), said, "as its owner")
    assert_refused(run("status", tmp_path), "not a healfs mount")


@pytest.mark.parametrize(
    "fence", ["", " ", "# only a comment", "'no end", "if true", "true |", "no-such-program; true"]
)
def test_a_fence_that_cannot_work_is_refused(fence: str) -> None:
    with pytest.raises(CliError, match="--fence: "):
        log_options.checked(LOG | {"fence": fence})


def test_a_shell_that_hangs_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where a directory of PATH does, it looks for the command as long."""
    (tmp_path / "sh").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "sh").chmod(0o755)
    monkeypatch.setattr(log_options, "_SHELL", str(tmp_path / "sh"))
    monkeypatch.setattr(log_options, "_SHELL_SECONDS", 0.2)
    (tmp_path / "m").mkdir()
    result = run("mount", "a", tmp_path / "m", "--fence", "some")
    assert_refused(result, "--fence: ", "or try again", status=1)


@pytest.mark.parametrize(
    "fence",
    [
        *("true", "/bin/true x", "true; no-such", "exit 1", "if true; then :; fi", "(true)"),
        *("A=1 /bin/true", "'/bin/true' x", "$FENCE x", "~/fence", "! true", "{ true; }"),
    ],
)
def test_a_fence_is_what_the_shell_takes(fence: str) -> None:
    assert log_options.checked(LOG | {"fence": fence})["fence"] == fence


def test_the_least_log_is_one_that_the_daemon_takes() -> None:
    """And a size is rounded up to whole pages."""
    options = LOG | {"log_size": 2105344, "log_entries": 1024, "settle": 0.0}
    checked = log_options.checked(options)
    assert checked == options
    memory = bytearray(memory_size(checked["log_size"], checked["log_entries"]))
    WriteLog(memoryview(memory), checked["log_entries"], MAX_WRITE + PAGE)
    assert log_options.checked(options | {"log_size": 2105345})["log_size"] == 2105344 + PAGE


@pytest.mark.parametrize("name", ["default_request_timeout", "max_request_timeout"])
def test_a_request_timeout_of_the_kernel_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    for sysctl in ("default_request_timeout", "max_request_timeout"):
        (tmp_path / sysctl).write_text("60\n" if sysctl == name else "0\n")
    monkeypatch.setattr(mount_module, "_FUSE_SYSCTLS", tmp_path)
    (tmp_path / "m").mkdir()
    assert_refused(run("mount", "a", tmp_path / "m"), f"sysctl fs.fuse.{name}=0")


@pytest.mark.parametrize("option", ["-h", "--help"])
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, option: str) -> None:
    result = run(verb, option)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(f"Usage: healfs {verb} ")


@pytest.mark.parametrize("verb", VERBS)
def test_whatever_prints_a_table_prints_json_too(verb: str) -> None:
    module, _, name = VERBS[verb].partition(":")
    tables = {"table", "fields"} & vars(importlib.import_module(module)).keys()
    options = {o for p in getattr(importlib.import_module(module), name).params for o in p.opts}
    assert ("--json" in options) == bool(tables)


def test_help_and_version_and_an_empty_list() -> None:
    assert run("--version").stdout.startswith("healfs 0")
    assert "umount" in run("--help").stdout
    assert run("list").stdout == run("status").stdout == "no mounts\n"
    assert json.loads(run("list", "--json").stdout) == []
    assert json.loads(run("status", "--json").stdout) == []


# --- the policy's options -----------------------------------------------------------------------


def test_the_option_with_a_direction_wins() -> None:
    options = {"retry_timeout": 5.0, "read_retry_timeout": 0.0, "write_then": "stop"}
    assert changes(options) == (
        {"retry_timeout": 0.0},
        {"retry_timeout": 5.0, "then": Action.STOP},
    )


def test_enospc_without_a_direction_is_for_writes() -> None:
    assert changes({"then": "enospc"}) == ({}, {"then": Action.ENOSPC})
    assert changes({"then": "enospc", "read_then": "stop"})[0] == {"then": Action.STOP}


def test_a_source_is_the_same_from_any_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    absolute = mount_module._absolute_source
    assert absolute("disk") == (False, str(tmp_path / "disk"))
    assert absolute("./a://b") == (False, str(tmp_path / "a:/b"))
    assert absolute("nbd://h:1/a%20b") == (True, "nbd://h:1/a%20b")
    assert absolute("nbd+unix:///e?socket=s") == (True, f"nbd+unix:///e?socket={tmp_path}/s")
    assert absolute("nbd+unix:///?socket=/a%20b") == (True, "nbd+unix:///?socket=/a%20b")


# --- a daemon -----------------------------------------------------------------------------------

FULL = {
    "state": "stalled",
    "state_seconds": 65,
    "since": "2026-01-01T00:00:00+00:00",
    "reason": "[red]connection refused\x1b[0m",
    "file": "/mnt/disk.img",
    "source": "nbd://h/" + "x" * 200,
    "size": 1 << 30,
    "requests": {"in_flight": 0, "parked": 17, "unsettled": 1},
    "write_log": {"enabled": False, "reason": "not yet"},
    "policy": Policy().change({"retry_timeout": 60.0}).as_dict(),
    "slow_after": 5.0,
    "outages": {"count": 2, "current_seconds": 65, "longest_seconds": 70},
    "totals": {"read": {"requests": 5, "bytes": 20480, "errors": 0}, "retries": 4},
    "limits": {"in_flight": {"used": 1, "limit": 9}, "rate": {"limit": 100}},
    "notes": ["first", "second"],
}


def test_status_of_one_fits_80_columns_and_shows_texts_as_they_are(daemon: Daemon) -> None:
    daemon.status |= FULL
    daemon.start()
    result = run("status", daemon.mount.mountpoint)
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    for text in ("stalled for 1m 5s", "[red]connection refused?[0m", "parked 17", "1 GiB"):
        assert text in result.stdout
    for text in ("retry for 1m, then report", "retry for ever", "off: not yet", "second"):
        assert text in result.stdout
    assert json.loads(run("status", daemon.mount.file, "--json").stdout) == daemon.status


def test_status_lives_with_an_object_that_lacks_everything(daemon: Daemon) -> None:
    daemon.status.clear()
    daemon.start()
    assert run("status", daemon.mount.mountpoint).exit_code == 0
    assert run("status").exit_code == 0
    assert run("policy", daemon.mount.mountpoint).exit_code == 0


def test_all_mounts(daemon: Daemon) -> None:
    daemon.status |= FULL
    daemon.start()
    assert "stalled" in run("status").stdout
    assert json.loads(run("status", "--json").stdout) == [daemon.status]
    (row,) = json.loads(run("list", "--json").stdout)
    assert row["state"] == "mounted" and row["pids"]["keeper"] == daemon.process.pid
    assert "mounted" in run("list").stdout


def test_attach_lives_with_an_object_that_lacks_everything(daemon: Daemon) -> None:
    daemon.start()
    result = run("attach", daemon.mount.mountpoint, "--libvirt")
    assert (result.exit_code, result.stderr) == (0, "")
    assert run("attach", daemon.mount.mountpoint).stdout.count("virtio-blk-pci") == 1


def test_attach_refuses_a_path_that_no_line_can_hold(tmp_path: Path) -> None:
    odd = Daemon(str(tmp_path / "a\nb"))
    try:
        odd.start()
        assert_refused(run("attach", odd.mount.mountpoint), "mount it at another")
    finally:
        odd.close()


def test_a_daemon_that_hangs_is_told(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    assert status_module._TIMEOUT < 5  # what the man page promises
    monkeypatch.setattr(status_module, "_TIMEOUT", 0.2)
    assert_refused(run("status", daemon.mount.mountpoint), "does not answer", "see /log", status=1)
    (row,) = json.loads(run("status", "--json").stdout)
    assert row["state"] == "no answer"


def test_a_dead_daemon_is_told_and_umount_clears_it(daemon: Daemon) -> None:
    daemon.stop()
    assert_refused(run("status", daemon.mount.mountpoint), "gone", "healfs umount", status=1)
    assert json.loads(run("list", "--json").stdout)[0]["state"] == "dead"
    assert json.loads(run("status", "--json").stdout)[0]["state"] == "dead"
    os.close(daemon.claim.fd)  # a dead process holds no lock
    daemon.claim.fd = -1
    result = run("umount", daemon.mount.mountpoint)
    assert result.exit_code == 0 and "gone already" in result.stderr
    assert not daemon.claim.directory.exists()
    assert run("list").stdout == "no mounts\n"


@pytest.mark.parametrize("options", [(), ("--force",)])
def test_umount_behind_anothers_orderly_end_tells_of_no_loss(
    daemon: Daemon, options: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    at = daemon.mount.mountpoint

    def end(mount: Mount) -> bool:
        """Between the look at the record and the one at the socket, say."""
        daemon.close()
        return False

    monkeypatch.setattr(Mount, "is_dead", end)
    assert_refused(run("umount", at, *options), "somebody else has unmounted it", status=1)
    assert_refused(run("umount", at, *options), "not a healfs mount")


def test_what_a_daemon_left_that_ends_just_now_is_not_cleared(daemon: Daemon) -> None:
    daemon.stop()  # it has its lock still
    at = daemon.mount.mountpoint
    assert_refused(run("umount", at), "starts or ends there just now; try again", status=1)
    daemon.claim.release()
    with pytest.raises(CliError, match="somebody else"):
        umount_module._clear(daemon.mount)


def test_each_error_says_what_to_do_next(daemon: Daemon, tmp_path: Path, runtime: Path) -> None:
    """What is wrong; what to do."""
    at = daemon.mount.mountpoint
    (tmp_path / "file").touch()
    (tmp_path / "m").mkdir()
    daemon.status |= {"state": "mismatch", "reason": "it has 5 bytes"}
    for arguments, wrong, next_step in (
        (("mount", "a", "/proc"), "something is mounted there already", "take another directory"),
        (("mount", "a", tmp_path / "file"), "not a directory", "is an empty directory"),
        (("mount", "a", tmp_path / "none"), "no such directory", "mkdir -p"),
        (("mount", "a", "/etc"), "not empty", "take an empty directory"),
        (("mount", "--config", "/none.toml"), "/none.toml: No such file", "correct the path"),
        (("mount", "--config", tmp_path), "Is a directory", "give a file"),
        (("mount", "x://y", tmp_path / "m"), "unknown scheme", "there are a path, nbd://"),
        (("status", tmp_path), "not a healfs mount", "healfs list shows"),
    ):
        result = run(*arguments)
        assert_refused(result, wrong, next_step)
        assert result.stderr.index(wrong) < result.stderr.index(next_step)
    daemon.stop()
    for verb in ON_A_MOUNT:
        if verb.split()[0] not in ("events", "umount", "doctor"):  # which need no daemon
            result = run(*verb.split(), at)
            assert_refused(result, "gone", f"see /log; healfs umount {at} clears", status=1)
    for verb in "status", "list":
        result = run(verb)
        assert "dead" in result.stdout
        assert result.stderr == (
            f"healfs: {at}: the daemon is gone; see /log; healfs umount {at} clears what it left\n"
        )


def test_a_daemon_that_does_not_answer_is_told_with_a_next_step(
    daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status_module, "_TIMEOUT", 0.1)
    result = run("status")
    assert "no answer" in result.stdout
    assert "does not answer; try again (a worker that hangs is replaced), or see" in result.stderr


def test_upgrade_without_a_keeper_says_that_only_a_keeper_can(daemon: Daemon) -> None:
    result = run("upgrade", daemon.mount.mountpoint)  # somebody listens: the worker lives
    assert_refused(result, "the keeper is gone", "then mount again", status=1)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.ENOENT, errno.EROFS])
def test_what_the_system_refuses_has_a_next_step(number: int) -> None:
    text = os_error(OSError(number, os.strerror(number), "/path"))
    assert text.startswith(f"/path: {os.strerror(number)}; ")


def test_policy_shows_and_changes(daemon: Daemon) -> None:
    daemon.status["policy"] = daemon.policy.as_dict()
    daemon.start()
    assert "for ever" in run("policy", daemon.mount.mountpoint).stdout
    result = run("policy", daemon.mount.mountpoint, "--retry-timeout", "2m", "--then", "enospc")
    assert result.exit_code == 0 and "enospc" in result.stdout and "2m" in result.stdout
    assert daemon.policy.write.then is Action.ENOSPC
    assert daemon.policy.read.then is Action.REPORT
    assert daemon.policy.read.retry_timeout == daemon.policy.write.retry_timeout == 120


def test_policy_promises_no_default() -> None:
    """As if what is not given went back to it."""
    assert "[retry]" not in run("policy", "--help").output
    assert "[retry]" in run("mount", "--help").output


def test_a_directory_that_is_gone_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert_refused(run("status", "m"), "the current directory is gone", status=1)


def test_policy_as_json(daemon: Daemon) -> None:
    daemon.status["policy"] = daemon.policy.as_dict()
    daemon.start()
    shown = json.loads(run("policy", daemon.mount.mountpoint, "--json").stdout)
    assert shown == daemon.policy.as_dict()
    changed = run("policy", daemon.mount.mountpoint, "--werror", "stop", "--json").stdout
    assert json.loads(changed) == daemon.policy.as_dict() != shown


def test_reconnect_says_what_it_left(daemon: Daemon) -> None:
    daemon.status |= {"state": "stalled", "requests": {"unsettled": 3}}
    daemon.start()
    result = run("reconnect", daemon.mount.mountpoint)
    mountpoint = daemon.mount.mountpoint
    assert result.exit_code == 0
    assert result.stdout == f"{mountpoint}: the connection was given up; stalled, 3 unsettled\n"


def test_fail_says_how_many(daemon: Daemon) -> None:
    daemon.start()
    result = run("fail", daemon.mount.mountpoint)
    assert result.exit_code == 0
    assert result.stdout == f"{daemon.mount.mountpoint}: requests answered with an error: 3\n"


def test_accept_says_what_became_of_it(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "_ACCEPT_SECONDS", 0.2)
    daemon.status |= {"state": "mismatch", "reason": "it has 5 bytes"}
    daemon.start()
    mountpoint = daemon.mount.mountpoint
    assert_refused(run("accept", mountpoint, "--drop"), "not accepted: it has 5 bytes", status=1)
    assert daemon.accepted is False
    result = run("accept", mountpoint, "--replay")
    assert result.exit_code == 0 and daemon.accepted is True
    assert "the write log is written to it; replaying" in result.stdout
    daemon.refusal = "nothing to accept"
    assert_refused(run("accept", mountpoint, "--replay"), "nothing to accept", status=1)


def test_a_mismatch_is_shown_with_what_to_do(daemon: Daemon) -> None:
    daemon.status |= {"state": "mismatch", "reason": "it has 5 bytes"}
    daemon.start()
    shown = run("status", daemon.mount.mountpoint).stdout
    assert "it has 5 bytes" in shown and "healfs accept" in shown


def test_a_ready_disk_on_which_requests_fail_says_so(daemon: Daemon) -> None:
    retrying = {"requests": 2, "seconds": 65.0, "reason": "No space left on device"}
    daemon.status |= {"retrying": retrying}
    daemon.start()
    text = " ".join(run("status", daemon.mount.mountpoint).stdout.split())
    said = "2 requests fail, for 1m 5s now, and are tried again: No space left on device"
    assert f"retrying {said}" in text


def test_umount_waits_for_the_process(daemon: Daemon) -> None:
    daemon.start()
    result = run("umount", daemon.mount.mountpoint)
    assert (result.exit_code, result.output) == (0, "")
    assert daemon.process.poll() == -signal.SIGKILL


def test_umount_that_is_refused_says_why_and_force_says_what_it_gave_up(daemon: Daemon) -> None:
    daemon.refusal = "3 writes wait; use --force"
    daemon.start()
    result = run("umount", daemon.mount.mountpoint)
    assert_refused(result, "3 writes wait", daemon.mount.mountpoint, status=1)
    assert daemon.process.poll() is None
    result = run("umount", "--force", daemon.mount.mountpoint)
    assert result.exit_code == 0 and "3 write (4 KiB)" in result.stderr


def test_force_ends_a_daemon_that_hangs(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(umount_module, "_FORCE_SECONDS", 0.2)
    result = run("umount", "--force", daemon.mount.mountpoint)
    assert result.exit_code == 0 and "was killed" in result.stderr
    assert daemon.process.wait(DEADLINE) == -signal.SIGKILL


# --- where mounts are ---------------------------------------------------------------------------


def test_a_mount_is_found_by_any_name_of_it(
    daemon: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "mnt")
    (tmp_path / "up").symlink_to(tmp_path)
    monkeypatch.chdir(tmp_path)
    for name in ("mnt", "mnt/", "./mnt/disk.img", "link", "link/disk.img", "up/mnt/disk.img"):
        assert mounts.find(name) == daemon.mount
    with pytest.raises(mounts.MountsError, match="not a healfs mount"):
        mounts.find("mnt/other.img")


def test_a_mountpoint_is_claimed_once(daemon: Daemon) -> None:
    with pytest.raises(mounts.MountsError, match="serves it already"):
        mounts.claim(daemon.mount.mountpoint)
    daemon.claim.release()
    again = mounts.claim(daemon.mount.mountpoint)
    again.release()


def test_the_control_socket_is_the_owners(daemon: Daemon) -> None:
    assert os.stat(daemon.mount.control).st_mode & 0o777 == 0o600
    assert daemon.claim.directory.stat().st_mode & 0o777 == 0o700


def test_a_runtime_directory_that_others_may_write_to_is_refused(runtime: Path) -> None:
    runtime.mkdir()
    runtime.chmod(0o777)
    with pytest.raises(mounts.MountsError, match="others may write"):
        mounts.claim("/mnt")


def test_a_record_that_is_broken_is_not_listed(daemon: Daemon) -> None:
    for text in ("", "[]", "{}", '{"mountpoint": 1}', "\xff"):
        (daemon.claim.directory / "mount.json").write_text(text)
        assert mounts.list_mounts() == []


def test_logs_of_like_mountpoints_differ() -> None:
    assert mounts.log_path("/a/b") != mounts.log_path("/a-b")
    assert len(mounts.log_path("/" + "x" * 4000).name) < 255
