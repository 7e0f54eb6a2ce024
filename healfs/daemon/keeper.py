"""The keeper: holds the FUSE descriptor, the INIT request, the write log's memfd and the control
socket, starts the worker, and another one when it has died, mounts and unmounts for it, and
cleans up behind it.

Standard library only, one blocking loop, and it never touches the backend or the mounted files.
Started by `healfs mount` as `python -m healfs.daemon.keeper READY_FD` with the mount's
configuration on standard input; READY_FD is -1 where `healfs mount` itself became the keeper.

Messages on the socket to the worker are JSON objects, one a packet. From the worker:
{"do": "mount"}, {"do": "umount", "lazy": bool}, {"do": "init", "request": hex, "resend": bool},
{"do": "alive"}, {"do": "ready"}, {"do": "beat", "status": text}; the first two get a reply,
{"ok": true} (a mount's with the descriptor) or {"error": text, "errno": n}. To the worker:
{"event": "terminate"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from typing import Any

from healfs.control import mounts
from healfs.daemon.heartbeat import Heartbeat
from healfs.daemon.sd_notify import SdNotify
from healfs.fuse import mount

STOP_SECONDS = 5.0  # an orderly end takes at most this long
PR_SET_IO_FLUSHER = 57
OOM_SCORE = -900
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0  # before a worker that died at once is started again
PACKET = 1 << 16
INTERRUPTED = 130  # exit status: ended before there was a mount
ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Keeper:
    def __init__(self, config: dict[str, Any], text: str, ready: int) -> None:
        self.config = config
        self.text = text
        self.ready = ready
        self.mountpoint = str(config["mountpoint"])
        self.fuse = -1
        self.connection: int | None = None  # its number in /sys/fs/fuse/connections
        self.init = ""  # the INIT request, in hex, for a worker that takes over
        self.resend = False  # the kernel can send unanswered requests again
        self.restarts = 0
        self.pause = 0.0
        self.alive = False  # the worker has answered something since its start
        self.log = "stderr"
        self.kill_at: float | None = None
        self.systemd = SdNotify()
        self.heartbeat = Heartbeat(self.systemd)

    def run(self) -> int:
        """The exit status: 0 after an orderly unmount, 2 for bad input, else 1."""
        self._catch_signals()
        try:
            self.claim = mounts.claim(self.mountpoint)
        except mounts.MountsError as exc:
            return self._refuse(str(exc), 2)
        try:
            try:
                self._open_log()
                listener = self.claim.listen()
            except OSError as exc:
                return self._refuse(f"{exc.filename or self.claim.directory}: {exc.strerror}", 1)
            _kernel_manners()
            return self._serve(listener)
        finally:
            self.claim.release()

    def _refuse(self, message: str, status: int) -> int:
        report = {"event": "error", "message": message, "status": status}
        if self.ready < 0:
            os.write(2, f"healfs: {message}\n".encode(errors="replace"))
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
        log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        os.close(null)
        os.chdir("/")

    def say(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        with contextlib.suppress(OSError):
            os.write(2, f"{stamp} keeper: {text}\n".encode())

    def _serve(self, listener: socket.socket) -> int:
        self.listener = listener
        self.memory = os.memfd_create("healfs-log", os.MFD_CLOEXEC)
        self._start_worker()
        while True:
            status = self._watch_worker()
            if status is None:
                self._start_worker()
            else:
                return status

    def _start_worker(self) -> None:
        """The first one mounts; a later one takes over the mount and the log."""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        fds = {
            "listener": self.listener.fileno(),
            "keeper": theirs.fileno(),
            "ready": self.ready,
            "memory": self.memory,
            "fuse": self.fuse,
        }
        # Ctrl-C goes to the worker, too, and must not find it before it ignores that.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        self.worker = subprocess.Popen(
            [sys.executable, "-P", "-m", "healfs.daemon.worker", json.dumps(fds)],
            pass_fds=tuple(fd for fd in fds.values() if fd >= 0),
            stdin=subprocess.DEVNULL,
        )
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        if self.ready >= 0:
            os.close(self.ready)  # the worker's now: its death is seen as the end of the pipe
            self.ready = -1
        self._tell(
            {
                "config": self.text,
                "log": self.log,
                "directory": str(self.claim.directory),
                "init": self.init,
                "restarts": self.restarts,
                "beat": self.heartbeat.period,
                "silence": self.heartbeat.limit,
            }
        )
        self.heartbeat.started(time.monotonic())
        self.alive = False
        if self.fuse >= 0:
            self._record()

    def _watch_worker(self) -> int | None:
        """Until it ends: the keeper's exit status, or None to start another one."""
        pidfd = os.pidfd_open(self.worker.pid)
        poll = select.poll()
        for fd in self.wake, pidfd, self.socket.fileno():
            poll.register(fd, select.POLLIN)
        while True:
            wait = self.heartbeat.period
            if self.kill_at is not None:
                wait = min(wait, max(0.0, self.kill_at - time.monotonic()))
            events = dict(poll.poll(wait * 1000))
            if self.wake in events:
                os.read(self.wake, 64)
                self._terminate()
            if self.socket.fileno() in events and not self._message():
                poll.unregister(self.socket.fileno())
            if pidfd in events:
                os.close(pidfd)
                while self._message():
                    pass  # what it said last
                self.socket.close()
                return self._worker_ended(self.worker.wait())
            if self.kill_at is None and self._is_replaceable():
                if self.heartbeat.hangs(time.monotonic()):
                    self.say("the worker hangs: killed")
                    self.worker.kill()
            elif self.kill_at is not None and time.monotonic() >= self.kill_at:
                self.say("the worker did not end in time: killed")
                self.kill_at = time.monotonic() + STOP_SECONDS
                self._abort()
                self.worker.kill()

    def _is_replaceable(self) -> bool:
        """It can be killed, and nobody notices but by the time that it takes."""
        return self.fuse < 0 or bool(self.init and self.resend)

    def _terminate(self) -> None:
        if self.kill_at is None:
            self.systemd.stopping()
            self.kill_at = time.monotonic() + STOP_SECONDS
            self._tell({"event": "terminate"})

    def _tell(self, message: dict[str, object], fds: tuple[int, ...] = ()) -> None:
        with contextlib.suppress(OSError):  # it has died: its pidfd tells
            socket.send_fds(self.socket, [json.dumps(message).encode()], fds)

    def _message(self) -> bool:
        try:
            packet = self.socket.recv(PACKET)
        except OSError:
            return False
        if not packet:
            return False
        message = json.loads(packet)
        match message["do"]:
            case "mount":
                self._mount()
            case "umount":
                self._unmount(bool(message["lazy"]))
            case "init":
                self.init, self.resend = message["request"], message["resend"]
            case "alive":
                self.alive = True
            case "ready":
                self.systemd.ready()
            case "beat":
                self.systemd.status(message["status"])
                self.heartbeat.beat(time.monotonic())
        return True

    def _mount(self) -> None:
        source = str(self.config["source"])
        try:
            self.fuse = mount.mount(
                self.mountpoint,
                source,
                allow_other=bool(self.config["allow_other"]),
                read_only=bool(self.config["read_only"]),
            )
            self.connection = mount.connection_of(self.mountpoint)
            self._record()
        except (OSError, subprocess.TimeoutExpired) as exc:
            self._tell({"error": str(exc), "errno": getattr(exc, "errno", None) or 5})
        else:
            self._tell({"ok": True}, (self.fuse,))

    def _record(self) -> None:
        self.claim.record(
            mountpoint=self.mountpoint,
            file=os.path.join(self.mountpoint, str(self.config["name"])),
            source=str(self.config["source"]),
            keeper=os.getpid(),
            worker=self.worker.pid,
            log=self.log,
        )

    def _unmount(self, lazy: bool) -> None:
        try:
            mount.unmount(self.mountpoint, lazy=lazy)
        except (OSError, subprocess.TimeoutExpired) as exc:
            self._tell({"error": str(exc), "errno": getattr(exc, "errno", None) or 5})
        else:
            self.systemd.stopping()
            self._tell({"ok": True})

    def _abort(self) -> None:
        """Answer everybody with ECONNABORTED, by the kernel, and take the mount away."""
        if self.fuse < 0:
            return
        number = mount.connection_of(self.mountpoint)
        if number is not None:
            with contextlib.suppress(OSError):
                abort = os.open(f"/sys/fs/fuse/connections/{number}/abort", os.O_WRONLY)
                os.write(abort, b"1")
                os.close(abort)
            with contextlib.suppress(OSError, subprocess.TimeoutExpired):
                mount.unmount(self.mountpoint, lazy=True)
        os.close(self.fuse)  # the last descriptor's end aborts the connection, too
        self.fuse = -1

    def _worker_ended(self, status: int) -> int | None:
        """None: another one is to be started."""
        if status == 0:
            self.systemd.stopping()
            if self.connection and mount.connection_of(self.mountpoint) == self.connection:
                self.say("the connection was aborted from outside: the mount is taken away")
                self._abort()
            return 0
        if self.fuse < 0:
            return status if status in (2, INTERRUPTED) else 1  # it has said why
        how = f"signal {-status}" if status < 0 else f"status {status}"
        if not self._is_replaceable() or self.kill_at is not None:
            self.say(f"the worker ended with {how}: {self.mountpoint} is taken away")
            self._abort()
            return 1
        # One that dies before it has answered anything will do so again: not hammered.
        self.pause = 0.0 if self.alive else min(LONGEST_PAUSE, self.pause * 2 or FIRST_PAUSE)
        self.restarts += 1
        self.say(f"the worker ended with {how}: another one is started in {self.pause:g} s")
        self.systemd.status(f"the worker ended with {how}: another one is started")
        if self.pause:
            select.select([self.wake], [], [], min(self.pause, self.heartbeat.limit))
        return None


def _kernel_manners() -> None:
    """No memory reclaim through ourselves, and the last ones the OOM killer thinks of.

    Both are inherited by the worker; neither is allowed to everybody.
    """
    ctypes.CDLL(None).prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0)
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(str(OOM_SCORE))


def main() -> int:
    ready = int(sys.argv[1])
    if ready >= 0:
        os.set_inheritable(ready, False)
    text = sys.stdin.read()
    return Keeper(json.loads(text), text, ready).run()


if __name__ == "__main__":
    sys.exit(main())
