"""An internal error of the worker is one more outage, too.

What is in this process's memory cannot be trusted after an exception that nobody thought of. So it
ends at once, as if killed, and says nothing more to the kernel or to the backend: a successor has
the write log, and is sent what was not answered. Where none would come, it stays: the disk is
faulted, and the directory goes on.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from healfs.daemon.children import FAULTED

if TYPE_CHECKING:
    from healfs.daemon.worker import Worker

log = logging.getLogger("healfs.worker")


def faulted(worker: Worker, data: dict[str, Any]) -> None:
    """The engine's event HEALFS_FAULTED. Returns when there would be no successor."""
    replaced = worker.resend and not worker.parent.gone.is_set()
    try:
        worker.telling.event("HEALFS_FAULTED", data)
        if replaced:
            log.error("the worker ends: another one takes over")
    finally:  # no memory left to say it, perhaps
        if replaced:
            os._exit(FAULTED)


async def guarded(worker: Worker, task: Callable[..., Awaitable[None]], *arguments: Any) -> None:
    """A task of the mount's: its exception is the disk's fault, and takes no mount away."""
    try:
        await task(*arguments)
    except* Exception:
        if not hasattr(worker, "channel"):  # nothing is mounted yet
            raise
        worker.engine.fault(getattr(task, "__name__", repr(task)).strip("_"))
