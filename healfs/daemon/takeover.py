"""From one worker to the next, perhaps of another version.

A candidate (see daemon/upgrading.py) says whether it fits before the old worker ends; the old one
ends with as little in flight as it can, so that an upgrade leaves less behind than a death.
"""

from __future__ import annotations

import errno as e
import logging
import os
from typing import TYPE_CHECKING, Any

import trio

import healfs
from healfs.config import ConfigError, MountConfig
from healfs.core.policy import PolicyError
from healfs.core.writelog import LayoutError, check_layout
from healfs.daemon.children import PROTOCOL
from healfs.daemon.log_memory import LogMemory
from healfs.fuse import negotiation, wire

if TYPE_CHECKING:
    from healfs.daemon.parent import Parent
    from healfs.daemon.worker import Worker

log = logging.getLogger("healfs.worker")

DRAIN_SECONDS = 2.0  # for what is in flight to be answered before an upgrade; the rest is unsettled
DRAIN_LOOK = 0.002
NO_RESEND = "this kernel is older than 6.9: the death of the worker is not survived"
PACKAGE = os.path.realpath(os.path.dirname(healfs.__file__))


def check_protocol(greeting: dict[str, Any]) -> None:
    """Raises LayoutError."""
    if greeting["protocol"] != PROTOCOL:
        raise LayoutError(f"the keeper speaks protocol {greeting['protocol']}, not {PROTOCOL}")


async def wait_as_candidate(parent: Parent, fd: int) -> bool:
    """Say whether this version fits, and wait; False: another one is the worker."""
    reason = await _unfit(parent.greeting, fd)
    if reason:
        parent.tell({"do": "unfit", "reason": reason})
        return False
    parent.tell({"do": "fit", "version": healfs.__version__})
    return await parent.wait_for_go()


async def _unfit(greeting: dict[str, Any], fd: int) -> str:
    """Why this version cannot take over the mount that it is greeted with; "": it can."""
    if greeting["package"] != PACKAGE:
        return f"its interpreter finds healfs in {PACKAGE}, not in {greeting['package']}"
    try:
        check_protocol(greeting)
        config = MountConfig.from_json(greeting["config"])
        check_layout(LogMemory(config, fd).view)
    except (ConfigError, PolicyError, LayoutError) as exc:
        return str(exc)
    ours = await negotiation.negotiate(bytes.fromhex(greeting["init"]))
    return negotiation.difference(bytes.fromhex(greeting["init_reply"]), ours)


def save_init(worker: Worker, request: bytes, reply: bytes) -> None:
    """What the kernel and the first worker have negotiated is for all that come after it."""
    resend = wire.offers_resend(request)
    init = {"request": request.hex(), "reply": reply.hex(), "resend": resend}
    worker.parent.tell({"do": "init", **init})
    worker.resend = resend
    if not resend:
        worker.notes.append(NO_RESEND)
        log.warning(NO_RESEND)
    worker.negotiated.set()


async def hand_over(worker: Worker) -> None:
    """Wait for the keeper's word, then end with nothing in flight, or with little."""
    await worker.parent.hand_over.wait()
    engine, limits = worker.engine, worker.engine.limits
    engine.hold()
    with trio.move_on_after(DRAIN_SECONDS):
        while engine.in_flight:  # noqa: ASYNC110 - once, for some milliseconds
            await trio.sleep(DRAIN_LOOK)
    if worker.parent.gone.is_set():  # nobody would start the other version, or hold the mount
        engine.limits = limits
        if engine.link_up:  # the outage's end sends what was held
            engine.lost(e.ESHUTDOWN, "the keeper died in an upgrade")
        worker.commit()
        return
    log.info("made room for another version, requests in flight: %d", engine.in_flight)
    worker.unmounting.ended.set()
