"""The worker: the composition root. Wires channel, engine, backend and control, and drives them.

Started by the keeper as `python -m healfs.daemon.worker FDS`, FDS a JSON object of descriptors:
listener (the control socket), keeper (the socket to it), ready (the pipe to `healfs mount`),
memory (the memfd of the write log), fuse and lock (of a mount that an earlier worker had, else -1).
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno as e
import gc
import json
import logging
import math
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Callable
from functools import partial

import pyfuse3
import trio

from healfs import __version__
from healfs.backends.base import Backend, Geometry, SourceError
from healfs.config import MountConfig
from healfs.control import mounts, unflushed
from healfs.control.server import ControlServer
from healfs.core.engine import Engine
from healfs.core.request import Done, Request
from healfs.core.states import State
from healfs.core.writelog import LayoutError
from healfs.daemon import commands, faults, fencing, host_lock, lines, log_file, sources, takeover
from healfs.daemon.beats import Beats
from healfs.daemon.children import HANDED_OVER
from healfs.daemon.log_memory import LogMemory
from healfs.daemon.parent import Parent, ParentError
from healfs.daemon.report import INTERRUPTED, Report
from healfs.daemon.telling import Telling
from healfs.daemon.turns import Turns
from healfs.daemon.unmounting import UNMOUNT_SECONDS, Unmounting
from healfs.fuse import mount
from healfs.fuse.callers import Callers
from healfs.fuse.channel import Channel
from healfs.fuse.namespace import Namespace

log = logging.getLogger("healfs.worker")

SEEK_SECONDS = 1.0  # an answer to SEEK_DATA is not worth waiting for: "all is data" is legal
LOOK_SECONDS = 1.0  # between two looks at who waits


class Worker:
    """Is the engine's Effects, too."""

    def __init__(self, config: MountConfig, parent: Parent, fds: dict[str, int]) -> None:
        self.config = config
        self._fence_wanted = trio.Event()
        self._probe_wanted = trio.Event()
        self.parent = parent
        self.fuse, self.lock = fds["fuse"], fds["lock"]
        self.report = Report(fds["ready"])
        self.listener = socket.socket(fileno=fds["listener"])
        self.backend: Backend = sources.backend_for(config)
        self.geometry: Geometry | None = None
        settle = self.backend.settle if config.settle is None else config.settle
        memory = LogMemory(config, fds["memory"])
        self.unlocked = memory.lock()
        self.engine = Engine(
            self,
            config.policy,
            time.monotonic,
            memory.write_log(),
            slow_after=config.slow_after,
            settle=settle,
            fence=config.fence is not None,
            ambiguous=self.backend.ambiguous,
        )
        allowed = config.allow_uid
        self.control = ControlServer(commands.verbs(self), version=__version__, allowed=allowed)
        self.telling = Telling(parent, self.control)
        self.channel: Channel
        self.callers = Callers()
        self._connect_wanted = trio.Event()
        self._alarm: trio.CancelScope | None = None
        self._alarm_at = math.inf
        self._somebody_waits = trio.Event()
        self._account = unflushed.Account(parent.greeting["directory"])
        self._early_end = 1  # the exit status when it did not come to a mount
        self.notes: list[str] = []  # of the system, for status
        self.negotiated = trio.Event()  # what the kernel can, with the first worker
        self.resend = False  # it can send requests again, and the keeper knows
        self._alive = False  # something was answered, and the keeper told
        self.unmounting = Unmounting(self)

    # --- Effects ----------------------------------------------------------------------------

    @property
    def send(self) -> Callable[[Request, Done], None]:
        return self.backend.submit

    def taken(self, request: Request) -> bool:
        return self.backend.taken(request)

    def heard(self) -> float:
        return self.backend.heard

    def probe(self) -> None:
        self._probe_wanted.set()

    def fence(self) -> None:
        self._fence_wanted.set()

    def connect(self) -> None:
        self._connect_wanted.set()

    def close(self) -> None:
        self.backend.close()

    def wake_at(self, when: float) -> None:
        self._alarm_at = when
        if self._alarm is not None:
            self._alarm.deadline = trio.current_time() + max(0.0, when - time.monotonic())

    def event(self, name: str, data: dict[str, object]) -> None:
        if name == "BLOCK_IO_ERROR":
            errno = data.get("errno")
            assert isinstance(errno, int)
            describe = sources.device_for(self.config.device).describe
            data = {"device": self.config.name, **data, "status": describe(errno)}
            self._somebody_waits.set()
        if name == "HEALFS_FAULTED":
            faults.faulted(self, data)
        else:
            self.telling.event(name, data)

    # --- life -------------------------------------------------------------------------------

    async def run(self) -> int:
        """The exit status."""
        status: int | None = None
        async with trio.open_nursery() as nursery:
            parent = self.parent
            for task in (parent.listen, parent.heed_signals, Beats(self).beat, self.telling.run):
                nursery.start_soon(faults.guarded, self, task)
            for why in self.parent.terminate.wait, self.report.forsaken:
                nursery.start_soon(self._end_early, nursery.cancel_scope, why)
            status = await self._mount()
            if status is None:
                unmount = self.unmounting.on_request_of_the_keeper
                nursery.start_soon(faults.guarded, self, unmount)
                nursery.start_soon(faults.guarded, self, takeover.hand_over, self)
                await self._serve()
                status = HANDED_OVER if self.parent.hand_over.is_set() else 0
            nursery.cancel_scope.cancel()
        with trio.move_on_after(UNMOUNT_SECONDS):
            await self.backend.aclose()
        if self.parent.gone.is_set():
            self._clear_up()
        return self._early_end if status is None else status

    def _clear_up(self) -> None:
        """In the place of a keeper that is gone: what is mounted still is dead with us."""
        # None: another keeper has come meanwhile, and what is mounted and recorded is its own.
        if claimed := mounts.claim_dead(self.parent.greeting["directory"]):
            self._take_away(claimed)
        if self.lock >= 0:
            host_lock.release(sources.lock_name(self.config.source), self.lock)

    def _take_away(self, claimed: mounts.Claim) -> None:
        mountpoint = self.config.mountpoint
        record = mounts.read(str(claimed.directory))
        connection = record.connection if record else None
        try:
            if not hasattr(self, "channel"):  # killed while it mounted, it told nobody
                connection = connection or mount.never_served(mountpoint)
            if mount.take_away(mountpoint, connection):
                log.warning("the keeper is gone: %s was taken away", mountpoint)
        except OSError as exc:  # healfs umount finds it by the record
            log.error("%s", exc)
        else:
            claimed.clear()

    async def _end_early(self, scope: trio.CancelScope, why: Callable[[], Awaitable[None]]) -> None:
        """Before the mount, it just ends the process."""
        await why()
        if not hasattr(self, "channel"):
            self.report.error("interrupted; nothing is mounted", INTERRUPTED)
            self._early_end = INTERRUPTED
            scope.cancel()

    def count_unflushed(self) -> None:
        log, geometry = self.engine.log, self.geometry
        known = log.keep or geometry is None or geometry.can_flush
        # Of those held, each may be answered before this is called again.
        requests = len(log) + len(self.channel.held) if known else unflushed.NO_LOG
        self._account.set(requests, log.ring.used + log.ring.overflow)

    async def _mount(self) -> int | None:
        """None when mounted, else the exit status (the reason was reported)."""
        if self.parent.greeting["init"]:
            self._take_over()
            return None
        config = self.config
        try:
            name = sources.lock_name(config.source)
            lock = {"do": "lock", "name": name, "shared": config.read_only}
            self.lock = await self.parent.ask(lock)
            size = config.size
            if not config.no_wait or size is None:
                self.geometry = await sources.first_connection(self.backend, config, self.report)
                size = self.geometry.size
            fuse = await self.parent.ask({"do": "mount"})
        except (SourceError, ParentError) as exc:
            status = sources.exit_status(exc)
            self.report.error(str(exc), status)
            return status
        self.engine.size = size
        self._open_channel(fuse)
        self.engine.save(namespace=self.namespace.save(), geometry=self._geometry())
        return None

    def _take_over(self) -> None:
        """An earlier worker has ended: its mount is mounted, its log is in the memory."""
        greeting = self.parent.greeting
        self.resend = True  # else there would be no second worker
        self.backend.resumed()
        self.engine.take_over(greeting["died"])
        saved = self.engine.frontend
        if saved.get("geometry") is not None:
            self.geometry = Geometry(**saved["geometry"])
        self._open_channel(self.fuse)
        if "namespace" in saved:
            self.namespace.load(saved["namespace"])
        self.channel.resume(*(bytes.fromhex(greeting[key]) for key in ("init", "init_reply")))

    def _geometry(self) -> dict[str, object] | None:
        return None if self.geometry is None else dataclasses.asdict(self.geometry)

    def _open_channel(self, fuse: int) -> None:
        read_only = self.config.read_only
        self.channel = Channel(
            fuse,
            self.engine.size,
            self.engine,
            self.commit,
            self._seek,
            self.engine.log.ring,
            read_only=read_only,
        )
        self.channel.turn = Turns(self.channel, self.backend, self.commit).run
        self.channel.on_init = partial(takeover.save_init, self)
        self.channel.on_interrupt = self._interrupted
        self.channel.on_held = self._held
        self.namespace = Namespace(self.config.name, self.engine.size, read_only=read_only)
        self.namespace.on_change = self._namespace_changed
        options = set(pyfuse3.default_options)
        pyfuse3.init(self.namespace, f"/dev/fd/{self.channel.theirs.fileno()}", options)

    def _namespace_changed(self) -> None:
        self.engine.save(namespace=self.namespace.save())

    async def _serve(self) -> None:
        async with trio.open_nursery() as nursery:
            for task in (
                *(self._wake, self._link, pyfuse3.main, self._look_who_waits, self._fence),
                *(self._probe, self._until_unmounted, self._report_ready),
            ):
                nursery.start_soon(faults.guarded, self, task)
            nursery.start_soon(faults.guarded, self, self.control.serve, self.listener)
            await self.unmounting.ended.wait()
            nursery.cancel_scope.cancel()
        self.channel.close()

    async def _report_ready(self) -> None:
        resuming = self.channel.resuming
        await (self.negotiated if resuming is None else resuming).wait()
        with contextlib.suppress(ParentError):
            await self.parent.ask({"do": "serving", "version": __version__, "beats": True})
        if resuming is not None:
            log.info("version %s took over", __version__)
            if self.parent.greeting["reported"]:
                return
        file = os.path.join(self.config.mountpoint, self.config.name)
        geometry = self.geometry
        notes = (*(geometry.notes if geometry else ()), *self.notes)
        off = ""
        if geometry and not (geometry.can_flush and geometry.volatile_cache):
            off = commands.why_no_log(geometry)
        self.report.ready(file, notes, off)
        self.parent.tell({"do": "ready"})
        log.info("mounted %s on %s, %d bytes", self.config.source, file, self.engine.size)

    # --- tasks ------------------------------------------------------------------------------

    async def _until_unmounted(self) -> None:
        while True:
            try:
                await self.channel.pump()
                break
            except* Exception:
                # A mount is never taken down by a traceback: the disk is faulted, stat works.
                self.engine.fault("the channel")
        log.info("unmounted")
        await self.unmounting.from_outside()

    async def _wake(self) -> None:
        while True:
            with trio.CancelScope() as self._alarm:
                self.wake_at(self._alarm_at)
                await trio.sleep_forever()
            self._alarm_at = math.inf
            self.engine.wake()
            if self._is_waiting():
                self._somebody_waits.set()
            self.commit()

    def commit(self) -> None:
        """End of a batch of requests."""
        if self.engine.writes_outstanding:
            self.count_unflushed()  # when it is less, the next beat says so
        self.backend.commit()
        if not self._alive and any(self.engine.totals.requests):
            self._alive = True
            self.parent.tell({"do": "alive"})

    async def _link(self) -> None:
        """One connection after the other, as the engine asks for them."""
        if self.engine.state is State.CONNECTING and self.geometry is not None:
            self._connected(self.geometry)
        else:
            if self.channel.resuming is not None:
                await self.channel.resuming.wait()
            self.engine.start()
        while True:
            if self.engine.link_up:
                try:
                    error = await self.backend.serve()
                except Exception as exc:
                    log.exception("internal error in the backend: the connection is given up")
                    error = OSError(e.EIO, f"internal error: {exc!r}")
                self.engine.lost(error.errno or e.EIO, str(error.strerror or error))
                self._somebody_waits.set()
            await self._wait_until_wanted()
            try:
                geometry = await self.backend.connect()
            except OSError as exc:
                self.engine.connect_failed(exc.errno or e.EIO, str(exc.strerror or exc))
            except Exception as exc:
                log.exception("internal error in the backend's connect")
                self.engine.connect_failed(e.EIO, f"internal error: {exc!r}")
            else:
                self._connected(geometry)

    async def _wait_until_wanted(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._try_earlier)
            await self._connect_wanted.wait()
            nursery.cancel_scope.cancel()
        self._connect_wanted = trio.Event()

    async def _try_earlier(self) -> None:
        await self.backend.wait_changed()
        self.engine.try_now()

    def _connected(self, geometry: Geometry) -> None:
        mismatch = sources.mismatch(self.geometry, geometry, self.config)
        self.engine.connected(
            geometry.size,
            align=geometry.minimum_block,
            can_flush=geometry.can_flush,
            volatile_cache=geometry.volatile_cache,
            mismatch=mismatch,
        )
        if self.engine.link_up:
            self.geometry = geometry
            self.engine.save(geometry=self._geometry())
        self.commit()

    async def _probe(self) -> None:
        """Look at the backend as often as the engine asks for it."""
        while True:
            await self._probe_wanted.wait()
            self._probe_wanted = trio.Event()
            try:
                away = await self.backend.probe()
            except Exception:
                log.exception("internal error in the probe: the requests are taken for failed")
                away = ""
            if away:
                log.warning("probe: %s", away)
            self.engine.probed(away)
            self.commit()

    async def _fence(self) -> None:
        """Run the operator's command as often as the engine asks for it."""
        while True:
            await self._fence_wanted.wait()
            self._fence_wanted = trio.Event()
            assert self.config.fence is not None
            identity = self.geometry.identity if self.geometry else {}
            try:
                error = await fencing.run(self.config.fence, self.backend.source, identity)
            except Exception as exc:
                log.exception("internal error in the fence")
                error = f"internal error: {exc!r}"
            log.info("fence: %s", error or "succeeded")
            self.engine.fenced(error)
            self.commit()

    async def _seek(self, offset: int, whence: int) -> int | None:
        """The next data or hole; -1: there is no more data. Never waits for the backend long."""
        engine = self.engine
        if engine.state is not State.READY or engine.writes_outstanding or engine.latched:
            return None  # what the log has may be no hole
        size = self.engine.size
        with trio.move_on_after(SEEK_SECONDS):
            while offset < size:
                extents = await self.backend.extents(offset, size - offset)
                if not extents:
                    return None
                for extent in extents:
                    end = extent.offset + extent.length
                    if extent.hole is (whence == os.SEEK_HOLE) and end > offset:
                        return max(offset, extent.offset)
                offset = extents[-1].offset + extents[-1].length
            return size if whence == os.SEEK_HOLE else -1
        return None

    # --- who waits --------------------------------------------------------------------------

    def _held(self, request: Request) -> None:
        self.callers.note(request)
        self._somebody_waits.set()

    def _interrupted(self, request: Request) -> None:
        self.callers.interrupted(request)
        self._somebody_waits.set()
        self._let_go()

    def _let_go(self) -> None:
        for request in self.callers.leaving(self.channel.held):
            self.engine.cancel(request)
        self.commit()

    async def _look_who_waits(self) -> None:
        while True:
            await self._somebody_waits.wait()
            self._somebody_waits = trio.Event()
            while self.channel.held and self._is_waiting():
                self._let_go()
                await trio.sleep(LOOK_SECONDS)

    def _is_waiting(self) -> bool:
        # In a disk that is ready, too: one request may hang, or fail again and again.
        engine = self.engine
        if engine.state is not State.READY or engine.longest_in_flight > LOOK_SECONDS:
            return bool(self.channel.held)
        requests = engine.status()["requests"]
        assert isinstance(requests, dict)
        return bool(requests["parked"] > 0)


