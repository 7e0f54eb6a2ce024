"""The operator's fence: a command that lets nothing of old connections land any more."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Mapping

import trio

FENCE_SECONDS = 60.0  # then it is killed, and has failed
SHOWN = 200  # characters of its error output in the reason


async def run(command: str, source: str, identity: Mapping[str, str]) -> str:
    """Run `command` with the shell; "" when it succeeded, else why not.

    Its environment has HEALFS_SOURCE and HEALFS_IDENTITY_KEY for each key of the backend's
    identity.
    """
    environment = {**os.environ, "HEALFS_SOURCE": source}
    for key, value in identity.items():
        environment["HEALFS_IDENTITY_" + re.sub(r"\W", "_", key).upper()] = value
    try:
        with trio.fail_after(FENCE_SECONDS):
            result = await trio.run_process(
                ["/bin/sh", "-c", command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                capture_stderr=True,
                check=False,
            )
    except trio.TooSlowError:
        return f"it took longer than {FENCE_SECONDS:g} s"
    except (OSError, ValueError) as exc:  # ValueError: a NUL in the identity
        return f"it could not be started: {exc}"
    if result.returncode == 0:
        return ""
    text = " ".join((result.stderr or b"").decode(errors="replace").split())[:SHOWN]
    return f"it ended with status {result.returncode}" + (f": {text}" if text else "")
