"""The end of a mount: flush, unmount, and say what was given up."""

from __future__ import annotations

import json
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from healfs.config import counted, spans
from healfs.control import mounts
from healfs.core.overlap import joined
from healfs.core.request import Kind, Request
from healfs.core.states import State
from healfs.daemon import commands
from healfs.daemon.parent import UnmountError
from healfs.fuse import mount

if TYPE_CHECKING:
    from healfs.daemon.worker import Worker

log = logging.getLogger("healfs.worker")

UNMOUNT_SECONDS = 5.0
RANGES_A_LINE = 100
FORCED_FLUSH_SECONDS = 2.0  # of the five that a forced unmount may take
CLOSE_SECONDS, CLOSE_LOOK = 1.0, 0.01  # for what was closed before the unmount to be told
ELSEWHERE = (
    "unmounted, but its file is open elsewhere (a bind mount, another mount namespace): the daemon"
    " goes on until that is over too, or give it up with --force"
)
LAST_FLUSH_SECONDS = 1.0  # for what was written between the flush and the unmount


class Unmounting:
    """One unmount at a time; a forced one does not wait for a plain one's patience."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._lock = trio.Lock()
        self._patience = trio.CancelScope()  # of the flush before an unmount
        self.ended = trio.Event()
        self._forced = False
        self._told = False
        self._unmounted = False

    async def from_outside(self) -> None:
        """The mount is gone: by us, or by umount(8), and then this is the last flush."""
        async with self._lock:
            if not self.ended.is_set():
                lost = {} if await self.flush(UNMOUNT_SECONDS) else self.unflushed()
                if lost:
                    self._log_loss("unmounted from outside; lost", lost)
                self._tell_end(lost, {})
                self.ended.set()

    def _tell_end(self, given_up: dict[str, dict[str, Any]], who: dict[str, object]) -> None:
        """For the event that the keeper adds when the worker has ended; the first word counts."""
        if self._told:
            return
        self._told = True
        data: dict[str, Any] = dict(who)
        if given_up:
            data["given_up"] = _numbers(given_up)
        if seconds := self._worker.engine.outage_seconds:
            data["outage_seconds"] = round(seconds, 3)
        self._worker.parent.tell({"do": "unmounted", "data": data})

    async def on_request_of_the_keeper(self) -> None:
        """Wait for its SIGTERM; then end, within the limit."""
        await self._worker.parent.terminate.wait()
        log.info("asked to end")
        try:
            await self.umount(force=True)
        except (UnmountError, OSError) as exc:
            log.error("%s", exc)
        self.ended.set()

    def end_soon(self) -> None:
        """End after the answer to the command that asks for it."""
        trio.lowlevel.spawn_system_task(self._end_after_answer)

    async def _end_after_answer(self) -> None:
        await trio.sleep(0.05)  # the reply is queued by then; the client waits for the keeper's end
        self.ended.set()

    async def umount(self, *, force: bool, who: dict[str, object] | None = None) -> dict[str, Any]:
        """Flush and unmount; returns what was given up. Raises UnmountError.

        `who` asks for it, as the event HEALFS_UNMOUNTED says it. The caller sets `ended`, with
        end_soon, once the answer is on its way.
        """
        if force:
            self._forced = True
            self._patience.cancel()  # of a plain one that waits for the backend
        async with self._lock:
            # A plain one that waited for another one's patience has none of its own any more.
            overtaken = self._forced and not force
            if self._unmounted or self.ended.is_set() or overtaken:
                raise UnmountError("it is being unmounted already; there is no more to do")
            flushed = await self.flush(FORCED_FLUSH_SECONDS if force else UNMOUNT_SECONDS)
            if not flushed and not force:
                raise UnmountError(self._what_waits())
            given_up: dict[str, Any] = {}
            in_use = False
            if force:
                given_up = self.unflushed() if not flushed else {}
                given_up |= self._worker.engine.fail_all()
                if given_up:
                    self._log_loss("given up", given_up)
            self._worker.commit()
            try:
                await self._unmount(lazy=False)
            except OSError as exc:  # the keeper's, or without one our own
                if not force:
                    raise UnmountError(await self._why_busy(exc)) from None
                await self._unmount_lazily()
                in_use = True
            else:
                in_use = await self._is_used_elsewhere(0.0 if force else CLOSE_SECONDS)
                if in_use and not force:
                    raise UnmountError(ELSEWHERE)
            self._unmounted = True
            await self._give_up_rest(given_up, flush=flushed, in_use=in_use)
            self._tell_end(given_up, who or {})
            return given_up

    async def _why_busy(self, error: OSError) -> str:
        """There may be very many descriptors to look at: the disk's loop does not wait."""
        places = {self._worker.config.mountpoint, *mount.places_of(self._connection())}
        return await trio.to_thread.run_sync(commands.busy_text, places, error)

    def _connection(self) -> int | None:
        record = mounts.read(self._worker.parent.greeting["directory"])
        return record.connection if record else None

    async def _is_used_elsewhere(self, patience: float) -> bool:
        """What was unmounted was one of several places, and in another one the file is open."""
        worker = self._worker
        with trio.move_on_after(patience):
            # Rarely more than once: what is closed is told at once.
            while worker.namespace.opened and mount.is_connected(worker.channel.fuse):  # noqa: ASYNC110
                await trio.sleep(CLOSE_LOOK)
            return False
        return True

    async def _give_up_rest(self, given_up: dict[str, Any], *, flush: bool, in_use: bool) -> None:
        """Whoever opened the file after the flush may have had a write answered."""
        if flush:
            await self.flush(LAST_FLUSH_SECONDS)
        if in_use:  # who has it open writes on: no more is answered than what is told
            self._worker.engine.hold()
            for kind, more in self._worker.engine.fail_all().items():
                already = given_up.get(kind, {})
                given_up[kind] = {key: n + already.get(key, 0) for key, n in more.items()}
        lost = self.unflushed()
        if lost and lost["unflushed"] != given_up.get("unflushed"):
            given_up |= lost
            self._log_loss("unmounted; lost", lost)

    async def _unmount_lazily(self) -> None:
        """Of a forced end, which comes whether this works or not; then the mount stays, dead."""
        try:
            await self._unmount(lazy=True)
        except OSError as exc:
            log.error("%s", exc)

    async def _unmount(self, *, lazy: bool) -> None:
        if self._worker.parent.gone.is_set():
            await trio.to_thread.run_sync(
                partial(mount.unmount, moved=True, lazy=lazy),
                self._worker.config.mountpoint,
                self._connection(),
                abandon_on_cancel=True,
            )
        else:
            await self._worker.parent.ask({"do": "umount", "lazy": lazy})

    def _what_waits(self) -> str:
        status = self._worker.engine.status()
        requests = status["requests"]
        assert isinstance(requests, dict)
        count = requests["parked"] + requests["in_flight"]
        waiting = [counted(count, "request waits", "requests wait")]
        for unflushed in self.unflushed().values():
            waiting.append(
                counted(unflushed["requests"], "answered write is", "answered writes are")
                + " not flushed"
            )
        why = f" ({status['reason']})" if status["reason"] else ""
        what, then = "the backend is away", "try again when that is over"
        if status["state"] == State.MISMATCH:
            what, then = "another disk came back", "healfs accept goes on with it"
        elif self._worker.engine.link_up:
            what = f"the disk is {status['state']}"
        return f"{what}{why}, {', '.join(waiting)}; {then}, or give them up with --force"

    def unflushed(self) -> dict[str, dict[str, Any]]:
        """Answered writes that may be on no stable storage. Their ranges are [offset, length]."""
        entries = self._worker.engine.log.unflushed()
        if not entries:
            return {}
        length = sum(entry.length for entry in entries)
        return {
            "unflushed": {
                "requests": len(entries),
                "bytes": length,
                "ranges": joined((entry.offset, entry.offset + entry.length) for entry in entries),
            }
        }

    @staticmethod
    def _log_loss(what: str, given_up: dict[str, dict[str, Any]]) -> None:
        """The numbers in one line, then every byte of what was answered."""
        log.error("%s: %s", what, json.dumps(_numbers(given_up)))
        ranges = spans(given_up.get("unflushed", {}).get("ranges", ()))
        for first in range(0, len(ranges), RANGES_A_LINE):
            shown = ", ".join(ranges[first : first + RANGES_A_LINE])
            log.error("answered and not flushed: bytes %s", shown)

    async def flush(self, seconds: float) -> bool:
        """Everything answered is on stable storage; False when that took too long."""
        if self._worker.config.read_only or self._worker.engine.state is State.CONNECTING:
            return True
        if (
            not self._worker.engine.log.has_unflushed()
            and not self._worker.engine.writes_outstanding
        ):
            return True  # all that was answered is stable
        answered = trio.Event()
        errors: list[int] = []

        def on_answer(request: Request, errno: int, data: object) -> None:
            errors.append(errno)
            answered.set()

        request = Request(Kind.FLUSH, 0, 0, on_answer)
        self._worker.engine.submit(request)
        self._worker.commit()
        with trio.move_on_after(seconds) as self._patience:
            await answered.wait()
        self._worker.engine.cancel(request)
        if errors:
            self._worker.engine.totals.uncount(Kind.FLUSH, errors[0])
        return errors == [0]


def _numbers(given_up: dict[str, dict[str, Any]]) -> dict[str, dict[str, int]]:
    """Without the ranges, which can be very many."""
    return {
        kind: {key: value for key, value in given.items() if key != "ranges"}
        for kind, given in given_up.items()
    }
