"""The operator's fence: a command that lets nothing of old connections land any more."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Mapping

import trio

FENCE_SECONDS = 60.0  # then it is killed, and has failed
SHOWN = 200  # characters of its error output in the reason
KEPT = 4 * SHOWN  # bytes of it
REAP_SECONDS = 1.0  # for a killed one to end
LISTEN_SECONDS = 1.0  # for the rest of it, when the command has failed


async def run(command: str, source: str, identity: Mapping[str, str]) -> str:
    """Run `command` with the shell; "" when it succeeded, else why not.

    Its environment has HEALFS_SOURCE and HEALFS_IDENTITY_KEY for each key of the backend's
    identity.
    """
    environment = {**os.environ, "HEALFS_SOURCE": source}
    for key, value in identity.items():
        environment["HEALFS_IDENTITY_" + re.sub(r"\W", "_", key).upper()] = value
    try:
        process = await trio.lowlevel.open_process(
            ["/bin/sh", "-c", command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,  # so that all of it can be killed
        )
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the identity
        return f"it could not be started: {exc}"
    said = bytearray()
    try:
        with trio.fail_after(FENCE_SECONDS):
            status = await _end(process, said)
    except trio.TooSlowError:
        return f"it took longer than {FENCE_SECONDS:g} s"
    finally:
        if process.returncode is None:
            await _kill(process)
    if not status:
        return ""
    text = " ".join(said.decode(errors="replace").split())[:SHOWN]
    return f"it ended with status {status}" + (f": {text}" if text else "")


async def _kill(process: trio.Process) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)
    with trio.move_on_after(REAP_SECONDS, shield=True):
        await process.wait()


async def _end(process: trio.Process, said: bytearray) -> int:
    """Its exit status. What it leaves running may keep its standard error: that is not its end."""
    assert process.stderr is not None
    stderr = process.stderr

    async def listen() -> None:
        async for chunk in stderr:
            said.extend(chunk[: max(0, KEPT - len(said))])
        heard.set()

    heard = trio.Event()
    async with stderr, trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        status: int = await process.wait()
        if status:
            with trio.move_on_after(LISTEN_SECONDS):
                await heard.wait()
        nursery.cancel_scope.cancel()
    return status