def main() -> int:
    lines.use()
    fds = json.loads(sys.argv[1])
    for number in signal.SIGINT, signal.SIGTERM, signal.SIGHUP:
        signal.signal(number, signal.SIG_IGN)  # the keeper gets them, and tells us
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    for fd in fds.values():
        if fd >= 0:
            os.set_inheritable(fd, False)
    # The log's thousands of entries live long and die by reference count. The default (700)
    # traverses them again and again: a tenth of a write's time or more (tried).
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return trio.run(_main, fds)


async def _main(fds: dict[str, int]) -> int:
    parent = Parent(fds["keeper"])
    log_file.set_up(str(parent.greeting["log"]))
    if "package" in parent.greeting and not await takeover.wait_as_candidate(parent, fds["memory"]):
        return 1
    try:
        takeover.check_protocol(parent.greeting)
        worker = Worker(MountConfig.from_json(parent.greeting["config"]), parent, fds)
    except LayoutError as exc:
        log.error("this version of healfs cannot take over: %s", exc)
        return 1
    except SourceError as exc:
        status = sources.exit_status(exc)
        Report(fds["ready"]).error(str(exc), status)
        return status
    except OSError as exc:
        why = f"the write log's memory: {exc.strerror}; lower --log-size, or raise the limit"
        Report(fds["ready"]).error(f"{why} (ulimit -a)", 1)
        return 1
    return await worker.run()


if __name__ == "__main__":
    sys.exit(main())
