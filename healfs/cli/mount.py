"""healfs mount: checks what can be checked here, starts the keeper, waits until it is ready."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from shutil import which
from types import FrameType
from typing import IO, Any, NoReturn

import click
from rich.console import Console
from rich.text import Text

from healfs.cli import config_file, exit_status
from healfs.cli.completion import Directory, Source
from healfs.cli.daemons import clear, detach
from healfs.cli.log_options import checked, log_options
from healfs.cli.output import CliError, bad_input, error_line, os_error
from healfs.cli.policy_options import DURATION, SIZE, changes, policy_options
from healfs.config import MAXIMUM_CONFIGURATION, MAXIMUM_UIDS, MountConfig, one_line, shell_word
from healfs.control import mounts
from healfs.core.policy import Policy
from healfs.fuse.mount import is_mounted

_STOP_SECONDS = 5.0  # what a keeper that was told to end may take
_FUSE_SYSCTLS = Path("/proc/sys/fs/fuse")
_AS_GIVEN = (
    *("name", "read_only", "create", "slow_after", "device"),
    *("allow_other", "allow_uid", "no_wait", "size", "foreground"),
)


class _Uid(click.IntRange):
    name = "number of a user"


@click.command(
    cls=config_file.ConfiguredCommand,
    short_help="Mount a file, block device or NBD export as a disk's file.",
)
@click.argument("source", type=Source(), required=False)
@click.argument("mountpoint", type=Directory(), required=False)
@click.option(
    "--config",
    type=click.Path(),
    metavar="FILE",
    help="Take what is not given here from FILE. [/etc/healfs/NAME.toml]",
)
@click.option("--name", default="disk.img", help="The disk's file name. [disk.img]")
@click.option("--read-only", is_flag=True, help="A disk that cannot be written.")
@click.option("--create", type=SIZE, metavar="SIZE", help="First create SOURCE, a sparse file.")
@policy_options
@click.option(
    "--slow-after",
    type=DURATION,
    default="5s",
    help="Report the disk as stalled when no answer comes for so long. [5s]",
)
@click.option(
    "--device",
    type=click.Choice(["virtio-blk", "scsi"]),
    default="virtio-blk",
    help="The guest's kind of disk: whose status or sense is shown in events. [virtio-blk]",
)
@log_options
@click.option("--foreground", is_flag=True, help="Stay, and end the mount on Ctrl-C or SIGTERM.")
@click.option("--allow-other", is_flag=True, help="Let other users in (libvirt's qemu).")
@click.option(
    "--allow-uid",
    type=_Uid(0, 2**32 - 2),
    multiple=True,
    metavar="UID",
    help="Let this user have status, policy and all other verbs, too. "
    f"Repeatable, up to {MAXIMUM_UIDS} times.",
)
@click.option("--no-wait", is_flag=True, help="Mount while the backend is away. Needs --size.")
@click.option("--size", type=SIZE, help="The disk's size, with --no-wait.")
@click.option(
    "--fault", type=click.Path(), metavar="FILE", help="Inject the faults that FILE says (drills)."
)
@click.pass_context
def mount(ctx: click.Context, /, source: str, mountpoint: str, **options: Any) -> None:
    """Mount SOURCE (a file, a block device, or an NBD URI) as a disk's file in MOUNTPOINT.

    A single argument is the NAME of a configuration file, /etc/healfs/NAME.toml.

    Prints the path of the disk's file and goes to the background. Durations: 500ms, 5s, 2m,
    1h, 0. Sizes: 512, 64M, 10G.
    """
    config = _configure(source, mountpoint, options)
    config = replace(config, configuration=_configuration(ctx, config))
    if (size := config.greeting_bytes()) > MAXIMUM_CONFIGURATION:
        bad_input(
            f"all that is given is too long together: {size} bytes of {MAXIMUM_CONFIGURATION}, as "
            "JSON; use shorter paths, and a script for --fence"
        )
    _check_host(config)
    _check_mountpoint(config.mountpoint)
    if config.foreground:
        _become_keeper(config)
    _run(config)


def _configure(source: str, mountpoint: str, options: dict[str, Any]) -> MountConfig:
    """Raises CliError, PolicyError: what was asked cannot be."""
    name = options["name"]
    if name in ("", ".", "..") or "/" in name:
        bad_input(f"--name {name!r}: not a file name; give one without a directory")
    if (length := len(os.fsencode(name))) > 255:
        bad_input(f"--name: {length} bytes are too long; a file name has at most 255")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in name):
        bad_input(f"--name {name!r}: control characters are not allowed")
    if options["no_wait"] and options["size"] is None:
        bad_input("--no-wait needs --size: nobody can be asked for it")
    if options["size"] is not None and not options["no_wait"]:
        bad_input("--size goes with --no-wait; to make a new file, use --create")
    if options["create"] is not None and (options["no_wait"] or options["read_only"]):
        bad_input("--create does not go with --no-wait or --read-only")
    if len(options["allow_uid"]) > MAXIMUM_UIDS:
        bad_input(f"--allow-uid: it may be given at most {MAXIMUM_UIDS} times")
    if not 0.1 <= options["slow_after"] <= 3600:
        bad_input("--slow-after: must be from 100ms to 1h")
    is_uri, source = _absolute_source(source)
    if is_uri and options["create"] is not None:
        bad_input("--create is for files; an NBD server makes its own exports")
    fault = options["fault"]
    read, write = changes(options)
    return MountConfig(
        source=source,
        mountpoint=mounts.canonical(mountpoint),
        policy=Policy().change(read, write),
        fault=os.path.abspath(fault) if fault is not None else None,
        **{key: options[key] for key in _AS_GIVEN},
        **checked(options),
    )


def _configuration(ctx: click.Context, config: MountConfig) -> dict[str, Any]:
    """For status: each value and where it came from (`option`, `file` or `default`)."""
    values: dict[str, dict[str, object]] = {}
    for name, parameter in ((p.name or "", p) for p in ctx.command.params):
        if hasattr(config, name) and isinstance(parameter, click.Option):
            values[name] = {"value": getattr(config, name), "from": config_file.origin(ctx, name)}
    for name, value in config.policy.as_options().items():
        both = name.partition("_")[2]
        origins = [config_file.origin(ctx, key) for key in (name, both) if key in ctx.params]
        came = next((found for found in origins if found != "default"), "default")
        values[name] = {"value": value, "from": came}
    return {"file": config_file.file_of(ctx), "values": values}


def _absolute_source(source: str) -> tuple[bool, str]:
    """Whether it is a URI, and the source as seen from any directory."""
    if not source:
        bad_input("SOURCE is empty; give a path or an NBD URI")
    scheme, colon, _ = source.partition("://")
    if not colon or "/" in scheme:
        return False, os.path.abspath(source)
    from healfs.backends import nbd_uri
    from healfs.backends.base import SourceError

    if scheme not in nbd_uri.SCHEMES:
        known = ", ".join(f"{name}://" for name in nbd_uri.SCHEMES)
        bad_input(f"{scheme}://: unknown scheme; there are a path, {known}")
    source = nbd_uri.absolute(source)
    try:
        nbd_uri.parse(source)
    except SourceError as error:
        bad_input(str(error))
    return True, source


def _check_host(config: MountConfig) -> None:
    for sysctl in ("default_request_timeout", "max_request_timeout"):
        try:
            value = (_FUSE_SYSCTLS / sysctl).read_text().strip()
        except OSError:
            continue  # an older kernel, which has no such limit
        if value != "0":
            bad_input(
                f"fs.fuse.{sysctl} is {value}: the kernel would end the mount in an outage; "
                f"run: sysctl fs.fuse.{sysctl}=0"
            )
    if not os.path.exists("/dev/fuse"):
        bad_input("/dev/fuse is missing; run: modprobe fuse")
    if os.geteuid() == 0:
        return
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        bad_input("/dev/fuse: permission denied; its usual mode is 0666, or mount as root")
    if which("fusermount3") is None:
        bad_input("fusermount3 is missing; install the package fuse3, or mount as root")
    if config.allow_other:
        try:
            lines = Path("/etc/fuse.conf").read_text().split("\n")
        except OSError:
            lines = []
        if "user_allow_other" not in (line.strip() for line in lines):
            bad_input("--allow-other: add a line user_allow_other to /etc/fuse.conf first")


def _check_mountpoint(mountpoint: str) -> None:
    # mountinfo first: a mount that hangs must not be asked anything.
    status = exit_status.BAD_INPUT
    for left in mounts.list_mounts():
        if left.mountpoint != mountpoint:
            continue
        status = exit_status.FAILURE  # one of healfs's, which may be about to end
        if left.is_dead() and (lost := clear(left)):
            error_line(f"{mountpoint}: the last daemon was killed; {lost}")
    if is_mounted(mountpoint):
        raise CliError(
            f"{mountpoint}: something is mounted there already; "
            "take another directory, or unmount that first",
            status,
        )
    try:
        with os.scandir(mountpoint) as entries:
            if next(entries, None) is not None:
                bad_input(f"{mountpoint}: not empty; take an empty directory")
    except FileNotFoundError:
        word = shell_word(mountpoint)
        bad_input(f"{mountpoint}: no such directory; make it first: mkdir -p {word}")
    except NotADirectoryError:
        bad_input(f"{mountpoint}: not a directory; MOUNTPOINT is an empty directory")
    except OSError as exc:
        wrong = exc.errno in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG)
        status = exit_status.BAD_INPUT if wrong else exit_status.FAILURE
        raise CliError(os_error(exc), status) from None


class _Interrupted(BaseException):
    """SIGINT, SIGTERM or SIGHUP came while the mount was being made."""


class _Signals:
    """The first of them raises _Interrupted, until `deaf`: a second one must not break off the
    clearing up after the first."""

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.deaf = False

    def _came(self, number: int, frame: FrameType | None) -> None:
        if not self.deaf:
            self.deaf = True
            raise _Interrupted

    def __enter__(self) -> _Signals:
        self._saved = [signal.signal(number, self._came) for number in self._NUMBERS]
        return self

    def __exit__(self, *exc: object) -> None:
        self.deaf = True
        for number, handler in zip(self._NUMBERS, self._saved, strict=True):
            signal.signal(number, handler)


def _run(config: MountConfig) -> None:
    ready_read, ready_write = os.pipe()
    with open(ready_read, encoding="utf-8", errors="replace") as ready:
        try:
            with _Signals() as signals:
                keeper = _start(config, ready_write)
                try:
                    os.close(ready_write)
                    ready_write = -1
                    _hand_over(keeper, config)
                    _wait_ready(ready, config)
                    signals.deaf = True  # it is detached: a signal that comes later is not its
                except BaseException:
                    signals.deaf = True
                    _end(keeper, config)
                    raise
        except _Interrupted:
            raise CliError("interrupted; nothing is mounted", exit_status.INTERRUPTED) from None
        finally:
            if ready_write >= 0:
                os.close(ready_write)


def _become_keeper(config: MountConfig) -> NoReturn:
    """In the foreground: whoever started this process ends it, and sees its end, as the mount's."""
    given = os.memfd_create("healfs-config")
    os.write(given, config.to_json().encode())
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    # Until it has handlers for them.
    signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
    os.execv(sys.executable, _keeper(-1))


