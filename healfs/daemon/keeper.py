"""The keeper: holds the FUSE descriptor, the INIT request, the write log's memfd, the control
socket and the source's lock on this host, starts the worker, and another one when it has died,
mounts and unmounts for it, and cleans up behind it.

Standard library only, one loop that never waits for anybody, and it never touches the backend or
the mounted files. Started by `healfs mount` as `python -m healfs.daemon.keeper READY_FD` with the
mount's configuration on standard input; READY_FD is -1 where `healfs mount` itself became the
keeper.

Messages on the socket to a worker are JSON objects, one a packet. From the worker:
{"do": "lock", "name": text, "shared": bool}, {"do": "mount"}, {"do": "umount", "lazy": bool},
{"do": "serving", "version": text, "beats": true},
{"do": "init", "request": hex, "reply": hex, "resend": bool}, {"do": "alive"}, {"do": "ready"},
{"do": "beat", "status": text, "idle": bool}, {"do": "unmounted", "data": object},
{"do": "event", "event": name, "data": object, "time": seconds};
the first four get a reply, {"ok": true} (a lock's and a mount's with the descriptor) or
{"error": text, "errno": n}. To the worker: a greeting, then {"event": "terminate"}, and
{"event": "beat"}, which asks one that said "beats" for one. What an upgrade adds: see
daemon/upgrading.py.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import json
import math
import os
import select
import signal
import sys
import time
from typing import Any

from healfs.config import one_line, os_error_words
from healfs.control import mounts, unflushed
from healfs.daemon import host_lock, lines
from healfs.daemon.children import ENDING, HANDED_OVER, PROTOCOL, Child, Program, how, readable
from healfs.daemon.heartbeat import Heartbeat
from healfs.daemon.sd_notify import SdNotify
from healfs.daemon.upgrading import Phase, Upgrading
from healfs.events import History, sentence, to_journal
from healfs.fuse import callers, mount

STOP_SECONDS = 5.0  # an orderly end takes at most this long
PR_SET_IO_FLUSHER = 57
OOM_SCORE = -900
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # before a worker that died at once is started again
UNANSWERED, SOON = "before anything was answered", "soon after its start"
INTERRUPTED = 130  # exit status: ended before there was a mount
LOOK_SECONDS = 5.0  # between two looks at the worker: was it killed, and cannot end?
ASKS = ("lock", "mount", "umount", "serving")  # a worker's messages that get a reply


class Keeper:
    def __init__(self, config: dict[str, Any], text: str, ready: int) -> None:
        self.config = config
        self.text = text
        self.ready = ready
        self.reported = False  # that it is mounted: to `healfs mount` or to people, and to systemd
        self.mountpoint = str(config["mountpoint"])
        self.lock, self.lock_name = -1, ""  # of the source, see daemon/host_lock.py
        self.fuse = -1
        self.connection: int | None = None  # its number in /sys/fs/fuse/connections
        self.init, self.init_reply = "", ""  # in hex, for a worker that takes over
        self.resend = False  # the kernel can send unanswered requests again
        self.program = Program(sys.executable, os.environ.get("PYTHONPATH"))
        self.version = ""  # of the worker that serves, or did last
        self.worker: Child | None = None
        self.started = 0.0
        self.start_at = 0.0  # of the next worker, while there is none
        self.problem = ""  # why no worker serves, for the operator
        self.restarts = 0
        self.futile = 0  # workers that died, one after the other: see _plan_restart
        self.pause = 0.0
        self.alive = False  # the worker has answered something since its start
        self.died: float | None = None  # when the last one did that served
        self.may_ask = False  # it knows what a message that asks for a beat is
        self.leaving: float | None = None  # since when the worker is seen to be killed
        self.look_at = 0.0
        self.record_at = math.inf  # again: the run-time files have no room, say
        self.log = "stderr"
        self.kill_at: float | None = None
        self.killed = False
        self.systemd = SdNotify()
        self.heartbeat = Heartbeat(self.systemd)
        self.upgrading = Upgrading(self)
        self.end = ""  # why the mount ended, when nobody asked for it
        self.unmounted: dict[str, Any] = {}  # what the worker says of the end

    def run(self) -> int:
        """The exit status: 0 after an orderly unmount, 2 for bad input, else 1."""
        self._catch_signals()
        try:
            self.claim = mounts.claim(self.mountpoint)
        except mounts.MountsError as exc:
            return self._refuse(str(exc), 1 if isinstance(exc, mounts.BusyError) else 2)
        try:
            try:
                self._open_log()
                self.listener = self.claim.listen(shared=bool(self.config.get("allow_uid")))
                self.door = self.claim.open_door()
            except OSError as exc:
                return self._refuse(f"{exc.filename or self.claim.directory}: {exc.strerror}", 1)
            _kernel_manners()
            self.history = History(mounts.events_path(self.mountpoint))
            status = self._serve()
            if self.connection is not None:
                reason = {"reason": self.end} if self.end else {}
                self.happened("HEALFS_UNMOUNTED", reason | self.unmounted)
            return status
        finally:
            self.upgrading.close()
            if self.lock >= 0 and self.worker is None:  # else it is held by what cannot end
                host_lock.release(self.lock_name, self.lock)
            self.claim.release()

    def _refuse(self, message: str, status: int) -> int:
        report = {"event": "error", "message": message, "status": status}
        if self.ready < 0:
            print(f"healfs: {one_line(message)}", file=sys.stderr)
        else:
            os.write(self.ready, json.dumps(report).encode() + b"\n")
        return status

    def _catch_signals(self) -> None:
        self.wake, wake_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_write)
        for number in ENDING:
            signal.signal(number, lambda *_: None)
        if not self.config.get("foreground"):
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # the terminal ends, the mount does not
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)  # `healfs mount` has blocked them

    def _open_log(self) -> None:
        """Gone to the background, the log is all that is left of the standard streams."""
        if self.config.get("foreground"):
            stderr = os.fstat(2)
            if os.environ.get("JOURNAL_STREAM") == f"{stderr.st_dev}:{stderr.st_ino}":
                self.log = "journal"
            return
        path = mounts.log_path(self.mountpoint)
        path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
        self.log = str(path)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.close(null)
        self._write_to_log()
        os.chdir("/")

    def _write_to_log(self) -> None:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)

    def _follow_log(self) -> None:
        """The worker has begun a new file, and removed the old one (see daemon/log_file.py)."""
        if self.log not in ("stderr", "journal"):
            with contextlib.suppress(OSError):
                self._write_to_log()

    def say(self, text: str) -> None:
        self._follow_log()
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        print(f"{stamp} keeper: {text}", file=sys.stderr)

    def happened(self, name: str, data: dict[str, Any], when: float | None = None) -> None:
        """Keep an event, and tell the journal where that is the log."""
        try:
            event = self.history.add(name, data, time.time() if when is None else when)
        except OSError as exc:
            self.say(f"{os_error_words(exc)}: the event {name} is not kept")
            return
        if self.log == "journal" and not to_journal(event, self.mountpoint):
            self.say(sentence(event))

    def _serve(self) -> int:
        self.memory = os.memfd_create("healfs-log", os.MFD_CLOEXEC)
        while True:
            status = self._turn()
            if status is not None:
                return status
            self._wait()

    def _wait(self) -> None:
        """Until there is something to do."""
        poll = select.poll()
        fds = [self.wake, self.door.fileno(), *self.upgrading.descriptors()]
        patience = time.monotonic() + self.heartbeat.patience
        times = [self.upgrading.deadline, self.record_at, patience]
        # What comes to a disk that is idle: the worker has to see to it, and to beat.
        idle = self.heartbeat.is_idle and self.fuse >= 0  # its mount may be taken away already
        comes = [self.fuse, self.listener.fileno()] if idle else []
        if self.worker is None:
            times.append(self.start_at)
        else:
            fds += self.worker.descriptors()
        if self.futile or self.leaving is not None:
            times.append(self.look_at)
        if self.kill_at is not None:
            times.append(self.kill_at)
        for fd in (*fds, *comes):
            poll.register(fd, select.POLLIN)
        seconds = max(0.0, min(times) - time.monotonic())
        ready = poll.poll(None if seconds == math.inf else seconds * 1000 + 1)
        if any(fd in comes for fd, _ in ready):
            self.heartbeat.something_came(time.monotonic())

    def _turn(self) -> int | None:
        """Do what there is to do; the exit status when that was the last."""
        now = time.monotonic()
        if readable(self.wake):
            os.read(self.wake, 64)
            self._terminate(now)
        if readable(self.door.fileno()):
            self.upgrading.asked()
        self.upgrading.turn(now)
        if now >= self.record_at:
            self._record()
        if self.worker is None:
            if self.kill_at is not None and now >= self.kill_at:
                self._say_loss()
                self._abort()
                return 1
            self.heartbeat.none_runs(now)
            return self._start_worker() if now >= self.start_at else None
        ended = self.worker.has_ended()  # asked first: nothing is said after that
        for message in self.worker.messages():
            self._obey(message)
        if ended:
            return self._worker_ended(now)
        if now >= self.look_at:
            self._look(now)
        if self.kill_at is not None:
            return self._too_late(now) if now >= self.kill_at else None
        if self.leaving is not None:
            self.heartbeat.none_runs(now)
        elif self.heartbeat.is_idle or self._is_replaceable():
            if self.heartbeat.hangs(now):
                self.say("the worker hangs: killed")
                self.worker.kill()
            elif self.may_ask and self.heartbeat.has_to_ask():
                self.worker.tell({"event": "beat"})
        return None

    def _is_replaceable(self) -> bool:
        """It can be killed, and nobody notices but by the time that it takes."""
        return self.fuse < 0 or bool(self.init and self.resend)

    # --- the worker -------------------------------------------------------------------------

    def descriptors(self) -> dict[str, int]:
        """What a worker is given beside its socket; the pipe to `healfs mount` until it is told."""
        return {
            "listener": self.listener.fileno(),
            "ready": self.ready,
            "memory": self.memory,
            "lock": self.lock,
            "fuse": self.fuse,
        }

    def greeting(self) -> dict[str, Any]:
        """What a worker has to know."""
        return {
            "protocol": PROTOCOL,
            "config": self.text,
            "log": self.log,
            "directory": str(self.claim.directory),
            "init": self.init,
            "init_reply": self.init_reply,
            "reported": self.reported,
            "restarts": self.restarts,
            "died": self.died,
            "beat": self.heartbeat.period,
            "may_rest": True,
            "silence": self.heartbeat.limit,
        }

    def _start_worker(self) -> int | None:
        """The first one mounts; a later one takes over the mount and the log. The exit status where
        there is no first one."""
        self._follow_log()
        try:
            child = Child(self.program, self.descriptors(), self.greeting())
        except OSError as exc:
            why = os_error_words(exc)
            if self.fuse < 0:
                return self._refuse(f"no process for the disk can be started: {why}", 1)
            self._plan_restart(f"could not be started ({why})")
        else:
            self.employ(child)
        return None

    def employ(self, child: Child) -> None:
        """It is the worker from now on."""
        self.worker = child
        self.alive = self.may_ask = False
        self.leaving = None
        self.started = time.monotonic()
        self.look_at = self.started + LOOK_SECONDS
        self.heartbeat.started(self.started)
        self._record()
        if self.kill_at is not None:
            child.tell({"event": "terminate"})

    def _terminate(self, now: float) -> None:
        if self.kill_at is None:
            self.systemd.stopping()
            self.kill_at = now + STOP_SECONDS
            self.start_at = now
            if self.worker is not None:
                self.worker.tell({"event": "terminate"})

    def _obey(self, message: dict[str, Any]) -> None:
        """Nothing that it says ends the mount, or leaves it waiting."""
        try:
            self._heard(message)
        except Exception as exc:
            text = f"not understood: {message['do']}: {exc!r}"
            self.say(text)
            if message["do"] in ASKS:
                self._tell({"error": text, "errno": errno.EIO})

    def _heard(self, message: dict[str, Any]) -> None:
        match message["do"]:
            case "lock":
                self._lock(str(message["name"]), bool(message["shared"]))
            case "mount":
                self._mount()
            case "umount":
                self._unmount(bool(message["lazy"]))
            case "init":
                self.init, self.init_reply = message["request"], message["reply"]
                self.resend = message["resend"]
            case "serving":
                self.may_ask = message.get("beats", False)
                self._serving(str(message["version"]))
            case "alive":
                self.alive = True
            case "ready":
                self._ready()
            case "beat":
                self.systemd.status(message["status"])
                self.heartbeat.beat(time.monotonic(), message.get("idle", False))
            case "unmounted":
                self.unmounted = message["data"] | self.unmounted  # the first word counts
            case "event" if self.futile < 2 or message["event"] != "HEALFS_FAULTED":
                self.happened(message["event"], message["data"], message["time"])

    def _ready(self) -> None:
        self.reported = True
        self.systemd.ready()
        if self.ready >= 0:
            os.close(self.ready)
            self.ready = -1

    def _serving(self, version: str) -> None:
        self.problem = ""
        self.died = None  # from here on the log has the outage's clock
        if self.upgrading.phase is Phase.TAKING_OVER:
            self.upgrading.serving()
        else:
            self.version = version
        self._record()
        self._tell({"ok": True})

    def upgraded(self, program: Program, version: str) -> None:
        """It is what is started from now on."""
        before, self.version = self.version, version
        self.program = program
        self.say(f"upgraded to version {version}")
        self.happened("HEALFS_UPGRADED", {"from": before, "to": version})
        self._record()

    def _tell(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        assert self.worker is not None
        self.worker.tell(message, fds)

    def _look(self, now: float) -> None:
        """A killed worker that waits in the kernel for its storage (state D) cannot be reaped."""
        assert self.worker is not None
        self.look_at = now + LOOK_SECONDS
        if now - self.started > LONGEST_PAUSE:
            self.futile, self.pause = 0, 0.0
        if not callers.is_leaving(self.worker.pid):
            if self.leaving is not None:
                self.leaving = None
                self.problem = ""
                self._record()
            return
        if self.leaving is None:
            self.leaving = now
            return
        problem = (
            f"the worker (pid {self.worker.pid}) was killed and cannot end: it waits in the"
            " kernel for its storage, and another one takes over when that has answered;"
            f" or give the disk up: healfs umount --force {self.mountpoint}"
        )
        if problem != self.problem:
            self._report(problem)

    def _worker_ended(self, now: float) -> int | None:
        """None: another one is to be started."""
        assert self.worker is not None
        status = self.worker.reap()
        self.worker = None
        if status == 0:
            self.systemd.stopping()
            if mount.is_ours(self.mountpoint, self.connection):
                self.end = "the connection was aborted from outside"
                self.say(f"{self.end}: the mount is taken away")
                self._abort()
            return 0
        if self.fuse < 0:
            return status if status in (2, INTERRUPTED) else 1  # it has said why
        terminated = self.kill_at is not None and status != HANDED_OVER
        if not self._is_replaceable() or terminated:
            self.end = f"the worker ended {how(status)}"
            self.say(f"{self.end}: {self.mountpoint} is taken away")
            self._say_loss()
            self._abort()
            return 1
        self.died = self.died or self.leaving or now
        if self.upgrading.phase is Phase.ENDING_OLD:
            self.upgrading.old_has_ended()
        elif self.upgrading.is_worker:
            self.upgrading.candidate_has_died(status)
            self.start_at = now
        elif status == HANDED_OVER:  # to a candidate that has died meanwhile
            self.start_at = now
        else:
            # Killed, by somebody or for want of memory, it did not fail by itself.
            calm = now - self.started > LONGEST_PAUSE or (self.alive and status == -signal.SIGKILL)
            when = SOON if self.alive else UNANSWERED
            self._plan_restart(f"ended {how(status)}", when, calm=calm)
        return None

    def _plan_restart(self, what: str, when: str = UNANSWERED, *, calm: bool = False) -> None:
        """One that fails at once, unless `calm`, will do so again: not hammered."""
        self.restarts += 1
        if calm:
            self.futile, self.pause = 0, 0.0
            self.say(f"the worker {what}: another one is started")
            self.systemd.status(f"the worker {what}: another one is started")
        else:
            self.futile += 1
            self.pause = min(LONGEST_PAUSE, self.pause * 2 or FIRST_PAUSE)
            self._report(
                f"no worker runs: {self.futile} in a row {what} {when};"
                f" the next one is started {self.pause:g} s after the last"
            )
        if self.futile <= 1:  # the first of those that die in a row
            self.happened("HEALFS_WORKER_RESTARTED", {"reason": what, "restarts": self.restarts})
        self.start_at = time.monotonic() + self.pause

    def _report(self, problem: str) -> None:
        """To the log, and to whoever asks for the status while no worker answers."""
        self.problem = problem
        self.say(problem)
        self.systemd.status(problem)
        self._record()

    def _record(self) -> None:
        """Now, or as soon as it can be written."""
        try:
            self._write_record()
        except OSError as exc:
            if self.record_at == math.inf:
                self.say(f"{os_error_words(exc)}; tried again every {LOOK_SECONDS:g} s")
            self.record_at = time.monotonic() + LOOK_SECONDS
        else:
            self.record_at = math.inf

    def _write_record(self) -> None:
        source = str(self.config["source"])
        waits = "" if self.fuse >= 0 else f"not mounted yet, it waits for {source}"
        self.claim.record(
            mountpoint=self.mountpoint,
            file=os.path.join(self.mountpoint, str(self.config["name"])),
            source=source,
            keeper=os.getpid(),
            worker=0 if self.worker is None else self.worker.pid,
            log=self.log,
            version=self.version,
            problem=self.problem or waits,
            mounted=not waits,
            connection=self.connection,
        )

    # --- the mount --------------------------------------------------------------------------

    def _lock(self, name: str, shared: bool) -> None:
        try:
            self.lock = host_lock.acquire(name, shared=shared)
            self.lock_name = name
        except BlockingIOError:
            text = f"{self.config['source']} is in use by another healfs on this host"
            self._tell({"error": f"{text}; end that first", "errno": errno.EBUSY})
        except OSError as exc:
            self._tell({"error": os_error_words(exc), "errno": exc.errno or 5})
        else:
            self._tell({"ok": True}, (self.lock,))

    def _mount(self) -> None:
        source = str(self.config["source"])
        try:
            self._write_record()  # nobody could find and end a mount that has none
            self.fuse = mount.mount(
                self.mountpoint,
                source,
                allow_other=bool(self.config["allow_other"]),
                read_only=bool(self.config["read_only"]),
            )
            self.connection = mount.connection_of(self.mountpoint)
            self._record()
            with contextlib.suppress(OSError, mounts.MountsError):  # the mount is made
                mounts.drop_histories()
            self.happened("HEALFS_MOUNTED", {"source": source})
        except OSError as exc:
            self._tell({"error": os_error_words(exc), "errno": exc.errno or 5})
        else:
            self._tell({"ok": True}, (self.fuse,))

    def _unmount(self, lazy: bool) -> None:
        try:
            mount.unmount(self.mountpoint, self.connection, lazy=lazy, moved=True)
        except OSError as exc:
            self._tell({"error": str(exc), "errno": exc.errno or 5})
        else:
            if not mount.is_connected(self.fuse):
                self.systemd.stopping()
            self._tell({"ok": True})

    def _abort(self) -> None:
        """Answer everybody with ECONNABORTED, by the kernel, and take the mount away."""
        if self.fuse < 0:
            return
        connected = mount.is_connected(self.fuse)  # else the number may be another's
        with contextlib.suppress(OSError):
            mount.abort(self.mountpoint, self.connection, connected=connected)
        try:
            mount.unmount(self.mountpoint, self.connection, lazy=True, moved=connected)
        except OSError as exc:
            self.say(str(exc))
        os.close(self.fuse)  # the last descriptor's end aborts the connection, too
        self.fuse = -1

    def _say_loss(self) -> None:
        self.say(unflushed.loss(str(self.claim.directory)))

    def _too_late(self, now: float) -> int | None:
        """It was told to end, and has not."""
        assert self.worker is not None
        if self.killed:
            self.say(f"the worker (pid {self.worker.pid}) was killed and cannot end: it is left")
            return 1
        self.say("the worker did not end in time: killed")
        self._say_loss()
        self.killed = True
        self.kill_at = now + STOP_SECONDS
        self._abort()
        self.worker.kill()
        return None


def _kernel_manners() -> None:
    """No memory reclaim through ourselves, and the last ones the OOM killer thinks of.

    Both are inherited by the worker; neither is allowed to everybody.
    """
    ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE))


def _be_anywhere() -> None:
    """In the background the working directory is another one: for us, and for the workers."""
    if directory := os.environ.get("HEALFS_RUNTIME_DIR"):
        os.environ["HEALFS_RUNTIME_DIR"] = os.path.abspath(directory)
    if path := os.environ.get("PYTHONPATH"):
        places = (os.path.abspath(place) for place in path.split(os.pathsep) if place)
        os.environ["PYTHONPATH"] = os.pathsep.join(places)


def main() -> int:
    lines.use()
    _be_anywhere()
    ready = int(sys.argv[1])
    if ready >= 0:
        os.set_inheritable(ready, False)
    text = sys.stdin.read()
    return Keeper(json.loads(text), text, ready).run()


if __name__ == "__main__":
    sys.exit(main())
