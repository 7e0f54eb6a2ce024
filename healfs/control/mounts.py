"""Where the run-time files of the mounts live, and which mounts there are.

One directory a mount, named by a hash of the mountpoint, because a socket's path is limited to
107 bytes. Nothing here touches a mount: its daemon may be the one that hangs.

Standard library only: the keeper uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import socket
import stat
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from healfs.config import shell_word
from healfs.control import unflushed
from healfs.events import History

MAXIMUM_SOCKET_PATH = 107  # sun_path without its NUL, unix(7)
_ROOTS = Path("/run/healfs")
HISTORIES = 100  # of mountpoints that are mounted no more
_MAXIMUM_RECORD = 65536
_WORDS_BYTES = 200  # of a file's name, which may have 255
_TAILS = bytes(range(0x80, 0xC0))  # what a character of UTF-8 goes on with


class MountsError(Exception):
    """One line: what is wrong with the run-time files, or with what the operator named."""


class BusyError(MountsError):
    """A daemon starts, serves or ends there: it may be another time."""


def _private(path: Path) -> Path:
    """Make sure of a directory that nobody else can write to: who can, is the daemon."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise MountsError(f"{path}: not a directory of yours; remove it, or {_elsewhere()}")
    if found.st_mode & 0o022:
        raise MountsError(f"{path}: others may write there; {_elsewhere()}")
    return path