def _keeper(ready: int) -> list[str]:
    # -P: nothing is imported from the directory that the operator happens to be in.
    return [sys.executable, "-P", "-m", "healfs.daemon.keeper", str(ready)]


def _start(config: MountConfig, ready: int) -> subprocess.Popen[bytes]:
    # A traceback that no logger caught is for the log, not for the operator's terminal.
    path = mounts.log_path(config.mountpoint)
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with open(path, "ab") as output:
        return subprocess.Popen(
            _keeper(ready),
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=(ready,),
            start_new_session=True,
        )


def _hand_over(keeper: subprocess.Popen[bytes], config: MountConfig) -> None:
    assert keeper.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died: the ready pipe tells
        keeper.stdin.write(config.to_json().encode())
        keeper.stdin.close()


def _wait_ready(ready: IO[str], config: MountConfig) -> None:
    """Until the keeper says ready. Raises CliError."""
    from healfs.daemon.report import lines

    terminal = Console(stderr=True, highlight=False)
    with contextlib.ExitStack() as stack:
        spinner = None
        for line in ready:
            try:
                message = json.loads(line)
                event = message["event"]
            except (ValueError, KeyError, TypeError):
                continue
            said = lines(message)
            if event == "waiting":
                text = one_line(said[0])
                if not terminal.is_interactive:  # a dumb one shows no spinner
                    error_line(text)
                elif spinner is None:
                    spinner = stack.enter_context(terminal.status(""))
                if spinner is not None:
                    spinner.update(Text(text))
            elif event == "ready":
                stack.close()
                click.echo(message["file"])
                for line in said:
                    error_line(line)
                return
            elif event == "error":
                stack.close()
                raise CliError(said[0], int(message.get("status", exit_status.FAILURE)))
    raise CliError(f"the daemon died; see {mounts.log_path(config.mountpoint)}")


def _end(keeper: subprocess.Popen[bytes], config: MountConfig) -> None:
    """End a keeper that is not wanted, and leave nothing behind. Signals wait meanwhile."""
    signals = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        if keeper.stdin is not None:
            with contextlib.suppress(OSError):
                keeper.stdin.close()
        keeper.terminate()
        try:
            keeper.wait(_STOP_SECONDS)
            return
        except subprocess.TimeoutExpired:
            pass
        # It leads its process group, and its worker is in it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait()
        for left in mounts.list_mounts():
            if left.mountpoint == config.mountpoint:
                detach(left.mountpoint, left.connection)
                mounts.clear_dead(left.directory)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