def _runtime_path() -> Path:
    # Relative paths in XDG's variables are to be ignored, says its specification.
    if override := os.environ.get("HEALFS_RUNTIME_DIR"):
        return Path(override).absolute()
    if os.geteuid() == 0:
        return _ROOTS
    if (runtime := os.environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        return Path(runtime) / "healfs"
    return Path(tempfile.gettempdir()) / f"healfs-{os.geteuid()}"


def _elsewhere() -> str:
    """What to do where the run-time directory does not do: see _runtime_path."""
    ours = os.geteuid() == 0 or os.environ.get("HEALFS_RUNTIME_DIR")
    return f"set {'HEALFS' if ours else 'XDG'}_RUNTIME_DIR to a directory of your own"


def log_path(mountpoint: str) -> Path:
    """The daemon's log file. Its directory is not created here."""
    if os.environ.get("HEALFS_RUNTIME_DIR"):
        directory = _runtime_path() / "log"
    elif os.geteuid() == 0:
        directory = Path("/var/log/healfs")
    else:
        state = os.environ.get("XDG_STATE_HOME", "")
        if not state.startswith("/"):
            state = os.path.expanduser("~/.local/state")
        # Without HOME and without an entry in passwd(5) it is what it was.
        directory = Path(state) / "healfs" if state.startswith("/") else _runtime_path() / "log"
    return directory / f"{_words(mountpoint)}.log"


def events_path(mountpoint: str) -> Path:
    """The history of a canonical mountpoint, see healfs/events.py; it outlives the mount."""
    return _runtime_path() / "events" / f"{_words(mountpoint)}.jsonl"


def _words(mountpoint: str) -> str:
    # The hash tells /a-b from /a/b.
    words = os.fsencode(mountpoint.strip("/").replace("/", "-")[-64:])
    if len(words) > _WORDS_BYTES:
        words = words[-_WORDS_BYTES:].lstrip(_TAILS)
    return f"{os.fsdecode(words)}-{_hash(mountpoint)[:8]}"


def drop_histories() -> None:
    """Of mountpoints that are mounted no more, but for the newest."""
    mounted = {events_path(mount.mountpoint).stem for mount in list_mounts()}
    old: list[tuple[float, Path]] = []
    for path in (_runtime_path() / "events").glob("*.jsonl"):
        with contextlib.suppress(OSError):
            if path.stem not in mounted:
                old.append((path.stat().st_mtime, path))
    for _, path in sorted(old)[:-HISTORIES]:
        path.unlink(missing_ok=True)
        path.with_suffix(".old").unlink(missing_ok=True)


def canonical(path: str | os.PathLike[str]) -> str:
    """The absolute path without symbolic links; asks nothing of a mount that sits there.

    readlink(2) of a directory is refused by the kernel itself, so a mountpoint's daemon is not
    asked; lstat(2) would ask it.
    """
    current = os.path.abspath(path)
    for _ in range(40):  # as the kernel does, ELOOP
        parent, name = os.path.split(current)
        current = os.path.join(os.path.realpath(parent), name)
        try:
            target = os.readlink(current)
        except OSError:
            return current
        current = os.path.abspath(os.path.join(os.path.dirname(current), target))
    return current


def _hash(mountpoint: str) -> str:
    return hashlib.sha256(os.fsencode(mountpoint)).hexdigest()[:16]


def directory_for(mountpoint: str) -> Path:
    """The run-time directory of a mount at this canonical mountpoint, existing or not."""
    return _runtime_path() / _hash(mountpoint)


@dataclass(frozen=True, slots=True)
class Mount:
    """What mount.json says. `directory` is where it was found."""

    mountpoint: str
    file: str
    source: str
    keeper: int
    worker: int
    log: str
    directory: str
    version: str = ""  # of the worker that serves, or did last
    problem: str = ""  # why none serves, in one line
    mounted: bool = True  # False: `healfs mount` waits for the backend still
    connection: int | None = None  # of the mount, see fuse/mount.py
    started: tuple[int, int] = (0, 0)  # when keeper and worker were, see started(); 0: not known

    @property
    def door(self) -> str:
        """The keeper's own socket; see daemon/upgrading.py."""
        return os.path.join(self.directory, "keeper")

    @property
    def history(self) -> Path:
        """See events_path."""
        return Path(self.directory).parent / "events" / f"{_words(self.mountpoint)}.jsonl"

    @property
    def control(self) -> str:
        return os.path.join(self.directory, "control")

    def processes(self) -> dict[int, int]:
        """Their pids, which may be other processes' by now, and when they were started."""
        found = dict(zip((self.keeper, self.worker), self.started, strict=True))
        found.pop(0, None)
        return found

    def is_dead(self) -> bool:
        """Nobody listens: the daemon is gone. A daemon that hangs is not dead."""
        with socket.socket(socket.AF_UNIX) as probe:
            probe.setblocking(False)  # a full backlog says EAGAIN: somebody is there
            try:
                probe.connect(self.control)
            except (ConnectionRefusedError, FileNotFoundError):
                return True
            except OSError:
                return False
        return False


def started(pid: int) -> int:
    """When, in clock ticks since the boot: with the pid it names one process. 0: it is gone."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


class Claim:
    """The run-time directory of one mount, held by a lock until release() or the process's end."""

    def __init__(self, directory: Path, fd: int) -> None:
        self.directory = directory
        self.fd = fd
        self._shared = False

    def listen(self, *, shared: bool = False) -> socket.socket:
        """The control socket, mode 0600, listening. Raises OSError.

        `shared`: anybody finds it who knows the mountpoint; the server decides by the peer's uid.
        """
        self._shared = shared
        if shared:
            for way in self.directory.parent, self.directory:
                way.chmod(0o711)
        mode = 0o666 if shared else 0o600
        path = self.directory / "control"
        path.unlink(missing_ok=True)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        os.fchmod(listener.fileno(), mode)  # before bind: there is no moment of another mode
        listener.bind(str(path))
        path.chmod(mode)
        listener.listen(1024)  # more than anybody opens by accident
        return listener

    def open_door(self) -> socket.socket:
        """The keeper's own socket, mode 0600: it takes packets. Raises OSError."""
        path = self.directory / "keeper"
        path.unlink(missing_ok=True)
        door = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        os.fchmod(door.fileno(), 0o600)
        door.bind(str(path))
        path.chmod(0o600)
        return door

    def record(
        self,
        *,
        mountpoint: str,
        file: str,
        source: str,
        keeper: int,
        worker: int,
        log: str,
        version: str = "",
        problem: str = "",
        mounted: bool = True,
        connection: int | None = None,
    ) -> Mount:
        """Write mount.json, whole or not at all. Raises OSError."""
        mount = Mount(
            mountpoint=mountpoint,
            file=file,
            source=source,
            keeper=keeper,
            worker=worker,
            log=log,
            directory=str(self.directory),
            version=version,
            problem=problem,
            mounted=mounted,
            connection=connection,
            started=(started(keeper), started(worker)),
        )
        temporary = self.directory / "mount.json.new"
        try:
            temporary.write_text(json.dumps(_as_record(mount)))
        except OSError as exc:  # a full file system's has no name
            raise OSError(exc.errno, exc.strerror, str(temporary)) from None
        if self._shared:
            temporary.chmod(0o644)
        temporary.replace(self.directory / "mount.json")
        return mount

    def clear(self) -> None:
        """release(), of what a keeper that is gone has held; it could not tell of the end."""
        if self.fd >= 0 and (mount := read(str(self.directory))):
            with contextlib.suppress(OSError):
                history = History(events_path(mount.mountpoint))
                data = {"reason": "the daemon was gone"}
                history.add("HEALFS_UNMOUNTED", data, time.time())
        self.release()

    def release(self) -> None:
        """Remove the directory and let go of the lock. Idempotent."""
        if self.fd < 0:
            return
        for name in ("mount.json", "mount.json.new", "control", "keeper", unflushed.NAME):
            (self.directory / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.directory.rmdir()
        os.close(self.fd)
        self.fd = -1


def claim(mountpoint: str) -> Claim:
    """Take the run-time directory of a canonical mountpoint.

    Raises MountsError when a live daemon has it, or where it cannot be made safe.
    """
    try:
        root = _private(_runtime_path())
    except OSError as exc:
        raise MountsError(f"{_runtime_path()}: {exc.strerror}; {_elsewhere()}") from None
    directory = root / _hash(mountpoint)
    if len(os.fsencode(directory / "control")) > MAXIMUM_SOCKET_PATH:
        raise MountsError(f"{root}: too long for a socket's path; {_elsewhere()}")
    while True:
        try:
            _private(directory)
            fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # its last holder removed it meanwhile
        except OSError as exc:
            raise MountsError(f"{directory}: {exc.strerror}; {_elsewhere()}") from None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise _busy(mountpoint) from None
        if not os.fstat(fd).st_nlink:
            os.close(fd)  # what was locked is the removed directory of the last holder
            continue
        if (left := read(str(directory))) and not left.is_dead():
            os.close(fd)  # its keeper is gone, and a worker serves or ends
            raise _busy(mountpoint)
        return Claim(directory, fd)


def _busy(mountpoint: str) -> BusyError:
    word = shell_word(mountpoint)
    return BusyError(f"{mountpoint}: a healfs daemon serves it already; see healfs status {word}")


def _as_record(mount: Mount) -> dict[str, object]:
    values = asdict(mount)
    del values["directory"]
    of_keeper, of_worker = values.pop("started")
    values["pids"] = {
        "keeper": values.pop("keeper"),
        "worker": values.pop("worker"),
        "keeper_started": of_keeper,
        "worker_started": of_worker,
    }
    return values


def read(directory: str) -> Mount | None:
    """None for what is no (whole) record."""
    try:
        with open(os.path.join(directory, "mount.json"), "rb") as file:
            values = json.loads(file.read(_MAXIMUM_RECORD))
        pids = values["pids"]
        return Mount(
            mountpoint=str(values["mountpoint"]),
            file=str(values["file"]),
            source=str(values["source"]),
            keeper=int(pids["keeper"]),
            worker=int(pids["worker"]),
            log=str(values["log"]),
            directory=directory,
            version=str(values.get("version", "")),
            problem=str(values.get("problem", "")),
            mounted=bool(values.get("mounted", True)),
            connection=values.get("connection"),
            started=(int(pids.get("keeper_started", 0)), int(pids.get("worker_started", 0))),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def list_mounts() -> list[Mount]:
    """All mounts of this user, by mountpoint. The dead ones are among them: ask is_dead()."""
    root = _runtime_path()
    try:
        if root.lstat().st_uid not in (0, os.geteuid()):
            raise MountsError(f"{root}: not yours; {_elsewhere()}")
        names = os.listdir(root)
    except (FileNotFoundError, PermissionError):  # another's, who allows us some mount of his
        return []
    except OSError as exc:
        raise MountsError(f"{root}: {exc.strerror}; {_elsewhere()}") from None
    found = [read(os.path.join(root, name)) for name in names]
    return sorted((m for m in found if m is not None), key=lambda mount: mount.mountpoint)


def _of_another(mountpoint: str) -> Mount | None:
    """A mount of root's, or in a directory that cannot be listed, whose owner allows others."""
    found = (read(str(root / _hash(mountpoint))) for root in (_runtime_path(), _ROOTS))
    return next((mount for mount in found if mount is not None), None)


def find(path: str | os.PathLike[str]) -> Mount:
    """The mount with this mountpoint or disk file. Raises MountsError."""
    if not os.fspath(path):
        raise MountsError("MOUNTPOINT is empty; healfs list shows which there are")
    mounts = list_mounts()
    plain = os.path.abspath(path)
    parent, name = os.path.split(plain)

    def match(candidate: str) -> Mount | None:
        others = (_of_another(place) for place in (candidate, os.path.dirname(candidate)))
        known = (*mounts, *(mount for mount in others if mount is not None))
        return next((m for m in known if candidate in (m.mountpoint, m.file)), None)

    # In this order: each line looks only at directories above what the line before has ruled out.
    found = match(plain) or match(os.path.join(canonical(parent), name)) or match(canonical(plain))
    if found is None:
        raise MountsError(f"{path}: not a healfs mount; healfs list shows which there are")
    return found


def claim_dead(directory: str) -> Claim | None:
    """What a keeper that is gone has held; None: it lives, or nothing is left."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return None
    return Claim(Path(directory), fd)


def clear_dead(directory: str) -> None:
    """Remove the run-time files of a keeper that is gone."""
    if claimed := claim_dead(directory):
        claimed.clear()
